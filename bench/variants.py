"""Competing variants of the kernels, timed against each other in one run; a GPU is needed.

    python -m fastmix.bench.variants [--case TEXT] [--json FILE] [--budget SECONDS]

A variant is another value of a constant that the launchers read, or another function on the same inputs. Each is captured in a CUDA
graph; the graphs of a case are replayed in turn, between CUDA events, the L2 cache overwritten before each. A call of less than SHORT
seconds is captured REPEATS times, and so reads what the cache holds. "default again" is the default a second time: differences within
its ratio are noise. A variant is timed only if its results are the default's, within the last place or 2e-6 of a row's largest value.

To add one: an entry in VARIANTS, under the operation that it changes.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastmix.bench import timing
from fastmix.bench.ops import ENTRIES
from fastmix.bench.programs import api, constants
from fastmix.bench.samples import BF16, F16, F32, Draw, name_of
from fastmix.losses.soft_cross_entropy import Options

NO_GPU = 3  # exit status
SHORT = 50e-6
REPEATS = 20  # of a short call
ROUNDS = (9, 60)
CASE_SECONDS = 1.0  # of timing
WRONG = "wrong: "
COMPILERS = 8  # processes


# Variants: (a context manager around the calls, a function instead of the case's own or None)


def _set(module, **values):
    return (lambda: constants(module, **values)), None


def formed_in_backward(s):
    """The backward forms the gradient, as in float16."""
    return _loss(s, False)


_TILES = {
    **{f"tile {size}": _set("_launch", ROW_TILE_BYTES=size) for size in (4096, 16384, 32768)},
    "8 warps": _set("_launch", MIX_WARPS=8),
}
_WARPS = {"half the warps": _set("_launch", WARP_VALUES=2048), "twice the warps": _set("_launch", WARP_VALUES=512)}
_ROWS = {"twice": 1024, "four times": 2048, "half": 256}
VARIANTS = {
    "mix": _TILES,
    "mix backward": _TILES,
    "loss": {
        "formed in the backward": (contextlib.nullcontext, formed_in_backward),
        **_WARPS,
        "rows of half the size held": _set("_launch", RESIDENT_CLASSES=16384, UNALIGNED_CLASSES=12000),
        "rows of twice the size held": _set("_launch", RESIDENT_CLASSES=65536, UNALIGNED_CLASSES=48000, MOST_WARPS=32),
        "no windows": _set("_class_tiles", WINDOW_BYTES=1 << 30),
        "one program a row": _set("_launch", FEW_ROWS=0),
    },
    "small loss": {
        "twice the warps": _set("_launch", WARP_VALUES=256),
        **{f"{name} the rows": _set("_launch", TILE_VALUES=values) for name, values in _ROWS.items()},
    },
    "loss in float16": {f"looped {classes}": _set("_launch", LOOPED_CLASSES=classes) for classes in (2048, 8192)} | _WARPS,
}


# Cases


class Case(NamedTuple):
    """inputs(device) for call(inputs) -> tensors; `floor`: the bytes that must be moved."""

    op: str
    inputs: Callable
    call: Callable
    floor: int


def _mix(s):
    return (api().mix_fwd(s.x, s.lam, s.index, s.box, None),)


def _mix_backward(s):
    return api().mix_bwd(s.g, s.x, s.lam, s.index, s.box, s.x.stride(), True, True)


def _loss(s, form):
    target, options = (s.weights, s.classes, None), Options(-100, s.options.get("label_smoothing", 0.0), "mean")
    loss, denominator, stats, _, cached = api().soft_ce_fwd(s.logits, *target, options, False, form)
    return loss, api().soft_ce_bwd(s.logits, *target, options, denominator, stats, s.g, cached)


def _case(op, shape, dtype, **options):
    """(name, case) of `mix`, `mix backward`, or one of the losses, whose gradient is formed where it is by default."""
    entry = ENTRIES["mix" if op.startswith("mix") else "soft_cross_entropy"]
    call, times = {"mix": (_mix, 2), "mix backward": (_mix_backward, 3)}.get(op, (lambda s: _loss(s, dtype != F16), 2))

    def inputs(device):
        return entry.sample(Draw(device, F32, edges=False), shape, dtype, **options)

    name = f"{op.replace(' in float16', '')}{' box' * ('box' in options)} {list(shape)} {name_of(dtype)}"
    name += ", upstream 0.5" * ("upstream" in options)
    return name, Case(op, inputs, call, times * math.prod(shape) * dtype.itemsize)


IMAGES, ROWS, LONG = (256, 3, 224, 224), (4096, 1000), (4096, 32768)
CASES = dict([  # what decides most comes first: the rest is left out where time is short
    _case("loss", ROWS, BF16, label_smoothing=0.1), _case("loss", ROWS, BF16, upstream=0.5, label_smoothing=0.1),
    _case("mix", IMAGES, F32), _case("mix backward", IMAGES, F32), _case("loss", LONG, BF16), _case("loss", LONG, BF16, upstream=0.5),
    _case("mix", IMAGES, BF16, layout="channels_last"), _case("loss", (1024, 21841), BF16), _case("loss", ROWS, F32),
    _case("loss in float16", LONG, F16), _case("mix", IMAGES, F32, box=2), _case("small loss", (128, 10), F32),
    _case("small loss", (1024, 100), F32), _case("mix backward", (128, 196, 768), BF16), _case("mix", (512, 3, 32, 32), F32),
    _case("loss in float16", (16384, 1000), F16), _case("loss", (1024, 21841), F32), _case("loss", (64, 131072), BF16),
])  # fmt: skip


def calls(case):
    """{variant: (context manager factory, function of the case's inputs)}, the default first."""
    default = contextlib.nullcontext, case.call
    found = {name: (around, call or case.call) for name, (around, call) in VARIANTS[case.op].items()}
    return {"default": default, **found, "default again": default}


def wrong(actual, expected):
    """How results differ from the expected ones, or None."""
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


def captured(call):
    """(a function that replays a call, or REPEATS of a short one, each freeing its results before the next; their number)"""
    for count in (1, REPEATS):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        if min(timing.seconds(graph.replay, torch.device("cuda")) for _ in range(5)) > SHORT:
            break
    return graph.replay, count


def in_turn(replays):
    """{name: median seconds of a replay}, one of each a round, the L2 cache overwritten before each."""
    cache = torch.empty(timing.FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = {name: [] for name in replays}
    start, rounds = time.monotonic(), 0
    while rounds < ROUNDS[0] or (rounds < ROUNDS[1] and time.monotonic() - start < CASE_SECONDS):
        for name in list(replays)[rounds % len(replays) :] + list(replays)[: rounds % len(replays)]:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            cache.zero_()
            events[0].record()
            replays[name]()
            events[1].record()
            times[name].append(events)
        torch.cuda.synchronize()
        rounds += 1
    return {name: statistics.median(start.elapsed_time(end) / 1e3 for start, end in found[1:]) for name, found in times.items()}


def measure(name, case, device):
    """Rows of a case; one that failed has "error" and no time."""
    inputs, expected, replays, counts, errors = case.inputs(device), None, {}, {}, {}
    for variant, (around, call) in calls(case).items():
        try:
            with around():
                results = call(inputs)
                expected = results if expected is None else expected
                if error := wrong(results, expected):
                    errors[variant] = f"{WRONG}{error}"
                else:
                    replays[variant], counts[variant] = captured(lambda call=call: call(inputs))
        except Exception as problem:  # out of registers or shared memory, say: a variant may, the default may not
            errors[variant] = f"{type(problem).__name__}: {str(problem)[:300]}"
        if expected is None:
            break
    rows = []
    if "default" in replays:
        seconds = {variant: median / counts[variant] for variant, median in in_turn(replays).items()}
        for variant, value in seconds.items():
            figures = {"seconds": value, "ratio to default": value / seconds["default"], "GB/s": case.floor / value / 1e9}
            rows.append({"case": name, "variant": variant, **figures, "calls": counts[variant]})
    return rows + [{"case": name, "variant": variant, "error": error} for variant, error in errors.items()]


def compile_case(name):
    """Compiles all variants of a case, so that another process finds them in Triton's cache on disk."""
    for around, call in calls(CASES[name]).values():
        with contextlib.suppress(Exception), around():
            call(CASES[name].inputs(torch.device("cuda")))


def winners(rows, margin=0.03):
    """Rows that beat the default by more than a margin, and by more than the default differs from itself."""
    noise = {
        row["case"]: abs(1 - row["ratio to default"]) for row in rows if row["variant"] == "default again" and "seconds" in row
    }
    others = [row for row in rows if "seconds" in row and not row["variant"].startswith("default")]
    return [row for row in others if 1 - row["ratio to default"] > max(margin, noise.get(row["case"], 0.0))]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench.variants", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--json", help="write the rows to this file, anew after every case")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds (default: %(default)s)")
    options = parser.parse_args(argv)
    start = time.monotonic()
    if not torch.cuda.is_available():
        print("skipped: no GPU here")
        return NO_GPU
    names = [name for name in CASES if options.case in name]
    if not names:
        parser.error(f"--case: expected part of one of {', '.join(CASES)}; got {options.case!r}")
    workers = max(1, min(COMPILERS, (os.cpu_count() or 2) // 2, len(names)))
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pool.map(compile_case, names)
    device = torch.device("cuda")
    copy = timing.copy_speed(device) / 1e9
    print(f"copy: {copy:.0f} GB/s, read and written; compiled for {time.monotonic() - start:.0f} s", flush=True)
    rows, skipped, longest = [], [], 2 * CASE_SECONDS
    for name in names:
        begun = time.monotonic()
        if begun - start + longest > options.budget:
            skipped.append(name)
        else:
            print(name, flush=True)
            found = measure(name, CASES[name], device)
            torch.cuda.empty_cache()
            for row in found:
                text = (
                    row.get("error")
                    or f"{row['seconds'] * 1e6:>12.1f} us{row['ratio to default']:>8.3f}{row['GB/s']:>8.0f} GB/s"
                )
                print(f"  {row['variant']:<30}{text}", flush=True)
            rows += found
            longest = max(longest, time.monotonic() - begun)
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps({"copy GB/s": copy, "rows": rows, "not run": skipped}))
    for row in winners(rows):
        print(f"{row['case']}: {row['variant']} takes {row['ratio to default']:.3f} of the default's time")
    if skipped:
        print(f"not run for want of time: {', '.join(skipped)}")
    return int(any(row["variant"].startswith("default") or row["error"].startswith(WRONG) for row in rows if "error" in row))


if __name__ == "__main__":
    sys.exit(main())
