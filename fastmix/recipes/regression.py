"""mixup for numbers: C-Mixup, mixup and empirical risk on two tables, `python -m fastmix.recipes.regression`.

A network of two hidden layers of 128 ReLU units learns a number by the squared error with Adam. mixup mixes rows and labels with lambda ~
Beta(2, 2); C-Mixup draws partners whose labels are near, here in the batch, with a bandwidth of 0.1 or 0.5 standard deviations of the
labels. A fifth of the rows, drawn anew for each seed, is the test set; columns and labels are scaled by the training rows. Files:

    results.json     RMSE and MAPE of every run after the last epoch, and their curves
    regression.png   RMSE over epochs

Tables: scikit-learn's diabetes, and the rings of UCI's abalone (https://archive.ics.uci.edu, CC BY 4.0) where `--data` is a folder with
abalone.data.

Source: C-Mixup, arXiv:2210.05775 (RMSE on Airfoil: ERM 2.901, mixup 3.730, C-Mixup 2.717).
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastmix
from fastmix.recipes import tabular
from fastmix.recipes._studies import figure_of, keep, plot_curves, train_arms
from fastmix.recipes._summaries import gaps, mean, means, numbers
from fastmix.recipes._training import Fit, one_thread, parsed, parser

METHODS = {  # options of Mixup, None: as the rows are
    "ERM": None,
    "mixup": {},
    "C-Mixup 0.1": {"partner": "near", "bandwidth": 0.1},
    "C-Mixup 0.5": {"partner": "near", "bandwidth": 0.5},
}


class Squared(nn.Module):
    """The squared error on mixed rows and numbers."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, model, x, y):
        if self.mixer is not None:
            x, target = self.mixer(x, y)
            y = target.dense()
        return nn.functional.mse_loss(model(x).squeeze(1), y)


def diabetes(folder):
    from sklearn.datasets import load_diabetes

    return load_diabetes(return_X_y=True)


def split(table, seed, device):
    """(x, y, test x, test y in the label's units, mean and deviation of the labels), scaled by the training rows."""
    x, y = table
    order = np.random.default_rng(seed).permutation(len(x))
    test, train = np.split(order, [len(x) // 5])
    middle, deviation = x[train].mean(0), x[train].std(0)
    x = (x - middle) / np.where(deviation > 0, deviation, 1)
    at, scale = y[train].mean(), y[train].std()
    parts = x[train], (y[train] - at) / scale, x[test], y[test]
    return *(torch.tensor(part, dtype=torch.float32, device=device) for part in parts), float(at), float(scale)


def fit(table, options, device, seed):
    x, y, test_x, test_y, at, scale = split(table, seed, device)
    model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)

    def evaluate(model):
        gap = model(test_x).squeeze(1) * scale + at - test_y
        return {"rmse": gap.square().mean().sqrt().item(), "mape_percent": 100 * (gap / test_y).abs().mean().item()}

    objective = Squared(None if options is None else fastmix.Mixup(2.0, seed=seed, **options))
    return Fit(seed, model, objective, x, y, batch=32, optimizer=optimizer, evaluate=evaluate)


TITLE = "Numbers: C-Mixup (arXiv:2210.05775)"


def summary(found):
    rows = []
    for data in dict.fromkeys(name.split(", ")[0] for name in found["methods"]):
        base = found["methods"][f"{data}, ERM"]
        for arm, runs in found["methods"].items():
            if arm.startswith(data):
                gain = "" if runs is base else mean(gaps(base, runs, "rmse"), 2)
                rows.append([data, arm.split(", ")[1], mean(numbers(runs, "rmse"), 2), gain, *means(runs, "mape_percent")])
    remarks = """After the
last of 60 epochs. The paper (RMSE, Airfoil): ERM 2.901, mixup 3.730, C-Mixup 2.717; bandwidths here are in standard deviations of the labels."""
    return ("table", "method", ">RMSE", ">gain over ERM", ">MAPE, %"), rows, remarks


def picture(results, tables, path):
    figure = figure_of(5.5 * len(tables), 4.2)
    for axes, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        plot_curves(axes, {name: results[f"{table}, {name}"] for name in METHODS}, "rmse")
        axes.set(title=table, xlabel="epoch", ylabel="test RMSE", xlim=(1, None))
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


@one_thread()
def main(argv=None):
    folder = Path("uci"), "folder with UCI's abalone.data; without it diabetes alone"
    options = parser("regression", __doc__.splitlines()[0], out="fastmix-regression", seeds=3, epochs=60, data=folder)
    args = parsed(options, argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    tables = {"diabetes": diabetes(None)}
    if (args.data / "abalone.data").exists():
        try:
            tables["abalone"] = tabular.abalone(args.data)
        except (ValueError, IndexError) as error:
            options.error(
                f"--data: {args.data / 'abalone.data'}: expected UCI's table from https://archive.ics.uci.edu: {error}"
            )
    else:
        console.print(f"No abalone.data in {args.data}: left out. (--data FOLDER)\n")
    arms = {}
    for table, content in tables.items():
        for name, chosen in METHODS.items():
            arms[f"{table}, {name}"] = args.epochs, partial(fit, content, chosen, args.device)
    results, _, runs = train_arms(args, "regression", arms, console, tables)
    keep(args, results, tables, (TITLE, summary), console)
    picture(results, tables, args.out / "regression.png")
    runs.finish("results.json", "regression.png")


if __name__ == "__main__":
    main()
