"""fastmix.compat.timm beside timm itself: the same draws to the last number, the same images, targets, losses and training steps."""

import copy
import csv
import doctest
import inspect
import itertools
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from numerics import assert_close
from pages import blocks
from torch import nn
from torch.utils.data import DataLoader, Subset

import fastmix
from fastmix import Mix, MixedRows, SoftTarget, mix_images
from fastmix.bench import peers

if peers.timm_mixup is None:
    pytest.skip("needs timm", allow_module_level=True)

import timm.data
import timm.loss
import timm.optim
import timm.task
import timm.utils

from fastmix.compat import _timm_losses
from fastmix.compat import timm as compat

ROOT = pathlib.Path(__file__).parent.parent
C = 7
SEEDS = (0, 1, 2, 6)  # with the last, the extreme alphas draw CutMix with lam 1
ALPHAS = {  # mixup_alpha, cutmix_alpha, cutmix_minmax
    "mixup": (1.0, 0.0, None),
    "cutmix": (0.0, 1.0, None),
    "both": (0.8, 1.0, None),
    "extreme": (0.01, 0.01, None),  # lam is exactly 1 or 0 now and then
    "minmax": (0.0, 0.0, (0.2, 0.8)),
    "mixup and minmax": (0.3, 0.0, [0.1, 0.9]),
}


def options(alphas, mode, **others):
    mixup_alpha, cutmix_alpha, minmax = ALPHAS[alphas]
    given = {"mixup_alpha": mixup_alpha, "cutmix_alpha": cutmix_alpha, "cutmix_minmax": minmax, "mode": mode, "num_classes": C}
    return {**given, **others}


def seeded(seed, mixer, *inputs):
    """What a mixer returns, and NumPy's global state afterwards."""
    np.random.seed(seed)
    results = mixer(*inputs)
    return results, np.random.get_state()


def assert_same_state(first, second):
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])
    assert first[2:] == second[2:]


def rows_of(target):
    return target.dense() if isinstance(target, (SoftTarget, MixedRows)) else target


def test_doctests():
    for module in (compat, _timm_losses):
        result = doctest.testmod(module)
        assert result.attempted > 3
        assert result.failed == 0


def test_the_page_runs():
    for code in blocks("timm"):
        exec(code, {"dataset": [(torch.rand(3, 8, 8), i % C) for i in range(8)], "classes": C})


@pytest.mark.parametrize("name", compat.__all__)
def test_signatures(name):
    """timm's parameters, in its order and with its defaults; ours follow and are keyword-only."""
    theirs = next(getattr(module, name) for module in (timm.data, timm.loss, timm.task) if hasattr(module, name))
    ours = inspect.signature(getattr(compat, name)).parameters.values()
    theirs = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
    own = [p for p in ours if p.kind == p.KEYWORD_ONLY]
    shared = [(p.name, p.default) for p in ours if p not in own]
    if "Task" in name:  # the rest is passed on
        assert shared[:3] == theirs[:3]
    else:
        assert shared == theirs
        assert [p.name for p in own] == (["dense"] if "Mixup" in name else [])


