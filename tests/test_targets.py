"""SoftTarget and MixedRows: their forms, what they are as data, and what they refuse."""

import copy
import fractions
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from drawn import (
    coefficients,
    drawn_target,
    generator,
    given,
    numpy_dense,
    partners,
    partners_of,
    seeds,
    small_logits_shapes,
    st,
    to,
)
from numerics import assert_close, numpy
from torch.utils import _pytree
from torch.utils.data import DataLoader

import fastmix
from fastmix import MixedRows, Mixup, SoftTarget, reference


@pytest.fixture
def target():
    return SoftTarget(torch.tensor([[2, 0], [1, 1], [-100, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.4, 0.6]]))


def test_dense(target):
    expected = torch.tensor([[0.25, 0, 0.75], [0, 1, 0], [0, 0, 0.6]])
    assert torch.equal(target.dense(3), expected)
    pixels = SoftTarget(target.classes.view(3, 2, 1).expand(3, 2, 4), target.weights)
    assert torch.equal(pixels.dense(3), expected.view(3, 3, 1).expand(3, 3, 4))
    weights = target.weights.clone().requires_grad_()
    (SoftTarget(target.classes, weights).dense(3) * torch.arange(3)).sum().backward()
    assert torch.equal(weights.grad, torch.tensor([[2.0, 0], [1, 1], [0, 2]]))
    with pytest.raises(ValueError, match=r"classes: expected a class in \[0, 2\), got 2 in row 0"):
        target.dense(2)


def test_argmax_adds_up_a_class_named_twice():
    t = SoftTarget(torch.tensor([[1, 2, 2], [0, 1, 2]]), torch.tensor([[0.4, 0.3, 0.3], [0.2, 0.2, 0.6]]))
    assert t.argmax().tolist() == [2, 2]
    ignored = SoftTarget(torch.tensor([[-100, 3], [-100, -100]]), torch.tensor([[0.6, 0.4], [0.5, 0.5]]))
    assert ignored.argmax().tolist() == [3, -100]
    pixels = SoftTarget(t.classes.unsqueeze(2).expand(2, 3, 5), t.weights)
    assert torch.equal(pixels.argmax(), torch.full((2, 5), 2))


def test_rows(target):
    assert len(target) == 3
    assert torch.equal(target[1:].classes, target.classes[1:])
    assert torch.equal(target[torch.tensor([True, False, True])].weights, target.weights[[0, 2]])
    assert torch.equal(target[-1].classes, target.classes[2:])
    assert [row.classes.tolist() for row in target] == [[c] for c in target.classes.tolist()]
    assert torch.equal(target[torch.tensor(1)].classes, target.classes[1:2])
    with pytest.raises(IndexError):
        target[3]


def test_moves_pickles_and_maps(target):
    for other in (target.to("cpu"), pickle.loads(pickle.dumps(target)), copy.deepcopy(target)):
        assert torch.equal(other.classes, target.classes)
        assert torch.equal(other.weights, target.weights)
    doubled = _pytree.tree_map(lambda t: t * 2, {"y": [target]})["y"][0]
    assert isinstance(doubled, SoftTarget)
    assert torch.equal(doubled.weights, 2 * target.weights)
    assert _pytree.tree_map(lambda t: None, target).classes is None
    keyed = _pytree.tree_flatten_with_path(target)[0]
    assert [str(path[0]) for path, _ in keyed] == [".classes", ".weights"]
    rows = MixedRows(torch.eye(3), torch.rand(3), torch.tensor([1, 2, 0]))
    assert len(_pytree.tree_leaves(rows)) == 3
    assert torch.equal(rows.to("cpu").dense(), rows.dense())
    assert len(rows) == 3


def collate(rows):
    x, y = torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    return fastmix.Mixup(0.4)(x, y)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than a small machine has cores
def test_survives_dataloader_workers():
    data = [(torch.randn(3), n % 4) for n in range(20)]
    loader = DataLoader(data, batch_size=8, num_workers=2, collate_fn=collate, multiprocessing_context="spawn")
    seen = 0
    for x, t in loader:
        assert isinstance(t, SoftTarget)
        assert torch.isfinite(fastmix.soft_cross_entropy(x.new_zeros(len(t), 4), t))
        seen += len(t)
    assert seen == 20


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_pinned_and_moved_to_a_gpu(device, target):
    moved = target.pin_memory().to(device, non_blocking=True)
    assert moved.classes.device.type == moved.weights.device.type == "cuda"
    for lam in (0.5, torch.rand(3)):
        rows = MixedRows(torch.eye(3), lam, torch.tensor([1, 2, 0]))
        moved = rows.pin_memory().to(device, non_blocking=True)
        assert moved.values.device.type == moved.index.device.type == "cuda"
        torch.testing.assert_close(moved.dense().cpu(), rows.dense())


