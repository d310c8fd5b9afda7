"""The registry: an entry an op, read by every command of the benchmark and by the tests.

An entry is a subclass of `Op`, with

    sample      the op's inputs of a shape and dtype, drawn by a `Draw`
    call        the public op on a sample
    truth       the float64 oracle: value and gradients, each beside the sum of the sizes of its terms
    ways        {name: way(sample, dtype)}: what people write by hand in eager torch
    hard        {name: options}: the cases of `bench numerics`, with a shape and dtypes of their own where the entry's do not do
    sanitized   {options: shapes}: the cases of `bench sanitize`

A new op needs an entry here; where it has kernels, their cases in programs.py; and, to be timed, its sizes in bench_ops.py. Tables of
cases are {options: shapes}: options as a case's name shows them, "K=4, stacked"; a shape 4x3x32x32/f32, rows first, and one that ends in
- has its bytes counted but is not compiled.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

import fastmix
from fastmix import reference
from fastmix.bench import peers
from fastmix.bench.samples import BF16, F16, F32, F64, Sample, acc_dtype, differentiated, each_row, laid_out
from fastmix.mixing.augmix import OP as augmix_op

ENTRIES: dict[str, "Op"] = {}


class Op:
    """The base of an entry."""

    name = ""
    value = "forward"
    shapes: tuple = (16, 3, 32, 32), (5, 3, 8, 8)  # of `hard`, usual and small
    units: dict = {}  # of its results in `bench numerics`, where they are not the dtype's own
    rows: dict = {}  # the dimensions of a row, or the first of them, where they are not (1,)
    flipped: dict = {}  # the inputs that differ where a row's partner is that of the reversed batch
    hard: dict = {}
    sanitized: dict = {}

    def __init_subclass__(cls):
        if cls.name:
            ENTRIES[cls.name] = cls()

    def results(self, s):
        """(value, gradient to each leaf) by the public op."""
        return differentiated(self.call, s)

    def scale(self, key, terms):
        """The scale of each element of a result: its row's largest sum of terms, or its own."""
        rows = self.rows.get(key, (1,))
        rows = tuple(range(rows, np.ndim(terms))) if isinstance(rows, int) else rows
        return np.max(terms, axis=rows, keepdims=True) if rows else terms


# Mixing


class Mix(Op):
    name = "mix"
    units = {"lam": "terms"}
    rows = {"value": 1, "x": 1, "lam": ()}
    flipped = {"index": lambda s: torch.arange(s.rows, device=s.x.device).flip(0)}

    def sample(self, draw, shape, dtype, *, box=0, layout="contiguous_format", offset=0.0, spread=0.0, shared=False):
        x, g = draw.normal(2, *shape)
        if spread:
            x = each_row(torch.finfo(dtype).max ** (spread * torch.linspace(-1, 1, shape[0], dtype=F64)), x) * x
        x, g = laid_out((offset + x).to(dtype), layout), g.to(dtype)
        lam = draw.weights(shape[0]).to(acc_dtype(dtype))
        order = draw.permutation(shape[0])
        index = order.roll(1)[order.argsort()]  # one cycle: no row is its own partner
        corners = draw.boxes(shape[0], shape[len(shape) - box :]) if box else None
        index = torch.zeros_like(index) if shared else index
        about = {"rows": shape[0], "dtype": dtype, "leaves": ("x", "lam")}
        return Sample(x=x, lam=lam, index=index, box=corners, g=g, **about)

    def call(self, s):
        return fastmix.mix(s.x, s.lam, s.index, box=s.box)

    def truth(self, s):
        how = s.lam, s.index, s.box
        positive = np.abs(s.g) * np.sign(s.x - s.x[s.index])  # a g that makes every term of the gradient to lam positive
        dx, dlam = reference.mix_grad(s.g, s.x, *how)
        terms = reference.mix_grad(np.abs(s.g), s.x, *how)[0], reference.mix_grad(positive, s.x, *how)[1]
        return {
            "value": (reference.mix(s.x, *how), reference.mix(np.abs(s.x), *how)),
            "x": (dx, terms[0]),
            "lam": (dlam, terms[1]),
        }

    def ways(self, s):
        def written(way, s, dtype):
            x = s.x.to(dtype)
            mixed = way(x, s.lam.to(dtype), s.index)
            return (mixed if s.box is None else torch.where(peers.inside(s.box, x.shape), x[s.index], mixed)).to(s.dtype)

        return {name: functools.partial(written, peers.MIX[name]) for name in ("mixup-cifar10", "torch.lerp")}

    hard = {
        "normal": {}, "1000 + normal": {"offset": 1000.0}, "huge and tiny rows": {"spread": 0.8},
        "64 rows share a partner": {"shared": True, "shape": (64, 3, 32, 32)}, "channels_last": {"layout": "channels_last"},
        "box": {"box": 2},
    }  # fmt: skip
    sanitized = {
        "": "5x3x8x8/f32 7x3x5x5/bf16 3x5003/f32", "shared": "6x1100/f16", "box=2": "5x3x8x8/f32",
        "box=2, channels_last": "5x3x8x8/bf16", "box=3": "3x2x4x5x6/f32",
    }  # fmt: skip


