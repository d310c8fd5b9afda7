"""What every loss promises, each promise in one test for all of them: layouts, upstream gradients, who may change what and when,
rows that are not finite, transforms, programs, MixedRows, refusals. Values and what is one loss's own are in the tests of its name."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import test_js_divergence
import test_soft_binary_cross_entropy
import test_soft_cross_entropy
import torch
import torch.nn.functional as F
from memory import Fresh, guarded_allocations, is_torch, placed
from numerics import FLOATS, LAMBDA, RELATIVE, accumulator, numpy, target_of
from plain import compiled, interpreted
from plain import leaf as leaf_of
from torch.testing import assert_close as same

import fastmix
from fastmix import MixedRows, SoftTarget, _torch, reference

INF, NAN = float("inf"), float("nan")
REDUCTIONS = ("mean", "sum", "none")


class Loss(NamedTuple):
    """A loss as these tests call it: op(z, target, **options). One without a target takes None."""

    name: str
    op: Callable
    check: Callable  # (z, target, the oracle's target, the target's leaf, upstream, **options): all against the oracle
    grad: Callable  # the oracle's gradient to z
    kinds: tuple  # of targets
    weights: tuple  # names of class weights
    options: tuple  # some that are no default
    slope: Callable  # of a row's loss in its target: [N, C]
    eager: Callable  # (z, dense rows) -> the rows' losses, by torch
    words: str  # of the refusal of second derivatives
    own: dict  # options that no other loss has

    def logits(self, N, C, dtype=torch.float32, device="cpu", size=1.0):
        shape = (N, C) if self.kinds else (3, N, C)
        return (size * torch.randn(shape)).to(dtype).to(device)

    def rows(self, t):
        """A tensor like the logits, its rows first."""
        return t if self.kinds else t.transpose(0, 1)

    def targets(self, z, **options):
        """(target, the oracle's target, the tensor of it that a gradient goes to or None) of every kind"""
        if not self.kinds:
            return [(None, None, None)]
        return [target_of(kind, z.shape, device=z.device, **options) for kind in self.kinds]

    def class_weights(self, C, dtype, device):
        return {name: (torch.rand(C, device=device) + 0.1).to(accumulator(dtype)) for name in self.weights}


def of_sets(z, target, **options):
    return fastmix.js_divergence(z, **options)


def check_sets(z, target, oracle_target, leaf, upstream=None, **options):
    return test_js_divergence.check(z, 1.0 if upstream is None else upstream, **options)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss(
            "soft_cross_entropy", fastmix.soft_cross_entropy, test_soft_cross_entropy.check,
            lambda z, target, g, **options: reference.soft_cross_entropy_grad(z, target, g, **options)[0],
            ("k-hot", "indices", "dense"), ("weight",), ({"label_smoothing": 0.1},), lambda z: -torch.log_softmax(z, 1),
            lambda z, rows: F.cross_entropy(z, rows, reduction="none"), "cross_entropy on target.dense", {"ignore_index": 2},
        ),
        Loss(
            "soft_binary_cross_entropy", fastmix.soft_binary_cross_entropy, test_soft_binary_cross_entropy.check,
            lambda z, target, g, **options: reference.soft_binary_cross_entropy_grad(z, target, g, **options)[0],
            ("k-hot", "indices", "dense"), ("weight", "pos_weight"),
            (
                {"label_smoothing": 0.1, "class_reduction": "sum"},
                {"label_smoothing": 0.1, "threshold": 0.3},
            ),
            lambda z: -z / z.shape[1],
            lambda z, rows: F.binary_cross_entropy_with_logits(z, rows, reduction="none").mean(1),
            "binary_cross_entropy_with_logits on target.dense", {"threshold": 0.45, "class_reduction": "sum"},
        ),
        Loss(
            "js_divergence", of_sets, check_sets,
            lambda z, target, g, **options: reference.js_divergence_grad(z, g, **options),
            (), (), ({"scale": 12.0},), None, None, "kl_div", {},
        ),
    )
}  # fmt: skip


every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
of_targets = pytest.mark.parametrize("loss", [loss for loss in LOSSES.values() if loss.kinds], ids=lambda loss: loss.name)


# Upstream gradients. The gradient is formed in the forward and scaled once: whatever comes, however often.


@pytest.mark.trap("Liger-Kernel#1298", "TransformerEngine#3193")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_loss
def test_per_row_upstream(loss, dtype, device):
    """A scalar load of grad_output scales every row by row 0 (Liger-Kernel#1298)."""
    z = loss.logits(6, 9, dtype, device)
    upstream = torch.tensor([0.0, 1.0, -2.0, 1e4, 1e-4, 3.0], dtype=accumulator(dtype), device=device)
    for target in loss.targets(z):
        loss.check(z, *target, upstream, reduction="none")


