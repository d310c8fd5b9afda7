"""The ops under torch.compile and torch.export: one program for every lambda, eager bits and layouts, what is refused."""

import contextlib
import functools
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from plain import (
    COMPILED,
    C,
    Recipe,
    backend_name,
    batch,
    compiled,
    leaf,
    network,
    plain_loss,
    plain_mix,
    plain_pairs,
    plain_step,
    step,
)
from torch import nn
from torch.testing import assert_close as same

import fastmix
from fastmix import Mix, MixedRows, SoftTarget

# what runs on formulas alone, or is refused before a backend is asked
FORMULAS = pytest.mark.parametrize("device", ["torch", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)

NO_CPP_COMPILER = "needs a C++ compiler"
ROWS = torch.rand(6, C)
HOT = SoftTarget(torch.randint(0, C, (6, 2)), torch.rand(6, 2))
LABELS, INDEX = torch.arange(6) % C, torch.arange(6).flip(0)
MIXED = MixedRows(ROWS, torch.rand(6), INDEX)
NUMBERS = {  # a loss of (logits, the number that changes)
    "smoothing": lambda z, v: fastmix.soft_cross_entropy(z, HOT, label_smoothing=v),
    "smoothing of the target": lambda z, v: fastmix.soft_cross_entropy(
        z, SoftTarget(HOT.classes, HOT.weights, label_smoothing=v)
    ),
    "smoothing, dense": lambda z, v: fastmix.soft_cross_entropy(z, ROWS, label_smoothing=v),
    "smoothing, mixed rows": lambda z, v: fastmix.soft_cross_entropy(z, MIXED, label_smoothing=v),
    "smoothing of F.cross_entropy": lambda z, v: F.cross_entropy(z, HOT, label_smoothing=v),
    "threshold": lambda z, v: fastmix.soft_binary_cross_entropy(z, HOT, threshold=v),
    "threshold, mixed rows": lambda z, v: fastmix.soft_binary_cross_entropy(z, MIXED, threshold=v, label_smoothing=v / 2),
    "positive weight": lambda z, v: fastmix.soft_binary_cross_entropy(z, ROWS, pos_weight=v),
    "scale": lambda z, v: fastmix.js_divergence((z, z + 1, 2 * z), scale=v),
    "lambda": lambda z, v: fastmix.mix(z, v, INDEX).square().sum(),
    "lambda of a target": lambda z, v: fastmix.soft_cross_entropy(z, Mix(v, INDEX).target(LABELS)),
}
IN_CPP = "smoothing", "threshold, mixed rows", "scale", "lambda"  # one of each op and argument


@pytest.mark.no_poison
@pytest.mark.trap("schedules-under-compile")
@pytest.mark.parametrize(
    ("compiler", "name"),
    [
        *(pytest.param("aot_eager", name, marks=[pytest.mark.slow] * (n > 0)) for n, name in enumerate(NUMBERS)),
        *(pytest.param("inductor", name, marks=pytest.mark.slow) for name in IN_CPP),
    ],
)
def test_a_number_that_changes_costs_one_more_program(name, compiler):
    """A schedule of a Python float in a compiled step: torch.compile makes a symbol of it at its second value, and that is all."""
    if compiler == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip(NO_CPP_COMPILER)
    z = torch.randn(6, C, requires_grad=True)
    with fastmix.backend("torch"):
        fast, programs = compiled(NUMBERS[name], compiler)
        for v in (0.1, 0.2, 0.3, 0.15, 0.25, 0.35, 0.4, 0.45, 0.5, 0.55):
            expected, loss = NUMBERS[name](z, v), fast(z, v)
            same(loss, expected)
            same(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
    assert programs.frame_count == 2


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize(("compiler", "dynamic"), [("eager", True), ("aot_eager", None)])
def test_a_training_step_compiles_once(compiler, dynamic, device):
    """Steps of another lambda each, more than torch would compile programs for, and a smaller last batch, which may cost one more
    program unless sizes are dynamic."""
    model = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast, programs = compiled(functools.partial(step, model), compiler, dynamic=dynamic)
    counts = []
    for n in [6] * 9 + [5]:
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
    assert counts[:9] == [1] * 9
    assert counts[9] <= (1 if dynamic else 2)


@pytest.mark.slow_interpreted
@pytest.mark.native
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.native
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow_interpreted
@pytest.mark.native
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


@pytest.mark.slow_interpreted
@pytest.mark.native
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


@FORMULAS
@pytest.mark.slow
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


@FORMULAS
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
