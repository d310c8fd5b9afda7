"""Sigmoid (binary) cross-entropy on soft targets: K-hot ones (SoftTarget, class indices) and dense ones (rows, MixedRows).

    loss = mean or sum over classes of w*(p*t'*softplus(-z) + (1-t')*softplus(z))
    t'   = (1-e)*t + e/C     K-hot: t is the sum of the weights that name the class
    t'   = (1-e)*t + e/2     dense

logits z [N, C, d1, ...], class weights w and weights p of the positive term [C], label smoothing e. With a threshold t' becomes 1
where it exceeds it, else 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._torch.soft_binary_cross_entropy import dense_binary_cross_entropy_formula, soft_binary_cross_entropy_formula
from ..targets import MixedRows, SoftTarget, of_parts
from . import _common, _elements, _target
from ._common import Maybe

INSTEAD = "torch.nn.functional.binary_cross_entropy_with_logits on target.dense(C)"


class Options(NamedTuple):
    """The options that are numbers and words."""

    label_smoothing: float = 0.0
    threshold: float | None = None
    class_reduction: str = "mean"
    reduction: str = "mean"


def checked_options(label_smoothing: float, threshold: float | str | None, class_reduction: str, reduction: str) -> Options:
    """Checks options, and returns them as Python numbers."""
    smoothing, reduction = _check.label_smoothing(label_smoothing), _check.reduction(reduction)
    threshold = None if threshold is None else _check.threshold(threshold)
    _check.one_of("class_reduction", class_reduction, ("mean", "sum", "none"), "'mean', 'sum' or 'none'")
    return Options(smoothing, threshold, class_reduction, reduction)


def soft_binary_cross_entropy(
    logits: Tensor,
    target: SoftTarget | MixedRows | Tensor | dict[str, Any],
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
    class_reduction: str = "mean",
    ignore_value: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid (binary) cross-entropy on soft targets, its gradient formed in the same pass over the logits.

    With the target t of each class, smoothing e, class weights w and weights p of the positive term, the loss of a row is the
    mean (or sum) over its classes of

        w * (p * t' * softplus(-z) + (1 - t') * softplus(z)),      t' = (1-e)*t + e/C     SoftTarget, class indices
                                                                   t' = (1-e)*t + e/2     MixedRows, dense rows

    Here t is the sum of the weights that name the class, so a row mixed with one of its own class has t = 1 there. With a threshold,
    t' is then set to 1 where it exceeds the threshold and to 0 elsewhere. On dense rows without smoothing this is
    `torch.nn.functional.binary_cross_entropy_with_logits`; smoothing and threshold are those of timm's `Mixup` and
    `BinaryCrossEntropy` (`class_reduction="sum"` its `sum_classes`). No dense target is made of a `SoftTarget`, the logits are never
    written, and the device is never waited for. A term of a class whose weight is exactly 0 is not read: `+inf` where t' is
    1 and `-inf` where it is 0 cost nothing, and neither does NaN where w is 0. A mean over nothing is NaN, as in torch.

    Args:
        logits: `[N, C]` or `[N, C, d1, ...]`, float16, bfloat16, float32 or float64.
        target: a `SoftTarget`; class indices `[N]` or `[N, d1, ...]` int64; `MixedRows`; the `parts()` of either; or rows in
            the logits' shape. Values outside [0, 1] extrapolate.
        weight: `[C]`, a constant weight of each class.
        pos_weight: `[C]`, a constant weight of each class's positive term; or a float, 0-d or `[1]`: the same for all classes.
            For logits `[N, C]` also `[1, C]`, as torch broadcasts.
        label_smoothing: e, in [0, 1], beside the smoothing of a `SoftTarget` that has its own.
        threshold: makes targets 0 or 1, after mixing and smoothing; compared in the precision of the loss.
        class_reduction: `"mean"` or `"sum"`, over the classes of a row; `"none"` gives every element's loss, in the logits'
            shape, and nothing is reduced then.
        ignore_value: the value of a label that is not known, in dense rows and in those of `MixedRows`; `math.nan` for NaN. Such
            an element counts for nothing, in the means neither: a row's mean is over its known labels, and that of the rows over
            those that have one. Mixing keeps it: a mixed label is known if all that it has weight of are. Rows that are mixed
            before the loss sees them (a slice of `MixedRows`, partners of another batch) keep NaN alone: a number would have been
            mixed, and is a `ValueError` (slices of `parts()` keep it). In dense rows that you have mixed yourself it cannot be seen.
            With it, or with `class_reduction="none"`, the loss is computed by plain torch operations, in several passes.
        reduction: `"mean"`, `"sum"` or `"none"` (`[N]` or `[N, d1, ...]`), over rows.

    Returns:
        The loss in float32 (float64 for float64). Differentiable once in `logits`, in `target.weights` (so in lambda: for a
        pair `dl/dt_a - dl/dt_b` with `dl/dt = (1-e)*w*(p*softplus(-z) - softplus(z))`, over C for a mean), and in dense
        targets, those of `MixedRows` with their lambda. To a target with a threshold the gradient is 0.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also a class out of range (on a GPU its row becomes NaN). No class
            is ignored.
        RuntimeError: a second derivative, which begins with a backward under `create_graph=True`.

    Source: timm, arXiv:2110.00476 (ResNet strikes back); mixup, arXiv:1710.09412.

    >>> import torch, fastmix
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> target = fastmix.SoftTarget(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    >>> fastmix.soft_binary_cross_entropy(logits, target)
    tensor(0.7021)
    >>> fastmix.soft_binary_cross_entropy(logits, target, threshold=0.2, reduction="none")
    tensor([0.5044, 0.5665])

    The objective that mixup gives a GAN's discriminator d, `l(d(lam*x + (1-lam)*g(z)), lam)` (arXiv:1710.09412, section 3.7),
    on logits `[N, 1]`; the gradient reaches lambda too:

    >>> d, real, fake = torch.nn.Linear(8, 1), torch.rand(4, 8), torch.rand(4, 8)
    >>> lam = torch.rand(4, requires_grad=True)
    >>> mixed = fastmix.convex_combination((real, fake), torch.stack((lam, 1 - lam), 1))
    >>> fastmix.soft_binary_cross_entropy(d(mixed), lam.unsqueeze(1)).backward()
    >>> lam.grad.shape
    torch.Size([4])
    """
    _common.check_logits(logits)
    options = checked_options(label_smoothing, threshold, class_reduction, reduction)
    weight = _check.class_weight("weight", weight, logits)
    pos_weight = _check.positive_weight("pos_weight", pos_weight, logits)
    known = None
    if ignore_value is not None:
        target, known = _elements.known_labels(target, ignore_value)
    parts, smoothing = _target.read(logits, target)
    if known is not None or options.class_reduction == "none":
        return _elements.binary_loss_by_element(logits, parts, smoothing, weight, pos_weight, options, known)
    if smoothing:
        parts, options = _smooth(logits, target, smoothing, parts, options)
    if isinstance(parts, _target.Dense):
        return _dispatch.call(DENSE, (logits, parts.values), logits, *parts, weight, pos_weight, options)
    return _dispatch.call(HOT, (logits, parts.weights), logits, *parts, weight, pos_weight, options)


