"""Dirichlet weights in C: dirichlet.c. The arguments are those of `fastmix._torch.dirichlet`."""

import ctypes

import torch

from .library import get


def dirichlet(state, rows, ways, numbers, dtype, device):
    """Returns Dirichlet weights [rows, ways] of numbers (alpha,), or behind the share of the clean batch of numbers (alpha, a, b)."""
    alpha, *skip = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers
    weights = torch.empty((rows, ways + bool(skip)), dtype=torch.float64, device="cpu")
    get().fm_dirichlet(state.data_ptr(), rows, ways, alpha, (ctypes.c_double * 2)(*skip) if skip else None, weights.data_ptr())
    return weights.to(device, dtype)
