"""Sigmoid (binary) cross-entropy on soft targets: kernels and their launchers.

Per class, with class weights w and weights p of the positive term (1 if none):

    t'    = (1-e)*t + off, then 1 where t' > threshold, else 0, if there is one
            t = sum_k a_k*[c = c_k] and off = e/C (K-hot), or t given and off = e/2 (dense, mixed)
    A, B  = w*p*t', w*(1-t')
    loss  = A*softplus(-z) + B*softplus(z) = u*|z| + (A+B)*log1p(exp(-|z|)),       u = B where z > 0, else A
    dz    = B*sigmoid(z) - A*sigmoid(-z)   = +-(u - (A+B)*sigmoid(-|z|)),          + where z > 0
    da_k  = (1-e)*w*(p*softplus(-z) - softplus(z)) at c = c_k; dt, of dense targets, the same at every c

all of it over the number of classes and rows that a mean has. Where a weight is 0 the logit does not matter, even inf or NaN.
Nothing is summed over a row before its gradient is known, so a program takes one tile, and the loss is a sum of tiles, in their
order. Logits are seen as in soft_cross_entropy, MixedRows as in dense_cross_entropy; a class or a partner out of range makes its
row NaN.
Memory floor: logits (and a dense target) read once, gradient written once, in the forward; dt one pass of its own. Each class and
weight of a row's target is a load of its own, counted as a sector of 32 bytes though a cache serves all but the first, and the
gradient to weights fetches the logits of the components a second time: much beside short rows with many components.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._class_tiles import (
    Rows,
    Strided,
    View,
    _backward_rows,
    _cast_to,
    _load_class_weight,
    _load_tile,
    _locate,
    _of_class,
    _program_rows,
    _prologue_len,
    _row_numbers,
    _tile_cols,
    _tile_ptrs,
    backward_outputs,
    shared_layout,
)
from ._launch import (
    BINARY_COMPONENTS,
    OPTIONS,
    accumulator,
    binary_tile,
    blocks,
    constants,
    exp,
    on_device_of,
    reduced,
    times,
)
from ._loss_targets import (
    DenseTarget,
    KHotTarget,
    _component_ptrs,
    _load_target,
    _locate_target,
    component_strides,
    dense_target,
    k_hot_target,
)


class BinaryTarget(NamedTuple):
    """A K-hot or a dense target, the other None, which of them it is, what is added after smoothing, and the threshold or None."""

    k_hot: KHotTarget | None
    dense: DenseTarget | None
    DENSE: tl.constexpr
    OFFSET: tl.constexpr
    THRESHOLD: tl.constexpr


class BinaryWeights(NamedTuple):
    """Weights of the classes and of their positive terms [C]; None: 1."""

    class_weight: torch.Tensor | None
    pos_weight: torch.Tensor | None


@triton.jit
def _log1p(q):
    """Returns log(1+q) for q in [0, 1]. In float32 by a polynomial at Chebyshev's nodes, within 1.5 units in the last place: a
    logarithm and a division would take three times the instructions, and more than memory leaves time for."""
    if q.dtype == tl.float64:
        one_plus = 1 + q
        # the factor makes up for what 1 + q loses of q
        value = tl.where(one_plus == 1, q, tl.log(one_plus) * (q / (one_plus - 1)))
    else:
        value = 0.005364739
        value = value * q - 0.03006545
        value = value * q + 0.079203986
        value = value * q - 0.13753755
        value = value * q + 0.19153634
        value = value * q - 0.24857157
        value = value * q + 0.3332132
        value = value * q - 0.49999648
        value = (value * q + 1) * q
    return value


@triton.jit
def _log1p_and_sigmoid(z):
    """Returns log(1 + exp(-|z|)) and sigmoid(-|z|)."""
    if z.dtype == tl.float64:
        q = tl.exp(-tl.abs(z))
        log1p = _log1p(q)
        sigmoid = q / (1 + q)
    else:
        x = tl.abs(z) * -1.4426950408889634  # 1/log(2)
        log1p = _log1p(tl.exp2(x))
        # exp(-|z| - log1p): a division would take twice the instructions
        sigmoid = tl.exp2(tl.fma(log1p, tl.full(z.shape, -1.4426950408889634, z.dtype), x))
    return log1p, sigmoid


@triton.jit
def _add_label(t, invalid, k, k_hot, cols, rows, first, tile):
    """Returns targets t of a tile with component k added, and which rows [ROWS] have a class out of range up to this one."""
    c = tl.load(_component_ptrs(k_hot.classes, k, rows), mask=rows.mask, other=0)
    if k_hot.weights is not None:
        a = tl.load(_component_ptrs(k_hot.weights, k, rows), mask=rows.mask, other=0).to(t.dtype)
    else:
        a = rows.mask.to(t.dtype)
    invalid = invalid | (c < 0) | (c >= tile.C)
    # no column is -1; int32 as columns are, which a class within range fits
    c = tl.where(invalid, -1, c).to(tl.int32)
    return tl.where(_of_class(c[:, None], cols, rows, first, tile), t + a[:, None], t), invalid


@triton.jit
def _binary_target(target, t_rows, rows, first, tile, DTYPE: tl.constexpr):
    """Returns t' of a tile, and which rows [ROWS] have a class or a partner out of range."""
    if target.DENSE:
        e: tl.constexpr = target.dense.SMOOTHING.value
        t = _load_target(target.dense, t_rows, rows, first, tile, DTYPE)
        invalid = t_rows.lam != t_rows.lam
    else:
        e: tl.constexpr = target.k_hot.SMOOTHING.value  # type: ignore[no-redef]
        cols, _, mask = _tile_cols(rows, first, tile)
        t = tl.zeros((tile.ROWS, 1), DTYPE)
        if not target.k_hot.FEW:
            t = tl.zeros((tile.ROWS, cols.shape[1]), DTYPE)
        invalid = rows.mask != rows.mask
        if target.k_hot.FEW:
            # unrolled, because a loop would carry t in another layout than that of the logits
            for k in tl.static_range(target.k_hot.K):
                t, invalid = _add_label(t, invalid, k, target.k_hot, cols, rows, first, tile)
        else:
            for k in range(target.k_hot.K):
                t, invalid = _add_label(t, invalid, k, target.k_hot, cols, rows, first, tile)
    if e > 0:
        t = (1 - e) * t + target.OFFSET
    if target.THRESHOLD is not None:
        t = (t > target.THRESHOLD).to(DTYPE)
    return t, invalid


