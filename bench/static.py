"""What every kernel costs, from its compiled code and the memory it touches: no GPU is needed.

    python -m fastmix.bench static [--arch 90 ...] [--case TEXT] [--json FILE] [--bytes-only | --compile-only] [--update]

The launchers themselves are run on CPU tensors of a few rows, rows of the true length and layout (no program depends on how
many there are), once for each table:

compiled    Triton compiles, for an architecture that need not be there, exactly the specialisation that each launch asks for,
            and nothing is launched. Registers and spilled bytes come from the binary's resource report, shared memory from what
            a launch asks for; how many bytes a load or store moves per thread, narrowest and widest, and how many move fewer
            than 16 (labels and numbers of a row do), from the assembly text.
bytes       Triton's interpreter runs the kernels, in a process of its own, and `fastmix.bench.traffic` counts what they touch,
            in whole sectors; reading again what was read before counts again, though a GPU's L2 may serve it. They stand over
            the floor: every input and output byte of the op once. A formed gradient under an upstream of 1 needs one look a row.

`costs.json`, beside this file in a checkout, holds the limits, which are what the Triton named there gave. Sectors are held to
it with any Triton; registers, shared memory and widths with that one; spilled bytes with any, but others may spill a few. The
exit status is 1 if a limit is broken, 2 where there is no Triton. --update writes the limits anew: see that the difference is
meant.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Callable

import torch

from fastmix.bench import screen, traffic
from fastmix.losses.soft_binary_cross_entropy import Options as BinaryOptions
from fastmix.losses.soft_cross_entropy import Options as CrossEntropyOptions

ARCHES = ("80", "90", "100", "gfx942")
LIMITS = pathlib.Path(__file__).with_name("costs.json")
SLACK = 1.001  # sectors over the floor may exceed their limit by this factor: ratios are rounded
OTHERS_SPILL = 144  # bytes, with a Triton that the limits were not made with: 3.3, 3.6 and 3.9 spill up to 80, one program 136
LOOSE = 0.95  # below this much of a limit, the limit is to be tightened
TIGHTEN = "python -m fastmix.bench static --update"


def __getattr__(name):
    if name == "api":  # Triton is imported by whoever needs it
        return importlib.import_module("fastmix.kernels.api")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- compiling -----------------------------------------------------------------------------------------------------------------


class _Target:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(self.target)  # Triton keeps compiled kernels by device

    def get_current_stream(self, device=None):
        return 0


def compile_launches(arch, call):
    """Calls a launcher and returns [(kernel name, cost)] for what it would have launched on this architecture."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if hasattr(compiled, "result"):  # newer Tritons may compile in the background
            compiled = compiled.result()
        launched.append((self.__name__, _cost(compiled)))

    JITFunction.run = compile_only
    before = driver.active if torch.cuda.is_available() else None
    driver.set_active(_Target(arch))
    try:
        call()
    finally:
        JITFunction.run = run
        if before is not None:
            driver.set_active(before)
    return launched


def _cost(compiled):
    amd = "amdgcn" in compiled.asm
    text = compiled.asm["amdgcn"] if amd else _resources(compiled.asm["cubin"])

    def value(key):
        return int(re.search(rf"\b{key}:\s*(\d+)", text).group(1))

    if amd:
        spills = 4 * 64 * value("vgpr_spill_count") + 4 * value("sgpr_spill_count")
        registers = value("vgpr_count")
    else:
        registers, spills = value("REG"), value("STACK")
    counts = access_counts(compiled.asm["amdgcn" if amd else "ptx"])
    ld, st = map(_ends, counts)
    return {
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": compiled.metadata.shared,  # asked for at the launch: the resource report has only what is fixed
        "warps": compiled.metadata.num_warps,
        "ld": ld,
        "st": st,
        "narrow": [sum(count for width, count in found.items() if width < 16) for found in counts],
    }


def _resources(cubin):
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
        return subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout


