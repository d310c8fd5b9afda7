"""Properties of the ops on drawn inputs: symmetries, exactness, agreement of all forms, and memory that is left alone.

Hypothesis draws shapes, dtypes, layouts, options and a seed; tensors are made from the seed, so that an example stays small.
Every run draws the same examples. Expected values are the oracle's, or another call's of which the mathematics says that it
is the same.
"""

import itertools
import math
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import FLOATS, LAMBDA, RELATIVE, ULP, assert_close, numpy

import fastmix
from fastmix import Mix, MixedRows, SoftTarget, reference

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
st = hypothesis.strategies

# NumPy's, in the oracle and in the interpreter: NaN and infinities are meant to be computed with
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

EXAMPLES = {"torch": 60, "interpreter": 10, "gpu": 12}  # on a GPU nearly every example is compiled anew
INFINITE, NAN = float("inf"), float("nan")
REDUCTIONS = ("mean", "none", "sum")


def given(factor=1, **strategies):
    """hypothesis.given on every backend; fewer examples where they are slow, `factor` times as many where much is drawn."""

    def decorate(test):
        def run(device, request):
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
        return run

    return decorate


# What is drawn. The first of each list is what a failing example is simplified to.

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


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


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


# Memory


def bits(t):
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


class Memory:
    """Inputs as views into larger storages. What lies around them is not theirs to read; nothing is theirs to write."""

    def __init__(self, device, poison, integer_poison):
        self.device, self.poison, self.integer_poison = device, poison, integer_poison
        self.rooms = []

    def place(self, values, layout="dense"):
        """The values (of the first row, or the first element, where the layout repeats it) in a layout."""
        dims = values.dim()
        repeated = {"expanded rows": 1, "expanded": dims}.get(layout, 0)
        source = values[tuple(slice(0, 1 if d < repeated else None) for d in range(dims))]
        order = list(range(dims))  # of the dimensions in memory
        if layout == "transposed":
            order.reverse()
        if layout == "channels last" and dims > 2:
            order = [0, *order[2:], 1]
        step = 2 if layout == "every second" else 1
        apart = 2 if layout == "rows apart" and dims else 0
        shape = [source.shape[d] * step for d in order]
        if apart:
            shape[-1] += apart
        margin = 1 if layout == "misaligned" else 64
        poison = self.poison if values.is_floating_point() else self.integer_poison
        room = torch.full((2 * margin + math.prod(shape),), poison, dtype=values.dtype, device=self.device)
        view = room[margin : len(room) - margin].view(shape)
        if apart:
            view = view[..., 1 : 1 + source.shape[order[-1]]]
        view = view[tuple(slice(None, None, step) for _ in order)].permute([order.index(d) for d in range(dims)])
        view.copy_(source)
        self.rooms.append((room, room.clone()))
        return view.expand(values.shape)

    def check(self):
        for room, before in self.rooms:
            assert same_bits(room, before), "an input, or what lies beside it, was written to"


GUARD, SENTINEL = 64, 77


@contextmanager
def guarded_allocations():
    """Whatever an op allocates lies between sentinels, which it must not overwrite."""
    rooms = []

    def guarded(create):
        def empty(*args, **kwargs):
            t = create(*args, **kwargs)
            if t.device.type == "meta" or not t.numel():
                return t
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            room = t.new_full((extent + 2 * GUARD,), SENTINEL)
            rooms.append(room)
            return t.new_empty(0).set_(room.untyped_storage(), GUARD, t.shape, t.stride()).copy_(t)

        return empty

    names = ("empty", "empty_like", "empty_strided")
    with mock.patch.multiple(torch, **{name: guarded(getattr(torch, name)) for name in names}):
        yield
    for room in rooms:
        assert (room[:GUARD] == SENTINEL).all(), "written in front of a buffer"
        assert (room[-GUARD:] == SENTINEL).all(), "written behind a buffer"


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


# fastmix.mix


def mix_and_gradients(x, lam, index, box, g):
    x, lam = x.detach().requires_grad_(), lam.detach().requires_grad_()
    out = fastmix.mix(x, lam, index, box=box)
    return out.detach(), *torch.autograd.grad(out, (x, lam), g)


def finite(values):
    return np.where(np.isfinite(values), values, 0.0)


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


