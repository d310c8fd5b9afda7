"""The torch backend: the same names and signatures as the kernels' face, for the CPU and for any device without Triton.

On the CPU work goes in blocks of rows that stay in the cache, and only outputs are allocated. Elsewhere whole batches are
one block. `mix_expression` and `soft_ce_expression` are the same formulas as plain differentiable torch, which serve function
transforms and second derivatives.
"""

import math

import torch

BLOCK_BYTES = 1 << 18  # a block of rows and its temporaries fit a core's L2


def accumulator(dtype):
    """The dtype arithmetic is done in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(rows: int, row_bytes: int, device: torch.device):
    """Slices of rows whose blocks fit the cache; one slice where there is no cache to fit."""
    step = rows if device.type != "cpu" else max(1, BLOCK_BYTES // max(row_bytes, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1))]


# Mixing


def box_mask(box, shape):
    """Whether each position of the last dimensions of `shape` lies in the rows' half-open boxes: [N, 1, ..., sizes]."""
    dims = box.shape[1] // 2
    inside = torch.ones((), dtype=torch.bool, device=box.device)
    for d in range(dims):
        size = shape[len(shape) - dims + d]
        at = torch.arange(size, device=box.device)
        hit = (at >= box[:, d, None]) & (at < box[:, dims + d, None])
        inside = inside & hit.view(-1, *[size if k == d else 1 for k in range(dims)])
    return inside.reshape(box.shape[0], *[1] * (len(shape) - 1 - dims), *inside.shape[1:])


def _pixel_weights(lam, box, x):
    """Weights of the row itself, [N or 1, 1, ...], 0 inside its box."""
    weights = lam.reshape(-1, *[1] * (x.dim() - 1))
    return weights if box is None else torch.where(box_mask(box, x.shape), torch.zeros((), dtype=lam.dtype), weights)


def _known(index, rows):
    """(index with wrong entries replaced by 0, which entries were right)"""
    known = (index >= 0) & (index < rows)
    return torch.where(known, index, 0), known


def _read(weights, x):
    """x, with what is not finite replaced by 0 where its weight is 0."""
    return torch.where((weights == 0) & ~torch.isfinite(x), torch.zeros((), dtype=x.dtype, device=x.device), x)


def mix_expression(x, lam, index, box):
    """lam*x + (1-lam)*x[index], as differentiable torch operations."""
    index, known = _known(index, x.shape[0])
    wide = x.to(lam.dtype)
    own = _pixel_weights(lam, box, x)
    mixed = own * _read(own, wide) + (1 - own) * _read(1 - own, wide[index])
    return torch.where(known.view(-1, *[1] * (x.dim() - 1)), mixed, math.nan).to(x.dtype)


def mix_dx_expression(g, lam, index, box):
    """lam*g + the transpose of the gather on (1-lam)*g, as differentiable torch operations."""
    index, known = _known(index, g.shape[0])
    wide = g.to(lam.dtype)
    own = _pixel_weights(lam, box, g)
    other = torch.where(known.view(-1, *[1] * (g.dim() - 1)), 1 - own, 0)
    back = (other * _read(other, wide)).expand(g.shape)
    zeros = torch.zeros_like(back)
    # index_put sums in sorted order on accelerators, index_add in the order of the index on the CPU: both repeatable
    back = zeros.index_add(0, index, back) if g.is_cpu else zeros.index_put((index,), back, accumulate=True)
    return (own * _read(own, wide) + back).to(g.dtype)


def mix_dlam_expression(g, x, lam, index, box):
    """<g, x - x[index]> per row outside the box, as differentiable torch operations."""
    index, known = _known(index, x.shape[0])
    wide = x.to(lam.dtype)
    product = g.to(lam.dtype) * (wide - wide[index])
    if box is not None:
        product = product.masked_fill(box_mask(box, x.shape), 0)
    return torch.where(known, product.flatten(1).sum(1) if x.dim() > 1 else product, math.nan)


