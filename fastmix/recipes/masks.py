"""What the samplers of masks and boxes do to real digits: `python -m fastmix.recipes.masks`.

masks.png     for each method two pairs of digits: own image, partner, what a pixel keeps of its own, and the mixed image
shares.json   the mean share of the label and its standard deviation over 2,000 draws

Digits are scikit-learn's, enlarged to 32 x 32. Saliency is the gradient of a small network that has learned them for a few epochs, and
attention that saliency in 8 x 8 cells. It takes some seconds.
"""

import torch
import torch.nn.functional as F

import fastmix
from fastmix.recipes import digits
from fastmix.recipes._summaries import show
from fastmix.recipes._training import Mixed, environment, one_thread, parsed, parser, repeatable, write

METHODS = {
    "CutMix": lambda: fastmix.CutMix(seed=2),
    "FMix": lambda: fastmix.FMix(seed=2),
    "SmoothMix": lambda: fastmix.SmoothMix(seed=2),
    "GridMix": lambda: fastmix.GridMix(grid=4, seed=2),
    "ResizeMix": lambda: fastmix.ResizeMix(seed=2),
    "SaliencyMix": lambda: fastmix.SaliencyMix(seed=2),
    "AttentiveCutMix": lambda: fastmix.AttentiveCutMix(cells=12, grid=8, seed=2),
}
SIDE, SHOWN, DRAWS = 32, 2, 2000


def enlarged(x):
    """Returns images as bilinear interpolation enlarges them to SIDE x SIDE."""
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)


def drawn(sampler, x, saliency):
    """Returns the Mix of any of the methods."""
    needs_map = isinstance(sampler, (fastmix.SaliencyMix, fastmix.AttentiveCutMix))
    return sampler.sample(x, saliency) if needs_map else sampler.sample(x)


def shares():
    """Returns {method: mean and standard deviation of the row's own share of the label}, of maps with one bright pixel anywhere."""
    x = torch.zeros(DRAWS, 1, SIDE, SIDE)
    saliency = torch.zeros(DRAWS, SIDE * SIDE)
    places = torch.randint(SIDE * SIDE, (DRAWS, 1), generator=torch.Generator().manual_seed(0))
    saliency = saliency.scatter_(1, places, 1).view(DRAWS, SIDE, SIDE)
    found = {}
    for name, make in METHODS.items():
        share = drawn(make(), x, saliency).target_lam.double()
        found[name] = {"mean": share.mean().item(), "deviation": share.std().item()}
    return found


def picture(x, saliency, path):
    """A line for each method: SHOWN times own image, partner, the part that stays, and both mixed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.05 * 4 * SHOWN + 1, 1.25 * len(METHODS)), layout="constrained")
    axes = figure.subplots(len(METHODS), 4 * SHOWN)
    for line, (name, make) in zip(axes, METHODS.items(), strict=True):
        mix = drawn(make(), x, saliency)
        stays = mix.apply(torch.ones_like(x), partner=torch.zeros_like(x))
        tiles = x, x[mix.index], stays, mix.apply(x)
        for k in range(SHOWN):
            share = float(mix.target_lam[k])
            for column, (tile, title) in enumerate(zip(tiles, ("own", "partner", f"{share:.2f} stays", "mixed"), strict=True)):
                at = line[4 * k + column]
                at.imshow(tile[k, 0].cpu().numpy(), cmap="viridis" if column == 2 else "gray_r", vmin=0, vmax=1)
                at.set_title(title, fontsize=8)
                at.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=80)


@one_thread()
def main(argv=None):
    args = parsed(parser("masks", __doc__.splitlines()[0], out="fastmix-masks", seeds=1, epochs=5), argv)
    from rich.console import Console

    console, data = Console(highlight=False, markup=False), digits.load(args.device)
    with repeatable(0, args.device):
        run = digits.fit(lambda model, seed: Mixed(), 0, args.epochs, data)
        for _ in range(args.epochs):
            run.epoch()
        _, x, _, y = data
        gradient = fastmix.input_gradient(run.model, x[:12], y[:12])
        saliency = enlarged(fastmix.saliency(gradient).unsqueeze(1)).squeeze(1)
        found = shares()
        picture(enlarged(x[:12]), saliency, args.out / "masks.png")
    rows = [[name, f"{share['mean']:.3f}", f"{share['deviation']:.3f}"] for name, share in found.items()]
    show(console, "The label's own share", ("method", "mean", "standard deviation"), rows, f"{DRAWS} draws, 32 x 32 pixels.")
    write(args.out / "shares.json", {"environment": environment(args.device), "shares": found})
    console.print(f"Wrote masks.png and shares.json to {args.out}.")


if __name__ == "__main__":
    main()
