"""What a comparison is made of: a case is one question that several ways answer, on inputs of one shape and dtype."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from fastmix.bench.ops import ENTRIES
from fastmix.bench.peers import Refilled
from fastmix.bench.samples import BF16, F16, F32, F64, Draw, Sample, exact, name_of

# Of a row's scale. Ours is what is promised, 16 roundings of float32 or one of a narrower result; the ways people write round lambda
# too where numbers are narrow.
TOLERANCE = {F32: 2e-6, BF16: 2**-8, F16: 2**-11 + 2e-6}
OTHERS = {F32: 2e-6, BF16: 2**-5, F16: 2**-8}
CHECKED = 2**18  # elements that a result is checked on before it is timed; larger cases are checked on their first rows
FORWARD, BACKWARD, BOTH, FORMING = "forward", "backward", "forward + backward", "forward, for a backward"


@dataclass(eq=False, kw_only=True)
class Case:
    """`suite` and `title` name it; `ways` are the answers by name, ours first, and None where a library is missing.

    `mode` FORWARD times way(*arguments), FORMING the same where the leaves require a gradient, BOTH the gradients to the leaves too, and
    BACKWARD those alone, each after a forward of its own that is not timed. `leaves` are positions in the arguments."""

    suite: str
    title: str
    shape: tuple
    dtype: torch.dtype
    ways: dict
    moved: int = 0  # the floor in bytes that every way must move, or 0 where there is none
    inputs: Callable  # (device) -> what `call` and `compare_timed` take
    check: Callable | None = None  # (case, name, device): raises AssertionError where a way's results are wrong
    mode: str = FORWARD
    leaves: tuple = (0,)
    kept: int = 0  # bytes of the results
    draws: bool = False  # a way draws its own parameters: it may change its inputs, and a CUDA graph cannot hold it
    beside: tuple = ("fastmix",)  # the ways that every other is timed in turn with
    calls: int = 1  # so many are issued in a row without waiting for any, where what they cost the host is the question
    late: bool = False  # a run without enough time gives it up first
    part: bool = False  # only a part of the work is timed, so ways that divide it differently are not compared

    @property
    def group(self):
        return f"{self.suite}, {self.title} {list(self.shape)} {name_of(self.dtype)}"

    def arguments(self, inputs):
        return list(inputs)

    def call(self, name, inputs):
        """(set-up, what is timed): the first is called before each of the second and gives its arguments."""
        way, arguments = self.ways[name], self.arguments(inputs)
        source = arguments[0]
        if isinstance(way, Refilled):
            way, arguments[0] = way.way, torch.empty_like(source)
        leaves = []
        for leaf in self.leaves if self.mode != FORWARD else ():
            arguments[leaf] = arguments[leaf].detach().requires_grad_()
            leaves.append(arguments[leaf])

        @functools.cache
        def upstream(dtype):  # a loss of a narrow dtype needs a narrow gradient: not made on the clock
            return inputs.g.to(dtype)

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
            out = forward()
            return out.detach(), *backward(out)

        if self.mode == BACKWARD:
            return (lambda: (refill(), forward())[1:]), backward
        return refill, both if self.mode == BOTH else forward

    def compare(self, name, device):
        """Compares a way's results on few rows with the oracle: AssertionError if they are wrong."""
        self.check(self, name, device)

    def compare_timed(self, name, inputs, results):
        """Compares rows of what is timed, on the device where it is, with the oracle."""


