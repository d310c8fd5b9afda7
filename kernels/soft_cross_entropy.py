"""Soft-label cross-entropy on K-hot targets: kernels and their launchers.

Per row, over the components (c_k, a_k) whose class is not ignored, smoothing e, class weights w:

    loss  = sum_k a_k * ((1-e)*w[c_k]*(lse - z[c_k]) + (e/C)*sum_c w[c]*(lse - z[c]))
    dz[c] = S*softmax(z)[c] - (1-e)*sum_k a_k*w[c_k]*[c = c_k] - (e/C)*A*w[c]
            with A = sum_k a_k and S = (1-e)*sum_k a_k*w[c_k] + (e/C)*A*sum_c w[c]

lse - z is evaluated as log(sum of exp(z - max)) + (max - z). Logits are seen as [O, C, I]: [N, C] is one outer with N inner
rows, [N, C, d1, ...] has N outer and d1*... inner. Row r = o*I + i of the loss. The gradient of a row is formed from its stats:
max; softmax_scale S/sum (0: every a_k is 0; NaN: a class is out of range); and with smoothing uniform_weight (e/C)*A.
Memory floor: logits read once, gradient written once, both in the forward. Rows beyond one tile are read twice: by one program, or
where they are few by a program for each part, whose sums the forward combines in their order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._class_tiles import (
    Rows,
    Strided,
    Sums,
    View,
    _add_to_sums,
    _col_count,
    _empty_sums,
    _exp_tile,
    _load_class_weight,
    _load_grad_output,
    _load_tile,
    _locate,
    _of_class,
    _program_rows,
    _prologue_len,
    _row_numbers,
    _store_tile,
    _tile_cols,
    shared_layout,
)
from ._launch import (
    FEW_COMPONENTS,
    LOOPED_OPTIONS,
    OPTIONS,
    PART_CLASSES,
    PART_WARPS,
    UNALIGNED_CLASSES,
    accumulator,
    are_few,
    blocks,
    class_parts,
    class_tile,
    exp,
    on_device_of,
    reduced,
    times,
)
from ._loss_mean import _add_losses, _denominator, _keep_loss, start_mean
from ._loss_targets import (
    _component,
    _component_ptrs,
    _few_components,
    _load_component,
    component_strides,
    k_hot_target,
)


class RowTotals(NamedTuple):
    """Sums over the components of the rows [ROWS]: the loss, S without smoothing, (e/C)*A; whether any a_k is not 0, any of what
    is subtracted from S*softmax is not 0, any class is out of range."""

    loss: tl.tensor
    hard_weight: tl.tensor
    uniform_weight: tl.tensor
    weighted: tl.tensor
    live: tl.tensor
    invalid: tl.tensor


class RowStats(NamedTuple):
    """Stats of the rows [ROWS], as above."""

    row_max: tl.tensor
    softmax_scale: tl.tensor
    uniform_weight: tl.tensor


@triton.jit
def _component_logit(component, z, z_rows, rows, tile):
    """Returns the logits of a component's class [ROWS]; z is the last tile of the rows."""
    if tile.PIXELS and tile.C <= tile.BLOCK_C:  # the tile holds it, and a gather would load a sector for each pixel
        zc = tl.sum(tl.where(tl.arange(0, tile.BLOCK_C)[None, :] == component.c[:, None], z, 0), 1)
    else:
        ptrs = z_rows.ptr + z_rows.offsets + component.c.to(tl.int64) * z_rows.column
        zc = tl.load(ptrs, mask=rows.mask, other=0).to(z.dtype)
    return zc


