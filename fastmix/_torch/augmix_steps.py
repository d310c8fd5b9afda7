"""What AugMix does to each row: operations and their strengths, by counter. The form of the CPU, in NumPy.

The item of step s of chain r is r*depth + s; its four words draw the operation, the strength, the sign and, in step 0, how many steps the
chain has. A chain with fewer than `depth` steps begins late, so all end together.
"""

import math

import numpy as np
import torch

from ._draws import CHAIN, THIRTY_TWO, random_words, scaled

OPERATIONS = (
    *("autocontrast", "equalize", "posterize", "rotate", "solarize"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)
REST, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, AFFINE = range(6)  # what a step is
DEGREES = 30  # at most, of a rotation
_IDENTITY = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0


def step_numbers(severity, height, width, operations):
    """Returns what the draw needs to know, as a tuple of floats: the range of strengths; a third and a half of the sides; how
    many operations there are, and their places in OPERATIONS; cosines and sines of 0 to 30 degrees, rounded as Pillow rounds them."""
    angles = [math.radians(degrees) for degrees in range(DEGREES + 1)]
    turns = [round(function(angle), 15) for function in (math.cos, math.sin) for angle in angles]
    codes = [float(OPERATIONS.index(name)) for name in operations]
    codes += [0.0] * (len(OPERATIONS) - len(codes))
    return severity - 0.1, width / 3, height / 3, width / 2, height / 2, float(len(operations)), *codes, *turns


def augmix_steps(state, seeded, rows, depth, drawn, numbers, device):
    """Returns (kinds int32 [depth, rows], values float64 [depth, rows, 6]) of chains, on the host; `drawn`: of 1 to `depth` steps
    each. Values: of AFFINE the matrix from a pixel of the result to its source, of POSTERIZE and SOLARIZE a number."""
    words = random_words(state.numpy(), CHAIN, 0, 0, rows * depth).reshape(rows, depth, 4)
    span, third_x, third_y, half_x, half_y, count, *rest = numbers
    codes, turns = np.array(rest[: len(OPERATIONS)]).astype(np.int64), np.array(rest[len(OPERATIONS) :]).reshape(2, -1)
    code = codes[scaled(words[..., 0] >> THIRTY_TWO, int(count))]
    strength = 0.1 + span * ((words[..., 1] >> np.uint64(11)) * 2.0**-53)
    sign = np.where(words[..., 2] >> np.uint64(63), -1.0, 1.0)
    is_op = {name: code == place for place, name in enumerate(OPERATIONS)}
    values = np.zeros((rows, depth, 6))
    values[...] = _IDENTITY
    kinds = np.full((rows, depth), AFFINE, dtype=np.int32)
    for name, kind in (
        ("autocontrast", AUTOCONTRAST),
        ("equalize", EQUALIZE),
        ("posterize", POSTERIZE),
        ("solarize", SOLARIZE),
    ):
        kinds[is_op[name]] = kind
    values[..., 0][is_op["posterize"]] = (4 - np.trunc(strength * 4 / 10))[is_op["posterize"]]
    values[..., 0][is_op["solarize"]] = (256 - np.trunc(strength * 256 / 10))[is_op["solarize"]]
    degrees = np.trunc(strength * DEGREES / 10).astype(np.int64)
    # Pillow turns by the negative angle
    cosine, sine = turns[0][degrees], -sign * turns[1][degrees]
    turned = cosine, sine, (-half_x * cosine + -half_y * sine) + half_x
    turned += -sine, cosine, (-half_x * -sine + -half_y * cosine) + half_y
    rotate = is_op["rotate"]
    values[rotate] = np.stack(turned, -1)[rotate]
    for name, at, value in (
        ("shear_x", 1, sign * (strength * 0.3 / 10)),
        ("shear_y", 3, sign * (strength * 0.3 / 10)),
        ("translate_x", 2, sign * np.trunc(strength * third_x / 10)),
        ("translate_y", 5, sign * np.trunc(strength * third_y / 10)),
    ):
        values[..., at][is_op[name]] = value[is_op[name]]
    if drawn:
        begins = depth - 1 - scaled(words[:, :1, 3] >> THIRTY_TWO, depth)
        kinds[np.arange(depth) < begins] = REST
    if seeded:
        state[2] += 1
    return (torch.from_numpy(np.ascontiguousarray(t.swapaxes(0, 1))) for t in (kinds, values))
