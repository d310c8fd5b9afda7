"""AugMix: bytes of images to normalised images, and views of them that are mixed chains of operations."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import _check, _dispatch
from .._torch.augmix_steps import OPERATIONS, step_numbers
from ..mixing.augmix import OP
from . import draws
from .base import beta_parameters
from .mix_images import LAYOUTS, channel_constants
from .stream import Stream

MOST = 16  # chains of a view, steps of a chain, views


class AugMix(Stream):
    """AugMix (arXiv:1912.02781): views of an image that are weighted sums of chains of operations, each as Pillow computes it.

        view = (1 - m)*N(x) + m * sum over k of w[k]*N(chain_k(x)),    w ~ Dirichlet(alpha, ...), m ~ Beta(alpha, alpha)

    N normalises bytes: `(v/255 - mean) / std`. A chain has one to three operations, drawn with replacement from autocontrast, equalize,
    posterize, rotate, solarize, shear_x, shear_y, translate_x and translate_y; strength u ~ U(0.1, severity): rotations by
    `int(30u/10)` degrees, shears by `0.3u/10` and translations by `int(side/3 * u/10)` pixels, each either way, bilinear and black
    outside; posterize to `4 - int(4u/10)` bits; solarize from `256 - int(256u/10)` on. Every chain of every view of every row draws
    alone, by counter on the images' device, and the same seed draws the same on every device. The bytes of every step are Pillow's.

    Launches: two that draw, two for each step, one that sums up. Memory floor, for every byte of a chain: read and written once a step, read
    once more under autocontrast and equalize (for the histogram), and read once for the sum; images are read once, floats written
    once. Nothing is differentiable.

    Args:
        width: chains of a view, from 1 to 16.
        depth: operations of a chain, from 1 to 16; None: from one to three, drawn for each.
        severity: the largest strength, from 0.1 to 10. The authors take 3 for CIFAR and 1 for ImageNet.
        alpha: of the Dirichlet and the Beta distribution.
        mean, std: one number, or one for each channel, in units of `byte / 255`.
        operations: `"augmix"`, the nine above, or a sequence of some of their names.
        views: of each image, from 1 to 16.
        seed: as for `fastmix.Mixup`.

    Raises:
        TypeError, ValueError: a wrong option; at the call images that are not uint8, or of another shape or number of channels,
            before anything is launched.

    Call it on a batch of bytes, `clean, first, second = augmix(images)`; `stack` gives the same as one tensor, for one forward over
    all. In eval mode the views are the clean images. The loss is `fastmix.augmix_loss`.

    Source: Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty", ICLR 2020.

    >>> import torch, fastmix
    >>> augmix = fastmix.AugMix(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], seed=0)
    >>> images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    >>> clean, first, second = augmix(images)
    >>> clean.shape, first.shape, augmix.stack(images).shape
    (torch.Size([8, 3, 32, 32]), torch.Size([8, 3, 32, 32]), torch.Size([3, 8, 3, 32, 32]))
    """

    _checks = {
        "width": lambda self, value: _count("width", value),
        "depth": lambda self, value: None if value is None else _count("depth", value),
        "severity": lambda self, value: _severity(value),
        "alpha": lambda self, value: _alpha(value),
        "mean": lambda self, value: _channels("mean", value),
        "std": lambda self, value: _channels("std", value),
        "operations": lambda self, value: _operations(value),
        "views": lambda self, value: _count("views", value),
    }

    def __init__(
        self,
        width: int = 3,
        depth: int | None = None,
        severity: float = 3.0,
        alpha: float = 1.0,
        *,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        operations: str | Sequence[str] = "augmix",
        views: int = 2,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        self.width, self.depth, self.severity, self.alpha = width, depth, severity, alpha
        self.mean, self.std = mean, std
        self.operations, self.views = operations, views

    def extra_repr(self) -> str:
        names = "width", "depth", "severity", "alpha", "mean", "std", "operations", "views"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self, images: torch.Tensor, *, layout: str | None = None, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Returns the normalised images and their views: `1 + views` tensors `[N, C, H, W]` float32.

        Args:
            images: `[N, C, H, W]` or `[N, H, W, C]` uint8, in any strides.
            layout: `"NCHW"` or `"NHWC"`. None: the second dimension is that of the channels if it has as many as `mean` (or, where
                that is a number, one or three), else the last one if that has.
            generator: draws a key from it instead of using the own stream (or the device's default generator).
        """
        return self.stack(images, layout=layout, generator=generator).unbind()

    def stack(
        self, images: torch.Tensor, *, layout: str | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Returns the same as one tensor `[1 + views, N, C, H, W]`, the normalised images first: `stack(images).flatten(0, 1)` is
        the batch of one forward, whose logits `fastmix.augmix_loss` takes."""
        images = self._checked(images, layout)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise _check.wrong(TypeError, "generator", "a torch.Generator", generator)
        if generator is not None and generator.device.type != images.device.type:
            raise ValueError(f"generator: expected one on {images.device}, as images, got one on {generator.device}")
        mean, std = (value if isinstance(value, tuple) else (value,) * images.shape[1] for value in (self.mean, self.std))
        factor, shift = channel_constants(mean, std, 1 / 255, images)
        images = images.contiguous()
        N, _, H, W = images.shape
        if not self.training:
            kinds = torch.empty(0, 0, dtype=torch.int32, device=images.device)
            values = torch.empty(0, 0, 6, dtype=torch.float64, device=images.device)
            weights = torch.ones(N, 0, 1, device=images.device)
            clean = _dispatch.call(OP, (images,), images, kinds, values, weights, factor, shift)
            return clean.expand(1 + self.views, *clean.shape[1:])
        place = draws.state_device(images.device)
        seeded = self._state is not None and generator is None
        if seeded:
            self._count_rows([self], N * self.views * self.width * (self.depth or 3))
        state = self._own_state(place) if seeded else draws.fresh_state(place, generator).to(place)
        weights = draws.dirichlet(state, N * self.views, self.width, (self.alpha,) * 3, torch.float32, images.device).view(
            N, self.views, 1 + self.width
        )
        numbers = step_numbers(self.severity, H, W, self.operations)
        chains = N * self.views * self.width
        kinds, values = draws.augmix_steps(state, seeded, chains, self.depth or 3, self.depth is None, numbers, images)
        return _dispatch.call(OP, (images,), images, kinds, values, weights, factor, shift)

    def _checked(self, images: torch.Tensor, layout: str | None) -> torch.Tensor:
        """Returns the images as [N, C, H, W]."""
        if isinstance(images, torch.Tensor) and images.is_floating_point():
            raise _check.wrong(TypeError, "images", "uint8 bytes", images)
        _check.strided("images", images, (torch.uint8,), "a uint8 tensor")
        if layout is not None:
            _check.one_of("layout", layout, LAYOUTS, "'NCHW', 'NHWC' or None")
        if images.dim() != 4:
            raise _check.wrong(ValueError, "images", "shape [N, C, H, W] or [N, H, W, C]", images)
        counts = {len(value) for value in (self.mean, self.std) if isinstance(value, tuple)}
        fits = counts or {1, 3}
        if layout is None:
            layout = "NHWC" if images.shape[1] not in fits and images.shape[3] in fits else "NCHW"
        images = images.movedim(-1, 1) if layout == "NHWC" else images
        if counts and counts != {images.shape[1]}:
            expected = f"{images.shape[1]} numbers, one for each channel of images {list(images.shape)}, or one number"
            name = "std" if isinstance(self.std, tuple) and len(self.std) != images.shape[1] else "mean"
            raise _check.wrong(ValueError, name, expected, list(getattr(self, name)))
        if 0 in images.shape[1:]:
            raise _check.wrong(ValueError, "images", "at least one pixel and one channel", images)
        return images


def _count(name: str, value: int) -> int:
    value = _check.integer(name, value, 1, f"an int from 1 to {MOST}")
    if value > MOST:
        raise _check.wrong(ValueError, name, f"an int from 1 to {MOST}", value)
    return value


def _severity(value: float) -> float:
    value = _check.number("severity", value)
    if not 0.1 <= value <= 10:
        raise _check.wrong(ValueError, "severity", "a number from 0.1 to 10", value)
    return value


def _alpha(value: float) -> float:
    if isinstance(value, (tuple, list)):
        raise _check.wrong(TypeError, "alpha", "one number", value)
    return beta_parameters(value, hint="")[0]


def _channels(name: str, value: Any) -> Any:
    """Returns a number, every channel's, or a tuple of one for each channel."""
    if isinstance(value, torch.Tensor):
        raise _check.wrong(TypeError, name, "a number, or a sequence of one for each channel", value)
    if isinstance(value, (tuple, list)) and not value:
        raise _check.wrong(ValueError, name, "a number, or one for each channel", value)
    several: Any = value if isinstance(value, (tuple, list)) else (value,)
    several = tuple(_check.number(name, each) for each in several)
    if name == "std" and not all(each > 0 for each in several):
        raise _check.wrong(ValueError, name, "positive numbers", value)
    return several if len(several) > 1 else several[0]


def _operations(value: str) -> tuple[str, ...]:
    """Returns names of OPERATIONS."""
    if value == "augmix":
        return OPERATIONS
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
        raise _check.wrong(TypeError, "operations", f"'augmix', or a sequence of names of {', '.join(OPERATIONS)}", value)
    for name in value:
        _check.one_of("operations", name, OPERATIONS, f"names of {', '.join(OPERATIONS)}")
    if not value or len(set(value)) != len(value):
        raise _check.wrong(ValueError, "operations", "at least one name, and each once", value)
    return tuple(value)
