"""PuzzleMix's parts on real images: how far from the optimum the cut is, how many blocks move, and what both cost on a CPU.

    python -m fastmix.bench puzzle [--data FOLDER] [--pairs 1000] [--threads 1] [--steps] [--json FILE]

The network of `fastmix.recipes.puzzle` is trained for a few epochs, pairs of training images are cut with its saliency, at lam drawn evenly,
and the energies (in float64) are compared with the exact ones of PyMaxflow, or of enumeration at n = 2 where that is not installed.
Images come from files of the binary version of CIFAR-10 in FOLDER, or else are scikit-learn's digits enlarged to 32 x 32.

Where gco-wrapper is installed, the authors' way is timed too: alpha-beta swaps on integer costs, image by image, and a transport that holds
the costs of all pairs of blocks. --steps times training steps of ResNets instead: with PuzzleMix, its saliency pass apart, beside mixup.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import pathlib
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import fastmix
from fastmix._torch.grid_cut import energy
from fastmix.bench import results, screen
from fastmix.recipes import cifar
from fastmix.recipes import puzzle as recipe
from fastmix.recipes._training import Mixed, digest, repeatable, write

BATCH = 100
SIDES = (2, 4, 8, 16)
OPTIMUM = 1e-6  # above it relatively: not optimal
OFFICIAL = 1  # batches that the authors' way is timed on
TIMED = "exact", "primal-dual", "transport", "costs", "official cut", "official transport"
STEPS = ("preact18", 32, 64), ("resnet50", 224, 4)  # model, as the recipe of CIFAR names it, size of the images, batch


def trained(data, epochs):
    """The recipe's network, by plain training."""
    with repeatable(0, data[0].device):
        run = recipe.fit(data, epochs, lambda seed: Mixed(), 0)
        for _ in range(epochs):
            run.epoch()
    return run.model


def timed(call, *arguments, rounds=3, **options):
    """(what it returns, milliseconds of CPU time of the round that took the least): others may use the machine as well."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        found = call(*arguments, **options)
        spent.append(1e3 * (time.process_time() - start))
    return found, min(spent)


def exact_solver(n):
    """The exact way at this size, or None."""
    with contextlib.suppress(ImportError):
        fastmix.grid_cut(torch.zeros(1, 1, 1, 2), torch.zeros(1, 0, 1), torch.zeros(1, 1, 0), solver="maxflow")
        return functools.partial(fastmix.grid_cut, solver="maxflow")
    return (lambda *costs: torch.from_numpy(fastmix.reference.grid_cut(*(t.numpy() for t in costs))[0])) if n == 2 else None


def swapped(unary, vertical, horizontal):
    """The authors' cut: labels [N, n, n] by gco's alpha-beta swaps, on costs in integers of 1 / (1000 n^2)."""
    gco = importlib.import_module("gco")
    N, n, _, L = unary.shape
    levels = np.arange(L, dtype=np.int32)
    bend, scales = (levels[:, None] - levels) ** 2, (1, (L - 1) ** 2, (L - 1) ** 2)
    costs = [(1000 * n * n * t / scale).int().numpy() for t, scale in zip((unary, vertical, horizontal), scales, strict=True)]
    found = [gco.cut_grid_graph(costs[0][i], bend, costs[1][i], costs[2][i], algorithm="swap") for i in range(N)]
    return torch.from_numpy(np.stack(found)).view(N, n, n)


def dense_plan(mask, saliency, t_eps):
    """The authors' transport: a matrix of the costs of all pairs of blocks, and n rounds of proposals and refusals."""
    N, n, _ = mask.shape
    at = torch.cartesian_prod(torch.arange(n), torch.arange(n)).float()
    cost = t_eps * (at[:, None] - at).square().sum(2) / max(n - 1, 1) ** 2
    cost = cost - saliency.flatten(1)[:, :, None] * (mask.flatten(1) > 0)[:, None, :]
    for _ in range(n):
        proposed = torch.zeros(cost.shape, dtype=torch.bool).scatter_(2, cost.argmin(2, keepdim=True), True)
        offers = torch.where(proposed, cost, torch.inf)
        kept = torch.zeros(cost.shape, dtype=torch.bool).scatter_(1, offers.argmin(1, keepdim=True), True) & proposed
        cost = cost + (proposed & ~kept)
    best, source = torch.where(kept & (cost < 0), cost, torch.inf).min(1)
    return torch.where(best < 0, source, torch.arange(n * n))


