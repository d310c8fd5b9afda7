"""Mixing two rows, and boxes."""

import math

import torch

from .._expressions import box_mask, mix_dlam_expression, mix_dx_expression, mix_expression, pixel_weights
from . import sizes
from ._blocks import box_within, memory_order, parts_of_row, row_blocks


def mix_fwd(x, lam, index, box, out, order=None):
    x = x.resolve_neg()  # torch's own copy into another dtype forgets it
    if not x.is_cpu or not x.numel():
        return (torch.empty_like(x) if out is None else out).copy_(mix_expression(x, lam, index, box))
    if _small(x, lam, box):
        result = (
            x.index_select(0, index).mul_(_along(1 - lam, x)).addcmul_(x, _along(lam, x))
        )  # as _mix_block does: the same bits
        if math.isfinite(result.sum()):
            return result if out is None and x.is_contiguous() else (torch.empty_like(x) if out is None else out).copy_(result)
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


def _small(x, lam, box):
    """Whether x is mixed, or its gradient formed, in the fewest operations, and anew if what comes of it is not finite."""
    return box is None and x.is_cpu and x.dtype == lam.dtype and 0 < x.numel() <= sizes.SMALL_BATCH


def _along(lam, x):
    """lam [] or [N] against the rows of x."""
    return lam.view(-1, *[1] * (x.dim() - 1)) if lam.dim() else lam


def _mix_rows(x, lam, other, index, copies, out):
    """out[i] = lam[i]*x[i] + other[i]*x[index[i]], small rows in blocks."""
    if x[0].nbytes >= sizes.LARGE_ROW_BYTES:
        return _mix_large_rows(x, lam, other, index, torch.empty_like(x) if out is None else out)
    order = memory_order(x)
    laid = x if order is None else x.permute(order)
    dense = laid.is_contiguous()
    laid = laid if dense else laid.contiguous()
    source = laid.view(x.shape[0], -1)
    if dense and out is None and x.nbytes <= 4 * sizes.MIX_BLOCK_BYTES:  # nothing beside the result is made
        result = _mix_block(source, slice(None), lam, other, index, copies).view(laid.shape)
        return result if order is None else result.permute(sorted(range(x.dim()), key=lambda d: order[d]))
    result = torch.empty_like(x) if out is None else out
    sink = result if order is None else result.permute(order)
    for rows in row_blocks(x.shape[0], source[0].nbytes, x.device, sizes.MIX_BLOCK_BYTES):
        sink[rows] = _mix_block(source, rows, lam[rows], other[rows], index[rows], copies).view(-1, *laid.shape[1:])
    return result


def _mix_large_rows(x, lam, other, index, result):
    """Each row straight into its place; narrow ones by way of one row of the arithmetic's type."""
    narrow = x.dtype != lam.dtype
    for part in parts_of_row(x, lam.element_size()) if narrow else [...]:
        sources = x[part].unbind(0)
        wide = torch.empty_like(sources[0], dtype=lam.dtype) if narrow else None
        for row, mine, j, a, b in zip(
            result[part].unbind(0), sources, index.tolist(), lam.tolist(), other.tolist(), strict=True
        ):
            if a == 1 or a == 0:  # exactly, and the other row is not looked at
                row.copy_(mine if a == 1 else sources[j])
            elif wide is None:
                torch.mul(mine, a, out=row).add_(sources[j], alpha=b)
            else:
                row.copy_(wide.copy_(mine).mul_(a).add_(sources[j], alpha=b))
    return result


def _mix_block(source, rows, lam, other, index, copies):
    """Some rows of source [N, D], mixed, as a new tensor."""
    own = torch.arange(len(source), device=source.device)[rows] if copies or source.numel() > sizes.SMALL_BATCH else None
    if source.dtype == lam.dtype and source.numel() > sizes.SMALL_BATCH:  # the sum of two rows, in one pass
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
    if row_bytes < sizes.SMALL_ROW_BYTES:
        for rows in row_blocks(x.shape[0], row_bytes, x.device, sizes.MIX_BLOCK_BYTES):
            mine = result[rows]
            torch.where(box_mask(box[rows], x.shape), x.index_select(0, index[rows]), mine, out=mine)
        return
    dims = box.shape[1] // 2
    sources = x.unbind(0)
    for row, partner, at in zip(result.unbind(0), index.tolist(), box.clamp(min=0).tolist(), strict=True):
        inside = (..., *[slice(at[d], max(at[d], at[dims + d])) for d in range(dims)])
        row[inside] = sources[partner][inside]


