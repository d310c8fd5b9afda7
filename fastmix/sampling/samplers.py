"""The samplers of image and feature mixing, and weights for n-way mixing."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import _check
from .._dtypes import WEIGHT_DTYPES
from . import draws
from .axes import axes_last, box_axes, places
from .base import PARTNERS, PER, BetaSampler, Sampler, beta_parameters, number_in, one_of, sampler_weights
from .draws import Node, cpu


class Mixup(BetaSampler):
    """mixup (arXiv:1710.09412): every row is a convex combination with a partner, lam ~ Beta(alpha, alpha).

    Args:
        alpha: of Beta(alpha, alpha), or `(a, b)` of Beta(a, b); positive. Sound from 0.05 to 32.
        per: what is drawn anew: `"row"`, `"pair"` (two rows that are each other's partners share lam: rows 2k and 2k+1 under
            partner roll; the last three of an odd batch form a ring under any and roll; with same and different, rows left
            without a pair keep lam 1) or `"batch"` (one lam).
        prob: the probability that a row (pair, batch) is mixed at all; others keep lam 1.
        partner: `"any"` (one random cycle: no row meets itself unless N = 1), `"same"` or `"different"` (class; needs class
            indices `y`; a row without a candidate keeps itself with lam 1), `"flip"` (row N-1-i) or `"roll"` (row i-1). `"near"` is
            C-Mixup (arXiv:2210.05775) for regression: row j != i with probability proportional to `exp(-|y_i - y_j|^2 / (2 *
            bandwidth^2))`, of floating `y` `[N]` or `[N, D]`; rows draw alone, from `[N, N]` weights on the device.
        label: the row's own share in the target: `"proportional"` (lam), `"larger"` (all weight on the larger share) or
            `"own"` (1); `"union"`: what either shows is fully there, for sigmoid losses. Class indices then give a `SoftTarget` of
            weights 0 and 1, multi-hot rows the tensor `max(y, y[index])` (`MixedRows.union`).
        bandwidth: of `partner="near"`, in the units of y.
        seed: an int in [0, 2**63): the sampler has a random stream of its own, counted by batch, row and draw (Philox): the same on
            every device, for at most 2**48 rows. `state_dict()` holds the number of the batch. That is how far the stream has
            gone, not which one it is: seed and rank of `torch.distributed` say that, so ranks draw differently, and each goes
            on along its own from a checkpoint that one of them wrote. In a DataLoader worker the sampler's copy starts a
            stream of the seed and the worker's own seed, so workers and epochs draw differently, and `torch.manual_seed`
            in the main process repeats them all. It works inside `torch.compile` and CUDA graphs; not inside
            `torch.utils.checkpoint`, which would draw the next batch when it runs a part again. Without a seed each batch
            takes its key from the device's default generator, or the one given to the call.

    Raises:
        TypeError, ValueError: a wrong option; at the call, a missing or wrong `y`, or a generator of another device.

    Call it on a batch, `mixed, target = mixup(x, y)`; or `sample` a `Mix` and apply that. `mixup.eval()` is the identity. A single
    row has no partner: its own share in the target is 1. Options may be set later (`mixup.prob = 0.5`), and are checked then too;
    a DataLoader worker that persists has a copy of its own, which neither they nor `eval()` reach: mix behind the loader.

    >>> import torch, fastmix
    >>> mixup = fastmix.Mixup(alpha=0.2, seed=0)
    >>> mixed, target = mixup(torch.randn(8, 3, 32, 32), torch.arange(8))
    >>> mixed.shape, target.classes.shape, target.weights.sum(1).allclose(torch.ones(8))
    (torch.Size([8, 3, 32, 32]), torch.Size([8, 2]), True)
    """

    def __init__(
        self,
        alpha: float | tuple[float, float],
        *,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
        bandwidth: float | None = None,
    ) -> None:
        super().__init__(alpha, per, prob, partner, label, seed, bandwidth)

    def _kind(self) -> int:
        return cpu.LAM


class CutMix(BetaSampler):
    """CutMix (arXiv:1905.04899): a box of the row is replaced by its partner's, lam ~ Beta(alpha, alpha).

    The box has sides `size * (1-lam)**(1/d)`, rounded down, around a centre drawn evenly from the image, cut off at its
    border: intervals of `[N, C, L]` (or `[N, L]`), rectangles of `[N, C, H, W]`, boxes of `[N, C, D, H, W]`. (The authors' code
    makes every side even.)

    Args:
        alpha, per, prob, partner, label, seed: as for `fastmix.Mixup`.
        minmax: `(least, most)` ratio of each side instead of lam: sides and a place wholly inside the image are drawn evenly,
            and the target follows the box.
        correct_lam: the target follows the box as cut off; else the lam that was drawn.
        axes: the dimensions that a box is cut in, one to three, where they are not those above: `(3, 4)` for clips
            `[N, T, C, H, W]`, `(1, 2)` for channels last `[N, H, W, C]`, `(1,)` for tokens `[N, L, D]`.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; at the call, an `x` without a dimension to cut.

    >>> import torch, fastmix
    >>> cutmix = fastmix.CutMix(seed=0)
    >>> m = cutmix.sample(torch.randn(8, 3, 32, 32))
    >>> m.box.shape, m.lam.unique()
    (torch.Size([8, 4]), tensor([1.]))
    """

    _checks = {
        **BetaSampler._checks,
        "minmax": lambda self, value: self._checked_ratios(value),
        "correct_lam": lambda self, value: _bool("correct_lam", value),
        "axes": lambda self, value: None if value is None else box_axes(value),
    }

    def __init__(
        self,
        alpha: float | tuple[float, float] = 1.0,
        *,
        minmax: tuple[float, float] | None = None,
        correct_lam: bool = True,
        axes: Sequence[int] | None = None,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
    ) -> None:
        super().__init__(alpha, per, prob, partner, label, seed)
        self.minmax = minmax
        self.correct_lam = correct_lam
        self.axes = axes

    def _checked_ratios(self, minmax: Any) -> tuple[float, float] | None:
        minmax = _ratios(minmax)
        self._draws_sides = minmax is not None
        return minmax

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, minmax={self.minmax}, correct_lam={self.correct_lam}" + f", axes={self.axes}" * bool(
            self.axes
        )

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        super()._check_batch(x, y)
        if self.axes is not None:
            axes_last("x", x, self.axes)
        elif x.dim() < 2:
            raise _check.wrong(ValueError, "x", "shape [N, L], [N, C, L], [N, C, H, W] or [N, C, D, H, W]", x)

    def _kind(self) -> int:
        return cpu.SIDES if self._draws_sides else cpu.BOX

    def _sides(self) -> tuple[int, float, float]:
        # a program that is traced takes the ratios from a tensor: read here they would be its constants
        return int(self.correct_lam), *(self.minmax if self._draws_sides and not torch.compiler.is_compiling() else (0.0, 0.0))

    def _parts(self, x: torch.Tensor) -> set[str]:
        return {"boxes"}


class BetaMask(BetaSampler):
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

    _checks = {**BetaSampler._checks, "size": lambda self, value: _cells(value)}

    def __init__(
        self,
        alpha: float | tuple[float, float],
        size: int | tuple[int, int] | None = None,
        *,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
    ) -> None:
        super().__init__(alpha, per, prob, partner, label, seed)
        self.size = size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        super()._check_batch(x, y)
        if x.dim() < 3:
            raise _check.wrong(ValueError, "x", "shape [N, L, D] or [N, ..., H, W]", x)
        if self.size is not None and any(side % count for side, count in zip(x.shape[-2:], self.size, strict=True)):
            raise _check.wrong(ValueError, "x", f"height and width that size {self.size} divides", x)

    def _parts(self, x: torch.Tensor) -> set[tuple[int, int]]:
        return {self._size(x)}

    def _size(self, x: torch.Tensor) -> Any:
        return tuple(x.shape[-2:]) if self.size is None else self.size

    def _kind(self) -> int:
        return cpu.MASK


class RandomMix(Sampler):
    """Each row, or the whole batch, is mixed by one of several samplers, which one is drawn at random.

        P(sampler k) = weights[k] / sum of weights

    Every member draws for the batch, and each row takes its lam, partner, target share and box from the one that it uses: one
    `Mix`, so one launch serves rows of mixup and rows of CutMix together.

    Args:
        samplers: Mixup, CutMix, BetaMask or RandomMix, one or more; masks are of one size, and not beside boxes. Other samplers'
            masks have a size of their own, or they need a saliency map or another launch.
        weights: a number for each sampler, at least 0 and not all 0; equal where None.
        per: what chooses anew: `"row"`, `"pair"` or `"batch"`. Rows choose alone: two that share lam in a sampler with
            `per="pair"` still do where both use it. With `per="pair"` they choose together, and so do the last three of an odd
            batch: the samplers then have `per="pair"` too, the same `partner`, and no seed of their own.
        seed: as for `fastmix.Mixup`. Members without a seed draw from this sampler's stream, those with one from their own;
            a generator given to the call serves all.

    Raises:
        TypeError, ValueError: a wrong option; members that do not pair rows alike under `per="pair"`; at the call, what one of the
            samplers raises.

    Source: timm's `Mixup` switches between mixup and CutMix with `weights=(1 - switch_prob, switch_prob)`, once per batch in its
    mode "batch", per row in "elem", per pair in "pair" (with partner "flip"); torchvision's `v2.RandomChoice([mixup, cutmix], p=weights)` once per batch.

    >>> import torch, fastmix
    >>> mixer = fastmix.RandomMix(fastmix.Mixup(0.8), fastmix.CutMix(1.0), weights=(1, 3), seed=0)
    >>> mixed, target = mixer(torch.randn(8, 3, 32, 32), torch.arange(8))
    >>> mixed.shape, target.classes.shape
    (torch.Size([8, 3, 32, 32]), torch.Size([8, 2]))
    >>> m = mixer.sample(torch.randn(400, 3, 32, 32))
    >>> ((m.lam == 1).float().mean() - 0.75).abs() < 0.1  # rows with a box
    tensor(True)
    """

    _checks = {
        "weights": lambda self, value: self._checked_weights(value),
        "per": lambda self, value: one_of("per", value, PER),
    }

    def __init__(
        self, *samplers: Sampler, weights: Sequence[float] | None = None, per: str = "row", seed: int | None = None
    ) -> None:
        super().__init__(seed)
        if not samplers:
            raise _check.wrong(ValueError, "samplers", "at least one sampler", samplers)
        for k, sampler in enumerate(samplers):
            if getattr(sampler, "_alone", None) is not None:
                expected = "a Mixup, CutMix, BetaMask or RandomMix, which one launch draws and one mixes"
                got = f"{'an' if type(sampler).__name__[0] in 'AF' else 'a'} {type(sampler).__name__}"
                raise TypeError(f"samplers[{k}]: expected {expected}, got {got}, which {sampler._alone}")
            if not isinstance(sampler, Sampler):
                raise _check.wrong(TypeError, f"samplers[{k}]", "a Mixup, CutMix, BetaMask or RandomMix", sampler)
        self.samplers = nn.ModuleList(samplers)
        self.weights = weights
        self.per = per
        self._check_pairs()

    def extra_repr(self) -> str:
        return f"weights={self.weights}, per={self.per!r}, seed={self.seed}"

    def _checked_weights(self, weights: Any) -> tuple[float, ...]:
        weights = sampler_weights(weights, len(self.samplers))
        self._limits = torch.tensor(_limits(weights), dtype=torch.float64, device="cpu")
        return weights

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_limits"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._checked_weights(self.weights)

    def _members(self) -> list[Sampler]:
        """Returns the samplers; asked for by name, nn.Module would take a microsecond each time."""
        return list(self._modules["samplers"]._modules.values())  # type: ignore[union-attr, arg-type]

    def _family(self) -> tuple[Sampler, ...]:
        members = self._members()
        return (*members, *(found for sampler in members if isinstance(sampler, RandomMix) for found in sampler._family()))

    def _leaves(self) -> list[Sampler]:
        return [leaf for sampler in self._members() for leaf in sampler._leaves()] if self.training else []

    def _pairings(self) -> set[str]:
        if self.seed is not None or self.per == "row":
            return {"a RandomMix with " + ("per='row'" if self.seed is None else "a seed of its own")}
        return set().union(*(sampler._pairings() for sampler in self._members() if sampler.training))

    def _check_pairs(self) -> str | None:
        """Checks that the rows of a pair find each other in whichever member they choose."""
        if self.per != "pair":
            return None
        found = set().union(*(sampler._pairings() for sampler in self._members() if sampler.training))
        if len(found) > 1 or not found <= PARTNERS.keys():
            got = ", ".join(f"partner={name!r}" if name in PARTNERS else name for name in sorted(found))
            raise ValueError(
                "samplers: expected members with per='pair', one partner and no seed of their own, since the rows of a pair choose "
                f"together, got {got}"
            )
        return min(found, default="any")

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        self._check_pairs()
        for sampler in self._members():
            if sampler.training:
                sampler._check_batch(x, y)
        leaves = self._leaves()
        axes = {leaf.axes for leaf in leaves if hasattr(leaf, "axes")}
        if len(axes) > 1 and len({places(cut, x.dim()) for cut in axes}) > 1:
            raise _check.wrong(ValueError, "samplers", "boxes in the same axes", sorted(axes, key=str))
        labels = {getattr(leaf, "label", None) for leaf in leaves}
        if len(labels) > 1 and "union" in labels:
            raise _check.wrong(ValueError, "samplers", "label='union' in all of them or in none", sorted(labels, key=str))
        parts = self._parts(x)
        if len(parts) > 1:
            found = ", ".join("boxes" if part == "boxes" else f"masks of {list(part)}" for part in sorted(parts, key=str))
            raise ValueError(f"samplers: expected boxes, or masks of one size, since a batch has one of these; got {found}")

    def _parts(self, x: torch.Tensor) -> set[str]:
        return set().union(*(sampler._parts(x) for sampler in self._members() if sampler.training))

    def _owners(self) -> list[Sampler]:
        found = super()._owners()
        for sampler in self._members():
            if sampler.training:
                found += [owner for owner in sampler._owners() if all(owner is not known for known in found)]
        return found

    def _add(
        self, nodes: list[Node], samplers: Any, owners: Any, owner: int, first: int, parent: int, low: float, high: float
    ) -> None:
        number = len(nodes)
        partner = PARTNERS[self._check_pairs() or "any"]
        nodes.append(Node(cpu.CHOICE_OF, owner, number - first, PER[self.per], partner, parent=parent, low=low, high=high))
        # a program that is traced takes them from the tensor
        members = self._members()
        limits = (0.0,) * (len(members) + 1) if torch.compiler.is_compiling() else _limits(self.weights)
        for sampler, least, most in zip(members, limits, limits[1:], strict=False):
            sampler._list(nodes, samplers, owners, owner, first, number, least, most)


def _ratios(minmax: Any) -> tuple[float, float] | None:
    """Returns the least and most ratio of a box's sides, or None."""
    if minmax is None:
        return None
    if not isinstance(minmax, (tuple, list)) or len(minmax) != 2:
        raise _check.wrong(TypeError, "minmax", "(least, most) ratio of a box's sides", minmax)
    least, most = (number_in("minmax", ratio, 0, 1) for ratio in minmax)
    if least > most:
        raise _check.wrong(ValueError, "minmax", "least <= most", minmax)
    return least, most


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _check.wrong(TypeError, name, "a bool", value)
    return value


