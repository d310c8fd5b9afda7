"""Mistakes that other libraries made, each held by a test that bears its marker: `@pytest.mark.trap("kornia#4649")`.

TRAPS lists the mistakes, by thread where there is one; `pytest -m trap --collect-only` lists the tests. NOT_BUILT are mistakes that
wait for a part of the library that is not there yet. What no other file tests is tested below.
"""

import ast
import contextlib
import functools
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NO_TRITON, TRITON
from numerics import RELATIVE, accumulator, assert_close, numpy, target_of
from plain import interpreted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmix
from fastmix import CutMix, Mix, MixedRows, Mixup, RandomMix, SoftTarget, reference

ROOT = pathlib.Path(__file__).parent.parent


# The id that a marker names, and the mistake. Two mistakes of one thread have two ids.
TRAPS = {
    # mixing
    "BirdSet#259": "mixing more than two rows",
    "pytorch-image-models#50": "the batch overwritten while it is read: black rows at lambda 0",
    "CutMix-PyTorch#1": "lambda of CutMix not corrected where the border cuts the box",
    "kornia#3077": "lambda inverted: the label of the box goes to the image around it",
    "pytorch-image-models#8": "no way to keep the lambda that was drawn",
    "kornia#4649": "the probability applied twice: rows mixed at p^2",
    "kornia#4657": "labels cast to the image's dtype: class 257 becomes 256",
    "lambda-in-the-batch-dtype": "lambda in the image's dtype: rounded in bfloat16, 0 in uint8",
    "VMT#1": "another permutation for the labels than for the images",
    "tsai#791": "labels never mixed",
    "cleverhans#700": "a lambda per row spread along the wrong axis",
    "square-root-of-intervals": "the square root of 2-D boxes used for 1-D intervals",
    "pytorch-image-models#1304": "odd and last batches refused, batches of one",
    "CutMix-PyTorch#4": "one lambda for the whole batch only (also big_vision#90)",
    "loop-over-rows": "a Python loop over rows",
    "vision#7027": "NumPy's global generator, and no other",
    # sampling
    "pytorch#15738": "Beta at a small alpha: 0/0, and an exact 0 in float32",
    "pytorch#10118": "draws for one row (a trailing size of 1) are not random",
    "sample-dirichlet": "draws that a device lacks (_sample_dirichlet)",
    "pytorch#149406": "a new program for every lambda under torch.compile (also pytorch#171320)",
    "LoongForge#49": "random numbers captured in a CUDA graph drift",
    # losses
    "Liger-Kernel#1251": "overwritten logits unnoticed: a kernel's stores bump no version (also Liger-Kernel#262)",
    "unsloth#5002": "saved logits overwritten under a second loss",
    "Liger-Kernel#1298": "every row scaled by the upstream gradient of row 0 (also Liger-Kernel#421, Liger-Kernel#968)",
    "TransformerEngine#3193": "gradients summed in a low precision buffer",
    "Liger-Kernel#507": "an output that is not asked for aliased to one that is",
    "flash-linear-attention#1080": "32-bit offsets past 2^31 elements",
    "pytorch#69339": "class weights, smoothing and a negative ignored class: a read out of bounds",
    "Liger-Kernel#198": "smoothing applied to ignored rows",
    "vision#9222": "ignored classes refused for floating targets",
    "pytorch#63004": "an ignored class inside the range: in the softmax or out of it?",
    "composer#1407": "two losses interpolated where the loss is not linear in the target",
    "deit#91": "only CutMix configured, so the loss for hard labels was chosen",
    "Liger-Kernel#323": "slower than plain torch on small work: launches",
    "Open-Sora#850": "not importable without Triton (also Liger-Kernel#670)",
    # metrics
    "mixup-cifar10#8": "a float lambda times an integer tensor: 0 % accuracy",
    # what people ask for
    "composer#825": "a dense target made of class indices (also composer#1407)",
    "composer#825-options": "K-hot targets without smoothing, weights, ignored classes or reduction='none'",
    "vision#9215": "no segmentation maps under mixup and CutMix (also pytorch-image-models#1489)",
    "vision#8693": "parameters that cannot be replayed on several tensors of a batch",
    "MAE-pytorch#99": "no regression targets",
    # stand-ins for other libraries
    "kornia#4649-wrapper": "a wrapper that applies the probability once more; odd batches refused (pytorch-image-models#1304)",
    "mixup-off-epoch": "a flag that is set in the parent and does not reach workers that persist",
    # what only a GPU shows
    "grid-axis-65535": "rows on a grid axis that ends at 65,535",
    "current-device": "a launch on the current device instead of the tensors'",
    "modes-in-autograd-thread": "backend and debug mode of a backward looked up in autograd's thread",
    "rank-decides-in-silence": "label maps with a channel, or one-hot: the image is cut, the labels are not (MONAI's layout)",
    "attributes-past-the-constructor": "an attribute set to nonsense, and drawn as something",
    "schedules-under-compile": "a number of a schedule compiled anew at each value, until torch.compile gives up",
    "last-batch-recompiles": "the last batch of every epoch recompiles",
    "compilation-in-capture": "compilation inside a graph capture",
    "reads-outside-storage": "a kernel reads outside a tensor's memory, and the interpreter reports no error",
    "lazily-negated-view": "a lazily negated view (x.conj().imag) read as it is stored",
    "two-writers": "two programs that write to the same place",
    # found in prototypes
    "float16-underflow": "a float16 gradient formed before GradScaler's factor arrives",
    "scaled-in-place": "a gradient scaled in place once for every backward",
    "unaligned-rows": "rows that start unaligned, and the last partial vector of a tensor",
    "float32-kolmogorov-smirnov": "a Kolmogorov-Smirnov test of float32 lambdas",
    "no-tangent": "forward-mode derivatives through a kernel: no tangent",
    "data-parallel": "nn.DataParallel copies a target whole",
    "first-call-compiles": "first-call compile time, compilation inside a graph capture",
    # inside models, and against an adversary
    "ManifoldMixup#1": "a hook that returns nothing: features unmixed, targets mixed",
    "batch-norm-recomputed": "recomputing at the kept lambda under batch norm: 6 % off",
    "AMP-reweighting": "a batch without two positive increases turned into NaN by its reweighting (AMP, code)",
    "composer#1407-sigmoid": "losses interpolated that are not linear: sigmoid losses with a threshold",
}


