"""The native library: how it is built and found, its threads, the memory of its results, and its C under sanitizers."""

import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import NO_COMPILER
from memory import same_bits

import fastmix
from fastmix import _backend, _native, _torch
from fastmix._native import build, library

FOLDER = pathlib.Path(_native.__file__).parent
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
needs_compiler = pytest.mark.skipif(library.why_not() is not None, reason=NO_COMPILER)

# build.py needs no torch: a process that loads it alone takes a moment, and builds one of the files in another
BUILD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("build", {str(FOLDER / "build.py")!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.sources = lambda: [build.HERE / "pool.c"]
library = build.load()
print(build.path())
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that notes its calls and waits for as long as FASTMIX_TEST_WAIT says."""
    monkeypatch.setenv("FASTMIX_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\nsleep "${{FASTMIX_TEST_WAIT:-0}}"\nexec {COMPILER} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return tmp_path / "cache"


def calls(cache):
    """How often a library was linked."""
    return (cache.parent / "calls").read_text().count("-shared")


def start(code=BUILD, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@needs_compiler
def test_processes_that_begin_together_build_once(cache):
    processes = [start(FASTMIX_TEST_WAIT="0.3") for _ in range(4)]
    found = {process.communicate(timeout=120)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(found) == 1
    assert calls(cache) == 1


@pytest.mark.slow
@needs_compiler
def test_a_killed_build_leaves_nothing_broken(cache, monkeypatch):
    process = start(FASTMIX_TEST_WAIT="60")
    while not (cache.parent / "calls").exists():
        time.sleep(0.01)
    os.killpg(process.pid, 9)
    process.communicate()
    assert not list(cache.glob("*.so"))
    assert calls(cache) == 0
    monkeypatch.setattr(build, "sources", lambda: [FOLDER / "pool.c"])  # built in a moment
    assert build.path().exists()
    assert calls(cache) == 1


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: data[:-1] + b"?"])
def test_a_damaged_file_is_built_anew(damage, cache, monkeypatch):
    monkeypatch.setattr(build, "sources", lambda: [FOLDER / "pool.c"])  # built in a moment
    path = build.path()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = build.path()
    assert build._digest(again) in again.name
    assert len(list(cache.glob("*.so"))) == 1
    assert calls(cache) == 2
    assert build.path() == again
    assert calls(cache) == 2


@needs_compiler
def test_a_wheel_holds_a_library_for_each_level_of_its_processor(cache, monkeypatch):
    monkeypatch.setattr(build, "sources", lambda: [FOLDER / "pool.c"])  # built in a moment
    folder = cache.parent / "prebuilt"
    levels = build.LEVELS.get(build.platform.machine(), {}) if sys.platform == "linux" else {}
    if levels:
        build.prebuild(folder)
    made = sorted(path.name for path in folder.glob("*"))
    assert [name.rpartition("-")[0] for name in made] == sorted(build._prebuilt_names(levels).values())
    assert all(build._digest(folder / name) in name for name in made)
    monkeypatch.setattr(build.platform, "machine", lambda: "vax")
    with pytest.raises(build.Unavailable, match="no wheel holds a library for .* on vax"):
        build.prebuild(folder)
    with pytest.raises(build.Unavailable, match="there is no native library for vax"):
        build.path()


def test_compilers_and_libraries_that_fail_in_other_ways(cache, tmp_path, monkeypatch):
    def never_ends(call, **options):
        raise subprocess.TimeoutExpired(call, 300)

    monkeypatch.setenv("CC", sys.executable)
    with monkeypatch.context() as now:
        now.setattr(subprocess, "run", never_ends)
        with pytest.raises(build.Unavailable, match="did not end in 300 seconds"):
            build.path()
    with monkeypatch.context() as now:
        now.setattr(build, "ThreadPoolExecutor", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(build.Unavailable, match="is not started .can't start new thread"):
            build.path()
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setattr(build, "path", lambda: tmp_path / "text.so")
    with pytest.raises(build.Unavailable, match="holds the library, which cannot be loaded"):
        build.load()


def test_other_sources_or_flags_are_another_library(cache, monkeypatch):
    command = [sys.executable]
    before = build.key(command)
    assert build.key(command) == before
    assert build.key([*command, "-m32"]) != before
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
    assert build.key(command) != before


def test_reasons_why_there_is_no_library(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.Unavailable, match=r"^there is no C compiler \(no-such-compiler\)$"):
        build.path()
    script = tmp_path / "fails"
    script.write_text("#!/bin/sh\necho 'x.c:1: error: it does not work' >&2\necho 'compilation terminated.' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(build.Unavailable, match=r"fails failed: x\.c:1: error: it does not work$"):
        build.path()
    for text, reason in (("no program", "cannot be run"), ("#!/bin/sh\n", "wrote no library")):
        script.write_text(text)
        with pytest.raises(build.Unavailable, match=f"fails {reason}"):
            build.path()
    monkeypatch.setenv("CC", "'cc")
    with pytest.raises(build.Unavailable, match="CC cannot be read"):
        build.path()
    monkeypatch.setenv("CC", str(script))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTMIX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.Unavailable, match="cannot be used"):
        build.path()
    monkeypatch.setenv("FASTMIX_CACHE", ".")  # the loader would look for a bare name in the system's folders
    assert build.cache_folder().is_absolute()
    for name in ("FASTMIX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    with pytest.raises(build.Unavailable, match="no cache folder.*set FASTMIX_CACHE$"):
        build.path()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.Unavailable, match="there is no native library on win32"):
        build.path()


def test_without_a_library_torch_runs_in_silence_unless_native_was_asked_for(monkeypatch):
    monkeypatch.delenv("FASTMIX_BACKEND", raising=False)
    monkeypatch.setattr(_native, "why_not", lambda: "cc failed: error: no")
    for cached in (_backend._choice, _backend._of_cpu):
        cached.cache_clear()
    x = torch.zeros(2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert _backend.of(x) is _torch
        with (
            fastmix.backend("native"),
            pytest.raises(RuntimeError, match="backend 'native' cannot run this tensor: cc failed: error: no"),
        ):
            fastmix.mix(x, 0.5, torch.tensor([1, 0]))
    finally:
        for cached in (_backend._choice, _backend._of_cpu):
            cached.cache_clear()


def test_native_runs_no_other_device():
    with fastmix.backend("native"), pytest.raises(RuntimeError, match="tensors of the CPU, not of meta"):
        fastmix.mix(torch.zeros(2, device="meta"), 0.5, torch.zeros(2, dtype=torch.int64, device="meta"))


@needs_compiler
def test_it_is_the_choice_of_the_cpu(monkeypatch):
    monkeypatch.delenv("FASTMIX_BACKEND", raising=False)
    assert _backend.of(torch.zeros(1)) is _native
    monkeypatch.setenv("FASTMIX_BACKEND", "torch")
    assert _backend.of(torch.zeros(1)) is _torch
    monkeypatch.setenv("FASTMIX_BACKEND", "native")
    assert _backend.of(torch.zeros(1)) is _native


def test_the_face_is_torchs():
    for name in _torch.__all__:
        ours, theirs = (getattr(module, name).__code__ for module in (_native, _torch))
        assert ours.co_varnames[: ours.co_argcount] == theirs.co_varnames[: theirs.co_argcount], name


def test_every_c_function_is_declared():
    exported = {
        line.split("(")[0].split()[-1]
        for path in FOLDER.glob("*.c")
        for line in path.read_text().splitlines()
        if line.startswith("FASTMIX_EXPORT")
    }
    assert exported == set(library.SIGNATURES)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_indices_out_of_range_are_found(dtype, monkeypatch):
    """Also without the library, and in tensors whose entries are apart."""
    for loaded in (library.load()[0], None):
        monkeypatch.setattr(library, "_library", loaded)
        for size in (1, 7, 64, 1001):
            index = torch.arange(2 * size, dtype=dtype).remainder(5)[::2]
            assert library.all_in_range(index, 5), size
            for wrong in (-1, 5, torch.iinfo(dtype).min, torch.iinfo(dtype).max):
                other = index.clone()
                other[-1] = wrong
                assert not library.all_in_range(other, 5), (size, wrong)
        assert not library.all_in_range(torch.tensor([-1], dtype=dtype), 0)  # nothing is in range
    monkeypatch.undo()
    ignored = torch.tensor([[0, -100], [4, 2]])
    assert library.all_in_range(ignored, 5, -100)
    assert not library.all_in_range(ignored, 5)
    assert not library.all_in_range(ignored, 4, -100)


# Threads


@needs_compiler
def test_every_chunk_runs_once_also_with_several_callers():
    def count():
        for chunks, threads in ((0, 4), (1, 4), (5, 2), (1000, 3), (7, 64), (300, 1)):
            counts = np.zeros(chunks, np.int32)
            for _ in range(20):
                library.get().fm_count_chunks(counts.ctypes.data, chunks, threads)
            right.append((counts == 20).all())

    right = []
    callers = [threading.Thread(target=count) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(right) == 24
    assert all(right)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_same_bits_whatever_the_number_of_threads(dtype):
    """Long rows, short rows, and results that are written past the caches."""
    threads = torch.get_num_threads()
    for shape in ((5, 3, 99, 101), (700, 301), (3, 710001)):
        N = shape[0]
        x, g = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
        lam = torch.rand(N, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        index, found = torch.randint(0, N, (N,)), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                with fastmix.backend("native"):
                    out = fastmix.mix(x, lam, index)
                    found.append((out, *torch.autograd.grad(out, (x, lam), g)))
        finally:
            torch.set_num_threads(threads)
        for results in found[1:]:
            assert all(map(same_bits, found[0], results))
        with fastmix.backend("torch"):
            assert same_bits(found[0][0], fastmix.mix(x, lam, index))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_boxes_in_a_result_that_is_written_past_the_caches(dtype):
    """Rows of odd length, whose boxes begin and end anywhere; NaN beside numbers."""
    x = torch.randn(8, 3, 431, 523).to(dtype)
    x[0, 0, :2] = torch.nan
    assert x.numel() * x.element_size() > library.LARGE
    index, lam = torch.randperm(8), torch.rand(8)
    lam[1] = 1
    box = torch.tensor(
        [[0, 0, 431, 523], [5, 7, 5, 90], [1, 1, 430, 522], [-3, 400, 99, 600], *torch.randint(0, 431, (4, 4)).tolist()]
    )
    results = []
    for name in ("native", "torch"):
        with fastmix.backend(name):
            results += [fastmix.mix(x, lam, index, box=box), fastmix.mix(x, lam, index)]
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        assert bool(ours.isnan().any())
        assert same_bits(ours.nan_to_num(7), theirs.nan_to_num(7))  # NaN has many bits


FORKS = """
import ctypes, os, sys, threading
count = ctypes.CDLL(sys.argv[1]).fm_count_chunks
def run(chunks=500):
    counts = (ctypes.c_int32 * chunks)()
    count(counts, ctypes.c_int64(chunks), 4)
    assert list(counts) == [1] * chunks
run()
stop = False
def go_on():
    while not stop:
        run()
threads = [threading.Thread(target=go_on) for _ in range(2)]  # jobs of other threads are under way at every fork
for thread in threads:
    thread.start()
for _ in range(8):
    child = os.fork()
    if not child:
        run()
        run()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop = True
for thread in threads:
    thread.join()
run()
stop = False
threading.Thread(target=go_on, daemon=True).start()
print("done", flush=True)  # and the process ends while workers run
"""


@needs_compiler
def test_fork_and_exit():
    ran = subprocess.run([sys.executable, "-c", FORKS, str(build.path())], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr


# Memory of large results


def large(value=0.0):
    """A new result of the size that is kept for the next one, filled with a value."""
    return library.new(torch.empty(library.LARGE // 4 + 3)).fill_(value)


def place(t):
    return t.untyped_storage().data_ptr()


@needs_compiler
def test_a_large_result_takes_the_memory_of_one_that_nobody_holds():
    library._free.clear()
    first = large(1.0)
    at = place(first)
    assert at % library.PAGE == 0
    assert first._base is None
    holders = {
        "a tensor": lambda t: t,
        "a view": lambda t: t[5:7],
        "detached": lambda t: t.requires_grad_().detach(),
        "an array": lambda t: t.detach().numpy(),
        "dlpack": lambda t: torch.from_dlpack(t.detach()),
        "a storage": lambda t: t.untyped_storage(),
        "a graph": lambda t: t.detach() * torch.ones((), requires_grad=True),
        "a hook": lambda t: lambda: t,
    }
    for name, hold in holders.items():
        held = hold(first)
        del first
        other = large(2.0)
        assert place(other) != at, name
        del held
        first = large(1.0)
        assert place(first) == at, name
        del other
    assert all(len(block) == library.LARGE + 12 + library.PAGE for block in library._free)
    many = [large(k) for k in range(library.KEPT + 3)]
    assert len({place(t) for t in many} | {at}) == len(many) + 1
    assert all(bool((t == k).all()) for k, t in enumerate(many))
    del many, first
    assert len(library._free) == library.KEPT
    assert place(library.new(torch.empty(library.LARGE // 4 + 4))) not in {block.data_ptr() for block in library._free}
    shared = large(3.0)
    at = place(shared)
    shared.share_memory_()  # moves it, and leaves the block
    assert place(shared) != at
    assert bool((shared == 3).all())
    library._free.clear()


@needs_compiler
def test_torchs_default_device_does_not_matter():
    """Results of tensors on the CPU lie there: a pointer of another device would be written to."""
    x, z, index = torch.rand(4, 3, 6, 8), torch.randn(4, 5), torch.tensor([1, 2, 3, 0])
    lam, mask, y = torch.tensor([0.2, 0.0, 1.0, 0.7]), torch.rand(4, 3, 4), torch.tensor([0, 4, 2, 1])

    def everything():
        leaves = [t.clone().requires_grad_() for t in (x, z, lam, mask)]
        own, logits, share, cells = leaves
        m = fastmix.Mix(share, index)
        masked, target = fastmix.Mix(None, index, mask=cells), m.target(y)
        images = (x * 255).to(torch.uint8)
        mixed = [
            m.apply(own),
            masked.apply(own),
            fastmix.convex_combination([own, own.flip(0)], torch.stack((share, 1 - share), 1)),
        ]
        mixed += [fastmix.mix_images(images, how, mean=[0.5] * 3, std=[0.2] * 3) for how in (m, masked)]
        losses = [
            f(logits, t)
            for f in (fastmix.soft_cross_entropy, fastmix.soft_binary_cross_entropy)
            for t in (target, target.dense(5))
        ]
        losses.append(fastmix.js_divergence(torch.stack((logits, logits.flip(0)))))
        return *mixed, *losses, *torch.autograd.grad(sum(t.square().sum() for t in (*mixed, *losses)), leaves)

    with fastmix.backend("native"):
        expected = everything()
        with torch.device("meta"):
            results = everything()
    assert all(map(same_bits, results, expected))


@pytest.mark.slow
@needs_compiler
def test_threads_do_not_share_the_memory_of_large_results():
    library._free.clear()
    wrong = []

    def work(value):
        for step in range(20):
            t = large(value)
            time.sleep(0.0005 * (step % 3))
            if not bool((t == value).all()):
                wrong.append(value)

    workers = [threading.Thread(target=work, args=(float(k),)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert 1 <= len(library._free) <= library.KEPT
    library._free.clear()


# Sanitizers


@pytest.mark.slow
def test_c_under_sanitizers(tmp_path):
    """AddressSanitizer and UBSan. NumPy's arrays lie between its guards: a byte read or written beside one ends the process."""
    if library.why_not() is not None:
        pytest.skip(NO_COMPILER)
    made = tmp_path / "checked.so"
    # not optimised: it compiles in a third of the time, and no access is left out
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O0"]
    flags = [flag for flag in build.flags() if flag != "-O3"]
    command = build.compiler()
    built = subprocess.run(
        [*command, *flags, *options, "-shared", "-o", made, *build.sources(), "-lm"], capture_output=True, text=True
    )
    runtime = subprocess.run([*command, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if built.returncode or not os.path.isabs(runtime):
        pytest.skip("needs a C compiler with AddressSanitizer")
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    script = pathlib.Path(__file__).with_name("sanitized.py")
    ran = subprocess.run([sys.executable, script, made], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split()[-1] == "right"
    assert {name for name in library.SIGNATURES if name != "fm_count_chunks"} <= set(ran.stdout.split()), "not all were called"
