"""fastmix.soft_binary_cross_entropy on every backend against the oracle, torch and timm's formulas: values, gradients to
logits, weights and dense targets."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import FLOATS, LAMBDA, ULP, assert_close, numpy, target_of
from test_reference import differences
from torch.testing import assert_close as same

import fastmix
from fastmix import MixedRows, SoftTarget, _torch, reference
from fastmix._torch.soft_binary_cross_entropy import soft_binary_cross_entropy_formula
from fastmix.losses.soft_binary_cross_entropy import Options

BINARY_OPTIONS = SimpleNamespace(label_smoothing=0.1, threshold=None, class_reduction="mean", reduction="mean")

SHAPES = [(5, 10), (3, 1), (4, 1000), (2, 1023), (2, 6, 3, 5), (3, 7, 4), (1, 2), (2, 3, 2, 2, 2), (0, 4), (2, 4, 0)]
REDUCTIONS, CLASS_REDUCTIONS = ("mean", "sum", "none"), ("mean", "sum")
INF, NAN = float("inf"), float("nan")


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def finite(values):
    return np.where(np.isfinite(values), values, 0.0)


def check(z, target, oracle_target, leaf, upstream=None, **options):
    """A loss and its gradients against the oracle; what an element is measured by is the sum of the sizes of its terms."""
    z = z.detach().requires_grad_()
    before = z.detach().clone()
    if leaf is not None:
        leaf.grad = None
    loss = fastmix.soft_binary_cross_entropy(z, target, **options)
    if upstream is None:
        upstream = torch.randn(loss.shape, dtype=loss.dtype, device=loss.device)
    loss.backward(upstream)
    wide = accumulator(z.dtype)
    assert loss.dtype == wide
    assert z.grad.stride() == torch.empty_like(z).stride()
    oracle = {k: numpy(v.to(wide)) if isinstance(v, torch.Tensor) else v for k, v in options.items() if v is not None}
    expected = reference.soft_binary_cross_entropy(numpy(z), oracle_target, **oracle)
    factor = math.prod(np.max(oracle.get(w, 1.0)) for w in ("weight", "pos_weight"))
    factor /= z.shape[1] if options.get("class_reduction", "mean") == "mean" else 1
    rows = max(z.numel() // z.shape[1], 1)
    excess = 0.0  # weights beyond 1, which make terms of both signs
    if isinstance(oracle_target, tuple) and z.numel():
        excess = max(np.abs(oracle_target[1]).sum(axis=1).max() - 1, 0.0) * factor * (1 + np.abs(finite(numpy(z))).max())
    excess *= rows if options.get("reduction", "mean") == "sum" else 1
    assert_close(loss, expected, wide, np.abs(finite(expected)) + excess)
    dz, da = reference.soft_binary_cross_entropy_grad(numpy(z), oracle_target, numpy(upstream), **oracle)
    terms = np.abs(numpy(upstream)).max(initial=0.0) * factor / (rows if options.get("reduction", "mean") == "mean" else 1)
    assert_close(z.grad, dz, z.dtype, np.maximum(np.abs(finite(dz)), terms))
    if leaf is not None:
        sizes = np.abs(finite(da)) + terms  # which may cancel
        if da.shape != tuple(leaf.shape):
            da, sizes = (t.sum(axis=tuple(range(leaf.dim(), da.ndim))) for t in (da, sizes))
        bound = LAMBDA[leaf.dtype] * sizes + ULP.get(leaf.dtype, 0.0) * np.abs(da) + 2.0**-24 * (leaf.dtype in ULP)
        actual = numpy(leaf.grad)
        assert np.all((np.abs(actual - da) <= bound) | (actual == da) | (np.isnan(actual) & np.isnan(da)))
    assert torch.equal(bits(z), bits(before))
    return loss


def bits(t):
    return t.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["k-hot", "k-hot per pixel", "indices", "dense"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape, kind, dtype, device):
    """Options in turns: reductions, smoothing, weights of classes and of the positive term, a threshold."""
    z = (3 * torch.randn(shape)).to(dtype).to(device)
    weights = [(torch.rand(shape[1], dtype=accumulator(dtype)) + 0.1).to(device) for _ in range(2)]
    options = itertools.product(REDUCTIONS, CLASS_REDUCTIONS, (0.0, 0.1), (None, 0.3))
    for n, (reduction, class_reduction, e, threshold) in enumerate(options):
        if (n + len(kind) + shape[-1]) % (12 if shape[-1] > 100 else 8):
            continue
        weight, pos_weight = (w if n % m else None for w, m in zip(weights, (2, 3), strict=True))
        target, oracle_target, leaf = target_of(kind, shape, 1 + n % 3, dtype, device)
        check(
            *(z, target, oracle_target, leaf), weight=weight, pos_weight=pos_weight, label_smoothing=e, threshold=threshold,
            class_reduction=class_reduction, reduction=reduction,
        )  # fmt: skip


@pytest.mark.parametrize("K", [1, 2, 5, 16, 20])
def test_any_number_of_components(K, device):
    z = torch.randn(5, 12, device=device)  # fewer classes than components: some come twice
    target, oracle_target, leaf = target_of("k-hot", z.shape, K, device=device)
    for threshold in (None, 1.0):
        check(z, target, oracle_target, leaf, threshold=threshold)


@pytest.mark.parametrize("C", [4097, 21841])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_classes(C, dtype, device):
    """Rows of several tiles, odd ones too."""
    z = (3 * torch.randn(2, C)).to(dtype).to(device)
    for kind, reduction in (("k-hot", "mean"), ("dense", "none")):
        target, oracle_target, leaf = target_of(kind, z.shape, device=device)
        check(z, target, oracle_target, leaf, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_is_torchs_on_dense_targets(reduction, device):
    """In float64 against torch itself, whose classes come last."""
    for shape in ((7, 5), (3, 5, 4, 2)):
        z = (4 * torch.randn(shape, dtype=torch.float64)).to(device).requires_grad_()
        t = torch.rand(shape, dtype=torch.float64, device=device, requires_grad=True)
        weights = [torch.rand(5, dtype=torch.float64, device=device) for _ in range(2)]
        for w, p in itertools.product((None, weights[0]), (None, weights[1])):
            ours = fastmix.soft_binary_cross_entropy(z, t, weight=w, pos_weight=p, reduction=reduction)
            every = F.binary_cross_entropy_with_logits(z.movedim(1, -1), t.movedim(1, -1), w, reduction="none", pos_weight=p)
            rows = every.mean(-1)
            torchs = rows if reduction == "none" else getattr(rows, reduction)()
            same(ours, torchs)
            g = torch.randn_like(ours)
            same(torch.autograd.grad(ours, (z, t), g), torch.autograd.grad(torchs, (z, t), g))


def timms(x, target, smoothing=0.1, target_threshold=None, sum_classes=False, smooth_dense=False, weight=None, pos_weight=None):
    """timm.loss.BinaryCrossEntropy.forward, line by line."""
    if target.shape != x.shape:
        off = smoothing / x.shape[-1]
        full = torch.full((len(x), x.shape[-1]), off, device=x.device, dtype=x.dtype)
        target = full.scatter_(1, target.long().view(-1, 1), 1.0 - smoothing + off)
    elif smooth_dense and smoothing:
        target = target * (1.0 - smoothing) + 0.5 * smoothing
    if target_threshold is not None:
        target = target.gt(target_threshold).to(dtype=target.dtype)
    loss = F.binary_cross_entropy_with_logits(
        x, target, weight, pos_weight=pos_weight, reduction="none" if sum_classes else "mean"
    )
    return loss.sum(-1).mean() if sum_classes else loss


def timms_mixup_target(y, num_classes, lam, smoothing):
    """timm.data.mixup.mixup_target, with a lam per row."""
    off = smoothing / num_classes
    own, partner = (
        torch.full((len(y), num_classes), off, dtype=lam.dtype, device=y.device).scatter_(1, c.view(-1, 1), 1 - smoothing + off)
        for c in (y, y.flip(0))
    )
    return own * lam.view(-1, 1) + partner * (1 - lam.view(-1, 1))


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_is_timms(sum_classes, threshold, device):
    N, C = 8, 6
    z = torch.randn(N, C, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randint(0, C, (N,), device=device)
    lam = torch.rand(N, dtype=torch.float64, device=device)
    m = fastmix.Mix(lam, torch.arange(N, device=device).flip(0))
    ours = {"threshold": threshold, "class_reduction": "sum" if sum_classes else "mean"}
    timm = {"target_threshold": threshold, "sum_classes": sum_classes}
    multi = torch.randint(0, 2, (N, C), device=device).double()
    cases = [
        (fastmix.soft_binary_cross_entropy(z, y, label_smoothing=0.1, **ours), timms(z, y, 0.1, **timm)),
        (
            fastmix.soft_binary_cross_entropy(z, m.target(y), label_smoothing=0.1, **ours),
            timms(z, timms_mixup_target(y, C, lam, 0.1), **timm),
        ),
        (
            fastmix.soft_binary_cross_entropy(z, m.target(multi), label_smoothing=0.1, **ours),
            timms(z, m.target(multi).dense(), 0.1, smooth_dense=True, **timm),
        ),
    ]
    for loss, expected in cases:
        same(loss, expected)
        same(torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0])


def test_what_is_on_the_threshold_stays_below_it(device):
    """As in torch: t > threshold, in the loss's own precision. 0.2 in float32 is more than 0.2."""
    z = torch.randn(3, 4, device=device)
    t = torch.tensor([0.2, 0.7, 0.1, 0.3], device=device).expand(3, 4)
    classes = torch.tensor([[0, 1, 2, 3]] * 3, device=device)
    for threshold in (0.2, 0.7, 0.1, 0.3):
        hard = t.gt(threshold).float()
        expected = F.binary_cross_entropy_with_logits(z, hard)
        for target in (t, SoftTarget(classes, t)):
            same(fastmix.soft_binary_cross_entropy(z, target, threshold=threshold), expected)


