"""Rows of different extents: a padded batch is mixed where a row and its partner both have values.

    overlap[i]  = prod over d of min(sizes[i, d], sizes[j, d]),   extent[i] = prod over d of sizes[i, d]        j = index[i]
    out[i, p]   = m*x[i, p] + (1-m)*x[j, p - shift[i]]     in the overlap: m is lam, 0 inside the box, or the mask's value
    out[i, p]   = x[i, p]                                  everywhere else, padding too
    share[i]    = 1 - (sum of 1-m over the overlap) / extent[i]

The weights m, 1 outside the overlap, are a mask of one cell for each position, and the shifts a plan of the partner's
positions: `mix_masked` does the rest in one pass over x, with its gradients. Making both takes a few small passes over [N,
positions], without the channels.
"""

import math
from typing import Any, NamedTuple

import torch

from .. import _check
from .._torch._formulas import safe_index
from .._torch.mix import box_mask
from .._torch.mix_masked import cell_weights
from ..mixing.mix_masked import mix_masked
from .axes import axes_back, axes_last, box_axes
from .draws import cpu

ANCHORS = "start", "center"
ROUNDS = 30  # squarings of a covariance, whose direction of most variance is then all that is left


class Extents(NamedTuple):
    """The valid extents [N, d] of the rows, where two of them lie over each other, and the dimensions that they are of."""

    sizes: torch.Tensor
    anchor: str
    axes: tuple[int, ...] | None


def checked(sizes: torch.Tensor, anchor: str, axes: Any, mix: Any) -> Extents:
    """Checks extents for a Mix, and returns them."""
    rows, d = mix.index.shape[0], sizes_dims(sizes, mix.index.shape[0])
    _check.same_device("sizes", sizes, mix.index)
    if anchor not in ANCHORS:
        raise _check.wrong(ValueError, "anchor", "'start' or 'center'", anchor)
    _check_values(sizes)
    axes = mix.axes if axes is None else box_axes(axes)
    if axes is not None and len(axes) != d:
        raise _check.wrong(ValueError, "axes", f"{d}, one for each number in a row of sizes", axes)
    if mix.box is not None and (mix.box.shape[1] != 2 * d or axes != mix.axes):
        of = "the last dimensions" if mix.axes is None else f"the dimensions {list(mix.axes)}"
        raise _check.wrong(ValueError, "sizes", f"shape [{rows}, {mix.box.shape[1] // 2}], of {of}, as the box is", sizes)
    if mix.mask is not None and (d != 2 or axes is not None):
        raise _check.wrong(ValueError, "sizes", f"shape [{rows}, 2], of the last dimensions, as the mask is", sizes)
    if mix.resize or (mix.mask is not None and mix.mask.dim() != 3):
        kind = "a resized partner" if mix.resize else "a mask of volumes"
        raise _check.wrong(ValueError, "sizes", f"None beside {kind}", sizes)
    if mix.plan is not None or mix.partner_plan is not None:
        raise _check.wrong(ValueError, "sizes", "None beside plans, which move blocks of the whole image", sizes)
    if len(mix._labels) > 1:
        raise ValueError(
            "sizes: expected a Mix of samplers with one kind of label, got several, which are corrected differently"
        )
    if not mix._labels and mix._target_lam is not None and (mix.box is not None or mix.mask is not None):
        raise _check.wrong(
            ValueError, "sizes", "None beside a box or mask with a target_lam of its own: its correction is not known", sizes
        )
    return Extents(sizes, anchor, axes)


def keep(mix: Any, made: Any, mixed: torch.Tensor) -> torch.Tensor:
    """Returns a batch that was mixed by `made`, a Mix within extents, and keeps these in the Mix that it was made of."""
    mix._within, mix._shape, mix._sizes = made._within, made._shape, made._sizes
    return mixed


def sizes_dims(sizes: torch.Tensor, rows: int | None = None) -> int:
    """Checks for an int64 tensor [N, d], and returns d."""
    _check.strided("sizes", sizes, (torch.int64,), "an int64 tensor [N, d]")
    if sizes.dim() != 2 or not 1 <= sizes.shape[1] <= 3 or rows not in (None, sizes.shape[0]):
        raise _check.wrong(ValueError, "sizes", f"shape [{'N' if rows is None else rows}, d] with d from 1 to 3", sizes)
    return sizes.shape[1]


