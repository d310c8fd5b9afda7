"""PuzzleMix: gradients and saliency, what the cut weighs, the sampler, and the adversarial option."""

import contextlib
import copy
import functools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import numpy
from pages import blocks as code_of
from plain import interpreted
from torch import nn

import fastmix
from fastmix import PuzzleMix, reference, sampling
from fastmix.puzzle.noise import mix_with_noise

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def network(channels=3, classes=5, dropout=0.0):
    layers = (
        nn.Conv2d(channels, 6, 3, 2),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.LazyLinear(classes),
    )
    model = nn.Sequential(*layers)
    model(torch.zeros(2, channels, 16, 16))
    return model


def images(N=6, size=16, device="cpu"):
    pixels = F.interpolate(torch.rand(N, 3, 4, 4), size=(size, size), mode="bilinear").clamp(0, 1)
    return ((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).to(device)


def maps(N=6, size=16, device="cpu", power=4):
    return (torch.rand(N, size, size) ** power).to(device)


def mixer(**options):
    options = {"solver": "primal-dual", "seed": 0, "blocks": 4, **options}
    return PuzzleMix(mean=MEAN, std=STD, **options)


def cycle(N):
    return torch.arange(N).roll(-1)


# Gradients


@pytest.mark.parametrize("kind", ["indices", "pairs", "dense", "mixed"])
def test_the_gradient_is_that_of_the_mean_loss_in_eval_mode(kind):
    model, x, y = network(dropout=0.5), images(), torch.randint(0, 5, (6,))
    target = {
        "indices": y,
        "pairs": fastmix.SoftTarget(torch.stack((y, y.flip(0)), 1), torch.rand(6, 2)),
        "dense": torch.rand(6, 5).softmax(1),
        "mixed": fastmix.MixedRows(torch.rand(6, 5).softmax(1), torch.rand(6), cycle(6)),
    }[kind]
    model[1].eval()  # a module that is in eval mode already stays so
    state = copy.deepcopy(model.state_dict())
    seen = []
    for parameter in model.parameters():
        parameter.register_hook(seen.append)
    g = fastmix.input_gradient(model, x, target)
    assert not seen, "a parameter's gradient was formed"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert not g.requires_grad
    twin, leaf = copy.deepcopy(model).eval(), x.clone().requires_grad_()
    fastmix.soft_cross_entropy(twin(leaf), target).backward()
    torch.testing.assert_close(g, leaf.grad)


def test_what_is_kept_is_that_part_of_the_clean_loss():
    model, x, y = network(), images(), torch.randint(0, 5, (6,))
    twin, leaf = copy.deepcopy(model), x.clone().requires_grad_()
    F.cross_entropy(twin(leaf), y).backward()
    for _ in range(2):  # gradients add up
        g = fastmix.input_gradient(model, x, y, keep=0.25)
        torch.testing.assert_close(g, leaf.grad)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, 0.5 * theirs.grad, rtol=1e-4, atol=1e-7)
    assert model[1].num_batches_tracked == twin[1].num_batches_tracked + 1  # once a pass
    assert model.training


def test_a_frozen_module_stays_frozen_in_training_mode_and_a_model_in_eval_mode_is_put_back():
    model, x, y = network(), images(), torch.randint(0, 5, (6,))
    model[1].eval()
    before = model[1].running_mean.clone()
    fastmix.input_gradient(model, x, y, keep=1.0)
    assert torch.equal(model[1].running_mean, before)
    model.eval()
    fastmix.input_gradient(model, x, y, keep=1.0)
    assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="broken"):
        fastmix.input_gradient(nn.Sequential(model, Broken()), x, y)
    assert not model.training


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


class Scaler:
    """What of a GradScaler is used."""

    def scale(self, loss):
        return loss * 1024.0


def test_a_scalers_factor_stays_in_grad_and_not_in_what_is_returned():
    model, x, y = network(), images(), torch.randint(0, 5, (6,))
    twin = copy.deepcopy(model)
    expected = fastmix.input_gradient(twin, x, y, keep=0.5)
    g = fastmix.input_gradient(model, x, y, keep=0.5, scaler=Scaler())
    torch.testing.assert_close(g, expected)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, 1024 * theirs.grad)
    expected = fastmix.input_gradient(twin, x, y)
    torch.testing.assert_close(fastmix.input_gradient(twin, x, y, scaler=Scaler()), expected)
    torch.testing.assert_close(fastmix.input_gradient(twin, x, y, scaler=torch.amp.GradScaler("cpu", enabled=False)), expected)


