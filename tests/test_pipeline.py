"""ImagePipeline: what it yields, beside the same steps by hand; its states, killed and resumed; exceptions; several processes."""

import copy
import gc
import io
import itertools
import os
import subprocess
import sys
import traceback
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pages import blocks
from test_mix_plan import META, refused
from torch.testing import assert_close as same
from torch.utils import _pytree
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

import fastmix
from fastmix import BetaMask, CutMix, ImagePipeline, ManifoldMixup, Mixup, PuzzleMix, RandomMix
from fastmix.bench import peers
from fastmix.sampling import draws

try:
    import PIL.Image
except ImportError:  # its test is skipped
    PIL = None

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
SAMPLERS = {
    "mixup": lambda: Mixup(0.4, seed=3),
    "cutmix": lambda: CutMix(1.0, seed=3),
    "masks": lambda: BetaMask(1.0, (2, 2), seed=3),
    "two seeds": lambda: RandomMix(Mixup(0.4, seed=5), CutMix(1.0), seed=3),
    "same class": lambda: Mixup(0.4, partner="same", seed=3),
    "none": lambda: None,
}


class Images(Dataset):
    """Images that their number alone decides."""

    def __init__(self, count=20, maps=False, fail_at=None):
        self.count, self.maps, self.fail_at = count, maps, fail_at

    def __len__(self):
        return self.count

    def __getitem__(self, k):
        if k == self.fail_at:
            raise KeyError("a file that is not there")
        generator = torch.Generator().manual_seed(k)
        image = torch.randint(0, 256, (3, 6, 8), dtype=torch.uint8, generator=generator)
        return image, torch.randint(0, 5, (6, 8), generator=generator) if self.maps else k % 5


class Stateful:
    """A loader that can go on in the middle of an epoch, which it shuffles by its number."""

    def __init__(self, data, batch=4, workers=0, pin_memory=False):
        self.data, self.batch, self.epoch, self.done = data, batch, 0, 0
        self.how = {"num_workers": workers, "pin_memory": pin_memory}
        self.asked = 0

    def state_dict(self):
        self.asked += 1
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]

    def __iter__(self):
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        batches = [order[k : k + self.batch] for k in range(0, len(order), self.batch)][self.done :]
        for batch in DataLoader(self.data, batch_sampler=batches, **self.how):
            self.done += 1
            yield batch
        self.epoch, self.done = self.epoch + 1, 0


def make(name="mixup", **options):
    seed = {"seed": 3} if name == "none" else {}  # else the sampler's own
    return ImagePipeline(SAMPLERS[name](), MEAN, STD, **{"device": "cpu", **seed, **options})


def flat(batch):
    return [t.clone() for t in _pytree.tree_leaves(batch)]


def equal(one, other):
    """Whether two lists of batches have the same bits."""
    one, other = ([flat(batch) for batch in batches] for batches in (one, other))
    return len(one) == len(other) and all(
        len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True)) for a, b in zip(one, other, strict=True)
    )


def flips_of(pipeline, number, rows, seed=3):
    state = draws.state(seed, number, (2**62, 0))
    with fastmix.backend("torch"):
        picks = draws.row_keys(state, rows, 0, torch.zeros(rows))[1]
    return torch.tensor([p / 2**63 < pipeline.flip for p in picks.tolist()])


def normalized(images, flip):
    """In float64, by the definition."""
    x = (images.double() / 255 - torch.tensor(MEAN).double().view(1, 3, 1, 1)) / torch.tensor(STD).double().view(1, 3, 1, 1)
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        self.log.append(f"{self.name} is at an event")
        self.events += 1
        return self.events

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for event {event}")

    def __enter__(self):
        self.log.append("begin")

    def __exit__(self, *exception):
        self.log.append("end")


def use_streams(monkeypatch, side, here, kept):
    monkeypatch.setattr(ImagePipeline, "_side_stream", lambda self, device: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: kept.append((t.data_ptr(), stream.name)))


