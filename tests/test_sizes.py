"""Rows of different extents: what is mixed, the share that the target has, and partners of like extent, against float64 loops."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from numerics import assert_close, numpy
from pages import blocks
from plain import COMPILED, compiled, leaf
from test_mix_plan import META, refused
from torch.testing import assert_close as same

import fastmix
from fastmix import BetaMask, CutMix, Mix, Mixup, RandomMix, mix_images, pair_by_size
from fastmix.bench import peers

ANCHORS = "start", "center"
KINDS = "lam", "box", "mask"


def overlaps(sizes, index, anchor, i):
    """(start in the row, start in the partner, length) of row i's overlap in each dimension."""
    found = []
    for own, partner in zip(sizes[i], sizes[index[i]], strict=True):
        both = min(own, partner)
        found.append(((own - both) // 2, (partner - both) // 2, both) if anchor == "center" else (0, 0, both))
    return found


def oracle(x, sizes, index, anchor, weight):
    """(mixed x, own share of each row) of rows whose last d dimensions have these extents, position by position. weight(i, p): the
    row's own weight at a position of the overlap."""
    x, d = np.asarray(x, dtype=np.float64), len(sizes[0]) if len(sizes) else 1
    out, shares = x.copy(), []
    for i, j in enumerate(index):
        own, partner, both = zip(*overlaps(sizes, index, anchor, i), strict=True)
        given = 0.0
        for step in itertools.product(*map(range, both)):
            p = tuple(a + s for a, s in zip(own, step, strict=True))
            q = tuple(a + s for a, s in zip(partner, step, strict=True))
            m = weight(i, p)
            given += 1 - m
            left = 0.0 if m == 0 else m * x[i][(..., *p)]
            out[i][(..., *p)] = left + (0.0 if m == 1 else (1 - m) * x[j][(..., *q)])
        shares.append(1 - given / math.prod(sizes[i]))
        assert d == len(own)
    return out, np.array(shares)


def draw(kind, size, N, device="cpu"):
    """(Mix, its weight at a position) for rows whose last dimensions have this size; lam of 0 and 1 are among them."""
    index = torch.tensor([(3 * i + 1) % N for i in range(N)], dtype=torch.int64)
    lam = torch.rand(N)
    lam[1:2], lam[2:3] = 0, 1
    if kind == "lam":
        return Mix(lam.to(device), index.to(device)), lambda i, p: float(lam[i])
    if kind == "box":
        low = torch.stack([torch.randint(-1, s, (N,)) for s in size], 1)
        box = torch.cat((low, low + torch.stack([torch.randint(0, s + 1, (N,)) for s in size], 1)), 1)

        def weight(i, p):
            d = len(p)
            return 0.0 if all(box[i, k] <= p[k] < box[i, d + k] for k in range(d)) else float(lam[i])

        return Mix(lam.to(device), index.to(device), box=box.to(device)), weight
    cells = tuple(s // 2 for s in size)
    mask = torch.rand(N, *cells)
    mask[:, :1], mask[:, -1:] = 0, 1
    return Mix(None, index.to(device), mask=mask.to(device)), lambda i, p: float(mask[i, p[0] // 2, p[1] // 2])


def extents(N, size):
    found = torch.stack([torch.randint(1, s + 1, (N,)) for s in size], 1)
    found[:1] = torch.tensor(size)
    return found


CASES = [
    ((5, 7), 1, None),
    ((5, 3, 9), 1, None),
    ((4, 6, 3), 1, (1,)),
    ((4, 5, 2, 3), 1, (1,)),
    ((5, 2, 6, 8), 2, None),
    ((3, 6, 4, 2), 2, (1, 2)),
    ((3, 4, 2, 6), 2, (1, 3)),
    ((3, 2, 3, 4, 5), 3, None),
    ((3, 3, 4, 5, 2), 3, (1, 2, 3)),
    ((1, 3, 4), 1, None),
]


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize(("shape", "d", "axes"), CASES)
def test_values_and_gradients(shape, d, axes, anchor, device):
    N = shape[0]
    places = list(range(len(shape) - d, len(shape))) if axes is None else list(axes)
    size = tuple(shape[axis] for axis in places)
    m, weight = draw("lam", size, N, device)
    sizes = extents(N, size)
    x = torch.randn(shape)
    last = x.movedim(places, tuple(range(-d, 0)))
    expected, share = oracle(numpy(last), sizes.tolist(), m.index.tolist(), anchor, weight)
    expected = np.moveaxis(expected, tuple(range(-d, 0)), places)
    x, lam = leaf(x.to(device)), leaf(m.lam)
    bound = Mix(lam, m.index).within(sizes.to(device), anchor=anchor, axes=axes)
    out = bound.apply(x)
    assert_close(out, expected, torch.float32)
    assert out.stride() == x.stride()
    same(numpy(bound.target_lam), share, rtol=0, atol=1e-6)
    g = torch.randn(shape)
    # gradients, by the formula in float64 of plain indexing
    ref_x, ref_lam = x.detach().cpu().double().requires_grad_(), lam.detach().cpu().double().requires_grad_()
    total, view, up = 0.0, ref_x.movedim(places, tuple(range(-d, 0))), g.double().movedim(places, tuple(range(-d, 0)))
    for i, j in enumerate(m.index.tolist()):
        own, partner, both = zip(*overlaps(sizes.tolist(), m.index.tolist(), anchor, i), strict=True)
        here = (i, ..., *(slice(a, a + n) for a, n in zip(own, both, strict=True)))
        there = (j, ..., *(slice(a, a + n) for a, n in zip(partner, both, strict=True)))
        total = total + (up[i] * view[i]).sum() - (up[here] * view[here]).sum()
        total = total + (up[here] * (ref_lam[i] * view[here] + (1 - ref_lam[i]) * view[there])).sum()
    dx, dlam = torch.autograd.grad(out, (x, lam), g.to(device))
    want_dx, want_dlam = torch.autograd.grad(total, (ref_x, ref_lam))
    same(dx.cpu(), want_dx.float(), rtol=2e-6, atol=2e-6)
    same(dlam.cpu(), want_dlam.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_boxes_and_masks(kind, anchor, device):
    """Of a box and of a mask only the part in the overlap counts."""
    shape = (6, 2, 6, 8)
    m, weight = draw(kind, shape[2:], 6, device)
    sizes, x = extents(6, shape[2:]), torch.randn(shape)
    expected, share = oracle(numpy(x), sizes.tolist(), m.index.tolist(), anchor, weight)
    out = m.apply(x.to(device), sizes=sizes.to(device), anchor=anchor)
    assert_close(out, expected, torch.float32)
    same(numpy(m.target_lam), share, rtol=0, atol=1e-6)
    weights = m.target(torch.arange(6, device=device)).weights
    same(weights.sum(1), torch.ones_like(weights[:, 0]))
    assert torch.equal(weights[:, 0], m.target_lam)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_layouts(dtype, device):
    """Channels last and sliced batches; the result is rounded once."""
    m, weight = draw("lam", (5, 6), 5, device)
    sizes = extents(5, (5, 6))
    wide = torch.randn(5, 3, 5, 9, dtype=dtype)
    for x in (wide[..., :6], wide[..., 1:7].to(memory_format=torch.channels_last), wide[..., ::2][..., :5]):
        some = sizes.clamp(max=x.shape[-1])
        for anchor in ANCHORS:
            out = m.within(some.to(device), anchor=anchor).apply(x.to(device))
            expected, _ = oracle(numpy(x), some.tolist(), m.index.tolist(), anchor, weight)
            assert_close(out, expected, dtype)
    x = wide[..., :6].to(device, memory_format=torch.channels_last)
    assert m.within(sizes.to(device)).apply(x).is_contiguous(memory_format=torch.channels_last)


def test_padding_is_the_rows_own_bits(device):
    """Infinities and NaNs of padding neither pass to the partner nor to a gradient."""
    x = torch.randn(3, 2, 6)
    sizes = torch.tensor([[6], [4], [1]])
    x[1, :, 4:], x[2, :, 1:] = math.nan, math.inf
    lam = leaf(torch.tensor([0.25, 0.5, 0.75], device=device))
    for anchor in ANCHORS:
        m = Mix(lam, torch.tensor([1, 2, 0], device=device)).within(sizes.to(device), anchor=anchor)
        mixed = m.apply(leaf(x.to(device)))
        for i, n in enumerate([6, 4, 1]):
            assert mixed[i, :, :n].isfinite().all()
            same(mixed[i, :, n:].cpu(), x[i, :, n:], rtol=0, atol=0, equal_nan=True)
        (mixed[0].sum() + mixed[1, :, :4].sum() + mixed[2, :, :1].sum()).backward()
        assert lam.grad.isfinite().all()
        lam.grad = None


@pytest.mark.parametrize("anchor", ANCHORS)
def test_rows_of_one_extent_are_mixed_as_ever(anchor):
    x, y = torch.randn(4, 3, 6, 5), torch.arange(4)
    sizes = torch.tensor([[6, 5]] * 4)
    for m in (Mixup(1.0, seed=0).sample(x), Mix(0.3, torch.tensor([1, 1, 0, 0]))):
        bound = m.within(sizes, anchor=anchor)
        assert torch.equal(bound.apply(x), m.apply(x))
        assert torch.equal(bound.target(y).weights, m.target(y).weights)
    m = CutMix(1.0, seed=0).sample(x)
    assert torch.equal(m.within(sizes, anchor=anchor).apply(x), m.apply(x))
    same(m.within(sizes, anchor=anchor).target_lam, m.target_lam)
    # a partner no smaller: everything is mixed
    assert torch.equal(Mix(0.25, torch.tensor([1, 0])).within(torch.tensor([[2], [5]])).target_lam[:1], torch.tensor([0.25]))


def test_lam_of_0_and_1_is_exact():
    sizes = torch.tensor([[7, 11], [5, 13], [3, 3]])
    m = Mix(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1, 2, 0])).within(sizes)
    assert m.target_lam.tolist() == [1.0, 1.0, 0.0]
    x = torch.randn(3, 7, 13)
    assert torch.equal(m.apply(x)[:2], x[:2])
    assert torch.equal(m.apply(x)[2, :3, :3], x[0, :3, :3])


def test_the_share_has_lams_gradient():
    lam = leaf(torch.tensor([0.2, 0.7], dtype=torch.float64))
    m = Mix(lam, torch.tensor([1, 0])).within(torch.tensor([[8], [2]]))
    m.target_lam.sum().backward()
    same(lam.grad, torch.tensor([0.25, 1.0], dtype=torch.float64))


def test_apply_keeps_the_sizes():
    """A target after `apply(x, sizes=)` has the share of what was mixed, and so have later calls and copies."""
    x, h = torch.randn(3, 2, 8), torch.randn(3, 8)
    sizes, m = torch.tensor([[8], [3], [5]]), Mix(0.5, torch.tensor([1, 2, 0]))
    m.apply(x, sizes=sizes, anchor="center")
    bound = Mix(0.5, m.index).within(sizes, anchor="center")
    y = torch.arange(3)
    for other in (m, m.to("cpu"), bound):
        assert torch.equal(other.target(y).weights[:, 0], torch.tensor([1 - 0.5 * 3 / 8, 0.5, 1 - 0.5]))
        assert torch.equal(other.target(torch.rand(3, 4)).lam, other.target_lam)
        assert torch.equal(other.apply(h), bound.apply(h))
    assert m.to("meta")._within.sizes.device == META
    assert repr(m).endswith(f".within({sizes}, anchor='center')")
    assert Mix(0.5, m.index).within(sizes).apply(h).equal(m.within(sizes).apply(h))
    plain = Mix(0.5, m.index)
    plain.within(sizes)
    assert torch.equal(plain.target(y).weights[:, 0], torch.full((3,), 0.5))  # `within` changes another one


def test_wrong_sizes_are_not_kept():
    x, images, m = torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), Mix(0.5, torch.tensor([1, 0]))
    before = repr(m)
    for call in (
        lambda sizes: m.apply(x, sizes=sizes),
        lambda sizes: mix_images(images, m, mean=[0] * 3, std=[1] * 3, sizes=sizes),
    ):
        with pytest.raises(
            ValueError, match="sizes: expected extents of from 1 to 4, the batch's own, got 5 in row 1, dimension 0"
        ):
            call(torch.tensor([[4, 4], [5, 4]]))
        assert repr(m) == before
        assert torch.equal(m.apply(x), fastmix.mix(x, 0.5, m.index))


def test_samplers_kinds_of_labels():
    """The own label keeps all weight, the larger share takes it after the correction, CutMix without correction has the real one."""
    x = torch.randn(64, 3, 8, 8)
    sizes = extents(64, (8, 8))
    share = Mixup(1.0, seed=0).sample(x).within(sizes).target_lam
    assert bool((share > 0.5).any() and (share < 0.5).any())
    assert torch.equal(Mixup(1.0, label="own", seed=0).sample(x).within(sizes).target_lam, torch.ones(64))
    larger = Mixup(1.0, label="larger", seed=0).sample(x).within(sizes)
    assert torch.equal(larger.target_lam, (share >= 0.5).float())
    assert torch.equal(larger.to("cpu").target_lam, larger.target_lam)
    shares = [CutMix(1.0, correct_lam=correct, seed=0).sample(x).within(sizes).target_lam for correct in (True, False)]
    assert torch.equal(*shares)
    both = RandomMix(Mixup(1.0), CutMix(1.0), seed=0)
    m = both.sample(x)
    assert torch.equal(m.within(sizes).target_lam, Mix(m.lam, m.index, box=m.box).within(sizes).target_lam)
    assert torch.equal(both.eval().sample(x).within(sizes).target_lam, torch.ones(64))
    odd = RandomMix(Mixup(1.0), Mixup(1.0, label="own"), seed=0).sample(x)
    refused(lambda: odd.within(sizes), ValueError, "sizes", "one kind of label", "several")
    masks = BetaMask(1.0, (2, 2), seed=0).sample(x)
    assert masks.within(sizes).target_lam.shape == (64,)  # the image's size is known from the draw
    alone = Mixup(1.0, seed=0).sample(x[:1]).within(sizes[:1])
    assert alone.target_lam.tolist() == [1.0]
    by_hand = Mix(0.5, torch.tensor([1, 0]), 0.2).within(torch.tensor([[4], [1]]))
    same(by_hand.target_lam, torch.tensor([1 - 0.8 / 4, 0.2]))


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("kind", KINDS)
def test_label_maps(kind, anchor):
    """Each pixel's two labels and weights are those of the pixels that were mixed there."""
    N, size, C = 5, (6, 8), 4
    m, weight = draw(kind, size, N)
    sizes, y = extents(N, size), torch.randint(0, C, (N, *size))
    target = m.within(sizes, anchor=anchor).target(y)
    onehot = np.moveaxis(np.eye(C)[y.numpy()], -1, 1)
    expected, _ = oracle(onehot, sizes.tolist(), m.index.tolist(), anchor, weight)
    same(target.dense(C).double(), torch.from_numpy(expected), rtol=0, atol=1e-6)
    refused(lambda: m.within(sizes).target(y[:, None]), ValueError, "y", "label maps", r"\[5, 1, 6, 8\]")
    refused(lambda: m.within(sizes).target(y[:, None].float()), ValueError, "y", "rows", r"\[5, 1, 6, 8\]")


def test_labels_of_tokens():
    m = Mix(0.25, torch.tensor([1, 0])).within(torch.tensor([[4], [2]]), axes=(1,))
    assert m.apply(torch.randn(2, 5, 3)).shape == (2, 5, 3)
    target = m.target(torch.tensor([[0, 1, 2, 3, -100], [4, 5, -100, -100, -100]]))
    assert target.weights[:, 0].tolist() == [[0.25, 0.25, 1, 1, 1]] * 2
    assert target.classes[:, 1].tolist() == [[4, 5, -100, -100, -100], [0, 1, 2, 3, -100]]


def test_padding_masks_in_a_model():
    """`mix_hidden` mixes within the extents, and each row keeps its padding mask."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0)
    h, sizes = torch.randn(3, 5, 8), torch.tensor([[5], [2], [3]])
    padding = torch.arange(5) >= sizes
    m = Mix(torch.tensor([0.7, 0.0, 0.4]), torch.tensor([1, 2, 0]))
    bound = m.within(sizes, axes=(1,))
    with fastmix.mix_hidden(layer, bound, masks={"src_key_padding_mask": "ignore"}):
        out = layer(h, src_key_padding_mask=padding)
    same(out, layer(bound.apply(h), src_key_padding_mask=padding))
    for i, n in enumerate([5, 2, 3]):  # what is behind a row's extent plays no part
        alone = layer(bound.apply(h)[i : i + 1, :n])
        same(out[i, :n], alone[0], rtol=1e-4, atol=1e-5)
    with fastmix.mix_hidden(layer, bound, dim=1):
        turned = layer(h.transpose(0, 1))
    same(turned, layer(bound.apply(h).transpose(0, 1)))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_bytes(kind, anchor, device):
    """A Mix within sizes goes through `mix_images` in the same pass."""
    images = torch.randint(0, 256, (4, 3, 6, 8), dtype=torch.uint8, device=device)
    how = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    again = draw(kind, (6, 8), 4, device)[0]
    m = again.within(extents(4, (6, 8)).to(device), anchor=anchor)
    assert torch.equal(mix_images(images, m, **how), m.apply(mix_images(images, **how)))
    flip = torch.tensor([True, False, True, True], device=device)
    turned, maps = images.clone(), torch.randint(0, 9, (4, 6, 8), device=device)
    turned_maps = maps.clone()
    for i in flip.nonzero().flatten().tolist():  # each within its own extent: the padding stays behind it
        width = int(m._within.sizes[i, 1])
        turned[i, ..., :width] = images[i, ..., :width].flip(-1)
        turned_maps[i, :, :width] = maps[i, :, :width].flip(-1)
    expected = mix_images(turned, m, **how)
    assert torch.equal(mix_images(images, m, flip=flip, **how), expected)
    target, straight = m.target(maps, flip=flip), m.target(turned_maps)
    assert torch.equal(target.classes, straight.classes)
    assert torch.equal(target.weights, straight.weights)
    assert torch.equal(mix_images(images, again, flip=flip, sizes=m._within.sizes, anchor=anchor, **how), expected)
    assert torch.equal(again.target(maps, flip=flip).weights, straight.weights)
    refused(lambda: mix_images(images, sizes=m._within.sizes, **how), TypeError, "mix", "a Mix", "None")
    lengths = Mix(0.5, m.index).within(torch.ones(4, 1, dtype=torch.int64, device=device))
    refused(lambda: mix_images(images, lengths, **how), ValueError, "images", "two spatial dimensions", "uint8")


@pytest.mark.slow
@pytest.mark.thinned(3)
@pytest.mark.no_poison
@COMPILED
@pytest.mark.parametrize("anchor", ANCHORS)
def test_compiles(anchor, device):
    """fullgraph, one program for all sizes and lams, the bits of eager code."""

    def step(x, y, lam, index, sizes):
        m = Mix(lam, index).within(sizes, anchor=anchor)
        target = m.target(y)
        return m.apply(x), target.weights, target.classes, pair_by_size(sizes) * 0

    fast, programs = compiled(step, "aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        x, y, lam = torch.randn(5, 3, 6, 8).to(device), torch.arange(5, device=device), torch.rand(5).to(device)
        given = x, y, leaf(lam), torch.randperm(5).to(device), extents(5, (6, 8)).to(device)
        found = fast(*given)
        for a, b in zip(found, step(*given), strict=True):
            assert torch.equal(a, b)
        assert found[0].requires_grad
        assert found[1].requires_grad
    assert programs.frame_count == 1


def test_nothing_waits_for_the_device():
    """On a device whose values the host cannot read."""
    sizes = torch.empty(6, 2, dtype=torch.int64, device=META)
    index = torch.empty(6, dtype=torch.int64, device=META)
    with fastmix.backend("torch"):
        for anchor in ANCHORS:
            m = Mix(torch.empty(6, device=META), index, box=torch.empty(6, 4, dtype=torch.int64, device=META))
            bound = m.within(sizes, anchor=anchor)
            assert bound.apply(torch.empty(6, 3, 8, 8, device=META)).shape == (6, 3, 8, 8)
            assert bound.target(torch.empty(6, dtype=torch.int64, device=META)).weights.shape == (6, 2)
        assert pair_by_size(sizes).shape == (6,)


def test_wrong_extents_that_cannot_be_read_make_their_row_nan(monkeypatch):
    monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
    x, index = torch.randn(4, 6), torch.tensor([1, 0, 3, 2])
    for wrong in (0, 7, -(2**62), 2**62):
        for anchor in ANCHORS:
            sizes = torch.tensor([[wrong], [4], [5], [6]])
            m = Mix(0.5, index).within(sizes, anchor=anchor)
            out = m.apply(x)
            assert out[0].isnan().all()
            assert out[2:].isfinite().all()
            assert m.target_lam[2:].isfinite().all()


def test_empty_batches_and_dimensions():
    none = torch.zeros(0, dtype=torch.int64)
    for anchor in ANCHORS:
        m = Mix(torch.zeros(0), none).within(torch.zeros(0, 2, dtype=torch.int64), anchor=anchor)
        assert m.apply(torch.zeros(0, 3, 4, 5)).shape == (0, 3, 4, 5)
        assert m.target(none).weights.shape == (0, 2)
        channels = Mix(0.5, torch.tensor([1, 0])).within(torch.tensor([[3], [2]]), anchor=anchor, axes=(1,))
        assert channels.apply(torch.zeros(2, 3, 0)).shape == (2, 3, 0)
    assert pair_by_size(torch.zeros(0, 2, dtype=torch.int64)).shape == (0,)


BAD = [
    (lambda m, s: m.within(s.float()), TypeError, "sizes", "an int64 tensor", "float32 tensor"),
    (lambda m, s: m.within(s.int()), TypeError, "sizes", "an int64 tensor", "int32 tensor"),
    (lambda m, s: m.within([[3], [2]]), TypeError, "sizes", "an int64 tensor", "list"),
    (lambda m, s: m.within(s[:, 0]), ValueError, "sizes", r"\[2, d\]", r"shape \[2\]"),
    (lambda m, s: m.within(s[:1]), ValueError, "sizes", r"\[2, d\]", r"shape \[1, 1\]"),
    (lambda m, s: m.within(s.expand(2, 4)), ValueError, "sizes", "d from 1 to 3", r"shape \[2, 4\]"),
    (lambda m, s: m.within(s.to(META)), ValueError, "sizes", "a tensor on cpu", "on meta"),
    (lambda m, s: m.within(s - 2), ValueError, "sizes", "at least 1", "0 in row 1"),
    (lambda m, s: m.within(s + 4).apply(torch.zeros(2, 6)), ValueError, "sizes", "from 1 to 6", "7 in row 0"),
    (lambda m, s: m.apply(torch.zeros(2, 6), sizes=s + 4), ValueError, "sizes", "from 1 to 6", "7 in row 0"),
    (lambda m, s: m.within(s, anchor="end"), ValueError, "anchor", "'start' or 'center'", "'end'"),
    (lambda m, s: m.within(s, anchor=None), ValueError, "anchor", "'start' or 'center'", "None"),
    (lambda m, s: m.within(s, axes=(1, 2)), ValueError, "axes", "1, one for each", r"\(1, 2\)"),
    (lambda m, s: m.within(s, axes=(0,)), ValueError, "axes", "not 0", r"\(0,\)"),
    (lambda m, s: m.within(s, axes=1), TypeError, "axes", "one to three dimensions", "1"),
    (lambda m, s: m.within(s, axes=(3,)).apply(torch.zeros(2, 6)), ValueError, "x", r"dimensions \[3\]", "float32"),
    (lambda m, s: m.within(s).apply(torch.zeros(2)), ValueError, "x", "1 dimensions or more", r"shape \[2\]"),
    (lambda m, s: m.within(s).apply(torch.zeros(3, 6)), ValueError, "x", "2 rows", r"shape \[3, 6\]"),
    (lambda m, s: m.within(s).apply(torch.zeros(2, 6).long()), TypeError, "x", "float", "int64"),
    (lambda m, s: m.within(s).apply(torch.zeros(2, 6), partner=torch.zeros(2, 6)), ValueError, "partner", "None", "float32"),
    (lambda m, s: m.within(s).target(torch.arange(2), partner=torch.arange(2)), ValueError, "partner", "None", "int64"),
    (lambda m, s: m.within(s).at(3), ValueError, "size", "no sizes", r"\(3,\)"),
    (
        lambda m, s: Mix(0.5, m.index, box=torch.zeros(2, 4).long()).within(s),
        ValueError,
        "sizes",
        r"shape \[2, 2\], of the last",
        r"shape \[2, 1\]",
    ),
    (
        lambda m, s: Mix(0.5, m.index, box=torch.zeros(2, 2).long(), axes=(1,)).within(s, axes=(2,)),
        ValueError,
        "sizes",
        r"dimensions \[1\]",
        r"shape \[2, 1\]",
    ),
    (lambda m, s: Mix(None, m.index, mask=torch.zeros(2, 2, 2)).within(s), ValueError, "sizes", r"\[2, 2\]", r"\[2, 1\]"),
    (
        lambda m, s: Mix(None, m.index, mask=torch.zeros(2, 1, 2), plan=torch.zeros(2, 2).long()).within(s.expand(2, 2)),
        ValueError,
        "sizes",
        "None beside plans",
        "int64",
    ),
    (
        lambda m, s: Mix(0.5, m.index, 0.5, box=torch.zeros(2, 2).long()).within(s),
        ValueError,
        "sizes",
        "target_lam of its own",
        "int64",
    ),
    (
        lambda m, s: Mix(None, m.index, mask=torch.zeros(2, 1, 2)).within(s.expand(2, 2)).target_lam,
        ValueError,
        "target_lam",
        "apply",
        "None",
    ),
    (lambda m, s: Mix(0.5, m.index + 1).within(s).target_lam, ValueError, "index", r"\[0, 2\)", "2 in row 0"),
    (lambda m, s: pair_by_size(s.float()), TypeError, "sizes", "an int64 tensor", "float32"),
    (lambda m, s: pair_by_size(s[:, 0]), ValueError, "sizes", r"\[N, d\]", r"shape \[2\]"),
    (lambda m, s: pair_by_size(s - 3), ValueError, "sizes", "at least 1", "0 in row 0"),
    (lambda m, s: pair_by_size(s, 3), TypeError, "generator", "a torch.Generator", "3"),
    (lambda m, s: pair_by_size(s.to(META), torch.Generator()), ValueError, "generator", "on meta", "on cpu"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, *expected = BAD[case]
    refused(lambda: call(Mix(0.5, torch.tensor([1, 0])), torch.tensor([[3], [2]])), *expected)


def cycles(index):
    """Lengths of the cycles of a permutation."""
    left, found = set(range(len(index))), []
    assert set(index) == left
    while left:
        at, n = min(left), 0
        while at in left:
            left.remove(at)
            at, n = index[at], n + 1
        found.append(n)
    return sorted(found)


class TestPairs:
    @pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 8, 33])
    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_cycles(self, N, d):
        index = pair_by_size(torch.randint(1, 9, (N, d)))
        assert index.dtype == torch.int64
        expected = [1] if N == 1 else [2] * ((N - 3 * (N % 2)) // 2) + [3] * (N % 2)
        assert cycles(index.tolist()) == expected

    def test_lengths_in_order(self):
        sizes = torch.randperm(64)[:, None] + 1
        index = pair_by_size(sizes)
        assert torch.equal((sizes[index] - sizes).abs(), torch.ones(64, 1, dtype=torch.int64))

    def test_images_of_one_area_by_aspect_ratio(self):
        """And images of one aspect by their area, as timm pairs the former."""
        heights = torch.tensor([16, 8, 32, 4, 64, 2])
        for other in (128 // heights, heights * 2):
            index = pair_by_size(torch.stack((heights, other), 1))
            assert index.tolist() == [2, 3, 0, 1, 5, 4] or sorted(heights[index].tolist()) == sorted(heights.tolist())
            ratio = torch.maximum(heights, heights[index]) / torch.minimum(heights, heights[index])
            assert torch.equal(ratio, torch.full((6,), 2.0))

    def test_more_of_a_row_is_mixed_than_with_any_partner(self):
        sizes = torch.randint(4, 33, (256, 2))
        index = Mixup(1.0, seed=0).sample(torch.zeros(256, 3, 32, 32)).index
        given, paired = (1 - Mix(0.0, found).within(sizes).target_lam.mean() for found in (index, pair_by_size(sizes)))
        assert paired > given + 0.1

    def test_ties_are_random_and_repeatable(self):
        sizes = torch.tensor([[3, 4]] * 6 + [[30, 4]] * 6)
        drawn = [tuple(pair_by_size(sizes, torch.Generator().manual_seed(seed)).tolist()) for seed in range(40)]
        assert drawn[:3] == [tuple(pair_by_size(sizes, torch.Generator().manual_seed(seed)).tolist()) for seed in range(3)]
        partners = [[index[0] for index in drawn].count(k) for k in range(12)]
        assert min(partners[1:6]) >= 2  # each of five with a chance of 0.2: 0.0015 or so to be found less often
        assert sum(partners[1:6]) == 40
        torch.manual_seed(0)
        first = pair_by_size(sizes)
        torch.manual_seed(0)
        assert torch.equal(first, pair_by_size(sizes))


def test_as_naflex_mixup_of_timm():
    """The corrected share and the mixed pixels of timm's loop over a list, for one lam a batch."""
    if peers.timm_mixup is None:
        pytest.skip("needs timm")
    naflex = pytest.importorskip("timm.data.naflex_mixup", reason="needs timm")

    random.seed(0)
    torch.manual_seed(0)
    images = [torch.randn(3, h, w) for h, w in [(7, 12), (8, 8), (12, 7), (10, 9)]]
    mixed, lams, pairs = naflex.mix_batch_variable_size(images, mixup_alpha=0.8, cutmix_alpha=0.0)
    torch.manual_seed(0)
    [torch.randn(3, h, w) for h, w in [(7, 12), (8, 8), (12, 7), (10, 9)]]
    lam = torch.distributions.Beta(0.8, 0.8).sample().item()
    x = torch.zeros(4, 3, 12, 12)
    for row, image in zip(x, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    sizes = torch.tensor([list(image.shape[1:]) for image in images])
    m = Mix(lam, torch.tensor([pairs[i] for i in range(4)])).within(sizes, anchor="center")
    out = m.apply(x)
    for row, image in zip(out, mixed, strict=True):
        same(row[:, : image.shape[1], : image.shape[2]], image)
    same(m.target_lam, torch.tensor(lams, dtype=torch.float32))


def test_the_page():
    names = {}
    for title in ("In a training loop", "Partners of like extent", "Boxes, masks, bytes"):
        for code in blocks(title, "sizes.md"):
            exec(code, names)
    assert names["loss"].isfinite()
    assert names["hidden"].shape == (5, 12, 16)
    assert names["batch"].shape == (4, 3, 32, 32)