def _smooth(logits: Tensor, target: Any, smoothing: float, parts: Any, options: Options) -> Any:
    """Applies the smoothing of a SoftTarget, whose row sums to its weights: e/C times their sum."""
    if getattr(target, "_sums_to_one", False):
        return parts, options._replace(label_smoothing=_target.compose(options.label_smoothing, smoothing))
    target = of_parts(target) if isinstance(target, dict) else target
    C, e = logits.shape[1], options.label_smoothing
    rows = target.dense(C)
    # class targets are smoothed by e/C, dense ones would be by e/2
    return _target.Dense((1 - e) * rows + e / C if e else rows), options._replace(label_smoothing=0.0)


# K-hot targets


def _launch(
    logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, pos_weight: Maybe, options: Options
) -> Tensor:
    target = weights, classes, class_weight, pos_weight
    return _backend.of(logits).soft_bce_fwd(logits, *target, options, False, False)[0]


def _function(
    logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, pos_weight: Maybe, options: Options
) -> Tensor:
    return _dispatch.recorder(SoftBinaryCrossEntropyFunction)(logits, weights, classes, class_weight, pos_weight, options)


class SoftBinaryCrossEntropyFunction(Function):
    """(logits [N, C, ...], weights [N, K, ...] or None, classes [N, K, ...], class weights [C] or None, weights [C] of the positive
    term or None, Options) -> loss. Gradients to logits, formed as in
    SoftCrossEntropyFunction, and to weights: 0 under a threshold."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, pos_weight: Maybe, *options: Any
    ) -> Any:
        ctx.backend = backend = _backend.of(logits)
        ctx.options = chosen = _common.as_options(Options, options)
        need_dlogits, need_dweights = ctx.needs_input_grad[:2]
        inputs = logits, weights, classes, class_weight, pos_weight
        needs = need_dweights and chosen.threshold is None, need_dlogits and _common.forms_gradient(logits)
        loss, ctx.slope, ctx.cached_grad = backend.soft_bce_fwd(*inputs, chosen, *needs)
        ctx.save_for_backward(*inputs)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _common.check_backward("soft_binary_cross_entropy", grad_output, INSTEAD)
        inputs = ctx.saved_tensors
        need_dlogits, need_dweights = _dispatch.inputs_needing_grad(ctx)[:2]
        dlogits = dweights = None
        if need_dlogits:
            upstream = _common.by_row(grad_output), _common.take_cached_grad(ctx)
            dlogits = ctx.backend.soft_bce_bwd(*inputs, ctx.options, *upstream)
        if need_dweights:
            dweights = _weights_gradient(grad_output, inputs[1], ctx.options, ctx.slope)
        return dlogits, dweights, *_common.NO_GRADIENTS


def _weights_gradient(grad_output: Tensor, weights: Tensor, options: Options, slope: Any) -> Tensor:
    """The upstream gradient times the loss's derivative by each component's weight; 0 under a threshold."""
    if options.threshold is not None:
        return torch.zeros_like(weights)
    return _common.as_weights(slope * (grad_output if grad_output.dim() == 0 else grad_output.unsqueeze(1)), weights)


# The operators. Their schemas are written out, since all four pass the same options on.

_HOT = "Tensor logits, Tensor? weights, Tensor classes"
_DENSE = "Tensor logits, Tensor target"
_MIXED_ROWS = "Tensor? lam, Tensor? index"
_OPTIONS = (
    "Tensor? class_weight, Tensor? pos_weight, float label_smoothing, float? threshold, str class_reduction, str reduction"
)


@custom_op(
    "fastmix::soft_binary_cross_entropy",
    mutates_args=(),
    schema=f"({_HOT}, {_OPTIONS}, bool need_dweights, str backend) -> (Tensor, Tensor)",
)
def _soft_binary_cross_entropy_op(
    logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, pos_weight: Maybe, *rest: Any
) -> tuple[Tensor, Tensor]:
    *options, need_dweights, backend = rest
    _check.in_range("target", classes, logits.shape[1], "a class")  # no value could be read while tracing
    target = weights, classes, class_weight, pos_weight
    loss, slope, _ = _backend.module(backend).soft_bce_fwd(logits, *target, Options(*options), need_dweights, False)
    return loss, loss.new_empty(0) if slope is None else _dispatch.as_promised(slope, classes)


@_soft_binary_cross_entropy_op.register_fake
def _(logits: Tensor, weights: Maybe, classes: Tensor, *rest: Any) -> Any:
    *_, reduction, need_dweights, backend = rest
    loss = _common.loss_like(logits, reduction)
    return loss, torch.empty_like(classes, dtype=loss.dtype) if need_dweights else loss.new_empty(0)


@custom_op(
    "fastmix::soft_binary_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor g, {_HOT}, {_OPTIONS}, str backend) -> Tensor",
)
def _soft_binary_cross_entropy_backward_op(
    grad_output: Tensor, logits: Tensor, weights: Maybe, classes: Tensor, class_weight: Maybe, pos_weight: Maybe, *rest: Any
) -> Tensor:
    *options, backend = rest
    target = weights, classes, class_weight, pos_weight
    dlogits = _backend.module(backend).soft_bce_bwd(logits, *target, Options(*options), _common.by_row(grad_output), None)
    return _dispatch.as_promised(dlogits, logits)


@_soft_binary_cross_entropy_backward_op.register_fake
def _(grad_output: Tensor, logits: Tensor, *_: Any) -> Any:
    return torch.empty_like(logits)


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, weights, classes, class_weight, pos_weight, *options, _, ctx.backend = inputs
    ctx.options = Options(*options)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, weights, classes, class_weight, pos_weight, output[1])


def _op_gradients(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, slope = ctx.saved_tensors
    dlogits = dweights = None
    if grad_output is not None and ctx.needs_input_grad[0]:
        dlogits = _soft_binary_cross_entropy_backward_op(grad_output, *tensors, *ctx.options, ctx.backend)
    if grad_output is not None and ctx.needs_input_grad[1]:
        dweights = _weights_gradient(grad_output, tensors[1], ctx.options, slope)
    return dlogits, dweights, *[None] * (5 + len(ctx.options))


_soft_binary_cross_entropy_op.register_autograd(_op_gradients, setup_context=_op_setup)


def _operator(
    logits: Tensor, weights: Tensor, classes: Tensor, class_weight: Maybe, pos_weight: Maybe, options: Options, backend: str
) -> Any:
    target = weights, classes, class_weight, pos_weight
    need_dweights = options.threshold is None and _dispatch.differentiates(weights)
    return _soft_binary_cross_entropy_op(logits, *target, *options, need_dweights, backend)[0]


HOT = _dispatch.Op(soft_binary_cross_entropy_formula, _operator, _function, _launch)


# Dense targets


def _dense_formula(
    logits: Tensor, target: Tensor, lam: Maybe, index: Maybe, class_weight: Maybe, pos_weight: Maybe, options: Options
) -> Tensor:
    target = target if index is None else _target.mixed(logits, target, lam, index)
    return dense_binary_cross_entropy_formula(logits, target, class_weight, pos_weight, options)


def _dense_launch(
    logits: Tensor, target: Tensor, lam: Maybe, index: Maybe, class_weight: Maybe, pos_weight: Maybe, options: Options
) -> Tensor:
    return _backend.of(logits).dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, False)[0]


def _dense_function(
    logits: Tensor, target: Tensor, lam: Maybe, index: Maybe, class_weight: Maybe, pos_weight: Maybe, options: Options
) -> Tensor:
    record = _dispatch.recorder(DenseBinaryCrossEntropyFunction)
    return record(logits, target, class_weight, pos_weight, *options, lam, index)


class DenseBinaryCrossEntropyFunction(Function):
    """(logits [N, C, ...], target of that shape, class weights [C] or None, weights [C] of the positive term or None,
    smoothing, threshold or None, class_reduction, reduction; lam [] or [N] and index [N], with which the target is mixed
    while it is read) -> loss. Gradients to logits, and to a target that is not mixed: 0 under a threshold."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weight: Maybe,
        pos_weight: Maybe,
        smoothing: float,
        threshold: float | None,
        class_reduction: str,
        reduction: str,
        lam: Maybe = None,
        index: Maybe = None,
    ) -> Any:
        ctx.backend = _backend.of(logits)
        ctx.options = Options(smoothing, threshold, class_reduction, reduction)
        form_gradient = ctx.needs_input_grad[0] and _common.forms_gradient(logits)
        inputs = logits, target, lam, index, class_weight, pos_weight
        loss, ctx.cached_grad = ctx.backend.dense_bce_fwd(*inputs, ctx.options, form_gradient)
        ctx.save_for_backward(*inputs)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        _common.check_backward("soft_binary_cross_entropy", grad_output, INSTEAD)
        need = _dispatch.inputs_needing_grad(ctx)[:2]

        def launch(need_dlogits: bool, need_dtarget: bool) -> tuple[Tensor | None, ...]:
            upstream = _common.by_row(grad_output), _common.take_cached_grad(ctx) if need_dlogits else None
            return ctx.backend.dense_bce_bwd(*ctx.saved_tensors, ctx.options, *upstream, (need_dlogits, need_dtarget))

        return *_dense_gradients(launch, ctx.saved_tensors[1], ctx.options, need), *[None] * (4 + len(ctx.options))


