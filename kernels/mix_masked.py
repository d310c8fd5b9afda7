"""Mixing by a mask of cells, with the blocks of either row moved: kernels and their launchers.

    out[i, pixel] = m*x[i, own] + (1-m)*x[index[i], other]       m = mask[i, cell], cell the one that the pixel lies in
    own, other    = the pixel's place in block plan[i, cell] and in block partner_plan[i, cell]; without a plan the pixel itself

    dx[i, own]          += m * grad_output[i, pixel],  dx[index[i], other] += (1-m) * grad_output[i, pixel]
    dmask[i, cell]       = sum over its pixels of grad_output[i, pixel] * (x[i, own] - x[index[i], other])

x [N, ..., H, W] in any dtype, mask [N, h, w] and the arithmetic in float32 (float64 for float64), index [N], plans [N, h*w].
Rows are read in memory order and programs numbered rows first, as in _row_layout.py. A tile is [rows, groups, V]: V elements
make an access of up to 16 bytes. Where no group straddles two cells (WHOLE), weights and moves are worked out once a group; a
plan makes V so. Elsewhere each element has its own weight, and a group is loaded if one of its elements has weight.
Memory floor: forward reads x and the mask and writes out; the gradient to x reads grad_output and the mask and writes dx; the
gradient to the mask reads grad_output and x and writes a number a cell.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import MIX_OPTIONS, blocks, constant, constants, on_device_of, times
from ._row_layout import (
    add_product,
    dense_rows,
    element_offset,
    group_offset,
    group_tile,
    in_layout_of,
    inverse_index,
    load_or_nothing,
    load_partner,
    load_range,
    mixed_pair,
    row_ptrs,
    sorted_inverse,
    weight_of_partner,
)


class Cells(NamedTuple):
    """A mask [N, h, w] and how its cells lie over a row: group g is in cell (g // step_y % h, g // step_x % w), or element g if
    groups are not WHOLE. The plans are None where no block is moved. Where blocks are moved the numbers are compile-time ones,
    because a division by a number that is not known takes as long as everything else that a small group needs."""

    mask_ptr: torch.Tensor
    plan_ptr: torch.Tensor | None
    partner_plan_ptr: torch.Tensor | None
    step_y: int | tl.constexpr
    h: int | tl.constexpr
    step_x: int | tl.constexpr
    w: int | tl.constexpr
    Y_OUTERMOST: tl.constexpr | None  # whether y is never past h, because it varies slowest; None where no block is moved


class CellRuns(NamedTuple):
    """How the cells of a mask lie in a row, for sums over each. Cells are counted as they follow in memory: cell z is the
    (z // inner_count)-th of the outer dimension and the (z % inner_count)-th of the inner one. Of either dimension, `stride` is
    the distance of neighbours in the mask, `step` that in the row. A cell is so many runs of inner_step consecutive elements,
    which follow in three dimensions, from its start at lead*lead_step + line*line_step + between*between_step, of which the
    last two have so many places. inner_count is in units of SIDE, inner_step of V, outer_step and the steps of runs of LINE
    elements, so that the compiler knows what they are multiples of."""

    outer_stride: int
    outer_count: int
    outer_step: int
    inner_stride: int
    inner_count: int
    inner_step: int
    runs: int
    between: int
    lines: int
    lead_step: int
    line_step: int
    between_step: int
    chunks: int  # tiles that a run is taken in
    SIDE: tl.constexpr
    V: tl.constexpr
    LINE: tl.constexpr


@triton.jit
def _unsigned(n):
    """Numbers that are not negative, in a type whose divisions by numbers known at compile time take half as many instructions."""
    return n.to(tl.uint64 if n.dtype == tl.int64 else tl.uint32)


@triton.jit
def _number(value, like):
    """A compile-time number in the type of others, which a division asks for."""
    return tl.full([1, 1, 1], value, like.dtype)


@triton.jit
def _cell_of(group, cells, V: tl.constexpr, WHOLE: tl.constexpr):
    """(y, x) of the cells of groups, or of each element if not WHOLE."""
    if not WHOLE:
        group = group * V + tl.arange(0, V)[None, None, :]
    if cells.Y_OUTERMOST is not None:
        group = _unsigned(group)
        y = group // _number(cells.step_y, group)
        if not cells.Y_OUTERMOST:
            y = y % _number(cells.h, group)
        x = group // _number(cells.step_x, group) % _number(cells.w, group)
    else:
        y = group // cells.step_y % cells.h
        x = group // cells.step_x % cells.w
    return y, x


@triton.jit
def _moved_group(group, y, x, block, cells):
    """Groups that have in a block the places that these have in cell (y, x)."""
    place = _unsigned(group) - y * cells.step_y - x * cells.step_x
    block = block.to(place.dtype)
    w = _number(cells.w, block)
    return (place + block // w * cells.step_y + block % w * cells.step_x).to(group.dtype)


@triton.jit
def _load_block(plan_ptr, row, cell, count, mask):
    """Number of the block that a cell is taken from, some block where it is out of range; the launcher makes such rows NaN."""
    block = tl.load(plan_ptr + row * count + cell, mask=mask, other=0).to(tl.int32)
    return tl.minimum(block.to(tl.uint32), tl.cast(count - 1, tl.uint32))


@triton.jit
def _load_groups(rows, row, group, weight, mask, layout, V: tl.constexpr, WHOLE: tl.constexpr):
    """Groups of rows, -0 where they have no weight."""
    used = weight != 0
    if not WHOLE:
        # the whole group, so that it stays one access
        used = tl.max(used.to(tl.int32), axis=2, keep_dims=True) != 0
    offset = group_offset(group, layout, V)
    return load_or_nothing(rows, row, offset, mask & used, layout).to(weight.dtype)


@triton.jit(do_not_specialize=["mask_stride", "N", "M"])
def _mix_masked_fwd_kernel(
    x, cells, mask_stride, index_ptr, out,
    N, M, layout, V: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group, row_mask, mask, _ = group_tile(N, M, layout, V, ROWS, BLOCK)
    partner, in_range = load_partner(index_ptr, row, N, row_mask)
    row = row[:, :, None]
    partner = partner[:, :, None]
    cell_y, cell_x = _cell_of(group, cells, V, WHOLE)
    cell = cell_y * cells.w + cell_x
    weight = tl.load(cells.mask_ptr + row * mask_stride + cell, mask=mask, other=0)  # [ROWS, BLOCK // V, 1 or V]
    partner_weight = weight_of_partner(weight, in_range[:, :, None])
    own_group = group
    partner_group = group
    if cells.plan_ptr is not None:
        block = _load_block(cells.plan_ptr, row, cell, cells.h * cells.w, mask)
        own_group = _moved_group(group, cell_y, cell_x, block, cells)
    if cells.partner_plan_ptr is not None:
        block = _load_block(cells.partner_plan_ptr, row, cell, cells.h * cells.w, mask)
        partner_group = _moved_group(group, cell_y, cell_x, block, cells)

    own = _load_groups(x, row, own_group, weight, mask, layout, V, WHOLE)
    other = _load_groups(x, partner, partner_group, partner_weight, mask, layout, V, WHOLE)
    mixed = mixed_pair(weight, partner_weight, own, other)
    if not WHOLE:
        # groups were loaded for other elements of theirs
        mixed = tl.where(weight == 0, partner_weight * other, tl.where(partner_weight == 0, own, mixed))
    offset = group_offset(group, layout, V)
    tl.store(row_ptrs(out, row, layout) + offset, mixed.to(out.ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["mask_stride", "N", "M"])
def _mix_masked_dx_kernel(
    grad_output, cells, mask_stride, own_inverse, partner_inverse, dx,
    N, M, layout, V: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx is the sum of m*grad_output where this row's value went as its own, and of (1-m)*grad_output where it went as a
    partner's. own_inverse, of the plan, lists the former as row*h*w + cell for each row*h*w + block; it is None without a plan.
    partner_inverse lists the latter, with a partner plan likewise, else as rows for each row."""
    row, group, row_mask, mask, _ = group_tile(N, M, layout, V, ROWS, BLOCK)
    if cells.partner_plan_ptr is None:
        user_first, user_count = load_range(partner_inverse, row, row_mask)  # of the rows that have this one as their partner
    row = row[:, :, None]
    cell_y, cell_x = _cell_of(group, cells, V, WHOLE)
    here = cell_y * cells.w + cell_x
    cell_count = cells.h * cells.w
    total = tl.zeros([ROWS, BLOCK // V, V], dtype=cells.mask_ptr.dtype.element_ty)

    if own_inverse is not None:
        first, count = load_range(own_inverse, row * cell_count + here, mask)
        for n in range(tl.max(count)):
            use = mask & (n < count)
            cell = tl.load(own_inverse.order_ptr + first + n, mask=use, other=0) % cell_count
            weight = tl.load(cells.mask_ptr + row * mask_stride + cell, mask=use, other=0)
            moved = _moved_group(group, cell_y, cell_x, cell, cells)
            grad = _load_groups(grad_output, row, moved, weight, use, layout, V, WHOLE)
            # grad is 0 where the weight is 0: a plan makes groups whole, and then no other is loaded
            total = tl.fma(weight, grad, total)
    else:
        weight = tl.load(cells.mask_ptr + row * mask_stride + here, mask=mask, other=0)
        grad = _load_groups(grad_output, row, group, weight, mask, layout, V, WHOLE)
        total = times(weight, grad)

    if cells.partner_plan_ptr is not None:
        user_first, user_count = load_range(partner_inverse, row * cell_count + here, mask)
    for n in range(tl.max(user_count)):
        use = n < user_count
        k = tl.load(partner_inverse.order_ptr + user_first + n, mask=use, other=0)
        k_group = group
        cell = here
        if cells.partner_plan_ptr is not None:
            cell = k % cell_count
            k = k // cell_count
            k_group = _moved_group(group, cell_y, cell_x, cell, cells)
        else:
            k = k[:, :, None]
            use = use[:, :, None]
        weight = 1 - tl.load(cells.mask_ptr + k * mask_stride + cell, mask=use, other=1)
        grad = _load_groups(grad_output, k, k_group, weight, mask & use, layout, V, WHOLE)
        total = add_product(total, weight, grad)

    offset = group_offset(group, layout, V)
    tl.store(row_ptrs(dx, row, layout) + offset, total.to(dx.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _cell_start(number, runs, outer_step, inner_count, inner_step):
    """Element that the cell of this number in the mask starts with."""
    outer = number // runs.outer_stride % runs.outer_count
    inner = number // runs.inner_stride % inner_count
    return outer * outer_step + inner * inner_step


@triton.jit(do_not_specialize=["N", "M"])
def _mix_masked_dmask_kernel(
    grad_output, x, index_ptr, plan_ptr, partner_plan_ptr, dmask_ptr,
    N, M, layout, runs, TILES: tl.constexpr, RUNS: tl.constexpr, CELLS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Writes dmask [parts, N, cells]: a program adds up TILES tiles [RUNS, CELLS, RUN] of a row, its part of their cells."""
    inner_count = runs.inner_count * runs.SIDE
    inner_step = runs.inner_step * runs.V
    outer_step = runs.outer_step * runs.LINE
    cell_count = runs.outer_count * inner_count
    row = (tl.program_id(0) % N).to(tl.int64)
    place = tl.program_id(0) // N
    cell_blocks = tl.cdiv(cell_count, CELLS)
    z = (place % cell_blocks * CELLS).to(M.dtype) + tl.arange(0, CELLS)[None, :, None]
    first = (place // cell_blocks) * (TILES * RUNS)
    col = tl.arange(0, RUN)[None, None, :]
    cell_mask = z < cell_count
    number = z // inner_count * runs.outer_stride + z % inner_count * runs.inner_stride
    start = z // inner_count * outer_step + z % inner_count * inner_step
    partner, in_range = load_partner(index_ptr, row, N, None)
    own_start = start
    partner_start = start
    if plan_ptr is not None:
        block = _load_block(plan_ptr, row, number, cell_count, cell_mask).to(M.dtype)
        own_start = _cell_start(block, runs, outer_step, inner_count, inner_step)
    if partner_plan_ptr is not None:
        block = _load_block(partner_plan_ptr, row, number, cell_count, cell_mask).to(M.dtype)
        partner_start = _cell_start(block, runs, outer_step, inner_count, inner_step)

    total = tl.zeros([RUNS, CELLS, RUN], dtype=dmask_ptr.dtype.element_ty)
    for tile in range(TILES):
        chunk = (first + tile * RUNS).to(M.dtype) + tl.arange(0, RUNS)[:, None, None]
        run = chunk // runs.chunks
        e = chunk % runs.chunks * RUN + col
        lead = run // (runs.between * runs.lines)
        line = run // runs.between % runs.lines
        within = (lead * runs.lead_step + line * runs.line_step + run % runs.between * runs.between_step) * runs.LINE + e
        mask = cell_mask & (run < runs.runs) & (e < inner_step)
        offset = element_offset(start + within, layout)
        grad = tl.load(row_ptrs(grad_output, row, layout) + offset, mask=mask, other=0).to(total.dtype)
        offset = element_offset(own_start + within, layout)
        own = tl.load(row_ptrs(x, row, layout) + offset, mask=mask, other=0).to(total.dtype)
        offset = element_offset(partner_start + within, layout)
        other = tl.load(row_ptrs(x, partner, layout) + offset, mask=mask, other=0).to(total.dtype)
        total = tl.fma(grad, own - other, total)
    partial = tl.sum(tl.sum(total, axis=2, keep_dims=True), axis=0, keep_dims=True)
    part = (place // cell_blocks).to(tl.int64) * N + row
    tl.store(dmask_ptr + part * cell_count + number, tl.where(in_range, partial, float("nan")), mask=cell_mask)


class CellGrid:
    """How a mask [h, w] lies over rows, given as DenseRows: step_y and step_x of Cells in elements, and the fields of CellRuns. A
    dimension of one cell puts no element apart: its step is the whole row."""

    def __init__(self, rows, h, w):
        y, x = (
            (rows.numel, 1, 1, stride) if count == 1 else (step, size, count, stride)
            for step, size, count, stride in ((rows.steps[0], rows.sizes[0], h, w), (rows.steps[1], rows.sizes[1], w, 1))
        )
        self.step_y, self.step_x = y[0] * (y[1] // y[2]), x[0] * (x[1] // x[2])
        inner, outer = sorted((x, y))
        step, size, self.inner_count, self.inner_stride = inner
        self.line_step, outer_size, self.outer_count, self.outer_stride = outer
        self.inner_step = step * (size // self.inner_count)
        self.outer_step = self.line_step * (outer_size // self.outer_count)
        self.between_step, self.lead_step = step * size, self.line_step * outer_size
        self.between, self.lines = self.line_step // self.between_step, outer_size // self.outer_count
        self.runs = rows.numel // self.lead_step * self.lines * self.between

    def groups(self, align, itemsize, moved):
        """(V, WHOLE, step_y, step_x) for rows of this alignment; all groups are whole if blocks are moved."""
        V = math.gcd(align, max(1, 16 // itemsize))
        whole_V = math.gcd(V, self.step_y, self.step_x)
        if moved or whole_V == V:
            return whole_V, True, self.step_y // whole_V, self.step_x // whole_V
        return V, False, self.step_y, self.step_x

    def cell_runs(self, align, chunks):
        """CellRuns for rows of this alignment, of which each run is taken in so many chunks."""
        V, side, line = math.gcd(align, self.inner_step), math.gcd(16, self.inner_count), math.gcd(align, self.between_step)
        return CellRuns(
            self.outer_stride, self.outer_count, self.outer_step // line,
            self.inner_stride, self.inner_count // side, self.inner_step // V,
            self.runs, self.between, self.lines, self.lead_step // line, self.line_step // line, self.between_step // line,
            chunks, constant(side), constant(V), constant(line),
        )  # fmt: skip


cell_grid = functools.lru_cache(maxsize=1024)(CellGrid)


@functools.lru_cache(maxsize=1024)
def _groups_of(rows, h, w, align, itemsize, moved):
    return cell_grid(rows, h, w).groups(align, itemsize, moved)


def _cells_view(rows, layout, mask, plan, partner_plan, itemsize):
    """(the mask and plans as a kernel takes them, V, WHOLE)."""
    h, w = mask.shape[1:]
    moved = plan is not None or partner_plan is not None
    V, whole, step_y, step_x = _groups_of(rows, h, w, layout.ALIGN.value, itemsize, moved)
    numbers = step_y, h, step_x, w
    numbers = constants(*numbers, step_y * h * V == rows.numel) if moved else (*numbers, None)
    return Cells(mask, plan, partner_plan, *numbers), V, whole


def _without_wrong_plans(index, cell_count, *plans):
    """index, -1 in rows whose plan is out of range, which makes them NaN."""
    for plan in plans:
        if plan is not None:
            low, high = plan.aminmax(dim=1)
            index = torch.where((low >= 0) & (high < cell_count), index, -1)
    return index


def _inverse(index, plan, cell_count):
    """InverseIndex of index, or with a plan the numbers k*cell_count + b, listed for each index[k]*cell_count + plan[k, b]."""
    if plan is None:
        return inverse_index(index, index.shape[0])
    slots = index.shape[0] * cell_count
    in_range = (plan >= 0) & (plan < cell_count) & (index >= 0).unsqueeze(1)
    return sorted_inverse(torch.where(in_range, index.unsqueeze(1) * cell_count + plan, slots).view(-1), slots)


def _contiguous_rows(mask, *plans):
    """The mask and plans, each row contiguous."""
    mask = mask.resolve_neg()
    mask = mask if mask[:1].is_contiguous() else mask.contiguous()
    return mask, *(None if plan is None else plan.contiguous() for plan in plans)


def mix_masked_fwd(x, mask, index, plan, partner_plan):
    """x [N, ..., H, W], mask [N, h, w], index [N], plans [N, h*w] or None -> out, in x's layout."""
    out, rows = dense_rows(torch.empty_like(x), 2, True)
    if not out.numel():
        return out
    x = in_layout_of(x, out)
    mask, plan, partner_plan = _contiguous_rows(mask, plan, partner_plan)
    h, w = mask.shape[1:]
    index = _without_wrong_plans(index, h * w, plan, partner_plan).contiguous()
    layout, x_rows, out_rows = rows.views(x, out)
    cells, V, whole = _cells_view(rows, layout, mask, plan, partner_plan, x.element_size())
    with on_device_of(x):
        _mix_masked_fwd_kernel[(blocks(x.shape[0], rows.per_program) * rows.tiles,)](
            x_rows, cells, mask.stride(0), index, out_rows,
            x.shape[0], rows.numel, layout, V=V, WHOLE=whole, ROWS=rows.per_program, BLOCK=rows.block,
            num_warps=_launch.MIX_WARPS, **MIX_OPTIONS,
        )  # fmt: skip
    return out


def mix_masked_bwd(grad_output, x, mask, index, plan, partner_plan, strides, need_dx, need_dmask):
    """grad_output [N, ..., H, W] -> (dx in the layout of the strides given, or None; dmask [N, h, w] or None). x may be None
    unless dmask is needed."""
    if need_dx:
        like = torch.empty_strided(grad_output.shape, strides, dtype=grad_output.dtype, device=grad_output.device)
    else:
        like = torch.empty_like(x, device="meta")  # a dense layout, without its memory
    like, rows = dense_rows(like, 2, True)
    if not grad_output.numel():
        return like if need_dx else None, torch.zeros_like(mask) if need_dmask else None
    mask, plan, partner_plan = _contiguous_rows(mask, plan, partner_plan)
    h, w = mask.shape[1:]
    index = _without_wrong_plans(index, h * w, plan, partner_plan).contiguous()
    grad_output = in_layout_of(grad_output, like)
    dx = _dx(grad_output, mask, index, plan, partner_plan, like, rows) if need_dx else None
    dmask = _dmask(grad_output, in_layout_of(x, like), mask, index, plan, partner_plan, rows) if need_dmask else None
    return dx, dmask


def _dx(grad_output, mask, index, plan, partner_plan, dx, rows):
    N, h, w = mask.shape
    partner_inverse = _inverse(index, partner_plan, h * w)
    own_inverse = None if plan is None else _inverse(torch.arange(N, device=index.device), plan, h * w)
    layout, grad_rows, dx_rows = rows.views(grad_output, dx)
    cells, V, whole = _cells_view(rows, layout, mask, plan, partner_plan, grad_output.element_size())
    with on_device_of(grad_output):
        _mix_masked_dx_kernel[(blocks(N, rows.per_program) * rows.tiles,)](
            grad_rows, cells, mask.stride(0), own_inverse, partner_inverse, dx_rows,
            N, rows.numel, layout, V=V, WHOLE=whole, ROWS=rows.per_program, BLOCK=rows.block,
            # an element's own cell and weight take registers
            num_warps=_launch.MIX_WARPS if whole else _launch.CELL_WARPS,
            **MIX_OPTIONS,
        )  # fmt: skip
    return dx


def _dmask(grad_output, x, mask, index, plan, partner_plan, rows):
    N, h, w = mask.shape
    grid = cell_grid(rows, h, w)
    layout, grad_rows, x_rows = rows.views(grad_output, x)
    RUNS, CELLS, RUN = _launch.cell_tile(grid.inner_step, grid.runs, grid.inner_count, h * w, grad_output.element_size())
    chunks = blocks(grid.inner_step, RUN)
    tiles = blocks(grid.runs * chunks, RUNS)
    per_program = min(tiles, _launch.CELL_TILES)
    parts, cell_blocks = blocks(tiles, per_program), blocks(h * w, CELLS)
    dmask = torch.empty((parts, *mask.shape), dtype=mask.dtype, device=mask.device)
    with on_device_of(grad_output):
        _mix_masked_dmask_kernel[(N * cell_blocks * parts,)](
            grad_rows, x_rows, index, plan, partner_plan, dmask,
            N, rows.numel, layout, grid.cell_runs(layout.ALIGN.value, chunks),
            TILES=per_program, RUNS=RUNS, CELLS=CELLS, RUN=RUN, num_warps=_launch.MIX_WARPS, **MIX_OPTIONS,
        )  # fmt: skip
    return dmask.sum(0) if parts > 1 else dmask[0]
