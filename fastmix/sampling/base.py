"""What samplers share: how they are called, their random streams, partners, and the checks of their options."""

from __future__ import annotations

import numbers
import sys
from typing import Any, NamedTuple

import torch

from .. import _check
from .._dtypes import accumulator
from ..targets import MixedRows, SoftTarget
from . import draws
from .axes import axes_last
from .draws import Node, Plan, cpu
from .labels import MISSING, check_given, check_labels, unchecked_target
from .partners import check_near, check_near_labels, checked_bandwidth, given
from .plan import Mix
from .stream import Stream, last_change

PER = {"row": cpu.EACH_ROW, "pair": cpu.EACH_PAIR, "batch": cpu.EACH_BATCH}
PARTNERS = {"any": cpu.ANY, "same": cpu.GIVEN, "different": cpu.GIVEN, "near": cpu.GIVEN, "flip": cpu.FLIP, "roll": cpu.ROLL}
LABELS = {"proportional": cpu.PROPORTIONAL, "larger": cpu.LARGER, "own": cpu.OWN, "union": cpu.UNION}


class _Prepared(NamedTuple):
    """What the draws for batches of one form have in common, until an option of a sampler changes."""

    owners: list[Sampler]
    nodes: tuple[Node, ...]
    samplers: list[Sampler]  # of the nodes
    plan: Plan
    axes: tuple[int, ...] | None
    labels: tuple[int, ...]
    given: bool  # whether partners are found before the launch
    lam_is_share: bool  # whether the target's share is lam