# Public name that the mistake waits for (None: an internal change), and what its test will have to show.
NOT_BUILT = {
    "a weight gradient accumulated in bfloat16 (ml-cross-entropy#14)": (
        "linear_soft_cross_entropy",
        "within one unit in the last place of the float64 gradient, over many chunks",
    ),
    "rows of variable length: lambda from what really overlaps (ast#39)": (
        None,
        "the target's share counts frames that are there, not padding",
    ),
    "chains and windows written by several programs: stores of 16 bytes that race": (
        None,
        "test_no_access_leaves_its_memory_and_no_element_is_written_twice on their shapes",
    ),
}


def marked(path):
    """[(test of the file, ids that its trap markers name)], read from the source: nothing is imported or run."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "pytest.mark.trap"]
            found.append((node.name, [ast.literal_eval(argument) for call in calls for argument in call.args]))
    return found


class TestTable:
    def test_every_trap_is_held_and_no_marker_names_another(self):
        held = {}
        for path in sorted((ROOT / "tests").glob("*.py")):
            for name, ids in marked(path):
                assert not ids or name.startswith("test_"), f"{path.name}: {name} is no test"
                for trap in ids:
                    held.setdefault(trap, []).append(f"{path.name}::{name}")
        assert {trap: tests for trap, tests in held.items() if trap not in TRAPS} == {}, "not in TRAPS"
        assert [trap for trap in TRAPS if trap not in held] == [], "held by no test"

    def test_every_test_of_this_file_holds_one(self):
        own = {name: ids for name, ids in marked(pathlib.Path(__file__)) if name.startswith("test_")}
        in_the_table = {name for name in vars(TestTable) if name.startswith("test_")}
        assert {name for name, ids in own.items() if not ids} == in_the_table

    @pytest.mark.parametrize("title", NOT_BUILT)
    def test_what_waits_has_not_been_built(self, title):
        """Whoever builds it writes the test, and moves the mistake to TRAPS."""
        name, aim = NOT_BUILT[title]
        assert aim
        if name is not None:
            built = hasattr(fastmix, name) or importlib.util.find_spec(f"fastmix.{name}") is not None
            assert not built, f"{name} is there now: its test is to show {aim}"


# Mixing and its targets


@pytest.mark.slow_interpreted
@pytest.mark.trap("CutMix-PyTorch#1", "kornia#3077", "VMT#1", "tsai#791", "cleverhans#700")
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_target_is_the_share_of_each_class_in_the_image(dims, device):
    """Images that show their class: every plane c of image n is 1 if c is its class, else 0. After mixing, the mean of plane c
    is the weight of class c. As many rows as classes and pixels a side, so that no wrong axis goes unnoticed."""
    N = 6
    y = torch.tensor([2, 0, 5, 2, 1, 3], device=device)
    x = F.one_hot(y, N).float().view(N, N, *[1] * dims).expand(N, N, *[N] * dims)
    samplers = [
        kind(1.0, per=per, partner=partner, prob=0.8, seed=n)
        for kind, (n, (per, partner)) in itertools.product(
            (Mixup, CutMix),
            enumerate(itertools.product(("row", "pair", "batch"), ("any", "same", "different", "flip", "roll"))),
        )
    ]
    samplers += [
        RandomMix(Mixup(1.0), CutMix(1.0), Mixup(1.0, prob=0.5, per="pair"), per=per, seed=0) for per in ("row", "batch")
    ]
    if interpreted(device):  # each kind, per and partner once at least
        samplers = samplers[dims - 1 :: 4] + samplers[-2:]
    mixed_rows = 0
    for sampler in samplers:
        mixed, target = sampler(x, y)
        torch.testing.assert_close(mixed.flatten(2).mean(2), target.dense(N), atol=1e-6, rtol=0)
        mixed_rows += (target.dense(N).amax(1) < 1).sum()
    assert mixed_rows > N * len(samplers) / 3


@pytest.mark.trap("lambda-in-the-batch-dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_lambda_is_drawn_in_float32_whatever_the_batch_holds(dtype):
    y = torch.arange(64) % 5
    for sampler in (Mixup(0.4, seed=1), CutMix(seed=1)):
        x = torch.zeros(64, 3, 32, 32)
        state = sampler.state_dict()
        wide = sampler.sample(x).target(y)
        sampler = type(sampler)(0.4 if isinstance(sampler, Mixup) else 1.0, seed=1)
        sampler.load_state_dict(state)
        narrow = sampler.sample(x.to(dtype)).target(y)
        assert narrow.weights.dtype == torch.float32
        assert torch.equal(narrow.weights, wide.weights)
        assert len(narrow.weights.unique()) > 60


@pytest.mark.trap("pytorch-image-models#1304")
@pytest.mark.slow_interpreted
def test_batches_of_any_size_train(device):
    for N, sampler in itertools.product((0, 1, 2, 3, 5), (Mixup(0.4), CutMix(), Mixup(0.4, per="pair"), CutMix(per="batch"))):
        x = torch.randn(N, 2, 5, 5, device=device)
        w = torch.randn(50, 4, device=device, requires_grad=True)
        mixed, target = sampler(x, torch.arange(N, device=device) % 4)
        loss = fastmix.soft_cross_entropy(mixed.flatten(1) @ w, target, reduction="sum")
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(w.grad).all()
        assert (w.grad != 0).any() == (N > 0)


@pytest.mark.trap("CutMix-PyTorch#4")
def test_every_row_draws_for_itself():
    x = torch.empty(64, 1, 64, 64)
    for per, groups in (("row", 64), ("pair", 32), ("batch", 1)):
        assert len(Mixup(1.0, per=per, seed=0).sample(x).lam.unique()) == groups
        assert groups // 2 < len(CutMix(1.0, per=per, seed=0).sample(x).box.unique(dim=0)) <= groups


@pytest.mark.trap("vision#7027")
def test_global_generators_are_left_alone():
    x, y = torch.randn(8, 1, 16, 16), torch.arange(8) % 3
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    samplers = [kind(1.0, partner=p) for kind, p in itertools.product((Mixup, CutMix), ("any", "same", "different"))]
    for sampler in (*samplers, RandomMix(*samplers)):
        mixed, target = sampler(x, y, generator=torch.Generator().manual_seed(3))
        again, same = sampler(x, y, generator=torch.Generator().manual_seed(3))
        assert torch.equal(mixed, again)
        assert torch.equal(target.weights, same.weights)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    Mixup(1.0)(x, y)  # torch's generator, where none is given
    assert not torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))


@pytest.mark.trap("MAE-pytorch#99")
def test_regression_targets_are_mixed_as_the_batch_is(device):
    """A label that is a function of the image stays that function of the mixed image, if it is linear."""
    x, w = torch.randn(6, 3, 4, device=device), torch.randn(12, 2, device=device)
    m = Mix(torch.rand(6, device=device), torch.tensor([1, 2, 2, 0, 5, 4], device=device))
    for y in (x.flatten(1) @ w, x.flatten(1) @ w[:, 0]):
        target = m.target(y)
        assert isinstance(target, MixedRows)
        torch.testing.assert_close(target.dense(), m.apply(x).flatten(1) @ (w if y.dim() == 2 else w[:, 0]))


# Sampling


@pytest.mark.trap("pytorch#10118")
def test_a_batch_of_one_draws_too():
    for sampler in (Mixup(1.0, seed=0), Mixup(1.0, per="pair", seed=0), Mixup((1.0, 1.0), per="batch", seed=0)):
        lam = torch.stack([sampler.sample(torch.empty(1, 1)).lam for _ in range(400)])
        assert lam.shape == (400, 1)
        assert abs(lam.mean() - 0.5) < 0.06  # four standard errors of a uniform draw
        assert abs(lam.var() - 1 / 12) < 0.02


@pytest.mark.trap("sample-dirichlet")
def test_draws_need_what_every_device_has():
    """No torch.distributions (whose Beta takes no generator) and no _sample_dirichlet, long missing on MPS: one call of a
    generator, or none."""
    source = (ROOT / "fastmix" / "sampling" / "draws.py").read_text()
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert "randint" in names
    assert names.isdisjoint({"distributions", "_standard_gamma", "_sample_dirichlet", "random"})


@pytest.mark.trap("pytorch#149406")
@pytest.mark.no_poison
def test_a_new_lambda_compiles_nothing():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, z, lam, index, y):
        m = Mix(lam, index)
        return m.apply(x).sum() + fastmix.soft_cross_entropy(z, m.target(y))

    compiled = torch.compile(step, backend=count, fullgraph=True)
    x, z, index, y = torch.randn(4, 6), torch.randn(4, 3), torch.tensor([1, 0, 3, 2]), torch.tensor([0, 1, 2, 0])
    for lam in (*torch.rand(5), torch.tensor(0.0), torch.tensor(1.0)):
        torch.testing.assert_close(compiled(x, z, lam, index, y), step(x, z, lam, index, y))
    assert len(graphs) == 1


@pytest.mark.trap("LoongForge#49")
def test_parameters_are_read_when_they_are_applied(device):
    """What is written into a Mix's tensors later counts, as when a captured graph is replayed."""
    x, y = torch.randn(4, 3, 6, 6, device=device), torch.arange(4, device=device)
    lam, index = torch.rand(4, device=device), torch.tensor([1, 0, 3, 2], device=device)
    box = torch.tensor([[0, 0, 2, 2]] * 4, device=device)
    m = Mix(lam, index, box=box)
    m.apply(x)
    lam.fill_(0.25)
    index.copy_(index.roll(1))
    box.add_(3)
    assert torch.equal(m.apply(x), fastmix.mix(x, 0.25, index, box=torch.tensor([[3, 3, 5, 5]] * 4, device=device)))
    torch.testing.assert_close(m.target(y).weights[:, 0], torch.full((4,), 0.25 * (1 - 4 / 36), device=device))
    assert torch.equal(m.target(y).classes[:, 1], y[index])


