"""mix: out[i] = lam[i]*x[i] + (1-lam[i])*x[index[i]] outside row i's box, x[index[i]] inside it.

On top the formulas as plain differentiable torch operations, for any device, function transforms and second derivatives. Below
them the launchers, which on the CPU work block by block. A weight of 0 means that a value is not read: the CPU path first
ignores that, and is run again with it if its result is not finite.

Every way rounds (1-lam)*x[index] and adds lam*x to it, as the kernels do, so that the result has the same bits however x is
stored. torch's addcmul, add with alpha and embedding_bag (in float32 alone) round that sum once on a CPU that has an FMA.
"""

import math

import torch

from . import sizes
from ._blocks import memory_order, row_blocks, row_parts
from ._formulas import differentiable_times, per_row, safe_index, sum_at, weighted_pair


def mix_formula(x, lam, index, box):
    """Returns lam*x + (1-lam)*x[index], and x[index] inside the boxes; rows with a partner out of range are NaN."""
    index, in_range = safe_index(index, x.shape[0])
    x_acc = x.to(lam.dtype)
    weights = _element_weights(lam, box, x)
    mixed = weighted_pair(weights, x_acc, x_acc[index])
    return torch.where(per_row(in_range, x), mixed, math.nan).to(x.dtype)


def mix_dx_formula(grad_output, lam, index, box):
    """Returns the gradient to x: lam*grad_output, and (1-lam)*grad_output added up at the partners' rows."""
    index, in_range = safe_index(index, grad_output.shape[0])
    grad_acc = grad_output.to(lam.dtype)
    weights = _element_weights(lam, box, grad_output)
    partner_weights = torch.where(per_row(in_range, grad_output), 1 - weights, 0)
    to_partners = differentiable_times(partner_weights, grad_acc).expand(grad_output.shape)
    return (differentiable_times(weights, grad_acc) + sum_at(index, to_partners)).to(grad_output.dtype)


def mix_dlam_formula(grad_output, x, lam, index, box):
    """Returns the gradient to each row's lam: the sum of grad_output*(x - x[index]) outside its box."""
    index, in_range = safe_index(index, x.shape[0])
    x_acc = x.to(lam.dtype)
    product = grad_output.to(lam.dtype) * (x_acc - x_acc[index])
    if box is not None:
        product = product.masked_fill(box_mask(box, x.shape), 0)
    return torch.where(in_range, product.sum(list(range(1, x.dim()))) if x.dim() > 1 else product, math.nan)


def box_mask(box, shape):
    """Returns which positions of the last dimensions of `shape` lie in the rows' half-open boxes: bools [N, 1, ..., sizes]."""
    dims = box.shape[1] // 2
    inside = torch.ones((), dtype=torch.bool, device=box.device)
    for d in range(dims):
        size = shape[len(shape) - dims + d]
        positions = torch.arange(size, device=box.device)
        hit = (positions >= box[:, d, None]) & (positions < box[:, dims + d, None])
        inside = inside & hit.view(box.shape[0], *[size if k == d else 1 for k in range(dims)])
    return inside.reshape(box.shape[0], *[1] * (len(shape) - 1 - dims), *inside.shape[1:])


def _element_weights(lam, box, x):
    """Returns the weight of the row itself at each element, [N or 1, 1, ...]: lam, and 0 inside its box."""
    weights = lam.reshape(-1, *[1] * (x.dim() - 1))
    return weights if box is None else weights.masked_fill(box_mask(box, x.shape), 0)


