"""Bytes of images, normalised and then mixed with a partner image."""

import numpy as np

from .mix import mix
from .mix_masked import mix_masked


def mix_images(
    images, mean, std, scale=1 / 255, flip=None, lam=None, index=None, box=None, mask=None, plan=None, partner_plan=None
):
    """Returns (images*scale - mean)/std for images [N, C, d1, ...], mirrored along the last dimension where flip[i], and mixed
    as `mix` does by lam, index and box, or as `mix_masked` does by mask, index and plans. Without an index: not mixed.

    >>> mix_images([[[0, 255]]], [0.5], [0.5]).tolist()
    [[[-1.0, 1.0]]]
    """
    x = np.asarray(images, dtype=np.float64)
    like = [1, -1, *[1] * (x.ndim - 2)]
    x = (x * scale - np.reshape(mean, like)) / np.reshape(std, like)
    for i in range(len(x)):
        if flip is not None and flip[i]:
            x[i] = x[i][..., ::-1].copy()
    if index is None:
        return x
    return mix(x, lam, index, box) if mask is None else mix_masked(x, mask, index, plan, partner_plan)
