"""Learning single defects, finding several: wafer maps, `python -m fastmix.recipes.wafer`.

A network learns from wafer maps with one kind of defect, or none, and is asked which of eight kinds maps with one to four of them show.
Softmax and sigmoid losses, on the maps as they are (ERM), mixed in proportion, mixed with the union of the labels (a weak defect is still
a defect), with the union of the maps themselves (a die fails if it fails in either), and mixed by three. Half of the rows are mixed. Files:

    results.json   accuracy on one, two, three and four kinds, by the k largest scores (k is given: the number of kinds the map has) and, for
                   sigmoids, by exact sets at 0.5; recall of each kind; the way of mixing that validation maps choose
    wafer.png      maps, mixed maps, and what each network says of a map with two kinds

`--data` is a folder with MixedWM38's Wafer_Map_Datasets.npz (github.com/Junliangwangdhu/WaferMap). Its maps with two kinds and more are
never learned from; maps that are in both parts, and repeats, are left out. Without it maps are MADE by a generator of the nine patterns,
easier than real ones. Validation maps are single ones that were held out, and unions of two of them.

Source: Shin, Kahng and Kim, Computers & Industrial Engineering 167 (2022), doi 10.1016/j.cie.2022.107996.
"""

import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastmix
from fastmix.recipes._studies import figure_of, keep, train_arms
from fastmix.recipes._summaries import mean, numbers, show
from fastmix.recipes._training import Fit, one_thread, parsed, parser

KINDS = "Center", "Donut", "Edge-Loc", "Edge-Ring", "Loc", "Near-full", "Scratch", "Random"
WHOLE = [KINDS.index("Near-full"), KINDS.index("Random")]  # which hide every other kind
SIDE, FILE = 52, "Wafer_Map_Datasets.npz"
WHERE = "MixedWM38 from github.com/Junliangwangdhu/WaferMap"
METHODS = {  # name: (softmax or sigmoid, way of mixing)
    "softmax ERM": ("softmax", None),
    "softmax mixup": ("softmax", "proportional"),
    "sigmoid ERM": ("sigmoid", None),
    "sigmoid mixup, in proportion": ("sigmoid", "proportional"),
    "sigmoid mixup, union of labels": ("sigmoid", "union"),
    "sigmoid, union of maps": ("sigmoid", "maps"),
    "sigmoid, three mixed, union of labels": ("sigmoid", "three"),
    "sigmoid, union of up to three maps": ("sigmoid", "three maps"),
}


# Data


def array(path, name, shape):
    """An array of an npz, whose header is looked at before it is read. ValueError with a line that says what is wrong."""
    expected = f"{path}: expected {name} uint8 {list(shape)}"
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            found, _, dtype = read(file)
    except KeyError:
        raise ValueError(f"{expected}, which it does not have: take {WHERE}") from None
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{expected}, got {error}: take {WHERE}") from None
    fits = len(found) == len(shape) and all(want in (None, have) for want, have in zip(shape, found, strict=True))
    if dtype.hasobject or dtype.kind not in "uib" or not fits or found[0] > 10**6:
        raise ValueError(f"{expected}, got {dtype} {list(found)}: take {WHERE}")
    with np.load(path, allow_pickle=False) as archive:
        return archive[name]