def mix_fwd(x, lam, index, box, out):
    """Returns the mixed batch, in `out` if that is given."""
    x = x.resolve_neg()  # Tensor.copy_ into another dtype ignores the negative bit of a view
    if not x.is_cpu or not x.numel():
        return _empty_like(x, out).copy_(mix_formula(x, lam, index, box))
    if _is_small(x, lam, box):
        # Few operations: 1.4 times as fast as blocks, 1.15 times together with the backward, up to 16,384 elements. They are
        # those of _mix_block, so that the bits are the same.
        mixed = x.index_select(0, index).mul_(per_row(1 - lam, x)).addcmul_(x, per_row(lam, x))
        if math.isfinite(mixed.sum()):
            return mixed if out is None and x.is_contiguous() else _empty_like(x, out).copy_(mixed)
    lam = lam if lam.dim() else lam.expand(x.shape[0])
    partner_lam = 1 - lam
    some_copied = not bool((lam * partner_lam).all())  # rows whose lam is 0 or 1
    if some_copied and bool((lam == 1).all()):  # CutMix: 1.6 times as fast as mixing first, 1.2 times for images 3x224x224
        mixed = _empty_like(x, out).copy_(x)
    else:
        mixed = _mix_rows(x, lam, partner_lam, index, some_copied, out)
    if box is not None:
        _fill_boxes(mixed, x, index, box)
    return mixed


def _empty_like(x, out):
    """Returns `out`, or new memory in the layout of x."""
    return torch.empty_like(x) if out is None else out


def _is_small(t, lam, box):
    """Whether t is mixed (or a gradient of its shape formed) by whole operations, and again if the result is not finite."""
    return box is None and t.is_cpu and t.dtype == lam.dtype and 0 < t.numel() <= sizes.SMALL_BATCH


def _mix_rows(x, lam, partner_lam, index, some_copied, out):
    """Returns lam[i]*x[i] + partner_lam[i]*x[index[i]], in blocks of rows or row by row."""
    if x[0].nbytes >= sizes.LARGE_ROW_BYTES:  # 1.6 times as fast for images 3x224x224, 1.9 in bfloat16
        return _mix_large_rows(x, lam, partner_lam, index, _empty_like(x, out))
    order = memory_order(x)
    x_in_order = x if order is None else x.permute(order)
    is_dense = x_in_order.is_contiguous()
    x_in_order = x_in_order if is_dense else x_in_order.contiguous()
    flat = x_in_order.view(x.shape[0], -1)
    if is_dense and out is None and x.nbytes <= 4 * sizes.MIX_BLOCK_BYTES:  # the block is the result: up to twice as fast
        mixed = _mix_block(flat, slice(None), lam, partner_lam, index, some_copied).view(x_in_order.shape)
        return mixed if order is None else mixed.permute(sorted(range(x.dim()), key=lambda d: order[d]))
    out = _empty_like(x, out)
    out_in_order = out if order is None else out.permute(order)
    for rows in row_blocks(x.shape[0], flat[0].nbytes, x.device, sizes.MIX_BLOCK_BYTES):
        block = _mix_block(flat, rows, lam[rows], partner_lam[rows], index[rows], some_copied)
        out_in_order[rows] = block.view(-1, *x_in_order.shape[1:])
    return out


def _mix_large_rows(x, lam, partner_lam, index, out):
    """Mixes each row straight into `out`; rows of a narrow dtype by way of one row of lam's dtype."""
    is_narrow = x.dtype != lam.dtype
    for part in row_parts(x, lam.element_size()) if is_narrow else [...]:
        rows = x[part].unbind(0)
        row_acc = torch.empty_like(rows[0], dtype=lam.dtype) if is_narrow else None
        out_rows = out[part].unbind(0)
        for out_row, row, j, a, b in zip(out_rows, rows, index.tolist(), lam.tolist(), partner_lam.tolist(), strict=True):
            if a == 1 or a == 0:  # a copy, and the other row is not read
                out_row.copy_(row if a == 1 else rows[j])
            elif row_acc is None:
                torch.mul(rows[j], b, out=out_row).add_(row, alpha=a)
            else:
                out_row.copy_(row_acc.copy_(rows[j]).mul_(b).add_(row, alpha=a))
    return out