@pytest.mark.slow_interpreted
@pytest.mark.trap("scaled-in-place")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_loss
def test_retained_graph(loss, dtype, device):
    """Scaled in place twice, the second backward would give three times the gradient."""
    z = loss.logits(6, 9, dtype, device).requires_grad_()
    for (target, _, _), options in itertools.product(loss.targets(z), ({}, loss.options[0])):
        value = loss.op(z, target, **options)
        first, again, scaled = (torch.autograd.grad(value * f, z, retain_graph=True)[0].double() for f in (1.0, 1.0, 2.0))
        assert torch.equal(again, first)
        same(scaled, 2 * first, rtol=0, atol=2.0**-23 if dtype == torch.float16 else 0)  # whose smallest have fewer bits


@pytest.mark.slow_interpreted
@every_loss
def test_the_loss_may_be_changed_in_place(loss, device):
    """As gradient accumulation is often written."""
    z = loss.logits(6, 9, device=device).requires_grad_()
    for (target, _, leaf), reduction in itertools.product(loss.targets(z), REDUCTIONS):
        leaves = (z,) if leaf is None else (z, leaf)
        before = z.detach().clone()
        value = loss.op(z, target, reduction=reduction)
        expected = torch.autograd.grad(value.sum() / 4, leaves, retain_graph=True)
        value /= 4
        same(torch.autograd.grad(value.sum(), leaves), expected)
        assert torch.equal(z, before)


@pytest.mark.trap("unsloth#5002")
@every_loss
def test_expanded_upstream_and_two_losses(loss, device):
    z = loss.logits(6, 9, device=device).requires_grad_()
    target, _, _ = loss.targets(z)[0]
    rows = loss.op(z, target, reduction="none")
    one = torch.autograd.grad(rows.sum(), z, retain_graph=True)[0]
    same(one, torch.autograd.grad(loss.op(z, target, reduction="sum"), z)[0])
    both = loss.op(z, target) + 3 * loss.op(z, target, reduction="sum")
    mean = torch.autograd.grad(loss.op(z, target), z)[0]
    same(torch.autograd.grad(both, z)[0], mean + 3 * one)


@pytest.mark.slow_interpreted
@pytest.mark.trap("float16-underflow")
@every_loss
def test_float16_gradients_do_not_underflow(loss, device):
    """Formed before the scale arrives, much of a mean's gradient would be 0 in float16."""
    z = loss.logits(16, 512, torch.float16, device, size=4.0).requires_grad_()
    target, oracle_target, _ = loss.targets(z)[0]
    formed, scaled = (torch.autograd.grad(factor * loss.op(z, target), z)[0] for factor in (1.0, 65536.0))
    truth = loss.grad(numpy(z), oracle_target, 65536.0)
    assert (numpy(scaled)[np.abs(truth) >= 2.0**-24] != 0).all()
    assert (formed == 0).sum() > 2 * (scaled == 0).sum()
    loss.check(z, target, oracle_target, None, torch.tensor(65536.0, device=device))


