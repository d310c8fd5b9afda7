"""The command for a GPU machine, run without one: whatever becomes of a part, the others run and the result file is whole."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from conftest import NO_TRITON, TRITON

from fastmix.bench import cold, gpu, programs, reports, results, sanitize, variants

ROOT = pathlib.Path(__file__).parent.parent
QUICK = {"gpu": None, "versions": {"torch": "0"}, "problem": None}
DEVICE = {"gpu": {"name": "a GPU", "driver": "1"}, "versions": {"torch": "0"}}


def part(code, share=1, look=None, **options):
    """A part that runs Python code, which finds the output file in sys.argv[1]."""
    return gpu.Part(
        share,
        lambda out, seconds: [sys.executable, "-c", code, out],
        look or (lambda out: (f"found {gpu._loaded(out)}", {"found": gpu._loaded(out)})),
        **options,
    )


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(parts, *options, machine) -> (exit status, result.json, what was printed), on stubbed parts and machine."""

    def run(parts, *options, machine=DEVICE, minutes=1.0):
        monkeypatch.setattr(gpu, "machine", lambda: json.loads(json.dumps(machine)))
        code = gpu.main(["--out", str(tmp_path / "out"), "--minutes", str(minutes), *options], parts)
        return code, json.loads((tmp_path / "out" / "result.json").read_text()), capsys.readouterr().out

    run.folder = tmp_path / "out"
    return run


WRITE = "import json, sys; json.dump({'n': 1}, open(sys.argv[1], 'w')); print('said')"


def test_parts_that_fail_do_not_stop_the_others(command):
    parts = {
        "good": part(WRITE),
        "bad": part("import sys; print('it broke'); sys.exit(5)"),
        "absent": gpu.Part(1, lambda out, seconds: ["/no/such/program"], lambda out: ("", {})),
        "unreadable": part("", look=lambda out: 1 / 0),
        "not here": gpu.Part(1, lambda out, seconds: "not installed", lambda out: ("", {})),
        "says so": part("import sys; sys.exit(3)"),
        "last": part(WRITE),
    }
    code, result, text = command(parts, minutes=3.0)
    statuses = {name: found["status"] for name, found in result["parts"].items()}
    assert statuses == {
        "good": "passed",
        "bad": "failed",
        "absent": "failed",
        "unreadable": "passed",
        "not here": "skipped",
        "says so": "skipped",
        "last": "passed",
    }
    assert code == 1
    assert result["parts"]["last"]["found"] == {"n": 1}
    assert "exit status 5: it broke" in result["parts"]["bad"]["summary"]
    assert "no/such/program" in result["parts"]["absent"]["summary"]
    assert "ZeroDivisionError" in result["parts"]["unreadable"]["summary"]
    assert (command.folder / "good.log").read_text() == "said\n"
    verdict = text.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in verdict[1:]] == ["good", "bad", "absent", "unreadable", "not", "says", "last"]
    for path in command.folder.iterdir():
        assert re.fullmatch(r"[\w.-]+( \w+)?\.(log|json)", path.name), path


@pytest.mark.slow
def test_a_part_out_of_time_is_ended_and_the_next_one_runs(command, monkeypatch):
    """With what it started, even if it does not listen; what it has written is kept."""
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    deaf = (
        "import json, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "json.dump({'child': child.pid}, open(sys.argv[1], 'w')); time.sleep(60)"
    )
    start = time.monotonic()
    code, result, _ = command({"deaf": part(deaf, share=3), "next": part(WRITE)}, minutes=0.1)
    assert time.monotonic() - start < 6
    assert code == 1
    assert {name: found["status"] for name, found in result["parts"].items()} == {"deaf": "out of time", "next": "passed"}
    child = pathlib.Path(f"/proc/{result['parts']['deaf']['found']['child']}/stat")
    assert not child.exists() or child.read_text().split(")")[1].split()[0] in "ZX"


