"""The recipes beside digits: what they write and print, that they can be killed, and what they read."""

import importlib.util
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fastmix.recipes import _training, ablation, digits, tabular, text, toy

missing = [name for module, name in _training.NEEDS.items() if importlib.util.find_spec(module) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason="needs scikit-learn, matplotlib and rich")
PNG = b"\x89PNG\r\n\x1a\n"
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_a_temporary_folder(tmp_path, monkeypatch):
    """Calls without --out make their default folder where they are."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trec(tmp_path):
    """Questions of two kinds, each with words of its own."""
    lines = [f"LOC:city where is place{k % 7} number{k % 3} ?\nNUM:count how many thing{k % 5} are there ?" for k in range(40)]
    for name, part in (("train_5500.label", lines), ("TREC_10.label", lines[:10])):
        (tmp_path / name).write_text("\n".join(part) + "\n", encoding="iso-8859-1")
    return tmp_path


@pytest.fixture
def uci(tmp_path):
    """Small tables of the files' formats, two of the six."""
    rng = np.random.default_rng(0)
    abalone = [f"{'MFI'[k % 3]},{','.join(f'{v:.3f}' for v in rng.random(7))},{3 + k % 4}" for k in range(60)]
    (tmp_path / "abalone.data").write_text("Sex,Length,Diam,Ht,WWt,SWt,VWt,Shell,Rings\n" + "\n".join(abalone) + "\n")
    rows = [[*rng.random(5), k % 2] for k in range(50)]
    lines = [
        ",".join("NaN" if (k, j) in {(0, 1), (7, 4)} else f"{v:.4f}" for j, v in enumerate(row)) for k, row in enumerate(rows)
    ]
    (tmp_path / "arrhythmia.data").write_text("\n".join(lines) + "\n")
    return tmp_path


