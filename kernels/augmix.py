"""AugMix's chains of operations and their weighted sum: kernels and launcher.

    table    of AUTOCONTRAST and EQUALIZE, of the histogram of a channel; of POSTERIZE and SOLARIZE                     256 bytes
    step     table[pixel]; or for AFFINE the bilinear sample at (a*x + b*y + c, d*x + e*y + f), x and y in the middle of a pixel
    sum      w[0]*N(image) + sum over k of w[1 + k]*N(chain k),    N(v) = fma(v, factor[c], shift[c])

Two launches a step, of all chains of all views of the batch, and one for the sum. Chains that begin late are not touched before, and read the
image itself in their first step. Bytes are Pillow's, so coordinates and samples are float64 as there, and nothing is contracted.
Memory floor: a step reads and writes each byte of its chains once, and reads those of AUTOCONTRAST and EQUALIZE once more; the sum
reads images and chains once and writes floats once.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._draws import EXACT
from ._launch import MIX_OPTIONS, blocks, on_device_of

AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, AFFINE = (tl.constexpr(kind) for kind in range(1, 6))


@triton.jit
def _source(images_ptr, before_ptr, kind_ptr, row, chains, step, R, P, C: tl.constexpr):
    """Pointer to the image that a chain has before a step: what the step before has written, or the batch's own."""
    source = images_ptr + row // chains * (C * P)
    if tl.load(kind_ptr + (step - 1) * R + row, mask=step > 0, other=0) != 0:
        source = before_ptr + row * (C * P)
    return source