def _mix_block(flat, rows, lam, partner_lam, index, some_copied):
    """Returns some rows of a batch [N, D], mixed, as a new tensor."""
    is_large = flat.numel() > sizes.SMALL_BATCH
    numbers = torch.arange(len(flat), device=flat.device)[rows] if some_copied or is_large else None
    if flat.dtype == torch.float32 and is_large:  # sums of two rows in one pass: 1.4 times as fast for 64 to 1000 features
        offsets = torch.arange(0, 2 * len(numbers), 2, device=flat.device)
        entries, weights = torch.stack((index, numbers), 1), torch.stack((partner_lam, lam), 1)
        block = torch.embedding_bag(flat, entries.view(-1), offsets, False, 0, False, weights.view(-1))[0]
    else:
        block = flat.index_select(0, index).to(lam.dtype).mul_(partner_lam.unsqueeze(1))
        block = block.addcmul_(flat[rows].to(lam.dtype), lam.unsqueeze(1)).to(flat.dtype)
    if some_copied:  # a copy, and the other row is not read
        at = ((lam == 0) | (lam == 1)).nonzero().view(-1)
        block.index_copy_(0, at, flat.index_select(0, torch.where(lam == 1, numbers, index)[at]))
    return block


def _fill_boxes(mixed, x, index, box):
    """Copies into each row's box what its partner row has there."""
    row_bytes = x[0].nbytes
    if row_bytes < sizes.SMALL_ROW_BYTES:  # 5 times as fast as row by row for images 3x8x8; those of 3x64x64 take 1.7 times
        for rows in row_blocks(x.shape[0], row_bytes, x.device, sizes.MIX_BLOCK_BYTES):
            block = mixed[rows]
            torch.where(box_mask(box[rows], x.shape), x.index_select(0, index[rows]), block, out=block)
        return
    dims = box.shape[1] // 2
    x_rows = x.unbind(0)
    for row, partner, corners in zip(mixed.unbind(0), index.tolist(), box.clamp(min=0).tolist(), strict=True):
        inside = (..., *[slice(corners[d], max(corners[d], corners[dims + d])) for d in range(dims)])
        row[inside] = x_rows[partner][inside]


def mix_bwd(grad_output, x, lam, index, box, strides, need_dx, need_dlam, inverse=None):
    """Returns the gradients to x, in the strides of the mixed batch, and to each row's lam; None for one that is not needed."""
    dx = dlam = None
    if need_dx and grad_output.stride() == strides and _is_small(grad_output, lam, box):
        weights = per_row(lam, grad_output)
        dx = (grad_output * weights).index_add_(0, index, grad_output * (1 - weights))
        dx = dx if math.isfinite(dx.sum()) else None
    if need_dx and dx is None:
        dx = torch.empty_strided(grad_output.shape, strides, dtype=grad_output.dtype, device=grad_output.device)
        if not dx.is_cpu or not dx.numel():
            dx.copy_(mix_dx_formula(grad_output, lam, index, box))
        # Whole rows added up: twice as fast from 3 MB on.
        elif box is None and dx.dtype == lam.dtype and dx.numel() > sizes.SMALL_BATCH and _rows_fit_a_block(dx):
            _dx_of_rows(grad_output, lam.expand(len(dx)), index, dx)
        else:
            _dx_in_blocks(grad_output, lam.expand(len(dx)), index, box, dx)
    if need_dlam and grad_output.is_cpu:
        dlam = _dlam_in_blocks(grad_output, x, lam, index, box)
    elif need_dlam:
        dlam = mix_dlam_formula(grad_output, x, lam, index, box)
    return dx, dlam


def _rows_fit_a_block(dx):
    """Whether rows are small enough for a block of whole ones. How they are stored is not asked: it must not change the sums."""
    return dx[0].nbytes <= 4 * sizes.MIX_BLOCK_BYTES