def test_autocast_no_grad_and_float64():
    model, x, y = network(), images(), torch.randint(0, 5, (6,))
    exact = fastmix.input_gradient(copy.deepcopy(model).double(), x.double(), y)
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        g = fastmix.input_gradient(model, x, y)
    assert g.dtype == torch.float32
    torch.testing.assert_close(g, exact.float(), rtol=0, atol=0.03 * float(exact.abs().max()))


def test_parallel_models_do_not_communicate(monkeypatch):
    """As DistributedDataParallel, whose no_sync is all that is asked of it here."""

    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.silent, self.calls = module, False, []

        @contextlib.contextmanager
        def no_sync(self):
            self.silent = True
            yield
            self.silent = False

        def forward(self, x):
            self.calls.append(self.silent)
            return self.module(x)

    monkeypatch.setattr("fastmix.puzzle.saliency.DistributedDataParallel", Parallel)
    model = Parallel(network())
    fastmix.input_gradient(model, images(), torch.zeros(6, dtype=torch.int64), keep=1.0)
    assert model.calls == [True]
    assert not model.silent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_saliency(dtype):
    gradient = torch.randn(4, 3, 5, 6, dtype=torch.float64).to(dtype)
    gradient[1] = 0
    root = numpy(gradient).__pow__(2).mean(1) ** 0.5
    np.testing.assert_allclose(fastmix.saliency(gradient, normalize=False), root, rtol=1e-5, atol=1e-30)
    found = fastmix.saliency(gradient)
    np.testing.assert_allclose(found.sum((1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(found[1], 1 / 30, rtol=1e-6)
    np.testing.assert_allclose(found[0], root[0] / root[0].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: fastmix.input_gradient(len, images(), torch.arange(6)), TypeError, "model: expected a torch.nn.Module"),
        (
            lambda: fastmix.input_gradient(nn.Flatten(), images(), torch.arange(6), keep=-1),
            ValueError,
            "keep: expected a number",
        ),
        (
            lambda: fastmix.input_gradient(nn.Flatten(), images(), torch.arange(6), scaler=2.0),
            TypeError,
            "scaler: expected a torch",
        ),
        (lambda: fastmix.saliency(torch.rand(2, 3, 4, 4, 4)), ValueError, r"gradient: expected shape \[N, C, H, W\]"),
        (lambda: fastmix.saliency(images(), normalize=1), TypeError, "normalize: expected a bool"),
    ],
)
def test_arguments_of_saliency(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_saliency_of_nothing():
    assert fastmix.saliency(torch.zeros(0, 3, 4, 5)).shape == (0, 4, 5)
    assert fastmix.saliency(torch.zeros(2, 3, 0, 5, dtype=torch.float64)).shape == (2, 0, 5)


def test_saliency_of_gradients_whose_squares_underflow():
    gradient = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fastmix.saliency(gradient * 1e-30), fastmix.saliency(gradient))
    torch.testing.assert_close(fastmix.saliency(gradient * 1e30), fastmix.saliency(gradient))


# What the cut weighs


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    ("blocks", "size", "options"),
    [
        (4, (16, 16), {}),
        (2, (16, 16), {"levels": 2, "gamma": 0.0}),
        (8, (16, 24), {"levels": 4, "beta": 0.5, "neighborhood": 1}),
        (4, (16, 8), {"neighborhood": 2, "eta": 0.0}),
        (1, (16, 16), {}),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_costs_are_the_references(device, blocks, size, options, layout):
    x = F.interpolate(images(5), size=size).to(device, memory_format=layout)
    s = F.interpolate(maps(5)[:, None], size=size)[:, 0].to(device)
    s[1] = 0
    index, lam = torch.tensor([1, 2, 0, 3, 0], device=device), torch.rand(5, device=device)
    found = fastmix.puzzle_costs(x, s, index, lam, blocks, mean=MEAN, std=STD, **options)
    expected = reference.puzzle_costs(*map(numpy, (x, s, index, lam)), blocks, mean=MEAN, std=STD, **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        np.testing.assert_allclose(numpy(mine), theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_costs_of_other_dtypes_strides_and_numbers_of_blocks(device, dtype):
    """Three blocks a side, neighbourhoods of 2 x 3 and 3 x 3 pixels, a crop of larger images, one map and one lam for all rows."""
    x = images(3, 24).to(device, dtype)[:, :2, 2:20, 3:21]
    s, index = (
        torch.rand(1, 18, 18, device=device).to(dtype).expand(3, -1, -1),
        torch.tensor([1, 9, 2, 9, 0], device=device)[::2],
    )
    for size in (2, 3):
        options = {"std": (0.2, 0.3), "neighborhood": size, "levels": 4}
        found = fastmix.puzzle_costs(x, s, index, 0.25, 3, **options)
        expected = reference.puzzle_costs(*map(numpy, (x, s, index)), 0.25, 3, **options)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(numpy(mine), theirs, rtol=2e-5, atol=1e-7)
    empty = fastmix.puzzle_costs(x[:0], s[:0], index[:0], 0.25, 3, neighborhood=3)
    assert [tuple(t.shape) for t in empty] == [(0, 3, 3, 3), (0, 2, 3), (0, 3, 2)]


def test_costs_of_saliency_whose_sums_underflow_or_lie_in_one_block(device):
    x, s = images(2, device=device), torch.full((2, 16, 16), 1e-41, device=device)
    s[1] = 0
    s[1, 3, 2] = 1e30
    found = fastmix.puzzle_costs(x, s, torch.tensor([1, 0], device=device), torch.tensor([0.5, 1e-30], device=device), 4)
    even = torch.rand(2, 16, 16, device=device) * 0 + torch.tensor([1.0, 0.0], device=device).view(2, 1, 1)
    even[1, 3, 2] = 1
    expected = fastmix.puzzle_costs(x, even, torch.tensor([1, 0], device=device), torch.tensor([0.5, 1e-30], device=device), 4)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.slow_interpreted
def test_costs_of_partners_out_of_range_are_the_nearest_rows(device, monkeypatch):
    """As on a GPU, where nobody looks at them first: nothing outside of the batch is read."""
    x, s, lam = images(3, device=device), maps(3, device=device), torch.rand(3, device=device)
    monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
    found = fastmix.puzzle_costs(x, s, torch.tensor([-5, 7, 1], device=device), lam, 4)
    expected = fastmix.puzzle_costs(x, s, torch.tensor([0, 2, 1], device=device), lam, 4)
    assert all(map(torch.equal, found, expected))


def test_peaked_saliency_is_not_wrapped():
    """Integer costs wrap where one of 16 x 16 blocks holds more than 8.4 % of its image's saliency."""
    x, s = images(2, 32), torch.full((2, 32, 32), 1e-6)
    s[0, 3, 5] = s[1, 20, 30] = 1.0
    unary, vertical, horizontal = fastmix.puzzle_costs(x, s, torch.tensor([1, 0]), 0.5, 16, mean=MEAN, std=STD)
    assert float(unary[0, 10, 15, 0] - unary[0, 10, 15, 2]) > 0.9
    labels = fastmix.grid_cut(unary, vertical, horizontal, solver="primal-dual")
    assert labels[0, 1, 2] == 0
    assert labels[0, 10, 15] == 2
    assert labels[1, 1, 2] == 2


# The sampler


@pytest.fixture
def quickly(device, monkeypatch):
    """The device; in the interpreter a cut has 20 iterations, since it need not be the best one here."""
    if interpreted(device):
        monkeypatch.setattr(sampling.puzzle, "grid_cut", functools.partial(fastmix.grid_cut, iterations=20))
    return device


@pytest.mark.slow_interpreted
@pytest.mark.thinned(2)
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_batch(quickly, levels):
    device = quickly
    x, s, y = images(2, device=device), maps(2, device=device), torch.arange(2, device=device)
    puzzle = mixer(levels=levels, t_eps=0.02)
    twin = copy.deepcopy(puzzle)
    m = puzzle.sample(x, s)
    assert m.mask.shape == (2, 4, 4)
    assert m.plan.shape == m.partner_plan.shape == (2, 16)
    torch.testing.assert_close((m.mask * (levels - 1)).round() / (levels - 1), m.mask)
    torch.testing.assert_close(m.target_lam, m.mask.mean((1, 2)))
    mixed, target = twin(x, y, s)
    assert torch.equal(mixed, fastmix.mix_masked(x, m.mask, m.index, plan=m.plan, partner_plan=m.partner_plan))
    assert torch.equal(target.classes[:, 1], y[m.index])
    assert torch.equal(target.weights[:, 0], m.target_lam)


@pytest.mark.slow_interpreted
def test_the_sampler_is_its_parts(quickly):
    device = quickly
    x, s = images(3, device=device), maps(3, device=device)
    puzzle = mixer(t_eps=0.02, t_size=2)
    drawn = copy.deepcopy(puzzle.mixup).sample(x)
    m = puzzle.sample(x, s)
    costs = fastmix.puzzle_costs(x, s, m.index, drawn.lam, 4, mean=MEAN, std=STD)
    mask = 1 - sampling.puzzle.grid_cut(*costs, solver="primal-dual") / 2
    assert torch.equal(m.index, drawn.index)
    assert torch.equal(m.mask, mask.repeat_interleave(2, 1).repeat_interleave(2, 2))
    pooled = F.avg_pool2d(s[:, None], 2)[:, 0]
    pooled = pooled / pooled.sum((1, 2), keepdim=True)
    partner = fastmix.transport_plan(1 - m.mask, pooled[m.index], 0.02)
    agree = (m.plan == fastmix.transport_plan(m.mask, pooled, 0.02)) & (m.partner_plan == partner)
    assert float(agree.float().mean()) > 0.98  # sums of saliency round in another order
    assert mixer(transport=False).sample(x, s).plan is None


@pytest.mark.parametrize("finer", [1, 3])
def test_masks_from_labels(device, finer):
    """Rows of lam 0 and 1, and one that is its own partner, are taken whole, and their blocks stay."""
    labels = torch.randint(0, 4, (5, 2, 2), device=device)
    lam, index = torch.tensor([0.3, 0.0, 1.0, 0.6, 0.9], device=device), torch.tensor([1, 2, 0, 3, 1], device=device)
    saliency = torch.rand(5, 2 * finer, 2 * finer, device=device)
    mask, share, under, moving = fastmix._backend.of(saliency).puzzle_masks(labels, lam, index, saliency, 4, finer)
    cells = 1 - numpy(labels) / 3
    cells[1], cells[2], cells[3] = 0, 1, 1
    expected = np.kron(cells, np.ones((1, finer, finer)))
    np.testing.assert_allclose(numpy(mask), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(numpy(share), expected.mean((1, 2)), rtol=1e-6)
    moved = np.array([1, 0, 0, 0, 1])[:, None, None]
    np.testing.assert_allclose(numpy(under), np.concatenate((moved * expected, moved * (1 - expected))), rtol=1e-6, atol=1e-7)
    assert torch.equal(moving, torch.cat((saliency, saliency[index])))
    still = fastmix._backend.of(saliency).puzzle_masks(labels, lam, index, None, 4, finer)
    assert torch.equal(still[0], mask)
    assert still[2:] == (None, None)


def test_rows_that_are_taken_whole():
    x, s, y = images(), maps(), torch.arange(6)
    mixed, target = mixer(prob=0.0, t_eps=0.001)(x, y, s)
    assert torch.equal(mixed, x)
    assert (target.weights[:, 0] == 1).all()
    mixed, _ = mixer(t_eps=0.001)(x[:1], y[:1], s[:1])  # its own partner
    assert torch.equal(mixed, x[:1])
    same, _ = mixer(t_eps=0.001, partner="same")(x, y, s)  # nobody has a partner
    assert torch.equal(same, x)
    m = mixer(t_eps=0.001)._cut(x, s, cycle(6), torch.tensor([0.0, 1, 0, 1, 0, 1]), 4)
    assert torch.equal(m.apply(x)[::2], x[cycle(6)][::2])
    assert torch.equal(m.apply(x)[1::2], x[1::2])
    mixed, target = mixer()(x[:0], y[:0], s[:0])
    assert mixed.shape == (0, 3, 16, 16)


def test_saliency_of_zero_is_uniform():
    x, s = images(), maps()
    m, n = mixer().sample(x, torch.zeros_like(s)), mixer().sample(x, torch.ones_like(s))
    assert torch.equal(m.mask, n.mask)
    assert m.mask.isfinite().all()


def test_what_is_salient_shows():
    """Of a row whose saliency is a corner and a partner whose saliency is the other, both are in the mix."""
    x, s = images(2), torch.full((2, 16, 16), 1e-3)
    s[0, :4, :4] = s[1, 12:, 12:] = 1
    m = mixer(transport=False)._cut(x, s, torch.tensor([1, 0]), torch.tensor([0.5, 0.5]), 4)
    assert m.mask[0, 0, 0] == 1
    assert m.mask[0, 3, 3] == 0
    assert m.mask[1, 0, 0] == 0
    assert m.mask[1, 3, 3] == 1


@pytest.mark.slow
def test_numbers_of_blocks_come_from_the_seed_and_are_saved():
    x, s = images(2), maps(2)
    puzzle = mixer(blocks=(2, 4, 8), transport=False)
    counts = [puzzle.sample(x, s).mask.shape[1] for _ in range(40)]
    assert set(counts) == {2, 4, 8}
    twin = mixer(blocks=(2, 4, 8), transport=False)
    assert [twin._draw_blocks() for _ in range(40)] == counts
    other = mixer(blocks=(2, 4, 8), transport=False, seed=1)
    assert [other._draw_blocks() for _ in range(40)] != counts
    state = pickle.loads(pickle.dumps(puzzle.state_dict()))
    ahead = [puzzle._draw_blocks() for _ in range(20)]
    other = mixer(blocks=(2, 4, 8), transport=False)
    other.load_state_dict(state)
    assert [other._draw_blocks() for _ in range(20)] == ahead
    with pytest.raises(TypeError, match="state"):
        other.set_extra_state({"batch": 1})


def test_eval_mode_is_the_identity():
    x, s, y = images(), maps(), torch.arange(6)
    puzzle = mixer().eval()
    assert puzzle(x, y, s) == (x, y)
    assert torch.equal(puzzle.sample(x, s).apply(x), x)


@pytest.mark.slow
@pytest.mark.no_poison
def test_compiled_with_one_number_of_blocks():
    x, s = images(), maps()
    index, lam = cycle(6), torch.rand(6)
    puzzle = mixer(t_eps=0.02)

    def mix(x, s, lam):
        return puzzle._cut(x, s, index, lam, 4).apply(x) * 1

    expected = mix(x, s, lam)
    torch.testing.assert_close(torch.compile(mix, backend="aot_eager")(x, s, lam), expected)


def test_several_numbers_of_blocks_in_a_compiled_program(monkeypatch):
    several = mixer(blocks=(2, 4))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ValueError, match="blocks: expected one int"):
        several._check_batch(images(), maps())


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"levels": 5}, ValueError, "levels: expected an int from 2 to 4"),
        ({"levels": 1}, ValueError, "levels: expected an int from 2 to 4"),
        ({"gamma": 1.0}, ValueError, r"gamma: expected a number in \[0, 1\)"),
        ({"beta": -1.0}, ValueError, "beta: expected a number of at least 0"),
        ({"blocks": ()}, ValueError, "blocks"),
        ({"blocks": 0}, ValueError, "blocks: expected ints of at least 1"),
        ({"transport": 1}, TypeError, "transport: expected a bool"),
        ({"t_eps": -1}, ValueError, "t_eps"),
        ({"solver": "gco"}, ValueError, "solver"),
        ({"alpha": 0.0}, ValueError, "alpha"),
        ({"seed": 1.5}, TypeError, "seed"),
    ],
)
def test_options_that_are_wrong(options, kind, words):
    with pytest.raises(kind, match=words):
        PuzzleMix(**{"mean": 0.5, "std": 0.25, **options})


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({"blocks": (2, 3)}, {}, "blocks: expected a number that divides x's height 16, got 3"),
        ({"neighborhood": 3}, {}, "neighborhood: expected a number of pixels that divides a block's height 4, got 3"),
        ({"t_size": 3}, {}, "t_size: expected a number of pixels that divides a block's height 4, got 3"),
        ({"std": (0.5, 0.5)}, {}, "std: expected one number, or 3"),
        ({}, {"s": torch.rand(6, 8, 8)}, r"saliency: expected shape \[6, 16, 16\], a value for each pixel of x"),
        ({}, {"s": -torch.rand(6, 16, 16)}, "saliency: expected finite values of at least 0, got one of -"),
        (
            {},
            {"s": torch.full((6, 16, 16), float("nan"))},
            "saliency: expected finite values of at least 0, got one of nan in row 0",
        ),
        ({}, {"x": torch.rand(6, 16, 16)}, r"x: expected shape \[N, C, H, W\]"),
    ],
)
def test_batches_that_are_wrong(options, change, words):
    puzzle = PuzzleMix(**{"mean": 0.5, "std": 0.25, "blocks": 4, "seed": 0, **options})
    state = puzzle.mixup.get_extra_state()
    with pytest.raises(ValueError, match=words):
        puzzle(change.get("x", images()), torch.arange(6), change.get("s", maps()))
    assert state.keys() == puzzle.mixup.get_extra_state().keys(), "something was drawn"


