import copy
import pickle

import pytest
import torch
from torch.utils import _pytree
from torch.utils.data import DataLoader

import fastmix
from fastmix import MixedRows, SoftTarget


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


@pytest.mark.parametrize(
    ("classes", "weights", "kind", "words"),
    [
        ([[0]], torch.ones(1, 1), TypeError, "classes: expected an int64 tensor"),
        (torch.zeros(2, 2), torch.ones(2, 2), TypeError, "classes: .*float32"),
        (torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2), TypeError, "classes"),
        (torch.zeros(2, dtype=torch.int64), torch.ones(2), ValueError, r"classes: expected shape \[N, K\]"),
        (torch.zeros(2, 0, dtype=torch.int64), torch.ones(2, 0), ValueError, "classes"),
        (torch.zeros(2, 2, dtype=torch.int64), [[1.0, 0.0]], TypeError, "weights"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2).bfloat16(), TypeError, "weights: .*bfloat16"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64), TypeError, "weights"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 3), ValueError, r"weights: expected shape \[2, 2\]"),
        (torch.zeros(2, 2, 5, dtype=torch.int64), torch.ones(2, 2, 4), ValueError, "weights"),
    ],
)
def test_bad_input(classes, weights, kind, words):
    with pytest.raises(kind, match=words):
        SoftTarget(classes, weights)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"values": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "values: expected a float16"),
        ({"values": [[1.0]]}, TypeError, "values"),
        ({"lam": torch.zeros(2)}, ValueError, "lam: expected a float"),
        ({"lam": torch.zeros(3).half()}, TypeError, "lam"),
        ({"index": [0, 1, 2]}, TypeError, "index: expected an int64 tensor"),
        ({"index": torch.zeros(1, dtype=torch.int64)}, ValueError, r"index: expected shape \[3\]"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, TypeError, "index"),
    ],
)
def test_bad_mixed_rows(change, kind, words):
    arguments = {"values": torch.eye(3), "lam": 0.5, "index": torch.arange(3), **change}
    with pytest.raises(kind, match=words):
        MixedRows(**arguments)


def test_bad_calls(target):
    for call, kind, words in [
        (lambda: target.dense("a"), TypeError, "num_classes"),
        (lambda: target.dense(0), TypeError, "num_classes"),
        (lambda: target.to(torch.float16), TypeError, "device: expected a device"),
        (lambda: MixedRows(torch.eye(3), 0.5, torch.tensor([0, 1, 5])).dense(), ValueError, "got 5 in row 2"),
    ]:
        with pytest.raises(kind, match=words):
            call()
