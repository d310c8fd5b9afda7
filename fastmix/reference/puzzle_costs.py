"""What PuzzleMix's cut weighs (arXiv:2009.06962, Section 4, and its authors' code), pixel by pixel.

    unary[i, cell, l] = m*s[j, cell] + (1-m)*s[i, cell] - eta/n^2 * log Binomial(l; L-1, 1-lam[i]) + borders,   m = 1 - l/(L-1)

j = index[i], s the saliency averaged over blocks, divided by its sum. D(a, b) of a border between two blocks is the mean absolute
difference of image a before it and image b behind it, in pixels averaged over squares; b = beta / (16n).
weight = b + gamma*b * (D(i,j) + D(j,i) - D(i,i) - D(j,j)) / 2; the block before a border pays gamma*b*(D(i,i) + D(i,j))/2 if it is the
row's and gamma*b*(D(j,i) + D(j,j))/2 if it is the partner's, the one behind it likewise.
"""

import numpy as np


def _means(image, height, width):
    """Returns an image [..., H, W] averaged over blocks of so many pixels."""
    *lead, H, W = image.shape
    return image.reshape(*lead, H // height, height, W // width, width).mean(axis=(-3, -1))


def puzzle_costs(x, saliency, index, lam, blocks, *, mean=0.0, std=1.0, levels=3, beta=1.2, gamma=0.5, eta=0.2, neighborhood=4):
    """Returns (unary [N, n, n, L], vertical [N, n-1, n], horizontal [N, n, n-1]) for lam between 0 and 1.

    >>> unary, _, _ = puzzle_costs(np.zeros((2, 1, 2, 2)), [np.eye(2), np.ones((2, 2))], [1, 0], 0.5, 2, levels=2, eta=0.0)
    >>> unary[0].tolist()
    [[[0.25, 0.5], [0.25, 0.0]], [[0.25, 0.0], [0.25, 0.5]]]
    """
    x, saliency = np.asarray(x, dtype=np.float64), np.asarray(saliency, dtype=np.float64)
    N, C, H, W = x.shape
    n, height, width = blocks, H // blocks, W // blocks
    rows, cols = min(neighborhood, height), min(neighborhood, width)
    pixels = x * np.reshape(np.broadcast_to(std, (C,)), (1, C, 1, 1)) + np.reshape(np.broadcast_to(mean, (C,)), (1, C, 1, 1))
    b, lam = beta / (16 * n), np.broadcast_to(np.asarray(lam, dtype=np.float64), (N,))
    shares = _means(saliency, height, width)
    shares = np.stack([s / s.sum() if s.sum() > 0 else np.full_like(s, 1 / n**2) for s in shares])
    unary, vertical, horizontal = np.zeros((N, n, n, levels)), np.zeros((N, n - 1, n)), np.zeros((N, n, n - 1))
    for i, j in enumerate(index):
        keep = {"own": shares[j].copy(), "partner": shares[i].copy()}  # what is paid for keeping either image's block
        small = {"own": _means(pixels[i], rows, cols), "partner": _means(pixels[j], rows, cols)}
        for y in range(n):
            for c in range(n):
                for down, weights in ((1, vertical), (0, horizontal)):
                    y2, c2 = y + down, c + 1 - down
                    if y2 == n or c2 == n:
                        continue
                    D = {}
                    for a in small:
                        for other in small:
                            if down:
                                part = slice(c * width // cols, (c + 1) * width // cols)
                                line = (y + 1) * height // rows
                                gap = small[a][:, line - 1, part] - small[other][:, line, part]
                            else:
                                part = slice(y * height // rows, (y + 1) * height // rows)
                                line = (c + 1) * width // cols
                                gap = small[a][:, part, line - 1] - small[other][:, part, line]
                            D[a, other] = np.abs(gap).mean()
                    crossed = D["own", "partner"] + D["partner", "own"] - D["own", "own"] - D["partner", "partner"]
                    weights[i, y, c] = max(b + gamma * b * crossed / 2, 0)
                    for a in small:
                        keep[a][y, c] += gamma * b * (D[a, "own"] + D[a, "partner"]) / 2
                        keep[a][y2, c2] += gamma * b * (D["own", a] + D["partner", a]) / 2
        for l in range(levels):
            m = 1 - l / (levels - 1)
            ways = np.prod([(levels - 1 - k) / (k + 1) for k in range(l)])  # to choose l of L-1
            likely = ways * lam[i] ** (levels - 1 - l) * (1 - lam[i]) ** l
            unary[i, :, :, l] = m * keep["own"] + (1 - m) * keep["partner"] - eta / n**2 * np.log(likely)
    return unary, vertical, horizontal
