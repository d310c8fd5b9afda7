"""mix_images in C: mix_images.c. The arguments are those of `fastmix._torch.mix_images`. Other than two spatial dimensions and float64
are torch's."""

import ctypes

import torch

from .. import _torch
from .library import DTYPES, address, get, new

_Two, _Four = ctypes.c_int64 * 2, ctypes.c_int64 * 4


def mix_images_fwd(images, factor, shift, flip, pairing, dtype, channels_last, out=None):
    """Returns the mixed batch in this dtype, channels behind the pixels in memory if channels_last."""
    lam, mask, index, box, plan, partner_plan = pairing
    share = lam if mask is None else mask
    taken = images.is_cpu and images.numel() and images.dim() == 4 and dtype != torch.float64
    if not taken or (share is not None and share.dtype != torch.float32) or (out is not None and out.is_neg()):
        return _torch.mix_images_fwd(images, factor, shift, flip, pairing, dtype, channels_last, out)
    if out is None:
        N, C, H, W = images.shape
        out = new(torch.empty((N, H, W, C) if channels_last else (N, C, H, W), dtype=dtype, device="cpu"))
        out = out.movedim(-1, 1) if channels_last else out
    factor, shift = (t.resolve_neg().contiguous() for t in (factor, shift))
    lam = None if lam is None or mask is not None else lam.resolve_neg()
    mask = None if mask is None else mask.resolve_neg().contiguous()
    box, plan, partner_plan = (None if t is None else t.to(torch.int64).contiguous() for t in (box, plan, partner_plan))
    get().fm_mix_images(
        DTYPES[dtype], torch.get_num_threads(), _Four(*images.shape), images.data_ptr(), _Four(*images.stride()), factor.data_ptr(),
        shift.data_ptr(), address(flip), 0 if flip is None else flip.stride(0),
        address(lam), lam.stride(0) if lam is not None and lam.dim() else 0, address(index), 0 if index is None else index.stride(0),
        address(box), address(mask), None if mask is None else _Two(*mask.shape[1:]), address(plan), address(partner_plan),
        out.data_ptr(), _Four(*out.stride()),
    )  # fmt: skip
    return out