_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def access_counts(assembly):
    """({bytes a thread: how many loads of global memory}, the same of stores), loop bodies once. PTX (ld.global.v4.b32) and
    AMD's assembly (global_load_dwordx4) are understood."""
    counts = {"ld": collections.Counter(), "st": collections.Counter()}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.(?:\w+\.)*?global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", assembly):
        counts[kind][int(vector or 1) * int(bits) // 8] += 1
    for kind, name in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", assembly):
        size, bits = re.search(r"(dword(?:x\d)?|short|byte)|[biu](\d+)", name).groups()
        counts["ld" if kind == "load" else "st"][_AMD_BYTES[size] if size else int(bits) // 8] += 1
    return counts["ld"], counts["st"]


def _ends(counts):
    """[narrowest, widest], or None where there are none."""
    return [min(counts), max(counts)] if counts else None


# --- cases ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """`call` runs a launcher and returns {kernel: the bytes it cannot do without}. Not `compiled`: a case of the byte table
    only, whose programs another case compiles, or one like it."""

    call: Callable[[], dict[str, int]]
    rows: int
    compiled: bool


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES: dict[str, Case] = {}


def _case(make):
    """Registers what `make` returns under the name that its arguments spell."""

    @functools.wraps(make)
    def register(row, dtype, *, rows, compiled=True, **options):
        words = []
        for key, value in options.items():
            key = key.replace("_", " ")
            words.append(value if isinstance(value, str) and key != "reduction" else key if value is True else f"{key}={value}")
        shape = f"[N, {', '.join(map(str, row))}] {str(dtype).removeprefix('torch.')}"
        name = f"{make.__name__[1:].replace('_bwd', ' backward')} {shape}{' ' * bool(words)}{', '.join(words)}"
        assert name not in CASES, name
        CASES[name] = Case(functools.partial(make, (rows, *row), dtype, **options), rows, compiled)

    return register


def _api():
    return importlib.import_module("fastmix.kernels.api")


def _images(shape, dtype, layout):
    if layout == "sequence first":
        return torch.ones(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
    return torch.ones(shape).to(dtype).contiguous(memory_format=getattr(torch, layout))


def _drawn(shape, dtype, box):
    """(lam, index, box): every row mixed half and half with the next, or a box of half the size cut from it (lam 1 outside)."""
    sizes = shape[len(shape) - box :]
    start = [size // 4 + 1 for size in sizes]
    stop = [first + size // 2 for first, size in zip(start, sizes, strict=True)]
    lam = torch.full((shape[0],), 1.0 if box else 0.5, dtype=_api().accumulator(dtype))
    index = torch.arange(shape[0]).roll(-1)
    return lam, index, torch.tensor([start + stop] * shape[0]) if box else None


def _walk(chain, rows):
    """(context manager, order of the rows): a chain of partners is walked, if it is to be."""
    mix = importlib.import_module("fastmix.kernels.mix")
    return unittest.mock.patch.object(mix, "CHAIN", chain), torch.arange(rows) if chain else None


@_case
def _mix(shape, dtype, *, layout="contiguous_format", box=0, chain=False):
    x, (lam, index, boxes) = _images(shape, dtype, layout), _drawn(shape, dtype, box)
    walked, order = _walk(chain, shape[0])
    with walked:
        out = _api().mix_fwd(x, lam, index, boxes, None, order)
    return {f"_mix{'_chain' * chain}_fwd_kernel": traffic.whole_sectors(x, lam, index, boxes, order, out)}


@_case
def _mix_bwd(shape, dtype, *, gradient="to x", layout="contiguous_format", box=0, chain=False):
    x, (lam, index, boxes) = _images(shape, dtype, layout), _drawn(shape, dtype, box)
    g = _images(shape, dtype, layout)
    need_dx, need_dlam = gradient != "to lam", gradient != "to x"
    walked, order = _walk(chain, shape[0])
    with walked:
        dx, dlam = _api().mix_bwd(g, x if need_dlam else None, lam, index, boxes, x.stride(), need_dx, need_dlam, order)
    floor = traffic.whole_sectors(g, x if need_dlam else None, lam, index, boxes, order, dx, dlam)
    return {f"_mix{'_chain' * chain}_bwd_kernel": floor}


def _sources(shape, dtype, K, stacked, layout):
    """(K batches, one stacked tensor or a tuple; weights)"""
    weights = torch.full((shape[0], K), 1 / K, dtype=_api().accumulator(dtype))
    batches = tuple(_images(shape, dtype, layout) for _ in range(K))
    return torch.stack(batches) if stacked else batches, weights


@_case
def _convex_combination(shape, dtype, *, K=3, stacked=False, layout="contiguous_format"):
    sources, weights = _sources(shape, dtype, K, stacked, layout)
    out = _api().convex_combination_fwd(sources, weights)
    return {"_convex_combination_fwd_kernel": traffic.whole_sectors(*sources, weights, out)}


@_case
def _convex_combination_bwd(shape, dtype, *, K=3, stacked=False, gradient="to sources", layout="contiguous_format"):
    sources, weights = _sources(shape, dtype, K, stacked, layout)
    g = _images(shape, dtype, layout)
    need_dweights, need = gradient != "to sources", gradient != "to weights"
    given = sources if need_dweights else None
    needed = need if stacked else (need,) * K
    dsources, dweights = _api().convex_combination_bwd(g, given, weights, g.stride(), needed, need_dweights)
    read, written = given if need_dweights else (), dsources if need else ()
    floor = traffic.whole_sectors(g, *read, *written, weights if need else None, dweights)
    return {"_convex_combination_bwd_kernel": floor}


def _masked(shape, dtype, mask, binary, moved):
    """(mask of "HxW cells", index, plan, partner_plan): every pixel half and half with the next row's, or one or the other in
    turns; blocks change places with the last, in their order."""
    h, w = (int(count) for count in mask.removesuffix(" cells").split("x"))
    cells = torch.arange(h * w).expand(shape[0], -1)
    weights = (cells % 2 if binary else torch.full(cells.shape, 0.5)).to(_api().accumulator(dtype)).view(-1, h, w)
    plans = (cells.flip(1).contiguous(), cells.roll(1, 1)) if moved else (None, None)
    return weights, torch.arange(shape[0]).roll(-1), *plans


@_case
def _mix_masked(shape, dtype, *, mask, layout="contiguous_format", binary=False, moved=False):
    x, how = _images(shape, dtype, layout), _masked(shape, dtype, mask, binary, moved)
    out = _api().mix_masked_fwd(x, *how)
    return {"_mix_masked_fwd_kernel": traffic.whole_sectors(x, *how, out)}


@_case
def _mix_masked_bwd(shape, dtype, *, mask, gradient="to x", layout="contiguous_format", binary=False, moved=False):
    x, how = _images(shape, dtype, layout), _masked(shape, dtype, mask, binary, moved)
    g = _images(shape, dtype, layout)
    dx, dmask = _api().mix_masked_bwd(g, x, *how, x.stride(), gradient == "to x", gradient == "to mask")
    if gradient == "to x":
        return {"_mix_masked_dx_kernel": traffic.whole_sectors(g, *how, dx)}
    return {"_mix_masked_dmask_kernel": traffic.whole_sectors(g, x, *how[1:], dmask)}


def _labels(shape, dtype, K, weighted):
    """(classes, weights, class weights). Class indices, K=1, have no weights; pixels share those of their image."""
    classes = torch.arange(shape[0] * K * torch.Size(shape[2:]).numel()) * 7919 % shape[1]
    weights = torch.full((shape[0], K), 1 / K, dtype=F32) if K > 1 else None
    class_weight = torch.ones(shape[1], dtype=_api().accumulator(dtype)) if weighted else None
    return classes.view(shape[0], K, *shape[2:]), weights, class_weight


def _upstream(z, reduction, value):
    rows = z.numel() // z.shape[1]
    upstream = torch.full((rows,) if reduction == "none" else (), float(value), dtype=_api().accumulator(z.dtype))
    return upstream, torch.zeros(3, rows, dtype=upstream.dtype)


def _look(upstream, rows):
    """A look at the upstream: at every row's own, or once a row at the only one."""
    return traffic.whole_sectors(upstream) if upstream.dim() else rows * traffic.SECTOR


@_case
def _soft_ce(shape, dtype, *, K=2, smoothing=0.0, class_weights=False, lambda_gradient=False, validation=False, few=False):
    """Not `few`: there are rows enough for one program each, though few of them are run here."""
    z, (classes, weights, class_weight) = torch.zeros(shape, dtype=dtype), _labels(shape, dtype, K, class_weights)
    form = not validation and dtype != F16
    launch = importlib.import_module("fastmix.kernels._launch")
    with unittest.mock.patch.object(launch, "FEW_ROWS", launch.FEW_ROWS * few):
        loss, mass, stats, dweights, dz = _api().soft_ce_fwd(
            z, weights, classes, class_weight, CrossEntropyOptions(-100, smoothing, "mean"), lambda_gradient, form
        )
    used = 0 if class_weight is None else classes.mul(class_weight.element_size()).div(traffic.SECTOR, rounding_mode="floor")
    gathered = 0 if class_weight is None else used.unique().numel() * traffic.SECTOR
    every = class_weight if smoothing else None
    target = traffic.whole_sectors(classes, weights, every) + gathered * (every is None)
    floors = {
        "_mass_kernel": traffic.whole_sectors(classes, weights, mass) + gathered,
        "_soft_ce_fwd_kernel": target + traffic.whole_sectors(z, loss, dweights, dz),
    }
    if few:
        floors["_soft_ce_part_kernel"] = traffic.whole_sectors(z, every)
        floors["_soft_ce_fwd_kernel"] = traffic.whole_sectors(classes, weights, loss, dweights) + gathered
        if form:
            floors["_soft_ce_bwd_kernel"] = target + traffic.whole_sectors(z, dz)
    return floors


@_case
def _soft_ce_bwd(shape, dtype, *, formed=False, upstream=2, reduction="mean", K=2, smoothing=0.0, class_weights=False):
    z, (classes, weights, class_weight) = torch.zeros(shape, dtype=dtype), _labels(shape, dtype, K, class_weights)
    g, stats = _upstream(z, reduction, upstream)
    mass = torch.ones((), dtype=g.dtype) if reduction == "mean" else None
    target = weights, classes, class_weight
    options = CrossEntropyOptions(-100, smoothing, reduction)
    dz = _api().soft_ce_bwd(z, *target, options, mass, stats, g, torch.zeros_like(z) if formed else None)
    nothing = formed and upstream == 1
    return {"_soft_ce_bwd_kernel": _look(g, stats.shape[1]) if nothing else traffic.whole_sectors(z, *target, g, dz)}


def _probabilities(shape, dtype, mixed):
    """(target, lam, index): of the arithmetic's dtype, or the values of MixedRows, half and half with the next row's."""
    if not mixed:
        return torch.ones(shape, dtype=_api().accumulator(dtype)), None, None
    return torch.ones(shape, dtype=dtype), *_drawn(shape, dtype, 0)[:2]


@_case
def _dense_ce(shape, dtype, *, smoothing=0.0, class_weights=False, validation=False, mixed=False):
    z, (t, *mixing) = torch.zeros(shape, dtype=dtype), _probabilities(shape, dtype, mixed)
    class_weight = torch.ones(shape[1], dtype=_api().accumulator(dtype)) if class_weights else None
    form = not validation and dtype != F16
    loss, stats, dz = _api().dense_ce_fwd(z, t, *mixing, class_weight, CrossEntropyOptions(-100, smoothing, "mean"), form)
    used = (t, t) if mixed else (t,)  # every value is of use to two rows
    return {"_dense_ce_fwd_kernel": traffic.whole_sectors(z, *used, *mixing, class_weight, loss, dz)}


@_case
def _dense_ce_bwd(
    shape,
    dtype,
    *,
    gradient="to logits",
    formed=False,
    upstream=2,
    reduction="mean",
    smoothing=0.0,
    class_weights=False,
    mixed=False,
):
    z, (t, *mixing) = torch.zeros(shape, dtype=dtype), _probabilities(shape, dtype, mixed)
    class_weight = torch.ones(shape[1], dtype=_api().accumulator(dtype)) if class_weights else None
    g, stats = _upstream(z, reduction, upstream)
    need_dz, need_dt = gradient != "to target", gradient != "to logits"
    dz, dt = _api().dense_ce_bwd(
        z, t, *mixing, class_weight, CrossEntropyOptions(-100, smoothing, reduction), stats, g,
        torch.zeros_like(z) if formed else None, need_dz, need_dt,
    )  # fmt: skip
    if formed and upstream == 1:
        return {"_dense_ce_bwd_kernel": _look(g, stats.shape[1])}
    used = (t, t) if mixed else (t,) if need_dz else ()
    return {"_dense_ce_bwd_kernel": traffic.whole_sectors(z, *used, *mixing, class_weight, g, dz, dt)}


def _sets(shape, dtype, K, stacked):
    sets = tuple(torch.zeros(shape, dtype=dtype) for _ in range(K))
    return torch.stack(sets) if stacked else sets


@_case
def _js_divergence(shape, dtype, *, K=3, stacked=False, validation=False):
    sets = _sets(shape, dtype, K, stacked)
    need = (not validation) if stacked else (not validation,) * K
    loss, stats, gradients = _api().js_divergence_fwd(sets, 1.0, "mean", need, not validation and dtype != F16)
    per_row = torch.empty(shape[0], dtype=loss.dtype)
    return {"_js_divergence_fwd_kernel": traffic.whole_sectors(*sets, per_row, *(() if gradients is None else gradients))}


@_case
def _js_divergence_bwd(shape, dtype, *, formed=False, upstream=2, reduction="mean", K=3, stacked=False):
    sets = _sets(shape, dtype, K, stacked)
    g = torch.full((shape[0],) if reduction == "none" else (), float(upstream), dtype=_api().accumulator(dtype))
    stats = torch.ones(3, K, shape[0], dtype=g.dtype)
    given = (torch.zeros_like(sets) if stacked else tuple(map(torch.zeros_like, sets))) if formed else None
    need = True if stacked else (True,) * K
    gradients = _api().js_divergence_bwd(sets, 1.0, reduction, stats, g, given, need)
    nothing = formed and upstream == 1
    return {"_js_divergence_bwd_kernel": _look(g, shape[0]) if nothing else traffic.whole_sectors(*sets, g, *gradients)}


def _binary(shape, dtype, dense, mixed, K, weighted):
    """(logits, target, class weights and weights of the positive term, lam and index of MixedRows)"""
    z, (classes, weights, class_weight) = torch.zeros(shape, dtype=dtype), _labels(shape, dtype, K, weighted)
    (t, *mixing), options = (
        _probabilities(shape, dtype, mixed),
        (class_weight, None if class_weight is None else class_weight.clone()),
    )
    return z, (t,) if dense or mixed else (weights, classes), options, mixing


@_case
def _soft_bce(shape, dtype, *, dense=False, mixed=False, K=2, smoothing=0.0, threshold=None, class_weights=False,
              lambda_gradient=False, validation=False):  # fmt: skip
    z, target, weights, mixing = _binary(shape, dtype, dense, mixed, K, class_weights)
    options, form = BinaryOptions(smoothing, threshold, "mean", "mean"), not validation and dtype != F16
    if dense or mixed:
        loss, dz = _api().dense_bce_fwd(z, *target, *mixing, *weights, options, form)
        slope = None
    else:
        loss, slope, dz = _api().soft_bce_fwd(z, *target, *weights, options, lambda_gradient, form)
    rows = torch.empty(z.numel() // z.shape[1], dtype=loss.dtype)
    used = target * 2 if mixed else target  # every value is of use to two rows
    return {"_soft_bce_fwd_kernel": traffic.whole_sectors(z, *used, *mixing, *weights, rows, slope, dz)}


@_case
def _soft_bce_bwd(shape, dtype, *, dense=False, mixed=False, gradient="to logits", formed=False, upstream=2, reduction="mean", K=2,
                  smoothing=0.0, threshold=None, class_weights=False):  # fmt: skip
    z, target, weights, mixing = _binary(shape, dtype, dense, mixed, K, class_weights)
    g, _ = _upstream(z, reduction, upstream)
    need_dz, need_dt = gradient != "to target", gradient != "to logits"
    options = *weights, BinaryOptions(smoothing, threshold, "mean", reduction), g, torch.zeros_like(z) if formed else None
    if dense or mixed:
        dz, dt = _api().dense_bce_bwd(z, *target, *mixing, *options, need_dz, need_dt)
    else:
        dz, dt = _api().soft_bce_bwd(z, *target, *options), None
    if formed and upstream == 1:
        return {"_soft_bce_bwd_kernel": _look(g, z.numel() // z.shape[1])}
    used = target * 2 if mixed else target if need_dz else ()
    return {"_soft_bce_bwd_kernel": traffic.whole_sectors(z, *used, *mixing, *weights, g, dz, dt)}


def _register():
    """Shapes that users have: CIFAR, ImageNet, tokens, tables; 10 to 131072 classes; label maps."""
    image, last = (3, 224, 224), "channels_last"
    _mix((3, 32, 32), F32, rows=4)
    _mix(image, F32, rows=2)
    _mix(image, F16, rows=2, compiled=False)
    _mix(image, BF16, rows=2, compiled=False)
    _mix(image, BF16, rows=2, layout=last)
    _mix((3, 225, 225), BF16, rows=2)
    _mix((196, 768), BF16, rows=2, compiled=False)
    _mix((196, 768), BF16, rows=2, layout="sequence first")
    _mix((54,), F32, rows=64)
    _mix((300,), F64, rows=16)
    _mix((3, 32, 32), F32, rows=4, box=2)
    _mix(image, F32, rows=2, box=2)
    _mix(image, BF16, rows=2, layout=last, box=2)
    _mix((12, 1000), F32, rows=2, box=1, compiled=False)
    _mix((1, 16, 32, 32), F32, rows=2, box=3)

    _mix_bwd((3, 32, 32), F32, rows=4, compiled=False)
    _mix_bwd(image, F32, rows=2)
    _mix_bwd(image, F32, rows=2, gradient="to x and lam")
    _mix_bwd(image, F32, rows=2, gradient="to lam")
    _mix_bwd(image, F16, rows=2, compiled=False)
    _mix_bwd(image, BF16, rows=2, layout=last, gradient="to x and lam", compiled=False)
    _mix_bwd((196, 768), BF16, rows=2, gradient="to x and lam")
    _mix_bwd((196, 768), BF16, rows=2, layout="sequence first", compiled=False)
    _mix_bwd((54,), F32, rows=64, gradient="to x and lam", compiled=False)
    _mix_bwd((300,), F64, rows=16, gradient="to x and lam")
    _mix_bwd(image, F32, rows=2, gradient="to x and lam", box=2)
    _mix_bwd((3, 32, 32), F32, rows=4, box=2, compiled=False)
    _mix_bwd((1, 16, 32, 32), F32, rows=2, gradient="to x and lam", box=3)

    _convex_combination((3, 32, 32), F32, rows=4)
    _convex_combination(image, F32, rows=2)
    _convex_combination(image, F32, rows=2, K=4, stacked=True, compiled=False)
    _convex_combination(image, BF16, rows=2, K=4, layout=last)
    _convex_combination(image, F16, rows=2, K=1, compiled=False)
    _convex_combination((3, 64, 64), F32, rows=2, K=16)
    _convex_combination((3, 64, 64), BF16, rows=2, K=16, stacked=True)
    _convex_combination((3, 225, 225), BF16, rows=2)
    _convex_combination((196, 768), BF16, rows=2, K=2, layout="sequence first")
    _convex_combination((54,), F32, rows=64)
    _convex_combination((300,), F64, rows=16, K=8)

    _convex_combination_bwd((3, 32, 32), F32, rows=4, compiled=False)
    _convex_combination_bwd(image, F32, rows=2)
    _convex_combination_bwd(image, F32, rows=2, gradient="to sources and weights")
    _convex_combination_bwd(image, F32, rows=2, gradient="to weights")
    _convex_combination_bwd(image, F32, rows=2, stacked=True, gradient="to sources and weights", compiled=False)
    _convex_combination_bwd((3, 64, 64), F32, rows=2, K=16, gradient="to sources and weights")
    _convex_combination_bwd(image, BF16, rows=2, K=4, layout=last, gradient="to sources and weights")
    _convex_combination_bwd((3, 64, 64), BF16, rows=2, K=16, stacked=True, gradient="to sources and weights")
    _convex_combination_bwd((54,), F32, rows=64, gradient="to sources and weights")
    _convex_combination_bwd((300,), F64, rows=16, K=8, gradient="to sources and weights")

    _mix_masked(image, F32, rows=2, mask="1x1 cells", compiled=False)
    _mix_masked(image, F32, rows=2, mask="16x16 cells")
    _mix_masked(image, F32, rows=2, mask="16x16 cells", binary=True, compiled=False)
    _mix_masked(image, BF16, rows=2, mask="4x4 cells", moved=True)
    _mix_masked(image, BF16, rows=2, mask="16x16 cells", moved=True, layout=last)
    _mix_masked(image, F32, rows=2, mask="224x224 cells")
    _mix_masked(image, F32, rows=2, mask="224x224 cells", binary=True, compiled=False)
    _mix_masked((3, 32, 32), F32, rows=4, mask="4x4 cells", moved=True, compiled=False)
    _mix_masked((128, 300), F64, rows=2, mask="128x300 cells")
    for gradient in ("to x", "to mask"):
        _mix_masked_bwd(image, F32, rows=2, mask="1x1 cells", gradient=gradient, compiled=False)
        _mix_masked_bwd(image, F32, rows=2, mask="16x16 cells", gradient=gradient)
        _mix_masked_bwd(image, BF16, rows=2, mask="4x4 cells", moved=True, gradient=gradient)
        _mix_masked_bwd(image, BF16, rows=2, mask="16x16 cells", moved=True, layout=last, gradient=gradient, compiled=False)
        _mix_masked_bwd(image, F32, rows=2, mask="224x224 cells", gradient=gradient)
        _mix_masked_bwd((3, 32, 32), F32, rows=4, mask="4x4 cells", moved=True, gradient=gradient, compiled=False)
        _mix_masked_bwd((128, 300), F64, rows=2, mask="128x300 cells", gradient=gradient)

    _mix((3, 32, 32), F32, rows=16, chain=True)
    _mix((3, 32, 32), BF16, rows=16, layout=last, chain=True)
    _mix((40, 768), BF16, rows=16, layout="sequence first", chain=True)
    _mix((1500,), F64, rows=16, chain=True)
    for gradient in ("to x", "to lam", "to x and lam"):
        _mix_bwd((3, 32, 32), F32, rows=16, gradient=gradient, chain=True)
    _mix_bwd((40, 768), BF16, rows=16, gradient="to x and lam", layout="sequence first", chain=True)
    _mix_bwd((1500,), F64, rows=16, gradient="to x and lam", chain=True)

    hard = {"smoothing": 0.1, "class_weights": True}
    _soft_ce((10,), F32, rows=128)
    _soft_ce((10,), F32, rows=128, K=1, validation=True, compiled=False)
    _soft_ce((100,), F32, rows=16, lambda_gradient=True)
    _soft_ce((1000,), F32, rows=4, K=1, compiled=False)
    _soft_ce((1000,), F32, rows=4, K=5, compiled=False)
    _soft_ce((1000,), F32, rows=4, lambda_gradient=True, compiled=False)
    _soft_ce((1000,), F32, rows=4, class_weights=True, compiled=False)
    _soft_ce((1000,), F32, rows=4, lambda_gradient=True, **hard)
    _soft_ce((1000,), F16, rows=4, compiled=False)
    _soft_ce((1000,), BF16, rows=4)
    _soft_ce((1001,), BF16, rows=4)
    _soft_ce((1001,), F64, rows=4, lambda_gradient=True, **hard)
    _soft_ce((1000,), BF16, rows=4, K=1, validation=True)
    _soft_ce((8192,), F64, rows=2, smoothing=0.1, lambda_gradient=True)
    _soft_ce((8191,), F64, rows=2, lambda_gradient=True, **hard)
    _soft_ce((16384,), F32, rows=2, smoothing=0.1, lambda_gradient=True)
    _soft_ce((21841,), F32, rows=2, lambda_gradient=True, **hard)
    _soft_ce((21841,), F32, rows=2)
    _soft_ce((21841,), F32, rows=2, smoothing=0.1)
    _soft_ce((21841,), F16, rows=2)
    _soft_ce((21841,), BF16, rows=2, lambda_gradient=True)
    _soft_ce((21841,), BF16, rows=2, smoothing=0.1)
    _soft_ce((21841,), BF16, rows=2, K=1, validation=True, compiled=False)
    _soft_ce((21841,), BF16, rows=2, K=16, lambda_gradient=True, **hard)
    _soft_ce((32768,), F32, rows=2, lambda_gradient=True, **hard)
    _soft_ce((32768,), F16, rows=2, K=5, lambda_gradient=True)
    _soft_ce((32768,), BF16, rows=2)
    _soft_ce((32768,), BF16, rows=2, lambda_gradient=True, **hard)
    _soft_ce((131072,), BF16, rows=2)
    _soft_ce((131072,), F32, rows=2, **hard)
    _soft_ce((128257,), BF16, rows=2)
    _soft_ce((262144,), BF16, rows=1, compiled=False)
    _soft_ce((262144,), BF16, rows=1, few=True)
    _soft_ce((262144,), F32, rows=1, few=True, compiled=False)
    _soft_ce((128257,), BF16, rows=2, few=True, lambda_gradient=True, **hard)
    _soft_ce((21, 64, 64), BF16, rows=1, lambda_gradient=True)
    _soft_ce((21, 64, 64), F32, rows=1)
    _soft_ce((150, 32, 32), BF16, rows=1)
    _soft_ce((150, 32, 32), F32, rows=1, K=1)
    _soft_ce((150, 15, 15), BF16, rows=1, lambda_gradient=True)
    _soft_ce((1000, 16, 16), BF16, rows=1)
    _soft_ce((19, 16, 16), F32, rows=1, lambda_gradient=True, **hard)

    _soft_ce_bwd((10,), F32, rows=128, formed=True, compiled=False)
    _soft_ce_bwd((100,), F32, rows=16, formed=True, reduction="none", compiled=False)
    _soft_ce_bwd((1000,), F16, rows=4)
    _soft_ce_bwd((1000,), F32, rows=4, formed=True, upstream=1, compiled=False)
    _soft_ce_bwd((1000,), F32, rows=4, formed=True, compiled=False)
    _soft_ce_bwd((1000,), BF16, rows=4, formed=True, compiled=False)
    _soft_ce_bwd((1000,), BF16, rows=4, formed=True, reduction="none")
    _soft_ce_bwd((21841,), F16, rows=2)
    _soft_ce_bwd((21841,), BF16, rows=2, formed=True, upstream=1, compiled=False)
    _soft_ce_bwd((21841,), BF16, rows=2, formed=True)
    _soft_ce_bwd((32768,), F32, rows=2, **hard)
    _soft_ce_bwd((32768,), F32, rows=2, formed=True, **hard)
    _soft_ce_bwd((131072,), F16, rows=2, compiled=False)
    _soft_ce_bwd((128257,), F16, rows=2)
    _soft_ce_bwd((150, 32, 32), BF16, rows=1, formed=True, upstream=1, reduction="none")
    _soft_ce_bwd((150, 32, 32), BF16, rows=1, formed=True, reduction="none", compiled=False)

    _dense_ce((10,), F32, rows=128, compiled=False)
    _dense_ce((1000,), F16, rows=4, compiled=False)
    _dense_ce((1000,), BF16, rows=4)
    _dense_ce((1000,), F32, rows=4, compiled=False, **hard)
    _dense_ce((16384,), F32, rows=2, **hard)
    _dense_ce((16384,), BF16, rows=2, smoothing=0.1)
    _dense_ce((16384,), F64, rows=2)
    _dense_ce((1001,), BF16, rows=4)
    _dense_ce((10001,), F32, rows=2)
    _dense_ce((21841,), F32, rows=2)
    _dense_ce((21841,), BF16, rows=2)
    _dense_ce((19, 16, 16), F32, rows=1)
    _dense_ce((150, 32, 32), BF16, rows=1, compiled=False)
    _dense_ce((1000,), F32, rows=4, mixed=True)
    _dense_ce((1001,), BF16, rows=4, mixed=True)
    _dense_ce((527,), F32, rows=4, mixed=True, smoothing=0.1, compiled=False)
    _dense_ce((19, 16, 16), BF16, rows=2, mixed=True)

    _dense_ce_bwd((1000,), F16, rows=4, gradient="to logits and target")
    _dense_ce_bwd((1000,), F32, rows=4, formed=True, upstream=1, compiled=False)
    _dense_ce_bwd((1000,), F32, rows=4, formed=True, compiled=False)
    _dense_ce_bwd((1000,), F32, rows=4, gradient="to target", compiled=False)
    _dense_ce_bwd((21841,), F32, rows=2, formed=True, **hard)
    _dense_ce_bwd((1001,), F16, rows=4, gradient="to logits and target")
    _dense_ce_bwd((1000,), F16, rows=4, mixed=True)
    _dense_ce_bwd((19, 16, 16), F32, rows=1, formed=True, reduction="none")

    _js_divergence((10,), F32, rows=128)
    _js_divergence((100,), BF16, rows=16, compiled=False)
    _js_divergence((1000,), F32, rows=4)
    _js_divergence((1000,), BF16, rows=4)
    _js_divergence((1000,), BF16, rows=4, stacked=True, compiled=False)
    _js_divergence((1000,), BF16, rows=4, validation=True, compiled=False)
    _js_divergence((1000,), F16, rows=4, compiled=False)
    _js_divergence((1000,), F64, rows=4)
    _js_divergence((1001,), F32, rows=2, K=2, compiled=False)
    _js_divergence((512,), F32, rows=4, K=16)
    _js_divergence((32768,), BF16, rows=2)
    _js_divergence((21841,), F32, rows=2, K=8, compiled=False)
    _js_divergence((2048,), F64, rows=2, K=4, compiled=False)  # spills 128 bytes on gfx942

    _js_divergence_bwd((10,), F32, rows=128, formed=True, compiled=False)
    _js_divergence_bwd((1000,), F16, rows=4)
    _js_divergence_bwd((1000,), F32, rows=4, formed=True, upstream=1, compiled=False)
    _js_divergence_bwd((1000,), F32, rows=4, formed=True, compiled=False)
    _js_divergence_bwd((1000,), BF16, rows=4, formed=True, reduction="none")
    _js_divergence_bwd((1000,), BF16, rows=4, stacked=True, compiled=False)
    _js_divergence_bwd((32768,), BF16, rows=2, compiled=False)
    _js_divergence_bwd((21841,), F32, rows=2, K=8, compiled=False)
    _js_divergence_bwd((2048,), F64, rows=2, K=4, compiled=False)

    _soft_bce((10,), F32, rows=128)
    _soft_bce((10,), F32, rows=128, K=1, validation=True, compiled=False)
    _soft_bce((100,), F32, rows=16, lambda_gradient=True, compiled=False)
    _soft_bce((1000,), F32, rows=4)
    _soft_bce((1000,), F32, rows=4, dense=True)
    _soft_bce((1000,), F32, rows=4, lambda_gradient=True, threshold=0.2, **hard)
    _soft_bce((1000,), F16, rows=4, compiled=False)
    _soft_bce((1000,), BF16, rows=4)
    _soft_bce((1000,), BF16, rows=4, K=1, validation=True, compiled=False)
    _soft_bce((1000,), BF16, rows=4, K=16, lambda_gradient=True)
    _soft_bce((1000,), BF16, rows=4, dense=True, smoothing=0.1)
    _soft_bce((1001,), BF16, rows=4)
    _soft_bce((4096,), F64, rows=2, lambda_gradient=True, **hard)
    _soft_bce((4096,), F64, rows=2, dense=True, **hard)
    _soft_bce((21841,), BF16, rows=2)
    _soft_bce((21841,), F32, rows=2, lambda_gradient=True, **hard)
    _soft_bce((21841,), F32, rows=2, dense=True)
    _soft_bce((131072,), BF16, rows=2, compiled=False)
    _soft_bce((150, 16, 16), BF16, rows=1, lambda_gradient=True)
    _soft_bce((150, 16, 16), F32, rows=1, lambda_gradient=True, **hard)
    _soft_bce((150, 15, 15), BF16, rows=1, compiled=False)
    _soft_bce((1000, 16, 16), BF16, rows=1, lambda_gradient=True)
    _soft_bce((19, 16, 16), F32, rows=1, dense=True, **hard)
    _soft_bce((19, 16, 16), F64, rows=1, lambda_gradient=True, **hard)
    _soft_bce((527,), F32, rows=4, mixed=True)
    _soft_bce((1000,), BF16, rows=4, mixed=True, threshold=0.2, **hard)
    _soft_bce((21841,), F32, rows=2, mixed=True, compiled=False)
    _soft_bce((19, 16, 16), BF16, rows=2, mixed=True)

    _soft_bce_bwd((1000,), F16, rows=4)
    _soft_bce_bwd((1000,), F32, rows=4, formed=True, upstream=1, compiled=False)
    _soft_bce_bwd((1000,), F32, rows=4, dense=True, formed=True, upstream=1, compiled=False)
    _soft_bce_bwd((1000,), BF16, rows=4, formed=True, reduction="none", threshold=0.2, **hard)
    _soft_bce_bwd((1000,), F32, rows=4, dense=True, gradient="to target", compiled=False)
    _soft_bce_bwd((1000,), F16, rows=4, dense=True, gradient="to logits and target", **hard)
    _soft_bce_bwd((4096,), F64, rows=2, dense=True, gradient="to logits and target", **hard)
    _soft_bce_bwd((21841,), BF16, rows=2, formed=True)
    _soft_bce_bwd((21841,), F32, rows=2, dense=True, gradient="to logits and target", **hard)
    _soft_bce_bwd((150, 16, 16), BF16, rows=1, formed=True, reduction="none")
    _soft_bce_bwd((1000,), F16, rows=4, mixed=True)


_register()


# --- tables --------------------------------------------------------------------------------------------------------------------


def arches():
    """Architectures that this Triton compiles for without their drivers; AMD's since 3.6."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return [arch for arch in ARCHES if version >= (3, 6) or not arch.startswith("gfx")]


def compiled_rows(wanted, cases):
    """Rows of arch, case, kernel and cost."""
    for arch in wanted:
        for case in cases:
            if CASES[case].compiled:
                for kernel, cost in compile_launches(arch, CASES[case].call):
                    yield {"arch": arch, "case": case, "kernel": kernel, **cost}


def interpreted_rows(cases):
    """Rows of case, kernel and bytes, in a process that interprets kernels."""
    for case in cases:
        with traffic.count() as moved:
            floors = CASES[case].call()
        assert floors.keys() == moved.keys(), f"{case}: {sorted(moved)} ran, {sorted(floors)} have a floor"
        for kernel, floor in floors.items():
            lanes, sectors = moved[kernel].lanes, moved[kernel].sectors
            ratio = round(sectors / floor, 4)
            rows = CASES[case].rows
            yield {
                "case": case,
                "kernel": kernel,
                "rows": rows,
                "lanes": lanes,
                "sectors": sectors,
                "floor": floor,
                "ratio": ratio,
            }


_INTERPRET = """
import json, sys
from fastmix.bench import static
for row in static.interpreted_rows(sys.argv[1:]):
    print(json.dumps(row), flush=True)
"""


def byte_rows(cases):
    """The same from any process: what compiles cannot interpret, so another one does."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _INTERPRET, *cases]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                yield json.loads(line)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"counting bytes failed:\n{errors.read()}")


def violations(measured, limits, wanted=ARCHES, tables=("compiled", "bytes"), cases=None):
    """What is wrong with measured rows by the limits of `costs.json`, as lines of text. Limits of other arches, tables and
    cases than those that were measured are not missed."""
    same = measured["triton"] == limits["triton"]
    problems = []
    for table in tables:
        keys = ("arch", "case", "kernel") if table == "compiled" else ("case", "kernel")
        found, allowed = ({tuple(row[key] for key in keys): row for row in rows[table]} for rows in (measured, limits))
        if len(found) < len(measured[table]) or len(allowed) < len(limits[table]):
            problems.append(f"{table}: two rows of the same {', '.join(keys)}")
        asked = {
            key
            for key, row in allowed.items()
            if row.get("arch", wanted[0]) in wanted and (cases is None or row["case"] in cases)
        }
        problems += [f"{', '.join(key)}: there is no limit; {TIGHTEN}" for key in found.keys() - allowed.keys()]
        problems += [f"{', '.join(key)}: a limit of what nobody measures; {TIGHTEN}" for key in asked - found.keys()]
        compare = _dearer if table == "compiled" else _farther
        for key in found.keys() & allowed.keys():
            problems += [f"{', '.join(key)}: {text}" for text in compare(found[key], allowed[key], same)]
    return sorted(problems)


def _dearer(row, limit, same):
    for key in ("spill_bytes", "registers", "shared_bytes") if same else ("spill_bytes",):
        allowed = limit[key] if same else limit[key] + OTHERS_SPILL
        if row[key] > allowed:
            yield f"{key} {row[key]}, the limit is {allowed}"
    for kind, now, then in zip(("loads", "stores"), row["narrow"], limit["narrow"], strict=True) if same else ():
        if now > then:
            yield f"{now} {kind} of fewer than 16 bytes, the limit is {then}"
    if same and row["warps"] != limit["warps"]:
        yield f"{row['warps']} warps, the limit is for {limit['warps']}"
    for key in ("ld", "st") if same else ():
        if limit[key] and (not row[key] or any(now < then for now, then in zip(row[key], limit[key], strict=True))):
            yield f"{key} of {_span(row[key])} bytes, the limit is {_span(limit[key])}"


def _farther(row, limit, same):
    ratio, allowed = row["sectors"] / row["floor"], limit["ratio"]
    if row["rows"] != limit["rows"] or row["floor"] != limit["floor"]:
        yield f"{row['rows']} rows with a floor of {row['floor']}, the limit is for {limit['rows']} and {limit['floor']}"
    elif ratio > allowed * SLACK:
        yield f"sectors {ratio:.4f} times the floor, the limit is {allowed:.4f}"
    elif ratio < allowed * LOOSE:
        yield f"sectors {ratio:.4f} times the floor, the limit is a loose {allowed:.4f}; tighten it: {TIGHTEN}"


def load_limits():
    """The committed limits, or None where there are none, as in an installed package."""
    return json.loads(LIMITS.read_text()) if LIMITS.exists() else None


def dump(measured):
    """JSON with a line for every row, sorted, so that a change is seen row by row."""
    orders = {"compiled": ("kernel", "case", "arch"), "bytes": ("kernel", "case")}
    text = f'{{\n"triton": {json.dumps(measured["triton"])}'
    for table, order in orders.items():
        rows = sorted(measured[table], key=lambda row: [row[key] for key in order])
        text += f',\n"{table}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]"
    return text + "\n}\n"


# --- the command ---------------------------------------------------------------------------------------------------------------


def _span(widths):
    if widths is None:
        return "-"
    return str(widths[0]) if widths[0] == widths[1] else f"{widths[0]}-{widths[1]}"


HEADINGS = ("kernel", "case", "arch", "registers", "spilled", "shared", "warps", "ld", "st", "rows", "sectors/floor")
RIGHT = {"registers", "spilled", "shared", "warps", "rows", "sectors/floor"}


def lines(measured):
    """The table's cells: a line for every kernel, case and arch; what does not depend on the arch is in the first of them."""
    groups = collections.defaultdict(lambda: ([], []))
    for number, table in enumerate(("compiled", "bytes")):
        for row in measured[table]:
            groups[row["kernel"], row["case"]][number].append(row)
    order = list(CASES)
    for (kernel, case), (compiled, moved) in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        head = [kernel.strip("_").removesuffix("_kernel"), case]
        tail = [str(moved[0]["rows"]), f"{moved[0]['ratio']:.3f}"] if moved else ["", ""]
        for row in compiled or [None]:
            cost = ("registers", "spill_bytes", "shared_bytes", "warps")
            middle = [row["arch"], *(str(row[key]) for key in cost), _span(row["ld"]), _span(row["st"])] if row else [""] * 7
            yield [*head, *middle, *tail]
            head = tail = ["", ""]


def measure(wanted, cases, tables):
    """{"triton": its version, "compiled": rows, "bytes": rows}."""
    import triton

    measured = {"triton": triton.__version__, "compiled": [], "bytes": []}
    compiled = [case for case in cases if CASES[case].compiled]
    total = len(wanted) * len(compiled) * ("compiled" in tables) + len(cases) * ("bytes" in tables)
    with screen.progress(total) as step:
        for table in tables:
            rows = compiled_rows(wanted, cases) if table == "compiled" else byte_rows(cases)
            last = None
            for row in rows:
                place = row.get("arch", "bytes"), row["case"]
                if place != last:
                    step(": ".join(place))
                last = place
                measured[table].append(row)
    return measured


def main(argv=None):
    os.environ.pop("TRITON_INTERPRET", None)  # a real compiler is wanted here; the interpreter gets a process of its own
    parser = argparse.ArgumentParser(
        prog="python -m fastmix.bench static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHES, help="compile for these (default: all that this Triton can)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--bytes-only", action="store_const", dest="tables", const=("bytes",), help="compile nothing")
    one.add_argument("--compile-only", action="store_const", dest="tables", const=("compiled",), help="interpret nothing")
    parser.add_argument("--update", action="store_true", help=f"make what is measured the limits, in {LIMITS.name}")
    options = parser.parse_args(argv)
    cases = [case for case in CASES if options.case in case]
    if not cases:
        parser.error(f"--case: expected part of a name such as {next(iter(CASES))!r}; got {options.case!r}")
    if options.update and (options.arch or options.case or options.tables):
        parser.error("--update: expected no other choice, since limits are of everything")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        print(f"static: needs Triton, which cannot be imported here ({error}): pip install triton, on Linux", file=sys.stderr)
        return 2
    wanted, tables = options.arch or arches(), options.tables or ("compiled", "bytes")
    if options.update and wanted != list(ARCHES):
        parser.error(f"--update: expected a Triton that compiles for {', '.join(ARCHES)}; got {triton.__version__}")
    measured = measure(wanted, cases, tables)
    screen.table(HEADINGS, lines(measured), RIGHT)
    if options.json:
        pathlib.Path(options.json).write_text(dump(measured))
    if options.update:
        LIMITS.write_text(dump(measured))
    limits = load_limits()
    print(f"\nTriton {measured['triton']}: {len(measured['compiled'])} programs, {len(measured['bytes'])} counts of bytes.")
    print(
        "shared in bytes; ld and st: bytes of the narrowest and widest load and store of a thread; rows are those interpreted."
    )
    if limits is None:
        print(f"There is no {LIMITS.name} here to hold them to.")
        return 1 if any(row["spill_bytes"] for row in measured["compiled"]) else 0
    problems = violations(measured, limits, wanted, tables, cases if options.case else None)
    print("\n".join(problems) if problems else f"All within the limits of {LIMITS.name}, made with Triton {limits['triton']}.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