def measure(x, s, n, levels):
    """One row of the table: pairs of images in batches of 100, n x n blocks, L levels."""
    above, bounds, moved, ms = [], [], {0.8: [], 0.02: []}, {}
    exact, batches = exact_solver(n), torch.arange(len(x)).split(BATCH)

    def spend(name, call, *arguments, **options):
        found, spent = timed(call, *arguments, **options)
        ms.setdefault(name, []).append(spent)
        return found

    for number, rows in enumerate(batches):
        draw = torch.Generator().manual_seed(number)
        index, lam = torch.randperm(len(rows), generator=draw), torch.rand(len(rows), generator=draw)
        costs = spend("costs", fastmix.puzzle_costs, x[rows], s[rows], index, lam, n, **recipe.UNITS, levels=levels)
        labels, gap = spend("primal-dual", fastmix.grid_cut_gap, *costs, solver="primal-dual", rounds=1)
        found = energy(*costs, labels)
        bounds.append(gap / found.abs())
        if exact is not None:
            least = energy(*costs, spend("exact", exact, *costs))
            above.append((found - least) / least.abs())
        mask = 1 - labels / (levels - 1)
        shares = F.avg_pool2d(s[rows][:, None], 32 // n)[:, 0]
        shares = shares / shares.sum((1, 2), keepdim=True)
        both = torch.cat((mask, 1 - mask)), torch.cat((shares, shares[index]))
        if number < OFFICIAL:
            if importlib.util.find_spec("gco"):
                spend("official cut", swapped, *costs, rounds=1)
            plan = spend("official transport", dense_plan, *both, 0.8, rounds=1)
            same = plan == fastmix.transport_plan(*both, 0.8)
            assert float(same[both[0].flatten(1) > 0].float().mean()) > 0.99, "the authors' transport gives another plan"
        for t_eps in moved:
            plan = spend("transport" if t_eps == 0.8 else "transport at 0.02", fastmix.transport_plan, *both, t_eps)
            moved[t_eps].append((plan != torch.arange(n * n)).sum(1).float())
    above, bounds = (torch.cat(found) if found else None for found in (above, bounds))
    row = {"n": n, "levels": levels, "pairs": len(x)}
    if above is not None:
        row |= {"gap %": 100 * float(above.mean()), "not optimal %": 100 * float((above > OPTIMUM).double().mean())}
    row |= {"bound %": 100 * float(bounds.mean()), "largest bound %": 100 * float(bounds.max())}
    row |= {f"moved at {t_eps}": float(torch.cat(counts).mean()) for t_eps, counts in moved.items()}
    return row | {f"{name} ms": statistics.mean(ms[name]) for name in TIMED if name in ms}


def step_times(model_name, size, batch, rounds=3):
    """Milliseconds of a training step with mixup, of one with PuzzleMix whose saliency is at hand, of the saliency pass and of sampling
    alone: the fastest of so many rounds, in turn."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, size, size), torch.arange(batch) % 100
    model = cifar.model_of(model_name, 100)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    mixup, puzzle = fastmix.Mixup(1.0, seed=0), fastmix.PuzzleMix(mean=0.5, std=0.25, blocks=8, seed=0)
    s = fastmix.saliency(fastmix.input_gradient(model, x, y))

    def step(mixed, target):
        optimizer.zero_grad()
        fastmix.soft_cross_entropy(model(mixed), target).backward()
        optimizer.step()

    ways = {
        "mixup step": lambda: step(*mixup(x, y)),
        "PuzzleMix step": lambda: step(*puzzle(x, y, s)),
        "saliency": lambda: fastmix.saliency(fastmix.input_gradient(model, x, y)),
        "PuzzleMix alone": lambda: puzzle(x, y, s),
        "mixup alone": lambda: mixup(x, y),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            best[name] = min(best[name], timed(way, rounds=1)[1])
    row = {"model": f"{model_name} at {size}", "batch": batch, **{f"{name} ms": spent for name, spent in best.items()}}
    return row | {"over mixup %": 100 * (best["PuzzleMix step"] / best["mixup step"] - 1)}


def energies(options):
    """What the results say of the cut and of what moves."""
    device = torch.device("cpu")
    data = cifar.load(pathlib.Path(options.data), device) if options.data else recipe.load_digits(device)
    model = trained(data, options.epochs).eval()
    rows = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(1))[: options.pairs]
    x, y = data[0][rows], data[1][rows]
    s = torch.cat(
        [fastmix.saliency(fastmix.input_gradient(model, *some)) for some in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    )
    found = {"data": digest(data), "epochs": options.epochs, "rows": []}
    with torch.no_grad():
        for levels in (3, 2, 4):
            for n in SIDES:
                found["rows"].append(measure(x, s, n, levels))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench puzzle", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a folder of CIFAR-10's binary version; scikit-learn's digits without")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--steps", action="store_true", help="time training steps instead")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    about = {"machine": results.machine(), "commit": results.commit(), "date": results.now(), "threads": options.threads}
    if options.steps:
        found = {**about, "rows": []}
        for sizes in STEPS:
            try:
                found["rows"].append(step_times(*sizes))
            except ValueError as error:  # neither timm nor torchvision
                print(f"left out: {error}", file=sys.stderr)
    else:
        found = {**about, **energies(options)}
    names = list(dict.fromkeys(name for row in found["rows"] for name in row))
    lines = [
        [value if isinstance(value := row.get(name, ""), str) else f"{value:.4g}" for name in names] for row in found["rows"]
    ]
    screen.table(names, lines, names)
    if options.json:
        write(pathlib.Path(options.json), results.finite(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
