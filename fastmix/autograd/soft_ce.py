from typing import NamedTuple

import torch
from torch.autograd import Function

from .. import _backend, _check
from .needed import needed


def check_upstream(name, g, instead="torch.nn.functional.cross_entropy on target.dense(C)"):
    """Refuses what these backwards cannot do. Grad mode is on in a backward exactly under create_graph=True."""
    if _check.batched(g):
        raise RuntimeError(
            f"{name}: a backward cannot be batched (is_grads_batched, vectorize) nor compiled without its forward; "
            "use torch.func.vjp and vmap, or compile both"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: second derivatives are not supported (backward ran with create_graph=True). "
            f"Use {instead} where a loss must be differentiated twice."
        )


def forms_gradient(logits):
    """Whether the forward forms the gradient. Not in float16: it would underflow before a GradScaler's factor arrives."""
    return logits.dtype != torch.float16


def taken(ctx, g, need_dlogits):
    """(upstream gradient [] or [rows], the gradient that the forward formed or None): only the first backward that needs it
    finds that, since it may change it."""
    formed = None
    if need_dlogits:
        formed, ctx.gradient = ctx.gradient, None
    return g if g.dim() == 0 else g.reshape(-1), formed


class Options(NamedTuple):
    """What a loss is computed with, but for tensors."""

    ignore_index: int
    label_smoothing: float
    reduction: str


def soft_cross_entropy(logits, weights, classes, class_weight, *options):
    """The op on checked arguments, without autograd; classes [N, K, ...]."""
    return _backend.of(logits).soft_ce_fwd(logits, weights, classes, class_weight, Options(*options), False, False)[0]


class SoftCrossEntropyFunction(Function):
    """(logits [N, C, ...], weights [N, K, ...] or None, classes [N, K, ...], class weights [C] or None, ignore_index,
    label_smoothing, reduction) -> loss. Gradients to logits and weights.

    The forward forms the gradient to the logits; the first backward takes it, and changes it only where the upstream gradient
    is not 1; a later backward over a retained graph forms it anew from the logits, which are never written.
    """

    @staticmethod
    def forward(ctx, logits, weights, classes, class_weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
        ctx.backend = _backend.of(logits)
        ctx.options = Options(ignore_index, label_smoothing, reduction)
        need_dlogits, need_dweights = ctx.needs_input_grad[:2]
        target = weights, classes, class_weight
        loss, mass, stats, per_component, ctx.gradient = ctx.backend.soft_ce_fwd(
            logits, *target, ctx.options, need_dweights, need_dlogits and forms_gradient(logits)
        )
        mean_loss = loss.clone() if need_dweights and mass is not None else None  # the caller may change theirs
        ctx.kept = mass, per_component, mean_loss, stats
        ctx.save_for_backward(logits, *target)
        return loss

    @staticmethod
    def backward(ctx, g):
        check_upstream("soft_cross_entropy", g)
        logits, *target = ctx.saved_tensors
        mass, per_component, mean_loss, stats = ctx.kept
        need_dlogits, need_dweights = needed(ctx)[:2]
        dlogits = dweights = None
        if need_dlogits:
            dlogits = ctx.backend.soft_ce_bwd(logits, *target, ctx.options, mass, stats, *taken(ctx, g, True))
        if need_dweights:
            dweights = weights_gradient(per_component, g, mean_loss, mass, *target, ctx.options.ignore_index)
        return dlogits, dweights, None, None, None, None, None


def weights_gradient(value, g, loss, mass, weights, classes, class_weight, ignore_index):
    """A component's own loss, and under "mean" its share in the divisor: d(L/D) = (value - (L/D)*w[c]) / D."""
    if mass is None:
        gradient = value * (g if g.dim() == 0 else g.unsqueeze(1))
    else:
        ignored = classes == ignore_index
        share = loss
        if class_weight is not None:
            w = class_weight[classes.clamp(0, class_weight.shape[0] - 1)]
            share = torch.where(w == 0, 0, loss * w)
        gradient = (value - share) * (g / mass)
        gradient = gradient.masked_fill_(ignored, 0)  # also where everything is, and mass is 0
    return as_weights(gradient, weights)


def as_weights(gradient, weights):
    """A gradient to each component [N, K, ...] as one to the weights that were given."""
    if weights.dim() < gradient.dim():  # one weight for all pixels
        gradient = gradient.flatten(2).sum(2)
    return gradient.to(weights.dtype)
