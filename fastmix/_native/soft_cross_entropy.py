"""soft_cross_entropy in C: soft_cross_entropy.c. The arguments and results are those of `fastmix._torch.soft_cross_entropy`.

C takes logits [N, C] whose classes lie side by side. Others go to torch: a forward and its backward the same way.
"""

import torch

from .. import _torch
from .._dtypes import accumulator
from .._torch._losses import is_one
from ._losses import REDUCTIONS, each_row, gradient_for, plain, side_by_side, takes
from .library import DTYPES, address, get, new


def _hot(logits, weights, classes, class_weight, options, dtype):
    """Returns the first arguments of both C functions, and the tensors that these point to."""
    weights, classes = plain(weights, dtype), classes if classes.is_contiguous() else classes.contiguous()
    rows, width = logits.shape
    arguments = (
        DTYPES[logits.dtype], torch.get_num_threads(), rows, width, classes.shape[1], logits.data_ptr(), logits.stride(0),
        address(weights), classes.data_ptr(), address(class_weight), options.ignore_index, options.label_smoothing,
        REDUCTIONS[options.reduction],
    )  # fmt: skip
    return arguments, (weights, classes)


def soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    """Returns (loss, denominator or None, stats, each component's loss or None, gradient to the logits or None)."""
    if not takes(logits, form_gradient):
        return _torch.soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient)
    dtype = accumulator(logits.dtype)
    dlogits = new(torch.empty_like(logits)) if form_gradient else None
    arguments, kept = _hot(logits, weights, classes, class_weight, options, dtype)
    reduction, rows = options.reduction, logits.shape[0]
    losses = torch.empty(rows, dtype=dtype, device="cpu")
    loss = losses if reduction == "none" else torch.empty((), dtype=dtype, device="cpu")
    denominator = torch.empty((), dtype=dtype, device="cpu") if reduction == "mean" else None
    stats = torch.empty((3 if options.label_smoothing > 0 else 2, rows), dtype=dtype, device="cpu")
    per_component = torch.empty(kept[1].shape, dtype=dtype, device="cpu") if need_dweights else None
    get().fm_soft_ce_forward(
        *arguments, losses.data_ptr(), loss.data_ptr(), address(denominator), stats.data_ptr(), address(per_component),
        address(dlogits), dlogits.stride(0) if form_gradient else 0,
    )  # fmt: skip
    return loss, denominator, stats, per_component, dlogits


def soft_ce_bwd(logits, weights, classes, class_weight, options, denominator, stats, grad_output, cached_grad):
    """Returns the gradient to the logits."""
    if cached_grad is not None and is_one(grad_output):
        return cached_grad
    if not takes(logits, True):
        return _torch.soft_ce_bwd(logits, weights, classes, class_weight, options, denominator, stats, grad_output, cached_grad)
    # an operator's backward is told the reduction by the denominator alone
    options = options._replace(reduction="sum" if denominator is None else "mean")

    def form(grad_output):
        dlogits = new(torch.empty_like(logits))
        arguments, kept = _hot(logits, weights, classes, class_weight, options, stats.dtype)
        get().fm_soft_ce_backward(
            *arguments, stats.data_ptr(), *each_row(grad_output), dlogits.data_ptr(), dlogits.stride(0),
        )  # fmt: skip
        del kept
        return dlogits

    return gradient_for(form, logits, grad_output, cached_grad)


def _dense(logits, target, lam, index, class_weight, options, dtype):
    """Returns the first arguments of the C function, those between them and the upstream gradient, and the tensors behind them."""
    rows, width = logits.shape
    target = side_by_side(target)
    lam = None if lam is None else lam.resolve_neg().to(dtype)
    arguments = (
        DTYPES[logits.dtype], torch.get_num_threads(), rows, width, logits.data_ptr(), logits.stride(0), DTYPES[target.dtype],
        target.data_ptr(), target.stride(0), *each_row(lam), address(index), address(class_weight), options.ignore_index, options.label_smoothing,
        REDUCTIONS[options.reduction],
    )  # fmt: skip
    return arguments, (target, lam, index)


def dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient):
    """Returns (loss, stats, gradient to the logits or None)."""
    if not takes(logits, form_gradient):
        return _torch.dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient)
    dtype = accumulator(logits.dtype)
    index = None if index is None else index.contiguous()
    arguments, kept = _dense(logits, target, lam, index, class_weight, options, dtype)
    dlogits = new(torch.empty_like(logits)) if form_gradient else None
    losses = torch.empty(len(logits), dtype=dtype, device="cpu")
    loss = losses if options.reduction == "none" else torch.empty((), dtype=dtype, device="cpu")
    stats = torch.empty((3, len(logits)), dtype=dtype, device="cpu")
    get().fm_dense_ce(
        *arguments, losses.data_ptr(), loss.data_ptr(), stats.data_ptr(), None, 0, address(dlogits),
        dlogits.stride(0) if form_gradient else 0, None,
    )  # fmt: skip
    del kept
    return loss, stats, dlogits


def dense_ce_bwd(logits, target, lam, index, class_weight, options, stats, grad_output, cached_grad, need):
    """Returns the gradients to the logits and to the target; None for one that is not needed. `need`: a bool for each."""
    if not takes(logits, True):
        return _torch.dense_ce_bwd(logits, target, lam, index, class_weight, options, stats, grad_output, cached_grad, need)
    index = None if index is None else index.contiguous()

    def run(grad_output, dlogits, dtarget):
        arguments, kept = _dense(logits, target, lam, index, class_weight, options, stats.dtype)
        get().fm_dense_ce(
            *arguments, None, None, stats.data_ptr(), *each_row(grad_output), address(dlogits),
            dlogits.stride(0) if dlogits is not None else 0, address(dtarget),
        )  # fmt: skip
        del kept

    def form(grad_output):
        dlogits = new(torch.empty_like(logits))
        run(grad_output, dlogits, None)
        return dlogits

    def form_dtarget():
        dtarget = torch.empty(target.shape, dtype=stats.dtype, device="cpu")
        run(grad_output.resolve_neg().to(stats.dtype), None, dtarget)
        return dtarget.to(target.dtype)

    need_dlogits, need_dtarget = need
    dlogits = gradient_for(form, logits, grad_output, cached_grad) if need_dlogits else None
    return dlogits, form_dtarget() if need_dtarget else None
