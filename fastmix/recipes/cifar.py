"""CIFAR: Figure 3 of the mixup paper with any sampler, `python -m fastmix.recipes.cifar --data FOLDER`.

The folder holds the binary version of CIFAR-10 or CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html): data_batch_1.bin ... (any of the
five) and test_batch.bin, or train.bin and test.bin. Images are moved by up to four pixels and mirrored; SGD with momentum 0.9, batch 128.
By the paper's schedule (200 epochs, rate 0.1, a tenth of it after a half and three quarters) a PreAct ResNet-18 takes GPU hours
(`--model preact18`, or timm's and torchvision's by `--model NAME`). `--model small` is a ResNet-8 of 16, 32 and 64 channels. Weight decay is
searched alike for each method, on a tenth of the training set that is held out, with `--decays` (and in fewer epochs, with `--search-epochs`).
Files:

    results.json   every run's errors and curves, passes over the network (PuzzleMix and AMP take more than one), and the data's hash
    cifar.png      test error over epochs, and over passes

Source: mixup, arXiv:1710.09412, section 3.2 and Figure 3.
"""

import contextlib
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fastmix
from fastmix.recipes._studies import Augmented, figure_of, keep, plot_curves, step_decay, train_arms
from fastmix.recipes._summaries import gaps, mean, numbers
from fastmix.recipes._training import COLORS, Adversarial, Fit, Mixed, MixedInside, error_and_loss, one_thread, parsed, parser

PIXELS = 3 * 32 * 32
WHERE = "the binary version from https://www.cs.toronto.edu/~kriz/cifar.html"
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PAPER = {"PreAct ResNet-18": (5.6, 4.2), "WRN-28-10": (3.8, 2.7), "DenseNet-BC-190": (3.7, 2.7)}  # CIFAR-10, ERM and mixup
DECAYS = 1e-4, 5e-4


# Data


def records(path, labels):
    """(labels [N], images [N, 3, 32, 32] uint8) of one binary file with so many bytes of label; the last of them is the class."""
    size, row = path.stat().st_size, labels + PIXELS
    if size == 0 or size % row:
        raise ValueError(f"{path}: expected records of {row} bytes, got {size} bytes: truncated, or not {WHERE}")
    rows = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(-1, row)
    return rows[:, labels - 1].long(), rows[:, labels:].view(-1, 3, 32, 32)


def load(folder, device):
    """(train images in [0, 1], train labels, test images, test labels). ValueError with a line that says what is wrong."""
    tens = sorted(folder.glob("data_batch_?.bin")), [folder / "test_batch.bin"], 1, 10
    hundreds = [folder / "train.bin"], [folder / "test.bin"], 2, 100
    there = [kind for kind in (tens, hundreds) if kind[0] and all(path.is_file() for path in (*kind[0], *kind[1]))]
    if not there:
        raise ValueError(f"{folder}: expected data_batch_1.bin and test_batch.bin, or train.bin and test.bin: {WHERE}")
    train, test, labels, classes = there[0]
    parts = []
    for paths in (train, test):
        found = [records(path, labels) for path in paths]
        y, x = (torch.cat(part) for part in zip(*found, strict=True))
        if int(y.max()) >= classes:
            raise ValueError(f"{paths[0]}: expected classes below {classes}, got {int(y.max())}: not {WHERE}")
        parts += [x.to(device).float() / 255, y.to(device)]
    if absent := sorted(set(range(classes)) - set(parts[1].tolist())):
        raise ValueError(
            f"{folder}: expected images of each of {classes} classes to learn from, got none of {absent[:5]}: take {WHERE}"
        )
    return tuple(parts)


def loaded_or_error(options, args):
    """The data of --data; one line and exit status 2 where they are none."""
    try:
        return load(args.data, args.device)
    except (ValueError, OSError) as error:
        options.error(f"--data: {error}")


# Models


