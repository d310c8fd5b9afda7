"""Weighted sums of several batches (AugMix, arXiv:1912.02781, whose skip connection is one more source).

    out[n] = sum over k of weights[n, k]*sources[k][n]

A source of weight 0 is not read.
"""

import numpy as np


def _float_arrays(sources, weights):
    return [np.asarray(source, dtype=np.float64) for source in sources], np.asarray(weights, dtype=np.float64)


def convex_combination(sources, weights):
    """Returns the combined batch.

    >>> convex_combination([[[1.0], [2.0]], [[5.0], [6.0]]], [[0.5, 0.5], [-1.0, 2.0]]).tolist()
    [[3.0], [10.0]]
    """
    sources, weights = _float_arrays(sources, weights)
    out = np.zeros_like(sources[0])
    for n, row in enumerate(weights):
        used = np.flatnonzero(row)
        if len(used):
            out[n] = np.tensordot(row[used], np.stack([sources[k][n] for k in used]), 1)
    return out


def convex_combination_grad(g, sources, weights):
    """Returns (dL/dsources [K, N, ...], dL/dweights [N, K]) for the gradient g to the combined batch.

    >>> dsources, dweights = convex_combination_grad([[2.0], [3.0]], [[[1.0], [2.0]], [[5.0], [6.0]]], [[0.5, 0.5], [-1.0, 2.0]])
    >>> dsources.tolist(), dweights.tolist()
    ([[[1.0], [-3.0]], [[1.0], [6.0]]], [[2.0, 10.0], [6.0, 18.0]])
    """
    sources, weights = _float_arrays(sources, weights)
    g = np.asarray(g, dtype=np.float64)
    dsources, dweights = np.zeros((len(sources), *g.shape)), np.zeros(weights.shape)
    for n, k in np.ndindex(weights.shape):
        if weights[n, k] != 0:
            dsources[k, n] = weights[n, k] * g[n]
        dweights[n, k] = np.vdot(g[n], sources[k][n])
    return dsources, dweights
