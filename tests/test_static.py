"""What every kernel costs, held to bench/costs.json: compiled for a GPU that is not there. Here that is sm_90 alone and some cases of
each launcher; `make static` compiles all cases for all architectures and counts the bytes of each."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from conftest import INTERPRETER, NO_INTERPRETER, NO_TRITON, TRITON

from fastmix.bench import sass, static, traffic

ROOT = pathlib.Path(__file__).parent.parent
LIMITS = json.loads((ROOT / "bench" / "costs.json").read_text())
# Shapes whose rows 16 bytes do not divide, cells of 14 pixels, and kernels of single numbers.
WITHOUT_WINDOWS = [f"js_divergence{way} [N, 21841]" for way in ("", " backward")]
NARROW = ("225", "54]", "[N, 10]", "15, 15]", "1001] float64", "8191] float64", "16x16 cells, to mask", "16x16 cells, moved")
NARROW += (
    "js_divergence [N, 512]",
    "js_divergence [N, 1001]",
    *(
        "sampler=",
        "soft_target",
        "row_keys",
        "dirichlet",
        "draw_numbers",
        "augmix",
        "grid_cut",
        "puzzle_costs",
        "puzzle_masks",
        "transport_plan",
    ),  # a few numbers of a row
    *WITHOUT_WINDOWS,
)
ENDS = (
    "527]",
    "1001]",
    "10001]",
    "21841]",
    "128257]",
)  # of odd rows: they are written by element, what lies between them is not
NUMBERS = ("_soft_ce_part_kernel", "_inverse_index_kernel")  # is all that these write
NARROW_STORES = (
    "to lam",
    "to weights",
    "to mask",
    "validation",
    "float16 K=5",
    "js_divergence [N, 32768]",
    "ce [N, 21841] float16",
)  # they write single numbers


def python(code, *arguments, **environment):
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"from fastmix.bench import static; {code}", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True)


COUNTED = "mix [N, 54]"  # few enough rows to count their bytes here
PARTS = 2  # of the cases that are compiled here, each in a process


KERNELS: dict = {}  # of each case that is compiled
for row in LIMITS["compiled"]:
    KERNELS.setdefault(row["case"], set()).add(row["kernel"])


def features(case):
    """What a case may be the only one to have: its launcher and kernels; and of its op a dtype, dimensions beside classes, rows of odd
    length, and rows beyond all tiles. Options are left to `make static`."""
    launcher, shape, dtype = re.match(r"(.+) \[N, (.+)\] (\w+)", case).groups()
    row = [int(size) for size in shape.split(", ")]
    op = launcher.removesuffix(" backward")
    shapes = len(row) > 1, math.prod(row) % 8 == 0, len(row) == 1 and row[0] > 32768
    return {launcher, *KERNELS[case], *((op, *feature) for feature in enumerate((dtype, *shapes)))}


def chosen():
    """Few cases that together have all features of all cases, those of many first."""
    every = {name: features(name) for name, case in static.CASES.items() if case.compiled}
    left, cases = set().union(*every.values()), []
    while left:
        cases.append(max(every, key=lambda name: len(every[name] & left)))
        left -= every[cases[-1]]
    return cases


CHOSEN = chosen()
FEW = {**LIMITS, **{table: [row for row in LIMITS[table] if row["case"] in CHOSEN] for table in ("compiled", "bytes")}}


# --- the tables ----------------------------------------------------------------------------------------------------------------


def kernels():
    names = set()
    for path in (ROOT / "kernels").glob("*.py"):
        names |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M))
    assert len(names) >= 7
    return names


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_within_the_limits(part):
    if not TRITON:
        pytest.skip(NO_TRITON)
    cases = CHOSEN[part::PARTS]
    ran = python("import json, sys; print(json.dumps(static.measure(['90'], sys.argv[1:], ('compiled',))))", *cases)
    assert ran.returncode == 0, ran.stderr
    assert static.violations(json.loads(ran.stdout), LIMITS, ("90",), ("compiled",), cases) == []


def test_every_kernel_is_compiled():
    """What is chosen brings a program of every kernel, and less than all cases do."""
    assert {row["kernel"] for row in LIMITS["compiled"] if row["case"] in CHOSEN} == kernels()
    assert 40 < len(CHOSEN) < sum(case.compiled for case in static.CASES.values()) / 3


def test_every_limit_is_of_a_kernel_that_is_here():
    for table in ("compiled", "bytes"):
        assert {row["kernel"] for row in LIMITS[table]} == kernels()
    assert {row["arch"] for row in LIMITS["compiled"]} == set(static.ARCHES)
    assert {row["case"] for row in LIMITS["bytes"]} == set(static.CASES)
    assert {row["case"] for row in LIMITS["compiled"]} == {name for name, case in static.CASES.items() if case.compiled}


def test_nothing_may_spill():
    assert [row for row in LIMITS["compiled"] if row["spill_bytes"]] == []


def test_the_pinned_triton_made_the_limits():
    assert f"triton=={LIMITS['triton']}" in (ROOT / "constraints.txt").read_text()


def test_wide_accesses():
    """Tensors are read and written 16 bytes at a time on NVIDIA; what is narrower is a number per row or a label."""
    seen = 0
    for row in LIMITS["compiled"]:
        if (
            row["arch"].startswith("gfx")
            or row["kernel"] in ("_mass_kernel", "_inverse_index_kernel")
            or any(part in row["case"] for part in NARROW)
        ):
            continue
        seen += 1
        combined = (
            row["kernel"] == "_soft_ce_fwd_kernel" and "few" in row["case"]
        )  # from what parts have summed: numbers of a row
        words = row["kernel"] == "_mix_images_kernel"  # of bytes, which become 16 bytes of floats
        assert row["ld"][1] >= (4 if words else 16) or combined, row
        assert row["st"][0] >= 4 or any(part in row["case"] for part in ENDS), row
        if not any(part in row["case"] for part in NARROW_STORES) and row["kernel"] not in NUMBERS and not combined:
            assert row["st"][1] >= 16, row
    assert seen > 50


FORWARD_RATIOS = {
    "mix [N, 3, 224, 224] bfloat16": 1.51,  # a row, and its partner a second time
    "mix [N, 3, 224, 224] float32 box=2": 1.05,  # either of them, and both where the box's edges cut a sector
    "soft_ce [N, 32768] bfloat16": 1.01,
    "soft_ce [N, 1000] float32 K=1": 1.05,
    "soft_ce backward [N, 1000] float16": 1.1,
    "soft_ce [N, 131072] bfloat16": 1.51,  # beyond one tile: read twice
    "soft_ce [N, 128257] bfloat16": 1.51,
    "soft_ce [N, 21841] bfloat16 lambda gradient": 1.05,
    "soft_ce [N, 21841] float32": 1.05,
    "soft_ce [N, 21841] float16": 1.05,
    "soft_ce backward [N, 21841] float16": 1.05,
    "soft_ce [N, 150, 32, 32] float32 K=1": 1.05,
    "soft_ce backward [N, 150, 32, 32] bfloat16 formed, reduction=none": 1.05,
    "dense_ce [N, 10001] float32": 1.05,
    "dense_ce [N, 1000] float32 mixed": 1.05,
    "dense_ce [N, 16384] bfloat16 smoothing=0.1": 1.01,
    "soft_bce [N, 1000] float32": 1.05,
    "soft_bce [N, 1000] bfloat16": 1.05,
    "soft_bce [N, 1001] bfloat16": 1.1,
    "soft_bce [N, 21841] bfloat16": 1.05,
    "soft_bce [N, 21841] float32 dense": 1.01,
    "soft_bce [N, 150, 16, 16] bfloat16 lambda gradient": 1.05,
    "soft_bce [N, 1000, 16, 16] bfloat16 lambda gradient": 1.05,
    "soft_bce backward [N, 150, 16, 16] bfloat16 formed, reduction=none": 1.01,
    "soft_bce [N, 527] float32 mixed": 1.05,
    "soft_bce [N, 19, 16, 16] bfloat16 mixed": 1.01,
    "soft_bce [N, 131072] bfloat16": 1.05,  # nothing is read twice
}


@pytest.mark.parametrize("case", FORWARD_RATIOS)
def test_bytes_are_those_of_the_formula(case):
    """The limits are what was measured; a few of them against what the kernels are said to read and write."""
    (ratio,) = [
        row["ratio"]
        for row in LIMITS["bytes"]
        if row["case"] == case and row["kernel"] not in ("_mass_kernel", "_inverse_index_kernel")
    ]
    assert FORWARD_RATIOS[case] - 0.11 < ratio <= FORWARD_RATIOS[case]


# --- the guard bites -----------------------------------------------------------------------------------------------------------


def doctored(table, change, triton=None, limits=LIMITS):
    """The limits, measured anew, but for one row."""
    rows = {**limits, "triton": triton or limits["triton"], table: list(map(dict, limits[table]))}
    row = next(row for row in rows[table] if row["kernel"] == "_mix_fwd_kernel" and row.get("per_byte", 1))
    for key, value in change.items():
        row[key] = value(row[key])
    return rows


WORSE = {
    "spills": ("compiled", {"spill_bytes": lambda n: n + 8}, "spill_bytes 8, the limit is 0"),
    "many spills": ("compiled", {"spill_bytes": lambda n: n + 200}, "spill_bytes 200, the limit is 0"),
    "registers": ("compiled", {"registers": lambda n: n + 1}, "registers"),
    "shared memory": ("compiled", {"shared_bytes": lambda n: n + 16}, "shared_bytes"),
    "narrower loads": ("compiled", {"ld": lambda span: [span[0] // 2, span[1]]}, "ld of"),
    "no wide load": ("compiled", {"ld": lambda span: [span[0], span[0]]}, "ld of"),
    "narrower stores": ("compiled", {"st": lambda span: [span[0], span[1] // 2]}, "st of"),
    "one load in pieces": ("compiled", {"narrow": lambda counts: [counts[0] + 4, counts[1]]}, "loads of fewer than 16 bytes"),
    "one store in pieces": ("compiled", {"narrow": lambda counts: [counts[0], counts[1] + 1]}, "stores of fewer than 16 bytes"),
    "more instructions": ("compiled", {"instructions": lambda n: n + 1}, "instructions"),
    "more instructions for a byte": ("compiled", {"per_byte": lambda n: n + 0.1}, "per_byte"),
    "more warps": ("compiled", {"warps": lambda n: 2 * n}, "warps, the limit is for"),
    "no stores": ("compiled", {"st": lambda span: None}, "st of - bytes"),
    "more sectors": ("bytes", {"sectors": lambda n: n * 1.002}, "times the floor"),
    "fewer sectors": ("bytes", {"sectors": lambda n: n * 0.94}, "tighten it: python -m fastmix.bench static --update"),
    "other rows": ("bytes", {"rows": lambda n: n + 1}, "the limit is for"),
}


@pytest.mark.parametrize("what", WORSE)
def test_a_worse_row_is_told(what):
    table, change, words = WORSE[what]
    problems = static.violations(doctored(table, change), LIMITS)
    assert len(problems) == 1
    assert "_mix_fwd_kernel: " in problems[0]
    assert words in problems[0]


@pytest.mark.parametrize("what", WORSE)
def test_what_another_triton_is_held_to(what):
    """Registers and widths are a compiler's own, and a few spills; bytes are not."""
    table, change, _ = WORSE[what]
    problems = static.violations(doctored(table, change, "3.99.0"), LIMITS)
    assert len(problems) == (what == "many spills" or table == "bytes")


