import torch
from torch.autograd import Function

from .. import _backend, _check, _expressions
from .needed import needed


def mix_masked(x, mask, index, plan, partner_plan):
    """The op on checked arguments, without autograd."""
    return _backend.of(x).mix_masked_fwd(x, mask, index, plan, partner_plan)


class MixMaskedFunction(Function):
    """(x [N, ..., H, W], mask [N, h, w], index [N], plan and partner_plan [N, h*w] or None) -> mixed x. Gradients to x and mask.

    x is saved only where the mask needs a gradient. Under `create_graph=True` (and in a batched backward) the gradients are
    plain torch operations, so second and higher derivatives are right.
    """

    @staticmethod
    def forward(ctx, x, mask, index, plan=None, partner_plan=None):
        ctx.backend = _backend.of(x)
        out = ctx.backend.mix_masked_fwd(x, mask, index, plan, partner_plan)
        ctx.layout = out.stride()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, mask, index, plan, partner_plan)
        return out

    @staticmethod
    def backward(ctx, g):
        x, *how = ctx.saved_tensors
        need_dx, need_dmask = needed(ctx)[:2]
        if torch.is_grad_enabled() or _check.batched(g):
            dx = _expressions.mix_masked_dx_expression(g, *how) if need_dx else None
            dmask = _expressions.mix_masked_dmask_expression(g, x, *how) if need_dmask else None
        else:
            dx, dmask = ctx.backend.mix_masked_bwd(g, x, *how, ctx.layout, need_dx, need_dmask)
        return dx, dmask, None, None, None
