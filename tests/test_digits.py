"""The digits recipe: what it writes and prints, and that a second run gives the same bits."""

import importlib.util
import json

import pytest
import torch
from numerics import RELATIVE

from fastmix.recipes import digits

missing = [name for module, name in digits.NEEDS.items() if importlib.util.find_spec(module) is None]
needs_packages = pytest.mark.skipif(bool(missing), reason="needs scikit-learn, matplotlib and rich")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path, monkeypatch):
    """Calls without --out make their default folder where they are."""
    monkeypatch.chdir(tmp_path)


def run(out, capsys):
    digits.main(["--epochs", "2", "--seeds", "2", "--device", "cpu", "--out", str(out)])
    return capsys.readouterr().out


@pytest.mark.slow
@needs_packages
def test_two_runs_give_the_same_bits(tmp_path, capsys):
    before = torch.get_rng_state(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    text = run(tmp_path / "first", capsys)
    torch.rand(3)
    run(tmp_path / "second" / "deeper", capsys)
    after = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    assert after == before[1:]

    first, second = ((tmp_path / name / "results.json").read_bytes() for name in ("first", "second/deeper"))
    assert first == second
    results = json.loads(first)
    assert list(results["methods"]) == list(digits.METHODS)
    for runs in results["methods"].values():
        assert [one["seed"] for one in runs] == [0, 1]
        assert runs[0]["weights_sha256"] != runs[1]["weights_sha256"]
        assert all(one["test_error_percent by epoch"][1:] == [one["test_error_percent"]] for one in runs)
    for what, sizes in results["agreement"].items():
        assert sizes["fastmix_error"] <= RELATIVE[torch.float32] * max(1, sizes["max_abs_value"]), what

    timings = json.loads((tmp_path / "first" / "timings.json").read_text())
    assert all(row["fastmix"] > 0 and row["torch"] > 0 for row in timings["seconds_per_call"])
    for picture in "mixed.png", "error.png":
        content = (tmp_path / "first" / picture).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000
        assert picture in text
    for name in digits.METHODS:
        assert any(line.strip().startswith(f"{name} ") for line in text.splitlines())
    assert len(text.splitlines()) < 60  # no progress bar where there is no terminal, but a line for each seed
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("Training")] == [
        f"Training with seed {seed} ({seed + 1} of 2)" for seed in (0, 1)
    ]


@needs_packages
def test_training_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    with digits.repeatable(0, torch.device("cpu")):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(digits.NEEDS, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit):
        digits.main([])
    message = capsys.readouterr().err
    assert "no-such-package" in message
    assert 'pip install "fastmix[recipes]"' in message


def test_a_useless_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        digits.main(["--seeds", "0"])
    assert "at least 1" in capsys.readouterr().err