def test_shared_memory_that_an_architecture_lacks_is_told():
    asked = doctored("compiled", {"shared_bytes": lambda n: 300000})
    problems = static.violations(asked, asked)
    assert [problem.split(": ")[1] for problem in problems] == [
        f"shared_bytes 300000, the architecture has {static.SHARED['100']}"
    ]


def test_a_part_is_updated_alone():
    """Rows of the asked cases, architectures and tables are replaced, those of cases that are no more go."""
    row, other = [row for row in LIMITS["compiled"] if row["arch"] == "90" and row["kernel"] == "_mix_fwd_kernel"][:2]
    gone = {**other, "case": "no such case"}
    limits = {"triton": "3", "compiled": [row, other, gone], "bytes": LIMITS["bytes"][:1]}
    measured = {"triton": "3", "compiled": [{**row, "registers": 1}], "bytes": []}
    merged = static.merged(limits, measured, ["90"], [row["case"]], ("compiled",))
    assert merged["bytes"] == limits["bytes"]
    assert merged["compiled"] == [other, {**row, "registers": 1}]


def test_what_is_no_worse_passes():
    assert static.violations(LIMITS, LIMITS) == []
    better = {"registers": lambda n: n - 1, "shared_bytes": lambda n: 0, "ld": lambda span: [span[1], span[1]]}
    assert static.violations(doctored("compiled", better), LIMITS) == []
    assert static.violations(doctored("bytes", {"sectors": lambda n: n * 0.97}), LIMITS) == []


