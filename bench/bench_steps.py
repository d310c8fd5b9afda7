"""Whole training steps, mixing, model and loss, and what mixing adds to one: as pytorch/pytorch#141177 measured it, with ViT-S/16 on
random 224x224 images, and on a small convolutional network as for CIFAR.

"time / plain" is a step's time over the plain step's, on hard labels without mixing, timed in turn with it: 1.05 says that
mixing and its loss add 5 % to a step. Every way's mixing and its loss are each held to the oracle first.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

import fastmix
from fastmix.bench import bench_batches, peers
from fastmix.bench.bench_mix import random
from fastmix.bench.case import BF16, F32, Case, close


class ViT(nn.Module):
    """ViT-S/16: arXiv:2010.11929 in the small size of DeiT, arXiv:2012.12877. 22 million parameters at 1000 classes."""

    def __init__(self, classes, size=224, patch=16, width=384, depth=12, heads=6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position
        return self.head(self.encoder(x)[:, 0])


def cnn(classes):
    def block(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, 128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes),
    )  # fmt: skip


QUESTION = "mixup or CutMix per row"
CRITERIA = {  # by the way's name: (mixing, as in bench_batches, and the loss on logits and its target)
    "fastmix": (("mixup, one lambda", "fastmix"), fastmix.soft_cross_entropy),
    "plain step": (None, F.cross_entropy),
    "by hand": (("mixup, one lambda", "by hand"), F.cross_entropy),
    "timm, batch": (("mixup, one lambda", "timm, batch"), peers.timm_loss and peers.timm_loss.SoftTargetCrossEntropy()),
    "timm, batch, BinaryCrossEntropy": (
        ("mixup, one lambda", "timm, batch"),
        peers.timm_loss and peers.timm_loss.BinaryCrossEntropy(smoothing=0.0),
    ),
    "torchvision MixUp": (("mixup, one lambda", "torchvision MixUp"), F.cross_entropy),
    "fastmix, mixup or CutMix per row": ((QUESTION, "fastmix"), fastmix.soft_cross_entropy),
    "timm, elem": ((QUESTION, "timm, elem"), peers.timm_loss and peers.timm_loss.SoftTargetCrossEntropy()),
    "timm, pair": ((QUESTION, "timm, pair"), peers.timm_loss and peers.timm_loss.SoftTargetCrossEntropy()),
}


def way(model, mixing, criterion, classes, dtype, compile_model):
    mixer = mixing and bench_batches.way_of(*mixing, classes)
    if criterion is None or (mixing and mixer is None):
        return None

    def loss_of(x, target):
        return criterion(model(x), target)

    if compile_model:
        loss_of = torch.compile(loss_of, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(x, y):
        low = torch.autocast(x.device.type, dtype) if dtype != F32 else contextlib.nullcontext()
        x, target = mixer(x, y) if mixer else (x, y)
        with low:
            loss = loss_of(x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def check(case, name, device):
    """The mixing as in bench_batches, and then the loss of random logits on a mixed target."""
    mixing, criterion = CRITERIA[name.removesuffix(", compiled")]
    classes = bench_batches.CHECKED
    logits, y = torch.randn(classes, classes), torch.arange(classes)
    target = y
    if mixing:
        mixer = bench_batches.way_of(*mixing, classes)
        bench_batches.hold(mixer, mixing[1], case.shape, device)
        target = mixer(torch.randn(classes, *case.shape[1:]), y)[1]
    loss = criterion(logits, target)
    dense = F.one_hot(y, classes).double() if target is y else target
    dense = dense.dense(classes).double() if isinstance(dense, fastmix.SoftTarget) else dense.double()
    if "Binary" in name:
        z = logits.double()
        expected = (dense * F.softplus(-z) + (1 - dense) * F.softplus(z)).mean()
    else:
        expected = fastmix.reference.soft_cross_entropy(logits.double(), dense)
    close(loss, expected, None, 2e-6)


def _steps(title, build, shape, classes, dtype, compile_model=False):
    models = {}

    def lazily(name):
        def step(x, y):
            if name not in models:
                torch.manual_seed(0)
                model = build(classes).to(x.device)
                models[name] = way(model, *CRITERIA[name], classes, dtype, compile_model)
            return models[name](x, y)

        mixing, criterion = CRITERIA[name]
        here = criterion is not None and (mixing is None or bench_batches.way_of(*mixing, classes) is not None)
        return step if here else None

    def arguments(rows, device):
        generator = torch.Generator(device).manual_seed(0)
        return [*random(shape, F32, device), torch.randint(classes, shape[:1], generator=generator, device=device)]

    ways = {name: lazily(name) for name in CRITERIA}
    title = f"{title}, compiled," if compile_model else title
    return Case("step", title, shape, dtype, ways, 0, arguments, check=check, draws=True, beside=BESIDE, late=compile_model)


BESIDE = ("fastmix", "plain step")
LAPTOP = [_steps("small CNN", cnn, (128, 3, 32, 32), 10, F32)]
ALL = [
    _steps("ViT-S/16", ViT, (128, 3, 224, 224), 1000, BF16),
    _steps("small CNN", cnn, (128, 3, 32, 32), 10, F32),
    _steps("small CNN", cnn, (128, 3, 32, 32), 10, F32, compile_model=True),
]


def test_steps(measure, case, name):
    measure(case, name)
