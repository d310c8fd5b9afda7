"""Every op, forwards and backwards, on its kernels under NVIDIA's compute-sanitizer; a GPU is needed.

    python -m fastmix.bench.sanitize [--json FILE] [--budget SECONDS]

memcheck finds accesses outside an allocation (every tensor has one of its own here), racecheck finds two threads of a program
that meet in shared memory. The cases run without the tool first, which proves them and compiles
the kernels; then under both at a time.
"""

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import time

CODE = 87  # what the tool exits with where it found something
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
TOOLS = ("memcheck", "racecheck")


def cases(device):
    """Small shapes that take every branch of every kernel: {name: call}; a call returns the tensors that it made."""
    import torch

    import fastmix

    def mix(shape, dtype=torch.float32, box=0, channels_last=False, need_lam=True, shared=False):
        def call():
            x = torch.randn(shape, device=device).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            lam = torch.rand(shape[0], device=device)
            lam[:1] = 1
            index = torch.randperm(shape[0], device=device) * (not shared)
            corners = torch.randint(-1, 9, (2, shape[0], box), device=device)
            cut = torch.cat((corners.amin(0), corners.amax(0)), 1) if box else None
            leaves = [x.requires_grad_()] + ([lam.requires_grad_()] if need_lam else [])
            out = fastmix.mix(x, lam, index, box=cut)
            return out, *torch.autograd.grad(out, leaves, torch.randn_like(out))

        return call

    def loss(shape, dtype=torch.float32, K=2, dense=False, weighted=False, **options):
        def call():
            N, C, *inner = shape
            z = torch.randn(shape, device=device).to(dtype).requires_grad_()
            classes = torch.randint(0, C, (N, K, *inner), device=device)
            weights = torch.rand(N, K, device=device, requires_grad=True)
            probabilities = torch.rand(shape, device=device, requires_grad=True)
            target, leaf = (probabilities, probabilities) if dense else (fastmix.SoftTarget(classes, weights), weights)
            weight = torch.rand(C, device=device) if weighted else None
            out = fastmix.soft_cross_entropy(z, target, weight=weight, **options)
            upstream = torch.rand_like(out)  # not 1: what the forward formed is written anew
            gradients = torch.autograd.grad(out, (z, leaf), upstream, retain_graph=True)
            return out, *gradients, *torch.autograd.grad(out, (z,), torch.ones_like(out))

        return call

    half, brain, double = torch.float16, torch.bfloat16, torch.float64
    return {
        "mix": mix((5, 3, 8, 8)),
        "mix, odd rows": mix((7, 3, 5, 5), brain),
        "mix, one partner for all": mix((6, 1100), half, shared=True),
        "mix, rows of several tiles": mix((3, 5003)),
        "mix, boxes": mix((5, 3, 8, 8), box=2),
        "mix, boxes, channels_last": mix((5, 3, 8, 8), brain, box=2, channels_last=True),
        "mix, volumes": mix((3, 2, 4, 5, 6), box=3, need_lam=False),
        "loss": loss((5, 16)),
        "loss, smoothing, class weights, ignored": loss((6, 40), weighted=True, label_smoothing=0.1, ignore_index=3),
        "loss, float16": loss((4, 33), half, reduction="sum"),
        "loss, odd classes": loss((3, 1023), brain, label_smoothing=0.1),
        "loss, float64": loss((3, 130), double, weighted=True),
        "loss, five components": loss((9, 10), K=5, reduction="none"),
        "loss per pixel": loss((2, 7, 5, 5), weighted=True, label_smoothing=0.1, reduction="none"),
        "loss, rows beyond a tile": loss((2, 21841), label_smoothing=0.1, weighted=True),
        "loss, float16, rows beyond a tile": loss((2, 40000), half),
        "probabilities": loss((4, 100), dense=True, label_smoothing=0.1, weighted=True),
        "probabilities per pixel, float16": loss((2, 7, 5, 5), half, dense=True, reduction="none"),
        "probabilities, rows beyond a tile": loss((2, 21841), brain, dense=True),
    }


def run_cases(device):
    """Runs them all; raises where a result is not finite."""
    import torch

    import fastmix

    for name, call in cases(device).items():
        with fastmix.backend("triton"):
            results = call()
        if not all(bool(torch.isfinite(t).all()) for t in results):
            raise RuntimeError(f"{name}: not finite")
        print("ran", name, flush=True)


def tool():
    """Where compute-sanitizer is, or None."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [os.path.join(home, part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def verdict(code, text):
    """("passed", "failed" or "skipped", one line) from the tool's exit status and output."""
    found = SUMMARY.findall(text)
    if found:
        clean = code == 0 and re.match(r"0 (errors|hazards)", found[-1])
        return "passed" if clean else "failed", found[-1].strip()
    last = [line.strip() for line in text.splitlines() if line.strip()][-1:] or ["no output"]
    return "skipped", f"the tool did not finish (exit status {code}): {last[0][:200]}"


def _run(command, budget, environment):
    try:
        ran = subprocess.run(
            command, timeout=max(budget, 1), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        text = output if isinstance(output, str) else output.decode(errors="replace")
        print(text, flush=True)
        return None, text
    print(ran.stdout, flush=True)
    return ran.returncode, ran.stdout


def sanitize(budget, script=None):
    """{tool or "without the tool": {"status", "seconds", "summary"}}, yielded anew after each."""
    script = script or [sys.executable, "-m", "fastmix.bench.sanitize", "--cases"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started, rows = time.monotonic(), {}

    def timed(name, command):
        begun = time.monotonic()
        code, text = _run(command, budget - (begun - started), environment)
        return code, text, {"status": "out of time", "seconds": round(time.monotonic() - begun, 1), "summary": name}

    code, text, row = timed("the cases alone", script)
    if code is not None:
        last = text.strip().splitlines()[-1:] or [""]
        row.update(status="failed" if code else "passed", summary=last[0][:200] if code else "all cases ran")
    rows["without the tool"] = row
    yield rows
    program = tool()
    if program is None or row["status"] != "passed":
        why = "compute-sanitizer is not installed" if program is None else "the cases do not run without it"
        yield rows | {name: {"status": "skipped", "seconds": 0.0, "summary": why} for name in TOOLS}
        return

    def under(name):
        options = [f"--tool={name}", f"--error-exitcode={CODE}", "--print-limit=20", "--target-processes=application-only"]
        code, text, row = timed(name, [program, *options, *script])
        if code is not None:
            row["status"], row["summary"] = verdict(code, text)
        rows[name] = row

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in concurrent.futures.as_completed([pool.submit(under, name) for name in TOOLS]):
            done.result()
            yield dict(list(rows.items()))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", action="store_true", help="run the cases and nothing more")
    parser.add_argument("--json", help="also write the findings to this file")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds (default: %(default)s)")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("skipped: no GPU here")
        return 3
    if options.cases:
        run_cases(torch.device("cuda"))
        return 0
    rows = {}
    for rows in sanitize(options.budget):
        if options.json:
            with open(options.json, "w") as file:
                json.dump(rows, file, indent=1)
    for name, row in rows.items():
        print(f"{name:<18}{row['status']:<13}{row['seconds']:>7.1f} s  {row['summary']}")
    return int(any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
