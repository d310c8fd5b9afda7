"""Bytes of images to the normalised, mixed batch: kernel and launcher.

    x[i]   = fma(images[i], factor[c], shift[c]), mirrored along the last dimension if flip[i]      (float32)
    out[i] = fma(w, x[i], (1 - w)*x[index[i]])          w: lam[i], 0 inside row i's box; or mask[i, cell], blocks moved by plans

images [N, C, d1, ...] uint8 of one to three spatial dimensions, in any strides; out dense, with channels before the pixels or behind
them; factor and shift [C], lam [N] and mask [N, h, w] float32. Rows come first in the numbering of programs, as in _row_layout.py.
A program has one row and a tile of pixels, and goes through the channels: coordinates, boxes and cells are worked out once for all
of them, and bytes that lie beside each other in memory are read by one program. Where a line of pixels is whole words of V bytes, a
thread loads words: a mirrored line is the words from its end, the bytes of each in reverse.
Memory floor: each byte read once, out written once; a partner's bytes come from the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import IMAGE_PIXELS, IMAGE_WARPS, MIX_OPTIONS, blocks, constants, on_device_of
from ._row_layout import mixed_pair, weight_of_partner
from .mix_masked import _without_wrong_plans


class Images(NamedTuple):
    """The bytes: strides of rows and channels and of the three spatial dimensions, and the sizes of the last two. Where channels lie
    behind the pixels, the sizes are compile-time ones: a division by a number that is not known takes as long as all the rest."""

    ptr: torch.Tensor
    row: int
    channel: int
    z: int
    y: int
    x: int
    H: int | tl.constexpr
    W: int | tl.constexpr


class Partners(NamedTuple):
    """What mixes the rows: partners (None: nothing does), lam [N] or mask [N, h, w], boxes [N, 2*DIMS], plans [N, h*w]. None: absent.
    Triton 3.6 cannot compare a tuple that holds None with None: its fields are asked."""

    index_ptr: torch.Tensor | None
    lam_ptr: torch.Tensor | None
    box_ptr: torch.Tensor | None
    mask_ptr: torch.Tensor | None
    plan_ptr: torch.Tensor | None
    partner_plan_ptr: torch.Tensor | None
    DIMS: tl.constexpr


class Grid(NamedTuple):
    """Cells of a mask: how many, and their sizes in pixels."""

    h: int
    w: int
    height: int
    width: int


@triton.jit
def _moved(row, plan_ptr, y, x, grid, mask):
    """The pixels that those of a row come from if block plan[b] goes to block b."""
    cell_y = y // grid.height
    cell_x = x // grid.width
    count = grid.h * grid.w
    block = tl.load(plan_ptr + row * count + cell_y * grid.w + cell_x, mask=mask, other=0).to(tl.int32)
    block = tl.minimum(tl.maximum(block, 0), count - 1)  # the launcher makes rows with another one NaN
    return y + (block // grid.w - cell_y) * grid.height, x + (block % grid.w - cell_x) * grid.width


@triton.jit
def _load_channel(images, row, flipped, c, z, y, x, mask, V: tl.constexpr):
    """Bytes [groups, V] of a channel as float32. z, y, x [groups, 1]: the first pixel of each group."""
    x = tl.where(flipped, images.W - V - x, x)
    offset = row * images.row + z.to(tl.int64) * images.z + y.to(tl.int64) * images.y + x.to(tl.int64) * images.x
    offset += tl.cast(c, tl.int64) * images.channel
    if V == 1:
        value = tl.load(images.ptr + offset, mask=mask, other=0)
    else:
        # all strides are multiples of V, and the last is 1
        if V == 4:
            word = tl.load((images.ptr + offset // V * V).to(tl.pointer_type(tl.uint32)), mask=mask, other=0)
        else:
            word = tl.load((images.ptr + offset // V * V).to(tl.pointer_type(tl.uint64)), mask=mask, other=0)
        place = tl.arange(0, V)[None, :]
        place = tl.where(flipped, V - 1 - place, place)
        value = (word >> (place * 8).to(word.dtype)) & 255
    return value.to(tl.float32)


@triton.jit
def _row_weights(partners, grid, row, z, y, x, mask, V: tl.constexpr):
    """The row's own weight at pixels [groups, V], or [groups, 1] where lam alone mixes."""
    place = x + tl.arange(0, V)[None, :]
    if partners.mask_ptr is not None:
        cell = y // grid.height * grid.w + place // grid.width
        weight = tl.load(partners.mask_ptr + row * (grid.h * grid.w) + cell, mask=mask, other=0)
    else:
        weight = tl.load(partners.lam_ptr + row) + tl.zeros([1, 1], tl.float32)
        weight = tl.where(mask, weight, 0)
    if partners.box_ptr is not None:
        DIMS: tl.constexpr = partners.DIMS.value
        bounds = partners.box_ptr + row * (2 * DIMS)
        inside = (place >= tl.load(bounds + DIMS - 1)) & (place < tl.load(bounds + 2 * DIMS - 1))
        if DIMS > 1:
            inside = inside & (y >= tl.load(bounds + DIMS - 2)) & (y < tl.load(bounds + 2 * DIMS - 2))
        if DIMS > 2:
            inside = inside & (z >= tl.load(bounds)) & (z < tl.load(bounds + DIMS))
        weight = tl.where(inside, 0, weight)
    return weight


