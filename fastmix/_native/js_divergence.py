"""js_divergence in C: js_divergence.c. The arguments and results are those of `fastmix._torch.js_divergence`. Sets whose classes do not lie
side by side are copied."""

import ctypes

import torch

from .. import _torch
from .._dtypes import accumulator
from .._torch._losses import gradient_for
from ._losses import REDUCTIONS, side_by_side
from .library import DTYPES, address, array_address, check_memory, each_row, get, new


def _takes(sources):
    first = sources[0]
    return first.is_cpu and first.numel() > 0


def _gradients(sources, need):
    """Returns memory for the gradients: stacked if `need` is a bool, else a tuple with None for sets that need none."""
    if isinstance(need, bool):
        return new(torch.empty(sources.shape, dtype=sources.dtype, device="cpu"))
    return tuple(
        new(torch.empty(t.shape, dtype=t.dtype, device="cpu")) if needed else None
        for t, needed in zip(sources, need, strict=True)
    )


def _run(sources, scale, reduction, losses, loss, stats, upstream, gradients):
    each = [side_by_side(t) for t in sources]
    (rows, width), count = each[0].shape, len(each)
    places = (ctypes.c_void_p * count)(*[t.data_ptr() for t in each])
    strides = (ctypes.c_int64 * count)(*[t.stride(0) for t in each])
    slopes = None if gradients is None else (ctypes.c_void_p * count)(*map(address, gradients))
    failed = get().fm_js_divergence(
        DTYPES[each[0].dtype], torch.get_num_threads(), rows, width, count, array_address(places), array_address(strides), scale,
        REDUCTIONS[reduction], address(losses), address(loss), address(stats), *each_row(upstream), array_address(slopes),
    )  # fmt: skip
    check_memory(failed, "for the rows of js_divergence")


def js_divergence_fwd(sources, scale, reduction, need, form_gradient):
    """Returns (loss, stats or None, gradients to the sets that need one or None)."""
    if not _takes(sources):
        return _torch.js_divergence_fwd(sources, scale, reduction, need, form_gradient)
    first = sources[0]
    dtype = accumulator(first.dtype)
    losses = torch.empty(len(first), dtype=dtype, device="cpu")
    loss = None if reduction == "none" else torch.empty((), dtype=dtype, device="cpu")
    keep_stats = need if isinstance(need, bool) else any(need)
    stats = torch.empty((3, len(sources), len(first)), dtype=dtype, device="cpu") if keep_stats else None
    gradients = _gradients(sources, need) if form_gradient else None
    _run(sources, scale, reduction, losses, loss, stats, None, gradients)
    return losses if loss is None else loss, stats, gradients


def js_divergence_bwd(sources, scale, reduction, stats, grad_output, cached_grad, need):
    """Returns the gradients to the sets that need one, stacked if `need` is a bool."""
    if not _takes(sources):
        return _torch.js_divergence_bwd(sources, scale, reduction, stats, grad_output, cached_grad, need)
    gradients = _gradients(sources, need) if cached_grad is None else cached_grad

    def form(grad_output):
        _run(sources, scale, reduction, None, None, stats, grad_output, gradients)
        return tuple(gradients)

    gradient_for(form, sources[0], grad_output, None if cached_grad is None else tuple(cached_grad))
    return gradients
