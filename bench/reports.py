"""What pytest-reportlog has written so far, and a plugin for pytest-xdist: a worker whose CUDA context has died is replaced, since
every test that ran in it afterwards would fail as well.

    python -m pytest --report-log FILE -p fastmix.bench.reports
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
    count}, "running": tests that began and did not end}."""
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
    return {
        **{kind: counts[kind] for kind in ("passed", "failed", "skipped")},
        "failures": [{"test": test, "why": text} for test, text in failures.items()],
        "skips": dict(skips),
        "running": [test for test, outcome in outcomes.items() if outcome == "running"],
    }
