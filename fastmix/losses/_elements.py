"""The sigmoid loss where elements are told apart: labels that are not known, and every element's own loss. In plain torch
operations, which function transforms and torch.compile see through."""

from typing import Any

import torch

from .. import _check
from .._dtypes import accumulator
from .._torch._losses import component_weights, reduced
from .._torch.soft_binary_cross_entropy import binary_elements
from ..targets import MixedRows, SoftTarget, of_parts
from . import _target


def checked_ignore_value(value: Any) -> float | None:
    return value if value is None or value != value else _check.number("ignore_value", value)


def known_labels(target: Any, ignore_value: Any) -> Any:
    """Returns a target whose unknown labels are 0, and which labels are known: bools in the logits' shape, None for class labels."""
    ignore_value = checked_ignore_value(ignore_value)
    if isinstance(target, dict) and "values" in target and ignore_value == ignore_value:  # NaN: of_parts mixes, and keeps it
        target = {name: torch.where(t == ignore_value, torch.nan, t) if "values" in name else t for name, t in target.items()}
        ignore_value = torch.nan
    target = of_parts(target) if isinstance(target, dict) else target
    if isinstance(target, MixedRows) and target._mixed_already and ignore_value == ignore_value and ignore_value is not None:
        raise ValueError(
            "ignore_value: expected NaN for rows that are mixed already (a slice of MixedRows, MixedRows.of(parts), partners of another "
            f"batch), where a number is no longer what it was, got {ignore_value} (or give the parts() themselves, sliced, to the loss)"
        )
    values = target.values if isinstance(target, MixedRows) else target
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        return target, None
    known = ~values.isnan() if ignore_value != ignore_value else values != ignore_value
    values = torch.where(known, values, 0)
    if not isinstance(target, MixedRows):
        return values, known
    rows = len(values)
    lam = _check.coefficient("target.lam", target.lam, values).detach().expand(rows).view(-1, *[1] * (values.dim() - 1))
    partners = known[target.index.clamp(0, max(rows - 1, 0))]
    return MixedRows(values, target.lam, target.index), (known | (lam == 0)) & (partners | (lam == 1))


def binary_loss_by_element(
    logits: torch.Tensor,
    parts: Any,
    smoothing: Any,
    class_weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    options: Any,
    known: Any,
) -> Any:
    """The loss where elements are told apart: those without a label left out, or each its own result."""
    dtype = accumulator(logits.dtype)
    if isinstance(parts, _target.Dense):
        values, over = parts.values.to(dtype), 2
        rows = values if parts.partners is None else _target.mixed(logits, values, parts.lam, parts.partners)
    else:
        classes, over = parts.classes, logits.shape[1]
        weights = component_weights(classes, parts.weights, dtype if parts.weights is None else parts.weights.dtype)
        rows = SoftTarget(classes, weights.contiguous(), label_smoothing=smoothing).dense(over).to(dtype)
    z = logits if known is None else torch.where(known, logits, 0)
    rows = rows if known is None else torch.where(known, rows, 0)
    losses = binary_elements(z, rows, class_weight, pos_weight, options, over)
    losses = losses if known is None else torch.where(known, losses, 0)
    if options.class_reduction == "none":
        return losses
    count: Any = losses.shape[1] if known is None else known.sum(1)
    total = losses.sum(1)
    if options.class_reduction == "mean":
        total = total / count if known is None else total / count.clamp(min=1)
    return reduced(total, total.numel() if known is None else (count > 0).sum(), options.reduction)
