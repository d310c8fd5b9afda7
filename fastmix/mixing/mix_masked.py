"""Mixing every row with a partner row by a mask of cells, after moving the blocks of either: PuzzleMix, FMix, non-linear mixup.

    out[i, p]          = m*x[i, own(p)] + (1-m)*x[index[i], other(p)]        m = mask[i, cell of p]
    dL/dx              = m*g and (1-m)*g, each added up where its value came from
    dL/dmask[i, cell]  = sum over the cell's pixels and channels of g*(x[i, own(p)] - x[index[i], other(p)])

x [N, ..., H, W], mask [N, h, w], index [N] int64, plan and partner_plan [N, h*w] int64 or None.
"""

from typing import Any

import torch
from torch.autograd import Function
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._torch.mix_masked import mix_masked_dmask_formula, mix_masked_dx_formula, mix_masked_formula


def mix_masked(
    x: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor,
    *,
    plan: torch.Tensor | None = None,
    partner_plan: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixes every row with a partner row by a mask of cells, and moves the blocks of either, in one pass: PuzzleMix, FMix,
    non-linear mixup.

        out[i, p] = m * x[i, own(p)] + (1 - m) * x[index[i], other(p)]        m = mask[i, cell of p]

    The mask's cells cut an image into h x w blocks of equal size; the mask is never spread over pixels. Without plans own(p) =
    other(p) = p. With them block b of the output comes from block `plan[i, b]` of the row and `partner_plan[i, b]` of its
    partner. One cell is `mix` with lam = mask; H x W of them are a weight for each element. Exactly the row's value at 1 and
    the partner's at 0: a value of weight 0 is not read. Differentiable in `x` and `mask`, twice and more:
    `dL/dmask[i, cell]` is the sum over the cell's pixels and channels of `g * (own - partner)`, whatever the weights.
    Arithmetic is float32 (float64 for float64), rounded once, with the products contracted as `mix` does.

    Args:
        x: `[N, ..., H, W]` float16, bfloat16, float32 or float64, of any layout; dense layouts (channels_last) are kept.
        mask: `[N, h, w]` float32 or float64, the weight of the row itself; h divides H, w divides W. Values outside [0, 1]
            extrapolate.
        index: `[N]` int64, the partner of each row; any map into `[0, N)`.
        plan: `[N, h*w]` int64 or int32, any map into `[0, h*w)`, blocks counted row by row; None: blocks stay.
        partner_plan: the same for the partner's blocks.

    Returns:
        The mixed batch, of x's shape, dtype and dense layout.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also an index or a plan out of range (on a GPU its row becomes NaN).

    Source: PuzzleMix, arXiv:2009.06962; FMix, arXiv:2002.12047; Nonlinear Mixup (Guo, AAAI 2020).

    >>> import torch, fastmix
    >>> x = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[40.0, 50.0, 60.0, 70.0]]])
    >>> mask = torch.tensor([[[1.0, 0.5]], [[1.0, 0.0]]])
    >>> fastmix.mix_masked(x, mask, torch.tensor([1, 0]))
    tensor([[[ 0.0000,  1.0000, 31.0000, 36.5000]],
    <BLANKLINE>
            [[40.0000, 50.0000,  2.0000,  3.0000]]])
    >>> fastmix.mix_masked(x, mask, torch.tensor([1, 0]), plan=torch.tensor([[1, 0], [0, 1]]))[0]
    tensor([[ 2.0000,  3.0000, 30.0000, 35.5000]])
    """
    _check.float_tensor("x", x, 3, "[N, ..., H, W]")
    mask = _check.cell_mask("mask", mask, x)
    _check.integer_tensor("index", index, x.shape[:1], x)
    cells = mask.shape[1] * mask.shape[2]
    for name, value in (("plan", plan), ("partner_plan", partner_plan)):
        if value is not None:
            _check.integer_tensor(name, value, (x.shape[0], cells), x, narrow=True)
    plan, partner_plan = (value if value is None else value.to(torch.int64) for value in (plan, partner_plan))
    _check.partners_and_blocks(x.shape[0], index, plan, partner_plan)
    return _dispatch.call(OP, (x, mask), x, mask, index, plan, partner_plan)


def _launch(
    x: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, plan: torch.Tensor | None, partner_plan: torch.Tensor | None
) -> torch.Tensor:
    return _backend.of(x).mix_masked_fwd(x, mask, index, plan, partner_plan)


class MixMaskedFunction(Function):
    """(x [N, ..., H, W], mask [N, h, w], index [N], plan and partner_plan [N, h*w] or None) -> mixed x. Gradients to x and mask.

    x is saved only where the mask needs a gradient. Under `create_graph=True` (and in a batched backward) the gradients are
    plain torch operations, so second and higher derivatives are right.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        mask: torch.Tensor,
        index: torch.Tensor,
        plan: Any = None,
        partner_plan: torch.Tensor | None = None,
    ) -> Any:
        ctx.backend = _backend.of(x)
        out = ctx.backend.mix_masked_fwd(x, mask, index, plan, partner_plan)
        ctx.strides = out.stride()
        _dispatch.save_for_mixing(ctx, x, mask, index, plan, partner_plan)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        need_dx, need_dmask = _dispatch.inputs_needing_grad(ctx)[:2]
        x, *rest = ctx.saved_tensors
        if torch.is_grad_enabled() or _check.batched(grad_output):
            dx = mix_masked_dx_formula(grad_output, *rest) if need_dx else None
            dmask = mix_masked_dmask_formula(grad_output, x, *rest) if need_dmask else None
        else:
            dx, dmask = ctx.backend.mix_masked_bwd(grad_output, x, *rest, ctx.strides, need_dx, need_dmask)
        return dx, dmask, None, None, None


