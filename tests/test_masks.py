"""Samplers of masks and boxes of their own: FMix, SmoothMix, GridMix, ResizeMix, SaliencyMix, AttentiveCutMix."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from pages import blocks as code_of
from torch.testing import assert_close as same

import fastmix
from fastmix import AttentiveCutMix, CutMix, FMix, GridMix, Mixup, RandomMix, ResizeMix, SaliencyMix, SmoothMix
from fastmix._torch import draw_numbers
from fastmix.sampling import draws

PLAIN = {
    "FMix": FMix,
    "SmoothMix": SmoothMix,
    "GridMix": GridMix,
    "ResizeMix": ResizeMix,
}
MAPPED = {"SaliencyMix": SaliencyMix, "AttentiveCutMix": lambda **options: AttentiveCutMix(grid=4, **options)}
ALL = {**PLAIN, **MAPPED}


def images(N=6, *sizes, device="cpu", dtype=torch.float32):
    return torch.randn(N, 3, *(sizes or (16, 16)), dtype=dtype).to(device)


def maps(N=6, size=16, device="cpu"):
    return torch.rand(N, size, size, generator=torch.Generator().manual_seed(9)).to(device)


def draw(sampler, x, y=None, **options):
    """A draw of any of them."""
    if isinstance(sampler, (SaliencyMix, AttentiveCutMix)):
        return sampler.sample(x, maps(len(x), device=x.device), y, **options)
    return sampler.sample(x, y, **options)


def shown(mix, x):
    """What part of each image is the row's own, by mixing ones with zeros."""
    rows = len(mix.index)
    other = mix.apply(x.new_ones(x.shape), partner=x.new_zeros(x.shape))
    return other.reshape(rows, -1).mean(1)


# The numbers


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(3, 1), (5, 17), (2, 600), (0, 4), (2, 0), (700, 9)])
def test_numbers_are_the_same_on_every_device(device, rows, count, normal):
    state = draws.state(3, 5, (None, 0))
    expected = draw_numbers(state, rows, count, normal, torch.device("cpu"))
    x = torch.zeros(1, device=device)
    found = draws.numbers(state.to(draws.state_device(device)), rows, count, normal, x)
    assert found.shape == (rows, count)
    assert found.dtype == (torch.float32 if normal else torch.float64)
    if normal:  # the logarithm's last bit differs between libraries
        same(found.cpu(), expected, rtol=2e-7, atol=0)
        assert (found.cpu() == expected).double().mean().nan_to_num(1) > 0.999
    else:
        assert torch.equal(found.cpu(), expected)


def test_numbers_are_even_and_normal():
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
    state = draws.state(1, 0, (None, 0))
    even, normal = (draw_numbers(state, 40, 2000, kind, torch.device("cpu")).double().numpy().ravel() for kind in (False, True))
    assert stats.kstest(even, "uniform").pvalue > 0.01
    assert stats.kstest(normal, "norm").pvalue > 0.01
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 4 / math.sqrt(normal.size)
    other = draw_numbers(draws.state(1, 1, (None, 0)), 40, 2000, False, torch.device("cpu")).numpy().ravel()
    assert abs(np.corrcoef(even, other)[0, 1]) < 4 / math.sqrt(even.size)