@pytest.fixture(params=["when asked", "ahead"])
def both_orders(request, monkeypatch):
    """A batch is made when it is asked for, as on the CPU, or one ahead, as on a GPU."""
    if request.param == "ahead":
        use_streams(monkeypatch, FakeStream("side", []), FakeStream("here", []), [])


@pytest.mark.slow_interpreted
@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("name", "maps"), [(name, maps) for name in SAMPLERS for maps in (False, True)[: 2 - (name == "same class")]]
)
def test_as_by_hand(name, maps, device):
    """Flipped, normalised, then mixed by the sampler's next draw; labels likewise, label maps flipped with their images."""
    loader, pipeline, sampler = DataLoader(Images(14, maps), 4), make(name, device=device), SAMPLERS[name]()
    batches = list(pipeline(loader))
    assert len(batches) == 4
    flipped = 0
    for number, ((x, target), (images, y)) in enumerate(zip(batches, loader, strict=True)):
        flip = flips_of(pipeline, number, len(images))
        flipped += int(flip.sum())
        clean = normalized(images, flip).to(device)
        y = torch.where(flip.view(-1, 1, 1), y.flip(-1), y) if maps else y
        if sampler is None:
            same(x, clean.float(), rtol=1e-5, atol=1e-5)
            assert torch.equal(target.cpu(), y)
            continue
        m = sampler.sample(clean.float(), y.to(device))
        same(x, m.apply(clean).float(), rtol=1e-5, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(flat(target), flat(m.target(y.to(device))), strict=True))
    assert 0 < flipped < 14


@pytest.mark.slow_interpreted
def test_options_reach_the_images(device):
    images, y = torch.randint(0, 256, (4, 6, 8, 3), dtype=torch.uint8), torch.arange(4)
    turned = images.movedim(-1, 1).contiguous()
    how = {"dtype": torch.bfloat16, "memory_format": torch.channels_last, "device": device}
    for sampler in (lambda: CutMix(1.0, seed=1), lambda: Mixup(1.0, seed=1)):
        (a,) = ImagePipeline(sampler(), MEAN, STD, layout="NHWC", **how)([(images, y)])
        (b,) = ImagePipeline(sampler(), MEAN, STD, **how)([(turned, y)])
        assert equal([a], [b])
        assert a[0].dtype == torch.bfloat16
        assert a[0].shape == (4, 3, 6, 8)
        assert a[0].is_contiguous(memory_format=torch.channels_last)
    rows = torch.rand(4, 7)
    (found,) = make(device=device)([(turned, rows)])
    assert isinstance(found[1], fastmix.MixedRows)
    for chance, expected in ((0, turned), (1, turned.flip(-1)), (0.0, turned), (1.0, turned.flip(-1))):
        (found,) = make("none", flip=chance, device=device)([(turned, y)])
        same(found[0].cpu(), normalized(expected, torch.zeros(4).bool()).float(), rtol=1e-5, atol=1e-5)


