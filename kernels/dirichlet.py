"""Weights of a Dirichlet distribution for each row, in one launch.

    w[k] = exp(log g[k] - max) / sum over j of exp(log g[j] - max),    g[k] ~ Gamma(alpha)

With the share m ~ Beta(a, b) of all ways together: (1 - m, m*w[0], m*w[1], ...). Memory floor: the weights are written.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._draws import EXACT, ROUNDS, SKIP, WAYS, lesser, log_gamma, logit, numbers_of, short, source_of
from ._launch import blocks, on_device_of


@triton.jit(do_not_specialize=["rows", "rounds"])
def _dirichlet_kernel(states, shape_ptr, out_ptr, rows, rounds, WAYS_OF: tl.constexpr, SKIPS: tl.constexpr,
                      ROWS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """w ~ Dirichlet(alpha, ...): a softmax of logarithms of Gamma variables; with SKIPS (1-m, m*w) with m ~ Beta."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    way = tl.arange(0, LANES)[None, :]
    inside = live[:, None] & (way < WAYS_OF)
    source = source_of(states, 0, rounds, 1)
    item = row[:, None] * WAYS_OF + way
    alpha = item * 0.0 + tl.load(shape_ptr)
    logs = log_gamma(item, WAYS, item * 0, source, alpha, inside)
    logs = tl.where(way < WAYS_OF, logs, float("-inf"))
    weights = short(tl.exp(logs - tl.max(logs, 1)[:, None]))
    weights /= tl.sum(weights, 1)[:, None]
    out = out_ptr + row * (WAYS_OF + SKIPS)
    if SKIPS:
        a, b = row * 0.0 + tl.load(shape_ptr + 1), row * 0.0 + tl.load(shape_ptr + 2)
        least, low = lesser(logit(row, SKIP, row * 0, source, a, b, live))
        weights *= tl.where(low, least, 1 - least)[:, None]
        tl.store(out, tl.where(low, 1 - least, least).to(out_ptr.dtype.element_ty), mask=live)
    tl.store(out[:, None] + (way + SKIPS), weights.to(out_ptr.dtype.element_ty), mask=inside)


def dirichlet(state, rows, ways, numbers, dtype, device):
    """Returns Dirichlet weights [rows, ways] of numbers (alpha,), or behind the share of the clean batch of numbers (alpha, a, b):
    a tuple, or a float64 tensor."""
    skips = int(len(numbers) > 1)
    out = torch.empty((rows, ways + skips), dtype=dtype, device=device)
    if rows:
        lanes = triton.next_power_of_2(ways)
        rows_of = max(1, _launch.WAYS_LANES // lanes)
        shapes = numbers_of(numbers if isinstance(numbers, torch.Tensor) else (numbers,), device)
        with on_device_of(out):
            _dirichlet_kernel[(blocks(rows, rows_of),)](
                (state,), shapes, out, rows, ROUNDS, ways, skips, rows_of, lanes, num_warps=_launch.WAYS_WARPS, **EXACT
            )
    return out
