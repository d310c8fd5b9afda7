"""fastmix.AugMix and its operations against Pillow, byte for byte, on every backend; the views against the oracle; augmix_loss."""

import copy
import json
import math
import pathlib

import numpy as np
import pytest
import torch
from pages import blocks
from torch.nn import functional as F
from torch.testing import assert_close as same

import fastmix
from fastmix import reference
from fastmix._torch.augmix_steps import OPERATIONS, step_numbers
from fastmix.sampling import draws

LEVELS = {
    "autocontrast": (None,),
    "equalize": (None,),
    "posterize": (4, 3, 1, 8),
    "rotate": (-29, -8, -1, 0, 3, 17, 30),
    "solarize": (256, 200, 128, 26, 0),
    "shear_x": (-0.29, -0.003, 0.0123456, 0.2),
    "shear_y": (-0.29, -0.003, 0.0123456, 0.2),
    "translate_x": (-3, 0, 1, 100),
    "translate_y": (-3, 0, 1, 100),
}
KINDS = {"autocontrast": 1, "equalize": 2, "posterize": 3, "solarize": 4}
SEEDED = {"mean": 0.5, "std": 0.25, "seed": 3}


def pictures():
    """Images [C, H, W] of many kinds: noise, ramps, few colours, one colour, and one that is too small for equalize."""
    random = np.random.default_rng(0)
    ramp = np.arange(17 * 23).reshape(17, 23)
    return [
        random.integers(0, 256, (3, 24, 20)),
        np.stack((ramp // 2, 30 + ramp % 90, 200 - ramp // 7)),
        random.choice([7, 8, 250], (3, 16, 16), p=[0.6, 0.39, 0.01]),
        np.stack((np.full((9, 31), 13), np.zeros((9, 31)), np.full((9, 31), 255))),
        random.integers(90, 130, (1, 33, 19)),
        random.integers(0, 256, (3, 5, 3)),
        random.normal(100, 30, (3, 40, 40)).clip(0, 255),
    ]


def by_pillow(image, name, level):
    """The operation as people write it with Pillow."""
    Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    from PIL import ImageOps

    size = image.shape[:0:-1]
    given = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    if name == "rotate":
        found = given.rotate(level, resample=Image.BILINEAR)
    elif name in ("autocontrast", "equalize"):
        found = getattr(ImageOps, name)(given)
    elif name in ("posterize", "solarize"):
        found = getattr(ImageOps, name)(given, level)
    else:
        place = {"shear_x": 1, "shear_y": 3, "translate_x": 2, "translate_y": 5}[name]
        matrix = [1, 0, 0, 0, 1, 0]
        matrix[place] = level
        found = given.transform(size, Image.AFFINE, matrix, resample=Image.BILINEAR)
    found = np.asarray(found)
    return found[None] if found.ndim == 2 else found.transpose(2, 0, 1)


def step_of(name, level, height, width):
    """(kind, values) of a step."""
    if name in KINDS:
        return KINDS[name], [level or 0, 0, 0, 0, 1, 0]
    values = [1.0, 0, 0, 0, 1, 0]
    if name == "rotate":
        cosine, sine = (round(turn(-math.radians(level)), 15) for turn in (math.cos, math.sin))
        offset = [a * (-width / 2) + b * (-height / 2) for a, b in ((cosine, sine), (-sine, cosine))]
        values = [cosine, sine, offset[0] + width / 2, -sine, cosine, offset[1] + height / 2]
    else:
        values[{"shear_x": 1, "shear_y": 3, "translate_x": 2, "translate_y": 5}[name]] = level
    return 5, values


def chains_after(images, kinds, values, width=1):
    """The bytes [R, C, H, W] at the end of each chain: views that are chains alone, not normalised."""
    N, device = len(images), images.device
    weights = torch.zeros(N, kinds.shape[1] // N, 2, device=device)
    weights[..., 1] = 1
    ones = torch.ones(images.shape[1], device=device)
    found = fastmix.mixing.augmix.OP.launch(images, kinds, values, weights, ones, 0 * ones)
    return found[1:].transpose(0, 1).flatten(0, 1)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("name", LEVELS)
def test_operations_are_pillows(device, name):
    for image in pictures():
        image = image.astype(np.uint8)
        expected = np.stack([by_pillow(image, name, level) for level in LEVELS[name]])
        found = [step_of(name, level, *image.shape[1:]) for level in LEVELS[name]]
        kinds = torch.tensor([[kind for kind, _ in found]], dtype=torch.int32, device=device)
        values = torch.tensor([[value for _, value in found]], dtype=torch.float64, device=device)
        images = torch.tensor(image, device=device).unsqueeze(0)
        assert np.array_equal(chains_after(images, kinds, values).cpu().numpy(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_the_oracles_operations_are_pillows(name):
    for image in pictures():
        image = image.astype(np.uint8)
        for level in LEVELS[name]:
            assert np.array_equal(reference.augmix_operation(image, name, level), by_pillow(image, name, level))


def test_pillow_is_not_left_out_in_silence():
    """Where Pillow is absent the operations' tests are skipped by name, on every kind of machine."""
    skips = json.loads(pathlib.Path(__file__).with_name("skips.json").read_text())
    assert all("needs Pillow" in allowed for allowed in skips.values())


def drawn(device, rows, depth=3, some=True, seed=1, severity=3.0, operations=OPERATIONS, batch=0):
    state = draws.state(seed, batch, (None, 0)).to(draws.state_device(device))
    numbers = step_numbers(severity, 24, 36, operations)
    return [t.cpu() for t in draws.augmix_steps(state, False, rows, depth, some, numbers, torch.empty(0, device=device))]


def test_steps_are_the_same_on_every_backend(device):
    """The bits, too: the bytes depend on them."""
    for severity, operations in ((3.0, OPERATIONS), (10.0, ("rotate", "shear_y", "translate_x")), (0.1, ("solarize",))):
        kinds, values = drawn(device, 301, severity=severity, operations=operations)
        with fastmix.backend("torch"):
            expected = drawn(torch.device("cpu"), 301, severity=severity, operations=operations)
        assert torch.equal(kinds, expected[0])
        assert torch.equal(values, expected[1])


def test_what_is_drawn():
    """Each operation as often, strengths evenly up to the severity, signs and numbers of steps evenly; matrices as Pillow has them."""
    with fastmix.backend("torch"):
        kinds, values = drawn(torch.device("cpu"), 27000)
        begun = (kinds != 0).sum(0)
        assert ((kinds[1:] != 0) >= (kinds[:-1] != 0)).all(), "chains end together"
        for count in (1, 2, 3):
            assert abs(float((begun == count).double().mean()) - 1 / 3) < 4 * math.sqrt(2 / 9 / 27000)
        live = int((kinds != 0).sum())
        for kind, share in ((1, 1 / 9), (2, 1 / 9), (3, 1 / 9), (4, 1 / 9), (5, 5 / 9)):
            assert abs(int((kinds == kind).sum()) / live - share) < 4 * math.sqrt(share / live)
        assert values[kinds == 3][:, 0].unique().tolist() == [3, 4]  # int(4u/10), u < 3
        thresholds = values[kinds == 4][:, 0]
        assert (thresholds.min(), thresholds.max()) == (256 - 76, 256 - 2)
        shear = drawn(torch.device("cpu"), 20000, operations=("shear_x",), some=False, depth=1)[1][0, :, 1]
        assert 0.003 <= shear.abs().min() < 0.0031
        assert 0.0899 < shear.abs().max() < 0.09
        assert abs(float(shear.abs().mean()) - 0.0465) < 4 * 0.0251 / math.sqrt(20000)
        assert abs(float((shear > 0).double().mean()) - 0.5) < 2 / math.sqrt(20000)
        moved = drawn(torch.device("cpu"), 5000, operations=("translate_x", "translate_y"), some=False, depth=1)[1][0]
        assert set(moved[:, 2].tolist()) == {-3, -2, -1, 0, 1, 2, 3}  # int(36/3 * u/10)
        assert set(moved[:, 5].tolist()) == {-2, -1, 0, 1, 2}
        turned = drawn(torch.device("cpu"), 500, operations=("rotate",), some=False, depth=1, severity=10.0)[1][0]
    expected = {degrees: step_of("rotate", degrees, 24, 36)[1] for degrees in range(-30, 31)}
    assert {tuple(row) for row in turned.tolist()} <= {tuple(row) for row in expected.values()}
    assert len(turned.unique(dim=0)) > 40


def as_chains(kinds, values, N, views, width):
    """Steps as the oracle takes them."""

    def operation(kind, value):
        if kind in KINDS.values():
            return next(name for name, k in KINDS.items() if k == kind), int(value[0])
        a, b, c, d, _, f = value
        if b and d:
            degrees = round(math.degrees(math.asin(-b)))
            return "rotate", degrees
        return next(
            (name, v)
            for name, v in (("shear_x", b), ("shear_y", d), ("translate_x", c), ("translate_y", f), ("rotate", 0))
            if v or name == "rotate"
        )

    rows = [
        [operation(int(kind), value.tolist()) for kind, value in zip(kinds[:, r], values[:, r], strict=True) if kind]
        for r in range(N * views * width)
    ]
    return [[rows[(n * views + v) * width : (n * views + v + 1) * width] for v in range(views)] for n in range(N)]


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    "options", [{}, {"width": 1, "depth": 1, "views": 3}, {"width": 4, "depth": 2, "severity": 9.0, "views": 1}]
)
def test_views_are_the_oracles(device, options):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = torch.randint(256, (2, 3, 9, 12), dtype=torch.uint8)
    augmix = fastmix.AugMix(mean=mean, std=std, seed=5, **options)
    clean, *views = augmix(images.to(device))
    assert len(views) == augmix.views
    N, count, width = 2, augmix.views, augmix.width
    state = draws.state(5, 0, (None, 0)).to(draws.state_device(device))
    weights = draws.dirichlet(state, N * count, width, (1.0, 1.0, 1.0), torch.float32, device).view(N, count, 1 + width)
    numbers = step_numbers(augmix.severity, 9, 12, OPERATIONS)
    depth = augmix.depth or 3
    kinds, values = draws.augmix_steps(state, False, N * count * width, depth, augmix.depth is None, numbers, images.to(device))
    chains = as_chains(kinds.cpu(), values.cpu(), N, count, width)
    expected = reference.augmix(images.numpy(), chains, weights.cpu().numpy(), mean, std)
    same(clean.cpu(), fastmix.mix_images(images, mean=mean, std=std), rtol=0, atol=1e-6)
    for found, wanted in zip(views, expected, strict=True):
        assert found.dtype == torch.float32
        same(found.cpu().double(), torch.from_numpy(wanted), rtol=0, atol=4e-6)


@pytest.mark.slow_interpreted
def test_rows_streams_and_states(device):
    """A row draws the same beside any others; batches and rows differ; a state goes on where it was."""
    images = torch.randint(256, (1, 1, 6, 6), dtype=torch.uint8, device=device).expand(3, 1, 6, 6)
    one, other = (fastmix.AugMix(2, **SEEDED) for _ in range(2))
    first = one.stack(images)
    assert torch.equal(first[:, :2], other.stack(images[:2]))
    second = one.stack(images)
    assert not torch.equal(first[1:], second[1:])
    assert not torch.equal(first[1, 0], first[1, 1])
    assert not torch.equal(first[1], first[2])
    assert torch.equal(other.stack(images), second)
    saved = copy.deepcopy(one.state_dict())
    third = one.stack(images)
    again = fastmix.AugMix(2, **SEEDED)
    again.load_state_dict(saved)
    assert torch.equal(again.stack(images), third)
    assert torch.equal(copy.deepcopy(again).stack(images), one.stack(images))
    with pytest.raises(ValueError, match="expected that of Mixup, got that of AugMix"):
        fastmix.Mixup(1.0, seed=3).load_state_dict(saved)
    generator = torch.Generator(device).manual_seed(1)
    by_generator = one.stack(images, generator=generator)
    assert torch.equal(by_generator, one.stack(images, generator=generator.manual_seed(1)))
    fresh = fastmix.AugMix(1, 1, mean=0.5, std=0.25)
    torch.manual_seed(4)
    drawn_fresh = fresh.stack(images)
    torch.manual_seed(4)
    assert torch.equal(fresh.stack(images), drawn_fresh)


@pytest.mark.slow_interpreted
def test_layouts_sizes_and_eval(device):
    images = torch.randint(256, (2, 3, 6, 10), dtype=torch.uint8, device=device)
    options = {"width": 2, "depth": 1, "mean": (0.4, 0.5, 0.6), "std": 0.25, "seed": 3}
    expected = fastmix.AugMix(**options).stack(images)
    behind = images.movedim(1, -1).contiguous()
    assert torch.equal(fastmix.AugMix(**options).stack(behind), expected)
    assert torch.equal(fastmix.AugMix(**options).stack(behind, layout="NHWC"), expected)
    assert torch.equal(fastmix.AugMix(**options).stack(behind.movedim(-1, 1)), expected)
    assert torch.equal(fastmix.AugMix(**options).stack(images.flip(3).flip(3)), expected)
    offset = torch.cat((images.flatten()[:1], images.flatten()))[1:].view(images.shape)  # not at a whole word
    assert torch.equal(fastmix.AugMix(**options).stack(offset), expected)
    before = images.clone()
    augmix = fastmix.AugMix(**options).eval()
    clean, first, second = augmix(images)
    assert torch.equal(first, clean)
    assert torch.equal(second, clean)
    assert torch.equal(clean, expected[0])
    assert augmix.state_dict() == fastmix.AugMix(**options).state_dict()
    assert torch.equal(images, before)
    for shape in ((0, 3, 6, 10), (1, 3, 1, 1), (2, 3, 5, 7)):
        found = fastmix.AugMix(**options)(torch.zeros(shape, dtype=torch.uint8, device=device))
        assert [view.shape for view in found] == [torch.Size(shape)] * 3
        assert all(view.isfinite().all() for view in found)
    assert fastmix.AugMix(mean=0.5, std=0.2)(torch.zeros(2, 6, 10, 3, dtype=torch.uint8, device=device))[0].shape == (
        2,
        3,
        6,
        10,
    )


@pytest.mark.slow_interpreted
def test_equals_the_separate_ops(device):
    """The sum of a view is `convex_combination` of the normalised images, to float32 rounding."""
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, device=device)
    kinds, values = (t.to(device) for t in drawn(device, 6))
    weights = fastmix.dirichlet(2, 3, skip=1.0, device=device).view(2, 1, 4)
    factor, shift = torch.full((3,), 1 / 255 / 0.25, device=device), torch.full((3,), -2.0, device=device)
    found = fastmix.mixing.augmix.OP.launch(images, kinds, values, weights, factor, shift)
    moved = chains_after(images, kinds, values).view(2, 3, 3, 8, 8)
    sources = [found[0], *(moved[:, k] * factor[0] - 2.0 for k in range(3))]
    same(found[1], fastmix.convex_combination(sources, weights[:, 0]), rtol=0, atol=2e-6)


def test_one_number_is_every_channels():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    for one in (0.5, (0.5,), [0.5]):
        same(fastmix.AugMix(mean=one, std=one, seed=0)(images), fastmix.AugMix(mean=[0.5] * 3, std=[0.5] * 3, seed=0)(images))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": 0}, ValueError, "width: expected an int from 1 to 16"),
        ({"width": 17}, ValueError, "width: expected an int from 1 to 16"),
        ({"depth": 0}, ValueError, "depth: expected an int from 1 to 16"),
        ({"depth": 2.5}, TypeError, "depth: expected an int, got 2.5"),
        ({"views": 0}, ValueError, "views: expected an int from 1 to 16"),
        ({"severity": 11}, ValueError, "severity: expected a number from 0.1 to 10"),
        ({"severity": float("nan")}, ValueError, "severity: expected"),
        ({"alpha": 0}, ValueError, "alpha: expected positive"),
        ({"alpha": (1, 2)}, TypeError, "alpha: expected one number"),
        ({"std": 0}, ValueError, "std: expected positive numbers"),
        ({"mean": ()}, ValueError, "mean: expected a number"),
        ({"operations": "all"}, TypeError, "operations: expected 'augmix', or a sequence of names"),
        ({"operations": ("rotate", "blur")}, ValueError, "operations: expected names of autocontrast"),
        ({"operations": ()}, ValueError, "operations: expected at least one name"),
        ({"seed": -1}, ValueError, "seed: expected an int"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        fastmix.AugMix(**{"mean": 0.5, "std": 0.25, **options})
    if "seed" not in options:
        augmix = fastmix.AugMix(mean=0.5, std=0.25)
        ((name, value),) = options.items()
        with pytest.raises(error, match=message):
            setattr(augmix, name, value)


def test_wrong_images(device):
    augmix = fastmix.AugMix(mean=(0.1, 0.2, 0.3), std=0.25, seed=0)
    bytes_of = torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device=device)
    for images, error, message in (
        (bytes_of.float(), TypeError, "images: expected uint8 bytes"),
        (bytes_of.int(), TypeError, "images: expected a uint8 tensor"),
        (bytes_of.cpu().numpy(), TypeError, "images: expected a uint8 tensor"),
        (bytes_of[0], ValueError, r"images: expected shape \[N, C, H, W\] or \[N, H, W, C\]"),
        (bytes_of[:, :2], ValueError, "mean: expected 2 numbers"),
        (bytes_of[:, :, :0], ValueError, "images: expected at least one pixel"),
    ):
        with pytest.raises(error, match=message):
            augmix(images)
    with pytest.raises(ValueError, match="layout: expected 'NCHW', 'NHWC' or None"):
        augmix(bytes_of, layout="HWC")
    with pytest.raises(TypeError, match="generator: expected a torch.Generator"):
        augmix(bytes_of, generator=3)
    assert augmix.state_dict()["_extra_state"]["batch"] == 0, "nothing was drawn"


def test_not_among_the_samplers():
    augmix = fastmix.AugMix(mean=0.5, std=0.25)
    with pytest.raises(TypeError, match="samplers"):
        fastmix.RandomMix(fastmix.Mixup(1.0), augmix)
    with pytest.raises(TypeError, match="sampler"):
        fastmix.ImagePipeline([], sampler=augmix, mean=[0.5], std=[0.25])


@pytest.mark.no_poison
@pytest.mark.slow
def test_compiles(device):
    torch._dynamo.reset()
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8, device=device)
    expected = fastmix.AugMix(**SEEDED)
    compiled = fastmix.AugMix(**SEEDED)
    run = torch.compile(lambda images: compiled.stack(images), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(run(images), expected.stack(images))


class TestLoss:
    def test_is_the_authors_loss(self, device):
        """Cross-entropy of the clean third, and 12 times the mean of three divergences from the mean distribution."""
        logits = (2 * torch.randn(15, 7, dtype=torch.float64)).requires_grad_()
        y = torch.randint(7, (5,))
        clean, first, second = (F.softmax(z, 1) for z in logits.split(5))
        mean = ((clean + first + second) / 3).clamp(1e-7, 1).log()
        consistency = sum(F.kl_div(mean, p, reduction="batchmean") for p in (clean, first, second)) / 3
        expected = F.cross_entropy(logits[:5], y) + 12 * consistency
        (gradient,) = torch.autograd.grad(0.3 * expected, logits)
        ours = logits.detach().to(device).requires_grad_()
        loss = fastmix.augmix_loss(ours, y.to(device))
        same(loss.detach().cpu(), expected.detach())
        (0.3 * loss).backward()
        same(ours.grad.cpu(), gradient)
        strided = torch.stack((ours.detach(), ours.detach()), 2)[..., 0].requires_grad_()
        same(fastmix.augmix_loss(strided, y.to(device)).detach().cpu(), expected.detach())

    def test_takes_any_target_and_number_of_splits(self, device):
        logits = torch.randn(8, 4, device=device)
        target = fastmix.SoftTarget(
            torch.tensor([[0, 1], [2, 3]], device=device), torch.tensor([[0.3, 0.7], [1, 0]], device=device)
        )
        found = fastmix.augmix_loss(logits, target, splits=4, scale=2.0)
        expected = fastmix.soft_cross_entropy(logits[:2], target) + 2 * fastmix.js_divergence(logits.chunk(4))
        same(found, expected)
        plain = fastmix.augmix_loss(logits, torch.arange(8, device=device) % 4, splits=1)
        same(plain, fastmix.soft_cross_entropy(logits, torch.arange(8, device=device) % 4))

    def test_wrong_arguments(self):
        logits, y = torch.randn(6, 4), torch.zeros(2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"logits: expected shape \[4\*N, C\]"):
            fastmix.augmix_loss(logits, y, splits=4)
        with pytest.raises(ValueError, match="splits: expected an int from 1 to 16"):
            fastmix.augmix_loss(logits, y, splits=0)
        with pytest.raises(ValueError, match="target"):
            fastmix.augmix_loss(logits, torch.zeros(6, dtype=torch.int64))


def test_the_page():
    for code in blocks("In a training loop", "augmix.md"):
        exec(code, {})
