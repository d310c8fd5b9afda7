"""Every op beside the ways that people write it and libraries have it: forwards, and with its gradients.

All ways are given the same inputs of the registry, with the reversed batch as partners. A copy of the batch, where there is one, is the
floor of mixing. Bytes moved are those that every way must move: each input read once and each result written once.

mix                 one lam for the batch, since timm knows no other, or a lam a row where it gets a gradient; CutMix has a box a row. In
                    place one need only move what changes: timm's lines move less there than a floor that counts the whole batch.
mix_masked          the mask of cells; by hand it is spread over pixels. Blocks are moved by a gather of patches, as in PuzzleMix's
                    code, or of all pixels.
convex_combination  K batches that are separate, as chains of augmentations leave them, or stacked: ways that need the other make it.
losses              logits, class indices, a lam a row and the partners: each way builds its own target within the time. The upstream
                    gradient is 1 as from `loss.backward()`, or another, as under a gradient scaler or beside other losses. fastmix forms
                    the gradient in its forward (not in float16): a forward for a backward then costs more, and a backward alone next to
                    nothing, so these two are shown but not compared.
js_divergence       AugMix clamps the mixture at 1e-7, which ours does not: the logits here have no class below that. Its factor of 12 is
                    the upstream gradient, or fastmix's `scale`, with which the gradient that its forward forms is the final one. In
                    float32: AugMix's lines are wrong by percents in bfloat16, and autocast takes float32 for them.
"""

import functools

import torch

import fastmix
from fastmix.bench import peers
from fastmix.bench.case import BACKWARD, BF16, BOTH, F16, F32, FORMING, FORWARD, OpCase

CIFAR, IMAGENET, IMAGENET_256 = (128, 3, 32, 32), (64, 3, 224, 224), (256, 3, 224, 224)
HIDDEN, TABLE, TEXT = (512, 196, 768), (4096, 128), (128, 64, 300)
SMALL, CIFAR100, LOGITS = (128, 10), (128, 100), (256, 1000)
IMAGENET_1K, IMAGENET_21K, LANGUAGE, LARGE_VOCABULARY = (4096, 1000), (1024, 21841), (2048, 32768), (512, 131072)
PIXELS = (8, 150, 512, 512)
SUITES = {
    "mix": "mix",
    "mix_masked": "mix_masked",
    "convex_combination": "convex_combination",
    "soft_cross_entropy": "soft cross-entropy",
    "soft_binary_cross_entropy": "soft binary cross-entropy",
    "js_divergence": "js_divergence",
}


def _size(shape, dtype):
    return torch.Size(shape).numel() * dtype.itemsize


def _with_compiled(ways, names):
    return {**ways, **{f"{name}, compiled": peers.compiled(way) for name, way in ways.items() if name in names}}


# Mixing


def mix_into(x, lam, index, out):
    return fastmix.mix(x, lam, index, out=out)


def cutmix(x, index, box, rows):
    return fastmix.mix(x, 1.0, index, box=box)


def mix(shape, dtype, mode=FORWARD, compiled=False, lam_gradient=False, out=False):
    ways = {"fastmix": mix_into, **peers.MIX_INTO} if out else {"fastmix": fastmix.mix, **peers.MIX}
    ways.pop("copy" if lam_gradient else "", None)
    fixed = {} if lam_gradient else {"lam": lambda s: 0.3}
    return OpCase(
        op="mix", suite="mix", title=mode + ", out=" * out + " and lambda's" * lam_gradient, shape=shape, dtype=dtype, mode=mode,
        ways=_with_compiled(ways, ["mixup-cifar10"] * compiled), fixed={**fixed, "out": lambda s: s.x.clone()},
        names=("x", "lam", "index") + ("out",) * out, wanted=("x",) + ("lam",) * lam_gradient, leaves=(0, 1)[: 1 + lam_gradient],
        moved=({FORWARD: 2, BACKWARD: 2, BOTH: 4}[mode] + lam_gradient) * _size(shape, dtype),
        kept=_size(shape, dtype) * {FORWARD: 1 - out, BACKWARD: 1, BOTH: 2}[mode],
    )  # fmt: skip


