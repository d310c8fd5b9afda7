"""What the studies share: arms of their own length, numbers of trained models, summaries and curves."""

import os
import platform
from functools import partial

import torch
from torch import nn

from fastmix.recipes._summaries import numbers, tell
from fastmix.recipes._training import COLORS, Runs, commit, digest, environment, processor, repeatable, write

STEM = "by epoch"


def train_arms(args, recipe, arms, console, data, after=None, **more):
    """({arm: results}, {arm: last model}, the `Runs` to finish) of arms {name: (epochs, make)}, where make(seed) gives a `Fit`.

    Arms take turns seed by seed (from args.first_seed on, where a recipe has it), in their order. `after(models, name, seed)` gives more numbers of the model that has just been trained, beside
    those of the same seed before it. `more`: what else the runs depend on.
    """
    results, models, first = {name: [] for name in arms}, {}, getattr(args, "first_seed", 0)
    settings = {
        "recipe": recipe,
        "seeds": args.seeds,
        "epochs": args.epochs,
        "arms": list(arms),
        "device": str(args.device),
        **more,
    }
    with Runs(args.out, settings, args.seeds * sum(epochs for epochs, _ in arms.values()), console, data) as runs:
        for seed in runs.seeds(first, args.seeds, arms):
            for name, (epochs, make) in arms.items():
                models[name], result, _ = runs.run(name, seed, epochs, partial(make, seed))
                with repeatable(seed, args.device):
                    results[name].append({**result, **(after(models, name, seed) if after else {})})
    return results, models, runs


def made_by(device):
    """The environment, the processor, and the commit of the checkout ("-dirty" behind it with changes on top; None without one)."""
    head, changed = commit()
    about = {"cpu": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {**environment(device), **about, "commit": head and head + "-dirty" * changed}


def keep(args, results, data, recipe, console, **more):
    """Writes results.json, what made it and the data by their hash, and prints the recipe's summary of it."""
    about = {"environment": made_by(args.device), "seeds": args.seeds, "epochs": args.epochs, "data": digest(data)[:16]}
    found = {**about, **more, "methods": results}
    title, summary = recipe
    tell(console, title, summary(found))
    write(args.out / "results.json", found)


def add_best(results):
    """Adds the least test error of each run's epochs to its numbers."""
    for runs in results.values():
        for run in runs:
            run["best_error_percent"] = min(run[f"test_error_percent {STEM}"])


def step_decay(optimizer, steps, at, gamma=0.1):
    """The rate divided by ten at these shares of all steps."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(share * steps) for share in at], gamma)


class Augmented(nn.Module):
    """An objective on images that are moved by up to `padding` pixels, and mirrored by half."""

    def __init__(self, objective, padding=4, mirror=True):
        super().__init__()
        self.objective, self.padding, self.mirror = objective, padding, mirror

    def forward(self, model, x, y):
        N, _, H, W = x.shape
        top, left = torch.randint(2 * self.padding + 1, (2, N, 1), device=x.device)
        rows, columns = top + torch.arange(H, device=x.device), left + torch.arange(W, device=x.device)
        if self.mirror:
            columns = torch.where(torch.rand(N, 1, device=x.device) < 0.5, columns.flip(1), columns)
        wide = nn.functional.pad(x, [self.padding] * 4)
        moved = wide[torch.arange(N, device=x.device).view(N, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)]
        return self.objective(model, moved.permute(0, 3, 1, 2).contiguous(), y)


# Pictures


def figure_of(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_curves(axes, results, key, **style):
    """Curves over epochs, mean over seeds in a band from the least to the greatest, one colour for each method."""
    for k, (name, runs) in enumerate(results.items()):
        curves = torch.tensor(numbers(runs, f"{key} {STEM}"), dtype=torch.float64).numpy()
        epochs = range(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(0), color=COLORS[k % len(COLORS)], lw=1.8, label=name, **style)
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=COLORS[k % len(COLORS)], alpha=0.12, lw=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
