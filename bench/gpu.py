"""All that a GPU machine is needed for, by one command: tests, sanitizer, kernel variants, first calls, errors, timings.

    python -m fastmix.bench gpu --out DIR [--minutes 8] [--commit SHA] [--only PART ...]

Every part is a process of its own with a time limit, its share of what is left, and the next part runs whether or not it succeeds.
DIR/result.json is written anew as parts report, and is whole at every moment; what a part prints is in DIR/PART.log. The verdict comes
last. Where there is no GPU, parts that need one are skipped. The exit status is 0 if every part passed or was skipped, else 1.
"""

import argparse
import contextlib
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
SLACK = 0.06  # of its limit, if that is more: a part's soft budget ends so much before it
RESERVE = 6.0  # seconds of all for looking at the machine and for the verdict
LOG_BYTES = 4 * 2**20
LAST_TESTS = "_properties.py"  # many small examples, each to be compiled
WORKERS = (4, 8)
NO_GPU = "no GPU here"
MOST_LINES = 40  # of the verdict
# of a part's findings, what stands at the top of the result, as `python -m fastmix.bench report` looks for it
TOP = ("machine", "copy GB/s", "rows", "missing", "not run", "variants", "cold", "numerics")


@dataclass(frozen=True)
class Part:
    """command(output file, soft seconds) -> argv, or a string: why it is skipped. look(output file) -> (one line, fields) of
    what it has found so far. `on_cpu` is "always", "never", or "asked": if --only names it."""

    share: float
    command: Callable
    look: Callable
    on_cpu: str = "never"


# The parts


def _module(name, *options):
    return [sys.executable, "-m", f"fastmix.bench.{name}", *options]


