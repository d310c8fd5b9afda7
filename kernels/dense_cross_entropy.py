"""Cross-entropy on dense target probabilities t [N, C, ...]: kernels and their launchers.

    t'    = (1-e)*t + e/C          (an ignored column counts as t = 0)
    loss  = sum_c w[c]*t'[c]*(lse - z[c])
    dz[c] = softmax(z)[c] * sum_b w[b]*t'[b] - w[c]*t'[c]
    dt[c] = (1-e)*w[c]*(lse - z[c])

MixedRows: t[n] = lam[n]*v[n] + (1-lam[n])*v[index[n]] of given values v, which are mixed where they are read. A value of weight 0
is not read, and a partner out of range makes its row NaN. There is no dt then.

Logits are seen as in soft_cross_entropy. The stats of a row are max, softmax_scale sum(w*t')/sum, log(sum).
Memory floor: logits and target read once, gradient written once, in the forward; dt one pass of its own.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._class_tiles import (
    Rows,
    View,
    _add_to_sums,
    _backward_rows,
    _cast_to,
    _class_cols,
    _empty_sums,
    _exp_tile,
    _load_class_weight,
    _load_tile,
    _locate,
    _program_rows,
    _prologue_len,
    _row_numbers,
    _store_tile,
    _tile_cols,
    _tile_ptrs,
    backward_outputs,
    shared_layout,
)
from ._launch import (
    OPTIONS,
    accumulator,
    blocks,
    class_tile,
    exp,
    on_device_of,
    reduced,
    times,
)
from ._loss_targets import _load_target, _locate_target, dense_target


class DenseRowStats(NamedTuple):
    """Stats of the rows [ROWS], as above; the factor of their gradients; and whether dlogits must be written."""

    row_max: tl.tensor
    softmax_scale: tl.tensor
    log_exp_sum: tl.tensor
    scale: tl.tensor
    must_write: tl.tensor


@triton.jit
def _weighted_target(target, t_rows, class_weight_ptr, ignore_index, rows, first, tile, DTYPE: tl.constexpr):
    """Returns w*t' of a tile, 0 where masked."""
    C: tl.constexpr = tile.C.value
    e: tl.constexpr = target.SMOOTHING.value
    t = _load_target(target, t_rows, rows, first, tile, DTYPE)
    cols, _, mask = _tile_cols(rows, first, tile)
    # the ignored column is no part of the mask: a mask that cuts vectors would narrow the loads
    t = tl.where(cols == _class_cols(ignore_index, rows, first, tile), 0, t)
    u = tl.where(mask, (1 - e) * t + e / C, 0)
    if class_weight_ptr is not None:
        u = times(_load_class_weight(class_weight_ptr, mask, rows, first, tile, DTYPE), u)
    return u


@triton.jit
def _sum_dense_tile(sums, z_rows, target, t_rows, class_weight_ptr, ignore_index, rows, first, tile):
    """Returns exp(z - max) and w*t' of a tile, and the sums with it added."""
    DTYPE: tl.constexpr = sums.row_max.dtype
    z = _load_tile(z_rows, rows, first, tile, float("-inf"), DTYPE)
    u = _weighted_target(target, t_rows, class_weight_ptr, ignore_index, rows, first, tile, DTYPE)
    _, _, mask = _tile_cols(rows, first, tile)
    sums, e = _add_to_sums(sums, z, u, None, mask, True)
    return e, u, sums


@triton.jit
def _minus_gradient(e, u, softmax_scale):
    """Returns minus the gradient to logits z, of which e = exp(z - max), with weighted targets u, for a grad_output of 1."""
    softmax_scale = tl.broadcast_to(-softmax_scale[:, None], e.shape)
    return tl.fma(softmax_scale, tl.where(softmax_scale == 0, 0, e), u)  # -u would be an instruction of its own


