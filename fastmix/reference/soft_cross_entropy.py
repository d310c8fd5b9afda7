"""Softmax cross-entropy on soft targets.

A row with logits z and K-hot target (c_k, a_k), smoothing e, class weights w:

    loss = sum_k a_k * ((1-e)*w[c_k]*(lse - z[c_k]) + (e/C)*sum_c w[c]*(lse - z[c])),    lse = log sum_c exp(z[c])

"mean" divides the sum over rows by D = sum of a_k*w[c_k]; components of the ignored class count nowhere. Dense targets t:
t' = (1-e)*t + e/C, loss = sum_c w[c]*t'[c]*(lse - z[c]), mean over all rows.
"""

import numpy as np


def _rows(logits, target):
    """(rows of logits [R, C], rows of the target, which kind it is)"""
    logits = np.asarray(logits, dtype=np.float64)
    C = logits.shape[1]
    flat = np.moveaxis(logits, 1, -1).reshape(-1, C)
    if hasattr(target, "classes"):  # a SoftTarget, whatever its arrays are
        target = target.classes, target.weights
    if isinstance(target, tuple):
        classes, weights = np.asarray(target[0]), np.asarray(target[1], dtype=np.float64)
        weights = np.broadcast_to(weights.reshape(weights.shape + (1,) * (classes.ndim - weights.ndim)), classes.shape)
        K = classes.shape[1]
        return flat, (np.moveaxis(classes, 1, -1).reshape(-1, K), np.moveaxis(weights, 1, -1).reshape(-1, K)), "K-hot"
    target = np.asarray(target)
    if np.issubdtype(target.dtype, np.integer):
        return flat, (target.reshape(-1, 1), np.ones((target.size, 1))), "K-hot"
    return flat, np.moveaxis(np.asarray(target, dtype=np.float64), 1, -1).reshape(-1, C), "dense"


def _product(weight, value):
    """weight*value; what has no weight is not looked at."""
    return np.where(weight == 0, 0.0, weight * np.where(weight == 0, 0.0, value))


def _components(classes, weights, w, ignore_index):
    for c, a in zip(classes, weights, strict=True):
        if c != ignore_index:
            if not 0 <= c < len(w):
                raise ValueError(f"target: expected a class in [0, {len(w)}), got {c}")
            yield c, a


def _forward(logits, target, weight, ignore_index, e):
    """(row losses, D, per row: surprise lse - z)"""
    z, target, kind = _rows(logits, target)
    R, C = z.shape
    w = np.ones(C) if weight is None else np.asarray(weight, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        top = z.max(axis=1, initial=-np.inf, keepdims=True)
        surprise = np.logaddexp.reduce(z - top, axis=1, keepdims=True) + (top - z)
        surprise[np.isposinf(z).any(axis=1)] = np.nan
    losses, D = np.zeros(R), 0.0
    for r in range(R):
        if kind == "dense":
            t = np.where(np.arange(C) == ignore_index, 0.0, target[r])
            losses[r] = np.sum(_product(w * ((1 - e) * t + e / C), surprise[r]))
            D += 1
            continue
        for c, a in _components(target[0][r], target[1][r], w, ignore_index):
            value = (1 - e) * _product(w[c], surprise[r, c])
            if e > 0:
                value += e / C * np.sum(_product(w, surprise[r]))
            losses[r] += _product(a, value)
            D += a * w[c]
    return losses, D, surprise, (z, target, kind, w)


def soft_cross_entropy(logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """The loss; logits `[N, C, ...]`, target class indices, `(classes, weights)` or probabilities.

    >>> float(soft_cross_entropy([[0.0, 0.0]], ([[0, 1]], [[0.5, 0.5]])).round(6))
    0.693147
    """
    losses, D, _, _ = _forward(logits, target, weight, ignore_index, label_smoothing)
    if reduction == "none":
        shape = np.shape(logits)
        return losses.reshape(shape[:1] + shape[2:])
    with np.errstate(invalid="ignore", divide="ignore"):
        return losses.sum() if reduction == "sum" else np.float64(losses.sum()) / D


def soft_cross_entropy_grad(
    logits, target, upstream=1.0, *, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"
):
    """(gradient to the logits, gradient to the K-hot weights or the dense target), each in its argument's shape.

    Every term of the loss is differentiated by itself: d(lse - z[c])/dz = softmax(z) - onehot(c).

    >>> dz, da = soft_cross_entropy_grad([[0.0, 0.0]], ([[0, 1]], [[0.75, 0.25]]))
    >>> dz.tolist()
    [[-0.25, 0.25]]
    """
    e = label_smoothing
    losses, D, surprise, (z, target, kind, w) = _forward(logits, target, weight, ignore_index, e)
    R, C = z.shape
    upstream = np.broadcast_to(np.asarray(upstream, dtype=np.float64).reshape(-1), R)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.divide(1.0, D) if reduction == "mean" else 1.0
        mean = np.sum(losses) * scale
    dz = np.zeros((R, C))
    da = np.zeros((R, C) if kind == "dense" else target[0].shape)
    for r in range(R):
        with np.errstate(over="ignore"):
            p = np.exp(-surprise[r])
        factor = upstream[r] * scale
        if kind == "dense":
            kept = (np.arange(C) != ignore_index).astype(np.float64)
            t = w * ((1 - e) * np.where(kept == 0, 0.0, target[r]) + e / C)
            dz[r] = (_product(t.sum(), p) - t) * factor
            da[r] = _product((1 - e) * w * kept, surprise[r]) * factor
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
            value = (1 - e) * _product(w[c], surprise[r, c])
            if e > 0:
                value += e / C * np.sum(_product(w, surprise[r]))
            da[r, k] = (value - (_product(w[c], mean) if reduction == "mean" else 0.0)) * factor

    def back(rows, shape):
        return np.moveaxis(rows.reshape(shape[0], *shape[2:], rows.shape[-1]), -1, 1)

    shape = np.shape(logits)
    return back(dz, shape), back(da, shape)


def mixed_accuracy(logits, target, topk=1, ignore_index=-100):
    """Target weight on the topk largest logits, averaged over rows; one with ignored classes counts by the rest of its weight.

    >>> float(mixed_accuracy([[2.0, 1.0, 0.0]], ([[0, 1]], [[0.75, 0.25]])))
    0.75
    """
    z, target, kind = _rows(logits, target)
    hits, shares = [], []
    for r, row in enumerate(z):
        top = np.argsort(-row, kind="stable")[:topk]
        if kind == "dense":
            hits.append(target[r][top].sum())
            shares.append(1.0)
            continue
        classes, weights = target[0][r], target[1][r]
        kept = classes != ignore_index
        hits.append(sum(a for c, a in zip(classes[kept], weights[kept], strict=True) if c in top))
        shares.append(1.0 if kept.all() else min(max(weights[kept].sum(), 0.0), 1.0))
    return np.sum(hits) / np.sum(shares) if np.sum(shares) else np.float64("nan")
