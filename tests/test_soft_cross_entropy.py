"""fastmix.soft_cross_entropy on every backend against the oracle: values, gradients to logits, weights and dense targets."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NO_TRITON, TRITON
from drawn import (
    INFINITE,
    NAN,
    agreeing_forms,
    coefficients,
    drawn_target,
    drawn_upstream,
    dtypes,
    generator,
    given,
    layout_pairs,
    layout_triples,
    logits_shapes,
    numpy_dense,
    onehot,
    partners,
    partners_of,
    reductions,
    run,
    seeds,
    small_logits_shapes,
    smoothings,
    st,
    target_kinds,
    to,
)
from memory import same_bits
from numerics import FLOATS, LAMBDA, RELATIVE, ULP, accumulator, assert_close, finite, numpy, target_of
from plain import interpreted
from test_mix import drawn_batch, mix_and_gradients
from test_streams import Nothing, Operators, kernels, launches  # noqa: F401 (a fixture)

import fastmix
from fastmix import MixedRows, SoftTarget, _warmup, reference

if TRITON:
    from fastmix.kernels import _class_tiles, _launch, _loss_mean, soft_cross_entropy


SHAPES = [(5, 10), (3, 1), (4, 1000), (2, 1023), (2, 6, 3, 5), (3, 7, 4), (1, 2), (2, 3, 2, 2, 2), (0, 4), (2, 4, 0)]
REDUCTIONS = ("mean", "sum", "none")


def term_size(oracle_target, upstream, z, options):
    """The size of the largest term that a row's gradient is made of; terms may cancel, as for one class."""
    if isinstance(oracle_target, tuple):
        mass = np.abs(oracle_target[1])
    else:
        mass = np.ones(1) if np.issubdtype(oracle_target.dtype, np.integer) else np.abs(oracle_target)
    weight = options.get("weight")
    mass = mass * (1 if weight is None else np.max(weight))
    rows = max(z.numel() // z.shape[1], 1) if options.get("reduction", "mean") == "mean" else 1
    return mass.max(initial=0) * np.abs(numpy(upstream)).max(initial=0) / rows


def check(z, target, oracle_target, leaf, upstream=None, **options):
    z = z.detach().requires_grad_()
    before = z.detach().clone()
    loss = fastmix.soft_cross_entropy(z, target, **options)
    if upstream is None:
        upstream = torch.randn(loss.shape, dtype=loss.dtype, device=loss.device)
    loss.backward(upstream)
    wide = accumulator(z.dtype)
    assert loss.dtype == wide
    oracle = {**options, "weight": None if options.get("weight") is None else numpy(options["weight"])}
    expected = reference.soft_cross_entropy(numpy(z), oracle_target, **oracle)
    size = np.abs(expected[np.isfinite(expected)]).max(initial=1.0)
    assert_close(loss, expected, wide, size * (1 + len(z)))
    dz, da = reference.soft_cross_entropy_grad(numpy(z), oracle_target, numpy(upstream), **oracle)
    terms = np.maximum(np.abs(dz).sum(axis=1, keepdims=True), term_size(oracle_target, upstream, z, oracle))
    assert_close(z.grad, dz, z.dtype, np.where(np.isfinite(terms), terms, 1.0))
    if leaf is not None:
        terms = np.abs(da)
        if da.shape != tuple(leaf.shape):
            da, terms = (t.reshape(*leaf.shape, -1).sum(-1) for t in (da, terms))
        value = size * np.abs(numpy(upstream)).max(initial=0)  # it may cancel, as for one component under a mean
        bound = LAMBDA[leaf.dtype] * (terms.max(initial=0) + value)
        if leaf.dtype == torch.bfloat16:
            bound = bound + 2**-7 * np.abs(da)
        if leaf.dtype == torch.float16:
            bound = bound + 2**-10 * np.abs(da) + 2**-24
        assert np.all(np.abs(numpy(leaf.grad) - da) <= bound)
    assert torch.equal(z, before)
    return loss


@pytest.mark.thinned(3)
@pytest.mark.slow_interpreted
@pytest.mark.trap("Liger-Kernel#1251", "vision#9215")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["k-hot", "k-hot per pixel", "indices", "dense"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape, kind, dtype, device):
    """Every reduction, with and without smoothing and class weights: all of them on torch, in turns on the interpreter."""
    z = (3 * torch.randn(shape)).to(dtype).to(device)
    wide = accumulator(dtype)
    weight = torch.rand(shape[1], dtype=wide, device=device) + 0.1
    for n, (reduction, e, w) in enumerate(itertools.product(REDUCTIONS, (0.0, 0.1), (None, weight))):
        if (interpreted(device) or shape[1] == 1000) and (n + len(kind) + len(shape) + FLOATS.index(dtype)) % 3:
            continue
        target, oracle_target, leaf = target_of(kind, shape, 1 + n % 3, dtype, device)
        check(z, target, oracle_target, leaf, weight=w, label_smoothing=e, reduction=reduction)


@pytest.mark.slow_interpreted
@pytest.mark.trap("Liger-Kernel#198", "vision#9222")
@pytest.mark.parametrize("kind", ["k-hot", "indices", "dense"])
def test_ignored_classes(kind, device):
    for ignore_index, reduction in itertools.product((-100, -1, 3, 255), REDUCTIONS):
        z = torch.randn(8, 5, device=device)
        target, oracle_target, leaf = target_of(kind, z.shape, device=device)
        if kind != "dense":
            classes = target.classes if kind == "k-hot" else target
            classes[2:4] = ignore_index  # whole rows
            if kind == "k-hot":
                classes[4:6, 1] = ignore_index  # single components
                oracle_target = numpy(classes), oracle_target[1]
            else:
                oracle_target = numpy(classes)
        check(z, target, oracle_target, leaf, ignore_index=ignore_index, reduction=reduction, label_smoothing=0.1)


@pytest.mark.slow_interpreted
@pytest.mark.trap("unaligned-rows")
@pytest.mark.parametrize("C", [16385, 21841, 40000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_classes(C, dtype, device):
    """Rows beyond one tile, odd ones too."""
    z = (3 * torch.randn(2, C)).to(dtype).to(device)
    for kind in ("k-hot", "dense"):
        target, oracle_target, leaf = target_of(kind, z.shape, device=device)
        check(z, target, oracle_target, leaf)


def test_one_class_has_nothing_to_learn(device):
    for e in (0.0, 0.1):
        z = torch.randn(5, 1, device=device, requires_grad=True)
        y = torch.zeros(5, dtype=torch.int64, device=device)
        loss = fastmix.soft_cross_entropy(z, y, label_smoothing=e)
        loss.backward()
        assert loss == 0
        assert (z.grad == 0).all()


@pytest.mark.slow_interpreted
def test_262144_classes(device):
    z = torch.randn(1, 262144, device=device)
    target = SoftTarget(torch.tensor([[5, 262143]], device=device), torch.tensor([[0.3, 0.7]], device=device))
    check(z, target, (numpy(target.classes), numpy(target.weights)), None)


def test_first_tiles_masked_out(device):
    """An online sum that starts with -inf must not make NaN of it."""
    z = torch.full((1, 40000), -float("inf"), device=device)
    z[0, 39990:] = torch.randn(10, device=device)
    target = SoftTarget(torch.tensor([[39999, 39995]], device=device), torch.tensor([[0.3, 0.7]], device=device))
    loss = check(z, target, (numpy(target.classes), numpy(target.weights)), None)
    assert torch.isfinite(loss)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("e", [0.0, 0.2])
def test_is_torchs_cross_entropy_on_its_own_inputs(e, reduction, device):
    """Class indices and probabilities by torch's rules, in float64 against torch itself."""
    for shape in ((7, 5), (3, 5, 4, 2)):
        z = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        y = torch.randint(0, 5, (shape[0], *shape[2:]), device=device)
        y.view(-1)[1] = -100
        probabilities = torch.randn(shape, dtype=torch.float64, device=device).softmax(1)
        for w in (None, torch.rand(5, dtype=torch.float64, device=device) + 0.1):
            for target in (y, probabilities):
                options = {"weight": w, "label_smoothing": e, "reduction": reduction}
                ours, torchs = fastmix.soft_cross_entropy(z, target, **options), F.cross_entropy(z, target, **options)
                torch.testing.assert_close(ours, torchs)
                g = torch.randn_like(ours)
                torch.testing.assert_close(torch.autograd.grad(ours, z, g), torch.autograd.grad(torchs, z, g))


def test_lambda_gradient_is_the_difference_of_two_logits(device):
    z = torch.randn(5, 7, dtype=torch.float64, device=device)
    lam = torch.tensor([0.0, 1.0, 0.3, 0.5, 1.2], dtype=torch.float64, device=device, requires_grad=True)
    y, index = torch.randint(0, 7, (5,), device=device), torch.randperm(5, device=device)
    for e in (0.0, 0.1):
        loss = fastmix.soft_cross_entropy(z, fastmix.Mix(lam, index).target(y), label_smoothing=e, reduction="sum")
        rows = torch.arange(5, device=device)
        expected = -(1 - e) * (z[rows, y] - z[rows, y[index]])
        torch.testing.assert_close(torch.autograd.grad(loss, lam)[0], expected)


class TestHostile:
    def test_masked_classes(self, device):
        inf = float("inf")
        z = torch.tensor([[1.0, -inf, 2.0], [1.0, -inf, 2.0], [1.0, -inf, 2.0], [-inf, -inf, 3.0]], device=device)
        classes = torch.tensor([[0, 2], [0, 1], [0, 1], [2, 0]], device=device)
        weights = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.5, 0.5], [1.0, 0.0]], device=device)
        zs = z.clone().requires_grad_()
        loss = fastmix.soft_cross_entropy(zs, SoftTarget(classes, weights), reduction="none")
        loss.sum().backward()
        expected = reference.soft_cross_entropy(numpy(z), (numpy(classes), numpy(weights)), reduction="none")
        np.testing.assert_allclose(numpy(loss), expected, rtol=1e-6)
        assert numpy(loss)[2] == inf
        assert torch.isfinite(zs.grad).all()
        assert (zs.grad[:2, 1] == 0).all()
        assert zs.grad[2, 1] == -0.5
        dense = SoftTarget(classes, weights).dense(3)
        np.testing.assert_allclose(numpy(fastmix.soft_cross_entropy(z, dense, reduction="none")), expected, rtol=1e-6)

    def test_ignored_components_have_no_gradient_even_beside_an_infinite_loss(self, device):
        z = torch.tensor([[0.0, -float("inf"), 1.0], [0.0, 1.0, 2.0]], device=device)
        a = torch.tensor([[0.5, 0.5], [0.5, 0.5]], device=device, requires_grad=True)
        classes = torch.tensor([[1, -100], [0, 1]], device=device)
        fastmix.soft_cross_entropy(z, SoftTarget(classes, a)).backward()
        assert a.grad[0, 1] == 0

    def test_masked_classes_with_smoothing_are_torchs(self, device):
        z = torch.tensor([[1.0, -float("inf"), 2.0]], device=device, requires_grad=True)
        y = torch.tensor([0], device=device)
        ours, torchs = (f(z, y, label_smoothing=0.1) for f in (fastmix.soft_cross_entropy, F.cross_entropy))
        assert ours == torchs == float("inf")
        torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (ours, torchs)))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_ignored_rows_may_hold_anything(self, reduction, device):
        z = torch.randn(4, 6, device=device)
        z[1] = float("nan")
        z.requires_grad_()
        y = torch.tensor([1, -100, 2, 3], device=device)
        loss = fastmix.soft_cross_entropy(z, y, reduction=reduction)
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(z.grad).all()
        assert (z.grad[1] == 0).all()

    @pytest.mark.parametrize("scale", [1e4, 1e30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_huge_logits(self, scale, dtype, device):
        """lse - z as a difference of large numbers would lose everything."""
        z = (torch.randn(5, 8) * scale).to(dtype).to(device)
        z[0] = scale
        for kind in ("k-hot", "dense"):
            target, oracle_target, _ = target_of(kind, z.shape, device=device)
            check(z, target, oracle_target, None)

    def test_precision_at_an_offset(self, device):
        """A common offset of 1e4 costs nothing: max - z is exact there, while lse - z is good to 1e-3."""
        z = torch.tensor([[0.0, 1.0, 2.0]], device=device)
        target = SoftTarget(torch.tensor([[0, 1]], device=device), torch.tensor([[0.5, 0.5]], device=device))
        near, far = (fastmix.soft_cross_entropy(t, target) for t in (z, z + 1e4))
        assert near == far

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_nothing_to_average(self, reduction, device):
        for z, y in (
            (torch.randn(3, 4, device=device), torch.full((3,), -100, device=device)),
            (torch.randn(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device)),
        ):
            z.requires_grad_()
            ours, torchs = (f(z, y, reduction=reduction) for f in (fastmix.soft_cross_entropy, F.cross_entropy))
            torch.testing.assert_close(ours, torchs, equal_nan=True)
            ours.sum().backward()
            assert (z.grad == 0).all()


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"target": torch.zeros(4, 2)}, ValueError, r"probabilities in the logits' shape \[4, 3\]"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int"),
        ({"ignore_index": None}, TypeError, "ignore_index: .*NoneType"),
        ({"ignore_index": True}, TypeError, "ignore_index: .*True"),
        ({"ignore_index": torch.tensor(1)}, TypeError, "ignore_index: .*tensor"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an int of 64 bits, got 9223372036854775808"),
    ],
    ids=str,
)
def test_bad_input(change, kind, words):
    arguments = {"logits": torch.zeros(4, 3), "target": torch.tensor([0, 1, 2, 0]), **change}
    with pytest.raises(kind, match=words):
        fastmix.soft_cross_entropy(**arguments)


