"""What every kernel costs, from its compiled code alone: no GPU is needed.

    python -m fastmix.bench.static [--arch 90 ...] [--json FILE]

The launchers themselves are run on CPU tensors while Triton compiles, for an architecture that need not be there, exactly the
specialisation that each launch asks for, and nothing is launched. Registers, spilled bytes and shared memory come from the
binary's resource report; access widths are counted in the assembly text, loop bodies once.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)  # a real compiler is wanted, whatever else this process is part of

import torch  # noqa: E402
import triton.backends.nvidia as nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastmix.kernels import api  # noqa: E402

ARCHES = ("80", "90", "100", "gfx942")
_TOOLS = os.path.join(os.path.dirname(nvidia.__file__), "bin")


class _Target:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, arch):
        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(self.target)  # Triton keeps compiled kernels by device

    def get_current_stream(self, device=None):
        return 0


def _cost(compiled):
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        counted = re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_\w+", text)

        def value(key):
            return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

        spills = 4 * 64 * value("vgpr_spill_count") + 4 * value("sgpr_spill_count")
        registers, shared = value("vgpr_count"), value("group_segment_fixed_size")
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = subprocess.run(
                [os.path.join(_TOOLS, "cuobjdump"), "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout

        def value(key):
            return int(re.search(rf"{key}:(\d+)", text).group(1))

        counted = re.findall(r"\b(?:ld|st)\.global[.\w]*", compiled.asm["ptx"])
        registers, spills, shared = value("REG"), value("STACK"), value("SHARED")
    return {
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": shared,
        "warps": compiled.metadata.num_warps,
        "accesses": dict(collections.Counter(counted)),
    }


def compile_launches(arch, call):
    """Calls a launcher and returns [(kernel name, cost)] for what it would have launched on this architecture."""
    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if hasattr(compiled, "result"):  # newer Tritons may compile in the background
            compiled = compiled.result()
        launched.append((self.__name__, _cost(compiled)))

    JITFunction.run = compile_only
    before = driver.active if _has_gpu() else None
    driver.set_active(_Target(arch))
    try:
        call()
    finally:
        JITFunction.run = run
        if before is not None:
            driver.set_active(before)
    return launched


def _has_gpu():
    return torch.cuda.is_available()


def _mix(shape, dtype, *, channels_last=False, box=0, backward=False):
    def call():
        x = torch.empty(shape, dtype=dtype)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        index, lam = torch.arange(shape[0]), torch.zeros(shape[0], dtype=api.accumulator(dtype))
        boxes = torch.zeros((shape[0], 2 * box), dtype=torch.int64) if box else None
        if backward:
            api.mix_bwd(x, x, lam, index, boxes, x.stride(), True, True)
        else:
            api.mix_fwd(x, lam, index, boxes, None)

    return call


def _soft_ce(shape, dtype, *, K=2, smoothing=0.0, weighted=False, backward=False):
    def call():
        z = torch.empty(shape, dtype=dtype)
        accumulator = api.accumulator(dtype)
        classes, weights = torch.zeros((shape[0], K, *shape[2:]), dtype=torch.int64), torch.zeros(shape[0], K)
        class_weight = torch.zeros(shape[1], dtype=accumulator) if weighted else None
        mass = torch.ones((), dtype=accumulator)
        rows = shape[0] * torch.Size(shape[2:]).numel()
        if backward:
            stats = torch.empty(3, rows, dtype=accumulator)
            api.soft_ce_bwd(z, classes, weights, class_weight, -100, smoothing, mass, (stats,), mass, None)
            api.soft_ce_bwd(z, classes, weights, class_weight, -100, smoothing, mass, (stats,), mass, torch.empty_like(z))
        else:
            api.soft_ce_fwd(z, classes, weights, class_weight, -100, smoothing, "mean", True, True)

    return call


def _dense_ce(shape, dtype, *, smoothing=0.0, backward=False):
    def call():
        z, t = torch.empty(shape, dtype=dtype), torch.empty(shape)
        accumulator = api.accumulator(dtype)
        if backward:
            stats = torch.empty(3, shape[0], dtype=accumulator)
            api.dense_ce_bwd(z, t, None, -100, smoothing, "mean", (stats,), torch.ones((), dtype=accumulator), None, True, True)
        else:
            api.dense_ce_fwd(z, t, None, -100, smoothing, "mean", True)

    return call


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES = {
    "mix [64, 3, 224, 224] float32": _mix((64, 3, 224, 224), F32),
    "mix [64, 3, 224, 224] bfloat16 channels_last": _mix((64, 3, 224, 224), BF16, channels_last=True),
    "mix [64, 3, 225, 225] bfloat16": _mix((64, 3, 225, 225), BF16),
    "mix [64, 300] float64": _mix((64, 300), F64),
    "mix box [64, 3, 224, 224] float32": _mix((64, 3, 224, 224), F32, box=2),
    "mix backward [64, 3, 224, 224] float32": _mix((64, 3, 224, 224), F32, backward=True),
    "mix backward [64, 196, 768] bfloat16": _mix((64, 196, 768), BF16, backward=True),
    "mix backward box [64, 3, 224, 224] float32": _mix((64, 3, 224, 224), F32, box=2, backward=True),
    "soft_ce [128, 10] float32": _soft_ce((128, 10), F32),
    "soft_ce [4096, 1000] bfloat16": _soft_ce((4096, 1000), BF16),
    "soft_ce [4096, 1000] float32 smoothing, weights": _soft_ce((4096, 1000), F32, smoothing=0.1, weighted=True),
    "soft_ce [64, 21841] bfloat16": _soft_ce((64, 21841), BF16),
    "soft_ce [64, 32768] bfloat16": _soft_ce((64, 32768), BF16),
    "soft_ce [64, 32768] bfloat16 smoothing, weights": _soft_ce((64, 32768), BF16, smoothing=0.1, weighted=True),
    "soft_ce [64, 32768] float16 K=5": _soft_ce((64, 32768), F16, K=5),
    "soft_ce [64, 16384] float32 smoothing": _soft_ce((64, 16384), F32, smoothing=0.1),
    "soft_ce [64, 32768] float32 smoothing, weights": _soft_ce((64, 32768), F32, smoothing=0.1, weighted=True),
    "soft_ce [64, 21841] float32 smoothing, weights": _soft_ce((64, 21841), F32, smoothing=0.1, weighted=True),
    "soft_ce [16, 8192] float64 smoothing": _soft_ce((16, 8192), F64, smoothing=0.1),
    "soft_ce [16, 8191] float64 smoothing, weights": _soft_ce((16, 8191), F64, smoothing=0.1, weighted=True),
    "soft_ce [16, 131072] bfloat16": _soft_ce((16, 131072), BF16),
    "soft_ce [2, 150, 64, 64] bfloat16": _soft_ce((2, 150, 64, 64), BF16),
    "soft_ce [2, 19, 64, 64] float32 smoothing, weights": _soft_ce((2, 19, 64, 64), F32, smoothing=0.1, weighted=True),
    "soft_ce backward [4096, 1000] float16": _soft_ce((4096, 1000), F16, backward=True),
    "soft_ce backward [64, 32768] float32": _soft_ce((64, 32768), F32, smoothing=0.1, backward=True),
    "dense_ce [4096, 1000] bfloat16": _dense_ce((4096, 1000), BF16),
    "dense_ce [64, 16384] float32": _dense_ce((64, 16384), F32, smoothing=0.1),
    "dense_ce [64, 21841] float32": _dense_ce((64, 21841), F32),
    "dense_ce [64, 16384] bfloat16": _dense_ce((64, 16384), BF16, smoothing=0.1),
    "dense_ce [16, 16384] float64": _dense_ce((16, 16384), F64),
    "dense_ce [2, 19, 64, 64] float32": _dense_ce((2, 19, 64, 64), F32),
    "dense_ce backward [4096, 1000] float16": _dense_ce((4096, 1000), F16, backward=True),
}


def report(arches=ARCHES, cases=tuple(CASES)):
    """Rows of kernel, case, arch and cost."""
    for arch in arches:
        for case in cases:
            for kernel, cost in compile_launches(arch, CASES[case]):
                yield {"arch": arch, "case": case, "kernel": kernel, **cost}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHES, help=f"of {', '.join(ARCHES)} (default: all)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args()
    rows = []
    for row in report(options.arch, [case for case in CASES if options.case in case]):
        rows.append(row)
        widths = ", ".join(f"{count} {name}" for name, count in sorted(row["accesses"].items()))
        print(
            f"{row['arch']:>6}  {row['case']:<50} {row['kernel']:<22} {row['registers']:>3} registers "
            f"{row['spill_bytes']:>4} spilled  {row['shared_bytes']:>6} shared  {row['warps']:>2} warps  {widths}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    return 1 if any(row["spill_bytes"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
