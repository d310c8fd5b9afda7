"""fastmix.compat.torchvision beside torchvision itself: the same draws, images, targets and training steps."""

import copy
import doctest
import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
from pages import blocks
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, default_collate

from fastmix import CutMix, ImagePipeline, MixedRows, Mixup, SoftTarget, mix_images, soft_cross_entropy
from fastmix.bench import peers

if peers.torchvision is None:
    pytest.skip("needs torchvision", allow_module_level=True)

from torchvision import tv_tensors
from torchvision.transforms import v2

from fastmix.compat import torchvision as compat

NAMES = ["MixUp", "CutMix"]
C = 6


def seeded(seed, transform, *inputs):
    """What a transform returns, and torch's global state afterwards."""
    torch.manual_seed(seed)
    results = transform(*inputs)
    return results, torch.get_rng_state()


def both(name, *inputs, seed=0, **options):
    """torchvision's result and ours, drawn alike."""
    theirs, state = seeded(seed, getattr(v2, name)(**options), *inputs)
    ours, own_state = seeded(seed, getattr(compat, name)(**options), *inputs)
    assert torch.equal(own_state, state)
    return theirs, ours


def labels_of(kind, rows):
    y = torch.arange(rows) % C
    return {"indices": y, "one-hot": one_hot(y, C), "rows": torch.rand(rows, C), "half rows": torch.rand(rows, C).half()}[kind]