def _loaded(path):
    """What a part has written so far, or nothing; it may be writing just now."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError):
        return {}


def _tests(out, seconds):
    if not CHECKOUT:
        return "no tests here: this is not a checkout"
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: (path.name.endswith(LAST_TESTS), path.name))
    workers = min(max((os.cpu_count() or 1) // 2, WORKERS[0]), WORKERS[1])
    command = [sys.executable, "-m", "pytest", *map(str, files), "-m", "gpu", "-v", "--tb=short"]
    command += ["-p", "fastmix.bench.reports", "--report-log", out, "-o", f"faulthandler_timeout={max(seconds / 2, 20):.0f}"]
    return command + ["-n", str(workers)] * bool(importlib.util.find_spec("xdist"))


def _look_at_tests(out):
    from fastmix.bench import reports

    found = reports.read(out)
    line = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    return "; ".join([line, *map(_failure, found["failures"][:1])]), found


def _failure(found):
    return f"{found['test'].rpartition('/')[2]}: {(found['why'].splitlines() or [''])[0]}"


def _look_at_sanitizer(found):
    return "; ".join(f"{tool}: {row['status']}, {row['summary']}" for tool, row in found.items()), {"tools": found}


def _look_at_variants(found):
    rows = found.get("rows", [])
    cases, errors = {row["case"] for row in rows}, sum("error" in row for row in rows)
    line = f"{len(cases)} cases, {len(rows)} rows, {errors} that did not run or were wrong"
    return line, {"variants": rows, "left out": found.get("not run")}


def _look_at_cold(found):
    return f"{len(found.get('rows', []))} rows; {len(found.get('missing', {}))} things not measured", {"cold": found}


def numerics_by_dtype(out):
    """The errors of each dtype in a process of its own, since most of the time is compilation; joined as they come."""
    running = {}
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        command = _module("numerics", "--dtype", dtype, "--json", f"{out}.{dtype}")
        running[dtype] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows, worst = [], 0
    for dtype, process in running.items():
        text, _ = process.communicate()
        worst = max(worst, abs(process.returncode))
        rows += _loaded(f"{out}.{dtype}").get("rows", [])
        pathlib.Path(out).write_text(json.dumps(rows))
        print(text, f"{dtype}: exit status {process.returncode}", sep="\n", flush=True)
    return worst


def _numerics(out, seconds):
    code = "import sys; from fastmix.bench import gpu; sys.exit(gpu.numerics_by_dtype(sys.argv[1]))"
    return [sys.executable, "-c", code, out]


def _look_at_numerics(found):
    rows = found or []
    beyond, further = (sum(row["verdict"].startswith(word) for row in rows) for word in ("BEYOND", "further"))
    backends = ", ".join(dict.fromkeys(row["backend"] for row in rows))
    line = f"{len(rows)} rows ({backends}): {beyond} beyond the limit, {further} further from the truth than eager torch"
    return line, {"numerics": rows}


def _look_at_bench(found):
    rows, (missing, not_run) = found.get("rows", []), (found.get(key) or [] for key in ("missing", "not run"))
    line = f"{len(rows)} rows, {len(missing)} peers missing, {len(not_run)} not run"
    return line, {"rows": rows, **{key: found[key] for key in ("machine", "copy GB/s", "missing", "not run") if key in found}}


def _part(share, name, look, on_cpu="never"):
    """A command of the benchmark that takes --json and --budget."""
    command = lambda out, seconds: _module(name, "--json", out, "--budget", f"{seconds:.0f}")  # noqa: E731
    return Part(share, command, lambda out: look(_loaded(out)), on_cpu)


PARTS = {
    "tests": Part(36, _tests, _look_at_tests),
    "sanitizer": _part(8, "sanitize", _look_at_sanitizer),
    "variants": _part(12, "variants", _look_at_variants),
    "cold": _part(9, "cold", _look_at_cold, on_cpu="always"),
    "numerics": Part(5, _numerics, lambda out: _look_at_numerics(_loaded(out))),
    "bench": _part(30, "run", _look_at_bench, on_cpu="asked"),
}


# The machine and the commit


def machine():
    """{"gpu", "versions", "host"}, by a process of its own; a torch that cannot say is a machine without a GPU."""
    run = {"capture_output": True, "text": True, "env": _environment()}
    code = "import json; from fastmix.bench import results; print(json.dumps(results.machine()))"
    try:
        ran = subprocess.run([sys.executable, "-c", code], timeout=90.0, **run)
        problem = None if ran.returncode == 0 else (ran.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        problem = "torch took more than 90 s to say"
    found = {} if problem else json.loads(ran.stdout.splitlines()[-1])
    gpu = None
    if "gpu" in found:
        gpu = {"name": found["gpu"], **{key: found[key] for key in ("capability", "gpu GB", "multiprocessors", "L2")}}
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            gpu["driver"] = subprocess.run(command, timeout=20.0, check=True, **run).stdout.strip()
    versions = {key: found.get(key) for key in ("python", "torch", "triton", "numpy", "cuda")}
    host = {"platform": sys.platform, "cpu": found.get("cpu"), "cores": os.cpu_count()}
    return {"gpu": gpu, "versions": {"fastmix": fastmix.__version__, **versions}, "host": host, "problem": problem}


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
    """This environment, without what would turn the kernels off; parts find this very package."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "FASTMIX_", "PYTEST_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def _signal(process, number):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _end(process):
    """Interrupts a part, and kills it and what it started if it does not end by itself."""
    _signal(process, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _signal(process, signal.SIGKILL)  # what it may have left behind, too
    process.wait()


def run_part(command, log, limit, tick):
    """Runs a command into a log; returns its exit status, or None where it was killed. tick(seconds) is called on the way."""
    start, code = time.monotonic(), None
    with open(log, "wb") as file:
        pipes = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "start_new_session": True}
        process = subprocess.Popen(command, env=_environment(), cwd=ROOT if CHECKOUT else None, **pipes)
        try:
            while code is None and time.monotonic() - start < limit - GRACE:
                try:
                    code = process.wait(1.0)
                except subprocess.TimeoutExpired:
                    tick(time.monotonic() - start)
        finally:
            _end(process)
    _shorten(log)
    return code


