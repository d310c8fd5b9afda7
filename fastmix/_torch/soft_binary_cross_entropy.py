"""soft_binary_cross_entropy on K-hot and on dense targets.

A class with logit z, target t, class weight w and weight p of its positive term loses

    w*(p*t'*softplus(-z) + (1-t')*softplus(z)),    t' = (1-e)*t + e/C (K-hot) or (1-e)*t + e/2 (dense), or t' > threshold

and a row the sum or the mean over its classes. A K-hot t is the sum of the weights that name the class. On top the formulas as
plain differentiable torch operations, for any device and for function transforms. Below them the launchers, which on the CPU
work block by block: of a K-hot target all classes have the same weights but those that it names, whose terms are computed by
themselves and put in their places. Options are read by name: label_smoothing, threshold, class_reduction, reduction.
"""

import math

import torch
from torch.nn.functional import logsigmoid

from .._dtypes import accumulator
from . import sizes
from ._formulas import differentiable_times, drop_unweighted, times
from ._losses import (
    LOG2_E,
    MixedTarget,
    class_columns,
    class_rows,
    component_weights,
    dense_target,
    empty_gradient,
    fast_then_nan_safe,
    grad_output_rows,
    gradient_for,
    join,
    loss_blocks,
    reduced,
    reduced_rows,
    scale_,
)


def soft_binary_cross_entropy_formula(logits, weights, classes, class_weight, pos_weight, options):
    """Returns the loss on K-hot targets; rows with a class out of range are NaN."""
    C, dtype = logits.shape[1], accumulator(logits.dtype)
    in_range = (classes >= 0) & (classes < C)
    a = component_weights(classes, weights, dtype)
    t = a.new_zeros(logits.shape).scatter_add(1, torch.where(in_range, classes, 0), a)
    losses = _row_losses(logits, _loss_target(t, options, C), class_weight, pos_weight, options)
    losses = torch.where(in_range.all(1), losses, math.nan)
    return reduced(losses, losses.numel(), options.reduction)


def dense_binary_cross_entropy_formula(logits, target, class_weight, pos_weight, options):
    """Returns the loss on dense targets."""
    t = _loss_target(target.to(accumulator(logits.dtype)), options, 2)
    losses = _row_losses(logits, t, class_weight, pos_weight, options)
    return reduced(losses, losses.numel(), options.reduction)


def binary_elements(logits, target, class_weight, pos_weight, options, over):
    """Returns each element's loss, in the logits' shape, on a dense target that is smoothed by e/over."""
    t = _loss_target(target.to(accumulator(logits.dtype)), options, over)
    return _element_losses(logits, t, class_weight, pos_weight)


def _row_losses(logits, t, class_weight, pos_weight, options):
    """Returns each row's loss [N, d1, ...] for the target t' of every class."""
    losses = _element_losses(logits, t, class_weight, pos_weight)
    return losses.mean(1) if options.class_reduction == "mean" else losses.sum(1)


def _element_losses(logits, t, class_weight, pos_weight):
    w, p = (None if weight is None else class_columns(weight, t) for weight in (class_weight, pos_weight))
    positive, negative = _term_weights(t, w, p, differentiable_times)
    z = drop_unweighted((positive != 0) | (negative != 0), logits.to(t.dtype))
    return differentiable_times(positive, -logsigmoid(z)) + differentiable_times(negative, -logsigmoid(-z))


def _loss_target(t, options, over):
    """Returns t' of a target t: (1-e)*t + e/over, then 1 where it exceeds the threshold and 0 elsewhere, if there is one."""
    e = options.label_smoothing
    t = (1 - e) * t + e / over if e > 0 else t
    return t if options.threshold is None else torch.where(t > options.threshold, 1.0, 0.0).to(t.dtype)


def _term_weights(t, w, p, product):
    """Returns the weights of the positive term softplus(-z), w*p*t, and of the negative one softplus(z), w*(1-t)."""
    positive, negative = t if p is None else product(p, t), 1 - t
    return (positive, negative) if w is None else (product(w, positive), product(w, negative))


def _softplus_remainder(z):
    """Returns log(1 + exp(-|z|)), which softplus(z) adds to max(z, 0), as a new tensor."""
    return z.abs().mul_(-LOG2_E).exp2_().log1p_()


