"""The torch backend: the same names and signatures as the kernels' face, for the CPU and for any device without Triton.

On the CPU work goes in blocks of rows that stay in the cache, and only outputs are allocated. Elsewhere whole batches are
one block. What non-finite values need (a weight of 0 means "not read") costs passes: on the CPU work is first done without
that, and again with it if the result is not finite.
"""

import math

import torch

from ._expressions import (
    Components,
    accumulator,
    box_mask,
    columns,
    mix_dlam_expression,
    mix_dx_expression,
    mix_expression,
    pixel_weights,
    times,
)

MIX_BLOCK_BYTES = 1 << 20  # a block of rows and its temporaries stay in the cache
LARGE_ROW_BYTES = 1 << 16  # such rows are mixed one by one, without temporaries
LOSS_BLOCK_BYTES = 1 << 21
SMALL_BATCH = 1 << 14  # elements: below it a few whole operations beat the set-up of a better one
SMALL_ROW_BYTES = 1 << 15  # boxes of smaller rows are cut by a mask, of larger ones row by row
LOG2_E = 1 / math.log(2)


def _blocks(rows: int, row_bytes: int, device: torch.device, block_bytes: int):
    """Slices of rows, in blocks of so many bytes on the CPU; one slice on another device."""
    step = rows if device.type != "cpu" else max(1, block_bytes // max(row_bytes, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1))]


# Mixing


def _memory_order(t):
    """The dimensions of t, the first one first, the others as they follow in memory; None if that is as they are."""
    if t.is_contiguous():
        return None
    return [0, *sorted(range(1, t.dim()), key=t.stride, reverse=True)]


def mix_fwd(x, lam, index, box, out):
    x = x.resolve_neg()  # torch's own copy into another dtype forgets it
    if not x.is_cpu or not x.numel():
        return (torch.empty_like(x) if out is None else out).copy_(mix_expression(x, lam, index, box))
    lam = lam if lam.dim() else lam.expand(x.shape[0])
    other = 1 - lam
    copies = not bool((lam * other).all())  # lam 0 or 1 somewhere
    if copies and bool((lam == 1).all()):
        result = (torch.empty_like(x) if out is None else out).copy_(x)
    else:
        result = _mix_rows(x, lam, other, index, copies, out)
    if box is not None:
        _cut_boxes(result, x, index, box)
    return result


def _mix_rows(x, lam, other, index, copies, out):
    """out[i] = lam[i]*x[i] + other[i]*x[index[i]], small rows in blocks."""
    if x[0].nbytes >= LARGE_ROW_BYTES:
        return _mix_large_rows(x, lam, other, index, torch.empty_like(x) if out is None else out)
    order = _memory_order(x)
    laid = x if order is None else x.permute(order)
    dense = laid.is_contiguous()
    laid = laid if dense else laid.contiguous()
    source = laid.view(x.shape[0], -1)
    if dense and out is None and x.nbytes <= 4 * MIX_BLOCK_BYTES:  # nothing beside the result is made
        result = _mix_block(source, slice(None), lam, other, index, copies).view(laid.shape)
        return result if order is None else result.permute(sorted(range(x.dim()), key=lambda d: order[d]))
    result = torch.empty_like(x) if out is None else out
    sink = result if order is None else result.permute(order)
    for rows in _blocks(x.shape[0], source[0].nbytes, x.device, MIX_BLOCK_BYTES):
        sink[rows] = _mix_block(source, rows, lam[rows], other[rows], index[rows], copies).view(-1, *laid.shape[1:])
    return result


def _mix_large_rows(x, lam, other, index, result):
    """Each row straight into its place; narrow ones by way of one row of the arithmetic's type."""
    sources = x.unbind(0)
    wide = None if x.dtype == lam.dtype else torch.empty_like(x[0], dtype=lam.dtype)
    for row, mine, j, a, b in zip(result.unbind(0), sources, index.tolist(), lam.tolist(), other.tolist(), strict=True):
        if a == 1 or a == 0:  # exactly, and the other row is not looked at
            row.copy_(mine if a == 1 else sources[j])
        elif wide is None:
            torch.mul(mine, a, out=row).add_(sources[j], alpha=b)
        else:
            row.copy_(wide.copy_(mine).mul_(a).add_(sources[j], alpha=b))
    return result


def _mix_block(source, rows, lam, other, index, copies):
    """Some rows of source [N, D], mixed, as a new tensor."""
    own = torch.arange(len(source), device=source.device)[rows] if copies or source.numel() > SMALL_BATCH else None
    if source.dtype == lam.dtype and source.numel() > SMALL_BATCH:  # the sum of two rows, in one pass
        offsets = torch.arange(0, 2 * len(own), 2, device=source.device)
        entries, weights = torch.stack((own, index), 1), torch.stack((lam, other), 1)
        block = torch.embedding_bag(source, entries.view(-1), offsets, False, 0, False, weights.view(-1))[0]
    else:
        block = source.index_select(0, index).to(lam.dtype).mul_(other.unsqueeze(1))
        block = block.addcmul_(source[rows].to(lam.dtype), lam.unsqueeze(1)).to(source.dtype)
    if copies:  # exactly, and the other row is not looked at
        at = ((lam == 0) | (lam == 1)).nonzero().view(-1)
        block.index_copy_(0, at, source.index_select(0, torch.where(lam == 1, own, index)[at]))
    return block


def _cut_boxes(result, x, index, box):
    """result inside each row's box is x's partner row."""
    row_bytes = x[0].nbytes
    if row_bytes < SMALL_ROW_BYTES:
        for rows in _blocks(x.shape[0], row_bytes, x.device, MIX_BLOCK_BYTES):
            mine = result[rows]
            torch.where(box_mask(box[rows], x.shape), x.index_select(0, index[rows]), mine, out=mine)
        return
    dims = box.shape[1] // 2
    sources = x.unbind(0)
    for row, partner, at in zip(result.unbind(0), index.tolist(), box.clamp(min=0).tolist(), strict=True):
        inside = (..., *[slice(at[d], max(at[d], at[dims + d])) for d in range(dims)])
        row[inside] = sources[partner][inside]


def mix_bwd(g, x, lam, index, box, layout, need_dx, need_dlam):
    dx = dlam = None
    if need_dx:
        dx = torch.empty_strided(g.shape, layout, dtype=g.dtype, device=g.device)
        if not g.is_cpu or not g.numel():
            dx.copy_(mix_dx_expression(g, lam, index, box))
        elif box is None and g.dtype == lam.dtype and g.numel() > SMALL_BATCH:
            _mix_dx(g, lam.expand(g.shape[0]), index, dx)
        else:
            _mix_dx_weighted(g, lam.expand(g.shape[0]), index, box, dx)
    if need_dlam:
        dlam = mix_dlam_expression(g, x, lam, index, box) if not g.is_cpu else _mix_dlam(g, x, lam, index, box)
    return dx, dlam


def _mix_dlam(g, x, lam, index, box):
    dlam = torch.empty(g.shape[0], dtype=lam.dtype, device=g.device)
    for rows in _blocks(g.shape[0], g[:1].numel() * 4, g.device, MIX_BLOCK_BYTES):
        partner = x.index_select(0, index[rows])  # of all rows: it may be anywhere
        gap = x[rows] - partner if x.dtype == lam.dtype else x[rows].to(lam.dtype) - partner.to(lam.dtype)
        gap *= g[rows]
        if box is not None:
            gap.masked_fill_(box_mask(box[rows], g.shape), 0)
        dlam[rows] = gap.flatten(1).sum(1) if g.dim() > 1 else gap
    return dlam


def _mix_dx(g, lam, index, dx):
    """Row i of dx sums lam[i]*g[i] and (1-lam[k])*g[k] of the k with index[k] = i, in this order; nothing of weight 0."""
    N = g.shape[0]
    rows = torch.arange(N, device=g.device)
    weights = torch.cat((lam, 1 - lam))
    targets, sources = torch.cat((rows, index)).sort(stable=True)
    weights = weights[sources]
    if not bool(weights.all()):
        read = weights.nonzero().view(-1)
        weights, targets, sources = weights[read], targets[read], sources[read]
    offsets = torch.searchsorted(targets, rows)
    sources = sources.remainder_(N)
    order = _memory_order(dx)
    g, sink = (t if order is None else t.permute(order) for t in (g, dx))
    g = g.contiguous().view(N, -1)
    for block in _blocks(N, g[0].nbytes, g.device, MIX_BLOCK_BYTES):
        first = int(offsets[block.start])
        last = int(offsets[block.stop]) if block.stop < N else len(sources)
        total = torch.embedding_bag(g, sources[first:last], offsets[block] - first, False, 0, False, weights[first:last])[0]
        sink[block] = total.view(-1, *sink.shape[1:])


def _mix_dx_weighted(g, lam, index, box, dx):
    """The same where weights differ within a row, rows are narrower than the arithmetic, or there is little to do."""
    blocks = _blocks(g.shape[0], g[:1].numel() * 4, g.device, MIX_BLOCK_BYTES)
    targets, order = index.sort(stable=True) if len(blocks) > 1 else (index, None)

    def weighted(rows, weights, careful):
        product = rows * weights
        return product.masked_fill_(weights == 0, 0) if careful else product

    def own(rows):
        return pixel_weights(lam[rows], None if box is None else box[rows], g)

    def block(rows, careful):
        weights = own(rows)
        total = weighted(g[rows], weights, careful)
        if order is None:
            return total.index_add_(0, index, weighted(g, 1 - weights, careful))
        first, last = torch.searchsorted(targets, torch.tensor([rows.start, rows.stop], device=g.device)).tolist()
        for start in range(first, last, rows.stop - rows.start):  # whoever has its partner among these rows
            part = slice(start, min(start + rows.stop - rows.start, last))
            k = order[part]
            total.index_add_(0, targets[part] - rows.start, weighted(g[k], 1 - own(k), careful))
        return total

    for rows in blocks:
        total = block(rows, False)
        dx[rows] = total if math.isfinite(total.sum()) else block(rows, True)


# Losses. Logits are seen as [N, C], or [N, C, I] with rows n*I + i. A row's exponentials are taken in base 2, which torch
# computes several times as fast as in base e on some processors.


def _view(t):
    """t as [N, C] or [N, C, I], and t itself: a contiguous copy where its layout has no such view."""
    if t.dim() <= 3:
        return t, t
    shape = (t.shape[0], t.shape[1], math.prod(t.shape[2:]))
    try:
        return t.view(shape), t
    except RuntimeError:
        t = t.contiguous()
        return t.view(shape), t


def _class_blocks(z):
    """Indices that cut logits into blocks of rows that fit the cache, in their order; `...` for all of them."""
    if z.numel() * 4 <= LOSS_BLOCK_BYTES or not z.is_cpu:
        return [...]
    N, C, *inner = z.shape
    if not inner or inner[0] * C * 4 <= LOSS_BLOCK_BYTES:
        return _blocks(N, math.prod(z.shape[1:]) * 4, z.device, LOSS_BLOCK_BYTES)
    step = max(16, LOSS_BLOCK_BYTES // (4 * C))
    return [(slice(n, n + 1), slice(None), slice(i, i + step)) for n in range(N) for i in range(0, inner[0], step)]


def _cut(at, *tensors):
    """The block `at` of tensors or Nones."""
    return tensors if at is ... else [None if t is None else t[at] for t in tensors]


def _join(parts, like):
    """What was computed block by block, [n, K, ...] each, for all rows."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].shape[2:] == like.shape[2:]:
        return torch.cat(parts)
    # [1, K, some of I] each, row by row: [1, K, N*I] to [N, K, I]
    return torch.cat(parts, 2).view(-1, like.shape[0], like.shape[2]).transpose(0, 1)


def _exponential(below):
    """A block of z - max, in place, to exp of it."""
    return below.mul_(LOG2_E).exp2_()


def _reduce(losses, mass, reduction, logits):
    """Terms [N, K, ...] of the rows' losses to the loss, which is not a view: its owner may change it in place."""
    if reduction == "none":
        losses = losses.sum(1)
        return losses if logits.dim() <= 3 else losses.view(logits.shape[0], *logits.shape[2:]).clone()
    return losses.sum() if reduction == "sum" else losses.sum() / mass


def _carefully(forward, logits, *arguments):
    """Runs a forward without regard to what is not finite, and once more with it if that shows in the loss."""
    if logits.is_cpu:
        results = forward(False, logits, *arguments)
        loss = results[0]
        if math.isfinite(loss if loss.dim() == 0 else loss.sum()):
            return results
    return forward(True, logits, *arguments)


def soft_ce_fwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, reduction, need_dweights, form_gradient):
    options = ignore_index, label_smoothing, reduction, need_dweights, form_gradient
    return _carefully(_soft_ce_fwd, logits, classes, weights, class_weight, *options)


def _soft_ce_fwd(
    careful, logits, classes, weights, class_weight, ignore_index, label_smoothing, reduction, need_dweights, form_gradient
):
    z, logits = _view(logits)
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
    for at in _class_blocks(z):
        block, sink, picks, w, *parts = _cut(at, z, grad, target.classes, target.w, *gradient, target.idle)
        top = block.amax(1, keepdim=True)
        top = top if wide else top.to(target.dtype)
        e = torch.sub(block, top, out=sink if wide else None)
        value = e.gather(1, picks)
        gap = target.below(e) if label_smoothing > 0 else None
        total = _exponential(e).sum(1, keepdim=True)
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

    value = _join(values, z)
    losses = times(target.a, value) if careful else target.a * value
    if target.bad is not None:
        losses.masked_fill_(target.bad, math.nan)
    per_component = None
    if need_dweights:
        per_component = value if target.ignored is None else value.masked_fill_(target.ignored, 0)
        per_component = per_component.reshape(classes.shape)
    return _reduce(losses, mass, reduction, logits), mass, (_join(tops, z), _join(totals, z)), per_component, dlogits


def _by_row(stats, z):
    return [t.view(z.shape[0], 1, *z.shape[2:]) for t in stats]


def _scale_by_row(upstream, total):
    """An upstream gradient [] or [rows] as a number per row, as `total` is."""
    return upstream.to(total.dtype).expand(total.numel()).view(total.shape)


def soft_ce_bwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, mass, stats, upstream, formed):
    def form(upstream):
        z, like = _view(logits)
        top, total = _by_row(stats, z)
        target = Components(classes, weights, class_weight, ignore_index, label_smoothing, z, True)
        dlogits = torch.empty_like(like)
        grad = dlogits.view(z.shape)
        gradient = target.gradient(mass, _scale_by_row(upstream, total))
        for at in _class_blocks(z):
            block, sink, highest, *parts = _cut(at, z, grad, top, total, target.classes, *gradient, target.idle)
            e = torch.sub(block, highest, out=sink if z.dtype == top.dtype else None)  # as in the forward: the same bits
            sink.copy_(target.finish(_exponential(e), *parts))
        return dlogits

    return _with_upstream(form, logits, upstream, formed)


