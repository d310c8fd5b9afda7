"""How the losses' kernels walk over rows of logits: odd rows in whole vectors, many classes in parts, pixels, MixedRows."""

import itertools

import numpy as np
import pytest
import torch
from conftest import NO_TRITON, TRITON
from numerics import FLOATS, assert_close, numpy, target_of
from test_properties import guarded_allocations
from test_soft_cross_entropy import check

import fastmix
from fastmix import MixedRows, SoftTarget, _torch, _warmup, reference

if TRITON:
    from fastmix.kernels import _class_tiles, _launch

ODD = [*range(1, 26, 4), 15, 16, 31, 34, 63, 70, 101]


@pytest.fixture
def windows(device, monkeypatch):
    """Rows of any length are taken in whole vectors and two ends, wherever they start."""
    if TRITON:
        monkeypatch.setattr(_class_tiles, "WINDOW_BYTES", 0)
    return device


def placed(values, dtype, offset, stride, device):
    """Values [N, C] so many elements behind a boundary, rows so far apart, among NaNs."""
    room = torch.full((offset + len(values) * stride + 64,), float("nan"), dtype=dtype, device=device)
    z = room[offset:].as_strided(values.shape, (stride, 1))
    z.copy_(values)
    return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["k-hot", "dense"])
def test_every_phase_and_length(kind, dtype, windows):
    """Each row starts somewhere else; nothing beside it is looked at or written."""
    for n, C in enumerate(ODD):
        for offset, stride in ((0, C), (n % 5, C), (0, C + 1 + n % 3)):
            z = placed(3 * torch.randn(3, C), dtype, offset, stride, windows)
            e = 0.1 * (n % 2)
            weight = (torch.rand(C, device=windows) + 0.1).to(torch.float64 if dtype == torch.float64 else torch.float32)
            target, oracle_target, leaf = target_of(kind, z.shape, 2, dtype, windows)
            with guarded_allocations():
                check(z, target, oracle_target, leaf, weight=weight if n % 3 == 0 else None, label_smoothing=e)


@pytest.mark.skipif(not TRITON, reason=NO_TRITON)
def test_odd_rows_are_taken_in_windows():
    """Which rows the tests of this file are about."""
    for dtype, vector in ((torch.float32, 4), (torch.bfloat16, 8)):
        z = torch.zeros(4, 1001, dtype=dtype)
        even = torch.zeros(4, 1000, dtype=dtype)
        for tensors, vectors, wide in (
            ((z, z.clone()), vector, True),
            ((even,), 1, True),
            ((z[:, :1000], even), 1, False),  # they drift apart
            ((z[:, ::2],), 1, False),
        ):
            how = _class_tiles.shared_layout(*map(_class_tiles.View, tensors))
            assert (how.vector, how.wide) == (vectors, wide)


