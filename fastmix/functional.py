"""The ops, at their old address."""

from .losses.js_divergence import js_divergence
from .losses.metrics import mixed_accuracy, mixed_loss
from .losses.soft_binary_cross_entropy import soft_binary_cross_entropy
from .losses.soft_cross_entropy import soft_cross_entropy
from .mixing.convex_combination import convex_combination
from .mixing.mix import mix
from .mixing.mix_masked import mix_masked

__all__ = [
    "convex_combination",
    "js_divergence",
    "mix",
    "mix_masked",
    "mixed_accuracy",
    "mixed_loss",
    "soft_binary_cross_entropy",
    "soft_cross_entropy",
]
