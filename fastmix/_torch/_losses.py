"""What the losses share.

Logits are seen as rows [N, C], or [N, C, I] with the pixels of each image inside. The CPU takes exponentials in base 2, which
torch computes several times as fast as in base e on some processors.
"""

import math

import torch

from .._dtypes import accumulator
from . import sizes
from ._blocks import class_blocks
from ._formulas import per_row, safe_index, times

LOG2_E = 1 / math.log(2)


def class_rows(t):
    """Returns t [N, C, d1, ...] as [N, C] or [N, C, I], and t itself: contiguous copies where t has no such view."""
    if t.dim() <= 3:
        return t, t
    shape = (t.shape[0], t.shape[1], math.prod(t.shape[2:]))
    try:
        return t.view(shape), t
    except RuntimeError:
        t = t.contiguous()
        return t.view(shape), t


def empty_gradient(logits, z):
    """Returns memory for the gradient to the logits, in their layout, and the same seen as rows in the shape of z."""
    dlogits = torch.empty_like(logits)
    return dlogits, dlogits if logits.dim() <= 3 else dlogits.view(z.shape)


def flat(t):
    """Returns t [N, C, d1, ...] as [N, C, I]; [N, C] as it is."""
    return t.flatten(2) if t.dim() > 3 else t


def class_columns(class_weight, like):
    """Returns class weights [C] in a shape that broadcasts against [N, C] or [N, C, ...]."""
    return class_weight.view(1, -1, *[1] * (like.dim() - 2))


def component_weights(classes, weights, dtype):
    """Returns a weight for each component [N, K, ...]: 1 for None; one weight for all pixels is expanded."""
    if weights is None:
        return torch.ones(classes.shape, dtype=dtype, device=classes.device)
    weights = weights.to(dtype)
    if weights.dim() < classes.dim():
        weights = weights.reshape(*weights.shape, *[1] * (classes.dim() - weights.dim())).expand(classes.shape)
    return weights


