"""Mixing every row with a partner row: mixup, and CutMix with a box.

    out[i]      = lam[i]*x[i] + (1-lam[i])*x[index[i]]      outside row i's box
    out[i]      = x[index[i]]                               inside it
    dL/dx[i]    = lam[i]*g[i] + sum over k with index[k] = i of (1-lam[k])*g[k]
    dL/dlam[i]  = <g[i], x[i] - x[index[i]]>                outside the box

x [N, ...], lam [] or [N], index [N] int64, box [N, 2, 4 or 6] int or None.
"""

from typing import Any

import torch
from torch.autograd import Function
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._torch.mix import mix_dlam_formula, mix_dx_formula, mix_formula


def mix(
    x: torch.Tensor,
    lam: torch.Tensor | float,
    index: torch.Tensor,
    *,
    box: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixes every row with a partner row, in one pass: mixup, and CutMix with a box.

        out[i] = lam[i] * x[i] + (1 - lam[i]) * x[index[i]]      outside row i's box
        out[i] = x[index[i]]                                     inside it

    Exactly `x[i]` at lam 1 and `x[index[i]]` at lam 0: a value of weight 0 is not read, so infinities and NaNs do not pass. Differentiable in `x` (twice and more) and in `lam`: `dL/dlam[i] = <g[i], x[i] - x[index[i]]>` outside the
    box, which reads both rows whatever their weights. Arithmetic is float32 (float64 for float64), rounded once at the store:
    `fma(lam, x[i], (1 - lam) * x[index[i]])`, so that the result and the gradient to x have the same bits however x is stored.

    Args:
        x: `[N, ...]` float16, bfloat16, float32 or float64, of any layout; dense layouts (channels_last) are kept.
        lam: the weight of the row itself: a float, a 0-d tensor or `[N]`, float32 or float64. Values outside [0, 1] extrapolate.
            A device tensor never makes a compiled program recompile; a 0-d CPU tensor is copied without waiting for the device.
        index: `[N]` int64, the partner of each row; any map into `[0, N)`.
        box: `[N, 4]` int, `(y0, x0, y1, x1)`, half open, over the last two dimensions; `[N, 2]` for intervals over the last
            one, `[N, 6]` for volumes over the last three. A box is cut off at the image's border; `y1 <= y0` is an empty box.
        out: the tensor to write the result to, of x's shape and dtype, which shares no memory with the inputs. Not allowed where
            x or lam requires grad.

    Returns:
        The mixed batch, of x's shape, dtype and dense layout.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also an index out of range (on a GPU its row becomes NaN).

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899.

    >>> import torch, fastmix
    >>> x = torch.tensor([[0.0, 0.0], [8.0, 4.0]])
    >>> fastmix.mix(x, torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))
    tensor([[2., 1.],
            [8., 4.]])
    >>> fastmix.mix(x, 1.0, torch.tensor([1, 0]), box=torch.tensor([[0, 1], [1, 2]]))
    tensor([[8., 0.],
            [8., 0.]])
    """
    return mix_known(x, lam, index, box, None, out)


def mix_known(x: torch.Tensor, lam: Any, index: torch.Tensor, box: Any, inverse: Any, out: Any = None) -> torch.Tensor:
    """Mixes as `mix` does, with the inverse [N] of an index that is known to be a permutation, or None. With it the gradient to x takes
    one launch less on a GPU."""
    _check.float_tensor("x", x, 1, "[N, ...]")
    lam = _check.coefficient("lam", lam, x)
    _check.integer_tensor("index", index, x.shape[:1], x)
    _check.in_range("index", index, x.shape[0], "a partner")
    if box is not None:
        _check.box("box", box, x)
        box = box.to(torch.int64).contiguous()
    if out is None:
        return mix_checked(x, lam, index, box, inverse)
    _check.output(out, x, x=x, lam=lam, index=index, box=box)
    return _dispatch.call_into(out, "x, lam", OP, (x, lam), x, lam, index, box, None)


def mix_checked(x: torch.Tensor, lam: Any, index: torch.Tensor, box: Any = None, inverse: Any = None) -> torch.Tensor:
    """Mixes checked arguments: `lam` a tensor of the dtype that x is computed in."""
    return _dispatch.call(OP, (x, lam), x, lam, index, box, inverse)


def _formula(x: torch.Tensor, lam: torch.Tensor, index: torch.Tensor, box: Any, inverse: Any) -> torch.Tensor:
    return mix_formula(x, lam, index, box)


def _operator(x: torch.Tensor, lam: torch.Tensor, index: torch.Tensor, box: Any, inverse: Any, backend: str) -> Any:
    return _mix_op(x, lam, index, box, backend)


def _launch(x: torch.Tensor, lam: torch.Tensor, index: torch.Tensor, box: Any, inverse: Any, out: Any = None) -> torch.Tensor:
    return _backend.of(x).mix_fwd(x, lam, index, box, out)


class MixFunction(Function):
    """(x [N, ...], lam [] or [N], index [N], box or None, inverse of the index or None) -> mixed x. Gradients to x and lam.

    x is saved only where lam needs a gradient. Under `create_graph=True` (and in a batched backward) the gradients are plain
    torch operations, so second and higher derivatives are right.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, lam: torch.Tensor, index: torch.Tensor, box: Any = None, inverse: Any = None) -> Any:
        ctx.backend = _backend.of(x)
        out = ctx.backend.mix_fwd(x, lam, index, box, None)
        ctx.strides = out.stride()
        _dispatch.save_for_mixing(ctx, x, lam, index, box, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        need_dx, need_dlam = _dispatch.inputs_needing_grad(ctx)[:2]
        x, lam, index, box, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() or _check.batched(grad_output):
            dx = mix_dx_formula(grad_output, lam, index, box) if need_dx else None
            dlam = mix_dlam_formula(grad_output, x, lam, index, box) if need_dlam else None
        else:
            dx, dlam = ctx.backend.mix_bwd(grad_output, x, lam, index, box, ctx.strides, need_dx, need_dlam, inverse)
        return dx, _dispatch.shaped_as(lam, dlam) if need_dlam else None, None, None, None


@custom_op("fastmix::mix", mutates_args=())
def _mix_op(x: torch.Tensor, lam: torch.Tensor, index: torch.Tensor, box: torch.Tensor | None, backend: str) -> torch.Tensor:
    _check.in_range("index", index, x.shape[0], "a partner")  # no value could be read while tracing
    return _dispatch.as_promised(_backend.module(backend).mix_fwd(x, lam, index, box, None), x)


@_mix_op.register_fake
def _(x: torch.Tensor, lam: torch.Tensor, index: torch.Tensor, box: torch.Tensor | None, backend: str) -> torch.Tensor:
    return torch.empty_like(x)


@custom_op(
    "fastmix::mix_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor? x, Tensor lam, Tensor index, Tensor? box, bool need_dx, bool need_dlam, str backend) "
    "-> (Tensor, Tensor)",
)
def _mix_backward_op(
    grad_output: torch.Tensor,
    x: torch.Tensor | None,
    lam: torch.Tensor,
    index: torch.Tensor,
    box: torch.Tensor | None,
    need_dx: bool,
    need_dlam: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    strides = _dispatch.promised_strides(grad_output)
    dx, dlam = _backend.module(backend).mix_bwd(grad_output, x, lam, index, box, strides, need_dx, need_dlam)
    return _dispatch.as_promised(dx, grad_output), _dispatch.or_empty(dlam, lam)


@_mix_backward_op.register_fake
def _(
    grad_output: torch.Tensor,
    x: torch.Tensor | None,
    lam: torch.Tensor,
    index: torch.Tensor,
    box: torch.Tensor | None,
    need_dx: bool,
    need_dlam: bool,
    backend: str,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(grad_output) if need_dx else grad_output.new_empty(0)
    return dx, lam.new_empty(grad_output.shape[0] if need_dlam else 0)


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *saved, ctx.backend = inputs
    _dispatch.save_for_mixing(ctx, *saved)


def _op_gradients(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    need_dx, need_dlam = ctx.needs_input_grad[:2]
    x, lam, index, box = ctx.saved_tensors
    dx, dlam = _mix_backward_op(grad_output, x, lam, index, box, need_dx, need_dlam, ctx.backend)
    return dx if need_dx else None, _dispatch.shaped_as(lam, dlam) if need_dlam else None, None, None, None


_mix_op.register_autograd(_op_gradients, setup_context=_op_setup)


OP = _dispatch.Op(_formula, _operator, _dispatch.recorder(MixFunction), _launch)
