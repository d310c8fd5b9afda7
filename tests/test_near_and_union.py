"""Partners by near labels, and targets that are the union of labels."""

import math

import numpy as np
import pytest
import torch
from pages import blocks

import fastmix
from fastmix import CutMix, ManifoldMixup, Mix, Mixup, RandomMix
from fastmix.sampling import draws


def near(**options):
    return Mixup(1.0, partner="near", **{"bandwidth": 1.0, "seed": 3, **options})


def test_near_partners_by_their_own_noise():
    """The largest of log weight + Gumbel noise, row by row in NumPy, of the stream's own numbers."""
    y = torch.tensor([[0.0, 1.0], [0.5, 1.0], [3.0, -1.0], [0.4, 0.2], [7.0, 7.0]])
    x = torch.randn(5, 3)
    for batch in range(20):
        sampler = near(bandwidth=0.8)
        sampler._begin(batch)
        noise = draws.numbers(sampler._state.clone(), 5, 5, False, x).numpy()
        expected = []
        for i in range(5):
            scores = {
                j: -np.sum((y[i] - y[j]).double().numpy() ** 2) / (2 * 0.8**2) - math.log(-math.log(noise[i, j] + 2.0**-54))
                for j in range(5)
                if j != i
            }
            expected.append(max(scores, key=scores.get))
        assert sampler.sample(x, y).index.tolist() == expected


@pytest.mark.slow
def test_near_partners_come_as_often_as_their_weights_say():
    y = torch.tensor([0.0, 1.0, 2.0, 2.5])
    x, sampler, counts = torch.zeros(4, 1), near(), torch.zeros(4, 4)
    for _ in range(3000):
        counts[torch.arange(4), sampler.sample(x, y).index] += 1
    weights = torch.exp(-((y[:, None] - y) ** 2) / 2).fill_diagonal_(0)
    weights /= weights.sum(1, keepdim=True)
    assert (counts / 3000 - weights).abs().max() < 5 * 0.5 / 3000**0.5


def test_near_partners_of_few_rows_and_of_unknown_labels():
    assert near().sample(torch.zeros(0, 2), torch.zeros(0)).index.shape == (0,)
    one = near().sample(torch.zeros(1, 2), torch.zeros(1))
    assert (one.index.item(), one.target_lam.item()) == (0, 1)
    for _ in range(5):
        m = near().sample(torch.zeros(4, 2), torch.tensor([0.0, math.nan, 1.0, math.inf]))
        assert m.index.tolist() == [2, 1, 0, 3]
        assert m.lam[[1, 3]].tolist() == [1, 1]
    far = near(bandwidth=1e-3).sample(torch.zeros(3, 2), torch.tensor([0.0, 1e3, 2e3 + 1]))  # weights that underflow
    assert far.index.tolist()[:2] == [1, 0]


@pytest.mark.parametrize("per", ["row", "batch"])
def test_near_partners_in_a_choice_and_at_hidden_layers(per):
    y, x = torch.arange(12.0) // 2, torch.randn(12, 1, 4, 4)
    narrow = {"partner": "near", "bandwidth": 1e-3}
    mixer = RandomMix(Mixup(1.0, per=per, **narrow), Mixup(0.5, **narrow), seed=0)
    assert mixer.sample(x, y).index.tolist() == [k ^ 1 for k in range(12)]
    layer = torch.nn.Flatten()
    assert ManifoldMixup([layer], 1.0, seed=0, **narrow).sample(x, y).index.tolist() == [k ^ 1 for k in range(12)]
    mixed, target = Mixup(1.0, seed=0, **narrow)(x, y)
    assert torch.equal(target.dense(), y)
    assert mixed.shape == x.shape


