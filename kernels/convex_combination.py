"""Weighted sums of up to 16 batches: kernels and their launchers.

    out[n] = sum over k of weights[n, k] * sources[k][n]

The sources come as pointers of their own or lie in one stacked tensor, at one stride; nothing is stacked for a launch. Rows are
taken as stored, as in `kernels/_rows.py`, and programs are numbered rows first. A source is not read where its weight is 0.
Memory floor: forward reads every source and writes out; backward reads g and writes a gradient for each source that needs one,
and reads the sources once more for the gradient of the weights.
"""

import math

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import OPTIONS, blocks, on_device_of, source_tile
from ._row_layout import _like, _offset, row_strides, walkable


@triton.jit
def _base(pointers, strides, stack, row, ALIGN: tl.constexpr, STACKED: tl.constexpr, n: tl.constexpr):
    """Where the rows of the n-th tensor begin."""
    if STACKED:
        base = pointers[0] + tl.cast(stack, tl.int64) * (n * ALIGN) + row * strides[0] * ALIGN
    else:
        base = pointers[n] + row * strides[n] * ALIGN
    return base


@triton.jit(do_not_specialize=["N", "M", "stack", "weights_row", "weights_column"])
def _convex_combination_fwd_kernel(
    sources, weights_ptr, out_ptr,
    N, M, inner_size,
    stack, source_rows, out_row, weights_row, weights_column, outer_stride, inner_stride,
    K: tl.constexpr, STACKED: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(N, ROWS)
    row = ((tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]; addresses are int64
    e = (tl.program_id(0) // row_blocks).to(M.dtype) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    live = row < N
    mask = live & (e < M // ALIGN * ALIGN)
    at = _offset(e, inner_size, outer_stride, inner_stride, SPLIT)
    total = tl.zeros((ROWS, BLOCK), dtype=weights_ptr.dtype.element_ty)
    for n in tl.static_range(K):
        w = tl.load(weights_ptr + row * weights_row + n * weights_column, mask=live, other=0)
        base = _base(sources, source_rows, stack, row, ALIGN, STACKED, n)
        total += w * tl.load(base + at, mask=mask & (w != 0), other=0).to(w.dtype)
    tl.store(out_ptr + row * out_row * ALIGN + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "M", "source_stack", "gradient_stack", "weights_row", "weights_column"])
def _convex_combination_bwd_kernel(
    g_ptr, sources, weights_ptr, gradients, dweights_ptr,
    N, M, inner_size,
    g_row, source_stack, source_rows, gradient_stack, gradient_rows, weights_row, weights_column, outer_stride, inner_stride,
    NEEDED: tl.constexpr, NEED_DWEIGHTS: tl.constexpr,
    K: tl.constexpr, STACKED: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dsources[k][n] = weights[n, k]*g[n] for the k whose bit in NEEDED is set.
    dweights[n, k] = <g[n], sources[k][n]>; this program adds its tile's share, dweights is [tiles, N, K]."""
    row_blocks = tl.cdiv(N, ROWS)
    row = ((tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    tile = tl.program_id(0) // row_blocks
    e = tile.to(M.dtype) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = row < N
    mask = live & (e < M // ALIGN * ALIGN)
    at = _offset(e, inner_size, outer_stride, inner_stride, SPLIT)
    g = tl.load(g_ptr + row * g_row * ALIGN + at, mask=mask, other=0).to(weights_ptr.dtype.element_ty)
    for n in tl.static_range(K):
        if (NEEDED >> n) & 1:
            w = tl.load(weights_ptr + row * weights_row + n * weights_column, mask=live, other=0)
            base = _base(gradients, gradient_rows, gradient_stack, row, ALIGN, STACKED, n)
            tl.store(base + at, tl.where(w == 0, 0, w * g).to(base.dtype.element_ty), mask=mask)
        if NEED_DWEIGHTS:
            base = _base(sources, source_rows, source_stack, row, ALIGN, STACKED, n)
            share = tl.sum(g * tl.load(base + at, mask=mask, other=0).to(g.dtype), axis=1)[:, None]
            tl.store(dweights_ptr + (tile.to(tl.int64) * N + row) * K + n, share, mask=live)


def _bits(flags):
    return sum(1 << n for n, flag in enumerate(flags) if flag)


def _stack(count, like, device):
    """An empty [count, *like.shape], each part of it in the layout of the dense tensor `like`."""
    return torch.empty_strided((count, *like.shape), (like.numel(), *like.stride()), dtype=like.dtype, device=device)


def _stored(tensors, like):
    """A stacked tensor or a tuple of tensors as a kernel takes them, in the row layout of `like`: (tuple, row strides, stride
    of the stack). What is stored differently is copied."""
    if isinstance(tensors, tuple):
        tensors = tuple(_like(t, like) for t in tensors)
        return tensors, [t.stride(0) for t in tensors], 0
    if row_strides(tensors.shape[1:], tensors.stride()[1:]) == row_strides(like.shape, like.stride()):
        tensors = tensors.resolve_neg()
    else:
        tensors = _stack(len(tensors), like, tensors.device).copy_(tensors)
    return (tensors,), [tensors.stride(1)], tensors.stride(0) if len(tensors) > 1 else 0


def _units(align, strides, *stacks):
    """(alignment of all strides, row strides in units of it, strides of stacks likewise)"""
    align = math.gcd(align, *strides, *stacks)
    return align, [stride // align for stride in strides], [stack // align for stack in stacks]


def convex_combination_fwd(sources, weights):
    """sources [K, N, ...] or a tuple of K tensors [N, ...], weights [N, K] -> out [N, ...], in the first source's layout."""
    first, weights, K = sources[0], weights.resolve_neg(), weights.shape[1]
    out, rows = walkable(torch.empty_like(first))
    if not out.numel():
        return out
    tensors, strides, stack = _stored(sources, out)
    align, (out_row, *strides), (stack,) = _units(rows.align, [out.stride(0), *strides], stack)
    per_program, block = source_tile(rows.numel, out.element_size(), K)
    tiles = blocks(rows.numel, block)
    with on_device_of(out):
        _convex_combination_fwd_kernel[(blocks(out.shape[0], per_program) * tiles,)](
            tensors, weights, out,
            out.shape[0], rows.numel, rows.inner_size,
            stack, tuple(strides), out_row, *weights.stride(), rows.outer_stride, rows.inner_stride,
            K=K, STACKED=not isinstance(sources, tuple), SPLIT=rows.split, ALIGN=align, ROWS=per_program, BLOCK=block,
            num_warps=_launch.MIX_WARPS, **OPTIONS,
        )  # fmt: skip
    return out


def convex_combination_bwd(g, sources, weights, layout, need_dsources, need_dweights):
    """Upstream g [N, ...] -> (gradients of the sources, in the layout of the strides given; dweights [N, K] or None).

    `need_dsources` says of what kind the sources are: a bool of a stacked tensor, whose gradient is stacked (or None), a tuple
    of K bools of a tuple, which gives a tuple of gradients and Nones. Without need_dweights sources may be None."""
    weights, (N, K) = weights.resolve_neg(), weights.shape
    like = torch.empty_strided(g.shape, layout, dtype=g.dtype, device="meta")  # a dense layout, without its memory
    like, rows = walkable(like)
    stacked = isinstance(need_dsources, bool)
    if stacked:
        dsources = _stack(K, like, g.device) if need_dsources else None
        needed = (1 << K) - 1 if need_dsources else 0
    else:
        dsources = tuple(torch.empty_like(like, device=g.device) if need else None for need in need_dsources)
        needed = _bits(need_dsources)
    if not g.numel():
        return dsources, weights.new_zeros(N, K) if need_dweights else None
    g = _like(g, like)
    tensors, strides, stack = _stored(sources, like) if need_dweights else ((g,), [0], 0)
    if not needed:
        gradients, gradient_stack, gradient_strides = (g,), 0, [0]
    elif stacked:
        gradients, gradient_stack, gradient_strides = (dsources,), g.numel(), [dsources.stride(1)]
    else:
        gradients, gradient_stack = tuple(g if t is None else t for t in dsources), 0
        gradient_strides = [t.stride(0) for t in gradients]
    align, (g_row, *strides), (stack, gradient_stack) = _units(
        rows.align, [g.stride(0), *strides, *gradient_strides], stack, gradient_stack
    )
    source_strides, gradient_strides = strides[: len(tensors)], strides[len(tensors) :]
    per_program, block = source_tile(rows.numel, g.element_size(), K)
    tiles = blocks(rows.numel, block)
    dweights = torch.empty((tiles, N, K) if need_dweights else 0, dtype=weights.dtype, device=g.device)
    with on_device_of(g):
        _convex_combination_bwd_kernel[(blocks(N, per_program) * tiles,)](
            g, tensors, weights, gradients, dweights,
            N, rows.numel, rows.inner_size,
            g_row, stack, tuple(source_strides), gradient_stack, tuple(gradient_strides), *weights.stride(),
            rows.outer_stride, rows.inner_stride,
            NEEDED=needed, NEED_DWEIGHTS=need_dweights,
            K=K, STACKED=stacked, SPLIT=rows.split, ALIGN=align, ROWS=per_program, BLOCK=block, num_warps=_launch.MIX_WARPS, **OPTIONS,
        )  # fmt: skip
    return dsources, dweights.sum(0) if need_dweights else None
