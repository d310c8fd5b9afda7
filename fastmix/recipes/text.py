"""mixup of words and of sentences, with and without Adversarial Mixing Policy, on TREC questions: `python -m fastmix.recipes.text`.

A TextCNN and a BiLSTM learn to tell what kind of answer a question wants (six classes), from all training questions and from a
few (low-resource). Word mixup mixes the embedded words of two questions, position by position; sentence mixup their pooled
states. AMP trains on the larger of two losses, at the lambda that was drawn and at one moved uphill. One protocol for all: per
seed the same initial weights, the same subset and the same batches; Adam, embeddings learned from scratch, as many epochs more
for few questions, up to three times; the error that counts is the last epoch's. The words that have an embedding are those of
all training questions, also where few are learned from. Widths, epochs and the adversary's steps were not searched for: the
steps are the first that were tried on a held-out tenth of the training set, where others did no better. Files:

    results.json   every run's errors and curves, and digests of its weights: the same bits on every run of one machine
    text.png       the errors, and each AMP run against plain mixup of the same seed

The folder holds train_5500.label and TREC_10.label of https://cogcomp.seas.upenn.edu/Data/QA/QC (Li and Roth, "Learning
Question Classifiers", COLING 2002).

Sources: word and sentence mixup, arXiv:1905.08941; AMP, arXiv:2109.07177.
"""

import statistics
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastmix
from fastmix.recipes._summaries import error_of_mean, mean, numbers, tell
from fastmix.recipes._training import (
    COLORS,
    Adversarial,
    Fit,
    Mixed,
    MixedInside,
    Runs,
    environment,
    error_and_loss,
    one_thread,
    parsed,
    parser,
    write,
)

FILES = {"train": "train_5500.label", "test": "TREC_10.label"}
BATCH, WIDTH = 50, 64
ALPHA, STEP, MOST = 1.0, 0.1, 0.2  # of Beta; the adversary's step by a row's own gradient, and the most it moves lambda


# Questions


def questions(path):
    """[(class, words)] of one file. ValueError naming a line that is none."""
    found = []
    for number, line in enumerate(path.read_text(encoding="iso-8859-1").split("\n"), 1):
        if not line.strip():
            continue
        label, *words = line.split()
        if ":" not in label or not words:
            raise ValueError(f"{path}, line {number}: expected 'COARSE:fine words of the question', got {line[:40]!r}")
        found.append((label.split(":")[0], [word.lower() for word in words]))
    if not found:
        raise ValueError(f"{path}: expected questions, got none")
    return found


def load(folder, device):
    """(train words [N, L], train classes, test words, test classes, how many words, how many classes). 0 pads, 1 is any word
    that came less than twice in the training set."""
    train, test = (questions(folder / FILES[part]) for part in ("train", "test"))
    counts: dict[str, int] = {}
    for _, words in train:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    known = {word: number for number, word in enumerate(sorted(w for w, count in counts.items() if count > 1), 2)}
    labels = sorted({label for label, _ in train})
    if strange := {label for label, _ in test} - set(labels):
        raise ValueError(f"{folder / FILES['test']}: classes that the training set does not have: {', '.join(sorted(strange))}")
    longest = max(len(words) for _, words in train + test)
    tensors = []
    for part in (train, test):
        numbers = [[known.get(word, 1) for word in words] + [0] * (longest - len(words)) for _, words in part]
        tensors += [
            torch.tensor(numbers, device=device),
            torch.tensor([labels.index(label) for label, _ in part], device=device),
        ]
    return *tensors, len(known) + 2, len(labels)


# Models. `encoder` takes embedded words [N, L, D] and which of them are there, `head` what is pooled of them


class TextCNN(nn.Module):
    """Convolutions over 3, 4 and 5 words, each filter's largest answer (Kim, arXiv:1408.5882)."""

    def __init__(self, width):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(width, WIDTH, size, padding=size // 2) for size in (3, 4, 5))
        self.features = 3 * WIDTH

    def forward(self, h, there):
        h = h.transpose(1, 2)
        pooled = []
        for convolution in self.convolutions:
            answers = convolution(h)[..., : there.shape[1]].masked_fill(~there.unsqueeze(1), -torch.inf)
            pooled.append(answers.amax(2))
        return torch.relu(torch.cat(pooled, 1))


class BiLSTM(nn.Module):
    """One layer in both directions, the largest of each state."""

    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, WIDTH, batch_first=True, bidirectional=True)
        self.features = 2 * WIDTH

    def forward(self, h, there):
        # packed, so that the way back begins at a question's last word, not in its padding
        packed = pack_padded_sequence(h, there.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=-torch.inf)
        return states.amax(1)


class Classifier(nn.Module):
    def __init__(self, encoder, words, classes, width=WIDTH):
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.encoder = encoder(width)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(self.encoder.features, classes))

    def forward(self, words):
        there = words != 0
        if words.is_cpu:  # no longer than the batch's longest question
            longest = int(there.sum(1).max())
            words, there = words[:, :longest], there[:, :longest]
        return self.head(self.encoder(self.embedding(words), there=there))


MODELS = {"TextCNN": TextCNN, "BiLSTM": BiLSTM}
WORDS = {"masks": {"there": "attend"}}  # a mixed question has the words of both


def mixed(place, adversary=False):
    def objective(model, seed):
        module, options = (model.encoder, WORDS) if place == "word" else (model.head, {})
        manifold = fastmix.ManifoldMixup((module,), ALPHA, seed=seed, **options)
        if adversary:
            return Adversarial(manifold, inside=options, step_size=STEP, max_step=MOST)
        return MixedInside(manifold)

    return objective


