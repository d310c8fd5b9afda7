"""fastmix.resize_mix on every backend against the oracle, and against torch.nn.functional.interpolate."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import dtypes, given, seeds, st
from numerics import FLOATS, assert_close, numpy

import fastmix
from fastmix import Mix, reference


def drawn(shape, dtype=torch.float32, device="cpu", layout=torch.contiguous_format):
    """Boxes of any kind: cut off at a border, wholly outside, empty, the whole image."""
    N, (H, W) = shape[0], shape[-2:]
    start = torch.stack((torch.randint(-2, H + 1, (N,)), torch.randint(-2, W + 1, (N,))), 1)
    box = torch.cat((start, start + torch.stack((torch.randint(0, H + 3, (N,)), torch.randint(0, W + 3, (N,))), 1)), 1)
    x, g = (torch.randn(shape).to(dtype).contiguous(memory_format=layout).to(device) for _ in range(2))
    return (
        x.requires_grad_(),
        torch.randint(0, N, (N,)).to(device) if N else torch.zeros(0, dtype=torch.int64, device=device),
        box.to(device),
        g,
    )


def check(x, index, box, g):
    out = fastmix.resize_mix(x, index, box)
    assert out.stride() == x.stride()
    assert_close(out, reference.resize_mix(numpy(x), numpy(index), numpy(box)), x.dtype)
    (dx,) = torch.autograd.grad(out, x, g)
    terms = reference.resize_mix_grad(np.abs(numpy(g)), numpy(index), numpy(box))
    assert_close(dx, reference.resize_mix_grad(numpy(g), numpy(index), numpy(box)), x.dtype, scale=np.max(terms, initial=0.0))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 3, 8, 8), torch.contiguous_format),
        ((5, 3, 8, 16), torch.channels_last),
        ((3, 2, 7, 5), torch.contiguous_format),
        ((2, 1, 1), torch.contiguous_format),
        ((3, 6, 40), torch.contiguous_format),
        ((1, 2, 3, 4, 6), torch.contiguous_format),
        ((0, 3, 4, 4), torch.contiguous_format),
        ((2, 0, 4, 4), torch.contiguous_format),
    ],
    ids=str,
)
@pytest.mark.thinned(3)
def test_values_and_gradients(device, shape, layout, dtype):
    check(*drawn(shape, dtype, device, layout))


@given(seed=seeds, dtype=dtypes, rows=st.integers(1, 5), sides=st.tuples(st.integers(1, 17), st.integers(1, 17)))
def test_any_size(device, seed, dtype, rows, sides):
    torch.manual_seed(seed)
    check(*drawn((rows, 2, *sides), dtype, device))


def test_as_interpolate(device):
    x = torch.randn(3, 2, 12, 10, dtype=torch.float64, device=device)
    box = torch.tensor([[2, 1, 9, 8], [0, 0, 12, 10], [-3, 4, 5, 20]], device=device)
    index = torch.tensor([1, 2, 0], device=device)
    out = fastmix.resize_mix(x, index, box)
    for i, (y0, x0, y1, x1) in enumerate(((2, 1, 9, 8), (0, 0, 12, 10), (0, 4, 5, 10))):
        expected = x[i].clone()
        resized = F.interpolate(x[index[i] : index[i] + 1], (y1 - y0, x1 - x0), mode="bilinear", align_corners=False)
        expected[:, y0:y1, x0:x1] = resized[0]
        torch.testing.assert_close(out[i], expected)


def test_strided_inputs_and_narrow_boxes(device):
    x, index, box, g = drawn((4, 3, 6, 10), device=device)
    wide = torch.stack((x.detach(), x.detach()), -1)[..., 0].requires_grad_()
    assert not wide.is_contiguous()
    torch.testing.assert_close(
        fastmix.resize_mix(wide, index, box.to(torch.int32)), fastmix.resize_mix(x, index, box), rtol=0, atol=0
    )
    expanded = x.detach()[:1].expand(4, -1, -1, -1)
    out = fastmix.resize_mix(expanded, index, box)
    assert_close(out, reference.resize_mix(numpy(expanded), numpy(index), numpy(box)), x.dtype)
    (dx,) = torch.autograd.grad(fastmix.resize_mix(x, index, box), x, g[:, :, :1, :1].expand(g.shape))
    expected = reference.resize_mix_grad(numpy(g[:, :, :1, :1].expand(g.shape)), numpy(index), numpy(box))
    assert_close(dx, expected, x.dtype, scale=np.abs(expected).max() + 1)


@pytest.mark.slow_interpreted
def test_the_same_bits_every_time_and_no_sum_without_order(device):
    x, index, box, g = drawn((6, 3, 9, 9), device=device)
    index = torch.zeros_like(index)  # all rows send to one
    first, again = (torch.autograd.grad(fastmix.resize_mix(x, index, box), x, g)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_what_has_no_weight_is_not_read(device):
    x = torch.zeros(2, 1, 4, 4, device=device)
    x[0, 0, :2] = float("inf")  # under the box
    x[1, 0, 0, 3] = float("nan")  # beyond the box of row 1, which is whole and has weights of 1 and 0
    box = torch.tensor([[0, 0, 2, 4], [0, 0, 4, 4]], device=device)
    out = fastmix.resize_mix(x, torch.tensor([0, 0], device=device), box)
    assert torch.equal(out[1], x[0])
    out = fastmix.resize_mix(x, torch.tensor([1, 1], device=device), torch.tensor([[0, 0, 2, 3], [0, 0, 0, 0]], device=device))
    assert out[0, 0, 1].isfinite().tolist() == [True, True, True, False]
    assert torch.equal(out[1].nan_to_num(7), x[1].nan_to_num(7))


@pytest.mark.slow
def test_second_derivatives_and_transforms():
    x, index, box, _ = drawn((3, 2, 5, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda x: fastmix.resize_mix(x, index, box), x)
    assert torch.autograd.gradgradcheck(lambda x: fastmix.resize_mix(x, index, box), x)
    tangent = torch.randn_like(x)
    _, moved = torch.func.jvp(lambda x: fastmix.resize_mix(x, index, box), (x.detach(),), (tangent,))
    torch.testing.assert_close(moved, fastmix.resize_mix(tangent, index, box))


@pytest.mark.no_poison
def test_compiled(device):
    x, index, box, g = drawn((3, 2, 8, 8), device=device)
    step = torch.compile(lambda x: fastmix.resize_mix(x, index, box).sin(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(x), fastmix.resize_mix(x, index, box).sin())
    expected = torch.autograd.grad(fastmix.resize_mix(x, index, box).sin(), x, g)
    torch.testing.assert_close(torch.autograd.grad(step(x), x, g), expected)


def test_partners_out_of_range(device):
    x, _, box, _ = drawn((2, 1, 4, 4), device=device)
    index = torch.tensor([5, 0], device=device)
    if x.is_cpu:
        with pytest.raises(ValueError, match=r"index: expected a partner in \[0, 2\), got 5 in row 0"):
            fastmix.resize_mix(x, index, box)
    else:
        out = fastmix.resize_mix(x, index, box)
        assert bool(out[0].isnan().all())
        assert bool(out[1].isfinite().all())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": torch.zeros(2, 4)}, ValueError, r"x: expected shape \[N, ..., H, W\]"),
        ({"x": torch.zeros(2, 4, 4, dtype=torch.int64)}, TypeError, "x: expected a float16"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"index: expected shape \[2\]"),
        ({"box": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"box: expected shape \[2, 4\]"),
        ({"box": torch.zeros(2, 4)}, TypeError, "box: expected an int32 or int64 tensor"),
    ],
)
def test_errors(change, kind, words):
    arguments = {
        "x": torch.zeros(2, 4, 4),
        "index": torch.zeros(2, dtype=torch.int64),
        "box": torch.zeros(2, 4, dtype=torch.int64),
    }
    with pytest.raises(kind, match=words):
        fastmix.resize_mix(**{**arguments, **change})


# In a Mix


def test_a_mix_made_by_hand(device):
    x, index, box, _ = drawn((4, 2, 6, 8), device=device)
    mix = Mix(None, index, box=box, resize=True)
    assert torch.equal(mix.apply(x), fastmix.resize_mix(x, index, box))
    assert torch.equal(mix.lam, torch.ones(4, device=device))
    covered = [
        (min(y1, 6) - max(y0, 0)) * (min(x1, 8) - max(x0, 0)) if y1 > max(y0, 0) and x1 > max(x0, 0) else 0
        for y0, x0, y1, x1 in box.tolist()
    ]
    torch.testing.assert_close(mix.target_lam.cpu(), 1 - torch.tensor(covered).clamp(min=0) / 48)
    assert "resize=True" in repr(mix)
    again = mix.to(device)
    assert torch.equal(again.apply(x), mix.apply(x))
    assert again.resize


def test_another_batchs_rows_are_partners(device):
    x, index, box, _ = drawn((4, 2, 6, 8), device=device)
    other = torch.randn_like(x)
    mix = Mix(None, index, box=box, resize=True)
    expected = torch.stack([fastmix.resize_mix(torch.stack(pair), torch.tensor([1, 0], device=device), box[i].expand(2, 4))[0]
                            for i, pair in enumerate(zip(x.detach(), other, strict=True))])  # fmt: skip
    torch.testing.assert_close(mix.apply(x, partner=other), expected)
    y, y2 = torch.randint(0, 9, (4,), device=device), torch.randint(0, 9, (4,), device=device)
    assert torch.equal(mix.target(y, partner=y2).classes, torch.stack((y, y2), 1))


def test_label_maps_are_resized_to_the_nearest(device):
    x, index, box, _ = drawn((5, 1, 7, 9), device=device)
    y = torch.randint(0, 99, (5, 7, 9), device=device)
    mix = Mix(None, index, box=box, resize=True)
    mix.apply(x)
    hard = mix.target(y).argmax()
    expected = y.clone()
    for i in range(5):
        y0, x0, y1, x1 = box[i].tolist()
        y0, x0, y1, x1 = max(y0, 0), max(x0, 0), min(y1, 7), min(x1, 9)
        if y0 < y1 and x0 < x1:
            partner = y[index[i]][None, None].double()
            expected[i, y0:y1, x0:x1] = F.interpolate(partner, (y1 - y0, x1 - x0), mode="nearest-exact")[0, 0].long()
    assert torch.equal(hard, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": 1.0}, "lam: expected None beside resize=True"),
        ({"box": None}, r"box: expected shape \[2, 4\]"),
        ({"box": torch.zeros(2, 2, dtype=torch.int64)}, r"box: expected shape \[2, 4\]"),
        ({"resize": 1}, "resize: expected a bool"),
    ],
)
def test_a_mix_that_cannot_be(options, words):
    arguments = {"lam": None, "index": torch.tensor([1, 0]), "box": torch.zeros(2, 4, dtype=torch.int64), "resize": True}
    with pytest.raises((TypeError, ValueError), match=words):
        Mix(**{**arguments, **options})
