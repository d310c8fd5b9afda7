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
    _class_cols,
    _empty_sums,
    _load_class_weight,
    _load_grad_output,
    _load_tile,
    _locate,
    _program_rows,
    _prologue_len,
    _row_numbers,
    _store_tile,
    _tile_cols,
    shared_layout,
)
from ._launch import (
    DENOMINATOR_PROGRAMS,
    DENOMINATOR_ROWS,
    DENOMINATOR_WARPS,
    OPTIONS,
    PART_CLASSES,
    PART_WARPS,
    accumulator,
    blocks,
    class_parts,
    class_tile,
    constants,
    on_device_of,
    reduced,
    times,
)


class KHotTarget(NamedTuple):
    """Class indices and weights (None: 1) of K components of each row."""

    classes: Strided
    weights: Strided | None
    K: tl.constexpr
    SMOOTHING: tl.constexpr


class RowStats(NamedTuple):
    """Stats of the rows [ROWS], as above, and the factor of their gradient: grad_output over the denominator."""

    row_max: tl.tensor
    softmax_scale: tl.tensor
    uniform_weight: tl.tensor
    scale: tl.tensor


@triton.jit
def _component_ptrs(tensor, k, rows):
    """Returns pointers to component k of the rows [ROWS]."""
    k = rows.o * 0 + k  # int64, as addresses are
    return tensor.ptr + rows.o * tensor.outer + rows.i * tensor.inner + k * tensor.column


@triton.jit
def _load_component(k, target, class_weight_ptr, ignore_index, rows, C: tl.constexpr, DTYPE: tl.constexpr):
    """Returns component k of the rows: its class, 0 if ignored or out of range; a_k, 0 if ignored; w[c_k]; whether it is not
    ignored; and whether its class is out of range."""
    c = tl.load(_component_ptrs(target.classes, k, rows), mask=rows.mask, other=0)
    counted = rows.mask & (c != ignore_index)
    known = (c >= 0) & (c < C)
    # class 0 in place of a class that has no logit and no weight to load
    c = tl.where(counted & known, c, 0)
    if target.weights is not None:
        a = tl.load(_component_ptrs(target.weights, k, rows), mask=counted, other=0).to(DTYPE)
    else:
        a = counted.to(DTYPE)
    if class_weight_ptr is not None:
        w = tl.load(class_weight_ptr + c, mask=rows.mask, other=0).to(DTYPE)
    else:
        w = rows.mask.to(DTYPE)
    return c, a, w, counted, counted & (known == 0)


@triton.jit
def _sum_tile(sums, z_rows, class_weight_ptr, rows, first, tile, WEIGHTED: tl.constexpr):
    """Returns a tile of logits, and the sums with it added."""
    DTYPE: tl.constexpr = sums.row_max.dtype
    cols, col_mask, mask = _tile_cols(rows, first, tile)
    z = _load_tile(z_rows, rows, first, tile, float("-inf"), DTYPE)
    w = _load_class_weight(class_weight_ptr, col_mask, rows, first, tile, DTYPE)
    return z, _add_to_sums(sums, z, w, mask, WEIGHTED)


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
    exp_sum = tl.sum(tl.load(ptrs + step, mask=mask, other=0) * tl.exp(row_maxes - shift[:, None]), 1)
    moved = times(weight_sums, shift[:, None] - tl.where(row_maxes == float("-inf"), 0, row_maxes))
    scaled_logit_sum = tl.sum(tl.load(ptrs + 3 * step, mask=mask, other=0) + moved, 1)
    return Sums(row_max, exp_sum, tl.sum(weight_sums, 1), scaled_logit_sum)


@triton.jit
def _gradient_tile(z, stats, target, class_weight_ptr, ignore_index, rows, first, tile):
    """Returns the gradient to a tile z of logits. What is 0 stays 0 whatever the scale."""
    DTYPE: tl.constexpr = stats.row_max.dtype
    e: tl.constexpr = target.SMOOTHING.value
    cols, col_mask, _ = _tile_cols(rows, first, tile)
    grad = times(stats.softmax_scale[:, None], tl.exp(z - stats.row_max[:, None]))
    for k in range(target.K):
        c, a, w, counted, out_of_range = _load_component(k, target, class_weight_ptr, ignore_index, rows, tile.C, DTYPE)
        grad -= tl.where(cols == _class_cols(c[:, None], rows, first, tile), ((1 - e) * a * w)[:, None], 0)
    if e > 0:
        if class_weight_ptr is not None:
            grad -= stats.uniform_weight[:, None] * _load_class_weight(class_weight_ptr, col_mask, rows, first, tile, DTYPE)
        else:
            grad -= stats.uniform_weight[:, None]
    # an infinite grad_output, as of an overflowing loss scale, must not make NaN of elements without a gradient
    return tl.where(grad == 0, 0, grad * stats.scale)


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
            edge_z, sums = _sum_tile(sums, z_rows, class_weight_ptr, rows, None, tile, WEIGHTED)
    z, sums = _sum_tile(sums, z_rows, class_weight_ptr, rows, first, tile, WEIGHTED)
    ptrs = partials_ptr + _row_numbers(o, i, I, tile) * parts + tl.program_id(0) % parts
    step = num_rows.to(tl.int64) * parts
    tl.store(ptrs, sums.row_max, mask=row_mask)
    tl.store(ptrs + step, sums.exp_sum, mask=row_mask)
    tl.store(ptrs + 2 * step, sums.weight_sum, mask=row_mask)
    tl.store(ptrs + 3 * step, sums.scaled_logit_sum, mask=row_mask)


