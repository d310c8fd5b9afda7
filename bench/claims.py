"""The last table of docs/recipes.md: each claim of the papers beside what was found."""

import statistics

from fastmix.recipes import attacks
from fastmix.recipes._summaries import error_of_mean, gaps, mean


def verdict(values):
    """What gaps in the claimed direction, seed by seed, say of it."""
    if len(values) < 3:
        return f"not testable here ({('one seed', 'two seeds')[len(values) - 1]})"
    middle, error = statistics.mean(values), (1 + 1e-9) * error_of_mean(values)  # equal is not more, whatever the rounding
    return "reproduced" if middle > 2 * error else "contradicted" if middle < -2 * error else "not testable here"


def _of(arm, other, key="test_error_percent"):
    """Gaps of two arms of a study."""
    return lambda found: gaps(found["methods"][arm], found["methods"][other], key)


def _attack(key):
    """Of a white or black attack's errors."""

    def found_gaps(found):
        first, second = (attacks.at(found["methods"][name], f"{key}, cross_entropy", 1) for name in ("ERM", "mixup"))
        return [a - b for a, b in zip(first, second, strict=True)]

    return found_gaps


def _over(pairs):
    """The mean over several arms of each seed; pairs(found) gives the two lists of runs of each."""
    return lambda found: [statistics.mean(seed) for seed in zip(*(gaps(*pair) for pair in pairs(found)), strict=True)]


def _amp(name):
    return _over(lambda found: [(arm[name], arm[f"{name}, AMP"]) for arm in found["arms"].values()])


_tables = _over(lambda found: [(of["scaled"]["ERM"], of["scaled"]["mixup 0.2"]) for of in found["tables"].values()])


def _misses(found):
    return [max(a["miss_percent"]) - max(b["miss_percent"]) for a, b in zip(*found["methods"].values(), strict=True)]


def _norms(found):
    return [a["jacobian_norm"][10] - b["jacobian_norm"][10] for a, b in zip(*found["methods"].values(), strict=True)]


