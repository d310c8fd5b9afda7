"""Samplers of masks: FMix, SmoothMix, GridMix. Lam and partners come from one launch, as for Mixup; what the masks are made of is drawn
from the same stream."""

import math
from typing import Any

import torch

from .. import _check
from . import draws
from .base import LABELS, BetaSampler, number_in
from .draws import cpu


class Alone(BetaSampler):
    """The base of samplers that draw lam, partners, and something more: `_draw_more` and `_made`."""

    _alone = "draws masks of another size"

    def _kind(self) -> int:
        return cpu.LAM

    def _groups(self, rows: int) -> int:
        """Returns how many groups draw the same: the batch as one, or every row (of a pair the first one counts)."""
        return min(rows, 1) if self.per == "batch" else rows

    def _of_groups(self, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Returns what each row's group has drawn, [N, ...], of values [groups, ...]."""
        if self.per == "batch":
            return values.expand(index.shape[0], *values.shape[1:])
        if self.per == "pair":  # or a ring of three
            after = index[index]
            rows = torch.arange(index.shape[0], device=index.device)
            return values[torch.minimum(torch.minimum(rows, index), after)]
        return values

    def _finish(self, drawn: Any, more: torch.Tensor, x: torch.Tensor) -> Any:
        lam = drawn._lam
        more = None if more is None else self._of_groups(more, drawn.index)
        return self._labelled(drawn, self._made(drawn, lam, more, x), lam.dtype)

    def _made(self, drawn: Any, lam: torch.Tensor, more: torch.Tensor, x: torch.Tensor) -> Any:
        """Gives the Mix its mask or box, and returns the rows' own shares of the image [N]. Rows of lam 1 are whole."""
        raise NotImplementedError

    def _labelled(self, drawn: Any, share: Any, dtype: torch.dtype) -> Any:
        """Gives the Mix the target's shares of what the rows show of themselves."""
        if LABELS[self.label] == cpu.LARGER:
            share = (share >= 0.5).to(dtype)
        elif LABELS[self.label] == cpu.OWN:
            share = torch.ones_like(share)
        drawn._target_lam = share.to(dtype)
        if share.shape[0] == 1:  # a single row is its own partner
            drawn._drawn_share, drawn._target_lam = drawn._target_lam, torch.ones_like(drawn._target_lam)
        return drawn


class MaskSampler(Alone):
    """The base of samplers whose masks lie over the last two dimensions."""

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        super()._check_batch(x, y)
        if x.dim() < 3:
            raise _check.wrong(ValueError, "x", "shape [N, ..., H, W]", x)

    def _masked(self, drawn: Any, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        drawn.mask, drawn._lam = mask.to(dtype), None
        return drawn.mask.flatten(1).mean(1) if drawn.mask[:1].numel() else drawn.mask.new_ones(len(mask))


class FMix(MaskSampler):
    """FMix (arXiv:2002.12047): a mask of blobs, the largest values of low-frequency noise.

        noise = real part of IFFT(FFT(white normal noise) / max(f, 1/longest side)^decay);   mask = the round(lam*H*W) largest are 1

    lam ~ Beta(alpha, alpha); of equal values the first are 1; the target's share is the mask's mean. Normal numbers come from
    the sampler's own stream, the same on every device, and the transform is `torch.fft`'s, in float32: what it rounds may move a few pixels
    at the blobs' edges between devices. (The authors draw complex noise in the half spectrum that a real transform has, which holds
    the numbers of one line once and of the others twice, and round lam*H*W up or down at random.)

    Args:
        alpha, per, prob, partner, label, seed: as for `fastmix.Mixup`; pairs and batches share a mask.
        decay: the power of the frequency that amplitudes are divided by, at least 0; the larger, the larger the blobs.
        dims: how many of the last dimensions a mask lies over; None: one of `[N, C, L]`, two of `[N, C, H, W]` and `[N, H, W]` is
            `dims=2`, three of `[N, C, D, H, W]`. The mask is `[N, 1, L]`, `[N, H, W]` or `[N, D, H, W]`.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; at the call, an `x` without so many dimensions behind its rows.

    Source: Harris et al., "FMix: Enhancing Mixed Sample Data Augmentation".

    >>> import torch, fastmix
    >>> m = fastmix.FMix(seed=0).sample(torch.randn(8, 3, 32, 32))
    >>> m.mask.shape, m.mask.unique(), torch.equal(m.target_lam, m.mask.mean((1, 2)))
    (torch.Size([8, 32, 32]), tensor([0., 1.]), True)
    """

    _checks = {
        **BetaSampler._checks,
        "decay": lambda self, value: _at_least("decay", value, 0),
        "dims": lambda self, value: None if value is None else _dims(value),
    }

    def __init__(
        self,
        alpha: float | tuple[float, float] = 1.0,
        decay: float = 3.0,
        *,
        dims: int | None = None,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
    ) -> None:
        super().__init__(alpha, per, prob, partner, label, seed)
        self.decay = decay
        self.dims = dims

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}" + f", dims={self.dims}" * (self.dims is not None)

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        BetaSampler._check_batch(self, x, y)
        dims = self._count(x)
        if x.dim() < max(1 + dims, 3):
            raise _check.wrong(ValueError, "x", ("[N, ..., C, L]", "[N, ..., H, W]", "[N, ..., D, H, W]")[dims - 1], x)

    def _count(self, x: torch.Tensor) -> int:
        return min(max(x.dim() - 2, 1), 3) if self.dims is None else self.dims

    def _sizes(self, x: torch.Tensor) -> torch.Size:
        return x.shape[x.dim() - self._count(x) :]

    def _draw_more(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return draws.numbers(state, self._groups(x.shape[0]), math.prod(self._sizes(x)), True, x)

    def _made(self, drawn: Any, lam: torch.Tensor, more: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        sizes = self._sizes(x)
        pixels = math.prod(sizes)
        rank = torch.zeros(more.shape, dtype=torch.int64, device=more.device)
        if more.numel():
            order = self._blobs(more, sizes).argsort(dim=1, descending=True, stable=True)
            rank = rank.scatter(1, order, torch.arange(pixels, device=x.device).expand(order.shape))
        mask = rank < (lam.double() * pixels).round().unsqueeze(1)
        return self._masked(drawn, mask.view(-1, *((1, *sizes) if len(sizes) == 1 else sizes)), lam.dtype)

    def _blobs(self, noise: torch.Tensor, sizes: torch.Size) -> torch.Tensor:
        """Returns noise [N, pixels] without its high frequencies."""
        noise = noise.reshape(-1, *sizes)
        dims, square = tuple(range(1, noise.dim())), torch.zeros((), device=noise.device)
        for d, size in enumerate(sizes):
            last = d == len(sizes) - 1
            along = (torch.fft.rfftfreq if last else torch.fft.fftfreq)(size, device=noise.device)
            square = square + along.square().view(-1, *[1] * (len(sizes) - 1 - d))
        amplitude = (square.sqrt() * max(sizes)).clamp(min=1) ** -self.decay
        return torch.fft.irfftn(torch.fft.rfftn(noise, dim=dims) * amplitude, s=tuple(sizes), dim=dims).flatten(1)


class Scaled(BetaSampler):
    """The base of samplers whose spot or box has a size of its own, and lam is 1 or 1/2."""

    _checks = {**BetaSampler._checks, "scale": lambda self, value: scale_range(value)}
    _fixed = ("seed", "alpha")
    scale: tuple[float, float]

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps the scale as two floats too: torch.compile takes a tuple for a constant, and floats for what may change."""
        super().__setattr__(name, value)
        if name == "scale":
            least, most = self.scale
            self._least, self._more = least, most - least

    def extra_repr(self) -> str:
        return without_alpha(super().extra_repr(), scale=self.scale)

    def _scales(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns numbers of [0, 1) spread over the scale."""
        return self._least + self._more * numbers


class SmoothMix(Scaled, MaskSampler):
    """SmoothMix (Lee et al., CVPRW 2020): the partner shows through a soft spot.

        mask = 1 - exp(-((y - cy)^2/H^2 + (x - cx)^2/W^2) / (2 s^2)),    s ~ U(scale), centre (cy, cx) anywhere

    The target's share is the mask's mean; nothing of it comes from a Beta distribution. On images that are not square the spot is as
    wide, for its height, as the image is.

    Args:
        scale: `(least, most)` of the spot's standard deviation, as a part of the image's sides.
        per, prob, partner, label, seed: as for `fastmix.Mixup`; pairs and batches share a mask.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; at the call, an `x` without two dimensions behind its rows.

    Source: Lee, Zaheer, Astrid and Lee, "SmoothMix: a Simple Yet Effective Data Augmentation to Train Robust Classifiers", CVPR
    Workshops 2020.

    >>> import torch, fastmix
    >>> m = fastmix.SmoothMix(seed=0).sample(torch.randn(8, 3, 32, 32))
    >>> m.mask.shape, bool((m.mask >= 0).all() & (m.mask < 1).all())
    (torch.Size([8, 32, 32]), True)
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.25, 0.5),
        *,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
    ) -> None:
        super().__init__(EVEN, per, prob, partner, label, seed)
        self.scale = scale

    def _draw_more(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return draws.numbers(state, self._groups(x.shape[0]), 3, False, x)

    def _made(self, drawn: Any, lam: torch.Tensor, more: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        deviation = self._scales(more[:, :1]).clamp(min=1e-6)
        spot = []
        for d, size in enumerate(x.shape[-2:]):
            centre = (more[:, 1 + d : 2 + d] * size).floor()
            away = (torch.arange(size, device=x.device) - centre) / (max(size, 1) * deviation)
            spot.append(torch.exp(-0.5 * away.square()))
        mask = 1 - spot[0].unsqueeze(2) * spot[1].unsqueeze(1)
        return self._masked(drawn, torch.where((lam == 1)[:, None, None], 1, mask), lam.dtype)


class GridMix(MaskSampler):
    """GridMix (Baek, Bang and Shim, 2021): random cells of a grid come from the partner.

        round(lam * cells) cells of grid x grid stay, which ones is drawn evenly;    lam ~ Beta(alpha, alpha)

    The target's share is their part of all cells. (The authors add a loss for each cell's own label; `mix.target` of label maps, or
    `mix.mask`, is what that takes.)

    Args:
        alpha, per, prob, partner, label, seed: as for `fastmix.Mixup`; pairs and batches share a mask.
        grid: cells a side, or `(h, w)`; h divides the height of the batch and w its width.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; at the call, an `x` without two dimensions behind its rows, or that the grid does not
            divide.

    Source: Baek, Bang and Shim, "GridMix: Strong regularization through local context mapping", Pattern Recognition 109, 2021.

    >>> import torch, fastmix
    >>> m = fastmix.GridMix(grid=4, seed=0).sample(torch.randn(8, 3, 32, 32))
    >>> m.mask.shape, m.mask.unique()
    (torch.Size([8, 4, 4]), tensor([0., 1.]))
    """

    _checks = {**BetaSampler._checks, "grid": lambda self, value: grid_cells(value)}

    grid: Any  # a number or two, kept as two

    def __init__(
        self,
        alpha: float | tuple[float, float] = 1.0,
        grid: int | tuple[int, int] = 4,
        *,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
    ) -> None:
        super().__init__(alpha, per, prob, partner, label, seed)
        self.grid = grid

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, grid={self.grid}"

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor | None) -> None:
        super()._check_batch(x, y)
        check_grid(self.grid, x)

    def _draw_more(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return draws.numbers(state, self._groups(x.shape[0]), math.prod(self.grid), False, x)

    def _made(self, drawn: Any, lam: torch.Tensor, more: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cells = math.prod(self.grid)
        order = more.argsort(dim=1, stable=True)
        rank = torch.zeros_like(order).scatter(1, order, torch.arange(cells, device=x.device).expand(order.shape))
        mask = rank < (lam.double() * cells).round().unsqueeze(1)
        return self._masked(drawn, mask.view(-1, *self.grid), lam.dtype)


EVEN = 1e30  # an alpha of which lam is always 1/2: 1 only where a row is not mixed


def without_alpha(text: Any, **options: Any) -> Any:
    """Returns a sampler's options as text, these in place of alpha."""
    shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{shown}, {text.split(', ', 1)[1]}"


def scale_range(value: tuple[float, float], name: str = "scale") -> tuple[float, float]:
    """Returns (least, most), in [0, 1]."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _check.wrong(TypeError, name, "(least, most), numbers in [0, 1]", value)
    least, most = (number_in(name, part, 0, 1) for part in value)
    if least > most:
        raise _check.wrong(ValueError, name, "least <= most", value)
    return least, most


def grid_cells(value: int) -> tuple[int, int]:
    """Returns (h, w) of a grid given so or as one number."""
    several = value if isinstance(value, (tuple, list)) else (value, value)
    if len(several) != 2:
        raise _check.wrong(TypeError, "grid", "an int, or (h, w)", value)
    h, w = (_check.integer("grid", count, 1, "numbers of at least 1") for count in several)
    return h, w


def check_grid(grid: Any, x: torch.Tensor) -> None:
    if any(side % count for side, count in zip(x.shape[-2:], grid, strict=True)):
        raise _check.wrong(ValueError, "x", f"height and width that a grid of {grid[0]} x {grid[1]} divides", x)


def _at_least(name: str, value: float, least: int) -> float:
    value = _check.number(name, value)
    if value < least:
        raise _check.wrong(ValueError, name, f"a number of at least {least}", value)
    return value


def _dims(value: Any) -> Any:
    value = _check.integer("dims", value, 1, "1, 2 or 3")
    if value > 3:
        raise _check.wrong(ValueError, "dims", "1, 2 or 3", value)
    return value