def _slope(z, w, p):
    """Returns w*(p*softplus(-z) - softplus(z)), the derivative of a class's loss by its target."""
    slope = -z
    if p is not None:
        remainder = _softplus_remainder(z)
        slope = times(p, slope.clamp_(min=0) + remainder) - (z.clamp(min=0) + remainder)
    return slope if w is None else times(w, slope)


def _mean_factor(z, options):
    """Returns 1 over the number of terms in the means: of classes, and of rows."""
    rows, terms = z.numel() // z.shape[1], 1
    terms = terms * z.shape[1] if options.class_reduction == "mean" else terms
    terms = terms * rows if options.reduction == "mean" else terms
    return 1 / max(terms, 1)


def _reduced_loss(row_losses, options, logits):
    """Returns the loss of rows [N, 1, ...] that the mean's factor is part of already: its mean of nothing is 0/0, NaN."""
    return reduced_rows(row_losses, min(row_losses.numel(), 1), options.reduction, logits)


class _Terms:
    """The two terms of each class against blocks of logits, for a target t' in their shape, or one number for all.

    What needs no multiplication is None: `positive` where t' is 0 throughout, `both`, the sum of the weights, where it is 1.
    """

    def __init__(self, t, class_weight, pos_weight, nan_safe):
        w, p = (None if weight is None else class_columns(weight, t) for weight in (class_weight, pos_weight))
        self.positive, self.negative = _term_weights(t, w, p, times if nan_safe else torch.mul)
        self.both = None if w is None and p is None else self.positive + self.negative
        self.nan_safe = nan_safe
        if t.numel() == 1 and t.is_cpu and float(t) == 0:
            self.positive, self.negative = None, self.both

    def loss(self, z, buffer, left_out=None):
        """Returns a block's loss for each row, without the classes `left_out`. The buffer has room for one number each."""

        def without(values):
            return values if left_out is None else values.scatter_(1, left_out, 0)

        q = without(torch.abs(z, out=buffer).mul_(-LOG2_E).exp2_())  # exp(-|z|)
        total = _log1p_sum(q) if self.both is None else self._times_(q.log1p_(), self.both).sum(1, keepdim=True)
        total += without(self._times_(torch.clamp(z, min=0, out=buffer), self.negative)).sum(1, keepdim=True)
        if self.positive is not None:
            total += without(self._times_(torch.clamp(z, max=0, out=buffer).neg_(), self.positive)).sum(1, keepdim=True)
        return total

    def gradient(self, z, factor, out):
        """Returns a block's gradient times the factor, in `out` if that is given."""
        gradient = self._times_(torch.sigmoid(z, out=out), self.both)
        if self.positive is not None:
            gradient -= self.positive
        return gradient.mul_(factor)

    def _times_(self, values, weights):
        """Multiplies the values in place; weights of None are 1."""
        if weights is None:
            return values
        values *= weights
        return values.masked_fill_(weights == 0, 0) if self.nan_safe else values


def _log1p_sum(q):
    """Returns the sum over classes of log(1+q), q in [0, 1], which is written.

    (1+a)(1+b) = 1 + (a + a*b + b) saves a logarithm and rounds no small number off: 1.4 times as fast at [256, 1000].
    """
    for _ in range(3):
        half = q.shape[1] // 2
        low, high = q[:, :half], q[:, q.shape[1] - half :]
        low.addcmul_(low, high).add_(high)
        q = q[:, : q.shape[1] - half]
    return q.log1p_().sum(1, keepdim=True)


