"""out[i] = lam[i]*x[i] + (1-lam[i])*x[index[i]] outside row i's box, x[index[i]] inside (arXiv:1710.09412, arXiv:1905.04899)."""

import numpy as np


def _box(box, i, shape):
    """Where row i's box is, in a row of this shape."""
    inside = np.zeros(shape, dtype=bool)
    if box is not None:
        dims = len(box[i]) // 2
        corners = [slice(max(box[i][d], 0), max(box[i][dims + d], 0)) for d in range(dims)]
        inside[tuple([Ellipsis, *corners])] = True  # noqa: C409
    return inside


def _arguments(x, lam, index, box):
    x = np.asarray(x, dtype=np.float64)
    lam = np.broadcast_to(np.asarray(lam, dtype=np.float64), len(x))
    index = np.asarray(index)
    for i, j in enumerate(index):
        if not 0 <= j < len(x):
            raise ValueError(f"index: expected a partner in [0, {len(x)}), got {j} in row {i}")
    return x, lam, index, None if box is None else np.asarray(box)


def mix(x, lam, index, box=None):
    """The mixed batch. A value whose weight is 0 is not looked at.

    >>> mix([[0.0], [4.0]], [0.75, 1.0], [1, 0]).tolist()
    [[1.0], [4.0]]
    """
    x, lam, index, box = _arguments(x, lam, index, box)
    out = np.empty_like(x)
    for i, j in enumerate(index):
        if lam[i] == 1:
            mixed = x[i]
        elif lam[i] == 0:
            mixed = x[j]
        else:
            mixed = lam[i] * x[i] + (1 - lam[i]) * x[j]
        out[i] = np.where(_box(box, i, x.shape[1:]), x[j], mixed)
    return out


def mix_grad(g, x, lam, index, box=None):
    """(dL/dx, dL/dlam per row) for the upstream gradient g of `mix`; for one lam for all rows, sum the latter.

    >>> dx, dlam = mix_grad([[1.0], [10.0]], [[0.0], [4.0]], [0.75, 1.0], [1, 0])
    >>> dx.tolist(), dlam.tolist()
    ([[0.75], [10.25]], [-4.0, 40.0])
    """
    x, lam, index, box = _arguments(x, lam, index, box)
    g = np.asarray(g, dtype=np.float64)
    dx, dlam = np.zeros_like(x), np.zeros(len(x))
    for i, j in enumerate(index):
        inside = _box(box, i, x.shape[1:])
        own, other = np.where(inside, 0.0, lam[i]), np.where(inside, 1.0, 1 - lam[i])
        dx[i] += np.where(own == 0, 0.0, own * np.where(own == 0, 0.0, g[i]))
        dx[j] += np.where(other == 0, 0.0, other * np.where(other == 0, 0.0, g[i]))
        dlam[i] = np.sum(g[i][~inside] * (x[i][~inside] - x[j][~inside]))
    return dx, dlam
