"""mixup on six UCI tables, Table 4 of the mixup paper: `python -m fastmix.recipes.tabular --data FOLDER`.

A network of two hidden layers of 128 ReLU units learns each table by Adam's defaults, in 10 epochs of batches of 16, with and
without mixup; the paper's own protocol as far as it is told. It does not tell how tables were split, whether columns were
scaled, nor alpha. Here a fifth of the rows is the test set, drawn anew for each seed (Arcene has a validation set of its own);
columns are taken as they are ("raw") and scaled to mean 0 and deviation 1 by the training rows ("scaled"); lambda ~ Beta(alpha,
alpha) for each row, with alpha 0.2 and 1. Files:

    results.json   every run's errors and curves, and digests of its weights: the same bits on every run of one machine
    errors.png     the errors beside the paper's

The folder holds abalone.data, HTRU_2.csv, arrhythmia.data, arcene_{train,valid}.{data,labels} and phishing.arff of the UCI
Machine Learning Repository (https://archive.ics.uci.edu, CC BY 4.0); tables that are not there are left out. Iris comes with
scikit-learn.

Source: mixup, arXiv:1710.09412.
"""

import math
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastmix
from fastmix.recipes._summaries import error_of_mean, mean, numbers, tell
from fastmix.recipes._training import COLORS, Fit, Mixed, Runs, environment, error_and_loss, one_thread, parsed, parser, write

METHODS = {
    "ERM": lambda seed: Mixed(),
    "mixup 0.2": lambda seed: Mixed(fastmix.Mixup(alpha=0.2, seed=seed)),
    "mixup 1": lambda seed: Mixed(fastmix.Mixup(alpha=1.0, seed=seed)),
}
FEATURES = "raw", "scaled"
PAPER = {  # test error in percent: ERM, mixup
    "Abalone": (74.0, 73.6),
    "Arcene": (57.6, 48.0),
    "Arrhythmia": (56.6, 46.3),
    "Htru2": (2.0, 2.0),
    "Iris": (21.3, 17.3),
    "Phishing": (16.3, 15.2),
}


# Tables: folder -> (numbers [N, D], classes [N]), or two of those for a table that has a test set of its own


def records(path):
    """[[value, ...]] of a comma-separated file, without what ARFF has in front and without a line of names."""
    lines = path.read_text(encoding="utf-8").split("\n")
    found = [line.strip().split(",") for line in lines if line.strip() and line.strip()[0] not in "@%"]
    return found if not found or _is_number(found[0][-1]) else found[1:]


def _is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def abalone(folder):
    rows = records(folder / "abalone.data")
    x = [[*(float(row[0] == sex) for sex in "FIM"), *map(float, row[1:-1])] for row in rows]
    return np.array(x), np.array([float(row[-1]) for row in rows])


def arcene(folder):
    return [
        (np.loadtxt(folder / f"arcene_{part}.data"), np.loadtxt(folder / f"arcene_{part}.labels"))
        for part in ("train", "valid")
    ]


def last_column(folder, name):
    rows = np.array([[float("nan" if value == "?" else value) for value in row] for row in records(folder / name)])
    return rows[:, :-1], rows[:, -1]


def iris(folder):
    from sklearn.datasets import load_iris

    return load_iris(return_X_y=True)


TABLES = {
    "Abalone": abalone,
    "Arcene": arcene,
    "Arrhythmia": partial(last_column, name="arrhythmia.data"),
    "Htru2": partial(last_column, name="HTRU_2.csv"),
    "Iris": iris,
    "Phishing": partial(last_column, name="phishing.arff"),
}


def load(folder, names=TABLES):
    """({name: table}, names of those whose files are not in the folder). ValueError for a file that is not what it should be."""
    found, missing = {}, []
    for name in names:
        try:
            table = TABLES[name](folder)
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
            continue
        except (ValueError, IndexError) as error:
            raise ValueError(f"{name}: {error}") from error
        for x, y in table if isinstance(table, list) else [table]:
            if x.ndim != 2 or len(x) != len(y) or len(x) < 5 or not np.isfinite(y).all():
                raise ValueError(
                    f"{name}: expected a class for each of at least 5 rows, got {x.shape} numbers and {y.shape} classes"
                )
        found[name] = table
    return found, missing


