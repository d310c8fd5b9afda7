"""The torch backend, for the CPU and for devices without Triton: the same names and signatures as `fastmix.kernels.api`.

Each op has one file: its formula in plain differentiable torch on top, the launchers below. On the CPU they work in blocks of
rows that stay in the cache, and allocate results and blocks alone; on other devices a batch is one block. Values of weight 0
are not read, even if they are inf or NaN. That costs passes, so the CPU first works without them, and again with them if its
result is not finite.
"""

from .augmix import augmix_fwd
from .augmix_steps import augmix_steps
from .convex_combination import convex_combination_bwd, convex_combination_fwd
from .dirichlet import dirichlet
from .draw_numbers import draw_numbers
from .grid_cut import grid_cut
from .js_divergence import js_divergence_bwd, js_divergence_fwd
from .mix import mix_bwd, mix_fwd
from .mix_images import mix_images_fwd
from .mix_masked import mix_masked_bwd, mix_masked_fwd
from .puzzle_costs import puzzle_costs
from .puzzle_masks import puzzle_masks
from .resize_mix import resize_mix_bwd, resize_mix_fwd
from .sample import row_keys, sample_batch, soft_target, state_device
from .soft_binary_cross_entropy import dense_bce_bwd, dense_bce_fwd, soft_bce_bwd, soft_bce_fwd
from .soft_cross_entropy import dense_ce_bwd, dense_ce_fwd, soft_ce_bwd, soft_ce_fwd
from .transport_plan import transport_plan

__all__ = [
    "augmix_fwd",
    "augmix_steps",
    "convex_combination_bwd",
    "convex_combination_fwd",
    "dense_bce_bwd",
    "dense_bce_fwd",
    "dense_ce_bwd",
    "dense_ce_fwd",
    "dirichlet",
    "draw_numbers",
    "grid_cut",
    "js_divergence_bwd",
    "js_divergence_fwd",
    "mix_bwd",
    "mix_fwd",
    "mix_images_fwd",
    "mix_masked_bwd",
    "mix_masked_fwd",
    "puzzle_costs",
    "puzzle_masks",
    "resize_mix_bwd",
    "resize_mix_fwd",
    "row_keys",
    "sample_batch",
    "soft_bce_bwd",
    "soft_bce_fwd",
    "soft_ce_bwd",
    "soft_ce_fwd",
    "soft_target",
    "state_device",
    "transport_plan",
]
