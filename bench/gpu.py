"""All that a GPU machine is needed for, by one command: tests, sanitizer, kernel variants, first calls, errors, timings.

    python -m fastmix.bench gpu --out DIR [--minutes 8] [--commit SHA] [--only PART ...]

Every part is a process of its own with a time limit, its share of what is left, and the next one runs whatever became of it.
What is known is in DIR/result.json at every moment, written anew as parts report; what a part prints is in DIR/PART.log. The
verdict comes last. Where there is no GPU, parts that need one are skipped.

The exit status is 0 if every part passed or was skipped, else 1.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import fastmix

ROOT = pathlib.Path(fastmix.__file__).resolve().parent.parent
CHECKOUT = (ROOT / "constraints.txt").is_file() and (ROOT / "tests").is_dir()
PASSED, FAILED, SKIPPED, OUT_OF_TIME, INTERRUPTED = "passed", "failed", "skipped", "out of time", "interrupted"
SKIP_CODE = 3  # with this exit status a part says that it cannot run here
GRACE = 2.0  # seconds that a part has to end by itself once it is told to
SLACK = 0.06  # of its limit, if that is more: its soft budget ends before
RESERVE = 6.0  # seconds of all for looking at the machine and for the verdict
LOG_BYTES = 4 * 2**20
LAST_TESTS = ("test_properties.py",)  # many small examples, each to be compiled
WORKERS = (4, 8)
NO_GPU = "no GPU here"
MOST_LINES = 40  # of the verdict
# of a part's findings, what stands at the top of the result, as `python -m fastmix.bench report` looks for it
TOP = ("machine", "copy GB/s", "rows", "missing", "not run", "variants", "cold", "numerics")


@dataclass(frozen=True)
class Part:
    """command(output file, soft seconds) -> argv, or a string: why it is skipped. look(output file) -> (one line, fields) of
    what it has found so far."""

    share: float
    command: Callable
    look: Callable
    on_cpu: str = "never"  # "always", or "asked": if --only names it


# What each part runs, and what it tells


def _module(name, *options):
    return [sys.executable, "-m", f"fastmix.bench.{name}", *options]


def _loaded(path):
    """What a part has written so far, or None; it may be writing just now."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError):
        return None


def _tests(out, seconds):
    if not CHECKOUT:
        return "no tests here: this is not a checkout"
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: (path.name in LAST_TESTS, path.name))
    command = [
        sys.executable,
        "-m",
        "pytest",
        *map(str, files),
        "-m",
        "gpu",
        "-v",
        "--tb=short",
        "-p",
        "fastmix.bench.live_reports",
    ]
    command += ["-o", f"faulthandler_timeout={max(seconds / 2, 20):.0f}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(max((os.cpu_count() or 1) // 2, WORKERS[0]), WORKERS[1]))]
    return command


def _look_at_tests(out):
    from fastmix.bench import live_reports

    found = live_reports.read(out)
    line = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    if found["failures"]:
        first = found["failures"][0]
        line += f"; {_name(first['test'])}: {(first['why'].splitlines() or [''])[0]}"
    return line, found


def _name(test):
    return test.rpartition("/")[2]


def _look_at_sanitizer(out):
    found = _loaded(out) or {}
    return "; ".join(f"{tool}: {row['status']}, {row['summary']}" for tool, row in found.items()), {"tools": found}


def _look_at_variants(out):
    found = _loaded(out) or {}
    rows = found.get("rows", [])
    errors = sum("error" in row for row in rows)
    line = f"{len({row['case'] for row in rows})} cases, {len(rows)} rows, {errors} that did not run or were wrong"
    return line, {"variants": rows, "left out": found.get("not run")}


def _look_at_cold(out):
    found = _loaded(out) or {}
    return f"{len(found.get('rows', []))} rows; {len(found.get('missing', {}))} things not measured", {"cold": found}


def numerics_by_dtype(out):
    """The errors of each dtype in a process of its own, since most of the time is compilation; joined as they come."""
    from fastmix.bench import numerics

    running = {}
    for dtype in map(numerics.name_of, numerics.DTYPES):
        log = open(f"{out}.{dtype}.log", "w")  # noqa: SIM115
        command = _module("numerics", "--dtype", dtype, "--json", f"{out}.{dtype}")
        running[dtype] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), log
    rows, worst = [], 0
    for dtype, (process, log) in running.items():
        code = process.wait()
        log.close()
        worst = max(worst, abs(code))
        rows += (_loaded(f"{out}.{dtype}") or {}).get("rows", [])
        pathlib.Path(out).write_text(json.dumps(rows))
        print(pathlib.Path(log.name).read_text(), f"{dtype}: exit status {code}", sep="\n", flush=True)
    return worst


