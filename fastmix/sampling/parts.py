"""What Mix and the samplers share: which dimensions boxes are cut in, labels and their shares."""

import math

import torch

from .. import _check
from ..targets import SoftTarget


def box_axes(axes):
    """Checks the dimensions that boxes are cut in: one to three numbers, none of them the rows'."""
    if not isinstance(axes, (tuple, list)) or not 1 <= len(axes) <= 3:
        raise _check.wrong(TypeError, "axes", "one to three dimensions", axes)
    axes = tuple(_check.integer("axes", axis, -(2**63), "an int") for axis in axes)
    if 0 in axes or len(set(axes)) < len(axes):
        raise _check.wrong(ValueError, "axes", "different dimensions, and not 0, that of the rows", axes)
    return axes


def axes_last(argument, x, axes):
    """Returns x with these dimensions moved to its end, as boxes have them; x itself for None."""
    if axes is None:
        return x
    dims = x.dim()
    places = [axis % dims if dims else axis for axis in axes]
    if not all(-dims < axis < dims for axis in axes) or places != sorted(set(places)):
        expected = f"a tensor with the dimensions {list(axes)} (axes) besides its rows, in this order"
        raise _check.wrong(ValueError, argument, expected, x)
    return x.movedim(axes, tuple(range(-len(axes), 0)))


def axes_back(x, axes):
    """Returns x with its last dimensions moved back to where `axes_last` took them from."""
    return x if axes is None else x.movedim(tuple(range(-len(axes), 0)), axes)


def partner_labels(y, index):
    """Returns y[index]. Where the host cannot read indices, a wrong one takes some row: mixing makes that row NaN."""
    if index.is_cpu and not _check.transformed():
        try:
            return y.index_select(0, index)
        except (IndexError, RuntimeError):  # the check below names row and value
            pass
    _check.in_range("index", index, y.shape[0], "a partner")
    return y[index.clamp(0, max(y.shape[0] - 1, 0))]


def unchecked_target(classes, weights):
    """Returns the SoftTarget of what a launch has written."""
    target = SoftTarget(classes, weights) if _check.transformed() else object.__new__(SoftTarget)
    target.classes, target.weights = classes, weights
    target._mark_sums()
    return target


def mask_mean(mask):
    """Returns the mean of each row's mask, [N]; 1 for masks without cells."""
    return mask.mean(tuple(range(1, mask.dim()))) if mask[:1].numel() else mask.new_ones(mask.shape[0])


def check_labels(y, rows, like, name="y"):
    if not isinstance(y, torch.Tensor) or (y.dtype != torch.int64 and not y.is_floating_point()):
        raise _check.wrong(TypeError, name, "int64 class indices or floating rows", y)
    if y.dim() < 1 or y.shape[0] != rows:
        raise _check.wrong(ValueError, name, f"{rows} rows, as the mixed batch", y)
    _check.same_device(name, y, like)


def as_rows(lam, y):
    """Returns lam as [N], float32 or float64."""
    if not isinstance(lam, torch.Tensor) or lam.device != y.device:
        lam = _check.coefficient("lam", lam, y)
    return lam.expand(y.shape[0])


def box_fraction(box, sizes, dtype):
    """Returns the fraction of an image that each row's box covers, [N]."""
    dims = len(sizes)
    limits = torch.tensor(sizes, device=box.device) if box.is_cpu else _on_device(sizes, box.device)
    start = box[:, :dims].clamp(min=0).minimum(limits)
    stop = box[:, dims:].clamp(min=0).minimum(limits)
    return (stop - start).clamp(min=0).to(dtype).prod(1) / max(math.prod(sizes), 1)


def _on_device(values, device):
    """Returns host integers as a device tensor, without waiting for the device."""
    return torch.stack([torch.full((), value, device=device) for value in values])