# What all of them promise


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_the_share_is_what_the_image_shows(device, make):
    x = images(device=device)
    mix = draw(make(seed=3), x)
    same(mix.target_lam, shown(mix, x), rtol=0, atol=2e-6)
    assert mix.target_lam.dtype == torch.float32
    assert len(mix.target_lam.unique()) > 1 or make is MAPPED["AttentiveCutMix"]
    assert mix.apply(x).shape == x.shape
    target = mix.target(torch.arange(6, device=device))
    assert torch.equal(target.weights[:, 0], mix.target_lam)
    assert torch.equal(target.classes[:, 1], mix.index)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_the_same_draws_on_every_backend(device, make):
    x = images(device=device)
    mix = draw(make(seed=3), x)
    with fastmix.backend("torch"):
        expected = draw(make(seed=3), x.cpu())
    assert torch.equal(mix.index.cpu(), expected.index)
    for name in ("mask", "box"):
        if getattr(expected, name) is not None and make is not FMix:
            same(getattr(mix, name).cpu(), getattr(expected, name), rtol=0, atol=1e-6)
    if make is FMix:  # what the transform rounds
        assert (mix.mask.cpu() != expected.mask).double().mean() < 0.02
    same(mix.target_lam.cpu(), expected.target_lam, rtol=0, atol=0.02 if make is FMix else 1e-6)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_streams_states_and_generators(make):
    x = images()

    def values(mix):
        return mix.target_lam, mix.index, *(t for t in (mix.mask, mix.box) if t is not None)

    def equal(a, b):
        return all(torch.equal(s, t) for s, t in zip(values(a), values(b), strict=True))

    sampler, twin = make(seed=3), make(seed=3)
    first, second = draw(sampler, x), draw(sampler, x)
    assert not equal(first, second)
    assert equal(first, draw(twin, x))
    state = sampler.state_dict()
    assert set(state) == {"_extra_state"}
    assert set(state["_extra_state"]) == {"version", "sampler", "batch"}
    third = draw(sampler, x)
    twin.load_state_dict(state)
    assert equal(third, draw(twin, x))
    twin.load_state_dict(state)
    assert equal(third, draw(pickle.loads(pickle.dumps(twin)), x))
    assert equal(third, draw(copy.deepcopy(twin), x))
    with pytest.raises(ValueError, match="expected that of CutMix"):
        CutMix(seed=0).load_state_dict(state)
    drawn = [draw(make(), x, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert equal(*drawn)
    torch.manual_seed(1)
    a = draw(make(), x)
    torch.manual_seed(1)
    assert equal(a, draw(make(), x))


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_few_rows_and_none_and_other_dtypes(device, make):
    for N in (0, 1, 3):
        x = images(N, device=device)
        mix = draw(make(seed=3), x)
        assert mix.apply(x).shape == x.shape
        assert mix.target(torch.arange(N, device=device)).weights.shape == (N, 2)
    x = images(1, device=device)
    mix = draw(make(seed=4), x)
    assert mix.target_lam.tolist() == [1.0]  # its own partner
    same(mix._share(x), shown(mix, x), rtol=0, atol=2e-6)  # but not beside another batch
    x = images(4, device=device, dtype=torch.float64)
    mix = draw(make(seed=3), x)
    assert mix.target_lam.dtype == torch.float64
    assert mix.apply(x).dtype == torch.float64
    x = images(4, device=device).to(torch.bfloat16)
    assert draw(make(seed=3), x).apply(x).dtype == torch.bfloat16


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_prob_label_and_eval(make):
    x, y = images(200), torch.arange(200)
    mix = draw(make(prob=0.25, seed=3), x)
    whole = shown(mix, x) == 1
    assert 0.6 < whole.double().mean() < 0.95  # rows of lam near 1 among them
    assert bool((mix.target_lam[whole] == 1).all())
    assert torch.equal(mix.apply(x)[whole], x[whole])
    nothing = draw(make(prob=0.0, seed=3), x)
    assert torch.equal(nothing.apply(x), x)
    plain, larger = draw(make(seed=3), x), draw(make(label="larger", seed=3), x)
    assert torch.equal(larger.target_lam, (plain.target_lam >= 0.5).float())
    assert torch.equal(larger.apply(x), plain.apply(x))
    assert draw(make(label="own", seed=3), x).target_lam.unique().tolist() == [1.0]
    sampler = make(seed=3).eval()
    assert torch.equal(draw(sampler, x).apply(x), x)
    arguments = (x, y, maps(200)) if make in MAPPED.values() else (x, y)
    assert sampler(*arguments)[0] is x
    sampler.train()
    mixed, target = sampler(*arguments)
    assert torch.equal(mixed, plain.apply(x))
    assert torch.equal(target.weights[:, 0], plain.target_lam)


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("partner", ["any", "flip", "roll", "same"])
def test_pairs_and_batches_share_a_draw(make, partner):
    x, y = images(7), torch.tensor([0, 1, 0, 1, 0, 1, 2])
    mix = draw(make(per="batch", partner=partner, seed=3), x, y)
    value = mix.box if mix.mask is None else mix.mask.flatten(1)
    met = mix.index != torch.arange(7) if partner == "same" else torch.ones(7, dtype=torch.bool)
    assert bool((value[met] == value[met][:1]).all())
    mix = draw(make(per="pair", partner=partner, seed=3), x, y)
    value = mix.box if mix.mask is None else mix.mask.flatten(1)
    assert torch.equal(value[mix.index], value)  # of rings of three as well
    if partner != "same":
        assert len(value.unique(dim=0)) >= 3
    if partner == "same":
        assert mix.target_lam[6] == 1


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_another_batch(make):
    x, other, y, y2 = images(), images(), torch.arange(6), torch.arange(6, 12)
    arguments = (x, y, maps()) if make in MAPPED.values() else (x, y)
    mixed, target = make(seed=3)(*arguments, partner=(other, y2))
    assert torch.equal(target.classes, torch.stack((y, y2), 1))
    ones, _ = make(seed=3)(torch.ones_like(x), *arguments[1:], partner=(torch.zeros_like(x), y2))
    same(target.weights[:, 0], ones.flatten(1).mean(1), rtol=0, atol=2e-6)
    assert torch.equal(mixed[ones == 1], x[ones == 1])
    with pytest.raises(TypeError, match="partner: expected a pair"):
        make(seed=3)(*arguments, partner=other)
    with pytest.raises((TypeError, ValueError), match="partner"):
        make(partner="same", seed=3)(*arguments, partner=(other, y2))


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_label_maps_are_cut_as_the_images_are(device, make):
    x = images(device=device)
    y = torch.arange(6, device=device).view(-1, 1, 1).expand(6, 16, 16).contiguous()
    mix = draw(make(seed=3), x)
    target = mix.target(y)
    own = mix.apply(torch.ones_like(x), partner=torch.zeros_like(x))[:, 0]
    same(target.weights[:, 0], own, rtol=0, atol=2e-6)
    assert torch.equal(target.classes[:, 1][own == 0], y[mix.index][own == 0])


@pytest.mark.parametrize("make", [*ALL.values(), lambda **_: fastmix.PuzzleMix(mean=0.5, std=0.5)], ids=[*ALL, "PuzzleMix"])
def test_not_in_a_random_mix(make):
    sampler = make(seed=None)
    reasons = "whose? masks|another size|another kernel|needs a saliency map"
    with pytest.raises(
        TypeError, match=rf"samplers\[1\]: expected a Mixup, .* got an? {type(sampler).__name__}, which .*({reasons})"
    ):
        RandomMix(Mixup(1.0), sampler)


@pytest.mark.no_poison
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.slow_interpreted
def test_in_a_program(device, make):
    torch._dynamo.reset()
    x, y = images(device=device), torch.arange(6, device=device)
    more = (maps(device=device),) if make in MAPPED.values() else ()
    sampler = make(seed=3)
    step = torch.compile(lambda x, y, *more: sampler(x, y, *more)[0], backend="eager", fullgraph=True)
    twin = make(seed=3)
    for _ in range(2):
        same(step(x, y, *more), twin(x, y, *more)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_nothing_waits_for_the_device(device, make):
    x, y = images(device=device), torch.arange(6, device=device)
    more = (maps(device=device),) if make in MAPPED.values() else ()
    sampler = make(seed=3)
    sampler(x, y, *more)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(x, y, *more)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_reprs_and_options_that_are_set():
    assert repr(FMix(0.5, 2.0, dims=2)) == (
        "FMix(alpha=0.5, per='row', prob=1.0, partner='any', label='proportional', seed=None, decay=2.0, dims=2)"
    )
    assert repr(SmoothMix()).startswith("SmoothMix(scale=(0.25, 0.5), per='row'")
    assert repr(ResizeMix((0.2, 0.3))).startswith("ResizeMix(scale=(0.2, 0.3), per='row'")
    assert repr(AttentiveCutMix()).startswith("AttentiveCutMix(cells=6, grid=(7, 7), per='row'")
    assert "grid=(4, 4)" in repr(GridMix())
    sampler = ResizeMix()
    sampler.scale = [0, 1]
    assert sampler.scale == (0.0, 1.0)
    with pytest.raises(ValueError, match="scale: expected least <= most"):
        sampler.scale = (0.5, 0.2)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: FMix(0.0), ValueError, "alpha: expected positive"),
        (lambda: FMix(decay=-1.0), ValueError, r"decay: expected a number of at least 0, got -1.0"),
        (lambda: FMix(decay="3"), TypeError, "decay: expected a float"),
        (lambda: FMix(dims=4), ValueError, "dims: expected 1, 2 or 3, got 4"),
        (lambda: FMix(seed=-1), ValueError, "seed"),
        (lambda: FMix(per="column"), ValueError, "per: expected one of"),
        (lambda: SmoothMix(0.3), TypeError, "scale: expected"),
        (lambda: SmoothMix((0.3, 1.2)), ValueError, r"scale: expected a number in \[0, 1\], got 1.2"),
        (lambda: ResizeMix((0.8, 0.1)), ValueError, "scale: expected least <= most"),
        (lambda: ResizeMix((0.1,)), TypeError, "scale"),
        (lambda: GridMix(grid=0), ValueError, "grid: expected numbers of at least 1, got 0"),
        (lambda: GridMix(grid=(2, 3, 4)), TypeError, "grid: expected an int"),
        (lambda: AttentiveCutMix(50), ValueError, "cells: expected at most the 49 cells of the grid, got 50"),
        (lambda: AttentiveCutMix(-1), ValueError, "cells"),
        (lambda: AttentiveCutMix(2.5), TypeError, "cells: expected an int"),
        (lambda: SaliencyMix(prob=1.5), ValueError, "prob"),
        (lambda: GridMix(grid=5).sample(images()), ValueError, "x: expected height and width that a grid of 5 x 5 divides"),
        (lambda: FMix(dims=3).sample(torch.zeros(2, 4, 4)), ValueError, r"x: expected \[N, ..., D, H, W\]"),
        (lambda: SmoothMix().sample(torch.zeros(2, 4)), ValueError, r"x: expected shape \[N, ..., H, W\]"),
        (lambda: ResizeMix().sample(torch.zeros(2)), ValueError, "x: expected"),
        (lambda: FMix().sample([1.0]), TypeError, "x: expected a tensor"),
        (lambda: SaliencyMix().sample(images(), maps(5)), ValueError, r"saliency: expected shape \[6, 16, 16\]"),
        (lambda: SaliencyMix().sample(images(), -maps()), ValueError, "saliency: expected values of at least 0, got one of -"),
        (lambda: SaliencyMix().sample(images(), maps() * float("nan")), ValueError, "saliency: expected .* got one of nan"),
        (lambda: SaliencyMix().sample(images(), maps().long()), TypeError, "saliency: expected a float16"),
        (lambda: SaliencyMix(partner="same").sample(images(), maps()), TypeError, "y: expected int64 class indices"),
        (
            lambda: AttentiveCutMix(grid=4).sample(images(), maps(6, 6)),
            ValueError,
            r"attention: expected shape \[6, 4, 4\], or a",
        ),
        (
            lambda: AttentiveCutMix().sample(images(), maps(6, 7)),
            ValueError,
            "x: expected height and width that a grid of 7 x 7",
        ),
        (lambda: AttentiveCutMix(grid=4)(images(), torch.arange(5), maps()), ValueError, "y: expected 6 rows"),
    ],
)
def test_errors(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


# From bytes


@pytest.mark.parametrize("make", [FMix, SmoothMix, GridMix, ResizeMix], ids=PLAIN)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_bytes(device, make, layout):
    data = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8).to(device)
    planes = data.movedim(-1, 1)
    given = data if layout == "NHWC" else planes.contiguous()
    how = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    mix, flip = make(seed=3).sample(planes), torch.tensor([True, False, True, False, True], device=device)
    found = fastmix.mix_images(given, mix, layout=layout, flip=flip, **how)
    plain = fastmix.mix_images(planes, flip=flip, **how)
    same(found, mix.apply(plain))
    out = torch.empty_like(found)
    assert fastmix.mix_images(given, mix, layout=layout, flip=flip, out=out, **how) is out
    same(out, found)


