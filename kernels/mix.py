"""Batch mixing: kernels and their launchers.

    out[i] = lam[i] * x[i] + (1 - lam[i]) * x[index[i]]          outside row i's box
    out[i] = x[index[i]]                                         inside it

    dx[i]   = lam[i] * grad_output[i] + sum of (1 - lam[k]) * grad_output[k] over the k with index[k] = i
    dlam[i] = <grad_output[i], x[i] - x[index[i]]>               outside row i's box; inside it lam is 0 for dx and dlam

Nothing is contracted but what is written so: the mixed pair is fma(lam, x, (1 - lam)*y), and dx a chain of fma in the order of k.

x [N, ...] in any dtype, lam [N] and the arithmetic in float32 (float64 for float64), index [N], box [N, 2*dims] of starts, then
stops, over the last dims of x. _row_layout.py says how rows are read and programs are numbered.
Memory floor: forward reads x and writes out; backward reads grad_output, writes dx, and reads x once more for dlam.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import MIX_OPTIONS, blocks, on_device_of, times
from ._row_layout import (
    InverseIndex,
    add_product,
    dense_rows,
    group_offset,
    group_tile,
    in_layout_of,
    inverse_index,
    load_or_nothing,
    load_partner,
    load_range,
    mixed_pair,
    row_ptrs,
    row_strides,
    weight_of_partner,
)


class Box(NamedTuple):
    """The half-open boxes of all rows. Along the box's dimension d, element e of a row has coordinate e // steps[d] % sizes[d]."""

    ptr: torch.Tensor
    steps: tuple[int, ...]
    sizes: tuple[int, ...]


@triton.jit
def _load_bounds(box, row, row_mask, d: tl.constexpr):
    """(start, stop) of the rows' boxes along the box's dimension d, cut off at the image's border [ROWS, 1, 1]."""
    DIMS: tl.constexpr = len(box.steps)
    bounds = box.ptr + row * (2 * DIMS) + d
    start = tl.load(bounds, mask=row_mask, other=0)
    stop = tl.load(bounds + DIMS, mask=row_mask, other=0)
    start = tl.minimum(tl.maximum(start, 0), box.sizes[d])
    stop = tl.minimum(tl.maximum(stop, start), box.sizes[d])
    return start.to(tl.int32)[:, :, None], stop.to(tl.int32)[:, :, None]


