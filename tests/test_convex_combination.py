"""fastmix.convex_combination on every backend against the oracle: values, gradients, layouts, hostile inputs, what it costs."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETER, NO_INTERPRETER, NO_TRITON, TRITON
from drawn import batches, dtypes, generator, given, layout_pairs, run, seeds, st
from memory import same_bits, stored_otherwise
from numerics import FLOATS, LAMBDA, RELATIVE, accumulator, assert_close, finite, numpy
from test_reference import differences
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close as same
from torch.utils._python_dispatch import TorchDispatchMode

import fastmix
from fastmix import SoftTarget, _torch, reference

ROOT = pathlib.Path(__file__).parent.parent
SHAPES = [(5, 3, 7, 9), (6, 13), (7,), (3, 2, 4, 5, 6), (1, 3, 4, 4), (2, 5000), (0, 3, 4), (4, 0), (3, 1, 1)]


def batch(shape, K, dtype=torch.float32, device="cpu", stacked=False):
    """Sources, weights with zeros and an end among them and values outside [0, 1], upstream."""
    N = shape[0]
    weights = 2 * torch.rand(N, K, dtype=accumulator(dtype)) - 0.5
    weights[:1] = 0
    weights[1:2, 0] = 0
    weights[2:3] = torch.eye(K)[K - 1]
    sources = [torch.randn(shape).to(dtype).to(device) for _ in range(K)]
    g = torch.randn(shape).to(dtype)
    return torch.stack(sources) if stacked else sources, weights.to(device), g.to(device)


def check_values(out, sources, weights):
    columns = np.abs(weights).T.reshape(*weights.T.shape, *[1] * (out.dim() - 1))
    scale = (columns * np.abs(finite(sources))).sum(0)
    assert_close(out, reference.convex_combination(sources, weights), out.dtype, scale)


def check_gradients(dsources, dweights, g, sources, weights):
    expected, expected_weights = reference.convex_combination_grad(g, sources, weights)
    assert_close(dsources, expected, dsources.dtype, np.abs(finite(expected)))
    row = tuple(range(2, sources.ndim))
    terms = np.abs(finite(sources * g)).sum(axis=row).T
    accurate = accumulator(dsources.dtype)
    assert_close(dweights, expected_weights, accurate, terms, factor=LAMBDA[dsources.dtype] / RELATIVE[accurate])


def check(sources, weights, g):
    """One forward and backward against the oracle."""
    stacked = isinstance(sources, torch.Tensor)
    leaves = [t.detach().requires_grad_() for t in ([sources] if stacked else sources)]
    weights = weights.detach().requires_grad_()
    before = [t.detach().clone() for t in (*leaves, weights)]
    out = fastmix.convex_combination(leaves[0] if stacked else leaves, weights)
    assert out.dtype == leaves[0].dtype
    dweights, *dsources = torch.autograd.grad(out, (weights, *leaves), g)
    assert dweights.dtype == weights.dtype
    values = numpy(before[0] if stacked else torch.stack([t.contiguous() for t in before[:-1]]))
    check_values(out, values, numpy(weights))
    dsources = dsources[0] if stacked else torch.stack([t.contiguous() for t in dsources])
    check_gradients(dsources, dweights, numpy(g), values, numpy(weights))
    assert all(torch.equal(t, copy) for t, copy in zip((*leaves, weights), before, strict=True))
    return out


# The oracle: two other derivations


def test_gradients_by_finite_differences():
    rng = np.random.default_rng(0)
    sources, weights, g = rng.normal(size=(3, 4, 2, 5)), rng.normal(size=(4, 3)), rng.normal(size=(4, 2, 5))
    expected = differences(lambda s, w: np.sum(g * reference.convex_combination(s, w)), sources, weights)
    for ours, theirs in zip(reference.convex_combination_grad(g, sources, weights), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8)


def test_the_oracle_is_a_batch_of_matrix_products():
    """A row of weights times the matrix of a row's sources, by torch's bmm and its autograd."""
    sources = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 6, dtype=torch.float64)
    out = torch.bmm(weights.unsqueeze(1), sources.transpose(0, 1)).squeeze(1)
    np.testing.assert_allclose(reference.convex_combination(numpy(sources), numpy(weights)), numpy(out), atol=1e-14)
    expected = torch.autograd.grad(out, (sources, weights), g)
    ours = reference.convex_combination_grad(numpy(g), numpy(sources), numpy(weights))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, numpy(b), atol=1e-14)


# Values and gradients


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_the_oracle(dtype, device):
    for n, shape in enumerate(SHAPES):
        for stacked in (False, True):
            check(*batch(shape, (3, 1, 4, 2)[n % 4], dtype, device, stacked))


@pytest.mark.parametrize("stacked", [False, True])
def test_sixteen_sources(stacked, device):
    for shape in ((3, 2, 5), (2, 700), (5,)):
        check(*batch(shape, 16, torch.float32, device, stacked))


def test_dense_layouts_are_kept(device):
    sources, weights, g = batch((4, 3, 6, 5), 3, torch.float32, device)
    for layout in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),  # rows inside
        lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),  # rows innermost
        lambda t: t.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
    ):
        laid = [layout(t) for t in sources]
        assert check(laid, weights, layout(g)).stride() == laid[0].stride()
        check(laid, weights, g)
        mixed = [laid[0], sources[1], laid[2]]
        assert check(mixed, weights, g).stride() == laid[0].stride()  # the first one's
        stacked = torch.stack(laid)
        check(stacked, weights, g)
        images = torch.empty_strided((3, *laid[0].shape), (laid[0].numel(), *laid[0].stride()), device=device).copy_(stacked)
        assert check(images, weights, g).stride() == laid[0].stride()


def test_strided_and_expanded_inputs(device):
    sources, weights, g = batch((4, 3, 6, 5), 3, torch.float32, device)
    wide = torch.randn(3, 8, 6, 9, 11, device=device)
    for stack in (
        wide[:, ::2, :3, :6, :5],
        wide[:, :4, ::2, 1:7, 3:8],
        wide[:, 4:, 3:, :6, ::2][..., :5],
        wide[:, :4, :3].flip(3)[..., :6, :5],
        wide[:1, :4, :3, :6, :5].expand(3, 4, 3, 6, 5),
        wide[:, :1, :3, :6, :5].expand(3, 4, 3, 6, 5),
        wide[:, :4, :1, :6, :5].expand(3, 4, 3, 6, 5),
        torch.stack(sources, 1).transpose(0, 1),  # sources of a row side by side
        torch.stack(sources, -1).movedim(-1, 0),
    ):
        check(stack, weights, g)
        check(list(stack), weights, g)
    check([wide[0, ::2, :3, :6, :5], sources[1], wide[1, 2:6, 2:5, :6, :5]], weights, g)  # rows at other distances
    check(sources, weights, g[:1, :1, :1, :1].expand(4, 3, 6, 5))
    check(sources, weights[1:2].expand(4, 3), g)
    check(sources, weights.T.contiguous().T, g)
    check(sources, torch.stack((weights, weights), 2)[..., 1], g)
    check(sources, torch._neg_view(-weights), torch._neg_view(-g))
    check([torch._neg_view(-t) for t in sources], weights, g)
    check(torch._neg_view(-torch.stack(sources)), weights, g)
    odd = torch.randn(4 * 3 * 6 * 5 + 1, device=device)[1:].view(4, 3, 6, 5)  # not aligned
    check([odd, *sources[1:]], weights, g)
    apart = torch.randn(3 * 33, device=device).as_strided((3, 4, 8), (33, 8, 1))  # aligned rows in a stack that is not
    check(apart, weights, torch.randn(4, 8, device=device))


def test_the_same_tensor_twice(device):
    (x, other), weights, g = batch((4, 6), 2, torch.float64, device)
    weights = torch.rand(4, 3, dtype=torch.float64, device=device)
    x, w = x.requires_grad_(), weights.clone().requires_grad_()
    dx, dw = torch.autograd.grad(fastmix.convex_combination((x, other, x), w), (x, w), g)
    same(dx, (weights[:, :1] + weights[:, 2:]) * g)
    same(dw, torch.stack([(g * t).sum(1) for t in (x, other, x)], 1).detach())


def test_weights_of_another_precision(device):
    """float64 weights of float32 sources have a float64 gradient; of float64 sources they are used as they are."""
    sources, weights, g = batch((4, 6), 2, torch.float32, device)
    w = weights.double().requires_grad_()
    (dw,) = torch.autograd.grad(fastmix.convex_combination(sources, w), w, g)
    assert dw.dtype == torch.float64
    assert torch.equal(fastmix.convex_combination(sources, w), fastmix.convex_combination(sources, weights))
    exact = [t.double() for t in sources]
    check(exact, torch.rand(4, 2, dtype=torch.float64, device=device), g.double())
    assert fastmix.convex_combination(exact, weights).dtype == torch.float64


def test_one_rounding(device):
    """Summed in float32: bfloat16 would lose the small terms one by one."""
    one, small = torch.ones(1, 8, dtype=torch.bfloat16, device=device), torch.full((1, 8), 2.0**-9, dtype=torch.bfloat16)
    out = fastmix.convex_combination((one, *[small.to(device)] * 8), torch.ones(1, 9, device=device))
    assert torch.equal(out, torch.full_like(one, 1 + 2**-6))


def test_what_has_weight_0_is_not_looked_at(device):
    bad = torch.tensor([[float("inf"), float("nan")], [float("nan"), -float("inf")], [1.0, 2.0]], device=device)
    good = torch.tensor([[1.5, -2.0], [3e38, -3e38], [5.0, 6.0]], device=device)
    weights = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]], device=device)
    expected = torch.tensor([[1.5, -2.0], [3e38, -3e38], [3.0, 4.0]], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = bad.to(dtype), good.to(dtype)
        for pair, w in (((a, b), weights), ((b, a), weights.flip(1)), (torch.stack((a, b)), weights)):
            assert torch.equal(fastmix.convex_combination(pair, w), expected.to(dtype))
        assert torch.equal(fastmix.convex_combination((a, a), 0 * weights), torch.zeros_like(a))
        spoilt = fastmix.convex_combination((a, b), 1 - weights / 2)
        assert not torch.isfinite(spoilt[:2]).any()  # in their own rows
        assert torch.isfinite(spoilt[2]).all()
    a, b = (t.clone().requires_grad_() for t in (good, good))
    g = torch.tensor([[float("inf"), float("nan")], [1.0, 2.0], [3.0, 4.0]], device=device)
    fastmix.convex_combination((a, b), weights).backward(g)
    assert torch.equal(a.grad, torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.5, 2.0]], device=device))
    assert torch.equal(b.grad[1:], torch.tensor([[1.0, 2.0], [1.5, 2.0]], device=device))
    assert not torch.isfinite(b.grad[0]).any()


def test_weights_that_are_no_numbers_spoil_their_row_alone(device):
    sources, weights, _ = batch((3, 5), 2, torch.float32, device)
    weights[1, 0], weights[2, 1] = float("nan"), float("inf")
    out = fastmix.convex_combination(sources, weights)
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()
    assert torch.isinf(out[2]).all()


def test_a_weight_of_1_alone_copies(device):
    sources, _, _ = batch((4, 3, 700), 3, torch.float32, device)
    choice = torch.tensor([2, 0, 1, 2], device=device)
    out = fastmix.convex_combination(sources, F.one_hot(choice, 3).float())
    assert torch.equal(out, torch.stack(sources)[choice, torch.arange(4, device=device)])


@pytest.mark.slow_interpreted
def test_same_bits_however_batches_are_stored(device):
    for shape, dtype in itertools.product([(4, 3, 12, 12), (6, 5, 40, 33)], [torch.float32, torch.bfloat16, torch.float64]):
        sources, weights, _ = batch(shape, 3, dtype, device)
        expected = fastmix.convex_combination(sources, weights)
        others = [stored_otherwise(source) for source in sources]
        for how in others[0]:
            assert same_bits(fastmix.convex_combination([other[how] for other in others], weights), expected), how


def test_same_input_same_bits(device):
    for stacked in (False, True):
        sources, weights, g = batch((9, 3, 16, 16), 3, torch.float32, device, stacked)
        weights.requires_grad_()
        first, second = (torch.autograd.grad(fastmix.convex_combination(sources, weights), weights, g) for _ in range(2))
        assert torch.equal(first[0], second[0])
        other = fastmix.convex_combination(list(sources), weights.detach())
        assert torch.equal(fastmix.convex_combination(sources, weights.detach()), other)


def test_retained_graphs(device):
    sources, weights, g = batch((4, 6), 2, torch.float32, device)
    leaves = [t.requires_grad_() for t in (*sources, weights)]
    out = fastmix.convex_combination(sources, weights)
    first = torch.autograd.grad(out, leaves, g, retain_graph=True)
    twice = torch.autograd.grad(out, leaves, 2 * g, retain_graph=True)
    again = torch.autograd.grad(out, leaves, g)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, twice, strict=True))


# Only what is needed


@pytest.mark.parametrize("needs", ["ww", "w.", ".w", "..", "W", "S", "WS"])
def test_only_what_is_needed_is_computed(needs, device, monkeypatch):
    """Gradients of those who ask; the sources are kept only for the weights' gradient."""
    sources, weights, g = batch((4, 6), 2, torch.float32, device, stacked=needs.isupper())
    if needs.isupper():
        leaves = [weights] * ("W" in needs) + [sources] * ("S" in needs)
    else:
        leaves = [weights] * (needs == "..") + [t for t, flag in zip(sources, needs, strict=True) if flag == "w"]
    for t in leaves:
        t.requires_grad_()
    backend = fastmix._backend.of(weights)
    seen, saved = [], []
    real = backend.convex_combination_bwd

    def watched(*arguments):
        results = real(*arguments)
        seen.append((arguments[-2:], results))
        return results

    monkeypatch.setattr(backend, "convex_combination_bwd", watched)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        out = fastmix.convex_combination(sources, weights)
    gradients = torch.autograd.grad(out, leaves, g)
    (((need, need_dweights), (dsources, dweights)),) = seen
    assert len(saved) == 1 + need_dweights * (1 if needs.isupper() else 2)
    assert need_dweights == (weights.requires_grad) == (dweights is not None)
    if needs.isupper():
        assert need == ("S" in needs) == (dsources is not None)
    else:
        assert need == tuple(flag == "w" for flag in needs) == tuple(t is not None for t in dsources)
    expected = reference.convex_combination_grad(numpy(g), numpy(torch.stack(tuple(sources))), numpy(weights))
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf is weights:
            truth = expected[1]
        else:
            truth = expected[0] if leaf is sources else expected[0][[leaf is t for t in sources].index(True)]
        np.testing.assert_allclose(numpy(gradient), truth, rtol=1e-5, atol=1e-5)


