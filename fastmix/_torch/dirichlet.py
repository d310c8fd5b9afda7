"""Weights of a Dirichlet distribution for each row, as a softmax of logarithms of Gamma variables: the form of the CPU."""

import numpy as np
import torch

from ._draws import SKIP, WAYS, lesser, log_gamma, short


def dirichlet(state, rows, ways, numbers, dtype, device):
    """Returns Dirichlet weights [rows, ways] of numbers (alpha,), or behind the share of the clean batch of numbers (alpha, a, b)."""
    bits = state.numpy()
    alpha, *skip = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers
    logs = log_gamma(bits, WAYS, 0, rows * ways, alpha).reshape(rows, ways)
    weights = short(np.exp(logs - logs.max(1, keepdims=True, initial=-np.inf)))
    weights /= weights.sum(1, keepdims=True)
    if skip:
        logs = log_gamma(bits, SKIP, 0, rows * 2, np.tile(skip, rows)).reshape(rows, 2)
        least, low = lesser(logs[:, 0] - logs[:, 1])
        mixed = np.where(low, least, 1 - least)
        weights = np.concatenate((np.where(low, 1 - least, least)[:, None], mixed[:, None] * weights), 1)
    return torch.from_numpy(weights).to(device, dtype)
