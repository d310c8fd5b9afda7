"""Random words by counter, and Beta and Gamma variables made of them: the form of the CPU, in NumPy.

Words are NumPy's Philox4x64-10. The generator's state is an int64 tensor of four: two words of the key, the number of the batch,
and one that the kernels use. A block of four words is counted by (item + 1, batch, purpose, stream).

Beta(a, a) is drawn from U and V without rejection (Devroye 1996, after Bailey's t variables): with
q = (U**(-1/a) - 1) * cos(2 pi V)**2, the lesser of lam and 1-lam is (1 - sqrt(q/(1+q))) / 2, and lam is the lesser where the
cosine is negative. Beta(a, b) and Dirichlet weights come from Gamma variables of Marsaglia and Tsang (2000), in logarithms: the
one of shape a is log(Gamma(a+1)) - Exponential/a, since for small a a plain ratio of two underflows to ties and 0/0.

The same draw gives the same bits on every device. Logarithms, exponentials and cosines differ in their last bits between
libraries, and U**(-1/a) multiplies a difference by up to 690: so they are rounded to fewer bits before they go on (`short`,
`coarse`). What is left of a difference is a value that lies between two roundings: about one in a million.
"""

import math
import threading
from typing import Any

import numpy as np

# purposes of words
ROW, PLACE, CHOICE, PARTNER, CELL, GAMMA, CELL_GAMMA, WAYS, SKIP, NUMBER, NORMAL, CHAIN = range(12)
RETRY = 256  # added to the purpose for every further block of a Gamma variable
BLOCKS = 8  # at most, of a Gamma variable: two tries each, of which one in twenty fails at worst
MOST_EXPONENT = 690.0  # the exponential of more leaves float64
_LEAST_PLAIN = 37 / MOST_EXPONENT  # of a: with more no exponent is larger, since U is at least 2**-53

_ONE = np.uint64(0x3FF0000000000000)  # bits of 1.0: with 52 random bits below it a number in [1, 2)
_HALF_STEP = 1 - 2.0**-53
_TWELVE, _TWENTY, THIRTY_TWO = (np.uint64(count) for count in (12, 20, 32))
LOW_HALF = np.uint64(2**32 - 1)


class _Generator(threading.local):
    """NumPy's generator, which is set to a counter for every draw: making one takes longer."""

    def __init__(self):
        self.bits = np.random.Philox(0)
        self.state: Any = self.bits.state
        self.counter, self.key = self.state["state"]["counter"], self.state["state"]["key"]


_generator = _Generator()


def random_words(state, purpose, stream, first, blocks):
    """Returns blocks of four words, uint64 [blocks, 4], from item `first` on. NumPy counts up before it draws."""
    generator = _generator
    generator.key[:] = state.view(np.uint64)[:2]
    counter = generator.counter
    counter[0], counter[1], counter[2], counter[3] = first, state[2], purpose, stream
    generator.bits.state = generator.state
    return generator.bits.random_raw(4 * blocks).reshape(blocks, 4)


def short(x):
    """Rounds numbers to 31 significant bits, in place, and returns them."""
    bits = x.view(np.int64)
    bits += 2**21
    bits &= -(2**22)
    return x


def coarse(x):
    """Returns numbers rounded to multiples of 2**-27."""
    return np.floor(x * 2.0**27 + 0.5) * 2.0**-27


def symmetric_beta(words, a):
    """Returns (lesser of lam and 1-lam, whether that is lam) of lam ~ Beta(a, a), from words U, V [n, 2]."""
    bits = np.right_shift(words.T, _TWELVE, order="C")
    bits |= _ONE
    both = bits.view(np.float64)  # U and V in [1, 2); then U**(-1/a) - 1 and cos(2 pi V)
    q, cosine = both
    q -= _HALF_STEP
    np.log(q, out=q)
    short(q)
    q /= -a
    if a < _LEAST_PLAIN:
        np.minimum(q, MOST_EXPONENT, out=q)
    np.expm1(q, out=q)
    # the cosine as the sine of what V is from its zero, which is exact up to the last product
    cosine -= 1.5
    np.abs(cosine, out=cosine)
    cosine *= 4
    cosine -= 1
    low = cosine < 0
    cosine *= math.pi / 2
    np.sin(cosine, out=cosine)
    short(both)
    cosine *= cosine
    q *= cosine
    rest = np.add(q, 1, out=cosine)
    q /= rest
    root = np.sqrt(q, out=q)
    root += 1
    root *= rest
    return np.divide(0.5, root, out=root), low


def lesser(logit):
    """Returns (lesser of lam and 1-lam, whether that is lam) for lam = sigmoid(logit)."""
    e = short(np.exp(-np.abs(logit)))
    return e / (1 + e), logit < 0


def log_gamma(state, purpose, stream, items, shape):
    """Returns logarithms of Gamma variables, one for each item; shape: a number or one for each."""
    drawn = random_words(state, purpose, stream, 0, items)
    value, done = _tries(drawn, shape)
    left = np.flatnonzero(~done)
    for block in range(1, BLOCKS):
        if not len(left):
            break
        again = np.concatenate([random_words(state, purpose + RETRY * block, stream, int(item), 1) for item in left])
        value[left], done = _tries(again, shape if np.ndim(shape) == 0 else shape[left])
        left = left[~done]
    wait = short(np.log((drawn[:, 2] >> _TWELVE | _ONE).view(np.float64) - _HALF_STEP))
    return value + wait / shape


def _tries(words, shape):
    """Returns (logarithms of variables of shape + 1, whether one of two tries was accepted)."""
    radius = np.sqrt(-2 * np.log(_unit32(words[:, 0] >> THIRTY_TWO)))
    angle = (2 * math.pi) * _unit32(words[:, 0] & LOW_HALF)
    first, done = _try(radius * np.cos(angle), _unit32(words[:, 1] >> THIRTY_TWO), shape)
    second, again = _try(radius * np.sin(angle), _unit32(words[:, 1] & LOW_HALF), shape)
    d = shape + 2 / 3
    return coarse(np.log(d * np.where(done, first, np.where(again, second, 1)))), done | again


def _try(normal, chance, shape):
    """Returns (v, whether it is accepted): d*v is then a Gamma variable of shape + 1, with d = shape + 2/3."""
    d = shape + 2 / 3
    v = 1 + normal / np.sqrt(9 * d)
    square = normal * normal
    positive = v > 0
    v = np.where(positive, v * v * v, 1)
    sure = chance < 1 - 0.0331 * (square * square)
    return v, positive & (sure | (np.log(chance) < 0.5 * square + d * (1 - v + np.log(v))))


def _unit32(bits):
    """Returns numbers in (0, 1) of 32 bits."""
    return (bits << _TWENTY | _ONE).view(np.float64) - (1 - 2.0**-33)


def scaled(bits, size):
    """Returns integers in [0, size) from 32 bits."""
    return (bits.view(np.int64) * size) >> 32
