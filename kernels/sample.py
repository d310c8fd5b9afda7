"""What samplers draw, in one launch: partners, lam, boxes, the choice among samplers, and the target.

    partner of row i    the row with the next larger random key; of the largest, the row with the smallest: one cycle
    lam ~ Beta(a, b)    `_draws.beta`
    box                 sides size * (1-lam)**(1/d), rounded down, about a place drawn evenly, cut off at the border
    choice              the member for whose chances low <= chance < high

`fastmix._torch.sample` says what each random word is for, and draws the same. Whatever decides something is computed on integers
or in float64, so that all devices decide alike; a result is rounded once.

No program needs another's results: each forms the keys of all rows anew, and counts. Memory floor: a few numbers a row are written,
labels are read twice; what a launch takes is its latency, and beyond MOST_COUNTED rows torch sorts the same keys.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _launch
from ._draws import (
    CELL,
    CELL_GAMMA,
    CHOICE,
    EXACT,
    GAMMA,
    PLACE,
    ROUNDS,
    ROW,
    beta,
    move_on,
    numbers_of,
    scaled,
    source_of,
    words,
)
from ._launch import LOOPED_OPTIONS, OPTIONS, blocks, constants, on_device_of
from .row_keys import sort_rows

COUNTED = {**EXACT, "num_warps": _launch.COUNTING_WARPS}
SORTED = {**EXACT, **LOOPED_OPTIONS, "enable_fp_fusion": False, "num_warps": _launch.DRAW_WARPS}
MOST_COUNTED = 4096  # rows whose partners are found by counting, which compares each key with each

REST, LAM, BOX, SIDES, MASK, CHOICE_OF = (tl.constexpr(kind) for kind in range(6))
EACH_ROW, EACH_PAIR, EACH_BATCH = (tl.constexpr(per) for per in range(3))
ANY, FLIP, ROLL, GIVEN = (tl.constexpr(partner) for partner in range(4))
PROPORTIONAL, LARGER, OWN = (tl.constexpr(label) for label in range(3))

# numbers of a sampler in the table, and how many they are
KIND, OWNER, STREAM, PER, PARTNER_OF, LABEL, A, B, PROB, CORRECT, LEAST, MOST, PARENT, LOW, HIGH, FIELDS = (
    tl.constexpr(field) for field in range(16)
)

NO_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


class Sampled(NamedTuple):
    lam: torch.Tensor
    partner: torch.Tensor
    target_lam: torch.Tensor
    box: torch.Tensor | None
    mask: torch.Tensor | None
    classes: torch.Tensor | None
    weights: torch.Tensor | None
    inverse: torch.Tensor | None = None  # of the partners, where they are a permutation: whose partner each row is


class _Given(NamedTuple):
    """What a launch reads besides the states: the table, labels, partners and groups [nodes, 2, N], and, where keys are sorted,
    each owner's order and its inverse [owners, 2, N]."""

    table: torch.Tensor
    y: torch.Tensor | None
    partners: torch.Tensor | None
    sorted: torch.Tensor | None


class _How(NamedTuple):
    """What a launch is compiled for: how many states move on, bits of the owners whose keys give partners, whether some of these
    are pairs, the owner whose pairs choose together or -1, and the dimensions of a box."""

    SEEDED: tl.constexpr
    KEYED: tl.constexpr
    PAIRS: tl.constexpr
    CHOOSING: tl.constexpr
    DIMS: tl.constexpr


class _Drawn(NamedTuple):
    """What a launch writes; of rows with a mask, `leaf` is the sampler's number, else -1, and `group` who shares the mask."""

    lam: torch.Tensor
    partner: torch.Tensor
    own: torch.Tensor
    box: torch.Tensor | None
    classes: torch.Tensor | None
    weights: torch.Tensor | None
    leaf: torch.Tensor | None
    group: torch.Tensor | None
    inverse: torch.Tensor | None = None


@triton.jit
def _keys(row, source):
    """Returns 40 random bits of each row, above the 12 of its number."""
    word, _, _, _ = words(row, ROW, row * 0, source)
    return ((word >> 24 << 12).to(tl.int64)) | row


