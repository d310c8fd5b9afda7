"""`python -m fastmix`: what runs where, and a check of every op."""

import json
import os
import subprocess
import sys

import pytest
import torch

import fastmix
from fastmix import __main__ as command
from fastmix.bench import gpu, ops


@pytest.mark.slow
def test_what_runs_here_as_json(tmp_path):
    """From another folder, as a bug report has it, and without what only tests and recipes use."""
    for name in ("rich", "matplotlib", "sklearn", "scipy", "pytest", "hypothesis", "PIL"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    environment = {**gpu._environment(), "CUDA_VISIBLE_DEVICES": "", "FASTMIX_BACKEND": "torch"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "fastmix", "--json"], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["fastmix"], found["torch"]) == (fastmix.__version__, torch.__version__)
    assert found["environment"] == {"FASTMIX_BACKEND": "torch"}
    assert [(row["device"], row["backend"]) for row in found["devices"]] == [("cpu", "torch")]
    assert {row["op"] for row in found["checks"]} == {op.name for op in ops.ENTRIES.values() if op.hard}
    assert all(row["ok"] for row in found["checks"])


@pytest.mark.no_poison
def test_a_wrong_result_is_told(monkeypatch, capsys):
    right = fastmix.mix
    monkeypatch.setattr(fastmix, "mix", lambda *args, **options: right(*args, **options) * 1.001)
    assert command.main([]) == 1
    said = capsys.readouterr().out
    wrong = [line.split()[0] for line in said.splitlines() if line.endswith("WRONG")]
    assert "mix" in wrong
    assert set(wrong) <= {"mix", "adversarial_mixing_loss"}  # the second mixes too
    assert f"{len(wrong)} wrong of" in said
    assert f"fastmix {fastmix.__version__}" in said


def test_a_backend_that_cannot_run_is_told_and_why(monkeypatch):
    monkeypatch.setattr(command._backend, "name", lambda device: (_ for _ in ()).throw(RuntimeError("no compiler")))
    row = command.devices()[0]
    assert (row["device"], row["backend"], row["why"]) == ("cpu", None, "no compiler")
