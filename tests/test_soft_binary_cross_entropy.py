"""fastmix.soft_binary_cross_entropy on every backend against the oracle, torch and timm's formulas: values, gradients to
logits, weights and dense targets."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NO_TRITON, TRITON
from drawn import (
    drawn_target,
    drawn_upstream,
    dtypes,
    generator,
    given,
    layout_triples,
    logits_shapes,
    reductions,
    run,
    seeds,
    small_logits_shapes,
    smoothings,
    st,
    target_kinds,
)
from memory import bits, guarded_allocations, placed
from numerics import FLOATS, LAMBDA, RELATIVE, ULP, accumulator, assert_close, finite, numpy, target_of
from test_reference import differences
from torch.testing import assert_close as same

import fastmix
from fastmix import SoftTarget, _torch, reference
from fastmix._torch.soft_binary_cross_entropy import soft_binary_cross_entropy_formula
from fastmix.losses.soft_binary_cross_entropy import Options

if TRITON:
    from fastmix.kernels import _class_tiles, _launch, soft_binary_cross_entropy


SHAPES = [(5, 10), (3, 1), (4, 1000), (2, 1023), (2, 6, 3, 5), (3, 7, 4), (1, 2), (2, 3, 2, 2, 2), (0, 4), (2, 4, 0)]
REDUCTIONS, CLASS_REDUCTIONS = ("mean", "sum", "none"), ("mean", "sum")
INF, NAN = float("inf"), float("nan")


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


@pytest.mark.thinned(3)
@pytest.mark.slow_interpreted
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


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("C", [4097, 21841])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_classes(C, dtype, device):
    """Rows of several tiles, odd ones too."""
    z = (3 * torch.randn(2, C)).to(dtype).to(device)
    for kind, reduction in (("k-hot", "mean"), ("dense", "none")):
        target, oracle_target, leaf = target_of(kind, z.shape, device=device)
        check(z, target, oracle_target, leaf, reduction=reduction)


@pytest.mark.slow_interpreted
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

    def test_the_formed_gradient_is_handed_over(self, device):
        """At upstream 1 the first backward returns the forward's buffer."""
        z = torch.randn(6, 9, device=device, requires_grad=True)
        for kind in ("k-hot", "dense"):
            loss = fastmix.soft_binary_cross_entropy(z, target_of(kind, z.shape, device=device)[0])
            formed = loss.grad_fn.cached_grad
            assert torch.autograd.grad(loss, z)[0].data_ptr() == formed.data_ptr()
        assert fastmix.soft_binary_cross_entropy(z.detach().half().requires_grad_(), z.detach()).grad_fn.cached_grad is None


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
            np.testing.assert_allclose(numpy(loss), expected, rtol=RELATIVE[torch.float32])
            np.testing.assert_allclose(numpy(torch.autograd.grad(loss.sum(), z)[0]), dz, atol=1e-7)

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
            forward(z, *target, w, w, Options(0.1, None, "mean", "mean"), *need)
        assert len(made.storages - {z.data_ptr(), t.data_ptr()}) == 1
        made.storages.clear()


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
            ({"pos_weight": "2"}, TypeError, "pos_weight"),
            ({"pos_weight": math.inf}, ValueError, "pos_weight: expected a finite float"),
            ({"threshold": "0.2"}, TypeError, "threshold"),
            ({"class_reduction": "rows"}, ValueError, "class_reduction"),
            ({"reduction": "batchmean"}, ValueError, "reduction"),
            ({"label_smoothing": 2}, ValueError, "label_smoothing"),
        ],
        ids=str,
    )
    def test_refuses_when_it_is_made(self, options, kind, words):
        with pytest.raises(kind, match=words):
            fastmix.SoftBinaryCrossEntropyLoss(**options)


