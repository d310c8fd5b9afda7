"""fastmix.mix_masked on every backend against the oracle: values, gradients to x and to the mask, plans, layouts, hostile
inputs."""

import itertools
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import INTERPRETER, NO_INTERPRETER, NO_TRITON, TRITON
from memory import Fresh, is_torch, same_bits, stored_otherwise
from numerics import FLOATS, LAMBDA, RELATIVE, accumulator, assert_close, numpy

import fastmix
from fastmix import BetaMask, _torch, reference
from fastmix._torch.mix_masked import mix_masked_dmask_formula, mix_masked_dx_formula, mix_masked_formula

ROOT = pathlib.Path(__file__).parent.parent
BOTH, NEITHER = (True, True), (False, False)


# shape, cells, whether there are a plan and a partner's plan
CASES = [
    ((4, 3, 8, 8), (2, 4), NEITHER),
    ((4, 3, 8, 8), (2, 4), BOTH),
    ((3, 2, 6, 10), (3, 5), (True, False)),
    ((3, 7, 9), (7, 3), (False, True)),
    ((3, 5, 12), (5, 12), NEITHER),
    ((5, 2, 3, 3), (3, 3), BOTH),
    ((2, 40, 33), (1, 1), BOTH),
    ((2, 2, 3, 4, 6), (2, 3), BOTH),
    ((1, 3, 16, 16), (4, 4), BOTH),
]


def batch(shape, cells, plans, dtype, device="cpu"):
    """(x, mask with both ends, index with repeated partners, plan, partner_plan, upstream); plans are any maps"""
    N, count = shape[0], math.prod(cells)
    mask = torch.rand(N, *cells, dtype=accumulator(dtype))
    mask[mask < 0.2], mask[mask > 0.8] = 0, 1
    index = torch.randint(0, max(N, 1), (N,))
    plan, partner_plan = (torch.randint(0, count, (N, count)) if used else None for used in plans)
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return [t if t is None else t.to(device) for t in (x, mask, index, plan, partner_plan, g)]


def apply(x, mask, index, plan=None, partner_plan=None):
    return fastmix.mix_masked(x, mask, index, plan=plan, partner_plan=partner_plan)


def cell_sums(pixels, cells):
    """[N, ..., H, W] summed over cells: [N, h, w]."""
    (h, w), (N, *lead, H, W) = cells, pixels.shape
    return pixels.reshape(N, math.prod(lead), h, H // h, w, W // w).sum((1, 3, 5))


def check(x, mask, index, plan, partner_plan, g):
    """One forward and backward against the oracle; the mask's gradient also against the definition."""
    x, mask = x.detach().requires_grad_(), mask.detach().requires_grad_()
    before = x.detach().clone(), mask.detach().clone()
    out = apply(x, mask, index, plan, partner_plan)
    out.backward(g)
    how = [None if t is None else numpy(t) for t in (index, plan, partner_plan)]
    X, M, G = numpy(x), numpy(mask), numpy(g)
    size = np.abs(X).max(initial=0) * (1 + 2 * np.abs(M).max(initial=0))
    assert_close(out, reference.mix_masked(X, M, *how), x.dtype, size)
    dx, dmask = reference.mix_masked_grad(G, X, M, *how)
    terms = reference.mix_masked_grad(np.abs(G), X, np.clip(np.abs(M), 0.5, None), *how)[0]
    assert_close(x.grad, dx, x.dtype, 2 * terms.max(initial=0))
    gap = G * (reference.mix_masked(X, np.ones_like(M), *how) - reference.mix_masked(X, np.zeros_like(M), *how))
    np.testing.assert_allclose(cell_sums(gap, mask.shape[1:]), dmask, rtol=1e-9, atol=1e-9)
    assert mask.grad.dtype == mask.dtype
    assert np.all(np.abs(numpy(mask.grad) - dmask) <= LAMBDA[x.dtype] * cell_sums(np.abs(gap), mask.shape[1:]))
    assert torch.equal(x, before[0])
    assert torch.equal(mask, before[1])
    return out


@pytest.mark.thinned(5)
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "cells", "plans"), CASES, ids=str)
def test_matches_the_oracle(shape, cells, plans, dtype, device):
    check(*batch(shape, cells, plans, dtype, device))


