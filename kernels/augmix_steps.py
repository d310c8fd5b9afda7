"""What AugMix does to each row, in one launch: operations, strengths and signs by counter; matrices of affine maps.

    strength u ~ U(0.1, severity);   rotate int(30u/10) degrees, shear 0.3u/10, translate int(side/3 * u/10) pixels, either way;
    posterize to 4 - int(4u/10) bits; solarize from 256 - int(256u/10) on

Memory floor: kinds and values are written.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._draws import CHAIN, EXACT, ROUNDS, move_on, numbers_of, scaled, source_of, words
from ._launch import blocks, on_device_of

AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, AFFINE = (tl.constexpr(kind) for kind in range(1, 6))
CODES, TURNS, ANGLES = (
    tl.constexpr(6),
    tl.constexpr(15),
    tl.constexpr(31),
)  # places in the numbers, and how many angles there are


@triton.jit
def _whole(x):
    """x without its fraction, of x >= 0."""
    return x.to(tl.int64).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "rounds"])
def _augmix_draw_kernel(states, number_ptr, kind_ptr, value_ptr, rows, rounds, DEPTH: tl.constexpr, DRAWN: tl.constexpr,
                  SEEDED: tl.constexpr, ITEMS: tl.constexpr):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    row, step = item // DEPTH, item % DEPTH
    live = row < rows
    source = source_of(states, 0, rounds, 1)
    choice, strong, side, _ = words(item, CHAIN, item * 0, source)
    count = tl.load(number_ptr + 5).to(tl.int32)
    code = tl.load(number_ptr + CODES + scaled(choice >> 32, count), mask=live, other=0).to(tl.int32)
    strength = 0.1 + tl.load(number_ptr) * ((strong >> 11).to(tl.float64) * 1.1102230246251565e-16)
    sign = tl.where((side >> 63) != 0, -1.0, 1.0).to(tl.float64)

    kind = tl.where(code == 0, AUTOCONTRAST, tl.where(code == 1, EQUALIZE, AFFINE))
    kind = tl.where(code == 2, POSTERIZE, tl.where(code == 4, SOLARIZE, kind))
    degrees = (strength * 30 / 10).to(tl.int64)
    rotate = code == 3
    cosine = tl.load(number_ptr + TURNS + degrees, mask=live & rotate, other=1)
    sine = -sign * tl.load(number_ptr + TURNS + ANGLES + degrees, mask=live & rotate, other=0)
    half_x, half_y = tl.load(number_ptr + 3), tl.load(number_ptr + 4)
    shear = sign * (strength * 0.3 / 10)
    a = tl.where(code == 2, 4 - _whole(strength * 4 / 10), cosine)
    a = tl.where(code == 4, 256 - _whole(strength * 256 / 10), a)
    b = tl.where(rotate, sine, tl.where(code == 5, shear, 0.0))
    c = tl.where(code == 7, sign * _whole(strength * tl.load(number_ptr + 1) / 10), 0.0)
    c = tl.where(rotate, (-half_x * cosine + -half_y * sine) + half_x, c)
    d = tl.where(rotate, -sine, tl.where(code == 6, shear, 0.0))
    f = tl.where(code == 8, sign * _whole(strength * tl.load(number_ptr + 2) / 10), 0.0)
    f = tl.where(rotate, (-half_x * -sine + -half_y * cosine) + half_y, f)
    if DRAWN:
        _, _, _, length = words(row * DEPTH, CHAIN, item * 0, source)
        kind = tl.where(step < DEPTH - 1 - scaled(length >> 32, DEPTH), 0, kind)
    place = step * rows + row
    tl.store(kind_ptr + place, kind, mask=live)
    out = value_ptr + place * 6
    tl.store(out, a, mask=live)
    tl.store(out + 1, b, mask=live)
    tl.store(out + 2, c, mask=live)
    tl.store(out + 3, d, mask=live)
    tl.store(out + 4, cosine, mask=live)
    tl.store(out + 5, f, mask=live)
    move_on(states, SEEDED)


def augmix_steps(state, seeded, rows, depth, drawn, numbers, device):
    """Returns (kinds int32 [depth, rows], values float64 [depth, rows, 6]) of chains; `drawn`: of 1 to `depth` steps each. Values: of
    affine maps the matrix from a pixel of the result to its source, of posterize and solarize a number."""
    kinds = torch.empty((depth, rows), dtype=torch.int32, device=device)
    values = torch.empty((depth, rows, 6), dtype=torch.float64, device=device)
    if rows or seeded:
        table = numbers_of((tuple(numbers),), device)
        with on_device_of(kinds):
            _augmix_draw_kernel[(max(blocks(rows * depth, _launch.NUMBERED_ITEMS), 1),)](
                (state,), table, kinds, values, rows, ROUNDS, depth, drawn, int(seeded), _launch.NUMBERED_ITEMS,
                num_warps=_launch.DRAW_WARPS, **EXACT,
            )  # fmt: skip
    return kinds, values