def test_pinning_pins_every_tensor(monkeypatch, target):
    """Where there is nothing to pin for: each tensor is asked, and the rest kept."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t + 1)
    pinned = target.pin_memory()
    assert torch.equal(pinned.classes, target.classes + 1)
    assert torch.equal(pinned.weights, target.weights + 1)
    for lam in (0.5, torch.tensor(0.5)):
        pinned = MixedRows(torch.eye(3), lam, torch.tensor([1, 2, 0])).pin_memory()
        assert torch.equal(pinned.values, torch.eye(3) + 1)
        assert pinned.index.tolist() == [2, 3, 1]
        assert pinned.lam == (1.5 if isinstance(lam, torch.Tensor) else 0.5)


ROWS = torch.zeros(2, 2, dtype=torch.int64)
ONES = torch.ones(2, 2)


def nested(t):
    """The rows of t as a nested tensor of the older kind, which says that it is strided."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor(list(t))


@pytest.mark.parametrize(
    ("classes", "weights", "kind", "words"),
    [
        ([[0]], torch.ones(1, 1), TypeError, "classes: expected an int64 tensor"),
        (None, ONES, TypeError, "classes: expected an int64 tensor, got None"),
        (ROWS.numpy(), ONES, TypeError, "(?s)classes: .*ndarray"),
        (ROWS.float(), ONES, TypeError, "classes: .*float32"),
        (ROWS.int(), ONES, TypeError, "classes: .*int32"),
        (ROWS > 0, ONES, TypeError, "classes: .*bool"),
        (ROWS + 0j, ONES, TypeError, "classes: .*complex64"),
        (ROWS.to_sparse(), ONES, TypeError, "classes: .*(dense|sparse)"),
        (nested(ROWS), ONES, TypeError, "classes: .*(dense|nested)"),
        (torch.tensor(1), ONES, ValueError, r"classes: expected shape \[N, K\].*, got .*\[\]"),
        (ROWS[0], ONES, ValueError, r"classes: expected shape \[N, K\].*, got .*\[2\]"),
        (ROWS[:, :0], ONES[:, :0], ValueError, r"classes: .*\[2, 0\]"),
        (ROWS, None, TypeError, "weights: .*NoneType"),
        (ROWS, [[1.0, 0.0]], TypeError, "weights: .*list"),
        (ROWS, ONES.numpy(), TypeError, "(?s)weights: .*ndarray"),
        (ROWS, 1.0, TypeError, "weights: .*float"),
        (ROWS, ONES.bfloat16(), TypeError, "weights: .*bfloat16"),
        (ROWS, ONES.half(), TypeError, "weights: .*float16"),
        (ROWS, ONES.to(torch.float8_e4m3fn), TypeError, "weights: .*float8_e4m3fn"),
        (ROWS, ONES.long(), TypeError, "weights: .*int64"),
        (ROWS, ONES + 0j, TypeError, "weights: .*complex64"),
        (ROWS, ONES.to_sparse(), TypeError, "weights: .*(dense|sparse)"),
        (ROWS, nested(ONES), TypeError, "weights: .*(dense|nested)"),
        (ROWS, torch.ones(2, 3), ValueError, r"weights: expected shape \[2, 2\].*, got .*\[2, 3\]"),
        (ROWS, ONES[:, 0], ValueError, r"weights: .*got .*\[2\]"),
        (ROWS, torch.tensor(1.0), ValueError, r"weights: .*got .*\[\]"),
        (ROWS, ONES[..., None], ValueError, r"weights: .*got .*\[2, 2, 1\]"),
        (torch.zeros(2, 2, 5, dtype=torch.int64), torch.ones(2, 2, 4), ValueError, r"weights: .*got .*\[2, 2, 4\]"),
        (ROWS, ONES.to("meta"), ValueError, "weights: expected a tensor on cpu, got .*meta"),
        (ROWS.to("meta"), ONES, ValueError, "weights: expected a tensor on meta, got .*cpu"),
    ],
)
def test_bad_input(classes, weights, kind, words):
    with pytest.raises(kind, match=words) as error:
        SoftTarget(classes, weights)
    assert re.match(r"[a-z]+: expected .+, got ", str(error.value))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"values": None}, TypeError, "values: .*NoneType"),
        ({"values": [[1.0]]}, TypeError, "values: .*list"),
        ({"values": np.eye(3)[:1]}, TypeError, "values: .*ndarray"),
        ({"values": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "values: expected a float16.*int64"),
        ({"values": torch.eye(3) > 0}, TypeError, "values: .*bool"),
        ({"values": torch.eye(3) + 0j}, TypeError, "values: .*complex64"),
        ({"values": torch.eye(3).to(torch.float8_e5m2)}, TypeError, "values: .*float8_e5m2"),
        ({"values": torch.eye(3).to_sparse()}, TypeError, r"values: expected a dense \(strided\) tensor"),
        ({"values": nested(torch.eye(3))}, TypeError, "values: .*(dense|nested)"),
        ({"values": torch.tensor(1.0)}, ValueError, r"values: expected shape \[N, C\]"),
        ({"values": torch.eye(3, device="meta")}, ValueError, "index: expected a tensor on meta"),
        ({"lam": None}, TypeError, "lam: .*NoneType"),
        ({"lam": True}, TypeError, "lam: .*True"),
        ({"lam": "0.5"}, TypeError, "lam: .*'0.5'"),
        ({"lam": 0.5j}, TypeError, "lam: .*complex"),
        ({"lam": [0.5] * 3}, TypeError, "lam: .*list"),
        ({"lam": np.full(3, 0.5)}, TypeError, "lam: .*ndarray"),
        ({"lam": torch.zeros(2)}, ValueError, r"lam: expected a float.*\[3\], got .*\[2\]"),
        ({"lam": torch.zeros(3, 1)}, ValueError, r"lam: .*got .*\[3, 1\]"),
        ({"lam": torch.zeros(3).half()}, TypeError, "lam: .*float16"),
        ({"lam": torch.zeros(3).long()}, TypeError, "lam: .*int64"),
        ({"lam": torch.zeros(3).to_sparse()}, TypeError, "lam: .*(dense|sparse)"),
        ({"lam": torch.zeros(3, device="meta")}, ValueError, "lam: expected a tensor on cpu, got .*meta"),
        ({"lam": 10**400}, ValueError, "lam: "),  # a number, and no float
        ({"index": None}, TypeError, "index: .*NoneType"),
        ({"index": [0, 1, 2]}, TypeError, "index: expected an int64 tensor, got .*list"),
        ({"index": np.arange(3)}, TypeError, "index: .*ndarray"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, TypeError, "index: .*int32"),
        ({"index": torch.zeros(3)}, TypeError, "index: .*float32"),
        ({"index": torch.zeros(1, dtype=torch.int64)}, ValueError, r"index: expected shape \[3\], got .*\[1\]"),
        ({"index": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"index: expected shape \[3\], got .*\[3, 1\]"),
        ({"index": torch.arange(3).to_sparse()}, TypeError, "index: .*(dense|sparse)"),
        ({"index": torch.arange(3, device="meta")}, ValueError, "index: expected a tensor on cpu, got .*meta"),
    ],
)
def test_bad_mixed_rows(change, kind, words):
    with pytest.raises(kind, match=words) as error:
        MixedRows(**{"values": torch.eye(3), "lam": 0.5, "index": torch.arange(3), **change})
    assert re.match(r"[a-z]+: expected .+, got ", str(error.value))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda t: t.dense("a"), TypeError, "num_classes: expected an int, got 'a'"),
        (lambda t: t.dense(None), TypeError, "num_classes: .*NoneType"),
        (lambda t: t.dense(3.0), TypeError, "num_classes: .*3.0"),
        (lambda t: t.dense(True), TypeError, "num_classes: .*True"),
        (lambda t: t.dense(torch.tensor(3)), TypeError, "num_classes: .*tensor"),
        (lambda t: t.dense(0), (TypeError, ValueError), "num_classes: .*got 0"),
        (lambda t: t.dense(-1), (TypeError, ValueError), "num_classes: .*got -1"),
        (lambda t: t.dense(10**30), ValueError, "num_classes: "),
        (lambda t: t.dense(2), ValueError, r"classes: expected a class in \[0, 2\), got 2 in row 0"),
        (lambda t: MixedRows(torch.eye(3), 0.5, torch.tensor([0, 1, 5])).dense(), ValueError, "index: .*got 5 in row 2"),
        (lambda t: MixedRows(torch.eye(3), 0.5, torch.tensor([0, -1, 1])).dense(), ValueError, "index: .*got -1 in row 1"),
    ],
)
def test_bad_dense(call, kind, words, target):
    with pytest.raises(kind, match=words) as error:
        call(target)
    assert re.match(r"[a-z_]+: expected .+, got ", str(error.value))


