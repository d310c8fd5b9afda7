"""fastmix.mix on every backend against the oracle: values, gradients to x and to lambda, layouts, hostile inputs."""

import itertools

import numpy as np
import pytest
import torch
from drawn import (
    INFINITE,
    LAYOUTS,
    NAN,
    batches,
    boxes_of,
    coefficients,
    dtypes,
    generator,
    given,
    layout_pairs,
    partners,
    partners_of,
    run,
    seeds,
    st,
)
from memory import SENTINEL, Memory, guarded_allocations, is_torch, same_bits, stored_otherwise
from numerics import FLOATS, LAMBDA, RELATIVE, accumulator, assert_close, finite, numpy
from plain import interpreted

import fastmix
from fastmix import reference

SHAPES = [(5, 3, 7, 9), (4, 2, 8, 8), (6, 13), (7,), (3, 2, 4, 5, 6), (1, 3, 4, 4), (2, 5000), (0, 3, 4, 4), (4, 0), (3, 1, 1)]


def batch(shape, dtype, device, box_dims=0):
    """x, lam with both ends, an index with repeated partners, boxes that reach outside, upstream."""
    N = shape[0]
    lam = torch.rand(N, dtype=accumulator(dtype))
    lam[:1], lam[2:3] = 0, 1
    index = torch.randint(0, max(N, 1), (N,))
    box = torch.randint(-1, 8, (N, 2 * box_dims)) if box_dims else None
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return [t if t is None else t.to(device) for t in (x, lam, index, box, g)]


def check(x, lam, index, box, g):
    """One forward and backward against the oracle."""
    x, lam = x.detach().requires_grad_(), lam.detach().requires_grad_()
    before = x.detach().clone(), lam.detach().clone()
    out = fastmix.mix(x, lam, index, box=box)
    out.backward(g)
    arguments = numpy(x), numpy(lam), numpy(index), None if box is None else numpy(box)
    dx, dlam = reference.mix_grad(numpy(g), *arguments)
    row = tuple(range(1, x.dim()))
    assert_close(
        out, reference.mix(*arguments), x.dtype, np.abs(numpy(x)).max(initial=0) * (1 + np.abs(numpy(lam)).max(initial=0))
    )
    assert_close(x.grad, dx, x.dtype, np.abs(numpy(g)).sum(axis=0, keepdims=True) if len(x) else None)
    gap = np.abs(numpy(g) * (arguments[0] - arguments[0][arguments[2]])).sum(axis=row)
    terms = gap if lam.dim() else gap.sum()
    error = np.abs(numpy(lam.grad) - (dlam if lam.dim() else dlam.sum()))
    assert lam.grad.dtype == lam.dtype
    assert np.all(error <= LAMBDA[x.dtype] * terms)
    assert torch.equal(x, before[0])
    assert torch.equal(lam, before[1])
    return out


@pytest.mark.thinned(3)
@pytest.mark.trap("pytorch-image-models#50", "cleverhans#700")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape, dtype, device):
    check(*batch(shape, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "dims"),
    [((4, 2, 9, 7), 2), ((5, 3, 11), 1), ((5, 11), 1), ((3, 2, 4, 5, 6), 3), ((3, 6, 7), 2), ((0, 1, 4, 4), 2)],
)
def test_boxes(shape, dims, dtype, device):
    check(*batch(shape, dtype, device, dims))


@pytest.mark.parametrize("boxes", [0, 2])
def test_channels_last_and_other_dense_layouts_are_kept(boxes, device):
    x, lam, index, box, g = batch((4, 3, 6, 5), torch.float32, device, boxes)
    for layout in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),  # rows inside
        lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),  # rows innermost
        lambda t: t.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
    ):
        laid = layout(x)
        assert check(laid, lam, index, box, layout(g)).stride() == laid.stride()
        check(laid, lam, index, box, g)  # upstream in another layout


