"""How the sigmoid loss walks over rows: odd rows in whole vectors, many classes in tiles, pixels, MixedRows mixed as they are read."""

import itertools

import numpy as np
import pytest
import torch
from conftest import NO_TRITON, TRITON
from numerics import FLOATS, numpy, target_of
from test_class_tiles import ODD, placed
from test_properties import guarded_allocations
from test_soft_binary_cross_entropy import INF, NAN, accumulator, check
from torch.testing import assert_close as same

import fastmix
from fastmix import MixedRows, _torch, reference

if TRITON:
    from fastmix.kernels import _class_tiles, _launch, soft_binary_cross_entropy


@pytest.fixture
def short_windows(device, monkeypatch):
    """Rows of any length are taken in whole vectors and two ends, wherever they start."""
    if TRITON:
        monkeypatch.setattr(_class_tiles, "WINDOW_BYTES", 0)
    return device


def class_weights(C, dtype, device):
    return {name: (torch.rand(C, device=device) + 0.1).to(accumulator(dtype)) for name in ("weight", "pos_weight")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["k-hot", "dense"])
def test_every_phase_and_length(kind, dtype, short_windows):
    """Each row starts somewhere else; nothing beside it is looked at or written."""
    for n, C in enumerate(ODD):
        for offset, stride in ((0, C), (n % 5, C), (0, C + 1 + n % 3)):
            z = placed(3 * torch.randn(3, C), dtype, offset, stride, short_windows)
            options = class_weights(C, dtype, short_windows) if n % 3 == 0 else {}
            target, oracle_target, leaf = target_of(kind, z.shape, 2, dtype, short_windows)
            with guarded_allocations():
                check(z, target, oracle_target, leaf, label_smoothing=0.1 * (n % 2), **options)


@pytest.mark.parametrize("kind", ["k-hot", "dense"])
def test_every_phase_of_tiles(kind, short_windows, monkeypatch):
    """Rows of several tiles: the first has the ends."""
    if TRITON:
        monkeypatch.setattr(soft_binary_cross_entropy, "binary_tile", lambda *_: (2, 16, 1))
    for C, offset, dtype in itertools.product((47, 70), (0, 3), (torch.float32, torch.bfloat16)):
        z = placed(3 * torch.randn(3, C), dtype, offset, C, short_windows)
        target, oracle_target, leaf = target_of(kind, z.shape, 3, dtype, short_windows)
        with guarded_allocations():
            for options in ({}, {**class_weights(C, dtype, short_windows), "reduction": "none", "label_smoothing": 0.1}):
                check(z, target, oracle_target, leaf, **options)


def test_components_in_the_ends(short_windows):
    """Every class is once what a row's target names, first and last ones too; the gradient to its weight is its own."""
    for C, dtype in ((19, torch.float32), (37, torch.bfloat16)):
        z = placed(3 * torch.randn(C, C), dtype, 1, C, short_windows)
        classes = torch.stack((torch.arange(C), torch.arange(C).flip(0)), 1).to(short_windows)
        weights = torch.rand(C, 2, device=short_windows, requires_grad=True)
        check(z, fastmix.SoftTarget(classes, weights), (numpy(classes), numpy(weights)), weights, class_reduction="sum")


@pytest.mark.skipif(not TRITON, reason=NO_TRITON)
def test_few_rows_of_many_classes_are_many_programs():
    """A row's tiles are independent, and no longer than what one program takes."""
    for dtype, C in itertools.product(FLOATS, (21841, 262144)):
        view = _class_tiles.View(torch.empty(1, C, dtype=dtype))
        how = _class_tiles.shared_layout(view)
        assert how.wide or dtype == torch.float64
        assert _launch.binary_tile(C, how.pixels, how.wide, how.vector, dtype)[1] <= 4096


