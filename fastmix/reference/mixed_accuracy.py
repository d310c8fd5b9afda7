"""Accuracy on soft targets.

    accuracy = sum over rows of the target weight on the topk largest logits / sum over rows of the row's weight

A row weighs 1, and with ignored classes the rest of its target's weight, cut to [0, 1].
"""

import numpy as np

from ._common import logit_rows


def mixed_accuracy(logits, target, topk=1, ignore_index=-100):
    """Returns the mean over rows of the target weight on the topk largest logits.

    A row with ignored classes counts by the rest of its weight.

    >>> float(mixed_accuracy([[2.0, 1.0, 0.0]], ([[0, 1]], [[0.75, 0.25]])))
    0.75
    """
    z, target, kind = logit_rows(logits, target)
    hits, row_weights = [], []
    for r, row in enumerate(z):
        top = np.argsort(-row, kind="stable")[:topk]
        if kind == "dense":
            hits.append(target[r][top].sum())
            row_weights.append(1.0)
            continue
        classes, weights = target[0][r], target[1][r]
        kept = classes != ignore_index
        hits.append(sum(a for c, a in zip(classes[kept], weights[kept], strict=True) if c in top))
        row_weights.append(1.0 if kept.all() else min(max(weights[kept].sum(), 0.0), 1.0))
    return np.sum(hits) / np.sum(row_weights) if np.sum(row_weights) else np.float64("nan")
