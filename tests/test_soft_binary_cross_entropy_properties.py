"""Properties of fastmix.soft_binary_cross_entropy on drawn inputs, in memory that is watched."""

import pytest
import torch
from drawn import (
    drawn_target,
    drawn_upstream,
    dtypes,
    generator,
    given,
    layout_triples,
    logits_shapes,
    reductions,
    run,
    seeds,
    small_logits_shapes,
    smoothings,
    st,
    target_kinds,
)
from numerics import accumulator, numpy
from test_soft_binary_cross_entropy import check

import fastmix
from fastmix import SoftTarget

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
means = st.sampled_from(["mean", "sum"])


def as_target(target):
    return SoftTarget(*target) if isinstance(target, tuple) else target


def losses(z, target, **options):
    return fastmix.soft_binary_cross_entropy(z, as_target(target), reduction="none", **options)


def moved(target, device):
    return tuple(t.to(device) for t in target) if isinstance(target, tuple) else target.to(device)


@given(
    factor=2,
    shape=logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    K=st.sampled_from([2, 1, 5]),
    weighted=st.booleans(),
    smoothing=smoothings,
    threshold=st.sampled_from([None, 0.45]),
    class_reduction=means,
    reduction=reductions,
    places=layout_triples,
)
def test_it_is_the_oracles_in_any_memory(
    device, shape, dtype, seed, kind, K, weighted, smoothing, threshold, class_reduction, reduction, places
):
    rng = generator(seed)
    z = (3 * torch.randn(shape, generator=rng)).to(dtype)
    target = drawn_target(kind, shape, rng, dtype, K=K)
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype)
    w, p = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1 if weighted else None for _ in range(2))
    parts = list(target) if isinstance(target, tuple) else [target]
    options = {"label_smoothing": smoothing, "threshold": threshold, "class_reduction": class_reduction, "reduction": reduction}

    def op(z, upstream, w, p, *parts):
        leaf = parts[-1].detach().requires_grad_() if parts[-1].is_floating_point() else None
        given = SoftTarget(parts[0], leaf) if parts[1:] else parts[0] if leaf is None else leaf
        values = tuple(map(numpy, parts)) if parts[1:] else numpy(parts[0])
        loss = check(z, given, values, leaf, upstream, weight=w, pos_weight=p, **options)
        return (loss.detach(),) if leaf is None else (loss.detach(), leaf.grad)

    inputs = [(part, places[1]) for part in parts]
    run(op, device, (z, places[0]), (upstream, places[2]), (w, "misaligned"), (p, "misaligned"), *inputs)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, kind=target_kinds, smoothing=smoothings)
def test_rows_may_come_in_any_order(device, shape, dtype, seed, kind, smoothing):
    rng = generator(seed)
    z = torch.randn(shape, generator=rng).to(dtype).to(device)
    target = moved(drawn_target(kind, shape, rng, dtype), device)
    order = torch.randperm(shape[0], generator=rng).to(device)
    turned = tuple(t[order] for t in target) if isinstance(target, tuple) else target[order]
    there = losses(z[order], turned, label_smoothing=smoothing)
    here = losses(z, target, label_smoothing=smoothing)[order]
    torch.testing.assert_close(there, here, rtol=1e-6 if here.dtype == torch.float32 else 1e-14, atol=0.0)


@given(shape=small_logits_shapes, seed=seeds, smoothing=st.sampled_from([0.0, 0.25]))
def test_both_sides_are_alike(device, shape, seed, smoothing):
    """The loss of logits -z and targets 1-t is that of z and t, and so is the gradient but for its sign."""
    rng = generator(seed)
    z = torch.randn(shape, generator=rng, dtype=torch.float64).to(device)
    t = (torch.randint(0, 17, shape, generator=rng) / 16).double().to(device)  # 1-t is exact
    results = []
    for sign, target in ((1, t), (-1, 1 - t)):
        leaf = (sign * z).requires_grad_()
        loss = losses(leaf, target, label_smoothing=smoothing)
        results.append((loss, sign * torch.autograd.grad(loss.sum(), leaf)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, threshold=st.sampled_from([None, 0.45]), weighted=st.booleans())
def test_a_component_of_weight_0_changes_nothing(device, shape, dtype, seed, threshold, weighted):
    rng = generator(seed)
    z = torch.randn(shape, generator=rng).to(dtype).to(device)
    classes, weights = moved(drawn_target("k-hot", shape, rng, dtype), device)
    w = torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)).to(device) if weighted else None
    other = torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=rng).to(device)
    more = torch.cat((classes, other), 1), torch.cat((weights, torch.zeros_like(weights[:, :1])), 1)
    one, two = (losses(z, target, weight=w, threshold=threshold) for target in ((classes, weights), more))
    torch.testing.assert_close(one, two, rtol=1e-6 if one.dtype == torch.float32 else 1e-14, atol=0.0)


@given(shape=small_logits_shapes, seed=seeds, kind=st.sampled_from(["k-hot", "k-hot per pixel"]), weighted=st.booleans())
def test_a_dense_target_is_as_good(device, shape, seed, kind, weighted):
    rng = generator(seed)
    z = torch.randn(shape, generator=rng, dtype=torch.float64).to(device)
    target = SoftTarget(*moved(drawn_target(kind, shape, rng, torch.float64, K=3), device))
    w, p = (torch.rand(shape[1], generator=rng, dtype=torch.float64).to(device) if weighted else None for _ in range(2))
    for threshold in (None, 0.45):
        hot, dense = (losses(z, t, weight=w, pos_weight=p, threshold=threshold) for t in (target, target.dense(shape[1])))
        torch.testing.assert_close(hot, dense)
