"""Weighted sums of up to 16 batches: kernels and their launchers.

    out[i]         = sum over k of weights[i, k] * sources[k][i]

    dsources[k][i] = weights[i, k] * grad_output[i]
    dweights[i, k] = <grad_output[i], sources[k][i]>

K sources [N, ...] in any dtype, weights [N, K] and the arithmetic in float32 (float64 for float64). The sources come as pointers
of their own or lie in one stacked tensor [K, N, ...], one stride apart: nothing is stacked for a launch. A source is not read
where its weight is 0. _row_layout.py says how rows are read and programs are numbered.
Memory floor: forward reads every source and writes out; backward reads grad_output, writes each gradient that is needed, and
reads the sources once more for dweights.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import MIX_OPTIONS, blocks, constant, on_device_of, source_tile, times
from ._row_layout import (
    RowView,
    dense_rows,
    element_offset,
    in_layout_of,
    row_ptrs,
    row_strides,
    rows_first_tile,
)


class Sources(NamedTuple):
    """K tensors as a kernel takes them: pointers to their first rows, None for a gradient that is not needed, and the strides
    between rows in units of layout.ALIGN. A stacked tensor has one pointer and one such stride. The stride from each of its
    sources to the next is an argument beside the tuple, because Triton would specialise it as a field."""

    ptrs: tuple[torch.Tensor | None, ...]
    row_strides: tuple[int, ...]
    STACKED: tl.constexpr


@triton.jit
def source_ptrs(sources, source_stride, row, k: tl.constexpr, layout):
    """Pointers to the starts of rows of the k-th source."""
    if sources.STACKED:
        # int64, because k strides may exceed 32 bits; multiplied by ALIGN as in row_ptrs
        first = sources.ptrs[0] + tl.cast(source_stride, tl.int64) * (k * layout.ALIGN)
        ptrs = first + row * sources.row_strides[0] * layout.ALIGN
    else:
        ptrs = sources.ptrs[k] + row * sources.row_strides[k] * layout.ALIGN
    return ptrs


@triton.jit
def _load_weight(weights_ptr, row_stride, col_stride, row, k: tl.constexpr, row_mask):
    """The rows' weights of the k-th source [ROWS, 1]."""
    return tl.load(weights_ptr + row * row_stride + k * col_stride, mask=row_mask, other=0)


