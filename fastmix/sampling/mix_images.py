"""mix_images: the loader's bytes to the normalised, mixed batch."""

import functools
import numbers
from collections.abc import Sequence
from typing import Any

import torch

from .. import _check, _dispatch
from .._dtypes import FLOATS
from .._torch._formulas import mirrored
from ..mixing.mix_images import OP, Pairing
from .plan import Mix
from .sizes import as_mask, keep

LAYOUTS = "NCHW", "NHWC"
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def mix_images(
    images: torch.Tensor,
    mix: Mix | None = None,
    *,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
    scale: float = 1 / 255,
    flip: torch.Tensor | None = None,
    layout: str = "NCHW",
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format | None = None,
    out: torch.Tensor | None = None,
    sizes: torch.Tensor | None = None,
    anchor: str = "start",
) -> torch.Tensor:
    """Converts, normalises, mirrors and mixes a batch of uint8 images in one pass.

        x[i]   = (images[i] * scale - mean[c]) / std[c]         mirrored along the last dimension where flip[i]
        out    = mix.apply(x), rounded once to dtype            None: x itself

    Computed in float32 as `fma(byte, scale/std, -mean/std)`, then as `mix` does: in float32 the result has the bits of
    `mix.apply(mix_images(images, mean=mean, std=std))`. A byte of a row and of its partner is read once, the result is written once.
    Differentiable in the Mix's `lam` and `mask`, for which the bytes alone are kept: the backward normalises once more.

    Args:
        images: `[N, C, H, W]` uint8 (`[N, H, W, C]` with `layout="NHWC"`), of one to three spatial dimensions, in any strides.
        mix: what a sampler drew, `sampler.sample(images)`, or a `Mix` by hand: lambda, boxes, masks, plans. Boxes and masks are
            in coordinates of the result. A mix `within` sizes [N, 2] too; with `flip` that takes a pass more over the bytes. ResizeMix's boxes and masks of volumes take a second
            pass, over the result.
        mean, std: for each channel, in units of `images * scale`.
        scale: of a byte.
        flip: bool `[N]`, on the device of the images: each source image is mirrored by its own entry wherever it is used, as
            a row or as a partner. Label maps: `mix.target(y, flip=flip)`.
        layout: where the channels are, `"NCHW"` or `"NHWC"`. The result is `[N, C, ...]` in either case.
        dtype: of the result.
        memory_format: `torch.contiguous_format`, `torch.channels_last` or `channels_last_3d`; None: channels lie in memory where
            they do in the images.
        out: a tensor to write to, of the result's shape and dtype. Not allowed where the Mix requires grad.
        sizes, anchor: the rows' valid extents `[N, 2]`, as for `Mix.within`; the Mix keeps them, for its targets. A row is then mirrored
            within its extents.

    Returns:
        The batch `[N, C, ...]`.

    Raises:
        TypeError, ValueError: a wrong argument, named, before anything is launched.

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899.

    >>> import torch, fastmix
    >>> images = torch.tensor([[[[0, 255]]], [[[255, 255]]]], dtype=torch.uint8)
    >>> m = fastmix.Mix(torch.tensor([0.5, 1.0]), torch.tensor([1, 0]))
    >>> fastmix.mix_images(images, m, mean=[0.0], std=[1.0]).flatten(1)
    tensor([[0.5000, 1.0000],
            [1.0000, 1.0000]])
    """
    if sizes is not None:
        mix = _is_mix(mix)
        made = mix.within(sizes, anchor=anchor)
        options: dict[str, Any] = {"mean": mean, "std": std, "scale": scale, "flip": flip, "layout": layout, "dtype": dtype}
        return keep(mix, made, mix_images(images, made, memory_format=memory_format, out=out, **options))
    images, behind = _checked_images(images, layout)
    factor, shift = _affine(mean, std, scale, images)
    if flip is not None:
        _check.row_flags("flip", flip, images)
    if dtype not in FLOATS:
        raise _check.wrong(TypeError, "dtype", "a floating dtype: float16, bfloat16, float32 or float64", dtype)
    channels_last = _channels_last(memory_format, images, behind)
    if out is not None and memory_format is None and isinstance(out, torch.Tensor):
        channels_last = not out.is_contiguous() and out.movedim(1, -1).is_contiguous()
    if isinstance(mix, Mix) and (mix.resize or (mix.mask is not None and mix.mask.dim() == 4)):
        plain = mix_images(images, mean=mean, std=std, scale=scale, flip=flip, dtype=dtype, memory_format=memory_format)
        return mix.apply(plain) if out is None else out.copy_(mix.apply(plain))
    pairing = Pairing() if mix is None else _mixed_by(mix, images)
    if flip is not None and mix is not None and mix._within is not None:
        images, flip = mirrored(images, flip, mix._within.sizes), None
    leaves, arguments = (images, pairing.lam, pairing.mask), (images, factor, shift, flip, pairing, dtype, channels_last)
    if out is None:
        return _dispatch.call(OP, leaves, *arguments)
    _check.output(out, _like(images, dtype), images=images, flip=flip, **pairing._asdict())
    return _dispatch.call_into(out, "the mix", OP, leaves, *arguments)