@every_loss
def test_second_derivatives_and_batched_backwards_are_refused(loss, device):
    z = loss.logits(3, 4, device=device).requires_grad_()
    for target, _, _ in loss.targets(z):
        value = loss.op(z, target, reduction="none")
        with pytest.raises(RuntimeError, match=rf"{loss.name}: second derivatives are not supported.*{loss.words}"):
            torch.autograd.grad(value.sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{loss.name}: a backward cannot be batched"):
            torch.autograd.grad(value, z, torch.eye(3, device=device), is_grads_batched=True)


@every_loss
def test_only_what_is_asked_for(loss, device):
    z = loss.logits(4, 6, device=device)
    for target, _, leaf in loss.targets(z):
        logits = leaf_of(z)
        if leaf is not None:
            (only,) = torch.autograd.grad(loss.op(z, target), leaf)
            same(torch.autograd.grad(loss.op(logits, target), (logits, leaf))[1], only)
        with torch.no_grad():
            quiet = loss.op(logits, target)
        assert not quiet.requires_grad
        assert torch.equal(quiet, loss.op(logits, target).detach())


# What the caller owns, and may change


@pytest.mark.trap("Liger-Kernel#1251")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_loss
def test_what_was_saved_is_guarded(loss, dtype, device):
    """Logits, dense rows or class weights that are changed between forward and a recomputing backward are noticed
    (Liger-Kernel#1251)."""
    z = loss.logits(6, 9, dtype, device).requires_grad_()
    weights = loss.class_weights(9, dtype, device)
    for target, _, _ in loss.targets(z):
        logits = z * 1
        rows = [target.detach()] if isinstance(target, torch.Tensor) and target.is_floating_point() else []
        for changed in (logits, *weights.values(), *rows):
            value = loss.op(logits, rows[0] if rows else target, **weights)
            changed.detach().mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                (2 * value).backward(retain_graph=True)


@pytest.mark.parametrize(
    "weights", [torch.ones(2, 2), torch.ones(1, 2), torch.ones(5), torch.ones(5, 3), torch.ones(5, 2).half()]
)
@of_targets
def test_a_target_changed_into_a_wrong_one_is_refused(loss, weights, device):
    """It is mutable, and mapping over a pytree checks nothing; a kernel would read beyond the weights."""
    target = SoftTarget(torch.zeros(5, 2, dtype=torch.int64, device=device), torch.ones(5, 2, device=device))
    target.weights = weights.to(device)
    for op in (loss.op, fastmix.mixed_accuracy):
        with pytest.raises((ValueError, TypeError), match="weights: expected"):
            op(torch.zeros(5, 3, device=device), target)


# Rows that are not finite, or not there


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@every_loss
def test_what_is_not_finite_spoils_its_own_row_only(loss, value, device):
    z = loss.logits(4, 6, device=device)
    loss.rows(z)[1][..., 2].view(-1)[0] = value
    z.requires_grad_()
    others = torch.tensor([0, 2, 3], device=device)
    for (target, _, _), options in itertools.product(loss.targets(z), ({}, loss.options[0])):
        losses = loss.op(z, target, reduction="none", **options)
        grad = loss.rows(torch.autograd.grad(losses.sum(), z)[0])
        assert torch.isfinite(losses[others]).all()
        assert torch.isfinite(grad[others]).all()
        if math.isnan(value):
            assert torch.isnan(losses[1])
            assert torch.isnan(grad[1][..., 2].reshape(-1)[0])
        if value > 0 and loss.name != "soft_binary_cross_entropy":  # whose classes are alone: only that softmax has no values
            assert torch.isnan(losses[1])
        if not value < 0 and loss.name == "soft_cross_entropy":
            assert torch.isnan(grad[1]).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_loss
def test_no_rows(loss, reduction, device):
    z = loss.logits(0, 4, device=device).requires_grad_()
    for target, _, _ in loss.targets(z):
        value = loss.op(z, target, reduction=reduction)
        assert {"mean": value.isnan().all(), "sum": (value == 0).all(), "none": value.shape == (0,)}[reduction]
        assert torch.autograd.grad(value.sum(), z)[0].shape == z.shape


@of_targets
def test_wrong_classes_where_the_host_does_not_look(loss, device, monkeypatch):
    """Their rows become NaN, and so do the gradients to their logits; sigmoid losses', to all their components, too."""
    monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
    if device.type == "cpu" and fastmix._backend.of(torch.zeros(1)) is _torch:
        return  # torch's own gather refuses; other devices are covered by the tests of the formulas
    for options in ({}, loss.class_weights(6, torch.float32, device), *loss.options):
        z = torch.randn(4, 6, device=device, requires_grad=True)
        a = torch.rand(4, 2, device=device, requires_grad=True)
        classes = torch.tensor([[1, 0], [0, 6], [-3, 2], [2, 2]], device=device)
        labels = torch.tensor([1, 6, -3, 2], device=device)
        to_weights = "pos_weight" in loss.weights and "threshold" not in options
        for target, leaves in ((SoftTarget(classes, a), (z, a) if to_weights else (z,)), (labels, (z,))):
            losses = loss.op(z, target, reduction="none", **options)
            assert losses.isnan().tolist() == [False, True, True, False]
            for upstream in (1.0, 2.0):
                for gradient in torch.autograd.grad(upstream * losses.sum(), leaves, retain_graph=True):
                    assert gradient[1:3].isnan().all()
                    assert torch.isfinite(gradient[[0, 3]]).all()


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@of_targets
def test_no_further_from_the_truth_than_torch(loss, dtype, device):
    z = (8 * torch.randn(16, 333)).to(dtype).to(device)
    target, oracle_target, _ = target_of("k-hot", z.shape, device=device)
    truth = getattr(reference, loss.name)(numpy(z), oracle_target, reduction="none")
    slopes = loss.grad(numpy(z), oracle_target, np.ones(16), reduction="none")
    ours, torchs = leaf_of(z), leaf_of(z)
    value = loss.op(ours, target, reduction="none")
    eager = loss.eager(torchs, target.dense(333).detach().to(dtype))
    value.sum().backward()
    eager.sum().backward()
    for mine, yours, right in ((value, eager, truth), (ours.grad, torchs.grad, slopes)):
        errors = [np.abs(numpy(t) - right).max() for t in (mine, yours)]
        assert errors[0] <= errors[1] + 2.0**-23 * np.abs(right).max()


# Layouts


@pytest.mark.slow_interpreted
@of_targets
def test_strided_logits(loss, device):
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
            loss.check(
                *(z, *target_of(kind, z.shape, device=device)),
                weight=torch.rand(z.shape[1], device=device),
                label_smoothing=0.1,
            )


@of_targets
def test_gradient_keeps_the_layout(loss, device):
    z = torch.randn(2, 5, 4, 3, device=device).to(memory_format=torch.channels_last).requires_grad_()
    loss.op(z, torch.zeros(2, 4, 3, dtype=torch.int64, device=device)).backward()
    assert z.grad.stride() == z.stride()


@of_targets
@pytest.mark.parametrize("full", [False, True])
def test_classes_with_any_stride_over_one_pixel(loss, full, device):
    """torch calls them contiguous, whatever the stride of a dimension of size 1."""
    z = torch.randn(2, 3, 4, 1, device=device)
    classes = torch.randint(0, 3, (2, 2, 1, 4), device=device).transpose(2, 3)
    assert classes.is_contiguous()
    assert classes.stride(-1) != 1
    weights = torch.rand(2, 2, 1, 4, device=device).transpose(2, 3) if full else torch.rand(2, 2, device=device)
    target = SoftTarget(classes, weights)
    flat = SoftTarget(classes.reshape(2, 2, 4), weights.reshape(2, 2, 4) if full else weights)
    same(loss.op(z, target), loss.op(z[..., 0], flat))
    same(loss.op(z, classes[:, 0]), loss.op(z[..., 0], classes[:, 0, :, 0].contiguous()))


@of_targets
def test_strided_targets(loss, device):
    z = torch.randn(5, 7, device=device)
    classes = torch.randint(0, 7, (5, 4), device=device)[:, ::2]
    for weights in (torch.rand(2, 5, device=device).t(), torch.tensor([[0.3, 0.7]], device=device).expand(5, 2)):
        loss.check(z, SoftTarget(classes, weights), (numpy(classes), numpy(weights)), None)
    dense = torch.rand(7, 10, device=device).t()[::2]
    loss.check(z, dense, numpy(dense), None)


@of_targets
def test_misaligned_logits(loss, device):
    for offset in (1, 3):
        z = torch.randn(4 * 40 + offset, device=device)[offset:].view(4, 40)
        loss.check(z, *target_of("k-hot", z.shape, device=device))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["k-hot", "dense"])
