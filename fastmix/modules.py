"""The losses as modules."""

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import _check
from .losses import soft_binary_cross_entropy as binary
from .losses import soft_cross_entropy as softmax
from .losses._elements import checked_ignore_value


class _Loss(nn.Module):
    """A loss whose options are attributes; those that are tensors `[C]` are buffers."""

    loss: Callable[..., torch.Tensor]
    weights: tuple[str, ...]
    options: tuple[str, ...]
    others: dict[str, Callable[[Any], Any]] = {}  # further options: what checks them
    checked: Callable[..., Any]  # of all options by name: what is kept of them

    def __init__(self, options: dict[str, Any], **weights: Any) -> None:
        super().__init__()
        self.__dict__.update(self.checked(**options)._asdict())
        for name, value in weights.items():
            self.register_buffer(name, self._checked_weight(name, value))

    @staticmethod
    def _checked_weight(name: str, value: Any) -> torch.Tensor | None:
        if name == "pos_weight" and isinstance(value, numbers.Real) and not isinstance(value, bool):
            value = torch.tensor(_check.number(name, value))
        if value is not None:
            _check.float_tensor(name, value, 0, "[C]")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks an option also where it is set later."""
        if name in self.weights:
            value = self._checked_weight(name, value)
        elif name in self.options:
            value = getattr(self.checked(**{n: value if n == name else getattr(self, n) for n in self.options}), name)
        elif name in self.others:
            value = self.others[name](value)
        super().__setattr__(name, value)

    def forward(self, logits: torch.Tensor, target: Any) -> torch.Tensor:
        return type(self).loss(
            logits, target, **{name: getattr(self, name) for name in (*self.weights, *self.options, *self.others)}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*self.options, *self.others))


class SoftCrossEntropyLoss(_Loss):
    """`soft_cross_entropy` as a module, with the arguments of `torch.nn.CrossEntropyLoss`.

    It takes mixed and plain targets alike, so one criterion serves training and validation.

    Args:
        weight, ignore_index, reduction, label_smoothing, smooth_over: as in `fastmix.soft_cross_entropy`. `weight` is a buffer.

    >>> import torch, fastmix
    >>> criterion = fastmix.SoftCrossEntropyLoss(label_smoothing=0.1)
    >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
    tensor(2.3026)
    """

    loss = staticmethod(softmax.soft_cross_entropy)
    weights = ("weight",)
    options = softmax.Options._fields
    others = {"smooth_over": softmax.checked_smooth_over}
    checked = staticmethod(softmax.checked_options)

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        smooth_over: str = "all",
    ) -> None:
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
        super().__init__(options, weight=weight)
        self.smooth_over = smooth_over


class SoftBinaryCrossEntropyLoss(_Loss):
    """`soft_binary_cross_entropy` as a module.

    It takes mixed and plain targets alike, so one criterion serves training and validation.

    Args:
        weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, ignore_value: as in
            `fastmix.soft_binary_cross_entropy`. `weight` and `pos_weight` are buffers.

    >>> import torch, fastmix
    >>> criterion = fastmix.SoftBinaryCrossEntropyLoss(label_smoothing=0.1, class_reduction="sum")
    >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
    tensor(6.9315)
    """

    loss = staticmethod(binary.soft_binary_cross_entropy)
    weights = ("weight", "pos_weight")
    options = binary.Options._fields
    others = {"ignore_value": checked_ignore_value}
    checked = staticmethod(binary.checked_options)

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        pos_weight: torch.Tensor | float | None = None,
        label_smoothing: float = 0.0,
        threshold: float | None = None,
        class_reduction: str = "mean",
        reduction: str = "mean",
        *,
        ignore_value: float | None = None,
    ) -> None:
        options = {
            "label_smoothing": label_smoothing,
            "threshold": threshold,
            "class_reduction": class_reduction,
            "reduction": reduction,
        }
        super().__init__(options, weight=weight, pos_weight=pos_weight)
        self.ignore_value = ignore_value
