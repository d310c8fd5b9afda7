"""What all kernels and launchers share: the device guard, the launch options, alignment, and all tile sizes."""

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl

# Set explicitly: Triton 3.9 warns if FMA is left to its default. No result relies on them.
OPTIONS = {"enable_fp_fusion": True}
# Of mixing: only what is written as tl.fma is contracted. Left to itself the compiler contracts lam*x + (1-lam)*y to one fma in
# one specialisation and to the other in the next, and the same rows stored in another layout get other bits.
MIX_OPTIONS = {"enable_fp_fusion": False}


def registers(most: int):
    """Options of a launch whose threads may have so many registers on NVIDIA, where ptxas otherwise aims at more programs a multiprocessor
    and spills for it."""
    return OPTIONS if torch.version.hip else {**OPTIONS, "maxnreg": most}


# Of losses whose tiles are looped over.
LOOPED_OPTIONS = registers(128)

_NO_GUARD = contextlib.nullcontext()


def on_device_of(tensor):
    """Makes the tensor's device current for a launch. Does nothing on the current device and on the CPU (the interpreter)."""
    index = tensor.get_device()
    return _NO_GUARD if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


@functools.lru_cache(maxsize=None, typed=True)
def constant(value):
    """A value as a compile-time field of a NamedTuple: Triton would take an int or a bool for a run-time one. None, which is
    compile-time already, stays None. The same object each time, because Triton looks up a launch by its fields, and comparing
    equal ones takes 0.5 us a field."""
    return None if value is None else tl.constexpr(value)


@functools.lru_cache(maxsize=1024, typed=True)
def constants(*values):
    """Several values as compile-time fields."""
    return tuple(map(constant, values))


@triton.jit
def times(a, b):
    """a*b, and 0 where a is 0 even if b is inf or NaN."""
    return tl.where(a == 0, 0, a * b)


@triton.jit
def exp(x):
    """exp(x). In float32 a result below 2**-126 may be 0: without that, `tl.exp` takes three instructions more."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        y = tl.exp2(x * 1.4426950408889634)  # 1/log(2)
    return y


@triton.jit
def log(x):
    """log(x), in float32 of numbers that are 0 or at least 2**-126."""
    if x.dtype == tl.float64:
        y = tl.log(x)
    else:
        y = tl.log2(x) * 0.6931471805599453  # log(2)
    return y


def blocks(size: int, block: int) -> int:
    """Number of blocks that cover a size: triton.cdiv without its checks."""
    return -(-size // block)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, float32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def reduced(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    """Reduces row losses that are already divided by a mean's denominator; a mean over nothing is NaN."""
    if reduction == "none":
        return losses
    return losses.sum() if losses.numel() or reduction == "sum" else losses.new_full((), math.nan)


def common_alignment(*sizes: int) -> int:
    """The largest power of two, at most 16, that divides every size. Kernels multiply by it where they form an
    address, so that the compiler may use 16-byte accesses for sizes such as 1000 that 16 does not divide."""
    return math.gcd(16, *sizes)


# Losses

RESIDENT_CLASSES = 32768  # most classes of a row (all operands together) held in registers: 64 for each of 512 threads
UNALIGNED_CLASSES = 24000  # the same where prologues, or addresses of many vectors, take registers
# The same of `long` rows, for 256 threads of 255 registers: what a thread holds besides classes takes half as many registers of the
# multiprocessor then. (Smoothed rows of as many classes spill.)
LONG_CLASSES = 50304
LONG_WARPS = 8
LOOPED_CLASSES = 4096  # of a tile of a row that nothing is summed over
PART_CLASSES = 8192  # of one part of a row whose sums are split over programs
PART_WARPS = 8
DENOMINATOR_ROWS = 512  # of a program that sums up the denominator of a mean, at a time
DENOMINATOR_PROGRAMS = 128  # at most: each program of the loss adds up their sums, four for each thread of a warp
DENOMINATOR_WARPS = 4
ADDED_PROGRAMS = 8192  # whose losses the last of them adds up: for more, a kernel of its own is faster
FEW_COMPONENTS = 4  # of a row, at most: registers hold them, beside up to UNALIGNED_CLASSES classes
FEW_ROWS = 256  # two for each multiprocessor of an H100: fewer rows than that leave some of them idle
TILE_VALUES = 512  # of a tile, at least: a program takes several rows where they are short
WARP_VALUES = 1024  # of a tile, for each warp
PIXEL_WARP_VALUES = 512  # of a tile of pixels
MOST_WARPS = 16

PIXEL_VALUES = 8192  # of a tile of pixels and all their classes
LEAST_PIXELS = 16

