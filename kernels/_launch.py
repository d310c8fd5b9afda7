"""What every launcher shares: the device guard, the launch options, alignment, and tile sizes."""

import contextlib
import functools
import math

import torch
import triton

# Fused multiply-adds are chosen, not defaulted to: Triton 3.9 warns otherwise. No result relies on them.
OPTIONS = {"enable_fp_fusion": True}

HELD_CLASSES = 32768  # of a row, over all operands, that a loss program keeps in registers, 64 a thread
LOOSE_CLASSES = 24000  # the same where bookkeeping takes registers: ends of rows, addresses of many vectors
PIXEL_VALUES = 8192  # of a tile of pixels and all their classes
LEAST_PIXELS = 16
WALKED_CLASSES = 4096  # of a row that nothing is summed over
PART_CLASSES = 8192  # of a row that is shared out over programs
FEW_ROWS = 256  # two for each multiprocessor of an H100: fewer leave some idle
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
def class_tile(
    classes: int,
    pixels: bool,
    wide: bool,
    vector: int,
    dtype: torch.dtype,
    *,
    operands: int = 1,
    smoothing: bool = False,
    whole: bool = True,
):
    """(rows, classes, warps) of the tile that a loss program holds in registers, of each operand.

    A `whole` row is held, and so read once, if its values (over all operands) fit 512 threads of 128 registers: 64 a thread, 47
    where a row has ends or vectors have 4 values, 32 where those are smoothed too. A longer one is walked in tiles, and so is
    any row that nothing is summed over. Rows that are accessed element by element take more registers: they are held up to 32
    KB. Where pixels are next to each other, not classes, a tile takes some of them with all their classes. What nvcc's
    assembler makes of it is held by bench/costs.json; AMD's registers have room to spare."""
    columns = triton.next_power_of_2(classes)
    if pixels:
        values = PIXEL_VALUES // max(dtype.itemsize // 4, 1)
        rows, columns = (64, 32) if columns * LEAST_PIXELS > values else (min(values // columns, 128), columns)
        return rows, columns, min(max(rows * columns * operands // WARP_VALUES, 1), MOST_WARPS)
    if dtype.itemsize == 8:
        held = HELD_CLASSES // 4
    elif not wide:
        held = HELD_CLASSES // dtype.itemsize
    else:
        held = LOOSE_CLASSES if dtype.itemsize == 4 or vector > 1 else HELD_CLASSES
        held = HELD_CLASSES // 2 if dtype.itemsize == 4 and smoothing else held
    if not whole:
        columns = min(columns, WALKED_CLASSES)
    elif classes * operands > held:
        tight = vector > 1 and dtype.itemsize != 4
        columns = HELD_CLASSES // dtype.itemsize // operands // (2 if tight else 1)
    rows = max(1, TILE_VALUES // columns)
    return rows, columns, min(max(rows * columns * operands // WARP_VALUES, 1), MOST_WARPS)


def class_parts(rows: int, classes: int, columns: int, pixels: bool) -> int:
    """In how many parts the sum over the classes of a row is formed, by as many programs: 0 where one program takes the row,
    because its tile of so many columns holds it or because there are rows enough. A part, and so what is compiled, does not
    depend on how many rows there are, and the gradient is formed tile by tile: both ways read the logits twice."""
    return 0 if pixels or classes <= columns or rows >= FEW_ROWS else blocks(classes, PART_CLASSES)


# Mixing

ROW_TILE_BYTES = 8192  # of one operand: 64 bytes, or four 16-byte accesses, for each of 128 threads
ROW_TILE_ELEMENTS = 1024  # at least: a program takes several rows where they are short
MIX_WARPS = 4

CHAIN_ROWS = 8  # rows that a program of mix_chain walks: 9 are read, or 8 in pairs
CHAIN_PROGRAMS = 528  # at least, to keep a large GPU busy: four on each of 132 multiprocessors
CHAIN_WARPS = 8  # the backward holds eight tiles: with 4 warps it spills, and in float64 with 8

CELL_RUN_ELEMENTS = 1024  # at most, of consecutive elements of one cell, in a tile of the gradient of a mask
CELL_ROW_ELEMENTS = 512  # of neighbouring cells in such a tile
CELL_TILES = 8  # at most, that a program adds up: more would leave fewer programs, fewer would leave more partial sums

SOURCES_TILE_BYTES = 32768  # of all sources of a convex combination together, so that they fit the registers of 128 threads
SOURCE_TILE_BYTES = 2048, 8192  # of one source, at least (a 16-byte access for each of 128 threads) and at most
SOURCE_TILE_ELEMENTS = 512  # of one source, at least: a program takes several rows where they are short


def row_tile(numel: int, itemsize: int, coordinates: bool) -> tuple[int, int]:
    """(rows, elements of each) of a tile of rows of so many elements. Coordinates, for a box or a mask, take registers: with
    them the tile is half as large."""
    block = (ROW_TILE_BYTES // 2 if coordinates else ROW_TILE_BYTES) // itemsize
    block = min(block, triton.next_power_of_2(max(numel, 1)))
    return max(1, ROW_TILE_ELEMENTS // block), block


@functools.lru_cache(maxsize=1024)
def source_tile(numel: int, itemsize: int, count: int) -> tuple[int, int]:
    """(rows, elements of each) of a tile of each source of a convex combination of so many."""
    least, most = SOURCE_TILE_BYTES
    tile_bytes = max(least, min(most, SOURCES_TILE_BYTES // triton.next_power_of_2(count)))
    block = min(tile_bytes // itemsize, triton.next_power_of_2(max(numel, 1)))
    return max(1, SOURCE_TILE_ELEMENTS // block), block


def cell_tile(run: int, runs: int, cells: int, all_cells: int, itemsize: int) -> tuple[int, int, int]:
    """(runs, cells, elements of a run) of a tile of the gradient of a mask: of cells of so many runs of so many consecutive
    elements, so many of them neighbours in memory."""
    most = ROW_TILE_BYTES // max(itemsize, 4)
    tile_run = min(triton.next_power_of_2(run), CELL_RUN_ELEMENTS, most)
    tile_cells = min(triton.next_power_of_2(cells), max(1, CELL_ROW_ELEMENTS // tile_run))
    tile_runs = min(triton.next_power_of_2(runs * blocks(run, tile_run)), most // (tile_run * tile_cells))
    tile_cells = min(triton.next_power_of_2(all_cells), most // (tile_run * tile_runs))
    return tile_runs, tile_cells, tile_run
