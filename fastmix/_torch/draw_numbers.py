"""Uniform and normal numbers of each row, by counter: the form of the CPU, in NumPy.

Number p of row i is made of word p // blocks of block p % blocks, of the blocks of four words that the row takes: a uniform
number of each, or two normal ones by Box and Muller (those of the sines, which come behind, are numbers 4 to 7).
"""

import math

import numpy as np
import torch

from ._draws import LOW_HALF, NORMAL, NUMBER, THIRTY_TWO, _unit32, random_words


def draw_numbers(state, rows, count, normal, device):
    """Returns uniform float64 numbers in [0, 1), multiples of 2**-53, or normal float32 ones: [rows, count]."""
    blocks = -(-count // (8 if normal else 4))
    words = random_words(state.numpy(), NORMAL if normal else NUMBER, 0, 0, rows * blocks)
    words = words.reshape(rows, blocks, 4).transpose(0, 2, 1)
    if normal:
        radius = np.sqrt(-2 * np.log(_unit32(words >> THIRTY_TWO)))
        turn = _unit32(words & LOW_HALF)
        quarter_before = np.where(turn < 0.25, turn + 0.75, turn - 0.25)
        numbers = np.concatenate((radius * _cosine(turn), radius * _cosine(quarter_before)), 1).astype(np.float32)
    else:
        numbers = (words >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(numbers.reshape(rows, numbers.shape[1] * blocks)[:, :count]).to(device, non_blocking=True)


def _cosine(turn):
    """Returns cos(2 pi turn), as the sine of what the turn is from the cosine's zero, which is exact up to the last product."""
    return np.sin((4 * np.abs(turn - 0.5) - 1) * (math.pi / 2))
