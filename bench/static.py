"""What every kernel costs, from its compiled code and the memory it touches: no GPU is needed.

    python -m fastmix.bench static [--arch 90 ...] [--case TEXT] [--json FILE] [--bytes-only | --compile-only] [--update]

The launchers of programs.py run on CPU tensors of a few rows of the true length and layout, once for each table:

compiled    Triton compiles exactly the specialisation that each launch asks for, for an architecture that need not be there, and
            nothing is launched. Registers and spilled bytes come from the binary's resource report, shared memory from what a
            launch asks for. How many bytes a load or store moves per thread, narrowest and widest, and how many move fewer than 16
            (labels and numbers of a row do), comes from the assembly text. Instructions of a program (sass.py says which count),
            and those of all threads of all programs for each byte of the floor: an H100 has time for about 10 while memory moves a
            byte, an H200 for 7.
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
import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastmix.bench import programs, sass, screen, traffic
from fastmix.bench.samples import cases_of, name_of, options_of

# Bytes of shared memory that a block may ask for, by architecture.
SHARED = {
    "80": 166912, "89": 101376, "90": 232448, "100": 232448, "120": 101376, "gfx942": 65536, "gfx950": 163840,
}  # fmt: skip
ARCHES = tuple(SHARED)
LIMITS = pathlib.Path(__file__).with_name("costs.json")
SLACK = 1.001  # sectors over the floor may exceed their limit by this factor: ratios are rounded
FEW_BYTES = 2048  # a kernel that moves fewer is there to be launched, and not to move bytes
OTHERS_SPILL = 144  # bytes that another Triton than the limits' may spill: 3.3, 3.6 and 3.9 spill up to 80, one program 136
LOOSE = 0.95  # a limit is to be tightened if the measured ratio is below this part of it
TIGHTEN = "python -m fastmix.bench static --update"
KEYS = {"compiled": ("kernel", "case", "arch"), "bytes": ("kernel", "case")}  # of each table's rows, in their order in the file


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


class Launch(NamedTuple):
    kernel: str
    compiled: Any
    programs: int
    arguments: dict


def launches(arch, call):
    """Calls a launcher and returns a `Launch` of each kernel that it would have launched on this architecture."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        if not arch.isdigit():
            options.pop("maxnreg", None)  # as launchers leave it out where torch is for AMD
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if hasattr(compiled, "result"):  # newer Tritons may compile in the background
            compiled = compiled.result()
        named = {**dict(zip(self.arg_names, args, strict=False)), **options}
        launched.append(Launch(self.__name__, compiled, math.prod(grid), named))

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


