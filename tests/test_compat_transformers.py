"""fastmix.compat.transformers beside the Trainer of transformers itself."""

import doctest
import importlib.util
import tempfile
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pages import blocks
from torch.utils.data import Dataset

import fastmix
from fastmix import MixedRows, SoftTarget
from fastmix.bench import peers  # noqa: F401  loads torchvision, which transformers imports, beside any torch

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("needs transformers and accelerate", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    from fastmix.compat import transformers as compat

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.no_poison]
C = 4


class Images(Dataset):
    def __init__(self, rows=16, key="pixel_values"):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y, self.key = torch.randn(rows, 3, 8, 8, generator=generator), torch.arange(rows) % C, key

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return {self.key: self.x[i], "labels": int(self.y[i])}


def model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**sizes, **dropout, image_size=8, patch_size=4, num_labels=C, **options))


def arguments(folder, rows=8, accumulation=1, **options):
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 2,
        "learning_rate": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "max_grad_norm": 100.0,
    }
    return TrainingArguments(**{**given, **options})


def steps(trainer):
    """(loss, gradient norm) of each step."""
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]


def test_doctests():
    result = doctest.testmod(compat)
    assert result.attempted == 3
    assert result.failed == 0


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for code in blocks("transformers")[:1]:
        exec(code, {"dataset": [(torch.rand(3, 8, 8), i % C) for i in range(8)], "classes": C})


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_without_mixing_it_is_the_trainer(rows, accumulation, smoothing, tmp_path):
    args = arguments(tmp_path, rows, accumulation, label_smoothing_factor=smoothing)
    expected = steps(Trainer(model(), args, train_dataset=Images()))
    mixer = fastmix.Mixup(1.0, prob=0.0)
    own = steps(compat.MixTrainer(model(), args, train_dataset=Images(), mixer=mixer))
    assert len(expected) == 2
    np.testing.assert_allclose(own, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_mixing(workers, tmp_path):
    seen, measured = [], []

    class Mixer(fastmix.Mixup):
        def forward(self, x, y, **options):
            mixed, target = super().forward(x, y, **options)
            seen.append((mixed, target))
            return mixed, target

    def accuracy(prediction):
        measured.append(prediction)
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    args = arguments(tmp_path, 4, 2, dataloader_num_workers=workers)
    options = {"train_dataset": Images(), "eval_dataset": Images(6), "compute_metrics": accuracy}
    trainer = compat.MixTrainer(model(), args, mixer=Mixer(1.0, seed=0), **options)
    logged = steps(trainer)
    assert len(seen) == 4
    assert all(isinstance(target, SoftTarget) and bool((target.weights < 1).all()) for _, target in seen)
    # the first step's loss and gradient, by hand: two micro-batches of four rows are one batch of eight
    plain = model().train()
    losses = [F.cross_entropy(plain(pixel_values=x).logits, target.dense(C), reduction="sum") for x, target in seen[:2]]
    loss = sum(losses) / 8
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
    np.testing.assert_allclose(logged[0], [loss.item(), norm.item()], rtol=1e-4)
    results = trainer.evaluate()
    assert len(seen) == 4
    assert measured[0].label_ids.tolist() == Images(6).y.tolist()
    x, y = Images(6).x, Images(6).y
    with torch.no_grad():
        expected = F.cross_entropy(trainer.model.eval()(pixel_values=x).logits, y)
    assert results["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= results["eval_accuracy"] <= 1


@pytest.mark.slow
def test_rows_of_labels(tmp_path):
    """With the page's loss: the Trainer's for one batch, and the same gradient for two micro-batches."""

    class Rows(Images):
        def __getitem__(self, i):
            return {"pixel_values": self.x[i], "labels": F.one_hot(self.y[i], C).float()}

    names = {"fastmix": fastmix}
    exec(blocks("transformers")[1], names)
    kind = {"problem_type": "multi_label_classification"}
    expected = steps(Trainer(model(**kind), arguments(tmp_path), train_dataset=Rows()))
    given = {"train_dataset": Rows(), "mixer": fastmix.Mixup(1.0, prob=0.0), "compute_loss_func": names["binary_loss"]}
    for rows, accumulation in ((8, 1), (4, 2)):
        trainer = compat.MixTrainer(model(**kind), arguments(tmp_path, rows, accumulation), **given)
        np.testing.assert_allclose(steps(trainer), expected, rtol=1e-4)


def test_soft_loss():
    logits, y = torch.randn(6, C), torch.tensor([0, 1, -100, 3, 2, 1])
    torch.testing.assert_close(compat.soft_loss((logits,), y), F.cross_entropy(logits, y))
    for count in (10, torch.tensor(10)):
        expected = F.cross_entropy(logits, y, reduction="sum", label_smoothing=0.1) / 10
        torch.testing.assert_close(compat.soft_loss({"logits": logits}, y, count, label_smoothing=0.1), expected)
    tokens, labels = torch.randn(2, 5, C), torch.randint(0, C, (2, 5))
    torch.testing.assert_close(compat.soft_loss((tokens,), labels), F.cross_entropy(tokens.movedim(-1, 1), labels))
    rows = torch.rand(6, C)
    for labels in (rows, MixedRows(rows, 0.5, torch.arange(6))):
        with pytest.raises(TypeError, match="labels: expected a SoftTarget or class indices"):
            compat.soft_loss((logits,), labels)


def test_own_loss_is_kept(tmp_path):
    def own(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum() * 0

    trainer = compat.MixTrainer(model(), arguments(tmp_path), mixer=fastmix.Mixup(1.0), compute_loss_func=own)
    assert trainer.compute_loss_func is own


def test_errors(tmp_path):
    with pytest.raises(TypeError, match="mixer: expected a sampler of fastmix"):
        compat.MixTrainer(model(), arguments(tmp_path), mixer=None)
    given = {"train_dataset": Images(), "mixer": fastmix.Mixup(1.0), "inputs": "image"}
    with pytest.raises(KeyError, match="inputs: expected a key of the batch, one of .*pixel_values.*, got 'image'"):
        compat.MixTrainer(model(), arguments(tmp_path), **given).train()


def test_options_set_later_are_checked(tmp_path):
    trainer = compat.MixTrainer(model(), arguments(tmp_path), mixer=fastmix.Mixup(0.2))
    for name, value in (("mixer", 3), ("mixed_inputs", 0)):
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            setattr(trainer, name, value)
    with pytest.raises(TypeError, match="^inputs: expected a key"):
        compat.MixTrainer(model(), arguments(tmp_path), mixer=fastmix.Mixup(0.2), inputs=0)


class Renamed(Images):
    """Labels under another name."""

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "target": int(self.y[i])}


class Logits(torch.nn.Module):
    """A model that takes inputs alone, or counts the labels that it is given."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, pixel_values, target=None):
        assert target is None
        return {"logits": self.inner(pixel_values=pixel_values).logits}


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_labels_under_another_name(rows, accumulation, tmp_path):
    """`label_names`: the same steps as under "labels", however many micro-batches there are, and evaluation of what is not mixed."""
    never = {"mixer": fastmix.Mixup(1.0, prob=0.0)}
    given = {"train_dataset": Images(), **never}
    expected = steps(compat.MixTrainer(model(), arguments(tmp_path), **given))

    def accuracy(prediction):
        seen.append(prediction.label_ids)
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    seen: list = []
    given = {"train_dataset": Renamed(), "eval_dataset": Renamed(8), "compute_metrics": accuracy, **never}
    trainer = compat.MixTrainer(Logits(), arguments(tmp_path, rows, accumulation, label_names=["target"]), **given)
    np.testing.assert_allclose(steps(trainer), expected, rtol=1e-4)
    result = trainer.evaluate()
    np.testing.assert_array_equal(seen[0], np.arange(8) % C)
    assert 0 < result["eval_loss"] < 10
    trainer.mixer = fastmix.Mixup(1.0, seed=0)
    assert all(np.isfinite(steps(trainer)).ravel())


@pytest.mark.parametrize(
    "make",
    [
        fastmix.SaliencyMix,
        fastmix.AttentiveCutMix,
        lambda: fastmix.ManifoldMixup([None], 1.0),
        lambda: fastmix.PuzzleMix(mean=0.5, std=0.25),
    ],
)
def test_mixers_that_need_more_than_inputs_and_labels(make):
    with pytest.raises(TypeError, match="mixer: expected .* inputs and labels alone"):
        compat.MixTrainer(mixer=make())
