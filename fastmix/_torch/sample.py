"""What samplers make of random words: the form of the CPU, in NumPy.

    ROW           item: the row, or the group that shares its draws. Words: key of the row's partner, chance, U, V
    PLACE         where the group's box lies: 32 bits for each place, 32 for each side
    CHOICE        which sampler a row uses: the row's (or its pair's) word is number row % 4 of block row // 4
    PARTNER       the pick of a partner of another class
    CELL          U, V of two cells of a mask
    GAMMA, ...    a Gamma variable: words for two normal variables, two chances, and one exponential variable

Choices are made on integers and in float64, so that every device makes the same ones. `_draws` has the words and distributions.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from ._draws import (
    CELL,
    CELL_GAMMA,
    CHOICE,
    GAMMA,
    LOW_HALF,
    PARTNER,
    PLACE,
    ROW,
    THIRTY_TWO,
    lesser,
    log_gamma,
    random_words,
    scaled,
    symmetric_beta,
)

REST, LAM, BOX, SIDES, MASK, CHOICE_OF = range(6)  # kinds of nodes
EACH_ROW, EACH_PAIR, EACH_BATCH = range(3)
ANY, FLIP, ROLL, GIVEN = range(4)
PROPORTIONAL, LARGER, OWN, UNION = range(4)  # a launch draws the shares of UNION as those of PROPORTIONAL

_KEY_SHIFT = np.uint64(24)
_ROW_BITS = 23


class Node(NamedTuple):
    """A sampler as the launchers take it; a RandomMix and all below it are listed parents first."""

    kind: int
    owner: int  # which state it draws from
    stream: int
    per: int = EACH_ROW
    partner: int = ANY
    label: int = PROPORTIONAL
    a: float = 1.0
    b: float = 1.0
    prob: float = 1.0
    correct: int = 1
    least: float = 0.0
    most: float = 0.0
    parent: int = -1
    low: float = 0.0  # the parent's chances, of 2**53, for which it is chosen
    high: float = 0.0


class Plan(NamedTuple):
    """What a launch gives besides lam, index and the target's share, and what it reads."""

    seeded: int  # the first states, which move on to the next batch
    counted: int  # bits of the owners whose keys give partners
    pairs: bool  # whether some of these are pairs
    choosing: int  # the owner whose keys make the pairs that choose a sampler together; -1: none
    dims: int  # of the boxes; 0: none
    mask: tuple[int, int] | None  # cells of the masks
    double: bool  # results are float64
    permutes: bool = False  # partners are a permutation, whose inverse kernels give too


class Sampled(NamedTuple):
    lam: torch.Tensor
    partner: torch.Tensor
    target_lam: torch.Tensor
    box: torch.Tensor | None
    mask: torch.Tensor | None
    classes: torch.Tensor | None
    weights: torch.Tensor | None
    inverse: torch.Tensor | None = None  # of the partners, where they are a permutation: whose partner each row is


def state_device(device: torch.device) -> torch.device:
    """Returns where the generators' states are for tensors of a device."""
    return torch.device("cpu")


def sample_batch(states, table, x, y, given, plan: Plan) -> Sampled:
    """Draws how a batch x `[N, ...]` is mixed, and moves the first `plan.seeded` states on.

    Args:
        states: int64 tensors [4].
        table: a tuple of Nodes, or their numbers as a float64 tensor [nodes, 15].
        y: class indices [N] for the target, or None.
        given: [nodes, 2, N] int64: the partners and groups of nodes whose partner is GIVEN, or None.
    """
    if isinstance(table, torch.Tensor):
        table = nodes_of(table)
    rows, device = x.shape[0], x.device
    if device.type == "meta":
        return _on_meta(x, y, plan)
    draw = _Batch([state.numpy() for state in states], rows, x.shape, None if given is None else given.cpu().numpy(), plan)
    if len(table) == 1:
        lam, index, own, box, mask = draw.leaf(table[0], 0)
    else:
        lam, index, own, box, mask = draw.chosen(table)
    for state in draw.states[: plan.seeded]:
        state[2] += 1
    kept = np.float64 if plan.double else np.float32
    lam, own = (lam.astype(kept),) * 2 if lam is own else (lam.astype(kept), own.astype(kept))
    classes = weights = None
    if y is not None:
        labels = y.numpy() if y.is_cpu else y.cpu().numpy()
        classes, weights = _target(labels, index, own)
    found: Any = (lam, index, own, box, None if mask is None else mask.astype(kept), classes, weights)
    found = [None if t is None else torch.from_numpy(t) for t in found]
    return Sampled(*(found if device.type == "cpu" else [t if t is None else t.to(device, non_blocking=True) for t in found]))