def test_the_oracles_gradients_are_its_differences():
    x, mask, index, plan, partner_plan, g = (numpy(t) for t in batch((3, 2, 4, 6), (2, 3), BOTH, torch.float64))
    dx, dmask = reference.mix_masked_grad(g, x, mask, index, plan, partner_plan)
    step = 1e-6
    for values, gradient in ((x, dx), (mask, dmask)):
        for at in np.ndindex(values.shape):
            inner = values[at]
            if values is mask and inner in (0, 1):
                continue  # the value at the ends is not the limit's where a weight is 0, its gradient is
            ends = []
            for sign in (1, -1):
                values[at] = inner + sign * step
                ends.append(np.sum(g * reference.mix_masked(x, mask, index, plan, partner_plan)))
            values[at] = inner
            assert abs((ends[0] - ends[1]) / (2 * step) - gradient[at]) < 1e-6


def test_one_cell_is_mix(device):
    x, mask, index, _, _, g = batch((5, 3, 6, 4), (1, 1), NEITHER, torch.float32, device)
    x.requires_grad_()
    mask.requires_grad_()
    lam = mask.detach().view(-1).requires_grad_()
    ours, theirs = apply(x, mask, index), fastmix.mix(x, lam, index)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    dx, dmask = torch.autograd.grad(ours, (x, mask), g)
    expected, dlam = torch.autograd.grad(theirs, (x, lam), g)
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dmask.view(-1), dlam, rtol=1e-4, atol=1e-5)


def test_a_mask_of_zeros_and_ones_selects(device):
    """FMix, and any CutMix: bit for bit, the sign of zero too."""
    x, _, index, _, _, _ = batch((4, 3, 6, 10), (6, 10), NEITHER, torch.float32, device)
    x[:, :, ::2] = -0.0
    mask = (torch.rand(4, 6, 10, device=device) < 0.5).float()
    out = apply(x, mask, index)
    expected = torch.where(mask.unsqueeze(1) == 1, x, x[index])
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "upright": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "rows inside": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "rows innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels between": lambda t: t.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("plans", [NEITHER, BOTH], ids=str)
def test_dense_layouts_are_kept(plans, layout, device):
    x, *how, g = batch((3, 3, 6, 8), (3, 2), plans, torch.float32, device)
    laid = LAYOUTS[layout](x)
    assert check(laid, *how, LAYOUTS[layout](g)).stride() == laid.stride()
    check(laid, *how, g)  # upstream in another layout


@pytest.mark.slow_interpreted
def test_strided_and_expanded_inputs(device):
    x, mask, index, plan, partner_plan, g = batch((4, 3, 6, 4), (3, 2), BOTH, torch.float32, device)
    wide = torch.randn(8, 6, 9, 11, device=device)
    for sliced in (wide[::2, :3, :6, :4], wide[4:, 3:, 1:7, ::2][..., :4], wide[:4, :3].flip(2)[:, :, :6, :4]):
        check(sliced, mask, index, plan, partner_plan, g)
    check(x[:1].expand(4, 3, 6, 4), mask, index, plan, partner_plan, g)
    check(x[:, :1].expand(4, 3, 6, 4), mask, index, None, None, g)
    check(x, mask, index, plan, partner_plan, g[:1, :1, :1, :1].expand(4, 3, 6, 4))
    check(x, mask[:1].expand(4, 3, 2), index, plan[:1].expand(4, 6), None, g)
    check(x, torch.rand(4, 2, 3, device=device).transpose(1, 2), index[:1].expand(4), None, partner_plan, g)
    check(x, mask, index, torch.stack((plan, plan), 2)[..., 1], None, g)
    check(x.view(-1)[1 : 1 + 72].view(1, 3, 6, 4), mask[:1], index[:1] * 0, plan[:1], None, g[:1])


@pytest.mark.parametrize(
    ("shape", "cells"),
    [((0, 3, 4, 4), (2, 2)), ((2, 3, 0, 4), (0, 2)), ((2, 3, 0, 4), (3, 2)), ((2, 0, 4, 4), (2, 4)), ((2, 3, 4, 0), (1, 1))],
    ids=str,
)
def test_nothing_to_mix(shape, cells, device):
    x, mask, index, plan, _, g = batch(shape, cells, (math.prod(cells) > 0, False), torch.float32, device)
    x.requires_grad_()
    mask.requires_grad_()
    out = apply(x, mask, index, plan)
    out.backward(g)
    assert out.shape == x.shape == x.grad.shape
    assert torch.equal(mask.grad, torch.zeros_like(mask))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("shape", [(3, 2, 4, 1), (3, 1, 1, 6), (2, 1, 1, 1), (2, 3, 1, 64), (2, 4, 5000)], ids=str)