class MixMasked(Op):
    """Weights of 0 and 1 are among the mask's; blocks that are `moved` change places by plans of their own."""

    name = "mix_masked"
    units = {"mask": "terms"}
    rows = {"value": 1, "x": 1, "mask": ()}
    flipped = Mix.flipped

    def sample(self, draw, shape, dtype, *, cells=(4, 4), binary=False, moved=False, offset=0.0, layout="contiguous_format"):
        x, g = draw.normal(2, *shape)
        cells = h, w = tuple(min(count, side) for count, side in zip(cells, shape[-2:], strict=True))
        mask = draw.weights(shape[0], h, w)
        index = torch.arange(shape[0], device=x.device).roll(-1)
        plan, partner_plan = draw.plans(shape[0], h * w) if moved else (None, None)
        if binary:
            mask = (torch.arange(h * w) % 2).view(h, w).expand(shape[0], -1, -1)
        x, g = (laid_out(t.to(dtype), layout) for t in (offset + x, g))
        mask = mask.to(acc_dtype(dtype)).contiguous()
        plans, rows = {"plan": plan, "partner_plan": partner_plan}, shape[0]
        return Sample(x=x, mask=mask, index=index, **plans, g=g, rows=rows, dtype=dtype, leaves=("x", "mask"))

    def call(self, s):
        return fastmix.mix_masked(s.x, s.mask, s.index, plan=s.plan, partner_plan=s.partner_plan)

    def truth(self, s):
        where = s.index, s.plan, s.partner_plan
        ones = np.ones_like(s.mask)  # every row as it is moved, less its partner as that is
        difference = reference.mix_masked(s.x, ones, *where) - reference.mix_masked(s.x, 0 * ones, *where)
        dx, dmask = reference.mix_masked_grad(s.g, s.x, s.mask, *where)
        return {
            "value": (reference.mix_masked(s.x, s.mask, *where), reference.mix_masked(np.abs(s.x), s.mask, *where)),
            "x": (dx, reference.mix_masked_grad(np.abs(s.g), s.x, s.mask, *where)[0]),
            "mask": (dmask, reference.mix_masked_grad(np.abs(s.g) * np.sign(difference), s.x, s.mask, *where)[1]),
        }

    def ways(self, s):
        def written(s, dtype):
            plans = () if s.plan is None else (s.plan, s.partner_plan)
            way = peers.patches if plans else peers.interpolated
            return way(s.x.to(dtype), s.mask.to(dtype), s.index, *plans).to(s.dtype)

        return {"mask over pixels": written}

    hard = {
        "mask of 4x4 cells": {}, "mask of every pixel": {"cells": (32, 32)},
        "moved blocks, 1000 + normal": {"moved": True, "offset": 1000.0},
    }  # fmt: skip
    sanitized = {"4x2 cells": "5x3x8x8/f32", "5x3 cells, moved": "3x3x15x9/bf16"}