def check(out, text, pictures):
    """What every recipe leaves: JSON, pictures that are named in what it prints, and nothing unfinished."""
    assert sorted(path.name for path in out.iterdir()) == sorted(["results.json", *pictures])
    for picture in pictures:
        content = (out / picture).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 5_000
        assert picture in text
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_gallery(tmp_path, capsys):
    """Weights under each picture are a target's: they sum to 1, of two names."""
    from fastmix.recipes import gallery

    gallery.main(["--device", "cpu", "--out", str(tmp_path / "out")])
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())["labels"]
    for name in gallery.METHODS:
        assert (tmp_path / "out" / f"{name.lower()}.png").read_bytes().startswith(PNG)
    for name in (*gallery.METHODS, "manifold mixup", "AMP", "AugMix"):
        for label in labels[name]:
            assert abs(sum(float(part.split()[0]) for part in label.split(" + ")) - 1) < 0.011
    for name in ("bytes", "segmentation", "extents", "manifold", "adversarial", "augmix_views", "methods"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(PNG)
    assert labels["extents"]["start"] == labels["extents"]["center"]  # the overlap is as large
    assert labels["sentence"] == "0.26 place + 0.74 number"  # six of its seven words are mixed
    assert "Wrote" in capsys.readouterr().out


@pytest.mark.slow
def test_tabular(uci, tmp_path, capsys):
    out = tmp_path / "out"
    tabular.main(["--data", str(uci), "--seeds", "2", "--epochs", "2", "--device", "cpu", "--out", str(out)])
    printed = capsys.readouterr().out
    results = check(out, printed, ["errors.png"])
    assert list(results["tables"]) == ["Abalone", "Arrhythmia", "Iris"]
    assert "left out: Arcene, Htru2, Phishing" in " ".join(printed.split())
    assert "…" not in printed
    for by_features in results["tables"].values():
        assert list(by_features) == ["raw", "scaled"]
        for methods in by_features.values():
            assert list(methods) == list(tabular.METHODS)
            assert [run["seed"] for run in methods["ERM"]] == [0, 1]


def test_tables_are_split_and_filled(uci):
    tables, _ = tabular.load(uci)
    x, y, test_x, test_y, classes = tabular.split(tables["Abalone"], 0, "scaled", "cpu")
    assert (x.shape, test_x.shape, classes) == ((48, 10), (12, 10), 4)
    torch.testing.assert_close(x.mean(0), torch.zeros(10), atol=1e-6, rtol=0)
    assert set(y.tolist()) | set(test_y.tolist()) == {0, 1, 2, 3}
    again = tabular.split(tables["Abalone"], 0, "scaled", "cpu")
    other = tabular.split(tables["Abalone"], 1, "scaled", "cpu")
    assert torch.equal(again[0], x)
    assert not torch.equal(other[0], x)
    x, _, test_x, *_ = tabular.split(tables["Arrhythmia"], 0, "raw", "cpu")
    assert torch.isfinite(x).all()
    assert torch.isfinite(test_x).all()


@pytest.mark.parametrize("name", ["uci", "trec"])
def test_the_published_files(name):
    """Their sizes, where they are at hand."""
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.exists():
        pytest.skip("needs the published data sets")
    if name == "trec":
        x, y, test_x, test_y, _, classes = text.load(folder, torch.device("cpu"))
        assert (x.shape[0], len(y), test_x.shape[0], len(test_y), classes) == (5452, 5452, 500, 500, 6)
        return
    tables, missing = tabular.load(folder)
    assert missing == []
    sizes = {name: tabular.split(table, 0, "raw", "cpu") for name, table in tables.items()}
    found = {name: (len(x) + len(test_x), x.shape[1], classes) for name, (x, _, test_x, _, classes) in sizes.items()}
    assert found == {
        "Abalone": (4177, 10, 28), "Arcene": (200, 10000, 2), "Arrhythmia": (452, 279, 13), "Htru2": (17898, 8, 2),
        "Iris": (150, 4, 3), "Phishing": (11055, 30, 2),
    }  # fmt: skip


@pytest.mark.slow
def test_toy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "RING_EPOCHS", 3)
    monkeypatch.setattr(toy, "PAIRS", 20)
    toy.main(["--seeds", "2", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path / "out")])
    results = check(tmp_path / "out", capsys.readouterr().out, ["surfaces.png", "between.png", "alphas.png", "pair.png"])
    assert results["distance_from_ERM"]["ERM"] == 0
    for runs in results["methods"].values():
        for run in runs:
            assert len(run["miss_percent"]) == len(run["jacobian_norm"]) == toy.SHARES
            assert all(0 <= miss <= 100 for miss in run["miss_percent"])


def test_jacobian_norms_of_a_linear_model():
    """Between any two points of it they are the norm of its weights, and it misses nothing that it knows."""
    x, y = torch.eye(12)[:10].view(10, 1, 3, 4), torch.arange(10)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(10, 12))
    found = toy.between(model, x, y)
    np.testing.assert_allclose(found["jacobian_norm"], 10**0.5, rtol=1e-5)
    assert found["miss_percent"] == [0] * toy.SHARES