def test_thin_rows(shape, device):
    """One element high or wide, and cells longer than a tile."""
    H, W = shape[-2:]
    check(*batch(shape, (H if H < 10 else 1, 2 if W % 2 == 0 else 1), BOTH, torch.float32, device))


@pytest.mark.slow_interpreted
def test_many_cells_share_a_tile_and_many_tiles_a_cell(device):
    check(*batch((2, 70, 4, 8), (2, 2), NEITHER, torch.float32, device))
    check(*batch((2, 2, 64, 48), (1, 2), BOTH, torch.float32, device))


def test_values_outside_the_unit_interval(device):
    x, mask, *how, g = batch((3, 2, 4, 4), (2, 2), BOTH, torch.float32, device)
    check(x, 4 * mask - 1.5, *how, g)
    mask = torch.rand(3, 2, 2, dtype=torch.float64, device=device, requires_grad=True)  # in double, beside x in single
    out = apply(x, mask, how[0])
    out.backward(g)
    assert out.dtype == torch.float32
    assert mask.grad.dtype == torch.float64


class TestPlans:
    def test_an_identity_changes_nothing(self, device):
        x, mask, index, _, _, g = batch((3, 2, 6, 8), (3, 4), NEITHER, torch.float32, device)
        x.requires_grad_()
        same = torch.arange(12, device=device).expand(3, 12)
        for plans in ((same, None), (None, same), (same, same)):
            ours, theirs = apply(x, mask, index, *plans), apply(x, mask, index)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            for a, b in zip(torch.autograd.grad(ours, x, g), torch.autograd.grad(theirs, x, g), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    def test_one_block_everywhere(self, device):
        """A map that is no permutation: block 5 fills the output and gets the gradient of every block."""
        x, _, index, _, _, g = batch((3, 2, 6, 8), (3, 4), NEITHER, torch.float32, device)
        five = torch.full((3, 12), 5, device=device)
        check(x, torch.rand(3, 3, 4, device=device), index, five, five, g)
        out = apply(x, torch.ones(3, 3, 4, device=device), index, five)
        assert torch.equal(out, x[:, :, 2:4, 2:4].repeat(1, 1, 3, 4))

    def test_there_and_back(self, device):
        x = torch.randn(3, 2, 6, 8, device=device)
        there = torch.stack([torch.randperm(12) for _ in range(3)]).to(device)
        ones, index = torch.ones(3, 3, 4, device=device), torch.arange(3, device=device)
        assert torch.equal(apply(apply(x, ones, index, there), ones, index, there.argsort(1)), x)

    def test_blocks_are_numbered_row_by_row(self, device):
        x = torch.arange(8.0, device=device).view(1, 2, 4)
        plan = torch.tensor([[3, 2, 1, 0, 5, 4, 7, 6]], device=device)
        out = apply(x, torch.ones(1, 2, 4, device=device), torch.tensor([0], device=device), plan)
        assert out.view(-1).tolist() == plan.view(-1).tolist()


def test_what_has_no_weight_is_not_looked_at(device):
    x, _, _, _, _, g = batch((3, 2, 4, 8), (4, 8), NEITHER, torch.float32, device)
    index = torch.tensor([1, 0, 2], device=device)
    for cells, bad in (((4, 8), float("nan")), ((2, 2), float("inf"))):
        mask = (torch.rand(3, *cells, device=device) < 0.5).float()
        mask[0, 0, :2] = torch.tensor([0.0, 1.0])
        full = mask.repeat_interleave(4 // cells[0], 1).repeat_interleave(8 // cells[1], 2)
        poisoned = x.clone()
        poisoned[0][:, full[0] == 0] = bad  # nor is it row 1's, whose partner is row 0, below
        mask[1] = torch.where(mask[0] == 0, 1, mask[1])
        poisoned[1][:, full[0] == 1] = bad
        mask[1] = torch.where(mask[0] == 1, 0, mask[1])
        poisoned.requires_grad_()
        out = apply(poisoned, mask, index)
        assert torch.isfinite(out).all()
        h = g.clone()
        h[2] = float("nan")
        out.backward(h)
        assert torch.isfinite(poisoned.grad[:2]).all()
        assert torch.isnan(poisoned.grad[2]).all()
    middle = torch.full((3, 1, 1), 0.5, device=device)
    assert not torch.isfinite(apply(poisoned.detach(), middle, index)[0]).all()


def test_an_upstream_gradient_without_weight(device):
    """Where both rows have a mask of 0, or of 1, the upstream gradient reaches one of them only."""
    g = torch.ones(2, 1, 4, device=device)
    g[0, 0, 0], g[1, 0, 3] = float("inf"), float("nan")
    x = torch.randn(2, 1, 4, device=device, requires_grad=True)
    mask = torch.tensor([[[1.0, 0.5, 0.5, 0.5]], [[0.5, 0.5, 0.5, 0.0]]], device=device)
    apply(x, mask, torch.tensor([1, 0], device=device)).backward(g)
    bad = ~torch.isfinite(x.grad[:, 0])
    assert bad.tolist() == [[True, False, False, True], [False, False, False, False]]


def test_no_overflow_between_huge_rows(device):
    x = torch.tensor([[[3e38, -3e38]], [[-3e38, 3e38]]], device=device)
    out = apply(x, torch.full((2, 1, 2), 0.5, device=device), torch.tensor([1, 0], device=device))
    assert torch.equal(out, torch.zeros(2, 1, 2, device=device))


def test_rows_far_apart(device):
    """Strides times indices beyond 32 bits, without touching the memory between."""
    storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)
    x = torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, (2, 4, 4), (2**31 + 16, 4, 1))
    x[0], x[1] = 1, 3
    mask = torch.tensor([[[0.5, 1.0]], [[0.25, 0.0]]], device=device)
    out = apply(x, mask, torch.tensor([1, 0], device=device), torch.tensor([[1, 0], [0, 1]], device=device))
    assert out[:, 0].tolist() == [[2.0, 2.0, 1.0, 1.0], [1.5, 1.5, 1.0, 1.0]]


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits_however_a_batch_is_stored(device, dtype):
    shapes = [(5, 3, 12, 12), (5, 8, 24, 24)]  # the CPU has two ways of mixing them
    kinds = [((3, 4), False), ((3, 4), True), ((12, 12), False)]
    if not is_torch(device):
        shapes, kinds = shapes[:1], kinds if dtype == torch.bfloat16 else kinds[1:2]
    for shape, (cells, moved) in itertools.product(shapes, kinds):
        x, mask, index, _, _, g = batch(shape, cells, NEITHER, dtype, device)
        plans = [torch.rand(5, math.prod(cells), device=device).argsort(1) if moved else None for _ in range(2)]

        def mixed(x, mask=mask, index=index, plans=plans, g=g):
            x = x.detach().requires_grad_()
            out = apply(x, mask, index, *plans)
            return out.detach(), *torch.autograd.grad(out, x, g)

        expected = mixed(x)
        for how, stored in stored_otherwise(x).items():
            for a, b in zip(mixed(stored), expected, strict=True):
                assert same_bits(a, b), (how, shape, cells, moved)


