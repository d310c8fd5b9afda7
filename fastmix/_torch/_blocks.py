"""How rows are cut on the CPU, so that a block and its temporaries stay in the cache; elsewhere a batch is one block."""

import math

import torch

from . import sizes


def row_blocks(rows: int, row_bytes: int, device: torch.device, block_bytes: int):
    """Slices of rows, in blocks of so many bytes on the CPU; one slice on another device."""
    step = rows if device.type != "cpu" else max(1, block_bytes // max(row_bytes, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1))]


def parts_of_row(t, itemsize):
    """Indices [..., slice, ...] that cut rows of t beyond a block's bytes along their longest dimension; one of all of it for
    others."""
    row_bytes = math.prod(t.shape[1:]) * itemsize
    if row_bytes <= sizes.MIX_BLOCK_BYTES or t.dim() == 1 or not t.is_cpu:
        return [(slice(None),)]
    d = max(range(1, t.dim()), key=lambda d: t.shape[d])
    step = max(1, t.shape[d] * sizes.MIX_BLOCK_BYTES // row_bytes)
    return [(slice(None),) * d + (slice(start, start + step),) for start in range(0, t.shape[d], step)]


def box_within(part, box, shape):
    """Boxes as they lie in this part of the rows."""
    d = len(part) - 1
    dims = 0 if box is None else box.shape[1] // 2
    k = d - (len(shape) - dims)  # of the box's dimensions
    if d == 0 or k < 0:
        return box
    shift = torch.zeros(2 * dims, dtype=box.dtype)
    shift[k] = shift[dims + k] = part[d].start
    return box.clamp(min=0) - shift


# Mixing


def memory_order(t):
    """The dimensions of t, the first one first, the others as they follow in memory; None if that is as they are."""
    if t.is_contiguous():
        return None
    return [0, *sorted(range(1, t.dim()), key=t.stride, reverse=True)]
