"""What it costs to take a block from the row or from its partner: the energy of PuzzleMix's cut.

    s[i]            = saliency of image i, averaged over n x n blocks and divided by its sum
    U[i, cell, l]   = m*s[j, cell] + (1-m)*s[i, cell] - eta/n^2 * log Binomial(l; L-1, 1-lam[i]) + colours,    m = 1 - l/(L-1)
    w[i, edge]      = b + gamma*b*c,     b = beta / (16 n)

j = index[i]; label l keeps m of the row's block, and what is thrown away costs its saliency. c compares the colours on either side of
a border between blocks: D(a, b) is the mean absolute difference of image a on one side and image b on the other, of pixels averaged
over `neighborhood` x `neighborhood`; c = (D(i, j) + D(j, i) - D(i, i) - D(j, j)) / 2, and the block on either side pays
gamma*b*(D + D)/2 for each of its borders, with itself and with the other image behind it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._torch.puzzle_costs import puzzle_costs as torch_puzzle_costs

LARGEST = 16  # blocks a side that the kernel takes


class Options(NamedTuple):
    """The options that are numbers, the same for every channel."""

    levels: int
    beta: float
    gamma: float
    eta: float
    neighborhood: int


def puzzle_costs(
    x: torch.Tensor,
    saliency: torch.Tensor,
    index: torch.Tensor,
    lam: torch.Tensor | float,
    blocks: int,
    *,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    levels: int = 3,
    beta: float = 1.2,
    gamma: float = 0.5,
    eta: float = 0.2,
    neighborhood: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the energy whose minimum is PuzzleMix's mask: a cost for each label of each block, and weights of their borders.

        unary[i, cell, l] = m*s[j] + (1-m)*s[i] - eta/n^2 * log Binomial(l; L-1, 1-lam) + borders,    m = 1 - l/(L-1)
        energy(l)         = sum of unary[l] + sum over neighbours of weight*(l - l')^2 / (L-1)^2

    s is the saliency averaged over the blocks, each image's divided by its sum (an image whose saliency is all 0 counts as
    uniform), j = index[i], and weight = b*(1 + gamma*c) with b = beta/(16n). c compares the colours on both sides of a border,
    with the row on one and its partner on the other; see the source. `fastmix.grid_cut` finds the minimum.

    Args:
        x: `[N, C, H, W]` normalised images.
        saliency: `[N, H, W]`, at least 0: see `fastmix.saliency`.
        index: `[N]` int64, each row's partner.
        lam: a float, 0-d or `[N]`: the share that the row itself should keep. Exactly 1 (0) costs 10000 a level for any label
            but the row's (the partner's) own.
        blocks: n, blocks a side; n divides H and W.
        mean, std: numbers, or one for each channel, by which images were normalised. Borders are compared in the images' own
            range, where the mean cancels.
        levels: L, from 2 to 4: how many values the mask may have.
        beta: of the smoothness. At least 0.
        gamma: of the colours in it, in [0, 1).
        eta: of the prior that draws the mask's mean to lam. At least 0.
        neighborhood: pixels a side that colours are averaged over, cut to the block's size first, which it must divide.

    Returns:
        `(unary, vertical, horizontal)`, float32: `[N, n, n, L]`, `[N, n-1, n]` (between a block and the one below) and
        `[N, n, n-1]`.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also an index out of range, a negative saliency or NaN.

    Source: Kim et al., arXiv:2009.06962, Section 4. Their code rounds these costs to integers.

    >>> import torch, fastmix
    >>> x, s = torch.randn(2, 3, 32, 32), torch.rand(2, 32, 32)
    >>> unary, vertical, horizontal = fastmix.puzzle_costs(x, s, torch.tensor([1, 0]), 0.3, 4)
    >>> unary.shape, vertical.shape, horizontal.shape
    (torch.Size([2, 4, 4, 3]), torch.Size([2, 3, 4]), torch.Size([2, 4, 3]))
    """
    options = Options(levels, beta, gamma, eta, neighborhood)
    return costs_and_shares(x, saliency, index, lam, blocks, mean, std, options)[:3]