def test_volumes_of_bytes(device):
    data = torch.randint(0, 256, (4, 1, 3, 4, 6), dtype=torch.uint8).to(device)
    mix = FMix(seed=3).sample(data)
    same(fastmix.mix_images(data, mix, mean=[0.5], std=[0.5]), mix.apply(fastmix.mix_images(data, mean=[0.5], std=[0.5])))


def test_pipelines_have_no_maps():
    how = {"mean": (0.5,), "std": (0.5,)}
    assert "ResizeMix" in repr(fastmix.ImagePipeline(ResizeMix(), **how))
    with pytest.raises(TypeError, match="sampler: expected .* that needs no map of the images"):
        fastmix.ImagePipeline(SaliencyMix(), **how)


# FMix


@pytest.mark.parametrize("shape", [(5, 3, 40), (5, 3, 12, 17), (4, 2, 5, 6, 9), (3, 1, 1, 1)], ids=str)
def test_fmix_keeps_the_largest_of_smooth_noise(device, shape):
    """Against the noise itself, smoothed in float64 by NumPy: a pixel that differs has a value next to the threshold."""
    x, sizes = torch.zeros(shape, device=device), shape[2:]
    mix = FMix(seed=3).sample(x)
    lam = Mixup(1.0, seed=3).sample(x).lam
    mask = mix.mask.flatten(1).cpu().numpy()
    assert tuple(mix.mask.shape[1:]) == (sizes if len(sizes) > 1 else (1, *sizes))
    pixels = math.prod(sizes)
    np.testing.assert_array_equal(mask.sum(1), np.round(lam.cpu().double().numpy() * pixels))
    noise = draw_numbers(draws.state(3, 0, (None, 0)), shape[0], pixels, True, torch.device("cpu")).double().numpy()
    f = np.sqrt(sum(g**2 for g in np.meshgrid(*map(np.fft.fftfreq, sizes), indexing="ij")))
    spectrum = np.fft.fftn(noise.reshape(-1, *sizes), axes=range(1, 1 + len(sizes)))
    blobs = np.fft.ifftn(spectrum * np.maximum(f * max(sizes), 1) ** -3.0, axes=range(1, 1 + len(sizes))).real.reshape(
        -1, pixels
    )
    for row, shown_pixels in zip(blobs, mask, strict=True):
        kept = int(shown_pixels.sum())
        if 0 < kept < pixels:
            threshold = np.sort(row)[::-1][kept - 1]
            wrong = (row >= threshold) != (shown_pixels == 1)
            assert np.all(np.abs(row[wrong] - threshold) < 1e-4 * np.abs(row).max())


