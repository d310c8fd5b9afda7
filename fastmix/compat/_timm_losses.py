"""timm's losses and tasks, on any target of fastmix; the public names are those of `fastmix.compat.timm`.

All are subclasses of timm's, since other code may ask `isinstance`.
"""

import inspect
from typing import Any

import timm
import torch
from timm import loss as _timm_loss
from timm import task as _timm_task
from torch import nn

from .. import MixedRows, SoftTarget, _check, js_divergence, soft_binary_cross_entropy, soft_cross_entropy

if not hasattr(_timm_loss, "create_classification_loss"):
    raise ImportError(f"fastmix.compat.timm: expected timm 1.0.31 or newer, got {timm.__version__}")


def _classes_second(x: torch.Tensor, target: torch.Tensor) -> Any:
    """Returns logits and target with the classes, which are timm's last dimension, where ours are; and indices as int64."""
    if isinstance(target, torch.Tensor) and not target.is_floating_point():
        target = target.long()
        if target.dim() == x.dim() and target.shape[-1] == 1 and x.shape[-1] != 1:
            target = target.squeeze(-1)
    if x.dim() <= 2:
        return x, target
    dense = isinstance(target, torch.Tensor) and target.is_floating_point()
    return x.movedim(-1, 1), target.movedim(-1, 1) if dense else target


def _read(target: torch.Tensor) -> Any:
    """Returns a target whose `parts()` came as a dict, and others as they are."""
    if not isinstance(target, dict):
        return target
    return SoftTarget.of(target) if "classes" in target else MixedRows.of(target)


def _below_one(name: str, value: Any) -> Any:
    value = _check.number(name, value)
    if not 0 <= value < 1:
        raise _check.wrong(ValueError, name, "a float in [0, 1)", value)
    return value


def _as_tensor(name: str, weight: Any) -> Any:
    """Checks a weight of each class; a number becomes a tensor."""
    if weight is None or (isinstance(weight, torch.Tensor) and not weight.is_complex()):
        return weight
    if isinstance(weight, torch.Tensor):
        raise _check.wrong(TypeError, name, "a float, or a real tensor", weight)
    return torch.tensor(_check.number(name, weight))


def _splits(name: str, value: Any) -> Any:
    # of one launch of js_divergence
    value = _check.integer(name, value, 1, "an int from 1 to 16")
    if value > _check.MOST_SOURCES:
        raise _check.wrong(ValueError, name, f"an int from 1 to {_check.MOST_SOURCES}", value)
    return value


class SoftTargetCrossEntropy(_timm_loss.SoftTargetCrossEntropy):
    """timm's `SoftTargetCrossEntropy`, which is `fastmix.soft_cross_entropy`: the mean over rows.

    `criterion(x, target)` takes logits `[N, C]` and a `SoftTarget`, `MixedRows`, dense rows `[N, C]` or class indices `[N]`.

    >>> import torch
    >>> from fastmix.compat.timm import SoftTargetCrossEntropy
    >>> SoftTargetCrossEntropy()(torch.zeros(2, 4), torch.full((2, 4), 0.25))
    tensor(1.3863)
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
        return soft_cross_entropy(*_classes_second(x, target))


class LabelSmoothingCrossEntropy(_check.Checked, _timm_loss.LabelSmoothingCrossEntropy):
    """timm's `LabelSmoothingCrossEntropy`. Targets as of `SoftTargetCrossEntropy`; all of them are smoothed, also a `SoftTarget`
    that has a smoothing of its own.

    Raises:
        TypeError, ValueError: `smoothing` outside [0, 1), also when it is set later.
    """

    _options = {"smoothing": _below_one}

    def __init__(self, smoothing: Any = 0.1) -> None:
        super().__init__(_below_one("smoothing", smoothing))

    @property
    def confidence(self) -> Any:
        """timm's name for 1 - smoothing."""
        return 1.0 - self.smoothing

    @confidence.setter
    def confidence(self, value: Any) -> None:
        pass  # timm's constructor sets it

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
        return soft_cross_entropy(*_classes_second(x, target), label_smoothing=self.smoothing)


