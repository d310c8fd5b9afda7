from torch.autograd import Function

from .. import _backend
from .needed import needed
from .soft_ce import Options, check_upstream, forms_gradient, taken


def dense_cross_entropy(logits, target, class_weight, ignore_index, label_smoothing, reduction, lam=None, index=None):
    """The op on checked arguments, without autograd; target in the logits' shape, or the values of MixedRows with lam and index."""
    options = Options(ignore_index, label_smoothing, reduction)
    return _backend.of(logits).dense_ce_fwd(logits, target, lam, index, class_weight, options, False)[0]


class DenseCrossEntropyFunction(Function):
    """(logits [N, C, ...], target of that shape, class weights [C] or None, ignore_index, label_smoothing, reduction; lam [] or
    [N] and index [N], with which the target is mixed while it is read) -> loss. Gradients to logits, formed as in
    SoftCrossEntropyFunction, and to a target that is not mixed."""

    @staticmethod
    def forward(
        ctx, logits, target, class_weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean", lam=None, index=None
    ):
        ctx.backend = _backend.of(logits)
        ctx.options = Options(ignore_index, label_smoothing, reduction)
        loss, ctx.stats, ctx.gradient = ctx.backend.dense_ce_fwd(
            logits, target, lam, index, class_weight, ctx.options, ctx.needs_input_grad[0] and forms_gradient(logits)
        )
        ctx.save_for_backward(logits, target, lam, index, class_weight)
        return loss

    @staticmethod
    def backward(ctx, g):
        check_upstream("soft_cross_entropy", g)
        inputs = ctx.saved_tensors
        need = needed(ctx)[:2]
        gradients = ctx.backend.dense_ce_bwd(*inputs, ctx.options, ctx.stats, *taken(ctx, g, need[0]), *need)
        return *gradients, *[None] * 6
