"""fastmix.transport_plan on every backend against proposals and refusals written out."""

import pytest
import torch
from numerics import numpy

import fastmix
from fastmix import reference


def drawn(N, n, device="cpu", power=4):
    mask = torch.randint(0, 3, (N, n, n)) / 2
    saliency = torch.rand(N, n, n) ** power
    return mask.to(device), (saliency / saliency.sum((1, 2), keepdim=True)).to(device)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("t_eps", [0.8, 0.02, 0.001, 0.0])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_plans_are_the_references(device, n, t_eps):
    mask, saliency = drawn(3, n, device)
    plan = fastmix.transport_plan(mask, saliency, t_eps)
    assert plan.dtype == torch.int64
    assert torch.equal(plan.cpu(), torch.from_numpy(reference.transport_plan(numpy(mask), numpy(saliency), t_eps)))


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_fewer_rounds(device, rounds):
    mask, saliency = drawn(3, 6, device, power=8)
    plan = fastmix.transport_plan(mask, saliency, 0.01, rounds)
    assert torch.equal(plan.cpu(), torch.from_numpy(reference.transport_plan(numpy(mask), numpy(saliency), 0.01, rounds)))


def test_ties_go_to_the_lowest_block(device):
    """All blocks are alike and only one target is visible: the nearest of equal sources is the first."""
    mask = torch.zeros(2, 3, 3, device=device)
    mask[0, 1, 1] = mask[1, 0, 1] = mask[1, 2, 1] = 1
    saliency = torch.full((2, 3, 3), 1 / 9, device=device)
    plan = fastmix.transport_plan(mask, saliency, 0.0)
    assert torch.equal(plan.cpu(), torch.from_numpy(reference.transport_plan(numpy(mask), numpy(saliency), 0.0)))
    assert plan[0].tolist() == [0, 1, 2, 3, 0, 5, 6, 7, 8]


def test_hidden_blocks_and_blocks_without_saliency_stay(device):
    mask, saliency = drawn(4, 4, device)
    own = torch.arange(16, device=device).expand(4, 16)
    assert torch.equal(fastmix.transport_plan(0 * mask, saliency, 0.1), own)
    assert torch.equal(fastmix.transport_plan(mask, 0 * saliency, 0.1), own)
    assert torch.equal(fastmix.transport_plan(torch.ones_like(mask), saliency, 0.1), own)
    plan = fastmix.transport_plan(mask, saliency, 0.01)
    hidden = (mask == 0).flatten(1)
    assert torch.equal(plan[hidden], own[hidden])
    assert not torch.equal(plan, own)
    for row, visible in zip(plan.tolist(), (mask > 0).flatten(1).tolist(), strict=True):
        shown = [source for source, seen in zip(row, visible, strict=True) if seen and source not in (row.index(source),)]
        assert len(set(shown)) == len(shown), "a block is shown twice"


def test_large_grids_half_precision_and_no_rows(device):
    mask, saliency = drawn(2, 18, device, power=16)
    plan = fastmix.transport_plan(mask, saliency, 0.02)
    assert torch.equal(fastmix.transport_plan(mask.half(), saliency, 0.02), plan)
    assert torch.equal(fastmix.transport_plan(mask.mT.contiguous().mT, saliency.double(), 0.02), plan)
    assert fastmix.transport_plan(mask[:0], saliency[:0], 0.02).shape == (0, 324)


@pytest.mark.no_poison
def test_compiled():
    mask, saliency = drawn(2, 4)

    def plan(mask, saliency):
        return fastmix.transport_plan(mask, saliency, 0.02) + 1

    assert torch.equal(torch.compile(plan, backend="aot_eager", fullgraph=True)(mask, saliency), plan(mask, saliency))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"mask": torch.zeros(2, 4, 3)}, ValueError, r"mask: expected shape \[N, n, n\]"),
        ({"mask": torch.zeros(2, 4, 4, dtype=torch.int64)}, TypeError, "mask"),
        ({"saliency": torch.zeros(2, 3, 3)}, ValueError, r"saliency: expected shape \[2, 4, 4\]"),
        ({"saliency": torch.full((2, 4, 4), -1.0)}, ValueError, "saliency: expected values of at least 0, got one of -1"),
        (
            {"saliency": torch.full((2, 4, 4), float("nan"))},
            ValueError,
            "saliency: expected values of at least 0, got one of nan",
        ),
        ({"t_eps": -0.1}, ValueError, "t_eps: expected a number of at least 0"),
        ({"rounds": -1}, ValueError, "rounds"),
    ],
)
def test_errors(change, kind, words):
    mask, saliency = drawn(2, 4)
    with pytest.raises(kind, match=words):
        fastmix.transport_plan(**{"mask": mask, "saliency": saliency, "t_eps": 0.1, **change})