METHODS = {  # name: (model, seed) -> objective
    "none": lambda model, seed: Mixed(),
    "word mixup": mixed("word"),
    "word mixup, AMP": mixed("word", adversary=True),
    "sentence mixup": mixed("sentence"),
    "sentence mixup, AMP": mixed("sentence", adversary=True),
}


def fit(data, fraction, encoder, objective, seed, epochs, device):
    x, y, test_x, test_y, words, classes = data
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: max(1, round(fraction * len(x)))].to(device)
    model = Classifier(encoder, words, classes).to(device)
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    evaluate = lambda model: error_and_loss(model(test_x), test_y)  # noqa: E731
    options = {"batch": BATCH, "optimizer": optimizer, "evaluate": evaluate}
    return Fit(seed, model, objective(model, seed), x[some], y[some], **options)


# What is said


def gains(results, name):
    """Error of plain mixup minus that of AMP on top of it, seed by seed."""
    plain, moved = ([run["test_error_percent"] for run in results[method]] for method in (name, f"{name}, AMP"))
    return [a - b for a, b in zip(plain, moved, strict=True)]


TITLE = "Adversarial Mixing Policy on text (arXiv:2109.07177)"


def summary(found):
    arms = found["arms"].values()
    rows = [[name, *(mean(numbers(of[name], "test_error_percent")) for of in arms)] for name in METHODS]
    for name in (name for name in METHODS if f"{name}, AMP" in METHODS):
        rows.append([f"AMP's gain over {name}", *(mean(gains(of, name)) for of in arms)])
    remarks = """A gain is plain
mixup's error minus AMP's, seed by seed: within two standard errors of 0 it may be chance. Word vectors are learnt from scratch, where
the papers start from pretrained ones."""
    return ("TREC questions, test error in %", *(f">{arm}" for arm in found["arms"])), rows, remarks


def picture(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(results) + 1, 6.5), layout="constrained")
    above, below = figure.subplots(2, len(results), squeeze=False, height_ratios=(3, 2))
    for cell, other, (head, of) in zip(above, below, results.items(), strict=True):
        for k, name in enumerate(METHODS):
            errors = [run["test_error_percent"] for run in of[name]]
            cell.scatter([k] * len(errors), errors, s=10, color=COLORS[k], alpha=0.5)
            cell.errorbar(k, statistics.mean(errors), error_of_mean(errors), fmt="o", color=COLORS[k], capsize=4)
        cell.set_title(head, fontsize=11)
        cell.set_xticks(range(len(METHODS)), METHODS, rotation=30, ha="right", fontsize=8)
        for k, name in enumerate(("word mixup", "sentence mixup")):
            found = gains(of, name)
            other.scatter([k] * len(found), found, s=10, color=COLORS[2 * k + 2], alpha=0.6)
            other.errorbar(k, statistics.mean(found), error_of_mean(found), fmt="o", color="black", capsize=4)
        other.axhline(0, lw=0.8, color="black")
        other.set(xlim=(-0.6, 1.6))
        other.set_xticks(range(2), ("word", "sentence"))
        for axes in (cell, other):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, axis="y")
    above[0].set_ylabel("test error (%)")
    below[0].set_ylabel("AMP's gain (%)")
    figure.savefig(path, dpi=120)


@one_thread()
def main(argv=None):
    data = Path("trec"), "folder with TREC's two files"
    options = parser("text", __doc__.splitlines()[0], out="fastmix-text", seeds=10, epochs=10, data=data, small=1)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="only these (default: both)")
    options.add_argument(
        "--fractions", nargs="+", type=float, default=[0.1, 1.0], help="of the training questions (default: 0.1 1)"
    )
    args = parsed(options, argv)
    if args.small:
        args.fractions = args.fractions[:1]
    if not all(0 < fraction <= 1 for fraction in args.fractions):
        options.error(f"--fractions: expected numbers in (0, 1], got {args.fractions}")
    if missing := [name for name in FILES.values() if not (args.data / name).exists()]:
        options.error(
            f"--data: expected a folder with {' and '.join(FILES.values())}; not in {args.data}: {', '.join(missing)}"
        )
    from rich.console import Console

    try:
        loaded = load(args.data, args.device)
    except ValueError as error:
        options.error(f"--data: {error}")
    console = Console(highlight=False, markup=False)
    console.print(
        f"{len(loaded[0])} questions to train on, {len(loaded[2])} to test on; {loaded[4]} words, {args.seeds} seeds.\n"
    )
    args.fractions, args.models = list(dict.fromkeys(args.fractions)), list(dict.fromkeys(args.models))
    arms = {f"{model}, {100 * fraction:g} %": (model, fraction) for fraction in args.fractions for model in args.models}
    results = {arm: {name: [] for name in METHODS} for arm in arms}
    lengths = {fraction: round(args.epochs / max(fraction, 1 / 3)) for fraction in args.fractions}
    total = args.seeds * len(METHODS) * len(args.models) * sum(lengths.values())
    settings = {"recipe": "text", "seeds": args.seeds, "epochs": args.epochs, "arms": list(arms), "device": str(args.device)}
    with Runs(args.out, settings, total, console, loaded) as runs:
        for seed in runs.seeds(0, args.seeds, arms):
            for arm, (model, fraction) in arms.items():
                for name, objective in METHODS.items():
                    make = partial(fit, loaded, fraction, MODELS[model], objective, seed, lengths[fraction], args.device)
                    _, result, _ = runs.run(f"{arm}, {name}", seed, lengths[fraction], make)
                    results[arm][name].append(result)
    found = {"environment": environment(args.device), "epochs": lengths, "arms": results}
    tell(console, TITLE, summary(found))
    write(args.out / "results.json", found)
    picture(results, args.out / "text.png")
    runs.finish("results.json", "text.png")


if __name__ == "__main__":
    main()
