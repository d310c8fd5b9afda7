"""Pictures of a result: how much longer others take, and time against size beside the floor."""

import math
import pathlib
import re

import matplotlib

from fastmix.bench.results import describe, ratio_of, time_of

matplotlib.use("Agg")
OURS, OTHERS = "#1b6ca8", ("#d1495b", "#edae49", "#66a182", "#8d6a9f", "#5c4d42", "#2e4057", "#b8b8b8", "#c97b84", "#7a9e7e")


def draw(result, folder):
    """Writes the pictures of a result as PNG and SVG, and returns their paths."""
    folder, paths = pathlib.Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if "reason" not in row]
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        others = [way for way in dict.fromkeys(row["way"] for row in own) if way != "fastmix"]
        colours = {"fastmix": OURS, **{way: OTHERS[k % len(OTHERS)] for k, way in enumerate(others)}}
        for kind, figure in (("speedup", _bars(suite, own, colours, result)), ("size", _sizes(suite, own, colours, result))):
            for ending in ("png", "svg") if figure else ():
                paths.append(folder / f"{re.sub('[^a-z]+', '-', suite.lower())}-{kind}.{ending}")
                figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
    matplotlib.pyplot.close("all")
    return paths


def _bars(suite, rows, colours, result):
    """A bar for each way of each group: its time over fastmix's."""
    import matplotlib.pyplot as plt

    groups: dict = {}
    for row in rows:
        if row["way"] not in ("fastmix", "copy") and ratio_of(row) and row.get("compared", True):
            groups.setdefault(row["group"].removeprefix(f"{suite}, "), []).append(row)
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.24 * (sum(map(len, groups.values())) + len(groups))))
    start, ticks = 0, {}
    for group, ways in groups.items():
        ticks[group] = start + (len(ways) - 1) / 2
        for at, row in enumerate(ways, start):
            bar = axes.barh(at, ratio_of(row) - 1, left=1, height=0.85, color=colours[row["way"]], label=row["way"])
            axes.bar_label(bar, [f"{ratio_of(row):.2f}"], padding=3, fontsize=7)
        start += len(ways) + 1
    axes.axvline(1, color=OURS, linewidth=1.5)
    axes.set(xscale="log", xlabel="time over fastmix's (right of the line fastmix is faster)")
    low, high = axes.get_xlim()
    _ticks(axes.xaxis, low / 1.25, high * 1.25)
    axes.set_xlim(low / 1.25, high * 1.25)
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"{suite}\n{describe(result['machine'])}", fontsize=9)
    _legend(axes)
    return figure


def _sizes(suite, rows, colours, result):
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
    labels = {"xscale": "log", "yscale": "log", "xlabel": "MB that must be read and written", "ylabel": "ms"}
    for panel, ((title, dtype), own) in zip(axes.flat, panels.items(), strict=False):
        sizes = sorted({row["bytes"] / 1e6 for row in own})
        panel.plot(sizes, [s / result["copy GB/s"] for s in sizes], "--", color="black", label="floor: bytes / copy bandwidth")
        for way in dict.fromkeys(row["way"] for row in own):
            points = sorted((row["bytes"] / 1e6, time_of(row) * 1e3) for row in own if row["way"] == way)
            width = 2 if way == "fastmix" else 1
            panel.plot(*zip(*points, strict=True), "o-", color=colours[way], label=way, markersize=4, linewidth=width)
        panel.set(**labels)
        panel.set_title(f"{title}, {dtype}", fontsize=9)
        _ticks(panel.xaxis, *panel.get_xlim())
        _ticks(panel.yaxis, *panel.get_ylim())
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_visible(False)
    _legend(axes.flat[0])
    figure.suptitle(f"{suite}: time against size\n{describe(result['machine'])}", fontsize=9)
    return figure


def _ticks(axis, low, high):
    """Plain numbers on a logarithmic axis: 1, 2, 5, 10 over a short range, powers of ten over a long one."""
    short = (0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 7)
    digits = short if high / low < 3 else (1, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 1000 else (1,)
    steps = [digit * 10.0**power for power in range(-7, 8) for digit in digits if low <= digit * 10.0**power <= high]
    axis.set_ticks(steps, [f"{step:g}" for step in steps])
    axis.set_ticks([], minor=True)


def _legend(axes):
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(handles.values(), handles, fontsize=7, loc="best")