@pytest.mark.parametrize("table", ["compiled", "bytes"])
def test_rows_without_limits_and_limits_without_rows(table):
    fewer = {**LIMITS, table: LIMITS[table][1:]}
    case, kernel = LIMITS[table][0]["case"], LIMITS[table][0]["kernel"]
    for measured, limits, words in ((LIMITS, fewer, "there is no limit"), (fewer, LIMITS, "nobody measures")):
        (problem,) = static.violations(measured, limits)
        assert case in problem
        assert kernel in problem
        assert words in problem
    twice = {**LIMITS, table: [*LIMITS[table], LIMITS[table][0]]}
    assert len(static.violations(twice, LIMITS)) == len(static.violations(LIMITS, twice)) == 1


def test_a_part_is_held_to_its_own_limits():
    case = "soft_ce [N, 1000] bfloat16"
    part = {
        **LIMITS,
        "bytes": [],
        "compiled": [row for row in LIMITS["compiled"] if row["case"] == case and row["arch"] == "90"],
    }
    assert len(part["compiled"]) == 2
    assert static.violations(part, LIMITS, ("90",), ("compiled",), [case]) == []
    assert len(static.violations(part, LIMITS, ("90",), ("compiled", "bytes"), [case])) == 2
    assert len(static.violations(part, LIMITS, ("80", "90"), ("compiled",), [case])) == 2
    assert len(static.violations(part, LIMITS, ("90",), ("compiled",))) > 20


