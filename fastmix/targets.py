"""Targets of a mixed batch, as data: two numbers a row instead of a dense row of C."""

import numbers
from dataclasses import dataclass

import torch
from torch.utils import _pytree

from . import _check
from ._dtypes import FLOATS, WEIGHT_DTYPES
from .mixing.mix import mix


@dataclass(eq=False)
class SoftTarget:
    """K-hot target: row n is sum over k of `weights[n, k]` at class `classes[n, k]`.

    Args:
        classes: `[N, K]` int64, or `[N, K, d1, ...]` for labels of pixels.
        weights: `[N, K]` float32 (or float64), or the shape of `classes`. They need not sum to 1; a class may be named twice.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, or tensors on two devices.

    It is a registered pytree and pickles, so it survives DataLoader workers and `pin_memory`. `nn.DataParallel` does not split
    it over GPUs: use DistributedDataParallel.

    >>> import torch
    >>> t = SoftTarget(torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    >>> t.dense(3)
    tensor([[0.2500, 0.0000, 0.7500],
            [0.0000, 1.0000, 0.0000]])
    >>> t.argmax(), len(t), t[1:].classes
    (tensor([2, 1]), 2, tensor([[1, 1]]))
    """

    classes: torch.Tensor
    weights: torch.Tensor

    def __post_init__(self):
        self._validate()

    def _validate(self):
        classes, weights = self.classes, self.weights
        _check.strided("classes", classes, (torch.int64,), "an int64 tensor")
        if classes.dim() < 2 or classes.shape[1] < 1:
            raise _check.wrong(ValueError, "classes", "shape [N, K] or [N, K, d1, ...]", classes)
        _check.strided("weights", weights, WEIGHT_DTYPES, "a float32 or float64 tensor")
        if weights.shape != classes.shape and weights.shape != classes.shape[:2]:
            raise _check.wrong(ValueError, "weights", f"shape {list(classes.shape[:2])} or that of classes", weights)
        _check.same_device("weights", weights, classes)

    def _full_weights(self):
        return self.weights.reshape(*self.weights.shape, *[1] * (self.classes.dim() - self.weights.dim()))

    def dense(self, num_classes: int) -> torch.Tensor:
        """The target as probabilities `[N, num_classes, ...]`; components of a negative (ignored) class are left out."""
        num_classes = _check.integer("num_classes", num_classes, 1, "an int of at least 1")
        classes = self.classes.clamp(min=0)
        _check.in_range("classes", classes, num_classes, "a class")
        weights = torch.where(self.classes >= 0, self._full_weights(), 0)
        weights = torch.where(classes < num_classes, weights, float("nan"))  # NaN: on a device classes are not read on the host
        shape = (self.classes.shape[0], num_classes, *self.classes.shape[2:])
        return weights.new_zeros(shape).scatter_add(1, classes.clamp(max=num_classes - 1), weights)

    def argmax(self) -> torch.Tensor:
        """The class with the most weight in each row, `[N, ...]`; the first named of equals. Ignored (negative) classes come
        last."""
        same = self.classes.unsqueeze(1) == self.classes.unsqueeze(2)
        total = (same * self._full_weights().unsqueeze(1)).sum(2).masked_fill(self.classes < 0, -float("inf"))
        return self.classes.gather(1, total.argmax(1, keepdim=True)).squeeze(1)

    def to(self, device, *, non_blocking: bool = False) -> "SoftTarget":
        """The target on another device."""
        device = _check.device("device", device)
        return SoftTarget(
            self.classes.to(device=device, non_blocking=non_blocking),
            self.weights.to(device=device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "SoftTarget":
        """The target in page-locked memory; DataLoader calls this."""
        return SoftTarget(self.classes.pin_memory(), self.weights.pin_memory())

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, rows) -> "SoftTarget":
        """Rows by an integer (one row), a slice, a mask `[N]`, or indices (a 1-D tensor or a list)."""
        one = isinstance(rows, torch.Tensor) and rows.dim() == 0 and rows.dtype not in (torch.bool, *FLOATS)
        if one or (isinstance(rows, numbers.Integral) and not isinstance(rows, bool)):
            rows = int(rows)
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} of a target with {len(self)} rows")
            rows = slice(rows, rows + 1 or None)
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows) if isinstance(rows, (list, range)) or hasattr(rows, "__array__") else rows
            if not isinstance(rows, torch.Tensor) or rows.dim() != 1 or rows.is_floating_point():
                raise _check.wrong(TypeError, "rows", "an int, a slice, a mask [N] or indices [M]", rows)
        return SoftTarget(self.classes[rows], self.weights[rows])


@dataclass(eq=False)
class MixedRows:
    """The target `lam[n]*values[n] + (1-lam[n])*values[index[n]]` of multi-hot or soft rows, kept as its parts.

    Args:
        values: `[N, C]` (or `[N, ...]`) floating.
        lam: float, 0-d or `[N]`, the share of a row's own values.
        index: `[N]` int64, each row's partner.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    >>> import torch
    >>> MixedRows(torch.eye(2), torch.tensor([0.75, 0.5]), torch.tensor([1, 0])).dense()
    tensor([[0.7500, 0.2500],
            [0.5000, 0.5000]])
    """

    values: torch.Tensor
    lam: torch.Tensor | float
    index: torch.Tensor

    def __post_init__(self):
        _check.float_tensor("values", self.values, 1, "[N, C]")
        _check.row_weight("lam", self.lam, self.values.shape[0], self.values)
        _check.integer_tensor("index", self.index, self.values.shape[:1], self.values)

    def dense(self) -> torch.Tensor:
        """The mixed rows, `fastmix.mix(values, lam, index)`; differentiable in `values` and `lam`. The target of a regression."""
        return mix(self.values, self.lam, self.index)

    def to(self, device, *, non_blocking: bool = False) -> "MixedRows":
        """The target on another device."""
        device = _check.device("device", device)
        lam = self.lam.to(device=device, non_blocking=non_blocking) if isinstance(self.lam, torch.Tensor) else self.lam
        return MixedRows(
            self.values.to(device=device, non_blocking=non_blocking),
            lam,
            self.index.to(device=device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "MixedRows":
        """The target in page-locked memory; DataLoader calls this."""
        lam = self.lam.pin_memory() if isinstance(self.lam, torch.Tensor) else self.lam
        return MixedRows(self.values.pin_memory(), lam, self.index.pin_memory())

    def __len__(self):
        return len(self.values)


def _register(cls):
    fields = list(cls.__dataclass_fields__)

    def rebuild(leaves, _):  # leaves may be anything while a tree is mapped, so nothing is checked
        target = object.__new__(cls)
        for name, leaf in zip(fields, leaves, strict=True):
            setattr(target, name, leaf)
        return target

    _pytree.register_pytree_node(
        cls,
        lambda target: ([getattr(target, name) for name in fields], None),
        rebuild,
        serialized_type_name=f"fastmix.{cls.__name__}",
        flatten_with_keys_fn=lambda target: (
            [(_pytree.GetAttrKey(name), getattr(target, name)) for name in fields],
            None,
        ),
    )


_register(SoftTarget)
_register(MixedRows)