def split(table, seed, features, device):
    """(train x, train y, test x, test y, how many classes); what is not known is the training rows' mean."""
    if isinstance(table, list):
        (x, y), (test_x, test_y) = table
    else:
        x, y = table
        order = np.random.default_rng(seed).permutation(len(x))
        test, train = np.split(order, [len(x) // 5])
        x, y, test_x, test_y = x[train], y[train], x[test], y[test]
    classes = np.unique(np.concatenate((y, test_y)))
    mean, deviation = np.nanmean(x, 0), np.nanstd(x, 0)
    mean = np.where(np.isnan(mean), 0, mean)  # a column of which nothing is known
    deviation = np.where(deviation > 0, deviation, 1)
    x, test_x = (np.where(np.isnan(part), mean, part) for part in (x, test_x))
    if features == "scaled":
        x, test_x = ((part - mean) / deviation for part in (x, test_x))
    x, test_x = (torch.tensor(part, dtype=torch.float32, device=device) for part in (x, test_x))
    y, test_y = (torch.tensor(np.searchsorted(classes, part), device=device) for part in (y, test_y))
    return x, y, test_x, test_y, len(classes)


def fit(table, features, objective, seed, device):
    x, y, test_x, test_y, classes = split(table, seed, features, device)
    layers = nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes)
    model = nn.Sequential(*layers).to(device)
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    evaluate = lambda model: error_and_loss(model(test_x), test_y)  # noqa: E731
    return Fit(seed, model, objective(seed), x, y, batch=16, optimizer=optimizer, evaluate=evaluate)


# What is said


TITLE = "UCI tables (arXiv:1710.09412, Table 4)"


def summary(found):
    asked = [(how, name) for how in FEATURES for name in METHODS]
    rows = []
    for data, of in found["tables"].items():
        errors = (mean(numbers(of[how][name], "test_error_percent")) for how, name in asked)
        rows.append([data, *map(str, PAPER[data]), *errors])
    remarks = """The paper tells
neither its splits nor scaling nor alpha, and most of its errors are far above any found here, so its protocol differs where it is
silent; only differences between methods can be compared."""
    return ("table", ">paper: ERM", ">paper: mixup", *(f">{name}, {how}" for how, name in asked)), rows, remarks


def picture(results, path):
    """For each table the paper's errors, and those of every method, raw and scaled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for cell, (table, by_features) in zip(axes, results.items(), strict=True):
        for k, (error, color) in enumerate(zip(PAPER[table], (COLORS[0], COLORS[3]), strict=True)):
            style = {"color": "white", "edgecolor": color, "hatch": "////", "label": f"paper: {('ERM', 'mixup')[k]}"}
            cell.bar(0.27 * (k - 0.5), error, 0.23, **style)
        for k, method in enumerate(METHODS):
            runs = [[run["test_error_percent"] for run in by_features[features][method]] for features in FEATURES]
            places = [1 + place + 0.27 * (k - 1) for place in range(len(FEATURES))]
            style = {"color": COLORS[k], "label": method, "error_kw": {"lw": 1}}
            cell.bar(places, [*map(statistics.mean, runs)], 0.25, yerr=[*map(error_of_mean, runs)], **style)
        cell.set_title(table, fontsize=11)
        cell.set_xticks(range(1 + len(FEATURES)), ["paper", *FEATURES], rotation=45)
        cell.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test error (%)")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2 + len(METHODS), frameon=False)
    figure.savefig(path, dpi=120)


@one_thread()
def main(argv=None):
    data = Path("uci"), "folder with the UCI files"
    options = parser("tabular", __doc__.splitlines()[0], out="fastmix-tabular", seeds=5, epochs=10, data=data)
    options.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="only these (default: all)")
    args = parsed(options, argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    try:
        tables, missing = load(args.data, dict.fromkeys(args.tables))
    except ValueError as error:
        options.error(f"--data: {error}")
    if missing:
        console.print(f"Not in {args.data}, and left out: {', '.join(missing)}. (--data FOLDER)\n")
    if not tables:
        options.error(f"--data: expected a folder with the UCI files, got {args.data}")
    results = {name: {features: {method: [] for method in METHODS} for features in FEATURES} for name in tables}
    total = len(tables) * len(FEATURES) * len(METHODS) * args.seeds * args.epochs
    settings = {
        "recipe": "tabular",
        "seeds": args.seeds,
        "epochs": args.epochs,
        "tables": list(tables),
        "device": str(args.device),
    }
    with Runs(args.out, settings, total, console, tables) as runs:
        for seed in runs.seeds(0, args.seeds, tables):
            for name, table in tables.items():
                for features in FEATURES:
                    for method, objective in METHODS.items():
                        make = partial(fit, table, features, objective, seed, args.device)
                        _, result, _ = runs.run(f"{name}, {features}, {method}", seed, args.epochs, make)
                        results[name][features][method].append(result)
    found = {"environment": environment(args.device), "epochs": args.epochs, "tables": results}
    tell(console, TITLE, summary(found))
    write(args.out / "results.json", found)
    picture(results, args.out / "errors.png")
    runs.finish("results.json", "errors.png")


if __name__ == "__main__":
    main()
