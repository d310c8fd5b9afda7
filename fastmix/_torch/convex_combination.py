"""convex_combination: out[n] = the sum over k of weights[n, k]*sources[k][n].

On top the formulas as plain differentiable torch operations, for any device, function transforms and second derivatives. Below
them the launchers, which on the CPU work block by block. A source of weight 0 is not read.
"""

import torch

from . import sizes
from ._blocks import cut, row_blocks, row_parts
from ._formulas import differentiable_times, per_row


def convex_combination_formula(sources, weights):
    """Returns the sum over k of weights[:, k]*sources[k]."""
    total = 0
    for source, column in zip(sources, weights.unbind(1), strict=True):
        total = total + differentiable_times(per_row(column, source), source.to(weights.dtype))
    return total.to(sources[0].dtype)


def convex_combination_gradients_formula(grad_output, sources, weights, need_dsources, need_dweights):
    """Returns the gradients to the sources, weights[:, k]*grad_output, and to the weights, the sums of grad_output*sources[k].

    The first are stacked if need_dsources is a bool, else a tuple. What is not needed is None.
    """
    grad_acc, stacked = grad_output.to(weights.dtype), isinstance(need_dsources, bool)
    dsources = []
    for column, need in zip(weights.unbind(1), [need_dsources] * weights.shape[1] if stacked else need_dsources, strict=True):
        dsource = differentiable_times(per_row(column, grad_output), grad_acc).to(grad_output.dtype) if need else None
        dsources.append(dsource)
    dsources = (torch.stack(dsources) if need_dsources else None) if stacked else tuple(dsources)
    if not need_dweights:
        return dsources, None
    products, row = [grad_acc * source.to(grad_acc.dtype) for source in sources], list(range(1, grad_output.dim()))
    return dsources, torch.stack([product.sum(row) if row else product for product in products], 1)


def convex_combination_fwd(sources, weights):
    """Returns the combined batch, in the layout of the first source."""
    out = torch.empty_like(sources[0])
    if not out.is_cpu or not out.numel():
        return out.copy_(convex_combination_formula(sources, weights))
    sources, columns = _unstacked(sources), _weight_columns(weights, out)
    for part in row_parts(out, weights.element_size()):
        _combine([source[part] for source in sources], columns, weights.dtype, out[part])
    return out


def _combine(sources, columns, dtype, out):
    """Writes the weighted sum of a part of the rows."""
    is_narrow = out.dtype != dtype
    blocks = _batch_blocks(out, dtype)
    buffer = _block_buffer(out, blocks, dtype) if is_narrow else None
    for at in blocks:
        (block,) = cut(at, out)
        total = buffer[: len(block)] if is_narrow else block
        for k, (source, (w, has_zeros)) in enumerate(zip(sources, columns, strict=True)):
            source, w = cut(at, source, w)
            if has_zeros:  # always masked: 1.8 to 2.9 times as long
                source = source.masked_fill(w == 0, 0)
            if k:
                total.addcmul_(source, w)
            else:
                torch.mul(source, w, out=total)
        if is_narrow:
            block.copy_(total)


def convex_combination_bwd(grad_output, sources, weights, strides, need_dsources, need_dweights):
    """Returns the gradients to the sources, stacked if need_dsources is a bool, and to the weights; None if not needed."""
    K, stacked = weights.shape[1], isinstance(need_dsources, bool)
    options = {"dtype": grad_output.dtype, "device": grad_output.device}
    if stacked:
        N, shape = grad_output.numel(), grad_output.shape
        dsources = torch.empty_strided((K, *shape), (N, *strides), **options) if need_dsources else None
        outs = dsources.unbind(0) if need_dsources else [None] * K
    else:
        dsources = outs = tuple(
            torch.empty_strided(grad_output.shape, strides, **options) if need else None for need in need_dsources
        )
    if not grad_output.is_cpu or not grad_output.numel():
        gradients, dweights = convex_combination_gradients_formula(grad_output, sources, weights, need_dsources, need_dweights)
        for out, gradient in zip(outs, [None] * K if gradients is None else gradients, strict=True):
            if out is not None:
                out.copy_(gradient)
        return dsources, dweights
    sources = _unstacked(sources) if need_dweights else [None] * K
    columns, parts = _weight_columns(weights, grad_output), row_parts(grad_output, weights.element_size())
    dweights = weights.new_empty(len(parts), *weights.shape) if need_dweights else [None] * len(parts)
    for part, part_dweights in zip(parts, dweights, strict=True):
        part_sources, part_outs = ([None if t is None else t[part] for t in tensors] for tensors in (sources, outs))
        _combine_bwd(grad_output[part], part_sources, columns, weights.dtype, part_outs, part_dweights)
    return dsources, dweights.sum(0) if need_dweights else None


def _combine_bwd(grad_output, sources, columns, dtype, outs, dweights):
    """Writes the gradients of a part of the rows: to each source into `outs`, to the weights into `dweights` [N, K]."""
    row, need_dweights = tuple(range(1, grad_output.dim())), dweights is not None
    sums = dweights.unbind(1) if need_dweights else [None] * len(columns)
    is_narrow = grad_output.dtype != dtype
    blocks = _batch_blocks(grad_output, dtype)
    buffer = _block_buffer(sources[0] if need_dweights else grad_output, blocks, dtype) if is_narrow or need_dweights else None
    for at in blocks:
        (block,) = cut(at, grad_output)
        block = block.to(dtype) if is_narrow else block
        product = None if buffer is None else buffer[: len(block)]
        for out, source, total, (w, has_zeros) in zip(outs, sources, sums, columns, strict=True):
            out, source, total, w = cut(at, out, source, total, w)
            if out is not None:
                result = torch.mul(block, w, out=product if is_narrow else out)
                if has_zeros:
                    result.masked_fill_(w == 0, 0)
                if is_narrow:
                    out.copy_(result)
            if source is not None and row:
                torch.sum(torch.mul(block, source, out=product), row, out=total)
            elif source is not None:
                torch.mul(block, source, out=total)


def _unstacked(sources):
    """Returns the sources one by one."""
    return sources.unbind(0) if isinstance(sources, torch.Tensor) else sources


def _weight_columns(weights, like):
    """Returns for each source (its weights, in a shape that broadcasts against the rows of `like`; whether some are 0)."""
    columns = weights.reshape(*weights.shape, *[1] * (like.dim() - 1)).unbind(1)
    has_zeros = [False] * len(columns) if bool(weights.all()) else (weights == 0).any(0).tolist()
    return list(zip(columns, has_zeros, strict=True))


def _batch_blocks(t, dtype):
    """Returns indices that cut the rows of t into blocks; `[...]` for one block."""
    row_bytes = t[:1].numel() * dtype.itemsize
    if len(t) * row_bytes <= sizes.MIX_BLOCK_BYTES:  # not indexed: 1.3 to 1.5 times as fast on small batches
        return [...]
    return row_blocks(len(t), row_bytes, t.device, sizes.MIX_BLOCK_BYTES)


def _block_buffer(like, blocks, dtype):
    """Returns memory for the largest block, in the layout of `like` and the given dtype."""
    return torch.empty_like(like[blocks[0]], dtype=dtype)
