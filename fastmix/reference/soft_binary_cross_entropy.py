"""Sigmoid cross-entropy on soft targets.

A class with logit z and target t, weight w, weight p of the positive term:

    l = w * (-p*t*log(sigmoid(z)) - (1-t)*log(1 - sigmoid(z)))

The target of a K-hot row (c_k, a_k) is t[c] = sum of the a_k with c_k = c, smoothed to (1-e)*t + e/C; a dense one is smoothed
to (1-e)*t + e/2. A threshold makes it 1 or 0. A row's loss is the mean or sum over its classes.
"""

import numpy as np

from ._common import classes_second, logit_rows, reduced, times


def _binary_target(target, kind, C, e, threshold):
    """Returns the rows [R, C] of t, smoothed and compared with the threshold."""
    if kind == "dense":
        t = (1 - e) * target + e / 2
    else:
        t = np.full((len(target[0]), C), e / C)
        for r, (classes, weights) in enumerate(zip(*target, strict=True)):
            for c, a in zip(classes, weights, strict=True):
                if not 0 <= c < C:
                    raise ValueError(f"target: expected a class in [0, {C}), got {c}")
                t[r, c] += (1 - e) * a
    return t if threshold is None else np.where(t > threshold, 1.0, 0.0)


def _softplus(z):
    """Returns (softplus(-z), softplus(z)) = (-log sigmoid(z), -log sigmoid(-z))."""
    with np.errstate(invalid="ignore"):
        return np.logaddexp(0.0, -z), np.logaddexp(0.0, z)


def _class_weights(C, weight, pos_weight):
    """Returns arrays [C], of 1 for None."""
    return (np.ones(C) if w is None else np.asarray(w, dtype=np.float64) for w in (weight, pos_weight))


def soft_binary_cross_entropy(
    logits,
    target,
    *,
    weight=None,
    pos_weight=None,
    label_smoothing=0.0,
    threshold=None,
    class_reduction="mean",
    reduction="mean",
):
    """Returns the loss; logits `[N, C, ...]`, target class indices, `(classes, weights)` or dense rows.

    >>> float(soft_binary_cross_entropy([[0.0, 0.0]], ([[0, 1]], [[0.5, 0.5]])).round(6))
    0.693147
    """
    z, target, kind = logit_rows(logits, target)
    R, C = z.shape
    w, p = _class_weights(C, weight, pos_weight)
    t = _binary_target(target, kind, C, label_smoothing, threshold)
    losses = np.zeros(R)
    for r in range(R):
        yes, no = _softplus(z[r])
        terms = times(w * times(p, t[r]), yes) + times(w * (1 - t[r]), no)
        losses[r] = terms.sum() / (C if class_reduction == "mean" else 1)
    return reduced(losses, R, reduction, logits)


def soft_binary_cross_entropy_grad(
    logits, target, upstream=1.0, *, weight=None, pos_weight=None, label_smoothing=0.0, threshold=None, class_reduction="mean",
    reduction="mean",
):  # fmt: skip
    """Returns (gradient to the logits, gradient to the K-hot weights or the dense target), each in its argument's shape.

    `upstream` is the gradient to the loss, a number or one for each row.

    >>> dz, da = soft_binary_cross_entropy_grad([[0.0, 0.0]], ([[0, 1]], [[0.75, 0.25]]), class_reduction="sum")
    >>> dz.tolist()
    [[-0.25, 0.25]]
    """
    z, target, kind = logit_rows(logits, target)
    R, C = z.shape
    w, p = _class_weights(C, weight, pos_weight)
    t = _binary_target(target, kind, C, label_smoothing, threshold)
    upstream = np.broadcast_to(np.asarray(upstream, dtype=np.float64).reshape(-1), R)
    dz, dt = np.zeros((R, C)), np.zeros((R, C))
    for r in range(R):
        factor = upstream[r] / (C if class_reduction == "mean" else 1) / (R if reduction == "mean" else 1)
        yes, no = _softplus(z[r])
        with np.errstate(over="ignore"):
            dz[r] = times(w * (1 - t[r]), np.exp(-yes)) - times(w * times(p, t[r]), np.exp(-no))
        dz[r] *= factor
        with np.errstate(invalid="ignore"):
            slope = np.where(p == 1, -z[r], times(p, yes) - no)
        dt[r] = times(w, slope) * (1 - label_smoothing) * factor
    if threshold is not None:
        dt[:] = 0
    if kind != "dense":
        dt = np.take_along_axis(dt, target[0], 1)

    return classes_second(dz, logits), classes_second(dt, logits)
