"""Where the blocks of an image are moved, so that what is salient shows under its mask.

    cost[s, t] = t_eps * distance(s, t)^2 / (n-1)^2 - saliency[s] * [mask[t] > 0]

Source s, target t of n x n blocks. `fastmix._torch.transport_plan` says how the plan is found.
"""

from types import ModuleType
from typing import Any

import torch
from torch.library import custom_op

from .. import _backend, _check, _dispatch
from .._dtypes import FLOATS
from .._torch.transport_plan import sorted_offsets
from .._torch.transport_plan import transport_plan as torch_transport_plan

LARGEST = 64  # blocks a side that the kernel takes


def transport_plan(mask: torch.Tensor, saliency: torch.Tensor, t_eps: float, rounds: int | None = None) -> torch.Tensor:
    """Returns the block that each block of the output comes from, `[N, n*n]` int64, as `fastmix.mix_masked` takes it.

        cost[s, t] = t_eps * distance(s, t)^2 / (n-1)^2 - saliency[s] * [mask[t] > 0]

    In every round each source block proposes to the target of its lowest cost; the target keeps the cheapest proposal, and the
    others' costs rise by 1. Only costs below 0 win, so hidden targets (mask 0) are given nothing: those, and visible ones that
    nothing was moved to, keep their own block. Ties go to the lowest index. Of a partner's image the mask is `1 - mask`.
    One launch on a GPU to n = 64; beyond, torch operations that wait for the device.

    Args:
        mask: `[N, n, n]` floating point, the weight of the image in each block.
        saliency: `[N, n, n]`, of each block, each image's divided by its sum.
        t_eps: the price of a move across the image, at least 0. At 0.8 almost nothing moves.
        rounds: None: n.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also a saliency that is negative or NaN.

    Source: PuzzleMix, arXiv:2009.06962, Algorithm 1.

    >>> import torch, fastmix
    >>> mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    >>> saliency = torch.tensor([[[0.1, 0.1], [0.1, 0.7]]])
    >>> fastmix.transport_plan(mask, saliency, 0.1), fastmix.transport_plan(mask, saliency, 0.8)
    (tensor([[3, 1, 2, 3]]), tensor([[0, 1, 2, 3]]))
    """
    _check.strided("mask", mask, FLOATS, "a float16, bfloat16, float32 or float64 tensor")
    if mask.dim() != 3 or mask.shape[1] != mask.shape[2]:
        raise _check.wrong(ValueError, "mask", "shape [N, n, n]", mask)
    _check.strided("saliency", saliency, FLOATS, "a float16, bfloat16, float32 or float64 tensor")
    if saliency.shape != mask.shape:
        raise _check.wrong(ValueError, "saliency", f"shape {list(mask.shape)}, as mask", saliency)
    _check.same_device("saliency", saliency, mask)
    t_eps = _check.number("t_eps", t_eps)
    if t_eps < 0:
        raise _check.wrong(ValueError, "t_eps", "a number of at least 0", t_eps)
    rounds = mask.shape[1] if rounds is None else _check.integer("rounds", rounds, 0, "an int of at least 0")
    if _check.readable(saliency) and not bool((saliency >= 0).all()):
        raise ValueError(f"saliency: expected values of at least 0, got one of {float(saliency.min())}")
    price = None
    if _dispatch.changing((t_eps,)):
        # a number that changes between calls of a program travels as a tensor of the host: a float would be compiled anew
        price, t_eps = torch.ones((), dtype=torch.float64, device="cpu").mul(t_eps), 0.0
    return _dispatch.call(OP, (mask,), mask.detach(), saliency.detach(), t_eps, price, rounds)


def _run(
    mask: torch.Tensor, saliency: torch.Tensor, t_eps: float, price: Any, rounds: int, backend: ModuleType
) -> torch.Tensor:
    t_eps = t_eps if price is None else float(price)
    n = mask.shape[1]
    if not mask.numel():
        return mask.new_empty((mask.shape[0], n * n), dtype=torch.int64)
    offsets = sorted_offsets(n, t_eps, mask.device)
    plan = backend.transport_plan if n <= LARGEST else torch_transport_plan
    return plan(mask.to(torch.float32).contiguous(), saliency.to(torch.float32).contiguous(), offsets, rounds)


def _launch(mask: torch.Tensor, saliency: torch.Tensor, t_eps: float, price: Any, rounds: int) -> torch.Tensor:
    return _run(mask, saliency, t_eps, price, rounds, _backend.of(mask))


@custom_op("fastmix::transport_plan", mutates_args=())
def _transport_plan_op(
    mask: torch.Tensor, saliency: torch.Tensor, t_eps: float, price: torch.Tensor | None, rounds: int, backend: str
) -> torch.Tensor:
    return _run(mask, saliency, t_eps, price, rounds, _backend.module(backend))


@_transport_plan_op.register_fake
def _(mask: torch.Tensor, saliency: torch.Tensor, t_eps: float, price: Any, rounds: int | None, backend: str) -> Any:
    return mask.new_empty((mask.shape[0], mask.shape[1] ** 2), dtype=torch.int64)


OP = _dispatch.Op(_launch, _transport_plan_op, _launch, _launch)
