"""What `bench static` compiles and counts: the kernels that an op launches, and the bytes that they cannot do without.

A case is a call of a public op, or its backward, on inputs of the registry; the kernels' launchers are watched. A kernel's floor are the
sectors of every tensor that must be read or written, each once: of all that its launcher takes and returns, unless `touched` knows
better. Tables of cases are {options: shapes}, as in ops.py. Shapes are those that users have: CIFAR, ImageNet, tokens, tables, 10 to
131072 classes, label maps. Forwards are of few rows, as if there were many.
"""

import contextlib
import importlib
import inspect
import unittest.mock
from typing import Any

import torch

import fastmix
from fastmix import _backend
from fastmix._torch.augmix_steps import OPERATIONS, step_numbers
from fastmix.bench import ops, traffic
from fastmix.bench.samples import F16, F32, Fixed, acc_dtype, laid_out, with_leaves
from fastmix.losses.soft_binary_cross_entropy import Options as BinaryCrossEntropy
from fastmix.mixing.mix import mix_known
from fastmix.puzzle.puzzle_costs import Options as Costs
from fastmix.sampling import draws

CPU = torch.device("cpu")


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


# Calls


@contextlib.contextmanager
def watched():
    """Ops run on the kernels, on CPU tensors too. Gives a list of the launchers' calls: (name, arguments by name, results)."""
    calls: list = []

    def watch(launcher):
        names = tuple(inspect.signature(launcher).parameters)

        def call(*arguments, **named):
            results = launcher(*arguments, **named)
            given = dict(zip(names, arguments, strict=False))
            calls.append((launcher.__name__, {**dict.fromkeys(names), **given, **named}, results))
            return results

        return call

    names = [name for name in api().__all__ if name not in ("accumulator", "state_device")]
    launchers = {name: watch(getattr(api(), name)) for name in names}
    chosen = unittest.mock.patch.object(_backend, "_choice", return_value="triton")
    with unittest.mock.patch.multiple(api(), **launchers), chosen, fastmix.backend("triton"):
        yield calls


@contextlib.contextmanager
def unlaunched():
    """No kernel is compiled or run inside the block: what launchers return there holds nothing."""
    from triton.runtime import interpreter, jit

    def nothing(*arguments, **options):
        return None

    interpreted = unittest.mock.patch.object(interpreter.GridExecutor, "__call__", nothing)
    with unittest.mock.patch.object(jit.JITFunction, "run", nothing), interpreted:
        yield


OPS = {"soft_ce": "soft_cross_entropy", "dense_ce": "soft_cross_entropy", "soft_bce": "soft_binary_cross_entropy"}


def inputs(name, shape, dtype, *, smoothing=0.0, known=False, **options):
    """Outside a box a row is its own. Dense rows have the arithmetic's dtype, mixed rows the logits'."""
    if name in OPS:
        options |= {"label_smoothing": smoothing, "target_dtype": dtype if options.get("mixed") else acc_dtype(dtype)}
        options |= {"dense": "mixed" not in options} if name == "dense_ce" else {}
    s = ops.ENTRIES[OPS.get(name, name)].sample(Fixed(), shape, dtype, **options)
    if name == "mix":
        lam, g = s.lam if s.box is None else torch.ones_like(s.lam), laid_out(s.g, options.get("layout", "contiguous_format"))
        s = s.replaced(lam=lam, g=g, inverse=s.index.argsort() if known else None)
    return s


