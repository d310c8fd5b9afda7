"""What a run has measured: the file that holds it and the table that shows it.

    {"machine": {...}, "commit": ..., "date": ..., "copy GB/s": ..., "rows": [...], "missing": {...}, "not run": [...],
     "load before": ..., "load after": ...}

A row has a suite, title, shape, dtype, group and way, and either a reason why it was not timed or its figures: seconds (the
median round, the device waited for), spread (interquartile range over median), "time / fastmix" (of calls in turn), bytes (the
floor), GB/s and "of copy" (that floor over the time, and over this machine's copy), "peak / floor" (peak memory over the size
of the results); on a GPU "device seconds" (events, cold L2), "graph seconds" (CUDA graph, warm L2), "host seconds" and "device
time / fastmix" too.
"""

import datetime
import os
import pathlib
import platform

import numpy
import torch

from fastmix.recipes._training import commit as commit
from fastmix.recipes._training import processor, write


def finite(value):
    """A value for JSON, which has no infinity and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def machine():
    """The hardware and the versions that a figure depends on."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    found = {"cpu": processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "gpu GB": round(gpu.total_memory / 1e9)}
        found |= {"multiprocessors": gpu.multi_processor_count, "L2": getattr(gpu, "L2_cache_size", None)}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton, "numpy": numpy.__version__}
    return {**found, "threads": torch.get_num_threads(), **versions, "cuda": torch.version.cuda or torch.version.hip}


def now():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def new(path, missing):
    head, changed = commit()
    found = {"commit": head, "changed": changed, "date": now(), "load before": load(), "rows": [], "missing": missing}
    return {**found, "not run": [], "path": path}


def load():
    """How many programs wanted a processor, on average of the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def save(result):
    result |= {"machine": machine(), "load after": load()}
    if result["path"]:
        write(pathlib.Path(result["path"]), {key: value for key, value in result.items() if key != "path"})


def time_of(row):
    return row.get("device seconds") or row["seconds"]


def ratio_of(row):
    """A way's time over fastmix's: the device's own where that was taken."""
    return row.get("device time / fastmix") or row.get("time / fastmix")


def fastest_others(rows):
    """{group: (fastmix's row, the fastest other way's)} of groups that have both; a copy and a plain step mix nothing, and of a
    part of the work no comparison is made."""
    ours, others = {}, {}
    for row in rows:
        if "reason" in row or "way" not in row or not row.get("compared", True):
            continue
        if row["way"] == "fastmix":
            ours[row["group"]] = row
        elif not row["way"].startswith(("fastmix", "copy", "plain")) and ratio_of(row):
            others.setdefault(row["group"], []).append(row)
    return {group: (row, min(others[group], key=ratio_of)) for group, row in ours.items() if group in others}


# The table


def milliseconds(seconds):
    return f"{seconds * 1e3:.4f}" if seconds < 1e-3 else f"{seconds * 1e3:.3f}"


COLUMNS = {  # heading: (key, format)
    "median ms": ("seconds", milliseconds),
    "spread": ("spread", "{:.0%}".format),
    "device ms": ("device seconds", milliseconds),
    "graph ms": ("graph seconds", milliseconds),
    "host us": ("host seconds", lambda s: f"{s * 1e6:.0f}"),
    "GB/s": ("GB/s", "{:.1f}".format),
    "of copy": ("of copy", "{:.0%}".format),
    "peak / floor": ("peak / floor", "{:.2f}".format),
    "time / plain": ("time / plain step", "{:.3f}".format),
    "time / fastmix": ("time / fastmix", "{:.2f}".format),
    "device time / fastmix": ("device time / fastmix", "{:.2f}".format),
}


def describe(found):
    names = {"gpu": "{}", "cpu": "{}", "cores": "{} cores", "threads": "threads: {}"}
    names |= {"torch": "torch {}", "triton": "Triton {}"}
    return ", ".join(text.format(found[key]) for key, text in names.items() if found.get(key) is not None)


def show(result):
    """Ways side by side, group by group, and what is missing and why."""
    from fastmix.bench import screen  # rich, which `python -m fastmix` does without

    say, groups = screen.console.print, {}
    for row in result["rows"]:
        groups.setdefault((row["suite"], row["group"]), []).append(row)
    for (_, group), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        timed = [row for row in rows if "reason" not in row]
        used = {heading: found for heading, found in COLUMNS.items() if any(row.get(found[0]) is not None for row in timed)}
        say(f"\n{group}", style="cyan")
        if timed:
            cells = [[form(row[key]) if row.get(key) is not None else "" for key, form in used.values()] for row in timed]
            ways = [[row["way"].ljust(30), *figures] for row, figures in zip(timed, cells, strict=True)]
            screen.table(["", *used], ways, used, ["bold" if row["way"] == "fastmix" else None for row in timed])
        for row in rows:
            if "reason" in row:
                say(f"{row['way']:<30}  {row['reason']}", style="dim")
    say(f"\n{describe(result['machine'])}")
    if "copy GB/s" in result:
        copy = f"A large copy, read and written: {result['copy GB/s']:.1f} GB/s."
        say(f"{copy} Medians of this run alone, on a machine as busy as it was.")
    say("Ratios are of calls in turn with fastmix, so not quite of two rows here; above 1, fastmix took less time.")
    for library, reason in result["missing"].items():
        say(f"Missing: {library}: {reason}")
    if result["not run"]:
        say(f"Not run, out of time: {len(result['not run'])} of {len(result['not run']) + len(result['rows'])}")
