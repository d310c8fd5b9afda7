"""What a comparison is made of: a case is one question that several ways answer, on inputs of one shape and dtype."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastmix.bench.results import name_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of a row's largest value. Ours is what is promised, 16 roundings of float32 or one of a narrower result; the ways people write
# round lambda too where numbers are narrow.
TOLERANCE = {F32: 2e-6, BF16: 2**-8, F16: 2**-11 + 2e-6}
OTHERS = {F32: 2e-6, BF16: 2**-5, F16: 2**-8}
CHECKED = 2**20  # elements that a result is checked on before it is timed; larger cases are checked on their first rows


@dataclass(frozen=True)
class Refilled:
    """A way that writes over its first argument, which is filled anew before each call, off the clock."""

    way: Callable


@dataclass(eq=False)
class Case:
    """suite and title name it; ways are the answers by name, ours first and None where a library is missing; moved is the
    floor in bytes, what nobody can do without, or 0 where there is no such thing, and kept the bytes of the results;
    arguments(rows, device) are tensors of so many rows, all of them for None; expected(arguments, copies) are the oracle's
    results, or a plain copy's, and, where a row's largest value is not the measure, their scales.

    mode "forward" times way(*arguments), "forward, for a backward" the same where the leaves (positions in arguments) require a
    gradient, "forward + backward" the gradients to the leaves too, and "backward" those alone, each after a forward of its own
    that is not timed. sample(arguments, g, results) picks rows of what is timed, and says what the oracle finds there. `draws`
    says that a way draws its own parameters: it may change its inputs, and a CUDA graph cannot hold it. `beside` are the ways
    that every other is timed in turn with; `calls` of one are issued in a row without waiting for any, where what they cost the
    host is the question; `late` cases are what a run without enough time gives up first; where `part` of the work is timed, ways
    that share it out differently are not compared."""

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
    sample: Callable | None = None
    kept: int = 0
    draws: bool = False
    beside: tuple = ("fastmix",)
    calls: int = 1
    late: bool = False
    part: bool = False
    checked: int = 0

    def __post_init__(self):
        self.checked = self.checked or max(2, min(self.shape[0], CHECKED // math.prod(self.shape[1:])))

    @property
    def group(self):
        return f"{self.suite}, {self.title} {list(self.shape)} {name_of(self.dtype)}"

    def call(self, name, arguments, g=None):
        """(set-up, what is timed): the first is called before each of the second and gives its arguments. g is the upstream
        gradient, if not the usual."""
        way, arguments = self.ways[name], list(arguments)
        differentiates = self.mode != "forward"
        g = self.upstream(arguments) if differentiates and g is None else g
        source = arguments[0]
        if isinstance(way, Refilled):
            way, arguments[0] = way.way, torch.empty_like(source)
        if differentiates:
            for leaf in self.leaves:
                arguments[leaf] = arguments[leaf].detach().requires_grad_()
        leaves = [arguments[leaf] for leaf in self.leaves]

        @functools.cache
        def upstream(dtype):  # a loss of a narrow dtype wants a narrow gradient: not made on the clock
            return g.to(dtype)

        def refill():
            if arguments[0].data_ptr() != source.data_ptr():
                with torch.no_grad():
                    arguments[0].copy_(source)
            return ()

        def forward():
            return way(*arguments)

        def backward(out):
            return torch.autograd.grad(out, leaves, upstream(out.dtype))

        def both():
            out = way(*arguments)
            return out.detach(), *torch.autograd.grad(out, leaves, upstream(out.dtype))

        def graph():
            refill()
            return (way(*arguments),)

        return (
            (graph, backward) if self.mode == "backward" else (refill, both if self.mode == "forward + backward" else forward)
        )

    def tolerance(self, name):
        return (TOLERANCE if name.startswith("fastmix") else OTHERS)[self.dtype]

    def hold(self, name, device):
        """Holds the results of a way to the oracle: AssertionError if they are wrong."""
        if self.check is not None:
            return self.check(self, name, device)
        arguments, expected = _oracle(self, name == "copy")
        g = None if self.upstream is None else self.upstream(arguments).to(device)  # drawn on the CPU, as the oracle's
        arguments = [t.to(device, copy=True) if isinstance(t, torch.Tensor) else t for t in arguments]
        setup, call = self.call(name, arguments, g)
        results = call(*setup())
        results = results if isinstance(results, tuple) else (results,)
        expected = expected[1:] if self.mode == "backward" else expected[: len(results)]
        for actual, (value, scale) in zip(results, expected, strict=True):
            close(actual, value, scale, self.tolerance(name))

    def spot(self, name, arguments, results):
        """Holds rows of results of all rows to the oracle: of what is timed, on the device where it is."""
        if self.sample is None:
            return
        results = results if isinstance(results, tuple) else (results,)
        results = (None, *results) if self.mode == "backward" else results
        g = None if self.upstream is None else self.upstream(arguments)
        for actual, value, scale in self.sample(arguments, g, results, name == "copy"):
            close(actual, value, scale, self.tolerance(name))


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


def some_rows(count):
    """A few rows, the last one too, that hold the partner of each in a reversed batch."""
    return torch.tensor(sorted({0, count // 3, count - 1 - count // 3, count - 1}))
