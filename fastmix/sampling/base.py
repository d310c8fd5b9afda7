"""What samplers share: how they are called, their generators, partners, and the checks of their options."""

import io
import numbers
import sys

import torch
from torch import nn
from torch.utils.data import get_worker_info

from .. import _check
from .._dtypes import accumulator
from .draws import Draws
from .plan import Mix, check_labels


class Sampler(nn.Module):
    """The base of all samplers: how they are called, and their generator.

    A sampler defines `_draw(x, y, draw, given)` -> Mix, and in `_check_batch` what has to hold for it.
    """

    def __init__(self, seed):
        super().__init__()
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
            raise _check.wrong(TypeError, "seed", "an int or None", seed)
        self.seed = None if seed is None else _check.integer("seed", seed, 0, "an int in [0, 2**63)")
        self._generator = None
        self._states = {}  # {type of device: state of its generator, while that is not in use}
        self._worker = None  # seed of the DataLoader worker that the generator belongs to

    def get_extra_state(self):
        states = dict(self._states)
        if self._generator is not None:
            states[self._generator.device.type] = self._generator.get_state()
        return states

    def set_extra_state(self, state):
        self._generator, self._worker = None, _worker_seed()
        if not isinstance(state or {}, dict) or not all(isinstance(saved, torch.Tensor) for saved in (state or {}).values()):
            raise _check.wrong(TypeError, "state", "{device type: state of a generator}", state)
        # generators are made with the first batch on a device, which need not exist here; map_location may have moved the states
        self._states = {device: saved.cpu() for device, saved in (state or {}).items()}

    def __getstate__(self):
        """Copies and pickles hold the generator's state, since its device may not exist in the other process. The state is
        stored as bytes: a new process gets a tensor's memory by reference, and a tensor made here is freed by then."""
        packed = io.BytesIO()
        torch.save(self.get_extra_state(), packed)
        return {**self.__dict__, "_states": packed.getvalue(), "_generator": None}

    def __setstate__(self, state):
        super().__setstate__({**state, "_states": torch.load(io.BytesIO(state["_states"]), weights_only=True)})

    def _own_generator(self, device):
        if self.seed is None:
            return None
        worker = _worker_seed()
        if worker != self._worker:  # a copy in another process, which must not repeat the draws of the original
            self._generator, self._states, self._worker = None, {}, worker
        if self._generator is None or self._generator.device != device:
            self._states = self.get_extra_state()
            # the CPU's generator reads 32 bits of its seed, which have to differ between all workers of all epochs
            seed = self.seed if worker is None else (self.seed * 0x9E3779B97F4A7C15 + worker) % 2**63
            self._generator = torch.Generator(device).manual_seed(seed)
            state = self._states.pop(device.type, None)
            if state is not None:
                self._generator.set_state(state)
        return self._generator

    def sample(self, x: torch.Tensor, y: torch.Tensor | None = None, *, generator: torch.Generator | None = None) -> Mix:
        """Draws how to mix a batch `x` `[N, ...]`, of which only shape, dtype and device matter.

        Args:
            x: the batch.
            y: class indices `[N]`, needed for `partner="same"` and `"different"`.
            generator: draws from it instead of the sampler's own (or the device's default) generator.
        """
        if not isinstance(x, torch.Tensor):
            raise _check.wrong(TypeError, "x", "a tensor [N, ...]", x)
        if x.dim() < 1:
            raise _check.wrong(ValueError, "x", "a tensor [N, ...]", x)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise _check.wrong(TypeError, "generator", "a torch.Generator", generator)
        if generator is not None and generator.device.type != x.device.type:
            raise ValueError(f"generator: expected one on {x.device}, as x, got one on {generator.device}")
        if self.training:
            self._check_batch(x, y)
        return self._sample(x, y, generator, None)

    def forward(self, x, y, *, generator: torch.Generator | None = None):
        """(mixed x, mixed target); in eval mode `x` and `y` as they are."""
        if not self.training:
            return x, y
        _check.float_tensor("x", x, 1, "[N, ...]")
        check_labels(y, x.shape[0], x)
        drawn = self.sample(x, y, generator=generator)
        return drawn.apply(x), drawn.target(y)

    def _sample(self, x, y, given, inherited):
        """Samples for checked arguments, with the generator of the call, else the sampler's own, else that of the sampler around it."""
        N, dtype = x.shape[0], accumulator(x.dtype)
        if not self.training:
            return Mix(torch.ones(N, dtype=dtype, device=x.device), torch.arange(N, device=x.device))
        generator = self._own_generator(x.device) if given is None else given
        return self._draw(x, y, Draws(N, dtype, x.device, inherited if generator is None else generator), given)

    def _check_batch(self, x, y):
        """Raises if x and y cannot be sampled for, before anything is drawn."""

    def _parts(self, x):
        """Returns what may be drawn besides lam: "boxes", or the size (h, w) of a mask."""
        return set()


def _worker_seed():
    """Returns the seed of this DataLoader worker, or None in any other process."""
    worker = get_worker_info()
    return None if worker is None else worker.seed