class MixImages(Op):
    """Bytes, normalised and mixed; `mirrored`: every other image is."""

    name = "mix_images"
    units = {"lam": "terms"}
    rows = {"value": 1, "lam": ()}
    flipped = Mix.flipped

    def sample(self, draw, shape, dtype, *, box=0, cells=None, moved=False, mirrored=False, layout="contiguous_format"):
        rows, channels = shape[:2]
        images = laid_out(draw.integers(256, *shape).to(torch.uint8), layout)
        index = torch.arange(rows, device=images.device).roll(-1)
        lam = None if cells else draw.weights(rows).to(F32)
        mask = draw.weights(rows, *cells).to(F32).contiguous() if cells else None
        plan, partner_plan = draw.plans(rows, cells[0] * cells[1]) if moved else (None, None)
        corners = draw.boxes(rows, shape[len(shape) - box :]) if box else None
        flip = torch.arange(rows, device=images.device) % 2 == 0 if mirrored else None
        mean, std = ([start + 0.02 * (c % 7) for c in range(channels)] for start in (0.43, 0.22))
        about = {"g": draw.normal(*shape).to(dtype), "rows": rows, "dtype": dtype, "leaves": ("mask" if cells else "lam",)}
        how = {"box": corners, "mask": mask, "plan": plan, "partner_plan": partner_plan}
        return Sample(images=images, lam=lam, index=index, **how, flip=flip, mean=mean, std=std, **about)

    def mix(self, s):
        how = {"mask": s.mask, "plan": s.plan, "partner_plan": s.partner_plan}
        return fastmix.Mix(s.lam, s.index, box=s.box, **how)

    def call(self, s):
        return fastmix.mix_images(s.images, self.mix(s), mean=s.mean, std=s.std, flip=s.flip, dtype=s.dtype)

    def truth(self, s):
        how = {"index": s.index, "box": s.box, "mask": s.mask, "plan": s.plan, "partner_plan": s.partner_plan}
        value = reference.mix_images(s.images, s.mean, s.std, flip=s.flip, lam=s.lam, **how)
        terms = np.abs(reference.mix_images(s.images, [-m for m in s.mean], s.std, flip=s.flip, lam=s.lam, **how))
        x = reference.mix_images(s.images, s.mean, s.std, flip=s.flip)
        size = reference.mix_images(s.images, [-m for m in s.mean], s.std, flip=s.flip)
        if s.mask is not None:
            where = s.mask, s.index, s.plan, s.partner_plan
            dmask = reference.mix_masked_grad(s.g, x, *where)[1]
            sizes = reference.mix_masked_grad(np.abs(s.g), size, np.ones_like(s.mask), *where[1:])[1]
            return {"value": (value, terms), "mask": (dmask, np.abs(dmask) + np.abs(sizes))}
        where = s.lam, s.index, s.box
        positive = np.abs(s.g) * np.sign(x - x[s.index])
        return {
            "value": (value, terms),
            "lam": (reference.mix_grad(s.g, x, *where)[1], reference.mix_grad(positive, x, *where)[1]),
        }

    def ways(self, s):
        def written(s, dtype):
            like = [1, -1, *[1] * (s.images.dim() - 2)]
            mean, std = (255 * torch.tensor(v, dtype=dtype, device=s.images.device).view(like) for v in (s.mean, s.std))
            images = s.images if s.flip is None else torch.where(s.flip.view(-1, *like[2:], 1), s.images.flip(-1), s.images)
            x = images.to(dtype).sub(mean).div(std)
            lam = s.lam.to(dtype).view(-1, *[1] * (x.dim() - 1))
            mixed = lam * x + (1 - lam) * x[s.index]
            return (mixed if s.box is None else torch.where(peers.inside(s.box, x.shape), x[s.index], mixed)).to(s.dtype)

        return {"timm's lines": written}

    hard = {
        "bytes": {"dtypes": (F32, BF16, F16)},  # float64 is computed in float32
        "bytes, cut and mirrored": {"box": 2, "mirrored": True, "dtypes": (F32, BF16, F16)},
    }
    sanitized = {
        "": "5x3x8x8/f32 3x1x5x7/bf16", "box=2, mirrored": "5x3x8x8/bf16", "box=2, mirrored, channels_last": "3x3x6x10/f16",
        "4x2 cells": "5x3x8x8/f32", "5x3 cells, moved, mirrored": "3x3x15x9/f16", "box=3": "3x2x4x5x6/f32",
    }  # fmt: skip


