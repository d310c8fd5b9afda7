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
from fastmix.bench.case import BACKWARD, BOTH, FORMING, FORWARD, OpCase
from fastmix.bench.samples import cases_of, options_of

CIFAR, IMAGENET, IMAGENET_256 = (128, 3, 32, 32), (64, 3, 224, 224), (256, 3, 224, 224)
MODES = {"forward": FORWARD, "both": BOTH, "backward": BACKWARD, "forming": FORMING}
SECOND = {"lam": " and lambda's", "mask": " and the mask's", "weights": " and weights"}


def ask(op, shape, dtype, title, ways, names, second=None, compiled=False, suite=None, **more):
    """A question: by default the batch, the first of `names`, is the only leaf, and the suite is called as the op."""
    if compiled:
        found = {name: way for name, way in ways.items() if name in peers.COMPILES}
        ways = {**ways, **{f"{name}, compiled": peers.compiled(way) for name, way in found.items()}}
        if compiled == "most":  # minutes of compilation on a GPU
            mode = "max-autotune-no-cudagraphs"
            ways |= {f"{name}, compiled, {mode}": peers.compiled(way, mode=mode) for name, way in found.items()}
    wanted, title = (names[0], *filter(None, [second])), title + SECOND.get(second, "")
    return OpCase(
        op=op, suite=suite or op, title=title, shape=shape, dtype=dtype, ways=ways, names=names, wanted=wanted, **more
    )


# Mixing


def mix(shape, dtype, mode=FORWARD, compiled=False, lam_gradient=False, out=False):
    def mix_into(x, lam, index, out):
        return fastmix.mix(x, lam, index, out=out)

    ways = {"fastmix": mix_into, **peers.MIX_INTO} if out else {"fastmix": fastmix.mix, **peers.MIX}
    if lam_gradient:
        fixed = {}
        ways.pop("copy")
    else:
        fixed = {"lam": lambda s: 0.3}
    names = ("x", "lam", "index") + ("out",) * out
    fixed |= {"out": lambda s: s.x.clone()} if out else {}
    second = "lam" if lam_gradient else None
    return ask("mix", shape, dtype, mode + ", out=" * out, ways, names, second, compiled, mode=mode, fixed=fixed)


def cut(shape, dtype, compiled=False):
    def cutmix(x, index, box, rows):
        return fastmix.mix(x, 1.0, index, box=box)

    fixed = {
        "lam": lambda s: 1.0,
        "box": lambda s: fastmix.CutMix(seed=0).sample(torch.empty(s.x.shape)).box.to(s.x.device),
        "host": lambda s: list(zip(s.index.tolist(), s.box.tolist(), strict=True)),
    }
    ways, names = {"fastmix": cutmix, **peers.CUTMIX}, ("x", "index", "box", "host")
    return ask("mix", shape, dtype, "CutMix forward", ways, names, compiled=compiled, fixed=fixed)


def masked(shape, dtype, cells, mode=FORWARD, mask_gradient=False, moved=False, compiled=False):
    def mix_by_plan(x, mask, index, plan, partner_plan):
        return fastmix.mix_masked(x, mask, index, plan=plan, partner_plan=partner_plan)

    ways = {"fastmix": mix_by_plan, **peers.MIX_MASKED_PLANS} if moved else {"fastmix": fastmix.mix_masked, **peers.MIX_MASKED}
    ways.pop("copy" if mask_gradient else "", None)
    names, second = ("x", "mask", "index", *("plan", "partner_plan") * moved), "mask" if mask_gradient else None
    title, options = f"{cells[0]}x{cells[1]} cells, {mode}{', blocks moved' * moved}", {"cells": cells, "moved": moved}
    return ask("mix_masked", shape, dtype, title, ways, names, second, compiled, mode=mode, options=options)


def combine(shape, dtype, K, mode=FORWARD, stacked=False, weights_gradient=False, compiled=False):
    def of_all(way, *arguments):
        *sources, weights = arguments
        return way(sources[0] if stacked else sources, weights)

    ways = {"fastmix": fastmix.convex_combination, **peers.COMBINE}
    ways = {name: functools.partial(of_all, way) for name, way in ways.items()}
    title, second = f"K={K}{', stacked' * stacked} {mode}", "weights" if weights_gradient else None
    about = {"mode": mode, "options": {"K": K, "stacked": stacked}}
    return ask("convex_combination", shape, dtype, title, ways, ("sources", "weights"), second, compiled, **about)


# Losses


def mixed_loss(logits, y, lam, index):
    return fastmix.soft_cross_entropy(logits, fastmix.Mix(lam, index).target(y))


def mixed_binary_loss(logits, y, lam, index):
    return fastmix.soft_binary_cross_entropy(logits, fastmix.Mix(lam, index).target(y))


