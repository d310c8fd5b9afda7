"""fastmix.grid_cut and grid_cut_gap on every backend: the optimum by enumeration and by PyMaxflow, the proven bound, ties, hostile
costs."""

import collections
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from numerics import numpy
from plain import interpreted

import fastmix
from fastmix import reference
from fastmix._torch.grid_cut import energy

NO_MAXFLOW = "needs PyMaxflow"
MAXFLOW = importlib.util.find_spec("maxflow") is not None


class PlainGraph:
    """PyMaxflow's GraphFloat, as far as it is used: a minimum cut by shortest augmenting paths, for a few dozens of nodes."""

    def __init__(self, nodes, edges):
        self.room = collections.defaultdict(lambda: collections.defaultdict(float))

    def add_nodes(self, count):
        self.count = count

    def add_edges(self, first, second, capacities, back):
        for a, b, capacity, reverse in zip(*(each.tolist() for each in (first, second, capacities, back)), strict=True):
            self.room[a][b] += capacity
            self.room[b][a] += reverse

    def add_grid_tedges(self, nodes, source, sink):
        assert nodes.shape == source.shape == sink.shape
        for node, own, other in zip(nodes.flat, source.flat, sink.flat, strict=True):
            self.room["source"][int(node)] += float(own)
            self.room[int(node)]["sink"] += float(other)

    def _reached(self):
        """Nodes that more can flow to, and from where."""
        before, left = {"source": None}, collections.deque(["source"])
        while left:
            node = left.popleft()
            for other, capacity in self.room[node].items():
                if capacity > 1e-12 and other not in before:
                    before[other] = node
                    left.append(other)
        return before

    def maxflow(self):
        while "sink" in (before := self._reached()):
            path, node = [], "sink"
            while before[node] is not None:
                path.append((before[node], node))
                node = before[node]
            flow = min(self.room[a][b] for a, b in path)
            for a, b in path:
                self.room[a][b] -= flow
                self.room[b][a] += flow

    def get_grid_segments(self, nodes):
        before = self._reached()
        return np.array([int(node) not in before for node in nodes.flat]).reshape(nodes.shape)


@pytest.fixture(params=["PyMaxflow", "plain"])
def maxflow(request, monkeypatch):
    """The package, and what stands in for it where it is not installed."""
    if request.param == "PyMaxflow":
        if not MAXFLOW:
            pytest.skip(NO_MAXFLOW)
        return
    monkeypatch.setitem(sys.modules, "maxflow", types.SimpleNamespace(GraphFloat=PlainGraph))
    monkeypatch.setattr("fastmix.puzzle.grid_cut._has_maxflow", lambda: True)


def puzzle_like(N, n, L, device="cpu"):
    """Costs of the size that PuzzleMix's have: peaked saliency, weights that differ by half, convex priors."""
    own, partner = (torch.rand(N, n, n) ** 4 for _ in range(2))
    own, partner = (s / s.sum((1, 2), keepdim=True) for s in (own, partner))
    keep = 1 - torch.arange(L) / (L - 1)
    unary = partner[..., None] * keep + own[..., None] * (1 - keep) + 0.4 / n**2 * (keep - torch.rand(N, 1, 1, 1)) ** 2
    weights = 0.075 / n * (1 + torch.rand(2, N, n * (n - 1)))
    return [t.to(device) for t in (unary, weights[0].view(N, n - 1, n), weights[1].view(N, n, n - 1))]


