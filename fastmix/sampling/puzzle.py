"""PuzzleMix, the sampler: saliency in, masks and plans out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import get_worker_info

from .. import _backend, _check
from .._torch.puzzle_costs import block_saliency
from .._torch.puzzle_masks import puzzle_masks as torch_puzzle_masks
from ..puzzle.grid_cut import SOLVERS, grid_cut
from ..puzzle.noise import PuzzleNoise, check_noise, mix_with_noise
from ..puzzle.puzzle_costs import (
    OPTIONS,
    Options,
    check_channels,
    check_division,
    check_images,
    check_saliency,
    costs_and_shares,
    not_negative,
)
from ..puzzle.transport_plan import LARGEST, transport_plan
from ..targets import MixedRows, SoftTarget
from .labels import MISSING, check_given, check_labels
from .plan import Mix
from .samplers import Mixup, _bool


def _several(name: str, value: tuple[int, int, int, int]) -> Any:
    several = value if isinstance(value, (tuple, list)) else (value,)
    if not several:
        raise _check.wrong(ValueError, name, "an int, or at least one", value)
    return tuple(_check.integer(name, count, 1, "ints of at least 1") for count in several)


def _of_mixup(name: str) -> Any:
    """Returns an attribute of the sampler that draws lam and partners, which checks it when it is set."""
    return property(lambda self: getattr(self.mixup, name), lambda self, value: setattr(self.mixup, name, value))


class PuzzleMix(_check.Checked, nn.Module):
    """PuzzleMix (arXiv:2009.06962): a mask keeps what is salient in either image, and blocks are moved so that it shows.

        lam ~ Beta(alpha, alpha);    mask = argmin of saliency thrown away + smoothness + prior of mean lam
        mixed = mask * moved(x) + (1 - mask) * moved(x[index]),    label share = mean of the mask

    A sampler as the others are, but it needs a saliency map: `sample(x, saliency)` gives a `Mix`, `mixer(x, y, saliency)` the
    mixed batch and its target. One batch has n x n blocks, n drawn from `blocks`. A row of lam exactly 0 or 1 is taken whole, and
    so is a row that is its own partner. The parts are `fastmix.puzzle_costs`, `fastmix.grid_cut` and `fastmix.transport_plan`.

    Args:
        alpha: of Beta(alpha, alpha), or `(a, b)`.
        mean, std: numbers, or one for each channel, by which images are normalised.
        blocks: numbers of blocks a side, one of which is drawn for each batch on the host; or one int, which nothing is drawn for.
            Under torch.compile and in a CUDA graph it has to be one.
        levels: values of the mask, from 2 to 4: 3 gives 0, 1/2 and 1.
        beta, gamma, eta, neighborhood: of the costs, see `fastmix.puzzle_costs`.
        transport: whether blocks are moved.
        t_eps: the price of a move across the image, see `fastmix.transport_plan`. At 0.8 almost nothing moves; at 0.02 much does.
        t_size: pixels a side of the blocks that are moved, cut to the mask's block first, which it must divide; None: the mask's.
        per: whether lam is drawn for each `"row"` or for the `"batch"` (or each `"pair"`).
        solver: of the cut, see `fastmix.grid_cut`.
        prob: the probability that a row (pair, batch) is mixed at all.
        partner: as for `fastmix.Mixup`; `"same"` and `"different"` need `y`.
        seed: as for `fastmix.Mixup`. The numbers of blocks come from the seed and a counter of batches; both are in
            `state_dict()`.

    Raises:
        TypeError, ValueError: a wrong option, also when it is set later; at the call images that a number of blocks does not divide, blocks that `t_size` or
            `neighborhood` do not divide, a saliency of another shape, and on the CPU one that is negative or NaN.
        ImportError: `solver="maxflow"` without PyMaxflow.

    Source: Kim, Choo and Song, "Puzzle Mix: Exploiting Saliency and Local Statistics for Optimal Mixup", ICML 2020.

    >>> import torch, fastmix
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1800, 10))
    >>> puzzle = fastmix.PuzzleMix(mean=0.5, std=0.25, seed=0)
    >>> x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    >>> s = fastmix.saliency(fastmix.input_gradient(model, x, y))
    >>> mixed, target = puzzle(x, y, s)
    >>> mixed.shape, target.weights.sum(1).allclose(torch.ones(8))
    (torch.Size([8, 3, 32, 32]), True)
    """

    _alone = "needs a saliency map"
    _options = {
        **OPTIONS,
        "mean": lambda name, value: check_channels(value, 1)[0],
        "std": lambda name, value: check_channels(0, value)[1],
        "blocks": _several,
        "transport": _bool,
        "t_eps": not_negative,
        "t_size": lambda name, value: (
            None if value is None else _check.integer(name, value, 1, "an int of at least 1, or None")
        ),
        "solver": lambda name, value: _check.one_of(name, value, SOLVERS, f"one of {', '.join(map(repr, SOLVERS))}"),
    }
    blocks: Any  # a number or several, kept as several
    alpha, per, prob, partner, seed = map(_of_mixup, ("alpha", "per", "prob", "partner", "seed"))

    def __init__(
        self,
        alpha: float | tuple[float, float] = 1.0,
        *,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        blocks: int | Sequence[int] = (2, 4, 8, 16),
        levels: int = 3,
        beta: float = 1.2,
        gamma: float = 0.5,
        eta: float = 0.2,
        neighborhood: int = 4,
        transport: bool = True,
        t_eps: float = 0.8,
        t_size: int | None = None,
        per: str = "row",
        solver: str = "auto",
        prob: float = 1.0,
        partner: str = "any",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.mixup = Mixup(alpha, per=per, prob=prob, partner=partner, seed=seed)  # draws lam and partners
        self.mean, self.std = mean, std
        self.blocks = blocks
        self.levels, self.beta, self.gamma, self.eta, self.neighborhood = levels, beta, gamma, eta, neighborhood
        self.transport, self.t_eps, self.t_size = transport, t_eps, t_size
        self.solver = solver
        self._batches = 0  # whose numbers of blocks have been drawn
        self._worker = None

    def extra_repr(self) -> str:
        names = (
            "mean",
            "std",
            "blocks",
            "levels",
            "beta",
            "gamma",
            "eta",
            "neighborhood",
            "transport",
            "t_eps",
            "t_size",
            "solver",
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def get_extra_state(self) -> dict[str, int]:
        return {"batches": self._batches}

    def set_extra_state(self, state: Any) -> None:
        if not isinstance(state, dict) or "batches" not in state:
            raise _check.wrong(TypeError, "state", "{'batches': int}", state)
        self._batches = _check.integer("state['batches']", state["batches"], 0, "an int of at least 0")
        self._worker = _worker_seed()

    def sample(
        self,
        x: torch.Tensor,
        saliency: torch.Tensor = MISSING,
        y: torch.Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Mix:
        """Draws how to mix a batch.

        Args:
            x: `[N, C, H, W]` normalised images.
            saliency: `[N, H, W]`, at least 0, of `fastmix.saliency`: that of the same images, in any units.
            y: class indices `[N]`, needed for `partner="same"` and `"different"`.
            generator: draws lam and partners from it instead of the sampler's own (or the device's default) generator.
        """
        check_images(x)
        if not self.training:
            return self.mixup.sample(x, y, generator=generator)
        self._check_batch(x, saliency)
        drawn = self.mixup.sample(x, y, generator=generator)
        return self._cut(x, saliency, drawn.index, drawn.lam, self._draw_blocks())

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor = MISSING,
        saliency: torch.Tensor = MISSING,
        *,
        noise: PuzzleNoise | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, SoftTarget | MixedRows | torch.Tensor]:
        """(mixed x, mixed target); in eval mode `x` and `y` as they are. `noise`: of `fastmix.adversarial_noise`, which flagged
        rows' own and partners' images have before their blocks are moved."""
        if not self.training:
            return x, y
        check_images(x)
        check_given(y=y)
        check_labels(y, x.shape[0], x)
        if noise is not None:
            check_noise(noise, x)
        drawn = self.sample(x, saliency, y, generator=generator)
        return drawn.apply(x) if noise is None else mix_with_noise(drawn, x, noise), drawn.target(y)

    def _check_batch(self, x: torch.Tensor, saliency: torch.Tensor) -> None:
        check_channels(self.mean, self.std, x.shape[1])
        check_given(saliency=saliency)
        check_saliency(saliency, x)
        for blocks in self.blocks:
            check_division(x, blocks, self.neighborhood)
            if self.transport and x.shape[0]:
                self._check_moved_size(x, blocks)
        if len(self.blocks) > 1 and (torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())):
            raise ValueError(
                "blocks: expected one int in a compiled program or a CUDA graph, which hold one number of blocks, "
                f"got {self.blocks}"
            )

    def _check_moved_size(self, x: torch.Tensor, blocks: int) -> None:
        sizes = [side // blocks for side in x.shape[-2:]]
        if self.t_size is None:
            return
        for size, side in zip(sizes, ("height", "width"), strict=True):
            if size % min(self.t_size, size):
                expected = f"a number of pixels that divides a block's {side} {size}"
                raise _check.wrong(ValueError, "t_size", expected, self.t_size)
        counts = {side // min(self.t_size, size) for side, size in zip(x.shape[-2:], sizes, strict=True)}
        if len(counts) > 1:
            raise _check.wrong(ValueError, "t_size", "None for images that are not square", self.t_size)

    def _draw_blocks(self) -> int:
        """Returns how many blocks a side this batch has: by a hash of the seed, the DataLoader worker and the batch's number."""
        if len(self.blocks) == 1:
            return self.blocks[0]
        if self.seed is None:
            return self.blocks[int(torch.randint(len(self.blocks), (), device="cpu"))]
        worker = _worker_seed()
        if worker != self._worker:  # a copy in another process
            self._worker, self._batches = worker, 0
        word = _hash(_hash(_hash(self.seed) ^ (0 if worker is None else 1 + worker)) ^ self._batches)
        self._batches += 1
        return self.blocks[word * len(self.blocks) >> 64]

    def _cut(self, x: torch.Tensor, saliency: torch.Tensor, index: torch.Tensor, lam: torch.Tensor, blocks: int) -> Mix:
        options = Options(self.levels, self.beta, self.gamma, self.eta, self.neighborhood)
        *costs, shares = costs_and_shares(x, saliency, index, lam, blocks, self.mean, self.std, options)
        labels = grid_cut(*costs, solver=self.solver)
        count = blocks
        if self.transport and self.t_size is not None:
            count = x.shape[-2] // min(self.t_size, x.shape[-2] // blocks)
            shares = shares if count == blocks else block_saliency(saliency, count)
        traced = _check.transformed() or count > LARGEST
        masks = torch_puzzle_masks if traced else _backend.of(x).puzzle_masks
        mask, share, under, moving = masks(
            labels, lam.expand(len(x)), index, shares if self.transport else None, self.levels, count // blocks
        )
        plan = partner_plan = None
        if self.transport:
            plan, partner_plan = transport_plan(under, moving, self.t_eps).chunk(2)
        return Mix(share, index, share, mask=mask, plan=plan, partner_plan=partner_plan)


def _worker_seed() -> Any:
    worker = get_worker_info()
    return None if worker is None else worker.seed


def _hash(value: int) -> int:
    """Returns 64 bits in which every bit of a number counts (splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31
