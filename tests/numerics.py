"""How close is close: one table, derived, for every test.

RELATIVE, of the size of a row. float32: 2e-6, that is 16 roundings of 2**-24 or so, and the hardware's exp, which is good to 2 units
in the last place (2**-22). float64: what the oracle's own sums are good to.
ULP: bfloat16 and float16 are computed in float32 and rounded once, so a result is within one unit in the last place (2**-7 and
2**-10 relative) of the correctly rounded one; TINY is the smallest unit.
LAMBDA, of the sum of the sizes of the terms: a gradient to lambda or to a weight adds up a whole row, in float32 some 100 partial
sums deep.
A test that needs another bound says why beside it. Results that are equal by construction are compared bit by bit.
"""

import numpy as np
import torch

from fastmix import SoftTarget

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RELATIVE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-6, torch.float16: 2e-6}
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # smallest subnormal
LAMBDA = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def accumulator(dtype):
    """The dtype that losses and sums are computed in."""
    return torch.promote_types(dtype, torch.float32)


def finite(values):
    return np.where(np.isfinite(values), values, 0.0)


def numpy(t):
    """A tensor's exact values in float64 (or its integers)."""
    t = t.detach().cpu()
    return t.double().numpy() if t.is_floating_point() else t.numpy()


def target_of(kind, shape, K=2, weights_dtype=torch.float32, device="cpu"):
    """(what the op takes, what the oracle takes, the tensor that a gradient goes to or None)"""
    N, C, *inner = shape
    classes = torch.randint(0, C, (N, K, *inner))
    if kind == "indices":
        classes = classes[:, 0].clone()
        return classes.to(device), numpy(classes), None
    if kind == "dense":
        t = torch.rand(shape, dtype=weights_dtype, device=device, requires_grad=True)
        return t, numpy(t), t
    per_pixel = (N, K, *inner) if kind == "k-hot per pixel" else (N, K)
    weights = torch.rand(per_pixel, dtype=accumulator(weights_dtype))
    weights[:1] = torch.tensor([1.0] + [0.0] * (K - 1)).view(-1, *[1] * (weights.dim() - 2))
    weights = weights.to(device).requires_grad_()
    return SoftTarget(classes.to(device), weights), (numpy(classes), numpy(weights)), weights


def assert_close(actual, expected, dtype, scale=None, factor=1.0):
    """A tensor against the oracle's values, by the table. `scale`: the size of a row (broadcast over its elements; default:
    the row's largest value); `factor` widens where a test says why."""
    assert actual.dtype == dtype or dtype in ULP, f"dtype {actual.dtype}"
    expected = np.asarray(expected, dtype=np.float64)
    assert tuple(actual.shape) == expected.shape
    actual = numpy(actual)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(actual[infinite], expected[infinite])
    finite = np.isfinite(expected)
    if scale is None:
        sizes = np.abs(np.where(finite, expected, 0.0))
        axes = tuple(range(1, expected.ndim))
        scale = sizes.max(axis=axes, keepdims=True, initial=0.0) if expected.ndim > 1 else sizes.max(initial=0.0)
    bound = factor * RELATIVE[dtype] * np.broadcast_to(np.asarray(scale, dtype=np.float64), expected.shape)
    if dtype in ULP:
        binade = 2.0 ** np.floor(np.log2(np.where(finite & (expected != 0), np.abs(expected), 1.0)))
        bound = bound + 1.5 * np.maximum(ULP[dtype] * binade * (expected != 0), TINY[dtype])  # to the nearest, then one more
    error = np.abs(np.where(finite, actual, 0.0) - np.where(finite, expected, 0.0))
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else ()
    assert np.all(error <= bound), f"at {worst}: {actual[worst]} is not {expected[worst]} within {bound[worst]}"
