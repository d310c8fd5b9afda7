"""The formulas as plain differentiable torch operations on any device.

The torch backend is built on them, and they are what runs under function transforms (torch.func, forward-mode AD) and under
second derivatives, where a kernel has no derivative to give.
"""

import math

import torch
from torch.nn.functional import logsigmoid

from ._dtypes import accumulator


def columns(class_weight, like):
    """Class weights [C] against [N, C] or [N, C, I]."""
    return class_weight.view(1, -1, *[1] * (like.dim() - 2))


def _flat(t):
    """[N, C, d1, ...] as [N, C, I]; [N, C] as it is."""
    return t.flatten(2) if t.dim() > 3 else t


class Components:
    """A K-hot target as tensors [N, K] for logits z [N, C], or [N, K, I] for [N, C, I].

    classes, in range; ignored, which components are (None: none of them); a, their weights, 0 where ignored; w, the weights of
    their classes (None: 1); weighted = a*w. `idle` are rows whose a are all 0, looked up where it has to be done `careful`ly;
    `bad` those with a class out of range (None on the CPU, where classes have been checked, unless nothing may be looked at).
    """

    def __init__(self, classes, weights, class_weight, ignore_index, label_smoothing, z, careful, look=True):
        look = look and z.is_cpu
        self.classes = classes = _flat(classes)
        self.ignored = self.bad = self.idle = self.w = None
        self.dtype = accumulator(z.dtype)
        if not look or _occurs(ignore_index, classes):
            self.ignored = classes == ignore_index
            known = (classes >= 0) & (classes < z.shape[1])
            self.classes = torch.where(known & ~self.ignored, classes, 0)
            self.bad = None if look else (~known & ~self.ignored).any(1, keepdim=True)
        if weights is None:
            a = torch.ones(classes.shape, dtype=self.dtype, device=classes.device)
        else:
            a = _flat(weights)
            a = a if a.dim() == classes.dim() else a.unsqueeze(2).expand(classes.shape).contiguous()  # sums in one order
            a = a if a.dtype == self.dtype else a.to(self.dtype)
        self.a = self.weighted = a if self.ignored is None else a.masked_fill(self.ignored, 0)
        if careful:
            self.idle = (self.a == 0).all(1, keepdim=True)
            self.idle = self.idle if self.bad is None else self.idle & ~self.bad
        if class_weight is not None:
            self.w = class_weight[self.classes]
            self.weighted = self.a * self.w
        self.smoothing = label_smoothing
        if label_smoothing > 0:
            self.class_weight = None if class_weight is None else columns(class_weight, z)
            self.class_mass = z.shape[1] if class_weight is None else class_weight.sum()
            self.smooth = label_smoothing / z.shape[1]

    def gradient(self, mass, scale=None):
        """(learn, hard, smooth) of the gradient learn*softmax(z) - hard at the classes - smooth*w, over mass [] or None (1),
        times scale by row or None (1). hard = (1-e)*a*w, smooth = (e/C)*sum of a (None: 0), learn = sum of hard + smooth*sum of
        w."""
        hard, smooth = self.weighted if mass is None else self.weighted / mass, None
        if self.smoothing > 0:
            hard = hard * (1 - self.smoothing)
            smooth = self.a.sum(1, keepdim=True) * self.smooth
            smooth = smooth if mass is None else smooth / mass
        if scale is not None:
            hard, smooth = hard * scale, None if smooth is None else smooth * scale
        if self.idle is not None:  # 0 whatever mass and scale
            hard = hard.masked_fill(self.weighted == 0, 0)
            smooth = None if smooth is None else smooth.masked_fill(self.idle, 0)
        learn = hard.sum(1, keepdim=True)
        learn = learn if smooth is None else learn + smooth * self.class_mass
        return learn if self.bad is None else learn.masked_fill(self.bad, math.nan), hard, smooth

    def finish(self, e, total, classes, learn, hard, smooth, idle):
        """A block of exp(z - max), in place, to its gradient."""
        e.mul_(learn / total)
        if idle is not None:
            e.masked_fill_(idle, 0)
        if smooth is not None:
            e -= smooth if self.class_weight is None else smooth * self.class_weight
        return e.scatter_add_(1, classes, hard.neg())

    def below(self, gap):
        """sum over c of w[c]*(max - z[c]) of a block z - max."""
        if self.class_weight is not None:
            gap = times(self.class_weight, gap)
        return gap.sum(1, keepdim=True).neg_()


def _occurs(value, integers):
    if not integers.numel():
        return False
    low, high = integers.aminmax()
    return int(low) <= value <= int(high) and bool((integers == value).any())


def _reduced(losses, mass, reduction):
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / mass


def soft_ce_expression(logits, weights, classes, class_weight, ignore_index, label_smoothing, reduction):
    """The loss on K-hot targets as differentiable torch operations."""
    z = _flat(logits).to(accumulator(logits.dtype))
    target = Components(classes, weights, class_weight, ignore_index, label_smoothing, z, False, look=False)
    surprise = -torch.log_softmax(z, 1)
    value = surprise.gather(1, target.classes)
    value = value if target.w is None else target.w * drop_unweighted(target.w, value)
    if label_smoothing > 0:
        w = target.class_weight
        every = surprise if w is None else w * drop_unweighted(w, surprise)
        value = (1 - label_smoothing) * value + label_smoothing * every.mean(1, keepdim=True)
    losses = (target.a * drop_unweighted(target.a, value)).sum(1, keepdim=True)
    losses = losses if target.bad is None else torch.where(target.bad, math.nan, losses)
    return _reduced(losses.view(logits.shape[0], *logits.shape[2:]), target.weighted.sum(), reduction)


