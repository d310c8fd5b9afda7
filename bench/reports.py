"""What pytest-reportlog has written so far, and a plugin for pytest-xdist: a worker whose CUDA context has died is replaced, since
every test that ran in it afterwards would fail as well.

    python -m pytest --report-log FILE -p fastmix.bench.reports
"""

import json
import os
import pathlib
import re

import pytest

DEAD = re.compile(r"CUDA error|illegal memory access|device-side assert|unspecified launch failure|Triton Error \[CUDA\]")
_dead = False


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
    elif isinstance(found, (tuple, list)):
        lines = [str(found[2]).removeprefix("Skipped: ")]
    else:
        lines = str(found or "").strip().splitlines()[-3:]
    return "\n".join(line[:300] for line in lines)


def read(path):
    """What the file says so far: {"passed", "failed", "skipped" (counts), "failures": [{"test", "why"}], "skips": {reason:
    count}, "running": tests that began and did not end, "slowest": [[seconds, test]]}."""
    ended, running, failures, skips = {}, {}, {}, {}
    lines = pathlib.Path(path).read_text().splitlines() if os.path.exists(path) else []
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:  # the last line, half written
            continue
        test, outcome, when = report.get("nodeid"), report.get("outcome"), report.get("when", "call")
        if outcome == "failed":
            failures.setdefault(test, why(report))
        if report.get("$report_type") != "TestReport" and outcome != "failed":
            continue
        if when == "setup" and outcome == "passed":
            running[test] = True
            continue
        running.pop(test, None)
        outcome = "passed" if "wasxfail" in report else outcome
        if outcome == "skipped":
            skips[why(report)] = skips.get(why(report), 0) + 1
        if when != "teardown" or outcome != "passed":
            ended[test] = outcome, report.get("duration", 0.0)
    outcomes = ["failed" if test in failures else outcome for test, (outcome, _) in ended.items()]
    return {
        **{kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")},
        "failures": [{"test": test, "why": text} for test, text in failures.items()],
        "skips": skips,
        "running": list(running),
        "slowest": sorted(((round(seconds, 2), test) for test, (_, seconds) in ended.items()), reverse=True)[:10],
    }
