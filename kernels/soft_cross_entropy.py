"""Soft-label cross-entropy on K-hot targets: kernels and their launchers.

Per row, over the components (c_k, a_k) whose class is not ignored, smoothing e, class weights w:

    loss  = sum_k a_k * ((1-e)*w[c_k]*(lse - z[c_k]) + (e/C)*sum_c w[c]*(lse - z[c]))
    dz[c] = S*softmax(z)[c] - (1-e)*sum_k a_k*w[c_k]*[c = c_k] - (e/C)*A*w[c]
            with A = sum_k a_k and S = (1-e)*sum_k a_k*w[c_k] + (e/C)*A*sum_c w[c]

lse - z is evaluated as log(sum of exp(z - max)) + (max - z). Logits are seen as [O, C, I]: [N, C] is one outer with N inner
rows, [N, C, d1, ...] has N outer and d1*... inner. Row r = o*I + i of the loss. A row is summed up by three numbers for whoever
forms its gradient: max, S/sum (0: nothing to learn here; NaN: a class out of range), and with smoothing (e/C)*A.
Memory floor: logits read once, gradient written once, both in the forward. Rows beyond one tile are read twice: by one program, or
where they are few by a program for each tile, whose sums the forward combines in their order.
"""

import torch
import triton
import triton.language as tl

from ._class_tiles import View, _at, _class_weights, _ends, _head, _lanes, _online, _rows, _start, _times, _todo, layout
from ._launch import OPTIONS, PART_CLASSES, accumulator, blocks, class_parts, class_tile, on_device_of, reduced


