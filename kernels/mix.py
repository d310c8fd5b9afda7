"""Batch mixing: kernels and their launchers.

    out[i] = lam[i] * x[i] + (1 - lam[i]) * x[index[i]]          outside row i's box
    out[i] = x[index[i]]                                         inside it

Rows are taken as stored: a row is an outer and an inner strided dimension (one, if it is contiguous), walked in memory
order, so a channels_last image is as good as a contiguous one. Programs are numbered rows first: when a tile of row i is
read a second time, as somebody's partner, the same tile of all rows was touched within a few MB, and the L2 serves it.
Memory floor: forward reads x and writes out; backward reads g, writes dx, and reads x once more for the gradient of lam.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ._launch import OPTIONS, blocks, common_alignment, on_device_of

TILE_BYTES = 8192  # of one operand: 64 bytes, or four 16-byte accesses, for each of 128 threads
PROGRAM_ELEMENTS = 1024  # at least: a program takes several rows where they are short
WARPS = 4


@triton.jit
def _offset(e, inner_size, outer_stride, inner_stride, SPLIT: tl.constexpr):
    """Where a row's e-th element, counted in memory order, is stored."""
    if SPLIT:
        offset = (e // inner_size).to(tl.int64) * outer_stride + (e % inner_size).to(tl.int64) * inner_stride
    else:
        offset = e.to(tl.int64) * inner_stride
    return offset


@triton.jit
def _inside(box_ptr, row, e, step0, size0, step1, size1, step2, size2, mask, BOX: tl.constexpr):
    """Whether the e-th element lies in the row's half-open box (starts, then stops) over BOX dimensions."""
    box = box_ptr + row * (2 * BOX)
    at = (e // step0) % size0
    inside = (at >= tl.load(box, mask=mask, other=0)) & (at < tl.load(box + BOX, mask=mask, other=0))
    if BOX > 1:
        at = (e // step1) % size1
        inside &= (at >= tl.load(box + 1, mask=mask, other=0)) & (at < tl.load(box + BOX + 1, mask=mask, other=0))
    if BOX > 2:
        at = (e // step2) % size2
        inside &= (at >= tl.load(box + 2, mask=mask, other=0)) & (at < tl.load(box + BOX + 2, mask=mask, other=0))
    return inside


@triton.jit(do_not_specialize=["N", "M", "lam_row"])
def _mix_fwd_kernel(
    x_ptr, lam_ptr, index_ptr, box_ptr, out_ptr,
    N, M, inner_size,
    x_row, out_row, lam_row, outer_stride, inner_stride,
    step0, size0, step1, size1, step2, size2,
    SPLIT: tl.constexpr, BOX: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
    if BOX > 0:
        inside = _inside(box_ptr, row, e, step0, size0, step1, size1, step2, size2, live, BOX)
        own = tl.where(inside, 0, own)
        other = tl.where(inside, 1, other)
    x = tl.load(x_ptr + row * x_row * ALIGN + at, mask=mask & (own != 0), other=0).to(own.dtype)
    y = tl.load(x_ptr + partner * x_row * ALIGN + at, mask=mask & (other != 0), other=0).to(own.dtype)
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
    SPLIT: tl.constexpr, BOX: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
    if BOX > 0:
        inside = _inside(box_ptr, row, e, step0, size0, step1, size1, step2, size2, live, BOX)
        weight = tl.where(inside, 0, own)

    if NEED_DX:
        g = tl.load(g_ptr + row * g_row * ALIGN + at, mask=mask & (weight != 0), other=0).to(own.dtype)
        dx = weight * g
        first = tl.load(starts_ptr + row, mask=live, other=0)
        count = tl.load(starts_ptr + row + 1, mask=live, other=0) - first
        for n in range(tl.max(count)):
            use = live & (n < count)
            k = tl.load(order_ptr + first + n, mask=use, other=0)
            share = 1 - tl.load(lam_ptr + k * lam_row, mask=use, other=1)
            if BOX > 0:
                taken = _inside(box_ptr, k, e, step0, size0, step1, size1, step2, size2, use, BOX)
                share = tl.where(taken, 1, share)
            gk = tl.load(g_ptr + k * g_row * ALIGN + at, mask=mask & use & (share != 0), other=0)
            dx += share * gk.to(own.dtype)
        tl.store(dx_ptr + row * dx_row * ALIGN + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if NEED_DLAM:
        counts = mask
        if BOX > 0:
            counts = mask & (inside == 0)
        partner = tl.load(index_ptr + row, mask=live, other=0)
        known = (partner >= 0) & (partner < N)
        partner = tl.where(known, partner, 0)
        g = tl.load(g_ptr + row * g_row * ALIGN + at, mask=counts, other=0).to(own.dtype)
        x = tl.load(x_ptr + row * x_row * ALIGN + at, mask=counts, other=0).to(own.dtype)
        y = tl.load(x_ptr + partner * x_row * ALIGN + at, mask=counts, other=0).to(own.dtype)
        share = tl.sum(g * (x - y), axis=1)[:, None]
        tl.store(dlam_ptr + tile.to(tl.int64) * N + row, tl.where(known, share, float("nan")), mask=live)


class _Rows:
    """How the rows of a dense result are stored, and the tiles that cover them. `strides` are those of the dimensions after the
    first that have more than one element: tensors for which they agree have rows of the same layout."""

    def __init__(self, shape, strides, itemsize, box_dims):
        dims = sorted(((strides[d], shape[d]) for d in range(1, len(shape)) if shape[d] != 1), reverse=True)
        merged: list[tuple[int, int]] = []
        for stride, size in dims:
            if merged and merged[-1][0] == stride * size:
                merged[-1] = (stride, merged[-1][1] * size)
            else:
                merged.append((stride, size))
        self.fits = len(merged) <= 2 and all(stride > 0 for stride, _ in merged)
        self.strides = row_strides(shape, strides)
        self.numel = math.prod(size for _, size in merged)
        self.split = len(merged) == 2
        self.outer_stride = merged[0][0] if self.split else 0
        self.inner_stride, self.inner_size = merged[-1] if merged else (1, 1)
        self.align = common_alignment(self.numel, *((self.outer_stride, self.inner_size) if self.split else ()))
        self.block = min(TILE_BYTES // itemsize, triton.next_power_of_2(max(self.numel, 1)))
        self.per_program = max(1, PROGRAM_ELEMENTS // self.block)
        self.tiles = blocks(self.numel, self.block)
        self.steps = _box_steps(shape, strides, box_dims)

    def args(self, *tensors):
        """(alignment, row strides in units of it)"""
        strides = [t.stride(0) for t in tensors]
        align = math.gcd(self.align, *strides)
        return align, [stride // align for stride in strides]


rows_of = functools.lru_cache(maxsize=1024)(_Rows)


@functools.lru_cache(maxsize=1024)
def row_strides(shape, strides):
    return [stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size != 1]


def _box_steps(shape, strides, count):
    """[step, size] of three dimensions, the last `count` of which are real: element e of a row, counted in memory order, has
    coordinate e // step % size along a dimension."""
    steps = []
    for d in range(len(shape) - count, len(shape)):
        inner = [shape[k] for k in range(1, len(shape)) if shape[k] != 1 and strides[k] < strides[d]]
        steps += [math.prod(inner) if shape[d] != 1 else 1, shape[d]]
    return steps + [1] * (6 - len(steps))


def _dims(box):
    return 0 if box is None else box.shape[1] // 2


def _like(t: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    """t, copied into the row layout of a dense tensor where it is stored differently."""
    same = row_strides(t.shape, t.stride()) == row_strides(layout.shape, layout.stride())
    return t.resolve_neg() if same else torch.empty_like(layout, device=t.device).copy_(t)


def mix_fwd(x, lam, index, box, out):
    """x [N, ...], lam [] or [N], index [N], box [N, 2*dims] or None -> out, in x's layout unless one is given."""
    index, lam = index.contiguous(), lam.resolve_neg()
    result = torch.empty_like(x)
    rows = rows_of(result.shape, result.stride(), x.element_size(), _dims(box))
    if not rows.fits:
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = rows_of(result.shape, result.stride(), x.element_size(), _dims(box))
    x = _like(x, result)
    if out is not None and row_strides(out.shape, out.stride()) == rows.strides:
        result = out
    if result.numel():
        align, (x_row, out_row) = rows.args(x, result)
        with on_device_of(x):
            _mix_fwd_kernel[(blocks(x.shape[0], rows.per_program) * rows.tiles,)](
                x, lam, index, index if box is None else box, result,
                x.shape[0], rows.numel, rows.inner_size,
                x_row, out_row, lam.stride(0) if lam.dim() else 0, rows.outer_stride, rows.inner_stride, *rows.steps,
                SPLIT=rows.split, BOX=_dims(box), ALIGN=align, ROWS=rows.per_program, BLOCK=rows.block,
                num_warps=WARPS, **OPTIONS,
            )  # fmt: skip
    if out is not None and result is not out:
        return out.copy_(result)
    return result


def mix_bwd(g, x, lam, index, box, layout, need_dx, need_dlam):
    """Upstream g [N, ...] -> (dx in the layout of the strides given, or None; dlam [N] or None). x may be None unless dlam is
    needed."""
    index, lam = index.contiguous(), lam.resolve_neg()
    if need_dx:
        like = torch.empty_strided(g.shape, layout, dtype=g.dtype, device=g.device)
    else:
        like = torch.empty_like(x, device="meta")  # a dense layout, without its memory
    rows = rows_of(like.shape, like.stride(), g.element_size(), _dims(box))
    if not rows.fits:
        like = torch.empty_like(like, memory_format=torch.contiguous_format)
        rows = rows_of(like.shape, like.stride(), g.element_size(), _dims(box))
    if not g.numel():
        return like if need_dx else None, lam.new_zeros(g.shape[0]) if need_dlam else None
    g = _like(g, like)
    x = _like(x, like) if need_dlam else g
    dx = like if need_dx else g
    align, (g_row, x_row, dx_row) = rows.args(g, x, dx)
    dlam = torch.empty((rows.tiles, g.shape[0]) if need_dlam else 0, dtype=lam.dtype, device=g.device)
    order = starts = index
    if need_dx:
        targets, order = index.sort(stable=True)
        starts = torch.searchsorted(targets, torch.arange(g.shape[0] + 1, device=g.device))
    with on_device_of(g):
        _mix_bwd_kernel[(blocks(g.shape[0], rows.per_program) * rows.tiles,)](
            g, x, lam, index, index if box is None else box, order, starts, dx, dlam,
            g.shape[0], rows.numel, rows.inner_size,
            g_row, x_row, dx_row, lam.stride(0) if lam.dim() else 0, rows.outer_stride, rows.inner_stride, *rows.steps,
            NEED_DX=need_dx, NEED_DLAM=need_dlam,
            SPLIT=rows.split, BOX=_dims(box), ALIGN=align, ROWS=rows.per_program, BLOCK=rows.block, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return dx if need_dx else None, dlam.sum(0) if need_dlam else None
