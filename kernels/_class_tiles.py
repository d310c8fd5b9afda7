"""Rows of logits, or of a tensor of their shape, as [O, C, I]: how they are stored, and the tiles that programs take of them.

Row r = o*I + i. Where classes are contiguous and rows start off a 16-byte boundary, a row has three parts: the prologue, before
its first 16-byte-aligned address; whole vectors of 16 bytes; and the epilogue. The vectors are tiles, whose mask is constant over
each vector. Prologue and epilogue together, the edges, are one small tile that is accessed element by element, so that no
element of a neighbouring row is ever touched. Where pixels are contiguous (the stride of classes is not 1) a tile takes pixels,
16 bytes at a time, and many classes.

Helpers take a tile by the program's Rows and `first`, the column of its first element: None is the tile of the edges. A column
is a class, but counts from the end of the row's prologue where rows have one.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import common_alignment, constants, exp, times

WINDOW_BYTES = 1024  # shorter rows are accessed by element: their edges would be a large part of them
MOST_COMPARED = tl.constexpr(32768)  # columns of a tile that leaves registers for runs
COMPARED_RUN = tl.constexpr(8)  # columns that are compared with a class at a time: 16 bytes of bfloat16

# What a kernel is launched with. Fields that are None or tl.constexpr are compile-time; a tuple's integers are specialised, so
# sizes that change with every batch are arguments of their own. Helpers of a kernel read fields by name: Triton 3.3 cannot unpack
# a tuple that holds None. None of these may be assigned to a variable in a kernel, which would make tensors of its constants.


class Strided(NamedTuple):
    """A tensor's pointer and strides over outer index, column (a class, or a component) and inner index."""

    ptr: torch.Tensor
    outer: int
    column: int
    inner: int


class Tile(NamedTuple):
    """Sizes of a program's tile: classes of a row, the factor of strides, whether there is one outer index, whether pixels are
    contiguous, elements of a vector (1: rows have no edges), rows and columns. In the interpreter a constexpr to the left of a
    tensor swallows it: `.value`."""

    C: tl.constexpr
    ALIGN: tl.constexpr
    FLAT: tl.constexpr
    PIXELS: tl.constexpr
    VECTOR: tl.constexpr
    ROWS: tl.constexpr
    BLOCK_C: tl.constexpr


class Gradients(NamedTuple):
    """Where the gradients are stored. None: that gradient is not needed."""

    dlogits: Strided | None
    dtarget: Strided | None


# What kernels make of it. These hold tensors alone, which variables and return values may.


class Rows(NamedTuple):
    """The rows of a program: outer index, inner indices [ROWS], their mask [ROWS] and the lengths of their prologues [ROWS]."""

    o: tl.tensor
    i: tl.tensor
    mask: tl.tensor
    prologue: tl.tensor


class RowPtrs(NamedTuple):
    """Where a program's rows of one tensor lie: its pointer, the offsets of the rows [ROWS], and the stride of columns."""

    ptr: tl.tensor
    offsets: tl.tensor
    column: tl.tensor


class Sums(NamedTuple):
    """Running maximum and sums over the classes of rows [ROWS]: exp(z - max), the weights u, and u*(max - z)."""

    row_max: tl.tensor
    exp_sum: tl.tensor
    weight_sum: tl.tensor
    scaled_logit_sum: tl.tensor


@triton.jit
def _cast_to(value, ptrs):
    """Casts a value to the pointers' dtype; float64 by way of float32, since some targets lack the direct conversion."""
    if value.dtype == tl.float64:  # noqa: SIM102 (Triton 3.3 has no `and` for these)
        if ptrs.dtype.element_ty != tl.float64:
            value = value.to(tl.float32)
    return value.to(ptrs.dtype.element_ty)


