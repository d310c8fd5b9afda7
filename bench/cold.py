"""What the first call costs: imports, compilation, and what a disk cache saves of it.

    python -m fastmix.bench cold [--json FILE] [--budget SECONDS]

Every column is a process of its own: first with empty caches of Triton's and Inductor's compiled code, then with what that process
left on disk. Each step is called twice and both calls are timed. `warmup` is a process that calls fastmix.warmup before anything else:
its steps' first calls should cost what second calls do. torch.compile is given what people write by hand.

Where there is no GPU the ops run on the torch backend, and the cost of their kernels is the time to compile them for sm_90.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

IMAGES, CLASSES = (64, 3, 224, 224), (256, 1000)
MODES = {
    "ops": "a process that calls the ops",
    "warmup": "a process that calls fastmix.warmup first",
    "compile": "torch.compile of mixup-cifar10's expression and of two hard losses",
    "kernels": "the ops' kernels, compiled for sm_90 and not run",
}
CHILD = """
import json, sys, time
start = time.perf_counter()
import torch
torched = time.perf_counter()
import fastmix
imported = time.perf_counter()
rows = [["import torch", torched - start, None], ["import fastmix", imported - torched, None]]
from fastmix.bench import cold
for row in cold.steps(sys.argv[1]):
    rows.append(row)
    with open(sys.argv[2], "w") as file:
        json.dump(rows, file)
"""


def _calls(mode, device):
    """{step: call} of the ops, or of torch.compile, at a usual shape."""
    import torch

    import fastmix
    from fastmix.bench import ops, peers, samples

    draw = samples.Draw(device, torch.float32, edges=False)
    images = ops.ENTRIES["mix"].sample(draw, IMAGES, torch.float32)
    rows = ops.ENTRIES["soft_cross_entropy"].sample(draw, CLASSES, torch.float32)
    (images, leaves), (rows, logits) = samples.with_leaves(images, ["x"]), samples.with_leaves(rows, ["logits"])
    x, lam, index, labels = images.x, images.lam, images.index, (rows.y, rows.lam, rows.index)
    if mode == "compile":
        mix, loss = torch.compile(peers.mixup_cifar10), torch.compile(peers.two_losses)
        return {
            "torch.compile, mixup-cifar10, forward + backward": lambda: torch.autograd.grad(mix(x, lam, index).sum(), leaves),
            "torch.compile, two hard losses, forward + backward": lambda: torch.autograd.grad(loss(*logits, *labels), logits),
        }
    mixup, target, still = fastmix.Mixup(0.2), fastmix.Mix(rows.lam, rows.index).target(rows.y), x.detach()
    return {
        "draw": lambda: mixup.sample(still),
        "mix": lambda: fastmix.mix(still, lam, index),
        "mix, forward + backward": lambda: torch.autograd.grad(fastmix.mix(x, lam, index).sum(), leaves),
        "loss, forward + backward": lambda: torch.autograd.grad(fastmix.soft_cross_entropy(*logits, target), logits),
    }


def _timed(calls, device="cpu", run=lambda call: call()):
    """[step, seconds of the first call, seconds of the second] for each."""
    import torch

    for step, call in calls.items():
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            run(call)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        yield [step, *seconds]


def _compiled_only(calls):
    """The same for kernels that are compiled for sm_90 as CPU tensors ask for them, and not launched."""
    import fastmix
    from fastmix import _backend
    from fastmix.bench import static

    static._cost = lambda compiled: None
    _backend._why_not_triton = lambda device: None
    with fastmix.backend("triton"):
        yield from _timed(calls, run=lambda call: static.compile_launches("90", call))


def steps(mode):
    """What a process of this mode measures, step by step."""
    import torch

    import fastmix

    device = "cuda" if torch.cuda.is_available() and mode != "kernels" else "cpu"
    if device == "cuda":
        yield from _timed({"first tensor on the GPU": lambda: torch.zeros(1, device=device)}, device)
    if mode == "warmup":
        yield ["fastmix.warmup", fastmix.warmup(IMAGES, CLASSES, device=device), None]
    calls = _calls(mode, device)
    if mode == "kernels":
        del calls["draw"]  # has no kernel of ours
        yield from _compiled_only(calls)
    else:
        yield from _timed(calls, device)


def plan(gpu):
    """([modes], {what is missing: why}) here."""
    modes, missing = ["ops", "warmup"], {}
    if gpu or any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        modes.append("compile")
    else:
        missing["torch.compile"] = "there is no C++ compiler"
    if not gpu and sys.platform == "linux" and importlib.util.find_spec("triton"):
        modes.append("kernels")
    elif not gpu:
        missing["kernels"] = "there is no Triton"
    return modes, missing


def child(mode, caches, timeout):
    """(rows of a fresh process, why some are missing or None)"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("FASTMIX_")}
    environment |= {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    out, problem = caches / "rows.json", None
    out.unlink(missing_ok=True)
    command, pipes = [sys.executable, "-c", CHILD, mode, str(out)], {"capture_output": True, "text": True, "env": environment}
    try:
        ran = subprocess.run(command, timeout=timeout, **pipes)
        if ran.returncode:
            problem = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1][:300]
    except subprocess.TimeoutExpired:
        problem = "out of time"
    try:
        return json.loads(out.read_text()), problem
    except (OSError, ValueError):
        return [], problem or "it wrote nothing"


def measure(budget, gpu):
    """{"rows", "missing"}, yielded anew after every process. A row is {"mode", "caches", "step", "first", "second"}."""
    start = time.monotonic()
    modes, missing = plan(gpu)
    result = {"device": "gpu" if gpu else "cpu", "rows": [], "missing": missing}
    with tempfile.TemporaryDirectory(prefix="fastmix-cold-") as folder:
        for caches in ("empty", "warm"):  # warm caches are what short time leaves out
            for mode in modes:
                left = budget - (time.monotonic() - start)
                place = pathlib.Path(folder) / mode
                place.mkdir(exist_ok=True)
                rows, problem = child(mode, place, left) if left > 1 else ([], "out of time")
                keys = "mode", "caches", "step", "first", "second"
                result["rows"] += [dict(zip(keys, (mode, caches, *row), strict=True)) for row in rows]
                if problem:
                    missing[f"{mode}, {caches} caches"] = problem
                yield result


COLUMNS = "step", "first call", "second call", "first call, warm disk cache"


def show(result):
    from fastmix.bench import screen

    found = {(row["mode"], row["caches"], row["step"]): row for row in result["rows"]}

    def cell(mode, caches, step, column):
        value = found.get((mode, caches, step), {}).get(column)
        return "" if value is None else f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"

    columns = ("empty", "first"), ("empty", "second"), ("warm", "first")
    for mode, title in MODES.items():
        names = dict.fromkeys(row["step"] for row in result["rows"] if row["mode"] == mode)
        if names:
            print(f"\n{title}")
            lines = [[step, *(cell(mode, caches, step, column) for caches, column in columns)] for step in names]
            screen.table(COLUMNS, lines, COLUMNS[1:])
    for what, why in result["missing"].items():
        print(f"not measured: {what}: {why}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench cold", description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows to this file, anew after every process")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds (default: %(default)s)")
    options = parser.parse_args(argv)
    import torch

    result = {}
    for result in measure(options.budget, torch.cuda.is_available()):
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(result, indent=1))
    print(f"usual shapes: images {list(IMAGES)}, logits {list(CLASSES)}, float32, on the {result['device']}")
    show(result)
    return int(any(row != "out of time" for key, row in result["missing"].items() if "caches" in key))


if __name__ == "__main__":
    sys.exit(main())