# Losses


def loss_and_gradients(z, target, leaf, upstream=None, **options):
    """(loss, gradient to the logits, gradient to the target's leaf or None)"""
    z = z.detach().requires_grad_()
    loss = fastmix.soft_cross_entropy(z, target, **options)
    wanted = [z] if leaf is None else [z, leaf]
    return loss.detach(), *torch.autograd.grad(loss, wanted, torch.ones_like(loss) if upstream is None else upstream)


@pytest.mark.trap("TransformerEngine#3193")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_of_a_popular_partner_are_summed_in_float32(dtype, device):
    """Every row has the same partner, whose gradient is a sum of as many terms: one rounding, not sixty."""
    N = 60
    x, g = torch.randn(N, 33).to(dtype).to(device).requires_grad_(), torch.rand(N, 33).to(dtype).to(device)
    lam, index = torch.rand(N, device=device), torch.full((N,), 7, device=device)
    fastmix.mix(x, lam, index).backward(g)
    dx = reference.mix_grad(numpy(g), numpy(x), numpy(lam), numpy(index))[0]
    assert_close(x.grad, dx, dtype, np.abs(numpy(g)).sum(axis=0))


@pytest.mark.trap("Liger-Kernel#507")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_results_do_not_depend_on_what_else_is_asked_for(reduction, device):
    """An argument that stands in for an output nobody wants may be any tensor of the launch: it must not be written."""
    z = torch.randn(5, 7, device=device)
    for kind in ("k-hot", "dense"):
        target, _, leaf = target_of(kind, z.shape, device=device)
        losses, found = [], {"z": [], "leaf": []}
        for z_wanted, leaf_wanted in itertools.product((False, True), repeat=2):
            logits, t = z.clone().requires_grad_(z_wanted), leaf.detach().clone().requires_grad_(leaf_wanted)
            loss = fastmix.soft_cross_entropy(
                logits, SoftTarget(target.classes, t) if kind == "k-hot" else t, reduction=reduction
            )
            losses.append(loss.detach())
            if loss.requires_grad:
                loss.sum().backward()
            found["z"] += [logits.grad] if z_wanted else []
            found["leaf"] += [t.grad] if leaf_wanted else []
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        assert all(torch.equal(*gradients) for gradients in found.values())

    x, lam, index = torch.randn(4, 9, device=device), torch.rand(4, device=device), torch.tensor([1, 1, 3, 0], device=device)
    box = torch.tensor([[0, 4]] * 4, device=device)
    found = {"x": [], "lam": []}
    for x_wanted, lam_wanted in ((False, True), (True, False), (True, True)):
        own, share = x.clone().requires_grad_(x_wanted), lam.clone().requires_grad_(lam_wanted)
        fastmix.mix(own, share, index, box=box).square().sum().backward()
        found["x"] += [own.grad] if x_wanted else []
        found["lam"] += [share.grad] if lam_wanted else []
    assert all(torch.equal(*gradients) for gradients in found.values())


