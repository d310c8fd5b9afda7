"""The studies' tables of docs/recipes.md, and its last one: each claim of the papers beside what was found."""

import statistics

from fastmix.recipes import amp, attacks, cifar, corrupted, gan, speech, wafer
from fastmix.recipes._training import error_of_mean


def mean(values, places=1):
    """Mean ± standard error; of one value the value."""
    values = list(values)
    error = f" ± {error_of_mean(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{error}"


def of(runs, key):
    return [run[key] for run in runs]


def gaps(first, second, key):
    """[what the first has more than the second, of the same seed]."""
    return [a[key] - b[key] for a, b in zip(first, second, strict=True)]


def _seeds(found):
    return len(next(iter(found["methods"].values())))


# Sections: (columns, rows, number of seeds, remarks), as in report.py


def _corrupted(found):
    rows, keys = [], ("best_error_percent", "test_error_percent", "real_error_percent", "replaced_error_percent")
    for percent in (percent for percent in corrupted.SHARES if f"{percent} %, ERM" in found["methods"]):
        for name, numbers in corrupted.PAPER[percent].items():
            rows.append([f"{percent} %", f"paper: {name}", *(f"{number:g}" for number in numbers)])
        for name in corrupted.METHODS:
            rows.append([f"{percent} %", name, *(mean(of(found["methods"][f"{percent} %, {name}"], key)) for key in keys)])
    remarks = """Errors in
percent: the least over epochs and the last on the test set (the least is chosen on it), the last on training rows whose label stayed and, against the
wrong label, on replaced ones. Paper: CIFAR-10, PreAct ResNet-18, the best of what was searched. Here: 1,000 digits, 40 epochs, at 80 % 200; where the dropout is and
how the rate falls were picked by the test errors of seed 0 at 50 %."""
    if (first := found["methods"]["50 %, ERM"][0]["seed"]) > 0:
        remarks = f"Seeds from {first} on, which had no part in picking the settings above; columns as there."
    return ("replaced", "method", ">best", ">last", ">real labels", ">replaced labels"), rows, _seeds(found), remarks


def _attacks(found):
    runs, place = found["methods"], 1
    rows = [["none", "", "", *(mean(of(runs[name], "test_error_percent")) for name in attacks.SHOWN)]]
    for key in runs["ERM"][0]["attacks"]:
        attack, loss = key.split(", ")
        paper = [f"{number:g}" for number in attacks.PAPER[attack]] if loss == "cross_entropy" else ["", ""]
        rows.append([key.replace("_", "-"), *paper, *(mean(attacks.at(runs[name], key, place)) for name in attacks.SHOWN)])
    sure = ", ".join(f"{name} {mean(of(runs[name], 'mean_largest_probability'), 2)}" for name in attacks.SHOWN)
    remarks = f"""Top-1 error in
percent at eps {found["eps"][place]:g} of the pixels' range (paper: ImageNet, ResNet-101, 4 of 255). Black: images made for another network of empirical risk.
The mean largest probability on clean images: {sure}."""
    return (
        ("attack, loss", ">paper: ERM", ">paper: mixup", *(f">{name}" for name in attacks.SHOWN)),
        rows,
        _seeds(found),
        remarks,
    )


def _gan(found):
    rows = []
    run = [(loss, name) for loss in gan.LOSSES for name in gan.METHODS if f"ring, {loss}, {name}" in found["methods"]]
    for loss, name in run:
        ring, roll = (found["methods"][f"{data}, {loss}, {name}"] for data in gan.DATA)
        numbers = of(ring, "modes"), of(ring, "good_percent"), of(ring, "distance"), of(roll, "distance")
        rows.append([loss, name, *(mean(values, places) for values, places in zip(numbers, (1, 0, 2, 2), strict=True))])
    remarks = f"""After
{found["epochs"] * gan.STEPS} steps of the generator (the paper: 20,000, wider networks). A mode counts with 1 % of the samples within four deviations of it; distance: sliced Wasserstein."""
    left_out = [
        name for k, names in enumerate((gan.LOSSES, gan.METHODS)) for name in names if name not in {pair[k] for pair in run}
    ]
    remarks += f" Not run: {', '.join(left_out)}." * bool(left_out)
    columns = "generator's loss", "method", ">ring: modes of 8", ">good samples, %", ">ring: distance", ">swiss roll: distance"
    return columns, rows, _seeds(found), remarks