class ConvexCombination(Op):
    """Weighted sums of K batches, as AugMix makes them; with edges one row is the first batch's."""

    name = "convex_combination"
    units = {"weights": "terms"}
    rows = {"value": 1, "sources": 2, "weights": ()}

    def sample(self, draw, shape, dtype, *, K=3, stacked=False, offset=0.0, layout="contiguous_format"):
        sources, g = offset + draw.normal(K, *shape), draw.normal(*shape)
        weights = draw.uniform(shape[0], K)
        weights = weights / weights.sum(1, keepdim=True)
        if draw.edges:
            weights[1] = torch.eye(K, dtype=weights.dtype)[0]
        sources = tuple(laid_out(source.to(dtype), layout) for source in sources)
        sources = torch.stack(sources) if stacked else sources
        g, weights = laid_out(g.to(dtype), layout), weights.to(acc_dtype(dtype))
        return Sample(sources=sources, weights=weights, g=g, rows=shape[0], dtype=dtype, leaves=("sources", "weights"))

    def call(self, s):
        return fastmix.convex_combination(s.sources, s.weights)

    def truth(self, s):
        dsources, dweights = reference.convex_combination_grad(s.g, s.sources, s.weights)
        size = reference.convex_combination(np.abs(s.sources), s.weights)
        terms = reference.convex_combination_grad(np.abs(s.g), np.abs(s.sources), s.weights)[1]
        value = reference.convex_combination(s.sources, s.weights)
        return {"value": (value, size), "sources": (dsources, np.abs(dsources)), "weights": (dweights, terms)}

    def ways(self, s):
        def written(way, s, dtype):
            return way(s.sources.to(dtype), s.weights.to(dtype)).to(s.dtype)

        return {name: functools.partial(written, way) for name, way in peers.COMBINE.items()}

    hard = {
        "three batches": {"stacked": True}, "16 batches, 1000 + normal": {"K": 16, "offset": 1000.0, "stacked": True},
    }  # fmt: skip
    sanitized = {
        "": "5x3x8x8/f32", "K=4, channels_last": "5x3x8x8/bf16", "K=2, stacked": "3x1101/f16", "K=16": "3x5003/f32",
    }  # fmt: skip


class ResizeMix(Op):
    name = "resize_mix"
    rows = {"value": 1, "x": 1}
    flipped = Mix.flipped

    def sample(self, draw, shape, dtype, *, offset=0.0, layout="contiguous_format"):
        x, g = draw.normal(2, *shape)
        x, g = (laid_out(t.to(dtype), layout) for t in (offset + x, g))
        index = torch.arange(shape[0], device=x.device).roll(-1)
        return Sample(x=x, index=index, box=draw.boxes(shape[0], shape[-2:]), g=g, rows=shape[0], dtype=dtype, leaves=("x",))

    def call(self, s):
        return fastmix.resize_mix(s.x, s.index, s.box)

    def truth(self, s):
        how = s.index, s.box
        return {
            "value": (reference.resize_mix(s.x, *how), reference.resize_mix(np.abs(s.x), *how)),
            "x": (reference.resize_mix_grad(s.g, *how), reference.resize_mix_grad(np.abs(s.g), *how)),
        }

    def ways(self, s):
        return {"F.interpolate, row by row": peers.resize_mix}

    hard = {
        "resized": {}, "resized, 1000 + normal": {"offset": 1000.0}, "resized, channels_last": {"layout": "channels_last"},
    }  # fmt: skip
    sanitized = {"": "5x3x8x8/f32 7x3x5x5/bf16", "channels_last": "5x3x8x8/bf16"}


# Nothing of these is differentiable


class AugMix(Op):
    """Two views of three chains, of every operation in turn."""

    name = "augmix"

    def sample(self, draw, shape, dtype, *, depth=1):
        images = draw.integers(256, *shape).to(torch.uint8)
        N, C, H, W = shape
        place = torch.arange(depth * 6 * N, device=images.device).view(depth, 6 * N)
        kinds = (place % 5 + 1).to(torch.int32)
        kinds[: depth - 1, 3::6] = 0  # some chains begin late
        turned = torch.tensor([0.8, 0.6, -0.2 * W, -0.6, 0.8, 0.4 * H], dtype=F64, device=images.device)
        numbers = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=F64, device=images.device)
        values = torch.where((kinds == 5)[..., None], turned, numbers)
        weights = draw.uniform(N, 2, 4).to(F32)
        factor, shift = draw.uniform(2, C).to(F32)
        return Sample(images=images, kinds=kinds, values=values, weights=weights, factor=factor, shift=shift, rows=N, dtype=dtype,
                      leaves=())  # fmt: skip

    def call(self, s):
        return augmix_op.launch(s.images, s.kinds, s.values, s.weights, s.factor, s.shift)

    sanitized = {"depth=3": "3x3x8x12/f32 2x1x5x7/f32 1x3x40x40/f32", "": "2x3x32x32/f32"}


