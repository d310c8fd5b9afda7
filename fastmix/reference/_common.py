"""What several oracles share."""

import numpy as np


def times(weight, value):
    """Returns weight*value, and 0 where the weight is 0 even if the value is inf or NaN."""
    weight = np.broadcast_to(weight, np.shape(value))
    return np.where(weight == 0, 0.0, weight * np.where(weight == 0, 0.0, value))


def partners(index, N):
    """Returns the index as an array, if all its entries are rows."""
    index = np.asarray(index)
    for i, j in enumerate(index):
        if not 0 <= j < N:
            raise ValueError(f"index: expected a partner in [0, {N}), got {j} in row {i}")
    return index


def logit_rows(logits, target):
    """Returns (rows of logits [R, C], rows of the target, "K-hot" or "dense"); R counts every pixel of every image.

    The rows of a K-hot target are a pair (classes [R, K], weights [R, K]), those of a dense one [R, C].
    """
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


def classes_second(rows, logits):
    """Returns rows [R, C or K] in the shape of the logits, [N, C or K, d1, ...]."""
    shape = np.shape(logits)
    return np.moveaxis(rows.reshape(shape[0], *shape[2:], rows.shape[-1]), -1, 1)


def reduced(losses, denominator, reduction, logits):
    """Returns the rows' losses in the shape [N, d1, ...] ("none"), their sum, or their sum over the denominator ("mean")."""
    if reduction == "none":
        shape = np.shape(logits)
        return losses.reshape(shape[:1] + shape[2:])
    with np.errstate(invalid="ignore", divide="ignore"):
        return losses.sum() if reduction == "sum" else np.float64(losses.sum()) / np.float64(denominator)