def _wafer(found):
    keys = *(f"top {k}" for k in range(1, 5)), *(f"exact {k}" for k in range(1, 4))
    rows = [[name, *(mean(of(runs, key)) if key in runs[0] else "" for key in keys)] for name, runs in found["methods"].items()]
    remarks = f"""{"MADE maps. " * found["made"]}Percent of the test maps with one, two, three or four kinds of defect, learned from single ones alone
({found["rows"][0]} maps; {found["dropped"]} left out that came twice). top k: the k largest scores are the k kinds; k, the number of kinds, is given.
exact: the scores above 0.5 are. Chosen on validation maps (single ones, and unions of two of them): {found["chosen"]}. The slides that this follows give 72 % for
plain training and 92 % with mixup on two kinds (WM-811K), without saying how a mixed map counts as right."""
    left_out = ", ".join(name for name in wafer.METHODS if name not in found["methods"])
    remarks += f" Not run: {left_out}." * bool(left_out)
    return ("method", *(f">{key}" for key in keys)), rows, _seeds(found), remarks


def _speech(found):
    rows = []
    for model in speech.MODELS:
        for k, name in enumerate(speech.ALPHAS):
            runs = found["methods"][f"{model}, {name}"]
            paper = [f"{number:g}" for number in speech.PAPER[model][k]] if k < 3 else ["", ""]
            rows.append(
                [model, name, *paper, *(mean(of(runs, key)) for key in ("validation_error_percent", "test_error_percent"))]
            )
    remarks = f"""Errors in
percent after {found["epochs"]} epochs on 2,400 spoken digits of six speakers (Free Spoken Digit Dataset, CC BY-SA 4.0); paper: Speech Commands, 30 words. VGG-11's channels are
divided by {found["width"]}; {found["warmup"]} epochs on clean rows before mixup. Two unseen speakers are few: errors vary much from pair to pair."""
    columns = "model", "method", ">paper: validation", ">paper: test", ">validation", ">unseen speakers"
    return columns, rows, _seeds(found), remarks


def _cifar(found):
    rows, base = [], found["methods"]["ERM"]
    for name, runs in found["methods"].items():
        gain = "" if runs is base else mean(gaps(base, runs, "test_error_percent"))
        curves = of(runs, "test_error_percent by epoch")
        passes = found["passes"][name]
        alike = [curve[max(1, int(len(curve) / passes)) - 1] for curve in curves]
        errors = mean(of(runs, "test_error_percent")), gain, mean(alike)
        rows.append([name, f"{found['decays'][name]:g}", f"{found['epochs'] * passes:g}", *errors])
    searched = "not searched for: the same for all"
    if found["held_out"]:
        searched = f"searched on held-out rows, {found['search_epochs']} epochs of one seed each"
    paper = "; ".join(f"{name} {erm:g} and {mixup:g}" for name, (erm, mixup) in cifar.PAPER.items())
    remarks = f"""5,000
training and 2,000 test images, {found["model"]} network{" in bfloat16" * found["bfloat16"]}, {found["epochs"]} epochs; weight decay {searched}. Passes: forward and backward, in epochs; "equal passes": the error when as many
passes were done as ERM's epochs hold, in a longer schedule's middle. Paper (50,000 images, 200 epochs), ERM and mixup: {paper}."""
    columns = "CIFAR-10", ">weight decay", ">passes", ">test error, %", ">gain over ERM", ">at equal passes, %"
    return columns, rows, _seeds(found), remarks


