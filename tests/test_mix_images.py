"""fastmix.mix_images on every backend against the oracle: bytes to the normalised, mirrored, mixed batch."""

import itertools

import numpy as np
import pytest
import torch
from conftest import GPU
from plain import leaf

import fastmix
from fastmix import Mix, mix_images, reference

MEAN, STD = [0.49, 0.45, 0.41, 0.3], [0.25, 0.22, 0.27, 0.5]
SHAPES = [
    (5, 3, 8, 16),
    (5, 3, 7, 9),
    (4, 1, 12),
    (3, 2, 2, 4, 8),
    (2, 3, 32, 40),
    (1, 3, 4, 4),
    (3, 4, 5, 1),
    (0, 3, 4, 4),
    (2, 3, 0, 4),
]
# of the scale of a row: the factors scale/std and mean/std are rounded, then the sum, then the mixture
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-6}


def draw(shape, kind, device):
    """(images, Mix or None) of a way of mixing, with weights of 0 and 1 among them."""
    N, spatial = shape[0], shape[2:]
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    index = torch.arange(N).roll(1)
    lam = torch.rand(N)
    lam[1:2], lam[2:3] = 0, 1
    how = {}
    if kind == "box":
        corners = torch.stack([torch.randint(-1, size + 2, (2, N)) for size in spatial], 2)
        how["box"] = torch.cat(tuple(corners), 1).to(device)
    if kind in ("mask", "moved"):
        h, w = (4 if size % 4 == 0 and size else max(size, 1) for size in spatial[-2:])
        mask, lam = torch.rand(N, h, w), None
        mask[:, :1], mask[:, -1:] = 0, 1
        how["mask"] = mask.to(device)
        if kind == "moved":
            how["plan"], how["partner_plan"] = (torch.randint(0, h * w, (N, h * w), device=device) for _ in range(2))
    if kind == "plain":
        return images.to(device), None
    return images.to(device), Mix(None if lam is None else lam.to(device), index.to(device), **how)


def expected(images, m, flip=None, mean=None, std=None, **options):
    """The oracle's values, and the scale of each row's numbers."""
    C = images.shape[1]
    mean, std = MEAN[:C] if mean is None else mean, STD[:C] if std is None else std
    how = {} if m is None else {"index": m.index, "box": m.box, "mask": m.mask, "plan": m.plan, "partner_plan": m.partner_plan}
    if m is not None and m.mask is None:
        how["lam"] = m.lam.detach()
    how = {k: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in how.items()}
    flip = None if flip is None else flip.tolist()
    value = reference.mix_images(images.cpu().numpy(), mean, std, flip=flip, **how, **options)
    size = 1 + np.abs(np.divide(mean, std)).max() + np.abs(np.divide(255 * options.get("scale", 1 / 255), std)).max()
    return value, size


def check(out, images, m, flip=None, **options):
    value, size = expected(images, m, flip, **options)
    assert out.shape == images.shape
    np.testing.assert_allclose(out.detach().cpu().double().numpy(), value, rtol=0, atol=size * LIMIT[out.dtype])