class Normalized(nn.Module):
    """Takes images in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)

    def forward(self, x):
        return (x - self.mean) / self.deviation


class PreActBlock(nn.Module):
    """Two convolutions, each behind batch norm and ReLU, around a short cut (He et al., arXiv:1603.05027)."""

    def __init__(self, inputs, outputs, stride, dropout):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x):
        h = F.relu(self.first(x))
        short = x if self.short is None else self.short(h)
        return short + self.two(self.dropout(F.relu(self.second(self.one(h)))))


def preact(classes, dropout=0.0, *, widths=(64, 128, 256, 512), blocks=2):
    """A PreAct ResNet; its stages are modules 2, 3, ... of the sequence."""
    layers, inputs = [Normalized(), nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)], widths[0]
    for stage, width in enumerate(widths):
        strides = [2 if stage else 1] + [1] * (blocks - 1)
        made = [PreActBlock(inputs if k == 0 else width, width, stride, dropout) for k, stride in enumerate(strides)]
        layers, inputs = [*layers, nn.Sequential(*made)], width
    return nn.Sequential(
        *layers, nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
    )


MODELS = {"small": partial(preact, widths=(16, 32, 64), blocks=1), "preact18": preact}


def model_of(name, classes):
    """One of ours, or timm's or torchvision's of that name."""
    if name in MODELS:
        return MODELS[name](classes)
    for package in ("timm", "torchvision.models"):
        try:
            library = __import__(package, fromlist=["models"])
            make = library.create_model if package == "timm" else library.get_model
            return nn.Sequential(Normalized(), make(name, num_classes=classes))
        except (ImportError, RuntimeError, ValueError):
            continue
    raise ValueError(f"--model: expected one of {', '.join(MODELS)} or a name of timm's or torchvision's models, got {name!r}")


# Methods


class Puzzled(nn.Module):
    """PuzzleMix: the loss on the mixed batch, by the saliency of the clean one."""

    def __init__(self, seed):
        super().__init__()
        self.puzzle = fastmix.PuzzleMix(mean=(0.0,) * 3, std=(1.0,) * 3, seed=seed)

    def forward(self, model, x, y):
        saliency = fastmix.saliency(fastmix.input_gradient(model, x, y))
        mixed, target = self.puzzle(x, y, saliency)
        return fastmix.soft_cross_entropy(model(mixed), target)


class Bfloat16(nn.Module):
    """An objective under autocast."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, model, x, y):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.objective(model, x, y)


def plain(sampler):
    return lambda model, seed: Mixed(sampler(seed))


def manifold(model, seed):
    return MixedInside(fastmix.ManifoldMixup((None, model[3], model[4]), 2.0, seed=seed))


METHODS = {  # name: ((model, seed) -> objective, forward and backward passes a step)
    "ERM": (lambda model, seed: Mixed(), 1),
    "mixup": (plain(lambda seed: fastmix.Mixup(1.0, seed=seed)), 1),
    "CutMix": (plain(lambda seed: fastmix.CutMix(1.0, prob=0.5, seed=seed)), 1),
    "manifold mixup": (manifold, 1),
    "PuzzleMix": (lambda model, seed: Puzzled(seed), 2),
    "AMP": (lambda model, seed: Adversarial(fastmix.ManifoldMixup((None,), 1.0, seed=seed), step_size=0.01), 2.33),
    "FMix": (plain(lambda seed: fastmix.FMix(1.0, seed=seed)), 1),
    "ResizeMix": (plain(lambda seed: fastmix.ResizeMix(seed=seed)), 1),
}
SHOWN = "ERM", "mixup", "CutMix", "manifold mixup", "PuzzleMix", "AMP"