@pytest.mark.trap("pytorch#69339", "Liger-Kernel#198", "composer#825-options")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255])
def test_weights_smoothing_and_ignored_classes_at_once(ignore_index, reduction, device):
    N, C = 9, 5
    weight = torch.rand(C, dtype=torch.float64, device=device) + 0.1
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": 0.2, "reduction": reduction}
    z = torch.randn(N, C, dtype=torch.float64, device=device)
    y = torch.randint(0, C, (N,), device=device)
    y[2:4] = ignore_index
    ours = fastmix.soft_cross_entropy(z.requires_grad_(), y, **options)
    torchs = F.cross_entropy(z, y, **options)
    torch.testing.assert_close(ours, torchs)
    g = torch.rand_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, z, g), torch.autograd.grad(torchs, z, g))

    classes = torch.randint(0, C, (N, 3), device=device)
    classes[1:3, 1], classes[3] = ignore_index, ignore_index
    weights = torch.rand(N, 3, dtype=torch.float64, device=device, requires_grad=True)
    loss, dz, dweights = loss_and_gradients(z, SoftTarget(classes, weights), weights, g, **options)
    oracle = {**options, "weight": numpy(weight)}
    pair = numpy(classes), numpy(weights)
    np.testing.assert_allclose(numpy(loss), reference.soft_cross_entropy(numpy(z), pair, **oracle), rtol=1e-12)
    expected = reference.soft_cross_entropy_grad(numpy(z), pair, numpy(g), **oracle)
    np.testing.assert_allclose(numpy(dz), expected[0], atol=1e-13)
    np.testing.assert_allclose(numpy(dweights), expected[1], atol=1e-13)
    assert (dz[3] == 0).all()
    assert (dweights[classes == ignore_index] == 0).all()


@pytest.mark.trap("pytorch#63004")
def test_an_ignored_class_stays_in_the_softmax(device):
    """ignore_index leaves out what a row says of that class. Its logit still takes part: the row's other classes push it
    down, and the loss is not the one over the remaining classes."""
    z = torch.tensor([[1.0, 2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64, device=device)
    y = torch.tensor([0, 1], device=device)
    target = SoftTarget(torch.tensor([[0, 1], [2, 1]], device=device), torch.full((2, 2), 0.5, device=device))
    loss, dz = loss_and_gradients(z, y, None, ignore_index=1, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(z, y, ignore_index=1, reduction="none"))
    torch.testing.assert_close(dz[0], z[0].softmax(0) - torch.eye(3, dtype=torch.float64, device=device)[0])
    assert (dz[1] == 0).all()
    loss, dz = loss_and_gradients(z, target, None, ignore_index=1, reduction="none")
    torch.testing.assert_close(loss, -0.5 * z.log_softmax(1)[[0, 1], [0, 2]])
    torch.testing.assert_close(dz[:, 1], 0.5 * z.softmax(1)[:, 1])


@pytest.mark.trap("composer#1407")
def test_a_mean_is_over_the_mixed_target_and_not_interpolated(device):
    """With class weights a mean divides by what its own targets weigh: interpolating two means gives another number."""
    z = torch.randn(4, 3, dtype=torch.float64, device=device)
    w = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64, device=device)
    y, index = torch.tensor([0, 0, 1, 2], device=device), torch.tensor([3, 3, 3, 2], device=device)
    lam = torch.tensor(0.25, dtype=torch.float64, device=device)
    ours = fastmix.soft_cross_entropy(z, Mix(lam, index).target(y), weight=w)
    own, other = (F.cross_entropy(z, labels, weight=w, reduction="none") for labels in (y, y[index]))
    mass = (lam * w[y] + (1 - lam) * w[y[index]]).sum()
    torch.testing.assert_close(ours, (lam * own + (1 - lam) * other).sum() / mass)
    interpolated = lam * F.cross_entropy(z, y, weight=w) + (1 - lam) * F.cross_entropy(z, y[index], weight=w)
    assert abs(ours - interpolated) > 0.01


@pytest.mark.slow_interpreted
@pytest.mark.trap("unaligned-rows")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_that_start_unaligned(dtype, device):
    """Rows of an odd number of classes share 16-byte words with their neighbours, and the tensor's last word is a partial one:
    every element of loss and gradient, with an upstream gradient other than 1."""
    wide = [(3, 21841)] if dtype == torch.bfloat16 or not interpreted(device) else []
    for shape in ((5, 1023), *wide):
        z = (2 * torch.randn(shape)).to(dtype).to(device)
        for kind in ("k-hot", "dense"):
            target, oracle_target, _ = target_of(kind, shape, device=device)
            if kind == "k-hot":
                target.classes[-1, -1] = shape[1] - 1
                oracle_target = numpy(target.classes), oracle_target[1]
            upstream = torch.rand(shape[0], device=device) + 0.5
            loss, dz = loss_and_gradients(z, target, None, upstream, reduction="none")
            expected = reference.soft_cross_entropy(numpy(z), oracle_target, reduction="none")
            np.testing.assert_allclose(numpy(loss), expected, rtol=RELATIVE[torch.float32])
            expected = reference.soft_cross_entropy_grad(numpy(z), oracle_target, numpy(upstream), reduction="none")[0]
            assert_close(dz, expected, dtype, np.abs(expected).sum(axis=1, keepdims=True))


@pytest.mark.trap("flash-linear-attention#1080")
def test_gradients_of_rows_far_apart(device, much_memory):
    """Row strides times indices beyond 32 bits in backward passes and dense targets, without touching the memory between."""

    def apart(*rows):
        storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)
        t = torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, (2, 16), (2**31 + 16, 1))
        t[0], t[1] = rows
        return t

    x = torch.zeros(2, 16, dtype=torch.float16, device=device, requires_grad=True)
    lam = torch.tensor([0.5, 0.25], device=device, requires_grad=True)
    fastmix.mix(x, lam, torch.tensor([1, 0], device=device)).backward(apart(4, 8))
    assert x.grad.tolist() == [[0.5 * 4 + 0.75 * 8] * 16, [0.25 * 8 + 0.5 * 4] * 16]
    far = apart(1, 3).requires_grad_()
    out = fastmix.mix(far, lam, torch.tensor([1, 0], device=device))
    assert torch.autograd.grad(out, lam, torch.ones_like(out))[0].tolist() == [-32.0, 32.0]
    dense = apart(0.5, 0.25)
    loss = fastmix.soft_cross_entropy(x, dense, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([8.0, 4.0], device=device) * np.log(16))


