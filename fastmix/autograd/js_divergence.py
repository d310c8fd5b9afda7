from torch.autograd import Function

from .. import _backend
from .soft_ce import check_upstream, forms_gradient, taken


def js_divergence(sources, scale, reduction):
    """The op on checked arguments, without autograd; sources a stacked tensor or a tuple."""
    need = (False,) * len(sources) if isinstance(sources, tuple) else False
    return _backend.of(sources[0]).js_divergence_fwd(sources, scale, reduction, need, False)[0]


class JSDivergenceFunction(Function):
    """(scale, reduction, stacked, *sources) -> loss. `stacked`: the only source is [K, N, C]; else each of the K is [N, C].
    Gradients to the sources, formed as in SoftCrossEntropyFunction."""

    @staticmethod
    def forward(ctx, scale, reduction, stacked, *sources):
        ctx.backend, ctx.stacked, ctx.options = _backend.of(sources[0]), stacked, (scale, reduction)
        need = ctx.needs_input_grad[3:]
        ctx.need = need[0] if stacked else tuple(need)
        given = sources[0] if stacked else sources
        loss, ctx.stats, ctx.gradient = ctx.backend.js_divergence_fwd(given, *ctx.options, ctx.need, forms_gradient(sources[0]))
        ctx.save_for_backward(*sources)
        return loss

    @staticmethod
    def backward(ctx, g):
        check_upstream("js_divergence", g, "log_softmax and torch.nn.functional.kl_div")
        sources = ctx.saved_tensors[0] if ctx.stacked else tuple(ctx.saved_tensors)
        gradients = ctx.backend.js_divergence_bwd(sources, *ctx.options, ctx.stats, *taken(ctx, g, True), ctx.need)
        return None, None, None, *((gradients,) if ctx.stacked else gradients)