@pytest.mark.slow_interpreted
def test_one_cell_is_mix_to_the_bits(device):
    for shape, dtype in itertools.product([(4, 3, 8, 8), (4, 3, 48, 48)], [torch.float32, torch.bfloat16, torch.float64]):
        x, mask, index, _, _, _ = batch(shape, (1, 1), NEITHER, dtype, device)
        mask[:2] = torch.tensor([0.3, 0.9], device=device).view(2, 1, 1)
        assert same_bits(apply(x, mask, index), fastmix.mix(x, mask.flatten(), index))


@pytest.mark.slow_interpreted
def test_same_input_same_bits(device):
    x, mask, *how, g = batch((8, 3, 8, 8), (4, 2), BOTH, torch.float32, device)
    x.requires_grad_()
    mask.requires_grad_()
    out = apply(x, mask, *how)
    first, again = (torch.autograd.grad(out, (x, mask), g, retain_graph=True) for _ in range(2))
    anew = torch.autograd.grad(apply(x, mask, *how), (x, mask), g)
    for other in (again, anew):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("plans", [NEITHER, BOTH], ids=str)
def test_one_gradient_alone(plans, device):
    x, mask, *how, g = batch((3, 2, 4, 6), (2, 3), plans, torch.float32, device)
    arguments = [None if t is None else numpy(t) for t in (g, x, mask, *how)]
    dx, dmask = reference.mix_masked_grad(*arguments)
    leaf = mask.clone().requires_grad_()
    apply(x, leaf, *how).backward(g)
    np.testing.assert_allclose(numpy(leaf.grad), dmask, rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    out = apply(leaf, mask, *how)
    held = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert all(t.shape != x.shape for t in held)  # x is kept for the mask's gradient only
    out.backward(g)
    np.testing.assert_allclose(numpy(leaf.grad), dx, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("plans", [NEITHER, BOTH], ids=str)
def test_second_derivatives(plans, device):
    """A backward that launches a kernel would return silently wrong second derivatives."""
    x, mask, *how, _ = batch((3, 2, 2, 4), (1, 2), plans, torch.float64, device)
    x.requires_grad_()
    mask = (0.1 + 0.8 * mask).requires_grad_()
    fast = not is_torch(device)  # along one direction, where a forward takes long
    assert torch.autograd.gradcheck(lambda x, mask: apply(x, mask, *how), (x, mask), fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda x, mask: apply(x, mask, *how), (x, mask), fast_mode=fast)


@pytest.mark.parametrize("plans", [NEITHER, BOTH], ids=str)
def test_transforms_and_forward_mode(plans, device):
    x, mask, *how, _ = batch((3, 2, 4, 6), (2, 3), plans, torch.float64, device)

    def loss(x, mask):
        return apply(x, mask, *how).square().sum()

    expected = torch.autograd.grad(loss(xs := x.clone().requires_grad_(), ms := mask.clone().requires_grad_()), (xs, ms))
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, mask), expected)
    along = torch.randn_like(mask)
    gap = apply(x, torch.ones_like(mask), *how) - apply(x, torch.zeros_like(mask), *how)
    pixels = along.repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(1)
    tangent = torch.func.jvp(lambda mask: apply(x, mask, *how), (mask,), (along,))[1]
    torch.testing.assert_close(tangent, gap * pixels)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(mask, along)
        tangent = torch.autograd.forward_ad.unpack_dual(apply(x, dual, *how)).tangent
    torch.testing.assert_close(tangent, gap * pixels)
    many = torch.func.vmap(lambda mask: apply(x, mask, *how))(torch.stack((mask, 1 - mask)))
    torch.testing.assert_close(many[1], apply(x, 1 - mask, *how))
    many = torch.func.vmap(lambda x: apply(x, mask, *how))(torch.stack((x, 2 * x)))
    torch.testing.assert_close(many[1], 2 * apply(x, mask, *how))