def call(case, shape, dtype, *, gradient=None, lambda_gradient=False, validation=False, few=False, formed=False, upstream=2,
         **options):  # fmt: skip
    """Calls an op, or its backward; returns {kernel: its floor}. A loss without `formed` gives the gradient that its forward has formed
    away first. Rows are enough for a program each, unless they are `few`."""
    name, backward = case.removesuffix(" backward"), case.endswith(" backward")
    op, s = ops.ENTRIES[OPS.get(name, name)], inputs(name, shape, dtype, **options)
    loss = op.value == "loss"
    first = s.leaves[: backward or (loss and not validation)]
    wanted = [*(gradient.removeprefix("to ").split(" and ") if gradient else first), *["weights"] * lambda_gradient]
    s, leaves = with_leaves(s, wanted)
    many = constants("_launch", FEW_ROWS=0) if name == "soft_ce" and not few else contextlib.nullcontext()
    with watched() as calls, many:
        with unlaunched() if backward else contextlib.nullcontext():
            out = _forward(op, s)
            g = torch.full(out.shape, float(upstream), dtype=out.dtype) if loss else getattr(s, "g", None)
            if loss and backward and not formed and dtype != F16:
                torch.autograd.grad(out, leaves, g, retain_graph=True)
        if backward:
            calls.clear()
            torch.autograd.grad(out, leaves, g)
    return floors_of(calls, s, few)


def _forward(op, s):
    if getattr(s, "inverse", None) is not None:  # as a sampler knows it
        return mix_known(s.x, s.lam, s.index, s.box, s.inverse)
    options = getattr(s, "options", {})
    if options.get("threshold") and s.weights is not None and s.weights.requires_grad:  # the op does not ask for what is 0
        how = BinaryCrossEntropy(options["label_smoothing"], options["threshold"])
        return api().soft_bce_fwd(s.logits, s.weights, s.classes, *op.class_weights(s).values(), how, True, True)[0]
    return op.call(s)


def floors_of(calls, *about):
    return floors({kernel: tensors for one in calls for kernel, tensors in touched(*one, *about).items()})


# What a kernel touches


def flat(values):
    """The tensors among values, one by one."""
    if isinstance(values, (tuple, list)):
        return [tensor for value in values for tensor in flat(value)]
    return [values] if isinstance(values, torch.Tensor) else []


def floors(found):
    """{kernel: bytes of the sectors of the tensors that it touches}"""
    return {f"_{name}_kernel": traffic.whole_sectors(*flat(value)) for name, value in found.items()}


def counted(addresses):
    """The distinct sectors of these addresses in bytes, as a tensor of so many bytes; or so many."""
    count = addresses if isinstance(addresses, int) else addresses.div(traffic.SECTOR, rounding_mode="floor").unique().numel()
    return torch.empty(count * traffic.SECTOR, dtype=torch.uint8, device="meta")


def _inverse(index, counted):
    """What is read and written for the list of each row's users."""
    return {"inverse_index": (index, index, torch.empty(len(index) + 1, dtype=index.dtype))} if counted else {}


def _read(s):
    """What is read of a target: every value of mixed rows is of use to two of them."""
    dense, mixed = s.kind
    return (s.target, s.target, s.lam, s.index) if mixed else (s.target,) if dense else (s.weights, s.classes)