def test_random_mix_refuses_it_by_name():
    with pytest.raises(TypeError, match="PuzzleMix"):
        fastmix.RandomMix(fastmix.Mixup(1.0), mixer())


# Noise


def test_noise_is_one_step_uphill_from_its_start_in_the_images_range():
    x, g = images(), torch.randn(6, 3, 16, 16)
    how = {"mean": MEAN, "std": STD}
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    generator = torch.Generator().manual_seed(3)
    start = fastmix.noise_start(x, **how, generator=generator)
    pixels, begun = x * std + mean, start * std + mean
    assert float((begun - pixels).abs().max()) <= 10 / 255 + 1e-6
    assert float(begun.min()) >= -1e-6
    assert float(begun.max()) <= 1 + 1e-6
    assert float((begun - pixels).std()) > 5 / 255
    noise = fastmix.adversarial_noise(x, start, g, **how, prob=0.5, generator=generator)
    moved = noise.images * std + mean - pixels
    full = (begun - pixels + 12 / 255 * g.sign()).clamp(-10 / 255, 10 / 255)
    inside = ((pixels + full) > 0.01) & ((pixels + full) < 0.99) & (full.abs() > 1e-3)
    c = [float((moved / full)[i][inside[i]].median()) for i in range(6)]
    for i in range(6):
        torch.testing.assert_close(moved[i], (pixels[i] + c[i] * full[i]).clamp(0, 1) - pixels[i], rtol=0, atol=1e-5)
    assert 0 < min(c) < max(c) < 1
    assert len({round(value, 3) for value in c}) == 6
    assert noise.own.dtype == torch.bool
    assert fastmix.adversarial_noise(x, start, g, **how, prob=1.0).partner.all()
    assert not fastmix.adversarial_noise(x, start, g, **how, prob=0.0).own.any()