@pytest.mark.trap("flash-linear-attention#1080")
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_beyond_32_bit_offsets(device):
    z = torch.empty(20000, 2**17 + 1, dtype=torch.bfloat16, device=device).normal_()
    y = torch.randint(0, z.shape[1], (20000,), device=device)
    ours = fastmix.soft_cross_entropy(z, y, reduction="none")[-4:]
    torch.testing.assert_close(ours, F.cross_entropy(z[-4:].float(), y[-4:], reduction="none"))


# Tiles


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


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    ("dtype", "C"), [*((dtype, 37) for dtype in FLOATS), (torch.bfloat16, 1001), (torch.float64, 1001)], ids=str
)
def test_all_at_once(dtype, C, device):
    """16 components, smoothing, class weights, ignored components and rows, an upstream for each row, all gradients."""
    wide = accumulator(dtype)
    z = (3 * torch.randn(5, C)).to(dtype).to(device)
    target, _, leaf = target_of("k-hot", z.shape, 16, dtype, device)
    target.classes[1, ::2] = -100
    target.classes[3] = -100
    oracle_target = numpy(target.classes), numpy(target.weights)
    weight = (torch.rand(C, device=device) + 0.1).to(wide)
    for reduction in ("none", "mean"):
        leaf.grad = None
        upstream = torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5], dtype=wide, device=device)
        check(z, target, oracle_target, leaf, upstream if reduction == "none" else None, weight=weight, label_smoothing=0.1,
              reduction=reduction)  # fmt: skip


