"""soft_cross_entropy on K-hot and on dense targets.

With nll[c] = lse - z[c] of a row's logits z, smoothing e and class weights w, a row's loss is

    K-hot (c_k, a_k)    sum over k of a_k*((1-e)*w[c_k]*nll[c_k] + (e/C)*sum over c of w[c]*nll[c])
    dense t             sum over c of w[c]*t'[c]*nll[c],    t' = (1-e)*t + e/C

A "mean" divides the sum over rows by the sum of a_k*w[c_k], and by the number of rows for dense targets. On top the formulas as
plain differentiable torch operations, for any device and for function transforms. Below them the launchers, which on the CPU
work block by block. Options are read by name: ignore_index, label_smoothing, reduction.
"""

import math

import torch

from .._dtypes import accumulator
from ._formulas import differentiable_times, times
from ._losses import (
    class_columns,
    class_rows,
    component_weights,
    dense_target,
    empty_gradient,
    exp_,
    fast_then_nan_safe,
    flat,
    grad_output_rows,
    gradient_for,
    join,
    loss_blocks,
    pack_stats,
    reduced,
    reduced_rows,
    scale_,
    unpack_stats,
)


def soft_cross_entropy_formula(logits, weights, classes, class_weight, options):
    """Returns the loss on K-hot targets; rows with a class out of range are NaN."""
    z, e = flat(logits).to(accumulator(logits.dtype)), options.label_smoothing
    target = _HotTarget(z, weights, classes, class_weight, options, nan_safe=False, may_look=False)
    nll = -torch.log_softmax(z, 1)
    losses = nll.gather(1, target.classes)
    losses = losses if target.w is None else differentiable_times(target.w, losses)
    if e > 0:
        all_nll = nll if class_weight is None else differentiable_times(class_columns(class_weight, z), nll)
        losses = (1 - e) * losses + e * all_nll.mean(1, keepdim=True)
    losses = differentiable_times(target.a, losses).sum(1, keepdim=True)
    losses = torch.where(target.wrong_rows, math.nan, losses).view(logits.shape[0], *logits.shape[2:])
    return reduced(losses, target.weighted.sum(), options.reduction)


def dense_cross_entropy_formula(logits, target, class_weight, options):
    """Returns the loss on target probabilities."""
    C, e = logits.shape[1], options.label_smoothing
    z = flat(logits).to(accumulator(logits.dtype))
    not_ignored = class_columns(torch.arange(C, device=logits.device) != options.ignore_index, z)
    t = flat(target).to(z.dtype) * not_ignored * (1 - e) + e / C
    t = t if class_weight is None else t * class_columns(class_weight, z)
    losses = differentiable_times(t, -torch.log_softmax(z, 1)).sum(1).view(logits.shape[0], *logits.shape[2:])
    return reduced(losses, losses.numel(), options.reduction)


