"""The pages on libraries that need no adapter, with the libraries themselves."""

import importlib.util

import pytest
import torch
from pages import blocks

import fastmix
from fastmix.bench import peers  # noqa: F401  loads torchvision, which torchmetrics imports, beside any torch

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.no_poison]
C = 4


def run(title):
    if importlib.util.find_spec(title) is None:
        pytest.skip(f"needs {title}")
    names = {"dataset": [(torch.rand(3, 8, 8), i % C) for i in range(16)], "classes": C}
    for code in blocks(title):
        exec(code, names)
    return names


def test_accelerate():
    names = run("accelerate")
    torch.testing.assert_close(names["accuracy"], fastmix.mixed_accuracy(names["logits"], names["target"]))
    from accelerate.utils import concatenate, slice_tensors

    target = names["target"]
    with pytest.raises(TypeError):
        concatenate([target, target])
    both = concatenate([target.parts(), target.parts()])
    torch.testing.assert_close(fastmix.SoftTarget.of(both).dense(C), torch.cat([target.dense(C)] * 2))
    part = slice_tensors(target.parts(), slice(1, 3))
    torch.testing.assert_close(fastmix.SoftTarget.of(part).dense(C), target.dense(C)[1:3])


def test_torchmetrics():
    mixed, plain = run("torchmetrics")["accuracies"]
    assert 0 <= mixed <= 1
    assert 0 <= plain <= 1


def test_batch_sizes():
    """accelerate's own search of a batch's size, as the page says."""
    from accelerate.utils import find_batch_size

    target = fastmix.Mix(0.5, torch.tensor([1, 2, 0])).target(torch.arange(3))
    with pytest.raises(TypeError, match="SoftTarget"):
        find_batch_size((target, torch.zeros(3, 2)))
    assert find_batch_size((torch.zeros(3, 2), target)) == find_batch_size(target.parts()) == len(target) == 3


def test_skorch():
    """Training batches are mixed, and validation ones are not."""
    names = run("skorch")
    net, seen = names["net"], []
    loss = net.get_loss

    def record(logits, target, *args, training=False, **kwargs):
        seen.append((training, isinstance(target, dict)))
        return loss(logits, target, *args, training=training, **kwargs)

    net.get_loss = record
    net.partial_fit(torch.stack([x for x, _ in names["dataset"]]), torch.tensor([y for _, y in names["dataset"]]))
    assert set(seen) == {(True, True), (False, False)}


def test_fastai():
    """Training batches are mixed, and validation ones are not."""
    names = run("fastai")
    learner, seen = names["learner"], []
    loss = learner.loss_func

    def record(logits, target):
        seen.append((learner.training, isinstance(target, fastmix.SoftTarget)))
        return loss(logits, target)

    learner.loss_func = record
    learner.fit(1)
    assert set(seen) == {(True, True), (False, False)}
    assert len(seen) == 8
