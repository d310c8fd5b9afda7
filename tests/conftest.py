"""One suite for every machine: ops run on torch, on the kernels under Triton's interpreter, and on a GPU where there is one.

What a machine cannot run is skipped, and skips are counted: reasons and numbers are held to skips.json, so that nothing is
silently never run. FASTMIX_TEST_NO_TRITON=1 makes Triton unimportable, as on a machine without it.
"""

import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import pathlib
import sys
from collections import Counter

import pytest
import torch

if os.environ.get("FASTMIX_TEST_NO_TRITON"):
    sys.modules["triton"] = None  # import triton now fails
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no worker processes that outlive the suite
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a core for each worker
GPU = torch.cuda.is_available()
TRITON = sys.modules.get("triton", ...) is not None and importlib.util.find_spec("triton") is not None
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETER = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
MODE = "gpu" if GPU else "cpu" if TRITON else "no-triton"

ROOT = pathlib.Path(__file__).parent.parent
SKIPS = pathlib.Path(__file__).with_name("skips.json")
NO_TRITON = "needs Triton"
NO_GPU = "needs a GPU"
NO_COMPILER = "needs a C compiler for the native library"
NATIVE = {  # files whose tests run on it too; of other files those with the marker `native`
    "test_mix.py",
    "test_mix_masked.py",
    "test_mix_images.py",
    "test_convex_combination.py",
    "test_native.py",
    "test_losses.py",
    "test_soft_cross_entropy.py",
    "test_soft_binary_cross_entropy.py",
    "test_js_divergence.py",
    "test_operators.py",
    "test_draws.py",
    "test_sampling.py",
}
NO_INTERPRETER = "needs TRITON_INTERPRET=1: here a GPU runs the kernels themselves"