@pytest.mark.parametrize("decay", [1.0, 3.0])
def test_fmix_noise_has_its_power_spectrum(decay):
    sampler = FMix(decay=decay)
    blobs = sampler._blobs(torch.randn(400, 64 * 64), (64, 64)).view(-1, 64, 64)
    power = torch.fft.fft2(blobs.double()).abs().square().mean(0)
    f = torch.fft.fftfreq(64).square()
    f = (f[:, None] + f).sqrt()
    use = (f > 2 / 64) & (f < 0.4)
    slope = np.polyfit(f[use].log().numpy(), power[use].log().numpy(), 1)[0]
    assert abs(slope + 2 * decay) < 0.05


def test_fmix_ties_go_to_the_first():
    sampler = FMix(0.5, seed=1)
    sampler._blobs = lambda noise, sizes: torch.zeros_like(noise)
    mix = sampler.sample(torch.zeros(9, 1, 4, 4))
    for row in mix.mask.flatten(1):
        kept = int(row.sum())
        assert row.tolist() == [1.0] * kept + [0.0] * (16 - kept)


def test_fmix_of_volumes_and_signals(device):
    x = torch.randn(4, 2, 3, 4, 6, device=device)
    mix = FMix(seed=3).sample(x)
    own = mix.apply(torch.ones_like(x), partner=torch.zeros_like(x))
    same(own, mix.mask.unsqueeze(1).expand(x.shape))
    same(mix.apply(x), torch.where(own == 1, x, x[mix.index]))
    y = torch.randint(0, 5, (4, 3, 4, 6), device=device)
    assert torch.equal(mix.target(y).argmax(), torch.where(own[:, 0] == 1, y, y[mix.index]))
    assert torch.equal(mix.to(device).apply(x), mix.apply(x))
    with pytest.raises(ValueError, match="x: expected volumes of 3 planes"):
        mix.apply(x[:, :, :2])
    with pytest.raises(ValueError, match="y: expected label maps of 3 planes"):
        mix.target(y[:, :2])
    with pytest.raises(ValueError, match="size: expected two numbers"):
        mix.at(2, 2)
    x = torch.randn(4, 2, 9, device=device)
    mix = FMix(seed=3).sample(x)
    same(mix.apply(x), torch.where(mix.mask == 1, x, x[mix.index]))
    assert FMix(dims=2).sample(torch.zeros(3, 8, 6, device=device)).mask.shape == (3, 8, 6)