class BetaSampler(Sampler):
    """The options that Mixup, CutMix and BetaMask share. A subclass defines `_mix(draw, x, index, unit, mixed)` -> Mix, which draws
    lam, boxes or masks: rows of one number in `unit` [N] share a draw, rows where `mixed` [N] is False stay as they are."""

    def __init__(self, alpha, per, prob, partner, label, seed):
        super().__init__(seed)
        self.alpha = beta_parameters(alpha)
        self.per = one_of("per", per, ("row", "pair", "batch"))
        self.partner = one_of("partner", partner, ("any", "same", "different", "flip", "roll"))
        self.label = one_of("label", label, ("proportional", "larger", "own"))
        self.prob = number_in("prob", prob, 0, 1)

    def extra_repr(self):
        a, b = self.alpha
        return f"alpha={a if a == b else self.alpha}, per={self.per!r}, prob={self.prob}, partner={self.partner!r}, " + (
            f"label={self.label!r}, seed={self.seed}"
        )

    def _check_batch(self, x, y):
        if self.partner in ("same", "different"):
            if not isinstance(y, torch.Tensor) or y.dtype != torch.int64:
                raise _check.wrong(TypeError, "y", f"int64 class indices for partner={self.partner!r}", y)
            if tuple(y.shape) != (x.shape[0],):
                raise _check.wrong(ValueError, "y", f"shape [{x.shape[0]}]", y)
            _check.same_device("y", y, x)

    def _draw(self, x, y, draw, given):
        rows = torch.arange(draw.rows, device=x.device)
        index, unit, alone, order = self._partners(draw, rows, y)
        if self.per == "row":
            unit = rows
        elif self.per == "batch":
            unit = torch.zeros_like(rows)
        mixed = draw.uniform()[unit] < self.prob
        if alone is not None:
            mixed &= ~alone
        drawn = self._mix(draw, x, index, unit, mixed)
        drawn._order = order
        return drawn

    def _target_lam(self, own):
        if self.label == "proportional":
            return own
        return (own >= 0.5).to(own.dtype) if self.label == "larger" else torch.ones_like(own)

    def _partners(self, draw, rows, y):
        """Returns the partner of each row, the number of the group that shares its draws under per="pair", which rows have no
        partner (or None), and an order of the rows in which partners are neighbours (or None)."""
        pair = self.per == "pair"
        if self.partner in ("same", "different"):
            return self._class_partners(draw, rows, y, pair)
        N = draw.rows
        if self.partner == "flip":
            return rows.flip(0), rows.minimum(rows.flip(0)), None, "flip"
        if not pair:
            if self.partner == "roll":
                return rows.roll(1), rows, None, "roll"
            order = draw.permutation()
            return torch.empty_like(order).scatter_(0, order, order.roll(-1)), rows, None, order
        # neighbours in the order are each other's partners; the last three of an odd number form a ring
        order = draw.permutation() if self.partner == "any" else rows
        at, group = rows ^ 1, rows // 2
        if N % 2:
            ring = rows[max(N - 3, 0) :]
            at = torch.cat((at[: max(N - 3, 0)], ring.roll(-1)))
            group = group.clamp(max=max(N // 2 - 1, 0))
        scattered = torch.empty_like(order)
        return scattered.scatter(0, order, order[at]), scattered.scatter(0, order, group), None, order

    def _class_partners(self, draw, rows, y, pair):
        N = draw.rows
        shuffled = draw.permutation()
        key = y[shuffled]
        if pair and self.partner == "different":  # which classes meet is random too
            ordered = key.sort().values
            key = draw.uniform()[torch.searchsorted(ordered, key)]
        order = shuffled[key.argsort(stable=True)]  # by class, in random order within each
        classes = y[order]
        if pair and self.partner == "different":
            # half the batch further on the class differs, unless it holds more than half; an odd batch's middle row stays alone
            at = torch.where(rows < N // 2, rows + (N + 1) // 2, torch.where(rows < (N + 1) // 2, rows, rows - (N + 1) // 2))
            at = torch.where(classes[at] != classes, at, rows)
            pairs = order[torch.where(rows % 2 == 0, rows // 2, (N + 1) // 2 + rows // 2)]
            return *self._back(order, rows, at), pairs
        first, last = torch.searchsorted(classes, classes), torch.searchsorted(classes, classes, right=True)
        if self.partner == "same":
            at = first + ((rows - first) ^ 1) if pair else torch.where(rows + 1 < last, rows + 1, first)
            at = torch.where(at < last, at, rows)
        else:  # anyone outside [first, last)
            others = N - (last - first)
            at = (draw.uniform() * others).long().minimum(others - 1)
            at = torch.where(others == 0, rows, torch.where(at < first, at, at + last - first))
        # a class's rows are a cycle, of which a walk reads the first one twice: with small classes that is no gain over the gather
        return *self._back(order, rows, at), order if pair else None

    @staticmethod
    def _back(order, rows, at):
        """Returns partners, groups and rows without a partner for rows, from an order whose position p has its partner at at[p]."""
        back = torch.empty_like(order).scatter_(0, order, rows)
        return order[at][back], torch.minimum(rows, at)[back], (at == rows)[back]


def sampler_weights(weights, count):
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


def beta_parameters(alpha, argument="alpha", hint=" (prob=0 or eval() turns mixing off)"):
    values = alpha if isinstance(alpha, (tuple, list)) else (alpha, alpha)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in values):
        raise _check.wrong(TypeError, argument, "a number or a pair of numbers", alpha)
    if not all(1e-3 <= v <= 1e30 for v in values):  # what float32 can draw
        raise _check.wrong(ValueError, argument, f"positive, from 0.001 to 1e30{hint}", alpha)
    return tuple(float(v) for v in values)


def number_in(argument, value, least, most):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _check.wrong(TypeError, argument, f"a number in [{least}, {most}]", value)
    if not least <= value <= most:
        raise _check.wrong(ValueError, argument, f"a number in [{least}, {most}]", value)
    return float(value)


def one_of(argument, value, names):
    return _check.one_of(argument, value, names, f"one of {', '.join(map(repr, names))}")
