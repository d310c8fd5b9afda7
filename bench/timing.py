"""Clocks and meters: seconds and bytes throughout."""

import functools
import itertools
import os
import statistics
import subprocess
import tempfile
import time

import torch
from torch.profiler import ProfilerActivity, profile

COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
FLUSH_BYTES = 2**28  # several times any L2
CYCLES = 2e9  # of the device in a second, or somewhat fewer


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call, device):
    """Wall time of one call, its work on the device included and its result freed; nothing else is under way there."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def copy_speed(device):
    """Bytes per second, read and written, of a copy that no cache holds: the best of ten."""
    size = COPY_BYTES[device.type]
    source, out = torch.ones(2, size // 4, device=device)
    copy = functools.partial(out.copy_, source)
    seconds(copy, device)
    return 2 * size / min(seconds(copy, device) for _ in range(10))


def host_seconds(call, device, calls=30):
    """What one call costs the host, of many that are issued without waiting. On the CPU that is all of the call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    end = time.perf_counter()
    synchronize(device)
    return (end - start) / calls


def device_seconds(prepare, device, budget=0.04):
    """The device's median time for the call that prepare() gives, between CUDA events, with the L2 cache flushed before each. The device
    is kept busy until the host has issued it all, so that gaps between launches do not count."""
    once = seconds(prepare(), device)
    ahead = 2 * host_seconds(prepare(), device, calls=1) + 2e-5
    flush = torch.zeros(FLUSH_BYTES // 4, device=device)
    pairs = []
    for _ in range(min(max(int(budget / (ahead + once + 1e-4)), 5), 50)):
        call = prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.amax()  # read, not written: what is written is carried to memory later, within what is timed
        torch.cuda._sleep(int(ahead * CYCLES))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


class Clocks:
    """What nvidia-smi says of the GPU while others measure: a process of its own asks twice a second."""

    FIELDS = {"SM MHz": "clocks.sm", "memory MHz": "clocks.mem", "degrees C": "temperature.gpu", "W": "power.draw"}
    REASONS = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat, by hardware", 0x80: "power brake"}

    def __init__(self):
        query = ",".join([*self.FIELDS.values(), "clocks_throttle_reasons.active"])
        command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--loop-ms=500"]
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        try:
            self.process = subprocess.Popen(command, stdout=self.said, stderr=subprocess.DEVNULL)
        except OSError:
            self.process = None

    def now(self):
        """{"SM MHz", "memory MHz", "degrees C", "W", "slowed by" (reasons)} of the last half second, or nothing."""
        size = os.fstat(self.said.fileno()).st_size
        lines = os.pread(self.said.fileno(), 1000, max(size - 1000, 0)).decode().split("\n")[:-1]  # the last is being written
        try:
            *values, reasons = lines[-1].split(", ")
            found = {name: float(value) for name, value in zip(self.FIELDS, values, strict=True)}
            return {**found, "slowed by": [text for bit, text in self.REASONS.items() if int(reasons, 16) & bit]}
        except (IndexError, ValueError):  # none yet, or "[N/A]"
            return {}

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.said.close()


def graph_seconds(call, milliseconds=20):
    """The device's time for a call within a CUDA graph of many: without launch gaps, and with what the L2 holds."""
    import triton.testing

    return triton.testing.do_bench_cudagraph(call, rep=milliseconds, return_mode="median") / 1e3


def peak_bytes(call, device):
    """The most memory that a call holds at one time, above what was held before it; its results count. On a GPU the allocator's
    statistics tell; on the CPU torch's profiler, which records every allocation of torch's, those inside operators too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its chatter, not its errors
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes), default=0)