def batch(shape, dtype, seed, partner="any", dims=0):
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
    x, lam, index, box, g = batch(shape, dtype, seed, partner, dims)
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
    x, lam, index, box, g = (None if t is None else t.to(device) for t in batch(shape, dtype, seed, partner, dims))
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
    x, _, index, box, g = batch(shape, dtype, seed, "any", dims)
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
    x, lam, index, box, g = (None if t is None else t.to(device) for t in batch(shape, torch.float64, seed, partner, dims))
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
    x, lam, index, _, _ = (None if t is None else t.to(device) for t in batch(shape, dtype, seed))
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
    x, lam, index, box, _ = batch(shape, dtype, seed, "any", dims)
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


# fastmix.soft_cross_entropy. A target is class indices, (classes, weights), or probabilities.


def as_target(target):
    return SoftTarget(*target) if isinstance(target, tuple) else target


def loss_and_gradients(logits, target, upstream, **options):
    """(loss, gradient to the logits[, gradient to weights or probabilities])"""
    logits = logits.detach().requires_grad_()
    leaves = [logits]
    if isinstance(target, tuple):
        target = target[0], target[1].detach().requires_grad_()
        leaves.append(target[1])
    elif target.is_floating_point():
        target = target.detach().requires_grad_()
        leaves.append(target)
    loss = fastmix.soft_cross_entropy(logits, as_target(target), **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


class Oracle:
    """What the oracle says of a loss, and how large the terms are that it and its gradients are made of."""

    def __init__(self, logits, target, upstream, weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
        z, mean = numpy(logits), reduction == "mean"
        target = tuple(map(numpy, target)) if isinstance(target, tuple) else numpy(target)
        w = np.ones(z.shape[1]) if weight is None else numpy(weight)
        options = {"weight": w, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        inner = z.shape[:1] + z.shape[2:]
        self.loss = reference.soft_cross_entropy(z, target, reduction=reduction, **options)
        self.dz, self.da = reference.soft_cross_entropy_grad(z, target, numpy(upstream), reduction=reduction, **options)
        if isinstance(target, np.ndarray) and target.dtype.kind == "i":
            target = target[:, None], np.ones((len(target), 1))
        if isinstance(target, tuple):
            classes, weights = target
            weights = np.abs(weights.reshape(weights.shape + (1,) * (classes.ndim - weights.ndim)) + 0 * classes)
            units = np.where(classes == ignore_index, 0.0, w.take(classes, mode="clip"))
            D = np.abs((target[1].reshape(target[1].shape + (1,) * (classes.ndim - target[1].ndim)) * units).sum())
            absolute, ones, mass = (classes, weights), (classes, np.ones_like(weights)), weights.sum(axis=1)
        else:
            absolute, ones, D = np.abs(target), np.zeros_like(target), math.prod(inner)
            mass = absolute.sum(axis=1) + label_smoothing
        mass = mass * w.max()
        rows, each = (finite(reference.soft_cross_entropy(z, t, reduction="none", **options)) for t in (absolute, ones))
        share = finite(np.abs(numpy(upstream)) / (D if mean else 1.0)) * np.ones(inner)
        self.size = finite((rows + mass).sum() / D) if mean else rows + mass if reduction == "none" else (rows + mass).sum()
        each = each + w.max() * (1 + (np.abs(finite(self.loss)) if mean else 0))
        self.dz_size = (mass * share)[:, None]
        self.da_size = (each * share)[:, None] + np.abs(finite(self.da))

    def check(self, logits, target, loss, dz, da=None):
        wide = accumulator(logits.dtype)
        assert (loss.dtype, dz.dtype) == (wide, logits.dtype)
        assert_close(loss, self.loss, wide, self.size)
        assert_close(dz, self.dz, logits.dtype, self.dz_size)
        if da is None:
            return
        leaf = target[1] if isinstance(target, tuple) else target
        assert da.dtype == leaf.dtype
        pixels = tuple(range(leaf.dim(), self.da.ndim))  # that share a weight
        expected, size = (t.sum(axis=pixels) if pixels else t for t in (self.da, self.da_size))
        dtype = leaf.dtype if leaf.dtype in ULP else wide if leaf.dtype == torch.float64 else torch.float32
        assert_close(da.to(dtype), expected, dtype, size, LAMBDA[dtype] / RELATIVE[dtype])


def loss_in_memory(device, logits, target, upstream, layouts, weight=None, **options):
    """loss_and_gradients in memory that is watched, each of logits, target and upstream in its layout, held to the oracle."""
    parts = list(target) if isinstance(target, tuple) else [target]

    def op(logits, upstream, weight, *parts):
        return loss_and_gradients(logits, tuple(parts) if parts[1:] else parts[0], upstream, weight=weight, **options)

    inputs = [(logits, layouts[0]), (upstream, layouts[2]), (weight, "misaligned"), *[(part, layouts[1]) for part in parts]]
    (logits, upstream, weight, *parts), results = run(op, device, *inputs)
    target = tuple(parts) if parts[1:] else parts[0]
    Oracle(logits, target, upstream, weight, **options).check(logits, target, *results)


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


def ignore_some(target, which, ignore_index, rng):
    """Gives some components of a target, or all, the ignored class, in place."""
    if which != "none" and not (isinstance(target, torch.Tensor) and target.is_floating_point()):
        classes = target[0] if isinstance(target, tuple) else target
        share = 0.4 if which == "some" else 1.0
        classes[torch.rand(classes.shape, generator=rng) < share] = ignore_index


def drawn_upstream(kind, shape, reduction, rng, dtype):
    shape = (shape[0], *shape[2:]) if reduction == "none" else ()
    if kind == "ones":
        return torch.ones(shape, dtype=accumulator(dtype))
    return torch.randn(shape, generator=rng, dtype=accumulator(dtype)) * (1.0 if kind == "randn" else 30.0)


target_kinds = st.sampled_from(["k-hot", "indices", "dense", "k-hot per pixel"])
ignored = st.sampled_from(["none", "some", "all"])
reductions = st.sampled_from(REDUCTIONS)


@given(
    factor=3,
    shape=logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    K=st.sampled_from([2, 1, 3, 5]),
    weighted=st.booleans(),
    smoothing=smoothings,
    reduction=reductions,
    which=ignored,
    ignore_index=st.sampled_from([-100, 0, 1, -1]),
    upstream=st.sampled_from(["randn", "ones", "large"]),
    places=layout_triples,
)
def test_the_loss_is_the_oracles_in_any_memory(
    device, shape, dtype, seed, kind, K, weighted, smoothing, reduction, which, ignore_index, upstream, places
):
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    target = drawn_target(kind, shape, rng, dtype, K=K)
    ignore_some(target, which, ignore_index, rng)
    loss_in_memory(
        device,
        *(logits, target, drawn_upstream(upstream, shape, reduction, rng, dtype), places),
        weight=torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1 if weighted else None,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
    )


@given(
    factor=3,
    shape=logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    scale=st.sampled_from([1e4, 1.0]),
    masked=st.booleans(),
    spoiled=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    reduction=reductions,
    which=ignored,
    places=layout_triples,
)
def test_the_loss_under_stress(
    device, shape, dtype, seed, kind, scale, masked, spoiled, smoothing, weighted, reduction, which, places
):
    """Huge logits, masked classes with and without weight, rows of NaN, ignored rows and nothing but ignored rows, at once."""
    rng = generator(seed)
    logits = (scale * torch.randn(shape, generator=rng)).to(dtype)
    if masked:
        mask = torch.rand(shape, generator=rng)
        logits.masked_fill_((mask < 0.4) & (mask < mask.amax(1, keepdim=True)), -INFINITE)  # one class at least is left
    if spoiled:
        own = torch.rand(shape[:1] + shape[2:], generator=rng).unsqueeze(1)
        logits.masked_fill_(own < 0.2, NAN)
        logits.masked_fill_((own > 0.9) & (torch.rand(shape, generator=rng) < 0.5), INFINITE)
    target = drawn_target(kind, shape, rng, dtype)
    ignore_some(target, which, -100, rng)
    loss_in_memory(
        device,
        *(logits, target, drawn_upstream("randn", shape, reduction, rng, dtype), places),
        weight=torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1 if weighted else None,
        label_smoothing=smoothing,
        reduction=reduction,
    )


def at_rows(target, order):
    return tuple(t[order] for t in target) if isinstance(target, tuple) else target[order]


def to(target, device):
    return tuple(t.to(device) for t in target) if isinstance(target, tuple) else target.to(device)


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
)
def test_rows_and_classes_of_a_loss_may_come_in_any_order(device, shape, dtype, seed, kind, smoothing, weighted, reduction):
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    target = to(drawn_target(kind, shape, rng, dtype), device)
    ignore_some(target, "some", -100, rng)
    weight = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype).to(device)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    oracle = Oracle(logits, target, upstream, weight, **options)
    loss, *gradients = loss_and_gradients(logits, target, upstream, weight=weight, **options)

    order = torch.randperm(shape[0], generator=rng).to(device)
    back = order.argsort()
    permuted = loss_and_gradients(
        logits[order], at_rows(target, order), upstream[order] if upstream.dim() else upstream, weight=weight, **options
    )
    oracle.check(logits, target, permuted[0][back] if upstream.dim() else permuted[0], *[t[back] for t in permuted[1:]])

    order = torch.randperm(shape[1], generator=rng).to(device)
    back = order.argsort()
    classes = target[0] if isinstance(target, tuple) else target
    if classes.is_floating_point():
        renamed = classes[:, order]
    else:
        renamed = torch.where(classes >= 0, back[classes.clamp(min=0)], classes)
    renamed = (renamed, target[1]) if isinstance(target, tuple) else renamed
    weight = None if weight is None else weight[order]
    loss, dz, *da = loss_and_gradients(logits[:, order], renamed, upstream, weight=weight, **options)
    da = [t[:, back] if classes.is_floating_point() else t for t in da]
    oracle.check(logits, target, loss, dz[:, back], *da)


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
)
def test_a_rows_shift_changes_no_bit(device, shape, dtype, seed, kind, smoothing, weighted, reduction):
    """Where the shifted logits are exact: max - z is, and lse - z as a difference of large numbers would not be."""
    rng = generator(seed)
    far = {torch.bfloat16: 2**6, torch.float16: 2**9, torch.float32: 2**19, torch.float64: 2**40}[dtype]
    logits = torch.randint(-8, 9, shape, generator=rng).double() / 2
    shifts = torch.randint(-far, far + 1, (shape[0], 1, *shape[2:]), generator=rng).double()
    target = to(drawn_target(kind, shape, rng, dtype), device)
    weight = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype).to(device)
    assert torch.equal((logits + shifts).to(dtype).double(), logits + shifts)
    near, shifted = (
        loss_and_gradients(
            z.to(dtype).to(device), target, upstream, weight=weight, label_smoothing=smoothing, reduction=reduction
        )
        for z in (logits, logits + shifts)
    )
    for a, b in zip(near, shifted, strict=True):
        assert same_bits(a, b)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, weighted=st.booleans(), smoothing=st.sampled_from([0.0, 0.1]))
