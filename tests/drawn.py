"""What Hypothesis draws for tests of properties: shapes, dtypes, layouts, options and a seed.

Tensors are made from the seed, so that an example stays small. Every run draws the same examples. The first value of a list is
what a failing example is simplified to.
"""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from memory import Memory, guarded_allocations, same_bits
from numerics import FLOATS, accumulator

from fastmix import Mix, MixedRows, SoftTarget

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError:  # its tests are skipped
    hypothesis, st = None, mock.MagicMock()


INFINITE, NAN = float("inf"), float("nan")
EXAMPLES = {"torch": 40, "native": 40, "interpreter": 4, "gpu": 12}  # on a GPU nearly every example is compiled anew
REDUCTIONS = ("mean", "none", "sum")


def given(factor=1, **strategies):
    """hypothesis.given on every backend; fewer examples where they are slow, `factor` times as many where much is drawn."""

    def decorate(test):
        def run(device, request):
            if hypothesis is None:
                pytest.skip("needs hypothesis")
            profile = hypothesis.settings(
                max_examples=factor * EXAMPLES[request.node.callspec.params["device"]],
                derandomize=True,
                database=None,
                deadline=None,
                phases=[p for p in hypothesis.Phase if p.name != "explain"],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            profile(hypothesis.given(**strategies)(test))(device=device)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        for numpys in (".*encountered in", "All-NaN slice encountered"):  # NaN and infinities are meant to be computed with
            run = pytest.mark.filterwarnings(f"ignore:{numpys}:RuntimeWarning")(run)
        return pytest.mark.slow_interpreted(run)

    return decorate


seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(FLOATS)
rows = st.sampled_from([4, 1, 2, 0, 3, 5, 7])  # the first and the last are drawn most
small_sizes = st.lists(st.sampled_from([3, 1, 2, 5, 8]), max_size=4).map(tuple)
odd_sizes = st.sampled_from([(33,), (0,), (3, 700), (1, 1, 1), (4, 0, 2), (2, 17, 33)])


batches = st.one_of(
    *[st.builds(lambda n, inner: (n, *inner), rows, sizes) for sizes in (small_sizes, odd_sizes)],
    st.sampled_from([(4, 5000), (3, 3, 70, 80), (9, 2100)]),  # beyond a tile, and beyond what is computed in one piece
)


classes_and_pixels = st.one_of(
    st.sampled_from([(5,), (2,), (3,), (8,), (1,), (10,)]),
    st.sampled_from([(33,), (100,), (4, 0), (1000,), (1023,), (2, 3), (5, 1), (3, 2, 1, 2), (7, 4, 3)]),
)


logits_shapes = st.builds(lambda n, inner: (n, *inner), rows, classes_and_pixels)
small_logits_shapes = st.builds(lambda n, inner: (n, *inner), rows, st.sampled_from([(5,), (2,), (9,), (33,), (4, 3), (1,)]))
LAYOUTS = ("dense", "misaligned", "rows apart", "every second", "transposed", "channels last", "expanded rows", "expanded")
layout_pairs, layout_triples = (st.sampled_from(list(itertools.product(LAYOUTS, repeat=n))) for n in (2, 3))
partners = st.sampled_from(["any", "permutation", "one", "self"])
smoothings = st.sampled_from([0.0, 0.1, 0.3, 1.0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def partners_of(kind, N, rng):
    if kind == "any":
        return torch.randint(0, max(N, 1), (N,), generator=rng)
    if kind == "permutation":
        return torch.randperm(N, generator=rng)
    return torch.arange(N) if kind == "self" else torch.full((N,), N // 2)


def coefficients(N, dtype, rng):
    """lam in [-0.5, 1.5], both ends among them."""
    lam = torch.rand(N, dtype=accumulator(dtype), generator=rng) * 2 - 0.5
    end = torch.randint(0, 4, (N,), generator=rng)
    return torch.where(end < 2, end.to(lam.dtype), lam)


def boxes_of(dims, shape, rng):
    """Boxes over the last dims dimensions, empty ones and ones that reach outside among them."""
    dims = min(dims, len(shape) - 1)
    corners = [torch.randint(-2, n + 3, (2, shape[0]), generator=rng) for n in shape[len(shape) - dims :]]
    return torch.cat([torch.stack([c[side] for c in corners], 1) for side in (0, 1)], 1) if dims else None


def run(op, device, *inputs):
    """op(*inputs) -> tensors, on inputs (values, layout), or None, in memory that is watched; twice, in different surroundings,
    to the same bits. Gives the inputs as they were handed in, and the results."""
    results = []
    for poison in ((NAN, 2**30), (1e4, 0)):
        memory = Memory(device, *poison)
        placed = [None if values is None else memory.place(values, layout) for values, layout in inputs]
        with guarded_allocations():
            results.append(op(*placed))
        memory.check()
    for first, second in zip(*results, strict=True):
        assert same_bits(first, second), "other bits from the same input"
    return placed, results[0]


def drawn_target(kind, shape, rng, dtype, K=2):
    """A target for logits of this shape. Weights lie in [0, 1] (0 and, in pairs, 1 among them)."""
    N, C, *inner = shape
    wide = accumulator(dtype)
    if kind == "dense":
        t = torch.rand(shape, generator=rng, dtype=wide)
        return t * (torch.rand(shape, generator=rng) < 0.7)
    classes = torch.randint(0, C, (N, K, *inner), generator=rng)
    if kind == "indices":
        return classes[:, 0].clone()
    weights = torch.rand((N, K, *inner) if kind == "k-hot per pixel" else (N, K), generator=rng, dtype=wide)
    if K == 2:
        weights[:, 0] *= torch.rand(weights[:, 0].shape, generator=rng) < 0.7
        weights[:, 1] = 1 - weights[:, 0]
    return classes, weights


def drawn_upstream(kind, shape, reduction, rng, dtype):
    shape = (shape[0], *shape[2:]) if reduction == "none" else ()
    if kind == "ones":
        return torch.ones(shape, dtype=accumulator(dtype))
    return torch.randn(shape, generator=rng, dtype=accumulator(dtype)) * (1.0 if kind == "randn" else 30.0)


target_kinds = st.sampled_from(["k-hot", "indices", "dense", "k-hot per pixel"])
reductions = st.sampled_from(REDUCTIONS)


def onehot(y, C, dtype):
    return F.one_hot(y, C).movedim(-1, 1).to(dtype)


def agreeing_forms(y, index, lam, C, dtype, rng):
    """{name: the target that has weight lam[n] at y[n] and 1 - lam[n] at y[index[n]]}, and whether its mean is over rows."""
    partner, other = y[index], 1 - lam
    hot = onehot(y, C, dtype)
    ignored = torch.full_like(y, -100)
    any_class = torch.randint(0, C, y.shape, generator=rng).to(y.device)
    pair = SoftTarget(torch.stack((y, partner), 1), torch.stack((lam, other), 1))
    anything = torch.rand(lam.shape, generator=rng).to(lam)
    return {
        "pair": (pair, False),
        "Mix on classes": (Mix(lam, index).target(y), False),
        "the other way round": (SoftTarget(pair.classes.flip(1), pair.weights.flip(1)), False),
        "components in parts": (
            SoftTarget(torch.stack((y, partner, y), 1), torch.stack((lam / 4, other, lam * 0.75), 1)),
            False,
        ),
        "more components, of no weight or ignored": (
            SoftTarget(
                torch.stack((any_class, y, ignored, partner), 1),
                torch.stack((torch.zeros_like(lam), lam, anything, other), 1),
            ),
            False,
        ),
        "probabilities": (pair.dense(C), True),
        "Mix on rows": (Mix(lam, index).target(hot), True),
        "mixed rows": (MixedRows(hot, lam, index), True),
        "mixed rows, dense": (MixedRows(hot, lam, index).dense(), True),
    }


def numpy_dense(target, C):
    """A K-hot target's probabilities, with the weights' exact values."""
    classes, weights = target
    weights = weights.double().reshape(*weights.shape, *[1] * (classes.dim() - weights.dim())).expand(classes.shape)
    dense = torch.zeros((len(classes), C, *classes.shape[2:]), dtype=torch.float64, device=classes.device)
    return dense.scatter_add(1, classes, weights)


def to(target, device):
    return tuple(t.to(device) for t in target) if isinstance(target, tuple) else target.to(device)
