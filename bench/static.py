"""What every kernel costs, from its compiled code and the memory it touches: no GPU is needed.

    python -m fastmix.bench static [--arch 90 ...] [--case TEXT] [--json FILE] [--bytes-only | --compile-only] [--update]

The launchers of programs.py run on CPU tensors of a few rows of the true length and layout, once for each table:

compiled    Triton compiles exactly the specialisation that each launch asks for, for an architecture that need not be there, and
            nothing is launched. Registers and spilled bytes come from the binary's resource report, shared memory from what a
            launch asks for. How many bytes a load or store moves per thread, narrowest and widest, and how many move fewer than 16
            (labels and numbers of a row do), comes from the assembly text.
bytes       Triton's interpreter runs the kernels in a process of its own, and `fastmix.bench.traffic` counts the sectors that they
            touch. A second read of the same sector counts again, though a GPU's L2 may serve it. The sectors are divided by the
            floor: every input and output byte of the op once. A backward whose gradient is cached, under an upstream gradient of
            1, only reads that gradient once a row.

`costs.json`, beside this file in a checkout, holds the limits: what the Triton version named in it gave. Sectors are held to it with
any Triton; registers, shared memory and widths with that version; spilled bytes with any, but others may spill a few. The exit status
is 1 if a limit is broken, 2 where there is no Triton. --update writes the limits anew: check that the difference is intended.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch

from fastmix.bench import screen, traffic
from fastmix.bench.programs import PROGRAMS
from fastmix.bench.programs import api as _api
from fastmix.bench.samples import cases_of, name_of, options_of

ARCHES = ("80", "90", "100", "gfx942")
LIMITS = pathlib.Path(__file__).with_name("costs.json")
SLACK = 1.001  # sectors over the floor may exceed their limit by this factor: ratios are rounded
OTHERS_SPILL = 144  # bytes that another Triton than the limits' may spill: 3.3, 3.6 and 3.9 spill up to 80, one program 136
LOOSE = 0.95  # a limit is to be tightened if the measured ratio is below this part of it
TIGHTEN = "python -m fastmix.bench static --update"


# Compiling


class _Target:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(self.target)  # Triton caches compiled kernels by device

    def get_current_stream(self, device=None):
        return 0


def compile_launches(arch, call):
    """Calls a launcher and returns [(kernel name, cost)] of the kernels that it would have launched on this architecture."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if hasattr(compiled, "result"):  # newer Tritons may compile in the background
            compiled = compiled.result()
        launched.append((self.__name__, _cost(compiled)))

    JITFunction.run = compile_only
    before = driver.active if torch.cuda.is_available() else None
    driver.set_active(_Target(arch))
    try:
        call()
    finally:
        JITFunction.run = run
        if before is not None:
            driver.set_active(before)
    return launched


def _cost(compiled):
    amd = "amdgcn" in compiled.asm
    text = compiled.asm["amdgcn"] if amd else _resources(compiled.asm["cubin"])

    def value(key):
        return int(re.search(rf"\b{key}:\s*(\d+)", text).group(1))

    if amd:
        spills = 4 * 64 * value("vgpr_spill_count") + 4 * value("sgpr_spill_count")
        registers = value("vgpr_count")
    else:
        registers, spills = value("REG"), value("STACK")
    counts = access_counts(compiled.asm["amdgcn" if amd else "ptx"])
    ld, st = map(_ends, counts)
    return {
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": compiled.metadata.shared,  # requested at the launch; the resource report has static shared memory only
        "warps": compiled.metadata.num_warps,
        "ld": ld,
        "st": st,
        "narrow": [sum(count for width, count in found.items() if width < 16) for found in counts],
    }


def _resources(cubin):
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
        return subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout


