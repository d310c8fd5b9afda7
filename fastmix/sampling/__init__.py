"""Samplers, which draw how a batch is mixed, and Mix, what they draw. All draws are made on the batch's device, and nothing waits for it."""

from .masks import FMix, GridMix, SmoothMix
from .plan import Mix
from .puzzle import PuzzleMix
from .regions import AttentiveCutMix, ResizeMix, SaliencyMix
from .samplers import BetaMask, CutMix, Mixup, RandomMix, dirichlet

__all__ = [
    "AttentiveCutMix",
    "BetaMask",
    "CutMix",
    "FMix",
    "GridMix",
    "Mix",
    "Mixup",
    "PuzzleMix",
    "RandomMix",
    "ResizeMix",
    "SaliencyMix",
    "SmoothMix",
    "dirichlet",
]
