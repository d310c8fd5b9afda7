"""PuzzleMix's adversarial option: noise for some rows and partners, from the gradient that saliency has at hand.

start  = clip(x + U(-eps, eps))                                       before the gradient pass, whose gradient g is taken there
noise  = c * clip(start - x + step*sign(g), -eps, eps),  c ~ U(0, 1)  in the images' own range, one c a row
x     -> clip(x + noise)                                              where a row is flagged, before blocks are moved
"""

from typing import Any, NamedTuple

import torch

from .. import _check
from ..mixing.mix_masked import mix_masked
from .puzzle_costs import check_channels

EPS, STEP = 10 / 255, 12 / 255


class PuzzleNoise(NamedTuple):
    """What `fastmix.adversarial_noise` returns: `images`, the batch with its noise, normalised and within the images' range
    `[N, C, H, W]`; and which rows have it as a row's own image, and which have it as their partner's: bool `[N]`.

    >>> import torch, fastmix
    >>> x = torch.zeros(2, 3, 8, 8)
    >>> fastmix.PuzzleNoise(x, torch.tensor([True, False]), torch.tensor([False, True])).own.tolist()
    [True, False]
    """

    images: torch.Tensor
    own: torch.Tensor
    partner: torch.Tensor


def noise_start(
    x: torch.Tensor,
    *,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    eps: float = EPS,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Returns the images with uniform noise of at most eps in their own range: where the gradient for saliency and
    `fastmix.adversarial_noise` is taken.

    Args:
        x: `[N, C, H, W]` normalised images.
        mean, std: by which they were normalised.
        eps: in units of the images' range before that.
        bounds: that range; the result is clipped to it.
        generator: draws from it instead of the device's default generator.

    Raises:
        TypeError, ValueError: a wrong argument.

    >>> import torch, fastmix
    >>> x = torch.zeros(2, 3, 8, 8)
    >>> bool((fastmix.noise_start(x, mean=0.5, std=0.25) * 0.25).abs().max() <= 10 / 255)
    True
    """
    shift, factor = _normalisation(x, mean, std)
    eps, low, high = _limits(eps, bounds)
    pixels = x.detach().float() * factor + shift
    noise = torch.rand(x.shape, device=x.device, generator=generator).mul_(2 * eps).sub_(eps)
    return (((pixels + noise).clamp(low, high) - shift) / factor).to(x.dtype)


def adversarial_noise(
    x: torch.Tensor,
    start: torch.Tensor,
    gradient: torch.Tensor,
    *,
    mean: float | tuple[float, ...],
    std: float | tuple[float, ...],
    prob: float = 0.1,
    eps: float = EPS,
    step: float = STEP,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> PuzzleNoise:
    """Returns adversarial noise for a batch, and the rows that get it, for `PuzzleMix(...)(x, y, saliency, noise=...)`.

        noise = c * clip(start - x + step*sign(gradient), -eps, eps),    c ~ U(0, 1) for each row

    One step uphill from a random start, as FGSM after it, at no further pass: the gradient is the one that saliency was made of.
    (The authors draw c and both flags once a batch.)

    Args:
        x: `[N, C, H, W]` normalised images.
        start: of `fastmix.noise_start`, where the gradient was taken.
        gradient: of `fastmix.input_gradient(model, start, y)`.
        mean, std: by which images were normalised.
        prob: of each row's own image, and of its partner's, to have noise.
        eps, step: in units of the images' range, 10/255 and 12/255.
        bounds: that range; the images with their noise are clipped to it.
        generator: draws from it instead of the device's default generator.

    Raises:
        TypeError, ValueError: a wrong argument.

    Source: PuzzleMix, arXiv:2009.06962, Section 5.4; Wong et al., arXiv:2001.03994.

    >>> import torch, fastmix
    >>> x = torch.zeros(2, 3, 8, 8)
    >>> noise = fastmix.adversarial_noise(x, x, torch.randn(2, 3, 8, 8), mean=0.5, std=0.25, prob=1.0)
    >>> noise.images.shape, noise.own.tolist(), bool((noise.images * 0.25).abs().max() <= 10 / 255)
    (torch.Size([2, 3, 8, 8]), [True, True], True)
    """
    shift, factor = _normalisation(x, mean, std)
    for name, value in (("start", start), ("gradient", gradient)):
        _check.float_tensor(name, value, 4, "[N, C, H, W]")
        if value.shape != x.shape:
            raise _check.wrong(ValueError, name, f"shape {list(x.shape)}, as x", value)
        _check.same_device(name, value, x)
    eps, low, high = _limits(eps, bounds)
    step = _check.number("step", step)
    prob = _check.number("prob", prob)
    if not 0 <= prob <= 1:
        raise _check.wrong(ValueError, "prob", "a number in [0, 1]", prob)
    c, own, partner = torch.rand(3, x.shape[0], device=x.device, generator=generator)
    pixels = x.detach().float() * factor + shift
    noise = (start.detach().float() * factor + shift - pixels).add_(gradient.detach().sign(), alpha=step).clamp_(-eps, eps)
    moved = (pixels + c.view(-1, 1, 1, 1) * noise).clamp_(low, high)
    return PuzzleNoise(((moved - shift) / factor).to(x.dtype), own < prob, partner < prob)


def mix_with_noise(mix: Any, x: torch.Tensor, noise: Any) -> Any:
    """Returns the masked mix of a batch whose flagged rows, and whose flagged rows' partners, are taken with their noise."""
    rows = x.shape[0]
    _check.in_range("index", mix.index, rows, "a partner")
    index = mix.index.clamp(0, max(rows - 1, 0))

    def flagged(flags: torch.Tensor) -> Any:
        return flags.view(-1, *[1] * (x.dim() - 1))

    own = torch.where(flagged(noise.own), noise.images, x)
    partner = torch.where(flagged(noise.partner), noise.images[index], x[index])
    # row i's partner is row N+i of one batch, whose second half is not wanted
    numbers = torch.arange(rows, device=x.device)
    mask = torch.cat((mix.mask, torch.ones_like(mix.mask)))
    own_plan, partner_plan = (None if plan is None else torch.cat((plan, plan)) for plan in (mix.plan, mix.partner_plan))
    both = torch.cat((own, partner))
    return mix_masked(both, mask, torch.cat((numbers + rows, numbers)), plan=own_plan, partner_plan=partner_plan)[:rows]


def check_noise(noise: Any, x: torch.Tensor) -> None:
    if not isinstance(noise, PuzzleNoise):
        raise _check.wrong(TypeError, "noise", "what fastmix.adversarial_noise returns", noise)
    _check.strided("noise.images", noise.images, (x.dtype,), f"a {str(x.dtype).removeprefix('torch.')} tensor, as x")
    if noise.images.shape != x.shape:
        raise _check.wrong(ValueError, "noise.images", f"shape {list(x.shape)}, as x", noise.images)
    for name, flags in (("noise.own", noise.own), ("noise.partner", noise.partner)):
        _check.strided(name, flags, (torch.bool,), "a bool tensor [N]")
        if flags.shape != x.shape[:1]:
            raise _check.wrong(ValueError, name, f"shape [{x.shape[0]}]", flags)
        _check.same_device(name, flags, x)


def _normalisation(x: torch.Tensor, mean: Any, std: Any) -> Any:
    """Returns mean and deviation as float32 tensors [1, C or 1, 1, 1]."""
    _check.float_tensor("x", x, 4, "[N, C, H, W]")
    return (
        _check.moved(torch.tensor(values, dtype=torch.float32), x.device, torch.float32).view(1, -1, 1, 1)
        for values in check_channels(mean, std, x.shape[1])
    )


def _limits(eps: float, bounds: tuple[float, float]) -> tuple[float, float, float]:
    eps = _check.number("eps", eps)
    if eps < 0:
        raise _check.wrong(ValueError, "eps", "a number of at least 0", eps)
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise _check.wrong(TypeError, "bounds", "(least, most) of the images' range", bounds)
    low, high = (_check.number("bounds", bound) for bound in bounds)
    if low >= high:
        raise _check.wrong(ValueError, "bounds", "least < most", bounds)
    return eps, low, high
