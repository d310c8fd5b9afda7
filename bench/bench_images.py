"""A loader's bytes made into a mixed batch: `mix_images` beside the lines of timm's PrefetchLoader and Mixup, and of torchvision's
transforms; and what `ImagePipeline` adds to a training step that takes its batches from a DataLoader.

All ways of the first question mix by one lambda with the reversed batch, of the same bytes. A copy of the bytes to floats is the floor.
AugMix makes three images of each, the clean one and two views, by torchvision's transform image by image, since that draws once for all that
it is given; both draw as they like, so it is checked what any draw keeps.

A step through a loader is an epoch of two batches, collated row by row in the same process, as by `num_workers=0`; the plain step
normalises them without mixing, so "time / plain" is what mixing and its loss add.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastmix
from fastmix.bench import bench_batches, bench_steps, peers
from fastmix.bench.bench_ops import CIFAR, IMAGENET, IMAGENET_256
from fastmix.bench.case import F32, Case, close, some_rows
from fastmix.bench.samples import Draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAM, CHECKED = 0.3, bench_batches.CHECKED
BATCHES, CLASSES = 2, 10  # of an epoch
SMALL = (64, 3, 32, 32)


def _bytes(device, *shape):
    return Draw(device, F32).integers(256, *shape).to(torch.uint8)


def truth(images, rows, index=None, lam=None):
    """The oracle's values of some rows, whose partners are among them."""
    return fastmix.reference.mix_images(images[rows].cpu().numpy(), MEAN, STD, index=index, lam=lam)


class Bytes(Case):
    """A batch of bytes. What is made of it is checked on few rows, and on those of the call that is timed."""

    def compare(self, name, device):
        images = _bytes(device, CHECKED, *self.shape[1:])
        self.check(name, images, self.ways[name](images), torch.arange(CHECKED))

    def compare_timed(self, name, inputs, results):
        self.check(name, inputs[0], results, some_rows(self.shape[0]))


def asking(title, shape, ways, check, copies=1, **more):
    size = torch.Size(shape).numel()
    about = {"suite": "images", "title": title, "shape": shape, "dtype": F32, "kept": 4 * copies * size}
    return Bytes(
        **about, **more, ways=ways, check=check, moved=(1 + 4 * copies) * size, inputs=lambda device: [_bytes(device, *shape)]
    )


# Normalised and mixed with the reversed batch


def _statistics(device):
    return (torch.tensor([255 * v for v in values], device=device).view(1, 3, 1, 1) for values in (MEAN, STD))


def ours(images):
    index = torch.arange(len(images), device=images.device).flip(0)
    return fastmix.mix_images(images, fastmix.Mix(LAM, index), mean=MEAN, std=STD)


def prefetched(images):
    """The lines of timm's PrefetchLoader."""
    mean, std = _statistics(images.device)
    return images.to(F32).sub_(mean).div_(std)


def timm_lines(images):
    return peers.timm_in_place(None, LAM, None, prefetched(images))


def normalised(images):
    tv = peers.torchvision
    return tv.functional.normalize(tv.functional.to_dtype(images, F32, scale=True), MEAN, STD)


def transforms(images):
    """torchvision's v2.ToDtype and v2.Normalize, then its MixUp's lines with the reversed batch."""
    x = normalised(images)
    return x.flip(0).mul_(1 - LAM).add_(x.mul(LAM))


def expression(images):
    mean, std = _statistics(images.device)
    x = (images.to(F32) - mean) / std
    return LAM * x + (1 - LAM) * x.flip(0)


def check_mixed(name, images, found, rows):
    if not name.startswith("copy"):
        expected = truth(images, rows, np.arange(len(rows))[::-1].copy(), np.full(len(rows), LAM))
        close(found[rows], expected, None, 4e-6)


def mixing(shape):
    ways = {
        "fastmix": ours,
        "timm's lines": timm_lines,
        "torchvision": peers.torchvision and transforms,
        "copy": lambda images: images.to(F32),
        "by hand, compiled": peers.compiled(expression),
    }
    return asking("bytes to a mixed batch", shape, ways, check_mixed)


