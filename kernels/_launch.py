"""What every launcher shares: the device guard, the launch options, alignment, and tile sizes."""

import contextlib
import functools
import math

import torch
import triton

# Fused multiply-adds are chosen, not defaulted to: Triton 3.9 warns otherwise. No result relies on them.
OPTIONS = {"enable_fp_fusion": True}

HELD_BYTES = 65536  # of a row, over all operands, that a loss program keeps in registers; half if it starts unaligned
WALKED_CLASSES = 4096  # of a row that nothing is summed over
TILE_VALUES = 512  # at least: a program takes several rows where they are short
WARP_VALUES = 512
MOST_WARPS = 16

_HERE = contextlib.nullcontext()


def on_device_of(tensor):
    """Makes the tensor's device current for a launch. Nothing to do on the current one, or on the CPU (the interpreter)."""
    index = tensor.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def blocks(size: int, block: int) -> int:
    """How many blocks cover a size; triton.cdiv without its checks."""
    return -(-size // block)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduced(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    """Row losses, already over the divisor of a mean, to the loss; a mean over nothing is NaN."""
    if reduction == "none":
        return losses
    return losses.sum() if losses.numel() or reduction == "sum" else losses.new_full((), math.nan)


def common_alignment(*sizes: int) -> int:
    """The largest power of two, at most 16, that divides every size. Kernels multiply by it where they form an
    address, so that the compiler may use 16-byte accesses for sizes such as 1000 that 16 does not divide."""
    return math.gcd(16, *sizes)


@functools.lru_cache(maxsize=1024)
def class_tile(classes: int, class_stride: int, align: int, dtype: torch.dtype, *, operands: int = 1, whole: bool = True):
    """(rows, classes, warps) of the tile that a loss program holds in registers, of each operand.

    A `whole` row of up to 64 KB (over all operands) is held and so read once; a longer one is walked in tiles, and so is any
    row that nothing is summed over. Rows that start unaligned are accessed element by element, which takes registers: they
    are held up to half that size. Where classes are not contiguous (per-pixel logits) rows are, and a tile takes many rows
    and few classes. 512 threads at most: 64 values and their bookkeeping fit a thread's 128 registers."""
    columns = triton.next_power_of_2(classes)
    if class_stride != 1:
        return 64, min(columns, 16), 8
    held = (HELD_BYTES if align * dtype.itemsize >= 16 else HELD_BYTES // 2) // dtype.itemsize // operands
    if not whole:
        columns = min(columns, WALKED_CLASSES)
    elif columns > held:
        columns = held // 2
    rows = max(1, TILE_VALUES // columns)
    return rows, columns, min(max(rows * columns * operands // WARP_VALUES, 1), MOST_WARPS)
