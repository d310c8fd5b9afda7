"""AugMix on digits under corruptions that it has not seen: `python -m fastmix.recipes.augmix`.

Five ways to train a small network on 500 of scikit-learn's digits, enlarged to 32 x 32 bytes: as they are, with mixup, with CutMix, with one
AugMix view, and with AugMix's consistency between the clean image and two views. Then each is tested on clean digits and on eight
corruptions at five strengths, none of which is among AugMix's operations. Files:

    results.json      errors, calibration errors and curves of every run
    corruptions.png   a digit under every corruption and strength, and the errors of each way
    augmix.png        digits and views of them

Source: AugMix, arXiv:1912.02781. The corruptions are in the spirit of CIFAR-10-C (arXiv:1903.12261), made here from a fixed seed.
"""

import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import fastmix
from fastmix.recipes import digits
from fastmix.recipes._studies import figure_of, keep, train_arms
from fastmix.recipes._summaries import means
from fastmix.recipes._training import COLORS, Fit, Mixed, one_thread, parsed, parser

SIDE, TRAIN_IMAGES, BATCH, MEAN, STD = 32, 500, 50, 0.25, 0.35
STRENGTHS = 5


def normalized(images):
    return fastmix.mix_images(images, mean=[MEAN], std=[STD])


class FromBytes(nn.Module):
    """An objective on normalised images, of bytes."""

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, model, images, y):
        return self.objective(model, normalized(images), y)


class Augmented(nn.Module):
    """The loss on one AugMix view of bytes or, with `consistency`, AugMix's loss on the clean images and two views."""

    def __init__(self, seed, consistency):
        super().__init__()
        self.augmix = fastmix.AugMix(mean=MEAN, std=STD, views=2 if consistency else 1, seed=seed)
        self.consistency = consistency

    def forward(self, model, images, y):
        found = self.augmix.stack(images)
        if self.consistency:
            return fastmix.augmix_loss(model(found.flatten(0, 1)), y)
        return fastmix.soft_cross_entropy(model(found[1]), y)


METHODS = {  # name: seed -> objective
    "none": lambda seed: FromBytes(Mixed()),
    "mixup": lambda seed: FromBytes(Mixed(fastmix.Mixup(alpha=1.0, seed=seed))),
    "CutMix": lambda seed: FromBytes(Mixed(fastmix.CutMix(alpha=1.0, prob=0.5, seed=seed))),
    "AugMix": lambda seed: Augmented(seed, False),
    "AugMix, consistency": lambda seed: Augmented(seed, True),
}


# Corruptions of images in [0, 1], by strength 1 to 5 and a generator on the host


def _random(draw, x, generator):
    return draw(x.shape, generator=generator).to(x.device)


