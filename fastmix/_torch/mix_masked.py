"""Mixing by a mask. A row's memory is seen as [A, lines, L]: a line holds the elements of all cells that are side by side along
the inner one of height and width, in runs of one cell; `per` lines belong to the same cells along the outer one.
"""

import math

import torch

from .._expressions import cell_weights, mix_masked_dmask_expression, mix_masked_dx_expression, mix_masked_expression
from . import sizes
from ._blocks import memory_order, row_blocks


class _Lines:
    """Rows of a layout (that of a dense tensor), under a mask [h, w]."""

    def __init__(self, like, mask):
        self.order = memory_order(like)
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
        if whole or row_bytes <= sizes.MIX_BLOCK_BYTES:
            return [
                (at, slice(0, self.count)) for at in row_blocks(rows, row_bytes, torch.device("cpu"), sizes.MIX_BLOCK_BYTES)
            ]
        step = max(1, sizes.MIX_BLOCK_BYTES * self.count // row_bytes)
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
    if x.numel() <= sizes.SMALL_BATCH and plan is None and partner_plan is None:
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
    """sink = weights*own + (1-weights)*partner, where a weight of 0 means that a value is not looked at; `shares` are those of
    the cells that the weights are made of."""
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
    small = g.numel() <= sizes.SMALL_BATCH or (g.is_contiguous() and g.nbytes <= 4 * sizes.MIX_BLOCK_BYTES)
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


from .._expressions import transported  # noqa: E402, F401

mix_masked_formula, mix_masked_dx_formula, mix_masked_dmask_formula = (
    mix_masked_expression,
    mix_masked_dx_expression,
    mix_masked_dmask_expression,
)
