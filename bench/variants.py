"""Competing variants of the kernels, timed against each other in one run; a GPU is needed.

    python -m fastmix.bench.variants [--case TEXT] [--json FILE] [--budget SECONDS]

A variant is another value of a constant that the launchers read, or another function on the same inputs. Each is captured in
a CUDA graph, and the graphs of a case are replayed in turn, one of each a round, between CUDA events: so all meet the same
machine, and no launch gaps are timed. Before every replay the L2 cache is overwritten; calls of less than SHORT seconds are
captured REPEATS times over, and so find what the cache holds. "default again" is the default a second time: what lies within its
ratio is noise. A variant is timed only if its results are the default's, within the last place or 2e-6 of a row's largest value.

To add one: an entry in VARIANTS, under the operation that it changes.
"""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

NO_GPU = 3  # exit status
SHORT = 50e-6
REPEATS = 20  # of a short call
ROUNDS = (9, 60)
CASE_SECONDS = 1.0  # of timing
WRONG = "wrong: "
COMPILERS = 8  # processes


# Variants: a context manager around the calls, or a function instead of the case's own


@dataclass(frozen=True)
class Instead:
    """Another way from a case's inputs to its results."""

    call: Callable


@contextlib.contextmanager
def constants(module, **values):
    """Other values of a kernel module's constants, and no tile remembered from before or after."""
    from fastmix.kernels import _launch, _row_layout

    def forget():
        _launch.class_tile.cache_clear()
        _row_layout.rows_of.cache_clear()

    place = importlib.import_module(f"fastmix.kernels.{module}")
    before = {name: getattr(place, name) for name in values}
    try:
        for name, value in values.items():
            setattr(place, name, value)
        forget()
        yield
    finally:
        for name, value in before.items():
            setattr(place, name, value)
        forget()


def _set(module, **values):
    return lambda: constants(module, **values)


@contextlib.contextmanager
def chain(rows=8):
    """The walk along a chain of partners instead of the gather, so many rows a program."""
    with constants("mix", CHAIN=True), constants("mix_chain", ROWS=rows):
        yield


def formed_backward(logits, target, upstream):
    """The backward forms the gradient, as in float16."""
    return _loss(logits, target, upstream, False)


_TILES = {
    "chain walk": chain,
    "chain walk, 4 rows": lambda: chain(4),
    "chain walk, 16 rows": lambda: chain(16),
    "tile 4096": _set("_row_layout", TILE_BYTES=4096),
    "tile 16384": _set("_row_layout", TILE_BYTES=16384),
    "tile 32768": _set("_row_layout", TILE_BYTES=32768),
    "8 warps": _set("mix", WARPS=8),
}
VARIANTS = {
    "mix": _TILES,
    "mix backward": _TILES,
    "loss": {
        "formed in the backward": Instead(formed_backward),
        "half the warps": _set("_launch", WARP_VALUES=1024),
        "twice the warps": _set("_launch", WARP_VALUES=256),
        "rows of half the size held": _set("_launch", RESIDENT_CLASSES=16384, UNALIGNED_CLASSES=12000),
        "rows of twice the size held": _set("_launch", RESIDENT_CLASSES=65536, UNALIGNED_CLASSES=48000, MOST_WARPS=32),
        "no windows": _set("_class_tiles", WINDOW_BYTES=1 << 30),
        "one program a row": _set("_launch", FEW_ROWS=0),
    },
    "small loss": {
        "twice the warps": _set("_launch", WARP_VALUES=256),
        "twice the rows": _set("_launch", TILE_VALUES=1024),
        "four times the rows": _set("_launch", TILE_VALUES=2048),
        "half the rows": _set("_launch", TILE_VALUES=256),
    },
    "loss in float16": {
        "looped 2048": _set("_launch", LOOPED_CLASSES=2048),
        "looped 8192": _set("_launch", LOOPED_CLASSES=8192),
        "half the warps": _set("_launch", WARP_VALUES=1024),
        "twice the warps": _set("_launch", WARP_VALUES=256),
    },
}


