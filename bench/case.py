"""What a comparison is made of: a case is one question that several ways answer, on inputs of one shape and dtype."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastmix.bench.results import name_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# of a row's largest value: 16 roundings of float32 or so; in lower precision the ways people write round lambda too
TOLERANCE = {F32: 2e-6, BF16: 2**-5, F16: 2**-8}
CHECKED = 2**20  # elements that a result is checked on; larger cases are checked on their first rows


@dataclass(eq=False)
class Case:
    """suite and title name it; ways are the answers by name, ours first and None where a library is missing; moved is the
    floor in bytes, what nobody can do without; arguments(rows, device) are tensors of so many rows, all of them for None;
    expected(arguments, copies) are the oracle's results, or a plain copy's, and, where a row's largest value is not the measure,
    their scales.

    mode "forward" times way(*arguments), "forward + backward" its gradients to the leaves too (positions in arguments), and
    "backward" those alone, each after a forward of its own that is not timed. `draws` says that a way draws its own
    parameters: it may change its inputs, and a CUDA graph cannot hold it. `beside` are the ways that every other is timed in turn
    with; `calls` of one are issued in a row without waiting for any, where what they cost the host is the question; `late` cases
    are what a run without enough time gives up first."""

    suite: str
    title: str
    shape: tuple
    dtype: torch.dtype
    ways: dict
    moved: int
    arguments: Callable
    expected: Callable | None = None
    mode: str = "forward"
    leaves: tuple = (0,)
    upstream: Callable | None = None  # (arguments) -> the upstream gradient, made before the clock starts
    check: Callable | None = None  # (case, name, device): another way to hold a way's results to the oracle
    draws: bool = False
    beside: tuple = ("fastmix",)
    calls: int = 1
    late: bool = False
    checked: int = 0

    def __post_init__(self):
        self.checked = self.checked or max(2, min(self.shape[0], CHECKED // math.prod(self.shape[1:])))

    @property
    def group(self):
        return f"{self.suite}, {self.title} {list(self.shape)} {name_of(self.dtype)}"

    def call(self, name, arguments, g=None):
        """(set-up or None, what is timed): the first gives the second's arguments. g is the upstream gradient, if not the usual."""
        way = self.ways[name]
        if self.mode == "forward":
            return None, functools.partial(way, *arguments)
        arguments = list(arguments)
        for leaf in self.leaves:
            arguments[leaf] = arguments[leaf].detach().requires_grad_()
        leaves = [arguments[leaf] for leaf in self.leaves]
        g = self.upstream(arguments) if g is None else g

        def like(out):
            return g if g.dtype == out.dtype else g.to(out.dtype)

        def forward():
            out = way(*arguments)
            return (out,), {}

        def backward(out):
            return torch.autograd.grad(out, leaves, like(out))

        def both():
            out = way(*arguments)
            return out.detach(), *torch.autograd.grad(out, leaves, like(out))

        return (forward, backward) if self.mode == "backward" else (None, both)

    def hold(self, name, device):
        """Holds the results of a way to the oracle: AssertionError if they are wrong."""
        if self.check is not None:
            return self.check(self, name, device)
        arguments, expected = _oracle(self, name == "copy")
        g = None if self.upstream is None else self.upstream(arguments).to(device)  # drawn on the CPU, as the oracle's
        arguments = [t.to(device, copy=True) if isinstance(t, torch.Tensor) else t for t in arguments]
        setup, call = self.call(name, arguments, g)
        results = call(*setup()[0]) if setup else call()
        results = results if isinstance(results, tuple) else (results,)
        if self.mode == "backward":
            expected = expected[1:]
        for actual, (value, scale) in zip(results, expected, strict=True):
            close(actual, value, scale, TOLERANCE[self.dtype])


@functools.lru_cache(maxsize=2)  # the ways of a case come one after the other
def _oracle(case, copies):
    """(arguments of the rows that are checked, [(expected result, scale or None)])"""
    arguments = case.arguments(case.checked, torch.device("cpu"))
    results = case.expected(arguments, copies)
    return arguments, [value if isinstance(value, tuple) else (value, None) for value in results]


def close(actual, expected, scale, tolerance):
    """A result against the oracle's, element by element, in units of the row's largest value or of a scale."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = actual.detach().cpu().double()
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    rows = len(expected) if expected.dim() > 1 else 1
    if scale is None:
        scale = expected.abs().reshape(rows, -1).amax(1, keepdim=True)
    worst = float(((actual - expected).abs().reshape(rows, -1) / scale).max())
    assert worst <= tolerance, f"wrong by {worst:.2g} of a row's largest value"
