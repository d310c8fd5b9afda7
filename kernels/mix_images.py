"""Bytes of images to the normalised, mixed batch: kernel and launcher.

    x[i]   = fma(images[i], factor[c], shift[c]), mirrored along the last dimension if flip[i]      (float32)
    out[i] = fma(w, x[i], (1 - w)*x[index[i]])          w: lam[i], 0 inside row i's box; or mask[i, cell], blocks moved by plans

images [N, C, d1, ...] uint8 of one to three spatial dimensions, in any strides; out dense, with channels before the pixels or behind
them; factor and shift [C], lam [N] and mask [N, h, w] float32. Rows come first in the numbering of programs, as in _row_layout.py.
A program has one row and a tile of its pixels, in groups of V. A thread loads a group's bytes of a channel at once, as words of four
bytes, or those of all channels together where channels lie behind the pixels in images or in out. Mirrored pixels, and channels that
lie elsewhere in out, are brought into the order of out within the words, in registers. Where lines are no whole groups each byte is
loaded by itself.
Memory floor: each byte read once, out written once; a partner's bytes come from the L2 cache.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import IMAGE_CHANNELS, IMAGE_PIXELS, IMAGE_WARPS, MIX_OPTIONS, blocks, constants, on_device_of
from ._row_layout import mixed_pair
from .mix_masked import _without_wrong_plans


class Images(NamedTuple):
    """The bytes: strides of rows and channels and of the three spatial dimensions, the sizes of the last two, and whether channels lie
    behind the pixels. The sizes are compile-time ones, because a division by a number that is not known takes as long as all the rest;
    None where all pixels lie in one line and nobody asks for a coordinate."""

    ptr: torch.Tensor
    row: int
    channel: int
    z: int
    y: int
    x: int
    H: tl.constexpr | None
    W: tl.constexpr | None
    BEHIND: tl.constexpr


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
    """Cells of a mask: how many, and their sizes in pixels. Each RUN pixels of a group lie in one cell."""

    h: int
    w: int
    height: int
    WIDTH: tl.constexpr
    RUN: tl.constexpr


@triton.jit
def _moved(row, plan_ptr, y, x, grid, mask):
    """The pixels that those of a row come from if block plan[b] goes to block b."""
    cell_y = y // grid.height
    cell_x = x // grid.WIDTH
    count = grid.h * grid.w
    block = tl.load(plan_ptr + row * count + cell_y * grid.w + cell_x, mask=mask, other=0).to(tl.int32)
    block = tl.minimum(tl.maximum(block, 0), count - 1)  # the launcher makes rows with another one NaN
    return y + (block // grid.w - cell_y) * grid.height, x + (block % grid.w - cell_x) * grid.WIDTH


@triton.jit
def _split_all(parts, COUNT: tl.constexpr):
    """The COUNT parts, split along their last dimension of 2: all firsts, then all seconds."""
    first = ()
    second = ()
    for k in tl.static_range(COUNT):
        one, other = tl.split(parts[k])
        first = first + (one,)
        second = second + (other,)
    return first + second


@triton.jit
def _columns(values, COUNT: tl.constexpr):
    """values [G, COUNT] as a tuple of COUNT tensors [G]. COUNT: a power of two up to 16."""
    G: tl.constexpr = values.shape[0]
    if COUNT == 16:
        parts = (tl.reshape(values, [G, 2, 2, 2, 2]),)
    elif COUNT == 8:
        parts = (tl.reshape(values, [G, 2, 2, 2]),)
    elif COUNT == 4:
        parts = (tl.reshape(values, [G, 2, 2]),)
    elif COUNT == 2:
        parts = (values,)
    else:
        parts = (tl.reshape(values, [G]),)
    if COUNT > 1:
        parts = _split_all(parts, 1)
    if COUNT > 2:
        parts = _split_all(parts, 2)
    if COUNT > 4:
        parts = _split_all(parts, 4)
    if COUNT > 8:
        parts = _split_all(parts, 8)
    return parts


@triton.jit
def _joined_halves(parts, HALF: tl.constexpr):
    """The parts, each of the first half joined with its like of the second along a new last dimension."""
    joined = ()
    for k in tl.static_range(HALF):
        joined = joined + (tl.join(parts[k], parts[k + HALF]),)
    return joined


@triton.jit
def _beside(columns, COUNT: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """[G, COUNT] from columns [G]: its k-th is number (FIRST + k) // STEP of them. COUNT: a power of two up to 16."""
    parts = ()
    for k in tl.static_range(COUNT):
        parts = parts + (columns[(FIRST + k) // STEP],)
    if COUNT > 1:
        parts = _joined_halves(parts, COUNT // 2)
    if COUNT > 2:
        parts = _joined_halves(parts, COUNT // 4)
    if COUNT > 4:
        parts = _joined_halves(parts, COUNT // 8)
    if COUNT > 8:
        parts = _joined_halves(parts, COUNT // 16)
    return tl.reshape(parts[0], [columns[0].shape[0], COUNT])


@triton.jit
def _byte(words, PLACE: tl.constexpr, V: tl.constexpr, S: tl.constexpr, ORDER: tl.constexpr):
    """The byte of words that belongs to a place of a group in out. ORDER: whether channels lie behind the pixels in words, whether in
    out, and whether pixels are mirrored. Pixel p in channel c is byte p*S + c if channels lie behind the pixels, else byte c*V + p."""
    PIXEL: tl.constexpr = PLACE // S if ORDER[1] else PLACE % V
    CHANNEL: tl.constexpr = PLACE % S if ORDER[1] else PLACE // V
    FROM: tl.constexpr = V - 1 - PIXEL if ORDER[2] else PIXEL
    AT: tl.constexpr = FROM * S + CHANNEL if ORDER[0] else CHANNEL * V + FROM
    return (words[AT // 4] >> (AT % 4 * 8)) & 255


@triton.jit
def _word(words, PLACE: tl.constexpr, V: tl.constexpr, S: tl.constexpr, ORDER: tl.constexpr):
    """Four bytes of out, from this place on, as a word."""
    word = _byte(words, PLACE, V, S, ORDER)
    for k in tl.static_range(1, 4):
        word = word | (_byte(words, PLACE + k, V, S, ORDER) << (8 * k))
    return word


@triton.jit
def _load_groups(images, row, flipped, c, first, mask, V: tl.constexpr, S: tl.constexpr, OUT_BEHIND: tl.constexpr):
    """Bytes of groups of V pixels in S channels, from channel c on: a tuple of words [G] in the order of out; of bytes if V is 1.
    first: (z, y, x) [G] of the first pixel of each group. flipped: None if no row is mirrored."""
    z, y, x = first
    if flipped is not None:
        x = tl.where(flipped, images.W - V - x, x)
    start = row * images.row + tl.cast(c, tl.int64) * images.channel + x.to(tl.int64) * images.x
    if images.W is not None:
        start += z.to(tl.int64) * images.z + y.to(tl.int64) * images.y
    if V == 1:
        single = ()
        for s in tl.static_range(S):
            single = single + (tl.load(images.ptr + start + s * images.channel, mask=mask, other=0),)
        return single
    else:
        BEHIND: tl.constexpr = images.BEHIND.value
        # bytes that lie beside each other are loaded by neighbouring threads, so that no sector is asked for twice
        TIMES: tl.constexpr = 1 if BEHIND else S
        WORDS: tl.constexpr = S * V // 4 // TIMES
        PADDED: tl.constexpr = V if WORDS == 3 * V // 4 else WORDS
        place = tl.arange(0, PADDED)[None, :]
        words = ()
        for s in tl.static_range(TIMES):
            # a multiple of V: written so, because the compiler may then load whole vectors
            offset = (start + s * images.channel) // V * V
            ptrs = (images.ptr + offset).to(tl.pointer_type(tl.uint32))[:, None] + place
            words = words + _columns(tl.load(ptrs, mask=mask[:, None] & (place < WORDS), other=0), PADDED)
        ordered = ()
        for k in tl.static_range(S * V // 4):
            word = words[k]
            if BEHIND != OUT_BEHIND and S > 1:
                word = _word(words, 4 * k, V, S, (BEHIND, OUT_BEHIND, False))
            if flipped is not None:
                word = tl.where(flipped, _word(words, 4 * k, V, S, (BEHIND, OUT_BEHIND, True)), word)
            ordered = ordered + (word,)
        return ordered


@triton.jit
def _values(words, s: tl.constexpr, V: tl.constexpr, factor, shift):
    """The s-th V bytes of groups, normalised [G, V]."""
    if V == 1:
        value = words[s][:, None].to(tl.float32)
    else:
        G: tl.constexpr = words[0].shape[0]
        word = _beside(words, V // 4, s * (V // 4), 1)
        word = tl.reshape(tl.broadcast_to(word[:, :, None], [G, V // 4, 4]), [G, V])
        value = ((word >> (tl.arange(0, V) % 4 * 8).to(tl.uint32)[None, :]) & 255).to(tl.float32)
    return tl.fma(value, factor + tl.zeros_like(value), shift + tl.zeros_like(value))


@triton.jit
def _of_channels(ptr, channel, C: tl.constexpr):
    """Numbers of channels [1, V]: each of the C is loaded once."""
    value = tl.load(ptr) + tl.zeros(channel.shape, tl.float32)
    for c in tl.static_range(1, C):
        value = tl.where(channel == c, tl.load(ptr + c), value)
    return value


@triton.jit
def _bound(ptr):
    """A bound of a box, within [0, 2**30], where all coordinates are."""
    return tl.minimum(tl.maximum(tl.load(ptr), 0), 2**30).to(tl.int32)


@triton.jit
def _in_box(partners, row, z, y, x):
    """(x in the row's box, the box's length) in the line of each pixel: it is inside where 0 <= x < length."""
    DIMS: tl.constexpr = partners.DIMS.value
    bounds = partners.box_ptr + row * (2 * DIMS)
    start = _bound(bounds + DIMS - 1)
    length = tl.maximum(_bound(bounds + 2 * DIMS - 1) - start, 0) + tl.zeros_like(x)
    if DIMS > 1:
        length = tl.where((y >= _bound(bounds + DIMS - 2)) & (y < _bound(bounds + 2 * DIMS - 2)), length, 0)
    if DIMS > 2:
        length = tl.where((z >= _bound(bounds)) & (z < _bound(bounds + DIMS)), length, 0)
    return x - start, length


@triton.jit
def _cell_weights(partners, grid, row, y, x, mask, V: tl.constexpr):
    """Weights of the cells that groups lie in: a tuple of V // RUN tensors [G]. NaN where they are masked."""
    RUN: tl.constexpr = grid.RUN.value
    line = partners.mask_ptr + row * (grid.h * grid.w) + y // grid.height * grid.w
    weights = ()
    if grid.WIDTH == 1 and V > 1:
        # each pixel is a cell
        for k in tl.static_range(V // 4):
            ptrs = (line + x)[:, None] + (tl.arange(0, 4) + 4 * k)[None, :]
            weights = weights + _columns(tl.load(ptrs, mask=mask[:, None], other=float("nan")), 4)
    else:
        for k in tl.static_range(V // RUN):
            weights = weights + (tl.load(line + (x + k * RUN) // grid.WIDTH, mask=mask, other=float("nan")),)
    return weights


@triton.jit(do_not_specialize=["N"])
def _mix_images_kernel(
    images, factor_ptr, shift_ptr, flip_ptr, partners, grid, out, N, P,
    C: tl.constexpr, TOGETHER: tl.constexpr, OUT_BEHIND: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) % N).to(tl.int64)
    group = tl.program_id(0) // N * (BLOCK // V) + tl.arange(0, BLOCK // V)
    x = (group * V).to(tl.uint32)
    # bytes that are loaded one by one are counted as they lie in out
    SINGLE: tl.constexpr = OUT_BEHIND and V == 1
    if SINGLE:
        mask = x < P * C
        channel = (x % C).to(tl.int32)
        x = x // C
    else:
        mask = x < P
    y, z = tl.zeros_like(x), tl.zeros_like(x)
    if images.W is not None:
        y, x = x // images.W, x % images.W
        z, y = y // images.H, y % images.H
    x, y, z = x.to(tl.int32), y.to(tl.int32), z.to(tl.int32)
    flipped = None
    if flip_ptr is not None:
        flipped = tl.load(flip_ptr + row) != 0

    own_y, own_x, own_mask = y, x, mask
    if partners.index_ptr is not None:
        partner = tl.load(partners.index_ptr + row)
        in_range = (partner >= 0) & (partner < N)
        partner = tl.where(in_range, partner, 0)
        partner_y, partner_x = y, x
        partner_flipped = None
        if flip_ptr is not None:
            partner_flipped = tl.load(flip_ptr + partner) != 0
        # groups are loaded where a pixel of theirs has weight; all weights of a row whose partner is out of range are NaN
        if partners.mask_ptr is not None:
            RUN: tl.constexpr = grid.RUN.value
            weights = _cell_weights(partners, grid, row, y, x, mask & in_range, V)
            own_mask, partner_mask = weights[0] != 0, weights[0] != 1
            for k in tl.static_range(1, V // RUN):
                own_mask, partner_mask = own_mask | (weights[k] != 0), partner_mask | (weights[k] != 1)
            own_mask, partner_mask = own_mask & mask, partner_mask & mask
            if RUN == V:
                weight = weights[0][:, None]
        else:
            lam = tl.where(in_range, tl.load(partners.lam_ptr + row), float("nan")) + tl.zeros([1], tl.float32)
            weight = lam[:, None]
            own_mask, partner_mask = mask & (lam != 0), mask & (lam != 1)
        if partners.box_ptr is not None:
            start, length = _in_box(partners, row, z, y, x)
            length = tl.where(in_range, length, 0)
            own_mask = own_mask & ((start < 0) | (start + V > length))
            partner_mask = partner_mask | (mask & (start < length) & (start + V > 0) & (length > 0))
        if partners.plan_ptr is not None:
            own_y, own_x = _moved(row, partners.plan_ptr, y, x, grid, mask)
        if partners.partner_plan_ptr is not None:
            partner_y, partner_x = _moved(row, partners.partner_plan_ptr, y, x, grid, mask)

    for turn in range(1 if SINGLE else C // TOGETHER):
        c = channel if SINGLE else turn
        own = _load_groups(images, row, flipped, c, (z, own_y, own_x), own_mask, V, TOGETHER, OUT_BEHIND)
        if partners.index_ptr is not None:
            place = (z, partner_y, partner_x)
            other = _load_groups(images, partner, partner_flipped, c, place, partner_mask, V, TOGETHER, OUT_BEHIND)
        for s in tl.static_range(TOGETHER):
            place = tl.arange(0, V)[None, :]
            pixel = place
            if SINGLE:
                place = (row * (P * C) + group)[:, None]
                factor, shift = tl.load(factor_ptr + c)[:, None], tl.load(shift_ptr + c)[:, None]
            elif OUT_BEHIND:
                pixel, channels = (place + s * V) // TOGETHER, (place + s * V) % TOGETHER
                # V divides P: written so, because the compiler may then store whole vectors
                place = ((row * (P // V) + group) * TOGETHER + s)[:, None] * V + place
                factor, shift = _of_channels(factor_ptr, channels, TOGETHER), _of_channels(shift_ptr, channels, TOGETHER)
            else:
                place = ((row * C + c + s) * (P // V) + group)[:, None] * V + place
                factor, shift = tl.load(factor_ptr + c + s), tl.load(shift_ptr + c + s)
            value = _values(own, s, V, factor, shift)
            if partners.index_ptr is not None:
                if partners.mask_ptr is not None:  # noqa: SIM102 (there is no RUN without a mask)
                    if RUN != V:
                        weight = _beside(weights, V, s * V if OUT_BEHIND else 0, TOGETHER * RUN if OUT_BEHIND else RUN)
                partner_value = _values(other, s, V, factor, shift)
                value = mixed_pair(weight + tl.zeros_like(value), 1 - weight, value, partner_value)
                if partners.box_ptr is not None:
                    inside = (start[:, None] + pixel).to(tl.uint32) < length[:, None].to(tl.uint32)
                    value = tl.where(inside, partner_value, value)
            tl.store(out + place, value.to(out.dtype.element_ty), mask=mask[:, None])


def _strides(images):
    """((strides of rows, channels, z, y and x), (sizes of z, y and x)): dimensions of one element have a stride of 0."""
    steps = [stride if size > 1 else 0 for size, stride in zip(images.shape, images.stride(), strict=True)]
    missing = 5 - images.dim()
    return (*steps[:2], *[0] * missing, *steps[2:]), (*[1] * missing, *images.shape[2:])


def _in_one_line(strides, sizes):
    """Whether the pixels of an image lie so that x alone could count them."""
    (*_, z, y, x), (D, H, W) = strides, sizes
    return W > 1 and (H == 1 or y == W * x) and (D == 1 or z == H * W * x)


def _vector(images, strides, W, behind, width):
    """Bytes that a thread loads at once, where lines and cells of this width are whole vectors; else 1."""
    *others, x = (strides[0], *strides[2:]) if behind else strides
    for V in (16, 8, 4):
        aligned = all(number % V == 0 for number in (images.data_ptr(), W, width, *others))
        if aligned and x == (images.shape[1] if behind else 1):
            return V
    return 1


def mix_images_fwd(images, factor, shift, flip, pairing, dtype, channels_last, out=None):
    """images [N, C, d1, ...] uint8 -> out of this dtype, dense, channels behind the pixels if channels_last. pairing: lam, mask, index,
    box, plan, partner_plan. index None: not mixed, else by lam [N] and box, or by mask and plans."""
    lam, mask, index, box, plan, partner_plan = pairing
    N, C, *spatial = images.shape
    result = torch.empty((N, *spatial, C) if channels_last else (N, C, *spatial), dtype=dtype, device=images.device)
    # one in another layout, or stored with the other sign, is written to the result first, and copied
    given = out.movedim(1, -1) if out is not None and channels_last else out
    result = result if given is None or given.is_neg() or not given.is_contiguous() else given
    if result.numel():
        factor, shift, flip = (None if t is None else t.contiguous() for t in (factor, shift, flip))
        strides, (D, H, W) = _strides(images)
        pixels, width = D * H * W, 0
        if mask is not None:
            h, w = mask.shape[1:]
            mask = mask.resolve_neg().contiguous()
            width = 0 if plan is None and partner_plan is None else W // w
        one_line = mask is box is flip is None and _in_one_line(strides, (D, H, W))
        behind, out_behind = C > 1 and strides[1] == 1, C > 1 and channels_last
        together = C if behind or out_behind else 1
        V = _vector(images, strides, pixels if one_line else W, behind, width) if together <= IMAGE_CHANNELS else 1
        if V == 1:
            together = 1 if out_behind or C > IMAGE_CHANNELS else C
        grid = None
        if mask is not None:
            grid = Grid(h, w, H // h, *constants(W // w, math.gcd(V, W // w)))
        if index is not None:
            index = index if mask is None else _without_wrong_plans(index, h * w, plan, partner_plan)
            lam = None if mask is not None else lam.resolve_neg().expand(N).contiguous()
            index, box, plan, partner_plan = (None if t is None else t.contiguous() for t in (index, box, plan, partner_plan))
        dims, behind, H, W = constants(0 if box is None else box.shape[1] // 2, behind, H, W)
        partners = Partners(index, lam, box, mask, plan, partner_plan, dims)
        sizes = (None, None) if one_line else (H, W)
        elements = pixels * C if V == 1 and out_behind else pixels
        block = min(IMAGE_PIXELS, triton.next_power_of_2(max(elements, 16)))
        warps = IMAGE_WARPS if V == 1 else max(1, min(IMAGE_WARPS, block // V // 32))
        with on_device_of(images):
            _mix_images_kernel[(N * blocks(elements, block),)](
                Images(images, *strides, *sizes, behind), factor, shift, flip, partners, grid, result, N, pixels,
                C=C, TOGETHER=together, OUT_BEHIND=out_behind, V=V, BLOCK=block, num_warps=warps, **MIX_OPTIONS,
            )  # fmt: skip
    written = result is given
    result = result.movedim(-1, 1) if channels_last else result
    return result if out is None else out if written else out.copy_(result)
