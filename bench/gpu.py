"""All that a GPU machine is needed for, by one command: tests, sanitizer, kernel variants, first calls, errors, timings.

    python -m fastmix.bench gpu --out DIR [--minutes 8] [--commit SHA] [--only PART ...] [--cache FILE]

All parts take far longer than one run of minutes. Three runs, each of them whole in at most nine minutes:

    python -m fastmix.bench gpu --minutes 9 --out DIR/1 --only smoke tests
    python -m fastmix.bench gpu --minutes 9 --out DIR/2 --only sanitizer variants numerics
    python -m fastmix.bench gpu --minutes 9 --out DIR/3 --only bench

Every part is a process of its own with a time limit, its share of what is left, and the next part runs whether or not it succeeds;
but nothing runs after a `smoke` that failed: one case of each op against the oracle. DIR/result.json is written anew as parts report,
and is whole at every moment; what a part prints is in DIR/PART.log. The verdict comes last. --cache takes kernels that
`python -m fastmix.bench compile` has compiled ahead. Where there is no GPU, parts that need one are skipped. The exit status is 0 if
every part passed or was skipped, else 1.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest.mock
from collections.abc import Callable

import fastmix
from fastmix.bench import results

ROOT = pathlib.Path(fastmix.__file__).resolve().parent.parent
CHECKOUT = (ROOT / "constraints.txt").is_file() and (ROOT / "tests").is_dir()
PASSED, FAILED, SKIPPED, OUT_OF_TIME, INTERRUPTED = "passed", "failed", "skipped", "out of time", "interrupted"
SKIP_CODE = 3  # with this exit status a part says that it cannot run here
GRACE = 2.0  # seconds that a part has to end by itself once it is told to
SLACK = 0.06  # of its limit, if that is more: a part's soft budget ends so much before it
RESERVE = 6.0  # seconds of all for looking at the machine and for the verdict
WORKERS = (4, 16)  # of the tests: one a core, within these
NO_GPU = "no GPU here"
# of a part's findings, what stands at the top of the result, as `python -m fastmix.bench report` looks for it
TOP = ("machine", "copy GB/s", "rows", "missing", "not run", "variants", "cold", "numerics")


@dataclasses.dataclass(frozen=True)
class Part:
    """command(output file, soft seconds) -> argv, or a string: why it is skipped. look(output file) -> (one line, fields) of
    what it has found so far. `on_cpu` is "always", "never", or "asked": if --only names it. A part has `least` seconds, if
    there are so many; after a `vital` one that failed nothing runs."""

    share: float
    command: Callable
    look: Callable
    on_cpu: str = "never"
    least: float = 0.0
    vital: bool = False


# The parts


def _loaded(path):
    """What a part has written so far, or nothing; it may be writing just now."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError):
        return {}


def _tests(out, seconds):
    if not CHECKOUT:
        return "no tests here: this is not a checkout"
    workers = min(max(os.cpu_count() or 1, WORKERS[0]), WORKERS[1])
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests"), "-m", "gpu", "-v", "--tb=short", "-p", "no:benchmark"]
    command += ["-p", "fastmix.bench.reports", "--report-log", out, "-o", f"faulthandler_timeout={max(seconds / 2, 20):.0f}"]
    return command + ["-n", str(workers), "--maxschedchunk", "2"] * bool(importlib.util.find_spec("xdist"))


def _look_at_tests(out):
    from fastmix.bench import reports

    found = reports.read(out)
    line = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    line += f", {sum(found['not begun'].values())} not begun" * bool(found["not begun"])
    return "; ".join([line, *map(_failure, found["failures"][:1])]), found


def _failure(found):
    return f"{found['test'].rpartition('/')[2]}: {(found['why'].splitlines() or [''])[0]}"


def _look_at_tools(found):
    return "; ".join(f"{tool}: {row['status']}, {row['summary']}" for tool, row in found.items())


def _look_at_rows(found):
    """How many rows there are, and what else is listed; what rows say of themselves."""
    verdicts = collections.Counter(row["verdict"] for row in found.get("rows", []) if "verdict" in row)
    verdicts["that did not run or were wrong"] = sum("error" in row for row in found.get("rows", []))
    counts = {**{key: len(found[key]) for key in ("rows", "missing", "not run") if key in found}, **verdicts}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _part(share, name, *arguments, place=None, key=None, say=_look_at_rows, **more):
    """A command of the benchmark that takes --json; `place`: what its findings, or those of a `key`, are called in the result."""

    def command(out, seconds):
        budget = () if name == "numerics" else ("--budget", f"{seconds:.0f}")
        return [sys.executable, "-m", f"fastmix.bench.{name}", *arguments, "--json", out, *budget]

    def look(out):
        found = _loaded(out)
        return say(found), {place: found.get(key, []) if key else found} if place else found

    return Part(share, command, look, **more)


