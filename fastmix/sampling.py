"""Mix, what one batch needs to be mixed, and the samplers that draw it.

All draws are made on the batch's device, and nothing waits for it.
"""

import math
import numbers

import torch
from torch import nn

from . import _check
from ._expressions import accumulator, box_mask
from .functional import mix
from .targets import MixedRows, SoftTarget


class Mix:
    """How one batch is mixed: made by a sampler, or by hand; apply it to as many tensors of the batch as you like.

    Args:
        lam: float, 0-d or `[N]`: the weight of each row itself (outside its box).
        index: `[N]` int64: each row's partner.
        target_lam: the row's own share in the target, default: `lam`, times the part of the image outside the box (whose size
            the first `apply` tells).
        box: `[N, 2]`, `[N, 4]` or `[N, 6]` int: as in `fastmix.mix`.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    >>> import torch, fastmix
    >>> m = fastmix.Mix(torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    >>> m.apply(torch.tensor([[0.0], [4.0]])).T
    tensor([[1., 2.]])
    >>> m.target(torch.tensor([7, 9])).weights
    tensor([[0.7500, 0.2500],
            [0.5000, 0.5000]])
    """

    def __init__(self, lam, index, target_lam=None, box=None):
        if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.dim() != 1:
            raise _check.wrong(TypeError, "index", "an int64 tensor [N]", index)
        _check.share("lam", lam, len(index))
        if target_lam is not None:
            _check.share("target_lam", target_lam, len(index))
        if box is not None and (not isinstance(box, torch.Tensor) or box.dtype not in (torch.int32, torch.int64)):
            raise _check.wrong(TypeError, "box", "an int32 or int64 tensor", box)
        if box is not None and (box.dim() != 2 or box.shape[0] != len(index) or box.shape[1] not in (2, 4, 6)):
            raise _check.wrong(ValueError, "box", f"shape [{len(index)}, 2], [{len(index)}, 4] or [{len(index)}, 6]", box)
        self.lam = lam
        self.index = index
        self.box = box
        self._target_lam = target_lam
        self._sizes = None

    def __repr__(self):
        fields = {"lam": self.lam, "index": self.index, "target_lam": self._target_lam, "box": self.box}
        return f"Mix({', '.join(f'{name}={value}' for name, value in fields.items() if value is not None)})"

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The mixed batch, `fastmix.mix(x, lam, index, box=box)`."""
        if self.box is not None:
            _check.float_tensor("x", x, 1, "[N, ...]")
            _check.box("box", self.box, x)
            sizes = x.shape[x.dim() - self.box.shape[1] // 2 :]
            if self._sizes is None:
                self._sizes = sizes
            elif self._sizes != sizes:
                raise _check.wrong(ValueError, "x", f"images of size {list(self._sizes)}, which the boxes are for", x)
        return mix(x, self.lam, self.index, box=self.box)

    @property
    def target_lam(self):
        """The row's own share in the target.

        Raises:
            ValueError: there is a box but no target_lam, and no batch has been mixed yet to tell the image's size.
        """
        if self._target_lam is not None or self.box is None:
            return self.lam if self._target_lam is None else self._target_lam
        if self._sizes is None:
            raise ValueError("target_lam: expected a value, or apply(x) first: a box's share depends on the image's size")
        return self.lam * (1 - _box_share(self.box, self._sizes, torch.float32))

    def target(self, y: torch.Tensor) -> SoftTarget | MixedRows:
        """The mixed target.

        Class indices `[N]` (or `[N, d1, ...]`) int64 give a `SoftTarget`; float rows `[N, C]` give `MixedRows`. Label maps of
        the image's own dimensions are cut by the box as the image is: a pixel inside it is the partner's alone.
        """
        rows = self.index.shape[0]
        _check_labels(y, rows, self.index)
        if y.is_floating_point():
            return MixedRows(y, self.target_lam, self.index)
        _check.in_range("index", self.index, rows, "a partner")
        dims = 0 if self.box is None else self.box.shape[1] // 2
        if dims and y.dim() == 1 + dims:
            if self._sizes is not None and y.shape[1:] != self._sizes:
                raise _check.wrong(ValueError, "y", f"label maps of the images' size {list(self._sizes)}", y)
            own = _as_rows(self.lam, y).view(-1, *[1] * dims)
            own = own.masked_fill(box_mask(self.box, y.shape), 0)
        else:
            own = _as_rows(self.target_lam, y)
        partner = y[self.index.clamp(0, max(rows - 1, 0))]  # a wrong index has made its row NaN already
        return SoftTarget(torch.stack((y, partner), 1), torch.stack((own, 1 - own), 1))


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
    """The options all samplers share."""

    def __init__(self, alpha, per, prob, partner, label, seed):
        super().__init__()
        self.alpha = _alpha(alpha)
        self.per = _one_of("per", per, ("row", "pair", "batch"))
        self.partner = _one_of("partner", partner, ("any", "same", "different", "flip", "roll"))
        self.label = _one_of("label", label, ("proportional", "larger", "own"))
        self.prob = _number("prob", prob, 0, 1)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise _check.wrong(TypeError, "seed", "an int or None", seed)
        if seed is not None and not 0 <= seed < 2**63:
            raise _check.wrong(ValueError, "seed", "an int in [0, 2**63)", seed)
        self.seed = seed
        self._generator = None
        self._loaded_state = None

    def extra_repr(self):
        a, b = self.alpha
        return f"alpha={a if a == b else self.alpha}, per={self.per!r}, prob={self.prob}, partner={self.partner!r}, " + (
            f"label={self.label!r}, seed={self.seed}"
        )

    def get_extra_state(self):
        if self._generator is None:
            return self._loaded_state or {}
        return {"device": str(self._generator.device), "state": self._generator.get_state()}

    def set_extra_state(self, state):
        self._generator = None
        self._loaded_state = state or None  # for the first batch on such a device: here there may be none

    def _own_generator(self, device):
        if self.seed is None:
            return None
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
            if self._loaded_state is not None and torch.device(self._loaded_state["device"]).type == device.type:
                self._generator.set_state(self._loaded_state["state"].cpu())
                self._loaded_state = None
        return self._generator

    def sample(self, x: torch.Tensor, y: torch.Tensor | None = None, *, generator: torch.Generator | None = None) -> Mix:
        """Draws how to mix a batch `x` `[N, ...]`, of which only shape, dtype and device matter.

        Args:
            x: the batch.
            y: class indices `[N]`, needed for `partner="same"` and `"different"`.
            generator: draws from it instead of the sampler's own (or the device's default) generator.
        """
        if not isinstance(x, torch.Tensor) or x.dim() < 1:
            raise _check.wrong(ValueError, "x", "a tensor [N, ...]", x)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise _check.wrong(TypeError, "generator", "a torch.Generator", generator)
        rows = torch.arange(x.shape[0], device=x.device)
        dtype = accumulator(x.dtype)
        if not self.training:
            return Mix(torch.ones(x.shape[0], dtype=dtype, device=x.device), rows)
        draw = _Draws(x.shape[0], dtype, x.device, self._own_generator(x.device) if generator is None else generator)
        index, unit, alone = self._partners(draw, rows, y)
        if self.per == "row":
            unit = rows
        elif self.per == "batch":
            unit = torch.zeros_like(rows)
        mixed = draw.uniform()[unit] < self.prob
        if alone is not None:
            mixed &= ~alone
        return self._draw(draw, x, index, unit, mixed)

    def forward(self, x, y, *, generator: torch.Generator | None = None):
        """(mixed x, mixed target); in eval mode `x` and `y` as they are."""
        if not self.training:
            return x, y
        _check.float_tensor("x", x, 1, "[N, ...]")
        _check_labels(y, x.shape[0], x)
        drawn = self.sample(x, y, generator=generator)
        return drawn.apply(x), drawn.target(y)

    def _draw(self, draw, x, index, unit, mixed) -> Mix:
        """The sampler's own part: lam or boxes for the groups in `unit`, where `mixed`."""
        raise TypeError(f"{type(self).__name__} is the base of samplers: use Mixup or CutMix")

    def _target_lam(self, own):
        if self.label == "proportional":
            return own
        return (own >= 0.5).to(own.dtype) if self.label == "larger" else torch.ones_like(own)

    def _partners(self, draw, rows, y):
        """(partner of each row, id of the group that shares its draws under per="pair", rows without a partner or None)"""
        pair = self.per == "pair"
        if self.partner in ("same", "different"):
            return self._class_partners(draw, rows, y, pair)
        N = draw.rows
        if self.partner == "flip":
            return rows.flip(0), rows.minimum(rows.flip(0)), None
        if not pair:
            if self.partner == "roll":
                return rows.roll(1), rows, None
            order = draw.permutation()
            return torch.empty_like(order).scatter_(0, order, order.roll(-1)), rows, None
        # neighbours in the order are each other's partners; the last three of an odd number form a ring
        order = draw.permutation() if self.partner == "any" else rows
        at, group = rows ^ 1, rows // 2
        if N % 2:
            ring = rows[max(N - 3, 0) :]
            at = torch.cat((at[: max(N - 3, 0)], ring.roll(-1)))
            group = group.clamp(max=max(N // 2 - 1, 0))
        scattered = torch.empty_like(order)
        return scattered.scatter(0, order, order[at]), scattered.scatter(0, order, group), None

    def _class_partners(self, draw, rows, y, pair):
        N = draw.rows
        if not isinstance(y, torch.Tensor) or y.dtype != torch.int64:
            raise _check.wrong(TypeError, "y", f"int64 class indices for partner={self.partner!r}", y)
        if tuple(y.shape) != (N,):
            raise _check.wrong(ValueError, "y", f"shape [{N}]", y)
        _check.same_device("y", y, rows)
        shuffled = draw.permutation()
        key = y[shuffled]
        if pair and self.partner == "different":  # which classes meet is random too
            ordered = key.sort().values
            key = draw.uniform()[torch.searchsorted(ordered, key)]
        order = shuffled[key.argsort(stable=True)]  # by class, in random order within each
        classes = y[order]
        if pair and self.partner == "different":
            at = torch.where(rows < N // 2, rows + N // 2, rows - N // 2)  # differs unless one class holds more than half
            at = torch.where((rows < 2 * (N // 2)) & (classes[at] != classes), at, rows)
            return self._back(order, rows, at)
        first, last = torch.searchsorted(classes, classes), torch.searchsorted(classes, classes, right=True)
        if self.partner == "same":
            at = first + ((rows - first) ^ 1) if pair else torch.where(rows + 1 < last, rows + 1, first)
            at = torch.where(at < last, at, rows)
        else:  # anyone outside [first, last)
            others = N - (last - first)
            at = (draw.uniform() * others).long().minimum(others - 1)
            at = torch.where(others == 0, rows, torch.where(at < first, at, at + last - first))
        return self._back(order, rows, at)

    @staticmethod
    def _back(order, rows, at):
        """From places in an order to rows: position p of it has its partner at position at[p]."""
        back = torch.empty_like(order).scatter_(0, order, rows)
        return order[at][back], torch.minimum(rows, at)[back], (at == rows)[back]


class _Draws:
    """The random numbers of one batch."""

    def __init__(self, rows, dtype, device, generator):
        self.rows = rows
        self.options = {"dtype": dtype, "device": device}
        # the default generator is not named: torch.compile could not keep the number of rows symbolic
        self.source = {} if generator is None else {"generator": generator}

    def permutation(self):
        return torch.randperm(self.rows, device=self.options["device"], **self.source)

    def uniform(self, *shape):
        return torch.rand((self.rows, *shape), **self.options, **self.source)

    def beta_logit(self, a, b):
        """log(lam / (1-lam)) of lam ~ Beta(a, b), [N]: the difference of two logs of Gamma variables, each drawn as
        log(Gamma(a+1)) - Exponential/a. For small a the plain ratio of two Gammas underflows to ties and 0/0."""

        def log_gamma(shape):
            gamma = torch._standard_gamma(torch.full((self.rows,), shape + 1, **self.options), **self.source)
            wait = torch.empty(self.rows, **self.options).exponential_(**self.source)
            return gamma.log() - wait / shape

        return log_gamma(a) - log_gamma(b)

    def beta(self, a, b):
        return torch.sigmoid(self.beta_logit(a, b))


class Mixup(_Sampler):
    """mixup (arXiv:1710.09412): every row is a convex combination with a partner, lam ~ Beta(alpha, alpha).

    Args:
        alpha: of Beta(alpha, alpha), or `(a, b)` of Beta(a, b); positive. Sound from 0.05 to 32.
        per: what is drawn anew: `"row"`, `"pair"` (two rows that are each other's partners share lam; the last three of an odd
            batch form a ring under partner any and roll; with same and different, rows left without a pair keep lam 1) or
            `"batch"` (one lam).
        prob: the probability that a row (pair, batch) is mixed at all; others keep lam 1.
        partner: `"any"` (one random cycle: no row meets itself unless N = 1), `"same"` or `"different"` (class; needs class
            indices `y`; a row without a candidate keeps itself with lam 1), `"flip"` (row N-1-i) or `"roll"` (row i-1).
        label: the row's own share in the target: `"proportional"` (lam), `"larger"` (all weight on the larger share) or
            `"own"` (1).
        seed: the sampler owns a generator of this seed, whose state is in `state_dict()`. Without it draws come from the
            device's default generator, or the one given to the call.

    Raises:
        TypeError, ValueError: a wrong option; at the call, a missing `y`.

    Call it on a batch, `mixed, target = mixup(x, y)`; or `sample` a `Mix` and apply that. `mixup.eval()` is the identity.

    >>> import torch, fastmix
    >>> mixup = fastmix.Mixup(alpha=0.2, seed=0)
    >>> mixed, target = mixup(torch.randn(8, 3, 32, 32), torch.arange(8))
    >>> mixed.shape, target.classes.shape, target.weights.sum(1).allclose(torch.ones(8))
    (torch.Size([8, 3, 32, 32]), torch.Size([8, 2]), True)
    """

    def __init__(self, alpha, *, per="row", prob=1.0, partner="any", label="proportional", seed=None):
        super().__init__(alpha, per, prob, partner, label, seed)

    def _draw(self, draw, x, index, unit, mixed):
        lam = torch.where(mixed, draw.beta(*self.alpha)[unit], 1)
        return Mix(lam, index, self._target_lam(lam))


class CutMix(_Sampler):
    """CutMix (arXiv:1905.04899): a box of the row is replaced by its partner's, lam ~ Beta(alpha, alpha).

    The box has sides `size * (1-lam)**(1/d)`, rounded down, around a centre drawn evenly from the image, cut off at its
    border: intervals of `[N, C, L]` (or `[N, L]`), rectangles of `[N, C, H, W]`, boxes of `[N, C, D, H, W]`.

    Args:
        alpha, per, prob, partner, label, seed: as for `fastmix.Mixup`.
        minmax: `(least, most)` ratio of each side instead of lam: sides and a place wholly inside the image are drawn evenly,
            and the target follows the box.
        correct_lam: the target follows the box as cut off; else the lam that was drawn.

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
        self.minmax = minmax
        self.correct_lam = bool(correct_lam)

    def extra_repr(self):
        return f"{super().extra_repr()}, minmax={self.minmax}, correct_lam={self.correct_lam}"

    def _draw(self, draw, x, index, unit, mixed):
        if x.dim() < 2:
            raise _check.wrong(ValueError, "x", "shape [N, L], [N, C, L], [N, C, H, W] or [N, C, D, H, W]", x)
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


def _alpha(alpha):
    values = alpha if isinstance(alpha, (tuple, list)) else (alpha, alpha)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, numbers.Real) for v in values):
        raise _check.wrong(TypeError, "alpha", "a number or a pair of numbers", alpha)
    if not all(1e-3 <= v < math.inf for v in values):
        raise _check.wrong(ValueError, "alpha", "positive, from 0.001 (prob=0 or eval() turns mixing off)", alpha)
    return tuple(float(v) for v in values)


def _number(argument, value, least, most):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _check.wrong(TypeError, argument, f"a number in [{least}, {most}]", value)
    if not least <= value <= most:
        raise _check.wrong(ValueError, argument, f"a number in [{least}, {most}]", value)
    return float(value)


def _one_of(argument, value, names):
    if value not in names:
        raise _check.wrong(ValueError, argument, f"one of {', '.join(map(repr, names))}", value)
    return value
