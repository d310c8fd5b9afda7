"""What the losses in C share: which logits they take, and how they are handed arguments and a gradient."""

import functools
import math

import torch

from .._dtypes import accumulator
from .._torch._losses import gradient_for as gradient_on_torch
from .._torch._losses import is_one
from .library import DTYPES, address, each_row, get

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
NO_UPSTREAM = 0, 0  # gradient: 1
NOT_DENSE = 0, 0, 0, 0, 0, 0, 0  # the fields of a dense target and of its gradient, where the target is K-hot


def _seen(t):
    """Returns logits [N, C, ...] without memory as C reads them: (rows, classes, pixels that lie side by side in each class, elements
    from row to row, or image to image); None where it cannot. Images that are stored pixel by pixel are rows."""
    N, C, *inner = t.shape
    I = math.prod(inner)
    if inner:
        try:
            t = t.view(N, C, I)
        except RuntimeError:  # there is no such view
            return None
        if t.stride(1) == I and (I == 1 or t.stride(2) == 1):
            return N * I, C, I, t.stride(0)
    if t.stride(1) != 1:
        return None
    try:
        t = t.transpose(1, 2).view(N * I, C) if inner else t
    except RuntimeError:
        return None
    return N * I, C, 1, t.stride(0)


@functools.lru_cache(maxsize=1024)
def _layout(shape, strides, form_gradient):
    """Returns what `layout` does of logits that have elements on the CPU; 0 for the gradient if none is formed."""
    if 0 in shape:
        return None
    logits = torch.empty_strided(shape, strides, device="meta")
    found, made = _seen(logits), _seen(torch.empty_like(logits)) if form_gradient else (0, 0, 0, 0)
    if found is None or made is None or (form_gradient and made[2] != found[2]):
        return None
    return *found, made[3]


def layout(logits, form_gradient):
    """Returns how C reads logits: (rows, classes, pixels that lie side by side in each class, elements from row to row, or image to image,
    and the same of the gradient); None if it cannot, or cannot write their gradient where one is formed."""
    if not logits.is_cpu or logits.is_neg():
        return None
    return _layout(logits.shape, logits.stride(), form_gradient)


def in_order_of(pixels, t):
    """Returns t [N, J, ...] in the order of logits that C reads with so many pixels side by side: a number for each pixel follows its
    logits."""
    if t.dim() > 2 and pixels == 1:
        t = t.movedim(1, -1).reshape(-1, t.shape[1])  # of one image it can be a view
    return t if t.is_contiguous() else t.contiguous()


def loss_memory(logits, rows, stats, reduction):
    """Returns new memory for so many stats of each row, one behind the other, with the rows' losses behind them if they are reduced; the
    loss; and the address of the rows' losses. A tensor more would take as long as the arithmetic of a small batch."""
    loss = logits.new_empty(rows if reduction == "none" else (), dtype=accumulator(logits.dtype))
    if reduction == "none":
        return loss.new_empty(stats * rows), loss, loss.data_ptr()
    memory = loss.new_empty((stats + 1) * rows)
    return memory, loss, memory.data_ptr() + stats * rows * loss.element_size()


def of_each_row(memory, rows, stats):
    """Returns the stats in `memory` as [stats, rows]."""
    return memory[: stats * rows].view(stats, rows)


def gradient_for(form, logits, grad_output, cached_grad):
    """Returns the gradient to the logits as torch's `gradient_for` does. A number scales a cached gradient here, because torch's threads
    wait for each other on a busy machine."""
    wide = logits.dtype in (torch.float32, torch.float64)
    if cached_grad is None or not wide or grad_output.dim() or is_one(grad_output) or not cached_grad.is_contiguous():
        return gradient_on_torch(form, logits, grad_output, cached_grad)
    get().fm_scale(
        DTYPES[logits.dtype], torch.get_num_threads(), cached_grad.numel(), cached_grad.data_ptr(), float(grad_output)
    )
    return cached_grad


def plain(t, dtype):
    """Returns t as contiguous memory of a dtype; None stays None."""
    if t is None or (t.dtype == dtype and t.is_contiguous() and not t.is_neg()):
        return t
    return t.resolve_neg().to(dtype).contiguous()


def dense_target(values, lam, index, dtype):
    """Returns the fields of fm_dense_target in losses.h, and the tensors behind them."""
    if values.dim() == 2:
        values = side_by_side(values)
    lam = None if lam is None else lam.resolve_neg().to(dtype)
    index = None if index is None else index.contiguous()
    fields = values.data_ptr(), values.stride(0), DTYPES[values.dtype], *each_row(lam), address(index)
    return fields, (values, lam, index)


def side_by_side(t):
    """Returns t with the classes of each row side by side, copied where they are not."""
    return t if t.stride(1) == 1 and not t.is_neg() else t.resolve_neg().contiguous()
