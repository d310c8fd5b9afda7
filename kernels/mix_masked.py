"""Mixing by a mask of cells, with the blocks of either row moved: kernels and their launchers.

    out[i, pixel] = m*x[i, own] + (1-m)*x[index[i], other]       m = mask[i, cell], cell the one that the pixel lies in
    own, other    = the pixel's place in block plan[i, cell] and in block partner_plan[i, cell]; without a plan the pixel itself

Rows are walked in memory order, rows first, as in mix.py. A tile is [rows, groups, V]: V elements make an access of up to 16
bytes. Where no group straddles two cells (WHOLE), weights and moves are worked out once a group; a plan makes V so. Elsewhere
weights are an element's own, and a group is read if one of its elements has weight.
Memory floor: forward reads x and the mask and writes out; the gradient to x reads g and the mask and writes dx; the gradient to
the mask reads g and x and writes a number a cell.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import OPTIONS, blocks, on_device_of
from ._row_layout import _like, _offset, walkable


@triton.jit
def _groups(N, M, V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows [ROWS, 1, 1], groups of V elements in each [1, BLOCK/V, 1], which of them exist); addresses are int64"""
    row_blocks = tl.cdiv(N, ROWS)
    row = ((tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    group = (tl.program_id(0) // row_blocks).to(M.dtype) * (BLOCK // V) + tl.arange(0, BLOCK // V)[None, :, None]
    return row, group, (row < N) & (group < M // V)


@triton.jit
def _cell(group, step_y, h, step_x, w, WHOLE: tl.constexpr, V: tl.constexpr):
    """(y, x) of the cells of groups, or of each element; steps are in groups or in elements."""
    if not WHOLE:
        group = group * V + tl.arange(0, V)[None, None, :]
    return group // step_y % h, group // step_x % w


@triton.jit
def _moved(group, y, x, block, step_y, step_x, w):
    """Groups of cell (y, x), where they are in another block."""
    block = block.to(group.dtype)
    return group + (block // w - y) * step_y + (block % w - x) * step_x


@triton.jit
def _planned(plan_ptr, row, cell, cells, mask):
    """The block that a cell is taken from; the launcher has marked rows whose plan is out of range."""
    block = tl.load(plan_ptr + row * cells + cell, mask=mask, other=0)
    return tl.where((block >= 0) & (block < cells), block, 0)


@triton.jit
def _read(ptr, start, group, weight, mask, inner_size, outer_stride, inner_stride,
          SPLIT: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Groups of rows that start at `start`, where they have weight."""
    used = weight != 0
    if not WHOLE:
        used = tl.max(used.to(tl.int32), axis=2, keep_dims=True) != 0
    at = _offset(group * V + tl.arange(0, V)[None, None, :], inner_size, outer_stride, inner_stride, SPLIT)
    return tl.load(ptr + start + at, mask=mask & used, other=0).to(weight.dtype)


@triton.jit(do_not_specialize=["N", "M", "mask_row"])
def _mix_masked_fwd_kernel(
    x_ptr, mask_ptr, index_ptr, plan_ptr, partner_plan_ptr, out_ptr,
    N, M, inner_size,
    x_row, out_row, mask_row, outer_stride, inner_stride,
    step_y, h, step_x, w,
    PLAN: tl.constexpr, PARTNER_PLAN: tl.constexpr,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group, inside = _groups(N, M, V, ROWS, BLOCK)
    y, x = _cell(group, step_y, h, step_x, w, WHOLE, V)
    own = tl.load(mask_ptr + row * mask_row + (y * w + x), mask=inside, other=0)  # [ROWS, BLOCK/V, 1 or V]
    other = 1 - own
    partner = tl.load(index_ptr + row, mask=row < N, other=0)
    known = (partner >= 0) & (partner < N)
    partner = tl.where(known, partner, 0)
    mine = group
    theirs = group
    if PLAN:
        mine = _moved(group, y, x, _planned(plan_ptr, row, y * w + x, h * w, inside), step_y, step_x, w)
    if PARTNER_PLAN:
        theirs = _moved(group, y, x, _planned(partner_plan_ptr, row, y * w + x, h * w, inside), step_y, step_x, w)

    a = _read(x_ptr, row * x_row * ALIGN, mine, own, inside, inner_size, outer_stride, inner_stride, SPLIT, WHOLE, V)
    b = _read(x_ptr, partner * x_row * ALIGN, theirs, other, inside, inner_size, outer_stride, inner_stride, SPLIT, WHOLE, V)
    mixed = tl.where(own == 0, b, tl.where(other == 0, a, own * a + other * b))
    mixed = tl.where(known, mixed, float("nan"))
    at = _offset(group * V + tl.arange(0, V)[None, None, :], inner_size, outer_stride, inner_stride, SPLIT)
    tl.store(out_ptr + row * out_row * ALIGN + at, mixed.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "M", "mask_row"])
def _mix_masked_dx_kernel(
    g_ptr, mask_ptr, own_order_ptr, own_starts_ptr, order_ptr, starts_ptr, dx_ptr,
    N, M, inner_size,
    g_row, dx_row, mask_row, outer_stride, inner_stride,
    step_y, h, step_x, w,
    PLAN: tl.constexpr, PARTNER_PLAN: tl.constexpr,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx is m*g wherever this row's value went as its own, and (1-m)*g wherever as a partner's, in the order of rows and cells.
    Those places are order[starts[s]:starts[s+1]], a stable sort of where each came from: s is the row, and they are rows; with
    a plan s is row*h*w + block, and they are row*h*w + cell. No atomics, the same bits every time."""
    row, group, inside = _groups(N, M, V, ROWS, BLOCK)
    y, x = _cell(group, step_y, h, step_x, w, WHOLE, V)
    here = y * w + x
    cells = h * w
    dx = tl.zeros([ROWS, BLOCK // V, V], dtype=mask_ptr.dtype.element_ty)

    if PLAN:
        slot = row * cells + here
        first = tl.load(own_starts_ptr + slot, mask=inside, other=0)
        count = tl.load(own_starts_ptr + slot + 1, mask=inside, other=0) - first
        for n in range(tl.max(count)):
            use = inside & (n < count)
            cell = tl.load(own_order_ptr + first + n, mask=use, other=0) % cells
            share = tl.load(mask_ptr + row * mask_row + cell, mask=use, other=0)
            at = _moved(group, y, x, cell, step_y, step_x, w)
            g = _read(g_ptr, row * g_row * ALIGN, at, share, use, inner_size, outer_stride, inner_stride, SPLIT, WHOLE, V)
            dx += share * g
    else:
        share = tl.load(mask_ptr + row * mask_row + here, mask=inside, other=0)
        g = _read(g_ptr, row * g_row * ALIGN, group, share, inside, inner_size, outer_stride, inner_stride, SPLIT, WHOLE, V)
        dx += tl.where(share == 0, 0, share * g)

    slot = row
    if PARTNER_PLAN:
        slot = row * cells + here
        first = tl.load(starts_ptr + slot, mask=inside, other=0)
        count = tl.load(starts_ptr + slot + 1, mask=inside, other=0) - first
    else:
        first = tl.load(starts_ptr + slot, mask=row < N, other=0)
        count = tl.load(starts_ptr + slot + 1, mask=row < N, other=0) - first
    for n in range(tl.max(count)):
        use = n < count
        k = tl.load(order_ptr + first + n, mask=use, other=0)
        at = group
        cell = here
        if PARTNER_PLAN:
            cell = k % cells
            k = k // cells
            at = _moved(group, y, x, cell, step_y, step_x, w)
        share = 1 - tl.load(mask_ptr + k * mask_row + cell, mask=use, other=1)
        at_k = k * g_row * ALIGN
        g = _read(g_ptr, at_k, at, share, inside & use, inner_size, outer_stride, inner_stride, SPLIT, WHOLE, V)
        dx += tl.where(share == 0, 0, share * g)

    at = _offset(group * V + tl.arange(0, V)[None, None, :], inner_size, outer_stride, inner_stride, SPLIT)
    tl.store(dx_ptr + row * dx_row * ALIGN + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _block_start(number, stride_o, count_o, stride_i, count_i, step_o, step_i):
    """Where the block of this number starts."""
    return number // stride_o % count_o * step_o + number // stride_i % count_i * step_i


@triton.jit(do_not_specialize=["N", "M"])
def _mix_masked_dmask_kernel(
    g_ptr, x_ptr, index_ptr, plan_ptr, partner_plan_ptr, dmask_ptr,
    N, M, inner_size,
    g_row, x_row, outer_stride, inner_stride,
    stride_o, count_o, stride_i, count_i, step_o, step_i,
    lines, between, tall, line_a, line_o, line_b, chunks,
    PLAN: tl.constexpr, PARTNER_PLAN: tl.constexpr,
    SPLIT: tl.constexpr, V: tl.constexpr, SIDE: tl.constexpr, LINE: tl.constexpr, ALIGN: tl.constexpr,
    TILES: tl.constexpr, LINES: tl.constexpr, CELLS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """dmask[i, cell] = sum over the cell of g[i]*(own - other). A cell is `lines` runs of step_i, which lie at a*line_a +
    o*line_o + b*line_b from its start; cells are numbered as they follow in memory, outer and inner dimension. A program adds
    up TILES tiles [LINES, CELLS, RUN]: what of the cells it saw is its share, dmask is [parts, N, cells]. count_i is in units
    of SIDE, step_i of V, step_o and line_* of LINE elements, so that the compiler knows what they are multiples of."""
    count_i *= SIDE
    step_i *= V
    step_o *= LINE
    cells = count_o * count_i
    row = (tl.program_id(0) % N).to(tl.int64)
    place = tl.program_id(0) // N
    cell_blocks = tl.cdiv(cells, CELLS)
    z = (place % cell_blocks * CELLS).to(M.dtype) + tl.arange(0, CELLS)[None, :, None]
    first = (place // cell_blocks) * (TILES * LINES)
    lane = tl.arange(0, RUN)[None, None, :]
    real = z < cells
    number = z // count_i * stride_o + z % count_i * stride_i
    start = z // count_i * step_o + z % count_i * step_i
    partner = tl.load(index_ptr + row)
    known = (partner >= 0) & (partner < N)
    partner = tl.where(known, partner, 0)
    mine = start
    theirs = start
    if PLAN:
        block = _planned(plan_ptr, row, number, cells, real).to(M.dtype)
        mine = _block_start(block, stride_o, count_o, stride_i, count_i, step_o, step_i)
    if PARTNER_PLAN:
        block = _planned(partner_plan_ptr, row, number, cells, real).to(M.dtype)
        theirs = _block_start(block, stride_o, count_o, stride_i, count_i, step_o, step_i)

    total = tl.zeros([LINES, CELLS, RUN], dtype=dmask_ptr.dtype.element_ty)
    for tile in range(TILES):
        v = (first + tile * LINES).to(M.dtype) + tl.arange(0, LINES)[:, None, None]
        line = v // chunks
        r = v % chunks * RUN + lane
        within = (line // (between * tall) * line_a + line // between % tall * line_o + line % between * line_b) * LINE + r
        use = real & (line < lines) & (r < step_i)
        at = _offset(start + within, inner_size, outer_stride, inner_stride, SPLIT)
        g = tl.load(g_ptr + row * g_row * ALIGN + at, mask=use, other=0).to(total.dtype)
        at = _offset(mine + within, inner_size, outer_stride, inner_stride, SPLIT)
        a = tl.load(x_ptr + row * x_row * ALIGN + at, mask=use, other=0).to(total.dtype)
        at = _offset(theirs + within, inner_size, outer_stride, inner_stride, SPLIT)
        b = tl.load(x_ptr + partner * x_row * ALIGN + at, mask=use, other=0).to(total.dtype)
        total += g * (a - b)
    share = tl.sum(tl.sum(total, axis=2, keep_dims=True), axis=0, keep_dims=True)
    part = (place // cell_blocks).to(tl.int64) * N + row
    tl.store(dmask_ptr + part * cells + number, tl.where(known, share, float("nan")), mask=real)


class _Cells:
    """How a mask [h, w] lies over rows of this layout. A dimension of one cell tells nothing: its step is the whole row."""

    def __init__(self, numel, steps, h, w):
        y, x = ((numel, 1, 1, stride) if count == 1 else (step, size, count, stride) for step, size, count, stride in (
            (steps[0], steps[1], h, w), (steps[2], steps[3], w, 1)))  # fmt: skip
        self.step_y, self.step_x = y[0] * (y[1] // y[2]), x[0] * (x[1] // x[2])
        (step, size, self.count_i, self.stride_i), (outer, outer_size, self.count_o, self.stride_o) = sorted((x, y))
        self.step_i, self.step_o = step * (size // self.count_i), outer * (outer_size // self.count_o)
        self.line_b, self.line_o, self.line_a = step * size, outer, outer * outer_size
        self.between, self.tall = outer // self.line_b, outer_size // self.count_o
        self.lines = numel // self.line_a * self.tall * self.between

    def groups(self, align, itemsize, plan):
        """(elements in a group, whether a group lies in one cell)"""
        wide = math.gcd(align, max(1, 16 // itemsize))
        common = math.gcd(wide, self.step_y, self.step_x)
        return (common, True) if plan else (wide, common == wide)

    def tiles(self, itemsize):
        """(LINES, CELLS, RUN) of a tile of the mask's gradient, chunks of a run, tiles of a cell, how many a program takes"""
        tile = _launch.cell_tile(self.step_i, self.lines, self.count_i, self.count_i * self.count_o, itemsize)
        chunks = blocks(self.step_i, tile[2])
        tiles = blocks(self.lines * chunks, tile[0])
        return tile, chunks, tiles, min(tiles, _launch.CELL_TILES)


cells_of = functools.lru_cache(maxsize=1024)(_Cells)


def _marked(index, cells, *plans):
    """index, -1 in rows whose plan is out of range."""
    for plan in plans:
        if plan is not None:
            low, high = plan.aminmax(dim=1)
            index = torch.where((low >= 0) & (high < cells), index, -1)
    return index


def _sources(index, plan, cells):
    """(order, starts): which rows k have index[k] = s, or with a plan which k*cells + b have index[k]*cells + plan[k, b] = s,
    are order[starts[s]:starts[s+1]], in rising order."""
    slots = index.shape[0]
    if plan is not None:
        slots *= cells
        right = (plan >= 0) & (plan < cells) & (index >= 0).unsqueeze(1)
        index = torch.where(right, index.unsqueeze(1) * cells + plan, slots).view(-1)
    targets, order = index.sort(stable=True)
    return order, torch.searchsorted(targets, torch.arange(slots + 1, device=index.device))


def _prepared(mask, *plans):
    """The mask and plans, each row contiguous."""
    mask = mask.resolve_neg()
    mask = mask if mask[:1].is_contiguous() else mask.contiguous()
    return mask, *(None if plan is None else plan.contiguous() for plan in plans)


def mix_masked_fwd(x, mask, index, plan, partner_plan):
    """x [N, ..., H, W], mask [N, h, w], index [N], plans [N, h*w] or None -> out, in x's layout."""
    out, rows = walkable(torch.empty_like(x), 2)
    if not out.numel():
        return out
    x = _like(x, out)
    mask, plan, partner_plan = _prepared(mask, plan, partner_plan)
    h, w = mask.shape[1:]
    index = _marked(index, h * w, plan, partner_plan).contiguous()
    align, (x_row, out_row) = rows.args(x, out)
    cells = cells_of(rows.numel, tuple(rows.steps), h, w)
    V, whole = cells.groups(align, x.element_size(), plan is not None or partner_plan is not None)
    unit = V if whole else 1
    with on_device_of(x):
        _mix_masked_fwd_kernel[(blocks(x.shape[0], rows.per_program) * rows.tiles,)](
            x, mask, index, index if plan is None else plan, index if partner_plan is None else partner_plan, out,
            x.shape[0], rows.numel, rows.inner_size,
            x_row, out_row, mask.stride(0), rows.outer_stride, rows.inner_stride,
            cells.step_y // unit, h, cells.step_x // unit, w,
            PLAN=plan is not None, PARTNER_PLAN=partner_plan is not None, SPLIT=rows.split, WHOLE=whole, V=V, ALIGN=align,
            ROWS=rows.per_program, BLOCK=rows.block, num_warps=_launch.MIX_WARPS, **OPTIONS,
        )  # fmt: skip
    return out


def mix_masked_bwd(g, x, mask, index, plan, partner_plan, layout, need_dx, need_dmask):
    """Upstream g [N, ..., H, W] -> (dx in the layout of the strides given, or None; dmask [N, h, w] or None). x may be None
    unless dmask is needed."""
    if need_dx:
        like = torch.empty_strided(g.shape, layout, dtype=g.dtype, device=g.device)
    else:
        like = torch.empty_like(x, device="meta")  # a dense layout, without its memory
    like, rows = walkable(like, 2)
    if not g.numel():
        return like if need_dx else None, torch.zeros_like(mask) if need_dmask else None
    mask, plan, partner_plan = _prepared(mask, plan, partner_plan)
    h, w = mask.shape[1:]
    index = _marked(index, h * w, plan, partner_plan).contiguous()
    g = _like(g, like)
    cells = cells_of(rows.numel, tuple(rows.steps), h, w)
    dx = _dx(g, mask, index, plan, partner_plan, like, rows, cells) if need_dx else None
    dmask = _dmask(g, _like(x, like), mask, index, plan, partner_plan, rows, cells) if need_dmask else None
    return dx, dmask


def _dx(g, mask, index, plan, partner_plan, dx, rows, cells):
    N, h, w = mask.shape
    order, starts = _sources(index, partner_plan, h * w)
    own_order, own_starts = order, starts
    if plan is not None:
        own_order, own_starts = _sources(torch.arange(N, device=g.device), plan, h * w)
    align, (g_row, dx_row) = rows.args(g, dx)
    V, whole = cells.groups(align, g.element_size(), plan is not None or partner_plan is not None)
    unit = V if whole else 1
    with on_device_of(g):
        _mix_masked_dx_kernel[(blocks(N, rows.per_program) * rows.tiles,)](
            g, mask, own_order, own_starts, order, starts, dx,
            N, rows.numel, rows.inner_size,
            g_row, dx_row, mask.stride(0), rows.outer_stride, rows.inner_stride,
            cells.step_y // unit, h, cells.step_x // unit, w,
            PLAN=plan is not None, PARTNER_PLAN=partner_plan is not None, SPLIT=rows.split, WHOLE=whole, V=V, ALIGN=align,
            ROWS=rows.per_program, BLOCK=rows.block,
            num_warps=_launch.MIX_WARPS if whole else 2 * _launch.MIX_WARPS,  # an element's own cell and weight take registers
            **OPTIONS,
        )  # fmt: skip
    return dx


def _dmask(g, x, mask, index, plan, partner_plan, rows, cells):
    N, h, w = mask.shape
    align, (g_row, x_row) = rows.args(g, x)
    V, side, line = math.gcd(align, cells.step_i), math.gcd(16, cells.count_i), math.gcd(align, cells.line_b)
    (LINES, CELLS, RUN), chunks, tiles, taken = cells.tiles(g.element_size())
    parts, cell_blocks = blocks(tiles, taken), blocks(h * w, CELLS)
    dmask = torch.empty((parts, *mask.shape), dtype=mask.dtype, device=g.device)
    with on_device_of(g):
        _mix_masked_dmask_kernel[(N * cell_blocks * parts,)](
            g, x, index, index if plan is None else plan, index if partner_plan is None else partner_plan, dmask,
            N, rows.numel, rows.inner_size,
            g_row, x_row, rows.outer_stride, rows.inner_stride,
            cells.stride_o, cells.count_o, cells.stride_i, cells.count_i // side, cells.step_o // line, cells.step_i // V,
            cells.lines, cells.between, cells.tall, cells.line_a // line, cells.line_o // line, cells.line_b // line, chunks,
            PLAN=plan is not None, PARTNER_PLAN=partner_plan is not None,
            SPLIT=rows.split, V=V, SIDE=side, LINE=line, ALIGN=align,
            TILES=taken, LINES=LINES, CELLS=CELLS, RUN=RUN, num_warps=_launch.MIX_WARPS, **OPTIONS,
        )  # fmt: skip
    return dmask.sum(0) if parts > 1 else dmask[0]