def cut(shape, dtype, compiled=False):
    def box(s):
        return fastmix.CutMix(seed=0).sample(torch.empty(s.x.shape)).box.to(s.x.device)

    def on_host(s):
        return list(zip(s.index.tolist(), s.box.tolist(), strict=True))

    return OpCase(
        op="mix", suite="mix", title="CutMix forward", shape=shape, dtype=dtype, names=("x", "index", "box", "host"), wanted=("x",),
        ways=_with_compiled({"fastmix": cutmix, **peers.CUTMIX}, ["torch.where"] * compiled),  # a loop over rows would be unrolled
        fixed={"lam": lambda s: 1.0, "box": box, "host": on_host}, moved=2 * _size(shape, dtype), kept=_size(shape, dtype),
    )  # fmt: skip


def mix_by_plan(x, mask, index, plan, partner_plan):
    return fastmix.mix_masked(x, mask, index, plan=plan, partner_plan=partner_plan)


def masked(shape, dtype, cells, mode=FORWARD, mask_gradient=False, moved=False, compiled=False):
    ways = {"fastmix": mix_by_plan, **peers.MIX_MASKED_PLANS} if moved else {"fastmix": fastmix.mix_masked, **peers.MIX_MASKED}
    ways.pop("copy" if mask_gradient else "", None)
    title = f"{cells[0]}x{cells[1]} cells, {mode}" + " and the mask's" * mask_gradient + ", blocks moved" * moved
    return OpCase(
        op="mix_masked", suite="mix_masked", title=title, shape=shape, dtype=dtype, mode=mode,
        ways=_with_compiled(ways, ["repeat_interleave", "patches"] * compiled), options={"cells": cells, "moved": moved},
        names=("x", "mask", "index", *("plan", "partner_plan") * moved), wanted=("x",) + ("mask",) * mask_gradient,
        leaves=(0, 1)[: 1 + mask_gradient], moved=({FORWARD: 2, BOTH: 4}[mode] + mask_gradient) * _size(shape, dtype),
    )  # fmt: skip


def combine(shape, dtype, K, mode=FORWARD, stacked=False, weights_gradient=False, compiled=False):
    def of_all(way, *arguments):
        sources, weights = arguments[:-1], arguments[-1]
        return way(sources[0] if stacked else sources, weights)

    ways = {"fastmix": fastmix.convex_combination, **peers.COMBINE}
    ways = {name: functools.partial(of_all, way) for name, way in ways.items()}
    backward = 1 + K + K * weights_gradient
    moved = {FORWARD: K + 1, BACKWARD: backward, BOTH: K + 1 + backward}[mode]
    return OpCase(
        op="convex_combination", suite="convex_combination", shape=shape, dtype=dtype, mode=mode, moved=moved * _size(shape, dtype),
        title=f"K={K}{', stacked' * stacked} {mode}{' and weights' * weights_gradient}", options={"K": K, "stacked": stacked},
        ways=_with_compiled(ways, ["sum of terms", "stack and sum"] * compiled), names=("sources", "weights"),
        wanted=("sources",) + ("weights",) * weights_gradient, leaves=tuple(range((1 if stacked else K) + weights_gradient)),
    )  # fmt: skip


