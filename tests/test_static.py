"""Every kernel, compiled for GPUs that are not there: nothing spills, and accesses are 16 bytes wide where shapes allow."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import NO_TRITON, TRITON

ROOT = pathlib.Path(__file__).parent.parent
ARCHES = ("80", "90", "100", "gfx942")
# Shapes whose rows 16 bytes do not divide, and kernels of single numbers; boxes select elements one by one.
NARROW = ("225", "21841", "[128, 10]", "64, 64]", "box", "8191")


@pytest.fixture(scope="module", params=ARCHES)
def costs(request, tmp_path_factory):
    if not TRITON:
        pytest.skip(NO_TRITON)
    path = tmp_path_factory.mktemp("static") / "costs.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "fastmix.bench.static", "--arch", request.param, "--json", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert path.exists(), ran.stderr
    return json.loads(path.read_text())


def test_every_kernel_is_compiled(costs):
    kernels = set()
    for path in (ROOT / "kernels").glob("*.py"):
        kernels |= {
            line.split("(")[0][4:] for line in path.read_text().splitlines() if line.startswith("def _") and "_kernel(" in line
        }
    assert {row["kernel"] for row in costs} == kernels
    assert len(kernels) >= 7


def test_nothing_spills(costs):
    assert [row for row in costs if row["spill_bytes"]] == []


def test_wide_accesses(costs):
    """Tensors are read and written 16 bytes at a time on NVIDIA; what is narrower is a number per row or a label."""
    for row in costs:
        if row["arch"].startswith("gfx") or any(part in row["case"] for part in NARROW) or row["kernel"] == "_mass_kernel":
            continue
        wide = dict.fromkeys(("ld", "st"), 0)
        for name, count in row["accesses"].items():
            if ".v4.b32" in name or ".v2.b64" in name:
                wide[name[:2]] += count
        assert wide["ld"], row
        assert wide["st"], row
        assert not any(name.startswith("st") and name.endswith("b16") for name in row["accesses"]), row
