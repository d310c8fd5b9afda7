"""How far from the truth the ops are, and what people write by hand: every result, dtype and hard case in one table.

    python -m fastmix.bench.numerics [--case TEXT] [--dtype ...] [--small] [--interpreter] [--json FILE]

The truth is the float64 oracle, `fastmix.reference`, on the very numbers that the ops are given. An error is the largest
distance from it over all elements, in one of these units:

    scale    float32 and float64: of the row's scale, its largest sum of the sizes of the terms that an element is made of. A
             loss counts as itself and its target's mass, since part of it is the log of a sum that may be near 1.
    ulp      bfloat16 and float16: the unit in the last place of the correctly rounded result. That result is itself up to 0.5
             away, so one unit from it is 1.5 from the truth. Where terms cancel so far that float32 is coarser than that, the
             unit is 2e-6 of their sizes.
    terms    gradients to lambda: of sum |g*(x[i] - x[partner])|; to a mask's cell or a source's weight: of their terms alike
    rounded  gradients to lambda through a loss and a batch of the dtype: of their terms, too. Each is rounded to the dtype once, and
             the truth is of the mixed batch as it is rounded.
    entries  how many elements that the dtype can hold became 0

Losses and gradients to lambda or to the target's weights are float32 whatever the batch's dtype. The oracle is float64 and no
more, so float64 rows say that float64 computations written differently agree; which of them is nearer to the truth they
cannot tell.

"usual" and "nearest" are eager torch: the first of the ways that `fastmix.bench.peers` has, in the batch's own dtype (a lambda
that meets the batch is cast to it, as in timm), and whichever way came nearest to the truth in that row. In bfloat16 and
float16 each way is run on a float32 copy as well, as under autocast. "ok" is within the limit and no further from the truth
than the nearest, give or take MARGINS. The exit status is 1 if a limit is broken.

fastmix runs on its torch backend, and on its kernels where there is a GPU; with --interpreter in Triton's interpreter, on small
shapes and without bfloat16, to which it cuts numbers off where hardware rounds them.
"""

import argparse
import math
import os
import pathlib
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import fastmix
from fastmix import _backend, reference
from fastmix._dtypes import accumulator
from fastmix.adversarial import _lambda_gradient
from fastmix.bench import peers, screen
from fastmix.bench.results import write

DTYPES = F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# By unit, and by the dtype that the result has.
LIMITS = {"scale": {F32: 2e-6, F64: 1e-12}, "terms": {F32: 1e-5, F64: 1e-13}, "ulp": {BF16: 1.5, F16: 1.5}, "entries": {F16: 0},
          "rounded": {F32: 1e-5, F64: 1e-13, BF16: 2.0**-8 + 1e-5, F16: 2.0**-11 + 1e-5}}  # fmt: skip
# What luck in the last bit makes of a largest error: one or two roundings of float32, or as much before the one rounding that
# counts; in float64 what the oracle's own sums are good to.
MARGINS = {
    "scale": {F32: 2.0**-23, F64: 1e-12},
    "terms": {F32: 2.0**-23, F64: 1e-13},
    "ulp": {BF16: 0.01, F16: 0.01},
    "entries": {F16: 0},
    "rounded": {F32: 2.0**-23, F64: 1e-13, BF16: 2.0**-12, F16: 2.0**-15},
}
LOST = "logit gradients made 0"  # counted rather than measured
ROW = {  # the dimensions of a result's row, if not (1,)
    "forward": (1, 2, 3), "gradient to x": (1, 2, 3), "loss": (), "gradient to sources": (2, 3, 4), "gradient to mask": (),
}  # fmt: skip


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def exact(t):
    """A tensor's values in float64 (or its integers), as the oracle takes them; None stays None."""
    if t is None:
        return None
    t = t.detach().cpu()
    return t.double().numpy() if t.is_floating_point() else t.numpy()


# Errors


def ulp(values, dtype):
    """The unit in the last place of each value, correctly rounded to the dtype."""
    info = torch.finfo(dtype)
    least = math.frexp(info.smallest_normal)[1]

    def unit(values):
        exponent = np.where(values == 0, least, np.maximum(np.frexp(values)[1], least))
        return info.eps * 2.0 ** (exponent - 1)

    return unit(np.rint(values / unit(values)) * unit(values))