def test_a_component_of_weight_0_changes_nothing(device, shape, dtype, seed, weighted, smoothing):
    """Whichever class it names, also a masked one; and at lam 1 the loss is that of class indices."""
    rng = generator(seed)
    N, C, *inner = shape
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    first = torch.zeros((N, *inner), dtype=torch.int64)
    others = [torch.randint(0, C, (N, *inner), generator=rng) for _ in range(2)]
    if smoothing == 0 and C > 1:
        others[1] = torch.full_like(first, C - 1)
        logits[:, C - 1] = -INFINITE
    logits, first, others = logits.to(device), first.to(device), [t.to(device) for t in others]
    weight = (torch.rand(C, generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, "none", rng, dtype).to(device)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
    for lam in (1.0, 0.0):
        share = torch.tensor([lam, 1 - lam], dtype=accumulator(dtype), device=device).repeat(N, 1)
        results = []
        for other in others:
            pair = (first, other) if lam else (other, first)
            results.append(loss_and_gradients(logits, (torch.stack(pair, 1), share), upstream, **options))
        for a, b in zip(results[0][:2], results[1][:2], strict=True):
            assert torch.equal(a, b)
        kept = 0 if lam else 1
        assert torch.equal(results[0][2][:, kept], results[1][2][:, kept])
        hard = loss_and_gradients(logits, first, upstream, **options)
        assert torch.equal(hard[0], results[0][0])
        Oracle(logits, first, upstream, **options).check(logits, first, *results[0][:2])


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=st.sampled_from(["k-hot", "dense", "k-hot per pixel"]),
    K=st.sampled_from([1, 2, 3, 5]),
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
    power=st.sampled_from([2.0, 0.25, 64.0]),
)
def test_twice_the_weights_are_twice_the_loss(device, shape, dtype, seed, kind, K, smoothing, weighted, reduction, power):
    """To the bit, for powers of two; a mean over components divides it out again. (Smoothed probabilities are affine.)"""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    target = to(drawn_target(kind, shape, rng, dtype, K=K), device)
    smoothing = 0.0 if kind == "dense" else smoothing
    weight = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("ones", shape, reduction, rng, dtype).to(device)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    multiple = target * power if kind == "dense" else (target[0], target[1] * power)
    loss, dz, da = loss_and_gradients(logits, target, upstream, **options)
    loss_multiple, dz_multiple, da_multiple = loss_and_gradients(logits, multiple, upstream, **options)
    divided = kind != "dense" and reduction == "mean"
    factor = 1.0 if divided else power
    assert torch.equal(loss_multiple.nan_to_num(7.0), (loss * factor).nan_to_num(7.0))
    if dtype != torch.float16:  # whose smallest numbers have fewer bits
        assert torch.equal(dz_multiple, dz * factor)
    assert torch.equal(da_multiple.nan_to_num(7.0), (da / power if divided else da).nan_to_num(7.0))


