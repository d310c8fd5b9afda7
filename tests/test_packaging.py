"""What is installed is what is here: the wheel holds every module, and nothing else, and runs from anywhere."""

import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import zipfile
from unittest import mock

import pytest
from conftest import NO_COMPILER

import fastmix
from fastmix._native import build, library

ROOT = pathlib.Path(__file__).parent.parent
CODE = """
import fastmix, torch, fastmix.kernels, importlib.util
import fastmix.recipes.digits
x = torch.randn(4, 3)
fastmix.soft_cross_entropy(fastmix.mix(x, 0.3, torch.tensor([1, 0, 3, 2])), torch.tensor([0, 1, 2, 0]))
assert importlib.util.find_spec("fastmix.kernels.api") and importlib.util.find_spec("fastmix.bench.static")
print(fastmix.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return next(folder.glob("fastmix-*.whl"))


def run(folder, code=CODE, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.slow
def test_wheel_holds_every_module_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastmix").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "fastmix" / "_native").glob("*.[ch]")}
    for folder in ("kernels", "bench"):
        expected |= {f"fastmix/{path.relative_to(ROOT)}" for path in (ROOT / folder).glob("*.py")}
    expected |= {"fastmix/py.typed", "fastmix/bench/pytest.ini", "fastmix/bench/costs.json"}
    assert names == expected
    assert not (ROOT / "build").exists()  # a stale one would get into the next wheel


@pytest.mark.slow
def test_wheel_runs_from_anywhere(wheel, tmp_path):
    """In the root of a checkout its own fastmix comes first. transformers imports Hugging Face's `kernels`: our folder of that name
    must lose to it, even there."""
    site, theirs, elsewhere = tmp_path / "site", tmp_path / "theirs", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    assert run(elsewhere, PYTHONPATH=str(site)).startswith(str(site))
    (theirs / "kernels").mkdir(parents=True)
    (theirs / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = "import kernels, fastmix, fastmix.kernels.api; assert kernels.theirs; print(fastmix.__file__, fastmix.kernels.api.__file__)"
    found = run(ROOT, code, PYTHONPATH=os.pathsep.join(map(str, (site, theirs)))).split()
    assert [path.startswith(str(ROOT)) for path in found] == [True, True]


@pytest.mark.slow
def test_platform_wheel_runs_c_without_a_compiler(tmp_path):
    """It holds libraries, of which the processor is given the one that it can run."""
    if library.why_not() is not None:
        pytest.skip(NO_COMPILER)
    quick = tmp_path / "compiler"  # without optimisation
    quick.write_text(f'#!/bin/sh\nexec {shlex.join(build.compiler())} "$@" -O0\n')
    quick.chmod(0o755)
    pip, quiet = [sys.executable, "-m", "pip"], ["-q", "--no-deps", "--disable-pip-version-check"]
    command = [*pip, "wheel", *quiet, "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    made = subprocess.run(
        command, env={**os.environ, "FASTMIX_WHEEL": "native", "CC": str(quick)}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    wheel, site, cache = next(tmp_path.glob("fastmix-*.whl")), tmp_path / "site", tmp_path / "cache"
    assert wheel.name.endswith(f"-py3-none-{sys.platform}_{platform.machine()}.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert len(libraries) == len(build.LEVELS[platform.machine()])
    subprocess.run([*pip, "install", *quiet, "--no-compile", "--target", str(site), str(wheel)], check=True)
    # what follows damages the libraries: to load one would end the process, so one is built
    code = """
import fastmix, torch
fastmix.soft_cross_entropy(fastmix.mix(torch.randn(4, 3), 0.3, torch.tensor([1, 0, 3, 2])), torch.tensor([0, 1, 2, 0]))
build = fastmix._native.build
print(fastmix.__file__, build.path())
for path in (build.HERE / "prebuilt").iterdir():
    data = path.read_bytes()
    path.unlink()  # it is loaded
    path.write_bytes(data[:60000])
try:
    build.path()
except build.Unavailable as error:
    print(error)
"""
    told = run(tmp_path, code, PYTHONPATH=str(site), CC="/bin/false", FASTMIX_CACHE=str(cache), FASTMIX_BACKEND="native")
    paths, said = told.splitlines()
    assert [text.startswith(str(site)) for text in paths.split()] == [True, True]
    assert said.startswith("/bin/false failed")
    assert not list(cache.glob("*.so"))


def test_a_processor_is_given_the_best_library_that_it_can_run(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: path)
    assert build.prebuilt() is None
    (tmp_path / "prebuilt").mkdir()
    for level in build.LEVELS["x86_64"]:
        made = tmp_path / level
        made.touch()
        made.rename(tmp_path / "prebuilt" / f"{build._prebuilt_names([level])[level]}-{build._digest(made)}.so")
    for words, level in ((build.LEVELS["x86_64"]["x86-64-v4"][1], "x86-64-v4"), (build.AVX2, "x86-64-v3"), ({"avx"}, None)):
        monkeypatch.setattr(build, "_cpu", lambda words=words: ["flags : " + " ".join(words)])
        found = build.prebuilt()
        assert (found.name.rsplit("-", 2)[0] if found else None) == level
    with monkeypatch.context() as now:
        now.setattr(build.ctypes, "CDLL", mock.Mock(side_effect=OSError))  # of another C library
        assert build.prebuilt() is None
    found = next((tmp_path / "prebuilt").glob("x86-64-v4-*"))
    found.write_bytes(b"damaged")
    monkeypatch.setattr(build, "_cpu", lambda: ["flags : " + " ".join(build.LEVELS["x86_64"]["x86-64-v4"][1])])
    assert build.prebuilt().name.startswith("x86-64-v3")
    (tmp_path / "other.c").touch()  # libraries of other sources
    monkeypatch.setattr(build, "_cpu", lambda: ["flags : " + " ".join(build.AVX2)])
    assert build.prebuilt() is None


def test_the_citation_is_of_this_version():
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == fastmix.__version__


@pytest.mark.slow
def test_bare_checkout_runs_from_anywhere(tmp_path):
    """With the script whose types `make check` checks strictly, with every name that users import."""
    code = CODE + "import typed_script; typed_script.main()"
    found = run(tmp_path, code, PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    assert found.splitlines()[0].startswith(str(ROOT))
    text = (ROOT / "pyproject.toml").read_text()
    checked = re.search(r"# what users import\n.*?module = \[(.*?)\]", text, re.S)[1]
    rooms = {path.relative_to(ROOT / "fastmix").with_suffix("").parts[0] for path in (ROOT / "fastmix").rglob("*.py")}
    inside = {"recipes", "reference", "__init__", "__main__"}
    assert [r for r in sorted(rooms) if not r.startswith("_") and r not in inside and f'"fastmix.{r}' not in checked] == []


def test_a_name_that_is_not_there_is_told_with_the_one_that_may_be_meant():
    with pytest.raises(AttributeError) as told:
        fastmix.mixup  # noqa: B018
    assert (told.value.name, told.value.obj) == ("mixup", fastmix)  # what Python makes its suggestion of
    assert fastmix.reference.__name__ == "fastmix.reference"


def test_version_is_told_once():
    assert re.search(rf"^## \[(Unreleased|{re.escape(fastmix.__version__)})\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert f"version: {fastmix.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_one_version_of_the_linter():
    """Of constraints.txt, and of the hooks that run before a commit."""
    (version,) = re.findall(r"^(ruff==\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert set(re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())) == {version}
