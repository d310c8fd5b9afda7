"""A small training step, and the same in plain torch to compare it with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastmix
from fastmix import Mix, MixedRows

C = 5
COMPILED = pytest.mark.no_poison  # torch.compile does not trace through poisoned memory


def plain_mix(x, lam, index, box=None):
    """lam*x + (1-lam)*x[index] in the dtype of x and lam; the partner's value inside boxes."""
    own = lam.reshape(-1, *[1] * (x.dim() - 1))
    if box is not None:
        inside = torch.zeros(x.shape, dtype=torch.bool)
        for i, corners in enumerate(box.clamp(min=0).tolist()):
            dims = len(corners) // 2
            inside[(i, ..., *map(slice, corners[:dims], corners[dims:]))] = True
        own = torch.where(inside.to(x.device), 0, own)
    return own * x + (1 - own) * x[index]


def plain_loss(z, classes, weights, weight=None, label_smoothing=0.0, reduction="mean"):
    """The formula for a K-hot target [N, K], by operations that autograd differentiates as often as it is asked to."""
    surprise = -torch.log_softmax(z, 1)
    w = z.new_ones(z.shape[1]) if weight is None else weight
    value = (1 - label_smoothing) * w[classes] * surprise.gather(1, classes)
    value = value + label_smoothing * (w * surprise).mean(1, keepdim=True)
    rows = (weights * value).sum(1)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.sum() / (weights * w[classes]).sum()


def plain_pairs(y, lam, index):
    """(classes [N, 2], weights [N, 2]) of a mixed batch"""
    lam = lam.expand(y.shape[0])
    return torch.stack((y, y[index]), 1), torch.stack((lam, 1 - lam), 1)


def batch(N, device="cpu", dtype=torch.float32, row=(3, 2, 2)):
    """x, y, lam with an end in it, an index with repeated partners"""
    x, y, lam = torch.randn(N, *row), torch.randint(0, C, (N,)), torch.rand(N)
    lam[:1] = 1
    index = torch.randint(0, N, (N,))
    return x.to(device, dtype), y.to(device), lam.to(device, torch.promote_types(dtype, torch.float32)), index.to(device)


def network(device="cpu", dtype=torch.float32):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, C)).to(device, dtype)


def step(model, x, y, lam, index):
    """The loss of one training step."""
    m = Mix(lam, index)
    return fastmix.soft_cross_entropy(model(m.apply(x)), m.target(y), label_smoothing=0.1)


def plain_step(model, x, y, lam, index):
    return plain_loss(model(plain_mix(x, lam, index)), *plain_pairs(y, lam, index), label_smoothing=0.1)


def leaf(t):
    return t.detach().clone().requires_grad_()


def interpreted(device):
    """Whether Triton's interpreter runs the kernels, which is slow."""
    return device.type == "cpu" and backend_name() == "triton"


def backend_name():
    """The backend that the device fixture has chosen."""
    return fastmix._backend._forced.get()


def compiled(function, compiler="aot_eager", **options):
    """(function compiled without a graph break, the count of its programs)"""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


class Recipe(nn.Module):
    """Mixed batch, loss on class indices, and on their one-hot rows."""

    def __init__(self):
        super().__init__()
        self.model = network()
        self.criterion = fastmix.SoftCrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, y, lam, index):
        m = Mix(lam, index)
        mixed = m.apply(x)
        logits = self.model(mixed)
        rows = MixedRows(F.one_hot(y, C).to(x.dtype), lam, index)
        return mixed, self.criterion(logits, m.target(y)), self.criterion(logits, rows)
