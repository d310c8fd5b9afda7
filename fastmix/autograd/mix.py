import torch
from torch.autograd import Function

from .. import _backend, _check, _expressions
from .needed import needed


def mix(x, lam, index, box, out=None, order=None):
    """The op on checked arguments, without autograd."""
    return _backend.of(x).mix_fwd(x, lam, index, box, out, order)


class MixFunction(Function):
    """(x [N, ...], lam [] or [N], index [N], box or None, order hint or None) -> mixed x. Gradients to x and lam.

    x is saved only where lam needs a gradient. Under `create_graph=True` (and in a batched backward) the gradients are plain
    torch operations, so second and higher derivatives are right.
    """

    @staticmethod
    def forward(ctx, x, lam, index, box=None, order=None):
        ctx.backend, ctx.order = _backend.of(x), order
        out = ctx.backend.mix_fwd(x, lam, index, box, None, order)
        ctx.layout = out.stride()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, lam, index, box)
        return out

    @staticmethod
    def backward(ctx, g):
        x, lam, index, box = ctx.saved_tensors
        need_dx, need_dlam = needed(ctx)[:2]
        if torch.is_grad_enabled() or _check.batched(g):
            dx = _expressions.mix_dx_expression(g, lam, index, box) if need_dx else None
            dlam = _expressions.mix_dlam_expression(g, x, lam, index, box) if need_dlam else None
        else:
            dx, dlam = ctx.backend.mix_bwd(g, x, lam, index, box, ctx.layout, need_dx, need_dlam, ctx.order)
        if need_dlam and lam.dim() == 0:
            dlam = dlam.sum()
        return dx, dlam, None, None, None
