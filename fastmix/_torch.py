"""The torch backend: the same names and signatures as the kernels' face, for the CPU and for any device without Triton.

On the CPU work goes in blocks of rows that stay in the cache, and only outputs are allocated. Elsewhere whole batches are
one block.
"""

import math

import torch

from ._expressions import (
    Components,
    accumulator,
    box_mask,
    columns,
    mix_dx_expression,
    mix_expression,
    pixel_weights,
    safe_index,
    times,
)

MIX_BLOCK_BYTES = 1 << 20  # a block of rows and its temporaries stay in the cache
SMALL_ROW_BYTES = 1 << 13  # below this whole blocks are computed; above it rows and boxes are copied one by one
LOSS_BLOCK_BYTES = 1 << 22  # torch's softmax stays there by itself, row by row


def _blocks(rows: int, row_bytes: int, device: torch.device, block_bytes: int = MIX_BLOCK_BYTES):
    """Slices of rows, in blocks of so many bytes on the CPU; one slice on another device."""
    step = rows if device.type != "cpu" else max(1, block_bytes // max(row_bytes, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1))]


# Mixing


def _weights(lam, box, rows, x):
    """pixel_weights of some of the rows."""
    return pixel_weights(lam[rows], None if box is None else box[rows], x)


def mix_fwd(x, lam, index, box, out):
    result = torch.empty_like(x) if out is None else out
    if not x.is_cpu:
        return result.copy_(mix_expression(x, lam, index, box))
    lam = lam.expand(x.shape[0])
    copies = (lam == 0) | (lam == 1)  # exact, and the other row is not looked at
    row_bytes = x[:1].numel() * lam.element_size()
    if row_bytes < SMALL_ROW_BYTES and (box is not None or bool(copies.any())):
        for rows in _blocks(x.shape[0], row_bytes, x.device):
            own = _weights(lam, box, rows, x)
            mine, partner = x[rows].to(lam.dtype), x.index_select(0, index[rows]).to(lam.dtype)
            mixed = (mine * own).addcmul_(partner, 1 - own)
            result[rows] = torch.where(own == 0, partner, torch.where(own == 1, mine, mixed))
        return result
    order = [0, *sorted(range(1, x.dim()), key=x.stride, reverse=True)]  # of a row's dimensions in memory
    source, sink = x.permute(order), result.permute(order)
    for rows in _blocks(x.shape[0], row_bytes, x.device):
        own, target = lam[rows].view(-1, *[1] * (x.dim() - 1)), sink[rows]
        if bool(copies[rows].all()):
            continue
        partner = source.index_select(0, index[rows])
        if x.dtype == lam.dtype:
            torch.mul(source[rows], own, out=target)
            target.addcmul_(partner, 1 - own)
        else:
            target.copy_((source[rows].to(lam.dtype) * own).addcmul_(partner.to(lam.dtype), 1 - own))
    partners, own = index.tolist(), lam.tolist()
    for row in copies.nonzero().flatten().tolist():
        result[row].copy_(x[row if own[row] == 1 else partners[row]])
    if box is not None:
        for row, inside in enumerate(_box_slices(box)):
            result[row][inside].copy_(x[partners[row]][inside])
    return result


def _box_slices(box):
    """Indices into a row, one per row, that select its box."""
    dims = box.shape[1] // 2
    for row in box.clamp(min=0).tolist():
        yield (..., *[slice(row[d], max(row[d], row[dims + d])) for d in range(dims)])


def mix_bwd(g, x, lam, index, box, layout, need_dx, need_dlam):
    dx = dlam = None
    if need_dx:
        dx = torch.empty_strided(g.shape, layout, dtype=g.dtype, device=g.device)
        _mix_dx(g, lam, index, box, dx)
    if need_dlam:
        dlam = torch.empty(g.shape[0], dtype=lam.dtype, device=g.device)
        for rows in _blocks(g.shape[0], g[:1].numel() * 4, g.device):
            # rows of a block against all of x: the partner may be anywhere
            known_index, known = safe_index(index[rows], g.shape[0])
            gap = x[rows].to(lam.dtype) - x.index_select(0, known_index).to(lam.dtype)
            gap *= g[rows]
            if box is not None:
                gap.masked_fill_(box_mask(box[rows], g.shape), 0)
            dlam[rows] = torch.where(known, gap.flatten(1).sum(1) if g.dim() > 1 else gap, math.nan)
    return dx, dlam


def _mix_dx(g, lam, index, box, dx):
    if not g.is_cpu:
        return dx.copy_(mix_dx_expression(g, lam, index, box))
    lam = lam.expand(g.shape[0])
    targets, order = index.sort(stable=True)

    def weighted(weights, rows):
        rows = rows.to(lam.dtype) * weights
        return rows.masked_fill_(weights == 0, 0) if bool((weights == 0).any()) else rows

    for rows in _blocks(g.shape[0], g[:1].numel() * 4, g.device):
        total = weighted(_weights(lam, box, rows, g), g[rows])
        first, last = torch.searchsorted(targets, torch.tensor([rows.start, rows.stop])).tolist()
        for start in range(first, last, rows.stop - rows.start):  # whoever has its partner among these rows
            part = slice(start, min(start + rows.stop - rows.start, last))
            k = order[part]
            share = 1 - _weights(lam, box, k, g)
            total.index_add_(0, targets[part] - rows.start, weighted(share, g[k]))
        dx[rows] = total
    return dx


# Losses. Logits are seen as [N, C, I]; rows of a loss are numbered n*I + i.


def _view(t):
    """t as [N, C, I], and t itself: a contiguous copy where its layout has no such view."""
    shape = (t.shape[0], t.shape[1], math.prod(t.shape[2:]))
    try:
        return t.view(shape), t
    except RuntimeError:
        t = t.contiguous()
        return t.view(shape), t


def _class_blocks(z):
    """Index triples (outer slice, all classes, inner slice) that cover [N, C, I] in blocks that fit the cache."""
    N, C, I = z.shape
    if I * C * 4 > LOSS_BLOCK_BYTES and I > 1 and z.is_cpu:
        step = max(16, LOSS_BLOCK_BYTES // (4 * C))
        return [(slice(n, n + 1), slice(None), slice(i, i + step)) for n in range(N) for i in range(0, I, step)]
    return [(rows, slice(None), slice(None)) for rows in _blocks(N, C * I * 4, z.device, LOSS_BLOCK_BYTES)] if I else []


def _softmax(z, out=None):
    """Softmax over the classes of [N, C, I]; torch is fastest where they are the last dimension."""
    if z.shape[2] != 1:
        return torch.softmax(z, 1, out=out)
    return torch.softmax(z.squeeze(2), 1, out=None if out is None else out.squeeze(2)).unsqueeze(2)


def _softmax_parts(z, out=None):
    """(max, sum of exp(z - max), softmax) over the classes: the largest probability is one over the sum."""
    softmax = _softmax(z, out)
    return z.amax(1, keepdim=True), softmax.amax(1, keepdim=True).reciprocal_(), softmax


def soft_ce_fwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, mean, need_dweights, form_gradient):
    z, logits = _view(logits)
    N, C, I = z.shape
    dtype = accumulator(logits.dtype)
    target = Components(classes, weights, class_weight, ignore_index, label_smoothing, C, dtype, z.is_cpu)
    mass = target.weighted.sum() if mean else None
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    in_place = form_gradient and logits.dtype == dtype
    scale = mass.reciprocal() if mean else torch.ones((), dtype=dtype, device=z.device)
    stats = torch.empty((2, N, 1, I), dtype=dtype, device=z.device)
    top, total = stats
    gap = torch.empty((N, 1, I), dtype=dtype, device=z.device) if label_smoothing > 0 else None
    for at in _class_blocks(z):
        o, _, i = at
        block = z[at].to(dtype)
        top[o, :, i], total[o, :, i], softmax = _softmax_parts(block, grad[at] if in_place else None)
        if label_smoothing > 0:
            gap[o, :, i] = target.below(top[o, :, i], block)
        if form_gradient:
            softmax = target.finish(softmax, scale, at)
            if not in_place:
                grad[at] = softmax

    log_total = total.log()
    value = log_total + (top - z.gather(1, target.classes).to(dtype))
    if target.w is not None:
        value = times(target.w, value)
    if label_smoothing > 0:
        value = (1 - label_smoothing) * value + (label_smoothing / C) * (gap + target.class_mass * log_total)
    losses = torch.empty((N, *logits.shape[2:]), dtype=dtype, device=z.device)
    rows = losses.view(N, I)
    torch.sum(target.a * value if target.idle is None else times(target.a, value), 1, out=rows)
    if target.bad is not None:
        rows.masked_fill_(target.bad.squeeze(1), math.nan)
    if mean:
        rows /= mass
    if target.ignored is not None:
        value.masked_fill_(target.ignored, 0)
    return losses, mass, stats, value.view(classes.shape) if need_dweights else None, dlogits


def soft_ce_bwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, mass, stats, upstream):
    z, logits = _view(logits)
    N, C, I = z.shape
    dtype = accumulator(logits.dtype)
    target = Components(classes, weights, class_weight, ignore_index, label_smoothing, C, dtype, z.is_cpu)
    dlogits = torch.empty_like(logits)
    grad = dlogits.view(z.shape)
    scale = (upstream.to(dtype) if mass is None else upstream.to(dtype) / mass).expand(N * I).view(N, 1, I)
    for at in _class_blocks(z):
        o, _, i = at
        grad[at] = target.finish(_softmax(z[at].to(dtype)), scale[o, :, i], at)
    return dlogits