def general(N, n, L, device="cpu"):
    """Any unary at all, convex or not."""
    return [t.to(device) for t in (torch.randn(N, n, n, L), torch.rand(N, n - 1, n), torch.rand(N, n, n - 1))]


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("costs", [puzzle_like, general])
@pytest.mark.parametrize(("n", "L"), [(1, 3), (2, 2), (2, 3), (2, 4), (3, 2)])
def test_small_grids_reach_the_optimum_of_all_labellings(device, costs, n, L):
    N = 1 if interpreted(device) else 3
    costs = costs(N, n, L, device)
    labels, gap = fastmix.grid_cut_gap(*costs, solver="primal-dual", iterations=100)
    assert labels.dtype == torch.int64
    assert labels.shape == (N, n, n)
    _, least = reference.grid_cut(*map(numpy, costs))
    found = [reference.grid_energy(*map(numpy, grid)) for grid in zip(*costs, labels, strict=True)]
    np.testing.assert_allclose(found, least, rtol=1e-6, atol=1e-6)
    assert bool((gap >= 0).all())
    assert float(gap.max()) < 0.05


def test_energy_is_the_references():
    costs = general(3, 4, 3)
    labels = torch.randint(0, 3, (3, 4, 4))
    expected = [reference.grid_energy(*map(numpy, grid)) for grid in zip(*costs, labels, strict=True)]
    np.testing.assert_allclose(energy(*costs, labels), expected, rtol=1e-12)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("n", [3, 8, 16])
def test_kernels_find_what_torch_finds(device, n):
    """Of one energy: where labels tie, which are found may depend on the rounding."""
    costs = puzzle_like(2, n, 3)
    with fastmix.backend("torch"):
        expected, gap = fastmix.grid_cut_gap(*costs, solver="primal-dual", iterations=30)
    labels, found = fastmix.grid_cut_gap(*(t.to(device) for t in costs), solver="primal-dual", iterations=30)
    torch.testing.assert_close(energy(*costs, labels.cpu()), energy(*costs, expected), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.cpu(), gap, rtol=0, atol=1e-4)


@pytest.mark.skipif(not MAXFLOW, reason=NO_MAXFLOW)
@pytest.mark.parametrize(("n", "L"), [(4, 2), (4, 3), (8, 3), (8, 4), (16, 3)])
def test_the_optimum_of_larger_grids(n, L):
    costs = puzzle_like(40, n, L)
    best = fastmix.grid_cut(*costs, solver="maxflow")
    least = energy(*costs, best)
    labels, gap = fastmix.grid_cut_gap(*costs, solver="primal-dual")
    above = (energy(*costs, labels) - least) / least.abs()
    assert float(above.min()) > -1e-9, "the exact cut is not the least"
    assert float(above.mean()) < 1e-5
    assert float((above > 1e-6).double().mean()) <= 0.05
    assert bool((energy(*costs, labels) - gap <= least * (1 + 1e-6)).all()), "the bound is above the optimum"


@pytest.mark.parametrize("costs", [puzzle_like, general])
@pytest.mark.parametrize(("n", "L"), [(1, 2), (2, 3), (2, 4), (3, 2)])
def test_maxflow_is_exact(maxflow, costs, n, L):
    costs = costs(3, n, L)
    labels, gap = fastmix.grid_cut_gap(*costs, solver="maxflow")
    _, least = reference.grid_cut(*map(numpy, costs))
    np.testing.assert_allclose(energy(*costs, labels), least, rtol=1e-9)
    assert float(gap.max()) < 1e-6
    with fastmix.backend("torch"):
        assert torch.equal(fastmix.grid_cut(*costs), labels)  # "auto" is the exact one


def test_the_bound_never_exceeds_the_optimum_however_few_iterations():
    costs = puzzle_like(8, 2, 3)
    _, least = reference.grid_cut(*map(numpy, costs))
    for iterations in (1, 3, 10):
        labels, gap = fastmix.grid_cut_gap(*costs, solver="primal-dual", iterations=iterations)
        assert bool((energy(*costs, labels) - gap <= torch.from_numpy(least) + 1e-6).all())


@pytest.mark.slow_interpreted
def test_strong_weights_make_one_label_and_none_leave_each_cell_its_own(device):
    unary, vertical, horizontal = general(2, 4, 3, device)
    labels = fastmix.grid_cut(unary, 0 * vertical, 0 * horizontal, solver="primal-dual", iterations=60)
    assert torch.equal(labels, unary.argmin(3))
    labels = fastmix.grid_cut(unary, vertical + 1e3, horizontal + 1e3, solver="primal-dual", iterations=100)
    assert torch.equal(labels.flatten(1), unary.sum((1, 2)).argmin(1, keepdim=True).expand(-1, 16))