def mix_bwd(g, x, lam, index, box, layout, need_dx, need_dlam, order=None):
    dx = dlam = None
    if need_dx and g.stride() == layout and _small(g, lam, box):
        own = _along(lam, g)
        dx = (g * own).index_add_(0, index, g * (1 - own))
        dx = dx if math.isfinite(dx.sum()) else None
    if need_dx and dx is None:
        dx = torch.empty_strided(g.shape, layout, dtype=g.dtype, device=g.device)
        if not g.is_cpu or not g.numel():
            dx.copy_(mix_dx_expression(g, lam, index, box))
        elif box is None and g.dtype == lam.dtype and g.numel() > sizes.SMALL_BATCH and _bags(g, dx):
            _mix_dx(g, lam.expand(g.shape[0]), index, dx)
        else:
            _mix_dx_weighted(g, lam.expand(g.shape[0]), index, box, dx)
    if need_dlam:
        dlam = mix_dlam_expression(g, x, lam, index, box) if not g.is_cpu else _mix_dlam(g, x, lam, index, box)
    return dx, dlam


def _bags(g, dx):
    """Whether rows are summed up as they are: stored as dx's, and not so large that another one is too much."""
    order = memory_order(dx)
    return g[0].nbytes <= 4 * sizes.MIX_BLOCK_BYTES and (g if order is None else g.permute(order)).is_contiguous()


def _mix_dlam(g, x, lam, index, box):
    dlam = torch.zeros(g.shape[0], dtype=lam.dtype, device=g.device)
    for rows in row_blocks(g.shape[0], g[:1].numel() * 4, g.device, sizes.MIX_BLOCK_BYTES):
        for part in parts_of_row(g, lam.element_size()):
            mine, upstream = x[part][rows], g[part][rows]
            partner = x[part].index_select(0, index[rows])  # of all rows: it may be anywhere
            gap = mine - partner if x.dtype == lam.dtype else mine.to(lam.dtype) - partner.to(lam.dtype)
            gap *= upstream
            if box is not None:
                gap.masked_fill_(box_mask(box_within(part, box[rows], g.shape), gap.shape), 0)
            dlam[rows] += gap.flatten(1).sum(1) if g.dim() > 1 else gap
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
    order = memory_order(dx)
    g, sink = (t if order is None else t.permute(order) for t in (g, dx))
    g = g.view(N, -1)
    for block in row_blocks(N, g[0].nbytes, g.device, sizes.MIX_BLOCK_BYTES):
        first = int(offsets[block.start])
        last = int(offsets[block.stop]) if block.stop < N else len(sources)
        total = torch.embedding_bag(g, sources[first:last], offsets[block] - first, False, 0, False, weights[first:last])[0]
        sink[block] = total.view(-1, *sink.shape[1:])


def _mix_dx_weighted(g, lam, index, box, dx):
    """The same where weights differ within a row, rows are narrower than the arithmetic, or there is little to do."""
    blocks = row_blocks(g.shape[0], g[:1].numel() * 4, g.device, sizes.MIX_BLOCK_BYTES)
    targets, order = index.sort(stable=True) if len(blocks) > 1 else (index, None)

    def weighted(rows, weights, careful):
        product = rows * weights
        return product.masked_fill_(weights == 0, 0) if careful else product

    def block(rows, part, careful):
        upstream, cut = g[part], box_within(part, box, g.shape)

        def own(rows):
            return pixel_weights(lam[rows], None if cut is None else cut[rows], upstream)

        weights = own(rows)
        total = weighted(upstream[rows], weights, careful)
        if order is None:
            return total.index_add_(0, index, weighted(upstream, 1 - weights, careful))
        first, last = torch.searchsorted(targets, torch.tensor([rows.start, rows.stop], device=g.device)).tolist()
        for start in range(first, last, rows.stop - rows.start):  # whoever has its partner among these rows
            some = slice(start, min(start + rows.stop - rows.start, last))
            k = order[some]
            total.index_add_(0, targets[some] - rows.start, weighted(upstream[k], 1 - own(k), careful))
        return total

    for rows in blocks:
        for part in parts_of_row(g, lam.element_size()):
            total = block(rows, part, False)
            dx[part][rows] = total if math.isfinite(total.sum()) else block(rows, part, True)


mix_formula, mix_dx_formula, mix_dlam_formula = mix_expression, mix_dx_expression, mix_dlam_expression
