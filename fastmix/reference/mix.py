"""Mixing each row with a partner row (mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899).

    out[i] = lam[i]*x[i] + (1-lam[i])*x[index[i]]    outside row i's box
    out[i] = x[index[i]]                             inside it

A value of weight 0 is not read.
"""

import numpy as np

from ._common import partners, times


def _inside_box(box, i, shape):
    """Returns which elements of a row of this shape lie in row i's box."""
    inside = np.zeros(shape, dtype=bool)
    if box is not None:
        dims = len(box[i]) // 2
        corners = [slice(max(box[i][d], 0), max(box[i][dims + d], 0)) for d in range(dims)]
        inside[tuple([Ellipsis, *corners])] = True  # noqa: C409
    return inside


def _mix_arrays(x, lam, index, box):
    """Returns the arguments as arrays, lam for each row."""
    x = np.asarray(x, dtype=np.float64)
    lam = np.broadcast_to(np.asarray(lam, dtype=np.float64), len(x))
    return x, lam, partners(index, len(x)), None if box is None else np.asarray(box)


def mix(x, lam, index, box=None):
    """Returns the mixed batch.

    >>> mix([[0.0], [4.0]], [0.75, 1.0], [1, 0]).tolist()
    [[1.0], [4.0]]
    """
    x, lam, index, box = _mix_arrays(x, lam, index, box)
    out = np.empty_like(x)
    for i, j in enumerate(index):
        if lam[i] == 1:
            mixed = x[i]
        elif lam[i] == 0:
            mixed = x[j]
        else:
            mixed = lam[i] * x[i] + (1 - lam[i]) * x[j]
        out[i] = np.where(_inside_box(box, i, x.shape[1:]), x[j], mixed)
    return out


def mix_grad(g, x, lam, index, box=None):
    """Returns (dL/dx, dL/dlam for each row) for the gradient g to the mixed batch; the sum of the latter is that of one lam.

    >>> dx, dlam = mix_grad([[1.0], [10.0]], [[0.0], [4.0]], [0.75, 1.0], [1, 0])
    >>> dx.tolist(), dlam.tolist()
    ([[0.75], [10.25]], [-4.0, 40.0])
    """
    x, lam, index, box = _mix_arrays(x, lam, index, box)
    g = np.asarray(g, dtype=np.float64)
    dx, dlam = np.zeros_like(x), np.zeros(len(x))
    for i, j in enumerate(index):
        inside = _inside_box(box, i, x.shape[1:])
        dx[i] += times(np.where(inside, 0.0, lam[i]), g[i])
        dx[j] += times(np.where(inside, 1.0, 1 - lam[i]), g[i])
        dlam[i] = np.sum(g[i][~inside] * (x[i][~inside] - x[j][~inside]))
    return dx, dlam