class _HotTarget:
    """A K-hot target of logits z [N, C] or [N, C, I], as tensors [N, K] or [N, K, I].

    classes     in range, with 0 for ignored and wrong ones
    a           the components' weights, 0 where they are ignored
    w           the class weights of their classes; None: 1
    weighted    a*w
    weight_sum  the sum of a of each row [N, 1, ...], with smoothing; the forward has stored it for the backward
    ignored     which components are ignored; None: none
    wrong_rows  which rows have a class out of range; None on the CPU, where classes have been checked
    idle_rows   which rows have no weight at all, if `nan_safe`

    `may_look` lets it read values of the CPU to leave out what a batch does not need.
    """

    def __init__(self, z, weights, classes, class_weight, options, nan_safe, may_look=True, weight_sum=None):
        may_look = may_look and z.is_cpu
        dtype, ignore_index, self.smoothing = accumulator(z.dtype), options.ignore_index, options.label_smoothing
        self.classes = classes = flat(classes)
        self.ignored = self.wrong_rows = self.idle_rows = self.w = None
        if not may_look or _occurs(ignore_index, classes):  # always: 1.35 times as long at [128, 10]
            self.ignored = classes == ignore_index
            in_range = (classes >= 0) & (classes < z.shape[1])
            self.classes = torch.where(in_range & ~self.ignored, classes, 0)
            self.wrong_rows = None if may_look else (~in_range & ~self.ignored).any(1, keepdim=True)
        a = component_weights(classes, None if weights is None else flat(weights), dtype)
        a = a if weights is None or weights.dim() == classes.dim() else a.contiguous()  # sums are taken in one order
        self.a = self.weighted = a if self.ignored is None else a.masked_fill(self.ignored, 0)
        if nan_safe:
            self.idle_rows = (self.a == 0).all(1, keepdim=True)
            self.idle_rows = self.idle_rows if self.wrong_rows is None else self.idle_rows & ~self.wrong_rows
        if class_weight is not None:
            self.w = class_weight[self.classes]
            self.weighted = self.a * self.w
        if self.smoothing > 0:
            self.class_weight = None if class_weight is None else class_columns(class_weight, z)
            self.class_weight_sum = z.shape[1] if class_weight is None else class_weight.sum()
            self.per_class = self.smoothing / z.shape[1]
            self.weight_sum = self.a.sum(1, keepdim=True) if weight_sum is None else weight_sum

    def gradient_factors(self, denominator, grad_output=None):
        """Returns (softmax factor, hard, smooth) of the gradient factor*softmax(z) - hard at the classes - smooth*class_weight.

        hard = (1-e)*a*w, smooth = (e/C)*weight_sum (None: 0), factor = the sum of hard + smooth*the sum of the class weights;
        all over the denominator (None: 1) and times grad_output, a number for each row (None: 1).
        """
        hard, smooth = self.weighted if denominator is None else self.weighted / denominator, None
        if self.smoothing > 0:
            hard = hard * (1 - self.smoothing)
            smooth = self.weight_sum * self.per_class
            smooth = smooth if denominator is None else smooth / denominator
        if grad_output is not None:
            hard, smooth = hard * grad_output, None if smooth is None else smooth * grad_output
        if self.idle_rows is not None:  # 0 whatever denominator and grad_output are
            hard = hard.masked_fill(self.weighted == 0, 0)
            smooth = None if smooth is None else smooth.masked_fill(self.idle_rows, 0)
        factor = hard.sum(1, keepdim=True)
        factor = factor if smooth is None else factor + smooth * self.class_weight_sum
        return factor if self.wrong_rows is None else factor.masked_fill(self.wrong_rows, math.nan), hard, smooth

    def exp_to_gradient_(self, exps, exp_sum, classes, factor, hard, smooth, idle_rows):
        """Replaces a block of exp(z - row_max) by its gradient."""
        exps.mul_(factor / exp_sum)
        if idle_rows is not None:
            exps.masked_fill_(idle_rows, 0)
        if smooth is not None:
            exps -= smooth if self.class_weight is None else smooth * self.class_weight
        return exps.scatter_add_(1, classes, hard.neg())

    def scaled_logit_sum(self, shifted):
        """Returns the sum over c of w[c]*(row_max - z[c]) of a block of z - row_max."""
        if self.class_weight is not None:
            shifted = times(self.class_weight, shifted)
        return shifted.sum(1, keepdim=True).neg_()


def _occurs(value, integers):
    """Whether the value is among the integers."""
    if not integers.numel():
        return False
    low, high = integers.aminmax()
    return int(low) <= value <= int(high) and bool((integers == value).any())


def soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    """Returns (loss, denominator or None, stats, each component's loss or None, gradient to the logits or None)."""
    return fast_then_nan_safe(_soft_ce_fwd, logits, weights, classes, class_weight, options, need_dweights, form_gradient)


