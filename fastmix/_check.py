"""Argument errors: every message names the argument, what was expected and what came. Nothing here waits for a device:
values are read only where they are on the CPU, and never while torch traces or transforms the call."""

import math
import numbers
import os
import reprlib
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch.autograd import forward_ad

from ._dtypes import FLOATS, WEIGHT_DTYPES, accumulator
from ._native import library

# Names that every call asks for, at hand
Tensor, STRIDED, INT64, is_compiling = torch.Tensor, torch.strided, (torch.int64,), torch.compiler.is_compiling
_transforms_active, _dispatch_modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
_debug: ContextVar[bool] = ContextVar("fastmix_debug", default=False)


@contextmanager
def debug():
    """Checks class and partner indices on every device, at the price of waiting for it.

    On the CPU they are always checked. On a GPU a wrong index only makes its row NaN, since checking it would make the host wait;
    GradScaler then skips the step silently. Inside this block, or with `FASTMIX_DEBUG=1` in the environment, it is a `ValueError`
    that names the row and the index.

    >>> import torch, fastmix
    >>> with fastmix.debug():
    ...     fastmix.mix(torch.zeros(2, 3), 0.5, torch.tensor([1, 2]))
    Traceback (most recent call last):
    ValueError: index: expected a partner in [0, 2), got 2 in row 1 (at [1])
    """
    token = _debug.set(True)
    try:
        yield
    finally:
        _debug.reset(token)


def debugging() -> bool:
    return _debug.get() or os.environ.get("FASTMIX_DEBUG", "0") not in ("", "0")


def describe(value) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        kind = "nested " if value.is_nested else "" if value.layout == torch.strided else f"{value.layout} "
        shape = "" if value.is_nested else f" of shape {list(value.shape)}"
        return f"{'an' if dtype.startswith('i') and not kind else 'a'} {kind}{dtype} tensor{shape} on {value.device}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {type(value).__name__} of {value.dtype} and shape {list(value.shape)}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def wrong(kind, argument, expected, value):
    """Returns the exception, for the caller to raise."""
    return kind(f"{argument}: expected {expected}, got {describe(value)}")


def strided(argument, t, dtypes, expected):
    """Checks for a strided tensor of one of these dtypes."""
    if type(t) is Tensor and t.dtype in dtypes and t.layout == STRIDED and not t.is_nested:
        return
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        bytes_of_images = argument == "x" and isinstance(t, Tensor) and t.dtype == torch.uint8
        raise wrong(TypeError, argument, expected + " (bytes of images: fastmix.mix_images)" * bytes_of_images, t)
    if t.layout != STRIDED or t.is_nested:
        raise wrong(TypeError, argument, "a dense (strided) tensor", t)
    no_coordinates(argument, t)


def no_coordinates(argument, t):
    """Refuses torchvision's BoundingBoxes and KeyPoints: positions in an image are no values that can be mixed."""
    if type(t) is not torch.Tensor and hasattr(t, "canvas_size"):
        expected = (
            f"images, label maps or values: {type(t).__name__} of a mixed image are those of both images, torch.cat((a, b))"
        )
        raise wrong(TypeError, argument, expected, t)


def float_tensor(argument, t, least_dims, shape):
    strided(argument, t, FLOATS, "a float16, bfloat16, float32 or float64 tensor")
    if t.dim() < least_dims:
        raise wrong(ValueError, argument, f"shape {shape}", t)


def integer_tensor(argument, t, shape, like, narrow=False):
    """Checks for an int64 tensor (or int32, if `narrow`) of this shape, on the device of `like`."""
    if narrow:
        strided(argument, t, (torch.int64, torch.int32), "an int64 or int32 tensor")
    else:
        strided(argument, t, INT64, "an int64 tensor")
    if t.shape != shape:
        raise wrong(ValueError, argument, f"shape {list(shape)}", t)
    same_device(argument, t, like)


def integer(argument, value, least, expected) -> int:
    """Checks for a Python or NumPy integer of 64 bits, at least `least`."""
    if type(value) is int and least <= value < 2**63:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong(TypeError, argument, "an int", value)
    if not least <= value < 2**63:
        raise wrong(ValueError, argument, expected, value)
    return int(value)


