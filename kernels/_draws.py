"""Random words by counter, and Beta and Gamma variables made of them: the kernels' side of `fastmix._torch._draws`.

    q                   (U**(-1/a) - 1) * cos(2 pi V)**2
    lam ~ Beta(a, a)    (1 - sqrt(q/(1+q))) / 2 where cos(2 pi V) < 0, else 1 minus that (Devroye 1996, after Bailey)
    log Gamma(a)        log Gamma(a+1) - Exponential/a, by Marsaglia and Tsang (2000): for Beta(a, b) and Dirichlet

Random words are Philox4x64-10, keyed by a state and counted by (item + 1, batch, purpose, stream). A state is four int64: two
words of the key, the number of the batch, and how many programs have finished. The last program to finish sets that back and
moves the batch on: no program can read what another has moved.

The same draw gives the same bits on every device. Logarithms, exponentials and cosines differ in their last bits between
libraries, so they are rounded to fewer bits before they go on (`short`, `coarse`), and a product is not contracted with a sum (EXACT).
What is left of a difference is a value that lies between two roundings: about one in a million.
"""

import torch
import triton
import triton.language as tl
from triton.language.random import philox_impl

from ._launch import OPTIONS

EXACT = {**OPTIONS, "enable_fp_fusion": False}  # options of the launches that draw: arithmetic as NumPy does it

# purposes of words
ROW, PLACE, CHOICE, PARTNER, CELL, GAMMA, CELL_GAMMA, WAYS, SKIP, NUMBER, NORMAL, CHAIN = (
    tl.constexpr(purpose) for purpose in range(12)
)
RETRY = tl.constexpr(256)
GAMMA_BLOCKS = tl.constexpr(8)
ROUNDS = 10  # of Philox
MOST_EXPONENT = tl.constexpr(690.0)
ONE = tl.constexpr(0x3FF0000000000000)  # the bits of 1.0