@given(
    shape=small_logits_shapes,
    seed=seeds,
    kind=st.sampled_from(["k-hot", "dense", "k-hot per pixel"]),
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
)
def test_the_loss_is_linear_in_the_weights(device, shape, seed, kind, smoothing, weighted, reduction):
    """L(a + 3b) = L(a) + 3 L(b), and sum of a*dL/da = L, or 0 under a mean, which does not change with the size of a."""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng, dtype=torch.float64)).to(device)
    smoothing = 0.0 if kind == "dense" else smoothing
    weight = (torch.rand(shape[1], generator=rng, dtype=torch.float64) + 0.1).to(device) if weighted else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    first, second = (to(drawn_target(kind, shape, rng, torch.float64, K=3), device) for _ in range(2))
    upstream = drawn_upstream("ones", shape, reduction, rng, torch.float64).to(device)
    if kind == "dense":
        weights, both = first, first + 3 * second
    else:
        second = first[0], second[1]
        weights, both = first[1], (first[0], first[1] + 3 * second[1])
    loss, _, da = loss_and_gradients(logits, first, upstream, **options)
    homogeneous = reduction == "mean" and kind != "dense"
    size = 1e-12 * (1 + 10 * logits.numel())
    if logits.numel():
        expected = torch.zeros((), dtype=torch.float64, device=device) if homogeneous else loss.sum()
        torch.testing.assert_close((weights * da).sum(), expected, rtol=0, atol=size)
    if not homogeneous:
        total, other = (fastmix.soft_cross_entropy(logits, as_target(t), **options) for t in (both, second))
        torch.testing.assert_close(total, loss + 3 * other, rtol=0, atol=size, equal_nan=True)