def _dense_gradients(
    launch: Callable[..., Any], target: Tensor, options: Options, need: list[bool] | tuple[bool, bool]
) -> tuple[Tensor | None, ...]:
    """The gradients to logits and target, or None; `launch` forms those it is asked for. Under a threshold the second is 0."""
    need_dlogits, need_dtarget = need
    thresholded = options.threshold is not None
    dlogits, dtarget = launch(need_dlogits, need_dtarget and not thresholded)
    if need_dtarget and thresholded:
        dtarget = torch.zeros_like(target)
    return dlogits if need_dlogits else None, dtarget if need_dtarget else None


@custom_op(
    "fastmix::dense_binary_cross_entropy",
    mutates_args=(),
    schema=f"({_DENSE}, {_OPTIONS}, {_MIXED_ROWS}, str backend) -> Tensor",
)
def _dense_binary_cross_entropy_op(
    logits: Tensor, target: Tensor, class_weight: Maybe, pos_weight: Maybe, *rest: Any
) -> Tensor:
    *options, lam, index, backend = rest
    if index is not None:
        _check.in_range("target.index", index, target.shape[0], "a partner")
    inputs = logits, target, lam, index, class_weight, pos_weight
    return _backend.module(backend).dense_bce_fwd(*inputs, Options(*options), False)[0]