def touched(launcher, a, results, s=None, few=False):
    """{kernel: the tensors that it touches} of a launcher's call"""
    g, index = a.get("grad_output"), a.get("index")
    weights = a.get("class_weight"), a.get("pos_weight")
    if "cached_grad" in a:
        if a["cached_grad"] is not None and bool((g == 1).all()):  # only that is read: every row's, or the one once a row
            found = g if g.dim() else counted(s.count())
        else:
            read = _read(s) if hasattr(s, "kind") and (index is not None or a.get("need", (True,))[0]) else ()
            found = g, s.logits, read, weights, results
        return {launcher.replace("dense_bce", "soft_bce"): found}
    match launcher:
        case "mix_bwd":
            read = g, a["x"] if a["need_dlam"] else None, a["lam"], index, a["box"]
            return {"mix_bwd": (read, results), **_inverse(index, a["need_dx"] and a["inverse"] is None)}
        case "mix_masked_bwd":
            read = g, index, a["plan"], a["partner_plan"]
            if a["need_dmask"]:
                return {"mix_masked_dmask": (read, a["x"], results)}
            return {"mix_masked_dx": (read, a["mask"], results), **_inverse(index, a["partner_plan"] is None)}
        case "resize_mix_bwd":
            return {"resize_mix_bwd": (g, a["box"], results), **_inverse(index, True)}
        case "convex_combination_bwd":
            read = a["sources"] if a["need_dweights"] else None, a["weights"] if flat(results[0]) else None
            return {"convex_combination_bwd": (g, read, results)}
        case "augmix_fwd":
            (depth, chains), images, kinds = a["kinds"].shape, a["images"], a["kinds"]
            views = torch.empty(chains, *images.shape[1:], dtype=torch.uint8)
            tables = torch.empty(chains, images.shape[1], 256, dtype=torch.uint8)
            table, step = (images, kinds, [views, tables] * (depth - 1), tables), (images, kinds, [views] * (2 * depth - 1))
            return {"augmix_table": table, "augmix_step": step, "augmix_sum": (images, views, a["weights"], results)}
        case "puzzle_costs":
            std = torch.empty(a["x"].shape[1], dtype=torch.float64)
            return {
                "puzzle_costs": (_near_borders(a["x"], a["blocks"], a["options"]), a["saliency"], index, a["lam"], std, results)
            }
        case "transport_plan":
            return {"transport_plan": (a["mask"], a["saliency"], results)}
        case "soft_ce_fwd":
            return _soft_ce(s, results, few)
        case "dense_ce_fwd":
            return {"dense_ce_fwd": (s.logits, _read(s), weights, results[0], results[2])}
        case "js_divergence_fwd":
            return {"js_divergence_fwd": (s.logits, results[0].new_empty(s.rows), results[2])}
        case "soft_bce_fwd" | "dense_bce_fwd":
            losses = results[0].new_empty(s.logits.numel() // s.logits.shape[1])
            return {"soft_bce_fwd": (s.logits, _read(s), weights, losses, results[1:])}
    return {KERNELS.get(launcher, launcher): (*a.values(), results)}


KERNELS = {  # of launchers that are called otherwise
    "mix_images_fwd": "mix_images", "augmix_steps": "augmix_draw", "soft_target": "target", "row_keys": "keys", "draw_numbers": "numbers",
}  # fmt: skip


def _soft_ce(s, results, few):
    loss, denominator, _, dweights, dlogits = results
    gathered = None if s.weight is None else counted(s.classes.mul(s.weight.element_size()))
    every = s.weight if s.options.get("label_smoothing") else None
    target = _read(s), gathered if every is None else every
    found: dict = {"mass": (_read(s), denominator, gathered), "soft_ce_fwd": (s.logits, loss, dweights, dlogits, target)}
    if few:
        found |= {"soft_ce_part": (s.logits, every), "soft_ce_fwd": (_read(s), loss, dweights, gathered)}
        found |= {"soft_ce_bwd": (s.logits, dlogits, target)} if dlogits is not None else {}
    return found


def _near_borders(x, blocks, options):
    """The sectors of the pixels that are within a neighbourhood of a border of blocks."""
    near = []  # of each side
    for side in x.shape[2:]:
        block, size, place = side // blocks, options.neighborhood, torch.arange(side)
        behind = (place >= block) & (place % block < size)
        near.append(behind | ((place < side - block) & (place % block >= block - size)))
    pixels = (near[0][:, None] | near[1]).expand_as(x)
    return counted(torch.arange(x.numel()).as_strided(x.shape, x.stride())[pixels] * x.element_size())


# Launchers that no op of the registry calls so


def of_launcher(case, shape, dtype, **options):
    with watched() as calls:
        DIRECT[case](shape, dtype, **options)
    return floors_of(calls)


def state():
    return draws.state(0, 0, (None, 0))


def puzzle_costs(shape, dtype, **options):
    s = inputs("puzzle_costs", shape, dtype, **options)
    return api().puzzle_costs(s.x, s.saliency, s.index, s.lam, s.n, s.std, Costs(s.levels, 1.2, 0.5, 0.2, s.size))


def grid_cut(shape, dtype):
    s = inputs("grid_cut", shape, dtype)
    return api().grid_cut(s.unary, s.vertical, s.horizontal, 2)  # how many iterations changes neither the program nor its bytes


def puzzle_masks(shape, dtype, *, finer=1, still=False):
    N, m = shape[0], shape[1] * finer
    labels, lam, index = torch.zeros(shape, dtype=torch.int64), torch.full((N,), 0.5), torch.arange(N).roll(1)
    return api().puzzle_masks(labels, lam, index, None if still else torch.zeros(N, m, m), 3, finer)


def soft_target(shape, dtype):
    rows = torch.zeros(shape[0], dtype=torch.int64)
    return api().soft_target(rows, rows, torch.zeros(shape[0], dtype=dtype))


def dirichlet(shape, dtype, *, skip=False):
    return api().dirichlet(state(), *shape, (1.0, 1.0, 1.0) if skip else (1.0,), dtype, CPU)


DIRECT = {
    "puzzle_costs": puzzle_costs, "grid_cut": grid_cut, "puzzle_masks": puzzle_masks, "soft_target": soft_target, "dirichlet": dirichlet,
    "augmix_steps": lambda shape, dtype: api().augmix_steps(state(), True, *shape, True, step_numbers(3.0, 32, 32, OPERATIONS), CPU),
    "row_keys": lambda shape, dtype: api().row_keys(state(), shape[0], 0, CPU),
    "draw_numbers": lambda shape, dtype: api().draw_numbers(state(), *shape, dtype == F32, CPU),  # uniform, or normal ones
}  # fmt: skip

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


def sample(case, shape, dtype, *, sampler, labels=False):
    made, x = SAMPLERS[sampler.replace("_", " ")](), torch.zeros(shape, dtype=dtype)
    y = torch.zeros(shape[0], dtype=torch.int64) if labels else None
    with unittest.mock.patch.object(draws, "sample", api().sample_batch):
        drawn, target = made._sample(x, y, None, y)
    states = [owner._own_state(x.device) for owner in made._owners()]
    once = (states, drawn._lam, drawn._lam, drawn.index, drawn.box, drawn._inverse)
    once += () if target is None else (y, target.classes, target.weights)
    keys = {"keys": (states, drawn.index)} if shape[0] > MOST_COUNTED else {}
    if drawn.mask is None:
        return floors({"sample": once, **keys})
    groups = drawn.index, drawn.index
    return floors({"sample": (once, groups), "mask": (states, drawn.mask, groups, drawn._lam, drawn._lam)})


def program(case):
    """The function of a launcher's cases, of shape, dtype and options."""
    return sample if case == "sample" else of_launcher if case in DIRECT else call


PROGRAMS = {
    "mix": {
        "": "4x3x32x32/f32 2x3x224x224/f32 2x3x224x224/f16- 2x3x224x224/bf16- 2x3x225x225/bf16 2x196x768/bf16- 64x54/f32 16x300/f64",
        "channels_last": "2x3x224x224/bf16", "sequence first": "2x196x768/bf16", "box=2": "4x3x32x32/f32 2x3x224x224/f32",
        "channels_last, box=2": "2x3x224x224/bf16", "box=1": "2x12x1000/f32-", "box=3": "2x1x16x32x32/f32",
    },
    "mix backward": {
        "": "4x3x32x32/f32- 2x3x224x224/f32 2x3x225x225/bf16 2x3x224x224/f16-",
        "to x and lam": "2x3x224x224/f32 2x196x768/bf16 64x54/f32- 16x300/f64", "to lam": "2x3x224x224/f32",
        "channels_last, to x and lam": "2x3x224x224/bf16-", "sequence first": "2x196x768/bf16-",
        "to x and lam, box=2": "2x3x224x224/f32", "box=2": "4x3x32x32/f32-", "to x and lam, box=3": "2x1x16x32x32/f32",
        "known": "2x3x224x224/f32 2x3x224x224/bf16-", "known, to x and lam, box=2": "2x196x768/bf16",
    },
    "mix_images": {
        "": "4x3x32x32/f32 2x3x224x224/f32 2x3x224x224/bf16 2x3x225x225/bf16- 2x1x1000/f32",
        "mirrored": "2x3x224x224/f32- 2x3x224x224/bf16 2x3x225x225/bf16", "box=2, mirrored": "2x3x224x224/f32 2x3x224x224/bf16-",
        "box=2, mirrored, channels_last": "2x3x224x224/bf16", "channels_last": "2x3x224x224/f32-", "box=3": "2x1x16x32x32/f32",
        "16x16 cells, mirrored": "2x3x224x224/bf16", "4x4 cells, moved": "2x3x224x224/f32", "4x4 cells, moved, mirrored": "2x3x224x224/bf16-",
    },
    "convex_combination": {
        "": "4x3x32x32/f32 2x3x224x224/f32 2x3x225x225/bf16 64x54/f32", "K=4, stacked": "2x3x224x224/f32-",
        "K=4, channels_last": "2x3x224x224/bf16", "K=1": "2x3x224x224/f16-", "K=16": "2x3x64x64/f32",
        "K=16, stacked": "2x3x64x64/bf16", "K=2, sequence first": "2x196x768/bf16", "K=8": "16x300/f64",
    },
    "convex_combination backward": {
        "": "4x3x32x32/f32- 2x3x224x224/f32", "to sources and weights": "2x3x224x224/f32 64x54/f32",
        "to weights": "2x3x224x224/f32", "stacked, to sources and weights": "2x3x224x224/f32-",
        "K=16, to sources and weights": "2x3x64x64/f32", "K=4, channels_last, to sources and weights": "2x3x224x224/bf16",
        "K=16, stacked, to sources and weights": "2x3x64x64/bf16", "K=8, to sources and weights": "16x300/f64",
    },
    "mix_masked": {
        "1x1 cells": "2x3x224x224/f32-", "16x16 cells": "2x3x224x224/f32", "16x16 cells, binary": "2x3x224x224/f32-",
        "4x4 cells, moved": "2x3x224x224/bf16 4x3x32x32/f32-", "16x16 cells, moved, channels_last": "2x3x224x224/bf16",
        "224x224 cells": "2x3x224x224/f32", "224x224 cells, binary": "2x3x224x224/f32-", "128x300 cells": "2x128x300/f64",
        "15x15 cells": "2x3x225x225/bf16",
    },
    "mix_masked backward": {
        "1x1 cells, to x": "2x3x224x224/f32-", "16x16 cells, to x": "2x3x224x224/f32",
        "4x4 cells, moved, to x": "2x3x224x224/bf16 4x3x32x32/f32-",
        "16x16 cells, moved, channels_last, to x": "2x3x224x224/bf16-", "224x224 cells, to x": "2x3x224x224/f32",
        "128x300 cells, to x": "2x128x300/f64", "1x1 cells, to mask": "2x3x224x224/f32-",
        "16x16 cells, to mask": "2x3x224x224/f32", "4x4 cells, moved, to mask": "2x3x224x224/bf16 4x3x32x32/f32-",
        "16x16 cells, moved, channels_last, to mask": "2x3x224x224/bf16-", "224x224 cells, to mask": "2x3x224x224/f32",
        "128x300 cells, to mask": "2x128x300/f64", "15x15 cells, to x": "2x3x225x225/bf16",
    },
    "resize_mix": {
        "": "4x3x32x32/f32- 2x3x224x224/f32 2x3x224x224/bf16 16x3x30x30/f64", "channels_last": "2x3x224x224/bf16",
    },
    "resize_mix backward": {
        "to x": "4x3x32x32/f32- 2x3x224x224/f32 2x3x224x224/bf16 16x3x30x30/f64", "channels_last, to x": "2x3x224x224/bf16",
    },
    "augmix": {"": "2x3x32x32/f32 1x3x224x224/f32 2x1x15x15/f32"},
    "augmix_steps": {"": "768x3/f64"},
    "puzzle_costs": {
        "n=2": "2x3x32x32/f32", "n=8": "2x3x32x32/f32 2x3x224x224/f32 2x3x224x224/bf16", "n=16, size=2": "2x3x32x32/f32 2x3x224x224/f32",
        "n=8, channels_last": "2x3x224x224/f32", "n=4, levels=4": "2x1x28x28/f32",
    },
    "grid_cut": {
        "": "2x4x4x3/f32 2x8x8x3/f32 2x16x16x3/f32 2x16x16x2/f32 2x16x16x4/f32 2x14x14x3/f32",
    },
    "puzzle_masks": {"": "4x8x8/f32 4x16x16/f32", "finer=2": "4x16x16/f32", "still": "4x16x16/f32"},
    "transport_plan": {"": "2x8x8/f32 2x16x16/f32 2x28x28/f32 2x56x56/f32"},
    "sample": {
        "sampler=mixup, labels": "32x1/f32 32x1/f64", "sampler=mixup": "4097x1/f32", "sampler=mixup_of_a_and_b": "32x1/f32",
        "sampler=CutMix, labels": "32x32/f32 32x3x32x32/f32 32x1x16x32x32/f32", "sampler=CutMix_in_pairs": "32x3x32x32/f32",
        "sampler=masks": "4x1x32x32/f32 4x1x32x32/f64", "sampler=either, labels": "32x3x32x32/f32",
        "sampler=either_by_pairs": "32x3x32x32/f32", "sampler=either_of_two_seeds": "32x3x32x32/f32",
    },
    "soft_target": {"": "256x1/f32"}, "row_keys": {"": "256x1/f32"},
    "draw_numbers": {"": "64x3/f64 4x1024/f32"},
    "dirichlet": {"": "64x3/f32", "skip": "64x15/f32 64x3/f64"},
    "soft_ce": {
        "": "128x10/f32 4x1000/f16- 4x1000/bf16 4x1001/bf16 2x21841/f32 2x21841/f16 2x32768/bf16 2x50304/bf16 2x131072/bf16 2x128257/bf16 1x262144/bf16- 1x21x64x64/f32 1x150x32x32/bf16 1x1000x16x16/bf16",
        "K=1, validation": "128x10/f32- 4x1000/bf16 2x21841/bf16-",
        "lambda gradient": "16x100/f32 4x1000/f32- 2x21841/bf16 2x50304/bf16 1x21x64x64/bf16 1x150x15x15/bf16",
        "K=1": "4x1000/f32- 1x150x32x32/f32", "K=5": "4x1000/f32-", "class weights": "4x1000/f32-",
        "lambda gradient, smoothing=0.1, class weights": "4x1000/f32 4x1001/f64 2x8191/f64 2x21841/f32 2x32768/f32 2x32768/bf16 1x19x16x16/f32",
        "smoothing=0.1, lambda gradient": "2x8192/f64 2x16384/f32", "smoothing=0.1": "2x21841/f32 2x21841/bf16",
        "K=16, lambda gradient, smoothing=0.1, class weights": "2x21841/bf16", "K=5, lambda gradient": "2x32768/f16",
        "smoothing=0.1, class weights": "2x131072/f32", "few": "1x262144/bf16 1x262144/f32-",
        "few, lambda gradient, smoothing=0.1, class weights": "2x128257/bf16",
    },
    "soft_ce backward": {
        "formed": "128x10/f32- 4x1000/f32- 4x1000/bf16- 2x21841/bf16",
        "formed, reduction=none": "16x100/f32- 4x1000/bf16 1x150x32x32/bf16-",
        "": "4x1000/f16 2x21841/f16 2x131072/f16- 2x128257/f16", "formed, upstream=1": "4x1000/f32- 2x21841/bf16-",
        "smoothing=0.1, class weights": "2x32768/f32", "formed, smoothing=0.1, class weights": "2x32768/f32",
        "formed, upstream=1, reduction=none": "1x150x32x32/bf16",
    },
    "dense_ce": {
        "": "128x10/f32- 4x1000/f16- 4x1000/bf16 2x16384/f64 4x1001/bf16 2x10001/f32 2x21841/f32 2x21841/bf16 1x19x16x16/f32 1x150x32x32/bf16-",
        "smoothing=0.1, class weights": "4x1000/f32- 2x16384/f32", "smoothing=0.1": "2x16384/bf16",
        "mixed": "4x1000/f32 4x1001/bf16 2x19x16x16/bf16", "mixed, smoothing=0.1": "4x527/f32-",
    },
    "dense_ce backward": {
        "to logits and target": "4x1000/f16 4x1001/f16", "formed, upstream=1": "4x1000/f32-", "formed": "4x1000/f32-",
        "to target": "4x1000/f32-", "formed, smoothing=0.1, class weights": "2x21841/f32", "mixed": "4x1000/f16",
        "formed, reduction=none": "1x19x16x16/f32",
    },
    "js_divergence": {
        "": "128x10/f32 16x100/bf16- 4x1000/f32 4x1000/bf16 4x1000/f16- 4x1000/f64 2x32768/bf16", "stacked": "4x1000/bf16-",
        "validation": "4x1000/bf16-", "K=2": "2x1001/f32-", "K=16": "4x512/f32", "K=8": "2x21841/f32-", "K=4": "2x2048/f64-",
    },
    "js_divergence backward": {
        "formed": "128x10/f32- 4x1000/f32-", "": "4x1000/f16 2x32768/bf16-", "formed, upstream=1": "4x1000/f32-",
        "formed, reduction=none": "4x1000/bf16", "stacked": "4x1000/bf16-", "K=8": "2x21841/f32-", "K=4": "2x2048/f64-",
    },
    "soft_bce": {
        "": "128x10/f32 4x1000/f32 4x1000/f16- 4x1000/bf16 4x1001/bf16 2x21841/bf16 2x131072/bf16- 1x150x15x15/bf16-",
        "K=1, validation": "128x10/f32- 4x1000/bf16-", "lambda gradient": "16x100/f32- 1x150x16x16/bf16 1x1000x16x16/bf16",
        "dense": "4x1000/f32 2x21841/f32", "lambda gradient, threshold=0.2, smoothing=0.1, class weights": "4x1000/f32",
        "K=16, lambda gradient": "4x1000/bf16", "dense, smoothing=0.1": "4x1000/bf16",
        "lambda gradient, smoothing=0.1, class weights": "2x4096/f64 2x21841/f32 1x150x16x16/f32 1x19x16x16/f64",
        "dense, smoothing=0.1, class weights": "2x4096/f64 1x19x16x16/f32", "mixed": "4x527/f32 2x21841/f32- 2x19x16x16/bf16",
        "mixed, threshold=0.2, smoothing=0.1, class weights": "4x1000/bf16",
    },
    "soft_bce backward": {
        "": "4x1000/f16", "formed, upstream=1": "4x1000/f32-", "dense, formed, upstream=1": "4x1000/f32-",
        "formed, reduction=none, threshold=0.2, smoothing=0.1, class weights": "4x1000/bf16", "dense, to target": "4x1000/f32-",
        "dense, to logits and target, smoothing=0.1, class weights": "4x1000/f16 2x4096/f64 2x21841/f32",
        "formed": "2x21841/bf16", "formed, reduction=none": "1x150x16x16/bf16", "mixed": "4x1000/f16",
    },
}  # fmt: skip
