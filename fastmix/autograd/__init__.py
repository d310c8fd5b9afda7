"""The autograd Functions: they save, launch and return. One Function serves every backend."""

from .convex_combination import ConvexCombinationFunction
from .dense_ce import DenseCrossEntropyFunction
from .js_divergence import JSDivergenceFunction
from .mix import MixFunction
from .mix_masked import MixMaskedFunction
from .soft_bce import DenseBinaryCrossEntropyFunction, SoftBinaryCrossEntropyFunction
from .soft_ce import SoftCrossEntropyFunction

__all__ = [
    "ConvexCombinationFunction",
    "DenseBinaryCrossEntropyFunction",
    "DenseCrossEntropyFunction",
    "JSDivergenceFunction",
    "MixFunction",
    "MixMaskedFunction",
    "SoftBinaryCrossEntropyFunction",
    "SoftCrossEntropyFunction",
]
