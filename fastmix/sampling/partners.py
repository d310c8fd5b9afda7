"""Partners that a launch cannot find by itself: of the same or of another class, by sorts; of near labels, by Gumbel noise."""

import math
from typing import Any

import torch

from .. import _check
from . import draws
from .draws import cpu
from .labels import check_labels


def given(nodes: Any, samplers: Any, states: list[torch.Tensor], x: torch.Tensor, y: Any) -> torch.Tensor:
    """Returns the partners and groups [nodes, 2, N] that are not the launch's to find."""
    found, made, rows = [], {}, torch.arange(x.shape[0], device=x.device)
    for node, sampler in zip(nodes, samplers, strict=True):
        if node.partner == cpu.GIVEN:
            leaf, stream = sampler._leaves()[0], _pairing_stream(nodes, node)
            name = node.owner, stream, leaf.partner, leaf.per, leaf.bandwidth
            if name not in made and leaf.partner == "near":
                made[name] = near_partners(leaf.bandwidth, states[node.owner], rows, x, y)
            elif name not in made:
                made[name] = class_partners(leaf, states[node.owner], stream, rows, x, y)
            found += made[name]
        else:
            found += [rows, rows]
    return torch.stack(found).view(len(nodes), 2, x.shape[0])


def _pairing_stream(nodes: list[Any], node: Any) -> int:
    """Returns the stream by which a node's partners are picked: members that pairs choose from have the same ones."""
    stream = node.stream
    while node.parent >= 0:
        node = nodes[node.parent]
        stream = node.stream if node.per == cpu.EACH_PAIR else stream
    return stream


def class_partners(
    sampler: Any, state: torch.Tensor, stream: int, rows: torch.Tensor, x: torch.Tensor, y: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the partner of each row, and the number of the group that shares its draws under per="pair". Rows without a partner
    are their own."""
    N, pair = x.shape[0], sampler.per == "pair"
    keys, picks = draws.row_keys(state, N, stream, x)
    shuffled = keys.argsort(stable=True)
    key = y[shuffled]
    if pair and sampler.partner == "different":  # which classes meet is random too
        ordered = key.sort().values
        key = picks[torch.searchsorted(ordered, key)]
    order = shuffled[key.argsort(stable=True)]  # by class, in random order within each
    classes = y[order]
    if pair and sampler.partner == "different":
        # half the batch further on the class differs, unless it holds more than half; an odd batch's middle row stays alone
        at = torch.where(rows < N // 2, rows + (N + 1) // 2, torch.where(rows < (N + 1) // 2, rows, rows - (N + 1) // 2))
        return _back(order, rows, torch.where(classes[at] != classes, at, rows))
    first, last = torch.searchsorted(classes, classes), torch.searchsorted(classes, classes, right=True)
    if sampler.partner == "same":
        at = first + ((rows - first) ^ 1) if pair else torch.where(rows + 1 < last, rows + 1, first)
        at = torch.where(at < last, at, rows)
    else:  # anyone outside [first, last)
        others = N - (last - first)
        at = ((picks >> 31) * others) >> 32
        at = torch.where(others == 0, rows, torch.where(at < first, at, at + last - first))
    return _back(order, rows, at)


def checked_bandwidth(value: Any) -> Any:
    """Returns the deviation of near partners' weights, or None."""
    if value is not None and not 0 < _check.number("bandwidth", value) < math.inf:
        raise _check.wrong(ValueError, "bandwidth", "a positive number or None", value)
    return None if value is None else float(value)


def check_near(sampler: Any) -> None:
    """Checks that a sampler's options go together with near partners."""
    if sampler.partner == "near" and sampler.bandwidth is None:
        raise _check.wrong(ValueError, "bandwidth", "a number for partner='near' (Mixup and ManifoldMixup have one)", None)
    if sampler.partner == "near" and sampler.per == "pair":
        raise _check.wrong(
            ValueError, "per", "'row' or 'batch' for partner='near', whose rows do not pick each other", sampler.per
        )


def check_near_labels(x: torch.Tensor, y: Any) -> None:
    """Checks the numbers by which near partners are found."""
    check_labels(y, x.shape[0], x)
    if not y.is_floating_point():
        raise _check.wrong(TypeError, "y", "floating numbers [N] or [N, D] for partner='near'", y)


def near_partners(bandwidth: Any, state: torch.Tensor, rows: Any, x: torch.Tensor, y: Any) -> Any:
    """Returns each row's partner, drawn by exp(-|y_i - y_j|^2 / 2 bandwidth^2) among the others; groups of one. The largest of log
    weight + Gumbel noise is such a draw. A label that is not finite is nobody's partner, and its own."""
    N = x.shape[0]
    if N == 0:
        return rows, rows
    noise = -(-(draws.numbers(state, N, N, False, x) + 2.0**-54).log()).log()
    labels = y.detach().reshape(N, -1).double()
    distance = (labels.unsqueeze(1) - labels.unsqueeze(0)).square().sum(2)
    score = (noise - distance / (2 * bandwidth**2)).nan_to_num(nan=-math.inf, neginf=-math.inf)
    score = score.masked_fill(rows == rows.unsqueeze(1), -math.inf)
    best, index = score.max(1)
    return torch.where(best == -math.inf, rows, index), rows


def _back(order: torch.Tensor, rows: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns partners and groups of rows, from an order whose position p has its partner at at[p]."""
    back = torch.empty_like(order).scatter_(0, order, rows)
    return order[at][back], torch.minimum(rows, at)[back]