def _round_to_bfloat16():
    """Triton's interpreter cuts float32 off to bfloat16; hardware rounds to nearest. Rounds here as well."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(rounded, target.scalar)
        return original(self, source, target)

    builder.cast_impl = cast_impl
    for name in ("create_fp_trunc", "create_fp_ext", "create_si_to_fp", "create_ui_to_fp", "create_fp_to_si"):
        setattr(builder, name, lambda self, source, target: self.cast_impl(source, target))


def _patch_the_language_once_a_launch():
    """Triton's interpreter replaces each function of triton.language for a launch, and again for each call of a helper within it,
    which changes nothing and takes a third of the time. Here only modules that the launch has not replaced yet are."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    @functools.cache
    def languages(function):
        return {
            name for name, module in (("tl", tl), ("core", tl.core)) if module in map(_module, function.__globals__.values())
        }

    def patch_lang(function):
        if not languages(function) <= patched:
            patched.update(languages(function))
            return patch(function)

    def call(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def _forget_what_nobody_asserts():
    """Each sum and product of integers is formed again in 64 bits, for an assertion that the interpreter then leaves out. That takes a
    third of the time."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _module(value):
    return value if inspect.ismodule(value) else None


if INTERPRETER:
    _round_to_bfloat16()
    _patch_the_language_once_a_launch()
    _forget_what_nobody_asserts()


@pytest.fixture(params=["torch", "native", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Runs the test on one backend and gives the device its tensors belong on."""
    import fastmix

    if request.param == "gpu" and not GPU:
        pytest.skip(NO_GPU)
    if request.param == "native" and fastmix._backend._why_not_native(torch.device("cpu")):
        pytest.skip(NO_COMPILER)
    if request.param in ("interpreter", "gpu") and not TRITON:
        pytest.skip(NO_TRITON)
    if request.param == "interpreter" and not INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    with fastmix.backend(request.param if request.param in ("torch", "native") else "triton"):
        yield torch.device("cuda" if request.param == "gpu" else "cpu")


@pytest.fixture
def windows(device, monkeypatch):
    """The device; kernels of losses take rows of any length in whole vectors and two ends, wherever they start."""
    if TRITON:
        from fastmix.kernels import _class_tiles

        monkeypatch.setattr(_class_tiles, "WINDOW_BYTES", 0)
    return device


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def dynamo_sees_torch_as_it_is():
    """torch.compile lists torch's functions once: before `poison` replaces some of them."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """Memory that an op forgets to write shows up as NaN. (torch.compile does not trace through this.)"""
    if request.node.get_closest_marker("no_poison"):
        return

    def poisoned(create):
        def empty(*args, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.requires_grad else tensor

        return empty

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def much_memory(tmp_path_factory):
    """For tests that hold gigabytes of a GPU: one at a time, of all processes of this run."""
    if not GPU:
        yield
        return
    import fcntl

    with open(tmp_path_factory.getbasetemp().parent / "much_memory", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


GPU_REMARKS = (  # torch's, once a process, about what tests mean to do: an error would leave them half done
    "Synchronization debug mode is a prototype",
    "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled",
    ".*Profiler clears events at the end of each cycle",
)


def _in_the_root():
    """Files and folders beside tests/, but for those that tools keep their own files in."""
    return {path.name for path in ROOT.iterdir() if path.name[0] not in "._" and path.suffix != ".egg-info"}


def pytest_configure(config):
    config.in_the_root = _in_the_root()
    for remark in GPU_REMARKS:
        config.addinivalue_line("filterwarnings", f"ignore:{remark}")


def _device_of(item):
    return item.callspec.params.get("device") if hasattr(item, "callspec") else None


def _runs_on_native(item):
    return item.path.name in NATIVE or item.get_closest_marker("native") is not None


def _without_thinned(items):
    """Without all but each n-th case of the interpreter's, for tests marked so. With an n that divides none of the numbers of
    parameters, every parameter is still there."""
    seen = Counter()
    for item in items:
        marker = item.get_closest_marker("thinned") if _device_of(item) == "interpreter" else None
        if marker:
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] % marker.args[0] != 1:
                continue
        yield item


LONGEST = "test_static.py"  # begun first, so that no process is left alone with its programs at the end


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != LONGEST)
    items[:] = [item for item in items if _device_of(item) != "native" or _runs_on_native(item)]
    items[:] = _without_thinned(items)
    for item in items:
        if _device_of(item) == "interpreter" and item.get_closest_marker("slow_interpreted"):
            item.add_marker("slow")


def pytest_addoption(parser):
    parser.addoption("--update-skips", action="store_true", help="write this machine's skips to skips.json")


def _skips(terminal):
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminal.stats.get("skipped", ()))


def pytest_terminal_summary(terminalreporter, config):
    skips = _skips(terminalreporter)
    terminalreporter.section(f"skipped on this machine ({MODE})")
    for reason, count in sorted(skips.items()):
        terminalreporter.line(f"{count:5d}  {reason}")
    for problem in getattr(config, "skip_problems", ()):
        terminalreporter.line(f"NOT IN skips.json: {problem}", red=True)
    for name in sorted(getattr(config, "left_over", ())):
        terminalreporter.line(f"LEFT IN {ROOT} instead of in tmp_path: {name}", red=True)


def pytest_sessionfinish(session):
    """A skip that skips.json does not expect fails the run, and so does what tests leave in the root; numbers of skips are
    compared where the whole suite ran."""
    config = session.config
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None:
        return
    skips = _skips(terminal)
    expected = json.loads(SKIPS.read_text())
    whole = config.args_source.name == "TESTPATHS" and not (config.option.keyword or config.option.markexpr)
    if config.option.update_skips and whole:
        uncounted = {reason: None for reason, count in expected[MODE].items() if count is None}
        expected[MODE] = dict(sorted({**uncounted, **skips}.items()))
        SKIPS.write_text(json.dumps(expected, indent=1) + "\n")
    allowed = expected[MODE]
    problems = [f"{reason} (expected never)" for reason in skips if reason not in allowed]
    if whole and session.exitstatus == 0:  # a count of null stands for a machine that has not been counted yet
        problems += [
            f"{reason}: expected {count}, got {skips[reason]}"
            for reason, count in allowed.items()
            if count is not None and skips[reason] != count
        ]
    config.skip_problems = problems
    config.left_over = _in_the_root() - config.in_the_root
    if (problems or config.left_over) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