@triton.jit
def _add_component(totals, k, component, zc, sums, target, dweights, rows, C: tl.constexpr):
    """Returns the RowTotals with component k added, whose logits are zc; and stores its own loss if dweights is given."""
    e: tl.constexpr = target.SMOOTHING.value
    log_exp_sum = tl.log(sums.exp_sum)
    nll = (1 - e) * times(component.w, log_exp_sum + (sums.row_max - zc))
    hard = (1 - e) * component.a * component.w
    uniform_weight, live = totals.uniform_weight, totals.live | (hard != 0)
    if e > 0:
        # sum_c w[c]*(lse - z[c])
        nll += (e / C) * (sums.scaled_logit_sum + times(sums.weight_sum, log_exp_sum))
        uniform_weight += (e / C) * component.a
        live = live | (component.a != 0)
    if dweights is not None:
        tl.store(_component_ptrs(dweights, k, rows), tl.where(component.counted, nll, 0), mask=rows.mask)
    return RowTotals(
        totals.loss + times(component.a, nll),
        totals.hard_weight + hard,
        uniform_weight,
        totals.weighted | (component.a != 0),
        live,
        totals.invalid | component.out_of_range,
    )


@triton.jit
def _sum_tile(sums, z_rows, class_weight_ptr, rows, first, tile, WEIGHTED: tl.constexpr):
    """Returns a tile z of logits, exp(z - max), and the sums with it added."""
    DTYPE: tl.constexpr = sums.row_max.dtype
    _, col_mask, mask = _tile_cols(rows, first, tile)
    z = _load_tile(z_rows, rows, first, tile, float("-inf"), DTYPE)
    if class_weight_ptr is not None:
        w = _load_class_weight(class_weight_ptr, col_mask, rows, first, tile, DTYPE)
        sums, e = _add_to_sums(sums, z, w, None, mask, WEIGHTED)
    else:
        sums, e = _add_to_sums(sums, z, None, _col_count(rows, first, tile, DTYPE), mask, WEIGHTED)
    return z, e, sums


