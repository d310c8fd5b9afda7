from typing import NamedTuple

import torch
from torch.autograd import Function

from .. import _backend
from .needed import needed
from .soft_ce import as_weights, check_upstream, forms_gradient, taken

TWICE = "torch.nn.functional.binary_cross_entropy_with_logits on target.dense(C)"


class Options(NamedTuple):
    """What a loss is computed with, but for tensors."""

    label_smoothing: float
    threshold: float | None
    class_reduction: str
    reduction: str


def soft_binary_cross_entropy(logits, weights, classes, class_weight, pos_weight, *options):
    """The op on checked arguments, without autograd; classes [N, K, ...]."""
    target = weights, classes, class_weight, pos_weight
    return _backend.of(logits).soft_bce_fwd(logits, *target, Options(*options), False, False)[0]


def dense_binary_cross_entropy(
    logits, target, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, lam=None, index=None
):
    """The same; target in the logits' shape, or the values of MixedRows with lam and index."""
    options = Options(label_smoothing, threshold, class_reduction, reduction)
    return _backend.of(logits).dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, False)[0]


class SoftBinaryCrossEntropyFunction(Function):
    """(logits [N, C, ...], weights [N, K, ...] or None, classes [N, K, ...], class weights [C] or None, weights [C] of the positive
    term or None, label_smoothing, threshold or None, class_reduction, reduction) -> loss. Gradients to logits, formed as in
    SoftCrossEntropyFunction, and to weights: 0 under a threshold."""

    @staticmethod
    def forward(ctx, logits, weights, classes, class_weight, pos_weight, *options):
        ctx.backend, ctx.options = _backend.of(logits), Options(*options)
        threshold = ctx.options.threshold
        need_dlogits, need_dweights = ctx.needs_input_grad[:2]
        target = weights, classes, class_weight, pos_weight
        loss, ctx.slope, ctx.gradient = ctx.backend.soft_bce_fwd(
            logits, *target, ctx.options, need_dweights and threshold is None, need_dlogits and forms_gradient(logits)
        )
        ctx.save_for_backward(logits, *target)
        return loss

    @staticmethod
    def backward(ctx, g):
        check_upstream("soft_binary_cross_entropy", g, TWICE)
        logits, *target = ctx.saved_tensors
        need_dlogits, need_dweights = needed(ctx)[:2]
        dlogits = dweights = None
        if need_dlogits:
            dlogits = ctx.backend.soft_bce_bwd(logits, *target, ctx.options, *taken(ctx, g, need_dlogits))
        if need_dweights:
            dweights = weights_gradient(ctx.slope, g, target[0])
        return dlogits, dweights, None, None, None, None, None, None, None


def weights_gradient(slope, g, weights):
    """The upstream gradient by what the loss gains by each component, [N, K, ...] or None: 0."""
    if slope is None:
        return torch.zeros_like(weights)
    return as_weights(slope * (g if g.dim() == 0 else g.unsqueeze(1)), weights)


class DenseBinaryCrossEntropyFunction(Function):
    """(logits [N, C, ...], target of that shape, and as above; lam [] or [N] and index [N], with which the target is mixed
    while it is read) -> loss. Gradients to logits, and to a target that is not mixed: 0 under a threshold."""

    @staticmethod
    def forward(
        ctx,
        logits,
        target,
        class_weight,
        pos_weight,
        label_smoothing,
        threshold,
        class_reduction,
        reduction,
        lam=None,
        index=None,
    ):
        ctx.backend = _backend.of(logits)
        ctx.options = Options(label_smoothing, threshold, class_reduction, reduction)
        form_gradient = ctx.needs_input_grad[0] and forms_gradient(logits)
        inputs = logits, target, lam, index, class_weight, pos_weight
        loss, ctx.gradient = ctx.backend.dense_bce_fwd(*inputs, ctx.options, form_gradient)
        ctx.save_for_backward(*inputs)
        return loss

    @staticmethod
    def backward(ctx, g):
        check_upstream("soft_binary_cross_entropy", g, TWICE)
        inputs = ctx.saved_tensors
        threshold = ctx.options.threshold
        need_dlogits, need_dtarget = needed(ctx)[:2]
        formed = need_dlogits, need_dtarget and threshold is None
        dlogits, dtarget = ctx.backend.dense_bce_bwd(*inputs, ctx.options, *taken(ctx, g, need_dlogits), *formed)
        if need_dtarget and threshold is not None:
            dtarget = torch.zeros_like(inputs[1])
        return dlogits, dtarget, *[None] * 8