@triton.jit
def _neighbours(row, live, rows, source, given, OWNER: tl.constexpr, PAIRS: tl.constexpr, KEYS: tl.constexpr):
    """Returns (rank of each row's key, row of the next larger, next smaller and smallest key)."""
    if given.sorted is None:
        own = _keys(row, source)[:, None]
        smaller = (own * 0 + tl.zeros((1, KEYS), tl.int64)).to(tl.int32)
        larger = own * 0 + tl.full((1, KEYS), NO_KEY, tl.int64)
        lesser = larger
        least = tl.full((KEYS,), NO_KEY, tl.int64)
        for start in range(0, rows, KEYS):  # a thread keeps what it has found: rows are summed up once, behind the loop
            col = start + tl.arange(0, KEYS).to(tl.int64)
            key = tl.where(col < rows, _keys(col, source), NO_KEY)
            least = tl.minimum(least, key)
            key = key[None, :]
            smaller += (key < own).to(tl.int32)
            larger = tl.minimum(larger, tl.where(key > own, key, NO_KEY))
            if PAIRS:
                lesser = tl.minimum(lesser, tl.where(key < own, NO_KEY - key, NO_KEY))
        least = tl.min(least)
        rank = tl.sum(smaller, 1).to(tl.int64)
        after = tl.min(larger, 1)
        after = tl.where(after == NO_KEY, least, after) & 4095
        before = (NO_KEY - tl.min(lesser, 1)) & 4095
        least = least & 4095
    else:
        order = given.sorted + OWNER * 2 * rows.to(tl.int64)
        rank = tl.load(order + rows + row, mask=live, other=0)
        after = tl.load(order + tl.where(rank + 1 < rows, rank + 1, 0), mask=live, other=0)
        before = tl.load(order + tl.maximum(rank - 1, 0), mask=live, other=0)
        least = tl.load(order)
    return rank, after, before, least


