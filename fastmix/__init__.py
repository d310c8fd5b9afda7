"""fastmix: batch mixing and soft-label cross-entropy, each in one pass over memory, with exact gradients."""

import importlib as _importlib
import os as _os
import sys as _sys
import typing as _typing

# A source checkout keeps kernels/ and bench/ beside this folder; an installed package has them inside. A checkout is
# told by constraints.txt, which no package contains.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "constraints.txt")) and _os.path.isfile(_os.path.join(_root, "kernels", "api.py")):
    __path__.append(_root)

from . import attacks, autograd  # noqa: E402
from . import functional as functional  # noqa: E402
from ._backend import backend  # noqa: E402
from ._check import debug  # noqa: E402
from ._warmup import warmup  # noqa: E402
from .adversarial import MovingAverageReweight, adversarial_mixing_loss  # noqa: E402
from .gan import gan_loss  # noqa: E402
from .hidden import ManifoldMixup, mix_hidden  # noqa: E402
from .losses.augmix_loss import augmix_loss  # noqa: E402
from .losses.calibration import auroc, expected_calibration_error  # noqa: E402
from .losses.js_divergence import js_divergence  # noqa: E402
from .losses.metrics import mixed_accuracy, mixed_loss  # noqa: E402
from .losses.soft_binary_cross_entropy import soft_binary_cross_entropy  # noqa: E402
from .losses.soft_cross_entropy import soft_cross_entropy  # noqa: E402
from .mixing.convex_combination import convex_combination  # noqa: E402
from .mixing.mix import mix  # noqa: E402
from .mixing.mix_masked import mix_masked  # noqa: E402
from .mixing.resize_mix import resize_mix  # noqa: E402
from .modules import SoftBinaryCrossEntropyLoss, SoftCrossEntropyLoss  # noqa: E402
from .pipeline import ImagePipeline  # noqa: E402
from .puzzle.attention_share import attention_share  # noqa: E402
from .puzzle.grid_cut import grid_cut, grid_cut_gap  # noqa: E402
from .puzzle.noise import PuzzleNoise, adversarial_noise, noise_start  # noqa: E402
from .puzzle.puzzle_costs import puzzle_costs  # noqa: E402
from .puzzle.saliency import input_gradient, saliency  # noqa: E402
from .puzzle.transport_plan import transport_plan  # noqa: E402
from .sampling import (  # noqa: E402
    AttentiveCutMix,
    AugMix,
    BetaMask,
    CutMix,
    FMix,
    GridMix,
    Mix,
    Mixup,
    PuzzleMix,
    RandomMix,
    ResizeMix,
    SaliencyMix,
    SmoothMix,
    dirichlet,
    mix_images,
    pair_by_size,
)
from .targets import MixedRows, SoftTarget  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AttentiveCutMix",
    "AugMix",
    "BetaMask",
    "CutMix",
    "FMix",
    "GridMix",
    "ImagePipeline",
    "ManifoldMixup",
    "Mix",
    "MixedRows",
    "Mixup",
    "MovingAverageReweight",
    "PuzzleMix",
    "PuzzleNoise",
    "RandomMix",
    "ResizeMix",
    "SaliencyMix",
    "SmoothMix",
    "SoftBinaryCrossEntropyLoss",
    "SoftCrossEntropyLoss",
    "SoftTarget",
    "adversarial_mixing_loss",
    "adversarial_noise",
    "attacks",
    "attention_share",
    "augmix_loss",
    "auroc",
    "autograd",
    "backend",
    "convex_combination",
    "debug",
    "dirichlet",
    "expected_calibration_error",
    "gan_loss",
    "grid_cut",
    "grid_cut_gap",
    "input_gradient",
    "js_divergence",
    "mix",
    "mix_hidden",
    "mix_images",
    "mix_masked",
    "mixed_accuracy",
    "mixed_loss",
    "noise_start",
    "pair_by_size",
    "puzzle_costs",
    "reference",
    "resize_mix",
    "saliency",
    "soft_binary_cross_entropy",
    "soft_cross_entropy",
    "transport_plan",
    "warmup",
]


if _typing.TYPE_CHECKING:
    reference: _typing.Any  # a checker that saw __getattr__ would take every name
else:

    def __getattr__(name):
        if name == "reference":  # the oracle is loaded when it is first asked for
            return _importlib.import_module("fastmix.reference")
        # with name and obj Python says which name may be meant
        raise AttributeError(f"module 'fastmix' has no attribute {name!r}", name=name, obj=_sys.modules[__name__])