@pytest.mark.slow_interpreted
def test_flagged_rows_have_their_noise_before_blocks_move(quickly):
    device = quickly
    x, s, y = images(4, device=device), maps(4, device=device), torch.arange(4, device=device)
    start = fastmix.noise_start(x, mean=MEAN, std=STD)
    noise = fastmix.adversarial_noise(x, start, torch.randn_like(x), mean=MEAN, std=STD)
    own = torch.tensor([True, True, False, False], device=device)
    partner = torch.tensor([True, False, True, False], device=device)
    noise = noise._replace(own=own, partner=partner)
    puzzle = mixer(t_eps=0.01)
    m = copy.deepcopy(puzzle).sample(x, s)
    mixed, target = puzzle(x, y, s, noise=noise)
    expected = reference_mix(x, noise.images, own, partner, m)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(target.weights[:, 0], m.target_lam)
    nothing = noise._replace(own=own & False, partner=own & False)
    assert torch.equal(mix_with_noise(m, x, nothing), m.apply(x))


def reference_mix(x, noisy, own, partner, m):
    """Every row alone: a batch of two, the row's version and its partner's."""
    rows = []
    for i, j in enumerate(m.index.tolist()):
        pair = torch.stack((noisy[i] if own[i] else x[i], noisy[j] if partner[i] else x[j]))
        plans = [plan[i : i + 1].expand(2, -1) for plan in (m.plan, m.partner_plan)]
        mask = m.mask[i : i + 1].expand(2, -1, -1)
        arguments = (pair, mask, torch.tensor([1, 0]), *plans)
        rows.append(torch.from_numpy(reference.mix_masked(*map(numpy, arguments)))[0])
    return torch.stack(rows).to(x.device, x.dtype)


