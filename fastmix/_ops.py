"""The ops as torch.library operators, which is what `torch.compile` and `torch.export` see of them: opaque, with the shapes of
their results and their derivatives. A program keeps the backend that was chosen when it was traced.

Eager calls do not come here: the dispatcher costs several times as much as an autograd Function.
"""

import torch
from torch.library import custom_op

from . import _backend, _check
from ._expressions import accumulator
from .autograd.soft_bce import Options as BinaryOptions
from .autograd.soft_bce import weights_gradient as binary_weights_gradient
from .autograd.soft_ce import Options, weights_gradient


def backend_name(device: torch.device) -> str:
    """The backend for tensors of a device, as a constant of the traced program."""
    return _backend.name(device)


# what torch.compiler.assume_constant_result does, which would import the whole compiler for it
backend_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _strides_like(like):
    """The strides that `empty_like(like)` has: those that are promised while tracing."""
    return torch.empty_like(like, device="meta").stride()


def _laid_out_as(t, like):
    """t in the strides promised for it; an empty tensor for None."""
    if t is None:
        return like.new_empty(0)
    return t if t.stride() == _strides_like(like) else torch.empty_like(like, dtype=t.dtype).copy_(t)


def _or_empty(t, like):
    return like.new_empty(0) if t is None else t


# Mixing


@custom_op("fastmix::mix", mutates_args=())
def mix(x: torch.Tensor, lam: torch.Tensor, index: torch.Tensor, box: torch.Tensor | None, backend: str) -> torch.Tensor:
    _check.in_range("index", index, x.shape[0], "a partner")  # nothing could be looked at while tracing
    return _laid_out_as(_backend.module(backend).mix_fwd(x, lam, index, box, None), x)


@mix.register_fake
def _(x, lam, index, box, backend):
    return torch.empty_like(x)


@custom_op("fastmix::mix_backward", mutates_args=())
def mix_backward(
    g: torch.Tensor,
    x: torch.Tensor | None,
    lam: torch.Tensor,
    index: torch.Tensor,
    box: torch.Tensor | None,
    need_dx: bool,
    need_dlam: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dlam = _backend.module(backend).mix_bwd(g, x, lam, index, box, _strides_like(g), need_dx, need_dlam)
    return _laid_out_as(dx, g), _or_empty(dlam, lam)


@mix_backward.register_fake
def _(g, x, lam, index, box, need_dx, need_dlam, backend):
    return torch.empty_like(g) if need_dx else g.new_empty(0), lam.new_empty(g.shape[0] if need_dlam else 0)


def _mix_setup(ctx, inputs, output):
    x, lam, index, box, ctx.backend = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, lam, index, box)


def _mix_gradients(ctx, g):
    x, lam, index, box = ctx.saved_tensors
    need_dx, need_dlam = ctx.needs_input_grad[:2]
    dx, dlam = mix_backward(g, x, lam, index, box, need_dx, need_dlam, ctx.backend)
    if lam.dim() == 0:
        dlam = dlam.sum()
    return dx if need_dx else None, dlam if need_dlam else None, None, None, None


mix.register_autograd(_mix_gradients, setup_context=_mix_setup)


