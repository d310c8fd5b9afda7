"""What the first call costs: imports, compilation, and what a disk cache saves of it.

    python -m fastmix.bench cold [--json FILE] [--budget SECONDS]

Every column is a process of its own: first with empty caches of Triton's and Inductor's compiled code, then with what that process
left on disk. Each step is called twice and both calls are timed. `warmup` is a process that calls fastmix.warmup before anything else:
its steps' first calls should cost what second calls do. torch.compile is given what people write by hand.

Where there is no GPU the ops run on the native backend, whose library is built by the first process, or on torch.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

import fastmix
from fastmix import _native
from fastmix.bench import ops, peers, samples, screen, timing

IMAGES, CLASSES = (64, 3, 224, 224), (256, 1000)
MODES = {
    "ops": "a process that calls the ops",
    "warmup": "a process that calls fastmix.warmup first",
    "compile": "torch.compile of mixup-cifar10's expression and of two hard losses",
}
KEYS = "mode", "caches", "step", "first", "second"  # of a row: seconds of its first call and of the second
CHILD = """
import json, sys, time
start = time.perf_counter()
import torch
torched = time.perf_counter()
import fastmix
imported = time.perf_counter()
print(json.dumps(["import torch", torched - start, None]), json.dumps(["import fastmix", imported - torched, None]), sep="\\n")
from fastmix.bench import cold
for row in cold.steps(sys.argv[1]):
    print(json.dumps(row), flush=True)
"""


def steps(mode):
    """[step, seconds of its first call, seconds of the second] of a process of this mode."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if mode == "warmup":
        yield ["fastmix.warmup", fastmix.warmup(IMAGES, CLASSES, device=device), None]
    calls = {"first tensor on the GPU": lambda: torch.zeros(1, device=device)} if device.type == "cuda" else {}
    calls |= {"native library, built or found": _native.why_not} if device.type == "cpu" and mode == "ops" else {}
    draw = samples.Draw(device, torch.float32, edges=False)
    images = ops.ENTRIES["mix"].sample(draw, IMAGES, torch.float32)
    rows = ops.ENTRIES["soft_cross_entropy"].sample(draw, CLASSES, torch.float32)
    (images, leaves), (rows, logits) = samples.with_leaves(images, ["x"]), samples.with_leaves(rows, ["logits"])
    how, labels = (images.lam, images.index), (rows.y, rows.lam, rows.index)
    if mode == "compile":
        mix, loss = torch.compile(peers.mixup_cifar10), torch.compile(peers.two_losses)
        mixing, losing = "torch.compile, mixup-cifar10", "torch.compile, two hard losses"
    else:
        mix, loss, mixing, losing = fastmix.mix, fastmix.soft_cross_entropy, "mix", "loss"
        mixup, still, labels = fastmix.Mixup(0.2), images.x.detach(), (fastmix.Mix(rows.lam, rows.index).target(rows.y),)
        calls |= {"draw": lambda: mixup.sample(still), "mix": lambda: mix(still, *how)}
    calls |= {
        f"{mixing}, forward + backward": lambda: torch.autograd.grad(mix(images.x, *how).sum(), leaves),
        f"{losing}, forward + backward": lambda: torch.autograd.grad(loss(*logits, *labels), logits),
    }
    for step, call in calls.items():
        # the first tensor on a GPU starts it; to wait for the GPU before would start it too
        where = torch.device("cpu") if step.startswith("first") else device
        yield [step, *(timing.seconds(call, where) for _ in range(2))]


def plan(gpu):
    """([modes], {what is missing: why}) here."""
    if gpu or "torch.compile" not in peers.MISSING:
        return list(MODES), {}
    return ["ops", "warmup"], {"torch.compile": peers.MISSING["torch.compile"]}


def child(mode, caches, timeout):
    """(rows of a fresh process, why some are missing or None)"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("FASTMIX_")}
    folders = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "FASTMIX_CACHE": "native"}
    environment |= {name: str(caches / folder) for name, folder in folders.items()}
    try:
        ran = subprocess.run([sys.executable, "-c", CHILD, mode], timeout=timeout, capture_output=True, env=environment)
        lines, problem = ran.stdout, ran.stderr.decode().strip().splitlines()[-1][:300] if ran.returncode else None
    except subprocess.TimeoutExpired as error:
        lines, problem = error.stdout or b"", "out of time"
    return [json.loads(line) for line in lines.splitlines() if line.startswith(b"[")], problem


def measure(budget, gpu):
    """{"device", "rows", "missing"}, yielded anew after every process."""
    end = time.monotonic() + budget
    modes, missing = plan(gpu)
    result = {"device": "gpu" if gpu else "cpu", "rows": [], "missing": missing}
    with tempfile.TemporaryDirectory(prefix="fastmix-cold-") as folder:
        for caches in ("empty", "warm"):  # warm caches are what short time leaves out
            for mode in modes:
                rows, problem = child(mode, pathlib.Path(folder) / mode, max(end - time.monotonic(), 0.1))
                result["rows"] += [dict(zip(KEYS, (mode, caches, *row), strict=True)) for row in rows]
                if problem:
                    missing[f"{mode}, {caches} caches"] = problem
                yield result


def show(result):
    def text(seconds):
        return "" if seconds is None else f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"

    columns = "step", "first call", "second call", "first call, warm disk cache"
    for mode, title in MODES.items():
        rows = [row for row in result["rows"] if row["mode"] == mode]
        warm = {row["step"]: row["first"] for row in rows if row["caches"] == "warm"}
        lines = [(row["step"], row["first"], row["second"], warm.get(row["step"])) for row in rows if row["caches"] == "empty"]
        if lines:
            print(f"\n{title}")
            screen.table(columns, [[step, *map(text, seconds)] for step, *seconds in lines], right=columns[1:])
    for what, why in result["missing"].items():
        print(f"not measured: {what}: {why}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench cold", description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows to this file, anew after every process")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds (default: %(default)s)")
    options = parser.parse_args(argv)
    for result in measure(options.budget, torch.cuda.is_available()):
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(result, indent=1))
    print(f"usual shapes: images {list(IMAGES)}, logits {list(CLASSES)}, float32, on the {result['device']}")
    show(result)
    return int(any(row != "out of time" for key, row in result["missing"].items() if "caches" in key))


if __name__ == "__main__":
    sys.exit(main())