@pytest.mark.trap("no-tangent")
def test_forward_mode_goes_through_the_loss(device):
    """A kernel has no forward-mode derivative: the tangent would be missing, silently."""
    z = torch.randn(4, 6, dtype=torch.float64, device=device)
    for kind, reduction in itertools.product(("k-hot", "indices", "dense"), ("mean", "none")):
        target, _, leaf = target_of(kind, z.shape, weights_dtype=torch.float64, device=device)
        leaf = None if leaf is None else leaf.detach()

        def op(z, leaf, target=target, kind=kind, reduction=reduction):
            t = SoftTarget(target.classes, leaf) if kind == "k-hot" else target if leaf is None else leaf
            return fastmix.soft_cross_entropy(z, t, label_smoothing=0.1, reduction=reduction)

        directions = torch.randn_like(z), None if leaf is None else torch.randn_like(leaf)
        with torch.autograd.forward_ad.dual_level():
            duals = [
                t if t is None else torch.autograd.forward_ad.make_dual(t, d)
                for t, d in zip((z, leaf), directions, strict=True)
            ]
            tangent = torch.autograd.forward_ad.unpack_dual(op(*duals)).tangent
        step = 1e-6
        ends = [op(*(t if t is None else t + s * d for t, d in zip((z, leaf), directions, strict=True))) for s in (step, -step)]
        torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * step), atol=1e-7, rtol=1e-6)


@pytest.mark.trap("modes-in-autograd-thread")
def test_a_backward_asks_for_no_mode(device, monkeypatch):
    """It may run in a thread of autograd's, which does not see the caller's `backend(...)` and `debug()`."""
    x, lam = torch.randn(4, 6, device=device, requires_grad=True), torch.rand(4, device=device, requires_grad=True)
    m, y = Mix(lam, torch.tensor([1, 1, 3, 2], device=device)), torch.arange(4, device=device)
    losses = []
    for debug in (contextlib.nullcontext, fastmix.debug):
        with debug():
            mixed = m.apply(x)
            losses += [fastmix.soft_cross_entropy(mixed, target) for target in (m.target(y), y, mixed.softmax(1))]

    def asked(*args):
        raise AssertionError("asked in a backward")

    for module, name in itertools.product(
        (fastmix._check, fastmix._backend), ("debugging", "readable", "in_range", "of", "name")
    ):
        monkeypatch.setattr(module, name, asked, raising=False)
    halves = [torch.autograd.grad(sum(losses[n : n + 3]), (x, lam)) for n in (0, 3)]
    assert all(torch.equal(a, b) for a, b in zip(*halves, strict=True))


@pytest.mark.trap("data-parallel")
def test_data_parallel_is_advised_against_and_fails_loudly():
    """nn.DataParallel splits tensors and copies other objects whole: the docstring says so, and the loss notices."""
    assert "DataParallel" in SoftTarget.__doc__
    assert "DistributedDataParallel" in SoftTarget.__doc__
    target = SoftTarget(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"target.classes: expected shape \[2, .*\], got .*\[4, 2\]"):
        fastmix.soft_cross_entropy(torch.randn(4, 3)[:2], target)
    with pytest.raises(ValueError, match=r"target.values: expected .*\[2, 3\], got .*\[4, 3\]"):
        fastmix.soft_cross_entropy(torch.randn(2, 3), MixedRows(torch.rand(4, 3), 0.5, torch.arange(4)))


# Launches


@pytest.fixture
def launches(monkeypatch):
    """Ops reach the kernels' launchers on any device, and what they would launch is listed instead: (kernel, grid)."""
    if not TRITON:
        pytest.skip(NO_TRITON)
    from fastmix.kernels import _loss_mean, _row_layout, api, dense_cross_entropy, mix, soft_cross_entropy

    listed = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: listed.append((self.name, grid))

    for module in (_loss_mean, _row_layout, dense_cross_entropy, mix, soft_cross_entropy):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(name))
    monkeypatch.setattr(fastmix._backend, "of", lambda tensor: api)
    return listed


