"""Samplers, which draw how a batch is mixed, and Mix, what they draw. All draws are made on the batch's device, and nothing waits for it."""

from .mix_images import mix_images
from .plan import Mix
from .puzzle import PuzzleMix
from .samplers import BetaMask, CutMix, Mixup, RandomMix, dirichlet

__all__ = ["BetaMask", "CutMix", "Mix", "Mixup", "PuzzleMix", "RandomMix", "dirichlet", "mix_images"]
