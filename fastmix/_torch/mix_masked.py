"""mix_masked: out[i, p] = m*x[i, own(p)] + (1-m)*x[index[i], other(p)], m = mask[i, cell of p], blocks moved by plans.

On top the formulas as plain differentiable torch operations, for any device, function transforms and second derivatives. Below
them the launchers, which on the CPU work block by block.
"""

import math

import torch

from . import sizes
from ._blocks import memory_order, row_blocks
from ._formulas import differentiable_times, per_row, safe_index, sum_at, weighted_pair


def mix_masked_formula(x, mask, index, plan, partner_plan):
    """Returns m*x + (1-m)*x[index], each with its blocks moved by its plan; rows with an index or plan out of range are NaN."""
    index, in_range, plan, partner_plan = _safe_plans(index, mask, plan, partner_plan)
    x_acc = x.to(mask.dtype)
    weights = cell_weights(mask, x.shape)
    mixed = weighted_pair(weights, transported(x_acc, plan, mask), transported(x_acc[index], partner_plan, mask))
    return torch.where(per_row(in_range, x), mixed, math.nan).to(x.dtype)


def mix_masked_dx_formula(grad_output, mask, index, plan, partner_plan):
    """Returns the gradient to x: m*grad_output and (1-m)*grad_output, added up where their values came from."""
    grad_acc = grad_output.to(mask.dtype)
    weights = cell_weights(mask, grad_output.shape)
    partner_weights = 1 - weights
    if plan is not None:  # blocks with an out-of-range plan entry get no gradient
        planned = ((plan >= 0) & (plan < plan.shape[1])).view(mask.shape)
        weights = weights.where(cell_weights(planned, grad_output.shape), 0)
    index, in_range, plan, partner_plan = _safe_plans(index, mask, plan, partner_plan)
    partner_weights = torch.where(per_row(in_range, grad_output), partner_weights, 0)
    dx = _transported_back(differentiable_times(weights, grad_acc), None, plan, mask)
    to_partners = differentiable_times(partner_weights, grad_acc)
    return (dx + _transported_back(to_partners, index, partner_plan, mask)).to(grad_output.dtype)


def mix_masked_dmask_formula(grad_output, x, mask, index, plan, partner_plan):
    """Returns the gradient to the mask: the sum over each cell of grad_output*(the row's value - the partner's)."""
    index, in_range, plan, partner_plan = _safe_plans(index, mask, plan, partner_plan)
    x_acc = x.to(mask.dtype)
    difference = transported(x_acc, plan, mask) - transported(x_acc[index], partner_plan, mask)
    (h, w), (height, width) = mask.shape[1:], _cell_size(mask, x.shape)
    product = grad_output.to(mask.dtype) * difference
    product = product.reshape(x.shape[0], math.prod(x.shape[1:-2]), h, height, w, width)
    return torch.where(in_range.view(-1, 1, 1), product.sum((1, 3, 5)), math.nan)


def cell_weights(mask, shape):
    """Returns the mask's [N, h, w] value at each pixel of images of this shape: [N, 1, ..., H, W]."""
    N, h, w = mask.shape
    height, width = _cell_size(mask, shape)
    return mask[:, :, None, :, None].expand(N, h, height, w, width).reshape(N, *[1] * (len(shape) - 3), *shape[-2:])


def transported(x, plan, mask):
    """Returns rows whose block b is block plan[b] of x."""
    if plan is None:
        return x
    source = _source_pixels(plan, mask, x.shape)
    source = source.view(x.shape[0], *[1] * (x.dim() - 3), source.shape[1])
    flat = x.reshape(*x.shape[:-2], source.shape[-1])
    return flat.gather(-1, source.expand(flat.shape)).reshape(x.shape)


def _transported_back(values, index, plan, mask):
    """Returns the transpose of taking rows `index` (None: all in order) and moving their blocks by the plan, of the values."""
    if plan is None:
        return values if index is None else sum_at(index, values)
    source = _source_pixels(plan, mask, values.shape)
    rows = torch.arange(values.shape[0], device=values.device) if index is None else index
    planes = math.prod(values.shape[1:-2])
    plane = rows.view(-1, 1, 1) * planes + torch.arange(planes, device=values.device).unsqueeze(1)  # [N, planes, 1]
    at = (plane * source.shape[1] + source.unsqueeze(1)).view(-1)
    return sum_at(at, values.reshape(-1)).reshape(values.shape)


