"""The autograd Functions: they save, launch and return. One Function serves every backend."""

from .losses.js_divergence import JSDivergenceFunction
from .losses.soft_binary_cross_entropy import DenseBinaryCrossEntropyFunction, SoftBinaryCrossEntropyFunction
from .losses.soft_cross_entropy import DenseCrossEntropyFunction, SoftCrossEntropyFunction
from .mixing.convex_combination import ConvexCombinationFunction
from .mixing.mix import MixFunction
from .mixing.mix_images import MixImagesFunction
from .mixing.mix_masked import MixMaskedFunction
from .mixing.resize_mix import ResizeMixFunction

__all__ = [
    "ConvexCombinationFunction",
    "DenseBinaryCrossEntropyFunction",
    "DenseCrossEntropyFunction",
    "JSDivergenceFunction",
    "MixFunction",
    "MixImagesFunction",
    "MixMaskedFunction",
    "ResizeMixFunction",
    "SoftBinaryCrossEntropyFunction",
    "SoftCrossEntropyFunction",
]
