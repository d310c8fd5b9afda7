import pytest
import torch

import fastmix


def test_module_form():
    z, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    weight = torch.rand(3)
    criterion = fastmix.SoftCrossEntropyLoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    expected = fastmix.soft_cross_entropy(z, y, weight=weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert torch.equal(criterion(z, y), expected)
    assert list(criterion.state_dict()) == ["weight"]
    assert "label_smoothing=0.1" in repr(criterion)
    with pytest.raises(ValueError, match="reduction"):
        fastmix.SoftCrossEntropyLoss(reduction="average")
