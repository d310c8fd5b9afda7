"""What the first call costs: imports, compilation, and what a disk cache saves of it.

    python -m fastmix.bench cold [--json FILE] [--budget SECONDS]

Every column is a process of its own: with empty caches of Triton's and Inductor's compiled code, then with what that process
left on disk. A step's first call is timed, and its second. `warmup` is a process that calls fastmix.warmup before anything else: the
steps after it should cost what second calls do. torch.compile is given what people write by hand.

Where there is no GPU the ops run on the torch backend, and what their kernels would cost is the time to compile them for sm_90.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

from fastmix.bench import screen

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


def _inputs(device):
    import torch

    x = torch.randn(IMAGES, device=device)
    z = torch.randn(CLASSES, device=device, requires_grad=True)
    lam, index = torch.rand(IMAGES[0], device=device), torch.randperm(IMAGES[0], device=device)
    rows = torch.randint(0, CLASSES[1], CLASSES[:1], device=device)
    return x, z, lam, index, rows, torch.rand(CLASSES[0], device=device), torch.randperm(CLASSES[0], device=device)


def _ops(device):
    """{step: call} of the ops at a usual shape."""
    import torch

    import fastmix

    x, z, lam, index, y, share, partner = _inputs(device)
    leaf = x.clone().requires_grad_()
    mixup = fastmix.Mixup(0.2)
    target = fastmix.Mix(share, partner).target(y)
    return {
        "draw": lambda: mixup.sample(x),
        "mix": lambda: fastmix.mix(x, lam, index),
        "mix, forward + backward": lambda: torch.autograd.grad(fastmix.mix(leaf, lam, index).sum(), leaf),
        "loss, forward + backward": lambda: torch.autograd.grad(fastmix.soft_cross_entropy(z, target), z),
    }


def _by_hand(device):
    """{step: call} of torch.compile."""
    import torch

    from fastmix.bench import peers

    x, z, lam, index, y, share, partner = _inputs(device)
    leaf, lam = x.clone().requires_grad_(), lam.view(-1, 1, 1, 1)
    mix, loss = torch.compile(peers.mixup_cifar10), torch.compile(peers.two_losses)
    return {
        "torch.compile, mixup-cifar10, forward + backward": lambda: torch.autograd.grad(mix(leaf, lam, index).sum(), leaf),
        "torch.compile, two hard losses, forward + backward": lambda: torch.autograd.grad(loss(z, y, share, partner), z),
    }


def _timed(calls, device):
    """[step, seconds of the first call, seconds of the second] for each."""
    import torch

    for step, call in calls.items():
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            call()
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
        for step, call in calls.items():
            seconds = []
            for _ in range(2):
                start = time.perf_counter()
                static.compile_launches("90", call)
                seconds.append(time.perf_counter() - start)
            yield [step, *seconds]


def steps(mode):
    """What a process of this mode measures, step by step."""
    import torch

    import fastmix

    device = "cuda" if torch.cuda.is_available() and mode != "kernels" else "cpu"
    if device == "cuda":
        yield from _timed({"first tensor on the GPU": lambda: torch.zeros(1, device=device)}, device)
    if mode == "warmup":
        start = time.perf_counter()
        fastmix.warmup(IMAGES, CLASSES, device=device)
        yield ["fastmix.warmup", time.perf_counter() - start, None]
    if mode == "kernels":
        ops = _ops(device)
        del ops["draw"]  # has no kernel of ours
        yield from _compiled_only(ops)
    else:
        yield from _timed((_by_hand if mode == "compile" else _ops)(device), device)


def plan(gpu):
    """({mode: None}, {what is missing: why}) here."""
    modes, missing = dict.fromkeys(("ops", "warmup")), {}
    compiler = any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    if gpu or compiler:
        modes["compile"] = None
    else:
        missing["torch.compile"] = "there is no C++ compiler"
    if gpu:
        return modes, missing
    if sys.platform == "linux" and importlib.util.find_spec("triton"):
        modes["kernels"] = None
    else:
        missing["kernels"] = "there is no Triton"
    return modes, missing


def child(mode, caches, timeout):
    """(rows, why they are not all, or None) of a fresh process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("FASTMIX_")}
    environment |= {
        "TRITON_CACHE_DIR": os.path.join(caches, "triton"),
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(caches, "inductor"),
    }
    out, problem = os.path.join(caches, "rows.json"), None
    if os.path.exists(out):
        os.remove(out)
    try:
        ran = subprocess.run(
            [sys.executable, "-c", CHILD, mode, out], timeout=timeout, env=environment, capture_output=True, text=True
        )
        if ran.returncode:
            problem = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1][:300]
    except subprocess.TimeoutExpired:
        problem = "out of time"
    try:
        with open(out) as file:
            return json.load(file), problem
    except (OSError, ValueError):
        return [], problem or "it wrote nothing"


def measure(budget, gpu):
    """{"rows", "missing"}, yielded anew after every process. A row is {"mode", "caches", "step", "first", "second"}."""
    start = time.monotonic()
    modes, missing = plan(gpu)
    result = {"device": "gpu" if gpu else "cpu", "rows": [], "missing": missing}
    with tempfile.TemporaryDirectory(prefix="fastmix-cold-") as folder:
        for caches in ("empty", "warm"):  # what short time leaves out are warm caches
            for mode in modes:
                left = budget - (time.monotonic() - start)
                place = os.path.join(folder, mode)
                os.makedirs(place, exist_ok=True)
                rows, problem = child(mode, place, left) if left > 1 else ([], "out of time")
                result["rows"] += [
                    {"mode": mode, "caches": caches, "step": step, "first": first, "second": second}
                    for step, first, second in rows
                ]
                if problem:
                    missing[f"{mode}, {caches} caches"] = problem
                yield result


COLUMNS = "step", "first call", "second call", "first call, warm disk cache"


def table(result):
    """[mode, rows of text] of the table."""
    found = {(row["mode"], row["caches"], row["step"]): row for row in result["rows"]}

    def cell(row, column):
        value = row and row[column]
        return "" if value is None else f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"

    for mode, title in MODES.items():
        names = dict.fromkeys(row["step"] for row in result["rows"] if row["mode"] == mode)
        lines = []
        for step in names:
            empty, warm = (found.get((mode, caches, step)) for caches in ("empty", "warm"))
            lines.append([step, cell(empty, "first"), cell(empty, "second"), cell(warm, "first")])
        if lines:
            yield title, lines


def show(result):
    for title, lines in table(result):
        print(f"\n{title}")
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
            with open(options.json, "w") as file:
                json.dump(result, file, indent=1)
    print(f"usual shapes: images {list(IMAGES)}, logits {list(CLASSES)}, float32, on the {result['device']}")
    show(result)
    return int(any(row != "out of time" for key, row in result["missing"].items() if "caches" in key))


if __name__ == "__main__":
    sys.exit(main())
