"""out[i, y, x] = m*own + (1-m)*other, m = mask[i, cell] (PuzzleMix, arXiv:2009.06962): own and other are row i's and row
index[i]'s pixel at (y, x), or with a plan at the same place within another block. Row by row, blocks one at a time."""

import numpy as np


def _arguments(x, mask, index, plan, partner_plan):
    x, mask, index = np.asarray(x, dtype=np.float64), np.asarray(mask, dtype=np.float64), np.asarray(index)
    N, h, w = mask.shape
    for i, j in enumerate(index):
        if not 0 <= j < N:
            raise ValueError(f"index: expected a partner in [0, {N}), got {j} in row {i}")
    plans = [None if p is None else np.asarray(p) for p in (plan, partner_plan)]
    if any(p is not None and np.any((p < 0) | (p >= h * w)) for p in plans):
        raise ValueError(f"plan: expected blocks in [0, {h * w})")
    return x, mask, index, *plans


def _cell(image, number, h, w):
    """The pixels of one cell of an image [..., H, W], as a view."""
    tall, wide = image.shape[-2] // h, image.shape[-1] // w
    y, x = divmod(number, w)
    return image[..., y * tall : (y + 1) * tall, x * wide : (x + 1) * wide]


def _transport(image, plan, i, h, w):
    """The image whose block b is block plan[i, b] of this one."""
    if plan is None:
        return image
    moved = np.empty_like(image)
    for b, source in enumerate(plan[i]):
        _cell(moved, b, h, w)[...] = _cell(image, source, h, w)
    return moved


def _spread(cells, shape):
    """A mask [h, w] over the pixels of an image."""
    h, w = cells.shape
    return np.repeat(np.repeat(cells, shape[-2] // max(h, 1), axis=0), shape[-1] // max(w, 1), axis=1)


def _weighted(m, value):
    """m*value; what has no weight is not looked at."""
    m = np.broadcast_to(m, value.shape)
    return np.where(m == 0, 0.0, m * np.where(m == 0, 0.0, value))


def mix_masked(x, mask, index, plan=None, partner_plan=None):
    """The mixed batch. A value whose weight is 0 is not looked at.

    >>> mix_masked([[[0.0, 0.0]], [[4.0, 8.0]]], [[[0.75, 0.0]], [[1.0, 0.5]]], [1, 0]).tolist()
    [[[1.0, 8.0]], [[4.0, 4.0]]]
    """
    x, mask, index, plan, partner_plan = _arguments(x, mask, index, plan, partner_plan)
    h, w = mask.shape[1:]
    out = np.empty_like(x)
    for i, j in enumerate(index):
        m = _spread(mask[i], x.shape)
        out[i] = _weighted(m, _transport(x[i], plan, i, h, w)) + _weighted(1 - m, _transport(x[j], partner_plan, i, h, w))
    return out


def mix_masked_grad(g, x, mask, index, plan=None, partner_plan=None):
    """(dL/dx, dL/dmask) for the upstream gradient g of `mix_masked`.

    >>> dx, dmask = mix_masked_grad([[[1.0, 2.0]], [[3.0, 4.0]]], [[[0.0, 0.0]], [[4.0, 8.0]]], [[[0.75]], [[1.0]]], [1, 0])
    >>> dx.tolist(), dmask.tolist()
    ([[[0.75, 1.5]], [[3.25, 4.5]]], [[[-20.0]], [[44.0]]])
    """
    x, mask, index, plan, partner_plan = _arguments(x, mask, index, plan, partner_plan)
    g = np.asarray(g, dtype=np.float64)
    h, w = mask.shape[1:]
    dx, dmask = np.zeros_like(x), np.zeros_like(mask)
    for i, j in enumerate(index):
        m = _spread(mask[i], x.shape)
        for row, share, moves in ((i, _weighted(m, g[i]), plan), (j, _weighted(1 - m, g[i]), partner_plan)):
            if moves is None:
                dx[row] += share
            else:
                for b, source in enumerate(moves[i]):
                    _cell(dx[row], source, h, w)[...] += _cell(share, b, h, w)
        product = g[i] * (_transport(x[i], plan, i, h, w) - _transport(x[j], partner_plan, i, h, w))
        if product.size:
            dmask[i] = product.reshape(-1, h, x.shape[-2] // h, w, x.shape[-1] // w).sum(axis=(0, 2, 4))
    return dx, dmask
