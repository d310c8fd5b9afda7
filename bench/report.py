"""The tables of docs/ and the plots, from the result files under bench/results and costs.json: no figure is typed by hand.

A result file is what `python -m fastmix.bench gpu` wrote on a machine, or `run --json` on one without a GPU. --add files it as
bench/results/GPU/COMMIT.json or bench/results/cpu/COMMIT.json, once and for all (the second of a commit as COMMIT-2.json); the newest
of each GPU and of a CPU is shown, with what it lacks. bench/results/smoke holds
results of its first part alone (every op against the oracle): there are no times in them. bench/results/recipes holds the
results.json of recipes (digits', toy's and ablation's without their curves by epoch), and numerics.json what `python -m fastmix.bench
numerics --json` wrote. The sentences of kernels.md, numerics.md and traps.md are written in these pages, and kept.
"""

import argparse
import ast
import functools
import importlib
import json
import pathlib
import re
import shutil
import sys

from fastmix.bench import claims
from fastmix.bench.results import STEADY, describe, fastest_others, milliseconds, ratio_of, steady_others, time_of

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- {}: made by `python -m fastmix.bench report` -->", "<!-- end {} -->"
NEEDED = {"machine": dict, "copy GB/s": float, "rows": list, "missing": dict, "not run": list, "date": str}
PICTURES = {
    "cases": "The fastest other way's time over fastmix's, a dot for each case",
    "steps": "Whole training steps: the time of other ways over fastmix's",
}
NO_CPU = "No timings of a CPU have been committed."
NONE = "No timings from a GPU have been committed yet, so no speed on a GPU is claimed."


def load(folder=RESULTS, *, gpu=True):
    """{GPU: (path, result)}: the newest result of each GPU; or of a CPU, which is named "cpu"."""
    others = ("recipes", "smoke", "cpu")
    paths = [path for path in folder.glob("*/*.json") if (path.parent.name not in others if gpu else path.parent.name == "cpu")]
    found = sorted(((path, json.loads(path.read_text())) for path in paths), key=lambda one: (one[1]["date"], one[0].name))
    return {path.parent.name: (path, result) for path, result in found}


def add(path, folder=RESULTS):
    """Files a result, which then stays as it is."""
    result = json.loads(pathlib.Path(path).read_text())
    lacking = [key for key, kind in NEEDED.items() if not isinstance(result.get(key), kind)]
    if lacking or not fastest_others(result["rows"]):
        raise ValueError(f"{path} lacks {', '.join(lacking) or 'anything to compare'}: its benchmark did not come so far")
    machine, commit = result["machine"], result.get("commit")
    device = machine.get("gpu") or ("cpu" if machine.get("cpu") else None)
    if not device or not commit or result.get("changed"):
        lacks = "no GPU and no CPU" if not device else "no commit" if not commit else "changes on top of its commit"
        raise ValueError(f"{path} has {lacks}: only what a named machine measured of a commit is filed")
    folder = folder / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    filed = list(folder.glob(f"{commit[:12]}*.json"))
    if any(json.loads(other.read_text()) == result for other in filed):
        raise ValueError(f"{path} is there already, and result files stay as they are")
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.copyfile(path, folder / f"{commit[:12]}{f'-{len(filed) + 1}' * bool(filed)}.json")


def _markdown(columns, rows):
    """Lines of a Markdown table; columns whose name begins with > are numbers."""
    yield "| " + " | ".join(column.lstrip(">") for column in columns) + " |"
    yield "|" + "|".join("---:" if column.startswith(">") else "---" for column in columns) + "|"
    yield from ("| " + " | ".join(map(str, row)) + " |" for row in rows)


def with_tables(page, *tables):
    """A page with other tables in the places of its own, in their order; None leaves one as it is."""
    parts = re.split(r"((?:^\|.*\n)+)", page, flags=re.MULTILINE)
    for place, lines in enumerate(tables):
        parts[2 * place + 1] = parts[2 * place + 1] if lines is None else "\n".join(lines) + "\n"
    return "".join(parts)


