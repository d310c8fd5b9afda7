"""Calibration error, area under the ROC curve and the GAN's objective, each against its definition written out."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close as same

import fastmix
from fastmix import auroc, expected_calibration_error, gan_loss


@pytest.mark.parametrize(("N", "C", "bins", "spread"), [(200, 10, 15, 3.0), (57, 3, 4, 1.0), (5, 2, 1, 8.0), (1, 1, 15, 1.0)])
def test_calibration_error_is_its_definition(N, C, bins, spread):
    logits, y = spread * torch.randn(N, C), torch.randint(0, C, (N,))
    p = logits.double().softmax(1).numpy()
    confidence, right = p.max(1), p.argmax(1) == y.numpy()
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.sum() / N * abs(right[inside].mean() - confidence[inside].mean())
    error = expected_calibration_error(logits, y, bins=bins)
    assert error.dtype == torch.float64
    np.testing.assert_allclose(float(error), total, rtol=1e-12, atol=1e-15)


def test_calibration_of_a_sure_model():
    sure = torch.tensor([[1e4, 0.0], [1e4, 0.0], [0.0, 1e4], [0.0, 1e4]], dtype=torch.bfloat16)
    assert float(expected_calibration_error(sure, torch.tensor([0, 0, 1, 1]))) == 0
    assert float(expected_calibration_error(sure, torch.tensor([0, 0, 0, 1]))) == 0.25
    assert math.isnan(expected_calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize("values", [2, 7, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auroc_counts_pairs(values, dtype):
    scores = torch.randint(0, values, (80,)).to(dtype)  # ties among them
    positive = torch.rand(80) < 0.3
    positive[:2] = torch.tensor([True, False])
    pairs = scores[positive].double()[:, None] - scores[~positive].double()
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean()
    same(auroc(scores, positive), expected, rtol=1e-12, atol=0)
    same(auroc(scores, positive.long()), expected, rtol=1e-12, atol=0)
    same(auroc(-scores, positive), 1 - expected, rtol=1e-12, atol=0)


def test_auroc_that_is_not_defined():
    assert math.isnan(auroc(torch.rand(3), torch.ones(3, dtype=torch.bool)))
    assert math.isnan(auroc(torch.rand(0), torch.ones(0, dtype=torch.bool)))
    assert math.isnan(auroc(torch.tensor([0.0, math.nan, 1.0]), torch.tensor([True, False, True])))
    assert float(auroc(torch.tensor([-math.inf, 0.0, math.inf]), torch.tensor([False, False, True]))) == 1


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3), torch.rand(6)], ids=["float", "0-d", "rows"])
@pytest.mark.parametrize("flat", [False, True])
def test_gan_loss_is_its_formula(lam, flat):
    d = torch.nn.Sequential(torch.nn.Linear(4, 1), *[torch.nn.Flatten(0)] * flat)
    real, fake = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    lam = lam.requires_grad_() if isinstance(lam, torch.Tensor) else lam
    rows = lam.expand(6) if isinstance(lam, torch.Tensor) else torch.full((6,), lam)
    mixed = rows[:, None] * real + (1 - rows[:, None]) * fake.detach()
    expected = F.binary_cross_entropy_with_logits(d(mixed).view(-1), rows)
    leaves = [real, d[0].weight, *([lam] if isinstance(lam, torch.Tensor) else [])]
    loss = gan_loss(d, real, fake, lam)
    same(loss, expected)
    same(torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(expected, leaves))
    assert torch.autograd.grad(loss, fake, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: expected_calibration_error(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)), ValueError, "logits"),
        (lambda: expected_calibration_error(torch.zeros(2, 3), torch.zeros(2)), TypeError, "y"),
        (lambda: expected_calibration_error(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), bins=0), ValueError, "bins"),
        (lambda: auroc(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)), ValueError, "scores"),
        (lambda: auroc(torch.zeros(2), torch.zeros(2)), TypeError, "positive"),
        (lambda: auroc(torch.zeros(2), torch.zeros(3, dtype=torch.int64)), ValueError, "positive"),
        (lambda: gan_loss(None, torch.zeros(2, 3), torch.zeros(2, 3), 0.5), TypeError, "discriminate"),
        (lambda: gan_loss(torch.nn.Linear(3, 1), torch.zeros(2, 3), torch.zeros(2, 4), 0.5), ValueError, "fake"),
        (lambda: gan_loss(torch.nn.Linear(3, 2), torch.zeros(2, 3), torch.zeros(2, 3), 0.5), ValueError, "discriminate: .*one logit"),
        (lambda: gan_loss(torch.nn.Linear(3, 1), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), ValueError, "lam"),
    ],
)  # fmt: skip
def test_refuses(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


# The union of labels


def test_union_of_classes():
    t = fastmix.SoftTarget(
        torch.tensor([[0, 2], [1, 1], [2, -100], [0, 1]]), torch.tensor([[0.7, 0.3], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
    )
    expected = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 1, 0]])
    assert torch.equal(t.union(3), expected)
    smooth = fastmix.SoftTarget(t.classes, t.weights, label_smoothing=0.1, num_classes=3)
    assert torch.equal(smooth.union(), expected)
    pixels = fastmix.SoftTarget(torch.randint(0, 3, (2, 2, 4, 4)), torch.rand(2, 2))
    assert torch.equal(pixels.union(3), (pixels.dense(3) > 0).float())


def test_union_of_rows():
    values = (torch.rand(5, 4) < 0.4).float()
    index, lam = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([0.5, 1.0, 0.0, 0.9, 0.1])
    expected = torch.maximum(values, values[index])
    expected[1], expected[2] = values[1], values[3]
    assert torch.equal(fastmix.MixedRows(values, lam, index).union(), expected)
    assert torch.equal(fastmix.MixedRows(values, 0.5, index).union(), torch.maximum(values, values[index]))
