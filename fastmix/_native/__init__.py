"""The native backend, for CPU tensors: C called through ctypes, with the names and signatures of `fastmix._torch`.

An op that has no C of its own here, and a call that its C does not take, goes to the torch backend.
"""

from .._torch import *  # noqa: F403
from .._torch import __all__ as __all__
from .convex_combination import convex_combination_bwd as convex_combination_bwd
from .convex_combination import convex_combination_fwd as convex_combination_fwd
from .dirichlet import dirichlet as dirichlet
from .js_divergence import js_divergence_bwd as js_divergence_bwd
from .js_divergence import js_divergence_fwd as js_divergence_fwd
from .library import why_not as why_not
from .mix import mix_bwd as mix_bwd
from .mix import mix_fwd as mix_fwd
from .mix_images import mix_images_fwd as mix_images_fwd
from .mix_masked import mix_masked_bwd as mix_masked_bwd
from .mix_masked import mix_masked_fwd as mix_masked_fwd
from .sample import sample_batch as sample_batch
from .soft_binary_cross_entropy import dense_bce_bwd as dense_bce_bwd
from .soft_binary_cross_entropy import dense_bce_fwd as dense_bce_fwd
from .soft_binary_cross_entropy import soft_bce_bwd as soft_bce_bwd
from .soft_binary_cross_entropy import soft_bce_fwd as soft_bce_fwd
from .soft_cross_entropy import dense_ce_bwd as dense_ce_bwd
from .soft_cross_entropy import dense_ce_fwd as dense_ce_fwd
from .soft_cross_entropy import soft_ce_bwd as soft_ce_bwd
from .soft_cross_entropy import soft_ce_fwd as soft_ce_fwd