@triton.jit
def _loss_and_gradient(z, t, weights, mask, rows, first, tile, DENSE: tl.constexpr):
    """Returns loss and gradient of each element of a tile, for a grad_output of 1."""
    DTYPE: tl.constexpr = z.dtype
    A, B = t, 1 - t
    if weights.pos_weight is not None:
        A = times(_load_class_weight(weights.pos_weight, mask, rows, first, tile, DTYPE), A)
    if weights.class_weight is not None:
        w = _load_class_weight(weights.class_weight, mask, rows, first, tile, DTYPE)
        A, B = times(w, A), times(w, B)
    log1p, sigmoid = _log1p_and_sigmoid(z)
    # without weights A + B is 1, and the products are left out
    if weights.class_weight is not None or weights.pos_weight is not None:
        both = A + B
        sigmoid, log1p = times(both, sigmoid), times(both, log1p)
    # by the sign bit: predicates are few, and would be kept in other registers from here to the gradient
    WIDTH: tl.constexpr = z.dtype.primitive_bitwidth  # Triton 3.3 does not ask it of a constexpr
    BITS: tl.constexpr = tl.int64 if WIDTH == 64 else tl.int32
    sign = z.to(BITS, bitcast=True)
    u = tl.where(sign < 0, A, B)
    if DENSE:
        loss = tl.where(u == 0, 0, tl.abs(z)) * u + log1p
    else:  # the product is added under a predicate: an instruction fewer, but of dense targets some programs spill then
        loss = tl.where(u == 0, log1p, tl.abs(z) * u + log1p)
    grad = (u - sigmoid).to(BITS, bitcast=True) ^ (sign & (tl.full((), 1, BITS) << (WIDTH - 1)))
    return loss, grad.to(DTYPE, bitcast=True)


