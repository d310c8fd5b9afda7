"""Builds the native library with the system's C compiler, once for each user and machine.

The file's name holds a hash of the sources, flags, compiler and CPU, and one of its own content, so that a damaged or outdated file
is never loaded. Who builds holds a lock, and the finished file gets its name in one step: processes that begin together build once, and a
killed build leaves nothing that could be loaded.
"""

import ctypes
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HERE = pathlib.Path(__file__).parent
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread"]
CPU_FLAGS = {
    "x86_64": ["-march=native", "-mprefer-vector-width=512"],  # 1.35 times as fast in bfloat16, where there is AVX-512
    "aarch64": ["-mcpu=native"],
    "arm64": ["-mcpu=native"],
}

# The processors that a platform wheel holds a library for, the best first: the compiler's flags, and the instructions that /proc/cpuinfo names
AVX2 = {"avx", "avx2", "f16c", "fma", "bmi1", "bmi2", "abm", "movbe"}
LEVELS: dict[str, dict[str, tuple[list[str], set[str]]]] = {
    "x86_64": {
        "x86-64-v4": (CPU_FLAGS["x86_64"][1:], AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
        "x86-64-v3": ([], AVX2),
    },
    "aarch64": {"armv8-a": ([], {"asimd"})},
}


class Unavailable(Exception):
    """Why there is no library, in one line."""


def sources():
    """The C files; each is compiled by itself, as many at a time as there are cores. Those with most code come first: cores wait for the last."""
    return sorted(
        HERE.glob("*.c"), key=lambda path: (-sum(p.stat().st_size for p in HERE.glob(f"{path.stem}*.[ch]")), path.name)
    )


def cache_folder() -> pathlib.Path:
    """Where built libraries are kept: FASTMIX_CACHE, or fastmix/ in the user's cache folder."""
    chosen = os.environ.get("FASTMIX_CACHE")
    if chosen:
        return pathlib.Path(chosen).absolute()  # a name without a folder would be looked for in the system's
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):  # no home: a folder of that name must not appear where the script runs
        raise Unavailable(f"the user has no cache folder ({base}); set FASTMIX_CACHE")
    return pathlib.Path(base) / "fastmix"


def compiler() -> list[str]:
    """The command of a C compiler: CC, or the first of cc, gcc and clang on the path."""
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise Unavailable(f"CC cannot be read ({error})") from error
    for command in [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise Unavailable(f"there is no C compiler ({chosen[0] if chosen else 'cc, gcc or clang'})")


def flags() -> list[str]:
    return [*FLAGS, *CPU_FLAGS[platform.machine()]]


def key(command) -> str:
    """A hash of all that decides what is built."""
    found = _sources_digest()
    about = os.stat(os.path.realpath(command[0]))
    found.update(repr((command, flags(), about.st_size, about.st_mtime_ns, sys.platform, _cpu())).encode())
    return found.hexdigest()[:20]


def _sources_digest():
    found = hashlib.sha256()
    for path in sorted([*HERE.glob("*.c"), *HERE.glob("*.h")]):
        found.update(f"{path.name}\0".encode() + path.read_bytes())
    return found


def _cpu():
    """The CPU's model and instructions; what /proc/cpuinfo says of the first core, without the clock's rate."""
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read(1 << 14).split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    return [
        line for line in first if line.split("\t")[0] in ("model name", "flags", "CPU part", "Features")
    ] or platform.machine()


def find(folder, name):
    """Returns the whole library of this key, or None. A file whose content is not that of its name is left out."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        try:
            if path.stem.rpartition("-")[2] == _digest(path):
                return path
        except OSError:
            continue
    return None


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


@contextmanager
def _locked(path):
    """Holds the lock of a file; it ends with the process that holds it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prebuilt_names(levels):
    """Returns {level: the name of its library, but for the hash of the library itself}."""
    sources = _sources_digest().hexdigest()[:20]
    return {level: f"{level}-{sources}" for level in levels}


def prebuild(folder) -> None:
    """Builds the libraries of a platform wheel into a folder: one for each level of the processors of this kind."""
    levels = LEVELS.get(platform.machine()) if sys.platform == "linux" else None
    if levels is None:
        raise Unavailable(f"no wheel holds a library for {sys.platform} on {platform.machine()}")
    os.makedirs(folder, exist_ok=True)
    names = _prebuilt_names(levels)
    for level, (more, _) in levels.items():
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work:
            made = _compile([*compiler(), *FLAGS, f"-march={level}", *more], pathlib.Path(work))
            os.replace(made, os.path.join(folder, f"{names[level]}-{_digest(made)}.so"))


def prebuilt() -> pathlib.Path | None:
    """Returns the installed library of a platform wheel that is whole, that this processor can run and that can be loaded, or None."""
    folder = HERE / "prebuilt"
    if sys.platform != "linux" or not folder.is_dir():
        return None
    words = {word for line in _cpu() for word in line.split()}
    levels = LEVELS.get(platform.machine(), {})
    for level, name in _prebuilt_names(levels).items():
        needs = levels[level][1]
        found = find(folder, name) if needs <= words else None
        if found:
            try:
                ctypes.CDLL(str(found))
            except OSError:  # of another C library
                continue
            return found
    return None


def path() -> pathlib.Path:
    """Returns the library's file: the wheel's, or one that is built where there is none."""
    found = prebuilt()
    if found:
        return found
    if fcntl is None or sys.platform not in ("linux", "darwin"):
        raise Unavailable(f"there is no native library on {sys.platform}")
    if platform.machine() not in ("x86_64", "aarch64", "arm64"):
        raise Unavailable(f"there is no native library for {platform.machine()}")
    command = compiler()
    folder = cache_folder()
    try:
        name = key(command)
        found = find(folder, name)
        if found:
            return found
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            return find(folder, name) or _build(command, folder, name)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be used ({error.strerror or error})") from error


def _run(call):
    try:
        ran = subprocess.run(call, capture_output=True, text=True, errors="replace", timeout=300, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{call[0]} did not end in 300 seconds") from error
    except OSError as error:
        raise Unavailable(f"{call[0]} cannot be run ({error.strerror or error})") from error
    if ran.returncode:
        lines = [line.strip() for line in ran.stderr.splitlines() if line.strip()]
        said = [line for line in lines if "error" in line] or lines or [f"exit status {ran.returncode}"]
        raise Unavailable(f"{call[0]} failed: {said[-1]}")


def _build(command, folder, name):
    for damaged in folder.glob(f"{name}-*.so"):
        damaged.unlink()
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work:
        made = _compile([*command, *flags()], pathlib.Path(work))
        whole = folder / f"{name}-{_digest(made)}.so"
        os.replace(made, whole)
    return whole


def _compile(command, work):
    """Returns the library that is made of the sources, in a folder."""
    made, objects = work / "fastmix.so", [f"{work}/{source.stem}.o" for source in sources()]
    calls = [["-c", "-o", made_of, str(source)] for made_of, source in zip(objects, sources(), strict=True)]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as cores:
            list(cores.map(lambda call: _run([*command, *call]), calls))
    except RuntimeError as error:  # the interpreter is ending, or there may be no more threads
        raise Unavailable(f"{command[0]} is not started ({error})") from error
    _run([*command, "-shared", "-o", str(made), *objects, "-lm"])
    if not made.exists():
        raise Unavailable(f"{command[0]} wrote no library")
    return made


def load() -> ctypes.CDLL:
    """Returns the library, built if need be."""
    found = path()
    try:
        return ctypes.CDLL(str(found))
    except OSError as error:
        raise Unavailable(f"{found.parent} holds the library, which cannot be loaded ({error})") from error
