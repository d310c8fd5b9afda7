"""mixup, CutMix, manifold mixup and AMP against plain training on scikit-learn's digits: `python -m fastmix.recipes.digits`.

A small CNN learns 8x8 digits from ten examples of each, by every method in METHODS over several seeds, and is tested on all the
others. One protocol for all: per seed the same initial weights and the same batches in the same order; one optimiser and
schedule; the error that counts is the last epoch's. The mixing options are those of the papers' CIFAR experiments; network,
number of images and epochs were chosen on another split than this one. Manifold mixup draws the input or one of two hidden
layers for each batch; AMP moves lambda where the loss is larger, at the input, or where manifold mixup mixes. Then the fused
ops are compared on a batch of digits with the oracle, `fastmix.reference`, and with plain torch, and timed. Files:

    results.json   errors, curves, digests of the final weights, agreement: the same bits on every run of one machine, also of
                   one that was killed and started again
    timings.json   whatever a clock measured
    mixed.png      digits, their partners, and both mixed, with labels and weights
    error.png      test error against epoch

Sources: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899; manifold mixup, arXiv:1806.05236; AMP, arXiv:2109.07177.
"""

import statistics
import time
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import fastmix
from fastmix.recipes._summaries import gaps, mean, means, numbers, show, tell
from fastmix.recipes._training import (
    COLORS,
    NEEDS,
    Adversarial,
    Fit,
    Mixed,
    MixedInside,
    clock,
    environment,
    error_and_loss,
    one_thread,
    parsed,
    parser,
    repeatable,
    train_all,
    write,
)

CLASSES, TRAIN_IMAGES, BATCH = 10, 100, 50
STEP = 0.01  # of the adversary, from lambda, by a row's own gradient


def manifold(model, seed):
    """Mixes the images, or what goes into the second or the third convolution."""
    return fastmix.ManifoldMixup((None, model[3], model[6]), 2.0, seed=seed)


METHODS = {  # name: (model, seed) -> objective
    "ERM": lambda model, seed: Mixed(),
    "mixup": lambda model, seed: Mixed(fastmix.Mixup(alpha=1.0, seed=seed)),
    "CutMix": lambda model, seed: Mixed(fastmix.CutMix(alpha=1.0, prob=0.5, seed=seed)),
    "manifold mixup": lambda model, seed: MixedInside(manifold(model, seed)),
    "AMP": lambda model, seed: Adversarial(fastmix.ManifoldMixup((None,), 1.0, seed=seed), step_size=STEP),
    "AMP, hidden": lambda model, seed: Adversarial(manifold(model, seed), step_size=STEP),
}


# Training


def load(device):
    """(train images [N, 1, 8, 8] in [0, 1], test images, train labels [N], test labels): the same split every time."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x.reshape(-1, 1, 8, 8) / 16, y, train_size=TRAIN_IMAGES, stratify=y, random_state=0)
    return [torch.tensor(part, dtype=(torch.int64, torch.float32)[part.ndim > 1], device=device) for part in parts]


def network():
    def block(inputs, outputs, stride=1):
        return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(*block(1, 16), *block(16, 32, 2), *block(32, 64), nn.Flatten(), nn.Linear(64 * 16, CLASSES))


def fit(objective, seed, epochs, data, weight_decay=5e-4):
    """A run of `objective`: (model, seed) -> the loss of a batch."""
    x, test_x, y, test_y = data
    model = network().to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // BATCH))

    def evaluate(model):
        return error_and_loss(torch.cat([model(part) for part in test_x.split(200)]), test_y)

    options = {"batch": BATCH, "optimizer": optimizer, "schedule": schedule, "evaluate": evaluate}
    return Fit(seed, model, objective(model, seed), x, y, **options)


# Agreement and speed


def unfused_mix(x, lam, index, box):
    """As usually written: `lam*x + (1-lam)*x[index]`, each operation a pass over memory; boxes by a mask."""
    lam, partner = lam.view(-1, 1, 1, 1), x[index]
    mixed = lam * x + (1 - lam) * partner
    if box is None:
        return mixed
    y0, x0, y1, x1 = box.view(-1, 4, 1, 1, 1).unbind(1)
    row, column = torch.arange(x.shape[2], device=x.device)[:, None], torch.arange(x.shape[3], device=x.device)
    return torch.where((row >= y0) & (row < y1) & (column >= x0) & (column < x1), partner, mixed)


def unfused_loss(logits, weights, classes):
    """As usually written: dense soft targets made of one-hot rows, then torch's cross-entropy on probabilities."""
    dense = (weights.unsqueeze(2) * F.one_hot(classes, logits.shape[1])).sum(1)
    return F.cross_entropy(logits, dense, reduction="sum") / weights.sum()


MIX = (lambda x, lam, index, box: fastmix.mix(x, lam, index, box=box)), unfused_mix
LOSS = (lambda z, weights, classes: fastmix.soft_cross_entropy(z, fastmix.SoftTarget(classes, weights))), unfused_loss


