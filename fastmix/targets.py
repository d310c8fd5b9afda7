"""Targets of a mixed batch, as data: two numbers a row instead of a dense row of C."""

import numbers
import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree
from typing_extensions import Self

from . import _check
from ._dtypes import WEIGHT_DTYPES, accumulator
from .mixing.convex_combination import convex_combination
from .mixing.mix import mix

# {loss of torch: what it becomes on a target of ours}; filled when fastmix.losses is imported
STOCK_LOSSES: dict[Any, Callable[..., Any]] = {}
_NUMBERS = "label_smoothing", "num_classes"
_PYTREE_CONTEXT = *_NUMBERS, "_mixed_already"


def _written(t: Any) -> Any:
    """Returns how often a tensor has been written to in place; nothing where that is not counted."""
    return None if torch.compiler.is_compiling() or t.is_inference() else t._version


def _number(name: str, default: float | None, check: Callable[..., Any]) -> Any:
    """Returns a property of a SoftTarget that is checked when it is set. It is kept under its own name, as in pickles of any age."""

    def set_checked(self: Any, value: float | None) -> None:
        if not isinstance(self, SoftTarget):
            raise AttributeError(
                f"{name}: expected to be set on a SoftTarget, got {type(self).__name__}, whose rows are what they are"
            )
        self.__dict__[name] = check(value)

    return property(lambda self: self.__dict__.get(name, default), set_checked)


