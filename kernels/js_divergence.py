"""Jensen-Shannon divergence of K sets of logits: kernels and their launchers.

Per row, with p_k = softmax(z_k) and m = mean_k p_k:

    loss    = (1/K) sum_k D_k            D_k = sum_c p_k*r_k = sum_c m*((1+u_k)*r_k - u_k)
    dz_k[c] = (1/K) * p_k*(r_k - D_k)    u_k = p_k/m - 1,    r_k = log p_k - log m = log(1 + u_k)

Where distributions are nearly equal the loss is of the order of u**2, so u and r are formed without a difference of numbers
near 1: a class's logits are compared with those of the set that it is likeliest in, b, whose probability is a common factor,

    p_k = exp(z_b - top_b) * e_k/S_k,    e_k = exp((z_k - z_b) - (top_k - top_b)),    S_k = sum_c exp(z_k - top_k)

and the second form of D_k is a sum of terms that are not negative. The gradient takes the first, in which the rounding of S_k
cancels against that of r_k. A row is summed up by three numbers of each set for whoever forms its gradient: top_k, S_k, D_k.
Memory floor: each set read once and its gradient written once, in the forward. Rows that do not fit the registers are walked:
read twice in the forward, for S_k and for D_k, and once more in the backward, which then forms the gradient.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from ._class_tiles import _online, _todo
from ._launch import OPTIONS, accumulator, blocks, common_alignment, on_device_of, reduced, set_tile
from .convex_combination import _base, _bits, _stored, _units

SMALL = tl.constexpr(0.25)  # below it exp(x) - 1 and log(1 + x) are sums of their series


@triton.jit
def _expm1(d, e, TERMS: tl.constexpr):
    """exp(d) - 1 of d <= 0, where e = exp(d): sum of d**n/n!"""
    total = tl.full(d.shape, 1.0, d.dtype)
    for n in tl.static_range(TERMS, 1, -1):
        total = 1 + total * d * (1.0 / n)
    return tl.where(d > -SMALL, d * total, e - 1)


@triton.jit
def _logs(w, u, TERMS: tl.constexpr):
    """(r, (1+u)*r - u) of w = 1 + u >= 0, r = log(w) = 2*atanh(s) with s = u/(2 + u): sum of 2*s**(2n+1)/(2n+1)."""
    s = u / (2 + u)
    square = s * s
    P = tl.full(s.shape, 1.0 / (2 * TERMS + 1), s.dtype)
    for n in tl.static_range(TERMS - 1, 0, -1):
        P = P * square + 1.0 / (2 * n + 1)
    small = tl.abs(u) < SMALL
    r = tl.where(small, 2 * s * (1 + square * P), tl.log(w))
    return r, tl.where(small, u * s * (1 + (s + square) * P), tl.where(w == 0, 0, w * r) - u)


@triton.jit
def _below(z, top):
    """z - top as the sum of a number and what its rounding lost."""
    y = z - top
    back = y - z
    return y, (z - (y - back)) - (top + back)


@triton.jit
def _terms(zs, tops, totals, K: tl.constexpr):
    """Of a tile of K sets z [ROWS, BLOCK_C], with their tops and totals [ROWS]: m, and for each set p, r and (1+u)*r - u."""
    DTYPE: tl.constexpr = tops[0].dtype
    DEEP: tl.constexpr = tl.float64 == DTYPE
    y_b, lost_b = _below(zs[0].to(DTYPE), tops[0][:, None])
    total_b = totals[0]
    for k in tl.static_range(1, K):
        y, lost = _below(zs[k].to(DTYPE), tops[k][:, None])
        lost_b = tl.where(y > y_b, lost, lost_b)
        y_b = tl.where(y > y_b, y, y_b)
        total_b = tl.maximum(total_b, totals[k])
    q = tl.exp(y_b)
    es, vs = (), ()
    v_mean = tl.zeros(q.shape, DTYPE)
    for k in tl.static_range(K):
        y, lost = _below(zs[k].to(DTYPE), tops[k][:, None])
        d = y - y_b
        exact = d + (lost - lost_b)
        d = tl.where(tl.abs(exact - d) < SMALL, exact, d)  # not where logits are infinite
        d = tl.where(y_b == float("-inf"), 0, d)
        e = tl.exp(d)
        v = _expm1(d, e, 13 if DEEP else 7) + e * (total_b / totals[k] - 1)[:, None]
        es, vs = es + (e,), vs + (v,)
        v_mean += v * (1.0 / K)
    m = q * (1 + v_mean) / total_b[:, None]
    ps, rs, phis = (), (), ()
    for k in tl.static_range(K):
        u = (vs[k] - v_mean) / (1 + v_mean)
        w = es[k] * (total_b / totals[k])[:, None] / (1 + v_mean)
        r, phi = _logs(w, u, 9 if DEEP else 4)
        ps, rs, phis = ps + (q * es[k] / totals[k][:, None],), rs + (r,), phis + (phi,)
    return m, ps, rs, phis


@triton.jit
def _load(sources, strides, stack, row, cols, inside, K: tl.constexpr, STACKED: tl.constexpr, ALIGN: tl.constexpr):
    """A tile of each set; what is not inside has no probability."""
    zs = ()
    for k in tl.static_range(K):
        at = _base(sources, strides, stack, row, ALIGN, STACKED, k) + cols
        zs = zs + (tl.load(at, mask=inside, other=float("-inf")),)
    return zs


@triton.jit
def _store(gradients, strides, stack, row, cols, inside, ps, rs, means, scale,
           NEEDED: tl.constexpr, K: tl.constexpr, STACKED: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """A tile of p*(r - D)*scale of each set whose bit in NEEDED is set; 0 where p is, whatever the scale."""
    for k in tl.static_range(K):
        if (NEEDED >> k) & 1:
            grad = tl.where(ps[k] == 0, 0, ps[k] * (rs[k] - means[k][:, None]))
            at = _base(gradients, strides, stack, row, ALIGN, STACKED, k) + cols
            tl.store(at, tl.where(grad == 0, 0, grad * scale).to(at.dtype.element_ty), mask=inside)


@triton.jit
def _mean(p, r):
    """This tile's share of D = sum of p*r."""
    return tl.sum(tl.where(p == 0, 0, p * r), 1)