def _check_values(sizes: torch.Tensor, most: Any = None) -> None:
    """Checks that all extents are at least 1 and within a tensor's dimensions, where the host may read them."""
    if not _check.readable(sizes):
        return
    for d, extents in enumerate(sizes.unbind(1)):
        wrong = extents < 1
        limit = "at least 1"
        if most is not None:
            wrong, limit = wrong | (extents > most[d]), f"from 1 to {most[d]}, the batch's own"
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"sizes: expected extents of {limit}, got {int(extents[row])} in row {row}, dimension {d}")


class _Overlap(NamedTuple):
    """For each row and dimension [N, d]: where the overlap begins and ends in the row, and how much further on than in the
    partner it is. Of a row whose extents are not positive, `valid` [N] is False."""

    start: torch.Tensor
    stop: torch.Tensor
    shift: torch.Tensor
    valid: torch.Tensor


def _overlap(mix: Any) -> _Overlap:
    extents, index = mix._within, mix.index
    _check.in_range("index", index, index.shape[0], "a partner")
    own = extents.sizes
    partner = own[safe_index(index, index.shape[0])[0]] if index.shape[0] else own
    both = torch.minimum(own, partner)
    valid = (both >= 1).all(1)
    if extents.anchor == "start":
        start = shift = torch.zeros_like(own)
    else:
        start = torch.div(own - both, 2, rounding_mode="floor")
        shift = start - torch.div(partner - both, 2, rounding_mode="floor")
    return _Overlap(start, start + both, shift, valid)


def _inside(overlap: _Overlap, shape: Any) -> torch.Tensor:
    """Returns which positions of the last dimensions of `shape` [N, ..., *S] lie in the overlap: bools [N, *S]."""
    d = overlap.start.shape[1]
    return box_mask(torch.cat((overlap.start, overlap.stop), 1), (shape[0], *shape[len(shape) - d :]))


def _weights(mix: Any, overlap: _Overlap, lam: torch.Tensor, size: tuple[int]) -> torch.Tensor:
    """Returns the row's own weight at each position [N, *size]: 1 outside the overlap, NaN in rows of wrong extents."""
    shape = (mix.index.shape[0], *size)
    inside, one = _inside(overlap, shape), torch.ones((), dtype=lam.dtype, device=lam.device)
    if mix.mask is not None:
        own = cell_weights(lam, shape)
    else:
        own = lam.reshape(-1, *[1] * len(size))
        if mix.box is not None:
            own = own.masked_fill(box_mask(mix.box, shape), 0)
    limits = [mix._within.sizes[:, d] <= most for d, most in enumerate(size)]
    valid = overlap.valid & torch.stack(limits, 1).all(1)
    return torch.where(inside, own, one).masked_fill(~valid.view(-1, *[1] * len(size)), math.nan)


def _partner_positions(overlap: _Overlap, size: Any) -> Any:
    """Returns the position in the partner of each position of a row, [N, prod(size)]: itself outside the overlap."""
    rows, d = overlap.start.shape
    found = torch.zeros((), dtype=torch.int64, device=overlap.start.device)
    for k, count in enumerate(size):
        position = torch.arange(count, device=overlap.start.device)
        inside = (position >= overlap.start[:, k, None]) & (position < overlap.stop[:, k, None])
        moved = torch.where(inside, position - overlap.shift[:, k, None], position).clamp(0, max(count - 1, 0))
        found = found * count + moved.view(rows, *[count if j == k else 1 for j in range(d)])
    return found.reshape(rows, math.prod(size))