def test_doctests():
    result = doctest.testmod(compat)
    assert result.attempted > 5
    assert result.failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    theirs = list(inspect.signature(getattr(v2, name)).parameters.values())
    ours = list(inspect.signature(getattr(compat, name)).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert [(p.name, p.default) for p in ours[len(theirs) :]] == [("dense", False)]
    assert issubclass(getattr(compat, name), getattr(v2, name))


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("rows", [8, 5, 1])
@pytest.mark.parametrize("kind", ["indices", "one-hot", "rows", "half rows"])
@pytest.mark.parametrize(
    ("name", "dtype"), [*itertools.product(NAMES, FLOATS), ("CutMix", torch.uint8), ("CutMix", torch.int32)]
)
def test_as_torchvision(name, dtype, kind, rows):
    x, y = (torch.rand(rows, 3, 9, 12) * 200).to(dtype), labels_of(kind, rows)
    before = x.clone(), y.clone()
    for seed, alpha in itertools.product(range(4), (1.0, 0.1)):
        (images, dense), (mixed, target) = both(name, x, y, seed=seed, num_classes=C, alpha=alpha)
        assert mixed.dtype == images.dtype
        if name == "CutMix":
            assert torch.equal(mixed, images)
        else:
            torch.testing.assert_close(mixed, images)
        assert type(target) is (SoftTarget if kind == "indices" else MixedRows)
        torch.testing.assert_close(target.dense(), dense)
        own_dense = seeded(seed, getattr(compat, name)(num_classes=C, alpha=alpha, dense=True), x, y)[0][1]
        torch.testing.assert_close(own_dense, dense)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("name", NAMES)
def test_images_and_videos_keep_their_type(name):
    y = torch.arange(4)
    for x in (tv_tensors.Image(torch.rand(4, 3, 8, 8)), tv_tensors.Video(torch.rand(4, 5, 3, 8, 8))):
        (images, _), (mixed, _) = both(name, x, y, num_classes=C)
        assert type(mixed) is type(images) is type(x)
        torch.testing.assert_close(mixed.as_subclass(torch.Tensor), images.as_subclass(torch.Tensor))
    sample = {
        "image": tv_tensors.Image(torch.rand(4, 3, 8, 8)),
        "label": y,
        "name": ["a", "b", "c", "d"],
        "extra": torch.rand(4),
    }
    theirs, ours = both(name, sample, num_classes=C, labels_getter=lambda sample: sample["label"])
    assert ours["name"] == sample["name"]
    assert ours["extra"] is sample["extra"]
    torch.testing.assert_close(ours["label"].dense(), theirs["label"])
    image = ours["image"].as_subclass(torch.Tensor)
    torch.testing.assert_close(image, theirs["image"].as_subclass(torch.Tensor))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_to_a_mixed_batch_as_the_chain_of_v2(name):
    """mix_images in one pass, beside conversion, normalising and mixing one after the other."""
    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    images = torch.randint(0, 256, (5, 3, 9, 8), dtype=torch.uint8)
    y = torch.arange(5)
    before = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    for seed in range(4):
        transform = getattr(v2, name)(num_classes=C)
        expected, dense = seeded(seed, transform, before(images), y)[0]
        torch.manual_seed(seed)
        params = transform.make_params([images]) | {"labels": y, "batch_size": 5}
        mix = getattr(compat, name)(num_classes=C)._mix(images, params)
        torch.testing.assert_close(mix_images(images, mix, mean=mean, std=std), expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(mix.target(y).dense(C), dense)


@pytest.mark.trap("vision#9215")
def test_typed_tensors_from_bytes_to_the_loss_of_a_segmentation():
    """Images and Masks are mirrored and mixed together; boxes of detections are refused by name."""
    images = tv_tensors.Image(torch.randint(0, 256, (6, 3, 8, 10), dtype=torch.uint8))
    maps = torch.randint(0, 4, (6, 8, 10))
    maps[:, :2, 3:] = 255
    mean, std = [0.5] * 3, [0.25] * 3
    network = nn.Conv2d(3, 4, 1)
    for sampler in (CutMix(1.0, seed=3), Mixup(1.0, seed=3)):
        pipeline = ImagePipeline(sampler, mean, std, flip=0.5)
        [(x, target)] = pipeline([(images, tv_tensors.Mask(maps))])
        assert target.classes.shape == (6, 2, 8, 10)
        logits = network(x)
        loss = soft_cross_entropy(logits, target, ignore_index=255)
        parts = list(zip(target.classes.unbind(1), target.weights.unbind(1), strict=True))
        losses = [cross_entropy(logits.double(), classes, ignore_index=255, reduction="none") for classes, _ in parts]
        weights = [(w if w.dim() == 3 else w.view(-1, 1, 1)) * (classes != 255) for classes, w in parts]
        expected = sum((w * l).sum() for w, l in zip(weights, losses, strict=True)) / sum(w.sum() for w in weights)
        torch.testing.assert_close(loss.double(), expected)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        assert all(g.abs().sum() > 0 for g in gradients)
    sampler = CutMix(1.0, seed=0)
    for typed in (tv_tensors.Image(torch.rand(4, 3, 8, 8)), tv_tensors.Video(torch.rand(4, 5, 3, 8, 8))):
        mix = sampler.sample(typed)
        assert torch.equal(mix.apply(typed), mix.apply(typed.as_subclass(torch.Tensor)))
    boxes = tv_tensors.BoundingBoxes(torch.rand(4, 4), format="XYXY", canvas_size=(8, 8))
    normalize = functools.partial(mix_images, mean=[0.5], std=[0.5])
    for call in (mix.target, Mixup(1.0, seed=0).sample(typed).apply, lambda t: sampler(typed, t), normalize):
        with pytest.raises(TypeError, match="expected images, label maps or values: BoundingBoxes of a mixed image"):
            call(boxes)


def test_choice_and_compose():
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6)

    def chosen(module):
        return v2.Compose(
            [v2.RandomChoice([getattr(module, name)(num_classes=C) for name in NAMES]), v2.Normalize([0.5] * 3, [0.2] * 3)]
        )

    methods = set()
    for seed in range(6):
        (images, dense), state = seeded(seed, chosen(v2), x, y)
        (mixed, target), own_state = seeded(seed, chosen(compat), x, y)
        assert torch.equal(own_state, state)
        torch.testing.assert_close(mixed, images)
        torch.testing.assert_close(target.dense(), dense)
        methods.add(bool((mixed == v2.Normalize([0.5] * 3, [0.2] * 3)(x)).any()))
    assert methods == {False, True}


def test_the_references_function():
    given = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "num_classes": C, "use_v2": True}
    chosen = compat.get_mixup_cutmix(**given).transforms
    assert [(type(t).__name__, t.alpha, t.num_classes) for t in chosen] == [("MixUp", 0.2, C), ("CutMix", 1.0, C)]
    (cut,) = compat.get_mixup_cutmix(**{**given, "mixup_alpha": 0.0}, dense=True).transforms
    assert (type(cut), cut.dense) == (compat.CutMix, True)
    assert compat.get_mixup_cutmix(mixup_alpha=0.0, cutmix_alpha=0.0, num_classes=C) is None


