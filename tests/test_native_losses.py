"""exp and log of the native library, which its losses are made of, against float64."""

import ctypes
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import NO_COMPILER

import fastmix
from fastmix import _torch
from fastmix._native import library

pytestmark = pytest.mark.skipif(bool(fastmix._backend._why_not_native(torch.device("cpu"))), reason=NO_COMPILER)
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-45, 1e-40, 3.4e38, -3.4e38, 88.72, 88.73, -103.9, -104.0, -87.5]


def native(what, x):
    out = np.empty_like(x)
    library.get().fm_exp_log(what, *(ctypes.c_void_p(t.ctypes.data) for t in (x, out)), len(x))
    return out


def any_float32(rng, count):
    return rng.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32).view(np.float32)


def arguments(name):
    """A million numbers: of every size, where the function is not trivial, and special ones."""
    rng = np.random.default_rng(0)
    half = 500_000
    if name == "expm1":  # of [-1, 1]
        sizes = 10.0 ** rng.uniform(-45, 0, half)
        return np.concatenate([rng.uniform(-1, 1, half), rng.choice([-1, 1], half) * sizes]).astype(np.float32)
    if name == "log1p":  # of [0, 1]
        return np.concatenate([rng.uniform(0, 1, half), 10.0 ** rng.uniform(-45, 0, half), [0.0, 1.0]]).astype(np.float32)
    middle = rng.uniform(-110, 95, half) if name == "exp" else np.exp(rng.normal(size=half) * rng.choice([1e-3, 1.0], half))
    return np.concatenate([any_float32(rng, half), middle.astype(np.float32), np.float32(SPECIAL)])


@pytest.mark.parametrize(("what", "name"), list(enumerate(["exp", "log", "log1p", "expm1"])))
def test_two_units_in_the_last_place(what, name):
    x = arguments(name)
    with np.errstate(all="ignore"):
        truth = getattr(np, name)(x.astype(np.float64))
        rounded = truth.astype(np.float32)
    ours = native(what, x)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(truth))
    infinite = np.isinf(rounded)
    np.testing.assert_array_equal(ours[infinite], rounded[infinite])
    at = np.isfinite(rounded)
    unit = np.maximum(np.spacing(np.abs(rounded[at])).astype(np.float64), 2.0**-149)
    error = np.abs(ours[at].astype(np.float64) - truth[at]) / unit
    assert error.max() <= 2


LOSSES = {
    "soft_cross_entropy": lambda z, target: fastmix.soft_cross_entropy(z, target, label_smoothing=0.1),
    "soft_binary_cross_entropy": lambda z, target: fastmix.soft_binary_cross_entropy(z, target, label_smoothing=0.1),
    "js_divergence": lambda z, target: fastmix.js_divergence((z, z.detach() * (3 if torch.is_tensor(target) else 1.01))),
}


@pytest.mark.no_poison
@pytest.mark.parametrize(("op", "kind"), [*itertools.product(LOSSES, ("k-hot", "dense")), ("soft_cross_entropy", "pixels")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_bits_whatever_the_number_of_threads(op, kind, dtype):
    shape = (3, 33, 11, 91) if kind == "pixels" else (300, 333)
    z = torch.randn(shape).to(dtype)
    target = fastmix.SoftTarget(torch.randint(0, shape[1], (shape[0], 2, *shape[2:])), torch.rand(shape[0], 2))
    target = target.dense(333) if kind == "dense" else target
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with fastmix.backend("native"):
                leaf = z.clone().requires_grad_()
                loss = LOSSES[op](leaf, target)
                loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", ["by class", "by pixel"])
def test_logits_of_pixels_run_in_c(stored, dtype, monkeypatch):
    """Also a slice of the images, and an upstream gradient of every pixel; torch is not asked."""
    for name in ("soft_ce_fwd", "soft_ce_bwd", "dense_ce_fwd", "dense_ce_bwd"):
        monkeypatch.setattr(_torch, name, None)
    z = torch.randn(3, 7, 9, 8).to(dtype)
    z = (z.to(memory_format=torch.channels_last) if stored == "by pixel" else z)[1:].requires_grad_()
    hot = fastmix.SoftTarget(torch.randint(0, 7, (2, 2, 9, 8)), torch.rand(2, 2))
    for target in (hot, hot.dense(7), fastmix.MixedRows(hot.dense(7), 0.3, torch.tensor([1, 0]))):
        dense = target.dense() if isinstance(target, fastmix.MixedRows) else hot.dense(7)
        expected = -(dense * z.float().log_softmax(1)).sum(1)
        with fastmix.backend("native"):
            losses = fastmix.soft_cross_entropy(z, target, reduction="none")
            upstream = torch.rand_like(losses)
            (gradient,) = torch.autograd.grad(losses, z, upstream)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, z, upstream)[0])
        assert gradient.stride() == torch.empty_like(z).stride()


