"""Labels of a mixed batch: their checks, and what makes a target of them."""

import copy
from typing import Any

import torch

from .. import _check
from ..targets import MixedRows, SoftTarget
from .draws import cpu

MISSING: Any = None  # an argument that was left out: the error says what to pass, where Python's own would not


def partner_labels(y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns y[index]. Where the host cannot read indices, a wrong one takes some row: mixing makes that row NaN."""
    if index.is_cpu and not _check.transformed():
        try:
            return y.index_select(0, index)
        except (IndexError, RuntimeError):  # the check below names row and value
            pass
    _check.in_range("index", index, y.shape[0], "a partner")
    return y[index.clamp(0, max(y.shape[0] - 1, 0))]


def unchecked_target(classes: Any, weights: Any) -> SoftTarget:
    """Returns the SoftTarget of what a launch has written."""
    target = SoftTarget(classes, weights) if _check.transformed() else object.__new__(SoftTarget)
    target.classes, target.weights = classes, weights
    target._mark_sums()
    return target


def union_target(mix: Any, y: torch.Tensor, partner: Any, flip: torch.Tensor | None) -> Any:
    """Returns the target of `label="union"`: a `SoftTarget` of weights 0 and 1 for class indices, the larger values for rows."""
    shared = copy.copy(mix)
    shared._labels = (cpu.PROPORTIONAL,)
    target = shared.target(y, partner=partner, flip=flip)
    if not isinstance(target, SoftTarget):
        if partner is None:
            return target.union()
        own, rows = as_rows(shared._share(partner), y), torch.arange(len(y), device=y.device)
        both = MixedRows(torch.cat((y, partner)), own.repeat(2), torch.cat((rows + len(y), rows)))
        return both.union()[: len(y)]
    weights = torch.where(target.weights.isnan(), target.weights, (target.weights != 0).to(target.weights.dtype))
    own, other = weights.unbind(1)
    twice = (target.classes[:, 0] == target.classes[:, 1]) & (own == 1)
    return SoftTarget(target.classes, torch.stack((own, other.masked_fill(twice, 0)), 1))


def check_labels(y: torch.Tensor | None, rows: int, like: Any, name: str = "y") -> None:
    if not isinstance(y, torch.Tensor) or (y.dtype != torch.int64 and not y.is_floating_point()):
        raise _check.wrong(TypeError, name, "int64 class indices or floating rows", y)
    _check.no_coordinates(name, y)
    if y.dim() < 1 or y.shape[0] != rows:
        raise _check.wrong(ValueError, name, f"{rows} rows, as the mixed batch", y)
    _check.same_device(name, y, like)


def check_given(**arguments: Any) -> None:
    """Raises if labels, or a map of each image, were left out."""
    for name, value in arguments.items():
        if value is None and name == "y":
            raise TypeError(
                "y: expected int64 class indices or floating rows, got None: mixer(x, y) (without any: mixer.sample(x).apply(x))"
            )
        if value is None:
            raise TypeError(f"{name}: expected a map of each image, got None: mixer(x, y, {name}), or mixer.sample(x, {name})")


def as_rows(lam: torch.Tensor, y: Any) -> torch.Tensor:
    """Returns lam as [N], float32 or float64."""
    if not isinstance(lam, torch.Tensor) or lam.device != y.device:
        lam = _check.coefficient("lam", lam, y)
    return lam.expand(y.shape[0])
