"""What `bench static` compiles and counts: every launcher on inputs of the registry, and the bytes that it cannot do without.

A function of PROGRAMS runs a launcher and returns {kernel: its floor in bytes}: the sectors of every tensor that must be read or
written, each once. Its table is {options: shapes}, as in ops.py. Shapes are those that users have: CIFAR, ImageNet, tokens, tables,
10 to 131072 classes, label maps. Forwards are of few rows, as if there were many.
"""

import contextlib
import importlib
import unittest.mock
from typing import Any

import torch

import fastmix
from fastmix._torch.augmix_steps import OPERATIONS, step_numbers
from fastmix._torch.transport_plan import sorted_offsets
from fastmix.bench import ops, traffic
from fastmix.bench.samples import F16, Fixed, acc_dtype, laid_out
from fastmix.losses.soft_binary_cross_entropy import Options as BinaryCrossEntropy
from fastmix.losses.soft_cross_entropy import Options as CrossEntropy
from fastmix.mixing.mix_images import Pairing
from fastmix.puzzle.puzzle_costs import Options as Costs
from fastmix.sampling import draws


def api():
    """The kernels' launchers. Importing them imports Triton."""
    return importlib.import_module("fastmix.kernels.api")


@contextlib.contextmanager
def constants(module, **values):
    """Other values of a kernel module's constants; no tile size is remembered from before or after."""
    modules = [importlib.import_module(f"fastmix.kernels.{name}") for name in (module, "_launch", "_row_layout")]

    def forget():
        for function in (value for each in modules for value in vars(each).values() if hasattr(value, "cache_clear")):
            function.cache_clear()

    with unittest.mock.patch.multiple(modules[0], **values):
        forget()
        yield
    forget()


def floors(**touched):
    """{kernel: bytes of the sectors of the tensors that it touches}"""
    return {f"_{name}_kernel": traffic.whole_sectors(*tensors) for name, tensors in touched.items()}


# Mixing


def _mix(shape, dtype, layout="contiguous_format", **options):
    """Inputs: outside a box a row is its own."""
    s = ops.ENTRIES["mix"].sample(Fixed(), shape, dtype, layout=layout, **options)
    lam = s.lam if s.box is None else torch.ones_like(s.lam)
    return s.replaced(lam=lam, g=laid_out(s.g, layout))


def mix(shape, dtype, **options):
    s = _mix(shape, dtype, **options)
    return floors(mix_fwd=(s.x, s.lam, s.index, s.box, api().mix_fwd(s.x, s.lam, s.index, s.box, None)))


def mix_backward(shape, dtype, gradient="to x", known=False, **options):
    s = _mix(shape, dtype, **options)
    x, need_dx, need_dlam = s.x if gradient != "to x" else None, gradient != "to lam", gradient != "to x"
    inverse = s.index.argsort() if known else None
    gradients = api().mix_bwd(s.g, x, s.lam, s.index, s.box, s.x.stride(), need_dx, need_dlam, inverse)
    return floors(mix_bwd=(s.g, x, s.lam, s.index, s.box, *gradients), **_inverse(s.index, need_dx and not known))


def _inverse(index, counted):
    """What is read and written for the list of each row's users."""
    return {"inverse_index": (index, index, torch.empty(len(index) + 1, dtype=index.dtype))} if counted else {}


def mix_masked(shape, dtype, gradient=None, **options):
    s = ops.ENTRIES["mix_masked"].sample(Fixed(), shape, dtype, **options)
    plans, to_x = (s.index, s.plan, s.partner_plan), gradient == "to x"
    if gradient is None:
        return floors(mix_masked_fwd=(s.x, s.mask, *plans, api().mix_masked_fwd(s.x, s.mask, *plans)))
    dx, dmask = api().mix_masked_bwd(s.g, s.x, s.mask, *plans, s.x.stride(), to_x, not to_x)
    if not to_x:
        return floors(mix_masked_dmask=(s.g, s.x, *plans, dmask))
    return floors(mix_masked_dx=(s.g, s.mask, *plans, dx), **_inverse(s.index, s.partner_plan is None))


