"""Mix: what one batch needs to be mixed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._dtypes import WEIGHT_DTYPES
from .._torch.mix import box_mask
from .._torch.mix_masked import cell_weights, transported
from ..mixing.mix import mix_checked, mix_known
from ..mixing.mix_masked import mix_masked
from ..mixing.resize_mix import resize_mix
from ..targets import MixedRows, SoftTarget
from . import draws
from . import sizes as sizes_module
from .axes import axes_back, axes_last, box_axes, box_fraction
from .labels import as_rows, check_labels, partner_labels, unchecked_target, union_target
from .pairs import mask_at, mask_mean, mix_pairs, mix_volumes, resized_labels, volume_target


class Mix:
    """How one batch is mixed: made by a sampler, or by hand; apply it to as many tensors of the batch as you like.

    Args:
        lam: float, 0-d or `[N]`: the weight of each row itself (outside its box).
        index: `[N]` int64: each row's partner.
        target_lam: the row's own share in the target, default: `lam`, times the part of the image outside the box (whose size
            the first `apply` tells).
        box: `[N, 2]`, `[N, 4]` or `[N, 6]` int: as in `fastmix.mix`.
        mask: `[N, h, w]` float32 or float64: weights of the row's cells, as in `fastmix.mix_masked`, in place of a box. They do
            what lam does otherwise, which may be None then: both it and `target_lam` are the mask's mean by default.
            `[N, D, h, w]` for volumes of D planes, without plans.
        plan, partner_plan: `[N, h*w]` int64 or int32: where the mask's blocks come from in the row and in its partner, as in
            `fastmix.mix_masked`.
        axes: the dimensions of x that a box is cut in, as many as it has, in its order; by default the last ones. `(3, 4)` for
            clips `[N, T, C, H, W]`, `(1, 2)` for channels last `[N, H, W, C]`, `(1,)` for tokens `[N, L, D]`.
        resize: whether the box `[N, 4]` holds the whole partner, resized, as in `fastmix.resize_mix`; lam is None then.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; a mask and a box; a plan without a mask; lam beside `resize`.

    >>> import torch, fastmix
    >>> m = fastmix.Mix(torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    >>> m.apply(torch.tensor([[0.0], [4.0]])).T
    tensor([[1., 2.]])
    >>> m.target(torch.tensor([7, 9])).weights
    tensor([[0.7500, 0.2500],
            [0.5000, 0.5000]])
    """

    resize = False
    _shape: torch.Size | None = None  # of the mixed batch, once one is known
    _within: sizes_module.Extents | None = None  # the rows' valid extents, where they are mixed within them
    _inverse: torch.Tensor | None = None  # of the partners as a kernel drew them
    _labels: tuple[int, ...] = ()  # how the samplers that this was drawn by label a row, in their codes; () if made by hand
    _drawn_share: Tensor | None = None  # of a single row, whose target_lam is 1 beside itself but not beside another batch

    def __init__(
        self,
        lam: float | Tensor | None,
        index: Tensor,
        target_lam: float | Tensor | None = None,
        box: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        plan: Tensor | None = None,
        partner_plan: Tensor | None = None,
        axes: Sequence[int] | None = None,
        resize: bool = False,
    ) -> None:
        _check.strided("index", index, (torch.int64,), "an int64 tensor [N]")
        if index.dim() != 1:
            raise _check.wrong(TypeError, "index", "an int64 tensor [N]", index)
        rows = index.shape[0]
        if mask is not None:
            _check.strided("mask", mask, WEIGHT_DTYPES, "a float32 or float64 tensor (lower precision would round it)")
            if mask.dim() not in (3, 4) or mask.shape[0] != rows:
                raise _check.wrong(ValueError, "mask", f"shape [{rows}, h, w], or [{rows}, D, h, w] of volumes", mask)
            _check.same_device("mask", mask, index)
            if box is not None:
                raise ValueError("mask: expected None where there is a box (a mask of 0 and 1 cuts boxes too), got both")
        for name, value in (("plan", plan), ("partner_plan", partner_plan)):
            if value is not None and mask is None:
                raise _check.wrong(ValueError, name, "None where there is no mask, whose blocks it moves", value)
            if mask is not None and value is not None and mask.dim() == 4:
                raise ValueError(f"{name}: expected None beside a mask of volumes, got {_check.describe(value)}")
            if mask is not None and value is not None:
                _check.integer_tensor(name, value, (rows, mask.shape[1] * mask.shape[2]), index, narrow=True)
        if resize and lam is not None:
            raise _check.wrong(ValueError, "lam", "None beside resize=True, which mixes no pixels", lam)
        if (mask is None and not resize) or lam is not None:
            _check.row_weight("lam", lam, rows, index)
        if target_lam is not None:
            _check.row_weight("target_lam", target_lam, rows, index)
        if box is not None:
            _check.strided("box", box, (torch.int32, torch.int64), "an int32 or int64 tensor")
            if box.dim() != 2 or box.shape[0] != rows or box.shape[1] not in (2, 4, 6):
                raise _check.wrong(ValueError, "box", f"shape [{rows}, 2], [{rows}, 4] or [{rows}, 6]", box)
            _check.same_device("box", box, index)
        if not isinstance(resize, bool):
            raise _check.wrong(TypeError, "resize", "a bool", resize)
        if resize and (box is None or box.shape[1] != 4 or axes is not None):
            raise _check.wrong(ValueError, "box", f"shape [{rows}, 4], and axes None, beside resize=True", box)
        if axes is not None:
            axes = box_axes(axes)
            if box is None or box.shape[1] != 2 * len(axes):
                raise _check.wrong(ValueError, "axes", "one for each dimension of a box", axes)
        self.axes: Sequence[int] | None = axes
        self.resize = resize
        self._lam: Any = lam
        self.index = index
        self.box: Any = box
        self.mask: Any = mask
        self.plan = plan
        self.partner_plan = partner_plan
        self._target_lam: Any = target_lam
        self._sizes: Any = None
        self._drawn_index: Tensor | None = None  # the partners that a sampler drew, which are known to be rows

    @classmethod
    def _of_sample(cls, found: Any) -> "Mix":
        """Makes the Mix of what a launch has drawn, which needs no checks."""
        made = cls.__new__(cls)
        made._lam, made.index, made._target_lam, made.box, made.mask = found[:5]
        made.plan = made.partner_plan = made._sizes = made.axes = None
        made._drawn_index, made._inverse = found.partner, found.inverse
        return made

    def __repr__(self) -> str:
        made = f"Mix({', '.join(f'{name}={value}' for name, value in self._fields().items() if value is not None)})"
        return made if self._within is None else f"{made}.within({self._within.sizes}, anchor={self._within.anchor!r})"

    def _fields(self) -> dict[str, float | Tensor | None]:
        fields = {"lam": self._lam, "index": self.index, "target_lam": self._target_lam, "box": self.box, "mask": self.mask}
        more = {"plan": self.plan, "partner_plan": self.partner_plan, "axes": self.axes, "resize": self.resize or None}
        return {**fields, **more}

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the partners does not tell whether they were written to
        return {**self.__dict__, "_inverse": None, "_drawn_index": self.index if self._as_drawn() else None}

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "Mix":
        """The same draw on another device: sampled in a DataLoader's worker, applied on a GPU."""
        device = _check.device("device", device)
        return self._map(lambda t: t.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "Mix":
        """The same draw in page-locked memory; DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[..., Any]) -> Any:
        moved = self._made(**{k: change(v) for k, v in self._fields().items() if isinstance(v, Tensor)})
        moved._sizes, moved._shape, moved._labels = self._sizes, self._shape, self._labels
        if self._within is not None:
            moved._within = self._within._replace(sizes=change(self._within.sizes))
        moved._drawn_share = None if self._drawn_share is None else change(self._drawn_share)
        moved._drawn_index = moved.index if self._as_drawn() else None
        return moved

    def _made(self, **changes: Any) -> "Mix":
        """Returns a Mix of the same fields but these."""
        fields = {name: value for name, value in self._fields().items() if value is not None}
        return Mix(**{**fields, "lam": self._lam, **changes})

    def within(self, sizes: Tensor, *, anchor: str = "start", axes: Sequence[int] | None = None) -> "Mix":
        """The same draw for rows of different extents in a padded batch: each is mixed where it and its partner both have values.

            share[i] = 1 - (1 - lam[i]) * overlap[i] / extent[i]        the row's own, in `target_lam` and in targets
            overlap  = prod over d of min(sizes[i, d], sizes[index[i], d]),     extent = prod over d of sizes[i, d]

        Outside the overlap a row keeps its own values, padding too. A box counts with its part in the overlap; a mask with the
        weights there. Samplers' `label="own"` and `"larger"` go by the corrected share, and so does CutMix with
        `correct_lam=False`. Label maps `[N, *S]` are cut as the batch is. `apply` makes the weights [N, *S] and then takes one
        pass over x, by `fastmix.mix_masked`; gradients to x, lam and mask are exact. In `fastmix.mix_hidden` padding masks stay
        each row's own, since its extent does.

        Args:
            sizes: `[N, d]` int64, how much of the last d dimensions of x (or of `axes`) belongs to each row; from 1 on.
            anchor: `"start"`, rows lie over each other from position 0 on; `"center"`, centred: the overlap starts at
                `(sizes[i] - min) // 2` in the row and at `(sizes[index[i]] - min) // 2` in the partner.
            axes: the dimensions of x that sizes are of: `(1,)` for sequences `[N, L, D]`, `(1, 2)` for `[N, H, W, C]`.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device; on the CPU an extent below 1, and in `apply` one beyond x (on a
                GPU its row becomes NaN); sizes of other dimensions than the box or the mask has; plans; labels of several kinds.

        Source: the pixels' share, as timm's NaFlexMixup has it for lists of images and one lam.

        >>> m = Mix(0.5, torch.tensor([1, 0])).within(torch.tensor([[3], [1]]))
        >>> m.apply(torch.tensor([[2.0, 4.0, 6.0], [8.0, 0.0, 0.0]]))
        tensor([[5., 4., 6.],
                [5., 0., 0.]])
        >>> m.target(torch.tensor([7, 9])).weights[:, 0]
        tensor([0.8333, 0.5000])
        """
        made = Mix.__new__(Mix)
        made.__dict__.update(self.__dict__)
        made._within = sizes_module.checked(sizes, anchor, axes, self)
        return made

    def apply(
        self,
        x: Tensor,
        *,
        partner: Tensor | None = None,
        sizes: Tensor | None = None,
        anchor: str = "start",
        axes: Sequence[int] | None = None,
    ) -> Tensor:
        """The mixed batch, `fastmix.mix(x, lam, index, box=box)`, or `fastmix.mix_masked(x, mask, index)` with its plans.

        Args:
            x: `[N, ...]` floating.
            partner: another batch of the shape, dtype and device of x, whose row i is row i's partner in place of `index`. One pass
                over both for a plain lam; boxes and masks take a few.
            sizes, anchor, axes: as for `within`. The Mix keeps them: later calls, and its targets, are those of `within`.
        """
        if sizes is not None:
            made = self.within(sizes, anchor=anchor, axes=axes)
            return sizes_module.keep(self, made, made.apply(x, partner=partner))
        self._shape = x.shape if isinstance(x, Tensor) else self._shape
        if self._within is not None:
            if partner is not None:
                raise _check.wrong(ValueError, "partner", "None beside sizes, which are those of one batch", partner)
            return sizes_module.mix_within(self, x)
        if self.mask is not None and self.mask.dim() == 4:
            return mix_volumes(self, x, partner)
        if partner is not None:
            return mix_pairs(self, x, partner)
        if self.mask is not None:
            return mix_masked(x, self.mask, self.index, plan=self.plan, partner_plan=self.partner_plan)
        if self.box is not None:
            _check.float_tensor("x", x, 1, "[N, ...]")
            x = axes_last("x", x, self.axes)
            _check.box("box", self.box, x)
            self._keep_size("x", x, x.shape[x.dim() - self.box.shape[1] // 2 :])
        if self.resize:
            return resize_mix(x, self.index, self.box)
        return axes_back(mix_known(x, self.lam, self.index, self.box, self._known_inverse()), self.axes)

    def _keep_size(self, argument: str, images: Tensor, size: torch.Size) -> None:
        """Keeps the size of the first images, which the boxes are for; later ones must have it too."""
        if self._sizes not in (None, size):
            raise _check.wrong(ValueError, argument, f"images of size {list(self._sizes)}, which the boxes are for", images)
        self._sizes = size

    def at(self, *size: int) -> "Mix":
        """The same draw at another resolution: for feature maps, heatmaps, or labels of each quarter second of a spectrogram.

            start' = round(start * size'/size),  stop' likewise,  halves up

        The target's shares stay those of the image. A mask becomes one of `size` cells, the mean of those that it covers, where
        it has more; with fewer it stays as it is, since its cells are spread over any size that they divide.

        Args:
            size: of the last dimensions (or of `axes`), as many as the box or the mask has.

        Raises:
            TypeError, ValueError: another number of dimensions; no batch has been mixed yet to tell the boxes' size; a size that
                the mask's cells neither divide nor are divided by; a mask with plans, whose blocks cannot change.

        >>> m = Mix(1.0, torch.tensor([1, 0]), box=torch.tensor([[0, 8, 16, 32], [4, 4, 8, 8]]))
        >>> _ = m.apply(torch.zeros(2, 3, 32, 32))
        >>> m.at(8, 8).box.tolist()
        [[0, 2, 4, 8], [1, 1, 2, 2]]
        """
        size = tuple(_check.integer("size", count, 1, "numbers of at least 1") for count in size)
        if self._within is not None:
            raise _check.wrong(
                ValueError, "size", "no sizes of the rows (at(...) first, then within(sizes) of this size)", size
            )
        fields = {}
        if self.mask is not None:
            fields["mask"] = mask_at(self, size)
        elif self.box is not None:
            dims = self.box.shape[1] // 2
            if len(size) != dims or self._sizes is None:
                raise _check.wrong(ValueError, "size", f"{dims} numbers, and apply(x) first, which tells the boxes' size", size)
            scaled = [
                torch.div(2 * side * new + old, 2 * old, rounding_mode="floor")
                for side, new, old in zip(self.box.unbind(1), (*size, *size), (*self._sizes, *self._sizes), strict=True)
            ]
            fields["box"] = torch.stack(scaled, 1)
        moved = self._made(**fields, target_lam=self.target_lam)
        moved._sizes = None if self.box is None else size
        moved._drawn_share, moved._labels = self._drawn_share, self._labels
        return moved

    def _apply_to_sampled(self, x: Any) -> Tensor:
        """Mixes the batch that this was drawn for, which needs no checks."""
        if self.mask is not None or self.resize:
            return self.apply(x)
        x = axes_last("x", x, self.axes)
        return axes_back(mix_checked(x, self._lam, self.index, self.box, self._known_inverse()), self.axes)

    def _as_drawn(self) -> bool:
        """Whether the partners are known to be those that a sampler drew: neither replaced nor written to, and no traced ones."""
        index = self.index
        return index is self._drawn_index and not _check.transformed() and not index.is_inference() and index._version == 0

    def _known_inverse(self) -> Tensor | None:
        """Returns the inverse of the partners, if a kernel drew it and they are as they were drawn."""
        return self._inverse if self._inverse is not None and self._as_drawn() else None

    @property
    def lam(self) -> Tensor:
        """The row's own share in the batch: as given, or the mean of its mask."""
        if self._lam is not None:
            return self._lam
        like = self.index
        return torch.ones(like.shape, dtype=torch.float32, device=like.device) if self.mask is None else mask_mean(self.mask)

    @property
    def target_lam(self) -> Tensor:
        """The row's own share in the target; within extents, of what was mixed.

        Raises:
            ValueError: there is a box but no target_lam, and no batch has been mixed yet to tell the image's size.
        """
        return self._whole_share() if self._within is None else sizes_module.corrected_share(self)

    def _whole_share(self) -> Tensor:
        if self._target_lam is not None:
            return self._target_lam
        if self.mask is not None:
            return mask_mean(self.mask)
        if self.box is None:
            return self.lam
        if self._sizes is None:
            expected = "a value, or apply(x) first: a box's share depends on the image's size"
            raise _check.wrong(ValueError, "target_lam", expected, None)
        dtype = self.lam.dtype if isinstance(self.lam, Tensor) else torch.float32
        return self.lam * (1 - box_fraction(self.box, self._sizes, dtype))

    def _plan64(self, name: str) -> Any:
        plan = getattr(self, name)
        if plan is not None:
            _check.in_range(name, plan, plan.shape[1], "a block")
        return None if plan is None else plan.to(torch.int64).clamp(0, max(plan.shape[1] - 1, 0))

    def target(
        self, y: Tensor, *, partner: Tensor | None = None, flip: Tensor | None = None
    ) -> SoftTarget | MixedRows | Tensor:
        """The mixed target.

        Class indices `[N]` (or `[N, d1, ...]`) int64 give a `SoftTarget`; float rows `[N, C]` give `MixedRows`. Label maps of
        the image's own dimensions are cut by the box as the image is: a pixel inside it is the partner's alone, one outside has
        `lam`; rows whose box is empty have `target_lam` throughout. Label maps `[N, H, W]` follow a mask and its plans: a
        pixel's share is its cell's; rows whose mask is one number throughout have `target_lam`. Float maps of more than two
        dimensions are images to a box or a mask, not rows: mix those with `apply`. `partner`: labels of the batch that was given to
        `apply`, of the shape and dtype of y. `flip`: bool `[N]` as for `mix_images`: label maps are mirrored as their images are.

        Raises:
            TypeError, ValueError: labels of another kind: maps with a channel `[N, 1, H, W]` or one-hot maps `[N, C, H, W]`, which
                would not be cut as the image is; of other numbers of rows or another device.
        """
        if self._labels == (draws.cpu.UNION,):
            return union_target(self, y, partner, flip)
        rows = self.index.shape[0]
        check_labels(y, rows, self.index)
        y = y if flip is None else draws.mirrored(y, flip, self._within and self._within.sizes)
        if self.mask is not None and not y.is_floating_point() and y.dim() == 4 and self.mask.dim() == 4:
            return volume_target(self, y, partner)
        if y.is_floating_point() and y.dim() > 2 and any(part is not None for part in (self.box, self.mask, self._within)):
            raise _check.wrong(ValueError, "y", "values [N] or rows [N, C] (mix maps of the image with apply(y))", y)
        maps_within = self._within is not None and y.dim() > 1 and not y.is_floating_point()
        if self._within is not None and partner is not None:
            raise _check.wrong(ValueError, "partner", "None beside sizes, which are those of one batch", partner)
        if maps_within:
            sizes_module.check_map(self, y)
        elif y.dim() > 1 and not y.is_floating_point():
            self._check_map(y)
        if self.mask is not None and y.dim() >= 3 and not y.is_floating_point():
            h, w = self.mask.shape[1:]
            if any(side != count and (count == 0 or side % count) for side, count in zip(y.shape[-2:], (h, w), strict=True)):
                raise _check.wrong(ValueError, "y", f"label maps that {h} x {w} cells divide", y)
        if partner is not None:
            check_labels(partner, rows, self.index, "partner")
            if partner.shape != y.shape or partner.dtype != y.dtype:
                raise _check.wrong(ValueError, "partner", f"labels as y, {list(y.shape)} {y.dtype}", partner)
        if y.is_floating_point():
            if partner is not None:
                own = as_rows(self._share(partner), y)
                return MixedRows.of({"values": y, "partner_values": partner, "lam": own})
            return MixedRows(y, self.target_lam, self.index)
        if partner is None and y.dim() == 1 and self._as_drawn():
            own = as_rows(self.target_lam, y)
            if not own.requires_grad:
                return unchecked_target(*draws.soft_target(y, self.index, own))
        share = functools.partial(self._share, partner)
        partner = partner_labels(y, self.index) if partner is None else partner
        if self.resize and y.dim() == 3:
            partner = resized_labels(self.box, partner)
        dims = 0 if self.box is None else self.box.shape[1] // 2
        if dims and y.dim() == 1 + dims:
            if self._sizes is not None and y.shape[1:] != self._sizes:
                raise _check.wrong(ValueError, "y", f"label maps of the images' size {list(self._sizes)}", y)
            own = as_rows(self.lam, y)
            if self._target_lam is not None:
                start, stop = self.box[:, :dims], self.box[:, dims:]
                own = torch.where((start < stop).all(1), own, as_rows(self._target_lam, y))
            own = own.view(-1, *[1] * dims).masked_fill(box_mask(self.box, y.shape), 0)
        elif self.mask is not None and y.dim() >= 3:
            own = self.mask
            if self._target_lam is not None:
                # rows with a constant mask (mixup rows beside masked ones) use target_lam
                constant = (own.flatten(1) == own[:, :1, 0]).all(1) if own[:1].numel() else own.new_ones(rows, dtype=torch.bool)
                own = torch.where(constant[:, None, None], as_rows(self._target_lam, y)[:, None, None], own)
            own = cell_weights(own, y.shape).expand(y.shape)
        elif maps_within:
            own = as_rows(self._whole_share(), y).view(-1, *[1] * (y.dim() - 1))
        else:
            own = as_rows(share(), y)
        if maps_within:
            own, partner = sizes_module.labels_within(self, own, y, partner)
        elif self.mask is not None and y.dim() >= 3:
            y, partner = self._moved(y, "plan"), self._moved(partner, "partner_plan")
        target = SoftTarget(torch.stack((y, partner), 1), torch.stack((own, 1 - own), 1))
        target._mark_sums()
        return target

    def _share(self, partner: Any) -> Tensor:
        """Returns the rows' own share in the target, beside this batch's partners (None) or another's."""
        return self.target_lam if partner is None or self._drawn_share is None else self._drawn_share

    def _check_map(self, y: Tensor) -> None:
        """Checks that integer labels of more than one dimension are a label for each position that was mixed."""
        dims = 2 if self.mask is not None else 0 if self.box is None else self.box.shape[1] // 2
        positions = "[N, ...]" if not dims else f"[N{', side' * dims}]"
        if self.box is not None:
            wrong = y.dim() != 1 + dims
        else:  # rows of a mask may have dimensions of their own before the last two, as clips have
            like = self._shape or ()  # an image of four dimensions or more has a channel, which labels have not
            wrong = (
                y.dim() < 1 + dims
                or len(like) >= 3
                and (y.dim() > len(like) or y.dim() == len(like) and (y.dim() > 3 or y.shape != like))
            )
        if wrong:
            of_images = f", which the images' last {dims} dimensions are cut as" * bool(dims)
            expected = f"class indices [N] or label maps {positions}{of_images} (a channel of 1: y.squeeze(1); one-hot maps: y.argmax(1))"
            raise _check.wrong(ValueError, "y", expected, y)

    def _moved(self, y: Tensor | None, name: str) -> Any:
        """Returns label maps whose blocks are moved by a plan."""
        return transported(y, self._plan64(name), self.mask)