def _with_upstream(form, logits, upstream, formed):
    """The gradient that `form` makes for an upstream gradient [] or [rows], from what was formed for upstream 1 if that is
    there. Narrow ones are formed anew, to be rounded once; others are scaled in place, and if they are not there formed for
    upstream 1 first, so that every backward gives the same bits."""
    one = upstream.is_cpu and upstream.dim() == 0 and float(upstream) == 1
    if logits.dtype != accumulator(logits.dtype):
        return formed if formed is not None and one else form(upstream)
    formed = form(upstream.new_ones(())) if formed is None else formed
    if one:
        return formed
    rows, _ = _view(formed)
    if upstream.dim():
        upstream = upstream.view(rows.shape[0], 1, *rows.shape[2:])
    if upstream.is_cpu and bool(torch.isfinite(upstream).all()):
        rows.mul_(upstream)
    else:
        rows.copy_((rows * upstream).masked_fill_(rows == 0, 0))
    return formed


def _dense_target(t, class_weight, ignore_index, label_smoothing, dtype):
    """w*t' of a block [n, C, i]: t' = (1-e)*t + e/C, an ignored column counts as t = 0."""
    C = t.shape[1]
    t = t.to(dtype)
    if 0 <= ignore_index < C:
        t = t.clone()
        t[:, ignore_index] = 0
    t = t * (1 - label_smoothing) + label_smoothing / C if label_smoothing > 0 else t
    return t if class_weight is None else times(columns(class_weight, t), t)


