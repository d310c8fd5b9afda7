"""mixed_loss, the helper beside the losses written out, and mixed_accuracy: weights of 0, gradients, and what they refuse."""

import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import agreeing_forms, dtypes, generator, given, partners, partners_of, seeds, small_logits_shapes, st
from numerics import RELATIVE, numpy, target_of

import fastmix
from fastmix import Mix, MixedRows, SoftTarget, reference

CE = functools.partial(F.cross_entropy, reduction="none")
LAM, INDEX, Y = torch.tensor([0.25, 1.0, 0.0, 0.5]), torch.tensor([1, 0, 3, 3]), torch.tensor([2, 0, 1, 1])


def bce(outputs, labels):
    return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean(1)


def focal(outputs, labels):
    p = outputs.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return -((1 - p) ** 2) * p.log()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixed_loss_is_the_two_losses(reduction):
    z, target = torch.randn(4, 3, requires_grad=True), Mix(LAM, INDEX).target(Y)
    rows = LAM * focal(z, Y) + (1 - LAM) * focal(z, Y[INDEX])
    expected = rows if reduction == "none" else getattr(rows, reduction)()
    loss = fastmix.mixed_loss(focal, z, target, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(*(torch.autograd.grad(value.sum(), z) for value in (loss, expected)), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_agrees_with_the_fused_loss():
    """Cross-entropy is linear in its target: K components, pixels, options handed through."""
    for shape, weights_shape in (((5, 7), (5, 3)), ((2, 7, 4, 3), (2, 3)), ((2, 7, 4, 3), (2, 3, 4, 3))):
        z = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(weights_shape, dtype=torch.float64).softmax(1).requires_grad_()
        target = SoftTarget(torch.randint(7, (shape[0], 3, *shape[2:])), weights)
        loss = fastmix.mixed_loss(CE, z, target, label_smoothing=0.1, reduction="sum")
        fused = fastmix.soft_cross_entropy(z, target, label_smoothing=0.1, reduction="sum")
        torch.testing.assert_close(loss, fused)
        for ours, theirs in zip(*(torch.autograd.grad(value, (z, weights)) for value in (loss, fused)), strict=True):
            torch.testing.assert_close(ours, theirs)
    labels = target.classes[:, 0]
    torch.testing.assert_close(fastmix.mixed_loss(CE, z, labels), F.cross_entropy(z, labels))


def test_arguments_go_to_the_loss():
    z, target = torch.randn(4, 3), Mix(LAM, INDEX).target(Y)
    seen = []

    def loss(outputs, labels, *args, **kwargs):
        seen.append((labels.tolist(), args, kwargs))
        return CE(outputs, labels)

    fastmix.mixed_loss(loss, z, target, 3, temperature=0.5)
    assert seen == [(Y.tolist(), (3,), {"temperature": 0.5}), (Y[INDEX].tolist(), (3,), {"temperature": 0.5})]


def test_rows_of_values():
    z, values = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3)
    lam = LAM.clone().requires_grad_()
    for shares in (lam, lam[0], 0.25):
        target = MixedRows(values, shares, INDEX)
        torch.testing.assert_close(fastmix.mixed_loss(bce, z, target), bce(z, target.dense()).mean())
    (ours,), (theirs,) = (
        torch.autograd.grad(loss, lam)
        for loss in (
            fastmix.mixed_loss(bce, z, MixedRows(values, lam, INDEX)),
            bce(z, MixedRows(values, lam, INDEX).dense()).mean(),
        )
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(fastmix.mixed_loss(bce, z, values), bce(z, values).mean())


@pytest.mark.trap("composer#1407-sigmoid")
def test_the_squared_error_is_not_linear():
    """composer#1407: it exceeds the loss of the mixed target by what the docstring says, and no gradient to the outputs shows it."""
    z, a = torch.randn(4, requires_grad=True), torch.randn(4)
    target = MixedRows(a, LAM, INDEX)
    square = functools.partial(F.mse_loss, reduction="none")
    mixed, proper = fastmix.mixed_loss(square, z, target, reduction="none"), square(z, target.dense())
    torch.testing.assert_close(mixed, proper + LAM * (1 - LAM) * (a - a[INDEX]) ** 2)
    for ours, theirs in zip(*(torch.autograd.grad(loss.sum(), z) for loss in (mixed, proper)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("pixels", [(), (2,)], ids=["rows", "pixels"])
def test_what_has_no_weight_is_not_looked_at(pixels):
    """A focal loss at a masked class: the loss is inf or NaN, and so is its gradient even for an upstream of 0."""
    z = torch.randn(3, 4, *pixels)
    z[:, 3] = -math.inf
    z.requires_grad_()
    classes = torch.tensor([[0, 3], [3, 1], [2, 1]]).view(3, 2, *[1] * len(pixels)).expand(3, 2, *pixels)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    if pixels:
        weights = weights.unsqueeze(2).expand(3, 2, *pixels)
    weights = weights.clone().requires_grad_()
    loss = fastmix.mixed_loss(focal, z, SoftTarget(classes, weights), reduction="sum")
    plain = focal(z, torch.where(weights[:, 0] == 1, classes[:, 0], classes[:, 1])).sum()
    torch.testing.assert_close(loss, plain)
    dz, dweights = torch.autograd.grad(loss, (z, weights))
    assert (
        not torch.autograd.grad((weights * torch.stack([focal(z, c) for c in classes.unbind(1)], 1)).sum(), z)[0]
        .isfinite()
        .all()
    )
    finite = z != -math.inf
    torch.testing.assert_close(dz[finite], torch.autograd.grad(plain, z)[0][finite])
    torch.testing.assert_close(dweights[2, 0], focal(z, classes[:, 0])[2])  # a component's loss, also at 0
    assert torch.isfinite(dweights).all()


def test_partners_without_weight_may_hold_anything():
    values = torch.tensor([[1.0, 0.0], [math.nan, math.inf]])
    z = torch.randn(2, 2, requires_grad=True)
    target = MixedRows(values, torch.tensor([1.0, 0.0]), torch.tensor([1, 0]))
    loss = fastmix.mixed_loss(bce, z, target)
    torch.testing.assert_close(loss, bce(z, values[[0, 0]]).mean())
    assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def test_mixed_loss_under_transforms_and_on_meta():
    z, target = torch.randn(4, 3), Mix(LAM, INDEX).target(Y)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(fastmix.mixed_loss(CE, leaf, target), leaf)
    torch.testing.assert_close(torch.func.grad(lambda z: fastmix.mixed_loss(CE, z, target))(z), expected)
    compiled = torch.compile(fastmix.mixed_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(CE, z, target), fastmix.mixed_loss(CE, z, target))
    assert fastmix.mixed_loss(CE, z.to("meta"), target.to("meta")).device.type == "meta"


def test_dtypes_and_no_rows():
    target = Mix(LAM, INDEX).target(Y)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert fastmix.mixed_loss(CE, torch.randn(4, 3, dtype=dtype), target).dtype == wide
    assert fastmix.mixed_loss(CE, torch.zeros(0, 3), target[:0]).isnan()


PIXELS = SoftTarget(torch.zeros(4, 2, 5, dtype=torch.int64), torch.ones(4, 2, 5))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"loss_fn": None}, TypeError, "loss_fn: expected a function of outputs and labels, got None"),
        (
            {"loss_fn": F.cross_entropy},
            ValueError,
            r'loss_fn: .*shape \[4\], one for each row \(reduction="none"\), got .*\[\]',
        ),
        ({"loss_fn": lambda z, y: z}, ValueError, r'loss_fn: .*reduction="none".*\[4, 3\]'),
        ({"loss_fn": lambda z, y: CE(z, y)[:3]}, ValueError, r'loss_fn: .*reduction="none".*\[3\]'),
        ({"loss_fn": lambda z, y: 1.0}, TypeError, "loss_fn: expected a tensor of losses, got 1.0"),
        ({"outputs": None}, TypeError, "outputs: expected a float16"),
        ({"outputs": torch.zeros(4, 3).long()}, TypeError, "outputs: .*int64"),
        ({"outputs": torch.zeros(3, 3)}, ValueError, r"target.classes: expected 3 rows, as the outputs, got .*\[4, 2\]"),
        ({"outputs": torch.zeros(4, 3, device="meta")}, ValueError, "target.classes: expected a tensor on meta"),
        ({"target": None}, TypeError, "target: expected a SoftTarget, MixedRows or labels, got None"),
        ({"target": [0, 1, 2, 0]}, TypeError, "target: .*list"),
        ({"target": torch.tensor(1)}, ValueError, "target: expected 4 rows"),
        ({"target": Y[:3]}, ValueError, "target: expected 4 rows"),
        ({"target": PIXELS}, ValueError, r"outputs: expected shape \[4, 'C', 5\] or \[4, 5\], as the weights of pixels, got"),
        ({"target": MixedRows(torch.zeros(3, 3), 0.5, INDEX[:3])}, ValueError, "target.values: expected 4 rows"),
        ({"target": MixedRows(torch.zeros(4, 3), 0.5, INDEX + 1)}, ValueError, r"target.index: .*\[0, 4\), got 4 in row 2"),
        ({"reduction": "batchmean"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'batchmean'"),
    ],
)
def test_bad_mixed_loss(change, kind, words):
    arguments = {"loss_fn": CE, "outputs": torch.zeros(4, 3), "target": Mix(LAM, INDEX).target(Y), **change}
    with pytest.raises(kind, match=words) as error:
        fastmix.mixed_loss(arguments.pop("loss_fn"), arguments.pop("outputs"), arguments.pop("target"), **arguments)
    assert re.match(r"[a-z_.]+: expected .+, got ", str(error.value))


# mixed_accuracy


class TestMixedAccuracy:
    def test_matches_the_oracle(self):
        for shape, kind, topk in itertools.product([(6, 9), (2, 5, 3, 4)], ["k-hot", "indices", "dense"], [1, 3, 50]):
            z = torch.randn(shape)
            target, oracle_target, _ = target_of(kind, shape)
            ours = fastmix.mixed_accuracy(z, target, topk=topk)
            assert ours.dtype == torch.float32
            np.testing.assert_allclose(numpy(ours), reference.mixed_accuracy(numpy(z), oracle_target, topk), rtol=1e-6)

    @pytest.mark.trap("mixup-cifar10#8")
    def test_weights_are_not_truncated(self):
        """A float lambda times an integer tensor gives 0 % (mixup-cifar10#8)."""
        z = torch.eye(2)
        target = SoftTarget(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
        assert fastmix.mixed_accuracy(z, target) == 0.75

    def test_nan_hits_nothing(self):
        assert fastmix.mixed_accuracy(torch.tensor([[float("nan")] * 3, [0.0, 1.0, 0.0]]), torch.tensor([0, 1])) == 0.5

    def test_ignored_and_empty(self):
        assert fastmix.mixed_accuracy(torch.eye(2), torch.tensor([0, -100])) == 1
        assert torch.isnan(fastmix.mixed_accuracy(torch.eye(2), torch.tensor([-100, -100])))
        assert torch.isnan(fastmix.mixed_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))

    def test_ignored_components(self):
        """They count nowhere: a perfect prediction gives 1 whatever is ignored, as the loss's mean has it."""
        z = torch.eye(3)
        target = SoftTarget(
            torch.tensor([[0, -100], [2, 1], [-100, -100]]), torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.5, 0.5]])
        )
        np.testing.assert_allclose(fastmix.mixed_accuracy(z, target), (0.75 + 0.5) / (0.75 + 1), rtol=1e-6)
        assert fastmix.mixed_accuracy(z[:1], target[:1]) == 1
        assert torch.isnan(fastmix.mixed_accuracy(z[2:], target[2:]))
        idle = SoftTarget(torch.tensor([[0, -100]]), torch.tensor([[0.0, 1.0]]))
        assert torch.isnan(fastmix.mixed_accuracy(z[:1], idle))
        for shape, kind in itertools.product([(6, 9), (2, 5, 3, 4)], ["k-hot", "k-hot per pixel", "indices"]):
            logits = torch.randn(shape)
            target, oracle_target, _ = target_of(kind, shape)
            classes = oracle_target if kind == "indices" else oracle_target[0]
            ours = fastmix.mixed_accuracy(logits, target, topk=2, ignore_index=int(classes.flat[0]))
            theirs = reference.mixed_accuracy(numpy(logits), oracle_target, 2, ignore_index=classes.flat[0])
            np.testing.assert_allclose(numpy(ours), theirs, rtol=1e-6)

    def test_rows_of_values_and_ties(self):
        values, index = torch.eye(4), torch.tensor([1, 2, 3, 0])
        assert fastmix.mixed_accuracy(values, MixedRows(values, torch.tensor(0.75), index)) == 0.75
        assert fastmix.mixed_accuracy(torch.zeros(4, 4), MixedRows(values, 0.75, index), topk=4) == 1
        tied = fastmix.mixed_accuracy(torch.zeros(4, 4), torch.arange(4))  # one class is chosen, the same in each row
        assert tied == 0.25

    def test_no_values_are_looked_at_on_a_device(self):
        target = SoftTarget(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)).to("meta")
        assert fastmix.mixed_accuracy(torch.zeros(4, 3, device="meta"), target).shape == ()


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"logits": None}, TypeError, "logits: expected a float16"),
        ({"logits": np.zeros((1, 3))}, TypeError, "logits: .*ndarray"),
        ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "logits: .*int64"),
        ({"logits": torch.zeros(4, 3, dtype=torch.complex64)}, TypeError, "logits: .*complex64"),
        ({"logits": torch.zeros(4, 3).to(torch.float8_e4m3fn)}, TypeError, "logits: .*float8_e4m3fn"),
        ({"logits": torch.zeros(4, 3).to_sparse()}, TypeError, r"logits: expected a dense \(strided\) tensor"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits: expected shape \[N, C\]"),
        ({"logits": torch.zeros(4)}, ValueError, r"logits: expected shape \[N, C\]"),
        ({"logits": torch.zeros(4, 0)}, ValueError, r"logits: expected at least one class, got .*\[4, 0\]"),
        ({"logits": torch.zeros(4, 3, device="meta")}, ValueError, "target: expected a tensor on meta"),
        ({"target": None}, TypeError, "target: .*NoneType"),
        ({"target": [0, 1, 2, 0]}, TypeError, "target: .*list"),
        ({"target": (LABELS, LABELS, 0.5)}, TypeError, "target: .*tuple"),
        ({"target": LABELS.numpy()}, TypeError, "target: .*ndarray"),
        ({"target": fastmix.Mix(0.5, torch.arange(4))}, TypeError, "target: .*Mix"),
        ({"target": LABELS.int()}, TypeError, "target: expected an int64 tensor, got .*int32"),
        ({"target": LABELS > 0}, TypeError, "target: .*bool"),
        ({"target": LABELS.to_sparse()}, TypeError, "target: .*(dense|sparse)"),
        ({"target": LABELS[:3]}, ValueError, r"target: expected shape \[4\], got .*\[3\]"),
        ({"target": LABELS[:, None]}, ValueError, r"target: expected shape \[4\], got .*\[4, 1\]"),
        ({"target": torch.tensor(1)}, ValueError, r"target: expected shape \[4\], got .*\[\]"),
        ({"target": LABELS.to("meta")}, ValueError, "target: expected a tensor on cpu, got .*meta"),
        ({"target": LABELS + 1}, ValueError, r"target: expected a class in \[0, 3\), got 3 in row 2"),
        ({"target": LABELS - 1}, ValueError, "target: .*got -1 in row 0"),
        ({"target": torch.zeros(4, 2)}, ValueError, r"target: expected probabilities .*\[4, 3\], got .*\[4, 2\]"),
        ({"target": torch.zeros(4, 3).to_sparse()}, TypeError, r"target: expected a dense \(strided\) tensor"),
        ({"target": SoftTarget(LABELS[:3, None], torch.ones(3, 1))}, ValueError, r"target.classes: expected shape \[4, "),
        ({"target": SoftTarget(LABELS[:, None] + 5, torch.ones(4, 1))}, ValueError, "target: .*got 5 in row 0"),
        ({"target": MixedRows(torch.ones(4, 2), 0.5, LABELS)}, ValueError, r"target.values: expected .*\[4, 3\]"),
        ({"target": MixedRows(torch.ones(4, 3), 0.5, LABELS + 9)}, ValueError, "index: .*got 9 in row 0"),
        ({"topk": 0}, ValueError, "topk: expected an int of at least 1, got 0"),
        ({"topk": -1}, ValueError, "topk: .*got -1"),
        ({"topk": 1.0}, TypeError, "topk: expected an int, got 1.0"),
        ({"topk": True}, TypeError, "topk: .*got True"),
        ({"topk": (1, 5)}, TypeError, "topk: .*tuple"),
        ({"topk": None}, TypeError, "topk: .*NoneType"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got None"),
        ({"topk": torch.tensor(1)}, TypeError, "topk: .*int64 tensor"),
    ],
)
def test_bad_mixed_accuracy(change, kind, words):
    with pytest.raises(kind, match=words) as error:
        fastmix.mixed_accuracy(**{"logits": torch.eye(3)[LABELS], "target": LABELS, **change})
    assert re.match(r"[a-z_.]+: expected .+, got ", str(error.value))


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    partner=partners,
    topk=st.sampled_from([1, 2, 3, 50]),
)
def test_all_forms_agree_on_the_accuracy(device, shape, dtype, seed, partner, topk):
    """All forms of a target agree with the oracle, rows may come in any order, and more of the top hits no less."""
    rng = generator(seed)
    N, C, *inner = shape
    logits = torch.rand(shape, generator=rng).argsort(1).to(dtype).to(device)  # no ties
    y = torch.randint(0, C, (N, *inner), generator=rng).to(device)
    lam, index = torch.rand(N, generator=rng).to(device), partners_of(partner, N, rng).to(device)
    forms = agreeing_forms(y, index, lam, C, torch.float32, rng)
    like = tuple(map(numpy, (torch.stack((y, y[index]), 1), torch.stack((lam, 1 - lam), 1))))
    like = like[0], np.broadcast_to(like[1].reshape(like[1].shape + (1,) * len(inner)), like[0].shape)
    expected = reference.mixed_accuracy(numpy(logits), like, topk)
    for name, (target, _) in forms.items():
        accuracy = fastmix.mixed_accuracy(logits, target, topk)
        assert accuracy.dtype == torch.float32
        np.testing.assert_allclose(numpy(accuracy), expected, rtol=RELATIVE[torch.float32], atol=1e-6, err_msg=name)
    pair = forms["pair"][0]
    order = torch.randperm(N, generator=rng).to(device)
    again = fastmix.mixed_accuracy(logits[order], pair[order], topk)
    np.testing.assert_allclose(numpy(again), expected, rtol=RELATIVE[torch.float32], atol=1e-6)
    if y.numel():
        assert fastmix.mixed_accuracy(logits, pair, topk + 1) >= accuracy - 1e-6
        np.testing.assert_allclose(numpy(fastmix.mixed_accuracy(logits, pair, C)), 1.0, rtol=RELATIVE[torch.float32])
