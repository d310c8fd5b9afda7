"""Pieces that the formulas of several ops share, and that the CPU paths use as well."""

import torch


def safe_index(index, rows):
    """Returns the index with entries outside [0, rows) replaced by 0, and which entries were in range."""
    in_range = (index >= 0) & (index < rows)
    return torch.where(in_range, index, 0), in_range


def per_row(values, like):
    """Returns values [N], one for each row, in a shape that broadcasts against `like` [N, ...]; a 0-d tensor as it is."""
    return values.view(-1, *[1] * (like.dim() - 1)) if values.dim() else values


def mirrored(x, flip, sizes=None):
    """Returns x with the rows of flip [N] mirrored along the last dimension; within the extents sizes [N, d], the padding kept."""
    if sizes is None:
        return torch.where(per_row(flip, x), x.flip(-1), x)
    place, stop = torch.arange(x.shape[-1], device=x.device), sizes[:, -1:].clamp(0, x.shape[-1])
    source = torch.where(flip.unsqueeze(1) & (place < stop), stop - 1 - place, place)
    return x.gather(-1, source.view(len(x), *[1] * (x.dim() - 2), -1).expand(x.shape))


def times(a, b):
    """Returns a*b, and 0 where a is 0 even if b is inf or NaN."""
    return (a * b).masked_fill_(a == 0, 0)


def differentiable_times(a, b):
    """Returns the same as `times`, with the gradient b to a also where a is 0, if b is finite there."""
    return a * drop_unweighted(a, b)


def weighted_pair(weights, x, y):
    """Returns weights*x + (1-weights)*y: the second product rounded, the first added to it as torch.addcmul does."""
    return torch.addcmul(differentiable_times(1 - weights, y), weights, drop_unweighted(weights, x))


def drop_unweighted(weights, values):
    """Returns the values with inf and NaN replaced by 0 where the weight is 0."""
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    return torch.where((weights == 0) & ~torch.isfinite(values), zero, values)


def sum_at(index, values):
    """Returns zeros like the values [N, ...] with row k of the values added at index[k]."""
    zeros = torch.zeros_like(values)
    # Both are repeatable: index_add sums in the order of the index on the CPU, index_put in sorted order on accelerators.
    return zeros.index_add(0, index, values) if values.is_cpu else zeros.index_put((index,), values, accumulate=True)