class _HotBinaryTarget:
    """A K-hot target of logits z [N, C] or [N, C, I].

    picks       the classes that it names, in range: [N, K] or [N, K, I]
    loss        the loss of these, for each row
    gradient    their gradient, without the mean's factor
    rest        the terms of all other classes
    wrong_rows  which rows have a class out of range; None on the CPU, where classes have been checked
    """

    def __init__(self, z, weights, classes, class_weight, pos_weight, options, nan_safe):
        N, C, *inner = z.shape
        dtype, self.smoothing = accumulator(z.dtype), options.label_smoothing
        a = component_weights(classes, weights, dtype).reshape(N, classes.shape[1], *inner)
        classes = classes.reshape(a.shape)
        self.picks, self.wrong_rows = classes, None
        if not z.is_cpu:
            in_range = (classes >= 0) & (classes < C)
            self.picks, self.wrong_rows = torch.where(in_range, classes, 0), ~in_range.all(1, keepdim=True)
        times_named = 1
        if a.shape[1] > 1:  # a class that is named again counts once, with the sum of its weights
            components, a, times_named = a, torch.zeros_like(a), torch.zeros_like(a)
            for named, weight in zip(self.picks.split(1, 1), components.split(1, 1), strict=True):
                same = self.picks == named
                a += torch.where(same, weight, 0)
                times_named += same
        self.z = z.gather(1, self.picks).to(dtype)
        self.w, self.p = (None if weight is None else weight[self.picks] for weight in (class_weight, pos_weight))
        losses, self.gradient = self._picked_terms(*_term_weights(_loss_target(a, options, C), self.w, self.p, times))
        self.loss = (losses / times_named).sum(1, keepdim=True)
        zero = torch.zeros([1] * z.dim(), dtype=dtype, device=z.device)
        self.rest = _Terms(_loss_target(zero, options, C), class_weight, pos_weight, nan_safe)

    def _picked_terms(self, positive, negative):
        """Returns (loss, gradient) of the named classes, to the last bit also where they are small."""
        size, above = self.z.abs(), self.z > 0
        q = size.neg().exp_()
        larger = torch.where(above, negative, positive)  # the weight of the term that grows with |z|
        smaller_sigmoid, remainder = q / (1 + q), q.log1p_()
        if self.w is not None or self.p is not None:  # else the weights sum to 1
            both = positive + negative
            smaller_sigmoid, remainder = times(both, smaller_sigmoid), times(both, remainder)
        gradient = larger - smaller_sigmoid
        return times(larger, size) + remainder, torch.where(above, gradient, -gradient)

    def slope(self, factor):
        """Returns the derivative of the loss by each component's weight."""
        slope = _slope(self.z, self.w, self.p) * ((1 - self.smoothing) * factor)
        return slope if self.wrong_rows is None else slope.masked_fill_(self.wrong_rows, math.nan)

    def write_gradient(self, block, picks, gradient, mean_factor, out, grad_output=None):
        """Writes a block's gradient."""
        block_gradient = self.rest.gradient(block, mean_factor, out if out.dtype == block.dtype else None)
        block_gradient.scatter_(1, picks, gradient * mean_factor)
        if grad_output is not None:
            scale_(block_gradient, grad_output)
        if block_gradient is not out:
            out.copy_(block_gradient)


def _loss_buffer(block, out):
    """Returns memory for a number of each logit: where the gradient will be written, if that has the right dtype."""
    return out if out is not None and out.dtype == block.dtype else torch.empty_like(block)


def soft_bce_fwd(logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient):
    """Returns (loss, its derivative by each component's weight or None, gradient to the logits or None)."""
    arguments = weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient
    return fast_then_nan_safe(_soft_bce_fwd, logits, *arguments)


def _soft_bce_fwd(nan_safe, logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient):
    z, logits = class_rows(logits)
    target = _HotBinaryTarget(z, weights, classes, class_weight, pos_weight, options, nan_safe)
    dtype, mean_factor = accumulator(z.dtype), _mean_factor(z, options)
    dlogits, grad = empty_gradient(logits, z) if form_gradient else (None, None)
    losses = []
    blocks = loss_blocks(z, grad, target.picks, target.gradient, block_bytes=sizes.BINARY_BLOCK_BYTES)
    for block, out, picks, gradient in blocks:
        block = block.to(dtype)
        losses.append(target.rest.loss(block, _loss_buffer(block, out), picks))
        if form_gradient:
            target.write_gradient(block, picks, gradient, mean_factor, out)
    losses = (join(losses, z) + target.loss) * mean_factor
    if target.wrong_rows is not None:
        losses.masked_fill_(target.wrong_rows, math.nan)
        if form_gradient:
            grad.masked_fill_(target.wrong_rows, math.nan)
    slope = target.slope(mean_factor).reshape(classes.shape) if need_dweights else None
    return _reduced_loss(losses, options, logits), slope, dlogits