def both_plans(monkeypatch):
    """A row shared out over programs, and a program for each row."""
    for few in (256, 0) if TRITON else ():
        monkeypatch.setattr(_launch, "FEW_ROWS", few)
        yield few
    if not TRITON:
        yield 0


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(("C", "dtype"), [(40000, torch.bfloat16), (40001, torch.bfloat16), (32003, torch.float32)], ids=str)
def test_rows_beyond_a_tile(C, dtype, device, monkeypatch):
    z = (3 * torch.randn(2, C)).to(dtype).to(device)
    weight = torch.rand(C, device=device) + 0.1
    for _ in both_plans(monkeypatch):
        for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
            target, oracle_target, leaf = target_of("k-hot", z.shape, device=device)
            check(z, target, oracle_target, leaf, **options)


@pytest.mark.slow_interpreted
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


# A mean on Triton: its divisor summed up in one launch, everything else in a second one


@pytest.mark.no_poison
@pytest.mark.parametrize("kind", ["k-hot", "indices"])
@pytest.mark.parametrize("shape", [(40, 10), (4, 1000), (2, 21, 3, 5)], ids=str)
def test_a_mean_is_two_launches_and_its_gradient_one(kernels, shape, kind):  # noqa: F811
    """And no operator of torch's that would be a kernel on a GPU."""
    z = torch.randn(shape, requires_grad=True)
    target, _, leaf = target_of(kind, shape)
    if leaf is not None:
        target = SoftTarget(target.classes, leaf.detach())  # else a copy of the loss is kept for the gradient to the weights

    def forwards(reduction="mean"):
        return fastmix.soft_cross_entropy(z, target, label_smoothing=0.1, reduction=reduction)

    def without_kernels(call):
        from triton.runtime.interpreter import InterpretedFunction

        with pytest.MonkeyPatch.context() as patch, Operators() as counted:
            patch.setattr(InterpretedFunction, "__getitem__", Nothing.__getitem__)
            patch.setattr(fastmix._check, "transformed", lambda: False)  # the mode that counts is no reason to trace
            patch.setattr(fastmix._check, "in_range", lambda *args: None)  # on a GPU labels are not looked at
            call()
        return [name for name in counted.found if "unsqueeze" not in name]

    with fastmix.backend("triton"):
        assert launches(forwards) == ["_mass_kernel", "_soft_ce_fwd_kernel"]
        assert launches(lambda: forwards("none")) == ["_soft_ce_fwd_kernel"]
        assert without_kernels(forwards) == []
        loss = forwards()
        assert launches(lambda: torch.autograd.grad(loss, z)) == ["_soft_ce_bwd_kernel"]