@pytest.mark.parametrize("C", [37, 1001])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_at_once(dtype, C, device):
    """16 components, smoothing, class weights, ignored components and rows, an upstream for each row, all gradients."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    z = (3 * torch.randn(5, C)).to(dtype).to(device)
    target, _, leaf = target_of("k-hot", z.shape, 16, dtype, device)
    target.classes[1, ::2] = -100
    target.classes[3] = -100
    oracle_target = numpy(target.classes), numpy(target.weights)
    weight = (torch.rand(C, device=device) + 0.1).to(accumulator)
    for reduction in ("none", "mean"):
        leaf.grad = None
        upstream = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5], dtype=accumulator, device=device)
        check(z, target, oracle_target, leaf, upstream if reduction == "none" else None, weight=weight, label_smoothing=0.1,
              reduction=reduction)  # fmt: skip


def both_plans(monkeypatch):
    """A row shared out over programs, and a program for each row."""
    for few in (256, 0) if TRITON else ():
        monkeypatch.setattr(_launch, "FEW_ROWS", few)
        yield few
    if not TRITON:
        yield 0


@pytest.mark.parametrize(("C", "dtype"), [(40000, torch.bfloat16), (40001, torch.bfloat16), (32003, torch.float32)], ids=str)
def test_rows_beyond_a_tile(C, dtype, device, monkeypatch):
    z = (3 * torch.randn(2, C)).to(dtype).to(device)
    weight = torch.rand(C, device=device) + 0.1
    for _ in both_plans(monkeypatch):
        for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
            target, oracle_target, leaf = target_of("k-hot", z.shape, device=device)
            check(z, target, oracle_target, leaf, **options)


def test_hostile_rows_beyond_a_tile(device, monkeypatch):
    """Masked classes in whole parts, an infinity and a NaN in their own rows only, a row with nothing to learn; the same bits."""
    inf = float("inf")
    z = torch.randn(5, 40000, device=device)
    z[0, :39990] = -inf
    z[1, 7] = inf
    z[2, 39999] = float("nan")
    z[3] = -inf
    y = torch.tensor([39995, 3, 3, -100, 20000], device=device)
    target = SoftTarget(y[:, None], torch.ones(5, 1, device=device))
    results = []
    for _ in both_plans(monkeypatch):
        for _ in range(2):
            logits = z.clone().requires_grad_()
            loss = fastmix.soft_cross_entropy(logits, target, reduction="none")
            loss.sum().backward()
            results.append((loss.detach(), logits.grad))
            assert torch.equal(torch.isfinite(loss), torch.tensor([True, False, False, True, True], device=device))
            assert torch.isnan(logits.grad[1:3]).all()
            assert torch.isfinite(logits.grad[[0, 4]]).all()
            assert (logits.grad[0, :39990] == 0).all()
            assert (logits.grad[3] == 0).all()
        torch.testing.assert_close(results[-1], results[-2], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(results[0], results[-1], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.skipif(not TRITON, reason=NO_TRITON)
def test_rows_are_shared_out_where_they_are_few_and_long():
    assert _launch.class_parts(8, 262144, 32768, False) == 32
    assert _launch.class_parts(1, 40001, 16384, False) == 5
    assert _launch.class_parts(8, 32768, 32768, False) == 0  # a tile holds it
    assert _launch.class_parts(8, 1000, 32, True) == 0  # pixels are many
    parts = {rows: _launch.class_parts(rows, 131072, 32768, False) for rows in (1, 7, 255, 256, 5000)}
    assert _warmup.MANY_ROWS >= _launch.FEW_ROWS  # both ways are warmed up
    for dtype, wide, vector, operands in itertools.product(FLOATS, (True, False), (1, 8), (1, 2)):
        tile = _launch.class_tile(_warmup.MANY_CLASSES, False, wide, vector, dtype, operands=operands)
        assert _launch.class_parts(1, _warmup.MANY_CLASSES, tile[1], False) == 0
    assert parts == {1: 16, 7: 16, 255: 16, 256: 0, 5000: 0}  # two programs to compile, whatever the batch size


@pytest.mark.parametrize("shape", [(2, 21, 8, 8), (1, 150, 4, 4), (1, 600, 4, 4), (2, 21, 5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pixels(shape, dtype, device):
    """Maps whose pixels are whole vectors, and others; classes that a tile holds, and more."""
    z = (3 * torch.randn(shape)).to(dtype).to(device)
    weight = (torch.rand(shape[1], device=device) + 0.1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for kind, options in itertools.product(
        ("k-hot per pixel", "indices", "dense"), ({}, {"weight": weight, "label_smoothing": 0.1})
    ):
        target, oracle_target, leaf = target_of(kind, shape, 2, dtype, device)
        check(z, target, oracle_target, leaf, **options)


class TestMixedRows:
    """Values are mixed where the loss reads them."""

    @pytest.mark.parametrize("values_dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("shape", [(6, 9), (5, 70), (3, 5, 4, 4)], ids=str)
    def test_matches_the_oracle(self, shape, dtype, values_dtype, device, monkeypatch):
        if TRITON:
            monkeypatch.setattr(_class_tiles, "WINDOW_BYTES", 0)
        N, C = shape[:2]
        z = torch.randn(shape).to(dtype).to(device).requires_grad_()
        values = torch.rand(shape).to(values_dtype).to(device)
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        lam = torch.rand(N, dtype=torch.float64 if values_dtype == torch.float64 else torch.float32, device=device)
        index = torch.randint(0, N, (N,), device=device)
        weight = (torch.rand(C, device=device) + 0.1).to(accumulator)
        for share, options in ((lam, {}), (lam[0], {"weight": weight, "label_smoothing": 0.1, "ignore_index": 2})):
            loss = fastmix.soft_cross_entropy(z, MixedRows(values, share, index), reduction="none", **options)
            upstream = torch.randn_like(loss)
            (dz,) = torch.autograd.grad(loss, z, upstream)
            rows = reference.mix(numpy(values), np.broadcast_to(numpy(share), N), numpy(index))
            oracle = {**options, "weight": numpy(weight) if options else None, "reduction": "none"}
            size = np.abs(rows).sum(1).max() * 8
            factor = (
                1e6 if dtype == torch.float64 and values_dtype != torch.float64 else 1.0
            )  # lam is float32, and so its complement
            assert_close(loss, reference.soft_cross_entropy(numpy(z), rows, **oracle), accumulator, size, factor)
            expected = reference.soft_cross_entropy_grad(numpy(z), rows, numpy(upstream), **oracle)[0]
            assert_close(dz, expected, dtype, np.abs(expected).sum(1, keepdims=True) + np.abs(numpy(upstream)).max(), factor)

    def test_a_weight_of_0_is_not_looked_at(self, device):
        values = torch.rand(3, 70, device=device)
        values[1] = float("nan")
        lam, index = torch.tensor([1.0, 0.0, 0.5], device=device), torch.tensor([1, 2, 0], device=device)
        z = torch.randn(3, 70, device=device, requires_grad=True)
        loss = fastmix.soft_cross_entropy(z, MixedRows(values, lam, index), reduction="none")
        loss.sum().backward()
        rows = torch.stack((values[0], values[2], (values[2] + values[0]) / 2))
        torch.testing.assert_close(loss, fastmix.soft_cross_entropy(z, rows, reduction="none"))
        assert torch.isfinite(z.grad).all()

    def test_a_partner_out_of_range_where_the_host_does_not_look(self, device, monkeypatch):
        z, values = torch.randn(4, 6, device=device, requires_grad=True), torch.rand(4, 6, device=device)
        target = MixedRows(
            values, torch.tensor([0.5, 0.5, 1.0, 0.5], device=device), torch.tensor([1, 4, -3, 0], device=device)
        )
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"target.index: expected a partner in \[0, 4\), got 4 in row 1"):
                fastmix.soft_cross_entropy(z, target)
        monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
        loss = fastmix.soft_cross_entropy(z, target, reduction="none")
        grad = torch.autograd.grad(loss.sum(), z)[0]
        assert torch.equal(torch.isnan(loss), torch.tensor([False, True, True, False], device=device))
        assert torch.isnan(grad[1:3]).all()
        assert torch.isfinite(grad[[0, 3]]).all()

    def test_retained_graph_and_upstream(self, device):
        z = torch.randn(5, 9, device=device, requires_grad=True)
        target = MixedRows(torch.rand(5, 9, device=device), 0.25, torch.tensor([1, 2, 3, 4, 0], device=device))
        loss = fastmix.soft_cross_entropy(z, target)
        one, two, again = (torch.autograd.grad(f * loss, z, retain_graph=True)[0] for f in (1, 2, 1))
        torch.testing.assert_close(two, 2 * one)
        assert torch.equal(one, again)

    def test_no_mixed_target_is_made(self):
        """On the CPU too, where blocks are mixed that fit the cache."""
        sizes = []

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
                    sizes.append(out.untyped_storage().nbytes())
                return out

        z, values = torch.randn(512, 5000), torch.rand(512, 5000)
        given = {t.untyped_storage().data_ptr() for t in (z, values)}
        mixing = torch.rand(512), torch.randperm(512)
        with Sizes():
            _torch.dense_ce_fwd(z, values, *mixing, None, (-100, 0.1, "mean"), False)
        assert 0 < max(sizes) <= 2 * _torch.sizes.LOSS_BLOCK_BYTES