@of_targets
def test_every_phase_and_length(loss, kind, dtype, windows):
    """Each row starts somewhere else; nothing beside it is looked at or written."""
    lengths, places = [*range(1, 26, 4), 15, 16, 31, 34, 63, 70, 101], 3
    if interpreted(windows):  # bfloat16 has the most phases; the others have fewer of the same kind
        lengths, places = (lengths, 2) if dtype == torch.bfloat16 else (lengths[::3], 1)
    for n, C in enumerate(lengths):
        stored = (n % 5, C), (0, C + 1 + n % 3), (0, C)
        for offset, stride in [stored[(n + k) % 3] for k in range(places)]:
            z = placed(3 * torch.randn(3, C), dtype, offset, stride, windows)
            options = loss.class_weights(C, dtype, windows) if n % 3 == 0 else {}
            target = target_of(kind, z.shape, 2, dtype, windows)
            with guarded_allocations():
                loss.check(z, *target, label_smoothing=0.1 * (n % 2), **options)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("shape", [(2, 21, 8, 8), (1, 150, 4, 4), (1, 600, 4, 4), (2, 21, 5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@of_targets
def test_pixels(loss, shape, dtype, device):
    """Maps whose pixels are whole vectors, and others; classes that a tile holds, and more."""
    z = (3 * torch.randn(shape)).to(dtype).to(device)
    every = {**loss.class_weights(shape[1], dtype, device), "label_smoothing": 0.1}
    kinds, options_of_each = ("k-hot", "k-hot per pixel", "indices", "dense"), ({}, every)
    if interpreted(device):
        kinds, options_of_each = (kinds, (every,)) if dtype == torch.bfloat16 else (kinds[1::2], (every,))
    cases = [*itertools.product(kinds, options_of_each)]
    if interpreted(device) and shape[1] == 21:  # a tile holds the classes
        cases.append(("k-hot", {}))
    for kind, options in cases:
        target = target_of(kind, shape, 2, dtype, device)
        with guarded_allocations():
            loss.check(z, *target, **options)


# Forms of a target


@pytest.mark.trap("composer#1407")
@of_targets
def test_all_forms_of_a_target_agree(loss, device):
    z = torch.randn(6, 9, dtype=torch.float64, device=device)
    lam, index = torch.rand(6, dtype=torch.float64, device=device), torch.randperm(6, device=device)
    y = torch.randint(0, 9, (6,), device=device)
    m, onehot = fastmix.Mix(lam, index), F.one_hot(y, 9).double()
    smoothed = (
        () if "pos_weight" in loss.weights else loss.options
    )  # a sigmoid's smoothing is of another size for rows of values
    for options in ({}, *smoothed, *({"threshold": 0.4} for name in loss.weights if name == "pos_weight")):
        losses = [
            loss.op(z, t, **options) for t in (m.target(y), m.target(onehot), m.target(onehot).dense(), m.target(y).dense(9))
        ]
        for other in losses[1:]:
            same(other, losses[0])


@of_targets
class TestMixedRows:
    """Values are mixed where the loss reads them."""

    @pytest.mark.thinned(5)
    @pytest.mark.slow_interpreted
    @pytest.mark.parametrize("values_dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("shape", [(6, 9), (5, 70), (3, 5, 4, 4)], ids=str)
    def test_matches_the_oracle(self, loss, shape, dtype, values_dtype, windows, monkeypatch):
        def mixed_before(*_):
            raise AssertionError("the target was materialised")

        monkeypatch.setattr(fastmix.losses._target, "mix_checked", mixed_before)
        N, C = shape[:2]
        device = windows
        z = torch.randn(shape).to(dtype).to(device)
        values = torch.rand(shape).to(values_dtype).to(device)
        lam = torch.rand(N, dtype=accumulator(values_dtype), device=device)
        if dtype == torch.float64 and values_dtype != torch.float64:
            lam = (lam * 2**20).round() / 2**20  # lam is float32, and so is its complement: exact
        index = torch.randint(0, N, (N,), device=device)
        every = {**loss.class_weights(C, dtype, device), "reduction": "none", **loss.options[0]}
        cases = [(lam, {}), (lam[0], every), (lam, loss.own), (lam[0], {**every, **loss.own})]
        turn = FLOATS.index(dtype) + FLOATS.index(values_dtype)
        for share, options in cases[turn % 2 :: 2] if interpreted(device) else cases:
            rows = reference.mix(numpy(values), np.broadcast_to(numpy(share), N), numpy(index))
            with guarded_allocations():
                loss.check(z, MixedRows(values, share, index), rows, None, **options)

    @pytest.mark.slow_interpreted
    def test_every_phase(self, loss, windows):
        """Values and partners off a boundary, as the logits and elsewhere; nothing beside them is looked at or written."""
        for C, offset, dtype in itertools.product((9, 33, 70), (0, 1, 3), (torch.float32, torch.bfloat16)):
            z = placed(torch.randn(4, C), dtype, offset, C, windows)
            for place in (offset, 2):
                values = placed(torch.rand(4, C), dtype, place, C, windows)
                index = torch.tensor([1, 3, 0, 3], device=windows)
                lam = torch.tensor([0.25, 0.5, 1.0, 0.0], device=windows)
                rows = reference.mix(numpy(values), numpy(lam), numpy(index))
                with guarded_allocations():
                    loss.check(z, MixedRows(values, lam, index), rows, None)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_they_are_not_rounded_to_the_values_dtype(self, loss, dtype, device):
        z = torch.randn(6, 9, device=device)
        values = torch.rand(6, 9).to(dtype).to(device)
        lam, index = torch.rand(6, device=device, requires_grad=True), torch.tensor([1, 2, 3, 3, 0, 0], device=device)
        value = loss.op(z, MixedRows(values, lam, index), reduction="sum")
        rows = reference.mix(numpy(values), numpy(lam), numpy(index))
        np.testing.assert_allclose(
            numpy(value), getattr(reference, loss.name)(numpy(z), rows, reduction="sum"), rtol=RELATIVE[torch.float32]
        )
        terms = (values.double() - values[index].double()) * loss.slope(z.double())
        error = (torch.autograd.grad(value, lam)[0] - terms.sum(1)).abs()
        assert (error <= LAMBDA[torch.float32] * terms.abs().sum(1)).all()
        with pytest.raises(ValueError, match=r"target.values: expected the logits' shape"):
            loss.op(z[:, :8], MixedRows(values, 0.5, index))

    @pytest.mark.parametrize("hostile", [NAN, INF])
    def test_a_weight_of_0_is_not_looked_at(self, loss, hostile, device):
        values = torch.rand(3, 70, device=device)
        values[1] = hostile
        lam, index = torch.tensor([1.0, 0.0, 0.5], device=device), torch.tensor([1, 2, 0], device=device)
        z = torch.randn(3, 70, device=device, requires_grad=True)
        rows = torch.stack((values[0], values[2], (values[2] + values[0]) / 2))
        for options in ({}, *loss.options):
            value = loss.op(z, MixedRows(values, lam, index), reduction="none", **options)
            same(value, loss.op(z, rows, reduction="none", **options))
            assert torch.isfinite(torch.autograd.grad(value.sum(), z)[0]).all()

    def test_a_partner_out_of_range_where_the_host_does_not_look(self, loss, device, monkeypatch):
        """Its row is NaN, also in classes of no weight and where a threshold makes every target 0 or 1."""
        z, values = torch.randn(4, 6, device=device, requires_grad=True), torch.rand(4, 6, device=device)
        lam, index = torch.tensor([0.5, 0.5, 1.0, 0.5], device=device), torch.tensor([1, 4, -3, 0], device=device)
        target = MixedRows(values, lam, index)
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"target.index: expected a partner in \[0, 4\), got 4 in row 1"):
                loss.op(z, target)
        monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
        weight = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0], device=device)
        for options in ({}, {"weight": weight}, *loss.options):
            losses = loss.op(z, target, reduction="none", **options)
            assert losses.isnan().tolist() == [False, True, True, False]
            for factor in (1, 2):
                (grad,) = torch.autograd.grad(factor * losses.sum(), z, retain_graph=True)
                assert torch.isnan(grad[1:3]).all()
                assert torch.isfinite(grad[[0, 3]]).all()

    def test_retained_graph_and_upstream(self, loss, device):
        z = torch.randn(5, 9, device=device, requires_grad=True)
        target = MixedRows(torch.rand(5, 9, device=device), 0.25, torch.tensor([1, 2, 3, 4, 0], device=device))
        value = loss.op(z, target)
        one, two, again = (torch.autograd.grad(f * value, z, retain_graph=True)[0] for f in (1, 2, 1))
        same(two, 2 * one)
        assert torch.equal(one, again)

    def test_is_the_loss_that_gradients_go_through(self, loss, device):
        """Where values or lam need a gradient they are mixed before: the same loss and gradient to the logits."""
        z = torch.randn(5, 9, device=device, requires_grad=True)
        values, lam = torch.rand(5, 9, device=device), torch.rand(5, device=device)
        index = torch.tensor([1, 2, 2, 4, 0], device=device)
        value = loss.op(z, MixedRows(values, lam, index), label_smoothing=0.1)
        (dz,) = torch.autograd.grad(value, z)
        for leaf in (values, lam):
            leaf.requires_grad_()
            through = loss.op(z, MixedRows(values, lam, index), label_smoothing=0.1)
            same(through, value)
            again, dleaf = torch.autograd.grad(through, (z, leaf))
            same(again, dz)
            dense = lam[:, None] * values + (1 - lam)[:, None] * values[index]
            expected = torch.autograd.grad(loss.op(z, dense, label_smoothing=0.1), leaf)[0]
            same(dleaf, expected)
            leaf.requires_grad_(False)

    @pytest.mark.parametrize("shape", [(37, 50), (3, 10, 9, 9)], ids=str)
    def test_blocks_do_not_show(self, loss, shape, monkeypatch):
        z, values = torch.randn(shape), torch.rand(shape)
        lam, index = torch.rand(shape[0]), torch.randint(0, shape[0], (shape[0],))
        rows = reference.mix(numpy(values), numpy(lam), numpy(index))
        for block_bytes in (2**20, 2**10):
            for name in ("LOSS_BLOCK_BYTES", "BINARY_BLOCK_BYTES"):
                monkeypatch.setattr(_torch.sizes, name, block_bytes)
            with fastmix.backend("torch"):
                for reduction in ("mean", "none"):
                    loss.check(z, MixedRows(values, lam, index), rows, None, reduction=reduction, label_smoothing=0.1)

    @pytest.mark.parametrize("shape", [(512, 2500), (2, 64, 120, 120)], ids=str)
    def test_no_mixed_target_is_made(self, loss, shape):
        """On the CPU too, where blocks are mixed that fit the cache, of rows and of pixels."""
        z, target = torch.randn(shape), MixedRows(torch.rand(shape), torch.rand(shape[0]), torch.randperm(shape[0]))
        with fastmix.backend("torch"), Fresh() as made:
            loss.op(z, target, label_smoothing=0.1)
        block = _torch.sizes.BINARY_BLOCK_BYTES if "pos_weight" in loss.weights else _torch.sizes.LOSS_BLOCK_BYTES
        assert 0 < max(made.sizes) <= 2 * block < z.nbytes


# Derivatives, programs, autocast


@pytest.mark.slow
@every_loss
def test_gradcheck(loss, device):
    """To logits, to weights of components, to dense rows; backwards and forwards."""
    on_torch = is_torch(device)
    shapes = ((3, 5), (2, 4, 3)) if loss.kinds else ((3, 3, 5),)
    kinds = ("k-hot", "dense") if loss.kinds else (None,)
    options = itertools.product(shapes, kinds, REDUCTIONS, ({}, *loss.options[:1]))
    for n, (shape, kind, reduction, some) in enumerate(options):
        if on_torch or n in (5, 7, 13, 14, 22):  # the interpreter is slow
            z = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
            weights = loss.class_weights(shape[1], torch.float64, device)
            target, leaf = None, None
            if kind:
                target, _, leaf = target_of(kind, shape, weights_dtype=torch.float64, device=device)
            if kind == "k-hot" and "ignore_index" in loss.own:
                target.classes[1, :1] = -100

            def op(z, leaf, target=target, given={**weights, **some, "reduction": reduction}):  # noqa: B006
                t = SoftTarget(target.classes, leaf) if isinstance(target, SoftTarget) else leaf
                return loss.op(z, t, **given)

            assert torch.autograd.gradcheck(op, (z, leaf), check_forward_ad=True, fast_mode=not on_torch or n % 4 > 0)


@pytest.mark.slow_interpreted
@every_loss
def test_function_transforms(loss, device):
    """grad, vmap and forward mode go through the formulas."""
    z = loss.logits(4, 6, torch.float64, device)
    weights = loss.class_weights(6, torch.float64, device)
    for (target, _, leaf), options in itertools.product(loss.targets(z, weights_dtype=torch.float64), ({}, *loss.options)):

        def value_of(z, leaf, target=target, options=options):
            t = SoftTarget(target.classes, leaf) if isinstance(target, SoftTarget) else target if leaf is None else leaf
            return loss.op(z, t, **weights, **options)

        leaves = (leaf_of(z),) if leaf is None else (leaf_of(z), leaf)
        fixed = None if leaf is None else leaf.detach()
        gradients = torch.autograd.grad(value_of(leaves[0], leaf), leaves)
        same(torch.func.grad(value_of)(z, fixed), gradients[0])
        tangent = torch.randn_like(z)
        forward = torch.func.jvp(functools.partial(value_of, leaf=fixed), (z,), (tangent,))[1]
        same(forward, (gradients[0] * tangent).sum())
        if leaf is not None:
            same(torch.func.grad(value_of, 1)(z, fixed), gradients[1])
            assert "threshold" not in options or (gradients[1] == 0).all()
    batch, labels = (
        torch.stack([loss.logits(4, 6, device=device) for _ in range(3)]),
        torch.randint(0, 6, (3, 4), device=device),
    )
    if loss.kinds:
        same(torch.func.vmap(loss.op)(batch, labels), torch.stack([loss.op(*b) for b in zip(batch, labels, strict=True)]))
    else:
        same(torch.func.vmap(fastmix.js_divergence)(batch), torch.stack([fastmix.js_divergence(b) for b in batch]))


@pytest.mark.slow
@pytest.mark.no_poison
@every_loss
def test_a_program_does_as_eager_does(loss):
    z = loss.logits(4, 6).requires_grad_()
    for (target, _, leaf), options in itertools.product(loss.targets(z), loss.options):
        leaves = (z,) if leaf is None else (z, leaf)

        def value_of(z, target, options=options):
            return loss.op(z, target, **options)

        fast, eager = compiled(value_of)[0](z, target), value_of(z, target)
        same(fast, eager)
        same(torch.autograd.grad(3 * fast, leaves), torch.autograd.grad(3 * eager, leaves))


@every_loss
def test_autocast_keeps_the_loss_in_float32(loss, device):
    z = loss.logits(4, 6, torch.bfloat16, device)
    for target in loss.targets(z):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert loss.op(z, target[0]).dtype == torch.float32
            loss.check(z, *target)


# Refusals


LABELS = torch.tensor([0, 1, 2, 0])
Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits: expected a float16"),
        ({"logits": None}, TypeError, "logits: .*NoneType"),
        ({"logits": np.zeros((1, 3))}, TypeError, "logits: .*ndarray"),
        ({"logits": Z.long()}, TypeError, "logits"),
        ({"logits": Z + 0j}, TypeError, "logits: .*complex64"),
        ({"logits": Z.to(torch.float8_e5m2)}, TypeError, "logits: .*float8_e5m2"),
        ({"logits": Z.to_sparse()}, TypeError, r"logits: expected a dense \(strided\) tensor"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits: expected shape \[N, C\]"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "at least one class"),
        ({"logits": Z.to("meta")}, ValueError, "target: expected a tensor on meta, got .*cpu"),
        ({"target": [0, 1, 2, 0]}, TypeError, "target: expected a SoftTarget"),
        ({"target": None}, TypeError, "target: .*NoneType"),
        ({"target": LABELS.numpy()}, TypeError, "target: .*ndarray"),
        ({"target": (LABELS, LABELS)}, TypeError, "target: .*tuple"),
        ({"target": fastmix.Mix(0.5, torch.arange(4))}, TypeError, "target: .*Mix"),
        ({"target": LABELS.int()}, TypeError, "target: expected an int64"),
        ({"target": Z > 0}, TypeError, "target: .*bool"),
        ({"target": Z + 0j}, TypeError, "target: .*complex64"),
        ({"target": LABELS.to_sparse()}, TypeError, "target: .*(dense|sparse)"),
        ({"target": Z.to_sparse()}, TypeError, r"target: expected a dense \(strided\) tensor"),
        ({"target": LABELS[:3]}, ValueError, r"target: expected shape \[4\]"),
        ({"target": Z.long()}, ValueError, "target"),
        ({"target": torch.zeros(4, 2)}, ValueError, r"in the logits' shape \[4, 3\]"),
        ({"target": torch.zeros(4)}, ValueError, "target"),
        ({"target": LABELS.to("meta")}, ValueError, "target: expected a tensor on cpu, got .*meta"),
        ({"target": Z.to("meta")}, ValueError, "target: expected a tensor on cpu, got .*meta"),
        ({"target": torch.tensor([0, 1, 3, 0])}, ValueError, r"target: expected a class in \[0, 3\), got 3 in row 2"),
        ({"target": torch.tensor([0, -1, 2, 0])}, ValueError, "got -1 in row 1"),
        ({"target": SoftTarget(torch.tensor([[0, 7]] * 4), torch.zeros(4, 2))}, ValueError, "got 7 in row 0"),
        ({"target": SoftTarget(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2))}, ValueError, "target.classes"),
        ({"target": SoftTarget(torch.zeros(4, 2, 5, dtype=torch.int64), torch.zeros(4, 2))}, ValueError, "target.classes"),
        ({"target": MixedRows(torch.zeros(4, 2), 0.5, torch.arange(4))}, ValueError, r"target.values: .*\[4, 3\]"),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight"),
        ({"weight": 1.0}, TypeError, "weight: .*float"),
        ({"weight": torch.ones(3).long()}, TypeError, "weight: .*int64"),
        ({"weight": torch.ones(3).to_sparse()}, TypeError, r"weight: expected a dense \(strided\) tensor"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected shape \[3\]"),
        ({"weight": torch.tensor(1.0)}, ValueError, r"weight: expected shape \[3\], got .*\[\]"),
        ({"weight": torch.ones(3, 1)}, ValueError, r"weight: expected shape \[3\].*, got .*\[3, 1\]"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight: expected a constant"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight: expected a tensor on cpu, got .*meta"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a float in \[0, 1\]"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing: .*got nan"),
        ({"label_smoothing": -1e-9}, ValueError, "label_smoothing: .*got -1e-09"),
        ({"label_smoothing": "0.1"}, TypeError, "label_smoothing"),
        ({"label_smoothing": True}, TypeError, "label_smoothing: .*True"),
        ({"label_smoothing": None}, TypeError, "label_smoothing: .*NoneType"),
        ({"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing: .*tensor"),
        ({"reduction": "average"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'average'"),
        ({"reduction": None}, ValueError, "reduction: .*NoneType"),
        ({"reduction": ["mean"]}, ValueError, "reduction: .*list"),
    ],
    ids=str,
)
@of_targets
def test_bad_input(loss, change, kind, words):
    with pytest.raises(kind, match=words):
        loss.op(**{"logits": Z, "target": LABELS, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@every_loss
def test_no_host_synchronisation(loss, device):
    z = loss.logits(8, 10, device=device).requires_grad_()
    targets = [target for target, _, _ in loss.targets(z)]
    for target in targets:
        loss.op(z, target, **loss.options[0]).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for target in targets:
            loss.op(z, target, **loss.options[0]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [((4, 6, 9), (4, 6), r"classes are dimension 1 .*logits.transpose\(1, 2\)"), ((4, 9), (4, 9), r"y.float\(\)")],
)
def test_labels_of_another_dimension_say_what_to_do(mixed, logits, labels, words):
    """Classes last, as language models have them, and one-hot rows of integers."""
    y = torch.randint(0, 2, labels)
    target = fastmix.Mix(0.5, torch.tensor([1, 0, 3, 2])).target(y) if mixed else y
    for loss in (fastmix.soft_cross_entropy, fastmix.soft_binary_cross_entropy):
        with pytest.raises(ValueError, match=words):
            loss(torch.randn(logits), target)


@pytest.mark.parametrize("loss", [fastmix.soft_cross_entropy, fastmix.soft_binary_cross_entropy])
def test_class_labels_as_floats_are_told_to_be_int64(loss):
    y = torch.arange(4.0)
    mixed = fastmix.MixedRows(y, 0.5, torch.arange(4))
    for target in (y, mixed):
        with pytest.raises(ValueError, match=r"class labels are int64: y\.long\(\)"):
            loss(torch.zeros(4, 5), target)
    with pytest.raises(ValueError, match=r"shape \[4, 5\], got"):  # rows of another width are no class labels
        loss(torch.zeros(4, 5), torch.zeros(4, 3))