def steps(N, C, device):
    """Everything that launches, to be called: forward and backward of every op, with boxes, pixels, smoothing and weights."""
    options = {"device": device, "requires_grad": True}
    index, lam, x = (
        torch.zeros(N, dtype=torch.int64, device=device),
        torch.zeros(N, **options),
        torch.zeros(N, 3, 8, 8, **options),
    )

    def mixing(box):
        fastmix.mix(x, lam, index, box=box).sum().backward()

    def loss(z, target, reduction):
        weight = torch.ones(C, device=device)
        fastmix.soft_cross_entropy(z, target, weight=weight, label_smoothing=0.1, reduction=reduction).sum().backward()

    for box in (None, torch.zeros(N, 4, dtype=torch.int64, device=device)):
        yield functools.partial(mixing, box)
    for shape, reduction in itertools.product(((N, C), (N, C, 2, 3)), ("mean", "none")):
        z, dense = torch.zeros(shape, **options), torch.zeros(shape, **options)
        classes, labels = (torch.zeros(N, *k, *shape[2:], dtype=torch.int64, device=device) for k in ((2,), ()))
        for target in (SoftTarget(classes, torch.ones(N, 2, **options)), labels, dense):
            yield functools.partial(loss, z, target, reduction)


@pytest.mark.trap("loop-over-rows", "Liger-Kernel#323")
def test_launches_do_not_grow_with_the_batch(launches):
    """One kernel forward and one backward, whatever every row asks for; a mean of class targets sums its divisor first, mixing counts
    who is whose partner, and a dense target has a gradient of its own."""
    counted = {}
    for N in (1, 7, 300):
        counted[N] = []
        for step in steps(N, 10, "meta"):
            launches.clear()
            step()
            counted[N].append([name for name, _ in launches])
    assert counted[1] == counted[7] == counted[300]
    assert counted[1][0] == ["_mix_fwd_kernel", "_inverse_index_kernel", "_mix_bwd_kernel"]
    assert max(map(len, counted[1])) <= 3


@pytest.mark.trap("grid-axis-65535")
def test_grids_have_one_axis(launches):
    """Axes 1 and 2 end at 65,535 programs; axis 0 at 2^31 - 1."""
    for step in steps(70000, 4096, "meta"):
        step()
    grids = [grid for _, grid in launches]
    assert all(len(grid) == 1 for grid in grids)
    assert all(0 < grid[0] < 2**31 for grid in grids)
    assert sum(grid[0] > 65535 for grid in grids) > len(grids) / 2


@pytest.mark.trap("composer#825")
def test_no_dense_target_is_made(launches):
    """Beside the logits, only their gradient is as large as they are, and nothing is without a gradient."""

    class Made(TorchDispatchMode):
        def __init__(self, least):
            super().__init__()
            self.least, self.storages = least, set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= self.least:
                    self.storages.add(t.untyped_storage().data_ptr())
            return out

    y, index = torch.arange(50), torch.arange(50).flip(0)
    for needs_gradient, reduction, inner in itertools.product((False, True), ("mean", "none"), ((), (3, 3))):
        z = torch.randn(50, 400, *inner, requires_grad=needs_gradient)
        labels = y.view(50, *[1] * len(inner)).expand(50, *inner)
        made = Made(50 * 400)  # bytes: a dense target of single bytes would be noticed
        with made:
            target = Mix(torch.rand(50), index).target(labels)
            assert isinstance(target, SoftTarget)
            options = {"weight": torch.rand(400), "label_smoothing": 0.1, "ignore_index": 3, "reduction": reduction}
            loss = fastmix.soft_cross_entropy(z, target, **options)
            if needs_gradient:
                loss.sum().backward()
        made.storages.discard(z.untyped_storage().data_ptr())
        assert len(made.storages) == needs_gradient


COMPILATIONS = """
import functools, itertools, json, sys
import torch, fastmix
from fastmix import SoftTarget
from fastmix.bench import programs as launchers

sys.path.insert(0, "tests")
from launched import programs

{steps}
fastmix._backend.of = lambda tensor: launchers.api()
found = {{}}
for N in (64, 63, 17, 2, 1):
    for n, step in enumerate(steps(N, 48, "cpu")):
        for k, launch in enumerate(programs(step)):
            found.setdefault(f"{{n}} {{k}} {{launch[0]}}", []).append(launch[1])
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.trap("last-batch-recompiles")
def test_another_batch_size_compiles_nothing():
    """The last batch of an epoch, too, runs the programs that are there: no size of a batch is in a program."""
    if not TRITON:
        pytest.skip(NO_TRITON)
    ran = subprocess.run(
        [sys.executable, "-c", COMPILATIONS.format(steps=inspect.getsource(steps))],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    programs = json.loads(ran.stdout)
    assert all(len(hashes) == 5 for hashes in programs.values())
    assert {launch: len(set(hashes)) for launch, hashes in programs.items()} == dict.fromkeys(programs, 1)
    assert len({hashes[0] for hashes in programs.values()}) > 15  # of other ops and options they are others


@pytest.mark.trap("current-device")
def test_every_launch_is_guarded():
    """A launch goes to the current device: on_device_of makes it the tensors'."""
    found = 0
    for path in (ROOT / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text())
        guarded = set()
        for block in ast.walk(tree):
            if isinstance(block, ast.With) and any("on_device_of(" in ast.unparse(item) for item in block.items):
                guarded |= set(ast.walk(block))
        for node in ast.walk(tree):  # kernel[grid](...)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found += 1
                assert node in guarded, f"{path.name}:{node.lineno}"
    assert found >= 7


# Memory


