"""The weighted sum of up to 16 batches: n-way mixing, AugMix.

    out[n]                = sum over k of weights[n, k]*sources[k][n]
    dL/dsources[k][n]     = weights[n, k]*g[n]
    dL/dweights[n, k]     = <g[n], sources[k][n]>

sources [K, N, ...] ("stacked") or K tensors [N, ...], weights [N, K].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._torch.convex_combination import convex_combination_formula, convex_combination_gradients_formula


def convex_combination(sources: torch.Tensor | Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Returns the weighted sum of up to 16 batches, with weights for each row, in one pass: n-way mixing, AugMix.

        out[n] = sum over k of weights[n, k] * sources[k][n]

    A value of weight 0 is not read, so infinities and NaNs do not pass. Differentiable, twice and more, in the sources, `dL/dsources[k][n] = weights[n, k]*g[n]`, and in the weights, `dL/dweights[n, k] = <g[n], sources[k][n]>`,
    which reads every source. Only the gradients that autograd asks for are formed. Arithmetic is float32 (float64 for float64),
    rounded once.

    Args:
        sources: one stacked tensor `[K, N, ...]`, or a sequence of K tensors `[N, ...]` of one shape and dtype, which is not
            stacked; K from 1 to 16. float16, bfloat16, float32 or float64, of any layout. A tensor may come twice.
        weights: `[N, K]` float32 or float64, of any value: they need not be positive, nor sum to 1.

    Returns:
        The combined batch `[N, ...]`, of the sources' dtype and the first one's layout if that is dense. Sources of another layout
        are copied into it first.

    Raises:
        TypeError, ValueError: a wrong argument.

    Source: AugMix, arXiv:1912.02781, `(1 - m)*x + m * sum of w[k]*chain_k(x)`:

    >>> import torch, fastmix
    >>> x, chain = torch.rand(4, 3, 8, 8), lambda x: x.flip(3)  # yours: any random augmentation
    >>> weights = fastmix.dirichlet(len(x), 3, alpha=1.0, skip=1.0)
    >>> mixed = fastmix.convex_combination((x, chain(x), chain(x), chain(x)), weights)

    Mixing each row with two others, and its label with theirs:

    >>> x, y = torch.tensor([[0.0], [4.0], [8.0]]), torch.tensor([7, 8, 9])
    >>> first, second = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    >>> weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.25, 0.0, 0.75]])
    >>> fastmix.convex_combination((x, x[first], x[second]), weights).T
    tensor([[3., 4., 5.]])
    >>> target = fastmix.SoftTarget(torch.stack((y, y[first], y[second]), 1), weights)
    >>> target.argmax()
    tensor([7, 8, 8])
    """
    sources = _check.sources("sources", sources)
    weights = _check.source_weights("weights", weights, sources)
    stacked = isinstance(sources, torch.Tensor)
    tensors = (sources,) if stacked else sources
    return _dispatch.call(OP, (weights, *tensors), weights, stacked, *tensors)


def _formula(weights: torch.Tensor, stacked: bool, *tensors: Any) -> Any:
    return convex_combination_formula(_dispatch.as_given(stacked, tensors), weights)


def _launch(weights: torch.Tensor, stacked: bool, *tensors: Any) -> torch.Tensor:
    return _backend.of(weights).convex_combination_fwd(_dispatch.as_given(stacked, tensors), weights)


class ConvexCombinationFunction(Function):
    """(weights [N, K], stacked, *sources) -> their weighted sum. `stacked`: the only source is [K, N, ...]; else each of the K
    is [N, ...]. Gradients to the weights and to the sources.

    The sources are saved only where the weights need a gradient. Under `create_graph=True` (and in a batched backward) the
    gradients are plain torch operations, so second and higher derivatives are right.
    """

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, stacked: bool, *sources: Any) -> Any:
        ctx.backend = _backend.of(weights)
        out = ctx.backend.convex_combination_fwd(_dispatch.as_given(stacked, sources), weights)
        ctx.strides, ctx.stacked = out.stride(), stacked
        ctx.save_for_backward(weights, *(sources if ctx.needs_input_grad[0] else ()))
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        weights, *sources = ctx.saved_tensors
        need_dweights, _, *need = ctx.needs_input_grad
        need_dweights, *need = _dispatch.inputs_needing_grad(ctx, (need_dweights, *need))
        need_dsources = _dispatch.as_given(ctx.stacked, need)
        given = _dispatch.as_given(ctx.stacked, sources) if need_dweights else None
        if torch.is_grad_enabled() or _check.batched(grad_output):
            gradients = convex_combination_gradients_formula(grad_output, given, weights, need_dsources, need_dweights)
        else:
            backward = ctx.backend.convex_combination_bwd
            gradients = backward(grad_output, given, weights, ctx.strides, need_dsources, need_dweights)
        dsources, dweights = gradients
        return dweights, None, *((dsources,) if ctx.stacked else dsources)


