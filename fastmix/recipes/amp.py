"""What Adversarial Mixing Policy does to lambda, and TMix: `python -m fastmix.recipes.amp --data FOLDER`.

On a tenth of TREC's questions, by the protocol of `fastmix.recipes.text`. A TextCNN learns from word mixup; with AMP by steps of 0.01 to 1
along each row's own gradient (the documents say that the mask makes it steady); with the loss of the authors' code, binary cross-entropy
over a softmax; by that code's whole step (gradient of the mean loss times 0.002, dropout drawn anew for the second loss, rows
weighted by a moving average); and by that weighting alone. A small transformer learns from no mixing, from word mixup, and from TMix, which
mixes what goes into its second layer. Two errors: the last epoch's, and the least on the test set, which flatters every method. Files:

    results.json   both errors; how far lambda and the loss moved on average, and the largest weight of a row
    amp.png        gains over word mixup, seed by seed

Sources: AMP, arXiv:2109.07177, and its authors' code; TMix, arXiv:2004.12239.
"""

import statistics
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fastmix
from fastmix.recipes import text
from fastmix.recipes._studies import add_best, figure_of, keep, train_arms
from fastmix.recipes._summaries import error_of_mean, gaps, mean, means, numbers
from fastmix.recipes._training import COLORS, Fit, Mixed, MixedInside, error_and_loss, one_thread, parsed, parser

FRACTION, BASE = 0.1, "word mixup"
STEPS = 0.01, 0.1, 0.3, 1.0


def cross_entropy(logits, target):
    return fastmix.soft_cross_entropy(logits, target, reduction="none")


def authors_loss(logits, target):
    """Binary cross-entropy over a softmax, summed over the classes, [N]."""
    chances, rows = logits.softmax(1).clamp(1e-7, 1 - 1e-7), target.dense(logits.shape[1])
    return F.binary_cross_entropy(chances, rows, reduction="none").sum(1)


class Moved(nn.Module):
    """Word mixup whose lambda a `step` moves, and how far it does.

    step: None; a number, by each row's own gradient and at most twice that far (`fastmix.adversarial_mixing_loss`); or "authors", 0.002
    times the gradient of the mean loss. `fresh`: whether dropout is drawn anew for the second loss. `reweight`: the authors' weights.
    """

    def __init__(self, manifold, loss, step=None, *, fresh=False, reweight=False):
        super().__init__()
        self.manifold, self.loss, self.step, self.fresh = manifold, loss, step, fresh
        self.reweight = fastmix.MovingAverageReweight() if reweight else None
        self.register_buffer(
            "seen", torch.zeros(4, dtype=torch.float64)
        )  # batches; sums of |step|, |change of loss|; largest weight

    def forward(self, model, x, y):
        mix, calls = self.manifold.sample(x, y), []
        layer, target = self.manifold.choose(), mix.target(y)

        def losses(lam):
            with fastmix.mix_hidden(layer, lam, mix.index, **text.WORDS):
                found = self.loss(model(x), target)
            calls.append((lam.detach(), found.detach()))
            return found

        if self.step is None:
            return losses(mix.lam).mean()
        if self.step == "authors":
            loss, weights = self._as_the_authors(losses, mix.lam)
        else:
            options = {"step_size": self.step, "max_step": 2 * self.step, "model": model}
            loss, weights = fastmix.adversarial_mixing_loss(losses, mix.lam, **options), torch.ones(1)
        (lam, before), (moved, after) = calls[0], calls[-1]
        found = torch.stack((torch.ones(()), (moved - lam).abs().mean(), (after - before).abs().mean())).double()
        self.seen[:3] += found.to(self.seen)
        self.seen[3] = torch.maximum(self.seen[3], weights.max().to(self.seen))
        return loss

    def _as_the_authors(self, losses, lam):
        random = torch.get_rng_state()
        leaf = lam.detach().requires_grad_()
        before = losses(leaf)
        (gradient,) = torch.autograd.grad(before.mean(), leaf, retain_graph=True)
        if not self.fresh:
            torch.set_rng_state(random)
        after = losses(lam + 0.002 * gradient)
        weights = torch.ones_like(after) if self.reweight is None else self.reweight((after - before).detach())
        return (weights * torch.where(after > before, after, before)).mean(), weights

    def measured(self):
        batches, step, change, weight = self.seen.tolist()
        return {"lambda_moved": step / max(batches, 1), "loss_moved": change / max(batches, 1), "largest_weight": weight}