def mean_and_oracle(z, target, oracle_target):
    loss = fastmix.soft_cross_entropy(z, target)
    assert_close(loss, reference.soft_cross_entropy(numpy(z), oracle_target), loss.dtype, 1 + math.log(z.shape[1]))
    return loss


@pytest.mark.skipif(not TRITON, reason=NO_TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_divisor_of_more_parts_than_programs(dtype, device, monkeypatch):
    """Some programs then sum up two parts, and some one."""
    monkeypatch.setattr(_loss_mean, "DENOMINATOR_ROWS", 2)
    z = torch.randn(2 * _launch.DENOMINATOR_PROGRAMS + 3, 3, dtype=dtype, device=device)
    target, oracle_target, leaf = target_of("k-hot", z.shape, device=device)
    check(z, target, oracle_target, leaf)


@pytest.mark.skipif(not TRITON, reason=NO_TRITON)
@pytest.mark.parametrize("most", [0, 2, 3])
@pytest.mark.parametrize("shape", [(3, 700), (300, 10), (3, 5, 20)], ids=str)
def test_a_mean_over_more_programs_than_the_last_one_adds_up(most, shape, device, monkeypatch):
    """Three programs, added up by the last of them or by torch."""
    monkeypatch.setattr(_loss_mean, "ADDED_PROGRAMS", most)
    z, weight = torch.randn(shape, device=device), torch.rand(shape[1], device=device) + 0.1
    for options in ({}, {"label_smoothing": 0.1, "weight": weight}):
        target, oracle_target, leaf = target_of("k-hot", z.shape, device=device)
        check(z, target, oracle_target, leaf, **options)


@pytest.mark.slow_interpreted
def test_a_mean_over_more_programs_than_are_added_at_a_time(device, monkeypatch):
    """Of one loss more: the rest of the last block counts as 0."""
    rows = 1025
    if interpreted(device):  # compiled programs keep the block that they were compiled with
        monkeypatch.setattr(_loss_mean, "ADDED_BLOCK", _loss_mean.VECTOR)
        rows = _loss_mean.VECTOR.value + 1
    z = torch.randn(rows, 515, device=device)
    target, oracle_target, _ = target_of("k-hot", z.shape, device=device)
    mean_and_oracle(z, target, oracle_target)


class Later:
    """A kernel that is launched when the test says so."""

    def __init__(self, kernel):
        self.kernel, self.waiting = kernel, []

    def __getitem__(self, grid):
        launch = self.kernel[grid]
        return lambda *args, **options: self.waiting.append(lambda: launch(*args, **options))


def test_two_means_at_once_share_nothing(kernels, monkeypatch):  # noqa: F811
    """As on two streams, or in two graphs: the second call's divisor is summed up before the first call's loss, and its loss is
    formed first."""
    calls = []
    for scale in (1.0, 5.0):
        z = scale * torch.randn(300, 10)
        target, (classes, weights), _ = target_of("k-hot", z.shape)
        calls.append((z, SoftTarget(target.classes, target.weights.detach() * scale), (classes, weights * scale)))
    later = Later(soft_cross_entropy._soft_ce_fwd_kernel)
    with fastmix.backend("triton"):
        alone = [mean_and_oracle(*call) for call in calls]
        monkeypatch.setattr(soft_cross_entropy, "_soft_ce_fwd_kernel", later)
        together = [fastmix.soft_cross_entropy(z, target) for z, target, _ in calls]
    assert len(later.waiting) == 2
    for launch in reversed(later.waiting):
        launch()
    assert all(map(same_bits, together, alone))


# Properties on drawn inputs: symmetries, exactness, agreement of all forms of a target, and memory that is left alone. Expected
# values are the oracle's, or another call's of which the mathematics says that it is the same.


def as_target(target):
    return SoftTarget(*target) if isinstance(target, tuple) else target


def loss_and_gradients(logits, target, upstream, **options):
    """(loss, gradient to the logits[, gradient to weights or probabilities])"""
    logits = logits.detach().requires_grad_()
    leaves = [logits]
    if isinstance(target, tuple):
        target = target[0], target[1].detach().requires_grad_()
        leaves.append(target[1])
    elif target.is_floating_point():
        target = target.detach().requires_grad_()
        leaves.append(target)
    loss = fastmix.soft_cross_entropy(logits, as_target(target), **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


class Oracle:
    """What the oracle says of a loss, and how large the terms are that it and its gradients are made of."""

    def __init__(self, logits, target, upstream, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
        z, mean = numpy(logits), reduction == "mean"
        target = tuple(map(numpy, target)) if isinstance(target, tuple) else numpy(target)
        w = np.ones(z.shape[1]) if weight is None else numpy(weight)
        options = {"weight": w, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        inner = z.shape[:1] + z.shape[2:]
        self.loss = reference.soft_cross_entropy(z, target, reduction=reduction, **options)
        self.dz, self.da = reference.soft_cross_entropy_grad(z, target, numpy(upstream), reduction=reduction, **options)
        if isinstance(target, np.ndarray) and target.dtype.kind == "i":
            target = target[:, None], np.ones((len(target), 1))
        if isinstance(target, tuple):
            classes, weights = target
            weights = np.abs(weights.reshape(weights.shape + (1,) * (classes.ndim - weights.ndim)) + 0 * classes)
            units = np.where(classes == ignore_index, 0.0, w.take(classes, mode="clip"))
            D = np.abs((target[1].reshape(target[1].shape + (1,) * (classes.ndim - target[1].ndim)) * units).sum())
            absolute, ones, mass = (classes, weights), (classes, np.ones_like(weights)), weights.sum(axis=1)
        else:
            absolute, ones, D = np.abs(target), np.zeros_like(target), math.prod(inner)
            mass = absolute.sum(axis=1) + label_smoothing
        mass = mass * w.max()
        rows, each = (finite(reference.soft_cross_entropy(z, t, reduction="none", **options)) for t in (absolute, ones))
        share = finite(np.abs(numpy(upstream)) / (D if mean else 1.0)) * np.ones(inner)
        self.size = finite((rows + mass).sum() / D) if mean else rows + mass if reduction == "none" else (rows + mass).sum()
        each = each + w.max() * (1 + (np.abs(finite(self.loss)) if mean else 0))
        self.dz_size = (mass * share)[:, None]
        self.da_size = (each * share)[:, None] + np.abs(finite(self.da))

    def check(self, logits, target, loss, dz, da=None):
        wide = accumulator(logits.dtype)
        assert (loss.dtype, dz.dtype) == (wide, logits.dtype)
        assert_close(loss, self.loss, wide, self.size)
        assert_close(dz, self.dz, logits.dtype, self.dz_size)
        if da is None:
            return
        leaf = target[1] if isinstance(target, tuple) else target
        assert da.dtype == leaf.dtype
        pixels = tuple(range(leaf.dim(), self.da.ndim))  # that share a weight
        expected, size = (t.sum(axis=pixels) if pixels else t for t in (self.da, self.da_size))
        dtype = leaf.dtype if leaf.dtype in ULP else wide if leaf.dtype == torch.float64 else torch.float32
        assert_close(da.to(dtype), expected, dtype, size, LAMBDA[dtype] / RELATIVE[dtype])


def loss_in_memory(device, logits, target, upstream, layouts, weight=None, **options):
    """loss_and_gradients in memory that is watched, each of logits, target and upstream in its layout, held to the oracle."""
    parts = list(target) if isinstance(target, tuple) else [target]

    def op(logits, upstream, weight, *parts):
        return loss_and_gradients(logits, tuple(parts) if parts[1:] else parts[0], upstream, weight=weight, **options)

    inputs = [(logits, layouts[0]), (upstream, layouts[2]), (weight, "misaligned"), *[(part, layouts[1]) for part in parts]]
    (logits, upstream, weight, *parts), results = run(op, device, *inputs)
    target = tuple(parts) if parts[1:] else parts[0]
    Oracle(logits, target, upstream, weight, **options).check(logits, target, *results)


def ignore_some(target, which, ignore_index, rng):
    """Gives some components of a target, or all, the ignored class, in place."""
    if which != "none" and not (isinstance(target, torch.Tensor) and target.is_floating_point()):
        classes = target[0] if isinstance(target, tuple) else target
        share = 0.4 if which == "some" else 1.0
        classes[torch.rand(classes.shape, generator=rng) < share] = ignore_index


ignored = st.sampled_from(["none", "some", "all"])


@given(
    factor=3,
    shape=logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    K=st.sampled_from([2, 1, 3, 5]),
    weighted=st.booleans(),
    smoothing=smoothings,
    reduction=reductions,
    which=ignored,
    ignore_index=st.sampled_from([-100, 0, 1, -1]),
    upstream=st.sampled_from(["randn", "ones", "large"]),
    places=layout_triples,
)
def test_the_loss_is_the_oracles_in_any_memory(
    device, shape, dtype, seed, kind, K, weighted, smoothing, reduction, which, ignore_index, upstream, places
):
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    target = drawn_target(kind, shape, rng, dtype, K=K)
    ignore_some(target, which, ignore_index, rng)
    loss_in_memory(
        device,
        *(logits, target, drawn_upstream(upstream, shape, reduction, rng, dtype), places),
        weight=torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1 if weighted else None,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
    )


@given(
    factor=3,
    shape=logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    scale=st.sampled_from([1e4, 1.0]),
    masked=st.booleans(),
    spoiled=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    reduction=reductions,
    which=ignored,
    places=layout_triples,
)
def test_the_loss_under_stress(
    device, shape, dtype, seed, kind, scale, masked, spoiled, smoothing, weighted, reduction, which, places
):
    """Huge logits, masked classes with and without weight, rows of NaN, ignored rows and nothing but ignored rows, at once."""
    rng = generator(seed)
    logits = (scale * torch.randn(shape, generator=rng)).to(dtype)
    if masked:
        mask = torch.rand(shape, generator=rng)
        logits.masked_fill_((mask < 0.4) & (mask < mask.amax(1, keepdim=True)), -INFINITE)  # one class at least is left
    if spoiled:
        own = torch.rand(shape[:1] + shape[2:], generator=rng).unsqueeze(1)
        logits.masked_fill_(own < 0.2, NAN)
        logits.masked_fill_((own > 0.9) & (torch.rand(shape, generator=rng) < 0.5), INFINITE)
    target = drawn_target(kind, shape, rng, dtype)
    ignore_some(target, which, -100, rng)
    loss_in_memory(
        device,
        *(logits, target, drawn_upstream("randn", shape, reduction, rng, dtype), places),
        weight=torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1 if weighted else None,
        label_smoothing=smoothing,
        reduction=reduction,
    )


def at_rows(target, order):
    return tuple(t[order] for t in target) if isinstance(target, tuple) else target[order]


given_losses = given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
)


@given_losses
def test_rows_and_classes_of_a_loss_may_come_in_any_order(device, shape, dtype, seed, kind, smoothing, weighted, reduction):
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    target = to(drawn_target(kind, shape, rng, dtype), device)
    ignore_some(target, "some", -100, rng)
    weight = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype).to(device)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    oracle = Oracle(logits, target, upstream, weight, **options)
    loss, *gradients = loss_and_gradients(logits, target, upstream, weight=weight, **options)

    order = torch.randperm(shape[0], generator=rng).to(device)
    back = order.argsort()
    permuted = loss_and_gradients(
        logits[order], at_rows(target, order), upstream[order] if upstream.dim() else upstream, weight=weight, **options
    )
    oracle.check(logits, target, permuted[0][back] if upstream.dim() else permuted[0], *[t[back] for t in permuted[1:]])

    order = torch.randperm(shape[1], generator=rng).to(device)
    back = order.argsort()
    classes = target[0] if isinstance(target, tuple) else target
    if classes.is_floating_point():
        renamed = classes[:, order]
    else:
        renamed = torch.where(classes >= 0, back[classes.clamp(min=0)], classes)
    renamed = (renamed, target[1]) if isinstance(target, tuple) else renamed
    weight = None if weight is None else weight[order]
    loss, dz, *da = loss_and_gradients(logits[:, order], renamed, upstream, weight=weight, **options)
    da = [t[:, back] if classes.is_floating_point() else t for t in da]
    oracle.check(logits, target, loss, dz[:, back], *da)


@given_losses
def test_a_rows_shift_changes_no_bit(device, shape, dtype, seed, kind, smoothing, weighted, reduction):
    """Where the shifted logits are exact: max - z is, and lse - z as a difference of large numbers would not be."""
    rng = generator(seed)
    far = {torch.bfloat16: 2**6, torch.float16: 2**9, torch.float32: 2**19, torch.float64: 2**40}[dtype]
    logits = torch.randint(-8, 9, shape, generator=rng).double() / 2
    shifts = torch.randint(-far, far + 1, (shape[0], 1, *shape[2:]), generator=rng).double()
    target = to(drawn_target(kind, shape, rng, dtype), device)
    weight = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype).to(device)
    assert torch.equal((logits + shifts).to(dtype).double(), logits + shifts)
    near, shifted = (
        loss_and_gradients(
            z.to(dtype).to(device), target, upstream, weight=weight, label_smoothing=smoothing, reduction=reduction
        )
        for z in (logits, logits + shifts)
    )
    for a, b in zip(near, shifted, strict=True):
        assert same_bits(a, b)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, weighted=st.booleans(), smoothing=st.sampled_from([0.0, 0.1]))