def dense_ce_fwd(logits, target, class_weight, ignore_index, label_smoothing, reduction, form_gradient):
    return _carefully(_dense_ce_fwd, logits, target, class_weight, ignore_index, label_smoothing, reduction, form_gradient)


def _dense_ce_fwd(careful, logits, target, class_weight, ignore_index, label_smoothing, reduction, form_gradient):
    z, logits = _view(logits)
    t = target.reshape(z.shape)
    divisor = z.numel() // z.shape[1] if reduction == "mean" else 1
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    tops, totals, losses = [], [], []
    for at in _class_blocks(z):
        block, sink = z[at], None if grad is None else grad[at]
        u = _dense_target(t[at], class_weight, ignore_index, label_smoothing, dtype)
        mass = u.sum(1, keepdim=True)
        top = block.amax(1, keepdim=True).to(dtype)
        e = torch.sub(block, top, out=sink if form_gradient and logits.dtype == dtype else None)
        gap = (times(u, e) if careful else u * e).sum(1, keepdim=True)
        total = _exponential(e).sum(1, keepdim=True)
        log_total = total.log()
        losses.append((times(mass, log_total) if careful else log_total.mul_(mass)).sub_(gap))
        tops.append(top)
        totals.append(total)
        if form_gradient:
            _dense_gradient(e, total, mass, u, divisor, careful)
            if e.dtype != logits.dtype:
                sink.copy_(e)
    loss = _reduce(_join(losses, z), divisor, reduction, logits)
    return loss, (_join(tops, z), _join(totals, z)), dlogits


