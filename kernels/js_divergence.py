"""Jensen-Shannon divergence of K sets of logits: kernels and their launchers.

Per row, with p_k = softmax(z_k) and m = mean_k p_k:

    loss    = (1/K) sum_k D_k            D_k = sum_c p_k*r_k
    dz_k[c] = (1/K) * p_k*(r_k - D_k)    r_k = log p_k - log m

Where distributions are nearly equal the loss is of the order of r**2, so r is formed without a difference of numbers near 1. A
class's probabilities are compared with the largest of them,

    p_k = q*exp(t_k),  t_k <= 0,  r_k = t_k - log(mean_k exp(t_k)),

where t_k comes of differences between sets, of logits, of max and of log(S), S_k = sum_c exp(z_k - max_k), all small where the sets
are alike. If all t_k of a class are small, its part of the loss is a sum of terms that are not negative, by the mean t of t_k:

    mean_k p_k*r_k = m*(mean_k c_k*(exp(c_k) - 1)/(1 + E) - log(1 + E))    c_k = t_k - t,  E = mean_k (exp(c_k) - 1 - c_k)

The gradient takes the sums D_k as they stand, in which the rounding of S_k cancels against that of r_k.
The stats of a row are three numbers of each set: max_k, S_k, D_k.
Memory floor: each set read once and its gradient written once, in the forward. Rows that do not fit the registers are looped
over: read twice in the forward, for S_k and for D_k, and once more in the backward, which then forms the gradient.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._class_tiles import _add_to_sums, _empty_sums, _load_grad_output
from ._launch import (
    OPTIONS,
    accumulator,
    blocks,
    common_alignment,
    constant,
    constants,
    exp,
    log,
    on_device_of,
    reduced,
    set_tile,
)
from .convex_combination import Sources, pointers_and_strides, source_ptrs, sources_in_layout_of

SMALL = tl.constexpr(0.25)  # below it exp(x) - 1 - x and log(1 + x) are evaluated as series
LEAST = tl.constexpr(-1e30)  # in place of the logarithm of 0: 0 times it is 0


class SetTile(NamedTuple):
    """Sizes of a program's tile of each set: classes, sets, the factor of strides, rows, columns."""

    C: tl.constexpr
    K: tl.constexpr
    ALIGN: tl.constexpr
    ROWS: tl.constexpr
    BLOCK_C: tl.constexpr


@triton.jit
def _log(w, u):
    """Returns log(w) of w = 1 + u >= 0, 2*atanh(s) with s = u/(2 + u): sum of 2*s**(2n+1)/(2n+1)."""
    TERMS: tl.constexpr = 9 if u.dtype == tl.float64 else 4
    s = u / (2 + u)
    square = s * s
    series = tl.full(s.shape, 1.0 / (2 * TERMS + 1), s.dtype)
    for n in tl.static_range(TERMS - 1, 0, -1):
        series = series * square + 1.0 / (2 * n + 1)
    return tl.where(tl.abs(u) < SMALL, 2 * s * (1 + square * series), tl.log(w))


@triton.jit
def _small_log1p(x):
    """Returns log(1 + x) of x in [0, SMALL**2/2]."""
    if x.dtype == tl.float64:
        value = _log(1 + x, x)
    else:
        value = x * -0.23797222 + 0.33310977
        value = value * x - 0.4999988
        value = (value * x) * x + x
    return value


@triton.jit
def _small_exp(c):
    """Returns exp(c) - 1 - c of c in [-SMALL, SMALL], by the sum of c**n/n! or by a polynomial at Chebyshev's nodes."""
    if c.dtype == tl.float64:
        value = tl.full(c.shape, 1.0, c.dtype)
        for n in tl.static_range(15, 2, -1):
            value = 1 + value * (c * (1.0 / n))
        value = 0.5 * value
    else:
        value = c * 0.0013895342 + 0.008348839
        value = value * c + 0.041666716
        value = value * c + 0.16666642
        value = value * c + 0.5
    return value * (c * c)


