"""soft_binary_cross_entropy in C: soft_binary_cross_entropy.c. The arguments and results are those of
`fastmix._torch.soft_binary_cross_entropy`. Logits that C does not take go to torch, as of soft_cross_entropy."""

import math

import torch

from .. import _torch
from .._dtypes import accumulator
from .._torch._losses import is_one
from ._losses import NO_UPSTREAM, NOT_DENSE, REDUCTIONS, dense_target, gradient_for, layout, loss_memory, plain
from .library import DTYPES, address, each_row, get, new


def _takes(logits, form_gradient):
    """Whether C takes these logits: rows, without pixels."""
    return logits.dim() == 2 and layout(logits, form_gradient) is not None


NO_LOSS = 0, 0  # of the rows, and reduced


def _call(logits, components, class_weight, pos_weight, options, loss, slopes, upstream, dlogits, target):
    """Calls C. `loss`: the addresses of the rows' losses and the reduced one; `target`: the last fields."""
    (rows, width), (smoothing, threshold, class_reduction, reduction) = logits.shape, options
    get().fm_binary_cross_entropy(
        DTYPES[logits.dtype], torch.get_num_threads(), rows, width, components, logits.data_ptr(), logits.stride(0),
        address(class_weight), address(pos_weight), smoothing, math.nan if threshold is None else threshold,
        REDUCTIONS[class_reduction], REDUCTIONS[reduction], *loss, address(slopes), *upstream, address(dlogits), width, *target,
    )  # fmt: skip


def _call_hot(logits, weights, classes, class_weight, pos_weight, options, loss, slopes, upstream, dlogits):
    weights = plain(weights, accumulator(logits.dtype))
    classes = classes if classes.is_contiguous() else classes.contiguous()
    target = classes.data_ptr(), address(weights), *NOT_DENSE
    _call(logits, classes.shape[1], class_weight, pos_weight, options, loss, slopes, upstream, dlogits, target)


def _loss_memory(logits, options):
    """Returns the loss; the addresses where C writes each row's loss and, under a reduction, the loss; and the tensor that holds the
    rows' losses."""
    memory, loss, losses = loss_memory(logits, logits.shape[0], 0, options.reduction)
    return loss, (losses, 0 if options.reduction == "none" else loss.data_ptr()), memory


def soft_bce_fwd(logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient):
    """Returns (loss, its derivative by each component's weight or None, gradient to the logits or None)."""
    if not _takes(logits, form_gradient):
        return _torch.soft_bce_fwd(logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient)
    loss, places, kept = _loss_memory(logits, options)
    slopes = loss.new_empty(classes.shape) if need_dweights else None
    dlogits = new(torch.empty_like(logits)) if form_gradient else None
    _call_hot(logits, weights, classes, class_weight, pos_weight, options, places, slopes, NO_UPSTREAM, dlogits)
    del kept
    return loss, slopes, dlogits


def soft_bce_bwd(logits, weights, classes, class_weight, pos_weight, options, grad_output, cached_grad):
    """Returns the gradient to the logits."""
    if cached_grad is not None and is_one(grad_output):
        return cached_grad
    if not _takes(logits, True):
        return _torch.soft_bce_bwd(logits, weights, classes, class_weight, pos_weight, options, grad_output, cached_grad)

    def form(grad_output):
        dlogits = new(torch.empty_like(logits))
        target = weights, classes, class_weight, pos_weight
        _call_hot(logits, *target, options, NO_LOSS, None, each_row(grad_output), dlogits)
        return dlogits

    return gradient_for(form, logits, grad_output, cached_grad)


def _call_dense(logits, target, lam, index, class_weight, pos_weight, options, loss, upstream, dlogits, dtarget):
    fields, kept = dense_target(target, lam, index, accumulator(logits.dtype))
    target = 0, 0, *fields, address(dtarget)
    _call(logits, 0, class_weight, pos_weight, options, loss, None, upstream, dlogits, target)
    del kept


def dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, form_gradient):
    """Returns (loss, gradient to the logits or None)."""
    if not _takes(logits, form_gradient):
        return _torch.dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, form_gradient)
    loss, places, kept = _loss_memory(logits, options)
    dlogits = new(torch.empty_like(logits)) if form_gradient else None
    inputs = logits, target, lam, index, class_weight, pos_weight
    _call_dense(*inputs, options, places, NO_UPSTREAM, dlogits, None)
    del kept
    return loss, dlogits


def dense_bce_bwd(logits, target, lam, index, class_weight, pos_weight, options, grad_output, cached_grad, need):
    """Returns the gradients to the logits and to the target; None for one that is not needed. `need`: a bool for each."""
    if not _takes(logits, True):
        rest = options, grad_output, cached_grad, need
        return _torch.dense_bce_bwd(logits, target, lam, index, class_weight, pos_weight, *rest)

    def run(grad_output, *gradients):
        inputs = logits, target, lam, index, class_weight, pos_weight
        _call_dense(*inputs, options, NO_LOSS, each_row(grad_output), *gradients)

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
