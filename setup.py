"""Packages are listed, not found: `kernels/` and `bench/` install inside `fastmix`, so that no top-level package of those
names gets in anybody's way. `constraints.txt` pins what this repository is tested with; here are the ranges that work."""

import importlib.util
import os
import pathlib
import re
import sysconfig
import tempfile

from setuptools import setup
from setuptools.command.build_py import build_py

here = pathlib.Path(__file__).parent
version = re.search(r'^__version__ = "(.+)"', (here / "fastmix" / "__init__.py").read_text(), re.M).group(1)
build_base = tempfile.TemporaryDirectory(prefix="fastmix-build-")  # removed when this process ends
recipes = ["scikit-learn>=1.3", "matplotlib>=3.7", "rich>=13"]
test = [
    *recipes,
    "pytest>=8",
    "coverage>=7",
    "hypothesis>=6.100",
    "pytest-benchmark>=4",
    "pytest-reportlog>=0.4",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.7",
    "scipy>=1.10",
    "setuptools>=70.1",
]
commands = {}
if os.environ.get("FASTMIX_WHEEL") == "native":  # a platform wheel, which holds the native library for two kinds of processors
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # before setuptools 70.1
        from wheel.bdist_wheel import bdist_wheel
    spec = importlib.util.spec_from_file_location("native_build", here / "fastmix" / "_native" / "build.py")
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)

    class BuildWithLibraries(build_py):
        def run(self):
            super().run()
            native.prebuild(os.path.join(self.build_lib, "fastmix", "_native", "prebuilt"))

    class PlatformWheel(bdist_wheel):
        def finalize_options(self):
            super().finalize_options()
            self.root_is_pure = False

        def get_tag(self):
            return "py3", "none", re.sub(r"[.-]", "_", sysconfig.get_platform())

    commands = {"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel}

setup(
    cmdclass=commands,
    name="fastmix",
    version=version,
    description="Batch mixing and soft-label cross-entropy, each in one pass over memory, with exact gradients",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.7",
        "numpy>=1.26",
        'triton>=3.3; platform_system == "Linux"',
    ],
    extras_require={
        "puzzle": ["PyMaxflow>=1.3"],
        "recipes": recipes,
        "test": test,
        "check": ["ruff", "mypy"],
        "docs": ["zensical>=0.0.73,<0.1", "mkdocstrings[python]>=1"],
        # what the modules of fastmix.compat stand in for
        "timm": ["timm>=1.0.31"],
        "torchvision": ["torchvision>=0.22"],
        "lightning": ["lightning>=2.5"],
        "transformers": ["transformers>=5", "accelerate>=1"],
    },
    packages=[
        "fastmix",
        "fastmix._native",
        "fastmix._torch",
        "fastmix.bench",
        "fastmix.compat",
        "fastmix.kernels",
        "fastmix.losses",
        "fastmix.mixing",
        "fastmix.puzzle",
        "fastmix.recipes",
        "fastmix.reference",
        "fastmix.sampling",
    ],
    package_dir={"fastmix.bench": "bench", "fastmix.kernels": "kernels"},
    package_data={"fastmix": ["py.typed"], "fastmix._native": ["*.c", "*.h"], "fastmix.bench": ["pytest.ini", "costs.json"]},
    # a stale build/ folder would get into wheels: build somewhere new every time
    options={"build": {"build_base": build_base.name}},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