@triton.jit
def _component(class_ptr, a_ptr, w_ptr, o, i, k, live, c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
               C: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Component k of the rows: its class (in range), its a_k and w[c_k] (a 0 if ignored), and whether the class is wrong."""
    c = tl.load(class_ptr + o * c_o + i * c_i + (o * 0 + k) * c_k, mask=live, other=0)
    counts = live & (c != ignore_index)
    known = (c >= 0) & (c < C)
    c = tl.where(counts & known, c, 0)
    if WEIGHTS:
        a = tl.load(a_ptr + o * a_o + i * a_i + (o * 0 + k) * a_k, mask=counts, other=0).to(DTYPE)
    else:
        a = counts.to(DTYPE)
    if CLASS_WEIGHT:
        w = tl.load(w_ptr + c, mask=live, other=0).to(DTYPE)
    else:
        w = live.to(DTYPE)
    return c, a, w, counts, counts & (known == 0)


@triton.jit
def _gradient(z, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, cols, head, within, live,
              c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
              C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
              VECTOR: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The gradient of a tile of logits. What is 0 stays 0 whatever the scale."""
    grad = _times(share[:, None], tl.exp(z - top[:, None]))
    for k in range(K):
        c, a, w, counts, wrong = _component(class_ptr, a_ptr, w_ptr, o, i, k, live, c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                                            C, WEIGHTS, CLASS_WEIGHT, DTYPE)  # fmt: skip
        grad -= tl.where(cols == (c - head if VECTOR > 1 else c)[:, None], ((1 - SMOOTHING) * a * w)[:, None], 0)
    if SMOOTHING > 0:
        if CLASS_WEIGHT:
            grad -= smooth[:, None] * _class_weights(w_ptr, cols, head, within, CLASS_WEIGHT, VECTOR, DTYPE)
        else:
            grad -= smooth[:, None]
    return tl.where(grad == 0, 0, grad * scale)


@triton.jit
def _end_sums(z_ptr, w_ptr, start, head, live, top, total, mass, gap,
              C: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, VECTOR: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """The rows' ends, element by element, for the four sums over classes."""
    cols, within = _ends(head, C, VECTOR)
    inside = live[:, None] & within
    z = tl.load(z_ptr + start[:, None] + cols, mask=inside, other=float("-inf")).to(DTYPE)
    u = _class_weights(w_ptr, cols, head, inside, CLASS_WEIGHT, 1, DTYPE)
    return _online(z, u, inside, top, total, mass, gap, SMOOTHING > 0)


@triton.jit
def _end_gradients(z_ptr, dz_ptr, start, dz_start, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, head, live,
                   c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                   C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr,
                   SMOOTHING: tl.constexpr, VECTOR: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The gradient of the rows' ends, read and stored."""
    cols, within = _ends(head, C, VECTOR)
    inside = live[:, None] & within
    z = tl.load(z_ptr + start[:, None] + cols, mask=inside, other=0).to(DTYPE)
    grad = _gradient(z, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, cols, head, inside, live,
                     c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                     C, K, WEIGHTS, CLASS_WEIGHT, SMOOTHING, 1, DTYPE)  # fmt: skip
    tl.store(dz_ptr + dz_start[:, None] + cols, grad.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combined(parts_ptr, r, rows, live, PARTS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr):
    """max, sum of exp(z - max), sum of w and sum of w*(max - z) of whole rows from those of their parts, [4, rows, PARTS]."""
    lane = tl.arange(0, LANES)[None, :]
    inside = live[:, None] & (lane < PARTS)
    at = parts_ptr + r[:, None] * PARTS + lane
    step = rows.to(tl.int64) * PARTS
    tops = tl.load(at, mask=inside, other=float("-inf")).to(DTYPE)
    masses = tl.load(at + 2 * step, mask=inside, other=0)
    top = tl.max(tops, 1)
    shift = tl.where(top == float("-inf"), 0, top)
    total = tl.sum(tl.load(at + step, mask=inside, other=0) * tl.exp(tops - shift[:, None]), 1)
    gap = _times(masses, shift[:, None] - tl.where(tops == float("-inf"), 0, tops))
    gap = tl.sum(tl.load(at + 3 * step, mask=inside, other=0) + gap, 1)
    return top, total, tl.sum(masses, 1), gap


@triton.jit(do_not_specialize=["I", "rows"])
def _soft_ce_part_kernel(
    z_ptr, w_ptr, parts_ptr,
    I, rows,
    z_o, z_c, z_i,
    C: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the forward sums over classes, for one tile of a row: a few rows of many classes are for more programs than rows."""
    DTYPE: tl.constexpr = parts_ptr.dtype.element_ty
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o, i, live, start = _rows(tl.program_id(0) // parts, I, z_o, z_i, ALIGN, PIXELS, ROWS)
    first = (tl.program_id(0) % parts) * BLOCK_C
    head = _head(z_ptr, start, VECTOR)
    top = tl.full((ROWS,), float("-inf"), DTYPE)
    total = tl.zeros((ROWS,), DTYPE)
    mass = tl.zeros((ROWS,), DTYPE)
    gap = tl.zeros((ROWS,), DTYPE)
    if VECTOR > 1:  # noqa: SIM102 (one is of the compiler's, the other of the device's)
        if first == 0:
            top, total, mass, gap = _end_sums(z_ptr, w_ptr, start, head, live, top, total, mass, gap,
                                              C, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip
    cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
    inside = live[:, None] & within
    z = tl.load(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), mask=inside, other=float("-inf")).to(DTYPE)
    u = _class_weights(w_ptr, cols, head, within, CLASS_WEIGHT, VECTOR, DTYPE)
    top, total, mass, gap = _online(z, u, inside, top, total, mass, gap, SMOOTHING > 0)
    at = parts_ptr + (o * I + i) * parts + tl.program_id(0) % parts
    step = rows.to(tl.int64) * parts
    tl.store(at, top, mask=live)
    tl.store(at + step, total, mask=live)
    tl.store(at + 2 * step, mass, mask=live)
    tl.store(at + 3 * step, gap, mask=live)


@triton.jit(do_not_specialize=["I", "rows", "ignore_index"])
def _soft_ce_fwd_kernel(
    z_ptr, class_ptr, a_ptr, w_ptr, mass_ptr, parts_ptr, loss_ptr, stats_ptr, da_ptr, dz_ptr,
    I, rows,
    z_o, z_c, z_i, c_o, c_k, c_i, a_o, a_k, a_i, dz_o, dz_c, dz_i, ignore_index,
    C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, MEAN: tl.constexpr,
    SMOOTHING: tl.constexpr, NEED_DA: tl.constexpr, FORM_GRADIENT: tl.constexpr, PARTS: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """PARTS: the sums over the classes are there, in as many parts."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    if PIXELS:
        I, z_c, dz_c = I * ALIGN, z_c * ALIGN, dz_c * ALIGN
    o, i, live, start = _rows(tl.program_id(0), I, z_o, z_i, ALIGN, PIXELS, ROWS)
    r = o * I + i
    head = _head(z_ptr, start, VECTOR)
    top = tl.full((ROWS,), float("-inf"), DTYPE)
    total = tl.zeros((ROWS,), DTYPE)
    mass = tl.zeros((ROWS,), DTYPE)
    gap = tl.zeros((ROWS,), DTYPE)
    cols, within = _lanes(0, head, C, VECTOR, BLOCK_C)
    z = tl.zeros((ROWS, BLOCK_C), DTYPE)
    if PARTS > 0:
        top, total, mass, gap = _combined(parts_ptr, r, rows, live, PARTS, BLOCK_C, DTYPE)
    else:
        if VECTOR > 1:
            top, total, mass, gap = _end_sums(z_ptr, w_ptr, start, head, live, top, total, mass, gap,
                                              C, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip
        for first in range(0, C, BLOCK_C):
            cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
            inside = live[:, None] & within
            z = tl.load(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), mask=inside, other=float("-inf")).to(DTYPE)
            u = _class_weights(w_ptr, cols, head, within, CLASS_WEIGHT, VECTOR, DTYPE)
            top, total, mass, gap = _online(z, u, inside, top, total, mass, gap, SMOOTHING > 0)
    log_total = tl.log(total)
    spread = gap + _times(mass, log_total)  # sum_c w[c]*(lse - z[c])

    loss = tl.zeros((ROWS,), DTYPE)
    share = tl.zeros((ROWS,), DTYPE)
    smooth = tl.zeros((ROWS,), DTYPE)
    active = tl.zeros((ROWS,), tl.int32)
    bad = tl.zeros((ROWS,), tl.int32)
    for k in range(K):
        c, a, w, counts, wrong = _component(class_ptr, a_ptr, w_ptr, o, i, k, live, c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                                            C, WEIGHTS, CLASS_WEIGHT, DTYPE)  # fmt: skip
        if PIXELS and C <= BLOCK_C:  # it is in z, and a gather would take a sector a pixel
            zc = tl.sum(tl.where(cols == c[:, None], z, 0), 1)
        else:
            zc = tl.load(z_ptr + start + c * z_c, mask=live, other=0).to(DTYPE)
        value = (1 - SMOOTHING) * _times(w, log_total + (top - zc))
        if SMOOTHING > 0:
            value += (SMOOTHING / C) * spread
            smooth += (SMOOTHING / C) * a
        if NEED_DA:
            tl.store(da_ptr + (o * K + k) * I + i, tl.where(counts, value, 0), mask=live)
        loss += _times(a, value)
        share += (1 - SMOOTHING) * a * w
        active |= (a != 0).to(tl.int32)
        bad |= wrong.to(tl.int32)
    share = tl.where(active != 0, (share + smooth * mass) / total, 0)
    share = tl.where(bad != 0, float("nan"), share)
    loss = tl.where(bad != 0, float("nan"), loss)
    scale = 1.0
    if MEAN:
        scale = 1.0 / tl.load(mass_ptr)
    tl.store(loss_ptr + r, loss * scale, mask=live)
    tl.store(stats_ptr + r, top, mask=live)
    tl.store(stats_ptr + rows.to(tl.int64) + r, share, mask=live)
    if SMOOTHING > 0:
        tl.store(stats_ptr + 2 * rows.to(tl.int64) + r, smooth, mask=live)

    if FORM_GRADIENT:
        dz_start = _start(o, i, dz_o, dz_i, ALIGN, PIXELS)
        head = _head(dz_ptr, dz_start, VECTOR)  # the same, computed again: nothing is kept in registers for it
        for first in range(0, C, BLOCK_C):
            cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
            inside = live[:, None] & within
            if C > BLOCK_C:  # else z still holds the row
                z = tl.load(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), mask=inside, other=0).to(DTYPE)
            grad = _gradient(z, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, cols, head, within, live,
                             c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                             C, K, WEIGHTS, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip
            at = _at(dz_ptr, dz_start, head, first, dz_c, VECTOR, BLOCK_C)
            tl.store(at, grad.to(dz_ptr.dtype.element_ty), mask=inside)
        if VECTOR > 1:
            _end_gradients(z_ptr, dz_ptr, start, dz_start, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, head, live,
                           c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                           C, K, WEIGHTS, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip


@triton.jit(do_not_specialize=["I", "rows", "ignore_index", "up_row"])
def _soft_ce_bwd_kernel(
    z_ptr, class_ptr, a_ptr, w_ptr, mass_ptr, stats_ptr, up_ptr, dz_ptr,
    I, rows,
    z_o, z_c, z_i, c_o, c_k, c_i, a_o, a_k, a_i, dz_o, dz_c, dz_i, up_row, ignore_index,
    C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, MEAN: tl.constexpr,
    SMOOTHING: tl.constexpr, UPSTREAM: tl.constexpr, FORMED: tl.constexpr,
    ALIGN: tl.constexpr, PIXELS: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient from the logits and the forward's three numbers a row, the upstream gradient (without UPSTREAM:
    1) applied before the one rounding. FORMED: dz holds the gradient for upstream 1; where that is right, nothing is done."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    if PIXELS:
        I, z_c, dz_c = I * ALIGN, z_c * ALIGN, dz_c * ALIGN
    o, i, live, start = _rows(tl.program_id(0) // tiles, I, z_o, z_i, ALIGN, PIXELS, ROWS)
    r = o * I + i
    up = tl.full((ROWS,), 1, DTYPE)
    if UPSTREAM:
        up = tl.load(up_ptr + r * up_row, mask=live, other=1).to(DTYPE)
    todo = _todo(up, FORMED)
    if todo != 0:
        first = (tl.program_id(0) % tiles) * BLOCK_C
        head = _head(z_ptr, start, VECTOR)
        cols, within = _lanes(first, head, C, VECTOR, BLOCK_C)
        inside = live[:, None] & within
        z = tl.load(_at(z_ptr, start, head, first, z_c, VECTOR, BLOCK_C), mask=inside, other=0).to(DTYPE)
        top = tl.load(stats_ptr + r, mask=live, other=0)
        share = tl.load(stats_ptr + rows.to(tl.int64) + r, mask=live, other=0)
        smooth = share
        if SMOOTHING > 0:
            smooth = tl.load(stats_ptr + 2 * rows.to(tl.int64) + r, mask=live, other=0)
        scale = up[:, None]
        if MEAN:
            scale /= tl.load(mass_ptr)
        grad = _gradient(z, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, cols, head, within, live,
                         c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                         C, K, WEIGHTS, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip
        dz_start = _start(o, i, dz_o, dz_i, ALIGN, PIXELS)
        at = _at(dz_ptr, dz_start, head, first, dz_c, VECTOR, BLOCK_C)
        tl.store(at, grad.to(dz_ptr.dtype.element_ty), mask=inside)
        if VECTOR > 1:  # noqa: SIM102 (one is of the compiler's, the other of the device's)
            if first == 0:
                _end_gradients(z_ptr, dz_ptr, start, dz_start, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, head, live,
                               c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                               C, K, WEIGHTS, CLASS_WEIGHT, SMOOTHING, VECTOR, DTYPE)  # fmt: skip


@triton.jit(do_not_specialize=["I", "rows", "ignore_index"])
def _mass_kernel(
    class_ptr, a_ptr, w_ptr, out_ptr,
    I, rows, c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
    C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This program's share of D = sum of a_k*w[c_k] over all rows and components that are not ignored."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    mass = tl.zeros((BLOCK,), DTYPE)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        r = first + tl.arange(0, BLOCK)
        o, i = r // I, r % I
        for k in range(K):
            c, a, w, counts, wrong = _component(class_ptr, a_ptr, w_ptr, o, i, k, r < rows, c_o, c_k, c_i, a_o, a_k, a_i,
                                                ignore_index, C, WEIGHTS, CLASS_WEIGHT, DTYPE)  # fmt: skip
            mass += a * w
    tl.store(out_ptr + tl.program_id(0), tl.sum(mass, 0))


def target_strides(t: torch.Tensor) -> list[int]:
    """Strides of contiguous classes or weights [N, K] or [N, K, d1, ...] over outer, component and inner."""
    if t.dim() == 2:
        return [0, t.stride(1), t.stride(0)]
    return [t.stride(0), t.stride(1), t.stride(-1)]


def _target(view: View, classes, weights):
    """(classes, weights, their strides): weights of [N, K] are the same for all inner rows of an outer one."""
    classes = classes.contiguous()
    c = target_strides(classes)
    if weights is None:
        return classes, classes, c + [0, 0, 0]
    weights = weights.resolve_neg()
    if weights.dim() == 2 and classes.dim() > 2:
        return classes, weights, c + [weights.stride(0), weights.stride(1), 0]
    weights = weights.contiguous()
    return classes, weights, c + target_strides(weights)


def _mass(view, dtype, classes, a, strides, class_weight, ignore_index, K, WEIGHTS):
    """D, the divisor of reduction="mean": a scalar tensor."""
    programs = min(blocks(view.rows, 512), 512)
    mass = torch.empty(() if programs == 1 else programs, dtype=dtype, device=classes.device)
    if programs:
        with on_device_of(classes):
            _mass_kernel[(programs,)](
                classes, a, a if class_weight is None else class_weight, mass,
                view.I, view.rows, *strides, ignore_index,
                C=view.C, K=K, WEIGHTS=WEIGHTS, CLASS_WEIGHT=class_weight is not None, BLOCK=512,
                num_warps=4, **OPTIONS,
            )  # fmt: skip
    return mass if programs == 1 else mass.sum()


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
    shape, mean = classes.shape, reduction == "mean"
    classes, a, strides = _target(view, classes, weights)
    target = classes, a, strides, weights is not None, class_weight, ignore_index, label_smoothing
    mass = _mass(view, dtype, classes, a, strides, class_weight, ignore_index, K, weights is not None) if mean else None
    if view.rows:
        grad = View(dlogits) if form_gradient else view
        how = layout(view, grad)
        more = K > 4 or (label_smoothing > 0 and class_weight is not None)  # to keep in registers, beside a row
        rows, columns, warps = class_tile(
            view.C, how.pixels, how.wide, how.vector, logits.dtype, operands=2 if more else 1, smoothing=label_smoothing > 0
        )
        parts, sums = class_parts(view.rows, view.C, columns, how.pixels), loss
        if parts:
            sums = _parts(view, how, dtype, parts, class_weight, label_smoothing)
            rows, columns, warps = 1, triton.next_power_of_2(parts), 1
        whole = form_gradient and not parts
        with on_device_of(logits):
            _soft_ce_fwd_kernel[(view.O * blocks(view.I, rows),)](
                view.tensor, classes, a, a if class_weight is None else class_weight, loss if mass is None else mass, sums,
                loss, stats, dweights if need_dweights else loss, dlogits if whole else loss,
                how.I, view.rows, *how.strides[0], *strides, *how.strides[1], ignore_index,
                C=view.C, K=K, WEIGHTS=weights is not None, CLASS_WEIGHT=class_weight is not None, MEAN=mean,
                SMOOTHING=label_smoothing, NEED_DA=need_dweights, FORM_GRADIENT=whole, PARTS=parts,
                **how.constants, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
        if form_gradient and parts:
            _gradient_tiles(view, grad, *target, mass, stats, None, False)
    if need_dweights:
        dweights = dweights[0].t() if logits.dim() == 2 else dweights.view(shape)
    return reduced(loss, reduction), mass, stats, dweights, dlogits


def _parts(view, how, dtype, parts, class_weight, label_smoothing):
    """[4, rows, parts]: what is summed over classes, tile by tile."""
    sums = torch.empty((4, view.rows, parts), dtype=dtype, device=view.tensor.device)
    with on_device_of(view.tensor):
        _soft_ce_part_kernel[(view.rows * parts,)](
            view.tensor, sums if class_weight is None else class_weight, sums,
            how.I, view.rows, *how.strides[0],
            C=view.C, CLASS_WEIGHT=class_weight is not None, SMOOTHING=label_smoothing,
            **how.constants, ROWS=1, BLOCK_C=PART_CLASSES, num_warps=8, **OPTIONS,
        )  # fmt: skip
    return sums


def _gradient_tiles(
    view, grad, classes, a, strides, WEIGHTS, class_weight, ignore_index, label_smoothing, mass, stats, upstream, formed
):
    """Launches the backward kernel: the gradient to view into grad, for upstream [], [rows] or None: 1."""
    how = layout(view, grad)
    rows, columns, warps = class_tile(view.C, how.pixels, how.wide, how.vector, view.tensor.dtype, whole=False)
    with on_device_of(view.tensor):
        _soft_ce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
            view.tensor, classes, a, a if class_weight is None else class_weight, stats if mass is None else mass,
            stats, stats if upstream is None else upstream, grad.tensor,
            how.I, view.rows, *how.strides[0], *strides, *how.strides[1],
            upstream.stride(0) if upstream is not None and upstream.dim() else 0, ignore_index,
            C=view.C, K=classes.shape[1], WEIGHTS=WEIGHTS, CLASS_WEIGHT=class_weight is not None, MEAN=mass is not None,
            SMOOTHING=label_smoothing, UPSTREAM=upstream is not None, FORMED=formed,
            **how.constants, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
        )  # fmt: skip


def soft_ce_bwd(logits, weights, classes, class_weight, options, mass, stats, upstream, formed):
    """Gradient to the logits from the forward's stats; upstream [] or [rows]. `formed`: what the forward has formed, which is
    taken over and, where upstream is not 1, written anew (as many bytes as scaling it, and one rounding), or None."""
    upstream = upstream.resolve_neg()
    view = View(logits)
    dlogits = torch.empty_like(view.tensor) if formed is None else formed
    if view.rows:
        target = (
            *_target(view, classes, weights),
            weights is not None,
            class_weight,
            options.ignore_index,
            options.label_smoothing,
        )
        _gradient_tiles(view, View(dlogits), *target, mass, stats, upstream, formed is not None)
    return dlogits
