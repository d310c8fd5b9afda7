"""How everything here is timed, and the closing table.

A way's results are first held to the float64 oracle. Then it is called for a fixed time, its results freed and the device
waited for in every round, and the median counts. Its ratio to fastmix comes from calls in turn, one of fastmix before each of
its own, so that both meet the same machine. What the machine can do is the best of a large copy in the same session.

On the CPU all of it runs in one thread unless OMP_NUM_THREADS says otherwise: on a machine with anything else to do, threads
that wait for each other stall by more than what is measured.

`--benchmark-json FILE` writes everything down; `--benchmark-verbose` brings pytest-benchmark's own table as well.
"""

import os
import statistics
import time
from functools import partial

import cpuinfo
import pytest
import torch

collect_ignore = ["static.py"]  # a program of its own that needs Triton
SECONDS = 0.4  # for each way
ROUNDS = (7, 100)
COPY_BYTES = 2**28
TOLERANCE = 2e-6  # of a row's largest value: 16 roundings of float32 or so


@pytest.fixture(scope="session")
def device():
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds(call, device):
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.fixture(scope="session")
def copy_speed(device):
    """Bytes per second, read and written, of a copy that no cache holds."""
    source, sink = torch.ones(2, COPY_BYTES // 4, device=device)
    return 2 * COPY_BYTES / min(_seconds(partial(sink.copy_, source), device) for _ in range(10))


def _forward_backward(way, g, leaf, *arguments):
    out = way(leaf, *arguments)
    return out.detach(), *torch.autograd.grad(out, leaf, g)


def _check(actual, expected):
    """A result against the oracle's, element by element, in units of the row's largest value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    rows = (len(expected), -1) if expected.dim() else (1, 1)
    error, size = ((t.abs().reshape(rows).amax(1)) for t in (actual.cpu() - expected, expected))
    assert bool((error <= TOLERANCE * size).all()), f"wrong by {float((error / size).max()):.2g} of a row's largest value"


@pytest.fixture
def measure(benchmark, device, copy_speed):
    """measure(group, name of one of the ways, ways, their arguments, results expected, bytes that anyone must move, upstream)

    With an upstream gradient the way is run forward and backward, and its results are its value and the gradient to its
    first argument."""

    def measure(group, name, ways, arguments, expected, moved, upstream=None):
        if upstream is not None:
            arguments[0].requires_grad_()
            ways = {key: partial(_forward_backward, way, upstream) for key, way in ways.items()}
        results = ways[name](*arguments)
        for actual, value in zip(results if upstream is not None else [results], expected, strict=True):
            _check(actual, value)
        del results, actual

        calls = [partial(ways[key], *arguments) for key in dict.fromkeys(["fastmix", name])]
        for _ in range(2):  # the first round compiles
            warm = sum(_seconds(call, device) for call in calls)
        beside = []
        benchmark.group = group
        benchmark.pedantic(
            _seconds,
            (calls[-1], device),
            setup=lambda: beside.extend(_seconds(call, device) for call in calls[:-1]),
            rounds=min(max(int(SECONDS / warm), ROUNDS[0]), ROUNDS[1]),
        )
        if benchmark.enabled:
            median = benchmark.stats.stats.median
            speed = moved / median
            benchmark.extra_info.update(
                {
                    "name": name,
                    "bytes": moved,
                    "GB/s": speed / 1e9,
                    "of copy bandwidth": speed / copy_speed,
                    "time / fastmix": median / statistics.median(beside) if beside else 1.0,
                }
            )

    return measure


def _machine():
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    cpu = cpuinfo.get_cpu_info().get("brand_raw", "unknown CPU")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
    }


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads it
def pytest_configure(config):
    config.option.benchmark_quiet = True
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")  # a wrong way fails once, not twice


def pytest_make_parametrize_id(val):
    return "x".join(map(str, val)) if isinstance(val, tuple) else None


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["fastmix"] = _machine()


def pytest_terminal_summary(terminalreporter, config):
    groups = {}
    for bench in config._benchmarksession.benchmarks:
        if bench.extra_info:
            groups.setdefault(bench.group, []).append(bench)
    if not groups:
        return
    write = terminalreporter.write_line
    terminalreporter.section("fastmix beside what people write by hand")
    machine = _machine()
    write(f"{machine.pop('device')}, " + ", ".join(f"{key} {value}" for key, value in machine.items()))
    write("Medians of this run alone, on this machine as busy as it was; float32. Ratios are of medians of calls in turn with")
    write("fastmix, so not quite of two rows here; above 1, fastmix took less time.")
    width = max(map(len, groups)) + 2
    for group, ways in groups.items():
        write(f"\n{group:<{width}}{'median ms':>10}{'spread':>8}{'GB/s':>8}{'of copy':>9}{'time / fastmix':>16}")
        for bench in ways:
            info, stats = bench.extra_info, bench.stats
            write(
                f"  {info['name']:<{width - 2}}{stats.median * 1e3:>10.3f}{stats.iqr / stats.median:>8.0%}"
                f"{info['GB/s']:>8.1f}{info['of copy bandwidth']:>9.0%}{info['time / fastmix']:>16.2f}"
            )
