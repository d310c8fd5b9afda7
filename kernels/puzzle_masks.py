"""From the labels of PuzzleMix's cut to masks, shares, and what transport reads: the kernel and its launcher.

    mask = 1 - label / K, K = L-1;  of a row of lam 0 or 1 it is lam, and of a row that is its own partner 1
    share = mean of the mask
    under[i], under[N + i]     = mask and 1 - mask, 0 where the row is taken whole: its blocks stay
    moving[i], moving[N + i]   = saliency of the row's blocks and of its partner's

labels [N, n, n] int64, lam [N], index [N]; mask [N, m, m] float32, m = n*finer, share [N]; saliency and moving [., m, m], under [2N, m, m].
One program a row. Memory floor: labels and saliency read once, the results written; a partner's saliency comes from the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import OPTIONS, masks_tile, on_device_of


class Masks(NamedTuple):
    """What is written; None where nothing is moved."""

    mask_ptr: torch.Tensor
    share_ptr: torch.Tensor
    under_ptr: torch.Tensor | None
    moving_ptr: torch.Tensor | None


@triton.jit(do_not_specialize=["N"])
def _puzzle_masks_kernel(
    label_ptr, lam_ptr, lam_stride, index_ptr, saliency_ptr, masks, N,
    n: tl.constexpr, FINER: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m: tl.constexpr = n * FINER
    row = tl.program_id(0).to(tl.int64)
    lam = tl.load(lam_ptr + row * lam_stride).to(tl.float32)
    partner = tl.load(index_ptr + row)
    partner = tl.minimum(tl.maximum(partner, 0), N - 1).to(tl.int64)
    lam = tl.where(partner == row, 1.0, lam)
    whole = (lam == 0) | (lam == 1)
    block = tl.arange(0, BLOCK)
    here = block < m * m
    cell = block // m // FINER * n + block % m // FINER
    label = tl.load(label_ptr + row * (n * n) + cell, mask=here, other=0)
    mask = tl.where(whole, lam, 1 - label.to(tl.float32) / K)
    place = row * (m * m) + block
    tl.store(masks.mask_ptr + place, mask, mask=here)
    tl.store(masks.share_ptr + row, tl.sum(tl.where(here, mask, 0), 0) / (m * m))
    if masks.under_ptr is not None:
        behind = place + N.to(tl.int64) * (m * m)
        tl.store(masks.under_ptr + place, tl.where(whole, 0, mask), mask=here)
        tl.store(masks.under_ptr + behind, tl.where(whole, 0, 1 - mask), mask=here)
        own = tl.load(saliency_ptr + place, mask=here, other=0)
        other = tl.load(saliency_ptr + partner * (m * m) + block, mask=here, other=0)
        tl.store(masks.moving_ptr + place, own, mask=here)
        tl.store(masks.moving_ptr + behind, other, mask=here)


def puzzle_masks(labels, lam, index, saliency, levels, finer):
    """Returns (mask [N, m, m], share [N], under and moving [2N, m, m]), the last two None without a saliency; for 64 x 64 blocks at
    most. lam [N] in any stride."""
    N, n, _ = labels.shape
    m = n * finer
    mask, share = (torch.empty(N, *shape, dtype=torch.float32, device=labels.device) for shape in ((m, m), ()))
    under = moving = None
    if saliency is not None:
        under, moving = (torch.empty(2 * N, m, m, dtype=torch.float32, device=labels.device) for _ in range(2))
    if N:
        block, warps = masks_tile(m)
        with on_device_of(labels):
            _puzzle_masks_kernel[(N,)](
                labels.contiguous(), lam, lam.stride(0), index.contiguous(), saliency, Masks(mask, share, under, moving), N,
                n, finer, levels - 1, block, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return mask, share, under, moving
