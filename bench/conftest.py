"""How everything here is timed.

A way's results are first held to the float64 oracle. Then it is called for a fixed time, its results freed and the device
waited for in every round, and the median counts. Its ratio to fastmix comes from calls in turn, one of fastmix before each of
its own, so that both meet the same machine. What the machine can do is the best of a large copy in the same session. On a
GPU the device's own time is taken as well, between events with the L2 cache flushed and, for what is short, within a CUDA
graph, and what a call costs the host.

On the CPU all of it runs in one thread unless OMP_NUM_THREADS says otherwise: on a machine with anything else to do, threads
that wait for each other stall by more than what is measured.

A library that is not installed, and a way that fails or is wrong, is a row that says so; only fastmix being wrong is an error.
"""

import os
import statistics
import time
from functools import partial

import pytest
import torch

from fastmix.bench import peers, results, timing

SECONDS = {"cpu": 0.4, "cuda": 0.1}  # for each way
ROUNDS = (7, 100)
RECOMPILED = 12  # rounds, after which torch.compile has given up a program that it compiles for every lambda
SHORT = 1e-4  # seconds on the device, below which launch gaps show


@pytest.fixture(scope="session")
def device():
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def result(request, device):
    """What this session has measured, written to its file after every row."""
    result = request.config.result
    result["copy GB/s"] = timing.copy_speed(device) / 1e9
    return result


def _prepared(case, name, arguments):
    """() -> what one timed call is"""
    setup, call = case.call(name, arguments)
    return (lambda: partial(call, *setup()[0])) if setup else (lambda: call)


@pytest.fixture
def measure(request, benchmark, device, result):
    """measure(case, the name of one of its ways)"""

    def measure(case, name):
        reason = None
        ours = name.startswith("fastmix")
        row = {
            "suite": case.suite, "title": case.title, "shape": list(case.shape), "dtype": results.name_of(case.dtype),
            "group": case.group, "way": name,
        }  # fmt: skip
        if case.ways[name] is None:
            library = peers.needed(name)
            reason = f"missing: {library}: {peers.MISSING[library]}"
        else:
            try:
                with torch.random.fork_rng(devices=[]):
                    case.hold(name, device)
            except Exception as error:
                if ours:
                    raise
                lines = str(error).splitlines() or [""]
                reason = f"{'wrong' if isinstance(error, AssertionError) else type(error).__name__}: {lines[0]}"
        if reason:
            results.add(request.config, {**row, "reason": reason})
            pytest.skip(reason)

        if name.endswith("compiled"):
            torch._dynamo.reset()  # or it would compile for varying sizes, having seen the check's
        arguments = case.arguments(None, device)
        prepared = {key: _prepared(case, key, arguments) for key in dict.fromkeys([*case.beside, name])}
        clock = partial(timing.host_seconds if case.calls > 1 else timing.seconds, device=device)
        for _ in range(RECOMPILED if case.draws and name.endswith("compiled") else 2):  # the first rounds compile
            warm = sum(clock(prepare()) for prepare in prepared.values())
        beside = {key: [] for key in case.beside}

        def setup():
            for key in beside:
                if key != name:
                    beside[key].append(clock(prepared[key]()))
            return (prepared[name](),), {}

        benchmark.group = case.group
        rounds = min(max(int(SECONDS[device.type] / warm), ROUNDS[0]), ROUNDS[1])
        own = []
        benchmark.pedantic(lambda call: own.append(clock(call)), setup=setup, rounds=rounds)
        if not benchmark.enabled:
            return
        low, median, high = statistics.quantiles(own, n=4)
        row |= {"seconds": median, "spread": (high - low) / median, "rounds": rounds}
        for key, times in beside.items():
            row[f"time / {key}"] = median / statistics.median(times) if times else 1.0
        speed = None
        if case.calls == 1:
            row |= _memory(prepared[name](), device)
        if case.moved:
            row["bytes"], speed = case.moved, case.moved / median
        if device.type == "cuda" and case.mode != "backward" and case.calls == 1:
            row |= _on_device(case, prepared[name](), row, result)
            speed = case.moved / row["device seconds"] if case.moved else None
        if speed:
            row |= {"GB/s": speed / 1e9, "of copy": speed / 1e9 / result["copy GB/s"]}
        benchmark.extra_info.update(row)
        results.add(request.config, row)

    return measure


def _memory(call, device):
    """Peak memory, and how often it holds the call's results."""
    kept = call()
    size = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(kept) if isinstance(t, torch.Tensor))
    del kept
    peak = timing.peak_bytes(call, device)
    return {"peak bytes": peak, "peak / result": peak / size if size > 4096 else None}


def _on_device(case, call, row, result):
    """The device's own time for a call and the host's."""
    found = {"device seconds": timing.device_seconds(call)}
    if found["device seconds"] < 10 * SHORT:  # else the queue fills and the host waits
        found["host seconds"] = timing.host_seconds(call, torch.device("cuda"))
    if found["device seconds"] < SHORT and not case.draws:
        try:
            found["graph seconds"] = timing.graph_seconds(call)
        except Exception as error:  # what a capture refuses is not a measurement's end
            found["graph reason"] = str(error).splitlines()[0]
    for other in result["rows"]:
        if other["group"] == row["group"] and other["way"] == "fastmix":
            found["device time / fastmix"] = found["device seconds"] / other["device seconds"]
    if row["way"] == "fastmix":
        found["device time / fastmix"] = 1.0
    return found


# What is run


def pytest_addoption(parser):
    group = parser.getgroup("fastmix")
    group.addoption("--all", action="store_true", help="large cases on a CPU too")
    group.addoption("--budget", type=float, default=float("inf"), help="start nothing new after so many seconds")
    group.addoption("--result", help="write all rows to this JSON file, after each one")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        everything = metafunc.config.option.all or torch.cuda.is_available()
        cases = (metafunc.module.ALL if everything else []) + ([] if torch.cuda.is_available() else metafunc.module.LAPTOP)
        cases = list({case.group: case for case in cases}.values())
        pairs = [(case, name) for case in cases for name in case.ways]
        ids = [f"{case.title} {results.size_of(case.shape)} {results.name_of(case.dtype)}, {name}" for case, name in pairs]
        metafunc.parametrize(("case", "name"), pairs, ids=ids)


def pytest_collection_modifyitems(items):
    """The first groups of all suites first: what a budget leaves out are the last ones of each."""
    groups = {}
    for item in items:
        if hasattr(item, "callspec"):
            known = groups.setdefault(item.callspec.params["case"].suite, {})
            known.setdefault(item.callspec.params["case"].group, len(known))

    def rank(item):
        case = item.callspec.params["case"] if hasattr(item, "callspec") else None
        return case.late + groups[case.suite][case.group] / len(groups[case.suite]) if case else 0

    items.sort(key=rank)


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads it
def pytest_configure(config):
    config.option.benchmark_quiet = True
    config.result = results.new(config.option.result)
    config.ends = time.monotonic() + config.option.budget


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.ends:
        item.config.result["not run"].append(item.callspec.id if hasattr(item, "callspec") else item.name)
        pytest.skip("out of time")


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fastmix"] = results.machine()


def pytest_terminal_summary(terminalreporter, config):
    results.save(config)
    if config.result["rows"]:
        terminalreporter.ensure_newline()
        results.show(config.result)
