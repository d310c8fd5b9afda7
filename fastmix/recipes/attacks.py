"""Adversarial examples: Table 3 of the mixup paper, `python -m fastmix.recipes.attacks`.

Test images are moved by the fast gradient sign method (FGSM) and by ten steps of it (I-FGSM), by at most eps in each pixel: by the model's
own gradient (white box), and by that of another network of empirical risk from other initial weights (black box), whose images all
models are shown. Each by the gradient of the cross-entropy, as in the paper, and by that of the margin, the largest other logit less the
true one: a model that is very sure has gradients of the cross-entropy that are 0 or nothing but rounding, which hides it. Files:

    results.json   top-1 and top-2 errors for each attack and eps, and how many rows' gradient of the cross-entropy is exactly 0
    attacks.png    error over eps, and a digit attacked

Images are scikit-learn's digits in [0, 1], 1,000 to learn from and 797 to test on. `--data` is a folder with CIFAR-10's binary files.

Source: mixup, arXiv:1710.09412, Table 3 (ImageNet, ResNet-101, eps 4 of 255).
"""

from functools import partial
from pathlib import Path

import torch

import fastmix
from fastmix.recipes import cifar, corrupted
from fastmix.recipes._studies import Augmented, figure_of, keep, train_arms
from fastmix.recipes._summaries import mean, numbers
from fastmix.recipes._training import COLORS, Fit, Mixed, MixedInside, error_and_loss, one_thread, parsed, parser

OTHER = "another ERM"
METHODS = {  # (model, seed) -> objective
    OTHER: lambda model, seed: Mixed(),
    "ERM": lambda model, seed: Mixed(),
    "mixup": lambda model, seed: Mixed(fastmix.Mixup(1.0, seed=seed)),
    "manifold mixup": lambda model, seed: MixedInside(fastmix.ManifoldMixup((None, *hidden(model)), 2.0, seed=seed)),
}
SHOWN = tuple(METHODS)[1:]
EPS = {"digits": (0.05, 0.1, 0.15, 0.2, 0.3), "cifar": (1 / 255, 2 / 255, 4 / 255, 8 / 255)}
BOXES, STEPS, LOSSES = ("white", "black"), {"FGSM": 1, "I-FGSM": 10}, ("cross_entropy", "margin")
PAPER = {  # top-1 error, ERM and mixup
    "white FGSM": (90.7, 75.2), "white I-FGSM": (99.9, 99.6), "black FGSM": (57.0, 46.0), "black I-FGSM": (57.3, 40.9),
}  # fmt: skip


def hidden(model):
    """The modules in whose inputs manifold mixup mixes."""
    return (model[3], model[6]) if isinstance(model[0], torch.nn.Conv2d) else (model[3], model[4])


def fit(data, name, epochs, seed):
    x, y, test_x, test_y = data
    is_digits = x.shape[1] == 1
    if name == OTHER:
        torch.manual_seed(seed + 1000)
    model = (corrupted.network() if is_digits else cifar.MODELS["small"](10)).to(x.device)
    batch = 50 if is_digits else 128
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch))
    objective = METHODS[name](model, seed)
    evaluate = lambda model: error_and_loss(corrupted.logits_of(model, test_x), test_y)  # noqa: E731
    options = {"batch": batch, "optimizer": optimizer, "schedule": schedule, "evaluate": evaluate}
    return Fit(seed + 1000 * (name == OTHER), model, objective if is_digits else Augmented(objective), x, y, **options)


def attacked(source, x, y, eps, steps, loss):
    return torch.cat([
        fastmix.attacks.fgsm(source, part, of, eps, steps=steps, loss=loss)
        for part, of in zip(x.split(500), y.split(500), strict=True)
    ])  # fmt: skip


@torch.no_grad()
def errors(model, x, y):
    """(top-1, top-2) error in percent."""
    logits = corrupted.logits_of(model.eval(), x)
    return [100 * (1 - fastmix.mixed_accuracy(logits, y, topk=k).item()) for k in (1, 2)]


def robustness(data, models, name, seed, all_eps):
    """The errors of a model under every attack, and what hides its gradient."""
    if name == OTHER:
        return {}
    _, _, x, y = data
    model, found = models[name], {}
    for box, (attack, steps), loss in ((b, s, a) for b in BOXES for s in STEPS.items() for a in LOSSES):
        source = model if box == "white" else models[OTHER]
        pairs = [errors(model, attacked(source, x, y, eps, steps, loss), y) for eps in all_eps]
        found[f"{box} {attack}, {loss}"] = {"top1": [one for one, _ in pairs], "top2": [two for _, two in pairs]}
    model.eval()
    leaf = x.clone().requires_grad_()
    logits = corrupted.logits_of(model, leaf)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y, reduction="sum"), leaf)
    sure = logits.softmax(1).amax(1).mean().item()
    masked = 100 * (gradient.flatten(1) == 0).all(1).float().mean().item()
    return {"attacks": found, "mean_largest_probability": sure, "zero_gradient_percent": masked}