_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def access_counts(assembly):
    """({bytes a thread: number of loads from global memory}, the same of stores) in PTX (ld.global.v4.b32) or AMD's assembly
    (global_load_dwordx4). A loop's body counts once."""
    counts = {"ld": collections.Counter(), "st": collections.Counter()}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.(?:\w+\.)*?global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", assembly):
        counts[kind][int(vector or 1) * int(bits) // 8] += 1
    for kind, name in re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", assembly):
        size, bits = re.search(r"(dword(?:x\d)?|short|byte)|[biu](\d+)", name).groups()
        counts["ld" if kind == "load" else "st"][_AMD_BYTES[size] if size else int(bits) // 8] += 1
    return counts["ld"], counts["st"]


def _ends(counts):
    """[narrowest, widest], or None where there are no accesses."""
    return [min(counts), max(counts)] if counts else None


@dataclasses.dataclass(frozen=True)
class Case:
    """`call` runs a launcher and returns {kernel: its floor in bytes}. A case that is not `compiled` only has its bytes counted:
    another case compiles its programs, or very similar ones."""

    call: Callable[[], dict[str, int]]
    rows: int
    compiled: bool


def _cases():
    for launcher, (function, table) in PROGRAMS.items():
        for text, (rows, *row), dtype, compiled in cases_of(table):
            name = f"{launcher} [N, {', '.join(map(str, row))}] {name_of(dtype)}{' ' * bool(text)}{text}"
            yield name, Case(functools.partial(function, (rows, *row), dtype, **options_of(text)), rows, compiled)


CASES = dict(_cases())


def __getattr__(name):
    if name == "api":  # the kernels' launchers; importing them imports Triton
        return _api()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Tables


def arches():
    """The architectures that this Triton compiles for without a driver; AMD's since 3.6."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return [arch for arch in ARCHES if version >= (3, 6) or not arch.startswith("gfx")]


def compiled_rows(wanted, cases):
    """Rows of arch, case, kernel and cost."""
    for arch in wanted:
        for case in cases:
            if CASES[case].compiled:
                for kernel, cost in compile_launches(arch, CASES[case].call):
                    yield {"arch": arch, "case": case, "kernel": kernel, **cost}


def interpreted_rows(cases):
    """Rows of case, kernel and bytes, in a process that interprets kernels."""
    for case in cases:
        with traffic.count() as moved:
            floors = CASES[case].call()
        assert floors.keys() == moved.keys(), f"{case}: {sorted(moved)} ran, {sorted(floors)} have a floor"
        for kernel, floor in floors.items():
            lanes, sectors = moved[kernel].lanes, moved[kernel].sectors
            counts = {"rows": CASES[case].rows, "lanes": lanes, "sectors": sectors, "floor": floor}
            yield {"case": case, "kernel": kernel, **counts, "ratio": round(sectors / floor, 4)}


_INTERPRET = """
import json, sys
from fastmix.bench import static
for row in static.interpreted_rows(sys.argv[1:]):
    print(json.dumps(row), flush=True)
"""


def byte_rows(cases):
    """The same from any process: Triton cannot compile and interpret in one, so a second process interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _INTERPRET, *cases]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                yield json.loads(line)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"counting bytes failed:\n{errors.read()}")


def violations(measured, limits, wanted=ARCHES, tables=("compiled", "bytes"), cases=None):
    """Lines of text that say which measured rows break the limits of `costs.json`. Limits of arches, tables and cases that were not
    measured are left out."""
    same = measured["triton"] == limits["triton"]
    problems = []
    for table in tables:
        keys = ("arch", "case", "kernel") if table == "compiled" else ("case", "kernel")
        found, allowed = ({tuple(row[key] for key in keys): row for row in rows[table]} for rows in (measured, limits))
        if len(found) < len(measured[table]) or len(allowed) < len(limits[table]):
            problems.append(f"{table}: two rows of the same {', '.join(keys)}")
        here = {key: row for key, row in allowed.items() if row.get("arch", wanted[0]) in wanted}
        asked = {key for key, row in here.items() if cases is None or row["case"] in cases}
        problems += [f"{', '.join(key)}: there is no limit; {TIGHTEN}" for key in found.keys() - allowed.keys()]
        problems += [f"{', '.join(key)}: a limit of what nobody measures; {TIGHTEN}" for key in asked - found.keys()]
        compare = _worse_cost if table == "compiled" else _worse_ratio
        for key in found.keys() & allowed.keys():
            problems += [f"{', '.join(key)}: {text}" for text in compare(found[key], allowed[key], same)]
    return sorted(problems)


def _worse_cost(row, limit, same):
    for key in ("spill_bytes", "registers", "shared_bytes") if same else ("spill_bytes",):
        allowed = limit[key] if same else limit[key] + OTHERS_SPILL
        if row[key] > allowed:
            yield f"{key} {row[key]}, the limit is {allowed}"
    for kind, now, then in zip(("loads", "stores"), row["narrow"], limit["narrow"], strict=True) if same else ():
        if now > then:
            yield f"{now} {kind} of fewer than 16 bytes, the limit is {then}"
    if same and row["warps"] != limit["warps"]:
        yield f"{row['warps']} warps, the limit is for {limit['warps']}"
    for key in ("ld", "st") if same else ():
        if limit[key] and (not row[key] or any(now < then for now, then in zip(row[key], limit[key], strict=True))):
            yield f"{key} of {_span(row[key])} bytes, the limit is {_span(limit[key])}"


def _worse_ratio(row, limit, same):
    ratio, allowed = row["sectors"] / row["floor"], limit["ratio"]
    if row["rows"] != limit["rows"] or row["floor"] != limit["floor"]:
        yield f"{row['rows']} rows with a floor of {row['floor']}, the limit is for {limit['rows']} and {limit['floor']}"
    elif ratio > allowed * SLACK:
        yield f"sectors {ratio:.4f} times the floor, the limit is {allowed:.4f}"
    elif ratio < allowed * LOOSE:
        yield f"sectors {ratio:.4f} times the floor, the limit is a loose {allowed:.4f}; tighten it: {TIGHTEN}"


