"""What samplers draw, in one launch: partners, lam, boxes, the choice among samplers, and the target.

    partner of row i    the row with the next larger random key; of the largest, the row with the smallest: one cycle
    q                   (U**(-1/a) - 1) * cos(2 pi V)**2
    lam ~ Beta(a, a)    (1 - sqrt(q/(1+q))) / 2 where cos(2 pi V) < 0, else 1 minus that (Devroye 1996, after Bailey)
    log Gamma(a)        log Gamma(a+1) - Exponential/a, by Marsaglia and Tsang (2000): for Beta(a, b) and Dirichlet

Random words are Philox4x64-10, keyed by a state and counted by (item + 1, batch, purpose, stream); `fastmix._torch.sample` says
what each word is for, and draws the same. Whatever decides something is computed on integers or in float64, so that all devices
decide alike; a result is rounded once. A state is four int64: two words of the key, the number of the batch, and how many programs
have finished. The last program to finish sets that back and moves the batch on: no program can read what another has moved.

No program needs another's results: each forms the keys of all rows anew, and counts. Memory floor: a few numbers a row are written,
labels are read twice; what a launch takes is its latency, and beyond MOST_COUNTED rows torch sorts the same keys.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from ._launch import OPTIONS, blocks, on_device_of

MOST_COUNTED = 4096  # rows whose partners are found by counting, which compares each key with each
ROWS = 16  # of a program: many multiprocessors share a batch, since float64 is slow on most GPUs
KEYS = 128  # that are compared with a program's rows at a time
SAMPLE_WARPS = 8  # eight pairs of keys a thread: with sixteen some programs spill
CELLS = 256
ROUNDS = 10  # of Philox
WARPS = 4

REST, LAM, BOX, SIDES, MASK, CHOICE_OF = (tl.constexpr(kind) for kind in range(6))
EACH_ROW, EACH_PAIR, EACH_BATCH = (tl.constexpr(per) for per in range(3))
ANY, FLIP, ROLL, GIVEN = (tl.constexpr(partner) for partner in range(4))
PROPORTIONAL, LARGER, OWN = (tl.constexpr(label) for label in range(3))

# numbers of a sampler in the table, and how many they are
KIND, OWNER, STREAM, PER, PARTNER_OF, LABEL, A, B, PROB, CORRECT, LEAST, MOST, PARENT, LOW, HIGH, FIELDS = (
    tl.constexpr(field) for field in range(16)
)

ROW, PLACE, CHOICE, PARTNER, CELL, GAMMA, CELL_GAMMA, WAYS, SKIP = (tl.constexpr(purpose) for purpose in range(9))
RETRY = tl.constexpr(256)
GAMMA_BLOCKS = tl.constexpr(8)
MOST_EXPONENT = tl.constexpr(690.0)
ONE = tl.constexpr(0x3FF0000000000000)
NO_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


class Sampled(NamedTuple):
    lam: torch.Tensor
    partner: torch.Tensor
    target_lam: torch.Tensor
    box: torch.Tensor | None
    order: torch.Tensor | None
    mask: torch.Tensor | None
    classes: torch.Tensor | None
    weights: torch.Tensor | None


class _Given(NamedTuple):
    """What a launch reads besides the states: the table, labels, partners and groups [nodes, 2, N], and, where keys are sorted,
    each owner's order and its inverse [owners, 2, N]."""

    table: torch.Tensor
    y: torch.Tensor | None
    partners: torch.Tensor | None
    sorted: torch.Tensor | None


class _Drawn(NamedTuple):
    """What a launch writes; of rows with a mask, `leaf` is the sampler's number, else -1, and `group` who shares the mask."""

    lam: torch.Tensor
    partner: torch.Tensor
    own: torch.Tensor
    box: torch.Tensor | None
    order: torch.Tensor | None
    classes: torch.Tensor | None
    weights: torch.Tensor | None
    leaf: torch.Tensor | None
    group: torch.Tensor | None


