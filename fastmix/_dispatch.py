"""The ways that a call of an op may go, asked once for all ops, and what their Functions and operators share.

    torch.func, forward-mode AD                    the formula, in differentiable torch
    torch.compile, a number that changes           the formula: an operator would be compiled for each number
    torch.compile, torch.export, fake tensors      the registered operator, which is opaque to them
    a differentiable input requires grad           the autograd Function
    everything else                                the backend's launcher

The operator is not used in eager mode: torch's dispatcher costs several times as much as a Function.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import _backend, _check


class Op(NamedTuple):
    """The ways of one op. All take the op's checked arguments; `operator` also the name of the backend, as the last one."""

    formula: Callable
    operator: Callable
    function: Callable
    launch: Callable


def call(op: Op, leaves, *arguments):
    """Calls an op on checked arguments. `leaves`: the tensors that it can be differentiated in, or None; the first is a
    tensor and decides the device."""
    if _check.transformed():
        if _check.functional_transform() or changing(arguments):
            return op.formula(*arguments)
        return op.operator(*arguments, backend_name(leaves[0].device))
    return (op.function if differentiates(*leaves) else op.launch)(*arguments)


def call_into(out, owners, op: Op, leaves, *arguments):
    """Calls an op as `call` does, and writes its result to a checked `out`, which its launcher takes as the last argument. `owners`:
    of the leaves, as the error names them."""
    if differentiates(*leaves, out):
        raise ValueError(f"out: expected None where {owners} or out requires grad (or use torch.no_grad()), got a tensor")
    if _check.transformed():
        return out.copy_(call(op, leaves, *arguments))
    op.launch(*arguments, out)
    torch.autograd.graph.increment_version(out)
    return out


def changing(arguments) -> bool:
    """Whether a float among the arguments, or among an op's options, is a symbol of the program that is traced. torch.compile makes
    it one when a Python number is another in the second call."""
    if not torch.compiler.is_compiling():
        return False
    static = getattr(torch.fx.experimental.symbolic_shapes, "has_static_value", None)  # since torch 2.7
    values = [v for a in arguments for v in (a if isinstance(a, tuple) else (a,)) if isinstance(v, float)]
    return static is not None and not all(static(v) for v in values)


def differentiates(*leaves) -> bool:
    """Whether autograd has to record an op on these tensors or Nones."""
    if torch.is_grad_enabled():
        for t in leaves:  # written out: a generator takes twice as long
            if t is not None and t.requires_grad:
                return True
    return False


@functools.cache
def recorder(function):
    """Returns what calls an autograd Function where no transform is active, as `call` has asked. It does what `apply` then does, in half the
    time: tensors that a transform has left behind are unwrapped."""
    apply, unwrap = super(torch.autograd.Function, function).apply, torch._C._functorch.unwrap_if_dead
    return lambda *inputs: apply(*[unwrap(t) if isinstance(t, torch.Tensor) else t for t in inputs])


def backend_name(device: torch.device) -> str:
    """Returns the name of the backend for tensors of a device, as a constant of the program that is traced."""
    return _backend.name(device)


def on_torch(device: torch.device) -> bool:
    """Whether plain torch runs, on tensors of a device, the ops that are not written in C."""
    return backend_name(device) != "triton"


# what torch.compiler.assume_constant_result does, which would import the whole compiler for it
backend_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def inputs_needing_grad(ctx, candidates=None):
    """Returns which inputs a Function's backward has to give a gradient to: a list of bools.

    `candidates` are bools for the Function's first inputs, all tensors or None; by default `ctx.needs_input_grad`.

    An input counts if it requires a gradient and autograd is going to run its node. `needs_input_grad` alone stays true for all that
    could ever be asked for, so `torch.autograd.grad(loss, lam)` would form gradients of the whole batch and throw them away.
    Asked in the backward itself, the answer is right for each backward over a retained graph, and where lam enters twice.
    """
    candidates = ctx.needs_input_grad if candidates is None else candidates
    if sum(candidates) == 1:  # with one candidate, autograd calls this backward only if it is needed
        return list(candidates)
    return [need and (node is None or _will_run(node)) for need, (node, _) in zip(candidates, ctx.next_functions, strict=False)]


def _will_run(node):
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised for leaves captured by grad(inputs=...) and while tracing: assume that it is needed
        return True


def save_for_mixing(ctx, x, weights, *rest):
    """Saves what the backward of a mixing op reads: x only if its weights (lam, mask) need a gradient."""
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, *rest)


def shaped_as(lam, dlam):
    """Returns the gradient to each row's lambda as one to lam, which may be a single number."""
    return dlam if lam.dim() else dlam.sum()


def as_given(stacked, tensors):
    """Returns sources as launchers and formulas take them: one stacked tensor, or a tuple. (Functions and operators take them one by
    one.)"""
    return tensors[0] if stacked else tuple(tensors)


# An operator promises the strides of its results while it is traced, and has to keep them.


def promised_strides(like):
    """Returns the strides of `empty_like(like)`."""
    return torch.empty_like(like, device="meta").stride()


def as_promised(t, like):
    """Returns t in the strides promised for it, those of `empty_like(like)`; an empty tensor for None."""
    if t is None:
        return like.new_empty(0)
    return t if t.stride() == promised_strides(like) else torch.empty_like(like, dtype=t.dtype).copy_(t)


def or_empty(t, like):
    """Returns t, or an empty tensor for None: an operator returns tensors alone."""
    return like.new_empty(0) if t is None else t
