"""resize_mix: the partner, resized bilinearly, inside each row's box."""

import numpy as np


def _sampled(place, length, size):
    """Returns {pixel: weight} of what a place of a box's side is sampled from; pixels beyond the image are those at its edge."""
    s = (place + 0.5) * size / length - 0.5
    low = int(np.floor(s))
    found = {}
    for pixel, weight in ((low, 1 - (s - low)), (low + 1, s - low)):
        pixel = min(max(pixel, 0), size - 1)
        found[pixel] = found.get(pixel, 0.0) + weight
    return found


def _places(box, H, W):
    """Yields (y, x, place, length along either side) of every pixel of a box, which is cut off at the image's border."""
    y0, x0 = (min(max(int(at), 0), size) for at, size in zip(box[:2], (H, W), strict=True))
    y1, x1 = (min(int(at), size) for at, size in zip(box[2:], (H, W), strict=True))
    for y in range(y0, y1):
        for x in range(x0, x1):
            yield y, x, _sampled(y - y0, y1 - y0, H), _sampled(x - x0, x1 - x0, W)


def resize_mix(x, index, box):
    """Returns the mixed batch [N, ..., H, W]."""
    x = np.asarray(x, dtype=np.float64)
    out = x.copy()
    for i, j in enumerate(index):
        for y, column, lines, columns in _places(box[i], *x.shape[-2:]):
            out[i, ..., y, column] = sum(
                v * u * x[j, ..., p, q] for p, v in lines.items() for q, u in columns.items() if v * u != 0
            )
    return out


def resize_mix_grad(grad_output, index, box):
    """Returns the gradient to x."""
    g = np.asarray(grad_output, dtype=np.float64)
    dx = g.copy()
    for i in range(len(g)):
        for y, column, _, _ in _places(box[i], *g.shape[-2:]):
            dx[i, ..., y, column] = 0
    for i, j in enumerate(index):
        for y, column, lines, columns in _places(box[i], *g.shape[-2:]):
            for p, v in lines.items():
                for q, u in columns.items():
                    dx[j, ..., p, q] += v * u * g[i, ..., y, column]
    return dx