# Cutting and moving blocks


class PuzzleCosts(Op):
    """Four blocks a side, neighbourhoods of four pixels, unless a case says otherwise."""

    name = "puzzle_costs"

    def sample(self, draw, shape, dtype, *, n=4, size=4, levels=3, layout="contiguous_format"):
        N, C, H, W = shape
        x, saliency = laid_out(draw.normal(*shape).to(dtype), layout), draw.uniform(N, H, W).to(F32) ** 4
        std = tuple(0.2 + 0.05 * c for c in range(C))
        return Sample(x=x, saliency=saliency, index=draw.partners(N), lam=draw.weights(N).to(F32), n=n, size=size, levels=levels,
                      std=std, rows=N, dtype=dtype, leaves=())  # fmt: skip

    def call(self, s):
        return fastmix.puzzle_costs(
            s.x, s.saliency, s.index, s.lam, s.n, std=s.std, levels=s.levels, neighborhood=s.size
        )  # fmt: skip

    sanitized = {
        "": "3x3x16x16/f32 2x1x16x32/bf16",
        "n=16, size=2": "2x3x32x32/f32",
        "n=2, size=2, channels_last": "2x3x28x28/f16",
    }


class GridCut(Op):
    """Costs of the kind that PuzzleMix has: [N, n, n, L]. The cut is the kernel's, wherever PyMaxflow is installed."""

    name = "grid_cut"

    def sample(self, draw, shape, dtype):
        N, n, _, L = shape
        unary = draw.uniform(N, n, n, L).to(dtype) / n**2
        vertical, horizontal = (draw.uniform(N, *size).to(dtype) / n**2 for size in ((n - 1, n), (n, n - 1)))
        return Sample(unary=unary, vertical=vertical, horizontal=horizontal, rows=N, dtype=dtype, leaves=())

    def call(self, s):
        return fastmix.grid_cut(s.unary, s.vertical, s.horizontal, solver="primal-dual")

    sanitized = {"": "3x4x4x3/f32 2x16x16x2/f32 2x7x7x4/f32"}


class TransportPlan(Op):
    name = "transport_plan"

    def sample(self, draw, shape, dtype):
        N, n, _ = shape
        mask = (torch.arange(n * n, device=draw.uniform(1).device) % 3).view(n, n).expand(N, n, n) / 2
        saliency = draw.uniform(N, n, n) ** 4
        saliency = (saliency / saliency.sum((1, 2), keepdim=True)).to(dtype)
        return Sample(mask=mask.to(dtype).contiguous(), saliency=saliency, rows=N, dtype=dtype, leaves=())

    def call(self, s):
        return fastmix.transport_plan(s.mask, s.saliency, 0.02)

    sanitized = {"": "3x4x4/f32 2x16x16/f32 2x20x20/f32"}


# Losses


class Loss(Op):
    """What both losses share: the logits, and a target of K components a row, of dense rows, or of mixed rows."""

    value, shapes = "loss", ((64, 1000), (4, 50))
    units = {"value": "scale", "weights": "scale"}
    rows = {"value": (), "lam": ()}

    def sample(self, draw, shape, dtype, *, K=2, dense=False, mixed=False, spread=3.0, offset=0.0, masked=False, upstream=1.0,
               class_weights=False, reduction="mean", target_dtype=None, **options):  # fmt: skip
        (N, C, *pixels), wide = shape, acc_dtype(dtype)
        z = draw.normal(*shape).mul_(spread).add_(offset)
        y, lam, classes, weights = draw.components(C, K, wide, N, *pixels)
        index = draw.partners(N)
        if masked:
            hidden = draw.chance(0.3, *shape)
            for labels in (y, y[index]):
                hidden.scatter_(1, labels.unsqueeze(1), False)
            z[hidden] = -math.inf
        weight = draw.uniform(C).to(wide) + 0.1 if class_weights else None
        g = draw.normal(N, *pixels) if reduction == "none" else torch.full((), upstream, dtype=F64, device=z.device)
        target = self.dense_target(draw.again(), shape).to(target_dtype or dtype) if dense or mixed else None
        return Sample(
            logits=z.to(dtype), y=y, lam=lam, index=index, classes=classes, weights=weights, target=target, weight=weight,
            g=g.to(wide), options={"reduction": reduction, **options}, dtype=dtype, kind=(dense, mixed), rows=N, pixels=len(pixels),
            leaves=("logits", *(("target", "lam") if mixed else ("target",) if dense else ("weights",))), upstream=upstream,
        )  # fmt: skip

    def target(self, s, oracle=False):
        dense, mixed = s.kind
        if mixed:
            return fastmix.MixedRows(s.target, s.lam, s.index)
        if dense or oracle:
            return s.target if dense else (s.classes, s.weights)
        return s.classes[:, 0] if s.weights is None else fastmix.SoftTarget(s.classes, s.weights)

    def with_lam(self, truth):
        """The gradient to lam too, of a row's weights lam and 1 - lam."""
        dweights, size = truth["weights"]
        if dweights.shape[1] == 2:
            truth["lam"] = dweights[:, 0] - dweights[:, 1], size.sum(1)
        return truth


