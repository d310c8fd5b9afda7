"""`fastmix.mix` beside mixing by hand: mixup into a fresh tensor, into one that is there, and with its backward; and CutMix.

Everyone answers the same question: one lam for the batch and the reversed batch as partners, since timm knows no other; CutMix
has a box for each row. A copy of the batch is the floor. Bytes moved are what nobody can do without, x (and the upstream
gradient) read once and each result written once, so GB/s compare within a group. What fits a cache stays in it from round to
round.
"""

import functools

import pytest
import torch

import fastmix
from fastmix.bench import peers

IMAGES = [(128, 3, 32, 32), (64, 3, 224, 224)]
HIDDEN = (64, 196, 768)
LAM = 0.3


def mix_into(x, lam, index, out):
    return fastmix.mix(x, lam, index, out=out)


def cutmix(x, index, box, rows):
    return fastmix.mix(x, 1.0, index, box=box)


FRESH = {"fastmix": fastmix.mix, **peers.MIX}
MODES = {
    "forward": FRESH,
    "forward, out=": {"fastmix": mix_into, **peers.MIX_INTO},
    "forward + backward": FRESH,
}
CUTMIX = {"fastmix": cutmix, **peers.CUTMIX}


def inputs(shape):
    """(x, upstream gradient, partners), on the CPU"""
    return *torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), torch.arange(shape[0]).flip(0)


@functools.lru_cache(maxsize=1)  # cases come in order of their shapes
def mixed(shape):
    """The oracle's (mixed batch, gradient to x)."""
    x, g, index = inputs(shape)
    return fastmix.reference.mix(x, LAM, index), fastmix.reference.mix_grad(g, x, LAM, index)[0]


@functools.lru_cache(maxsize=1)
def cut(shape):
    """(boxes, the oracle's batch)"""
    x, _, index = inputs(shape)
    box = fastmix.CutMix(seed=0).sample(x).box
    return box, fastmix.reference.mix(x, 1.0, index, box)


@pytest.mark.parametrize(
    ("shape", "mode", "name"),
    [(shape, mode, name) for shape in [*IMAGES, HIDDEN] for mode, ways in MODES.items() for name in ways],
)
def test_mix(measure, device, shape, mode, name):
    x, g, index = (t.to(device) for t in inputs(shape))
    results = inputs(shape)[:2] if name == "copy" else mixed(shape)
    arguments = [x, LAM, index] + [x.clone()] * (mode == "forward, out=")
    backward = mode == "forward + backward"
    expected, moved, upstream = (results, 4 * x.nbytes, g) if backward else (results[:1], 2 * x.nbytes, None)
    measure(f"mix {list(shape)}, {mode}", name, MODES[mode], arguments, expected, moved, upstream)


@pytest.mark.parametrize(("shape", "name"), [(shape, name) for shape in IMAGES for name in CUTMIX])
def test_cutmix(measure, device, shape, name):
    x, _, index = inputs(shape)
    box, expected = cut(shape)
    rows = list(zip(index.tolist(), box.tolist(), strict=True))
    arguments = [x.to(device), index.to(device), box.to(device), rows]
    measure(f"CutMix {list(shape)}, forward", name, CUTMIX, arguments, [expected], 2 * x.nbytes)
