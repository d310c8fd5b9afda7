"""Mixing each row with a partner row by a mask, and moving blocks of either (PuzzleMix, arXiv:2009.06962).

    out[i, y, x] = m*own + (1-m)*other,    m = mask[i, cell of (y, x)]

own and other are the pixels of row i and of row index[i] at (y, x), or with a plan at the same place within another block:
block b comes from block plan[i, b], or partner_plan[i, b]. A value of weight 0 is not read.
"""

import numpy as np

from ._common import partners, times


def _masked_arrays(x, mask, index, plan, partner_plan):
    """Returns the arguments as arrays."""
    x, mask = np.asarray(x, dtype=np.float64), np.asarray(mask, dtype=np.float64)
    N, h, w = mask.shape
    plans = [None if p is None else np.asarray(p) for p in (plan, partner_plan)]
    if any(p is not None and np.any((p < 0) | (p >= h * w)) for p in plans):
        raise ValueError(f"plan: expected blocks in [0, {h * w})")
    return x, mask, partners(index, N), *plans


def _cell(image, number, h, w):
    """Returns the pixels of one cell of an image [..., H, W], as a view."""
    height, width = image.shape[-2] // h, image.shape[-1] // w
    y, x = divmod(number, w)
    return image[..., y * height : (y + 1) * height, x * width : (x + 1) * width]


def _transported(image, plan, i, h, w):
    """Returns the image whose block b is block plan[i, b] of this one."""
    if plan is None:
        return image
    moved = np.empty_like(image)
    for b, source in enumerate(plan[i]):
        _cell(moved, b, h, w)[...] = _cell(image, source, h, w)
    return moved


def _pixel_weights(cells, shape):
    """Returns the mask's [h, w] value at each pixel of an image of this shape."""
    h, w = cells.shape
    return np.repeat(np.repeat(cells, shape[-2] // max(h, 1), axis=0), shape[-1] // max(w, 1), axis=1)


def mix_masked(x, mask, index, plan=None, partner_plan=None):
    """Returns the mixed batch.

    >>> mix_masked([[[0.0, 0.0]], [[4.0, 8.0]]], [[[0.75, 0.0]], [[1.0, 0.5]]], [1, 0]).tolist()
    [[[1.0, 8.0]], [[4.0, 4.0]]]
    """
    x, mask, index, plan, partner_plan = _masked_arrays(x, mask, index, plan, partner_plan)
    h, w = mask.shape[1:]
    out = np.empty_like(x)
    for i, j in enumerate(index):
        m = _pixel_weights(mask[i], x.shape)
        out[i] = times(m, _transported(x[i], plan, i, h, w)) + times(1 - m, _transported(x[j], partner_plan, i, h, w))
    return out


def mix_masked_grad(g, x, mask, index, plan=None, partner_plan=None):
    """Returns (dL/dx, dL/dmask) for the gradient g to the mixed batch.

    >>> dx, dmask = mix_masked_grad([[[1.0, 2.0]], [[3.0, 4.0]]], [[[0.0, 0.0]], [[4.0, 8.0]]], [[[0.75]], [[1.0]]], [1, 0])
    >>> dx.tolist(), dmask.tolist()
    ([[[0.75, 1.5]], [[3.25, 4.5]]], [[[-20.0]], [[44.0]]])
    """
    x, mask, index, plan, partner_plan = _masked_arrays(x, mask, index, plan, partner_plan)
    g = np.asarray(g, dtype=np.float64)
    h, w = mask.shape[1:]
    dx, dmask = np.zeros_like(x), np.zeros_like(mask)
    for i, j in enumerate(index):
        m = _pixel_weights(mask[i], x.shape)
        for row, part, moves in ((i, times(m, g[i]), plan), (j, times(1 - m, g[i]), partner_plan)):
            if moves is None:
                dx[row] += part
            else:
                for b, source in enumerate(moves[i]):
                    _cell(dx[row], source, h, w)[...] += _cell(part, b, h, w)
        product = g[i] * (_transported(x[i], plan, i, h, w) - _transported(x[j], partner_plan, i, h, w))
        if product.size:
            dmask[i] = product.reshape(-1, h, x.shape[-2] // h, w, x.shape[-1] // w).sum(axis=(0, 2, 4))
    return dx, dmask