def _regression(found):
    rows = []
    tables = list(dict.fromkeys(name.split(", ")[0] for name in found["methods"]))
    for table in tables:
        base = found["methods"][f"{table}, ERM"]
        for arm, runs in found["methods"].items():
            if arm.startswith(table):
                gain = "" if runs is base else mean(gaps(base, runs, "rmse"), 2)
                rows.append([table, arm.split(", ")[1], mean(of(runs, "rmse"), 2), gain, mean(of(runs, "mape_percent"))])
    remarks = """After the
last of 60 epochs. The paper (RMSE, Airfoil): ERM 2.901, mixup 3.730, C-Mixup 2.717; bandwidths here are in standard deviations of the labels."""
    return ("table", "method", ">RMSE", ">gain over ERM", ">MAPE, %"), rows, _seeds(found), remarks


def _amp(found):
    rows = []
    for name, runs in found["methods"].items():
        base = found["methods"][amp.AGAINST[name]]
        gain = "" if runs is base else mean(gaps(base, runs, "test_error_percent"))
        moved = runs[0].get("lambda_moved")
        by = [
            f"{statistics.mean(of(runs, key)):.2g}" if moved else "" for key in ("lambda_moved", "loss_moved", "largest_weight")
        ]
        rows.append([name, mean(of(runs, "test_error_percent")), mean(of(runs, "best_error_percent")), gain, *by])
    remarks = """Errors
in percent. Gains: over word mixup, or over the transformer without mixing, seed by seed, last epoch. "Best on test" flatters every method; the authors' code reports
the best of 8,000 evaluations. Moved: the mean over rows of what lambda and the loss were moved by. The authors' step moves lambda by less than 1e-4:
what their second loss sees is another draw of dropout (drawn once, as in "reweighting alone", it moves by about as little), so it is their weights and dropout
that act, not an adversary. Not tried: pretrained vectors, BERT, 8,000 batches, the first rows of each class as the small set; so the printed gains are not refuted."""
    columns = (
        "TREC, a tenth of the questions",
        ">last epoch",
        ">best on test",
        ">gain",
        ">lambda moved",
        ">loss moved",
        ">largest weight",
    )
    return columns, rows, _seeds(found), remarks


def _augmix(found):
    keys = (
        "test_error_percent",
        "corrupted_error_percent",
        "calibration_error_percent",
        "corrupted_calibration_error_percent",
    )
    rows = [[name, *(mean(of(runs, key)) for key in keys)] for name, runs in found["methods"].items()]
    remarks = f"""Percent, after {found["epochs"]} epochs on
{found["train_images"]} digits, 32 x 32. Corrupted: the mean of eight corruptions at five strengths. Calibration: expected calibration error, 15 bins. The paper's
CIFAR-10-C errors (WideResNet): 26.9 without, 22.3 with mixup, 27.1 with CutMix, 11.2 with AugMix."""
    return ("method", ">clean error", ">corrupted", ">calibration", ">calibration, corrupted"), rows, _seeds(found), remarks


def _puzzle(found):
    moved = [f"{count:.2f}" for count in found["moved_blocks"].values()]
    rows = [
        [
            name,
            *(mean(of(runs, key)) for key in ("test_error_percent", "fgsm_error_percent")),
            *(moved if name == "PuzzleMix" else [""] * len(moved)),
        ]
        for name, runs in found["methods"].items()
    ]
    picked = "The rate and eps\nwere picked after others were seen on the test set. " * (found["dataset"] == "digits")
    remarks = f"""Percent, after {found["epochs"]} epochs on
{found["dataset"]}, 32 x 32; FGSM at eps {found["eps"]:.3g} of the pixels' range. Blocks that change place, of 64 of an image,
at two prices of a move (t_eps; the authors': 0.8), by the last network's saliency on test images, lambda 1/2. {picked}The paper's top-1 error on CIFAR-100 (WideResNet-28-10): 16.0 with PuzzleMix."""
    columns = "method", ">clean error", ">FGSM error", *(f">blocks moved at {price}" for price in found["moved_blocks"])
    return columns, rows, _seeds(found), remarks