def _cells(size: Any) -> Any:
    """Returns how many cells a mask has, or None."""
    if size is None:
        return None
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise _check.wrong(TypeError, "size", "(h, w), how many cells a mask has, or None", size)
    return tuple(_check.integer("size", count, 1, "numbers of at least 1") for count in size)


def dirichlet(
    rows: int,
    ways: int,
    alpha: float | tuple[float, float] = 1.0,
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
    alpha, _ = beta_parameters(alpha, hint="")
    skip = None if skip is None else beta_parameters(skip, "skip", hint="")
    if dtype not in WEIGHT_DTYPES:
        raise _check.wrong(TypeError, "dtype", "torch.float32 or torch.float64", dtype)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise _check.wrong(TypeError, "generator", "a torch.Generator", generator)
    place = None if device is None else _check.device("device", device)
    if generator is not None:
        place = generator.device if place is None else place
        if generator.device.type != place.type:
            raise ValueError(f"generator: expected one on {place}, got one on {generator.device}")
    if place is None:
        place = torch.empty(0).device
    state = draws.fresh_state(draws.state_device(place), generator)
    return draws.dirichlet(state.to(draws.state_device(place)), rows, ways, (alpha, *(skip or ())), dtype, place)


@functools.lru_cache(maxsize=256)
def _limits(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the chances, of 2**53, between which each of several samplers is chosen."""
    *before, total = itertools.accumulate(weight / max(weights) for weight in weights)
    return 0.0, *(float(round(part / total * 2**53)) for part in before), float(2**53)
