"""Any form of a target, checked once against the logits, as K-hot or dense parts."""

from typing import Any, NamedTuple

import torch

from .. import _check, _dispatch
from .._dtypes import accumulator
from ..mixing.mix import mix_checked
from ..targets import MixedRows, SoftTarget, of_parts

FORMS = "a SoftTarget, MixedRows, their parts(), class indices or probabilities"


class Hot(NamedTuple):
    """A K-hot target: weights [N, K], [N, K, d1, ...] or None (1 each), classes [N, K, d1, ...]."""

    weights: torch.Tensor | None
    classes: torch.Tensor


class Dense(NamedTuple):
    """A target with a value for each class, in the logits' shape; with `lam` and `partners` [N], the values of MixedRows."""

    values: torch.Tensor
    lam: torch.Tensor | None = None
    partners: torch.Tensor | None = None


def read(logits: torch.Tensor, target: Any, ignore_index: int | None = None) -> tuple[Hot | Dense, float]:
    """Checks a target and returns its parts, and the label smoothing that rides on it.

    MixedRows stay unmixed, for a kernel that mixes them where it reads them, unless a gradient or a function transform has to go
    through the mixing.
    """
    target = of_parts(target) if isinstance(target, dict) else target
    if isinstance(target, SoftTarget):
        return _soft_target(logits, target, ignore_index), target.label_smoothing
    if isinstance(target, torch.Tensor) and not target.is_floating_point():
        return _class_indices(logits, target, ignore_index), 0.0
    if isinstance(target, MixedRows):
        parts = _mixed_rows(logits, target)
        if _check.functional_transform() or _dispatch.differentiates(parts.values, parts.lam):
            parts = Dense(mixed(logits, *parts))
        return parts, 0.0
    return _dense(logits, target), 0.0


def read_mixed(logits: torch.Tensor, target: Any, ignore_index: int | None = None) -> Hot | Dense:
    """Checks a target and returns its parts as `read` does, but for MixedRows, which are always mixed."""
    target = of_parts(target) if isinstance(target, dict) else target
    if isinstance(target, MixedRows):
        return Dense(mixed(logits, *_mixed_rows(logits, target)))
    return read(logits, target, ignore_index)[0]


def compose(first: float, second: float) -> float:
    """Returns the label smoothing that does what one after the other does."""
    return 1 - (1 - first) * (1 - second) if first and second else first or second


def _soft_target(logits: torch.Tensor, target: SoftTarget, ignore_index: int | None) -> Hot:
    target._validate()  # it may have been changed, or mapped as a pytree, since it was made
    classes, shape = target.classes, logits.shape
    named = classes.shape
    if named[0] != shape[0] or len(named) != len(shape) or (len(shape) > 2 and named[2:] != shape[2:]):
        hint = _positions_hint(logits, (named[0], *named[2:]))
        expected = f"shape [{', '.join(map(str, (shape[0], 'K', *shape[2:])))}]{hint}"
        raise _check.wrong(ValueError, "target.classes", expected, classes)
    if target.num_classes not in (None, shape[1]):
        expected = f"{target.num_classes} classes, the target's num_classes, in dimension 1"
        raise _check.wrong(ValueError, "logits", expected, logits)
    _check.same_device("target", classes, logits)
    _check.in_range("target", classes, shape[1], "a class", ignore_index)
    return Hot(target.weights, classes)


def _class_indices(logits: torch.Tensor, target: torch.Tensor, ignore_index: int | None) -> Hot:
    shape = logits.shape[0], *logits.shape[2:]
    if target.dtype == torch.int64 and target.shape != shape and (hint := _positions_hint(logits, target.shape)):
        raise _check.wrong(ValueError, "target", f"shape {list(shape)}{hint}", target)
    _check.integer_tensor("target", target, shape, logits)
    classes = target.unsqueeze(1)
    _check.in_range("target", classes, logits.shape[1], "a class", ignore_index)
    return Hot(None, classes)


def _positions_hint(logits: torch.Tensor, labels: tuple[int, ...]) -> str:
    """Returns what may be wrong with integer labels of this shape, for an error."""
    if tuple(labels) == tuple(logits.shape):
        return " (integer rows of 0 and 1 would be a class for each position: make them floating, y.float())"
    if logits.dim() == 3 and tuple(labels) == tuple(logits.shape[:2]):
        return " (classes are dimension 1 of the logits: give logits [N, L, V] as logits.transpose(1, 2))"
    return ""


def _float_hint(logits: torch.Tensor, labels: torch.Tensor) -> str:
    """Returns what may be wrong with floating labels, for an error."""
    return " (class labels are int64: y.long())" if labels.shape == (logits.shape[0], *logits.shape[2:]) else ""


def _dense(logits: torch.Tensor, target: Any) -> Dense:
    if not isinstance(target, torch.Tensor):
        raise _check.wrong(TypeError, "target", FORMS, target)
    if target.shape != logits.shape:
        hint = _float_hint(logits, target)
        raise _check.wrong(ValueError, "target", f"probabilities in the logits' shape {list(logits.shape)}{hint}", target)
    _check.float_tensor("target", target, 2, "of the logits")
    _check.same_device("target", target, logits)
    return Dense(target)


def _mixed_rows(logits: torch.Tensor, target: MixedRows) -> Dense:
    """Checks MixedRows again: they may have been changed, or mapped as a pytree, since they were made."""
    values = target.values
    _check.float_tensor("target.values", values, 1, "[N, C]")
    if values.shape != logits.shape:
        hint = _float_hint(logits, values)
        raise _check.wrong(ValueError, "target.values", f"the logits' shape {list(logits.shape)}{hint}", values)
    _check.same_device("target.values", values, logits)
    lam = _check.coefficient("target.lam", target.lam, logits if logits.dtype == torch.float64 else values)
    _check.integer_tensor("target.index", target.index, values.shape[:1], values)
    _check.in_range("target.index", target.index, values.shape[0], "a partner")
    return Dense(values, lam, target.index)


def mixed(logits: torch.Tensor, values: torch.Tensor, lam: Any, index: Any) -> torch.Tensor:
    """Returns the mixed rows, in the dtype that the loss is computed in."""
    acc_dtype = accumulator(torch.promote_types(logits.dtype, values.dtype))
    return mix_checked(values.to(acc_dtype), lam, index)