# SmoothMix and GridMix


def test_smoothmix_is_the_papers_spot():
    x, sampler = images(500, 12, 20), SmoothMix((0.2, 0.6), seed=3)
    mask = sampler.sample(x).mask.double().numpy()
    numbers = draw_numbers(draws.state(3, 0, (None, 0)), 500, 3, False, torch.device("cpu")).numpy()
    y, column = np.mgrid[:12, :20]
    for i in range(500):
        s, cy, cx = 0.2 + 0.4 * numbers[i, 0], math.floor(12 * numbers[i, 1]), math.floor(20 * numbers[i, 2])
        expected = 1 - np.exp(-(((y - cy) / 12) ** 2 + ((column - cx) / 20) ** 2) / (2 * s * s))
        np.testing.assert_allclose(mask[i], expected, atol=1e-6)
    assert mask[0].min() == 0  # the centre is the partner's


def test_gridmix_counts_and_places():
    x = images(2000, 8, 12)
    mix, lam = GridMix(grid=(2, 3), seed=3).sample(x), Mixup(1.0, seed=3).sample(x).lam
    np.testing.assert_array_equal(mix.mask.sum((1, 2)).numpy(), np.round(lam.double().numpy() * 6))
    assert torch.equal(mix.target_lam, mix.mask.mean((1, 2)))
    three = mix.mask[mix.mask.sum((1, 2)) == 3].flatten(1)
    assert (three.mean(0) - 0.5).abs().max() < 4 * 0.5 / math.sqrt(len(three))
    assert len(three.unique(dim=0)) == 20  # every choice of three cells


