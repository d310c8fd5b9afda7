"""Cross-entropy on dense target probabilities t [N, C, ...]: kernels and their launchers.

    t'    = (1-e)*t + e/C          (a column that is ignored counts as t = 0)
    loss  = sum_c w[c]*t'[c]*(lse - z[c])
    dz[c] = softmax(z)[c] * sum_b w[b]*t'[b] - w[c]*t'[c]
    dt[c] = (1-e)*w[c]*(lse - z[c])

MIXED: t[n] = lam[n]*v[n] + (1-lam[n])*v[index[n]] of the values v that are given instead, mixed where they are read; a weight of 0
is not read, a partner out of range makes NaN. There is no dt then.

Logits are seen as in soft_ce. A row's three numbers are max, sum(w*t')/sum, log(sum).
Memory floor: logits and target read once, gradient written once, in the forward; dt one pass of its own.
"""

import torch
import triton
import triton.language as tl

from ._class_tiles import (
    View,
    _at,
    _class_weights,
    _ends,
    _head,
    _lanes,
    _narrowed,
    _online,
    _partner,
    _rows,
    _start,
    _times,
    _todo,
    _values,
    layout,
    mixing,
)
from ._launch import OPTIONS, accumulator, blocks, class_tile, on_device_of, reduced


@triton.jit
def _dense_target(t_at, partner_at, lam, w_ptr, cols, head, inside, ignore_index,
                  C: tl.constexpr, MIXED: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
                  VECTOR: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """w*t' of a tile, 0 outside it."""
    t = _values(t_at, partner_at, lam, inside, MIXED, DTYPE)
    t = tl.where(
        cols == ((ignore_index - head)[:, None] if VECTOR > 1 else ignore_index), 0, t
    )  # no mask: one that cuts vectors would make the loads narrow
    u = tl.where(inside, (1 - SMOOTHING) * t + SMOOTHING / C, 0)
    if CLASS_WEIGHT:
        u = _times(_class_weights(w_ptr, cols, head, inside, CLASS_WEIGHT, VECTOR, DTYPE), u)
    return u


@triton.jit(do_not_specialize=["I", "rows", "N", "lam_n", "ignore_index", "divisor"])
def _dense_ce_fwd_kernel(
    z_ptr, t_ptr, lam_ptr, index_ptr, w_ptr, loss_ptr, stats_ptr, dz_ptr,
    I, rows, N, divisor, z_o, z_c, z_i, t_o, t_c, t_i, dz_o, dz_c, dz_i, lam_n, ignore_index,
    C: tl.constexpr, MIXED: tl.constexpr, IMAGES: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    FORM_GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    if PIXELS:
        I, z_c, t_c, dz_c = I * ALIGN, z_c * ALIGN, t_c * ALIGN, dz_c * ALIGN
    o, i, live, start = _rows(tl.program_id(0), I, z_o, z_i, ALIGN, PIXELS, ROWS)
    r = o * I + i
    t_start = _start(o, i, t_o, t_i, ALIGN, PIXELS)
    lam, partner = _partner(lam_ptr, index_ptr, o, i, live, t_start, t_o, t_i, lam_n, N,
                            MIXED, IMAGES, ALIGN, PIXELS, DTYPE)  # fmt: skip
    head = _head(z_ptr, start, VECTOR)
    top = tl.full((ROWS,), float("-inf"), DTYPE)
    total = tl.zeros((ROWS,), DTYPE)
    mass = tl.zeros((ROWS,), DTYPE)
    gap = tl.zeros((ROWS,), DTYPE)
    if VECTOR > 1:
        end, there = _ends(head, C, VECTOR)
        there &= live[:, None]
        end_z = tl.load(z_ptr + start[:, None] + end, mask=there, other=float("-inf")).to(DTYPE)
        end_u = _dense_target(t_ptr + t_start[:, None] + end, t_ptr + partner[:, None] + end, lam, w_ptr, end, head, there,
                              ignore_index, C, MIXED, CLASS_WEIGHT, SMOOTHING, 1, DTYPE)  # fmt: skip
        top, total, mass, gap = _online(end_z, end_u, there, top, total, mass, gap, True)
    z = tl.zeros((ROWS, BLOCK_C), DTYPE)
    u = tl.zeros((ROWS, BLOCK_C), DTYPE)
    for first in range(0, C, BLOCK_C):
        cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
        inside = live[:, None] & within
        z = tl.load(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), mask=inside, other=float("-inf")).to(DTYPE)
        u = _dense_target(_at(t_ptr, t_start, head, first, t_c, VECTOR, BLOCK_C),
                          _at(t_ptr, partner + head, head, first, t_c, 1, BLOCK_C), lam, w_ptr, cols, head, inside,
                          ignore_index, C, MIXED, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip
        top, total, mass, gap = _online(z, u, inside, top, total, mass, gap, True)
    log_total = tl.log(total)
    share = tl.where(mass == 0, 0, mass / total)
    scale = 1.0 / divisor.to(DTYPE)
    tl.store(loss_ptr + r, (gap + _times(mass, log_total)) * scale, mask=live)
    tl.store(stats_ptr + r, top, mask=live)
    tl.store(stats_ptr + rows.to(tl.int64) + r, share, mask=live)
    tl.store(stats_ptr + 2 * rows.to(tl.int64) + r, log_total, mask=live)

    if FORM_GRADIENT:
        dz_start = _start(o, i, dz_o, dz_i, ALIGN, PIXELS)
        head = _head(dz_ptr, dz_start, VECTOR)  # the same, computed again: nothing is kept in registers for it
        for first in range(0, C, BLOCK_C):
            cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
            inside = live[:, None] & within
            if C > BLOCK_C:  # else z and u still hold the row
                z = tl.load(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), mask=inside, other=0).to(DTYPE)
                u = _dense_target(_at(t_ptr, t_start, head, first, t_c, VECTOR, BLOCK_C),
                                  _at(t_ptr, partner + head, head, first, t_c, 1, BLOCK_C), lam, w_ptr, cols, head, inside,
                                  ignore_index, C, MIXED, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip
            grad = (_times(share[:, None], tl.exp(z - top[:, None])) - u) * scale
            at = _at(dz_ptr, dz_start, head, first, dz_c, VECTOR, BLOCK_C)
            tl.store(at, grad.to(dz_ptr.dtype.element_ty), mask=inside)
        if VECTOR > 1:
            end, there = _ends(head, C, VECTOR)
            there &= live[:, None]
            end_z = tl.load(z_ptr + start[:, None] + end, mask=there, other=0).to(DTYPE)
            end_u = _dense_target(t_ptr + t_start[:, None] + end, t_ptr + partner[:, None] + end, lam, w_ptr, end, head,
                                  there, ignore_index, C, MIXED, CLASS_WEIGHT, SMOOTHING, 1, DTYPE)  # fmt: skip
            end_grad = (_times(share[:, None], tl.exp(end_z - top[:, None])) - end_u) * scale
            tl.store(dz_ptr + dz_start[:, None] + end, end_grad.to(dz_ptr.dtype.element_ty), mask=there)


@triton.jit
def _gradients(z_at, t_at, partner_at, dz_at, dt_at, lam, w_ptr, cols, head, inside, top, share, log_total, scale, todo,
               ignore_index, C: tl.constexpr, MIXED: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
               NEED_DZ: tl.constexpr, NEED_DT: tl.constexpr, VECTOR: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Forms both gradients of a tile, and stores them."""
    z = tl.load(z_at, mask=inside, other=0).to(DTYPE)
    if NEED_DZ:  # noqa: SIM102 (one is of the compiler's, the other of the device's)
        if todo != 0:
            u = _dense_target(t_at, partner_at, lam, w_ptr, cols, head, inside, ignore_index,
                              C, MIXED, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip
            grad = _times(share[:, None], tl.exp(z - top[:, None])) - u
            tl.store(dz_at, tl.where(grad == 0, 0, grad * scale).to(dz_at.dtype.element_ty), mask=inside)
    if NEED_DT:
        w = _class_weights(w_ptr, cols, head, inside, CLASS_WEIGHT, VECTOR, DTYPE)
        w = (1 - SMOOTHING) * tl.where(cols != ((ignore_index - head)[:, None] if VECTOR > 1 else ignore_index), w, 0)
        dt = _times(w, log_total[:, None] + (top[:, None] - z)) * scale
        tl.store(dt_at, _narrowed(dt, dt_at), mask=inside)


@triton.jit(do_not_specialize=["I", "rows", "N", "lam_n", "ignore_index", "divisor", "up_row"])
def _dense_ce_bwd_kernel(
    z_ptr, t_ptr, lam_ptr, index_ptr, w_ptr, stats_ptr, up_ptr, dz_ptr, dt_ptr,
    I, rows, N, divisor, z_o, z_c, z_i, t_o, t_c, t_i, dz_o, dz_c, dz_i, dt_o, dt_c, dt_i, lam_n, up_row, ignore_index,
    C: tl.constexpr, MIXED: tl.constexpr, IMAGES: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    NEED_DZ: tl.constexpr, FORMED: tl.constexpr, NEED_DT: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of both gradients. FORMED: dz holds the gradient for upstream 1; where that is right, it is left."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    if PIXELS:
        I, z_c, t_c, dz_c, dt_c = I * ALIGN, z_c * ALIGN, t_c * ALIGN, dz_c * ALIGN, dt_c * ALIGN
    o, i, live, start = _rows(tl.program_id(0) // tiles, I, z_o, z_i, ALIGN, PIXELS, ROWS)
    r = o * I + i
    up = tl.load(up_ptr + r * up_row, mask=live, other=1).to(DTYPE)
    scale = (up / divisor.to(DTYPE))[:, None]
    todo = _todo(up, FORMED)
    if NEED_DT:
        work = 1
    else:
        work = todo
    if work != 0:
        t_start = _start(o, i, t_o, t_i, ALIGN, PIXELS)
        lam, partner = _partner(lam_ptr, index_ptr, o, i, live, t_start, t_o, t_i, lam_n, N,
                                MIXED, IMAGES, ALIGN, PIXELS, DTYPE)  # fmt: skip
        dz_start, dt_start = _start(o, i, dz_o, dz_i, ALIGN, PIXELS), _start(o, i, dt_o, dt_i, ALIGN, PIXELS)
        top = tl.load(stats_ptr + r, mask=live, other=0)
        share = tl.load(stats_ptr + rows.to(tl.int64) + r, mask=live, other=0)
        log_total = tl.load(stats_ptr + 2 * rows.to(tl.int64) + r, mask=live, other=0)
        first = (tl.program_id(0) % tiles) * BLOCK_C
        head = _head(z_ptr, start, VECTOR)
        cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
        _gradients(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), _at(t_ptr, t_start, head, first, t_c, VECTOR, BLOCK_C),
                   _at(t_ptr, partner + head, head, first, t_c, 1, BLOCK_C),
                   _at(dz_ptr, dz_start, head, first, dz_c, VECTOR, BLOCK_C),
                   _at(dt_ptr, dt_start, head, first, dt_c, VECTOR, BLOCK_C),
                   lam, w_ptr, cols, head, live[:, None] & within, top, share, log_total, scale, todo, ignore_index,
                   C, MIXED, CLASS_WEIGHT, SMOOTHING, NEED_DZ, NEED_DT, VECTOR, DTYPE)  # fmt: skip
        if VECTOR > 1:  # noqa: SIM102 (one is of the compiler's, the other of the device's)
            if first == 0:
                end, there = _ends(head, C, VECTOR)
                _gradients(z_ptr + start[:, None] + end, t_ptr + t_start[:, None] + end, t_ptr + partner[:, None] + end,
                           dz_ptr + dz_start[:, None] + end, dt_ptr + dt_start[:, None] + end,
                           lam, w_ptr, end, head, live[:, None] & there, top, share, log_total, scale, todo, ignore_index,
                           C, MIXED, CLASS_WEIGHT, SMOOTHING, NEED_DZ, NEED_DT, 1, DTYPE)  # fmt: skip


def dense_ce_fwd(logits, target, lam, index, class_weight, options, form_gradient):
    """logits and target [N, C, ...] -> (loss; stats [3, rows] for dense_ce_bwd; gradient to logits, or None). With lam [N] or []
    and index [N] the target holds the values of MixedRows."""
    ignore_index, label_smoothing, reduction = options
    view, t = View(logits), View(target)
    divisor = view.rows if reduction == "mean" else 1
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    grad = View(dlogits) if form_gradient else view
    loss = torch.empty((logits.shape[0], *logits.shape[2:]), dtype=dtype, device=logits.device)
    stats = torch.empty((3, view.rows), dtype=dtype, device=logits.device)
    if view.rows:
        how = layout(view, t, grad)
        rows, columns, warps = class_tile(view.C, how.pixels, how.wide, how.vector, logits.dtype, operands=2)
        own, partners, lam_n = mixing(lam, index, loss)
        with on_device_of(logits):
            _dense_ce_fwd_kernel[(view.O * blocks(view.I, rows),)](
                view.tensor, t.tensor, own, partners, loss if class_weight is None else class_weight,
                loss, stats, dlogits if form_gradient else loss,
                how.I, view.rows, logits.shape[0], divisor, *how.flat, lam_n, ignore_index,
                C=view.C, MIXED=lam is not None, IMAGES=logits.dim() > 2, CLASS_WEIGHT=class_weight is not None,
                SMOOTHING=label_smoothing, FORM_GRADIENT=form_gradient,
                **how.constants, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return reduced(loss, reduction), stats, dlogits


def dense_ce_bwd(
    logits, target, lam, index, class_weight, options, stats, upstream, formed, need_dlogits, need_dtarget
):  # fmt: skip
    """(gradient to logits or None, gradient to target or None); upstream [] or [rows], `formed` as in soft_ce_bwd."""
    upstream = upstream.resolve_neg()
    ignore_index, label_smoothing, reduction = options
    view, t = View(logits), View(target)
    divisor = view.rows if reduction == "mean" else 1
    dlogits = formed
    if need_dlogits and formed is None:
        dlogits = torch.empty_like(view.tensor)
    dtarget = torch.empty_like(t.tensor) if need_dtarget else None
    if view.rows:
        dz, dt = View(view.tensor if dlogits is None else dlogits), View(t.tensor if dtarget is None else dtarget)
        how = layout(view, t, dz, dt)
        rows, columns, warps = class_tile(view.C, how.pixels, how.wide, how.vector, logits.dtype, operands=2, whole=False)
        own, partners, lam_n = mixing(lam, index, stats)
        with on_device_of(logits):
            _dense_ce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
                view.tensor, t.tensor, own, partners, stats if class_weight is None else class_weight,
                stats, upstream, dz.tensor, dt.tensor,
                how.I, view.rows, logits.shape[0], divisor, *how.flat, lam_n,
                upstream.stride(0) if upstream.dim() else 0, ignore_index,
                C=view.C, MIXED=lam is not None, IMAGES=logits.dim() > 2, CLASS_WEIGHT=class_weight is not None,
                SMOOTHING=label_smoothing, NEED_DZ=need_dlogits, FORMED=formed is not None, NEED_DT=need_dtarget,
                **how.constants, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return dlogits, dtarget
