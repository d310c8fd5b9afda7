"""mix_images: x[i] = images[i]*factor[c] + shift[c], mirrored if flip[i]; then mixed as `mix` or `mix_masked` do.

On top the formula as plain differentiable torch operations; below it the launcher, which on the CPU works in blocks of rows: a block
and its partners are normalised and mixed in the cache, and only the result is as large as the batch.
"""

import math

import torch

from . import sizes
from ._blocks import row_blocks
from ._formulas import mirrored, per_row, safe_index
from .mix import box_mask, mix_formula
from .mix_masked import cell_weights, mix_masked_formula, transported


def normalized(images, factor, shift, flip):
    """Returns images*factor + shift in float32, rounded once as `torch.addcmul` does; rows of flip mirrored."""
    like = [1, -1, *[1] * (images.dim() - 2)]
    if flip is not None:
        images = mirrored(images, flip)
    return torch.addcmul(shift.view(like), images.to(torch.float32), factor.view(like))


def mix_images_formula(images, factor, shift, flip, pairing, dtype, channels_last):
    """Returns the mixed batch in this dtype, channels behind the pixels in memory if channels_last."""
    lam, mask, index, box, plan, partner_plan = pairing
    x = normalized(images, factor, shift, flip)
    if index is not None and mask is not None:
        x = mix_masked_formula(x, mask, index, plan, partner_plan)
    elif index is not None:
        x = mix_formula(x, lam, index, box)
    return in_layout(x.to(dtype), channels_last)


def in_layout(x, channels_last):
    """Returns x contiguous, or with its channels behind the pixels in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def mix_images_fwd(images, factor, shift, flip, pairing, dtype, channels_last, out=None):
    """Returns the same, formed in blocks of rows on the CPU."""
    if not images.is_cpu or not images.numel():
        result = mix_images_formula(images, factor, shift, flip, pairing, dtype, channels_last)
        return result if out is None else out.copy_(result)
    lam, mask, index, box, plan, partner_plan = pairing
    N, C, *spatial = images.shape
    if out is None:
        out = torch.empty((N, *spatial, C) if channels_last else (N, C, *spatial), dtype=dtype, device="cpu")
        out = out.movedim(-1, 1) if channels_last else out
    index, in_range = (None, None) if index is None else safe_index(index, N)
    lam = None if lam is None else lam.expand(N)
    for rows in row_blocks(N, images[0].numel() * 4, images.device, sizes.MIX_BLOCK_BYTES):
        own = normalized(images[rows], factor, shift, None if flip is None else flip[rows])
        if index is None:
            out[rows] = own
            continue
        partners = index[rows]
        other = normalized(images.index_select(0, partners), factor, shift, None if flip is None else flip[partners])
        if mask is not None:
            own = transported(own, None if plan is None else plan[rows].long(), mask[rows])
            other = transported(other, None if partner_plan is None else partner_plan[rows].long(), mask[rows])
            weights = cell_weights(mask[rows], own.shape)
        else:
            weights = per_row(lam[rows], own)
        mixed = torch.addcmul(other * (1 - weights), own, weights)
        if box is not None:
            mixed = torch.where(box_mask(box[rows], own.shape), other, mixed)
        out[rows] = mixed.masked_fill_(~per_row(in_range[rows], mixed), math.nan)
    return out