def test_the_file_is_as_it_is_written():
    assert static.dump(LIMITS) == static.LIMITS.read_text()
    shuffled = {**LIMITS, "bytes": LIMITS["bytes"][::-1], "compiled": LIMITS["compiled"][::-1]}
    assert static.dump(shuffled) == static.dump(LIMITS)
    assert len(static.dump(LIMITS).splitlines()) == len(LIMITS["compiled"]) + len(LIMITS["bytes"]) + 7


# --- counting ------------------------------------------------------------------------------------------------------------------

if INTERPRETER:
    import triton
    import triton.language as tl

    @triton.jit
    def _copy_kernel(x_ptr, out_ptr, stride, size, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.load(x_ptr + at * stride, mask=at < size), mask=at < size)

    @triton.jit
    def _read_twice_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        once = tl.load(x_ptr + at)
        tl.store(out_ptr, tl.sum(once + tl.load(x_ptr + at), 0))

    @triton.jit
    def _broadcast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
        x = tl.load(x_ptr + tl.arange(0, BLOCK) * 0)
        tl.store(out_ptr, tl.sum(x, 0))

    @triton.jit
    def _transposed_kernel(x_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        at = tl.arange(0, ROWS)[None, :] * COLUMNS + tl.arange(0, COLUMNS)[:, None]
        tl.store(x_ptr + at, at)

    @triton.jit
    def _atomic_kernel(x_ptr, lock_ptr, size, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.atomic_add(x_ptr + at, at.to(tl.float32), mask=at < size)
        tl.atomic_cas(lock_ptr, 0, 1)


def moved_by(kernel, grid, *arguments, **sizes):
    """(bytes of lanes, of sectors) of one launch."""
    if not INTERPRETER:
        pytest.skip(NO_INTERPRETER if TRITON else NO_TRITON)
    with traffic.count() as moved:
        globals()[kernel][grid](*arguments, **sizes)
    assert list(moved) == [kernel]
    return moved[kernel].lanes, moved[kernel].sectors


@pytest.mark.parametrize(
    ("dtype", "start", "stride", "size", "programs", "block", "lanes", "sectors"),
    [
        (torch.float32, 0, 1, 256, 1, 256, (1024, 1024), (1024, 1024)),  # as it lies
        (torch.float32, 0, 1, 256, 4, 64, (1024, 1024), (1024, 1024)),  # in tiles of whole sectors
        (torch.float32, 0, 1, 8, 2, 4, (32, 32), (64, 64)),  # two programs in one sector
        (torch.float32, 4, 1, 8, 1, 8, (32, 32), (64, 32)),  # across a sector's edge
        (torch.float32, 0, 8, 16, 1, 16, (64, 64), (512, 64)),  # a sector each
        (torch.float32, 0, 2, 16, 1, 16, (64, 64), (128, 64)),
        (torch.float32, 0, 0, 128, 1, 128, (512, 512), (32, 512)),  # all lanes at one number
        (torch.float32, 0, 1, 100, 1, 128, (400, 400), (416, 416)),  # lanes that are masked ask for nothing
        (torch.float32, 0, 1, 0, 3, 128, (0, 0), (0, 0)),
        (torch.bfloat16, 0, 1, 256, 1, 256, (512, 512), (512, 512)),
        (torch.float64, 0, 1, 5, 1, 8, (40, 40), (64, 64)),
        (torch.int8, 0, 1, 33, 1, 64, (33, 33), (64, 64)),
    ],
)
def test_loads_and_stores(dtype, start, stride, size, programs, block, lanes, sectors):
    x, out = torch.zeros(512, dtype=dtype), torch.zeros(512, dtype=dtype)
    assert x.data_ptr() % 32 == out.data_ptr() % 32 == 0
    moved = moved_by("_copy_kernel", (programs,), x[start:], out, stride, size, BLOCK=block)
    assert moved == (sum(lanes), sum(sectors))


def test_reading_again_counts_again():
    x, out = torch.zeros(64), torch.zeros(1)
    assert moved_by("_read_twice_kernel", (1,), x, out, BLOCK=64) == (2 * 256 + 4, 2 * 256 + 32)
    assert moved_by("_broadcast_kernel", (3,), x, out, BLOCK=64) == (3 * (256 + 4), 3 * (32 + 32))


def test_the_order_of_lanes_does_not_matter():
    x = torch.zeros(8, 16, dtype=torch.int32)
    assert moved_by("_transposed_kernel", (1,), x, ROWS=8, COLUMNS=16) == (512, 512)
    assert x.flatten().tolist() == list(range(128))


def test_atomics_count_twice():
    x, lock = torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    assert moved_by("_atomic_kernel", (1,), x, lock, 50, BLOCK=64) == (2 * (200 + 4), 2 * (224 + 32))
    assert x.tolist() == [*range(50), *[0] * 14]
    assert lock.item() == 1


def test_kernels_are_told_apart():
    x, out = torch.zeros(64), torch.zeros(64)
    moved_by("_copy_kernel", (1,), x, out, 1, 64, BLOCK=64)
    with traffic.count() as moved:
        _read_twice_kernel[(1,)](x, out, BLOCK=64)
        _broadcast_kernel[(1,)](x, out, BLOCK=64)
        _broadcast_kernel[(1,)](x, out, BLOCK=64)
    _broadcast_kernel[(1,)](x, out, BLOCK=64)  # nobody counts any more
    assert {name: (each.lanes, each.sectors) for name, each in moved.items()} == {
        "_read_twice_kernel": (516, 544),
        "_broadcast_kernel": (520, 128),
    }


def test_only_interpreted_kernels_can_be_counted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), traffic.count():
        pass


def test_floors_are_whole_sectors():
    assert traffic.whole_sectors(torch.zeros(()), None, torch.zeros(8), torch.zeros(9, dtype=torch.float16)) == 32 + 32 + 32
    assert traffic.whole_sectors(torch.zeros(0)) == 0


# --- compiled text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "widths"),
    [
        (
            "@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\n@%p1 ld.global.b16 { %rs1 }, [ %rd2 ];",
            [[2, 16], None],
        ),
        ("st.global.v2.b64 [ %rd1 + 0 ], { %rd2, %rd3 };\nst.global.b32 [ %rd1 ], { %r1 };", [None, [4, 16]]),
        ("ld.global.L1::evict_first.v8.b32 {}, [ %rd1 ];\nld.volatile.global.u8 %r1, [ %rd1 ];", [[1, 32], None]),
        ("ld.param.b64 %rd1, [p];\nst.shared.v4.b32 [ %r1 ], {};\nld.shared.b16 %rs1, [ %r1 ];", [None, None]),
        ("global_load_dwordx4 v[4:7], v0, s[2:3]\nglobal_load_ushort v1, v0, s[2:3]", [[2, 16], None]),
        ("buffer_load_short_d16_hi v1, v0\nbuffer_store_byte v1, v0\nflat_store_dwordx2 v[0:1], v[2:3]", [[2, 2], [1, 8]]),
        ("global_store_b128 v0, v[1:4]\nglobal_load_b32 v1\nglobal_load_d16_b16 v1", [[2, 4], [16, 16]]),
        ("s_load_dwordx4 s[0:3], s[4:5]\nds_write_b128 v0, v[1:4]", [None, None]),
    ],
)
def test_access_widths(text, widths):
    assert [static._ends(counts) for counts in static.access_counts(text)] == widths