class Sampler(Stream):
    """The base of all samplers: how they are called, and their random stream.

    A sampler defines `_add`, which lists it (and what it chooses from) for the launch, and in `_check_batch` what has to hold for
    its draws.
    """

    alpha: Any  # a number or two, kept as two
    prob: Any
    per: Any
    partner: Any
    label: Any
    minmax: Any
    size: Any
    _numbers: Any
    _ratios: Any
    _limits: Any
    _alone: str | None = None  # why a RandomMix cannot have it among others, for the error

    def sample(self, x: torch.Tensor, y: torch.Tensor | None = None, *, generator: torch.Generator | None = None) -> Mix:
        """Draws how to mix a batch `x` `[N, ...]`, of which only shape, dtype and device matter.

        Args:
            x: the batch.
            y: class indices `[N]`, needed for `partner="same"` and `"different"`; numbers for `"near"`.
            generator: draws a key from it instead of using the sampler's own stream (or the device's default generator).
        """
        if not isinstance(x, torch.Tensor):
            raise _check.wrong(TypeError, "x", "a tensor [N, ...]", x)
        if x.dim() < 1:
            raise _check.wrong(ValueError, "x", "a tensor [N, ...]", x)
        self._check_call(x, y, generator)
        return self._sample(x, y, generator, None)[0]

    def _check_call(self, x: Any, y: torch.Tensor | None, generator: Any) -> None:
        if generator is not None:
            if not isinstance(generator, torch.Generator):
                raise _check.wrong(TypeError, "generator", "a torch.Generator", generator)
            if generator.device.type != x.device.type:
                raise ValueError(f"generator: expected one on {x.device}, as x, got one on {generator.device}")

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor = MISSING,
        *,
        generator: torch.Generator | None = None,
        partner: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, SoftTarget | MixedRows | torch.Tensor]:
        """(mixed x, mixed target); in eval mode `x` and `y` as they are.

        `partner`: `(x2, y2)`, a batch as x and labels as y, whose row i is row i's partner: a balanced or an unlabelled second
        loader's, with labels of its own or of a teacher. The sampler then draws shares, boxes and masks alone.
        """
        if not self.training:
            return x, y
        _check.float_tensor("x", x, 1, "[N, ...]")
        check_given(y=y)
        check_labels(y, x.shape[0], x)
        self._check_call(x, y, generator)
        if partner is not None:
            self._check_partner(partner, x)
            drawn = self._sample(x, y, generator, None)[0]
            return drawn.apply(x, partner=partner[0]), drawn.target(y, partner=partner[1])
        whole = y.dim() == 1 and y.dtype == torch.int64 and not _check.functional_transform() and not self._unites()
        drawn, target = self._sample(x, y, generator, y if whole else None)
        return drawn._apply_to_sampled(x), drawn.target(y) if target is None else target

    def _check_partner(self, partner: Any, x: torch.Tensor) -> None:
        """Raises unless a batch of its own and its labels may take the partners' place."""
        if not isinstance(partner, (tuple, list)) or len(partner) != 2:
            raise _check.wrong(TypeError, "partner", "a pair (x2, y2)", partner)
        check_labels(partner[1], x.shape[0], x, "partner")  # without them the target would be of rows that are not mixed
        for leaf in self._leaves():
            if PARTNERS[leaf.partner] == cpu.GIVEN:
                expected = f"None beside partner={leaf.partner!r}, which looks for partners in the batch itself"
                raise _check.wrong(ValueError, "partner", expected, partner)

    def _sample(self, x: Any, y: torch.Tensor | None, generator: Any, labels: torch.Tensor | None) -> Any:
        """Returns (Mix, SoftTarget of these labels or None) for checked arguments."""
        if not self.training:
            N, dtype = x.shape[0], accumulator(x.dtype)
            return Mix(torch.ones(N, dtype=dtype, device=x.device), torch.arange(N, device=x.device)), None
        transformed = _check.transformed()
        traced = transformed and not _check.functional_transform()
        prepared = self._prepare(x, y, generator is None, transformed)
        owners, nodes, samplers, plan, axes, label_kinds, is_given, lam_is_share = prepared
        view = axes_last("x", x, axes)
        # on the host for every backend of the CPU
        place = x.device if x.is_cpu else draws.state_device(x.device)
        if owners:
            self._count_rows(owners, x.shape[0])
        states = [owner._own_state(place) for owner in owners]
        if self._state is None or generator is not None:
            key = draws.fresh_state(place, generator)
            states.append(key if key.device == place else key.to(place))
        known = given(nodes, samplers, states, x, y) if is_given else None
        table: Any = _traced_table(nodes, samplers, place) if traced else nodes
        more = None if self._alone is None else self._draw_more(states[0], x)  # before the launch, which moves the states on
        found = draws.sample(tuple(states), table, view, labels, known, plan)
        drawn = Mix._of_sample(found)
        if lam_is_share:
            drawn._target_lam = drawn._lam  # one tensor: a gradient to lam is one to the target, too
        if plan.dims:
            drawn._sizes, drawn.axes = view.shape[view.dim() - plan.dims :], axes
        drawn._shape, drawn._labels = x.shape, label_kinds
        if self._alone is not None:
            return self._finish(drawn, more, x), None
        if x.shape[0] == 1:  # a single row is its own partner: nothing of another is in it
            drawn._drawn_share = found.target_lam
            drawn._target_lam = torch.ones_like(found.target_lam)
            if found.weights is not None:
                found = found._replace(weights=torch.stack((drawn._target_lam, 1 - drawn._target_lam), 1))
        return drawn, None if labels is None else unchecked_target(found.classes, found.weights)

    def _prepare(self, x: torch.Tensor, y: torch.Tensor | None, seeded: bool, transformed: bool) -> _Prepared:
        """Checks a batch, and returns what its draw needs besides the states. It is kept: while options and the form of the batch stay
        the same, only labels by which partners are found are looked at again."""
        form = None
        if not transformed:
            family = self._family()
            form = last_change((self, *family)), family, seeded, x.shape, x.dtype
        kept, prepared = self.__dict__.get("_kept", (None, None))
        if form is not None and kept == form:
            if prepared.given:
                self._check_batch(x, y)
            return prepared
        self._check_batch(x, y)
        owners = self._owners() if seeded else []
        nodes: list[Node] = []
        samplers: list[Sampler] = []
        self._list(nodes, samplers, owners, len(owners), 0)
        axes = self._axes()
        plan = self._plan(axes_last("x", x, axes), nodes, len(owners), axes)
        labels = tuple({node.label for node in nodes if node.kind not in (cpu.CHOICE_OF, cpu.REST)})
        is_given = any(node.partner == cpu.GIVEN for node in nodes)
        lam_is_share = len(nodes) == 1 and nodes[0].kind == cpu.LAM and self.label == "proportional"
        prepared = _Prepared(owners, tuple(nodes), samplers, plan, axes, labels, is_given, lam_is_share)
        if form is not None:
            self.__dict__["_kept"] = form, prepared
        return prepared

    def _family(self) -> tuple[Sampler, ...]:
        """Returns the samplers that this one chooses from, and those that they choose from."""
        return ()

    def _draw_more(self, state: torch.Tensor, x: torch.Tensor) -> Any:
        """Returns what a sampler draws besides what the launch does."""
        return None

    def _finish(self, drawn: Mix, more: Any, x: torch.Tensor) -> Any:
        """Returns the Mix of a sampler that RandomMix cannot have, made of what the launch drew, lam and partners, and of that."""
        return drawn

    def _owners(self) -> list[Sampler]:
        """Returns the samplers with a stream of their own, among this one and those that it chooses from."""
        return [] if self._state is None else [self]

    def _list(
        self,
        nodes: list[Node],
        samplers: list[Any],
        owners: list[Any],
        owner: int,
        first: int,
        parent: int = -1,
        low: float = 0.0,
        high: float = 0.0,
    ) -> None:
        """Lists this sampler's nodes. `owner`: the number of the state that it draws from where it has none of its own, whose
        first node is number `first`; `parent`: the node that chooses this one for chances from low up to high."""
        samplers.append(self)
        if not self.training:
            nodes.append(Node(cpu.REST, 0, 0, parent=parent, low=low, high=high))
            return
        for number, sampler in enumerate(owners):
            if sampler is self:
                owner, first = number, len(nodes)
        self._add(nodes, samplers, owners, owner, first, parent, low, high)

    def _add(
        self,
        nodes: list[Node],
        samplers: list[Any],
        owners: list[Any],
        owner: int,
        first: int,
        parent: int,
        low: float,
        high: float,
    ) -> None:
        raise NotImplementedError

    def _axes(self) -> Any:
        """Returns the dimensions that boxes are cut in, None for the last ones."""
        return next((leaf.axes for leaf in self._leaves() if hasattr(leaf, "axes")), None)

    def _plan(self, x: torch.Tensor, nodes: list[Node], seeded: int, axes: Any = None) -> Plan:
        counted, pairs, choosing, dims, mask = 0, False, -1, 0, None
        for node in nodes:
            if node.kind == cpu.CHOICE_OF:
                if node.per == cpu.EACH_PAIR and node.partner == cpu.ANY:
                    if choosing not in (-1, node.owner):
                        raise ValueError("samplers: expected one seed among the RandomMix with per='pair', got several")
                    choosing = node.owner
                continue
            if node.kind != cpu.REST and node.partner == cpu.ANY:
                counted |= 1 << node.owner
                pairs = pairs or node.per == cpu.EACH_PAIR
            if node.kind in (cpu.BOX, cpu.SIDES):
                dims = min(max(x.dim() - 2, 1), 3) if axes is None else len(axes)
            elif node.kind == cpu.MASK:
                (mask,) = self._parts(x)
        return Plan(seeded, counted, pairs, choosing, dims, mask, x.dtype == torch.float64, _permutes(nodes))

    def _pick(self, choices: int) -> int:
        """Returns a number in [0, choices) of the sampler's own stream, on the host."""
        return cpu.pick(self._own_state(torch.device("cpu")), 0, choices)

    # what torch.compiler.disable does, which would import the whole compiler for it
    _pick._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _leaves(self) -> list[Sampler]:
        """Returns the samplers that lam, boxes and masks come from, in training mode: this one, or those that it chooses from."""
        return [self] if self.training else []

    def _unites(self) -> bool:
        """Whether targets are the union of labels."""
        return any(getattr(leaf, "label", None) == "union" for leaf in self._leaves())

    def _pairings(self) -> Any:
        """Returns how the rows that choose one sampler together may find each other: {partner's code, or why they cannot}."""
        return {f"a {type(self).__name__}"}

    def _check_batch(self, x: torch.Tensor, y: Any) -> None:
        """Raises if x and y cannot be sampled for, before anything is drawn."""

    def _parts(self, x: torch.Tensor) -> set[Any]:
        """Returns what may be drawn besides lam: "boxes", or the size (h, w) of a mask."""
        return set()


