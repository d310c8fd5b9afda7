"""loss[n] = scale*(1/K)*sum over k of KL(p_k || m), p_k = softmax(z_k), m = mean over k of p_k (arXiv:1912.02781, unclamped)."""

import numpy as np


def _row(z):
    """(p [K, C], log p - log m where p > 0, else 0) of one row's logits [K, C]."""
    with np.errstate(all="ignore"):
        logs = z - z.max(axis=1, keepdims=True)
        logs = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)
        p = np.exp(logs)
        gap = logs - (np.logaddexp.reduce(logs, axis=0) - np.log(len(z)))
    if np.isnan(p).any():
        return np.full_like(p, np.nan), np.full_like(p, np.nan)
    return p, np.where(p == 0, 0.0, gap)


def _sets(logits):
    return np.stack([np.asarray(z, dtype=np.float64) for z in logits])


def js_divergence(logits, *, scale=1.0, reduction="mean"):
    """The loss of K sets of logits [N, C].

    >>> float(js_divergence([[[0.0, -np.inf]], [[-np.inf, 0.0]]]).round(6))  # log 2
    0.693147
    """
    z = _sets(logits)
    losses = np.zeros(z.shape[1])
    for n in range(z.shape[1]):
        p, gap = _row(z[:, n])
        losses[n] = scale * np.mean([np.sum(p[k] * gap[k]) for k in range(len(p))])
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else np.mean(losses) if len(losses) else np.float64("nan")


def js_divergence_grad(logits, upstream=1.0, *, scale=1.0, reduction="mean"):
    """The gradient to the logits [K, N, C]. m moves with every p_k, but that adds up to 0: sum over k, c of p_k*dm/m = 0.

    >>> js_divergence_grad([[[0.0, 0.0]], [[0.0, -np.inf]]]).round(3).tolist()
    [[[-0.137, 0.137]], [[0.0, -0.0]]]
    """
    z = _sets(logits)
    K, N, _ = z.shape
    upstream = np.broadcast_to(np.asarray(upstream, dtype=np.float64), (N,))
    dz = np.zeros_like(z)
    for n in range(N):
        p, gap = _row(z[:, n])
        for k in range(K):
            slope = gap[k] - np.sum(p[k] * gap[k])  # d loss/d p_k, but for 1/K, along changes of p_k that sum to 0
            dz[k, n] = p[k] * slope / K * scale * upstream[n] / (N if reduction == "mean" else 1)
    return dz
