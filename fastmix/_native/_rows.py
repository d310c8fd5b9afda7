"""How C sees a batch: rows whose elements lie side by side, in the same order in every tensor of a call. What is stored in another
way is copied."""

import ctypes
import functools
import math

import torch

from .library import array_address, new


def is_dense(t):
    """Whether the elements of each row of t lie side by side, in any order of the dimensions; how far rows are apart is not asked."""
    if t.is_contiguous():
        return True
    reach = 1
    for stride, size in sorted(zip(t.stride()[1:], t.shape[1:], strict=True)):
        if size != 1:
            if stride != reach:
                return False
            reach *= size
    return True


def order(t):
    """Returns the strides that say how the elements of a row are ordered."""
    return [stride for stride, size in zip(t.stride()[1:], t.shape[1:], strict=True) if size != 1]


def result_like(x):
    """Returns new memory in the layout of x, and in a layout that C can write: the same tensor, where x's is one."""
    out = new(torch.empty_like(x))
    return out, writable(out)


def writable(out):
    """Returns `out`, or new memory in its place where C cannot write to it."""
    return out if is_dense(out) and not out.is_neg() else torch.empty(out.shape, dtype=out.dtype, device="cpu")


def gradient_memory(grad_output, x, strides, need):
    """Returns (dx in these strides, the memory that C writes in its place, the layout of the call); None, None if dx is not needed."""
    if not need:
        return None, None, writable(torch.empty_like(x, device="meta"))
    dx = new(grad_output.new_empty_strided(grad_output.shape, strides))
    made = writable(dx)
    return dx, made, made


def as_stored(t, like):
    """Returns t with its rows' elements in the order of `like`: t itself, or a copy."""
    if t.is_neg() or not (t.is_contiguous() and like.is_contiguous()) and (not is_dense(t) or order(t) != order(like)):
        copy = torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device="cpu")
        return copy.copy_(t.resolve_neg())
    return t


def boxes_of(box, like):
    """Returns the addresses of the boxes and of how their dimensions lie in a row, as rows.h reads it; and what the second points to."""
    found = _geometry(box.shape[1] // 2, like.shape[1:], like.stride()[1:])
    return (box.data_ptr(), array_address(found)), found


@functools.lru_cache(maxsize=256)
def _geometry(dims, shape, strides):
    row = math.prod(shape)
    sides = zip(shape[len(shape) - dims :], strides[len(shape) - dims :], range(dims), strict=True)
    found = [(stride if size > 1 else row, size, d) for size, stride, d in sides]
    flat = [dims, *(number for dimension in sorted(found, reverse=True) for number in dimension)]
    return (ctypes.c_int64 * len(flat))(*flat)