@triton.jit
def words(item, purpose, stream, source):
    """Returns four random words of each item, uint64."""
    key0, key1, batch, rounds = source
    zero = item.to(tl.uint64) * 0
    c0, c1, c2, c3 = (item + 1).to(tl.uint64), zero + batch, zero + purpose, zero + stream.to(tl.uint64)
    key0, key1 = zero + key0, zero + key1
    # how many rounds there are is not a constant: unrolled, the kernels would be ten times as long, and spill the keys of all rounds
    for _ in range(rounds):
        c0, c1, c2, c3 = philox_impl(c0, c1, c2, c3, key0, key1, 1)
        key0 = tl.add(key0, 0x9E3779B97F4A7C15, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE8584CAA73B, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def source_of(states, owner, rounds, OWNERS: tl.constexpr):
    """Returns two words of the key and the batch of an owner, or of a tensor of owners; and the rounds of the generator."""
    key0, key1, batch = tl.load(states[0]), tl.load(states[0] + 1), tl.load(states[0] + 2)
    for s in tl.static_range(1, OWNERS):
        here = owner == s
        key0 = tl.where(here, tl.load(states[s]), key0)
        key1 = tl.where(here, tl.load(states[s] + 1), key1)
        batch = tl.where(here, tl.load(states[s] + 2), batch)
    return key0.to(tl.uint64), key1.to(tl.uint64), batch.to(tl.uint64), rounds


@triton.jit
def move_on(states, SEEDED: tl.constexpr):
    """Counts this program as finished; the last one moves the first SEEDED states on to the next batch."""
    if SEEDED > 0:
        # all warps of this program have read the states before it counts as finished, and all programs before one of them writes
        tl.debug_barrier()
        if tl.atomic_add(states[0] + 3, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            for s in tl.static_range(SEEDED):
                tl.atomic_add(states[s] + 2, 1, sem="relaxed")
            tl.atomic_xchg(states[0] + 3, 0, sem="relaxed")


@triton.jit
def _unit(word):
    """Returns a number in (0, 1) of 52 bits of a word, float64."""
    return ((word >> 12) | ONE).to(tl.float64, bitcast=True) - (1 - 1.1102230246251565e-16)


@triton.jit
def _turn(word):
    """Returns a number in [-0.5, 0.5) of 52 bits of a word, float64."""
    return ((word >> 12) | ONE).to(tl.float64, bitcast=True) - 1.5


@triton.jit
def _unit32(bits):
    """Returns a number in (0, 1) of 32 bits, float64."""
    return ((bits << 20) | ONE).to(tl.float64, bitcast=True) - (1 - 1.1641532182693481e-10)


@triton.jit
def scaled(bits, size):
    """Returns an integer in [0, size) from 32 bits."""
    return (bits.to(tl.int64) * size) >> 32


@triton.jit
def short(x):
    """Returns x rounded to 31 significant bits, float64."""
    return ((x.to(tl.int64, bitcast=True) + 0x200000) & -0x400000).to(tl.float64, bitcast=True)


@triton.jit
def coarse(x):
    """Returns x rounded to a multiple of 2**-27, float64."""
    return tl.floor(x * 134217728.0 + 0.5) * 7.450580596923828e-09


@triton.jit
def _cosine(turn):
    """Returns cos(2 pi (turn + 0.5)) for a turn in [-0.5, 0.5], by the series of the sine from the cosine's zero: tl.cos would
    bring its reduction of large arguments, which spills."""
    y = 4 * tl.abs(turn) - 1
    z = y * y
    s = 2.571422892860474e-16 * z - 4.377065467313742e-14
    s = s * z + 6.0669357311061955e-12
    s = s * z - 6.688035109811468e-10
    s = s * z + 5.692172921967927e-08
    s = s * z - 3.598843235212085e-06
    s = s * z + 0.00016044118478735983
    s = s * z - 0.004681754135318688
    s = s * z + 0.07969262624616705
    s = s * z - 0.6459640975062463
    return y * (s * z + 1.5707963267948966)


@triton.jit
def _symmetric_beta(u, v, a):
    """Returns (lesser of lam and 1-lam, whether that is lam) of lam ~ Beta(a, a), from two words."""
    power = tl.minimum(short(-tl.log(_unit(u))) / a, MOST_EXPONENT)
    raised = tl.exp(power)
    # exp(power) - 1 without cancellation (Kahan)
    q = short(tl.where(raised == 1, power, (raised - 1) * power / tl.log(raised)))
    cosine = short(_cosine(_turn(v)))
    q = q * (cosine * cosine)
    return 0.5 / ((1 + q) * (1 + tl.sqrt(q / (1 + q)))), cosine < 0


@triton.jit
def normal_pair(word):
    """Returns two normal variables of a word, by Box and Muller, float64."""
    radius = tl.sqrt(-2 * tl.log(_unit32(word >> 32)))
    turn = _unit32(word & 0xFFFFFFFF)  # cos(2 pi turn) and sin(2 pi turn)
    quarter_before = tl.where(turn < 0.25, turn + 0.75, turn - 0.25)
    return radius * _cosine(turn - 0.5), radius * _cosine(quarter_before - 0.5)


@triton.jit
def lesser(logit):
    """Returns (lesser of lam and 1-lam, whether that is lam) for lam = sigmoid(logit)."""
    e = short(tl.exp(-tl.abs(logit)))
    return e / (1 + e), logit < 0


@triton.jit
def _try(normal, chance, d):
    """Returns (v, whether it is accepted): d*v is then a Gamma variable of shape d + 1/3."""
    v = 1 + normal / tl.sqrt(9 * d)
    square = normal * normal
    positive = v > 0
    v = tl.where(positive, v * v * v, 1.0)
    sure = chance < 1 - 0.0331 * (square * square)
    return v, positive & (sure | (tl.log(chance) < 0.5 * square + d * (1 - v + tl.log(v))))


@triton.jit
def _tries(normals, chances, d):
    """Returns (v, whether one of two tries was accepted) from two words."""
    of_cosine, of_sine = normal_pair(normals)
    first, done = _try(of_cosine, _unit32(chances >> 32), d)
    second, again = _try(of_sine, _unit32(chances & 0xFFFFFFFF), d)
    return tl.where(done, first, tl.where(again, second, 1.0)), done | again


@triton.jit
def log_gamma(item, purpose, stream, source, shape, wanted):
    """Returns logarithms of Gamma variables, where `wanted`."""
    d = shape + 0.6666666666666666
    v, wait, left, block = d * 0 + 1, item.to(tl.uint64) * 0, wanted, 0
    while (tl.max(left.to(tl.int32)) > 0) & (block < GAMMA_BLOCKS):
        normals, chances, third, _ = words(item, purpose + RETRY * block, stream, source)
        wait = tl.where(block == 0, third, wait)
        again, done = _tries(normals, chances, d)
        v = tl.where(left, again, v)
        left = left & (done == 0)
        block += 1
    return coarse(tl.log(d * v)) + short(tl.log(_unit(wait))) / shape


@triton.jit
def beta(u, v, item, purpose, stream, source, a, b, wanted):
    """Returns (lesser of lam and 1-lam, whether that is lam) of lam ~ Beta(a, b), where `wanted`."""
    least, low = _symmetric_beta(u, v, a)
    uneven = wanted & (a != b)
    if tl.max(uneven.to(tl.int32)) > 0:
        other, below = lesser(logit(item, purpose, stream, source, a, b, uneven))
        least = tl.where(uneven, other, least)
        low = tl.where(uneven, below, low)
    return least, low


@triton.jit
def logit(item, purpose, stream, source, a, b, wanted):
    """Returns log(lam / (1-lam)) of lam ~ Beta(a, b), where `wanted`."""
    logit = a * 0
    for side in range(2):  # not unrolled: one copy of the code
        shape = tl.where(side == 0, a, b)
        log = log_gamma(2 * item + side, purpose, stream, source, shape, wanted)
        logit += tl.where(side == 0, log, -log)
    return logit


def numbers_of(table, device):
    """Returns a table's numbers as a float64 tensor [nodes, fields] on a device, without waiting for it."""
    if isinstance(table, torch.Tensor):
        return table.contiguous()
    key = device, torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0
    return _kept_numbers(table, *key)


_tables: dict = {}


def _kept_numbers(table, device, stream):
    """Samplers whose numbers stay the same have their table on the device already."""
    found = _tables.get((table, device, stream))
    if found is None:
        if len(_tables) >= 256:  # a schedule's old numbers
            _tables.clear()
        found = torch.tensor(table, dtype=torch.float64)
        _tables[table, device, stream] = found = found.to(device, non_blocking=True)
    return found
