"""The torch backend: the same names and signatures as the kernels' face, for the CPU and for any device without Triton.

On the CPU work goes in blocks of rows that stay in the cache, and only outputs are allocated. Elsewhere whole batches are
one block. What non-finite values need (a weight of 0 means "not read") costs passes: on the CPU work is first done without
that, and again with it if the result is not finite.
"""

import math
from functools import partial

import torch

from ._expressions import (
    Components,
    accumulator,
    box_mask,
    cell_weights,
    columns,
    component_weights,
    convex_combination_expression,
    convex_combination_gradients_expression,
    mix_dlam_expression,
    mix_dx_expression,
    mix_expression,
    mix_masked_dmask_expression,
    mix_masked_dx_expression,
    mix_masked_expression,
    pixel_weights,
    safe_index,
    smoothed,
    times,
)

MIX_BLOCK_BYTES = 1 << 20  # a block of rows and its temporaries stay in the cache
LARGE_ROW_BYTES = 1 << 16  # such rows are mixed one by one, without temporaries
LOSS_BLOCK_BYTES = 1 << 21
JS_BLOCK_BYTES = 1 << 19  # of all sets
BINARY_BLOCK_BYTES = 1 << 19  # beside the block, its gradient and two buffers
SMALL_BATCH = 1 << 14  # elements: below it a few whole operations beat the set-up of a better one
SMALL_ROW_BYTES = 1 << 15  # boxes of smaller rows are cut by a mask, of larger ones row by row
LOG2_E = 1 / math.log(2)


