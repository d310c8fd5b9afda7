"""What mixup does between the training points: Figures 1 and 2 of the mixup paper, `python -m fastmix.recipes.toy`.

surfaces.png   a ring around a disc, learned with and without mixup: p(class 1) over the plane
between.png    between two training digits, x = lam*x_i + (1-lam)*x_j: how often a network that has learned them with and without
               mixup names a class that is neither digit's ("miss"), and the size of its derivative, the Frobenius norm of
               d logits / d x, over lam
alphas.png     the ring's surface for alpha from 0.01 to 8 (mixup becomes empirical risk as alpha goes to 0), and the densities of Beta(alpha,
               alpha)
pair.png       two digits, mixed with lam 0, 0.1, ..., 1
results.json   every run's numbers: the same bits on every run of one machine

The paper draws the second figure for CIFAR-10. The digits are scikit-learn's, trained on as by `fastmix.recipes.digits`.

Source: mixup, arXiv:1710.09412.
"""

from functools import partial

import torch
from torch import nn

import fastmix
from fastmix.recipes import digits
from fastmix.recipes._summaries import mean, tell
from fastmix.recipes._training import (
    COLORS,
    Fit,
    Mixed,
    Runs,
    environment,
    error_and_loss,
    one_thread,
    parsed,
    parser,
    repeatable,
    write,
)

METHODS = {
    "ERM": lambda model, seed: Mixed(),
    "mixup": lambda model, seed: Mixed(fastmix.Mixup(alpha=1.0, seed=seed)),
}
RING_EPOCHS, GRID, REACH = 200, 121, 1.6
SHARES, PAIRS = 21, 400
ALPHAS = 0.01, 0.1, 0.2, 1.0, 8.0


# The plane


def rings(device):
    """(points [N, 2], classes [N]): a disc, and a ring around it."""
    from sklearn.datasets import make_circles

    x, y = make_circles(300, noise=0.12, factor=0.4, random_state=0)
    return torch.tensor(x, dtype=torch.float32, device=device), torch.tensor(y, device=device)


def ring_fit(objective, seed, device):
    x, y = rings(device)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    evaluate = lambda model: error_and_loss(model(x), y)  # noqa: E731
    return Fit(seed, model, objective(model, seed), x, y, batch=50, optimizer=optimizer, evaluate=evaluate)


@torch.no_grad()
def surface(model, device):
    """p(class 1) on a grid [GRID, GRID] of the plane."""
    line = torch.linspace(-REACH, REACH, GRID, device=device)
    points = torch.cartesian_prod(line, line).flip(1)  # rows are y
    return model(points).softmax(1)[:, 1].view(GRID, GRID).cpu()


def picture_of_surfaces(surfaces, path, device):
    from matplotlib.figure import Figure

    x, y = (t.cpu().numpy() for t in rings(device))
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots(1, len(surfaces))
    for cell, (name, values) in zip(axes, surfaces.items(), strict=True):
        extent = -REACH, REACH, -REACH, REACH
        shown = cell.imshow(values.numpy(), origin="lower", extent=extent, cmap="Blues", vmin=0, vmax=1)
        for label, color in ((0, COLORS[3]), (1, COLORS[2])):
            cell.scatter(*x[y == label].T, s=9, color=color, edgecolors="white", linewidths=0.4, label=f"class {label}")
        cell.set_title(name)
        cell.set(xticks=[], yticks=[])
    axes[0].legend(frameon=True, loc="upper left")
    figure.colorbar(shown, ax=axes, label="p(class 1)", shrink=0.9)
    figure.savefig(path, dpi=120)