class BinaryCrossEntropy(_check.Checked, _timm_loss.BinaryCrossEntropy):
    """timm's `BinaryCrossEntropy`, which is `fastmix.soft_binary_cross_entropy`.

    Args:
        smoothing: e. Class indices become `(1-e)*onehot + e/C`. Dense rows and `MixedRows` become `(1-e)*t + e/2`, but only with
            `smooth_dense`. A `SoftTarget` has its own and is not smoothed again.
        target_threshold: targets become 1 above it, else 0.
        weight: `[C]` (or one value): a weight of each class.
        reduction: "mean" or "sum" over all elements, or "none", `[N, C]`.
        sum_classes: sums over classes and averages over rows, whatever `reduction` is.
        pos_weight: a float, or a tensor `[]` or `[C]`: a weight of each class's positive term.
        smooth_dense: see `smoothing`.

    Raises:
        TypeError, ValueError: a wrong option, also when it is set later.

    >>> import torch
    >>> from fastmix.compat.timm import BinaryCrossEntropy
    >>> BinaryCrossEntropy(smoothing=0.1, pos_weight=2.0)(torch.zeros(2, 4), torch.tensor([1, 3]))
    tensor(0.8664)
    """

    _options = {
        "smoothing": _below_one,
        "target_threshold": lambda name, value: None if value is None else _check.threshold(value, name),
        "weight": _as_tensor,
        "reduction": lambda name, value: _check.reduction(value),
        "sum_classes": _check.flag,
        "pos_weight": _as_tensor,
        "smooth_dense": _check.flag,
    }

    def __init__(
        self,
        smoothing: Any = 0.1,
        target_threshold: Any = None,
        weight: Any = None,
        reduction: str = "mean",
        sum_classes: Any = False,
        pos_weight: torch.Tensor | None = None,
        smooth_dense: Any = False,
    ) -> None:
        super().__init__(
            _below_one("smoothing", smoothing),
            target_threshold,
            _as_tensor("weight", weight),
            _check.reduction(reduction),
            _check.flag("sum_classes", sum_classes),
            _as_tensor("pos_weight", pos_weight),
            smooth_dense,
        )

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
        target = _read(target)
        indices = isinstance(target, torch.Tensor) and target.shape != x.shape
        if indices or (self.smooth_dense and not isinstance(target, SoftTarget)):
            smoothing = self.smoothing
        else:
            smoothing = 0.0
        if isinstance(target, torch.Tensor):
            target = target.long() if indices else target if target.is_floating_point() else target.float()
        if self.reduction == "none" and not self.sum_classes:
            return self._elements(x, target, smoothing)
        sums = self.sum_classes or self.reduction == "sum"
        x, target = _classes_second(x, target)
        weights = (self._per_class(value, x.shape[1]) for value in (self.weight, self.pos_weight))
        return soft_binary_cross_entropy(
            x,
            target,
            **dict(zip(("weight", "pos_weight"), weights, strict=True)),
            label_smoothing=smoothing,
            threshold=self.target_threshold,
            class_reduction="sum" if sums else "mean",
            reduction="mean" if self.sum_classes else self.reduction,
        )

    @staticmethod
    def _per_class(weight: Any, classes: Any) -> Any:
        if weight is None:
            return None
        weight = weight if weight.is_floating_point() else weight.float()
        weight = weight.squeeze(0) if weight.dim() == 2 and weight.shape[0] == 1 else weight  # as torch broadcasts it
        return weight.expand(classes) if weight.numel() == 1 else weight

    def _elements(self, x: torch.Tensor, target: Any, smoothing: Any) -> Any:
        """Returns the loss of each element, from dense rows."""
        classes = x.shape[-1]
        if isinstance(target, torch.Tensor) and target.shape != x.shape:
            target = target.reshape(-1, 1)
            target = SoftTarget(target, torch.ones(target.shape, device=target.device), label_smoothing=smoothing)
            smoothing = 0.0
        rows = target if isinstance(target, torch.Tensor) else target.dense(classes)
        if smoothing:
            rows = rows * (1 - smoothing) + 0.5 * smoothing
        if self.target_threshold is not None:
            rows = (rows > self.target_threshold).to(rows.dtype)
        weights: Any = {"weight": self.weight, "pos_weight": self.pos_weight}
        dtype = torch.promote_types(x.dtype, torch.float32)
        return nn.functional.binary_cross_entropy_with_logits(x.to(dtype), rows.to(dtype), **weights, reduction="none")


