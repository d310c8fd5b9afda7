"""Mix, what one batch needs to be mixed, and the samplers that draw it.

All draws are made on the batch's device, and nothing waits for it.
"""

import io
import itertools
import math
import numbers
import sys

import torch
from torch import nn
from torch.utils.data import get_worker_info

from . import _check
from ._expressions import accumulator, box_mask, cell_weights, transported
from .functional import mix_along, mix_masked
from .targets import MixedRows, SoftTarget


class Mix:
    """How one batch is mixed: made by a sampler, or by hand; apply it to as many tensors of the batch as you like.

    Args:
        lam: float, 0-d or `[N]`: the weight of each row itself (outside its box).
        index: `[N]` int64: each row's partner.
        target_lam: the row's own share in the target, default: `lam`, times the part of the image outside the box (whose size
            the first `apply` tells).
        box: `[N, 2]`, `[N, 4]` or `[N, 6]` int: as in `fastmix.mix`.
        mask: `[N, h, w]` float32 or float64: weights of the row's cells, as in `fastmix.mix_masked`, in place of a box. They do
            what lam does otherwise, which may be None then: both it and `target_lam` are the mask's mean by default.
        plan, partner_plan: `[N, h*w]` int64 or int32: where the mask's blocks come from in the row and in its partner, as in
            `fastmix.mix_masked`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; a mask and a box; a plan without a mask.

    >>> import torch, fastmix
    >>> m = fastmix.Mix(torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    >>> m.apply(torch.tensor([[0.0], [4.0]])).T
    tensor([[1., 2.]])
    >>> m.target(torch.tensor([7, 9])).weights
    tensor([[0.7500, 0.2500],
            [0.5000, 0.5000]])
    """

    def __init__(self, lam, index, target_lam=None, box=None, *, mask=None, plan=None, partner_plan=None):
        _check.strided("index", index, (torch.int64,), "an int64 tensor [N]")
        if index.dim() != 1:
            raise _check.wrong(TypeError, "index", "an int64 tensor [N]", index)
        rows = index.shape[0]
        if mask is not None:
            _check.strided("mask", mask, _check.SHARES, "a float32 or float64 tensor (lower precision would round it)")
            if mask.dim() != 3 or mask.shape[0] != rows:
                raise _check.wrong(ValueError, "mask", f"shape [{rows}, h, w]", mask)
            _check.same_device("mask", mask, index)
            if box is not None:
                raise ValueError("mask: expected None where there is a box (a mask of 0 and 1 cuts boxes too), got both")
        for name, value in (("plan", plan), ("partner_plan", partner_plan)):
            if value is not None and mask is None:
                raise ValueError(
                    f"{name}: expected None where there is no mask, whose blocks it moves, got {_check.describe(value)}"
                )
            if value is not None:
                _check.integer_tensor(name, value, (rows, mask.shape[1] * mask.shape[2]), index, narrow=True)
        if mask is None or lam is not None:
            _check.share("lam", lam, rows, index)
        if target_lam is not None:
            _check.share("target_lam", target_lam, rows, index)
        if box is not None:
            _check.strided("box", box, (torch.int32, torch.int64), "an int32 or int64 tensor")
            if box.dim() != 2 or box.shape[0] != rows or box.shape[1] not in (2, 4, 6):
                raise _check.wrong(ValueError, "box", f"shape [{rows}, 2], [{rows}, 4] or [{rows}, 6]", box)
            _check.same_device("box", box, index)
        self._lam = lam
        self.index = index
        self.box = box
        self.mask = mask
        self.plan = plan
        self.partner_plan = partner_plan
        self._target_lam = target_lam
        self._sizes = None
        self._order = None  # the sampler's hint for `mix_along`

    def __repr__(self):
        return f"Mix({', '.join(f'{name}={value}' for name, value in self._fields().items() if value is not None)})"

    def _fields(self):
        fields = {"lam": self._lam, "index": self.index, "target_lam": self._target_lam, "box": self.box, "mask": self.mask}
        return {**fields, "plan": self.plan, "partner_plan": self.partner_plan}

    def to(self, device, *, non_blocking: bool = False) -> "Mix":
        """The same draw on another device: sampled in a DataLoader's worker, applied on a GPU."""
        device = _check.device("device", device)
        return self._map(lambda t: t.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "Mix":
        """The same draw in page-locked memory; DataLoader calls this."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change):
        moved = Mix(**{k: change(v) if isinstance(v, torch.Tensor) else v for k, v in self._fields().items()})
        moved._sizes = self._sizes
        moved._order = change(self._order) if isinstance(self._order, torch.Tensor) else self._order
        return moved

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The mixed batch, `fastmix.mix(x, lam, index, box=box)`, or `fastmix.mix_masked(x, mask, index)` with its plans."""
        if self.mask is not None:
            return mix_masked(x, self.mask, self.index, plan=self.plan, partner_plan=self.partner_plan)
        if self.box is not None:
            _check.float_tensor("x", x, 1, "[N, ...]")
            _check.box("box", self.box, x)
            sizes = x.shape[x.dim() - self.box.shape[1] // 2 :]
            if self._sizes is None:
                self._sizes = sizes
            elif self._sizes != sizes:
                raise _check.wrong(ValueError, "x", f"images of size {list(self._sizes)}, which the boxes are for", x)
        return mix_along(self._order, x, self.lam, self.index, self.box)

    @property
    def lam(self):
        """The row's own share in the batch: as given, or the mean of its mask."""
        return _mean_of(self.mask) if self._lam is None else self._lam

    @property
    def target_lam(self):
        """The row's own share in the target.

        Raises:
            ValueError: there is a box but no target_lam, and no batch has been mixed yet to tell the image's size.
        """
        if self._target_lam is not None:
            return self._target_lam
        if self.mask is not None:
            return _mean_of(self.mask)
        if self.box is None:
            return self.lam
        if self._sizes is None:
            expected = "a value, or apply(x) first: a box's share depends on the image's size"
            raise _check.wrong(ValueError, "target_lam", expected, None)
        dtype = self.lam.dtype if isinstance(self.lam, torch.Tensor) else torch.float32
        return self.lam * (1 - _box_share(self.box, self._sizes, dtype))

    def target(self, y: torch.Tensor) -> SoftTarget | MixedRows:
        """The mixed target.

        Class indices `[N]` (or `[N, d1, ...]`) int64 give a `SoftTarget`; float rows `[N, C]` give `MixedRows`. Label maps of
        the image's own dimensions are cut by the box as the image is: a pixel inside it is the partner's alone, one outside has
        `lam`; rows whose box is empty have `target_lam` throughout. Label maps `[N, H, W]` follow a mask and its plans: a
        pixel's share is its cell's; rows whose mask is one number throughout have `target_lam`. Float maps of more than two
        dimensions are images to a box or a mask, not rows: mix those with `apply`.
        """
        rows = self.index.shape[0]
        _check_labels(y, rows, self.index)
        if y.is_floating_point() and y.dim() > 2 and (self.box is not None or self.mask is not None):
            raise _check.wrong(ValueError, "y", "values [N] or rows [N, C] (mix maps of the image with apply(y))", y)
        if self.mask is not None and y.dim() >= 3 and not y.is_floating_point():
            h, w = self.mask.shape[1:]
            if any(side != count and (count == 0 or side % count) for side, count in zip(y.shape[-2:], (h, w), strict=True)):
                raise _check.wrong(ValueError, "y", f"label maps that {h} x {w} cells divide", y)
        if y.is_floating_point():
            return MixedRows(y, self.target_lam, self.index)
        partner = _partners(y, self.index)
        dims = 0 if self.box is None else self.box.shape[1] // 2
        if dims and y.dim() == 1 + dims:
            if self._sizes is not None and y.shape[1:] != self._sizes:
                raise _check.wrong(ValueError, "y", f"label maps of the images' size {list(self._sizes)}", y)
            own = _as_rows(self.lam, y)
            if self._target_lam is not None:
                start, stop = self.box[:, :dims], self.box[:, dims:]
                own = torch.where((start < stop).all(1), own, _as_rows(self._target_lam, y))
            own = own.view(-1, *[1] * dims).masked_fill(box_mask(self.box, y.shape), 0)
        elif self.mask is not None and y.dim() >= 3:
            own = self.mask
            if self._target_lam is not None:  # a row that is mixed alike everywhere, if only for standing beside others' masks
                alike = (own.flatten(1) == own[:, :1, 0]).all(1) if own[:1].numel() else own.new_ones(rows, dtype=torch.bool)
                own = torch.where(alike[:, None, None], _as_rows(self._target_lam, y)[:, None, None], own)
            own = cell_weights(own, y.shape).expand(y.shape)
        else:
            own = _as_rows(self.target_lam, y)
        if self.mask is not None and y.dim() >= 3:
            y, partner = self._moved(y, "plan"), self._moved(partner, "partner_plan")
        return SoftTarget(torch.stack((y, partner), 1), torch.stack((own, 1 - own), 1))

    def _moved(self, y, name):
        """Label maps whose blocks a plan has moved."""
        plan = getattr(self, name)
        if plan is None:
            return y
        cells = plan.shape[1]
        _check.in_range(name, plan, cells, "a block")
        return transported(y, plan.to(torch.int64).clamp(0, max(cells - 1, 0)), self.mask)


def _partners(y, index):
    """y[index]. Where indices cannot be looked at, a wrong one takes some row: it has made its own NaN already."""
    if index.is_cpu and not _check.transformed():
        try:
            return y.index_select(0, index)
        except (IndexError, RuntimeError):  # which says neither row nor value
            pass
    _check.in_range("index", index, y.shape[0], "a partner")
    return y[index.clamp(0, max(y.shape[0] - 1, 0))]


def _mean_of(mask):
    """The mean of each row's mask; 1 of one without cells."""
    return mask.mean((1, 2)) if mask[:1].numel() else mask.new_ones(mask.shape[0])


def _check_labels(y, rows, like):
    if not isinstance(y, torch.Tensor) or (y.dtype != torch.int64 and not y.is_floating_point()):
        raise _check.wrong(TypeError, "y", "int64 class indices or floating rows", y)
    if y.dim() < 1 or y.shape[0] != rows:
        raise _check.wrong(ValueError, "y", f"{rows} rows, as the mixed batch", y)
    _check.same_device("y", y, like)


def _as_rows(lam, y):
    """lam as [N], float32 or float64."""
    if not isinstance(lam, torch.Tensor) or lam.device != y.device:
        lam = _check.coefficient("lam", lam, y)
    return lam.expand(y.shape[0])


def _box_share(box, sizes, dtype):
    """The part of an image that each row's box covers, [N]."""
    dims = len(sizes)
    limits = torch.tensor(sizes, device=box.device) if box.is_cpu else _on_device(sizes, box.device)
    start = box[:, :dims].clamp(min=0).minimum(limits)
    stop = box[:, dims:].clamp(min=0).minimum(limits)
    return (stop - start).clamp(min=0).to(dtype).prod(1) / max(math.prod(sizes), 1)


def _on_device(values, device):
    """Host integers as a device tensor, without waiting for the device."""
    return torch.stack([torch.full((), value, device=device) for value in values])


class _Sampler(nn.Module):
    """What all samplers share: how they are called, and a generator of their own.

    A sampler's own part is `_draw(x, y, draw, given)` -> Mix, and what `_check_batch` has to check for it.
    """

    def __init__(self, seed):
        super().__init__()
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
            raise _check.wrong(TypeError, "seed", "an int or None", seed)
        self.seed = None if seed is None else _check.integer("seed", seed, 0, "an int in [0, 2**63)")
        self._generator = None
        self._states = {}  # by type of device: where generators that are not in use go on
        self._worker = None  # the seed of the DataLoader worker that all this belongs to

    def get_extra_state(self):
        states = dict(self._states)
        if self._generator is not None:
            states[self._generator.device.type] = self._generator.get_state()
        return states

    def set_extra_state(self, state):
        self._generator, self._worker = None, _worker_seed()
        if not isinstance(state or {}, dict) or not all(isinstance(saved, torch.Tensor) for saved in (state or {}).values()):
            raise _check.wrong(TypeError, "state", "{device type: state of a generator}", state)
        # for the first batch on such a device: here there may be none. A checkpoint's map_location may have moved host states
        self._states = {device: saved.cpu() for device, saved in (state or {}).items()}

    def __getstate__(self):
        """Copies and pickles go through the generator's state: it may be on a device that is not there. As bytes, because a
        process is started with a tensor's memory by reference, and a tensor made here is gone by then."""
        packed = io.BytesIO()
        torch.save(self.get_extra_state(), packed)
        return {**self.__dict__, "_states": packed.getvalue(), "_generator": None}

    def __setstate__(self, state):
        super().__setstate__({**state, "_states": torch.load(io.BytesIO(state["_states"]), weights_only=True)})

    def _own_generator(self, device):
        if self.seed is None:
            return None
        worker = _worker_seed()
        if worker != self._worker:  # a copy, in a process that must not repeat the draws of the original
            self._generator, self._states, self._worker = None, {}, worker
        if self._generator is None or self._generator.device != device:
            self._states = self.get_extra_state()
            # the CPU's generator reads 32 bits of its seed: they must tell every worker of every epoch
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
        _check_labels(y, x.shape[0], x)
        drawn = self.sample(x, y, generator=generator)
        return drawn.apply(x), drawn.target(y)

    def _sample(self, x, y, given, inherited):
        """On checked arguments. Draws from the generator of the call, else the own one, else that of the sampler around."""
        N, dtype = x.shape[0], accumulator(x.dtype)
        if not self.training:
            return Mix(torch.ones(N, dtype=dtype, device=x.device), torch.arange(N, device=x.device))
        generator = self._own_generator(x.device) if given is None else given
        return self._draw(x, y, _Draws(N, dtype, x.device, inherited if generator is None else generator), given)

    def _check_batch(self, x, y):
        """Raises where these cannot be sampled for, before anything is drawn."""

    def _parts(self, x):
        """What may be drawn beside lam: "boxes", or the size (h, w) of a mask."""
        return set()


def _worker_seed():
    """The seed of the DataLoader worker that this is, None in any other process."""
    worker = get_worker_info()
    return None if worker is None else worker.seed


class _BetaSampler(_Sampler):
    """The options that Mixup and CutMix share. What is left to them is `_mix(draw, x, index, unit, mixed)` -> Mix: lam or boxes
    for the groups in `unit`, where `mixed`."""

    def __init__(self, alpha, per, prob, partner, label, seed):
        super().__init__(seed)
        self.alpha = _alpha(alpha)
        self.per = _one_of("per", per, ("row", "pair", "batch"))
        self.partner = _one_of("partner", partner, ("any", "same", "different", "flip", "roll"))
        self.label = _one_of("label", label, ("proportional", "larger", "own"))
        self.prob = _number("prob", prob, 0, 1)

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
        """(partner of each row, id of the group that shares its draws under per="pair", rows without a partner or None, an
        order in which partners follow each other or None)"""
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
        """From places in an order to rows: position p of it has its partner at position at[p]."""
        back = torch.empty_like(order).scatter_(0, order, rows)
        return order[at][back], torch.minimum(rows, at)[back], (at == rows)[back]


class _Draws:
    """The random numbers of one batch."""

    def __init__(self, rows, dtype, device, generator):
        self.rows = rows
        self.generator = generator
        self.options = {"dtype": dtype, "device": device}
        # the default generator is not named: torch.compile could not keep the number of rows symbolic
        self.source = {} if generator is None else {"generator": generator}

    def permutation(self):
        return torch.randperm(self.rows, device=self.options["device"], **self.source)

    def uniform(self, *shape):
        return torch.rand((self.rows, *shape), **self.options, **self.source)

    def beta_logit(self, a, b, *sizes):
        """log(lam / (1-lam)) of lam ~ Beta(a, b), [N, *sizes]: the difference of two logs of Gamma variables, each drawn as
        log(Gamma(a+1)) - Exponential/a. For small a the plain ratio of two Gammas underflows to ties and 0/0."""
        return self.log_gamma(a, *sizes) - self.log_gamma(b, *sizes)

    def log_gamma(self, shape, *sizes):
        """Logarithms of Gamma variables of this shape parameter, [N, *sizes]."""
        gamma = torch._standard_gamma(torch.full((self.rows, *sizes), shape + 1, **self.options), **self.source)
        wait = torch.empty((self.rows, *sizes), **self.options).exponential_(**self.source)
        return gamma.log() - wait / shape

    def beta(self, a, b, *sizes):
        return torch.sigmoid(self.beta_logit(a, b, *sizes))


class Mixup(_BetaSampler):
    """mixup (arXiv:1710.09412): every row is a convex combination with a partner, lam ~ Beta(alpha, alpha).

    Args:
        alpha: of Beta(alpha, alpha), or `(a, b)` of Beta(a, b); positive. Sound from 0.05 to 32.
        per: what is drawn anew: `"row"`, `"pair"` (two rows that are each other's partners share lam: rows 2k and 2k+1 under
            partner roll; the last three of an odd batch form a ring under any and roll; with same and different, rows left
            without a pair keep lam 1) or `"batch"` (one lam).
        prob: the probability that a row (pair, batch) is mixed at all; others keep lam 1.
        partner: `"any"` (one random cycle: no row meets itself unless N = 1), `"same"` or `"different"` (class; needs class
            indices `y`; a row without a candidate keeps itself with lam 1), `"flip"` (row N-1-i) or `"roll"` (row i-1).
        label: the row's own share in the target: `"proportional"` (lam), `"larger"` (all weight on the larger share) or
            `"own"` (1).
        seed: the sampler owns a generator of this seed, whose state is in `state_dict()`. Without it draws come from the
            device's default generator, or the one given to the call. In a DataLoader worker the sampler's copy is seeded from
            `seed` and the worker's own seed, so workers and epochs draw differently, and `torch.manual_seed` in the main
            process repeats them all. In distributed training processes with the same seed draw the same: pass
            `seed=seed + rank`. Sample outside `torch.compile` and `torch.utils.checkpoint`: neither knows of this generator.

    Raises:
        TypeError, ValueError: a wrong option; at the call, a missing or wrong `y`, or a generator of another device.

    Call it on a batch, `mixed, target = mixup(x, y)`; or `sample` a `Mix` and apply that. `mixup.eval()` is the identity.

    >>> import torch, fastmix
    >>> mixup = fastmix.Mixup(alpha=0.2, seed=0)
    >>> mixed, target = mixup(torch.randn(8, 3, 32, 32), torch.arange(8))
    >>> mixed.shape, target.classes.shape, target.weights.sum(1).allclose(torch.ones(8))
    (torch.Size([8, 3, 32, 32]), torch.Size([8, 2]), True)
    """

    def __init__(self, alpha, *, per="row", prob=1.0, partner="any", label="proportional", seed=None):
        super().__init__(alpha, per, prob, partner, label, seed)

    def _mix(self, draw, x, index, unit, mixed):
        lam = torch.where(mixed, draw.beta(*self.alpha)[unit], 1)
        return Mix(lam, index, self._target_lam(lam))


class CutMix(_BetaSampler):
    """CutMix (arXiv:1905.04899): a box of the row is replaced by its partner's, lam ~ Beta(alpha, alpha).

    The box has sides `size * (1-lam)**(1/d)`, rounded down, around a centre drawn evenly from the image, cut off at its
    border: intervals of `[N, C, L]` (or `[N, L]`), rectangles of `[N, C, H, W]`, boxes of `[N, C, D, H, W]`. (The authors' code
    makes every side even.)

    Args:
        alpha, per, prob, partner, label, seed: as for `fastmix.Mixup`.
        minmax: `(least, most)` ratio of each side instead of lam: sides and a place wholly inside the image are drawn evenly,
            and the target follows the box.
        correct_lam: the target follows the box as cut off; else the lam that was drawn.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; at the call, an `x` without a dimension to cut.

    >>> import torch, fastmix
    >>> cutmix = fastmix.CutMix(seed=0)
    >>> m = cutmix.sample(torch.randn(8, 3, 32, 32))
    >>> m.box.shape, m.lam.unique()
    (torch.Size([8, 4]), tensor([1.]))
    """

    def __init__(
        self,
        alpha=1.0,
        *,
        minmax=None,
        correct_lam=True,
        per="row",
        prob=1.0,
        partner="any",
        label="proportional",
        seed=None,
    ):
        super().__init__(alpha, per, prob, partner, label, seed)
        if minmax is not None:
            if not isinstance(minmax, (tuple, list)) or len(minmax) != 2:
                raise _check.wrong(TypeError, "minmax", "(least, most) ratio of a box's sides", minmax)
            least, most = (_number("minmax", ratio, 0, 1) for ratio in minmax)
            if least > most:
                raise _check.wrong(ValueError, "minmax", "least <= most", minmax)
            minmax = (least, most)
        if not isinstance(correct_lam, bool):
            raise _check.wrong(TypeError, "correct_lam", "a bool", correct_lam)
        self.minmax = minmax
        self.correct_lam = correct_lam

    def extra_repr(self):
        return f"{super().extra_repr()}, minmax={self.minmax}, correct_lam={self.correct_lam}"

    def _check_batch(self, x, y):
        super()._check_batch(x, y)
        if x.dim() < 2:
            raise _check.wrong(ValueError, "x", "shape [N, L], [N, C, L], [N, C, H, W] or [N, C, D, H, W]", x)

    def _mix(self, draw, x, index, unit, mixed):
        dims = min(max(x.dim() - 2, 1), 3)
        sizes = x.shape[x.dim() - dims :]
        lam = draw.beta(*self.alpha)[unit]
        place = draw.uniform(2, dims)[unit].unbind(1)
        ratio = (1 - lam) ** (1 / dims)
        sides = [self._side(size, ratio, place[0][:, d], place[1][:, d]) for d, size in enumerate(sizes)]
        box = torch.stack([start for start, _ in sides] + [stop for _, stop in sides], 1)
        box = torch.where(mixed[:, None], box, 0)
        if self.correct_lam or self.minmax is not None:
            own = 1 - _box_share(box, sizes, lam.dtype)
        else:
            own = torch.where(mixed, lam, 1)
        drawn = Mix(torch.ones_like(lam), index, self._target_lam(own), box)
        drawn._sizes = sizes
        return drawn

    def _parts(self, x):
        return {"boxes"}

    def _side(self, size, ratio, at, length):
        """(start, stop) of one side of the boxes, of this ratio to the image's; `at` and `length` are uniform draws."""
        if self.minmax is None:
            cut = (size * ratio).long()
            centre = (at * size).long().clamp(max=size - 1)
            start = centre - cut // 2
            return start.clamp(0, size), (start + cut).clamp(0, size)
        least, most = (int(size * ratio) for ratio in self.minmax)
        cut = least + (length * (most - least + 1)).long().clamp(max=most - least)
        start = (at * (size - cut + 1)).long().minimum(size - cut)
        return start, start + cut


class BetaMask(_BetaSampler):
    """Non-linear mixup (Guo, AAAI 2020): every element is mixed with a share of its own, m ~ Beta(alpha, alpha).

    The target's share of the row is the mean of its mask. (In the paper a network learns the target's shares; here they are
    data, and `target_lam` of a `Mix` made by hand may hold any others.)

    Args:
        alpha, prob, partner, label, seed: as for `fastmix.Mixup`.
        size: `(h, w)`, how many cells a mask has; h divides the height of the batch and w its width. None: one for every element
            of the last two dimensions, as in the paper, where they are the words of a sentence and their embedding.
        per: what is drawn anew: a mask for each `"row"`, `"pair"` or `"batch"`.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; at the call, an `x` without two dimensions after the first, or whose size
            `size` does not divide.

    Source: Guo, "Nonlinear Mixup: Out-Of-Manifold Data Augmentation for Text Classification", AAAI 2020.

    >>> import torch, fastmix
    >>> m = fastmix.BetaMask(1.0, seed=0).sample(torch.randn(8, 20, 300))
    >>> m.mask.shape, m.target_lam.shape
    (torch.Size([8, 20, 300]), torch.Size([8]))
    >>> mixed, target = fastmix.BetaMask(0.2, size=(4, 4), seed=0)(torch.randn(8, 3, 32, 32), torch.arange(8))
    >>> mixed.shape, target.weights.sum(1).allclose(torch.ones(8))
    (torch.Size([8, 3, 32, 32]), True)
    """

    def __init__(self, alpha, size=None, *, per="row", prob=1.0, partner="any", label="proportional", seed=None):
        super().__init__(alpha, per, prob, partner, label, seed)
        if size is not None:
            if not isinstance(size, (tuple, list)) or len(size) != 2:
                raise _check.wrong(TypeError, "size", "(h, w), how many cells a mask has, or None", size)
            size = tuple(_check.integer("size", count, 1, "numbers of at least 1") for count in size)
        self.size = size

    def extra_repr(self):
        return f"{super().extra_repr()}, size={self.size}"

    def _check_batch(self, x, y):
        super()._check_batch(x, y)
        if x.dim() < 3:
            raise _check.wrong(ValueError, "x", "shape [N, L, D] or [N, ..., H, W]", x)
        if self.size is not None and any(side % count for side, count in zip(x.shape[-2:], self.size, strict=True)):
            raise _check.wrong(ValueError, "x", f"height and width that size {self.size} divides", x)

    def _parts(self, x):
        return {self._size(x)}

    def _size(self, x):
        return tuple(x.shape[-2:]) if self.size is None else self.size

    def _mix(self, draw, x, index, unit, mixed):
        mask = draw.beta(*self.alpha, *self._size(x))[unit]
        mask = torch.where(mixed[:, None, None], mask, 1)
        own = _mean_of(mask)
        return Mix(own, index, self._target_lam(own), mask=mask)


class RandomMix(_Sampler):
    """Each row, or the whole batch, is mixed by one of several samplers, which one is drawn at random.

        P(sampler k) = weights[k] / sum of weights

    Every member draws for the batch, and each row takes its lam, partner, target share and box from the one that it uses: one
    `Mix`, so one launch serves rows of mixup and rows of CutMix together.

    Args:
        samplers: Mixup, CutMix, BetaMask or RandomMix, one or more; masks are of one size, and not beside boxes.
        weights: a number for each sampler, at least 0 and not all 0; equal where None.
        per: what chooses anew: `"row"` or `"batch"`. Rows choose alone: two that share lam in a sampler with `per="pair"` still
            do where both use it; with `per="batch"` all pairs stay whole.
        seed: as for `fastmix.Mixup`. Members without a seed draw from this sampler's generator, those with one from their own;
            a generator given to the call serves all.

    Raises:
        TypeError, ValueError: a wrong option; at the call, what one of the samplers raises.

    Source: timm's `Mixup` switches between mixup and CutMix with `weights=(1 - switch_prob, switch_prob)`, once per batch in its
    mode "batch", per row in "elem"; torchvision's `v2.RandomChoice([mixup, cutmix], p=weights)` once per batch.

    >>> import torch, fastmix
    >>> mixer = fastmix.RandomMix(fastmix.Mixup(0.8), fastmix.CutMix(1.0), weights=(1, 3), seed=0)
    >>> mixed, target = mixer(torch.randn(8, 3, 32, 32), torch.arange(8))
    >>> mixed.shape, target.classes.shape
    (torch.Size([8, 3, 32, 32]), torch.Size([8, 2]))
    >>> m = mixer.sample(torch.randn(400, 3, 32, 32))
    >>> ((m.lam == 1).float().mean() - 0.75).abs() < 0.1  # rows with a box
    tensor(True)
    """

    def __init__(self, *samplers, weights=None, per="row", seed=None):
        super().__init__(seed)
        if not samplers:
            raise _check.wrong(ValueError, "samplers", "at least one sampler", samplers)
        for k, sampler in enumerate(samplers):
            if not isinstance(sampler, _Sampler):
                raise _check.wrong(TypeError, f"samplers[{k}]", "a Mixup, CutMix, BetaMask or RandomMix", sampler)
        self.samplers = nn.ModuleList(samplers)
        self.weights = _weights(weights, len(samplers))
        self.per = _one_of("per", per, ("row", "batch"))

    def extra_repr(self):
        return f"weights={self.weights}, per={self.per!r}, seed={self.seed}"

    def _check_batch(self, x, y):
        for sampler in self.samplers:
            if sampler.training:
                sampler._check_batch(x, y)
        parts = self._parts(x)
        if len(parts) > 1:
            found = ", ".join("boxes" if part == "boxes" else f"masks of {list(part)}" for part in sorted(parts, key=str))
            raise ValueError(f"samplers: expected boxes, or masks of one size, since a batch has one of these; got {found}")

    def _parts(self, x):
        return set().union(*(sampler._parts(x) for sampler in self.samplers if sampler.training))

    def _draw(self, x, y, draw, given):
        chance = draw.uniform()
        if self.per == "batch":
            chance = chance[torch.zeros(draw.rows, dtype=torch.int64, device=x.device)]
        first, *others = (sampler._sample(x, y, given, draw.generator) for sampler in self.samplers)
        lam, index, own, box, sizes = first.lam, first.index, first.target_lam, first.box, first._sizes
        mask = first.mask
        *before, total = itertools.accumulate(weight / max(self.weights) for weight in self.weights)
        for least, drawn in zip(before, others, strict=True):
            later = chance >= least / total  # these rows use this sampler, or one after it
            mask = _chosen_mask(later, (drawn.mask, drawn.lam), (mask, lam))
            lam = torch.where(later, drawn.lam, lam)
            index = torch.where(later, drawn.index, index)
            own = torch.where(later, drawn.target_lam, own)
            box = _chosen_box(later, drawn.box, box)
            sizes = sizes or drawn._sizes
        mixed = Mix(lam, index, own, box, mask=mask)
        mixed._sizes = sizes
        mixed._order = None if others else first._order
        return mixed


def dirichlet(
    rows: int,
    ways: int,
    alpha: float = 1.0,
    *,
    skip: float | tuple[float, float] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Weights of each row's own for `fastmix.convex_combination`: w ~ Dirichlet(alpha, ..., alpha).

    With `skip` the clean batch comes first, as in AugMix (arXiv:1912.02781): `(1 - m, m*w[0], m*w[1], ...)` with m ~ Beta,
    which uses one alpha for both. Drawn on the device, in log space, and nothing waits for it: sound for alpha from 0.05 to 32.

    Args:
        rows: N.
        ways: how many batches share a row, or how many chains beside the clean batch. (`convex_combination` takes 16 in all.)
        alpha: of the Dirichlet distribution, positive and the same for every way.
        skip: None; or the alpha of m ~ Beta(alpha, alpha), the weight of all chains together; or `(a, b)` of m ~ Beta(a, b).
        device: where to draw; that of the generator, or the default device, where None.
        dtype: float32 or float64.
        generator: draws from it instead of the device's default generator.

    Returns:
        `[rows, ways]`, or `[rows, 1 + ways]` with `skip`; every row sums to 1.

    Raises:
        TypeError, ValueError: a wrong argument.

    >>> import torch, fastmix
    >>> weights = fastmix.dirichlet(4, 3, alpha=1.0, skip=1.0, generator=torch.Generator().manual_seed(0))
    >>> weights.shape, weights.sum(1).allclose(torch.ones(4))
    (torch.Size([4, 4]), True)
    """
    rows = _check.integer("rows", rows, 0, "an int of at least 0")
    ways = _check.integer("ways", ways, 1, "an int of at least 1")
    if isinstance(alpha, (tuple, list)):
        raise _check.wrong(TypeError, "alpha", "one number for all ways", alpha)
    alpha, _ = _alpha(alpha, hint="")
    skip = None if skip is None else _alpha(skip, "skip", hint="")
    if dtype not in _check.SHARES:
        raise _check.wrong(TypeError, "dtype", "torch.float32 or torch.float64", dtype)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise _check.wrong(TypeError, "generator", "a torch.Generator", generator)
    place = None if device is None else _check.device("device", device)
    if generator is not None:
        place = generator.device if place is None else place
        if generator.device.type != place.type:
            raise ValueError(f"generator: expected one on {place}, got one on {generator.device}")
    draw = _Draws(rows, dtype, place, generator)
    weights = torch.softmax(draw.log_gamma(alpha, ways), 1)
    if skip is None:
        return weights
    chains = draw.beta_logit(*skip).unsqueeze(1)
    return torch.cat((torch.sigmoid(-chains), torch.sigmoid(chains) * weights), 1)


def _chosen_box(chosen, yes, no):
    """Boxes where `chosen`, else the other ones; None stands for empty boxes."""
    if yes is None and no is None:
        return None
    return torch.where(chosen[:, None], 0 if yes is None else yes, 0 if no is None else no)


def _chosen_mask(chosen, yes, no):
    """Masks where `chosen`, else the other ones; a (None, lam) stands for masks of lam alone."""
    if yes[0] is None and no[0] is None:
        return None
    yes, no = (lam[:, None, None] if mask is None else mask for mask, lam in (yes, no))
    return torch.where(chosen[:, None, None], yes, no)


def _weights(weights, count):
    """One float per sampler."""
    if weights is None:
        return (1.0,) * count
    if not isinstance(weights, (tuple, list)) or any(isinstance(w, bool) or not isinstance(w, numbers.Real) for w in weights):
        raise _check.wrong(TypeError, "weights", "a sequence of numbers or None", weights)
    if len(weights) != count:
        raise _check.wrong(ValueError, "weights", f"{count} numbers, one per sampler", weights)
    if not all(0 <= w <= sys.float_info.max for w in weights) or not any(weights):
        raise _check.wrong(ValueError, "weights", "finite numbers of at least 0, not all 0", weights)
    return tuple(float(w) for w in weights)


def _alpha(alpha, argument="alpha", hint=" (prob=0 or eval() turns mixing off)"):
    values = alpha if isinstance(alpha, (tuple, list)) else (alpha, alpha)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in values):
        raise _check.wrong(TypeError, argument, "a number or a pair of numbers", alpha)
    if not all(1e-3 <= v <= 1e30 for v in values):  # what float32 can draw
        raise _check.wrong(ValueError, argument, f"positive, from 0.001 to 1e30{hint}", alpha)
    return tuple(float(v) for v in values)


def _number(argument, value, least, most):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _check.wrong(TypeError, argument, f"a number in [{least}, {most}]", value)
    if not least <= value <= most:
        raise _check.wrong(ValueError, argument, f"a number in [{least}, {most}]", value)
    return float(value)


def _one_of(argument, value, names):
    return _check.one_of(argument, value, names, f"one of {', '.join(map(repr, names))}")