class SoftCrossEntropy(Loss):
    name = "soft_cross_entropy"

    def dense_target(self, draw, shape):
        return (3 * draw.normal(*shape)).softmax(1)

    def call(self, s):
        return fastmix.soft_cross_entropy(s.logits, self.target(s), weight=s.weight, **s.options)

    def truth(self, s):
        options, target = {"weight": s.weight, **s.options}, self.target(s, oracle=True)
        loss = reference.soft_cross_entropy(s.logits, target, **options)
        dz, dtarget = reference.soft_cross_entropy_grad(s.logits, target, s.g, **options)
        if s.target is not None:
            factor, mass = np.abs(s.g) / len(s.logits), s.target.sum() / len(s.logits)
            sizes = np.abs(loss) + mass, np.abs(dz) + 2 * factor * s.target, np.abs(dtarget) + factor
            return dict(zip(("value", "logits", "target"), zip((loss, dz, dtarget), sizes, strict=True), strict=True))
        C, smoothing, mean = s.logits.shape[1], s.options.get("label_smoothing", 0.0), s.options["reduction"] == "mean"
        pixels = tuple(range(2, s.logits.ndim))
        ones = [1] * len(pixels)
        w = np.ones(C) if s.weight is None else s.weight
        hard, soft = (1 - smoothing) * w[s.classes], smoothing / C * w  # of [N, K, ...] and of [C]
        a = np.broadcast_to(s.weights.reshape(*s.weights.shape, *ones), s.classes.shape)
        weight_sum = np.sum(a * (hard + soft.sum()), axis=1)  # of each row's target
        hot = s.classes[:, :, None] == np.arange(C).reshape(-1, *ones)  # [N, K, C, ...]
        spread = np.sum((a * hard)[:, :, None] * hot, axis=1) + a.sum(1, keepdims=True) * soft.reshape(-1, *ones)
        denominator = np.sum(a * w[s.classes]) if mean else 1.0
        factor = np.abs(s.g if mean else s.g[:, None]) / denominator
        moving = 2 * loss * w[s.classes] if mean else 0.0  # the denominator depends on the weights as well
        size = np.abs(dtarget) + factor * (hard + soft.sum() + moving)
        value = loss, np.abs(loss) + (weight_sum.sum() / denominator if mean else weight_sum)
        logits = dz, np.abs(dz) + 2 * factor * spread
        return self.with_lam({"value": value, "logits": logits, "weights": (dtarget.sum(pixels), size.sum(pixels))})

    def ways(self, s):
        if s.target is not None:
            return {"F.cross_entropy": lambda s, dtype: F.cross_entropy(s.logits.to(dtype), s.target.to(dtype))}

        def of_labels(way, s, dtype):
            return way(s.logits.to(dtype), s.y, s.lam, s.index)

        def weighted(s, dtype):
            return peers.weighted_losses(s.logits.to(dtype), s.weights, s.classes, s.weight, **s.options)

        plain = s.weight is None and s.options == {"reduction": "mean"}
        ways = {name: functools.partial(of_labels, way) for name, way in peers.LOSS.items() if plain}
        return {**ways, "two hard losses, weighted": weighted}

    hard = {
        "logits [64, 1000]": {}, "upstream 0.7": {"upstream": 0.7}, "logits of 1e4": {"spread": 1e4},
        "1e4 + logits": {"offset": 1e4}, "logits of -inf": {"masked": True},
        "logits [16, 21841]": {"shape": (16, 21841), "small": (2, 21841)},
        "smoothing, class weights": {"label_smoothing": 0.1, "class_weights": True},
        "upstream 65536": {"upstream": 65536.0, "dtypes": (F16,)},
        "per pixel [2, 19, 24, 24]": {"reduction": "none", "shape": (2, 19, 24, 24), "small": (2, 5, 3, 3)},
        "probabilities": {"dense": True, "upstream": 0.7},
    }  # fmt: skip
    sanitized = {
        "": "5x16/f32 2x40000/f16", "class weights, label_smoothing=0.1, ignore_index=3": "6x40/f32",
        "reduction=sum": "4x33/f16", "label_smoothing=0.1": "3x1023/bf16 2x70001/bf16", "class weights": "3x130/f64",
        "K=5, reduction=none": "9x10/f32", "class weights, label_smoothing=0.1, reduction=none": "2x7x5x5/f32",
        "class weights, label_smoothing=0.1": "2x21841/f32", "dense, class weights, label_smoothing=0.1": "4x100/f32",
        "dense, reduction=none": "2x7x5x5/f16", "dense": "2x21841/bf16", "mixed, label_smoothing=0.1": "5x100/bf16",
        "mixed": "3x1023/f16 3x21841/f32 5x33/f32", "mixed, reduction=none": "3x7x5x5/f32",
    }  # fmt: skip


