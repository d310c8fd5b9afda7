"""Whole training steps, mixing, model and loss, and what mixing adds to one: as pytorch/pytorch#141177 measured it, with ViT-S/16 on
random 224x224 images, and on a small convolutional network as for CIFAR.

timm's own vit_small_patch16_224 is timed too where timm is installed, and steps as CUDA graphs: there a way that draws on the host
repeats one draw.

"time / plain" is a step's time over the plain step's, on hard labels without mixing, timed in turn with it: 1.05 says that
mixing and its loss add 5 % to a step. Every way's mixing and its loss are each compared with the oracle first.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

import fastmix
from fastmix.bench import bench_batches, peers
from fastmix.bench.case import BF16, F32, Case, close
from fastmix.bench.samples import Draw


class ViT(nn.Module):
    """ViT-S/16: arXiv:2010.11929 in the small size of DeiT, arXiv:2012.12877. 22 million parameters at 1000 classes."""

    def __init__(self, classes, size=224, patch=16, width=384, depth=12, heads=6):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **options)
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position
        return self.head(self.encoder(x)[:, 0])


def block(inputs, outputs, size=3, stride=1):
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=int(size == 3), bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def cnn(classes):
    return nn.Sequential(
        *block(3, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2), *block(64, 128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes),
    )  # fmt: skip


ONE, PER_ROW = "mixup, one lambda", "mixup or CutMix per row"
SOFT = peers.timm_loss and peers.timm_loss.SoftTargetCrossEntropy()
BINARY = peers.timm_loss and peers.timm_loss.BinaryCrossEntropy(smoothing=0.0)
PLAIN = {"plain step": (None, F.cross_entropy)}
RECIPES = {  # by question, then by way: (mixing, as in bench_batches, and the loss on logits and its target)
    ONE: {
        "fastmix": ((ONE, "fastmix"), fastmix.soft_cross_entropy),
        **PLAIN,
        **{name: ((ONE, name), F.cross_entropy) for name in ("by hand", "torchvision MixUp")},
        "timm, batch": ((ONE, "timm, batch"), SOFT),
    },
    PER_ROW: {
        "fastmix": ((PER_ROW, "fastmix"), fastmix.soft_cross_entropy),
        **PLAIN,
        **{name: ((PER_ROW, name), SOFT) for name in ("timm, elem", "timm, pair")},
    },
    "BinaryCrossEntropy": {**PLAIN, "timm, batch": ((ONE, "timm, batch"), BINARY)},
}


def training(build, loss_of):
    """step(x, y): a training step by loss_of(model, x, y) of a model that is built at the first one. The parameters' gradients alone are
    asked for: that of an adversary's first graph would go on to lambda once more, 0.04 of a plain step."""
    made = []

    def step(x, y):
        if not made:
            torch.manual_seed(0)
            made.append(build().to(x.device))
            made.append(torch.optim.SGD(made[0].parameters(), lr=1e-4, momentum=0.9))
        model, optimizer = made
        loss = loss_of(model, x, y)
        loss.backward(inputs=list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def graphed(step):
    """The step as a CUDA graph, captured anew for other tensors than those of its last call. What the host draws is drawn once."""
    captured: list = []  # the batch, the graph and the loss it writes

    def replay(x, y):
        if not captured or captured[0] is not x:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step(x, y)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step(x, y)
            captured[:] = x, graph, loss
        captured[1].replay()
        return captured[2]

    return replay


def check(question, case, name, device):
    """The mixing as in bench_batches, and then the loss of random logits on a mixed target."""
    mixing, criterion = RECIPES[question][name]
    classes = bench_batches.CHECKED
    logits, y = torch.randn(classes, classes, device=device), torch.arange(classes, device=device)
    target = y
    if mixing:
        mixer = bench_batches.way_of(*mixing, classes)
        bench_batches.compare(mixer, mixing[1], case.shape, device)
        target = mixer(torch.randn(classes, *case.shape[1:], device=device), y)[1]
    loss = criterion(logits, target)
    dense = F.one_hot(y, classes) if target is y else bench_batches.rows_of(target, classes)
    logits, dense = logits.cpu().double(), dense.cpu().double()
    if criterion is BINARY:
        expected = (dense * F.softplus(-logits) + (1 - dense) * F.softplus(logits)).mean()
    else:
        expected = fastmix.reference.soft_cross_entropy(logits, dense)
    close(loss, expected, None, 2e-6)


def _steps(title, build, shape, classes, dtype, question=ONE, compile_model=False, graph=False):
    def way(mixing, criterion):
        mixer = mixing and bench_batches.way_of(*mixing, classes)
        if criterion is None or (mixing and mixer is None):
            return None

        def criterion_of(model, x, target):
            return criterion(model(x), target)

        inner = torch.compile(criterion_of, dynamic=False) if compile_model else criterion_of

        def loss_of(model, x, y):
            x, target = mixer(x, y) if mixer else (x, y)
            with torch.autocast(x.device.type, dtype, enabled=dtype != F32):
                return inner(model, x, target)

        step = training(functools.partial(build, classes), loss_of)
        return graphed(step) if graph else step

    def inputs(device):
        draw = Draw(device, F32)
        return [draw.normal(*shape), draw.integers(classes, shape[0])]

    ways = {name: way(*recipe) for name, recipe in RECIPES[question].items()}
    beside = ("fastmix", "plain step") if "fastmix" in ways else ("plain step",)
    title = f"{title}, {question}" + ", compiled" * compile_model + ", as a CUDA graph" * graph
    about = {"suite": "step", "title": title, "shape": shape, "dtype": dtype}
    about |= {"check": functools.partial(check, question), "draws": True, "late": compile_model or graph}
    return Case(**about, ways=ways, beside=beside, inputs=inputs)


CIFAR, IMAGENET = (128, 3, 32, 32), (128, 3, 224, 224)
LAPTOP = [_steps("small CNN", cnn, CIFAR, 10, F32, question) for question in RECIPES]
VIT, CNN = ("ViT-S/16", ViT, IMAGENET, 1000, BF16), ("small CNN", cnn, CIFAR, 10, F32)
ALL = [_steps(*VIT), _steps(*CNN), _steps(*VIT, PER_ROW), _steps(*CNN, PER_ROW), _steps(*VIT, "BinaryCrossEntropy")]
if peers.timm_mixup:
    ALL.append(_steps("timm's ViT-S/16", peers.vit_small, IMAGENET, 1000, BF16))
ALL += [_steps(*VIT, compile_model=True), _steps(*CNN, compile_model=True)]
if torch.cuda.is_available():
    ALL += [_steps(*VIT, graph=True), _steps(*CNN, graph=True)]


def test_steps(measure, case, name):
    measure(case, name)
