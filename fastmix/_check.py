"""Argument errors: every message names the argument, what was expected and what came. Nothing here waits for a device:
values are looked at only where they are on the CPU, and never while torch traces or transforms the call."""

import numbers

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def wrong(kind, argument, expected, value):
    """The exception, to be raised by the caller."""
    return kind(f"{argument}: expected {expected}, got {describe(value)}")


def float_tensor(argument, t, least_dims, shape):
    if not isinstance(t, torch.Tensor) or t.dtype not in FLOATS:
        raise wrong(TypeError, argument, "a float16, bfloat16, float32 or float64 tensor", t)
    if t.layout != torch.strided:
        raise wrong(TypeError, argument, "a dense (strided) tensor", t)
    if t.dim() < least_dims:
        raise wrong(ValueError, argument, f"shape {shape}", t)


def integer_tensor(argument, t, shape, like):
    """An int64 tensor of the given shape on the device of another tensor."""
    if not isinstance(t, torch.Tensor) or t.dtype != torch.int64:
        raise wrong(TypeError, argument, "an int64 tensor", t)
    if tuple(t.shape) != tuple(shape):
        raise wrong(ValueError, argument, f"shape {list(shape)}", t)
    same_device(argument, t, like)


def same_device(argument, t, like):
    if t.device != like.device:
        raise wrong(ValueError, argument, f"a tensor on {like.device}", t)


def readable(t) -> bool:
    """Whether values may be looked at without waiting for a device or breaking a trace."""
    return t.is_cpu and not transformed()


def transformed() -> bool:
    """Whether the call is traced (torch.compile) or transformed (torch.func, forward-mode AD)."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def batched(g) -> bool:
    """Whether a backward runs under a transform, or on many upstream gradients at once (is_grads_batched)."""
    return transformed() or torch._C._functorch.is_legacy_batchedtensor(g)


def in_range(argument, index, stop, what, ignore_index=None):
    """On the CPU: every entry lies in [0, stop), but for ignore_index. On another device kernels turn wrong rows to NaN."""
    if not readable(index) or not index.numel():
        return
    low, high = index.aminmax()
    if low >= 0 and high < stop:
        return
    bad = (index < 0) | (index >= stop)
    if ignore_index is not None:
        bad &= index != ignore_index
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{argument}: expected {what} in [0, {stop}), got {int(index[tuple(at)])} in row {at[0]} (at {at})")


def share(argument, lam, rows):
    """A number, or a float32 or float64 tensor [] or [rows]."""
    if not isinstance(lam, torch.Tensor):
        if isinstance(lam, bool) or not isinstance(lam, numbers.Real):
            raise wrong(TypeError, argument, "a float, or a float32 or float64 tensor", lam)
    elif lam.dtype not in (torch.float32, torch.float64):
        raise wrong(TypeError, argument, "a float, or a float32 or float64 tensor (lower precision would round it)", lam)
    elif lam.dim() and tuple(lam.shape) != (rows,):
        raise wrong(ValueError, argument, f"a float, a 0-d tensor or shape [{rows}]", lam)


def coefficient(argument, lam, x) -> torch.Tensor:
    """lam as a tensor [] or [N] of the dtype that x's arithmetic is done in, on x's device."""
    share(argument, lam, x.shape[0])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(lam, torch.Tensor):
        return torch.full((), float(lam), dtype=dtype, device=x.device)
    if lam.device != x.device:
        if lam.dim() or not lam.is_cpu:
            same_device(argument, lam, x)
        return lam.to(x.device, dtype, non_blocking=True)
    return lam if lam.dtype == dtype else lam.to(dtype)


def box(argument, value, x):
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise wrong(TypeError, argument, "an int32 or int64 tensor", value)
    dims = value.shape[1] // 2 if value.dim() == 2 else 0
    if value.dim() != 2 or value.shape[0] != x.shape[0] or value.shape[1] not in (2, 4, 6) or x.dim() <= dims:
        sizes = ", ".join(f"[{x.shape[0]}, {2 * d}]" for d in range(1, min(x.dim() - 1, 3) + 1))
        raise wrong(ValueError, argument, f"shape {sizes or 'nothing: rows without dimensions have no box'}", value)
    same_device(argument, value, x)


def output(out, x, *others):
    """A tensor like x, in memory of its own."""
    if not isinstance(out, torch.Tensor) or out.dtype != x.dtype:
        raise wrong(TypeError, "out", f"a {str(x.dtype).removeprefix('torch.')} tensor, as x", out)
    if out.shape != x.shape:
        raise wrong(ValueError, "out", f"shape {list(x.shape)}, as x", out)
    same_device("out", out, x)
    if transformed() or not out.numel():
        return
    reach = 0  # of the dimensions so far, smallest stride first: the next one has to step beyond it
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError("out: expected a tensor whose elements do not share memory, got one that overlaps itself")
            reach += (size - 1) * stride
    for name, t in zip(("x", "lam", "index", "box"), (x, *others), strict=True):
        if t is not None and t.numel() and _span(out)[0] < _span(t)[1] and _span(t)[0] < _span(out)[1]:
            raise ValueError(f"out: expected memory of its own, got a tensor that overlaps {name}, which is read throughout")


def _span(t):
    """First and one-past-last address of a tensor's elements."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def class_weight(argument, weight, logits) -> torch.Tensor | None:
    """Class weights as a contiguous tensor [C] of the dtype the loss is computed in."""
    if weight is None:
        return None
    float_tensor(argument, weight, 1, f"[{logits.shape[1]}]")
    if tuple(weight.shape) != (logits.shape[1],):
        raise wrong(ValueError, argument, f"shape [{logits.shape[1]}], one weight a class", weight)
    same_device(argument, weight, logits)
    if weight.requires_grad:
        raise ValueError(f"{argument}: expected a constant, got a tensor that requires grad: class weights have no gradient")
    return weight.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).contiguous()


def loss_options(ignore_index, label_smoothing, reduction):
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise wrong(TypeError, "ignore_index", "an int", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise wrong(ValueError, "ignore_index", "an int of 64 bits", ignore_index)
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, numbers.Real):
        raise wrong(TypeError, "label_smoothing", "a float in [0, 1]", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise wrong(ValueError, "label_smoothing", "a float in [0, 1]", label_smoothing)
    if reduction not in ("mean", "sum", "none"):
        raise wrong(ValueError, "reduction", "'mean', 'sum' or 'none'", reduction)