@custom_op("fastmix::mix_masked", mutates_args=())
def _mix_masked_op(
    x: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor,
    plan: torch.Tensor | None,
    partner_plan: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check.partners_and_blocks(x.shape[0], index, plan, partner_plan)  # no value could be read while tracing
    return _dispatch.as_promised(_backend.module(backend).mix_masked_fwd(x, mask, index, plan, partner_plan), x)


@_mix_masked_op.register_fake
def _(
    x: torch.Tensor, mask: torch.Tensor, index: torch.Tensor, plan: Any, partner_plan: torch.Tensor | None, backend: str
) -> Any:
    return torch.empty_like(x)


@custom_op(
    "fastmix::mix_masked_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor? x, Tensor mask, Tensor index, Tensor? plan, Tensor? partner_plan, bool need_dx, bool need_dmask, "
    "str backend) -> (Tensor, Tensor)",
)
def _mix_masked_backward_op(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor,
    plan: Any,
    partner_plan: torch.Tensor | None,
    need_dx: bool,
    need_dmask: Any,
    backend: str,
) -> Any:
    strides = _dispatch.promised_strides(grad_output)
    backward = _backend.module(backend).mix_masked_bwd
    dx, dmask = backward(grad_output, x, mask, index, plan, partner_plan, strides, need_dx, need_dmask)
    return _dispatch.as_promised(dx, grad_output), _dispatch.or_empty(dmask, mask)


@_mix_masked_backward_op.register_fake
def _(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor,
    plan: Any,
    partner_plan: torch.Tensor | None,
    need_dx: bool,
    need_dmask: Any,
    backend: str,
) -> Any:
    dx = torch.empty_like(grad_output) if need_dx else grad_output.new_empty(0)
    return dx, mask.new_empty(mask.shape if need_dmask else 0)


def _op_setup(ctx: Any, inputs: Any, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
    *saved, ctx.backend = inputs
    _dispatch.save_for_mixing(ctx, *saved)


def _op_gradients(ctx: Any, grad_output: torch.Tensor) -> Any:
    need_dx, need_dmask = ctx.needs_input_grad[:2]
    dx, dmask = _mix_masked_backward_op(grad_output, *ctx.saved_tensors, need_dx, need_dmask, ctx.backend)
    return dx if need_dx else None, dmask if need_dmask else None, None, None, None, None


_mix_masked_op.register_autograd(_op_gradients, setup_context=_op_setup)

OP = _dispatch.Op(mix_masked_formula, _mix_masked_op, _dispatch.recorder(MixMaskedFunction), _launch)