@triton.jit
def _inside_box(box, row, row_mask, first, V: tl.constexpr):
    """(which of the V elements of groups that begin with these [1, groups, 1] lie in their row's box; whether any of them does, and
    whether all do). The elements of a group differ in the last of the box's coordinates alone: they follow each other on a line,
    of which the box takes a part, so coordinates are worked out once a group. Rows that are masked have empty boxes."""
    DIMS: tl.constexpr = len(box.steps)
    start, stop = _load_bounds(box, row, row_mask, DIMS - 1)
    step = box.steps[DIMS - 1]
    line = first % (step * box.sizes[DIMS - 1])
    # from the part's start to the group, and the part's length, 0 for groups whose line is not in the box
    place = line.to(tl.int32) - start * step
    length = (stop - start) * step
    for d in tl.static_range(DIMS - 1):
        coordinate = ((first // box.steps[d]) % box.sizes[d]).to(tl.int32)
        start, stop = _load_bounds(box, row, row_mask, d)
        length = tl.where((coordinate >= start) & (coordinate < stop), length, 0)
    # one comparison each: a negative number is a large unsigned one
    inside = (place + tl.arange(0, V)[None, None, :]).to(tl.uint32) < length.to(tl.uint32)
    any_inside = ((place + (V - 1)).to(tl.uint32) < (length + (V - 1)).to(tl.uint32)) & (length > 0)
    all_inside = place.to(tl.uint32) < tl.maximum(length - (V - 1), 0).to(tl.uint32)
    return inside, any_inside, all_inside


@triton.jit(do_not_specialize=["lam_stride", "N", "M"])
def _mix_fwd_kernel(
    x, lam_ptr, lam_stride, index_ptr, N, M, layout, box, out,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group, row_mask, mask, _ = group_tile(N, M, layout, VECTOR, ROWS, BLOCK)
    offset = group_offset(group, layout, VECTOR)

    partner, in_range = load_partner(index_ptr, row, N, row_mask)
    lam = tl.load(lam_ptr + row * lam_stride, mask=row_mask, other=0)
    partner_weight = weight_of_partner(lam, in_range)[:, :, None]
    lam = lam[:, :, None]
    x_mask = mask & (lam != 0)
    partner_mask = mask & (partner_weight != 0)
    if box is not None:
        # a group is loaded if any of its elements is needed: masks that differ within it would split the access
        inside, any_inside, all_inside = _inside_box(box, row, row_mask & in_range, group * VECTOR, VECTOR)
        x_mask = x_mask & (all_inside == 0)
        partner_mask = partner_mask | (mask & any_inside)
    own = load_or_nothing(x, row[:, :, None], offset, x_mask, layout).to(lam.dtype)
    other = load_or_nothing(x, partner[:, :, None], offset, partner_mask, layout).to(lam.dtype)
    mixed = mixed_pair(lam, partner_weight, own, other)
    if box is not None:
        # the partner's group was loaded for the box, so it may hold a value of weight 0 outside
        mixed = tl.where(inside, other, tl.where(partner_weight == 0, own, mixed))
    tl.store(row_ptrs(out, row[:, :, None], layout) + offset, mixed.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["lam_stride", "N", "M"])
def _mix_bwd_kernel(
    grad_output, x, lam_ptr, lam_stride, index_ptr, inverse, N, M, layout, box, dx, dlam_ptr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dx, unless it is None, and this tile's part of the sums of dlam [tiles, N], unless that is None."""
    row, group, row_mask, mask, tile = group_tile(N, M, layout, VECTOR, ROWS, BLOCK)
    offset = group_offset(group, layout, VECTOR)
    lam = tl.load(lam_ptr + row * lam_stride, mask=row_mask, other=0)[:, :, None]
    grad_ptrs = row_ptrs(grad_output, row[:, :, None], layout) + offset
    dx_mask = mask & (lam != 0)
    dlam_mask = mask
    if box is not None:
        inside, _, all_inside = _inside_box(box, row, row_mask, group * VECTOR, VECTOR)
        dx_mask = dx_mask & (all_inside == 0)
        dlam_mask = mask & (all_inside == 0)
    # loaded once for dx and dlam; dlam needs it even where lam is 0
    if dlam_ptr is not None:
        grad = tl.load(grad_ptrs, mask=dlam_mask, other=0).to(lam.dtype)
    else:
        grad = tl.load(grad_ptrs, mask=dx_mask, other=0).to(lam.dtype)

    if dx is not None:
        total = times(lam, grad)
        if box is not None:
            total = tl.where(inside, 0, total)
        if inverse.starts_ptr is None:
            first, count, most = row, 1, 1
        else:
            first, count = load_range(inverse, row, row_mask)
            most = tl.max(count)
        for n in range(most):
            k_mask = row_mask & (n < count)
            k = tl.load(inverse.order_ptr + first + n, mask=k_mask, other=0)
            k_weight = 1 - tl.load(lam_ptr + k * lam_stride, mask=k_mask, other=1)[:, :, None]
            k_grad_mask = mask & (k_weight != 0)  # it is 0 where k is masked
            if box is not None:
                k_inside, any_inside, _ = _inside_box(box, k, k_mask, group * VECTOR, VECTOR)
                k_grad_mask = k_grad_mask | (mask & any_inside)
            k_grad = load_or_nothing(grad_output, k[:, :, None], offset, k_grad_mask, layout).to(lam.dtype)
            if box is not None:
                total = add_product(total, tl.where(k_inside, 1, k_weight), k_grad)
            else:
                total = tl.fma(k_weight, k_grad, total)
        tl.store(row_ptrs(dx, row[:, :, None], layout) + offset, total.to(dx.ptr.dtype.element_ty), mask=mask)

    if dlam_ptr is not None:
        partner, in_range = load_partner(index_ptr, row, N, row_mask)
        own = tl.load(row_ptrs(x, row[:, :, None], layout) + offset, mask=dlam_mask, other=0).to(lam.dtype)
        other = tl.load(row_ptrs(x, partner[:, :, None], layout) + offset, mask=dlam_mask, other=0).to(lam.dtype)
        product = grad * (own - other)
        if box is not None:
            product = tl.where(inside, 0, product)
        partial = tl.sum(tl.sum(product, axis=2), axis=1)[:, None]
        tl.store(dlam_ptr + tile.to(tl.int64) * N + row, tl.where(in_range, partial, float("nan")), mask=row_mask)


def _box_dims(box):
    return 0 if box is None else box.shape[1] // 2


def _box_view(box, rows):
    """The boxes as a kernel takes them, or None."""
    return None if box is None else Box(box, rows.steps, rows.sizes)


def mix_fwd(x, lam, index, box, out):
    """x [N, ...], lam [] or [N], index [N], box [N, 2*dims] or None -> out, in x's layout unless one is given."""
    index, lam = index.contiguous(), lam.resolve_neg()
    result, rows = dense_rows(torch.empty_like(x), _box_dims(box))
    x = in_layout_of(x, result)
    # rows of another layout, or stored with the other sign, are written to a tensor of x's layout first, and copied
    if out is not None and not out.is_neg() and row_strides(out.shape, out.stride()) == rows.strides:
        result = out
    if result.numel():
        layout, x_rows, out_rows = rows.views(x, result)
        with on_device_of(x):
            _mix_fwd_kernel[(blocks(x.shape[0], rows.per_program) * rows.tiles,)](
                x_rows, lam, lam.stride(0) if lam.dim() else 0, index, x.shape[0], rows.numel, layout,
                _box_view(box, rows), out_rows, VECTOR=rows.vector_of(layout), ROWS=rows.per_program, BLOCK=rows.block,
                num_warps=_launch.MIX_WARPS, **MIX_OPTIONS,
            )  # fmt: skip
    if out is not None and result is not out:
        return out.copy_(result)
    return result


def mix_bwd(grad_output, x, lam, index, box, strides, need_dx, need_dlam, inverse=None):
    """grad_output [N, ...] -> (dx in the layout of the strides given, or None; dlam [N] or None). x may be None unless dlam is
    needed. inverse [N]: the inverse of an index that is a permutation, which saves the launch that counts."""
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
    users = None
    if need_dx:
        users = inverse_index(index, N) if inverse is None else InverseIndex(inverse, None)
    layout, grad_rows, x_rows, dx_rows = rows.views(grad_output, x, dx)
    with on_device_of(grad_output):
        _mix_bwd_kernel[(blocks(N, rows.per_program) * rows.tiles,)](
            grad_rows, x_rows, lam, lam.stride(0) if lam.dim() else 0, index, users, N, rows.numel, layout,
            _box_view(box, rows), dx_rows, dlam, VECTOR=rows.vector_of(layout), ROWS=rows.per_program, BLOCK=rows.block,
            num_warps=_launch.MIX_WARPS, **MIX_OPTIONS,
        )  # fmt: skip
    return dx, dlam.sum(0) if need_dlam else None
