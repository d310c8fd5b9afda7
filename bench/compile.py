"""Compiles kernels ahead, on a machine without a GPU, and packs them for one whose time is short.

    python -m fastmix.bench compile [--out FILE] [--arch 90] [--case TEXT] [--triton WHERE ...]

The programs are those of `bench sanitize`, `bench numerics` and `bench static`. They are found again by the same Triton and the same
source alone: `python -m fastmix.bench gpu --cache FILE` unpacks them and says how many were read. Without FILE it only says what
cannot be compiled. --triton does that with other Tritons, each in a process of its own: WHERE is a Python that has it, or folders
with commas between them that come first in the search path of this one.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import io
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time

import fastmix
from fastmix import _backend
from fastmix.bench import numerics, results, samples, sanitize, static

ABOUT, GROUP = "about.json", "__grp__"
BUNCHES = 8  # of cases, for each process, so that none ends long before the others


def triton_key():
    """What Triton puts before the names of all that it caches: its own code, compiled and not."""
    import triton.compiler.compiler as compiler

    if hasattr(compiler, "triton_key"):
        return compiler.triton_key()
    from triton.runtime import cache

    return cache.triton_key()


def calls():
    """{name: call}, on CPU tensors, of all that launches the programs."""
    found = {f"sanitize {name}": call for name, call in sanitize.cases("cpu").items()}
    for case, op in numerics.CASES.items():
        options = {key: value for key, value in op.hard[case].items() if key not in ("shape", "small", "dtypes")}
        for dtype in numerics.dtypes_of(case):
            shape = op.hard[case].get("shape", op.shapes[0])
            found[f"numerics {op.name} {case} {samples.name_of(dtype)}"] = functools.partial(
                lambda op, *drawn, **options: op.results(op.sample(samples.Draw(), *drawn, **options)),
                op,
                shape,
                dtype,
                **options,
            )
    return {**found, **{f"static {name}": case.call for name, case in static.CASES.items() if case.compiled}}


def compile_calls(arch, names):
    """Compiles what the calls of these names launch, into Triton's cache; returns {name: error} of those that cannot be."""
    static._cost = lambda compiled: None
    _backend._why_not_triton = lambda device: None
    every, errors = calls(), {}
    for name in names:
        try:
            with fastmix.backend("triton"):
                static.compile_launches(arch, every[name])
        except Exception as error:  # one that no GPU of this architecture could run either, or a fault: both are told
            errors[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return errors


def pack(folder, file, arch):
    """Packs a cache folder of Triton's: the binaries and what is said of them. Returns how many programs there are."""
    import triton

    folder, programs = pathlib.Path(folder), 0
    head, changed = results.commit()
    about = {"triton": triton_key(), "version": triton.__version__, "arch": arch, "commit": head, "changed": changed}
    with tarfile.open(file, "w:gz") as archive:

        def add(name, text):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))

        add(ABOUT, json.dumps(about).encode())
        for group in sorted(folder.glob(f"*/{GROUP}*.json")):
            paths = json.loads(group.read_text())["child_paths"]
            kept = [name for name in paths if name.endswith((".cubin", ".json"))]
            if any(name.endswith(".cubin") for name in kept):
                programs += 1
                add(f"{group.parent.name}/{group.name}", json.dumps({"child_paths": dict.fromkeys(kept, "")}).encode())
                for name in kept:
                    add(f"{group.parent.name}/{name}", (group.parent / name).read_bytes())
    return programs


def unpack(file, folder):
    """Unpacks into a cache folder of Triton's, where its group files name the files beside them. Returns what is said of them."""
    folder = pathlib.Path(folder)
    with tarfile.open(file) as archive:
        for entry in archive:  # extractall has a filter since Python 3.11.4 alone
            parts = pathlib.PurePosixPath(entry.name).parts
            content = archive.extractfile(entry) if len(parts) <= 2 and ".." not in parts and parts[0] != "/" else None
            if content is None:
                raise ValueError(f"expected files of programs, got {entry.name!r}")
            (folder / entry.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / entry.name).write_bytes(content.read())
    for group in folder.glob(f"*/{GROUP}*.json"):
        paths = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in paths}}))
        os.utime(group, (0, time.time()))  # never read: the next reader changes that
    about = json.loads((folder / ABOUT).read_text())
    return {**about, "same Triton": about.pop("triton") == triton_key(), "programs": len(list(folder.glob(f"*/{GROUP}*.json")))}


def used(folder):
    """{"read": programs that were found in an unpacked cache, "compiled": those that were added}; the first is told by the files'
    time of access, which a file system may not keep."""
    groups = list(pathlib.Path(folder).glob(f"*/{GROUP}*.json"))
    read = [group.stat().st_atime > 0 for group in groups]
    added = [any(group.parent.glob("*.ptx")) for group in groups]  # Triton keeps it of what it compiles; archives have none
    return {"read": sum(was and not new for was, new in zip(read, added, strict=True)), "compiled": sum(added)}


def compile_elsewhere(where, arch="90", case=""):
    """Compiles the same in a process with another Triton; returns (exit status, what it printed)."""
    python = pathlib.Path(where).is_file()
    first = [] if python else where.split(",")
    for folder in first:
        if not pathlib.Path(folder).is_dir():
            return 2, f"{where}: expected a Python or folders, got {folder!r}"
    root = str(pathlib.Path(fastmix.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*first, root])}
    command = [where if python else sys.executable, "-m", "fastmix.bench", "compile", "--arch", arch, "--case", case]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ran.returncode, f"{where}: {ran.stdout}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench compile", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the archive, a .tar.gz")
    parser.add_argument(
        "--arch", default="90", choices=[arch for arch in static.ARCHES if arch.isdigit()], help="(default: 90)"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only what is called so: 'numerics mix', 'static soft_ce'")
    parser.add_argument("--triton", nargs="+", metavar="WHERE", help="with these instead, which writes no archive")
    options = parser.parse_args(argv)
    if options.triton:
        if options.out:
            parser.error("--out: expected none beside --triton")
        worst = 0
        for where in options.triton:
            code, text = compile_elsewhere(where, options.arch, options.case)
            print(text, flush=True)
            worst = max(worst, abs(code))
        return worst
    names = [name for name in calls() if options.case in name]
    if not names:
        parser.error(f"--case: nothing is called {options.case!r}; names begin with sanitize, numerics or static")
    begun, cores = time.monotonic(), os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="fastmix-compile-") as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        os.environ.pop("TRITON_INTERPRET", None)
        bunches = [bunch for n in range(cores * BUNCHES) if (bunch := names[n :: cores * BUNCHES])]
        errors = {}
        with concurrent.futures.ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
            for found in pool.map(functools.partial(compile_calls, options.arch), bunches):
                errors |= found
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            pack(folder, options.out, options.arch)
        programs = len(list(pathlib.Path(folder).glob("*/*.cubin")))
    for name, error in errors.items():
        print(f"not compiled: {name}: {error}")
    packed = f"{options.out}, {options.out.stat().st_size / 1e6:.1f} MB: " if options.out else ""
    made = f"{programs} programs for sm_{options.arch} of {len(names)} calls, {len(errors)} of them with errors"
    version = importlib.metadata.version("triton")
    print(f"{packed}{made}, Triton {version}, in {time.monotonic() - begun:.0f} s")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