class JSDivergence(Op):
    """K sets of logits. A gradient's terms are p*(d - sum of p*d) with d = log p - log m; a loss has no size but its own, however
    much cancels in it where the sets are alike."""

    name, value, shapes = "js_divergence", "loss", Loss.shapes
    units = {"value": "scale"}
    rows = {"value": (), "logits": (2,)}

    def sample(self, draw, shape, dtype, *, K=3, stacked=False, spread=3.0, apart=None, offset=0.0, masked=False, upstream=1.0,
               **options):  # fmt: skip
        z = spread * draw.normal(K, *shape)
        if apart is not None:
            z = z[:1] + apart / spread * z
        z = offset * torch.arange(K, dtype=z.dtype, device=z.device).view(K, 1, 1) + z
        if masked:
            z[draw.chance(0.3, *z.shape)] = -math.inf
        g = torch.full((), upstream, dtype=F64, device=z.device)
        g = draw.normal(shape[0]) if options.get("reduction") == "none" else g
        logits = z.to(dtype) if stacked else tuple(one.to(dtype, copy=True) for one in z)
        index = draw.partners(shape[0])
        g, rows = g.to(acc_dtype(dtype)), shape[0]
        return Sample(logits=logits, index=index, g=g, options=options, rows=rows, dtype=dtype, leaves=("logits",))

    def call(self, s):
        return fastmix.js_divergence(s.logits, **s.options)

    def truth(self, s):
        z = np.stack(s.logits).astype(np.longdouble)  # float64 alone gives nearly equal sets a coarser truth
        p = np.exp(z - z.max(2, keepdims=True))
        p /= p.sum(2, keepdims=True)
        p[p < 1e-300] = 0
        m = p.mean(0)
        with np.errstate(all="ignore"):
            d = np.where(p == 0, 0, np.where(abs(p - m) < m / 2, np.log1p((p - m) / m), np.log(p / m)))
        divergence = (p * d).sum(2, keepdims=True)
        dz = p * (d - divergence) * s.g / len(p) / z.shape[1]
        terms = p * (np.abs(d) + (p * np.abs(d)).sum(2, keepdims=True)) * np.abs(s.g) / len(p) / z.shape[1]
        truth = {"value": (divergence.mean(), np.abs(divergence.mean())), "logits": (dz, terms)}
        return {name: tuple(np.asarray(v, dtype=np.float64) for v in pair) for name, pair in truth.items()}

    def ways(self, s):
        def written(way, s, dtype):
            return way(*(z.to(dtype) for z in s.logits))

        return {name: functools.partial(written, way) for name, way in peers.CAREFUL_JS.items()}

    hard = {
        "three sets [64, 1000]": {"upstream": 0.7, "stacked": True}, "... 1e-3 apart": {"apart": 1e-3, "stacked": True},
        "... 1e-3 apart, but for offsets of 50": {"apart": 1e-3, "offset": 50.0, "stacked": True, "dtypes": (F32, F64)},
        "... of 1e4": {"spread": 1e4, "stacked": True}, "... of -inf, each its own": {"masked": True, "stacked": True},
        "three sets [16, 21841]": {"shape": (16, 21841), "small": (2, 21841), "stacked": True},
    }  # fmt: skip
    sanitized = {
        "stacked": "5x40/f32", "": "7x33/bf16", "K=2, stacked, reduction=none": "5x100/f16", "K=4": "3x1/f64",
        "K=3": "2x5001/bf16",
    }  # fmt: skip