def test_accesses_are_counted():
    text = (
        "ld.global.v4.b32 {};" * 3
        + "ld.global.b32 %r1;" * 2
        + "st.global.b16 [];"
        + "global_load_dwordx4 v1\nglobal_store_short v2"
    )
    assert static.access_counts(text) == ({16: 4, 4: 2}, {2: 2})


MACHINE_CODE = """
        /*1000*/                   MOV R1, c[0x0][0x28] ;
        /*1010*/              @!P0 EXIT ;
        /*1020*/                   IMAD.WIDE R2, R3, 0x4, R4 ;
        /*1030*/              @P1  BRA 0x1050 ;
        /*1040*/                   LDG.E.128 R4, [R2.64] ;
        /*1050*/                   NOP ;
        /*1060*/              @P0  BRA P2, 0x1020 ;
        /*1070*/                   STG.E [R2.64], R4 ;
        /*1080*/                   EXIT ;
        /*1090*/                   MUFU.RCP R5, R6 ;
        /*10a0*/                   BRA 0x10a0;
"""


def test_instructions_in_and_outside_of_loops():
    """Four in the loop, NOP not; what follows the last EXIT is no part of either."""
    assert sass.counted(MACHINE_CODE) == (4, 4)


def test_trips_of_loops():
    class Tile(NamedTuple):
        C: int
        BLOCK_C: int

    assert sass.trips({"tile": Tile(1001, 1024), "N": 3}) == 1
    assert sass.trips({"tile": Tile(21841, 4096)}) == 6
    assert sass.trips({"TILES": 8}) == 8
    assert sass.trips({"R": 9, "x": None}) == 9
    assert sass.trips({"C": 12, "TOGETHER": 4}) == 3
    assert sass.trips({"N": 4}) == 1


