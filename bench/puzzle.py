"""PuzzleMix's parts on real images: how far from the optimum the cut is, how many blocks move, and what both cost on a CPU.

    python -m fastmix.bench puzzle [--data FOLDER] [--pairs 1000] [--threads 1] [--json FILE]

The network of `fastmix.recipes.puzzle` is trained for a few epochs, pairs of training images are cut with its saliency, at lam drawn evenly,
and the energies (in float64) are compared with the exact ones of PyMaxflow, or of enumeration at n = 2 where that is not installed.
Images come from files of the binary version of CIFAR-10 in FOLDER, or else are scikit-learn's digits enlarged to 32 x 32.
"""

import argparse
import contextlib
import pathlib
import sys
import time

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


def trained(data, epochs):
    """The recipe's network, by plain training."""
    with repeatable(0, data[0].device):
        run = recipe.fit(data, epochs, lambda seed: Mixed(), 0)
        for _ in range(epochs):
            run.epoch()
    return run.model


def timed(call, rounds=3):
    """(what it returns, milliseconds of the fastest round)"""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - start)
    return found, 1e3 * min(seconds)


def solvers(n, levels):
    """The exact way at this size, or None, and ours."""
    with contextlib.suppress(ImportError):
        fastmix.grid_cut(torch.zeros(1, 1, 1, 2), torch.zeros(1, 0, 1), torch.zeros(1, 1, 0), solver="maxflow")
        return lambda *costs: fastmix.grid_cut(*costs, solver="maxflow")
    enumerated = lambda *costs: torch.from_numpy(fastmix.reference.grid_cut(*(t.numpy() for t in costs))[0])  # noqa: E731
    return enumerated if n == 2 else None


def measure(x, s, n, levels):
    """One row of the table: pairs of images in batches of 100, n x n blocks, L levels."""
    above, bounds, moved, ms = [], [], {0.8: [], 0.02: []}, {"exact": 0.0, "primal-dual": 0.0, "transport": 0.0, "costs": 0.0}
    exact = solvers(n, levels)
    for number, rows in enumerate(torch.arange(len(x)).split(BATCH)):
        draw = torch.Generator().manual_seed(number)
        index, lam = torch.randperm(len(rows), generator=draw), torch.rand(len(rows), generator=draw)
        costs, spent = timed(lambda: fastmix.puzzle_costs(x[rows], s[rows], index, lam, n, **recipe.UNITS, levels=levels))  # noqa: B023
        ms["costs"] += spent
        (labels, gap), spent = timed(lambda: fastmix.grid_cut_gap(*costs, solver="primal-dual"), 1)  # noqa: B023
        ms["primal-dual"] += spent
        found = energy(*costs, labels)
        bounds.append(gap / found.abs())
        if exact is not None:
            best, spent = timed(lambda: exact(*costs))  # noqa: B023
            ms["exact"] += spent
            least = energy(*costs, best)
            above.append((found - least) / least.abs())
        mask = 1 - labels / (levels - 1)
        shares = F.avg_pool2d(s[rows][:, None], 32 // n)[:, 0]
        shares = shares / shares.sum((1, 2), keepdim=True)
        both = torch.cat((mask, 1 - mask)), torch.cat((shares, shares[index]))
        for t_eps in moved:
            plan, spent = timed(lambda: fastmix.transport_plan(*both, t_eps))  # noqa: B023
            ms["transport"] += spent * (t_eps == 0.8)
            moved[t_eps].append((plan != torch.arange(n * n)).sum(1).float())
    bounds, batches = torch.cat(bounds), len(bounds)
    row = {"n": n, "levels": levels, "pairs": len(x)}
    if above:
        above = torch.cat(above)
        row |= {"gap %": 100 * float(above.mean()), "not optimal %": 100 * float((above > OPTIMUM).double().mean())}
    row |= {"bound %": 100 * float(bounds.mean()), "largest bound %": 100 * float(bounds.max())}
    row |= {f"moved at {t_eps}": float(torch.cat(counts).mean()) for t_eps, counts in moved.items()}
    return row | {f"{name} ms": spent / batches for name, spent in ms.items() if spent}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench puzzle", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="a folder of CIFAR-10's binary version; scikit-learn's digits without")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="a file for the figures")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    data = cifar.load(pathlib.Path(options.data), device) if options.data else recipe.load_digits(device)
    model = trained(data, options.epochs).eval()
    rows = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(1))[: options.pairs]
    x, y = data[0][rows], data[1][rows]
    s = torch.cat(
        [fastmix.saliency(fastmix.input_gradient(model, *some)) for some in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    )
    about = {"machine": results.machine(), "commit": results.commit(), "date": results.now(), "threads": options.threads}
    found = {**about, "data": digest(data), "epochs": options.epochs, "rows": []}
    with torch.no_grad():
        for levels in (3, 2, 4):
            for n in SIDES:
                found["rows"].append(measure(x, s, n, levels))
    names = list(dict.fromkeys(name for row in found["rows"] for name in row))
    lines = [[f"{row[name]:.4g}" if name in row else "" for name in names] for row in found["rows"]]
    screen.table(names, lines, names)
    if options.json:
        write(pathlib.Path(options.json), results.finite(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
