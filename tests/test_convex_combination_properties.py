"""Properties of fastmix.convex_combination on drawn inputs, in memory that is watched."""

import numpy as np
import pytest
import torch
from numerics import numpy
from test_convex_combination import check_gradients, check_values
from test_properties import batches, dtypes, finite, generator, given, layout_pairs, run, same_bits, seeds, st

import fastmix

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
counts = st.sampled_from([3, 1, 2, 4])


def drawn(shape, K, dtype, seed):
    """K sources, weights with zeros among them, upstream gradient."""
    rng = generator(seed)
    *sources, g = (torch.randn(shape, generator=rng).to(dtype) for _ in range(K + 1))
    weights = torch.rand(shape[0], K, generator=rng, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return sources, weights.mul_(2).sub_(0.5).masked_fill_(torch.rand(weights.shape, generator=rng) < 0.2, 0), g


def combine_and_gradients(g, weights, *sources):
    leaves = [t.detach().requires_grad_() for t in (weights, *sources)]
    out = fastmix.convex_combination(leaves[1:] if len(sources) > 1 or sources[0].dim() == g.dim() else leaves[1], leaves[0])
    return out.detach(), *torch.autograd.grad(out, leaves, g)


@given(shape=batches, K=counts, dtype=dtypes, seed=seeds, places=layout_pairs, stacked=st.booleans())
def test_it_is_the_oracles_in_any_memory(device, shape, K, dtype, seed, places, stacked):
    sources, weights, g = drawn(shape, K, dtype, seed)
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
    sources, weights, _ = drawn(shape, K, dtype, seed)
    order = torch.randperm(shape[0], generator=generator(seed)).to(device)
    sources, weights = [t.to(device) for t in sources], weights.to(device)
    out = fastmix.convex_combination([t[order] for t in sources], weights[order])
    assert same_bits(out, fastmix.convex_combination(sources, weights)[order].contiguous())


@given(shape=batches, K=st.integers(2, 4), dtype=dtypes, seed=seeds)
def test_a_source_without_weight_changes_no_bit(device, shape, K, dtype, seed):
    """It may hold what it likes, and may as well not be there."""
    sources, weights, _ = drawn(shape, K, dtype, seed)
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
    sources, weights, g = drawn(shape, K, torch.float64, seed)
    sources, weights, g = torch.stack(sources).to(device), weights.to(device), g.to(device)
    out, dweights, dsources = combine_and_gradients(g, weights, sources)
    terms = float((g * out).abs().sum()) + float((dsources * sources).abs().sum()) + 1e-300
    for adjoint in (dsources * sources, dweights * weights):
        assert abs(float(adjoint.sum() - (g * out).sum())) <= 1e-12 * terms
    assert same_bits(fastmix.convex_combination(4 * sources, weights), 4 * out)  # a power of two
    assert same_bits(fastmix.convex_combination(sources, 0.5 * weights), 0.5 * out)


@given(shape=batches, K=counts, dtype=dtypes, seed=seeds, value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_a_hostile_value_spoils_only_who_reads_it(device, shape, K, dtype, seed, value):
    sources, weights, _ = drawn(shape, K, dtype, seed)
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