def _permutes(nodes: list[Node]) -> bool:
    """Whether every row is the partner of one row: all rows find theirs alike, whichever sampler they use. Masks do not ask."""
    ways = {(n.owner, n.partner, n.per == cpu.EACH_PAIR) for n in nodes if n.kind in (cpu.LAM, cpu.BOX, cpu.SIDES)}
    return len(ways) == 1 and all(n.partner != cpu.GIVEN and n.kind not in (cpu.REST, cpu.MASK) for n in nodes)


def _traced_table(nodes: Any, samplers: list[Sampler], place: torch.device) -> torch.Tensor:
    """Returns the nodes as a tensor, in a program that is traced. Numbers that a schedule may change come from tensors of the
    samplers: floats would be constants of the program, and compiled anew."""
    if not torch.compiler.is_compiling():
        return torch.tensor(nodes, dtype=torch.float64, device=place)
    rows, children = [], [0] * len(nodes)
    for node, sampler in zip(nodes, samplers, strict=True):
        row = torch.tensor([float(number) for number in node], dtype=torch.float64)
        if isinstance(sampler, BetaSampler):
            row = torch.cat((row[:6], sampler._numbers, row[9:10], sampler._ratios, row[12:]))
        if node.parent >= 0:
            child = children[node.parent]
            children[node.parent] += 1
            row = torch.cat((row[:13], samplers[node.parent]._limits[child : child + 2], row[15:]))
        rows.append(row)
    return torch.stack(rows).to(place, non_blocking=True)


