import torch
from torch.autograd import Function

from .. import _backend, _check, _expressions
from .needed import needed


def convex_combination(sources, weights):
    """The op on checked arguments, without autograd; sources a stacked tensor or a tuple."""
    return _backend.of(weights).convex_combination_fwd(sources, weights)


class ConvexCombinationFunction(Function):
    """(weights [N, K], stacked, *sources) -> their weighted sum. `stacked`: the only source is [K, N, ...]; else each of the K
    is [N, ...]. Gradients to the weights and to the sources.

    The sources are saved only where the weights need a gradient. Under `create_graph=True` (and in a batched backward) the
    gradients are plain torch operations, so second and higher derivatives are right.
    """

    @staticmethod
    def forward(ctx, weights, stacked, *sources):
        ctx.backend = _backend.of(weights)
        out = ctx.backend.convex_combination_fwd(sources[0] if stacked else sources, weights)
        ctx.layout, ctx.stacked = out.stride(), stacked
        ctx.save_for_backward(weights, *(sources if ctx.needs_input_grad[0] else ()))
        return out

    @staticmethod
    def backward(ctx, g):
        weights, *sources = ctx.saved_tensors
        need_dweights, _, *need = ctx.needs_input_grad
        need_dweights, *need = needed(ctx, (need_dweights, *need))
        need_dsources = need[0] if ctx.stacked else tuple(need)
        sources = None if not need_dweights else sources[0] if ctx.stacked else tuple(sources)
        if torch.is_grad_enabled() or _check.batched(g):
            dsources, dweights = _expressions.convex_combination_gradients_expression(
                g, sources, weights, need_dsources, need_dweights
            )
        else:
            dsources, dweights = ctx.backend.convex_combination_bwd(
                g, sources, weights, ctx.layout, need_dsources, need_dweights
            )
        return dweights, None, *((dsources,) if ctx.stacked else dsources)