@given(shape=logits_shapes, dtype=dtypes, seed=seeds, kind=target_kinds, smoothing=smoothings, weighted=st.booleans())
def test_a_rows_gradients_sum_to_0(device, shape, dtype, seed, kind, smoothing, weighted):
    """A shift of all logits of a row changes nothing."""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    target = to(drawn_target(kind, shape, rng, dtype), device)
    weight = (torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, "none", rng, dtype).to(device)
    dz = loss_and_gradients(logits, target, upstream, weight=weight, label_smoothing=smoothing, reduction="none")[1]
    size = Oracle(logits, target, upstream, weight, label_smoothing=smoothing, reduction="none").dz_size[:, 0]
    terms = np.abs(numpy(dz)).sum(axis=1)
    rounding = ULP[dtype] * terms + shape[1] * 2.0**-24 if dtype in ULP else 0.0
    assert np.all(np.abs(numpy(dz).sum(axis=1)) <= 2 * RELATIVE[dtype] * (terms + size) + rounding)


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


def hard_forms(y, index, lam, C, dtype, rng):
    """The same for classes y: indices, and whatever comes to them."""
    hot = onehot(y, C, dtype)
    one = torch.ones_like(lam)
    return {
        "indices": (y, False),
        "K = 1": (SoftTarget(y.unsqueeze(1), one.unsqueeze(1)), False),
        "a pair of one class": (SoftTarget(torch.stack((y, y), 1), torch.stack((lam, 1 - lam), 1)), False),
        "a pair with weight 0": (SoftTarget(torch.stack((y, y[index]), 1), torch.stack((one, one - 1), 1)), False),
        "probabilities": (hot, True),
        "mixed with itself": (MixedRows(hot, lam, torch.arange(len(y), device=y.device)), True),
        "mixed with nobody": (MixedRows(hot, 1.0, index), True),
    }


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    hard=st.booleans(),
    partner=partners,
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
)
def test_all_forms_of_a_target_agree(device, shape, dtype, seed, hard, partner, smoothing, weighted, reduction):
    """In loss and in the gradients to logits and lambda. The mean of probabilities is over rows, that of components over
    their class weights."""
    rng = generator(seed)
    N, C, *inner = shape
    wide = accumulator(dtype)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    y = torch.randint(0, C, (N, *inner), generator=rng).to(device)
    lam, index = coefficients(N, dtype, rng).to(device), partners_of(partner, N, rng).to(device)
    weight = (torch.rand(C, generator=rng, dtype=wide) + 0.5).to(device) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    forms = (hard_forms if hard else agreeing_forms)(y, index, lam, C, wide, rng)
    like = (torch.stack((y, y if hard else y[index]), 1), torch.stack((lam, 1 - lam), 1))
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype).to(device)
    khot = Oracle(logits, like, upstream, weight, **options)
    dense = Oracle(logits, numpy_dense(like, C), upstream, weight, **options)
    for name, (target, over_rows) in forms.items():
        z = logits.detach().requires_grad_()
        loss = fastmix.soft_cross_entropy(z, target, weight=weight, **options)
        (dz,) = torch.autograd.grad(loss, z, upstream)
        try:
            (dense if over_rows else khot).check(logits, None, loss.detach(), dz)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def numpy_dense(target, C):
    """A K-hot target's probabilities, with the weights' exact values."""
    classes, weights = target
    weights = weights.double().reshape(*weights.shape, *[1] * (classes.dim() - weights.dim())).expand(classes.shape)
    dense = torch.zeros((len(classes), C, *classes.shape[2:]), dtype=torch.float64, device=classes.device)
    return dense.scatter_add(1, classes, weights)