@pytest.mark.trap("composer#1407-sigmoid")
def test_equal_labels_add_up_before_the_threshold(device):
    """Mixed with its like, a row's target is 1 and not lam and 1 - lam."""
    z = torch.randn(3, 5, device=device, requires_grad=True)
    y = torch.tensor([1, 2, 4], device=device)
    pair = SoftTarget(y.unsqueeze(1).expand(3, 2), torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.0, 1.0]], device=device))
    for options in ({}, {"threshold": 0.8}, {"label_smoothing": 0.1}, {"weight": torch.rand(5, device=device)}):
        ours, once = (fastmix.soft_binary_cross_entropy(z, t, **options) for t in (pair, y))
        same(ours, once)
        same(torch.autograd.grad(ours, z)[0], torch.autograd.grad(once, z)[0])


def test_all_forms_of_a_target_agree(device):
    z = torch.randn(6, 9, dtype=torch.float64, device=device)
    lam, index = torch.rand(6, dtype=torch.float64, device=device), torch.randperm(6, device=device)
    y = torch.randint(0, 9, (6,), device=device)
    m, onehot = fastmix.Mix(lam, index), F.one_hot(y, 9).double()
    for threshold in (None, 0.4):
        losses = [
            fastmix.soft_binary_cross_entropy(z, t, threshold=threshold)
            for t in (m.target(y), m.target(onehot), m.target(onehot).dense(), m.target(y).dense(9))
        ]
        for loss in losses[1:]:
            same(loss, losses[0])


