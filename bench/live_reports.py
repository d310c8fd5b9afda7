"""A pytest plugin: every test's outcome is written to the file FASTMIX_REPORTS as soon as it is known, a line of JSON each,
so that a run that is killed still tells what it saw. With pytest-xdist too, where a worker whose CUDA context has died is replaced:
whatever ran in it afterwards would fail as well.

    FASTMIX_REPORTS=FILE python -m pytest -p fastmix.bench.live_reports

Lines are {"test", "outcome", "seconds", "why"}; "outcome" is "started", "passed", "failed", "skipped" or "error" (of a setup, a
teardown or a file).
"""

import json
import os
import re

import pytest

FILE = "FASTMIX_REPORTS"
DEAD = re.compile(r"CUDA error|illegal memory access|device-side assert|unspecified launch failure|Triton Error \[CUDA\]")
WORKER = "PYTEST_XDIST_WORKER"
_dead = False


def why(report):
    """The first lines of what went wrong: the error itself, then where."""
    crash = getattr(getattr(report, "longrepr", None), "reprcrash", None)
    if crash is not None:
        lines = [*crash.message.splitlines()[:4], f"{os.path.basename(crash.path)}:{crash.lineno}"]
    elif report.outcome == "skipped" and isinstance(report.longrepr, (tuple, list)):
        lines = [report.longrepr[2].removeprefix("Skipped: ")]
    else:
        lines = str(report.longrepr or "").strip().splitlines()[-3:]
    return "\n".join(line[:300] for line in lines)


def _write(**line):
    if FILE in os.environ and WORKER not in os.environ:
        with open(os.environ[FILE], "a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_runtest_logstart(nodeid):
    _write(test=nodeid, outcome="started")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    global _dead
    if report.when == "call" or report.outcome != "passed":
        outcome = "error" if report.failed and report.when != "call" else report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "passed" if report.skipped else "failed"
        _write(test=report.nodeid, outcome=outcome, seconds=report.duration, why="" if outcome == "passed" else why(report))
    if report.failed and DEAD.search(str(report.longrepr)):
        _dead = True


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    if _dead and WORKER in os.environ:
        os._exit(3)


def pytest_collectreport(report):
    if report.failed:
        _write(test=report.nodeid, outcome="error", seconds=0.0, why=why(report))


def read(path):
    """What the file says so far: {"passed", "failed", "skipped" (counts), "failures": [{"test", "why"}], "skips": {reason:
    count}, "running": tests that began and did not end, "slowest": [[seconds, test]]}."""
    ended, running, failures, skips = {}, {}, {}, {}
    try:
        with open(path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:  # the last line, half written
            continue
        test, outcome = report["test"], report["outcome"]
        if outcome == "started":
            running[test] = True
            continue
        running.pop(test, None)
        if outcome in ("failed", "error"):
            failures.setdefault(test, report["why"])
        elif outcome == "skipped":
            skips[report["why"]] = skips.get(report["why"], 0) + 1
        ended[test] = ("failed" if test in failures else outcome), report["seconds"]
    count = {kind: sum(outcome == kind for outcome, _ in ended.values()) for kind in ("passed", "failed", "skipped")}
    return {
        **count,
        "failures": [{"test": test, "why": text} for test, text in failures.items()],
        "skips": skips,
        "running": list(running),
        "slowest": sorted(((round(seconds, 2), test) for test, (_, seconds) in ended.items()), reverse=True)[:10],
    }