@triton.jit
def _paired(rank, after, before, least, ring):
    """Returns (partner, number of the pair) where the order of the keys is cut into pairs; the first `ring` rows of it form one."""
    up = tl.where(rank < ring, rank < 2, (rank - ring) % 2 == 0)
    met = tl.where(up, after, tl.where(rank < ring, least, before))
    return met, tl.where(rank < ring, 0, (rank - ring % 2) // 2)


@triton.jit
def _placed_pair(row, rows, partner):
    """Returns the number of the row's pair where partners go by place."""
    flipped = rows.to(tl.int64) - 1 - row
    return tl.where(partner == FLIP, tl.minimum(row, flipped), tl.minimum(row // 2, tl.maximum(rows // 2 - 1, 0)))


@triton.jit
def _chosen(states, given, row, rows, pair, nodes, rounds, OWNERS: tl.constexpr):
    """Returns the number of the sampler that each row uses. `pair`: the number of the row's pair where keys make the pairs."""
    chosen = row * 0
    for n in range(1, nodes):
        node = given.table + n * FIELDS
        up = tl.load(node + PARENT).to(tl.int64)
        parent = given.table + up * FIELDS
        source = source_of(states, tl.load(parent + OWNER).to(tl.int32), rounds, OWNERS)
        per, partner = tl.load(parent + PER).to(tl.int32), tl.load(parent + PARTNER_OF).to(tl.int32)
        group = tl.where(partner == ANY, pair, _placed_pair(row, rows, partner))
        if given.partners is not None:
            use = (row < rows) & (partner == GIVEN)
            group = tl.where(use, tl.load(given.partners + (2 * up + 1) * rows + row, mask=use, other=0), group)
        item = tl.where(per == EACH_BATCH, 0, tl.where(per == EACH_PAIR, group, row))
        w0, w1, w2, w3 = words(item >> 2, CHOICE, tl.load(parent + STREAM).to(tl.int64), source)
        at = item & 3
        word = tl.where(at == 0, w0, tl.where(at == 1, w1, tl.where(at == 2, w2, w3)))
        chance = (word >> 11).to(tl.int64).to(tl.float64)
        here = (chosen == up) & (chance >= tl.load(node + LOW)) & (chance < tl.load(node + HIGH))
        chosen = tl.where(here, n, chosen)
    return chosen


@triton.jit(do_not_specialize=["rows", "nodes", "size0", "size1", "size2", "rounds"])
def _sample_kernel(
    states, given, drawn, how, rows, nodes, size0, size1, size2, rounds, OWNERS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    ring = tl.where(rows % 2 == 0, 0, 3)  # an odd number of rows has a ring of three (of one, if it is one) beside its pairs

    place = row
    if how.CHOOSING >= 0:
        source = source_of(states, how.CHOOSING, rounds, OWNERS)
        rank, after, before, least = _neighbours(row, live, rows, source, given, how.CHOOSING, how.PAIRS, KEYS)
        _, place = _paired(rank, after, before, least, ring)
    chosen = _chosen(states, given, row, rows, place, nodes, rounds, OWNERS)
    node = given.table + chosen * FIELDS
    kind = tl.load(node + KIND).to(tl.int32)
    owner = tl.load(node + OWNER).to(tl.int32)
    stream = tl.load(node + STREAM).to(tl.int64)
    per = tl.load(node + PER).to(tl.int32)
    partner = tl.load(node + PARTNER_OF).to(tl.int32)
    label = tl.load(node + LABEL).to(tl.int32)

    # partners, and the group whose draws a row takes
    pair = per == EACH_PAIR
    last = rows.to(tl.int64) - 1
    rolled = tl.where(row == 0, last, row - 1)
    beside = row ^ 1
    beside = tl.where((row > last - ring) & (ring > 0), tl.where(row == last, tl.maximum(last - 2, 0), row + 1), beside)
    index = tl.where(partner == FLIP, last - row, tl.where(pair, beside, rolled))
    group = _placed_pair(row, rows, partner)
    for s in tl.static_range(OWNERS):
        if (how.KEYED >> s) & 1:
            source = source_of(states, s, rounds, OWNERS)
            rank, after, before, least = _neighbours(row, live, rows, source, given, s, how.PAIRS, KEYS)
            met = after
            place = rank
            if how.PAIRS:
                met, place = _paired(rank, after, before, least, ring)
                met = tl.where(pair, met, after)
            here = (partner == ANY) & (owner == s)
            index = tl.where(here, met, index)
            group = tl.where(here, place, group)
    if given.partners is not None:
        at = given.partners + chosen * 2 * rows + row
        use = live & (partner == GIVEN)
        index = tl.where(use, tl.load(at, mask=use, other=0), index)
        group = tl.where(use, tl.load(at + rows, mask=use, other=0), group)
    index = tl.where(kind == REST, row, index)
    group = tl.where(per == EACH_ROW, row, tl.where(pair, group, 0))

    # who is mixed, and lam
    source = source_of(states, owner, rounds, OWNERS)
    _, chance, u, v = words(group, ROW, stream, source)
    most = tl.ceil(tl.load(node + PROB) * 9007199254740992.0).to(tl.int64)
    mixed = ((chance >> 11).to(tl.int64) < most) & (kind != REST) & ((partner != GIVEN) | (index != row))
    a, b = tl.load(node + A), tl.load(node + B)
    least, low = beta(u, v, group, GAMMA, stream, source, a, b, live & mixed & (kind != SIDES))
    rest = tl.where(low, 1 - least, least)  # 1 - lam
    lam = tl.where(mixed & (kind == LAM), tl.where(low, least, 1 - least), 1.0)
    own = lam

    if how.DIMS > 0:
        p0, p1, p2, _ = words(group, PLACE, stream, source)
        if how.DIMS == 1:
            ratio = rest
        elif how.DIMS == 2:
            ratio = tl.sqrt(rest)
        else:
            ratio = tl.exp(tl.log(rest) / 3)
        whole = size0.to(tl.int64)
        inside = row * 0 + 1
        cut = mixed & ((kind == BOX) | (kind == SIDES))
        free = kind == SIDES
        for d in tl.static_range(how.DIMS):
            word = p0
            size = size0.to(tl.int64)
            if d == 1:
                word = p1
                size = size1.to(tl.int64)
            if d == 2:
                word = p2
                size = size2.to(tl.int64)
            if d > 0:
                whole *= size
            shortest = (tl.load(node + LEAST) * size).to(tl.int64)
            longest = (tl.load(node + MOST) * size).to(tl.int64)
            side = tl.where(free, shortest + scaled(word & 0xFFFFFFFF, longest - shortest + 1), (ratio * size).to(tl.int64))
            start = tl.where(free, scaled(word >> 32, size - side + 1), scaled(word >> 32, size) - side // 2)
            stop = tl.where(cut, tl.minimum(start + side, size), 0)
            start = tl.where(cut, tl.maximum(start, 0), 0)
            inside *= stop - start
            tl.store(drawn.box + row * (2 * how.DIMS) + d, start, mask=live)
            tl.store(drawn.box + row * (2 * how.DIMS) + (how.DIMS + d), stop, mask=live)
        outside = 1 - inside.to(tl.float64) / tl.maximum(whole, 1).to(tl.float64)
        exact = free | (tl.load(node + CORRECT) != 0)
        own = tl.where(cut, tl.where(exact, outside, 1 - rest), own)

    own = _labelled(own, label)
    tl.store(drawn.lam + row, lam.to(drawn.lam.dtype.element_ty), mask=live)
    tl.store(drawn.partner + row, index, mask=live)
    if drawn.inverse is not None:
        tl.store(drawn.inverse + index, row, mask=live)
    _store_target(given.y, drawn, row, index, own, live)
    if drawn.leaf is not None:
        tl.store(drawn.leaf + row, tl.where(mixed & (kind == MASK), chosen, -1), mask=live)
        tl.store(drawn.group + row, group, mask=live)
    move_on(states, how.SEEDED)


@triton.jit
def _labelled(own, label):
    """Returns the target's share for the row's own share."""
    return tl.where(label == LARGER, (own >= 0.5).to(tl.float64), tl.where(label == OWN, 1.0, own))


@triton.jit
def _store_target(y_ptr, drawn, row, index, own, live):
    """Stores the target's shares and, where there are labels, its classes and weights."""
    own = own.to(drawn.own.dtype.element_ty)
    tl.store(drawn.own + row, own, mask=live)
    if drawn.classes is not None:
        tl.store(drawn.classes + 2 * row, tl.load(y_ptr + row, mask=live, other=0), mask=live)
        tl.store(drawn.classes + 2 * row + 1, tl.load(y_ptr + index, mask=live, other=0), mask=live)
    if drawn.weights is not None:
        tl.store(drawn.weights + 2 * row, own, mask=live)
        tl.store(drawn.weights + 2 * row + 1, 1 - own, mask=live)


@triton.jit(do_not_specialize=["cells", "rounds"])
def _mask_kernel(
    states, table_ptr, drawn, mask_ptr, cells, rounds, OWNERS: tl.constexpr, SEEDED: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The mask of one row, mean(mask) = lam, after the row's group and sampler have been drawn."""
    row = tl.program_id(0).to(tl.int64)
    leaf = tl.load(drawn.leaf + row)
    lam = tl.load(drawn.lam + row).to(tl.float64)
    if leaf >= 0:
        node = table_ptr + leaf * FIELDS
        stream = tl.load(node + STREAM).to(tl.int64)
        source = source_of(states, tl.load(node + OWNER).to(tl.int32), rounds, OWNERS)
        a, b = tl.load(node + A), tl.load(node + B)
        group = tl.load(drawn.group + row)
        # the mean's sum is of integers, 64 bits behind the point: its order changes nothing
        high_sum, low_sum = tl.zeros((CELLS,), tl.int64), tl.zeros((CELLS,), tl.int64)
        for first in range(0, cells, CELLS):
            cell = first + tl.arange(0, CELLS).to(tl.int64)
            inside = cell < cells
            u0, v0, u1, v1 = words(group * ((cells + 1) // 2) + cell // 2, CELL, stream, source)
            u = tl.where(cell % 2 == 0, u0, u1)
            v = tl.where(cell % 2 == 0, v0, v1)
            shape0, shape1 = cell * 0.0 + a, cell * 0.0 + b
            item = group * cells + cell
            least, low = beta(u, v, item, CELL_GAMMA, stream, source, shape0, shape1, inside)
            mask = tl.where(low, least, 1 - least).to(mask_ptr.dtype.element_ty)
            tl.store(mask_ptr + row * cells + cell, mask, mask=inside)
            bits = mask.to(tl.float64) * 4294967296.0
            high = bits.to(tl.int64)
            high_sum += tl.where(inside, high, 0)
            low_sum += tl.where(inside, ((bits - high.to(tl.float64)) * 4294967296.0).to(tl.int64), 0)
        total = tl.sum(high_sum).to(tl.float64) + tl.sum(low_sum).to(tl.float64) * 2.3283064365386963e-10
        mean = total * 2.3283064365386963e-10 / tl.maximum(cells, 1).to(tl.float64)
        lam = tl.where(cells > 0, mean, 1.0)
        own = _labelled(lam, tl.load(node + LABEL).to(tl.int32)).to(drawn.own.dtype.element_ty)
        tl.store(drawn.lam + row, lam.to(drawn.lam.dtype.element_ty))
        tl.store(drawn.own + row, own)
        if drawn.weights is not None:
            tl.store(drawn.weights + 2 * row, own)
            tl.store(drawn.weights + 2 * row + 1, 1 - own)
    else:
        for first in range(0, cells, CELLS):
            cell = first + tl.arange(0, CELLS).to(tl.int64)
            mask = (cell * 0.0 + lam).to(mask_ptr.dtype.element_ty)
            tl.store(mask_ptr + row * cells + cell, mask, mask=cell < cells)
    move_on(states, SEEDED)


@triton.jit(do_not_specialize=["rows"])
def _target_kernel(y_ptr, index_ptr, own_ptr, drawn, rows, ROWS: tl.constexpr):
    """classes[i] = (y[i], y[index[i]]), weights[i] = (own[i], 1 - own[i]); a partner out of range takes some row's label."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    partner = tl.load(index_ptr + row, mask=live, other=0)
    partner = tl.minimum(tl.maximum(partner, 0), rows.to(tl.int64) - 1)
    own = tl.load(own_ptr + row, mask=live, other=0)
    tl.store(drawn.classes + 2 * row, tl.load(y_ptr + row, mask=live, other=0), mask=live)
    tl.store(drawn.classes + 2 * row + 1, tl.load(y_ptr + partner, mask=live, other=0), mask=live)
    tl.store(drawn.weights + 2 * row, own, mask=live)
    tl.store(drawn.weights + 2 * row + 1, 1 - own, mask=live)


def state_device(device: torch.device) -> torch.device:
    """Returns where the generators' states are for tensors of a device."""
    return device


def sample_batch(states, table, x, y, given, plan) -> Sampled:
    """Draws how a batch x [N, ...] is mixed: see the torch backend's function of this name."""
    rows, device = x.shape[0], x.device
    dtype = torch.float64 if plan.double else torch.float32
    # each of its own: parts of one tensor would be aligned for some numbers of rows and not for others, and so compiled twice
    lam, own = (torch.empty(rows, dtype=dtype, device=device) for _ in range(2))
    index = torch.empty(rows, dtype=torch.int64, device=device)
    inverse = torch.empty_like(index) if plan.permutes else None
    leaf, group = (None, None) if plan.mask is None else (torch.empty_like(index), torch.empty_like(index))
    box = torch.empty((rows, 2 * plan.dims), dtype=torch.int64, device=device) if plan.dims else None
    classes = weights = None
    if y is not None:
        classes = torch.empty((rows, 2), dtype=torch.int64, device=device)
        weights = torch.empty((rows, 2), dtype=dtype, device=device)
        y = y.contiguous()
    sizes = (*x.shape[x.dim() - plan.dims :], 1, 1, 1)[:3] if plan.dims else (1, 1, 1)
    numbers = numbers_of(table, device)
    order_by_rank = sort_rows(states, plan.counted, rows, device) if plan.counted and rows > MOST_COUNTED else None
    with on_device_of(x):
        read = _Given(numbers, y, given, order_by_rank)
        wrote = _Drawn(lam, index, own, box, classes, weights, leaf, group, inverse)
        seeded = 0 if plan.mask is not None and rows else plan.seeded  # the masks' launch moves on, if there is one
        how = _How(*constants(seeded, plan.counted, plan.pairs, plan.choosing, plan.dims))
        _sample_kernel[(max(blocks(rows, _launch.DRAWN_ROWS), 1),)](
            tuple(states), read, wrote, how, rows, numbers.shape[0], *sizes, ROUNDS,
            len(states), _launch.DRAWN_ROWS, _launch.KEYS,
            **(COUNTED if order_by_rank is None else SORTED),
        )  # fmt: skip
        mask = None
        if plan.mask is not None:
            mask = torch.empty((rows, *plan.mask), dtype=dtype, device=device)
            cells = plan.mask[0] * plan.mask[1]
            if rows:
                _mask_kernel[(rows,)](
                    tuple(states), numbers, wrote, mask, cells, ROUNDS,
                    len(states), plan.seeded, _launch.CELLS, num_warps=_launch.DRAW_WARPS, **EXACT,
                )  # fmt: skip
    return Sampled(lam, index, own, box, mask, classes, weights, inverse)


def soft_target(y, index, own):
    """Returns (classes [N, 2], weights [N, 2]) of labels y [N] and the shares `own` [N] of the rows themselves."""
    rows = y.shape[0]
    classes = torch.empty((rows, 2), dtype=torch.int64, device=y.device)
    weights = torch.empty((rows, 2), dtype=own.dtype, device=y.device)
    if rows:
        wrote = _Drawn(None, None, None, None, classes, weights, None, None)
        with on_device_of(y):
            _target_kernel[(blocks(rows, _launch.KEYED_ROWS),)](
                y.contiguous(), index.contiguous(), own.contiguous(), wrote, rows,
                _launch.KEYED_ROWS, num_warps=_launch.DRAW_WARPS, **OPTIONS,
            )  # fmt: skip
    return classes, weights