# AugMix


def augmix(images):
    return fastmix.AugMix(mean=MEAN, std=STD)(images)


def image_by_image(images):
    transform = peers.torchvision.AugMix(severity=3, all_ops=False)
    views = (torch.stack([transform(image) for image in images]) for _ in range(2))
    return tuple(map(normalised, (images, *views)))


def check_views(name, images, found, rows):
    """The clean images are checked by the oracle, and that no view leaves the range of bytes."""
    clean, *views = found
    close(clean[rows], truth(images, rows), None, 4e-6)
    mean, std = _statistics(clean.device)
    for view in views:
        units = view[rows] * std + mean
        close(units, units.clamp(0, 255).cpu(), 255, 1e-4)
        assert not torch.equal(view, clean)


def augmenting(shape):
    ways = {"fastmix": augmix, "torchvision, image by image": peers.torchvision and image_by_image}
    return asking("bytes to AugMix's three", shape, ways, check_views, copies=3, draws=True)


# A step through a loader


def pipeline(seed=None):
    return fastmix.ImagePipeline(fastmix.Mixup(0.8, seed=seed), MEAN, STD, flip=0.0)


def plain_batches(loader, device):
    for images, y in loader:
        yield prefetched(images.to(device, non_blocking=True)), y.to(device, non_blocking=True)


def timm_batches(loader, device):
    mixup = peers.timm_mixup.Mixup(0.8, 0.0, num_classes=CLASSES, label_smoothing=0.0)
    for batch in plain_batches(loader, device):
        yield mixup(*batch)


def an_epoch(batches, criterion):
    """way(images, y): an epoch of steps, its batches made by batches(loader, device)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = functools.partial(bench_steps.cnn, CLASSES)
    step = bench_steps.training(build, lambda model, x, y: criterion(model(x), y))

    def way(images, y):
        loader = DataLoader(TensorDataset(images, y), len(y) // BATCHES, pin_memory=device.type == "cuda")
        return [step(*batch) for batch in batches(loader, device)][-1]

    return way


STEPS = {
    "fastmix": (lambda loader, device: pipeline()(loader), fastmix.soft_cross_entropy),
    "plain step": (plain_batches, F.cross_entropy),
    "timm's lines": (timm_batches, bench_steps.SOFT),
}


def check_step(case, name, device):
    """A batch as its way makes it: mixed by the lambdas in its target, with the partners of the way."""
    images, rows = _bytes("cpu", CHECKED, *case.shape[1:]), torch.arange(CHECKED)
    if name == "fastmix":
        ((x, target),) = pipeline(seed=0)([(images, rows)])
        mix = fastmix.Mixup(0.8, seed=0).sample(x, rows.to(x.device))
        index, dense = mix.index.cpu(), target.dense(CLASSES).cpu()
    else:
        ((x, target),) = STEPS[name][0]([(images, rows)], device)
        index, dense = rows.flip(0), F.one_hot(target, CLASSES) if name == "plain step" else target.cpu()
    lam = dense[rows, rows].double()
    close(x, truth(images, rows, index.numpy(), lam.numpy()), None, 4e-6)
    assert torch.allclose(dense[rows, index].double(), 1 - lam, atol=1e-6)


def steps(shape):
    def inputs(device):  # of a loader: on the host
        rows = BATCHES * shape[0]
        draw = Draw("cpu", F32)
        return [draw.integers(256, rows, *shape[1:]).to(torch.uint8), draw.integers(CLASSES, rows)]

    ways = {name: None if way[1] is None else an_epoch(*way) for name, way in STEPS.items()}
    about = {"suite": "step", "title": "small CNN through a loader", "shape": shape, "dtype": F32, "draws": True}
    return Case(**about, ways=ways, inputs=inputs, check=check_step, beside=("fastmix", "plain step"))


LAPTOP = [mixing(IMAGENET), augmenting(SMALL), steps(SMALL), mixing(IMAGENET_256)]
ALL = [mixing(CIFAR), augmenting(IMAGENET)]


def test_images(measure, case, name):
    measure(case, name)
