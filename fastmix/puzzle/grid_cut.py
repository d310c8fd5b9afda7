"""The cheapest labels of a grid of cells: the minimum cut of PuzzleMix's mask.

    E(l) = sum over cells of unary[cell, l] + sum over neighbours of weight*(l - l')^2 / (L-1)^2

unary [N, n, n, L], vertical [N, n-1, n], horizontal [N, n, n-1], labels [N, n, n]. `fastmix._torch.grid_cut` says how it is found on a
device; on the CPU PyMaxflow cuts one graph of the whole batch, where it is installed.
"""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._dtypes import WEIGHT_DTYPES
from .._torch.grid_cut import bent_costs, energy
from .._torch.grid_cut import grid_cut as torch_grid_cut

LARGEST = 16  # cells a side that the kernel takes
SOLVERS = ("auto", "maxflow", "primal-dual")


def grid_cut(
    unary: torch.Tensor,
    vertical: torch.Tensor,
    horizontal: torch.Tensor,
    *,
    solver: str = "auto",
    iterations: int = 220,
) -> torch.Tensor:
    """Returns the labels of least energy of every grid of a batch, `[N, n, n]` int64.

        E(l) = sum over cells of unary[l] + sum over neighbours of weight*(l - l')^2 / (L-1)^2

    `"primal-dual"`: over-relaxed primal-dual iterations on a relaxation that has the same minimum, cut at five levels of which
    the cheapest is kept, and one round of rows and columns solved exactly. One launch for the batch on a GPU to n = 16; in torch
    elsewhere. Nothing waits for the device. After 220 iterations the labels of nearly every image are the optimum;
    `fastmix.grid_cut_gap` says how far from it they can be. `"maxflow"`: the exact minimum by PyMaxflow, in one graph for the
    batch, on the CPU (`pip install 'fastmix[puzzle]'`). `"auto"`: the latter where it is installed and tensors are on the CPU.

    Args:
        unary: `[N, n, n, L]` float32 or float64, the cost of each label; L from 2 to 4.
        vertical: `[N, n-1, n]`, the weights between a cell and the one below it, at least 0.
        horizontal: `[N, n, n-1]`, between a cell and the one on its right.
        solver: `"auto"`, `"maxflow"` or `"primal-dual"`.
        iterations: of the primal-dual form, which computes in float32.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also a negative or infinite weight, or an infinite or NaN cost.
        ImportError: `"maxflow"` without PyMaxflow.

    Source: Ishikawa, TPAMI 2003 (the binaries); Chambolle and Pock, JMIV 2011 (the iterations); PuzzleMix, arXiv:2009.06962.

    >>> import torch, fastmix
    >>> unary = torch.tensor([[0.0, 1.0], [0.6, 0.5], [1.0, 0.0], [0.0, 1.0]]).view(1, 2, 2, 2)
    >>> fastmix.grid_cut(unary, torch.zeros(1, 1, 2), torch.zeros(1, 2, 1))
    tensor([[[0, 1],
             [1, 0]]])
    >>> fastmix.grid_cut(unary, torch.full((1, 1, 2), 0.3), torch.full((1, 2, 1), 0.3))
    tensor([[[0, 0],
             [1, 0]]])
    """
    return _solved(unary, vertical, horizontal, solver, iterations)[0]


