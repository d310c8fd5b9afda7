"""Which part of mixup does what, on digits: Table 5 of the mixup paper, `python -m fastmix.recipes.ablation`.

Each way to mix, with two weight decays, on the digits and by the protocol of `fastmix.recipes.digits`. As in the paper: inputs
against hidden layers, partners of any class against ones of the same, targets mixed in proportion against the larger share's
label alone, and label smoothing, which mixes labels only. Files:

    results.json   every run's errors and curves, and digests of its weights: the same bits on every run of one machine
    ablation.png   the errors

Sources: mixup, arXiv:1710.09412 (Table 5); manifold mixup, arXiv:1806.05236.
"""

import statistics
from functools import partial

import fastmix
from fastmix.recipes import digits
from fastmix.recipes._summaries import error_of_mean, mean, numbers, tell
from fastmix.recipes._training import COLORS, Mixed, MixedInside, environment, one_thread, parsed, parser, train_all, write

DECAYS = 1e-4, 5e-4


def mixup(seed, **options):
    return fastmix.Mixup(alpha=1.0, seed=seed, **options)


def inside(layer):
    """Mixing at the input of one module."""
    return lambda model, seed: MixedInside(fastmix.ManifoldMixup((model[layer],), 1.0, seed=seed))


METHODS = {  # what is mixed, with whom, label: (model, seed) -> objective
    "nothing (ERM)": lambda model, seed: Mixed(),
    "inputs, any class, in proportion (mixup)": lambda model, seed: Mixed(mixup(seed)),
    "inputs, same class": lambda model, seed: Mixed(mixup(seed, partner="same")),
    "inputs, different class": lambda model, seed: Mixed(mixup(seed, partner="different")),
    "inputs, label of the larger share": lambda model, seed: Mixed(mixup(seed, label="larger")),
    "inputs, own label": lambda model, seed: Mixed(mixup(seed, label="own")),
    "hidden layer 1": inside(3),
    "hidden layer 2": inside(6),
    "features": inside(9),
    "labels only: smoothing 0.05": lambda model, seed: Mixed(smoothing=0.05),
    "labels only: smoothing 0.2": lambda model, seed: Mixed(smoothing=0.2),
    "inputs in proportion, smoothing 0.1": lambda model, seed: Mixed(mixup(seed), smoothing=0.1),
}


TITLE = "Which part of mixup helps (arXiv:1710.09412, Table 5)"


def summary(found):
    runs = {name: [found["methods"][f"{name}, weight decay {decay:g}"] for decay in DECAYS] for name in METHODS}
    rows = [[name, *(mean(numbers(of, "test_error_percent")) for of in by_decay)] for name, by_decay in runs.items()]
    remarks = """The paper says of its own
(CIFAR-10): mixup is the best way; with it the small weight decay is the better one, without it the large one; the higher a mixed layer,
the less it regularises; of ways to mix inputs, any class regularises most; label smoothing regularises little."""
    return ("digits, test error in %", *(f">weight decay {decay:g}" for decay in DECAYS)), rows, remarks


def picture(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for k, decay in enumerate(DECAYS):
        runs = [[run["test_error_percent"] for run in results[f"{name}, weight decay {decay:g}"]] for name in METHODS]
        errors = [error_of_mean(run) for run in runs]
        places = [place + 0.2 * (k - 0.5) for place in range(len(runs))]
        style = {"fmt": "o", "color": COLORS[k + 1], "capsize": 3, "label": f"weight decay {decay:g}"}
        axes.errorbar([statistics.mean(run) for run in runs], places, xerr=errors, **style)
    axes.set_yticks(range(len(METHODS)), METHODS)
    axes.invert_yaxis()
    axes.set_xlabel(f"test error (%), {digits.TRAIN_IMAGES} training digits: mean and standard error")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


@one_thread()
def main(argv=None):
    args = parsed(parser("ablation", __doc__.splitlines()[0], out="fastmix-ablation", seeds=5, epochs=100), argv)
    from rich.console import Console

    console, data = Console(highlight=False, markup=False), digits.load(args.device)
    console.print(f"{len(METHODS)} ways to mix, {len(DECAYS)} weight decays, {args.seeds} seeds, {args.epochs} epochs.\n")
    methods = {
        f"{name}, weight decay {decay:g}": partial(digits.fit, objective, data=data, weight_decay=decay)
        for decay in DECAYS
        for name, objective in METHODS.items()
    }
    results, _, _, runs = train_all(args, "ablation", methods, console, data)
    found = {"environment": environment(args.device), "epochs": args.epochs, "methods": results}
    tell(console, TITLE, summary(found))
    write(args.out / "results.json", found)
    picture(results, args.out / "ablation.png")
    runs.finish("results.json", "ablation.png")


if __name__ == "__main__":
    main()