@triton.jit
def _words(item, purpose, stream, source):
    """Returns four random words of each item, uint64."""
    key0, key1, batch, rounds = source
    zero = item.to(tl.uint64) * 0
    c0, c1, c2, c3 = (item + 1).to(tl.uint64), zero + batch, zero + purpose, zero + stream.to(tl.uint64)
    key0, key1 = zero + key0, zero + key1
    # how many rounds there are is not a constant: unrolled, the kernels would be ten times as long, and spill the keys of all rounds
    for _ in range(rounds):
        c0, c1, c2, c3 = philox_impl(c0, c1, c2, c3, key0, key1, 1)
        key0 = tl.add(key0, 0x9E3779B97F4A7C15, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE8584CAA73B, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _state(states, owner, rounds, OWNERS: tl.constexpr):
    """Returns two words of the key and the batch of an owner, or of a tensor of owners; and the rounds of the generator."""
    key0, key1, batch = tl.load(states[0]), tl.load(states[0] + 1), tl.load(states[0] + 2)
    for s in tl.static_range(1, OWNERS):
        here = owner == s
        key0 = tl.where(here, tl.load(states[s]), key0)
        key1 = tl.where(here, tl.load(states[s] + 1), key1)
        batch = tl.where(here, tl.load(states[s] + 2), batch)
    return key0.to(tl.uint64), key1.to(tl.uint64), batch.to(tl.uint64), rounds


@triton.jit
def _move_on(states, SEEDED: tl.constexpr):
    """Counts this program as finished; the last one moves the first SEEDED states on to the next batch."""
    if SEEDED > 0:
        # all warps of this program have read the states before it counts as finished, and all programs before one of them writes
        tl.debug_barrier()
        if tl.atomic_add(states[0] + 3, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            for s in tl.static_range(SEEDED):
                tl.atomic_add(states[s] + 2, 1, sem="relaxed")
            tl.atomic_xchg(states[0] + 3, 0, sem="relaxed")


@triton.jit
def _unit(word):
    """Returns a number in (0, 1) of 52 bits of a word, float64."""
    return ((word >> 12) | ONE).to(tl.float64, bitcast=True) - (1 - 1.1102230246251565e-16)


@triton.jit
def _unit32(bits):
    """Returns a number in (0, 1) of 32 bits, float64."""
    return ((bits << 20) | ONE).to(tl.float64, bitcast=True) - (1 - 1.1641532182693481e-10)


@triton.jit
def _scaled(bits, size):
    """Returns an integer in [0, size) from 32 bits."""
    return (bits.to(tl.int64) * size) >> 32


@triton.jit
def _cosine(v):
    """Returns cos(2 pi v) for v in (0, 1), by the series of the sine from the cosine's zero: tl.cos would bring its reduction of
    large arguments, which spills."""
    y = 4 * tl.abs(v - 0.5) - 1
    z = y * y
    s = 2.571422892860474e-16 * z - 4.377065467313742e-14
    s = s * z + 6.0669357311061955e-12
    s = s * z - 6.688035109811468e-10
    s = s * z + 5.692172921967927e-08
    s = s * z - 3.598843235212085e-06
    s = s * z + 0.00016044118478735983
    s = s * z - 0.004681754135318688
    s = s * z + 0.07969262624616705
    s = s * z - 0.6459640975062463
    return y * (s * z + 1.5707963267948966)


@triton.jit
def _symmetric_beta(u, v, a):
    """Returns (lesser of lam and 1-lam, whether that is lam) of lam ~ Beta(a, a), from two words."""
    power = tl.minimum(-tl.log(_unit(u)) / a, MOST_EXPONENT)
    raised = tl.exp(power)
    # exp(power) - 1 without cancellation (Kahan)
    q = tl.where(raised == 1, power, (raised - 1) * power / tl.log(raised))
    cosine = _cosine(_unit(v))
    q = q * cosine * cosine
    return 0.5 / ((1 + q) * (1 + tl.sqrt(q / (1 + q)))), cosine < 0


@triton.jit
def _lesser(logit):
    """Returns (lesser of lam and 1-lam, whether that is lam) for lam = sigmoid(logit)."""
    e = tl.exp(-tl.abs(logit))
    return e / (1 + e), logit < 0


@triton.jit
def _try(normal, chance, d):
    """Returns (v, whether it is accepted): d*v is then a Gamma variable of shape d + 1/3."""
    v = 1 + normal / tl.sqrt(9 * d)
    square = normal * normal
    positive = v > 0
    v = tl.where(positive, v * v * v, 1.0)
    sure = chance < 1 - 0.0331 * (square * square)
    return v, positive & (sure | (tl.log(chance) < 0.5 * square + d * (1 - v + tl.log(v))))


@triton.jit
def _tries(normals, chances, d):
    """Returns (v, whether one of two tries was accepted) from two words."""
    radius = tl.sqrt(-2 * tl.log(_unit32(normals >> 32)))
    turn = _unit32(normals & 0xFFFFFFFF)
    quarter_before = tl.where(turn < 0.25, turn + 0.75, turn - 0.25)
    first, done = _try(radius * _cosine(turn), _unit32(chances >> 32), d)
    second, again = _try(radius * _cosine(quarter_before), _unit32(chances & 0xFFFFFFFF), d)
    return tl.where(done, first, tl.where(again, second, 1.0)), done | again


@triton.jit
def _log_gamma(item, purpose, stream, source, shape, wanted):
    """Returns logarithms of Gamma variables, where `wanted`."""
    d = shape + 0.6666666666666666
    normals, chances, wait, _ = _words(item, purpose, stream, source)
    v, done = _tries(normals, chances, d)
    left = wanted & (done == 0)
    block = 1
    while (tl.max(left.to(tl.int32)) > 0) & (block < GAMMA_BLOCKS):
        normals, chances, _, _ = _words(item, purpose + RETRY * block, stream, source)
        again, done = _tries(normals, chances, d)
        v = tl.where(left, again, v)
        left = left & (done == 0)
        block += 1
    return tl.log(d * v) + tl.log(_unit(wait)) / shape


@triton.jit
def _beta(u, v, item, purpose, stream, source, a, b, wanted):
    """Returns (lesser of lam and 1-lam, whether that is lam) of lam ~ Beta(a, b), where `wanted`."""
    least, low = _symmetric_beta(u, v, a)
    uneven = wanted & (a != b)
    if tl.max(uneven.to(tl.int32)) > 0:
        other, below = _lesser(_logit(item, purpose, stream, source, a, b, uneven))
        least = tl.where(uneven, other, least)
        low = tl.where(uneven, below, low)
    return least, low


@triton.jit
def _logit(item, purpose, stream, source, a, b, wanted):
    """Returns log(lam / (1-lam)) of lam ~ Beta(a, b), where `wanted`."""
    logit = a * 0
    for side in range(2):  # not unrolled: one copy of the code
        shape = tl.where(side == 0, a, b)
        log = _log_gamma(2 * item + side, purpose, stream, source, shape, wanted)
        logit += tl.where(side == 0, log, -log)
    return logit


@triton.jit
def _keys(row, source):
    """Returns 40 random bits of each row, above the 12 of its number."""
    word, _, _, _ = _words(row, ROW, row * 0, source)
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
def _chosen(states, table, row, nodes, rounds, OWNERS: tl.constexpr):
    """Returns the number of the sampler that each row uses."""
    chosen = row * 0
    for n in range(1, nodes):
        node = table + n * FIELDS
        up = tl.load(node + PARENT).to(tl.int64)
        parent = table + up * FIELDS
        source = _state(states, tl.load(parent + OWNER).to(tl.int32), rounds, OWNERS)
        item = tl.where(tl.load(parent + PER) == EACH_BATCH, row * 0, row)
        w0, w1, w2, w3 = _words(item >> 2, CHOICE, tl.load(parent + STREAM).to(tl.int64), source)
        at = item & 3
        word = tl.where(at == 0, w0, tl.where(at == 1, w1, tl.where(at == 2, w2, w3)))
        chance = (word >> 11).to(tl.int64).to(tl.float64)
        here = (chosen == up) & (chance >= tl.load(node + LOW)) & (chance < tl.load(node + HIGH))
        chosen = tl.where(here, n, chosen)
    return chosen


@triton.jit(do_not_specialize=["rows", "nodes", "size0", "size1", "size2", "rounds"])
def _sample_kernel(
    states, given, drawn, rows, nodes, size0, size1, size2, rounds,
    OWNERS: tl.constexpr, SEEDED: tl.constexpr, KEYED: tl.constexpr, PAIRS: tl.constexpr,
    DIMS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    chosen = _chosen(states, given.table, row, nodes, rounds, OWNERS)
    node = given.table + chosen * FIELDS
    kind = tl.load(node + KIND).to(tl.int32)
    owner = tl.load(node + OWNER).to(tl.int32)
    stream = tl.load(node + STREAM).to(tl.int64)
    per = tl.load(node + PER).to(tl.int32)
    partner = tl.load(node + PARTNER_OF).to(tl.int32)
    label = tl.load(node + LABEL).to(tl.int32)

    # partners, and the group whose draws a row takes
    pair = per == EACH_PAIR
    ring = tl.where(rows % 2 == 0, 0, 3)  # an odd number of rows has a ring of three (of one, if it is one) beside its pairs
    last = rows.to(tl.int64) - 1
    pairs = tl.maximum(rows // 2 - 1, 0)
    flipped = last - row
    rolled = tl.where(row == 0, last, row - 1)
    beside = row ^ 1
    beside = tl.where((row > last - ring) & (ring > 0), tl.where(row == last, tl.maximum(last - 2, 0), row + 1), beside)
    index = tl.where(partner == FLIP, flipped, tl.where(pair, beside, rolled))
    group = tl.where(partner == FLIP, tl.minimum(row, flipped), tl.minimum(row // 2, pairs))
    for s in tl.static_range(OWNERS):
        if (KEYED >> s) & 1:
            source = _state(states, s, rounds, OWNERS)
            rank, after, before, least = _neighbours(row, live, rows, source, given, s, PAIRS, KEYS)
            if drawn.order is not None:
                tl.store(drawn.order + rank, row, mask=live)
            if PAIRS:  # the first three of an odd number form the ring
                up = tl.where(rank < ring, rank < 2, (rank - ring) % 2 == 0)
                met = tl.where(up, after, tl.where(rank < ring, least, before))
                met = tl.where(pair, met, after)
                place = tl.where(rank < ring, 0, (rank - ring % 2) // 2)
            else:
                met = after
                place = rank
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
    source = _state(states, owner, rounds, OWNERS)
    _, chance, u, v = _words(group, ROW, stream, source)
    most = tl.ceil(tl.load(node + PROB) * 9007199254740992.0).to(tl.int64)
    mixed = ((chance >> 11).to(tl.int64) < most) & (kind != REST) & ((partner != GIVEN) | (index != row))
    a, b = tl.load(node + A), tl.load(node + B)
    least, low = _beta(u, v, group, GAMMA, stream, source, a, b, live & mixed & (kind != SIDES))
    rest = tl.where(low, 1 - least, least)  # 1 - lam
    lam = tl.where(mixed & (kind == LAM), tl.where(low, least, 1 - least), 1.0)
    own = lam

    if DIMS > 0:
        p0, p1, p2, _ = _words(group, PLACE, stream, source)
        if DIMS == 1:
            ratio = rest
        elif DIMS == 2:
            ratio = tl.sqrt(rest)
        else:
            ratio = tl.exp(tl.log(rest) / 3)
        whole = size0.to(tl.int64)
        inside = row * 0 + 1
        cut = mixed & ((kind == BOX) | (kind == SIDES))
        free = kind == SIDES
        for d in tl.static_range(DIMS):
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
            side = tl.where(free, shortest + _scaled(word & 0xFFFFFFFF, longest - shortest + 1), (ratio * size).to(tl.int64))
            start = tl.where(free, _scaled(word >> 32, size - side + 1), _scaled(word >> 32, size) - side // 2)
            stop = tl.where(cut, tl.minimum(start + side, size), 0)
            start = tl.where(cut, tl.maximum(start, 0), 0)
            inside *= stop - start
            tl.store(drawn.box + row * (2 * DIMS) + d, start, mask=live)
            tl.store(drawn.box + row * (2 * DIMS) + (DIMS + d), stop, mask=live)
        outside = 1 - inside.to(tl.float64) / tl.maximum(whole, 1).to(tl.float64)
        exact = free | (tl.load(node + CORRECT) != 0)
        own = tl.where(cut, tl.where(exact, outside, 1 - rest), own)

    own = _labelled(own, label)
    tl.store(drawn.lam + row, lam.to(drawn.lam.dtype.element_ty), mask=live)
    tl.store(drawn.partner + row, index, mask=live)
    _store_target(given.y, drawn, row, index, own, live)
    if drawn.leaf is not None:
        tl.store(drawn.leaf + row, tl.where(mixed & (kind == MASK), chosen, -1), mask=live)
        tl.store(drawn.group + row, group, mask=live)
    _move_on(states, SEEDED)


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
        source = _state(states, tl.load(node + OWNER).to(tl.int32), rounds, OWNERS)
        a, b = tl.load(node + A), tl.load(node + B)
        group = tl.load(drawn.group + row)
        total = tl.zeros((CELLS,), tl.float64)
        for first in range(0, cells, CELLS):
            cell = first + tl.arange(0, CELLS).to(tl.int64)
            inside = cell < cells
            u0, v0, u1, v1 = _words(group * ((cells + 1) // 2) + cell // 2, CELL, stream, source)
            u = tl.where(cell % 2 == 0, u0, u1)
            v = tl.where(cell % 2 == 0, v0, v1)
            shape0, shape1 = cell * 0.0 + a, cell * 0.0 + b
            item = group * cells + cell
            least, low = _beta(u, v, item, CELL_GAMMA, stream, source, shape0, shape1, inside)
            mask = tl.where(low, least, 1 - least).to(mask_ptr.dtype.element_ty)
            tl.store(mask_ptr + row * cells + cell, mask, mask=inside)
            total += tl.where(inside, mask.to(tl.float64), 0)
        mean = tl.sum(total) / tl.maximum(cells, 1).to(tl.float64)
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
    _move_on(states, SEEDED)


@triton.jit(do_not_specialize=["stream", "rows", "rounds"])
def _keys_kernel(states, key_ptr, pick_ptr, stream, rows, rounds, ROWS: tl.constexpr):
    """40 random bits of each row, by which rows are sorted, and 63 for the pick of a partner."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    source = _state(states, 0, rounds, 1)
    word, _, _, _ = _words(row, ROW, row * 0, source)
    tl.store(key_ptr + row, (word >> 24).to(tl.int64), mask=live)
    if pick_ptr is not None:
        word, _, _, _ = _words(row, PARTNER, row * 0 + stream, source)
        tl.store(pick_ptr + row, (word >> 1).to(tl.int64), mask=live)


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


@triton.jit(do_not_specialize=["rows", "rounds"])
def _dirichlet_kernel(states, shape_ptr, out_ptr, rows, rounds, WAYS_OF: tl.constexpr, SKIPS: tl.constexpr,
                      ROWS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """w ~ Dirichlet(alpha, ...): a softmax of logarithms of Gamma variables; with SKIPS (1-m, m*w) with m ~ Beta."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    way = tl.arange(0, LANES)[None, :]
    inside = live[:, None] & (way < WAYS_OF)
    source = _state(states, 0, rounds, 1)
    item = row[:, None] * WAYS_OF + way
    alpha = item * 0.0 + tl.load(shape_ptr)
    logs = _log_gamma(item, WAYS, item * 0, source, alpha, inside)
    logs = tl.where(way < WAYS_OF, logs, float("-inf"))
    weights = tl.exp(logs - tl.max(logs, 1)[:, None])
    weights /= tl.sum(weights, 1)[:, None]
    out = out_ptr + row * (WAYS_OF + SKIPS)
    if SKIPS:
        a, b = row * 0.0 + tl.load(shape_ptr + 1), row * 0.0 + tl.load(shape_ptr + 2)
        least, low = _lesser(_logit(row, SKIP, row * 0, source, a, b, live))
        weights *= tl.where(low, least, 1 - least)[:, None]
        tl.store(out, tl.where(low, 1 - least, least).to(out_ptr.dtype.element_ty), mask=live)
    tl.store(out[:, None] + (way + SKIPS), weights.to(out_ptr.dtype.element_ty), mask=inside)


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
    order = torch.empty_like(index) if plan.ordered else None
    leaf, group = (None, None) if plan.mask is None else (torch.empty_like(index), torch.empty_like(index))
    box = torch.empty((rows, 2 * plan.dims), dtype=torch.int64, device=device) if plan.dims else None
    classes = weights = None
    if y is not None:
        classes = torch.empty((rows, 2), dtype=torch.int64, device=device)
        weights = torch.empty((rows, 2), dtype=dtype, device=device)
        y = y.contiguous()
    sizes = (*x.shape[x.dim() - plan.dims :], 1, 1, 1)[:3] if plan.dims else (1, 1, 1)
    numbers = _numbers(table, device)
    order_by_rank = _sorted(states, plan.counted, rows, device) if plan.counted and rows > MOST_COUNTED else None
    with on_device_of(x):
        read = _Given(numbers, y, given, order_by_rank)
        wrote = _Drawn(lam, index, own, box, order, classes, weights, leaf, group)
        seeded = 0 if plan.mask is not None and rows else plan.seeded  # the masks' launch moves on, if there is one
        _sample_kernel[(max(blocks(rows, ROWS), 1),)](
            tuple(states), read, wrote, rows, numbers.shape[0], *sizes, ROUNDS,
            len(states), seeded, plan.counted, plan.pairs, plan.dims, ROWS, KEYS,
            num_warps=SAMPLE_WARPS if order_by_rank is None else WARPS, **OPTIONS,
        )  # fmt: skip
        mask = None
        if plan.mask is not None:
            mask = torch.empty((rows, *plan.mask), dtype=dtype, device=device)
            cells = plan.mask[0] * plan.mask[1]
            if rows:
                _mask_kernel[(rows,)](
                    tuple(states),
                    numbers,
                    wrote,
                    mask,
                    cells,
                    ROUNDS,
                    len(states),
                    plan.seeded,
                    CELLS,
                    num_warps=WARPS,
                    **OPTIONS,
                )
    return Sampled(lam, index, own, box, order, mask, classes, weights)


def soft_target(y, index, own):
    """Returns (classes [N, 2], weights [N, 2]) of labels y [N] and the shares `own` [N] of the rows themselves."""
    rows = y.shape[0]
    classes = torch.empty((rows, 2), dtype=torch.int64, device=y.device)
    weights = torch.empty((rows, 2), dtype=own.dtype, device=y.device)
    if rows:
        wrote = _Drawn(None, None, None, None, None, classes, weights, None, None)
        with on_device_of(y):
            _target_kernel[(blocks(rows, CELLS),)](
                y.contiguous(), index.contiguous(), own.contiguous(), wrote, rows, CELLS, num_warps=WARPS, **OPTIONS
            )
    return classes, weights


def row_keys(state, rows, stream, device):
    """Returns (keys, picks), int64 [N]: 40 random bits by which rows are sorted, and 63 for the pick of a partner."""
    keys, picks = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
    _launch_keys(state, keys, picks, stream, rows)
    return keys, picks


def _launch_keys(state, keys, picks, stream, rows):
    if rows:
        with on_device_of(keys):
            _keys_kernel[(blocks(rows, CELLS),)]((state,), keys, picks, stream, rows, ROUNDS, CELLS, num_warps=WARPS, **OPTIONS)


def _sorted(states, counted, rows, device):
    """Returns each owner's rows in the order of their keys, and the rows' places in it: [owners, 2, N]."""
    found = torch.empty((len(states), 2, rows), dtype=torch.int64, device=device)
    keys, numbers = torch.empty(rows, dtype=torch.int64, device=device), torch.arange(rows, device=device)
    for owner, state in enumerate(states):
        if counted >> owner & 1:
            _launch_keys(state, keys, None, 0, rows)
            found[owner, 0] = keys.argsort(stable=True)
            found[owner, 1].scatter_(0, found[owner, 0], numbers)
    return found


def dirichlet(state, rows, ways, alpha, skip, dtype, device):
    """Returns Dirichlet weights [rows, ways]; with `skip` (a, b) behind the share of the clean batch."""
    skips = int(skip is not None)
    out = torch.empty((rows, ways + skips), dtype=dtype, device=device)
    if rows:
        lanes = triton.next_power_of_2(ways)
        rows_of = max(1, KEYS // lanes)
        shapes = _numbers(((alpha, *(skip or ())),), device)
        with on_device_of(out):
            _dirichlet_kernel[(blocks(rows, rows_of),)](
                (state,), shapes, out, rows, ROUNDS, ways, skips, rows_of, lanes, num_warps=WARPS, **OPTIONS
            )
    return out


def _numbers(table, device):
    """Returns a table's numbers as a float64 tensor [nodes, fields] on a device, without waiting for it."""
    if isinstance(table, torch.Tensor):
        return table.contiguous()
    key = device, torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0
    return _kept_numbers(table, *key)


_tables: dict = {}


def _kept_numbers(table, device, stream):
    """Samplers whose numbers stay the same have their table on the device already."""
    found = _tables.get((table, device, stream))
    if found is None:
        if len(_tables) >= 256:  # a schedule's old numbers
            _tables.clear()
        found = torch.tensor(table, dtype=torch.float64)
        _tables[table, device, stream] = found = found.to(device, non_blocking=True)
    return found