@triton.jit
def _combine_partials(partials_ptr, r, num_rows, row_mask, PARTS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the Sums of rows r [ROWS] from those of their parts, [4, rows, PARTS]."""
    part = tl.arange(0, BLOCK)[None, :]
    mask = row_mask[:, None] & (part < PARTS)
    ptrs = partials_ptr + r[:, None] * PARTS + part
    step = num_rows.to(tl.int64) * PARTS
    row_maxes = tl.load(ptrs, mask=mask, other=float("-inf")).to(DTYPE)
    weight_sums = tl.load(ptrs + 2 * step, mask=mask, other=0)
    row_max = tl.max(row_maxes, 1)
    # as in _add_to_sums: a maximum of -inf counts as 0
    shift = tl.where(row_max == float("-inf"), 0, row_max)
    exp_sum = tl.sum(tl.load(ptrs + step, mask=mask, other=0) * exp(row_maxes - shift[:, None]), 1)
    moved = times(weight_sums, shift[:, None] - tl.where(row_maxes == float("-inf"), 0, row_maxes))
    scaled_logit_sum = tl.sum(tl.load(ptrs + 3 * step, mask=mask, other=0) + moved, 1)
    return Sums(row_max, exp_sum, tl.sum(weight_sums, 1), scaled_logit_sum)


@triton.jit
def _subtract_component(addend, component, cols, rows, first, tile, SMOOTHING: tl.constexpr):
    """Returns what is added to S*softmax of a tile, with a component's part of it."""
    hard = ((1 - SMOOTHING) * component.a * component.w)[:, None]
    return tl.where(_of_class(component.c[:, None], cols, rows, first, tile), addend - hard, addend)


@triton.jit
def _gradient_tile(e, stats, components, target, class_weight_ptr, ignore_index, rows, first, tile):
    """Returns the gradient to a tile of logits z, of which e = exp(z - max), for a grad_output of 1."""
    DTYPE: tl.constexpr = e.dtype
    SMOOTHING: tl.constexpr = target.SMOOTHING.value
    cols, col_mask, _ = _tile_cols(rows, first, tile)
    addend = tl.zeros((tile.ROWS, 1), DTYPE)
    if SMOOTHING > 0:
        addend = -stats.uniform_weight[:, None]
        if class_weight_ptr is not None:
            addend *= _load_class_weight(class_weight_ptr, col_mask, rows, first, tile, DTYPE)
    if target.FEW:
        if not target.HELD:
            components = _few_components(target, class_weight_ptr, ignore_index, rows, tile.C, DTYPE)
        for k in tl.static_range(target.K):
            addend = _subtract_component(addend, _component(components, k), cols, rows, first, tile, SMOOTHING)
    # rows without weight may hold anything, even NaN: their gradient is 0
    softmax_scale = tl.broadcast_to(stats.softmax_scale[:, None], e.shape)
    grad = tl.fma(softmax_scale, tl.where(softmax_scale == 0, 0, e), tl.broadcast_to(addend, e.shape))
    if not target.FEW:
        for k in range(target.K):
            component = _load_component(k, target, class_weight_ptr, ignore_index, rows, tile.C, DTYPE)
            grad = _subtract_component(grad, component, cols, rows, first, tile, SMOOTHING)
    return grad


@triton.jit(do_not_specialize=["I", "num_rows"])
def _soft_ce_part_kernel(logits, class_weight_ptr, partials_ptr, I, num_rows, WEIGHTED: tl.constexpr, tile):
    """Sums over one part of a row's classes. Few rows of many classes would leave most of a GPU idle at a program each."""
    parts: tl.constexpr = (tile.C + tile.BLOCK_C - 1) // tile.BLOCK_C
    o, i, row_mask, z_rows = _program_rows(logits, tl.program_id(0) // parts, I, tile)
    first = (tl.program_id(0) % parts) * tile.BLOCK_C
    rows = Rows(o, i, row_mask, _prologue_len(z_rows, tile))
    sums = _empty_sums(tile.ROWS, partials_ptr.dtype.element_ty)
    # the outer `if` is compile-time, the inner one runs on the device: `and` would merge them
    if tile.VECTOR > 1:  # noqa: SIM102
        if first == 0:
            _, _, sums = _sum_tile(sums, z_rows, class_weight_ptr, rows, None, tile, WEIGHTED)
    _, _, sums = _sum_tile(sums, z_rows, class_weight_ptr, rows, first, tile, WEIGHTED)
    ptrs = partials_ptr + _row_numbers(o, i, I, tile) * parts + tl.program_id(0) % parts
    step = num_rows.to(tl.int64) * parts
    tl.store(ptrs, sums.row_max, mask=row_mask)
    tl.store(ptrs + step, sums.exp_sum, mask=row_mask)
    tl.store(ptrs + 2 * step, sums.weight_sum, mask=row_mask)
    tl.store(ptrs + 3 * step, sums.scaled_logit_sum, mask=row_mask)


@triton.jit(do_not_specialize=["I", "num_rows", "ignore_index", "denominator_parts"])
def _soft_ce_fwd_kernel(
    logits, partials_ptr, mean, denominator_parts, target, class_weight_ptr, ignore_index, loss_ptr, stats_ptr, dweights, dlogits,
    I, num_rows, PARTS: tl.constexpr, tile,
):  # fmt: skip
    """Loss and stats of rows, and their gradient if dlogits is given. With a mean all is over the denominator, and if it is ADDED
    the loss is the sum of the rows'. PARTS > 0: the sums over classes come from partials."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    C: tl.constexpr = tile.C.value
    e: tl.constexpr = target.SMOOTHING.value
    o, i, row_mask, z_rows = _program_rows(logits, tl.program_id(0), I, tile)
    r = _row_numbers(o, i, I, tile)
    rows = Rows(o, i, row_mask, _prologue_len(z_rows, tile))
    components = ()
    if target.HELD:
        components = _few_components(target, class_weight_ptr, ignore_index, rows, C, DTYPE)

    # 1. sums over the classes
    z = tl.zeros((tile.ROWS, tile.BLOCK_C), DTYPE)
    held = z
    sums = _empty_sums(tile.ROWS, DTYPE)
    if PARTS > 0:
        sums = _combine_partials(partials_ptr, r, num_rows, row_mask, PARTS, tile.BLOCK_C, DTYPE)
    else:
        if tile.VECTOR > 1:
            z_edge, _, sums = _sum_tile(sums, z_rows, class_weight_ptr, rows, None, tile, e > 0)
        for first in range(0, C, tile.BLOCK_C):
            z, held, sums = _sum_tile(sums, z_rows, class_weight_ptr, rows, first, tile, e > 0)

    # 2. the components
    zeros, no = tl.zeros((tile.ROWS,), DTYPE), row_mask != row_mask
    totals = RowTotals(zeros, zeros, zeros, no, no, no)
    if target.FEW:
        if not target.HELD:
            components = _few_components(target, class_weight_ptr, ignore_index, rows, C, DTYPE)
        for k in tl.static_range(target.K):
            component = _component(components, k)
            zc = _component_logit(component, z, z_rows, rows, tile)
            totals = _add_component(totals, k, component, zc, sums, target, dweights, rows, C)
    else:
        for k in range(target.K):
            component = _load_component(k, target, class_weight_ptr, ignore_index, rows, C, DTYPE)
            zc = _component_logit(component, z, z_rows, rows, tile)
            totals = _add_component(totals, k, component, zc, sums, target, dweights, rows, C)
    softmax_scale = (totals.hard_weight + totals.uniform_weight * sums.weight_sum) / sums.exp_sum
    softmax_scale = tl.where(totals.invalid, float("nan"), tl.where(totals.weighted, softmax_scale, 0))
    scale = 1.0
    if mean is not None:
        scale = 1.0 / _denominator(mean, denominator_parts)
    loss = tl.where(totals.invalid, float("nan"), totals.loss) * scale
    if mean is None:
        tl.store(loss_ptr + r, loss, mask=row_mask)
    elif mean.ADDED:
        _keep_loss(tl.sum(tl.where(row_mask, loss, 0), 0), mean)
    else:
        tl.store(loss_ptr + r, loss, mask=row_mask)
    tl.store(stats_ptr + r, sums.row_max, mask=row_mask)
    tl.store(stats_ptr + num_rows.to(tl.int64) + r, softmax_scale, mask=row_mask)
    if e > 0:
        tl.store(stats_ptr + 2 * num_rows.to(tl.int64) + r, totals.uniform_weight, mask=row_mask)

    # 3. the gradient
    if dlogits is not None:
        stats = RowStats(sums.row_max, softmax_scale, totals.uniform_weight)
        # the scale is infinite in a mean over nothing: rows without a gradient keep one of 0
        row_scale = tl.where(totals.live | totals.invalid, scale, 0)[:, None]
        dz_rows = _locate(dlogits, o, i, tile)
        for first in range(0, C, tile.BLOCK_C):
            if C > tile.BLOCK_C:  # else it still holds the row
                held = _exp_tile(z_rows, sums.row_max, rows, first, tile)
            elif tile.PIXELS:  # z was held for the components
                held = exp(z - sums.row_max[:, None])
            grad = _gradient_tile(held, stats, components, target, class_weight_ptr, ignore_index, rows, first, tile)
            _store_tile(dz_rows, grad * row_scale, rows, first, tile)
        if tile.VECTOR > 1:
            edge = exp(z_edge - sums.row_max[:, None])
            grad = _gradient_tile(edge, stats, components, target, class_weight_ptr, ignore_index, rows, None, tile)
            _store_tile(dz_rows, grad * row_scale, rows, None, tile)

    # 4. the sum of the losses
    if mean is not None:  # noqa: SIM102 (Triton 3.3 has no `and` for these)
        if mean.ADDED:
            _add_losses(mean, loss_ptr)


@triton.jit
def _scaled(grad, scale):
    """Returns a gradient times the scales [ROWS]. What is 0 stays 0: an infinite grad_output, as of an overflowing loss scale, must
    not make NaN of elements without a gradient."""
    return tl.where(grad == 0, 0, grad * scale[:, None])


@triton.jit(do_not_specialize=["I", "num_rows", "grad_output_stride", "ignore_index"])
def _soft_ce_bwd_kernel(
    logits, target, class_weight_ptr, ignore_index, denominator_ptr, stats_ptr, grad_output_ptr, dlogits,
    I, num_rows, grad_output_stride, GRAD_CACHED: tl.constexpr, tile,
):  # fmt: skip
    """One tile of the gradient, from the logits and the stats of the forward. grad_output (None: 1) is applied before the one
    rounding. GRAD_CACHED: dlogits holds the gradient for a grad_output of 1, and rows that have it are left alone."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    tiles: tl.constexpr = (tile.C + tile.BLOCK_C - 1) // tile.BLOCK_C
    o, i, row_mask, z_rows = _program_rows(logits, tl.program_id(0) // tiles, I, tile)
    r = _row_numbers(o, i, I, tile)
    grad_output, must_write = _load_grad_output(grad_output_ptr, r, grad_output_stride, row_mask, GRAD_CACHED, DTYPE)
    if must_write != 0:
        first = (tl.program_id(0) % tiles) * tile.BLOCK_C
        rows = Rows(o, i, row_mask, _prologue_len(z_rows, tile))
        components = _few_components(target, class_weight_ptr, ignore_index, rows, tile.C, DTYPE)
        row_max = tl.load(stats_ptr + r, mask=row_mask, other=0)
        softmax_scale = tl.load(stats_ptr + num_rows.to(tl.int64) + r, mask=row_mask, other=0)
        uniform_weight = softmax_scale  # not read without smoothing
        if target.SMOOTHING > 0:
            uniform_weight = tl.load(stats_ptr + 2 * num_rows.to(tl.int64) + r, mask=row_mask, other=0)
        if denominator_ptr is not None:
            grad_output /= tl.load(denominator_ptr)
        stats = RowStats(row_max, softmax_scale, uniform_weight)
        e = _exp_tile(z_rows, row_max, rows, first, tile)
        grad = _gradient_tile(e, stats, components, target, class_weight_ptr, ignore_index, rows, first, tile)
        dz_rows = _locate(dlogits, o, i, tile)
        _store_tile(dz_rows, _scaled(grad, grad_output), rows, first, tile)
        # the outer `if` is compile-time, the inner one runs on the device: `and` would merge them
        if tile.VECTOR > 1:  # noqa: SIM102
            if first == 0:
                edge = _exp_tile(z_rows, row_max, rows, None, tile)
                edge_grad = _gradient_tile(edge, stats, components, target, class_weight_ptr, ignore_index, rows, None, tile)
                _store_tile(dz_rows, _scaled(edge_grad, grad_output), rows, None, tile)


def soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    """logits [N, C, ...], weights [N, K] or classes' shape or None (ones), classes [N, K, ...] int64, class_weight [C] or None,
    options (ignore_index, label_smoothing, reduction) -> (loss; denominator [] of a mean, or None: 1; stats [2 or 3, rows] for
    soft_ce_bwd; each component's own loss, in classes' shape, or None; gradient to logits over the denominator, or None)."""
    ignore_index, smoothing, reduction = options
    view = View(logits)
    K = classes.shape[1]
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    stats = torch.empty((3 if smoothing > 0 else 2, view.rows), dtype=dtype, device=logits.device)
    dweights = torch.empty(classes.shape, dtype=dtype, device=logits.device) if need_dweights else None
    if not view.rows:
        loss = torch.empty((logits.shape[0], *logits.shape[2:]), dtype=dtype, device=logits.device)
        denominator = loss.sum() if reduction == "mean" else None
        return reduced(loss, reduction), denominator, stats, dweights, dlogits
    grad = View(dlogits) if form_gradient else view
    layout = shared_layout(view, grad)
    more = K > FEW_COMPONENTS or (smoothing > 0 and class_weight is not None)  # to keep in registers, beside a row
    long = K <= 2 and smoothing == 0 and class_weight is None and not are_few(view.rows)
    rows, columns, warps = class_tile(
        view.C, layout.pixels, layout.wide, layout.vector, logits.dtype,
        operands=2 if more else 1, smoothing=smoothing > 0, long=long,
    )  # fmt: skip
    held = view.C <= UNALIGNED_CLASSES and layout.vector == 1
    target = k_hot_target(classes, weights, smoothing, not layout.pixels, held)
    parts, partials = class_parts(view.rows, view.C, columns, layout.pixels), None
    if parts:
        partials = _part_sums(view, layout, dtype, parts, class_weight, smoothing > 0)
        rows, columns, warps = 1, triton.next_power_of_2(parts), 1
    programs, mean, denominator_parts = view.O * blocks(view.I, rows), None, 0
    if reduction == "mean":
        mean, denominator_parts = start_mean(view, dtype, target, class_weight, ignore_index, programs)
    added = mean is not None and mean.ADDED.value
    loss = torch.empty(() if added else (logits.shape[0], *logits.shape[2:]), dtype=dtype, device=logits.device)
    denominator = None if mean is None else mean.denominator
    whole = form_gradient and not parts
    looped = columns < view.C and not parts and dtype == torch.float32
    with on_device_of(logits):
        _soft_ce_fwd_kernel[(programs,)](
            layout.strided(0, view), partials, mean, denominator_parts, target, class_weight, ignore_index, loss, stats,
            None if dweights is None else Strided(dweights, *component_strides(dweights)),
            layout.strided(1, grad) if whole else None, layout.I, view.rows, parts, layout.tile(rows, columns),
            num_warps=warps, **(LOOPED_OPTIONS if looped else OPTIONS),
        )  # fmt: skip
    if form_gradient and parts:
        _launch_backward(view, grad, layout, target, class_weight, ignore_index, denominator, stats, None, False)
    return loss if added else reduced(loss, reduction), denominator, stats, dweights, dlogits


def _part_sums(view, layout, dtype, parts, class_weight, weighted):
    """The sums over the classes of each part of a row, [4, rows, parts]."""
    partials = torch.empty((4, view.rows, parts), dtype=dtype, device=view.tensor.device)
    with on_device_of(view.tensor):
        _soft_ce_part_kernel[(view.rows * parts,)](
            layout.strided(0, view), class_weight, partials, layout.I, view.rows, weighted, layout.tile(1, PART_CLASSES),
            num_warps=PART_WARPS, **OPTIONS,
        )  # fmt: skip
    return partials


def _launch_backward(view, grad, layout, target, class_weight, ignore_index, denominator, stats, grad_output, grad_cached):
    """Writes the gradient to view into grad, for grad_output [], [rows] or None: 1."""
    rows, columns, warps = class_tile(
        view.C, layout.pixels, layout.wide, layout.vector, view.tensor.dtype, whole=False
    )  # fmt: skip
    with on_device_of(view.tensor):
        _soft_ce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
            layout.strided(0, view), target, class_weight, ignore_index, denominator, stats, grad_output,
            layout.strided(1, grad), layout.I, view.rows,
            grad_output.stride(0) if grad_output is not None and grad_output.dim() else 0,
            grad_cached, layout.tile(rows, columns), num_warps=warps, **OPTIONS,
        )  # fmt: skip


def soft_ce_bwd(logits, weights, classes, class_weight, options, denominator, stats, grad_output, cached_grad):
    """Gradient to the logits from the stats of the forward; grad_output [] or [rows]. `cached_grad`: the gradient that the
    forward formed for a grad_output of 1, or None. It is returned, and where grad_output is not 1 written anew: that moves as
    many bytes as scaling it would, and rounds once."""
    grad_output = grad_output.resolve_neg()
    view = View(logits)
    dlogits = torch.empty_like(view.tensor) if cached_grad is None else cached_grad
    if view.rows:
        # as in the forward, whose bits these are
        grad = View(dlogits)
        layout = shared_layout(view, grad)
        target = k_hot_target(classes, weights, options.label_smoothing, not layout.pixels)
        _launch_backward(
            view, grad, layout, target, class_weight, options.ignore_index, denominator, stats, grad_output,
            cached_grad is not None,
        )  # fmt: skip
    return dlogits