def dense_ce_expression(logits, target, class_weight, ignore_index, label_smoothing, reduction):
    """The loss on target probabilities as differentiable torch operations."""
    C = logits.shape[1]
    z = _flat(logits).to(accumulator(logits.dtype))
    surprise = -torch.log_softmax(z, 1)
    kept = columns(torch.arange(C, device=logits.device) != ignore_index, z)
    u = _flat(target).to(z.dtype) * kept * (1 - label_smoothing) + label_smoothing / C
    u = u if class_weight is None else u * columns(class_weight, z)
    losses = (u * drop_unweighted(u, surprise)).sum(1)
    return _reduced(losses.view(logits.shape[0], *logits.shape[2:]), losses.numel(), reduction)


def js_divergence_expression(sources, scale, reduction):
    """scale times the divergence of K sets of logits [N, C] as differentiable torch operations."""
    logs = torch.stack([source.to(accumulator(source.dtype)).log_softmax(1) for source in sources])
    masked = logs.isneginf()
    mixture = logs.masked_fill(masked.all(0), 0).logsumexp(0) - math.log(len(logs))
    terms = logs.exp() * (logs.masked_fill(masked, 0) - mixture)
    losses = terms.masked_fill(masked, 0).sum(2).mean(0) * scale
    return _reduced(losses, losses.numel(), reduction)


def hot_target(classes, weights, C, dtype):
    """(a K-hot target as dense rows [N, C, ...], which rows have a class out of range: [N, 1, ...])"""
    known = (classes >= 0) & (classes < C)
    a = component_weights(classes, weights, dtype)
    t = a.new_zeros(classes.shape[0], C, *classes.shape[2:]).scatter_add(1, torch.where(known, classes, 0), a)
    return t, ~known.all(1, keepdim=True)


def component_weights(classes, weights, dtype):
    """The weights of components [N, K, ...], each with its own."""
    if weights is None:
        return torch.ones(classes.shape, dtype=dtype, device=classes.device)
    return weights.to(dtype).reshape(*weights.shape, *[1] * (classes.dim() - weights.dim())).expand(classes.shape)


def smoothed(t, label_smoothing, off, threshold):
    """(1-e)*t + off, then 1 where that exceeds the threshold, if there is one, and 0 elsewhere."""
    t = (1 - label_smoothing) * t + off if label_smoothing > 0 else t
    return t if threshold is None else torch.where(t > threshold, 1.0, 0.0).to(t.dtype)


def sides(t, class_weight, pos_weight):
    """(weight of softplus(-z), weight of softplus(z)) for a target t."""
    positive, negative = t, 1 - t
    if pos_weight is not None:
        p = columns(pos_weight, t)
        positive = p * drop_unweighted(p, positive)
    if class_weight is not None:
        w = columns(class_weight, t)
        positive, negative = w * drop_unweighted(w, positive), w * drop_unweighted(w, negative)
    return positive, negative


def soft_bce_expression(
    logits, weights, classes, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction
):
    """The sigmoid loss on K-hot targets as differentiable torch operations."""
    C = logits.shape[1]
    t, bad = hot_target(classes, weights, C, accumulator(logits.dtype))
    t = smoothed(t, label_smoothing, label_smoothing / C, threshold)
    losses = torch.where(bad.squeeze(1), math.nan, _bce_rows(logits, t, class_weight, pos_weight, class_reduction))
    return _reduced(losses, losses.numel(), reduction)


def dense_bce_expression(logits, target, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction):
    """The sigmoid loss on dense targets as differentiable torch operations."""
    t = smoothed(target.to(accumulator(logits.dtype)), label_smoothing, label_smoothing / 2, threshold)
    losses = _bce_rows(logits, t, class_weight, pos_weight, class_reduction)
    return _reduced(losses, losses.numel(), reduction)


def _bce_rows(logits, t, class_weight, pos_weight, class_reduction):
    positive, negative = sides(t, class_weight, pos_weight)
    z = drop_unweighted((positive != 0) | (negative != 0), logits.to(t.dtype))
    losses = positive * drop_unweighted(positive, -logsigmoid(z)) + negative * drop_unweighted(negative, -logsigmoid(-z))
    return losses.mean(1) if class_reduction == "mean" else losses.sum(1)


# The formulas of mixing, under the names that they had here.

from ._torch._formulas import drop_unweighted, safe_index, times  # noqa: E402
from ._torch.convex_combination import convex_combination_formula as convex_combination_expression  # noqa: E402
from ._torch.convex_combination import (  # noqa: E402
    convex_combination_gradients_formula as convex_combination_gradients_expression,
)
from ._torch.mix import box_mask  # noqa: E402
from ._torch.mix import mix_dlam_formula as mix_dlam_expression  # noqa: E402
from ._torch.mix import mix_dx_formula as mix_dx_expression  # noqa: E402
from ._torch.mix import mix_formula as mix_expression  # noqa: E402
from ._torch.mix_masked import cell_weights, transported  # noqa: E402
from ._torch.mix_masked import mix_masked_dmask_formula as mix_masked_dmask_expression  # noqa: E402
from ._torch.mix_masked import mix_masked_dx_formula as mix_masked_dx_expression  # noqa: E402
from ._torch.mix_masked import mix_masked_formula as mix_masked_expression  # noqa: E402

__all__ = [
    "accumulator",
    "box_mask",
    "cell_weights",
    "convex_combination_expression",
    "convex_combination_gradients_expression",
    "mix_dlam_expression",
    "mix_dx_expression",
    "mix_expression",
    "mix_masked_dmask_expression",
    "mix_masked_dx_expression",
    "mix_masked_expression",
    "safe_index",
    "times",
    "transported",
]
