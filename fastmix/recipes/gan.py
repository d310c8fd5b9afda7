"""mixup for GANs: Figure 5 of the mixup paper, `python -m fastmix.recipes.gan`.

A generator learns a ring of eight Gaussians and a swiss roll. The discriminator of a mixup GAN sees real and generated points mixed pair by
pair, and says by how much they are real (`fastmix.gan_loss`); the plain one sees them apart. The generator's loss is the formula's
(minimax) or the usual one that does not saturate. Both networks have three hidden layers of 128 ReLU units, Adam 1e-3 with beta1 0.5;
before each step of the generator the discriminator takes five; batches are of 128 points. Files:

    results.json   modes reached (of eight, by at least 1 % of the samples), share of samples within four deviations of a mode, sliced Wasserstein distance to the data
    gan.png        samples over data at growing iterations, the first loss, last seed

An "epoch" is 100 steps of the generator.

Source: mixup, arXiv:1710.09412, section 3.6 and Figure 5 (width 512, 20,000 steps).
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import fastmix
from fastmix.recipes._studies import figure_of, keep, train_arms
from fastmix.recipes._summaries import mean, numbers
from fastmix.recipes._training import Fit, clock, one_thread, parsed, parser

NOISE, WIDTH, BATCH, STEPS, CRITIC, SIGMA = 8, 128, 128, 100, 5, 0.1
METHODS = {"GAN": None, "mixup GAN 0.2": 0.2, "mixup GAN 1": 1.0}
LOSSES = "minimax", "non-saturating"
SHOTS = 1, 5, 10, 20  # epochs


def modes(device):
    turn = torch.arange(8, device=device) * (math.pi / 4)
    return 2 * torch.stack((turn.cos(), turn.sin()), 1)


def ring(count, device):
    at = modes(device)[torch.randint(8, (count,), device=device)]
    return at + SIGMA * torch.randn(count, 2, device=device)


def roll(count, device):
    turn = 1.5 * math.pi * (1 + 2 * torch.rand(count, 1, device=device))
    return torch.cat((turn * turn.cos(), turn * turn.sin()), 1) / 6 + 0.05 * torch.randn(count, 2, device=device)


DATA = {"ring": ring, "swiss roll": roll}


def layers(inputs, outputs):
    middle = [nn.Linear(inputs, WIDTH), nn.ReLU()]
    middle += [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*middle, nn.Linear(WIDTH, outputs))


class Pair(nn.Module):
    """Both networks, and samples for the picture."""

    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = layers(NOISE, 2), layers(2, 1)
        self.register_buffer("shots", torch.full((len(SHOTS), 500, 2), math.nan))

    def sample(self, count):
        return self.generator(torch.randn(count, NOISE, device=self.shots.device))


class GanFit(Fit):
    """A run whose epochs are STEPS steps of the generator."""

    def __init__(self, seed, model, draw, alpha, loss, *, evaluate):
        real = draw(1000, model.shots.device)
        generator = self._adam(model.generator)
        super().__init__(seed, model, nn.Identity(), real, real, batch=BATCH, optimizer=generator, evaluate=evaluate)
        self.critic = self._adam(model.discriminator)
        self.draw, self.alpha, self.loss = draw, alpha, loss

    @staticmethod
    def _adam(module):
        return torch.optim.Adam(module.parameters(), 1e-3, betas=(0.5, 0.999), foreach=True)

    def _parts(self):
        return {**super()._parts(), "critic": self.critic}

    def _critic_loss(self, d):
        real, fake = self.draw(BATCH, self.x.device), self.model.sample(BATCH).detach()
        if self.alpha is None:
            return (fastmix.gan_loss(d, real, fake, 1.0) + fastmix.gan_loss(d, real, fake, 0.0)) / 2
        lam = fastmix.dirichlet(BATCH, 2, self.alpha, device=self.x.device)[:, 0]
        return fastmix.gan_loss(d, real, fake, lam)

    def epoch(self):
        start, d = clock(self.x.device), self.model.discriminator
        for _ in range(STEPS):
            for _ in range(CRITIC):
                self.critic.zero_grad()
                self._critic_loss(d).backward()
                self.critic.step()
            said = d(self.model.sample(BATCH))
            loss = -F.softplus(said).mean() if self.loss == "minimax" else F.softplus(-said).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.seconds.append((clock(self.x.device) - start) / STEPS)
        with torch.no_grad():
            self.curve.append(self.evaluate(self.model))
            if (done := len(self.curve)) in SHOTS:
                self.model.shots[SHOTS.index(done)] = self.model.sample(500)


def sliced_wasserstein(a, b, directions=64):
    """The mean distance of the sorted projections of two samples of one size, over directions of the plane."""
    turn = torch.arange(directions, device=a.device) * (math.pi / directions)
    along = torch.stack((turn.cos(), turn.sin()))
    return ((a @ along).sort(0).values - (b @ along).sort(0).values).abs().mean().item()


def evaluated(name, model):
    draw, device = DATA[name], model.shots.device
    samples, real = model.sample(2000), draw(2000, device)
    found = {"distance": sliced_wasserstein(samples, real)}
    if name == "ring":
        near, at = torch.cdist(samples, modes(device)).min(1)
        good = near <= 4 * SIGMA
        found["good_percent"] = 100 * good.float().mean().item()
        found["modes"] = int((torch.bincount(at[good], minlength=8) >= 20).sum())
    return found


def fit(data, loss, alpha, device, seed):
    return GanFit(seed, Pair().to(device), DATA[data], alpha, loss, evaluate=partial(evaluated, data))


TITLE = "GANs (arXiv:1710.09412, Figure 5)"


def summary(found):
    rows = []
    run = [(loss, name) for loss in LOSSES for name in METHODS if f"ring, {loss}, {name}" in found["methods"]]
    for loss, name in run:
        of_ring, of_roll = (found["methods"][f"{data}, {loss}, {name}"] for data in DATA)
        asked = (of_ring, "modes", 1), (of_ring, "good_percent", 0), (of_ring, "distance", 2), (of_roll, "distance", 2)
        rows.append([loss, name, *(mean(numbers(runs, key), places) for runs, key, places in asked)])
    remarks = f"""After
{found["epochs"] * STEPS} steps of the generator (the paper: 20,000, wider networks). A mode counts with 1 % of the samples within four deviations of it; distance: sliced Wasserstein.
Picture: the last seed after {", ".join(str(shot * STEPS) for shot in SHOTS)} steps, from left to right."""
    left_out = [name for k, names in enumerate((LOSSES, METHODS)) for name in names if name not in {pair[k] for pair in run}]
    remarks += f" Not run: {', '.join(left_out)}." * bool(left_out)
    columns = "generator's loss", "method", ">ring: modes of 8", ">good samples, %", ">ring: distance", ">swiss roll: distance"
    return columns, rows, remarks


def picture(models, loss, methods, path):
    arms = [(data, name) for data in DATA for name in methods]
    figure = figure_of(1.9 * len(SHOTS) + 1.5, 1.9 * len(arms))
    axes = figure.subplots(len(arms), len(SHOTS), squeeze=False)
    for line, (data, name) in zip(axes, arms, strict=True):
        torch.manual_seed(0)
        real = DATA[data](500, "cpu")
        for cell, shot, epochs in zip(line, models[f"{data}, {loss}, {name}"].shots.cpu(), SHOTS, strict=True):
            cell.scatter(*real.T.numpy(), s=2, color="#0072b2")
            cell.scatter(*shot.T.numpy(), s=2, color="#e69f00")
            cell.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
            cell.set_title(f"{epochs * STEPS} steps" if (data, name) == arms[0] else "", fontsize=9)
        line[0].set_ylabel(f"{data}\n{name}", fontsize=8)
    figure.savefig(path, dpi=90)


@one_thread()
def main(argv=None):
    options = parser("gan", __doc__.splitlines()[0], out="fastmix-gan", seeds=3, epochs=20, small=1)
    options.add_argument(
        "--loss", nargs="+", choices=LOSSES, default=list(LOSSES), help="the generator's, only these (default: both)"
    )
    options.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="only these (default: all three)")
    args = parsed(options, argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(f"{args.epochs * STEPS} steps of the generator, {args.seeds} seeds.\n")
    arms, losses, methods = {}, list(dict.fromkeys(args.loss)), list(dict.fromkeys(args.method))
    for data in DATA:
        for loss in losses:
            for name in methods:
                arms[f"{data}, {loss}, {name}"] = args.epochs, partial(fit, data, loss, METHODS[name], args.device)
    results, models, runs = train_arms(args, "gan", arms, console, ())
    keep(args, results, (), (TITLE, summary), console)
    with torch.random.fork_rng([]):
        picture(models, losses[0], methods, args.out / "gan.png")
    runs.finish("results.json", "gan.png")


if __name__ == "__main__":
    main()