@pytest.mark.slow_interpreted
def test_batched_backward(device):
    x, mask, *how, _ = batch((2, 2, 2, 4), (1, 2), BOTH, torch.float64, device)
    x.requires_grad_()
    mask.requires_grad_()
    out = apply(x, mask, *how)
    eye = torch.eye(out.numel(), dtype=x.dtype, device=device).view(-1, *out.shape)
    rows = torch.autograd.grad(out, (x, mask), eye, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, (x, mask), g, retain_graph=True) for g in eye]
    for k in range(2):
        torch.testing.assert_close(rows[k], torch.stack([one[k] for one in each]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "cells", "plans"), CASES, ids=str)
def test_the_expressions_are_the_op(shape, cells, plans, dtype):
    """What runs under transforms and on devices without kernels."""
    x, mask, *how, g = batch(shape, cells, plans, dtype)
    arguments = [None if t is None else numpy(t) for t in (x, mask, *how)]
    assert_close(mix_masked_formula(x, mask, *how), reference.mix_masked(*arguments), dtype, 10.0)
    dx, dmask = reference.mix_masked_grad(numpy(g), *arguments)
    assert_close(mix_masked_dx_formula(g, mask, *how), dx, dtype, np.abs(numpy(g)).sum())
    np.testing.assert_allclose(numpy(mix_masked_dmask_formula(g, x, mask, *how)), dmask, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 300, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_the_torch_backend(block, dtype, monkeypatch):
    monkeypatch.setattr(_torch.sizes, "MIX_BLOCK_BYTES", block)
    monkeypatch.setattr(_torch.sizes, "SMALL_BATCH", 0)
    for shape, cells, plans in CASES:
        x, *how, g = batch(shape, cells, plans, dtype)
        check(x, *how, g)
        if x.dim() == 4:
            check(x.contiguous(memory_format=torch.channels_last), *how, g)


@pytest.mark.slow
@pytest.mark.parametrize("plans", [NEITHER, BOTH], ids=str)
def test_extra_memory_is_small(plans):
    """The torch backend makes its result and no other tensor of that size."""
    x, mask, *how, g = batch((16, 3, 256, 256), (16, 16), plans, torch.float32)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, g = (t.contiguous(memory_format=layout) for t in (x, g))
        with Fresh() as made:
            _torch.mix_masked_fwd(x, mask, *how)
            _torch.mix_masked_bwd(g, x, mask, *how, x.stride(), True, True)
    made = [size for size in made.sizes if size > 2 * _torch.sizes.MIX_BLOCK_BYTES]
    assert set(made) == {x.nbytes}
    assert len(made) <= 4  # results, and what is laid out for them


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a float16"),
        ({"x": torch.zeros(4, 2, 4, 6, dtype=torch.int64)}, TypeError, "x: .*int64"),
        ({"x": torch.zeros(4, 6)}, ValueError, r"x: expected shape \[N, ..., H, W\], got .*\[4, 6\]"),
        ({"x": torch.zeros(4, 2, 4, 6).to_sparse()}, TypeError, r"x: expected a dense \(strided\) tensor"),
        ({"x": torch.zeros(4, 2, 4, 6, device="meta")}, ValueError, "mask: expected a tensor on meta, got .*cpu"),
        ({"mask": 0.5}, TypeError, r"mask: expected a float32 or float64 tensor.*0.5 \(float\)"),
        ({"mask": None}, TypeError, "mask: .*NoneType"),
        ({"mask": np.zeros((4, 2, 3))}, TypeError, "mask: .*ndarray"),
        ({"mask": torch.zeros(4, 2, 3, dtype=torch.bfloat16)}, TypeError, "mask: .*bfloat16"),
        ({"mask": torch.zeros(4, 2, 3, dtype=torch.bool)}, TypeError, "mask: .*bool"),
        ({"mask": torch.zeros(4)}, ValueError, r"mask: expected shape \[4, h, w\], got .*\[4\]"),
        ({"mask": torch.zeros(4, 1, 2, 3)}, ValueError, "mask: expected shape"),
        ({"mask": torch.zeros(1, 2, 3)}, ValueError, r"mask: expected shape .*\[1, 2, 3\]"),
        ({"mask": torch.zeros(4, 3, 3)}, ValueError, "mask: expected a number of cells that divides x's height 4, got .*3, 3"),
        ({"mask": torch.zeros(4, 2, 4)}, ValueError, "mask: .*divides x's width 6"),
        ({"mask": torch.zeros(4, 8, 6)}, ValueError, "mask: .*height 4"),
        ({"mask": torch.zeros(4, 0, 6)}, ValueError, "mask: .*height 4"),
        ({"mask": torch.zeros(4, 2, 3, device="meta")}, ValueError, "mask: expected a tensor on cpu, got .*meta"),
        ({"mask": torch.zeros(4, 2, 3).to_sparse()}, TypeError, "mask: .*dense"),
        ({"index": torch.zeros(4)}, TypeError, "index: expected an int64"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, ValueError, r"index: expected shape \[4\], got .*\[5\]"),
        ({"index": torch.tensor([0, 1, 4, 2])}, ValueError, r"index: expected a partner in \[0, 4\), got 4 in row 2"),
        ({"plan": torch.zeros(4, 6)}, TypeError, "plan: expected an int64"),
        ({"plan": [[0] * 6] * 4}, TypeError, "plan: .*list"),
        ({"plan": torch.zeros(4, 6, dtype=torch.int16)}, TypeError, "plan: .*int16"),
        ({"plan": torch.zeros(4, 2, 3, dtype=torch.int64)}, ValueError, r"plan: expected shape \[4, 6\], got .*\[4, 2, 3\]"),
        ({"plan": torch.zeros(6, dtype=torch.int64)}, ValueError, r"plan: expected shape \[4, 6\]"),
        ({"plan": torch.full((4, 6), 6)}, ValueError, r"plan: expected a block in \[0, 6\), got 6 in row 0 \(at \[0, 0\]\)"),
        ({"plan": torch.zeros(4, 6, dtype=torch.int64, device="meta")}, ValueError, "plan: expected a tensor on cpu"),
        ({"partner_plan": torch.zeros(4, 5, dtype=torch.int64)}, ValueError, r"partner_plan: expected shape \[4, 6\]"),
        ({"partner_plan": torch.full((4, 6), -1)}, ValueError, "partner_plan: expected a block .* got -1 in row 0"),
    ],
    ids=str,
)
def test_bad_input(change, kind, words):
    how = {
        "x": torch.zeros(4, 2, 4, 6),
        "mask": torch.zeros(4, 2, 3),
        "index": torch.arange(4),
        "plan": None,
        "partner_plan": None,
    }
    how.update(change)
    with pytest.raises(kind, match=words):
        apply(*how.values())