def _numerics(out, seconds):
    code = "import sys; from fastmix.bench import gpu; sys.exit(gpu.numerics_by_dtype(sys.argv[1]))"
    return [sys.executable, "-c", code, out]


def _look_at_numerics(out):
    rows = _loaded(out) or []
    beyond = sum(row["verdict"].startswith("BEYOND") for row in rows)
    further = sum(row["verdict"].startswith("further") for row in rows)
    backends = ", ".join(dict.fromkeys(row["backend"] for row in rows))
    line = f"{len(rows)} rows ({backends}): {beyond} beyond the limit, {further} further from the truth than eager torch"
    return line, {"numerics": rows}


def _look_at_bench(out):
    found = _loaded(out) or {}
    rows = found.get("rows", [])
    line = f"{len(rows)} rows, {len(found.get('missing') or {})} peers missing, {len(found.get('not run') or [])} not run"
    return line, {"rows": rows, **{key: found[key] for key in ("machine", "copy GB/s", "missing", "not run") if key in found}}


PARTS = {
    "tests": Part(36, _tests, _look_at_tests),
    "sanitizer": Part(8, lambda out, s: _module("sanitize", "--json", out, "--budget", f"{s:.0f}"), _look_at_sanitizer),
    "variants": Part(12, lambda out, s: _module("variants", "--json", out, "--budget", f"{s:.0f}"), _look_at_variants),
    "cold": Part(9, lambda out, s: _module("cold", "--json", out, "--budget", f"{s:.0f}"), _look_at_cold, on_cpu="always"),
    "numerics": Part(5, _numerics, _look_at_numerics),
    "bench": Part(30, lambda out, s: _module("run", "--json", out, "--budget", f"{s:.0f}"), _look_at_bench, on_cpu="asked"),
}


# The machine and the commit


PROBE = """
import importlib.metadata, json, platform
import torch
gpu = None
if torch.cuda.is_available():
    torch.ones(8, device="cuda").sum().item()
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "L2": getattr(properties, "L2_cache_size", None),
        "count": torch.cuda.device_count(),
    }
versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip}
for name in ("torch", "triton", "numpy", "fastmix", "pytest", "pytest-xdist"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
print("\\n" + json.dumps({"gpu": gpu, "versions": versions}))
"""


