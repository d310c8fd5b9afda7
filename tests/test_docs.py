"""The site: every block of code runs, every public name has its place in the reference, and the pages build strictly."""

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from pages import DOCS, ROOT, programs

import fastmix
from fastmix.bench import peers  # noqa: F401  loads torchvision, which timm imports, beside any torch

ELSEWHERE = {  # pages whose code another file of tests runs
    "compat.md": "test_compat_timm.py test_compat_torchvision.py test_compat_lightning.py test_compat_transformers.py test_compat_pages.py",
    "augmix.md": "test_augmix.py",
    "images.md": "test_pipeline.py",
    "labels.md": "test_near_and_union.py",
    "masks.md": "test_masks.py",
    "puzzle.md": "test_puzzle.py",
    "sizes.md": "test_sizes.py",
}
WORDS = {  # pages without code of their own
    "api.md", "architecture.md", "choosing.md", "contributing.md", "experiments.md", "glossary.md", "kernels.md", "methods/index.md",
    "numerics.md", "peers.md", "recipes.md", "speed.md", "support.md", "traps.md",
}  # fmt: skip
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
CODE = [
    path
    for path in PAGES
    if programs(path.read_text()) and ELSEWHERE.get(str(path.relative_to(ROOT / "docs") if path.is_relative_to(DOCS) else path.name), "test_docs.py") == "test_docs.py"
]  # fmt: skip


class Sentences(torch.nn.Module):
    """A transformer of two layers, with the names that the pages use."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(10, 8)
        layers = [torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0) for _ in range(8)]
        self.encoder = torch.nn.Module()
        self.encoder.layers = torch.nn.ModuleList(layers)
        self.classifier = torch.nn.Linear(8, 4)

    def forward(self, tokens, padding=None):
        h = self.words(tokens)
        for layer in self.encoder.layers:
            h = layer(h, src_key_padding_mask=padding)
        return self.classifier(h.mean(1))


def names_of(page):
    """What the code of a page takes for granted: a model, its optimizer, and batches."""
    if page == "ops.md":
        model = Sentences()
        y, m = torch.arange(4), fastmix.Mixup(0.2, seed=0).sample(torch.zeros(4))
        tokens = torch.randint(10, (4, 6))
        names = {"model": model, "y": y, "m": m, "tokens": tokens, "padding": torch.zeros(4, 6, dtype=torch.bool)}
        names |= {"x": torch.rand(4, 3, 8, 8), "i1": torch.arange(4).roll(1), "i2": torch.arange(4).roll(2)}
        return names | {f"chain{k}": (lambda x: x.flip(-1)) for k in (1, 2, 3)}
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1000))
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "loader": batches, "held_out": batches}
    return {**names, "device": "cpu", "torch": torch, "np": np, "F": torch.nn.functional, "fastmix": fastmix}


@pytest.mark.no_poison
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_every_block_runs(path, tmp_path, monkeypatch):
    if path.name == "imagenet.md" and importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm")
    if path.name == "loops.md" and not torch.distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names, ran = names_of(path.name), []
    for code in programs(path.read_text()):
        if path.name != "ops.md":  # one program a block
            names = names_of(path.name)
        elif "mixup.sample" in code:
            model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
            words = code.index("manifold =")
            exec(code[:words], names)  # the transformer's part; below it is a network of images
            model.__dict__.update(layer1=model[1], layer2=model[3])  # not as children, which would run twice
            names |= {"model": model, "mixup": fastmix.Mixup(0.2, seed=0)}
            code = code[words:]
        names = {"fastmix": fastmix, "torch": torch, "criterion": fastmix.SoftCrossEntropyLoss(), **names}
        exec(compile(code, str(path), "exec"), names)
        # the thread of a process group may still let go of its last work: it waits for Python, which freeing the group here would hold
        ran.append(names)


def test_pages_that_other_tests_run_are_named_there():
    """Each section with code, by its title beside the page's name: a new section that nothing runs is found."""
    for page, files in ELSEWHERE.items():
        texts = [(ROOT / "tests" / file).read_text().replace("\\", "") for file in files.split()]
        for text in texts:
            assert page in text or (page == "compat.md" and "blocks(" in text), (page, files)
        title, *sections = re.split(r"^## (.*)$", (DOCS / page).read_text(), flags=re.M)
        assert programs(title) == [], f"{page} has code above its first section"
        for name, section in zip(sections[::2], sections[1::2], strict=True):
            assert not programs(section) or any(f'"{name}"' in text for text in texts), f"nothing runs {page}, {name}"


def test_all_code_is_found():
    for path in PAGES:
        text = path.read_text()
        assert set(re.findall(r"^\s*```(\S+)", text, re.M)) <= {"python", "diff"}, path
        assert text.count("```python") == len(programs(text)), path
    plain = [path for path in DOCS.rglob("*.md") if not programs(path.read_text())]
    assert {str(path.relative_to(DOCS)) for path in plain} == WORDS


def test_every_script_is_on_a_page():
    pages = "".join(path.read_text() for path in PAGES)
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f'"examples/{path.name}"' not in pages] == []


def test_every_public_name_has_its_page_and_an_example():
    reference = re.findall(r"^::: fastmix\.(?:\w+\.)*(\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted(reference) == sorted(fastmix.__all__)
    for name in fastmix.__all__:
        one = getattr(fastmix, name)
        if not inspect.ismodule(one):
            assert ">>>" in (one.__doc__ or ""), f"{name} has no example"


def test_every_method_has_its_picture():
    for page in [DOCS / "augmix.md", *(DOCS / "methods").glob("*.md")]:
        assert re.search(r"^!\[.+\]\([./]*pictures/\w+\.png\)$", page.read_text(), re.M), page


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if f": {page.relative_to(DOCS)}" not in navigation] == []


def test_readme_is_short_and_its_links_hold():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 110
    links = [link.partition("#") for link in re.findall(r"\]\((?!http)(.*?)\)", text)]
    assert len(links) > 20
    assert [file for file, _, _ in links if not (ROOT / file).exists()] == []
    for file, _, place in links:
        titles = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.M) if place else []
        anchors = ["", *(re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles)]
        assert place in anchors, (file, place)


def test_the_site_builds_strictly(tmp_path):
    if importlib.util.find_spec("zensical") is None and shutil.which("zensical") is None:
        pytest.skip("needs zensical")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist"))
    run = ["zensical"] if shutil.which("zensical") else [sys.executable, "-m", "zensical"]
    built = subprocess.run([*run, "build", "--clean", "--strict"], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "SoftTarget" in (copy / ".site" / "api" / "index.html").read_text()
