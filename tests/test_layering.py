"""Imports flow one way: recipes, modules -> sampling -> functional -> {targets, autograd, checks} -> backends -> kernels."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = {"sklearn", "matplotlib", "rich", "timm", "torchvision", "lightning", "transformers", "triton"}
MAY_IMPORT = {
    "_dtypes": set(),
    "_expressions": {"_torch", "_dtypes"},
    "_torch": {"_torch", "_dtypes"},
    "_backend": {"_torch"},
    "_check": {"_expressions"},
    "targets": {"_check", "_expressions", "functional"},  # the last inside MixedRows.dense
    "autograd": {"autograd", "_backend", "_check", "_expressions"},
    "_ops": {"_backend", "_check", "_expressions", "autograd"},
    "functional": {"targets", "_check", "_expressions", "_ops", "autograd"},
    "_warmup": {"functional", "targets", "_check", "_expressions"},
    "sampling": {"functional", "targets", "_check", "_expressions"},
    "adversarial": {"_check", "_expressions"},
    "hidden": {"sampling", "_check"},
    "modules": {"functional", "targets", "_check", "sampling"},
    "reference": {"reference"},
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
        if top:
            assert root not in HEAVY, f"{name} is imported where it is not used"
    assert room in MAY_IMPORT or room in ("__init__", "recipes", "compat"), f"no rule for {room}"


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_alone(path):
    for name, _ in imports(path, "kernels"):
        assert name.split(".")[0] in ("torch", "triton", "contextlib", "functools", "math", "kernels"), name


def test_folders_that_must_not_shadow_others_are_not_packages():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "bench" / "__init__.py").exists()


def test_no_host_synchronisation_where_a_training_step_passes():
    """.item(), .tolist(), .cpu() and the like on a device tensor would wait for it: kernels and Functions have none."""
    for path in files("kernels") + files("fastmix/autograd") + [ROOT / "fastmix" / "sampling.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if path.name == "sampling.py" and node.func.attr == "cpu":
                    continue  # a generator's state is a host tensor
                assert node.func.attr not in ("item", "tolist", "cpu", "numpy", "equal", "synchronize"), f"{path}:{node.lineno}"