@pytest.mark.slow
def test_result_is_whole_at_every_moment(command, monkeypatch):
    seen = []
    save = gpu.Result.save

    def checked(self):
        save(self)
        seen.append(json.loads(self.path.read_text()))

    monkeypatch.setattr(gpu.Result, "save", checked)
    slow = "import json, sys, time; json.dump({'n': float('nan')}, open(sys.argv[1], 'w')); time.sleep(1.5)"
    command({"slow": part(slow), "quick": part(WRITE)})
    assert seen[0]["parts"] == {}
    assert any(r["parts"].get("slow", {}).get("status") == "running" and r["parts"]["slow"].get("found") for r in seen)
    assert seen[-1]["parts"]["slow"]["found"] == {"n": None}  # JSON has no NaN
    assert list(seen[-1]["parts"]) == ["slow", "quick"]
    assert {"commit", "changed", "date", "versions", "gpu"} <= set(seen[-1])
    assert [path.name for path in command.folder.glob("result*")] == ["result.json"]


def test_unused_time_flows_on(command):
    given = {}

    def budget(name):
        def make(out, seconds):
            given[name] = seconds
            return "not run"

        return gpu.Part(10, make, lambda out: ("", {}))

    command({name: budget(name) for name in ("a", "b", "c")}, minutes=1.1)
    for name, limit in (("a", 20), ("b", 30), ("c", 60)):
        assert given[name] == pytest.approx(gpu.soft(limit), abs=0.5)


def test_soft_budgets_end_before_limits():
    assert gpu.soft(20) == 20 - 2 * gpu.GRACE
    assert gpu.soft(200) == pytest.approx(188)
    assert gpu.soft(1) == 1


def test_shares_of_the_parts():
    shares = {name: part.share for name, part in gpu.PARTS.items()}
    assert list(shares) == ["smoke", "tests", "sanitizer", "variants", "cold", "numerics", "bench"]
    assert sum(shares.values()) == 100
    assert shares["tests"] <= 40
    assert shares["bench"] >= 28
    assert len(gpu.PARTS) + 1 <= 8  # logs, and result.json


@pytest.mark.parametrize("code", ["pass", "raise SystemExit(1)"])
def test_nothing_runs_after_a_failed_smoke(command, code):
    smoke = dataclasses.replace(part(code, share=1, least=20.0), vital=True)
    given = []

    def asked(out, seconds):
        given.append(seconds)
        return part(WRITE).command(out, seconds)

    status, result, _ = command({"smoke": smoke, "tests": gpu.Part(99, asked, lambda out: ("", {}))})
    parts = result["parts"]
    if code == "pass":
        assert (status, parts["tests"]["status"]) == (0, "passed")
    else:
        assert (status, parts["smoke"]["status"], parts["tests"]["status"]) == (1, "failed", "skipped")
        assert parts["tests"]["summary"] == "smoke failed"
    assert (command.folder / "tests.log").exists() == (code == "pass")


def test_a_part_has_its_least_seconds(command):
    given = []

    def asked(out, seconds):
        given.append(seconds)
        return "not here"

    command({"first": gpu.Part(1, asked, lambda out: ("", {}), least=30.0), "rest": gpu.Part(99, asked, lambda out: ("", {}))})
    assert given == [pytest.approx(gpu.soft(30), abs=0.5), pytest.approx(gpu.soft(60 - gpu.RESERVE), abs=1)]


def test_the_smoke_is_one_case_of_every_op_and_kind_of_target(tmp_path, capsys):
    """As the part calls it, on what there is here."""
    from fastmix.bench import numerics, ops

    assert numerics.main(["--first", "--small", "--dtype", "float32", "--json", str(tmp_path / "found")]) == 0
    rows = json.loads((tmp_path / "found").read_text())["rows"]
    cases = {(row["op"], row["case"]) for row in rows}
    assert {op for op, _ in cases} == {op.name for op in ops.ENTRIES.values() if op.hard}
    assert len(cases) == len({op for op, _ in cases}) + 2
    assert {("soft_cross_entropy", "probabilities"), ("soft_binary_cross_entropy", "sigmoid, rows")} < cases
    command = gpu.PARTS["smoke"].command("out", 40.0)
    assert command[3:] == [*gpu.SMOKE, "--json", "out"]
    assert gpu.PARTS["smoke"].vital
    capsys.readouterr()