def oracle_mix(upstream, *arguments):
    return fastmix.reference.mix(*arguments), *fastmix.reference.mix_grad(upstream, *arguments)


def oracle_loss(upstream, logits, weights, classes):
    arguments, oracle = (logits, (classes, weights)), fastmix.reference
    return oracle.soft_cross_entropy(*arguments), *oracle.soft_cross_entropy_grad(*arguments, upstream)


def differentiate(op, upstream, inputs, constants):
    """(value, gradient to each input) of op(*inputs, *constants)."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = op(*inputs, *constants)
    return value.detach(), *torch.autograd.grad(value, inputs, upstream)


def agreement(model, x, y):
    """{what: largest magnitude, and largest errors against the float64 oracle} of values and gradients on one batch."""
    drawn, cut = fastmix.Mixup(alpha=1.0, seed=0).sample(x), fastmix.CutMix(alpha=1.0, seed=1).sample(x)
    lam, index, target = drawn.lam, drawn.index, drawn.target(y)
    with torch.no_grad():
        logits = model.eval()(drawn.apply(x))
    g, scale = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x), torch.tensor(0.7).to(x)
    cases = (
        ("mixup", ("x", "lam"), *MIX, oracle_mix, g, (x, lam), (index, None)),
        ("CutMix", ("x", "lam"), *MIX, oracle_mix, g, (x, lam), (index, cut.box)),
        ("loss", ("logits", "weights"), *LOSS, oracle_loss, scale, (logits, target.weights), (target.classes,)),
    )
    found = {}
    for name, inputs, ours, theirs, oracle, *arguments in cases:
        host = [t if t is None else t.cpu() for t in (arguments[0], *arguments[1], *arguments[2])]
        everything = differentiate(ours, *arguments), differentiate(theirs, *arguments), oracle(*host)
        for what, *values in zip(("value", *(f"gradient to {i}" for i in inputs)), *everything, strict=True):
            a, b, exact = (torch.as_tensor(value).to("cpu", torch.float64) for value in values)
            sizes = {"max_abs_value": exact, "fastmix_error": a - exact, "torch_error": b - exact, "gap": a - b}
            found[f"{name}: {what}"] = {key: t.abs().max().item() for key, t in sizes.items()}
    return found


def race(ours, theirs, device):
    """Median seconds of two calls that take turns for half a second, the first three of each not counted."""
    took, end = ([], []), time.perf_counter() + 0.5
    while len(took[0]) < 8 or (len(took[0]) < 300 and time.perf_counter() < end):
        for times, call in zip(took, (ours, theirs), strict=True):
            start = clock(device)
            call()
            times.append(clock(device) - start)
    return {key: statistics.median(times[3:]) for key, times in zip(("fastmix", "torch"), took, strict=True)}


def speed(device):
    """Seconds of fastmix and of plain torch for a batch of digits and for one of ImageNet's size."""
    timed, generator = [], torch.Generator().manual_seed(0)
    for shape in (BATCH, 1, 8, 8), (64, 3, 224, 224):
        x = torch.randn(shape, generator=generator).to(device)
        for sampler in fastmix.Mixup(1.0, seed=0), fastmix.CutMix(1.0, seed=0):
            drawn = sampler.sample(x)
            calls = (partial(op, x, drawn.lam, drawn.index, drawn.box) for op in MIX)
            timed.append({"op": type(sampler).__name__, "batch": shape, **race(*calls, device)})
    for shape in (BATCH, CLASSES), (256, 1000):
        logits = torch.randn(shape, generator=generator).to(device)
        target = fastmix.Mixup(1.0, seed=0).sample(logits).target(torch.arange(shape[0], device=device) % CLASSES)
        arguments = None, (logits,), (target.weights, target.classes)
        calls = (partial(differentiate, op, *arguments) for op in LOSS)
        timed.append({"op": "loss, gradient", "batch": shape, **race(*calls, device)})
    return timed


# Pictures, by Figure rather than pyplot: importing this chooses no backend


