"""fastmix.warmup compiles all that the step after it needs, whatever its batch size."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETER, NO_TRITON, TRITON

import fastmix
from fastmix import _warmup

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = """
import json, sys, torch, fastmix
from fastmix import _backend, _check

sys.path.insert(0, "tests")
from launched import programs

_backend._why_not_triton = lambda device: None
_check.readable = lambda t: False  # nothing is written: costs are whatever the memory holds
options = {"label_smoothing": 0.1}
puzzle = fastmix.PuzzleMix(mean=0.5, std=0.25, blocks=(2, 4), t_size=2)

def ahead():
    fastmix.warmup((64, 3, 16, 16), (64, 40), dtype=torch.bfloat16, device="cpu", box=True, lam_gradient=True, **options)
    for sampler in fastmix.Mixup(1.0), fastmix.CutMix(), fastmix.FMix(), fastmix.ResizeMix():
        fastmix.warmup((64, 3, 16, 16), dtype=torch.bfloat16, device="cpu", sampler=sampler)
    fastmix.warmup((64, 3, 16, 16), dtype=torch.bfloat16, device="cpu", mask=(4, 4), plans=True, sources=3, lam_gradient=True)
    fastmix.warmup((64, 3, 16, 16), dtype=torch.bfloat16, device="cpu", sampler=puzzle)
    fastmix.warmup(logits=(64, 40), device="cpu", components=3)
    fastmix.warmup(logits=(64, 40), device="cpu", target=fastmix.MixedRows, loss=fastmix.SoftCrossEntropyLoss(label_smoothing=0.1))
    binary = {"dtype": torch.bfloat16, "device": "cpu", "loss": fastmix.soft_binary_cross_entropy, "lam_gradient": True}
    fastmix.warmup(logits=(64, 40), threshold=0.2, **binary)
    fastmix.warmup(logits=(64, 40), target=fastmix.MixedRows, class_reduction="sum", **binary)
    fastmix.warmup(logits=(3, 64, 40), dtype=torch.bfloat16, device="cpu", loss=fastmix.js_divergence, scale=12.0)

def losses(n):
    ones, y = torch.ones(n), torch.zeros(n, dtype=torch.int64)
    z, rows = torch.zeros(n, 40, dtype=torch.bfloat16, requires_grad=True), torch.zeros(n, 40)
    for lam in (torch.rand(n), torch.rand(n, requires_grad=True)):
        mix = fastmix.Mix(lam, y)
        for target, options in (mix.target(y), {"threshold": 0.2}), (mix.target(rows), {"class_reduction": "sum"}):
            loss = fastmix.soft_binary_cross_entropy(z, target, reduction="none", **options)
            if lam.requires_grad:  # AMP's first step
                torch.autograd.grad(loss.sum(), lam, retain_graph=True, allow_unused=True)
            loss.backward(ones)
    with torch.no_grad():
        fastmix.soft_binary_cross_entropy(z, rows, class_reduction="sum")
    wide = torch.zeros(n, 40, requires_grad=True)
    fastmix.soft_cross_entropy(wide, fastmix.SoftTarget(torch.zeros(n, 3, dtype=torch.int64), torch.rand(n, 3))).backward()
    fastmix.soft_cross_entropy(wide, fastmix.MixedRows(rows, 0.5, y), label_smoothing=0.1).backward()
    sets = torch.zeros(3 * n, 40, dtype=torch.bfloat16, requires_grad=True)
    for given in (sets.view(3, n, 40), sets.chunk(3)):
        (fastmix.js_divergence(given, scale=12.0) / 4).backward()
        with torch.no_grad():
            fastmix.js_divergence(given)