def _blocks(rows: int, row_bytes: int, device: torch.device, block_bytes: int):
    """Slices of rows, in blocks of so many bytes on the CPU; one slice on another device."""
    step = rows if device.type != "cpu" else max(1, block_bytes // max(row_bytes, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1))]


def _parts_of_row(t, itemsize):
    """Indices [..., slice, ...] that cut rows of t beyond a block's bytes along their longest dimension; one of all of it for
    others."""
    row_bytes = math.prod(t.shape[1:]) * itemsize
    if row_bytes <= MIX_BLOCK_BYTES or t.dim() == 1 or not t.is_cpu:
        return [(slice(None),)]
    d = max(range(1, t.dim()), key=lambda d: t.shape[d])
    step = max(1, t.shape[d] * MIX_BLOCK_BYTES // row_bytes)
    return [(slice(None),) * d + (slice(start, start + step),) for start in range(0, t.shape[d], step)]


def _box_within(part, box, shape):
    """Boxes as they lie in this part of the rows."""
    d = len(part) - 1
    dims = 0 if box is None else box.shape[1] // 2
    k = d - (len(shape) - dims)  # of the box's dimensions
    if d == 0 or k < 0:
        return box
    shift = torch.zeros(2 * dims, dtype=box.dtype)
    shift[k] = shift[dims + k] = part[d].start
    return box.clamp(min=0) - shift


# Mixing


def _memory_order(t):
    """The dimensions of t, the first one first, the others as they follow in memory; None if that is as they are."""
    if t.is_contiguous():
        return None
    return [0, *sorted(range(1, t.dim()), key=t.stride, reverse=True)]


def mix_fwd(x, lam, index, box, out, order=None):
    x = x.resolve_neg()  # torch's own copy into another dtype forgets it
    if not x.is_cpu or not x.numel():
        return (torch.empty_like(x) if out is None else out).copy_(mix_expression(x, lam, index, box))
    lam = lam if lam.dim() else lam.expand(x.shape[0])
    other = 1 - lam
    copies = not bool((lam * other).all())  # lam 0 or 1 somewhere
    if copies and bool((lam == 1).all()):
        result = (torch.empty_like(x) if out is None else out).copy_(x)
    else:
        result = _mix_rows(x, lam, other, index, copies, out)
    if box is not None:
        _cut_boxes(result, x, index, box)
    return result


def _mix_rows(x, lam, other, index, copies, out):
    """out[i] = lam[i]*x[i] + other[i]*x[index[i]], small rows in blocks."""
    if x[0].nbytes >= LARGE_ROW_BYTES:
        return _mix_large_rows(x, lam, other, index, torch.empty_like(x) if out is None else out)
    order = _memory_order(x)
    laid = x if order is None else x.permute(order)
    dense = laid.is_contiguous()
    laid = laid if dense else laid.contiguous()
    source = laid.view(x.shape[0], -1)
    if dense and out is None and x.nbytes <= 4 * MIX_BLOCK_BYTES:  # nothing beside the result is made
        result = _mix_block(source, slice(None), lam, other, index, copies).view(laid.shape)
        return result if order is None else result.permute(sorted(range(x.dim()), key=lambda d: order[d]))
    result = torch.empty_like(x) if out is None else out
    sink = result if order is None else result.permute(order)
    for rows in _blocks(x.shape[0], source[0].nbytes, x.device, MIX_BLOCK_BYTES):
        sink[rows] = _mix_block(source, rows, lam[rows], other[rows], index[rows], copies).view(-1, *laid.shape[1:])
    return result


def _mix_large_rows(x, lam, other, index, result):
    """Each row straight into its place; narrow ones by way of one row of the arithmetic's type."""
    narrow = x.dtype != lam.dtype
    for part in _parts_of_row(x, lam.element_size()) if narrow else [...]:
        sources = x[part].unbind(0)
        wide = torch.empty_like(sources[0], dtype=lam.dtype) if narrow else None
        for row, mine, j, a, b in zip(
            result[part].unbind(0), sources, index.tolist(), lam.tolist(), other.tolist(), strict=True
        ):
            if a == 1 or a == 0:  # exactly, and the other row is not looked at
                row.copy_(mine if a == 1 else sources[j])
            elif wide is None:
                torch.mul(mine, a, out=row).add_(sources[j], alpha=b)
            else:
                row.copy_(wide.copy_(mine).mul_(a).add_(sources[j], alpha=b))
    return result


def _mix_block(source, rows, lam, other, index, copies):
    """Some rows of source [N, D], mixed, as a new tensor."""
    own = torch.arange(len(source), device=source.device)[rows] if copies or source.numel() > SMALL_BATCH else None
    if source.dtype == lam.dtype and source.numel() > SMALL_BATCH:  # the sum of two rows, in one pass
        offsets = torch.arange(0, 2 * len(own), 2, device=source.device)
        entries, weights = torch.stack((own, index), 1), torch.stack((lam, other), 1)
        block = torch.embedding_bag(source, entries.view(-1), offsets, False, 0, False, weights.view(-1))[0]
    else:
        block = source.index_select(0, index).to(lam.dtype).mul_(other.unsqueeze(1))
        block = block.addcmul_(source[rows].to(lam.dtype), lam.unsqueeze(1)).to(source.dtype)
    if copies:  # exactly, and the other row is not looked at
        at = ((lam == 0) | (lam == 1)).nonzero().view(-1)
        block.index_copy_(0, at, source.index_select(0, torch.where(lam == 1, own, index)[at]))
    return block


def _cut_boxes(result, x, index, box):
    """result inside each row's box is x's partner row."""
    row_bytes = x[0].nbytes
    if row_bytes < SMALL_ROW_BYTES:
        for rows in _blocks(x.shape[0], row_bytes, x.device, MIX_BLOCK_BYTES):
            mine = result[rows]
            torch.where(box_mask(box[rows], x.shape), x.index_select(0, index[rows]), mine, out=mine)
        return
    dims = box.shape[1] // 2
    sources = x.unbind(0)
    for row, partner, at in zip(result.unbind(0), index.tolist(), box.clamp(min=0).tolist(), strict=True):
        inside = (..., *[slice(at[d], max(at[d], at[dims + d])) for d in range(dims)])
        row[inside] = sources[partner][inside]


def mix_bwd(g, x, lam, index, box, layout, need_dx, need_dlam, order=None):
    dx = dlam = None
    if need_dx:
        dx = torch.empty_strided(g.shape, layout, dtype=g.dtype, device=g.device)
        if not g.is_cpu or not g.numel():
            dx.copy_(mix_dx_expression(g, lam, index, box))
        elif box is None and g.dtype == lam.dtype and g.numel() > SMALL_BATCH and _bags(g, dx):
            _mix_dx(g, lam.expand(g.shape[0]), index, dx)
        else:
            _mix_dx_weighted(g, lam.expand(g.shape[0]), index, box, dx)
    if need_dlam:
        dlam = mix_dlam_expression(g, x, lam, index, box) if not g.is_cpu else _mix_dlam(g, x, lam, index, box)
    return dx, dlam


def _bags(g, dx):
    """Whether rows are summed up as they are: stored as dx's, and not so large that another one is too much."""
    order = _memory_order(dx)
    return g[0].nbytes <= 4 * MIX_BLOCK_BYTES and (g if order is None else g.permute(order)).is_contiguous()


def _mix_dlam(g, x, lam, index, box):
    dlam = torch.zeros(g.shape[0], dtype=lam.dtype, device=g.device)
    for rows in _blocks(g.shape[0], g[:1].numel() * 4, g.device, MIX_BLOCK_BYTES):
        for part in _parts_of_row(g, lam.element_size()):
            mine, upstream = x[part][rows], g[part][rows]
            partner = x[part].index_select(0, index[rows])  # of all rows: it may be anywhere
            gap = mine - partner if x.dtype == lam.dtype else mine.to(lam.dtype) - partner.to(lam.dtype)
            gap *= upstream
            if box is not None:
                gap.masked_fill_(box_mask(_box_within(part, box[rows], g.shape), gap.shape), 0)
            dlam[rows] += gap.flatten(1).sum(1) if g.dim() > 1 else gap
    return dlam


def _mix_dx(g, lam, index, dx):
    """Row i of dx sums lam[i]*g[i] and (1-lam[k])*g[k] of the k with index[k] = i, in this order; nothing of weight 0."""
    N = g.shape[0]
    rows = torch.arange(N, device=g.device)
    weights = torch.cat((lam, 1 - lam))
    targets, sources = torch.cat((rows, index)).sort(stable=True)
    weights = weights[sources]
    if not bool(weights.all()):
        read = weights.nonzero().view(-1)
        weights, targets, sources = weights[read], targets[read], sources[read]
    offsets = torch.searchsorted(targets, rows)
    sources = sources.remainder_(N)
    order = _memory_order(dx)
    g, sink = (t if order is None else t.permute(order) for t in (g, dx))
    g = g.view(N, -1)
    for block in _blocks(N, g[0].nbytes, g.device, MIX_BLOCK_BYTES):
        first = int(offsets[block.start])
        last = int(offsets[block.stop]) if block.stop < N else len(sources)
        total = torch.embedding_bag(g, sources[first:last], offsets[block] - first, False, 0, False, weights[first:last])[0]
        sink[block] = total.view(-1, *sink.shape[1:])


def _mix_dx_weighted(g, lam, index, box, dx):
    """The same where weights differ within a row, rows are narrower than the arithmetic, or there is little to do."""
    blocks = _blocks(g.shape[0], g[:1].numel() * 4, g.device, MIX_BLOCK_BYTES)
    targets, order = index.sort(stable=True) if len(blocks) > 1 else (index, None)

    def weighted(rows, weights, careful):
        product = rows * weights
        return product.masked_fill_(weights == 0, 0) if careful else product

    def block(rows, part, careful):
        upstream, cut = g[part], _box_within(part, box, g.shape)

        def own(rows):
            return pixel_weights(lam[rows], None if cut is None else cut[rows], upstream)

        weights = own(rows)
        total = weighted(upstream[rows], weights, careful)
        if order is None:
            return total.index_add_(0, index, weighted(upstream, 1 - weights, careful))
        first, last = torch.searchsorted(targets, torch.tensor([rows.start, rows.stop], device=g.device)).tolist()
        for start in range(first, last, rows.stop - rows.start):  # whoever has its partner among these rows
            some = slice(start, min(start + rows.stop - rows.start, last))
            k = order[some]
            total.index_add_(0, targets[some] - rows.start, weighted(upstream[k], 1 - own(k), careful))
        return total

    for rows in blocks:
        for part in _parts_of_row(g, lam.element_size()):
            total = block(rows, part, False)
            dx[part][rows] = total if math.isfinite(total.sum()) else block(rows, part, True)


def convex_combination_fwd(sources, weights):
    out = torch.empty_like(sources[0])
    if not out.is_cpu or not out.numel():
        return out.copy_(convex_combination_expression(sources, weights))
    sources, own = _parts(sources), _own_weights(weights, out)
    for part in _parts_of_row(out, weights.element_size()):
        _combine([source[part] for source in sources], own, weights, out[part])
    return out


def _combine(sources, own, weights, out):
    wide = out.dtype == weights.dtype
    blocks = _source_blocks(out, weights, wide)
    room = None if wide else _room(out, blocks, weights)
    for at in blocks:
        (block,) = _cut(at, out)
        total = block if wide else room[: len(block)]
        for k, (source, (w, careful)) in enumerate(zip(sources, own, strict=True)):
            term, w = _cut(at, source, w)
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
    own, parts = _own_weights(weights, g), _parts_of_row(g, weights.element_size())
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
        (block,) = _cut(at, g)
        block = block if wide else block.to(weights.dtype)
        product = None if room is None else room[: len(block)]
        for sink, source, column, (w, careful) in zip(sinks, sources, sums, own, strict=True):
            if sink is not None:
                part, w = _cut(at, sink, w)
                result = torch.mul(block, w, out=part if wide else product)
                if careful:
                    result.masked_fill_(w == 0, 0)
                if not wide:
                    part.copy_(result)
            if source is not None:
                source, column = _cut(at, source, column)
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
    if len(t) * row_bytes <= (4 if whole else 1) * MIX_BLOCK_BYTES:
        return [...]
    return _blocks(len(t), row_bytes, t.device, MIX_BLOCK_BYTES)


def _room(like, blocks, weights):
    """Memory for the largest block of rows, in the layout of `like` and the dtype of the weights."""
    return torch.empty_like(like[blocks[0]], dtype=weights.dtype, device=weights.device)


# Mixing by a mask. A row's memory is seen as [A, lines, L]: a line holds the elements of all cells that are side by side along the
# inner one of height and width, in runs of one cell; `per` lines belong to the same cells along the outer one.


class _Lines:
    """Rows of a layout (that of a dense tensor), under a mask [h, w]."""

    def __init__(self, like, mask):
        self.order = _memory_order(like)
        order = list(range(like.dim())) if self.order is None else self.order
        numel, steps, step = math.prod(like.shape[1:]), {}, 1
        for d in reversed(order[1:]):
            steps[d] = step
            step *= like.shape[d]
        (h, w), last = mask.shape[1:], like.dim() - 1
        sides = [(steps[d] if like.shape[d] > 1 else numel, like.shape[d], n, d) for d, n in ((last, w), (last - 1, h))]
        (step, size, self.across, inner), (outer, outer_size, self.down, _) = sorted(sides)
        self.upright = inner == last  # cells follow each other as in the mask; else it is turned
        self.L = step * size
        self.run = self.L // self.across
        self.count = outer // self.L * outer_size
        self.per = self.count // self.down
        self.shape = (numel // (self.L * self.count), self.count, self.L)
        self.runs = numel // self.run

    def laid(self, t):
        """t [N, ...] as [N, A, lines, L], a copy only where its layout is another."""
        t = t if self.order is None else t.permute(self.order)
        return t.contiguous().view(t.shape[0], *self.shape)

    def turned(self, cells):
        """[n, h, w] as it lies over lines and runs, and back."""
        return cells if self.upright else cells.transpose(1, 2)

    def blocks(self, rows, whole):
        """(rows, lines) of blocks that stay in the cache; all lines if `whole`."""
        row_bytes = 4 * math.prod(self.shape)
        if whole or row_bytes <= MIX_BLOCK_BYTES:
            return [(at, slice(0, self.count)) for at in _blocks(rows, row_bytes, torch.device("cpu"), MIX_BLOCK_BYTES)]
        step = max(1, MIX_BLOCK_BYTES * self.count // row_bytes)
        return [(slice(i, i + 1), slice(k, min(k + step, self.count))) for i in range(rows) for k in range(0, self.count, step)]

    def cells(self, lines):
        """Which cells, counted along the outer side, lines belong to."""
        return torch.arange(lines.start, lines.stop).div_(self.per, rounding_mode="floor")

    def weights(self, mask, lines):
        """Turned mask rows [n, down, across] over their elements: [n, 1, lines, L]."""
        first = lines.start // self.per
        mask = mask[:, first : -(-lines.stop // self.per)]
        spread = mask.unsqueeze(-1).expand(*mask.shape, self.run).reshape(*mask.shape[:2], self.L)
        return (spread if self.per == 1 else spread.index_select(1, self.cells(lines) - first)).unsqueeze(1)

    def sources(self, plan, rows, lines):
        """Numbers of the runs, counted through all rows, that make up blocks of these rows when they are moved: [n, A, lines,
        across]."""
        h, w = (self.down, self.across) if self.upright else (self.across, self.down)
        plan = self.turned(plan.view(-1, h, w))
        y, x = plan.div(w, rounding_mode="floor"), plan.remainder(w)
        down, across = (y, x) if self.upright else (x, y)
        step = (down - torch.arange(self.down).unsqueeze(1)) * (self.per * self.across) + across
        step = step.index_select(1, self.cells(lines)) + torch.arange(lines.start, lines.stop).unsqueeze(1) * self.across
        starts = torch.arange(self.shape[0]) * (self.count * self.across)
        return (rows * self.runs).view(-1, 1, 1, 1) + starts.view(-1, 1, 1) + step.unsqueeze(1)

    def taken(self, laid, rows, plan, lines):
        """Blocks of rows (a slice, or numbers where there is a plan) of laid [N, A, lines, L], moved by their plan."""
        if isinstance(rows, slice):
            return laid[rows, :, lines]
        if plan is None:
            return laid[int(rows) :][:1, :, lines] if len(rows) == 1 else laid.index_select(0, rows)[:, :, lines]
        runs = laid.view(-1, self.run).index_select(0, self.sources(plan, rows, lines).view(-1))
        return runs.view(len(rows), self.shape[0], -1, self.L)


def mix_masked_fwd(x, mask, index, plan, partner_plan):
    x = x.resolve_neg()
    out = torch.empty_like(x)
    if not x.is_cpu or not x.numel():
        return out.copy_(mix_masked_expression(x, mask, index, plan, partner_plan))
    if x.numel() <= SMALL_BATCH and plan is None and partner_plan is None:
        _mix_masked_block(x, x[index], mask, cell_weights(mask, x.shape), out)
        return out
    lines = _Lines(out, mask)
    laid, cells = lines.laid(x), lines.turned(mask.resolve_neg())
    sink = out if lines.order is None else out.permute(lines.order)
    dense = sink.is_contiguous()
    result = (sink if dense else torch.empty(sink.shape, dtype=x.dtype)).view(laid.shape)
    every = torch.arange(x.shape[0])
    for rows, part in lines.blocks(x.shape[0], False):
        own = laid[rows, :, part] if plan is None else lines.taken(laid, every[rows], plan[rows], part)
        partner = lines.taken(laid, index[rows], None if partner_plan is None else partner_plan[rows], part)
        _mix_masked_block(own, partner, cells[rows], lines.weights(cells[rows], part), result[rows, :, part])
    if not dense:
        sink.copy_(result.view(sink.shape))
    return out


def _mix_masked_block(own, partner, shares, weights, sink):
    """sink = weights*own + (1-weights)*partner, where a weight of 0 means that a value is not looked at; `shares` are those of the
    cells that the weights are made of."""
    low, high = shares.aminmax()
    some = not (low > 0 and high < 1)  # of the weights may be 0 or 1
    if some and bool(((shares == 0) | (shares == 1)).all()):
        torch.where(weights == 1, own, partner, out=sink)
        return
    wide = sink.dtype == weights.dtype
    if not wide:
        own, partner = own.to(weights.dtype), partner.to(weights.dtype)
    mixed = torch.lerp(partner, own, weights, out=sink if wide else None)
    if not math.isfinite(mixed.sum()):  # the difference of huge values, perhaps
        mixed = torch.mul(own, weights, out=mixed).addcmul_(partner, 1 - weights)
    if some:
        torch.where(weights == 1, own, mixed, out=mixed)
        torch.where(weights == 0, partner, mixed, out=mixed)
    if not wide:
        sink.copy_(mixed)


def mix_masked_bwd(g, x, mask, index, plan, partner_plan, layout, need_dx, need_dmask):
    dx = dmask = None
    how = mask, index, plan, partner_plan
    cpu = g.is_cpu and g.numel() > 0
    if need_dx:
        dx = torch.empty_strided(g.shape, layout, dtype=g.dtype, device=g.device)
        if cpu:
            _mix_masked_dx(g, *how, dx)
        else:
            dx.copy_(mix_masked_dx_expression(g, *how))
    if need_dmask:
        dmask = _mix_masked_dmask(g, x, *how) if cpu else mix_masked_dmask_expression(g, x, *how)
    return dx, dmask


def _mix_masked_dx(g, mask, index, plan, partner_plan, dx):
    """Row i of dx adds up mask[i]*g[i] and (1-mask[k])*g[k] of the k with index[k] = i, in this order; nothing of weight 0."""
    small = g.numel() <= SMALL_BATCH or (g.is_contiguous() and g.nbytes <= 4 * MIX_BLOCK_BYTES)
    if small and plan is None and partner_plan is None:
        weights = cell_weights(mask, g.shape)
        total = (g * weights).index_add_(0, index, g * (1 - weights))
        if math.isfinite(total.sum()):
            dx.copy_(total)
            return
    lines = _Lines(dx, mask)
    laid, cells = lines.laid(g), lines.turned(mask.resolve_neg())
    sink = dx if lines.order is None else dx.permute(lines.order)
    sink = sink.view(laid.shape) if sink.is_contiguous() else None
    result = torch.empty_like(laid) if sink is None else sink
    targets, order = index.sort(stable=True)
    every = torch.arange(len(g))

    def some_zero(shares):
        return shares.numel() > 0 and not shares.amin() > 0

    def weighted(rows, shares, part):
        """Rows of g (a slice, or numbers) by the shares of their cells."""
        weights = lines.weights(shares, part)
        product = lines.taken(laid, rows, None, part) * weights
        if some_zero(shares) and not math.isfinite(product.sum()):
            product.masked_fill_(weights == 0, 0)
        return product

    def add(total, rows, at, shares, plan, part):
        """What comes from these rows to rows `at` of the block."""
        if plan is not None:
            product = weighted(rows, shares, part)
            runs = lines.sources(plan[rows], at, part).view(-1, 1).expand(-1, lines.run)
            total.view(-1, lines.run).scatter_add_(0, runs, product.view(-1, lines.run))
        elif len(total) == 1 and total.dtype == laid.dtype and not some_zero(shares):
            total.addcmul_(lines.taken(laid, rows, None, part), lines.weights(shares, part))
        else:
            total.index_add_(0, at, weighted(rows, shares, part))

    for rows, part in lines.blocks(len(g), plan is not None or partner_plan is not None):
        count = rows.stop - rows.start
        if plan is None:
            total = weighted(rows, cells[rows], part)
        else:
            total = laid.new_zeros((count, *lines.shape), dtype=mask.dtype)
            add(total, rows, every[:count], cells[rows], plan, part)
        if count == len(g):
            add(total, rows, index, 1 - cells, partner_plan, part)
        else:
            first, last = torch.searchsorted(targets, torch.tensor([rows.start, rows.stop])).tolist()
            for start in range(first, last, count):  # whoever has its partner among these rows
                k, at = (t[start : min(start + count, last)] for t in (order, targets))
                add(total, k, at - rows.start, 1 - cells.index_select(0, k), partner_plan, part)
        result[rows, :, part] = total
    if sink is None:
        dx.permute(lines.order).copy_(result.view(dx.permute(lines.order).shape))


def _mix_masked_dmask(g, x, mask, index, plan, partner_plan):
    like = torch.empty_like(x, device="meta")
    lines = _Lines(like, mask)
    x, g = lines.laid(x), lines.laid(g)
    dmask = torch.zeros_like(lines.turned(mask), memory_format=torch.contiguous_format)
    every = torch.arange(len(x))
    for rows, part in lines.blocks(len(x), False):
        own = x[rows, :, part] if plan is None else lines.taken(x, every[rows], plan[rows], part)
        partner = lines.taken(x, index[rows], None if partner_plan is None else partner_plan[rows], part)
        gap = own - partner if x.dtype == mask.dtype else own.to(mask.dtype) - partner.to(mask.dtype)
        gap *= g[rows, :, part]
        cell = gap.sum(1).unflatten(2, (lines.across, lines.run)).sum(3)  # [n, lines, across]
        dmask[rows].index_add_(1, lines.cells(part), cell)
    return lines.turned(dmask).contiguous()


# Losses. Logits are seen as [N, C], or [N, C, I] with rows n*I + i. A row's exponentials are taken in base 2, which torch
# computes several times as fast as in base e on some processors.


def _view(t):
    """t as [N, C] or [N, C, I], and t itself: a contiguous copy where its layout has no such view."""
    if t.dim() <= 3:
        return t, t
    shape = (t.shape[0], t.shape[1], math.prod(t.shape[2:]))
    try:
        return t.view(shape), t
    except RuntimeError:
        t = t.contiguous()
        return t.view(shape), t


def _class_blocks(z, block_bytes=LOSS_BLOCK_BYTES):
    """Indices that cut logits into blocks of rows that fit the cache, in their order; `...` for all of them."""
    if z.numel() * 4 <= block_bytes or not z.is_cpu:
        return [...]
    N, C, *inner = z.shape
    if not inner or inner[0] * C * 4 <= block_bytes:
        return _blocks(N, math.prod(z.shape[1:]) * 4, z.device, block_bytes)
    step = max(16, block_bytes // (4 * C))
    return [(slice(n, n + 1), slice(None), slice(i, i + step)) for n in range(N) for i in range(0, inner[0], step)]


def _cut(at, *tensors):
    """The block `at` of tensors or Nones."""
    return tensors if at is ... else [None if t is None else t[at] for t in tensors]


def _join(parts, like):
    """What was computed block by block, [n, K, ...] each, for all rows."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].shape[2:] == like.shape[2:]:
        return torch.cat(parts)
    # [1, K, some of I] each, row by row: [1, K, N*I] to [N, K, I]
    return torch.cat(parts, 2).view(-1, like.shape[0], like.shape[2]).transpose(0, 1)


def _exponential(below):
    """A block of z - max, in place, to exp of it."""
    return below.mul_(LOG2_E).exp2_()


def _reduce(losses, mass, reduction, logits):
    """Terms [N, K, ...] of the rows' losses to the loss, which is not a view: its owner may change it in place."""
    if reduction == "none":
        losses = losses.sum(1)
        return losses if logits.dim() <= 3 else losses.view(logits.shape[0], *logits.shape[2:]).clone()
    return losses.sum() if reduction == "sum" else losses.sum() / mass


def _carefully(forward, logits, *arguments):
    """Runs a forward without regard to what is not finite, and once more with it if that shows in the loss."""
    if logits.is_cpu:
        results = forward(False, logits, *arguments)
        loss = results[0]
        if math.isfinite(loss if loss.dim() == 0 else loss.sum()):
            return results
    return forward(True, logits, *arguments)


def soft_ce_fwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, reduction, need_dweights, form_gradient):
    options = ignore_index, label_smoothing, reduction, need_dweights, form_gradient
    return _carefully(_soft_ce_fwd, logits, classes, weights, class_weight, *options)


def _soft_ce_fwd(
    careful, logits, classes, weights, class_weight, ignore_index, label_smoothing, reduction, need_dweights, form_gradient
):
    z, logits = _view(logits)
    target = Components(classes, weights, class_weight, ignore_index, label_smoothing, z, careful)
    mass = target.weighted.sum() if reduction == "mean" else None
    dlogits = grad = None
    gradient = (None, None, None)
    if form_gradient:
        gradient = target.gradient(mass)
        dlogits = torch.empty_like(logits)
        grad = dlogits if logits.dim() <= 3 else dlogits.view(z.shape)
    wide = z.dtype == target.dtype
    tops, totals, values = [], [], []
    for at in _class_blocks(z):
        block, sink, picks, w, *parts = _cut(at, z, grad, target.classes, target.w, *gradient, target.idle)
        top = block.amax(1, keepdim=True)
        top = top if wide else top.to(target.dtype)
        e = torch.sub(block, top, out=sink if wide else None)
        value = e.gather(1, picks)
        gap = target.below(e) if label_smoothing > 0 else None
        total = _exponential(e).sum(1, keepdim=True)
        log_total = total.log()
        value = torch.sub(log_total, value, out=value)
        if w is not None:
            value = times(w, value) if careful else value.mul_(w)
        if gap is not None:
            value.mul_(1 - label_smoothing).add_((gap + target.class_mass * log_total) * target.smooth)
        if form_gradient:
            target.finish(e, total, picks, *parts)
            if not wide:
                sink.copy_(e)
        tops.append(top)
        totals.append(total)
        values.append(value)

    value = _join(values, z)
    losses = times(target.a, value) if careful else target.a * value
    if target.bad is not None:
        losses.masked_fill_(target.bad, math.nan)
    per_component = None
    if need_dweights:
        per_component = value if target.ignored is None else value.masked_fill_(target.ignored, 0)
        per_component = per_component.reshape(classes.shape)
    return _reduce(losses, mass, reduction, logits), mass, (_join(tops, z), _join(totals, z)), per_component, dlogits


def _by_row(stats, z):
    return [t.view(z.shape[0], 1, *z.shape[2:]) for t in stats]


def _scale_by_row(upstream, total):
    """An upstream gradient [] or [rows] as a number per row, as `total` is."""
    return upstream.to(total.dtype).expand(total.numel()).view(total.shape)


def soft_ce_bwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, mass, stats, upstream, formed):
    def form(upstream):
        z, like = _view(logits)
        top, total = _by_row(stats, z)
        target = Components(classes, weights, class_weight, ignore_index, label_smoothing, z, True)
        dlogits = torch.empty_like(like)
        grad = dlogits.view(z.shape)
        gradient = target.gradient(mass, _scale_by_row(upstream, total))
        for at in _class_blocks(z):
            block, sink, highest, *parts = _cut(at, z, grad, top, total, target.classes, *gradient, target.idle)
            e = torch.sub(block, highest, out=sink if z.dtype == top.dtype else None)  # as in the forward: the same bits
            sink.copy_(target.finish(_exponential(e), *parts))
        return dlogits

    return _with_upstream(form, logits, upstream, formed)


def _with_upstream(form, logits, upstream, formed):
    """The gradient that `form` makes for an upstream gradient [] or [rows], from what was formed for upstream 1 if that is
    there. Narrow ones are formed anew, to be rounded once; others are scaled in place, and if they are not there formed for
    upstream 1 first, so that every backward gives the same bits."""
    one = upstream.is_cpu and upstream.dim() == 0 and float(upstream) == 1
    if logits.dtype != accumulator(logits.dtype):
        return formed if formed is not None and one else form(upstream)
    formed = form(upstream.new_ones(())) if formed is None else formed
    if one:
        return formed
    rows, _ = _view(formed)
    if upstream.dim():
        upstream = upstream.view(rows.shape[0], 1, *rows.shape[2:])
    if upstream.is_cpu and bool(torch.isfinite(upstream).all()):
        rows.mul_(upstream)
    else:
        rows.copy_((rows * upstream).masked_fill_(rows == 0, 0))
    return formed


def _dense_target(t, class_weight, ignore_index, label_smoothing, dtype):
    """w*t' of a block [n, C, i]: t' = (1-e)*t + e/C, an ignored column counts as t = 0."""
    C = t.shape[1]
    t = t.to(dtype)
    if 0 <= ignore_index < C:
        t = t.clone()
        t[:, ignore_index] = 0
    t = t * (1 - label_smoothing) + label_smoothing / C if label_smoothing > 0 else t
    return t if class_weight is None else times(columns(class_weight, t), t)


class _Mixed:
    """The values of MixedRows, mixed block by block as a tensor is cut."""

    def __init__(self, values, lam, index, dtype):
        self.values, self.dtype = values, dtype
        index, known = safe_index(index, len(values))
        self.index = index
        self.lam = torch.where(known, lam.to(dtype), math.nan)

    def __getitem__(self, at):
        rows, *inner = (slice(None),) if at is ... else at if isinstance(at, tuple) else (at,)
        part = (slice(None), *inner)
        own, other = (t[part].to(self.dtype) for t in (self.values[rows], self.values[self.index[rows]]))
        lam = self.lam[rows].view(-1, *[1] * (own.dim() - 1))
        return times(lam, own).add_(times(1 - lam, other))


def _target_of(target, z, lam, index):
    """A dense target in the shape of z, or MixedRows."""
    t = target.reshape(z.shape)
    return t if lam is None else _Mixed(t, lam, index, accumulator(z.dtype))


def dense_ce_fwd(logits, target, class_weight, ignore_index, label_smoothing, reduction, form_gradient, lam=None, index=None):
    options = ignore_index, label_smoothing, reduction, form_gradient
    return _carefully(_dense_ce_fwd, logits, target, class_weight, *options, lam, index)


def _dense_ce_fwd(
    careful, logits, target, class_weight, ignore_index, label_smoothing, reduction, form_gradient, lam, index
):  # fmt: skip
    z, logits = _view(logits)
    t = _target_of(target, z, lam, index)
    divisor = z.numel() // z.shape[1] if reduction == "mean" else 1
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    tops, totals, losses = [], [], []
    for at in _class_blocks(z):
        block, sink = z[at], None if grad is None else grad[at]
        u = _dense_target(t[at], class_weight, ignore_index, label_smoothing, dtype)
        mass = u.sum(1, keepdim=True)
        top = block.amax(1, keepdim=True).to(dtype)
        e = torch.sub(block, top, out=sink if form_gradient and logits.dtype == dtype else None)
        gap = (times(u, e) if careful else u * e).sum(1, keepdim=True)
        total = _exponential(e).sum(1, keepdim=True)
        log_total = total.log()
        losses.append((times(mass, log_total) if careful else log_total.mul_(mass)).sub_(gap))
        tops.append(top)
        totals.append(total)
        if form_gradient:
            _dense_gradient(e, total, mass, u, divisor, careful)
            if e.dtype != logits.dtype:
                sink.copy_(e)
    loss = _reduce(_join(losses, z), divisor, reduction, logits)
    return loss, (_join(tops, z), _join(totals, z)), dlogits


def _dense_gradient(e, total, mass, u, divisor, careful):
    """A block's exponentials, in place, to its gradient; rows of targets that sum to 0 take none of them."""
    e *= mass / (total * divisor)
    if careful:
        e.masked_fill_(mass == 0, 0)
    return e.sub_(u, alpha=1 / max(divisor, 1))


def dense_ce_bwd(
    logits, target, class_weight, ignore_index, label_smoothing, reduction, stats, upstream, formed, need_dlogits, need_dtarget,
    lam=None, index=None,
):  # fmt: skip
    z, like = _view(logits)
    t = _target_of(target, z, lam, index)
    divisor = z.numel() // z.shape[1] if reduction == "mean" else 1
    top, total = _by_row(stats, z)

    def form(upstream):
        dlogits, upstream = torch.empty_like(like), _scale_by_row(upstream, total)
        for at in _class_blocks(z):
            sink = dlogits.view(z.shape)[at]
            e = torch.sub(z[at], top[at], out=sink if z.dtype == top.dtype else None)  # as in the forward: the same bits
            u = _dense_target(t[at], class_weight, ignore_index, label_smoothing, total.dtype)
            e = _dense_gradient(_exponential(e), total[at], u.sum(1, keepdim=True), u, divisor, True)
            sink.copy_((e * upstream[at]).masked_fill_(e == 0, 0))
        return dlogits

    def form_dtarget(upstream):
        dtarget = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        upstream = _scale_by_row(upstream, total)
        w = torch.ones(z.shape[1], dtype=total.dtype, device=z.device) if class_weight is None else class_weight.clone()
        if 0 <= ignore_index < len(w):
            w[ignore_index] = 0
        w = columns(w * (1 - label_smoothing), z)
        for at in _class_blocks(z):
            surprise = total[at].log() - (z[at] - top[at])
            dtarget.view(z.shape)[at] = times(w, surprise) * (upstream[at] / divisor)
        return dtarget

    dlogits = _with_upstream(form, logits, upstream, formed) if need_dlogits else None
    return dlogits, form_dtarget(upstream) if need_dtarget else None


# Divergences of K sets of logits [N, C]


def js_divergence_fwd(sources, scale, reduction, need, form_gradient):
    first = sources[0]
    losses = torch.empty(len(first), dtype=accumulator(first.dtype), device=first.device)
    gradients = _js_empty(sources, need) if form_gradient else None
    factor = scale / max(len(first), 1) if reduction == "mean" else scale
    for rows in _js_blocks(sources):
        losses[rows] = _js_block(sources, rows, gradients, factor)
    losses *= scale
    loss = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    return loss, (losses.new_empty(0),), gradients


def js_divergence_bwd(sources, scale, reduction, stats, upstream, formed, need):
    """As of the other losses (_with_upstream): narrow gradients are formed anew where upstream is not 1, others scaled."""
    first = sources[0]
    factor = scale / max(len(first), 1) if reduction == "mean" else scale
    dtype = accumulator(first.dtype)
    one = upstream.is_cpu and upstream.dim() == 0 and float(upstream) == 1
    wide = first.dtype == dtype
    upstream = upstream.to(dtype).expand(len(first)).unsqueeze(1)
    gradients = formed
    if formed is None or not (wide or one):
        gradients = _js_empty(sources, need) if formed is None else formed
        for rows in _js_blocks(sources):
            _js_block(sources, rows, gradients, factor if wide or one else upstream[rows] * factor)
    if wide and not one:
        for gradient in gradients:
            if gradient is not None:
                _scale(gradient, upstream)
    return gradients


def _scale(gradient, upstream):
    """Rows times an upstream gradient, in place; what is 0 stays 0."""
    if upstream.is_cpu and bool(torch.isfinite(upstream).all()):
        gradient.mul_(upstream)
    else:
        gradient.copy_((gradient * upstream).masked_fill_(gradient == 0, 0))


def _js_blocks(sources):
    return _blocks(len(sources[0]), len(sources) * sources[0][:1].numel() * 4, sources[0].device, JS_BLOCK_BYTES)


def _js_empty(sources, need):
    """Memory for the gradients: stacked for a stacked tensor, else a tuple with Nones where they are not needed."""
    if isinstance(need, bool):
        return torch.empty(sources.shape, dtype=sources.dtype, device=sources.device)
    make = partial(torch.empty, sources[0].shape, dtype=sources[0].dtype, device=sources[0].device)
    return tuple(make() if needed else None for needed in need)


def _js_block(sources, rows, gradients, factor):
    """Losses of some rows, and their gradients times factor (a number, or [n, 1]), if there is a place for them."""
    z = torch.stack([source[rows] for source in sources]).to(accumulator(sources[0].dtype))  # [K, n, C]
    top = z.amax(2, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(2, keepdim=True)
    p /= total
    m = p.mean(0)
    r = (p / m.clamp_min(torch.finfo(m.dtype).tiny)).masked_fill_(m == 0, 1)
    alike = (r.amin(2) > 0.8).logical_and_(r.amax(2) < 1.25).all(0)  # rows whose sets are
    at = alike.nonzero().view(-1) if alike.is_cpu else None
    if at is not None and len(at) == len(alike):
        losses, p, r, mean = _js_alike(z, top, total, m)
    else:
        r = r.log_().clamp_min_(-1e4)  # where p is 0: p*r is 0 as well
        mean = (p * r).sum(2, keepdim=True)
        losses = mean.mean(0).squeeze(1)
        if at is None:
            close = alike.view(-1, 1)
            exact = _js_alike(z, top, total, m)
            losses, p, r, mean = (
                torch.where(which, *pair)
                for which, *pair in zip((alike, close, close, close), exact, (losses, p, r, mean), strict=True)
            )
        elif len(at):
            losses[at], p[:, at], r[:, at], mean[:, at] = _js_alike(z[:, at], top[:, at], total[:, at], m[at])
    if gradients is not None:
        r.sub_(mean).mul_(p)
        factor = factor / len(r)
        for gradient, sink in zip(r, gradients, strict=True):
            if sink is not None:
                _scaled_into(sink[rows], gradient, factor)
    return losses


def _js_alike(z, top, total, m):
    """(losses, p, log p - log m, its mean under p) of rows whose sets are nearly equal, without a difference of numbers near 1:
    their logits are compared with the first set's, with the bits that z - top rounds off, and of the sums over classes it takes
    no more than a factor."""
    y = z - top
    back = y - z
    lost = (z - (y - back)) - (top + back)
    v = (y - y[0]).add_(lost.sub_(lost[0].clone())).expm1_()
    v.addcmul_(v + 1, total.amax(0) / total - 1).masked_fill_(m == 0, 0)
    mean = v.mean(0)
    u = v.sub_(mean).div_(mean.add_(1))  # p/m - 1
    p = torch.addcmul(m, m, u)
    r, excess = _js_logs(u)
    return excess.mul_(m).sum(2).mean(0), p, r, (p * r).sum(2, keepdim=True)


def _js_logs(u):
    """(log(1+u), (1+u)*log(1+u) - u) of small u by the series of 2*atanh(s), s = u/(2 + u): nothing cancels."""
    s = u / (u + 2)
    square = s * s
    terms = 9 if u.dtype == torch.float64 else 4
    P = torch.full_like(s, 1 / (2 * terms + 1))
    for n in range(terms - 1, 0, -1):
        P.mul_(square).add_(1 / (2 * n + 1))
    return (square * P).add_(1).mul_(s).mul_(2), s.add(square).mul_(P).add_(1).mul_(s).mul_(u)


def _scaled_into(sink, gradient, factor):
    if isinstance(factor, float) or (factor.is_cpu and bool(torch.isfinite(factor).all())):
        gradient = gradient.mul_(factor)
    else:
        gradient = (gradient * factor).masked_fill_(gradient == 0, 0)
    sink.copy_(gradient)


# The sigmoid loss. A K-hot target is one number for all classes but a few: those are computed by themselves, and put in their places.


def _softplus_rest(z):
    """log(1 + exp(-|z|)), what softplus(z) has beyond max(z, 0), as a new tensor."""
    return z.abs().mul_(-LOG2_E).exp2_().log1p_()


def _sigmoid_parts(z, positive, negative, weighted):
    """(loss, gradient) for weights of softplus(-z) and softplus(z), whose sum is 1 unless they are `weighted`; to the last bit also
    where they are small."""
    size, above = z.abs(), z > 0
    q = size.neg().exp_()
    u = torch.where(above, negative, positive)
    least, rest = q / (1 + q), q.log1p_()
    if weighted:
        both = positive + negative
        least, rest = times(both, least), times(both, rest)
    gap = u - least
    return times(u, size) + rest, torch.where(above, gap, -gap)


def _weighted_sides(t, w, p, product):
    """The weights of softplus(-z) and softplus(z) for a target t."""
    positive, negative = t if p is None else product(p, t), 1 - t
    return (positive, negative) if w is None else (product(w, positive), product(w, negative))


class _Sides:
    """These weights against blocks of logits, for a target t of theirs or one number. What is 0 or 1 throughout is None: `positive`
    where t is 0, `both`, their sum, without weights of classes."""

    def __init__(self, t, class_weight, pos_weight, careful):
        w, p = (None if weight is None else columns(weight, t) for weight in (class_weight, pos_weight))
        self.positive, self.negative = _weighted_sides(t, w, p, times if careful else torch.mul)
        self.both = None if w is None and p is None else self.positive + self.negative
        self.careful = careful
        if t.numel() == 1 and t.is_cpu and float(t) == 0:
            self.positive, self.negative = None, self.both

    def loss(self, z, room, but=None):
        """A block's loss by row, `but` some classes, with room for one number each."""

        def rest(values):
            return values if but is None else values.scatter_(1, but, 0)

        q = rest(torch.abs(z, out=room).mul_(-LOG2_E).exp2_())
        total = _log1p_sum(q) if self.both is None else self._times(self.both, q.log1p_()).sum(1, keepdim=True)
        total += rest(self._times(self.negative, torch.clamp(z, min=0, out=room))).sum(1, keepdim=True)
        if self.positive is not None:
            total += rest(self._times(self.positive, torch.clamp(z, max=0, out=room).neg_())).sum(1, keepdim=True)
        return total

    def gradient(self, z, scale, out):
        grad = self._times(self.both, torch.sigmoid(z, out=out))
        if self.positive is not None:
            grad -= self.positive
        return grad.mul_(scale)

    def _times(self, weight, values):
        """In place."""
        if weight is None:
            return values
        values *= weight
        return values.masked_fill_(weight == 0, 0) if self.careful else values


def _log1p_sum(q):
    """The sum over classes of log(1+q), for q in [0, 1] that are written over. (1+a)(1+b) = 1 + (a + a*b + b) rounds no small
    number off, and saves a logarithm."""
    for _ in range(3):
        half = q.shape[1] // 2
        low, high = q[:, :half], q[:, q.shape[1] - half :]
        low.addcmul_(low, high).add_(high)
        q = q[:, : q.shape[1] - half]
    return q.log1p_().sum(1, keepdim=True)


class _HotBce:
    """A K-hot target: `rest`, the weights of classes that it does not name; `picks`, those it names, in range, with their gradient;
    `loss`, theirs by row; `bad`, rows with a class out of range (None on the CPU)."""

    def __init__(self, z, classes, weights, class_weight, pos_weight, label_smoothing, threshold, careful):
        N, C, *inner = z.shape
        dtype, options = accumulator(z.dtype), (label_smoothing, label_smoothing / C, threshold)
        a = component_weights(classes, weights, dtype).reshape(N, classes.shape[1], *inner)
        classes = classes.reshape(a.shape)
        self.picks, self.bad = classes, None
        if not z.is_cpu:
            known = (classes >= 0) & (classes < C)
            self.picks, self.bad = torch.where(known, classes, 0), ~known.all(1, keepdim=True)
        times_named = 1
        if a.shape[1] > 1:  # a class that is named again counts once, with the sum of its weights
            same = self.picks.unsqueeze(1) == self.picks.unsqueeze(2)
            a, times_named = torch.where(same, a.unsqueeze(1), 0).sum(2), same.sum(2)
        self.z = z.gather(1, self.picks).to(dtype)
        self.weights = [None if w is None else w[self.picks] for w in (class_weight, pos_weight)]
        weights = _weighted_sides(smoothed(a, *options), *self.weights, times)
        weighted = class_weight is not None or pos_weight is not None
        losses, self.gradient = _sigmoid_parts(self.z, *weights, weighted)
        self.loss = (losses / times_named).sum(1, keepdim=True)
        none = torch.zeros([1] * z.dim(), dtype=dtype, device=z.device)
        self.rest = _Sides(smoothed(none, *options), class_weight, pos_weight, careful)

    def slope(self, label_smoothing, scale):
        slope = _bce_slope(self.z, *self.weights) * ((1 - label_smoothing) * scale)
        return slope if self.bad is None else slope.masked_fill_(self.bad, math.nan)


def _room_for(block, sink):
    """Memory for a number of each logit: where the gradient will be, if that may hold it."""
    return sink if sink is not None and sink.dtype == block.dtype else torch.empty_like(block)


def _bce_slope(z, w, p):
    """w*(p*softplus(-z) - softplus(z)): what the loss of a class gains by its target."""
    slope = -z
    if p is not None:
        rest = _softplus_rest(z)
        slope = times(p, slope.clamp_(min=0) + rest) - (z.clamp(min=0) + rest)
    return slope if w is None else times(w, slope)


def _bce_scale(z, class_reduction, reduction):
    """One over the number of terms in the means."""
    rows = z.numel() // z.shape[1]
    return 1 / max((z.shape[1] if class_reduction == "mean" else 1) * (rows if reduction == "mean" else 1), 1)


def _bce_loss(rows, reduction, z, logits):
    """Losses of rows, over the divisor of a mean, to the loss."""
    if reduction == "mean" and not z.numel():
        return rows.new_full((), math.nan)
    return _reduce(rows, 1, reduction, logits)


def soft_bce_fwd(
    logits, classes, weights, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, need_dweights,
    form_gradient,
):  # fmt: skip
    options = label_smoothing, threshold, class_reduction, reduction, need_dweights, form_gradient
    return _carefully(_soft_bce_fwd, logits, classes, weights, class_weight, pos_weight, *options)


def _soft_bce_fwd(
    careful, logits, classes, weights, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction,
    need_dweights, form_gradient,
):  # fmt: skip
    z, logits = _view(logits)
    target = _HotBce(z, classes, weights, class_weight, pos_weight, label_smoothing, threshold, careful)
    dtype, scale = accumulator(z.dtype), _bce_scale(z, class_reduction, reduction)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    rows = []
    for at in _class_blocks(z, BINARY_BLOCK_BYTES):
        block, sink, picks, gradient = _cut(at, z, grad, target.picks, target.gradient)
        block = block.to(dtype)
        rows.append(target.rest.loss(block, _room_for(block, sink), picks))
        if form_gradient:
            _hot_gradient(target, block, picks, gradient, scale, sink)
    rows = (_join(rows, z) + target.loss) * scale
    if target.bad is not None:
        rows.masked_fill_(target.bad, math.nan)
        if form_gradient:
            grad.masked_fill_(target.bad, math.nan)
    slope = target.slope(label_smoothing, scale).reshape(classes.shape) if need_dweights else None
    return _bce_loss(rows, reduction, z, logits), slope, dlogits


def _hot_gradient(target, block, picks, gradient, scale, sink, upstream=None):
    """A block's gradient into its place."""
    grad = target.rest.gradient(block, scale, sink if sink.dtype == block.dtype else None)
    grad.scatter_(1, picks, gradient * scale)
    if upstream is not None:
        grad = (grad * upstream).masked_fill_(grad == 0, 0)
    if grad is not sink:
        sink.copy_(grad)


def soft_bce_bwd(
    logits, classes, weights, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, upstream, formed
):
    def form(upstream):
        z, like = _view(logits)
        target = _HotBce(z, classes, weights, class_weight, pos_weight, label_smoothing, threshold, True)
        scale = _bce_scale(z, class_reduction, reduction)
        dlogits = torch.empty_like(like)
        grad, upstream = dlogits.view(z.shape), _upstream_of_rows(upstream, z)
        for at in _class_blocks(z, BINARY_BLOCK_BYTES):
            block, sink, up, picks, gradient = _cut(at, z, grad, upstream, target.picks, target.gradient)
            _hot_gradient(target, block.to(up.dtype), picks, gradient, scale, sink, up)
        if target.bad is not None:
            grad.masked_fill_(target.bad, math.nan)
        return dlogits

    return _with_upstream(form, logits, upstream, formed)


def _upstream_of_rows(upstream, z):
    """An upstream gradient [] or [rows] as a number per row of z."""
    shape = z.shape[0], 1, *z.shape[2:]
    return upstream.to(accumulator(z.dtype)).expand(math.prod(shape)).view(shape)


def dense_bce_fwd(
    logits, target, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, form_gradient
):
    options = label_smoothing, threshold, class_reduction, reduction, form_gradient
    return _carefully(_dense_bce_fwd, logits, target, class_weight, pos_weight, *options)


def _dense_bce_fwd(
    careful, logits, target, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, form_gradient
):
    z, logits = _view(logits)
    t, dtype, scale = target.reshape(z.shape), accumulator(z.dtype), _bce_scale(z, class_reduction, reduction)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    rows = []
    for at in _class_blocks(z, BINARY_BLOCK_BYTES):
        block, sink, weights = _cut(at, z, grad, t)
        block = block.to(dtype)
        weights = smoothed(weights.to(dtype), label_smoothing, label_smoothing / 2, threshold)
        weights = _Sides(weights, class_weight, pos_weight, careful)
        rows.append(weights.loss(block, _room_for(block, sink)))
        if form_gradient:
            formed = weights.gradient(block, scale, sink if z.dtype == dtype else None)
            if formed is not sink:
                sink.copy_(formed)
    return _bce_loss(_join(rows, z) * scale, reduction, z, logits), dlogits


def dense_bce_bwd(
    logits, target, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, upstream, formed,
    need_dlogits, need_dtarget,
):  # fmt: skip
    z, like = _view(logits)
    t, dtype, scale = target.reshape(z.shape), accumulator(z.dtype), _bce_scale(z, class_reduction, reduction)

    def form(upstream):
        dlogits = torch.empty_like(like)
        grad, upstream = dlogits.view(z.shape), _upstream_of_rows(upstream, z)
        for at in _class_blocks(z, BINARY_BLOCK_BYTES):
            block, sink, weights, up = _cut(at, z, grad, t, upstream)
            weights = smoothed(weights.to(dtype), label_smoothing, label_smoothing / 2, threshold)
            formed = _Sides(weights, class_weight, pos_weight, True).gradient(block.to(dtype), scale, None)
            sink.copy_((formed * up).masked_fill_(formed == 0, 0))
        return dlogits

    def form_dtarget(upstream):
        dtarget = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        upstream = _upstream_of_rows(upstream, z) * ((1 - label_smoothing) * scale)
        w, p = (None if weight is None else columns(weight, z) for weight in (class_weight, pos_weight))
        for at in _class_blocks(z, BINARY_BLOCK_BYTES):
            block, sink, up = _cut(at, z, dtarget.view(z.shape), upstream)
            sink.copy_(_bce_slope(block.to(dtype), w, p) * up)
        return dtarget

    dlogits = _with_upstream(form, logits, upstream, formed) if need_dlogits else None
    return dlogits, form_dtarget(upstream) if need_dtarget else None
