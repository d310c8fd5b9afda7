"""fastmix.compat.lightning in Lightning's own Trainer."""

import doctest
import importlib.util
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pages import blocks
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastmix
from fastmix import SoftTarget
from fastmix.bench import peers  # noqa: F401  loads torchvision, which Lightning imports, beside any torch

if importlib.util.find_spec("lightning") is None:
    pytest.skip("needs lightning", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.core.datamodule import LightningDataModule

    from fastmix.compat import lightning as compat

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.no_poison]
C = 4


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


KINDS = {"list": lambda x, y: [x, y], "tuple": lambda x, y: (x, y), "namedtuple": Pair, "dict": lambda x, y: {"x": x, "y": y}}


class Rows(Dataset):
    def __init__(self, rows=16):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(rows, 8, generator=generator), torch.arange(rows) % C

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def loader(kind="tuple"):
    def collate(batch):
        x, y = torch.utils.data.default_collate(batch)
        return KINDS[kind](x, y)

    return DataLoader(Rows(), 8, collate_fn=collate)


class Classifier(lightning.LightningModule):
    """As a user writes it: nothing here knows of mixing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(8, C)
        self.seen = []  # (epoch, kind of step, batch)

    def step(self, name, batch):
        self.seen.append((self.current_epoch, name, batch))
        x, y = batch.values() if isinstance(batch, dict) else batch
        return F.cross_entropy(self.model(x), y)

    def training_step(self, batch, _):
        return self.step("train", batch)

    def validation_step(self, batch, _):
        return self.step("validate", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def labels(self, name="train"):
        return [(e, batch["y"] if isinstance(batch, dict) else batch[1]) for e, n, batch in self.seen if n == name]


def trainer(callback, epochs=1, **options):
    given = {"accelerator": "cpu", "max_epochs": epochs, "callbacks": [callback], "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**{**given, **quiet, **options})


def mixup():
    return fastmix.Mixup(1.0, seed=3)


def test_doctests():
    result = doctest.testmod(compat)
    assert result.attempted == 3
    assert result.failed == 0


def test_the_page_runs():
    for code in blocks("Lightning"):
        exec(code, {"dataset": [(torch.rand(3, 8, 8), i % C) for i in range(8)], "classes": C})


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind):
    places = {"inputs": "x", "labels": "y"} if kind == "dict" else {}
    module = Classifier()
    trainer(compat.MixCallback(mixup(), **places)).fit(module, loader(kind), loader(kind))
    drawn = mixup()
    trained = [batch for _, name, batch in module.seen if name == "train"]
    assert len(trained) == 2
    for batch, plain in zip(trained, loader(kind), strict=True):
        assert type(batch) is type(plain)
        x, y = plain.values() if kind == "dict" else plain
        mixed, target = drawn(x, y)
        own = list(batch.values() if kind == "dict" else batch)
        torch.testing.assert_close(own[0], mixed)
        torch.testing.assert_close(own[1].dense(C), target.dense(C))
    validated = module.labels("validate")
    assert len(validated) == 4  # the sanity check's and the epoch's
    assert all(isinstance(y, torch.Tensor) for _, y in validated)


def test_the_hook_is_given_back():
    module = Classifier()
    trainer(compat.MixCallback(mixup())).fit(module, loader())
    assert "on_after_batch_transfer" not in vars(module)

    class Failing(Classifier):
        def training_step(self, batch, _):
            raise RuntimeError("stop")

    module = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(compat.MixCallback(mixup())).fit(module, loader())
    assert "on_after_batch_transfer" not in vars(module)


def test_the_modules_hook_runs_first():
    class Doubling(Classifier):
        def on_after_batch_transfer(self, batch, _):
            return batch[0] * 2, batch[1]

    module = Doubling()
    trainer(compat.MixCallback(mixup())).fit(module, loader())
    x, y = next(iter(loader()))
    torch.testing.assert_close(module.seen[0][2][0], mixup()(x * 2, y)[0])


@pytest.mark.parametrize("overrides", [True, False])
def test_data_module(overrides):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader()

    class Doubling(Data):
        def on_after_batch_transfer(self, batch, _):
            return batch[0] * 2, batch[1]

    module, data = Classifier(), Doubling() if overrides else Data()
    trainer(compat.MixCallback(mixup())).fit(module, datamodule=data)
    x, y = next(iter(loader()))
    torch.testing.assert_close(module.seen[0][2][0], mixup()(x * (2 if overrides else 1), y)[0])
    assert "on_after_batch_transfer" not in {**vars(data), **vars(module)}


def test_bf16_true():
    module = Classifier()
    trainer(compat.MixCallback(mixup()), precision="bf16-true").fit(module, loader())
    for _, _, (x, target) in module.seen:
        assert x.dtype == torch.bfloat16
        assert target.weights.dtype == torch.float32


def test_until_epoch():
    module = Classifier()
    trainer(compat.MixCallback(mixup(), until_epoch=1), epochs=2).fit(module, loader())
    assert [(epoch, isinstance(y, SoftTarget)) for epoch, y in module.labels()] == [(0, True)] * 2 + [(1, False)] * 2


def test_a_resumed_run_is_the_run(tmp_path):
    whole = Classifier()
    trainer(compat.MixCallback(mixup()), epochs=2).fit(whole, loader())
    first = trainer(compat.MixCallback(mixup()))
    first.fit(Classifier(), loader())
    first.save_checkpoint(tmp_path / "first.ckpt")
    second = Classifier()
    resumed = trainer(compat.MixCallback(mixup()), epochs=2)
    resumed.fit(second, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert len(second.labels()) == 2
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_are_not_written():
    for kind, make in KINDS.items():
        x, y = torch.rand(2, 3), torch.arange(2)
        batch = make(x, y)
        places = ("x", "y") if kind == "dict" else (0, 1)
        changed = compat._with_items(batch, dict.fromkeys(places, "mixed"))
        assert [changed[place] for place in places] == ["mixed"] * 2
        assert batch[places[0]] is x
        assert batch[places[1]] is y


def test_errors():
    with pytest.raises(TypeError, match="mixer: expected a sampler of fastmix"):
        compat.MixCallback(lambda x, y: (x, y))
    with pytest.raises(ValueError, match="until_epoch: expected None or an int"):
        compat.MixCallback(mixup(), until_epoch=-1)
    for kind, places, error, message in (
        ("dict", {"inputs": "image", "labels": "y"}, KeyError, "inputs: expected a key of the batch"),
        ("tuple", {"labels": 2}, IndexError, "labels: expected an index into a batch of 2 items, got 2"),
        ("list", {"labels": "y"}, IndexError, "labels: expected an index"),
    ):
        with pytest.raises(error, match=message):
            trainer(compat.MixCallback(mixup(), **places)).fit(Classifier(), loader(kind))


def test_two_callbacks_leave_no_hook_behind():
    """They end in the order in which they began, not the last one first."""
    model = Classifier()
    first, second = (compat.MixCallback(fastmix.Mixup(1.0, seed=n)) for n in range(2))
    first.inputs, second.inputs = 0, 0
    hooks = []

    class Trainer:
        training, current_epoch = True, 0

        class _data_connector:
            class _datahook_selector:
                @staticmethod
                def get_instance(name):
                    return model

    for callback in (first, second):
        callback.setup(Trainer, model, "fit")
        hooks.append(model.__dict__["on_after_batch_transfer"])
    first.teardown(Trainer, model, "fit")
    assert model.__dict__["on_after_batch_transfer"] is hooks[1]
    x, target = model.on_after_batch_transfer((torch.randn(4, 8), torch.arange(4)), 0)
    assert isinstance(target, SoftTarget)  # mixed once, by the second
    second.teardown(Trainer, model, "fit")
    assert "on_after_batch_transfer" not in model.__dict__


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("mixer", torch.nn.Identity(), TypeError),
        ("inputs", 1.5, TypeError),
        ("labels", True, TypeError),
        ("until_epoch", -1, ValueError),
        ("until_epoch", 2.5, TypeError),
    ],
)
def test_options_set_later_are_checked(name, value, kind):
    callback = compat.MixCallback(fastmix.Mixup(0.2))
    before = getattr(callback, name)
    with pytest.raises(kind, match=f"^{name}: expected"):
        setattr(callback, name, value)
    assert getattr(callback, name) is before
    with pytest.raises(kind, match=f"^{name}: expected"):
        compat.MixCallback(**{"mixer": fastmix.Mixup(0.2), name: value})
    callback.until_epoch = 3
    assert callback.until_epoch == 3


@pytest.mark.parametrize("make", [fastmix.SaliencyMix, fastmix.AttentiveCutMix, lambda: fastmix.ManifoldMixup([None], 1.0)])
def test_samplers_that_need_more_than_inputs_and_labels(make):
    with pytest.raises(TypeError, match="mixer: expected .* inputs and labels alone"):
        compat.MixCallback(make())