def grid_cut_gap(
    unary: torch.Tensor,
    vertical: torch.Tensor,
    horizontal: torch.Tensor,
    *,
    solver: str = "auto",
    iterations: int = 220,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the labels of `fastmix.grid_cut` and a bound of what is left to gain, `([N, n, n] int64, [N] float64)`.

        E(labels) - min E <= gap

    It comes from the dual variables of the iterations, without another solver; from `"maxflow"` it is 0, or what rounds there.

    Args, Raises: as `fastmix.grid_cut`.

    >>> import torch, fastmix
    >>> unary = torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    >>> labels, gap = fastmix.grid_cut_gap(unary, torch.ones(3, 7, 8), torch.ones(3, 8, 7), solver="primal-dual")
    >>> labels.shape, bool((gap < 1e-3).all())
    (torch.Size([3, 8, 8]), True)
    """
    labels, bound = _solved(unary, vertical, horizontal, solver, iterations)
    return labels, (energy(unary, vertical, horizontal, labels) - bound.double()).clamp(min=0)


def _solved(
    unary: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, solver: str, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_costs(unary, vertical, horizontal)
    _check.one_of("solver", solver, SOLVERS, f"one of {', '.join(map(repr, SOLVERS))}")
    iterations = _check.integer("iterations", iterations, 1, "an int of at least 1")
    exact = _is_exact(solver, unary.device)
    costs = (t.detach() for t in (unary, vertical, horizontal))
    return _dispatch.call(OP, (unary,), *costs, 0 if exact else iterations)


def _check_costs(unary: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor) -> None:
    _check.strided("unary", unary, WEIGHT_DTYPES, "a float32 or float64 tensor")
    if unary.dim() != 4 or unary.shape[1] != unary.shape[2] or unary.shape[1] < 1 or not 2 <= unary.shape[3] <= 4:
        raise _check.wrong(ValueError, "unary", "shape [N, n, n, L] with L from 2 to 4", unary)
    N, n = unary.shape[:2]
    for name, weights, shape in (("vertical", vertical, (N, n - 1, n)), ("horizontal", horizontal, (N, n, n - 1))):
        _check.strided(name, weights, (unary.dtype,), f"a {str(unary.dtype).removeprefix('torch.')} tensor, as unary")
        if weights.shape != shape:
            raise _check.wrong(ValueError, name, f"shape {list(shape)}", weights)
        _check.same_device(name, weights, unary)
        if _check.readable(weights) and not bool(((weights >= 0) & (weights < float("inf"))).all()):
            least = float(weights.min())
            raise ValueError(
                f"{name}: expected finite weights of at least 0, got one of {least if least < 0 else 'inf or NaN'}"
            )
    if _check.readable(unary) and not bool(unary.isfinite().all()):
        raise ValueError("unary: expected finite costs, got one of inf or NaN")


def _is_exact(solver: str, device: torch.device) -> bool:
    """Whether PyMaxflow solves for tensors of this device."""
    if solver == "primal-dual":
        return False
    on_host = device.type == "cpu"
    if solver == "auto":
        return on_host and _dispatch.on_torch(device) and _has_maxflow()
    if not on_host:
        raise ValueError(f"solver: expected 'auto' or 'primal-dual' for tensors on {device}, got 'maxflow'")
    if not _has_maxflow():
        raise ImportError("solver: expected PyMaxflow for 'maxflow' (pip install 'fastmix[puzzle]'), which is not installed")
    return True


@functools.cache
def _has_maxflow() -> bool:
    return importlib.util.find_spec("maxflow") is not None


# a constant of the program that is traced, as the name of the backend is
_has_maxflow._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _maxflow(unary: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor) -> Any:
    """Returns the exact labels and their energy, by one graph for the batch. A binary is 1 where its node is on the sink's side."""
    graphs = importlib.import_module("maxflow")
    N, n, _, L = unary.shape
    K = L - 1
    steps = bent_costs(unary.double(), vertical.double(), horizontal.double()).diff(dim=3).permute(3, 0, 1, 2).contiguous()
    graph = graphs.GraphFloat(N * n * n * K, 4 * K * K * N * n * n)
    nodes = torch.arange(N * n * n * K).view(K, N, n, n)

    def add_edges(first: Any, second: Any, capacity: Any, back: Any) -> None:
        arrays = (t.expand(first.shape).reshape(-1).contiguous().numpy() for t in (first, second, capacity, back))
        graph.add_edges(*arrays)

    graph.add_nodes(nodes.numel())
    graph.add_grid_tedges(nodes.numpy(), steps.clamp(min=0).numpy(), (-steps).clamp(min=0).numpy())
    for weights, first, second in (
        (vertical, nodes[:, :, :-1], nodes[:, :, 1:]),
        (horizontal, nodes[..., :-1], nodes[..., 1:]),
    ):
        weights = weights.double() / K**2
        for k in range(K):
            for m in range(K):
                add_edges(first[k], second[m], weights, weights)
    if bool((steps.diff(dim=0) < 0).any()):  # else the binaries are in order by themselves
        # x_k = 0 and x_(k+1) = 1 costs more than everything else together
        never = steps.abs().sum() + vertical.double().sum() + horizontal.double().sum() + 1
        for k in range(K - 1):
            add_edges(nodes[k], nodes[k + 1], never, torch.zeros_like(never))
    graph.maxflow()
    labels = torch.from_numpy(graph.get_grid_segments(nodes.numpy())).sum(0)
    return labels, energy(unary, vertical, horizontal, labels).to(unary.dtype)


def _run(
    unary: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, iterations: int, backend: ModuleType
) -> tuple[torch.Tensor, torch.Tensor]:
    if not unary.numel():
        return unary.new_empty(unary.shape[:3], dtype=torch.int64), unary.new_empty(unary.shape[0])
    if not iterations:
        return _maxflow(unary, vertical, horizontal)
    costs = (t.to(torch.float32).contiguous() for t in (unary, vertical, horizontal))
    cut: Any = backend.grid_cut if unary.shape[1] <= LARGEST else torch_grid_cut
    labels, bound = cut(*costs, iterations)
    return labels, bound.to(unary.dtype)


def _launch(
    unary: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _run(unary, vertical, horizontal, iterations, _backend.of(unary))


@custom_op("fastmix::grid_cut", mutates_args=())
def _grid_cut_op(
    unary: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, iterations: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels and a lower bound of the least energy; by PyMaxflow for 0 iterations."""
    labels, bound = _run(unary, vertical, horizontal, iterations, _backend.module(backend))
    return labels.contiguous(), bound


@_grid_cut_op.register_fake
def _(unary: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, iterations: int, backend: str) -> Any:
    return unary.new_empty(unary.shape[:3], dtype=torch.int64), unary.new_empty(unary.shape[0])


OP = _dispatch.Op(_launch, _grid_cut_op, _launch, _launch)