def step():
    for n in (64, 17):
        x, y = torch.zeros(n, 3, 16, 16, dtype=torch.bfloat16, requires_grad=True), torch.zeros(n, dtype=torch.int64)
        mask, plan = torch.rand(n, 4, 4, requires_grad=True), torch.zeros(n, 16, dtype=torch.int64)
        for blocks in puzzle.blocks:
            y.zero_()
            drawn = puzzle._cut(x.detach(), torch.rand(n, 16, 16), y, torch.rand(n), blocks)
            fastmix.mix_masked(x.detach(), drawn.mask, y, plan=0 * drawn.plan, partner_plan=0 * drawn.plan)
        for t in (x, x.detach()):
            for sampler in (fastmix.Mixup(1.0), fastmix.CutMix(), fastmix.FMix(), fastmix.ResizeMix()):
                drawn = sampler.sample(t)
                drawn.target(y)
                drawn.index.zero_()  # nothing has written it
                if drawn.mask is None and not drawn.resize:
                    drawn.lam.requires_grad_()
                elif not t.requires_grad:
                    continue
                drawn.apply(t).sum().backward()
            fastmix.mix_masked(t, mask, y, plan=plan, partner_plan=plan).sum().backward()
            fastmix.convex_combination((t, t, t), torch.rand(n, 3, requires_grad=True)).sum().backward()
        z = torch.zeros(n, 40, dtype=torch.bfloat16, requires_grad=True)
        lam = torch.rand(n, requires_grad=True)
        (fastmix.soft_cross_entropy(z, fastmix.Mix(lam, y).target(y), **options) / 4).backward()
        with torch.no_grad():
            fastmix.soft_cross_entropy(z, y, **options)
        losses(n)

with fastmix.backend("triton"):
    json.dump([sorted(set(programs(call))) for call in (ahead, step)], sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.trap("first-call-compiles")
def test_the_step_after_it_compiles_nothing():
    if not TRITON:
        pytest.skip(NO_TRITON)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAMS],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    ahead, step = ({tuple(program) for program in programs} for programs in json.loads(ran.stdout))
    assert len(step) >= 30
    assert step - ahead == set()


