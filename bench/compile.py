"""Compiles kernels ahead, on a machine without a GPU, and packs them for one whose time is short.

    python -m fastmix.bench compile [--out FILE] [--arch 90] [--case TEXT]

The programs are those of `bench sanitize`, `bench numerics` and `bench static`. They are found again by the same Triton and the same
source alone: `python -m fastmix.bench gpu --cache FILE` unpacks them and says how many it lacked. Without FILE it only says what
cannot be compiled.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import sys
import tarfile
import tempfile
import time

import fastmix
from fastmix import _backend
from fastmix.bench import numerics, results, samples, sanitize, static

ABOUT, GROUPS = "about.json", "*/__grp__*.json"
BUNCHES = 8  # of cases, for each process, so that none ends long before the others


def triton_key():
    """What Triton puts before the names of all that it caches: its own code, compiled and not."""
    import triton.compiler.compiler as compiler

    if hasattr(compiler, "triton_key"):
        return compiler.triton_key()
    from triton.runtime import cache

    return cache.triton_key()


def _results(op, *drawn, **options):
    return op.results(op.sample(samples.Draw(), *drawn, **options))


def calls():
    """{name: call}, on CPU tensors, of all that launches the programs."""
    found = {f"sanitize {name}": call for name, call in sanitize.cases("cpu").items()}
    for case, op in numerics.CASES.items():
        options = {key: value for key, value in op.hard[case].items() if key not in ("shape", "small", "dtypes")}
        for dtype in numerics.dtypes_of(case):
            shape = op.hard[case].get("shape", op.shapes[0])
            call = functools.partial(_results, op, shape, dtype, **options)
            found[f"numerics {op.name} {case} {samples.name_of(dtype)}"] = call
    return {**found, **{f"static {name}": case.call for name, case in static.CASES.items() if case.compiled}}


def compile_calls(arch, names):
    """Compiles what the calls of these names launch, into Triton's cache; returns {name: error} of those that cannot be."""
    _backend._why_not_triton = lambda device: None
    every, errors = calls(), {}
    for name in names:
        try:
            with fastmix.backend("triton"):
                static.launches(arch, every[name])
        except Exception as error:  # one that no GPU of this architecture could run either, or a fault: both are told
            errors[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return errors


def programs(folder):
    """The binaries in a cache folder of Triton's."""
    return list(pathlib.Path(folder).glob("*/*.cubin"))


def pack(folder, file, arch):
    """Packs a cache folder of Triton's: the binaries and what is said of them. Its group files, which name the files beside them, keep
    the names alone."""
    import triton

    folder = pathlib.Path(folder)
    head, changed = results.commit()
    about = {"triton": triton_key(), "version": triton.__version__, "arch": arch, "commit": head, "changed": changed}
    (folder / ABOUT).write_text(json.dumps(about))
    for group in folder.glob(GROUPS):
        names = json.loads(group.read_text())["child_paths"]
        kept = {name: name for name in names if name.endswith((".cubin", ".json"))}
        group.write_text(json.dumps({"child_paths": kept}))
    with tarfile.open(file, "w:gz") as archive:
        for path in sorted([folder / ABOUT, *folder.glob("*/*.json"), *programs(folder)]):
            archive.add(path, path.relative_to(folder))


def unpack(file, folder):
    """Unpacks into a cache folder of Triton's; returns what is said of it."""
    folder = pathlib.Path(folder)
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    for group in folder.glob(GROUPS):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
    about = json.loads((folder / ABOUT).read_text())
    return {**about, "same Triton": about.pop("triton") == triton_key(), "programs": len(programs(folder))}


def compiled_here(folder):
    """How many programs were added to an unpacked cache: Triton keeps the assembly text of those, and archives have none."""
    return len(list(pathlib.Path(folder).glob("*/*.ptx")))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench compile", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="the archive, a .tar.gz")
    parser.add_argument(
        "--arch", default="90", choices=[arch for arch in static.ARCHES if arch.isdigit()], help="(default: 90)"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only what is called so: 'numerics mix', 'static soft_ce'")
    options = parser.parse_args(argv)
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
        count = len(programs(folder))
    for name, error in errors.items():
        print(f"not compiled: {name}: {error}")
    packed = f"{options.out}, {options.out.stat().st_size / 1e6:.1f} MB: " if options.out else ""
    made = f"{count} programs for sm_{options.arch} of {len(names)} calls, {len(errors)} of them with errors"
    version = importlib.metadata.version("triton")
    print(f"{packed}{made}, Triton {version}, in {time.monotonic() - begun:.0f} s")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