def test_no_gradient_no_graph(device):
    sources, weights, _ = batch((4, 6), 2, torch.float32, device)
    assert fastmix.convex_combination(sources, weights).grad_fn is None
    with torch.no_grad():
        assert not fastmix.convex_combination(sources, weights.requires_grad_()).requires_grad
    assert fastmix.convex_combination(sources, weights).requires_grad


class Made(TorchDispatchMode):
    """Bytes of all that is made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        fresh = [t for t in fresh if t.device.type != "meta"]
        self.sizes += [t.untyped_storage().nbytes() for t in fresh if func._schema.returns and not func.is_view]
        return out


@pytest.mark.no_poison
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory_is_small_on_a_cpu(dtype):
    sources, weights, g = batch((16, 3, 256, 256), 3, dtype)
    room = 2 * _torch.sizes.MIX_BLOCK_BYTES
    size = g.nbytes
    for either, need in ((tuple(sources), (True, False, True)), (torch.stack(sources), True)):
        with Made() as made:
            _torch.convex_combination_fwd(either, weights)
        assert {n for n in made.sizes if n > room} == {size}
        with Made() as made:
            _torch.convex_combination_bwd(g, either, weights, g.stride(), need, True)
        assert {n for n in made.sizes if n > room} == ({size} if isinstance(need, tuple) else {3 * size})


WAYS = {"blocks of a few rows": 700, "one row a block": 1, "whole": 1 << 40}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_cpus_blocks(way, dtype, monkeypatch):
    monkeypatch.setattr(_torch.sizes, "MIX_BLOCK_BYTES", WAYS[way])
    with fastmix.backend("torch"):
        for shape in ((7, 2, 5, 6), (5, 40), (9,), (1, 3, 4)):
            for stacked in (False, True):
                sources, weights, g = batch(shape, 3, dtype, stacked=stacked)
                check(sources, weights, g)
                check(sources, weights.abs() + 0.1, g)
        laid = [t.contiguous(memory_format=torch.channels_last) for t in batch((7, 3, 5, 6), 3, dtype)[0]]
        weights = torch.rand(7, 3, dtype=accumulator(dtype))
        assert check(laid, weights, laid[0] + 1).stride() == laid[0].stride()
        hostile = torch.stack(laid)
        hostile[1, 3:] = float("nan")
        weights[3:, 1] = 0
        assert torch.isfinite(fastmix.convex_combination(hostile, weights)).all()


def test_on_devices_without_kernels():
    """Whole expressions, where there is no cache to work in."""
    with fastmix.backend("torch"):
        for stacked in (False, True):
            sources, weights, _ = batch((4, 3, 5), 2, torch.bfloat16, "meta", stacked)
            leaves = [t.requires_grad_() for t in (weights, *([sources] if stacked else sources[:1]))]
            out = fastmix.convex_combination(sources, weights)
            gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
            assert [(t.shape, t.dtype) for t in gradients] == [(t.shape, t.dtype) for t in leaves]
            assert (out.shape, out.dtype) == ((4, 3, 5), torch.bfloat16)


# Derivatives of derivatives, transforms, programs


def plain(sources, weights):
    return sum(weights[:, k].view(-1, *[1] * (t.dim() - 1)) * t for k, t in enumerate(sources))


@pytest.mark.slow_interpreted
def test_second_derivatives(device):
    """A backward that launches a kernel would return silently wrong second derivatives."""
    for stacked in (False, True):
        sources, weights, _ = batch((3, 2), 2, torch.float64, device, stacked)
        leaves = [t.requires_grad_() for t in (weights, *([sources] if stacked else sources))]

        def op(w, *s, stacked=stacked):
            return fastmix.convex_combination(s[0] if stacked else s, w)

        assert torch.autograd.gradcheck(op, leaves)
        assert torch.autograd.gradgradcheck(op, leaves)
        results = []
        for function in (op, lambda w, *s, stacked=stacked: plain(s[0] if stacked else s, w)):
            gradients = torch.autograd.grad((function(*leaves) ** 3).sum(), leaves, create_graph=True)
            results.append(torch.autograd.grad(sum(t.square().sum() for t in gradients), leaves))
        same(*results)


def test_second_derivatives_of_some(device):
    (a, b), weights, _ = batch((4, 3), 2, torch.float64, device)
    for leaves in ((a,), (weights,)):
        for t in (a, b, weights):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        results = []
        for function in (fastmix.convex_combination, plain):
            (gradient,) = torch.autograd.grad(
                (function((a, b, a), torch.cat((weights, weights[:, :1]), 1)) ** 3).sum(), leaves, create_graph=True
            )
            results.append(torch.autograd.grad(gradient.square().sum(), leaves))
        same(*results)


TRANSFORMS = {
    "grad": lambda f, s, w: torch.func.grad(lambda s, w: f(s, w).square().sum(), (0, 1))(s, w),
    "jvp": lambda f, s, w: torch.func.jvp(f, (s, w), (s.cos(), w.sin())),
    "jacrev": lambda f, s, w: torch.func.jacrev(f, (0, 1))(s, w),
    "hessian": lambda f, s, w: torch.func.hessian(lambda s, w: f(s, w).square().sum(), (0, 1))(s, w),
    "vmap over weights": lambda f, s, w: torch.func.vmap(f, (None, 0))(s, torch.stack((w, 1 - w))),
    "vmap over sources": lambda f, s, w: torch.func.vmap(f, (2, None), 1)(torch.stack((s, s.cos()), 2), w),
    "vmap of grad": lambda f, s, w: torch.func.vmap(torch.func.grad(lambda s, w: f(s, w).square().sum(), (0, 1)))(
        torch.stack((s, s.cos())), torch.stack((w, 1 - w))
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_and_forward_mode(transform, device):
    sources, weights, _ = batch((4, 5), 3, torch.float64, device, stacked=True)
    expected = TRANSFORMS[transform](plain, sources, weights)
    same(TRANSFORMS[transform](fastmix.convex_combination, sources, weights), expected)
    same(TRANSFORMS[transform](lambda s, w: fastmix.convex_combination(list(s.unbind(0)), w), sources, weights), expected)


def test_forward_mode_and_batched_backward(device):
    sources, weights, _ = batch((4, 5), 3, torch.float64, device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weights, weights.cos())
        tangent = torch.autograd.forward_ad.unpack_dual(fastmix.convex_combination(sources, dual)).tangent
    same(tangent, plain(sources, weights.cos()))
    x, weights = sources[0].requires_grad_(), weights.requires_grad_()
    out = fastmix.convex_combination(sources, weights)
    many = torch.eye(20, dtype=torch.float64, device=device).view(20, 4, 5)
    rows = torch.autograd.grad(out, (x, weights), many, is_grads_batched=True)
    expected = torch.autograd.functional.jacobian(lambda x, w: plain((x, *sources[1:]), w), (x.detach(), weights.detach()))
    for ours, theirs in zip(rows, expected, strict=True):
        same(ours, theirs.reshape(ours.shape))


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.parametrize("stacked", [False, True])
def test_compiled_gradients_are_the_eager_ones(stacked, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    program = torch.compile(fastmix.convex_combination, backend=counter, fullgraph=True)
    for N in (6, 3, 5):
        sources, weights, g = batch((N, 3, 4, 2), 3, torch.float32, device, stacked)
        if not stacked:
            sources = [
                sources[0].contiguous(memory_format=torch.channels_last),
                sources[1],
                sources[2][:, :, :, :1].expand(N, 3, 4, 2),
            ]
        leaves = [t.detach().requires_grad_() for t in (weights, *([sources] if stacked else sources[:2]))]
        either = leaves[1] if stacked else (*leaves[1:], sources[2])
        results = []
        for op in (program, fastmix.convex_combination):
            out = op(either, leaves[0])
            results.append((out, out.stride(), *torch.autograd.grad(out, leaves, g)))
        same(*results)
    assert counter.frame_count <= 2  # the second batch size makes it a variable
    (name,) = {str(n.target) for graph in counter.graphs for n in graph.graph.nodes if "fastmix" in str(n.target)} or {None}
    assert name in (None, "fastmix.convex_combination.default")


@pytest.mark.no_poison
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    class AugMix(torch.nn.Module):
        def forward(self, x, weights):
            return fastmix.convex_combination((x, x.flip(3), x.roll(1, 2)), weights)

    N = torch.export.Dim("N", min=2)
    arguments = torch.randn(4, 3, 5, 5), torch.rand(4, 3)
    program = torch.export.export(AugMix(), arguments, dynamic_shapes=({0: N}, {0: N}), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if "fastmix" in str(node.target)]
    assert names == ["fastmix.convex_combination.default"]
    x, weights = torch.randn(7, 3, 5, 5), torch.rand(7, 3)
    same(program.module()(x, weights), plain((x, x.flip(3), x.roll(1, 2)), weights))


# Bad input


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            {"sources": 3},
            TypeError,
            r"sources: expected a tensor \[K, N, ...\] or a sequence of tensors \[N, ...\], got 3 \(int\)",
        ),
        ({"sources": None}, TypeError, "sources: .*NoneType"),
        ({"sources": (t for t in (X, X))}, TypeError, "sources: .*generator"),
        ({"sources": {"a": X}}, TypeError, "sources: .*dict"),
        ({"sources": np.zeros((2, 4, 6))}, TypeError, "sources: .*ndarray"),
        ({"sources": []}, ValueError, "sources: expected from 1 to 16 tensors, got 0"),
        ({"sources": [X] * 17}, ValueError, "sources: expected from 1 to 16 tensors, got 17"),
        ({"sources": torch.zeros(17, 4, 6)}, ValueError, r"sources: expected shape .* K from 1 to 16, got .*\[17, 4, 6\]"),
        ({"sources": torch.zeros(0, 4, 6)}, ValueError, r"sources: expected shape .* K from 1 to 16, got .*\[0, 4, 6\]"),
        ({"sources": torch.zeros(4)}, ValueError, r"sources: expected shape \[K, N, ...\], got .*\[4\]"),
        ({"sources": torch.zeros(2, 4, 6, dtype=torch.int64)}, TypeError, "sources: expected a float16.*int64"),
        ({"sources": torch.zeros(2, 4, 6).to_sparse()}, TypeError, r"sources: expected a dense \(strided\) tensor"),
        ({"sources": [X.tolist(), X]}, TypeError, r"sources\[0\]: expected a float16, .*list"),
        ({"sources": [torch.zeros(()), torch.zeros(())]}, ValueError, r"sources\[0\]: expected shape \[N, ...\]"),
        ({"sources": [X, None]}, TypeError, r"sources\[1\]: expected a float32 tensor, as sources\[0\], got None"),
        ({"sources": [X, X.double()]}, TypeError, r"sources\[1\]: expected a float32 tensor, .*float64"),
        ({"sources": [X, X.bfloat16()]}, TypeError, r"sources\[1\]: expected a float32 tensor, .*bfloat16"),
        ({"sources": [X, X.to_sparse()]}, TypeError, r"sources\[1\]: expected a dense"),
        ({"sources": [X, X[:3]]}, ValueError, r"sources\[1\]: expected shape \[4, 6\], as sources\[0\], got .*\[3, 6\]"),
        ({"sources": [X, X[:, :1]]}, ValueError, r"sources\[1\]: expected shape \[4, 6\]"),
        ({"sources": [X, X.to("meta")]}, ValueError, r"sources\[1\]: expected a tensor on cpu, got .*meta"),
        ({"weights": [[0.5, 0.5]] * 4}, TypeError, "weights: expected a float32 or float64 tensor .*list"),
        ({"weights": 0.5}, TypeError, "weights: .*float"),
        ({"weights": None}, TypeError, "weights: .*NoneType"),
        ({"weights": torch.zeros(4, 2, dtype=torch.bfloat16)}, TypeError, "weights: .*bfloat16"),
        ({"weights": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "weights: .*int64"),
        ({"weights": torch.zeros(4, 2).to_sparse()}, TypeError, "weights: .*(dense|sparse)"),
        ({"weights": torch.zeros(2, 4)}, ValueError, r"weights: expected shape \[4, 2\], a weight .*, got .*\[2, 4\]"),
        ({"weights": torch.zeros(2)}, ValueError, r"weights: expected shape \[4, 2\]"),
        ({"weights": torch.zeros(4, 3)}, ValueError, r"weights: expected shape \[4, 2\]"),
        ({"weights": torch.zeros(4, 2, 1)}, ValueError, r"weights: expected shape \[4, 2\]"),
        ({"weights": torch.zeros(4, 2, device="meta")}, ValueError, "weights: expected a tensor on cpu, got .*meta"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
)
def test_bad_input(change, kind, words):
    arguments = {"sources": [X, X], "weights": torch.zeros(4, 2), **change}
    with pytest.raises(kind, match=words):
        fastmix.convex_combination(arguments["sources"], arguments["weights"])


# What it costs


@pytest.fixture
def launches(monkeypatch):
    """The op reaches its launchers on any device, and what they would launch is listed instead: (kernel, grid)."""
    if not TRITON:
        pytest.skip(NO_TRITON)
    from fastmix.kernels import api, convex_combination

    listed = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: listed.append((self.name, grid))

    for name in [name for name in vars(convex_combination) if name.endswith("_kernel")]:
        monkeypatch.setattr(convex_combination, name, Kernel(name))
    monkeypatch.setattr(fastmix._backend, "of", lambda tensor: api)
    return listed


@pytest.mark.no_poison
def test_nothing_is_stacked_or_copied_for_a_launch(launches):
    """What a launcher makes is the result, or the gradients that are asked for, stacked where the sources are."""
    sources, weights, g = batch((4, 3, 32, 32), 3)
    api = fastmix._backend.of(weights)
    size = g.nbytes
    for either, need in ((tuple(sources), (True, False, True)), (torch.stack(sources), True)):
        for call, expected in (
            (lambda: api.convex_combination_fwd(either, weights), [size]),  # noqa: B023
            (
                lambda: api.convex_combination_bwd(g, either, weights, g.stride(), need, True),  # noqa: B023
                [size] * 2 if isinstance(need, tuple) else [3 * size],
            ),
        ):
            with Made() as made:
                call()
            assert [n for n in made.sizes if n >= size // 8] == expected
    assert len(launches) == 4


def test_one_launch_forwards_and_one_backwards(launches):
    """Whatever the batch, and on one axis: the others end at 65,535 programs."""
    for N, K, stacked in ((1, 1, False), (7, 16, False), (300, 3, True), (70000, 4, False)):
        launches.clear()
        shape = (N, 3, 64, 64)
        sources = [torch.zeros(shape, device="meta", requires_grad=True) for _ in range(K)]
        weights = torch.zeros(N, K, device="meta", requires_grad=True)
        fastmix.convex_combination(torch.stack(sources) if stacked else sources, weights).sum().backward()
        assert [name for name, _ in launches] == ["_convex_combination_fwd_kernel", "_convex_combination_bwd_kernel"]
        assert all(len(grid) == 1 and grid[0] < 2**31 for _, grid in launches)
    assert all(grid[0] > 65535 for _, grid in launches)


COMPILATIONS = """
import json, sys
import torch
from fastmix.bench.programs import api
sys.path.insert(0, "tests")
from launched import programs
found = {}
for N in (64, 63, 17, 2, 1):
    for M in (48, 54, 33):
        for stacked in (False, True):
            for need_dweights in (False, True):
                sources = torch.ones(3, N, M) if stacked else tuple(torch.ones(N, M) for _ in range(3))
                weights, g = torch.rand(N, 3), torch.ones(N, M)
                need = True if stacked else (True, False, True)
                def call():
                    api().convex_combination_fwd(sources, weights)
                    api().convex_combination_bwd(g, sources, weights, g.stride(), need, need_dweights)
                for name, program in programs(call):
                    found.setdefault(f"{name} {M} {stacked} {need_dweights}", set()).add(program)
