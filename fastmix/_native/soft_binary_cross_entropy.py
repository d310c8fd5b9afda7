"""soft_binary_cross_entropy in C: soft_binary_cross_entropy.c. The arguments and results are those of
`fastmix._torch.soft_binary_cross_entropy`. Logits that C does not take go to torch, as of soft_cross_entropy."""

import math

import torch

from .. import _torch
from .._dtypes import accumulator
from .._torch._losses import is_one
from ._losses import REDUCTIONS, each_row, gradient_for, loss_memory, plain, side_by_side, takes
from .library import DTYPES, address, get, new


def _options(class_weight, pos_weight, options):
    """Returns the arguments of both C functions that say how a target counts."""
    threshold = math.nan if options.threshold is None else options.threshold
    reductions = REDUCTIONS[options.class_reduction], REDUCTIONS[options.reduction]
    return address(class_weight), address(pos_weight), options.label_smoothing, threshold, *reductions


def _loss_memory(logits, options):
    """Returns the loss; the addresses where C writes each row's loss and, under a reduction, the loss; and the tensor that holds the
    rows' losses."""
    memory, loss, losses, _ = loss_memory(logits, logits.shape[0], 0, options.reduction)
    return loss, (losses, None if options.reduction == "none" else loss.data_ptr()), memory


def _run_hot(logits, weights, classes, class_weight, pos_weight, options, loss, slopes, upstream, dlogits):
    rows, width = logits.shape
    weights = plain(weights, accumulator(logits.dtype))
    classes = classes if classes.is_contiguous() else classes.contiguous()
    get().fm_soft_bce(
        DTYPES[logits.dtype], torch.get_num_threads(), rows, width, classes.shape[1], logits.data_ptr(), logits.stride(0),
        address(weights), classes.data_ptr(), *_options(class_weight, pos_weight, options), *loss, address(slopes), *upstream,
        address(dlogits), width,
    )  # fmt: skip


def soft_bce_fwd(logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient):
    """Returns (loss, its derivative by each component's weight or None, gradient to the logits or None)."""
    if not takes(logits, form_gradient):
        return _torch.soft_bce_fwd(logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient)
    loss, places, kept = _loss_memory(logits, options)
    slopes = loss.new_empty(classes.shape) if need_dweights else None
    dlogits = new(torch.empty_like(logits)) if form_gradient else None
    _run_hot(logits, weights, classes, class_weight, pos_weight, options, places, slopes, (None, 0), dlogits)
    del kept
    return loss, slopes, dlogits


def soft_bce_bwd(logits, weights, classes, class_weight, pos_weight, options, grad_output, cached_grad):
    """Returns the gradient to the logits."""
    if cached_grad is not None and is_one(grad_output):
        return cached_grad
    if not takes(logits, True):
        return _torch.soft_bce_bwd(logits, weights, classes, class_weight, pos_weight, options, grad_output, cached_grad)

    def form(grad_output):
        dlogits = new(torch.empty_like(logits))
        target = weights, classes, class_weight, pos_weight
        _run_hot(logits, *target, options, (None, None), None, each_row(grad_output), dlogits)
        return dlogits

    return gradient_for(form, logits, grad_output, cached_grad)


def _run_dense(logits, target, lam, index, class_weight, pos_weight, options, loss, upstream, gradients):
    dlogits, dtarget = gradients
    dtype = accumulator(logits.dtype)
    target = side_by_side(target)
    lam = None if lam is None else lam.resolve_neg().to(dtype)
    index = None if index is None else index.contiguous()
    rows, width = logits.shape
    get().fm_dense_bce(
        DTYPES[logits.dtype], torch.get_num_threads(), rows, width, logits.data_ptr(), logits.stride(0), DTYPES[target.dtype],
        target.data_ptr(), target.stride(0), *each_row(lam), address(index), *_options(class_weight, pos_weight, options),
        *loss, *upstream, address(dlogits), width, address(dtarget),
    )  # fmt: skip


def dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, form_gradient):
    """Returns (loss, gradient to the logits or None)."""
    if not takes(logits, form_gradient):
        return _torch.dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, form_gradient)
    loss, places, kept = _loss_memory(logits, options)
    dlogits = new(torch.empty_like(logits)) if form_gradient else None
    inputs = logits, target, lam, index, class_weight, pos_weight
    _run_dense(*inputs, options, places, (None, 0), (dlogits, None))
    del kept
    return loss, dlogits


def dense_bce_bwd(logits, target, lam, index, class_weight, pos_weight, options, grad_output, cached_grad, need):
    """Returns the gradients to the logits and to the target; None for one that is not needed. `need`: a bool for each."""
    if not takes(logits, True):
        rest = options, grad_output, cached_grad, need
        return _torch.dense_bce_bwd(logits, target, lam, index, class_weight, pos_weight, *rest)

    def run(grad_output, *gradients):
        inputs = logits, target, lam, index, class_weight, pos_weight
        _run_dense(*inputs, options, (None, None), each_row(grad_output), gradients)

    def form(grad_output):
        dlogits = new(torch.empty_like(logits))
        run(grad_output, dlogits, None)
        return dlogits

    def form_dtarget():
        dtype = accumulator(logits.dtype)
        dtarget = torch.empty(target.shape, dtype=dtype, device="cpu")
        run(grad_output.resolve_neg().to(dtype), None, dtarget)
        return dtarget.to(target.dtype)

    need_dlogits, need_dtarget = need
    dlogits = gradient_for(form, logits, grad_output, cached_grad) if need_dlogits else None
    return dlogits, form_dtarget() if need_dtarget else None