def load_limits():
    """The committed limits, or None in an installed package that has none."""
    return json.loads(LIMITS.read_text()) if LIMITS.exists() else None


def dump(measured):
    """JSON with a line for every row, sorted, so that a diff shows which rows changed."""
    orders = {"compiled": ("kernel", "case", "arch"), "bytes": ("kernel", "case")}
    text = f'{{\n"triton": {json.dumps(measured["triton"])}'
    for table, order in orders.items():
        rows = sorted(measured[table], key=lambda row: [row[key] for key in order])
        text += f',\n"{table}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]"
    return text + "\n}\n"


# The command


def _span(widths):
    if widths is None:
        return "-"
    return str(widths[0]) if widths[0] == widths[1] else f"{widths[0]}-{widths[1]}"


HEADINGS = ("kernel", "case", "arch", "registers", "spilled", "shared", "warps", "ld", "st", "rows", "sectors/floor")
RIGHT = {"registers", "spilled", "shared", "warps", "rows", "sectors/floor"}


def lines(measured):
    """The table's cells: a line for every kernel, case and arch. Only the first of a case shows what does not depend on the arch."""
    groups = collections.defaultdict(lambda: ([], []))
    for number, table in enumerate(("compiled", "bytes")):
        for row in measured[table]:
            groups[row["kernel"], row["case"]][number].append(row)
    order = list(CASES)
    for (kernel, case), (compiled, moved) in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        head = [kernel.strip("_").removesuffix("_kernel"), case]
        tail = [str(moved[0]["rows"]), f"{moved[0]['ratio']:.3f}"] if moved else ["", ""]
        for row in compiled or [None]:
            cost = ("registers", "spill_bytes", "shared_bytes", "warps")
            middle = [row["arch"], *(str(row[key]) for key in cost), _span(row["ld"]), _span(row["st"])] if row else [""] * 7
            yield [*head, *middle, *tail]
            head = tail = ["", ""]


def measure(wanted, cases, tables):
    """{"triton": its version, "compiled": rows, "bytes": rows}."""
    import triton

    found = {"compiled": compiled_rows(wanted, cases), "bytes": byte_rows(cases)}
    rows = {table: list(found[table]) if table in tables else [] for table in found}
    return {"triton": triton.__version__, **rows}


def main(argv=None):
    os.environ.pop("TRITON_INTERPRET", None)  # this process compiles; the interpreter has its own
    parser = argparse.ArgumentParser(
        prog="python -m fastmix.bench static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHES, help="compile for these (default: all that this Triton can)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--bytes-only", action="store_const", dest="tables", const=("bytes",), help="compile nothing")
    one.add_argument("--compile-only", action="store_const", dest="tables", const=("compiled",), help="interpret nothing")
    parser.add_argument("--update", action="store_true", help=f"make what is measured the limits, in {LIMITS.name}")
    options = parser.parse_args(argv)
    cases = [case for case in CASES if options.case in case]
    if not cases:
        parser.error(f"--case: expected part of a name such as {next(iter(CASES))!r}; got {options.case!r}")
    if options.update and (options.arch or options.case or options.tables):
        parser.error("--update: expected no other choice, since the limits are those of all cases")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        print(f"static: needs Triton, which cannot be imported here ({error}): pip install triton, on Linux", file=sys.stderr)
        return 2
    wanted, tables = options.arch or arches(), options.tables or ("compiled", "bytes")
    if options.update and wanted != list(ARCHES):
        parser.error(f"--update: expected a Triton that compiles for {', '.join(ARCHES)}; got {triton.__version__}")
    measured = measure(wanted, cases, tables)
    screen.table(HEADINGS, lines(measured), RIGHT)
    if options.json:
        pathlib.Path(options.json).write_text(dump(measured))
    if options.update:
        LIMITS.write_text(dump(measured))
    limits = load_limits()
    print(f"\nTriton {measured['triton']}: {len(measured['compiled'])} programs, {len(measured['bytes'])} counts of bytes.")
    print("shared in bytes; ld and st: bytes of the narrowest and widest load and store of a thread; rows: those interpreted.")
    if limits is None:
        print(f"There is no {LIMITS.name} here to hold them to.")
        return 1 if any(row["spill_bytes"] for row in measured["compiled"]) else 0
    problems = violations(measured, limits, wanted, tables, cases if options.case else None)
    print("\n".join(problems) if problems else f"All within the limits of {LIMITS.name}, made with Triton {limits['triton']}.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