@pytest.mark.parametrize("shape", [(2, 21, 8, 8), (1, 150, 4, 4), (1, 300, 4, 4), (2, 21, 5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pixels(shape, dtype, device):
    """Maps whose pixels are whole vectors, and others; classes that a tile holds, and more."""
    z = (3 * torch.randn(shape)).to(dtype).to(device)
    for kind, options in itertools.product(
        ("k-hot", "k-hot per pixel", "indices", "dense"),
        ({}, {**class_weights(shape[1], dtype, device), "label_smoothing": 0.1}),
    ):
        target, oracle_target, leaf = target_of(kind, shape, 2, dtype, device)
        with guarded_allocations():
            check(z, target, oracle_target, leaf, **options)


class TestMixedRows:
    """Values are mixed where the loss reads them."""

    @pytest.mark.parametrize("values_dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("shape", [(6, 9), (5, 70), (3, 5, 4, 4)], ids=str)
    def test_matches_the_oracle(self, shape, dtype, values_dtype, short_windows, monkeypatch):
        def mixed_before(*_):
            raise AssertionError("the target was materialised")

        monkeypatch.setattr(fastmix.functional, "_mix_checked", mixed_before)
        N, C = shape[:2]
        device = short_windows
        z = torch.randn(shape).to(dtype).to(device)
        values = torch.rand(shape).to(values_dtype).to(device)
        lam = torch.rand(N, dtype=torch.float64 if values_dtype == torch.float64 else torch.float32, device=device)
        index = torch.randint(0, N, (N,), device=device)
        every = {**class_weights(C, dtype, device), "label_smoothing": 0.1, "reduction": "none"}
        for share, options in ((lam, {}), (lam[0], every), (lam, {"threshold": 0.45, "class_reduction": "sum"})):
            rows = reference.mix(numpy(values), np.broadcast_to(numpy(share), N), numpy(index))
            with guarded_allocations():
                check(z, MixedRows(values, share, index), rows, None, **options)

    def test_every_phase(self, short_windows):
        """Values and partners off a boundary, as the logits and elsewhere; nothing beside them is looked at or written."""
        for C, offset, dtype in itertools.product((9, 33, 70), (0, 1, 3), (torch.float32, torch.bfloat16)):
            z = placed(torch.randn(4, C), dtype, offset, C, short_windows)
            for place in (offset, 2):
                values = placed(torch.rand(4, C), dtype, place, C, short_windows)
                index = torch.tensor([1, 3, 0, 3], device=short_windows)
                lam = torch.tensor([0.25, 0.5, 1.0, 0.0], device=short_windows)
                rows = reference.mix(numpy(values), numpy(lam), numpy(index))
                with guarded_allocations():
                    check(z, MixedRows(values, lam, index), rows, None)

    @pytest.mark.parametrize("hostile", [NAN, INF])
    def test_a_weight_of_0_is_not_looked_at(self, hostile, device):
        values = torch.rand(3, 70, device=device)
        values[1] = hostile
        lam, index = torch.tensor([1.0, 0.0, 0.5], device=device), torch.tensor([1, 2, 0], device=device)
        z = torch.randn(3, 70, device=device, requires_grad=True)
        rows = torch.stack((values[0], values[2], (values[2] + values[0]) / 2))
        for options in ({}, {"threshold": 0.5}):
            loss = fastmix.soft_binary_cross_entropy(z, MixedRows(values, lam, index), reduction="none", **options)
            same(loss, fastmix.soft_binary_cross_entropy(z, rows, reduction="none", **options))
            assert torch.isfinite(torch.autograd.grad(loss.sum(), z)[0]).all()

    def test_a_partner_out_of_range_where_the_host_does_not_look(self, device, monkeypatch):
        """Its row is NaN, also in classes of no weight and where a threshold makes every target 0 or 1."""
        z, values = torch.randn(4, 6, device=device, requires_grad=True), torch.rand(4, 6, device=device)
        target = MixedRows(
            values, torch.tensor([0.5, 0.5, 1.0, 0.5], device=device), torch.tensor([1, 4, -3, 0], device=device)
        )
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"target.index: expected a partner in \[0, 4\), got 4 in row 1"):
                fastmix.soft_binary_cross_entropy(z, target)
        monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
        weight = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0], device=device)
        for options in ({}, {"threshold": 0.4}, {"weight": weight}):
            loss = fastmix.soft_binary_cross_entropy(z, target, reduction="none", **options)
            assert torch.equal(torch.isnan(loss), torch.tensor([False, True, True, False], device=device))
            for factor in (1, 2):
                (grad,) = torch.autograd.grad(factor * loss.sum(), z, retain_graph=True)
                assert torch.isnan(grad[1:3]).all()
                assert torch.isfinite(grad[[0, 3]]).all()

    def test_retained_graph_and_upstream(self, device):
        z = torch.randn(5, 9, device=device, requires_grad=True)
        target = MixedRows(torch.rand(5, 9, device=device), 0.25, torch.tensor([1, 2, 3, 4, 0], device=device))
        loss = fastmix.soft_binary_cross_entropy(z, target)
        one, two, again = (torch.autograd.grad(f * loss, z, retain_graph=True)[0] for f in (1, 2, 1))
        same(two, 2 * one)
        assert torch.equal(one, again)

    def test_is_the_loss_that_gradients_go_through(self, device):
        """Where values or lam need a gradient they are mixed before: the same loss and gradient to the logits."""
        z = torch.randn(5, 9, device=device, requires_grad=True)
        values, lam = torch.rand(5, 9, device=device), torch.rand(5, device=device)
        index = torch.tensor([1, 2, 2, 4, 0], device=device)
        loss = fastmix.soft_binary_cross_entropy(z, MixedRows(values, lam, index), label_smoothing=0.1)
        (dz,) = torch.autograd.grad(loss, z)
        for leaf in (values, lam):
            leaf.requires_grad_()
            through = fastmix.soft_binary_cross_entropy(z, MixedRows(values, lam, index), label_smoothing=0.1)
            same(through, loss)
            again, dleaf = torch.autograd.grad(through, (z, leaf))
            same(again, dz)
            dense = lam[:, None] * values + (1 - lam)[:, None] * values[index]
            expected = torch.autograd.grad(fastmix.soft_binary_cross_entropy(z, dense, label_smoothing=0.1), leaf)[0]
            same(dleaf, expected)
            leaf.requires_grad_(False)

    @pytest.mark.parametrize("shape", [(37, 50), (3, 10, 9, 9)], ids=str)
    def test_blocks_do_not_show(self, shape, monkeypatch):
        z, values = torch.randn(shape), torch.rand(shape)
        lam, index = torch.rand(shape[0]), torch.randint(0, shape[0], (shape[0],))
        rows = reference.mix(numpy(values), numpy(lam), numpy(index))
        for block_bytes in (2**20, 2**10):
            monkeypatch.setattr(_torch.sizes, "BINARY_BLOCK_BYTES", block_bytes)
            with fastmix.backend("torch"):
                for reduction in ("mean", "none"):
                    check(z, MixedRows(values, lam, index), rows, None, reduction=reduction, label_smoothing=0.1)

    @pytest.mark.parametrize("shape", [(512, 5000), (2, 64, 200, 200)], ids=str)
    def test_no_mixed_target_is_made(self, shape):
        """On the CPU too, where blocks are mixed that fit the cache, of rows and of pixels."""
        sizes = []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
                    sizes.append(out.untyped_storage().nbytes())
                return out

        z, values = torch.randn(shape), torch.rand(shape)
        given = {t.untyped_storage().data_ptr() for t in (z, values)}
        mixing = torch.rand(shape[0]), torch.randperm(shape[0])
        with Sizes():
            _torch.dense_bce_fwd(z, values, *mixing, None, None, (0.1, None, "mean", "mean"), False)
        assert 0 < max(sizes) <= 2 * _torch.sizes.BINARY_BLOCK_BYTES
