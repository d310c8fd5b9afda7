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

    def differentiated(out, leaves):
        upstream = torch.rand_like(out)  # not 1: what the forward formed is written anew
        gradients = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        return *gradients, *torch.autograd.grad(out, leaves[:1], torch.ones_like(out))

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
            return out, *differentiated(out, (z, leaf))

        return call

    def rows(shape, dtype=torch.float32, op=fastmix.soft_cross_entropy, leaves=False, **options):
        def call():
            z = torch.randn(shape, device=device).to(dtype).requires_grad_()
            values, lam = torch.rand(shape, device=device).to(dtype), torch.rand(shape[0], device=device)
            lam[:2] = torch.tensor((1.0, 0.0))
            inputs = [z, *((values.requires_grad_(), lam.requires_grad_()) if leaves else ())]
            out = op(z, fastmix.MixedRows(values, lam, torch.randperm(shape[0], device=device)), **options)
            return out, *differentiated(out, inputs)

        return call

    def binary(shape, dtype=torch.float32, K=2, dense=False, weighted=False, **options):
        def call():
            N, C, *inner = shape
            z = torch.randn(shape, device=device).to(dtype).requires_grad_()
            leaf = torch.rand(shape if dense else (N, K, *inner), device=device, requires_grad=True)
            target = leaf if dense else fastmix.SoftTarget(torch.randint(0, C, (N, K, *inner), device=device), leaf)
            weights = {name: torch.rand(C, device=device) for name in ("weight", "pos_weight")} if weighted else {}
            out = fastmix.soft_binary_cross_entropy(z, target, **weights, **options)
            return out, *differentiated(out, (z, leaf))

        return call

    def divergence(shape, dtype=torch.float32, stacked=True, needed=None, **options):
        def call():
            sets = torch.randn(shape, device=device).to(dtype)
            sets = (sets,) if stacked else [t.clone() for t in sets]
            leaves = [t.requires_grad_() for t in sets[:needed]]
            out = fastmix.js_divergence(sets[0] if stacked else sets, **options)
            return out, *differentiated(out, leaves)

        return call

    def combination(shape, K, dtype=torch.float32, stacked=False, channels_last=False, needed=None):
        def call():
            sources = torch.randn(K, *shape, device=device).to(dtype)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            sources = (sources,) if stacked else [t.contiguous(memory_format=layout) for t in sources]
            weights = torch.rand(shape[0], K, device=device)
            weights[:1, :1] = 0
            leaves = [t.requires_grad_() for t in (*sources[:needed], weights)]
            out = fastmix.convex_combination(sources[0] if stacked else sources, weights)
            return out, *torch.autograd.grad(out, leaves, torch.randn_like(out))

        return call

    def masked(shape, cells, dtype=torch.float32, plans=False):
        def call():
            N = shape[0]
            x = torch.randn(shape, device=device).to(dtype).requires_grad_()
            mask = torch.rand(N, *cells, device=device, requires_grad=True)
            blocks = torch.randint(0, cells[0] * cells[1], (2, N, cells[0] * cells[1]), device=device)
            plan, partner_plan = blocks if plans else (None, None)
            index = torch.randperm(N, device=device)
            out = fastmix.mix_masked(x, mask, index, plan=plan, partner_plan=partner_plan)
            return out, *torch.autograd.grad(out, (x, mask), torch.randn_like(out))

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
        "mixed rows": rows((5, 100), brain, label_smoothing=0.1),
        "mixed rows, odd classes": rows((3, 1023), half),
        "mixed rows per pixel": rows((3, 7, 5, 5), reduction="none"),
        "mixed rows beyond a tile": rows((3, 21841)),
        "mixed rows, gradients": rows((5, 33), leaves=True),
        "loss, few rows of many classes": loss((2, 70001), brain, label_smoothing=0.1),
        "binary": binary((5, 16), weighted=True, label_smoothing=0.1),
        "binary, odd classes": binary((3, 1023), brain, class_reduction="sum"),
        "binary, float16": binary((4, 33), half, K=5, reduction="sum"),
        "binary, float64": binary((3, 130), double, weighted=True),
        "binary per pixel": binary((2, 7, 5, 5), brain, weighted=True, reduction="none"),
        "binary, rows of several tiles": binary((2, 21841), brain, weighted=True),
        "binary rows": binary((4, 100), dense=True, label_smoothing=0.1, weighted=True),
        "binary rows per pixel": binary((2, 7, 5, 5), dense=True, reduction="none"),
        "binary rows of several tiles": binary((2, 9001), brain, dense=True),
        "binary, mixed rows": rows((5, 100), brain, fastmix.soft_binary_cross_entropy),
        "binary, mixed rows, gradients": rows((3, 1023), op=fastmix.soft_binary_cross_entropy, leaves=True),
        "divergence": divergence((3, 5, 40)),
        "divergence, odd classes, a sequence": divergence((3, 7, 33), brain, stacked=False, needed=2),
        "divergence, float16": divergence((2, 5, 100), half, reduction="none"),
        "divergence, float64, one class": divergence((4, 3, 1), double, stacked=False),
        "divergence, walked rows": divergence((3, 2, 5001), brain, stacked=False),
        "combination": combination((5, 3, 8, 8), 3),
        "combination, channels_last": combination((5, 3, 8, 8), 4, brain, channels_last=True, needed=2),
        "combination, odd rows, stacked": combination((3, 1101), 2, half, stacked=True),
        "combination, sixteen": combination((3, 5003), 16),
        "mask": masked((5, 3, 8, 8), (4, 2)),
        "mask, odd rows, plans": masked((3, 3, 15, 9), (5, 3), brain, plans=True),
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