@triton.jit(do_not_specialize=["source_stride", "weights_row_stride", "weights_col_stride", "N", "M"])
def _convex_combination_fwd_kernel(
    sources, source_stride, weights_ptr, weights_row_stride, weights_col_stride, N, M, layout, out,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, e, row_mask, mask, _ = rows_first_tile(N, M, layout, 1, ROWS, BLOCK)
    offset = element_offset(e, layout)
    total = tl.zeros((ROWS, BLOCK), dtype=weights_ptr.dtype.element_ty)
    # unrolled, because a pointer in a tuple has a compile-time index
    for k in tl.static_range(K):
        weight = _load_weight(weights_ptr, weights_row_stride, weights_col_stride, row, k, row_mask)
        ptrs = source_ptrs(sources, source_stride, row, k, layout)
        # masked where the weight is 0: saves the read, and keeps inf and NaN of that source out of the sum
        source = tl.load(ptrs + offset, mask=mask & (weight != 0), other=0).to(weight.dtype)
        total = tl.fma(weight, source, total)
    tl.store(row_ptrs(out, row, layout) + offset, total.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["source_stride", "weights_row_stride", "weights_col_stride", "N", "M", "dsource_stride"])
def _convex_combination_bwd_kernel(
    grad_output, sources, source_stride, weights_ptr, weights_row_stride, weights_col_stride, N, M, layout,
    dsources, dsource_stride, dweights_ptr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the dsources that are not None, and this tile's part of the sums of dweights [tiles, N, K], unless it is None."""
    row, e, row_mask, mask, tile = rows_first_tile(N, M, layout, 1, ROWS, BLOCK)
    offset = element_offset(e, layout)
    # loaded once for the gradients of all sources and weights
    grad = tl.load(row_ptrs(grad_output, row, layout) + offset, mask=mask, other=0).to(weights_ptr.dtype.element_ty)
    for k in tl.static_range(K):
        # sums first: the other way round a program for sm_80 spills 8 bytes
        if dweights_ptr is not None:
            ptrs = source_ptrs(sources, source_stride, row, k, layout)
            # read even where the weight is 0: dweights is not 0 there
            source = tl.load(ptrs + offset, mask=mask, other=0).to(grad.dtype)
            partial = tl.sum(grad * source, axis=1)[:, None]
            # one partial sum a tile, not an atomic: the same bits every time
            tl.store(dweights_ptr + (tile.to(tl.int64) * N + row) * K + k, partial, mask=row_mask)
        if dsources.ptrs[0 if dsources.STACKED else k] is not None:
            weight = _load_weight(weights_ptr, weights_row_stride, weights_col_stride, row, k, row_mask)
            ptrs = source_ptrs(dsources, dsource_stride, row, k, layout)
            tl.store(ptrs + offset, times(weight, grad).to(ptrs.dtype.element_ty), mask=mask)


def _empty_stack(count, like, device):
    """An empty [count, *like.shape], each part of it in the layout of the dense tensor `like`."""
    return torch.empty_strided((count, *like.shape), (like.numel(), *like.stride()), dtype=like.dtype, device=device)


def _empty(like, device):
    """An empty tensor as this dense one. On a tensor of the meta device, torch.empty_like takes 50 us of Python."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


def sources_in_layout_of(sources, like):
    """The sources, a stacked tensor or a tuple, copied into the row layout of a dense tensor where they are stored differently."""
    if isinstance(sources, tuple):
        return tuple(in_layout_of(t, like) for t in sources)
    if row_strides(sources.shape[1:], sources.stride()[1:]) == row_strides(like.shape, like.stride()):
        return sources.resolve_neg()
    return _empty_stack(len(sources), like, sources.device).copy_(sources)


def pointers_and_strides(sources):
    """(tensors, their row strides, stride from source to source) of a stacked tensor, a tuple with Nones, or None."""
    if sources is None:
        return (None,), [0], 0
    if isinstance(sources, tuple):
        return sources, [0 if t is None else t.stride(0) for t in sources], 0
    # a stack of one may have any stride, which must not lower the alignment
    return (sources,), [sources.stride(1)], sources.stride(0) if len(sources) > 1 else 0


def _views(rows, tensor, *groups):
    """[RowLayout, the tensor as a RowView, then Sources and the source stride of each group of sources]."""
    stored = [pointers_and_strides(group) for group in groups]
    every_stride = [tensor.stride(0)]
    for _, strides, source_stride in stored:
        every_stride += (*strides, source_stride)
    layout = rows.layout(*every_stride)
    align = layout.ALIGN.value
    views = [layout, RowView(tensor, every_stride[0] // align)]
    for group, (ptrs, strides, source_stride) in zip(groups, stored, strict=True):
        stacked = constant(not isinstance(group, tuple))
        views += Sources(ptrs, tuple([stride // align for stride in strides]), stacked), source_stride // align
    return views


def convex_combination_fwd(sources, weights):
    """sources [K, N, ...] or a tuple of K tensors [N, ...], weights [N, K] -> out [N, ...], in the first source's layout."""
    weights, (N, K) = weights.resolve_neg(), weights.shape
    out, rows = dense_rows(torch.empty_like(sources[0]))
    if not out.numel():
        return out
    layout, out_rows, source_args, source_stride = _views(rows, out, sources_in_layout_of(sources, out))
    per_program, block = source_tile(rows.numel, out.element_size(), K)
    with on_device_of(out):
        _convex_combination_fwd_kernel[(blocks(N, per_program) * blocks(rows.numel, block),)](
            source_args, source_stride, weights, *weights.stride(), N, rows.numel, layout, out_rows,
            K=K, ROWS=per_program, BLOCK=block, num_warps=_launch.MIX_WARPS, **MIX_OPTIONS,
        )  # fmt: skip
    return out


def convex_combination_bwd(grad_output, sources, weights, strides, need_dsources, need_dweights):
    """grad_output [N, ...] -> (gradients of the sources, in the layout of the strides given; dweights [N, K] or None).

    `need_dsources` is a bool for a stacked tensor, whose gradient is stacked (or None), and a tuple of K bools for a tuple, which
    gives a tuple of gradients and Nones. sources may be None unless dweights is needed."""
    weights, (N, K) = weights.resolve_neg(), weights.shape
    like = torch.empty_strided(grad_output.shape, strides, dtype=grad_output.dtype, device="meta")  # without its memory
    like, rows = dense_rows(like)
    if isinstance(need_dsources, tuple):
        dsources = tuple(_empty(like, grad_output.device) if need else None for need in need_dsources)
    else:
        dsources = _empty_stack(K, like, grad_output.device) if need_dsources else None
    if not grad_output.numel():
        return dsources, weights.new_zeros(N, K) if need_dweights else None
    grad_output = in_layout_of(grad_output, like)
    sources = sources_in_layout_of(sources, like) if need_dweights else None
    layout, grad_rows, source_args, source_stride, dsource_args, dsource_stride = _views(rows, grad_output, sources, dsources)
    per_program, block = source_tile(rows.numel, grad_output.element_size(), K)
    tiles = blocks(rows.numel, block)
    dweights = torch.empty((tiles, N, K), dtype=weights.dtype, device=grad_output.device) if need_dweights else None
    with on_device_of(grad_output):
        _convex_combination_bwd_kernel[(blocks(N, per_program) * tiles,)](
            grad_rows, source_args, source_stride, weights, *weights.stride(), N, rows.numel, layout,
            dsource_args, dsource_stride, dweights, K=K, ROWS=per_program, BLOCK=block,
            num_warps=_launch.MIX_WARPS, **MIX_OPTIONS,
        )  # fmt: skip
    return dsources, dweights.sum(0) if need_dweights else None