SMOKE = "--dtype", "float32", "bfloat16", "--first", "--small"
PARTS = {
    "smoke": _part(3, "numerics", *SMOKE, place="smoke", key="rows", least=40.0, vital=True),
    "tests": Part(32, _tests, _look_at_tests),
    "sanitizer": _part(11, "sanitize", place="tools", say=_look_at_tools),
    "variants": _part(11, "variants", place="variants", key="rows"),
    "cold": _part(7, "cold", place="cold", on_cpu="always"),
    "numerics": _part(7, "numerics", place="numerics", key="rows"),
    "bench": _part(29, "run", on_cpu="asked"),
}


def machine():
    """{"gpu", "versions", "host", "problem"}, by a process of its own; a torch that cannot say is a machine without a GPU."""
    run = {"capture_output": True, "text": True, "check": True, "env": _environment(), "timeout": 90.0}
    code = "import json; from fastmix.bench import results; print(json.dumps(results.machine()))"
    found, gpu, problem = {}, None, None
    try:
        found = json.loads(subprocess.run([sys.executable, "-c", code], **run).stdout.splitlines()[-1])
        if "gpu" in found:
            gpu = {"name": found["gpu"], **{key: found[key] for key in ("capability", "gpu GB", "multiprocessors", "L2")}}
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            gpu["driver"] = subprocess.run(command, **run).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        problem = ((getattr(error, "stderr", None) or "").strip().splitlines() or [str(error)])[-1]
    versions = {key: found.get(key) for key in ("python", "torch", "triton", "numpy", "cuda")}
    host = {"platform": sys.platform, "cpu": found.get("cpu"), "cores": os.cpu_count()}
    return {"gpu": gpu, "versions": {"fastmix": fastmix.__version__, **versions}, "host": host, "problem": problem}


# Running


def _environment():
    """This environment, without what would turn the kernels off; parts find this very package."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "FASTMIX_", "PYTEST_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _end(process):
    """Interrupts a part, and kills what is left of it and of what it has started."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE)


def run_command(command, log, limit, tick):
    """Runs a command into a log; returns its exit status, or None where it was ended. tick() is called every second."""
    end = time.monotonic() + limit - GRACE
    with open(log, "wb") as file:
        pipes = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "start_new_session": True}
        process = subprocess.Popen(command, env=_environment(), cwd=ROOT if CHECKOUT else None, **pipes)
        try:
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(1.0, max(end - time.monotonic(), 0.0)))
                tick()
            return process.returncode
        finally:
            _end(process)


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
        results.write(self.path, results.finite(self.fields))


def soft(limit):
    """When a part should end by itself."""
    return max(limit - max(2 * GRACE, SLACK * limit), 1.0)


def run_part(name, part, command, out, limit, result):
    """Runs a part and puts what it finds into the result, as it comes and when it has ended: (status, one line)."""
    begun, log = time.monotonic(), result.path.with_name(f"{name}.log")

    def look():
        try:
            return part.look(out)
        except Exception as problem:  # a part that writes nonsense must not end the others
            return f"cannot be read: {type(problem).__name__}: {problem}", {}

    def tick():
        result.put(name, "running", time.monotonic() - begun, *look())

    tick()
    try:
        code = run_command(command, log, limit, tick)
        line, found = look()
    except OSError as problem:
        code, line, found = 1, str(problem), {}
    if code not in (0, None) and not found.get("failures"):
        said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        line = "; ".join(filter(None, [line, f"exit status {code}: {said[-1][:160] if said else ''}"]))
    if code is None:
        status = FAILED if found.get("failures") else OUT_OF_TIME
    else:
        status = {0: PASSED, SKIP_CODE: SKIPPED}.get(code, FAILED)
    result.put(name, status, time.monotonic() - begun, line, found)
    return status, line