class Accesses:
    """Watches every load and store of interpreted kernels. A lane that is not masked out has to read inside the storage of
    one of the launch's tensors and to write inside one of its tensors, and no element is written twice in a launch."""

    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        self.launches = 0
        self.memory, self.tensors, self.written = [], [], []
        run, load, store = (
            interpreter.GridExecutor.__call__,
            interpreter.InterpreterBuilder.create_masked_load,
            interpreter.InterpreterBuilder.create_masked_store,
        )

        def watched_run(executor, *args, **kwargs):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.numel()]
            self.tensors = [(t.data_ptr(), _end(t)) for t in tensors]
            self.memory = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors)]
            self.written = []
            run(executor, *args, **kwargs)
            written = np.concatenate(self.written) if self.written else np.empty(0)
            assert len(np.unique(written)) == len(written), f"{executor.fn.__name__} writes an element twice"
            self.launches += 1

        def watched_load(builder, ptrs, mask, *rest):
            self.check(ptrs, mask, self.memory, "reads")
            return load(builder, ptrs, mask, *rest)

        def watched_store(builder, ptrs, value, mask, *rest):
            self.written.append(self.check(ptrs, mask, self.tensors, "writes"))
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_run)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched_load)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", watched_store)

    @staticmethod
    def check(ptrs, mask, allowed, does):
        addresses = np.asarray(ptrs.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64)
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, stop in allowed:
            inside |= (addresses >= start) & (addresses <= stop - size)
        assert inside.all(), f"{does} {(~inside).sum()} elements of foreign memory"
        return addresses


def _end(t):
    return t.data_ptr() + (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) * t.element_size()