def _soft_ce_fwd(nan_safe, logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    z, logits = class_rows(logits)
    e, reduction = options.label_smoothing, options.reduction
    target = _HotTarget(z, weights, classes, class_weight, options, nan_safe)
    dtype = target.a.dtype
    denominator = target.weighted.sum() if reduction == "mean" else None
    dlogits, grad = empty_gradient(logits, z) if form_gradient else (None, None)
    factors = target.gradient_factors(denominator) if form_gradient else (None, None, None)
    is_narrow = z.dtype != dtype
    row_maxes, exp_sums, values = [], [], []
    for block, out, picks, w, *gradient in loss_blocks(z, grad, target.classes, target.w, *factors, target.idle_rows):
        row_max = block.amax(1, keepdim=True)
        row_max = row_max.to(dtype) if is_narrow else row_max
        exps = torch.sub(block, row_max, out=None if is_narrow else out)
        picked = exps.gather(1, picks)
        scaled_logit_sum = target.scaled_logit_sum(exps) if e > 0 else None
        exp_sum = exp_(exps).sum(1, keepdim=True)
        log_exp_sum = exp_sum.log()
        value = torch.sub(log_exp_sum, picked, out=picked)  # nll
        if w is not None:
            value = times(w, value) if nan_safe else value.mul_(w)
        if scaled_logit_sum is not None:
            smoothing = (scaled_logit_sum + target.class_weight_sum * log_exp_sum) * target.per_class
            value.mul_(1 - e).add_(smoothing)
        if form_gradient:
            target.exp_to_gradient_(exps, exp_sum, picks, *gradient)
            if is_narrow:
                out.copy_(exps)
        row_maxes.append(row_max)
        exp_sums.append(exp_sum)
        values.append(value)

    value = join(values, z)
    losses = times(target.a, value) if nan_safe else target.a * value
    if target.wrong_rows is not None:
        losses.masked_fill_(target.wrong_rows, math.nan)
    per_component = None
    if need_dweights:
        per_component = value if target.ignored is None else value.masked_fill_(target.ignored, 0)
        per_component = per_component.reshape(classes.shape)
    stats = pack_stats(join(row_maxes, z), join(exp_sums, z), *([target.weight_sum] if e > 0 else []))
    return reduced_rows(losses, denominator, reduction, logits), denominator, stats, per_component, dlogits


def soft_ce_bwd(logits, weights, classes, class_weight, options, denominator, stats, grad_output, cached_grad):
    """Returns the gradient to the logits."""

    def form(grad_output):
        z, like = class_rows(logits)
        row_max, exp_sum, *weight_sum = unpack_stats(stats, z)
        target = _HotTarget(z, weights, classes, class_weight, options, True, weight_sum=weight_sum[0] if weight_sum else None)
        dlogits, grad = empty_gradient(like, z)
        row_values = row_max, exp_sum, target.classes, *target.gradient_factors(denominator, grad_output), target.idle_rows
        for block, out, row_max, *gradient in loss_blocks(z, grad, *row_values):
            exps = torch.sub(block, row_max, out=out if z.dtype == row_max.dtype else None)  # as in the forward: the same bits
            exps = target.exp_to_gradient_(exp_(exps), *gradient)
            if exps is not out:
                out.copy_(exps)
        return dlogits

    return gradient_for(form, logits, grad_output, cached_grad)


def _smoothed_target(t, class_weight, options, dtype):
    """Returns w*t' of a block t [n, C, ...]: t' = (1-e)*t + e/C, where the ignored class counts as t = 0."""
    C, e = t.shape[1], options.label_smoothing
    t = t.to(dtype)
    if 0 <= options.ignore_index < C:
        t = t.clone()
        t[:, options.ignore_index] = 0
    t = t * (1 - e) + e / C if e > 0 else t
    return t if class_weight is None else times(class_columns(class_weight, t), t)


def _dense_denominator(z, options):
    """Returns what a mean divides by, the number of rows; 1 without a mean."""
    return z.numel() // z.shape[1] if options.reduction == "mean" else 1


def dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient):
    """Returns (loss, stats, gradient to the logits or None)."""
    return fast_then_nan_safe(_dense_ce_fwd, logits, target, lam, index, class_weight, options, form_gradient)