def table(result):
    """Lines of Markdown: for each group ours, and the fastest other way."""
    rows = []
    for group, (ours, best) in steady_others(result["rows"])[0].items():
        of_copy = f"{ours['of copy']:.0%}" if "of copy" in ours else ""
        absent = [row["way"] for row in result["not run"] if row["group"] == group]
        way = best["way"] + f" (not run: {'; '.join(absent)})" * bool(absent)
        rows.append([group, f"{milliseconds(time_of(ours))} ms", of_copy, way, f"{ratio_of(best):.2f}"])
    columns = ["what", ">fastmix", ">of copy bandwidth", "fastest other way", ">its time over ours"]
    if "gpu" not in result["machine"]:  # a CPU's caches serve part of it, and other programs slow the copy
        columns, rows = columns[:2] + columns[3:], [row[:2] + row[3:] for row in rows]
    yield from _markdown(columns, rows)


def checked(folder=RESULTS / "smoke"):
    """Lines of Markdown: on which GPUs every op has been held against the oracle."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        rows, versions = result["parts"]["smoke"]["smoke"], result["versions"]
        right = sum(row["verdict"] == "ok" for row in rows)
        ops, backends = (len({row[key] for row in rows}) for key in ("op", "backend"))
        where = (
            f"{result['gpu']['name']}, torch {versions['torch']}, Triton {versions['triton']}; commit {result['commit'][:12]}"
        )
        yield f"{ops} ops and their gradients against float64, {backends} backends, float32 and bfloat16: {right} of {len(rows)} results are within their limits ({where})."


def block(newest, checks=(), none=NONE):
    """The text between the GPU markers of docs/speed.md, or between the CPU's."""
    lines = [none, ""] * (not newest) + [line for check in checks for line in (check, "")]
    for path, result in newest.values():
        where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        about = f"{describe(result['machine'])}; commit {result['commit'][:12]}"
        copy = f"; a copy moves {result['copy GB/s']:.0f} GB/s" if "gpu" in result["machine"] else ""
        lines += [f"{about}{copy} (`{where}`).", ""]
        if result.get("load before") is not None:
            busy = f"{result['load before']} when it began and {result['load after']} when it ended"
            lines += [f"Programs that wanted a processor, this one included: {busy}.", ""]
        for name, text in PICTURES.items():
            if (ROOT / "docs" / "pictures" / path.parent.name / f"{name}.png").exists():
                lines += [f"![{text}](pictures/{path.parent.name}/{name}.png)", ""]
        lines += [*table(result), ""]
        if unsteady := steady_others(result["rows"])[1]:
            lines += [
                f"{unsteady} more are not shown: their calls took times of which the middle half differs by more than {STEADY:.0%} of the median.",
                "",
            ]
        missing = [f"{name} ({reason})" for name, reason in result["missing"].items()]
        lines += [f"Not compared with: {'; '.join(missing)}.", ""] if missing else []
        not_run = len(result["not run"])
        lacking = [f"{not_run} of {not_run + len(result['rows'])} rows for want of time"] * bool(not_run)
        lacking += [f"{name} {part['status']}" for name, part in result.get("parts", {}).items() if part["status"] != "passed"]
        lines += [f"Not complete: {'; '.join(lacking)}.", ""] if lacking else []
    return "\n".join(lines).strip()