def _dense_gradient(e, total, mass, u, divisor, careful):
    """A block's exponentials, in place, to its gradient; rows of targets that sum to 0 take none of them."""
    e *= mass / (total * divisor)
    if careful:
        e.masked_fill_(mass == 0, 0)
    return e.sub_(u, alpha=1 / max(divisor, 1))


def dense_ce_bwd(
    logits, target, class_weight, ignore_index, label_smoothing, reduction, stats, upstream, formed, need_dlogits, need_dtarget
):
    z, like = _view(logits)
    t = target.reshape(z.shape)
    divisor = z.numel() // z.shape[1] if reduction == "mean" else 1
    top, total = _by_row(stats, z)

    def form(upstream):
        dlogits, upstream = torch.empty_like(like), _scale_by_row(upstream, total)
        for at in _class_blocks(z):
            sink = dlogits.view(z.shape)[at]
            e = torch.sub(z[at], top[at], out=sink if z.dtype == top.dtype else None)  # as in the forward: the same bits
            u = _dense_target(t[at], class_weight, ignore_index, label_smoothing, total.dtype)
            e = _dense_gradient(_exponential(e), total[at], u.sum(1, keepdim=True), u, divisor, True)
            sink.copy_((e * upstream[at]).masked_fill_(e == 0, 0))
        return dlogits

    def form_dtarget(upstream):
        dtarget = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        upstream = _scale_by_row(upstream, total)
        w = torch.ones(z.shape[1], dtype=total.dtype, device=z.device) if class_weight is None else class_weight.clone()
        if 0 <= ignore_index < len(w):
            w[ignore_index] = 0
        w = columns(w * (1 - label_smoothing), z)
        for at in _class_blocks(z):
            surprise = total[at].log() - (z[at] - top[at])
            dtarget.view(z.shape)[at] = times(w, surprise) * (upstream[at] / divisor)
        return dtarget

    dlogits = _with_upstream(form, logits, upstream, formed) if need_dlogits else None
    return dlogits, form_dtarget(upstream) if need_dtarget else None
