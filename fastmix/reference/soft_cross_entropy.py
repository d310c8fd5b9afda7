"""Softmax cross-entropy on soft targets.

A row with logits z and K-hot target (c_k, a_k), smoothing e, class weights w:

    loss = sum_k a_k * ((1-e)*w[c_k]*(lse - z[c_k]) + (e/C)*sum_c w[c]*(lse - z[c])),    lse = log sum_c exp(z[c])

"mean" divides the sum over rows by D = sum of a_k*w[c_k]; components of the ignored class count nowhere. Dense targets t:
t' = (1-e)*t + e/C, loss = sum_c w[c]*t'[c]*(lse - z[c]), mean over all rows.
"""

import numpy as np

from ._common import classes_second, logit_rows, reduced, times


def _components(classes, weights, w, ignore_index):
    """Yields (class, weight) of a row's components but for the ignored ones."""
    for c, a in zip(classes, weights, strict=True):
        if c != ignore_index:
            if not 0 <= c < len(w):
                raise ValueError(f"target: expected a class in [0, {len(w)}), got {c}")
            yield c, a


def _forward(logits, target, weight, ignore_index, e):
    """Returns (rows' losses, D, nll = lse - z of every class, (rows of logits, of the target, kind, w))."""
    z, target, kind = logit_rows(logits, target)
    R, C = z.shape
    w = np.ones(C) if weight is None else np.asarray(weight, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        row_max = z.max(axis=1, initial=-np.inf, keepdims=True)
        nll = np.logaddexp.reduce(z - row_max, axis=1, keepdims=True) + (row_max - z)
        nll[np.isposinf(z).any(axis=1)] = np.nan
    losses, D = np.zeros(R), 0.0
    for r in range(R):
        if kind == "dense":
            t = np.where(np.arange(C) == ignore_index, 0.0, target[r])
            losses[r] = np.sum(times(w * ((1 - e) * t + e / C), nll[r]))
            D += 1
            continue
        for c, a in _components(target[0][r], target[1][r], w, ignore_index):
            value = (1 - e) * times(w[c], nll[r, c])
            if e > 0:
                value += e / C * np.sum(times(w, nll[r]))
            losses[r] += times(a, value)
            D += a * w[c]
    return losses, D, nll, (z, target, kind, w)


def soft_cross_entropy(logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """Returns the loss; logits `[N, C, ...]`, target class indices, `(classes, weights)` or probabilities.

    >>> float(soft_cross_entropy([[0.0, 0.0]], ([[0, 1]], [[0.5, 0.5]])).round(6))
    0.693147
    """
    losses, D, _, _ = _forward(logits, target, weight, ignore_index, label_smoothing)
    return reduced(losses, D, reduction, logits)


def soft_cross_entropy_grad(
    logits, target, upstream=1.0, *, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """Returns (gradient to the logits, gradient to the K-hot weights or the dense target), each in its argument's shape.

    `upstream` is the gradient to the loss, a number or one for each row.

    Every term of the loss is differentiated by itself: d(lse - z[c])/dz = softmax(z) - onehot(c).

    >>> dz, da = soft_cross_entropy_grad([[0.0, 0.0]], ([[0, 1]], [[0.75, 0.25]]))
    >>> dz.tolist()
    [[-0.25, 0.25]]
    """
    e = label_smoothing
    losses, D, nll, (z, target, kind, w) = _forward(logits, target, weight, ignore_index, e)
    R, C = z.shape
    upstream = np.broadcast_to(np.asarray(upstream, dtype=np.float64).reshape(-1), R)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.divide(1.0, D) if reduction == "mean" else 1.0
        mean = np.sum(losses) * scale
    dz = np.zeros((R, C))
    da = np.zeros((R, C) if kind == "dense" else target[0].shape)
    for r in range(R):
        with np.errstate(over="ignore"):
            p = np.exp(-nll[r])
        factor = upstream[r] * scale
        if kind == "dense":
            kept = (np.arange(C) != ignore_index).astype(np.float64)
            t = w * ((1 - e) * np.where(kept == 0, 0.0, target[r]) + e / C)
            dz[r] = (times(t.sum(), p) - t) * factor
            da[r] = times((1 - e) * w * kept, nll[r]) * factor
            continue
        for k, c in enumerate(target[0][r]):
            if c == ignore_index:
                continue
            a = target[1][r, k]
            if a != 0:
                hard = a * (1 - e) * w[c] * factor
                dz[r] += hard * p
                dz[r, c] -= hard
                dz[r] += a * (e / C) * (w.sum() * p - w) * factor
            value = (1 - e) * times(w[c], nll[r, c])
            if e > 0:
                value += e / C * np.sum(times(w, nll[r]))
            da[r, k] = (value - (times(w[c], mean) if reduction == "mean" else 0.0)) * factor

    return classes_second(dz, logits), classes_second(da, logits)
