"""Mixing in Lightning's Trainer, by a callback:

    trainer = lightning.Trainer(callbacks=[MixCallback(fastmix.Mixup(0.2, seed=0))])

`training_step` then gets the mixed inputs, and a `SoftTarget` in place of the labels; its `F.cross_entropy` takes that as it is.
Works with the packages `lightning` and `pytorch_lightning`; written for 2.6.
"""

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import AttentiveCutMix, ManifoldMixup, SaliencyMix, _check
from ..sampling.base import Sampler

# the one of its two packages that the script uses
_PACKAGE = (
    "pytorch_lightning"
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    else "lightning.pytorch"
)
Callback: Any = importlib.import_module(_PACKAGE).Callback

__all__ = ["MixCallback"]

_HOOK = "on_after_batch_transfer"


def _checked_mixer(name: str, value: Any) -> Any:
    if not isinstance(value, Sampler) or isinstance(value, (ManifoldMixup, SaliencyMix, AttentiveCutMix)):
        raise _check.wrong(TypeError, name, "a sampler of fastmix that needs inputs and labels alone", value)
    return value


def _checked_place(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _check.wrong(TypeError, name, "an index into the batch, or a key", value)
    return value


def _checked_epoch(name: str, value: Any) -> Any:
    return None if value is None else _check.integer(name, value, 0, "None or an int of at least 0")


class MixCallback(_check.Checked, Callback):
    """Mixes training batches on the device, after the hook `on_after_batch_transfer` of the module (or of the data module, where
    that has one). Validation, the sanity check, testing and prediction see batches as they are.

    Args:
        mixer: a sampler, such as `fastmix.Mixup`. Its state is the callback's, so a resumed run draws on where it stopped.
        inputs: where the inputs are in a batch: an index into a list, tuple or namedtuple, or a key.
        labels: where the labels are.
        until_epoch: mixes in epochs before this one; None: in all.

    Raises:
        TypeError, ValueError: a wrong argument, also when it is set later; KeyError, IndexError: a batch without these inputs or labels.

    >>> import fastmix
    >>> from fastmix.compat.lightning import MixCallback
    >>> callback = MixCallback(fastmix.Mixup(0.2, seed=0), inputs="image", labels="label", until_epoch=90)
    """

    _options = {"mixer": _checked_mixer, "inputs": _checked_place, "labels": _checked_place, "until_epoch": _checked_epoch}

    def __init__(self, mixer: Sampler, *, inputs: int | str = 0, labels: int | str = 1, until_epoch: int | None = None) -> None:
        self.mixer = mixer
        self.inputs = inputs
        self.labels = labels
        self.until_epoch = until_epoch
        self._restore: Callable[[], None] | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(inputs=self.inputs, labels=self.labels)

    def state_dict(self) -> dict[str, Any]:
        return self.mixer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mixer.load_state_dict(state_dict)

    def setup(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        """Wraps the hook: a callback's own hooks cannot replace a batch that is a tuple."""
        self._unwrap()
        owner = trainer._data_connector._datahook_selector.get_instance(_HOOK)
        hook = getattr(owner, _HOOK)
        before = owner.__dict__.get(_HOOK)

        # Lightning looks through __wrapped__ to see whether the user has a hook
        @functools.wraps(hook)
        def mixing_hook(batch: Any, dataloader_idx: Any) -> Any:
            batch = hook(batch, dataloader_idx)
            return self._mixed(batch) if self._mixes(trainer) and not hasattr(mixing_hook, "before") else batch

        def restore() -> None:
            """Callbacks end in the order in which they began: what another has wrapped is taken off when that one ends."""
            mixing_hook.before = (before,)  # type: ignore[attr-defined]
            while hasattr(owner.__dict__.get(_HOOK), "before"):
                (inner,) = owner.__dict__.pop(_HOOK).before
                if inner is not None:
                    owner.__dict__[_HOOK] = inner

        owner.__dict__[_HOOK] = mixing_hook
        self._restore = restore

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        self._unwrap()

    def on_exception(self, trainer: Any, pl_module: Any, exception: Any) -> None:
        self._unwrap()

    def _unwrap(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def _mixes(self, trainer: Any) -> Any:
        return trainer.training and (self.until_epoch is None or trainer.current_epoch < self.until_epoch)

    def _mixed(self, batch: Any) -> Any:
        found = [_item(name, batch, place) for name, place in (("inputs", self.inputs), ("labels", self.labels))]
        return _with_items(batch, dict(zip((self.inputs, self.labels), self.mixer(*found), strict=True)))


def _item(name: str, batch: Any, place: Any) -> Any:
    if isinstance(batch, Mapping):
        if place not in batch:
            raise KeyError(f"{name}: expected a key of the batch, one of {list(batch)}, got {place!r}")
    elif isinstance(batch, Sequence):
        if isinstance(place, str) or not -len(batch) <= place < len(batch):
            raise IndexError(f"{name}: expected an index into a batch of {len(batch)} items, got {place!r}")
    else:
        raise _check.wrong(TypeError, "batch", "a list, a tuple or a dict", batch)
    return batch[place]


def _with_items(batch: Any, items: Any) -> Any:
    """Returns a batch of the same type with other items; the batch itself is not written."""
    if not isinstance(batch, tuple):
        batch = copy.copy(batch)
        for place, value in items.items():
            batch[place] = value
        return batch
    values = list(batch)
    for place, value in items.items():
        values[place] = value
    return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
