"""Mixing with the whole partner resized into a box: ResizeMix.

    out[i, y, x] = the partner x[index[i]], resized bilinearly to the box      inside row i's box
    out[i, y, x] = x[i, y, x]                                                outside it

x [N, ..., H, W], index [N] int64, box [N, 4] int.
"""

from typing import Any

import torch
from torch.autograd import Function
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._torch.resize_mix import resize_mix_dx_formula, resize_mix_formula


def resize_mix(x: torch.Tensor, index: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Replaces a box of every row by its whole partner, resized to the box, in one pass: ResizeMix.

        out[i, y, x] = sum over a, b in {0, 1} of v(a)*u(b) * x[index[i], p + a, q + b]      inside row i's box
        p = floor(s),  v(1) = s - p,  v(0) = 1 - v(1),   s = (y - y0 + 1/2) * H / (y1 - y0) - 1/2;      q and u likewise of x

    Outside the box it is the row itself. That is the formula of `F.interpolate(..., mode="bilinear", align_corners=False)` without
    antialiasing, as the authors' code has it; s is a fraction of integers here, so p and v are not those of a rounded s. A box is cut off at the
    image's border first, and the partner is resized to what is left. Differentiable in `x`, twice and more; the gradient is gathered,
    so it has the same bits every time. Arithmetic is float32 (float64 for float64), rounded once.

    Args:
        x: `[N, ..., H, W]` float16, bfloat16, float32 or float64, of any layout; dense layouts (channels_last) are kept.
        index: `[N]` int64, the partner of each row; any map into `[0, N)`.
        box: `[N, 4]` int, `(y0, x0, y1, x1)`, half open; `y1 <= y0` is an empty box.

    Returns:
        The mixed batch, of x's shape, dtype and dense layout.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also an index out of range (on a GPU its row becomes NaN).

    Source: ResizeMix, arXiv:2012.11101.

    >>> import torch, fastmix
    >>> x = torch.stack((torch.zeros(4, 4), torch.arange(16.0).view(4, 4)))
    >>> fastmix.resize_mix(x, torch.tensor([1, 0]), torch.tensor([[0, 0, 2, 2], [0, 0, 0, 0]]))[0]
    tensor([[ 2.5000,  4.5000,  0.0000,  0.0000],
            [10.5000, 12.5000,  0.0000,  0.0000],
            [ 0.0000,  0.0000,  0.0000,  0.0000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    _check.float_tensor("x", x, 3, "[N, ..., H, W]")
    _check.integer_tensor("index", index, x.shape[:1], x)
    _check.strided("box", box, (torch.int32, torch.int64), "an int32 or int64 tensor")
    if tuple(box.shape) != (x.shape[0], 4):
        raise _check.wrong(ValueError, "box", f"shape [{x.shape[0]}, 4]", box)
    _check.same_device("box", box, x)
    _check.in_range("index", index, x.shape[0], "a partner")
    return _dispatch.call(OP, (x,), x, index, box.to(torch.int64))


def _launch(x: torch.Tensor, index: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    return _backend.of(x).resize_mix_fwd(x, index, box)


class ResizeMixFunction(Function):
    """(x [N, ..., H, W], index [N], box [N, 4] int64) -> mixed x. Gradient to x, and by formulas its own ones."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, box: torch.Tensor | None) -> Any:
        ctx.backend = _backend.of(x)
        out = ctx.backend.resize_mix_fwd(x, index, box)
        ctx.strides = out.stride()
        ctx.save_for_backward(index, box)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        index, box = ctx.saved_tensors
        if torch.is_grad_enabled() or _check.batched(grad_output):
            return resize_mix_dx_formula(grad_output, index, box), None, None
        return ctx.backend.resize_mix_bwd(grad_output, index, box, ctx.strides), None, None


@custom_op("fastmix::resize_mix", mutates_args=())
def _resize_mix_op(x: torch.Tensor, index: torch.Tensor, box: torch.Tensor, backend: str) -> torch.Tensor:
    _check.in_range("index", index, x.shape[0], "a partner")  # no value could be read while tracing
    return _dispatch.as_promised(_backend.module(backend).resize_mix_fwd(x, index, box), x)


@_resize_mix_op.register_fake
def _(x: torch.Tensor, index: torch.Tensor, box: torch.Tensor | None, backend: str) -> Any:
    return torch.empty_like(x)


@custom_op("fastmix::resize_mix_backward", mutates_args=())
def _resize_mix_backward_op(grad_output: torch.Tensor, index: torch.Tensor, box: torch.Tensor, backend: str) -> torch.Tensor:
    strides = _dispatch.promised_strides(grad_output)
    return _dispatch.as_promised(_backend.module(backend).resize_mix_bwd(grad_output, index, box, strides), grad_output)


@_resize_mix_backward_op.register_fake
def _(grad_output: torch.Tensor, index: torch.Tensor, box: torch.Tensor | None, backend: str) -> Any:
    return torch.empty_like(grad_output)


def _op_setup(ctx: Any, inputs: Any, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
    _, index, box, ctx.backend = inputs
    ctx.save_for_backward(index, box)


def _op_gradients(ctx: Any, grad_output: torch.Tensor) -> Any:
    return _resize_mix_backward_op(grad_output, *ctx.saved_tensors, ctx.backend), None, None, None


_resize_mix_op.register_autograd(_op_gradients, setup_context=_op_setup)

OP = _dispatch.Op(resize_mix_formula, _resize_mix_op, _dispatch.recorder(ResizeMixFunction), _launch)
