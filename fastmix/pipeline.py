"""ImagePipeline: from a loader's bytes to mixed batches and their targets, one batch ahead on a stream of its own."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from . import _check
from ._dtypes import FLOATS
from .hidden import ManifoldMixup
from .sampling import draws
from .sampling.base import Sampler, number_in
from .sampling.mix_images import LAYOUTS, mix_images
from .sampling.plan import Mix
from .sampling.regions import MapSampler

VERSION = 1  # of the states in state_dict()
FLIPS = 2**62  # takes the place of a worker's seed in the key of the flips, which are then no words of the sampler's
_BITS = 53  # of a random word that decide whether a row is mirrored
_EXPECTED = "{version, sampler, flips} of an ImagePipeline"


class _Position(NamedTuple):
    """Where the streams were before a batch was drawn: states of the sampler's modules by name, and the number of the batch."""

    states: dict[str, torch.Tensor]
    flips: int


class _Ahead(NamedTuple):
    """A batch that is ready, or the error in its place; neither at the loader's end. `before`: the streams' position before
    the batch; `loader`: the loader's state after it, None where the loader still has it."""

    batch: Any = None
    error: Exception | None = None
    event: Any = None
    before: _Position | None = None
    loader: Any = None


def _checked_sampler(name: str, value: Any) -> Sampler | None:
    if value is not None and (not isinstance(value, Sampler) or isinstance(value, (ManifoldMixup, MapSampler))):
        expected = "a Mixup, CutMix, RandomMix or another sampler that needs no map of the images, or None"
        raise _check.wrong(TypeError, name, expected, value)
    return value