def test_a_component_of_weight_0_changes_nothing(device, shape, dtype, seed, weighted, smoothing):
    """Whichever class it names, also a masked one; and at lam 1 the loss is that of class indices."""
    rng = generator(seed)
    N, C, *inner = shape
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    first = torch.zeros((N, *inner), dtype=torch.int64)
    others = [torch.randint(0, C, (N, *inner), generator=rng) for _ in range(2)]
    if smoothing == 0 and C > 1:
        others[1] = torch.full_like(first, C - 1)
        logits[:, C - 1] = -INFINITE
    logits, first, others = logits.to(device), first.to(device), [t.to(device) for t in others]
    weight = (torch.rand(C, generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, "none", rng, dtype).to(device)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    for lam in (1.0, 0.0):
        share = torch.tensor([lam, 1 - lam], dtype=accumulator(dtype), device=device).repeat(N, 1)
        results = []
        for other in others:
            pair = (first, other) if lam else (other, first)
            results.append(loss_and_gradients(logits, (torch.stack(pair, 1), share), upstream, **options))
        for a, b in zip(results[0][:2], results[1][:2], strict=True):
            assert torch.equal(a, b)
        kept = 0 if lam else 1
        assert torch.equal(results[0][2][:, kept], results[1][2][:, kept])
        hard = loss_and_gradients(logits, first, upstream, **options)
        assert torch.equal(hard[0], results[0][0])
        Oracle(logits, first, upstream, **options).check(logits, first, *results[0][:2])


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=st.sampled_from(["k-hot", "dense", "k-hot per pixel"]),
    K=st.sampled_from([1, 2, 3, 5]),
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
    power=st.sampled_from([2.0, 0.25, 64.0]),
)
def test_twice_the_weights_are_twice_the_loss(device, shape, dtype, seed, kind, K, smoothing, weighted, reduction, power):
    """To the bit, for powers of two; a mean over components divides it out again. (Smoothed probabilities are affine.)"""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    target = to(drawn_target(kind, shape, rng, dtype, K=K), device)
    smoothing = 0.0 if kind == "dense" else smoothing
    weight = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("ones", shape, reduction, rng, dtype).to(device)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    multiple = target * power if kind == "dense" else (target[0], target[1] * power)
    loss, dz, da = loss_and_gradients(logits, target, upstream, **options)
    loss_multiple, dz_multiple, da_multiple = loss_and_gradients(logits, multiple, upstream, **options)
    divided = kind != "dense" and reduction == "mean"
    factor = 1.0 if divided else power
    assert torch.equal(loss_multiple.nan_to_num(7.0), (loss * factor).nan_to_num(7.0))
    if dtype != torch.float16:  # whose smallest numbers have fewer bits
        assert torch.equal(dz_multiple, dz * factor)
    assert torch.equal(da_multiple.nan_to_num(7.0), (da / power if divided else da).nan_to_num(7.0))


