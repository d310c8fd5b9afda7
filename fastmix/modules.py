"""Module forms of the losses."""

import torch
from torch import nn

from . import _check
from .functional import soft_cross_entropy


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
