"""How everything here is timed.

A way's results are compared with the float64 oracle on few rows, and again on rows of the very call that is timed. Then it is called
for a fixed time, its results freed and the device waited for in every round, and the median counts. Its ratio to fastmix comes from
calls in turn. What the machine can do is the best of a large copy in the same run. On a GPU the device's own time is taken as well,
between events with the L2 cache flushed and all work issued ahead, for short calls within a CUDA graph too, and what a call costs the
host. On the CPU all of it runs in one thread unless OMP_NUM_THREADS says otherwise, since threads that wait for each other stall by
more than what is measured.

A library that is not installed, and a way that fails or is wrong, is a row that says so; only fastmix being wrong is an error.
"""

import os
import statistics
import time
from functools import partial

import pytest
import torch

from fastmix.bench import peers, results, timing
from fastmix.bench.case import BACKWARD, OpCase
from fastmix.bench.samples import name_of

GPU = torch.cuda.is_available()
SECONDS = 0.1 if GPU else 0.4  # for each way
LONGEST = 30 if GPU else 120  # seconds for a row, compilation included
ROUNDS = (7, 100)
RECOMPILED = 12  # rounds, after which torch.compile has given up a program that it compiles for every lambda
SHORT = 1e-4  # seconds on the device, below which launch gaps show


@pytest.fixture(scope="session")
def device():
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def result(request, device):
    """What this run has measured, written to its file after every row."""
    result = request.config.result
    result["copy GB/s"] = timing.copy_speed(device) / 1e9
    return result


@pytest.fixture(scope="session")
def clocks():
    """clocks(): those of the GPU in this moment, and what slows it."""
    found = timing.Clocks() if GPU else None
    yield found.now if found else dict
    if found:
        found.close()


@pytest.fixture
def measure(benchmark, device, result, clocks):
    """measure(case, the name of one of its ways): a row of the result, with figures or with the reason why there are none."""

    def add(row, reason=None):
        result["rows"].append(row if reason is None else {**row, "reason": reason})
        results.save(result)

    def measure(case, name):
        row = {"suite": case.suite, "title": case.title, "shape": list(case.shape), "dtype": name_of(case.dtype)}
        row |= {"group": case.group, "way": name, **({"compared": False} if case.part else {})}
        if case.ways[name] is None:
            library = peers.needed(name)
            add(row, f"missing: {library}: {peers.MISSING[library]}")
            pytest.skip(f"needs {library}")
        try:
            row |= {**_figures(case, name, benchmark, device, result), **clocks()}
        except (Exception, pytest.fail.Exception) as error:  # the second is pytest-timeout's
            reason = f"{'wrong' if isinstance(error, AssertionError) else type(error).__name__}: {peers.first_line(error)}"
            add(row, reason)
            if name.startswith("fastmix"):
                raise
            pytest.skip(reason)
        benchmark.group = case.group
        benchmark.extra_info.update(row)
        add(row)

    return measure


def _figures(case, name, benchmark, device, result):
    """Compares a way with the oracle, and times it in turn with the ways beside it."""
    compiled = "compiled" in name or "compiled" in case.title
    if not (compiled and isinstance(case, OpCase)):  # few rows would be another program: `compare_timed` looks at the one timed
        with torch.random.fork_rng(devices=[]):
            case.compare(name, device)
    inputs = case.inputs(device)
    prepared = {key: partial(_prepared, *case.call(key, inputs)) for key in dict.fromkeys([*case.beside, name])}
    clock = partial(timing.host_seconds if case.calls > 1 else timing.seconds, device=device)
    case.compare_timed(name, inputs, prepared[name]()())
    for _ in range(RECOMPILED if case.draws and compiled else 2):  # the first rounds compile
        warm = sum(clock(prepare()) for prepare in prepared.values())
    times = {key: [] for key in prepared}

    def setup():
        for key in case.beside:
            if key != name:
                times[key].append(clock(prepared[key]()))
        return (prepared[name](),), {}

    rounds = min(max(int(SECONDS / warm), ROUNDS[0]), ROUNDS[1])
    benchmark.pedantic(lambda call: times[name].append(clock(call)), setup=setup, rounds=rounds)
    if not benchmark.enabled:
        pytest.skip("benchmarks are turned off")
    low, median, high = statistics.quantiles(times[name], n=4)
    found = {"seconds": median, "spread": (high - low) / median, "rounds": rounds}
    found |= {f"time / {key}": median / statistics.median(times[key]) for key in case.beside}
    if case.calls == 1:
        found["peak bytes"] = timing.peak_bytes(prepared[name](), device)
        if case.kept:
            found["peak / floor"] = found["peak bytes"] / case.kept
        if device.type == "cuda" and case.suite != "step":
            found |= _on_device(case, name, prepared[name], result, device)
    if case.moved:
        speed = case.moved / results.time_of(found) / 1e9
        found |= {"bytes": case.moved, "GB/s": speed, "of copy": speed / result["copy GB/s"]}
    return found


