"""Mixing with the whole partner resized into a box: kernels and their launchers.

    out[i, y, x] = sum over a, b in {0, 1} of v(a)*u(b) * x[index[i], p + a, q + b]      inside row i's box
    out[i, y, x] = x[i, y, x]                                                          outside it
    p            = floor(s),  v(1) = s - p,  v(0) = 1 - v(1)   of   s = (y - y0 + 1/2) * H / (y1 - y0) - 1/2;   q and u likewise of x

    dx[i, p, q] = grad_output[i, p, q] outside row i's box + sum over the k with index[k] = i, and over the places of row k's box that
                  sample pixel (p, q), of their weights * grad_output[k]

s is a fraction of integers, and p and v are its whole part and the rest: no rounding moves a pixel. A box is no larger than the image,
so that a pixel is sampled by two lines of a box at most, and by two columns: dx is gathered, without atomics, in the order of k.
x [N, ..., H, W] in any dtype, arithmetic in float32 (float64 for float64), index [N], box [N, 4] int64 (y0, x0, y1, x1), cut off at the
image's border. _row_layout.py says how rows are read and programs are numbered.
Memory floor: forward reads x and writes out; backward reads grad_output and writes dx.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import MIX_OPTIONS, blocks, on_device_of
from ._row_layout import (
    dense_rows,
    element_offset,
    group_offset,
    group_tile,
    in_layout_of,
    inverse_index,
    load_partner,
    load_range,
    row_ptrs,
)


@triton.jit
def _load_side(box_ptr, row, row_mask, d: tl.constexpr, size):
    """(start, length) of the rows' boxes along dimension d, cut off at the image's border, int32 [ROWS, 1, 1]."""
    start = tl.load(box_ptr + row * 4 + d, mask=row_mask, other=0)
    stop = tl.load(box_ptr + row * 4 + d + 2, mask=row_mask, other=0)
    start = tl.minimum(tl.maximum(start, 0), size)
    stop = tl.minimum(tl.maximum(stop, start), size)
    return start.to(tl.int32)[:, :, None], (stop - start).to(tl.int32)[:, :, None]


@triton.jit
def _sampled(place, length, size, like):
    """(first of the two pixels of a side that a place of the box's length is sampled from, weight of the second)"""
    twice = 2 * tl.maximum(length, 1)
    numerator = (2 * place + 1) * size - length
    first = numerator // twice
    return first, (numerator - first * twice).to(like) / twice.to(like)


@triton.jit
def _first_sampler(pixel, length, size):
    """The first of the two places of a box's length that may be sampled from a pixel of the side."""
    return ((2 * pixel - 1) * length + size) // (2 * size)


@triton.jit
def _weight_in(place, pixel, length, size, like):
    """Weight of a pixel of the side in a place of the box's length, 0 where it is no place of the box."""
    twice = 2 * tl.maximum(length, 1)
    apart = tl.abs((2 * place + 1) * size - length - twice * pixel)
    return tl.where((place >= 0) & (place < length), tl.maximum(twice - apart, 0), 0).to(like) / twice.to(like)


@triton.jit
def _load_pixels(rows, row, element, mask, layout, like):
    return tl.load(row_ptrs(rows, row, layout) + element_offset(element, layout), mask=mask, other=0).to(like)


@triton.jit(do_not_specialize=["N", "M"])
def _resize_mix_fwd_kernel(
    x, index_ptr, box_ptr, N, M, layout, steps, sizes, out,
    V: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group, row_mask, mask, _ = group_tile(N, M, layout, V, ROWS, BLOCK)
    offset = group_offset(group, layout, V)
    partner, in_range = load_partner(index_ptr, row, N, row_mask)
    start_y, length_y = _load_side(box_ptr, row, row_mask & in_range, 0, sizes[0])
    start_x, length_x = _load_side(box_ptr, row, row_mask & in_range, 1, sizes[1])
    # the elements of a group lie on one line of the image
    y = (group * V // steps[0] % sizes[0]).to(tl.int32)
    e = group * V + tl.arange(0, V)[None, None, :]
    x_place = (e // steps[1] % sizes[1]).to(tl.int32) - start_x
    y_place = y - start_y
    inside = (y_place >= 0) & (y_place < length_y) & (x_place >= 0) & (x_place < length_x)
    # a group is loaded if any of its elements is needed: masks that differ within it would split the access
    some_own = tl.max((inside == 0).to(tl.int32), axis=2, keep_dims=True) != 0
    own = tl.load(row_ptrs(x, row[:, :, None], layout) + offset, mask=mask & some_own, other=0).to(ACC)

    first_y, v = _sampled(y_place, length_y, sizes[0], ACC)
    first_x, u = _sampled(x_place, length_x, sizes[1], ACC)
    # from the element's own place in its row to the first of the four that it is sampled from
    top = e + (first_y - y).to(M.dtype) * steps[0] + (first_x - x_place - start_x).to(M.dtype) * steps[1]
    partner = partner[:, :, None]
    use = mask & inside
    use_right = use & (u != 0)
    use_below = use & (v != 0)
    a = _load_pixels(x, partner, top, use, layout, ACC)
    b = _load_pixels(x, partner, top + steps[1], use_right, layout, ACC)
    upper = tl.fma(u, b, (1 - u) * a)
    a = _load_pixels(x, partner, top + steps[0], use_below, layout, ACC)
    b = _load_pixels(x, partner, top + steps[0] + steps[1], use_below & (u != 0), layout, ACC)
    lower = tl.fma(u, b, (1 - u) * a)
    mixed = tl.where(inside, tl.fma(v, lower, (1 - v) * upper), own)
    mixed = tl.where(in_range[:, :, None], mixed, float("nan"))
    tl.store(row_ptrs(out, row[:, :, None], layout) + offset, mixed.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "M"])
def _resize_mix_bwd_kernel(
    grad_output, inverse, box_ptr, N, M, layout, steps, sizes, dx,
    V: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group, row_mask, mask, _ = group_tile(N, M, layout, V, ROWS, BLOCK)
    offset = group_offset(group, layout, V)
    start_y, length_y = _load_side(box_ptr, row, row_mask, 0, sizes[0])
    start_x, length_x = _load_side(box_ptr, row, row_mask, 1, sizes[1])
    y = (group * V // steps[0] % sizes[0]).to(tl.int32)
    e = group * V + tl.arange(0, V)[None, None, :]
    column = (e // steps[1] % sizes[1]).to(tl.int32)
    inside = (y >= start_y) & (y < start_y + length_y) & (column >= start_x) & (column < start_x + length_x)
    some_own = tl.max((inside == 0).to(tl.int32), axis=2, keep_dims=True) != 0
    grad = tl.load(row_ptrs(grad_output, row[:, :, None], layout) + offset, mask=mask & some_own, other=0).to(ACC)
    total = tl.where(inside, 0, grad)
    first, count = load_range(inverse, row, row_mask)
    for n in range(tl.max(count)):
        k_mask = row_mask & (n < count)
        k = tl.load(inverse.order_ptr + first + n, mask=k_mask, other=0)
        start_y, length_y = _load_side(box_ptr, k, k_mask, 0, sizes[0])
        start_x, length_x = _load_side(box_ptr, k, k_mask, 1, sizes[1])
        place_y = _first_sampler(y, length_y, sizes[0])
        place_x = _first_sampler(column, length_x, sizes[1])
        corner = e + (start_y + place_y - y).to(M.dtype) * steps[0] + (start_x + place_x - column).to(M.dtype) * steps[1]
        for a in tl.static_range(2):
            v = _weight_in(place_y + a, y, length_y, sizes[0], ACC)
            for b in tl.static_range(2):
                weight = v * _weight_in(place_x + b, column, length_x, sizes[1], ACC)
                use = mask & (weight != 0)
                grad = _load_pixels(grad_output, k[:, :, None], corner + a * steps[0] + b * steps[1], use, layout, ACC)
                total = tl.fma(weight, grad, total)
    tl.store(row_ptrs(dx, row[:, :, None], layout) + offset, total.to(dx.ptr.dtype.element_ty), mask=mask)


def _tile(rows, layout, like, warps):
    return {
        "V": rows.vector_of(layout), "ACC": tl.float64 if like.dtype == torch.float64 else tl.float32,
        "ROWS": rows.per_program, "BLOCK": rows.block, "num_warps": warps, **MIX_OPTIONS,
    }  # fmt: skip


def resize_mix_fwd(x, index, box):
    """x [N, ..., H, W], index [N], box [N, 4] int64 -> out, in x's layout."""
    out, rows = dense_rows(torch.empty_like(x), 2, True)
    if out.numel():
        x = in_layout_of(x, out)
        layout, x_rows, out_rows = rows.views(x, out)
        with on_device_of(x):
            _resize_mix_fwd_kernel[(blocks(x.shape[0], rows.per_program) * rows.tiles,)](
                x_rows, index.contiguous(), box.contiguous(), x.shape[0], rows.numel, layout, rows.steps, rows.sizes, out_rows,
                **_tile(rows, layout, x, _launch.MIX_WARPS),
            )  # fmt: skip
    return out


def resize_mix_bwd(grad_output, index, box, strides):
    """grad_output [N, ..., H, W] -> dx, in the layout of these strides."""
    dx = torch.empty_strided(grad_output.shape, strides, dtype=grad_output.dtype, device=grad_output.device)
    dx, rows = dense_rows(dx, 2, True)
    if dx.numel():
        grad_output = in_layout_of(grad_output, dx)
        N = dx.shape[0]
        inverse = inverse_index(index.contiguous(), N)
        layout, grad_rows, dx_rows = rows.views(grad_output, dx)
        with on_device_of(dx):
            _resize_mix_bwd_kernel[(blocks(N, rows.per_program) * rows.tiles,)](
                grad_rows, inverse, box.contiguous(), N, rows.numel, layout, rows.steps, rows.sizes, dx_rows,
                # the places that sample a pixel take registers
                **_tile(rows, layout, dx, _launch.CELL_WARPS),
            )  # fmt: skip
    return dx
