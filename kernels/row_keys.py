"""Random keys of rows: batches of many rows are sorted by them, and a partner of another class is picked by them.

Memory floor: the keys are written.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._draws import PARTNER, ROUNDS, ROW, source_of, words
from ._launch import OPTIONS, blocks, on_device_of


@triton.jit(do_not_specialize=["stream", "rows", "rounds"])
def _keys_kernel(states, key_ptr, pick_ptr, stream, rows, rounds, ROWS: tl.constexpr):
    """40 random bits of each row, by which rows are sorted, and 63 for the pick of a partner."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    source = source_of(states, 0, rounds, 1)
    word, _, _, _ = words(row, ROW, row * 0, source)
    tl.store(key_ptr + row, (word >> 24).to(tl.int64), mask=live)
    if pick_ptr is not None:
        word, _, _, _ = words(row, PARTNER, row * 0 + stream, source)
        tl.store(pick_ptr + row, (word >> 1).to(tl.int64), mask=live)


def row_keys(state, rows, stream, device):
    """Returns (keys, picks), int64 [N]: 40 random bits by which rows are sorted, and 63 for the pick of a partner."""
    keys, picks = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(2))
    _launch_keys(state, keys, picks, stream, rows)
    return keys, picks


def _launch_keys(state, keys, picks, stream, rows):
    if rows:
        with on_device_of(keys):
            _keys_kernel[(blocks(rows, _launch.KEYED_ROWS),)](
                (state,), keys, picks, stream, rows, ROUNDS, _launch.KEYED_ROWS, num_warps=_launch.DRAW_WARPS, **OPTIONS
            )


def sort_rows(states, counted, rows, device):
    """Returns each owner's rows in the order of their keys, and the rows' places in it: [owners, 2, N]."""
    found = torch.empty((len(states), 2, rows), dtype=torch.int64, device=device)
    keys, numbers = torch.empty(rows, dtype=torch.int64, device=device), torch.arange(rows, device=device)
    for owner, state in enumerate(states):
        if counted >> owner & 1:
            _launch_keys(state, keys, None, 0, rows)
            found[owner, 0] = keys.argsort(stable=True)
            found[owner, 1].scatter_(0, found[owner, 0], numbers)
    return found