def _dx_of_rows(grad_output, lam, index, dx):
    """Writes dx[i] = lam[i]*grad_output[i] + the sum of (1-lam[k])*grad_output[k] over the k with index[k] = i, in this order.

    Rows of weight 0 are left out.
    """
    N = dx.shape[0]
    rows = torch.arange(N, device=dx.device)
    weights = torch.cat((lam, 1 - lam))
    targets, sources = torch.cat((rows, index)).sort(stable=True)
    weights = weights[sources]
    if not bool(weights.all()):
        used = weights.nonzero().view(-1)
        weights, targets, sources = weights[used], targets[used], sources[used]
    offsets = torch.searchsorted(targets, rows)
    sources = sources.remainder_(N)
    order = memory_order(dx)
    grad_output, dx = (t if order is None else t.permute(order) for t in (grad_output, dx))
    flat = grad_output.contiguous().view(N, -1)
    for block in row_blocks(N, flat[0].nbytes, dx.device, sizes.MIX_BLOCK_BYTES):
        first = int(offsets[block.start])
        last = int(offsets[block.stop]) if block.stop < N else len(sources)
        total = torch.embedding_bag(flat, sources[first:last], offsets[block] - first, False, 0, False, weights[first:last])[0]
        dx[block] = total.view(-1, *dx.shape[1:])


def _dx_in_blocks(grad_output, lam, index, box, dx):
    """Writes the same where weights differ within a row, rows are narrower than lam's dtype, or there is little to do."""
    blocks = row_blocks(dx.shape[0], dx[:1].numel() * 4, dx.device, sizes.MIX_BLOCK_BYTES)
    # The rows of one block are not sorted by their partners: 1.4 to 1.9 times as fast.
    targets, order = index.sort(stable=True) if len(blocks) > 1 else (index, None)

    def weighted(values, weights, nan_safe):
        product = values * weights
        return product.masked_fill_(weights == 0, 0) if nan_safe else product

    def block(rows, part, nan_safe):
        values, boxes = grad_output[part], _boxes_in_part(part, box, dx.shape)

        def weights_of(rows):
            return _element_weights(lam[rows], None if boxes is None else boxes[rows], values)

        weights = weights_of(rows)
        total = weighted(values[rows], weights, nan_safe)
        if order is None:
            return total.index_add_(0, index, weighted(values, 1 - weights, nan_safe))
        count = rows.stop - rows.start
        first, last = torch.searchsorted(targets, torch.tensor([rows.start, rows.stop], device=dx.device)).tolist()
        for start in range(first, last, count):  # the rows whose partner is in this block, a block of them at a time
            some = slice(start, min(start + count, last))
            k = order[some]
            total.index_add_(0, targets[some] - rows.start, weighted(values[k], 1 - weights_of(k), nan_safe))
        return total

    for rows in blocks:
        for part in row_parts(dx, lam.element_size()):
            total = block(rows, part, False)  # NaN-safe from the start: 1.3 to 1.6 times as long
            dx[part][rows] = total if math.isfinite(total.sum()) else block(rows, part, True)


def _dlam_in_blocks(grad_output, x, lam, index, box):
    """Returns the sums of grad_output*(x - x[index]) outside the boxes, [N]."""
    dlam = torch.zeros(x.shape[0], dtype=lam.dtype, device=x.device)
    for rows in row_blocks(x.shape[0], x[:1].numel() * 4, x.device, sizes.MIX_BLOCK_BYTES):
        for part in row_parts(x, lam.element_size()):
            block = x[part][rows]
            partner = x[part].index_select(0, index[rows])  # from all rows: a partner may be in any block
            product = block - partner if x.dtype == lam.dtype else block.to(lam.dtype) - partner.to(lam.dtype)
            product *= grad_output[part][rows]
            if box is not None:
                product.masked_fill_(box_mask(_boxes_in_part(part, box[rows], x.shape), product.shape), 0)
            dlam[rows] += product.flatten(1).sum(1) if x.dim() > 1 else product
    return dlam


def _boxes_in_part(part, box, shape):
    """Returns the boxes' corners as counted from the start of this part of the rows."""
    d = len(part) - 1
    dims = 0 if box is None else box.shape[1] // 2
    k = d - (len(shape) - dims)  # which of the box's dimensions is cut
    if d == 0 or k < 0:
        return box
    shift = torch.zeros(2 * dims, dtype=box.dtype, device=box.device)
    shift[k] = shift[dims + k] = part[d].start
    return box.clamp(min=0) - shift