HARD = {"lam": lambda s: torch.ones_like(s.lam), "weights": lambda s: torch.stack((torch.ones_like(s.lam), 0 * s.lam), 1)}


def loss(shape, dtype, mode=BOTH, upstream=1.0, lam_gradient=False, hard=False, binary=False, compiled=False):
    names, op, suite = ("logits", "y", "lam", "index"), "soft_cross_entropy", "soft cross-entropy"
    ways = {"fastmix": mixed_loss, **peers.LOSS, **({} if shape[2:] else peers.LIBRARY_LOSS)}
    if binary:
        op, suite = "soft_binary_cross_entropy", "soft binary cross-entropy"
        ways = {"fastmix": mixed_binary_loss, **peers.BINARY_LOSS}
    elif hard:
        names, suite, ways = names[:2], "hard cross-entropy", {"fastmix": fastmix.soft_cross_entropy, **peers.HARD_LOSS}
    title, second = mode + f", upstream {upstream:g}" * (upstream != 1), "lam" if lam_gradient else None
    about = {"mode": mode, "suite": suite, "fixed": HARD if hard else {}, "options": {"upstream": upstream}}
    return ask(op, shape, dtype, title, ways, names, second, compiled, **about)


hard_loss = functools.partial(loss, hard=True)
binary_loss = functools.partial(loss, binary=True)


def divergence(shape, dtype, K=3, mode=BOTH, upstream=1.0, compiled=False):
    def ours(*sets, **options):
        return fastmix.js_divergence(sets, **options)

    def times(way, *sets):
        return upstream * way(*sets)

    ways = {"fastmix": ours, **peers.JS_DIVERGENCE}
    if upstream != 1:
        ways = {name: functools.partial(times, way) for name, way in ways.items()}
        ways["fastmix, multiplied afterwards"], ways["fastmix"] = ways["fastmix"], functools.partial(ours, scale=upstream)
    title, options = f"K={K} {mode}" + f", times {upstream:g}" * (upstream != 1), {"K": K, "spread": 1.0}
    about = {"compiled": compiled, "mode": mode, "options": options, "factor": upstream}
    return ask("js_divergence", shape, dtype, title, ways, ("logits",), **about)


# Sizes: {suite: {options: shapes}}, as in ops.py, with `mode` of MODES. What decides most comes first.


def cases(suite, table):
    for text, shape, dtype, _ in cases_of(table):
        options = options_of(text)
        if "mode" in options:
            options["mode"] = MODES[options["mode"]]
        build = cut if options.pop("cut", False) else BUILDERS[suite]
        yield build(shape, dtype, **options)