METHODS = (  # method, its one call, source, and the cases of costs.json: forward, backward
    ("mixup", "`Mixup(0.2)(x, y)`", "1710.09412", "mix [N, 3, 224, 224] float32", "mix backward [N, 3, 224, 224] float32"),
    ("... with the gradient of lambda (AMP)", "`mix(x, lam, index)`", "2109.07177", "mix [N, 3, 224, 224] float32", "mix backward [N, 3, 224, 224] float32 to x and lam"),
    ("CutMix", "`CutMix()(x, y)`", "1905.04899", "mix [N, 3, 224, 224] float32 box=2", "mix backward [N, 3, 32, 32] float32 box=2"),
    ("mixup or CutMix, row by row (timm's \"elem\")", "`RandomMix(Mixup(0.8), CutMix())(x, y)`", "1905.04899", "mix [N, 3, 224, 224] float32 box=2", "mix backward [N, 3, 32, 32] float32 box=2"),
    ("intervals of sequences", "`mix(x, 1.0, index, box=box)`", "1905.04899", "mix [N, 12, 1000] float32 box=1", ""),
    ("boxes in volumes", "`mix(x, 1.0, index, box=box)`", "1905.04899", "mix [N, 1, 16, 32, 32] float32 box=3", "mix backward [N, 1, 16, 32, 32] float32 to x and lam, box=3"),
    ("hidden states of a transformer", "`Mixup(0.2).sample(h).apply(h)`", "1806.05236", "mix [N, 196, 768] bfloat16", "mix backward [N, 196, 768] bfloat16 to x and lam"),
    ("masks of cells", "`mix_masked(x, mask, index)`", "2009.06962", "mix_masked [N, 3, 224, 224] float32 16x16 cells", "mix_masked backward [N, 3, 224, 224] float32 16x16 cells, to x"),
    ("... and blocks moved (PuzzleMix)", "`mix_masked(x, mask, index, plan=p, partner_plan=q)`", "2009.06962", "mix_masked [N, 3, 224, 224] bfloat16 4x4 cells, moved", "mix_masked backward [N, 3, 224, 224] bfloat16 4x4 cells, moved, to x"),
    ("non-linear mixup: a mask of every element", "`BetaMask(0.2)(x, y)`", "Guo, AAAI 2020", "mix_masked [N, 128, 300] float64 128x300 cells", "mix_masked backward [N, 128, 300] float64 128x300 cells, to x"),
    ("AugMix, n-way mixing", "`convex_combination(sources, dirichlet(N, K))`", "1912.02781", "convex_combination [N, 3, 224, 224] float32", "convex_combination backward [N, 3, 224, 224] float32 to sources and weights"),
)  # fmt: skip


@functools.cache
def floor_ratios():
    """{case of costs.json: the bytes that its kernel moves over its floor}; None where a method has no such case."""
    limits = json.loads((ROOT / "bench" / "costs.json").read_text())["bytes"]
    small = ("_mass_kernel", "_inverse_index_kernel")
    return {row["case"]: row["ratio"] for row in limits if row["kernel"] not in small} | {"": None}


def methods():
    """Lines of Markdown: the bytes that each way of mixing moves over its floor, as the tests hold it."""
    ratios = {case: "" if found is None else f"{found:.2f}" for case, found in floor_ratios().items()}
    rows = []
    for name, call, source, forward, backward in METHODS:
        link = f"[arXiv:{source}](https://arxiv.org/abs/{source})" if source[:1].isdigit() else source
        rows.append([name, call, ratios[forward], ratios[backward], link])
    yield from _markdown(("method", "one call", ">forward", ">backward", "source"), rows)


LAUNCHES = {  # call: (operators of torch and kernels once, launches now)
    "`Mixup.sample(x)`": (24, 1), "`CutMix.sample(x)`": (63, 1), "`RandomMix.sample(x)`": (94, 1), "`Mix.target(y)`": (5, 1),
    "`Mix.apply(x)`": (1, 1), "its backward": (6, 1), "`soft_cross_entropy` with its gradient": (5, 3),
    "`RandomMix(x, y)` and the loss with its gradient": (105, 5),
    "`PuzzleMix.sample(x, saliency)`": (92, 5),
}  # fmt: skip