def run_parts(parts, chosen, result, end, *, gpu, asked):
    """Runs the chosen parts; each has its share, among those to come, of the time that is left."""

    def here(part):
        return gpu is not None or part.on_cpu == "always" or (asked and part.on_cpu == "asked")

    broken = None  # a vital part that failed
    for n, name in enumerate(chosen):
        part, begun = parts[name], time.monotonic()
        share = part.share / sum(parts[o].share for o in chosen[n:] if o == name or here(parts[o]))
        limit = min(max((end - begun) * share, part.least), end - begun)
        with tempfile.TemporaryDirectory(prefix="fastmix-gpu-") as scratch:
            out = os.path.join(scratch, "found.json")
            command = part.command(out, soft(limit)) if here(part) else NO_GPU
            command = f"{broken} failed" if broken else command
            if isinstance(command, str) or limit < 2 * GRACE:
                status, line = (SKIPPED, command) if isinstance(command, str) else (OUT_OF_TIME, "no time left")
                result.put(name, status, 0.0, line, {})
            else:
                print(f"{name}: at most {limit:.0f} s", flush=True)
                status, line = run_part(name, part, command, out, limit, result)
        print(f"{name}: {status} in {time.monotonic() - begun:.0f} s: {line[:200]}", flush=True)
        broken = name if part.vital and status == FAILED else broken


@contextlib.contextmanager
def compiled_ahead(file, result):
    """Triton's cache for all parts but the cold starts; "cache" of the result says what was in it and what was added."""
    if not file:
        yield
        return
    from fastmix.bench import compile

    with tempfile.TemporaryDirectory(prefix="fastmix-cache-") as folder, unittest.mock.patch.dict(os.environ):
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            result.fields["cache"] = found = compile.unpack(file, folder)
        except (OSError, ImportError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
            result.fields["cache"] = {"problem": f"{file}: {type(error).__name__}: {error}"}
            print(f"cache: {result.fields['cache']['problem']}", flush=True)
            yield
            return
        where = "" if found["same Triton"] else "; another Triton than this one, which will not find them"
        print(f"cache: {found['programs']} programs for sm_{found['arch']} of Triton {found['version']}{where}", flush=True)
        try:
            yield
        finally:
            found["compiled"] = compile.compiled_here(folder)
            result.save()
            print(f"cache: {found['compiled']} programs were compiled here", flush=True)


def verdict(fields, width=150):
    """The closing lines, at most 40."""
    from fastmix.bench import variants

    gpu, versions = fields.get("gpu"), fields.get("versions", {})
    where = f"{gpu['name']}, driver {gpu.get('driver')}" if gpu else ": ".join(filter(None, [NO_GPU, fields.get("problem")]))
    lines = [f"{where}; torch {versions.get('torch')}, triton {versions.get('triton')}; commit {fields.get('commit')}"]
    for name, part in fields["parts"].items():
        lines.append(f"{name:<10} {part['status']:<12}{part['seconds']:>6.0f} s  {part['summary']}")
    lines += [f"  {_failure(found)}" for found in fields["parts"].get("tests", {}).get("failures", [])[1:5]]
    if fields.get("copy GB/s"):
        lines.append(f"copy bandwidth {fields['copy GB/s']:.0f} GB/s, read and written")
    found = results.fastest_others(fields.get("rows") or [])
    best = sorted((results.ratio_of(row), f"{group}: {row['way']}") for group, (_, row) in found.items())
    if best:
        ahead = f"{sum(ratio >= 1 for ratio, _ in best)} of {len(best)} groups"
        lines.append(f"the best other way takes no less time than fastmix in {ahead}; its time over ours:")
        lines += [f"  {ratio:>7.2f}  {what}" for ratio, what in (best if len(best) <= 10 else best[:5] + best[-5:])]
    won = sorted(
        (row["ratio to default"], f"{row['case']}: {row['variant']}") for row in variants.winners(fields.get("variants") or [])
    )
    if won:
        lines.append(f"{len(won)} variants beat the default by more than 3 %:")
        lines += [f"  {ratio:>7.3f}  {what}" for ratio, what in won[:8]]
    return [line.replace("\n", " ")[:width] for line in lines][:40]


def main(argv=None, parts=None):
    parts = PARTS if parts is None else parts
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=pathlib.Path, help="where result.json and the logs go")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    parser.add_argument("--commit", help="what this is, where there is no git to tell")
    parser.add_argument("--cache", metavar="FILE", help="programs that `python -m fastmix.bench compile` has packed")
    parser.add_argument("--only", nargs="+", choices=parts, metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    options = parser.parse_args(argv)
    end = time.monotonic() + 60 * options.minutes - RESERVE
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        head, changed = results.commit()
        result = Result(options.out / "result.json", commit=head or options.commit, changed=changed, date=results.now())
    except OSError as error:
        parser.error(str(error))
    if options.commit and head and not head.startswith(options.commit):
        parser.error(f"--commit: expected {head[:12]}, which is checked out here, got {options.commit}")
    result.fields.update(machine())
    result.save()
    chosen = [name for name in parts if name in (options.only or parts)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the part that runs is ended too
    try:
        with compiled_ahead(options.cache, result):
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