def reduced(losses, denominator, reduction):
    """Returns the losses as they are ("none"), their sum, or their sum over the denominator ("mean")."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / denominator


def reduced_rows(losses, denominator, reduction, logits):
    """Returns the reduced losses of terms [N, K, ...]; with "none" [N, d1, ...], in memory of its own: callers may write it."""
    if reduction == "none":
        losses = losses.sum(1)
        return losses if logits.dim() <= 3 else losses.view(logits.shape[0], *logits.shape[2:]).clone()
    return reduced(losses, denominator, reduction)


class MixedTarget:
    """The dense target lam*values + (1-lam)*values[index], mixed block by block; rows with a partner out of range are NaN."""

    def __init__(self, values, lam, index, dtype):
        self.values, self.dtype = values, dtype
        self.index, in_range = safe_index(index, len(values))
        self.lam = torch.where(in_range, lam.to(dtype), math.nan)  # [N]

    def __getitem__(self, at):
        rows, *inner = (slice(None),) if at is ... else at if isinstance(at, tuple) else (at,)
        part = slice(None), *inner
        values = self.values[part]
        row, partner = (t.to(self.dtype) for t in (values[rows], values[self.index[rows]]))
        lam = per_row(self.lam[rows], row)
        return times(lam, row).add_(times(1 - lam, partner))


def dense_target(target, z, lam, index):
    """Returns a dense target in the shape of z, or with lam and index the MixedTarget of its rows."""
    target = target.reshape(z.shape)
    return target if lam is None else MixedTarget(target, lam, index, accumulator(z.dtype))


def loss_blocks(z, *others, block_bytes=None):
    """Yields the blocks of z with those of the others, in the order of the rows. None and numbers stay as they are.

    A MixedTarget is mixed block by block.
    """
    for at in class_blocks(z, sizes.LOSS_BLOCK_BYTES if block_bytes is None else block_bytes):
        if at is ...:  # one block is not indexed: t[...] costs as much as an operation on a small tensor
            yield z, *[t[...] if isinstance(t, MixedTarget) else t for t in others]
        else:
            yield z[at], *[t[at] if isinstance(t, (torch.Tensor, MixedTarget)) else t for t in others]


def join(blocks, z):
    """Returns what was computed block by block, [n, K, ...] each, for all rows of z."""
    if len(blocks) == 1:
        return blocks[0]
    if blocks[0].shape[2:] == z.shape[2:]:
        return torch.cat(blocks)
    # Blocks [1, K, some of I], image after image: [1, K, N*I] to [N, K, I]
    return torch.cat(blocks, 2).view(-1, z.shape[0], z.shape[2]).transpose(0, 1)


def exp_(shifted):
    """Replaces a block of z - row_max by its exponentials."""
    return shifted.mul_(LOG2_E).exp2_()


def pack_stats(*numbers):
    """Returns tensors [N, 1, ...] of a number for each row as one tensor [count, rows]."""
    return torch.cat([number.reshape(1, -1) for number in numbers])


def unpack_stats(stats, z):
    """Returns the tensors [N, 1, ...] that pack_stats was given."""
    return [t.view(z.shape[0], 1, *z.shape[2:]) for t in stats]


def fast_then_nan_safe(forward, logits, *arguments):
    """Runs the fast forward; if its loss is not finite (or may not be read), runs the NaN-safe one.

    `forward` takes nan_safe first: whether terms of weight 0 are left out even if they are inf or NaN. That takes 1.3 to 1.6
    times as long: dense targets of [256, 1000] logits 1.6 times, K-hot ones of soft_cross_entropy 1.4 times.
    """
    if logits.is_cpu:
        results = forward(False, logits, *arguments)
        loss = results[0]
        if math.isfinite(loss if loss.dim() == 0 else loss.sum()):
            return results
    return forward(True, logits, *arguments)


def is_one(grad_output):
    """Whether an upstream gradient is known to be the number 1."""
    return grad_output.is_cpu and grad_output.dim() == 0 and float(grad_output) == 1


def gradient_for(form, logits, grad_output, cached_grad):
    """Returns the gradient to the logits for grad_output [] or [rows].

    `cached_grad` is the gradient (or a tuple of them) that the forward formed for a grad_output of 1, or None; it may be
    written. `form(g)` computes the gradient from the logits for g [N, 1] or [N, 1, I], a number for each row, or None: 1.
    Gradients of a narrow dtype are formed anew, so that they are rounded once. Others are scaled in place, and formed for 1
    first if they are not cached, so that every backward gives the same bits.
    """
    if is_one(grad_output):
        return form(None) if cached_grad is None else cached_grad
    if logits.dtype != accumulator(logits.dtype):
        return form(grad_output_rows(grad_output, logits))
    gradient = form(None) if cached_grad is None else cached_grad
    factor = grad_output_rows(grad_output, logits) if grad_output.dim() else grad_output
    for part in gradient if isinstance(gradient, tuple) else (gradient,):
        if part is not None:
            scale_(class_rows(part)[0], factor)
    return gradient


def grad_output_rows(grad_output, logits):
    """Returns grad_output [] or [rows] as a number for each row of the logits, [N, 1] or [N, 1, I]."""
    inner = (math.prod(logits.shape[2:]),) if logits.dim() > 2 else ()
    shape = logits.shape[0], 1, *inner
    return grad_output.to(accumulator(logits.dtype)).expand(math.prod(shape)).view(shape)


def scale_(gradient, factor):
    """Multiplies a gradient in place by a number or a tensor; what is 0 stays 0 even if the factor is inf or NaN."""
    if isinstance(factor, float) or (factor.is_cpu and bool(torch.isfinite(factor).all())):
        return gradient.mul_(factor)
    return gradient.copy_((gradient * factor).masked_fill_(gradient == 0, 0))