class JsdCrossEntropy(_check.Checked, _timm_loss.JsdCrossEntropy):
    """timm's `JsdCrossEntropy`, AugMix's loss: the cross-entropy of the first split of the batch, and `alpha` times the
    Jensen-Shannon divergence of all splits, `fastmix.js_divergence(splits, scale=alpha)`.

    Args:
        num_splits: K, from 1 to 16; logits are `[K*n, C]`, the clean images first.
        alpha: the weight of the divergence.
        smoothing: e of the cross-entropy; None is 0.

    Raises:
        TypeError, ValueError: a wrong option, also when it is set later; logits whose rows do not divide into splits.

    Source: AugMix, arXiv:1912.02781.

    >>> import torch
    >>> from fastmix.compat.timm import JsdCrossEntropy
    >>> JsdCrossEntropy(smoothing=None)(torch.zeros(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))
    tensor(1.3863)
    """

    _options = {"num_splits": _splits, "alpha": _check.number}

    def __init__(self, num_splits: Any = 3, alpha: float = 12, smoothing: Any = 0.1) -> None:
        super().__init__(num_splits, alpha, None)
        self.cross_entropy_loss = LabelSmoothingCrossEntropy(0.0 if smoothing is None else smoothing)

    __call__ = nn.Module.__call__  # timm's would leave the hooks out

    def forward(self, output: torch.Tensor, target: Any) -> Any:
        if output.shape[0] % self.num_splits:
            raise _check.wrong(ValueError, "output", f"rows that divide into {self.num_splits} splits", output)
        splits = output.unflatten(0, (self.num_splits, -1))
        target = _read(target)[: splits.shape[1]]
        return self.cross_entropy_loss(splits[0], target) + js_divergence(splits, scale=self.alpha)


class _CrossEntropyLoss(nn.CrossEntropyLoss):
    """The factory's loss of class indices without smoothing."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> Any:
        return soft_cross_entropy(*_classes_second(x, target))


def create_classification_loss(*args: Any, **kwargs: Any) -> nn.Module:
    """timm's factory, with its arguments and errors. The losses for "ce", "bce" and "jsd" are ours; the others are timm's, which
    need dense rows (`Mixup(..., dense=True)`).

    >>> from fastmix.compat.timm import create_classification_loss
    >>> create_classification_loss("ce", soft_targets=True)
    SoftTargetCrossEntropy()
    """
    made = _timm_loss.create_classification_loss(*args, **kwargs)
    if type(made) is nn.CrossEntropyLoss:
        return _CrossEntropyLoss()
    if isinstance(made, _timm_loss.SoftTargetCrossEntropy):
        return SoftTargetCrossEntropy()
    if isinstance(made, _timm_loss.LabelSmoothingCrossEntropy):
        return LabelSmoothingCrossEntropy(made.smoothing)
    if isinstance(made, _timm_loss.BinaryCrossEntropy):
        names = list(inspect.signature(BinaryCrossEntropy).parameters)
        return BinaryCrossEntropy(**{name: getattr(made, name) for name in names})
    if isinstance(made, _timm_loss.JsdCrossEntropy):
        return JsdCrossEntropy(made.num_splits, made.alpha, getattr(made.cross_entropy_loss, "smoothing", None))
    return made


create_classification_loss.__signature__ = inspect.signature(_timm_loss.create_classification_loss)  # type: ignore[attr-defined]


# Tasks: timm's own make their losses with timm's factory


class ClassificationTask(_timm_task.ClassificationTask):
    """timm's `ClassificationTask`, which makes its loss, where none is given, with the factory of this module."""

    def __init__(
        self, model: torch.nn.Module, criterion: Any = None, criterion_kwargs: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if criterion is None:
            criterion = create_classification_loss(multi_label=self.multi_label, **(criterion_kwargs or {}))
            criterion_kwargs = None
        super().__init__(model, criterion, criterion_kwargs, *args, **kwargs)


class MultiLabelClassificationTask(ClassificationTask, _timm_task.MultiLabelClassificationTask):
    """timm's `MultiLabelClassificationTask`; takes `MixedRows` too."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Any:
        if isinstance(target, MixedRows):
            return ClassificationTask.forward(self, input, target)
        return super().forward(input, target)