def resize_mix(shape, dtype, gradient=None, **options):
    s = ops.ENTRIES["resize_mix"].sample(Fixed(), shape, dtype, **options)
    if gradient is None:
        return floors(resize_mix_fwd=(s.x, s.index, s.box, api().resize_mix_fwd(s.x, s.index, s.box)))
    dx = api().resize_mix_bwd(s.g, s.index, s.box, s.x.stride())
    return floors(resize_mix_bwd=(s.g, s.box, dx), **_inverse(s.index, True))


def mix_images(shape, dtype, layout="contiguous_format", **options):
    s = ops.ENTRIES["mix_images"].sample(Fixed(), shape, dtype, layout=layout, **options)
    factor, shift = torch.ones(2, shape[1])
    how, pairing = (factor, shift, s.flip), Pairing(s.lam, s.mask, s.index, s.box, s.plan, s.partner_plan)
    mixed = api().mix_images_fwd(s.images, *how, pairing, dtype, layout == "channels_last")
    return floors(mix_images=(s.images, *how, *pairing, mixed))


def convex_combination(shape, dtype, **options):
    s = ops.ENTRIES["convex_combination"].sample(Fixed(), shape, dtype, **options)
    return floors(convex_combination_fwd=(*s.sources, s.weights, api().convex_combination_fwd(s.sources, s.weights)))


def convex_combination_backward(shape, dtype, gradient="to sources", **options):
    s = ops.ENTRIES["convex_combination"].sample(Fixed(), shape, dtype, **options)
    need_dsources, need_dweights = gradient != "to weights", gradient != "to sources"
    needed = need_dsources if isinstance(s.sources, torch.Tensor) else (need_dsources,) * len(s.sources)
    sources = s.sources if need_dweights else None
    dsources, dweights = api().convex_combination_bwd(s.g, sources, s.weights, s.g.stride(), needed, need_dweights)
    touched = [*(s.sources if need_dweights else ()), *([s.weights, *dsources] if need_dsources else ())]
    return floors(convex_combination_bwd=(s.g, *touched, dweights))


def augmix(shape, dtype, depth=1):
    s = ops.ENTRIES["augmix"].sample(Fixed(), shape, dtype, depth=depth)
    out = api().augmix_fwd(s.images, s.kinds, s.values, s.weights, s.factor, s.shift)
    chains = torch.empty(s.kinds.shape[1], *shape[1:], dtype=torch.uint8)
    tables = torch.empty(s.kinds.shape[1], shape[1], 256, dtype=torch.uint8)
    return floors(
        augmix_table=(s.images, s.kinds, *[chains, tables] * (depth - 1), tables),
        augmix_step=(s.images, s.kinds, *[chains] * (2 * depth - 1)),
        augmix_sum=(s.images, chains, s.weights, out),
    )


def augmix_steps(shape, dtype):
    state = draws.state(0, 0, (None, 0))
    numbers = step_numbers(3.0, 32, 32, OPERATIONS)
    return floors(augmix_draw=(state, *api().augmix_steps(state, True, *shape, True, numbers, torch.device("cpu"))))