def _on_meta(x, y, plan):
    """Returns tensors without values."""
    rows, device = x.shape[0], x.device
    numbers = {"dtype": torch.float64 if plan.double else torch.float32, "device": device}
    integers = {"dtype": torch.int64, "device": device}
    return Sampled(
        torch.empty(rows, **numbers),
        torch.empty(rows, **integers),
        torch.empty(rows, **numbers),
        torch.empty(rows, 2 * plan.dims, **integers) if plan.dims else None,
        torch.empty(rows, *plan.mask, **numbers) if plan.mask else None,
        None if y is None else torch.empty(rows, 2, **integers),
        None if y is None else torch.empty(rows, 2, **numbers),
    )


def soft_target(y, index, own):
    """Returns (classes [N, 2], weights [N, 2]) of labels y [N] and the shares `own` [N] of the rows themselves."""
    if not y.is_cpu:
        partner = y[index.clamp(0, max(y.shape[0] - 1, 0))]
        return torch.stack((y, partner), 1), torch.stack((own, 1 - own), 1)
    classes, weights = _target(y.numpy(), index.numpy(), own.numpy())
    return torch.from_numpy(classes), torch.from_numpy(weights)


def row_keys(state, rows, stream, device):
    """Returns (keys, picks), int64 [N]: 40 random bits by which rows are sorted, and 63 for the pick of a partner."""
    bits = state.numpy()
    keys = random_words(bits, ROW, 0, 0, rows)[:, 0] >> _KEY_SHIFT
    picks = random_words(bits, PARTNER, stream, 0, rows)[:, 0] >> np.uint64(1)
    return tuple(torch.from_numpy(words.view(np.int64)).to(device, non_blocking=True) for words in (keys, picks))


def pick(state, stream, choices):
    """Returns a number in [0, choices), and moves the state on."""
    bits = state.numpy()
    word = int(random_words(bits, CHOICE, stream, 0, 1)[0, 0])
    bits[2] += 1
    return word * choices >> 64


