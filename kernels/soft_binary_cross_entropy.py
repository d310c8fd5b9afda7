"""Sigmoid (binary) cross-entropy on soft targets: kernels and their launchers.

Per class, with class weights w and weights p of the positive term (1 if none):

    t'    = (1-e)*t + off, then 1 where t' > threshold, else 0, if there is one
            t = sum_k a_k*[c = c_k] and off = e/C (K-hot), or t given and off = e/2 (dense, mixed)
    A, B  = w*p*t', w*(1-t')
    loss  = A*softplus(-z) + B*softplus(z) = u*|z| + (A+B)*log1p(exp(-|z|)),       u = B where z > 0, else A
    dz    = B*sigmoid(z) - A*sigmoid(-z)   = +-(u - (A+B)*sigmoid(-|z|)),          + where z > 0
    da_k  = (1-e)*w*(p*softplus(-z) - softplus(z)) at c = c_k; dt, of dense targets, the same at every c

all of it over the number of classes and rows that a mean has. A weight of 0 means that the logit is not looked at. Nothing is
summed over a row before its gradient is known, so a program takes a tile of it and the loss is a sum of tiles, in their order.
Logits are seen as in soft_ce, MixedRows as in dense_ce; a class or a partner out of range makes its row NaN.
Memory floor: logits (and a dense target) read once, gradient written once, in the forward; dt one pass of its own. Each class and
weight of a row's target is a load of its own, counted as a sector of 32 bytes though a cache serves all but the first, and the
gradient to weights fetches the logits of the components a second time: much beside short rows with many components.
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
    _partner,
    _rows,
    _start,
    _times,
    _todo,
    _values,
    layout,
    mixing,
)
from ._launch import BINARY_COMPONENTS, OPTIONS, accumulator, binary_tile, blocks, on_device_of, reduced
from .soft_cross_entropy import _target, target_strides


@triton.jit
def _log1p(q):
    """log(1+q) for q in [0, 1]. In float32 a polynomial at Chebyshev's nodes, within 1.5 units in the last place: a logarithm
    and a division would take three times the instructions, and more than memory leaves time for."""
    if q.dtype == tl.float64:
        total = 1 + q
        value = tl.where(total == 1, q, tl.log(total) * (q / (total - 1)))  # what 1+q loses of q made up for
    else:
        value = -0.0044662114
        value = value * q + 0.025224054
        value = value * q - 0.066757724
        value = value * q + 0.11561845
        value = value * q - 0.15847565
        value = value * q + 0.19854106
        value = value * q - 0.24986526
        value = value * q + 0.33332843
        value = value * q - 0.49999997
        value = (value * q + 1) * q
    return value


@triton.jit
def _target_tile(t_at, partner_at, lam, class_ptr, a_ptr, o, i, cols, head, live, inside, c_o, c_k, c_i, a_o, a_k, a_i,
                 C: tl.constexpr, K: tl.constexpr, MIXED: tl.constexpr, WEIGHTS: tl.constexpr, SMOOTHING: tl.constexpr,
                 OFF: tl.constexpr, THRESHOLD: tl.constexpr, VECTOR: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """(t' of a tile, which rows have a class or a partner out of range). K = 0: a dense target."""
    if K == 0:
        t = _values(t_at, partner_at, lam, inside, MIXED, DTYPE)
        bad = lam != lam
    else:
        t = tl.zeros(inside.shape, DTYPE)
        bad = live != live
        for k in range(K):
            c = tl.load(class_ptr + o * c_o + i * c_i + (o * 0 + k) * c_k, mask=live, other=0)
            if WEIGHTS:
                a = tl.load(a_ptr + o * a_o + i * a_i + (o * 0 + k) * a_k, mask=live, other=0).to(DTYPE)
            else:
                a = live.to(DTYPE)
            bad = bad | (c < 0) | (c >= C)
            c = tl.where(bad, -1, c).to(tl.int32)
            t += tl.where(cols == (c - head if VECTOR > 1 else c)[:, None], a[:, None], 0)
    if SMOOTHING > 0:
        t = (1 - SMOOTHING) * t + OFF
    if THRESHOLD is not None:
        t = (t > THRESHOLD).to(DTYPE)
    return t, bad


@triton.jit
def _loss_and_gradient(z, t, w_ptr, p_ptr, cols, head, within, CLASS_WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr,
                       VECTOR: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Of a tile, each class by itself."""
    positive, negative = t, 1 - t
    if POS_WEIGHT:
        positive = _times(_class_weights(p_ptr, cols, head, within, True, VECTOR, DTYPE), positive)
    if CLASS_WEIGHT:
        w = _class_weights(w_ptr, cols, head, within, True, VECTOR, DTYPE)
        positive, negative = _times(w, positive), _times(w, negative)
    q = tl.exp(-tl.abs(z))
    least, rest = q / (1 + q), _log1p(q)  # sigmoid(-|z|), and what softplus(|z|) has beyond |z|
    if CLASS_WEIGHT or POS_WEIGHT:
        both = positive + negative
        least, rest = _times(both, least), _times(both, rest)
    u = tl.where(z > 0, negative, positive)
    return _times(u, tl.abs(z)) + rest, tl.where(z > 0, u - least, least - u)


@triton.jit
def _slope(z, w, p, POS_WEIGHT: tl.constexpr):
    """What a class's loss gains by its target: w*(p*softplus(-z) - softplus(z))."""
    slope = -z
    if POS_WEIGHT:
        rest = _log1p(tl.exp(-tl.abs(z)))
        slope = _times(p, tl.maximum(-z, 0) + rest) - (tl.maximum(z, 0) + rest)
    return _times(w, slope)


@triton.jit
def _weights_gradient(z, z_ptr, start, z_c, class_ptr, w_ptr, p_ptr, da_ptr, scale, o, i, first, live,
                      c_o, c_k, c_i, da_o, da_k, da_i,
                      C: tl.constexpr, K: tl.constexpr, CLASS_WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr,
                      SMOOTHING: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr,
                      ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """da of a tile of pixels' own classes, or by the first tile that of whole rows, BLOCK_K components at a time."""
    for first_k in range(0, K, BLOCK_K):
        k = (first_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mine = live[:, None] & (k < K)
        if not PIXELS:
            mine = mine & (k * 0 + first == 0)  # Triton 3.9 interprets no mask that a single condition was spread over
        c = tl.load(class_ptr + (o * c_o + i * c_i)[:, None] + k * c_k, mask=mine, other=0)
        c = tl.where((c >= 0) & (c < C), c, 0)  # else scale is NaN
        if PIXELS:  # it is in z, and a gather would take a sector a pixel; BLOCK_K is 1
            mine = mine & (c >= first) & (c < first + BLOCK_C)
            zc = tl.sum(tl.where(first + tl.arange(0, BLOCK_C)[None, :] == c.to(tl.int32), z, 0), 1)[:, None]
        else:
            zc = tl.load(z_ptr + start[:, None] + c * z_c, mask=mine, other=0).to(DTYPE)
        w = tl.full((ROWS, BLOCK_K), 1, DTYPE)
        p = w
        if CLASS_WEIGHT:
            w = tl.load(w_ptr + c, mask=mine, other=0).to(DTYPE)
        if POS_WEIGHT:
            p = tl.load(p_ptr + c, mask=mine, other=0).to(DTYPE)
        slope = (1 - SMOOTHING) * _slope(zc, w, p, POS_WEIGHT) * scale[:, None]
        tl.store(da_ptr + (o * da_o + i * da_i)[:, None] + k * da_k, slope, mask=mine)


@triton.jit(do_not_specialize=["I", "rows", "N", "divisor"])
def _soft_bce_fwd_kernel(
    z_ptr, t_ptr, lam_ptr, index_ptr, class_ptr, a_ptr, w_ptr, p_ptr, loss_ptr, da_ptr, dz_ptr,
    I, rows, N, divisor,
    z_o, z_c, z_i, t_o, t_c, t_i, dz_o, dz_c, dz_i, c_o, c_k, c_i, a_o, a_k, a_i, da_o, da_k, da_i, lam_n,
    C: tl.constexpr, K: tl.constexpr, MIXED: tl.constexpr, IMAGES: tl.constexpr, WEIGHTS: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, OFF: tl.constexpr, THRESHOLD: tl.constexpr,
    NEED_DA: tl.constexpr, FORM_GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile: its share of its rows' losses, and their gradient. The first tile of a row has its ends too."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) % tiles
    if PIXELS:
        I, z_c, t_c, dz_c = I * ALIGN, z_c * ALIGN, t_c * ALIGN, dz_c * ALIGN
    o, i, live, start = _rows(tl.program_id(0) // tiles, I, z_o, z_i, ALIGN, PIXELS, ROWS)
    t_start, dz_start = _start(o, i, t_o, t_i, ALIGN, PIXELS), _start(o, i, dz_o, dz_i, ALIGN, PIXELS)
    lam, partner = _partner(lam_ptr, index_ptr, o, i, live, t_start, t_o, t_i, lam_n, N,
                            MIXED, IMAGES, ALIGN, PIXELS, DTYPE)  # fmt: skip
    first = tile * BLOCK_C
    head = _head(z_ptr, start, VECTOR)
    cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
    inside = live[:, None] & within
    z = tl.load(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), mask=inside, other=0).to(DTYPE)
    t, bad = _target_tile(_at(t_ptr, t_start, head, first, t_c, VECTOR, BLOCK_C),
                          _at(t_ptr, partner + head, head, first, t_c, 1, BLOCK_C), lam, class_ptr, a_ptr, o, i, cols, head,
                          live, inside, c_o, c_k, c_i, a_o, a_k, a_i,
                          C, K, MIXED, WEIGHTS, SMOOTHING, OFF, THRESHOLD, VECTOR, DTYPE)  # fmt: skip
    loss, grad = _loss_and_gradient(z, t, w_ptr, p_ptr, cols, head, within, CLASS_WEIGHT, POS_WEIGHT, VECTOR, DTYPE)
    scale = tl.where(bad, float("nan"), 1.0 / divisor.to(DTYPE))
    total = tl.sum(tl.where(inside, loss, 0), 1)
    if FORM_GRADIENT:
        at = _at(dz_ptr, dz_start, head, first, dz_c, VECTOR, BLOCK_C)
        tl.store(at, (grad * scale[:, None]).to(dz_ptr.dtype.element_ty), mask=inside)
    if NEED_DA:
        _weights_gradient(z, z_ptr, start, z_c, class_ptr, w_ptr, p_ptr, da_ptr, scale, o, i, first, live,
                          c_o, c_k, c_i, da_o, da_k, da_i,
                          C, K, CLASS_WEIGHT, POS_WEIGHT, SMOOTHING, PIXELS, DTYPE, ROWS, BLOCK_C, BLOCK_K)  # fmt: skip
    if VECTOR > 1:  # noqa: SIM102 (one is of the compiler's, the other of the device's)
        if tile == 0:
            end, there = _ends(head, C, VECTOR)
            there &= live[:, None]
            end_z = tl.load(z_ptr + start[:, None] + end, mask=there, other=0).to(DTYPE)
            end_t, wrong = _target_tile(t_ptr + t_start[:, None] + end, t_ptr + partner[:, None] + end, lam, class_ptr, a_ptr, o, i,
                                      end, head, live, there, c_o, c_k, c_i, a_o, a_k, a_i,
                                      C, K, MIXED, WEIGHTS, SMOOTHING, OFF, THRESHOLD, 1, DTYPE)  # fmt: skip
            end_loss, end_grad = _loss_and_gradient(end_z, end_t, w_ptr, p_ptr, end, head, there,
                                                    CLASS_WEIGHT, POS_WEIGHT, 1, DTYPE)  # fmt: skip
            total += tl.sum(tl.where(there, end_loss, 0), 1)
            if FORM_GRADIENT:
                tl.store(dz_ptr + dz_start[:, None] + end, (end_grad * scale[:, None]).to(dz_ptr.dtype.element_ty), mask=there)
    tl.store(loss_ptr + tile.to(tl.int64) * rows + (o * I + i), total * scale, mask=live)


@triton.jit
def _gradients(z_at, t_at, partner_at, dz_at, dt_at, lam, class_ptr, a_ptr, w_ptr, p_ptr, o, i, cols, head, live, within, scale,
               todo, c_o, c_k, c_i, a_o, a_k, a_i,
               C: tl.constexpr, K: tl.constexpr, MIXED: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr,
               POS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, OFF: tl.constexpr, THRESHOLD: tl.constexpr,
               NEED_DZ: tl.constexpr, NEED_DT: tl.constexpr, VECTOR: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Forms both gradients of a tile, and stores them."""
    inside = live[:, None] & within
    z = tl.load(z_at, mask=inside, other=0).to(DTYPE)
    if NEED_DZ:  # noqa: SIM102 (one is of the compiler's, the other of the device's)
        if todo != 0:
            t, bad = _target_tile(t_at, partner_at, lam, class_ptr, a_ptr, o, i, cols, head, live, inside,
                                  c_o, c_k, c_i, a_o, a_k, a_i,
                                  C, K, MIXED, WEIGHTS, SMOOTHING, OFF, THRESHOLD, VECTOR, DTYPE)  # fmt: skip
            loss, grad = _loss_and_gradient(z, t, w_ptr, p_ptr, cols, head, within, CLASS_WEIGHT, POS_WEIGHT, VECTOR, DTYPE)
            grad = tl.where(bad[:, None], float("nan"), tl.where(grad == 0, 0, grad * scale))
            tl.store(dz_at, grad.to(dz_at.dtype.element_ty), mask=inside)
    if NEED_DT:
        w = _class_weights(w_ptr, cols, head, within, CLASS_WEIGHT, VECTOR, DTYPE)
        p = _class_weights(p_ptr, cols, head, within, POS_WEIGHT, VECTOR, DTYPE)
        dt = (1 - SMOOTHING) * _slope(z, w, p, POS_WEIGHT) * scale
        tl.store(dt_at, _narrowed(dt, dt_at), mask=inside)


@triton.jit(do_not_specialize=["I", "N", "divisor", "up_row"])
def _soft_bce_bwd_kernel(
    z_ptr, t_ptr, lam_ptr, index_ptr, class_ptr, a_ptr, w_ptr, p_ptr, up_ptr, dz_ptr, dt_ptr,
    I, N, divisor,
    z_o, z_c, z_i, t_o, t_c, t_i, dz_o, dz_c, dz_i, dt_o, dt_c, dt_i, c_o, c_k, c_i, a_o, a_k, a_i, lam_n, up_row,
    C: tl.constexpr, K: tl.constexpr, MIXED: tl.constexpr, IMAGES: tl.constexpr, WEIGHTS: tl.constexpr,
    CLASS_WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, OFF: tl.constexpr, THRESHOLD: tl.constexpr,
    NEED_DZ: tl.constexpr, FORMED: tl.constexpr, NEED_DT: tl.constexpr, WIDE: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients to logits and a dense target, the upstream gradient applied before the one rounding. FORMED: dz
    holds the gradient for upstream 1; where that is right, it is left. WIDE: in float64."""
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    if PIXELS:
        I, z_c, t_c, dz_c, dt_c = I * ALIGN, z_c * ALIGN, t_c * ALIGN, dz_c * ALIGN, dt_c * ALIGN
    o, i, live, start = _rows(tl.program_id(0) // tiles, I, z_o, z_i, ALIGN, PIXELS, ROWS)
    up = tl.load(up_ptr + (o * I + i) * up_row, mask=live, other=1).to(DTYPE)
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
        first = (tl.program_id(0) % tiles) * BLOCK_C
        head = _head(z_ptr, start, VECTOR)
        cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
        _gradients(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), _at(t_ptr, t_start, head, first, t_c, VECTOR, BLOCK_C),
                   _at(t_ptr, partner + head, head, first, t_c, 1, BLOCK_C),
                   _at(dz_ptr, dz_start, head, first, dz_c, VECTOR, BLOCK_C),
                   _at(dt_ptr, dt_start, head, first, dt_c, VECTOR, BLOCK_C),
                   lam, class_ptr, a_ptr, w_ptr, p_ptr, o, i, cols, head, live, within, scale, todo,
                   c_o, c_k, c_i, a_o, a_k, a_i,
                   C, K, MIXED, WEIGHTS, CLASS_WEIGHT, POS_WEIGHT, SMOOTHING, OFF, THRESHOLD, NEED_DZ, NEED_DT,
                   VECTOR, DTYPE)  # fmt: skip
        if VECTOR > 1:  # noqa: SIM102 (one is of the compiler's, the other of the device's)
            if first == 0:
                end, there = _ends(head, C, VECTOR)
                _gradients(z_ptr + start[:, None] + end, t_ptr + t_start[:, None] + end, t_ptr + partner[:, None] + end,
                           dz_ptr + dz_start[:, None] + end, dt_ptr + dt_start[:, None] + end,
                           lam, class_ptr, a_ptr, w_ptr, p_ptr, o, i, end, head, live, there, scale, todo,
                           c_o, c_k, c_i, a_o, a_k, a_i,
                           C, K, MIXED, WEIGHTS, CLASS_WEIGHT, POS_WEIGHT, SMOOTHING, OFF, THRESHOLD, NEED_DZ, NEED_DT,
                           1, DTYPE)  # fmt: skip


def _options(hot, lam, logits, class_weight, pos_weight, label_smoothing, threshold):
    """The constants of a target. A K-hot one is smoothed over all classes, a dense one over the two sides of each."""
    return {
        "C": logits.shape[1],
        "K": 0 if hot is None else hot[0].shape[1],
        "MIXED": lam is not None,
        "IMAGES": logits.dim() > 2,
        "WEIGHTS": hot is not None and hot[1] is not None,
        "CLASS_WEIGHT": class_weight is not None,
        "POS_WEIGHT": pos_weight is not None,
        "SMOOTHING": label_smoothing,
        "OFF": label_smoothing / (2 if hot is None else logits.shape[1]),
        "THRESHOLD": threshold,
    }


def _divisor(view, class_reduction, reduction):
    """How many terms the means have."""
    return (view.C if class_reduction == "mean" else 1) * (view.rows if reduction == "mean" else 1)


def _forward(
    logits, hot, dense, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, slope, form_gradient,
    lam=None, index=None,
):  # fmt: skip
    """(loss, gradient to the logits or None). The target is `hot` (classes, weights or None) or `dense`, the other None; slope:
    where the gradient to a hot one's weights goes, in its classes' shape, or None."""
    view = View(logits)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    t = view if dense is None else View(dense)
    how = layout(view, t, View(dlogits) if form_gradient else view)
    rows, columns, warps = binary_tile(view.C, how.pixels, how.wide, how.vector, logits.dtype)
    tiles = blocks(view.C, columns)
    shape = (logits.shape[0], *logits.shape[2:])
    losses = torch.empty(shape if tiles == 1 else (tiles, *shape), dtype=accumulator(logits.dtype), device=logits.device)
    if view.rows:
        classes, a, strides = (losses, losses, [0] * 6) if hot is None else _target(view, *hot)
        own, partners, lam_n = mixing(lam, index, losses)
        with on_device_of(logits):
            _soft_bce_fwd_kernel[(view.O * blocks(view.I, rows) * tiles,)](
                view.tensor, t.tensor, own, partners, classes, a, losses if class_weight is None else class_weight,
                losses if pos_weight is None else pos_weight, losses, losses if slope is None else slope,
                dlogits if form_gradient else losses,
                how.I, view.rows, logits.shape[0], _divisor(view, class_reduction, reduction), *how.flat, *strides,
                *([0] * 3 if slope is None else target_strides(slope)), lam_n,
                **_options(hot, lam, logits, class_weight, pos_weight, label_smoothing, threshold),
                NEED_DA=slope is not None, FORM_GRADIENT=form_gradient,
                **how.constants, ROWS=rows, BLOCK_C=columns,
                BLOCK_K=1 if slope is None or how.pixels else min(triton.next_power_of_2(slope.shape[1]), BINARY_COMPONENTS),
                num_warps=warps, **OPTIONS,
            )  # fmt: skip
    if reduction == "none" and tiles > 1:
        losses = losses.sum(0)
    return reduced(losses, reduction), dlogits


def _backward(
    logits, hot, dense, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, upstream, formed,
    need_dlogits, need_dtarget, lam=None, index=None,
):  # fmt: skip
    """(gradient to the logits or None, gradient to a dense target or None); `formed` as in soft_ce_bwd."""
    view, upstream = View(logits), upstream.resolve_neg()
    t = view if dense is None else View(dense)
    dlogits = torch.empty_like(view.tensor) if need_dlogits and formed is None else formed
    dtarget = torch.empty_like(t.tensor) if need_dtarget else None
    if view.rows:
        dz, dt = View(view.tensor if dlogits is None else dlogits), View(t.tensor if dtarget is None else dtarget)
        how = layout(view, t, dz, dt)
        rows, columns, warps = binary_tile(view.C, how.pixels, how.wide, how.vector, logits.dtype)
        classes, a, strides = (upstream, upstream, [0] * 6) if hot is None else _target(view, *hot)
        own, partners, lam_n = mixing(lam, index, upstream)
        with on_device_of(logits):
            _soft_bce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
                view.tensor, t.tensor, own, partners, classes, a, upstream if class_weight is None else class_weight,
                upstream if pos_weight is None else pos_weight, upstream, dz.tensor, dt.tensor,
                how.I, logits.shape[0], _divisor(view, class_reduction, reduction), *how.flat, *strides, lam_n,
                upstream.stride(0) if upstream.dim() else 0,
                **_options(hot, lam, logits, class_weight, pos_weight, label_smoothing, threshold),
                NEED_DZ=need_dlogits, FORMED=formed is not None, NEED_DT=need_dtarget, WIDE=logits.dtype == torch.float64,
                **how.constants, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return dlogits, dtarget


def soft_bce_fwd(logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient):
    """logits [N, C, ...], weights [N, K] or classes' shape or None (ones), classes [N, K, ...] int64, class_weight and
    pos_weight [C] or None, options (label_smoothing, threshold, class_reduction, reduction) -> (loss; its derivative by each component's weight, in classes' shape, or None; gradient to logits,
    or None)."""
    slope = torch.empty(classes.shape, dtype=accumulator(logits.dtype), device=logits.device) if need_dweights else None
    target = (classes, weights), None, class_weight, pos_weight
    loss, dlogits = _forward(logits, *target, *options, slope, form_gradient)
    return loss, slope, dlogits


def soft_bce_bwd(logits, weights, classes, class_weight, pos_weight, options, upstream, formed):
    """Gradient to the logits; upstream [] or [rows], `formed` as in soft_ce_bwd."""
    target = (classes, weights), None, class_weight, pos_weight
    return _backward(logits, *target, *options, upstream, formed, True, False)[0]


def dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, form_gradient):
    """logits and target [N, C, ...] -> (loss; gradient to logits, or None). With lam [N] or [] and index [N] the target holds
    the values of MixedRows."""
    return _forward(logits, None, target, class_weight, pos_weight, *options, None, form_gradient, lam, index)


def dense_bce_bwd(
    logits, target, lam, index, class_weight, pos_weight, options, upstream, formed, need_dlogits, need_dtarget
):  # fmt: skip
    """(gradient to logits or None, gradient to target or None); upstream [] or [rows], `formed` as in soft_ce_bwd."""
    weights = class_weight, pos_weight
    return _backward(logits, None, target, *weights, *options, upstream, formed, need_dlogits, need_dtarget, lam, index)
