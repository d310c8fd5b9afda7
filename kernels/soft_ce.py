"""Soft-label cross-entropy on K-hot targets: kernels and their launchers.

Per row, over the components (c_k, a_k) whose class is not ignored, smoothing e, class weights w:

    loss  = sum_k a_k * ((1-e)*w[c_k]*(lse - z[c_k]) + (e/C)*sum_c w[c]*(lse - z[c]))
    dz[c] = S*softmax(z)[c] - (1-e)*sum_k a_k*w[c_k]*[c = c_k] - (e/C)*A*w[c]
            with A = sum_k a_k and S = (1-e)*sum_k a_k*w[c_k] + (e/C)*A*sum_c w[c]

lse - z is evaluated as log(sum of exp(z - max)) + (max - z). Logits are seen as [O, C, I]: [N, C] is one outer with N inner
rows, [N, C, d1, ...] has N outer and d1*... inner. Row r = o*I + i of the loss. A row is summed up by three numbers for whoever
forms its gradient: max, S/sum (0: nothing to learn here; NaN: a class out of range), and (e/C)*A.
Memory floor: logits read once, gradient written once, both in the forward; rows beyond one tile are read twice.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ._launch import OPTIONS, accumulator, blocks, class_tile, common_alignment, on_device_of, reduced


@triton.jit
def _rows(pid, I, z_o, z_i, ALIGN: tl.constexpr, ROWS: tl.constexpr):
    """Outer index of the pid-th block of rows, inner indices [ROWS], which of them exist, and where their logits start."""
    row_blocks = tl.cdiv(I, ROWS)
    o = (pid // row_blocks).to(tl.int64)
    i = ((pid % row_blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return o, i, i < I, o * z_o * ALIGN + i * z_i * ALIGN


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
def _times(a, b):
    """a*b, where a weight a of 0 means that b is not looked at."""
    return tl.where(a == 0, 0, a * b)


@triton.jit
def _online(z, u, live, top, total, mass, gap, MASS: tl.constexpr):
    """One more tile z [ROWS, BLOCK_C], with weights u, for the running max, sum of exp(z - max), sum of u, and
    sum of u*(max - z). A max of -inf (every class so far masked) counts as 0 here."""
    new = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(new == float("-inf"), 0, new)
    old = tl.where(top == float("-inf"), 0, top)
    total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
    if MASS:
        gap += _times(mass, shift - old) + tl.sum(tl.where(live & (u != 0), u * (shift[:, None] - z), 0), 1)
        mass += tl.sum(u, 1)
    return new, total, mass, gap


@triton.jit
def _class_weights(w_ptr, cols, C: tl.constexpr, CLASS_WEIGHT: tl.constexpr, DTYPE: tl.constexpr):
    if CLASS_WEIGHT:
        w = tl.load(w_ptr + cols, mask=cols < C, other=0).to(DTYPE)
    else:
        w = (cols < C).to(DTYPE)
    return w[None, :]


@triton.jit
def _gradient(z, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, cols, live,
              c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
              C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """The gradient of a tile of logits. What is 0 stays 0 whatever the scale."""
    grad = _times(share[:, None], tl.exp(z - top[:, None]))
    for k in range(K):
        c, a, w, counts, wrong = _component(class_ptr, a_ptr, w_ptr, o, i, k, live, c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                                            C, WEIGHTS, CLASS_WEIGHT, DTYPE)  # fmt: skip
        grad -= tl.where(cols[None, :] == c[:, None], ((1 - SMOOTHING) * a * w)[:, None], 0)
    if SMOOTHING > 0:
        grad -= smooth[:, None] * _class_weights(w_ptr, cols, C, CLASS_WEIGHT, DTYPE)
    return tl.where(grad == 0, 0, grad * scale)


@triton.jit(do_not_specialize=["I", "rows", "ignore_index"])
def _soft_ce_fwd_kernel(
    z_ptr, class_ptr, a_ptr, w_ptr, mass_ptr, loss_ptr, stats_ptr, da_ptr, dz_ptr,
    I, rows,
    z_o, z_c, z_i, c_o, c_k, c_i, a_o, a_k, a_i, dz_o, dz_c, dz_i, ignore_index,
    C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, MEAN: tl.constexpr,
    SMOOTHING: tl.constexpr, NEED_DA: tl.constexpr, FORM_GRADIENT: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    o, i, live, start = _rows(tl.program_id(0), I, z_o, z_i, ALIGN, ROWS)
    r = o * I + i
    lanes = tl.arange(0, BLOCK_C)
    top = tl.full((ROWS,), float("-inf"), DTYPE)
    total = tl.zeros((ROWS,), DTYPE)
    mass = tl.zeros((ROWS,), DTYPE)
    gap = tl.zeros((ROWS,), DTYPE)
    z = tl.zeros((ROWS, BLOCK_C), DTYPE)
    for first in range(0, C, BLOCK_C):
        cols = first + lanes
        inside = live[:, None] & (cols < C)[None, :]
        at = z_ptr + start[:, None] + cols.to(tl.int64)[None, :] * z_c
        z = tl.load(at, mask=inside, other=float("-inf")).to(DTYPE)
        u = _class_weights(w_ptr, cols, C, CLASS_WEIGHT, DTYPE)
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
    tl.store(stats_ptr + 2 * rows.to(tl.int64) + r, smooth, mask=live)

    if FORM_GRADIENT:
        dz_start = o * dz_o * ALIGN + i * dz_i * ALIGN
        for first in range(0, C, BLOCK_C):
            cols = first + lanes
            inside = live[:, None] & (cols < C)[None, :]
            if C > BLOCK_C:  # else z still holds the row
                z = tl.load(z_ptr + start[:, None] + cols.to(tl.int64)[None, :] * z_c, mask=inside, other=0).to(DTYPE)
            grad = _gradient(z, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, cols, live,
                             c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                             C, K, WEIGHTS, CLASS_WEIGHT, SMOOTHING, DTYPE)  # fmt: skip
            at = dz_ptr + dz_start[:, None] + cols.to(tl.int64)[None, :] * dz_c
            tl.store(at, grad.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["I", "rows", "ignore_index", "up_row"])
def _soft_ce_bwd_kernel(
    z_ptr, class_ptr, a_ptr, w_ptr, mass_ptr, stats_ptr, up_ptr, dz_ptr,
    I, rows,
    z_o, z_c, z_i, c_o, c_k, c_i, a_o, a_k, a_i, dz_o, dz_c, dz_i, up_row, ignore_index,
    C: tl.constexpr, K: tl.constexpr, WEIGHTS: tl.constexpr, CLASS_WEIGHT: tl.constexpr, MEAN: tl.constexpr,
    SMOOTHING: tl.constexpr, FORMED: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient from the logits and the forward's three numbers a row, the upstream gradient applied
    before the one rounding. FORMED: dz holds the gradient for upstream 1; where that is right, nothing is done."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o, i, live, start = _rows(tl.program_id(0) // tiles, I, z_o, z_i, ALIGN, ROWS)
    r = o * I + i
    cols = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = live[:, None] & (cols < C)[None, :]
    up = tl.load(up_ptr + r * up_row, mask=live, other=1).to(DTYPE)
    todo = 1
    if FORMED:
        todo = tl.max((up != 1).to(tl.int32), 0)
    if todo != 0:
        z = tl.load(z_ptr + start[:, None] + cols.to(tl.int64)[None, :] * z_c, mask=inside, other=0).to(DTYPE)
        top = tl.load(stats_ptr + r, mask=live, other=0)
        share = tl.load(stats_ptr + rows.to(tl.int64) + r, mask=live, other=0)
        smooth = tl.load(stats_ptr + 2 * rows.to(tl.int64) + r, mask=live, other=0)
        scale = up[:, None]
        if MEAN:
            scale /= tl.load(mass_ptr)
        grad = _gradient(z, top, share, smooth, scale, class_ptr, a_ptr, w_ptr, o, i, cols, live,
                         c_o, c_k, c_i, a_o, a_k, a_i, ignore_index,
                         C, K, WEIGHTS, CLASS_WEIGHT, SMOOTHING, DTYPE)  # fmt: skip
        at = dz_ptr + (o * dz_o * ALIGN + i * dz_i * ALIGN)[:, None] + cols.to(tl.int64)[None, :] * dz_c
        tl.store(at, grad.to(dz_ptr.dtype.element_ty), mask=inside)


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


class View:
    """Logits, or a tensor of their shape, as [O, C, I] without a copy where the layout allows."""

    def __init__(self, t: torch.Tensor):
        t = t.resolve_neg()
        known = _strides_of(t.shape, t.stride())
        if known is None:
            t = t.contiguous()
            known = _strides_of(t.shape, t.stride())
        self.tensor = t
        self.C = t.shape[1]
        self.O, self.I, self.strides = known
        self.rows = self.O * self.I


@functools.lru_cache(maxsize=1024)
def _strides_of(shape, strides):
    """(O, I, strides of outer, class, inner) of a tensor, or None where inner dimensions do not follow one stride."""
    if len(shape) == 2:
        return 1, shape[0], (0, strides[1] if shape[1] > 1 else 1, strides[0])
    inner = [(size, stride) for size, stride in zip(shape[2:], strides[2:], strict=True) if size != 1]
    if 0 not in shape and any(outer != size * stride for (_, outer), (size, stride) in zip(inner, inner[1:], strict=False)):
        return None
    I = math.prod(shape[2:])
    return shape[0], I, (strides[0], strides[1] if shape[1] > 1 else 1, inner[-1][1] if inner else 1)


def aligned(*views: View) -> tuple[int, list[tuple[int, int, int]]]:
    """(alignment, strides of each view with those between rows in units of it)"""
    return _aligned(*[view.strides for view in views])


@functools.lru_cache(maxsize=1024)
def _aligned(*strides):
    align = common_alignment(*[stride for o, _, i in strides for stride in (o, i)])
    return align, [(o // align, c, i // align) for o, c, i in strides]


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


def soft_ce_fwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, reduction, need_dweights, form_gradient):
    """logits [N, C, ...], classes [N, K, ...] int64, weights [N, K] or classes' shape or None (ones), class_weight [C] or None
    -> (loss; mass [], the divisor of a mean, or None: 1; what soft_ce_bwd wants to be given again; each component's own loss,
    in classes' shape, or None; gradient to logits over mass, or None)."""
    view = View(logits)
    K = classes.shape[1]
    dtype = accumulator(logits.dtype)
    dlogits = torch.empty_like(view.tensor) if form_gradient else None
    grad = View(dlogits) if form_gradient else view
    loss = torch.empty((logits.shape[0], *logits.shape[2:]), dtype=dtype, device=logits.device)
    stats = torch.empty((3, view.rows), dtype=dtype, device=logits.device)
    dweights = torch.empty((view.O, K, view.I), dtype=dtype, device=logits.device) if need_dweights else None
    shape, mean = classes.shape, reduction == "mean"
    classes, a, strides = _target(view, classes, weights)
    mass = _mass(view, dtype, classes, a, strides, class_weight, ignore_index, K, weights is not None) if mean else None
    if view.rows:
        align, (z, dz) = aligned(view, grad)
        more = K > 4 or (label_smoothing > 0 and class_weight is not None)  # to keep in registers, beside a row
        rows, columns, warps = class_tile(view.C, view.strides[1], align, logits.dtype, operands=2 if more else 1)
        with on_device_of(logits):
            _soft_ce_fwd_kernel[(view.O * blocks(view.I, rows),)](
                view.tensor, classes, a, a if class_weight is None else class_weight, loss if mass is None else mass,
                loss, stats, dweights if need_dweights else loss, dlogits if form_gradient else loss,
                view.I, view.rows, *z, *strides, *dz, ignore_index,
                C=view.C, K=K, WEIGHTS=weights is not None, CLASS_WEIGHT=class_weight is not None, MEAN=mean,
                SMOOTHING=label_smoothing, NEED_DA=need_dweights, FORM_GRADIENT=form_gradient,
                ALIGN=align, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    if need_dweights:
        dweights = dweights[0].t() if logits.dim() == 2 else dweights.view(shape)
    return reduced(loss, reduction), mass, (stats,), dweights, dlogits


def soft_ce_bwd(logits, classes, weights, class_weight, ignore_index, label_smoothing, mass, stats, upstream, formed):
    """Gradient to the logits from the forward's stats; upstream [] or [rows]. `formed`: what the forward has formed, which is
    taken over and, where upstream is not 1, written anew (as many bytes as scaling it, and one rounding), or None."""
    (stats,), upstream = stats, upstream.resolve_neg()
    view = View(logits)
    dlogits = torch.empty_like(view.tensor) if formed is None else formed
    if view.rows:
        grad = View(dlogits)
        K = classes.shape[1]
        align, (z, dz) = aligned(view, grad)
        rows, columns, warps = class_tile(view.C, view.strides[1], align, logits.dtype, whole=False)
        classes, a, strides = _target(view, classes, weights)
        with on_device_of(logits):
            _soft_ce_bwd_kernel[(view.O * blocks(view.I, rows) * blocks(view.C, columns),)](
                view.tensor, classes, a, a if class_weight is None else class_weight, stats if mass is None else mass,
                stats, upstream, dlogits,
                view.I, view.rows, *z, *strides, *dz, upstream.stride(0) if upstream.dim() else 0, ignore_index,
                C=view.C, K=K, WEIGHTS=weights is not None, CLASS_WEIGHT=class_weight is not None, MEAN=mass is not None,
                SMOOTHING=label_smoothing, FORMED=formed is not None,
                ALIGN=align, ROWS=rows, BLOCK_C=columns, num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return dlogits