@pytest.mark.parametrize(
    "pos_weight", [2.5, np.float32(2.5), torch.tensor(2.5), torch.tensor([2.5]), torch.tensor(2.5, dtype=torch.float64)]
)
@pytest.mark.parametrize("dense", [False, True])
def test_one_positive_weight_for_all_classes(pos_weight, dense, device):
    """As torch broadcasts it; of the module too."""
    z = torch.randn(4, 3, device=device)
    t = torch.rand(4, 3, device=device) if dense else torch.tensor([0, 2, 1, 1], device=device)
    pos_weight = pos_weight.to(device) if getattr(pos_weight, "ndim", 0) else pos_weight
    expected = fastmix.soft_binary_cross_entropy(z, t, pos_weight=torch.full((3,), 2.5, device=device))
    rows = t if dense else F.one_hot(t, 3).float()
    same(expected, F.binary_cross_entropy_with_logits(z, rows, pos_weight=torch.tensor(2.5, device=device)))
    assert torch.equal(fastmix.soft_binary_cross_entropy(z, t, pos_weight=pos_weight), expected)
    assert torch.equal(fastmix.SoftBinaryCrossEntropyLoss(pos_weight=pos_weight).to(device)(z, t), expected)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"target": torch.tensor([0, -100, 2, 0])}, ValueError, "got -100 in row 1"),
        ({"pos_weight": torch.ones(4)}, ValueError, r"pos_weight: expected shape \[3\]"),
        ({"pos_weight": "2"}, TypeError, "pos_weight: .*'2'"),
        ({"pos_weight": torch.ones(3, 1)}, ValueError, r"pos_weight: expected shape \[3\]"),
        ({"pos_weight": True}, TypeError, "pos_weight: .*True"),
        ({"pos_weight": torch.tensor(2)}, TypeError, "pos_weight: .*int64"),
        ({"pos_weight": torch.ones(3, requires_grad=True)}, ValueError, "pos_weight: expected a constant"),
        ({"pos_weight": torch.ones(3, device="meta")}, ValueError, "pos_weight: expected a tensor on cpu, got .*meta"),
        ({"threshold": "0.2"}, TypeError, "threshold: expected a float or None, got '0.2'"),
        ({"threshold": True}, TypeError, "threshold: .*True"),
        ({"threshold": torch.tensor(0.2)}, TypeError, "threshold: .*tensor"),
        ({"threshold": NAN}, ValueError, "threshold: expected a number or None, got nan"),
        ({"class_reduction": "rows"}, ValueError, "class_reduction: expected 'mean', 'sum' or 'none', got 'rows'"),
        ({"ignore_value": "none", "target": torch.zeros(4, 3)}, TypeError, "ignore_value"),
        ({"class_reduction": None}, ValueError, "class_reduction: .*NoneType"),
    ],
    ids=str,
)
def test_bad_input(change, kind, words):
    arguments = {"logits": torch.zeros(4, 3), "target": torch.tensor([0, 1, 2, 0]), **change}
    with pytest.raises(kind, match=words):
        fastmix.soft_binary_cross_entropy(**arguments)


@pytest.mark.slow
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


# Tiles


def class_weights(C, dtype, device):
    return {name: (torch.rand(C, device=device) + 0.1).to(accumulator(dtype)) for name in ("weight", "pos_weight")}


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("kind", ["k-hot", "dense"])
def test_every_phase_of_tiles(kind, windows, monkeypatch):
    """Rows of several tiles: the first has the ends."""
    if TRITON:
        monkeypatch.setattr(soft_binary_cross_entropy, "binary_tile", lambda *_: (2, 16, 1))
    for C, offset, dtype in itertools.product((47, 70), (0, 3), (torch.float32, torch.bfloat16)):
        z = placed(3 * torch.randn(3, C), dtype, offset, C, windows)
        target, oracle_target, leaf = target_of(kind, z.shape, 3, dtype, windows)
        with guarded_allocations():
            for options in ({}, {**class_weights(C, dtype, windows), "reduction": "none", "label_smoothing": 0.1}):
                check(z, target, oracle_target, leaf, **options)


def test_components_in_the_ends(windows):
    """Every class is once what a row's target names, first and last ones too; the gradient to its weight is its own."""
    for C, dtype in ((19, torch.float32), (37, torch.bfloat16)):
        z = placed(3 * torch.randn(C, C), dtype, 1, C, windows)
        classes = torch.stack((torch.arange(C), torch.arange(C).flip(0)), 1).to(windows)
        weights = torch.rand(C, 2, device=windows, requires_grad=True)
        check(z, fastmix.SoftTarget(classes, weights), (numpy(classes), numpy(weights)), weights, class_reduction="sum")


@pytest.mark.skipif(not TRITON, reason=NO_TRITON)
def test_few_rows_of_many_classes_are_many_programs():
    """A row's tiles are independent, and no longer than what one program takes."""
    for dtype, C in itertools.product(FLOATS, (21841, 262144)):
        view = _class_tiles.View(torch.empty(1, C, dtype=dtype))
        how = _class_tiles.shared_layout(view)
        assert how.wide or dtype == torch.float64
        assert _launch.binary_tile(C, how.pixels, how.wide, how.vector, dtype)[1] <= 4096


# Properties on drawn inputs


means = st.sampled_from(["mean", "sum"])


def as_target(target):
    return SoftTarget(*target) if isinstance(target, tuple) else target


def losses_of(z, target, **options):
    return fastmix.soft_binary_cross_entropy(z, as_target(target), reduction="none", **options)


def moved(target, device):
    return tuple(t.to(device) for t in target) if isinstance(target, tuple) else target.to(device)