class TestMixup:
    @pytest.mark.trap("kornia#4649-wrapper")
    @pytest.mark.parametrize("alphas", ALPHAS)
    @pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
    def test_as_timm(self, mode, alphas):
        x, y = torch.randn(6, 3, 11, 14), torch.tensor([0, 6, 3, 3, 1, 2])
        for correct_lam, prob, e, seed in itertools.product((True, False), (1.0, 0.5), (0.0, 0.1), SEEDS):
            given = options(alphas, mode, correct_lam=correct_lam, prob=prob, label_smoothing=e, switch_prob=0.4)
            (images, rows), state = seeded(seed, timm.data.Mixup(**given), x.clone(), y)
            (mixed, target), own_state = seeded(seed, compat.Mixup(**given), x, y)
            assert_same_state(own_state, state)
            torch.testing.assert_close(mixed, images, rtol=2e-6, atol=2e-6)
            assert isinstance(target, SoftTarget)
            assert (target.num_classes, target.label_smoothing) == (C, e)
            torch.testing.assert_close(target.dense(), rows, rtol=2e-6, atol=2e-6)
            dense = seeded(seed, compat.Mixup(**given, dense=True), x, y)[0][1]
            assert torch.equal(dense, target.dense())

    @pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_dtypes_and_layouts(self, dtype, mode):
        """Rounded once, from what timm computes in float64; weights of labels stay float32."""
        x, y = torch.randn(6, 3, 8, 10).to(dtype), torch.arange(6, dtype=torch.int32)
        for alphas, seed, layout in itertools.product(ALPHAS, range(3), (torch.contiguous_format, torch.channels_last)):
            given = options(alphas, mode)
            images, rows = seeded(seed, timm.data.Mixup(**given), x.double().clone(), y)[0]
            source = x.to(memory_format=layout)
            (mixed, target), _ = seeded(seed, compat.Mixup(**given), source, y)
            if dtype == torch.float64:  # timm rounds 1 - lam to float32
                torch.testing.assert_close(mixed, images, rtol=2e-6, atol=2e-6)
            else:
                assert_close(mixed, images.numpy(), dtype)
            assert mixed.is_contiguous(memory_format=layout)
            torch.testing.assert_close(target.dense(), rows.float(), rtol=2e-6, atol=2e-6)
            assert target.weights.dtype == torch.float32

    @pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
    def test_multi_label(self, mode):
        x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 2, (6, C))
        for alphas, e, seed in itertools.product(ALPHAS, (0.0, 0.1), range(3)):
            given = options(alphas, mode, label_smoothing=e, multi_label=True)
            (images, rows), state = seeded(seed, timm.data.Mixup(**given), x.clone(), y)
            (mixed, target), own_state = seeded(seed, compat.Mixup(**given), x, y)
            assert_same_state(own_state, state)
            torch.testing.assert_close(mixed, images, rtol=2e-6, atol=2e-6)
            assert isinstance(target, MixedRows)
            torch.testing.assert_close(target.dense(), rows, rtol=2e-6, atol=2e-6)
            dense = seeded(seed, compat.Mixup(**given, dense=True), x, y)[0][1]
            assert torch.equal(dense, target.dense())

    @pytest.mark.trap("kornia#4649-wrapper")
    @pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
    @pytest.mark.parametrize("rows", [1, 5, 0])
    def test_odd_batches(self, rows, mode):
        """The middle row is its own partner; the others are mixed as timm mixes the batch without it."""
        x, y = torch.randn(rows, 3, 8, 8), torch.arange(rows)
        others = torch.tensor([i for i in range(rows) if i != rows // 2], dtype=torch.int64)
        for alphas, seed in itertools.product(("mixup", "cutmix", "both"), range(3)):
            (mixed, target), _ = seeded(seed, compat.Mixup(**options(alphas, mode)), x, y)
            if rows:
                torch.testing.assert_close(mixed[rows // 2], x[rows // 2])
                assert target[rows // 2].dense()[0, rows // 2] > 0.9
            if mode != "elem" and rows > 1:  # draws a row more
                given = x[others], y[others]
                (images, dense), _ = seeded(seed, timm.data.Mixup(**options(alphas, mode)), given[0].clone(), given[1])
                torch.testing.assert_close(mixed[others], images, rtol=2e-6, atol=2e-6)
                torch.testing.assert_close(target[others].dense(), dense, rtol=2e-6, atol=2e-6)

    def test_inputs_are_not_written_and_gradients_flow(self):
        x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
        for mode, alphas, seed in itertools.product(("batch", "pair", "elem"), ALPHAS, range(3)):
            before, version = x.clone(), x._version
            seeded(seed, compat.Mixup(**options(alphas, mode)), x, y)
            assert torch.equal(x, before)
            assert x._version == version
        leaf = x.clone().requires_grad_()
        (mixed, _), _ = seeded(0, compat.Mixup(**options("mixup", "elem")), leaf, y)
        mixed.sum().backward()
        assert leaf.grad.sum().item() == pytest.approx(x.numel(), rel=1e-5)  # lam and 1 - lam of each row

    def test_off(self):
        x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
        for mode in ("batch", "pair", "elem"):
            ours, theirs = (module.Mixup(**options("both", mode)) for module in (compat, timm.data))
            ours.mixup_enabled = theirs.mixup_enabled = False
            (mixed, target), own_state = seeded(0, ours, x, y)
            (images, rows), state = seeded(0, theirs, x.clone(), y)
            assert_same_state(own_state, state)
            np.random.seed(0)
            assert_same_state(own_state, np.random.get_state())  # none drawn
            assert torch.equal(mixed, images)
            torch.testing.assert_close(target.dense(), rows, rtol=2e-6, atol=2e-6)

    def test_one_launch(self, monkeypatch):
        calls = []
        backend = fastmix._backend.module(fastmix._backend.name(torch.device("cpu")))
        launch = backend.mix_fwd
        monkeypatch.setattr(backend, "mix_fwd", lambda *args: calls.append(1) or launch(*args))
        for mode, seed in itertools.product(("batch", "pair", "elem"), range(3)):
            calls.clear()
            seeded(seed, compat.Mixup(**options("both", mode)), torch.randn(6, 3, 8, 8), torch.arange(6))
            assert len(calls) == 1

    def test_attributes(self):
        ours, theirs = (module.Mixup(0.3, 0.4, prob=0.5, num_classes=C) for module in (compat, timm.data))
        for name, value in vars(theirs).items():
            assert getattr(ours, name) == value, name
        assert ours.mixup_enabled is True
        minmax = compat.Mixup(0.0, cutmix_minmax=(0.2, 0.8))
        assert minmax.cutmix_alpha == 1.0
        assert "cutmix_minmax=(0.2, 0.8)" in repr(minmax)

    def test_copies_have_a_flag_of_their_own(self):
        for copied in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            mixup = compat.Mixup(**options("both", "batch"))
            other = copied(mixup)
            other.mixup_enabled = False
            assert mixup.mixup_enabled
            assert other._enabled.is_shared()
            assert other.switch_prob == mixup.switch_prob


BAD = [
    ({"mode": "rows"}, ValueError, "mode: expected 'batch' or 'pair' or 'elem'"),
    ({"mixup_alpha": 0.0}, ValueError, "mixup_alpha, cutmix_alpha: expected one that is positive.*0.0 and 0.0"),
    ({"mixup_alpha": "1"}, TypeError, "mixup_alpha: expected a float"),
    ({"cutmix_minmax": 0.5}, ValueError, "cutmix_minmax: expected None or a pair"),
    ({"cutmix_minmax": (0.1, 0.2, 0.3)}, ValueError, "cutmix_minmax: expected None or a pair"),
    ({"cutmix_minmax": (0.5, 0.5)}, ValueError, "cutmix_minmax: .*no side is left"),
    ({"cutmix_minmax": (0.5, 1.5)}, ValueError, r"cutmix_minmax: expected a float in \[0, 1\]"),
    ({"prob": 1.5}, ValueError, r"prob: expected a float in \[0, 1\], got 1.5"),
    ({"switch_prob": -0.1}, ValueError, r"switch_prob: expected a float in \[0, 1\]"),
    ({"label_smoothing": 1.1}, ValueError, r"label_smoothing: expected a float in \[0, 1\]"),
    ({"num_classes": 10.0}, TypeError, "num_classes: expected an int"),
    ({"num_classes": None}, TypeError, "num_classes: expected an int"),
    ({"num_classes": 0}, ValueError, "num_classes: expected an int of at least 1"),
]


class TestBadInput:
    @pytest.mark.parametrize(("given", "error", "message"), BAD, ids=lambda v: str(v)[:40])
    def test_options(self, given, error, message):
        for mixer in (compat.Mixup, compat.FastCollateMixup):
            with pytest.raises(error, match=message):
                mixer(**given)
        (name,) = given
        name = {"prob": "mix_prob"}.get(name, name)
        if name != "mixup_alpha" or error is TypeError:  # no alpha positive is found at the next call
            with pytest.raises(error, match=message.removeprefix("prob")):
                setattr(compat.Mixup(), name, given.get(name, 1.5))

    def test_half_is_for_collating(self):
        with pytest.raises(ValueError, match="mode"):
            compat.Mixup(mode="half")
        assert compat.FastCollateMixup(mode="half").mode == "half"

    def test_calls(self):
        x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
        mixup = compat.Mixup(**options("both", "batch"))
        state = np.random.get_state()
        with pytest.raises(TypeError, match="x: expected floating images .FastCollateMixup mixes uint8 ones"):
            mixup(x.to(torch.uint8), y)
        with pytest.raises(ValueError, match=r"x: expected shape \[N, C, H, W\] where CutMix"):
            mixup(x[0], y[:3])
        for bad in (C, -1):
            with pytest.raises(ValueError, match=rf"target: expected a class in \[0, {C}\), got {bad} in row 1"):
                mixup(x, torch.tensor([0, bad, 1, 1]))
        with pytest.raises(TypeError, match="target: expected integer class indices"):
            mixup(x, y.float())
        with pytest.raises(TypeError, match="target: expected a tensor"):
            mixup(x, y.tolist())
        with pytest.raises(ValueError, match="target: expected class indices of shape"):
            mixup(x, y[:3])
        with pytest.raises(ValueError, match=r"target: expected multi-hot rows of shape \[4, 7\]"):
            compat.Mixup(**options("both", "batch", multi_label=True))(x, torch.zeros(4, 3))
        small = compat.Mixup(**options("both", "batch", cutmix_minmax=(0.1, 0.2)))
        with pytest.raises(ValueError, match="cutmix_minmax: expected fractions that leave a side of a box in images of 4 x 4"):
            small(torch.randn(4, 3, 4, 4), y)
        mixup.mixup_alpha = mixup.cutmix_alpha = 0.0
        with pytest.raises(ValueError, match="mixup_alpha, cutmix_alpha"):
            mixup(x, y)
        assert_same_state(np.random.get_state(), state)  # nothing was drawn before an error

    def test_samples(self):
        collate = compat.FastCollateMixup(**options("both", "batch"))
        for bad in (np.zeros((3, 4, 4), dtype=np.float32), torch.zeros(3, 4, 4), (np.zeros((3, 4, 4), dtype=np.uint8),)):
            with pytest.raises(TypeError, match="batch: expected samples with uint8 images"):
                collate([(bad, 0), (bad, 1)])


class TestFastCollateMixup:
    def samples(self, kind, rows=6, labels=None):
        generator = np.random.default_rng(rows)
        images = [generator.integers(0, 256, (3, 11, 14), dtype=np.uint8) for _ in range(rows)]
        images = images if kind == "arrays" else [torch.from_numpy(image) for image in images]
        return list(zip(images, labels or range(rows), strict=True))

    @pytest.mark.parametrize("alphas", ALPHAS)
    @pytest.mark.parametrize("mode", ["batch", "pair", "elem", "half"])
    def test_as_timm(self, mode, alphas):
        for kind, correct_lam, prob, seed in itertools.product(("arrays", "tensors"), (True, False), (1.0, 0.5), SEEDS):
            given = options(alphas, mode, correct_lam=correct_lam, prob=prob)
            (images, rows), state = seeded(seed, timm.data.FastCollateMixup(**given), copy.deepcopy(self.samples(kind)))
            samples = self.samples(kind)
            (mixed, target), own_state = seeded(seed, compat.FastCollateMixup(**given), samples)
            assert_same_state(own_state, state)
            assert mixed.dtype == torch.uint8
            off = (mixed.int() - images.int()).abs()
            assert off.max() <= 1
            assert (off > 0).float().mean() < 1e-3
            torch.testing.assert_close(rows_of(target), rows, rtol=2e-6, atol=2e-6)
            for (image, _), (before, _) in zip(samples, self.samples(kind), strict=True):
                np.testing.assert_array_equal(image, before)
            dense = seeded(seed, compat.FastCollateMixup(**given, dense=True), samples)[0][1]
            torch.testing.assert_close(dense, rows, rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("mode", ["batch", "pair", "elem", "half"])
    def test_multi_label(self, mode):
        labels = [np.random.default_rng(i).integers(0, 2, C).astype(np.float32) for i in range(6)]
        given = options("both", mode, multi_label=True)
        for seed in range(4):
            (_, rows), state = seeded(seed, timm.data.FastCollateMixup(**given), self.samples("arrays", labels=labels))
            (_, target), own_state = seeded(seed, compat.FastCollateMixup(**given), self.samples("arrays", labels=labels))
            assert_same_state(own_state, state)
            assert isinstance(target, MixedRows)
            torch.testing.assert_close(target.dense(), rows, rtol=2e-6, atol=2e-6)

    @pytest.mark.parametrize("mode", ["batch", "pair", "elem", "half"])
    @pytest.mark.parametrize("rows", [1, 5, 19])
    def test_odd_batches(self, rows, mode):
        """Against the same mixing in float64, row by row; 19 rows are more than one block."""
        samples = self.samples("arrays", rows, labels=[i % C for i in range(rows)])
        x = torch.from_numpy(np.stack([image for image, _ in samples]).astype(np.float64))
        count = (rows + 1) // 2 if mode == "half" else rows
        for seed in range(3):
            (mixed, target), _ = seeded(seed, compat.FastCollateMixup(**options("mixup", mode)), samples)
            assert mixed.shape[0] == len(target) == count
            lam = target.weights[:, 0].double().view(-1, 1, 1, 1)
            expected = lam * x[:count] + (1 - lam) * x.flip(0)[:count]
            assert ((mixed.double() - expected).abs() <= 0.5 + 1e-4).all()
            assert target.classes[:, 1].tolist() == [(rows - 1 - i) % C for i in range(count)]

    def test_rounds_half_to_even(self):
        collate = compat.FastCollateMixup(**options("mixup", "batch"))
        collate._draw_one = lambda: (0.5, False)
        values = [(0, 1), (2, 3), (4, 5)]  # halves: 0.5, 2.5, 4.5
        samples = [(np.array(column, dtype=np.uint8).reshape(3, 1, 1), 0) for column in zip(*values, strict=True)]
        images, _ = collate(samples)
        assert images[0].flatten().tolist() == [0, 2, 4]

    def test_is_timms(self):
        assert isinstance(compat.FastCollateMixup(), timm.data.FastCollateMixup)
        assert isinstance(compat.Mixup(), timm.data.Mixup)

    @pytest.mark.trap("mixup-off-epoch")
    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_off_reaches_persistent_workers(self, method):
        collate = compat.FastCollateMixup(**options("mixup", "elem"))
        dataset = Subset(self.samples("arrays"), range(6))
        dataset.first = peers.first_line  # a new process loads peers first, which can load torchvision beside any torch
        context = torch.multiprocessing.get_context(method)
        workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": context}
        loader = DataLoader(dataset, 6, collate_fn=collate, **workers)
        for on in (True, False, True):
            collate.mixup_enabled = on
            (_, target), *_ = list(loader)
            assert bool((target.weights[:, 0] == 1).all()) is not on


def loss_and_gradient(criterion, x, target):
    x = x.clone().requires_grad_()
    loss = criterion(x, target)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape))
    return loss.detach(), x.grad


def assert_same_loss(ours, theirs, x, target, rows):
    (loss, gradient), (expected, expected_gradient) = (
        loss_and_gradient(ours, x, target),
        loss_and_gradient(theirs, x, rows),
    )
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-5, atol=1e-6)


def mixed_target(e=0.1, rows=6, multi_label=False):
    """Our target of a mixed batch, and the same as timm's dense rows."""
    y = torch.randint(0, 2, (rows, C)).float() if multi_label else torch.randint(0, C, (rows,))
    mixup = compat.Mixup(**options("mixup", "elem", label_smoothing=e, multi_label=multi_label))
    _, target = mixup(torch.randn(rows, 2), y)
    return target, target.dense()


class TestLosses:
    def test_soft_target_cross_entropy(self):
        x = torch.randn(6, C)
        ours, theirs = compat.SoftTargetCrossEntropy(), timm.loss.SoftTargetCrossEntropy()
        target, rows = mixed_target()
        multi, multi_rows = mixed_target(multi_label=True)
        for given, dense in ((target, rows), (rows, rows), (target.parts(), rows), (multi, multi_rows)):
            assert_same_loss(ours, theirs, x, given, dense)
        y = torch.randint(0, C, (6,), dtype=torch.int16)
        assert_same_loss(ours, nn.CrossEntropyLoss(), x, y, y.long())
        tokens, dense = torch.randn(2, 3, C), torch.rand(2, 3, C).softmax(-1)  # classes are timm's last dimension
        assert_same_loss(ours, theirs, tokens, dense, dense)

    @pytest.mark.parametrize("e", [0.0, 0.1, 0.5])
    def test_label_smoothing_cross_entropy(self, e):
        x, y = torch.randn(6, C), torch.randint(0, C, (6,))
        ours = compat.LabelSmoothingCrossEntropy(e)
        assert_same_loss(ours, timm.loss.LabelSmoothingCrossEntropy(e), x, y, y)
        assert_same_loss(ours, timm.loss.LabelSmoothingCrossEntropy(e), x, y.to(torch.int32), y)
        target, rows = mixed_target()
        for given in (target, rows):
            assert_same_loss(ours, nn.CrossEntropyLoss(label_smoothing=e), x, given, rows)
        assert (ours.smoothing, ours.confidence) == (e, 1 - e)
        with pytest.raises(ValueError, match="smoothing"):
            compat.LabelSmoothingCrossEntropy(1.0)

    @pytest.mark.parametrize("smooth_dense", [False, True])
    @pytest.mark.parametrize("threshold", [None, 0.2])
    @pytest.mark.parametrize(("reduction", "sum_classes"), [("mean", False), ("sum", False), ("none", False), ("mean", True)])
    def test_binary_cross_entropy(self, reduction, sum_classes, threshold, smooth_dense):
        x = torch.randn(6, C)
        target, rows = mixed_target()
        multi, multi_rows = mixed_target(multi_label=True)
        y = torch.randint(0, C, (6,))
        w = torch.rand(C)
        weights = (None, None), (w, 2.0), (None, 3), (w, torch.tensor(1.5)), (None, torch.tensor([0.5])), (w, torch.rand(C))
        for e, (weight, pos_weight) in itertools.product((0.0, 0.1), weights):
            given = {
                "smoothing": e,
                "target_threshold": threshold,
                "weight": weight,
                "reduction": reduction,
                "sum_classes": sum_classes,
                "pos_weight": pos_weight,
                "smooth_dense": smooth_dense,
            }
            ours, theirs = compat.BinaryCrossEntropy(**given), timm.loss.BinaryCrossEntropy(**given)
            for own, dense in ((y, y), (y.to(torch.int32), y), (rows, rows), (multi_rows, multi_rows), (multi, multi_rows)):
                assert_same_loss(ours, theirs, x, own, dense)
            unsmoothed = timm.loss.BinaryCrossEntropy(**{**given, "smoothing": 0.0})  # a SoftTarget has its own
            for own in (target, target.parts()):
                assert_same_loss(ours, unsmoothed, x, own, rows)

    def test_binary_cross_entropy_state(self):
        given = {"weight": torch.rand(C), "pos_weight": 2.0}
        ours, theirs = compat.BinaryCrossEntropy(**given), timm.loss.BinaryCrossEntropy(**given)
        ours.load_state_dict(theirs.state_dict())
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        scalar = compat.BinaryCrossEntropy(weight=torch.tensor(3.0), smoothing=0.0)
        x, y = torch.randn(6, C), torch.rand(6, C)
        assert_same_loss(scalar, timm.loss.BinaryCrossEntropy(weight=torch.tensor(3.0), smoothing=0.0), x, y, y)
        with pytest.raises(ValueError, match="reduction"):
            compat.BinaryCrossEntropy(reduction="max")
        with pytest.raises(ValueError, match="smoothing"):
            compat.BinaryCrossEntropy(smoothing=1.0)

    @pytest.mark.parametrize("smoothing", [None, 0.0, 0.1])
    @pytest.mark.parametrize(("splits", "alpha"), [(3, 12), (2, 5.0)])
    def test_jsd_cross_entropy(self, splits, alpha, smoothing):
        x, y = torch.randn(splits * 4, C), torch.randint(0, C, (splits * 4,))
        ours = compat.JsdCrossEntropy(splits, alpha, smoothing)
        assert_same_loss(ours, timm.loss.JsdCrossEntropy(splits, alpha, smoothing), x, y, y)
        target, rows = mixed_target(rows=splits * 4)

        def expected(x, rows):
            ce = nn.CrossEntropyLoss(label_smoothing=smoothing or 0.0)(x[:4], rows[:4])
            plain = timm.loss.JsdCrossEntropy(splits, alpha, None)
            return ce + plain(x, y) - nn.CrossEntropyLoss()(x[:4], y[:4])

        assert_same_loss(ours, expected, x, target, rows)
        with pytest.raises(ValueError, match=f"output: expected rows that divide into {splits} splits"):
            ours(x[1:], y)

    def test_jsd_hooks_run(self):
        criterion, seen = compat.JsdCrossEntropy(), []
        criterion.register_forward_hook(lambda *_: seen.append(1))
        criterion(torch.randn(6, C), torch.arange(6))
        assert seen == [1]


class TestFactory:
    FACTORY = [
        ({}, "_CrossEntropyLoss"),
        ({"smoothing": 0.1}, "LabelSmoothingCrossEntropy"),
        ({"smoothing": 0.1, "soft_targets": True}, "SoftTargetCrossEntropy"),
        ({"loss_type": "bce", "smoothing": 0.1, "pos_weight": 2.0, "class_weight": [1.0] * C, "bce_sum": True}, "Binary"),
        ({"loss_type": "bce", "bce_target_thresh": 0.2, "class_weight": 2.0}, "BinaryCrossEntropy"),
        ({"multi_label": True, "smoothing": 0.2, "pos_weight": [2.0] * C}, "BinaryCrossEntropy"),
        ({"loss_type": "jsd", "jsd_splits": 2, "smoothing": 0.1}, "JsdCrossEntropy"),
        ({"loss_type": "jsd", "jsd_splits": 2}, "JsdCrossEntropy"),
    ]

    @pytest.mark.parametrize(("given", "name"), FACTORY, ids=str)
    def test_ours(self, given, name):
        ours, theirs = compat.create_classification_loss(**given), timm.loss.create_classification_loss(**given)
        assert type(ours).__module__.startswith("fastmix.")
        assert type(ours).__name__.startswith(name)
        assert isinstance(ours, type(theirs))
        dense = given.get("multi_label") or given.get("soft_targets")
        target = torch.rand(6, C) if dense else torch.randint(0, C, (6,))
        assert_same_loss(ours, theirs, torch.randn(6, C), target, target)

    @pytest.mark.parametrize("given", [{"loss_type": "asl"}, {"loss_type": "poly"}, {"loss_type": "zlpr", "multi_label": True}])
    def test_timms(self, given):
        made = compat.create_classification_loss(**given)
        assert type(made).__module__.startswith("timm.")

    def test_errors_are_timms(self):
        with pytest.raises(ValueError, match="Unknown loss type"):
            compat.create_classification_loss("mse")

    def test_tasks(self):
        model = nn.Linear(4, C)
        x, quiet = torch.randn(6, 4), {"device": torch.device("cpu"), "verbose": False}
        target, rows = mixed_target()
        task = compat.ClassificationTask(model, criterion_kwargs={"soft_targets": True}, **quiet)
        expected = timm.task.ClassificationTask(model, criterion_kwargs={"soft_targets": True}, **quiet)(x, rows)
        torch.testing.assert_close(task(x, target)["loss"], expected["loss"])
        multi, rows = mixed_target(multi_label=True)
        given = {"criterion_kwargs": {"smoothing": 0.1, "soft_targets": True}, "threshold": 0.3, **quiet}
        task, theirs = (module.MultiLabelClassificationTask(model, **given) for module in (compat, timm.task))
        expected = theirs(x, rows)["loss"]
        for given in (multi, rows):
            torch.testing.assert_close(task(x, given)["loss"], expected)
        assert task.threshold == 0.3
        with pytest.raises(ValueError, match="dense floating-point targets"):
            task(x, torch.arange(6))
        own = nn.MSELoss()
        assert compat.ClassificationTask(model, own, **quiet).criterion is own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of JPEGs, as an ImageFolder of two splits."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, kind in itertools.product(("train", "validation"), ("cat", "dog")):
        (root / split / kind).mkdir(parents=True)
        for i in range(16):
            pixels = generator.integers(0, 128, (40, 40, 3)) + (64 if kind == "cat" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / kind / f"{i}.jpg")
    return root


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))

    def forward(self, x):
        return self.layers(x)


def trained(names, folder, prefetcher, workers, off=None, mode="elem", epochs=2):
    """Losses and targets of each step of a run with timm's own data sets, loader, task, optimizer and EMA."""
    timm.utils.random_seed(0)
    given = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": 2, "mode": mode}
    mixup = names.Mixup(**given)
    device = torch.device("cpu")
    dataset = timm.data.create_dataset("", root=str(folder), split="train", is_training=True)
    loader = timm.data.create_loader(
        dataset,
        input_size=(3, 32, 32),
        batch_size=8,
        is_training=True,
        use_prefetcher=prefetcher,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=names.FastCollateMixup(**given) if prefetcher else None,
        device=device,
    )
    model = Small()
    model(torch.zeros(2, 3, 32, 32))
    task = names.ClassificationTask(model, criterion_kwargs={"soft_targets": True}, device=device, verbose=False)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9)
    ema = timm.utils.ModelEmaV3(model, decay=0.9)
    losses, targets = [], []
    for epoch in range(epochs):
        if epoch == off:
            (loader if prefetcher else mixup).mixup_enabled = False
        for x, y in loader:
            x, y = (x, y) if prefetcher else mixup(x, y)
            loss = task(x, y)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
            targets.append(rows_of(y))
    averages = torch.cat([p.flatten() for p in ema.module.parameters()])
    return losses, targets, averages.detach()


