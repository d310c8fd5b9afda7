"""The dtypes that ops take, and the one that they compute in."""

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHT_DTYPES = (torch.float32, torch.float64)  # of lambdas, masks and target weights: lower precision would round them


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that arithmetic is done in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