class TestLambda:
    def test_of_a_pair(self, device):
        """dl/dlam = dl/dt_a - dl/dt_b, by the formula."""
        z = torch.randn(5, 7, dtype=torch.float64, device=device)
        w, p = (torch.rand(7, dtype=torch.float64, device=device) for _ in range(2))
        y, index = torch.randint(0, 7, (5,), device=device), torch.randperm(5, device=device)
        rows = torch.arange(5, device=device)
        for e in (0.0, 0.1):
            lam = torch.tensor([0.0, 1.0, 0.3, 0.5, 1.2], dtype=torch.float64, device=device, requires_grad=True)
            options = {"weight": w, "pos_weight": p, "label_smoothing": e, "class_reduction": "sum", "reduction": "sum"}
            loss = fastmix.soft_binary_cross_entropy(z, fastmix.Mix(lam, index).target(y), **options)
            gain = (1 - e) * w * (p * F.softplus(-z, threshold=50) - F.softplus(z, threshold=50))
            same(torch.autograd.grad(loss, lam)[0], gain[rows, y] - gain[rows, y[index]])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_through_mixed_rows_that_are_not_rounded(self, dtype, device):
        z = torch.randn(6, 9, device=device)
        values = torch.rand(6, 9).to(dtype).to(device)
        lam, index = torch.rand(6, device=device, requires_grad=True), torch.tensor([1, 2, 3, 3, 0, 0], device=device)
        loss = fastmix.soft_binary_cross_entropy(z, MixedRows(values, lam, index), reduction="sum")
        rows = reference.mix(numpy(values), numpy(lam), numpy(index))
        expected = reference.soft_binary_cross_entropy(numpy(z), rows, reduction="sum")
        np.testing.assert_allclose(numpy(loss), expected, rtol=2e-6)
        terms = -(values.double() - values[index].double()) * z.double() / 9
        error = (torch.autograd.grad(loss, lam)[0] - terms.sum(1)).abs()
        assert (error <= 1e-5 * terms.abs().sum(1)).all()
        with pytest.raises(ValueError, match=r"target.values: expected the logits' shape"):
            fastmix.soft_binary_cross_entropy(z[:, :8], MixedRows(values, 0.5, index))

    def test_is_0_under_a_threshold(self, device):
        z = torch.randn(4, 6, device=device, requires_grad=True)
        for kind in ("k-hot", "k-hot per pixel", "dense"):
            target, _, leaf = target_of(kind, z.shape, device=device)
            for leaves in ((leaf,), (z, leaf)):
                loss = fastmix.soft_binary_cross_entropy(z, target, threshold=0.3)
                assert (torch.autograd.grad(loss, leaves)[-1] == 0).all()

    def test_of_the_objective_of_a_discriminator(self, device):
        """l(d(lam*x + (1-lam)*g(z)), lam), arXiv:1710.09412, against torch in float64."""
        real, fake = torch.randn(2, 6, 3, dtype=torch.float64, device=device)
        d = torch.randn(3, 1, dtype=torch.float64, device=device)
        lam = torch.rand(6, dtype=torch.float64, device=device, requires_grad=True)
        mixed = fastmix.convex_combination((real, fake), torch.stack((lam, 1 - lam), 1))
        ours = fastmix.soft_binary_cross_entropy(mixed @ d, lam.unsqueeze(1))
        by_hand = (lam.unsqueeze(1) * real + (1 - lam.unsqueeze(1)) * fake) @ d
        torchs = F.binary_cross_entropy_with_logits(by_hand, lam.unsqueeze(1))
        same(ours, torchs)
        same(torch.autograd.grad(ours, lam), torch.autograd.grad(torchs, lam))