def kernels(page):
    """The page of what every kernel costs, by case."""
    costs = json.loads((ROOT / "bench" / "costs.json").read_text())
    arches = sorted({row["arch"] for row in costs["compiled"]}, key=lambda arch: (not arch.isdigit(), arch.zfill(9)))
    cases: dict = {}
    for row in costs["compiled"]:
        cases.setdefault((row["case"], row["kernel"]), {})[row["arch"]] = row
    ratios = {(row["case"], row["kernel"]): f"{row['ratio']:.2f}" for row in costs["bytes"]}
    rows = []
    for (case, kernel), found in sorted(cases.items()):
        widest = " / ".join(str(ends[1]) if ends else "" for ends in (found[arches[0]]["ld"], found[arches[0]]["st"]))
        registers = [found[arch]["registers"] if arch in found else "" for arch in arches]
        spills = max(row["spill_bytes"] for row in found.values())
        counted = ["" if (count := found.get("90", {}).get(key)) is None else count for key in ("instructions", "per_byte")]
        rows.append([case, f"`{kernel}`", ratios.get((case, kernel), ""), *registers, spills, widest, *counted])
    named = [f">{'sm_' * arch.isdigit()}{arch}" for arch in arches]
    what = "case", "kernel", ">bytes over floor"
    left = [[case, f"`{kernel}`", ratio] for (case, kernel), ratio in sorted(ratios.items()) if (case, kernel) not in cases]
    page = re.sub(r"\(here with Triton .*?\)", f"(here with Triton {costs['triton']})", page)
    launches = _markdown(("call", ">before", ">launches"), [[call, *counts] for call, counts in LAUNCHES.items()])
    compiled = _markdown((*what, *named, ">spilled", ">ld / st", ">instructions", ">per byte"), rows)
    return with_tables(page, None, launches, compiled, _markdown(what, left))


def numerics(page):
    """The page of errors against float64."""
    found = json.loads((RESULTS / "numerics.json").read_text())
    where = f"which `{found['command']}` wrote:\nfastmix {found['fastmix']}, torch {found['torch']}, {found['where']}."
    page = re.sub(r"which `.*` wrote:\n.*", lambda match: where, page)
    keys = "op", "result", "dtype", "case", "backend", "fastmix", "usual", "nearest", "limit", "unit"

    def cell(row, key):
        value = row[key]
        return value if not isinstance(value, (float, int)) else f"{value:.2g}" if row["unit"] != "ulp" else f"{value:.2f}"

    rows = [["not finite" if row[key] is None else cell(row, key) for key in keys] for row in found["rows"]]
    columns = [f">{key}" if key in ("fastmix", "usual", "nearest", "limit") else key for key in keys]
    return with_tables(page, None, _markdown(columns, rows))


# in the order of the page; each has a TITLE and summary(its results.json), which gives columns, rows and remarks
RECIPES = (
    "digits", "text", "tabular", "toy", "ablation", "augmix", "puzzle", "puzzle_cifar", "amp", "cifar", "corrupted",
    "attacks", "speech", "gan", "wafer", "regression",
)  # fmt: skip
MORE = {  # titles of what a recipe gave with other options
    "puzzle_cifar": "PuzzleMix on a part of CIFAR-10",
}


def seeds(found):
    """How many runs each arm has."""
    while isinstance(found, dict):
        found = next(iter(found.values()))
    return len(found)


def recipes(page):
    """The page of the recipes, made anew: a table for each."""
    return "\n".join(_recipes()) + "\n"


def _recipes():
    yield "# What the recipes gave\n"
    yield "Made by `python -m fastmix.bench report` from what each recipe wrote (`bench/results/recipes`), as it came out."
    results = {
        name: json.loads(path.read_text()) for name in RECIPES if (path := RESULTS / "recipes" / f"{name}.json").exists()
    }
    for name, found in results.items():
        recipe = importlib.import_module(f"fastmix.recipes.{name.partition('_')[0]}")
        title = MORE.get(name, recipe.TITLE)
        columns, rows, remarks = recipe.summary(found)
        yield f"\n## {title}\n"
        yield from _markdown(columns, rows)
        of, where = found["environment"], f"`bench/results/recipes/{name}.json`"
        count = seeds(next(found[key] for key in ("methods", "tables", "arms") if key in found))
        over = f"Mean ± standard error over {count} seeds" if count > 1 else "One seed"
        commit = f"; commit {of['commit'][:12]}" if of.get("commit") else ""
        yield f"\n{over} ({where}; torch {of['torch']}, {of['device']}{commit}). {remarks}"
        if (ROOT / "docs" / "pictures" / f"{name}.png").exists():
            yield f"\n![{title}](pictures/{name}.png)"
    yield "\n## Claims\n"
    yield from _markdown(*claims.claims(results))
    yield """
A claim is reproduced where the gap in its direction is more than two standard errors over the seeds, contradicted where it is as far in the other
direction, and else not testable here; it takes three seeds. What is small here (1,000 digits, a part of CIFAR-10, six speakers) says nothing about the papers' own sizes."""


