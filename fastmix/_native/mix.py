"""mix in C: mix.c. The arguments are those of `fastmix._torch.mix`."""

import torch

from .. import _torch
from ._rows import as_stored, boxes_of, gradient_memory, result_like, writable
from .library import DTYPES, address, check_memory, each_row, get, new

NO_BOXES = 0, 0


def mix_fwd(x, lam, index, box, out):
    """Returns the mixed batch, in `out` if that is given."""
    if not x.numel() or not x.is_cpu:
        return _torch.mix_fwd(x, lam, index, box, out)
    if x.is_contiguous() and out is None:
        out = made = new(torch.empty_like(x))
    else:
        out, made = result_like(x) if out is None else (out, writable(out))
    x, lam = as_stored(x, made), lam.resolve_neg()
    rows = x.shape[0]
    boxes, kept = (NO_BOXES, None) if box is None else boxes_of(box, made)
    get().fm_mix_forward(
        DTYPES[x.dtype], torch.get_num_threads(), rows, x.numel() // rows, x.data_ptr(), x.stride(0), 0, 0,
        lam.data_ptr(), lam.stride(0) if lam.dim() else 0, index.data_ptr(), index.stride(0), *boxes, made.data_ptr(), made.stride(0), 0,
    )  # fmt: skip
    del kept
    return out if made is out else out.copy_(made)


def mix_bwd(grad_output, x, lam, index, box, strides, need_dx, need_dlam, inverse=None):
    """Returns the gradients to x, in the strides of the mixed batch, and to each row's lam; None for one that is not needed."""
    if not grad_output.numel() or not grad_output.is_cpu:
        return _torch.mix_bwd(grad_output, x, lam, index, box, strides, need_dx, need_dlam)
    dx, made, like = gradient_memory(grad_output, x, strides, need_dx)
    grad, lam = as_stored(grad_output, like), lam.resolve_neg()
    x = as_stored(x, like) if need_dlam else None
    rows = grad.shape[0]
    boxes, kept = (NO_BOXES, None) if box is None else boxes_of(box, like)
    dlam = lam.new_empty(rows) if need_dlam else None
    failed = get().fm_mix_backward(
        DTYPES[grad.dtype], torch.get_num_threads(), rows, grad.numel() // rows, *each_row(x), grad.data_ptr(), grad.stride(0),
        *each_row(lam), index.data_ptr(), index.stride(0), *boxes, *each_row(made), address(dlam),
    )  # fmt: skip
    del kept
    check_memory(failed, "for the gradients of a mix")
    return dx if made is dx else dx.copy_(made), dlam
