"""Sigmoid (binary) cross-entropy on soft targets: kernels and their launchers.

Per class, with class weights w and weights p of the positive term (1 if none):

    t'    = (1-e)*t + off, then 1 where t' > threshold, else 0, if there is one
            t = sum_k a_k*[c = c_k] and off = e/C (K-hot), or t given and off = e/2 (dense)
    A, B  = w*p*t', w*(1-t')
    loss  = A*softplus(-z) + B*softplus(z) = u*|z| + (A+B)*log1p(exp(-|z|)),       u = B where z > 0, else A
    dz    = B*sigmoid(z) - A*sigmoid(-z)   = +-(u - (A+B)*sigmoid(-|z|)),          + where z > 0
    da_k  = (1-e)*w*(p*softplus(-z) - softplus(z)) at c = c_k; dt, of dense targets, the same at every c

all of it over the number of classes and rows that a mean has. A weight of 0 means that the logit is not looked at. Nothing is
summed over a row before its gradient is known, so a program takes a tile of it and the loss is a sum of tiles, in their order.
Logits are seen as in soft_ce; a class out of range makes its row NaN.
Memory floor: logits (and a dense target) read once, gradient written once, in the forward; dt one pass of its own.
"""

import functools

import torch
import triton
import triton.language as tl

from ._classes import View, _class_weights, _narrowed, _rows, _times
from ._launch import OPTIONS, accumulator, blocks, class_tile, common_alignment, on_device_of, reduced
from .soft_ce import _target