def scale_rows_(t, upstream):
    looked_at = upstream.is_cpu
    if looked_at and upstream.dim() == 0 and float(upstream) == 1:
        return t
    rows = t.view(t.shape[0], t.shape[1], math.prod(t.shape[2:]))
    if upstream.dim():
        upstream = upstream.view(rows.shape[0], 1, rows.shape[2])
    if looked_at and bool(torch.isfinite(upstream).all()):
        rows.mul_(upstream)  # in float32, rounded once
    else:
        rows.copy_((rows.to(upstream.dtype) * upstream).masked_fill_(rows == 0, 0))
    return t


def _dense_target(t, class_weight, ignore_index, label_smoothing, dtype):
    """w*t' of a block [n, C, i]: t' = (1-e)*t + e/C, an ignored column counts as t = 0."""
    C = t.shape[1]
    t = t.to(dtype)
    if 0 <= ignore_index < C:
        t = t.clone()
        t[:, ignore_index] = 0
    t = t * (1 - label_smoothing) + label_smoothing / C if label_smoothing > 0 else t
    return t if class_weight is None else times(columns(class_weight).expand_as(t), t)


def _dense_gradient(softmax, u):
    """A block's softmax, in place, to its gradient; rows of targets that sum to 0 take none of it."""
    mass = u.sum(1, keepdim=True)
    return softmax.mul_(mass).masked_fill_(mass == 0, 0).sub_(u)


