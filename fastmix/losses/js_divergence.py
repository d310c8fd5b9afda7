"""Jensen-Shannon divergence of K predictions for each row: AugMix's consistency.

    loss[n]     = scale*(1/K) * sum over k of KL(p_k || m)       p_k = softmax(z_k[n]),  m = mean over k of p_k
    dL/dz_k[c]  = scale*(1/K) * p_k[c]*(log p_k[c] - log m[c] - KL(p_k || m))

logits [K, N, C] ("stacked") or K tensors [N, C].
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._torch.js_divergence import js_divergence_formula
from . import _common


def js_divergence(logits: Tensor | Sequence[Tensor], *, scale: float = 1.0, reduction: str = "mean") -> Tensor:
    """Jensen-Shannon divergence of K predictions for each row, its gradient formed in the same pass: AugMix's consistency.

        loss[n] = scale * (1/K) * sum over k of KL(p_k || m)      p_k = softmax(logits[k, n]),  m = mean over k of p_k

    0 where all agree, at most `scale * log(K)`. Nothing is clamped: a class to which one set gives no probability (a logit of
    -inf) adds 0 there and has gradient 0. Small divergences are as exact as large ones, where log m is never subtracted from
    log p_k. A +inf or NaN logit, or a set with all classes masked, gives NaN in its own row. The logits are never written, and
    the device is never waited for.

    Args:
        logits: one stacked tensor `[K, N, C]`, or a sequence of K tensors `[N, C]` of one shape and dtype, which is not stacked;
            K from 1 to 16. float16, bfloat16, float32 or float64.
        scale: a factor on the loss. Multiplied here rather than afterwards, the gradient that the forward has formed is the
            final one, and the backward does not touch memory again.
        reduction: `"mean"` or `"sum"` over rows, or `"none"` (`[N]`).

    Returns:
        The loss in float32 (float64 for float64). Differentiable once in the logits:
        `dL/dlogits[k, n, c] = scale * (1/K) * p_k[c] * (log p_k[c] - log m[c] - KL(p_k || m))`. Only those sets' gradients are
        formed that need one.

    Raises:
        TypeError, ValueError: a wrong argument.
        RuntimeError: a second derivative, which begins with a backward under `create_graph=True`.

    Source: AugMix, arXiv:1912.02781. Its term is 12 times this at K = 3, up to its clamp of m at 1e-7:

    >>> import torch, fastmix
    >>> logits_all = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 1.0]])  # clean, then two
    >>> fastmix.js_divergence(logits_all.view(3, -1, 2), scale=12.0)
    tensor(0.4581)
    >>> fastmix.js_divergence(logits_all.chunk(3), reduction="none")
    tensor([0.0606, 0.0158])
    """
    sources = _check.sources("logits", logits)
    stacked = isinstance(sources, Tensor)
    if sources[0].dim() != 2 or sources[0].shape[1] == 0:
        name, shape = ("logits", "[K, N, C]") if stacked else ("logits[0]", "[N, C]")
        raise _check.wrong(ValueError, name, f"shape {shape} with at least one class", sources if stacked else sources[0])
    scale, reduction = _check.number("scale", scale), _check.reduction(reduction)
    tensors = (sources,) if stacked else sources
    return _dispatch.call(OP, tensors, scale, reduction, stacked, *tensors)


def _formula(scale: float, reduction: str, stacked: bool, *sources: Any) -> Tensor:
    return js_divergence_formula(_dispatch.as_given(stacked, sources), scale, reduction)


def _launch(scale: float, reduction: str, stacked: bool, *sources: Any) -> Tensor:
    need = _dispatch.as_given(stacked, (False,) * len(sources))
    return _backend.of(sources[0]).js_divergence_fwd(_dispatch.as_given(stacked, sources), scale, reduction, need, False)[0]


class JSDivergenceFunction(Function):
    """(scale, reduction, stacked, *sources) -> loss. `stacked`: the only source is [K, N, C]; else each of the K is [N, C].
    Gradients to the sources, formed as in SoftCrossEntropyFunction."""

    @staticmethod
    def forward(ctx: Any, scale: float, reduction: str, stacked: bool, *sources: Any) -> Any:
        ctx.backend, ctx.stacked, ctx.options = _backend.of(sources[0]), stacked, (scale, reduction)
        ctx.need = _dispatch.as_given(stacked, ctx.needs_input_grad[3:])
        given, form_gradient = _dispatch.as_given(stacked, sources), _common.forms_gradient(sources[0])
        loss, ctx.stats, ctx.cached_grad = ctx.backend.js_divergence_fwd(given, *ctx.options, ctx.need, form_gradient)
        ctx.save_for_backward(*sources)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _common.check_backward("js_divergence", grad_output, "log_softmax and torch.nn.functional.kl_div")
        given = _dispatch.as_given(ctx.stacked, ctx.saved_tensors)
        upstream = _common.by_row(grad_output), _common.take_cached_grad(ctx)
        gradients = ctx.backend.js_divergence_bwd(given, *ctx.options, ctx.stats, *upstream, ctx.need)
        return None, None, None, *((gradients,) if ctx.stacked else gradients)


@custom_op("fastmix::js_divergence", mutates_args=())
def _js_divergence_op(
    sources: list[Tensor], scale: float, reduction: str, stacked: bool, backend: str
) -> tuple[Tensor, Tensor]:
    need = _dispatch.as_given(stacked, (True,) * len(sources))
    return _backend.module(backend).js_divergence_fwd(_dispatch.as_given(stacked, sources), scale, reduction, need, False)[:2]


@_js_divergence_op.register_fake
def _(sources: list[Tensor], scale: float, reduction: str, stacked: bool, backend: str) -> list[Tensor] | tuple[Tensor, Tensor]:
    each = sources[0] if stacked else sources
    loss = _common.loss_like(each[0], reduction)
    return loss, loss.new_empty((3, len(each), each[0].shape[0]))


@custom_op(
    "fastmix::js_divergence_backward",
    mutates_args=(),
    schema="(Tensor g, Tensor[] sources, float scale, str reduction, bool stacked, Tensor stats, bool[] need, str backend) "
    "-> Tensor[]",
)
def _js_divergence_backward_op(
    grad_output: Tensor,
    sources: list[Tensor],
    scale: float,
    reduction: str,
    stacked: bool,
    stats: Tensor,
    need: list[bool],
    backend: str,
) -> list[Tensor]:
    given, need = _dispatch.as_given(stacked, sources), _dispatch.as_given(stacked, need)
    gradients = _backend.module(backend).js_divergence_bwd(given, scale, reduction, stats, grad_output, None, need)
    return [_dispatch.or_empty(t, grad_output) for t in ((gradients,) if stacked else gradients)]


@_js_divergence_backward_op.register_fake
def _(
    grad_output: Tensor,
    sources: list[Tensor],
    scale: float,
    reduction: str,
    stacked: bool,
    stats: Tensor,
    need: list[bool],
    backend: str,
) -> list[Tensor] | tuple[Tensor, Tensor]:
    return [t.new_empty(t.shape) if needed else grad_output.new_empty(0) for t, needed in zip(sources, need, strict=True)]


def _op_setup(ctx: Any, inputs: tuple[list[Tensor], float, str, bool, str], output: tuple[Tensor, Tensor]) -> None:
    sources, *ctx.options, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*sources, output[1])


def _op_gradients(ctx: Any, grad_output: Tensor, _: Any) -> Any:
    *sources, stats = ctx.saved_tensors
    need = ctx.needs_input_grad[0]
    gradients: Any = [None] * len(sources)
    if grad_output is not None:
        gradients = _js_divergence_backward_op(grad_output, sources, *ctx.options, stats, need, ctx.backend)
    return [t if needed else None for t, needed in zip(gradients, need, strict=True)], None, None, None, None


_js_divergence_op.register_autograd(_op_gradients, setup_context=_op_setup)


def _operator(scale: float, reduction: str, stacked: bool, *sources_and_backend: Any) -> Any:
    *sources, backend = sources_and_backend
    return _js_divergence_op(sources, scale, reduction, stacked, backend)[0]


OP = _dispatch.Op(_formula, _operator, _dispatch.recorder(JSDivergenceFunction), _launch)