def kinds(shape):
    return ("plain", "lam", "box", *(("mask", "moved") if len(shape) > 3 and 0 not in shape[2:] else ()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.slow_interpreted
def test_values(device, shape):
    C = shape[1]
    for kind, mirrored, dtype in itertools.product(kinds(shape), (False, True), (torch.float32, torch.bfloat16)):
        images, m = draw(shape, kind, device)
        flip = (torch.arange(shape[0], device=device) % 3 != 1) if mirrored else None
        out = mix_images(images, m, mean=MEAN[:C], std=STD[:C], flip=flip, dtype=dtype)
        assert out.dtype == dtype
        assert out.is_contiguous()
        check(out, images, m, flip)


@pytest.mark.parametrize("kind", ["plain", "lam", "box", "mask", "moved"])
@pytest.mark.parametrize("W", [12, 32])
def test_layouts(device, kind, W):
    """NHWC, channels_last, slices off a word's boundary and steps: the same values, in the layout that is asked for."""
    images, m = draw((4, 3, 8, W), kind, device)
    flip = torch.tensor([True, False, True, False], device=device)
    how = {"mean": MEAN[:3], "std": STD[:3], "flip": flip}
    first = mix_images(images, m, **how)
    wide = torch.zeros(4, 3, 10, 2 * W + 5, dtype=torch.uint8, device=device)
    wide[:, :, 1:-1, 1:-4:2] = images
    for other in (
        images.contiguous(memory_format=torch.channels_last),
        wide[:, :, 1:-1, 1:-4:2],
        wide[:, :, 1:-1, 1:-4:2].clone(),
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            out = mix_images(other, m, memory_format=memory_format, **how)
            assert out.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(out, first, rtol=0, atol=1e-6)
    bytes_last = images.permute(0, 2, 3, 1).contiguous()
    out = mix_images(bytes_last, m, layout="NHWC", **how)
    assert out.is_contiguous(memory_format=torch.channels_last)  # where the channels are in the images
    torch.testing.assert_close(out, first, rtol=0, atol=1e-6)
    shifted = torch.zeros(4, 3, 8, W + 1, dtype=torch.uint8, device=device)
    shifted[..., 1:] = images
    torch.testing.assert_close(mix_images(shifted[..., 1:], m, **how), first, rtol=0, atol=1e-6)


def test_it_is_normalising_and_then_mixing():
    """On the CPU with the very bits of the two passes; rows of lam 0 and 1 have those of plain normalising."""
    for kind in ("lam", "box", "mask", "moved"):
        images, m = draw((6, 3, 16, 16), kind, "cpu")
        how = {"mean": MEAN[:3], "std": STD[:3]}
        x = mix_images(images, **how)
        mixed = mix_images(images, m, **how)
        assert torch.equal(mixed, m.apply(x))
        if kind == "lam":
            assert torch.equal(mixed[1], x[0])
            assert torch.equal(mixed[2], x[2])


def test_each_image_is_mirrored_by_its_own_flip(device):
    images, m = draw((4, 3, 6, 8), "lam", device)
    flip = torch.tensor([True, False, False, True], device=device)
    seen = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    how = {"mean": MEAN[:3], "std": STD[:3]}
    assert torch.equal(mix_images(images, m, flip=flip, **how), mix_images(seen, m, **how))


def test_numbers_of_rows_and_channels_in_any_strides(device):
    images, m = draw((4, 3, 6, 8), "lam", device)
    flip = torch.tensor([True, False, False, True], device=device)
    wide = torch.zeros(8, dtype=torch.bool, device=device)
    wide[::2] = flip
    mean, std = torch.tensor([0.4, 0.1, 0.4, 0.1, 0.4], device=device)[::2], torch.tensor(0.25, device=device).expand(3)
    expected = mix_images(images, m, mean=[0.4] * 3, std=[0.25] * 3, flip=flip)
    torch.testing.assert_close(mix_images(images, m, mean=mean, std=std, flip=wide[::2]), expected, rtol=0, atol=1e-6)


def test_label_maps_are_mirrored_too():
    m = Mix(1.0, torch.tensor([1, 0]), box=torch.tensor([[0, 0, 2, 1]] * 2))
    y = torch.arange(12).view(2, 2, 3)
    flip = torch.tensor([True, False])
    seen = torch.stack((y[0].flip(-1), y[1]))
    a, b = m.target(y, flip=flip), m.target(seen)
    assert torch.equal(a.classes, b.classes)
    assert torch.equal(a.weights, b.weights)
    labels = torch.tensor([7, 9])
    assert torch.equal(Mix(0.5, m.index).target(labels, flip=flip).classes, torch.tensor([[7, 9], [9, 7]]))
    with pytest.raises(ValueError, match="flip: expected shape"):
        m.target(y, flip=flip[:1])


@pytest.mark.parametrize("kind", ["lam", "box", "mask", "moved"])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients(device, kind, shared):
    images, m = draw((4, 3, 8, 8), kind, device)
    if kind == "moved" or (shared and kind in ("mask",)):
        shared = False
    flip = torch.tensor([True, False, True, False], device=device)
    weight = leaf(m.mask if m.mask is not None else torch.tensor(0.3, device=device) if shared else m.lam)
    how = {"box": m.box} if m.mask is None else {"plan": m.plan, "partner_plan": m.partner_plan, "mask": weight}
    m = Mix(None if m.mask is not None else weight, m.index, **how)
    out = mix_images(images, m, mean=MEAN[:3], std=STD[:3], flip=flip)
    g = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, weight, g)
    x = torch.from_numpy(reference.mix_images(images.cpu().numpy(), MEAN[:3], STD[:3], flip=flip.tolist()))
    cpu = [None if t is None else t.detach().cpu().numpy() for t in (g, m.mask, m.index, m.box, m.plan, m.partner_plan)]
    g, mask, index, box, *plans = cpu
    if mask is not None:
        truth = reference.mix_masked_grad(g, x, mask, index, *plans)[1]
    else:
        truth = reference.mix_grad(g, x, weight.detach().expand(4).cpu().numpy(), index, box)[1]
        truth = truth.sum() if weight.dim() == 0 else truth
    np.testing.assert_allclose(found.cpu().numpy(), truth, rtol=2e-5, atol=2e-4)


def test_the_bytes_alone_are_kept_for_the_backward():
    images, m = draw((4, 3, 8, 8), "lam", "cpu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mix_images(images, Mix(leaf(m.lam), m.index), mean=MEAN[:3], std=STD[:3])
    assert all(t.numel() <= 12 or t.dtype == torch.uint8 for t in kept)
    assert any(t is images or t.dtype == torch.uint8 for t in kept)


def test_second_derivatives():
    """The gradient to lambda is linear in the upstream gradient, and can be differentiated in it."""
    images, m = draw((3, 3, 4, 4), "lam", "cpu")
    lam, g = leaf(m.lam), leaf(torch.randn(3, 3, 4, 4))
    out = mix_images(images, Mix(lam, m.index), mean=MEAN[:3], std=STD[:3])
    (dlam,) = torch.autograd.grad(out, lam, g, create_graph=True)
    (dg,) = torch.autograd.grad(dlam.sum(), g)
    x = mix_images(images, mean=MEAN[:3], std=STD[:3])
    torch.testing.assert_close(dg, x - x[m.index])


def test_out(device):
    for kind, memory_format in itertools.product(("plain", "box"), (torch.contiguous_format, torch.channels_last)):
        images, m = draw((4, 3, 8, 8), kind, device)
        how = {"mean": MEAN[:3], "std": STD[:3], "dtype": torch.bfloat16}
        out = torch.zeros(4, 3, 8, 8, dtype=torch.bfloat16, device=device).contiguous(memory_format=memory_format)
        assert mix_images(images, m, out=out, **how) is out
        assert torch.equal(out, mix_images(images, m, **how))
        strided = torch.zeros(4, 3, 8, 16, dtype=torch.bfloat16, device=device)[..., ::2]
        assert torch.equal(mix_images(images, m, out=strided, **how), out)
    lam = leaf(m.lam)
    with pytest.raises(ValueError, match="out: expected None where the mix"):
        mix_images(images, Mix(lam, m.index), out=out, **how)
    with pytest.raises(TypeError, match="out: expected a float32 tensor, as images"):
        mix_images(images, m, out=out, mean=MEAN[:3], std=STD[:3])
    with pytest.raises(ValueError, match="overlaps images"):
        mix_images(images[:, :, :, :2], None, mean=MEAN[:3], std=STD[:3], out=images[:, :, :, :8].view(torch.float32))
    memory = torch.zeros(4, 3, 8, 8, device=device)
    shared = memory.view(-1)[:16].view(torch.int64)
    for name, other, flip in (("index", Mix(0.5, shared[:4]), None), ("flip", None, shared.view(torch.bool)[:4])):
        with pytest.raises(ValueError, match=f"overlaps {name}, which"):
            mix_images(images, other, mean=MEAN[:3], std=STD[:3], flip=flip, out=memory)


@pytest.mark.trap("lazily-negated-view")
def test_lazily_negated_views_are_what_they_show(device):
    how = {"mean": MEAN[:3], "std": STD[:3]}
    for kind in ("lam", "mask"):
        images, m = draw((4, 3, 8, 8), kind, device)
        share = m.lam if kind == "lam" else m.mask
        negated = torch._neg_view(-share)
        assert negated.is_neg()
        other = Mix(negated, m.index) if kind == "lam" else Mix(None, m.index, mask=negated)
        assert torch.equal(mix_images(images, other, **how), mix_images(images, m, **how))
    x = torch.randn(4, 3, 8, 8, device=device)
    for expected, call in (
        (fastmix.mix(x, 0.3, m.index), lambda out: fastmix.mix(x, 0.3, m.index, out=out)),
        (mix_images(images, m, **how), lambda out: mix_images(images, m, out=out, **how)),
    ):
        out = torch._neg_view(torch.zeros_like(x))
        assert torch.equal(call(out), expected)


def test_compiled(device):
    """One graph, with the values and the gradient of eager mode, for draws that change."""
    images, m = draw((4, 3, 8, 8), "lam", device)

    def step(images, lam, index, flip):
        out = mix_images(images, Mix(lam, index), mean=MEAN[:3], std=STD[:3], flip=flip, dtype=torch.bfloat16)
        return out.float().square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    flip = torch.tensor([True, False, False, True], device=device)
    for _ in range(2):
        a, b = leaf(torch.rand(4, device=device)), None
        b = leaf(a)
        first, second = step(images, a, m.index, flip), compiled(images, b, m.index, flip)
        torch.testing.assert_close(second, first)
        torch.testing.assert_close(torch.autograd.grad(second, b)[0], torch.autograd.grad(first, a)[0])


def test_samplers_draw_for_bytes(device):
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, device=device)
    y = torch.arange(8, device=device)
    for sampler in (
        fastmix.Mixup(0.4, seed=1),
        fastmix.CutMix(seed=1),
        fastmix.RandomMix(fastmix.Mixup(0.8), fastmix.CutMix(), seed=1),
    ):
        m = sampler.sample(images)
        out = mix_images(images, m, mean=MEAN[:3], std=STD[:3])
        check(out, images, m)
        torch.testing.assert_close(m.target(y).weights.sum(1), torch.ones(8, device=device))


def test_statistics_as_tensors(device):
    images, m = draw((3, 3, 4, 4), "lam", device)
    mean, std = (torch.tensor(v[:3], device=device) for v in (MEAN, STD))
    torch.testing.assert_close(
        mix_images(images, m, mean=mean, std=std), mix_images(images, m, mean=MEAN[:3], std=STD[:3]), rtol=0, atol=1e-6
    )
    scaled = mix_images(images, mean=[127.5] * 3, std=[127.5] * 3, scale=1)
    assert scaled.min() >= -1
    assert scaled.max() <= 1


def test_float16_is_nearer_the_truth_than_normalising_in_it():
    """A chain that normalises in float16 rounds each step; here is one rounding."""
    images, m = draw((4, 3, 8, 8), "lam", "cpu")
    like = (1, 3, 1, 1)
    mean, std = (255 * torch.tensor(v[:3], dtype=torch.float16).view(like) for v in (MEAN, STD))
    x = images.to(torch.float16).sub_(mean).div_(std)
    lam = m.lam.to(torch.float16).view(-1, 1, 1, 1)
    theirs = x * lam + x[m.index] * (1 - lam)
    ours = mix_images(images, m, mean=MEAN[:3], std=STD[:3], dtype=torch.float16)
    truth, _ = expected(images, m)
    assert np.abs(ours.double().numpy() - truth).max() < np.abs(theirs.double().numpy() - truth).max()


def bad():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    m = Mix(torch.rand(4), torch.arange(4))
    ok = {"mean": MEAN[:3], "std": STD[:3]}
    cut = Mix(1.0, torch.arange(4), box=torch.tensor([[0, 0, 2, 2]] * 4))
    cut.apply(torch.zeros(4, 3, 6, 6))
    return [
        ("floats", TypeError, r"images: expected uint8 bytes \(float batches: Mix.apply or mix\)", lambda: mix_images(images.float(), m, **ok)),
        ("int", TypeError, "images: expected a uint8 tensor", lambda: mix_images(images.int(), m, **ok)),
        ("two dimensions", ValueError, "images: expected", lambda: mix_images(images[0, 0], m, **ok)),
        ("mean", ValueError, "mean: expected 3 numbers", lambda: mix_images(images, m, mean=[0.5], std=STD[:3])),
        ("mean of text", ValueError, "mean: expected 3 numbers", lambda: mix_images(images, m, mean="abc", std=STD[:3])),
        ("mean of an iterator", ValueError, "mean: expected 3 numbers", lambda: mix_images(images, m, mean=iter([0.5]), std=STD[:3])),
        ("mean a number", TypeError, "mean: expected 3 numbers", lambda: mix_images(images, m, mean=0.5, std=STD[:3])),
        ("NaN", ValueError, "mean: expected a finite", lambda: mix_images(images, m, mean=[float("nan")] * 3, std=STD[:3])),
        ("std of 0", ValueError, "std: expected numbers other than 0", lambda: mix_images(images, m, mean=MEAN[:3], std=[0.1, 0, 1])),
        ("std of 0, tensor", ValueError, "std: expected numbers other", lambda: mix_images(images, m, mean=MEAN[:3], std=torch.zeros(3))),
        ("NaN in a tensor", ValueError, "mean: expected finite numbers, got", lambda: mix_images(images, m, mean=torch.tensor([0.1, float("nan"), 0]), std=STD[:3])),
        ("infinite std", ValueError, "std: expected finite numbers", lambda: mix_images(images, m, mean=MEAN[:3], std=torch.tensor([0.1, float("inf"), 1]))),
        ("bools", ValueError, "mean: expected 3 numbers", lambda: mix_images(images, m, mean=[True] * 3, std=STD[:3])),
        ("mean on another device", ValueError, "mean: expected .*cpu.*meta", lambda: mix_images(images, m, mean=torch.zeros(3, device="meta"), std=STD[:3])),
        ("layout", ValueError, "layout: expected 'NCHW' or 'NHWC'", lambda: mix_images(images, m, layout="CHW", **ok)),
        ("layout of other channels", ValueError, "does layout fit", lambda: mix_images(images, m, layout="NHWC", **ok)),
        ("flip length", ValueError, r"flip: expected shape \[4\]", lambda: mix_images(images, m, flip=torch.ones(3).bool(), **ok)),
        ("flip dtype", TypeError, "flip: expected a bool tensor", lambda: mix_images(images, m, flip=torch.ones(4), **ok)),
        ("dtype", TypeError, "dtype: expected a floating dtype", lambda: mix_images(images, m, dtype=torch.uint8, **ok)),
        ("format", ValueError, "memory_format: expected", lambda: mix_images(images, m, memory_format=torch.channels_last_3d, **ok)),
        ("rows", ValueError, "images: expected 4 rows", lambda: mix_images(images[:3], m, **ok)),
        ("size of boxes", ValueError, r"images: expected images of size \[6, 6\]", lambda: mix_images(images, cut, **ok)),
        ("mix", TypeError, "mix: expected a Mix", lambda: mix_images(images, 0.5, **ok)),
        ("partner", ValueError, "index: expected a partner", lambda: mix_images(images, Mix(0.5, torch.full((4,), 9)), **ok)),
        ("cells", ValueError, "mask: expected a number of cells", lambda: mix_images(images, Mix(None, m.index, mask=torch.rand(4, 3, 3)), **ok)),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "match", "call"), bad(), ids=[case[0] for case in bad()])
def test_bad_input(name, kind, match, call):
    with pytest.raises(kind, match=match):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_partner_out_of_range_makes_its_row_nan():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device="cuda")
    index = torch.tensor([1, 2, 9, 0], device="cuda")
    out = mix_images(images, Mix(0.5, index), mean=MEAN[:3], std=STD[:3])
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()
