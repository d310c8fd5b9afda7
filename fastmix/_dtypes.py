"""The dtypes that ops take, and the one that they compute in."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHT_DTYPES = (torch.float32, torch.float64)  # of lambda, masks and weights: a narrower one would round them


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 for float64, float32 for every other one."""
    return torch.promote_types(dtype, torch.float32)
