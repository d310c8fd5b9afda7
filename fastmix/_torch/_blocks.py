"""How rows are cut on the CPU, so that a block and its temporaries stay in the cache. Elsewhere a batch is one block."""

import math

from . import sizes


def row_blocks(rows, row_bytes, device, block_bytes):
    """Returns slices of rows: blocks of at most `block_bytes`, at least a row each, on the CPU; one slice on other devices."""
    step = rows if device.type != "cpu" else max(1, block_bytes // max(row_bytes, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1))]


def row_parts(t, itemsize):
    """Returns indices [..., slice, ...] that cut the rows of t along their longest dimension, where a row exceeds a block."""
    row_bytes = math.prod(t.shape[1:]) * itemsize
    if row_bytes <= sizes.MIX_BLOCK_BYTES or t.dim() == 1 or not t.is_cpu:
        return [(slice(None),)]
    d = max(range(1, t.dim()), key=lambda d: t.shape[d])
    step = max(1, t.shape[d] * sizes.MIX_BLOCK_BYTES // row_bytes)
    return [(slice(None),) * d + (slice(start, start + step),) for start in range(0, t.shape[d], step)]


def class_blocks(z, block_bytes):
    """Returns indices that cut logits [N, C] or [N, C, I] into blocks of rows, in their order; `[...]` for one block."""
    if z.numel() * 4 <= block_bytes or not z.is_cpu:
        return [...]
    N, C, *inner = z.shape
    if not inner or inner[0] * C * 4 <= block_bytes:
        return row_blocks(N, math.prod(z.shape[1:]) * 4, z.device, block_bytes)
    step = max(16, block_bytes // (4 * C))
    return [(slice(n, n + 1), slice(None), slice(i, i + step)) for n in range(N) for i in range(0, inner[0], step)]


def cut(at, *tensors):
    """Returns the block `at` of each tensor; None stays None."""
    return tensors if at is ... else [None if t is None else t[at] for t in tensors]


def memory_order(t):
    """Returns the dimensions of t, the first one first and the others as they follow in memory; None if t is contiguous."""
    if t.is_contiguous():
        return None
    return [0, *sorted(range(1, t.dim()), key=t.stride, reverse=True)]