@given(
    factor=2,
    shape=logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    K=st.sampled_from([2, 1, 5]),
    weighted=st.booleans(),
    smoothing=smoothings,
    threshold=st.sampled_from([None, 0.45]),
    class_reduction=means,
    reduction=reductions,
    places=layout_triples,
)
def test_it_is_the_oracles_in_any_memory(
    device, shape, dtype, seed, kind, K, weighted, smoothing, threshold, class_reduction, reduction, places
):
    rng = generator(seed)
    z = (3 * torch.randn(shape, generator=rng)).to(dtype)
    target = drawn_target(kind, shape, rng, dtype, K=K)
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype)
    w, p = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1 if weighted else None for _ in range(2))
    parts = list(target) if isinstance(target, tuple) else [target]
    options = {"label_smoothing": smoothing, "threshold": threshold, "class_reduction": class_reduction, "reduction": reduction}

    def op(z, upstream, w, p, *parts):
        leaf = parts[-1].detach().requires_grad_() if parts[-1].is_floating_point() else None
        given = SoftTarget(parts[0], leaf) if parts[1:] else parts[0] if leaf is None else leaf
        values = tuple(map(numpy, parts)) if parts[1:] else numpy(parts[0])
        loss = check(z, given, values, leaf, upstream, weight=w, pos_weight=p, **options)
        return (loss.detach(),) if leaf is None else (loss.detach(), leaf.grad)

    inputs = [(part, places[1]) for part in parts]
    run(op, device, (z, places[0]), (upstream, places[2]), (w, "misaligned"), (p, "misaligned"), *inputs)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, kind=target_kinds, smoothing=smoothings)
def test_rows_may_come_in_any_order(device, shape, dtype, seed, kind, smoothing):
    rng = generator(seed)
    z = torch.randn(shape, generator=rng).to(dtype).to(device)
    target = moved(drawn_target(kind, shape, rng, dtype), device)
    order = torch.randperm(shape[0], generator=rng).to(device)
    turned = tuple(t[order] for t in target) if isinstance(target, tuple) else target[order]
    there = losses_of(z[order], turned, label_smoothing=smoothing)
    here = losses_of(z, target, label_smoothing=smoothing)[order]
    torch.testing.assert_close(there, here, rtol=1e-6 if here.dtype == torch.float32 else 1e-14, atol=0.0)


@given(shape=small_logits_shapes, seed=seeds, smoothing=st.sampled_from([0.0, 0.25]))
def test_both_sides_are_alike(device, shape, seed, smoothing):
    """The loss of logits -z and targets 1-t is that of z and t, and so is the gradient but for its sign."""
    rng = generator(seed)
    z = torch.randn(shape, generator=rng, dtype=torch.float64).to(device)
    t = (torch.randint(0, 17, shape, generator=rng) / 16).double().to(device)  # 1-t is exact
    results = []
    for sign, target in ((1, t), (-1, 1 - t)):
        leaf = (sign * z).requires_grad_()
        loss = losses_of(leaf, target, label_smoothing=smoothing)
        results.append((loss, sign * torch.autograd.grad(loss.sum(), leaf)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, threshold=st.sampled_from([None, 0.45]), weighted=st.booleans())
def test_a_component_of_weight_0_changes_nothing(device, shape, dtype, seed, threshold, weighted):
    rng = generator(seed)
    z = torch.randn(shape, generator=rng).to(dtype).to(device)
    classes, weights = moved(drawn_target("k-hot", shape, rng, dtype), device)
    w = torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)).to(device) if weighted else None
    other = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=rng).to(device)
    more = torch.cat((classes, other), 1), torch.cat((weights, torch.zeros_like(weights[:, :1])), 1)
    one, two = (losses_of(z, target, weight=w, threshold=threshold) for target in ((classes, weights), more))
    torch.testing.assert_close(one, two, rtol=1e-6 if one.dtype == torch.float32 else 1e-14, atol=0.0)


@given(shape=small_logits_shapes, seed=seeds, kind=st.sampled_from(["k-hot", "k-hot per pixel"]), weighted=st.booleans())
def test_a_dense_target_is_as_good(device, shape, seed, kind, weighted):
    rng = generator(seed)
    z = torch.randn(shape, generator=rng, dtype=torch.float64).to(device)
    target = SoftTarget(*moved(drawn_target(kind, shape, rng, torch.float64, K=3), device))
    w, p = (torch.rand(shape[1], generator=rng, dtype=torch.float64).to(device) if weighted else None for _ in range(2))
    for threshold in (None, 0.45):
        hot, dense = (losses_of(z, t, weight=w, pos_weight=p, threshold=threshold) for t in (target, target.dense(shape[1])))
        torch.testing.assert_close(hot, dense)


@pytest.mark.parametrize("class_reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 1)])
def test_positive_weights_are_broadcast_as_torchs(shape, class_reduction):
    logits, rows, weight = torch.randn(4, 3), torch.rand(4, 3), torch.rand(shape) + 0.5
    loss = fastmix.soft_binary_cross_entropy(logits, rows, pos_weight=weight, class_reduction=class_reduction)
    expected = F.binary_cross_entropy_with_logits(logits, rows, pos_weight=weight, reduction=class_reduction)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match=r"pos_weight: expected shape \[3\]"):
        fastmix.soft_binary_cross_entropy(logits.unsqueeze(2), rows.unsqueeze(2), pos_weight=torch.ones(1, 3))