def load(folder):
    """(maps uint8 [N, 52, 52] of 0, 1 and 2, labels [N, 8], which are to test on)."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: expected {WHERE}, got no such file")
    x, y = array(path, "arr_0", (None, SIDE, SIDE)), array(path, "arr_1", (None, len(KINDS)))
    if len(x) != len(y) or not np.isin(y, (0, 1)).all():
        raise ValueError(f"{path}: expected a row of 0 and 1 in arr_1 for each map, got {len(y)} for {len(x)}: take {WHERE}")
    with zipfile.ZipFile(path) as archive:
        has_split = "split.npy" in archive.namelist()
    test = array(path, "split", (len(x),)) == 1 if has_split else np.random.default_rng(0).random(len(x)) < 0.4
    if empty := [kind for kind, count in zip(KINDS, y[~test & (y.sum(1) == 1)].sum(0), strict=True) if not count]:
        raise ValueError(
            f"{path}: expected single maps of each kind to learn from, got none of {', '.join(empty)}: take {WHERE}"
        )
    return np.minimum(x, 2).astype(np.uint8), y.astype(np.int64), test


def without_repeats(x, y, test):
    """Each map once in the part to learn from, and not there if it is to test on; (..., how many were dropped)."""
    names = [row.tobytes() for row in x]
    tested, seen, stays = {name for name, of in zip(names, test, strict=True) if of}, set(), []
    for name, of in zip(names, test, strict=True):
        stays.append(bool(of) or not (name in tested or name in seen))
        seen.add(name)
    stays = np.array(stays)
    return x[stays], y[stays], test[stays], int((~stays).sum())


def pattern(kind, draw, radius, angle):
    """Where dice fail by one kind of defect, [SIDE, SIDE]."""
    edge = SIDE / 2 - 1
    if kind == "Center":
        return radius < draw.uniform(5, 10)
    if kind == "Donut":
        middle = draw.uniform(9, 13)
        return np.abs(radius - middle) < draw.uniform(2.5, 4)
    if kind == "Edge-Ring":
        return radius > edge - draw.uniform(1.5, 3)
    if kind == "Near-full":
        return draw.random(radius.shape) < 0.9
    if kind == "Random":
        return draw.random(radius.shape) < draw.uniform(0.3, 0.5)
    if kind == "Edge-Loc":
        away = np.abs((angle - draw.uniform(-np.pi, np.pi) + np.pi) % (2 * np.pi) - np.pi)
        return (radius > edge - draw.uniform(3, 6)) & (away < draw.uniform(0.3, 0.7))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    at, turn = draw.uniform(14, SIDE - 14, 2), draw.uniform(0, np.pi)
    if kind == "Loc":
        return np.hypot(rows - at[0], (columns - at[1]) * draw.uniform(0.7, 1.4)) < draw.uniform(4, 6)
    along = (rows - at[0]) * np.sin(turn) + (columns - at[1]) * np.cos(turn)  # a scratch
    across = (rows - at[0]) * np.cos(turn) - (columns - at[1]) * np.sin(turn)
    return (np.abs(across) < 1) & (np.abs(along) < draw.uniform(9, 16))


def made(singles=170, mixed=50):
    """Maps of the nine patterns, and of two to four kinds that the published set has together."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    radius, angle = np.hypot(rows, columns), np.arctan2(rows, columns)
    edges, middles = ("Edge-Loc", "Edge-Ring"), ("Center", "Donut")
    sets = [(kind,) for kind in KINDS] + [()]
    for with_loc in (False, True):
        for with_scratch in (False, True):
            more = ("Loc",) * with_loc + ("Scratch",) * with_scratch
            sets += [(a, b, *more) for a in middles for b in edges]
            sets += [(a, *more) for a in (*middles, *edges) if more]
            sets += [more] if len(more) == 2 else []
    x, y, test = [], [], []
    for kinds in sets:
        count = mixed if len(kinds) > 1 else singles
        for number in range(count):
            fails = draw.random(radius.shape) < draw.uniform(0.02, 0.1)
            for kind in kinds:
                fails |= pattern(kind, draw, radius, angle) & (draw.random(radius.shape) < draw.uniform(0.75, 1))
            x.append(np.where(radius < SIDE / 2, 1 + fails, 0).astype(np.uint8))
            y.append([int(kind in kinds) for kind in KINDS])
            test.append(len(kinds) > 1 or number % 5 < 2)
    return np.stack(x), np.array(y), np.array(test)


def planes(x, device):
    """[N, 2, 52, 52]: which dice are there, and which failed."""
    x = torch.as_tensor(x, device=device)
    return torch.stack((x > 0, x == 2), 1).float()


def parts(data, device):
    """(train x, y, validation x, y, test x, y): one in ten single maps is held out, and unions of two of those are added to it."""
    x, y, test = data
    single = np.flatnonzero(~test & (y.sum(1) < 2))
    held = single[np.arange(len(single)) % 10 == 0]
    train = np.setdiff1d(single, held)
    draw = np.random.default_rng(1)
    one, two = (draw.permutation(held[y[held].sum(1) == 1]).repeat(4) for _ in range(2))
    fair = ((y[one] * y[two]).sum(1) == 0) & (y[one][:, WHOLE].sum(1) + y[two][:, WHOLE].sum(1) == 0)
    one, two = one[fair], two[fair]
    check_x, check_y = np.concatenate((x[held], np.maximum(x[one], x[two]))), np.concatenate((y[held], y[one] | y[two]))
    found = (x[train], y[train]), (check_x, check_y), (x[test], y[test])
    return [part for x, y in found for part in (planes(x, device), torch.tensor(y, device=device).float())]


# Learning


