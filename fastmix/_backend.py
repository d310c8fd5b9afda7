"""Which backend runs a tensor: the Triton kernels where they can; on the CPU the native library; plain torch elsewhere.

A backend is a module. `fastmix._torch`, `fastmix._native` and `fastmix.kernels.api` have the same functions, so one autograd
Function serves all. Triton is imported, and the native library found or built, the first time a tensor needs it.
"""

import functools
import importlib
import os
import shutil
import warnings
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from . import _native, _torch

NAMES = ("triton", "native", "torch")
_forced: ContextVar[str | None] = ContextVar("fastmix_backend", default=None)
_VARIABLE = os.environ.encodekey("FASTMIX_BACKEND")


@contextmanager
def backend(name: str):
    """Runs every op inside the block on one backend: `"triton"` (the kernels), `"native"` (C, for the CPU) or `"torch"`.

    Without it the kernels run wherever they can, CPU tensors on the native backend, and the rest on torch. The environment variable `FASTMIX_BACKEND` does the same
    for a whole process. An op remembers the backend of its forward for its backward.

    Args:
        name: `"triton"`, `"native"` or `"torch"`. With `TRITON_INTERPRET=1` in the environment before Triton is imported, `"triton"` runs
            CPU tensors too (slowly, for testing). `"native"` builds its library with the system's C compiler once; without the name, a
            CPU that cannot have it runs torch.

    Raises:
        ValueError: another name.
        RuntimeError: by the op, where the backend cannot run its tensors; the message says why.

    >>> import torch, fastmix
    >>> with fastmix.backend("torch"):
    ...     fastmix.mix(torch.tensor([0.0, 4.0]), 0.25, torch.tensor([1, 0]))
    tensor([3., 1.])
    """
    token = _forced.set(_name(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _name(name, argument):
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{argument}: expected 'triton', 'native' or 'torch', got {name!r}")
    return name


def of(tensor: torch.Tensor):
    """The backend module that runs an op on this tensor."""
    forced = _wanted()
    if forced is None and tensor.is_cpu:
        return _of_cpu()
    return module(_choice(forced, tensor.device))


def name(device: torch.device) -> str:
    """The backend that runs ops on tensors of this device."""
    return _choice(_wanted(), device)


def _wanted():
    """The backend that the block or the process forces, if any."""
    # asked for each call: os.environ itself takes half a microsecond to say that a name is not there
    return _forced.get() or (os.environ["FASTMIX_BACKEND"] if _VARIABLE in os.environ._data else None) or None


@functools.cache
def _choice(forced, device):
    if forced is not None:
        _name(forced, "FASTMIX_BACKEND")
    if forced == "torch":
        return "torch"
    if forced == "native" or (forced is None and device.type == "cpu"):
        reason = _why_not_native(device)
        if reason and forced:
            raise RuntimeError(f"fastmix: backend 'native' cannot run this tensor: {reason}")
        return "torch" if reason else "native"
    reason = _why_not_triton(device)
    if reason is None:
        return "triton"
    if forced == "triton":
        raise RuntimeError(f"fastmix: backend 'triton' cannot run this tensor: {reason}")
    _warn_once(reason)
    return "torch"


@functools.cache
def _warn_once(reason):
    """Once for all devices that have this reason."""
    warnings.warn(f"fastmix: using the slower torch backend: {reason}", RuntimeWarning, stacklevel=6)


def module(name: str):
    return _kernels() if name == "triton" else _native if name == "native" else _torch


@functools.cache
def _of_cpu():
    return module(_choice(None, torch.device("cpu")))


def _why_not_native(device: torch.device) -> str | None:
    """Why the native library cannot run tensors of this device, or None if it can."""
    return _native.why_not() if device.type == "cpu" else f"it runs tensors of the CPU, not of {device.type}"


@functools.cache
def _kernels():
    return importlib.import_module("fastmix.kernels.api")


def _why_not_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run tensors of this device, or None if they can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        return "CPU tensors need TRITON_INTERPRET=1, set before Triton is imported"
    if device.type not in ("cpu", "cuda"):
        return f"there are no kernels for devices of type {device.type!r}"
    try:
        _kernels()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if interpreted:
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 7.0, the least that Triton supports"
    if not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return "Triton needs a C compiler (gcc or clang) to build its launcher, and none is on PATH"
    return None
