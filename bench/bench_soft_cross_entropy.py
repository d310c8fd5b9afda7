"""`fastmix.soft_cross_entropy` on a mixed batch beside the two ways to write it by hand, forward and backward.

Everyone gets logits, class indices, a lam per row and the partners, and builds its own target within the time. The upstream
gradient is 1 as from `loss.backward()`, or another, as under a gradient scaler or beside other losses. Bytes moved are what
nobody can do without: the logits read once and their gradient written once.
"""

import functools

import pytest
import torch

import fastmix
from fastmix.bench import peers

SHAPES = [(128, 10), (256, 1000), (64, 21841)]
UPSTREAM = [1.0, 0.5]


def mixed_loss(logits, y, lam, index):
    return fastmix.soft_cross_entropy(logits, fastmix.Mix(lam, index).target(y))


WAYS = {"fastmix": mixed_loss, **peers.LOSS}


def inputs(shape):
    """(logits, classes, lam, partners), on the CPU"""
    generator = torch.Generator().manual_seed(0)
    N, C = shape
    y = torch.randint(C, (N,), generator=generator)
    return 3 * torch.randn(shape, generator=generator), y, torch.rand(N, generator=generator), torch.arange(N).flip(0)


@functools.lru_cache(maxsize=1)
def expected(shape, upstream):
    """The oracle's (loss, gradient to the logits)."""
    logits, y, lam, index = inputs(shape)
    target = torch.stack((y, y[index]), 1), torch.stack((lam, 1 - lam), 1)
    loss = fastmix.reference.soft_cross_entropy(logits, target)
    return loss, fastmix.reference.soft_cross_entropy_grad(logits, target, upstream)[0]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_cross_entropy(measure, device, shape, upstream, name):
    arguments = [t.to(device) for t in inputs(shape)]
    group = f"soft cross-entropy {list(shape)}, forward + backward, upstream {upstream:g}"
    moved = 2 * arguments[0].nbytes
    measure(group, name, WAYS, arguments, expected(shape, upstream), moved, torch.tensor(upstream, device=device))
