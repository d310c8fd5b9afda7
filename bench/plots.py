"""Pictures of a result: how much longer others take, and time against size beside the floor."""

import math
import pathlib
import re

import matplotlib
from matplotlib import ticker

from fastmix.bench.results import describe, ratio_of, time_of

matplotlib.use("Agg")
OURS, OTHERS = "#1b6ca8", ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#5c4d42", "#2e4057", "#b8b8b8", "#c97b84", "#7a9e7e")


def draw(result, folder):
    """Writes the pictures of a result as PNG and SVG, and returns their paths."""
    import matplotlib.pyplot as plt

    folder, paths = pathlib.Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if "reason" not in row]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        others = [way for way in dict.fromkeys(row["way"] for row in own) if way != "fastmix"]
        colours = {"fastmix": OURS, **{way: OTHERS[k % len(OTHERS)] for k, way in enumerate(others)}}
        for kind, picture in (("speedup", bars), ("size", sizes)):
            if figure := picture(own, colours, result):
                figure.suptitle(f"{suite}\n{describe(result['machine'])}", fontsize=9)
                for ending in ("png", "svg"):
                    paths.append(folder / f"{re.sub('[^a-z]+', '-', suite.lower())}-{kind}.{ending}")
                    figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
    plt.close("all")
    return paths


def bars(rows, colours, result):
    """A bar for each way of each group: its time over fastmix's."""
    import matplotlib.pyplot as plt

    groups: dict = {}
    for row in rows:
        if row["way"] not in ("fastmix", "copy") and ratio_of(row) and row.get("compared", True):
            groups.setdefault(row["group"], []).append(row)
    if not groups:
        return None
    count = sum(map(len, groups.values())) + len(groups)
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.24 * count), layout="constrained")
    start, ticks = 0, {}
    for group, ways in groups.items():
        ticks[group] = start + (len(ways) - 1) / 2
        for at, row in enumerate(ways, start):
            bar = axes.barh(at, ratio_of(row) - 1, left=1, height=0.85, color=colours[row["way"]], label=row["way"])
            axes.bar_label(bar, [f"{ratio_of(row):.2f}"], padding=3, fontsize=7)
        start += len(ways) + 1
    axes.axvline(1, color=OURS, linewidth=1.5)
    axes.set(xscale="log", xlabel="time over fastmix's (right of the line fastmix is faster)")
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=8)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    finish(axes, axes.xaxis)
    return figure


def sizes(rows, colours, result):
    """Time against the bytes that must be moved, a panel for each title and dtype with three sizes or more; the floor is a copy."""
    import matplotlib.pyplot as plt

    panels: dict = {}
    for row in rows:
        if row.get("bytes"):
            panels.setdefault((row["title"], row["dtype"]), []).append(row)
    panels = {key: own for key, own in panels.items() if len({row["bytes"] for row in own}) >= 3}
    if not panels:
        return None
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(down, across, figsize=(5 * across, 4 * down), squeeze=False, layout="constrained")
    for panel, ((title, dtype), own) in zip(axes.flat, panels.items(), strict=False):
        megabytes = sorted({row["bytes"] / 1e6 for row in own})
        floor = [size / result["copy GB/s"] for size in megabytes]
        panel.plot(megabytes, floor, "--", color="black", label="floor: bytes / copy bandwidth")
        for way in dict.fromkeys(row["way"] for row in own):
            points = sorted((row["bytes"] / 1e6, time_of(row) * 1e3) for row in own if row["way"] == way)
            panel.plot(*zip(*points, strict=True), "o-", color=colours[way], label=way, linewidth=1 + (way == "fastmix"))
        panel.set(xscale="log", yscale="log", xlabel="MB that must be read and written", ylabel="ms", title=f"{title}, {dtype}")
        finish(panel, panel.xaxis, panel.yaxis)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    return figure


def finish(axes, *logarithmic):
    """Plain numbers on logarithmic axes, and a legend that names every way once."""
    for axis in logarithmic:
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(handles.values(), handles, fontsize=7, loc="best")