def cost(launch, code=None, floor=0):
    """A row's numbers. The instructions of a program, and those of all threads for each byte of the floor, where that is more than a
    few numbers, are None without machine code, as for AMD."""
    compiled, amd, instructions = launch.compiled, "amdgcn" in launch.compiled.asm, None
    text = compiled.asm["amdgcn"] if amd else sass.said_of(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    if code:
        once, looped = sass.counted(code)
        instructions = once + looped * sass.trips(launch.arguments)
    threads = launch.programs * compiled.metadata.num_warps * 32

    def value(key):
        return int(re.search(rf"\b{key}:\s*(\d+)", text).group(1))

    counts = access_counts(compiled.asm["amdgcn" if amd else "ptx"])
    ld, st = map(_ends, counts)
    return {
        "registers": value("vgpr_count" if amd else "REG"),
        # on AMD too what a thread has in memory: scalar registers that do not fit go to lanes of vector registers
        "spill_bytes": value("private_segment_fixed_size" if amd else "STACK"),
        "shared_bytes": compiled.metadata.shared,  # requested at the launch; the resource report has static shared memory only
        "warps": compiled.metadata.num_warps,
        "ld": ld,
        "st": st,
        "narrow": [sum(count for width, count in found.items() if width < 16) for found in counts],
        "instructions": instructions,
        "per_byte": round(instructions * threads / floor, 1) if instructions and floor >= FEW_BYTES else None,
    }


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


class Case(NamedTuple):
    """`call` runs a launcher and returns {kernel: its floor in bytes}. A case that is not `compiled` only has its bytes counted:
    another case compiles its programs, or very similar ones."""

    call: Callable[[], dict[str, int]]
    rows: int
    compiled: bool


def _cases():
    for launcher, table in programs.PROGRAMS.items():
        call = functools.partial(programs.program(launcher), launcher)
        for text, (rows, *row), dtype, compiled in cases_of(table):
            name = f"{launcher} [N, {', '.join(map(str, row))}] {name_of(dtype)}{' ' * bool(text)}{text}"
            yield name, Case(functools.partial(call, (rows, *row), dtype, **options_of(text)), rows, compiled)


CASES = dict(_cases())


# Tables


def arches():
    """The architectures that this Triton compiles for without a driver; AMD's since 3.6."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return [arch for arch in ARCHES if version >= (3, 6) or not arch.startswith("gfx")]


def compiled_rows(wanted, cases):
    """Rows of arch, case, kernel and cost."""
    for arch in wanted:
        every = []
        for case in cases:
            if CASES[case].compiled:
                floors: dict = {}
                for launch in launches(arch, lambda: floors.update(CASES[case].call())):  # noqa: B023
                    every.append((case, launch, floors[launch.kernel]))
        cubins = list(dict.fromkeys(launch.compiled.asm["cubin"] for _, launch, _ in every if "cubin" in launch.compiled.asm))
        codes = dict(zip(cubins, sass.disassembled(cubins, arch), strict=True))
        for case, launch, floor in every:
            code = codes.get(launch.compiled.asm.get("cubin"))
            yield {"arch": arch, "case": case, "kernel": launch.kernel, **cost(launch, code, floor)}


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


def byte_rows(cases):
    """The same from any process: Triton cannot compile and interpret in one, so a second process interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = "import json, sys; from fastmix.bench import static; print(json.dumps([*static.interpreted_rows(sys.argv[1:])]))"
    ran = subprocess.run([sys.executable, "-c", code, *cases], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"counting bytes failed:\n{ran.stderr}")
    return json.loads(ran.stdout)


def violations(measured, limits, wanted=ARCHES, tables=tuple(KEYS), cases=None):
    """Lines of text that say which measured rows break the limits of `costs.json`. Limits of arches, tables and cases that were not
    measured are left out."""
    same, problems = measured["triton"] == limits["triton"], []
    for table in tables:
        found, allowed = ({tuple(row[key] for key in KEYS[table]): row for row in rows[table]} for rows in (measured, limits))
        if len(found) < len(measured[table]) or len(allowed) < len(limits[table]):
            problems.append(f"{table}: two rows of the same {', '.join(KEYS[table])}")
        for key in found.keys() | allowed.keys():
            if key not in allowed:
                told = [f"there is no limit; {TIGHTEN}"]
            elif key in found:
                told = (_worse_cost if table == "compiled" else _worse_ratio)(found[key], allowed[key], same)
            else:
                asked = allowed[key].get("arch", wanted[0]) in wanted and (cases is None or allowed[key]["case"] in cases)
                told = [f"a limit of what nobody measures; {TIGHTEN}"] * asked
            problems += [f"{', '.join(reversed(key))}: {text}" for text in told]
    return sorted(problems)


def _worse_cost(row, limit, same):
    if row["shared_bytes"] > SHARED[row["arch"]]:
        yield f"shared_bytes {row['shared_bytes']}, the architecture has {SHARED[row['arch']]}"
    if not same:
        if row["spill_bytes"] > limit["spill_bytes"] + OTHERS_SPILL:
            yield f"spill_bytes {row['spill_bytes']}, the limit is {limit['spill_bytes'] + OTHERS_SPILL}"
        return
    for key in ("spill_bytes", "registers", "shared_bytes", "instructions", "per_byte"):
        if limit.get(key) is not None and row[key] > limit[key]:
            yield f"{key} {row[key]}, the limit is {limit[key]}"
    for kind, now, then in zip(("loads", "stores"), row["narrow"], limit["narrow"], strict=True):
        if now > then:
            yield f"{now} {kind} of fewer than 16 bytes, the limit is {then}"
    if row["warps"] != limit["warps"]:
        yield f"{row['warps']} warps, the limit is for {limit['warps']}"
    for key in ("ld", "st"):
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


def dump(measured):
    """JSON with a line for every row, sorted, so that a diff shows which rows changed."""
    text = f'{{\n"triton": {json.dumps(measured["triton"])}'
    for table, order in KEYS.items():
        rows = sorted(measured[table], key=lambda row: [row[key] for key in order])
        text += f',\n"{table}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]"
    return text + "\n}\n"


def merged(limits, measured, wanted, cases, tables):
    """The limits with the rows of these architectures, cases and tables made anew; those of cases that are no more are dropped."""
    rows = {"triton": measured["triton"]}
    for table in KEYS:
        asked = [row["case"] in cases and row.get("arch", wanted[0]) in wanted and table in tables for row in limits[table]]
        kept = [row for row, anew in zip(limits[table], asked, strict=True) if not anew and row["case"] in CASES]
        rows[table] = kept + measured[table]
    return rows


# The command


def _span(widths):
    if widths is None:
        return "-"
    return str(widths[0]) if widths[0] == widths[1] else f"{widths[0]}-{widths[1]}"


SHOWN = "arch", "registers", "spill_bytes", "shared_bytes", "warps", "ld", "st", "instructions", "per_byte"
HEADINGS = ("kernel", "case", "arch", "registers", "spilled", "shared", "warps", "ld", "st", "instructions", "instructions/byte", "rows",
            "sectors/floor")  # fmt: skip
RIGHT = {"registers", "spilled", "shared", "warps", "instructions", "instructions/byte", "rows", "sectors/floor"}


def lines(measured):
    """The table's cells: a line for every kernel, case and arch, beside them the bytes, which do not depend on the arch."""
    moved = {(row["kernel"], row["case"]): [str(row["rows"]), f"{row['ratio']:.3f}"] for row in measured["bytes"]}
    costs: dict = {key: [] for key in moved}
    for row in measured["compiled"]:
        shown = {**row, "ld": _span(row["ld"]), "st": _span(row["st"])}
        cells = ["-" if shown.get(key) is None else str(shown[key]) for key in SHOWN]
        costs.setdefault((row["kernel"], row["case"]), []).append(cells)
    for kernel, case in sorted(costs):
        for cells in costs[kernel, case] or [[""] * len(SHOWN)]:
            yield [kernel.strip("_").removesuffix("_kernel"), case, *cells, *moved.get((kernel, case), ["", ""])]


def measure(wanted, cases, tables):
    """{"triton": its version, "compiled": rows, "bytes": rows}."""
    import triton

    compiled = list(compiled_rows(wanted, cases)) if "compiled" in tables else []
    return {"triton": triton.__version__, "compiled": compiled, "bytes": byte_rows(cases) if "bytes" in tables else []}


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
    parser.add_argument(
        "--update", action="store_true", help=f"make what is measured the limits, in {LIMITS.name}; of a part: its rows"
    )
    options = parser.parse_args(argv)
    cases = [case for case in CASES if options.case in case]
    if not cases:
        parser.error(f"--case: expected part of a name such as {next(iter(CASES))!r}; got {options.case!r}")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        print(f"static: needs Triton, which cannot be imported here ({error}): pip install triton, on Linux", file=sys.stderr)
        return 2
    wanted, tables = options.arch or arches(), options.tables or tuple(KEYS)
    part = bool(options.arch or options.case or options.tables)
    if options.update and not part and wanted != list(ARCHES):
        parser.error(f"--update: expected a Triton that compiles for {', '.join(ARCHES)}; got {triton.__version__}")
    if options.update and part and triton.__version__ != (made := json.loads(LIMITS.read_text())["triton"]):
        parser.error(f"--update of a part: expected Triton {made}, which made the other limits; got {triton.__version__}")
    measured = measure(wanted, cases, tables)
    screen.table(HEADINGS, lines(measured), RIGHT)
    if options.json:
        pathlib.Path(options.json).write_text(dump(measured))
    if options.update:
        LIMITS.write_text(dump(merged(json.loads(LIMITS.read_text()), measured, wanted, cases, tables) if part else measured))
    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else None  # an installed package has none
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
