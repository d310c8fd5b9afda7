"""resize_mix: the whole partner, resized bilinearly, inside row i's box; the row itself outside it.

A place of a side of the box is sampled from two pixels of the partner's side, in these weights; a pixel is sampled by two places at
most, because a box is no larger than the image. So the gradient is a gather too. Plain differentiable torch operations.
"""

import math

import torch

from ._formulas import per_row, safe_index, sum_at, weighted_pair
from .mix import box_mask


def resize_mix_formula(x, index, box):
    """Returns x with its partner resized into its box; rows with a partner out of range are NaN."""
    index, in_range = safe_index(index, x.shape[0])
    acc = torch.promote_types(x.dtype, torch.float32)
    resized = x[index].to(acc)
    for d in (1, 0):
        first, weight, _ = _samples(box, d, x.shape, acc)
        second = (first + 1).clamp(max=x.shape[d - 2] - 1)
        resized = weighted_pair(1 - weight, _take(resized, first, d), _take(resized, second, d))
    return torch.where(per_row(in_range, x), torch.where(box_mask(box, x.shape), resized.to(x.dtype), x), math.nan)


def resize_mix_dx_formula(grad_output, index, box):
    """Returns the gradient to x: grad_output outside the boxes, and what partners sampled inside them, in their weights."""
    index, in_range = safe_index(index, grad_output.shape[0])
    acc = torch.promote_types(grad_output.dtype, torch.float32)
    inside = box_mask(box, grad_output.shape)
    zero = torch.zeros((), dtype=acc, device=grad_output.device)
    grad_acc = grad_output.to(acc)
    sampled = torch.where(inside & per_row(in_range, grad_output), grad_acc, zero)
    for d in (0, 1):
        total = 0
        for place, weight in _samplers(box, d, grad_output.shape, acc):
            total = total + _take(sampled, place, d) * weight
        sampled = total
    return (torch.where(inside, zero, grad_acc) + sum_at(index, sampled)).to(grad_output.dtype)


def nearest_pixels(box, shape):
    """Returns the pixels of the partner that are nearest to the places of the boxes, along either side: ([N, H, 1], [N, 1, W])."""
    rows, columns = (_samples(box, d, shape, torch.float32)[2] for d in (0, 1))
    return rows.unsqueeze(2), columns.unsqueeze(1)


def _side(box, d, shape):
    """Returns (start, length [N, 1], size) of the boxes along the d-th of two sides, cut off at the image's border."""
    size = shape[len(shape) - 2 + d]
    start = box[:, d].clamp(0, size)
    return start.unsqueeze(1), (box[:, d + 2].clamp(max=size) - start).clamp(min=0).unsqueeze(1), size


def _samples(box, d, shape, dtype):
    """Returns (the first of two pixels, the weight of the second, shaped for images, the nearest pixel) of every position of a side."""
    start, length, size = _side(box, d, shape)
    # any place will do outside the box
    place = (torch.arange(size, device=box.device) - start).clamp(min=0).minimum((length - 1).clamp(min=0))
    length = length.clamp(min=1)
    numerator = (2 * place + 1) * size - length
    first = numerator.div(2 * length, rounding_mode="floor")
    weight = (numerator - first * (2 * length)).to(dtype) / (2 * length).to(dtype)
    nearest = ((2 * place + 1) * size).div(2 * length, rounding_mode="floor")
    return first, _along(weight, d, shape), nearest


def _samplers(box, d, shape, dtype):
    """Returns [(position, weight)] of the two places of the boxes that may be sampled from each pixel of a side."""
    start, length, size = _side(box, d, shape)
    pixel = torch.arange(size, device=box.device)
    place = ((2 * pixel - 1) * length + size).div(2 * size, rounding_mode="floor")
    twice = 2 * length.clamp(min=1)
    found = []
    for at in (place, place + 1):
        weight = (twice - ((2 * at + 1) * size - length - twice * pixel).abs()).clamp(min=0).to(dtype) / twice.to(dtype)
        weight = torch.where((at >= 0) & (at < length), weight, 0)
        found.append(((start + at).clamp(0, size - 1), _along(weight, d, shape)))
    return found


def _along(values, d, shape):
    """Returns values [N, side] in a shape that broadcasts along the d-th of the image's two sides."""
    return values.view(shape[0], *[1] * (len(shape) - 3), *((values.shape[1], 1) if d == 0 else (1, values.shape[1])))


def _take(t, position, d):
    """Returns the lines or columns of these positions [N, side] of images."""
    return t.gather(d - 2, _along(position, d, t.shape).expand(t.shape))


def resize_mix_fwd(x, index, box):
    """Returns the mixed batch, in the layout of x."""
    return torch.empty_like(x).copy_(resize_mix_formula(x.resolve_neg(), index, box))


def resize_mix_bwd(grad_output, index, box, strides):
    """Returns the gradient to x, in these strides."""
    dx = torch.empty_strided(grad_output.shape, strides, dtype=grad_output.dtype, device=grad_output.device)
    return dx.copy_(resize_mix_dx_formula(grad_output, index, box))
