"""Jensen-Shannon divergence of K sets of logits: kernels and their launchers.

Per row, with p_k = softmax(z_k) and m = mean_k p_k:

    loss    = (1/K) sum_k D_k            D_k = sum_c p_k*r_k = sum_c m*((1+u_k)*r_k - u_k)
    dz_k[c] = (1/K) * p_k*(r_k - D_k)    u_k = p_k/m - 1,    r_k = log p_k - log m = log(1 + u_k)

Where distributions are nearly equal the loss is of the order of u**2, so u and r are formed without a difference of numbers
near 1: a class's logits are compared with those of the set that it is likeliest in, b, whose probability is a common factor,

    p_k = exp(z_b - max_b) * e_k/S_k,    e_k = exp((z_k - z_b) - (max_k - max_b)),    S_k = sum_c exp(z_k - max_k)

and the second form of D_k is a sum of terms that are not negative. The gradient takes the first, in which the rounding of S_k
cancels against that of r_k. The stats of a row are three numbers of each set: max_k, S_k, D_k.
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
    on_device_of,
    reduced,
    set_tile,
)
from .convex_combination import Sources, pointers_and_strides, source_ptrs, sources_in_layout_of

SMALL = tl.constexpr(0.25)  # below it exp(x) - 1 and log(1 + x) are evaluated as series


class SetTile(NamedTuple):
    """Sizes of a program's tile of each set: classes, sets, the factor of strides, rows, columns."""

    C: tl.constexpr
    K: tl.constexpr
    ALIGN: tl.constexpr
    ROWS: tl.constexpr
    BLOCK_C: tl.constexpr


@triton.jit
def _expm1(d, e, TERMS: tl.constexpr):
    """Returns exp(d) - 1 of d <= 0, where e = exp(d): sum of d**n/n!"""
    series = tl.full(d.shape, 1.0, d.dtype)
    for n in tl.static_range(TERMS, 1, -1):
        series = 1 + series * d * (1.0 / n)
    return tl.where(d > -SMALL, d * series, e - 1)


@triton.jit
def _logs(w, u, TERMS: tl.constexpr):
    """Returns r and (1+u)*r - u of w = 1 + u >= 0, r = log(w) = 2*atanh(s) with s = u/(2 + u): sum of 2*s**(2n+1)/(2n+1)."""
    s = u / (2 + u)
    square = s * s
    P = tl.full(s.shape, 1.0 / (2 * TERMS + 1), s.dtype)
    for n in tl.static_range(TERMS - 1, 0, -1):
        P = P * square + 1.0 / (2 * n + 1)
    small = tl.abs(u) < SMALL
    r = tl.where(small, 2 * s * (1 + square * P), tl.log(w))
    return r, tl.where(small, u * s * (1 + (s + square) * P), tl.where(w == 0, 0, w * r) - u)


@triton.jit
def _shifted(z, row_max):
    """Returns z - row_max rounded, and the rounding error: their sum is exact."""
    y = z - row_max
    back = y - z
    return y, (z - (y - back)) - (row_max + back)


@triton.jit
def _terms(zs, row_maxes, exp_sums, K: tl.constexpr):
    """Returns m of a tile of K sets z [ROWS, BLOCK_C] with their row_maxes and exp_sums [ROWS], and tuples of each set's p, r
    and phi = (1+u)*r - u."""
    DTYPE: tl.constexpr = row_maxes[0].dtype
    DOUBLE: tl.constexpr = tl.float64 == DTYPE  # takes more terms of the series
    # b, for each element: the set whose logit lies least below its row's maximum
    y_b, lost_b = _shifted(zs[0].to(DTYPE), row_maxes[0][:, None])
    exp_sum_b = exp_sums[0]
    for k in tl.static_range(1, K):
        y, lost = _shifted(zs[k].to(DTYPE), row_maxes[k][:, None])
        lost_b = tl.where(y > y_b, lost, lost_b)
        y_b = tl.where(y > y_b, y, y_b)
        exp_sum_b = tl.maximum(exp_sum_b, exp_sums[k])
    q = tl.exp(y_b)
    # e_k - 1 and the ratio of sums - 1 are small where the sets are alike, so they are added as such
    es, vs = (), ()
    v_mean = tl.zeros(q.shape, DTYPE)
    for k in tl.static_range(K):
        y, lost = _shifted(zs[k].to(DTYPE), row_maxes[k][:, None])
        d = y - y_b
        # where the sets are alike, d is of the order of the rounding errors of y and y_b
        exact = d + (lost - lost_b)
        d = tl.where(tl.abs(exact - d) < SMALL, exact, d)  # false where infinite logits make exact NaN
        d = tl.where(y_b == float("-inf"), 0, d)
        e = tl.exp(d)
        v = _expm1(d, e, 13 if DOUBLE else 7) + e * (exp_sum_b / exp_sums[k] - 1)[:, None]
        es, vs = es + (e,), vs + (v,)
        v_mean += v * (1.0 / K)
    m = q * (1 + v_mean) / exp_sum_b[:, None]
    ps, rs, phis = (), (), ()
    for k in tl.static_range(K):
        u = (vs[k] - v_mean) / (1 + v_mean)
        w = es[k] * (exp_sum_b / exp_sums[k])[:, None] / (1 + v_mean)
        r, phi = _logs(w, u, 9 if DOUBLE else 4)
        ps, rs, phis = ps + (q * es[k] / exp_sums[k][:, None],), rs + (r,), phis + (phi,)
    return m, ps, rs, phis