def picture_of_alphas(surfaces, path, device):
    """The ring's surfaces by alpha, and the densities that lambda has."""
    from matplotlib.figure import Figure

    x, y = (t.cpu().numpy() for t in rings(device))
    figure = Figure(figsize=(2.5 * len(surfaces) + 3.4, 2.9), layout="constrained")
    *cells, last = figure.subplots(1, len(surfaces) + 1, width_ratios=[*[1] * len(surfaces), 1.3])
    for cell, (name, values) in zip(cells, surfaces.items(), strict=True):
        cell.imshow(values.numpy(), origin="lower", extent=(-REACH, REACH, -REACH, REACH), cmap="Blues", vmin=0, vmax=1)
        for label, color in ((0, COLORS[3]), (1, COLORS[2])):
            cell.scatter(*x[y == label].T, s=3, color=color)
        cell.set_title(name, fontsize=10)
        cell.set(xticks=[], yticks=[])
    lam = torch.linspace(0.005, 0.995, 199)
    for alpha, color in zip(ALPHAS, COLORS, strict=False):
        density = torch.distributions.Beta(alpha, alpha).log_prob(lam).exp()
        last.plot(lam.numpy(), density.numpy(), color=color, label=f"alpha {alpha:g}")
    last.set(xlabel="lam", ylim=(0, 4), xlim=(0, 1))
    last.set_title("density of Beta(alpha, alpha)", fontsize=10)
    last.legend(frameon=False, fontsize=8)
    last.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def picture_of_a_pair(x, y, path):
    """Writes a picture of two digits mixed with lambda 0, 0.1, ..., 1."""
    from matplotlib.figure import Figure

    pair = torch.stack([x[(y == digit).nonzero()[0, 0]] for digit in (3, 8)]).cpu()
    figure = Figure(figsize=(11, 1.5), layout="constrained")
    for cell, lam in zip(figure.subplots(1, 11), torch.linspace(0, 1, 11).tolist(), strict=True):
        cell.imshow(fastmix.mix(pair, lam, torch.tensor([1, 0]))[0, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        cell.set_title(f"lam {lam:.1f}", fontsize=9)
        cell.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


# Between digits


def between(model, x, y):
    """({"miss_percent": [...], "jacobian_norm": [...]} at SHARES values of lam) over random pairs of training digits of two classes."""
    model.eval()
    draws = torch.Generator().manual_seed(0)
    i, j = (torch.randint(len(x), (8 * PAIRS,), generator=draws).to(x.device) for _ in range(2))
    i, j = (pick[y[i] != y[j]][:PAIRS] for pick in (i, j))
    jacobians = torch.func.vmap(torch.func.jacrev(lambda image: model(image.unsqueeze(0))[0]), chunk_size=100)
    found = {"miss_percent": [], "jacobian_norm": []}
    for lam in torch.linspace(0, 1, SHARES).tolist():
        mixed = fastmix.mix(torch.cat((x[i], x[j])), lam, torch.arange(2 * len(i), device=x.device).roll(len(i)))[: len(i)]
        with torch.no_grad():
            named = model(mixed).argmax(1)
            norms = jacobians(mixed).flatten(1).norm(dim=1)
        found["miss_percent"].append(100 * ((named != y[i]) & (named != y[j])).float().mean().item())
        found["jacobian_norm"].append(norms.mean().item())
    return found


def picture_of_between(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    labels = {"miss_percent": "misses (%)", "jacobian_norm": "norm of d logits / d x"}
    for cell, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for name, color in zip(METHODS, COLORS, strict=False):
            curves = torch.tensor([run[key] for run in results[name]], dtype=torch.float64).numpy()
            lam = torch.linspace(0, 1, SHARES).numpy()
            cell.plot(lam, curves.mean(0), color=color, lw=2, label=name)
            cell.fill_between(lam, curves.min(0), curves.max(0), color=color, alpha=0.15, lw=0)
        cell.set(xlabel="lam", ylabel=label, xlim=(0, 1), ylim=(0, None))
        cell.grid(alpha=0.25)
        cell.spines[["top", "right"]].set_visible(False)
    cell.legend(frameon=False)
    figure.suptitle(f"Between training digits of two classes: mean and range over seeds (of {len(results[name])})", fontsize=12)
    figure.savefig(path, dpi=120)


TITLE = "Between training points (arXiv:1710.09412, Figure 2)"


def summary(found):
    rows = []
    for name, runs in found["methods"].items():
        norms = ([run["jacobian_norm"][at] for run in runs] for at in (0, SHARES // 2))
        rows.append([name, mean([max(run["miss_percent"]) for run in runs]), *map(mean, norms)])
    remarks = """A miss names neither
digit's class; norms are of d logits / d x. The paper finds fewer misses and smaller norms with mixup (Figure 2, CIFAR-10)."""
    if "distance_from_ERM" in found:
        far = "; ".join(f"{name} {gap:.3f}" for name, gap in found["distance_from_ERM"].items() if name != "ERM")
        remarks += f" On the ring mixup\nbecomes ERM as alpha goes to 0: the mean distance of p(class 1) over the plane from ERM's is {far}."
    return ("between training digits", ">misses at the worst lam, %", ">norm at a digit", ">half-way"), rows, remarks


@one_thread()
def main(argv=None):
    args = parsed(parser("toy", __doc__.splitlines()[0], out="fastmix-toy", seeds=5, epochs=100), argv)
    from rich.console import Console

    console, data = Console(highlight=False, markup=False), digits.load(args.device)
    console.print(
        f"A ring and a disc, {RING_EPOCHS} epochs; {len(data[0])} digits, {args.seeds} seeds, {args.epochs} epochs.\n"
    )
    surfaces, by_alpha, results = {}, {}, {name: [] for name in METHODS}
    ring_epochs = min(RING_EPOCHS, args.epochs) if args.small else RING_EPOCHS
    total = (len(METHODS) + len(ALPHAS)) * ring_epochs + len(METHODS) * args.seeds * args.epochs
    settings = {"recipe": "toy", "seeds": args.seeds, "epochs": args.epochs, "device": str(args.device)}
    with Runs(args.out, settings, total, console, (rings(args.device), data)) as runs:
        for name, objective in METHODS.items():
            model, _, _ = runs.run(f"ring, {name}", 0, ring_epochs, partial(ring_fit, objective, 0, args.device))
            surfaces[name] = surface(model, args.device)
        by_alpha["ERM"] = surfaces["ERM"]
        for alpha in ALPHAS:
            of_alpha = lambda model, seed, alpha=alpha: Mixed(fastmix.Mixup(alpha=alpha, seed=seed))  # noqa: E731
            model, _, _ = runs.run(f"ring, alpha {alpha:g}", 0, ring_epochs, partial(ring_fit, of_alpha, 0, args.device))
            by_alpha[f"alpha {alpha:g}"] = surface(model, args.device)
        for seed in runs.seeds(0, args.seeds, METHODS):
            for name, objective in METHODS.items():
                make = partial(digits.fit, objective, seed, args.epochs, data)
                model, result, _ = runs.run(f"digits, {name}", seed, args.epochs, make)
                with repeatable(0, args.device):
                    results[name].append({**result, **between(model, data[0], data[2])})

    far = {name: (values - by_alpha["ERM"]).abs().mean().item() for name, values in by_alpha.items()}
    found = {"environment": environment(args.device), "epochs": args.epochs, "distance_from_ERM": far, "methods": results}
    tell(console, TITLE, summary(found))
    for name, p in surfaces.items():
        console.print(
            f"{name}: p is within 0.02 of 0 or 1 in {100 * ((p < 0.02) | (p > 0.98)).double().mean():.0f} % of the plane"
        )
    write(args.out / "results.json", found)
    picture_of_surfaces(surfaces, args.out / "surfaces.png", args.device)
    picture_of_between(results, args.out / "between.png")
    picture_of_alphas(by_alpha, args.out / "alphas.png", args.device)
    picture_of_a_pair(data[0], data[2], args.out / "pair.png")
    runs.finish("results.json", "surfaces.png", "between.png", "alphas.png", "pair.png")


if __name__ == "__main__":
    main()
