"""The oracle: every op and its gradient in float64 NumPy, row by row, to be checked against the papers.

It shares no code with the kernels or the torch backend and is written unlike them: it loops over rows in Python, reads targets
one component at a time and takes lse from `np.logaddexp.reduce`. Arguments are anything that `np.asarray` takes; a K-hot target
is a pair `(classes, weights)` or an object with these fields.
"""

from .augmix import augmix, augmix_operation
from .convex_combination import convex_combination, convex_combination_grad
from .grid_cut import grid_cut, grid_energy
from .js_divergence import js_divergence, js_divergence_grad
from .mix import mix, mix_grad
from .mix_images import mix_images
from .mix_masked import mix_masked, mix_masked_grad
from .mixed_accuracy import mixed_accuracy
from .puzzle_costs import puzzle_costs
from .resize_mix import resize_mix, resize_mix_grad
from .soft_binary_cross_entropy import soft_binary_cross_entropy, soft_binary_cross_entropy_grad
from .soft_cross_entropy import soft_cross_entropy, soft_cross_entropy_grad
from .transport_plan import transport_plan

__all__ = [
    "augmix",
    "augmix_operation",
    "convex_combination",
    "convex_combination_grad",
    "grid_cut",
    "grid_energy",
    "js_divergence",
    "js_divergence_grad",
    "mix",
    "mix_grad",
    "mix_images",
    "mix_masked",
    "mix_masked_grad",
    "mixed_accuracy",
    "puzzle_costs",
    "resize_mix",
    "resize_mix_grad",
    "soft_binary_cross_entropy",
    "soft_binary_cross_entropy_grad",
    "soft_cross_entropy",
    "soft_cross_entropy_grad",
    "transport_plan",
]