@_dense_binary_cross_entropy_op.register_fake
def _(logits: Tensor, target: Tensor, *rest: Any) -> Any:
    *_, reduction, _, _, backend = rest
    return _common.loss_like(logits, reduction)


@custom_op(
    "fastmix::dense_binary_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor g, {_DENSE}, {_OPTIONS}, {_MIXED_ROWS}, bool need_dlogits, bool need_dtarget, str backend) "
    "-> (Tensor, Tensor)",
)
def _dense_binary_cross_entropy_backward_op(
    grad_output: Tensor, logits: Tensor, target: Tensor, class_weight: Maybe, pos_weight: Maybe, *rest: Any
) -> tuple[Tensor, Tensor]:
    *options, lam, index, need_dlogits, need_dtarget, backend = rest
    inputs = logits, target, lam, index, class_weight, pos_weight
    upstream = _common.by_row(grad_output), None
    backward = _backend.module(backend).dense_bce_bwd
    dlogits, dtarget = backward(*inputs, Options(*options), *upstream, (need_dlogits, need_dtarget))
    return _dispatch.as_promised(dlogits, logits), _dispatch.as_promised(dtarget, target)


@_dense_binary_cross_entropy_backward_op.register_fake
def _(grad_output: Tensor, logits: Tensor, target: Tensor, *rest: Any) -> Any:
    *_, need_dlogits, need_dtarget, backend = rest
    dlogits = torch.empty_like(logits) if need_dlogits else logits.new_empty(0)
    return dlogits, torch.empty_like(target) if need_dtarget else target.new_empty(0)


def _dense_op_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, class_weight, pos_weight, *options, lam, index, ctx.backend = inputs
    ctx.options = Options(*options)
    ctx.save_for_backward(logits, target, class_weight, pos_weight, lam, index)


def _dense_op_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, lam, index = ctx.saved_tensors

    def launch(*need: Any) -> tuple[Tensor, Tensor]:
        rest = *tensors, *ctx.options, lam, index, *need, ctx.backend
        return _dense_binary_cross_entropy_backward_op(grad_output, *rest)

    gradients = _dense_gradients(launch, tensors[1], ctx.options, ctx.needs_input_grad[:2])
    return *gradients, *[None] * (5 + len(ctx.options))


_dense_binary_cross_entropy_op.register_autograd(_dense_op_gradients, setup_context=_dense_op_setup)


def _dense_operator(
    logits: Tensor,
    target: Tensor,
    lam: Tensor,
    index: Tensor,
    class_weight: Maybe,
    pos_weight: Maybe,
    options: Options,
    backend: str,
) -> Tensor:
    return _dense_binary_cross_entropy_op(logits, target, class_weight, pos_weight, *options, lam, index, backend)


DENSE = _dispatch.Op(_dense_formula, _dense_operator, _dense_function, _dense_launch)
