import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmix


def test_module_form():
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    weight = torch.rand(3)
    criterion = fastmix.SoftCrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    expected = fastmix.soft_cross_entropy(z, y, weight=weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert torch.equal(criterion(z, y), expected)
    assert list(criterion.state_dict()) == ["weight"]
    assert "label_smoothing=0.1" in repr(criterion)


@pytest.mark.slow_interpreted
@pytest.mark.trap("deit#91")
def test_one_criterion_serves_mixed_and_plain_targets(device):
    """With CutMix alone, too, the loss is the one on the mixed target (deit#91)."""
    z = 3 * torch.randn(8, 5, device=device)
    x, y = torch.randn(8, 1, 16, 16, device=device), torch.arange(8, device=device) % 5
    criterion = fastmix.SoftCrossEntropyLoss(label_smoothing=0.1)
    plain = F.cross_entropy(z, y, label_smoothing=0.1)
    torch.testing.assert_close(criterion(z, y), plain)
    for sampler in (fastmix.CutMix(seed=0), fastmix.Mixup(1.0, seed=0)):
        target = sampler(x, y)[1]
        mixed = F.cross_entropy(z, target.dense(5), label_smoothing=0.1)
        torch.testing.assert_close(criterion(z, target), mixed)
        assert abs(mixed - plain) > 0.01
        assert criterion(z, sampler.eval()(x, y)[1]) == criterion(z, y)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int, got 1.0"),
        ({"ignore_index": None}, TypeError, "ignore_index: .*NoneType"),
        ({"ignore_index": True}, TypeError, "ignore_index: .*True"),
        ({"ignore_index": torch.tensor(1)}, TypeError, "ignore_index: .*tensor"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an int of 64 bits"),
        ({"reduction": "average"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'average'"),
        ({"reduction": None}, ValueError, "reduction: .*NoneType"),
        ({"reduction": ["mean"]}, ValueError, "reduction: .*list"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a float in \[0, 1\], got 1.5"),
        ({"label_smoothing": -1e-9}, ValueError, "label_smoothing: .*-1e-09"),
        ({"label_smoothing": float("nan")}, ValueError, "label_smoothing: .*nan"),
        ({"label_smoothing": float("inf")}, ValueError, "label_smoothing: .*inf"),
        ({"label_smoothing": True}, TypeError, "label_smoothing: .*True"),
        ({"label_smoothing": None}, TypeError, "label_smoothing: .*NoneType"),
        ({"label_smoothing": torch.tensor(0.1)}, TypeError, "label_smoothing: .*tensor"),
        ({"label_smoothing": 0.1j}, TypeError, "label_smoothing: .*complex"),
    ],
)
def test_bad_options(options, kind, words):
    with pytest.raises(kind, match=words) as error:
        fastmix.SoftCrossEntropyLoss(**options)
    assert re.match(r"[a-z_]+: expected .+, got ", str(error.value))


@pytest.mark.parametrize(
    ("weight", "kind", "words"),
    [
        ([1.0, 1.0, 1.0], TypeError, "list.*weight|weight.*list"),  # the first three may be refused by nn.Module itself
        (np.ones(3), TypeError, "ndarray.*weight|weight.*ndarray"),
        (1.0, TypeError, "float.*weight|weight.*float"),
        (torch.ones(4), ValueError, r"weight: expected shape \[3\], .*got .*\[4\]"),
        (torch.ones(3, 1), ValueError, r"weight: expected shape \[3\], .*got .*\[3, 1\]"),
        (torch.tensor(1.0), ValueError, r"weight: expected shape \[3\], got .*\[\]"),
        (torch.ones(3, dtype=torch.int64), TypeError, "weight: .*int64"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "weight: .*complex64"),
        (torch.ones(3).to_sparse(), TypeError, r"weight: expected a dense \(strided\) tensor"),
        (torch.ones(3, device="meta"), ValueError, "weight: expected a tensor on cpu, got .*meta"),
        (torch.ones(3, requires_grad=True), ValueError, "weight: expected a constant, got a tensor that requires grad"),
        (torch.nn.Parameter(torch.ones(3)), ValueError, "weight: expected a constant"),
    ],
)
def test_bad_class_weights(weight, kind, words):
    with pytest.raises(kind, match=words):
        fastmix.SoftCrossEntropyLoss(weight)(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))


def test_bad_calls():
    criterion = fastmix.SoftCrossEntropyLoss()
    z, y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    for arguments, kind, words in [
        ((y, z), TypeError, "logits: expected a float16.*int64"),  # swapped
        ((z, y.int()), TypeError, "target: expected an int64 tensor, got .*int32"),
        ((z, y[:3]), ValueError, r"target: expected shape \[4\]"),
        ((z[0], y), ValueError, r"logits: expected shape \[N, C\]"),
        ((z, "y"), TypeError, "target: expected a SoftTarget.*'y'"),
    ]:
        with pytest.raises(kind, match=words):
            criterion(*arguments)
    with pytest.raises(ValueError, match="label_smoothing: .*got 3"):
        criterion.label_smoothing = 3  # options may be changed, and are checked then
    assert criterion.label_smoothing != 3


@pytest.mark.parametrize(
    "name",
    [
        None,
        "Triton",
        "TRITON",
        "cuda",
        "numpy",
        "",
        " torch",
        b"torch",
        0,
        True,
        ["torch"],
        ("torch", "triton"),
        {"torch": 1},
        torch,
    ],
    ids=repr,
)
def test_bad_backend(name):
    with (
        pytest.raises(ValueError, match="backend: expected 'triton', 'native' or 'torch', got ") as error,
        fastmix.backend(name),
    ):
        pass
    assert repr(name) in str(error.value)


def test_weights_set_later_are_taken_as_in_the_constructor():
    logits, rows = torch.randn(4, 3), torch.rand(4, 3)
    loss = fastmix.SoftBinaryCrossEntropyLoss()
    loss.pos_weight = 2.0
    torch.testing.assert_close(loss(logits, rows), fastmix.SoftBinaryCrossEntropyLoss(pos_weight=2.0)(logits, rows))
    loss.pos_weight = None
    torch.testing.assert_close(loss(logits, rows), fastmix.SoftBinaryCrossEntropyLoss()(logits, rows))
    for made, name, value in [
        (loss, "pos_weight", "2"),
        (loss, "weight", 2.0),
        (loss, "weight", torch.ones(3, dtype=torch.int64)),
        (fastmix.SoftCrossEntropyLoss(), "weight", "2"),
    ]:
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            setattr(made, name, value)
