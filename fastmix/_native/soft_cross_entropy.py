"""soft_cross_entropy in C: soft_cross_entropy.c. The arguments and results are those of `fastmix._torch.soft_cross_entropy`.

C takes logits [N, C] whose classes lie side by side, and [N, C, d1, ...] whose pixels do, or whose images are stored pixel by pixel. Others go
to torch: a forward and its backward the same way, unless a hook has changed how the logits are stored.
"""

import torch

from .. import _torch
from .._dtypes import accumulator
from .._torch._losses import component_weights, is_one
from ._losses import (
    NO_UPSTREAM,
    NOT_DENSE,
    REDUCTIONS,
    dense_target,
    gradient_for,
    in_order_of,
    layout,
    loss_memory,
    of_each_row,
    plain,
)
from .library import DTYPES, address, check_memory, each_row, get, new


def _call(logits, seen, components, class_weight, options, results, upstream, dlogits, target):
    """Calls C. `results`: addresses of losses, loss, denominator, stats and each component's loss; `target`: the last fields."""
    rows, C, pixels, stride, gradient_stride = seen
    ignore_index, smoothing, reduction = options
    failed = get().fm_cross_entropy(
        DTYPES[logits.dtype], torch.get_num_threads(), rows, C, components, pixels, logits.data_ptr(), stride,
        0 if class_weight is None else class_weight.data_ptr(), ignore_index, smoothing, REDUCTIONS[reduction], *results, *upstream,
        0 if dlogits is None else dlogits.data_ptr(), gradient_stride, *target,
    )  # fmt: skip
    check_memory(failed, "for the pixels of soft_cross_entropy")


def _hot(pixels, weights, classes, dtype):
    """Returns classes and weights (or None) as C reads them."""
    if weights is not None:
        if weights.dim() < classes.dim():
            weights = component_weights(classes, weights, dtype)
        weights = in_order_of(pixels, plain(weights, dtype))
    return in_order_of(pixels, classes), weights


def _of_rows(losses, logits):
    """Returns a number for each row as [N, d1, ...]."""
    return losses if logits.dim() == 2 else losses.view(logits.shape[0], *logits.shape[2:])


def soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    """Returns (loss, denominator or None, stats, each component's loss or None, gradient to the logits or None)."""
    seen = layout(logits, form_gradient)
    if seen is None:
        return _torch.soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient)
    rows, _, pixels, *_ = seen
    reduction, count = options.reduction, 3 if options.label_smoothing > 0 else 2
    memory, loss, losses = loss_memory(logits, rows, count, reduction)
    classes, weights = _hot(pixels, weights, classes, loss.dtype)
    denominator = per_component = None
    if reduction == "mean" and (need_dweights or not form_gradient):
        denominator = loss.new_empty(())
    if need_dweights:
        per_component = loss.new_empty(classes.shape)
    dlogits = new(torch.empty_like(logits)) if form_gradient else None
    results = losses, loss.data_ptr(), address(denominator), memory.data_ptr(), address(per_component)
    target = classes.data_ptr(), address(weights), *NOT_DENSE
    _call(logits, seen, classes.shape[1], class_weight, options, results, NO_UPSTREAM, dlogits, target)
    if logits.dim() > 2:
        loss = _of_rows(loss, logits) if reduction == "none" else loss
        if need_dweights and classes.dim() == 2:
            per_component = per_component.view(logits.shape[0], *logits.shape[2:], -1).movedim(-1, 1)
    stats = memory if form_gradient else of_each_row(memory, rows, count)
    return loss, denominator, stats, per_component, dlogits


def soft_ce_bwd(logits, weights, classes, class_weight, options, denominator, stats, grad_output, cached_grad):
    """Returns the gradient to the logits."""
    if cached_grad is not None and is_one(grad_output):
        return cached_grad
    seen = layout(logits, True)
    if seen is None:
        stats = of_each_row(stats, logits.numel() // logits.shape[1], 3 if options.label_smoothing > 0 else 2)
        return _torch.soft_ce_bwd(logits, weights, classes, class_weight, options, denominator, stats, grad_output, cached_grad)

    def form(grad_output):
        grad_output = None if grad_output is None else grad_output.reshape(-1)
        dlogits = new(torch.empty_like(logits))
        named, a = _hot(seen[2], weights, classes, stats.dtype)
        target = named.data_ptr(), address(a), *NOT_DENSE
        results = 0, 0, 0, stats.data_ptr(), 0
        _call(logits, seen, named.shape[1], class_weight, options, results, each_row(grad_output), dlogits, target)
        return dlogits

    return gradient_for(form, logits, grad_output, cached_grad)


def _dense(seen, target, lam, index, dtype):
    """Returns the fields of a dense target, and the tensors behind them."""
    rows, _, pixels, *_ = seen
    if target.dim() > 2:
        images, target = len(target), in_order_of(pixels, target.resolve_neg())
        if pixels == 1 and index is not None:  # the partner of a pixel is that of its image
            each = rows // images
            index = (index.view(-1, 1) * each + torch.arange(each, device="cpu")).view(-1)
            lam = lam.repeat_interleave(each) if lam.dim() else lam
    return dense_target(target, lam, index, dtype)


def dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient):
    """Returns (loss, stats, gradient to the logits or None)."""
    seen = layout(logits, form_gradient)
    if seen is None:
        return _torch.dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient)
    fields, kept = _dense(seen, target, lam, index, accumulator(logits.dtype))
    dlogits, rows = new(torch.empty_like(logits)) if form_gradient else None, seen[0]
    memory, loss, losses = loss_memory(logits, rows, 3, options.reduction)
    results = losses, loss.data_ptr(), 0, memory.data_ptr(), 0
    _call(logits, seen, 0, class_weight, options, results, NO_UPSTREAM, dlogits, (0, 0, *fields, 0))
    del kept
    stats = memory if form_gradient else of_each_row(memory, rows, 3)
    return _of_rows(loss, logits) if options.reduction == "none" else loss, stats, dlogits


def dense_ce_bwd(logits, target, lam, index, class_weight, options, stats, grad_output, cached_grad, need):
    """Returns the gradients to the logits and to the target; None for one that is not needed. `need`: a bool for each."""
    seen = layout(logits, True)
    if seen is None:
        stats = of_each_row(stats, logits.numel() // logits.shape[1], 3)
        return _torch.dense_ce_bwd(logits, target, lam, index, class_weight, options, stats, grad_output, cached_grad, need)

    def run(grad_output, dlogits, dtarget):
        fields, kept = _dense(seen, target, lam, index, stats.dtype)
        results = 0, 0, 0, stats.data_ptr(), 0
        _call(
            logits, seen, 0, class_weight, options, results, each_row(grad_output), dlogits, (0, 0, *fields, address(dtarget))
        )
        del kept

    def form(grad_output):
        grad_output = None if grad_output is None else grad_output.reshape(-1)
        dlogits = new(torch.empty_like(logits))
        run(grad_output, dlogits, None)
        return dlogits

    def form_dtarget():
        by_pixel = target.dim() > 2 and seen[2] == 1
        shape = (target.shape[0], *target.shape[2:], target.shape[1]) if by_pixel else target.shape
        dtarget = torch.empty(shape, dtype=stats.dtype, device="cpu")
        run(grad_output.resolve_neg().to(stats.dtype), None, dtarget)
        return (dtarget.movedim(-1, 1) if by_pixel else dtarget).to(target.dtype)

    need_dlogits, need_dtarget = need
    dlogits = gradient_for(form, logits, grad_output, cached_grad) if need_dlogits else None
    return dlogits, form_dtarget() if need_dtarget else None