def dense_ce_fwd(logits, target, class_weight, ignore_index, label_smoothing, divisor, form_gradient):
    z, logits = _view(logits)
    t, _ = _view(target)
    N, _, I = z.shape
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    in_place = form_gradient and logits.dtype == dtype
    losses = torch.empty((N, *logits.shape[2:]), dtype=dtype, device=z.device)
    rows = losses.view(N, 1, I)
    stats = torch.empty((2, N, 1, I), dtype=dtype, device=z.device)
    for at in _class_blocks(z):
        o, _, i = at
        block = z[at].to(dtype)
        u = _dense_target(t[at], class_weight, ignore_index, label_smoothing, dtype)
        top, total, softmax = _softmax_parts(block, grad[at] if in_place else None)
        log_total = total.log()
        gap = times(u, top - block).sum(1, keepdim=True)
        rows[o, :, i] = (gap + times(u.sum(1, keepdim=True), log_total)) / divisor
        stats[:, o, :, i] = torch.stack((top, log_total))
        if form_gradient:
            softmax = _dense_gradient(softmax, u).div_(divisor)
            if not in_place:
                grad[at] = softmax
    return losses, stats, dlogits


def dense_ce_bwd(
    logits, target, class_weight, ignore_index, label_smoothing, divisor, stats, upstream, need_dlogits, need_dtarget
):
    z, logits = _view(logits)
    t, target = _view(target)
    N, C, I = z.shape
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(logits) if need_dlogits else None
    dtarget = torch.empty_like(target) if need_dtarget else None
    top, log_total = stats
    w = torch.ones((1, C, 1), dtype=dtype, device=z.device) if class_weight is None else columns(class_weight).clone()
    if 0 <= ignore_index < C:
        w[:, ignore_index] = 0
    upstream = upstream.to(dtype).expand(N * I).view(N, 1, I)
    for at in _class_blocks(z):
        o, _, i = at
        block = z[at].to(dtype)
        if need_dtarget:
            surprise = times(((1 - label_smoothing) * w).expand_as(block), log_total[o, :, i] + (top[o, :, i] - block))
            dtarget.view(z.shape)[at] = surprise * (upstream[o, :, i] / divisor)
        if need_dlogits:
            u = _dense_target(t[at], class_weight, ignore_index, label_smoothing, dtype)
            e = _dense_gradient(_softmax(block), u).div_(divisor)
            dlogits.view(z.shape)[at] = (e * upstream[o, :, i]).masked_fill_(e == 0, 0)
    return dlogits, dtarget