def test_noise_that_is_wrong():
    x, s, y = images(), maps(), torch.arange(6)
    noise = fastmix.adversarial_noise(x, x, x, mean=0.5, std=0.25)
    for wrong, words in [
        (x, "noise: expected what fastmix.adversarial_noise returns"),
        (noise._replace(images=x[:2]), r"noise.images: expected shape \[6, 3, 16, 16\]"),
        (noise._replace(own=torch.ones(6)), "noise.own: expected a bool tensor"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            mixer()(x, y, s, noise=wrong)
    with pytest.raises(ValueError, match="start: expected shape"):
        fastmix.adversarial_noise(x, x[:2], x, mean=0.5, std=0.25)
    with pytest.raises(ValueError, match="prob"):
        fastmix.adversarial_noise(x, x, x, mean=0.5, std=0.25, prob=2)
    with pytest.raises(ValueError, match="bounds: expected least < most"):
        fastmix.noise_start(x, mean=0.5, std=0.25, bounds=(1, 0))


def test_the_page_runs():
    names = {}
    for code in code_of("In a training loop", "puzzle.md"):
        exec(code, names)
    assert names["mixed"].shape == names["x"].shape
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_warmup_cuts_with_each_number_of_blocks_and_leaves_the_sampler_alone():
    puzzle = mixer(blocks=(2, 4))
    before = copy.deepcopy(puzzle.state_dict())
    assert fastmix.warmup((8, 3, 16, 16), sampler=puzzle) > 0
    assert puzzle.state_dict() == before


# TransMix's label share


@pytest.mark.parametrize(("cells", "pixels"), [((4, 4), (4, 4)), ((2, 4), (8, 4)), ((8, 8), (4, 2)), ((2, 8), (4, 4))])
def test_attention_share(cells, pixels):
    mask, attention = torch.rand(3, *cells), torch.rand(3, *pixels)
    attention[1] = 0
    fine = [max(sizes) for sizes in zip(cells, pixels, strict=True)]
    spread = [
        np.kron(numpy(t), np.ones([1, *(f // c for f, c in zip(fine, t.shape[1:], strict=True))])) for t in (mask, attention)
    ]
    expected = (spread[0] * spread[1]).sum((1, 2)) / np.maximum(spread[1].sum((1, 2)), 1e-30)
    expected[1] = numpy(mask[1]).mean()
    np.testing.assert_allclose(fastmix.attention_share(mask, attention), expected, rtol=1e-5)


def test_attention_that_is_wrong():
    mask = torch.rand(3, 4, 4)
    with pytest.raises(ValueError, match="attention: expected values of at least 0"):
        fastmix.attention_share(mask, -mask)
    with pytest.raises(ValueError, match="attention: expected 3 rows"):
        fastmix.attention_share(mask, mask[:2])
    with pytest.raises(ValueError, match="attention: expected a size"):
        fastmix.attention_share(mask, torch.rand(3, 6, 4))
    with pytest.raises(TypeError, match="mask: expected"):
        fastmix.attention_share(mask.long(), mask)


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_a_model_that_does_not_read_its_input_is_refused(keep):
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.randn(2, 3))

        def forward(self, x):
            return self.logits

    with pytest.raises(ValueError, match="model: expected logits that depend on x"):
        fastmix.input_gradient(Constant(), torch.randn(2, 3, 4, 4), torch.tensor([0, 1]), keep=keep)
