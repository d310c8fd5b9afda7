"""What a Mix does beside its usual ways: with another batch's rows as partners, with volumes, resized label maps and other sizes."""

from typing import Any

import torch

from .. import _check
from .._torch._formulas import weighted_pair
from .._torch.mix import box_mask
from .._torch.mix_masked import cell_weights, transported
from .._torch.resize_mix import nearest_pixels
from ..mixing.convex_combination import convex_combination
from ..mixing.resize_mix import resize_mix
from ..targets import SoftTarget
from .axes import axes_back, axes_last


def mix_pairs(mix: Any, x: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Returns x mixed with the rows of another batch."""
    rows = mix.index.shape[0]
    for name, t in (("x", x), ("partner", partner)):
        _check.float_tensor(name, t, 1, "[N, ...]")
    if partner.shape != x.shape or partner.dtype != x.dtype or x.shape[0] != rows:
        expected = f"{rows} rows of the shape and dtype of x, {list(x.shape)} {x.dtype}"
        raise _check.wrong(ValueError, "partner", expected, partner)
    _check.same_device("partner", partner, x)
    partner = _stored_as(x, partner)
    if mix.mask is not None:
        own, other = (
            transported(x, mix._plan64("plan"), mix.mask),
            transported(partner, mix._plan64("partner_plan"), mix.mask),
        )
        weights = cell_weights(mix.mask, x.shape)
        return weighted_pair(weights, own.to(weights.dtype), other.to(weights.dtype)).to(x.dtype)
    x, partner = (axes_last(name, t, mix.axes) for name, t in (("x", x), ("partner", partner)))
    lam = _check.coefficient("lam", mix.lam, x).expand(rows)
    if mix.box is None:
        # the partner's product is rounded and the row's is added to it, as in fastmix.mix
        return convex_combination((partner, x), torch.stack((1 - lam, lam), 1))
    _check.box("box", mix.box, x)
    mix._sizes = x.shape[x.dim() - mix.box.shape[1] // 2 :] if mix._sizes is None else mix._sizes
    if mix.resize:  # the partners follow the rows, without boxes of their own
        own = torch.arange(rows, device=x.device)
        box = torch.cat((mix.box, torch.zeros_like(mix.box)))
        return resize_mix(torch.cat((x, partner)), torch.cat((own + rows, own)), box.to(torch.int64))[:rows]
    # a weight of 0 in the box: what is not read there has no part in lam's gradient
    weights = torch.where(box_mask(mix.box, x.shape), 0, lam.view(-1, *[1] * (x.dim() - 1)))
    mixed = weighted_pair(weights, x.to(weights.dtype), partner.to(weights.dtype)).to(x.dtype)
    return axes_back(mixed, mix.axes)


def _stored_as(x: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Returns the partner in x's memory format, which is the result's too."""
    for dims, memory_format in ((x.dim(), torch.contiguous_format), (4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=memory_format):
            return partner.contiguous(memory_format=memory_format)
    return partner


def mix_volumes(mix: Any, x: torch.Tensor, partner: Any) -> Any:
    """Returns volumes mixed by a mask [N, D, h, w]: their planes are taken one below another."""
    depth = mix.mask.shape[1]
    _check.float_tensor("x", x, 4, "[N, ..., D, H, W]")
    if x.shape[-3] != depth:
        raise _check.wrong(ValueError, "x", f"volumes of {depth} planes, as the mask has", x)
    if isinstance(partner, torch.Tensor) and partner.dim() >= 4:
        partner = partner.flatten(-3, -2)
    mixed = mix._made(mask=mix.mask.flatten(1, 2)).apply(x.flatten(-3, -2), partner=partner)
    return mixed.unflatten(-2, (depth, x.shape[-2]))


def volume_target(mix: Any, y: torch.Tensor, partner: Any) -> Any:
    """Returns the target of label maps of volumes, which are cut as the volumes are."""
    _, depth, height, _ = y.shape
    if depth != mix.mask.shape[1]:
        raise _check.wrong(ValueError, "y", f"label maps of {mix.mask.shape[1]} planes, as the mask has", y)
    if isinstance(partner, torch.Tensor) and partner.dim() == 4:
        partner = partner.flatten(1, 2)
    found = mix._made(mask=mix.mask.flatten(1, 2)).target(y.flatten(1, 2), partner=partner)
    target = SoftTarget(*(t.unflatten(2, (depth, height)) for t in (found.classes, found.weights)))
    target._mark_sums()
    return target


def resized_labels(box: torch.Tensor | None, partner: Any) -> Any:
    """Returns the partners' label maps [N, H, W], resized into the boxes by nearest pixels."""
    lines, columns = nearest_pixels(box, partner.shape)
    return partner[torch.arange(len(partner), device=partner.device).view(-1, 1, 1), lines, columns]


def mask_mean(mask: torch.Tensor) -> Any:
    """Returns the mean of each row's mask, [N]; 1 for masks without cells."""
    return mask.mean(tuple(range(1, mask.dim()))) if mask[:1].numel() else mask.new_ones(mask.shape[0])


def mask_at(mix: Any, size: Any) -> torch.Tensor:
    """Returns a mask for images of another size: as it is where its cells divide the size, else the mean of what becomes one cell."""
    mask = mix.mask
    cells = tuple(mask.shape[1:])
    if len(size) != 2 or len(cells) != 2 or mix.plan is not None or mix.partner_plan is not None:
        raise _check.wrong(ValueError, "size", "two numbers, and a mask without plans, not of volumes", size)
    if all(new % old == 0 for new, old in zip(size, cells, strict=True)):
        return mask
    if any(old % new for new, old in zip(size, cells, strict=True)):
        raise _check.wrong(ValueError, "size", f"sides that {cells[0]} x {cells[1]} cells divide, or that divide them", size)
    (h, w), rows = size, len(mask)
    return mask.view(rows, h, cells[0] // h, w, cells[1] // w).mean((2, 4))
