"""AugMix's objective: cross-entropy of the clean rows, and how far the predictions for their views differ."""

import torch

from .. import _check
from .js_divergence import js_divergence
from .soft_cross_entropy import soft_cross_entropy


def augmix_loss(logits: torch.Tensor, y: torch.Tensor, splits: int = 3, scale: float = 12.0) -> torch.Tensor:
    """AugMix's loss of one forward over the clean batch and its views.

        loss = mean over n of CE(z[0, n], y[n])  +  scale * mean over n of (1/K) * sum over k of KL(p_k[n] || mean over k of p_k[n])

    z = logits viewed as `[K, N, C]`, p_k = softmax(z[k]), K = `splits`. The divergence is `fastmix.js_divergence`: nothing is clamped, where
    the authors clamp the mean of the p_k at 1e-7.

    Args:
        logits: `[K*N, C]`, the clean rows first, then those of each view; float16, bfloat16, float32 or float64.
        y: targets of the N clean rows: all that `fastmix.soft_cross_entropy` takes.
        splits: K, from 1 to 16.
        scale: of the divergence; the authors take 12.

    Returns:
        The loss, a scalar in float32 (float64 for float64), differentiable once in the logits.

    Raises:
        TypeError, ValueError: a wrong argument; as of `soft_cross_entropy` and `js_divergence`.

    Source: AugMix, arXiv:1912.02781.

    >>> import torch, fastmix
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 1.0]])
    >>> fastmix.augmix_loss(logits, torch.tensor([0, 1]))
    tensor(0.6782)
    """
    _check.float_tensor("logits", logits, 2, "[K*N, C]")
    splits = _check.integer("splits", splits, 1, "an int from 1 to 16")
    if splits > 16:
        raise _check.wrong(ValueError, "splits", "an int from 1 to 16", splits)
    if logits.dim() != 2 or logits.shape[0] % splits:
        raise _check.wrong(
            ValueError, "logits", f"shape [{splits}*N, C], the clean rows and {splits - 1} views of each", logits
        )
    parts = logits.view(splits, -1, logits.shape[1]) if logits.is_contiguous() else torch.stack(logits.chunk(splits))
    return soft_cross_entropy(parts[0], y) + js_divergence(parts, scale=scale)