@triton.jit
def _locate(tensor, o, i, tile):
    """Returns the RowPtrs of a Strided tensor at outer index o and inner indices i."""
    if tile.PIXELS:
        offsets = o * tensor.outer * tile.ALIGN + i * tensor.inner
        column = tensor.column * tile.ALIGN
    else:
        offsets = o * tensor.outer * tile.ALIGN + i * tensor.inner * tile.ALIGN
        column = tensor.column
    return RowPtrs(tensor.ptr, offsets, column)


@triton.jit
def _program_rows(logits, block, I, tile):
    """Returns the block-th block of rows: outer index, inner indices [ROWS], their mask, and the RowPtrs of the logits."""
    if tile.PIXELS:
        I = I * tile.ALIGN
    if tile.FLAT:
        o = tl.zeros((), tl.int64)
    else:
        row_blocks = tl.cdiv(I, tile.ROWS)
        o = (block // row_blocks).to(tl.int64)
        block = block % row_blocks
    i = (block * tile.ROWS + tl.arange(0, tile.ROWS)).to(tl.int64)
    if tile.ROWS > 1:
        mask = i < I
    else:
        mask = tl.full((1,), 1, tl.int1)  # one program for each row
    return o, i, mask, _locate(logits, o, i, tile)


@triton.jit
def _row_numbers(o, i, I, tile):
    """Returns r = o*I + i [ROWS]."""
    if tile.PIXELS:
        I = I * tile.ALIGN
    return o * I + i


@triton.jit
def _prologue_len(row_ptrs, tile):
    """Returns the number of elements before each row's first 16-byte-aligned address [ROWS]."""
    if tile.VECTOR > 1:
        VECTOR: tl.constexpr = tile.VECTOR.value
        BITS: tl.constexpr = row_ptrs.ptr.dtype.element_ty.primitive_bitwidth  # Triton 3.3 divides constexprs alone
        first = row_ptrs.ptr.to(tl.int64) // (BITS // 8) + row_ptrs.offsets
        prologue = ((VECTOR - first % VECTOR) % VECTOR).to(tl.int32)
    else:
        prologue = row_ptrs.offsets.to(tl.int32) * 0
    return prologue


@triton.jit
def _tile_cols(rows, first, tile):
    """Returns a tile's columns, their mask, which all rows share unless they have edges, and that mask with the rows' own."""
    C: tl.constexpr = tile.C.value
    VECTOR: tl.constexpr = tile.VECTOR.value
    if first is None:
        lane = tl.arange(0, 2 * VECTOR)[None, :]
        epilogue = rows.prologue + tl.maximum(C - rows.prologue, 0) // VECTOR * VECTOR
        cols = tl.where(lane < VECTOR, lane, epilogue[:, None] + lane - VECTOR)
        mask = rows.mask[:, None] & ((cols < C) & ((lane >= VECTOR) | (lane < rows.prologue[:, None])))
        col_mask = mask
    else:
        cols = (first + tl.arange(0, tile.BLOCK_C))[None, :]
        if VECTOR > 1:
            # compared with a multiple of VECTOR, which keeps the mask constant over each vector
            col_mask = cols < (tl.maximum(C - rows.prologue, 0) // VECTOR * VECTOR)[:, None]
        else:
            col_mask = cols < C
        mask = rows.mask[:, None] & col_mask
    return cols, col_mask, mask


@triton.jit
def _col_count(rows, first, tile, DTYPE: tl.constexpr):
    """Returns the number of a tile's columns that are not masked, in a row that is not [ROWS]."""
    C: tl.constexpr = tile.C.value
    inner = rows.prologue * 0 + C  # between prologue and epilogue
    if tile.VECTOR > 1:
        inner = tl.maximum(C - rows.prologue, 0) // tile.VECTOR * tile.VECTOR
    if first is None:
        count = C - inner
    else:
        count = tl.minimum(tl.maximum(inner - first, 0), tile.BLOCK_C)
    return count.to(DTYPE)


@triton.jit
def _class_cols(classes, rows, first, tile):
    """Returns the columns that hold these classes, [ROWS, 1] or a scalar."""
    if tile.VECTOR > 1:  # noqa: SIM102 (Triton 3.3 has no `and` for these)
        if first is not None:
            classes = classes - rows.prologue[:, None]
    return classes


@triton.jit
def _of_class(classes, cols, rows, first, tile):
    """Returns which elements of a tile are of these classes [ROWS, 1]. Columns of a long tile are compared in runs: the compiler
    then forms one number a run, and not one an element, and does not pack the results of many comparisons into bits."""
    classes = _class_cols(classes, rows, first, tile)
    if first is None:  # noqa: SIM114 (Triton 3.3 has no `or` for these)
        found = cols == classes
    elif tile.PIXELS or tile.BLOCK_C < COMPARED_RUN or tile.BLOCK_C > MOST_COMPARED:
        found = cols == classes
    else:
        in_run = classes - (first + tl.arange(0, tile.BLOCK_C // COMPARED_RUN) * COMPARED_RUN)[None, :]
        found = tl.reshape(in_run[:, :, None] == tl.arange(0, COMPARED_RUN)[None, None, :], (tile.ROWS, tile.BLOCK_C))
    return found


@triton.jit
def _tile_ptrs(row_ptrs, rows, first, tile, ALIGNED: tl.constexpr = True):
    """Returns pointers to a tile's elements. Not ALIGNED: rows whose prologues are others than those of `rows`."""
    if first is None:
        cols, _, _ = _tile_cols(rows, first, tile)
        ptrs = row_ptrs.ptr + row_ptrs.offsets[:, None] + cols
    else:
        cols = (first + tl.arange(0, tile.BLOCK_C)).to(tl.int64)[None, :]
        if tile.VECTOR > 1:
            starts = row_ptrs.offsets + rows.prologue
            if ALIGNED:
                ptrs = tl.multiple_of(row_ptrs.ptr + starts, 16)[:, None] + cols
            else:
                ptrs = row_ptrs.ptr + starts[:, None] + cols
        else:
            ptrs = row_ptrs.ptr + row_ptrs.offsets[:, None] + cols * row_ptrs.column
    return ptrs


@triton.jit
def _load_tile(row_ptrs, rows, first, tile, other, DTYPE: tl.constexpr):
    """Loads a tile, with `other` where it is masked."""
    _, _, mask = _tile_cols(rows, first, tile)
    return tl.load(_tile_ptrs(row_ptrs, rows, first, tile), mask=mask, other=other).to(DTYPE)


@triton.jit
def _exp_tile(z_rows, row_max, rows, first, tile):
    """Returns exp(z - max) of a tile."""
    DTYPE: tl.constexpr = row_max.dtype
    return exp(_load_tile(z_rows, rows, first, tile, 0, DTYPE) - row_max[:, None])


@triton.jit
def _store_tile(row_ptrs, value, rows, first, tile):
    """Stores a tile."""
    _, _, mask = _tile_cols(rows, first, tile)
    tl.store(_tile_ptrs(row_ptrs, rows, first, tile), value.to(row_ptrs.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_class_weight(class_weight_ptr, mask, rows, first, tile, DTYPE: tl.constexpr):
    """Returns the class weights (None: 1) of a tile's columns, 0 where masked."""
    if class_weight_ptr is not None:
        cols, _, _ = _tile_cols(rows, first, tile)
        if tile.VECTOR > 1:  # noqa: SIM102 (Triton 3.3 has no `and` for these)
            if first is not None:
                cols = cols + rows.prologue[:, None]
        # explicit broadcast: Triton 3.3 does not broadcast pointers to the mask
        w = tl.load(tl.broadcast_to(class_weight_ptr + cols, mask.shape), mask=mask, other=0).to(DTYPE)
        # redundant after a masked load, but Triton's thread-locality pass fails on a sum taken directly of a load
        w = tl.where(mask, w, 0)
    else:
        w = mask.to(DTYPE)
    return w


@triton.jit
def _load_grad_output(grad_output_ptr, r, stride, mask, GRAD_CACHED: tl.constexpr, DTYPE: tl.constexpr):
    """Returns grad_output (None: 1) of rows r [ROWS], and whether this program must write: not if the gradient is cached and
    every grad_output of its rows is 1."""
    if grad_output_ptr is not None:
        grad_output = tl.load(grad_output_ptr + r * stride, mask=mask, other=1).to(DTYPE)
    else:
        grad_output = tl.full(mask.shape, 1, DTYPE)
    if GRAD_CACHED:
        must_write = tl.max((grad_output != 1).to(tl.int32), 0)
    else:
        must_write = 1
    return grad_output, must_write


@triton.jit
def _backward_rows(logits, denominator, grad_output_ptr, I, stride, GRAD_CACHED: tl.constexpr, tile, DTYPE: tl.constexpr):
    """Opens a backward program: returns its rows as o, i, r, their mask and the RowPtrs of the logits; the factor of their
    gradient, grad_output over the denominator; and whether the program must write that gradient."""
    tiles: tl.constexpr = (tile.C + tile.BLOCK_C - 1) // tile.BLOCK_C
    o, i, row_mask, z_rows = _program_rows(logits, tl.program_id(0) // tiles, I, tile)
    r = _row_numbers(o, i, I, tile)
    grad_output, must_write = _load_grad_output(grad_output_ptr, r, stride, row_mask, GRAD_CACHED, DTYPE)
    return o, i, r, row_mask, z_rows, (grad_output / denominator.to(DTYPE))[:, None], must_write


@triton.jit
def _empty_sums(ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the Sums over no classes."""
    zeros = tl.zeros((ROWS,), DTYPE)
    return Sums(tl.full((ROWS,), float("-inf"), DTYPE), zeros, zeros, zeros)


@triton.jit
def _add_to_sums(sums, z, u, count, mask, WEIGHTED: tl.constexpr):
    """Returns the sums with a tile z [ROWS, BLOCK_C] of logits added, and exp(z - max). If WEIGHTED its weights u, or None where
    each is 1, are added too, or their `count` [ROWS]."""
    row_max = tl.maximum(sums.row_max, tl.max(z, 1))
    # a maximum of -inf, where every class so far is masked, counts as 0: -inf - -inf would be NaN
    shift = tl.where(row_max == float("-inf"), 0, row_max)
    old_shift = tl.where(sums.row_max == float("-inf"), 0, sums.row_max)
    d = z - shift[:, None]
    e = exp(d)
    exp_sum = sums.exp_sum * exp(sums.row_max - shift) + tl.sum(e, 1)
    weight_sum = sums.weight_sum
    scaled_logit_sum = sums.scaled_logit_sum
    if WEIGHTED:
        scaled_logit_sum += times(weight_sum, shift - old_shift)
        if u is None:
            scaled_logit_sum -= tl.sum(tl.where(mask, d, 0), 1)
            weight_sum += count
        else:
            scaled_logit_sum -= tl.sum(tl.where(mask & (u != 0), u * d, 0), 1)
            weight_sum += tl.sum(u, 1)
    return Sums(row_max, exp_sum, weight_sum, scaled_logit_sum), e


class View:
    """Logits, or a tensor of their shape, as [O, C, I] without a copy where the layout allows."""

    def __init__(self, t: torch.Tensor):
        t = t.resolve_neg()
        known = _view_of(t.shape, t.stride())
        if known is None:
            t = t.contiguous()
            known = _view_of(t.shape, t.stride())
        self.tensor = t
        self.C, self.flat, self.O, self.I, self.rows, self.strides = known


@functools.lru_cache(maxsize=1024)
def _view_of(shape, strides):
    """(C, whether there is one outer index, O, I, rows, strides of outer, class, inner) of a tensor, or None where inner dimensions do not
    follow one stride."""
    C = shape[1]
    if len(shape) == 2:
        return C, True, 1, shape[0], shape[0], (0, strides[1] if C > 1 else 1, strides[0])
    inner = [(size, stride) for size, stride in zip(shape[2:], strides[2:], strict=True) if size != 1]
    if 0 not in shape and any(outer != size * stride for (_, outer), (size, stride) in zip(inner, inner[1:], strict=False)):
        return None
    I = math.prod(shape[2:])
    return C, False, shape[0], I, shape[0] * I, (strides[0], strides[1] if C > 1 else 1, inner[-1][1] if inner else 1)


class Layout:
    """How programs walk over tensors of one shape, with C classes. `strides` of each tensor and, for pixels, `I` are in units
    of `align`: those of outer and inner, for pixels of outer and class. `flat`: one outer index. `vector`: elements of a vector, 1 where rows are
    aligned or accessed by element. `wide`: accesses are of 16 bytes."""

    def __init__(self, C, align, flat, pixels, vector, wide, I, strides):
        self.C, self.align, self.flat, self.pixels, self.vector, self.wide = C, align, flat, pixels, vector, wide
        self.I, self.strides = I, strides

    def strided(self, n: int, view: View) -> Strided:
        """The n-th tensor of this layout as kernels take it."""
        return Strided(view.tensor, *self.strides[n])

    def tile(self, rows: int, columns: int) -> Tile:
        """The tile of so many rows and columns as kernels take it."""
        return Tile(*constants(self.C, self.align, self.flat, self.pixels, self.vector, rows, columns))


def shared_layout(*views: View) -> Layout:
    """The layout of views of one shape, the logits first."""
    first = views[0]
    tensors = [(view.strides, view.tensor.element_size(), view.tensor.data_ptr() % 128) for view in views]
    return _shared_layout(first.C, first.flat, first.I, WINDOW_BYTES, *tensors)


@functools.lru_cache(maxsize=1024)
def _shared_layout(C, flat, I, window_bytes, *tensors):
    pixels = all(c != 1 and i == 1 for (_, c, i), _, _ in tensors)
    if pixels:
        align = common_alignment(I, *[stride for (o, c, _), _, _ in tensors for stride in (o, c)])
        strides = [(o // align, c // align, i) for (o, c, i), _, _ in tensors]
        return Layout(C, align, flat, True, 1, True, I // align, strides)
    align = common_alignment(*[stride for (o, _, i), _, _ in tensors for stride in (o, i)])
    strides = [(o // align, c, i // align) for (o, c, i), _, _ in tensors]
    dense = all(c == 1 for (_, c, _), _, _ in tensors)
    aligned = dense and all(align * size % 16 == 0 and address % 16 == 0 for _, size, address in tensors)
    (o, _, i), itemsize, address = tensors[0]
    vector = 16 // min(size for _, size, _ in tensors)
    together = dense and all(  # the rows of all tensors have prologues of equally many elements
        (other - n) % vector == 0
        for (o2, _, i2), size, address2 in tensors
        for n, other in ((o, o2), (i, i2), (address // itemsize, address2 // size))
    )
    if aligned or not together or C * itemsize < window_bytes or vector == 2:  # words of 8 bytes are wide enough
        vector = 1
    return Layout(C, align, flat, False, vector, aligned or vector > 1, I, strides)


def backward_outputs(view, target, cached_grad, need):
    """(dlogits or None, dtarget or None, the layout of logits and target with them, both gradients as kernels take them)."""
    need_dlogits, need_dtarget = need
    dlogits = torch.empty_like(view.tensor) if need_dlogits and cached_grad is None else cached_grad
    dtarget = torch.empty_like(target.tensor) if need_dtarget else None
    # a gradient that is not needed has the layout of what it would be the gradient to
    dz, dt = view if dlogits is None else View(dlogits), target if dtarget is None else View(dtarget)
    layout = shared_layout(view, target, dz, dt)
    gradients = Gradients(layout.strided(2, dz) if need_dlogits else None, layout.strided(3, dt) if need_dtarget else None)
    return dlogits, dtarget, layout, gradients
