"""What samplers draw, in C: sample.c. The arguments are those of `fastmix._torch.sample`."""

import ctypes
import functools

import torch

from .. import _torch
from .._torch.sample import LAM, PROPORTIONAL, Sampled
from .library import address, array_address, check_memory, each_row, get

MOST_OWNERS = 64  # as sample.c has room for


def sample_batch(states, table, x, y, given, plan):
    """Draws how a batch `x` [N, ...] is mixed, and moves the first `plan.seeded` states on."""
    if not x.is_cpu or len(states) > MOST_OWNERS:
        return _torch.sample_batch(states, table, x, y, given, plan)
    shape, dims, mask_size = x.shape, plan.dims, plan.mask
    rows, dtype = shape[0], torch.float64 if plan.double else torch.float32
    new = states[0].new_empty  # takes half as long as torch.empty
    if isinstance(table, torch.Tensor):
        table = table.contiguous()
        place, alike = table.data_ptr(), False
    else:
        numbers, alike = _numbers(table)
        place = array_address(numbers)
    lam, index = new(rows, dtype=dtype), new(rows)
    own = lam if alike else new(rows, dtype=dtype)
    box = new(rows, 2 * dims) if dims else None
    mask = new(rows, *mask_size, dtype=dtype) if mask_size else None
    classes, weights = (None, None) if y is None else (new(rows, 2), new(rows, 2, dtype=dtype))
    keys = plan.counted if plan.choosing < 0 else plan.counted | 1 << plan.choosing
    places = (ctypes.c_void_p * len(states))(*[state.data_ptr() for state in states])
    sides = _sides(shape[-dims:]) if dims else None
    failed = get().fm_sample(
        array_address(places), len(states), plan.seeded, place, len(table), rows, keys, address(given), array_address(sides), dims,
        mask_size[0] * mask_size[1] if mask_size else 0, plan.double, torch.get_num_threads(), lam.data_ptr(), index.data_ptr(),
        0 if alike else own.data_ptr(), address(box), address(mask), *each_row(y), address(classes), address(weights),
    )  # fmt: skip
    check_memory(failed, "to draw a batch")
    return Sampled(lam, index, own, box, mask, classes, weights)


@functools.lru_cache(maxsize=256)
def _numbers(table):
    """Returns a table's numbers as C reads them, and whether the target's share is lam in every row."""
    flat = [float(number) for node in table for number in node]
    alike = len(table) == 1 and table[0].kind == LAM and table[0].label == PROPORTIONAL
    return (ctypes.c_double * len(flat))(*flat), alike


@functools.lru_cache(maxsize=256)
def _sides(sizes):
    return (ctypes.c_int64 * len(sizes))(*sizes)