class Theirs:
    Mixup, FastCollateMixup = timm.data.Mixup, timm.data.FastCollateMixup
    ClassificationTask = timm.task.ClassificationTask


# timm's readers leave files for the garbage collector to close
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
class TestTraining:
    @pytest.mark.slow
    @pytest.mark.parametrize(("prefetcher", "workers"), [(True, 0), (True, 1), (False, 0), (False, 1)])
    def test_the_same_steps(self, folder, prefetcher, workers):
        losses, targets, averages = trained(Theirs, folder, prefetcher, workers)
        own_losses, own_targets, own_averages = trained(compat, folder, prefetcher, workers)
        assert len(losses) == 8
        assert np.ptp(losses) > 0.01
        np.testing.assert_allclose(own_losses, losses, atol=2e-3)
        for own, theirs in zip(own_targets, targets, strict=True):
            torch.testing.assert_close(own, theirs, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(own_averages, averages, rtol=0, atol=2e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [0, 1])
    def test_off_epoch(self, folder, workers):
        _, targets, _ = trained(compat, folder, True, workers, off=1)
        mixed = [bool((rows.max(1).values < 0.94).any()) for rows in targets]  # 0.95 is a label that is smoothed only
        assert mixed == [True] * 4 + [False] * 4


@pytest.mark.slow
def test_timms_script_with_a_line_added(folder, tmp_path):
    """FASTMIX_TIMM_TRAIN names timm's train.py, which its package does not contain."""
    path = os.environ.get("FASTMIX_TIMM_TRAIN")
    if not path:
        pytest.skip("needs timm's train.py, named by FASTMIX_TIMM_TRAIN")
    lines = pathlib.Path(path).read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("from timm"))
    last = next(i for i in range(last, len(lines)) if not lines[i].endswith((",", "\\", "(")))
    added = "from fastmix.compat.timm import *"
    losses = {}
    for name, extra in (("theirs", []), ("ours", [added])):
        script = tmp_path / f"{name}.py"
        script.write_text("\n".join([*lines[: last + 1], *extra, *lines[last + 1 :]]))
        arguments = (
            f"--data-dir {folder} --model test_resnet --num-classes 2 --batch-size 8 --epochs 2 --workers 0 --device cpu "
            f"--mixup 0.8 --cutmix 1.0 --opt sgd --lr 0.01 --warmup-epochs 0 --output {tmp_path} --experiment {name} --seed 1"
        )
        # peers can load torchvision beside any torch
        code = f"import fastmix.bench.peers, runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        command = [sys.executable, "-c", code]
        ran = subprocess.run(
            [*command, *arguments.split()],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        with open(tmp_path / name / "summary.csv") as summary:
            losses[name] = [float(row["train_loss"]) for row in csv.DictReader(summary)]
    np.testing.assert_allclose(losses["ours"], losses["theirs"], atol=2e-3)


class TestOptionsSetLater:
    @pytest.mark.parametrize(
        ("make", "name", "value", "kind"),
        [
            (compat.LabelSmoothingCrossEntropy, "smoothing", 1.0, ValueError),
            (compat.LabelSmoothingCrossEntropy, "smoothing", "0.1", TypeError),
            (compat.BinaryCrossEntropy, "smoothing", -0.1, ValueError),
            (compat.BinaryCrossEntropy, "target_threshold", "0.2", TypeError),
            (compat.BinaryCrossEntropy, "target_threshold", float("nan"), ValueError),
            (compat.BinaryCrossEntropy, "reduction", "average", ValueError),
            (compat.BinaryCrossEntropy, "sum_classes", "no", TypeError),
            (compat.BinaryCrossEntropy, "smooth_dense", 2, TypeError),
            (compat.BinaryCrossEntropy, "pos_weight", "2", TypeError),
            (compat.BinaryCrossEntropy, "weight", "2", TypeError),
            (compat.JsdCrossEntropy, "num_splits", 0, ValueError),
            (compat.JsdCrossEntropy, "num_splits", 17, ValueError),
            (compat.JsdCrossEntropy, "num_splits", 2.0, TypeError),
            (compat.JsdCrossEntropy, "alpha", "12", TypeError),
            (compat.Mixup, "correct_lam", "no", TypeError),
            (compat.Mixup, "multi_label", 2, TypeError),
            (compat.FastCollateMixup, "dense", "no", TypeError),
        ],
    )
    def test_are_checked(self, make, name, value, kind):
        """As in the constructor, by name; what was there stays."""
        made = make()
        before = getattr(made, name)
        with pytest.raises(kind, match=rf"^{name}: expected .*, got "):
            setattr(made, name, value)
        assert getattr(made, name) is before
        with pytest.raises(kind, match=rf"^{name}: expected .*, got "):
            make(**{name: value})

    def test_are_used(self):
        logits, labels = torch.randn(6, 4), torch.arange(6) % 4
        loss, theirs = compat.LabelSmoothingCrossEntropy(), timm.loss.LabelSmoothingCrossEntropy(0.3)
        loss.smoothing = np.float32(0.3)
        assert loss.confidence == pytest.approx(0.7)
        torch.testing.assert_close(loss(logits, labels), theirs(logits, labels))
        loss, theirs = compat.BinaryCrossEntropy(), timm.loss.BinaryCrossEntropy(0.2, sum_classes=True, pos_weight=3.0)
        loss.smoothing, loss.sum_classes, loss.pos_weight = 0.2, np.bool_(True), 3
        assert loss.sum_classes is True
        torch.testing.assert_close(loss(logits, labels), theirs(logits, labels))
        loss, theirs = compat.JsdCrossEntropy(), timm.loss.JsdCrossEntropy(2, 5.0)
        loss.num_splits, loss.alpha = 2, 5
        torch.testing.assert_close(loss(logits, labels), theirs(logits, labels))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(), (1,), (C,), (1, 1), (1, C)])
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_are_broadcast_as_timms(name, shape, reduction):
    logits, rows, given = torch.randn(5, C), torch.rand(5, C), {name: torch.rand(shape) + 0.5, "reduction": reduction}
    torch.testing.assert_close(
        compat.BinaryCrossEntropy(**given)(logits, rows), timm.loss.BinaryCrossEntropy(**given)(logits, rows)
    )


