"""How the rows of a batch are stored, for kernels that take a row in memory order: an outer and an inner strided dimension (one,
if it is contiguous), so that a channels_last image is as good as a contiguous one."""

import functools
import math

import torch
import triton
import triton.language as tl

from ._launch import blocks, common_alignment, row_tile


@triton.jit
def _offset(e, inner_size, outer_stride, inner_stride, SPLIT: tl.constexpr):
    """Where a row's e-th element, counted in memory order, is stored."""
    if SPLIT:
        offset = (e // inner_size).to(tl.int64) * outer_stride + (e % inner_size).to(tl.int64) * inner_stride
    else:
        offset = e.to(tl.int64) * inner_stride
    return offset


class _Rows:
    """How the rows of a dense result are stored, and the tiles that cover them. `strides` are those of the dimensions after the
    first that have more than one element: tensors for which they agree have rows of the same layout."""

    def __init__(self, shape, strides, itemsize, box_dims):
        dims = sorted(((strides[d], shape[d]) for d in range(1, len(shape)) if shape[d] != 1), reverse=True)
        merged: list[tuple[int, int]] = []
        for stride, size in dims:
            if merged and merged[-1][0] == stride * size:
                merged[-1] = (stride, merged[-1][1] * size)
            else:
                merged.append((stride, size))
        self.fits = len(merged) <= 2 and all(stride > 0 for stride, _ in merged)
        self.strides = row_strides(shape, strides)
        self.numel = math.prod(size for _, size in merged)
        self.split = len(merged) == 2
        self.outer_stride = merged[0][0] if self.split else 0
        self.inner_stride, self.inner_size = merged[-1] if merged else (1, 1)
        self.align = common_alignment(self.numel, *((self.outer_stride, self.inner_size) if self.split else ()))
        self.per_program, self.block = row_tile(self.numel, itemsize, box_dims > 0)
        self.tiles = blocks(self.numel, self.block)
        self.steps = _box_steps(shape, strides, box_dims)
        self.vector = 1
        if box_dims:  # elements of 16 bytes that are alike but for the last of the box's dimensions, if that is the fastest
            step, size = self.steps[2 * box_dims - 2 : 2 * box_dims]
            fastest = all(step <= other for other in self.steps[0 : 2 * box_dims : 2])
            self.vector = math.gcd(16 // itemsize, step * size) if fastest and self.inner_stride == 1 else 1

    def vector_of(self, align):
        """The elements that are accessed at once where a box cuts a row, for tensors whose rows are aligned like this."""
        return math.gcd(self.vector, align)

    def args(self, *tensors):
        """(alignment, row strides in units of it)"""
        strides = [t.stride(0) for t in tensors]
        align = math.gcd(self.align, *strides)
        return align, [stride // align for stride in strides]


rows_of = functools.lru_cache(maxsize=1024)(_Rows)


@functools.lru_cache(maxsize=1024)
def row_strides(shape, strides):
    return [stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size != 1]


def _box_steps(shape, strides, count):
    """[step, size] of three dimensions, the last `count` of which are real: element e of a row, counted in memory order, has
    coordinate e // step % size along a dimension."""
    steps = []
    for d in range(len(shape) - count, len(shape)):
        inner = [shape[k] for k in range(1, len(shape)) if shape[k] != 1 and strides[k] < strides[d]]
        steps += [math.prod(inner) if shape[d] != 1 else 1, shape[d]]
    return steps + [1] * (6 - len(steps))


def walkable(like, box_dims=0):
    """(a dense tensor as this one, how its rows are stored): a contiguous one if its own rows cannot be walked."""
    rows = rows_of(like.shape, like.stride(), like.element_size(), box_dims)
    if not rows.fits:
        like = torch.empty_like(like, memory_format=torch.contiguous_format)
        rows = rows_of(like.shape, like.stride(), like.element_size(), box_dims)
    return like, rows


def _like(t: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    """t, copied into the row layout of a dense tensor where it is stored differently."""
    same = row_strides(t.shape, t.stride()) == row_strides(layout.shape, layout.stride())
    return t.resolve_neg() if same else torch.empty_like(layout, device=t.device).copy_(t)