DECAY = "weight decay 0.0001"
MIXUP = "1710.09412"
CLAIMS = (  # claim, source, recipe (or why there is none), gaps in the claimed direction, their unit
    ("mixup lowers the error on CIFAR-10 (here: a tenth of it, a small network, 30 epochs)", MIXUP, "cifar", _of("ERM", "mixup"), "% error"),
    ("mixup lowers the error on ImageNet, more with larger networks and longer training", MIXUP, None, None, "needs ImageNet and GPU days: docs/imagenet.md"),
    ("20 % wrong labels: mixup (8) ends below ERM", MIXUP, "corrupted", _of("20 %, ERM", "20 %, mixup 8"), "% error"),
    ("50 % wrong labels: mixup (8) ends below ERM", MIXUP, "corrupted", _of("50 %, ERM", "50 %, mixup 8"), "% error"),
    ("80 % wrong labels: mixup (32) ends below ERM", MIXUP, "corrupted", _of("80 %, ERM", "80 %, mixup 32"), "% error"),
    ("50 % wrong labels: mixup (8) ends below dropout", MIXUP, "corrupted", _of("50 %, dropout 0.5", "50 %, mixup 8"), "% error"),
    ("50 % wrong labels: mixup and dropout together end below mixup (8)", MIXUP, "corrupted", _of("50 %, mixup 8", "50 %, mixup 8 + dropout 0.3"), "% error"),
    ("80 % wrong labels: mixup and dropout together end below mixup (8)", MIXUP, "corrupted", _of("80 %, mixup 8", "80 %, mixup 8 + dropout 0.3"), "% error"),
    ("mixup (8) does not learn wrong labels by heart, as ERM does", MIXUP, "corrupted", _of("50 %, mixup 8", "50 %, ERM", "replaced_error_percent"), "% error on replaced labels"),
    ("FGSM, white box: mixup is more robust", MIXUP, "attacks", _attack("white FGSM"), "% error"),
    ("I-FGSM, white box: mixup is more robust (by 0.3 in the paper)", MIXUP, "attacks", _attack("white I-FGSM"), "% error"),
    ("FGSM, black box: mixup is more robust", MIXUP, "attacks", _attack("black FGSM"), "% error"),
    ("I-FGSM, black box: mixup is more robust", MIXUP, "attacks", _attack("black I-FGSM"), "% error"),
    ("speech: VGG-11 gains by mixup (0.2)", MIXUP, "speech", _of("VGG-11, ERM", "VGG-11, mixup 0.2"), "% error"),
    ("speech: LeNet does not gain by mixup (0.2)", MIXUP, "speech", _of("LeNet, mixup 0.2", "LeNet, ERM"), "% error"),
    ("UCI tables: mixup (0.2) lowers the error, mean of six", MIXUP, "tabular", _tables, "% error"),
    ("a mixup GAN (0.2) reaches more modes of the ring (minimax)", MIXUP, "gan", _of("ring, minimax, mixup GAN 0.2", "ring, minimax, GAN", "modes"), "modes of 8"),
    ("a mixup GAN (0.2) comes nearer to the swiss roll (minimax)", MIXUP, "gan", _of("swiss roll, minimax, GAN", "swiss roll, minimax, mixup GAN 0.2", "distance"), "distance"),
    ("fewer misses between training points", MIXUP, "toy", _misses, "% misses"),
    ("smaller derivatives between training points", MIXUP, "toy", _norms, "norm"),
    ("mixing any class is better than mixing the same", MIXUP, "ablation", _of(f"inputs, same class, {DECAY}", f"inputs, any class, in proportion (mixup), {DECAY}"), "% error"),
    ("mixing labels in proportion is better than own labels", MIXUP, "ablation", _of(f"inputs, own label, {DECAY}", f"inputs, any class, in proportion (mixup), {DECAY}"), "% error"),
    ("mixing inputs is better than label smoothing (0.2)", MIXUP, "ablation", _of(f"labels only: smoothing 0.2, {DECAY}", f"inputs, any class, in proportion (mixup), {DECAY}"), "% error"),
    ("manifold mixup is better than mixup", "1806.05236", "digits", _of("mixup", "manifold mixup"), "% error"),
    ("CutMix is better than mixup", "1905.04899", "cifar", _of("mixup", "CutMix"), "% error"),
    ("PuzzleMix is better than mixup", "2009.06962", "cifar", _of("mixup", "PuzzleMix"), "% error"),
    ("AMP lowers the error of word mixup", "2109.07177", "text", _amp("word mixup"), "% error"),
    ("AMP lowers the error of sentence mixup", "2109.07177", "text", _amp("sentence mixup"), "% error"),
    ("AMP is steady over steps: 1 loses nothing against 0.01", "2109.07177", "amp", _of("AMP, step 0.01", "AMP, step 1"), "% error"),
    ("AMP by the authors' step and weights gains over word mixup with their loss", "2109.07177", "amp", _of("word mixup, authors' loss", "authors' step"), "% error"),
    ("TMix gains over a transformer without mixing", "2004.12239", "amp", _of("transformer, none", "transformer, TMix"), "% error"),
    ("C-Mixup (0.1) is better than mixup: diabetes", "2210.05775", "regression", _of("diabetes, mixup", "diabetes, C-Mixup 0.1", "rmse"), "RMSE"),
    ("C-Mixup (0.1) is better than mixup: abalone", "2210.05775", "regression", _of("abalone, mixup", "abalone, C-Mixup 0.1", "rmse"), "RMSE"),
    ("single defects learned with mixup: two are found (softmax)", "", "wafer", _of("softmax mixup", "softmax ERM", "top 2"), "% right"),
    ("... and single ones are found about as well (loss of up to 1)", "", "wafer", lambda found: [1 + gap for gap in _of("softmax mixup", "softmax ERM", "top 1")(found)], "% right beyond a loss of 1"),
)  # fmt: skip


def claims(results):
    """(columns, rows) of every claim, of {recipe: what it wrote}."""
    rows = []
    for claim, source, recipe, gap, unit in CLAIMS:
        link = f"[arXiv:{source}](https://arxiv.org/abs/{source})" if source else "the wafer study"
        if recipe is None or recipe not in results:
            rows.append([claim, link, "not testable here", unit if recipe is None else "not run", ""])
            continue
        values, command = gap(results[recipe]), f"recipes.{recipe}"
        if recipe == "corrupted" and (first := results[recipe]["methods"]["50 %, ERM"][0]["seed"]):
            command += f" --first-seed {first}"
        rows.append([claim, link, verdict(values), f"{mean(values, 2)} {unit}", f"`{command}`"])
    return ("claim", "source", "here", "gap in the claimed direction", "by"), rows
