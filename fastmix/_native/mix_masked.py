"""mix_masked in C: mix_masked.c. The arguments are those of `fastmix._torch.mix_masked`."""

import ctypes

import torch

from .. import _torch
from ._rows import as_stored, gradient_memory, result_like
from .library import DTYPES, address, check_memory, get


def mix_masked_fwd(x, mask, index, plan, partner_plan):
    """Returns the mixed batch, in the layout of x."""
    if not x.numel() or not x.is_cpu:
        return _torch.mix_masked_fwd(x, mask, index, plan, partner_plan)
    out, made = result_like(x)
    x, mask = as_stored(x, made), mask.resolve_neg().contiguous()
    plan, partner_plan = (None if p is None else p.contiguous() for p in (plan, partner_plan))
    rows = len(x)
    get().fm_mix_masked_forward(
        DTYPES[x.dtype], torch.get_num_threads(), rows, x.numel() // rows, x.data_ptr(), x.stride(0), mask.data_ptr(),
        _cells(mask, made), index.data_ptr(), index.stride(0), address(plan),
        address(partner_plan), made.data_ptr(), made.stride(0),
    )  # fmt: skip
    return out if made is out else out.copy_(made)


def mix_masked_bwd(grad_output, x, mask, index, plan, partner_plan, strides, need_dx, need_dmask):
    """Returns the gradients to x, in the strides of the mixed batch, and to the mask; None for one that is not needed."""
    if not grad_output.numel() or not grad_output.is_cpu:
        return _torch.mix_masked_bwd(grad_output, x, mask, index, plan, partner_plan, strides, need_dx, need_dmask)
    dx, made, like = gradient_memory(grad_output, x, strides, need_dx)
    grad, mask = as_stored(grad_output, like), mask.resolve_neg().contiguous()
    x = as_stored(x, like) if need_dmask else None
    plan, partner_plan = (None if p is None else p.contiguous() for p in (plan, partner_plan))
    rows = len(grad)
    dmask = mask.new_empty(mask.shape) if need_dmask else None
    failed = get().fm_mix_masked_backward(
        DTYPES[grad.dtype], torch.get_num_threads(), rows, grad.numel() // rows, grad.data_ptr(), grad.stride(0),
        address(x), x.stride(0) if need_dmask else 0, mask.data_ptr(), _cells(mask, like),
        index.data_ptr(), index.stride(0), address(plan), address(partner_plan), address(made), made.stride(0) if need_dx else 0,
        address(dmask),
    )  # fmt: skip
    check_memory(failed, "for the gradients of mix_masked")
    return dx if made is dx else dx.copy_(made), dmask


def _cells(mask, like):
    """Returns how the mask's cells lie over a row of `like`: the fields of fm_cells in mix_masked.c."""
    (h, w), row = mask.shape[1:], like[0].numel()
    sides = [  # (step in memory, size, cells, stride in the mask)
        (like.stride(d) if like.shape[d] > 1 else row, like.shape[d], count, stride)
        for d, count, stride in ((like.dim() - 1, w, 1), (like.dim() - 2, h, w))
    ]
    (step, size, cells, stride), (outer_step, outer_size, outer_cells, outer_stride) = sorted(sides)
    line = step * size
    fields = line, line // cells, cells, outer_step, outer_size, outer_size // outer_cells, stride, outer_stride, h * w
    return (ctypes.c_int64 * len(fields))(*fields)