def _like(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((), dtype=dtype, device=images.device).expand(images.shape)


def _checked_images(images: torch.Tensor, layout: str) -> tuple[torch.Tensor, bool]:
    """Returns (images [N, C, d1, ...], whether the channels come last in memory)."""
    if isinstance(images, torch.Tensor) and images.is_floating_point():
        _check.no_coordinates("images", images)
        raise TypeError(f"images: expected uint8 bytes (float batches: Mix.apply or mix), got {_check.describe(images)}")
    _check.strided("images", images, (torch.uint8,), "a uint8 tensor")
    _check.one_of("layout", layout, LAYOUTS, "'NCHW' or 'NHWC'")
    if not 3 <= images.dim() <= 5:
        raise _check.wrong(ValueError, "images", "[N, C, d1, ...] or, by layout, [N, d1, ..., C] with one to three d", images)
    images = images.movedim(-1, 1) if layout == "NHWC" else images
    C, pixels = images.stride(1), images.stride()[2:]
    return images, images.shape[1] > 1 and C == 1 and all(stride > 1 for stride in pixels)


def _affine(mean: Any, std: Any, scale: float, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale/std and -mean/std for each channel, float32 on the images' device."""
    C, scale = images.shape[1], _check.number("scale", scale)
    values = [_channel_values(name, value, C, images) for name, value in (("mean", mean), ("std", std))]
    if all(isinstance(value, tuple) for value in values):
        if 0.0 in values[1]:
            raise _check.wrong(ValueError, "std", "numbers other than 0", list(values[1]))
        return channel_constants(values[0], values[1], scale, images)
    mean, std = (
        value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64, device=images.device)
        for value in values
    )
    for name, value in (("mean", mean), ("std", std)):
        if _check.readable(value) and not bool(value.isfinite().all()):
            raise _check.wrong(ValueError, name, "finite numbers", value)
    if _check.readable(std) and bool((std == 0).any()):
        raise _check.wrong(ValueError, "std", "numbers other than 0", std)
    return (scale / std).to(torch.float32), (-mean / std).to(torch.float32)


def _channel_values(name: str, value: list[float], C: int, images: torch.Tensor) -> tuple[float, ...]:
    """Returns a number for each channel: a tuple of floats, or a float64 tensor on the images' device."""
    if isinstance(value, torch.Tensor):
        _check.strided(name, value, FLOATS, "numbers, one for each channel")
        if value.shape != (C,):
            raise _check.wrong(ValueError, name, f"{C} numbers, one for each channel", value)
        _check.same_device(name, value, images)
        return value.to(torch.float64)
    try:
        value = list(value)
        numbers_of = tuple(float(v) for v in value if isinstance(v, numbers.Real) and not isinstance(v, bool))
    except TypeError:
        raise _check.wrong(TypeError, name, f"{C} numbers, one for each channel", value) from None
    if len(numbers_of) != C or len(numbers_of) != len(value):
        fits = " (does layout fit?)" if C not in (1, 3) else ""
        raise _check.wrong(ValueError, name, f"{C} numbers, one for each channel{fits}", value)
    return tuple(_check.number(name, v) for v in numbers_of)


def channel_constants(mean: Any, std: Any, scale: float, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scale/std and -mean/std of tuples of numbers, one for each channel, float32 on the images' device."""
    make = _constants if _check.transformed() else _kept_constants
    return make(mean, std, scale, images.device)


def _constants(mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: torch.device) -> Any:
    factor, shift = [scale / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return (torch.tensor(values, dtype=torch.float32, device=device) for values in (factor, shift))


@functools.lru_cache(maxsize=64)
def _kept_constants(
    mean: tuple[float, ...], std: tuple[float, ...], scale: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, copied to the device once: a copy in each step would wait for it, and cannot be captured in a graph."""
    return tuple(_constants(mean, std, scale, device))


def _channels_last(memory_format: torch.memory_format | None, images: torch.Tensor, behind: bool) -> bool:
    """Returns whether the result has its channels behind the pixels in memory."""
    if memory_format is None or memory_format is torch.preserve_format:
        return behind
    if memory_format is torch.contiguous_format:
        return False
    if memory_format is not CHANNELS_LAST.get(images.dim()):
        fits = CHANNELS_LAST.get(images.dim(), "no channels_last format")
        raise _check.wrong(
            ValueError, "memory_format", f"None, torch.contiguous_format or {fits} for these images", memory_format
        )
    return True


def _is_mix(mix: Any) -> Mix:
    if not isinstance(mix, Mix):
        raise _check.wrong(TypeError, "mix", "a Mix, as sampler.sample(images) draws it, or None", mix)
    return mix


def _mixed_by(mix: Mix, images: torch.Tensor) -> Pairing:
    """Returns how a Mix, checked against the images, mixes them."""
    if _is_mix(mix).index.shape != images.shape[:1]:
        raise _check.wrong(ValueError, "images", f"{len(mix.index)} rows, which mix is for", images)
    _check.same_device("mix", mix.index, images)
    _check.partners_and_blocks(len(mix.index), mix.index, mix.plan, mix.partner_plan)
    like, spatial = _like(images, torch.float32), images.dim() - 2
    mix._shape = images.shape
    if mix._within is not None:
        if spatial != 2 or mix._within.sizes.shape[1] != 2 or mix._within.axes not in (None, (2, 3), (-2, -1)):
            raise _check.wrong(ValueError, "images", "two spatial dimensions, both in the sizes of the mix's rows", images)
        mask, plan = as_mask(mix, like, tuple(images.shape[2:]))
        return Pairing(mask=mask, index=mix.index, partner_plan=plan)
    if mix.mask is not None:
        if spatial < 2:
            raise _check.wrong(ValueError, "images", "two spatial dimensions or more, which a mask lies over", images)
        mask = _check.cell_mask("mask", mix.mask, like)
        return Pairing(mask=mask, index=mix.index, plan=mix.plan, partner_plan=mix.partner_plan)
    box = mix.box
    if box is not None:
        _check.box("box", box, like[:, 0])
        dims = box.shape[1] // 2
        if mix.axes is not None and tuple(axis % images.dim() for axis in mix.axes) != tuple(range(images.dim()))[-dims:]:
            raise _check.wrong(ValueError, "mix", "boxes over the last dimensions (axes=None)", list(mix.axes))
        mix._keep_size("images", images, images.shape[-dims:])
        box = box.to(torch.int64)
    return Pairing(lam=_check.coefficient("lam", mix.lam, like), index=mix.index, box=box)