def test_the_page_runs():
    for code in blocks("torchvision"):
        exec(code, {"dataset": [(torch.rand(3, 8, 8), i % C) for i in range(8)], "classes": C})


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    ours, theirs = (getattr(module, name)(num_classes=C) for module in (compat, v2))
    unlabelled = getattr(compat, name)(), getattr(v2, name)()
    for given in ((x, y.view(4, 1, 1)), (x, torch.rand(4, C + 1)), (x[0], y), (x[:3], y)):
        errors = []
        for transform in (ours, theirs):
            with pytest.raises(ValueError) as error:
                transform(*given)
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    for transform in unlabelled:
        with pytest.raises(ValueError, match="num_classes must be passed"):
            transform(x, y)
    for bad in (C, -1):
        with pytest.raises(ValueError, match=rf"labels: expected a class in \[0, {C}\), got {bad} in row 1"):
            ours(x, torch.tensor([0, bad, 1, 2]))
    with pytest.raises(TypeError, match="labels: expected integer class indices"):
        ours(x, y.float())
    torch.testing.assert_close(both(name, x, y, num_classes=C)[0][1], ours_for(name, x, y.to(torch.int32)).dense())
    if name == "MixUp":
        with pytest.raises(TypeError, match="x: expected a float16, bfloat16, float32 or float64 tensor"):
            ours(x.to(torch.uint8), y)


def ours_for(name, x, y):
    return seeded(0, getattr(compat, name)(num_classes=C), x, y)[0][1]


def test_gradients_and_layout():
    x = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    for name in NAMES:
        mixed, _ = getattr(compat, name)(num_classes=C)(x, torch.arange(4))
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(mixed.sum(), x)
        torch.testing.assert_close(gradient, torch.ones_like(x))


# torchvision's classification references


class Images(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.y = torch.rand(24, 3, 8, 8), torch.arange(24) % C

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


class Collate:
    """As the references collate: one of the two, chosen for each batch."""

    def __init__(self, module):
        self.mix = v2.RandomChoice(
            [getattr(module, name)(alpha=alpha, num_classes=C) for name, alpha in zip(NAMES, (0.2, 1.0), strict=True)]
        )

    def __call__(self, batch):
        return self.mix(*default_collate(batch))


def accuracy(output, target, topk=(1,)):
    """As the references measure it: the target's largest class counts."""
    if target.ndim == 2:
        target = target.max(dim=1)[1]
    _, best = output.topk(max(topk), 1, True, True)
    correct = best.t().eq(target[None])
    return [correct[:k].flatten().sum(dtype=torch.float32) * (100.0 / target.size(0)) for k in topk]


def train(module, images, model, workers):
    torch.manual_seed(0)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, accuracies = [], []
    for image, target in DataLoader(images, 8, collate_fn=Collate(module), num_workers=workers):
        image, target = image.to("cpu", non_blocking=True), target.to("cpu", non_blocking=True)
        output = model(image)
        loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        accuracies.append([float(value) for value in accuracy(output, target, topk=(1, 5))])
    return losses, accuracies


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_references_loop(workers):
    images, model = Images(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, C))
    losses, accuracies = train(v2, images, copy.deepcopy(model), workers)
    own_losses, own_accuracies = train(compat, images, copy.deepcopy(model), workers)
    assert len(losses) == 3
    assert np.ptp(losses) > 1e-3
    np.testing.assert_allclose(own_losses, losses, rtol=2e-6)
    assert own_accuracies == accuracies


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_options_set_later_are_checked(name):
    """A new alpha is drawn with; torchvision keeps the distribution of the first."""
    transform = getattr(compat, name)(num_classes=3)
    for option, value, kind in [
        ("alpha", -1.0, ValueError),
        ("alpha", "1", TypeError),
        ("num_classes", 0, ValueError),
        ("num_classes", 2.5, TypeError),
        ("dense", "no", TypeError),
    ]:
        before = getattr(transform, option)
        with pytest.raises(kind, match=f"^{option}: expected"):
            setattr(transform, option, value)
        assert getattr(transform, option) is before
    transform.alpha, transform.dense = 0.3, True
    x, y = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 1])
    torch.manual_seed(3)
    images, rows = transform(x, y)
    torch.manual_seed(3)
    expected, expected_rows = getattr(v2, name)(alpha=0.3, num_classes=3)(x, y)
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(rows, expected_rows)


@pytest.mark.parametrize("make", [compat.MixUp, compat.CutMix])
def test_integer_rows_that_hold_other_numbers(make):
    rows = torch.tensor([[1, 0], [0, 3]])
    with pytest.raises(ValueError, match="labels: .*0 or 1.*got 3 in row 1"):
        make(num_classes=2)(torch.rand(2, 3, 4, 4), rows)