@pytest.mark.parametrize(
    ("samples", "kind", "words"),
    [
        ([], ValueError, "batch: expected at least one sample"),
        ([((3, 2, 2), np.uint8), ((3, 2, 4), np.uint8)], ValueError, r"batch: expected images of one shape, \[3, 2, 2\], got .* \[3, 2, 4\]"),
        ([((3, 2, 2), np.uint8), ((3, 2, 2), np.float32)], TypeError, "batch: expected samples with uint8 images"),
    ],
)  # fmt: skip
def test_batches_that_are_no_batch(samples, kind, words):
    with pytest.raises(kind, match=words):
        compat.FastCollateMixup()([(np.zeros(shape, dtype), 0) for shape, dtype in samples])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_to_a_mixed_batch_as_the_prefetcher_and_mixup(dtype):
    """mix_images in one pass, beside timm's PrefetchLoader and Mixup; in float16 timm rounds each step."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images, y = torch.randint(0, 256, (6, 3, 9, 8), dtype=torch.uint8), torch.arange(6)
    [(x, _)] = timm.data.loader.PrefetchLoader([(images, y)], mean, std, device=torch.device("cpu"), img_dtype=dtype)
    theirs = timm.data.Mixup(1.0, 1.0, num_classes=C, label_smoothing=0.0)
    rows = torch.arange(5, -1, -1)
    for seed in range(6):
        np.random.seed(seed)
        lam, cut = theirs._params_per_batch()
        box = None
        if cut:
            (y0, y1, x0, x1), lam = timm.data.mixup.cutmix_bbox_and_lam(images.shape, lam)
            box = torch.tensor([[y0, x0, y1, x1]]).expand(6, 4)
        mix = Mix(1.0, rows, lam, box) if cut else Mix(float(lam), rows)
        ours = mix_images(images, mix, mean=mean, std=std, dtype=dtype)
        np.random.seed(seed)
        mixed, dense = theirs(x.clone(), y)
        torch.testing.assert_close(mix.target(y).dense(C), dense)
        if dtype == torch.float32:
            torch.testing.assert_close(ours, mixed, rtol=2e-6, atol=2e-6)
        else:
            truth = mix_images(images, mix, mean=mean, std=std, dtype=torch.float64)
            assert (ours - truth).abs().max() < (mixed - truth).abs().max()


class TestLabelsThatAreNoLabels:
    """Integer rows are rows of 0 and 1: other numbers are classes, or marks of what is not known."""

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
    def test_multi_hot_integers(self, dtype):
        rows = torch.tensor([[1, 0, 1], [0, 1, 0]]).to(dtype)
        np.random.seed(0)
        target = compat.Mixup(1.0, num_classes=3, multi_label=True, dense=True)(torch.rand(2, 4), rows)[1]
        np.random.seed(0)
        np.random.rand()
        lam = np.random.beta(1.0, 1.0)
        smoothed = rows.double() * 0.9 + 0.05
        torch.testing.assert_close(target.double(), lam * smoothed + (1 - lam) * smoothed.flip(0), rtol=0, atol=2e-6)

    @pytest.mark.parametrize("wrong", [2, -1, 255])
    def test_other_integers(self, wrong):
        rows = torch.tensor([[1, 0, 1], [0, wrong, 0]])
        with pytest.raises(ValueError, match=rf"target: .*0 or 1.*got {wrong} in row 1"):
            compat.Mixup(1.0, num_classes=3, multi_label=True)(torch.rand(2, 4), rows)
        samples = [(np.zeros((3, 2, 2), dtype=np.uint8), row) for row in rows]
        with pytest.raises(ValueError, match="0 or 1"):
            compat.FastCollateMixup(1.0, num_classes=3, multi_label=True)(samples)

    def test_rows_without_multi_label(self):
        with pytest.raises(ValueError, match="multi_label=True"):
            compat.Mixup(1.0, num_classes=3)(torch.rand(2, 4), torch.eye(3).long()[:2])

    def test_mixup_enabled_is_a_flag(self):
        mixup = compat.Mixup(1.0, num_classes=3)
        for wrong in ("no", None, 2):
            with pytest.raises(TypeError, match="mixup_enabled"):
                mixup.mixup_enabled = wrong
        assert mixup.mixup_enabled

    def test_accuracy(self):
        target = compat.Mixup(1.0, num_classes=3)(torch.rand(2, 4), torch.tensor([0, 2]))[1]
        logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
        with pytest.raises(AttributeError, match=r"argmax\(\)"):
            timm.utils.accuracy(logits, target)
        (top1,) = timm.utils.accuracy(logits, target.argmax())
        assert float(top1) == 50.0  # one of the two rows is of class 2 more than of class 0
