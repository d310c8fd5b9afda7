"""Jensen-Shannon divergence of K sets of logits z_k (AugMix, arXiv:1912.02781, without its clamp).

loss[n] = scale*(1/K)*sum over k of KL(p_k || m),    p_k = softmax(z_k[n]),    m = mean over k of p_k
"""

import numpy as np

from ._common import reduced


def _log_ratio(z):
    """Returns (p [K, C], log p - log m where p > 0, else 0) of one row's logits [K, C]."""
    with np.errstate(all="ignore"):
        logs = z - z.max(axis=1, keepdims=True)
        logs = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)
        p = np.exp(logs)
        log_ratio = logs - (np.logaddexp.reduce(logs, axis=0) - np.log(len(z)))
    if np.isnan(p).any():
        return np.full_like(p, np.nan), np.full_like(p, np.nan)
    return p, np.where(p == 0, 0.0, log_ratio)


def _stacked(logits):
    return np.stack([np.asarray(z, dtype=np.float64) for z in logits])


def js_divergence(logits, *, scale=1.0, reduction="mean"):
    """Returns the loss of K sets of logits [N, C].

    >>> float(js_divergence([[[0.0, -np.inf]], [[-np.inf, 0.0]]]).round(6))  # log 2
    0.693147
    """
    z = _stacked(logits)
    losses = np.zeros(z.shape[1])
    for n in range(z.shape[1]):
        p, log_ratio = _log_ratio(z[:, n])
        losses[n] = scale * np.mean([np.sum(p[k] * log_ratio[k]) for k in range(len(p))])
    return reduced(losses, len(losses), reduction, logits[0])


def js_divergence_grad(logits, upstream=1.0, *, scale=1.0, reduction="mean"):
    """Returns the gradient to the logits [K, N, C].

    m depends on every p_k as well, but what that adds to the derivative sums to 0: sum over k, c of p_k*dm/m = 0.

    >>> js_divergence_grad([[[0.0, 0.0]], [[0.0, -np.inf]]]).round(3).tolist()
    [[[-0.137, 0.137]], [[0.0, -0.0]]]
    """
    z = _stacked(logits)
    K, N, _ = z.shape
    upstream = np.broadcast_to(np.asarray(upstream, dtype=np.float64), (N,))
    dz = np.zeros_like(z)
    for n in range(N):
        p, log_ratio = _log_ratio(z[:, n])
        for k in range(K):
            slope = log_ratio[k] - np.sum(p[k] * log_ratio[k])  # K*dloss/dp_k, along changes of p_k that sum to 0
            dz[k, n] = p[k] * slope / K * scale * upstream[n] / (N if reduction == "mean" else 1)
    return dz