class _Target:
    """What both targets have so that they pass through other people's training loops as a tensor of labels does."""

    _leaves: tuple[str, ...]  # attributes that are tensors (or a number)
    ne: Callable[..., Tensor]
    _mixed_already = False  # whether values are of rows that were mixed before: a number that marks unknown labels is gone
    _normalized = None  # (the weights that are known to sum to 1 in each row, how often they had been written to)

    label_smoothing = _number("label_smoothing", 0.0, _check.label_smoothing)
    num_classes = _number("num_classes", None, _check.num_classes)

    def _rebuilt(self, leaves: list[Any]) -> Any:
        """Returns a target with other leaves. Nothing is checked: while a pytree is mapped they may be anything."""
        target = object.__new__(type(self))
        target.__dict__.update(self.__dict__)
        target.__dict__.update(zip(self._leaves, leaves, strict=True))
        return target

    def _map(self, change: Callable[..., Any]) -> Any:
        """Returns the target with its leaves moved, or some of their rows: what else is known of it stays true."""
        leaves = [getattr(self, name) for name in self._leaves]
        target = self._rebuilt([change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        target._normalized = None
        if self._sums_to_one:
            target._mark_sums()
        return target

    def __getstate__(self) -> dict[str, float | Tensor | None]:
        return {**self.__dict__, "_normalized": True} if self._sums_to_one else {**self.__dict__, "_normalized": None}

    def __setstate__(self, state: dict[str, float | Tensor | None]) -> None:
        self.__dict__.update(state)
        if self.__dict__.pop("_normalized", None) is not None:
            self._mark_sums()

    def _mark_sums(self) -> None:
        """Notes that each row's weights sum to 1."""
        self._normalized = self.weights, _written(self.weights)

    @property
    def _sums_to_one(self) -> bool:
        """Whether each row's weights are known to sum to 1. Other weights, once they are set, are not known to."""
        known = self._normalized
        return known is not None and known[0] is self.weights and known[1] == _written(self.weights)

    @property
    def _main(self) -> Tensor:
        return getattr(self, self._leaves[0])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Returns the target on another device. Takes what `torch.Tensor.to` takes; a dtype is ignored, and None stays where it is."""
        kwargs = dict(kwargs)
        copy = kwargs.pop("copy", False)
        if len(args) > 2 and isinstance(args[-1], bool) and isinstance(args[-2], bool):
            copy, args = args[-1], args[:-1]  # after non_blocking, as torch.Tensor.to has it
        if not args and "other" in kwargs:
            args = (kwargs.pop("other"),)
        if args and isinstance(args[0], (Tensor, _Target)):
            args = (args[0].device, None, *args[1:])
        elif args and args[0] is None:
            args = (self.device, *args[1:])
        if args and not isinstance(args[0], torch.dtype):
            args = _check.device("device", args[0]), *args[1:]
        elif "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = _check.device("device", kwargs["device"])
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self._map(lambda t: t.to(device=t.device if device is None else device, non_blocking=non_blocking, copy=copy))

    def cpu(self) -> Self:
        """Returns the target on the CPU."""
        return self.to("cpu")

    def cuda(self, device: torch.device | int | str | None = None, non_blocking: bool = False) -> Self:
        """Returns the target on a GPU, by default the current one."""
        return self._map(lambda t: t.cuda(device, non_blocking=non_blocking))

    def detach(self) -> Self:
        """Returns the target without its graph."""
        return self._map(Tensor.detach)

    def pin_memory(self) -> Self:
        """Returns the target in page-locked memory; DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def size(self, dim: int | None = None) -> Any:
        return self._main.size() if dim is None else self._main.size(dim)

    def dim(self) -> int:
        return self._main.dim()

    @property
    def shape(self) -> torch.Size:
        return self._main.shape

    @property
    def ndim(self) -> int:
        return self._main.ndim

    @property
    def device(self) -> torch.device:
        return self._main.device

    def numel(self) -> int:
        """Returns how many labels there are: one a row or pixel, or one for each value of `MixedRows`."""
        return self.ne(-100).numel()

    def __len__(self) -> int:
        return len(self._main)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in STOCK_LOSSES:
            return STOCK_LOSSES[func](*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        raise TypeError(f"torch's {name}: expected tensors, got a fastmix.{cls.__name__}: {_INSTEAD}")

    __array_ufunc__ = None  # so that array == target asks the target

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"array: expected tensors, got a fastmix.{type(self).__name__}: {_INSTEAD}")

    def __getattr__(self, name: str) -> Any:
        """Says what to do where a tensor has an attribute that a target has not."""
        instead = f": {_INSTEAD}" if hasattr(Tensor, name) and not name.startswith("__") else ""
        raise AttributeError(f"fastmix.{type(self).__name__} has no attribute {name!r}{instead}")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Target):
            return self is other
        if isinstance(other, (Tensor, numbers.Number, list, tuple)) or hasattr(other, "__array__"):
            raise TypeError(
                f"==: expected labels, got a fastmix.{type(self).__name__}, which has several a row: compare with "
                "target.argmax(), or measure with fastmix.mixed_accuracy"
            )
        return self is other

    __hash__ = object.__hash__


_INSTEAD = (
    "give it to a loss of fastmix or to torch.nn.functional.cross_entropy, or make it dense, target.dense(num_classes); one class a row "
    "is target.argmax(), accuracy is fastmix.mixed_accuracy"
)


def _refuse(name: str) -> Callable[..., Any]:
    def operation(self: Any, *_: Any) -> None:
        raise TypeError(f"{name}: expected tensors, got a fastmix.{type(self).__name__}: {_INSTEAD}")

    return operation


_UNARY = "neg", "pos", "abs", "invert", "round"
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
for _name in [*_UNARY, *_BINARY, "lt", "le", "gt", "ge"]:
    setattr(_Target, f"__{_name}__", _refuse(_name))
for _name in _BINARY:
    setattr(_Target, f"__r{_name}__", _refuse(_name))


class SoftTarget(_Target):
    """K-hot target, with label smoothing if it is asked for:

        row n = (1-e) * sum over k of weights[n, k]*onehot(classes[n, k]) + (e/C) * sum over k of weights[n, k]

    Args:
        classes: `[N, K]` int64, or `[N, K, d1, ...]` for labels of pixels.
        weights: `[N, K]` float32 (or float64), or the shape of `classes`. They need not sum to 1; a class may be named twice.
        label_smoothing: e, in [0, 1]. A loss with a smoothing of its own smooths this row again: `1 - (1-e)*(1-e_loss)` in all.
        num_classes: C, where it is known. Classes beyond it, and logits of another width, are then refused.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, tensors on two devices; on the CPU a class beyond `num_classes`.

    It passes through other people's training loops as a tensor of labels does. `torch.nn.functional.cross_entropy` and
    `torch.nn.CrossEntropyLoss` take it, and compute `fastmix.soft_cross_entropy`. It has `to`, `cpu`, `cuda`, `detach`, `size`,
    `shape`, `ndim`, `dim`, `device`, `max` and `ne`, but no `dtype`, by which frameworks choose a loss. Every other function of
    torch raises a `TypeError` that says what to do. It is a registered pytree and pickles, so it survives DataLoader workers,
    `pin_memory` and `torch.load`. `nn.DataParallel` does not split it over GPUs: use DistributedDataParallel.

    >>> import torch
    >>> t = SoftTarget(torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    >>> t.dense(3)
    tensor([[0.2500, 0.0000, 0.7500],
            [0.0000, 1.0000, 0.0000]])
    >>> t.argmax(), len(t), t[1:].classes
    (tensor([2, 1]), 2, tensor([[1, 1]]))
    >>> torch.nn.functional.cross_entropy(torch.zeros(2, 3), t)
    tensor(1.0986)
    """

    _leaves = "classes", "weights"

    def __init__(self, classes: Tensor, weights: Tensor, *, label_smoothing: float = 0.0, num_classes: int | None = None):
        self.classes = classes
        self.weights = weights
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self._validate()
        if num_classes is not None:
            _check.in_range("classes", classes.clamp(min=0), self.num_classes, "a class")

    def __repr__(self) -> str:
        rest = f", label_smoothing={self.label_smoothing}" * (self.label_smoothing > 0)
        rest += f", num_classes={self.num_classes}" * (self.num_classes is not None)
        return f"SoftTarget(classes={self.classes}, weights={self.weights}{rest})"

    def _validate(self) -> None:
        _check.strided("classes", self.classes, _check.INT64, "an int64 tensor")
        classes, weights, shape = self.classes, self.weights, self.classes.shape
        if len(shape) < 2 or shape[1] < 1:
            raise _check.wrong(ValueError, "classes", "shape [N, K] or [N, K, d1, ...]", classes)
        _check.strided("weights", weights, WEIGHT_DTYPES, "a float32 or float64 tensor")
        if weights.shape != shape and weights.shape != shape[:2]:
            raise _check.wrong(ValueError, "weights", f"shape {list(shape[:2])} or that of classes", weights)
        _check.same_device("weights", weights, classes)

    def _full_weights(self) -> Tensor:
        return self.weights.reshape(*self.weights.shape, *[1] * (self.classes.dim() - self.weights.dim()))

    def dense(self, num_classes: int | None = None) -> Tensor:
        """Returns the target as probabilities `[N, C, ...]`, smoothed; components of a negative (ignored) class are left out.

        Args:
            num_classes: C; the target's own, if it has one, by default.
        """
        C = self.num_classes if num_classes is None else _check.integer("num_classes", num_classes, 1, "an int of at least 1")
        if C is None:
            raise _check.wrong(TypeError, "num_classes", "an int, since the target has none of its own", C)
        if self.num_classes not in (None, C):
            raise ValueError(f"num_classes: expected {self.num_classes}, the target's own, got {C}")
        classes = self.classes.clamp(min=0)
        _check.in_range("classes", classes, C, "a class")
        weights = torch.where(self.classes >= 0, self._full_weights(), 0)
        weights = torch.where(classes < C, weights, float("nan"))  # NaN: on a device classes are not read on the host
        shape = (self.classes.shape[0], C, *self.classes.shape[2:])
        rows = weights.new_zeros(shape).scatter_add(1, classes.clamp(max=C - 1), weights)
        e = self.label_smoothing
        return rows if e == 0 else (1 - e) * rows + (e / C) * weights.sum(1, keepdim=True)

    def union(self, num_classes: int | None = None) -> Tensor:
        """Returns every class of a row as fully there, `[N, C, ...]`: 1 where a class has weight, 0 elsewhere. The target of a
        sigmoid loss whose mixed images show both things (a weak defect is still a defect). `num_classes` as of `dense`."""
        present = self._rebuilt([self.classes, (self._full_weights() != 0).expand(self.classes.shape).to(self.weights.dtype)])
        present.label_smoothing = 0.0
        return present.dense(num_classes).clamp(max=1)

    def argmax(self, dim: int = 1) -> Tensor:
        """Returns the class with the most weight in each row, `[N, ...]`; the first named of equals. Ignored (negative) classes come
        last."""
        return self.max(dim)[1]

    def max(self, dim: int = 1) -> tuple[Tensor, Tensor]:
        """Returns, as `torch.max` of the dense rows without smoothing, the largest weight of a class in each row and that class."""
        if dim not in (1, 1 - self.dim()):
            raise _check.wrong(ValueError, "dim", "1, the dimension of classes", dim)
        same = self.classes.unsqueeze(1) == self.classes.unsqueeze(2)
        total = (same * self._full_weights().unsqueeze(1)).sum(2).masked_fill(self.classes < 0, -float("inf"))
        values, at = total.max(1, keepdim=True)
        return torch.return_types.max((values.squeeze(1), self.classes.gather(1, at).squeeze(1)))

    def ne(self, value: Any) -> Tensor:
        """Returns which rows count, `[N, ...]`: those with a component of another class than `value`. Frameworks that ask how many
        labels are not -100 get the number of rows from `ne(-100).sum()`."""
        return (self.classes != value).any(1)

    def parts(self) -> dict[str, Any]:
        """Returns the target as a dict of plain tensors, which every framework can slice, concatenate, gather and send. All losses
        take it as it is; `SoftTarget.of` makes a target of it again. Numbers travel in the names of its keys."""
        numbers = [f"{name}={getattr(self, name)!r}" for name in _NUMBERS if getattr(self, name)]
        return {"classes": self.classes, f"weights({', '.join(numbers)})" if numbers else "weights": self.weights}

    @classmethod
    def of(cls, parts: dict[str, Any]) -> "SoftTarget":
        """Returns the target that `parts()` was made of."""
        key = next((key for key in parts if isinstance(key, str) and key.startswith("weights")), None)
        if key is None or "classes" not in parts or len(parts) != 2:
            raise _check.wrong(ValueError, "parts", "a dict with 'classes' and 'weights', as from parts()", list(parts))
        found = dict(re.findall(r"(\w+)=([\w.+-]+)", key))
        classes = int(found["num_classes"]) if "num_classes" in found else None
        return cls(parts["classes"], parts[key], label_smoothing=float(found.get("label_smoothing", 0)), num_classes=classes)

    def __getitem__(self, rows: Any) -> "SoftTarget":
        """Rows by an integer (one row), a slice, a mask `[N]`, or indices (a 1-D tensor or a list)."""
        rows = _check.rows_to_take(rows, len(self))
        return self._map(lambda t: t[rows])


class MixedRows(_Target):
    """The target `lam[n]*values[n] + (1-lam[n])*values[index[n]]` of multi-hot or soft rows, kept as its parts.

    It passes through training loops as `SoftTarget` does.

    Args:
        values: `[N, C]` (or `[N, ...]`) floating.
        lam: float, 0-d or `[N]`: the weight of a row's own values.
        index: `[N]` int64, each row's partner.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    >>> import torch
    >>> MixedRows(torch.eye(2), torch.tensor([0.75, 0.5]), torch.tensor([1, 0])).dense()
    tensor([[0.7500, 0.2500],
            [0.5000, 0.5000]])
    """

    _leaves = "values", "lam", "index"

    def __init__(self, values: Tensor, lam: float | Tensor, index: Tensor) -> None:
        self.values = values
        self.lam = lam
        self.index = index
        _check.float_tensor("values", values, 1, "[N, C]")
        _check.row_weight("lam", lam, values.shape[0], values)
        _check.integer_tensor("index", index, values.shape[:1], values)

    def __repr__(self) -> str:
        return f"MixedRows(values={self.values}, lam={self.lam}, index={self.index})"

    def dense(self, num_classes: int | None = None) -> Tensor:
        """Returns the mixed rows, `fastmix.mix(values, lam, index)`; differentiable in `values` and `lam`. The target of a
        regression. `num_classes`, which a `SoftTarget` needs, has to be their width if it is given."""
        self._check_width(num_classes)
        return mix(self.values, self.lam, self.index)

    def argmax(self, dim: int = 1) -> Tensor:
        """Returns the class with the largest mixed value in each row, `[N, ...]`."""
        return self.dense().argmax(dim)

    def max(self, dim: int = 1) -> tuple[Tensor, Tensor]:
        """Returns `torch.max` of the mixed rows."""
        return self.dense().max(dim)

    def _check_width(self, num_classes: Any) -> None:
        if num_classes is not None and (self.values.dim() < 2 or num_classes != self.values.shape[1]):
            raise _check.wrong(ValueError, "num_classes", f"None or the width of values {list(self.values.shape)}", num_classes)

    def union(self, num_classes: int | None = None) -> Tensor:
        """Returns the larger of a row's own value and its partner's, `max(values, values[index])`: what either shows is there. A row
        whose lam is 1 has its own values, and one whose lam is 0 its partner's. In place of the average, `dense()`."""
        self._check_width(num_classes)
        values, partners, lam = self.parts().values()
        lam = lam.view(-1, *[1] * (values.dim() - 1))
        larger = torch.where(lam.isnan(), lam.to(values.dtype), torch.maximum(values, partners))  # NaN: a partner out of range
        return torch.where(lam == 1, values, torch.where(lam == 0, partners, larger))

    def ne(self, value: Any) -> Tensor:
        """Returns which labels count, in the values' shape: all of them, as of dense rows."""
        return torch.ones(self.values.shape, dtype=torch.bool, device=self.device)

    def parts(self) -> dict[str, Any]:
        """Returns the target as a dict of plain tensors, each row with its partner's values beside its own: slices and
        concatenations of it are right. All losses take it as it is; `MixedRows.of` makes a target of it again."""
        lam = _check.coefficient("lam", self.lam, self.values).expand(len(self))
        _check.in_range("index", self.index, len(self), "a partner")
        known = (self.index >= 0) & (self.index < len(self))
        partners = self.values[torch.where(known, self.index, 0)]
        return {"values": self.values, "partner_values": partners, "lam": torch.where(known, lam, float("nan"))}

    @classmethod
    def of(cls, parts: dict[str, Any]) -> "MixedRows":
        """Returns the target that `parts()` was made of, with its rows mixed already."""
        if set(parts) != {"values", "partner_values", "lam"}:
            expected = "a dict with 'values', 'partner_values' and 'lam', as from parts()"
            raise _check.wrong(ValueError, "parts", expected, list(parts))
        weights = torch.stack((parts["lam"], 1 - parts["lam"]), 1)
        sources = [parts[name].to(accumulator(parts[name].dtype)) for name in ("values", "partner_values")]
        return cls._mixed(convex_combination(sources, weights))

    @classmethod
    def _mixed(cls, rows: Any) -> Any:
        made = cls(rows, 1.0, torch.arange(len(rows), device=rows.device))
        made._mixed_already = True
        return made

    def __getitem__(self, rows: Any) -> "MixedRows":
        """Rows as of a `SoftTarget`, mixed already: their partners may be outside of what is taken. Narrow values become float32,
        in which the losses mix them."""
        values = self.values.to(accumulator(self.values.dtype))
        return self._mixed(mix(values, self.lam, self.index)[_check.rows_to_take(rows, len(self))])


def _register(cls: Any) -> None:
    def flatten(target: MixedRows | SoftTarget) -> tuple[list[Tensor], list[bool | float | None]]:
        return [getattr(target, name) for name in cls._leaves], [getattr(target, name) for name in _PYTREE_CONTEXT]

    def flatten_with_keys(target: SoftTarget) -> tuple[list[tuple[Any, Tensor]], list[bool | float | None]]:
        leaves, context = flatten(target)
        return list(zip(map(_pytree.GetAttrKey, cls._leaves), leaves, strict=True)), context

    def unflatten(leaves: Any, context: Any) -> Any:
        target = object.__new__(cls)
        target.__dict__.update(zip(_PYTREE_CONTEXT, context or (), strict=False))
        return target._rebuilt(leaves)

    _pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=f"fastmix.{cls.__name__}", flatten_with_keys_fn=flatten_with_keys
    )
    torch.serialization.add_safe_globals([cls])


_register(SoftTarget)
_register(MixedRows)


def of_parts(parts: dict[str, Any]) -> SoftTarget | MixedRows:
    """Returns the target whose `parts()` these are."""
    return MixedRows.of(parts) if "values" in parts else SoftTarget.of(parts)