@given(shape=small_logits_shapes, seed=seeds, partner=partners, smoothing=smoothings, reduction=reductions)
def test_the_gradient_to_lambda_does_not_depend_on_the_form(device, shape, seed, partner, smoothing, reduction):
    """It is -(1-e)*(z[ya] - z[yb]) per row."""
    rng = generator(seed)
    N, C, *inner = shape
    logits = (3 * torch.randn(shape, generator=rng, dtype=torch.float64)).to(device)
    y = torch.randint(0, C, (N, *inner), generator=rng).to(device)
    index = partners_of(partner, N, rng).to(device)
    lam = coefficients(N, torch.float64, rng).to(device).requires_grad_()
    at, other = (logits.gather(1, t.unsqueeze(1)).squeeze(1) for t in (y, y[index]))
    upstream = drawn_upstream("randn", shape, reduction, rng, torch.float64).to(device)
    expected = -(1 - smoothing) * (at - other) * upstream / (max(y.numel(), 1) if reduction == "mean" else 1)
    expected = expected.flatten(1).sum(1) if inner else expected
    for name, (target, _) in agreeing_forms(y, index, lam, C, torch.float64, rng).items():
        loss = fastmix.soft_cross_entropy(logits, target, label_smoothing=smoothing, reduction=reduction)
        (dlam,) = torch.autograd.grad(loss, lam, upstream)
        torch.testing.assert_close(dlam, expected, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    smoothing=st.sampled_from([0.0, 0.1]),
    value=st.sampled_from([NAN, INFINITE]),
)
def test_a_row_that_is_not_finite_spoils_only_itself(device, shape, dtype, seed, kind, smoothing, value):
    """No bit of another row changes."""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    target = to(drawn_target(kind, shape, rng, dtype), device)
    if kind == "dense":
        target = target + 0.1
    spoiled = torch.rand((shape[0], *shape[2:]), generator=rng) < 0.4
    hostile = logits.clone()
    hostile[:, shape[1] // 2][spoiled] = value
    upstream = drawn_upstream("randn", shape, "none", rng, dtype).to(device)
    options = {"label_smoothing": smoothing, "reduction": "none"}
    clean, spoilt = (loss_and_gradients(z.to(device), target, upstream, **options) for z in (logits, hostile))
    spoiled = spoiled.to(device)
    classes_last = [t.movedim(1, -1) for t in (clean[1], spoilt[1])]
    for a, b in ((clean[0], spoilt[0]), classes_last):
        assert same_bits(a[~spoiled], b[~spoiled])
        assert b[spoiled].isnan().all()


@given(
    rows=st.sampled_from([1, 0]),
    inner=st.sampled_from([(5,), (1,), (4, 3), (33,), (3, 0)]),
    dtype=dtypes,
    seed=seeds,
    kind=target_kinds,
    reduction=reductions,
    dims=st.integers(0, 2),
)
def test_one_row_and_none(device, rows, inner, dtype, seed, kind, reduction, dims):
    rng = generator(seed)
    shape = (rows, *inner)
    x, lam, index, box, g = (None if t is None else t.to(device) for t in batch(shape, dtype, seed, "any", dims))
    out, dx, dlam = mix_and_gradients(x, lam, index, box, g)
    assert_close(out, numpy(x), dtype)  # a row alone is mixed with itself
    assert_close(dx, numpy(g), dtype)
    assert torch.equal(dlam, torch.zeros_like(lam))
    target = to(drawn_target(kind, shape, rng, dtype), device)
    upstream = drawn_upstream("ones", shape, reduction, rng, dtype).to(device)
    loss, *gradients = loss_and_gradients(x, target, upstream, reduction=reduction)
    Oracle(x, target, upstream, reduction=reduction).check(x, target, loss, *gradients)
    if loss.dim() == 0 and not math.prod((rows, *inner[1:])):
        assert bool(loss.isnan()) == (reduction == "mean")
        assert reduction == "mean" or loss == 0


# MixedRows, which the loss mixes where it reads them


def drawn_rows(shape, dtype, partner, rng):
    """(values, lam, index) for logits of this shape."""
    values = drawn_target("dense", shape, rng, dtype)
    return values, coefficients(shape[0], dtype, rng), partners_of(partner, shape[0], rng)


@given(
    shape=logits_shapes,
    dtype=dtypes,
    seed=seeds,
    partner=partners,
    smoothing=smoothings,
    weighted=st.booleans(),
    reduction=reductions,
    places=layout_pairs,
)
def test_mixed_rows_are_their_dense_form_in_any_memory(
    device, shape, dtype, seed, partner, smoothing, weighted, reduction, places
):
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype)
    values, lam, index = drawn_rows(shape, dtype, partner, rng)
    weight = torch.rand(shape[1], generator=rng, dtype=accumulator(dtype)) + 0.1 if weighted else None
    options = {"ignore_index": shape[1] // 2, "label_smoothing": smoothing, "reduction": reduction}
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype)

    def op(logits, values, lam, index, weight, upstream):
        z = logits.detach().requires_grad_()
        loss = fastmix.soft_cross_entropy(z, MixedRows(values, lam, index), weight=weight, **options)
        return loss.detach(), *torch.autograd.grad(loss, z, upstream)

    inputs = [(logits, places[0]), (values, places[1]), (lam, "every second"), (index, "every second"), (weight, "misaligned")]
    (logits, values, lam, index, weight, upstream), results = run(op, device, *inputs, (upstream, "dense"))
    dense = MixedRows(values, lam, index).dense()
    oracle = Oracle(logits, dense, upstream, weight, **options)
    oracle.check(logits, dense, *results)
    like = loss_and_gradients(logits, dense, upstream, weight=weight, **options)
    assert_close(results[0], numpy(like[0]), accumulator(dtype), oracle.size, 2)
    assert_close(results[1], numpy(like[1]), dtype, oracle.dz_size, 2)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, partner=partners, smoothing=smoothings, weighted=st.booleans())