@given(
    shape=small_logits_shapes,
    seed=seeds,
    kind=st.sampled_from(["k-hot", "dense", "k-hot per pixel"]),
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
)
def test_the_loss_is_linear_in_the_weights(device, shape, seed, kind, smoothing, weighted, reduction):
    """L(a + 3b) = L(a) + 3 L(b), and sum of a*dL/da = L, or 0 under a mean, which does not change with the size of a."""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng, dtype=torch.float64)).to(device)
    smoothing = 0.0 if kind == "dense" else smoothing
    weight = (torch.rand(shape[1], generator=rng, dtype=torch.float64) + 0.1).to(device) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    first, second = (to(drawn_target(kind, shape, rng, torch.float64, K=3), device) for _ in range(2))
    upstream = drawn_upstream("ones", shape, reduction, rng, torch.float64).to(device)
    if kind == "dense":
        weights, both = first, first + 3 * second
    else:
        second = first[0], second[1]
        weights, both = first[1], (first[0], first[1] + 3 * second[1])
    loss, _, da = loss_and_gradients(logits, first, upstream, **options)
    homogeneous = reduction == "mean" and kind != "dense"
    size = 1e-12 * (1 + 10 * logits.numel())
    if logits.numel():
        expected = torch.zeros((), dtype=torch.float64, device=device) if homogeneous else loss.sum()
        torch.testing.assert_close((weights * da).sum(), expected, rtol=0, atol=size)
    if not homogeneous:
        total, other = (fastmix.soft_cross_entropy(logits, as_target(t), **options) for t in (both, second))
        torch.testing.assert_close(total, loss + 3 * other, rtol=0, atol=size, equal_nan=True)