@pytest.mark.slow_interpreted
@pytest.mark.trap("pytorch#69339", "reads-outside-storage", "two-writers")
@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_no_access_leaves_its_memory_and_no_element_is_written_twice(device, monkeypatch):
    accesses = Accesses(monkeypatch)
    for N, dims in ((1, 0), (5, 2), (3, 2)):
        wide = torch.randn(N, 3, 7, 9)
        for x in (wide, wide.to(memory_format=torch.channels_last), wide[:, :, 1:6, ::2]):
            x, lam = x.detach().requires_grad_(), torch.rand(N, requires_grad=True)
            box = torch.randint(-3, 12, (N, 2 * dims)) if dims else None
            fastmix.mix(x, lam, torch.randint(0, N, (N,)), box=box).sum().backward()
    cases = [
        ((5, 10), torch.float32),
        ((3, 1023), torch.bfloat16),
        ((3, 1023), torch.float16),
        ((2, 5001), torch.float32),  # several tiles
        ((2, 5, 3, 7), torch.float32),
        ((1, 1), torch.float64),
    ]
    kinds = ("k-hot", "k-hot per pixel", "indices", "dense")
    for n, ((shape, dtype), kind) in enumerate(itertools.product(cases, kinds)):
        z = torch.randn(shape).to(dtype).requires_grad_()
        weight = torch.rand(shape[1], dtype=accumulator(dtype))
        target, _, _ = target_of(kind, shape, K=3, weights_dtype=dtype)
        if kind != "dense":
            (target if kind == "indices" else target.classes).view(-1)[::3] = -1
        for reduction in ("mean", "none") if shape[1] < 100 else (("mean", "none")[(n + n // 4) % 2],):
            loss = fastmix.soft_cross_entropy(
                z, target, weight=weight, label_smoothing=0.1, ignore_index=-1, reduction=reduction
            )
            (3 * loss).sum().backward()
    monkeypatch.setattr(fastmix._check, "readable", lambda t: False)  # as on a GPU, where nobody looks
    z, wrong = torch.randn(4, 6, requires_grad=True), torch.tensor([2**40, -7, 6, 0])
    assert torch.isnan(fastmix.soft_cross_entropy(z, wrong, weight=torch.rand(6), reduction="none")[:3]).all()
    fastmix.soft_cross_entropy(z, SoftTarget(wrong[:, None].repeat(1, 5), torch.rand(4, 5))).backward()
    lam = torch.rand(4, requires_grad=True)
    fastmix.mix(z, lam, wrong, box=torch.tensor([[0, 2], [-(2**40), 2**40], [5, 1], [9, 12]])).sum().backward()
    assert accesses.launches > 100


def surrounded(t, offset, device):
    """(t in the middle of a larger buffer, the buffer): NaN, or an impossible index, lies before and after it."""
    filler = float("nan") if t.is_floating_point() else 2**40
    buffer = torch.full((t.numel() + 128,), filler, dtype=t.dtype, device=device)
    inner = buffer[offset : offset + t.numel()].view(t.shape)
    return inner.copy_(t), buffer


@pytest.mark.trap("reads-outside-storage")
@pytest.mark.parametrize("offset", [64, 33])
def test_what_lies_around_the_inputs_does_not_matter(offset, device):
    """Odd sizes, aligned and not: nothing is read of the NaN around a tensor, and nothing is written there."""
    N, C = 5, 11
    plain = {
        "x": torch.randn(N, 3, 5, 7),
        "z": torch.randn(N, C),
        "g": torch.randn(N, 3, 5, 7),
        "lam": torch.rand(N),
        "index": torch.randint(0, N, (N,)),
        "box": torch.randint(-2, 8, (N, 4)),
        "classes": torch.randint(0, C, (N, 3)),
        "weights": torch.rand(N, 3),
        "dense": torch.rand(N, C),
        "weight": torch.rand(C),
        "up": torch.rand(N),
    }

    def results(t):
        x, z, lam, weights, dense = (t[name].detach().requires_grad_() for name in ("x", "z", "lam", "weights", "dense"))
        mixed = fastmix.mix(x, lam, t["index"], box=t["box"])
        options = {"weight": t["weight"], "label_smoothing": 0.1, "reduction": "none"}
        soft = fastmix.soft_cross_entropy(z, SoftTarget(t["classes"], weights), **options)
        rows = fastmix.soft_cross_entropy(z, dense, **options)
        return [
            *(mixed, soft, rows),
            *torch.autograd.grad(mixed, (x, lam), t["g"]),
            *torch.autograd.grad(soft, (z, weights), t["up"]),
            *torch.autograd.grad(rows, (z, dense), t["up"]),
        ]

    expected = results({name: t.to(device) for name, t in plain.items()})
    inside = {name: surrounded(t, offset, device) for name, t in plain.items()}
    before = {name: buffer.clone() for name, (_, buffer) in inside.items()}
    torch.testing.assert_close(results({name: t for name, (t, _) in inside.items()}), expected)
    for name, (_, buffer) in inside.items():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.trap("lazily-negated-view")
def test_lazily_negated_views_are_what_they_show(device):
    """A view of a conjugate is stored with the other sign, and torch negates it when it is read: a kernel has to as well."""

    def negated(t):
        view = torch._neg_view(-t)  # dense, unlike x.conj().imag
        assert view.is_neg()
        assert torch.equal(view, t)
        return view

    x, z, g, t = (torch.randn(4, 6, device=device) for _ in range(4))
    lam, a, up, w = (torch.rand(*shape, device=device) for shape in ((4,), (4, 2), (4,), (6,)))
    index, classes = torch.tensor([1, 2, 3, 3], device=device), torch.randint(0, 6, (4, 2), device=device)
    wrong = []
    for negate in ("", "x", "z", "g", "t", "lam", "a", "up", "w"):
        plain = {"x": x, "z": z, "g": g, "t": t, "lam": lam, "a": a, "up": up, "w": w}
        v = {name: negated(value) if name == negate else value for name, value in plain.items()}
        own, logits = v["x"].detach().requires_grad_(), v["z"].detach().requires_grad_()
        mixed = fastmix.mix(own, v["lam"], index)
        soft = fastmix.soft_cross_entropy(logits, SoftTarget(classes, v["a"]), weight=v["w"], reduction="none")
        rows = fastmix.soft_cross_entropy(logits, v["t"], reduction="none")
        results = [mixed, soft, rows, torch.autograd.grad(mixed, own, v["g"])[0]]
        results += [torch.autograd.grad(loss, logits, v["up"])[0] for loss in (soft, rows)]
        if not negate:
            expected = results
        wrong += [] if all(map(torch.allclose, results, expected)) else [negate]
    assert wrong == []


# On a GPU alone


@pytest.mark.trap("grid-axis-65535")
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_more_rows_than_other_grid_axes_hold(device):
    N, C = 70000, 1024
    z, y = torch.randn(N, C, device=device, requires_grad=True), torch.randint(0, C, (N,), device=device)
    lam, index = torch.rand(N, device=device, requires_grad=True), torch.randperm(N, device=device)
    mixed = fastmix.mix(z, lam, index)
    dz, dlam = torch.autograd.grad(mixed, (z, lam), torch.ones_like(mixed))
    loss = fastmix.soft_cross_entropy(z, y, reduction="none")
    last = slice(N - 9, N)
    own = lam[last, None].detach()
    torch.testing.assert_close(mixed[last], own * z[last] + (1 - own) * z[index[last]])
    back = 1 - lam.detach()[index.argsort()]
    torch.testing.assert_close(dz[:, 0], lam.detach() + back)
    torch.testing.assert_close(dlam[last], (z[last] - z[index[last]]).sum(1).detach(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(loss[last], F.cross_entropy(z[last], y[last], reduction="none"))
    up = torch.rand(N, device=device)
    (grad,) = torch.autograd.grad(loss, z, up)
    torch.testing.assert_close(grad[last], up[last, None] * (z[last].softmax(1) - F.one_hot(y[last], C)).detach())


@pytest.mark.trap("current-device")
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_runs_where_the_tensors_are(device):
    """On the last GPU while the first is the current one. (With one GPU this shows that the guard does no harm.)"""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x, lam = torch.randn(5, 7, device=device, requires_grad=True), torch.rand(5, device=device, requires_grad=True)
    m = Mix(lam, torch.tensor([1, 2, 3, 4, 0], device=device))
    with torch.cuda.device(0):
        mixed = m.apply(x)
        fastmix.soft_cross_entropy(mixed, m.target(torch.arange(5, device=device))).backward()
        drawn, target = Mixup(0.4)(x.detach(), torch.arange(5, device=device))
        assert torch.cuda.current_device() == 0
    expected = reference.mix(numpy(x), numpy(lam), numpy(m.index))
    assert_close(mixed, expected, torch.float32, np.abs(numpy(x)).max())
    assert drawn.device == target.weights.device == x.grad.device == device
    assert torch.isfinite(x.grad).all()


@pytest.mark.trap("LoongForge#49", "compilation-in-capture")
@pytest.mark.gpu
@pytest.mark.no_poison
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_a_captured_step_follows_new_parameters(device):
    """Drawn outside the graph and copied into its tensors, parameters are another draw's at every replay. A capture cannot
    compile: the step has run before."""
    w = torch.randn(300, 10, device=device, requires_grad=True)
    sampler = CutMix(seed=0)

    def draw():
        x, y = torch.randn(16, 3, 10, 10, device=device), torch.randint(0, 10, (16,), device=device)
        m = sampler.sample(x)
        return [x, y, m.index, torch.rand(16, device=device), m.box]

    def step(x, y, index, lam, box):
        x, lam = x.detach().requires_grad_(), lam.detach().requires_grad_()
        m = Mix(lam, index, box=box)
        loss = fastmix.soft_cross_entropy(m.apply(x).flatten(1) @ w, m.target(y), label_smoothing=0.1)
        return [loss.detach(), *torch.autograd.grad(loss, (x, lam, w))]

    static = draw()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*static)
    losses = []
    for _ in range(3):
        drawn = draw()
        for held, new in zip(static, drawn, strict=True):
            held.copy_(new)
        graph.replay()
        torch.testing.assert_close(results, step(*drawn))
        losses.append(results[0].item())
    assert len(set(losses)) == 3
