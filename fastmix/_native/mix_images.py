"""mix_images in C: mix_images.c. The arguments are those of `fastmix._torch.mix_images`. Masks, other than two spatial dimensions
and float64 are torch's."""

import ctypes

import torch

from .. import _torch
from .library import DTYPES, address, get, new

_Four = ctypes.c_int64 * 4


def mix_images_fwd(images, factor, shift, flip, lam, mask, index, box, plan, partner_plan, dtype, channels_last, out=None):
    """Returns the mixed batch in this dtype, channels behind the pixels in memory if channels_last."""
    mixes = index is not None
    taken = images.is_cpu and images.numel() and images.dim() == 4 and mask is None and dtype != torch.float64
    if not taken or (mixes and lam.dtype != torch.float32) or (out is not None and out.is_neg()):
        rest = lam, mask, index, box, plan, partner_plan, dtype, channels_last, out
        return _torch.mix_images_fwd(images, factor, shift, flip, *rest)
    if out is None:
        N, C, H, W = images.shape
        out = new(torch.empty((N, H, W, C) if channels_last else (N, C, H, W), dtype=dtype))
        out = out.movedim(-1, 1) if channels_last else out
    factor, shift = (t.resolve_neg().contiguous() for t in (factor, shift))
    lam = lam.resolve_neg() if mixes else None
    box = None if box is None else box.to(torch.int64).contiguous()
    get().fm_mix_images(
        DTYPES[dtype], torch.get_num_threads(), _Four(*images.shape), images.data_ptr(), _Four(*images.stride()), factor.data_ptr(),
        shift.data_ptr(), address(flip), 0 if flip is None else flip.stride(0),
        address(lam), lam.stride(0) if mixes and lam.dim() else 0, address(index),
        index.stride(0) if mixes else 0, address(box), out.data_ptr(), _Four(*out.stride()),
    )  # fmt: skip
    return out
