"""Batch mixing along a chain of partners: a row that has been read is kept for the row that needs it next.

    out[i] = lam[i] * x[i] + (1 - lam[i]) * x[index[i]]

A sampler knows an order of the rows in which a row's partner is the next row, index[order[s]] = order[s+1], or, in pairs, the
row before. A program holds one tile of two rows, the last one and its partner, and walks R rows of that order: a row is read
again only if it is neither of the two, which is asked of index on the device. The order is a hint: any permutation gives the
same bits as the gather in mix.py, which reads every row twice. The backward takes the same order: a row's gradient needs its
own grad_output and that of the row that has it as its partner, which is the row before.

Memory floor: forward reads x and writes out; backward reads grad_output, writes dx, and reads x once more for dlam. A cycle is
read (R+1)/R times, pairs are read once. The gather's second read may come from the L2 at no cost, so which of the two is faster
is for a GPU to say.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import MIX_OPTIONS, blocks, on_device_of, times
from ._row_layout import (
    add_product,
    element_offset,
    load_partner,
    load_range,
    mixed_pair,
    weight_of_partner,
)


def rows_per_program(rows, tiles):
    """Number of rows that a program walks: 8 or, so that no chain is short, up to 12, which moves 1.06 of the floor; in a batch
    of fewer than 16 as many as leave a GPU enough programs."""
    most = _launch.CHAIN_ROWS
    if rows >= 2 * most:
        return blocks(rows, rows // most * 2) * 2  # even, so that no pair is split between two programs
    return max(1, min(most, rows * tiles // _launch.CHAIN_PROGRAMS))


@triton.jit
def _chain_tile(N, M, R, layout, BLOCK: tl.constexpr):
    """(first and last place + 1 in the order; offsets [BLOCK] of the elements and their mask; number of the tile)."""
    chains = tl.cdiv(N, R)
    start = (tl.program_id(0) % chains).to(tl.int64) * R
    stop = tl.minimum(start + R, N)
    tile = tl.program_id(0) // chains
    e = tile.to(M.dtype) * BLOCK + tl.arange(0, BLOCK)
    mask = e < M // layout.ALIGN * layout.ALIGN
    return start, stop, element_offset(e, layout), mask, tile


@triton.jit
def _load_unless_same(rows, row, offset, mask, layout, other, other_row):
    """A row's tile: the other row's if they are the same row, else loaded."""
    loaded = tl.load(rows.ptr + row * rows.stride * layout.ALIGN + offset, mask=mask & (row != other_row), other=0)
    return tl.where(row == other_row, other, loaded)


@triton.jit
def _resident_or_load(rows, row, offset, mask, layout, first, first_row, second, second_row):
    """A row's tile: one of the two resident ones if they are of that row, else loaded."""
    stride = rows.stride * layout.ALIGN
    resident = (row == first_row) | (row == second_row)
    loaded = tl.load(rows.ptr + row * stride + offset, mask=mask & (resident == 0), other=0)
    return tl.where(row == first_row, first, tl.where(row == second_row, second, loaded))


@triton.jit(do_not_specialize=["lam_stride", "N", "M", "R"])
def _mix_chain_fwd_kernel(
    x, lam_ptr, lam_stride, index_ptr, order_ptr, out,
    N, M, R, layout, BLOCK: tl.constexpr,
):  # fmt: skip
    start, stop, offset, mask, _ = _chain_tile(N, M, R, layout, BLOCK)
    i = tl.load(order_ptr + start)
    j, in_range = load_partner(index_ptr, i, N, None)
    own = tl.load(x.ptr + i * x.stride * layout.ALIGN + offset, mask=mask, other=0)
    other = _load_unless_same(x, j, offset, mask, layout, own, i)
    for s in range(start, stop):
        # the next rows are loaded before this one is stored, so that their latency is hidden
        more = s + 1 < stop
        next_i = tl.load(order_ptr + s + 1, mask=more, other=0)
        next_j, next_in_range = load_partner(index_ptr, next_i, N, None)
        next_mask = mask & more
        next_own = _resident_or_load(x, next_i, offset, next_mask, layout, own, i, other, j)
        next_other = _resident_or_load(x, next_j, offset, next_mask & (next_j != next_i), layout, own, i, other, j)
        next_other = tl.where(next_j == next_i, next_own, next_other)

        lam = tl.load(lam_ptr + i * lam_stride)
        partner_weight = weight_of_partner(lam, in_range)
        a, b = own.to(lam.dtype), other.to(lam.dtype)
        # both are loaded whatever their weights
        mixed = mixed_pair(lam, partner_weight, a, b)
        mixed = tl.where(lam == 0, partner_weight * b, tl.where(partner_weight == 0, a, mixed))
        tl.store(out.ptr + i * out.stride * layout.ALIGN + offset, mixed.to(out.ptr.dtype.element_ty), mask=mask)
        i, j, in_range, own, other = next_i, next_j, next_in_range, next_own, next_other


@triton.jit
def _first_user(inverse, row):
    """(the first row that has this one as its partner, or -1; (start, length) of the list of them)."""
    first, count = load_range(inverse, row, None)
    return tl.load(inverse.order_ptr + first, mask=count > 0, other=-1), first, count