# ResizeMix


@pytest.mark.slow_interpreted
def test_resizemix_boxes(device):
    x = images(400, 20, 30, device=device)
    mix = ResizeMix((0.1, 0.8), seed=3).sample(x)
    numbers = draw_numbers(draws.state(3, 0, (None, 0)), 400, 3, False, torch.device("cpu")).numpy()
    expected = []
    for u in numbers:
        tau, box = 0.1 + (0.8 - 0.1) * u[0], []
        for size, place in ((20, u[1]), (30, u[2])):
            side = math.floor(tau * size)
            start = math.floor(place * size) - side // 2
            box.append((max(start, 0), min(start + side, size)))
        expected.append([box[0][0], box[1][0], box[0][1], box[1][1]])
    assert mix.box.tolist() == expected
    areas = torch.tensor([(b - a) * (d - c) for a, c, b, d in expected])
    same(mix.target_lam.cpu(), 1 - areas / 600)
    few = x[:9]
    mix = ResizeMix((0.1, 0.8), seed=3).sample(few)
    assert torch.equal(mix.apply(few), fastmix.resize_mix(few, mix.index, mix.box))


def test_resizemix_of_the_whole_image():
    x = images()
    mix = ResizeMix((1.0, 1.0), seed=3).sample(x)
    assert bool((mix.box[:, 2:] - mix.box[:, :2] <= 16).all())
    assert float(ResizeMix((0.0, 0.0), seed=3).sample(x).target_lam.min()) == 1  # boxes without pixels


