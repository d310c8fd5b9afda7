"""The pictures of docs/: PNG alone, on a white ground, as wide as the text."""

from matplotlib import ticker
from matplotlib.figure import Figure

from fastmix.bench.results import STEADY, describe, ratio_of, steady_others


def overview(result, folder):
    """Writes cases.png, each case's fastest other way beside fastmix, and steps.png, whole training steps; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    cases: dict = {}
    for ours, best in steady_others(result["rows"])[0].values():
        if ours["suite"] != "step":
            cases.setdefault(ours["suite"], []).append(ratio_of(best))
    steps = [row for row in result["rows"] if row["suite"] == "step" and row.get("spread", 1) <= STEADY]
    ours = {row["group"] for row in steps if row["way"] == "fastmix"}
    steps = [row for row in steps if row["group"] in ours and row["way"] != "fastmix" and ratio_of(row)]
    figures = {name: draw(found) for name, draw, found in (("cases", dots, cases), ("steps", bars, steps)) if found}
    for figure in figures.values():
        figure.suptitle(describe(result["machine"]), fontsize=8)
    return [_saved(figure, folder / f"{name}.png") for name, figure in figures.items()]


def bars(rows):
    """A bar for each step: its time over fastmix's."""
    rows = sorted(rows, key=lambda row: row["title"])
    figure, axes = _lines(rows, 1, 0.24, 9)
    ratios = [ratio_of(row) for row in rows]
    for at, ratio in enumerate(ratios):
        axes.bar_label(axes.barh(at, ratio - 1, left=1, color="C0"), [f"{ratio:.2f}"], padding=3, fontsize=7)
    axes.axvline(1, color="C0")
    wide = max(ratios) > 4 * min(ratios)
    axes.set(xscale="log" if wide else "linear", xlabel="time over fastmix's (right of the line fastmix is faster)")
    axes.margins(x=0.1)
    names = [f"{row['title']}: {row['way'].replace('plain step', 'plain step, not mixed')}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    if wide:
        plain_numbers(axes.xaxis)
    return figure


def dots(cases):
    """A line for each suite {suite: ratios}, with a dot for each of its cases."""
    figure, axes = _lines(cases, 1.2, 0.32)
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


def pairs(rows, path, legend, fmt="%g", fontsize=None, line=None, place="best", **settings):
    """Writes a picture of rows {name: (first, second)}, two bars a name; None has no bar. legend: {what it shows: colour}."""
    figure, axes = _lines(rows, 0.9, 0.42)
    for column, (name, colour) in enumerate(legend.items()):
        ends = [(at + 0.4 * column - 0.2, values[column]) for at, values in enumerate(rows.values()) if values[column]]
        drawn = axes.barh(*zip(*ends, strict=True), 0.38, color=colour, label=name)
        axes.bar_label(drawn, fmt=fmt, padding=3, fontsize=fontsize)
    if line:
        axes.axvline(line, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(**settings)
    axes.invert_yaxis()
    axes.legend(loc=place)
    return _saved(figure, path)


def errors(rows, path):
    """Writes a picture of the results of `bench numerics`: the largest error of each op and dtype over its limit, ours and eager
    torch's in the same dtype."""
    largest: dict = {}
    for row in rows:
        for way in ("fastmix", "usual"):
            if row["limit"] and isinstance(row[way], (int, float)):
                found = largest.setdefault(row["dtype"], {}).setdefault(row["op"], {})
                found[way] = max(found.get(way, 0), row[way] / row["limit"])
    every = dict.fromkeys(op for found in largest.values() for op in found)
    figure = Figure(figsize=(7.2, 1.2 + 0.24 * len(every) * len(largest)), layout="constrained")
    panels = figure.subplots(len(largest), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (dtype, found) in zip(panels, largest.items(), strict=True):
        own = [op for op in every if op in found]
        for way, name, color in (("usual", "eager torch", "C7"), ("fastmix", "fastmix", "C0")):
            points = [(found[op][way], at) for at, op in enumerate(own) if found[op].get(way)]
            axes.scatter(*zip(*points, strict=True), color=color, label=name, zorder=3)
        axes.axvline(1, color="C3")
        axes.set(xscale="log", title=dtype)
        axes.set_yticks(range(len(own)), own, fontsize=8)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    panels[-1].set_xlabel("largest error over the promised limit (red line), against float64")
    return _saved(figure, path)


def _lines(names, height, each, width=7.2):
    """(figure, its axes) with room for a line for each name."""
    figure = Figure(figsize=(width, height + each * len(names)), layout="constrained")
    return figure, figure.subplots()


def _saved(figure, path):
    """Writes a picture of 128 colours, a third of the bytes of a full one, and returns its path."""
    from PIL import Image

    figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    return path


def plain_numbers(axis):
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(ticker.NullFormatter())