def _smoothed(x, weights):
    """x convolved with weights [h, w], pixels outside as the nearest ones."""
    h, w = weights.shape
    wide = F.pad(x, (w // 2, w // 2, h // 2, h // 2), mode="replicate")
    return F.conv2d(wide, weights.to(x).view(1, 1, h, w))


def gaussian_noise(x, s, generator):
    return x + 0.08 * s * _random(torch.randn, x, generator)


def shot_noise(x, s, generator):
    rate = (60, 25, 12, 5, 3)[s - 1]
    return torch.poisson(x.cpu() * rate, generator=generator).to(x.device) / rate


def impulse_noise(x, s, generator):
    chance = _random(torch.rand, x, generator)
    part = 0.03 * s
    return torch.where(chance < part, 0.0, torch.where(chance > 1 - part, 1.0, x))


def blur(x, s, generator):
    spots = torch.arange(-8, 9, dtype=torch.float32) / (0.7 * s + 0.3)
    weights = torch.exp(-0.5 * spots.square())
    weights = weights / weights.sum()
    return _smoothed(_smoothed(x, weights.view(-1, 1)), weights.view(1, -1))


def motion_blur(x, s, generator):
    length = 2 * s + 1
    return _smoothed(x, torch.eye(length) / length)


def brightness(x, s, generator):
    return x + 0.12 * s


def contrast(x, s, generator):
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + (x - middle) * (0.75, 0.55, 0.4, 0.25, 0.15)[s - 1]


def pixelate(x, s, generator):
    side = (20, 14, 10, 8, 6)[s - 1]
    return F.interpolate(F.interpolate(x, (side, side), mode="area"), (SIDE, SIDE), mode="nearest")


CORRUPTIONS = {
    made.__name__.replace("_", " "): made
    for made in (gaussian_noise, shot_noise, impulse_noise, blur, motion_blur, brightness, contrast, pixelate)
}


def corrupted(images, name, strength):
    """Bytes [N, 1, H, W] under a corruption of this strength: the same every time."""
    generator = torch.Generator().manual_seed(100 * list(CORRUPTIONS).index(name) + strength)
    x = CORRUPTIONS[name](images.float() / 255, strength, generator)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


# Training


def load(device):
    """(train bytes [N, 1, 32, 32], test bytes, train labels, test labels): the same split every time."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x.reshape(-1, 1, 8, 8) / 16, y, train_size=TRAIN_IMAGES, stratify=y, random_state=0)
    parts = []
    for part in (x, test_x):
        large = F.interpolate(torch.tensor(part, dtype=torch.float32), (SIDE, SIDE), mode="bilinear", align_corners=False)
        parts.append((large * 255).round().to(device, torch.uint8))
    return *parts, torch.tensor(y, device=device), torch.tensor(test_y, device=device)


def network():
    def block(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), nn.Flatten(), nn.Linear(64 * 16, digits.CLASSES))


def logits_of(model, images):
    return torch.cat([model(normalized(part)) for part in images.split(250)])


def fit(data, epochs, make, seed):
    x, test_x, y, test_y = data
    model = network().to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // BATCH))

    def evaluate(model):
        return {"test_error_percent": error(logits_of(model, test_x), test_y)}

    return Fit(seed, model, make(seed), x, y, batch=BATCH, optimizer=optimizer, schedule=schedule, evaluate=evaluate)


def error(logits, y):
    return 100 * (logits.argmax(1) != y).double().mean().item()


@torch.no_grad()
def robustness(tests, y, models, name, seed):
    """Errors of each corruption and strength, and calibration errors."""
    model, every = models[name].eval(), []
    errors = {}
    for what, strengths in tests.items():
        logits = [logits_of(model, images) for images in strengths]
        every += logits if what != "clean" else []
        errors[what] = [error(found, y) for found in logits]
    calibration = fastmix.expected_calibration_error
    return {
        "corrupted_error_percent": statistics.mean(statistics.mean(errors[what]) for what in CORRUPTIONS),
        "calibration_error_percent": 100 * calibration(logits_of(model, tests["clean"][0]), y).item(),
        "corrupted_calibration_error_percent": 100 * calibration(torch.cat(every), y.repeat(len(every))).item(),
        "errors": errors,
    }


# What is said and kept


KEYS = ("test_error_percent", "corrupted_error_percent", "calibration_error_percent", "corrupted_calibration_error_percent")


TITLE = "Corrupted digits: AugMix (arXiv:1912.02781)"


def summary(found):
    rows = [[name, *means(runs, *KEYS)] for name, runs in found["methods"].items()]
    remarks = f"""Percent, after {found["epochs"]} epochs on
{found["train_images"]} digits, 32 x 32. Corrupted: the mean of eight corruptions at five strengths. Calibration: expected calibration error, 15 bins. The paper's
CIFAR-10-C errors (WideResNet): 26.9 without, 22.3 with mixup, 27.1 with CutMix, 11.2 with AugMix."""
    return ("method", ">clean error", ">corrupted", ">calibration", ">calibration, corrupted"), rows, remarks


def picture_of_corruptions(images, results, path):
    """On the left one digit under everything, on the right the errors over strengths."""
    figure = figure_of(13, 10)
    grid = figure.add_gridspec(len(CORRUPTIONS), STRENGTHS + 4)
    for line, what in enumerate(CORRUPTIONS):
        for s in range(STRENGTHS + 1):
            axes = figure.add_subplot(grid[line, s])
            tile = images[line % len(images)].unsqueeze(0).cpu()
            shown = corrupted(tile, what, s) if s else tile
            axes.imshow(shown[0, 0].numpy(), cmap="gray_r", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            if not line:
                axes.set_title(f"strength {s}" if s else "clean", fontsize=9)
            if not s:
                axes.set_ylabel(what.replace(" ", "\n"), fontsize=9)
        axes = figure.add_subplot(grid[line, STRENGTHS + 1 :])
        for color, (name, runs) in zip(COLORS, results.items(), strict=False):
            of_seeds = torch.tensor([run["errors"][what] for run in runs]).mean(0)
            axes.plot(range(1, STRENGTHS + 1), of_seeds.numpy(), "o-", ms=3, color=color, label=name)
        axes.set(xticks=range(1, STRENGTHS + 1), ylim=(0, None))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if not line:
            axes.set_title("error (%) over strength", fontsize=9)
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=len(results), frameon=False)
    figure.savefig(path, dpi=80)


def picture_of_views(images, path):
    """Columns of digits: as they are, and six views."""
    figure = figure_of(1.1 * len(images) + 0.6, 8)
    augmix = fastmix.AugMix(mean=0.0, std=1.0, views=6, seed=1)
    found = augmix(images)
    for line, (tiles, row) in enumerate(zip(found, figure.subplots(len(found), len(images)), strict=True)):
        for tile, axes in zip(tiles, row, strict=True):
            axes.imshow(tile[0].cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"view {line}" if line else "clean", fontsize=9)
    figure.savefig(path, dpi=80)


@one_thread()
def main(argv=None):
    args = parsed(parser("augmix", __doc__.splitlines()[0], out="fastmix-augmix", seeds=3, epochs=30), argv)
    from rich.console import Console

    console, data = Console(highlight=False, markup=False), load(args.device)
    x, test_x, _, test_y = data
    console.print(f"scikit-learn's digits, {SIDE}x{SIDE}: {len(x)} to train on, {len(test_x)} to test on.")
    console.print(f"{', '.join(METHODS)}: {args.seeds} seeds, {args.epochs} epochs.\n")
    tests = {"clean": [test_x]}
    for name in CORRUPTIONS:
        tests[name] = [corrupted(test_x, name, strength) for strength in range(1, STRENGTHS + 1)]
    arms = {name: (args.epochs, partial(fit, data, args.epochs, make)) for name, make in METHODS.items()}
    results, _, runs = train_arms(args, "augmix", arms, console, data, after=partial(robustness, tests, test_y))
    keep(args, results, data, (TITLE, summary), console, train_images=len(x))
    picture_of_corruptions(test_x, results, args.out / "corruptions.png")
    picture_of_views(test_x[:8], args.out / "augmix.png")
    runs.finish("results.json", "corruptions.png", "augmix.png")


if __name__ == "__main__":
    main()