@custom_op("fastmix::convex_combination", mutates_args=())
def _convex_combination_op(sources: list[torch.Tensor], weights: torch.Tensor, stacked: bool, backend: str) -> torch.Tensor:
    out = _backend.module(backend).convex_combination_fwd(_dispatch.as_given(stacked, sources), weights)
    return _dispatch.as_promised(out, sources[0][0] if stacked else sources[0])


@_convex_combination_op.register_fake
def _(sources: Any, weights: torch.Tensor, stacked: bool, backend: str) -> Any:
    return torch.empty_like(sources[0][0] if stacked else sources[0])


@custom_op(
    "fastmix::convex_combination_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor[] sources, Tensor weights, bool stacked, bool[] need_dsources, bool need_dweights, str backend) "
    "-> (Tensor[], Tensor)",
)
def _convex_combination_backward_op(
    grad_output: torch.Tensor,
    sources: Any,
    weights: torch.Tensor,
    stacked: bool,
    need_dsources: tuple[bool, bool],
    need_dweights: bool,
    backend: str,
) -> Any:
    need = _dispatch.as_given(stacked, need_dsources)
    given = _dispatch.as_given(stacked, sources) if need_dweights else None
    strides = _dispatch.promised_strides(grad_output)
    backward = _backend.module(backend).convex_combination_bwd
    dsources, dweights = backward(grad_output, given, weights, strides, need, need_dweights)
    dweights = _dispatch.or_empty(dweights, weights)
    if not stacked:
        return [_dispatch.as_promised(t, grad_output) for t in dsources], dweights
    if dsources is not None and dsources.stride()[1:] != strides:
        dsources = _promised_stack(grad_output, len(dsources)).copy_(dsources)
    return [_dispatch.or_empty(dsources, grad_output)], dweights


def _promised_stack(t: torch.Tensor, count: int) -> Any:
    """Returns an empty [count, *t.shape], each part of it in the strides that are promised for t."""
    return t.new_empty_strided((count, *t.shape), (t.numel(), *_dispatch.promised_strides(t)))


@_convex_combination_backward_op.register_fake
def _(
    grad_output: torch.Tensor,
    sources: Any,
    weights: torch.Tensor,
    stacked: bool,
    need_dsources: tuple[bool, bool],
    need_dweights: bool,
    backend: str,
) -> Any:
    if stacked:
        dsources = [_promised_stack(grad_output, weights.shape[1]) if need_dsources[0] else grad_output.new_empty(0)]
    else:
        dsources = [torch.empty_like(grad_output) if need else grad_output.new_empty(0) for need in need_dsources]
    return dsources, weights.new_empty(weights.shape if need_dweights else 0)


def _op_setup(ctx: Any, inputs: Any, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
    sources, weights, ctx.stacked, ctx.backend = inputs
    ctx.save_for_backward(weights, *(sources if weights.requires_grad else ()))  # needs_input_grad is flat here


def _op_gradients(ctx: Any, grad_output: torch.Tensor) -> Any:
    weights, *sources = ctx.saved_tensors
    need, need_dweights = ctx.needs_input_grad[:2]
    arguments = grad_output, sources, weights, ctx.stacked, need, need_dweights, ctx.backend
    dsources, dweights = _convex_combination_backward_op(*arguments)
    dsources = [t if needed else None for t, needed in zip(dsources, need, strict=True)]
    return dsources, dweights if need_dweights else None, None, None


_convex_combination_op.register_autograd(_op_gradients, setup_context=_op_setup)


def _operator(weights: torch.Tensor, stacked: bool, *tensors_and_backend: Any) -> Any:
    *tensors, backend = tensors_and_backend
    return _convex_combination_op(tensors, weights, stacked, backend)


OP = _dispatch.Op(_formula, _operator, _dispatch.recorder(ConvexCombinationFunction), _launch)
