"""Module forms of the losses."""

import torch
from torch import nn

from . import _check
from .functional import soft_binary_cross_entropy, soft_cross_entropy


class SoftCrossEntropyLoss(nn.Module):
    """`soft_cross_entropy` as a module, with the arguments of `torch.nn.CrossEntropyLoss`.

    It takes mixed and plain targets alike, so one criterion serves training and validation.

    Args:
        weight, ignore_index, reduction, label_smoothing: as in `fastmix.soft_cross_entropy`. `weight` is a buffer.

    >>> import torch, fastmix
    >>> criterion = fastmix.SoftCrossEntropyLoss(label_smoothing=0.1)
    >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
    tensor(2.3026)
    """

    weight: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        _check.loss_options(ignore_index, label_smoothing, reduction)
        if weight is not None:
            _check.float_tensor("weight", weight, 0, "[C]")
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing

    def forward(self, logits: torch.Tensor, target) -> torch.Tensor:
        return soft_cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


class SoftBinaryCrossEntropyLoss(nn.Module):
    """`soft_binary_cross_entropy` as a module.

    It takes mixed and plain targets alike, so one criterion serves training and validation.

    Args:
        weight, pos_weight, label_smoothing, threshold, class_reduction, reduction: as in `fastmix.soft_binary_cross_entropy`.
            `weight` and `pos_weight` are buffers.

    >>> import torch, fastmix
    >>> criterion = fastmix.SoftBinaryCrossEntropyLoss(label_smoothing=0.1, class_reduction="sum")
    >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
    tensor(6.9315)
    """

    weight: torch.Tensor | None
    pos_weight: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        pos_weight: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        threshold: float | None = None,
        class_reduction: str = "mean",
        reduction: str = "mean",
    ):
        super().__init__()
        _check.binary_loss_options(label_smoothing, threshold, class_reduction, reduction)
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            if value is not None:
                _check.float_tensor(name, value, 0, "[C]")
            self.register_buffer(name, value)
        self.label_smoothing = label_smoothing
        self.threshold = threshold
        self.class_reduction = class_reduction
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, target) -> torch.Tensor:
        return soft_binary_cross_entropy(
            logits,
            target,
            weight=self.weight,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            threshold=self.threshold,
            class_reduction=self.class_reduction,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        options = "label_smoothing", "threshold", "class_reduction", "reduction"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
