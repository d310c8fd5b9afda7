import itertools
import re

import numpy as np
import pytest
import torch
from numerics import numpy, target_of

import fastmix
from fastmix import MixedRows, SoftTarget, reference


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
def test_bad_input(change, kind, words):
    with pytest.raises(kind, match=words) as error:
        fastmix.mixed_accuracy(**{"logits": torch.eye(3)[LABELS], "target": LABELS, **change})
    assert re.match(r"[a-z_.]+: expected .+, got ", str(error.value))
