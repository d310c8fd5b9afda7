"""Batch mixing along a chain of partners: a row that has been read is kept for the row that needs it next.

    out[i] = lam[i] * x[i] + (1 - lam[i]) * x[index[i]]

A sampler knows an order of the rows in which a row's partner is the next row, index[order[s]] = order[s+1], or, in pairs, the
row before. A program holds one tile of two rows, the last one and its partner, and walks R rows of that order: a row is read
again only where it is neither of the two, which is asked of index on the device. The order is a hint: any permutation gives the
same bits as the gather in mix.py, which reads every row twice. Backward in the same order: a row's gradient needs its own g and
that of the row that has it as its partner, which is the row before.

Memory floor: forward reads x and writes out; backward reads g, writes dx, and reads x once more for the gradient of lam. Read
(R+1)/R times for a cycle, once for pairs; the gather's second read may come from the L2 at no cost, so which of the two is
faster is for a GPU to say.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import OPTIONS, blocks, on_device_of
from ._row_layout import _offset


def rows_per_program(rows, tiles):
    """How many rows a program walks: 8 or, so that no chain is short, up to 12, which moves 1.06 of the floor; of a batch of fewer
    than 16 as many as leave a GPU enough programs."""
    most = _launch.CHAIN_ROWS
    if rows >= 2 * most:
        return blocks(rows, rows // most * 2) * 2  # even, so that no pair is split between two programs
    return max(1, min(most, rows * tiles // _launch.CHAIN_PROGRAMS))


@triton.jit
def _partner(index_ptr, row, N):
    """(the row's partner in range, whether it was)"""
    partner = tl.load(index_ptr + row)
    known = (partner >= 0) & (partner < N)
    return tl.where(known, partner, 0), known


@triton.jit
def _tile(ptr, row, stride, at, mask, first, first_row, second, second_row):
    """A row's tile: one of the two that are held, or read."""
    held = (row == first_row) | (row == second_row)
    fresh = tl.load(ptr + row * stride + at, mask=mask & (held == 0), other=0)
    return tl.where(row == first_row, first, tl.where(row == second_row, second, fresh))


@triton.jit(do_not_specialize=["N", "M", "R", "lam_row"])
def _mix_chain_fwd_kernel(
    x_ptr, lam_ptr, index_ptr, order_ptr, out_ptr,
    N, M, R, inner_size, x_row, out_row, lam_row, outer_stride, inner_stride,
    SPLIT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chains = tl.cdiv(N, R)
    start = (tl.program_id(0) % chains).to(tl.int64) * R
    stop = tl.minimum(start + R, N)
    e = (tl.program_id(0) // chains).to(M.dtype) * BLOCK + tl.arange(0, BLOCK)
    mask = e < M // ALIGN * ALIGN
    at = _offset(e, inner_size, outer_stride, inner_stride, SPLIT)

    i = tl.load(order_ptr + start)
    j, known = _partner(index_ptr, i, N)
    x = tl.load(x_ptr + i * x_row * ALIGN + at, mask=mask, other=0)
    y = tl.load(x_ptr + j * x_row * ALIGN + at, mask=mask & (i != j), other=0)
    y = tl.where(i == j, x, y)
    for s in range(start, stop):
        more = s + 1 < stop
        next_i = tl.load(order_ptr + s + 1, mask=more, other=0)
        next_j, next_known = _partner(index_ptr, next_i, N)
        ahead = mask & more  # what comes next is asked for before this row is stored
        next_x = _tile(x_ptr, next_i, x_row * ALIGN, at, ahead, x, i, y, j)
        next_y = _tile(x_ptr, next_j, x_row * ALIGN, at, ahead & (next_j != next_i), x, i, y, j)
        next_y = tl.where(next_j == next_i, next_x, next_y)

        own = tl.load(lam_ptr + i * lam_row)
        other = 1 - own
        a, b = x.to(own.dtype), y.to(own.dtype)
        mixed = tl.where(own == 0, b, tl.where(other == 0, a, own * a + other * b))
        mixed = tl.where(known, mixed, float("nan"))
        tl.store(out_ptr + i * out_row * ALIGN + at, mixed.to(out_ptr.dtype.element_ty), mask=mask)
        i, j, known, x, y = next_i, next_j, next_known, next_x, next_y


@triton.jit
def _first_source(sources_ptr, starts_ptr, row):
    """(the first row that has this one as its partner, or -1; where their list starts; how many there are)"""
    first = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - first
    return tl.load(sources_ptr + first, mask=count > 0, other=-1), first, count


@triton.jit(do_not_specialize=["N", "M", "R", "lam_row"])
def _mix_chain_bwd_kernel(
    g_ptr, x_ptr, lam_ptr, index_ptr, order_ptr, sources_ptr, starts_ptr, dx_ptr, dlam_ptr,
    N, M, R, inner_size, g_row, x_row, dx_row, lam_row, outer_stride, inner_stride,
    NEED_DX: tl.constexpr, NEED_DLAM: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As _mix_bwd_kernel: dx[i] = lam[i]*g[i] + sum of (1-lam[k])*g[k] over the k with index[k] = i, in the order of k; dlam is
    [tiles, N]. Of the k the first one is looked for among what is held."""
    chains = tl.cdiv(N, R)
    start = (tl.program_id(0) % chains).to(tl.int64) * R
    stop = tl.minimum(start + R, N)
    tile = tl.program_id(0) // chains
    e = tile.to(M.dtype) * BLOCK + tl.arange(0, BLOCK)
    mask = e < M // ALIGN * ALIGN
    at = _offset(e, inner_size, outer_stride, inner_stride, SPLIT)

    i = tl.load(order_ptr + start)
    j, known = _partner(index_ptr, i, N)
    g = tl.load(g_ptr + i * g_row * ALIGN + at, mask=mask, other=0)
    x, y, f = g, g, g  # f: the g of the first source
    k, first, count = i, i, i
    if NEED_DX:
        k, first, count = _first_source(sources_ptr, starts_ptr, i)
        f = tl.load(g_ptr + k * g_row * ALIGN + at, mask=mask & (k >= 0) & (k != i), other=0)
        f = tl.where(k == i, g, f)
    if NEED_DLAM:
        x = tl.load(x_ptr + i * x_row * ALIGN + at, mask=mask, other=0)
        y = tl.load(x_ptr + j * x_row * ALIGN + at, mask=mask & (i != j), other=0)
        y = tl.where(i == j, x, y)
    for s in range(start, stop):
        more = s + 1 < stop
        ahead = mask & more
        next_i = tl.load(order_ptr + s + 1, mask=more, other=0)
        next_j, next_known = _partner(index_ptr, next_i, N)
        next_g, next_f, next_k, next_first, next_count, next_x, next_y = g, f, k, first, count, x, y
        if NEED_DX:
            next_k, next_first, next_count = _first_source(sources_ptr, starts_ptr, next_i)
            next_g = _tile(g_ptr, next_i, g_row * ALIGN, at, ahead, g, i, f, k)
            next_f = _tile(g_ptr, next_k, g_row * ALIGN, at, ahead & (next_k >= 0) & (next_k != next_i), g, i, f, k)
            next_f = tl.where(next_k == next_i, next_g, next_f)
        else:
            next_g = tl.load(g_ptr + next_i * g_row * ALIGN + at, mask=ahead, other=0)
        if NEED_DLAM:
            next_x = _tile(x_ptr, next_i, x_row * ALIGN, at, ahead, x, i, y, j)
            next_y = _tile(x_ptr, next_j, x_row * ALIGN, at, ahead & (next_j != next_i), x, i, y, j)
            next_y = tl.where(next_j == next_i, next_x, next_y)

        own = tl.load(lam_ptr + i * lam_row)
        wide = g.to(own.dtype)
        if NEED_DX:
            dx = tl.where(own == 0, 0, own * wide)
            share = 1 - tl.load(lam_ptr + k * lam_row, mask=k >= 0, other=1)
            dx += tl.where(share == 0, 0, share * f.to(own.dtype))
            for n in range(1, count):
                other = tl.load(sources_ptr + first + n)
                share = 1 - tl.load(lam_ptr + other * lam_row)
                gk = tl.load(g_ptr + other * g_row * ALIGN + at, mask=mask, other=0).to(own.dtype)
                dx += tl.where(share == 0, 0, share * gk)
            tl.store(dx_ptr + i * dx_row * ALIGN + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DLAM:
            product = tl.sum(wide * (x.to(own.dtype) - y.to(own.dtype)), 0)
            tl.store(dlam_ptr + tile.to(tl.int64) * N + i, tl.where(known, product, float("nan")))
        i, j, known, g, f, k, first, count, x, y = (
            next_i, next_j, next_known, next_g, next_f, next_k, next_first, next_count, next_x, next_y,
        )  # fmt: skip


def chain_fwd(rows, x, lam, index, order, out):
    """x and out in the layout of `rows`, a plan of mix.py."""
    align, (x_row, out_row) = rows.args(x, out)
    R = rows_per_program(x.shape[0], rows.tiles)
    with on_device_of(x):
        _mix_chain_fwd_kernel[(blocks(x.shape[0], R) * rows.tiles,)](
            x, lam, index, order, out,
            x.shape[0], rows.numel, R, rows.inner_size,
            x_row, out_row, lam.stride(0) if lam.dim() else 0, rows.outer_stride, rows.inner_stride,
            SPLIT=rows.split, ALIGN=align, BLOCK=rows.block, num_warps=_launch.CHAIN_WARPS, **OPTIONS,
        )  # fmt: skip


def chain_bwd(rows, g, x, lam, index, order, sources, starts, dx, dlam, need_dx, need_dlam):
    """g, x and dx in the layout of `rows`; sources and starts list who has a row as its partner; dlam is [tiles, N]."""
    align, (g_row, x_row, dx_row) = rows.args(g, x, dx)
    R = rows_per_program(g.shape[0], rows.tiles)
    with on_device_of(g):
        _mix_chain_bwd_kernel[(blocks(g.shape[0], R) * rows.tiles,)](
            g, x, lam, index, order, sources, starts, dx, dlam,
            g.shape[0], rows.numel, R, rows.inner_size,
            g_row, x_row, dx_row, lam.stride(0) if lam.dim() else 0, rows.outer_stride, rows.inner_stride,
            NEED_DX=need_dx, NEED_DLAM=need_dlam, SPLIT=rows.split, ALIGN=align, BLOCK=rows.block,
            num_warps=4 if g.dtype == torch.float64 else _launch.CHAIN_WARPS, **OPTIONS,
        )  # fmt: skip
