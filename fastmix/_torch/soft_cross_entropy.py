"""Cross-entropy of K-hot targets."""

import math

import torch

from .._expressions import Components, times
from ._losses import (
    by_row,
    by_row_numbers,
    carefully,
    class_blocks,
    cut,
    exponential,
    join,
    reduced,
    scale_by_row,
    view,
    with_upstream,
)


def soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    return carefully(_soft_ce_fwd, logits, weights, classes, class_weight, options, need_dweights, form_gradient)


def _soft_ce_fwd(careful, logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    ignore_index, label_smoothing, reduction = options
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
    stats = by_row_numbers(join(tops, z), join(totals, z), *([target.a.sum(1, keepdim=True)] if label_smoothing > 0 else []))
    return reduced(losses, mass, reduction, logits), mass, stats, per_component, dlogits


def soft_ce_bwd(logits, weights, classes, class_weight, options, mass, stats, upstream, formed):
    ignore_index, label_smoothing, _ = options

    def form(upstream):
        z, like = view(logits)
        top, total = by_row(stats[:2], z)
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


from .._expressions import dense_ce_expression, soft_ce_expression  # noqa: E402


def soft_cross_entropy_formula(logits, weights, classes, class_weight, options):
    return soft_ce_expression(logits, weights, classes, class_weight, *options)


def dense_cross_entropy_formula(logits, target, class_weight, options):
    return dense_ce_expression(logits, target, class_weight, *options)
