"""The dimensions of a batch that boxes and extents are counted in."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import _check


def box_axes(axes: Sequence[int]) -> tuple[int, ...]:
    """Checks the dimensions that boxes are cut in: one to three numbers, none of them the rows'."""
    if not isinstance(axes, (tuple, list)) or not 1 <= len(axes) <= 3:
        raise _check.wrong(TypeError, "axes", "one to three dimensions", axes)
    axes = tuple(_check.integer("axes", axis, -(2**63), "an int") for axis in axes)
    if 0 in axes or len(set(axes)) < len(axes):
        raise _check.wrong(ValueError, "axes", "different dimensions, and not 0, that of the rows", axes)
    return axes


def places(axes: Any, dims: int) -> tuple[int, ...]:
    """Returns which of a batch's dimensions boxes are cut in; None: the last ones."""
    axes = tuple(range(-min(max(dims - 2, 1), 3), 0)) if axes is None else axes
    return tuple(axis % dims if -dims <= axis < dims else axis for axis in axes)


def axes_last(argument: str, x: torch.Tensor, axes: Any) -> torch.Tensor:
    """Returns x with these dimensions moved to its end, as boxes have them; x itself for None."""
    if axes is None:
        return x
    dims = x.dim()
    places = [axis % dims if dims else axis for axis in axes]
    if not all(-dims < axis < dims for axis in axes) or places != sorted(set(places)):
        expected = f"a tensor with the dimensions {list(axes)} (axes) besides its rows, in this order"
        raise _check.wrong(ValueError, argument, expected, x)
    return x.movedim(axes, tuple(range(-len(axes), 0)))


def axes_back(x: torch.Tensor, axes: Sequence[int] | None) -> torch.Tensor:
    """Returns x with its last dimensions moved back to where `axes_last` took them from."""
    return x if axes is None else x.movedim(tuple(range(-len(axes), 0)), tuple(axes))


def box_fraction(box: torch.Tensor, sizes: Any, dtype: torch.dtype) -> torch.Tensor:
    """Returns the fraction of an image that each row's box covers, [N]."""
    dims = len(sizes)
    limits = torch.tensor(sizes, device=box.device) if box.is_cpu else _on_device(sizes, box.device)
    start = box[:, :dims].clamp(min=0).minimum(limits)
    stop = box[:, dims:].clamp(min=0).minimum(limits)
    return (stop - start).clamp(min=0).to(dtype).prod(1) / max(math.prod(sizes), 1)


def _on_device(values: Any, device: torch.device) -> Any:
    """Returns host integers as a device tensor, without waiting for the device."""
    return torch.stack([torch.full((), value, device=device) for value in values])
