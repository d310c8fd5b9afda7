"""Softmax cross-entropy on soft targets: K-hot ones (SoftTarget, class indices) and dense ones (probabilities, MixedRows).

    loss = sum_k a_k*((1-e)*w[c_k]*(lse - z[c_k]) + (e/C)*sum_c w[c]*(lse - z[c]))      K-hot
    loss = sum_c w[c]*t'[c]*(lse - z[c]),   t' = (1-e)*t + e/C                           dense

logits z [N, C, d1, ...], weights a and classes c [N, K, ...], class weights w [C], label smoothing e. "mean" divides by the sum of
a_k*w[c_k] (K-hot), or by the number of rows (dense).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._dtypes import accumulator
from .._torch._losses import component_weights, reduced
from .._torch.soft_cross_entropy import dense_cross_entropy_formula, soft_cross_entropy_formula
from ..targets import STOCK_LOSSES, MixedRows, SoftTarget
from . import _common, _target
from ._common import Maybe

INSTEAD = "torch.nn.functional.cross_entropy on target.dense(C)"


class Options(NamedTuple):
    """The options that are numbers and words."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"


def checked_options(ignore_index: Any, label_smoothing: Any, reduction: str) -> Options:
    """Checks options, and returns them as Python numbers."""
    ignore_index = _check.integer("ignore_index", ignore_index, -(2**63), "an int of 64 bits")
    return Options(ignore_index, _check.label_smoothing(label_smoothing), _check.reduction(reduction))


def checked_smooth_over(value: str) -> str:
    return _check.one_of("smooth_over", value, ("all", "finite"), "'all' or 'finite'")


