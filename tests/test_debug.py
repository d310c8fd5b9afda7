"""fastmix.debug(): wrong indices are named on devices where nobody looks otherwise."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from plain import C, batch, leaf, plain_step, step
from torch import nn
from torch.testing import assert_close as same

import fastmix
from fastmix import Mix, SoftTarget

ROOT = pathlib.Path(__file__).parent.parent

BAD = (
    (lambda x, lam: fastmix.mix(x, lam, torch.tensor([1, 0, 4, 2], device=x.device)), r"index: .* in \[0, 4\), got 4 in row 2"),
    (lambda x, lam: fastmix.mix(x, 0.5, torch.tensor([1, 0, -1, 2], device=x.device)), "index: .*got -1 in row 2"),
    (
        lambda x, lam: fastmix.soft_cross_entropy(x, torch.tensor([1, 0, 9, 2], device=x.device), reduction="none"),
        r"target: expected a class in \[0, 5\), got 9 in row 2",
    ),
    (
        lambda x, lam: fastmix.soft_cross_entropy(
            x,
            SoftTarget(torch.tensor([[1, 0], [-100, 2], [0, -7], [1, 1]], device=x.device), torch.stack((lam, lam), 1)),
            reduction="none",
        ),
        r"target: .*got -7 in row 2 \(at \[2, 1\]\)",
    ),
)


@pytest.fixture
def not_looked_at(device, monkeypatch):
    """Tensors that do not say that they are on the CPU: as on a GPU, nobody looks at them. (On a GPU nothing to do.)"""
    if device.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda t: False))
    return device


class TestDebug:
    def test_changes_nothing_on_the_cpu(self):
        x, y, lam, index = batch(4, row=(C,))
        for around in (contextlib.nullcontext, fastmix.debug):
            with around():
                for op, words in BAD:
                    with pytest.raises(ValueError, match=words):
                        op(x, lam)
                leaves = leaf(x), leaf(lam)
                results = step(nn.Identity(), leaves[0], y, leaves[1], index)
                same(results, plain_step(nn.Identity(), *leaves[:1], y, leaves[1], index))

    def test_names_the_row_on_another_device(self, not_looked_at):
        x, y, lam, index = batch(4, not_looked_at, row=(C,))
        for op, words in BAD:
            row = op(x, lam)
            assert row.reshape(4, -1).isnan().any(1).tolist() == [False, False, True, False]  # its row is NaN, no more
            with fastmix.debug():
                with fastmix.debug(), pytest.raises(ValueError, match=words):
                    op(x, lam)
                with pytest.raises(ValueError, match=words):
                    op(leaf(x), lam)
            op(x, lam)  # over with the block

    def test_leaves_what_is_right_alone(self, not_looked_at):
        x, y, lam, index = batch(4, not_looked_at, row=(C,))
        y[1] = -100
        out = []
        for around in (contextlib.nullcontext, fastmix.debug):
            leaves = leaf(x), leaf(lam)
            with around():
                m = Mix(leaves[1], index)
                loss = fastmix.soft_cross_entropy(m.apply(leaves[0]), m.target(y))
                out.append((loss, *torch.autograd.grad(loss, leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))
        assert torch.isfinite(out[0][0])

    def test_writes_nothing_before_it_refuses(self, not_looked_at):
        x, _, lam, _ = batch(4, not_looked_at, row=(C,))
        out = torch.full_like(x, 7)
        with fastmix.debug(), pytest.raises(ValueError, match="index"):
            fastmix.mix(x, lam, torch.tensor([1, 0, 4, 2], device=not_looked_at), out=out)
        assert (out == 7).all()

    def test_environment(self, not_looked_at, monkeypatch):
        x, _, lam, _ = batch(4, not_looked_at, row=(C,))
        for value in ("", "0"):
            monkeypatch.setenv("FASTMIX_DEBUG", value)
            BAD[0][0](x, lam)
        monkeypatch.setenv("FASTMIX_DEBUG", "1")
        with pytest.raises(ValueError, match=BAD[0][1]):
            BAD[0][0](x, lam)

    @pytest.mark.slow
    def test_environment_of_a_process(self):
        code = """
import torch, fastmix
torch.Tensor.is_cpu = property(lambda t: False)
fastmix.mix(torch.zeros(2, 3), 0.5, torch.tensor([1, 2]))
"""
        environment = {**os.environ, "FASTMIX_BACKEND": "torch", "FASTMIX_DEBUG": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert "ValueError: index: expected a partner in [0, 2), got 2 in row 1" in ran.stderr