def test_the_loss_of_mixed_rows_is_linear_in_lambda(device, shape, dtype, seed, partner, smoothing, weighted):
    """L(lam) = lam*L(1) + (1-lam)*L(0), whose bits are those of the rows and of their partners."""
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    values, lam, index = (t.to(device) for t in drawn_rows(shape, dtype, partner, rng))
    weight = (torch.rand(shape[1], generator=rng, dtype=lam.dtype) + 0.1).to(device) if weighted else None
    upstream = drawn_upstream("randn", shape, "none", rng, dtype).to(device)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}

    def loss_of(target):
        z = logits.detach().requires_grad_()
        loss = fastmix.soft_cross_entropy(z, target, **options)
        return loss.detach(), *torch.autograd.grad(loss, z, upstream)

    own, other, mixed = (loss_of(MixedRows(values, share, index)) for share in (torch.ones_like(lam), 0.0, lam))
    for ours, rows in ((own, values), (other, values[index])):
        assert all(map(same_bits, ours, loss_of(rows)))
    sizes = [Oracle(logits, rows, upstream, **options) for rows in (values, values[index])]
    exact = dtype not in ULP  # else the gradients of both ends are rounded
    for result, size in enumerate([[t.size for t in sizes], [t.dz_size for t in sizes]][: 1 + exact]):
        a, b = (numpy(t[result]) for t in (own, other))
        share = numpy(lam).reshape(-1, *[1] * (a.ndim - 1))
        terms = np.abs(share) * size[0] + np.abs(1 - share) * size[1]
        assert_close(mixed[result], share * a + (1 - share) * b, lam.dtype, terms, 4)


