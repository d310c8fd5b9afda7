"""The fast gradient sign method: the formula on models whose gradients are known, and a model that is left as it was."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmix.attacks import fgsm

NAN = math.nan


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))


def row_losses(logits, y, loss):
    """Each row's loss in plain torch."""
    if loss == "cross_entropy":
        return F.cross_entropy(logits, y, reduction="none")
    rows = zip(logits.tolist(), y.tolist(), strict=True)
    others = [max(v for c, v in enumerate(row) if c != label) for row, label in rows]
    return torch.tensor(others) - logits.detach()[torch.arange(len(y)), y]


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_one_step_on_a_linear_model(loss):
    """dz/dx is the weight, so a row's gradient is known: of the margin that of the runner-up's weight less the true one's."""
    model, x, y = nn.Linear(5, 4), torch.rand(6, 5), torch.arange(6) % 4
    logits = model(x)
    if loss == "margin":
        others = logits.detach().clone()
        others[torch.arange(6), y] = -math.inf
        gradient = model.weight[others.argmax(1)] - model.weight[y]
    else:
        gradient = (logits.softmax(1) - F.one_hot(y, 4)) @ model.weight
    expected = (x + 0.1 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, x, y, 0.1, loss=loss), expected.detach())


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_loss_grows_within_eps_and_bounds(loss, steps):
    model, x, y = network().eval(), torch.rand(64, 6), torch.randint(0, 3, (64,))
    before = row_losses(model(x), y, loss).sum()
    attacked = fgsm(model, x, y, 0.05, steps=steps, bounds=(-0.5, 1.01), loss=loss)
    assert not attacked.requires_grad
    assert attacked.data_ptr() != x.data_ptr()
    assert float((attacked - x).abs().max()) <= 0.05 + 1e-6
    assert float(attacked.max()) <= 1.01
    assert row_losses(model(attacked), y, loss).sum() > before
    clipped = fgsm(model, x, y, 0.05, steps=steps, step_size=10.0, loss=loss)  # every value moves to an end of what is allowed
    low, high = (x - 0.05).clamp(min=0), (x + 0.05).clamp(max=1)
    assert bool(((clipped == low) | (clipped == high) | (clipped == x)).all())


def test_the_model_is_left_as_it_was():
    """Modes of single modules, buffers, gradients that are there, and grad mode; also where the model fails."""
    model, x, y = network(), torch.rand(8, 6), torch.randint(0, 3, (8,))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first, second = (fgsm(model, x, y, 0.1, steps=3) for _ in range(2))
    assert torch.equal(first, second)  # dropout is off
    with pytest.raises(RuntimeError):
        fgsm(model, torch.rand(8, 5), y, 0.1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(bool((parameter.grad == 7).all()) for parameter in model.parameters())


def test_a_sure_model_hides_its_cross_entropy_and_not_its_margin():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data.copy_(1000 * torch.eye(2))
    x, y = torch.tensor([[0.9, 0.4]]), torch.tensor([0])
    assert torch.equal(fgsm(model, x, y, 0.3), x)
    torch.testing.assert_close(fgsm(model, x, y, 0.3, loss="margin"), torch.tensor([[0.6, 0.7]]))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": torch.zeros(4, 6, dtype=torch.uint8)}, TypeError, "x: "),
        ({"x": torch.full((4, 6), 2.0)}, ValueError, r"x: expected values in \[0.0, 1.0\]"),
        ({"x": torch.full((4, 6), NAN)}, ValueError, "x: expected values"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, ValueError, "y: "),
        ({"y": torch.tensor([0, 1, 2, 3])}, ValueError, "y: .*3 in row 3"),
        ({"eps": -0.1}, ValueError, "eps: expected a float of at least 0"),
        ({"eps": NAN}, ValueError, "eps"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 1.5}, TypeError, "steps"),
        ({"step_size": -1.0}, ValueError, "step_size"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds: expected a pair whose first"),
        ({"bounds": 1.0}, TypeError, "bounds"),
        ({"loss": "hinge"}, ValueError, "loss: expected 'cross_entropy' or 'margin', got 'hinge'"),
        ({"model": nn.Flatten(0)}, ValueError, "model: expected shape .N, C."),
        ({"model": nn.Linear(6, 3).double(), "x": torch.rand(4, 6, dtype=torch.float64), "y": torch.tensor([0, 1, 2, -1])}, ValueError, "y: "),
    ],
)  # fmt: skip
def test_refuses(change, kind, words):
    given = {"model": nn.Linear(6, 3), "x": torch.rand(4, 6), "y": torch.tensor([0, 1, 2, 0]), "eps": 0.1, **change}
    with pytest.raises(kind, match=words):
        fgsm(**given)


def test_an_empty_batch():
    assert fgsm(nn.Linear(6, 3), torch.rand(0, 6), torch.zeros(0, dtype=torch.int64), 0.1).shape == (0, 6)