def mix_within(mix: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns x mixed within the extents of the Mix's rows."""
    _check.float_tensor("x", x, 1, "[N, ...]")
    extents, rows, d = mix._within, mix.index.shape[0], mix._within.sizes.shape[1]
    if x.shape[0] != rows or x.dim() <= d:
        raise _check.wrong(ValueError, "x", f"{rows} rows of {d} dimensions or more, as sizes", x)
    _check.same_device("x", x, mix.index)
    size, cells, view, back = _as_cells(x, extents.axes, d)
    mask, plan = as_mask(mix, x, size)
    return back(mix_masked(view, mask.reshape(rows, *cells), mix.index, partner_plan=plan))


def as_mask(mix: Any, x: torch.Tensor, size: Any) -> tuple[torch.Tensor, None]:
    """Returns (mask [N, *size] with a cell for each position, plan of the partner's positions [N, prod(size)] or None)."""
    _check_values(mix._within.sizes, size)
    overlap = _overlap(mix)
    lam = _check.coefficient("lam", mix.lam, x) if mix.mask is None else _check.cell_mask("mask", mix.mask, x)
    if mix.box is not None:
        mix._keep_size("x", x, size)
    return _weights(mix, overlap, lam, size), None if mix._within.anchor == "start" else _partner_positions(overlap, size)


def _as_cells(x: torch.Tensor, axes: Any, d: int) -> Any:
    """Returns (sizes of the dimensions that the extents are of; the mask's cells (h, w); x as the mask lies over it, a view
    where that is possible; what leads back from such a batch)."""
    last = axes_last("x", x, axes)
    size = tuple(last.shape[last.dim() - d :])
    places = [] if axes is None else [axis % x.dim() for axis in axes]
    if places and places[-1] + 1 < x.dim() and places == list(range(places[0], places[0] + d)) and x.is_contiguous():
        # neighbours, with other dimensions behind them: a cell is one position with all that it has
        cells = math.prod(size), 1
        view = x.reshape(*x.shape[: places[0]], cells[0], math.prod(x.shape[places[-1] + 1 :]))
        return size, cells, view, lambda mixed: mixed.reshape(x.shape)
    if d == 1:
        view = last.unsqueeze(1) if last.dim() == 2 else last
        return size, (1, *size), view, lambda mixed: axes_back(mixed.reshape(last.shape), axes)
    if d == 2:
        return size, size, last, lambda mixed: axes_back(mixed, axes)
    cells = size[0] * size[1], size[2]
    return size, cells, last.flatten(-3, -2), lambda mixed: axes_back(mixed.reshape(last.shape), axes)


def corrected_share(mix: Any) -> torch.Tensor:
    """Returns the rows' own share of what was mixed within their extents, [N]."""
    overlap, sizes = _overlap(mix), mix._within.sizes
    if mix._drawn_share is not None:  # a single row, which meets nobody else
        return torch.ones_like(mix._drawn_share)
    proportional = mix._target_lam is None or bool(mix._labels)
    lam = mix.lam if proportional else mix._target_lam
    like = torch.zeros(mix.index.shape[0], dtype=getattr(lam, "dtype", torch.float32), device=mix.index.device)
    lam = _check.coefficient("lam", lam, like)
    extent = sizes.prod(1)
    both = (overlap.stop - overlap.start).prod(1)
    rest = 1 - both.to(lam.dtype) / extent
    if mix.mask is not None:
        if mix._shape is None:
            raise _check.wrong(ValueError, "target_lam", "apply(x) first: a mask's cells depend on the image's size", None)
        shape = (*both.shape, *mix._shape[-2:])
        kept = torch.where(_inside(overlap, shape), cell_weights(mix.mask, shape), 0).flatten(1).sum(1) / extent
        share = kept.to(lam.dtype) + rest
    else:
        if mix.box is not None:
            start, stop = mix.box.chunk(2, 1)
            cut = (torch.minimum(stop, overlap.stop) - torch.maximum(start, overlap.start)).clamp(min=0).prod(1)
            both = both - cut
        share = lam * (both.to(lam.dtype) / extent) + rest
    share = share.masked_fill(~overlap.valid, math.nan)
    if mix._labels == (cpu.LARGER,):
        return (share >= 0.5).to(share.dtype)
    return torch.ones_like(share) if mix._labels == (cpu.OWN,) else share


def check_map(mix: Any, y: torch.Tensor) -> None:
    """Checks that integer labels are a label for each position that the sizes are of."""
    d = mix._within.sizes.shape[1]
    if y.dim() != 1 + d:
        raise _check.wrong(ValueError, "y", f"class indices [N] or label maps [N{', side' * d}], as the sizes are", y)
    _check_values(mix._within.sizes, y.shape[1:])


def labels_within(mix: Any, own: torch.Tensor, y: torch.Tensor, partner: Any) -> Any:
    """Returns (own weight, partner's label) of each position of label maps y [N, *S], from the weights inside the overlap and
    the partners' maps."""
    overlap = _overlap(mix)
    one = torch.ones((), dtype=own.dtype, device=own.device)
    own = torch.where(_inside(overlap, y.shape), own, one)
    if mix._within.anchor == "center":
        partner = partner.flatten(1).gather(1, _partner_positions(overlap, y.shape[1:])).view(y.shape)
    return own, partner


def pair_by_size(sizes: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Partners of like extent, so that little of a row stays outside the overlap with its partner.

    The rows are sorted, ties in random order, and neighbours are paired: by length for d = 1; else along the two directions in which
    the logarithms of the extents vary most, in strips along the first. (Of images of one area that is the aspect ratio alone.)
    Nothing waits for the device.

    Args:
        sizes: `[N, d]` int64, the valid extents of the rows, d from 1 to 3.
        generator: orders the ties, on the device of sizes; that device's default generator where None.

    Returns:
        `[N]` int64, a permutation: cycles of two, and one of three where N is odd. No row meets itself unless N = 1.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; on the CPU also an extent below 1.

    Source: timm's NaFlexMixup pairs neighbours in aspect ratio, on lists on the CPU.

    >>> import torch, fastmix
    >>> fastmix.pair_by_size(torch.tensor([[10], [3], [11], [4]]))
    tensor([2, 3, 0, 1])
    """
    sizes_dims(sizes)
    _check_values(sizes)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise _check.wrong(TypeError, "generator", "a torch.Generator", generator)
        if generator.device.type != sizes.device.type:
            raise ValueError(f"generator: expected one on {sizes.device}, as sizes, got one on {generator.device}")
    rows = sizes.shape[0]
    shuffled = torch.rand(rows, device=sizes.device, generator=generator).argsort(stable=True)
    order = shuffled[_by_extent(sizes[shuffled])]
    place = torch.arange(rows, device=sizes.device)
    pairs = max(rows - 3 * (rows % 2), 0)
    after = torch.where(place + 1 < rows, place + 1, pairs)
    at = torch.where(place < pairs, place ^ 1, after)
    return torch.empty_like(order).scatter_(0, order, order[at])


def _by_extent(sizes: torch.Tensor) -> torch.Tensor:
    """Returns an order of the rows in which extents that are alike are near each other."""
    if sizes.shape[1] == 1:
        return sizes[:, 0].argsort(stable=True)
    rows = sizes.shape[0]
    logs = sizes.clamp(min=1).to(torch.float32).log()
    logs = logs - logs.mean(0)
    first = _along(logs)
    logs = logs - first
    second = _along(logs)
    first, second = (values.gather(1, values.abs().sum(0).argmax().expand(rows, 1)).squeeze(1) for values in (first, second))
    spreads = [values.square().mean().sqrt() for values in (first, second)]
    # strips as wide as neighbours in a strip are apart: as many as rows where nothing varies along the second direction
    strips = (rows * spreads[0] / spreads[1].clamp(min=1e-6)).sqrt().clamp(1, max(rows, 1))
    order = first.argsort(stable=True)
    strip = (torch.arange(rows, device=sizes.device) * strips / max(rows, 1)).floor()
    order = order[torch.where(strip % 2 == 0, second[order], -second[order]).argsort(stable=True)]
    strip = torch.empty_like(strip).scatter_(0, first.argsort(stable=True), strip)
    return order[strip[order].argsort(stable=True)]


def _along(logs: Any) -> Any:
    """Returns the projections of centred rows [N, d] onto the direction in which they vary most, as vectors [N, d]."""
    # sums of products are written out: a matrix product may be rounded differently for equal rows
    spread = (logs.unsqueeze(2) * logs.unsqueeze(1)).sum(0)
    for _ in range(ROUNDS):
        spread = spread / spread.diagonal().sum().clamp(min=1e-30)
        spread = (spread.unsqueeze(2) * spread.unsqueeze(0)).sum(1)
    direction = spread[:, spread.diagonal().argmax().reshape(1)].view(1, -1)
    direction = direction / direction.square().sum().sqrt().clamp(min=1e-30)
    return (logs * direction).sum(1, keepdim=True) * direction
