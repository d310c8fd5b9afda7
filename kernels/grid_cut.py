"""The cheapest labels of a grid of cells: the kernel and its launcher.

    E(l) = sum over cells of unary[l] + sum over edges of weight*(l - l')^2 / K^2        K = L-1, l in {0, ..., K}

    x' = ordered(x - tau*(d + sum of the cell's q)),    q' = clip(q + sigma*(2x' - x of both ends), -weight, weight)
    x, q <- x + 1.8*(x' - x), q + 1.8*(q' - q)

unary [N, n, n, L], vertical [N, n-1, n], horizontal [N, n, n-1] in float32; labels [N, n, n] int64 and a lower bound of the least
energy [N]. x holds K binaries a cell, x_k = [l >= k], d what each of them costs, and q a dual variable for each edge and pair of
binaries. `fastmix._torch.grid_cut` derives this. One program an image keeps all of it in registers; neighbours are read by tl.gather.
Then x is cut at several levels, the cheapest labels are kept, and every second row, then the others, then columns, are solved exactly
by dynamic programming. Memory floor: costs read and labels written once; the time is that of a chain of short dependent steps.
"""

import torch
import triton
import triton.language as tl

from ._launch import OPTIONS, cut_tile, on_device_of

RELAXATION = tl.constexpr(1.8)
PRIMAL_STEP = tl.constexpr(9.0)  # as in fastmix._torch.grid_cut
LEVELS = tl.constexpr(5)  # 0.5, 0.3, 0.7, 0.1, 0.9


@triton.jit
def _ordered(x, k, K: tl.constexpr):
    """The nearest x [binaries, cells] with 1 >= x_1 >= ... >= x_K >= 0: the min over i <= k of the max over j >= k of means."""
    if K == 2:
        mean = tl.sum(x, 0)[None, :] / 2
        x = tl.where(k == 0, tl.maximum(x, mean), tl.minimum(x, mean))
    if K == 3:
        a = tl.sum(tl.where(k == 0, x, 0), 0)[None, :]
        b = tl.sum(tl.where(k == 1, x, 0), 0)[None, :]
        c = tl.sum(tl.where(k == 2, x, 0), 0)[None, :]
        ab = (a + b) / 2
        bc = (b + c) / 2
        abc = (a + b + c) / 3
        middle = tl.minimum(tl.maximum(ab, abc), tl.maximum(b, bc))
        x = tl.where(k == 0, tl.maximum(a, tl.maximum(ab, abc)), tl.where(k == 1, middle, tl.minimum(c, tl.minimum(bc, abc))))
    return tl.minimum(tl.maximum(x, 0), 1)


@triton.jit
def _stepped(q, limit, ahead, neighbour, relaxation):
    """Duals [binaries, binaries of the neighbour, cells] after one step."""
    sigma = 0.5 / PRIMAL_STEP
    new = q + sigma * (ahead[:, None, :] - neighbour[None, :, :])
    new = tl.minimum(tl.maximum(new, -limit), limit)
    return q + relaxation * (new - q)


@triton.jit
def _bent(unary_ptr, i, l, weight_sum, mask, K: tl.constexpr):
    """unary[l] - the cell's weights * l*(K - l) / K^2, which goes with |x_k - x'_m|."""
    return tl.load(unary_ptr + i * (K + 1) + l, mask=mask, other=0) - weight_sum * (l * (K - l)).to(tl.float32) / (K * K)


@triton.jit
def _line_costs(unary_ptr, across_ptr, labels_ptr, line, pos, label, ROWS: tl.constexpr, n: tl.constexpr, L: tl.constexpr):
    """What each label [1, L] costs cells (line [lines, 1], pos) between the lines beside them."""
    LINE: tl.constexpr = n if ROWS else 1
    PLACE: tl.constexpr = 1 if ROWS else n
    EDGE: tl.constexpr = 1 if ROWS else n - 1  # from place to place, in the weights across lines
    cell = line * LINE + pos * PLACE
    edge = line * LINE + pos * EDGE
    here = line < n
    cost = tl.load(unary_ptr + cell * L + label, mask=here & (label < L), other=0)
    for side in tl.static_range(2):
        there = here & ((line > 0) if side == 0 else (line < n - 1))
        weight = tl.load(across_ptr + edge + (-LINE if side == 0 else 0), mask=there, other=0)
        beside = tl.load(labels_ptr + cell + (-LINE if side == 0 else LINE), mask=there, other=0)
        gap = (label - beside.to(tl.int32)).to(tl.float32) / (L - 1)
        cost += weight * gap * gap
    return tl.where(label < L, cost, float("inf"))


