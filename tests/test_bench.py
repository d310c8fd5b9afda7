"""The benchmark: every way answers as the oracle does, wrong ways are found, figures are what they say, and its commands run."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from conftest import INTERPRETER, NO_GPU, NO_INTERPRETER, NO_TRITON, TRITON

import fastmix
from fastmix.bench import (
    __main__,
    bench_adversarial,
    bench_batches,
    bench_host,
    bench_images,
    bench_ops,
    bench_steps,
    gpu,
    peers,
    plots,
    report,
    results,
    run,
    timing,
)
from fastmix.bench import conftest as measuring
from fastmix.bench.case import BACKWARD, BF16, BOTH, F16, F32, FORMING, FORWARD, Refilled, close

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
SUITES = bench_batches, bench_images, bench_steps, bench_adversarial, bench_host
CASES = [case for table in (bench_ops.LAPTOP, bench_ops.ALL) for cases in table.values() for case in cases]
CASES += [case for suite in SUITES for case in (*suite.LAPTOP, *suite.ALL)]
SMALL = [bench_ops.mix((9, 3, 8, 8), dtype, mode) for dtype in (F32, BF16) for mode in (FORWARD, BACKWARD, BOTH)]
SMALL += [bench_ops.mix((9, 3, 8, 8), dtype, BOTH, lam_gradient=True) for dtype in (F32, BF16)]
SMALL += [
    bench_ops.combine((9, 3, 8, 8), dtype, K, mode, weights_gradient=weights)
    for dtype in (F32, BF16)
    for K, mode, weights in ((4, FORWARD, False), (4, BOTH, False), (4, BOTH, True), (16, FORWARD, False), (16, BACKWARD, True))
]
CASES = list({case.group: case for case in (*CASES, *SMALL)}.values())
pytestmark = pytest.mark.no_poison


def ways():
    """The ways of each question, of one size each, the smallest: a way is the same for all sizes (a loss for all of as many
    dimensions), and compiled ways take long."""
    questions = {}
    for case in sorted(CASES, key=lambda case: math.prod(case.shape)):
        for name in case.ways:
            if "compiled" not in name and "compiled" not in case.title:
                sizes = questions.setdefault((case.suite, case.title), {})
                sizes.setdefault(("entropy" in case.suite and len(case.shape), case.dtype, name), (case, name))
    for (suite, title), found in questions.items():
        yield pytest.param(list(found.values()), id=f"{suite}, {title}")


@pytest.mark.slow
@pytest.mark.parametrize("question", list(ways()))
def test_ways_answer_as_the_oracle_does(question):
    there = [(case, name) for case, name in question if case.ways[name] is not None]
    for case, name in there:
        case.compare(name, CPU)
    assert {peers.needed(name) for case, name in question if (case, name) not in there} <= set(peers.MISSING)
    assert any(name == "fastmix" for _, name in there) or "BinaryCrossEntropy" in there[0][0].title


@pytest.mark.parametrize("library", ["timm", "torchvision", "liger-kernel", "torch.compile"])
def test_the_ways_of_a_library_are_compared(library):
    """A library that is not here is a skip that is counted, since its ways are left out above."""
    if library in peers.MISSING:
        reason = "needs a C++ compiler" if library == "torch.compile" else f"needs {library}"
        pytest.skip(reason + " and a GPU" * (library == "liger-kernel"))
    assert library in {*peers.NEEDS.values(), "torch.compile"}


def test_liger_answers_too(monkeypatch):
    """Its kernels run in the interpreter as well; the comparison has it on a GPU."""
    if not INTERPRETER:
        pytest.skip(NO_INTERPRETER if TRITON else NO_TRITON)
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs liger-kernel")
    monkeypatch.setattr(peers, "liger", importlib.import_module("liger_kernel.transformers.functional"))
    for upstream in (1.0, 0.5):
        doctored(bench_ops.loss((8, 10), F32, upstream=upstream), Liger=peers.two_liger).compare("Liger", CPU)
        doctored(bench_ops.hard_loss((8, 10), F32, upstream=upstream), Liger=peers.hard_liger).compare("Liger", CPU)


def doctored(case, **ways):
    """A case with other ways in it."""
    return dataclasses.replace(case, ways=ways)


def spotted(case, name="fastmix"):
    """The check of what is timed."""
    inputs = case.inputs(CPU)
    setup, call = case.call(name, inputs)
    case.compare_timed(name, inputs, call(*setup()))


MODES = FORWARD, BACKWARD, BOTH
LARGE = [
    *(bench_ops.mix((9, 3, 8, 8), dtype, mode) for dtype in (F32, BF16) for mode in MODES),
    bench_ops.mix((9, 3, 8, 8), F32, out=True),
    bench_ops.mix((9, 3, 8, 8), F16, BOTH, lam_gradient=True),
    bench_ops.cut((9, 3, 8, 8), F32),
    bench_ops.masked((9, 3, 8, 8), F32, (4, 2), BOTH, mask_gradient=True),
    bench_ops.combine((9, 3, 8, 8), F32, 3, BOTH, weights_gradient=True),
    *(bench_ops.loss((9, 11), dtype, mode) for dtype in (F32, BF16, F16) for mode in (*MODES, FORMING)),
    bench_ops.loss((9, 11), F32, lam_gradient=True, upstream=0.5),
    bench_ops.loss((5, 4, 9, 10), BF16, upstream=3.0),
    bench_ops.hard_loss((9, 11), F32),
    *(bench_ops.binary_loss((9, 11), dtype, mode) for dtype in (F32, BF16) for mode in (FORWARD, BOTH)),
    bench_ops.binary_loss((9, 11), F32, lam_gradient=True, upstream=0.5),
    bench_ops.divergence((9, 11), F32, upstream=12.0),
]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.group)
def test_what_is_timed_is_looked_at(case):
    """Rows of the timed call's own results: right ones pass, and a way that is wrong only in large batches does not."""
    for name in case.ways:
        if case.ways[name] is not None and "compiled" not in name:
            spotted(case, name)
    way = case.ways["fastmix"]

    def wrong(first, *arguments):
        if first.requires_grad and case.op == "convex_combination":
            arguments = arguments[:-1] + (arguments[-1] * torch.linspace(1, 0, len(first)).unsqueeze(1),)
        kept = (torch.arange(len(first)) < len(first) // 2).to(first.dtype)
        return way(first * kept.view(-1, *[1] * (first.dim() - 1)), *arguments)

    with pytest.raises(AssertionError, match="wrong by"):
        spotted(doctored(case, fastmix=wrong))


def test_what_overwrites_its_input_is_filled_anew():
    def greedy(logits, y):
        loss = torch.nn.functional.cross_entropy(logits.clone(), y)
        with torch.no_grad():
            logits.zero_()
        return loss

    for mode in MODES:
        case = doctored(bench_ops.hard_loss((8, 5), F32, mode), fastmix=Refilled(greedy))
        case.compare("fastmix", CPU)
        inputs = case.inputs(CPU)
        before = inputs.logits.clone()
        setup, call = case.call("fastmix", inputs)
        first, second = (call(*setup()) for _ in range(2))
        first, second = ((r,) if isinstance(r, torch.Tensor) else r for r in (first, second))
        assert all(map(torch.equal, first, second))
        assert torch.equal(inputs.logits, before)


WRONG = {
    "lambda the wrong way round": lambda x, lam, index: fastmix.mix(x, 1 - lam, index),
    "another partner": lambda x, lam, index: fastmix.mix(x, lam, index.roll(1)),
    "one channel": lambda x, lam, index: (
        fastmix.mix(x, lam, index) + 0.03 * torch.eye(x.shape[1], dtype=x.dtype)[0, :, None, None]
    ),
    "another lambda": lambda x, lam, index: fastmix.mix(x, lam + 0.01, index),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_mixing_is_found(wrong, dtype):
    for mode in (FORWARD, BOTH):
        case = doctored(bench_ops.mix((6, 3, 8, 8), dtype, mode), fastmix=WRONG[wrong])
        with pytest.raises(AssertionError, match="wrong by"):
            case.compare("fastmix", CPU)


def test_wrong_gradients_are_found():
    def half(x, lam, index):
        out = fastmix.mix(x, lam, index)
        return out.detach() + 0.5 * (out - out.detach())

    for lam in (False, True):
        case = doctored(bench_ops.mix((6, 3, 8, 8), F32, BACKWARD, lam_gradient=lam), fastmix=half)
        with pytest.raises(AssertionError, match="wrong by"):
            case.compare("fastmix", CPU)

    def detached(logits, y, lam, index):
        return bench_ops.mixed_loss(logits, y, lam.detach() + 0 * lam, index)

    case = doctored(bench_ops.loss((8, 5), F32, lam_gradient=True), fastmix=detached)
    with pytest.raises(AssertionError, match="wrong by"):
        case.compare("fastmix", CPU)


def test_wrong_losses_are_found():
    def truncated(logits, y, lam, index):  # as facebookresearch/mixup-cifar10#8
        return peers.two_losses(logits, y, lam.to(y.dtype), index)

    for wrong in (truncated, lambda z, y, lam, index: bench_ops.mixed_loss(z, y, 1 - lam, index)):
        with pytest.raises(AssertionError, match="wrong by"):
            doctored(bench_ops.loss((8, 5), F32), fastmix=wrong).compare("fastmix", CPU)


BATCHES = {  # from (x, y) and what a right sampler made of them
    "targets of other rows": lambda x, y, mixed, target: (mixed, fastmix.SoftTarget(target.classes.roll(1, 0), target.weights)),
    "shares the wrong way round": lambda x, y, mixed, target: (
        mixed,
        fastmix.SoftTarget(target.classes, target.weights.flip(1)),
    ),
    "images not mixed": lambda x, y, mixed, target: (x, target),
    "images of other rows": lambda x, y, mixed, target: (mixed.roll(1, 0), target),
}


@pytest.mark.parametrize("kind", [fastmix.Mixup, fastmix.CutMix])
@pytest.mark.parametrize("wrong", BATCHES)
def test_wrong_batches_are_found(kind, wrong):
    sampler = kind(1.0, partner="flip", seed=3)
    bench_batches.compare(sampler, "fastmix", (8, 3, 9, 9), CPU)

    def way(x, y):
        return BATCHES[wrong](x, y, *sampler(x, y))

    with pytest.raises(AssertionError):
        bench_batches.compare(way, "fastmix", (8, 3, 9, 9), CPU)


def test_boxes_are_read_off():
    x, y = torch.randn(8, 3, 7, 9), torch.arange(8)
    index = y.flip(0)
    box = torch.tensor(
        [[0, 0, 7, 9], [1, 2, 4, 9], [0, 0, 0, 0], [6, 8, 7, 9], [2, 2, 3, 3], [0, 1, 7, 8], [0, 0, 1, 9], [3, 0, 7, 1]]
    )
    mix = fastmix.Mix(torch.ones(8), index, box=box)
    lam, read, share = bench_batches.read_off(mix.apply(x), mix.target(y), x, index, 8)
    assert torch.equal(read, box)
    assert torch.equal(lam, torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(share.float(), mix.target_lam)


def test_close_measures_by_rows():
    close(torch.tensor([[1.0, 0.0], [1e6, 1.0]]), [[1.0, 0.0], [1e6, 0.0]], None, 2e-6)
    for actual, expected in (([[1.0, 1e-5]], [[1.0, 0.0]]), ([[float("nan"), 1.0]], [[1.0, 1.0]])):
        with pytest.raises(AssertionError):
            close(torch.tensor(actual), expected, None, 2e-6)
    with pytest.raises(AssertionError, match="shape"):
        close(torch.zeros(2), [0.0], 1.0, 1.0)


def test_bytes_are_the_floor():
    """x read and the result written; backwards as much again; x once more for lambda's gradient; a loss reads and writes logits."""
    x = 6 * 3 * 8 * 8 * 2
    for (mode, lam), times in {
        (FORWARD, False): 2,
        (BOTH, False): 4,
        (BOTH, True): 5,
    }.items():
        assert bench_ops.mix((6, 3, 8, 8), BF16, mode, lam_gradient=lam).moved == times * x
    assert bench_ops.loss((7, 11), F32).moved == 2 * 7 * 11 * 4
    assert bench_ops.loss((7, 11), F32, "forward").moved == 7 * 11 * 4


def test_peak_memory_on_a_cpu():
    x, index = torch.randn(64, 5000), torch.arange(64).flip(0)

    def peak(call):
        return timing.peak_bytes(call, CPU) / x.nbytes

    assert peak(lambda: x.clone()) == pytest.approx(1, abs=0.01)
    assert peak(lambda: (x.clone(), x.clone())[1]) == pytest.approx(2, abs=0.01)
    assert peak(lambda: [x + 1 for _ in range(3)][0].sum()) == pytest.approx(3, abs=0.01)
    assert peak(lambda: x.sum()) < 0.01
    assert peak(lambda: peers.mixup_cifar10(x, 0.3, index)) == pytest.approx(3, abs=0.01)
    assert peak(lambda: fastmix.mix(x, 0.3, index)) == pytest.approx(1, abs=0.05)


def test_clocks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 2.0

    assert timing.seconds(call, CPU) == 2.0
    assert timing.host_seconds(call, CPU, calls=5) == 2.0
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 10)
    monkeypatch.setattr(timing, "seconds", lambda call, device: 0.5)
    assert timing.copy_speed(CPU) == 4096  # read and written


def test_nothing_else_is_under_way_when_the_clock_starts(monkeypatch):
    """What was issued before, a backward's own forward, is not on the clock: the device is waited for before and after."""
    now, queue = [0.0], [10.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def synchronize(device):
        now[0] += sum(queue)
        queue.clear()

    monkeypatch.setattr(timing, "synchronize", synchronize)
    assert timing.seconds(lambda: queue.append(1.0), CPU) == 1.0


def test_figures_of_a_device(monkeypatch):
    """The ratio is of the device's own times; graphs are for groups that are short by what they move, whichever way it is."""
    times = {"fastmix": 2e-5, "two hard losses": 5e-5}
    monkeypatch.setattr(timing, "device_seconds", lambda prepare, device: times[prepare()])
    monkeypatch.setattr(timing, "host_seconds", lambda call, device, calls: float(calls))
    monkeypatch.setattr(timing, "graph_seconds", lambda call: 1e-5)
    case = bench_ops.loss((128, 10), BF16)
    result = {"copy GB/s": 4000.0, "rows": []}
    ours = measuring._on_device(case, "fastmix", lambda: "fastmix", result, CPU)
    assert ours == {"device seconds": 2e-5, "host seconds": 30.0, "graph seconds": 1e-5, "device time / fastmix": 1.0}
    result["rows"].append({"group": case.group, "way": "fastmix", **ours})
    other = measuring._on_device(case, "two hard losses", lambda: "two hard losses", result, CPU)
    assert other["device time / fastmix"] == 2.5
    assert results.ratio_of({**other, "time / fastmix": 9.0}) == 2.5

    def refuse(call):
        raise RuntimeError("capture\nrefused")

    monkeypatch.setattr(timing, "graph_seconds", refuse)
    times["two hard losses"] = 0.5
    other = measuring._on_device(case, "two hard losses", lambda: "two hard losses", result, CPU)
    assert other["graph reason"] == "capture"
    assert "host seconds" not in other  # the queue would fill
    large = bench_ops.loss((4096, 100000), F32)
    assert "graph reason" not in measuring._on_device(large, "fastmix", lambda: "fastmix", result, CPU)


def test_a_backward_is_timed_alone():
    """Each after a forward of its own: fastmix gives the gradient that its forward formed only once."""
    case = bench_ops.loss((4, 3), F32, BACKWARD)
    setup, call = case.call("fastmix", case.inputs(CPU))
    first, second = (call(*setup())[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (4, 3)


def bench(*arguments, **environment):
    environment = {**os.environ, **environment}
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):  # a run of its own
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", "fastmix.bench", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


WRONG_PEERS = """
import time
from fastmix.bench import peers
peers.MIX["torch.lerp"] = lambda x, lam, index: x
peers.MIX["copy"] = lambda x, lam, index: time.sleep(60)
calls, plain = [], peers.MIX["mixup-cifar10"]
def later(x, lam, index):  # it is wrong only once it has been checked
    calls.append(0)
    return plain(x, lam, index) if len(calls) < 3 else {}["no such"]
peers.MIX["mixup-cifar10"] = later
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run in which ways of others are missing, wrong or slow."""
    folder = tmp_path_factory.mktemp("bench")
    # a module that cannot be imported stands for a library that is not installed
    (folder / "timm").mkdir()
    (folder / "timm" / "__init__.py").write_text("raise ModuleNotFoundError('no timm today')")
    (folder / "sitecustomize.py").write_text(WRONG_PEERS)
    path = os.pathsep.join([str(folder), str(ROOT)])
    expression = "((8x10 or 8x16) and forward and not backward) or (8x3x8x8 and lambda)"
    written = "--json", str(folder / "r.json")
    return folder, bench("host", "-k", expression, "--timeout=6", *written, PYTHONPATH=path)


@pytest.mark.slow
def test_the_command_prints_and_writes(ran):
    folder, process = ran
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((folder / "r.json").read_text())
    timed = [row for row in result["rows"] if "reason" not in row]
    assert {"fastmix", "two hard losses", "dense target"} <= {row["way"] for row in timed}
    for row in timed:
        assert row["seconds"] > 0
        assert row["time / fastmix"] == 1 or row["way"] != "fastmix"
        assert row["group"] in process.stdout
    assert result["copy GB/s"] > 0.1
    assert f"{result['copy GB/s']:.1f} GB/s" in process.stdout
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["threads"] == 1 or "OMP_NUM_THREADS" in os.environ


@pytest.mark.slow
def test_what_is_missing_is_named(ran):
    folder, process = ran
    result = json.loads((folder / "r.json").read_text())
    rows = {row["way"]: row["reason"] for row in result["rows"] if "reason" in row}
    assert "no timm today" in rows["timm SoftTargetCrossEntropy"]
    assert "no timm today" in rows["timm, batch"]
    assert "Missing: timm: ModuleNotFoundError: no timm today (python -m pip install --no-deps timm)" in process.stdout
    assert "timm SoftTargetCrossEntropy" in process.stdout


@pytest.mark.slow
def test_a_wrong_or_slow_peer_is_a_row(ran):
    """And no failure."""
    folder, process = ran
    assert process.returncode == 0, process.stdout
    found = json.loads((folder / "r.json").read_text())["rows"]
    rows = {row["way"]: row for row in found if "8, 16" in row["group"] or "8x16" in row["group"]}
    assert rows["torch.lerp"]["reason"].startswith("wrong: wrong by")
    assert rows["mixup-cifar10"]["reason"] == "KeyError: 'no such'"
    assert rows["copy"]["reason"].startswith("Failed: Timeout")
    assert rows["fastmix"]["seconds"] > 0


@pytest.mark.slow
def test_a_wrong_way_of_ours_fails(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import fastmix\nmix = fastmix.mix\nfastmix.mix = lambda x, lam, index, **options: mix(x, 1 - lam, index, **options)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    expression = "8x16 and forward and not backward and fastmix"
    process = bench("host", "-k", expression, "--json", str(tmp_path / "r.json"), PYTHONPATH=path)
    assert process.returncode == 1
    assert "wrong by" in process.stdout
    (ours,) = (row for row in json.loads((tmp_path / "r.json").read_text())["rows"] if row["way"] == "fastmix")
    assert ours["reason"].startswith("wrong: wrong by")


@pytest.mark.slow
def test_a_budget_is_kept(tmp_path):
    process = bench("mix", "--budget", "1e-9", "--json", str(tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())
    assert process.returncode == 0
    assert result["rows"] == []
    assert len(result["not run"]) > 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "SUITE: expected some of mix, "),
        (["run", "mox"], "SUITE: expected some of mix"),
        (["run", "--json", "/no/such/folder/r.json"], "--json: [Errno 2]"),
        (["run", "--budget", "0"], "--budget: expected more than 0"),
    ],
)
def test_wrong_calls(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_nothing_matches(monkeypatch, capsys):
    monkeypatch.setattr(pytest, "main", lambda arguments: pytest.ExitCode.NO_TESTS_COLLECTED)
    assert run.main(["mix", "-k", "no_such_case"]) == 2
    assert "nothing matches" in capsys.readouterr().err


@pytest.mark.slow
def test_without_rich_it_says_so(tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('not here')")
    process = bench("static", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert process.returncode == 2
    assert "fastmix.bench needs rich: python -m pip install" in process.stderr


def test_help_lists_the_commands(capsys):
    assert __main__.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("run", "numerics", "static", "cold", "gpu", "variants", "sanitize", "report"):
        assert f"\n  {command} " in shown


def test_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "r.json"
    results.write(path, {"a": 1})
    with pytest.raises(TypeError):
        results.write(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


# The tables of the pages and the plots


def row(way, seconds, group="mix, forward [1, 2] float32", **more):
    return {
        "suite": "mix", "title": "forward", "shape": [1, 2], "dtype": "float32", "group": group, "way": way,
        "seconds": seconds, "spread": 0.1, "bytes": 10**6, "time / fastmix": seconds / 1e-3, **more,
    }  # fmt: skip


def result_of(commit="a" * 40, date="2026-01-02", **more):
    rows = [row("fastmix", 1e-3, **{"of copy": 0.9}), row("torch.lerp", 2.5e-3), row("mixup-cifar10", 4e-3), row("copy", 5e-4)]
    rows += [{**row("timm", 1), "reason": "missing: timm"}]
    machine = {"gpu": "Some GPU 9", "torch": "2.11", "triton": "3.6"}
    return {
        "machine": machine, "commit": commit, "changed": False, "date": date, "copy GB/s": 1000.0, "rows": rows,
        "missing": {"liger-kernel": "not here"}, "not run": [], **more,
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    def write(result, name="result.json"):
        path = tmp_path / name
        path.write_text(json.dumps(result))
        return path

    return write


def test_a_result_is_filed_once(tmp_path, file):
    place = report.add(file(result_of()), tmp_path / "results")
    assert place == tmp_path / "results" / "some-gpu-9" / "aaaaaaaaaaaa.json"
    with pytest.raises(ValueError, match="there already"):
        report.add(file(result_of()), tmp_path / "results")
    assert report.add(file(result_of(date="2026-01-03")), tmp_path / "results").name == "aaaaaaaaaaaa-2.json"
    for change, words in (
        ({"commit": None}, "no commit"), ({"changed": True}, "changes on top"), ({"machine": {}}, "no GPU"),
        ({"copy GB/s": None}, "lacks copy GB/s"), ({"rows": []}, "lacks anything to compare"), ({"missing": None}, "lacks missing"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            report.add(file(result_of() | change), tmp_path / "results")


def test_a_cpus_result_is_filed_and_shown_as_such(tmp_path, file):
    found = result_of(machine={"cpu": "Some CPU", "cores": 2, "torch": "2.11"}, **{"load before": 0.5, "load after": 9.5})
    assert report.add(file(found), tmp_path / "results") == tmp_path / "results" / "cpu" / "aaaaaaaaaaaa.json"
    assert report.block(report.load(tmp_path / "results")) == report.NONE
    text = report.block(report.load(tmp_path / "results", gpu=False))
    assert "Some CPU, 2 cores, torch 2.11; commit aaaaaaaaaaaa" in text
    assert "0.5 when it began and 9.5 when it ended" in text
    assert "| torch.lerp | 2.50 |" in text
    assert "not shown" not in text
    found |= {"date": "2026-01-03"}
    found["rows"][1]["spread"] = 0.6  # the fastest other way: the next one is not taken in its place
    report.add(file(found), tmp_path / "results")
    text = report.block(report.load(tmp_path / "results", gpu=False))
    assert "mix, forward" not in text
    assert "1 more are not shown" in text


def test_the_table_has_the_fastest_other_way(tmp_path, file):
    report.add(file(result_of()), tmp_path / "results")
    newer = result_of("b" * 40, "2026-01-03")
    report.add(file(newer), tmp_path / "results")
    text = report.block(report.load(tmp_path / "results"))
    assert "commit bbbbbbbbbbbb; a copy moves 1000 GB/s" in text
    assert "aaaa" not in text
    assert "| mix, forward [1, 2] float32 | 1.000 ms | 90% | torch.lerp | 2.50 |" in text
    assert "Not compared with: liger-kernel (not here)." in text
    assert "Not complete" not in text
    part = result_of("d" * 40, "2026-01-05", parts={"tests": {"status": "failed"}, "bench": {"status": "passed"}})
    part["not run"] = [{"group": "mix, forward [1, 2] float32", "way": "compiled"}]
    report.add(file(part), tmp_path / "results")
    text = report.block(report.load(tmp_path / "results"))
    assert "| torch.lerp (not run: compiled) | 2.50 |" in text
    assert "Not complete: 1 of 6 rows for want of time; tests failed." in text
    on_device = [
        {**r, "device seconds": r["seconds"] / 10, "device time / fastmix": r["seconds"] / 2e-3} for r in newer["rows"]
    ]
    assert "| 0.1000 ms | 90% | torch.lerp | 1.25 |" in "\n".join(report.table({**newer, "rows": on_device[:4]}))


def test_a_gpu_machines_result_can_be_filed(tmp_path, file):
    """What the command for a GPU machine puts together is what is filed and shown."""
    whole = gpu.Result(tmp_path / "result.json", commit="c" * 40, changed=None, date="2026-01-04")
    file(result_of(), "found.json")
    whole.put("bench", "passed", 1.0, *gpu.PARTS["bench"].look(tmp_path / "found.json"))
    report.add(tmp_path / "result.json", tmp_path / "results")
    text = report.block(report.load(tmp_path / "results"))
    assert "Some GPU 9, torch 2.11, Triton 3.6; commit cccccccccccc" in text
    assert "| torch.lerp | 2.50 |" in text


@pytest.mark.slow
def test_the_pages_are_what_the_result_files_say():
    assert report.main(["--check"]) == 0
    page = (ROOT / "docs" / "speed.md").read_text()
    assert report.written(page, gpu=report.block(report.load(), report.checked())) == page
    assert "## Ways to mix" in page
    changed = page.replace("| mixup | `Mixup(0.2)(x, y)` | 1.50 |", "| mixup | `Mixup(0.2)(x, y)` | 1.00 |")
    assert changed != page
    assert report.written(changed, methods="\n".join(report.methods())) == page


@pytest.mark.slow
def test_pictures_of_the_pages(tmp_path):
    steps = [{**row(way, s, "step"), "suite": "step", "title": "a CNN"} for way, s in (("fastmix", 1e-3), ("by hand", 2e-3))]
    paths = plots.overview(result_of(rows=[*result_of()["rows"], *steps]), tmp_path / "new")
    assert [path.name for path in paths] == ["cases.png", "steps.png"]
    assert set(report.PICTURES) == {path.stem for path in paths}
    legend = {"forward": "C0", "backward": "C1"}
    paths.append(plots.pairs({"mix": (1.5, 1.5), "cut": (1.0, None)}, tmp_path / "floors.png", legend, line=1))
    numbers = {"dtype": "float32", "fastmix": 1e-8, "usual": 1e-7, "limit": 1e-6}
    paths.append(plots.errors([{"op": "mix", **numbers}, {"op": "loss", **numbers, "usual": None}], tmp_path / "errors.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in paths)


def test_clocks_beside_a_row(tmp_path, monkeypatch):
    """Of an nvidia-smi that says two whole lines and the beginning of a third; and where there is none."""
    program = tmp_path / "nvidia-smi"
    said = r"1980, 2619, 41, 120.5, 0x0000000000000000\n1200, 2619, 84, 700.1, 0x0000000000000024\n15"
    program.write_text(f"#!/bin/sh\nprintf '{said}'\nexec sleep 20\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    clocks, end = timing.Clocks(), time.monotonic() + 10
    while not (found := clocks.now()) and time.monotonic() < end:
        time.sleep(0.01)
    clocks.close()
    assert clocks.process.poll() is not None
    expected = {"SM MHz": 1200.0, "memory MHz": 2619.0, "degrees C": 84.0, "W": 700.1, "slowed by": ["power cap", "heat"]}
    assert found == expected
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    clocks = timing.Clocks()
    assert clocks.now() == {}
    clocks.close()


@pytest.mark.gpu
def test_a_graphed_step_trains_as_the_eager_one():
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    x, y = torch.randn(8, 3, 8, 8, device="cuda"), torch.arange(8, device="cuda")
    losses = []
    for graph in (False, True):
        step = bench_steps.training(
            lambda: bench_steps.cnn(10), lambda model, x, y: torch.nn.functional.cross_entropy(model(x), y)
        )
        if graph:
            step = bench_steps.graphed(step)  # three steps before the first replay
        losses.append([float(step(x, y)) for _ in range(3 if graph else 6)])
    torch.testing.assert_close(losses[1], losses[0][3:], rtol=1e-4, atol=1e-5)
    other = x + 1
    assert float(step(other, y)) != losses[1][-1]