def _prepared(setup, call):
    """One timed call, after its set-up."""
    return partial(call, *setup())


def _on_device(case, name, prepare, result, device):
    """The device's own time for a call and the host's."""
    found = {"device seconds": timing.device_seconds(prepare, device)}
    if found["device seconds"] < 10 * SHORT:  # else the queue fills and the host waits
        found["host seconds"] = timing.host_seconds(prepare(), device, 1 if case.mode == BACKWARD else 30)
    short = case.moved / 1e9 / result["copy GB/s"] < SHORT  # of the whole group, however slow one way is
    if short and not case.draws and case.mode != BACKWARD and not name.startswith("Liger"):  # which waits for the device
        try:
            found["graph seconds"] = timing.graph_seconds(prepare())
        except Exception as error:  # a capture that is refused must not end the measurement
            found["graph reason"] = peers.first_line(error)
    for other in [*result["rows"], {"group": case.group, "way": name, **found}]:
        if (other["group"], other["way"]) == (case.group, "fastmix") and "device seconds" in other:
            found["device time / fastmix"] = found["device seconds"] / other["device seconds"]
    return found


# What is run


def pytest_addoption(parser):
    """What run.py explains and passes on; `--suites` are those of bench_ops.py, separated by commas."""
    parser.addoption("--all", action="store_true")
    parser.addoption("--budget", type=float, default=float("inf"))
    for name in ("--suites", "--result"):
        parser.addoption(name, default="")


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    module, suites = metafunc.module, metafunc.config.option.suites.split(",")
    listed = [module.ALL] * (metafunc.config.option.all or GPU) + [module.LAPTOP] * (not GPU)
    cases = [case for cases in listed for case in (cases if isinstance(cases, list) else sum(map(cases.get, suites), []))]
    unique = {case.group: case for case in reversed(cases)}
    pairs = [(case, name) for case in reversed(unique.values()) for name in case.ways]
    ids = [f"{case.title} {'x'.join(map(str, case.shape))} {name_of(case.dtype)}, {name}" for case, name in pairs]
    metafunc.parametrize(("case", "name"), pairs, ids=ids)


def pytest_collection_modifyitems(items):
    """The first groups of all suites first and compiled ways last: what a budget leaves out are the last ones of each."""
    groups: dict = {}
    for item in items:
        case = item.callspec.params["case"]
        groups.setdefault(case.suite, {}).setdefault(case.group, len(groups[case.suite]))

    def rank(item):
        case, name = item.callspec.params["case"], item.callspec.params["name"]
        return (case.late or "compiled" in name) + groups[case.suite][case.group] / len(groups[case.suite])

    items.sort(key=rank)


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark and pytest-timeout read it
def pytest_configure(config):
    config.option.benchmark_quiet = True
    config.option.timeout = config.option.timeout or LONGEST
    config.result = results.new(config.option.result, peers.MISSING)
    config.ends = time.monotonic() + config.option.budget


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.ends:
        asked = item.callspec.params
        item.config.result["not run"].append({"group": asked["case"].group, "way": asked["name"]})
        pytest.skip("out of time")


def pytest_terminal_summary(terminalreporter, config):
    results.save(config.result)
    if config.result["rows"]:
        terminalreporter.ensure_newline()
        results.show(config.result)