@triton.jit
def _product(a, b):
    """Returns a*b, which no compiler merges with an addition: merged with the first of a sum over lanes, it would leave different
    last bits in different lanes."""
    return tl.fma(a, b, tl.zeros(a.shape, a.dtype))


@triton.jit
def _shifted(z, row_max):
    """Returns z - row_max rounded, and the rounding error: their sum is exact."""
    y = z - row_max
    back = y - z
    return y, (z - (y - back)) - (row_max + back)


@triton.jit
def _set_logs(zs, row_maxes, exp_sums, K: tl.constexpr):
    """Returns, for a tile of K sets z [ROWS, BLOCK_C], each set's z - max - log(S), less what a class's sets have in common: the
    largest z - max of a class, which is returned too, and the log(S) of the first set."""
    DTYPE: tl.constexpr = row_maxes[0].dtype
    BITS: tl.constexpr = zs[0].dtype.primitive_bitwidth
    y_b, lost_b = _shifted(zs[0].to(DTYPE), row_maxes[0][:, None])
    for k in tl.static_range(1, K):
        y, lost = _shifted(zs[k].to(DTYPE), row_maxes[k][:, None])
        lost_b = tl.where(y > y_b, lost, lost_b)
        y_b = tl.maximum(y_b, y)
    ts = ()
    for k in tl.static_range(K):
        y, lost = _shifted(zs[k].to(DTYPE), row_maxes[k][:, None])
        t = y - y_b
        if BITS >= 32:  # else logits have so few bits that z - max is exact
            # where the sets are alike, t is of the order of the rounding errors of y and y_b
            exact = t + (lost - lost_b)
            t = tl.where(tl.abs(exact - t) < SMALL, exact, t)  # false where infinite logits make exact NaN
        if k > 0:
            t -= _log(exp_sums[k] / exp_sums[0], (exp_sums[k] - exp_sums[0]) / exp_sums[0])[:, None]
        ts = ts + (tl.where(y_b == float("-inf"), 0, t),)
    return ts, y_b


@triton.jit
def _terms(zs, row_maxes, exp_sums, K: tl.constexpr):
    """Returns K times a class's part of the loss, of a tile of K sets z [ROWS, BLOCK_C] with their row_maxes and exp_sums [ROWS],
    and tuples of each set's p and r."""
    DTYPE: tl.constexpr = row_maxes[0].dtype
    ts, y_b = _set_logs(zs, row_maxes, exp_sums, K)
    t_max, t_min, t_sum = ts[0], ts[0], ts[0]
    for k in tl.static_range(1, K):
        t_max, t_min, t_sum = tl.maximum(t_max, ts[k]), tl.minimum(t_min, ts[k]), t_sum + ts[k]
    t_mean = t_sum * (1.0 / K)
    factor = 1 / exp_sums[0]
    for k in tl.static_range(1, K):
        factor += 0 * exp_sums[k]  # NaN where that is: maximum and minimum pass over NaN
    q = exp(y_b + t_max) * factor[:, None]

    # 1. each set's probability, and the sums of a class whose t are small
    ps = ()
    p_sum = tl.zeros(q.shape, DTYPE)
    E_sum = tl.zeros(q.shape, DTYPE)
    square_sum = tl.zeros(q.shape, DTYPE)
    for k in tl.static_range(K):
        e = exp(ts[k] - t_max)
        c = ts[k] - t_mean
        E = _small_exp(c)
        p_sum += e
        E_sum += E
        square_sum += c * (c + E)
        ps = ps + (q * e,)
    E, e_mean = E_sum * (1.0 / K), p_sum * (1.0 / K)

    # 2. each set's r, and the loss
    small = t_max - t_min < SMALL
    small_log = _small_log1p(E)
    log_mean = tl.where(small, t_mean + small_log, t_max + log(e_mean))
    rs = ()
    loss = tl.zeros(q.shape, DTYPE)
    for k in tl.static_range(K):
        r = tl.maximum(ts[k] - log_mean, LEAST)
        loss += ps[k] * r
        rs = rs + (r,)
    small_loss = (q * p_sum) * (square_sum * (1.0 / K) * exp(-small_log) - small_log)
    return tl.where(small, small_loss, loss), ps, rs