def traps(page):
    """The page of the mistakes that tests hold, by thread: the table of tests/test_traps.py, and the tests that bear its ids."""
    held: dict[str, list] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", ()):
                if ast.unparse(mark).startswith("pytest.mark.trap("):
                    for name in map(ast.literal_eval, mark.args):
                        held.setdefault(name, []).append(f"{node.name.removeprefix('test_').replace('_', ' ')} (`{path.name}`)")
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TRAPS":
                table = ast.literal_eval(node.value)
    rows = [(f"`{name}`", mistake, "; ".join(held.get(name, ()))) for name, mistake in table.items()]
    return with_tables(page, _markdown(("report", "what goes wrong", "here"), rows))


def draw(newest):
    """Draws the pictures of the pages that are made here."""
    from fastmix.bench import plots

    folder = ROOT / "docs" / "pictures"
    found = [picture for path, result in newest.values() for picture in plots.overview(result, folder / path.parent.name)]
    counts = {call.replace("`", ""): count for call, count in LAUNCHES.items()}
    most = 1.1 * max(map(max, counts.values()))
    legend = {"torch's operators, before": "C7", "fastmix's kernels": "C0"}
    found.append(plots.pairs(counts, folder / "launches.png", legend, xlabel="launches of a call", xlim=(0, most)))
    ratios = {name: tuple(map(floor_ratios().get, ends)) for name, _, _, *ends in METHODS}
    about = {"fmt": "%.2f", "fontsize": 8, "line": 1, "place": "lower right", "xlim": (0, 2.4)}
    about["xlabel"] = "bytes that the kernels touch, over the floor (line)"
    found.append(plots.pairs(ratios, folder / "floors.png", {"forward": "C0", "backward": "C1"}, **about))
    found.append(plots.errors(json.loads((RESULTS / "numerics.json").read_text())["rows"], folder / "errors.png"))
    for picture in found:
        print(f"drew {picture.relative_to(ROOT)}")


# The command


def written(page, **texts):
    """A page with these texts between its markers."""
    for name, inner in texts.items():
        before, rest = page.split(begin := BEGIN.format(name), 1)
        page = f"{before}{begin}\n{inner}\n{(end := END.format(name))}{rest.split(end, 1)[1]}"
    return page


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench report", description=__doc__.splitlines()[0])
    parser.add_argument("--add", metavar="FILE", help="file this result first")
    parser.add_argument("--check", action="store_true", help="only say whether the pages are what they should be")
    options = parser.parse_args(argv)
    speed = ROOT / "docs" / "speed.md"
    if not speed.exists():
        parser.error("needs a checkout: there is no docs/ beside bench/")
    if options.add:
        try:
            print(f"filed {add(options.add)}")
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--add: {error}")
    newest, of_cpu = load(), load(gpu=False)
    paths = {make: ROOT / "docs" / f"{make.__name__}.md" for make in (kernels, numerics, recipes, traps)}
    pages = {path: make(path.read_text()) for make, path in paths.items()}
    if not options.check:
        draw({**newest, **of_cpu})
    texts = {"methods": "\n".join(methods()), "gpu": block(newest, checked()), "cpu": block(of_cpu, none=NO_CPU)}
    pages[speed] = written(speed.read_text(), **texts)
    if options.check:
        differ = ", ".join(path.name for path, page in pages.items() if path.read_text() != page)
        print(f"{differ}: differs, run python -m fastmix.bench report" if differ else "all is as the result files say")
        return int(bool(differ))
    for path, page in pages.items():
        path.write_text(page)
    print(f"wrote {len(pages)} pages: {len(newest)} GPUs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