class _Batch:
    """The draws of one batch."""

    def __init__(self, states, rows, shape, given, plan):
        self.states, self.rows, self.given, self.plan = states, rows, given, plan
        self.sizes = shape[len(shape) - plan.dims :] if plan.dims else ()
        self.drawn = {}  # words by owner, purpose and stream
        self.orders = {}  # rows in the order of their keys, by owner

    def words(self, owner, purpose, stream, blocks):
        """Returns the first blocks of words, uint64 [blocks, 4]."""
        name = owner, purpose, stream
        words = self.drawn.get(name)
        if words is None or len(words) < blocks:
            self.drawn[name] = words = random_words(self.states[owner], purpose, stream, 0, blocks)
        return words if len(words) == blocks else words[:blocks]

    def order(self, owner):
        """Returns the rows in the order of their keys; equal ones in their own."""
        order = self.orders.get(owner)
        if order is None:
            keys = self.words(owner, ROW, 0, self.rows)[:, 0] >> _KEY_SHIFT
            if self.rows <= 2**_ROW_BITS:  # sorting numbers is faster than sorting what they belong to
                keys <<= np.uint64(_ROW_BITS)
                keys |= _row_numbers(self.rows)
                keys.sort()
                keys &= np.uint64(2**_ROW_BITS - 1)
                order = keys.view(np.int64)
            else:
                order = keys.argsort(kind="stable")
            self.orders[owner] = order
        return order

    def partners(self, node, number):
        """Returns (partner of each row, group of each row or None where every row is its own, how many groups)."""
        n, pair = self.rows, node.per == EACH_PAIR
        groups, count = (None, n) if node.per == EACH_ROW else (np.zeros(n, np.int64), min(n, 1))
        if node.partner == GIVEN:
            index, given = self.given[number]
            return (index, given, n) if pair else (index, groups, count)
        if node.partner == ANY:
            order = self.order(node.owner)
            index = np.empty(n, np.int64)
            if not pair:
                index[order[:-1]] = order[1:]
                index[order[-1:]] = order[:1]
                return index, groups, count
            ring = min(n, 3) if n % 2 else 0  # the first three of an odd number form a ring
            index[order[:ring]] = np.roll(order[:ring], -1)
            index[order[ring::2]], index[order[ring + 1 :: 2]] = order[ring + 1 :: 2], order[ring::2]
            groups = np.empty(n, np.int64)
            place = np.arange(n)
            groups[order] = np.where(place < ring, 0, (place - ring % 2) // 2)
            return index, groups, n // 2 or n
        place = np.arange(n)
        if node.partner == FLIP:
            index = place[::-1].copy()
            return (index, np.minimum(place, index), (n + 1) // 2) if pair else (index, groups, count)
        if not pair:
            return np.roll(place, 1), groups, count
        index = place ^ 1
        if n % 2:  # the last three form a ring
            index[max(n - 3, 0) :] = np.roll(place[max(n - 3, 0) :], -1)
        return index, np.minimum(place // 2, max(n // 2 - 1, 0)), n // 2 or n

    def leaf(self, node, number):
        """Returns (lam, index, target's share, box or None, mask or None) of a sampler for all rows, in float64."""
        n = self.rows
        index, groups, count = self.partners(node, number)
        words = self.words(node.owner, ROW, node.stream, n if node.partner == ANY and not node.stream else count)[:count]
        mixed = None
        if node.prob < 1:
            mixed = (words[:, 1] >> np.uint64(11)) < np.uint64(math.ceil(node.prob * 2**53))
            mixed = mixed if groups is None else mixed[groups]
        if node.partner == GIVEN:
            met = index != np.arange(n)
            mixed = met if mixed is None else mixed & met
        box = mask = None
        if node.kind == MASK:
            lam, mask = self.masks(node, groups, count, mixed)
            own = lam
        else:
            least = low = None
            if node.kind != SIDES:
                least, low = self.beta(node, words, count)
            if node.kind == LAM:
                lam = np.where(low, least, 1 - least)
                own = lam = self.spread(lam, groups, mixed)
            else:
                own, box = self.boxes(node, least, low, groups, count, mixed)
                lam = np.ones(n)
        if node.label in (LARGER, OWN):
            own = (own >= 0.5).astype(np.float64) if node.label == LARGER else np.ones(n)
        return lam, index, own, box, mask

    @staticmethod
    def spread(values, groups, mixed, rest=1):
        """Returns the rows' values of the groups' values; `rest` for rows that are not mixed."""
        values = values if groups is None else values[groups]
        if mixed is None:
            return values
        return np.where(mixed if values.ndim == 1 else mixed[:, None], values, rest)

    def beta(self, node, words, count):
        """Returns the lesser of lam and 1-lam, and whether it is lam, for every group."""
        if node.a == node.b:
            return symmetric_beta(words[:, 2:], node.a)
        logs = log_gamma(self.states[node.owner], GAMMA, node.stream, 2 * count, np.tile((node.a, node.b), count))
        return lesser(logs[::2] - logs[1::2])

    def boxes(self, node, least, low, groups, count, mixed):
        """Returns (target's shares, boxes)."""
        sizes, dims = self.sizes, self.plan.dims
        words = self.words(node.owner, PLACE, node.stream, count)
        box = np.empty((count, 2 * dims), np.int64)
        rest = inside = None
        if node.kind == BOX:
            rest = np.where(low, 1 - least, least)
            ratio = rest if dims == 1 else np.sqrt(rest) if dims == 2 else np.cbrt(rest)
        for d, size in enumerate(sizes):
            place = words[:, d] >> THIRTY_TWO
            if node.kind == BOX:
                side = (size * ratio).astype(np.int64)
                start = scaled(place, size) - (side >> 1)
                stop = start + side
                start, stop = np.maximum(start, 0), np.minimum(stop, size)
            else:
                shortest, longest = int(size * node.least), int(size * node.most)
                side = shortest + scaled(words[:, d] & LOW_HALF, longest - shortest + 1)
                start = scaled(place, size - side + 1)
                stop = start + side
            box[:, d], box[:, dims + d] = start, stop
            inside = stop - start if inside is None else inside * (stop - start)
        if node.kind == BOX and not node.correct:
            own = 1 - rest
        else:
            own = 1 - inside / max(math.prod(sizes), 1)
        return self.spread(own, groups, mixed), self.spread(box, groups, mixed, 0)

    def masks(self, node, groups, count, mixed):
        """Returns (means of the masks, masks [N, h, w] as they will be rounded)."""
        n, cells = self.rows, math.prod(self.plan.mask)
        if node.a == node.b:
            blocks = (cells + 1) // 2
            words = self.words(node.owner, CELL, node.stream, count * blocks).reshape(-1, 2)
            least, low = symmetric_beta(words, node.a)
            mask = np.where(low, least, 1 - least).reshape(count, 2 * blocks)[:, :cells]
        else:
            shapes = np.tile((node.a, node.b), count * cells)
            logs = log_gamma(self.states[node.owner], CELL_GAMMA, node.stream, 2 * count * cells, shapes)
            least, low = lesser(logs[::2] - logs[1::2])
            mask = np.where(low, least, 1 - least).reshape(count, cells)
        mask = self.spread(mask, groups, mixed)
        if not self.plan.double:
            mask = mask.astype(np.float32)
        lam = _mean(mask) if cells else np.ones(n)
        return lam, mask.reshape(n, *self.plan.mask)

    def chosen(self, table):
        """Returns what `leaf` does, of the sampler that each row uses."""
        n, plan = self.rows, self.plan
        chosen = np.zeros(n, np.int64)
        for number, node in enumerate(table):
            if number:
                chance = self.chance(table[node.parent], node.parent)
                chosen[(chosen == node.parent) & (chance >= node.low) & (chance < node.high)] = number
        lam, index, own = np.ones(n), np.arange(n), np.ones(n)
        box = np.zeros((n, 2 * plan.dims), np.int64) if plan.dims else None
        mask = np.ones((n, *plan.mask), np.float64 if plan.double else np.float32) if plan.mask else None
        for number, node in enumerate(table):
            use = chosen == number
            if node.kind in (REST, CHOICE_OF) or not use.any():
                continue
            found = self.leaf(node, number)
            for whole, part in zip((lam, index, own, box, mask), found, strict=True):
                if whole is not None and part is not None:
                    whole[use] = part[use]
            if mask is not None and found[4] is None:
                mask[use] = lam[use, None, None]
        return lam, index, own, box, mask

    def chance(self, node, number):
        """Returns the rows' chances of a RandomMix, of 2**53, in float64."""
        if node.per == EACH_BATCH:
            words = self.words(node.owner, CHOICE, node.stream, 1)[0, :1]
        else:
            words = self.words(node.owner, CHOICE, node.stream, (self.rows + 3) // 4).reshape(-1)[: self.rows]
            if node.per == EACH_PAIR:
                words = words[self.partners(node, number)[1]]
        return (words >> np.uint64(11)).astype(np.float64)


def _mean(mask):
    """Returns the means of rows of numbers in [0, 1], summed up as integers of 64 bits behind the point: in any order the same."""
    bits = mask.astype(np.float64) * 2.0**32
    high = bits.astype(np.int64)
    bits -= high
    bits *= 2.0**32
    total = high.sum(1) + bits.astype(np.int64).sum(1) * 2.0**-32
    return total * 2.0**-32 / mask.shape[1]


def _row_numbers(rows):
    return np.arange(rows, dtype=np.uint64)


def _target(y, index, own):
    classes = np.empty((len(y), 2), np.int64)
    classes[:, 0] = y
    classes[:, 1] = y[index]
    weights = np.empty((len(y), 2), own.dtype)
    weights[:, 0] = own
    np.subtract(1, own, out=weights[:, 1])
    return classes, weights


def nodes_of(table):
    """Returns a table of numbers as Nodes."""
    nodes = [Node(*row) for row in table.tolist()]
    whole = ("kind", "owner", "stream", "per", "partner", "label", "correct", "parent")
    return tuple(node._replace(**{name: int(getattr(node, name)) for name in whole}) for node in nodes)