def test_flips_have_their_chance_and_do_not_follow_the_sampler():
    ones = torch.arange(8, dtype=torch.uint8).expand(4000, 1, 1, 8).contiguous()
    for chance in (0.1, 0.5):
        pipeline = ImagePipeline(Mixup(1.0, seed=0), [0.0], [1.0], flip=chance, device="cpu")
        flip = pipeline._drawn_flips(ones)
        assert abs(float(flip.float().mean()) - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5
        lam = Mixup(1.0, seed=0).sample(ones).lam
        assert abs(float(np.corrcoef(lam, flip.float())[0, 1])) < 4 / 4000**0.5
    assert not torch.equal(pipeline._drawn_flips(ones), flip)


def test_seeds():
    data = [(torch.randint(0, 256, (16, 3, 4, 6), dtype=torch.uint8), torch.arange(16))] * 2
    first = list(make()(data))
    assert not torch.equal(first[0][0], first[1][0])
    assert equal(first, list(make()(data)))
    assert equal(first, list(make(seed=3)(data)))  # the sampler's own seed
    assert not equal(first, list(make(seed=4)(data)))
    torch.manual_seed(0)
    drawn = list(ImagePipeline(Mixup(1.0), MEAN, STD, device="cpu")(data))
    torch.manual_seed(0)
    assert equal(drawn, list(ImagePipeline(Mixup(1.0), MEAN, STD, device="cpu")(data)))
    flips = [ImagePipeline(Mixup(1.0), MEAN, STD, device="cpu")._drawn_flips(data[0][0]) for _ in range(8)]
    assert any(not torch.equal(flips[0], flip) for flip in flips)


def test_ranks_flip_their_own(monkeypatch):
    images, found = torch.zeros(64, 3, 4, 4, dtype=torch.uint8), []
    for rank in (None, 0, 1):
        monkeypatch.setattr(draws, "process", lambda rank=rank: (None, rank))
        found.append(make()._drawn_flips(images))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_eval_and_train():
    loader, pipeline = DataLoader(Images(8, maps=True), 4), make("cutmix")
    before = pipeline.state_dict()
    assert pipeline.eval() is pipeline
    for (x, y), (images, labels) in zip(pipeline(loader), loader, strict=True):
        assert torch.equal(x, fastmix.mix_images(images, mean=MEAN, std=STD))
        assert torch.equal(y, labels)
    assert pipeline.state_dict() == before  # nothing is drawn
    assert pipeline.train().training
    assert equal(list(pipeline(loader)), list(make("cutmix")(loader)))
    pipeline.sampler.eval()  # as in the last epochs: images are still mirrored
    number = pipeline.state_dict()["flips"]
    for (x, y), (images, labels) in zip(pipeline(loader), loader, strict=True):
        flip = flips_of(pipeline, number, 4)
        number += 1
        same(x, normalized(images, flip).float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(y, torch.where(flip.view(-1, 1, 1), labels.flip(-1), labels))


@pytest.mark.usefixtures("both_orders")
@pytest.mark.parametrize("name", ["mixup", "two seeds", "none"])
def test_the_state_is_that_of_the_last_batch_yielded(name):
    loader, pipeline = DataLoader(Images(20), 4), make(name)
    whole = list(make(name)(loader))
    batches, states = pipeline(loader), []
    for _ in batches:
        states.append(copy.deepcopy(batches.state_dict()))
    assert [state["flips"] for state in states] == [1, 2, 3, 4, 5]
    assert all(state["loader"] is None for state in states)
    for done, state in enumerate(states, 1):
        saved = io.BytesIO()
        torch.save(state, saved)
        saved.seek(0)
        other = make(name)
        other.load_state_dict(torch.load(saved, weights_only=True))
        rest = itertools.islice(loader, done, None)
        assert equal(list(other(list(rest))), whole[done:])
    assert pipeline.state_dict() == {k: v for k, v in states[-1].items() if k != "loader"}


@pytest.mark.slow
@pytest.mark.usefixtures("both_orders")
@pytest.mark.parametrize("name", ["mixup", "two seeds"])
def test_leaving_a_loop_takes_back_what_was_prepared(name):
    """A `break` draws what a loop without a batch ahead would have drawn."""
    loader, pipeline = DataLoader(Images(20), 4), make(name)
    first = next(iter(pipeline(loader)))
    gc.collect()
    assert pipeline.state_dict()["flips"] == 1
    second = next(iter(pipeline(loader)))
    twice = make(name)
    images = next(iter(loader))
    assert equal([first, second], list(twice([images, images])))
    assert pipeline.state_dict() == twice.state_dict()


@pytest.mark.usefixtures("both_orders")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_and_states_of_the_loader(workers):
    """Stopped anywhere, also at an epoch's end, a run goes on with the same bits."""
    data, epochs = Images(18), 2

    def run(batches, already=0):
        found = []
        while batches.epoch < epochs:
            for batch in batches:
                found.append(flat(batch))
                yield found[-1], batches.state_dict()

    whole = list(run(make("two seeds")(Stateful(data))))
    assert len(whole) == 10
    assert [state["loader"]["done"] for _, state in whole] == [1, 2, 3, 4, 5] * 2
    for stop in (1, 4, 5, 7) if workers == 0 else (3,):
        begun = run(make("two seeds")(Stateful(data, workers=workers)))
        first = list(itertools.islice(begun, stop))
        begun.close()
        batches = make("two seeds")(Stateful(data, workers=workers))
        batches.load_state_dict(first[-1][1])
        rest = list(run(batches))
        for (a, _), (b, _) in zip(first + rest, whole, strict=True):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.usefixtures("both_orders")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_exceptions_of_the_loader(workers):
    """They come where their batch would have come, after those before it."""
    loader, pipeline, seen = DataLoader(Images(20, fail_at=13), 4, num_workers=workers), make(), []
    with pytest.raises(KeyError, match="a file that is not there"):
        seen.extend(pipeline(loader))
    assert equal(seen, list(make()(DataLoader(Images(12), 4))))
    assert pipeline.state_dict()["flips"] == 3
    assert equal(list(pipeline(DataLoader(Images(4), 4))), list(make_after(3)(DataLoader(Images(4), 4))))


def make_after(number):
    pipeline = make()
    list(pipeline(DataLoader(Images(4 * number), 4)))
    return pipeline


@pytest.mark.usefixtures("both_orders")
def test_exceptions_of_a_batch():
    """A wrong batch is told after those before it, and draws nothing."""
    good = next(iter(DataLoader(Images(4), 4)))
    for wrong, kind, argument, expected, actual in (
        ((good[0].float(), good[1]), TypeError, "images", "uint8", "float32"),
        ((good[0], good[1].int()), TypeError, "y", "int64", "int32"),
        ((good[0], good[1][:3]), ValueError, "y", "4 rows", r"shape \[3\]"),
        ((good[0], [0, 1, 2, 3]), TypeError, "labels", "a tensor", "list"),
        ((good[0].numpy(), good[1]), TypeError, "images", "a tensor", "ndarray"),
        ((good[0][:, :2], good[1]), ValueError, "mean", "2 numbers", "0.49"),
        ((*good, good[1]), TypeError, "loader", r"batches \(images, labels\)", "tuple"),
        (good[0], TypeError, "loader", r"batches \(images, labels\)", "uint8 tensor"),
        ({"images": good[0], "labels": good[1]}, TypeError, "loader", "batches", "dict"),
        ((torch.tensor(3, dtype=torch.uint8), good[1]), ValueError, "images", r"rows \[N, ...\]", r"shape \[\]"),
    ):
        pipeline, seen = make(), []

        def loop(pipeline=pipeline, seen=seen, wrong=wrong):
            for batch in pipeline([good, wrong, good]):
                seen.append(batch)

        refused(loop, kind, argument, expected, actual)
        assert equal(seen, list(make()([good])))
        assert pipeline.state_dict() == make_after(1).state_dict()


@pytest.mark.usefixtures("both_orders")
def test_a_validation_inside_an_epoch_leaves_its_state():
    loader, plain = DataLoader(Images(20), 4), make()
    whole = [(flat(batch), plain.state_dict()) for batch in plain(loader)]
    pipeline, seen = make(), []
    for batch in pipeline(loader):
        pipeline.eval()
        states = [pipeline.state_dict() for _ in pipeline(DataLoader(Images(8), 4))]
        pipeline.train()
        seen.append((flat(batch), pipeline.state_dict()))
        assert states == [seen[-1][1]] * 2
    assert equal([batch for batch, _ in seen], [batch for batch, _ in whole])
    assert [state for _, state in seen] == [state for _, state in whole]


@pytest.mark.usefixtures("both_orders")
def test_a_loop_that_ends_after_a_later_one_takes_nothing_back():
    """A traceback may hold on to the first."""
    loader, pipeline = DataLoader(Images(20), 4), make()
    first = iter(pipeline(loader))
    next(first)
    later = list(pipeline(loader))
    state = pipeline.state_dict()
    first.close()
    assert len(later) == 5
    assert pipeline.state_dict() == state


@pytest.mark.usefixtures("both_orders")
def test_the_callers_exception_leaves_the_state_of_its_batch():
    loader, pipeline = DataLoader(Images(20), 4), make()

    def loop():
        for number, _ in enumerate(pipeline(loader)):
            if number == 2:
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        loop()
    assert pipeline.state_dict()["flips"] == 3


def test_length_attributes_and_epochs():
    data = Images(20)
    rows = DistributedSampler(data, 2, 0)
    loader = DataLoader(data, 4, sampler=rows)
    batches = make()(loader)
    assert len(batches) == len(loader) == 3
    assert batches.dataset is data
    assert batches.batch_size == 4
    assert batches.sampler is rows
    batches.set_epoch(3)
    assert rows.epoch == 3
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = batches.nothing_of_the_kind
    with pytest.raises(AttributeError, match="set_epoch: expected a loader, .* got DataLoader"):
        make()(DataLoader(data, 4)).set_epoch(1)

    class Loader(list):
        def set_epoch(self, epoch):
            self.epoch = epoch

    own = make()(Loader())
    own.set_epoch(5)
    assert own.epoch == 5
    assert list(own) == []
    with pytest.raises(TypeError, match="has no len"):
        len(make()(iter([])))
    assert copy.copy(batches).dataset is data


@pytest.mark.usefixtures("both_orders")
def test_nothing_holds_a_batch_while_the_caller_works():
    for x, target in make()(DataLoader(Images(12), 4)):
        seen = weakref.ref(x)
        del x, target
        assert seen() is None


def test_empty_and_single_batches():
    assert list(make()([])) == []
    for n in (0, 1):
        batch = torch.zeros(n, 3, 4, 4, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64)
        for name in ("mixup", "cutmix"):
            ((x, target),) = make(name)([batch])
            assert x.shape == (n, 3, 4, 4)
            assert target.classes.shape == (n, 2)


BAD = [
    ({"sampler": PuzzleMix(mean=0.5, std=0.25)}, TypeError, "sampler", "a Mixup", "PuzzleMix"),
    ({"sampler": ManifoldMixup([torch.nn.ReLU()], 1.0)}, TypeError, "sampler", "a Mixup", "ManifoldMixup"),
    ({"sampler": 0.2}, TypeError, "sampler", "a Mixup", "0.2"),
    ({"flip": 1.5}, ValueError, "flip", r"a number in \[0, 1\]", "1.5"),
    ({"flip": True}, TypeError, "flip", r"a number in \[0, 1\]", "True"),
    ({"flip": float("nan")}, ValueError, "flip", r"a number in \[0, 1\]", "nan"),
    ({"dtype": torch.uint8}, TypeError, "dtype", "a floating dtype", "torch.uint8"),
    ({"memory_format": "channels_last"}, TypeError, "memory_format", "a torch.memory_format", "channels_last"),
    ({"layout": "CHWN"}, ValueError, "layout", "'NCHW' or 'NHWC'", "CHWN"),
    ({"device": 1.5}, TypeError, "device", "a device", "1.5"),
    ({"device": "nowhere"}, ValueError, "device", "a device", "nowhere"),
    ({"seed": -1}, ValueError, "seed", r"\[0, 2\*\*63\)", "-1"),
    ({"seed": 0.5}, TypeError, "seed", "an int", "0.5"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_options(case):
    options, *expected = BAD[case]
    refused(lambda: ImagePipeline(**{"sampler": None, "mean": MEAN, "std": STD, **options}), *expected)


@pytest.mark.usefixtures("both_orders")
def test_bad_calls():
    pipeline = make()
    refused(lambda: pipeline(3), TypeError, "loader", "an iterable", "3")
    refused(lambda: pipeline.train(1), TypeError, "mode", "a bool", "1")
    state = pipeline.state_dict()
    refused(lambda: pipeline.load_state_dict(None), TypeError, "state", "{version, sampler, flips}", "None")
    refused(lambda: pipeline.load_state_dict({**state, "version": 7}), ValueError, "state['version']", "1", "7")
    refused(lambda: pipeline.load_state_dict({**state, "flips": -1}), ValueError, "state['flips']", "at least 0", "-1")
    refused(lambda: make("none").load_state_dict(state), ValueError, "state['sampler']", "{}", "_extra_state")
    refused(
        lambda: pipeline([]).load_state_dict({**state, "loader": {"done": 1}}), TypeError, "state['loader']", "None", "done"
    )
    batches = iter(pipeline(DataLoader(Images(12), 4)))
    next(batches)
    with pytest.raises(RuntimeError, match="expected load_state_dict outside of a loop"):
        pipeline.load_state_dict(state)
    batches.close()
    pipeline.load_state_dict(state)
    assert pipeline.state_dict() == state
    assert pipeline._place() != META


class Pictures(Dataset):
    """PIL images of 20 x 20 pixels, as timm's folders give them."""

    transform = None

    def __len__(self):
        return 12

    def __getitem__(self, k):
        pixels = np.random.RandomState(k).randint(0, 256, (20, 20, 3), dtype=np.uint8)
        return self.transform(PIL.Image.fromarray(pixels)), k % 5


def test_a_loader_of_timm():
    """Its transforms for a prefetcher and its collation, without the prefetcher: bytes, which are timm's own after its steps."""
    if peers.timm_mixup is None or PIL is None:
        pytest.skip("needs timm")
    data = pytest.importorskip("timm.data", reason="needs timm")
    how = {"batch_size": 4, "is_training": False, "use_prefetcher": False, "num_workers": 0, "persistent_workers": False}
    loader = data.create_loader(Pictures(), (3, 16, 16), collate_fn=data.loader.fast_collate, pin_memory=False, **how)
    loader.dataset.transform = data.create_transform((3, 16, 16), is_training=False, use_prefetcher=True)
    plain = data.create_loader(Pictures(), (3, 16, 16), mean=MEAN, std=STD, pin_memory=False, **how)
    pipeline = make().eval()
    batches = list(pipeline(loader))
    assert len(batches) == len(pipeline(loader)) == 3
    for (x, y), (expected, labels) in zip(batches, plain, strict=True):
        same(x, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(y, labels)
    for x, target in pipeline.train()(loader):
        assert x.shape == (4, 3, 16, 16)
        assert target.classes.shape == (4, 2)


def test_the_order_of_streams(monkeypatch):
    """A batch is made on the side stream before the one ahead of it is handed over, which is waited for and kept."""
    log, kept = [], []
    side, here = FakeStream("side", log), FakeStream("here", log)
    use_streams(monkeypatch, side, here, kept)
    soft = [(images, torch.rand(4, 7)) for images, _ in DataLoader(Images(8), 4)]
    for loader in (DataLoader(Images(8), 4), soft):
        del log[:]
        side.events = 0
        for x, target in make()(loader):
            log.append("step")
            assert {(t.data_ptr(), "here") for t in _pytree.tree_leaves((x, target))} == set(kept)
            assert len(kept) == (3 if loader is not soft else 4)
            del kept[:]
        made = ["begin", "side is at an event", "end"]
        assert log == ["side waits for here", *made, *made, "here waits for event 1", "step", "here waits for event 2", "step"]


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    """The side stream changes no bit of what is drawn, and the memory of a batch is not written before its reader is done."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    loader = DataLoader(Images(40), 4, pin_memory=True)
    for name in SAMPLERS:
        expected = [flat(batch) for batch in make(name)(loader)]
        pipeline, kept = make(name, device="cuda"), []
        for batch in pipeline(loader):
            torch.cuda._sleep(2_000_000)
            kept.append([t.clone() for t in flat(batch)])
        for a, b in zip(kept, expected, strict=True):
            same([t.cpu() for t in a], b, rtol=1e-5, atol=1e-5)
        assert pipeline.state_dict()["flips"] == 10


def train(rank, folder, name, stop):
    """A rank of two, with four workers: it goes on from its last files, rank 0's for the pipeline, and is killed after `stop` steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}{stop}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 5))
    batches, steps = make("two seeds")(Stateful(Subset(Images(32), range(rank, 32, 2)), workers=4, pin_memory=True)), []
    if os.path.exists(f"{folder}/{name}{rank}.pt"):
        own, first = (torch.load(f"{folder}/{name}{k}.pt", weights_only=True) for k in (rank, 0))
        steps, state = own["steps"], {**first["state"], "loader": own["state"]["loader"]}
        net[1].load_state_dict(own["net"])
        batches.load_state_dict(state)
    model = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    while batches.epoch < 2:
        for x, target in batches:
            optimizer.zero_grad()
            fastmix.soft_cross_entropy(model(x), target).backward()
            optimizer.step()
            steps.append(x.clone())
            torch.save({"steps": steps, "net": net[1].state_dict(), "state": batches.state_dict()}, f"{folder}/{name}{rank}.pt")
            if len(steps) == stop:
                os._exit(9)
    dist.barrier()
    os._exit(0)  # torch can hang where the last reference to gloo's group ends while a thread of gloo waits for Python's lock


def launch(folder):
    """Forks both ranks three times: whole; killed in the middle of the second epoch; and what goes on from there."""
    for name, stop, status in (("whole", 0, 0), ("killed", 6, 9), ("killed", 0, 0)):
        children = []
        for rank in range(2):
            children.append(os.fork())
            if not children[-1]:
                try:
                    train(rank, folder, name, stop)
                finally:
                    traceback.print_exc()
                    os._exit(1)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [status] * 2, (name, stop)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_processes_with_workers_killed_and_resumed(tmp_path):
    tests = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((os.path.dirname(tests), tests)), "OMP_NUM_THREADS": "1"}
    code = f"import test_pipeline; test_pipeline.launch({str(tmp_path)!r})"
    # a process of its own: it has run no autograd, whose threads a fork would lose
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found = {name: [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)] for name in ("whole", "killed")}
    for whole, killed in zip(*found.values(), strict=True):
        assert len(whole["steps"]) == 8
        assert all(torch.equal(a, b) for a, b in zip(whole["steps"], killed["steps"], strict=True))
        assert torch.equal(whole["net"]["weight"], found["whole"][0]["net"]["weight"])
        assert torch.equal(killed["net"]["weight"], whole["net"]["weight"])
        assert whole["state"] == killed["state"]
    assert not torch.equal(found["whole"][0]["steps"][0], found["whole"][1]["steps"][0])


def test_pinned_memory_changes_nothing():
    """Without an accelerator DataLoader warns, and pins nothing."""
    loader = DataLoader(Images(12), 4, pin_memory=True)
    if torch.accelerator.is_available():
        found = list(make()(loader))
    else:
        with pytest.warns(UserWarning, match="no accelerator is found"):
            found = list(make()(loader))
    assert equal(found, list(make()(DataLoader(Images(12), 4))))


def test_the_loaders_state_is_asked_for_only_where_it_is_wanted():
    """On the CPU the loader is where the last batch left it, so nothing is copied before somebody asks."""
    batches = make()(Stateful(Images(20)))
    for number, _ in enumerate(batches, 1):
        if number == 3:
            assert batches.loader.asked == 0
            state = batches.state_dict()
            assert (state["loader"]["done"], state["flips"], batches.loader.asked) == (3, 3, 1)
    assert state["loader"]["done"] == 3


def test_the_page():
    names = {}
    for title in ("Segmentation", "Checkpoints"):
        for code in blocks(title, "images.md"):
            exec(code, names)
    assert names["loss"].isfinite()