# Cases


@dataclass(frozen=True)
class Case:
    """inputs(device) for call(*inputs) -> tensors; `floor`: the bytes that nobody can do without."""

    op: str
    inputs: Callable
    call: Callable
    floor: int


def _mix(x, lam, index, box, order, g):
    from fastmix.kernels import api

    return (api.mix_fwd(x, lam, index, box, None, order),)


def _mix_backward(x, lam, index, box, order, g):
    from fastmix.kernels import api

    return api.mix_bwd(g, x, lam, index, box, x.stride(), True, True, order)


def _mix_case(op, shape, dtype, *, channels_last=False, box=False):
    def inputs(device):
        x, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        if channels_last:
            x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
        order = torch.randperm(shape[0], device=device)
        index = torch.empty_like(order).scatter_(0, order, order.roll(-1))  # one cycle, as samplers draw it
        corner = torch.randint(0, shape[-1] // 2, (shape[0], 2), device=device)
        cut = torch.cat((corner, corner + shape[-1] // 3), 1) if box else None
        return x, torch.rand(shape[0], device=device), index, cut, order, g

    size = torch.Size(shape).numel() * dtype.itemsize
    return Case(op, inputs, _mix if op == "mix" else _mix_backward, (2 if op == "mix" else 3) * size)


def _loss(logits, target, upstream, form):
    from fastmix.autograd.soft_ce import Options
    from fastmix.kernels import api

    classes, weights, smoothing = target
    options = Options(-100, smoothing, "mean")
    loss, mass, stats, _, formed = api.soft_ce_fwd(logits, weights, classes, None, options, False, form)
    return loss, api.soft_ce_bwd(logits, weights, classes, None, options, mass, stats, upstream, formed)


def _as_shipped(logits, target, upstream):
    from fastmix.autograd.soft_ce import forms_gradient

    return _loss(logits, target, upstream, forms_gradient(logits))


def _loss_case(op, shape, dtype, *, upstream=1.0, smoothing=0.0):
    def inputs(device):
        logits = (3 * torch.randn(shape, device=device)).to(dtype)
        classes = torch.randint(0, shape[1], (shape[0], 2, *shape[2:]), device=device)
        lam = torch.rand(shape[0], device=device)
        return logits, (classes, torch.stack((lam, 1 - lam), 1), smoothing), torch.full((), upstream, device=device)

    return Case(op, inputs, _as_shipped, 2 * torch.Size(shape).numel() * dtype.itemsize)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = {  # what decides most comes first: the rest is left out where time is short
    "loss [4096, 1000] bfloat16": _loss_case("loss", (4096, 1000), BF16, smoothing=0.1),
    "loss [4096, 1000] bfloat16, upstream 0.5": _loss_case("loss", (4096, 1000), BF16, upstream=0.5, smoothing=0.1),
    "mix [256, 3, 224, 224] float32": _mix_case("mix", (256, 3, 224, 224), F32),
    "mix backward [256, 3, 224, 224] float32": _mix_case("mix backward", (256, 3, 224, 224), F32),
    "loss [4096, 32768] bfloat16": _loss_case("loss", (4096, 32768), BF16),
    "loss [4096, 32768] bfloat16, upstream 0.5": _loss_case("loss", (4096, 32768), BF16, upstream=0.5),
    "mix [256, 3, 224, 224] bfloat16": _mix_case("mix", (256, 3, 224, 224), BF16, channels_last=True),
    "loss [1024, 21841] bfloat16": _loss_case("loss", (1024, 21841), BF16),
    "loss [4096, 1000] float32": _loss_case("loss", (4096, 1000), F32),
    "loss [4096, 32768] float16": _loss_case("loss in float16", (4096, 32768), F16),
    "mix box [256, 3, 224, 224] float32": _mix_case("mix", (256, 3, 224, 224), F32, box=True),
    "small loss [128, 10] float32": _loss_case("small loss", (128, 10), F32),
    "small loss [1024, 100] float32": _loss_case("small loss", (1024, 100), F32),
    "mix backward [128, 196, 768] bfloat16": _mix_case("mix backward", (128, 196, 768), BF16),
    "mix [512, 3, 32, 32] float32": _mix_case("mix", (512, 3, 32, 32), F32),
    "loss [16384, 1000] float16": _loss_case("loss in float16", (16384, 1000), F16),
    "loss [1024, 21841] float32": _loss_case("loss", (1024, 21841), F32),
    "loss [64, 131072] bfloat16": _loss_case("loss", (64, 131072), BF16),
}


def calls(case):
    """{variant: (context manager factory, function of the case's inputs)}, the default first."""
    found = {"default": (contextlib.nullcontext, case.call)}
    for name, variant in VARIANTS[case.op].items():
        instead = isinstance(variant, Instead)
        found[name] = (contextlib.nullcontext, variant.call) if instead else (variant, case.call)
    return {**found, "default again": found["default"]}


def wrong(actual, expected):
    """Why results are not the expected ones, or None."""
    for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != e.shape or a.dtype != e.dtype:
            return f"result {n} is {a.dtype} {list(a.shape)}"
        rows = (len(e), -1) if e.dim() > 1 else (1, -1)
        a, e, unit = a.reshape(rows).float(), e.reshape(rows).float(), torch.finfo(e.dtype).eps
        bound = torch.maximum(unit * torch.maximum(a.abs(), e.abs()), 2e-6 * e.abs().amax(1, keepdim=True))
        off = (a - e).abs() - bound
        if not bool((off <= 0).all()):
            return f"result {n} is off by {float((a - e).abs().max()):.2g}"
    return None


# Timing


def _graph(call, count):
    """What runs so many calls again, each freeing its results before the next."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph.replay


def _captured(call):
    """(what runs a call, or many where it is short; how many)"""
    replay = _graph(call, 1)
    replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(5):
        replay()
    torch.cuda.synchronize()
    if (time.perf_counter() - start) / 5 > SHORT:
        return replay, 1
    return _graph(call, REPEATS), REPEATS


def in_turn(replays, seconds=CASE_SECONDS):
    """{name: median seconds of a replay}, one of each a round, the L2 cache overwritten before each."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = {name: [] for name in replays}
    start, rounds = time.monotonic(), 0
    while rounds < ROUNDS[0] or (rounds < ROUNDS[1] and time.monotonic() - start < seconds):
        for name in list(replays)[rounds % len(replays) :] + list(replays)[: rounds % len(replays)]:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            cache.zero_()
            events[0].record()
            replays[name]()
            events[1].record()
            times[name].append(events)
        torch.cuda.synchronize()
        rounds += 1
    return {
        name: statistics.median(start.elapsed_time(end) / 1e3 for start, end in events[1:]) for name, events in times.items()
    }


def measure(name, case, device):
    """Rows of a case; one that failed has "error" and no time."""
    torch.manual_seed(0)
    inputs = case.inputs(device)
    expected, replays, errors = None, {}, {}
    for variant, (around, call) in calls(case).items():
        try:
            with around():
                results = call(*inputs)
                torch.cuda.synchronize()
                expected = results if expected is None else expected
                error = wrong(results, expected)
                del results
                if error is None:
                    replays[variant] = _captured(lambda call=call: call(*inputs))
                else:
                    errors[variant] = f"{WRONG}{error}"
        except Exception as problem:  # out of registers or shared memory, say: a variant may, the default may not
            errors[variant] = f"{type(problem).__name__}: {str(problem)[:300]}"
        if expected is None:
            break
    del expected
    counts = {variant: count for variant, (_, count) in replays.items()}
    medians = in_turn({variant: replay for variant, (replay, _) in replays.items()}) if "default" in replays else {}
    seconds = {variant: median / counts[variant] for variant, median in medians.items()}
    rows = [
        {
            "case": name,
            "variant": variant,
            "seconds": value,
            "ratio to default": value / seconds["default"],
            "GB/s": case.floor / value / 1e9,
            "calls": counts[variant],
        }
        for variant, value in seconds.items()
    ]
    return rows + [{"case": name, "variant": variant, "error": error} for variant, error in errors.items()]


def compile_ahead(names, timeout):
    """Compiles all variants of some cases in a few processes, so that this one finds them in Triton's cache on disk."""
    workers = max(1, min(COMPILERS, (os.cpu_count() or 2) // 2, len(names)))
    command = [sys.executable, "-m", "fastmix.bench.variants", "--compile-only"]
    running = [
        subprocess.Popen([*command, *names[n::workers]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for n in range(workers)
    ]
    end = time.monotonic() + timeout
    for process in running:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _compile(names, device):
    for name in names:
        inputs = CASES[name].inputs(device)
        for around, call in calls(CASES[name]).values():
            with contextlib.suppress(Exception), around():
                call(*inputs)
                torch.cuda.synchronize()


def winners(rows, margin=0.03):
    """Rows that beat the default by more than a margin, and by more than the default differs from itself."""
    noise = {
        row["case"]: abs(1 - row["ratio to default"]) for row in rows if row["variant"] == "default again" and "seconds" in row
    }
    return [
        row
        for row in rows
        if "seconds" in row
        and not row["variant"].startswith("default")
        and 1 - row["ratio to default"] > max(margin, noise.get(row["case"], 0.0))
    ]


def show(rows):
    for row in rows:
        if "error" in row:
            print(f"  {row['variant']:<30}{row['error']}", flush=True)
        else:
            print(
                f"  {row['variant']:<30}{row['seconds'] * 1e6:>12.1f} us{row['ratio to default']:>8.3f}{row['GB/s']:>8.0f} GB/s",
                flush=True,
            )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench.variants", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--json", help="write the rows to this file, anew after every case")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds (default: %(default)s)")
    parser.add_argument("--compile-only", nargs="+", metavar="CASE", help="compile these cases and nothing more")
    options = parser.parse_args(argv)
    start = time.monotonic()
    if not torch.cuda.is_available():
        print("skipped: no GPU here")
        return NO_GPU
    device = torch.device("cuda")
    if options.compile_only:
        _compile(options.compile_only, device)
        return 0
    names = [name for name in CASES if options.case in name]
    if not names:
        parser.error(f"--case: expected part of one of {', '.join(CASES)}; got {options.case!r}")
    compile_ahead(names, 0.5 * options.budget)
    from fastmix.bench import timing

    copy = timing.copy_speed(device) / 1e9
    print(f"copy: {copy:.0f} GB/s, read and written; compiled for {time.monotonic() - start:.0f} s", flush=True)
    rows, skipped, longest = [], [], 2 * CASE_SECONDS
    for name in names:
        begun = time.monotonic()
        if begun - start + longest > options.budget:
            skipped.append(name)
            continue
        print(name, flush=True)
        found = measure(name, CASES[name], device)
        torch.cuda.empty_cache()
        show(found)
        rows += found
        longest = max(longest, time.monotonic() - begun)
        _save(options.json, copy, rows, skipped)
    _save(options.json, copy, rows, skipped)
    for row in winners(rows):
        print(f"{row['case']}: {row['variant']} takes {row['ratio to default']:.3f} of the default's time")
    if skipped:
        print(f"not run for want of time: {', '.join(skipped)}")
    return int(any(row["variant"].startswith("default") or row["error"].startswith(WRONG) for row in rows if "error" in row))


def _save(path, copy, rows, skipped):
    if path:
        with open(path, "w") as file:
            json.dump({"copy GB/s": copy, "rows": rows, "not run": skipped}, file)


if __name__ == "__main__":
    sys.exit(main())
