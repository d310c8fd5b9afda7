"""soft_cross_entropy in C: soft_cross_entropy.c. The arguments and results are those of `fastmix._torch.soft_cross_entropy`.

C takes logits [N, C] whose classes lie side by side, and [N, C, d1, ...] whose pixels do, or whose images are stored pixel by pixel. Others go
to torch: a forward and its backward the same way, unless a hook has changed how the logits are stored.
"""

import torch

from .. import _torch
from .._dtypes import accumulator
from .._torch._losses import component_weights, is_one
from ._losses import (
    REDUCTIONS,
    each_row,
    gradient_for,
    in_order_of,
    loss_memory,
    of_each_row,
    plain,
    seen,
    seen_by_c,
    side_by_side,
)
from .library import DTYPES, address, check_memory, get, new

PIXELS = "for the pixels of soft_cross_entropy"


def _extents(z):
    """Returns (rows, classes, pixels that lie side by side in each class) of logits as C reads them."""
    N, C, *inner = z.shape
    pixels = inner[0] if inner else 1
    return N * pixels, C, pixels


def _hot(z, weights, classes, class_weight, options, dtype):
    """Returns the first arguments of both C functions, and the tensors that these point to."""
    if weights is not None and weights.dim() < classes.dim():
        weights = component_weights(classes, weights, dtype)
    weights = None if weights is None else in_order_of(z, plain(weights, dtype))
    K, classes = classes.shape[1], in_order_of(z, classes)
    rows, C, pixels = _extents(z)
    arguments = (
        DTYPES[z.dtype], torch.get_num_threads(), rows, C, K, pixels, z.data_ptr(), z.stride(0),
        address(weights), classes.data_ptr(), address(class_weight), options.ignore_index, options.label_smoothing,
        REDUCTIONS[options.reduction],
    )  # fmt: skip
    return arguments, (weights, classes)


def _of_rows(losses, logits):
    """Returns a number for each row as [N, d1, ...]."""
    return losses if logits.dim() == 2 else losses.view(logits.shape[0], *logits.shape[2:])


def soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    """Returns (loss, denominator or None, stats, each component's loss or None, gradient to the logits or None)."""
    z = seen_by_c(logits, form_gradient)
    if z is None:
        return _torch.soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient)
    dtype = accumulator(logits.dtype)
    dlogits = new(torch.empty_like(logits)) if form_gradient else None
    arguments, kept = _hot(z, weights, classes, class_weight, options, dtype)
    rows, reduction, count = arguments[2], options.reduction, 3 if options.label_smoothing > 0 else 2
    memory, loss, losses, divisor = loss_memory(logits, rows, count, reduction)
    denominator = logits.new_empty((), dtype=dtype) if reduction == "mean" and (need_dweights or not form_gradient) else None
    per_component = logits.new_empty(kept[1].shape, dtype=dtype) if need_dweights else None
    failed = get().fm_soft_ce_forward(
        *arguments, losses, loss.data_ptr(), address(denominator) or divisor, memory.data_ptr(), address(per_component),
        address(dlogits), seen(dlogits).stride(0) if form_gradient else 0,
    )  # fmt: skip
    check_memory(failed, PIXELS)
    if logits.dim() > 2:
        loss = _of_rows(loss, logits) if reduction == "none" else loss
        if need_dweights and z.dim() == 2:
            per_component = per_component.view(logits.shape[0], *logits.shape[2:], -1).movedim(-1, 1)
    stats = memory if form_gradient else of_each_row(memory, rows, count)
    return loss, denominator, stats, per_component, dlogits