def _output(*command):
    """What a small program prints, or None if it fails."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20.0)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def machine():
    """{"gpu", "versions", "host"}; a torch that cannot say is a machine without a GPU."""
    try:
        ran = subprocess.run([sys.executable, "-c", PROBE], timeout=90.0, env=_environment(), capture_output=True, text=True)
        problem = None if ran.returncode == 0 else (ran.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        problem = "torch took more than 90 s to say"
    found = {"gpu": None, "versions": {}, "problem": problem} if problem else json.loads(ran.stdout.splitlines()[-1])
    found["versions"]["fastmix"] = found["versions"].get("fastmix") or fastmix.__version__
    if found["gpu"]:
        found["gpu"]["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {**found, "host": {"platform": sys.platform, "cores": os.cpu_count(), "memory": memory}}


def commit(given=None):
    """{"commit", "changed"}: git's, and whether there are changes on top, else what was given.

    Raises:
        ValueError: git says otherwise.
    """
    from fastmix.bench import results

    head, changed = results.commit()
    if given and head and not head.startswith(given):
        raise ValueError(f"--commit: expected {head[:12]}, which is checked out here, got {given}")
    return {"commit": head or given, "changed": changed}


# Running


def _environment(**more):
    """This one, without what would turn the kernels off; parts find this very package."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "FASTMIX_", "PYTEST_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def _end(process):
    """Interrupts a part, and kills it and what it started if it does not end by itself."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        _signal(process, number)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        break
    _signal(process, signal.SIGKILL)  # what it may have left behind


def _signal(process, number):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def run_part(command, log, limit, environment, tick):
    """Runs a command into a log; returns its exit status, or None where it was killed. tick(seconds) is called on the way."""
    start, code = time.monotonic(), None
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=ROOT if CHECKOUT else None,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    code = process.wait(1.0)
                    break
                except subprocess.TimeoutExpired:
                    pass
                if time.monotonic() - start > limit - GRACE:
                    break
                tick(time.monotonic() - start)
        finally:
            _end(process)
    _shorten(log)
    return code


def _shorten(log):
    """Keeps the beginning and the end of a log that is too long."""
    size = os.path.getsize(log)
    if size > LOG_BYTES:
        with open(log, "rb+") as file:
            head = file.read(LOG_BYTES // 2)
            file.seek(size - LOG_BYTES // 2)
            tail = file.read()
            file.seek(0)
            file.write(head + b"\n\n[... left out ...]\n\n" + tail)
            file.truncate()


def last_line(log):
    try:
        lines = pathlib.Path(log).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Result:
    """result.json, whole at every moment."""

    def __init__(self, path, **fields):
        self.path = path
        self.fields = {**fields, "parts": {}}
        self.save()

    def put(self, part, status, seconds, summary, fields):
        """A part's status in "parts", and its findings: rows at the top, for whoever reads them, the rest beside the status."""
        top = {key: fields[key] for key in TOP if key in fields}
        self.fields.update(top)
        rest = {key: value for key, value in fields.items() if key not in top}
        self.fields["parts"][part] = {"status": status, "seconds": round(seconds, 1), "summary": summary, **rest}
        self.save()

    def save(self):
        text = json.dumps(_finite(self.fields), indent=1)
        half = self.path.with_suffix(".tmp")
        half.write_text(text)
        os.replace(half, self.path)


def _finite(value):
    """For JSON, which has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def soft(limit):
    """When a part should end by itself."""
    return max(limit - max(2 * GRACE, SLACK * limit), 1.0)


def status_of(code, found):
    """A part's status by its exit status (None: killed) and what it found."""
    if code is None:
        return FAILED if found.get("failures") else OUT_OF_TIME
    return PASSED if code == 0 else SKIPPED if code == SKIP_CODE else FAILED


def run_parts(parts, chosen, result, end, *, gpu, asked):
    """Runs the chosen parts; each has its share, among those to come, of the time that is left."""

    def here(part):
        return gpu is not None or part.on_cpu == "always" or (asked and part.on_cpu == "asked")

    for n, name in enumerate(chosen):
        part, begun = parts[name], time.monotonic()
        limit = (
            (end - begun) * part.share / sum(parts[other].share for other in chosen[n:] if other == name or here(parts[other]))
        )
        log = result.path.parent / f"{name}.log"
        with tempfile.TemporaryDirectory(prefix="fastmix-gpu-") as scratch:
            out = os.path.join(scratch, "found.json")
            command = part.command(out, soft(limit)) if here(part) else NO_GPU
            if isinstance(command, str) or limit < 2 * GRACE:
                reason = command if isinstance(command, str) else "no time left"
                result.put(name, SKIPPED if isinstance(command, str) else OUT_OF_TIME, 0.0, reason, {})
                print(f"{name}: {reason}", flush=True)
                continue
            print(f"{name}: at most {limit:.0f} s", flush=True)
            said = {"at": 0.0, "file": None}

            def look():
                try:
                    return part.look(out)  # noqa: B023
                except Exception as problem:  # what a part writes is not worth the others
                    return f"cannot be read: {type(problem).__name__}: {problem}", {}

            def tick(seconds):
                written = os.path.getmtime(out) if os.path.exists(out) else None  # noqa: B023
                if written != said["file"]:  # noqa: B023
                    said["file"] = written  # noqa: B023
                    result.put(name, "running", seconds, *look())  # noqa: B023
                if seconds - said["at"] > 10:  # noqa: B023
                    said["at"] = seconds  # noqa: B023
                    print(f"  {name}, {seconds:.0f} s: {last_line(log)[:110]}", flush=True)  # noqa: B023

            result.put(name, "running", 0.0, "", {})
            environment = _environment(FASTMIX_REPORTS=out) if name == "tests" else _environment()
            try:
                code = run_part(command, log, limit, environment, tick)
                line, found = look()
            except OSError as problem:
                code, line, found = 1, str(problem), {}
            status, seconds = status_of(code, found), time.monotonic() - begun
            if code not in (0, None) and not found.get("failures"):
                line = "; ".join(filter(None, [line, f"exit status {code}: {last_line(log)[:160]}"]))
            result.put(name, status, seconds, line, found)
            print(f"{name}: {status} in {seconds:.0f} s: {line[:200]}", flush=True)


