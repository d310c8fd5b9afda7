"""AugMix's chains of operations and their weighted sum, in plain torch. The bytes are Pillow's: coordinates and samples are float64.

Rows are picked by what their step is, on the host, where the draw of this backend leaves that.
"""

import torch

from . import sizes
from ._blocks import row_blocks
from .augmix_steps import AFFINE, AUTOCONTRAST, EQUALIZE, POSTERIZE, REST, SOLARIZE
from .mix_images import normalized


def augmix_fwd(images, kinds, values, weights, factor, shift):
    """images [N, C, H, W] uint8; kinds [depth, N*views*width], values [depth, N*views*width, 6], weights [N, views, 1 + width] ->
    [1 + views, N, C, H, W] float32: the images, then the views."""
    N = len(images)
    views, width = weights.shape[1], weights.shape[2] - 1
    out = torch.empty((1 + views, *images.shape), dtype=torch.float32, device=images.device)
    kinds, values = kinds.cpu(), values.cpu()
    chains = views * width
    for rows in row_blocks(N, chains * images[:1].numel() * 16, images.device, sizes.MIX_BLOCK_BYTES):
        own = normalized(images[rows], factor, shift, None)
        of_rows = slice(rows.start * chains, min(rows.stop, N) * chains)
        moved = images[rows].repeat_interleave(chains, 0)
        for kind, value in zip(kinds[:, of_rows], values[:, of_rows], strict=True):
            moved = after_step(moved, kind, value)
        moved = normalized(moved, factor, shift, None).view(len(own), views, width, *images.shape[1:])
        out[0, rows] = own
        share = weights[rows].view(len(own), views, 1 + width, 1, 1, 1)
        total = share[:, :, 0] * own.unsqueeze(1)
        for k in range(width):
            total = torch.addcmul(total, share[:, :, 1 + k], moved[:, :, k])
        out[1:, rows] = total.transpose(0, 1)
    return out


def after_step(images, kinds, values):
    """Returns images [R, C, H, W] uint8 after one step: kinds [R] and values [R, 6], on the CPU."""
    out = images.clone()
    for kind in set(kinds.tolist()) - {REST}:
        rows = (kinds == kind).nonzero().squeeze(1)
        value, rows = values[rows].to(images.device, non_blocking=True), rows.to(images.device, non_blocking=True)
        chosen = images[rows]
        out[rows] = sampled(chosen, value) if kind == AFFINE else looked_up(chosen, table_of(kind, chosen, value[:, 0]))
    return out


def table_of(kind, images, numbers):
    """Returns tables [R or 1, C or 1, 256] int64 of images [R, C, H, W]."""
    value = torch.arange(256, device=images.device)
    if kind == POSTERIZE:
        dropped = (8 - numbers.long()).view(-1, 1, 1)
        return value >> dropped << dropped
    if kind == SOLARIZE:
        return torch.where(value < numbers.view(-1, 1, 1), value, 255 - value)
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones((), dtype=torch.int64, device=images.device).expand(pixels.shape))
    least, most = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
    if kind == AUTOCONTRAST:
        scale = torch.full(least.shape, 255.0, dtype=torch.float64, device=images.device) / (most - least).clamp(min=1)
        table = (value * scale + -(least * scale)).long().clamp(0, 255)
        return torch.where(most > least, table, value)
    if kind == EQUALIZE:
        width = (pixels.shape[2] - counts.gather(2, most)) // 255
        table = (width // 2 + counts.cumsum(2) - counts) // width.clamp(min=1)
        return torch.where(width > 0, table.clamp(max=255), value)
    raise AssertionError(kind)


def looked_up(images, table):
    """Returns each byte's entry of the table of its row and channel."""
    table = table.to(torch.uint8).expand(*images.shape[:2], 256)
    return table.gather(2, images.flatten(2).long()).view(images.shape)


def sampled(images, matrix):
    """Returns bilinear samples of images [R, C, H, W] at the places that matrices [R, 6] give, 0 outside, as bytes."""
    R, C, H, W = images.shape
    x = torch.arange(W, dtype=torch.float64, device=images.device) + 0.5
    y = (torch.arange(H, dtype=torch.float64, device=images.device) + 0.5).view(-1, 1)
    a, b, c, d, e, f = (number.view(-1, 1, 1) for number in matrix.unbind(1))
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = ((from_x >= 0) & (from_x < W) & (from_y >= 0) & (from_y < H)).unsqueeze(1)
    from_x, from_y = from_x - 0.5, from_y - 0.5
    left, top = from_x.floor(), from_y.floor()
    u, v = (from_x - left).unsqueeze(1), (from_y - top).unsqueeze(1)
    x0, x1 = left.long().clamp(0, W - 1), (left.long() + 1).clamp(0, W - 1)
    y0, y1 = top.long().clamp(0, H - 1), (top.long() + 1).clamp(0, H - 1)
    flat = images.flatten(2)

    def at(y, x):
        place = (y * W + x).view(R, 1, H * W).expand(R, C, H * W)
        return flat.gather(2, place).view(images.shape).to(torch.float64)

    upper, right = at(y0, x0), at(y0, x1)
    upper = upper + (right - upper) * u
    lower, right = at(y1, x0), at(y1, x1)
    lower = lower + (right - lower) * u
    return torch.where(inside, (upper + (lower - upper) * v).to(torch.uint8), 0)