def soft_ce_bwd(logits, weights, classes, class_weight, options, denominator, stats, grad_output, cached_grad):
    """Returns the gradient to the logits."""
    if cached_grad is not None and is_one(grad_output):
        return cached_grad
    z = seen_by_c(logits, True)
    if z is None:
        stats = of_each_row(stats, logits.numel() // logits.shape[1], 3 if options.label_smoothing > 0 else 2)
        return _torch.soft_ce_bwd(logits, weights, classes, class_weight, options, denominator, stats, grad_output, cached_grad)

    def form(grad_output):
        grad_output = None if grad_output is None else grad_output.reshape(-1)
        dlogits = new(torch.empty_like(logits))
        arguments, kept = _hot(z, weights, classes, class_weight, options, stats.dtype)
        failed = get().fm_soft_ce_backward(
            *arguments, stats.data_ptr(), *each_row(grad_output), dlogits.data_ptr(), seen(dlogits).stride(0),
        )  # fmt: skip
        del kept
        check_memory(failed, PIXELS)
        return dlogits

    return gradient_for(form, logits, grad_output, cached_grad)


def _dense(z, target, lam, index, class_weight, options, dtype):
    """Returns the first arguments of the C function, those between them and the upstream gradient, and the tensors behind them."""
    lam = None if lam is None else lam.resolve_neg().to(dtype)
    index = None if index is None else index.contiguous()
    rows, C, pixels = _extents(z)
    if target.dim() == 2:
        target = side_by_side(target)
    else:
        images, target = len(target), in_order_of(z, target.resolve_neg())
        if z.dim() == 2 and index is not None:  # the partner of a pixel is that of its image
            each = rows // images
            index = (index.view(-1, 1) * each + torch.arange(each, device="cpu")).view(-1)
            lam = lam.repeat_interleave(each) if lam.dim() else lam
    arguments = (
        DTYPES[z.dtype], torch.get_num_threads(), rows, C, pixels, z.data_ptr(), z.stride(0), DTYPES[target.dtype],
        target.data_ptr(), target.stride(0), *each_row(lam), address(index), address(class_weight), options.ignore_index, options.label_smoothing,
        REDUCTIONS[options.reduction],
    )  # fmt: skip
    return arguments, (target, lam, index)


def dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient):
    """Returns (loss, stats, gradient to the logits or None)."""
    z = seen_by_c(logits, form_gradient)
    if z is None:
        return _torch.dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient)
    dtype = accumulator(logits.dtype)
    arguments, kept = _dense(z, target, lam, index, class_weight, options, dtype)
    dlogits, rows = new(torch.empty_like(logits)) if form_gradient else None, arguments[2]
    memory, loss, losses, _ = loss_memory(logits, rows, 3, options.reduction)
    failed = get().fm_dense_ce(
        *arguments, losses, loss.data_ptr(), memory.data_ptr(), None, 0, address(dlogits),
        seen(dlogits).stride(0) if form_gradient else 0, None,
    )  # fmt: skip
    del kept
    check_memory(failed, PIXELS)
    stats = memory if form_gradient else of_each_row(memory, rows, 3)
    return _of_rows(loss, logits) if options.reduction == "none" else loss, stats, dlogits


def dense_ce_bwd(logits, target, lam, index, class_weight, options, stats, grad_output, cached_grad, need):
    """Returns the gradients to the logits and to the target; None for one that is not needed. `need`: a bool for each."""
    z = seen_by_c(logits, True)
    if z is None:
        stats = of_each_row(stats, logits.numel() // logits.shape[1], 3)
        return _torch.dense_ce_bwd(logits, target, lam, index, class_weight, options, stats, grad_output, cached_grad, need)

    def run(grad_output, dlogits, dtarget):
        arguments, kept = _dense(z, target, lam, index, class_weight, options, stats.dtype)
        failed = get().fm_dense_ce(
            *arguments, None, None, stats.data_ptr(), *each_row(grad_output), address(dlogits),
            seen(dlogits).stride(0) if dlogits is not None else 0, address(dtarget),
        )  # fmt: skip
        del kept
        check_memory(failed, PIXELS)

    def form(grad_output):
        grad_output = None if grad_output is None else grad_output.reshape(-1)
        dlogits = new(torch.empty_like(logits))
        run(grad_output, dlogits, None)
        return dlogits

    def form_dtarget():
        by_pixel = target.dim() > 2 and z.dim() == 2
        shape = (target.shape[0], *target.shape[2:], target.shape[1]) if by_pixel else target.shape
        dtarget = torch.empty(shape, dtype=stats.dtype, device="cpu")
        run(grad_output.resolve_neg().to(stats.dtype), None, dtarget)
        return (dtarget.movedim(-1, 1) if by_pixel else dtarget).to(target.dtype)

    need_dlogits, need_dtarget = need
    dlogits = gradient_for(form, logits, grad_output, cached_grad) if need_dlogits else None
    return dlogits, form_dtarget() if need_dtarget else None