ORDERED = """
import pytest
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("device", ["torch", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [1, 2])
def test_values(size, device, dtype): pass

@pytest.mark.parametrize("device", [pytest.param("gpu", marks=pytest.mark.gpu)])
def test_other(device): pass

@pytest.mark.gpu
def test_only_there(): pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_what_tells_most_runs_first_and_what_never_began_is_named(tmp_path, workers):
    (tmp_path / "test_some.py").write_text(ORDERED)
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "fastmix.bench.reports", "-p", "no:cacheprovider"]
    command += [
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
        "--report-log",
        str(tmp_path / "log"),
        "-W",
        "ignore",
    ]
    command += ["-n", str(workers), "--maxschedchunk", "2"] * bool(workers)
    command += ["-p", "pytest_reportlog.plugin", "-p", "xdist.plugin"]  # no others, which would be loaded by every worker
    environment = {**gpu._environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    order = ["test_only_there", "test_values[1-gpu-f32]", "test_values[1-gpu-bf16]", "test_other[gpu]"]
    order += ["test_values[2-gpu-f32]", "test_values[2-gpu-bf16]"]
    assert workers or re.findall(r"::(test_\S+) PASSED", ran.stdout) == order
    assert json.loads((tmp_path / "log.collected").read_text()) == [f"test_some.py::{name}" for name in order]
    found = reports.read(tmp_path / "log")
    assert (found["passed"], found["not begun"]) == (6, {})
    lines = (tmp_path / "log").read_text().splitlines()
    (tmp_path / "log").write_text("".join(line + "\n" for line in lines if "test_values" not in line))
    assert reports.read(tmp_path / "log")["not begun"] == {"test_some.py::test_values": 4}


def test_without_a_gpu(command, monkeypatch):
    parts = {"device": part(WRITE), "anywhere": part(WRITE, on_cpu="always"), "if asked": part(WRITE, on_cpu="asked")}
    code, result, text = command(parts, machine={**QUICK, "problem": "no driver"})
    assert code == 0
    assert [found["status"] for found in result["parts"].values()] == ["skipped", "passed", "skipped"]
    assert text.count("no GPU here") >= 3
    assert "no GPU here: no driver" in text
    seconds = []
    parts["if asked"] = gpu.Part(
        1, lambda out, soft: seconds.append(soft) or parts["anywhere"].command(out, soft), lambda out: ("", {}), "asked"
    )
    _, result, _ = command(parts, "--only", "device", "if asked", machine=QUICK)
    assert seconds == [pytest.approx(gpu.soft(60 - gpu.RESERVE), abs=1)]  # all, and no share for what is skipped
    assert {name: found["status"] for name, found in result["parts"].items()} == {"device": "skipped", "if asked": "passed"}


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    """From another folder, with a part that runs on a CPU and two that do not."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "FASTMIX_BACKEND": "triton"}
    command = [sys.executable, "-m", "fastmix.bench", "gpu", "--out", "found", "--only", "tests", "variants"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "found" / "result.json").read_text())
    assert {name: found["status"] for name, found in result["parts"].items()} == {"tests": "skipped", "variants": "skipped"}
    assert result["versions"]["torch"]
    assert result["gpu"] is None
    assert result["host"]["cores"] == os.cpu_count()
    assert result["commit"]
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["result.json"]


