"""What the losses share. Logits are seen as [N, C], or [N, C, I] with rows n*I + i. A row's exponentials are taken in base 2,
which torch computes several times as fast as in base e on some processors.
"""

import math

import torch

from .._dtypes import accumulator
from . import sizes
from ._blocks import row_blocks
from ._formulas import safe_index, times

LOG2_E = 1 / math.log(2)


def view(t):
    """t as [N, C] or [N, C, I], and t itself: a contiguous copy where its layout has no such view."""
    if t.dim() <= 3:
        return t, t
    shape = (t.shape[0], t.shape[1], math.prod(t.shape[2:]))
    try:
        return t.view(shape), t
    except RuntimeError:
        t = t.contiguous()
        return t.view(shape), t


def class_blocks(z, block_bytes=None):
    """Indices that cut logits into blocks of rows that fit the cache, in their order; `...` for all of them."""
    block_bytes = sizes.LOSS_BLOCK_BYTES if block_bytes is None else block_bytes
    if z.numel() * 4 <= block_bytes or not z.is_cpu:
        return [...]
    N, C, *inner = z.shape
    if not inner or inner[0] * C * 4 <= block_bytes:
        return row_blocks(N, math.prod(z.shape[1:]) * 4, z.device, block_bytes)
    step = max(16, block_bytes // (4 * C))
    return [(slice(n, n + 1), slice(None), slice(i, i + step)) for n in range(N) for i in range(0, inner[0], step)]


def cut(at, *tensors):
    """The block `at` of tensors or Nones."""
    return tensors if at is ... else [None if t is None else t[at] for t in tensors]


class Mixed:
    """The values of MixedRows, mixed block by block as a tensor is cut. lam [N] is NaN where the partner is out of range."""

    def __init__(self, values, lam, index, dtype):
        self.values, self.dtype = values, dtype
        index, known = safe_index(index, len(values))
        self.index = index
        self.lam = torch.where(known, lam.to(dtype), math.nan)

    def __getitem__(self, at):
        rows, *inner = (slice(None),) if at is ... else at if isinstance(at, tuple) else (at,)
        part = slice(None), *inner
        values = self.values[part]
        own, other = (t.to(self.dtype) for t in (values[rows], values[self.index[rows]]))
        lam = self.lam[rows].view(-1, *[1] * (own.dim() - 1))
        return times(lam, own).add_(times(1 - lam, other))


def rows_of(target, z, lam, index):
    """A dense target in the shape of z, or with lam and index the values of MixedRows."""
    t = target.reshape(z.shape)
    return t if lam is None else Mixed(t, lam, index, accumulator(z.dtype))


def join(parts, like):
    """What was computed block by block, [n, K, ...] each, for all rows."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].shape[2:] == like.shape[2:]:
        return torch.cat(parts)
    # [1, K, some of I] each, row by row: [1, K, N*I] to [N, K, I]
    return torch.cat(parts, 2).view(-1, like.shape[0], like.shape[2]).transpose(0, 1)


def exponential(below):
    """A block of z - max, in place, to exp of it."""
    return below.mul_(LOG2_E).exp2_()


def reduced(losses, mass, reduction, logits):
    """Terms [N, K, ...] of the rows' losses to the loss, which is not a view: its owner may change it in place."""
    if reduction == "none":
        losses = losses.sum(1)
        return losses if logits.dim() <= 3 else losses.view(logits.shape[0], *logits.shape[2:]).clone()
    return losses.sum() if reduction == "sum" else losses.sum() / mass


def carefully(forward, logits, *arguments):
    """Runs a forward without regard to what is not finite, and once more with it if that shows in the loss."""
    if logits.is_cpu:
        results = forward(False, logits, *arguments)
        loss = results[0]
        if math.isfinite(loss if loss.dim() == 0 else loss.sum()):
            return results
    return forward(True, logits, *arguments)


def by_row_numbers(*numbers):
    """Numbers a row, [N, 1, ...] each, as one tensor [count, rows]."""
    return torch.cat([number.reshape(1, -1) for number in numbers])


def by_row(stats, z):
    return [t.view(z.shape[0], 1, *z.shape[2:]) for t in stats]


def scale_by_row(upstream, total):
    """An upstream gradient [] or [rows] as a number per row, as `total` is."""
    return upstream.to(total.dtype).expand(total.numel()).view(total.shape)


def with_upstream(form, logits, upstream, formed):
    """The gradient that `form` makes for an upstream gradient [] or [rows], from what was formed for upstream 1 if that is
    there. Narrow ones are formed anew, to be rounded once; others are scaled in place, and if they are not there formed for
    upstream 1 first, so that every backward gives the same bits."""
    one = upstream.is_cpu and upstream.dim() == 0 and float(upstream) == 1
    if logits.dtype != accumulator(logits.dtype):
        return formed if formed is not None and one else form(upstream)
    formed = form(upstream.new_ones(())) if formed is None else formed
    if one:
        return formed
    rows, _ = view(formed)
    if upstream.dim():
        upstream = upstream.view(rows.shape[0], 1, *rows.shape[2:])
    scale_(rows, upstream)
    return formed


def scale_(gradient, upstream):
    """A gradient times an upstream one, in place; what is 0 stays 0."""
    if upstream.is_cpu and bool(torch.isfinite(upstream).all()):
        gradient.mul_(upstream)
    else:
        gradient.copy_((gradient * upstream).masked_fill_(gradient == 0, 0))