json.dump({key: len(value) for key, value in found.items()}, sys.stdout)
"""


@pytest.mark.slow
def test_another_batch_size_compiles_nothing():
    if not TRITON:
        pytest.skip(NO_TRITON)
    ran = subprocess.run(
        [sys.executable, "-c", COMPILATIONS],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    programs = json.loads(ran.stdout)
    assert len(programs) == 24
    assert set(programs.values()) == {1}


def test_bytes_are_those_of_the_formula():
    """Every source that has weight is read once and nothing else of that size: half the weights 0, half the reads."""
    if not INTERPRETER:
        pytest.skip(NO_INTERPRETER if TRITON else NO_TRITON)
    from fastmix.bench import traffic
    from fastmix.kernels import api

    sources, g = tuple(torch.ones(4, 2048) for _ in range(4)), torch.ones(4, 2048)
    size = g.nbytes
    everything, half = torch.full((4, 4), 0.25), torch.tensor([[0.5, 0.0, 0.5, 0.0]]).repeat(4, 1)
    for either in (sources, torch.stack(sources)):
        for weights, read in ((everything, 4), (half, 2)):
            with traffic.count() as moved:
                api.convex_combination_fwd(either, weights)
            (count,) = moved.values()
            assert count.sectors == pytest.approx((read + 1) * size, rel=0.03)
        need = (True,) * 4 if isinstance(either, tuple) else True
        for need_dweights, times in ((False, 5), (True, 9)):  # g, four gradients; four sources
            with traffic.count() as moved:
                api.convex_combination_bwd(g, either, everything, g.stride(), need, need_dweights)
            assert moved["_convex_combination_bwd_kernel"].sectors == pytest.approx(times * size, rel=0.03)


def test_rows_and_sources_far_apart(device):
    """Strides beyond 32 bits, without touching the memory between."""
    storage = torch.UntypedStorage(2 * (2**31 + 2**30 + 64), device=device)
    far = torch.tensor([], dtype=torch.float16, device=device)
    weights = torch.tensor([[0.5, 0.5], [0.25, 0.75]], device=device)
    for strides in ((2**30, 2**31, 1), (2**31, 2**30, 1)):
        sources = far.set_(storage, 0, (2, 2, 16), strides)
        for n, value in enumerate((1, 2, 5, 8)):
            sources.view(2, 2, 16)[n // 2, n % 2] = value
        leaf, w = sources.detach().requires_grad_(), weights.clone().requires_grad_()
        for either in (leaf, [leaf[0], leaf[1]]):
            out = fastmix.convex_combination(either, w)
            assert out.tolist() == [[3.0] * 16, [6.5] * 16]
            (dw,) = torch.autograd.grad(out.sum(), w)
            assert dw.tolist() == [[16.0, 80.0], [32.0, 128.0]]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_beyond_32_bit_offsets(device):
    x = torch.empty(5, 2**29 + 3, dtype=torch.bfloat16, device=device).normal_()
    weights = torch.rand(5, 2, device=device, requires_grad=True)
    out = fastmix.convex_combination((x, x), weights)
    assert torch.equal(out[4, -9:], (weights[4, 0] * x[4, -9:].float() + weights[4, 1] * x[4, -9:].float()).bfloat16())
    (dweights,) = torch.autograd.grad(out, weights, torch.ones((), dtype=x.dtype, device=device).expand(x.shape))
    same(dweights[4], x[4].float().sum().expand(2), rtol=1e-3, atol=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_no_host_synchronisation(device):
    sources, weights, g = batch((4, 3, 6, 5), 3, torch.float32, device)
    generator = torch.Generator(device).manual_seed(0)

    def work():
        drawn = fastmix.dirichlet(4, 2, skip=1.0, device=device, generator=generator)
        for w in (drawn, weights):
            for either in (sources, torch.stack(sources)):
                leaves = [t.detach().requires_grad_() for t in (w, *([either] if either is not sources else either))]
                out = fastmix.convex_combination(leaves[1] if either is not sources else leaves[1:], leaves[0])
                torch.autograd.grad(out, leaves, g)

    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Recipes


def test_augmix(device):
    """(1-m)*x + m*sum of w[k]*chain[k], row by row, as in the paper."""
    x = torch.rand(6, 3, 4, 4, device=device)
    chains = [x.flip(3), x.roll(1, 2), 1 - x]
    weights = fastmix.dirichlet(len(x), 3, alpha=1.0, skip=1.0, device=device)
    mixed = fastmix.convex_combination((x, *chains), weights)
    for n in range(len(x)):
        m = numpy(weights)[n, 1:].sum()
        w = numpy(weights)[n, 1:] / m
        expected = (1 - m) * numpy(x[n]) + m * sum(w[k] * numpy(chains[k][n]) for k in range(3))
        np.testing.assert_allclose(numpy(mixed[n]), expected, atol=1e-6)


@pytest.mark.trap("BirdSet#259")
def test_three_way_mixing_with_its_target(device):
    """Images and labels with the same weights, whose gradient comes from both."""
    x, y = torch.randn(5, 7, dtype=torch.float64, device=device), torch.tensor([0, 3, 1, 1, 2], device=device)
    first, second = (torch.randperm(5, device=device) for _ in range(2))
    W = torch.randn(7, 4, dtype=torch.float64, device=device)
    weights = fastmix.dirichlet(5, 3, device=device, dtype=torch.float64).requires_grad_()
    target = SoftTarget(torch.stack((y, y[first], y[second]), 1), weights)
    loss = fastmix.soft_cross_entropy(fastmix.convex_combination((x, x[first], x[second]), weights) @ W, target)
    (gradient,) = torch.autograd.grad(loss, weights)
    w = weights.detach().clone().requires_grad_()
    onehot = F.one_hot(y, 4).double()
    rows = sum(w[:, k, None] * onehot[at] for k, at in enumerate((slice(None), first, second)))
    expected = F.cross_entropy(plain((x, x[first], x[second]), w) @ W, rows, reduction="sum") / w.sum()
    same(loss, expected)
    same(gradient, torch.autograd.grad(expected, w)[0])


# Properties on drawn inputs


counts = st.sampled_from([3, 1, 2, 4])


def drawn_sources(shape, K, dtype, seed):
    """K sources, weights with zeros among them, upstream gradient."""
    rng = generator(seed)
    *sources, g = (torch.randn(shape, generator=rng).to(dtype) for _ in range(K + 1))
    weights = torch.rand(shape[0], K, generator=rng, dtype=accumulator(dtype))
    return sources, weights.mul_(2).sub_(0.5).masked_fill_(torch.rand(weights.shape, generator=rng) < 0.2, 0), g


def combine_and_gradients(g, weights, *sources):
    leaves = [t.detach().requires_grad_() for t in (weights, *sources)]
    out = fastmix.convex_combination(leaves[1:] if len(sources) > 1 or sources[0].dim() == g.dim() else leaves[1], leaves[0])
    return out.detach(), *torch.autograd.grad(out, leaves, g)


@given(shape=batches, K=counts, dtype=dtypes, seed=seeds, places=layout_pairs, stacked=st.booleans())
def test_it_is_the_oracles_in_any_memory(device, shape, K, dtype, seed, places, stacked):
    sources, weights, g = drawn_sources(shape, K, dtype, seed)
    row = "every second" if seed % 2 else "dense"
    inputs = [(torch.stack(sources), places[0])] if stacked else [(t, places[n % 2]) for n, t in enumerate(sources)]
    (g, weights, *sources), (out, dweights, *dsources) = run(
        combine_and_gradients, device, (g, places[1]), (weights, row), *inputs
    )
    values = numpy(sources[0] if stacked else torch.stack([t.contiguous() for t in sources]))
    check_values(out, values, numpy(weights))
    dsources = dsources[0] if stacked else torch.stack([t.contiguous() for t in dsources])
    check_gradients(dsources, dweights, numpy(g), values, numpy(weights))


@given(shape=batches, K=counts, dtype=dtypes, seed=seeds)
def test_rows_may_come_in_any_order(device, shape, K, dtype, seed):
    sources, weights, _ = drawn_sources(shape, K, dtype, seed)
    order = torch.randperm(shape[0], generator=generator(seed)).to(device)
    sources, weights = [t.to(device) for t in sources], weights.to(device)
    out = fastmix.convex_combination([t[order] for t in sources], weights[order])
    assert same_bits(out, fastmix.convex_combination(sources, weights)[order].contiguous())


@given(shape=batches, K=st.integers(2, 4), dtype=dtypes, seed=seeds)
def test_a_source_without_weight_changes_no_bit(device, shape, K, dtype, seed):
    """It may hold what it likes, and may as well not be there."""
    sources, weights, _ = drawn_sources(shape, K, dtype, seed)
    at = seed % K
    weights[:, at] = 0
    sources[at].fill_(float("nan"))
    sources, weights = [t.to(device) for t in sources], weights.to(device)
    out = fastmix.convex_combination(sources, weights)
    others = [k for k in range(K) if k != at]
    assert torch.equal(out, fastmix.convex_combination([sources[k] for k in others], weights[:, others]))


@given(shape=batches, K=counts, seed=seeds)
def test_it_is_linear_and_its_gradients_the_adjoint(device, shape, K, seed):
    """<g, out> is <dsources, sources> and, as out is linear in either, <dweights, weights>."""
    sources, weights, g = drawn_sources(shape, K, torch.float64, seed)
    sources, weights, g = torch.stack(sources).to(device), weights.to(device), g.to(device)
    out, dweights, dsources = combine_and_gradients(g, weights, sources)
    terms = float((g * out).abs().sum()) + float((dsources * sources).abs().sum()) + 1e-300
    for adjoint in (dsources * sources, dweights * weights):
        assert abs(float(adjoint.sum() - (g * out).sum())) <= 1e-12 * terms
    assert same_bits(fastmix.convex_combination(4 * sources, weights), 4 * out)  # a power of two
    assert same_bits(fastmix.convex_combination(sources, 0.5 * weights), 0.5 * out)


@given(shape=batches, K=counts, dtype=dtypes, seed=seeds, value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_a_hostile_value_spoils_only_who_reads_it(device, shape, K, dtype, seed, value):
    sources, weights, _ = drawn_sources(shape, K, dtype, seed)
    if not sources[0].numel():
        return
    row, at = seed % shape[0], seed % K
    sources[at][row].view(-1)[0] = value
    out = numpy(fastmix.convex_combination([t.to(device) for t in sources], weights.to(device)))
    expected = bool(weights[row, at] != 0)
    spoilt = ~np.isfinite(out)
    assert spoilt.sum() == expected
    assert spoilt[row].reshape(-1)[0] == expected
    assert np.array_equal(finite(out), np.where(spoilt, 0, out))
