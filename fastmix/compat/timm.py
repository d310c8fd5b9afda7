"""Stand-ins for timm's mixers, losses and tasks: its names, argument order, defaults and random draws, with the mixing and the
targets of fastmix. One import line, below those of timm, changes a script:

    from fastmix.compat.timm import BinaryCrossEntropy, FastCollateMixup, Mixup, SoftTargetCrossEntropy

Every draw comes from NumPy's global stream, in timm's order, so a seeded run mixes the same rows with the same numbers.

    mode "batch"   one lam, and one box where CutMix is used, for all rows
    mode "pair"    one for each pair of rows (i, N-1-i)
    mode "elem"    one for each row
    mode "half"    the same for the first half of the rows, which is returned (FastCollateMixup alone)

Row i's partner is row N-1-i. Written for timm 1.0.31.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import mixup as _timm_mixup
from torch.utils.data import default_collate

from .. import Mix, SoftTarget, _check, convex_combination
from ._timm_losses import (
    BinaryCrossEntropy,
    ClassificationTask,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    MultiLabelClassificationTask,
    SoftTargetCrossEntropy,
    create_classification_loss,
)

__all__ = [
    "BinaryCrossEntropy",
    "ClassificationTask",
    "FastCollateMixup",
    "JsdCrossEntropy",
    "LabelSmoothingCrossEntropy",
    "Mixup",
    "MultiLabelClassificationTask",
    "SoftTargetCrossEntropy",
    "create_classification_loss",
]


class _Drawn(NamedTuple):
    """How one batch is mixed. `lam`, the weight of a row in the images, and `target_lam`, that in the target, are one float or
    float32 arrays [N]; `box` is None, one box (y0, x0, y1, x1) or an array [N, 4]."""

    lam: float | np.ndarray
    target_lam: float | np.ndarray
    box: tuple[int, ...] | np.ndarray | None = None

    @property
    def mixes(self) -> Any:
        return self.box is not None or bool(np.any(self.lam != 1.0))

    def mix(self, rows: int, device: torch.device) -> Mix:
        """Returns the plan on a device, without waiting for it."""
        box = self.box
        if box is not None:
            box = _to(device, np.asarray(box, dtype=np.int64).reshape(-1, 4)).expand(rows, 4)
        index = torch.arange(rows - 1, -1, -1, device=device)
        return Mix(_to(device, self.lam), index, _to(device, self.target_lam), box)


def _to(device: torch.device, value: Any) -> Any:
    return torch.from_numpy(value).to(device, non_blocking=True) if isinstance(value, np.ndarray) else value


def _fraction(name: str, value: Any) -> Any:
    value = _check.number(name, value)
    if not 0 <= value <= 1:
        raise _check.wrong(ValueError, name, "a float in [0, 1]", value)
    return value


def _sides(name: str, value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, (tuple, list, np.ndarray)) or len(value) != 2:
        raise _check.wrong(ValueError, name, "None or a pair (smallest, largest side) of fractions of the image", value)
    low, high = (_fraction(name, float(side) if isinstance(side, np.floating) else side) for side in value)
    if low >= high:
        raise _check.wrong(ValueError, name, "a pair whose first is less than its second (no side is left)", value)
    return low, high


_OPTIONS = {
    "mixup_alpha": _check.number,
    "cutmix_alpha": _check.number,
    "cutmix_minmax": _sides,
    "mix_prob": _fraction,
    "switch_prob": _fraction,
    "label_smoothing": _fraction,
    "num_classes": lambda name, value: _check.integer(name, value, 1, "an int of at least 1"),
    "correct_lam": _check.flag,
    "multi_label": _check.flag,
    "dense": _check.flag,
}


class _Mixing:
    """The options, the draws and the targets of both mixers."""

    cutmix_minmax: Any
    _modes: tuple[str, ...] = ("batch", "pair", "elem")

    def __init__(
        self,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        multi_label: bool = False,
        *,
        dense: bool = False,
    ) -> None:
        # shared memory: the flag has to reach DataLoader workers that persist
        self._enabled = torch.ones((), dtype=torch.uint8).share_memory_()
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.cutmix_minmax = cutmix_minmax
        _fraction("prob", prob)
        self.mix_prob = prob
        self.switch_prob = switch_prob
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.mode = mode
        self.correct_lam = correct_lam
        self.dense = dense
        self._check_alphas()

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks an option whenever it is set."""
        if name in _OPTIONS:
            value = _OPTIONS[name](name, value)
        elif name == "mode":
            _check.one_of("mode", value, self._modes, " or ".join(map(repr, self._modes)))
        super().__setattr__(name, value)
        if name == "cutmix_minmax" and value is not None:
            self.cutmix_alpha = 1.0

    def __setstate__(self, state: torch.Tensor) -> None:
        self.__dict__.update(state)
        self._enabled.share_memory_()

    def __copy__(self) -> Any:
        return copy.deepcopy(self)

    def __repr__(self) -> Any:
        names = [*_OPTIONS, "mode"]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @property
    def mixup_enabled(self) -> bool:
        """Whether batches are mixed. Setting it reaches the copies of this object in DataLoader workers at once; batches that
        they have made already stay as they are."""
        return bool(self._enabled)

    @mixup_enabled.setter
    def mixup_enabled(self, value: Any) -> None:
        self._enabled.fill_(_check.flag("mixup_enabled", value))

    def _check_alphas(self) -> None:
        if self.mixup_alpha <= 0 and self.cutmix_alpha <= 0:
            raise ValueError(
                "mixup_alpha, cutmix_alpha: expected one that is positive, or cutmix_minmax, "
                f"got {self.mixup_alpha} and {self.cutmix_alpha}"
            )

    def _check_batch(self, name: str, shape: torch.Size) -> None:
        """Checks what has to hold before anything is drawn."""
        self._check_alphas()
        if self.cutmix_alpha <= 0:
            return
        if len(shape) != 4:
            raise ValueError(f"{name}: expected shape [N, C, H, W] where CutMix is drawn, got {list(shape)}")
        for side in shape[-2:] if self.cutmix_minmax is not None else ():
            low, high = (int(side * fraction) for fraction in self.cutmix_minmax)
            if low >= high:
                expected = f"fractions that leave a side of a box in images of {shape[-2]} x {shape[-1]}"
                raise _check.wrong(ValueError, "cutmix_minmax", expected, self.cutmix_minmax)

    def _draw(self, shape: torch.Size, *, box_at_one: Any = False) -> _Drawn:
        """Draws for a batch [N, ...]. `box_at_one`: a box is drawn also where lam is exactly 1, as timm's collate does."""
        rows, sizes = shape[0], shape[-2:]
        if self.mode == "batch":
            lam, cut = self._draw_one()
            if not cut or (lam == 1.0 and not box_at_one):
                return _Drawn(lam, lam)
            box, target_lam = self._draw_box(sizes, lam)
            return _Drawn(1.0, float(target_lam), box)
        lam, cut = self._draw_each(rows if self.mode == "elem" else rows // 2)
        boxes = np.zeros((len(lam), 4), dtype=np.int64)
        for i in np.flatnonzero(cut & (lam != 1)):
            boxes[i], lam[i] = self._draw_box(sizes, lam[i])
        image_lam = np.where(cut, np.float32(1), lam)
        drawn = (self._to_rows(values, rows, fill) for values, fill in ((image_lam, 1), (lam, 1), (boxes, 0)))
        image_lam, lam, boxes = drawn
        return _Drawn(image_lam, lam, boxes if boxes.any() else None)

    def _draw_one(self) -> Any:
        """Returns lam as a float, and whether it is CutMix's."""
        if not self.mixup_enabled or not np.random.rand() < self.mix_prob:
            return 1.0, False
        both = self.mixup_alpha > 0 and self.cutmix_alpha > 0
        cut = bool(np.random.rand() < self.switch_prob) if both else self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        return float(np.random.beta(alpha, alpha)), cut

    def _draw_each(self, count: int) -> Any:
        """Returns lam, float32 [count], and whether each is CutMix's, [count]."""
        if not self.mixup_enabled:
            return np.ones(count, dtype=np.float32), np.zeros(count, dtype=bool)
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            cut = np.random.rand(count) < self.switch_prob
            of_cutmix = np.random.beta(self.cutmix_alpha, self.cutmix_alpha, size=count)
            lam = np.where(cut, of_cutmix, np.random.beta(self.mixup_alpha, self.mixup_alpha, size=count))
        else:
            alpha = max(self.mixup_alpha, self.cutmix_alpha)
            cut = np.full(count, self.cutmix_alpha > 0)
            lam = np.random.beta(alpha, alpha, size=count)
        mixed = np.random.rand(count) < self.mix_prob
        return np.where(mixed, lam.astype(np.float32), np.float32(1)), cut

    def _draw_box(self, sizes: Any, lam: torch.Tensor) -> Any:
        """Returns a box and the image's part outside of it (or lam, without `correct_lam`)."""
        height, width = sizes
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax
            box_height = np.random.randint(int(height * low), int(height * high))
            box_width = np.random.randint(int(width * low), int(width * high))
            y0 = np.random.randint(0, height - box_height + 1)
            x0 = np.random.randint(0, width - box_width + 1)
            box = (y0, x0, y0 + box_height, x0 + box_width)
        else:
            side = np.sqrt(1 - lam)  # of lam's own precision, so that a side is cut to the same int as timm's
            box_height, box_width = int(height * side), int(width * side)
            y, x = np.random.randint(0, height), np.random.randint(0, width)
            start = max(y - box_height // 2, 0), max(x - box_width // 2, 0)
            box = (*start, min(y + (box_height + 1) // 2, height), min(x + (box_width + 1) // 2, width))
        if self.correct_lam or self.cutmix_minmax is not None:
            lam = 1 - (box[2] - box[0]) * (box[3] - box[1]) / (height * width)
        return box, lam

    def _to_rows(self, values: Any, rows: int, fill: Any) -> Any:
        """Returns the values of all rows: pairs are mirrored, and rows that draw nothing have `fill`."""
        if self.mode == "elem":
            return values
        rest = np.full((rows - len(values) * (2 if self.mode == "pair" else 1), *values.shape[1:]), fill, dtype=values.dtype)
        return np.concatenate((values, rest, values[::-1])) if self.mode == "pair" else np.concatenate((values, rest))

    def _checked_target(self, target: torch.Tensor, rows: int) -> Any:
        """Returns class indices [N] int64, or smoothed rows [N, C] float32."""
        if not isinstance(target, torch.Tensor):
            raise _check.wrong(TypeError, "target", "a tensor of class indices [N] or multi-hot rows [N, C]", target)
        if self.multi_label:
            if tuple(target.shape) != (rows, self.num_classes):
                raise _check.wrong(ValueError, "target", f"multi-hot rows of shape [{rows}, {self.num_classes}]", target)
            _check.multi_hot("target", target)
            e = self.label_smoothing
            return target.float() * (1 - e) + 0.5 * e if e else target.float()
        if target.is_floating_point() or target.is_complex():
            raise _check.wrong(TypeError, "target", "integer class indices [N] (multi_label=True takes rows)", target)
        if tuple(target.shape) not in ((rows,), (rows, 1)):
            raise _check.wrong(ValueError, "target", f"class indices of shape [{rows}] (multi_label=True takes rows)", target)
        target = target.reshape(-1).long()
        _check.in_range("target", target, self.num_classes, "a class")
        return target

    def _mixed_target(self, mix: Mix, target: torch.Tensor) -> Any:
        mixed = mix.target(target)
        if isinstance(mixed, SoftTarget):
            mixed.label_smoothing, mixed.num_classes = self.label_smoothing, self.num_classes
        return mixed


class Mixup(_Mixing, _timm_mixup.Mixup):
    """timm's `Mixup`: mixup and CutMix for a batch, a pair or a row at a time.

    A call `mixup(x, target)` returns the mixed images and their target. Each mode mixes in one launch of `fastmix.mix`.

    Args:
        mixup_alpha: mixup's lam ~ Beta(mixup_alpha, mixup_alpha); not positive: no mixup.
        cutmix_alpha: the same of CutMix.
        cutmix_minmax: smallest and largest side of a box, as fractions of the image; in place of `cutmix_alpha`.
        prob: how often a batch, pair or row is mixed.
        switch_prob: how often with CutMix, where both are on.
        mode: "batch", "pair" or "elem".
        correct_lam: whether the target's lam is the image's part outside the box, which the border may have cut off.
        label_smoothing: e; a class has `(1-e)*t + e/C`, a label of a multi-label row `(1-e)*t + e/2`.
        num_classes: C.
        multi_label: targets are multi-hot rows `[N, C]`.
        dense: returns timm's float32 rows `[N, C]` in place of a `SoftTarget` or `MixedRows`.

    A call takes:
        x: `[N, ...]` floating (`[N, C, H, W]` for CutMix), any N; not written.
        target: `[N]` of any integer dtype, or rows `[N, C]`.

    Raises:
        TypeError, ValueError: a wrong option, also when it is set later; uint8 images (those are for `FastCollateMixup`); on the
            CPU a label beyond `num_classes`, or integer rows that hold other numbers than 0 and 1.

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899.

    >>> import numpy as np, torch
    >>> from fastmix.compat.timm import Mixup
    >>> np.random.seed(0)
    >>> x, target = Mixup(0.2, label_smoothing=0.1, num_classes=3)(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 2]))
    >>> target.dense().sum(1), target.num_classes
    (tensor([1., 1.]), 3)
    """

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> Any:
        if isinstance(x, torch.Tensor) and x.dtype == torch.uint8:
            raise _check.wrong(TypeError, "x", "floating images (FastCollateMixup mixes uint8 ones)", x)
        _check.float_tensor("x", x, 1, "[N, ...]")
        self._check_batch("x", x.shape)
        target = self._checked_target(target, len(x))
        drawn = self._draw(x.shape)
        mix = drawn.mix(len(x), x.device)
        mixed = self._mixed_target(mix, target)
        return mix.apply(x) if drawn.mixes else x, mixed.dense() if self.dense else mixed


class FastCollateMixup(_Mixing, _timm_mixup.FastCollateMixup):
    """timm's `FastCollateMixup`: a collate function that mixes uint8 images in the loader's workers.

    A call `collate(samples)` returns the mixed images `[N, C, H, W]` uint8, mixed in float32 and rounded half to even, and their
    target. Options as of `Mixup`; `mode` may be "half" too, which returns the first half of the rows, mixed with the second. The
    samples are not written. Of an odd number the middle row is its own partner.

    Args:
        samples: a list of `(image, target)`: images `[C, H, W]` uint8, arrays or tensors.

    Raises:
        TypeError, ValueError: as of `Mixup`; images that are not uint8.

    >>> import numpy as np
    >>> from fastmix.compat.timm import FastCollateMixup
    >>> np.random.seed(0)
    >>> samples = [(np.full((3, 2, 2), value, dtype=np.uint8), label) for label, value in enumerate((0, 100))]
    >>> images, target = FastCollateMixup(mixup_alpha=1.0, num_classes=2)(samples)
    >>> images.dtype, (images[0] + images[1])[0, 0, 0], target.classes
    (torch.uint8, tensor(100, dtype=torch.uint8), tensor([[0, 1],
            [1, 0]]))
    """

    _modes = ("batch", "pair", "elem", "half")

    def __call__(self, batch: Any, _: Any = None) -> Any:
        images = _stacked([sample[0] for sample in batch])
        self._check_batch("images", images.shape)
        target = self._checked_target(default_collate([sample[1] for sample in batch]), len(images))
        drawn = self._draw(images.shape, box_at_one=True)
        rows = (len(images) + 1) // 2 if self.mode == "half" else len(images)
        mixed = self._mixed_target(drawn.mix(len(images), images.device), target)
        mixed = mixed if rows == len(images) else mixed[:rows]
        return _mixed_bytes(images, drawn, rows) if drawn.mixes else images[:rows], mixed.dense() if self.dense else mixed


def _stacked(images: Any) -> Any:
    """Returns images as one uint8 tensor [N, C, H, W]."""
    if not images:
        raise _check.wrong(ValueError, "batch", "at least one sample", images)
    for image in images:
        if not isinstance(image, (np.ndarray, torch.Tensor)) or image.dtype not in (np.uint8, torch.uint8):
            raise _check.wrong(
                TypeError, "batch", "samples with uint8 images, as arrays or tensors (Mixup mixes others)", image
            )
        if image.shape != images[0].shape:
            raise _check.wrong(ValueError, "batch", f"images of one shape, {list(images[0].shape)}", image)
    if all(isinstance(image, np.ndarray) for image in images):
        return torch.from_numpy(np.stack(images))
    return torch.stack([torch.as_tensor(image) for image in images])


# rows mixed at a time, which stay in a core's cache: a third of the time of all rows at once (64 images of 3 x 224 x 224)
_BLOCK = 8


def _mixed_bytes(images: torch.Tensor, drawn: Any, rows: int) -> Any:
    """Mixes uint8 images in float32, by blocks of rows; boxes are copied as bytes."""
    count = len(images)
    lam = torch.from_numpy(np.broadcast_to(np.asarray(drawn.lam, dtype=np.float32), (count,)).copy())
    weights = torch.stack((lam, 1 - lam), 1)
    mixed = torch.empty_like(images[:rows])
    for start in range(0, rows, _BLOCK):
        block = slice(start, min(start + _BLOCK, rows))
        own = images[block]
        if bool((lam[block] != 1).any()):
            partners = images[count - block.stop : count - start].flip(0)
            own = convex_combination((own.float(), partners.float()), weights[block]).round_()
        mixed[block] = own
    if drawn.box is not None:
        boxes = np.broadcast_to(np.asarray(drawn.box), (count, 4))[:rows]
        for i, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
            mixed[i, :, y0:y1, x0:x1] = images[count - 1 - i, :, y0:y1, x0:x1]
    return mixed