@pytest.mark.parametrize(
    ("y", "kind", "words"),
    [
        (None, TypeError, "y: expected int64 class indices or floating rows"),
        (torch.arange(4), TypeError, "y: expected floating numbers"),
        (torch.zeros(3), ValueError, "y: expected 4 rows"),
    ],
)
def test_near_partners_need_numbers(y, kind, words):
    with pytest.raises(kind, match=words):
        near().sample(torch.zeros(4, 2), y)


def test_samplers_without_a_bandwidth_have_no_near_partners():
    with pytest.raises(ValueError, match="bandwidth: expected a number for partner='near'"):
        CutMix(partner="near")
    with pytest.raises(ValueError, match="partner: expected None beside partner='near'"):
        near()(torch.zeros(4, 2), torch.zeros(4), partner=(torch.zeros(4, 2), torch.zeros(4)))


# The union of labels


def whole(index, y, lam, classes):
    """Multi-hot rows: 1 where the row, unless lam is 0, or its partner, unless lam is 1, has the class."""
    rows = torch.zeros(len(y), classes)
    for i, j in enumerate(index.tolist()):
        if lam[i] != 0:
            rows[i, y[i]] = 1
        if lam[i] != 1:
            rows[i, y[j]] = 1
    return rows


@pytest.mark.parametrize(
    "make",
    [
        lambda: Mixup(1.0, label="union", prob=0.6, seed=0),
        lambda: Mixup(1.0, label="union", per="pair", seed=0),
        lambda: CutMix(label="union", seed=0),
        lambda: RandomMix(Mixup(1.0, label="union"), CutMix(label="union"), seed=0),
        lambda: fastmix.GridMix(grid=2, label="union", seed=0),
    ],
)
def test_union_of_classes_and_of_rows(make):
    x, y = torch.randn(40, 1, 6, 6), torch.arange(40) % 3
    m = make().sample(x, y)
    expected = whole(m.index, y, m.target_lam, 3)
    target = m.target(y)
    assert torch.equal(target.dense(3), expected)
    assert target.weights.unique().tolist() in ([0, 1], [1])
    assert torch.equal(m.target(torch.nn.functional.one_hot(y, 3).float()), expected)
    assert torch.equal(m.to("cpu").target(y).dense(3), expected)
    assert torch.equal(make()(x, y)[1].dense(3), expected)
    logits = torch.randn(40, 3)
    torch.testing.assert_close(
        fastmix.soft_binary_cross_entropy(logits, target),
        torch.nn.functional.binary_cross_entropy_with_logits(logits, expected),
        atol=1e-6, rtol=1e-5,
    )  # fmt: skip


def test_union_with_another_batch():
    x, y, y2 = torch.randn(6, 4), torch.tensor([0, 0, 1, 2, 2, 1]), torch.tensor([0, 1, 1, 0, 2, 2])
    sampler = Mixup(1.0, label="union", prob=0.7, seed=1)
    m = sampler.sample(x)
    expected = torch.eye(3)[y].maximum(torch.eye(3)[y2] * (m.lam != 1).unsqueeze(1))
    assert torch.equal(m.target(y, partner=y2).dense(3), expected)
    assert torch.equal(m.target(torch.eye(3)[y], partner=torch.eye(3)[y2]), expected)


def test_union_is_one_kind_of_label_in_a_choice():
    with pytest.raises(ValueError, match="label='union' in all of them or in none"):
        RandomMix(Mixup(1.0, label="union"), CutMix())(torch.randn(4, 1, 4, 4), torch.arange(4))
    mixup = Mixup(1.0, label="union").eval()
    x = torch.randn(4, 2)
    assert mixup(x, torch.arange(4))[1].tolist() == [0, 1, 2, 3]
    assert isinstance(mixup.sample(x), Mix)


def test_the_page():
    """Its programs run, in order."""
    namespace = {}
    for code in (
        *blocks(r"Regression with near partners \(C-Mixup\)", "labels.md"),
        *blocks("The union of labels", "labels.md"),
    ):
        exec(code, namespace)
    assert namespace["loss"].isfinite()