BINARY_PIXEL_CLASSES = 256  # of the sigmoid loss in a tile of pixels: each tile reads its pixels' labels anew
BINARY_COMPONENTS = 4  # whose weights' gradient is formed at a time: their class indices are one sector of 32 bytes

SET_REGISTERS = 256, 80  # of a thread, for float32 and float64 values: 3*sets + classes*(4*sets + 3) of them are needed
SET_WARPS = 8  # at most: more warps would leave a thread fewer registers than that
SET_THREAD_CLASSES = 16  # of a thread, where that is enough: 16 bytes of bfloat16


def are_few(rows: int) -> bool:
    """Whether rows are so few that programs share the long ones."""
    return rows < FEW_ROWS


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
    long: bool = False,
):
    """(rows, classes, warps) of the tile of each operand that a loss program holds in registers.

    A `whole` row is held, and so read once, if its values (of all operands) fit 512 threads of 128 registers: 64 a thread, 47
    where rows have prologues or vectors have 4 values, 32 where those are smoothed too. A `long` one of 16-bit values without a
    prologue is held by 256 threads. A still longer row is looped over in tiles, and so is any row that nothing is summed
    over. Rows that are accessed element by element take more registers: they are held up to 32 KB. Where pixels are contiguous, and
    not classes, a tile takes some pixels with all their classes. The registers and spills that result on NVIDIA are limits in
    bench/costs.json; AMD has registers to spare."""
    columns = triton.next_power_of_2(classes)
    if pixels:
        values = PIXEL_VALUES // max(dtype.itemsize // 4, 1)
        rows, columns = (64, 32) if columns * LEAST_PIXELS > values else (min(values // columns, 128), columns)
        return rows, columns, min(max(rows * columns * operands // PIXEL_WARP_VALUES, 1), MOST_WARPS)
    if dtype.itemsize == 8:
        most = RESIDENT_CLASSES // 4
    elif not wide:
        most = RESIDENT_CLASSES // dtype.itemsize
    else:
        most = UNALIGNED_CLASSES if dtype.itemsize == 4 or vector > 1 else RESIDENT_CLASSES
        most = RESIDENT_CLASSES // 2 if dtype.itemsize == 4 and smoothing else most
    if long and wide and vector == 1 and dtype.itemsize == 2 and most < classes <= LONG_CLASSES:
        return 1, columns, LONG_WARPS
    if not whole:
        columns = min(columns, LOOPED_CLASSES)
    elif classes * operands > most:
        tight = vector > 1 and dtype.itemsize != 4
        columns = RESIDENT_CLASSES // dtype.itemsize // operands // (2 if tight else 1)
    rows = max(1, TILE_VALUES // columns)
    return rows, columns, min(max(rows * columns * operands // WARP_VALUES, 1), MOST_WARPS)


def class_parts(rows: int, classes: int, columns: int, pixels: bool) -> int:
    """Number of programs that the sums over a row's classes are split over; 0 for one program a row, because its tile of so
    many columns holds the row or because there are rows enough. The size of a part, and so what is compiled, does not depend
    on the number of rows. The gradient is then formed tile by tile: both ways read the logits twice."""
    return blocks(classes, PART_CLASSES) if are_few(rows) and classes > columns and not pixels else 0


def binary_tile(classes: int, pixels: bool, wide: bool, vector: int, dtype: torch.dtype):
    """(rows, classes, warps) of the sigmoid loss's tile. Nothing is summed over a row, and float64 takes twice the registers."""
    double = dtype == torch.float64
    classes = min(classes, BINARY_PIXEL_CLASSES) if pixels else classes
    rows, columns, warps = class_tile(classes, pixels, wide, vector, dtype, operands=2 if double else 1, whole=False)
    if double:
        rows, columns, warps = rows // 2 if pixels else rows, min(columns, 2048), min(warps, 8)
    return rows, columns, max(warps // 2, 1) if pixels else warps


@functools.lru_cache(maxsize=1024)
def set_tile(classes: int, sets: int, itemsize: int, whole: bool):
    """(rows, classes, warps, whether the tile holds rows) of js_divergence's tile of each set. A `whole` row is held where
    registers take it; a longer one is looped over, and so is any row that nothing is summed over."""
    most = max((SET_REGISTERS[itemsize == 8] - 3 * sets) // (4 * sets + 3), 1)
    most = 1 << (most.bit_length() - 1)  # classes of a thread: a power of two
    columns, longest = triton.next_power_of_2(classes), 32 * SET_WARPS * most
    resident = columns <= longest
    if not (resident and whole):
        columns = min(columns, longest // 2)
    rows = max(1, min(TILE_VALUES, longest) // columns)
    return rows, columns, min(max(rows * columns // (32 * min(most, SET_THREAD_CLASSES)), 1), SET_WARPS), resident


# Mixing

ROW_TILE_BYTES = 8192  # of one operand: 64 bytes, or four 16-byte accesses, for each of 128 threads
ROW_TILE_ELEMENTS = 1024  # at least: a program takes several rows where they are short
MIX_WARPS = 4
CELL_WARPS = 8  # of the gradient to images under cells, whose weights take registers

COUNTED_ROWS = 4096  # at most, whose partners are counted to find the inverse: every row is compared with every other
COUNTED_BLOCK, COUNTED_CHUNK, COUNTED_WARPS = 32, 64, 4  # rows of a program, and how many it compares them with at a time

CELL_RUN_ELEMENTS = 1024  # at most, of consecutive elements of one cell, in a tile of the gradient of a mask
CELL_ROW_ELEMENTS = 512  # of neighbouring cells in such a tile
CELL_TILES = 8  # at most, that a program adds up: more would leave fewer programs, fewer would leave more partial sums

IMAGE_CHANNELS = 4  # that a program takes at once where they lie behind the pixels
IMAGE_PIXELS = 1024  # of a program that turns bytes into floats: 16 for each of 64 threads, or 8 bytes for each of 128
IMAGE_WARPS = 4

SOURCES_TILE_BYTES = 32768  # of all sources of a convex combination together, so that they fit the registers of 128 threads
SOURCE_TILE_BYTES = 2048, 8192  # of one source, at least (a 16-byte access for each of 128 threads) and at most
SOURCE_TILE_ELEMENTS = 512  # of one source, at least: a program takes several rows where they are short


def row_tile(numel: int, itemsize: int, cells: bool) -> tuple[int, int]:
    """(rows, elements of each) of a tile of rows of so many elements. Under a mask of cells it is half as large: the weights and
    the places of groups take registers."""
    block = (ROW_TILE_BYTES // 2 if cells else ROW_TILE_BYTES) // itemsize
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


# What the cut weighs

MAP_VALUES = 2048  # of a tile of a saliency map, where a line of each block is not longer
BORDER_VALUES = 1024  # of a tile of pixels at borders, where a neighbourhood of each block is not longer
BORDER_WARP_VALUES = 128  # 4 of a thread: with 8, four means of neighbourhoods at a time spill on Triton 3.3


def costs_tile(n: int, height: int, width: int, w: int) -> tuple[int, int, int, int]:
    """(cells, lines of each block's map, neighbourhoods along its border, warps) of a tile of n x n blocks of height x width pixels, in
    neighbourhoods of w columns."""
    cells, width, w = max(4, triton.next_power_of_2(n * n)), triton.next_power_of_2(width), triton.next_power_of_2(w)
    lines = max(1, min(triton.next_power_of_2(height), MAP_VALUES // (cells * width)))
    parts = max(1, min(triton.next_power_of_2(max(height, width)), BORDER_VALUES // (cells * w)))
    return cells, lines, parts, min(max(cells * parts * w // BORDER_WARP_VALUES, 4), MOST_WARPS)


# The minimum cut of a grid of cells


def cut_tile(n: int, levels: int) -> tuple[int, int]:
    """(cells of a tile, warps) of grids of n x n cells. All binaries and duals of a cell are one thread's, one or two cells: with four
    labels a cell has 32 duals, and with three 8."""
    block = max(32, triton.next_power_of_2(n * n))
    return block, max(1, block // (32 if levels == 4 else 64))


# Moving blocks


def masks_tile(m: int) -> tuple[int, int]:
    """(blocks of a tile, warps) of masks of m x m blocks."""
    block = triton.next_power_of_2(m * m)
    return block, min(max(block // 256, 1), 8)


def transport_tile(n: int) -> tuple[int, int]:
    """(sources of a tile, warps) of n x n blocks: one source a thread to 256 of them, then 4 to 16. With two a thread ptxas spills."""
    block = max(32, triton.next_power_of_2(n * n))
    return block, block // 32 if block <= 256 else max(4, block // 512)


# Sampling

DRAWN_ROWS = 16  # of a program: many multiprocessors share a batch, since float64 is slow on most GPUs
KEYS = 128  # that are compared with a program's rows at a time
COUNTING_WARPS = 8  # eight pairs of keys a thread: with sixteen some programs spill
DRAW_WARPS = 4
CELLS = 256  # of a mask, at a time
KEYED_ROWS = 256  # of a program that forms keys, or targets
NUMBERED_ITEMS = 256  # of a program that draws numbers: two blocks of words a thread
WAYS_LANES = 32  # Dirichlet weights of a program: with more warps it spills
WAYS_WARPS = 1
