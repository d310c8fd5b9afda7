"""Samplers, which draw how a batch is mixed, and Mix, what they draw. All draws are made on the batch's device, and nothing waits for it."""

from .augmix import AugMix
from .masks import FMix, GridMix, SmoothMix
from .mix_images import mix_images
from .plan import Mix
from .puzzle import PuzzleMix
from .regions import AttentiveCutMix, ResizeMix, SaliencyMix
from .samplers import BetaMask, CutMix, Mixup, RandomMix, dirichlet
from .sizes import pair_by_size

__all__ = [
    "AttentiveCutMix",
    "AugMix",
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
    "mix_images",
    "pair_by_size",
]