@triton.jit
def _log1p(q):
    """log(1+q) for q in [0, 1]. In float32 a polynomial at Chebyshev's nodes, within 1.5 units in the last place: a logarithm and
    a division would take three times the instructions, and more than memory leaves time for."""
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
def _target_tile(class_ptr, a_ptr, o, i, cols, live, inside, c_o, c_k, c_i, a_o, a_k, a_i,
                 C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, SMOOTHING: tl.constexpr, OFF: tl.constexpr,
                 THRESHOLD: tl.constexpr, ALIGN: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """(t' of a tile, which rows have a class out of range). K = 0: a dense target."""
    bad = live != live
    if K == 0:
        at = a_ptr + (o * a_o * ALIGN + i * a_i * ALIGN)[:, None] + cols.to(tl.int64)[None, :] * a_k
        t = tl.load(at, mask=inside, other=0).to(DTYPE)
    else:
        t = tl.zeros(inside.shape, DTYPE)
        for k in range(K):
            c = tl.load(class_ptr + o * c_o + i * c_i + (o * 0 + k) * c_k, mask=live, other=0)
            if WEIGHTS:
                a = tl.load(a_ptr + o * a_o + i * a_i + (o * 0 + k) * a_k, mask=live, other=0).to(DTYPE)
            else:
                a = live.to(DTYPE)
            c = tl.where((c >= 0) & (c < C), c, -1).to(tl.int32)
            t += tl.where(cols[None, :] == c[:, None], a[:, None], 0)
            bad = bad | (c < 0)
    if SMOOTHING > 0:
        t = (1 - SMOOTHING) * t + OFF
    if THRESHOLD is not None:
        t = (t > THRESHOLD).to(DTYPE)
    return t, bad


@triton.jit
def _loss_and_gradient(z, t, w_ptr, p_ptr, cols,
                       C: tl.constexpr, CLASS_WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Of a tile, each class by itself."""
    positive, negative = t, 1 - t
    if POS_WEIGHT:
        positive = _times(_class_weights(p_ptr, cols[None, :], cols, (cols < C)[None, :], True, 1, DTYPE), positive)
    if CLASS_WEIGHT:
        w = _class_weights(w_ptr, cols[None, :], cols, (cols < C)[None, :], True, 1, DTYPE)
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


@triton.jit(do_not_specialize=["I", "rows", "divisor"])
def _soft_bce_fwd_kernel(
    z_ptr, class_ptr, a_ptr, w_ptr, p_ptr, loss_ptr, da_ptr, dz_ptr,
    I, rows, divisor,
    z_o, z_c, z_i, c_o, c_k, c_i, a_o, a_k, a_i, dz_o, dz_c, dz_i,
    C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, OFF: tl.constexpr, THRESHOLD: tl.constexpr, NEED_DA: tl.constexpr, FORM_GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile: its share of its rows' losses, and their gradient."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) % tiles
    o, i, live, start = _rows(tl.program_id(0) // tiles, I, z_o, z_i, ALIGN, False, ROWS)
    r = o * I + i
    cols = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = live[:, None] & (cols < C)[None, :]
    z = tl.load(z_ptr + start[:, None] + cols.to(tl.int64)[None, :] * z_c, mask=inside, other=0).to(DTYPE)
    t, bad = _target_tile(class_ptr, a_ptr, o, i, cols, live, inside, c_o, c_k, c_i, a_o, a_k, a_i,
                          C, K, WEIGHTS, SMOOTHING, OFF, THRESHOLD, ALIGN, DTYPE)  # fmt: skip
    loss, grad = _loss_and_gradient(z, t, w_ptr, p_ptr, cols, C, CLASS_WEIGHT, POS_WEIGHT, DTYPE)
    scale = tl.where(bad, float("nan"), 1.0 / divisor.to(DTYPE))
    loss = tl.sum(tl.where(inside, loss, 0), 1) * scale
    tl.store(loss_ptr + tile.to(tl.int64) * rows + r, loss, mask=live)
    if FORM_GRADIENT:
        at = dz_ptr + (o * dz_o * ALIGN + i * dz_i * ALIGN)[:, None] + cols.to(tl.int64)[None, :] * dz_c
        tl.store(at, (grad * scale[:, None]).to(dz_ptr.dtype.element_ty), mask=inside)
    if NEED_DA:
        mine = live & (tile == 0)  # of a row's tiles, the first
        for k in range(K):
            c = tl.load(class_ptr + o * c_o + i * c_i + (o * 0 + k) * c_k, mask=mine & (bad == 0), other=0)
            zc = tl.load(z_ptr + start + c * z_c, mask=mine, other=0).to(DTYPE)
            w = tl.zeros((ROWS,), DTYPE) + 1
            p = w
            if CLASS_WEIGHT:
                w = tl.load(w_ptr + c, mask=mine, other=0).to(DTYPE)
            if POS_WEIGHT:
                p = tl.load(p_ptr + c, mask=mine, other=0).to(DTYPE)
            slope = (1 - SMOOTHING) * _slope(zc, w, p, POS_WEIGHT) * scale
            tl.store(da_ptr + (o * K + k) * I + i, slope, mask=mine)


@triton.jit(do_not_specialize=["I", "divisor", "up_row"])
def _soft_bce_bwd_kernel(
    z_ptr, class_ptr, a_ptr, w_ptr, p_ptr, up_ptr, dz_ptr, dt_ptr,
    I, divisor,
    z_o, z_c, z_i, c_o, c_k, c_i, a_o, a_k, a_i, dz_o, dz_c, dz_i, dt_o, dt_c, dt_i, up_row,
    C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr,
    SMOOTHING: tl.constexpr, OFF: tl.constexpr, THRESHOLD: tl.constexpr,
    NEED_DZ: tl.constexpr, FORMED: tl.constexpr, NEED_DT: tl.constexpr,
    WIDE: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients to logits and a dense target, the upstream gradient applied before the one rounding. FORMED: dz
    holds the gradient for upstream 1; where that is right, it is left. WIDE: in float64."""
    DTYPE: tl.constexpr = tl.float64 if WIDE else tl.float32
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o, i, live, start = _rows(tl.program_id(0) // tiles, I, z_o, z_i, ALIGN, False, ROWS)
    cols = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = live[:, None] & (cols < C)[None, :]
    at_z = z_ptr + start[:, None] + cols.to(tl.int64)[None, :] * z_c
    up = tl.load(up_ptr + (o * I + i) * up_row, mask=live, other=1).to(DTYPE)
    scale = (up / divisor.to(DTYPE))[:, None]
    if NEED_DZ:
        todo = 1
        if FORMED:
            todo = tl.max((up != 1).to(tl.int32), 0)
        if todo != 0:
            z = tl.load(at_z, mask=inside, other=0).to(DTYPE)
            t, bad = _target_tile(class_ptr, a_ptr, o, i, cols, live, inside, c_o, c_k, c_i, a_o, a_k, a_i,
                                  C, K, WEIGHTS, SMOOTHING, OFF, THRESHOLD, ALIGN, DTYPE)  # fmt: skip
            loss, grad = _loss_and_gradient(z, t, w_ptr, p_ptr, cols, C, CLASS_WEIGHT, POS_WEIGHT, DTYPE)
            at = dz_ptr + (o * dz_o * ALIGN + i * dz_i * ALIGN)[:, None] + cols.to(tl.int64)[None, :] * dz_c
            grad = tl.where(bad[:, None], float("nan"), tl.where(grad == 0, 0, grad * scale))
            tl.store(at, grad.to(dz_ptr.dtype.element_ty), mask=inside)
    if NEED_DT:
        z = tl.load(at_z, mask=inside, other=0).to(DTYPE)
        w = _class_weights(w_ptr, cols[None, :], cols, (cols < C)[None, :], CLASS_WEIGHT, 1, DTYPE)
        p = _class_weights(p_ptr, cols[None, :], cols, (cols < C)[None, :], POS_WEIGHT, 1, DTYPE)
        dt = (1 - SMOOTHING) * _slope(z, w, p, POS_WEIGHT) * scale
        at = dt_ptr + (o * dt_o * ALIGN + i * dt_i * ALIGN)[:, None] + cols.to(tl.int64)[None, :] * dt_c
        tl.store(at, _narrowed(dt, at), mask=inside)


@functools.lru_cache(maxsize=1024)
def _aligned(*strides):
    """(alignment, strides of each view with those between rows in units of it)"""
    align = common_alignment(*[stride for o, _, i in strides for stride in (o, i)])
    return align, [(o // align, c, i // align) for o, c, i in strides]


def _target_of(view, hot, dense, *others):
    """(alignment, strides of the logits, classes, weights or the dense target, strides of both, [strides of the others])."""
    t = view if dense is None else View(dense)
    align, (z, t_strides, *rest) = _aligned(*[other.strides for other in (view, t, *others)])
    if dense is None:
        return align, z, *_target(view, *hot), rest
    return align, z, t.tensor, t.tensor, [0, 0, 0, *t_strides], rest


def _options(view, hot, class_weight, pos_weight, label_smoothing, threshold):
    """The constants of a target. A K-hot one is smoothed over all classes, a dense one over the two sides of each."""
    return {
        "C": view.C,
        "K": 0 if hot is None else hot[0].shape[1],
        "WEIGHTS": hot is not None and hot[1] is not None,
        "CLASS_WEIGHT": class_weight is not None,
        "POS_WEIGHT": pos_weight is not None,
        "SMOOTHING": label_smoothing,
        "OFF": label_smoothing / (2 if hot is None else view.C),
        "THRESHOLD": threshold,
    }


def _tile(view):
    """(rows, classes, warps). Where rows are contiguous and not classes, every tile looks at its rows' target anew: it takes more
    classes than elsewhere. float64 takes twice the registers."""
    dtype = view.tensor.dtype
    if view.strides[1] != 1:
        return 64, min(triton.next_power_of_2(view.C), 16 if dtype == torch.float64 else 32), 8
    if dtype != torch.float64:
        return class_tile(view.C, False, False, 1, dtype, whole=False)
    rows, columns, warps = class_tile(view.C, False, False, 1, dtype, operands=2, whole=False)
    return rows, min(columns, 2048), min(warps, 8)


def _divisor(view, class_reduction, reduction):
    """How many terms the means have."""
    return (view.C if class_reduction == "mean" else 1) * (view.rows if reduction == "mean" else 1)


def _forward(
    logits, hot, dense, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, slope, form_gradient
):
    """(loss, gradient to the logits or None). The target is `hot` (classes, weights or None) or `dense`, the other None; slope:
    where the gradient to a hot one's weights goes, [O, K, I], or None."""
    view = View(logits)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    grad = View(dlogits) if form_gradient else view
    align, z, classes, a, strides, (dz,) = _target_of(view, hot, dense, grad)
    rows, columns, warps = _tile(view)
    tiles = blocks(view.C, columns)
    shape = (logits.shape[0], *logits.shape[2:])
    losses = torch.empty(shape if tiles == 1 else (tiles, *shape), dtype=accumulator(logits.dtype), device=logits.device)
    if view.rows:
        with on_device_of(logits):
            _soft_bce_fwd_kernel[(view.O * blocks(view.I, rows) * tiles,)](
                view.tensor, classes, a, losses if class_weight is None else class_weight,
                losses if pos_weight is None else pos_weight, losses, losses if slope is None else slope,
                dlogits if form_gradient else losses,
                view.I, view.rows, _divisor(view, class_reduction, reduction), *z, *strides, *dz,
                **_options(view, hot, class_weight, pos_weight, label_smoothing, threshold),
                NEED_DA=slope is not None, FORM_GRADIENT=form_gradient,
                ALIGN=align, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    if reduction == "none" and tiles > 1:
        losses = losses.sum(0)
    return reduced(losses, reduction), dlogits


def _backward(
    logits, hot, dense, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, upstream, formed,
    need_dlogits, need_dtarget,
):  # fmt: skip
    """(gradient to the logits or None, gradient to a dense target or None); `formed` as in soft_ce_bwd."""
    view, upstream = View(logits), upstream.resolve_neg()
    dlogits = torch.empty_like(view.tensor) if need_dlogits and formed is None else formed
    dtarget = torch.empty_like(View(dense).tensor) if need_dtarget else None
    if view.rows:
        dz, dt = (View(view.tensor if t is None else t) for t in (dlogits, dtarget))
        align, z, classes, a, strides, others = _target_of(view, hot, dense, dz, dt)
        rows, columns, warps = _tile(view)
        with on_device_of(logits):
            _soft_bce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
                view.tensor, classes, a, upstream if class_weight is None else class_weight,
                upstream if pos_weight is None else pos_weight, upstream, dz.tensor, dt.tensor,
                view.I, _divisor(view, class_reduction, reduction),
                *z, *strides, *[stride for view_strides in others for stride in view_strides],
                upstream.stride(0) if upstream.dim() else 0,
                **_options(view, hot, class_weight, pos_weight, label_smoothing, threshold),
                NEED_DZ=need_dlogits, FORMED=formed is not None, NEED_DT=need_dtarget, WIDE=logits.dtype == torch.float64,
                ALIGN=align, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return dlogits, dtarget


def soft_bce_fwd(
    logits, classes, weights, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, need_dweights,
    form_gradient,
):  # fmt: skip
    """logits [N, C, ...], classes [N, K, ...] int64, weights [N, K] or classes' shape or None (ones), class_weight and pos_weight
    [C] or None -> (loss; its derivative by each component's weight, in classes' shape, or None; gradient to logits, or None)."""
    view, slope = View(logits), None
    if need_dweights:
        slope = torch.empty((view.O, classes.shape[1], view.I), dtype=accumulator(logits.dtype), device=logits.device)
    options = class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction
    loss, dlogits = _forward(view.tensor, (classes, weights), None, *options, slope, form_gradient)
    if need_dweights:
        slope = slope[0].t() if logits.dim() == 2 else slope.view(classes.shape)
    return loss, slope, dlogits


def soft_bce_bwd(
    logits, classes, weights, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, upstream, formed
):
    """Gradient to the logits; upstream [] or [rows], `formed` as in soft_ce_bwd."""
    options = class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction
    return _backward(logits, (classes, weights), None, *options, upstream, formed, True, False)[0]


def dense_bce_fwd(
    logits, target, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, form_gradient
):
    """logits and target [N, C, ...] -> (loss; gradient to logits, or None)."""
    options = class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction
    return _forward(logits, None, target, *options, None, form_gradient)


def dense_bce_bwd(
    logits, target, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction, upstream, formed,
    need_dlogits, need_dtarget,
):  # fmt: skip
    """(gradient to logits or None, gradient to target or None); upstream [] or [rows], `formed` as in soft_ce_bwd."""
    options = class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction
    return _backward(logits, None, target, *options, upstream, formed, need_dlogits, need_dtarget)