def test_parts_find_this_package_and_the_kernels_are_not_turned_off(monkeypatch):
    for name in ("TRITON_INTERPRET", "FASTMIX_BACKEND", "FASTMIX_DEBUG"):
        monkeypatch.setenv(name, "1")
    environment = gpu._environment()
    assert not [name for name in environment if name.startswith(("FASTMIX_", "TRITON_INTERPRET"))]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_the_commit_is_gits_or_what_is_given(command, monkeypatch):
    for found, given, expected in (((None, None), "abc", "abc"), ((None, None), None, None), (("def", True), "de", "def")):
        monkeypatch.setattr(results, "commit", lambda found=found: found)
        _, result, _ = command({}, *(["--commit", given] if given else []))
        assert (result["commit"], result["changed"]) == (expected, found[1])
    with pytest.raises(SystemExit):
        command({}, "--commit", "abc")


# The verdict


def test_the_verdict_is_short_and_says_what_counts():
    rows = [
        {"group": f"group {n}", "way": name, "time / fastmix": ratio}
        for n in range(30)
        for name, ratio in (("fastmix", 1.0), ("copy", 0.5), ("slow", 9.0), ("best", 0.85 + n / 10))
    ]
    timed = [
        {"case": "mix", "variant": name, "seconds": 1.0, "ratio to default": ratio}
        for name, ratio in (("default", 1.0), ("default again", 0.99), ("tile 4096", 0.9), ("8 warps", 0.98))
    ]
    why = "AssertionError: a\nlong\n" + "text " * 100
    failures = [{"test": f"tests/test_mix.py::test_{n}", "why": why} for n in range(50)]
    parts = {name: {"status": "passed", "seconds": 1.0, "summary": "x\n" * 200} for name in gpu.PARTS}
    parts["tests"] |= {"status": "failed", "failures": failures}
    found = {"commit": "abc", "parts": parts, "rows": rows, "variants": timed, "copy GB/s": 4321.0}
    lines = gpu.verdict({**DEVICE, **found})
    text = "\n".join(lines)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 150
    assert "4321 GB/s" in text
    assert "28 of 30 groups" in text
    shown = [line.split()[0] for line in lines if "group " in line]
    assert shown == ["0.85", "0.95", "1.05", "1.15", "1.25", "3.35", "3.45", "3.55", "3.65", "3.75"]
    assert "tile 4096" in text
    assert "8 warps" not in text
    assert "default again" not in text


def test_the_verdict_of_next_to_nothing():
    assert (
        len(gpu.verdict({"gpu": None, "parts": {}, "rows": [{"group": "g"}, {}], "variants": [{"error": "x", "variant": "v"}]}))
        == 1
    )


# Tests, reported as they end


TESTS = """
import os, time
import pytest

def test_passes(): pass

def test_fails():
    assert [1] == [2], "not the same"

@pytest.mark.skip(reason="needs luck")
def test_skipped(): pass

@pytest.fixture
def broken(): raise RuntimeError("no fixture")

def test_error(broken): pass

@pytest.mark.xfail(strict=True)
def test_known(): assert False

def test_hangs(): time.sleep(60)

def test_never(): pass
"""


@pytest.mark.slow
def test_killed_tests_tell_what_they_saw(command, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    monkeypatch.setattr(gpu, "RESERVE", 0.0)
    (tmp_path / "test_some.py").write_text(TESTS)
    options = ["-v", "-p", "fastmix.bench.reports", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path)]
    pytest_on = [sys.executable, "-m", "pytest", *options, str(tmp_path / "test_some.py"), "--report-log"]
    parts = {"tests": gpu.Part(1, lambda out, seconds: [*pytest_on, out], gpu._look_at_tests)}
    code, result, _ = command(parts, minutes=0.2)
    found = result["parts"]["tests"]
    assert code == 1
    assert found["status"] == "failed"
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 2, 1)
    assert [failure["test"].partition("::")[2] for failure in found["failures"]] == ["test_fails", "test_error"]
    assert found["failures"][0]["why"].startswith("AssertionError: not the same")
    assert found["failures"][0]["why"].endswith("test_some.py:8")
    assert "no fixture" in found["failures"][1]["why"]
    assert found["skips"] == {"needs luck": 1}
    # interrupted, pytest calls it ended or it still runs, by when it was killed; what comes after was never begun
    assert not any("test_never" in test for test in found["running"])