class TestUpstream:
    """The gradient is formed in the forward and scaled once: whatever comes, however often."""

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_per_row_upstream(self, dtype, device):
        z = torch.randn(6, 9).to(dtype).to(device)
        for kind in ("k-hot", "dense"):
            target, oracle_target, leaf = target_of(kind, z.shape, device=device)
            upstream = torch.tensor([0.0, 1.0, -2.0, 1e4, 1e-4, 3.0], dtype=accumulator(dtype), device=device)
            check(z, target, oracle_target, leaf, upstream, reduction="none")

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_retained_graph(self, dtype, device):
        """Scaled in place twice, the second backward would give three times the gradient."""
        z = torch.randn(6, 9).to(dtype).to(device).requires_grad_()
        for kind in ("k-hot", "indices", "dense"):
            loss = fastmix.soft_binary_cross_entropy(z, target_of(kind, z.shape, device=device)[0], label_smoothing=0.1)
            first, again, scaled = (torch.autograd.grad(loss * f, z, retain_graph=True)[0].double() for f in (1.0, 1.0, 2.0))
            assert torch.equal(again, first)
            assert torch.equal(scaled, 2 * first)

    def test_the_formed_gradient_is_handed_over(self, device):
        """At upstream 1 the first backward returns the forward's buffer."""
        z = torch.randn(6, 9, device=device, requires_grad=True)
        for kind in ("k-hot", "dense"):
            loss = fastmix.soft_binary_cross_entropy(z, target_of(kind, z.shape, device=device)[0])
            formed = loss.grad_fn.cached_grad
            assert torch.autograd.grad(loss, z)[0].data_ptr() == formed.data_ptr()
        assert fastmix.soft_binary_cross_entropy(z.detach().half().requires_grad_(), z.detach()).grad_fn.cached_grad is None

    def test_float16_gradients_do_not_underflow(self, device):
        z = torch.randn(64, 512).half().to(device).requires_grad_()
        target, oracle_target, _ = target_of("k-hot", z.shape, device=device)
        (65536 * fastmix.soft_binary_cross_entropy(z, target)).backward()
        dz = reference.soft_binary_cross_entropy_grad(numpy(z), oracle_target, 65536.0)[0]
        assert_close(z.grad, dz, torch.float16, np.abs(dz))
        assert (z.grad != 0).all()

    def test_the_loss_may_be_changed_in_place(self, device):
        z = torch.randn(6, 9, device=device, requires_grad=True)
        for kind, reduction in itertools.product(("k-hot", "dense"), REDUCTIONS):
            target, _, leaf = target_of(kind, z.shape, device=device)
            loss = fastmix.soft_binary_cross_entropy(z, target, reduction=reduction)
            expected = torch.autograd.grad(loss.sum() / 4, (z, leaf), retain_graph=True)
            loss /= 4
            same(torch.autograd.grad(loss.sum(), (z, leaf)), expected)

    def test_what_was_saved_is_guarded(self, device):
        """Logits, targets or weights changed between forward and backward are noticed."""
        z = torch.randn(6, 9, device=device, requires_grad=True)
        w, p = torch.ones(9, device=device), torch.ones(9, device=device)
        logits, t = z * 1, torch.rand(6, 9, device=device)
        for changed in (logits, t, w, p):
            loss = fastmix.soft_binary_cross_entropy(logits, t, weight=w, pos_weight=p)
            changed.detach().mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                (2 * loss).backward(retain_graph=True)

    def test_second_derivatives_and_batched_backwards_are_refused(self, device):
        z = torch.randn(3, 4, device=device, requires_grad=True)
        for kind in ("k-hot", "dense"):
            loss = fastmix.soft_binary_cross_entropy(z, target_of(kind, z.shape, device=device)[0], reduction="none")
            with pytest.raises(RuntimeError, match="second derivatives .*binary_cross_entropy_with_logits on target.dense"):
                torch.autograd.grad(loss.sum(), z, create_graph=True)
            with pytest.raises(RuntimeError, match="soft_binary_cross_entropy: a backward cannot be batched"):
                torch.autograd.grad(loss, z, torch.eye(3, device=device), is_grads_batched=True)


