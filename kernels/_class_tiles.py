"""Rows of logits, or of a tensor of their shape, as [O, C, I]: how they are stored, and the tiles that programs take of them.

Row r = o*I + i. Where classes are next to each other a row that starts off a 16-byte boundary is taken in three parts: what
lies before its first boundary, whole vectors of 16 bytes, and what is left. The vectors are a tile with a mask that is constant
over each; the two ends together are a small tile of their own, element by element, so that nothing of a neighbour is ever
touched. Where pixels are (class_stride != 1) a tile takes pixels 16 bytes at a time and many classes.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ._launch import common_alignment

WINDOW_BYTES = 1024  # a row of fewer is taken by element: its ends would be a large part of it


@triton.jit
def _rows(pid, I, z_o, z_i, ALIGN: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr):
    """Outer index of the pid-th block of rows, inner indices [ROWS], which of them exist, and where their logits start."""
    row_blocks = tl.cdiv(I, ROWS)
    o = (pid // row_blocks).to(tl.int64)
    i = ((pid % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return o, i, i < I, _start(o, i, z_o, z_i, ALIGN, PIXELS)


@triton.jit
def _start(o, i, s_o, s_i, ALIGN: tl.constexpr, PIXELS: tl.constexpr):
    if PIXELS:
        start = o * s_o * ALIGN + i * s_i
    else:
        start = o * s_o * ALIGN + i * s_i * ALIGN
    return start


@triton.jit
def _head(ptr, start, VECTOR: tl.constexpr):
    """How many elements of each row lie before its first boundary."""
    if VECTOR > 1:
        BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth  # Triton 3.3 divides no number that is not a constexpr
        first = ptr.to(tl.int64) // (BITS // 8) + start
        head = ((VECTOR - first % VECTOR) % VECTOR).to(tl.int32)
    else:
        head = start.to(tl.int32) * 0
    return head


@triton.jit
def _lanes(first, head, C: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """(lanes of a tile of whole vectors, which of them are there): a lane's class is head further."""
    lanes = (first + tl.arange(0, BLOCK_C))[None, :]
    if VECTOR > 1:
        within = lanes < (tl.maximum(C - head, 0) // VECTOR * VECTOR)[:, None]
    else:
        within = lanes < C
    return lanes, within


@triton.jit
def _at(ptr, start, head, first, stride, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where that tile is stored."""
    lanes = (first + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    if VECTOR > 1:
        at = tl.multiple_of(ptr + (start + head), 16)[:, None] + lanes
    else:
        at = ptr + start[:, None] + lanes * stride
    return at


@triton.jit
def _ends(head, C: tl.constexpr, VECTOR: tl.constexpr):
    """The same of both ends of the rows: up to VECTOR classes each."""
    lane = tl.arange(0, 2 * VECTOR)[None, :]
    last = head + tl.maximum(C - head, 0) // VECTOR * VECTOR
    cols = tl.where(lane < VECTOR, lane, last[:, None] + lane - VECTOR)
    return cols, (cols < C) & ((lane >= VECTOR) | (lane < head[:, None]))


@triton.jit
def _times(a, b):
    """a*b, where a weight a of 0 means that b is not looked at."""
    return tl.where(a == 0, 0, a * b)


@triton.jit
def _narrowed(value, at):
    """A value as it is stored there. From float64 by way of float32, which not all of the targets can leave out."""
    if value.dtype == tl.float64:  # noqa: SIM102 (Triton 3.3 has no `and` for these)
        if at.dtype.element_ty != tl.float64:
            value = value.to(tl.float32)
    return value.to(at.dtype.element_ty)


@triton.jit
def _online(z, u, live, top, total, mass, gap, MASS: tl.constexpr):
    """One more tile z [ROWS, BLOCK_C], with weights u, for the running max, sum of exp(z - max), sum of u, and
    sum of u*(max - z). A max of -inf (every class so far masked) counts as 0 here."""
    new = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(new == float("-inf"), 0, new)
    old = tl.where(top == float("-inf"), 0, top)
    total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
    if MASS:
        gap += _times(mass, shift - old) + tl.sum(tl.where(live & (u != 0), u * (shift[:, None] - z), 0), 1)
        mass += tl.sum(u, 1)
    return new, total, mass, gap


@triton.jit
def _class_weights(w_ptr, cols, head, within, CLASS_WEIGHT: tl.constexpr, VECTOR: tl.constexpr, DTYPE: tl.constexpr):
    if CLASS_WEIGHT:
        at = w_ptr + (cols + head[:, None] if VECTOR > 1 else cols)
        w = tl.load(tl.broadcast_to(at, within.shape), mask=within, other=0).to(DTYPE)  # Triton 3.3 does not by itself
        w = tl.where(within, w, 0)  # it is: but a sum of what comes straight from a load breaks Triton's thread locality pass
    else:
        w = within.to(DTYPE)
    return w


@triton.jit
def _todo(up, FORMED: tl.constexpr):
    """Whether a backward has anything to form: not where that is FORMED already, for the upstream gradients that there are."""
    if FORMED:
        todo = tl.max((up != 1).to(tl.int32), 0)
    else:
        todo = 1
    return todo


@triton.jit
def _partner(lam_ptr, index_ptr, o, i, live, start, t_o, t_i, lam_n, N, MIXED: tl.constexpr,
             IMAGES: tl.constexpr, ALIGN: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Of MixedRows: the rows' own weight [ROWS], NaN where the partner is out of range, and where their partners' values start;
    stand-ins if not MIXED. IMAGES: rows of one outer index share both."""
    lam, at = live, start
    if MIXED:
        n = o + i * 0 if IMAGES else i
        lam = tl.load(lam_ptr + n * lam_n, mask=live, other=1).to(DTYPE)
        partner = tl.load(index_ptr + n, mask=live, other=0)
        known = (partner >= 0) & (partner < N)
        lam = tl.where(known, lam, float("nan"))
        partner = tl.where(known, partner, 0)
        if IMAGES:
            at = _start(partner, i, t_o, t_i, ALIGN, PIXELS)
        else:
            at = _start(o, partner, t_o, t_i, ALIGN, PIXELS)
    return lam, at


@triton.jit
def _values(t_at, partner_at, lam, inside, MIXED: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of dense targets, or of the values of MixedRows and of their partners', mixed: a weight of 0 is not read."""
    if MIXED:
        t = lam[:, None] * tl.load(t_at, mask=inside & (lam != 0)[:, None], other=0).to(DTYPE)
        t += (1 - lam)[:, None] * tl.load(partner_at, mask=inside & (lam != 1)[:, None], other=0).to(DTYPE)
    else:
        t = tl.load(t_at, mask=inside, other=0).to(DTYPE)
    return t


class View:
    """Logits, or a tensor of their shape, as [O, C, I] without a copy where the layout allows."""

    def __init__(self, t: torch.Tensor):
        t = t.resolve_neg()
        known = _strides_of(t.shape, t.stride())
        if known is None:
            t = t.contiguous()
            known = _strides_of(t.shape, t.stride())
        self.tensor = t
        self.C = t.shape[1]
        self.O, self.I, self.strides = known
        self.rows = self.O * self.I


@functools.lru_cache(maxsize=1024)
def _strides_of(shape, strides):
    """(O, I, strides of outer, class, inner) of a tensor, or None where inner dimensions do not follow one stride."""
    if len(shape) == 2:
        return 1, shape[0], (0, strides[1] if shape[1] > 1 else 1, strides[0])
    inner = [(size, stride) for size, stride in zip(shape[2:], strides[2:], strict=True) if size != 1]
    if 0 not in shape and any(outer != size * stride for (_, outer), (size, stride) in zip(inner, inner[1:], strict=False)):
        return None
    I = math.prod(shape[2:])
    return shape[0], I, (strides[0], strides[1] if shape[1] > 1 else 1, inner[-1][1] if inner else 1)


class Layout:
    """How programs walk over tensors of one shape. `strides` of each and, for pixels, `I` are in units of `align`: those of
    outer and inner, for pixels of outer and class. `vector`: of a window; 1 where rows are aligned, or taken by element.
    `wide`: accesses are of 16 bytes."""

    def __init__(self, align, pixels, vector, wide, I, strides):
        self.align, self.pixels, self.vector, self.wide, self.I, self.strides = align, pixels, vector, wide, I, strides

    @property
    def flat(self):
        return [stride for strides in self.strides for stride in strides]

    @property
    def constants(self):
        return {"ALIGN": self.align, "PIXELS": self.pixels, "VECTOR": self.vector}


def layout(*views: View) -> Layout:
    """The layout of views of one shape, the logits first."""
    first = views[0]
    tensors = [(view.strides, view.tensor.element_size(), view.tensor.data_ptr() % 128) for view in views]
    return _layout(first.C, first.I, WINDOW_BYTES, *tensors)


@functools.lru_cache(maxsize=1024)
def _layout(C, I, window_bytes, *tensors):
    pixels = all(c != 1 and i == 1 for (_, c, i), _, _ in tensors)
    if pixels:
        align = common_alignment(I, *[stride for (o, c, _), _, _ in tensors for stride in (o, c)])
        strides = [(o // align, c // align, i) for (o, c, i), _, _ in tensors]
        return Layout(align, True, 1, True, I // align, strides)
    align = common_alignment(*[stride for (o, _, i), _, _ in tensors for stride in (o, i)])
    strides = [(o // align, c, i // align) for (o, c, i), _, _ in tensors]
    dense = all(c == 1 for (_, c, _), _, _ in tensors)
    aligned = dense and all(align * size % 16 == 0 and address % 16 == 0 for _, size, address in tensors)
    (o, _, i), itemsize, address = tensors[0]
    vector = 16 // min(size for _, size, _ in tensors)
    together = dense and all(  # rows of all start equally many elements before a boundary
        (other - n) % vector == 0
        for (o2, _, i2), size, address2 in tensors
        for n, other in ((o, o2), (i, i2), (address // itemsize, address2 // size))
    )
    if aligned or not together or C * itemsize < window_bytes or vector == 2:  # words of 8 bytes are wide enough
        vector = 1
    return Layout(align, False, vector, aligned or vector > 1, I, strides)


def mixing(lam, index, like):
    """(lam, index, stride of lam) to launch with: of MixedRows, or stand-ins."""
    if lam is None:
        return like, like, 0
    return lam.resolve_neg(), index.contiguous(), lam.stride(0) if lam.dim() else 0