SECTIONS = {
    "augmix": ("Corrupted digits: AugMix (arXiv:1912.02781)", _augmix),
    "puzzle": ("PuzzleMix, clean and attacked (arXiv:2009.06962)", _puzzle),
    "puzzle_cifar": ("PuzzleMix on a part of CIFAR-10", _puzzle),
    "amp": ("What AMP does to lambda, and TMix (arXiv:2109.07177, 2004.12239)", _amp),
    "cifar": ("CIFAR-10, a part of it (arXiv:1710.09412, Figure 3)", _cifar),
    "corrupted": ("Labels that are wrong (arXiv:1710.09412, Table 2)", _corrupted),
    "corrupted_more": ("Labels that are wrong: seeds that picked nothing", _corrupted),
    "attacks": ("Adversarial examples (arXiv:1710.09412, Table 3)", _attacks),
    "speech": ("Spoken words (arXiv:1710.09412, Figure 4)", _speech),
    "gan": ("GANs (arXiv:1710.09412, Figure 5)", _gan),
    "wafer": ("Wafer maps: learning single defects, finding several", _wafer),
    "regression": ("Numbers: C-Mixup (arXiv:2210.05775)", _regression),
}


# Claims


def verdict(values):
    """What gaps in the claimed direction, seed by seed, say of it."""
    if len(values) < 3:
        return f"not testable here ({('one seed', 'two seeds')[len(values) - 1]})"
    middle, error = statistics.mean(values), error_of_mean(values)
    return "reproduced" if middle > 2 * error else "contradicted" if middle < -2 * error else "not testable here"


def _tail(found, percent, first, second, key="test_error_percent"):
    return gaps(found["methods"][f"{percent} %, {first}"], found["methods"][f"{percent} %, {second}"], key)


def _attack_gap(found, key):
    first, second = (attacks.at(found["methods"][name], f"{key}, cross_entropy", 1) for name in ("ERM", "mixup"))
    return [a - b for a, b in zip(first, second, strict=True)]


def _memory(found):
    return _tail(found, 50, "mixup 8", "ERM", "replaced_error_percent")


def _text_gaps(found, name):
    """AMP's gains over a way of mixing, of all arms, the mean of each seed."""
    every = [gaps(arm[name], arm[f"{name}, AMP"], "test_error_percent") for arm in found["arms"].values()]
    return [statistics.mean(seed) for seed in zip(*every, strict=True)]


def _table_gaps(found):
    every = [gaps(of["scaled"]["ERM"], of["scaled"]["mixup 0.2"], "test_error_percent") for of in found["tables"].values()]
    return [statistics.mean(seed) for seed in zip(*every, strict=True)]


def _of(arm, other, key):
    """Gaps of two arms of a study."""
    return lambda found: gaps(found["methods"][arm], found["methods"][other], key)


def _misses(found):
    return [max(a["miss_percent"]) - max(b["miss_percent"]) for a, b in zip(*found["methods"].values(), strict=True)]


def _norms(found):
    return [a["jacobian_norm"][10] - b["jacobian_norm"][10] for a, b in zip(*found["methods"].values(), strict=True)]