@pytest.mark.slow_interpreted
def test_runs_everywhere_and_leaves_the_generators_alone(device, monkeypatch):
    if INTERPRETER:  # which runs a program for every row
        from fastmix.kernels import sample

        monkeypatch.setattr(_warmup, "MANY_DRAWS", 5)
        monkeypatch.setattr(sample, "MOST_COUNTED", 4)
    state = torch.random.get_rng_state()
    seconds = fastmix.warmup((256, 3, 4, 4), (256, 10, 2), device=device, box=True, weight=torch.ones(10, device=device))
    assert seconds > 0
    assert fastmix.warmup(images=(7, 5), device=device, lam_gradient=True) > 0
    sampler = fastmix.RandomMix(fastmix.Mixup(1.0, seed=3), fastmix.CutMix())
    before = sampler.state_dict()
    assert fastmix.warmup((7, 1, 4, 4), device=device, sampler=sampler) > 0
    assert sampler.state_dict() == before
    for sampler in (
        fastmix.FMix(seed=3),
        fastmix.ResizeMix(seed=3),
        fastmix.SaliencyMix(seed=3),
        fastmix.AttentiveCutMix(3, 4, seed=3),
    ):
        before = sampler.state_dict()
        assert fastmix.warmup((7, 1, 4, 4), device=device, sampler=sampler) > 0
        assert sampler.state_dict() == before
    assert fastmix.warmup((256, 3, 4, 6), device=device, mask=(2, 3), sources=2) > 0
    assert fastmix.warmup(logits=(7, 5), dtype=torch.float64, device=device, reduction="none") > 0
    binary = fastmix.SoftBinaryCrossEntropyLoss(pos_weight=torch.ones(5, device=device))
    assert fastmix.warmup(logits=(7, 5, 2), device=device, loss=binary, target=fastmix.MixedRows, lam_gradient=True) > 0
    assert fastmix.warmup(logits=(2, 7, 5), device=device, loss=fastmix.js_divergence, reduction="none") > 0
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow_interpreted
def test_runs_whatever_is_the_default(device):
    with torch.no_grad():
        fastmix.warmup((7, 5), (7, 5), device=device)
    with torch.inference_mode():
        fastmix.warmup((7, 5), (7, 5), device=device)
        fastmix.warmup(logits=(2, 7, 5), device=device, loss=fastmix.js_divergence)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        fastmix.warmup((7, 5), (7, 5), device=device)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.trap("first-call-compiles")
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_a_step_is_captured_right_after_it(device):
    x, z = torch.randn(16, 3, 12, 12, device=device), torch.randn(16, 37, device=device, requires_grad=True)
    y, lam, index = torch.randint(0, 37, (16,), device=device), torch.rand(16, device=device), torch.randperm(16, device=device)
    fastmix.warmup(x.shape, z.shape, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = fastmix.mix(x, lam, index)
        loss = fastmix.soft_cross_entropy(z, fastmix.Mix(lam, index).target(y))
    lam.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(mixed, fastmix.mix(x, lam, index))
    torch.testing.assert_close(loss, fastmix.soft_cross_entropy(z, fastmix.Mix(lam, index).target(y)))


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"images": 3}, TypeError, "images: expected a shape"),
        ({"images": ()}, TypeError, "images"),
        ({"images": (4, 0)}, ValueError, "images: expected sizes of at least 1, got 0"),
        (
            {"images": (4, 3, 8), "memory_format": torch.channels_last},
            ValueError,
            "images: expected 4 sizes for torch.channels_last",
        ),
        ({"images": (4, 3, 8), "memory_format": "channels_last"}, TypeError, "memory_format: expected a torch.memory_format"),
        ({"images": (4,), "box": True}, TypeError, "images: expected a shape of at least 2 sizes"),
        ({"images": (4, 8), "mask": (2, 2)}, TypeError, "images: expected a shape of at least 3 sizes"),
        ({"images": (4, 8, 8), "mask": (3, 2)}, ValueError, "mask: expected a number of cells that divides"),
        ({"images": (4, 8, 8), "mask": 3}, TypeError, "mask: expected [(]h, w[)]"),
        ({"images": (4, 8, 8), "mask": (0, 2)}, ValueError, "mask: expected numbers of at least 1, got 0"),
        ({"images": (4, 8, 8), "sources": 17}, ValueError, "sources: expected from 1 to 16 tensors, got 17"),
        ({"images": (4, 8, 8), "sources": 0}, ValueError, "sources: expected an int of at least 1, got 0"),
        ({"logits": (4, 5), "mask": (2, 2)}, ValueError, "mask: expected None where there are no images"),
        ({"logits": (4, 5), "sampler": fastmix.Mixup(1.0)}, ValueError, "sampler: expected None where there are no images"),
        ({"images": (4, 8), "sampler": "mixup"}, TypeError, "sampler: expected a sampler or None, got 'mixup'"),
        ({"logits": (4, 5), "sources": 2}, ValueError, "sources: expected None where there are no images"),
        ({"images": (4, 8, 8), "plans": True}, ValueError, "plans: expected False where there is no mask"),
        ({"images": (4, 2.5)}, TypeError, "images: expected an int, got 2.5"),
        ({"logits": (4,)}, TypeError, "logits: expected a shape of at least 2 sizes"),
        ({"logits": "4, 5"}, TypeError, "logits"),
        ({"logits": (4, 5), "loss": "binary"}, TypeError, "loss: expected a function of logits and a target"),
        ({"logits": (4, 5), "target": "rows"}, ValueError, "target: expected SoftTarget or MixedRows, got 'rows'"),
        ({"logits": (4, 5), "components": 0}, ValueError, "components: expected an int of at least 1, got 0"),
        ({"logits": (4, 5), "loss": fastmix.js_divergence}, TypeError, "logits: expected a shape of at least 3 sizes"),
        ({"logits": (17, 4, 5), "loss": fastmix.js_divergence}, ValueError, "logits: expected shape .* with K from 1 to 16"),
        ({"logits": (4, 5), "dtype": torch.int64}, TypeError, "dtype: expected float16"),
        ({"logits": (4, 5), "dtype": "float32"}, TypeError, "dtype"),
        ({"logits": (4, 5), "device": 1.5}, TypeError, "device: expected a device"),
        ({"logits": (4, 5), "device": "gpu?"}, ValueError, "device: expected a device, got 'gpu[?]'"),
        ({"logits": (4, 5), "label_smoothing": 2}, ValueError, "label_smoothing"),
        ({"logits": (4, 5), "reduction": "max"}, ValueError, "reduction"),
    ],
)
def test_bad_input(arguments, kind, words):
    with pytest.raises(kind, match=words):
        fastmix.warmup(**{"device": "cpu", **arguments})