@triton.jit(do_not_specialize=["lam_stride", "N", "M", "R"])
def _mix_chain_bwd_kernel(
    grad_output, x, lam_ptr, lam_stride, index_ptr, order_ptr, inverse, dx, dlam_ptr,
    N, M, R, layout, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dx, unless it is None, and this tile's part of the sums of dlam [tiles, N], unless that is None, as _mix_bwd_kernel
    does. Of the rows k that have row i as their partner, the first is looked for among the resident rows."""
    start, stop, offset, mask, tile = _chain_tile(N, M, R, layout, BLOCK)
    i = tl.load(order_ptr + start)
    j, in_range = load_partner(index_ptr, i, N, None)
    grad = tl.load(grad_output.ptr + i * grad_output.stride * layout.ALIGN + offset, mask=mask, other=0)
    # what a loop carries must exist before it, even where no branch reads it
    own, other, k_grad = grad, grad, grad
    k, first, count = i, i, i
    if dx is not None:
        k, first, count = _first_user(inverse, i)
        k_grad = _load_unless_same(grad_output, k, offset, mask & (k >= 0), layout, grad, i)
    if dlam_ptr is not None:
        own = tl.load(x.ptr + i * x.stride * layout.ALIGN + offset, mask=mask, other=0)
        other = _load_unless_same(x, j, offset, mask, layout, own, i)
    for s in range(start, stop):
        # the next rows are loaded before this one is stored, so that their latency is hidden
        more = s + 1 < stop
        next_mask = mask & more
        next_i = tl.load(order_ptr + s + 1, mask=more, other=0)
        next_j, next_in_range = load_partner(index_ptr, next_i, N, None)
        next_k, next_first, next_count, next_k_grad, next_own, next_other = k, first, count, k_grad, own, other
        if dx is not None:
            next_k, next_first, next_count = _first_user(inverse, next_i)
            next_grad = _resident_or_load(grad_output, next_i, offset, next_mask, layout, grad, i, k_grad, k)
            k_mask = next_mask & (next_k >= 0) & (next_k != next_i)
            next_k_grad = _resident_or_load(grad_output, next_k, offset, k_mask, layout, grad, i, k_grad, k)
            next_k_grad = tl.where(next_k == next_i, next_grad, next_k_grad)
        else:
            next_grad = tl.load(grad_output.ptr + next_i * grad_output.stride * layout.ALIGN + offset, mask=next_mask, other=0)
        if dlam_ptr is not None:
            next_own = _resident_or_load(x, next_i, offset, next_mask, layout, own, i, other, j)
            next_other = _resident_or_load(x, next_j, offset, next_mask & (next_j != next_i), layout, own, i, other, j)
            next_other = tl.where(next_j == next_i, next_own, next_other)

        lam = tl.load(lam_ptr + i * lam_stride)
        grad_acc = grad.to(lam.dtype)
        if dx is not None:
            total = times(lam, grad_acc)
            k_weight = 1 - tl.load(lam_ptr + k * lam_stride, mask=k >= 0, other=1)
            total = add_product(total, k_weight, k_grad.to(lam.dtype))
            for n in range(1, count):
                later = tl.load(inverse.order_ptr + first + n)
                k_weight = 1 - tl.load(lam_ptr + later * lam_stride)
                later_grad = tl.load(
                    grad_output.ptr + later * grad_output.stride * layout.ALIGN + offset, mask=mask, other=0
                ).to(lam.dtype)
                total = add_product(total, k_weight, later_grad)
            tl.store(dx.ptr + i * dx.stride * layout.ALIGN + offset, total.to(dx.ptr.dtype.element_ty), mask=mask)
        if dlam_ptr is not None:
            partial = tl.sum(grad_acc * (own.to(lam.dtype) - other.to(lam.dtype)), 0)
            tl.store(dlam_ptr + tile.to(tl.int64) * N + i, tl.where(in_range, partial, float("nan")))
        i, j, in_range, grad, k_grad, k, first, count, own, other = (
            next_i, next_j, next_in_range, next_grad, next_k_grad, next_k, next_first, next_count, next_own, next_other,
        )  # fmt: skip


def chain_fwd(rows, x, lam, index, order, out):
    """Mixes x into out, both stored as `rows`, the DenseRows of _row_layout.py, says."""
    layout, x_rows, out_rows = rows.views(x, out)
    R = rows_per_program(x.shape[0], rows.tiles)
    with on_device_of(x):
        _mix_chain_fwd_kernel[(blocks(x.shape[0], R) * rows.tiles,)](
            x_rows, lam, lam.stride(0) if lam.dim() else 0, index, order, out_rows,
            x.shape[0], rows.numel, R, layout, BLOCK=rows.block, num_warps=_launch.CHAIN_WARPS, **MIX_OPTIONS,
        )  # fmt: skip


def chain_bwd(rows, grad_output, x, lam, index, order, inverse, dx, dlam):
    """Writes dx and dlam [tiles, N], unless they are None. grad_output, x and dx are stored as `rows` says; inverse is that of
    index."""
    layout, grad_rows, x_rows, dx_rows = rows.views(grad_output, x, dx)
    R = rows_per_program(grad_output.shape[0], rows.tiles)
    with on_device_of(grad_output):
        _mix_chain_bwd_kernel[(blocks(grad_output.shape[0], R) * rows.tiles,)](
            grad_rows, x_rows, lam, lam.stride(0) if lam.dim() else 0, index, order, inverse, dx_rows, dlam,
            grad_output.shape[0], rows.numel, R, layout, BLOCK=rows.block,
            num_warps=_launch.CHAIN_DOUBLE_WARPS if grad_output.dtype == torch.float64 else _launch.CHAIN_WARPS, **MIX_OPTIONS,
        )  # fmt: skip
