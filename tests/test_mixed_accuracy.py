import itertools

import numpy as np
import pytest
import torch
from numerics import numpy, target_of

import fastmix
from fastmix import SoftTarget, reference


class TestMixedAccuracy:
    def test_matches_the_oracle(self):
        for shape, kind, topk in itertools.product([(6, 9), (2, 5, 3, 4)], ["k-hot", "indices", "dense"], [1, 3, 50]):
            z = torch.randn(shape)
            target, oracle_target, _ = target_of(kind, shape)
            ours = fastmix.mixed_accuracy(z, target, topk=topk)
            assert ours.dtype == torch.float32
            np.testing.assert_allclose(numpy(ours), reference.mixed_accuracy(numpy(z), oracle_target, topk), rtol=1e-6)

    def test_weights_are_not_truncated(self):
        """A float lambda times an integer tensor gives 0 % (mixup-cifar10#8)."""
        z = torch.eye(2)
        target = SoftTarget(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
        assert fastmix.mixed_accuracy(z, target) == 0.75

    def test_nan_hits_nothing(self):
        assert fastmix.mixed_accuracy(torch.tensor([[float("nan")] * 3, [0.0, 1.0, 0.0]]), torch.tensor([0, 1])) == 0.5

    def test_ignored_and_empty(self):
        assert fastmix.mixed_accuracy(torch.eye(2), torch.tensor([0, -100])) == 0.5
        assert torch.isnan(fastmix.mixed_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))

    @pytest.mark.parametrize(("topk", "kind"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
    def test_bad_topk(self, topk, kind):
        with pytest.raises(kind, match="topk"):
            fastmix.mixed_accuracy(torch.eye(2), torch.tensor([0, 1]), topk)
