"""Where the blocks of an image are moved under a mask: the kernel and its launcher.

    gain[s, t] = saliency[s] - t_eps * distance(s, t)^2 / (n-1)^2        for targets t under the mask

Rounds of proposals and refusals, as `fastmix._torch.transport_plan` describes them: one program an image, a lane a source. A target
holds the bits of the best gain and, below them, 2^31 - 1 - source in one int64, which an atomic maximum in memory keeps: it does not
depend on the order of the lanes. mask and saliency [N, n, n] float32, plan [N, n*n] int64. Memory floor: mask and saliency read once,
the plan written once; what is held takes one more array.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import OPTIONS, on_device_of, transport_tile


class Offsets(NamedTuple):
    """The offsets between blocks in the order in which sources try them, and what each costs."""

    dy_ptr: torch.Tensor
    dx_ptr: torch.Tensor
    cost_ptr: torch.Tensor
    length: int


@triton.jit(do_not_specialize=["rounds"])
def _transport_plan_kernel(mask_ptr, saliency_ptr, offsets, held_ptr, plan_ptr, rounds, n: tl.constexpr, BLOCK: tl.constexpr):
    BLOCKS: tl.constexpr = n * n
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    source = tl.arange(0, BLOCK)
    rank = 0x7FFFFFFF - source.to(tl.int64)  # the larger, the lower the source
    here = source < BLOCKS
    saliency = tl.load(saliency_ptr + first + source, mask=here, other=0)
    tl.store(held_ptr + first + source, tl.zeros([BLOCK], dtype=tl.int64), mask=here)
    tl.debug_barrier()
    at = tl.zeros([BLOCK], dtype=tl.int32)
    target = source
    offer = tl.full([BLOCK], -1, dtype=tl.int64)
    proposes = here
    for _ in range(rounds):
        looking = proposes
        offers = proposes & (at < 0)  # none yet
        while tl.max(looking.to(tl.int32), 0) != 0:
            looking = looking & (at < offsets.length)
            cost = tl.load(offsets.cost_ptr + at, mask=looking, other=float("inf"))
            looking = looking & (saliency > cost)
            y = source // n + tl.load(offsets.dy_ptr + at, mask=looking, other=0)
            x = source % n + tl.load(offsets.dx_ptr + at, mask=looking, other=0)
            inside = looking & (y >= 0) & (y < n) & (x >= 0) & (x < n)
            found = inside & (tl.load(mask_ptr + first + y * n + x, mask=inside, other=0) > 0)
            target = tl.where(found, y * n + x, target)
            offers = offers | found
            looking = looking & (found == 0)
            at += looking.to(tl.int32)
        gain = saliency - tl.load(offsets.cost_ptr + at, mask=offers, other=0)
        offer = tl.where(offers, (gain.to(tl.int32, bitcast=True).to(tl.int64) << 32) | rank, offer)
        tl.atomic_max(held_ptr + first + target, offer, mask=offers)
        tl.debug_barrier()
        refused = (offer >= 0) & (tl.load(held_ptr + first + target, mask=here, other=0, volatile=True) != offer)
        tl.debug_barrier()
        at += refused.to(tl.int32)
        offer = tl.where(refused, -1, offer)
        proposes = refused
    held = tl.load(held_ptr + first + source, mask=here, other=0, volatile=True)
    plan = tl.where(held > 0, 0x7FFFFFFF - (held & 0x7FFFFFFF), source.to(tl.int64))
    tl.store(plan_ptr + first + source, plan, mask=here)


def transport_plan(mask, saliency, offsets, rounds):
    """Returns for each block of the output the block that it comes from, [N, n*n] int64, for n to 64: 16 sources for each of
    256 threads."""
    N, n, _ = mask.shape
    # apart, so that both begin at a multiple of 16 bytes, whatever N and n
    held, plan = (torch.empty(N, n * n, dtype=torch.int64, device=mask.device) for _ in range(2))
    block, warps = transport_tile(n)
    with on_device_of(mask):
        _transport_plan_kernel[(N,)](
            mask, saliency, Offsets(*offsets, len(offsets[0])), held, plan, rounds, n, block, num_warps=warps, **OPTIONS
        )
    return plan