def costs_and_shares(
    x: torch.Tensor,
    saliency: torch.Tensor,
    index: torch.Tensor,
    lam: torch.Tensor | float,
    blocks: int,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what `puzzle_costs` does, and each block's share of its image's saliency [N, n, n]."""
    check_images(x)
    check_saliency(saliency, x)
    _check.integer_tensor("index", index, x.shape[:1], x)
    _check.row_weight("lam", lam, x.shape[0], x)
    blocks = _check.integer("blocks", blocks, 1, "an int of at least 1")
    std = check_channels(mean, std, x.shape[1])[1]
    options = Options(*check_options(*options))
    check_division(x, blocks, options.neighborhood)
    _check.in_range("index", index, x.shape[0], "a partner")
    lam = _check.coefficient("lam", lam, x).to(torch.float32).expand(x.shape[0])
    return _dispatch.call(OP, (x,), x, saliency, index, lam, blocks, std, options)


def _run(backend: Any, *arguments: Any) -> Any:
    *_, blocks, _, _ = arguments
    costs = backend.puzzle_costs if blocks <= LARGEST else torch_puzzle_costs
    return costs(*arguments)


def _launch(x: torch.Tensor, *arguments: Any) -> Any:
    with torch.no_grad():
        return _run(_backend.of(x), x, *arguments)


def _operator(*arguments: Any) -> Any:
    *inputs, options, backend = arguments
    return _puzzle_costs_op(*inputs, *options, backend)


def _formula(x: torch.Tensor, saliency: torch.Tensor, *arguments: Any) -> Any:
    return torch_puzzle_costs(x.detach(), saliency.detach(), *arguments)


@custom_op("fastmix::puzzle_costs", mutates_args=())
def _puzzle_costs_op(
    x: torch.Tensor,
    saliency: torch.Tensor,
    index: torch.Tensor,
    lam: torch.Tensor,
    blocks: int,
    std: Sequence[float],
    levels: int,
    beta: float,
    gamma: float,
    eta: float,
    neighborhood: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `costs_and_shares` returns."""
    options = Options(levels, beta, gamma, eta, neighborhood)
    found = _run(_backend.module(backend), x, saliency, index, lam, blocks, tuple(std), options)
    return tuple(t.contiguous() for t in found)


@_puzzle_costs_op.register_fake
def _(x: torch.Tensor, saliency: torch.Tensor, index: torch.Tensor, lam: torch.Tensor, blocks: int, *rest: Any) -> Any:
    levels = rest[1]
    shapes = (blocks, blocks, levels), (blocks - 1, blocks), (blocks, blocks - 1), (blocks, blocks)
    return tuple(x.new_empty((x.shape[0], *shape), dtype=torch.float32) for shape in shapes)


OP = _dispatch.Op(_formula, _operator, _launch, _launch)


def check_images(x: torch.Tensor) -> None:
    _check.float_tensor("x", x, 4, "[N, C, H, W]")
    if x.dim() != 4:
        raise _check.wrong(ValueError, "x", "shape [N, C, H, W]", x)


def check_saliency(saliency: torch.Tensor, x: torch.Tensor) -> None:
    """Checks for a saliency map [N, H, W] of images x; its values only where the host may read them."""
    _check.float_tensor("saliency", saliency, 3, "[N, H, W]")
    expected = x.shape[0], *x.shape[-2:]
    if saliency.shape != expected:
        raise _check.wrong(ValueError, "saliency", f"shape {list(expected)}, a value for each pixel of x", saliency)
    _check.same_device("saliency", saliency, x)
    if _check.readable(saliency) and saliency.numel():
        least = saliency.detach().amin((1, 2))
        ok = (least >= 0) & (saliency.detach().amax((1, 2)) < math.inf)
        if not bool(ok.all()):
            row = int((~ok).nonzero()[0])
            raise ValueError(f"saliency: expected finite values of at least 0, got one of {float(least[row])} in row {row}")


def check_channels(mean: Any, std: Any, channels: int | None = None) -> Any:
    """Returns means and deviations as tuples of floats, one number or one for each channel."""
    values = {}
    for name, value in (("mean", mean), ("std", std)):
        if isinstance(value, torch.Tensor):
            if not value.is_cpu:
                raise _check.wrong(TypeError, name, "a number or a sequence of numbers, on the host", value)
            value = value.flatten().tolist()
        several = value if isinstance(value, (tuple, list)) else (value,)
        values[name] = tuple(_check.number(name, each) for each in several)
    if not all(each > 0 for each in values["std"]):
        raise _check.wrong(ValueError, "std", "positive numbers", std)
    for name, numbers in values.items():
        if channels is not None and len(numbers) not in (1, channels):
            raise ValueError(f"{name}: expected one number, or {channels}, one for each channel of x; got {len(numbers)}")
    return values["mean"], values["std"]


def _levels(name: str, value: int) -> int:
    value = _check.integer(name, value, 2, "an int from 2 to 4")
    if value > 4:
        raise _check.wrong(ValueError, name, "an int from 2 to 4", value)
    return value


def not_negative(name: str, value: float) -> float:
    value = _check.number(name, value)
    if value < 0:
        raise _check.wrong(ValueError, name, "a number of at least 0", value)
    return value


def _below_one(name: str, value: float) -> float:
    value = _check.number(name, value)
    if not 0 <= value < 1:
        raise _check.wrong(ValueError, name, "a number in [0, 1)", value)
    return value


OPTIONS = {  # what checks each
    "levels": _levels,
    "beta": not_negative,
    "gamma": _below_one,
    "eta": not_negative,
    "neighborhood": lambda name, value: _check.integer(name, value, 1, "an int of at least 1"),
}


def check_options(*values: Any) -> Any:
    return tuple(check(name, value) for (name, check), value in zip(OPTIONS.items(), values, strict=True))


def check_division(x: torch.Tensor, blocks: int, neighborhood: int) -> None:
    """Checks that so many blocks divide the images, and the neighbourhood the blocks."""
    for size, side in zip(x.shape[-2:], ("height", "width"), strict=True):
        if size == 0 or size % blocks:
            raise _check.wrong(ValueError, "blocks", f"a number that divides x's {side} {size}", blocks)
        block = size // blocks
        if block % min(neighborhood, block):
            raise _check.wrong(
                ValueError, "neighborhood", f"a number of pixels that divides a block's {side} {block}", neighborhood
            )