def test_dense_layouts_are_not_copied(device):
    """Whatever the layout, as much memory as the result is asked for, and no more."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, 3, 64, 64, device=device).contiguous(memory_format=layout)
        lam, index = torch.rand(4, device=device), torch.randperm(4, device=device)
        out = torch.empty_like(x)
        fastmix.mix(x, lam, index, out=out)
        assert torch.equal(out, fastmix.mix(x, lam, index))


@pytest.mark.parametrize("boxes", [0, 2])
def test_strided_and_expanded_inputs(boxes, device):
    x, lam, index, box, g = batch((4, 3, 6, 5), torch.float32, device, boxes)
    wide = torch.randn(8, 6, 9, 11, device=device)
    for sliced in (
        wide[::2, :3, :6, :5],
        wide[:4, ::2, 1:7, 3:8],
        wide[4:, 3:, :6, ::2][..., :5],
        wide[:4, :3].flip(2)[:, :, :6, :5],
    ):
        check(sliced, lam, index, box, g)
    check(x[:1].expand(4, 3, 6, 5), lam, index, box, g)
    check(x[:, :1].expand(4, 3, 6, 5), lam, index, box, g)
    check(x, lam, index, box, g[:1, :1, :1, :1].expand(4, 3, 6, 5))
    check(x, lam[:1].expand(4), index, box, g)
    pairs = torch.stack((index, index.flip(0)), 1)
    check(x, torch.stack((lam, lam), 1)[:, 1], pairs[:, 0], box, g)
    check(x, lam, index[2:3].expand(4), box, g)
    check(
        x.view(-1)[1:].view(-1)[: 3 * 3 * 6 * 5].view(3, 3, 6, 5), lam[:3], torch.tensor([2, 2, 0], device=device), None, g[:3]
    )


def test_lambda_as_number_and_scalar(device):
    x, _, index, _, g = batch((5, 4, 3), torch.float32, device)
    for lam in (0.3, 1, 0.0, -0.5, 1.7):
        assert_close(fastmix.mix(x, lam, index), reference.mix(numpy(x), lam, numpy(index)), x.dtype, 10.0)
    check(x, torch.tensor(0.3, device=device), index, None, g)
    check(x, torch.tensor([-0.5, 1.7, 0, 1, 0.2], device=device), index, None, g)
    lam = torch.tensor(0.3, dtype=torch.float64)  # a host scalar, as lambda is often drawn
    assert_close(fastmix.mix(x, lam, index), reference.mix(numpy(x), np.float32(0.3), numpy(index)), x.dtype)


@pytest.mark.trap("pytorch-image-models#50")
def test_exact_at_the_ends_whatever_the_other_row_holds(device):
    """lam 0 and 1 copy; what has weight 0 is not looked at (timm and mixup-cifar10 give NaN here)."""
    x = torch.tensor([[1.5, -0.0], [float("inf"), float("nan")], [3e38, -3e38]], device=device)
    index = torch.tensor([1, 0, 1], device=device)
    out = fastmix.mix(x, torch.tensor([1.0, 0.0, 1.0], device=device), index)
    assert torch.equal(out.view(torch.int32), x[[0, 0, 2]].view(torch.int32))  # bit for bit, the sign of zero too
    box = torch.tensor([[0, 0], [0, 2], [0, 1]], device=device)
    out = fastmix.mix(x, 1.0, torch.tensor([1, 0, 0], device=device), box=box)
    assert torch.equal(out, torch.tensor([[1.5, -0.0], [1.5, -0.0], [1.5, -3e38]], device=device))
    g = torch.tensor([[1.0, 2.0], [float("inf"), float("nan")], [1.0, 1.0]], device=device)
    x = torch.randn(3, 2, device=device, requires_grad=True)
    fastmix.mix(x, torch.tensor([1.0, 0.0, 1.0], device=device), torch.tensor([1, 2, 1], device=device)).backward(g)
    assert torch.isfinite(x.grad[:2]).all()
    assert not torch.isfinite(x.grad[2]).any()


def test_no_overflow_between_huge_rows(device):
    x = torch.tensor([[3e38], [-3e38]], device=device)
    out = fastmix.mix(x, 0.5, torch.tensor([1, 0], device=device))
    assert torch.equal(out, torch.zeros(2, 1, device=device))


@pytest.mark.trap("flash-linear-attention#1080")
def test_rows_far_apart(device):
    """Strides times indices beyond 32 bits, without touching the memory between."""
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)
    x = torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, (2, 16), (2**31 + 16, 1))
    x[0], x[1] = 1, 3
    out = fastmix.mix(x, torch.tensor([0.5, 0.25], device=device), torch.tensor([1, 0], device=device))
    assert out.tolist() == [[2.0] * 16, [1.5] * 16]
    loss = fastmix.soft_cross_entropy(x, torch.tensor([3, 4], device=device), reduction="none")
    torch.testing.assert_close(loss, torch.full((2,), 16.0, device=device).log())


def test_boxes_over_nothing(device):
    for shape, dims in (((4, 3, 0, 5), 2), ((4, 0), 1)):
        x = torch.rand(shape, device=device, requires_grad=True)
        lam = torch.rand(4, device=device, requires_grad=True)
        box = torch.zeros(4, 2 * dims, dtype=torch.int64, device=device)
        fastmix.mix(x, lam, torch.arange(4, device=device), box=box).sum().backward()
        assert torch.equal(lam.grad, torch.zeros(4, device=device))


def test_batched_backward(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    out = fastmix.mix(x, 0.25, torch.tensor([1, 1, 0], device=device))
    (rows,) = torch.autograd.grad(out, x, torch.eye(12, device=device).view(12, 3, 4), is_grads_batched=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: 0.25 * x + 0.75 * x[[1, 1, 0]], x.detach())
    torch.testing.assert_close(rows.view(3, 4, 3, 4), jacobian)


def test_same_partner_for_all_rows(device):
    x, lam, _, _, g = batch((9, 40), torch.float32, device)
    check(x, lam, torch.full((9,), 3, device=device), None, g)


def test_same_input_same_bits(device):
    x, lam, index, box, g = batch((16, 3, 16, 16), torch.float32, device, 2)
    x.requires_grad_()
    lam.requires_grad_()
    first, second = (torch.autograd.grad(fastmix.mix(x, lam, index, box=box), (x, lam), g) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits_however_a_batch_is_stored(device, dtype):
    """One product is rounded and the other added to it: compilers left to themselves round either, layout by layout."""

    def mixed(x, lam, index, box, g):
        x = x.detach().requires_grad_()
        out = fastmix.mix(x, lam, index, box=box)
        return out.detach(), *torch.autograd.grad(out, x, g)

    shapes = [(8, 3, 12, 12), (6, 5, 40, 33), (4, 2, 96, 90)]  # the CPU has three ways of mixing them
    for shape, dims in itertools.product(shapes if is_torch(device) else shapes[:1], (0, 2)):
        x, lam, _, box, g = batch(shape, dtype, device, dims)
        lam[3] = 1.25
        index = torch.arange(len(x), device=device) ^ 1
        expected = mixed(x, lam, index, box, g)
        for how, stored in stored_otherwise(x).items():
            for a, b in zip(mixed(stored, lam, index, box, g), expected, strict=True):
                assert same_bits(a, b), (how, shape, dims)
        pair = mixed(x[:2], lam[:2], index[:2], None if box is None else box[:2], g[:2])[0]
        assert same_bits(pair, expected[0][:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_row_is_added_to_the_rounded_partner(dtype):
    """fma(lam, x, (1-lam)*y) on a CPU that has an FMA, as in the kernels."""
    for shape in [(2, 300), (2, 20000), (2, 3, 80, 90)]:
        x = batch(shape, dtype, "cpu")[0]
        lam = torch.tensor([0.3, 0.7], dtype=dtype)
        weights = lam.view(-1, *[1] * (x.dim() - 1))
        assert same_bits(fastmix.mix(x, lam, torch.tensor([1, 0])), torch.addcmul((1 - weights) * x.flip(0), x, weights))


def test_only_lambda_needs_a_gradient(device):
    x, lam, index, _, g = batch((4, 33), torch.float32, device)
    lam.requires_grad_()
    fastmix.mix(x, lam, index).backward(g)
    dlam = reference.mix_grad(numpy(g), numpy(x), numpy(lam), numpy(index))[1]
    np.testing.assert_allclose(numpy(lam.grad), dlam, rtol=1e-4, atol=1e-5)


def test_second_derivatives(device):
    """A backward that launches a kernel would return silently wrong second derivatives."""
    x, lam, index, box, _ = batch((4, 2, 3, 4), torch.float64, device, 2)
    x.requires_grad_()
    lam.requires_grad_()

    def op(x, lam):
        return fastmix.mix(x, lam, index, box=box)

    fast = interpreted(device)
    assert torch.autograd.gradcheck(op, (x, lam), fast_mode=fast)
    assert torch.autograd.gradgradcheck(op, (x, lam), fast_mode=fast)
    dx = torch.autograd.grad((op(x, lam) ** 3).sum(), x, create_graph=True)[0]
    ours = torch.autograd.grad(dx.square().sum(), (x, lam))

    def plain(x, lam):
        rows = torch.arange(4, device=device)
        own = lam.view(-1, 1, 1, 1).expand_as(x).clone()
        for i in rows.tolist():
            y0, x0, y1, x1 = box[i].clamp(min=0).tolist()
            own[i, :, y0:y1, x0:x1] = 0
        return own * x + (1 - own) * x[index]

    dx = torch.autograd.grad((plain(x, lam) ** 3).sum(), x, create_graph=True)[0]
    for a, b in zip(ours, torch.autograd.grad(dx.square().sum(), (x, lam)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.trap("no-tangent")
def test_function_transforms(device):
    x, lam, index, _, _ = batch((4, 6), torch.float64, device)

    def loss(x, lam):
        return fastmix.mix(x, lam, index).square().sum()

    x_grad, lam_grad = torch.func.grad(loss, (0, 1))(x, lam)
    xs, lams = x.clone().requires_grad_(), lam.clone().requires_grad_()
    expected = torch.autograd.grad(loss(xs, lams), (xs, lams))
    torch.testing.assert_close((x_grad, lam_grad), expected)
    _, tangent = torch.func.jvp(lambda lam: fastmix.mix(x, lam, index), (lam,), (torch.ones_like(lam),))
    torch.testing.assert_close(tangent, x - x[index])
    many = torch.func.vmap(lambda lam: fastmix.mix(x, lam, index))(torch.stack((lam, 1 - lam)))
    torch.testing.assert_close(many[0], fastmix.mix(x, lam, index))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(lam, torch.ones_like(lam))
        tangent = torch.autograd.forward_ad.unpack_dual(fastmix.mix(x, dual, index)).tangent
    torch.testing.assert_close(tangent, x - x[index])


class TestOut:
    @pytest.mark.trap("Liger-Kernel#1251")
    def test_is_written_and_returned(self, device):
        x, lam, index, box, _ = batch((4, 3, 6, 5), torch.bfloat16, device, 2)
        expected = fastmix.mix(x, lam, index, box=box)
        for out in (
            torch.empty_like(x),
            torch.empty_like(x, memory_format=torch.channels_last),
            torch.empty(4, 3, 6, 10, dtype=x.dtype, device=device)[..., ::2],
            torch.empty(8, 3, 6, 5, dtype=x.dtype, device=device)[::2],
        ):
            version = out._version
            assert fastmix.mix(x, lam, index, box=box, out=out) is out
            assert torch.equal(out, expected)
            assert out._version > version

    @pytest.mark.trap("reads-outside-storage")
    def test_writes_nothing_outside_its_output(self, device):
        x, lam, index, _, _ = batch((3, 1023), torch.float32, device)
        room = torch.full((3 * 1023 + 64,), 7.0, device=device)
        fastmix.mix(x, lam, index, out=room[32:-32].view(3, 1023))
        assert (room[:32] == 7).all()
        assert (room[-32:] == 7).all()

    @pytest.mark.trap("pytorch-image-models#50")
    def test_misuse(self, device):
        x, lam, index, _, _ = batch((4, 6), torch.float32, device)
        for out, kind, words in [
            (x, ValueError, "overlaps"),
            (torch.empty(8, 6, device=device)[0].expand(4, 6), ValueError, "overlaps itself"),
            (torch.empty(64, device=device).as_strided((4, 6), (2, 1)), ValueError, "overlaps itself"),
            (torch.empty(24, device=device).copy_(x.view(-1)).view(4, 6), None, None),
            (torch.empty(4, 5, device=device), ValueError, r"shape \[4, 6\]"),
            (torch.empty(4, 6, dtype=torch.float64, device=device), TypeError, "float32"),
            ("out", TypeError, "'out'"),
        ]:
            if kind is None:
                fastmix.mix(x, lam, index, out=out)
                continue
            with pytest.raises(kind, match=words):
                fastmix.mix(x, lam, index, out=out)
        shared = torch.zeros(24, device=device)
        with pytest.raises(ValueError, match="overlaps lam"):
            fastmix.mix(x, shared[:4], index, out=shared.view(4, 6))
        with pytest.raises(ValueError, match="requires grad"):
            fastmix.mix(x.requires_grad_(), lam, index, out=torch.empty(4, 6, device=device))
        with torch.no_grad():
            fastmix.mix(x, lam, index, out=torch.empty(4, 6, device=device))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a float16"),
        ({"x": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "x: .*int64"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[N, ...\]"),
        ({"lam": "0.5"}, TypeError, "lam: expected a float"),
        ({"lam": True}, TypeError, "lam"),
        ({"lam": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "lam: .*bfloat16"),
        ({"lam": torch.zeros(3)}, ValueError, r"lam: .*shape \[4\], got .*\[3\]"),
        ({"lam": torch.zeros(4, 1)}, ValueError, "lam"),
        ({"index": torch.zeros(4)}, TypeError, "index: expected an int64"),
        ({"index": [0, 1, 2, 3]}, TypeError, "index"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, ValueError, r"index: expected shape \[4\], got .*\[5\]"),
        ({"index": torch.tensor([0, 1, 4, 2])}, ValueError, r"index: expected a partner in \[0, 4\), got 4 in row 2"),
        ({"index": torch.tensor([0, -1, 3, 2])}, ValueError, "got -1 in row 1"),
        ({"box": torch.zeros(4, 2)}, TypeError, "box: expected an int32 or int64"),
        ({"box": torch.zeros(4, 3, dtype=torch.int64)}, ValueError, r"box: expected shape \[4, 2\]"),
        ({"box": torch.zeros(4, 4, dtype=torch.int64)}, ValueError, "box"),
        ({"box": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "box"),
        ({"x": None}, TypeError, "x: .*NoneType"),
        ({"x": np.zeros((1, 6))}, TypeError, "x: .*ndarray"),
        ({"x": torch.zeros(4, 6) + 0j}, TypeError, "x: .*complex64"),
        ({"x": torch.zeros(4, 6).to(torch.float8_e4m3fn)}, TypeError, "x: .*float8_e4m3fn"),
        ({"x": torch.zeros(4, 6).to_sparse()}, TypeError, r"x: expected a dense \(strided\) tensor"),
        ({"x": torch.zeros(4, 6, device="meta")}, ValueError, "lam: expected a tensor on meta, got .*cpu"),
        ({"lam": None}, TypeError, "lam: .*NoneType"),
        ({"lam": [0.0] * 4}, TypeError, "lam: .*list"),
        ({"lam": np.zeros(4)}, TypeError, "lam: .*ndarray"),
        ({"lam": 0.5j}, TypeError, "lam: .*complex"),
        ({"lam": torch.tensor(1)}, TypeError, "lam: .*int64"),
        ({"lam": torch.zeros(4).to_sparse()}, TypeError, "lam: .*(dense|sparse)"),
        ({"lam": torch.zeros(4, device="meta")}, ValueError, "lam: expected a tensor on cpu, got .*meta"),
        ({"lam": torch.tensor(0.5, device="meta")}, ValueError, "lam: expected a tensor on cpu, got .*meta"),
        ({"index": np.arange(4)}, TypeError, "index: .*ndarray"),
        ({"index": torch.arange(4, dtype=torch.int32)}, TypeError, "index: .*int32"),
        ({"index": torch.tensor(1)}, ValueError, r"index: expected shape \[4\], got .*\[\]"),
        ({"index": torch.arange(4).to_sparse()}, TypeError, "index: .*(dense|sparse)"),
        ({"index": torch.arange(4, device="meta")}, ValueError, "index: expected a tensor on cpu, got .*meta"),
        ({"index": torch.tensor([0, 1, 2**62, 3])}, ValueError, "index: .*got 4611686018427387904 in row 2"),
        ({"box": [[0, 0]] * 4}, TypeError, "box: .*list"),
        ({"box": torch.zeros(4, 2, dtype=torch.int16)}, TypeError, "box: .*int16"),
        ({"box": torch.zeros(4, 2, dtype=torch.int64).to_sparse()}, TypeError, "box: .*(dense|sparse)"),
        ({"box": torch.zeros(4, 2, dtype=torch.int64, device="meta")}, ValueError, "box: expected a tensor on cpu, got .*meta"),
    ],
    ids=str,
)
def test_bad_input(change, kind, words):
    arguments = {"x": torch.zeros(4, 6), "lam": torch.zeros(4), "index": torch.arange(4), "box": None, **change}
    with pytest.raises(kind, match=words):
        fastmix.mix(arguments["x"], arguments["lam"], arguments["index"], box=arguments["box"])


@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_wrong_partner_on_a_device_that_is_not_read(device, monkeypatch):
    """Where the host does not look, a wrong partner makes its row NaN and reads nothing out of bounds."""
    monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
    x = torch.randn(4, 5, device=device, requires_grad=True)
    lam = torch.tensor([0.5, 1.0, 0.5, 0.5], device=device, requires_grad=True)
    out = fastmix.mix(x, lam, torch.tensor([1, 9, -1, 0], device=device))
    assert torch.isnan(out[1:3]).all()
    assert torch.isfinite(out[[0, 3]]).all()
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(torch.isnan(lam.grad), torch.tensor([False, True, True, False], device=device))


@pytest.mark.no_poison
def test_compiles_without_a_graph_break():
    x, lam, index, _, _ = batch((4, 6), torch.float32, "cpu")
    compiled = torch.compile(lambda x, lam: fastmix.mix(x, lam, index), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, lam), fastmix.mix(x, lam, index))


@pytest.mark.trap("flash-linear-attention#1080")
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_beyond_32_bit_offsets(device):
    x = torch.empty(5, 2**29 + 3, dtype=torch.bfloat16, device=device).normal_()
    out = fastmix.mix(x, 0.25, torch.tensor([4, 3, 2, 1, 0], device=device))
    assert torch.equal(out[4, -9:], (0.25 * x[4, -9:].float() + 0.75 * x[0, -9:].float()).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_no_host_synchronisation(device):
    x, lam, index, box, g = batch((4, 3, 6, 5), torch.float32, device, 2)
    x.requires_grad_()
    lam.requires_grad_()
    fastmix.mix(x, lam, index, box=box).backward(g)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastmix.mix(x, lam, index, box=box).backward(g)
        fastmix.mix(x, 0.5, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Properties on drawn inputs


def mix_and_gradients(x, lam, index, box, g):
    x, lam = x.detach().requires_grad_(), lam.detach().requires_grad_()
    out = fastmix.mix(x, lam, index, box=box)
    return out.detach(), *torch.autograd.grad(out, (x, lam), g)


def check_mixed(x, lam, index, box, g, out, dx, dlam):
    """Values and gradients against the oracle."""
    arguments = numpy(x), numpy(lam), numpy(index), None if box is None else numpy(box)
    size = 1 + np.abs(arguments[1]).max(initial=0)
    row = tuple(range(1, x.dim()))
    scale = np.abs(finite(arguments[0])).max(initial=0) * 2 * size
    assert_close(out, reference.mix(*arguments), x.dtype, scale)
    expected_dx, expected_dlam = reference.mix_grad(numpy(g), *arguments)
    terms = np.abs(finite(numpy(g) * (arguments[0] - arguments[0][arguments[2]]))).sum(axis=row)
    assert_close(dx, expected_dx, x.dtype, np.abs(finite(numpy(g))).sum(axis=0, keepdims=True) * size)
    if lam.dim() == 0:
        expected_dlam, terms = expected_dlam.sum(), terms.sum()
    accurate = accumulator(x.dtype)
    assert dlam.dtype == lam.dtype
    assert_close(dlam, expected_dlam, accurate, terms, factor=LAMBDA[x.dtype] / RELATIVE[accurate])


def drawn_batch(shape, dtype, seed, partner="any", dims=0):
    """x, lam, index, box, upstream gradient."""
    rng = generator(seed)
    x, g = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    return x, coefficients(shape[0], dtype, rng), partners_of(partner, shape[0], rng), boxes_of(dims, shape, rng), g


@given(
    shape=batches,
    dtype=dtypes,
    seed=seeds,
    partner=partners,
    dims=st.sampled_from([0, 2, 1, 3]),
    scalar=st.booleans(),
    places=layout_pairs,
    row_layout=st.sampled_from(["dense", "misaligned", "every second", "expanded rows"]),
    small_boxes=st.booleans(),
)
def test_mix_is_the_oracles_in_any_memory(device, shape, dtype, seed, partner, dims, scalar, places, row_layout, small_boxes):
    x, lam, index, box, g = drawn_batch(shape, dtype, seed, partner, dims)
    if scalar:
        lam = coefficients(1, dtype, generator(seed))[0]
    if box is not None and small_boxes:
        box = box.to(torch.int32)
    placed, (out, dx, dlam) = run(
        mix_and_gradients,
        device,
        *((x, places[0]), (lam, row_layout), (index, row_layout), (box, row_layout), (g, places[1])),
    )
    check_mixed(*placed, out, dx, dlam)
    if places[0] in ("dense", "misaligned", "transposed", "channels last") and out.numel():
        kept = [[t.stride(d) for d in range(t.dim()) if t.shape[d] > 1] for t in (out, placed[0])]
        assert kept[0] == kept[1]  # dense layouts


@given(shape=batches, dtype=dtypes, seed=seeds, partner=partners, dims=st.integers(0, 3))
def test_rows_of_a_mix_may_come_in_any_order(device, shape, dtype, seed, partner, dims):
    x, lam, index, box, g = (None if t is None else t.to(device) for t in drawn_batch(shape, dtype, seed, partner, dims))
    order = torch.randperm(shape[0], generator=generator(seed)).to(device)
    place = order.argsort()
    permuted = mix_and_gradients(x[order], lam[order], place[index[order]], None if box is None else box[order], g[order])
    size = 1 + np.abs(numpy(lam)).max(initial=0)
    bounds = np.abs(numpy(x)).max(initial=0) * size, np.abs(numpy(g)).sum(axis=0, keepdims=True) * size
    out, dx, dlam = (t[order] for t in mix_and_gradients(x, lam, index, box, g))
    assert_close(permuted[0], numpy(out), dtype, bounds[0])
    assert_close(permuted[1], numpy(dx), dtype, bounds[1], factor=2)
    terms = np.abs(numpy(g) * numpy(x - x[index])).sum(axis=tuple(range(1, x.dim())))[numpy(order)]
    assert_close(permuted[2], numpy(dlam), accumulator(dtype), terms, factor=10)


@given(shape=batches, dtype=dtypes, seed=seeds, dims=st.integers(0, 3), end=st.sampled_from(["both", 0.0, 1.0]))
def test_a_weight_of_0_or_1_copies_the_bits(device, shape, dtype, seed, dims, end):
    """Whatever the other row holds; so does a box. Nor is an upstream gradient looked at where its weight is 0."""
    rng = generator(seed)
    x, _, index, box, g = drawn_batch(shape, dtype, seed, "any", dims)
    lam = torch.randint(0, 2, shape[:1], generator=rng).to(accumulator(dtype)) if end == "both" else torch.full(shape[:1], end)
    lam = lam.to(accumulator(dtype))
    least = torch.finfo(dtype).tiny / (1 if dtype == torch.bfloat16 else 2)  # the interpreter widens subnormal bfloat16 to 0
    for t, large in ((x, torch.finfo(dtype).max), (g, 1e4)):
        hostile = torch.tensor([INFINITE, -INFINITE, NAN, -0.0, large, least], dtype=dtype)
        spoiled = torch.rand(shape, generator=rng) < 0.3
        t[spoiled] = hostile[torch.randint(0, len(hostile), (int(spoiled.sum()),), generator=rng)]
    own = lam.view(-1, *[1] * (x.dim() - 1)).expand(shape).clone()
    if box is not None:
        n = box.shape[1] // 2
        for i, corners in enumerate(box.clamp(min=0).tolist()):
            own[i][(..., *[slice(a, max(a, b)) for a, b in zip(corners[:n], corners[n:], strict=True)])] = 0
    expected = torch.where(own == 1, x, x[index])
    x, lam, index, box = (None if t is None else t.to(device) for t in (x, lam, index, box))
    out = fastmix.mix(x, lam, index, box=box)
    if end != "both":
        assert same_bits(out, fastmix.mix(x, end, index, box=box))
    out = out.cpu()
    assert torch.equal(out.isnan(), expected.isnan())
    assert same_bits(out.nan_to_num(0.0, INFINITE, -INFINITE), expected.nan_to_num(0.0, INFINITE, -INFINITE))
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(fastmix.mix(leaf, lam, index, box=box), leaf, g.to(device))
    expected = reference.mix_grad(numpy(g), numpy(x), numpy(lam), numpy(index), None if box is None else numpy(box))[0]
    assert_close(dx, expected, dtype)


values = st.sampled_from([1.0, 0.0, -0.0, -1.5, 1e4, -1e4, 2.0**-24, INFINITE, -INFINITE, NAN])


@st.composite
def hostile_rows(draw):
    N = draw(st.integers(1, 4))
    x, g = (draw(st.lists(st.tuples(values, values), min_size=N, max_size=N)) for _ in range(2))
    lam = draw(st.lists(st.sampled_from([0.5, 0.0, 1.0, 0.3, -0.5, 1.5]), min_size=N, max_size=N))
    return x, lam, draw(st.lists(st.integers(0, N - 1), min_size=N, max_size=N)), g


@given(case=hostile_rows(), dtype=dtypes)
def test_a_hostile_value_spoils_only_who_mixes_it(device, case, dtype):
    x, lam, index, g = case
    x, g = (torch.tensor(t, dtype=dtype) for t in (x, g))
    lam = torch.tensor(lam, dtype=accumulator(dtype))
    inputs = [t.to(device) for t in (x, lam, torch.tensor(index), g)]
    x, lam, index, g = inputs
    check_mixed(x, lam, index, None, g, *mix_and_gradients(x, lam, index, None, g))


@given(
    shape=batches,
    seed=seeds,
    partner=partners,
    dims=st.integers(0, 3),
    factors=st.sampled_from([(2.0, 0.0), (0.5, -3.0), (1.0, 1.0)]),
)
def test_mix_is_linear_in_x_and_its_gradient_the_adjoint(device, shape, seed, partner, dims, factors):
    x, lam, index, box, g = (
        None if t is None else t.to(device) for t in drawn_batch(shape, torch.float64, seed, partner, dims)
    )
    y = torch.randn(shape, dtype=torch.float64, generator=generator(seed + 1)).to(device)
    a, b = factors
    out, dx, dlam = mix_and_gradients(x, lam, index, box, g)
    both = fastmix.mix(a * x + b * y, lam, index, box=box)
    torch.testing.assert_close(both, a * out + b * fastmix.mix(y, lam, index, box=box), rtol=0, atol=1e-13)
    product = (g * out).sum()
    torch.testing.assert_close((dx * x).sum(), product, rtol=0, atol=1e-13 * (1 + g.numel()))
    step = 0.25  # mix is affine in lam: a difference is exact
    moved = (g * (fastmix.mix(x, lam + step, index, box=box) - out)).flatten(1).sum(1) / step if shape[1:] else None
    if moved is not None:
        torch.testing.assert_close(dlam, moved, rtol=0, atol=1e-12 * (1 + g.numel()))


@given(shape=batches, dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=seeds, power=st.sampled_from([2.0, 0.25]))
def test_mix_of_a_power_of_two_times_x_has_that_times_the_bits(device, shape, dtype, seed, power):
    x, lam, index, _, _ = (None if t is None else t.to(device) for t in drawn_batch(shape, dtype, seed))
    assert same_bits(fastmix.mix(x * power, lam, index), fastmix.mix(x, lam, index) * power)


@given(
    shape=batches,
    dtype=dtypes,
    seed=seeds,
    dims=st.integers(0, 2),
    x_layout=st.sampled_from(LAYOUTS),
    out_layout=st.sampled_from(["dense", "misaligned", "rows apart", "every second", "transposed", "channels last"]),
)
def test_out_is_written_and_nothing_beside_it(device, shape, dtype, seed, dims, x_layout, out_layout):
    x, lam, index, box, _ = drawn_batch(shape, dtype, seed, "any", dims)
    memory = Memory(device, SENTINEL, SENTINEL)
    out = memory.place(torch.zeros_like(x), out_layout)
    ((room, _),) = memory.rooms
    inputs = Memory(device, NAN, 2**30)
    x, lam, index = inputs.place(x, x_layout), inputs.place(lam), inputs.place(index)
    box = None if box is None else inputs.place(box)
    with guarded_allocations():
        assert fastmix.mix(x, lam, index, box=box, out=out) is out
    inputs.check()
    assert same_bits(out, fastmix.mix(x, lam, index, box=box))
    out.fill_(0)
    memory.check()  # the rest of the room is as it was


# The rows that have each row as their partner


@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_counting_finds_what_sorting_finds(device):
    from fastmix.kernels import _row_layout

    for rows, slots in ((1, 1), (5, 5), (33, 33), (200, 200), (300, 40), (7, 100)):
        index = torch.randint(-2, slots + 3, (rows,), device=device)  # partners out of range are nobody's
        counted, by_sort = _row_layout.inverse_index(index, slots), _row_layout.sorted_inverse(index, slots)
        assert sorted(counted.order_ptr.tolist()) == list(range(rows))
        for slot in range(slots):
            users, expected = (t.order_ptr[t.starts_ptr[slot] : t.starts_ptr[slot + 1]] for t in (counted, by_sort))
            assert torch.equal(users, expected)


@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_gradients_of_many_rows_have_the_same_bits_as_those_of_few(device, monkeypatch):
    from fastmix.kernels import _row_layout
    from fastmix.kernels import api as kernels

    x, g = torch.randn(2, 9, 700, device=device)
    lam, index = torch.rand(9, device=device), torch.randperm(9, device=device)
    for box in (None, torch.tensor([[3, 300]], device=device).repeat(9, 1)):
        arguments = g, x, lam, index, box, x.stride(), True, True
        expected = kernels.mix_bwd(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(_row_layout, "COUNTED_ROWS", 8)
            by_sort = kernels.mix_bwd(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(by_sort, expected, strict=True))
