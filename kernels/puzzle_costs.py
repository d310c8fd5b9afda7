"""What PuzzleMix's cut weighs, of a whole batch in one launch: the kernel and its launcher.

    share[i]         = saliency of image i, averaged over n x n blocks and divided by its sum
    unary[i, c, l]   = m*(share[j, c] + borders of j) + (1-m)*(share[i, c] + borders of i) + prior(l, lam[i]),    m = 1 - l/(L-1)
    weight[i, edge]  = max(b + slope*(D(i,j) + D(j,i) - D(i,i) - D(j,j)), 0),     slope = gamma*b/2

j = index[i]; D(a, b) is the mean absolute difference, over channels and along a border, of image a before it and image b behind it, in
pixels averaged over squares of neighbourhoods; a block's borders of a are slope*(D(a,i) + D(a,j)) or slope*(D(i,a) + D(j,a)). The public
function has the rest of the formula. x [N, C, H, W] and saliency [N, H, W] in any float dtype and strides; arithmetic and results float32.

One program an image: it sums both saliency maps over blocks, then goes along the borders, a lane a block; what a border costs the block
behind it is fetched by tl.gather. Sums have one order, so the same input gives the same bits.
Memory floor: saliency read once, x where it is within a neighbourhood of a border, and the results written. A program reads the
partner's maps and pixels too, and pixels of both of their borders each time: caches serve seven of eight reads where neighbourhoods fill the
blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._draws import numbers_of
from ._launch import constants, costs_tile, on_device_of, registers

WHOLE = tl.constexpr(1e4)  # as in fastmix._torch.puzzle_costs


class Images(NamedTuple):
    """Images, or maps of one channel: their strides."""

    ptr: torch.Tensor
    row: int
    channel: int
    y: int
    x: int


class Costs(NamedTuple):
    """What is written."""

    unary_ptr: torch.Tensor
    vertical_ptr: torch.Tensor
    horizontal_ptr: torch.Tensor
    share_ptr: torch.Tensor


class Blocks(NamedTuple):
    """n x n blocks of height x width pixels, neighbourhoods of h x w, and how many lines and neighbourhoods a tile has of each block."""

    n: tl.constexpr
    height: tl.constexpr
    width: tl.constexpr
    h: tl.constexpr
    w: tl.constexpr
    CELLS: tl.constexpr
    LINES: tl.constexpr
    PARTS: tl.constexpr


@triton.jit
def _sum_over(values):
    """Sums [cells, a, b] over the last two dimensions."""
    return tl.sum(tl.sum(values, 2), 1)


@triton.jit
def _shares(maps, row, cell, blocks):
    """The saliency of a row's blocks [cells], divided by its sum; uniform where that is 0."""
    n: tl.constexpr = blocks.n.value
    height: tl.constexpr = blocks.height.value
    width: tl.constexpr = blocks.width.value
    CELLS: tl.constexpr = blocks.CELLS.value
    LINES: tl.constexpr = blocks.LINES.value
    COLUMNS: tl.constexpr = triton.next_power_of_2(width)
    line = tl.arange(0, LINES)[None, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    here = (cell < n * n)[:, None, None] & (column < width)
    y = (cell // n * height).to(tl.int64)[:, None, None] + line
    x = (cell % n * width).to(tl.int64)[:, None, None] + column
    ptrs = maps.ptr + row * maps.row + y * maps.y + x * maps.x
    total = tl.zeros([CELLS, LINES, COLUMNS], dtype=tl.float32)
    for first in range(0, height, LINES):
        value = tl.load(ptrs, mask=here & (first + line < height), other=0)
        total += value.to(tl.float32)
        ptrs += LINES * maps.y
    mean = _sum_over(total) / (height * width)
    # divided by the largest first: a sum may overflow, and a small one underflow
    largest = tl.max(mean, 0)
    part = mean / tl.where(largest == 0, 1, largest)
    return tl.where(largest == 0, 1 / (n * n), part / tl.sum(part, 0))


@triton.jit
def _mean(images, row_ptr, y, x, mask, h: tl.constexpr, w: tl.constexpr):
    """Means [cells, parts] of neighbourhoods whose first pixels are at y, x [cells, parts]."""
    column = tl.arange(0, triton.next_power_of_2(w))[None, None, :]
    ptrs = row_ptr + y[:, :, None] * images.y + (x[:, :, None] + column) * images.x
    mask = mask[:, :, None] & (column < w)
    total = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    for _ in range(1, h):
        ptrs += images.y
        total += tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    return tl.sum(total, 2) / (h * w)


@triton.jit
def _borders(images, std_ptr, own, partner, cell, has_next, C, ROWS: tl.constexpr, blocks):
    """D of each cell's border with the one below (ROWS) or on the right of it: (own to own, own to partner, partner to own, partner to
    partner), [cells] each, 0 where there is no such border."""
    n: tl.constexpr = blocks.n.value
    height: tl.constexpr = blocks.height.value
    width: tl.constexpr = blocks.width.value
    h: tl.constexpr = blocks.h.value
    w: tl.constexpr = blocks.w.value
    CELLS: tl.constexpr = blocks.CELLS.value
    COUNT: tl.constexpr = width // w if ROWS else height // h
    PARTS: tl.constexpr = blocks.PARTS.value
    top = (cell // n * height).to(tl.int64)[:, None]
    left = (cell % n * width).to(tl.int64)[:, None]
    same = tl.zeros([CELLS, PARTS], dtype=tl.float32)
    away, back, other = same, same, same
    own_ptr = images.ptr + own * images.row
    partner_ptr = images.ptr + partner * images.row
    for c in range(C):
        std = tl.load(std_ptr + c).to(tl.float32)
        for first in range(0, COUNT, PARTS):
            part = first + tl.arange(0, PARTS)[None, :]
            mask = has_next[:, None] & (part < COUNT)
            if ROWS:
                y = top + height + part * 0
                x = left + part * w
            else:
                y = top + part * h
                x = left + width + part * 0
            y_before = y - h if ROWS else y
            x_before = x if ROWS else x - w
            own_before = _mean(images, own_ptr, y_before, x_before, mask, h, w)
            own_behind = _mean(images, own_ptr, y, x, mask, h, w)
            partner_before = _mean(images, partner_ptr, y_before, x_before, mask, h, w)
            partner_behind = _mean(images, partner_ptr, y, x, mask, h, w)
            same += std * tl.abs(own_before - own_behind)
            away += std * tl.abs(own_before - partner_behind)
            back += std * tl.abs(partner_before - own_behind)
            other += std * tl.abs(partner_before - partner_behind)
        own_ptr += images.channel
        partner_ptr += images.channel
    count = C * COUNT
    return tl.sum(same, 1) / count, tl.sum(away, 1) / count, tl.sum(back, 1) / count, tl.sum(other, 1) / count


@triton.jit
def _add_borders(keep_own, keep_partner, same, away, back, other, slope, cell, before, has_before):
    """What keeping either image costs, with a border that is behind each cell, and that of the cell `before` it."""
    keep_own += slope * (same + away)
    keep_partner += slope * (back + other)
    keep_own += tl.where(has_before, tl.gather(slope * (same + back), before, 0), 0)
    keep_partner += tl.where(has_before, tl.gather(slope * (away + other), before, 0), 0)
    return keep_own, keep_partner


@triton.jit
def _weight(same, away, back, other, b, slope):
    """The weight of a border. Of NaN it is NaN, which tl.maximum would drop."""
    weight = b + slope * (away + back - same - other)
    return tl.where(weight < 0, 0, weight)


@triton.jit(do_not_specialize=["N"])
def _puzzle_costs_kernel(
    images, maps, index_ptr, lam_ptr, lam_stride, std_ptr, costs, N, b, slope, prior, blocks, C: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    n: tl.constexpr = blocks.n.value
    CELLS: tl.constexpr = blocks.CELLS.value
    K: tl.constexpr = L - 1
    row = tl.program_id(0).to(tl.int64)
    partner = tl.load(index_ptr + row)
    partner = tl.minimum(tl.maximum(partner, 0), N - 1).to(tl.int64)
    cell = tl.arange(0, CELLS)
    here = cell < n * n
    has_down = cell < n * (n - 1)
    has_right = here & (cell % n < n - 1)

    # what is thrown away
    keep_partner = _shares(maps, row, cell, blocks)
    keep_own = _shares(maps, partner, cell, blocks)
    tl.store(costs.share_ptr + row * (n * n) + cell, keep_partner, mask=here)
    if n > 1:
        same, away, back, other = _borders(images, std_ptr, row, partner, cell, has_down, C, True, blocks)
        tl.store(costs.vertical_ptr + row * (n * (n - 1)) + cell, _weight(same, away, back, other, b, slope), mask=has_down)
        up = tl.where(cell < n, cell, cell - n)
        keep_own, keep_partner = _add_borders(keep_own, keep_partner, same, away, back, other, slope, cell, up, cell >= n)
        same, away, back, other = _borders(images, std_ptr, row, partner, cell, has_right, C, False, blocks)
        edge = cell // n * (n - 1) + cell % n
        tl.store(costs.horizontal_ptr + row * (n * (n - 1)) + edge, _weight(same, away, back, other, b, slope), mask=has_right)
        left = tl.where(cell % n == 0, cell, cell - 1)
        keep_own, keep_partner = _add_borders(keep_own, keep_partner, same, away, back, other, slope, cell, left, cell % n > 0)

    lam = tl.load(lam_ptr + row * lam_stride).to(tl.float32)
    own_prior = tl.where(lam > 0, -prior * tl.log(tl.where(lam > 0, lam, 1)), WHOLE)
    partner_prior = tl.where(1 - lam > 0, -prior * tl.log(tl.where(1 - lam > 0, 1 - lam, 1)), WHOLE)
    for l in tl.static_range(L):
        # of K to 3 the binomial coefficients between the ends are K
        rare = own_prior * (K - l) + partner_prior * l
        if l > 0 and l < K:
            rare -= prior * tl.log(K * 1.0)
        cost = keep_own + (l / K) * (keep_partner - keep_own) + rare
        tl.store(costs.unary_ptr + (row * (n * n) + cell) * L + l, cost, mask=here)


def puzzle_costs(x, saliency, index, lam, blocks, std, options):
    """Returns (unary [N, n, n, L], vertical [N, n-1, n], horizontal [N, n, n-1], shares of the saliency [N, n, n]), for 16 x 16
    blocks at most. lam [N] in any stride; options (levels, beta, gamma, eta, neighborhood)."""
    levels, beta, gamma, eta, neighborhood = options
    N, C, H, W = x.shape
    n, height, width = blocks, H // blocks, W // blocks
    h, w = min(neighborhood, height), min(neighborhood, width)
    unary, vertical, horizontal, shares = (
        torch.empty(N, *shape, dtype=torch.float32, device=x.device)
        for shape in ((n, n, levels), (n - 1, n), (n, n - 1), (n, n))
    )
    if N:
        cells, lines, parts, warps = costs_tile(n, height, width, w)
        std = numbers_of((std * C if len(std) == 1 else std,), x.device)
        b = beta / (16 * n)
        with on_device_of(x):
            _puzzle_costs_kernel[(N,)](
                Images(x, *x.stride()), Images(saliency, saliency.stride(0), 0, *saliency.stride()[1:]), index.contiguous(), lam,
                lam.stride(0), std, Costs(unary, vertical, horizontal, shares), N, b, b * gamma / 2, eta / n**2,
                Blocks(*constants(n, height, width, h, w, cells, lines, parts)), C, levels, num_warps=warps,
                **registers(128 if warps > 8 else 255),
            )  # fmt: skip
    return unary, vertical, horizontal, shares
