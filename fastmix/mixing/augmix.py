"""The op under `fastmix.AugMix`: bytes of images to normalised images and views of them. Nothing is differentiable.

views[v, n] = w[n, v, 0]*N(images[n]) + sum over k of w[n, v, 1 + k]*N(chain k of (n, v)),     N(image) = image*factor[c] + shift[c]
"""

from typing import Any

import torch
from torch.library import custom_op

from .. import _backend, _dispatch


def _launch(
    images: torch.Tensor,
    kinds: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    factor: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    return _backend.of(images).augmix_fwd(images, kinds, values, weights, factor, shift)


@custom_op("fastmix::augmix", mutates_args=())
def _augmix_op(
    images: torch.Tensor,
    kinds: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    factor: torch.Tensor,
    shift: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    return _backend.module(backend).augmix_fwd(images, kinds, values, weights, factor, shift)


@_augmix_op.register_fake
def _(
    images: torch.Tensor,
    kinds: torch.Tensor,
    values: torch.Tensor,
    weights: torch.Tensor,
    factor: torch.Tensor,
    shift: torch.Tensor,
    backend: str,
) -> Any:
    return images.new_empty((1 + weights.shape[1], *images.shape), dtype=torch.float32)


OP = _dispatch.Op(_launch, _augmix_op, _launch, _launch)
