"""The oracle itself, against finite differences and against float64 autograd of expressions written another way."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import numpy

from fastmix import SoftTarget, reference


def differences(f, *arguments, step=1e-6):
    """Central differences of a scalar function in each of its arguments."""
    grads = []
    for n, a in enumerate(arguments):
        grad = np.zeros_like(a)
        for at in np.ndindex(a.shape):
            ends = []
            for sign in (1, -1):
                moved = a.copy()
                moved[at] += sign * step
                ends.append(f(*arguments[:n], moved, *arguments[n + 1 :]))
            grad[at] = (ends[0] - ends[1]) / (2 * step)
        grads.append(grad)
    return grads


def test_mix_gradients_by_finite_differences():
    rng = np.random.default_rng(0)
    x, lam, g = rng.normal(size=(5, 2, 3, 4)), rng.normal(size=5), rng.normal(size=(5, 2, 3, 4))
    index = np.array([1, 1, 4, 0, 4])
    for box in (None, rng.integers(-1, 5, size=(5, 4))):
        expected = differences(lambda x, lam, b=box: np.sum(g * reference.mix(x, lam, index, b)), x, lam)
        for ours, theirs in zip(reference.mix_grad(g, x, lam, index, box), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_mix_is_a_matrix_times_the_batch():
    """Mixing without boxes is (diag(lam) + diag(1-lam) P) x, with P the 0/1 matrix of the partners."""
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    lam = torch.rand(6, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 6, (6,))
    g = torch.randn(6, 3, dtype=torch.float64)
    mixed = (torch.diag(lam) + torch.diag(1 - lam) @ F.one_hot(index, 6).double()) @ x
    np.testing.assert_allclose(reference.mix(numpy(x), numpy(lam), numpy(index)), numpy(mixed))
    expected = torch.autograd.grad(mixed, (x, lam), g)
    for ours, theirs in zip(reference.mix_grad(numpy(g), numpy(x), numpy(lam), numpy(index)), expected, strict=True):
        np.testing.assert_allclose(ours, numpy(theirs))


@pytest.mark.slow
def test_loss_gradients_by_finite_differences():
    rng = np.random.default_rng(0)
    for shape, e, reduction, w in itertools.product([(4, 5), (2, 3, 2)], (0.0, 0.2), ("mean", "sum", "none"), (False, True)):
        N, C, *inner = shape
        z, classes = rng.normal(size=shape), rng.integers(0, C, size=(N, 3, *inner))
        classes[0, 0] = 1
        options = {"weight": rng.random(C) if w else None, "ignore_index": 1, "label_smoothing": e, "reduction": reduction}
        upstream = rng.normal(size=(N, *inner)) if reduction == "none" else rng.normal()

        def loss(z, t, khot=True, classes=classes, options=options, upstream=upstream):
            return np.sum(upstream * reference.soft_cross_entropy(z, (classes, t) if khot else t, **options))

        for khot, t in ((True, rng.normal(size=classes.shape)), (False, rng.random(size=shape))):
            expected = differences(lambda z, t, k=khot: loss(z, t, k), z, t)
            ours = reference.soft_cross_entropy_grad(z, (classes, t) if khot else t, upstream, **options)
            for a, b in zip(ours, expected, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max()))


def test_takes_a_soft_target_as_it_is():
    target = SoftTarget(torch.tensor([[0, 2]]), torch.tensor([[0.75, 0.25]]))
    z = [[1.0, 2.0, 3.0]]
    pair = numpy(target.classes), numpy(target.weights)
    assert reference.soft_cross_entropy(z, target) == reference.soft_cross_entropy(z, pair)
    assert reference.mixed_accuracy(z, target) == 0.25


def test_loss_is_the_relative_entropy_of_smoothed_rows():
    """With dense smoothed rows t', the loss is sum t'*log(t'/softmax(z)) plus the entropy of t': torch's kl_div, not our sum."""
    z = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    classes, weights = torch.randint(0, 7, (6, 3)), torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    w = torch.rand(7, dtype=torch.float64) + 0.1
    e = 0.15
    total = weights.sum(1, keepdim=True)
    rows = sum((1 - e) * weights[:, k, None] * F.one_hot(classes[:, k], 7) for k in range(3)) + e * total / 7
    rows = rows * w
    loss = F.kl_div(F.log_softmax(z, 1), rows, reduction="none").sum() - torch.xlogy(rows, rows).sum()
    loss = loss / (weights * w[classes]).sum()
    target = numpy(classes), numpy(weights)
    options = {"weight": numpy(w), "label_smoothing": e}
    np.testing.assert_allclose(reference.soft_cross_entropy(numpy(z), target, **options), loss.item())
    expected = torch.autograd.grad(loss, (z, weights))
    for a, b in zip(reference.soft_cross_entropy_grad(numpy(z), target, **options), expected, strict=True):
        np.testing.assert_allclose(a, numpy(b), atol=1e-12)