def puzzle_costs(shape, dtype, **options):
    s = ops.ENTRIES["puzzle_costs"].sample(Fixed(), shape, dtype, **options)
    found = api().puzzle_costs(s.x, s.saliency, s.index, s.lam, s.n, s.std, Costs(s.levels, 1.2, 0.5, 0.2, s.size))
    near = []  # of each side, whether a pixel is within a neighbourhood of a border
    for side in shape[2:]:
        block = side // s.n
        place = torch.arange(side)
        behind = (place >= block) & (place % block < s.size)
        near.append(behind | ((place < side - block) & (place % block >= block - s.size)))
    pixels = (near[0][:, None] | near[1]).expand_as(s.x)
    numbers = torch.arange(s.x.numel()).as_strided(s.x.shape, s.x.stride())[pixels]
    sectors = (numbers * s.x.element_size() // traffic.SECTOR).unique().numel() * traffic.SECTOR
    std = torch.empty(shape[1], dtype=torch.float64)
    rest = floors(puzzle_costs=(s.saliency, s.index, s.lam, std, *found))
    return {kernel: floor + sectors for kernel, floor in rest.items()}


def grid_cut(shape, dtype):
    s = ops.ENTRIES["grid_cut"].sample(Fixed(), shape, dtype)
    costs = s.unary, s.vertical, s.horizontal
    labels, bound = api().grid_cut(*costs, 2)  # how many iterations there are changes neither the program nor its bytes
    return floors(grid_cut=(*costs, labels, bound))


def puzzle_masks(shape, dtype, *, finer=1, still=False):
    N, m = shape[0], shape[1] * finer
    labels, lam, index = torch.zeros(shape, dtype=torch.int64), torch.full((N,), 0.5), torch.arange(N).roll(1)
    saliency = None if still else torch.zeros(N, m, m)
    return floors(puzzle_masks=(labels, lam, index, saliency, *api().puzzle_masks(labels, lam, index, saliency, 3, finer)))


def transport_plan(shape, dtype):
    s = ops.ENTRIES["transport_plan"].sample(Fixed(), shape, dtype)
    plan = api().transport_plan(s.mask, s.saliency, sorted_offsets(shape[1], 0.8, s.mask.device), shape[1])
    return floors(transport_plan=(s.mask, s.saliency, plan))


# Sampling

PAIRS: Any = {"per": "pair"}
MOST_COUNTED = 4096  # rows: partners of more are found by sorting keys
SAMPLERS = {
    "mixup": lambda: fastmix.Mixup(0.4, seed=0),
    "mixup of a and b": lambda: fastmix.Mixup((0.4, 2.0), seed=0),
    "CutMix": lambda: fastmix.CutMix(seed=0),
    "CutMix in pairs": lambda: fastmix.CutMix(**PAIRS, seed=0),
    "masks": lambda: fastmix.BetaMask(0.4, (8, 8), seed=0),
    "either": lambda: fastmix.RandomMix(fastmix.Mixup(0.4), fastmix.CutMix(), seed=0),
    "either by pairs": lambda: fastmix.RandomMix(fastmix.Mixup(0.4, **PAIRS), fastmix.CutMix(**PAIRS), per="pair", seed=0),
    "either of two seeds": lambda: fastmix.RandomMix(fastmix.Mixup(0.4, seed=1), fastmix.CutMix((0.4, 2.0)), seed=0),
}


def sample(shape, dtype, *, sampler, labels=False):
    made, x = SAMPLERS[sampler.replace("_", " ")](), torch.zeros(shape, dtype=dtype)
    y = torch.zeros(shape[0], dtype=torch.int64) if labels else None
    with unittest.mock.patch.object(draws, "sample", api().sample_batch):
        drawn, target = made._sample(x, y, None, y)
    states = [owner._own_state(x.device) for owner in made._owners()]
    touched = [*states, drawn._lam, drawn._lam, drawn.index, drawn.box, drawn._inverse]
    touched += [] if target is None else [y, target.classes, target.weights]
    keys = {"keys": (*states, drawn.index)} if shape[0] > MOST_COUNTED else {}
    if drawn.mask is None:
        return floors(sample=touched, **keys)
    groups = drawn.index, drawn.index
    return floors(sample=[*touched, *groups], mask=(*states, drawn.mask, *groups, drawn._lam, drawn._lam))


def soft_target(shape, dtype):
    rows = torch.zeros(shape[0], dtype=torch.int64)
    return floors(target=(rows, rows, own := torch.zeros(shape[0], dtype=dtype), *api().soft_target(rows, rows, own)))


def row_keys(shape, dtype):
    state = draws.state(0, 0, (None, 0))
    return floors(keys=(state, *api().row_keys(state, shape[0], 0, torch.device("cpu"))))


def draw_numbers(shape, dtype):
    """Uniform numbers, in float64, or normal ones, in float32."""
    state = draws.state(0, 0, (None, 0))
    return floors(numbers=(state, api().draw_numbers(state, *shape, dtype == torch.float32, torch.device("cpu"))))


def dirichlet(shape, dtype, *, skip=False):
    state = draws.state(0, 0, (None, 0))
    return floors(
        dirichlet=(state, api().dirichlet(state, *shape, (1.0, 1.0, 1.0) if skip else (1.0,), dtype, torch.device("cpu")))
    )


# Losses


def _loss(op, shape, dtype, **options):
    """Inputs of a loss. Dense rows have the arithmetic's dtype, mixed rows the logits', and labels as they are no weights."""
    target_dtype = dtype if options.get("mixed") else acc_dtype(dtype)
    return ops.ENTRIES[op].sample(Fixed(), shape, dtype, target_dtype=target_dtype, **options)


def _backward(s, formed, upstream, reduction):
    """(upstream gradient, saved numbers of a row, the gradient that the forward has formed or None). Every row has an upstream gradient
    of its own where nothing is reduced."""
    rows, sets = s.count(), () if hasattr(s, "y") else (len(s.logits),)
    g = torch.full((rows,) if reduction == "none" else (), float(upstream), dtype=acc_dtype(s.dtype))
    zeros = torch.zeros_like(s.logits) if isinstance(s.logits, torch.Tensor) else tuple(map(torch.zeros_like, s.logits))
    return g, torch.ones(3, *sets, rows, dtype=g.dtype), zeros if formed else None


def _backward_floor(kernel, s, formed, upstream, g, *touched):
    """A backward that finds its gradient formed, for an upstream gradient of 1, only reads that: every row's, or the one once a row."""
    if formed and upstream == 1:
        return {f"_{kernel}_kernel": traffic.whole_sectors(g) if g.dim() else s.count() * traffic.SECTOR}
    return floors(**{kernel: (g, *touched)})


def _read(s):
    """What is read of a target: every value of mixed rows is of use to two of them."""
    dense, mixed = s.kind
    return (s.target, s.target, s.lam, s.index) if mixed else (s.target,) if dense else (s.weights, s.classes)


def _target(s):
    """A target as its launchers take it."""
    dense, mixed = s.kind
    return (s.target, s.lam, s.index) if mixed else (s.target, None, None) if dense else (s.weights, s.classes)


def soft_ce(shape, dtype, *, smoothing=0.0, lambda_gradient=False, validation=False, few=False, **options):
    s = _loss("soft_cross_entropy", shape, dtype, **options)
    form, how = not validation and dtype != F16, CrossEntropy(-100, smoothing, "mean")
    with contextlib.nullcontext() if few else constants("_launch", FEW_ROWS=0):  # as where rows are enough for a program each
        loss, denominator, _, dweights, dlogits = api().soft_ce_fwd(s.logits, *_target(s), s.weight, how, lambda_gradient, form)
    gathered = 0
    if s.weight is not None:
        sectors = s.classes.mul(s.weight.element_size()).div(traffic.SECTOR, rounding_mode="floor")
        gathered = sectors.unique().numel() * traffic.SECTOR
    every = s.weight if smoothing else None
    target = traffic.whole_sectors(*_read(s), every) + gathered * (every is None)
    found = floors(mass=(*_read(s), denominator), soft_ce_fwd=(s.logits, loss, dweights, dlogits))
    found["_mass_kernel"] += gathered
    found["_soft_ce_fwd_kernel"] += target
    if few:
        found |= floors(soft_ce_part=(s.logits, every), soft_ce_fwd=(*_read(s), loss, dweights))
        found["_soft_ce_fwd_kernel"] += gathered
        if form:
            found["_soft_ce_bwd_kernel"] = target + traffic.whole_sectors(s.logits, dlogits)
    return found


def soft_ce_backward(shape, dtype, *, formed=False, upstream=2, reduction="mean", smoothing=0.0, **options):
    s = _loss("soft_cross_entropy", shape, dtype, **options)
    g, stats, cached = _backward(s, formed, upstream, reduction)
    denominator, how = torch.ones((), dtype=g.dtype) if reduction == "mean" else None, CrossEntropy(-100, smoothing, reduction)
    dlogits = api().soft_ce_bwd(s.logits, *_target(s), s.weight, how, denominator, stats, g, cached)
    return _backward_floor("soft_ce_bwd", s, formed, upstream, g, s.logits, *_read(s), s.weight, dlogits)


def dense_ce(shape, dtype, *, smoothing=0.0, mixed=False, **options):
    s = _loss("soft_cross_entropy", shape, dtype, dense=not mixed, mixed=mixed, **options)
    how = CrossEntropy(-100, smoothing, "mean")
    loss, _, dlogits = api().dense_ce_fwd(s.logits, *_target(s), s.weight, how, dtype != F16)
    return floors(dense_ce_fwd=(s.logits, *_read(s), s.weight, loss, dlogits))


def dense_ce_backward(shape, dtype, *, gradient="to logits", formed=False, upstream=2, reduction="mean", smoothing=0.0, mixed=False,
                      **options):  # fmt: skip
    s = _loss("soft_cross_entropy", shape, dtype, dense=not mixed, mixed=mixed, **options)
    g, stats, cached = _backward(s, formed, upstream, reduction)
    need_dlogits, need_dtarget = gradient != "to target", gradient != "to logits"
    how, read = CrossEntropy(-100, smoothing, reduction), _read(s) if mixed or need_dlogits else ()
    gradients = api().dense_ce_bwd(s.logits, *_target(s), s.weight, how, stats, g, cached, (need_dlogits, need_dtarget))
    return _backward_floor("dense_ce_bwd", s, formed, upstream, g, s.logits, *read, s.weight, *gradients)


def js_divergence(shape, dtype, *, validation=False, **options):
    s = ops.ENTRIES["js_divergence"].sample(Fixed(), shape, dtype, **options)
    need = not validation if isinstance(s.logits, torch.Tensor) else (not validation,) * len(s.logits)
    loss, _, gradients = api().js_divergence_fwd(s.logits, 1.0, "mean", need, not validation and dtype != F16)
    losses = torch.empty(shape[0], dtype=loss.dtype)
    return floors(js_divergence_fwd=(*s.logits, losses, *(() if gradients is None else gradients)))


def js_divergence_backward(shape, dtype, *, formed=False, upstream=2, reduction="mean", **options):
    s = ops.ENTRIES["js_divergence"].sample(Fixed(), shape, dtype, **options)
    g, stats, cached = _backward(s, formed, upstream, reduction)
    need = True if isinstance(s.logits, torch.Tensor) else (True,) * len(s.logits)
    gradients = api().js_divergence_bwd(s.logits, 1.0, reduction, stats, g, cached, need)
    return _backward_floor("js_divergence_bwd", s, formed, upstream, g, *s.logits, *gradients)


def _bce(shape, dtype, smoothing, threshold, reduction, **options):
    """(inputs, class weights and positive ones, options)"""
    s = _loss("soft_binary_cross_entropy", shape, dtype, **options)
    weights = s.weight, None if s.weight is None else s.weight.clone()
    return s, weights, BinaryCrossEntropy(smoothing, threshold, "mean", reduction)


def soft_bce(shape, dtype, *, smoothing=0.0, threshold=None, lambda_gradient=False, validation=False, **options):
    s, weights, how = _bce(shape, dtype, smoothing, threshold, "mean", **options)
    form, slope = not validation and dtype != F16, None
    if s.target is None:
        loss, slope, dlogits = api().soft_bce_fwd(s.logits, *_target(s), *weights, how, lambda_gradient, form)
    else:
        loss, dlogits = api().dense_bce_fwd(s.logits, *_target(s), *weights, how, form)
    losses = torch.empty(s.logits.numel() // s.logits.shape[1], dtype=loss.dtype)
    return floors(soft_bce_fwd=(s.logits, *_read(s), *weights, losses, slope, dlogits))


def soft_bce_backward(shape, dtype, *, gradient="to logits", formed=False, upstream=2, reduction="mean", smoothing=0.0, threshold=None,
                      **options):  # fmt: skip
    s, weights, how = _bce(shape, dtype, smoothing, threshold, reduction, **options)
    g, stats, cached = _backward(s, formed, upstream, reduction)
    need_dlogits, need_dtarget = gradient != "to target", gradient != "to logits"
    read = _read(s) if need_dlogits or s.kind[1] else ()
    if s.target is None:
        gradients = (api().soft_bce_bwd(s.logits, *_target(s), *weights, how, g, cached),)
    else:
        gradients = api().dense_bce_bwd(s.logits, *_target(s), *weights, how, g, cached, (need_dlogits, need_dtarget))
    return _backward_floor("soft_bce_bwd", s, formed, upstream, g, s.logits, *read, *weights, *gradients)


PROGRAMS = {
    "mix": (mix, {
        "": "4x3x32x32/f32 2x3x224x224/f32 2x3x224x224/f16- 2x3x224x224/bf16- 2x3x225x225/bf16 2x196x768/bf16- 64x54/f32 16x300/f64",
        "channels_last": "2x3x224x224/bf16", "sequence first": "2x196x768/bf16", "box=2": "4x3x32x32/f32 2x3x224x224/f32",
        "channels_last, box=2": "2x3x224x224/bf16", "box=1": "2x12x1000/f32-", "box=3": "2x1x16x32x32/f32",
    }),
    "mix backward": (mix_backward, {
        "": "4x3x32x32/f32- 2x3x224x224/f32 2x3x225x225/bf16 2x3x224x224/f16-",
        "to x and lam": "2x3x224x224/f32 2x196x768/bf16 64x54/f32- 16x300/f64", "to lam": "2x3x224x224/f32",
        "channels_last, to x and lam": "2x3x224x224/bf16-", "sequence first": "2x196x768/bf16-",
        "to x and lam, box=2": "2x3x224x224/f32", "box=2": "4x3x32x32/f32-", "to x and lam, box=3": "2x1x16x32x32/f32",
        "known": "2x3x224x224/f32 2x3x224x224/bf16-", "known, to x and lam, box=2": "2x196x768/bf16",
    }),
    "mix_images": (mix_images, {
        "": "4x3x32x32/f32 2x3x224x224/f32 2x3x224x224/bf16 2x3x225x225/bf16- 2x1x1000/f32",
        "mirrored": "2x3x224x224/f32- 2x3x224x224/bf16 2x3x225x225/bf16", "box=2, mirrored": "2x3x224x224/f32 2x3x224x224/bf16-",
        "box=2, mirrored, channels_last": "2x3x224x224/bf16", "channels_last": "2x3x224x224/f32-", "box=3": "2x1x16x32x32/f32",
        "16x16 cells, mirrored": "2x3x224x224/bf16", "4x4 cells, moved": "2x3x224x224/f32", "4x4 cells, moved, mirrored": "2x3x224x224/bf16-",
    }),
    "convex_combination": (convex_combination, {
        "": "4x3x32x32/f32 2x3x224x224/f32 2x3x225x225/bf16 64x54/f32", "K=4, stacked": "2x3x224x224/f32-",
        "K=4, channels_last": "2x3x224x224/bf16", "K=1": "2x3x224x224/f16-", "K=16": "2x3x64x64/f32",
        "K=16, stacked": "2x3x64x64/bf16", "K=2, sequence first": "2x196x768/bf16", "K=8": "16x300/f64",
    }),
    "convex_combination backward": (convex_combination_backward, {
        "": "4x3x32x32/f32- 2x3x224x224/f32", "to sources and weights": "2x3x224x224/f32 64x54/f32",
        "to weights": "2x3x224x224/f32", "stacked, to sources and weights": "2x3x224x224/f32-",
        "K=16, to sources and weights": "2x3x64x64/f32", "K=4, channels_last, to sources and weights": "2x3x224x224/bf16",
        "K=16, stacked, to sources and weights": "2x3x64x64/bf16", "K=8, to sources and weights": "16x300/f64",
    }),
    "mix_masked": (mix_masked, {
        "1x1 cells": "2x3x224x224/f32-", "16x16 cells": "2x3x224x224/f32", "16x16 cells, binary": "2x3x224x224/f32-",
        "4x4 cells, moved": "2x3x224x224/bf16 4x3x32x32/f32-", "16x16 cells, moved, channels_last": "2x3x224x224/bf16",
        "224x224 cells": "2x3x224x224/f32", "224x224 cells, binary": "2x3x224x224/f32-", "128x300 cells": "2x128x300/f64",
        "15x15 cells": "2x3x225x225/bf16",
    }),
    "mix_masked backward": (mix_masked, {
        "1x1 cells, to x": "2x3x224x224/f32-", "16x16 cells, to x": "2x3x224x224/f32",
        "4x4 cells, moved, to x": "2x3x224x224/bf16 4x3x32x32/f32-",
        "16x16 cells, moved, channels_last, to x": "2x3x224x224/bf16-", "224x224 cells, to x": "2x3x224x224/f32",
        "128x300 cells, to x": "2x128x300/f64", "1x1 cells, to mask": "2x3x224x224/f32-",
        "16x16 cells, to mask": "2x3x224x224/f32", "4x4 cells, moved, to mask": "2x3x224x224/bf16 4x3x32x32/f32-",
        "16x16 cells, moved, channels_last, to mask": "2x3x224x224/bf16-", "224x224 cells, to mask": "2x3x224x224/f32",
        "128x300 cells, to mask": "2x128x300/f64", "15x15 cells, to x": "2x3x225x225/bf16",
    }),
    "resize_mix": (resize_mix, {
        "": "4x3x32x32/f32- 2x3x224x224/f32 2x3x224x224/bf16 16x3x30x30/f64", "channels_last": "2x3x224x224/bf16",
    }),
    "resize_mix backward": (resize_mix, {
        "to x": "4x3x32x32/f32- 2x3x224x224/f32 2x3x224x224/bf16 16x3x30x30/f64", "channels_last, to x": "2x3x224x224/bf16",
    }),
    "augmix": (augmix, {"": "2x3x32x32/f32 1x3x224x224/f32 2x1x15x15/f32"}),
    "augmix_steps": (augmix_steps, {"": "768x3/f64"}),
    "puzzle_costs": (puzzle_costs, {
        "n=2": "2x3x32x32/f32", "n=8": "2x3x32x32/f32 2x3x224x224/f32 2x3x224x224/bf16", "n=16, size=2": "2x3x32x32/f32 2x3x224x224/f32",
        "n=8, channels_last": "2x3x224x224/f32", "n=4, levels=4": "2x1x28x28/f32",
    }),
    "grid_cut": (grid_cut, {
        "": "2x4x4x3/f32 2x8x8x3/f32 2x16x16x3/f32 2x16x16x2/f32 2x16x16x4/f32 2x14x14x3/f32",
    }),
    "puzzle_masks": (puzzle_masks, {"": "4x8x8/f32 4x16x16/f32", "finer=2": "4x16x16/f32", "still": "4x16x16/f32"}),
    "transport_plan": (transport_plan, {"": "2x8x8/f32 2x16x16/f32 2x28x28/f32 2x56x56/f32"}),
    "sample": (sample, {
        "sampler=mixup, labels": "32x1/f32 32x1/f64", "sampler=mixup": "4097x1/f32", "sampler=mixup_of_a_and_b": "32x1/f32",
        "sampler=CutMix, labels": "32x32/f32 32x3x32x32/f32 32x1x16x32x32/f32", "sampler=CutMix_in_pairs": "32x3x32x32/f32",
        "sampler=masks": "4x1x32x32/f32 4x1x32x32/f64", "sampler=either, labels": "32x3x32x32/f32",
        "sampler=either_by_pairs": "32x3x32x32/f32", "sampler=either_of_two_seeds": "32x3x32x32/f32",
    }),
    "soft_target": (soft_target, {"": "256x1/f32"}), "row_keys": (row_keys, {"": "256x1/f32"}),
    "draw_numbers": (draw_numbers, {"": "64x3/f64 4x1024/f32"}),
    "dirichlet": (dirichlet, {"": "64x3/f32", "skip": "64x15/f32 64x3/f64"}),
    "soft_ce": (soft_ce, {
        "": "128x10/f32 4x1000/f16- 4x1000/bf16 4x1001/bf16 2x21841/f32 2x21841/f16 2x32768/bf16 2x50304/bf16 2x131072/bf16 2x128257/bf16 1x262144/bf16- 1x21x64x64/f32 1x150x32x32/bf16 1x1000x16x16/bf16",
        "K=1, validation": "128x10/f32- 4x1000/bf16 2x21841/bf16-",
        "lambda gradient": "16x100/f32 4x1000/f32- 2x21841/bf16 2x50304/bf16 1x21x64x64/bf16 1x150x15x15/bf16",
        "K=1": "4x1000/f32- 1x150x32x32/f32", "K=5": "4x1000/f32-", "class weights": "4x1000/f32-",
        "lambda gradient, smoothing=0.1, class weights": "4x1000/f32 4x1001/f64 2x8191/f64 2x21841/f32 2x32768/f32 2x32768/bf16 1x19x16x16/f32",
        "smoothing=0.1, lambda gradient": "2x8192/f64 2x16384/f32", "smoothing=0.1": "2x21841/f32 2x21841/bf16",
        "K=16, lambda gradient, smoothing=0.1, class weights": "2x21841/bf16", "K=5, lambda gradient": "2x32768/f16",
        "smoothing=0.1, class weights": "2x131072/f32", "few": "1x262144/bf16 1x262144/f32-",
        "few, lambda gradient, smoothing=0.1, class weights": "2x128257/bf16",
    }),
    "soft_ce backward": (soft_ce_backward, {
        "formed": "128x10/f32- 4x1000/f32- 4x1000/bf16- 2x21841/bf16",
        "formed, reduction=none": "16x100/f32- 4x1000/bf16 1x150x32x32/bf16-",
        "": "4x1000/f16 2x21841/f16 2x131072/f16- 2x128257/f16", "formed, upstream=1": "4x1000/f32- 2x21841/bf16-",
        "smoothing=0.1, class weights": "2x32768/f32", "formed, smoothing=0.1, class weights": "2x32768/f32",
        "formed, upstream=1, reduction=none": "1x150x32x32/bf16",
    }),
    "dense_ce": (dense_ce, {
        "": "128x10/f32- 4x1000/f16- 4x1000/bf16 2x16384/f64 4x1001/bf16 2x10001/f32 2x21841/f32 2x21841/bf16 1x19x16x16/f32 1x150x32x32/bf16-",
        "smoothing=0.1, class weights": "4x1000/f32- 2x16384/f32", "smoothing=0.1": "2x16384/bf16",
        "mixed": "4x1000/f32 4x1001/bf16 2x19x16x16/bf16", "mixed, smoothing=0.1": "4x527/f32-",
    }),
    "dense_ce backward": (dense_ce_backward, {
        "to logits and target": "4x1000/f16 4x1001/f16", "formed, upstream=1": "4x1000/f32-", "formed": "4x1000/f32-",
        "to target": "4x1000/f32-", "formed, smoothing=0.1, class weights": "2x21841/f32", "mixed": "4x1000/f16",
        "formed, reduction=none": "1x19x16x16/f32",
    }),
    "js_divergence": (js_divergence, {
        "": "128x10/f32 16x100/bf16- 4x1000/f32 4x1000/bf16 4x1000/f16- 4x1000/f64 2x32768/bf16", "stacked": "4x1000/bf16-",
        "validation": "4x1000/bf16-", "K=2": "2x1001/f32-", "K=16": "4x512/f32", "K=8": "2x21841/f32-", "K=4": "2x2048/f64-",
    }),
    "js_divergence backward": (js_divergence_backward, {
        "formed": "128x10/f32- 4x1000/f32-", "": "4x1000/f16 2x32768/bf16-", "formed, upstream=1": "4x1000/f32-",
        "formed, reduction=none": "4x1000/bf16", "stacked": "4x1000/bf16-", "K=8": "2x21841/f32-", "K=4": "2x2048/f64-",
    }),
    "soft_bce": (soft_bce, {
        "": "128x10/f32 4x1000/f32 4x1000/f16- 4x1000/bf16 4x1001/bf16 2x21841/bf16 2x131072/bf16- 1x150x15x15/bf16-",
        "K=1, validation": "128x10/f32- 4x1000/bf16-", "lambda gradient": "16x100/f32- 1x150x16x16/bf16 1x1000x16x16/bf16",
        "dense": "4x1000/f32 2x21841/f32", "lambda gradient, threshold=0.2, smoothing=0.1, class weights": "4x1000/f32",
        "K=16, lambda gradient": "4x1000/bf16", "dense, smoothing=0.1": "4x1000/bf16",
        "lambda gradient, smoothing=0.1, class weights": "2x4096/f64 2x21841/f32 1x150x16x16/f32 1x19x16x16/f64",
        "dense, smoothing=0.1, class weights": "2x4096/f64 1x19x16x16/f32", "mixed": "4x527/f32 2x21841/f32- 2x19x16x16/bf16",
        "mixed, threshold=0.2, smoothing=0.1, class weights": "4x1000/bf16",
    }),
    "soft_bce backward": (soft_bce_backward, {
        "": "4x1000/f16", "formed, upstream=1": "4x1000/f32-", "dense, formed, upstream=1": "4x1000/f32-",
        "formed, reduction=none, threshold=0.2, smoothing=0.1, class weights": "4x1000/bf16", "dense, to target": "4x1000/f32-",
        "dense, to logits and target, smoothing=0.1, class weights": "4x1000/f16 2x4096/f64 2x21841/f32",
        "formed": "2x21841/bf16", "formed, reduction=none": "1x150x16x16/bf16", "mixed": "4x1000/f16",
    }),
}  # fmt: skip