@triton.jit
def _all(m, phis, K: tl.constexpr):
    """This tile's share of K times the loss."""
    total = phis[0]
    for k in tl.static_range(1, K):
        total += phis[k]
    return tl.sum(m * total, 1)


@triton.jit(do_not_specialize=["N", "stack", "gradient_stack", "factor", "rest"])
def _js_divergence_fwd_kernel(
    sources, loss_ptr, stats_ptr, gradients,
    N, stack, source_rows, gradient_stack, gradient_rows, factor, rest,
    NEED_STATS: tl.constexpr, NEEDED: tl.constexpr, C: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
    STACKED: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """NEEDED: whose gradients are formed; nobody's where rows are walked."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]; addresses are int64
    live, lanes = row < N, tl.arange(0, BLOCK_C)[None, :]
    scale = (tl.zeros((), DTYPE) + factor + rest) / K
    tops, totals, means = (), (), ()
    if C <= BLOCK_C:
        inside = live & (lanes < C)
        zs = _load(sources, source_rows, stack, row, lanes, inside, K, STACKED, ALIGN)
        for k in tl.static_range(K):
            z = zs[k].to(DTYPE)
            top = tl.max(z, 1)
            tops, totals = tops + (top,), totals + (tl.sum(tl.exp(z - top[:, None]), 1),)
        m, ps, rs, phis = _terms(zs, tops, totals, K)
        loss = _all(m, phis, K)
        if NEED_STATS:
            for k in tl.static_range(K):
                means = means + (_mean(ps[k], rs[k]),)
            _store(gradients, gradient_rows, gradient_stack, row, lanes, inside, ps, rs, means, scale,
                   NEEDED, K, STACKED, ALIGN)  # fmt: skip
    else:
        for k in tl.static_range(K):
            top = tl.full((ROWS,), float("-inf"), DTYPE)
            total = tl.zeros((ROWS,), DTYPE)
            at = _base(sources, source_rows, stack, row, ALIGN, STACKED, k)
            for first in range(0, C, BLOCK_C):
                z = tl.load(at + first + lanes, mask=live & (first + lanes < C), other=float("-inf")).to(DTYPE)
                top, total, _, _ = _online(z, z, live, top, total, top, top, False)
            tops, totals = tops + (top,), totals + (total,)
        loss = tl.zeros((ROWS,), DTYPE)
        every = tl.zeros((ROWS, LANES), DTYPE)
        for first in range(0, C, BLOCK_C):
            zs = _load(sources, source_rows, stack, row, first + lanes, live & (first + lanes < C), K, STACKED, ALIGN)
            m, ps, rs, phis = _terms(zs, tops, totals, K)
            loss += _all(m, phis, K)
            if NEED_STATS:
                for k in tl.static_range(K):
                    every += tl.where(tl.arange(0, LANES)[None, :] == k, _mean(ps[k], rs[k])[:, None], 0)
        for k in tl.static_range(K):
            means = means + (tl.sum(tl.where(tl.arange(0, LANES)[None, :] == k, every, 0), 1),)
    tl.store(loss_ptr + row, (loss * scale)[:, None], mask=live)
    if NEED_STATS:
        for k in tl.static_range(K):
            at = stats_ptr + k * N.to(tl.int64) + row
            tl.store(at, tops[k][:, None], mask=live)
            tl.store(at + K * N.to(tl.int64), totals[k][:, None], mask=live)
            tl.store(at + 2 * K * N.to(tl.int64), means[k][:, None], mask=live)


@triton.jit(do_not_specialize=["N", "stack", "gradient_stack", "factor", "rest", "up_row"])
def _js_divergence_bwd_kernel(
    sources, stats_ptr, up_ptr, gradients,
    N, stack, source_rows, gradient_stack, gradient_rows, up_row, factor, rest,
    FORMED: tl.constexpr, NEEDED: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    STACKED: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients, from the logits and the forward's numbers, the upstream gradient applied before the one rounding.
    FORMED: they are there for upstream 1; where that is right, nothing is done."""
    DTYPE: tl.constexpr = stats_ptr.dtype.element_ty
    tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    r = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, cols = r[:, None], (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < N) & (cols < C)
    up = tl.load(up_ptr + r * up_row, mask=r < N, other=1).to(DTYPE)
    todo = _todo(up, FORMED)
    if todo != 0:
        tops, totals, means = (), (), ()
        for k in tl.static_range(K):
            at = stats_ptr + k * N.to(tl.int64) + r
            tops = tops + (tl.load(at, mask=r < N, other=0),)
            totals = totals + (tl.load(at + K * N.to(tl.int64), mask=r < N, other=1),)
            means = means + (tl.load(at + 2 * K * N.to(tl.int64), mask=r < N, other=0),)
        zs = _load(sources, source_rows, stack, row, cols, inside, K, STACKED, ALIGN)
        m, ps, rs, phis = _terms(zs, tops, totals, K)
        scale = up[:, None] * ((tl.zeros((), DTYPE) + factor + rest) / K)
        _store(gradients, gradient_rows, gradient_stack, row, cols, inside, ps, rs, means, scale, NEEDED, K, STACKED, ALIGN)


def _factor(scale, N, reduction):
    """scale, over N under a mean, as two float32 numbers: an argument of a kernel has no more."""
    factor = scale / N if reduction == "mean" else scale
    mantissa, exponent = math.frexp(factor)
    high = math.ldexp(round(mantissa * 2**24), exponent - 24)
    return high, factor - high


def _empty(sources, need):
    """Memory for the gradients: stacked for a stacked tensor and a bool, else a tuple with Nones where they are not needed."""
    if isinstance(need, bool):
        return torch.empty(sources.shape, dtype=sources.dtype, device=sources.device)
    make = functools.partial(torch.empty, sources[0].shape, dtype=sources[0].dtype, device=sources[0].device)
    return tuple(make() if needed else None for needed in need)


def _arguments(sources, gradients):
    """(sets, gradients, their strides, constants) as the kernels take them; whose gradient is not needed gives itself instead."""
    (N, C), K, stacked = sources[0].shape, len(sources), not isinstance(sources, tuple)
    rows = torch.empty((N, C), dtype=sources[0].dtype, device="meta")  # whose classes have stride 1
    tensors, strides, stack = _stored(sources, rows)
    needed, written, written_stack = 0, tensors, 0
    if gradients is not None and stacked:
        needed, written, written_stack = (1 << K) - 1, (gradients,), N * C
    elif gradients is not None:
        needed = _bits(t is not None for t in gradients)
        written = tuple(source if t is None else t for source, t in zip(tensors, gradients, strict=True))
    align, strides, (stack, written_stack) = _units(common_alignment(C), [*strides, C], stack, written_stack)
    every = tuple(strides[:-1]), (strides[-1],) * len(written)
    return tensors, written, (N, stack, every[0], written_stack, every[1]), {
        "NEEDED": needed, "C": C, "K": K, "STACKED": stacked, "ALIGN": align,
    }  # fmt: skip


def js_divergence_fwd(sources, scale, reduction, need, form_gradient):
    """sources [K, N, C] or a tuple of K tensors [N, C], `need`: whose gradient will be, a bool or a tuple of K bools -> (scale
    times the loss; what js_divergence_bwd wants to be given again; gradients, as js_divergence_bwd gives them, or None)."""
    first, K = sources[0], len(sources)
    N, C = first.shape
    dtype = accumulator(first.dtype)
    rows, columns, warps, held = set_tile(C, K, first.element_size(), True)
    save = need if isinstance(need, bool) else any(need)
    loss = torch.empty(N, dtype=dtype, device=first.device)
    stats = torch.empty((3, K, N), dtype=dtype, device=first.device) if save else None
    gradients = _empty(sources, need) if form_gradient and held else None
    if N:
        tensors, written, strides, constants = _arguments(sources, gradients)
        with on_device_of(first):
            _js_divergence_fwd_kernel[(blocks(N, rows),)](
                tensors, loss, stats if save else loss, written,
                *strides, *_factor(scale, N, reduction),
                NEED_STATS=save, LANES=triton.next_power_of_2(K), ROWS=rows, BLOCK_C=columns, num_warps=warps,
                **constants, **OPTIONS,
            )  # fmt: skip
    return reduced(loss, reduction), stats, gradients


def js_divergence_bwd(sources, scale, reduction, stats, upstream, formed, need):
    """Gradients of the sets, stacked or a tuple with Nones, from the forward's stats; upstream [] or [N]. `formed`: what the
    forward has formed, which is taken over and, where upstream is not 1, written anew (as many bytes as scaling it, and one
    rounding), or None."""
    upstream = upstream.resolve_neg()
    first, K = sources[0], len(sources)
    N, C = first.shape
    gradients = _empty(sources, need) if formed is None else formed
    if N:
        rows, columns, warps, _ = set_tile(C, K, first.element_size(), False)
        tensors, written, strides, constants = _arguments(sources, gradients)
        with on_device_of(first):
            _js_divergence_bwd_kernel[(blocks(N, rows) * blocks(C, columns),)](
                tensors, stats, upstream, written,
                *strides, upstream.stride(0) if upstream.dim() else 0, *_factor(scale, N, reduction),
                FORMED=formed is not None, ROWS=rows, BLOCK_C=columns, num_warps=warps, **constants, **OPTIONS,
            )  # fmt: skip
    return gradients
