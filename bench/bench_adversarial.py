"""Training steps with Adversarial Mixing Policy (arXiv:2109.07177), and what they cost over a step of plain mixup: a small
convolutional network whose images are mixed, and a small transformer whose words are. (Its first layer is strided, as a
ResNet's is: in one where that is a large part of the work, its gradient to the images, which only lambda needs, costs more.)

"time / plain" is a step's time over the plain mixup step's, timed in turn with it; "peak bytes" of the result file are what it holds.
A forward is a third of a step. "keep" makes two forwards, a backward to lambda alone and one through both graphs: 7/3; "recompute"
three forwards, the same and one backward: 2. The authors' code runs a whole backward for lambda and drops the gradients of the
parameters: 8/3. Each is first compared with the paper's algorithm, written out in float64.

On a CPU a step of two graphs pays for fresh memory too, where its peak is more than glibc keeps of what is freed: the laptop's network
took 2.48 plain steps so, and 2.39 where that was kept. glibc keeps more once a process has freed a large array, so one is freed first.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import fastmix
from fastmix.bench.bench_steps import block, cnn, training
from fastmix.bench.case import F32, Case, close
from fastmix.bench.samples import Draw

STEP, WORDS = 0.1, 1000


class Text(nn.Module):
    """Words, transformer layers, the mean over a sentence's words, a classifier."""

    def __init__(self, classes, width=128, depth=4, heads=4):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, words):
        return self.head(self.encoder(self.embedding(words)).mean(1))


def convolutional(classes, width=128):
    return nn.Sequential(
        *block(3, width, 4, 4), *block(width, width), *block(width, width), *block(width, 2 * width, stride=2),
        *block(2 * width, 2 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes),
    )  # fmt: skip


def losses_of(model, x, y, m):
    """losses(lam) by fastmix; images are mixed themselves, words where they are embedded."""
    target = m.target(y)

    def images(lam):
        return fastmix.soft_cross_entropy(model(fastmix.mix(x, lam, m.index)), target, reduction="none")

    def words(lam):
        with fastmix.mix_hidden(model.encoder, lam, m.index):
            return fastmix.soft_cross_entropy(model(x), target, reduction="none")

    return images if x.is_floating_point() else words


def losses_by_hand(model, x, y, m):
    """The same in plain torch."""

    def mixed(h, lam):
        lam = lam.view(-1, *[1] * (h.dim() - 1))
        return lam * h + (1 - lam) * h[m.index]

    def losses(lam):
        if x.is_floating_point():
            logits = model(mixed(x, lam))
        else:
            logits = model.head(model.encoder(mixed(model.embedding(x), lam)).mean(1))
        own, other = (F.cross_entropy(logits, labels, reduction="none") for labels in (y, y[m.index]))
        return m.lam * own + (1 - m.lam) * other

    return losses


def plain(model, x, y, m):
    return losses_of(model, x, y, m)(m.lam).mean()


def ours(model, x, y, m, strategy="keep"):
    return fastmix.adversarial_mixing_loss(losses_of(model, x, y, m), m.lam, step_size=STEP, strategy=strategy, model=model)


def authors(model, x, y, m, strategy="keep", whole=True):
    """By hand; `whole`: as in the authors' code, a backward to lambda that forms the parameters' gradients too."""
    losses = losses_by_hand(model, x, y, m)
    lam = m.lam.clone().requires_grad_()
    rand = losses(lam)
    if whole:
        rand.sum().backward(retain_graph=True)
        g = lam.grad
        model.zero_grad()
    else:
        (g,) = torch.autograd.grad(rand.sum(), lam, retain_graph=True)
    moved = (m.lam + STEP * g).clamp(0, 1)
    worse = losses(moved)
    if strategy == "recompute":
        return losses(torch.where(worse > rand, moved, m.lam)).mean()
    return torch.where(worse > rand, worse, rand).mean()


WAYS = {
    "fastmix": ours,
    "fastmix, recompute": partial(ours, strategy="recompute"),
    "plain step": plain,
    "authors' scheme": authors,
}


def check(build, case, name, device):
    """Loss and gradients of a few rows against float64."""
    torch.manual_seed(0)
    model = build(10).to(device)
    wide = copy.deepcopy(model).double()
    x, y = (t[:8].to(device) for t in case.inputs(torch.device("cpu")))
    lam, index = torch.rand(8, device=device), torch.arange(8, device=device).flip(0)
    loss = WAYS[name](model, x, y, fastmix.Mix(lam, index))
    loss.backward()
    exact, double = fastmix.Mix(lam.double(), index), x.double() if x.is_floating_point() else x
    if name == "plain step":
        expected = losses_by_hand(wide, double, y, exact)(exact.lam).mean()
    else:
        strategy = "recompute" if "recompute" in name else "keep"
        expected = authors(wide, double, y, exact, strategy, whole=False)
    expected.backward()
    close(loss, expected.detach().cpu(), None, 1e-5)
    for mine, true in zip(model.parameters(), wide.parameters(), strict=True):
        close(mine.grad.flatten(), true.grad.cpu().flatten(), true.grad.abs().max().clamp(min=1e-3).cpu(), 1e-3)


def _steps(title, build, shape):
    def way(loss_of):
        mixup = fastmix.Mixup(1.0, seed=0)
        return training(partial(build, 10), lambda model, x, y: loss_of(model, x, y, mixup.sample(x)))

    def inputs(device):
        torch.empty(2**25 - 2**16, dtype=torch.uint8)  # glibc then keeps up to 64 MB, twice the largest that it adapts to
        draw, y = Draw(device, F32), Draw(device).integers(10, shape[0])
        return [draw.integers(WORDS, *shape) if len(shape) == 2 else draw.normal(*shape), y]

    ways = {name: way(loss_of) for name, loss_of in WAYS.items()}
    about = {"suite": "step", "title": f"{title}, adversarial", "shape": shape, "dtype": F32, "inputs": inputs, "draws": True}
    return Case(**about, ways=ways, check=partial(check, build), beside=("fastmix", "plain step"))


LAPTOP = [_steps("strided CNN", convolutional, (32, 3, 32, 32)), _steps("small transformer", Text, (32, 32))]
ALL = [
    _steps("strided CNN", convolutional, (256, 3, 64, 64)),
    _steps("small transformer", Text, (128, 64)),
    _steps("small CNN", cnn, (128, 3, 32, 32)),
]


def test_adversarial(measure, case, name):
    measure(case, name)
