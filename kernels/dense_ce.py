"""Cross-entropy on dense target probabilities t [N, C, ...]: kernels and their launchers.

    t'    = (1-e)*t + e/C          (a column that is ignored counts as t = 0)
    loss  = sum_c w[c]*t'[c]*(lse - z[c])
    dz[c] = softmax(z)[c] * sum_b w[b]*t'[b] - w[c]*t'[c]
    dt[c] = (1-e)*w[c]*(lse - z[c])

Logits are seen as in soft_ce. A row's three numbers are max, sum(w*t')/sum, log(sum).
Memory floor: logits and target read once, gradient written once, in the forward; dt one pass of its own.
"""

import torch
import triton
import triton.language as tl

from ._launch import OPTIONS, accumulator, blocks, class_tile, on_device_of, reduced
from .soft_ce import View, _class_weights, _online, _rows, _times, aligned


@triton.jit
def _dense_target(t_ptr, start, t_c, w_ptr, cols, inside, ignore_index,
                  C: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """w*t' of a tile, 0 outside it."""
    at = t_ptr + start[:, None] + cols.to(tl.int64)[None, :] * t_c
    t = tl.load(at, mask=inside & (cols != ignore_index)[None, :], other=0).to(DTYPE)
    w = _class_weights(w_ptr, cols, C, CLASS_WEIGHT, DTYPE)
    return _times(w, tl.where(inside, (1 - SMOOTHING) * t + SMOOTHING / C, 0))


@triton.jit(do_not_specialize=["I", "rows", "ignore_index", "divisor"])
def _dense_ce_fwd_kernel(
    z_ptr, t_ptr, w_ptr, loss_ptr, stats_ptr, dz_ptr,
    I, rows, divisor, z_o, z_c, z_i, t_o, t_c, t_i, dz_o, dz_c, dz_i, ignore_index,
    C: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, FORM_GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    o, i, live, start = _rows(tl.program_id(0), I, z_o, z_i, ALIGN, ROWS)
    t_start = o * t_o * ALIGN + i * t_i * ALIGN
    r = o * I + i
    lanes = tl.arange(0, BLOCK_C)
    top = tl.full((ROWS,), float("-inf"), DTYPE)
    total = tl.zeros((ROWS,), DTYPE)
    mass = tl.zeros((ROWS,), DTYPE)
    gap = tl.zeros((ROWS,), DTYPE)
    z = tl.zeros((ROWS, BLOCK_C), DTYPE)
    u = tl.zeros((ROWS, BLOCK_C), DTYPE)
    for first in range(0, C, BLOCK_C):
        cols = first + lanes
        inside = live[:, None] & (cols < C)[None, :]
        at = z_ptr + start[:, None] + cols.to(tl.int64)[None, :] * z_c
        z = tl.load(at, mask=inside, other=float("-inf")).to(DTYPE)
        u = _dense_target(t_ptr, t_start, t_c, w_ptr, cols, inside, ignore_index, C, CLASS_WEIGHT, SMOOTHING, DTYPE)
        top, total, mass, gap = _online(z, u, inside, top, total, mass, gap, True)
    log_total = tl.log(total)
    share = tl.where(mass == 0, 0, mass / total)
    scale = 1.0 / divisor.to(DTYPE)
    tl.store(loss_ptr + r, (gap + _times(mass, log_total)) * scale, mask=live)
    tl.store(stats_ptr + r, top, mask=live)
    tl.store(stats_ptr + rows.to(tl.int64) + r, share, mask=live)
    tl.store(stats_ptr + 2 * rows.to(tl.int64) + r, log_total, mask=live)

    if FORM_GRADIENT:
        dz_start = o * dz_o * ALIGN + i * dz_i * ALIGN
        for first in range(0, C, BLOCK_C):
            cols = first + lanes
            inside = live[:, None] & (cols < C)[None, :]
            if C > BLOCK_C:  # else z and u still hold the row
                z = tl.load(z_ptr + start[:, None] + cols.to(tl.int64)[None, :] * z_c, mask=inside, other=0).to(DTYPE)
                u = _dense_target(t_ptr, t_start, t_c, w_ptr, cols, inside, ignore_index, C, CLASS_WEIGHT, SMOOTHING, DTYPE)
            grad = (_times(share[:, None], tl.exp(z - top[:, None])) - u) * scale
            at = dz_ptr + dz_start[:, None] + cols.to(tl.int64)[None, :] * dz_c
            tl.store(at, grad.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["I", "rows", "ignore_index", "divisor", "up_row"])
def _dense_ce_bwd_kernel(
    z_ptr, t_ptr, w_ptr, stats_ptr, up_ptr, dz_ptr, dt_ptr,
    I, rows, divisor, z_o, z_c, z_i, t_o, t_c, t_i, dz_o, dz_c, dz_i, dt_o, dt_c, dt_i, up_row, ignore_index,
    C: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    NEED_DZ: tl.constexpr, FORMED: tl.constexpr, NEED_DT: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of both gradients. FORMED: dz holds the gradient for upstream 1; where that is right, it is left."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o, i, live, start = _rows(tl.program_id(0) // tiles, I, z_o, z_i, ALIGN, ROWS)
    r = o * I + i
    cols = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = live[:, None] & (cols < C)[None, :]
    up = tl.load(up_ptr + r * up_row, mask=live, other=1).to(DTYPE)
    scale = (up / divisor.to(DTYPE))[:, None]
    at_z = z_ptr + start[:, None] + cols.to(tl.int64)[None, :] * z_c
    top = tl.load(stats_ptr + r, mask=live, other=0)
    if NEED_DZ:
        todo = 1
        if FORMED:
            todo = tl.max((up != 1).to(tl.int32), 0)
        if todo != 0:
            z = tl.load(at_z, mask=inside, other=0).to(DTYPE)
            t_start = o * t_o * ALIGN + i * t_i * ALIGN
            u = _dense_target(t_ptr, t_start, t_c, w_ptr, cols, inside, ignore_index, C, CLASS_WEIGHT, SMOOTHING, DTYPE)
            share = tl.load(stats_ptr + rows.to(tl.int64) + r, mask=live, other=0)
            grad = _times(share[:, None], tl.exp(z - top[:, None])) - u
            at = dz_ptr + (o * dz_o * ALIGN + i * dz_i * ALIGN)[:, None] + cols.to(tl.int64)[None, :] * dz_c
            tl.store(at, tl.where(grad == 0, 0, grad * scale).to(dz_ptr.dtype.element_ty), mask=inside)
    if NEED_DT:
        z = tl.load(at_z, mask=inside, other=0).to(DTYPE)
        log_total = tl.load(stats_ptr + 2 * rows.to(tl.int64) + r, mask=live, other=0)
        w = _class_weights(w_ptr, cols, C, CLASS_WEIGHT, DTYPE)
        w = (1 - SMOOTHING) * tl.where((cols != ignore_index)[None, :], w, 0)
        dt = _times(w, log_total[:, None] + (top[:, None] - z)) * scale
        at = dt_ptr + (o * dt_o * ALIGN + i * dt_i * ALIGN)[:, None] + cols.to(tl.int64)[None, :] * dt_c
        tl.store(at, dt.to(dt_ptr.dtype.element_ty), mask=inside)


def dense_ce_fwd(logits, target, class_weight, ignore_index, label_smoothing, reduction, form_gradient):
    """logits and target [N, C, ...] -> (loss; what dense_ce_bwd wants to be given again; gradient to logits, or None)."""
    view, t = View(logits), View(target)
    divisor = view.rows if reduction == "mean" else 1
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    grad = View(dlogits) if form_gradient else view
    loss = torch.empty((logits.shape[0], *logits.shape[2:]), dtype=dtype, device=logits.device)
    stats = torch.empty((3, view.rows), dtype=dtype, device=logits.device)
    if view.rows:
        align, (z_strides, t_strides, dz_strides) = aligned(view, t, grad)
        rows, columns, warps = class_tile(view.C, view.strides[1], align, logits.dtype, operands=2)
        with on_device_of(logits):
            _dense_ce_fwd_kernel[(view.O * blocks(view.I, rows),)](
                view.tensor, t.tensor, loss if class_weight is None else class_weight,
                loss, stats, dlogits if form_gradient else loss,
                view.I, view.rows, divisor, *z_strides, *t_strides, *dz_strides, ignore_index,
                C=view.C, CLASS_WEIGHT=class_weight is not None, SMOOTHING=label_smoothing, FORM_GRADIENT=form_gradient,
                ALIGN=align, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return reduced(loss, reduction), (stats,), dlogits


def dense_ce_bwd(
    logits, target, class_weight, ignore_index, label_smoothing, reduction, stats, upstream, formed, need_dlogits, need_dtarget
):
    """(gradient to logits or None, gradient to target or None); upstream [] or [rows], `formed` as in soft_ce_bwd."""
    (stats,), upstream = stats, upstream.resolve_neg()
    view, t = View(logits), View(target)
    divisor = view.rows if reduction == "mean" else 1
    dlogits = formed
    if need_dlogits and formed is None:
        dlogits = torch.empty_like(view.tensor)
    dtarget = torch.empty_like(t.tensor) if need_dtarget else None
    if view.rows:
        dz, dt = View(view.tensor if dlogits is None else dlogits), View(t.tensor if dtarget is None else dtarget)
        align, strides = aligned(view, t, dz, dt)
        rows, columns, warps = class_tile(view.C, view.strides[1], align, logits.dtype, operands=2, whole=False)
        with on_device_of(logits):
            _dense_ce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
                view.tensor, t.tensor, stats if class_weight is None else class_weight, stats, upstream, dz.tensor, dt.tensor,
                view.I, view.rows, divisor, *[stride for view_strides in strides for stride in view_strides],
                upstream.stride(0) if upstream.dim() else 0, ignore_index,
                C=view.C, CLASS_WEIGHT=class_weight is not None, SMOOTHING=label_smoothing,
                NEED_DZ=need_dlogits, FORMED=formed is not None, NEED_DT=need_dtarget,
                ALIGN=align, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return dlogits, dtarget
