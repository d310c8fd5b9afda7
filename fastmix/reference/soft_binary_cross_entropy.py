"""Sigmoid cross-entropy on soft targets.

A class with logit z and target t, weight w, weight p of the positive term:

    l = w * (-p*t*log(sigmoid(z)) - (1-t)*log(1 - sigmoid(z)))

The target of a K-hot row (c_k, a_k) is t[c] = sum of the a_k with c_k = c, smoothed to (1-e)*t + e/C; a dense one is smoothed
to (1-e)*t + e/2. A threshold makes it 1 or 0. A row's loss is the mean or sum over its classes.
"""

import numpy as np

from .soft_cross_entropy import _product, _rows


def _binary_target(target, kind, C, e, threshold):
    """Rows [R, C] of t as the loss sees it."""
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


def _surprise(z):
    """(-log sigmoid(z), -log sigmoid(-z))"""
    with np.errstate(invalid="ignore"):
        return np.logaddexp(0.0, -z), np.logaddexp(0.0, z)


def _weights(C, weight, pos_weight):
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
    """The loss; logits `[N, C, ...]`, target class indices, `(classes, weights)` or dense rows.

    >>> float(soft_binary_cross_entropy([[0.0, 0.0]], ([[0, 1]], [[0.5, 0.5]])).round(6))
    0.693147
    """
    z, target, kind = _rows(logits, target)
    R, C = z.shape
    w, p = _weights(C, weight, pos_weight)
    t = _binary_target(target, kind, C, label_smoothing, threshold)
    losses = np.zeros(R)
    for r in range(R):
        yes, no = _surprise(z[r])
        terms = _product(w * _product(p, t[r]), yes) + _product(w * (1 - t[r]), no)
        losses[r] = terms.sum() / (C if class_reduction == "mean" else 1)
    if reduction == "none":
        shape = np.shape(logits)
        return losses.reshape(shape[:1] + shape[2:])
    with np.errstate(invalid="ignore"):
        return losses.sum() if reduction == "sum" else np.float64(losses.sum()) / np.float64(R)


def soft_binary_cross_entropy_grad(
    logits, target, upstream=1.0, *, weight=None, pos_weight=None, label_smoothing=0.0, threshold=None, class_reduction="mean",
    reduction="mean",
):  # fmt: skip
    """(gradient to the logits, gradient to the K-hot weights or the dense target), each in its argument's shape.

    >>> dz, da = soft_binary_cross_entropy_grad([[0.0, 0.0]], ([[0, 1]], [[0.75, 0.25]]), class_reduction="sum")
    >>> dz.tolist()
    [[-0.25, 0.25]]
    """
    z, target, kind = _rows(logits, target)
    R, C = z.shape
    w, p = _weights(C, weight, pos_weight)
    t = _binary_target(target, kind, C, label_smoothing, threshold)
    upstream = np.broadcast_to(np.asarray(upstream, dtype=np.float64).reshape(-1), R)
    dz, dt = np.zeros((R, C)), np.zeros((R, C))
    for r in range(R):
        factor = upstream[r] / (C if class_reduction == "mean" else 1) / (R if reduction == "mean" else 1)
        yes, no = _surprise(z[r])
        with np.errstate(over="ignore"):
            dz[r] = _product(w * (1 - t[r]), np.exp(-yes)) - _product(w * _product(p, t[r]), np.exp(-no))
        dz[r] *= factor
        with np.errstate(invalid="ignore"):
            gain = np.where(p == 1, -z[r], _product(p, yes) - no)
        dt[r] = _product(w, gain) * (1 - label_smoothing) * factor
    if threshold is not None:
        dt[:] = 0
    if kind != "dense":
        dt = np.take_along_axis(dt, target[0], 1)

    def back(rows, shape):
        return np.moveaxis(rows.reshape(shape[0], *shape[2:], rows.shape[-1]), -1, 1)

    shape = np.shape(logits)
    return back(dz, shape), back(dt, shape)