def _dense_ce_fwd(nan_safe, logits, target, lam, index, class_weight, options, form_gradient):
    z, logits = class_rows(logits)
    dtype, denominator = accumulator(logits.dtype), _dense_denominator(z, options)
    dlogits, grad = empty_gradient(logits, z) if form_gradient else (None, None)
    row_maxes, exp_sums, weight_sums, losses = [], [], [], []
    for block, t, out in loss_blocks(z, dense_target(target, z, lam, index), grad):
        t = _smoothed_target(t, class_weight, options, dtype)
        weight_sum = t.sum(1, keepdim=True)
        row_max = block.amax(1, keepdim=True).to(dtype)
        exps = torch.sub(block, row_max, out=out if logits.dtype == dtype else None)
        scaled_logit_sum = (times(t, exps) if nan_safe else t * exps).sum(1, keepdim=True)
        exp_sum = exp_(exps).sum(1, keepdim=True)
        log_exp_sum = exp_sum.log()
        nll_sum = times(weight_sum, log_exp_sum) if nan_safe else log_exp_sum.mul_(weight_sum)
        losses.append(nll_sum.sub_(scaled_logit_sum))
        row_maxes.append(row_max)
        exp_sums.append(exp_sum)
        weight_sums.append(weight_sum)
        if form_gradient:
            _exp_to_dense_gradient_(exps, exp_sum, weight_sum, t, denominator, nan_safe)
            if exps is not out:
                out.copy_(exps)
    loss = reduced_rows(join(losses, z), denominator, options.reduction, logits)
    return loss, pack_stats(join(row_maxes, z), join(exp_sums, z), join(weight_sums, z)), dlogits


def _exp_to_dense_gradient_(exps, exp_sum, weight_sum, t, denominator, nan_safe):
    """Replaces a block of exp(z - row_max) by its gradient (weight_sum*softmax(z) - t) / denominator."""
    exps *= weight_sum / (exp_sum * denominator)
    if nan_safe:
        exps.masked_fill_(weight_sum == 0, 0)
    return exps.sub_(t, alpha=1 / max(denominator, 1))


def dense_ce_bwd(logits, target, lam, index, class_weight, options, stats, grad_output, cached_grad, need):
    """Returns the gradients to the logits and to the target; None for one that is not needed. `need`: a bool for each."""
    z, like = class_rows(logits)
    row_values = unpack_stats(stats, z)
    dtype, denominator = stats.dtype, _dense_denominator(z, options)

    def form(grad_output):
        dlogits, grad = empty_gradient(like, z)
        blocks = loss_blocks(z, grad, dense_target(target, z, lam, index), *row_values, grad_output)
        for block, out, t, row_max, exp_sum, weight_sum, factor in blocks:
            exps = torch.sub(block, row_max, out=out if z.dtype == dtype else None)  # as in the forward: the same bits
            t = _smoothed_target(t, class_weight, options, dtype)
            _exp_to_dense_gradient_(exp_(exps), exp_sum, weight_sum, t, denominator, True)
            if factor is not None:
                scale_(exps, factor)
            if exps is not out:
                out.copy_(exps)
        return dlogits

    def form_dtarget():
        dtarget = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        w = torch.ones(z.shape[1], dtype=dtype, device=z.device) if class_weight is None else class_weight.clone()
        if 0 <= options.ignore_index < len(w):
            w[options.ignore_index] = 0
        w = class_columns(w * (1 - options.label_smoothing), z)
        blocks = loss_blocks(z, dtarget.view(z.shape), *row_values, grad_output_rows(grad_output, logits))
        for block, out, row_max, exp_sum, _, factor in blocks:
            nll = exp_sum.log() - (block - row_max)
            out.copy_(times(w, nll) * (factor / denominator))
        return dtarget

    need_dlogits, need_dtarget = need
    dlogits = gradient_for(form, logits, grad_output, cached_grad) if need_dlogits else None
    return dlogits, form_dtarget() if need_dtarget else None
