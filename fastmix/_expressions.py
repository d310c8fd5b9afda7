"""The old names of the formulas in `_torch`, for modules that still import them from here."""

from typing import NamedTuple

from ._dtypes import accumulator
from ._torch._formulas import safe_index, times
from ._torch.convex_combination import convex_combination_formula as convex_combination_expression
from ._torch.convex_combination import convex_combination_gradients_formula as convex_combination_gradients_expression
from ._torch.js_divergence import js_divergence_formula as js_divergence_expression
from ._torch.mix import box_mask
from ._torch.mix import mix_dlam_formula as mix_dlam_expression
from ._torch.mix import mix_dx_formula as mix_dx_expression
from ._torch.mix import mix_formula as mix_expression
from ._torch.mix_masked import cell_weights, transported
from ._torch.mix_masked import mix_masked_dmask_formula as mix_masked_dmask_expression
from ._torch.mix_masked import mix_masked_dx_formula as mix_masked_dx_expression
from ._torch.mix_masked import mix_masked_formula as mix_masked_expression
from ._torch.soft_binary_cross_entropy import dense_binary_cross_entropy_formula, soft_binary_cross_entropy_formula
from ._torch.soft_cross_entropy import dense_cross_entropy_formula, soft_cross_entropy_formula

__all__ = [
    "accumulator",
    "box_mask",
    "cell_weights",
    "convex_combination_expression",
    "convex_combination_gradients_expression",
    "dense_bce_expression",
    "dense_ce_expression",
    "js_divergence_expression",
    "mix_dlam_expression",
    "mix_dx_expression",
    "mix_expression",
    "mix_masked_dmask_expression",
    "mix_masked_dx_expression",
    "mix_masked_expression",
    "safe_index",
    "soft_bce_expression",
    "soft_ce_expression",
    "times",
    "transported",
]


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    reduction: str


class _BinaryOptions(NamedTuple):
    label_smoothing: float
    threshold: float | None
    class_reduction: str
    reduction: str


def soft_ce_expression(logits, weights, classes, class_weight, *options):
    return soft_cross_entropy_formula(logits, weights, classes, class_weight, _Options(*options))


def dense_ce_expression(logits, target, class_weight, *options):
    return dense_cross_entropy_formula(logits, target, class_weight, _Options(*options))


def soft_bce_expression(logits, weights, classes, class_weight, pos_weight, *options):
    return soft_binary_cross_entropy_formula(logits, weights, classes, class_weight, pos_weight, _BinaryOptions(*options))


def dense_bce_expression(logits, target, class_weight, pos_weight, *options):
    return dense_binary_cross_entropy_formula(logits, target, class_weight, pos_weight, _BinaryOptions(*options))
