"""Choosing a backend: forced, from the environment, and falling back with one warning that says why."""

import inspect
import os
import pathlib
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch
from conftest import NO_TRITON

import fastmix
from fastmix import _backend, _torch

ROOT = pathlib.Path(__file__).parent.parent


def python(code, **environment):
    """Runs code in a fresh interpreter, from the repository root."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMIX_BACKEND")}
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"
OPS = """
import torch, fastmix
x, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
mixed, target = fastmix.Mixup(0.2)(x, y)
fastmix.soft_cross_entropy(mixed, target).backward()
fastmix.CutMix()(torch.randn(4, 1, 8, 8), y)
fastmix.mixed_accuracy(mixed, target)
"""


@pytest.mark.slow
@pytest.mark.trap("Open-Sora#850")
def test_import_does_not_load_triton_and_every_op_runs_without_it():
    ran = python("import sys, fastmix; assert 'triton' not in sys.modules; print(len(fastmix.__all__))")
    assert ran.returncode == 0, ran.stderr
    ran = python(WITHOUT_TRITON + OPS + "print('done')")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "done\n"
    assert ran.stderr == ""


@pytest.mark.slow
def test_forcing_triton_without_it_says_why():
    ran = python(WITHOUT_TRITON + OPS, FASTMIX_BACKEND="triton", TRITON_INTERPRET="1")
    assert "RuntimeError: fastmix: backend 'triton' cannot run this tensor: Triton cannot be imported" in ran.stderr
    ran = python(OPS, FASTMIX_BACKEND="triton")
    assert "CPU tensors need TRITON_INTERPRET=1" in ran.stderr
    ran = python(OPS, FASTMIX_BACKEND="cuda")
    assert "ValueError: FASTMIX_BACKEND: expected 'triton', 'native' or 'torch', got 'cuda'" in ran.stderr


def test_environment_forces_a_process(monkeypatch):
    monkeypatch.setenv("FASTMIX_BACKEND", "torch")
    assert _backend.of(torch.zeros(1)) is _torch
    monkeypatch.setenv("FASTMIX_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FASTMIX_BACKEND"):
        fastmix.mix(torch.zeros(2), 0.5, torch.tensor([1, 0]))


def test_context_nests_and_restores(monkeypatch):
    monkeypatch.delenv("FASTMIX_BACKEND", raising=False)
    with fastmix.backend("torch"):
        with (
            pytest.raises(ValueError, match="backend: expected 'triton', 'native' or 'torch', got 'numpy'"),
            fastmix.backend("numpy"),
        ):
            pass
        assert _backend._forced.get() == "torch"
    assert _backend._forced.get() is None


@pytest.mark.trap("modes-in-autograd-thread")
@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_backward_remembers_the_backend_of_its_forward(device, monkeypatch):
    """Autograd's own threads do not see the caller's context (and on a GPU backward always runs in one)."""
    calls = []
    kernels = _backend.of(torch.zeros(1))
    for name in ("mix_bwd", "soft_ce_bwd"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    x = torch.randn(4, 3, requires_grad=True)
    mixed = fastmix.mix(x, 0.3, torch.tensor([1, 0, 3, 2]))
    loss = fastmix.soft_cross_entropy(mixed, torch.tensor([0, 1, 2, 0]))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert calls == ["soft_ce_bwd", "mix_bwd"]
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_backends_have_the_same_face(backend):
    if backend == "triton":
        pytest.importorskip("triton", reason=NO_TRITON)
    module = _backend.module(backend)
    for name in _torch.__all__:
        ours, theirs = (inspect.getfullargspec(getattr(each, name)) for each in (module, _torch))
        assert (ours.args, ours.defaults, ours.varargs) == (theirs.args, theirs.defaults, theirs.varargs), name
        assert len(theirs.args) <= 10, name


def test_unsupported_devices_fall_back_with_one_warning(monkeypatch):
    monkeypatch.delenv("FASTMIX_BACKEND", raising=False)
    _backend._choice.cache_clear()
    _backend._warn_once.cache_clear()
    meta = torch.empty(2, device="meta")
    with pytest.warns(RuntimeWarning, match="slower torch backend: there are no kernels for devices of type 'meta'"):
        assert _backend.of(meta) is _torch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _backend.of(meta) is _torch


@pytest.mark.parametrize(
    ("capability", "compiler", "words"),
    [((6, 1), "/usr/bin/cc", "older than compute capability 7.0"), ((9, 0), None, "needs a C compiler"), ((9, 0), "/cc", None)],
)
def test_reasons_not_to_use_triton_on_a_gpu(capability, compiler, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_backend, "_kernels", lambda: types.ModuleType("kernels"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(_backend.shutil, "which", lambda name: compiler)
    reason = _backend._why_not_triton(torch.device("cuda", 0))
    assert reason is None if words is None else words in reason
