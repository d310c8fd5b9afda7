"""Any loss on a mixed target, and accuracy.

    mixed_loss[n]   = sum over k of a_k*L(outputs[n], c_k)
    mixed_accuracy  = sum of the target weights whose class is among the k largest logits, averaged over rows

a_k, c_k: weights and classes of a SoftTarget, or the weights and values of MixedRows.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import _check
from .._torch._formulas import safe_index
from ..targets import MixedRows, SoftTarget, of_parts
from . import _target


def mixed_loss(
    loss_fn: Callable[..., torch.Tensor],
    outputs: torch.Tensor,
    target: SoftTarget | MixedRows | torch.Tensor,
    *args: Any,
    reduction: str = "mean",
    **kwargs: Any,
) -> torch.Tensor:
    """Any loss on a mixed batch, as the mixed losses of its labels: `lam*L(outputs, y_a) + (1-lam)*L(outputs, y_b)`.

        loss[n] = sum over k of weights[n, k] * loss_fn(outputs, classes[:, k])[n]                          SoftTarget
        loss[n] = lam[n] * loss_fn(outputs, values)[n] + (1 - lam[n]) * loss_fn(outputs, values[index])[n]  MixedRows

    This is the loss of the mixed target where a loss is linear in its target (cross-entropy, negative log-likelihood, binary
    cross-entropy), and another loss where it is not (mosaicml/composer#1407). The mean squared error is larger by
    `lam*(1-lam)*(y_a - y_b)**2`: `F.mse_loss(outputs, target.dense())` is the one without. `soft_cross_entropy` computes
    cross-entropy in one pass instead of one for each component.

    A component of weight 0 is not read: neither its infinite loss nor a NaN in its gradient reaches the result. Differentiable in `outputs` and in the weights (so in lambda) as often as `loss_fn` is: the gradient to a weight is its
    component's loss, also at 0 if that is finite.

    Args:
        loss_fn: called as `loss_fn(outputs, labels, *args, **kwargs)` for each component, with labels `[N]` or `[N, d1, ...]`
            int64 (`MixedRows`: of their values' shape); returns a loss for each row, `[N]`, or for each pixel, `[N, d1, ...]`.
            `functools.partial(F.cross_entropy, reduction="none")`, say.
        outputs: `[N, ...]`, what a model gives, floating.
        target: a `SoftTarget`, `MixedRows`, or plain labels `[N, ...]` as they are (validation).
        reduction: `"mean"` over rows (and pixels), `"sum"` or `"none"`. Labels that `loss_fn` ignores count there as losses of 0.

    Returns:
        The loss, in float32 for float32 weights unless `loss_fn` gives float64.

    Raises:
        TypeError, ValueError: a wrong argument; losses of another shape than one for each row (or pixel).

    >>> import functools, torch, torch.nn.functional as F, fastmix
    >>> target = fastmix.Mix(torch.tensor([0.75, 0.5]), torch.tensor([1, 0])).target(torch.tensor([0, 1]))
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> fastmix.mixed_loss(functools.partial(F.cross_entropy, reduction="none"), logits, target)
    tensor(0.7201)
    >>> fastmix.mixed_loss(F.cross_entropy, logits, target, reduction="none", label_smoothing=0.1)
    Traceback (most recent call last):
    ValueError: loss_fn: expected losses of shape [2], one for each row (reduction="none"), got a float32 tensor of shape [] on cpu
    """
    if not callable(loss_fn):
        raise _check.wrong(TypeError, "loss_fn", "a function of outputs and labels", loss_fn)
    _check.float_tensor("outputs", outputs, 1, "[N, ...]")
    _check.reduction(reduction)
    total, N = outputs.new_zeros(()), outputs.shape[0]
    for weight, labels, rows in _weighted_labels(outputs, target):
        read = outputs if weight is None else _not_differentiated(outputs, weight == 0)
        losses = loss_fn(read, labels, *args, **kwargs)
        if not isinstance(losses, torch.Tensor):
            raise _check.wrong(TypeError, "loss_fn", "a tensor of losses", losses)
        if losses.shape != rows and (losses.shape != (N,) or (weight is not None and weight.dim() > 1)):
            expected = f'losses of shape {list(rows)}, one for each {"pixel" if len(rows) > 1 else "row"} (reduction="none")'
            raise _check.wrong(ValueError, "loss_fn", expected, losses)
        if weight is not None:
            weight = weight.view(*weight.shape, *[1] * (losses.dim() - weight.dim()))
            losses = weight * torch.where((weight == 0) & ~losses.isfinite(), 0, losses)
        total = total + losses
    return total if reduction == "none" else total.sum() if reduction == "sum" else total.mean()


def _weighted_labels(outputs: torch.Tensor, target: Any) -> Iterator[Any]:
    """Yields (weight [N] or [N, d1, ...] or None for 1, labels, shape of the losses) for each component of a target."""
    N = outputs.shape[0]
    target = of_parts(target) if isinstance(target, dict) else target
    if isinstance(target, SoftTarget):
        if target.label_smoothing:
            raise ValueError(
                "target: expected one without label smoothing, which mixes in every class, got label_smoothing="
                f"{target.label_smoothing} (smooth in loss_fn instead)"
            )
        target._validate()  # it may have been changed, or mapped as a pytree
        _check_rows("target.classes", target.classes, outputs)
        pixels = target.weights.shape[2:]
        if pixels and outputs.shape != (N, *pixels) and outputs.shape[2:] != pixels:
            expected = f"shape {[N, 'C', *pixels]} or {[N, *pixels]}, as the weights of pixels"
            raise _check.wrong(ValueError, "outputs", expected, outputs)
        for weight, classes in zip(target.weights.unbind(1), target.classes.unbind(1), strict=True):
            yield weight, classes, classes.shape
    elif isinstance(target, MixedRows):
        values = target.values
        _check_rows("target.values", values, outputs)
        _check.in_range("target.index", target.index, N, "a partner")
        lam = _check.coefficient("target.lam", target.lam, values).expand(N)
        index, known = safe_index(target.index, N)
        rows = torch.Size((N, *values.shape[2:]))
        yield lam, values, rows
        yield torch.where(known, 1 - lam, float("nan")), values[index], rows
    elif isinstance(target, torch.Tensor):
        _check_rows("target", target, outputs)
        yield None, target, torch.Size((N, *target.shape[2 if target.is_floating_point() else 1 :]))
    else:
        raise _check.wrong(TypeError, "target", "a SoftTarget, MixedRows or labels", target)


def _check_rows(name: str, labels: torch.Tensor, outputs: torch.Tensor) -> None:
    if labels.dim() == 0 or labels.shape[0] != outputs.shape[0]:
        raise _check.wrong(ValueError, name, f"{outputs.shape[0]} rows, as the outputs", labels)
    _check.same_device(name, labels, outputs)


def _not_differentiated(outputs: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """outputs [N, ...], from whose rows [N], or pixels [N, d1, ...], nothing goes back: a NaN neither."""
    if where.dim() > 1 and where.shape != outputs.shape:
        where = where.unsqueeze(1)
    return torch.where(where.view(*where.shape, *[1] * (outputs.dim() - where.dim())), outputs.detach(), outputs)


@torch.no_grad()
def mixed_accuracy(
    logits: torch.Tensor, target: SoftTarget | MixedRows | torch.Tensor, topk: int = 1, *, ignore_index: int = -100
) -> torch.Tensor:
    """Top-k accuracy on a mixed batch: the target weight on classes among the k largest logits, averaged over rows (and pixels).

    Components of the class `ignore_index` count nowhere, as in `soft_cross_entropy`: the average divides by the weights that the
    rows have left, at most 1 each, so a perfect prediction gives 1. Label smoothing that rides on a target does not count. Where logits
    are equal it is `torch.topk` that chooses. NaN logits are the largest, and hit nothing. A class that has weight twice counts
    with both.

    Args:
        logits: `[N, C]` or `[N, C, d1, ...]`.
        target: as for `soft_cross_entropy`.
        topk: k, at least 1; all classes count from k = C on.
        ignore_index: the class that stands for no label, in a `SoftTarget` or class indices.

    Returns:
        A float32 0-d tensor in [0, 1] (for targets that sum to 1), on the logits' device; nothing waits for the device. NaN
        where no row counts.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also a class out of range (on a GPU it hits nothing).

    >>> import torch, fastmix
    >>> target = fastmix.SoftTarget(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    >>> fastmix.mixed_accuracy(logits, target), fastmix.mixed_accuracy(logits, target, topk=2)
    (tensor(0.5500), tensor(1.))
    """
    _check.float_tensor("logits", logits, 2, "[N, C] or [N, C, d1, ...]")
    topk = _check.integer("topk", topk, 1, "an int of at least 1")
    ignore_index = _check.integer("ignore_index", ignore_index, -(2**63), "an int of 64 bits")
    if logits.shape[1] == 0:
        raise _check.wrong(ValueError, "logits", "at least one class", logits)
    parts = _target.read_mixed(logits, target, ignore_index)
    values, top = logits.topk(min(topk, logits.shape[1]), dim=1)  # [N, k, ...]
    number = ~values.isnan()  # NaN sorts first, and hits nothing
    if isinstance(parts, _target.Dense):
        hit_weights = parts.values.to(torch.float32).gather(1, top)
        return torch.where(number, hit_weights, 0).sum(1).mean()
    weights, classes = parts
    ignored = classes == ignore_index
    hit = ((classes.unsqueeze(2) == top.unsqueeze(1)) & number.unsqueeze(1)).any(2) & ~ignored  # [N, K, ...]
    a = classes.new_ones((), dtype=torch.float32) if weights is None else weights.to(torch.float32)
    a = a.reshape(*a.shape, *[1] * (hit.dim() - a.dim())).expand(hit.shape)
    row_weight = torch.where(ignored.any(1), a.masked_fill(ignored, 0).sum(1).clamp(0, 1), 1)
    return torch.where(hit, a, 0).sum() / row_weight.sum()
