"""Pictures of a result: how much longer others take, and time against size beside the floor."""

import collections
import math
import pathlib
import re

from matplotlib import ticker
from matplotlib.figure import Figure

from fastmix.bench.results import describe, ratio_of, time_of


def draw(result, folder):
    """Writes the pictures of a result as PNG and SVG, and returns their paths."""
    suites, paths = collections.defaultdict(list), []
    for row in result["rows"]:
        if "reason" not in row:
            suites[row["suite"]].append(row)
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for suite, rows in suites.items():
        ways = dict.fromkeys(["fastmix", *(row["way"] for row in rows)])
        colours = {way: f"C{number % 10}" for number, way in enumerate(ways)}
        for kind, picture in (("speedup", bars), ("size", sizes)):
            if figure := picture(rows, colours, result["copy GB/s"]):
                figure.suptitle(f"{suite}\n{describe(result['machine'])}", fontsize=9)
                for ending in ("png", "svg"):
                    paths.append(pathlib.Path(folder) / f"{re.sub('[^a-z]+', '-', suite.lower())}-{kind}.{ending}")
                    figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
    return paths


def bars(rows, colours, copy):
    """A bar for each way of each group: its time over fastmix's."""
    rows = [row for row in rows if row["way"] not in ("fastmix", "copy") and ratio_of(row) and row.get("compared", True)]
    if not rows:
        return None
    rows.sort(key=lambda row: row["group"])
    figure = Figure(figsize=(9, 1 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for at, row in enumerate(rows):
        bar = axes.barh(at, ratio_of(row) - 1, left=1, color=colours[row["way"]])
        axes.bar_label(bar, [f"{ratio_of(row):.2f}"], padding=3, fontsize=7)
    axes.axvline(1, color="C0")
    axes.set(xscale="log", xlabel="time over fastmix's (right of the line fastmix is faster)")
    axes.set_yticks(range(len(rows)), [f"{row['group']}: {row['way']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    plain_numbers(axes.xaxis)
    return figure


def sizes(rows, colours, copy):
    """Time against the bytes that must be moved, a panel for each title and dtype with three sizes or more; the floor is a copy."""
    panels = collections.defaultdict(list)
    for row in rows:
        if row.get("bytes"):
            panels[row["title"], row["dtype"]].append(row)
    panels = {key: own for key, own in panels.items() if len({row["bytes"] for row in own}) >= 3}
    if not panels:
        return None
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(5 * across, 4 * down), layout="constrained")
    for number, ((title, dtype), own) in enumerate(panels.items(), 1):
        axes, megabytes = figure.add_subplot(down, across, number), sorted({row["bytes"] / 1e6 for row in own})
        axes.plot(megabytes, [size / copy for size in megabytes], "--", color="black", label="floor: bytes / copy bandwidth")
        for way in dict.fromkeys(row["way"] for row in own):
            points = sorted((row["bytes"] / 1e6, time_of(row) * 1e3) for row in own if row["way"] == way)
            axes.plot(*zip(*points, strict=True), "o-", color=colours[way], label=way)
        axes.set(xscale="log", yscale="log", xlabel="MB that must be read and written", ylabel="ms", title=f"{title}, {dtype}")
        axes.legend(fontsize=7)
        plain_numbers(axes.xaxis, axes.yaxis)
    return figure


def plain_numbers(*logarithmic):
    for axis in logarithmic:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
