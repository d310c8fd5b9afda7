"""Cross-entropy of dense targets, and of MixedRows mixed block by block."""

import torch

from .._dtypes import accumulator
from .._expressions import columns
from ._formulas import times
from ._losses import (
    by_row,
    by_row_numbers,
    carefully,
    class_blocks,
    exponential,
    join,
    reduced,
    rows_of,
    scale_by_row,
    view,
    with_upstream,
)


def _dense_target(t, class_weight, ignore_index, label_smoothing, dtype):
    """w*t' of a block [n, C, i]: t' = (1-e)*t + e/C, an ignored column counts as t = 0."""
    C = t.shape[1]
    t = t.to(dtype)
    if 0 <= ignore_index < C:
        t = t.clone()
        t[:, ignore_index] = 0
    t = t * (1 - label_smoothing) + label_smoothing / C if label_smoothing > 0 else t
    return t if class_weight is None else times(columns(class_weight, t), t)


def dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient):
    return carefully(_dense_ce_fwd, logits, target, lam, index, class_weight, options, form_gradient)


def _dense_ce_fwd(careful, logits, target, lam, index, class_weight, options, form_gradient):
    ignore_index, label_smoothing, reduction = options
    z, logits = view(logits)
    t = rows_of(target, z, lam, index)
    divisor = z.numel() // z.shape[1] if reduction == "mean" else 1
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    tops, totals, masses, losses = [], [], [], []
    for at in class_blocks(z):
        block, sink = z[at], None if grad is None else grad[at]
        u = _dense_target(t[at], class_weight, ignore_index, label_smoothing, dtype)
        mass = u.sum(1, keepdim=True)
        top = block.amax(1, keepdim=True).to(dtype)
        e = torch.sub(block, top, out=sink if form_gradient and logits.dtype == dtype else None)
        gap = (times(u, e) if careful else u * e).sum(1, keepdim=True)
        total = exponential(e).sum(1, keepdim=True)
        log_total = total.log()
        losses.append((times(mass, log_total) if careful else log_total.mul_(mass)).sub_(gap))
        tops.append(top)
        totals.append(total)
        masses.append(mass)
        if form_gradient:
            _dense_gradient(e, total, mass, u, divisor, careful)
            if e.dtype != logits.dtype:
                sink.copy_(e)
    loss = reduced(join(losses, z), divisor, reduction, logits)
    return loss, by_row_numbers(join(tops, z), join(totals, z), join(masses, z)), dlogits


def _dense_gradient(e, total, mass, u, divisor, careful):
    """A block's exponentials, in place, to its gradient; rows of targets that sum to 0 take none of them."""
    e *= mass / (total * divisor)
    if careful:
        e.masked_fill_(mass == 0, 0)
    return e.sub_(u, alpha=1 / max(divisor, 1))


def dense_ce_bwd(
    logits, target, lam, index, class_weight, options, stats, upstream, formed, need_dlogits, need_dtarget
):  # fmt: skip
    ignore_index, label_smoothing, reduction = options
    z, like = view(logits)
    t = rows_of(target, z, lam, index)
    divisor = z.numel() // z.shape[1] if reduction == "mean" else 1
    top, total, mass = by_row(stats, z)

    def form(upstream):
        dlogits, upstream = torch.empty_like(like), scale_by_row(upstream, total)
        for at in class_blocks(z):
            sink = dlogits.view(z.shape)[at]
            e = torch.sub(z[at], top[at], out=sink if z.dtype == top.dtype else None)  # as in the forward: the same bits
            u = _dense_target(t[at], class_weight, ignore_index, label_smoothing, total.dtype)
            e = _dense_gradient(exponential(e), total[at], mass[at], u, divisor, True)
            sink.copy_((e * upstream[at]).masked_fill_(e == 0, 0))
        return dlogits

    def form_dtarget(upstream):
        dtarget = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        upstream = scale_by_row(upstream, total)
        w = torch.ones(z.shape[1], dtype=total.dtype, device=z.device) if class_weight is None else class_weight.clone()
        if 0 <= ignore_index < len(w):
            w[ignore_index] = 0
        w = columns(w * (1 - label_smoothing), z)
        for at in class_blocks(z):
            surprise = total[at].log() - (z[at] - top[at])
            dtarget.view(z.shape)[at] = times(w, surprise) * (upstream[at] / divisor)
        return dtarget

    dlogits = with_upstream(form, logits, upstream, formed) if need_dlogits else None
    return dlogits, form_dtarget(upstream) if need_dtarget else None
