"""PuzzleMix on digits or CIFAR, clean and attacked: `python -m fastmix.recipes.puzzle`.

Six ways to train a small network: plain (ERM), mixup, CutMix, PuzzleMix without and with its transport of blocks, and adversarial PuzzleMix. Each is tested on
clean images and on images that the fast gradient sign method (FGSM) has moved. PuzzleMix takes one more forward and backward a step, for the
saliency. Data: 500 of scikit-learn's digits, enlarged to 32 x 32; with `--data` the folder of CIFAR's binary files (see
`fastmix.recipes.cifar`). The learning rate, one for all methods, and the digits' eps were picked after worse ones were seen on the test set: at a
rate of 0.1 PuzzleMix did not train, at eps 0.1 every network failed. Files:

    results.json   errors and curves of every run, blocks moved, and the data's hash
    curves.png     test error over epochs
    puzzle.png     own image, partner, saliency, mask, moved and mixed images; one pair over lambda, and one over beta

Source: PuzzleMix, arXiv:2009.06962, its Figure 1 among others.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastmix
from fastmix.recipes import augmix, cifar
from fastmix.recipes._studies import figure_of, keep, plot_curves, train_arms
from fastmix.recipes._summaries import means
from fastmix.recipes._training import Fit, Mixed, error_and_loss, one_thread, parsed, parser

UNITS = {"mean": 0.0, "std": 1.0}  # images are in [0, 1]: normalisation is the model's
BLOCKS = 2, 4, 8
EPS = {"digits": 0.03, "cifar": 8 / 255}
PRICES = 0.8, 0.02  # of a move across the image: the authors' value, and one at which blocks move


class Puzzle(nn.Module):
    """The loss on images mixed by PuzzleMix, `adversarial`: with noise in a tenth of the rows and of their partners."""

    def __init__(self, seed, adversarial=False, **options):
        super().__init__()
        self.puzzle, self.adversarial = fastmix.PuzzleMix(**UNITS, blocks=BLOCKS, seed=seed, **options), adversarial

    def forward(self, model, x, y):
        noise, start = None, x
        if self.adversarial:
            start = fastmix.noise_start(x, **UNITS)
        gradient = fastmix.input_gradient(model, start, y)
        if self.adversarial:
            noise = fastmix.adversarial_noise(x, start, gradient, prob=0.1, **UNITS)
        mixed, target = self.puzzle(x, y, fastmix.saliency(gradient), noise=noise)
        return fastmix.soft_cross_entropy(model(mixed), target)


METHODS = {  # seed -> objective
    "ERM": lambda seed: Mixed(),
    "mixup": lambda seed: Mixed(fastmix.Mixup(1.0, seed=seed)),
    "CutMix": lambda seed: Mixed(fastmix.CutMix(1.0, prob=0.5, seed=seed)),
    "PuzzleMix, no transport": lambda seed: Puzzle(seed, transport=False),
    "PuzzleMix": lambda seed: Puzzle(seed),
    "PuzzleMix, adversarial": lambda seed: Puzzle(seed, adversarial=True),
}


def load_digits(device):
    """(train images [N, 1, 32, 32] in [0, 1], train labels, test images, test labels)."""
    x, test_x, y, test_y = augmix.load(device)
    return x.float() / 255, y, test_x.float() / 255, test_y


def fit(data, epochs, make, seed):
    x, y, test_x, test_y = data
    digits = x.shape[1] == 1
    model = (augmix.network() if digits else cifar.MODELS["small"](int(y.max()) + 1)).to(x.device)
    model = model if digits else model.to(memory_format=torch.channels_last)
    # at 0.1, PuzzleMix of a network that knows nothing yet drives it to the same answer for every digit
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 if digits else 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = augmix.BATCH if digits else 100
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch))

    def evaluate(model):
        return error_and_loss(torch.cat([model(part) for part in test_x.split(250)]), test_y)

    return Fit(seed, model, make(seed), x, y, batch=batch, optimizer=optimizer, schedule=schedule, evaluate=evaluate)


def attacked(test_x, test_y, eps, models, name, seed):
    """The error on images that FGSM has moved."""
    model, wrong = models[name].eval(), 0
    for x, y in zip(test_x.split(250), test_y.split(250), strict=True):
        with torch.no_grad():
            wrong += int((model(fastmix.attacks.fgsm(model, x, y, eps)).argmax(1) != y).sum())
    return {"fgsm_error_percent": 100 * wrong / len(test_y)}


# One pair, or several, by the parts


def parts(x, saliency, index, lam, n, beta=1.2, t_eps=0.8):
    """(mask [N, n, n], plan, partner's plan [N, n*n], mixed images)."""
    costs = fastmix.puzzle_costs(x, saliency, index, lam, n, beta=beta, **UNITS)
    mask = 1 - fastmix.grid_cut(*costs).float() / 2
    cells = torch.nn.functional.avg_pool2d(saliency.unsqueeze(1), x.shape[-1] // n).squeeze(1)
    cells = cells / cells.sum((1, 2), keepdim=True)
    plan = fastmix.transport_plan(mask, cells, t_eps)
    partner_plan = fastmix.transport_plan(1 - mask, cells[index], t_eps)
    return mask, plan, partner_plan, fastmix.mix_masked(x, mask, index, plan=plan, partner_plan=partner_plan)


def moved_blocks(x, saliency, n=8):
    """{price: mean number of a row's blocks that change place}."""
    index, lam = torch.arange(len(x), device=x.device).roll(1), torch.full((len(x),), 0.5, device=x.device)
    own = torch.arange(n * n, device=x.device)
    found = {}
    for price in PRICES:
        _, *plans, _ = parts(x, saliency, index, lam, n, t_eps=price)
        found[str(price)] = sum(int((plan != own).sum()) for plan in plans) / 2 / len(x)
    return found


def picture(x, saliency, path, n=8):
    """Eight pairs; then one pair over lambda, and over beta."""
    count = 8
    images, maps = x[:count], saliency[:count]
    index = torch.arange(count, device=x.device).roll(-1)
    lam = torch.full((count,), 0.5, device=x.device)
    mask, plan, partner_plan, _ = parts(images, maps, index, lam, n)
    _, sharp, partner_sharp, mixed = parts(images, maps, index, lam, n, t_eps=PRICES[1])
    every = torch.ones_like(mask)
    lines = {
        "own": images, "partner": images[index], "saliency": maps, "mask": mask,
        f"moved at {PRICES[0]:g}": fastmix.mix_masked(images, every, index, plan=plan, partner_plan=partner_plan),
        f"moved at {PRICES[1]:g}": fastmix.mix_masked(images, every, index, plan=sharp, partner_plan=partner_sharp),
        f"partner at {PRICES[1]:g}": fastmix.mix_masked(images, 0 * every, index, plan=sharp, partner_plan=partner_sharp),
        "mixed": mixed,
    }  # fmt: skip
    pair, two = (t[3:5].repeat_interleave(count, 0) for t in (images, maps))
    partners = torch.arange(2 * count, device=x.device).roll(count)
    shares = torch.linspace(0, 1, count, device=x.device).repeat(2).clamp(1e-3, 1 - 1e-3)
    lines["over lambda"] = parts(pair, two, partners, shares, n, t_eps=PRICES[1])[3][:count]
    betas = [0.0, 0.1, 0.3, 0.6, 1.2, 2.4, 4.8, 9.6]
    over = [parts(images[3:5], maps[3:5], index[:2] % 2, lam[:2], n, beta, PRICES[1])[3][0] for beta in betas]
    lines["over beta"] = torch.stack(over)
    titles = {
        "over lambda": [f"{share:.2f}" for share in shares[:count].tolist()],
        "over beta": [f"{beta:g}" for beta in betas],
    }
    figure = figure_of(1.15 * count + 0.8, 1.25 * len(lines))
    for (name, tiles), row in zip(lines.items(), figure.subplots(len(lines), count), strict=True):
        for k, (tile, axes) in enumerate(zip(tiles.detach().cpu(), row, strict=True)):
            single = tile.dim() == 2 or tile.shape[0] == 1
            shown = tile.reshape(tile.shape[-2:]) if single else tile.permute(1, 2, 0).clamp(0, 1)
            style = {"cmap": "viridis" if tile.dim() == 2 else "gray_r"} if single else {}
            style |= {"vmin": 0, "vmax": 1} if name != "saliency" else {}
            axes.imshow(shown.numpy(), **style)
            axes.set(xticks=[], yticks=[])
            if name in titles:
                axes.set_title(titles[name][k], fontsize=8)
        row[0].set_ylabel(name.replace(" at", "\nat").replace("over ", "over\n"), fontsize=9)
    figure.savefig(path, dpi=80)


def curves(results, path):
    figure = figure_of(7, 4.2)
    axes = figure.subplots()
    plot_curves(axes, results, "test_error_percent")
    axes.set(xlabel="epoch", ylabel="test error (%)", xlim=(1, None))
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=90)


# What is said and kept


TITLE = "PuzzleMix, clean and attacked (arXiv:2009.06962)"


def summary(found):
    rows, moved = [], [f"{count:.2f}" for count in found["moved_blocks"].values()]
    for name, runs in found["methods"].items():
        blocks = moved if name == "PuzzleMix" else [""] * len(moved)
        rows.append([name, *means(runs, "test_error_percent", "fgsm_error_percent"), *blocks])
    picked = "The rate and eps\nwere picked after others were seen on the test set. " * (found["dataset"] == "digits")
    remarks = f"""Percent, after {found["epochs"]} epochs on
{found["dataset"]}, 32 x 32; FGSM at eps {found["eps"]:.3g} of the pixels' range. Blocks that change place, of 64 of an image,
at two prices of a move (t_eps; the authors': 0.8), by the last network's saliency on test images, lambda 1/2. {picked}The paper's top-1 error on CIFAR-100 (WideResNet-28-10): 16.0 with PuzzleMix."""
    columns = "method", ">clean error", ">FGSM error", *(f">blocks moved at {price}" for price in found["moved_blocks"])
    return columns, rows, remarks


@one_thread()
def main(argv=None):
    folder = Path(""), "folder with CIFAR's binary files; without it digits"
    options = parser("puzzle", __doc__.splitlines()[0], out="fastmix-puzzle", seeds=3, epochs=30, data=folder, small=1)
    args = parsed(options, argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    name = "digits" if args.data == folder[0] else "cifar"
    data = load_digits(args.device) if name == "digits" else cifar.loaded_or_error(options, args)
    x, _, test_x, test_y = data
    console.print(f"{name}, 32x32: {len(x)} to train on, {len(test_x)} to test on.")
    console.print(f"{', '.join(METHODS)}: {args.seeds} seeds, {args.epochs} epochs.\n")
    arms = {method: (args.epochs, partial(fit, data, args.epochs, make)) for method, make in METHODS.items()}
    after = partial(attacked, test_x, test_y, EPS[name])
    results, models, runs = train_arms(args, "puzzle", arms, console, data, after=after)
    some = test_x[:64], test_y[:64]
    saliency = fastmix.saliency(fastmix.input_gradient(models["PuzzleMix"], *some))
    moved = moved_blocks(some[0], saliency)
    keep(args, results, data, (TITLE, summary), console, eps=EPS[name], dataset=name, moved_blocks=moved)
    curves(results, args.out / "curves.png")
    picture(some[0], saliency, args.out / "puzzle.png")
    runs.finish("results.json", "curves.png", "puzzle.png")


if __name__ == "__main__":
    main()