def soft_cross_entropy(
    logits: Tensor,
    target: SoftTarget | MixedRows | Tensor | dict[str, Any],
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    smooth_over: str = "all",
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross-entropy on soft targets, its gradient formed in the same pass over the logits.

    Per row, over the components (c_k, a_k) whose class is not `ignore_index`, with smoothing e and class weights w:

        loss = sum_k a_k * ((1-e)*w[c_k]*(lse - z[c_k]) + (e/C)*sum_c w[c]*(lse - z[c]))

    `"mean"` divides the sum by `D = sum of a_k*w[c_k]`. On class indices this is `torch.nn.functional.cross_entropy`. Dense
    rows follow its rule for probabilities, `t' = (1-e)*t + e/C` and a mean over N*d1*...  No dense target is made of a
    `SoftTarget`, the logits are never written, and the device is never waited for. Masked classes (logits of -inf) are fine
    where their target weight is 0. A mean over nothing is NaN, as in torch, but gradients are 0 there, also where torch has NaN.

    Args:
        logits: `[N, C]` or `[N, C, d1, ...]`, float16, bfloat16, float32 or float64.
        target: a `SoftTarget`; class indices `[N]` or `[N, d1, ...]` int64; `MixedRows`; the `parts()` of either; or
            probabilities in the logits' shape.
        weight: `[C]`, a constant weight of each class.
        ignore_index: components of this class count for nothing (their row too, if it has no other); the class itself stays
            in the softmax. In dense rows its column counts as 0.
        label_smoothing: e, in [0, 1], beside the smoothing of a `SoftTarget` that has its own.
        smooth_over: `"all"` classes, or those with `"finite"` logits, where masked ones (-inf) are to get none of e: each
            of F finite classes has e/F. A dense target is made for that.
        reduction: `"mean"`, `"sum"` or `"none"` (`[N]` or `[N, d1, ...]`).

    Returns:
        The loss in float32 (float64 for float64). Differentiable once in `logits`, in `target.weights` (so in lambda: for a
        pair without class weights `-(1-e)*(z[ya] - z[yb])` per row), and in dense targets.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also a class out of range (on a GPU its row becomes NaN).
        RuntimeError: a second derivative, which begins with a backward under `create_graph=True`.

    Source: mixup, arXiv:1710.09412; label smoothing, arXiv:1512.00567.

    >>> import torch, fastmix
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> target = fastmix.SoftTarget(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    >>> fastmix.soft_cross_entropy(logits, target)
    tensor(0.8955)
    >>> fastmix.soft_cross_entropy(logits, target.dense(3), reduction="none")
    tensor([0.8395, 0.9514])
    """
    _common.check_logits(logits)
    options = checked_options(ignore_index, label_smoothing, reduction)
    weight = _check.class_weight("weight", weight, logits)
    parts, smoothing = _target.read(logits, target, options.ignore_index)
    if smoothing:
        options = options._replace(label_smoothing=_target.compose(options.label_smoothing, smoothing))
    if smooth_over != "all" and checked_smooth_over(smooth_over) and options.label_smoothing:
        return _smoothed_over_finite(logits, parts, weight, options)
    if isinstance(parts, _target.Dense):
        return _dispatch.call(DENSE, (logits, parts.values), logits, *parts, weight, options)
    if logits.shape[1] == 1 and options.label_smoothing:
        options = options._replace(label_smoothing=0.0)  # with C = 1 smoothing has no effect but rounding
    return _dispatch.call(HOT, (logits, parts.weights), logits, *parts, weight, options)


def _smoothed_over_finite(logits: Tensor, parts: Any, class_weight: Tensor | None, options: Options) -> Any:
    """The loss where e is spread over the classes whose logits are not -inf, by a dense target."""
    C, e, ignored = logits.shape[1], options.label_smoothing, options.ignore_index
    finite = logits.detach() != -torch.inf
    spread = e / finite.sum(1, keepdim=True).to(accumulator(logits.dtype))  # of each finite class
    dense_options = options._replace(label_smoothing=0.0, ignore_index=-1, reduction="none")
    if isinstance(parts, _target.Dense):
        rows = parts.values if parts.partners is None else _target.mixed(logits, *parts)
        if 0 <= ignored < C:
            rows = rows.index_fill(1, torch.full((1,), ignored, device=rows.device), 0)
        rows, divisor = (1 - e) * rows + torch.where(finite, spread, 0), None
    else:
        classes = parts.classes
        weights = component_weights(classes, parts.weights, spread.dtype).masked_fill(classes == ignored, 0)
        known = torch.where((classes >= 0) & (classes < C), classes, 0)
        weights = torch.where((known == classes) | (classes == ignored), weights, torch.nan)  # a device cannot refuse a class
        hard = weights.new_zeros(logits.shape).scatter_add(1, known, weights)
        # `where`: no gradient to the weights comes from a masked class, whose loss is infinite
        rows = (1 - e) * hard + torch.where(finite, weights.sum(1, keepdim=True) * spread, 0)
        divisor = (weights if class_weight is None else weights * class_weight[known]).sum()
    arguments = logits, rows, None, None, class_weight, dense_options
    losses = _dispatch.call(DENSE, (logits, rows), *arguments)
    return reduced(losses, losses.numel() if divisor is None else divisor, options.reduction)


def _stock_cross_entropy(
    input: Tensor,
    target: SoftTarget | MixedRows,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`, with its signature, on a target of ours."""
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    return soft_cross_entropy(input, target, weight=weight, **options)


STOCK_LOSSES[torch.nn.functional.cross_entropy] = _stock_cross_entropy


# K-hot targets


def _launch(logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, options: Options) -> Tensor:
    return _backend.of(logits).soft_ce_fwd(logits, weights, classes, class_weight, options, False, False)[0]


def _function(logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, options: Options) -> Tensor:
    return _dispatch.recorder(SoftCrossEntropyFunction)(logits, weights, classes, class_weight, options)


class SoftCrossEntropyFunction(Function):
    """(logits [N, C, ...], weights [N, K, ...] or None, classes [N, K, ...], class weights [C] or None, Options) -> loss. Gradients
    to logits and weights.

    The forward forms the gradient to the logits; the first backward takes it, and changes it only where the upstream gradient
    is not 1; a later backward over a retained graph forms it anew from the logits, which are never written.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe = None, *options: Any) -> Any:
        ctx.backend = backend = _backend.of(logits)
        ctx.options = options = _common.as_options(Options, options)
        need_dlogits, need_dweights = ctx.needs_input_grad[:2]
        needs = need_dweights, need_dlogits and _common.forms_gradient(logits)
        forward = backend.soft_ce_fwd(logits, weights, classes, class_weight, options, *needs)
        loss, denominator, ctx.stats, ctx.per_component, ctx.cached_grad = forward
        # a copy: the caller may change the loss in place
        ctx.mean = denominator, loss.clone() if need_dweights and denominator is not None else None
        ctx.save_for_backward(logits, weights, classes, class_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _common.check_backward("soft_cross_entropy", grad_output, INSTEAD)
        logits, weights, classes, class_weight = ctx.saved_tensors
        target, options, (denominator, mean_loss) = (weights, classes, class_weight), ctx.options, ctx.mean
        need_dlogits, need_dweights = _dispatch.inputs_needing_grad(ctx)[:2]
        dlogits = dweights = None
        if need_dlogits:
            upstream = _common.by_row(grad_output), _common.take_cached_grad(ctx)
            dlogits = ctx.backend.soft_ce_bwd(logits, *target, options, denominator, ctx.stats, *upstream)
        if need_dweights:
            forward = ctx.per_component, mean_loss, denominator
            dweights = _weights_gradient(grad_output, *target, options.ignore_index, *forward)
        return dlogits, dweights, *_common.NO_GRADIENTS


def _weights_gradient(
    grad_output: Tensor,
    weights: Tensor,
    classes: Tensor,
    class_weight: Maybe,
    ignore_index: int,
    per_component: Tensor,
    loss: Any,
    denominator: Tensor | None,
) -> Tensor:
    """Each component's own loss v; under "mean", where the denominator D depends on the weights too,
    d(L/D)/da = (v - (L/D)*w[c]) / D."""
    if denominator is None:
        return _common.as_weights(per_component * _per_component(grad_output), weights)
    by_denominator = loss
    if class_weight is not None:
        w = class_weight[classes.clamp(0, class_weight.shape[0] - 1)]
        by_denominator = torch.where(w == 0, 0, loss * w)
    gradient = (per_component - by_denominator) * (grad_output / denominator)
    # also where all components are ignored, and D is 0
    return _common.as_weights(gradient.masked_fill_(classes == ignore_index, 0), weights)


def _per_component(grad_output: Tensor) -> Tensor:
    return grad_output if grad_output.dim() == 0 else grad_output.unsqueeze(1)


# The operators keep a few numbers a row between forward and backward, and form the gradient in the backward: a traced program may
# not change what it has saved, as the Functions do with the gradient that they cache. Their schemas are written out, since all
# four pass the same options on.

_HOT = "Tensor logits, Tensor? weights, Tensor classes"
_DENSE = "Tensor logits, Tensor target"
_OPTIONS = "Tensor? class_weight, SymInt ignore_index, float label_smoothing"


@custom_op(
    "fastmix::soft_cross_entropy",
    mutates_args=(),
    schema=f"({_HOT}, {_OPTIONS}, str reduction, bool need_dweights, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _soft_cross_entropy_op(
    logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *numbers, need_dweights, backend = rest
    options = Options(*numbers)
    # no value could be read while tracing
    _check.in_range("target", classes, logits.shape[1], "a class", options.ignore_index)
    forward = _backend.module(backend).soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, False)
    loss, denominator, stats, per_component, _ = forward
    per_component = loss.new_empty(0) if per_component is None else _dispatch.as_promised(per_component, classes)
    return loss, _dispatch.or_empty(denominator, loss), stats, per_component


@_soft_cross_entropy_op.register_fake
def _(logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, *rest: Any) -> Any:
    *numbers, need_dweights, backend = rest
    options = Options(*numbers)
    loss = _common.loss_like(logits, options.reduction)
    denominator = loss.new_empty(() if options.reduction == "mean" else 0)
    stats = loss.new_empty(3 if options.label_smoothing > 0 else 2, logits.numel() // logits.shape[1])
    per_component = torch.empty_like(classes, dtype=loss.dtype) if need_dweights else loss.new_empty(0)
    return loss, denominator, stats, per_component


@custom_op(
    "fastmix::soft_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor g, {_HOT}, {_OPTIONS}, Tensor? mass, Tensor stats, str backend) -> Tensor",
)
def _soft_cross_entropy_backward_op(
    grad_output: Tensor, logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, *rest: Any
) -> Tensor:
    ignore_index, smoothing, denominator, stats, backend = rest
    options = Options(ignore_index, smoothing, "sum" if denominator is None else "mean")
    target = weights, classes, class_weight, options
    upstream = _common.by_row(grad_output), None
    dlogits = _backend.module(backend).soft_ce_bwd(logits, *target, denominator, stats, *upstream)
    return _dispatch.as_promised(dlogits, logits)


@_soft_cross_entropy_backward_op.register_fake
def _(grad_output: Tensor, logits: Tensor, *_: Any) -> Any:
    return torch.empty_like(logits)


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    logits, weights, classes, class_weight, *options, _, ctx.backend = inputs
    ctx.options = Options(*options)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, weights, classes, class_weight, *output)


def _op_gradients(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, weights, classes, class_weight, loss, denominator, stats, per_component = ctx.saved_tensors
    target = weights, classes, class_weight
    dlogits = dweights = None
    if grad_output is not None:
        denominator = denominator if ctx.options.reduction == "mean" else None
        if ctx.needs_input_grad[0]:
            options = ctx.options[:-1]  # all but the reduction, which is in the denominator
            rest = *options, denominator, stats, ctx.backend
            dlogits = _soft_cross_entropy_backward_op(grad_output, logits, *target, *rest)
        if ctx.needs_input_grad[1]:
            dweights = _weights_gradient(grad_output, *target, ctx.options.ignore_index, per_component, loss, denominator)
    return dlogits, dweights, *[None] * (4 + len(ctx.options))


_soft_cross_entropy_op.register_autograd(_op_gradients, setup_context=_op_setup)


def _operator(logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, options: Options, backend: str) -> Tensor:
    need_dweights = _dispatch.differentiates(weights)
    return _soft_cross_entropy_op(logits, weights, classes, class_weight, *options, need_dweights, backend)[0]


HOT = _dispatch.Op(soft_cross_entropy_formula, _operator, _function, _launch)


# Dense targets


def _dense_formula(logits: Tensor, target: Tensor, lam: Maybe, index: Maybe, class_weight: Maybe, options: Options) -> Tensor:
    target = target if index is None else _target.mixed(logits, target, lam, index)
    return dense_cross_entropy_formula(logits, target, class_weight, options)


def _dense_launch(logits: Tensor, target: Tensor, lam: Maybe, index: Maybe, class_weight: Maybe, options: Options) -> Tensor:
    return _backend.of(logits).dense_ce_fwd(logits, target, lam, index, class_weight, options, False)[0]


def _dense_function(logits: Tensor, target: Tensor, lam: Maybe, index: Maybe, class_weight: Maybe, options: Options) -> Tensor:
    return _dispatch.recorder(DenseCrossEntropyFunction)(logits, target, class_weight, *options, lam, index)


class DenseCrossEntropyFunction(Function):
    """(logits [N, C, ...], target of that shape, class weights [C] or None, ignore_index, smoothing, reduction; lam [] or
    [N] and index [N], with which the target is mixed while it is read) -> loss. Gradients to logits, formed as in
    SoftCrossEntropyFunction, and to a target that is not mixed."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Maybe = None,
        ignore_index: int = -100,
        smoothing: float = 0.0,
        reduction: str = "mean",
        lam: Maybe = None,
        index: Maybe = None,
    ) -> Any:
        ctx.backend, ctx.options = _backend.of(logits), Options(ignore_index, smoothing, reduction)
        form_gradient = ctx.needs_input_grad[0] and _common.forms_gradient(logits)
        inputs = logits, target, lam, index, class_weight
        loss, ctx.stats, ctx.cached_grad = ctx.backend.dense_ce_fwd(*inputs, ctx.options, form_gradient)
        ctx.save_for_backward(*inputs)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _common.check_backward("soft_cross_entropy", grad_output, INSTEAD)
        need = _dispatch.inputs_needing_grad(ctx)[:2]
        upstream = _common.by_row(grad_output), _common.take_cached_grad(ctx) if need[0] else None
        gradients = ctx.backend.dense_ce_bwd(*ctx.saved_tensors, ctx.options, ctx.stats, *upstream, need)
        return *gradients, *[None] * (3 + len(ctx.options))


@custom_op(
    "fastmix::dense_cross_entropy",
    mutates_args=(),
    schema=f"({_DENSE}, {_OPTIONS}, str reduction, Tensor? lam, Tensor? index, str backend) -> (Tensor, Tensor)",
)
def _dense_cross_entropy_op(logits: Tensor, target: Tensor, class_weight: Maybe, *rest: Any) -> tuple[Tensor, Tensor]:
    *options, lam, index, backend = rest
    if index is not None:
        _check.in_range("target.index", index, target.shape[0], "a partner")
    return _backend.module(backend).dense_ce_fwd(logits, target, lam, index, class_weight, Options(*options), False)[:2]


@_dense_cross_entropy_op.register_fake
def _(logits: Tensor, target: Tensor, class_weight: Maybe, *rest: Any) -> Any:
    *_, reduction, lam, index, backend = rest
    loss = _common.loss_like(logits, reduction)
    return loss, loss.new_empty(3, logits.numel() // logits.shape[1])


@custom_op(
    "fastmix::dense_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor g, {_DENSE}, {_OPTIONS}, str reduction, Tensor? lam, Tensor? index, Tensor stats, bool need_dlogits, "
    "bool need_dtarget, str backend) -> (Tensor, Tensor)",
)
def _dense_cross_entropy_backward_op(
    grad_output: Tensor, logits: Tensor, target: Tensor, class_weight: Maybe, *rest: Any
) -> tuple[Tensor, Tensor]:
    *options, lam, index, stats, need_dlogits, need_dtarget, backend = rest
    inputs = logits, target, lam, index, class_weight
    upstream = _common.by_row(grad_output), None
    backward = _backend.module(backend).dense_ce_bwd
    dlogits, dtarget = backward(*inputs, Options(*options), stats, *upstream, (need_dlogits, need_dtarget))
    return _dispatch.as_promised(dlogits, logits), _dispatch.as_promised(dtarget, target)


@_dense_cross_entropy_backward_op.register_fake
def _(grad_output: Tensor, logits: Tensor, target: Tensor, *rest: Any) -> Any:
    *_, need_dlogits, need_dtarget, backend = rest
    dlogits = torch.empty_like(logits) if need_dlogits else logits.new_empty(0)
    return dlogits, torch.empty_like(target) if need_dtarget else target.new_empty(0)


def _dense_op_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, class_weight, *ctx.options, lam, index, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, class_weight, lam, index, output[1])


def _dense_op_gradients(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, target, class_weight, lam, index, stats = ctx.saved_tensors
    need, gradients = ctx.needs_input_grad[:2], (None, None)
    if grad_output is not None:
        rest = class_weight, *ctx.options, lam, index, stats, *need, ctx.backend
        gradients = _dense_cross_entropy_backward_op(grad_output, logits, target, *rest)
    return *(t if needed else None for t, needed in zip(gradients, need, strict=True)), *[None] * (4 + len(ctx.options))


_dense_cross_entropy_op.register_autograd(_dense_op_gradients, setup_context=_dense_op_setup)


def _dense_operator(
    logits: Tensor, target: Tensor, lam: Tensor, index: Tensor, class_weight: Maybe, options: Options, backend: str
) -> Tensor:
    return _dense_cross_entropy_op(logits, target, class_weight, *options, lam, index, backend)[0]


DENSE = _dispatch.Op(_dense_formula, _dense_operator, _dense_function, _dense_launch)