@triton.jit(do_not_specialize=["I", "num_rows", "ignore_index"])
def _soft_ce_fwd_kernel(
    logits, partials_ptr, denominator_ptr, target, class_weight_ptr, ignore_index, loss_ptr, stats_ptr, dweights_ptr, dlogits,
    I, num_rows, PARTS: tl.constexpr, tile,
):  # fmt: skip
    """Loss and stats of rows, and their gradient if dlogits is given. PARTS > 0: the sums over classes come from partials."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    C: tl.constexpr = tile.C.value
    e: tl.constexpr = target.SMOOTHING.value
    o, i, row_mask, z_rows = _program_rows(logits, tl.program_id(0), I, tile)
    r = _row_numbers(o, i, I, tile)

    # 1. sums over the classes
    rows = Rows(o, i, row_mask, _prologue_len(z_rows, tile))
    z = tl.zeros((tile.ROWS, tile.BLOCK_C), DTYPE)
    sums = _empty_sums(tile.ROWS, DTYPE)
    if PARTS > 0:
        sums = _combine_partials(partials_ptr, r, num_rows, row_mask, PARTS, tile.BLOCK_C, DTYPE)
    else:
        if tile.VECTOR > 1:
            edge_z, sums = _sum_tile(sums, z_rows, class_weight_ptr, rows, None, tile, e > 0)
        for first in range(0, C, tile.BLOCK_C):
            z, sums = _sum_tile(sums, z_rows, class_weight_ptr, rows, first, tile, e > 0)
    log_exp_sum = tl.log(sums.exp_sum)
    nll_sum = sums.scaled_logit_sum + times(sums.weight_sum, log_exp_sum)  # sum_c w[c]*(lse - z[c])

    # 2. the components
    loss = tl.zeros((tile.ROWS,), DTYPE)
    softmax_scale = tl.zeros((tile.ROWS,), DTYPE)
    uniform_weight = tl.zeros((tile.ROWS,), DTYPE)
    weighted = tl.zeros((tile.ROWS,), tl.int32)
    invalid = tl.zeros((tile.ROWS,), tl.int32)
    for k in range(target.K):
        c, a, w, counted, out_of_range = _load_component(k, target, class_weight_ptr, ignore_index, rows, C, DTYPE)
        if tile.PIXELS and C <= tile.BLOCK_C:  # the tile holds it, and a gather would load a sector for each pixel
            zc = tl.sum(tl.where(tl.arange(0, tile.BLOCK_C)[None, :] == c[:, None], z, 0), 1)
        else:
            zc = tl.load(z_rows.ptr + z_rows.offsets + c * z_rows.column, mask=row_mask, other=0).to(DTYPE)
        nll = (1 - e) * times(w, log_exp_sum + (sums.row_max - zc))
        if e > 0:
            nll += (e / C) * nll_sum
            uniform_weight += (e / C) * a
        if dweights_ptr is not None:
            inner_size = I * tile.ALIGN if tile.PIXELS else I
            tl.store(dweights_ptr + (o * target.K + k) * inner_size + i, tl.where(counted, nll, 0), mask=row_mask)
        loss += times(a, nll)
        softmax_scale += (1 - e) * a * w
        weighted |= (a != 0).to(tl.int32)
        invalid |= out_of_range.to(tl.int32)
    # rows without weight may hold anything, even NaN: their gradient is 0
    softmax_scale = tl.where(weighted != 0, (softmax_scale + uniform_weight * sums.weight_sum) / sums.exp_sum, 0)
    softmax_scale = tl.where(invalid != 0, float("nan"), softmax_scale)
    loss = tl.where(invalid != 0, float("nan"), loss)
    scale = 1.0
    if denominator_ptr is not None:
        scale = 1.0 / tl.load(denominator_ptr)
    tl.store(loss_ptr + r, loss * scale, mask=row_mask)
    tl.store(stats_ptr + r, sums.row_max, mask=row_mask)
    tl.store(stats_ptr + num_rows.to(tl.int64) + r, softmax_scale, mask=row_mask)
    if e > 0:
        tl.store(stats_ptr + 2 * num_rows.to(tl.int64) + r, uniform_weight, mask=row_mask)

    # 3. the gradient
    if dlogits is not None:
        stats = RowStats(sums.row_max, softmax_scale, uniform_weight, scale)
        dz_rows = _locate(dlogits, o, i, tile)
        # equal to the logits' prologues, but computed anew: kept, they would occupy registers throughout
        rows = Rows(o, i, row_mask, _prologue_len(dz_rows, tile))
        for first in range(0, C, tile.BLOCK_C):
            if C > tile.BLOCK_C:  # else z still holds the row
                z = _load_tile(z_rows, rows, first, tile, 0, DTYPE)
            grad = _gradient_tile(z, stats, target, class_weight_ptr, ignore_index, rows, first, tile)
            _store_tile(dz_rows, grad, rows, first, tile)
        if tile.VECTOR > 1:
            edge_z = _load_tile(z_rows, rows, None, tile, 0, DTYPE)
            edge_grad = _gradient_tile(edge_z, stats, target, class_weight_ptr, ignore_index, rows, None, tile)
            _store_tile(dz_rows, edge_grad, rows, None, tile)


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
        z = _load_tile(z_rows, rows, first, tile, 0, DTYPE)
        row_max = tl.load(stats_ptr + r, mask=row_mask, other=0)
        softmax_scale = tl.load(stats_ptr + num_rows.to(tl.int64) + r, mask=row_mask, other=0)
        uniform_weight = softmax_scale  # not read without smoothing
        if target.SMOOTHING > 0:
            uniform_weight = tl.load(stats_ptr + 2 * num_rows.to(tl.int64) + r, mask=row_mask, other=0)
        scale = grad_output[:, None]
        if denominator_ptr is not None:
            scale /= tl.load(denominator_ptr)
        stats = RowStats(row_max, softmax_scale, uniform_weight, scale)
        grad = _gradient_tile(z, stats, target, class_weight_ptr, ignore_index, rows, first, tile)
        dz_rows = _locate(dlogits, o, i, tile)
        _store_tile(dz_rows, grad, rows, first, tile)
        # the outer `if` is compile-time, the inner one runs on the device: `and` would merge them
        if tile.VECTOR > 1:  # noqa: SIM102
            if first == 0:
                edge_z = _load_tile(z_rows, rows, None, tile, 0, DTYPE)
                edge_grad = _gradient_tile(edge_z, stats, target, class_weight_ptr, ignore_index, rows, None, tile)
                _store_tile(dz_rows, edge_grad, rows, None, tile)


@triton.jit(do_not_specialize=["I", "num_rows", "ignore_index"])
def _mass_kernel(
    target, class_weight_ptr, ignore_index, partials_ptr, I, num_rows, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """This program's part of the denominator D = sum of a_k*w[c_k] over all rows and components that are not ignored."""
    DTYPE: tl.constexpr = partials_ptr.dtype.element_ty
    weight_sum = tl.zeros((BLOCK,), DTYPE)
    # a fixed number of programs, and int64: rows may be more than 2**31
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
        r = first + tl.arange(0, BLOCK)
        rows = Rows(r // I, r % I, r < num_rows, r)  # the last, for the prologue, is not read
        for k in range(target.K):
            c, a, w, counted, out_of_range = _load_component(k, target, class_weight_ptr, ignore_index, rows, C, DTYPE)
            weight_sum += a * w
    tl.store(partials_ptr + tl.program_id(0), tl.sum(weight_sum, 0))


def component_strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Strides of contiguous classes or weights [N, K] or [N, K, d1, ...] over outer, component and inner."""
    if t.dim() == 2:
        return 0, t.stride(1), t.stride(0)
    return t.stride(0), t.stride(1), t.stride(-1)


def k_hot_target(classes, weights, label_smoothing) -> KHotTarget:
    """The target as kernels take it. Weights of [N, K] are the same for all inner rows of an outer one."""
    K, smoothing = constants(classes.shape[1], float(label_smoothing))
    classes = classes.contiguous()
    strided = Strided(classes, *component_strides(classes))
    if weights is None:
        return KHotTarget(strided, None, K, smoothing)
    weights = weights.resolve_neg()
    if weights.dim() == 2 and classes.dim() > 2:
        return KHotTarget(strided, Strided(weights, weights.stride(0), weights.stride(1), 0), K, smoothing)
    weights = weights.contiguous()
    return KHotTarget(strided, Strided(weights, *component_strides(weights)), K, smoothing)


def _mean_denominator(view, dtype, target, class_weight, ignore_index):
    """D, the denominator of reduction="mean": a scalar tensor."""
    programs = min(blocks(view.rows, DENOMINATOR_ROWS), DENOMINATOR_PROGRAMS)
    partials = torch.empty(() if programs == 1 else programs, dtype=dtype, device=view.tensor.device)
    if programs:
        with on_device_of(view.tensor):
            _mass_kernel[(programs,)](
                target, class_weight, ignore_index, partials, view.I, view.rows, view.C, DENOMINATOR_ROWS,
                num_warps=DENOMINATOR_WARPS, **OPTIONS,
            )  # fmt: skip
    return partials if programs == 1 else partials.sum()


def soft_ce_fwd(logits, weights, classes, class_weight, options, need_dweights, form_gradient):
    """logits [N, C, ...], weights [N, K] or classes' shape or None (ones), classes [N, K, ...] int64, class_weight [C] or None,
    options (ignore_index, label_smoothing, reduction) -> (loss; denominator [] of a mean, or None: 1; stats [2 or 3, rows] for
    soft_ce_bwd; each component's own loss, in classes' shape, or None; gradient to logits over the denominator, or None)."""
    ignore_index, label_smoothing, reduction = options
    view = View(logits)
    K = classes.shape[1]
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    loss = torch.empty((logits.shape[0], *logits.shape[2:]), dtype=dtype, device=logits.device)
    stats = torch.empty((3 if label_smoothing > 0 else 2, view.rows), dtype=dtype, device=logits.device)
    dweights = torch.empty((view.O, K, view.I), dtype=dtype, device=logits.device) if need_dweights else None
    target = k_hot_target(classes, weights, label_smoothing)
    denominator = _mean_denominator(view, dtype, target, class_weight, ignore_index) if reduction == "mean" else None
    if view.rows:
        grad = View(dlogits) if form_gradient else view
        layout = shared_layout(view, grad)
        more = K > 4 or (label_smoothing > 0 and class_weight is not None)  # to keep in registers, beside a row
        rows, columns, warps = class_tile(
            view.C, layout.pixels, layout.wide, layout.vector, logits.dtype,
            operands=2 if more else 1, smoothing=label_smoothing > 0,
        )  # fmt: skip
        parts, partials = class_parts(view.rows, view.C, columns, layout.pixels), None
        if parts:
            partials = _part_sums(view, layout, dtype, parts, class_weight, label_smoothing > 0)
            rows, columns, warps = 1, triton.next_power_of_2(parts), 1
        whole = form_gradient and not parts
        with on_device_of(logits):
            _soft_ce_fwd_kernel[(view.O * blocks(view.I, rows),)](
                layout.strided(0, view), partials, denominator, target, class_weight, ignore_index, loss, stats, dweights,
                layout.strided(1, grad) if whole else None, layout.I, view.rows, parts, layout.tile(rows, columns),
                num_warps=warps, **OPTIONS,
            )  # fmt: skip
        if form_gradient and parts:
            _launch_backward(view, grad, target, class_weight, ignore_index, denominator, stats, None, False)
    if need_dweights:
        dweights = dweights[0].t() if logits.dim() == 2 else dweights.view(classes.shape)
    return reduced(loss, reduction), denominator, stats, dweights, dlogits


def _part_sums(view, layout, dtype, parts, class_weight, weighted):
    """The sums over the classes of each part of a row, [4, rows, parts]."""
    partials = torch.empty((4, view.rows, parts), dtype=dtype, device=view.tensor.device)
    with on_device_of(view.tensor):
        _soft_ce_part_kernel[(view.rows * parts,)](
            layout.strided(0, view), class_weight, partials, layout.I, view.rows, weighted, layout.tile(1, PART_CLASSES),
            num_warps=PART_WARPS, **OPTIONS,
        )  # fmt: skip
    return partials


def _launch_backward(view, grad, target, class_weight, ignore_index, denominator, stats, grad_output, grad_cached):
    """Writes the gradient to view into grad, for grad_output [], [rows] or None: 1."""
    layout = shared_layout(view, grad)
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
        target = k_hot_target(classes, weights, options.label_smoothing)
        _launch_backward(
            view, View(dlogits), target, class_weight, options.ignore_index, denominator, stats, grad_output,
            cached_grad is not None,
        )  # fmt: skip
    return dlogits