MIXING = BF16, F32
FORWARD_AND_BACKWARD = (FORWARD, False), (BOTH, False), (BOTH, True)  # mode, and whether lam, the mask or the weights get a gradient
LAPTOP = {
    "mix": [
        mix(CIFAR, F32, compiled=True),
        mix(CIFAR, F32, out=True),
        mix(CIFAR, F32, BOTH),
        mix(CIFAR, F32, BOTH, lam_gradient=True),
        mix(IMAGENET, F32, compiled=True),
        mix(IMAGENET, F32, out=True),
        mix(IMAGENET, F32, BOTH),
        mix(IMAGENET, BF16),
        mix(TABLE, F32),
        cut(CIFAR, F32),
        cut(IMAGENET, F32),
    ],
    "mix_masked": [
        masked(CIFAR, F32, (4, 4)),
        masked(CIFAR, F32, (4, 4), moved=True),
        masked(IMAGENET, F32, (4, 4), compiled=True),
        masked(IMAGENET, F32, (16, 16), BOTH),
        masked(IMAGENET, F32, (16, 16), BOTH, mask_gradient=True),
        masked(IMAGENET, F32, (4, 4), moved=True),
        masked(IMAGENET, F32, (224, 224)),
        masked(TEXT, F32, (64, 300), BOTH),
    ],
    "convex_combination": [
        combine(CIFAR, F32, 4),
        combine(CIFAR, F32, 4, BOTH, weights_gradient=True),
        combine(IMAGENET, F32, 4),
        combine(IMAGENET, F32, 3, stacked=True),
        combine(IMAGENET, F32, 3, BOTH),
        combine(IMAGENET, BF16, 4),
        combine(TABLE, F32, 3),
    ],
}
ALL = {
    "mix": [
        *(
            mix(shape, dtype, mode, compiled=dtype == BF16 and shape in (IMAGENET_256, HIDDEN) and not lam, lam_gradient=lam)
            for shape in (IMAGENET_256, HIDDEN, CIFAR, IMAGENET, TABLE)
            for dtype in MIXING
            for mode, lam in FORWARD_AND_BACKWARD
        ),
        mix(IMAGENET_256, BF16, out=True),
        mix(IMAGENET_256, F32, BACKWARD),
        mix(HIDDEN, BF16, BACKWARD),
        mix(HIDDEN, BF16, BACKWARD, lam_gradient=True),
        mix(IMAGENET_256, F16, BOTH),
        *(
            cut(shape, dtype, compiled=dtype == BF16 and shape == IMAGENET_256)
            for shape in (IMAGENET_256, IMAGENET, CIFAR)
            for dtype in MIXING
        ),
    ],
    "mix_masked": [
        *(
            masked(shape, dtype, cells, mode, mask, compiled=shape == IMAGENET_256 and dtype == BF16 and mode == FORWARD)
            for shape, cells, dtypes in (
                (IMAGENET_256, (4, 4), (BF16,)),
                (IMAGENET_256, (16, 16), MIXING),
                (IMAGENET_256, (224, 224), (BF16,)),
                (TEXT, (64, 300), (BF16,)),
            )
            for dtype in dtypes
            for mode, mask in FORWARD_AND_BACKWARD
        ),
        *(masked(IMAGENET_256, dtype, (4, 4), moved=True, compiled=dtype == BF16) for dtype in MIXING),
        masked(IMAGENET_256, BF16, (16, 16), BOTH, moved=True),
    ],
    "convex_combination": [
        *(
            combine(shape, dtype, 4, mode, weights_gradient=weights, compiled=dtype == BF16 and shape == IMAGENET_256)
            for shape in (IMAGENET_256, HIDDEN, CIFAR, IMAGENET)
            for dtype in MIXING
            for mode, weights in FORWARD_AND_BACKWARD
        ),
        combine(IMAGENET_256, BF16, 4, stacked=True),
        combine(IMAGENET, BF16, 16),
        combine(IMAGENET, BF16, 16, BACKWARD, weights_gradient=True),
        combine(IMAGENET, F16, 3, BOTH, stacked=True, weights_gradient=True),
        combine(TABLE, F32, 3),
    ],
}


# Losses


def mixed_loss(logits, y, lam, index):
    return fastmix.soft_cross_entropy(logits, fastmix.Mix(lam, index).target(y))


def mixed_binary_loss(logits, y, lam, index):
    return fastmix.soft_binary_cross_entropy(logits, fastmix.Mix(lam, index).target(y))


HARD = {"lam": lambda s: torch.ones_like(s.lam), "weights": lambda s: torch.stack((torch.ones_like(s.lam), 0 * s.lam), 1)}


def loss(shape, dtype, mode=BOTH, upstream=1.0, lam_gradient=False, hard=False, binary=False, compiled=False):
    op, suite = ("soft_binary_cross_entropy",) * 2 if binary else ("soft_cross_entropy", "soft_cross_entropy")
    suite = "hard cross-entropy" if hard else SUITES[op]
    if binary:
        ways = {"fastmix": mixed_binary_loss, **peers.BINARY_LOSS, **peers.LIBRARY_BINARY_LOSS}
    elif hard:
        ways = {"fastmix": fastmix.soft_cross_entropy, **peers.HARD_LOSS}
    else:
        ways = {"fastmix": mixed_loss, **peers.LOSS, **({} if shape[2:] else peers.LIBRARY_LOSS)}
    names = [name for name in ways if name != "fastmix" and not name.startswith("Liger")] * compiled
    return OpCase(
        op=op, suite=suite, shape=shape, dtype=dtype, mode=mode, ways=_with_compiled(ways, names),
        title=mode + ("" if upstream == 1 else f", upstream {upstream:g}") + " and lambda's" * lam_gradient,
        names=("logits", "y") if hard else ("logits", "y", "lam", "index"), fixed=HARD if hard else {},
        wanted=("logits",) + ("lam",) * lam_gradient, leaves=(0, 2) if lam_gradient else (0,), options={"upstream": upstream},
        moved={FORWARD: 1, BOTH: 2}.get(mode, 0) * _size(shape, dtype), kept=_size(shape, dtype) * (mode != FORWARD),
        part=mode in (FORMING, BACKWARD),
    )  # fmt: skip