# The verdict


def verdict(fields, width=150):
    """The closing table, at most 40 lines."""
    from fastmix.bench import results, variants

    lines, gpu = [], fields.get("gpu")
    where = f"{gpu['name']}, driver {gpu.get('driver')}" if gpu else ": ".join(filter(None, [NO_GPU, fields.get("problem")]))
    versions = fields.get("versions", {})
    lines.append(f"{where}; torch {versions.get('torch')}, triton {versions.get('triton')}; commit {fields.get('commit')}")
    for name, part in fields["parts"].items():
        lines.append(f"{name:<10} {part['status']:<12}{part['seconds']:>6.0f} s  {part['summary']}")
    failures = fields["parts"].get("tests", {}).get("failures") or []
    lines += [f"  {_name(f['test'])}: {(f['why'].splitlines() or [''])[0]}" for f in failures[1:5]]
    if fields.get("copy GB/s"):
        lines.append(f"copy bandwidth {fields['copy GB/s']:.0f} GB/s, read and written")
    found = results.fastest_others(fields.get("rows") or [])
    best = sorted((results.ratio_of(row), group, row["way"]) for group, (_, row) in found.items())
    if best:
        ahead = sum(ratio >= 1 for ratio, _, _ in best)
        lines.append(
            f"the best other way takes no less time than fastmix in {ahead} of {len(best)} groups; its time over ours:"
        )
        shown = best if len(best) <= 10 else [*best[:5], *best[-5:]]
        lines += [f"  {ratio:>7.2f}  {group}: {way}" for ratio, group, way in shown]
    won = sorted(variants.winners(fields.get("variants") or []), key=lambda row: row["ratio to default"])
    if won:
        lines.append(f"{len(won)} variants beat the default by more than 3 %:")
        lines += [f"  {row['ratio to default']:>7.3f}  {row['case']}: {row['variant']}" for row in won[:8]]
    lines = [line.replace("\n", " ") for line in lines]
    return [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines][:MOST_LINES]


def main(argv=None, parts=None):
    parts = PARTS if parts is None else parts
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=pathlib.Path, help="where result.json and the logs go")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    parser.add_argument("--commit", help="what this is, where there is no git to tell")
    parser.add_argument("--only", nargs="+", choices=parts, metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes}")
    end = time.monotonic() + 60 * options.minutes - RESERVE
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        head = commit(options.commit)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    result = Result(options.out / "result.json", **head, date=date)
    result.fields.update(machine())
    result.save()
    chosen = [name for name in parts if name in (options.only or parts)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the part that runs is ended too
    try:
        run_parts(parts, chosen, result, end, gpu=result.fields["gpu"], asked=bool(options.only))
    except KeyboardInterrupt:
        for part in result.fields["parts"].values():
            part["status"] = INTERRUPTED if part["status"] == "running" else part["status"]
        result.save()
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n" + "\n".join(verdict(result.fields)), flush=True)
    statuses = {part["status"] for part in result.fields["parts"].values()}
    return 0 if statuses <= {PASSED, SKIPPED} else 1


if __name__ == "__main__":
    sys.exit(main())