def test_costs_that_rule_labels_out_and_batches_without_rows(device):
    unary, vertical, horizontal = puzzle_like(2, 4, 3, device)
    unary[0] += 1e4 * torch.arange(3, device=device)
    unary[1] += 1e4 * torch.arange(2, -1, -1, device=device)
    labels, gap = fastmix.grid_cut_gap(unary, vertical, horizontal, solver="primal-dual", iterations=60)
    assert (labels[0] == 0).all()
    assert (labels[1] == 2).all()
    assert float(gap.max()) < 1e-3
    empty = fastmix.grid_cut(unary[:0], vertical[:0], horizontal[:0])
    assert empty.shape == (0, 4, 4)


def test_grids_beyond_the_kernel_strides_and_float64(device):
    unary, vertical, horizontal = puzzle_like(2, 20, 2, device)
    labels = fastmix.grid_cut(unary, vertical, horizontal, solver="primal-dual", iterations=20)
    wide = unary.double().mT.contiguous().mT, vertical.double(), horizontal.double()
    assert torch.equal(labels, fastmix.grid_cut(*wide, solver="primal-dual", iterations=20))


@pytest.mark.no_poison
def test_compiled():
    costs = puzzle_like(2, 4, 3)

    def cut(*costs):
        return fastmix.grid_cut(*costs, solver="primal-dual", iterations=20) + 1

    assert torch.equal(torch.compile(cut, backend="aot_eager", fullgraph=True)(*costs), cut(*costs))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"unary": torch.zeros(2, 4, 4, 5)}, ValueError, r"unary: expected shape \[N, n, n, L\] with L from 2 to 4"),
        ({"unary": torch.zeros(2, 4, 3, 3)}, ValueError, "unary: expected shape"),
        ({"unary": torch.zeros(2, 4, 4, 3, dtype=torch.float16)}, TypeError, "unary: expected a float32 or float64"),
        ({"unary": torch.full((2, 4, 4, 3), float("nan"))}, ValueError, "unary: expected finite"),
        ({"vertical": torch.zeros(2, 4, 4)}, ValueError, r"vertical: expected shape \[2, 3, 4\]"),
        ({"horizontal": torch.zeros(2, 4, 3, dtype=torch.float64)}, TypeError, "horizontal: expected a float32"),
        (
            {"horizontal": torch.full((2, 4, 3), -1.0)},
            ValueError,
            "horizontal: expected finite weights of at least 0, got one of -1",
        ),
        ({"solver": "swap"}, ValueError, "solver: expected one of 'auto', 'maxflow', 'primal-dual'"),
        ({"iterations": 0}, ValueError, "iterations: expected an int of at least 1"),
        ({"iterations": 1.5}, TypeError, "iterations"),
    ],
)
def test_errors(change, kind, words):
    arguments = dict(zip(("unary", "vertical", "horizontal"), puzzle_like(2, 4, 3), strict=True)) | change
    with pytest.raises(kind, match=words):
        fastmix.grid_cut(**arguments)


def test_maxflow_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("fastmix.puzzle.grid_cut._has_maxflow", lambda: False)
    costs = puzzle_like(2, 4, 3)
    with pytest.raises(ImportError, match="PyMaxflow"):
        fastmix.grid_cut(*costs, solver="maxflow")
    assert fastmix.grid_cut(*costs).shape == (2, 4, 4)


def test_maxflow_cuts_on_the_cpu_alone():
    with pytest.raises(ValueError, match="solver: expected 'auto' or 'primal-dual' for tensors on meta, got 'maxflow'"):
        fastmix.grid_cut(*puzzle_like(2, 4, 3, "meta"), solver="maxflow")