def _source_pixels(plan, mask, shape):
    """Returns the pixel that each pixel comes from if block plan[b] goes to block b: numbers [N, H*W] within a plane."""
    h, w = mask.shape[1:]
    height, width = _cell_size(mask, shape)
    blocks = torch.arange(h * w, device=plan.device)
    first_pixel = blocks // w * (height * shape[-1]) + blocks % w * width
    cell = blocks.view(h, 1, w, 1).expand(h, height, w, width).reshape(-1)
    return torch.arange(len(cell), device=plan.device) - first_pixel[cell] + first_pixel[plan][:, cell]


def _cell_size(mask, shape):
    """Returns (height, width) of a cell in pixels."""
    return tuple(size // max(count, 1) for size, count in zip(shape[-2:], mask.shape[1:], strict=True))


def _safe_plans(index, mask, *plans):
    """Returns (index, rows whose partner and plans are in range, *plans), with 0 for what is out of range."""
    index, in_range = safe_index(index, mask.shape[0])
    safe = []
    for plan in plans:
        if plan is not None:
            plan, right = safe_index(plan, mask.shape[1] * mask.shape[2])
            in_range = in_range & right.all(1)
        safe.append(plan)
    return index, in_range, *safe


class _Lines:
    """A row's memory (in the layout of a dense tensor) seen as [planes, lines, line_len], under a mask [h, w].

    A line holds the elements of all cells that lie side by side along the inner one of height and width, `run` elements of
    each. `lines_per_cell` lines next to each other cross the same cells.
    """

    def __init__(self, like, mask):
        self.order = memory_order(like)
        order = list(range(like.dim())) if self.order is None else self.order
        numel, steps, step = math.prod(like.shape[1:]), {}, 1
        for d in reversed(order[1:]):
            steps[d] = step
            step *= like.shape[d]
        (h, w), last = mask.shape[1:], like.dim() - 1
        sides = [(steps[d] if like.shape[d] > 1 else numel, like.shape[d], n, d) for d, n in ((last, w), (last - 1, h))]
        (inner_step, inner_size, self.inner_cells, inner), (outer_step, outer_size, self.outer_cells, _) = sorted(sides)
        self.row_major = inner == last  # in memory, cells follow each other as in the mask
        line_len = inner_step * inner_size
        self.run = line_len // self.inner_cells
        self.lines = outer_step // line_len * outer_size
        self.lines_per_cell = self.lines // self.outer_cells
        self.shape = (numel // (line_len * self.lines), self.lines, line_len)
        self.runs_per_row = numel // self.run

    def in_order(self, t):
        """Returns t with its dimensions in the order of memory."""
        return t if self.order is None else t.permute(self.order)

    def as_lines(self, t):
        """Returns t [N, ...] as [N, planes, lines, line_len]: a copy only if t has another layout."""
        return self.in_order(t).contiguous().view(t.shape[0], *self.shape)

    def outer_first(self, cells):
        """Returns cells [n, h, w] as [n, outer_cells, inner_cells]; the same call leads back."""
        return cells if self.row_major else cells.transpose(1, 2)

    def blocks(self, N, whole):
        """Returns (rows, lines) slices of blocks that stay in the cache; all lines of each row if `whole`."""
        row_bytes = 4 * math.prod(self.shape)
        if whole or row_bytes <= sizes.MIX_BLOCK_BYTES:
            rows = row_blocks(N, row_bytes, torch.device("cpu"), sizes.MIX_BLOCK_BYTES)
            return [(some, slice(0, self.lines)) for some in rows]
        step = max(1, sizes.MIX_BLOCK_BYTES * self.lines // row_bytes)
        starts = range(0, self.lines, step)
        return [(slice(i, i + 1), slice(k, min(k + step, self.lines))) for i in range(N) for k in starts]

    def outer_cell(self, lines):
        """Returns which cell, counted along the outer side, each of these lines crosses."""
        return torch.arange(lines.start, lines.stop, device="cpu").div_(self.lines_per_cell, rounding_mode="floor")

    def element_weights(self, cells, lines):
        """Returns the values of cells [n, outer_cells, inner_cells] at the elements of these lines: [n, 1, lines, line_len]."""
        first = lines.start // self.lines_per_cell
        cells = cells[:, first : -(-lines.stop // self.lines_per_cell)]
        weights = cells.unsqueeze(-1).expand(*cells.shape, self.run).reshape(*cells.shape[:2], self.shape[2])
        weights = weights if self.lines_per_cell == 1 else weights.index_select(1, self.outer_cell(lines) - first)
        return weights.unsqueeze(1)

    def source_runs(self, plan, rows, lines):
        """Returns the runs that move to these lines by the plan, numbered through all rows: [n, planes, lines, inner_cells].

        `plan` holds the plans of the `rows` (their numbers, [n]).
        """
        outer, inner = self.outer_cells, self.inner_cells
        h, w = (outer, inner) if self.row_major else (inner, outer)
        plan = self.outer_first(plan.view(-1, h, w))
        y, x = plan.div(w, rounding_mode="floor"), plan.remainder(w)
        from_outer, from_inner = (y, x) if self.row_major else (x, y)
        step = (from_outer - torch.arange(outer, device="cpu").unsqueeze(1)) * (self.lines_per_cell * inner) + from_inner
        step = (
            step.index_select(1, self.outer_cell(lines))
            + torch.arange(lines.start, lines.stop, device="cpu").unsqueeze(1) * inner
        )
        planes = torch.arange(self.shape[0], device="cpu") * (self.lines * inner)
        return (rows * self.runs_per_row).view(-1, 1, 1, 1) + planes.view(-1, 1, 1) + step.unsqueeze(1)

    def take(self, t, rows, plan, lines):
        """Returns these lines of rows (a slice, or numbers if there is a plan) of t [N, planes, lines, line_len], moved."""
        if isinstance(rows, slice):
            return t[rows, :, lines]
        if plan is None and len(rows) == 1:  # a view: 1.3 times as fast as a copy, for a forward of images 3x224x224
            return t[int(rows) :][:1, :, lines]
        if plan is None:
            return t.index_select(0, rows)[:, :, lines]
        runs = t.view(-1, self.run).index_select(0, self.source_runs(plan, rows, lines).view(-1))
        return runs.view(len(rows), self.shape[0], -1, self.shape[2])


def mix_masked_fwd(x, mask, index, plan, partner_plan):
    """Returns the mixed batch, in the layout of x."""
    x = x.resolve_neg()
    out = torch.empty_like(x)
    if not x.is_cpu or not x.numel():
        return out.copy_(mix_masked_formula(x, mask, index, plan, partner_plan))
    if x.numel() <= sizes.SMALL_BATCH and plan is None and partner_plan is None:  # 1.7 to 2.4 times as fast as by lines
        _mix_masked_block(x, x[index], mask, cell_weights(mask, x.shape), out)
        return out
    lines = _Lines(out, mask)
    x_lines, cells = lines.as_lines(x), lines.outer_first(mask.resolve_neg())
    out_in_order = lines.in_order(out)
    is_dense = out_in_order.is_contiguous()
    mixed = (out_in_order if is_dense else torch.empty(out_in_order.shape, dtype=x.dtype, device="cpu")).view(x_lines.shape)
    numbers = torch.arange(x.shape[0], device="cpu")
    for rows, part in lines.blocks(x.shape[0], False):
        own = lines.take(x_lines, rows if plan is None else numbers[rows], None if plan is None else plan[rows], part)
        partner = lines.take(x_lines, index[rows], None if partner_plan is None else partner_plan[rows], part)
        weights = lines.element_weights(cells[rows], part)
        _mix_masked_block(own, partner, cells[rows], weights, mixed[rows, :, part])
    if not is_dense:
        out_in_order.copy_(mixed.view(out_in_order.shape))
    return out


def _mix_masked_block(own, partner, cells, weights, out):
    """Writes weights*own + (1-weights)*partner, where a value of weight 0 is not read. The weights are the cells' values."""
    low, high = cells.aminmax()
    some_copied = not (low > 0 and high < 1)  # weights that may be 0 or 1
    if some_copied and bool(((cells == 0) | (cells == 1)).all()):  # 1.5 times as fast as below, from 64 images of 3x32x32
        torch.where(weights == 1, own, partner, out=out)
        return
    is_narrow = out.dtype != weights.dtype
    if is_narrow:
        own, partner = own.to(weights.dtype), partner.to(weights.dtype)
    mixed = torch.mul(partner, 1 - weights, out=None if is_narrow else out).addcmul_(own, weights)  # as in mix.py
    if some_copied:
        torch.where(weights == 1, own, mixed, out=mixed)
        torch.where(weights == 0, partner, mixed, out=mixed)
    if is_narrow:
        out.copy_(mixed)


def mix_masked_bwd(grad_output, x, mask, index, plan, partner_plan, strides, need_dx, need_dmask):
    """Returns the gradients to x, in the strides of the mixed batch, and to the mask; None for one that is not needed."""
    dx = dmask = None
    mixing = mask, index, plan, partner_plan
    in_blocks = grad_output.is_cpu and grad_output.numel() > 0
    if need_dx:
        dx = torch.empty_strided(grad_output.shape, strides, dtype=grad_output.dtype, device=grad_output.device)
        if in_blocks:
            _dx_in_blocks(grad_output, *mixing, dx)
        else:
            dx.copy_(mix_masked_dx_formula(grad_output, *mixing))
    if need_dmask:
        dmask = (_dmask_in_blocks if in_blocks else mix_masked_dmask_formula)(grad_output, x, *mixing)
    return dx, dmask


def _dx_in_blocks(grad_output, mask, index, plan, partner_plan, dx):
    """Writes dx[i] = mask[i]*grad_output[i] + the sum over the k with index[k] = i of (1-mask[k])*grad_output[k].

    The sum is taken in the order of k. Values of weight 0 are not read.
    """
    N = len(dx)
    small = dx.numel() <= sizes.SMALL_BATCH or (grad_output.is_contiguous() and dx.nbytes <= 4 * sizes.MIX_BLOCK_BYTES)
    if small and plan is None and partner_plan is None:  # 3 times as fast as by lines on small batches, 1.4 at 3 MB
        weights = cell_weights(mask, dx.shape)
        total = (grad_output * weights).index_add_(0, index, grad_output * (1 - weights))
        if math.isfinite(total.sum()):
            dx.copy_(total)
            return
    lines = _Lines(dx, mask)
    grad_lines, cells = lines.as_lines(grad_output), lines.outer_first(mask.resolve_neg())
    dx_in_order = lines.in_order(dx)
    is_dense = dx_in_order.is_contiguous()
    dx_lines = dx_in_order.view(grad_lines.shape) if is_dense else torch.empty_like(grad_lines)
    targets, order = index.sort(stable=True)
    numbers = torch.arange(N, device="cpu")

    def weighted(rows, cells, part):
        """Returns rows (a slice, or numbers) of grad_output times the values of their cells."""
        weights = lines.element_weights(cells, part)
        product = lines.take(grad_lines, rows, None, part) * weights
        if not cells.amin() > 0 and not math.isfinite(product.sum()):  # NaN-safe from the start: 3 times as long
            product.masked_fill_(weights == 0, 0)
        return product

    def add(total, rows, at, cells, plan, part):
        """Adds the gradient that these rows send back to rows `at` of the block."""
        if plan is not None:
            product = weighted(rows, cells, part)
            runs = lines.source_runs(plan[rows], at, part).view(-1, 1).expand(-1, lines.run)
            total.view(-1, lines.run).scatter_add_(0, runs, product.view(-1, lines.run))
        else:
            total.index_add_(0, at, weighted(rows, cells, part))

    for rows, part in lines.blocks(N, plan is not None or partner_plan is not None):
        count = rows.stop - rows.start
        if plan is None:
            total = weighted(rows, cells[rows], part)
        else:
            total = grad_lines.new_zeros((count, *lines.shape), dtype=mask.dtype)
            add(total, rows, numbers[:count], cells[rows], plan, part)
        first, last = torch.searchsorted(targets, torch.tensor([rows.start, rows.stop], device="cpu")).tolist()
        for start in range(first, last, count):  # the rows whose partner is in this block, a block of them at a time
            k, at = (t[start : min(start + count, last)] for t in (order, targets))
            add(total, k, at - rows.start, 1 - cells.index_select(0, k), partner_plan, part)
        dx_lines[rows, :, part] = total
    if not is_dense:
        dx_in_order.copy_(dx_lines.view(dx_in_order.shape))


def _dmask_in_blocks(grad_output, x, mask, index, plan, partner_plan):
    """Returns the sums over each cell of grad_output*(the row's value - the partner's)."""
    lines = _Lines(torch.empty_like(x, device="meta"), mask)
    x_lines, grad_lines = lines.as_lines(x), lines.as_lines(grad_output)
    dmask = torch.zeros_like(lines.outer_first(mask), memory_format=torch.contiguous_format)
    numbers = torch.arange(len(x), device="cpu")
    for rows, part in lines.blocks(len(x), False):
        own = lines.take(x_lines, rows if plan is None else numbers[rows], None if plan is None else plan[rows], part)
        partner = lines.take(x_lines, index[rows], None if partner_plan is None else partner_plan[rows], part)
        product = own - partner if x.dtype == mask.dtype else own.to(mask.dtype) - partner.to(mask.dtype)
        product *= grad_lines[rows, :, part]
        sums = product.sum(1).unflatten(2, (lines.inner_cells, lines.run)).sum(3)  # [n, lines, inner_cells]
        dmask[rows].index_add_(1, lines.outer_cell(part), sums)
    return lines.outer_first(dmask).contiguous()
