"""The autograd Functions: they save, launch and return. One Function serves every backend."""

from .dense_ce import DenseCrossEntropyFunction
from .mix import MixFunction
from .soft_ce import SoftCrossEntropyFunction

__all__ = ["DenseCrossEntropyFunction", "MixFunction", "SoftCrossEntropyFunction"]
