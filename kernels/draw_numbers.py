"""Uniform and normal numbers of each row, by counter: the kernel and its launcher.

    uniform    (word >> 11) * 2**-53
    normal     sqrt(-2 log U) * cos(2 pi V) and sin(2 pi V), U and V the halves of a word (Box and Muller)

A row takes so many blocks of four words; number p of it is made of word p // blocks of block p % blocks, so that programs write runs.
Memory floor: the numbers are written.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._draws import EXACT, NORMAL, NUMBER, ROUNDS, normal_pair, source_of, words
from ._launch import blocks, on_device_of


@triton.jit(do_not_specialize=["items", "rounds"])
def _numbers_kernel(states, out_ptr, items, row_blocks, rounds, NORMALS: tl.constexpr, ITEMS: tl.constexpr):
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    live = item < items
    source = source_of(states, 0, rounds, 1)
    purpose: tl.constexpr = NORMAL if NORMALS else NUMBER
    drawn = words(item, purpose, item * 0, source)
    PLANES: tl.constexpr = 8 if NORMALS else 4
    out = out_ptr + item // row_blocks * (PLANES * row_blocks) + item % row_blocks
    for k in tl.static_range(4):
        if NORMALS:
            of_cosine, of_sine = normal_pair(drawn[k])
            tl.store(out + k * row_blocks, of_cosine.to(tl.float32), mask=live)
            tl.store(out + (4 + k) * row_blocks, of_sine.to(tl.float32), mask=live)
        else:
            tl.store(out + k * row_blocks, (drawn[k] >> 11).to(tl.float64) * 1.1102230246251565e-16, mask=live)


def draw_numbers(state, rows, count, normal, device):
    """Returns uniform float64 numbers in [0, 1), multiples of 2**-53, or normal float32 ones: [rows, count]."""
    planes = 8 if normal else 4
    row_blocks = blocks(count, planes)
    out = torch.empty((rows, planes * row_blocks), dtype=torch.float32 if normal else torch.float64, device=device)
    if out.numel():
        items = rows * row_blocks
        with on_device_of(out):
            _numbers_kernel[(blocks(items, _launch.NUMBERED_ITEMS),)](
                (state,), out, items, row_blocks, ROUNDS, normal, _launch.NUMBERED_ITEMS,
                num_warps=_launch.DRAW_WARPS, **EXACT,
            )  # fmt: skip
    return out[:, :count]