def test_reports_of_a_run_that_died(tmp_path):
    """Half a line at the end, a test that began and did not end, a crash after a failure of the same test, a file that cannot be read."""
    path = tmp_path / "reports"

    def line(test, outcome, when="call", why=None, seconds=1.0, kind="TestReport"):
        return {"$report_type": kind, "nodeid": test, "outcome": outcome, "when": when, "longrepr": why, "duration": seconds}

    lines = [
        {"$report_type": "SessionStart", "pytest_version": "9"},
        {"$report_type": "CollectReport", "nodeid": "f", "outcome": "failed", "longrepr": "no such module"},
        line("a", "passed", "setup"),
        line("a", "failed", why="CUDA error: illegal", seconds=2.0),
        line("a", "failed", why="worker crashed", seconds=0.0),
        line("b", "passed", "setup"),
        line("c", "passed", "setup"),
        line("c", "passed"),
        line("c", "failed", "teardown", why="in its teardown"),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"nodeid": "d", "outc')
    found = reports.read(path)
    assert (found["passed"], found["failed"], found["skipped"]) == (0, 3, 0)
    assert found["failures"] == [
        {"test": "f", "why": "no such module"},
        {"test": "a", "why": "CUDA error: illegal"},
        {"test": "c", "why": "in its teardown"},
    ]
    assert found["running"] == ["b"]
    assert reports.read(tmp_path / "nothing")["failed"] == 0


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("RuntimeError: CUDA error: an illegal memory access was encountered", True),
        ("RuntimeError: Triton Error [CUDA]: misaligned address", True),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", False),
        ("RuntimeError: called a synchronizing CUDA operation", False),
        ("AssertionError: Tensor-likes are not close!", False),
    ],
)
def test_a_dead_context_is_told_from_a_failure(text, dead):
    assert bool(reports.DEAD.search(text)) == dead


def test_the_tests_part(monkeypatch):
    command = gpu._tests("out", 100.0)
    assert str(ROOT / "tests") in command
    assert command[command.index("-m", 3) + 1] == "gpu"
    assert "-x" not in command
    found = gpu.importlib.util.find_spec
    for there in (True, False):
        monkeypatch.setattr(
            gpu.importlib.util, "find_spec", lambda name, there=there: there if name == "xdist" else found(name)
        )
        command = gpu._tests("out", 100.0)
        assert ("-n" in command) == there
        assert not there or 4 <= int(command[command.index("-n") + 1]) <= 16
    monkeypatch.setattr(gpu, "CHECKOUT", False)
    assert "not a checkout" in gpu._tests("out", 100.0)


# The sanitizer