@dataclass(eq=False, kw_only=True)
class OpCase(Case):
    """A question about an op of the registry. `names` are the inputs that its ways take, in their order; a sequence is passed tensor by
    tensor. `wanted` names the leaves, the batch first; `fixed` are inputs that are not drawn; `factor` multiplies the op's results.

    Every way must read the batch and write the result, where there is one; backwards it must read the result's gradient and write the
    batch's, and of a second gradient of mixing read the batch again."""

    op: str
    names: tuple
    wanted: tuple
    fixed: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    factor: float = 1.0
    inputs: Callable = None  # type: ignore[assignment]

    def __post_init__(self):
        self.entry, self.inputs = ENTRIES[self.op], self.inputs or self.sample
        loss = self.entry.value == "loss"
        self.checked = min(self.shape[0], max(2, CHECKED // math.prod(self.shape[1:])), 64 if loss else CHECKED)
        sets, stacked = self.options.get("K", 1), self.options.get("stacked", False)
        tensors = 1 if stacked else sets  # that the batch is
        self.leaves = *range(tensors), *(self.names.index(name) + tensors - 1 for name in self.wanted[1:])
        size = math.prod(self.shape) * self.dtype.itemsize
        batch, result, forward, backward = sets * size, size * (not loss), self.mode != BACKWARD, self.mode != FORWARD
        again = batch * (len(self.wanted) - 1) * (not loss)
        self.part = loss and self.mode in (FORMING, BACKWARD)
        self.moved = 0 if self.part else (batch + result) * forward + (result + batch + again) * backward
        self.kept = result * (forward and "out" not in self.names) + batch * backward

    def sample(self, device="cpu", rows=None):
        """Inputs of so many rows, and then of few pixels, or of all; partners are those of the reversed batch."""
        shape = (rows or self.shape[0], *self.shape[1:])
        if rows and self.entry.value == "loss":
            shape = (*shape[:2], *(min(size, 16) for size in shape[2:]))
        s = self.entry.sample(Draw(device, F32, edges=False), shape, self.dtype, **self.options)
        for name, make in {**self.entry.flipped, **self.fixed}.items():
            setattr(s, name, make(s))
        return s

    def arguments(self, inputs):
        values = (getattr(inputs, name) for name in self.names)
        return [t for value in values for t in (value if isinstance(value, tuple) else [value])]

    def named(self, results):
        """{"value" or leaf: result}; the gradients to a sequence, the first leaf, are one of its own."""
        results = list(results) if isinstance(results, tuple) else [results]
        found = {} if self.mode == BACKWARD else {"value": results.pop(0)}
        if results:
            tensors = len(results) - len(self.wanted) + 1
            first = results[0] if tensors == 1 else tuple(results[:tensors])
            found |= zip(self.wanted, [first, *results[tensors:]], strict=True)
        return found

    def compare(self, name, device):
        s = _small_sample(self)
        there = s.map(lambda t: t.to(device, copy=True) if isinstance(t, torch.Tensor) else t)
        setup, call = self.call(name, there)
        self._close(name, self.named(call(*setup())), s)

    def compare_timed(self, name, inputs, results):
        found, rows = self.named(results), some_rows(self.shape[0])
        few = inputs.take(rows)
        if self.entry.value == "loss":
            if "value" in found:
                close(found.pop("value"), self.factor * self.whole(inputs), None, _tolerance(name, self.dtype))
            few = few.replaced(g=few.g * (few.count() / inputs.count()))
        kept = Sample(rows=inputs.rows, pixels=inputs.pixels, **found).take(rows)
        self._close(name, {key: getattr(kept, key) for key in found}, few)

    def _close(self, name, found, s):
        truth = self.entry.truth(s.map(exact)) if name != "copy" else {"value": (exact(s.x), None), "x": (exact(s.g), None)}
        for key, actual in found.items():
            values, terms = truth[key]
            scale = self.entry.scale(key, np.abs(values) if terms is None else terms)
            scale = scale.max() if key in ("lam", "mask", "weights") else scale  # sums: no row is smaller than its rounding
            actual = torch.stack(actual) if isinstance(actual, tuple) else actual
            close(actual, self.factor * values, self.factor * scale, _tolerance(name, self.dtype))

    def whole(self, s):
        """The mean loss of all rows in float64, a few rows and their partners at a time."""
        total, half = 0.0, (s.rows + 1) // 2
        way, *_ = self.entry.ways(s).values()
        for at in torch.arange(half).split(max(1, 2**24 // math.prod(self.shape[1:]))):
            few = s.take(torch.cat((at, s.rows - 1 - at)).unique(), pixels=None)
            total += float(way(few, F64)) * few.rows / s.rows
        return total


def _tolerance(name, dtype):
    return (TOLERANCE if name.startswith("fastmix") else OTHERS)[dtype]


@functools.lru_cache(maxsize=2)  # the ways of a case come one after the other
def _small_sample(case):
    return case.sample(rows=case.checked)


def close(actual, expected, scale, tolerance):
    """Compares a result with the oracle's, element by element, in units of a scale or of the row's largest value."""
    expected = torch.as_tensor(expected, dtype=F64)
    actual = actual.detach().cpu().double()
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    if scale is None:
        rows = tuple(range(min(1, expected.dim() - 1), expected.dim()))
        scale = expected.abs().amax(rows, keepdim=True) if rows else expected.abs()
    error = (actual - expected).abs()
    worst = float(torch.where(error == 0, error, error / torch.as_tensor(scale)).max())
    assert worst <= tolerance, f"wrong by {worst:.2g} of a row's scale"


def some_rows(count):
    """A few rows, the last one too, with the partner of each in a reversed batch."""
    return torch.tensor(sorted({0, count // 3, count - 1 - count // 3, count - 1}))
