"""`fastmix.convex_combination` beside the ways people write a weighted sum of K batches: AugMix's chains, n-way mixing.

Every row has weights of its own. The K batches are separate tensors, as chains of augmentations leave them, or one stacked
tensor; ways that need the other make it. Bytes moved are what nobody can do without: each source read once and the result
written once; backwards the upstream gradient read and a gradient written for each source, and the sources read once more for
the weights'.
"""

import functools

import torch

import fastmix
from fastmix.bench import peers
from fastmix.bench.bench_mix import CIFAR, HIDDEN, IMAGENET, IMAGENET_256, TABLE, random
from fastmix.bench.case import BF16, F16, F32, Case

COMPILED = ("sum of terms", "stack and sum")


def of_all(way, *arguments):
    """A way on its arguments one by one: more than one source, or one stacked tensor, and the weights."""
    sources, weights = arguments[:-1], arguments[-1]
    return way(sources[0] if len(sources) == 1 else sources, weights)


def _combine(shape, dtype, K, mode="forward", stacked=False, weights_gradient=False, compiled=False):
    ways = {"fastmix": fastmix.convex_combination, **peers.COMBINE}
    ways = {name: functools.partial(of_all, way) for name, way in ways.items()}
    if compiled:
        ways |= {f"{name}, compiled": peers.compiled(ways[name]) for name in COMPILED}
    backward = 1 + K + K * weights_gradient
    moved = {"forward": K + 1, "backward": backward, "forward + backward": K + 1 + backward}[mode]
    positions = 1 if stacked else K

    def arguments(rows, device):
        rows = rows or shape[0]
        sources = random((rows, *shape[1:]), dtype, device, K)
        weights = torch.linspace(0.1, 0.9, rows * K, device=device).view(rows, K).softmax(1)
        return [*([torch.stack(sources)] if stacked else sources), weights]

    def upstream(arguments):
        like = arguments[0][0] if stacked else arguments[0]
        return random(like.shape, dtype, like.device, K + 1)[-1]

    def expected(arguments, copies):
        sources = (arguments[0] if stacked else torch.stack(arguments[:-1])).double()
        g = upstream(arguments).double()
        values = [fastmix.reference.convex_combination(sources, arguments[-1])]
        if mode != "forward":
            dsources, dweights = fastmix.reference.convex_combination_grad(g, sources, arguments[-1])
            values += [dsources] if stacked else list(dsources)
            values += [(dweights, (g * sources).abs().flatten(2).sum(2).max())] * weights_gradient
        return values

    title = f"K={K}{', stacked' * stacked} {mode}{' and weights' * weights_gradient}"
    leaves = tuple(range(positions + weights_gradient))
    size = torch.Size(shape).numel() * dtype.itemsize
    return Case(
        "convex_combination", title, shape, dtype, ways, moved * size, arguments, expected,
        mode=mode, leaves=leaves, upstream=upstream,
    )  # fmt: skip


FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
LAPTOP = [
    _combine(CIFAR, F32, 4),
    _combine(CIFAR, F32, 4, BOTH, weights_gradient=True),
    _combine(IMAGENET, F32, 4),
    _combine(IMAGENET, F32, 3, stacked=True),
    _combine(IMAGENET, F32, 3, BOTH),
    _combine(IMAGENET, BF16, 4),
    _combine(TABLE, F32, 3),
]
ALL = [
    *(
        _combine(shape, dtype, 4, mode, weights_gradient=weights, compiled=dtype == BF16 and shape == IMAGENET_256)
        for shape in (IMAGENET_256, HIDDEN, CIFAR, IMAGENET)
        for dtype in (BF16, F32)
        for mode, weights in ((FORWARD, False), (BOTH, False), (BOTH, True))
    ),
    _combine(IMAGENET_256, BF16, 4, stacked=True),
    _combine(IMAGENET, BF16, 16),
    _combine(IMAGENET, BF16, 16, BACKWARD, weights_gradient=True),
    _combine(IMAGENET, F16, 3, BOTH, stacked=True, weights_gradient=True),
    _combine(TABLE, F32, 3),
]


def test_convex_combination(measure, case, name):
    measure(case, name)