class WaferLoss(nn.Module):
    """The loss of one method. Softmax has a ninth class, no defect."""

    def __init__(self, activation, way, seed):
        super().__init__()
        self.activation, self.way = activation, way
        label = "union" if way in ("union", "maps", "three maps") else "proportional"
        self.mixer = fastmix.Mixup(1.0, prob=0.5, label=label, seed=seed) if way else None
        self.second = fastmix.Mixup(1.0, prob=0.5, seed=seed + 1) if way in ("three", "three maps") else None

    def forward(self, model, x, y):
        if self.activation == "softmax":
            target = torch.where(y.sum(1) == 0, len(KINDS), y.argmax(1))
            if self.mixer is not None:
                x, target = self.mixer(x, target)
            return fastmix.soft_cross_entropy(model(x), target)
        if self.way in ("proportional", "union"):
            x, y = self.mixer(x, y)
        elif self.way is not None:
            x, y = self.united(x, y)
        return fastmix.soft_binary_cross_entropy(model(x)[:, : len(KINDS)], y)

    def united(self, x, y):
        """Maps with those of one or two others: of half the rows, a quarter with a third one."""
        mix = self.mixer.sample(x)
        join = mix.lam != 1
        third = join if self.second is None else join & (self.second.sample(x).lam != 1)
        third_index = mix.index[mix.index]
        if self.way == "three":
            weights = fastmix.dirichlet(len(x), 3, device=x.device)
            two = weights * torch.tensor([1.0, 1, 0], device=x.device)
            weights = torch.where(third.unsqueeze(1), weights, two / two.sum(1, keepdim=True))
            weights = torch.where(join.unsqueeze(1), weights, torch.tensor([1.0, 0, 0], device=x.device))
            x_mixed = fastmix.convex_combination((x, x[mix.index], x[third_index]), weights)
            there = (weights > 0).to(y.dtype)
            rows = torch.stack((y, y[mix.index], y[third_index]), 1) * there.unsqueeze(2)
            return x_mixed, rows.amax(1)
        maps, labels = x, y
        for at, which in ((mix.index, join), *([(third_index, third)] if self.way == "three maps" else [])):
            maps = torch.where(which.view(-1, 1, 1, 1), torch.maximum(maps, x[at]), maps)
            labels = torch.where(which.unsqueeze(1), torch.maximum(labels, y[at]), labels)
        return maps, labels


def network():
    def block(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)

    blocks = *block(2, 16), *block(16, 32), *block(32, 64), *block(64, 64)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 9, 128), nn.ReLU(), nn.Linear(128, len(KINDS) + 1))


@torch.no_grad()
def scores(model, x):
    return torch.cat([model.eval()(part) for part in x.split(500)])[:, : len(KINDS)]


def measured(z, y, activation):
    """{what: percent} by the number of kinds that maps have."""
    found = {}
    for kinds in range(1, 5):
        rows = y.sum(1) == kinds
        if not rows.any():
            continue
        top = torch.zeros_like(y[rows]).scatter(1, z[rows].topk(kinds, 1).indices, 1)
        found[f"top {kinds}"] = 100 * (top == y[rows]).all(1).float().mean().item()
        if activation == "sigmoid":
            found[f"exact {kinds}"] = 100 * ((z[rows] > 0) == (y[rows] > 0)).all(1).float().mean().item()
    return found


def fit(data, name, epochs, seed):
    x, y, check_x, check_y, *_ = data
    activation, way = METHODS[name]
    model = network().to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 50))

    def evaluate(model):
        return {f"validation {key}": value for key, value in measured(scores(model, check_x), check_y, activation).items()}

    options = {"batch": 50, "optimizer": optimizer, "schedule": schedule, "evaluate": evaluate}
    return Fit(seed, model, WaferLoss(activation, way, seed), x, y, **options)


def tested(data, models, name, seed):
    *_, x, y = data
    z, activation = scores(models[name], x), METHODS[name][0]
    several = y.sum(1) > 1
    top = torch.zeros_like(y).scatter(
        1, z.argsort(1, descending=True), (torch.arange(8, device=y.device) < y.sum(1, keepdim=True)).to(y.dtype)
    )
    recall = {
        kind: 100 * top[several & (y[:, k] > 0), k].mean().item()
        for k, kind in enumerate(KINDS)
        if (several & (y[:, k] > 0)).any()
    }
    return {**measured(z, y, activation), "recall on mixed maps": recall}


# What is said


def chosen(results):
    """The way of mixing whose validation maps, single and of two kinds, are best."""
    value = lambda runs: sum(run["validation top 1"] + run["validation top 2"] for run in runs)  # noqa: E731
    return max((name for name in results if METHODS[name][1]), key=lambda name: value(results[name]))


TITLE = "Wafer maps: learning single defects, finding several"


def summary(found):
    keys = *(f"top {k}" for k in range(1, 5)), *(f"exact {k}" for k in range(1, 4))
    rows = []
    for name, runs in found["methods"].items():
        rows.append([name, *(mean(numbers(runs, key)) if key in runs[0] else "" for key in keys)])
    remarks = f"""{"MADE maps. " * found["made"]}Percent of the test maps with one, two, three or four kinds of defect, learned from single ones alone
({found["rows"][0]} maps; {found["dropped"]} left out that came twice). top k: the k largest scores are the k kinds; k, the number of kinds, is given.
exact: the scores above 0.5 are. Chosen on validation maps (single ones, and unions of two of them): {found["chosen"]}. The slides that this follows give 72 % for
plain training and 92 % with mixup on two kinds (WM-811K), without saying how a mixed map counts as right."""
    left_out = ", ".join(name for name in METHODS if name not in found["methods"])
    remarks += f" Not run: {left_out}." * bool(left_out)
    return ("method", *(f">{key}" for key in keys)), rows, remarks