class ImagePipeline(_check.Checked):
    """Makes mixed batches and their targets of a loader's uint8 images and labels.

        for x, target in pipeline(loader):
            loss = fastmix.soft_cross_entropy(model(x), target)

    Each batch is copied to the device, mirrored, normalised and mixed by `fastmix.mix_images`, and its labels by `Mix.target`: label
    maps are mirrored with their images. On a GPU all that happens on one side stream, a batch ahead of the one that is yielded
    (`pin_memory=True` in the loader lets the copy run beside the step); the stream that asks for a batch waits for it, the host does
    not. On the CPU a batch is made when it is asked for. Batches are the same on every device and without a stream. `pipeline(loader)` may be iterated again and again; it has the
    loader's length, attributes and `set_epoch` (the loader's own, else that of its sampler, batch sampler or dataset). An
    exception of the loader is raised where its batch would have come.

    `eval()` normalises only, and yields labels as they are; `train()` goes back. A sampler in eval mode leaves the flips alone.

    **Checkpoints.** `state_dict()` is that after the last batch yielded, whatever is prepared already. That of `pipeline(loader)`
    holds the loader's state too, where it has `state_dict` and `load_state_dict`: loaded into another `pipeline(loader)` it goes
    on in the middle of an epoch with the same bits, if the sampler has a seed. On a GPU the loader's state is copied at every batch,
    because the next one is fetched already. Leaving a loop early takes the batch that was prepared back. Save and draw through the pipeline, not through the sampler,
    while it is iterated; loops over two training loaders side by side want a pipeline each.

    Args:
        sampler: `Mixup`, `CutMix`, `BetaMask` or `RandomMix`; None: nothing is mixed.
        mean, std: for each channel, as for `fastmix.mix_images`, in units of images in [0, 1].
        flip: the chance of each row to be mirrored.
        dtype, memory_format, layout: as for `fastmix.mix_images`.
        device: where batches are made; None: on the current GPU of CUDA or ROCm where there is one, else on the CPU.
        seed: of the flips, which are drawn by counter as the sampler's numbers are; None: the sampler's seed, or, where it
            has none, torch's generator of the device. Ranks draw their own.

    Raises:
        TypeError, ValueError: a wrong option, also when it is set later; while it is iterated, a batch that is not a pair `(images, labels)` of tensors, and
            what `fastmix.mix_images` and `Mix.target` raise.

    Source: timm's PrefetchLoader, which normalises on a side stream.

    >>> import torch, fastmix
    >>> loader = [(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4)) for _ in range(2)]
    >>> pipeline = fastmix.ImagePipeline(
    ...     fastmix.Mixup(0.2, seed=0), mean=[0.49, 0.48, 0.45], std=[0.25, 0.24, 0.26], device="cpu"
    ... )
    >>> [(x.shape, target.classes.shape) for x, target in pipeline(loader)]
    [(torch.Size([4, 3, 8, 8]), torch.Size([4, 2])), (torch.Size([4, 3, 8, 8]), torch.Size([4, 2]))]
    >>> pipeline.state_dict()["flips"]
    2
    """

    _options = {
        "sampler": _checked_sampler,
        "flip": lambda name, value: number_in(name, value, 0, 1),
        "device": lambda name, value: None if value is None else _check.device(name, value),
        "seed": lambda name, value: None if value is None else _check.integer(name, value, 0, "an int in [0, 2**63) or None"),
        "layout": lambda name, value: _check.one_of(name, value, LAYOUTS, "'NCHW' or 'NHWC'"),
        "training": _check.flag,
    }

    device: Any  # kept as a torch.device or None

    def __init__(
        self,
        sampler: Sampler | None,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        *,
        flip: float = 0.5,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format | None = None,
        device: torch.device | str | int | None = None,
        layout: str = "NCHW",
        seed: int | None = None,
    ) -> None:
        if dtype not in FLOATS:
            raise _check.wrong(TypeError, "dtype", "a floating dtype: float16, bfloat16, float32 or float64", dtype)
        if memory_format is not None and not isinstance(memory_format, torch.memory_format):
            raise _check.wrong(TypeError, "memory_format", "a torch.memory_format or None", memory_format)
        self.sampler, self.flip, self.device, self.seed = sampler, flip, device, seed
        self.layout, self.training = layout, True
        self._numbers: dict[str, Any] = {"mean": mean, "std": std, "dtype": dtype, "memory_format": memory_format}
        self._flips = 0  # batches that flips have been drawn for
        self._before: _Position | None = None  # of a batch that has been drawn, and not yielded yet
        self._side: Any = None  # the stream that batches are made on

    def __repr__(self) -> str:
        return f"ImagePipeline({self.sampler}, flip={self.flip}, device={self.device}, seed={self.seed})"

    def __call__(self, loader: Iterable[Any]) -> "Batches":
        if not isinstance(loader, Iterable):
            raise _check.wrong(TypeError, "loader", "an iterable of (uint8 images, labels)", loader)
        return Batches(self, loader)

    def train(self, mode: bool = True) -> "ImagePipeline":
        """Mixes and mirrors the batches that are prepared from now on; `train(False)` is `eval()`."""
        if not isinstance(mode, bool):
            raise _check.wrong(TypeError, "mode", "a bool", mode)
        self.training = mode
        return self

    def eval(self) -> "ImagePipeline":
        """Only normalises the batches that are prepared from now on."""
        return self.train(False)

    def state_dict(self) -> dict[str, Any]:
        """How far the streams have gone, after the last batch yielded; which ones they are is the seeds'."""
        if self._side is not None:
            self._side.synchronize()
        sampler = {} if self.sampler is None else dict(self.sampler.state_dict())
        flips = self._flips
        if self._before is not None:
            flips = self._before.flips
            for name, state in self._before.states.items():
                sampler[_key(name)] = {**sampler[_key(name)], "batch": int(state[2])}
        return {"version": VERSION, "sampler": sampler, "flips": flips}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the batch that a state was saved at. Not in the middle of a loop over batches."""
        if not isinstance(state, dict) or not state.keys() >= {"version", "sampler", "flips"}:
            raise _check.wrong(TypeError, "state", _EXPECTED, state)
        if state["version"] != VERSION:
            raise _check.wrong(ValueError, "state['version']", VERSION, state["version"])
        flips = _check.integer("state['flips']", state["flips"], 0, "an int of at least 0")
        if self._before is not None:
            raise RuntimeError("ImagePipeline: expected load_state_dict outside of a loop over its batches, got it in one")
        if self.sampler is not None:
            self.sampler.load_state_dict(state["sampler"])
        elif state["sampler"]:
            raise _check.wrong(ValueError, "state['sampler']", "{}, since nothing is mixed", state["sampler"])
        self._flips = flips

    def _place(self) -> torch.device:
        if self.device is None:
            return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda" and self.device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return self.device

    def _side_stream(self, device: torch.device) -> Any:
        """Returns the stream that batches are made on, on a GPU; else None."""
        if device.type != "cuda":
            return None
        if self._side is None or self._side.device != device:
            self._side = torch.cuda.Stream(device)
        return self._side

    def _streams(self) -> list[tuple[str, Sampler]]:
        """Returns (name, sampler) of all that have a random stream of their own."""
        modules = () if self.sampler is None else self.sampler.named_modules()
        return [(name, module) for name, module in modules if isinstance(module, Sampler) and module._state is not None]

    def _position(self) -> _Position:
        return _Position({name: module._state.clone() for name, module in self._streams()}, self._flips)

    def _go_back(self, position: _Position) -> None:
        """Takes back what was drawn after a position."""
        if self._side is not None:
            self._side.synchronize()
        for name, module in self._streams():
            module._begin(int(position.states[name][2]))
        self._flips = position.flips

    def _make(self, images: torch.Tensor, mix: Mix | None = None, flip: torch.Tensor | None = None) -> torch.Tensor:
        return mix_images(images, mix, flip=flip, layout=self.layout, **self._numbers)

    def _made(self, batch: Any, device: torch.device) -> tuple[Any | torch.Tensor, ...]:
        """Returns (mixed images, target) of a loader's batch."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise _check.wrong(TypeError, "loader", "batches (images, labels)", batch)
        for name, value in zip(("images", "labels"), batch, strict=True):
            if not isinstance(value, torch.Tensor):
                raise _check.wrong(TypeError, name, "a tensor", value)
        images, y = (t.to(device, non_blocking=True) for t in batch)
        if not self.training:
            return self._make(images), y
        flip = self._drawn_flips(images)
        if self.sampler is None or not self.sampler.training:
            return self._make(images, flip=flip), y if flip is None else draws.mirrored(y, flip)
        if not images.dim():
            raise _check.wrong(ValueError, "images", "rows [N, ...]", images)
        # boxes are drawn over the last dimensions
        view = images.movedim(-1, 1) if self.layout == "NHWC" and images.dim() > 2 else images
        mix: Mix = self.sampler.sample(view, y)
        return self._make(images, mix, flip=flip), mix.target(y, flip=flip)

    def _drawn_flips(self, images: torch.Tensor) -> torch.Tensor | None:
        """Returns which rows are mirrored, bool [N], or None."""
        number, self._flips = self._flips, self._flips + 1
        if not self.flip or not images.dim():
            return None
        seed, place = self.seed, draws.state_device(images.device)
        if seed is None and self.sampler is not None:
            seed = self.sampler.seed
        if seed is None:
            state = draws.fresh_state(place)
        else:
            state = draws.state(seed, number, (FLIPS, draws.process()[1] or 0))
            state = state if state.device == place else state.to(place, non_blocking=True)
        picks = draws.row_keys(state, images.shape[0], 0, images)[1]
        return (picks >> (63 - _BITS)) < round(self.flip * 2**_BITS)


