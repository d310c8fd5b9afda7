"""Samplers of regions of the partner: ResizeMix's box, SaliencyMix's and AttentiveCutMix's cells, which follow a map of what matters."""

import math
from typing import Any

import torch

from .. import _check
from .._dtypes import FLOATS
from . import draws
from .axes import box_fraction
from .base import BetaSampler
from .labels import MISSING, check_given, check_labels
from .masks import EVEN, Alone, Scaled, check_grid, grid_cells, without_alpha
from .plan import Mix


class BoxSampler(Alone):
    """The base of samplers whose boxes lie over the last two dimensions."""

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super()._check_batch(x, y)
        if x.dim() < 3:
            raise _check.wrong(ValueError, "x", "shape [N, ..., H, W]", x)

    def _boxed(
        self, drawn: Mix, x: torch.Tensor, sides: torch.Tensor, centres: torch.Tensor, lam: torch.Tensor
    ) -> torch.Tensor:
        """Gives the Mix boxes of these sides around these centres [N, 2], cut off at the image's border, and empty ones where lam is 1;
        returns the shares of the image outside them."""
        start = centres - sides.div(2, rounding_mode="floor")
        sizes = tuple(x.shape[-2:])
        corners = torch.cat((start, start + sides), 1)
        cut = [corners[:, c].clamp(0, sizes[c % 2]) for c in range(4)]
        drawn.box = torch.where((lam == 1).unsqueeze(1), 0, torch.stack(cut, 1))
        drawn._sizes = torch.Size(sizes)
        return 1 - box_fraction(drawn.box, sizes, torch.float64)


