"""Batch mixing: kernels and their launchers.

    out[i] = lam[i] * x[i] + (1 - lam[i]) * x[index[i]]          outside row i's box
    out[i] = x[index[i]]                                         inside it

    dx[i]   = lam[i] * grad_output[i] + sum of (1 - lam[k]) * grad_output[k] over the k with index[k] = i
    dlam[i] = <grad_output[i], x[i] - x[index[i]]>               outside row i's box; inside it lam is 0 for dx and dlam

x [N, ...] in any dtype, lam [N] and the arithmetic in float32 (float64 for float64), index [N], box [N, 2*dims] of starts, then
stops, over the last dims of x. _row_layout.py says how rows are read and programs are numbered.
Memory floor: forward reads x and writes out; backward reads grad_output, writes dx, and reads x once more for dlam.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import OPTIONS, blocks, on_device_of, times
from ._row_layout import (
    dense_rows,
    element_offset,
    in_layout_of,
    inverse_index,
    load_partner,
    load_range,
    mixed_pair,
    row_ptrs,
    row_strides,
    rows_first_tile,
)
from .mix_chain import chain_bwd, chain_fwd

CHAIN = False  # Use the chain kernels where the order of the rows is known. Off until a GPU has compared them.


class Box(NamedTuple):
    """The half-open boxes of all rows. Along the box's dimension d, element e of a row has coordinate e // steps[d] % sizes[d]."""

    ptr: torch.Tensor
    steps: tuple[int, ...]
    sizes: tuple[int, ...]