DECAY = "weight decay 0.0001"
MIXUP = "1710.09412"
CLAIMS = (  # claim, source, recipe (or why there is none), gaps in the claimed direction, their unit
    ("mixup lowers the error on CIFAR-10", MIXUP, "cifar", _of("ERM", "mixup", "test_error_percent"), "% error"),
    ("mixup lowers the error on ImageNet, more with larger networks and longer training", MIXUP, None, None, "needs ImageNet and GPU days: docs/imagenet.md"),
    ("20 % wrong labels: mixup (8) ends below ERM", MIXUP, "corrupted", lambda found: _tail(found, 20, "ERM", "mixup 8"), "% error"),
    ("50 % wrong labels: mixup (8) ends below ERM", MIXUP, "corrupted", lambda found: _tail(found, 50, "ERM", "mixup 8"), "% error"),
    ("80 % wrong labels: mixup (32) ends below ERM", MIXUP, "corrupted", lambda found: _tail(found, 80, "ERM", "mixup 32"), "% error"),
    ("50 % wrong labels: mixup (8) ends below dropout", MIXUP, "corrupted", lambda found: _tail(found, 50, "dropout 0.5", "mixup 8"), "% error"),
    ("50 % wrong labels: mixup and dropout together end below mixup (8)", MIXUP, "corrupted", lambda found: _tail(found, 50, "mixup 8", "mixup 8 + dropout 0.3"), "% error"),
    ("mixup (8) does not learn wrong labels by heart, as ERM does", MIXUP, "corrupted", _memory, "% error on replaced labels"),
    ("FGSM, white box: mixup is more robust", MIXUP, "attacks", lambda found: _attack_gap(found, "white FGSM"), "% error"),
    ("I-FGSM, white box: mixup is more robust (by 0.3 in the paper)", MIXUP, "attacks", lambda found: _attack_gap(found, "white I-FGSM"), "% error"),
    ("FGSM, black box: mixup is more robust", MIXUP, "attacks", lambda found: _attack_gap(found, "black FGSM"), "% error"),
    ("I-FGSM, black box: mixup is more robust", MIXUP, "attacks", lambda found: _attack_gap(found, "black I-FGSM"), "% error"),
    ("speech: VGG-11 gains by mixup (0.2)", MIXUP, "speech", _of("VGG-11, ERM", "VGG-11, mixup 0.2", "test_error_percent"), "% error"),
    ("speech: LeNet does not gain by mixup (0.2)", MIXUP, "speech", _of("LeNet, mixup 0.2", "LeNet, ERM", "test_error_percent"), "% error"),
    ("UCI tables: mixup (0.2) lowers the error, mean of six", MIXUP, "tabular", _table_gaps, "% error"),
    ("a mixup GAN (0.2) reaches more modes of the ring (minimax)", MIXUP, "gan", _of("ring, minimax, mixup GAN 0.2", "ring, minimax, GAN", "modes"), "modes of 8"),
    ("a mixup GAN (0.2) comes nearer to the swiss roll (minimax)", MIXUP, "gan", _of("swiss roll, minimax, GAN", "swiss roll, minimax, mixup GAN 0.2", "distance"), "distance"),
    ("fewer misses between training points", MIXUP, "toy", _misses, "% misses"),
    ("smaller derivatives between training points", MIXUP, "toy", _norms, "norm"),
    ("mixing any class is better than mixing the same", MIXUP, "ablation", _of(f"inputs, same class, {DECAY}", f"inputs, any class, in proportion (mixup), {DECAY}", "test_error_percent"), "% error"),
    ("mixing labels in proportion is better than own labels", MIXUP, "ablation", _of(f"inputs, own label, {DECAY}", f"inputs, any class, in proportion (mixup), {DECAY}", "test_error_percent"), "% error"),
    ("mixing inputs is better than label smoothing (0.2)", MIXUP, "ablation", _of(f"labels only: smoothing 0.2, {DECAY}", f"inputs, any class, in proportion (mixup), {DECAY}", "test_error_percent"), "% error"),
    ("manifold mixup is better than mixup", "1806.05236", "digits", _of("mixup", "manifold mixup", "test_error_percent"), "% error"),
    ("CutMix is better than mixup", "1905.04899", "cifar", _of("mixup", "CutMix", "test_error_percent"), "% error"),
    ("PuzzleMix is better than mixup", "2009.06962", "cifar", _of("mixup", "PuzzleMix", "test_error_percent"), "% error"),
    ("AMP lowers the error of word mixup", "2109.07177", "text", lambda found: _text_gaps(found, "word mixup"), "% error"),
    ("AMP lowers the error of sentence mixup", "2109.07177", "text", lambda found: _text_gaps(found, "sentence mixup"), "% error"),
    ("AMP is steady over steps: 1 loses nothing against 0.01", "2109.07177", "amp", _of("AMP, step 0.01", "AMP, step 1", "test_error_percent"), "% error"),
    ("AMP by the authors' step and weights gains over word mixup with their loss", "2109.07177", "amp", _of("word mixup, authors' loss", "authors' step", "test_error_percent"), "% error"),
    ("TMix gains over a transformer without mixing", "2004.12239", "amp", _of("transformer, none", "transformer, TMix", "test_error_percent"), "% error"),
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
        values = gap(results[recipe])
        found, recipe = f"{mean(values, 2)} {unit}", recipe.replace("_more", " --first-seed 1")
        rows.append([claim, link, verdict(values), found, f"`recipes.{recipe}`"])
    return ("claim", "source", "here", "gap in the claimed direction", "by"), rows