@custom_op("fastmix::mix_masked", mutates_args=())
def mix_masked(
    x: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor,
    plan: torch.Tensor | None,
    partner_plan: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check.in_range("index", index, x.shape[0], "a partner")
    for name, value in (("plan", plan), ("partner_plan", partner_plan)):
        if value is not None:
            _check.in_range(name, value, value.shape[1], "a block")
    return _laid_out_as(_backend.module(backend).mix_masked_fwd(x, mask, index, plan, partner_plan), x)


@mix_masked.register_fake
def _(x, mask, index, plan, partner_plan, backend):
    return torch.empty_like(x)


@custom_op("fastmix::mix_masked_backward", mutates_args=())
def mix_masked_backward(
    g: torch.Tensor,
    x: torch.Tensor | None,
    mask: torch.Tensor,
    index: torch.Tensor,
    plan: torch.Tensor | None,
    partner_plan: torch.Tensor | None,
    need_dx: bool,
    need_dmask: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dmask = _backend.module(backend).mix_masked_bwd(
        g, x, mask, index, plan, partner_plan, _strides_like(g), need_dx, need_dmask
    )
    return _laid_out_as(dx, g), _or_empty(dmask, mask)


@mix_masked_backward.register_fake
def _(g, x, mask, index, plan, partner_plan, need_dx, need_dmask, backend):
    return torch.empty_like(g) if need_dx else g.new_empty(0), mask.new_empty(mask.shape if need_dmask else 0)


def _mix_masked_setup(ctx, inputs, output):
    x, *how, ctx.backend = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, *how)


def _mix_masked_gradients(ctx, g):
    need_dx, need_dmask = ctx.needs_input_grad[:2]
    dx, dmask = mix_masked_backward(g, *ctx.saved_tensors, need_dx, need_dmask, ctx.backend)
    return dx if need_dx else None, dmask if need_dmask else None, None, None, None, None


mix_masked.register_autograd(_mix_masked_gradients, setup_context=_mix_masked_setup)


# Weighted sums


def _promised_stack(t, count):
    """An empty [count, *t.shape], each part of it in the strides that are promised for t."""
    return t.new_empty_strided((count, *t.shape), (t.numel(), *_strides_like(t)))


@custom_op("fastmix::convex_combination", mutates_args=())
def convex_combination(sources: list[torch.Tensor], weights: torch.Tensor, stacked: bool, backend: str) -> torch.Tensor:
    out = _backend.module(backend).convex_combination_fwd(sources[0] if stacked else tuple(sources), weights)
    return _laid_out_as(out, sources[0][0] if stacked else sources[0])


@convex_combination.register_fake
def _(sources, weights, stacked, backend):
    return torch.empty_like(sources[0][0] if stacked else sources[0])


@custom_op("fastmix::convex_combination_backward", mutates_args=())
def convex_combination_backward(
    g: torch.Tensor,
    sources: list[torch.Tensor],
    weights: torch.Tensor,
    stacked: bool,
    need_dsources: list[bool],
    need_dweights: bool,
    backend: str,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    need = need_dsources[0] if stacked else tuple(need_dsources)
    given = None if not need_dweights else sources[0] if stacked else tuple(sources)
    backward = _backend.module(backend).convex_combination_bwd
    dsources, dweights = backward(g, given, weights, _strides_like(g), need, need_dweights)
    if not stacked:
        return [_laid_out_as(t, g) for t in dsources], _or_empty(dweights, weights)
    if dsources is not None and dsources.stride()[1:] != _strides_like(g):
        dsources = _promised_stack(g, len(dsources)).copy_(dsources)
    return [_or_empty(dsources, g)], _or_empty(dweights, weights)


@convex_combination_backward.register_fake
def _(g, sources, weights, stacked, need_dsources, need_dweights, backend):
    if stacked:
        dsources = [_promised_stack(g, weights.shape[1]) if need_dsources[0] else g.new_empty(0)]
    else:
        dsources = [torch.empty_like(g) if need else g.new_empty(0) for need in need_dsources]
    return dsources, weights.new_empty(weights.shape if need_dweights else 0)


def _convex_setup(ctx, inputs, output):
    sources, weights, ctx.stacked, ctx.backend = inputs
    ctx.save_for_backward(weights, *(sources if weights.requires_grad else ()))  # needs_input_grad is flat here


def _convex_gradients(ctx, g):
    weights, *sources = ctx.saved_tensors
    need, need_dweights = ctx.needs_input_grad[:2]
    dsources, dweights = convex_combination_backward(g, sources, weights, ctx.stacked, need, need_dweights, ctx.backend)
    dsources = [t if needed else None for t, needed in zip(dsources, need, strict=True)]
    return dsources, dweights if need_dweights else None, None, None


convex_combination.register_autograd(_convex_gradients, setup_context=_convex_setup)


# Losses: the forward keeps a few numbers a row, the backward forms the gradient. (In eager mode the forward forms it, and the
# backward may write it anew in place; a traced program may not change what it has saved.)


def _loss_like(logits, reduction):
    shape = (logits.shape[0], *logits.shape[2:]) if reduction == "none" else ()
    return torch.empty(shape, dtype=accumulator(logits.dtype), device=logits.device)


def _stats_like(logits, numbers):
    rows = logits.numel() // logits.shape[1]
    return torch.empty((numbers, rows), dtype=accumulator(logits.dtype), device=logits.device)


@custom_op("fastmix::soft_cross_entropy", mutates_args=())
def soft_cross_entropy(
    logits: torch.Tensor,
    weights: torch.Tensor | None,
    classes: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_dweights: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check.in_range("target", classes, logits.shape[1], "a class", ignore_index)
    loss, mass, stats, per_component, _ = _backend.module(backend).soft_ce_fwd(
        logits, weights, classes, class_weight, Options(ignore_index, label_smoothing, reduction), need_dweights, False
    )
    per_component = loss.new_empty(0) if per_component is None else _laid_out_as(per_component, classes)
    return loss, _or_empty(mass, loss), stats, per_component


@soft_cross_entropy.register_fake
def _(logits, weights, classes, class_weight, ignore_index, label_smoothing, reduction, need_dweights, backend):
    loss = _loss_like(logits, reduction)
    mass = loss.new_empty(() if reduction == "mean" else 0)
    per_component = torch.empty_like(classes, dtype=loss.dtype) if need_dweights else loss.new_empty(0)
    return loss, mass, _stats_like(logits, 3 if label_smoothing > 0 else 2), per_component


@custom_op("fastmix::soft_cross_entropy_backward", mutates_args=())
def soft_cross_entropy_backward(
    g: torch.Tensor,
    logits: torch.Tensor,
    weights: torch.Tensor | None,
    classes: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    mass: torch.Tensor | None,
    stats: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    target = weights, classes, class_weight, Options(ignore_index, label_smoothing, "none")
    upstream = g if g.dim() == 0 else g.reshape(-1)
    dlogits = _backend.module(backend).soft_ce_bwd(logits, *target, mass, stats, upstream, None)
    return _laid_out_as(dlogits, logits)


@soft_cross_entropy_backward.register_fake
def _(g, logits, weights, classes, class_weight, ignore_index, label_smoothing, mass, stats, backend):
    return torch.empty_like(logits)


def _soft_setup(ctx, inputs, output):
    logits, weights, classes, class_weight, ctx.ignore_index, ctx.label_smoothing, reduction, _, ctx.backend = inputs
    loss, mass, stats, per_component = output
    ctx.mean = reduction == "mean"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, weights, classes, class_weight, loss, mass, stats, per_component)


def _soft_gradients(ctx, g, *_):
    logits, weights, classes, class_weight, loss, mass, stats, per_component = ctx.saved_tensors
    if g is None:
        return (None,) * 9
    mass = mass if ctx.mean else None
    dlogits = dweights = None
    if ctx.needs_input_grad[0]:
        options = class_weight, ctx.ignore_index, ctx.label_smoothing
        dlogits = soft_cross_entropy_backward(g, logits, weights, classes, *options, mass, stats, ctx.backend)
    if ctx.needs_input_grad[1]:
        dweights = weights_gradient(per_component, g, loss, mass, weights, classes, class_weight, ctx.ignore_index)
    return dlogits, dweights, None, None, None, None, None, None, None


soft_cross_entropy.register_autograd(_soft_gradients, setup_context=_soft_setup)


@custom_op("fastmix::dense_cross_entropy", mutates_args=())
def dense_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    lam: torch.Tensor | None,
    index: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if index is not None:
        _check.in_range("target.index", index, target.shape[0], "a partner")
    loss, stats, _ = _backend.module(backend).dense_ce_fwd(
        logits, target, lam, index, class_weight, Options(ignore_index, label_smoothing, reduction), False
    )
    return loss, stats


@dense_cross_entropy.register_fake
def _(logits, target, class_weight, ignore_index, label_smoothing, reduction, lam, index, backend):
    return _loss_like(logits, reduction), _stats_like(logits, 3)


@custom_op("fastmix::dense_cross_entropy_backward", mutates_args=())
def dense_cross_entropy_backward(
    g: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    lam: torch.Tensor | None,
    index: torch.Tensor | None,
    stats: torch.Tensor,
    need_dlogits: bool,
    need_dtarget: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = class_weight, Options(ignore_index, label_smoothing, reduction)
    upstream = g if g.dim() == 0 else g.reshape(-1)
    dlogits, dtarget = _backend.module(backend).dense_ce_bwd(
        logits, target, lam, index, *options, stats, upstream, None, need_dlogits, need_dtarget
    )
    return _laid_out_as(dlogits, logits), _laid_out_as(dtarget, target)


@dense_cross_entropy_backward.register_fake
def _(
    g, logits, target, class_weight, ignore_index, label_smoothing, reduction, lam, index, stats, need_dlogits, need_dtarget,
    backend,
):  # fmt: skip
    return (
        torch.empty_like(logits) if need_dlogits else logits.new_empty(0),
        torch.empty_like(target) if need_dtarget else target.new_empty(0),
    )


def _dense_setup(ctx, inputs, output):
    logits, target, class_weight, *ctx.options, lam, index, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, class_weight, lam, index, output[1])


def _dense_gradients(ctx, g, *_):
    *inputs, lam, index, stats = ctx.saved_tensors
    need = ctx.needs_input_grad[:2]
    if g is None:
        return (None,) * 9
    gradients = dense_cross_entropy_backward(g, *inputs, *ctx.options, lam, index, stats, *need, ctx.backend)
    return *(t if needed else None for t, needed in zip(gradients, need, strict=True)), *(None,) * 7


dense_cross_entropy.register_autograd(_dense_gradients, setup_context=_dense_setup)


@custom_op("fastmix::js_divergence", mutates_args=())
def js_divergence(
    sources: list[torch.Tensor], scale: float, reduction: str, stacked: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    given, need = (sources[0], True) if stacked else (tuple(sources), (True,) * len(sources))
    loss, stats, _ = _backend.module(backend).js_divergence_fwd(given, scale, reduction, need, False)
    return loss, stats


@js_divergence.register_fake
def _(sources, scale, reduction, stacked, backend):
    sets = sources[0] if stacked else sources
    loss = _loss_like(sets[0], reduction)
    return loss, loss.new_empty((3, len(sets), sets[0].shape[0]))


@custom_op("fastmix::js_divergence_backward", mutates_args=())
def js_divergence_backward(
    g: torch.Tensor,
    sources: list[torch.Tensor],
    scale: float,
    reduction: str,
    stacked: bool,
    stats: torch.Tensor,
    need: list[bool],
    backend: str,
) -> list[torch.Tensor]:
    given, needed = (sources[0], need[0]) if stacked else (tuple(sources), tuple(need))
    gradients = _backend.module(backend).js_divergence_bwd(given, scale, reduction, stats, g, None, needed)
    return [_or_empty(t, g) for t in ((gradients,) if stacked else gradients)]


@js_divergence_backward.register_fake
def _(g, sources, scale, reduction, stacked, stats, need, backend):
    return [t.new_empty(t.shape) if needed else g.new_empty(0) for t, needed in zip(sources, need, strict=True)]


def _js_setup(ctx, inputs, output):
    sources, *ctx.options, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*sources, output[1])


def _js_gradients(ctx, g, _):
    *sources, stats = ctx.saved_tensors
    need = ctx.needs_input_grad[0]
    if g is None:
        return [None] * len(sources), None, None, None, None
    gradients = js_divergence_backward(g, sources, *ctx.options, stats, need, ctx.backend)
    return [t if needed else None for t, needed in zip(gradients, need, strict=True)], None, None, None, None


js_divergence.register_autograd(_js_gradients, setup_context=_js_setup)


# The sigmoid losses, which keep nothing between forward and backward. Their schemas are written out, for signatures that name
# the options which all four pass on only once.

_HOT = "Tensor logits, Tensor? weights, Tensor classes"
_DENSE = "Tensor logits, Tensor target"
_MIXING = "Tensor? lam, Tensor? index"  # of MixedRows
_OPTIONS = (
    "Tensor? class_weight, Tensor? pos_weight, float label_smoothing, float? threshold, str class_reduction, str reduction"
)


@custom_op(
    "fastmix::soft_binary_cross_entropy",
    mutates_args=(),
    schema=f"({_HOT}, {_OPTIONS}, bool need_dweights, str backend) -> (Tensor, Tensor)",
)
def soft_binary_cross_entropy(logits, weights, classes, *options):
    *options, need_dweights, backend = options
    _check.in_range("target", classes, logits.shape[1], "a class")
    class_weight, pos_weight, *options = options
    loss, slope, _ = _backend.module(backend).soft_bce_fwd(
        logits, weights, classes, class_weight, pos_weight, BinaryOptions(*options), need_dweights, False
    )
    return loss, loss.new_empty(0) if slope is None else _laid_out_as(slope, classes)


@soft_binary_cross_entropy.register_fake
def _(logits, weights, classes, *options):
    *_, reduction, need_dweights, backend = options
    loss = _loss_like(logits, reduction)
    return loss, torch.empty_like(classes, dtype=loss.dtype) if need_dweights else loss.new_empty(0)


@custom_op(
    "fastmix::soft_binary_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor g, {_HOT}, {_OPTIONS}, str backend) -> Tensor",
)
def soft_binary_cross_entropy_backward(g, logits, weights, classes, *options):
    class_weight, pos_weight, *options, backend = options
    upstream = g if g.dim() == 0 else g.reshape(-1)
    dlogits = _backend.module(backend).soft_bce_bwd(
        logits, weights, classes, class_weight, pos_weight, BinaryOptions(*options), upstream, None
    )
    return _laid_out_as(dlogits, logits)


@soft_binary_cross_entropy_backward.register_fake
def _(g, logits, *_):
    return torch.empty_like(logits)


def _soft_binary_setup(ctx, inputs, output):
    logits, weights, classes, class_weight, pos_weight, *ctx.options, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, weights, classes, class_weight, pos_weight, output[1])


def _soft_binary_gradients(ctx, g, *_):
    *inputs, slope = ctx.saved_tensors
    dlogits = dweights = None
    if g is not None and ctx.needs_input_grad[0]:
        dlogits = soft_binary_cross_entropy_backward(g, *inputs, *ctx.options, ctx.backend)
    if g is not None and ctx.needs_input_grad[1]:
        thresholded = ctx.options[1] is not None
        dweights = binary_weights_gradient(None if thresholded else slope, g, inputs[1])
    return dlogits, dweights, *(None,) * 9


soft_binary_cross_entropy.register_autograd(_soft_binary_gradients, setup_context=_soft_binary_setup)


@custom_op(
    "fastmix::dense_binary_cross_entropy", mutates_args=(), schema=f"({_DENSE}, {_OPTIONS}, {_MIXING}, str backend) -> Tensor"
)
def dense_binary_cross_entropy(logits, target, *options):
    class_weight, pos_weight, *options, lam, index, backend = options
    if index is not None:
        _check.in_range("target.index", index, target.shape[0], "a partner")
    return _backend.module(backend).dense_bce_fwd(
        logits, target, lam, index, class_weight, pos_weight, BinaryOptions(*options), False
    )[0]


@dense_binary_cross_entropy.register_fake
def _(logits, target, *options):
    *_, reduction, _, _, backend = options
    return _loss_like(logits, reduction)


@custom_op(
    "fastmix::dense_binary_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor g, {_DENSE}, {_OPTIONS}, {_MIXING}, bool need_dlogits, bool need_dtarget, str backend) -> (Tensor, Tensor)",
)
def dense_binary_cross_entropy_backward(g, logits, target, *options):
    class_weight, pos_weight, *options, lam, index, need_dlogits, need_dtarget, backend = options
    upstream = g if g.dim() == 0 else g.reshape(-1)
    dlogits, dtarget = _backend.module(backend).dense_bce_bwd(
        logits,
        target,
        lam,
        index,
        class_weight,
        pos_weight,
        BinaryOptions(*options),
        upstream,
        None,
        need_dlogits,
        need_dtarget,
    )
    return _laid_out_as(dlogits, logits), _laid_out_as(dtarget, target)


@dense_binary_cross_entropy_backward.register_fake
def _(g, logits, target, *options):
    *_, need_dlogits, need_dtarget, backend = options
    return (
        torch.empty_like(logits) if need_dlogits else logits.new_empty(0),
        torch.empty_like(target) if need_dtarget else target.new_empty(0),
    )


def _dense_binary_setup(ctx, inputs, output):
    logits, target, class_weight, pos_weight, *ctx.options, lam, index, ctx.backend = inputs
    ctx.save_for_backward(logits, target, class_weight, pos_weight, lam, index)


def _dense_binary_gradients(ctx, g):
    (*inputs, lam, index), (need_dlogits, need_dtarget) = ctx.saved_tensors, ctx.needs_input_grad[:2]
    thresholded = ctx.options[1] is not None
    need = need_dlogits, need_dtarget and not thresholded
    dlogits, dtarget = dense_binary_cross_entropy_backward(g, *inputs, *ctx.options, lam, index, *need, ctx.backend)
    if need_dtarget and thresholded:
        dtarget = torch.zeros_like(inputs[1])
    return dlogits if need_dlogits else None, dtarget if need_dtarget else None, *(None,) * 9


dense_binary_cross_entropy.register_autograd(_dense_binary_gradients, setup_context=_dense_binary_setup)
