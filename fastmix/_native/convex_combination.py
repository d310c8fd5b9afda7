"""convex_combination in C: convex_combination.c. The arguments are those of `fastmix._torch.convex_combination`."""

import ctypes

import torch

from .. import _torch
from ._rows import as_stored, result_like, writable
from .library import DTYPES, address, check_memory, get, new


def convex_combination_fwd(sources, weights):
    """Returns the combined batch, in the layout of the first source."""
    first = sources[0]
    if not first.numel() or not first.is_cpu:
        return _torch.convex_combination_fwd(sources, weights)
    out, made = result_like(first)
    tensors = [as_stored(source, made) for source in sources]
    weights = weights.resolve_neg()
    rows = len(out)
    get().fm_combine_forward(
        DTYPES[out.dtype], torch.get_num_threads(), rows, out.numel() // rows, len(tensors), *_pointers(tensors),
        weights.data_ptr(), *weights.stride(), made.data_ptr(), made.stride(0),
    )  # fmt: skip
    return out if made is out else out.copy_(made)


def convex_combination_bwd(grad_output, sources, weights, strides, need_dsources, need_dweights):
    """Returns the gradients to the sources, stacked if need_dsources is a bool, and to the weights; None if not needed."""
    if not grad_output.numel() or not grad_output.is_cpu:
        return _torch.convex_combination_bwd(grad_output, sources, weights, strides, need_dsources, need_dweights)
    K, stacked, shape = weights.shape[1], isinstance(need_dsources, bool), grad_output.shape
    dtype, rows = grad_output.dtype, len(grad_output)
    needs = [need_dsources] * K if stacked else need_dsources
    if stacked and need_dsources:
        dsources = new(torch.empty_strided((K, *shape), (grad_output.numel(), *strides), dtype=dtype, device="cpu"))
        outs = dsources.unbind(0)
    else:
        outs = tuple(new(torch.empty_strided(shape, strides, dtype=dtype, device="cpu")) if need else None for need in needs)
        dsources = None if stacked else outs
    like = writable(torch.empty_strided(shape, strides, dtype=dtype, device="meta"))
    made = [None if out is None else writable(out) for out in outs]
    grad, weights = as_stored(grad_output, like), weights.resolve_neg()
    tensors = [as_stored(source, like) for source in sources] if need_dweights else None
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device="cpu") if need_dweights else None
    failed = get().fm_combine_backward(
        DTYPES[dtype], torch.get_num_threads(), rows, grad.numel() // rows, K, grad.data_ptr(), grad.stride(0),
        *(_pointers(tensors) if need_dweights else (None, None)), weights.data_ptr(), *weights.stride(),
        (ctypes.c_void_p * K)(*map(address, made)), like.stride(0),
        address(dweights),
    )  # fmt: skip
    check_memory(failed, "for the gradients of a convex combination")
    for out, written in zip(outs, made, strict=True):
        if written is not out:
            out.copy_(written)
    return dsources, dweights


def _pointers(tensors):
    """Returns the addresses of tensors, and the strides of their rows, as C reads them. The tensors have to be kept."""
    count = len(tensors)
    addresses = (ctypes.c_void_p * count)(*map(address, tensors))
    return addresses, (ctypes.c_int64 * count)(*[t.stride(0) for t in tensors])
