"""A loader's batch made into a mixed batch and its target, everything drawn on the way: fastmix's samplers beside timm's
`Mixup`, torchvision's `MixUp` and `CutMix`, and the lines that people copy.

Each way draws its own lambdas and boxes, so its results are checked by reading those off them: a row's lambda from its target,
its box from where the image is its partner's, and then the oracle mixes by these. timm and torchvision have one partner a row
by its place in the batch; fastmix does the same here. timm writes into the batch that it is given, the others make a new one.
Peers return dense targets, fastmix a `SoftTarget`.
"""

import torch

import fastmix
from fastmix.bench import peers
from fastmix.bench.bench_ops import CIFAR, IMAGENET, IMAGENET_256
from fastmix.bench.case import F32, TOLERANCE, Case, close
from fastmix.bench.samples import Draw

CHECKED = 8  # rows, each of a class of its own
CLASSES = {CIFAR: 10, IMAGENET: 1000, IMAGENET_256: 1000}
KINDS = (fastmix.Mixup, 0.8), (fastmix.CutMix, 1.0)
OURS = {
    "mixup, one lambda": lambda: fastmix.Mixup(1.0, per="batch", partner="flip"),
    "mixup, a lambda per row": lambda: fastmix.Mixup(1.0, partner="flip"),
    "CutMix, one box": lambda: fastmix.CutMix(1.0, per="batch", partner="flip"),
    "CutMix, a box per row": lambda: fastmix.CutMix(1.0, partner="flip"),
    "mixup or CutMix per row": lambda: fastmix.RandomMix(*(kind(a, partner="flip") for kind, a in KINDS)),
}


def rows_of(target, classes):
    """A target's rows of probabilities."""
    return target.dense(classes) if isinstance(target, fastmix.SoftTarget) else target


def read_off(mixed, target, x, index, classes):
    """(lam of the images [N], box [N, 4], lam of the labels [N]) by which a way has mixed x, whose row i is of class i."""
    rows = torch.arange(len(x))
    label_lam = rows_of(target, classes).double()[rows, rows]
    partners = (mixed == x[index]).all(1)  # [N, H, W]
    lam, box = label_lam.clone(), torch.zeros(len(x), 4, dtype=torch.int64)
    for row in rows[partners.flatten(1).any(1) & (index != rows)]:
        y, x_ = partners[row].nonzero().unbind(1)
        box[row] = torch.stack((y.min(), x_.min(), y.max() + 1, x_.max() + 1))
        lam[row] = 1.0
    return lam, box, label_lam


def compare(way, name, shape, device):
    """Compares a batch with the oracle: rows that show a part of their partner unchanged are cut, all others mixed."""
    x = Draw(dtype=F32).normal(CHECKED, *shape[1:])
    y, index = torch.arange(CHECKED), peers.partners(name, CHECKED)
    mixed, target = way(x.to(device, copy=True), y.to(device))
    mixed, target = mixed.cpu(), target.to("cpu")
    lam, box, label_lam = read_off(mixed, target, x, index, CHECKED)
    close(mixed, fastmix.reference.mix(x.double(), lam, index, box), None, 2 * TOLERANCE[F32])
    area = ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).double() / x[0, 0].numel()
    close(torch.where(area > 0, label_lam, 0), torch.where(area > 0, 1 - area, 0), 1.0, TOLERANCE[F32])
    expected = torch.zeros(CHECKED, CHECKED, dtype=torch.float64)
    expected[y, y] += label_lam
    expected[y, index] += 1 - label_lam
    close(rows_of(target, CHECKED), expected, 1.0, TOLERANCE[F32])


def check(case, name, device):
    way = way_of(case.title.removeprefix("batch, "), name, CHECKED)
    for _ in range(3):
        compare(way, name, case.shape, device)


def way_of(question, name, classes):
    if name == "fastmix":
        return OURS[question]()
    make = peers.BATCH[question][name.removesuffix(", compiled")]
    way = None if make is None else make(classes)
    return peers.compiled(way, draws=True) if name.endswith(", compiled") else way


def _batches(question, shape, compiled=False):
    names = ["fastmix", *peers.BATCH[question]]
    names += [f"{name}, compiled" for name in peers.BATCH[question]] if compiled else []

    def inputs(device):
        draw = Draw(device, F32)
        return [draw.normal(*shape), draw.integers(CLASSES[shape], shape[0])]

    ways, moved = {name: way_of(question, name, CLASSES[shape]) for name in names}, 2 * torch.Size(shape).numel() * 4
    about = {"suite": "batch", "title": question, "shape": shape, "dtype": F32, "ways": ways, "moved": moved}
    return Case(**about, inputs=inputs, check=check, draws=True)


LAPTOP = [_batches(question, CIFAR, compiled=question == "mixup, one lambda") for question in peers.BATCH] + [
    _batches("mixup or CutMix per row", IMAGENET)
]
ALL = [
    _batches(question, shape, compiled="one" in question if shape == IMAGENET_256 else question == "mixup, a lambda per row")
    for shape in (IMAGENET_256, CIFAR)
    for question in peers.BATCH
]


def test_batches(measure, case, name):
    measure(case, name)