@triton.jit
def _solve_lines(
    unary_ptr, along_ptr, across_ptr, labels_ptr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    n: tl.constexpr, L: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Writes the cheapest labels of every second line from FIRST on, given the lines beside them. A word of `back` has two bits for each
    place: the label that the one before it has."""
    LABELS: tl.constexpr = triton.next_power_of_2(L)
    LINE: tl.constexpr = n if ROWS else 1
    PLACE: tl.constexpr = 1 if ROWS else n
    EDGES: tl.constexpr = n - 1 if ROWS else 1  # from line to line, in the weights along lines
    line = FIRST + 2 * tl.arange(0, LINES)[:, None]
    label = tl.arange(0, LABELS)[None, :]
    gap = (tl.arange(0, LABELS)[:, None] - tl.arange(0, LABELS)[None, :]).to(tl.float32) / (L - 1)
    bend = (gap * gap)[None, :, :]  # [1, from, to]
    total = _line_costs(unary_ptr, across_ptr, labels_ptr, line, 0, label, ROWS, n, L)
    back = tl.zeros([LINES, LABELS], dtype=tl.int32)
    for pos in range(1, n):
        weight = tl.load(along_ptr + line * EDGES + (pos - 1) * PLACE, mask=line < n, other=0)
        least, come = tl.min(total[:, :, None] + weight[:, :, None] * bend, 1, return_indices=True)
        total = least + _line_costs(unary_ptr, across_ptr, labels_ptr, line, pos, label, ROWS, n, L)
        back = back | (come.to(tl.int32) << (2 * pos))
    chosen = tl.argmin(total, 1, keep_dims=True).to(tl.int32)
    for place in range(n):
        pos = n - 1 - place
        tl.store(labels_ptr + line * LINE + pos * PLACE, chosen.to(tl.int64), mask=line < n)
        chosen = tl.sum(tl.where(label == chosen, (back >> (2 * pos)) & 3, 0), 1, keep_dims=True)


@triton.jit(do_not_specialize=["iterations"])
def _grid_cut_kernel(
    unary_ptr, vertical_ptr, horizontal_ptr, labels_ptr, bound_ptr, iterations,
    n: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = L - 1
    BINARIES: tl.constexpr = triton.next_power_of_2(K)
    image = tl.program_id(0).to(tl.int64)
    unary_ptr += image * (n * n * L)
    vertical_ptr += image * (n * (n - 1))
    horizontal_ptr += image * (n * (n - 1))
    labels_ptr += image * (n * n)
    i = tl.arange(0, BLOCK)
    here = i < n * n
    row = i // n
    col = i % n
    has_down = here & (row < n - 1)
    has_right = here & (col < n - 1)
    has_up = here & (row > 0)
    has_left = here & (col > 0)
    edge = row * (n - 1) + col
    down = tl.load(vertical_ptr + i, mask=has_down, other=0)
    right = tl.load(horizontal_ptr + edge, mask=has_right, other=0)
    weight_sum = down + right + tl.load(vertical_ptr + i - n, mask=has_up, other=0)
    weight_sum += tl.load(horizontal_ptr + edge - 1, mask=has_left, other=0)

    # costs in units of the image's mean weight
    scale = tl.sum(down + right, 0) / (max(2 * n * (n - 1), 1) * K * K)
    scale = tl.where(scale > 0, scale, 1)
    k = tl.arange(0, BINARIES)[:, None]
    mask = here[None, :] & (k < K)
    cells = i[None, :]
    d = _bent(unary_ptr, cells, k + 1, weight_sum[None, :], mask, K) - _bent(unary_ptr, cells, k, weight_sum[None, :], mask, K)
    d = tl.where(mask, d / scale, 0)
    pair = (k < K)[:, :, None] & (tl.arange(0, BINARIES) < K)[None, :, None]
    down_limit = tl.where(pair, (down / scale / (K * K))[None, None, :], 0)
    right_limit = tl.where(pair, (right / scale / (K * K))[None, None, :], 0)

    after_n = tl.broadcast_to(tl.where(has_down, i + n, i)[None, :], (BINARIES, BLOCK))
    after_1 = tl.broadcast_to(tl.where(has_right, i + 1, i)[None, :], (BINARIES, BLOCK))
    before_n = tl.broadcast_to(tl.where(has_up, i - n, i)[None, :], (BINARIES, BLOCK))
    before_1 = tl.broadcast_to(tl.where(has_left, i - 1, i)[None, :], (BINARIES, BLOCK))
    x = tl.full([BINARIES, BLOCK], 0.5, dtype=tl.float32)
    moved = x
    dual_sum = tl.zeros([BINARIES, BLOCK], dtype=tl.float32)
    q_down = tl.zeros([BINARIES, BINARIES, BLOCK], dtype=tl.float32)
    q_right = tl.zeros([BINARIES, BINARIES, BLOCK], dtype=tl.float32)
    for step in range(iterations):
        moved = _ordered(x - PRIMAL_STEP / (4 * K) * (d + dual_sum), k, K)
        ahead = 2 * moved - x
        x += RELAXATION * (moved - x)
        # the last q keeps its limits, so that it bounds the energy
        relaxation = tl.where(step + 1 < iterations, RELAXATION, 1.0)
        q_down = _stepped(q_down, down_limit, ahead, tl.gather(ahead, after_n, 1), relaxation)
        q_right = _stepped(q_right, right_limit, ahead, tl.gather(ahead, after_1, 1), relaxation)
        from_up = tl.gather(tl.sum(q_down, 0), before_n, 1)
        from_left = tl.gather(tl.sum(q_right, 0), before_1, 1)
        dual_sum = tl.sum(q_down, 1) + tl.sum(q_right, 1)
        dual_sum -= tl.where(has_up[None, :], from_up, 0) + tl.where(has_left[None, :], from_left, 0)

    bound = tl.full([BLOCK], float("inf"), dtype=tl.float32)
    for l in tl.static_range(L):
        cost = _bent(unary_ptr, i, tl.full([BLOCK], l, tl.int32), weight_sum, here, K)
        bound = tl.minimum(bound, cost + scale * tl.sum(tl.where(k < l, dual_sum, 0), 0))
    tl.store(bound_ptr + image, tl.sum(tl.where(here, bound, 0), 0))

    least = float("inf")
    best = tl.zeros([BLOCK], dtype=tl.int32)
    for t in tl.static_range(LEVELS):
        level = 0.5 + (0.2 - 0.4 * (t % 2)) * ((t + 1) // 2)
        label = tl.sum(((moved > level) & (k < K)).to(tl.int32), 0)
        to_down = (label - tl.gather(label, tl.where(has_down, i + n, i), 0)).to(tl.float32) / K
        to_right = (label - tl.gather(label, tl.where(has_right, i + 1, i), 0)).to(tl.float32) / K
        cost = tl.load(unary_ptr + i * L + label, mask=here, other=0)
        cost = tl.sum(cost + down * to_down * to_down + right * to_right * to_right, 0)
        best = tl.where(cost < least, label, best)
        least = tl.minimum(least, cost)
    tl.store(labels_ptr + i, best.to(tl.int64), mask=here)

    for FIRST in tl.static_range(2):
        tl.debug_barrier()
        _solve_lines(unary_ptr, horizontal_ptr, vertical_ptr, labels_ptr, FIRST, True, n, L, LINES)
    for FIRST in tl.static_range(2):
        tl.debug_barrier()
        _solve_lines(unary_ptr, vertical_ptr, horizontal_ptr, labels_ptr, FIRST, False, n, L, LINES)


def grid_cut(unary, vertical, horizontal, iterations):
    """Returns labels [N, n, n] int64 and a lower bound of the least energy [N], for n to 16: at 32 it would spill with
    any number of warps."""
    N, n, _, L = unary.shape
    labels = torch.empty(N, n, n, dtype=torch.int64, device=unary.device)
    bound = torch.empty(N, dtype=torch.float32, device=unary.device)
    block, warps = cut_tile(n, L)
    with on_device_of(unary):
        _grid_cut_kernel[(N,)](
            unary, vertical, horizontal, labels, bound, iterations, n, L, block, triton.next_power_of_2(max(n // 2, 1)),
            num_warps=warps, **OPTIONS,
        )  # fmt: skip
    return labels, bound