def _key(name: str) -> str:
    return f"{name}._extra_state" if name else "_extra_state"


class Batches:
    """`pipeline(loader)`: the loader's batches as a pipeline makes them, with the loader's length and attributes."""

    def __init__(self, pipeline: ImagePipeline, loader: Any) -> None:
        self.pipeline, self.loader = pipeline, loader
        self._has_state = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
        self._after: Any = None  # the loader's state after the last batch yielded; None: as it is now

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "loader" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.loader, name)

    def set_epoch(self, epoch: int) -> None:
        """Calls `set_epoch` of the loader, or of its sampler, batch sampler and dataset, where they have it."""
        owners = [self.loader]
        if not hasattr(self.loader, "set_epoch"):
            parts = (getattr(self.loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))
            owners = [part for part in parts if hasattr(part, "set_epoch")]
        if not owners:
            raise AttributeError(
                f"set_epoch: expected a loader, or its sampler or dataset, to have it, got {type(self.loader).__name__}"
            )
        for owner in owners:
            owner.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """That of the pipeline, and the loader's after the last batch yielded, or None where it has none."""
        return {**self.pipeline.state_dict(), "loader": self._loader_state() if self._after is None else self._after}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the batch that a state was saved at, in the middle of an epoch where the state has a loader's."""
        self.pipeline.load_state_dict(state)
        saved = state.get("loader")
        if saved is not None:
            if not self._has_state:
                expected = f"None, since {type(self.loader).__name__} has no load_state_dict"
                raise _check.wrong(TypeError, "state['loader']", expected, saved)
            self.loader.load_state_dict(saved)
        self._after = None

    def _loader_state(self) -> dict[str, int] | None:
        return copy.deepcopy(self.loader.state_dict()) if self._has_state else None

    def __iter__(self) -> Iterator[Any]:
        pipeline, device = self.pipeline, self.pipeline._place()
        side = pipeline._side_stream(device)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(device))  # what the caller did with the sampler before
        given, ahead, before = iter(self.loader), None, None
        outer, drawn = pipeline._before, pipeline._flips  # of a loop that this one is in, such as that around a validation
        try:
            while True:
                now, ahead = ahead or self._prepare(given, device, side), None
                if now.error is not None:
                    raise now.error
                if now.batch is None:
                    self._after = None
                    return
                if side is not None:  # elsewhere nothing runs beside the caller's step
                    ahead = self._prepare(given, device, side)
                elif pipeline.training:
                    before = pipeline._position()
                found = before if ahead is None else ahead.before
                self._after, pipeline._before = now.loader, outer if found is None else found
                if now.event is not None:
                    self._hand_over(now.batch, now.event, device)
                made = [now.batch]
                del now
                yield made.pop()  # nothing here holds the batch while the caller works
        finally:
            if ahead is not None and ahead.before is not None and pipeline._flips == ahead.before.flips + 1:  # left early
                pipeline._go_back(ahead.before)
            pipeline._before = outer if pipeline._flips == drawn else None

    def _prepare(self, given: Any, device: torch.device, side: Any) -> _Ahead:
        """Returns the loader's next batch, copied and mixed on the side stream, as `_Ahead`."""
        try:
            batch = next(given)
        except StopIteration:
            return _Ahead()
        except Exception as error:  # after the batch before it
            return _Ahead(error=error)
        pipeline, before, event = self.pipeline, None, None
        after = None if side is None else self._loader_state()  # the next batch is fetched before anybody can ask for it
        if side is not None:
            _used_by(side, batch, device)
        try:
            with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
                before = pipeline._position() if pipeline.training else None
                made = pipeline._made(batch, device)
                event = None if side is None else side.record_event()
        except Exception as error:
            if before is not None:
                pipeline._go_back(before)
            return _Ahead(error=error)
        return _Ahead(made, None, event, before, after)

    @staticmethod
    def _hand_over(batch: tuple[torch.Tensor, Any], event: Any, device: torch.device) -> None:
        """Lets the caller's stream wait for a batch, and keeps its memory until that stream is done with it."""
        stream = torch.cuda.current_stream(device)
        stream.wait_event(event)
        for t in _pytree.tree_leaves(batch):
            if isinstance(t, torch.Tensor):
                t.record_stream(stream)


def _used_by(side: Any, batch: list[torch.Tensor] | tuple[torch.Tensor, torch.Tensor], device: torch.device) -> None:
    """Lets the side stream wait for tensors that a loader made on the device, and keeps their memory for it."""
    on_device = [t for t in _pytree.tree_leaves(batch) if isinstance(t, torch.Tensor) and t.is_cuda]
    if on_device:
        side.wait_stream(torch.cuda.current_stream(device))
    for t in on_device:
        t.record_stream(side)