def _shorten(log):
    """Cuts the middle out of a log that is too long."""
    text = pathlib.Path(log).read_bytes()
    if len(text) > LOG_BYTES:
        pathlib.Path(log).write_bytes(text[: LOG_BYTES // 2] + b"\n\n[... left out ...]\n\n" + text[-LOG_BYTES // 2 :])


def last_line(log):
    try:
        lines = pathlib.Path(log).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Result:
    """result.json, whole at every moment."""

    def __init__(self, path, **fields):
        self.path, self.fields = path, {**fields, "parts": {}}
        self.save()

    def put(self, part, status, seconds, summary, fields):
        """A part's status in "parts", and its findings: rows at the top, where readers look for them, the rest beside the status."""
        self.fields.update({key: fields[key] for key in TOP if key in fields})
        rest = {key: value for key, value in fields.items() if key not in TOP}
        self.fields["parts"][part] = {"status": status, "seconds": round(seconds, 1), "summary": summary, **rest}
        self.save()

    def save(self):
        from fastmix.bench.results import finite

        half = self.path.with_suffix(".tmp")
        half.write_text(json.dumps(finite(self.fields), indent=1))
        os.replace(half, self.path)


def soft(limit):
    """When a part should end by itself."""
    return max(limit - max(2 * GRACE, SLACK * limit), 1.0)


def status_of(code, found):
    """A part's status by its exit status (None: killed) and what it found."""
    if code is None:
        return FAILED if found.get("failures") else OUT_OF_TIME
    return PASSED if code == 0 else SKIPPED if code == SKIP_CODE else FAILED


def _run(name, part, command, out, limit, result):
    """Runs a part and puts what it finds into the result, as it comes and when it has ended: (status, one line)."""
    said, written, begun, log = 0.0, None, time.monotonic(), result.path.parent / f"{name}.log"

    def look():
        try:
            return part.look(out)
        except Exception as problem:  # a part that writes nonsense must not end the others
            return f"cannot be read: {type(problem).__name__}: {problem}", {}

    def tick(seconds):
        nonlocal said, written
        found = os.path.getmtime(out) if os.path.exists(out) else None
        if found != written:
            written = found
            result.put(name, "running", seconds, *look())
        if seconds - said > 10:
            said = seconds
            print(f"  {name}, {seconds:.0f} s: {last_line(log)[:110]}", flush=True)

    result.put(name, "running", 0.0, "", {})
    try:
        code = run_part(command, log, limit, tick)
        line, found = look()
    except OSError as problem:
        code, line, found = 1, str(problem), {}
    if code not in (0, None) and not found.get("failures"):
        line = "; ".join(filter(None, [line, f"exit status {code}: {last_line(log)[:160]}"]))
    status = status_of(code, found)
    result.put(name, status, time.monotonic() - begun, line, found)
    return status, line


def run_parts(parts, chosen, result, end, *, gpu, asked):
    """Runs the chosen parts; each has its share, among those to come, of the time that is left."""

    def here(part):
        return gpu is not None or part.on_cpu == "always" or (asked and part.on_cpu == "asked")

    for n, name in enumerate(chosen):
        part, begun = parts[name], time.monotonic()
        shares = sum(parts[other].share for other in chosen[n:] if other == name or here(parts[other]))
        limit = (end - begun) * part.share / shares
        with tempfile.TemporaryDirectory(prefix="fastmix-gpu-") as scratch:
            out = os.path.join(scratch, "found.json")
            command = part.command(out, soft(limit)) if here(part) else NO_GPU
            if isinstance(command, str) or limit < 2 * GRACE:
                status, line = (SKIPPED, command) if isinstance(command, str) else (OUT_OF_TIME, "no time left")
                result.put(name, status, 0.0, line, {})
            else:
                print(f"{name}: at most {limit:.0f} s", flush=True)
                status, line = _run(name, part, command, out, limit, result)
            print(f"{name}: {status} in {time.monotonic() - begun:.0f} s: {line[:200]}", flush=True)


def verdict(fields, width=150):
    """The closing table, at most 40 lines."""
    from fastmix.bench import results, variants

    gpu, versions = fields.get("gpu"), fields.get("versions", {})
    where = f"{gpu['name']}, driver {gpu.get('driver')}" if gpu else ": ".join(filter(None, [NO_GPU, fields.get("problem")]))
    lines = [f"{where}; torch {versions.get('torch')}, triton {versions.get('triton')}; commit {fields.get('commit')}"]
    for name, part in fields["parts"].items():
        lines.append(f"{name:<10} {part['status']:<12}{part['seconds']:>6.0f} s  {part['summary']}")
    lines += [f"  {_failure(found)}" for found in (fields["parts"].get("tests", {}).get("failures") or [])[1:5]]
    if fields.get("copy GB/s"):
        lines.append(f"copy bandwidth {fields['copy GB/s']:.0f} GB/s, read and written")
    found = results.fastest_others(fields.get("rows") or [])
    best = sorted((results.ratio_of(row), group, row["way"]) for group, (_, row) in found.items())
    if best:
        ahead = f"{sum(ratio >= 1 for ratio, _, _ in best)} of {len(best)} groups"
        lines.append(f"the best other way takes no less time than fastmix in {ahead}; its time over ours:")
        shown = best if len(best) <= 10 else [*best[:5], *best[-5:]]
        lines += [f"  {ratio:>7.2f}  {group}: {way}" for ratio, group, way in shown]
    won = sorted(variants.winners(fields.get("variants") or []), key=lambda row: row["ratio to default"])
    if won:
        lines.append(f"{len(won)} variants beat the default by more than 3 %:")
        lines += [f"  {row['ratio to default']:>7.3f}  {row['case']}: {row['variant']}" for row in won[:8]]
    lines = [line.replace("\n", " ") for line in lines]
    return [line if len(line) <= width else f"{line[: width - 3]}..." for line in lines][:MOST_LINES]


def main(argv=None, parts=None):
    from fastmix.bench.results import now

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
        result = Result(options.out / "result.json", **commit(options.commit), date=now())
    except (OSError, ValueError) as error:
        parser.error(str(error))
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