@triton.jit
def _any_in_group(used):
    """Whether any of the V elements of groups is used [groups, 1]."""
    return tl.max(used.to(tl.int32), axis=1, keep_dims=True) != 0


@triton.jit(do_not_specialize=["N"])
def _mix_images_kernel(
    images, factor_ptr, shift_ptr, flip_ptr, partners, grid, out, N, P,
    C: tl.constexpr, INTERLEAVED: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) % N).to(tl.int64)
    group = tl.program_id(0) // N * (BLOCK // V) + tl.arange(0, BLOCK // V)[:, None]
    first = group * V
    if INTERLEAVED:
        mask = first < P * C
        first = first.to(tl.uint32)
        channel = (first % C).to(tl.int32)
        first = first // C
    else:
        mask = first < P
    x = (first % images.W).to(tl.int32)
    line = first // images.W
    y = (line % images.H).to(tl.int32)
    z = (line // images.H).to(tl.int32)
    flipped = tl.zeros((), tl.int1)
    if flip_ptr is not None:
        flipped = tl.load(flip_ptr + row) != 0

    own_y, own_x = y, x
    if partners.index_ptr is not None:
        partner = tl.load(partners.index_ptr + row)
        in_range = (partner >= 0) & (partner < N)
        partner = tl.where(in_range, partner, 0)
        weight = _row_weights(partners, grid, row, z, y, x, mask, V)
        partner_weight = weight_of_partner(weight, in_range)
        own_mask = mask & _any_in_group(weight != 0)
        partner_mask = mask & _any_in_group(partner_weight != 0)
        partner_flipped = tl.zeros((), tl.int1)
        if flip_ptr is not None:
            partner_flipped = tl.load(flip_ptr + partner) != 0
        partner_y, partner_x = y, x
        if partners.plan_ptr is not None:
            own_y, own_x = _moved(row, partners.plan_ptr, y, x, grid, mask)
        if partners.partner_plan_ptr is not None:
            partner_y, partner_x = _moved(row, partners.partner_plan_ptr, y, x, grid, mask)
    else:
        own_mask = mask

    for turn in range(1 if INTERLEAVED else C):
        if INTERLEAVED:
            c = channel
            place = row * P * C + group.to(tl.int64)
        else:
            c = turn
            # V divides P: written so, because the compiler may then store whole vectors
            place = ((row * C + c) * (P // V) + group) * V + tl.arange(0, V)[None, :]
        factor = tl.load(factor_ptr + c)
        shift = tl.load(shift_ptr + c)
        value = _load_channel(images, row, flipped, c, z, own_y, own_x, own_mask, V)
        value = tl.fma(value, factor + tl.zeros_like(value), shift + tl.zeros_like(value))
        if partners.index_ptr is not None:
            other = _load_channel(images, partner, partner_flipped, c, z, partner_y, partner_x, partner_mask, V)
            other = tl.fma(other, factor + tl.zeros_like(other), shift + tl.zeros_like(other))
            value = mixed_pair(weight + tl.zeros_like(value), partner_weight, value, other)
        tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def _strides(images):
    """(strides of z, y and x, sizes of y and x): spatial dimensions that are not there have one element."""
    spatial = [*[(1, 0)] * (5 - images.dim()), *zip(images.shape[2:], images.stride()[2:], strict=True)]
    (_, z), (H, y), (W, x) = spatial
    return z, y, x, H, W


def _word(images, W, strides, out, grid, moved):
    """Bytes that a thread loads at once: as many as fill 16 bytes of out, where lines and cells are whole words; else 1."""
    for V in (8, 4):
        whole = images.data_ptr() % V == 0 and W % V == 0 and all(stride % V == 0 for stride in strides)
        if whole and 16 // out.element_size() >= V and not (moved and grid.width % V):
            return V
    return 1


def mix_images_fwd(images, factor, shift, flip, pairing, dtype, channels_last, out=None):
    """images [N, C, d1, ...] uint8 -> out of this dtype, dense, channels behind the pixels if channels_last. pairing: lam, mask, index,
    box, plan, partner_plan. index None: not mixed, else by lam [N] and box, or by mask and plans."""
    lam, mask, index, box, plan, partner_plan = pairing
    N, C, *sizes = images.shape
    result = torch.empty((N, *sizes, C) if channels_last else (N, C, *sizes), dtype=dtype, device=images.device)
    # one in another layout, or stored with the other sign, is written to the result first, and copied
    given = out.movedim(1, -1) if out is not None and channels_last else out
    result = result if given is None or given.is_neg() or not given.is_contiguous() else given
    if result.numel():
        factor, shift, flip = (None if t is None else t.contiguous() for t in (factor, shift, flip))
        z, y, x, H, W = _strides(images)
        moved = plan is not None or partner_plan is not None
        grid = None
        if mask is not None:
            h, w = mask.shape[1:]
            grid, mask = Grid(h, w, H // h, W // w), mask.resolve_neg().contiguous()
        if index is not None:
            index = index if grid is None else _without_wrong_plans(index, grid.h * grid.w, plan, partner_plan)
            lam = None if mask is not None else lam.resolve_neg().expand(N).contiguous()
            index, box, plan, partner_plan = (None if t is None else t.contiguous() for t in (index, box, plan, partner_plan))
        (dims,) = constants(0 if box is None else box.shape[1] // 2)
        partners = Partners(index, lam, box, mask, plan, partner_plan, dims)
        strides = (images.stride(0), images.stride(1), z, y)
        V = 1 if channels_last or x != 1 else _word(images, W, strides, result, grid, moved)
        H, W = constants(H, W) if channels_last else (H, W)
        pixels = images[0, 0].numel()
        elements = pixels * C if channels_last else pixels
        block = min(IMAGE_PIXELS, triton.next_power_of_2(max(elements, 16)))
        with on_device_of(images):
            _mix_images_kernel[(N * blocks(elements, block),)](
                Images(images, *strides, x, H, W), factor, shift, flip, partners, grid, result, N, pixels,
                C=C, INTERLEAVED=channels_last, V=V, BLOCK=block, num_warps=IMAGE_WARPS, **MIX_OPTIONS,
            )  # fmt: skip
    written = result is given
    result = result.movedim(-1, 1) if channels_last else result
    return result if out is None else out if written else out.copy_(result)
