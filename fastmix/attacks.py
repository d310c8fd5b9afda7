"""Attacks on a model's inputs, to measure how robust it is."""

import torch
import torch.nn.functional as F
from torch import nn

from . import _check
from ._modes import running_mode

LOSSES = ("cross_entropy", "margin")


def fgsm(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    *,
    steps: int = 1,
    step_size: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    loss: str = "cross_entropy",
) -> torch.Tensor:
    """The fast gradient sign method: images that a model gets wrong more often, at most `eps` away from x in each value.

        x_0 = x,   x_{t+1} = clip(x_t + step_size * sign(dL/dx_t), x - eps, x + eps, bounds)        t = 0 ... steps-1

    One step is FGSM, several are I-FGSM. L is a row's cross-entropy or its margin: the largest logit of another class less the
    true class's. Where a model is so sure that its softmax is 1, the gradient of the cross-entropy is 0 and its sign chance: the
    margin's is not. Under `torch.compile` eps and step_size may change between steps of one program; not under `fullgraph=True`, since
    torch does not trace `torch.autograd.grad`. The model is asked in eval mode, and each of its modules has its own mode back afterwards; parameters get no
    gradient, and `.grad` is left alone. For an attack on another model (black box) call it on one and test the other.

    Args:
        model: gives logits `[N, C]`; takes x as it is, so normalisation belongs inside.
        x: `[N, ...]` floating, within `bounds`.
        y: `[N]` int64, the true classes.
        eps: how far a value may move, in the units of x.
        steps: how many steps.
        step_size: of each; `eps / steps` by default.
        bounds: the least and the largest value that x can have.
        loss: `"cross_entropy"` or `"margin"`.

    Returns:
        The attacked batch, a new tensor without a graph.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also x beyond its bounds, or a class out of range.

    Source: arXiv:1412.6572, equation 1; arXiv:1607.02533 for several steps.

    >>> import torch
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> fgsm(model, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), eps=0.25)
    tensor([[0.3500, 0.6500]])
    """
    _check.float_tensor("x", x, 1, "[N, ...]")
    _check.integer_tensor("y", y, (x.shape[0],), x)
    eps = _not_negative("eps", eps)
    steps = _check.integer("steps", steps, 1, "an int of at least 1")
    step_size = eps / steps if step_size is None else _not_negative("step_size", step_size)
    _check.one_of("loss", loss, LOSSES, "'cross_entropy' or 'margin'")
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise _check.wrong(TypeError, "bounds", "a pair (least, largest)", bounds)
    low, high = (_check.number("bounds", value) for value in bounds)
    if low >= high:
        raise _check.wrong(ValueError, "bounds", "a pair whose first is less than its second", bounds)
    if _check.readable(x) and x.numel() and not bool(((x >= low) & (x <= high)).all()):
        raise ValueError(f"x: expected values in [{low}, {high}] (bounds), got some outside: normalise inside the model")
    x = x.detach()
    least, most = (x - eps).clamp(min=low), (x + eps).clamp(max=high)
    attacked = x.clone()
    with running_mode(model, False), torch.enable_grad():
        for _ in range(steps):
            leaf = attacked.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(_row_losses(model(leaf), y, loss).sum(), leaf)
            attacked = torch.minimum(torch.maximum(attacked + step_size * gradient.sign(), least), most)
    return attacked.detach()


def _not_negative(name: str, value: float) -> float:
    if _check.number(name, value) < 0:
        raise _check.wrong(ValueError, name, "a float of at least 0", value)
    return float(value)


def _row_losses(logits: torch.Tensor, y: torch.Tensor, loss: str) -> torch.Tensor:
    _check.float_tensor("model", logits, 2, "[N, C] (the model's logits)")
    if logits.dim() != 2 or logits.shape[0] != y.shape[0]:
        raise _check.wrong(ValueError, "model", f"logits of shape [{y.shape[0]}, C]", logits)
    _check.in_range("y", y, logits.shape[1], "a class")
    if loss == "cross_entropy":
        return F.cross_entropy(logits, y, reduction="none")
    true = y.unsqueeze(1)
    others = logits.scatter(1, true, -torch.inf)
    return others.amax(1) - logits.gather(1, true).squeeze(1)