class TestHostile:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_huge_logits(self, dtype, device):
        for scale in (1e2, 1e4):
            z = (torch.randn(5, 8) * scale).to(dtype).to(device)
            z[0, :2] = torch.tensor([scale, -scale])
            for kind in ("k-hot", "dense"):
                target, oracle_target, leaf = target_of(kind, z.shape, device=device)
                check(z, target, oracle_target, leaf, class_reduction="sum", label_smoothing=0.1)

    def test_small_losses_keep_their_digits(self, device):
        """A row that is as good as learnt: eager torch's (1-t)*z - log(sigmoid(z)) has nothing left of it."""
        y = torch.tensor([0, 1], device=device)
        for size in (8.0, 20.0, 30.0):
            z = torch.full((2, 3), -size, device=device)
            z[[0, 1], y] = size
            z.requires_grad_()
            loss = fastmix.soft_binary_cross_entropy(z, y)
            np.testing.assert_allclose(loss.item(), math.log1p(math.exp(-size)), rtol=4e-6)
            dz = torch.autograd.grad(loss, z)[0]
            np.testing.assert_allclose(numpy(dz.abs()), 1 / (1 + math.exp(size)) / 6, rtol=4e-6)

    def test_infinite_logits(self, device):
        """Where a side has no weight it is not looked at; elsewhere the loss is infinite, and the gradient finite."""
        z = torch.tensor([[INF, -INF, 1.0], [-INF, INF, 1.0], [INF, 0.0, 0.0]], device=device, requires_grad=True)
        t = torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.0, 0.5], [0.5, 0.0, 1.0]], device=device)
        classes = torch.tensor([[0, 1, 2]] * 3, device=device)
        expected = reference.soft_binary_cross_entropy(numpy(z), numpy(t), reduction="none")
        assert np.isfinite(expected).tolist() == [True, False, False]
        dz = reference.soft_binary_cross_entropy_grad(numpy(z), numpy(t), np.ones(3), reduction="none")[0]
        for target in (t, SoftTarget(classes, t)):
            loss = fastmix.soft_binary_cross_entropy(z, target, reduction="none")
            np.testing.assert_allclose(numpy(loss), expected, rtol=2e-6)
            np.testing.assert_allclose(numpy(torch.autograd.grad(loss.sum(), z)[0]), dz, atol=1e-7)

    @pytest.mark.parametrize("value", [INF, -INF, NAN])
    def test_what_is_not_finite_spoils_its_own_row_only(self, value, device):
        z = torch.randn(4, 6, device=device)
        z[1, 2] = value
        z.requires_grad_()
        others = torch.tensor([0, 2, 3], device=device)
        for kind, e in itertools.product(("k-hot", "indices", "dense"), (0.0, 0.1)):
            loss = fastmix.soft_binary_cross_entropy(
                z, target_of(kind, z.shape, device=device)[0], reduction="none", label_smoothing=e
            )
            grad = torch.autograd.grad(loss.sum(), z)[0]
            assert torch.isfinite(loss[others]).all()
            assert torch.isfinite(grad[others]).all()
            if math.isnan(value):
                assert torch.isnan(loss[1])
                assert torch.isnan(grad[1, 2])

    @pytest.mark.parametrize("value", [INF, -INF, NAN])
    def test_classes_of_weight_0_may_hold_anything(self, value, device):
        z = torch.randn(4, 3, device=device)
        z[:, 1] = value
        z.requires_grad_()
        w = torch.tensor([1.0, 0.0, 2.0], device=device)
        for kind, reduction in itertools.product(("k-hot", "dense"), REDUCTIONS):
            target = target_of(kind, z.shape, device=device)[0]
            loss = fastmix.soft_binary_cross_entropy(z, target, weight=w, reduction=reduction)
            dz = torch.autograd.grad(loss.sum(), z)[0]
            assert torch.isfinite(loss).all()
            assert torch.isfinite(dz).all()
            assert (dz[:, 1] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_no_further_from_the_truth_than_torch(self, dtype, device):
        z = (8 * torch.randn(16, 333)).to(dtype).to(device)
        target, oracle_target, _ = target_of("k-hot", z.shape, device=device)
        options = {"reduction": "none", "class_reduction": "sum"}
        truth = reference.soft_binary_cross_entropy(numpy(z), oracle_target, **options)
        slopes = reference.soft_binary_cross_entropy_grad(numpy(z), oracle_target, np.ones(16), **options)[0]
        ours, torchs = z.clone().requires_grad_(), z.clone().requires_grad_()
        loss = fastmix.soft_binary_cross_entropy(ours, target, **options)
        eager = F.binary_cross_entropy_with_logits(torchs, target.dense(333).detach().to(dtype), reduction="none").sum(1)
        loss.sum().backward()
        eager.sum().backward()
        for mine, yours, right in ((loss, eager, truth), (ours.grad, torchs.grad, slopes)):
            errors = [np.abs(numpy(t) - right).max() for t in (mine, yours)]
            assert errors[0] <= errors[1] + 2.0**-23 * np.abs(right).max()

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_nothing_to_average(self, reduction, device):
        z = torch.randn(0, 4, device=device, requires_grad=True)
        for target in (torch.zeros(0, dtype=torch.int64, device=device), torch.rand(0, 4, device=device)):
            loss = fastmix.soft_binary_cross_entropy(z, target, reduction=reduction)
            assert {"mean": loss.isnan().all(), "sum": (loss == 0).all(), "none": loss.shape == (0,)}[reduction]
            loss.sum().backward()
            assert z.grad.shape == (0, 4)

    def test_wrong_classes_where_the_host_does_not_look(self, device, monkeypatch):
        """Their rows become NaN, under a threshold too, and so do the gradients of all their components."""
        monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
        if fastmix._backend.of(torch.zeros(1, device=device)) is _torch:
            return  # torch's own gather refuses on the CPU; other devices are covered by the test below
        for options in ({}, {"threshold": 0.3}, {"weight": torch.rand(6, device=device), "label_smoothing": 0.1}):
            z = torch.randn(4, 6, device=device, requires_grad=True)
            classes = torch.tensor([[1, 0], [0, 6], [-3, 2], [2, 2]], device=device)
            a = torch.rand(4, 2, device=device, requires_grad=True)
            loss = fastmix.soft_binary_cross_entropy(z, SoftTarget(classes, a), reduction="none", **options)
            for upstream in (1.0, 2.0):
                dz, da = torch.autograd.grad(upstream * loss.sum(), (z, a), retain_graph=True)
                assert loss.isnan().tolist() == [False, True, True, False]
                for gradient in (dz, da) if "threshold" not in options else (dz,):
                    assert gradient[1:3].isnan().all()
                    assert torch.isfinite(gradient[[0, 3]]).all()

    def test_the_formula_of_other_devices(self, monkeypatch):
        """The torch backend where nothing may be looked at, run here."""
        z, classes = torch.randn(4, 6), torch.tensor([[1, 0], [0, 6], [-3, 2], [2, 2]])
        arguments = z, torch.rand(4, 2), classes, torch.rand(6), None, Options(0.1, None, "mean", "none")
        losses = soft_binary_cross_entropy_formula(*arguments)
        assert losses.isnan().tolist() == [False, True, True, False]
        right = SoftTarget(classes[[0, 3]], arguments[1][[0, 3]])
        expected = fastmix.soft_binary_cross_entropy(
            z[[0, 3]], right, weight=arguments[3], label_smoothing=0.1, reduction="none"
        )
        same(losses[[0, 3]], expected)


class TestLayouts:
    def test_strided_logits(self, device):
        wide = torch.randn(12, 40, device=device)
        images = torch.randn(4, 9, 6, 8, device=device)
        for z in (
            wide[::2, :10],
            wide[:, ::4],
            wide[:6, 1:12],
            wide.t()[:10, :6].t(),
            wide[:1, :10].expand(6, 10),
            images.to(memory_format=torch.channels_last),
            images[:, 2:7, 1:4, ::2],
            images.permute(0, 1, 3, 2),
            images[:, :, :1, :1],
        ):
            for kind in ("k-hot", "dense"):
                target, oracle_target, leaf = target_of(kind, z.shape, device=device)
                check(z, target, oracle_target, leaf, weight=torch.rand(z.shape[1], device=device), label_smoothing=0.1)

    def test_strided_targets(self, device):
        z = torch.randn(5, 7, device=device)
        classes = torch.randint(0, 7, (5, 4), device=device)[:, ::2]
        for weights in (torch.rand(2, 5, device=device).t(), torch.tensor([[0.3, 0.7]], device=device).expand(5, 2)):
            check(z, SoftTarget(classes, weights), (numpy(classes), numpy(weights)), None)
        dense = torch.rand(7, 10, device=device).t()[::2]
        check(z, dense, numpy(dense), None)

    def test_misaligned_logits(self, device):
        for offset in (1, 3):
            z = torch.randn(4 * 40 + offset, device=device)[offset:].view(4, 40)
            target, oracle_target, leaf = target_of("k-hot", z.shape, device=device)
            check(z, target, oracle_target, leaf)


def test_blocks_do_not_show(monkeypatch):
    """The CPU's blocks of rows, and of pixels of a row."""
    for shape in ((37, 50), (3, 10, 9, 9)):
        z = torch.randn(shape)
        target, oracle_target, leaf = target_of("k-hot", shape)
        dense, oracle_dense, dense_leaf = target_of("dense", shape)
        for block_bytes in (2**20, 2**10):
            monkeypatch.setattr(_torch.sizes, "BINARY_BLOCK_BYTES", block_bytes)
            for reduction in ("mean", "none"):
                check(z, target, oracle_target, leaf, reduction=reduction, label_smoothing=0.1)
                check(z, dense, oracle_dense, dense_leaf, reduction=reduction)


def test_the_torch_backend_makes_little_beside_the_gradient(monkeypatch):
    """Nothing as large as the logits but their gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        storages = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= 512 * 1000 * 2:
                    self.storages.add(t.untyped_storage().data_ptr())
            return out

    z, t = torch.randn(512, 1000), torch.rand(512, 1000)
    w = torch.rand(1000)
    arguments = (torch.rand(512, 2), torch.randint(0, 1000, (512, 2))), (t, None, None)
    for forward, target in zip((_torch.soft_bce_fwd, _torch.dense_bce_fwd), arguments, strict=True):
        need = (True, True) if len(target) == 2 else (True,)
        with Made() as made:
            forward(z, *target, w, w, BINARY_OPTIONS, *need)
        assert len(made.storages - {z.data_ptr(), t.data_ptr()}) == 1
        made.storages.clear()


def test_gradcheck(device):
    options = itertools.product(((3, 5), (2, 4, 3)), ("k-hot", "dense"), REDUCTIONS, (0.0, 0.1))
    for n, (shape, kind, reduction, e) in enumerate(options):
        if n % 8 == 0 or fastmix._backend.of(torch.zeros(1, device=device)) is _torch:  # the interpreter is slow
            z = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
            target, _, leaf = target_of(kind, shape, weights_dtype=torch.float64, device=device)
            w, p = torch.rand(2, shape[1], dtype=torch.float64, device=device)

            def op(z, leaf, target=target, w=w, p=p, reduction=reduction, e=e):
                t = SoftTarget(target.classes, leaf) if isinstance(target, SoftTarget) else leaf
                return fastmix.soft_binary_cross_entropy(
                    z, t, weight=w, pos_weight=p, label_smoothing=e, class_reduction="sum", reduction=reduction
                )

            assert torch.autograd.gradcheck(op, (z, leaf))


def test_function_transforms(device):
    """grad, vmap and forward mode go through the expressions."""
    z = torch.randn(4, 6, dtype=torch.float64, device=device)
    w, p = torch.rand(2, 6, dtype=torch.float64, device=device)
    for kind, e in itertools.product(("k-hot", "indices", "dense"), (0.0, 0.1)):
        target, _, leaf = target_of(kind, z.shape, weights_dtype=torch.float64, device=device)

        def loss(z, leaf, target=target, e=e, kind=kind, threshold=None, reduction="mean"):
            t = SoftTarget(target.classes, leaf) if kind == "k-hot" else leaf if kind == "dense" else target
            options = {"weight": w, "pos_weight": p, "label_smoothing": e, "threshold": threshold, "reduction": reduction}
            return fastmix.soft_binary_cross_entropy(z, t, **options)

        zs = z.clone().requires_grad_()
        value = loss(zs, leaf)
        (dz,) = torch.autograd.grad(value, zs, retain_graph=True)
        same(torch.func.grad(loss)(z, leaf), dz)
        tangent = torch.randn_like(z)
        fixed = None if leaf is None else leaf.detach()
        same(torch.func.jvp(lambda z: loss(z, fixed), (z,), (tangent,))[1], (dz * tangent).sum())  # noqa: B023
        if leaf is not None:
            same(torch.func.grad(loss, 1)(z, leaf.detach()), torch.autograd.grad(value, leaf)[0])
            zeros = torch.func.grad(lambda leaf: loss(z, leaf, threshold=0.3))(leaf.detach())  # noqa: B023
            assert (zeros == 0).all()
    batch, targets = torch.randn(3, 4, 6, device=device), torch.randint(0, 6, (3, 4), device=device)
    mapped = torch.func.vmap(fastmix.soft_binary_cross_entropy)(batch, targets)
    same(mapped, torch.stack([fastmix.soft_binary_cross_entropy(z, y) for z, y in zip(batch, targets, strict=True)]))


@pytest.mark.no_poison
def test_a_program_does_as_eager_does():
    for kind, threshold in itertools.product(("k-hot", "indices", "dense"), (None, 0.3)):
        target, _, leaf = target_of(kind, (4, 6))
        z = torch.randn(4, 6, requires_grad=True)
        leaves = (z,) if leaf is None else (z, leaf)

        def loss(z, target, threshold=threshold):
            return fastmix.soft_binary_cross_entropy(z, target, label_smoothing=0.1, threshold=threshold)

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(z, target)
        eager = loss(z, target)
        same(compiled, eager)
        same(torch.autograd.grad(3 * compiled, leaves), torch.autograd.grad(3 * eager, leaves))


def test_autocast_keeps_the_loss_in_float32(device):
    z = torch.randn(4, 6).bfloat16().to(device)
    for kind in ("k-hot", "dense"):
        target, oracle_target, leaf = target_of(kind, z.shape, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert check(z, target, oracle_target, leaf).dtype == torch.float32


def test_only_what_is_asked_for(device):
    z = torch.randn(4, 6, device=device)
    for kind in ("k-hot", "dense"):
        target, _, leaf = target_of(kind, z.shape, device=device)
        (only,) = torch.autograd.grad(fastmix.soft_binary_cross_entropy(z, target), leaf)
        zs = z.clone().requires_grad_()
        same(torch.autograd.grad(fastmix.soft_binary_cross_entropy(zs, target), (zs, leaf))[1], only)
        with torch.no_grad():
            quiet = fastmix.soft_binary_cross_entropy(zs, target)
        assert not quiet.requires_grad
        same(quiet, fastmix.soft_binary_cross_entropy(z, target).detach())


class TestModule:
    def test_has_the_options_of_the_function(self, device):
        z, y = torch.randn(5, 4, device=device), torch.randint(0, 4, (5,), device=device)
        w, p = torch.rand(2, 4, device=device)
        options = {"label_smoothing": 0.1, "threshold": 0.05, "class_reduction": "sum", "reduction": "none"}
        criterion = fastmix.SoftBinaryCrossEntropyLoss(w, p, **options)
        assert torch.equal(criterion(z, y), fastmix.soft_binary_cross_entropy(z, y, weight=w, pos_weight=p, **options))
        assert set(criterion.state_dict()) == {"weight", "pos_weight"}
        assert not list(criterion.parameters())
        text = repr(criterion)
        for name, value in options.items():
            assert f"{name}={value!r}" in text

    @pytest.mark.parametrize(
        ("options", "kind", "words"),
        [
            ({"weight": [1.0]}, TypeError, "weight"),
            ({"pos_weight": 2.0}, TypeError, "pos_weight"),
            ({"threshold": "0.2"}, TypeError, "threshold"),
            ({"class_reduction": "none"}, ValueError, "class_reduction"),
            ({"reduction": "batchmean"}, ValueError, "reduction"),
            ({"label_smoothing": 2}, ValueError, "label_smoothing"),
        ],
        ids=str,
    )
    def test_refuses_when_it_is_made(self, options, kind, words):
        with pytest.raises(kind, match=words):
            fastmix.SoftBinaryCrossEntropyLoss(**options)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits: expected a float16"),
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "logits"),
        ({"logits": torch.zeros(4)}, ValueError, r"logits: expected shape \[N, C\]"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "at least one class"),
        ({"logits": torch.zeros(4, 3, device="meta")}, ValueError, "target: expected a tensor on meta, got .*cpu"),
        ({"target": [0, 1, 2, 0]}, TypeError, "target: expected a SoftTarget"),
        ({"target": None}, TypeError, "target: .*NoneType"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "target: expected an int64"),
        ({"target": torch.zeros(4, 3) > 0}, TypeError, "target: .*bool"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target: expected shape \[4\]"),
        ({"target": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, "target"),
        ({"target": torch.zeros(4, 2)}, ValueError, r"in the logits' shape \[4, 3\]"),
        ({"target": torch.zeros(4, 3, device="meta")}, ValueError, "target: expected a tensor on cpu, got .*meta"),
        ({"target": torch.tensor([0, 1, 3, 0])}, ValueError, r"target: expected a class in \[0, 3\), got 3 in row 2"),
        ({"target": torch.tensor([0, -100, 2, 0])}, ValueError, "got -100 in row 1"),
        ({"target": SoftTarget(torch.tensor([[0, 7]] * 4), torch.zeros(4, 2))}, ValueError, "got 7 in row 0"),
        ({"target": SoftTarget(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2))}, ValueError, "target.classes"),
        ({"target": MixedRows(torch.zeros(4, 2), 0.5, torch.arange(4))}, ValueError, r"target.values: .*\[4, 3\]"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \[3\]"),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight: expected a constant"),
        ({"pos_weight": torch.ones(4)}, ValueError, r"pos_weight: expected shape \[3\]"),
        ({"pos_weight": 2.0}, TypeError, "pos_weight: .*float"),
        ({"pos_weight": torch.ones(3, requires_grad=True)}, ValueError, "pos_weight: expected a constant"),
        ({"pos_weight": torch.ones(3, device="meta")}, ValueError, "pos_weight: expected a tensor on cpu, got .*meta"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a float in \[0, 1\]"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing"),
        ({"threshold": "0.2"}, TypeError, "threshold: expected a float or None, got '0.2'"),
        ({"threshold": True}, TypeError, "threshold: .*True"),
        ({"threshold": torch.tensor(0.2)}, TypeError, "threshold: .*tensor"),
        ({"threshold": NAN}, ValueError, "threshold: expected a number or None, got nan"),
        ({"class_reduction": "none"}, ValueError, "class_reduction: expected 'mean' or 'sum', got 'none'"),
        ({"class_reduction": None}, ValueError, "class_reduction: .*NoneType"),
        ({"reduction": "average"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'average'"),
    ],
    ids=str,
)
def test_bad_input(change, kind, words):
    arguments = {"logits": torch.zeros(4, 3), "target": torch.tensor([0, 1, 2, 0]), **change}
    with pytest.raises(kind, match=words):
        fastmix.soft_binary_cross_entropy(**arguments)


def test_the_oracle_by_finite_differences():
    rng = np.random.default_rng(0)
    options = itertools.product([(4, 5), (2, 3, 2)], (0.0, 0.2), REDUCTIONS, CLASS_REDUCTIONS)
    for shape, e, reduction, class_reduction in options:
        N, C, *inner = shape
        z, classes = rng.normal(size=shape), rng.integers(0, C, size=(N, 3, *inner))
        settings = {
            "weight": rng.random(C), "pos_weight": rng.random(C), "label_smoothing": e, "reduction": reduction,
            "class_reduction": class_reduction,
        }  # fmt: skip
        upstream = rng.normal(size=(N, *inner)) if reduction == "none" else rng.normal()

        def loss(z, t, khot, classes=classes, settings=settings, upstream=upstream):
            return np.sum(upstream * reference.soft_binary_cross_entropy(z, (classes, t) if khot else t, **settings))

        for khot, t in ((True, rng.normal(size=classes.shape)), (False, rng.random(size=shape))):
            expected = differences(lambda z, t, k=khot: loss(z, t, k), z, t)
            ours = reference.soft_binary_cross_entropy_grad(z, (classes, t) if khot else t, upstream, **settings)
            for a, b in zip(ours, expected, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max()))


def test_the_oracle_is_torchs_in_float64():
    z, t = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    w, p = torch.rand(2, 4, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(z, t, w, pos_weight=p)
    options = {"weight": numpy(w), "pos_weight": numpy(p)}
    np.testing.assert_allclose(reference.soft_binary_cross_entropy(numpy(z), numpy(t), **options), expected.item())
    with pytest.raises(ValueError, match=r"expected a class in \[0, 4\), got 4"):
        reference.soft_binary_cross_entropy(numpy(z), np.array([0, 1, 4, 0, 0]))