def number(argument, value) -> float:
    """Checks for a finite Python or NumPy number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong(TypeError, argument, "a float", value)
    if not -math.inf < float(value) < math.inf:  # written out: math.isfinite cannot be traced with a number that changes
        raise wrong(ValueError, argument, "a finite float", value)
    return float(value)


def flag(argument, value) -> bool:
    """Checks for a bool, or the number 0 or 1 (NumPy's bools too)."""
    if not isinstance(value, (numbers.Integral, np.bool_)) or value not in (0, 1):
        raise wrong(TypeError, argument, "a bool", value)
    return bool(value)


class Checked:
    """Checks options whenever they are set, in the constructor and later."""

    _options: dict = {}  # {attribute: check(name, value) -> the value to keep}

    def __setattr__(self, name, value):
        check = self._options.get(name)
        super().__setattr__(name, value if check is None else check(name, value))


def device(argument, value) -> torch.device:
    if isinstance(value, bool) or not isinstance(value, (str, int, torch.device)):
        raise wrong(TypeError, argument, "a device", value)
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise wrong(ValueError, argument, "a device", value) from error


def same_device(argument, t, like):
    if t.device != like.device:
        raise wrong(ValueError, argument, f"a tensor on {like.device}", t)


def readable(t) -> bool:
    """Whether the host may read values: on the CPU, or anywhere under `debug()`, but never in a trace."""
    return not transformed() and (t.is_cpu or debugging())  # in this order: debugging() cannot be traced


def transformed() -> bool:
    """Whether the call is traced (torch.compile, fake tensors) or transformed (torch.func, forward-mode AD)."""
    return is_compiling() or _dispatch_modes() > 0 or _transforms_active() or forward_ad._current_level >= 0


def functional_transform() -> bool:
    """Whether the call is under torch.func or forward-mode AD."""
    return _transforms_active() or forward_ad._current_level >= 0


def batched(g) -> bool:
    """Whether a backward runs under a transform, or on many upstream gradients at once (is_grads_batched)."""
    return is_compiling() or functional_transform() or is_legacy_batchedtensor(g)


def in_range(argument, index, stop, what, ignore_index=None):
    """Checks that every entry but ignore_index lies in [0, stop), on the CPU and under `debug()`. Elsewhere the kernels make the
    rows of wrong entries NaN."""
    if not readable(index) or library.all_in_range(index, stop, ignore_index):
        return
    bad = (index < 0) | (index >= stop)
    if ignore_index is not None:
        bad &= index != ignore_index
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{argument}: expected {what} in [0, {stop}), got {int(index[tuple(at)])} in row {at[0]} (at {at})")


def partners_and_blocks(rows, index, plan, partner_plan):
    """Checks that partners are rows, and that plans name blocks, as `in_range` does."""
    in_range("index", index, rows, "a partner")
    for name, value in (("plan", plan), ("partner_plan", partner_plan)):
        if value is not None:
            in_range(name, value, value.shape[1], "a block")


def multi_hot(argument, rows):
    """Checks that integer rows of labels hold 0 and 1, not classes: on the CPU and under `debug()`."""
    if not rows.is_floating_point() and rows.dtype != torch.bool:
        in_range(argument, rows, 2, "a label of a multi-hot row, 0 or 1,")


def row_flags(argument, flags, like):
    """Checks for a bool tensor with an entry for each row of `like`, on its device."""
    strided(argument, flags, (torch.bool,), "a bool tensor")
    if flags.shape != like.shape[:1]:
        raise wrong(ValueError, argument, f"shape [{like.shape[0]}]", flags)
    same_device(argument, flags, like)


def row_weight(argument, lam, rows, like):
    """Checks for a number, or a float32 or float64 tensor [] or [rows] on the device of `like` (or a 0-d one of the CPU)."""
    if not isinstance(lam, torch.Tensor):
        if isinstance(lam, bool) or not isinstance(lam, numbers.Real):
            raise wrong(TypeError, argument, "a float, or a float32 or float64 tensor", lam)
        try:
            float(lam)
        except OverflowError as error:
            raise wrong(ValueError, argument, "a float", lam) from error
        return
    strided(argument, lam, WEIGHT_DTYPES, "a float, or a float32 or float64 tensor (lower precision would round it)")
    if lam.dim() and lam.shape != (rows,):
        raise wrong(ValueError, argument, f"a float, a 0-d tensor or shape [{rows}]", lam)
    if lam.dim() or not lam.is_cpu:  # a 0-d tensor of the CPU goes anywhere
        same_device(argument, lam, like)


def moved(value, device, dtype):
    """A few numbers on a device, without waiting for it. They are copied where they are first: pinned memory would be read later,
    when its owner may have written the next numbers there."""
    if value.device == device:
        return value if value.dtype == dtype else value.to(dtype)
    return value.to(dtype=dtype, copy=True).to(device, non_blocking=True)


def coefficient(argument, lam, x) -> torch.Tensor:
    """Returns lam as a tensor [] or [N] on x's device, of the dtype that x is computed in."""
    row_weight(argument, lam, x.shape[0], x)
    dtype = accumulator(x.dtype)
    if isinstance(lam, Tensor):
        return lam if lam.dtype == dtype and lam.dim() else moved(lam, x.device, dtype)
    if is_compiling():  # ones().mul(lam) keeps a Python float symbolic under torch.compile; full() would recompile for each
        return torch.ones((), dtype=torch.float64, device=x.device).mul(lam).to(dtype)
    return torch.full((), float(lam), dtype=dtype, device=x.device)


MOST_SOURCES = 16  # of one launch


def sources(argument, value):
    """Returns a tensor [K, N, ...], or K tensors [N, ...] of one shape, dtype and device as a tuple; K from 1 to 16."""
    if isinstance(value, torch.Tensor):
        float_tensor(argument, value, 2, "[K, N, ...]")
        if not 1 <= value.shape[0] <= MOST_SOURCES:
            raise wrong(ValueError, argument, f"shape [K, N, ...] with K from 1 to {MOST_SOURCES}", value)
        return value
    if not isinstance(value, (tuple, list)):
        raise wrong(TypeError, argument, "a tensor [K, N, ...] or a sequence of tensors [N, ...]", value)
    if not 1 <= len(value) <= MOST_SOURCES:
        raise ValueError(f"{argument}: expected from 1 to {MOST_SOURCES} tensors, got {len(value)}")
    first = value[0]
    float_tensor(f"{argument}[0]", first, 1, "[N, ...]")
    for k, t in enumerate(value[1:], 1):
        strided(f"{argument}[{k}]", t, (first.dtype,), f"a {str(first.dtype).removeprefix('torch.')} tensor, as {argument}[0]")
        if t.shape != first.shape:
            raise wrong(ValueError, f"{argument}[{k}]", f"shape {list(first.shape)}, as {argument}[0]", t)
        same_device(f"{argument}[{k}]", t, first)
    return tuple(value)


def source_weights(argument, weights, sources) -> torch.Tensor:
    """Returns weights [N, K] of K tensors [N, ...], in the dtype that they are computed in."""
    strided(argument, weights, WEIGHT_DTYPES, "a float32 or float64 tensor (lower precision would round it)")
    like = sources if isinstance(sources, torch.Tensor) else sources[0]
    N, K = (like.shape[1], like.shape[0]) if like is sources else (like.shape[0], len(sources))
    if weights.shape != (N, K):
        raise wrong(ValueError, argument, f"shape [{N}, {K}], a weight of each source in each row", weights)
    same_device(argument, weights, like)
    dtype = accumulator(like.dtype)
    return weights if weights.dtype == dtype else weights.to(dtype)


def box(argument, value, x):
    strided(argument, value, (torch.int32, torch.int64), "an int32 or int64 tensor")
    dims = value.shape[1] // 2 if value.dim() == 2 else 0
    if value.dim() != 2 or value.shape[0] != x.shape[0] or value.shape[1] not in (2, 4, 6) or x.dim() <= dims:
        sizes = ", ".join(f"[{x.shape[0]}, {2 * d}]" for d in range(1, min(x.dim() - 1, 3) + 1))
        raise wrong(ValueError, argument, f"shape {sizes or 'nothing: rows without dimensions have no box'}", value)
    same_device(argument, value, x)


def cell_mask(argument, mask, x) -> torch.Tensor:
    """Returns a mask [N, h, w] over the last two dimensions of x, of the dtype that x is computed in."""
    strided(argument, mask, WEIGHT_DTYPES, "a float32 or float64 tensor (lower precision would round it)")
    if mask.dim() != 3 or mask.shape[0] != x.shape[0]:
        raise wrong(ValueError, argument, f"shape [{x.shape[0]}, h, w]", mask)
    for size, count, side in zip(x.shape[-2:], mask.shape[1:], ("height", "width"), strict=True):
        if count != size and (count == 0 or size % count):
            raise wrong(ValueError, argument, f"a number of cells that divides x's {side} {size}", mask)
    same_device(argument, mask, x)
    dtype = accumulator(x.dtype)
    return mask if mask.dtype == dtype else mask.to(dtype)


def output(out, like, **inputs):
    """Checks for a tensor of this shape, dtype and device that overlaps neither itself nor the inputs, by name."""
    first = next(iter(inputs))
    strided("out", out, (like.dtype,), f"a {str(like.dtype).removeprefix('torch.')} tensor, as {first}")
    if out.shape != like.shape:
        raise wrong(ValueError, "out", f"shape {list(like.shape)}, as {first}", out)
    same_device("out", out, like)
    if transformed() or not out.numel():
        return
    # by growing stride: each dimension has to step beyond what the ones before reach
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError("out: expected a tensor whose elements do not share memory, got one that overlaps itself")
            reach += (size - 1) * stride
    for name, t in inputs.items():
        if t is not None and t.numel() and _span(out)[0] < _span(t)[1] and _span(t)[0] < _span(out)[1]:
            raise ValueError(f"out: expected memory of its own, got a tensor that overlaps {name}, which is read throughout")


def _span(t):
    """Returns the address of a tensor's first element and that behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def class_weight(argument, weight, logits) -> torch.Tensor | None:
    """Returns class weights as a contiguous tensor [C] of the dtype that the loss is computed in."""
    if weight is None:
        return None
    float_tensor(argument, weight, 1, f"[{logits.shape[1]}]")
    if tuple(weight.shape) != (logits.shape[1],):
        raise wrong(ValueError, argument, f"shape [{logits.shape[1]}], one weight a class", weight)
    same_device(argument, weight, logits)
    if weight.requires_grad:
        raise ValueError(f"{argument}: expected a constant, got a tensor that requires grad: class weights have no gradient")
    return weight.resolve_neg().to(accumulator(logits.dtype)).contiguous()


def positive_weight(argument, weight, logits) -> torch.Tensor | None:
    """Returns the weights of the positive terms as `class_weight` does; a number, a 0-d tensor or one of
    shape [1] is every class's."""
    if isinstance(weight, numbers.Real) and not isinstance(weight, bool):
        weight = coefficient(argument, number(argument, weight), logits)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        if weight.dim() == 2 == logits.dim() and weight.shape[0] == 1:  # as torch broadcasts it
            weight = weight.squeeze(0)
        if weight.numel() == 1 and weight.dim() <= 1:
            host = weight.dim() == 0 and weight.is_cpu
            weight = (moved(weight, logits.device, weight.dtype) if host else weight).expand(logits.shape[1])
    return class_weight(argument, weight, logits)


def label_smoothing(value) -> float:
    if type(value) is float and 0 <= value <= 1:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong(TypeError, "label_smoothing", "a float in [0, 1]", value)
    if not 0 <= float(value) <= 1:
        raise wrong(ValueError, "label_smoothing", "a float in [0, 1]", value)
    return float(value)


def num_classes(value) -> int | None:
    return None if value is None else integer("num_classes", value, 1, "an int of at least 1")


def threshold(value, argument="threshold") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong(TypeError, argument, "a float or None", value)
    if value != value:  # NaN; math.isnan cannot be traced with a number that changes
        raise wrong(ValueError, argument, "a number or None", value)
    return float(value)


def reduction(value) -> str:
    return one_of("reduction", value, ("mean", "sum", "none"), "'mean', 'sum' or 'none'")


def one_of(argument, value, names, expected):
    if not isinstance(value, str) or value not in names:
        raise wrong(ValueError, argument, expected, value)
    return value


def rows_to_take(rows, count):
    """Returns what takes these rows of a tensor and keeps its dimensions."""
    one = isinstance(rows, torch.Tensor) and rows.dim() == 0 and rows.dtype not in (torch.bool, *FLOATS)
    if one or (isinstance(rows, numbers.Integral) and not isinstance(rows, bool)):
        rows = int(rows)
        if not -count <= rows < count:
            raise IndexError(f"row {rows} of a target with {count} rows")
        return slice(rows, rows + 1 or None)
    if not isinstance(rows, slice):
        if isinstance(rows, (list, range)) or hasattr(rows, "__array__"):
            rows = torch.as_tensor(rows) if len(rows) else torch.zeros(0, dtype=torch.int64)
        if not isinstance(rows, torch.Tensor) or rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.uint8:
            raise wrong(TypeError, "rows", "an int, a slice, a mask [N] or indices [M]", rows)
    return rows