class SoftBinaryCrossEntropy(Loss):
    name = "soft_binary_cross_entropy"

    def dense_target(self, draw, shape):
        return draw.uniform(*shape)

    def call(self, s):
        return fastmix.soft_binary_cross_entropy(s.logits, self.target(s), **self.class_weights(s), **s.options)

    def class_weights(self, s):
        reverse = s.weight.flip(0) if isinstance(s.weight, torch.Tensor) else None if s.weight is None else s.weight[::-1]
        return {"weight": s.weight, "pos_weight": reverse}

    def truth(self, s):
        options, target = {**self.class_weights(s), **s.options}, self.target(s, oracle=True)
        loss = reference.soft_binary_cross_entropy(s.logits, target, **options)
        dz, dtarget = reference.soft_binary_cross_entropy_grad(s.logits, target, s.g, **options)
        pixels, mean = tuple(range(2, s.logits.ndim)), s.options["reduction"] == "mean"
        rows = s.logits.size // s.logits.shape[1] if mean else 1
        largest = 1 if s.weight is None else s.weight.max() ** 2
        factor = np.abs(s.g if mean else s.g[:, None]) / rows / s.logits.shape[1] * largest
        truth = {"value": (loss, np.abs(loss)), "logits": (dz, np.abs(dz) + factor)}
        if s.target is not None:
            return {**truth, "target": (dtarget, np.abs(dtarget) + factor)}
        size = np.abs(dtarget) + factor
        return self.with_lam({**truth, "weights": (dtarget.sum(pixels), size.sum(pixels))})

    def ways(self, s):
        def written(s, dtype):
            dense, e, mean = s.target is not None, s.options.get("label_smoothing", 0.0), s.options["reduction"] == "mean"
            t = s.target if dense else self.target(s).dense(s.logits.shape[1])
            t = ((1 - e) * t + e / (2 if dense else s.logits.shape[1])).to(dtype)
            weights = {name: None if w is None else w.to(dtype) for name, w in self.class_weights(s).items()}
            z, how = s.logits.to(dtype).movedim(1, -1), "mean" if mean else "none"
            losses = F.binary_cross_entropy_with_logits(z, t.movedim(1, -1), **weights, reduction=how)
            return losses if mean else losses.mean(-1)

        return {"F.binary_cross_entropy_with_logits": written}

    hard = {
        "sigmoid [64, 1000]": {}, "sigmoid, upstream 0.7": {"upstream": 0.7}, "sigmoid, logits of 1e4": {"spread": 1e4},
        "sigmoid, logits near 0": {"spread": 1e-3}, "sigmoid, logits [16, 21841]": {"shape": (16, 21841), "small": (2, 21841)},
        "sigmoid, smoothing, class weights": {"label_smoothing": 0.1, "class_weights": True},
        "sigmoid, upstream 65536": {"upstream": 65536.0, "dtypes": (F16,)},
        "sigmoid, pixels [2, 19, 24, 24]": {"reduction": "none", "shape": (2, 19, 24, 24), "small": (2, 5, 3, 3)},
        "sigmoid, rows": {"dense": True, "upstream": 0.7, "label_smoothing": 0.1},
        "sigmoid, rows, logits of 1e4": {"dense": True, "spread": 1e4},
    }  # fmt: skip
    sanitized = {
        "class weights, label_smoothing=0.1": "5x16/f32", "class_reduction=sum": "3x1023/bf16",
        "K=5, reduction=sum": "4x33/f16", "class weights": "3x130/f64 2x21841/bf16",
        "class weights, reduction=none": "2x7x5x5/bf16", "dense, class weights, label_smoothing=0.1": "4x100/f32",
        "dense, reduction=none": "2x7x5x5/f32", "dense": "2x9001/bf16", "mixed": "5x100/bf16 3x1023/f32",
    }  # fmt: skip
