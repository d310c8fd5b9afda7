"""The GPU's tests where time is short: a plugin for pytest, and what pytest-reportlog has written so far.

    python -m pytest --report-log FILE -p fastmix.bench.reports [-n WORKERS --maxschedchunk 2]

What tells most runs first: tests that only a GPU can run, then one case of each test file and dtype, then one of each test. The names
of all tests are written to FILE.collected, so that those that never began are known. A worker of pytest-xdist whose CUDA context has
died is replaced, since every test that ran in it afterwards would fail as well.
"""

import collections
import json
import os
import pathlib
import re

import pytest

DEAD = re.compile(r"CUDA error|illegal memory access|device-side assert|unspecified launch failure|Triton Error \[CUDA\]")
_dead = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    seen: set = set()

    def rank(item):
        if any(mark.name == "gpu" for mark in [*getattr(item.function, "pytestmark", ()), *item.parent.iter_markers()]):
            return 0  # the test itself is marked, not only one of its devices
        params = getattr(getattr(item, "callspec", None), "params", {})
        kinds = (item.path, str(params.get("dtype"))), (item.path, item.function)
        new = [kind not in seen for kind in kinds]
        seen.update(kinds)
        return 1 if new[0] else 2 if new[1] else 3

    items[:] = [item for _, item in sorted([(rank(item), item) for item in items], key=lambda pair: pair[0])]


def _write_names(config, names):
    if config.option.report_log:
        pathlib.Path(f"{config.option.report_log}.collected").write_text(json.dumps(names))


def pytest_collection_finish(session):
    if "PYTEST_XDIST_WORKER" not in os.environ and session.items:
        _write_names(session.config, [item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    _write_names(node.config, list(ids))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    global _dead
    _dead = _dead or (report.failed and bool(DEAD.search(str(report.longrepr))))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    if _dead and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)


def why(report):
    """The first lines of what went wrong: the error itself, then where."""
    found = report.get("longrepr")
    if isinstance(found, dict) and found.get("reprcrash"):
        crash = found["reprcrash"]
        lines = [*crash["message"].splitlines()[:4], f"{os.path.basename(crash['path'])}:{crash['lineno']}"]
    elif isinstance(found, list):  # [path, line, reason] of a skip
        lines = [found[2].removeprefix("Skipped: ")]
    else:
        lines = str(found or "").strip().splitlines()[-3:]
    return "\n".join(line[:300] for line in lines)


def read(path):
    """What the file says so far: {"passed", "failed", "skipped" (counts), "failures": [{"test", "why"}], "skips": {reason:
    count}, "running": tests that began and did not end, "not begun": {test: count of its cases}}."""
    outcomes, failures, skips = {}, {}, collections.Counter()
    lines = pathlib.Path(path).read_text().splitlines() if os.path.exists(path) else []
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:  # the last line, half written
            continue
        test, outcome, when = report.get("nodeid"), report.get("outcome"), report.get("when", "call")
        if outcome == "failed":
            failures.setdefault(test, why(report))
        elif outcome == "skipped" and "wasxfail" not in report:
            skips[why(report)] += 1
        if report.get("$report_type") == "TestReport" and when != "teardown":
            passed = "passed" if "wasxfail" in report else outcome
            outcomes[test] = "running" if (when, outcome) == ("setup", "passed") else passed
    outcomes |= dict.fromkeys(failures, "failed")
    counts = collections.Counter(outcomes.values())
    names = pathlib.Path(f"{path}.collected")
    collected = json.loads(names.read_text()) if names.exists() else []
    return {
        **{kind: counts[kind] for kind in ("passed", "failed", "skipped")},
        "failures": [{"test": test, "why": text} for test, text in failures.items()],
        "skips": dict(skips),
        "running": [test for test, outcome in outcomes.items() if outcome == "running"],
        "not begun": dict(collections.Counter(test.partition("[")[0] for test in collected if test not in outcomes)),
    }