def soft_bce_bwd(logits, weights, classes, class_weight, pos_weight, options, grad_output, cached_grad):
    """Returns the gradient to the logits."""

    def form(grad_output):
        z, like = class_rows(logits)
        target = _HotBinaryTarget(z, weights, classes, class_weight, pos_weight, options, True)
        dtype, mean_factor = accumulator(z.dtype), _mean_factor(z, options)
        dlogits, grad = empty_gradient(like, z)
        row_values = target.picks, target.gradient, grad_output
        for block, out, picks, gradient, factor in loss_blocks(z, grad, *row_values, block_bytes=sizes.BINARY_BLOCK_BYTES):
            target.write_gradient(block.to(dtype), picks, gradient, mean_factor, out, factor)
        if target.wrong_rows is not None:
            grad.masked_fill_(target.wrong_rows, math.nan)
        return dlogits

    return gradient_for(form, logits, grad_output, cached_grad)


def _row_factor(target, z, mean_factor):
    """Returns the mean's factor for a dense target's rows: a number, or of a MixedTarget one a row, NaN where it is wrong."""
    if not isinstance(target, MixedTarget):
        return mean_factor
    factor = torch.full_like(target.lam, mean_factor).masked_fill_(target.lam.isnan(), math.nan)
    return factor.view(-1, *[1] * (z.dim() - 1)).expand(-1, 1, *z.shape[2:])


def dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, form_gradient):
    """Returns (loss, gradient to the logits or None)."""
    arguments = target, lam, index, class_weight, pos_weight, options, form_gradient
    return fast_then_nan_safe(_dense_bce_fwd, logits, *arguments)


def _dense_bce_fwd(nan_safe, logits, target, lam, index, class_weight, pos_weight, options, form_gradient):
    z, logits = class_rows(logits)
    targets, dtype = dense_target(target, z, lam, index), accumulator(z.dtype)
    row_factor = _row_factor(targets, z, _mean_factor(z, options))
    dlogits, grad = empty_gradient(logits, z) if form_gradient else (None, None)
    losses = []
    for block, t, out, factor in loss_blocks(z, targets, grad, row_factor, block_bytes=sizes.BINARY_BLOCK_BYTES):
        block = block.to(dtype)
        terms = _Terms(_loss_target(t.to(dtype), options, 2), class_weight, pos_weight, nan_safe)
        losses.append(terms.loss(block, _loss_buffer(block, out)))
        if form_gradient:
            gradient = terms.gradient(block, factor, out if z.dtype == dtype else None)
            if gradient is not out:
                out.copy_(gradient)
        del terms  # before those of the next block take as much memory again
    return _reduced_loss(join(losses, z) * row_factor, options, logits), dlogits


def dense_bce_bwd(logits, target, lam, index, class_weight, pos_weight, options, grad_output, cached_grad, need):
    """Returns the gradients to the logits and to the target; None for one that is not needed. `need`: a bool for each."""
    z, like = class_rows(logits)
    dtype, mean_factor, block_bytes = accumulator(z.dtype), _mean_factor(z, options), sizes.BINARY_BLOCK_BYTES

    def form(grad_output):
        targets = dense_target(target, z, lam, index)
        dlogits, grad = empty_gradient(like, z)
        row_values = _row_factor(targets, z, mean_factor), grad_output
        for block, t, out, factor, g in loss_blocks(z, targets, grad, *row_values, block_bytes=block_bytes):
            terms = _Terms(_loss_target(t.to(dtype), options, 2), class_weight, pos_weight, True)
            gradient = terms.gradient(block.to(dtype), factor, out if z.dtype == dtype else None)
            if g is not None:
                scale_(gradient, g)
            if gradient is not out:
                out.copy_(gradient)
            del terms
        return dlogits

    def form_dtarget():
        dtarget = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        factors = grad_output_rows(grad_output, logits) * ((1 - options.label_smoothing) * mean_factor)
        w, p = (None if weight is None else class_columns(weight, z) for weight in (class_weight, pos_weight))
        for block, out, factor in loss_blocks(z, dtarget.view(z.shape), factors, block_bytes=block_bytes):
            out.copy_(_slope(block.to(dtype), w, p) * factor)
        return dtarget

    need_dlogits, need_dtarget = need
    dlogits = gradient_for(form, logits, grad_output, cached_grad) if need_dlogits else None
    return dlogits, form_dtarget() if need_dtarget else None