@given(shape=logits_shapes, dtype=dtypes, seed=seeds, kind=target_kinds, smoothing=smoothings, weighted=st.booleans())
def test_a_rows_gradients_sum_to_0(device, shape, dtype, seed, kind, smoothing, weighted):
    """A shift of all logits of a row changes nothing."""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    target = to(drawn_target(kind, shape, rng, dtype), device)
    weight = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, "none", rng, dtype).to(device)
    dz = loss_and_gradients(logits, target, upstream, weight=weight, label_smoothing=smoothing, reduction="none")[1]
    size = Oracle(logits, target, upstream, weight, label_smoothing=smoothing, reduction="none").dz_size[:, 0]
    terms = np.abs(numpy(dz)).sum(axis=1)
    rounding = ULP[dtype] * terms + shape[1] * 2.0**-24 if dtype in ULP else 0.0
    assert np.all(np.abs(numpy(dz).sum(axis=1)) <= 2 * RELATIVE[dtype] * (terms + size) + rounding)


def hard_forms(y, index, lam, C, dtype, rng):
    """The same for classes y: indices, and whatever comes to them."""
    hot = onehot(y, C, dtype)
    one = torch.ones_like(lam)
    return {
        "indices": (y, False),
        "K = 1": (SoftTarget(y.unsqueeze(1), one.unsqueeze(1)), False),
        "a pair of one class": (SoftTarget(torch.stack((y, y), 1), torch.stack((lam, 1 - lam), 1)), False),
        "a pair with weight 0": (SoftTarget(torch.stack((y, y[index]), 1), torch.stack((one, one - 1), 1)), False),
        "probabilities": (hot, True),
        "mixed with itself": (MixedRows(hot, lam, torch.arange(len(y), device=y.device)), True),
        "mixed with nobody": (MixedRows(hot, 1.0, index), True),
    }


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    hard=st.booleans(),
    partner=partners,
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
)
def test_all_forms_of_a_drawn_target_agree(device, shape, dtype, seed, hard, partner, smoothing, weighted, reduction):
    """In loss and in the gradients to logits and lambda. The mean of probabilities is over rows, that of components over
    their class weights."""
    rng = generator(seed)
    N, C, *inner = shape
    wide = accumulator(dtype)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    y = torch.randint(0, C, (N, *inner), generator=rng).to(device)
    lam, index = coefficients(N, dtype, rng).to(device), partners_of(partner, N, rng).to(device)
    weight = (torch.rand(C, generator=rng, dtype=wide) + 0.5).to(device) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    forms = (hard_forms if hard else agreeing_forms)(y, index, lam, C, wide, rng)
    like = (torch.stack((y, y if hard else y[index]), 1), torch.stack((lam, 1 - lam), 1))
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype).to(device)
    khot = Oracle(logits, like, upstream, weight, **options)
    dense = Oracle(logits, numpy_dense(like, C), upstream, weight, **options)
    for name, (target, over_rows) in forms.items():
        z = logits.detach().requires_grad_()
        loss = fastmix.soft_cross_entropy(z, target, weight=weight, **options)
        (dz,) = torch.autograd.grad(loss, z, upstream)
        try:
            (dense if over_rows else khot).check(logits, None, loss.detach(), dz)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@given(shape=small_logits_shapes, seed=seeds, partner=partners, smoothing=smoothings, reduction=reductions)