# SaliencyMix and AttentiveCutMix


@pytest.mark.slow_interpreted
def test_saliencymix_boxes_are_cutmixs_around_the_partners_maximum(device):
    x, saliency = images(300, 16, 24, device=device), torch.rand(300, 16, 24)
    saliency[5] = 0  # the first of equal pixels
    mix = SaliencyMix(seed=3).sample(x, saliency.to(device))
    lam = Mixup(1.0, seed=3).sample(x).lam.cpu().double().tolist()
    index = mix.index.tolist()
    for i, (y0, x0, y1, x1) in enumerate(mix.box.tolist()):
        cy, cx = np.unravel_index(int(saliency[index[i]].argmax()), (16, 24))
        for start, stop, centre, size in ((y0, y1, cy, 16), (x0, x1, cx, 24)):
            side = int(size * math.sqrt(1 - lam[i]))
            assert (start, stop) == (max(centre - side // 2, 0), min(centre - side // 2 + side, size))
        assert math.isclose(float(mix.target_lam[i]), 1 - (y1 - y0) * (x1 - x0) / 384, abs_tol=1e-6)
    assert bool((mix.lam == 1).all())
    row = index.index(5)
    assert mix.box[row, :2].tolist() == [0, 0]


def test_attentive_cutmix_takes_the_partners_best_cells(device):
    x, attention = images(50, 12, 12, device=device), torch.rand(50, 12, 6)
    attention[7] = 1
    sampler = AttentiveCutMix(cells=4, grid=(4, 3), seed=3)
    mix = sampler.sample(x, attention.to(device))
    pooled = attention.double().view(50, 4, 3, 3, 2).sum((2, 4)).flatten(1).numpy()
    for i, j in enumerate(mix.index.tolist()):
        best = np.argsort(-pooled[j], kind="stable")[:4]
        expected = np.ones(12)
        expected[best] = 0
        np.testing.assert_array_equal(mix.mask[i].flatten().cpu().numpy(), expected)
    same(mix.target_lam.cpu(), torch.full((50,), 1 - 4 / 12))
    assert AttentiveCutMix(0, 4, seed=3).sample(x, attention[:, :, :4].to(device)).target_lam.min() == 1
    assert AttentiveCutMix(16, 4, seed=3).sample(x, attention[:, :, :4].to(device)).target_lam.max() == 0


def test_maps_of_another_batch_are_its_own():
    x, other, saliency = images(), images(), torch.zeros(6, 16, 16)
    saliency[torch.arange(6), torch.arange(6), 15] = 1
    mixed, _ = SaliencyMix((5.0, 50.0), seed=3)(
        torch.zeros_like(x), torch.arange(6), saliency, partner=(torch.ones_like(other), torch.arange(6))
    )
    assert bool((mixed[torch.arange(6), 0, torch.arange(6), 15] == 1).all())


# The page


def test_the_pages_code_runs():
    for code in code_of("In a training loop", "masks.md"):
        exec(code, {})


@pytest.mark.slow
def test_the_recipe(tmp_path, capsys):
    for module in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(module, reason="needs scikit-learn, matplotlib and rich")
    masks = pytest.importorskip("fastmix.recipes.masks")
    masks.main(["--epochs", "1", "--device", "cpu", "--out", str(tmp_path)])
    shares = json.loads((tmp_path / "shares.json").read_text())["shares"]
    assert list(shares) == list(masks.METHODS)
    assert abs(shares["FMix"]["mean"] - 0.5) < 4 * 0.29 / 2000**0.5  # lam is even
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")
    assert "ResizeMix" in capsys.readouterr().out
