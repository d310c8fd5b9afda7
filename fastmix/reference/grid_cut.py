"""The energy of PuzzleMix's labels (arXiv:2009.06962, Section 4), and its minimum by trying all of them.

    E(l) = sum over cells of unary[cell, l] + sum over neighbours of weight*(l - l')^2 / (L-1)^2

L^(n*n) labellings are tried: for n of 2, and for n of 3 where L is 2 or 3.
"""

import numpy as np


def grid_energy(unary, vertical, horizontal, labels):
    """Returns the energy of one grid: unary [n, n, L], vertical [n-1, n], horizontal [n, n-1], labels [n, n].

    >>> grid_energy([[[0.0, 1.0], [2.0, 3.0]]] * 2, [[1.0, 1.0]], [[5.0]] * 2, [[0, 1], [1, 1]])
    13.0
    """
    unary, labels = np.asarray(unary, dtype=np.float64), np.asarray(labels)
    n, _, L = unary.shape
    total = 0.0
    for y in range(n):
        for x in range(n):
            total += unary[y, x, labels[y, x]]
            if y + 1 < n:
                total += float(vertical[y][x]) * (labels[y, x] - labels[y + 1, x]) ** 2 / (L - 1) ** 2
            if x + 1 < n:
                total += float(horizontal[y][x]) * (labels[y, x] - labels[y, x + 1]) ** 2 / (L - 1) ** 2
    return float(total)


def grid_cut(unary, vertical, horizontal):
    """Returns (labels [N, n, n], their energies [N]) of least energy; the first in counting order of equal ones.

    >>> labels, energies = grid_cut([[[[0.0, 1.0], [1.0, 0.0]]] * 2], [[[0.0, 0.0]]], [[[0.25]] * 2])
    >>> labels.tolist(), energies.tolist()
    ([[[0, 1], [0, 1]]], [0.5])
    """
    unary = np.asarray(unary, dtype=np.float64)
    N, n, _, L = unary.shape
    if L ** (n * n) > 3**9:
        raise ValueError(f"unary: expected at most 3**9 labellings of a grid, got {L}**{n * n}")
    labels, energies = np.zeros((N, n, n), dtype=np.int64), np.zeros(N)
    for i in range(N):
        candidates = [np.reshape(choice, (n, n)) for choice in np.ndindex(*[L] * (n * n))]
        costs = [grid_energy(unary[i], vertical[i], horizontal[i], candidate) for candidate in candidates]
        best = int(np.argmin(costs))
        labels[i], energies[i] = candidates[best], costs[best]
    return labels, energies