@triton.jit
def _inside_box(box, row, e, mask, VECTOR: tl.constexpr):
    """(whether the elements lie in their row's box; whether any, and whether all of their vector do). The VECTOR elements of an
    access differ in the last of the box's coordinates alone."""
    DIMS: tl.constexpr = len(box.steps)
    bounds = box.ptr + row * (2 * DIMS)
    vector_start = e // VECTOR * VECTOR
    in_slab = mask
    for d in tl.static_range(DIMS - 1):
        coordinate = (vector_start // box.steps[d]) % box.sizes[d]
        start = tl.load(bounds + d, mask=mask, other=0)
        stop = tl.load(bounds + DIMS + d, mask=mask, other=0)
        in_slab = in_slab & (coordinate >= start) & (coordinate < stop)
    step = box.steps[DIMS - 1]
    size = box.sizes[DIMS - 1]
    start = tl.load(bounds + (DIMS - 1), mask=mask, other=0)
    stop = tl.load(bounds + (2 * DIMS - 1), mask=mask, other=0)
    coordinate = (e // step) % size
    first = (vector_start // step) % size
    last = ((vector_start + (VECTOR - 1)) // step) % size
    inside = in_slab & (coordinate >= start) & (coordinate < stop)
    # start < stop: an empty box touches no vector, even if its start lies within one
    any_inside = in_slab & (last >= start) & (first < stop) & (start < stop)
    all_inside = in_slab & (first >= start) & (last < stop)
    return inside, any_inside, all_inside


@triton.jit(do_not_specialize=["lam_stride", "N", "M"])
def _mix_fwd_kernel(
    x, lam_ptr, lam_stride, index_ptr, N, M, layout, box, out,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, e, row_mask, mask, _ = rows_first_tile(N, M, layout, 1, ROWS, BLOCK)
    offset = element_offset(e, layout)

    partner, in_range = load_partner(index_ptr, row, N, row_mask)
    lam = tl.load(lam_ptr + row * lam_stride, mask=row_mask, other=0)
    partner_weight = 1 - lam
    x_mask = mask & (lam != 0)
    partner_mask = mask & (partner_weight != 0)
    if box is not None:
        # a vector is loaded if any of its elements is needed: masks that differ within it would split the access
        inside, any_inside, all_inside = _inside_box(box, row, e, row_mask, VECTOR)
        x_mask = x_mask & (all_inside == 0)
        partner_mask = partner_mask | (mask & any_inside)
        lam = tl.where(inside, 0, lam)
        partner_weight = tl.where(inside, 1, partner_weight)
    own = tl.load(row_ptrs(x, row, layout) + offset, mask=x_mask, other=0).to(lam.dtype)
    other = tl.load(row_ptrs(x, partner, layout) + offset, mask=partner_mask, other=0).to(lam.dtype)
    mixed = mixed_pair(lam, partner_weight, own, other, in_range)
    tl.store(row_ptrs(out, row, layout) + offset, mixed.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["lam_stride", "N", "M"])
def _mix_bwd_kernel(
    grad_output, x, lam_ptr, lam_stride, index_ptr, inverse, N, M, layout, box, dx, dlam_ptr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dx, unless it is None, and this tile's part of the sums of dlam [tiles, N], unless that is None."""
    row, e, row_mask, mask, tile = rows_first_tile(N, M, layout, 1, ROWS, BLOCK)
    offset = element_offset(e, layout)
    lam = tl.load(lam_ptr + row * lam_stride, mask=row_mask, other=0)
    weight = lam
    dx_mask = mask & (lam != 0)
    dlam_mask = mask
    if box is not None:
        inside, any_inside, all_inside = _inside_box(box, row, e, row_mask, VECTOR)
        weight = tl.where(inside, 0, lam)
        dx_mask = dx_mask & (all_inside == 0)
        dlam_mask = mask & (all_inside == 0)
    # loaded once for dx and dlam; dlam needs it even where lam is 0
    if dlam_ptr is not None:
        grad = tl.load(row_ptrs(grad_output, row, layout) + offset, mask=dlam_mask, other=0).to(lam.dtype)
    else:
        grad = tl.load(row_ptrs(grad_output, row, layout) + offset, mask=dx_mask, other=0).to(lam.dtype)

    if dx is not None:
        total = times(weight, grad)
        first, count = load_range(inverse, row, row_mask)
        for n in range(tl.max(count)):
            k_mask = row_mask & (n < count)
            k = tl.load(inverse.order_ptr + first + n, mask=k_mask, other=0)
            k_weight = 1 - tl.load(lam_ptr + k * lam_stride, mask=k_mask, other=1)
            k_grad_mask = mask & k_mask & (k_weight != 0)
            if box is not None:
                k_inside, any_inside, all_inside = _inside_box(box, k, e, k_mask, VECTOR)
                k_weight = tl.where(k_inside, 1, k_weight)
                k_grad_mask = k_grad_mask | (mask & any_inside)
            k_grad = tl.load(row_ptrs(grad_output, k, layout) + offset, mask=k_grad_mask, other=0).to(lam.dtype)
            total += times(k_weight, k_grad)
        tl.store(row_ptrs(dx, row, layout) + offset, total.to(dx.ptr.dtype.element_ty), mask=mask)

    if dlam_ptr is not None:
        partner, in_range = load_partner(index_ptr, row, N, row_mask)
        own = tl.load(row_ptrs(x, row, layout) + offset, mask=dlam_mask, other=0).to(lam.dtype)
        other = tl.load(row_ptrs(x, partner, layout) + offset, mask=dlam_mask, other=0).to(lam.dtype)
        product = grad * (own - other)
        if box is not None:
            product = tl.where(inside, 0, product)
        partial = tl.sum(product, axis=1)[:, None]
        tl.store(dlam_ptr + tile.to(tl.int64) * N + row, tl.where(in_range, partial, float("nan")), mask=row_mask)


def _box_dims(box):
    return 0 if box is None else box.shape[1] // 2


def _box_view(box, rows):
    """The boxes as a kernel takes them, or None."""
    return None if box is None else Box(box, rows.steps, rows.sizes)


def _uses_chain(rows, box, order):
    """Whether the chain kernels run. With boxes they would read more than the gather, and short rows share a program."""
    return CHAIN and order is not None and box is None and rows.per_program == 1


def _walk(order, index):
    """The order as a tensor: "flip" visits pairs one after the other, "roll" goes backwards."""
    if isinstance(order, torch.Tensor):
        return order.contiguous()
    rows = torch.arange(len(index), device=index.device)
    return rows.flip(0) if order == "roll" else torch.stack((rows, rows.flip(0)), 1).view(-1)[: len(rows)]


def mix_fwd(x, lam, index, box, out, order=None):
    """x [N, ...], lam [] or [N], index [N], box [N, 2*dims] or None -> out, in x's layout unless one is given. order: a
    permutation [N] in which a row's partner is often the next or the last row, "flip", "roll" or None."""
    index, lam = index.contiguous(), lam.resolve_neg()
    result, rows = dense_rows(torch.empty_like(x), _box_dims(box))
    x = in_layout_of(x, result)
    # rows of another layout are written to a tensor of x's layout first, and copied
    if out is not None and row_strides(out.shape, out.stride()) == rows.strides:
        result = out
    if result.numel() and _uses_chain(rows, box, order):
        chain_fwd(rows, x, lam, index, _walk(order, index), result)
    elif result.numel():
        layout, x_rows, out_rows = rows.views(x, result)
        with on_device_of(x):
            _mix_fwd_kernel[(blocks(x.shape[0], rows.per_program) * rows.tiles,)](
                x_rows, lam, lam.stride(0) if lam.dim() else 0, index, x.shape[0], rows.numel, layout,
                _box_view(box, rows), out_rows, VECTOR=rows.vector_of(layout), ROWS=rows.per_program, BLOCK=rows.block,
                num_warps=_launch.MIX_WARPS, **OPTIONS,
            )  # fmt: skip
    if out is not None and result is not out:
        return out.copy_(result)
    return result


def mix_bwd(grad_output, x, lam, index, box, strides, need_dx, need_dlam, order=None):
    """grad_output [N, ...] -> (dx in the layout of the strides given, or None; dlam [N] or None). x may be None unless dlam is
    needed."""
    index, lam, N = index.contiguous(), lam.resolve_neg(), grad_output.shape[0]
    if need_dx:
        like = torch.empty_strided(grad_output.shape, strides, dtype=grad_output.dtype, device=grad_output.device)
    else:
        like = torch.empty_like(x, device="meta")  # a dense layout, without its memory
    like, rows = dense_rows(like, _box_dims(box))
    dx = like if need_dx else None
    if not grad_output.numel():
        return dx, lam.new_zeros(N) if need_dlam else None
    grad_output = in_layout_of(grad_output, like)
    x = in_layout_of(x, like) if need_dlam else None
    dlam = torch.empty((rows.tiles, N), dtype=lam.dtype, device=lam.device) if need_dlam else None
    inverse = inverse_index(index, N) if need_dx else None
    if _uses_chain(rows, box, order):
        chain_bwd(rows, grad_output, x, lam, index, _walk(order, index), inverse, dx, dlam)
    else:
        layout, grad_rows, x_rows, dx_rows = rows.views(grad_output, x, dx)
        with on_device_of(grad_output):
            _mix_bwd_kernel[(blocks(N, rows.per_program) * rows.tiles,)](
                grad_rows, x_rows, lam, lam.stride(0) if lam.dim() else 0, index, inverse, N, rows.numel, layout,
                _box_view(box, rows), dx_rows, dlam, VECTOR=rows.vector_of(layout), ROWS=rows.per_program, BLOCK=rows.block,
                num_warps=_launch.MIX_WARPS, **OPTIONS,
            )  # fmt: skip
    return dx, dlam.sum(0) if need_dlam else None