def gradients(loss_of, leaves, upstream, backend="native"):
    """Returns the losses of each pixel and the gradients, of two backwards."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    with fastmix.backend(backend):
        losses = loss_of(*leaves)
        return [
            losses.detach(),
            *(g for _ in range(2) for g in torch.autograd.grad(losses, leaves, upstream, retain_graph=True)),
        ]


@pytest.mark.parametrize("kind", ["k-hot", "dense", "mixed"])
def test_one_image_stored_pixel_by_pixel_and_a_target_by_class(kind):
    """A reshape of such a target is a view, whose classes do not lie side by side."""
    z = torch.randn(1, 7, 9, 8).to(memory_format=torch.channels_last)
    classes, weights, rows = torch.randint(0, 7, (1, 2, 9, 8)), torch.rand(1, 2, 9, 8), torch.rand(1, 7, 9, 8)

    def loss(z, *leaf):
        target = fastmix.MixedRows(rows, 0.3, torch.tensor([0]))
        target = target if kind == "mixed" else fastmix.SoftTarget(classes, *leaf) if kind == "k-hot" else leaf[0]
        return fastmix.soft_cross_entropy(z, target, reduction="none", label_smoothing=0.1)

    leaves = [z, *{"k-hot": [weights], "dense": [rows], "mixed": []}[kind]]
    upstream = torch.rand(1, 9, 8)
    for ours, expected in zip(gradients(loss, leaves, upstream), gradients(loss, leaves, upstream, "torch"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pixels", [2, 70])
def test_an_ignored_pixel_has_no_gradient_beside_an_infinite_class_weight(pixels):
    z, labels = torch.randn(2, 4, pixels, requires_grad=True), torch.randint(0, 3, (2, pixels))
    labels[:, 0] = -100
    weight = torch.tensor([1.0, 2, 3, math.inf])
    with fastmix.backend("native"):
        fastmix.soft_cross_entropy(z, labels, weight=weight).backward()
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, labels, weight=weight), z)
    torch.testing.assert_close(z.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["k-hot", "dense"])
@pytest.mark.parametrize(
    ("op", "shape"), [("soft_cross_entropy", (5, 7)), ("soft_cross_entropy", (2, 7, 9)), ("soft_binary_cross_entropy", (5, 7))]
)
def test_upstream_gradients_whose_sign_is_a_bit_of_the_view(op, shape, kind, dtype):
    target = fastmix.SoftTarget(torch.randint(0, 7, (shape[0], 2, *shape[2:])), torch.rand(shape[0], 2, *shape[2:]))
    target = target.dense(7) if kind == "dense" else target
    z, upstream = torch.randn(shape).to(dtype), torch.randn(shape[0], *shape[2:])

    def loss(z):
        return getattr(fastmix, op)(z, target, reduction="none")

    for ours, expected in zip(gradients(loss, [z], torch._neg_view(-upstream)), gradients(loss, [z], upstream), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", ["k-hot", "dense"])
def test_a_hook_stores_the_logits_in_a_way_that_c_does_not_read(kind):
    def by_last_pixel(t):
        return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 2 else t

    z, rows = torch.randn(3, 4, 5, 6), torch.rand(3, 4, 5, 6)
    classes, weights = torch.randint(0, 4, (3, 2, 5, 6)), torch.rand(3, 2, 5, 6)

    def loss(z, leaf):
        return fastmix.soft_cross_entropy(z, fastmix.SoftTarget(classes, leaf) if kind == "k-hot" else leaf, reduction="none")

    leaves, upstream = [z, weights if kind == "k-hot" else rows], torch.rand(3, 5, 6)
    expected = gradients(loss, leaves, upstream)
    with torch.autograd.graph.saved_tensors_hooks(by_last_pixel, lambda t: t):
        hooked = gradients(loss, leaves, upstream)
    for ours, others in zip(hooked, expected, strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sets", [3, 5])
def test_js_divergence_of_sets_whose_number_has_no_exact_inverse(sets):
    """The errors of many rows cancel: 1/3 rounded to float32 would shift all by 3e-8."""
    z = torch.randn(sets, 500, 10, generator=torch.Generator().manual_seed(1))
    log_p = z.double().log_softmax(2)
    truth = (log_p.exp() * (log_p - log_p.logsumexp(0) + math.log(sets))).sum(2).mean(0)
    with fastmix.backend("native"):
        errors = fastmix.js_divergence(z, reduction="none") - truth
    assert abs(errors.mean()) < 5e-9
    assert errors.abs().max() < 2e-7
