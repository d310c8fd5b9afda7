"""What a training recipe does around the ops: autocast, scale, accumulate, checkpoint, hook, distribute."""

import functools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import ULP, assert_close, numpy
from plain import COMPILED, C, backend_name, batch, leaf, network, plain_loss, plain_mix, plain_pairs, plain_step, step
from torch import nn
from torch.testing import assert_close as same
from torch.utils.checkpoint import checkpoint

import fastmix
from fastmix import Mix, SoftTarget, reference

ROOT = pathlib.Path(__file__).parent.parent
NO_GLOO = "needs torch.distributed with gloo"


# Autocast and gradient scaling


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    """Logits arrive in low precision; the loss is float32, their gradient is in their dtype, the batch keeps its own."""
    x, y, lam, index = batch(6, device)
    lam.requires_grad_()
    layer = nn.Linear(12, C).to(device)
    with torch.autocast(device.type, dtype=dtype):
        m = Mix(lam, index)
        mixed = m.apply(x)
        logits = layer(mixed.flatten(1))
        logits.retain_grad()
        loss = fastmix.soft_cross_entropy(logits, m.target(y), label_smoothing=0.1)
        low = m.apply(x.to(dtype))
    (3 * loss).backward()
    assert (mixed.dtype, low.dtype, logits.dtype, loss.dtype) == (torch.float32, dtype, dtype, torch.float32)
    assert (logits.grad.dtype, lam.grad.dtype, layer.weight.grad.dtype) == (dtype, torch.float32, torch.float32)
    target = tuple(numpy(t) for t in plain_pairs(y, lam, index))
    assert_close(loss, reference.soft_cross_entropy(numpy(logits), target, label_smoothing=0.1), torch.float32, len(x))
    dz, _ = reference.soft_cross_entropy_grad(numpy(logits), target, 3.0, label_smoothing=0.1)
    assert_close(logits.grad, dz, dtype, np.abs(dz).sum(axis=1, keepdims=True))
    assert_close(mixed, reference.mix(numpy(x), numpy(lam), numpy(index)), torch.float32, np.abs(numpy(x)).max())
    assert_close(low, reference.mix(numpy(x.to(dtype)), numpy(lam), numpy(index)), dtype, np.abs(numpy(x)).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(dtype, device):
    """On inputs as they are, forwards, backwards, transforms and metrics are what they are outside."""
    x, y, lam, index = batch(6, device, row=(C,))
    onehot = F.one_hot(y, C).float()

    def loss(x, lam):
        m = Mix(lam, index)
        mixed = m.apply(x)
        losses = [fastmix.soft_cross_entropy(mixed, t) for t in (m.target(y), m.target(onehot), m.target(y).dense(C), y)]
        return torch.stack(losses).sum()

    def everything():
        leaves = leaf(x), leaf(lam)
        total = loss(*leaves)
        results = [total, *torch.autograd.grad(total, leaves)]
        results += [*torch.func.grad(loss, (0, 1))(x, lam), *torch.func.jvp(loss, (x, lam), (x, lam))]
        (gradient,) = torch.autograd.grad(fastmix.mix(*leaves, index).pow(3).sum(), leaves[:1], create_graph=True)
        results += torch.autograd.grad(gradient.square().sum(), leaves)
        return [*results, fastmix.mixed_accuracy(x, Mix(lam, index).target(y), 2)]

    plain = everything()
    with torch.autocast(device.type, dtype=dtype):
        casted = everything()
    for ours, expected in zip(casted, plain, strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


def scaled_step(N, classes, device):
    """A step in float16 under GradScaler at 65536: what it left, and the same in float32 without one."""
    base = 3 * torch.randn(N, classes, device=device)
    shift = nn.Parameter(torch.zeros(classes, device=device))  # a bias, as parameters are, in float32
    lam, index = torch.rand(N, device=device, requires_grad=True), torch.randperm(N, device=device)
    y = torch.randint(0, classes, (N,), device=device)
    scaler = torch.amp.GradScaler(device.type, init_scale=65536.0)
    optimizer = torch.optim.SGD([shift], lr=1.0)
    logits = (base + shift).half()
    logits.retain_grad()
    scaler.scale(fastmix.soft_cross_entropy(logits, Mix(lam, index).target(y))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536.0  # nothing overflowed, no step was left out
    with torch.no_grad():
        expected = logits.float().softmax(1)
        for classes_of, share in ((y, lam), (y[index], 1 - lam)):
            expected.scatter_add_(1, classes_of[:, None], -share[:, None])
        expected /= N
    return logits, shift, lam, (y, index), expected


@pytest.mark.slow_interpreted
def test_gradient_scaling_keeps_float16_gradients(device):
    """Formed in float16 before the scaler's factor arrives, half of these entries would be 0."""
    kernels_interpreted = device.type == "cpu" and backend_name() == "triton"
    N, classes = (16 if kernels_interpreted else 1024), 21841
    logits, shift, lam, (y, index), expected = scaled_step(N, classes, device)
    rows = torch.arange(0, N, N // 4, device=device)
    z = logits[rows].detach().double().requires_grad_()
    pairs = plain_pairs(y, lam.detach().double(), index)
    plain_loss(z, *(t[rows] for t in pairs), reduction="sum").backward()
    truth = z.grad * (65536.0 / N)
    assert (truth / 65536).half().eq(0).double().mean() > 0.4  # the danger is there
    assert_close(logits.grad[rows], numpy(truth), torch.float16, np.abs(numpy(truth)).sum(axis=1, keepdims=True))
    assert logits.grad.eq(0).double().mean() < 0.01
    rounding = ULP[torch.float16] * expected.abs().sum(0) + N * 2.0**-24 / 65536
    assert ((shift.detach() + expected.sum(0)).abs() <= rounding).all()
    at = torch.arange(N, device=device)
    gap = logits.detach()[at, y].double() - logits.detach()[at, y[index]].double()
    same(lam.grad.double() / 65536, -gap / N, rtol=1e-5, atol=1e-5 * 16 / N)


# Loops


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_gradient_accumulation(micro, device):
    """Micro-batches of a mixed batch, the smaller last one too, add up to the whole."""
    model = network(device)
    x, y, lam, index = batch(8, device)
    lam.requires_grad_()
    leaves = lam, *model.parameters()
    expected = plain_step(model, x, y, lam, index)
    gradients = torch.autograd.grad(expected, leaves)
    m = Mix(lam, index)
    mixed, target = m.apply(x), m.target(y)
    total = 0.0
    for start in range(0, 8, micro):
        rows = slice(start, start + micro)
        loss = fastmix.soft_cross_entropy(model(mixed[rows]), target[rows], label_smoothing=0.1)
        loss = loss * (len(target[rows]) / 8)
        loss.backward(retain_graph=True)
        total += loss.detach()
    same(total, expected.detach())
    same([t.grad for t in leaves], list(gradients))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, device):
    """The whole step is run again in the backward, on the lambda that is passed in and on the draw that is repeated."""
    model = network(device)
    x, y, lam, index = batch(6, device)
    x, lam = leaf(x), leaf(lam)
    leaves = x, lam, *model.parameters()
    expected = plain_step(model, *leaves[:1], y, lam, index)
    gradients = torch.autograd.grad(expected, leaves)
    loss = checkpoint(step, model, x, y, lam, index, use_reentrant=use_reentrant)
    loss.backward()
    same(loss, expected)
    same([t.grad for t in leaves], list(gradients))

    mixer = fastmix.RandomMix(fastmix.Mixup(0.4), fastmix.CutMix())

    def drawn(x):
        mixed, target = mixer(x, y)
        return fastmix.soft_cross_entropy(model(mixed), target)

    results = []
    for run in (drawn, functools.partial(checkpoint, drawn, use_reentrant=use_reentrant)):
        x.grad = None
        torch.manual_seed(1)
        run(x).backward()
        results.append(x.grad)
    assert torch.equal(*results)


@COMPILED
def test_selective_checkpointing(device):
    """The ops can be named as what is to be kept."""
    ops = torch.ops.fastmix
    model = network(device)
    x, y, lam, index = batch(6, device)
    lam.requires_grad_()
    leaves = lam, *model.parameters()
    for kept in ([torch.ops.aten.mm.default], [ops.mix.default, ops.soft_cross_entropy.default]):
        contexts = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, kept)
        loss = checkpoint(step, model, x, y, lam, index, use_reentrant=False, context_fn=contexts)
        expected = plain_step(model, x, y, lam, index)
        same(loss, expected)
        same(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.slow_interpreted
@pytest.mark.no_poison
def test_deterministic_algorithms(device):
    """Allowed in that mode (which fills fresh memory with NaN), and the same bits twice."""
    x, y, lam, index = batch(6, device, row=(2, 5, 7))
    z, box = torch.randn(6, C, device=device), torch.tensor([[0, 1, 3, 4]] * 6, device=device)
    dense = torch.rand(6, C, device=device)

    def everything():
        leaves = leaf(x), leaf(lam), leaf(z), leaf(dense)
        m = Mix(leaves[1], index, box=box)
        total = m.apply(leaves[0]).square().sum() + fastmix.mix(leaves[0], leaves[1], index).sum()
        for target in (m.target(y), y, leaves[3], m.target(y).dense(C)):
            for reduction in ("mean", "none"):
                total = total + fastmix.soft_cross_entropy(leaves[2], target, reduction=reduction, label_smoothing=0.1).sum()
        return total, *torch.autograd.grad(total, leaves)

    before = everything()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        first, second = everything(), everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))


def test_anomaly_detection(device):
    """It looks for NaN in every gradient: masked classes and weights of 0 must not leave any."""
    x, y, lam, index = batch(4, device, row=(C,))
    x[:, 3] = -float("inf")
    y = y.clamp(max=2)
    x, lam = leaf(x), leaf(lam)
    with torch.autograd.set_detect_anomaly(True):
        loss = fastmix.soft_cross_entropy(x, Mix(lam, index).target(y))
        gradients = torch.autograd.grad(loss, (x, lam))
        mixed = fastmix.mix(x.detach()[:, :3].requires_grad_(), lam, index)
        torch.autograd.grad(mixed.sum(), lam)
        z = torch.tensor([[0.0, float("nan")]], device=device, requires_grad=True)
        with pytest.raises(RuntimeError, match="SoftCrossEntropyFunctionBackward.* returned nan"):
            fastmix.soft_cross_entropy(z, torch.tensor([0], device=device)).backward()
    kept = leaf(x[:, [0, 1, 2, 4]])
    expected = plain_loss(kept, *plain_pairs(y, lam, index))
    gradient, dlam = torch.autograd.grad(expected, (kept, lam))
    same(gradients[0][:, [0, 1, 2, 4]], gradient)
    assert (gradients[0][:, 3] == 0).all()
    same(gradients[1], dlam)


def test_one_loss_in_two_graphs(device):
    """And one batch under two losses."""
    x, y, lam, index = batch(4, device, row=(C,))
    x, lam = leaf(x), leaf(lam)
    m = Mix(lam, index)
    mixed = m.apply(x)
    shared = fastmix.soft_cross_entropy(mixed, m.target(y))
    first, second = shared * 3 + mixed.square().mean(), shared.exp() + fastmix.soft_cross_entropy(mixed, y)
    plain = plain_mix(x, lam, index)
    loss = plain_loss(plain, *plain_pairs(y, lam, index))
    expected = loss * 3 + plain.square().mean(), loss.exp() + F.cross_entropy(plain, y)
    for ours, theirs in ((first, expected[0]), (second, expected[1]), (first + second, sum(expected))):
        same(ours, theirs)
        gradients = (torch.autograd.grad(t, (x, lam), retain_graph=True) for t in (ours, theirs))
        same(*gradients)


def test_hooks(device):
    """On tensors, on modules, on saved tensors; a hook that changes a gradient changes what flows on, and only that."""
    x, y, lam, index = batch(4, device, row=(C,))
    seen = []
    x, lam = leaf(x), leaf(lam)
    mixer, criterion = fastmix.Mixup(0.4, seed=0), fastmix.SoftCrossEntropyLoss()
    criterion.register_full_backward_hook(lambda module, inward, outward: seen.append((inward[0].clone(), outward[0].clone())))
    mixer.register_full_backward_hook(lambda module, inward, outward: seen.append((inward[0].clone(), outward[0].clone())))
    mixed, target = mixer(x, y)
    mixed.retain_grad()
    mixed.register_hook(lambda g: g * 2)
    loss = criterion(mixed, target)
    loss.retain_grad()
    loss.register_hook(lambda g: g * 3)
    loss.backward()
    m = fastmix.Mixup(0.4, seed=0).sample(x)
    plain = leaf(x)
    between = plain_mix(plain, m.lam, m.index)
    between.retain_grad()
    plain_loss(between, *plain_pairs(y, m.lam, m.index)).backward()
    assert loss.grad == 3
    same(mixed.grad, 6 * between.grad)
    same(x.grad, 6 * plain.grad)
    same(seen[0], (3 * between.grad, torch.tensor(3.0, device=device)))
    same(seen[1], (6 * plain.grad, 6 * between.grad))


# Distributed


DISTRIBUTED = """
import pathlib, sys, torch
from torch import nn

sys.path[:0] = [{root!r}, {tests!r}]
from plain import step

folder = pathlib.Path({folder!r})
data = torch.load(folder / "data")
torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=0, world_size=1)
model = nn.Linear(12, {classes})
model.load_state_dict(data["model"])
parallel = nn.parallel.DistributedDataParallel(model)
x, y, lam, index = data["batch"]
lam.requires_grad_()
for _ in range(2):  # the second step finds what the first one left
    model.zero_grad()
    lam.grad = None
    loss = step(lambda x: parallel(x.flatten(1)), x, y, lam, index)
    loss.backward()
torch.save([loss.detach(), lam.grad, *(p.grad for p in model.parameters())], folder / "results")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    """Its hooks see the gradients of a step. (nn.DataParallel cannot split a SoftTarget: its docstring says to use this instead.)"""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip(NO_GLOO)
    assert "nn.DataParallel" in SoftTarget.__doc__
    assert "DistributedDataParallel" in SoftTarget.__doc__
    model, (x, y, lam, index) = nn.Linear(12, C), batch(6)
    torch.save({"model": model.state_dict(), "batch": (x, y, lam, index)}, tmp_path / "data")
    code = DISTRIBUTED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path), classes=C)
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    loss, *gradients = torch.load(tmp_path / "results")
    lam.requires_grad_()
    expected = plain_step(lambda x: model(x.flatten(1)), x, y, lam, index)
    same(loss, expected.detach())
    same(gradients, torch.autograd.grad(expected, (lam, *model.parameters())))