@pytest.mark.parametrize("device", [1.5, ["cpu"], True, "nonsense", ""], ids=repr)
def test_bad_device(device, target):
    for moved in (target, MixedRows(torch.eye(3), 0.5, torch.arange(3))):
        with pytest.raises((TypeError, ValueError), match="device: expected a device, got "):
            moved.to(device)


@pytest.mark.parametrize(
    "rows",
    [
        3,
        -4,
        2.0,
        "0",
        None,
        True,
        (0, 1),
        {0: 1},
        slice(0.0, 1.0),
        torch.tensor(1.7),
        torch.tensor(True),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0, 3]),
        torch.tensor([True, False]),
        torch.tensor([[0], [1]]),
        np.array([[0], [1]]),
    ],
)
def test_bad_rows(rows, target):
    """What picks no rows is refused, as tensors and lists do; columns and new dimensions would make another target."""
    with pytest.raises((TypeError, ValueError, IndexError)):
        target[rows]


def test_what_is_not_wrong_is_taken():
    """Numbers and tensors of kinds that are less usual."""
    weights = torch.nn.Parameter(torch.tensor([[0.75, 0.25]]))
    t = SoftTarget(torch.tensor([[1, 0]]), weights)
    assert t.weights is weights
    assert torch.autograd.grad(t.dense(2)[0, 1], weights)[0].tolist() == [[1.0, 0.0]]
    assert t[np.int64(0)].classes.tolist() == t[[0]].classes.tolist() == t[np.array([0])].classes.tolist() == [[1, 0]]
    for lam in (np.float32(0.25), np.float64(0.25), fractions.Fraction(1, 4), np.int64(0), 0):
        rows = MixedRows(torch.eye(2), lam, torch.tensor([1, 0])).dense()
        assert rows[0].tolist() == [float(lam), 1 - float(lam)]
    empty = SoftTarget(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert empty.dense(3).shape == (0, 3)
    assert empty.argmax().shape == (0,)
    assert list(empty) == []
    on_meta = SoftTarget(torch.zeros(2, 2, dtype=torch.int64, device="meta"), torch.zeros(2, 2, device="meta"))
    assert on_meta.dense(3).shape == (2, 3)


@pytest.mark.parametrize("device", ["torch", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_regression_targets(device):
    """Values of any shape are mixed as the batch is, by the same op, and several tensors of a batch by one draw."""
    x, extra, y = (torch.randn(6, *shape, device=device) for shape in ((3, 8, 8), (5,), ()))
    m = Mixup(0.4, seed=0).sample(x)
    for values in (y, extra, x):
        dense = m.target(values).dense()
        assert torch.equal(dense, m.apply(values))
        own = m.lam.view(-1, *[1] * (values.dim() - 1))
        torch.testing.assert_close(dense, own * values + (1 - own) * values[m.index])
    values, lam = y.clone().requires_grad_(), m.lam.clone().requires_grad_()
    loss = torch.nn.functional.mse_loss(x.mean((1, 2, 3)), MixedRows(values, lam, m.index).dense())
    gradients = torch.autograd.grad(loss, (values, lam))
    plain = lam * values + (1 - lam) * values[m.index]
    expected = torch.autograd.grad(torch.nn.functional.mse_loss(x.mean((1, 2, 3)), plain), (values, lam))
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    larger = Mixup(0.4, label="larger", seed=0).sample(x)
    share = larger.target_lam
    torch.testing.assert_close(larger.target(y).dense(), share * y + (1 - share) * y[larger.index])


@given(shape=small_logits_shapes, seed=seeds, K=st.sampled_from([2, 1, 3]), partner=partners)
def test_targets_as_data(device, shape, seed, K, partner):
    """Rows of a target, its dense form, its parts and its strongest class say the same."""
    rng = generator(seed)
    N, C, *inner = shape
    classes, weights = to(drawn_target("k-hot", shape, rng, torch.float32, K=K), device)
    target = SoftTarget(classes, weights)
    dense = target.dense(C)
    np.testing.assert_allclose(numpy(dense), numpy(numpy_dense((classes, weights), C)), rtol=0, atol=1e-6)
    order = torch.randperm(N, generator=rng).to(device)
    for chosen in (order, order[: N // 2], slice(1, None, 2), order < N // 2):
        assert torch.equal(target[chosen].dense(C), dense[chosen])
        assert len(target[chosen]) == len(dense[chosen])
    strongest = target.argmax()
    np.testing.assert_allclose(
        numpy(dense.gather(1, strongest.unsqueeze(1)).squeeze(1)), numpy(dense.amax(1)), rtol=0, atol=1e-6
    )
    leaves, structure = torch.utils._pytree.tree_flatten(target)
    again = torch.utils._pytree.tree_unflatten(leaves, structure)
    assert torch.equal(again.classes, classes)
    assert torch.equal(again.weights, weights)
    lam, index = coefficients(N, torch.float32, rng).to(device), partners_of(partner, N, rng).to(device)
    rows = MixedRows(dense, lam, index)
    assert_close(rows.dense(), reference.mix(numpy(dense), numpy(lam), numpy(index)), torch.float32, 4.0)
    assert_close(fastmix.mix(dense, lam, index), numpy(rows.dense()), torch.float32, 4.0)