@pytest.mark.parametrize("device", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_wrong_indices_on_a_device_that_is_not_read(device, monkeypatch):
    """Where the host does not look, a wrong partner or plan makes its row NaN and reads nothing out of bounds."""
    monkeypatch.setattr(fastmix._check, "readable", lambda t: False)
    x = torch.randn(5, 2, 4, 6, device=device, requires_grad=True)
    mask = torch.full((5, 2, 3), 0.5, device=device, requires_grad=True)
    index = torch.tensor([1, 9, 0, 3, 4], device=device)
    plan, partner_plan = (torch.arange(6, device=device).repeat(5, 1) for _ in range(2))
    plan[2, 1], partner_plan[3, 4] = 2**40, -1
    bad = torch.tensor([False, True, True, True, False], device=device)
    for function in (apply, mix_masked_formula):
        out = function(x, mask, index, plan, partner_plan)
        assert torch.equal(out.isnan().flatten(1).all(1), bad)
        assert torch.equal(out.isnan().flatten(1).any(1), bad)
        dx, dmask = torch.autograd.grad(out.sum(), (x, mask))
        if function is apply:
            assert torch.isfinite(dx).all()
            same = mix_masked_dx_formula(torch.ones_like(x), mask, index, plan, partner_plan)
            torch.testing.assert_close(dx, same)
            assert torch.equal(dmask.isnan().flatten(1).all(1), bad)
    monkeypatch.undo()
    with fastmix.debug(), pytest.raises(ValueError, match="index: expected a partner"):
        apply(x, mask, index, plan, partner_plan)


# Compilers


COMPILED = [pytest.mark.no_poison, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def compiled(case):
    for mark in COMPILED:
        case = mark(case)
    return case


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("plans", [NEITHER, BOTH], ids=str)
def test_torch_compile(plans):
    x, mask, *how, g = batch((4, 3, 4, 6), (2, 3), plans, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    program = torch.compile(lambda x, mask: apply(x, mask, *how), backend="aot_eager", fullgraph=True)
    for n in (1, 2):  # other weights, the same program
        xs, ms = x.clone().requires_grad_(), (mask / n).requires_grad_()
        ours, theirs = program(xs, ms), apply(xs, ms, *how)
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
        for a, b in zip(torch.autograd.grad(ours, (xs, ms), g), torch.autograd.grad(theirs, (xs, ms), g), strict=True):
            assert torch.equal(a, b)
    wrong = torch.compile(lambda index: apply(x, mask, index), backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="index: expected a partner"):
        wrong(torch.full((4,), 4))


@compiled
def test_export():
    class Mixing(torch.nn.Module):
        def forward(self, x, mask, index, plan):
            return apply(x, mask, index, plan)

    N = torch.export.Dim("N", min=2)
    x, mask, index, plan, _, _ = batch((4, 3, 4, 6), (2, 3), BOTH, torch.float32)
    program = torch.export.export(Mixing(), (x, mask, index, plan), dynamic_shapes=({0: N},) * 4)
    assert [str(node.target) for node in program.graph.nodes if "fastmix" in str(node.target)] == ["fastmix.mix_masked.default"]
    arguments = batch((3, 3, 4, 6), (2, 3), BOTH, torch.float32)[:4]
    assert torch.equal(program.module()(*arguments), apply(*arguments))


# Memory


@pytest.mark.skipif(not TRITON, reason=NO_TRITON)
def test_bytes_moved():
    """One read of what has weight, one write; a plan moves blocks in the same pass."""
    if not INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    from fastmix.bench import traffic

    x = torch.randn(3, 2, 16, 32)
    mask = torch.zeros(3, 2, 4)
    mask[:, :, ::2] = 1
    index = torch.tensor([1, 2, 0])
    cells = torch.arange(8).expand(3, 8)
    with fastmix.backend("triton"):
        for plan in (None, cells.flip(1)):
            with traffic.count() as moved:
                apply(x, mask, index, plan, plan)
            extra = mask.nbytes * (2 * 16 * 8 // 4) + (0 if plan is None else 2 * plan.nbytes * 2 * 16)
            assert moved["_mix_masked_fwd_kernel"].lanes <= 2 * x.nbytes + extra + 8 * 3 * 8
        with traffic.count() as moved:
            apply(x, torch.full((3, 2, 4), 0.5), index)
        assert 3 * x.nbytes <= moved["_mix_masked_fwd_kernel"].lanes <= 3.5 * x.nbytes
        leaf = torch.full((3, 2, 4), 0.5, requires_grad=True)
        out = apply(x, leaf, index)
        with traffic.count() as moved:
            out.backward(x)
        assert list(moved) == ["_mix_masked_dmask_kernel"]  # nothing else is written
        assert moved["_mix_masked_dmask_kernel"].lanes <= 3.1 * x.nbytes


LAUNCHES = """
import sys
import torch
from fastmix.kernels import api
sys.path.insert(0, "tests")
from launched import programs

def launch(N, seed):
    torch.manual_seed(seed)
    x, mask, index = torch.ones(N, 3, 32, 32), torch.rand(N, 4, 4), torch.randint(0, N, (N,))
    plan = torch.randint(0, 16, (N, 16))
    api.mix_masked_fwd(x, mask, index, plan, None)
    api.mix_masked_bwd(x, x, mask, index, plan, None, x.stride(), True, True)

asked = [programs(lambda: launch(N, seed)) for N, seed in ((4, 0), (7, 1), (16, 2))]
assert asked[0] == asked[1] == asked[2], asked
print(len(set(asked[0])))
"""


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason=NO_TRITON)
def test_other_batches_compile_nothing():
    """Neither the number of rows nor the values of the mask are part of a program."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHES]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "4\n"


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_beyond_32_bit_offsets(device):
    x = torch.empty(3, 1, 2**15, 2**15 + 64, dtype=torch.bfloat16, device=device).normal_()
    mask = torch.tensor([[[0.25, 1.0]], [[0.5, 0.5]], [[0.0, 0.75]]], device=device)
    index, swap = torch.tensor([2, 1, 0], device=device), torch.tensor([[1, 0]] * 3, device=device)
    out = fastmix.mix_masked(x, mask, index, partner_plan=swap)
    half = x.shape[3] // 2
    expected = 0.75 * x[2, :, -1, half:].float() + 0.25 * x[0, :, -1, :half].float()
    assert torch.equal(out[2, :, -1, half:], expected.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_no_host_synchronisation(device):
    x, mask, *how, g = batch((4, 3, 8, 6), (2, 3), BOTH, torch.float32, device)
    x.requires_grad_()
    mask.requires_grad_()
    sampler = BetaMask(0.4)
    apply(x, mask, *how).backward(g)
    sampler(x, torch.zeros(4, dtype=torch.int64, device=device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        apply(x, mask, *how).backward(g)
        apply(x.detach(), mask.detach(), how[0])
        sampler(x, torch.zeros(4, dtype=torch.int64, device=device))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Properties


@pytest.mark.slow
def test_properties(device):
    """On drawn shapes: the oracle's values; linear in x; swapping roles and mask gives the same; moving rows moves the result."""
    hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
    st = hypothesis.strategies
    examples = {"cpu": 8 if INTERPRETER and fastmix._backend.of(torch.zeros(1)) is not _torch else 60}.get(device.type, 12)

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        st.integers(1, 4), st.integers(1, 3), st.tuples(*[st.integers(1, 4)] * 4), st.tuples(st.booleans(), st.booleans()),
        st.sampled_from(sorted(LAYOUTS)), st.sampled_from(FLOATS), st.integers(0, 2**32),
    )  # fmt: skip
    def holds(N, C, sizes, plans, layout, dtype, seed):
        torch.manual_seed(seed)
        h, w, tall, wide = sizes
        x, mask, index, plan, partner_plan, g = batch((N, C, h * tall, w * wide), (h, w), plans, dtype, device)
        x = LAYOUTS[layout](x)
        out = check(x, mask, index, plan, partner_plan, g)
        order = torch.randperm(N, device=device)
        back = order.argsort()
        moved = [None if t is None else t[order] for t in (x, mask, plan, partner_plan)]
        assert torch.equal(apply(moved[0], moved[1], back[index[order]], *moved[2:]), out[order])
        assert torch.equal(apply(2 * x, mask, index, plan, partner_plan), 2 * out)
        swap = torch.arange(N, device=device).flip(0)
        ours, theirs = apply(x, mask, swap, plan, partner_plan), apply(x.flip(0), 1 - mask, swap, partner_plan, plan)
        scale = float(x.detach().abs().max())
        tolerance = (
            4 * scale * RELATIVE[dtype] if dtype in (torch.float32, torch.float64) else 2 * scale * torch.finfo(dtype).eps
        )
        assert float((ours - theirs).detach().abs().max()) <= tolerance

    holds()
