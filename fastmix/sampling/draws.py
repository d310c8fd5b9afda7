"""The samplers' random numbers: keys and counters, and the ways of a draw through the backends.

A stream is a state of four int64: two words of a key, the number of the batch, and one for the kernels. What is drawn from it
depends on these and on the row alone, so every device and backend draws the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import custom_op
from torch.utils.data import get_worker_info

from .. import _backend, _check, _dispatch
from .._torch import _formulas
from .._torch import sample as cpu
from .._torch.sample import Node, Plan, Sampled

MOST_ROWS = 2**48  # of one stream
_MOST_KEY = 2**63 - 1


def process() -> tuple[int | None, int | None]:
    """Returns what tells this process from others that have the same sampler: (seed of its DataLoader worker, rank), or None."""
    worker = get_worker_info()
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    return None if worker is None else worker.seed, torch.distributed.get_rank() if ranks else None


def state(seed: int, batch: int, folded: tuple[int | None, int]) -> torch.Tensor:
    """Returns the state of a sampler with a seed in a process, before its batch of this number."""
    worker, rank = folded
    second = _hash(_hash(rank) + (0 if worker is None else 1 + worker))
    return torch.tensor([seed, second, batch, 0], dtype=torch.int64, device="cpu")


def _hash(value: int) -> int:
    """Returns 63 bits in which every bit of a number counts (splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return (value ^ value >> 31) >> 1


def fresh_state(device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """Returns a state that is drawn for one batch, by one call of a generator: the device's default one where None."""
    place = device if generator is None else generator.device
    # named only where given: a compiled program knows no generators
    source: Any = {} if generator is None else {"generator": generator}
    return torch.randint(_MOST_KEY, (4,), dtype=torch.int64, device=place, **source)


def state_device(device: torch.device) -> torch.device:
    """Returns where the states are for tensors of a device: beside them for kernels, on the host for plain torch."""
    return _backend.module(_backend.name(device)).state_device(device)


# a constant of the program that is traced, as the name of the backend is
state_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sample(
    states: tuple[torch.Tensor, ...],
    table: tuple[Node, ...],
    x: torch.Tensor,
    y: torch.Tensor | None,
    given: torch.Tensor | None,
    plan: Plan,
) -> Sampled:
    """Draws a batch and moves its seeded states on: `fastmix._torch.sample.sample_batch`, on the backend of x."""
    return _dispatch.call(_SAMPLE, (x,), states, table, x, y, given, plan)


def row_keys(state: torch.Tensor, rows: int, stream: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys, by which rows are sorted, and picks of 63 bits: int64 [N]."""
    return _dispatch.call(_ROW_KEYS, (x,), state, rows, stream, x)


def dirichlet(
    state: torch.Tensor, rows: int, ways: int, numbers: Any, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Returns Dirichlet weights [rows, ways] of numbers (alpha,), or [rows, 1 + ways] of numbers (alpha, a, b)."""
    if _check.transformed() and not _check.functional_transform():
        # a tensor: floats would be constants of the program that is traced, and compiled anew
        ones = (torch.ones((), dtype=torch.float64, device=state.device) for _ in numbers)
        numbers = torch.stack([one.mul(number) for one, number in zip(ones, numbers, strict=True)])
    return _dispatch.call(_DIRICHLET, (state,), state, rows, ways, numbers, dtype, device)


def numbers(state: torch.Tensor, rows: int, count: int, normal: bool, x: torch.Tensor) -> torch.Tensor:
    """Returns numbers of each row on the device of x: uniform float64 ones, or normal float32 ones [rows, count]."""
    return _dispatch.call(_NUMBERS, (x,), state, rows, count, normal, x.device)


def augmix_steps(
    state: torch.Tensor, seeded: bool, rows: int, depth: int, drawn: bool, numbers: tuple[float, ...], x: torch.Tensor
) -> Any:
    """Returns (kinds, values) of the steps of AugMix's chains, on the device of x, or the host for plain torch; moves a seeded state on."""
    return _dispatch.call(_STEPS, (x,), state, seeded, rows, depth, drawn, numbers, x.device)


def soft_target(y: torch.Tensor, index: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (classes, weights) [N, 2] of labels y [N] in one launch; partners are known to be rows."""
    return _backend.of(y).soft_target(y, index, own)


def _launch_sample(
    states: tuple[torch.Tensor, ...],
    table: tuple[Node, ...],
    x: torch.Tensor,
    y: torch.Tensor | None,
    given: torch.Tensor | None,
    plan: Plan,
) -> Sampled:
    return _backend.of(x).sample_batch(states, table, x, y, given, plan)


def _sample_operator(
    states: tuple[torch.Tensor], table: torch.Tensor, x: torch.Tensor, y: torch.Tensor, given: Any, plan: Plan, backend: str
) -> Sampled:
    """Draws in a traced program, which moves the states on itself: an operator cannot write to a list of tensors."""
    h, w = plan.mask or (-1, -1)
    numbers = [plan.counted, plan.pairs, plan.choosing, plan.dims, h, w, plan.double]
    found = _sample_op(list(states), table, x.detach(), y, given, [int(number) for number in numbers], backend)
    for moved in states[: plan.seeded]:
        moved[2] += 1
    lam, index, own, *rest = found
    has = (plan.dims, plan.mask is not None, y is not None, y is not None)
    rest = [rest.pop(0) if there else None for there in has]
    return Sampled(lam, index, own, *rest)


@custom_op("fastmix::sample", mutates_args=())
def _sample_op(
    states: Sequence[torch.Tensor],
    table: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    given: torch.Tensor | None,
    plan: Sequence[int],
    backend: str,
) -> list[torch.Tensor]:
    counted, pairs, choosing, dims, h, w, double = plan
    wanted = Plan(0, counted, bool(pairs), choosing, dims, None if h < 0 else (h, w), bool(double))
    found = _backend.module(backend).sample_batch(tuple(states), table, x, y, given, wanted)
    return [t.clone() for t in found if t is not None]  # they share memory, which an operator's results may not


@_sample_op.register_fake
def _(
    states: list[torch.Tensor], table: torch.Tensor, x: torch.Tensor, y: torch.Tensor, given: Any, plan: list[int], backend: str
) -> Any:
    *_, dims, h, w, double = plan
    rows, dtype = x.shape[0], torch.float64 if double else torch.float32
    numbers: Any = {"dtype": dtype, "device": x.device}
    integers: Any = {"dtype": torch.int64, "device": x.device}
    found = [torch.empty(rows, **numbers), torch.empty(rows, **integers), torch.empty(rows, **numbers)]
    if dims:
        found.append(torch.empty(rows, 2 * dims, **integers))
    if h >= 0:
        found.append(torch.empty(rows, h, w, **numbers))
    if y is not None:
        found += [torch.empty(rows, 2, **integers), torch.empty(rows, 2, **numbers)]
    return found


def _launch_row_keys(state: torch.Tensor, rows: int, stream: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _backend.of(x).row_keys(state, rows, stream, x.device)


def _row_keys_operator(state: torch.Tensor, rows: int, stream: int, x: torch.Tensor, backend: str) -> Any:
    return _row_keys_op(state, x.detach(), stream, backend)


@custom_op("fastmix::row_keys", mutates_args=())
def _row_keys_op(state: torch.Tensor, x: torch.Tensor, stream: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    keys, picks = _backend.module(backend).row_keys(state, x.shape[0], stream, x.device)
    return keys.clone(), picks.clone()


@_row_keys_op.register_fake
def _(state: torch.Tensor, x: torch.Tensor, stream: int, backend: str) -> Any:
    return tuple(torch.empty(x.shape[0], dtype=torch.int64, device=x.device) for _ in range(2))


def _launch_dirichlet(state: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _backend.of(state).dirichlet(state, *arguments)


def _dirichlet_operator(
    state: torch.Tensor,
    rows: int,
    ways: int,
    numbers: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Any:
    return _dirichlet_op(state, rows, ways, numbers, dtype, device, backend)


@custom_op("fastmix::dirichlet", mutates_args=())
def _dirichlet_op(
    state: torch.Tensor,
    rows: int,
    ways: int,
    numbers: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> torch.Tensor:
    return _backend.module(backend).dirichlet(state, rows, ways, numbers, dtype, device)


@_dirichlet_op.register_fake
def _(
    state: torch.Tensor,
    rows: int,
    ways: int,
    numbers: tuple[float, ...],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Any:
    return torch.empty(rows, ways + (len(numbers) > 1), dtype=dtype, device=device)


def _launch_numbers(state: torch.Tensor, rows: int, count: int, normal: bool, device: torch.device) -> torch.Tensor:
    return _backend.module(_backend.name(device)).draw_numbers(state, rows, count, normal, device)


def _numbers_operator(state: torch.Tensor, rows: int, count: int, normal: bool, device: torch.device, backend: str) -> Any:
    return _numbers_op(state, rows, count, normal, device, backend)


@custom_op("fastmix::draw_numbers", mutates_args=())
def _numbers_op(state: torch.Tensor, rows: int, count: int, normal: bool, device: torch.device, backend: str) -> torch.Tensor:
    return (
        _backend.module(backend).draw_numbers(state, rows, count, normal, device).clone(memory_format=torch.contiguous_format)
    )


@_numbers_op.register_fake
def _(state: torch.Tensor, rows: int, count: int, normal: bool, device: torch.device, backend: str) -> Any:
    return torch.empty(rows, count, dtype=torch.float32 if normal else torch.float64, device=device)


def _launch_steps(
    state: torch.Tensor, seeded: bool, rows: int, depth: int, drawn: bool, numbers: tuple[float, ...], device: torch.device
) -> Any:
    return _backend.module(_backend.name(device)).augmix_steps(state, seeded, rows, depth, drawn, numbers, device)


def _steps_operator(
    state: torch.Tensor,
    seeded: bool,
    rows: int,
    depth: int,
    drawn: Any,
    numbers: tuple[float, ...],
    device: torch.device,
    backend: str,
) -> Any:
    found = _steps_op(state, rows, depth, drawn, numbers, device, backend)
    if seeded:
        state[2] += 1
    return found


@custom_op("fastmix::augmix_steps", mutates_args=())
def _steps_op(
    state: torch.Tensor, rows: int, depth: int, drawn: bool, numbers: Sequence[float], device: torch.device, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    kinds, values = _backend.module(backend).augmix_steps(state, False, rows, depth, drawn, numbers, device)
    return kinds, values


@_steps_op.register_fake
def _(
    state: torch.Tensor, rows: int, depth: int, drawn: Any, numbers: tuple[float, ...], device: torch.device, backend: str
) -> Any:
    place = _backend.module(backend).state_device(device)
    kinds = torch.empty(depth, rows, dtype=torch.int32, device=place)
    return kinds, torch.empty(depth, rows, 6, dtype=torch.float64, device=place)


def _op(launch: Callable[..., Any], operator: Callable[..., Any]) -> _dispatch.Op:
    """Returns an op of draws. Under torch.func's transforms nothing is differentiated or mapped over: the launch is made outside of them."""

    def outside(*arguments: Any) -> Any:
        with torch._C._DisableFuncTorch():
            return launch(*map(_plain, arguments))

    return _dispatch.Op(outside, operator, launch, launch)


def _plain(argument: Any) -> Any:
    """Returns an argument's tensors without what torch.func.grad and jvp wrap around those that are made inside of them."""
    if type(argument) is tuple:
        return tuple(map(_plain, argument))
    while isinstance(argument, torch.Tensor) and torch._C._functorch.is_gradtrackingtensor(argument):
        argument = torch._C._functorch.get_unwrapped(argument)
    return argument


_SAMPLE = _op(_launch_sample, _sample_operator)
_DIRICHLET = _op(_launch_dirichlet, _dirichlet_operator)
_NUMBERS = _op(_launch_numbers, _numbers_operator)
_STEPS = _op(_launch_steps, _steps_operator)
_ROW_KEYS = _op(_launch_row_keys, _row_keys_operator)

__all__ = [
    "MOST_ROWS",
    "Node",
    "Plan",
    "Sampled",
    "augmix_steps",
    "cpu",
    "dirichlet",
    "fresh_state",
    "process",
    "row_keys",
    "sample",
    "state",
]


def mirrored(y: torch.Tensor, flip: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
    """Returns label maps whose rows of flip [N] are mirrored along the last dimension, within their extents; other labels as they are."""
    _check.row_flags("flip", flip, y)
    return y if y.dim() < 2 or y.is_floating_point() else _formulas.mirrored(y, flip, sizes)