class BetaSampler(Sampler):
    """The options that Mixup, CutMix and BetaMask share. A subclass defines `_kind()`, what is drawn: lam, boxes or masks."""

    _checks = {
        "alpha": lambda self, value: beta_parameters(value),
        "prob": lambda self, value: number_in("prob", value, 0, 1),
        "per": lambda self, value: one_of("per", value, PER),
        "partner": lambda self, value: one_of("partner", value, PARTNERS),
        "label": lambda self, value: one_of("label", value, LABELS),
        "bandwidth": lambda self, value: checked_bandwidth(value),
    }

    def __init__(
        self,
        alpha: float | tuple[float, float],
        per: Any,
        prob: Any,
        partner: str,
        label: str,
        seed: Any,
        bandwidth: float | None = None,
    ) -> None:
        super().__init__(seed)
        self.alpha = alpha
        self.per = per
        self.bandwidth = bandwidth
        self.partner = partner
        self.label = label
        self.prob = prob
        check_near(self)

    def extra_repr(self) -> str:
        a, b = self.alpha
        return f"alpha={a if a == b else self.alpha}, per={self.per!r}, prob={self.prob}, partner={self.partner!r}, " + (
            f"label={self.label!r}, seed={self.seed}" + f", bandwidth={self.bandwidth}" * (self.bandwidth is not None)
        )

    def _check_batch(self, x: torch.Tensor, y: Any) -> None:
        check_near(self)
        if self.partner == "near":
            check_near_labels(x, y)
        if self.partner in ("same", "different"):
            if not isinstance(y, torch.Tensor) or y.dtype != torch.int64:
                raise _check.wrong(TypeError, "y", f"int64 class indices for partner={self.partner!r}", y)
            if tuple(y.shape) != (x.shape[0],):
                raise _check.wrong(ValueError, "y", f"shape [{x.shape[0]}]", y)
            _check.same_device("y", y, x)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps the numbers that a schedule may change as a tensor too, for programs that are traced."""
        super().__setattr__(name, value)
        if name in ("alpha", "prob", "minmax"):
            self._keep_numbers()

    def _keep_numbers(self) -> None:
        numbers = (*self.alpha, getattr(self, "prob", 1.0))
        super().__setattr__("_numbers", torch.tensor(numbers, dtype=torch.float64, device="cpu"))
        ratios = getattr(self, "minmax", None) or (0.0, 0.0)
        super().__setattr__("_ratios", torch.tensor(ratios, dtype=torch.float64, device="cpu"))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_numbers", "_ratios")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_numbers()

    def _add(
        self,
        nodes: list[Node],
        samplers: list[Any],
        owners: list[Any],
        owner: int,
        first: int,
        parent: int,
        low: float,
        high: float,
    ) -> None:
        # rows that draw alone take the row's numbers, whichever sampler they use; what rows share is each sampler's own
        stream = 0 if self.per == "row" else len(nodes) - first
        numbers = (1.0, 1.0, 1.0) if torch.compiler.is_compiling() else (*self.alpha, self.prob)
        codes = PER[self.per], PARTNERS[self.partner], LABELS[self.label]
        row: Any = self._kind(), owner, stream, *codes, *numbers, *self._sides(), parent, low, high
        nodes.append(Node(*row))

    def _pairings(self) -> set[str]:
        if self.seed is not None:
            return {f"a {type(self).__name__} with a seed of its own"}
        return {self.partner if self.per == "pair" else f"a {type(self).__name__} with per={self.per!r}"}

    def _kind(self) -> Any:
        raise NotImplementedError

    def _sides(self) -> tuple[int, float, float]:
        """Returns (whether the target follows the box as cut off, least and most ratio of its sides)."""
        return 1, 0.0, 0.0


def sampler_weights(weights: Any, count: int) -> tuple[float, ...]:
    """Returns one float per sampler."""
    if weights is None:
        return (1.0,) * count
    if not isinstance(weights, (tuple, list)) or any(isinstance(w, bool) or not isinstance(w, numbers.Real) for w in weights):
        raise _check.wrong(TypeError, "weights", "a sequence of numbers or None", weights)
    if len(weights) != count:
        raise _check.wrong(ValueError, "weights", f"{count} numbers, one per sampler", weights)
    if not all(0 <= w <= sys.float_info.max for w in weights) or not any(weights):
        raise _check.wrong(ValueError, "weights", "finite numbers of at least 0, not all 0", weights)
    return tuple(float(w) for w in weights)


def beta_parameters(
    alpha: float | tuple[float, float], argument: str = "alpha", hint: str = " (prob=0 or eval() turns mixing off)"
) -> Any:
    values = alpha if isinstance(alpha, (tuple, list)) else (alpha, alpha)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in values):
        raise _check.wrong(TypeError, argument, "a number or a pair of numbers", alpha)
    if not all(1e-3 <= v <= 1e30 for v in values):  # what float32 can draw
        raise _check.wrong(ValueError, argument, f"positive, from 0.001 to 1e30{hint}", alpha)
    return tuple(float(v) for v in values)


def number_in(argument: str, value: float, least: int, most: int) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _check.wrong(TypeError, argument, f"a number in [{least}, {most}]", value)
    if not least <= value <= most:
        raise _check.wrong(ValueError, argument, f"a number in [{least}, {most}]", value)
    return float(value)


def one_of(argument: str, value: str, names: Any) -> str:
    return _check.one_of(argument, value, names, f"one of {', '.join(map(repr, names))}")