def at(runs, key, place, top="top1"):
    """[error of each seed] under an attack, at the eps of this place."""
    return [run["attacks"][key][top][place] for run in runs]


TITLE = "Adversarial examples (arXiv:1710.09412, Table 3)"


def summary(found):
    runs, place = found["methods"], 1 if found["eps"] == list(EPS["digits"]) else 2
    rows = [["none", "", "", *(mean(numbers(runs[name], "test_error_percent")) for name in SHOWN)]]
    for key in runs["ERM"][0]["attacks"]:
        attack, loss = key.split(", ")
        paper = [f"{number:g}" for number in PAPER[attack]] if loss == "cross_entropy" else ["", ""]
        rows.append([key.replace("_", "-"), *paper, *(mean(at(runs[name], key, place)) for name in SHOWN)])
    sure = ", ".join(f"{name} {mean(numbers(runs[name], 'mean_largest_probability'), 2)}" for name in SHOWN)
    remarks = f"""Top-1 error in
percent at eps {found["eps"][place]:g} of the pixels' range (paper: ImageNet, ResNet-101, 4 of 255). Black: images made for another network of empirical risk.
The mean largest probability on clean images: {sure}."""
    return ("attack, loss", ">paper: ERM", ">paper: mixup", *(f">{name}" for name in SHOWN)), rows, remarks


def picture(results, models, data, all_eps, path):
    figure = figure_of(13, 7.6)
    axes = figure.subplots(3, 4, height_ratios=(3, 3, 2))
    for line, loss in zip(axes, LOSSES, strict=False):
        for cell, (box, attack) in zip(line, ((b, s) for b in BOXES for s in STEPS), strict=True):
            for name, color in zip(SHOWN, COLORS, strict=False):
                curves = torch.tensor([run["attacks"][f"{box} {attack}, {loss}"]["top1"] for run in results[name]]).numpy()
                clean = sum(numbers(results[name], "test_error_percent")) / len(results[name])
                cell.plot((0, *all_eps), [clean, *curves.mean(0)], color=color, label=name, lw=1.8, marker="o", ms=3)
            cell.set_title(f"{box} box, {attack}, {loss.replace('_', '-')}", fontsize=10)
            cell.set(ylim=(0, 100), xlim=(0, None))
            cell.grid(alpha=0.25)
            cell.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("test error (%)")
    axes[0, 0].legend(frameon=False, fontsize=9)
    x, y = data[2][:1], data[3][:1]
    for cell, eps in zip(axes[2], (0, *all_eps[1::2]), strict=False):
        model = models["ERM"]
        image = x if eps == 0 else attacked(model, x, y, eps, 10, "margin")
        with torch.no_grad():
            said = model.eval()(image).argmax(1).item()
        cell.imshow(image[0].permute(1, 2, 0).squeeze(2).cpu().numpy(), cmap="gray_r", vmin=0, vmax=1)
        cell.set_title(f"eps {eps:.3g}: ERM says {said}", fontsize=10)
    for cell in axes[2]:
        cell.set_axis_off()
    figure.savefig(path, dpi=90)


@one_thread()
def main(argv=None):
    folder = Path(), "folder with CIFAR-10's binary files; without it digits"
    options = parser("attacks", __doc__.splitlines()[0], out="fastmix-attacks", seeds=3, epochs=40, data=folder)
    options.set_defaults(data=None)
    args = parsed(options, argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    data = corrupted.digits_data(args.device) if args.data is None else cifar.loaded_or_error(options, args)
    all_eps = EPS["digits" if args.data is None else "cifar"]
    arms = {name: (args.epochs, partial(fit, data, name, args.epochs)) for name in METHODS}
    after = lambda models, name, seed: robustness(data, models, name, seed, all_eps)  # noqa: E731
    results, models, runs = train_arms(args, "attacks", arms, console, data, after)
    keep(args, results, data, (TITLE, summary), console, eps=list(all_eps))
    for name in SHOWN:
        masked = mean(numbers(results[name], "zero_gradient_percent"))
        console.print(f"{name}: rows whose gradient of the cross-entropy is exactly 0: {masked} %")
    console.print()
    picture(results, models, data, all_eps, args.out / "attacks.png")
    runs.finish("results.json", "attacks.png")


if __name__ == "__main__":
    main()
