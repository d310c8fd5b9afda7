"""Imports flow one way:

{recipes, compat} -> the public names; pipeline -> hidden -> sampling -> {targets, mixing, puzzle, _dispatch}; puzzle -> losses;
warmup -> {sampling, losses}; modules -> losses -> targets -> mixing -> _dispatch -> _backend -> {_torch | _native | fastmix.kernels};
_native -> _torch.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

import fastmix

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = {"sklearn", "matplotlib", "rich", "timm", "torchvision", "lightning", "pytorch_lightning", "transformers", "triton"}
STANDS_IN_FOR = {  # the library that an adapter imports at its top, by the adapter's file
    "timm": {"timm"},
    "_timm_losses": {"timm"},
    "torchvision": {"torchvision"},
    "lightning": {"lightning", "pytorch_lightning"},
    "transformers": {"transformers"},
}
SHARED = {"_check", "_dtypes"}
OPS = {*SHARED, "_torch", "_backend", "_dispatch"}
MAY_IMPORT = {
    "_dtypes": set(),
    "_torch": {"_torch", "_dtypes"},
    "_native": {"_native", "_torch", "_dtypes"},
    "_backend": {"_native", "_torch"},
    "_check": {"_dtypes", "_native"},
    "_dispatch": {"_backend", "_check"},
    "mixing": OPS,
    "targets": {*SHARED, "mixing"},
    "losses": {*OPS, "losses", "targets", "mixing"},
    "functional": {"losses", "mixing"},
    "autograd": {"losses", "mixing"},
    "modules": {"_check", "losses"},
    "_modes": set(),
    "puzzle": {*OPS, "_modes", "puzzle", "losses", "mixing"},
    "_warmup": {*SHARED, "losses", "sampling", "targets", "mixing"},
    "sampling": {*OPS, "sampling", "targets", "mixing", "puzzle"},
    "_checkpoints": set(),
    "hidden": {*SHARED, "_checkpoints", "sampling"},
    "pipeline": {*SHARED, "hidden", "sampling"},
    "adversarial": SHARED,
    "attacks": {"_check", "_modes"},
    "gan": {"_check", "losses", "mixing"},
    "reference": {"reference"},
    "__main__": {"_backend", "_native", "bench"},
}


def imports(path, package):
    """(modules imported anywhere in a file, those imported at its top level), absolute."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{name}.{alias.name}" for alias in node.names] if name == "fastmix" or not node.module else [name]
            found += [(n, node in tree.body) for n in names]
    return found


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files("fastmix"), ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    inside = path.relative_to(ROOT / "fastmix").with_suffix("").parts
    room = inside[0]
    package = ".".join(["fastmix", *inside[:-1]])
    for name, top in imports(path, package):
        root, *rest = name.split(".")
        if root == "fastmix" and rest and room in MAY_IMPORT:
            assert rest[0] in MAY_IMPORT[room], f"{room} imports {name}"
        if room == "reference":
            assert root in ("numpy", "fastmix"), name
        if room not in ("reference", "recipes"):
            assert "reference" not in rest, "no library code imports the oracle"
        if room == "compat" and root == "fastmix":
            assert rest[0] in {*fastmix.__all__, "_check", "compat", "sampling"}, (
                f"an adapter imports {name}, which is not public"
            )
        elif room != "compat":
            assert rest[:1] != ["compat"] or root != "fastmix", f"{room} imports an adapter"
        if top:
            assert root not in HEAVY - STANDS_IN_FOR.get(inside[-1], set()), f"{name} is imported where it is not used"
        elif room != "recipes":
            assert root not in ("fastmix", "torch"), f"{name} is imported inside a function"
    assert room in MAY_IMPORT or room in ("__init__", "recipes", "compat"), f"no rule for {room}"


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_alone(path):
    for name, _ in imports(path, "kernels"):
        assert name.split(".")[0] in ("torch", "triton", "contextlib", "functools", "math", "typing", "kernels"), name


def test_folders_that_must_not_shadow_others_are_not_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bench" / "__init__.py").exists()


def test_no_host_synchronisation_where_a_training_step_passes():
    """.item(), .tolist(), .cpu() and the like on a device tensor would wait for it: kernels and Functions have none."""
    for path in files("kernels") + files("fastmix/mixing") + files("fastmix/losses") + files("fastmix/sampling"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if path.parent.name == "sampling" and node.func.attr == "cpu":
                    continue  # a generator's state is a host tensor
                assert node.func.attr not in ("item", "tolist", "cpu", "numpy", "equal", "synchronize"), f"{path}:{node.lineno}"


def test_one_place_asks_for_a_backend_by_name():
    for path in files("fastmix"):
        if path.name not in ("_dispatch.py", "_backend.py"):
            assert "backend_name" not in path.read_text(), path


@pytest.mark.slow
def test_modules_that_import_fastmix_brings():
    """As `fastmix.functional.mix`, without an import of their own."""
    modules = "autograd functional sampling targets modules hidden adversarial reference"
    code = f"import fastmix; print([name for name in {modules.split()} if not hasattr(fastmix, name)])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"
