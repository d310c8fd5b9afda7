"""Every op, forwards and backwards, on its kernels under NVIDIA's compute-sanitizer; a GPU is needed.

    python -m fastmix.bench.sanitize [--json FILE] [--budget SECONDS]

memcheck finds accesses outside an allocation (every tensor has one of its own here), racecheck finds two threads of a program that race
for shared memory. The cases, small shapes that take every branch of every kernel, are those of `fastmix.bench.ops`. They run without
the tool first, which checks them and compiles the kernels; then under both at a time.
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

CODE = 87  # the tool's exit status where it found something
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
TOOLS = ("memcheck", "racecheck")


def cases(device):
    """{name: call}; a call returns the tensors that it made."""
    import torch

    from fastmix.bench import ops, samples

    def run(op, shape, dtype, options):
        """All gradients, and through the same graph those of one input, under an upstream gradient of 1 too."""
        s = op.sample(samples.Draw(device, torch.float32), shape, dtype, **options)
        one, first = samples.with_leaves(s, s.leaves[:1])
        every, leaves = samples.with_leaves(s, s.leaves)
        out, alone = op.call(every), op.call(one)
        g = torch.rand_like(out)  # not 1: a backward writes a cached gradient anew
        some = [(out, leaves, g), (out, leaves[:1], torch.ones_like(g)), (out, leaves[-1:], g), (alone, first, g)]
        return out, *(t for value, of, g in some for t in torch.autograd.grad(value, of, g, retain_graph=True))

    found = {}
    for op in ops.ENTRIES.values():
        for text, shape, dtype, _ in samples.cases_of(op.sanitized):
            name = ", ".join(filter(None, [f"{op.name} {list(shape)} {samples.name_of(dtype)}", text]))
            found[name] = functools.partial(run, op, shape, dtype, samples.options_of(text))
    return found


def run_cases(device):
    """Runs all cases; raises where a result is not finite."""
    import torch

    import fastmix

    for name, call in cases(device).items():
        with fastmix.backend("triton"):
            results = call()
        if not all(bool(torch.isfinite(t).all()) for t in results):
            raise RuntimeError(f"{name}: not finite")
        print("ran", name, flush=True)


def tool():
    """The path of compute-sanitizer, or None."""
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


def sanitize(budget, script=None):
    """{tool or "without the tool": {"status", "seconds", "summary"}}, yielded anew after each."""
    script = script or [sys.executable, "-m", "fastmix.bench.sanitize", "--cases"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pipes["env"] = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    started, rows = time.monotonic(), {}

    def run(name, command, judge):
        begun, found = time.monotonic(), ("out of time", name)
        try:
            ran = subprocess.run(command, timeout=max(budget - (begun - started), 1), **pipes)
            print(ran.stdout, flush=True)
            found = judge(ran.returncode, ran.stdout)
        except subprocess.TimeoutExpired as expired:
            print((expired.stdout or b"").decode(errors="replace"), flush=True)
        rows[name] = dict(
            zip(("status", "seconds", "summary"), (found[0], round(time.monotonic() - begun, 1), found[1]), strict=True)
        )

    def alone(code, text):
        last = (text.strip().splitlines() or [""])[-1]
        return ("failed", last[:200]) if code else ("passed", "all cases ran")

    run("without the tool", script, alone)
    yield rows
    program = tool()
    if program is None or rows["without the tool"]["status"] != "passed":
        why = "compute-sanitizer is not installed" if program is None else "the cases do not run without it"
        yield rows | {name: {"status": "skipped", "seconds": 0.0, "summary": why} for name in TOOLS}
        return

    def under(name):
        options = [f"--tool={name}", f"--error-exitcode={CODE}", "--print-limit=20", "--target-processes=application-only"]
        run(name, [program, *options, *script], verdict)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in concurrent.futures.as_completed([pool.submit(under, name) for name in TOOLS]):
            done.result()
            yield dict(rows)


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
            pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))
    for name, row in rows.items():
        print(f"{name:<18}{row['status']:<13}{row['seconds']:>7.1f} s  {row['summary']}")
    return int(any(row["status"] == "failed" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
