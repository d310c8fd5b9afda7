"""What a training recipe does with torch around the ops: compile, export, autocast, scale, accumulate, checkpoint,
differentiate twice, transform, distribute, hook, copy. Compared with plain torch, or with the oracle; where torch refuses, or
the op does, the refusal is tested.
"""

import contextlib
import copy
import functools
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import ULP, assert_close, numpy
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close as same
from torch.utils.checkpoint import checkpoint

import fastmix
from fastmix import Mix, MixedRows, SoftTarget, reference

ROOT = pathlib.Path(__file__).parent.parent
TWO_GPUS = "needs two GPUs"
NO_CPP_COMPILER = "needs a C++ compiler"
NO_GLOO = "needs torch.distributed with gloo"
C = 5
COMPILED = pytest.mark.no_poison  # torch.compile does not trace through poisoned memory


# Plain torch, to compare with


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


def backend_name():
    """The backend that the device fixture has chosen."""
    return fastmix._backend._forced.get()


# torch.compile and torch.export


def compiled(function, compiler="aot_eager", **options):
    """(function compiled without a graph break, the count of its programs)"""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


@COMPILED
@pytest.mark.parametrize(("compiler", "dynamic"), [("eager", True), ("aot_eager", None)])
def test_a_training_step_compiles_once(compiler, dynamic, device):
    """20 steps of another lambda each, and a smaller last batch, which may cost one more program unless sizes are dynamic."""
    model = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast, programs = compiled(functools.partial(step, model), compiler, dynamic=dynamic)
    counts = []
    for n in [6] * 20 + [5]:
        x, y, lam, index = batch(n, device)
        lam.requires_grad_()
        expected = plain_step(model, x, y, lam, index)
        leaves = lam, *model.parameters()
        gradients = torch.autograd.grad(expected, leaves)
        optimizer.zero_grad()
        loss = fast(x, y, lam, index)
        loss.backward()
        same(loss, expected)
        same([t.grad for t in leaves], list(gradients))
        optimizer.step()
        counts.append(programs.frame_count)
    assert counts[:20] == [1] * 20
    assert counts[20] <= (1 if dynamic else 2)


@COMPILED
def test_the_ops_of_a_program_are_fastmixs_own(device):
    """One node each, forward and backward, and nothing else makes a tensor of the images' size or a dense target."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model = network(device)
    fast = torch.compile(functools.partial(step, model), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    x, y, lam, index = batch(6, device)
    lam.requires_grad_()
    fast(x, y, lam, index).backward()
    forward, backward = ([node for node in graph.nodes if node.op == "call_function"] for graph in graphs)

    def ours(nodes):
        return sorted(str(node.target) for node in nodes if "fastmix" in str(node.target))

    assert ours(forward) == ["fastmix.mix.default", "fastmix.soft_cross_entropy.default"]
    assert ours(backward) == ["fastmix.mix_backward.default", "fastmix.soft_cross_entropy_backward.default"]
    for node in (*forward, *backward):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and value.shape == x.shape:
            assert "mix" in str(node.target) or "view" in str(node.target)
    assert not [node for node in (*forward, *backward) if "scatter" in str(node.target) or "one_hot" in str(node.target)]
    for node in (*forward, *backward):
        if "fastmix" in str(node.target):
            assert node.args[-1] == backend_name()


@COMPILED
@pytest.mark.parametrize("op", ["dense_cross_entropy", "dense_binary_cross_entropy"])
@pytest.mark.parametrize("each", [True, False], ids=["lambdas", "one lambda"])
def test_compiled_mixed_rows_are_mixed_where_they_are_read(each, op, device):
    """The eager bits, by one program whose only node is the loss: no mixed target is made. Wrong partners are refused as in eager
    mode."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    def loss(z, values, lam, index):
        target = MixedRows(values, lam, index)
        if op == "dense_binary_cross_entropy":
            return fastmix.soft_binary_cross_entropy(z, target, label_smoothing=0.1, reduction="none")
        return fastmix.soft_cross_entropy(z, target, label_smoothing=0.1, ignore_index=3, reduction="none")

    def run(loss, z, *target):
        leaves = leaf(z), *target
        result = loss(*leaves)
        return result.detach(), *torch.autograd.grad(result, leaves[0], torch.linspace(-1, 2, len(z), device=device))

    torch._dynamo.reset()
    fast = torch.compile(loss, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True)
    for N in (6, 5):
        z, _, lam, index = batch(N, device, row=(C,))
        target = torch.rand(N, C, device=device), lam if each else lam[-1], index
        for ours, eager in zip(run(fast, z, *target), run(loss, z, *target), strict=True):
            assert torch.equal(ours, eager)
    views = "<built-in function", "aten.sym_size", "aten.detach"
    calls = [[name for name in graph if not name.startswith(views)] for graph in graphs]
    assert calls == [[f"fastmix.{op}.default"], [f"fastmix.{op}_backward.default"]]
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"target.index: expected a partner in \[0, 5\), got 5 in row 4"):
            fast(z, *target[:2], torch.arange(1, 6))