class Layer(nn.Module):
    """A layer of a transformer that is told which words are there."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, h, there):
        return self.layer(h, src_key_padding_mask=~there)


class Pool(nn.Module):
    """The mean of the words that are there."""

    def forward(self, h, there):
        there = there.unsqueeze(2)
        return (h * there).sum(1) / there.sum(1)


class Transformer(nn.Module):
    """Two layers over learned places, and the mean of the words."""

    def __init__(self, width):
        super().__init__()
        self.places = nn.Parameter(0.1 * torch.randn(64, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.pool, self.features = Pool(), width

    def forward(self, h, there):
        h = h + self.places[: h.shape[1]]
        for layer in self.layers:
            h = layer(h, there=there)
        return self.pool(h, there=there)


def words(model, seed):
    return fastmix.ManifoldMixup((model.encoder,), text.ALPHA, seed=seed, **text.WORDS)


def moved(loss=cross_entropy, step=None, **options):
    return lambda model, seed: Moved(words(model, seed), loss, step, **options)


def tmix(model, seed):
    """Mixes what goes into the second layer."""
    encoder = model.encoder
    later = [encoder.layers[1], encoder.pool]
    return MixedInside(
        fastmix.ManifoldMixup((encoder.layers[1],), text.ALPHA, seed=seed, masks={"there": "attend"}, mask_modules=later)
    )


METHODS = {  # arm: (encoder, (model, seed) -> objective)
    BASE: (text.TextCNN, moved()),
    **{f"AMP, step {step:g}": (text.TextCNN, moved(step=step)) for step in STEPS},
    "word mixup, authors' loss": (text.TextCNN, moved(authors_loss)),
    "authors' step": (text.TextCNN, moved(authors_loss, "authors", fresh=True, reweight=True)),
    "reweighting alone": (text.TextCNN, moved(authors_loss, "authors", reweight=True)),
    "transformer, none": (Transformer, lambda model, seed: Mixed()),
    "transformer, word mixup": (Transformer, lambda model, seed: MixedInside(words(model, seed))),
    "transformer, TMix": (Transformer, tmix),
}
AGAINST = {name: "transformer, none" if name.startswith("transformer") else BASE for name in METHODS}


def fit(data, name, seed):
    x, y, test_x, test_y, vocabulary, classes = data
    encoder, make = METHODS[name]
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: round(FRACTION * len(x))].to(x.device)
    model = text.Classifier(encoder, vocabulary, classes).to(x.device)
    objective = make(model, seed).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)

    def evaluate(model):
        return {**error_and_loss(model(test_x), test_y), **(objective.measured() if isinstance(objective, Moved) else {})}

    return Fit(seed, model, objective, x[some], y[some], batch=text.BATCH, optimizer=optimizer, evaluate=evaluate)


def gains(results, name, key="test_error_percent"):
    """Error of what a method is compared with less its own, seed by seed."""
    return gaps(results[AGAINST[name]], results[name], key)


TITLE = "What AMP does to lambda, and TMix (arXiv:2109.07177, 2004.12239)"


def summary(found):
    rows = []
    for name, runs in found["methods"].items():
        gain = "" if AGAINST[name] == name else mean(gaps(found["methods"][AGAINST[name]], runs))
        by = [
            f"{statistics.mean(numbers(runs, key)):.2g}" if runs[0].get("lambda_moved") else ""
            for key in ("lambda_moved", "loss_moved", "largest_weight")
        ]
        rows.append([name, *means(runs, "test_error_percent", "best_error_percent"), gain, *by])
    remarks = """Errors
in percent. Gains: over word mixup, or over the transformer without mixing, seed by seed, last epoch. "Best on test" flatters every method; the authors' code reports
the best of 8,000 evaluations. Moved: the mean over rows of what lambda and the loss were moved by. The authors' step moves lambda by less than 1e-4:
what their second loss sees is another draw of dropout (drawn once, as in "reweighting alone", it moves by about as little), so it is their weights and dropout
that act, not an adversary. Not tried: pretrained vectors, BERT, 8,000 batches, the first rows of each class as the small set; so the printed gains are not refuted."""
    columns = "TREC, a tenth of the questions", ">last epoch", ">best on test", ">gain"
    return (*columns, ">lambda moved", ">loss moved", ">largest weight"), rows, remarks


def picture(results, path):
    figure = figure_of(9, 4.6)
    axes = figure.subplots()
    shown = [name for name in results if AGAINST[name] != name]
    for k, name in enumerate(shown):
        found = gains(results, name)
        axes.scatter([k] * len(found), found, s=12, color=COLORS[k % len(COLORS)], alpha=0.6)
        axes.errorbar(k, sum(found) / len(found), error_of_mean(found), fmt="o", color="black", capsize=4)
    axes.axhline(0, lw=0.8, color="black")
    axes.set_xticks(range(len(shown)), shown, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("gain over word mixup, or over none (%)")
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


@one_thread()
def main(argv=None):
    folder = Path("trec"), "folder with TREC's two files"
    options = parser("amp", __doc__.splitlines()[0], out="fastmix-amp", seeds=10, epochs=20, data=folder)
    args = parsed(options, argv)
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    try:
        data = text.load(args.data, args.device)
    except (ValueError, OSError) as error:
        options.error(f"--data: expected TREC's {' and '.join(text.FILES.values())} in {args.data}: {error}")
    arms = {name: (args.epochs, partial(fit, data, name)) for name in METHODS}
    console.print(f"{round(FRACTION * len(data[0]))} questions to learn from, {args.seeds} seeds, {args.epochs} epochs.\n")
    results, _, runs = train_arms(args, "amp", arms, console, data)
    add_best(results)
    keep(args, results, data, (TITLE, summary), console)
    picture(results, args.out / "amp.png")
    runs.finish("results.json", "amp.png")


if __name__ == "__main__":
    main()
