"""The CPU's ways to work in blocks, each on small tensors: what large ones take, in tests that end soon."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from memory import Fresh
from numerics import FLOATS, accumulator, target_of
from test_mix import batch, check
from test_soft_cross_entropy import check as check_loss

import fastmix
from fastmix import SoftTarget, _torch

OPTIONS = SimpleNamespace(ignore_index=-100, label_smoothing=0.1, reduction="mean")
BINARY_OPTIONS = SimpleNamespace(label_smoothing=0.1, threshold=None, class_reduction="mean", reduction="mean")


WAYS = {
    "blocks of a few rows": {"MIX_BLOCK_BYTES": 600, "SMALL_BATCH": 0},
    "one row a block": {"MIX_BLOCK_BYTES": 1, "SMALL_BATCH": 0},
    "small batches": {"SMALL_BATCH": 1 << 30},
    "small batches in blocks": {"MIX_BLOCK_BYTES": 600, "SMALL_BATCH": 1 << 30},
    "large rows": {"LARGE_ROW_BYTES": 1, "SMALL_BATCH": 0},
    "boxes of large rows": {"SMALL_ROW_BYTES": 0, "SMALL_BATCH": 0},
    "boxes by a mask, in blocks": {"SMALL_ROW_BYTES": 1 << 30, "MIX_BLOCK_BYTES": 600, "SMALL_BATCH": 0},
}


@pytest.fixture(autouse=True)
def torch_backend():
    with fastmix.backend("torch"):
        yield torch.device("cpu")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mixing(way, dtype, monkeypatch):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(_torch.sizes, name, value)
    for shape, boxes in (((7, 2, 5, 6), 0), ((7, 2, 5, 6), 2), ((5, 40), 0), ((9,), 0), ((1, 3, 4), 1)):
        x, lam, index, box, g = batch(shape, dtype, "cpu", boxes)
        for ours in (lam, torch.ones_like(lam), torch.zeros_like(lam), lam[0].clone()):
            out = check(x, ours, index, box, g)
            given = torch.empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
            assert torch.equal(fastmix.mix(x, ours, index, box=box, out=given), out)
        if len(shape) == 4:
            laid = x.to(memory_format=torch.channels_last)
            assert check(laid, lam, index, box, g).stride() == laid.stride()
            check(x[:, :, 1:, ::2], lam, index, None, g[:, :, 1:, ::2])


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_weight_is_not_read(way, monkeypatch):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(_torch.sizes, name, value)
    x, _, _, _, g = batch((6, 2, 4, 5), torch.float32, "cpu")
    x[1], g[1] = float("nan"), float("inf")
    lam, index = torch.tensor([1.0, 0.0, 0.3, 0.4, 1.0, 0.6]), torch.tensor([1, 2, 3, 0, 1, 5])
    x.requires_grad_()
    out = fastmix.mix(x, lam, index)
    assert torch.isfinite(out).all()  # nothing of row 1 is asked for
    assert torch.equal(out[0], x[0])
    assert torch.equal(out[1], x[2])
    out.backward(g)
    assert torch.isfinite(x.grad[[0, 1, 3, 4, 5]]).all()
    assert not torch.isfinite(x.grad[2]).any()  # row 1 went there


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 200, 4000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_losses(block, dtype, monkeypatch):
    monkeypatch.setattr(_torch.sizes, "LOSS_BLOCK_BYTES", block)
    wide = accumulator(dtype)
    for shape, kind, reduction in itertools.product(
        [(9, 10), (3, 4, 40), (2, 3, 5, 8), (1, 3, 50)],
        ("k-hot", "k-hot per pixel", "indices", "dense"),
        ("mean", "none"),
    ):
        for e, weight in ((0.0, None), (0.1, torch.rand(shape[1], dtype=wide))):
            z = (3 * torch.randn(shape)).to(dtype)
            target, oracle_target, leaf = target_of(kind, shape, 2, dtype)
            check_loss(z, target, oracle_target, leaf, weight=weight, label_smoothing=e, reduction=reduction)


def test_one_block_and_many_give_the_same(monkeypatch):
    """Masked, ignored and infinite classes: the loss and its gradients do not depend on how rows are cut into blocks."""
    weights, masked = torch.tensor([[0.7, 0.3], [0.0, 1.0]]), torch.tensor([[0.1, 0.4, -0.2], [-math.inf, 2.0, 1.0]])
    cases = {
        "plain": (masked.clamp(min=-3), [[0, 2], [1, 2]], weights),
        "labels": (masked.clamp(min=-3), [[2], [1]], None),
        "masked, weight 0": (masked, [[0, 2], [0, 2]], weights),
        "masked": (masked, [[0, 2], [1, 2]], weights),
        "masked and asked for": (masked, [[0, 2], [2, 0]], weights),
        "ignored": (masked, [[0, -100], [1, 2]], weights),
        "all ignored": (masked, [[-100, -100], [-100, -100]], weights),
        "nothing to learn": (masked, [[0, 2], [1, 2]], torch.zeros(2, 2)),
        "infinite": (masked.masked_fill(masked == 2, math.inf), [[0, 2], [1, 2]], weights),
    }
    for reduction in ("mean", "sum", "none"):
        for name, (z, classes, a) in cases.items():
            if name == "nothing to learn" and reduction != "mean":
                continue  # no mean of nothing
            found = []
            for block in (1 << 20, 0):
                monkeypatch.setattr(_torch.sizes, "LOSS_BLOCK_BYTES", block)
                leaves = [z.clone().requires_grad_(), None if a is None else a.clone().requires_grad_()]
                classes = torch.as_tensor(classes)
                target = classes[:, 0] if a is None else SoftTarget(classes, leaves[1])
                loss = fastmix.soft_cross_entropy(leaves[0], target, reduction=reduction)
                loss.sum().backward()
                found.append([loss.detach(), *[leaf.grad for leaf in leaves if leaf is not None]])
            torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def test_retained_graphs_in_blocks(monkeypatch):
    monkeypatch.setattr(_torch.sizes, "LOSS_BLOCK_BYTES", 200)
    targets = [(shape, target_of(kind, shape)[0]) for shape in ((9, 10), (3, 4, 40)) for kind in ("k-hot", "dense")]
    shared = SoftTarget(
        torch.randint(10, (4, 16, 8, 8)), torch.rand(4, 16)
    )  # one weight for all pixels: still one order of sums
    for (shape, target), reduction in itertools.product([*targets, ((4, 10, 8, 8), shared)], ("mean", "sum")):
        z = torch.randn(shape, requires_grad=True)
        loss = fastmix.soft_cross_entropy(z, target, reduction=reduction)
        first, again = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, again)


def test_extra_memory_is_small():
    """Mixing makes its result and no other tensor of that size; the loss makes the gradient."""
    x, lam, index = torch.randn(16, 3, 256, 256), torch.rand(16), torch.randperm(16)
    z = torch.randn(512, 5000)
    classes = torch.randint(0, 5000, (512, 2))
    with Fresh() as made:
        _torch.mix_fwd(x, lam, index, None, torch.empty_like(x))
    assert made.sizes
    assert max(size for size in made.sizes if size != x.nbytes) <= 2 * _torch.sizes.MIX_BLOCK_BYTES
    with Fresh() as made:
        _torch.soft_ce_fwd(z, torch.rand(512, 2), classes, None, OPTIONS, False, True)
    assert [size for size in made.sizes if size > 2 * _torch.sizes.LOSS_BLOCK_BYTES] == [z.nbytes]
    z, classes = torch.randn(512, 100), torch.randint(0, 100, (512, 16))
    with Fresh() as made:
        _torch.soft_bce_fwd(z, torch.rand(512, 16), classes, None, None, BINARY_OPTIONS, True, True)
    assert max(made.sizes) <= z.nbytes  # nothing for each pair of components


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_rows_larger_than_a_block_are_cut(dtype, layout):
    """Rows of 12 MB in float32: nothing of a row's size is made beside results."""
    x, g = (torch.randn(2, 3, 1024, 1024).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    lam, index, box = torch.tensor([0.3, 0.0]), torch.tensor([1, 0]), torch.tensor([[3, 2, 900, 400]] * 2)
    weights, mask = torch.rand(2, 2), torch.rand(2, 4, 4)
    calls = [
        (1, lambda: _torch.convex_combination_fwd((x, g), weights)),
        (2, lambda: _torch.convex_combination_bwd(g, (x, g), weights, x.stride(), (True, True), True)),
        (1, lambda: _torch.mix_masked_fwd(x, mask, index, None, None)),
    ]
    for cut in (None, box):
        calls += [
            (1, lambda cut=cut: _torch.mix_fwd(x, lam, index, cut, None)),
            (1, lambda cut=cut: _torch.mix_bwd(g, None, lam, index, cut, x.stride(), True, False)),
            (0, lambda cut=cut: _torch.mix_bwd(g, x, lam, index, cut, x.stride(), False, True)),
        ]
    for results, call in calls:
        with Fresh() as made:
            call()
        assert [size for size in made.sizes if size > 2 * _torch.sizes.MIX_BLOCK_BYTES] == results * [x.nbytes]