@given(shape=small_logits_shapes, dtype=dtypes, seed=seeds, partner=partners, reduction=reductions)
def test_mixed_rows_may_come_in_any_order(device, shape, dtype, seed, partner, reduction):
    rng = generator(seed)
    logits = (3 * torch.randn(shape, generator=rng)).to(dtype).to(device)
    values, lam, index = (t.to(device) for t in drawn_rows(shape, dtype, partner, rng))
    upstream = drawn_upstream("randn", shape, reduction, rng, dtype).to(device)
    order = torch.randperm(shape[0], generator=rng).to(device)
    back = order.argsort()

    def loss_of(logits, target, upstream):
        z = logits.detach().requires_grad_()
        loss = fastmix.soft_cross_entropy(z, target, reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss, z, upstream)

    loss, dz = loss_of(logits, MixedRows(values, lam, index), upstream)
    permuted = MixedRows(values[order], lam[order], back[index[order]])
    other, other_dz = loss_of(logits[order], permuted, upstream[order] if upstream.dim() else upstream)
    oracle = Oracle(logits, fastmix.mix(values, lam, index), upstream, reduction=reduction)
    assert_close(other[back] if other.dim() else other, numpy(loss), accumulator(dtype), oracle.size, 2)
    assert_close(other_dz[back], numpy(dz), dtype, oracle.dz_size, 2)


# Targets and accuracy


@given(
    shape=small_logits_shapes,
    dtype=dtypes,
    seed=seeds,
    partner=partners,
    topk=st.sampled_from([1, 2, 3, 50]),
)
def test_mixed_accuracy(device, shape, dtype, seed, partner, topk):
    """All forms of a target agree with the oracle, rows may come in any order, and more of the top hits no less."""
    rng = generator(seed)
    N, C, *inner = shape
    logits = torch.rand(shape, generator=rng).argsort(1).to(dtype).to(device)  # no ties
    y = torch.randint(0, C, (N, *inner), generator=rng).to(device)
    lam, index = torch.rand(N, generator=rng).to(device), partners_of(partner, N, rng).to(device)
    forms = agreeing_forms(y, index, lam, C, torch.float32, rng)
    like = tuple(map(numpy, (torch.stack((y, y[index]), 1), torch.stack((lam, 1 - lam), 1))))
    like = like[0], np.broadcast_to(like[1].reshape(like[1].shape + (1,) * len(inner)), like[0].shape)
    expected = reference.mixed_accuracy(numpy(logits), like, topk)
    for name, (target, _) in forms.items():
        accuracy = fastmix.mixed_accuracy(logits, target, topk)
        assert accuracy.dtype == torch.float32
        np.testing.assert_allclose(numpy(accuracy), expected, rtol=2e-6, atol=1e-6, err_msg=name)
    pair = forms["pair"][0]
    order = torch.randperm(N, generator=rng).to(device)
    again = fastmix.mixed_accuracy(logits[order], pair[order], topk)
    np.testing.assert_allclose(numpy(again), expected, rtol=2e-6, atol=1e-6)
    if y.numel():
        assert fastmix.mixed_accuracy(logits, pair, topk + 1) >= accuracy - 1e-6
        np.testing.assert_allclose(numpy(fastmix.mixed_accuracy(logits, pair, C)), 1.0, rtol=2e-6)


@given(shape=small_logits_shapes, seed=seeds, K=st.sampled_from([2, 1, 3]), partner=partners)
def test_targets_as_data(device, shape, seed, K, partner):
    """Rows of a target, its dense form, its parts and its strongest class say the same."""
    rng = generator(seed)
    N, C, *inner = shape
    classes, weights = to(drawn_target("k-hot", shape, rng, torch.float32, K=K), device)
    target = SoftTarget(classes, weights)
    dense = target.dense(C)
    np.testing.assert_allclose(numpy(dense), numpy(numpy_dense((classes, weights), C)), rtol=0, atol=1e-6)
    order = torch.randperm(N, generator=rng).to(device)
    for chosen in (order, order[: N // 2], slice(1, None, 2), order < N // 2):
        assert torch.equal(target[chosen].dense(C), dense[chosen])
        assert len(target[chosen]) == len(dense[chosen])
    strongest = target.argmax()
    np.testing.assert_allclose(
        numpy(dense.gather(1, strongest.unsqueeze(1)).squeeze(1)), numpy(dense.amax(1)), rtol=0, atol=1e-6
    )
    leaves, structure = torch.utils._pytree.tree_flatten(target)
    again = torch.utils._pytree.tree_unflatten(leaves, structure)
    assert torch.equal(again.classes, classes)
    assert torch.equal(again.weights, weights)
    lam, index = coefficients(N, torch.float32, rng).to(device), partners_of(partner, N, rng).to(device)
    rows = MixedRows(dense, lam, index)
    assert_close(rows.dense(), reference.mix(numpy(dense), numpy(lam), numpy(index)), torch.float32, 4.0)
    assert_close(fastmix.mix(dense, lam, index), numpy(rows.dense()), torch.float32, 4.0)
