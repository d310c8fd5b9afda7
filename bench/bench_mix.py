"""`fastmix.mix` beside mixing by hand: mixup into a fresh tensor, into one that is there, and with its backward; CutMix.

Everyone answers the same question: one lam for the batch and the reversed batch as partners, since timm knows no other; CutMix
has a box for each row. The floor is a copy of the batch (and of its gradient). Bytes moved are what nobody can do without,
each input read once and each output written once, so GB/s compare across rows of the table.
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


def cutmix(x, index, box):
    return fastmix.mix(x, 1.0, index, box=box)


FRESH = {"fastmix": fastmix.mix, **peers.MIX, "copy": None}
INTO = {"fastmix": mix_into, **peers.MIX_INTO, "copy": None}
MODES = {"forward": FRESH, "forward, out=": INTO, "forward + backward": FRESH}
CUTMIX = {"fastmix": cutmix, **peers.CUTMIX, "copy": None}


@functools.lru_cache(maxsize=1)  # cases come in order of their shapes
def batch(shape, device):
    """(x, upstream gradient, partners, the mixed batch and gradient by the oracle)"""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, *shape, generator=generator)
    index = torch.arange(shape[0]).flip(0)
    expected = fastmix.reference.mix(x, LAM, index), fastmix.reference.mix_grad(g, x, LAM, index)[0]
    return x.to(device), g.to(device), index.to(device), expected


@pytest.mark.parametrize(
    ("shape", "mode", "name"), [(shape, mode, name) for shape in [*IMAGES, HIDDEN] for mode in MODES for name in MODES[mode]]
)
def test_mix(measure, device, shape, mode, name):
    x, g, index, expected = batch(shape, device)
    way = MODES[mode][name]
    backward = mode == "forward + backward"
    if way is None:
        expected = x.cpu(), g.cpu()
        calls = {"forward": (x.clone,), "forward, out=": (torch.empty_like(x).copy_, x)}
        call = functools.partial(*calls.get(mode, (lambda: (x.clone(), g.clone()),)))
    elif backward:
        call = functools.partial(measure.forward_backward, way, g, x.detach().requires_grad_(), LAM, index)
    else:
        call = functools.partial(way, x, LAM, index, *([x.clone()] if mode == "forward, out=" else []))
    measure(f"mix {list(shape)}, {mode}", name, call, expected, moved=(4 if backward else 2) * x.nbytes)


@pytest.mark.parametrize(("shape", "name"), [(shape, name) for shape in IMAGES for name in CUTMIX])
def test_cutmix(measure, device, shape, name):
    x, _, index, _ = batch(shape, device)
    box = fastmix.CutMix(seed=0).sample(x.cpu()).box