def test_the_gradient_to_lambda_does_not_depend_on_the_form(device, shape, seed, partner, smoothing, reduction):
    """It is -(1-e)*(z[ya] - z[yb]) per row."""
    rng = generator(seed)
    N, C, *inner = shape
    logits = (3 * torch.randn(shape, generator=rng, dtype=torch.float64)).to(device)
    y = torch.randint(0, C, (N, *inner), generator=rng).to(device)
    index = partners_of(partner, N, rng).to(device)
    lam = coefficients(N, torch.float64, rng).to(device).requires_grad_()
    at, other = (logits.gather(1, t.unsqueeze(1)).squeeze(1) for t in (y, y[index]))
    upstream = drawn_upstream("randn", shape, reduction, rng, torch.float64).to(device)
    expected = -(1 - smoothing) * (at - other) * upstream / (max(y.numel(), 1) if reduction == "mean" else 1)
    expected = expected.flatten(1).sum(1) if inner else expected
    for name, (target, _) in agreeing_forms(y, index, lam, C, torch.float64, rng).items():
        loss = fastmix.soft_cross_entropy(logits, target, label_smoothing=smoothing, reduction=reduction)
        (dlam,) = torch.autograd.grad(loss, lam, upstream)
        torch.testing.assert_close(dlam, expected, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    smoothing=st.sampled_from([0.0, 0.1]),
    value=st.sampled_from([NAN, INFINITE]),
)
def test_a_row_that_is_not_finite_spoils_only_itself(device, shape, dtype, seed, kind, smoothing, value):
    """No bit of another row changes."""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    target = to(drawn_target(kind, shape, rng, dtype), device)
    if kind == "dense":
        target = target + 0.1
    spoiled = torch.rand((shape[0], *shape[2:]), generator=rng) < 0.4
    hostile = logits.clone()
    hostile[:, shape[1] // 2][spoiled] = value
    upstream = drawn_upstream("randn", shape, "none", rng, dtype).to(device)
    options = {"label_smoothing": smoothing, "reduction": "none"}
    clean, spoilt = (loss_and_gradients(z.to(device), target, upstream, **options) for z in (logits, hostile))
    spoiled = spoiled.to(device)
    classes_last = [t.movedim(1, -1) for t in (clean[1], spoilt[1])]
    for a, b in ((clean[0], spoilt[0]), classes_last):
        assert same_bits(a[~spoiled], b[~spoiled])
        assert b[spoiled].isnan().all()


@given(
    rows=st.sampled_from([1, 0]),
    inner=st.sampled_from([(5,), (1,), (4, 3), (33,), (3, 0)]),
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    reduction=reductions,
    dims=st.integers(0, 2),
)
def test_one_row_and_none(device, rows, inner, dtype, seed, kind, reduction, dims):
    rng = generator(seed)
    shape = (rows, *inner)
    x, lam, index, box, g = (None if t is None else t.to(device) for t in drawn_batch(shape, dtype, seed, "any", dims))
    out, dx, dlam = mix_and_gradients(x, lam, index, box, g)
    assert_close(out, numpy(x), dtype)  # a row alone is mixed with itself
    assert_close(dx, numpy(g), dtype)
    assert torch.equal(dlam, torch.zeros_like(lam))
    target = to(drawn_target(kind, shape, rng, dtype), device)
    upstream = drawn_upstream("ones", shape, reduction, rng, dtype).to(device)
    loss, *gradients = loss_and_gradients(x, target, upstream, reduction=reduction)
    Oracle(x, target, upstream, reduction=reduction).check(x, target, loss, *gradients)
    if loss.dim() == 0 and not math.prod((rows, *inner[1:])):
        assert bool(loss.isnan()) == (reduction == "mean")
        assert reduction == "mean" or loss == 0


def drawn_rows(shape, dtype, partner, rng):
    """(values, lam, index) for logits of this shape."""
    values = drawn_target("dense", shape, rng, dtype)
    return values, coefficients(shape[0], dtype, rng), partners_of(partner, shape[0], rng)


@given(
    shape=logits_shapes,
    dtype=dtypes,
    seed=seeds,
    partner=partners,
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
    places=layout_pairs,
)
def test_mixed_rows_are_their_dense_form_in_any_memory(
    device, shape, dtype, seed, partner, smoothing, weighted, reduction, places
):
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    values, lam, index = drawn_rows(shape, dtype, partner, rng)
    weight = torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1 if weighted else None
    options = {"ignore_index": shape[1] // 2, "label_smoothing": smoothing, "reduction": reduction}
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype)

    def op(logits, values, lam, index, weight, upstream):
        z = logits.detach().requires_grad_()
        loss = fastmix.soft_cross_entropy(z, MixedRows(values, lam, index), weight=weight, **options)
        return loss.detach(), *torch.autograd.grad(loss, z, upstream)

    inputs = [(logits, places[0]), (values, places[1]), (lam, "every second"), (index, "every second"), (weight, "misaligned")]
    (logits, values, lam, index, weight, upstream), results = run(op, device, *inputs, (upstream, "dense"))
    dense = MixedRows(values, lam, index).dense()
    oracle = Oracle(logits, dense, upstream, weight, **options)
    oracle.check(logits, dense, *results)
    like = loss_and_gradients(logits, dense, upstream, weight=weight, **options)
    assert_close(results[0], numpy(like[0]), accumulator(dtype), oracle.size, 2)
    assert_close(results[1], numpy(like[1]), dtype, oracle.dz_size, 2)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, partner=partners, smoothing=smoothings, weighted=st.booleans())
def test_the_loss_of_mixed_rows_is_linear_in_lambda(device, shape, dtype, seed, partner, smoothing, weighted):
    """L(lam) = lam*L(1) + (1-lam)*L(0), whose bits are those of the rows and of their partners."""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    values, lam, index = (t.to(device) for t in drawn_rows(shape, dtype, partner, rng))
    weight = (torch.rand(shape[1], generator=rng, dtype=lam.dtype) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, "none", rng, dtype).to(device)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}

    def loss_of(target):
        z = logits.detach().requires_grad_()
        loss = fastmix.soft_cross_entropy(z, target, **options)
        return loss.detach(), *torch.autograd.grad(loss, z, upstream)

    own, other, mixed = (loss_of(MixedRows(values, share, index)) for share in (torch.ones_like(lam), 0.0, lam))
    for ours, rows in ((own, values), (other, values[index])):
        assert all(map(same_bits, ours, loss_of(rows)))
    sizes = [Oracle(logits, rows, upstream, **options) for rows in (values, values[index])]
    exact = dtype not in ULP  # else the gradients of both ends are rounded
    for result, size in enumerate([[t.size for t in sizes], [t.dz_size for t in sizes]][: 1 + exact]):
        a, b = (numpy(t[result]) for t in (own, other))
        share = numpy(lam).reshape(-1, *[1] * (a.ndim - 1))
        terms = np.abs(share) * size[0] + np.abs(1 - share) * size[1]
        assert_close(mixed[result], share * a + (1 - share) * b, lam.dtype, terms, 4)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, partner=partners, reduction=reductions)
def test_mixed_rows_may_come_in_any_order(device, shape, dtype, seed, partner, reduction):
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    values, lam, index = (t.to(device) for t in drawn_rows(shape, dtype, partner, rng))
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype).to(device)
    order = torch.randperm(shape[0], generator=rng).to(device)
    back = order.argsort()

    def loss_of(logits, target, upstream):
        z = logits.detach().requires_grad_()
        loss = fastmix.soft_cross_entropy(z, target, reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss, z, upstream)

    loss, dz = loss_of(logits, MixedRows(values, lam, index), upstream)
    permuted = MixedRows(values[order], lam[order], back[index[order]])
    other, other_dz = loss_of(logits[order], permuted, upstream[order] if upstream.dim() else upstream)
    oracle = Oracle(logits, fastmix.mix(values, lam, index), upstream, reduction=reduction)
    assert_close(other[back] if other.dim() else other, numpy(loss), accumulator(dtype), oracle.size, 2)
    assert_close(other_dz[back], numpy(dz), dtype, oracle.dz_size, 2)