def largest_error(actual, truth, terms, unit, dtype, row):
    """The largest distance of a tensor from the truth, in its unit. `terms`: the sum of the sizes of each element's terms;
    `row`: the dimensions that make a row."""
    actual = exact(actual)
    if actual.shape != np.shape(truth):
        return math.inf
    if unit == "entries":  # that the dtype can hold, and became 0
        info = torch.finfo(dtype)
        return float(np.sum((actual == 0) & (np.abs(truth) >= info.smallest_normal * info.eps)))
    size = terms
    if unit == "ulp":
        size = np.maximum(ulp(truth, dtype), LIMITS["scale"][F32] * terms)
    elif unit == "scale":
        size = np.max(terms, axis=row, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(actual == truth, 0.0, np.abs(actual - truth) / size)
    return float(np.nan_to_num(error, nan=math.inf, posinf=math.inf).max(initial=0.0))


def differentiate(op, upstream, *leaves):
    """(value, gradient to each leaf) of op(*leaves)."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = op(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream.to(value.dtype))


# Cases. Each draws its inputs on the CPU, knows the truth {result: (values, sizes of terms)}, and runs on inputs wherever they
# are: ours -> {result: tensor}, and by hand -> (name, {result: tensor}) for each way


class Mix:
    op, dtypes = "mix", DTYPES
    results = {"forward": None, "gradient to x": None, "gradient to lambda": "terms"}  # and their units; None: the dtype's

    def __init__(self, rows=16, *, offset=0.0, spread=0.0, shared=False, channels_last=False, box=False):
        self.rows, self.offset, self.spread = rows, offset, spread
        self.shared, self.channels_last, self.box = shared, channels_last, box

    def draw(self, dtype, small):
        generator = torch.Generator().manual_seed(0)
        shape = (5, 3, 8, 8) if small else (self.rows, 3, 32, 32)
        x, g = torch.randn(2, *shape, generator=generator, dtype=F64)
        magnitude = torch.finfo(dtype).max ** (self.spread * torch.linspace(-1, 1, shape[0], dtype=F64))
        x = (self.offset + magnitude.view(-1, 1, 1, 1) * x).to(dtype)
        lam = torch.rand(shape[0], generator=generator, dtype=F64).to(accumulator(dtype))
        lam[1], lam[2] = 0, 1
        order = torch.randperm(shape[0], generator=generator)
        index = order.roll(1)[order.argsort()]  # one cycle: no row is its own partner
        if self.shared:
            index = torch.zeros_like(index)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        corners = torch.randint(shape[2] + 1, (2, shape[0], 2), generator=generator)
        box = torch.cat((corners.amin(0), corners.amax(0)), 1) if self.box else None
        return x, lam, g.to(dtype), index, box

    def truth(self, *inputs):
        x, lam, g, *partners = map(exact, inputs)
        positive = np.abs(g) * np.sign(x - x[partners[0]])  # an upstream that makes every term of the gradient to lambda so
        values = reference.mix(x, lam, *partners), *reference.mix_grad(g, x, lam, *partners)
        sizes = (
            reference.mix(np.abs(x), lam, *partners),
            reference.mix_grad(np.abs(g), x, lam, *partners)[0],
            reference.mix_grad(positive, x, lam, *partners)[1],
        )
        return dict(zip(self.results, zip(values, sizes, strict=True), strict=True))

    def ours(self, x, lam, g, index, box):
        values = differentiate(lambda x, lam: fastmix.mix(x, lam, index, box=box), g, x, lam)
        return dict(zip(self.results, values, strict=True))

    def by_hand(self, x, lam, g, index, box):
        def written(way, dtype, x, lam):
            wide = x.to(dtype)
            mixed = way(wide, lam.to(dtype).view(-1, 1, 1, 1), index)
            return (mixed if box is None else torch.where(peers.inside(box, x.shape), wide[index], mixed)).to(x.dtype)

        for dtype in dict.fromkeys((x.dtype, accumulator(x.dtype))):
            for name in ("mixup-cifar10", "torch.lerp"):
                values = differentiate(partial(written, peers.MIX[name], dtype), g, x, lam)
                yield named(name, dtype), dict(zip(self.results, values, strict=True))


class MixMasked:
    """Every row mixed with the next by a mask of cells, among them weights of 0 and 1; with `plans` blocks move."""

    op, dtypes = "mix_masked", DTYPES
    results = {"forward": None, "gradient to x": None, "gradient to mask": "terms"}

    def __init__(self, cells=(4, 4), *, plans=False, offset=0.0):
        self.cells, self.plans, self.offset = cells, plans, offset

    def draw(self, dtype, small):
        generator = torch.Generator().manual_seed(0)
        shape = (5, 3, 8, 8) if small else (16, 3, 32, 32)
        h, w = (min(count, side) for count, side in zip(self.cells, shape[2:], strict=True))
        x, g = torch.randn(2, *shape, generator=generator, dtype=F64)
        mask = torch.rand(shape[0], h, w, generator=generator, dtype=F64).to(accumulator(dtype))
        mask[1, 0], mask[2, 0] = 0, 1
        index = torch.arange(shape[0]).roll(-1)
        plans = [torch.randint(h * w, (shape[0], h * w), generator=generator) if self.plans else None for _ in range(2)]
        return (self.offset + x).to(dtype), mask, g.to(dtype), index, *plans

    def truth(self, *inputs):
        x, mask, g, *how = map(exact, inputs)
        values = reference.mix_masked(x, mask, *how), *reference.mix_masked_grad(g, x, mask, *how)
        wide = np.ones_like(mask)  # the row as it is moved, less its partner as that is
        gap = reference.mix_masked(x, wide, *how) - reference.mix_masked(x, 0 * wide, *how)
        sizes = (
            reference.mix_masked(np.abs(x), mask, *how),
            reference.mix_masked_grad(np.abs(g), x, mask, *how)[0],
            reference.mix_masked_grad(np.abs(g) * np.sign(gap), x, mask, *how)[1],
        )
        return dict(zip(self.results, zip(values, sizes, strict=True), strict=True))

    def ours(self, x, mask, g, index, plan, partner_plan):
        def op(x, mask):
            return fastmix.mix_masked(x, mask, index, plan=plan, partner_plan=partner_plan)

        return dict(zip(self.results, differentiate(op, g, x, mask), strict=True))

    def by_hand(self, x, mask, g, index, plan, partner_plan):
        def written(dtype, x, mask):
            """PuzzleMix's lines: the mask over pixels; blocks are moved as rows of an unfolded batch."""
            wide = x.to(dtype)
            spread = F.interpolate(mask.to(dtype).unsqueeze(1), size=x.shape[2:], mode="nearest")
            own, partner = moved(wide, plan), moved(wide[index], partner_plan)
            return (spread * own + (1 - spread) * partner).to(x.dtype)

        def moved(x, plan):
            if plan is None:
                return x
            size = tuple(side // count for side, count in zip(x.shape[2:], mask.shape[1:], strict=True))
            blocks = F.unfold(x, size, stride=size)
            return F.fold(blocks.gather(2, plan.unsqueeze(1).expand_as(blocks)), x.shape[2:], size, stride=size)

        for dtype in dict.fromkeys((x.dtype, accumulator(x.dtype))):
            values = differentiate(partial(written, dtype), g, x, mask)
            yield named("mask over pixels", dtype), dict(zip(self.results, values, strict=True))


class Combination:
    """Weighted sums of three batches, as AugMix makes them; weights of 0 and of 1 among them."""

    op, dtypes = "convex_combination", DTYPES
    results = {"forward": None, "gradient to sources": None, "gradient to weights": "terms"}

    def __init__(self, ways=3, *, offset=0.0):
        self.ways, self.offset = ways, offset

    def draw(self, dtype, small):
        generator = torch.Generator().manual_seed(0)
        shape = (5, 3, 8, 8) if small else (16, 3, 32, 32)
        sources = self.offset + torch.randn(self.ways, *shape, generator=generator, dtype=F64)
        g = torch.randn(shape, generator=generator, dtype=F64)
        weights = torch.rand(shape[0], self.ways, generator=generator, dtype=F64)
        weights = weights / weights.sum(1, keepdim=True)
        weights[1] = torch.eye(self.ways, dtype=F64)[0]
        return sources.to(dtype), weights.to(accumulator(dtype)), g.to(dtype)

    def truth(self, *inputs):
        sources, weights, g = map(exact, inputs)
        values = reference.convex_combination(sources, weights), *reference.convex_combination_grad(g, sources, weights)
        sizes = (
            reference.convex_combination(np.abs(sources), weights),
            np.abs(values[1]),
            reference.convex_combination_grad(np.abs(g), np.abs(sources), weights)[1],
        )
        return dict(zip(self.results, zip(values, sizes, strict=True), strict=True))

    def ours(self, sources, weights, g):
        return dict(zip(self.results, differentiate(fastmix.convex_combination, g, sources, weights), strict=True))

    def by_hand(self, sources, weights, g):
        for dtype in dict.fromkeys((sources.dtype, accumulator(sources.dtype))):
            for name, way in peers.COMBINE.items():

                def written(sources, weights):
                    return way(sources.to(dtype), weights.to(dtype)).to(sources.dtype)  # noqa: B023

                yield named(name, dtype), dict(zip(self.results, differentiate(written, g, sources, weights), strict=True))


def named(way, dtype):
    return f"{way}, {name_of(dtype)}"


class Loss:
    """The loss of a mixed batch: two classes per row, with weights lam and 1 - lam."""

    op = "soft_cross_entropy"
    results = {"loss": "scale", "gradient to logits": None, "gradient to weights": "scale", LOST: "entries"}

    def __init__(self, shape=(64, 1000), small=(4, 50), *, scale=3.0, offset=0.0, masked=False, smoothing=0.0, weighted=False,
                 reduction="mean", upstream=1.0, dtypes=DTYPES):  # fmt: skip
        self.shapes, self.scale, self.offset, self.masked = (shape, small), scale, offset, masked
        self.smoothing, self.weighted, self.reduction = smoothing, weighted, reduction
        self.upstream, self.dtypes = upstream, dtypes

    def draw(self, dtype, small):
        generator = torch.Generator().manual_seed(0)
        N, C, *inner = shape = self.shapes[small]
        wide = accumulator(dtype)
        z = self.offset + self.scale * torch.randn(shape, generator=generator, dtype=F64)
        y = torch.randint(C, (N, *inner), generator=generator)
        index = torch.arange(N).flip(0)
        lam = torch.rand(N, generator=generator, dtype=F64).to(wide)
        if self.masked:
            hidden = torch.rand(shape, generator=generator) < 0.3
            for classes in (y, y[index]):
                hidden.scatter_(1, classes.unsqueeze(1), False)
            z[hidden] = -math.inf
        w = torch.rand(C, generator=generator, dtype=F64).to(wide) + 0.1 if self.weighted else None
        rows = torch.randn(N, *inner, generator=generator, dtype=F64)
        upstream = (torch.tensor(self.upstream, dtype=F64) if self.reduction == "mean" else rows).to(wide)
        return z.to(dtype), torch.stack((lam, 1 - lam), 1), upstream, torch.stack((y, y[index]), 1), w

    def _options(self, w):
        return {"weight": w, "label_smoothing": self.smoothing, "reduction": self.reduction}

    def truth(self, *inputs):
        z, weights, upstream, classes, w = map(exact, inputs)
        target, options = (classes, weights), self._options(w)
        loss = reference.soft_cross_entropy(z, target, **options)
        dz, da = reference.soft_cross_entropy_grad(z, target, upstream, **options)

        per_pixel = (*weights.shape, *[1] * (z.ndim - 2))
        w = np.ones(z.shape[1]) if w is None else w
        hard, soft = (1 - self.smoothing) * w[classes], self.smoothing / z.shape[1] * w  # of [N, K, ...] and of [C]
        a = np.broadcast_to(weights.reshape(per_pixel), classes.shape)
        mass = np.sum(a * (hard + soft.sum()), axis=1)  # of the target of each row
        hot = classes[:, :, None] == np.arange(z.shape[1]).reshape(-1, *per_pixel[2:])  # [N, K, C, ...]
        u = np.sum((a * hard)[:, :, None] * hot, axis=1) + a.sum(1, keepdims=True) * soft.reshape(-1, *per_pixel[2:])
        mean = self.reduction == "mean"
        D = np.sum(a * w[classes]) if mean else 1.0
        factor = np.abs(upstream if mean else upstream[:, None]) / D
        beside = 2 * loss * w[classes] if mean else 0.0  # D moves as well
        da_size = np.abs(da) + factor * (hard + soft.sum() + beside)
        inner = tuple(range(2, z.ndim))
        return {
            "loss": (loss, np.abs(loss) + (mass.sum() / D if mean else mass)),
            "gradient to logits": (dz, np.abs(dz) + 2 * factor * u),
            "gradient to weights": (da.sum(inner), da_size.sum(inner)),
            **({LOST: (dz, dz)} if self.upstream > 1 else {}),
        }

    def ours(self, z, weights, upstream, classes, w):
        def op(z, weights):
            return fastmix.soft_cross_entropy(z, fastmix.SoftTarget(classes, weights), **self._options(w))

        return dict(zip(self.results, differentiate(op, upstream, z, weights), strict=False))

    def by_hand(self, z, weights, upstream, classes, w):
        y, lam, index = classes[:, 0], weights[:, 0], torch.arange(len(z), device=z.device).flip(0)
        for dtype in dict.fromkeys((z.dtype, accumulator(z.dtype))):
            if self.reduction == "mean" and w is None and not self.smoothing:
                for name, way in peers.LOSS.items():  # they take lam, so they have no gradient to weights
                    loss_and_dz = differentiate(lambda z: way(z.to(dtype), y, lam, index), upstream, z)  # noqa: B023
                    yield named(name, dtype), dict(zip(self.results, loss_and_dz, strict=False))
            way = partial(weighted_losses, classes=classes, w=w, smoothing=self.smoothing, reduction=self.reduction)
            values = differentiate(lambda z, a: way(z.to(dtype), a), upstream, z, weights)  # noqa: B023
            yield named("two hard losses, weighted", dtype), dict(zip(self.results, values, strict=False))


def weighted_losses(z, weights, *, classes, w, smoothing, reduction):
    """Two hard losses with weights of their own; the mean by torch's rule for class weights."""
    weights = weights.view(*weights.shape, *[1] * (z.dim() - 2)).expand(classes.shape)
    cast = None if w is None else w.to(z.dtype)  # torch takes no other
    losses = [F.cross_entropy(z, c, weight=cast, label_smoothing=smoothing, reduction="none") for c in classes.unbind(1)]
    rows = (weights * torch.stack(losses, 1)).sum(1)
    if reduction == "none":
        return rows
    return rows.sum() / (weights.sum() if w is None else (weights * w[classes]).sum())


class Dense(Loss):
    """The loss on probabilities."""

    results = {"loss": "scale", "gradient to logits": None, "gradient to target": None}

    def draw(self, dtype, small):
        z, _, upstream, _, w = super().draw(dtype, small)
        generator = torch.Generator().manual_seed(1)
        t = (3 * torch.randn(z.shape, generator=generator, dtype=F64)).softmax(1).to(dtype)
        return z, t, upstream, w

    def truth(self, *inputs):
        z, t, upstream, w = map(exact, inputs)
        loss = reference.soft_cross_entropy(z, t, **self._options(w))
        dz, dt = reference.soft_cross_entropy_grad(z, t, upstream, **self._options(w))
        factor = np.abs(upstream) / len(z)
        return {
            "loss": (loss, np.abs(loss) + t.sum() / len(z)),
            "gradient to logits": (dz, np.abs(dz) + 2 * factor * t),
            "gradient to target": (dt, np.abs(dt) + factor),
        }

    def ours(self, z, t, upstream, w):
        values = differentiate(lambda z, t: fastmix.soft_cross_entropy(z, t, **self._options(w)), upstream, z, t)
        return dict(zip(self.results, values, strict=True))

    def by_hand(self, z, t, upstream, w):
        for dtype in dict.fromkeys((z.dtype, accumulator(z.dtype))):
            values = differentiate(lambda z, t: F.cross_entropy(z.to(dtype), t.to(dtype)), upstream, z, t)  # noqa: B023
            yield named("F.cross_entropy", dtype), dict(zip(self.results, values, strict=True))


class Divergence:
    """The Jensen-Shannon divergence of three sets of logits. An element of the gradient is p*(gap - sum of p*gap), its terms,
    with gap = log p - log m; a loss counts as itself alone, however much cancels in it where the sets are alike."""

    op = "js_divergence"
    results = {"loss": "scale", "gradient to logits": None}

    def __init__(
        self, shape=(64, 1000), small=(4, 50), *, scale=3.0, apart=None, offset=0.0, masked=False, upstream=1.0, dtypes=DTYPES
    ):
        self.shapes, self.scale, self.apart, self.dtypes = (shape, small), scale, apart, dtypes
        self.offset, self.masked, self.upstream = offset, masked, upstream

    def draw(self, dtype, small):
        generator = torch.Generator().manual_seed(0)
        z = self.scale * torch.randn(3, *self.shapes[small], generator=generator, dtype=F64)
        if self.apart is not None:
            z = z[:1] + self.apart / self.scale * z  # the first too: it is as good as any
        z = self.offset * torch.arange(3, dtype=F64).view(3, 1, 1) + z
        if self.masked:
            z[torch.rand(z.shape, generator=generator) < 0.3] = -math.inf
        return z.to(dtype), torch.tensor(self.upstream, dtype=accumulator(dtype))

    def truth(self, *inputs):
        z, upstream = map(exact, inputs)
        wide = z.astype(np.longdouble)  # where it is no wider than float64, nearly equal sets have a coarser truth
        y = wide - wide.max(2, keepdims=True)
        p = np.exp(y)
        p /= p.sum(2, keepdims=True)
        p[p < 1e-300] = 0
        m = p.mean(0)
        with np.errstate(all="ignore"):
            gap = np.where(p == 0, 0, np.where(abs(p - m) < m / 2, np.log1p((p - m) / m), np.log(p / m)))
        D = (p * gap).sum(2, keepdims=True)
        dz = p * (gap - D) * upstream / len(p) / z.shape[1]
        terms = p * (np.abs(gap) + (p * np.abs(gap)).sum(2, keepdims=True)) * np.abs(upstream) / len(p) / z.shape[1]
        loss = D.mean()
        values = {
            "loss": (loss, np.abs(loss)),
            "gradient to logits": (dz.reshape(-1, z.shape[2]), terms.reshape(-1, z.shape[2])),
        }
        return {name: tuple(np.asarray(v, dtype=np.float64) for v in pair) for name, pair in values.items()}

    def ours(self, z, upstream):
        loss, dz = differentiate(fastmix.js_divergence, upstream, z)
        return dict(zip(self.results, (loss, dz.flatten(0, 1)), strict=True))

    def by_hand(self, z, upstream):
        for dtype in dict.fromkeys((z.dtype, accumulator(z.dtype))):
            for name, way in {"log_softmax and kl_div": log_js, **peers.JS_DIVERGENCE}.items():
                loss, dz = differentiate(lambda z: way(*z.to(dtype).unbind()), upstream, z)  # noqa: B023
                yield named(name, dtype), dict(zip(self.results, (loss, dz.flatten(0, 1)), strict=True))


def log_js(*sets):
    """The careful way: logarithms throughout."""
    logs = torch.stack([logits.log_softmax(1) for logits in sets])
    mixture = logs.logsumexp(0) - math.log(len(sets))
    return sum(F.kl_div(mixture, log, reduction="batchmean", log_target=True) for log in logs) / len(sets)


class Binary(Loss):
    """The sigmoid loss of a mixed batch, the mean over its classes."""

    op = "soft_binary_cross_entropy"
    results = {"loss": "scale", "gradient to logits": None, "gradient to weights": "scale", LOST: "entries"}

    def _options(self, w):
        options = {"weight": w, "pos_weight": None if w is None else w.flip(0) if isinstance(w, torch.Tensor) else w[::-1]}
        return {**options, "label_smoothing": self.smoothing, "reduction": self.reduction}

    def _target(self, weights, classes):
        return classes, weights

    def truth(self, *inputs):
        z, weights, upstream, classes, w = map(exact, inputs)
        target, options = self._target(weights, classes), self._options(w)
        loss = reference.soft_binary_cross_entropy(z, target, **options)
        dz, da = reference.soft_binary_cross_entropy_grad(z, target, upstream, **options)
        inner, mean = tuple(range(2, z.ndim)), self.reduction == "mean"
        rows = z.size // z.shape[1] if mean else 1
        factor = np.abs(upstream if mean else upstream[:, None]) / rows / z.shape[1] * (1 if w is None else w.max() ** 2)
        sizes = np.abs(da) + factor
        of_weights = (da.sum(inner), sizes.sum(inner)) if weights.ndim < da.ndim else (da, sizes)
        return {
            "loss": (loss, np.abs(loss)),
            "gradient to logits": (dz, np.abs(dz) + factor),
            list(self.results)[2]: of_weights,
            **({LOST: (dz, dz)} if self.upstream > 1 else {}),
        }

    def ours(self, z, weights, upstream, classes, w):
        def op(z, weights):
            target = self._target(weights, classes)
            target = fastmix.SoftTarget(*target) if isinstance(target, tuple) else target
            return fastmix.soft_binary_cross_entropy(z, target, **self._options(w))

        return dict(zip(self.results, differentiate(op, upstream, z, weights), strict=False))

    def by_hand(self, z, weights, upstream, classes, w):
        for dtype in dict.fromkeys((z.dtype, accumulator(z.dtype))):

            def op(z, weights, dtype=dtype):
                target = self._target(weights, classes)
                t = fastmix.SoftTarget(*target).dense(z.shape[1]) if isinstance(target, tuple) else target
                e, sides = self.smoothing, z.shape[1] if isinstance(target, tuple) else 2
                t = ((1 - e) * t + e / sides).to(dtype)
                options = {name: None if v is None else v.to(dtype) for name, v in list(self._options(w).items())[:2]}
                losses = F.binary_cross_entropy_with_logits(
                    z.to(dtype).movedim(1, -1),
                    t.movedim(1, -1),
                    **options,
                    reduction="mean" if self.reduction == "mean" else "none",
                )
                return losses if self.reduction == "mean" else losses.mean(-1)

            values = differentiate(op, upstream, z, weights)
            yield named("F.binary_cross_entropy_with_logits", dtype), dict(zip(self.results, values, strict=False))


class DenseBinary(Binary):
    """The same on rows of independent classes."""

    results = {"loss": "scale", "gradient to logits": None, "gradient to target": None}

    def draw(self, dtype, small):
        z, _, upstream, _, w = super().draw(dtype, small)
        t = torch.rand(z.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)
        return z, t, upstream, None, w

    def _target(self, weights, classes):
        return weights


class Adversary:
    """What Adversarial Mixing Policy climbs: the losses of a mixed batch of logits, the target's weights held. `size` is what each row's
    loss is multiplied by, as where it is a small part of a sum."""

    op, dtypes = "adversarial_mixing_loss", DTYPES
    results = {"loss": "scale", "gradient to lambda": "rounded"}

    def __init__(self, shape=(64, 1000), small=(4, 50), *, size=1.0, dtypes=DTYPES):
        self.shapes, self.size, self.dtypes = (shape, small), size, dtypes

    def draw(self, dtype, small):
        generator = torch.Generator().manual_seed(0)
        N, C = shape = self.shapes[small]
        x = (3 * torch.randn(shape, generator=generator, dtype=F64)).to(dtype)
        lam = torch.rand(N, generator=generator, dtype=F64).to(accumulator(dtype))
        return x, lam, torch.arange(N).flip(0), torch.randint(C, (N,), generator=generator)

    def truth(self, *inputs):
        x, lam, index, y = map(exact, inputs)
        mixed = exact(torch.from_numpy(reference.mix(x, lam, index)).to(inputs[0].dtype))
        target = np.stack((y, y[index]), 1), np.stack((lam, 1 - lam), 1)
        loss = self.size * reference.soft_cross_entropy(mixed, target, reduction="none")
        upstream = np.full(len(lam), self.size)
        dz, _ = reference.soft_cross_entropy_grad(mixed, target, upstream, reduction="none")
        g, terms = (reference.mix_grad(d, x, lam, index)[1] for d in (dz, np.abs(dz) * np.sign(x - x[index])))
        return {"loss": (loss, loss + self.size), "gradient to lambda": (g, terms)}

    def ours(self, x, lam, index, y):
        leaf, target = lam.clone().requires_grad_(), fastmix.Mix(lam, index).target(y)
        loss = self.size * fastmix.soft_cross_entropy(fastmix.mix(x, leaf, index), target, reduction="none")
        return {"loss": loss.detach(), "gradient to lambda": _lambda_gradient(loss, leaf, False)}

    def by_hand(self, x, lam, index, y):
        def op(dtype, leaf):
            wide, share, own = x.to(dtype), leaf.to(dtype).view(-1, 1), lam.to(dtype)
            logits = (share * wide + (1 - share) * wide[index]).to(x.dtype).to(dtype)
            losses = [F.cross_entropy(logits, labels, reduction="none") for labels in (y, y[index])]
            return self.size * (own * losses[0] + (1 - own) * losses[1])

        for dtype in dict.fromkeys((x.dtype, accumulator(x.dtype))):
            values = differentiate(partial(op, dtype), torch.ones_like(lam), lam)
            yield named("F.cross_entropy twice", dtype), dict(zip(self.results, values, strict=True))


CASES = {
    "normal": Mix(),
    "1000 + normal": Mix(offset=1000.0),
    "huge and tiny rows": Mix(spread=0.8),
    "64 rows share a partner": Mix(rows=64, shared=True),
    "channels_last": Mix(channels_last=True),
    "box": Mix(box=True),
    "mask of 4x4 cells": MixMasked(),
    "mask of every pixel": MixMasked((32, 32)),
    "moved blocks, 1000 + normal": MixMasked(plans=True, offset=1000.0),
    "three batches": Combination(),
    "16 batches, 1000 + normal": Combination(16, offset=1000.0),
    "logits [64, 1000]": Loss(),
    "upstream 0.7": Loss(upstream=0.7),
    "logits of 1e4": Loss(scale=1e4),
    "1e4 + logits": Loss(offset=1e4),
    "logits of -inf": Loss(masked=True),
    "logits [16, 21841]": Loss((16, 21841), (2, 21841)),
    "smoothing, class weights": Loss(smoothing=0.1, weighted=True),
    "upstream 65536": Loss(upstream=65536.0, dtypes=(F16,)),
    "per pixel [2, 19, 24, 24]": Loss((2, 19, 24, 24), (2, 5, 3, 3), reduction="none"),
    "probabilities": Dense(upstream=0.7),
    "three sets [64, 1000]": Divergence(upstream=0.7),
    "... 1e-3 apart": Divergence(apart=1e-3),
    "... 1e-3 apart, but for offsets of 50": Divergence(apart=1e-3, offset=50.0, dtypes=(F32, F64)),
    "... of 1e4": Divergence(scale=1e4),
    "... of -inf, each its own": Divergence(masked=True),
    "three sets [16, 21841]": Divergence((16, 21841), (2, 21841)),
    "sigmoid [64, 1000]": Binary(),
    "sigmoid, upstream 0.7": Binary(upstream=0.7),
    "sigmoid, logits of 1e4": Binary(scale=1e4),
    "sigmoid, logits near 0": Binary(scale=1e-3),
    "sigmoid, logits [16, 21841]": Binary((16, 21841), (2, 21841)),
    "sigmoid, smoothing, class weights": Binary(smoothing=0.1, weighted=True),
    "sigmoid, upstream 65536": Binary(upstream=65536.0, dtypes=(F16,)),
    "sigmoid, pixels [2, 19, 24, 24]": Binary((2, 19, 24, 24), (2, 5, 3, 3), reduction="none"),
    "sigmoid, rows": DenseBinary(upstream=0.7, smoothing=0.1),
    "sigmoid, rows, logits of 1e4": DenseBinary(scale=1e4),
    "adversary, logits [64, 1000]": Adversary(),
    "adversary, losses of 1e-6": Adversary((64, 10), (4, 10), size=1e-6, dtypes=(F16,)),
}


# The table


def backends(interpreter):
    """[(fastmix's backend, device)] that run here, and why others that were asked for do not."""
    found, missing = [("torch", torch.device("cpu"))], None
    if interpreter or torch.cuda.is_available():
        device = torch.device("cpu" if interpreter else "cuda")
        try:
            with fastmix.backend("triton"):
                _backend.of(torch.empty(0, device=device))
            found.append(("triton", device))
        except RuntimeError as error:
            missing = str(error)
    return found, missing


def table(where, cases=tuple(CASES), dtypes=DTYPES, small=False):
    """A row for each result, by case, dtype and backend, as it is found."""
    for name in cases:
        case = CASES[name]
        for dtype in [dtype for dtype in dtypes if dtype in case.dtypes]:
            inputs = case.draw(dtype, small)
            truth = case.truth(*inputs)
            for backend, device in where:
                if (backend, device.type, dtype) != ("triton", "cpu", BF16):
                    yield from _rows(name, dtype, backend, device, inputs, truth)


def _rows(name, dtype, backend, device, inputs, truth):
    case, inputs = CASES[name], [t if t is None else t.to(device) for t in inputs]
    with fastmix.backend(backend):
        ours = case.ours(*inputs)
    by_hand = list(case.by_hand(*inputs))
    for result, (values, terms) in truth.items():
        unit = case.results[result] or ("scale" if dtype in LIMITS["scale"] else "ulp")
        of = dtype if dtype in LIMITS[unit] else F32
        of_way = "gradient to logits" if result == LOST else result
        error = partial(largest_error, truth=values, terms=terms, unit=unit, dtype=of, row=ROW.get(result, (1,)))
        torchs = {way: error(results[of_way]) for way, results in by_hand if of_way in results}
        found, usual, nearest = error(ours[of_way]), next(iter(torchs.values())), min(torchs.values())
        verdict = "ok"
        if found > LIMITS[unit][of]:
            verdict = "BEYOND THE LIMIT"
        elif found > nearest + MARGINS[unit][of]:
            verdict = "further than " + ("usual" if found > usual + MARGINS[unit][of] else "nearest")
        yield {
            "op": case.op,
            "result": result,
            "dtype": name_of(dtype),
            "case": name,
            "backend": backend if device.type != "cpu" or backend == "torch" else "interpreter",
            "fastmix": found,
            "usual": usual,
            "nearest": nearest,
            "limit": LIMITS[unit][of],
            "unit": unit,
            "verdict": verdict,
            "torch": torchs,
        }


COLUMNS = "op", "result", "dtype", "case", "backend", "fastmix", "usual", "nearest", "limit", "unit", "verdict"
ERRORS = "fastmix", "usual", "nearest", "limit"


def _cell(row, column):
    value = row[column]
    if column not in ERRORS:
        return value
    if not math.isfinite(value):
        return "not finite"
    if row["unit"] == "entries":
        return str(int(value))
    return f"{value:.2g}" if row["unit"] != "ulp" else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def show(rows):
    cells = [[_cell(row, column) for column in COLUMNS] for row in rows]
    screen.table(COLUMNS, cells, ERRORS, styles=[None if row[-1] == "ok" else "bold red" for row in cells])


def with_progress(rows):
    with screen.progress() as step:
        for row in rows:
            step(f"{row['op']}, {row['case']}, {row['dtype']}, {row['backend']}")
            yield row


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench.numerics", description=__doc__.splitlines()[0])
    dtypes = {name_of(dtype): dtype for dtype in DTYPES}
    parser.add_argument("--case", default="", help="only cases whose name, after their op's, contains this: mix, box, upstream")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=list(dtypes), help="only these (default: all)")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--interpreter", action="store_true", help="the kernels in Triton's interpreter as well; small shapes")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(argv)
    cases = [name for name, case in CASES.items() if options.case in f"{case.op} {name}"]
    if not cases:
        parser.error(f"--case: expected part of one of {', '.join(CASES)}; got {options.case!r}")
    if options.interpreter:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton is imported by the first tensor that needs it
    where, missing = backends(options.interpreter)
    if missing and options.interpreter:
        parser.error(f"--interpreter: {missing}")

    small = options.small or options.interpreter
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, with infinities too
        rows = list(with_progress(table(where, cases, [dtypes[name] for name in options.dtype], small)))
    show(rows)
    broken, further = (sum(row["verdict"].startswith(text) for row in rows) for text in ("BEYOND", "further"))
    print(f"{len(rows)} rows: {broken} beyond the limit, {further} within it but further from the truth than eager torch.")
    print(
        "Errors are the largest over all elements: of the row's scale; in ulp of the correctly rounded result, which is up to"
    )
    print("0.5 from the truth; of sum |g*(x[i] - x[partner])|, the terms of a gradient to lambda. float64 is held to a float64")
    print(
        "oracle. Eager torch: usual is the usual way in the batch's own dtype, nearest the best of all, on a float32 copy too."
    )
    if small:
        print("Shapes are smaller than their names say.")
    if options.interpreter:
        print("bfloat16 is left out in the interpreter, which cuts numbers off to it where hardware rounds them.")
    if missing:
        print(f"The kernels were left out. {missing}")
    if options.json:
        given = sys.argv[1:] if argv is None else argv
        about = {"command": " ".join(["python -m fastmix.bench numerics", *given]), "where": _where(where)}
        about |= {"fastmix": fastmix.__version__, "torch": torch.__version__}
        write(pathlib.Path(options.json), {**about, "rows": [_finite(row) for row in rows]})
    return 1 if broken else 0


def _where(where):
    """The devices that the table was made on, in words."""
    names = [torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU" for _, device in where]
    return ", ".join(dict.fromkeys(names))


def _finite(value):
    """Rows for JSON, which has no infinity: null where an error is not finite."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
