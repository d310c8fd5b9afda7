"""`fastmix.js_divergence` beside AugMix's own lines: three sets of logits, or more, forward and backward.

AugMix clamps the mixture at 1e-7, which ours does not: the logits here have no class below that. Its factor of 12 is the upstream
gradient, or fastmix's `scale`, with which the gradient that its forward forms is the final one. Bytes moved are what nobody can do
without: each set read once and its gradient written once.
"""

import functools

import torch

import fastmix
from fastmix.bench import peers
from fastmix.bench.case import F32, Case, some_rows

FORWARD, BOTH = "forward", "forward + backward"
IMAGENET, CIFAR100, CIFAR, IMAGENET_21K, LANGUAGE = (256, 1000), (128, 100), (128, 10), (256, 21841), (512, 32768)


def ours(*sets):
    return fastmix.js_divergence(sets)


def scaled(upstream, way, *sets):
    return upstream * way(*sets)


def _divergence(shape, dtype, K=3, mode=BOTH, upstream=1.0, compiled=False):
    ways = {"fastmix": ours, **peers.JS_DIVERGENCE}
    if compiled:
        ways |= {f"{name}, compiled": peers.compiled(way) for name, way in peers.JS_DIVERGENCE.items()}
    if upstream != 1:
        ways = {name: way and functools.partial(scaled, upstream, way) for name, way in ways.items()}
        ways["fastmix"] = functools.partial(_with_scale, upstream)
        ways["fastmix, multiplied afterwards"] = functools.partial(scaled, upstream, ours)

    def arguments(rows, device):
        generator = torch.Generator(device).manual_seed(0)
        sets = torch.randn(K, rows or shape[0], shape[1], generator=generator, device=device)
        return [logits.to(dtype) for logits in sets]

    def expected(arguments, copies):
        sets = torch.stack(arguments).double()
        values = [fastmix.reference.js_divergence(sets, scale=upstream)]
        if mode != FORWARD:
            values += list(fastmix.reference.js_divergence_grad(sets, scale=upstream))
        return values

    def sample(arguments, g, results, copies):
        rows = some_rows(shape[0]).to(arguments[0].device)
        few = [logits[rows].cpu() for logits in arguments]
        for result, value in zip(results[1:], expected(few, copies)[1:], strict=False):
            yield result[rows], value * (len(rows) / shape[0]), None

    size = torch.Size(shape).numel() * dtype.itemsize
    title = f"K={K} {mode}" + ("" if upstream == 1 else f", times {upstream:g}")
    return Case(
        "js_divergence", title, shape, dtype, ways, K * size * (1 if mode == FORWARD else 2), arguments, expected,
        mode=mode, leaves=tuple(range(K)), upstream=lambda arguments: torch.ones((), device=arguments[0].device),
        sample=sample, kept=K * size * (mode != FORWARD),
    )  # fmt: skip


def _with_scale(scale, *sets):
    return fastmix.js_divergence(sets, scale=scale)


# In float32: AugMix's lines are wrong by several percent of a row's largest value in bfloat16, and autocast takes float32 for them.
LAPTOP = [
    _divergence(IMAGENET, F32, compiled=True),
    _divergence(IMAGENET, F32, mode=FORWARD),
    _divergence(IMAGENET, F32, upstream=12.0),
    _divergence(CIFAR100, F32),
    _divergence(CIFAR, F32),
]
ALL = [
    *(_divergence(shape, F32, compiled=shape == IMAGENET) for shape in (IMAGENET, CIFAR100, CIFAR, IMAGENET_21K, LANGUAGE)),
    _divergence(IMAGENET, F32, upstream=12.0),
    _divergence(IMAGENET, F32, K=8),
]


def test_js_divergence(measure, case, name):
    measure(case, name)