def mix_fwd(x, lam, index, box, out):
    result = torch.empty_like(x) if out is None else out
    if not x.is_cpu:
        return result.copy_(mix_expression(x, lam, index, box))
    lam = lam.expand(x.shape[0])
    rest = [1] * (x.dim() - 1)
    for rows in _blocks(x.shape[0], x[:1].numel() * 4, x.device):
        own, target = lam[rows].view(-1, *rest), result[rows]
        partner = x.index_select(0, index[rows])
        if x.dtype == lam.dtype:
            torch.mul(x[rows], own, out=target)
            target.addcmul_(partner, 1 - own)
        else:
            target.copy_((x[rows].to(lam.dtype) * own).addcmul_(partner.to(lam.dtype), 1 - own))
    for row in ((lam == 0) | (lam == 1)).nonzero().flatten().tolist():  # exact copies; the other row is not looked at
        result[row] = x[row] if lam[row] == 1 else x[index[row]]
    if box is not None:
        for row, inside in enumerate(_box_slices(box)):
            result[row][inside] = x[index[row]][inside]
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
            known_index, known = _known(index[rows], g.shape[0])
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
        total = weighted(_pixel_weights(lam[rows], None if box is None else box[rows], g), g[rows])
        first, last = torch.searchsorted(targets, torch.tensor([rows.start, rows.stop])).tolist()
        for start in range(first, last, rows.stop - rows.start):  # whoever has its partner among these rows
            part = slice(start, min(start + rows.stop - rows.start, last))
            k = order[part]
            share = 1 - _pixel_weights(lam[k], None if box is None else box[k], g)
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
    N, C, I = z.shape  # noqa: E741
    if I * C * 4 > BLOCK_BYTES and I > 1 and z.is_cpu:
        step = max(16, BLOCK_BYTES // (4 * C))
        return [(slice(n, n + 1), slice(None), slice(i, i + step)) for n in range(N) for i in range(0, I, step)]
    return [(rows, slice(None), slice(None)) for rows in _blocks(N, C * I * 4, z.device)] if I else []


def _times(a, b):
    """a*b, where a weight a of 0 means that b is not looked at."""
    return (a * b).masked_fill_(a == 0, 0)


def _components(classes, weights, class_weight, ignore_index, C, dtype):
    """(classes in range, a_k, w[c_k]) with a_k 0 where ignored, which components count, and which rows have a wrong class."""
    counts = classes != ignore_index
    known = (classes >= 0) & (classes < C)
    right = counts & known
    classes = torch.where(right, classes, 0)
    a = counts.to(dtype) if weights is None else torch.where(counts, weights.to(dtype), 0)
    w = torch.ones((), dtype=dtype, device=classes.device) if class_weight is None else class_weight[classes]
    return classes, a, w, counts, (counts & ~known).any(1)


def _target_views(classes, weights, shape):
    """classes and weights as [N, K, I]; weights of [N, K] broadcast over I."""
    classes = classes.reshape(*classes.shape[:2], shape[2])
    return classes, None if weights is None else weights.reshape(*classes.shape[:2], -1).expand(classes.shape)


def _softmax_parts(z, out):
    """(max, sum of exp(z - max), exp(z - max)) over the classes, written to `out` where one is given."""
    top = z.amax(1, keepdim=True)
    e = torch.sub(z, top, out=out).exp_()
    return top, e.sum(1, keepdim=True), e


def _finish(e, share, smooth, scale, classes, a, w, class_weight, label_smoothing):
    """exp(z - max), in place, to the gradient: (share*e - components - smooth*w[c]) * scale; rows of share 0 give 0."""
    e *= share * scale
    idle = (share == 0).expand_as(e)
    if bool(idle.any()) if e.is_cpu else True:
        e.masked_fill_(idle, 0)
    e.scatter_add_(1, classes, _times(a * w * (label_smoothing - 1), scale.expand_as(a)))
    if label_smoothing > 0:
        e -= _times(smooth, scale.expand_as(smooth)) * (1 if class_weight is None else class_weight.view(1, -1, 1))
    return e


def soft_ce_mass(logits, classes, weights, class_weight, ignore_index):
    dtype = accumulator(logits.dtype)
    if weights is not None and weights.dim() < classes.dim():
        weights = weights.reshape(*weights.shape, *[1] * (classes.dim() - 2))
    _, a, w, _, _ = _components(classes, weights, class_weight, ignore_index, logits.shape[1], dtype)
    return (a * w).sum()


def soft_ce_fwd(
    logits, classes, weights, class_weight, mass, ignore_index, label_smoothing, need_dweights, form_gradient
):
    z, logits = _view(logits)
    N, C, I = z.shape  # noqa: E741
    dtype = accumulator(logits.dtype)
    shape = classes.shape
    classes, weights = _target_views(classes, weights, z.shape)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    loss = torch.empty((N, I), dtype=dtype, device=z.device)
    stats = torch.empty((3, N, I), dtype=dtype, device=z.device)
    dweights = torch.empty(classes.shape, dtype=dtype, device=z.device) if need_dweights else None
    class_mass = C if class_weight is None else class_weight.sum()
    for at in _class_blocks(z):
        o, _, i = at
        block = z[at].to(dtype)
        in_place = form_gradient and logits.dtype == dtype
        top, total, e = _softmax_parts(block, grad[at] if in_place else None)
        c, a, w, counts, bad = _components(
            classes[at], None if weights is None else weights[at], class_weight, ignore_index, C, dtype
        )
        log_total = total.log()
        value = (1 - label_smoothing) * _times(
            w.expand_as(a) if class_weight is None else w, log_total + (top - block.gather(1, c))
        )
        smooth = a.sum(1, keepdim=True) * (label_smoothing / C)
        if label_smoothing > 0:
            gap = top - block
            gap = gap if class_weight is None else _times(class_weight.view(1, -1, 1).expand_as(gap), gap)
            value += (label_smoothing / C) * (gap.sum(1, keepdim=True) + class_mass * log_total)
        share = (((1 - label_smoothing) * a * w).sum(1, keepdim=True) + smooth * class_mass) / total
        share = share.masked_fill_((a == 0).all(1, keepdim=True), 0).masked_fill_(bad.unsqueeze(1), math.nan)
        row_loss = _times(a, value).sum(1).masked_fill_(bad, math.nan)
        loss[o, i] = row_loss if mass is None else row_loss / mass
        stats[:, o, i] = torch.cat((top, share, smooth), 1).movedim(1, 0)
        if need_dweights:
            dweights[at] = value.masked_fill(~counts, 0)
        if form_gradient:
            scale = torch.ones((1, 1, 1), dtype=dtype, device=z.device) if mass is None else (1 / mass).view(1, 1, 1)
            e = _finish(e, share, smooth, scale, c, a, w, class_weight, label_smoothing)
            if not in_place:
                grad[at] = e
    return loss.view(-1), stats.view(3, -1), dweights.view(shape) if need_dweights else None, dlogits


def soft_ce_bwd(logits, classes, weights, class_weight, mass, ignore_index, label_smoothing, stats, upstream):
    z, logits = _view(logits)
    N, C, I = z.shape  # noqa: E741
    dtype = accumulator(logits.dtype)
    classes, weights = _target_views(classes, weights, z.shape)
    dlogits = torch.empty_like(logits)
    grad = dlogits.view(z.shape)
    stats = stats.view(3, N, 1, I)
    upstream = (upstream.to(dtype) if mass is None else upstream.to(dtype) / mass).expand(N * I).view(N, 1, I)
    for at in _class_blocks(z):
        o, _, i = at
        top, share, smooth = stats[:, o, :, i]
        e = (z[at].to(dtype) - top).exp_()
        c, a, w, _, _ = _components(
            classes[at], None if weights is None else weights[at], class_weight, ignore_index, C, dtype
        )
        grad[at] = _finish(e, share, smooth, upstream[o, :, i], c, a, w, class_weight, label_smoothing)
    return dlogits


def scale_rows_(t, upstream):
    if upstream.dim() == 0 and upstream.is_cpu and float(upstream) == 1:
        return t
    rows = t.view(t.shape[0], t.shape[1], math.prod(t.shape[2:]))
    upstream = upstream.expand(rows.shape[0] * rows.shape[2]).view(rows.shape[0], 1, rows.shape[2])
    for at in _class_blocks(rows):
        o, _, i = at
        scaled = rows[at].to(upstream.dtype) * upstream[o, :, i]
        rows[at] = scaled.masked_fill_(rows[at] == 0, 0)
    return t


def _dense_target(t, class_weight, ignore_index, label_smoothing, dtype):
    """(w*t', w) of a block [n, C, i]: t' = (1-e)*t + e/C, an ignored column counts as t = 0."""
    C = t.shape[1]
    t = t.to(dtype)
    if 0 <= ignore_index < C:
        t = t.index_fill(1, torch.tensor([ignore_index], device=t.device), 0)
    t = t * (1 - label_smoothing) + label_smoothing / C if label_smoothing > 0 else t
    if class_weight is None:
        return t, torch.ones((1, 1, 1), dtype=dtype, device=t.device)
    w = class_weight.view(1, -1, 1)
    return _times(w.expand_as(t), t), w


def dense_ce_fwd(logits, target, class_weight, ignore_index, label_smoothing, divisor, form_gradient):
    z, logits = _view(logits)
    t, _ = _view(target)
    N, _, I = z.shape  # noqa: E741
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    loss = torch.empty((N, I), dtype=dtype, device=z.device)
    stats = torch.empty((3, N, I), dtype=dtype, device=z.device)
    for at in _class_blocks(z):
        o, _, i = at
        block = z[at].to(dtype)
        u, _ = _dense_target(t[at], class_weight, ignore_index, label_smoothing, dtype)
        in_place = form_gradient and logits.dtype == dtype
        top, total, e = _softmax_parts(block, grad[at] if in_place else None)
        log_total = total.log()
        mass = u.sum(1, keepdim=True)
        share = (mass / total).masked_fill_(mass == 0, 0)
        gap = _times(u, top - block).sum(1, keepdim=True) + _times(mass, log_total)
        loss[o, i] = gap.squeeze(1) / divisor
        stats[:, o, i] = torch.cat((top, share, log_total), 1).movedim(1, 0)
        if form_gradient:
            e.mul_(share).masked_fill_(share == 0, 0).sub_(u).mul_(1 / divisor)
            if not in_place:
                grad[at] = e
    return loss.view(-1), stats.view(3, -1), dlogits


def dense_ce_bwd(
    logits, target, class_weight, ignore_index, label_smoothing, divisor, stats, upstream, need_dlogits, need_dtarget
):
    z, logits = _view(logits)
    t, target = _view(target)
    N, C, I = z.shape  # noqa: E741
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(logits) if need_dlogits else None
    dtarget = torch.empty_like(target) if need_dtarget else None
    stats = stats.view(3, N, 1, I)
    upstream = (upstream.to(dtype) / divisor).expand(N * I).view(N, 1, I)
    for at in _class_blocks(z):
        o, _, i = at
        top, share, log_total = stats[:, o, :, i]
        block = z[at].to(dtype)
        u, w = _dense_target(t[at], class_weight, ignore_index, label_smoothing, dtype)
        if need_dlogits:
            e = (block - top).exp_().mul_(share).masked_fill_(share == 0, 0).sub_(u)
            dlogits.view(z.shape)[at] = (e * upstream[o, :, i]).masked_fill_(e == 0, 0)
        if need_dtarget:
            w = ((1 - label_smoothing) * w).expand_as(block).clone()
            if 0 <= ignore_index < C:
                w[:, ignore_index] = 0
            dtarget.view(z.shape)[at] = _times(w, log_total + (top - block)) * upstream[o, :, i]
    return dlogits, dtarget


def _reduced(losses, mass, reduction):
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / mass


def soft_ce_expression(logits, weights, classes, class_weight, ignore_index, label_smoothing, reduction):
    """The loss on K-hot targets as differentiable torch operations."""
    dtype = accumulator(logits.dtype)
    if weights is not None and weights.dim() < classes.dim():
        weights = weights.reshape(*weights.shape, *[1] * (classes.dim() - 2))
    c, a, w, _, bad = _components(classes, weights, class_weight, ignore_index, logits.shape[1], dtype)
    surprise = -torch.log_softmax(logits.to(dtype), 1)
    value = (1 - label_smoothing) * torch.where(w == 0, 0, w * _read(w, surprise.gather(1, c)))
    if label_smoothing > 0:
        every = surprise if class_weight is None else surprise * class_weight.view(-1, *[1] * (logits.dim() - 2))
        value = value + label_smoothing * every.mean(1, keepdim=True)
    losses = torch.where(bad, math.nan, (a * _read(a, value)).sum(1))
    return _reduced(losses, (a * w).sum(), reduction)


def dense_ce_expression(logits, target, class_weight, ignore_index, label_smoothing, reduction):
    """The loss on target probabilities as differentiable torch operations."""
    dtype = accumulator(logits.dtype)
    shape = (-1, *[1] * (logits.dim() - 2))
    columns = torch.arange(logits.shape[1], device=logits.device).view(shape)
    u = torch.where(columns == ignore_index, 0, target.to(dtype)) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    u = u if class_weight is None else u * class_weight.view(shape)
    losses = (u * _read(u, -torch.log_softmax(logits.to(dtype), 1))).sum(1)
    return _reduced(losses, losses.numel(), reduction)
