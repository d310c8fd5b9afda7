"""What the mixing kernels share: how the rows of a batch are stored, the tiles that programs take of them, and partners.

A row is read in memory order, as an outer and an inner strided dimension, or as one where a single stride reaches all of its
elements. So a channels_last image costs no more than a contiguous one. Element e of a row is counted in that order.
Programs are numbered rows first: when a tile of a row is read a second time, as a partner's, the same tile of all rows was
touched within a few MB, and the L2 cache serves it.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import (
    COUNTED_BLOCK,
    COUNTED_CHUNK,
    COUNTED_ROWS,
    COUNTED_WARPS,
    MIX_OPTIONS,
    blocks,
    common_alignment,
    constant,
    on_device_of,
    row_tile,
)


class RowView(NamedTuple):
    """A tensor as a kernel takes it: a pointer to its first row, and the stride between rows in units of layout.ALIGN."""

    ptr: torch.Tensor
    stride: int


class RowLayout(NamedTuple):
    """How the elements of a row are stored, in all tensors of a launch. Rows of one dimension have None for the outer one."""

    inner_size: int | None
    outer_stride: int | None
    inner_stride: int
    ALIGN: tl.constexpr  # a power of two that divides the number of elements and the strides of rows and outer dimension


class InverseIndex(NamedTuple):
    """The rows k that have row i as their partner, index[k] = i: order[starts[i]:starts[i+1]], rising; order[i] alone where the index
    is known to be a permutation, and starts is None."""

    order_ptr: torch.Tensor
    starts_ptr: torch.Tensor | None


@triton.jit
def rows_first_tile(N, M, layout, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows [ROWS, 1], groups [1, BLOCK // V] of V elements, mask of the rows, mask of the groups, number of the tile) of this
    program, of N rows of M elements."""
    row_blocks = tl.cdiv(N, ROWS)
    # int64, because a product of a row and its stride may exceed 32 bits
    row = ((tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    tile = tl.program_id(0) // row_blocks
    group = tile.to(M.dtype) * (BLOCK // V) + tl.arange(0, BLOCK // V)[None, :]
    row_mask = row < N
    if V == 1:
        # M is a multiple of ALIGN: said so, because a mask that is constant over an access leaves it whole
        mask = row_mask & (group < M // layout.ALIGN * layout.ALIGN)
    else:
        mask = row_mask & (group < M // V)
    return row, group, row_mask, mask, tile


@triton.jit
def group_tile(N, M, layout, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows [ROWS, 1], groups of V elements [1, BLOCK // V, 1], mask of the rows [ROWS, 1], mask of the groups [ROWS, BLOCK // V, 1],
    number of the tile) of this program. What is loaded once a row is loaded as [ROWS, 1]: in three dimensions a thread would load
    it once for each of its groups."""
    row, group, row_mask, mask, tile = rows_first_tile(N, M, layout, V, ROWS, BLOCK)
    return row, group[:, :, None], row_mask, mask[:, :, None], tile


@triton.jit
def group_offset(group, layout, V: tl.constexpr):
    """Offsets [rows, groups, V] of the elements of groups from their row's start."""
    return element_offset(group * V + tl.arange(0, V)[None, None, :], layout)


@triton.jit
def element_offset(e, layout):
    """Offset of a row's element e from the row's start."""
    if layout.outer_stride is None:
        offset = e.to(tl.int64) * layout.inner_stride
    else:
        outer = (e // layout.inner_size).to(tl.int64) * layout.outer_stride
        offset = outer + (e % layout.inner_size).to(tl.int64) * layout.inner_stride
    return offset


@triton.jit
def row_ptrs(rows, row, layout):
    """Pointers to the starts of rows."""
    # multiplied by ALIGN here, so that the compiler knows it as a divisor and may use 16-byte accesses
    return rows.ptr + row * rows.stride * layout.ALIGN


@triton.jit
def load_partner(index_ptr, row, N, row_mask):
    """(the rows' partners, 0 where they are out of range; whether they are in range). row_mask: None if all rows exist."""
    if row_mask is None:
        partner = tl.load(index_ptr + row)
    else:
        partner = tl.load(index_ptr + row, mask=row_mask, other=0)
    in_range = (partner >= 0) & (partner < N)
    return tl.where(in_range, partner, 0), in_range


@triton.jit
def load_range(inverse, slot, mask):
    """(start, length) of a slot's entries in inverse.order. mask: None if all slots exist."""
    if mask is None:
        first = tl.load(inverse.starts_ptr + slot)
        count = tl.load(inverse.starts_ptr + slot + 1) - first
    else:
        first = tl.load(inverse.starts_ptr + slot, mask=mask, other=0)
        count = tl.load(inverse.starts_ptr + slot + 1, mask=mask, other=0) - first
    return first, count


@triton.jit
def weight_of_partner(lam, in_range):
    """1 - lam, and NaN where the partner is out of range."""
    one = tl.where(in_range, 1.0, float("nan")).to(lam.dtype)
    return one - lam


@triton.jit
def _minus_zero(like, BITS: tl.constexpr):
    """-0 in a type of so many bits: written as a number, Triton takes it for 0."""
    if BITS == 16:
        zero = tl.full((), -(2**15), tl.int16)
    elif BITS == 32:
        zero = tl.full((), -(2**31), tl.int32)
    else:
        zero = tl.full((), -(2**63), tl.int64)
    return zero.to(like, bitcast=True)


@triton.jit
def load_or_nothing(rows, row, offset, mask, layout):
    """Elements of rows, and -0 where they are masked: its product with a weight of 0 adds nothing to a sum, whose sign stays."""
    BITS: tl.constexpr = rows.ptr.dtype.element_ty.primitive_bitwidth  # Triton 3.3 does not ask it of a constexpr
    nothing = _minus_zero(rows.ptr.dtype.element_ty, BITS)
    return tl.load(row_ptrs(rows, row, layout) + offset, mask=mask, other=nothing)


@triton.jit
def mixed_pair(lam, partner_weight, x, y):
    """fma(lam, x, partner_weight*y). Exactly one of x and y where the other's weight is 0, if load_or_nothing did not load it."""
    return tl.fma(lam, x, partner_weight * y)


@triton.jit
def add_product(total, weight, x):
    """fma(weight, x, total), and the total alone where the weight is 0, even if x is inf or NaN."""
    return tl.where(weight == 0, total, tl.fma(weight, x, total))


class DenseRows:
    """How the rows of a dense tensor are stored, and the tiles that cover them. `strides` are those of the dimensions after the
    first that have more than one element: rows of tensors that agree in them have the same layout. `steps` and `sizes` of the
    last `coordinate_dims` dimensions, which a box or a mask lies over: element e has coordinate e // step % size."""

    def __init__(self, shape, strides, itemsize, coordinate_dims, cells=False):
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
        outer_stride = merged[0][0] if len(merged) == 2 else None
        inner_stride, inner_size = merged[-1] if merged else (1, 1)
        self.align = common_alignment(self.numel, *(() if outer_stride is None else (outer_stride, inner_size)))
        self.layouts = {
            align: RowLayout(None if outer_stride is None else inner_size, outer_stride, inner_stride, constant(align))
            for align in (1, 2, 4, 8, 16)
        }
        self.per_program, self.block = row_tile(self.numel, itemsize, cells)
        self.tiles = blocks(self.numel, self.block)
        self.steps, self.sizes = _coordinates(shape, strides, coordinate_dims)
        # elements of 16 bytes differ in the last of those coordinates alone only if that is the fastest
        self._vector = 1
        if coordinate_dims and inner_stride == 1 and self.steps[-1] == min(self.steps):
            self._vector = math.gcd(16 // itemsize, self.steps[-1] * self.sizes[-1])

    def vector_of(self, layout):
        """Number of elements that are accessed at once where a box cuts a row."""
        return math.gcd(self._vector, layout.ALIGN.value)

    def layout(self, *strides):
        """The RowLayout whose ALIGN divides these strides too."""
        return self.layouts[math.gcd(self.align, *strides)]

    def views(self, *tensors):
        """(RowLayout, then each tensor as a RowView, None as None)."""
        strides = [0 if t is None else t.stride(0) for t in tensors]
        align = math.gcd(self.align, *strides)
        # not strict=True, which takes 0.3 us
        return self.layouts[align], *[t if t is None else RowView(t, s // align) for t, s in zip(tensors, strides)]  # noqa: B905


rows_of = functools.lru_cache(maxsize=1024)(DenseRows)


@functools.lru_cache(maxsize=1024)
def row_strides(shape, strides):
    """The strides of the dimensions after the first that have more than one element."""
    return [stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size != 1]


def _coordinates(shape, strides, count):
    """(steps, sizes) of the last `count` dimensions: element e of a row has coordinate e // step % size along a dimension."""
    steps, sizes = [], []
    for d in range(len(shape) - count, len(shape)):
        inner = [shape[k] for k in range(1, len(shape)) if shape[k] != 1 and strides[k] < strides[d]]
        steps.append(math.prod(inner) if shape[d] != 1 else 1)
        sizes.append(shape[d])
    return tuple(steps), tuple(sizes)


def dense_rows(like, coordinate_dims=0, cells=False):
    """(a dense tensor as this one, its DenseRows): a contiguous one if the rows of this one take more than two dimensions."""
    rows = rows_of(like.shape, like.stride(), like.element_size(), coordinate_dims, cells)
    if not rows.fits:
        like = torch.empty_like(like, memory_format=torch.contiguous_format)
        rows = rows_of(like.shape, like.stride(), like.element_size(), coordinate_dims, cells)
    return like, rows


def in_layout_of(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t, copied into the row layout of a dense tensor where it is stored differently."""
    same = row_strides(t.shape, t.stride()) == row_strides(like.shape, like.stride())
    return t.resolve_neg() if same else torch.empty_like(like, device=t.device).copy_(t)


@triton.jit(do_not_specialize=["N", "slots"])
def _inverse_index_kernel(index_ptr, order_ptr, starts_ptr, N, slots, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Writes order and starts of InverseIndex by counting: row k comes after the rows of smaller indices and, of its own, after
    those before it. Every program looks at all rows for BLOCK of them, so that none waits for another."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    own = _slot_of(index_ptr, k, N, slots)
    rank = tl.zeros([BLOCK, CHUNK], dtype=tl.int32)
    smaller = tl.zeros([BLOCK, CHUNK], dtype=tl.int32)
    for first in range(0, N, CHUNK):
        j = first + tl.arange(0, CHUNK)[None, :]
        slot = _slot_of(index_ptr, j, N, slots)
        rank += ((slot < own) | ((slot == own) & (j < k))).to(tl.int32)
        smaller += (slot < k).to(tl.int32)
    tl.store(order_ptr + tl.sum(rank, axis=1)[:, None], k.to(tl.int64), mask=k < N)
    tl.store(starts_ptr + k, tl.sum(smaller, axis=1)[:, None].to(tl.int64), mask=k <= slots)


@triton.jit
def _slot_of(index_ptr, row, N, slots):
    """The rows' slots as int32; `slots`, which no row asks for, where they are out of range or the row does not exist."""
    index = tl.load(index_ptr + row, mask=row < N, other=-1)
    return tl.where((index >= 0) & (index < slots), index, slots).to(tl.int32)


def inverse_index(index, slots):
    """InverseIndex of an index into so many slots; entries out of range are in none of them. Sums over a slot are in the order of
    k: they need no atomics, and have the same bits every time."""
    if max(len(index), slots) > COUNTED_ROWS:
        return sorted_inverse(index, slots)
    order, starts = torch.empty_like(index), index.new_empty(slots + 1)
    with on_device_of(index):
        _inverse_index_kernel[(blocks(max(len(index), slots + 1), COUNTED_BLOCK),)](
            index, order, starts, len(index), slots,
            BLOCK=COUNTED_BLOCK, CHUNK=COUNTED_CHUNK, num_warps=COUNTED_WARPS, **MIX_OPTIONS,
        )  # fmt: skip
    return InverseIndex(order, starts)


def sorted_inverse(index, slots):
    """The same by a stable sort, in five launches, for any number of rows."""
    sorted_index, order = index.sort(stable=True)
    return InverseIndex(order, torch.searchsorted(sorted_index, torch.arange(slots + 1, device=index.device)))