@triton.jit
def _load_sets(sources, stack, row, cols, mask, tile):
    """Loads a tile of each set. Masked elements are -inf, whose probability is 0."""
    zs = ()
    for k in tl.static_range(tile.K):
        ptrs = source_ptrs(sources, stack, row, k, tile) + cols
        zs = zs + (tl.load(ptrs, mask=mask, other=float("-inf")),)
    return zs


@triton.jit
def _store_gradients(gradients, stack, row, cols, mask, ps, rs, divergences, scale, tile):
    """Stores p*(r - D)*scale of a tile, for each set that needs a gradient; 0 where p is 0, whatever the scale."""
    for k in tl.static_range(tile.K):
        if gradients.ptrs[0 if gradients.STACKED else k] is not None:
            # log of a probability of 0 is -inf, and 0 times that NaN
            grad = tl.where(ps[k] == 0, 0, ps[k] * (rs[k] - divergences[k][:, None]))
            ptrs = source_ptrs(gradients, stack, row, k, tile) + cols
            tl.store(ptrs, tl.where(grad == 0, 0, grad * scale).to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _divergence_sum(p, r):
    """Returns a tile's part of D = sum of p*r [ROWS]."""
    return tl.sum(tl.where(p == 0, 0, p * r), 1)


@triton.jit
def _loss_sum(m, phis, K: tl.constexpr):
    """Returns a tile's part of K times the loss [ROWS]."""
    phi_sum = phis[0]
    for k in tl.static_range(1, K):
        phi_sum += phis[k]
    return tl.sum(m * phi_sum, 1)


@triton.jit(do_not_specialize=["N", "stack", "gradient_stack", "scale_high", "scale_low"])
def _js_divergence_fwd_kernel(
    sources, scale_high, scale_low, loss_ptr, stats_ptr, gradients, N, stack, gradient_stack, BLOCK_K: tl.constexpr, tile
):
    """Loss of rows; their stats if stats_ptr is given; and gradients if given, which is only where one tile holds a row."""
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
            row_maxes, exp_sums = row_maxes + (row_max,), exp_sums + (tl.sum(tl.exp(z - row_max[:, None]), 1),)
        m, ps, rs, phis = _terms(zs, row_maxes, exp_sums, K)
        loss = _loss_sum(m, phis, K)
        if stats_ptr is not None:
            for k in tl.static_range(K):
                divergences = divergences + (_divergence_sum(ps[k], rs[k]),)
            if gradients is not None:
                _store_gradients(gradients, gradient_stack, row, cols, mask, ps, rs, divergences, scale, tile)
    else:
        for k in tl.static_range(K):
            sums = _empty_sums(tile.ROWS, DTYPE)
            ptrs = source_ptrs(sources, stack, row, k, tile)
            for first in range(0, C, tile.BLOCK_C):
                z = tl.load(ptrs + first + cols, mask=row_mask & (first + cols < C), other=float("-inf")).to(DTYPE)
                sums = _add_to_sums(sums, z, z, row_mask, False)
            row_maxes, exp_sums = row_maxes + (sums.row_max,), exp_sums + (sums.exp_sum,)
        loss = tl.zeros((tile.ROWS,), DTYPE)
        # one tensor for all sets: a loop carries no tuple that grows
        divergence_sums = tl.zeros((tile.ROWS, BLOCK_K), DTYPE)
        for first in range(0, C, tile.BLOCK_C):
            zs = _load_sets(sources, stack, row, first + cols, row_mask & (first + cols < C), tile)
            m, ps, rs, phis = _terms(zs, row_maxes, exp_sums, K)
            loss += _loss_sum(m, phis, K)
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
        m, ps, rs, phis = _terms(zs, row_maxes, exp_sums, K)
        scale = grad_output[:, None] * ((tl.zeros((), DTYPE) + scale_high + scale_low) / K)
        _store_gradients(gradients, gradient_stack, row, cols, mask, ps, rs, divergences, scale, tile)


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
                triton.next_power_of_2(K), SetTile(*constants(C, K, align, rows, columns)),
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
