"""Pictures of a result: how much longer others take, and time against size beside the floor; and those of docs/."""

import collections
import math
import pathlib
import re

from matplotlib import ticker
from matplotlib.figure import Figure

from fastmix.bench.results import STEADY, describe, ratio_of, steady_others, time_of


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
    ratios = [ratio_of(row) for row in rows]
    wide = max(ratios) > 4 * min(ratios)
    axes.set(xscale="log" if wide else "linear", xlabel="time over fastmix's (right of the line fastmix is faster)")
    axes.margins(x=0.1)
    axes.set_yticks(range(len(rows)), [f"{row['group']}: {row['way']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    if wide:
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


# The pictures of docs/: PNG alone, on a white ground, as wide as the text


def overview(result, folder):
    """Writes cases.png, each case's fastest other way beside fastmix, and steps.png, whole training steps; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = {}
    for ours, best in steady_others(result["rows"])[0].values():
        if ours["suite"] != "step":
            cases.setdefault(ours["suite"], []).append(ratio_of(best))
    figures = {"cases": dots(cases)} if cases else {}
    steps = [dict(row) for row in result["rows"] if row["suite"] == "step" and row.get("spread", 1) <= STEADY]
    ours = {row["group"] for row in steps if row["way"] == "fastmix"}
    steps = [row for row in steps if row["group"] in ours]
    for row in steps:
        row |= {"group": row["title"], "way": row["way"].replace("plain step", "plain step, not mixed")}
    if picture := bars(steps, dict.fromkeys((row["way"] for row in steps), "C0"), None):
        figures["steps"] = picture
    for figure in figures.values():
        figure.suptitle(describe(result["machine"]), fontsize=8)
    return [_saved(figure, folder / f"{name}.png") for name, figure in figures.items()]


def dots(cases):
    """A line for each suite {suite: ratios}, with a dot for each of its cases."""
    figure = Figure(figsize=(7.2, 1.2 + 0.32 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for at, ratios in enumerate(cases.values()):
        axes.scatter(ratios, [at] * len(ratios), c=["C0" if ratio >= 1 else "C1" for ratio in ratios], linewidths=0)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log")
    axes.set_xlabel("time of the fastest other way over fastmix's (right of the line fastmix is faster)", fontsize=9)
    axes.set_yticks(range(len(cases)), list(cases))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    plain_numbers(axes.xaxis)
    return figure


def launches(counts, path):
    """Writes a picture of {call: (launches before, launches now)}."""
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(counts)), layout="constrained")
    axes = figure.subplots()
    for offset, (name, color) in zip(
        (-0.2, 0.2), (("torch's operators, before", "C7"), ("fastmix's kernels", "C0")), strict=True
    ):
        values = [count[offset > 0] for count in counts.values()]
        axes.bar_label(axes.barh([at + offset for at in range(len(counts))], values, 0.38, color=color, label=name), padding=3)
    axes.set_yticks(range(len(counts)), [call.replace("`", "") for call in counts])
    axes.set(xlabel="launches of a call", xlim=(0, 1.1 * max(map(max, counts.values()))))
    axes.invert_yaxis()
    axes.legend()
    return _saved(figure, path)


def floors(rows, path):
    """Writes a picture of rows (method, bytes over the floor forward, backward or None)."""
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for offset, (name, column) in zip((-0.2, 0.2), (("forward", 1), ("backward", 2)), strict=True):
        ends = [(at + offset, row[column]) for at, row in enumerate(rows) if row[column]]
        axes.bar_label(axes.barh(*zip(*ends, strict=True), 0.38, label=name), fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set(xlabel="bytes that the kernels touch, over the floor (line)", xlim=(0, 2.4))
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    return _saved(figure, path)


def errors(rows, path):
    """Writes a picture of the results of `bench numerics`: the largest error of each op and dtype over its limit, ours and eager
    torch's in the same dtype."""
    largest = {}
    for row in rows:
        key = row["dtype"], row["op"]
        for way in ("fastmix", "usual"):
            if row["limit"] and isinstance(row[way], (int, float)):
                found = largest.setdefault(key, {})
                found[way] = max(found.get(way, 0), row[way] / row["limit"])
    dtypes = list(dict.fromkeys(dtype for dtype, _ in largest))
    ops = list(dict.fromkeys(op for _, op in largest))
    figure = Figure(figsize=(7.2, 1.2 + 0.24 * len(ops) * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        own = [op for op in ops if (dtype, op) in largest]
        for way, name, color in (("usual", "eager torch", "C7"), ("fastmix", "fastmix", "C0")):
            points = [(largest[dtype, op][way], at) for at, op in enumerate(own) if largest[dtype, op].get(way)]
            axes.scatter(*zip(*points, strict=True), color=color, label=name, zorder=3)
        axes.axvline(1, color="C3")
        axes.set(xscale="log", title=dtype)
        axes.set_yticks(range(len(own)), own, fontsize=8)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    panels[-1].set_xlabel("largest error over the promised limit (red line), against float64")
    return _saved(figure, path)


def _saved(figure, path):
    """Writes a picture of 128 colours, a third of the bytes of a full one, and returns its path."""
    from PIL import Image

    figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def plain_numbers(*logarithmic):
    for axis in logarithmic:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())
