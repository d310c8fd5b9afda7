"""The random stream of a sampler: its seed, how far it has gone, and what its states hold."""

import functools
import numbers
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .. import _check
from . import draws

VERSION = 1  # of the states in state_dict()
NAMES = (  # their places are numbers in states
    *("Sampler", "Mixup", "CutMix", "BetaMask", "RandomMix", "ManifoldMixup"),
    *("FMix", "SmoothMix", "GridMix", "ResizeMix", "SaliencyMix", "AttentiveCutMix", "AugMix"),
)
STATE = ("version", "sampler", "batch")
_EXPECTED = f"{{{', '.join(STATE)}: int}} of a sampler"


_last_change = object()  # a new one whenever an attribute of any sampler has been set: threads that set some cannot lose one


def last_change(samplers: Iterable["Stream"]) -> object:
    """Returns what stays the same object until an attribute of a sampler is set. A program that was traced cannot note that for all:
    it marks the sampler, and who asks here for these samplers finds the mark."""
    global _last_change
    for sampler in samplers:
        if sampler.__dict__.pop("_set_in_program", False):
            _last_change = object()
    return _last_change


class Stream(nn.Module):
    """The base of whatever draws from a stream of its own: options that are checked whenever they are set, and the state."""

    _state: Any
    _checks: dict[
        str, Any
    ] = {}  # {attribute: check(sampler, value) -> the value to keep}, when it is made and whenever it is set
    _fixed: tuple[str, ...] = ("seed",)  # attributes that are what they were made

    def __init__(self, seed: Any) -> None:
        super().__init__()
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
            raise _check.wrong(TypeError, "seed", "an int or None", seed)
        self.seed = None if seed is None else _check.integer("seed", seed, 0, "an int in [0, 2**63)")
        self._begin(0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in self.__dict__:
            raise AttributeError(
                f"{name}: expected to stay as the {type(self).__name__} was made, got {_check.describe(value)}"
            )
        check = self._checks.get(name)
        super().__setattr__(name, value if check is None else check(self, value))
        if torch.compiler.is_compiling():
            super().__setattr__("_set_in_program", True)  # type: ignore[arg-type]
        else:
            global _last_change
            _last_change = object()  # behind the change: who asks in between finds out the next time

    def _begin(self, batch: int) -> None:
        """Goes to the batch of this number of the sampler's own stream."""
        self._folded = self._process()
        self._state = None if self.seed is None else draws.state(self.seed, batch, self._folded)
        self._rows = batch  # that have been drawn, as far as the host knows: a batch has one at least

    def _process(self) -> Any:
        """Returns (seed of this DataLoader worker or None, rank). A worker knows no rank of its own: it keeps the rank that the
        sampler had in the process that made the worker."""
        worker, rank = draws.process()
        return worker, getattr(self, "_folded", (None, 0))[1] if rank is None else rank

    def get_extra_state(self) -> dict[str, int]:
        """How far the stream has gone: not which one it is, so that each rank goes on along its own from the file of one."""
        if self._state is None:
            return {}
        return dict(zip(STATE, (VERSION, self._number(), int(self._state[2])), strict=True))

    def _number(self) -> int:
        """Returns the place in NAMES of this sampler, or of the one that it is derived from."""
        return next(NAMES.index(kind.__name__) for kind in type(self).__mro__ if kind.__name__ in NAMES)

    def set_extra_state(self, state: dict[str, int]) -> None:
        if not isinstance(state or {}, dict):
            raise _check.wrong(TypeError, "state", _EXPECTED, state)
        if not state:  # of a sampler without a seed
            self._begin(0)
            return
        if all(isinstance(saved, torch.Tensor) for saved in state.values()):  # generators' states by type of device
            _warn_of_old_states()
            self._begin(0)
            return
        version, number = state.get("version"), state.get("sampler")
        if version is None or number is None:
            raise _check.wrong(TypeError, "state", _EXPECTED, state)
        name, own = NAMES[number] if number in range(len(NAMES)) else f"an unknown sampler ({number})", NAMES[self._number()]
        if version != VERSION:
            raise ValueError(f"state: expected version {VERSION} of {own}, got version {version} of {name}")
        if name != own:
            raise ValueError(f"state: expected that of {own}, got that of {name}")
        batch = _check.integer("state['batch']", state.get("batch"), 0, "an int in [0, 2**48]")
        if batch > draws.MOST_ROWS:
            raise _check.wrong(ValueError, "state['batch']", "an int in [0, 2**48]", batch)
        self._begin(batch)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold numbers alone: a tensor's device may not exist in the other process, which gets a tensor's
        memory by reference besides."""
        kept = {name: value for name, value in self.__dict__.items() if name != "_kept"}
        return {**kept, "_state": None if self._state is None else int(self._state[2])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        batch = state["_state"]
        super().__setstate__(
            {**state, "_state": None if batch is None else draws.state(state["seed"], batch, state["_folded"])}
        )

    def _own_state(self, device: torch.device) -> Any:
        """Returns the state of this sampler's stream on a device."""
        if not torch.compiler.is_compiling():
            folded = self._process()
            if folded != self._folded:
                # in a DataLoader's worker the copy starts a stream of its own; a new rank goes on at the same batch
                self._begin(int(self._state[2]) if folded[0] == self._folded[0] else 0)
        if self._state.device != device:
            self._state = self._state.to(device, non_blocking=device.type != "cpu")
        return self._state

    @staticmethod
    def _count_rows(owners: list[Any], rows: int) -> None:
        if torch.compiler.is_compiling():
            return
        for owner in owners:
            if owner._rows + rows > draws.MOST_ROWS:
                raise ValueError(f"x: expected at most 2**48 rows drawn from one seed, got {rows} after {owner._rows}")
        for owner in owners:
            owner.__dict__["_rows"] += rows  # nn.Module's own way of setting an attribute takes microseconds


@functools.cache
def _warn_of_old_states() -> None:
    warnings.warn(
        "fastmix: the samplers' states are those of torch generators, which an older version wrote: their streams start anew",
        UserWarning,
        stacklevel=4,
    )
