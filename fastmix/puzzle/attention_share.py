"""How much of an image a mask shows, by where the network looks: TransMix's label share.

share[i] = sum of attention[i]*mask[i] / sum of attention[i]
"""

import torch

from .. import _check
from .._dtypes import FLOATS


def attention_share(mask: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Returns the part of the attention that falls on what a mask shows, `[N]`: the row's own share in the target.

        share[i] = sum of attention[i] * mask[i] / sum of attention[i]

    Give it as `target_lam` to a `Mix` in place of the mask's mean. A row without attention gets its mask's mean. Differentiable in both.

    Args:
        mask: `[N, h, w]` floating point, the weight of the row itself.
        attention: `[N, H, W]` floating point, at least 0, of the mixed image (the class token's, averaged over heads, in a
            transformer); h divides H and w divides W, or the other way round.

    Returns:
        `[N]` float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also attention that is negative or NaN.

    Source: TransMix, arXiv:2111.09833.

    >>> import torch, fastmix
    >>> mask = torch.tensor([[[1.0, 0.0]]])
    >>> fastmix.attention_share(mask, torch.tensor([[[0.6, 0.1, 0.1, 0.2]]]))
    tensor([0.7000])
    """
    for name, value in (("mask", mask), ("attention", attention)):
        _check.strided(name, value, FLOATS, "a float16, bfloat16, float32 or float64 tensor")
        if value.dim() != 3:
            raise _check.wrong(ValueError, name, "shape [N, h, w]", value)
    if mask.shape[0] != attention.shape[0]:
        raise _check.wrong(ValueError, "attention", f"{mask.shape[0]} rows, as mask", attention)
    _check.same_device("attention", attention, mask)
    if _check.readable(attention) and not bool((attention >= 0).all()):
        raise ValueError(f"attention: expected values of at least 0, got one of {float(attention.detach().min())}")
    dtype = torch.promote_types(torch.promote_types(mask.dtype, attention.dtype), torch.float32)
    mask, attention = mask.to(dtype), attention.to(dtype)
    for dim in (1, 2):
        cells, pixels = mask.shape[dim], attention.shape[dim]
        if not cells or not pixels or max(cells, pixels) % min(cells, pixels):
            raise _check.wrong(ValueError, "attention", f"a size that mask's {list(mask.shape[1:])} cells divide", attention)
        if pixels > cells:
            attention = attention.unflatten(dim, (cells, -1)).sum(dim + 1)
        elif cells > pixels:
            mask = mask.unflatten(dim, (pixels, -1)).mean(dim + 1)
    total = attention.sum((1, 2))
    share = (attention * mask).sum((1, 2)) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, share, mask.mean((1, 2)))