BUILDERS = {
    "mix": mix, "mix_masked": masked, "convex_combination": combine, "soft_cross_entropy": loss,
    "soft_binary_cross_entropy": binary_loss, "js_divergence": divergence,
}  # fmt: skip
SMALL_CASES = {
    "mix": {
        "compiled": "128x3x32x32/f32 64x3x224x224/f32", "out": "128x3x32x32/f32 64x3x224x224/f32",
        "mode=both": "128x3x32x32/f32 64x3x224x224/f32", "mode=both, lam gradient": "128x3x32x32/f32",
        "": "64x3x224x224/bf16 4096x128/f32", "cut": "128x3x32x32/f32 64x3x224x224/f32",
    },
    "mix_masked": {
        "4x4 cells": "128x3x32x32/f32", "4x4 cells, moved": "128x3x32x32/f32 64x3x224x224/f32",
        "4x4 cells, compiled": "64x3x224x224/f32", "16x16 cells, mode=both": "64x3x224x224/f32",
        "16x16 cells, mode=both, mask gradient": "64x3x224x224/f32", "224x224 cells": "64x3x224x224/f32",
        "64x300 cells, mode=both": "128x64x300/f32",
    },
    "convex_combination": {
        "K=4": "128x3x32x32/f32 64x3x224x224/f32 64x3x224x224/bf16", "K=4, mode=both, weights gradient": "128x3x32x32/f32",
        "K=3, stacked": "64x3x224x224/f32", "K=3, mode=both": "64x3x224x224/f32", "K=3": "4096x128/f32",
    },
    "soft_cross_entropy": {
        "": "128x10/f32 128x100/f32 256x1000/bf16 1024x1000/f32 256x21841/f32 2x150x64x64/f32", "compiled": "256x1000/f32",
        "mode=forward": "256x1000/f32", "upstream=0.5": "256x1000/f32", "lam gradient": "256x1000/f32", "hard": "256x1000/f32",
    },
    "soft_binary_cross_entropy": {
        "": "128x10/f32 256x1000/bf16 256x21841/f32", "compiled": "256x1000/f32", "mode=forward": "256x1000/f32",
        "lam gradient": "256x1000/f32",
    },
    "js_divergence": {
        "compiled": "256x1000/f32", "mode=forward": "256x1000/f32", "upstream=12.0": "256x1000/f32", "": "128x100/f32 128x10/f32",
    },
}  # fmt: skip
LARGE, BOTH_LARGE = "4096x1000/bf16 1024x21841/bf16", "4096x1000/f32 1024x21841/f32"
_SMALLER = "128x3x32x32/bf16 64x3x224x224/bf16 {} 256x3x224x224/f32 512x196x768/f32 128x3x32x32/f32 64x3x224x224/f32 {}"
_TABLES = _SMALLER.format("4096x128/bf16", "4096x128/f32")
_MASKED = {
    "4x4 cells": "256x3x224x224/bf16", "16x16 cells": "256x3x224x224/bf16 256x3x224x224/f32",
    "224x224 cells": "256x3x224x224/bf16", "64x300 cells": "128x64x300/bf16",
}  # fmt: skip
ALL_CASES = {
    "mix": {
        "compiled=most": "256x3x224x224/bf16", "compiled": "512x196x768/bf16", "mode=both, compiled": "256x3x224x224/bf16 512x196x768/bf16",
        "mode=both, lam gradient": f"256x3x224x224/bf16 512x196x768/bf16 {_TABLES}", "": _TABLES,
        "mode=both": f"{_TABLES} 256x3x224x224/f16", "out": "256x3x224x224/bf16",
        "mode=backward": "256x3x224x224/f32 512x196x768/bf16", "mode=backward, lam gradient": "512x196x768/bf16",
        "cut, compiled": "256x3x224x224/bf16", "cut": "256x3x224x224/f32 64x3x224x224/bf16 64x3x224x224/f32 128x3x32x32/bf16 128x3x32x32/f32",
    },
    "mix_masked": {
        "4x4 cells, compiled": "256x3x224x224/bf16", "16x16 cells, compiled": "256x3x224x224/bf16",
        "224x224 cells, compiled": "256x3x224x224/bf16", "16x16 cells": "256x3x224x224/f32", "64x300 cells": "128x64x300/bf16",
        **{f"{cells}, mode=both": shapes for cells, shapes in _MASKED.items()},
        **{f"{cells}, mode=both, mask gradient": shapes for cells, shapes in _MASKED.items()},
        "4x4 cells, moved, compiled": "256x3x224x224/bf16", "4x4 cells, moved": "256x3x224x224/f32",
        "16x16 cells, moved, mode=both": "256x3x224x224/bf16",
    },
    "convex_combination": {
        **{f"K=4{mode}, compiled": "256x3x224x224/bf16" for mode in ("", ", mode=both", ", mode=both, weights gradient")},
        **{f"K=4{mode}": f"512x196x768/bf16 {_SMALLER.format('', '')}" for mode in ("", ", mode=both", ", mode=both, weights gradient")},
        "K=4, stacked": "256x3x224x224/bf16", "K=16": "64x3x224x224/bf16",
        "K=16, mode=backward, weights gradient": "64x3x224x224/bf16",
        "K=3, mode=both, stacked, weights gradient": "64x3x224x224/f16", "K=3": "4096x128/f32",
    },
    "soft_cross_entropy": {
        "compiled=most": "4096x1000/bf16", "compiled": "1024x21841/bf16 512x131072/bf16",
        "": f"{BOTH_LARGE} 512x131072/f32 128x10/bf16 128x10/f32 2048x32768/bf16 2048x32768/f32",
        "upstream=65536.0": "4096x1000/f16 1024x21841/f16", "mode=forward": LARGE, "upstream=0.5": f"{LARGE} 4096x1000/f32",
        "lam gradient": f"{LARGE} 4096x1000/f32", "mode=forming": LARGE, "mode=backward": LARGE, "hard, compiled": "4096x1000/bf16",
        "hard": "1024x21841/bf16 512x131072/bf16", "mode=both": "128x100/bf16 128x100/f32 8x150x512x512/bf16 8x150x512x512/f32",
    },
    "soft_binary_cross_entropy": {
        "compiled": LARGE, "": BOTH_LARGE, "upstream=65536.0": "4096x1000/f16 1024x21841/f16", "mode=forward": LARGE,
        "upstream=0.5": "4096x1000/bf16", "lam gradient": "4096x1000/bf16",
    },
    "js_divergence": {
        "compiled": "256x1000/f32", "": "128x100/f32 128x10/f32 256x21841/f32 512x32768/f32", "upstream=12.0": "256x1000/f32",
        "K=8": "256x1000/f32",
    },
}  # fmt: skip
LAPTOP = {suite: list(cases(suite, table)) for suite, table in SMALL_CASES.items()}
ALL = {suite: list(cases(suite, table)) for suite, table in ALL_CASES.items()}


def test_op(measure, case, name):
    measure(case, name)