def fit(data, name, decay, epochs, model_name, bfloat16, seed):
    x, y, test_x, test_y = data
    model = model_of(model_name, int(y.max()) + 1).to(x.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=decay)
    schedule = step_decay(optimizer, epochs * -(-len(x) // 128), (0.5, 0.75))

    def evaluate(model):
        return error_and_loss(torch.cat([model(part) for part in test_x.split(500)]), test_y)

    objective = Augmented(METHODS[name][0](model, seed))
    objective = Bfloat16(objective) if bfloat16 else objective
    return Fit(seed, model, objective, x, y, batch=128, optimizer=optimizer, schedule=schedule, evaluate=evaluate)


def held_out(data):
    """The training set alone: a tenth of it, drawn once, to test on."""
    x, y, *_ = data
    rest = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    tenth, rest = rest[: len(x) // 10], rest[len(x) // 10 :]
    return x[rest], y[rest], x[tenth], y[tenth]


TITLE = "CIFAR-10, a part of it (arXiv:1710.09412, Figure 3)"


def summary(found):
    base, rows = next(iter(found["methods"].values())), []
    for name, runs in found["methods"].items():
        gain = "" if runs is base else mean(gaps(base, runs))
        passes = found["passes"][name]
        alike = [curve[max(1, int(len(curve) / passes)) - 1] for curve in numbers(runs, "test_error_percent by epoch")]
        errors = mean(numbers(runs, "test_error_percent")), gain, mean(alike)
        rows.append([name, f"{found['decays'][name]:g}", f"{found['epochs'] * passes:g}", *errors])
    searched = "not searched for: the same for all"
    if found["held_out"]:
        searched = f"searched on held-out rows, {found['search_epochs']} epochs of one seed each"
    paper = "; ".join(f"{name} {erm:g} and {mixup:g}" for name, (erm, mixup) in PAPER.items())
    remarks = f"""5,000
training and 2,000 test images, {found["model"]} network{" in bfloat16" * found["bfloat16"]}, {found["epochs"]} epochs{" (too few for any of them to end its learning)" * (found["epochs"] < 30)}; weight decay {searched}. Passes: forward and backward, in epochs; "equal passes": the error when as many
passes were done as ERM's epochs hold, in a longer schedule's middle. Paper (50,000 images, 200 epochs), ERM and mixup: {paper}."""
    columns = "CIFAR-10", ">weight decay", ">passes", ">test error, %", ">gain over ERM", ">at equal passes, %"
    return columns, rows, remarks


def picture(results, path):
    figure = figure_of(11, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    plot_curves(left, results, "test_error_percent")
    for k, (name, runs) in enumerate(results.items()):
        curve = torch.tensor(numbers(runs, "test_error_percent by epoch"), dtype=torch.float64).mean(0).numpy()
        passes = [METHODS[name][1] * (epoch + 1) for epoch in range(len(curve))]
        right.plot(passes, curve, color=COLORS[k % len(COLORS)], lw=1.8)
    left.set(xlabel="epoch", ylabel="test error (%)", xlim=(1, None))
    right.set(xlabel="passes over the training set", xlim=(1, None))
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=110)


@one_thread()
def main(argv=None):
    folder = Path("cifar"), "folder with CIFAR's binary files"
    options = parser("cifar", __doc__.splitlines()[0], out="fastmix-cifar", seeds=3, epochs=200, data=folder, small=1)
    options.add_argument(
        "--model", default="preact18", help="small, preact18, or a name of timm or torchvision (default: %(default)s)"
    )
    options.add_argument("--method", nargs="+", choices=METHODS, default=list(SHOWN), help="only these (default: six)")
    options.add_argument(
        "--decays", nargs="+", type=float, default=list(DECAYS), help="weight decays to choose from (default: 1e-4 5e-4)"
    )
    options.add_argument("--search-epochs", type=int, help="epochs of a run that searches (default: --epochs)")
    options.add_argument("--bfloat16", action="store_true", help="train under autocast")
    args = parsed(options, argv)
    length = args.epochs if args.search_epochs is None else args.search_epochs
    if length < 1:
        options.error("--search-epochs: expected at least 1")
    from rich.console import Console

    console, data = Console(highlight=False, markup=False), loaded_or_error(options, args)
    try:
        model_of(args.model, 10)
    except ValueError as error:
        options.error(str(error))
    if args.small:
        args.method, args.decays = args.method[:3], args.decays[:1]
    methods, decays = list(dict.fromkeys(args.method)), list(dict.fromkeys(args.decays))
    console.print(
        f"{len(data[0])} images to learn from, {len(data[2])} to test on; {args.model}, {args.seeds} seeds, {args.epochs} epochs.\n"
    )
    arms = {}
    searched = {f"held out, {name}, decay {d:g}": (name, d) for name in methods for d in decays} if len(decays) > 1 else {}
    for arm, (name, decay) in searched.items():
        arms[arm] = length, partial(fit, held_out(data), name, decay, length, args.model, args.bfloat16)
    about = {"model": args.model, "bfloat16": args.bfloat16, "search_epochs": length}
    more = {**about, "methods": methods, "decays": decays}
    once = type(args)(**{**vars(args), "seeds": 1, "epochs": length, "out": args.out / "search"})
    once.out.mkdir(exist_ok=True)
    found, searches = {}, None
    if arms:
        found, _, searches = train_arms(once, "cifar search", arms, console, data, **more)
    chosen = {}
    for name in methods:
        errors = (
            {d: found[f"held out, {name}, decay {d:g}"][0]["test_error_percent"] for d in decays}
            if searched
            else {decays[0]: 0.0}
        )
        chosen[name] = min(errors, key=errors.get)
    arms = {
        name: (args.epochs, partial(fit, data, name, chosen[name], args.epochs, args.model, args.bfloat16)) for name in methods
    }
    with contextlib.closing(searches._alone) if searches else contextlib.nullcontext():
        results, _, runs = train_arms(args, "cifar", arms, console, data, **more)
    passes = {name: METHODS[name][1] for name in methods}
    search = {arm: {key: run[0][key] for key in ("test_error_percent", "test_loss")} for arm, run in found.items()}
    keep(args, results, data, (TITLE, summary), console, **about, decays=chosen, passes=passes, held_out=search)
    picture(results, args.out / "cifar.png")
    if searches:
        searches.finish()
    once.out.rmdir()
    runs.finish("results.json", "cifar.png")


if __name__ == "__main__":
    main()