class ResizeMix(Scaled, BoxSampler):
    """ResizeMix (arXiv:2012.11101): the whole partner, resized, is pasted into a box.

        sides = floor(tau * (H, W)),   tau ~ U(scale),   centre anywhere;    label share = 1 - box's area / image's

    The box is cut off at the image's border, and the partner resized to what is left of it, by `fastmix.resize_mix`. So is the partner's
    label map in `Mix.target`, by nearest pixels (as F.interpolate's "nearest-exact").

    Args:
        scale: `(least, most)` of tau, the box's sides as a part of the image's.
        per, prob, partner, label, seed: as for `fastmix.Mixup`; pairs and batches share a box.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; at the call, an `x` without two dimensions behind its rows.

    Source: Qin et al., "ResizeMix: Mixing Data with Preserved Object Information and True Labels".

    >>> import torch, fastmix
    >>> resizemix = fastmix.ResizeMix(seed=0)
    >>> mixed, target = resizemix(torch.randn(8, 3, 32, 32), torch.arange(8))
    >>> mixed.shape, target.weights.sum(1).allclose(torch.ones(8))
    (torch.Size([8, 3, 32, 32]), True)
    """

    _alone = "resizes the partner, by another kernel"

    def __init__(
        self,
        scale: tuple[float, float] = (0.1, 0.8),
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

    def _made(self, drawn: Mix, lam: torch.Tensor, more: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        tau = self._scales(more[:, :1])
        sides, centres = (
            torch.cat([(part * size).floor().to(torch.int64) for part, size in zip(parts, x.shape[-2:], strict=True)], 1)
            for parts in ((tau, tau), (more[:, 1:2], more[:, 2:3]))
        )
        drawn._lam, drawn.resize = None, True
        return self._boxed(drawn, x, sides, centres, lam)


class MapSampler(Alone):
    """The base of samplers that need a map of each image: `sample(x, map)` and `mixer(x, y, map)`."""

    _alone = "needs a saliency map"
    _map = "saliency"

    def _check_map(self, x: torch.Tensor, values: torch.Tensor) -> None:
        check_given(**{self._map: values})
        _check.strided(self._map, values, FLOATS, "a float16, bfloat16, float32 or float64 tensor")
        self._check_size(x, values)
        _check.same_device(self._map, values, x)
        if _check.readable(values) and not bool((values >= 0).all()):
            raise ValueError(f"{self._map}: expected values of at least 0, got one of {float(values.detach().min())}")

    def _check_size(self, x: torch.Tensor, values: torch.Tensor) -> None:
        if values.shape != (x.shape[0], *x.shape[-2:]):
            raise _check.wrong(ValueError, self._map, f"shape {[x.shape[0], *x.shape[-2:]]}", values)

    def sample(  # type: ignore[override]
        self,
        x: torch.Tensor,
        values: torch.Tensor = MISSING,
        y: torch.Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Mix:
        """Draws how to mix a batch, of which only shape, dtype and device matter.

        Args:
            x: `[N, ..., H, W]`.
            values: the map of the same images, at least 0.
            y: class indices `[N]`, needed for `partner="same"` and `"different"`.
            generator: as for other samplers.
        """
        return self._sample_map(x, values, y, generator, False)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor = MISSING,
        values: torch.Tensor = MISSING,
        *,
        generator: torch.Generator | None = None,
        partner: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """(mixed x, mixed target); in eval mode `x` and `y` as they are. `partner`: `(x2, y2)`, whose row i is row i's partner; the map is that
        of x2 then."""
        if not self.training:
            return x, y
        _check.float_tensor("x", x, 3, "[N, ..., H, W]")
        check_given(y=y)
        check_labels(y, x.shape[0], x)
        if partner is not None:
            self._check_partner(partner, x)
        drawn = self._sample_map(x, values, y, generator, partner is not None)
        if partner is None:
            return drawn.apply(x), drawn.target(y)
        return drawn.apply(x, partner=partner[0]), drawn.target(y, partner=partner[1])

    def _sample_map(self, x: torch.Tensor, values: torch.Tensor, y: Any, generator: Any, of_partners: bool) -> Mix:
        if self.training:
            if not isinstance(x, torch.Tensor) or x.dim() < 3:
                raise _check.wrong(TypeError, "x", "a tensor [N, ..., H, W]", x)
            self._check_map(x, values)
        drawn = super().sample(x, y, generator=generator)
        if not self.training:
            return drawn
        lam = drawn._lam
        values = values.detach()
        return self._labelled(drawn, self._chosen(drawn, lam, values if of_partners else values[drawn.index], x), lam.dtype)

    def _finish(self, drawn: Mix, more: torch.Tensor | None, x: torch.Tensor) -> Mix:
        return drawn

    def _chosen(self, drawn: Mix, lam: Any, values: torch.Tensor, x: torch.Tensor) -> Any:
        """Gives the Mix its mask or box, by the maps of the rows' partners, and returns the rows' own shares."""
        raise NotImplementedError


class SaliencyMix(MapSampler, BoxSampler):
    """SaliencyMix (arXiv:2006.01791): CutMix's box, around the most salient pixel of the partner.

        sides = floor(sqrt(1 - lam) * (H, W)),   lam ~ Beta(alpha, alpha),   centre = argmax of the partner's saliency

    The box is cut off at the image's border, and the target follows what is left. Of pixels that are alike the first is taken. It needs a
    saliency map: `sample(x, saliency)`, `mixer(x, y, saliency)`. (The authors' map is that of fine-grained saliency in OpenCV; any of
    `[N, H, W]`, at least 0, will do: `fastmix.saliency` of a gradient, say.)

    Args:
        alpha, prob, per, partner, label, seed: as for `fastmix.Mixup`. Pairs and batches share lam; boxes lie where each row's
            partner has them.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; at the call a map of another shape, and on the CPU one that is negative or NaN.

    Source: Uddin et al., "SaliencyMix: A Saliency Guided Data Augmentation Strategy for Better Regularization".

    >>> import torch, fastmix
    >>> x, y, saliency = torch.randn(8, 3, 32, 32), torch.arange(8), torch.rand(8, 32, 32)
    >>> mixed, target = fastmix.SaliencyMix(seed=0)(x, y, saliency)
    >>> mixed.shape, target.weights.sum(1).allclose(torch.ones(8))
    (torch.Size([8, 3, 32, 32]), True)
    """

    def __init__(
        self,
        alpha: float | tuple[float, float] = 1.0,
        *,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
    ) -> None:
        super().__init__(alpha, per, prob, partner, label, seed)

    def _chosen(self, drawn: Mix, lam: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        sizes = x.shape[-2:]
        ratio = (1 - lam.double()).sqrt().unsqueeze(1)
        sides = torch.cat([(ratio * size).floor().to(torch.int64) for size in sizes], 1)
        flat = values.flatten(1)
        place = flat.argmax(1) if flat[:1].numel() else flat.new_zeros(len(flat), dtype=torch.int64)
        centres = torch.stack((place.div(max(sizes[1], 1), rounding_mode="floor"), place.remainder(max(sizes[1], 1))), 1)
        drawn._lam = torch.ones_like(lam)
        return self._boxed(drawn, x, sides, centres, lam)


class AttentiveCutMix(MapSampler):
    """Attentive CutMix (arXiv:2003.13048): the partner's most attended cells of a grid replace the row's.

        mask = 0 in the `cells` cells of the partner's largest attention, of grid x grid, else 1;    label share = 1 - cells / grid^2

    It needs an attention map: `sample(x, attention)`, `mixer(x, y, attention)`. Of cells that are alike the first are taken. (The authors' map is
    that of a pretrained network's last features, 7 x 7 for 224 x 224 pixels.)

    Args:
        cells: how many cells come from the partner.
        grid: cells a side, or `(h, w)`; h divides the height of the batch and w its width. The map has so many cells, or a multiple of them
            along each side, which are added up.
        per, prob, partner, label, seed: as for `fastmix.Mixup`; `per` is what `prob` is drawn for.

    Raises:
        TypeError, ValueError: as `fastmix.Mixup`; more cells than there are; at the call a map or images that the grid does not divide,
            and on the CPU a map that is negative or NaN.

    Source: Walawalkar et al., "Attentive CutMix: An Enhanced Data Augmentation Approach for Deep Learning Based Image Classification".

    >>> import torch, fastmix
    >>> x, y, attention = torch.randn(8, 3, 224, 224), torch.arange(8), torch.rand(8, 7, 7)
    >>> mixed, target = fastmix.AttentiveCutMix(cells=6, seed=0)(x, y, attention)
    >>> target.weights[0]
    tensor([0.8776, 0.1224])
    """

    _map = "attention"
    _fixed = ("seed", "alpha")
    _checks = {
        **BetaSampler._checks,
        "grid": lambda self, value: self._checked_grid(value),
        "cells": lambda self, value: self._checked_cells(value),
    }

    grid: Any  # a number or two, kept as two

    def __init__(
        self,
        cells: int = 6,
        grid: int | tuple[int, int] = 7,
        *,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
    ) -> None:
        super().__init__(EVEN, per, prob, partner, label, seed)
        self.grid = grid
        self.cells = cells

    def _checked_cells(self, value: int) -> int:
        value = _check.integer("cells", value, 0, "an int of at least 0")
        if value > math.prod(self.grid):
            raise _check.wrong(ValueError, "cells", f"at most the {math.prod(self.grid)} cells of the grid", value)
        self._count = float(value)  # torch.compile takes an int for a constant, and a float for what may change
        return value

    def _checked_grid(self, value: int) -> tuple[int, int]:
        grid = grid_cells(value)
        if math.prod(grid) < getattr(self, "cells", 0):
            raise _check.wrong(ValueError, "grid", f"at least {self.cells} cells, as many as are taken", value)
        return grid

    def extra_repr(self) -> str:
        return without_alpha(super().extra_repr(), cells=self.cells, grid=self.grid)

    def _check_batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super()._check_batch(x, y)
        check_grid(self.grid, x)

    def _check_size(self, x: torch.Tensor, values: torch.Tensor) -> None:
        h, w = self.grid
        if (
            values.dim() != 3
            or len(values) != len(x)
            or any(not s or s % n for s, n in zip(values.shape[1:], (h, w), strict=True))
        ):
            raise _check.wrong(
                ValueError, "attention", f"shape [{x.shape[0]}, {h}, {w}], or a multiple of it along a side", values
            )

    def _chosen(self, drawn: Mix, lam: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        (h, w), (rows, height, width) = self.grid, values.shape
        cells = values.to(torch.float64).view(rows, h, height // h, w, width // w).sum((2, 4)).flatten(1)
        order = cells.argsort(dim=1, descending=True, stable=True)
        rank = torch.zeros_like(order).scatter(1, order, torch.arange(h * w, device=x.device).expand(order.shape))
        mask = (rank >= self._count) | (lam == 1).unsqueeze(1)
        drawn.mask, drawn._lam = mask.view(rows, h, w).to(lam.dtype), None
        return drawn.mask.mean((1, 2))