hard_loss = functools.partial(loss, hard=True)
binary_loss = functools.partial(loss, binary=True)


def divergence(shape, dtype, K=3, mode=BOTH, upstream=1.0, compiled=False):
    def ours(*sets):
        return fastmix.js_divergence(sets)

    def with_scale(*sets):
        return fastmix.js_divergence(sets, scale=upstream)

    def times(way, *sets):
        return upstream * way(*sets)

    ways = _with_compiled({"fastmix": ours, **peers.JS_DIVERGENCE}, list(peers.JS_DIVERGENCE) * compiled)
    if upstream != 1:
        ways = {name: way and functools.partial(times, way) for name, way in ways.items()}
        ways |= {"fastmix": with_scale, "fastmix, multiplied afterwards": functools.partial(times, ours)}
    return OpCase(
        op="js_divergence", suite="js_divergence", title=f"K={K} {mode}" + ("" if upstream == 1 else f", times {upstream:g}"),
        shape=shape, dtype=dtype, mode=mode, ways=ways, names=("logits",), wanted=("logits",), leaves=tuple(range(K)),
        options={"K": K, "spread": 1.0}, factor=upstream,
        moved=K * _size(shape, dtype) * (1 if mode == FORWARD else 2), kept=K * _size(shape, dtype) * (mode != FORWARD),
    )  # fmt: skip


LAPTOP |= {
    "soft_cross_entropy": [
        loss(SMALL, F32),
        loss(CIFAR100, F32),
        loss(LOGITS, F32, compiled=True),
        loss(LOGITS, F32, FORWARD),
        loss(LOGITS, F32, upstream=0.5),
        loss(LOGITS, F32, lam_gradient=True),
        loss(LOGITS, BF16),
        loss((1024, 1000), F32),
        loss((256, 21841), F32),
        loss((2, 150, 64, 64), F32),
        hard_loss(LOGITS, F32),
    ],
    "soft_binary_cross_entropy": [
        binary_loss(SMALL, F32),
        binary_loss(LOGITS, F32, compiled=True),
        binary_loss(LOGITS, F32, FORWARD),
        binary_loss(LOGITS, F32, lam_gradient=True),
        binary_loss(LOGITS, BF16),
        binary_loss((256, 21841), F32),
    ],
    "js_divergence": [
        divergence(LOGITS, F32, compiled=True),
        divergence(LOGITS, F32, mode=FORWARD),
        divergence(LOGITS, F32, upstream=12.0),
        divergence(CIFAR100, F32),
        divergence(SMALL, F32),
    ],
}
LARGE = IMAGENET_1K, IMAGENET_21K
ALL |= {
    "soft_cross_entropy": [
        *(
            loss(shape, dtype, compiled=dtype == BF16 and shape in (*LARGE, LARGE_VOCABULARY))
            for shape in (*LARGE, LARGE_VOCABULARY, SMALL, LANGUAGE, CIFAR100, PIXELS)
            for dtype in MIXING
        ),
        *(loss(shape, F16, upstream=65536.0) for shape in LARGE),
        *(
            case
            for shape in LARGE
            for case in (
                loss(shape, BF16, FORWARD),
                loss(shape, BF16, upstream=0.5),
                loss(shape, BF16, lam_gradient=True),
                loss(shape, BF16, FORMING),
                loss(shape, BF16, BACKWARD),
                hard_loss(shape, BF16, compiled=shape == IMAGENET_1K),
            )
        ),
        hard_loss(LARGE_VOCABULARY, BF16),
        loss(IMAGENET_1K, F32, upstream=0.5),
        loss(IMAGENET_1K, F32, lam_gradient=True),
    ],
    "soft_binary_cross_entropy": [
        *(binary_loss(shape, dtype, compiled=dtype == BF16) for shape in LARGE for dtype in MIXING),
        *(binary_loss(shape, F16, upstream=65536.0) for shape in LARGE),
        *(binary_loss(shape, BF16, FORWARD) for shape in LARGE),
        binary_loss(IMAGENET_1K, BF16, upstream=0.5),
        binary_loss(IMAGENET_1K, BF16, lam_gradient=True),
    ],
    "js_divergence": [
        *(divergence(shape, F32, compiled=shape == LOGITS) for shape in (LOGITS, CIFAR100, SMALL, (256, 21841), (512, 32768))),
        divergence(LOGITS, F32, upstream=12.0),
        divergence(LOGITS, F32, K=8),
    ],
}


def test_op(measure, case, name):
    measure(case, name)
