"""Moving blocks under a mask (PuzzleMix, arXiv:2009.06962, Algorithm 1), block by block.

    cost[s, t] = t_eps * distance(s, t)^2 / (n-1)^2 - saliency[s] * [mask[t] > 0]

In every round each source proposes to its cheapest target; a target keeps its cheapest proposal, and 1 is added to the cost of those
that it refuses. Ties go to the first. A proposal counts only at a cost below 0.
"""

import numpy as np


def transport_plan(mask, saliency, t_eps, rounds=None):
    """Returns the block that each block comes from, [N, n*n]; its own where the mask hides it or nothing was moved there.

    >>> transport_plan([[[1.0, 0.0], [0.0, 0.0]]], [[[0.1, 0.1], [0.1, 0.7]]], 0.1).tolist()
    [[3, 1, 2, 3]]
    """
    mask, saliency = np.asarray(mask, dtype=np.float64), np.asarray(saliency, dtype=np.float64)
    N, n, _ = mask.shape
    plan = np.tile(np.arange(n * n), (N, 1))
    for i in range(N):
        cost = np.zeros((n * n, n * n))
        for s in range(n * n):
            for t in range(n * n):
                square = (s // n - t // n) ** 2 + (s % n - t % n) ** 2
                cost[s, t] = t_eps * square / max((n - 1) ** 2, 1) - saliency[i].flat[s] * (mask[i].flat[t] > 0)
        for _ in range(n if rounds is None else rounds):
            targets = [int(np.argmin(cost[s])) for s in range(n * n)]
            plan[i] = np.arange(n * n)
            for t in range(n * n):
                proposals = [s for s in range(n * n) if targets[s] == t]
                good = [s for s in proposals if cost[s, t] < 0]
                winner = min(good, key=lambda s: (cost[s, t], s)) if good else None
                if winner is not None:
                    plan[i, t] = winner
                for s in proposals:
                    cost[s, t] += s != winner
    return plan