def picture_of_mixing(x, y, path):
    """Rows of originals, their partners, and both mixed by mixup and CutMix; one column for each of eight classes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    first = torch.stack([(y == digit).nonzero()[0, 0] for digit in range(8)])
    x, y = x[first].cpu(), y[first].cpu()
    mixup = fastmix.Mixup(alpha=1.0, seed=0).sample(x)
    cutmix = fastmix.Mix(torch.ones(len(x)), mixup.index, box=fastmix.CutMix(alpha=1.0, seed=0).sample(x).box)
    rows = {"original": (x, y.tolist()), "partner": (x[mixup.index], y[mixup.index].tolist())}
    for name, drawn in ("mixup", mixup), ("CutMix", cutmix):
        mixed, target = drawn.apply(x), drawn.target(y)
        pairs = zip(target.classes.tolist(), target.weights.tolist(), strict=True)
        rows[name] = mixed, [f"{a:.2f} × {own} + {b:.2f} × {partner}" for (own, partner), (a, b) in pairs]
    figure = Figure(figsize=(1.75 * len(x) + 0.6, 8.4), layout="constrained")
    axes = figure.subplots(len(rows), len(x))
    for line, (name, (images, captions)) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=14, fontweight="bold", labelpad=10)
        for cell, image, caption in zip(line, images, captions, strict=True):
            cell.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            cell.set_title(caption, fontsize=11)
            cell.set(xticks=[], yticks=[])
    style = {"fill": False, "edgecolor": COLORS[2], "lw": 2.5, "clip_on": False, "zorder": 3}
    for cell, (top, left, bottom, right) in zip(axes[-1], cutmix.box.tolist(), strict=True):
        cell.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **style))
    figure.get_layout_engine().set(hspace=0.04)
    figure.savefig(path, dpi=110)


def picture_of_errors(runs, path):
    """Test error against epoch: the mean over seeds, in a band from the least to the greatest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLORS)
    for name, of_seeds in runs.items():
        curves = torch.tensor([run["test_error_percent by epoch"] for run in of_seeds], dtype=torch.float64).numpy()
        epochs, label = range(1, curves.shape[1] + 1), f"{name}: {curves[:, -1].mean():.2f} % in the end"
        (line,) = axes.plot(epochs, curves.mean(0), lw=2, label=label)
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, lw=0)
    axes.set(yscale="log", xlabel="epoch", ylabel="test error (%)", xlim=(1, max(2, curves.shape[1])))
    axes.yaxis.set(major_locator=FixedLocator([0.5, 1, 2, 5, 10, 20, 50, 100]), minor_locator=NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{TRAIN_IMAGES} training digits: mean and range over {len(of_seeds)} seeds", fontsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


# What is said and kept


TITLE = "Digits, ten examples of each to learn from"


def summary(found):
    rows, base = [], next(iter(found["methods"].values()))
    for name, runs in found["methods"].items():
        gain = "" if runs is base else mean(gaps(base, runs))
        rows.append([name, *means(runs, "test_error_percent"), gain, mean(numbers(runs, "test_loss"), 2)])
    remarks = "A gain is ERM's\nerror minus the method's, seed by seed: within two standard errors of 0 it may be chance."
    return ("digits", ">test error, %", ">gain over ERM", ">test loss"), rows, remarks


def report(console, seconds, found, timed, device):
    """The three tables."""
    tell(console, TITLE, summary(found))
    per_step = ", ".join(f"{name} {1e3 * median:.2f}" for name, median in seconds.items())
    console.print(f"Median ms of a step of {BATCH} images: {per_step}.\n")
    rows = [[name, *(f"{size:.1e}" for size in sizes.values())] for name, sizes in found["agreement"].items()]
    columns = "on one batch", "max |value|", "fastmix:\nmax |error|", "torch:\nmax |error|", "max |gap|"
    caption = "Error: distance from the float64 oracle. Gap: between the two. Each is the largest over all elements. "
    caption += "float32 holds about 7 digits, so errors near 1e-7 times the largest value are rounding."
    show(console, "Agreement", columns, rows, caption)

    rows = []
    for row in timed:
        numbers = f"{1e3 * row['torch']:.3f}", f"{1e3 * row['fastmix']:.3f}", f"{row['torch'] / row['fastmix']:.2f}"
        rows.append([row["op"], "x".join(map(str, row["batch"])), *numbers])
    caption = f"Measured now on this machine ({device}, one CPU thread): medians, in turns. Ratio above 1: fastmix is faster."
    show(console, "Speed", ("op", "batch", "plain torch, ms", "fastmix, ms", "torch/fastmix"), rows, caption)


@one_thread()
def main(argv=None):
    args = parsed(parser("digits", __doc__.splitlines()[0], out="fastmix-digits", seeds=5, epochs=100), argv, NEEDS)
    from rich.console import Console

    console, data = Console(highlight=False, markup=False), load(args.device)
    x, test_x, _, test_y = data
    about = environment(x.device)
    device = about["device"]
    console.print(f"scikit-learn's digits, 8x8: {len(x)} to train on (few on purpose), {len(test_x)} to test on.")
    console.print(f"{'; '.join(METHODS)}: {args.seeds} seeds, {args.epochs} epochs; on {device}, backend {about['backend']}.\n")
    methods = {name: partial(fit, objective, data=data) for name, objective in METHODS.items()}
    results, seconds, models, runs = train_all(args, "digits", methods, console, data)
    with repeatable(0, args.device):
        found = agreement(models["mixup"], test_x[:BATCH], test_y[:BATCH])
    timed = speed(args.device)
    kept = {"environment": about, "epochs": args.epochs, "methods": results, "agreement": found}
    report(console, seconds, kept, timed, device)
    timings = {"environment": about, "seconds_per_step": seconds, "seconds_per_call": timed}
    write(args.out / "results.json", kept)
    write(args.out / "timings.json", timings)
    picture_of_mixing(test_x, test_y, args.out / "mixed.png")
    picture_of_errors(results, args.out / "error.png")
    runs.finish("results.json", "timings.json", "mixed.png", "error.png")


if __name__ == "__main__":
    main()