@pytest.mark.parametrize(
    ("code", "text", "status"),
    [
        (0, "ran\n========= ERROR SUMMARY: 0 errors\n", "passed"),
        (87, "========= Invalid __global__ read\n========= ERROR SUMMARY: 2 errors\n", "failed"),
        (1, "Traceback\n========= ERROR SUMMARY: 0 errors\n", "failed"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed"),
        (87, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", "failed"),
        (255, "========= Error: Device not supported. Please refer to the documentation\n", "skipped"),
        (1, "", "skipped"),
    ],
)
def test_what_the_sanitizer_says(code, text, status):
    assert sanitize.verdict("memcheck", code, text)[0] == status


@pytest.mark.no_poison
def test_the_sanitizers_cases_run():
    """On the torch backend here; every op of the registry that has kernels is among them."""
    import torch

    from fastmix.bench import ops

    found = sanitize.cases("cpu")
    for name, call in found.items():
        results = call()
        assert all(bool(torch.isfinite(result).all()) for result in results), name
    assert {name.split()[0] for name in found} == {op.name for op in ops.ENTRIES.values() if op.sanitized}
    assert {op.name for op in ops.ENTRIES.values() if not op.sanitized} <= {"adversarial_mixing_loss"}  # it has no kernel


def fake_tool(tmp_path, monkeypatch, body):
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return str(program)


@pytest.mark.slow
def test_the_sanitizer_runs_the_cases_alone_and_under_both_tools(tmp_path, monkeypatch):
    body = "print(sys.argv[1:]); print('========= ERROR SUMMARY: 0 errors' if 'memcheck' in sys.argv[1] else time.sleep(60))"
    program = fake_tool(tmp_path, monkeypatch, body)
    assert sanitize.tool() == program
    rows = [dict(rows) for rows in sanitize.sanitize(2.5, [sys.executable, "-c", "print('ran')"])]
    assert [list(row) for row in rows[-1:]] == [["without the tool", "memcheck", "racecheck"]]
    assert {name: row["status"] for name, row in rows[-1].items()} == {
        "without the tool": "passed",
        "memcheck": "passed",
        "racecheck": "out of time",
    }


def test_cases_that_fail_alone_are_not_run_under_the_tool(tmp_path, monkeypatch):
    fake_tool(tmp_path, monkeypatch, "print('========= ERROR SUMMARY: 0 errors')")
    *_, rows = sanitize.sanitize(20.0, [sys.executable, "-c", "raise SystemExit('wrong')"])
    assert [row["status"] for row in rows.values()] == ["failed", "skipped", "skipped"]
    assert rows["without the tool"]["summary"] == "wrong"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    if sanitize.tool() is None:
        *_, rows = sanitize.sanitize(20.0, [sys.executable, "-c", "pass"])
        assert [row["status"] for row in rows.values()] == ["passed", "skipped", "skipped"]


# Variants

LAUNCHES = """
import json, sys
import torch
from triton.runtime.jit import JITFunction
from fastmix.bench import variants

launched, found = [], {}

def constants(arguments):  # numbers and absent pointers by name, also those of tuples
    found = {}
    for name, value in arguments.items():
        value = getattr(value, "value", value)
        if hasattr(value, "_asdict"):
            found.update(constants(value._asdict()))
        elif isinstance(value, (int, float, bool)) or value is None:
            found[name] = value
    return found

def run(kernel, *arguments, grid, warmup, **options):
    by_place = {str(k): value for k, value in enumerate(arguments)}
    launched.append([kernel.__name__, list(grid), constants({**options, **by_place})])

JITFunction.run = run
for name, case in variants.CASES.items():
    found[name] = {}
    for variant, (around, call) in variants.calls(case).items():
        with around():
            call(case.inputs(torch.device("meta")))
        found[name][variant] = launched[:]
        launched.clear()
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_every_variant_changes_what_is_launched():
    """Recorded where a launch would be, with tensors that hold nothing; the default is the default again afterwards."""
    if not TRITON:
        pytest.skip(NO_TRITON)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", LAUNCHES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert list(found) == list(variants.CASES)
    idle = {(case.op, name) for case in variants.CASES.values() for name in variants.VARIANTS[case.op]}
    for name, launches in found.items():
        assert launches["default"]
        assert launches["default again"] == launches["default"]
        changed = [variant for variant in launches if launches[variant] != launches["default"]]
        assert changed
        idle -= {(variants.CASES[name].op, variant) for variant in changed}
    assert idle == set()
    launches = found["mix [256, 3, 224, 224] float32"]
    for variant, grid, warps, block in (("tile 16384", 256 * 37, 4, 4096), ("8 warps", 256 * 74, 8, 2048)):
        kernel, blocks, compiled_for = launches[variant][0]
        assert (kernel, blocks) == ("_mix_fwd_kernel", [grid])
        assert (compiled_for["num_warps"], compiled_for["ROWS"], compiled_for["BLOCK"]) == (warps, 1, block)
    formed = found["loss [4096, 1000] bfloat16"]
    assert formed["formed in the backward"] != formed["default"]


def test_constants_come_back_after_an_error():
    if not TRITON:
        pytest.skip(NO_TRITON)
    from fastmix.kernels import _launch, _row_layout

    before = _launch.ROW_TILE_BYTES
    with pytest.raises(ZeroDivisionError), programs.constants("_launch", ROW_TILE_BYTES=64):
        _row_layout.rows_of((4, 100), (100, 1), 4, 0).block / (_launch.ROW_TILE_BYTES - 64)
    with programs.constants("_launch", ROW_TILE_BYTES=64):
        assert _row_layout.rows_of((4, 100), (100, 1), 4, 0).block == 16
    assert before == _launch.ROW_TILE_BYTES
    assert _row_layout.rows_of((4, 100), (100, 1), 4, 0).block == 128


def test_variants_are_held_to_the_default():
    import torch

    loss, gradient = torch.tensor(2.0), torch.randn(4, 5).bfloat16()
    assert variants.wrong((loss, gradient), (loss.clone(), gradient.clone())) is None
    assert variants.wrong((loss, torch.nextafter(gradient, 2 * gradient)), (loss, gradient)) is None
    assert "result 1" in variants.wrong((loss, gradient * 1.02), (loss, gradient))
    assert "result 0" in variants.wrong((loss + 1e-4, gradient), (loss, gradient))
    assert "result 0" in variants.wrong((loss * float("nan"), gradient), (loss, gradient))
    assert "float32" in variants.wrong((loss, gradient.float()), (loss, gradient))


def test_variants_need_a_gpu(monkeypatch):
    monkeypatch.setattr(variants.torch.cuda, "is_available", lambda: False)
    assert variants.main([]) == variants.NO_GPU == gpu.SKIP_CODE
    assert sanitize.main([]) == gpu.SKIP_CODE


# Cold starts


@pytest.mark.slow
def test_cold_starts_of_the_ops(tmp_path, monkeypatch, capsys):
    """The steps of two fresh processes, the second with what the first one left on disk; small shapes, no compiler."""
    plan = (["warmup"], {"torch.compile": "there is no C++ compiler"})
    monkeypatch.setattr(cold, "plan", lambda gpu: plan)
    small = "from fastmix.bench import cold\ncold.IMAGES, cold.CLASSES = (4, 3, 8, 8), (4, 10)\nfor row"
    monkeypatch.setattr(cold, "CHILD", cold.CHILD.replace("from fastmix.bench import cold\nfor row", small))
    assert cold.main(["--json", str(tmp_path / "cold.json")]) == 0
    result = json.loads((tmp_path / "cold.json").read_text())
    steps = {(row["mode"], row["caches"], row["step"]): row for row in result["rows"]}
    for caches in ("empty", "warm"):
        assert steps["warmup", caches, "import torch"]["first"] > steps["warmup", caches, "import fastmix"]["first"] > 0
        for step in ("draw", "mix", "mix, forward + backward", "loss, forward + backward"):
            assert steps["warmup", caches, step]["first"] > 0
            assert steps["warmup", caches, step]["second"] > 0
        assert steps["warmup", caches, "fastmix.warmup"]["first"] > 0
    text = capsys.readouterr().out
    assert "first call, warm disk cache" in text
    assert "not measured: torch.compile: there is no C++ compiler" in text


@pytest.mark.slow
def test_cold_starts_that_fail_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cold, "plan", lambda gpu: (["ops", "warmup"], {}))
    monkeypatch.setattr(cold, "CHILD", "import sys, time\nif sys.argv[1] == 'ops': raise OSError('no disk')\ntime.sleep(60)")
    assert cold.main(["--budget", "2", "--json", str(tmp_path / "cold.json")]) == 1
    missing = json.loads((tmp_path / "cold.json").read_text())["missing"]
    assert missing["ops, empty caches"] == "OSError: no disk"
    assert missing["warmup, warm caches"] == "out of time"


def test_what_cold_leaves_out(monkeypatch):
    monkeypatch.setitem(cold.peers.MISSING, "torch.compile", "needs a C++ compiler")
    assert cold.plan(False) == (["ops", "warmup"], {"torch.compile": "needs a C++ compiler"})
    assert cold.plan(True) == (["ops", "warmup", "compile"], {})


# What would break on a GPU, shown without one


@pytest.mark.no_poison
@pytest.mark.parametrize("op", ["mix", "loss"])
def test_programs_of_tensors_that_are_not_the_hosts(op):
    """Whether indices are looked at is asked on the way into every op: that question must not break a traced program."""
    import torch

    import fastmix

    x, index = torch.empty(4, 6, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    calls = {"mix": lambda: fastmix.mix(x, x[:, 0], index), "loss": lambda: fastmix.soft_cross_entropy(x, index)}
    torch._dynamo.reset()
    with fastmix.backend("torch"):
        result = torch.compile(calls[op], backend="eager", fullgraph=True)()
    assert result.shape == ((4, 6) if op == "mix" else ())


# Kernels compiled ahead


AHEAD = """
import os, sys
from fastmix.bench import compile
os.environ["TRITON_CACHE_DIR"] = folder = sys.argv[2]
found = compile.unpack(sys.argv[1], folder)
compiled = []
for name in ("sanitize mix [3, 5003]", "sanitize mix [6, 1100]"):
    assert not compile.compile_calls("90", [call for call in compile.calls() if name in call])
    compiled.append(compile.compiled_here(folder))
print(found["programs"], found["same Triton"], *compiled)
"""


@pytest.mark.slow
def test_kernels_compiled_ahead_are_found(tmp_path):
    if not TRITON:
        pytest.skip(NO_TRITON)
    run = {"env": gpu._environment(), "capture_output": True, "text": True, "check": True}
    command = [sys.executable, "-m", "fastmix.bench", "compile", "--out", str(tmp_path / "made" / "cache.tar.gz")]
    said = subprocess.run([*command, "--case", "sanitize mix [3, 5003]"], **run).stdout
    programs = int(re.search(r"(\d+) programs for sm_90", said)[1])
    child = [sys.executable, "-c", AHEAD, str(tmp_path / "made" / "cache.tar.gz"), str(tmp_path / "another")]
    found = subprocess.run(child, **run).stdout.split()
    assert found[:3] == [str(programs), "True", "0"]
    assert programs > 0
    assert int(found[3]) > 0


TRITONS = os.environ.get(
    "FASTMIX_TRITONS", ""
).split()  # Pythons, or folders with commas between them that come before the others


@pytest.mark.slow
@pytest.mark.parametrize("where", TRITONS or [None])
def test_kernels_compile_on_other_tritons(where):
    """Everything that bench compile knows, for one architecture; it takes minutes for each."""
    if where is None:
        pytest.skip("needs other Tritons, named by FASTMIX_TRITONS")
    python = where if pathlib.Path(where).is_file() else sys.executable
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*where.split(",") * (python != where), str(ROOT)])}
    ran = subprocess.run([python, "-m", "fastmix.bench", "compile"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_cache_for_the_parts(command, tmp_path):
    if not TRITON:
        pytest.skip(NO_TRITON)
    from fastmix.bench import compile

    look = "import json, os, sys; json.dump({'at': os.environ.get('TRITON_CACHE_DIR')}, open(sys.argv[1], 'w'))"
    (tmp_path / "empty").mkdir()
    compile.pack(tmp_path / "empty", tmp_path / "cache.tar.gz", "90")
    before = os.environ.get("TRITON_CACHE_DIR")
    code, result, text = command({"part": part(look)}, "--cache", str(tmp_path / "cache.tar.gz"))
    assert code == 0
    assert "fastmix-cache-" in result["parts"]["part"]["found"]["at"]
    assert os.environ.get("TRITON_CACHE_DIR") == before
    assert (result["cache"]["programs"], result["cache"]["compiled"], result["cache"]["same Triton"]) == (0, 0, True)
    assert "cache: 0 programs were compiled here" in text
    (tmp_path / "nonsense").write_text("nonsense")
    code, result, text = command({"part": part(look)}, "--cache", str(tmp_path / "nonsense"))
    assert (code, result["parts"]["part"]["status"]) == (0, "passed")  # the run is worth more than its cache
    assert "ReadError" in result["cache"]["problem"]
