"""Cross-entropy of K-hot targets."""

import math

import torch

from .._expressions import Components, accumulator, times
from . import sizes
from ._losses import by_row, carefully, class_blocks, cut, exponential, join, reduced, scale_by_row, view, with_upstream


def soft_ce_fwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, reduction, need_dweights, form_gradient):
    if (
        class_weight is None
        and label_smoothing == 0
        and not 0 <= ignore_index < logits.shape[1]
        and _is_one_block(logits, weights)
    ):
        results = _one_block(logits, classes, weights, reduction, need_dweights, form_gradient)
        if results is not None:
            return results
    options = ignore_index, label_smoothing, reduction, need_dweights, form_gradient
    return carefully(_soft_ce_fwd, logits, classes, weights, class_weight, *options)


def _is_one_block(z, weights):
    fits = z.is_cpu and 0 < z.numel() * 4 <= sizes.LOSS_BLOCK_BYTES and z.dim() <= 3 and z.dtype == accumulator(z.dtype)
    return fits and (weights is None or (weights.dtype == z.dtype and weights.dim() == z.dim()))


def _one_block(z, classes, weights, reduction, need_dweights, form_gradient):
    """What _soft_ce_fwd does, in the fewest operations: a small batch costs their number. None where there is more to look at:
    ignored components, weights of 0 on what is not finite."""
    top = z.amax(1, keepdim=True)
    e = z - top
    try:
        value = e.gather(1, classes)
    except RuntimeError:  # a class out of range is one to ignore: others have been refused
        return None
    total = exponential(e).sum(1, keepdim=True)
    value = torch.sub(total.log(), value, out=value)
    weights = torch.ones(classes.shape, dtype=z.dtype, device=z.device) if weights is None else weights
    mass = weights.sum() if reduction == "mean" else None
    hard = weights if mass is None else weights / mass
    loss = reduced(weights * value, mass, reduction, z)
    if not math.isfinite(loss if loss.dim() == 0 else loss.sum()):
        return None
    if form_gradient:
        e.mul_(hard.sum(1, keepdim=True) / total).scatter_add_(1, classes, hard.neg())
    return loss, mass, (top, total), value if need_dweights else None, e if form_gradient else None


def _soft_ce_fwd(
    careful, logits, classes, weights, class_weight, ignore_index, label_smoothing, reduction, need_dweights, form_gradient
):
    z, logits = view(logits)
    target = Components(classes, weights, class_weight, ignore_index, label_smoothing, z, careful)
    mass = target.weighted.sum() if reduction == "mean" else None
    dlogits = grad = None
    gradient = (None, None, None)
    if form_gradient:
        gradient = target.gradient(mass)
        dlogits = torch.empty_like(logits)
        grad = dlogits if logits.dim() <= 3 else dlogits.view(z.shape)
    wide = z.dtype == target.dtype
    tops, totals, values = [], [], []
    for at in class_blocks(z):
        block, sink, picks, w, *parts = cut(at, z, grad, target.classes, target.w, *gradient, target.idle)
        top = block.amax(1, keepdim=True)
        top = top if wide else top.to(target.dtype)
        e = torch.sub(block, top, out=sink if wide else None)
        value = e.gather(1, picks)
        gap = target.below(e) if label_smoothing > 0 else None
        total = exponential(e).sum(1, keepdim=True)
        log_total = total.log()
        value = torch.sub(log_total, value, out=value)
        if w is not None:
            value = times(w, value) if careful else value.mul_(w)
        if gap is not None:
            value.mul_(1 - label_smoothing).add_((gap + target.class_mass * log_total) * target.smooth)
        if form_gradient:
            target.finish(e, total, picks, *parts)
            if not wide:
                sink.copy_(e)
        tops.append(top)
        totals.append(total)
        values.append(value)

    value = join(values, z)
    losses = times(target.a, value) if careful else target.a * value
    if target.bad is not None:
        losses.masked_fill_(target.bad, math.nan)
    per_component = None
    if need_dweights:
        per_component = value if target.ignored is None else value.masked_fill_(target.ignored, 0)
        per_component = per_component.reshape(classes.shape)
    return reduced(losses, mass, reduction, logits), mass, (join(tops, z), join(totals, z)), per_component, dlogits


def soft_ce_bwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, mass, stats, upstream, formed):
    def form(upstream):
        z, like = view(logits)
        top, total = by_row(stats, z)
        target = Components(classes, weights, class_weight, ignore_index, label_smoothing, z, True)
        dlogits = torch.empty_like(like)
        grad = dlogits.view(z.shape)
        gradient = target.gradient(mass, scale_by_row(upstream, total))
        for at in class_blocks(z):
            block, sink, highest, *parts = cut(at, z, grad, top, total, target.classes, *gradient, target.idle)
            e = torch.sub(block, highest, out=sink if z.dtype == top.dtype else None)  # as in the forward: the same bits
            sink.copy_(target.finish(exponential(e), *parts))
        return dlogits

    return with_upstream(form, logits, upstream, formed)
