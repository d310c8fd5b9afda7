"""The Triton backend's face: the same names and signatures as fastmix._torch."""

from ._launch import accumulator
from .dense_ce import dense_ce_bwd, dense_ce_fwd
from .mix import mix_bwd, mix_fwd
from .soft_ce import soft_ce_bwd, soft_ce_fwd

__all__ = [
    "accumulator",
    "dense_ce_bwd",
    "dense_ce_fwd",
    "mix_bwd",
    "mix_fwd",
    "soft_ce_bwd",
    "soft_ce_fwd",
]
