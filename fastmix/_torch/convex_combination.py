"""Weighted sums of several batches."""

import torch

from .._expressions import convex_combination_expression, convex_combination_gradients_expression
from . import sizes
from ._blocks import parts_of_row, row_blocks
from ._losses import cut


def convex_combination_fwd(sources, weights):
    out = torch.empty_like(sources[0])
    if not out.is_cpu or not out.numel():
        return out.copy_(convex_combination_expression(sources, weights))
    sources, own = _parts(sources), _own_weights(weights, out)
    for part in parts_of_row(out, weights.element_size()):
        _combine([source[part] for source in sources], own, weights, out[part])
    return out


def _combine(sources, own, weights, out):
    wide = out.dtype == weights.dtype
    blocks = _source_blocks(out, weights, wide)
    room = None if wide else _room(out, blocks, weights)
    for at in blocks:
        (block,) = cut(at, out)
        total = block if wide else room[: len(block)]
        for k, (source, (w, careful)) in enumerate(zip(sources, own, strict=True)):
            term, w = cut(at, source, w)
            if careful:  # what has weight 0 is not looked at
                term = term.masked_fill(w == 0, 0)
            if k:
                total.addcmul_(term, w)
            else:
                torch.mul(term, w, out=total)
        if not wide:
            block.copy_(total)


def convex_combination_bwd(g, sources, weights, layout, need_dsources, need_dweights):
    K, stacked = weights.shape[1], isinstance(need_dsources, bool)
    options = {"dtype": g.dtype, "device": g.device}
    if stacked:
        dsources = torch.empty_strided((K, *g.shape), (g.numel(), *layout), **options) if need_dsources else None
        sinks = dsources.unbind(0) if need_dsources else [None] * K
    else:
        dsources = sinks = tuple(torch.empty_strided(g.shape, layout, **options) if need else None for need in need_dsources)
    if not g.is_cpu or not g.numel():
        gradients, dweights = convex_combination_gradients_expression(g, sources, weights, need_dsources, need_dweights)
        for sink, gradient in zip(sinks, [None] * K if gradients is None else gradients, strict=True):
            if sink is not None:
                sink.copy_(gradient)
        return dsources, dweights
    sources = _parts(sources) if need_dweights else [None] * K
    own, parts = _own_weights(weights, g), parts_of_row(g, weights.element_size())
    sums = weights.new_empty(len(parts), *weights.shape) if need_dweights else [None] * len(parts)
    for part, total in zip(parts, sums, strict=True):
        some, into = ([None if t is None else t[part] for t in tensors] for tensors in (sources, sinks))
        _combine_bwd(g[part], some, own, weights, into, total)
    return dsources, sums.sum(0) if need_dweights else None


def _combine_bwd(g, sources, own, weights, sinks, dweights):
    row, need_dweights = tuple(range(1, g.dim())), dweights is not None
    sums = dweights.unbind(1) if need_dweights else [None] * len(own)
    wide = g.dtype == weights.dtype
    blocks = _source_blocks(g, weights, False)
    room = None if wide and not need_dweights else _room(sources[0] if need_dweights else g, blocks, weights)
    for at in blocks:
        (block,) = cut(at, g)
        block = block if wide else block.to(weights.dtype)
        product = None if room is None else room[: len(block)]
        for sink, source, column, (w, careful) in zip(sinks, sources, sums, own, strict=True):
            if sink is not None:
                part, w = cut(at, sink, w)
                result = torch.mul(block, w, out=part if wide else product)
                if careful:
                    result.masked_fill_(w == 0, 0)
                if not wide:
                    part.copy_(result)
            if source is not None:
                source, column = cut(at, source, column)
                if row:
                    torch.sum(torch.mul(block, source, out=product), row, out=column)
                else:
                    torch.mul(block, source, out=column)


def _parts(sources):
    return sources.unbind(0) if isinstance(sources, torch.Tensor) else sources


def _own_weights(weights, like):
    """Of each source: its weights against the rows of `like`, and whether there is a 0 among them."""
    columns = weights.reshape(*weights.shape, *[1] * (like.dim() - 1)).unbind(1)
    zeros = [False] * len(columns) if bool(weights.all()) else (weights == 0).any(0).tolist()
    return list(zip(columns, zeros, strict=True))


def _source_blocks(t, weights, whole):
    """Blocks of rows of t; `...` for all of them, also where they are few and nothing beside the result is made (`whole`)."""
    row_bytes = t[:1].numel() * weights.element_size()
    if len(t) * row_bytes <= (4 if whole else 1) * sizes.MIX_BLOCK_BYTES:
        return [...]
    return row_blocks(len(t), row_bytes, t.device, sizes.MIX_BLOCK_BYTES)


def _room(like, blocks, weights):
    """Memory for the largest block of rows, in the layout of `like` and the dtype of the weights."""
    return torch.empty_like(like[blocks[0]], dtype=weights.dtype, device=weights.device)


convex_combination_formula, convex_combination_gradients_formula = (
    convex_combination_expression,
    convex_combination_gradients_expression,
)