@triton.jit(do_not_specialize=["I", "num_rows", "N", "lam_stride", "ignore_index", "denominator"])
def _dense_ce_fwd_kernel(
    logits, target, class_weight_ptr, ignore_index, denominator, loss_ptr, stats_ptr, dlogits,
    I, num_rows, N, lam_stride, tile,
):  # fmt: skip
    """Loss and stats of rows, and their gradient if dlogits is given."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    C: tl.constexpr = tile.C.value
    o, i, row_mask, z_rows = _program_rows(logits, tl.program_id(0), I, tile)
    r = _row_numbers(o, i, I, tile)
    t_rows = _locate_target(target, o, i, row_mask, lam_stride, N, tile, DTYPE)

    # 1. sums over the classes
    rows = Rows(o, i, row_mask, _prologue_len(z_rows, tile))
    sums = _empty_sums(tile.ROWS, DTYPE)
    if tile.VECTOR > 1:
        _, _, sums = _sum_dense_tile(sums, z_rows, target, t_rows, class_weight_ptr, ignore_index, rows, None, tile)
    e = tl.zeros((tile.ROWS, tile.BLOCK_C), DTYPE)
    u = tl.zeros((tile.ROWS, tile.BLOCK_C), DTYPE)
    for first in range(0, C, tile.BLOCK_C):
        e, u, sums = _sum_dense_tile(sums, z_rows, target, t_rows, class_weight_ptr, ignore_index, rows, first, tile)

    # 2. loss and stats
    log_exp_sum = tl.log(sums.exp_sum)
    # rows without weight may hold anything, even NaN: their gradient is 0
    softmax_scale = tl.where(sums.weight_sum == 0, 0, sums.weight_sum / sums.exp_sum)
    scale = 1.0 / denominator.to(DTYPE)

    # 3. the gradient
    if dlogits is not None:
        dz_rows = _locate(dlogits, o, i, tile)
        # equal to the logits' prologues, but computed anew: kept, they would occupy registers throughout
        rows = Rows(o, i, row_mask, _prologue_len(dz_rows, tile))
        for first in range(0, C, tile.BLOCK_C):
            if C > tile.BLOCK_C:  # else e and u still hold the row
                e = _exp_tile(z_rows, sums.row_max, rows, first, tile)
                u = _weighted_target(target, t_rows, class_weight_ptr, ignore_index, rows, first, tile, DTYPE)
            _store_tile(dz_rows, _minus_gradient(e, u, softmax_scale) * -scale, rows, first, tile)
        if tile.VECTOR > 1:
            e = _exp_tile(z_rows, sums.row_max, rows, None, tile)
            u = _weighted_target(target, t_rows, class_weight_ptr, ignore_index, rows, None, tile, DTYPE)
            _store_tile(dz_rows, _minus_gradient(e, u, softmax_scale) * -scale, rows, None, tile)

    # 4. stored last: before the gradient, ptxas spills on sm_100 to fit a second block on a multiprocessor
    tl.store(loss_ptr + r, (sums.scaled_logit_sum + times(sums.weight_sum, log_exp_sum)) * scale, mask=row_mask)
    tl.store(stats_ptr + r, sums.row_max, mask=row_mask)
    tl.store(stats_ptr + num_rows.to(tl.int64) + r, softmax_scale, mask=row_mask)
    tl.store(stats_ptr + 2 * num_rows.to(tl.int64) + r, log_exp_sum, mask=row_mask)


@triton.jit
def _write_dense_gradients(
    z_rows, gradients, stats, target, t_rows, class_weight_ptr, ignore_index, rows, first, tile
):  # fmt: skip
    """Forms the gradients to a tile of logits and target, and stores them."""
    DTYPE: tl.constexpr = stats.row_max.dtype
    e: tl.constexpr = target.SMOOTHING.value
    # pointers to the outputs come before the loads: formed later, they cost two registers on sm_90
    if gradients.dlogits is not None:
        dz_ptrs = _tile_ptrs(_locate(gradients.dlogits, rows.o, rows.i, tile), rows, first, tile)
    if gradients.dtarget is not None:
        dt_ptrs = _tile_ptrs(_locate(gradients.dtarget, rows.o, rows.i, tile), rows, first, tile)
    cols, _, mask = _tile_cols(rows, first, tile)
    z = _load_tile(z_rows, rows, first, tile, 0, DTYPE)
    # the outer `if` is compile-time, the inner one runs on the device: `and` would merge them
    if gradients.dlogits is not None:  # noqa: SIM102
        if stats.must_write != 0:
            u = _weighted_target(target, t_rows, class_weight_ptr, ignore_index, rows, first, tile, DTYPE)
            grad = _minus_gradient(exp(z - stats.row_max[:, None]), u, stats.softmax_scale)
            # as in soft_cross_entropy: what is 0 stays 0 whatever the scale
            tl.store(dz_ptrs, tl.where(grad == 0, 0, grad * -stats.scale).to(dz_ptrs.dtype.element_ty), mask=mask)
    if gradients.dtarget is not None:
        w = _load_class_weight(class_weight_ptr, mask, rows, first, tile, DTYPE)
        w = (1 - e) * tl.where(cols != _class_cols(ignore_index, rows, first, tile), w, 0)
        dt = times(w, stats.log_exp_sum[:, None] + (stats.row_max[:, None] - z)) * stats.scale
        tl.store(dt_ptrs, _cast_to(dt, dt_ptrs), mask=mask)


@triton.jit(do_not_specialize=["I", "num_rows", "N", "lam_stride", "ignore_index", "denominator", "grad_output_stride"])
def _dense_ce_bwd_kernel(
    logits, target, class_weight_ptr, ignore_index, denominator, stats_ptr, grad_output_ptr, gradients,
    I, num_rows, N, lam_stride, grad_output_stride, GRAD_CACHED: tl.constexpr, tile,
):  # fmt: skip
    """One tile of both gradients. GRAD_CACHED: dlogits holds the gradient for a grad_output of 1, and rows that have it are left
    alone."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    tiles: tl.constexpr = (tile.C + tile.BLOCK_C - 1) // tile.BLOCK_C
    o, i, r, row_mask, z_rows, scale, must_write = _backward_rows(
        logits, denominator, grad_output_ptr, I, grad_output_stride, GRAD_CACHED, tile, DTYPE
    )
    # a cached gradient saves the whole program, unless the target needs one too
    if gradients.dtarget is not None:
        has_work = 1
    else:
        has_work = must_write
    if has_work != 0:
        t_rows = _locate_target(target, o, i, row_mask, lam_stride, N, tile, DTYPE)
        row_max = tl.load(stats_ptr + r, mask=row_mask, other=0)
        softmax_scale = tl.load(stats_ptr + num_rows.to(tl.int64) + r, mask=row_mask, other=0)
        log_exp_sum = tl.load(stats_ptr + 2 * num_rows.to(tl.int64) + r, mask=row_mask, other=0)
        stats = DenseRowStats(row_max, softmax_scale, log_exp_sum, scale, must_write)
        first = (tl.program_id(0) % tiles) * tile.BLOCK_C
        rows = Rows(o, i, row_mask, _prologue_len(z_rows, tile))
        _write_dense_gradients(z_rows, gradients, stats, target, t_rows, class_weight_ptr, ignore_index, rows, first, tile)
        # the outer `if` is compile-time, the inner one runs on the device: `and` would merge them
        if tile.VECTOR > 1:  # noqa: SIM102
            if first == 0:
                _write_dense_gradients(
                    z_rows, gradients, stats, target, t_rows, class_weight_ptr, ignore_index, rows, None, tile
                )


def dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient):
    """logits and target [N, C, ...] -> (loss; stats [3, rows] for dense_ce_bwd; gradient to logits, or None). With lam [N] or []
    and index [N] the target holds the values of MixedRows."""
    ignore_index, smoothing, reduction = options
    view, t = View(logits), View(target)
    denominator = view.rows if reduction == "mean" else 1
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    grad = View(dlogits) if form_gradient else view
    loss = torch.empty((logits.shape[0], *logits.shape[2:]), dtype=dtype, device=logits.device)
    stats = torch.empty((3, view.rows), dtype=dtype, device=logits.device)
    if view.rows:
        layout = shared_layout(view, t, grad)
        rows, columns, warps = class_tile(view.C, layout.pixels, layout.wide, layout.vector, logits.dtype, operands=2)
        kernel_target, lam_stride = dense_target(layout.strided(1, t), lam, index, logits.dim() > 2, smoothing)
        with on_device_of(logits):
            _dense_ce_fwd_kernel[(view.O * blocks(view.I, rows),)](
                layout.strided(0, view), kernel_target, class_weight, ignore_index, denominator, loss, stats,
                layout.strided(2, grad) if form_gradient else None, layout.I, view.rows, logits.shape[0], lam_stride,
                layout.tile(rows, columns), num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return reduced(loss, reduction), stats, dlogits


def dense_ce_bwd(logits, target, lam, index, class_weight, options, stats, grad_output, cached_grad, need):
    """(gradient to logits or None, gradient to target or None); grad_output [] or [rows], `cached_grad` as in soft_ce_bwd;
    `need`: a bool for each gradient."""
    grad_output = grad_output.resolve_neg()
    ignore_index, smoothing, reduction = options
    view, t = View(logits), View(target)
    denominator = view.rows if reduction == "mean" else 1
    dlogits, dtarget, layout, gradients = backward_outputs(view, t, cached_grad, need)
    if view.rows:
        rows, columns, warps = class_tile(
            view.C, layout.pixels, layout.wide, layout.vector, logits.dtype, operands=2, whole=False
        )  # fmt: skip
        kernel_target, lam_stride = dense_target(layout.strided(1, t), lam, index, logits.dim() > 2, smoothing)
        with on_device_of(logits):
            _dense_ce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
                layout.strided(0, view), kernel_target, class_weight, ignore_index, denominator, stats, grad_output, gradients,
                layout.I, view.rows, logits.shape[0], lam_stride, grad_output.stride(0) if grad_output.dim() else 0,
                cached_grad is not None, layout.tile(rows, columns), num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return dlogits, dtarget