def recall(console, results):
    rows = []
    for name, runs in results.items():
        of = [run["recall on mixed maps"] for run in runs]
        rows.append([name, *(f"{sum(run[kind] for run in of) / len(of):.0f}" for kind in of[0])])
    show(console, "Recall of each kind on maps with several, top k, %", ("method", *of[0]), rows)


def picture(data, models, path):
    x, y, _, _, test_x, test_y = (part.cpu() for part in data)
    mixed = fastmix.Mixup(1.0, partner="different", seed=3).sample(x, y.argmax(1))
    figure = figure_of(13, 6.8)
    axes = figure.subplots(3, 6)
    name = lambda row: " + ".join(kind for kind, there in zip(KINDS, row.tolist(), strict=True) if there) or "normal"  # noqa: E731
    plain = (y.sum(1) == 1) & (y[:, WHOLE].sum(1) == 0)  # maps of which something is seen in a mixed one
    some = (plain & plain[mixed.index]).nonzero()[:, 0]
    some = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(0))[:2]]
    for column, i in enumerate(some.tolist()):
        j = mixed.index[i].item()
        shown = (x[i], name(y[i])), (x[j], name(y[j])), (mixed.apply(x)[i], f"mixup: {mixed.lam[i]:.2f} of the first")
        for place, (image, title) in enumerate(shown):
            axes[0, 3 * column + place].imshow(image.sum(0).numpy(), vmin=0, vmax=2, cmap="magma_r")
            axes[0, 3 * column + place].set_title(title, fontsize=9)
    two = (test_y.sum(1) == 2).nonzero()[:, 0]
    two = two[torch.randperm(len(two), generator=torch.Generator().manual_seed(1))[:4]]
    for cell, i in zip((*axes[1, :4:2], *axes[2, :4:2]), two.tolist(), strict=True):
        cell.imshow(test_x[i].sum(0).numpy(), vmin=0, vmax=2, cmap="magma_r")
        cell.set_title(name(test_y[i]), fontsize=9)
    for cell, i in zip((*axes[1, 1:4:2], *axes[2, 1:4:2]), two.tolist(), strict=True):
        lines = []
        for method in ("softmax ERM", "softmax mixup", "sigmoid mixup, union of labels", "sigmoid, union of maps"):
            z = scores(models[method], data[4][i : i + 1]).cpu()[0]
            lines.append(f"{method}:\n  {', '.join(KINDS[k] for k in z.topk(2).indices.tolist())}")
        cell.text(0, 0.5, "\n".join(lines), fontsize=8, va="center")
    for cell, i in zip(axes[1:, 4], some.tolist(), strict=True):
        j = mixed.index[i].item()
        cell.imshow(torch.maximum(x[i], x[j]).sum(0).numpy(), vmin=0, vmax=2, cmap="magma_r")
        cell.set_title(f"union: {name(torch.maximum(y[i], y[j]))}", fontsize=9)
    for cell in axes.flat:
        cell.set_axis_off()
    figure.savefig(path, dpi=90)


@one_thread()
def main(argv=None):
    folder = Path(), f"folder with {FILE}; without it maps are made by a generator"
    options = parser("wafer", __doc__.splitlines()[0], out="fastmix-wafer", seeds=3, epochs=25, data=folder, small=1)
    options.set_defaults(data=None)
    args = parsed(options, argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    try:
        content = made() if args.data is None else load(args.data)
    except (ValueError, OSError) as error:
        options.error(f"--data: {error}")
    *content, dropped = without_repeats(*content)
    if args.small:
        some = ~content[2] | (np.arange(len(content[0])) % 5 == 0)
        content = [part[some] for part in content]
    data = parts(content, args.device)
    console.print(
        f"{'Maps MADE by a generator' if args.data is None else 'MixedWM38'}: {len(data[0])} single ones to learn from, {len(data[4])} to test on; "
        f"{dropped} left out that came twice. {args.seeds} seeds, {args.epochs} epochs.\n"
    )
    arms = {name: (args.epochs, partial(fit, data, name, args.epochs)) for name in METHODS}
    results, models, runs = train_arms(args, "wafer", arms, console, data, partial(tested, data))
    about = {"made": args.data is None, "dropped": dropped, "chosen": chosen(results)}
    keep(args, results, data, (TITLE, summary), console, **about, rows=[len(part) for part in data[::2]])
    recall(console, results)
    picture(data, models, args.out / "wafer.png")
    runs.finish("results.json", "wafer.png")


if __name__ == "__main__":
    main()
