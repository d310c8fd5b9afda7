"""Batch mixing: kernels and their launchers.

    out[i] = lam[i] * x[i] + (1 - lam[i]) * x[index[i]]          outside row i's box
    out[i] = x[index[i]]                                         inside it

Rows are taken as stored: a row is an outer and an inner strided dimension (one, if it is contiguous), walked in memory
order, so a channels_last image is as good as a contiguous one. Programs are numbered rows first: when a tile of row i is
read a second time, as somebody's partner, the same tile of all rows was touched within a few MB, and the L2 serves it.
Memory floor: forward reads x and writes out; backward reads g, writes dx, and reads x once more for the gradient of lam.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._launch import OPTIONS, blocks, on_device_of
from ._row_layout import _like, _offset, row_strides, walkable
from .mix_chain import chain_bwd, chain_fwd

CHAIN = False  # whether an order of the rows, where it is known, is walked: for a GPU to say


@triton.jit
def _boxed(box_ptr, row, e, step0, size0, step1, size1, step2, size2, mask, BOX: tl.constexpr, VECTOR: tl.constexpr):
    """Whether the e-th element lies in the row's half-open box (starts, then stops) over BOX dimensions; and whether some, and
    whether all elements of its vector do. A vector is VECTOR elements of which the last of the dimensions alone tells apart:
    what is asked of memory is asked for whole vectors."""
    box = box_ptr + row * (2 * BOX)
    lead = e // VECTOR * VECTOR
    hit = mask
    last, size = step0, size0
    if BOX > 1:
        at = (lead // step0) % size0
        hit = hit & (at >= tl.load(box, mask=mask, other=0)) & (at < tl.load(box + BOX, mask=mask, other=0))
        last, size = step1, size1
    if BOX > 2:
        at = (lead // step1) % size1
        hit = hit & (at >= tl.load(box + 1, mask=mask, other=0)) & (at < tl.load(box + BOX + 1, mask=mask, other=0))
        last, size = step2, size2
    start = tl.load(box + BOX - 1, mask=mask, other=0)
    stop = tl.load(box + 2 * BOX - 1, mask=mask, other=0)
    at = (e // last) % size
    first = (lead // last) % size
    final = ((lead + (VECTOR - 1)) // last) % size
    inside = hit & (at >= start) & (at < stop)
    # of an empty box nothing is inside, though its start may lie between a vector's ends
    some = hit & (final >= start) & (first < stop) & (start < stop)
    whole = hit & (first >= start) & (final < stop)
    return inside, some, whole


@triton.jit(do_not_specialize=["N", "M", "lam_row"])
def _mix_fwd_kernel(
    x_ptr, lam_ptr, index_ptr, box_ptr, out_ptr,
    N, M, inner_size,
    x_row, out_row, lam_row, outer_stride, inner_stride,
    step0, size0, step1, size1, step2, size2,
    SPLIT: tl.constexpr, BOX: tl.constexpr, VECTOR: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(N, ROWS)
    row = ((tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]; addresses are int64
    e = (tl.program_id(0) // row_blocks).to(M.dtype) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    live = row < N
    mask = live & (e < M // ALIGN * ALIGN)
    at = _offset(e, inner_size, outer_stride, inner_stride, SPLIT)

    partner = tl.load(index_ptr + row, mask=live, other=0)
    known = (partner >= 0) & (partner < N)
    partner = tl.where(known, partner, 0)
    own = tl.load(lam_ptr + row * lam_row, mask=live, other=0)
    other = 1 - own
    read_own, read_other = mask & (own != 0), mask & (other != 0)
    if BOX > 0:
        inside, some, whole = _boxed(box_ptr, row, e, step0, size0, step1, size1, step2, size2, live, BOX, VECTOR)
        read_own = read_own & (whole == 0)
        read_other = read_other | (mask & some)
        own = tl.where(inside, 0, own)
        other = tl.where(inside, 1, other)
    x = tl.load(x_ptr + row * x_row * ALIGN + at, mask=read_own, other=0).to(own.dtype)
    y = tl.load(x_ptr + partner * x_row * ALIGN + at, mask=read_other, other=0).to(own.dtype)
    mixed = tl.where(own == 0, y, tl.where(other == 0, x, own * x + other * y))
    mixed = tl.where(known, mixed, float("nan"))
    tl.store(out_ptr + row * out_row * ALIGN + at, mixed.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "M", "lam_row"])
def _mix_bwd_kernel(
    g_ptr, x_ptr, lam_ptr, index_ptr, box_ptr, order_ptr, starts_ptr, dx_ptr, dlam_ptr,
    N, M, inner_size,
    g_row, x_row, dx_row, lam_row, outer_stride, inner_stride,
    step0, size0, step1, size1, step2, size2,
    NEED_DX: tl.constexpr, NEED_DLAM: tl.constexpr,
    SPLIT: tl.constexpr, BOX: tl.constexpr, VECTOR: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx[i] = lam[i]*g[i] + sum of (1-lam[k])*g[k] over the k with index[k] = i, in the order of k: those k are
    order[starts[i]:starts[i+1]], a stable sort of index, so no atomics and the same bits every time.
    dlam[i] = <g[i], x[i] - x[index[i]]> outside the box; this program adds its tile's share, dlam is [tiles, N]."""
    row_blocks = tl.cdiv(N, ROWS)
    row = ((tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    tile = tl.program_id(0) // row_blocks
    e = tile.to(M.dtype) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = row < N
    mask = live & (e < M // ALIGN * ALIGN)
    at = _offset(e, inner_size, outer_stride, inner_stride, SPLIT)
    own = tl.load(lam_ptr + row * lam_row, mask=live, other=0)
    weight = own
    read = mask & (own != 0)
    counts = mask  # of whom the gradient of lam is
    if BOX > 0:
        inside, some, whole = _boxed(box_ptr, row, e, step0, size0, step1, size1, step2, size2, live, BOX, VECTOR)
        weight = tl.where(inside, 0, own)
        read = read & (whole == 0)
        counts = mask & (whole == 0)
    if NEED_DLAM:  # once for both; whoever has no weight is not looked at
        g = tl.load(g_ptr + row * g_row * ALIGN + at, mask=counts, other=0).to(own.dtype)
    else:
        g = tl.load(g_ptr + row * g_row * ALIGN + at, mask=read, other=0).to(own.dtype)

    if NEED_DX:
        dx = tl.where(weight == 0, 0, weight * g)
        first = tl.load(starts_ptr + row, mask=live, other=0)
        count = tl.load(starts_ptr + row + 1, mask=live, other=0) - first
        for n in range(tl.max(count)):
            use = live & (n < count)
            k = tl.load(order_ptr + first + n, mask=use, other=0)
            share = 1 - tl.load(lam_ptr + k * lam_row, mask=use, other=1)
            wanted = mask & use & (share != 0)
            if BOX > 0:
                taken, some, whole = _boxed(box_ptr, k, e, step0, size0, step1, size1, step2, size2, use, BOX, VECTOR)
                share = tl.where(taken, 1, share)
                wanted = wanted | (mask & some)
            gk = tl.load(g_ptr + k * g_row * ALIGN + at, mask=wanted, other=0).to(own.dtype)
            dx += tl.where(share == 0, 0, share * gk)
        tl.store(dx_ptr + row * dx_row * ALIGN + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if NEED_DLAM:
        partner = tl.load(index_ptr + row, mask=live, other=0)
        known = (partner >= 0) & (partner < N)
        partner = tl.where(known, partner, 0)
        x = tl.load(x_ptr + row * x_row * ALIGN + at, mask=counts, other=0).to(own.dtype)
        y = tl.load(x_ptr + partner * x_row * ALIGN + at, mask=counts, other=0).to(own.dtype)
        share = g * (x - y)
        if BOX > 0:
            share = tl.where(inside, 0, share)
        share = tl.sum(share, axis=1)[:, None]
        tl.store(dlam_ptr + tile.to(tl.int64) * N + row, tl.where(known, share, float("nan")), mask=live)


def _dims(box):
    return 0 if box is None else box.shape[1] // 2


def _walks(rows, box, order):
    """Whether a chain is walked. Boxes need less of a row than that would read, and short rows share a program."""
    return CHAIN and order is not None and box is None and rows.per_program == 1


def _walk(order, index):
    """The order as a tensor: "flip" visits pairs one after the other, "roll" goes backwards."""
    if isinstance(order, torch.Tensor):
        return order.contiguous()
    rows = torch.arange(len(index), device=index.device)
    return rows.flip(0) if order == "roll" else torch.stack((rows, rows.flip(0)), 1).view(-1)[: len(rows)]


def mix_fwd(x, lam, index, box, out, order=None):
    """x [N, ...], lam [] or [N], index [N], box [N, 2*dims] or None -> out, in x's layout unless one is given. order: a
    permutation [N] in which a row's partner is often the next or the last row, "flip", "roll" or None."""
    index, lam = index.contiguous(), lam.resolve_neg()
    result, rows = walkable(torch.empty_like(x), _dims(box))
    x = _like(x, result)
    if out is not None and row_strides(out.shape, out.stride()) == rows.strides:
        result = out
    if result.numel() and _walks(rows, box, order):
        chain_fwd(rows, x, lam, index, _walk(order, index), result)
    elif result.numel():
        align, (x_row, out_row) = rows.args(x, result)
        with on_device_of(x):
            _mix_fwd_kernel[(blocks(x.shape[0], rows.per_program) * rows.tiles,)](
                x, lam, index, index if box is None else box, result,
                x.shape[0], rows.numel, rows.inner_size,
                x_row, out_row, lam.stride(0) if lam.dim() else 0, rows.outer_stride, rows.inner_stride, *rows.steps,
                SPLIT=rows.split, BOX=_dims(box), VECTOR=rows.vector_of(align), ALIGN=align, ROWS=rows.per_program, BLOCK=rows.block,
                num_warps=_launch.MIX_WARPS, **OPTIONS,
            )  # fmt: skip
    if out is not None and result is not out:
        return out.copy_(result)
    return result


def mix_bwd(g, x, lam, index, box, layout, need_dx, need_dlam, order=None):
    """Upstream g [N, ...] -> (dx in the layout of the strides given, or None; dlam [N] or None). x may be None unless dlam is
    needed."""
    index, lam = index.contiguous(), lam.resolve_neg()
    if need_dx:
        like = torch.empty_strided(g.shape, layout, dtype=g.dtype, device=g.device)
    else:
        like = torch.empty_like(x, device="meta")  # a dense layout, without its memory
    like, rows = walkable(like, _dims(box))
    if not g.numel():
        return like if need_dx else None, lam.new_zeros(g.shape[0]) if need_dlam else None
    g = _like(g, like)
    x = _like(x, like) if need_dlam else g
    dx = like if need_dx else g
    dlam = torch.empty((rows.tiles, g.shape[0]) if need_dlam else 0, dtype=lam.dtype, device=g.device)
    sources = starts = index
    if need_dx:
        targets, sources = index.sort(stable=True)
        starts = torch.searchsorted(targets, torch.arange(g.shape[0] + 1, device=g.device))
    if _walks(rows, box, order):
        chain_bwd(rows, g, x, lam, index, _walk(order, index), sources, starts, dx, dlam, need_dx, need_dlam)
        return dx if need_dx else None, dlam.sum(0) if need_dlam else None
    align, (g_row, x_row, dx_row) = rows.args(g, x, dx)
    with on_device_of(g):
        _mix_bwd_kernel[(blocks(g.shape[0], rows.per_program) * rows.tiles,)](
            g, x, lam, index, index if box is None else box, sources, starts, dx, dlam,
            g.shape[0], rows.numel, rows.inner_size,
            g_row, x_row, dx_row, lam.stride(0) if lam.dim() else 0, rows.outer_stride, rows.inner_stride, *rows.steps,
            NEED_DX=need_dx, NEED_DLAM=need_dlam,
            SPLIT=rows.split, BOX=_dims(box), VECTOR=rows.vector_of(align), ALIGN=align, ROWS=rows.per_program, BLOCK=rows.block,
            num_warps=_launch.MIX_WARPS, **OPTIONS,
        )  # fmt: skip
    return dx if need_dx else None, dlam.sum(0) if need_dlam else None