# --- the command ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_command_prints(tmp_path):
    """No row is cut, on a terminal of 40 columns."""
    if not TRITON:
        pytest.skip(NO_TRITON)
    file = tmp_path / "rows.json"
    asked = ["--arch", "90", "--case", COUNTED, "--json", str(file)]
    ran = python("import sys; sys.exit(static.main(sys.argv[1:]))", *asked, COLUMNS="40")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads(file.read_text())
    (case,) = [case for case in static.CASES if COUNTED in case]
    (row,), (counted,) = rows["compiled"], rows["bytes"]
    assert (row["kernel"], row["case"], row["arch"]) == ("_mix_fwd_kernel", case, "90")
    assert (counted["kernel"], counted["case"]) == ("_mix_fwd_kernel", case)
    assert static.violations(rows, LIMITS, ("90",), cases=[case]) == []
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("mix_fwd ")]
    assert f"  {case}  " in line
    assert line.rstrip().endswith(f" {counted['ratio']:.3f}")


@pytest.mark.slow
def test_the_table_is_never_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    static.screen.table(static.HEADINGS, static.lines(FEW), static.RIGHT)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split() for line in shown] == [list(static.HEADINGS), *(" ".join(row).split() for row in static.lines(FEW))]
    assert len(shown) > len(FEW["compiled"])


def test_without_triton_it_says_so(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # main() takes it away
    monkeypatch.setitem(sys.modules, "triton", None)
    assert static.main(["--bytes-only"]) == 2
    assert "static: needs Triton" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "no such case"], "--case: expected part of a name such as"),
        (["--arch", "7"], "--arch"),
        (["--bytes-only", "--compile-only"], "not allowed with"),
    ],
)
def test_bad_arguments(arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # main() takes it away
    with pytest.raises(SystemExit) as stopped:
        static.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_limits_are_updated_and_may_be_missing(capsys, monkeypatch, tmp_path):
    if not TRITON:
        pytest.skip(NO_TRITON)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    monkeypatch.setattr(static, "arches", lambda: list(static.ARCHES))
    monkeypatch.setattr(static, "LIMITS", tmp_path / "costs.json")
    worse = doctored("compiled", {"registers": lambda n: n + 1}, limits=FEW)
    rows = FEW
    monkeypatch.setattr(static, "measure", lambda wanted, cases, tables: rows)
    assert static.main([]) == 0  # as in an installed package
    assert "There is no costs.json here" in capsys.readouterr().out
    assert static.main(["--update"]) == 0
    assert static.LIMITS.read_text() == static.dump(FEW)
    rows = worse
    assert static.main(["--json", str(tmp_path / "rows.json")]) == 1
    assert "_mix_fwd_kernel: registers" in capsys.readouterr().out
    assert (tmp_path / "rows.json").read_text() == static.dump(worse)
    static.LIMITS.unlink()
    rows = doctored("compiled", {"spill_bytes": lambda n: n + 4}, limits=FEW)
    assert static.main([]) == 1