@COMPILED
def test_a_compiled_step_through_the_sampler(device):
    """Without a seed a sampler draws its key from torch's own generator: the same numbers as eagerly."""
    model = network(device)
    mixer = fastmix.RandomMix(fastmix.Mixup(0.4, partner="different"), fastmix.CutMix(per="pair"))

    def mixed_step(x, y):
        x, target = mixer(x, y)
        return fastmix.soft_cross_entropy(model(x), target)

    fast, programs = compiled(mixed_step)
    leaves, losses = list(model.parameters()), []
    for n in (6, 6, 6, 5):
        x, y, _, _ = batch(n, device)
        torch.manual_seed(len(losses))
        loss = fast(x, y)
        torch.manual_seed(len(losses))
        m = mixer.sample(x, y)
        expected = plain_loss(model(plain_mix(x, m.lam, m.index, m.box)), *plain_pairs(y, m.target_lam, m.index))
        same(loss, expected)
        same(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
        losses.append(loss.item())
        assert programs.frame_count == 1 or n == 5
    assert programs.frame_count <= 2
    assert len(set(losses)) == 4


@COMPILED
def test_inductor():
    """The default compiler, with the seams that it fuses around the ops."""
    if not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++")))):
        pytest.skip(NO_CPP_COMPILER)
    model = network()
    fast, programs = compiled(functools.partial(step, model), "inductor", dynamic=True)
    for n in (6, 6, 5):
        x, y, lam, index = batch(n)
        lam.requires_grad_()
        loss, expected = fast(x, y, lam, index), plain_step(model, x, y, lam, index)
        leaves = lam, *model.parameters()
        same(loss, expected)
        same(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    assert programs.frame_count == 1


@COMPILED
@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_inductor_around_the_kernels(device):
    """Every loss in one program."""
    if not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++", "c++")))):
        pytest.skip(NO_CPP_COMPILER)

    def losses(z, lam, y, index, rows):
        m, options = Mix(lam, index), {"label_smoothing": 0.1}
        z = z.sin()
        return (
            fastmix.soft_cross_entropy(z, rows * lam[:, None], **options)
            + 2 * fastmix.soft_cross_entropy(z, MixedRows(rows, lam.detach(), index), **options)
            + 3 * fastmix.soft_binary_cross_entropy(z, m.target(y), **options)
            + 4 * fastmix.soft_binary_cross_entropy(z, m.target(rows), class_reduction="sum", **options)
            + 5 * fastmix.js_divergence((z, z * lam[:, None], z + 1), scale=12.0)
        )

    fast, programs = compiled(losses, "inductor")
    z, y, lam, index = batch(6, device, row=(C,))
    leaves, rest = (leaf(z), leaf(lam)), (y, index, torch.rand(6, C, device=device))
    ours, eager = (op(*leaves, *rest) for op in (fast, losses))
    same(ours, eager)
    same(*(torch.autograd.grad(loss, leaves) for loss in (ours, eager)))
    assert programs.frame_count == 1


@COMPILED
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_reduce_overhead(device):
    """Inside CUDA graphs, which replay what was recorded: every step has its own lambda all the same."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = network(device)
    fast = torch.compile(functools.partial(step, model), mode="reduce-overhead", fullgraph=True)
    for _ in range(6):
        x, y, lam, index = batch(6, device)
        lam.requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        loss, leaves = fast(x, y, lam, index), (lam, *model.parameters())
        gradients = torch.autograd.grad(loss, leaves)
        expected = plain_step(model, x, y, lam, index)
        same((loss.clone(), *(t.clone() for t in gradients)), (expected, *torch.autograd.grad(expected, leaves)))
    assert counters["inductor"]["cudagraph_skips"] == 0


def pixel_batch(device):
    z = torch.randn(2, C, 3, 4, device=device).contiguous(memory_format=torch.channels_last)
    return z, torch.randint(0, C, (2, 3, 4), device=device), torch.rand(2, device=device), torch.tensor([1, 0], device=device)


@COMPILED
@pytest.mark.parametrize("kind", ["indices", "K-hot", "dense", "rows", "pixels", "boxes"])
def test_compiled_gradients_and_layouts_are_the_eager_ones(kind, device):
    """With what the training step above leaves out: class weights, ignored classes, upstream gradients by row, boxes, one
    lambda for all rows."""
    z, y, lam, index = pixel_batch(device) if kind == "pixels" else batch(6, device, row=(C,))
    box = torch.tensor([[0, 1, 2, 5], [-1, 0, 9, 3], [2, 2, 2, 2], [1, 1, 3, 3], [0, 0, 4, 6], [3, 5, 4, 6]], device=device)
    options = {"weight": torch.rand(C, device=device) + 0.1, "ignore_index": 1, "label_smoothing": 0.1, "reduction": "none"}
    if kind == "boxes":
        lam = lam[1]
        z = torch.randn(6, 2, 4, 6, device=device).contiguous(memory_format=torch.channels_last)

    def op(z, lam):
        if kind == "boxes":
            return fastmix.mix(z, lam, index, box=box)
        onehot = F.one_hot(y, C).to(lam.dtype) if kind == "rows" else None
        target = {
            "indices": lambda: y,
            "K-hot": lambda: SoftTarget(torch.stack((y, y[index], y), 1), torch.stack((lam, 1 - lam, lam / 2), 1)),
            "dense": lambda: torch.outer(lam, torch.arange(1.0, C + 1, device=device)),
            "rows": lambda: MixedRows(onehot, lam, index),
            "pixels": lambda: Mix(lam, index).target(y),
        }[kind]()
        return fastmix.soft_cross_entropy(z, target, **options)

    def run(op):
        leaves = leaf(z), leaf(lam)
        assert leaves[0].stride() == z.stride()
        result = op(*leaves)
        upstream = torch.linspace(-1, 2, result.numel(), device=device).view(result.shape)
        return [result, *torch.autograd.grad(result, leaves[: 1 + (kind != "indices")], upstream)]

    fast, programs = compiled(op)
    for ours, eager in zip(run(fast), run(op), strict=True):
        same(ours, eager)
        assert ours.stride() == eager.stride()
    assert programs.frame_count == 1


@COMPILED
def test_lambda_as_a_python_number():
    """Not compiled anew for every value (pytorch#149406): once as a constant, then as a variable. A tensor is an input at once."""
    x, _, _, index = batch(4)
    values = (0.25, 0.5, 0.0, 1.0, 0.125, 0.75)
    for as_input, most in ((float, 2), (torch.tensor, 1)):
        fast, programs = compiled(lambda x, lam: fastmix.mix(x, lam, index))
        for lam in values:
            same(fast(x, as_input(lam)), plain_mix(x, torch.tensor(lam), index))
        assert programs.frame_count <= most


@COMPILED
def test_what_goes_in_and_comes_out_of_a_program(device):
    """A SoftTarget, a Mix, out, a module's criterion."""
    x, y, lam, index = batch(6, device, row=(C,))
    m, criterion = Mix(lam, index), fastmix.SoftCrossEntropyLoss(torch.rand(C, device=device))

    def op(x, target, m, out):
        target = SoftTarget(target.classes, target.weights / 2)
        return criterion(x, target), target, m.apply(x), fastmix.mix(x, 0.25, index, out=out), Mix(m.lam, m.index)

    fast, _ = compiled(op)
    out = torch.empty_like(x)
    loss, target, mixed, returned, other = fast(x, m.target(y), m, out)
    classes, weights = plain_pairs(y, lam, index)
    same(loss, plain_loss(x, classes, weights / 2, criterion.weight))
    same((target.classes, target.weights), (classes, weights / 2))
    same((mixed, out), (plain_mix(x, lam, index), plain_mix(x, torch.tensor(0.25), index)))
    assert returned is out
    same((other.lam, other.index), (lam, index))
    accuracy, _ = compiled(lambda x, target: fastmix.mixed_accuracy(x, target))
    same(accuracy(x, m.target(y)), fastmix.mixed_accuracy(x, m.target(y)))


@COMPILED
def test_a_program_refuses_wrong_indices_as_eager_does(device):
    """They cannot be looked at while tracing. On the CPU the running program names the row; on a GPU the row is NaN, and named
    under debug()."""
    x, y, lam, index = batch(4, device, row=(C,))
    mixing, _ = compiled(lambda x, index: fastmix.mix(x, lam, index))
    loss = torch.compile(lambda x, y: fastmix.soft_cross_entropy(x, y, reduction="none"), backend="aot_eager", fullgraph=True)
    same(mixing(x, index), plain_mix(x, lam, index))
    same(loss(x, y), F.cross_entropy(x, y, reduction="none"))
    wrong = torch.tensor([1, 0, -1, 2], device=device)
    if device.type == "cuda":
        assert mixing(x, wrong).isnan().any(1).tolist() == [False, False, True, False]
        assert loss(x, wrong).isnan().tolist() == [False, False, True, False]
    with fastmix.debug() if device.type == "cuda" else contextlib.nullcontext():
        with pytest.raises(ValueError, match="index: expected a partner .* got -1 in row 2"):
            mixing(x, wrong)
        with pytest.raises(ValueError, match="target: expected a class .* got -1 in row 2"):
            loss(x, wrong)


@COMPILED
def test_compiled_transforms(device):
    x, y, lam, index = batch(4, device, torch.float64, row=(C,))

    def loss(x, lam):
        return step(nn.Identity(), x, y, lam, index)

    def plain(x, lam):
        return plain_step(nn.Identity(), x, y, lam, index)

    def many(f):
        return lambda x, lam: torch.func.vmap(f, (None, 0))(x, torch.stack((lam, 1 - lam)))

    def tangents(f):
        return lambda x, lam: torch.func.jvp(f, (x, lam), (x, 1 - lam))

    for compiler, transform in (("aot_eager", lambda f: torch.func.grad(f, (0, 1))), ("eager", many), ("eager", tangents)):
        fast, _ = compiled(transform(loss), compiler)
        same(fast(x, lam), transform(plain)(x, lam))


def torch_refuses_second_derivatives():
    """Of what it compiles. torch 2.11 does not where a program keeps nothing that came in, and gives wrong ones, of exp too."""
    z = torch.ones(1, requires_grad=True)
    loss = compiled(lambda z: z.exp().sum(), "aot_eager")[0](z)
    return torch.autograd.grad(loss, z, create_graph=True)[0].requires_grad


@COMPILED
def test_second_derivatives_of_a_program_are_refused(device):
    """torch's own message, or ours; never a gradient without its second term."""

    def penalise(loss, z):
        penalty = torch.autograd.grad(loss, z, create_graph=True)[0].square().sum()
        (loss + penalty).backward()

    x, y, lam, index = batch(4, device, row=(C,))
    for op in (
        lambda x: fastmix.soft_cross_entropy(x, y),
        lambda x: fastmix.soft_cross_entropy(x, x.softmax(1)),
        lambda x: fastmix.mix(x, lam, index).pow(3).sum(),
    ):
        for compiler in ("eager", "aot_eager"):
            fast, _ = compiled(op, compiler)
            z = leaf(x)
            if compiler == "aot_eager" and not torch_refuses_second_derivatives():
                continue
            loss = fast(z)
            assert loss.requires_grad
            with pytest.raises(RuntimeError, match="double backward|autograd formula|second derivatives"):
                penalise(loss, z)


@COMPILED
def test_compiled_autograd(device):
    """The backward compiled too, as its tutorial does it."""
    model = network(device)
    x, y, lam, index = batch(6, device)
    lam.requires_grad_()
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def train(x, y, lam, index):
        step(model, x, y, lam, index).backward()

    leaves = lam, *model.parameters()
    with torch._dynamo.config.patch(compiled_autograd=True):
        train(x, y, lam, index)
    expected = torch.autograd.grad(plain_step(model, x, y, lam, index), leaves)
    same([t.grad for t in leaves], list(expected))


@COMPILED
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, looking at the loss
def test_a_compiled_backward_of_an_eager_forward(device):
    """Right, or refused in words that say what is not supported."""
    x, y, lam, index = batch(4, device, row=(C,))
    for op, plain in (
        (lambda x, lam: fastmix.mix(x, lam, index).square().sum(), lambda x, lam: plain_mix(x, lam, index).square().sum()),
        (lambda x, lam: step(nn.Identity(), x, y, lam, index), lambda x, lam: plain_step(nn.Identity(), x, y, lam, index)),
    ):
        leaves = leaf(x), leaf(lam)
        expected = torch.autograd.grad(plain(*leaves), leaves)
        loss = op(*leaves)
        torch._dynamo.reset()
        refusal = None
        try:
            with torch._dynamo.config.patch(compiled_autograd=True):
                torch.compile(loss.backward, backend="aot_eager")()
        except RuntimeError as error:
            refusal = str(error)
        if refusal is None:
            same([t.grad for t in leaves], list(expected))
        else:
            assert "compil" in refusal


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


@COMPILED
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    """A module that mixes and computes losses, for batches of any size."""
    recipe = Recipe()
    arguments = batch(6)
    N = torch.export.Dim("N", min=2)
    program = torch.export.export(recipe, arguments, dynamic_shapes=({0: N},) * 4, strict=strict)
    names = [str(node.target) for node in program.graph.nodes if "fastmix" in str(node.target)]
    assert sorted(names) == [f"fastmix.{op}.default" for op in ("dense_cross_entropy", "mix", "soft_cross_entropy")]
    for n in (6, 3):
        x, y, lam, index = batch(n)
        mixed, loss, other = program.module()(x, y, lam, index)
        expected = plain_step(recipe.model, x, y, lam, index)
        same(mixed, plain_mix(x, lam, index))
        same((loss, other), (expected, expected))


# The registered operators


def with_gradients(*tensors):
    return [t if t is None or not t.is_floating_point() else leaf(t) for t in tensors]


def mix_samples(name, device):
    """(operator, arguments)"""
    ops = torch.ops.fastmix
    wide = torch.randn(8, 4, 6, 9, device=device)
    images = wide[:4, :3, :, :5].contiguous()
    for x, boxes in (
        (images, 0),
        (images.contiguous(memory_format=torch.channels_last), 2),
        (wide[::2, 1:3, ::2], 2),
        (wide[:1].expand(4, 4, 6, 9), 0),
        (wide[:4].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3), 1),
        (wide[:4, 0, 0, 0], 0),
        (wide.view(2, 4, 3, 4, 18), 3),
        (torch.randn(0, 6, 9, device=device), 1),
    ):
        N = x.shape[0]
        index = torch.randint(0, max(N, 1), (N,), device=device)
        box = torch.randint(-1, 6, (N, 2 * boxes), device=device) if boxes else None
        lam = torch.rand(N if boxes != 1 else (), device=device)
        yield ops.mix.default, (*with_gradients(x, lam), index, box, name)
        g = torch.randn_like(x)
        for need_dx, need_dlam in ((True, True), (True, False), (False, True)):
            yield ops.mix_backward.default, (g, x if need_dlam else None, lam, index, box, need_dx, need_dlam, name)


def loss_samples(name, device):
    ops = torch.ops.fastmix
    reductions = ("mean", "sum", "none")
    layouts = [
        ((4, C), torch.contiguous_format),
        ((2, C, 3, 4), torch.channels_last),
        ((2, C, 3), torch.contiguous_format),
        ((2, C, 2, 3, 2), torch.contiguous_format),
        ((3, 1), torch.contiguous_format),
        ((0, C), torch.contiguous_format),
    ]
    for n in range(12):
        (shape, layout), reduction, K = layouts[n % 6], reductions[n // 3 % 3], 1 + n % 3
        dtype = (torch.float32, torch.float16, torch.bfloat16, torch.float64)[n % 4]
        N, classes_count, *inner = shape
        if N == 0 and reduction == "mean":
            reduction = "sum"  # a mean over nothing is NaN, which opcheck does not find equal to itself
        z = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        w = torch.rand(classes_count, dtype=accumulator, device=device) if n % 2 else None
        e = (0.0, 0.1)[n // 2 % 2]
        classes = torch.randint(0, classes_count, (N, K, *inner), device=device)
        classes[1:2, :1] = -100
        weights = (None, torch.rand(N, K, device=device), torch.rand(N, K, *inner, device=device))[n // 4 % 3]
        need = weights is not None and n % 5 != 0
        target = (leaf(weights) if need else weights), classes, w, -100, e
        yield ops.soft_cross_entropy.default, (leaf(z), *target, reduction, need, name)
        loss, mass, stats, _ = ops.soft_cross_entropy(z, weights, *target[1:], reduction, False, name)
        g = torch.randn_like(loss)
        mass = mass if reduction == "mean" else None
        yield ops.soft_cross_entropy_backward.default, (g, z, weights, *target[1:], mass, stats, name)
        t = torch.rand(shape, dtype=torch.bfloat16 if n % 4 == 1 else torch.float32, device=device)
        mixing = n % 3 > 0
        lam, index = torch.rand(() if n < 6 else N, device=device), torch.randint(0, max(N, 1), (N,), device=device)
        options = w, 0, e, reduction, *((lam, index) if mixing else (None, None))
        yield ops.dense_cross_entropy.default, (leaf(z), t if mixing else leaf(t), *options, name)
        loss, stats = ops.dense_cross_entropy(z, t, *options, name)
        needed = (True, False) if mixing else ((True, True), (False, True))[n // 3 % 2]
        yield ops.dense_cross_entropy_backward.default, (torch.randn_like(loss), z, t, *options, stats, *needed, name)


@COMPILED
@pytest.mark.parametrize("samples", [mix_samples, loss_samples])
def test_operators_keep_their_promises(samples, device):
    """opcheck: schema, fake results (shapes, dtypes, strides), autograd registration, and the same under AOT dispatch."""
    checked = set()
    for n, (op, arguments) in enumerate(samples(backend_name(), device)):
        cheap = "test_schema", "test_autograd_registration", "test_faketensor"
        all_of_them = *cheap, "test_aot_dispatch_dynamic"
        often = n % 7 == 0  # of every operator, in turns: they come in fours
        torch.library.opcheck(op, arguments, test_utils=all_of_them if often else cheap, atol=1e-5, rtol=1e-4)
        checked.add(op.name())
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastmix::")}
    elsewhere = "convex_combination", "js_divergence", "mix_masked", "binary"  # have tests of their own
    registered = {name for name in registered if not any(part in name for part in elsewhere)}
    assert checked == {name for name in registered if ("cross_entropy" in name) == (samples is loss_samples)}


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


# Devices and defaults


@pytest.mark.gpu
@pytest.mark.no_poison
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_on_a_gpu_that_is_not_the_current_one(device):
    """Every launch, those of backward threads and of programs too, goes to the tensors' GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip(TWO_GPUS)
    device = torch.device("cuda", 1)
    model = network(device)
    x, y, lam, index = batch(6, device)
    x, lam = leaf(x), leaf(lam)
    leaves = x, lam, *model.parameters()
    box = torch.tensor([[0, 0, 1, 2]] * 6, device=device)
    with torch.cuda.device(0):
        expected = plain_step(model, x, y, lam, index)
        gradients = torch.autograd.grad(expected, leaves)
        for run in (step, compiled(step)[0]):
            loss = run(model, x, y, lam, index)
            same(loss, expected)
            same(torch.autograd.grad(loss, leaves), gradients)
        dense = torch.rand(6, C, device=device, requires_grad=True)
        loss = fastmix.soft_cross_entropy(model(x), dense)
        same(torch.autograd.grad(loss, dense)[0], -torch.log_softmax(model(x), 1).detach() / 6)
        same(fastmix.mix(x, 0.5, index, box=box), plain_mix(x, torch.tensor(0.5, device=device), index, box))
        mixed, _ = fastmix.RandomMix(fastmix.Mixup(0.4, seed=0), fastmix.CutMix(seed=0))(x, y)
        assert mixed.device == device
        with pytest.raises(ValueError, match="index: expected a tensor on cuda:1, got .* on cuda:0"):
            fastmix.mix(x, lam, index.to("cuda:0"))
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("default", ["bfloat16", "float64", "device"])
def test_torchs_defaults_do_not_matter(default, device):
    """torch.set_default_dtype and set_default_device say what is made of nothing; the ops make what their inputs ask for."""
    rows = ((2, 3, 5), (3000,)) if backend_name() == "torch" else ((2, 3, 5),)  # it takes other steps for larger batches
    batches = [batch(6, device, row=row) for row in rows]
    boxes = torch.tensor([[0, 1, 2, 4]] * 6, device=device)
    weight = torch.rand(C, device=device)
    z = torch.randn(6, C, device=device)

    def everything():
        results = []
        for x, y, lam, index in batches:
            leaves = leaf(x), leaf(lam)
            m = Mix(leaves[1], index, box=boxes if x.dim() == 4 else None)
            mixed = m.apply(leaves[0])
            logits = leaf(z)
            loss = fastmix.soft_cross_entropy(logits, m.target(y), weight=weight, label_smoothing=0.1)
            loss = loss + fastmix.soft_cross_entropy(logits, m.target(y).dense(C), ignore_index=1)
            loss = loss + fastmix.soft_cross_entropy(logits, y) + fastmix.js_divergence([logits, z.flip(0)])
            for rows in (y, m.target(y), m.target(z.sigmoid())):
                loss = loss + fastmix.soft_binary_cross_entropy(logits, rows, pos_weight=weight)
            results += [mixed, loss, *torch.autograd.grad(mixed.square().sum() + loss, (*leaves, logits))]
            results.append(torch.func.grad(lambda x, m=m: m.apply(x).square().sum())(x))
            results += [fastmix.mixed_accuracy(z, m.target(y)), fastmix.mix(x, 0.5, index)]
            for mixer in (fastmix.Mixup(0.4, seed=0), fastmix.Mixup(0.4, partner="different", per="pair", seed=0)):
                mixed, target = mixer(x, y)
                results += [mixed, target.weights, target.argmax()]
        return results

    expected = everything()
    if default == "device":
        with torch.device("meta"):
            results = everything()
    else:
        torch.set_default_dtype(getattr(torch, default))
        try:
            results = everything()
        finally:
            torch.set_default_dtype(torch.float32)
    for ours, plain in zip(results, expected, strict=True):
        assert (ours.dtype, ours.device) == (plain.dtype, plain.device)
        assert torch.equal(ours, plain)


# Derivatives


@pytest.mark.parametrize("boxes", [False, True])
def test_gradcheck_of_mixing(boxes, device):
    """First and second derivatives, forward mode, and many upstream gradients at once; lambda by row, or one for all."""
    x, _, lam, index = batch(4, device, torch.float64, row=(2, 3))
    box = torch.tensor([[0, 0, 1, 2], [1, -1, 9, 3], [1, 1, 1, 1], [0, 1, 1, 3]], device=device) if boxes else None
    x, lam = leaf(x), leaf(lam if boxes else lam[1])
    fast = device.type == "cuda" or backend_name() == "triton"

    def op(x, lam):
        return fastmix.mix(x, lam, index, box=box)

    assert torch.autograd.gradcheck(op, (x, lam), check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda x, lam: op(x, lam).square(), (x, lam), fast_mode=True)
    for leaves, function in (((x,), lambda x: op(x, lam.detach())), ((lam,), lambda lam: op(x.detach(), lam))):
        at_once = torch.autograd.functional.jacobian(function, leaves, vectorize=True)
        same(at_once, torch.autograd.functional.jacobian(function, leaves))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_the_loss(reduction, device):
    """To logits, to weights of three components one of which is ignored, to dense targets; backward and forward mode."""
    z = torch.randn(3, C, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(3, 3, dtype=torch.float64, device=device, requires_grad=True)
    classes = torch.tensor([[0, 2, 2], [4, 1, 3], [1, -100, 0]], device=device)
    dense = torch.rand(3, C, dtype=torch.float64, device=device, requires_grad=True)
    options = {"weight": torch.rand(C, dtype=torch.float64, device=device), "label_smoothing": 0.1, "reduction": reduction}
    fast = device.type == "cuda" or backend_name() == "triton"
    for target, make in ((weights, lambda t: SoftTarget(classes, t)), (dense, lambda t: t)):

        def op(z, target, make=make):
            return fastmix.soft_cross_entropy(z, make(target), **options)

        assert torch.autograd.gradcheck(op, (z, target), check_forward_ad=True, fast_mode=fast)


def test_second_derivatives_of_the_loss_are_refused(device):
    """By every road that leads through a backward; torch.func has its own (below)."""
    z, y, lam, index = batch(4, device, row=(C,))
    dense, functional = torch.rand(4, C, device=device), torch.autograd.functional
    for target in (y, Mix(leaf(lam), index).target(y), dense, leaf(dense)):

        def loss(z, target=target):
            return fastmix.soft_cross_entropy(z, target)

        for attempt in (
            lambda z, loss=loss: torch.autograd.grad(loss(z), z, create_graph=True),
            lambda z, loss=loss: loss(z).backward(create_graph=True),
            lambda z, loss=loss: functional.hessian(loss, z),
            lambda z, loss=loss: functional.hvp(loss, z, z),
            lambda z, loss=loss: functional.vhp(loss, z, z),
            lambda z, loss=loss: functional.jvp(loss, z, z),
        ):
            with pytest.raises(RuntimeError, match="second derivatives are not supported.*cross_entropy on target.dense"):
                attempt(leaf(z))
        with pytest.raises(RuntimeError, match="cannot be batched.*torch.func"):
            functional.jacobian(loss, z, vectorize=True)
        same(
            functional.jacobian(loss, z, vectorize=True, strategy="forward-mode"),
            functional.jacobian(loss, z),
        )


def test_a_backward_under_a_dispatch_mode(device):
    """As when only the backward's operations are counted: that is no batched backward."""
    from torch.utils.flop_counter import FlopCounterMode

    z, y, lam, index = batch(4, device, row=(C,))
    for around in (contextlib.nullcontext, lambda: FlopCounterMode(display=False)):
        leaves = leaf(z), leaf(lam)
        m = Mix(leaves[1], index)
        with around():
            loss = fastmix.soft_cross_entropy(m.apply(leaves[0]), m.target(y))
        expected = plain_loss(plain_mix(*leaves, index), *plain_pairs(y, leaves[1], index))
        gradients = torch.autograd.grad(expected, leaves)
        with FlopCounterMode(display=False):
            same(torch.autograd.grad(loss, leaves), gradients)


TRANSFORMS = {
    "grad": lambda f, x, lam: torch.func.grad(lambda x, lam: f(x, lam).square().sum(), (0, 1))(x, lam),
    "vjp": lambda f, x, lam: (lambda out, pull: pull(out.cos()))(*torch.func.vjp(f, x, lam)),
    "jvp": lambda f, x, lam: torch.func.jvp(f, (x, lam), (x.cos(), lam.sin())),
    "jacrev": lambda f, x, lam: torch.func.jacrev(f, (0, 1))(x, lam),
    "jacfwd": lambda f, x, lam: torch.func.jacfwd(f, (0, 1))(x, lam),
    "hessian": lambda f, x, lam: torch.func.hessian(lambda x, lam: f(x, lam).square().sum(), (0, 1))(x, lam),
    "vmap over lam": lambda f, x, lam: torch.func.vmap(f, (None, 0))(x, torch.stack((lam, 1 - lam, lam / 2))),
    "vmap over scalars": lambda f, x, lam: torch.func.vmap(f, (None, 0))(x, lam),
    "vmap over x": lambda f, x, lam: torch.func.vmap(f, (1, None), 1)(torch.stack((x, x.cos()), 1), lam),
    "vmap of grad": lambda f, x, lam: torch.func.vmap(torch.func.grad(lambda x, lam: f(x, lam).square().sum(), (0, 1)))(
        torch.stack((x, x.cos())), torch.stack((lam, 1 - lam))
    ),
    "grad of vmap": lambda f, x, lam: torch.func.grad(lambda lams: torch.func.vmap(f, (None, 0))(x, lams).square().sum())(
        torch.stack((lam, 1 - lam))
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_and_forward_mode(transform, device):
    """Right where torch's own operations are; a kernel alone would give no tangent, or a wrong one, silently."""
    x, y, lam, index = batch(4, device, torch.float64, row=(C,))
    box = torch.tensor([[0, 2], [1, 4], [3, 3], [-1, 9]], device=device)
    weight = torch.rand(C, dtype=torch.float64, device=device)
    smoothed = {"label_smoothing": 0.1, "weight": weight}
    pairs = (
        (lambda x, lam: fastmix.mix(x, lam, index), lambda x, lam: plain_mix(x, lam, index)),
        (lambda x, lam: fastmix.mix(x, lam, index, box=box), lambda x, lam: plain_mix(x, lam, index, box)),
        (
            lambda x, lam: fastmix.soft_cross_entropy(x, Mix(lam, index).target(y), **smoothed),
            lambda x, lam: plain_loss(x, *plain_pairs(y, lam, index), **smoothed),
        ),
        (
            lambda x, lam: fastmix.soft_cross_entropy(Mix(lam, index).apply(x), y, reduction="none") * lam,
            lambda x, lam: F.cross_entropy(plain_mix(x, lam, index), y, reduction="none") * lam,
        ),
        (
            lambda x, lam: fastmix.soft_cross_entropy(x, fastmix.mix(x.softmax(1), lam, index), label_smoothing=0.1),
            lambda x, lam: F.cross_entropy(x, plain_mix(x.softmax(1), lam, index), label_smoothing=0.1),
        ),
        (
            lambda x, lam: fastmix.soft_cross_entropy(x, MixedRows(x.softmax(1), lam, index), reduction="sum"),
            lambda x, lam: F.cross_entropy(x, plain_mix(x.softmax(1), lam, index), reduction="sum"),
        ),
    )
    for ours, plain in pairs:
        if transform == "vmap over x":  # the mapped dimension has to come out somewhere
            ours, plain = ((lambda x, lam, f=f: f(x, lam).expand(2, *f(x, lam).shape)) for f in (ours, plain))
        same(TRANSFORMS[transform](ours, x, lam), TRANSFORMS[transform](plain, x, lam))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own, about its constants
def test_linearized(device):
    x, y, lam, index = batch(4, device, torch.float64, row=(C,))
    directions = x.cos(), lam.sin()
    _, push = torch.func.linearize(lambda x, lam: step(nn.Identity(), x, y, lam, index), x, lam)
    _, tangent = torch.func.jvp(lambda x, lam: plain_step(nn.Identity(), x, y, lam, index), (x, lam), directions)
    same(push(*directions), tangent)


def test_vmap_over_a_batch_of_batches(device):
    """Everything mapped at once, targets too, which are pytrees; and one gradient per sample."""
    batches = [batch(4, device, torch.float64, row=(C,)) for _ in range(3)]
    x, y, lam, index = (torch.stack(t) for t in zip(*batches, strict=True))

    def loss(x, y, lam, index):
        m = Mix(lam, index)
        return fastmix.soft_cross_entropy(m.apply(x), m.target(y))

    expected = torch.stack([plain_loss(plain_mix(x, lam, index), *plain_pairs(y, lam, index)) for x, y, lam, index in batches])
    same(torch.func.vmap(loss)(x, y, lam, index), expected)
    targets = SoftTarget(
        *(torch.stack(t) for t in zip(*(plain_pairs(y, lam, index) for _, y, lam, index in batches), strict=True))
    )
    mapped = torch.func.vmap(lambda x, target: fastmix.soft_cross_entropy(x, target))(x, targets)
    same(mapped, torch.stack([plain_loss(x, *plain_pairs(y, lam, index)) for x, y, lam, index in batches]))
    same(
        torch.func.vmap(fastmix.mixed_accuracy)(x, targets),
        torch.stack([fastmix.mixed_accuracy(x, Mix(lam, index).target(y)) for x, y, lam, index in batches]),
    )

    W = torch.randn(C, C, dtype=torch.float64, device=device)
    classes, weights = plain_pairs(*batches[0][1:])

    def sample_loss(W, x, classes, weights, loss):
        return loss((x @ W)[None], classes[None], weights[None])

    def ours(z, classes, weights):
        return fastmix.soft_cross_entropy(z, SoftTarget(classes, weights))

    per_sample = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0, 0, None))
    gradients = per_sample(W, x[0], classes, weights, ours)
    assert gradients.shape == (4, C, C)
    for i in range(4):
        w = leaf(W)
        sample_loss(w, x[0, i], classes[i], weights[i], plain_loss).backward()
        same(gradients[i], w.grad)


def test_out_under_vmap(device):
    """Written where it is mapped as well, refused by torch where one buffer would hold many results."""
    x, _, lam, index = batch(4, device, row=(C,))
    many = torch.stack((x, x.cos()))
    out = torch.func.vmap(lambda x: fastmix.mix(x, lam, index, out=torch.empty_like(x)))(many)
    same(out, torch.stack([plain_mix(x, lam, index) for x in many]))
    one = torch.empty_like(x)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: fastmix.mix(x, lam, index, out=one))(many)


def test_forward_mode_beside_backward_mode(device):
    """A dual number on one input while another requires a gradient; the tangent of a gradient."""
    x, y, lam, index = batch(4, device, torch.float64, row=(C,))

    results = []
    for f in (step, plain_step):
        z = leaf(x)
        with torch.autograd.forward_ad.dual_level():
            value = f(nn.Identity(), z, y, torch.autograd.forward_ad.make_dual(lam, lam.cos()), index)
            gradient = torch.autograd.grad(value, z, create_graph=True)[0]
            results.append([torch.autograd.forward_ad.unpack_dual(t).tangent for t in (value, gradient)])
    same(*results)


def test_learning_through_an_inner_step(device):
    """Meta-learning: lambda's gradient of a loss after a gradient step on the mixed batch."""
    x, y, lam, index = batch(4, device, torch.float64, row=(3,))
    W = torch.randn(3, C, dtype=torch.float64, device=device)

    def outer(lam, mixing, loss):
        inner = torch.func.grad(lambda W: loss(mixing(x, lam, index) @ W, lam))(W)
        return F.cross_entropy(x @ (W - 0.5 * inner), y)

    ours, plain = leaf(lam), leaf(lam)
    outer(ours, fastmix.mix, lambda z, lam: fastmix.soft_cross_entropy(z, Mix(lam, index).target(y))).backward()
    outer(plain, plain_mix, lambda z, lam: plain_loss(z, *plain_pairs(y, lam, index))).backward()
    same(ours.grad, plain.grad)


# Distributed


DISTRIBUTED = """
import pathlib, sys, torch
from torch import nn

sys.path[:0] = [{root!r}, {tests!r}]
from test_works_with_torch import step

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


# Hooks, modes, subclasses, copies


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


def test_hooks_on_saved_tensors(device):
    """What is saved goes through the hooks and may come back as a copy, or from the CPU."""
    x, y, lam, index = batch(4, device, row=(C,))
    dense = torch.rand(4, C, device=device)

    def gradients(around):
        leaves = leaf(x), leaf(lam), leaf(dense)
        with around:
            m = Mix(leaves[1], index)
            mixed = m.apply(leaves[0])
            loss = fastmix.soft_cross_entropy(mixed, m.target(y)) + fastmix.soft_cross_entropy(mixed, leaves[2])
        return torch.autograd.grad(loss, leaves)

    expected = gradients(contextlib.nullcontext())
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.detach().cpu().numpy().copy(), t.device

    def unpack(saved):
        return torch.from_numpy(saved[0]).to(saved[1])

    for around in (torch.autograd.graph.save_on_cpu(), torch.autograd.graph.saved_tensors_hooks(pack, unpack)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(around), expected, strict=True))
    assert packed.count(x.shape) >= 3  # the batch for lambda's gradient, the logits of two losses


def test_inputs_changed_before_the_backward(device):
    """torch's own error, not the gradient of other values; right where torch is told to keep copies, or nothing was saved."""
    x, y, lam, index = batch(4, device, row=(C,))

    def change(op, keep=contextlib.nullcontext):
        leaves = leaf(x), leaf(lam)
        with keep():
            z = leaves[0] * 1
            loss = op(z, leaves[1])
            z.mul_(2)
            return torch.autograd.grad(loss, leaves[0])[0]

    def mixing(z, lam):
        return fastmix.mix(z, lam, index).square().sum()

    def loss(z, lam):
        return fastmix.soft_cross_entropy(z, y)

    for op in (mixing, loss):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            change(op)
        z = leaf(x)
        expected = torch.autograd.grad(op(z, lam), z)[0]
        assert torch.equal(change(op, torch.autograd.graph.allow_mutation_on_saved_tensors), expected)
    gradient = change(lambda z, _: fastmix.mix(z, lam, index).sum())  # linear: nothing of the batch is needed
    z = leaf(x)
    same(gradient, torch.autograd.grad(plain_mix(z, lam, index).sum(), z)[0])


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


def test_no_grad_and_inference_mode(device):
    """The same values, no graph; what was made in inference mode gives torch's own error where a graph needs it."""
    x, y, lam, index = batch(4, device, row=(C,))
    x, lam = leaf(x), leaf(lam)
    target = Mix(lam, index).target(y)
    expected = plain_mix(x, lam, index).detach(), plain_loss(x, *plain_pairs(y, lam, index)).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results = fastmix.mix(x, lam, index), fastmix.soft_cross_entropy(x, target)
            out = torch.empty_like(x)
            assert fastmix.mix(x, lam, index, out=out) is out
            assert not any(t.requires_grad for t in results)
            same(results, expected)
            same(out, expected[0])
            assert results[0].is_inference() == (mode is torch.inference_mode)
    with torch.inference_mode():
        made, shares, weights = x.clone(), lam.clone(), target.weights.clone()
    for attempt in (
        lambda: fastmix.mix(made, lam, index),
        lambda: fastmix.mix(x, shares, index),
        lambda: fastmix.soft_cross_entropy(made, target),
        lambda: fastmix.soft_cross_entropy(x, SoftTarget(target.classes, weights)),
    ):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            attempt()
    same(fastmix.mix(made, shares, index).clone(), expected[0])


def test_fake_tensors(device):
    """Shapes, dtypes and layouts without values, forwards and backwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 3, 8, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
        lam = torch.empty(4, device=device, requires_grad=True)
        index = torch.empty(4, dtype=torch.int64, device=device)
        z = torch.empty(4, C, dtype=torch.float16, device=device, requires_grad=True)
        m = Mix(lam, index, box=torch.empty(4, 4, dtype=torch.int64, device=device))
        mixed, loss = m.apply(x), fastmix.soft_cross_entropy(z, m.target(index), reduction="none")
        dx, dlam, dz = torch.autograd.grad(mixed.square().sum() + loss.sum(), (x, lam, z))
        assert fastmix.mix(x.detach(), 0.5, index, out=torch.empty_like(x.detach())).shape == x.shape
        drawn, target = fastmix.CutMix()(x.detach(), index)
        accuracy = fastmix.mixed_accuracy(z, target)
    for t, like in ((mixed, x), (dx, x), (dlam, lam), (dz, z), (drawn, x)):
        assert (t.shape, t.dtype, t.stride(), t.device) == (like.shape, like.dtype, like.stride(), like.device)
    assert (loss.shape, loss.dtype, accuracy.shape, target.weights.shape) == ((4,), torch.float32, (), (4, 2))


class Plain(torch.Tensor):
    """A subclass that stays itself through torch's functions."""


class Wrapped(torch.Tensor):
    """A subclass whose values live elsewhere, as DTensor's do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, function(*unwrapped[0], **unwrapped[1]))


def test_subclasses_parameters_and_buffers(device):
    x, y, lam, index = batch(4, device, row=(C,))
    expected = plain_mix(x, lam, index), F.cross_entropy(x, y)
    for wrap in (nn.Parameter, nn.Buffer, lambda t: t.as_subclass(Plain)):
        results = fastmix.mix(wrap(x), wrap(lam), index), fastmix.soft_cross_entropy(wrap(x), y)
        same([t.detach().as_subclass(torch.Tensor) for t in results], list(expected))
    lam = nn.Parameter(lam)
    z = nn.Parameter(x)
    m = Mix(lam, index)
    fastmix.soft_cross_entropy(m.apply(z), m.target(y)).backward()
    plain = leaf(x), leaf(lam)
    plain_loss(plain_mix(*plain, index), *plain_pairs(y, plain[1], index)).backward()
    same((z.grad, lam.grad), (plain[0].grad, plain[1].grad))


def test_what_cannot_require_a_gradient(device):
    """Refused where a gradient would otherwise be missing without a word."""
    x, y, lam, index = batch(4, device, row=(C,))
    with pytest.raises(ValueError, match="weight: expected a constant, got a tensor that requires grad"):
        fastmix.soft_cross_entropy(x, y, weight=torch.ones(C, device=device, requires_grad=True))
    with pytest.raises(TypeError, match="index: expected an int64 tensor, got a float32"):
        fastmix.mix(x, lam, leaf(index.float()))
    with pytest.raises(TypeError, match="classes: expected an int64 tensor, got a float32"):
        SoftTarget(leaf(y.float())[:, None], lam[:, None])
    for leaves in ((leaf(x), lam), (x, leaf(lam))):
        with pytest.raises(ValueError, match="out: expected None where x, lam or out requires grad"):
            fastmix.mix(*leaves, index, out=torch.empty_like(x))


@pytest.mark.no_poison
def test_a_subclass_without_memory_is_mixed_or_refused(device):
    """The torch backend's operations are such a subclass's own; a kernel has nothing to read there, and must not try."""
    x, y, lam, index = batch(4, device, row=(C,))
    for op, expected in (
        (lambda t: fastmix.mix(t, lam, index), plain_mix(x, lam, index)),
        (lambda t: fastmix.soft_cross_entropy(t, y), F.cross_entropy(x, y)),
    ):
        if backend_name() == "torch":
            same(op(Wrapped(x)).inner, expected)
        else:
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                op(Wrapped(x))


def test_functional_call(device):
    """Parameters from outside, criterion and class weights too."""
    recipe = Recipe().to(device)
    x, y, lam, index = batch(6, device)
    parameters = {name: leaf(p) * 2 for name, p in recipe.named_parameters()}
    mixed, loss, _ = torch.func.functional_call(recipe, parameters, (x, y, lam, index))
    doubled = network(device)
    doubled.load_state_dict({name.removeprefix("model."): p.detach() for name, p in parameters.items()})
    same(loss, plain_step(doubled, x, y, lam, index))
    weights = torch.rand(C, device=device)
    criterion = fastmix.SoftCrossEntropyLoss(torch.ones(C, device=device))
    z = torch.randn(6, C, device=device)
    same(torch.func.functional_call(criterion, {"weight": weights}, (z, y)), F.cross_entropy(z, y, weights))


def test_copies_and_pickles(tmp_path, device):
    """Of a criterion, alone and inside a model, by copy, pickle and torch.save."""
    criterion = fastmix.SoftCrossEntropyLoss(torch.rand(C, device=device) + 0.1, 2, "sum", 0.1)
    z, y = torch.randn(6, C, device=device), torch.randint(0, C, (6,), device=device)
    expected = F.cross_entropy(z, y, criterion.weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    torch.save(nn.ModuleList([criterion]), tmp_path / "saved")
    for other in (
        copy.copy(criterion),
        copy.deepcopy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(tmp_path / "saved", weights_only=False)[0],
    ):
        same(other(z, y), expected)
        assert repr(other) == repr(criterion)
    deep = copy.deepcopy(criterion)
    deep.weight.zero_()
    same(criterion(z, y), expected)
    fresh = fastmix.SoftCrossEntropyLoss(torch.zeros(C, device=device), 2, "sum", 0.1)
    fresh.load_state_dict(criterion.state_dict())
    same(fresh(z, y), expected)
    same(fresh.to(torch.float64)(z.double(), y), expected.double())


# debug()


BAD = (
    (lambda x, lam: fastmix.mix(x, lam, torch.tensor([1, 0, 4, 2], device=x.device)), r"index: .* in \[0, 4\), got 4 in row 2"),
    (lambda x, lam: fastmix.mix(x, 0.5, torch.tensor([1, 0, -1, 2], device=x.device)), "index: .*got -1 in row 2"),
    (
        lambda x, lam: fastmix.soft_cross_entropy(x, torch.tensor([1, 0, 9, 2], device=x.device), reduction="none"),
        r"target: expected a class in \[0, 5\), got 9 in row 2",
    ),
    (
        lambda x, lam: fastmix.soft_cross_entropy(
            x,
            SoftTarget(torch.tensor([[1, 0], [-100, 2], [0, -7], [1, 1]], device=x.device), torch.stack((lam, lam), 1)),
            reduction="none",
        ),
        r"target: .*got -7 in row 2 \(at \[2, 1\]\)",
    ),
)


@pytest.fixture
def not_looked_at(device, monkeypatch):
    """Tensors that do not say that they are on the CPU: as on a GPU, nobody looks at them. (On a GPU nothing to do.)"""
    if device.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda t: False))
    return device


class TestDebug:
    def test_changes_nothing_on_the_cpu(self):
        x, y, lam, index = batch(4, row=(C,))
        for around in (contextlib.nullcontext, fastmix.debug):
            with around():
                for op, words in BAD:
                    with pytest.raises(ValueError, match=words):
                        op(x, lam)
                leaves = leaf(x), leaf(lam)
                results = step(nn.Identity(), leaves[0], y, leaves[1], index)
                same(results, plain_step(nn.Identity(), *leaves[:1], y, leaves[1], index))

    def test_names_the_row_on_another_device(self, not_looked_at):
        x, y, lam, index = batch(4, not_looked_at, row=(C,))
        for op, words in BAD:
            row = op(x, lam)
            assert row.reshape(4, -1).isnan().any(1).tolist() == [False, False, True, False]  # its row is NaN, no more
            with fastmix.debug():
                with fastmix.debug(), pytest.raises(ValueError, match=words):
                    op(x, lam)
                with pytest.raises(ValueError, match=words):
                    op(leaf(x), lam)
            op(x, lam)  # over with the block

    def test_leaves_what_is_right_alone(self, not_looked_at):
        x, y, lam, index = batch(4, not_looked_at, row=(C,))
        y[1] = -100
        out = []
        for around in (contextlib.nullcontext, fastmix.debug):
            leaves = leaf(x), leaf(lam)
            with around():
                m = Mix(leaves[1], index)
                loss = fastmix.soft_cross_entropy(m.apply(leaves[0]), m.target(y))
                out.append((loss, *torch.autograd.grad(loss, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))
        assert torch.isfinite(out[0][0])

    def test_writes_nothing_before_it_refuses(self, not_looked_at):
        x, _, lam, _ = batch(4, not_looked_at, row=(C,))
        out = torch.full_like(x, 7)
        with fastmix.debug(), pytest.raises(ValueError, match="index"):
            fastmix.mix(x, lam, torch.tensor([1, 0, 4, 2], device=not_looked_at), out=out)
        assert (out == 7).all()

    def test_environment(self, not_looked_at, monkeypatch):
        x, _, lam, _ = batch(4, not_looked_at, row=(C,))
        for value in ("", "0"):
            monkeypatch.setenv("FASTMIX_DEBUG", value)
            BAD[0][0](x, lam)
        monkeypatch.setenv("FASTMIX_DEBUG", "1")
        with pytest.raises(ValueError, match=BAD[0][1]):
            BAD[0][0](x, lam)

    def test_environment_of_a_process(self):
        code = """
import torch, fastmix
torch.Tensor.is_cpu = property(lambda t: False)
fastmix.mix(torch.zeros(2, 3), 0.5, torch.tensor([1, 2]))
"""
        environment = {**os.environ, "FASTMIX_BACKEND": "torch", "FASTMIX_DEBUG": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert "ValueError: index: expected a partner in [0, 2), got 2 in row 1" in ran.stderr
