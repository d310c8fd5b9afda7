"""Every op, forwards and backwards, on its kernels under NVIDIA's compute-sanitizer; a GPU is needed.

    python -m fastmix.bench.sanitize [--json FILE] [--budget SECONDS]

memcheck finds accesses outside an allocation (every tensor has one of its own here), racecheck two threads of a program that race for
shared memory. The cases, small shapes that take every branch of every kernel, are those of `fastmix.bench.ops`. They run without the
tool first, which checks them and compiles the kernels; then under both at a time.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import torch

import fastmix
from fastmix.bench import ops, samples

ALONE, TOOLS = "without the tool", ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")


def results(op, shape, dtype, options, device):
    """A call's tensors: all gradients, and through the same graph those of one input, under an upstream gradient of 1 too."""
    s = op.sample(samples.Draw(device, torch.float32), shape, dtype, **options)
    if not s.leaves:
        made = op.call(s)
        return made if isinstance(made, tuple) else (made,)
    one, first = samples.with_leaves(s, s.leaves[:1])
    every, leaves = samples.with_leaves(s, s.leaves)
    out, alone = op.call(every), op.call(one)
    g = torch.rand_like(out)  # not 1: a backward writes a cached gradient anew
    some = [(out, leaves, g), (out, leaves[:1], torch.ones_like(g)), (out, leaves[-1:], g), (alone, first, g)]
    return out, *(t for value, of, g in some for t in torch.autograd.grad(value, of, g, retain_graph=True))


def cases(device):
    """{name: call}"""
    return {
        f"{op.name} {list(shape)} {samples.name_of(dtype)}{', ' * bool(text)}{text}": functools.partial(
            results, op, shape, dtype, samples.options_of(text), device
        )
        for op in ops.ENTRIES.values()
        for text, shape, dtype, _ in samples.cases_of(op.sanitized)
    }


def run_cases(device):
    """Runs all cases; raises where a result is not finite."""
    for name, call in cases(device).items():
        with fastmix.backend("triton"):
            finite = all(bool(torch.isfinite(t).all()) for t in call())
        if not finite:
            raise RuntimeError(f"{name}: not finite")
        print("ran", name, flush=True)


def tool():
    """The path of compute-sanitizer, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.path.join(home, "bin"))


def verdict(name, code, text):
    """("passed", "failed" or "skipped", one line) from an exit status and what was printed."""
    last = (text.strip().splitlines() or ["no output"])[-1][:200]
    if name == ALONE:
        return ("failed", last) if code else ("passed", "all cases ran")
    found = SUMMARY.findall(text)
    if not found:
        return "skipped", f"the tool did not finish (exit status {code}): {last}"
    return "passed" if code == 0 and re.match(r"0 (errors|hazards)", found[-1]) else "failed", found[-1].strip()


def sanitize(budget, script=(sys.executable, "-m", "fastmix.bench.sanitize", "--cases")):
    """{tool or "without the tool": {"status", "seconds", "summary"}}, yielded anew after each."""
    started, program, rows = time.monotonic(), tool(), {}
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(name):
        options = [f"--tool={name}", "--error-exitcode=87", "--print-limit=20", "--target-processes=application-only"]
        command, begun = [*([] if name == ALONE else [program, *options]), *script], time.monotonic()
        try:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
            ran = subprocess.run(command, timeout=max(budget - (begun - started), 1), **pipes)
            print(ran.stdout, flush=True)
            status, summary = verdict(name, ran.returncode, ran.stdout)
        except subprocess.TimeoutExpired:
            status, summary = "out of time", name
        rows[name] = {"status": status, "seconds": round(time.monotonic() - begun, 1), "summary": summary}

    run(ALONE)
    yield rows
    if program is None or rows[ALONE]["status"] != "passed":
        why = "compute-sanitizer is not installed" if program is None else "the cases do not run without it"
        yield rows | {name: {"status": "skipped", "seconds": 0.0, "summary": why} for name in TOOLS}
        return
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in concurrent.futures.as_completed([pool.submit(run, name) for name in TOOLS]):
            yield dict(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", action="store_true", help="run the cases and nothing more")
    parser.add_argument("--json", help="also write the findings to this file")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds (default: %(default)s)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("skipped: no GPU here")
        return 3
    if options.cases:
        run_cases(torch.device("cuda"))
        return 0
    for rows in sanitize(options.budget):
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))
    for name, row in rows.items():
        print(f"{name:<18}{row['status']:<13}{row['seconds']:>7.1f} s  {row['summary']}")
    return int(any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