@triton.jit
def _load_sets(sources, stack, row, cols, mask, tile):
    """Loads a tile of each set. Masked elements are -inf, whose probability is 0."""
    zs = ()
    for k in tl.static_range(tile.K):
        ptrs = source_ptrs(sources, stack, row, k, tile) + cols
        zs = zs + (tl.load(ptrs, mask=mask, other=float("-inf")),)
    return zs


@triton.jit
def _store_gradients(gradients, stack, row, cols, mask, terms, scale, tile, MAY_BE_INFINITE: tl.constexpr):
    """Stores p*(r - D)*scale of a tile, for each set that needs a gradient; 0 where p is 0, whatever the scale. terms: p, r and D of
    each set."""
    ps, rs, divergences = terms
    for k in tl.static_range(tile.K):
        if gradients.ptrs[0 if gradients.STACKED else k] is not None:
            grad = ps[k] * (rs[k] - divergences[k][:, None])
            if MAY_BE_INFINITE:
                grad = tl.where(grad == 0, 0, grad * scale)
            else:
                grad *= scale
            ptrs = source_ptrs(gradients, stack, row, k, tile) + cols
            tl.store(ptrs, grad.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _divergence_sum(p, r):
    """Returns a tile's part of D = sum of p*r [ROWS]."""
    return tl.sum(_product(p, r), 1)


@triton.jit(do_not_specialize=["N", "stack", "gradient_stack", "scale_high", "scale_low"])
def _js_divergence_fwd_kernel(
    sources, scale_high, scale_low, loss_ptr, stats_ptr, gradients, N, stack, gradient_stack,
    FORM: tl.constexpr, BLOCK_K: tl.constexpr, tile,
):  # fmt: skip
    """Loss of rows; their stats if stats_ptr is given; and gradients if FORM, which is only where one tile holds a row. (Triton 3.6
    cannot compare gradients with None: they may hold it.)"""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    C: tl.constexpr = tile.C.value
    K: tl.constexpr = tile.K.value
    row = (tl.program_id(0) * tile.ROWS + tl.arange(0, tile.ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]; addresses are int64
    row_mask, cols = row < N, tl.arange(0, tile.BLOCK_C)[None, :]
    # added in DTYPE, which may be float64
    scale = (tl.zeros((), DTYPE) + scale_high + scale_low) / K
    row_maxes, exp_sums, divergences = (), (), ()
    if C <= tile.BLOCK_C:
        mask = row_mask & (cols < C)
        zs = _load_sets(sources, stack, row, cols, mask, tile)
        for k in tl.static_range(K):
            z = zs[k].to(DTYPE)
            row_max = tl.max(z, 1)
            row_maxes, exp_sums = row_maxes + (row_max,), exp_sums + (tl.sum(exp(z - row_max[:, None]), 1),)
        losses, ps, rs = _terms(zs, row_maxes, exp_sums, K)
        loss = tl.sum(losses, 1)
        if stats_ptr is not None:
            for k in tl.static_range(K):
                divergences = divergences + (_divergence_sum(ps[k], rs[k]),)
            if FORM:
                _store_gradients(gradients, gradient_stack, row, cols, mask, (ps, rs, divergences), scale, tile, False)
    else:
        for k in tl.static_range(K):
            sums = _empty_sums(tile.ROWS, DTYPE)
            ptrs = source_ptrs(sources, stack, row, k, tile)
            for first in range(0, C, tile.BLOCK_C):
                z = tl.load(ptrs + first + cols, mask=row_mask & (first + cols < C), other=float("-inf")).to(DTYPE)
                sums, _ = _add_to_sums(sums, z, None, None, None, False)
            row_maxes, exp_sums = row_maxes + (sums.row_max,), exp_sums + (sums.exp_sum,)
        loss = tl.zeros((tile.ROWS,), DTYPE)
        # one tensor for all sets: a loop carries no tuple that grows
        divergence_sums = tl.zeros((tile.ROWS, BLOCK_K), DTYPE)
        for first in range(0, C, tile.BLOCK_C):
            zs = _load_sets(sources, stack, row, first + cols, row_mask & (first + cols < C), tile)
            losses, ps, rs = _terms(zs, row_maxes, exp_sums, K)
            loss += tl.sum(losses, 1)
            if stats_ptr is not None:
                for k in tl.static_range(K):
                    divergence_sums += tl.where(tl.arange(0, BLOCK_K)[None, :] == k, _divergence_sum(ps[k], rs[k])[:, None], 0)
        for k in tl.static_range(K):
            divergences = divergences + (tl.sum(tl.where(tl.arange(0, BLOCK_K)[None, :] == k, divergence_sums, 0), 1),)
    tl.store(loss_ptr + row, (loss * scale)[:, None], mask=row_mask)
    if stats_ptr is not None:
        for k in tl.static_range(K):
            ptrs = stats_ptr + k * N.to(tl.int64) + row
            tl.store(ptrs, row_maxes[k][:, None], mask=row_mask)
            tl.store(ptrs + K * N.to(tl.int64), exp_sums[k][:, None], mask=row_mask)
            tl.store(ptrs + 2 * K * N.to(tl.int64), divergences[k][:, None], mask=row_mask)


@triton.jit(do_not_specialize=["N", "stack", "gradient_stack", "scale_high", "scale_low", "grad_output_stride"])
def _js_divergence_bwd_kernel(
    sources, scale_high, scale_low, stats_ptr, grad_output_ptr, gradients, N, stack, gradient_stack, grad_output_stride,
    GRAD_CACHED: tl.constexpr, tile,
):  # fmt: skip
    """One tile of the gradients, from the logits and the stats of the forward. grad_output is applied before the one rounding.
    GRAD_CACHED: gradients holds them for a grad_output of 1, and rows that have it are left alone."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    C: tl.constexpr = tile.C.value
    K: tl.constexpr = tile.K.value
    tiles: tl.constexpr = (tile.C + tile.BLOCK_C - 1) // tile.BLOCK_C
    r = (tl.program_id(0) // tiles).to(tl.int64) * tile.ROWS + tl.arange(0, tile.ROWS)
    row, cols = r[:, None], (tl.program_id(0) % tiles) * tile.BLOCK_C + tl.arange(0, tile.BLOCK_C)[None, :]
    mask = (row < N) & (cols < C)
    grad_output, must_write = _load_grad_output(grad_output_ptr, r, grad_output_stride, r < N, GRAD_CACHED, DTYPE)
    if must_write != 0:
        row_maxes, exp_sums, divergences = (), (), ()
        for k in tl.static_range(K):
            ptrs = stats_ptr + k * N.to(tl.int64) + r
            row_maxes = row_maxes + (tl.load(ptrs, mask=r < N, other=0),)
            exp_sums = exp_sums + (tl.load(ptrs + K * N.to(tl.int64), mask=r < N, other=1),)
            divergences = divergences + (tl.load(ptrs + 2 * K * N.to(tl.int64), mask=r < N, other=0),)
        zs = _load_sets(sources, stack, row, cols, mask, tile)
        losses, ps, rs = _terms(zs, row_maxes, exp_sums, K)
        scale = grad_output[:, None] * ((tl.zeros((), DTYPE) + scale_high + scale_low) / K)
        _store_gradients(gradients, gradient_stack, row, cols, mask, (ps, rs, divergences), scale, tile, True)


def _two_floats(scale, N, reduction):
    """The scale, over N under a mean, as the sum of two float32 numbers: Triton passes Python floats as float32."""
    scale = scale / N if reduction == "mean" else scale
    mantissa, exponent = math.frexp(scale)
    high = math.ldexp(round(mantissa * 2**24), exponent - 24)
    return high, scale - high


def _new_gradients(sources, need):
    """Memory for the gradients: stacked if `need` is a bool, else a tuple with None for each set that needs no gradient."""
    if isinstance(need, bool):
        return torch.empty(sources.shape, dtype=sources.dtype, device=sources.device)
    make = functools.partial(torch.empty, sources[0].shape, dtype=sources[0].dtype, device=sources[0].device)
    return tuple(make() if needed else None for needed in need)


def _kernel_sets(sources, gradients):
    """(sources, gradients or None) as kernels take them, (their stack strides), alignment that all strides are in units of."""
    N, C = sources[0].shape
    like = torch.empty((N, C), dtype=sources[0].dtype, device="meta")  # classes with stride 1
    ptrs, strides, stack = pointers_and_strides(sources_in_layout_of(sources, like))
    stacked, gradient_stack = not isinstance(sources, tuple), 0
    if gradients is not None and stacked:
        gradients, gradient_stack = (gradients,), N * C
    align = math.gcd(common_alignment(C), *strides, stack, gradient_stack)
    if gradients is not None:
        gradients = Sources(gradients, (C // align,) * len(gradients), constant(stacked))
    kernel_sources = Sources(ptrs, tuple(stride // align for stride in strides), constant(stacked))
    return kernel_sources, gradients, (stack // align, gradient_stack // align), align


def js_divergence_fwd(sources, scale, reduction, need, form_gradient):
    """sources [K, N, C] and `need` a bool, or a tuple of K tensors [N, C] and K bools: which sets will need a gradient -> (scale
    times the loss; stats [3, K, N] for js_divergence_bwd, or None; gradients as js_divergence_bwd returns them, or None)."""
    first, K = sources[0], len(sources)
    N, C = first.shape
    dtype = accumulator(first.dtype)
    rows, columns, warps, resident = set_tile(C, K, first.element_size(), True)
    need_stats = need if isinstance(need, bool) else any(need)
    loss = torch.empty(N, dtype=dtype, device=first.device)
    stats = torch.empty((3, K, N), dtype=dtype, device=first.device) if need_stats else None
    gradients = _new_gradients(sources, need) if form_gradient and resident else None
    if N:
        kernel_sources, kernel_gradients, stacks, align = _kernel_sets(sources, gradients)
        with on_device_of(first):
            _js_divergence_fwd_kernel[(blocks(N, rows),)](
                kernel_sources, *_two_floats(scale, N, reduction), loss, stats, kernel_gradients, N, *stacks,
                gradients is not None, triton.next_power_of_2(K), SetTile(*constants(C, K, align, rows, columns)),
                num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return reduced(loss, reduction), stats, gradients


def js_divergence_bwd(sources, scale, reduction, stats, grad_output, cached_grad, need):
    """Gradients of the sets, stacked or a tuple with Nones, from the stats of the forward; grad_output [] or [N], `cached_grad`
    as in soft_ce_bwd."""
    grad_output = grad_output.resolve_neg()
    first, K = sources[0], len(sources)
    N, C = first.shape
    gradients = _new_gradients(sources, need) if cached_grad is None else cached_grad
    if N:
        rows, columns, warps, _ = set_tile(C, K, first.element_size(), False)
        kernel_sources, kernel_gradients, stacks, align = _kernel_sets(sources, gradients)
        with on_device_of(first):
            _js_divergence_bwd_kernel[(blocks(N, rows) * blocks(C, columns),)](
                kernel_sources, *_two_floats(scale, N, reduction), stats, grad_output, kernel_gradients, N, *stacks,
                grad_output.stride(0) if grad_output.dim() else 0, cached_grad is not None,
                SetTile(*constants(C, K, align, rows, columns)), num_warps=warps, **OPTIONS,
            )  # fmt: skip
    return gradients