@triton.jit
def _loss_tile(z_rows, target, t_rows, weights, rows, first, tile, DTYPE: tl.constexpr):
    """Returns logits, losses, gradient and mask of a tile, and which rows are invalid."""
    cols, col_mask, mask = _tile_cols(rows, first, tile)
    z = _load_tile(z_rows, rows, first, tile, 0, DTYPE)
    t, invalid = _binary_target(target, t_rows, rows, first, tile, DTYPE)
    loss, grad = _loss_and_gradient(z, t, weights, col_mask, rows, first, tile, target.DENSE)
    return z, loss, grad, mask, invalid


@triton.jit
def _target_derivative(z, w, p, POS_WEIGHT: tl.constexpr):
    """Returns the derivative of a class's loss by its target, w*(p*softplus(-z) - softplus(z))."""
    derivative = -z  # softplus(-z) - softplus(z)
    if POS_WEIGHT:
        log1p = _log1p(exp(-tl.abs(z)))
        derivative = times(p, tl.maximum(-z, 0) + log1p) - (tl.maximum(z, 0) + log1p)
    return times(w, derivative)


@triton.jit
def _write_dweights(z, z_rows, dweights, k_hot, weights, scale, rows, first, tile, BLOCK_K: tl.constexpr):
    """Stores the gradient to the weights of components, BLOCK_K at a time: a tile of pixels those whose classes it holds, of
    other rows the first tile all of them."""
    DTYPE: tl.constexpr = z.dtype
    C: tl.constexpr = tile.C.value
    e: tl.constexpr = k_hot.SMOOTHING.value
    o, i = rows.o, rows.i
    for first_k in range(0, k_hot.K, BLOCK_K):
        k = (first_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
        mask = rows.mask[:, None] & (k < k_hot.K)
        if not tile.PIXELS:
            mask = mask & (k * 0 + first == 0)  # Triton 3.9 interprets no mask that a single condition was spread over
        class_ptrs = k_hot.classes.ptr + (o * k_hot.classes.outer + i * k_hot.classes.inner)[:, None]
        c = tl.load(class_ptrs + k * k_hot.classes.column, mask=mask, other=0)
        c = tl.where((c >= 0) & (c < C), c, 0)  # else scale is NaN
        if tile.PIXELS:  # the tile holds it, and a gather would load a sector for each pixel; BLOCK_K is 1
            mask = mask & (c >= first) & (c < first + tile.BLOCK_C)
            cols = first + tl.arange(0, tile.BLOCK_C)[None, :]
            zc = tl.sum(tl.where(cols == c.to(tl.int32), z, 0), 1)[:, None]
        else:
            zc = tl.load(z_rows.ptr + z_rows.offsets[:, None] + c * z_rows.column, mask=mask, other=0).to(DTYPE)
        w = tl.full((tile.ROWS, BLOCK_K), 1, DTYPE)
        p = w
        if weights.class_weight is not None:
            w = tl.load(weights.class_weight + c, mask=mask, other=0).to(DTYPE)
        if weights.pos_weight is not None:
            p = tl.load(weights.pos_weight + c, mask=mask, other=0).to(DTYPE)
        da = (1 - e) * _target_derivative(zc, w, p, weights.pos_weight is not None) * scale[:, None]
        tl.store(dweights.ptr + (o * dweights.outer + i * dweights.inner)[:, None] + k * dweights.column, da, mask=mask)


@triton.jit(do_not_specialize=["I", "num_rows", "N", "lam_stride", "denominator"])
def _soft_bce_fwd_kernel(
    logits, target, weights, denominator, loss_ptr, dweights, dlogits,
    I, num_rows, N, lam_stride, BLOCK_K: tl.constexpr, tile,
):  # fmt: skip
    """One tile: its part of its rows' losses, [tiles, rows], and its gradients. The first tile of a row takes its edges too."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    tiles: tl.constexpr = (tile.C + tile.BLOCK_C - 1) // tile.BLOCK_C
    tile_number = tl.program_id(0) % tiles
    o, i, row_mask, z_rows = _program_rows(logits, tl.program_id(0) // tiles, I, tile)
    t_rows = z_rows
    if target.DENSE:
        t_rows = _locate_target(target.dense, o, i, row_mask, lam_stride, N, tile, DTYPE)
    dz_rows = z_rows
    if dlogits is not None:
        dz_rows = _locate(dlogits, o, i, tile)
    first = tile_number * tile.BLOCK_C
    rows = Rows(o, i, row_mask, _prologue_len(z_rows, tile))
    z, loss, grad, mask, invalid = _loss_tile(z_rows, target, t_rows, weights, rows, first, tile, DTYPE)
    # only the row with the wrong class or partner becomes NaN
    scale = tl.where(invalid, float("nan"), 1.0 / denominator.to(DTYPE))
    row_loss = tl.sum(tl.where(mask, loss, 0), 1)
    if dlogits is not None:
        ptrs = _tile_ptrs(dz_rows, rows, first, tile)
        tl.store(ptrs, (grad * scale[:, None]).to(ptrs.dtype.element_ty), mask=mask)
    if dweights is not None:
        _write_dweights(z, z_rows, dweights, target.k_hot, weights, scale, rows, first, tile, BLOCK_K)
    # the outer `if` is compile-time, the inner one runs on the device: `and` would merge them
    if tile.VECTOR > 1:  # noqa: SIM102
        if tile_number == 0:
            edge_z, edge_loss, edge_grad, edge_mask, edge_invalid = _loss_tile(
                z_rows, target, t_rows, weights, rows, None, tile, DTYPE
            )
            row_loss += tl.sum(tl.where(edge_mask, edge_loss, 0), 1)
            if dlogits is not None:
                edge_ptrs = _tile_ptrs(dz_rows, rows, None, tile)
                tl.store(edge_ptrs, (edge_grad * scale[:, None]).to(edge_ptrs.dtype.element_ty), mask=edge_mask)
    tl.store(loss_ptr + tile_number.to(tl.int64) * num_rows + _row_numbers(o, i, I, tile), row_loss * scale, mask=row_mask)


@triton.jit
def _write_binary_gradients(z_rows, gradients, scale, must_write, target, t_rows, weights, rows, first, tile):
    """Forms the gradients to a tile of logits and target, and stores them."""
    DTYPE: tl.constexpr = scale.dtype
    # as in dense_cross_entropy, pointers to the outputs come before the loads
    if gradients.dlogits is not None:
        dz_ptrs = _tile_ptrs(_locate(gradients.dlogits, rows.o, rows.i, tile), rows, first, tile)
    if gradients.dtarget is not None:
        dt_ptrs = _tile_ptrs(_locate(gradients.dtarget, rows.o, rows.i, tile), rows, first, tile)
    _, col_mask, mask = _tile_cols(rows, first, tile)
    z = _load_tile(z_rows, rows, first, tile, 0, DTYPE)
    # the outer `if` is compile-time, the inner one runs on the device: `and` would merge them
    if gradients.dlogits is not None:  # noqa: SIM102
        if must_write != 0:
            t, invalid = _binary_target(target, t_rows, rows, first, tile, DTYPE)
            loss, grad = _loss_and_gradient(z, t, weights, col_mask, rows, first, tile, target.DENSE)
            grad = tl.where(invalid[:, None], float("nan"), tl.where(grad == 0, 0, grad * scale))
            tl.store(dz_ptrs, grad.to(dz_ptrs.dtype.element_ty), mask=mask)
    if gradients.dtarget is not None:
        e: tl.constexpr = target.dense.SMOOTHING.value
        w = _load_class_weight(weights.class_weight, col_mask, rows, first, tile, DTYPE)
        p = _load_class_weight(weights.pos_weight, col_mask, rows, first, tile, DTYPE)
        dt = (1 - e) * _target_derivative(z, w, p, weights.pos_weight is not None) * scale
        tl.store(dt_ptrs, _cast_to(dt, dt_ptrs), mask=mask)


@triton.jit(do_not_specialize=["I", "N", "lam_stride", "denominator", "grad_output_stride"])
def _soft_bce_bwd_kernel(
    logits, target, weights, denominator, grad_output_ptr, gradients,
    I, N, lam_stride, grad_output_stride, GRAD_CACHED: tl.constexpr, tile,
):  # fmt: skip
    """One tile of the gradients to logits and a dense target. grad_output is applied before the one rounding. GRAD_CACHED:
    dlogits holds the gradient for a grad_output of 1, and rows that have it are left alone."""
    DTYPE: tl.constexpr = tl.float64 if logits.ptr.dtype.element_ty == tl.float64 else tl.float32
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
        t_rows = z_rows
        if target.DENSE:
            t_rows = _locate_target(target.dense, o, i, row_mask, lam_stride, N, tile, DTYPE)
        first = (tl.program_id(0) % tiles) * tile.BLOCK_C
        rows = Rows(o, i, row_mask, _prologue_len(z_rows, tile))
        _write_binary_gradients(z_rows, gradients, scale, must_write, target, t_rows, weights, rows, first, tile)
        # the outer `if` is compile-time, the inner one runs on the device: `and` would merge them
        if tile.VECTOR > 1:  # noqa: SIM102
            if first == 0:
                _write_binary_gradients(z_rows, gradients, scale, must_write, target, t_rows, weights, rows, None, tile)


def _k_hot_binary_target(view, classes, weights, options):
    """A K-hot target as kernels take it, smoothed over all classes."""
    rest = constants(False, options.label_smoothing / view.C, options.threshold)
    return BinaryTarget(k_hot_target(classes, weights, options.label_smoothing), None, *rest)


def _dense_binary_target(probs, lam, index, images, options):
    """(a dense target as kernels take it, smoothed over the two sides of each class; lam's stride)."""
    rest = constants(True, options.label_smoothing / 2, options.threshold)
    target, lam_stride = dense_target(probs, lam, index, images, options.label_smoothing)
    return BinaryTarget(None, target, *rest), lam_stride


def _mean_count(view, options):
    """The denominator: C for a class mean times rows for a row mean."""
    return (view.C if options.class_reduction == "mean" else 1) * (view.rows if options.reduction == "mean" else 1)


def _forward(logits, k_hot, dense, weights, options, dweights, form_gradient):
    """(loss, gradient to the logits or None). The target is `k_hot` (classes, weights) or `dense` (target, lam, index), the
    other None. dweights: where the gradient to a K-hot target's weights is stored, in its classes' shape, or None."""
    view = View(logits)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    t, grad = view if dense is None else View(dense[0]), View(dlogits) if form_gradient else view
    layout = shared_layout(view, t, grad)
    rows, columns, warps = binary_tile(view.C, layout.pixels, layout.wide, layout.vector, logits.dtype)
    tiles = blocks(view.C, columns)
    shape = (logits.shape[0], *logits.shape[2:])
    losses = torch.empty(shape if tiles == 1 else (tiles, *shape), dtype=accumulator(logits.dtype), device=logits.device)
    if view.rows:
        if dense is None:
            target, lam_stride = _k_hot_binary_target(view, *k_hot, options), 0
        else:
            target, lam_stride = _dense_binary_target(layout.strided(1, t), *dense[1:], logits.dim() > 2, options)
        block_k = 1
        if dweights is not None and not layout.pixels:
            block_k = min(triton.next_power_of_2(dweights.shape[1]), BINARY_COMPONENTS)
        with on_device_of(logits):
            _soft_bce_fwd_kernel[(view.O * blocks(view.I, rows) * tiles,)](
                layout.strided(0, view), target, weights, _mean_count(view, options), losses,
                None if dweights is None else Strided(dweights, *component_strides(dweights)),
                layout.strided(2, grad) if form_gradient else None, layout.I, view.rows, logits.shape[0], lam_stride,
                block_k, layout.tile(rows, columns), num_warps=warps, **OPTIONS,
            )  # fmt: skip
    if options.reduction == "none" and tiles > 1:
        losses = losses.sum(0)
    return reduced(losses, options.reduction), dlogits


def _backward(logits, k_hot, dense, weights, options, grad_output, cached_grad, need):
    """(gradient to the logits or None, gradient to a dense target or None). The target as in _forward, `cached_grad` as in
    soft_ce_bwd."""
    view, grad_output = View(logits), grad_output.resolve_neg()
    t = view if dense is None else View(dense[0])
    dlogits, dtarget, layout, gradients = backward_outputs(view, t, cached_grad, need)
    if view.rows:
        rows, columns, warps = binary_tile(view.C, layout.pixels, layout.wide, layout.vector, logits.dtype)
        if dense is None:
            target, lam_stride = _k_hot_binary_target(view, *k_hot, options), 0
        else:
            target, lam_stride = _dense_binary_target(layout.strided(1, t), *dense[1:], logits.dim() > 2, options)
        with on_device_of(logits):
            _soft_bce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
                layout.strided(0, view), target, weights, _mean_count(view, options), grad_output, gradients,
                layout.I, logits.shape[0], lam_stride, grad_output.stride(0) if grad_output.dim() else 0,
                cached_grad is not None, layout.tile(rows, columns), num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return dlogits, dtarget


def soft_bce_fwd(logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient):
    """logits [N, C, ...], weights [N, K] or classes' shape or None (ones), classes [N, K, ...] int64, class_weight and
    pos_weight [C] or None, options (label_smoothing, threshold, class_reduction, reduction) -> (loss; its derivative by each
    component's weight, in classes' shape, or None; gradient to logits, or None)."""
    dweights = torch.empty(classes.shape, dtype=accumulator(logits.dtype), device=logits.device) if need_dweights else None
    binary_weights = BinaryWeights(class_weight, pos_weight)
    loss, dlogits = _forward(logits, (classes, weights), None, binary_weights, options, dweights, form_gradient)
    return loss, dweights, dlogits


def soft_bce_bwd(logits, weights, classes, class_weight, pos_weight, options, grad_output, cached_grad):
    """Gradient to the logits; grad_output [] or [rows], `cached_grad` as in soft_ce_bwd."""
    binary_weights = BinaryWeights(class_weight, pos_weight)
    return _backward(logits, (classes, weights), None, binary_weights, options, grad_output, cached_grad, (True, False))[0]


def dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, form_gradient):
    """logits and target [N, C, ...] -> (loss; gradient to logits, or None). With lam [N] or [] and index [N] the target holds
    the values of MixedRows."""
    binary_weights = BinaryWeights(class_weight, pos_weight)
    return _forward(logits, None, (target, lam, index), binary_weights, options, None, form_gradient)


def dense_bce_bwd(logits, target, lam, index, class_weight, pos_weight, options, grad_output, cached_grad, need):
    """(gradient to logits or None, gradient to target or None); grad_output [] or [rows], `cached_grad` as in soft_ce_bwd;
    `need`: a bool for each gradient."""
    binary_weights, dense = BinaryWeights(class_weight, pos_weight), (target, lam, index)
    return _backward(logits, None, dense, binary_weights, options, grad_output, cached_grad, need)
