"""The mean of a K-hot loss in two launches: its denominator, summed up before, and the sum of the rows' losses, which the loss's
own kernel adds up."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._class_tiles import Rows
from ._launch import (
    ADDED_PROGRAMS,
    DENOMINATOR_PROGRAMS,
    DENOMINATOR_ROWS,
    DENOMINATOR_WARPS,
    OPTIONS,
    blocks,
    constant,
    on_device_of,
)
from ._loss_targets import _load_component

DENOMINATOR_SUMS = tl.constexpr(DENOMINATOR_PROGRAMS)
ADDED_BLOCK = tl.constexpr(1024)  # losses that the last program adds up at a time
COUNTER = tl.constexpr(4)  # elements of the counter, so that what follows it begins at 16 bytes


class Mean(NamedTuple):
    """Memory of a mean. `sums`: up to DENOMINATOR_SUMS parts of the denominator; the number of programs that are done, 0 at first; and,
    if losses are ADDED, the sum of each program's. It is a call's own, so that neither
    streams nor graphs share it, and _mass_kernel sets it up."""

    sums: torch.Tensor
    denominator: torch.Tensor
    ADDED: tl.constexpr


@triton.jit
def _denominator(mean, parts):
    """Returns the denominator, its parts added up in one order by every program; the first one stores it."""
    n = tl.arange(0, DENOMINATOR_SUMS)
    denominator = tl.sum(tl.load(mean.sums + n, mask=n < parts, other=0), 0)
    if tl.program_id(0) == 0:
        tl.store(mean.denominator, denominator)
    return denominator


@triton.jit
def _keep_loss(loss, mean):
    """Keeps the sum of this program's losses."""
    tl.store(mean.sums + DENOMINATOR_SUMS + COUNTER + tl.program_id(0), loss)


@triton.jit
def _add_losses(mean, loss_ptr):
    """In the program that is the last to come here, adds up the losses that all have kept, in their order."""
    losses_ptr = mean.sums + DENOMINATOR_SUMS + COUNTER
    tl.debug_barrier()  # the counter's thread may be another than the one that stored
    before = tl.atomic_add(mean.sums + DENOMINATOR_SUMS, 1.0, sem="acq_rel")
    if before == tl.num_programs(0) - 1:
        total = tl.zeros((ADDED_BLOCK,), losses_ptr.dtype.element_ty)
        for block in range(0, (tl.num_programs(0) + ADDED_BLOCK - 1) // ADDED_BLOCK):
            # past the L1 cache, which may be older than the other programs' stores
            n = block * ADDED_BLOCK + tl.arange(0, ADDED_BLOCK)
            total += tl.load(losses_ptr + n, mask=n < tl.num_programs(0), other=0, cache_modifier=".cg")
        tl.store(loss_ptr, tl.sum(total, 0))


@triton.jit(do_not_specialize=["I", "num_rows", "ignore_index"])
def _mass_kernel(
    target, class_weight_ptr, ignore_index, sums_ptr, I, num_rows, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """This program's part of the denominator D = sum of a_k*w[c_k] over all rows and components that are not ignored. The first
    program sets a Mean's counter to 0."""
    DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
    weight_sum = tl.zeros((BLOCK,), DTYPE)
    # a fixed number of programs, and int64: rows may be more than 2**31
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, num_rows, tl.num_programs(0) * BLOCK):
        r = first + tl.arange(0, BLOCK)
        rows = Rows(r // I, r % I, r < num_rows, r)  # the last, for the prologue, is not read
        for k in range(target.K):
            component = _load_component(k, target, class_weight_ptr, ignore_index, rows, C, DTYPE)
            weight_sum += component.a * component.w
    tl.store(sums_ptr + tl.program_id(0), tl.sum(weight_sum, 0))
    if tl.program_id(0) == 0:
        tl.store(sums_ptr + DENOMINATOR_SUMS, 0.0)


def start_mean(view, dtype, target, class_weight, ignore_index, programs):
    """(a Mean for so many programs of the forward; of how many parts its denominator is)."""
    parts = min(blocks(view.rows, DENOMINATOR_ROWS), DENOMINATOR_PROGRAMS)
    added = programs if programs <= ADDED_PROGRAMS else 0
    denominator = torch.empty((), dtype=dtype, device=view.tensor.device)
    sums = torch.empty(DENOMINATOR_PROGRAMS + COUNTER.value + added, dtype=dtype, device=view.tensor.device)
    with on_device_of(view.tensor):
        _mass_kernel[(parts,)](
            target, class_weight, ignore_index, sums, view.I, view.rows, view.C, DENOMINATOR_ROWS,
            num_warps=DENOMINATOR_WARPS, **OPTIONS,
        )  # fmt: skip
    return Mean(sums, denominator, constant(added > 0)), parts
