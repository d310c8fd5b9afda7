"""What counts for nothing in a loss: labels that are not known, and smoothing of classes that are masked."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close as same

import fastmix
from fastmix import MixedRows, SoftTarget, reference

NAN = math.nan


def by_definition(z, t, w, p, e, over, class_reduction, reduction):
    """Row by row and class by class in float64; NaN labels are left out. Returns the loss, differentiable in z."""
    rows, z = [], z.double()
    for n in range(len(z)):
        losses = []
        for c in range(z.shape[1]):
            if not math.isnan(t[n, c]):
                label = (1 - e) * t[n, c].double() + e / over
                losses.append(w[c] * (p[c] * label * F.softplus(-z[n, c]) + (1 - label) * F.softplus(z[n, c])))
        rows.append(sum(losses) / (len(losses) if class_reduction == "mean" else 1) if losses else None)
    if reduction == "none":
        return torch.stack([z.new_zeros(()) if row is None else row for row in rows])
    known = [row for row in rows if row is not None]
    return sum(known) / (len(known) if reduction == "mean" else 1)


@pytest.mark.parametrize("class_reduction", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("e", [0.0, 0.2])
@pytest.mark.parametrize("value", [NAN, -1.0])
def test_unknown_labels_count_for_nothing(class_reduction, reduction, e, value):
    z, t = torch.randn(6, 5, requires_grad=True), torch.randint(0, 2, (6, 5)).float()
    t[torch.rand(6, 5) < 0.4] = NAN
    t[2], t[3] = NAN, 1.0
    w, p = torch.rand(5) + 0.5, torch.rand(5) + 0.5
    expected = by_definition(z, t, w, p, e, 2, class_reduction, reduction)
    options = {"weight": w, "pos_weight": p, "label_smoothing": e, "class_reduction": class_reduction, "reduction": reduction}
    given = torch.where(t.isnan(), torch.full_like(t, value), t)
    loss = fastmix.soft_binary_cross_entropy(z, given, ignore_value=value, **options)
    same(loss, expected.float())
    g = torch.rand(6) if reduction == "none" else torch.tensor(1.0)
    (dz,) = torch.autograd.grad(loss, z, g)
    same(dz, torch.autograd.grad(expected, z, g.double())[0])
    assert bool((dz[t.isnan()] == 0).all())


def test_what_is_unknown_stays_so_through_mixing():
    """A mixed label is known if all that it has weight of are; a weight of 0 reads nothing."""
    values = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, 1.0], [0.0, 1.0, 1.0]])
    lam, index = torch.tensor([0.25, 1.0, 0.0]), torch.tensor([2, 0, 1])
    t = torch.tensor([[0.25, NAN, 0.75], [NAN, NAN, 1.0], [NAN, NAN, 1.0]])
    z = torch.randn(3, 3)
    for missing in (NAN, -1.0):
        rows = MixedRows(torch.where(values.isnan(), torch.full_like(values, missing), values), lam, index)
        loss = fastmix.soft_binary_cross_entropy(z, rows, ignore_value=missing)
        same(loss, by_definition(z, t, torch.ones(3), torch.ones(3), 0.0, 2, "mean", "mean").float())
        same(fastmix.soft_binary_cross_entropy(z, rows.parts(), ignore_value=missing), loss)
    lam = lam.clone().requires_grad_()
    loss = fastmix.soft_binary_cross_entropy(z, MixedRows(values, lam, index), ignore_value=NAN, class_reduction="none")
    (dlam,) = torch.autograd.grad(loss.sum(), lam)
    same(dlam[0], -(z[0, 0] * 1 + z[0, 2] * -1))  # of the two known labels


def test_logits_of_unknown_labels_are_not_read():
    z = torch.tensor([[NAN, math.inf, 0.0]], requires_grad=True)
    t = torch.tensor([[NAN, NAN, 1.0]])
    loss = fastmix.soft_binary_cross_entropy(z, t, ignore_value=NAN)
    same(loss, torch.tensor(math.log(2)))
    same(torch.autograd.grad(loss, z)[0], torch.tensor([[0.0, 0.0, -0.5]]))
    nothing = fastmix.soft_binary_cross_entropy(z, torch.full((1, 3), NAN), ignore_value=NAN)
    assert math.isnan(nothing.detach())  # a mean over nothing
    assert fastmix.soft_binary_cross_entropy(z, torch.full((1, 3), NAN), ignore_value=NAN, reduction="sum").detach() == 0


@pytest.mark.parametrize("kind", ["indices", "hot", "dense", "mixed"])
def test_every_element_for_itself(kind):
    z = torch.randn(4, 5)
    y, lam, index = torch.tensor([0, 4, 2, 2]), torch.rand(4), torch.tensor([1, 2, 3, 0])
    rows = torch.rand(4, 5)
    target, t, over = {
        "indices": (y, F.one_hot(y, 5).float(), 5),
        "hot": (fastmix.Mix(lam, index).target(y), fastmix.Mix(lam, index).target(y).dense(5), 5),
        "dense": (rows, rows, 2),
        "mixed": (MixedRows(rows, lam, index), lam[:, None] * rows + (1 - lam[:, None]) * rows[index], 2),
    }[kind]
    for e, threshold in ((0.0, None), (0.1, None), (0.1, 0.3)):
        label = (1 - e) * t + e / over
        label = label if threshold is None else (label > threshold).float()
        loss = fastmix.soft_binary_cross_entropy(z, target, class_reduction="none", label_smoothing=e, threshold=threshold)
        same(loss, F.binary_cross_entropy_with_logits(z, label, reduction="none"))
        by_row = fastmix.soft_binary_cross_entropy(z, target, label_smoothing=e, threshold=threshold, reduction="none")
        same(loss.mean(1), by_row)
    criterion = fastmix.SoftBinaryCrossEntropyLoss(class_reduction="none", ignore_value=NAN)
    same(criterion(z, target), F.binary_cross_entropy_with_logits(z, t, reduction="none"))
    assert "ignore_value=nan" in repr(criterion)
    for make in (
        lambda: fastmix.SoftBinaryCrossEntropyLoss(ignore_value="x"),
        lambda: fastmix.SoftCrossEntropyLoss(smooth_over="x"),
    ):
        with pytest.raises((TypeError, ValueError)):
            make()


def test_unknown_labels_in_a_compiled_step():
    z, t = torch.randn(4, 5, requires_grad=True), torch.where(torch.rand(4, 5) < 0.5, NAN, 1.0)
    step = torch.compile(
        lambda z, t: fastmix.soft_binary_cross_entropy(z, t, ignore_value=NAN), backend="aot_eager", fullgraph=True
    )
    expected = fastmix.soft_binary_cross_entropy(z, t, ignore_value=NAN)
    same(step(z, t), expected)
    same(torch.autograd.grad(step(z, t), z), torch.autograd.grad(expected, z))


# Smoothing over the classes that are not masked


@pytest.mark.parametrize("kind", ["indices", "hot", "dense", "mixed", "pixels"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_over_finite_classes(kind, reduction, weighted):
    """As the same rows without the masked classes; and as ever where none is masked."""
    e, inner = 0.2, (3, 2) if kind == "pixels" else ()
    z = torch.randn(4, 6, *inner)
    y, lam, index = torch.randint(0, 3, (4, *inner)), torch.rand(4), torch.tensor([1, 2, 3, 0])
    values = torch.rand(4, 6, *inner)
    values[:, 3:] = 0
    w = torch.rand(6) + 0.5 if weighted else None
    target = {"indices": y, "hot": fastmix.Mix(lam, index).target(y), "dense": values, "mixed": MixedRows(values, lam, index),
              "pixels": fastmix.Mix(lam, index).target(y)}[kind]  # fmt: skip
    options = {"reduction": reduction, "label_smoothing": e, "weight": w}
    same(
        fastmix.soft_cross_entropy(z, target, smooth_over="finite", **options), fastmix.soft_cross_entropy(z, target, **options)
    )
    z[:, 3:] = -math.inf
    z = z.requires_grad_()
    few = z.detach()[:, :3].clone().requires_grad_()
    cut = {"dense": values[:, :3], "mixed": MixedRows(values[:, :3], lam, index)}.get(kind, target)
    expected = fastmix.soft_cross_entropy(few, cut, **{**options, "weight": w if w is None else w[:3]})
    loss = fastmix.soft_cross_entropy(z, target, smooth_over="finite", **options)
    same(loss, expected)
    g = torch.rand(loss.shape)
    (dz,) = torch.autograd.grad(loss, z, g)
    same(dz[:, :3], torch.autograd.grad(expected, few, g)[0])
    assert bool((dz[:, 3:] == 0).all())


def test_the_smoothing_of_a_target_over_finite_classes_and_lambdas_gradient():
    z, lam = torch.randn(4, 6), torch.rand(4, dtype=torch.float64, requires_grad=True)
    z[:, 4:] = -math.inf
    z, index, y = z.double(), torch.tensor([1, 2, 3, 0]), torch.arange(4)
    plain = fastmix.Mix(lam, index).target(y)
    target = SoftTarget(plain.classes, plain.weights, label_smoothing=0.1, num_classes=6)
    loss = fastmix.soft_cross_entropy(z, target, smooth_over="finite", label_smoothing=0.1)
    expected = fastmix.soft_cross_entropy(z[:, :4], plain, label_smoothing=1 - 0.9 * 0.9)
    same(loss, expected)
    same(torch.autograd.grad(loss, lam), torch.autograd.grad(expected, lam))
    oracle = reference.soft_cross_entropy(
        z[:, :4].numpy(), (plain.classes.numpy(), plain.weights.detach().numpy()), label_smoothing=0.19
    )
    np.testing.assert_allclose(float(loss.detach()), oracle, rtol=1e-12)
    criterion = fastmix.SoftCrossEntropyLoss(label_smoothing=0.1, smooth_over="finite")
    same(criterion(z, target), loss)
    with pytest.raises(ValueError, match="smooth_over: expected 'all' or 'finite', got 'some'"):
        fastmix.soft_cross_entropy(z, target, smooth_over="some")


def test_ignored_labels_with_smoothing_over_finite_classes():
    z, y = torch.randn(4, 5), torch.tensor([0, -100, 2, -100])
    options = {"label_smoothing": 0.1}
    same(fastmix.soft_cross_entropy(z, y, smooth_over="finite", **options), F.cross_entropy(z, y, **options))
    y[1] = 3
    options = {"label_smoothing": 0.1, "ignore_index": 3}
    y[3] = 1
    same(fastmix.soft_cross_entropy(z, y, smooth_over="finite", **options), F.cross_entropy(z, y, **options))