@triton.jit(do_not_specialize=["R", "step"])
def _augmix_table_kernel(
    images_ptr, before_ptr, kind_ptr, value_ptr, table_ptr, chains, step, R, P, C: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // C).to(tl.int64)
    c = tl.program_id(0) % C
    kind = tl.load(kind_ptr + step * R + row)
    value = tl.arange(0, 256)
    table = value
    if (kind == AUTOCONTRAST) | (kind == EQUALIZE):
        source = _source(images_ptr, before_ptr, kind_ptr, row, chains, step, R, P, C) + c * P
        counts = tl.zeros([256], tl.int32)
        for start in range(0, P, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            counts += tl.histogram(tl.load(source + pixel, mask=pixel < P, other=0).to(tl.int32), 256)
        counts -= tl.where(value == 0, (BLOCK - P % BLOCK) % BLOCK, 0)  # lanes without a pixel
        least = tl.min(tl.where(counts > 0, value, 255))
        most = tl.max(tl.where(counts > 0, value, 0))
        scale = (value * 0 + 255).to(tl.float64) / tl.maximum(most - least, 1)
        stretched = tl.minimum(tl.maximum((value * scale + -(least * scale)).to(tl.int32), 0), 255)
        width = (P - tl.sum(tl.where(value == most, counts, 0))) // 255
        evened = tl.minimum((width // 2 + tl.cumsum(counts) - counts) // tl.maximum(width, 1), 255)
        table = tl.where(kind == AUTOCONTRAST, tl.where(most > least, stretched, value), tl.where(width > 0, evened, value))
    else:
        number = tl.load(value_ptr + (step * R + row) * 6).to(tl.int32)
        dropped = tl.minimum(tl.maximum(8 - number, 0), 8)
        table = tl.where(kind == POSTERIZE, value >> dropped << dropped, tl.where(value < number, value, 255 - value))
    if (kind != 0) & (kind != AFFINE):
        tl.store(table_ptr + (row * C + c) * 256 + value, table.to(tl.uint8))


@triton.jit(do_not_specialize=["R", "step"])
def _augmix_step_kernel(images_ptr, before_ptr, kind_ptr, value_ptr, table_ptr, out_ptr, chains, step, R, H, W,
                 C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) % R).to(tl.int64)
    P = H * W
    pixel = tl.program_id(0) // R * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < P
    kind = tl.load(kind_ptr + step * R + row)
    source = _source(images_ptr, before_ptr, kind_ptr, row, chains, step, R, P, C)
    out = out_ptr + row * (C * P) + pixel
    if kind == AFFINE:
        matrix = value_ptr + (step * R + row) * 6
        x, y = (pixel % W).to(tl.float64) + 0.5, (pixel // W).to(tl.float64) + 0.5
        from_x = tl.load(matrix) * x + tl.load(matrix + 1) * y + tl.load(matrix + 2)
        from_y = tl.load(matrix + 3) * x + tl.load(matrix + 4) * y + tl.load(matrix + 5)
        inside = mask & (from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)
        left, top = tl.floor(from_x - 0.5), tl.floor(from_y - 0.5)
        u, v = from_x - 0.5 - left, from_y - 0.5 - top
        x0, y0 = left.to(tl.int32), top.to(tl.int32)
        # neighbours outside are the nearest pixels
        x1, y1 = tl.minimum(x0 + 1, W - 1), tl.minimum(y0 + 1, H - 1) * W
        x0, y0 = tl.maximum(x0, 0), tl.maximum(y0, 0) * W
        for c in range(C):
            a = tl.load(source + c * P + y0 + x0, mask=inside, other=0).to(tl.float64)
            b = tl.load(source + c * P + y0 + x1, mask=inside, other=0).to(tl.float64)
            upper = a + (b - a) * u
            a = tl.load(source + c * P + y1 + x0, mask=inside, other=0).to(tl.float64)
            b = tl.load(source + c * P + y1 + x1, mask=inside, other=0).to(tl.float64)
            lower = a + (b - a) * u
            sampled = (upper + (lower - upper) * v).to(tl.int32)
            tl.store(out + c * P, tl.where(inside, sampled, 0).to(tl.uint8), mask=mask)
    elif kind != 0:
        for c in range(C):
            byte = tl.load(source + c * P + pixel, mask=mask, other=0).to(tl.int32)
            found = tl.load(table_ptr + (row * C + c) * 256 + byte, mask=mask, other=0)
            tl.store(out + c * P, found, mask=mask)


@triton.jit
def _load_normalized(ptr, group, mask, factor, shift, V: tl.constexpr):
    """Bytes [groups, V] as normalised float32."""
    if V == 1:
        byte = tl.load(ptr + group, mask=mask, other=0)
    else:
        word = tl.load((ptr + group * V).to(tl.pointer_type(tl.uint32)), mask=mask, other=0)
        byte = (word >> (tl.arange(0, V)[None, :] * 8).to(tl.uint32)) & 255
    byte = byte.to(tl.float32)
    return tl.fma(byte, factor + tl.zeros_like(byte), shift + tl.zeros_like(byte))


@triton.jit(do_not_specialize=["N"])
def _augmix_sum_kernel(images_ptr, chains_ptr, weight_ptr, factor_ptr, shift_ptr, out_ptr, N, P, C: tl.constexpr, WIDTH: tl.constexpr,
                VIEWS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) % N).to(tl.int64)
    group = tl.program_id(0) // N * (BLOCK // V) + tl.arange(0, BLOCK // V)[:, None]
    groups = P // V * C
    mask = group < groups
    channel = group // (P // V)
    factor = tl.load(factor_ptr + channel, mask=mask, other=0)
    shift = tl.load(shift_ptr + channel, mask=mask, other=0)
    own = _load_normalized(images_ptr + row * (P * C), group, mask, factor, shift, V)
    place = (row * groups + group) * V + tl.arange(0, V)[None, :]
    tl.store(out_ptr + place, own, mask=mask)
    for view in range(VIEWS):
        weights = weight_ptr + (row * VIEWS + view) * (WIDTH + 1)
        total = tl.load(weights) * own
        for k in range(WIDTH):
            chain = ((row * VIEWS + view) * WIDTH + k) * (P * C)
            value = _load_normalized(chains_ptr + chain, group, mask, factor, shift, V)
            total = tl.fma(tl.load(weights + 1 + k) + tl.zeros_like(value), value, total)
        tl.store(out_ptr + tl.cast(view + 1, tl.int64) * N * (P * C) + place, total, mask=mask)


def augmix_fwd(images, kinds, values, weights, factor, shift):
    """images [N, C, H, W] uint8, contiguous; kinds [depth, N*views*width], values [depth, N*views*width, 6], weights [N, views,
    1 + width] -> [1 + views, N, C, H, W] float32: the images, then the views."""
    N, C, H, W = images.shape
    views, width = weights.shape[1], weights.shape[2] - 1
    out = torch.empty((1 + views, N, C, H, W), dtype=torch.float32, device=images.device)
    if not out.numel():
        return out
    depth, R, P = len(kinds), N * views * width, H * W
    tables = torch.empty((R, C, 256), dtype=torch.uint8, device=images.device)
    written = [torch.empty((R, C, H, W), dtype=torch.uint8, device=images.device) for _ in range(min(depth, 2))]
    kinds, values, weights = kinds.contiguous(), values.contiguous(), weights.contiguous()
    before, block = images, min(_launch.IMAGE_PIXELS, max(triton.next_power_of_2(P), 128))
    with on_device_of(images):
        for step in range(depth):
            after = written[step % 2]
            _augmix_table_kernel[(R * C,)](
                images, before, kinds, values, tables, views * width, step, R, P, C, block,
                num_warps=_launch.IMAGE_WARPS, **EXACT,
            )  # fmt: skip
            _augmix_step_kernel[(R * blocks(P, block),)](
                images, before, kinds, values, tables, after, views * width, step, R, H, W, C, block,
                num_warps=_launch.IMAGE_WARPS, **EXACT,
            )  # fmt: skip
            before = after
        V = 4 if P % 4 == 0 and images.data_ptr() % 4 == 0 else 1
        block = min(_launch.IMAGE_PIXELS, max(triton.next_power_of_2(P * C), 16))
        _augmix_sum_kernel[(N * blocks(P * C, block),)](
            images, before, weights, factor.contiguous(), shift.contiguous(), out, N, P, C, width, views, V, block,
            num_warps=_launch.IMAGE_WARPS, **MIX_OPTIONS,
        )  # fmt: skip
    return out