@pytest.mark.slow
def test_ablation(tmp_path, capsys):
    ablation.main(["--seeds", "1", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    results = check(tmp_path / "out", printed, ["ablation.png"])
    assert len(results["methods"]) == 2 * len(ablation.METHODS)
    digests = {runs[0]["weights_sha256"] for runs in results["methods"].values()}
    assert len(digests) == 2 * len(ablation.METHODS)  # every one learned something of its own
    assert all(name in printed for name in ablation.METHODS)


@pytest.mark.slow
def test_text(trec, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--data", str(trec), "--seeds", "2", "--epochs", "2", "--fractions", "0.5", "1", "--device", "cpu"]
    text.main([*arguments, "--out", str(out)])
    printed = capsys.readouterr().out
    results = check(out, printed, ["text.png"])
    assert list(results["arms"]) == ["TextCNN, 50 %", "BiLSTM, 50 %", "TextCNN, 100 %", "BiLSTM, 100 %"]
    for arm in results["arms"].values():
        assert list(arm) == list(text.METHODS)
        assert len({run["weights_sha256"] for runs in arm.values() for run in runs}) == 2 * len(text.METHODS)
    assert "AMP's gain over word mixup" in printed
    assert "…" not in printed


@pytest.mark.parametrize("encoder", text.MODELS.values())
def test_padding_changes_nothing(encoder):
    """Not the answer to a question, nor to a mixed one; and words that one of the two has count."""
    torch.manual_seed(0)
    model = text.Classifier(encoder, 20, 3).eval()
    words = torch.tensor([[3, 4, 5, 6, 0, 0, 0], [7, 8, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(model(words), torch.cat([model(words[:1, :4]), model(words[1:, :2])]), atol=1e-5, rtol=1e-4)
    lam, index = torch.tensor([0.5, 0.5]), torch.tensor([1, 0])
    with _training.fastmix.mix_hidden(model.encoder, lam, index, **text.WORDS):
        mixed = model(words)
    torch.testing.assert_close(mixed[0], mixed[1], atol=1e-5, rtol=1e-4)


def test_bad_calls(tmp_path, capsys):
    for recipe, arguments, words in (
        (text, ["--data", str(tmp_path)], "TREC_10.label"),
        (text, ["--data", str(tmp_path), "--fractions", "0"], "--fractions: expected numbers in (0, 1]"),
        (tabular, ["--data", str(tmp_path), "--tables", "Htru2"], "--data: expected a folder with the UCI files"),
        (ablation, ["--epochs", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            recipe.main(arguments)
        assert stopped.value.code == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_tables_as_their_source_has_them(uci):
    """Without a line of names, or behind ARFF's."""
    names, *rows = (uci / "abalone.data").read_text().split("\n")
    expected = tabular.abalone(uci)
    (uci / "abalone.data").write_text("\n".join(rows))
    assert all(map(np.array_equal, tabular.abalone(uci), expected))
    (uci / "phishing.arff").write_text("@relation p\n@attribute a {-1,1}\n@data\n\n% note\n" + "-1,0,1\n" * 6)
    assert tabular.TABLES["Phishing"](uci)[0].tolist() == [[-1, 0]] * 6


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("abalone.data", "M,1,2\nF,3\n", "--data: Abalone"),
        ("arrhythmia.data", "1,2,NaN\n" * 9, "Arrhythmia: expected a class for each"),
        ("arrhythmia.data", "", "Arrhythmia"),
    ],
)
def test_tables_that_are_none(uci, tmp_path, capsys, file, content, words):
    (uci / file).write_text(content)
    with pytest.raises(SystemExit):
        tabular.main(["--data", str(uci), "--out", str(tmp_path / "out")])
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("train_5500.label", "LOC:city\n", "line 1: expected 'COARSE:fine words"),
        ("train_5500.label", "LOC where is it ?\n", "line 1"),
        ("TREC_10.label", "\n", "expected questions, got none"),
        ("TREC_10.label", "HUM:x who ?\n", "does not have: HUM"),
    ],
)
def test_questions_that_are_none(trec, tmp_path, capsys, file, content, words):
    (trec / file).write_text(content)
    with pytest.raises(SystemExit):
        text.main(["--data", str(trec), "--out", str(tmp_path / "out")])
    assert words in " ".join(capsys.readouterr().err.split())


def test_devices_and_folders_that_cannot_be_used(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["--device", "nonsense"], "cannot be used here"),
        (["--out", str(tmp_path / "file")], "--out: cannot"),
    ):
        with pytest.raises(SystemExit) as stopped:
            digits.main(arguments)
        assert stopped.value.code == 2
        assert words in " ".join(capsys.readouterr().err.split())


def runs(folder, data=(), **settings):
    from rich.console import Console

    return _training.Runs(folder, {"recipe": "digits", "epochs": 3, "device": "cpu", **settings}, 1, Console(quiet=True), data)


def test_an_unfinished_call_is_gone_on_with_alone(tmp_path):
    """By one call at a time, with the same settings and the same data."""
    first = runs(tmp_path, [torch.ones(3)])
    with pytest.raises(SystemExit, match="in use by another call"):
        runs(tmp_path, [torch.ones(3)])
    first._alone.close()
    for change, words in (({"data": [torch.zeros(3)]}, "data"), ({"data": [torch.ones(3)], "epochs": 4}, "epochs")):
        with pytest.raises(SystemExit, match=rf"unfinished call with other settings \({words}\)"):
            runs(tmp_path, **change)
    runs(tmp_path, [torch.ones(3)])._alone.close()
    (tmp_path / "unfinished" / "settings.json").write_text("{")
    with pytest.raises(SystemExit, match="other settings"):
        runs(tmp_path, [torch.ones(3)])


def test_half_a_checkpoint_is_none(tmp_path):
    path = tmp_path / "x.pt"
    assert _training.loaded(path, "cpu") is None
    _training.save(path, {"a": torch.ones(3)})
    assert torch.equal(_training.loaded(path, "cpu")["a"], torch.ones(3))
    path.write_bytes(path.read_bytes()[:100])
    assert _training.loaded(path, "cpu") is None
    assert not path.exists()


CALLS = """
import os, sys, torch
from fastmix.recipes import _training, text
_training.SAVE_SECONDS = 0.0  # a checkpoint after every epoch
with _training.repeatable(0, torch.device("cpu")):  # imports torch's compiler
    import matplotlib.figure, matplotlib.backends.backend_agg
for out in sys.stdin:  # a call each, in a process of its own, which need not import anything
    child = os.fork()
    if not child:
        status = 1
        try:
            text.main([*sys.argv[1:], "--out", out.strip()])
            sys.stdout.flush()
            status = 0
        finally:
            os._exit(status)
    print(child, flush=True)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(trec, tmp_path):
    """Every method, samplers, dropout, Adam and the adversary: killed until it gets through."""
    arguments = ["--data", str(trec), "--seeds", "1", "--epochs", "4", "--fractions", "1", "--device", "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    calls = subprocess.Popen([sys.executable, "-c", CALLS, *arguments], cwd=ROOT, **pipes)

    def start(out):
        calls.stdin.write(f"{out}\n")
        calls.stdin.flush()
        return int(calls.stdout.readline())

    def end():
        """Returns (the exit status, what was printed)."""
        printed = []
        for line in calls.stdout:
            if line.startswith("status "):
                return int(line.split()[1]), "".join(printed)
            printed.append(line)
        raise AssertionError("the process that makes the calls has ended")

    def runs(child):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return False
        return True

    start(tmp_path / "whole")
    assert end()[0] == 0
    draw, out = random.Random(0), tmp_path / "killed"
    for _ in range(2):
        started = time.monotonic()
        # once there is something to go on from, some moment later
        there = lambda: len(list(out.glob("unfinished/*.pt")))  # noqa: E731
        before = there()
        child = start(out)
        while runs(child) and there() <= before and time.monotonic() - started < 60:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        assert runs(child)
        os.kill(child, signal.SIGKILL)
        assert end()[0] == signal.SIGKILL
    start(out)
    status, printed = end()
    calls.communicate()
    assert (status, calls.returncode) == (0, 0)
    assert "Going on with an interrupted call" in printed
    assert (out / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert not (out / "unfinished").exists()


@pytest.mark.slow
def test_a_run_goes_on_from_any_epoch(tmp_path):
    """What a checkpoint of digits holds is enough, for every method there is."""
    data = digits.load(torch.device("cpu"))
    for name, objective in digits.METHODS.items():
        with _training.repeatable(3, torch.device("cpu")):
            fit = digits.fit(objective, 3, 4, data)
            for _ in range(2):
                fit.epoch()
            torch.save(fit.state(), tmp_path / "state.pt")
            for _ in range(2):
                fit.epoch()
            straight = fit.result()
        with _training.repeatable(3, torch.device("cpu")):
            fit = digits.fit(objective, 3, 4, data)
            torch.rand(7)
            fit.load(torch.load(tmp_path / "state.pt", weights_only=True))
            for _ in range(2):
                fit.epoch()
        assert fit.result() == straight, name
