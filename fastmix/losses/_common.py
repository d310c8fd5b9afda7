"""What the losses share: the gradient that a forward forms, what a backward refuses, and shapes for tracing."""

from typing import Any

import torch

from .. import _check
from .._dtypes import accumulator

Maybe = torch.Tensor | None
NO_GRADIENTS = (None,) * 7  # to the inputs behind; autograd leaves out those that there are not


def check_logits(logits: torch.Tensor) -> None:
    _check.float_tensor("logits", logits, 2, "[N, C] or [N, C, d1, ...]")
    if logits.shape[1] == 0:
        raise _check.wrong(ValueError, "logits", "at least one class", logits)


def check_backward(name: str, grad_output: torch.Tensor, instead: str) -> None:
    """Refuses what the losses' backwards cannot do. Grad mode is on in a backward exactly under create_graph=True."""
    if _check.batched(grad_output):
        raise RuntimeError(
            f"{name}: a backward cannot be batched (is_grads_batched, vectorize) nor compiled without its forward; "
            "use torch.func.vjp and vmap, or compile both"
        )
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: second derivatives are not supported (backward ran with create_graph=True). "
            f"Use {instead} where a loss must be differentiated twice."
        )


def as_options(kind: Any, given: Any) -> Any:
    """Returns options as one tuple of this kind. Functions are called with such a tuple, and take its fields one by one too."""
    return given[0] if given and type(given[0]) is kind else kind(*given)


def forms_gradient(logits: torch.Tensor) -> bool:
    """Whether the forward forms the gradient. In float16 it would underflow before a GradScaler's factor arrives."""
    return logits.dtype != torch.float16


def take_cached_grad(ctx: Any) -> Any:
    """Returns the gradient that the forward formed for an upstream gradient of 1, or None. It is handed out once, because the
    backward that gets it overwrites it."""
    cached_grad, ctx.cached_grad = ctx.cached_grad, None
    return cached_grad


def by_row(grad_output: torch.Tensor) -> torch.Tensor:
    """Returns an upstream gradient [] or [N, d1, ...] as [] or [rows]."""
    if grad_output.is_neg():  # C and kernels read memory
        grad_output = grad_output.resolve_neg()
    return grad_output if grad_output.dim() == 0 else grad_output.reshape(-1)


def as_weights(gradient: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns a gradient to each component [N, K, ...] as one to the weights, which may be shared by a row's pixels."""
    if weights.dim() < gradient.dim():
        gradient = gradient.flatten(2).sum(2)
    return gradient.to(weights.dtype)


def loss_like(logits: torch.Tensor, reduction: str) -> torch.Tensor:
    """Returns an empty tensor like the loss of logits [N, C, ...], for tracing."""
    shape = (logits.shape[0], *logits.shape[2:]) if reduction == "none" else ()
    return torch.empty(shape, dtype=accumulator(logits.dtype), device=logits.device)
