"""How much each pixel of an image matters to the loss, and the gradient that says so.

saliency[i, y, x] = sqrt(mean over channels of (d loss / d x[i, :, y, x])^2)
"""

import contextlib
import math
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import _check
from .._modes import running_mode
from ..losses.soft_cross_entropy import soft_cross_entropy


def input_gradient(
    model: nn.Module,
    x: torch.Tensor,
    target: torch.Tensor,
    *,
    keep: float = 0.0,
    scaler: Any = None,
) -> torch.Tensor:
    """Returns the gradient of the batch's mean loss to its images, by one forward and one backward.

        g = d soft_cross_entropy(model(x), target) / d x

    With `keep=0` the model runs in eval mode: no statistic moves, no gradient of a parameter is formed, and `.grad` stays as it
    is. With `keep > 0` it runs in training mode, and the gradients of `keep` times the loss are added to the parameters' `.grad`
    (the paper's clean regularisation), so that the pass is not wasted: call it after `zero_grad` and before the backward of the
    mixed batch. Running statistics then move once in this pass. Under DistributedDataParallel the pass does not communicate
    (`no_sync`): what it leaves in `.grad` is averaged with the gradients of the next backward. Every module's mode is put back.

    Args:
        model: called on `x`; its result are logits.
        x: `[N, ...]` floating point images. Autocast applies as around any forward.
        target: whatever `fastmix.soft_cross_entropy` takes.
        keep: weight of the clean loss in `.grad`, at least 0; 0 leaves `.grad` alone.
        scaler: scales the loss in the backward, so that gradients do not underflow in float16. `.grad` stays scaled, for
            `scaler.step`; what is returned is not.

    Returns:
        The gradient, of x's shape and dtype, detached; float32 where a scaler had to be divided out.

    Raises:
        TypeError, ValueError: a wrong argument, or what the model or the loss raises.

    Source: PuzzleMix, arXiv:2009.06962, Section 5.1.

    >>> import torch, fastmix
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    >>> g = fastmix.input_gradient(model, torch.randn(4, 3, 2, 2), torch.arange(4))
    >>> g.shape, model[1].weight.grad
    (torch.Size([4, 3, 2, 2]), None)
    """
    if not isinstance(model, nn.Module):
        raise _check.wrong(TypeError, "model", "a torch.nn.Module", model)
    _check.float_tensor("x", x, 1, "[N, ...]")
    keep = _check.number("keep", keep)
    if keep < 0:
        raise _check.wrong(ValueError, "keep", "a number of at least 0", keep)
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise _check.wrong(TypeError, "scaler", "a torch.amp.GradScaler or None", scaler)
    silent = model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
    with running_mode(model, keep > 0), silent, torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss = soft_cross_entropy(model(leaf), target)
        factor = loss.new_ones(()) if scaler is None else scaler.scale(loss.new_ones(()))
        factor = factor * keep if keep else factor
        loss = loss * factor
        if keep:
            loss.backward()
            gradient = leaf.grad
        else:
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    if gradient is None:
        raise ValueError("model: expected logits that depend on x, got some that do not")
    if not keep and scaler is None:
        return gradient
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (gradient.to(dtype) / factor).to(x.dtype if scaler is None else dtype)


def saliency(gradient: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    """Returns how much each pixel matters: the root mean square of its gradient over the channels.

        s[i, y, x] = sqrt(mean over c of gradient[i, c, y, x]^2),  divided by its sum over the image with `normalize`

    Args:
        gradient: `[N, C, H, W]` floating point, of `fastmix.input_gradient` for instance.
        normalize: each image sums to 1; an image without any gradient is uniform.

    Returns:
        `[N, H, W]` float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong argument.

    Source: PuzzleMix, arXiv:2009.06962, Section 5.1.

    >>> import torch, fastmix
    >>> fastmix.saliency(torch.tensor([3.0, 4.0, 0.0, 0.0]).view(1, 2, 1, 2), normalize=False)
    tensor([[[2.1213, 2.8284]]])
    >>> fastmix.saliency(torch.zeros(1, 3, 2, 2))
    tensor([[[0.2500, 0.2500],
             [0.2500, 0.2500]]])
    """
    _check.float_tensor("gradient", gradient, 4, "[N, C, H, W]")
    if gradient.dim() != 4:
        raise _check.wrong(ValueError, "gradient", "shape [N, C, H, W]", gradient)
    if not isinstance(normalize, bool):
        raise _check.wrong(TypeError, "normalize", "a bool", normalize)
    N, C, H, W = gradient.shape
    g = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
    if not g.numel():
        return g.new_zeros(N, H, W)
    # in units of the image's largest value: squares of a sure network's gradients underflow
    largest = g.abs().amax((1, 2, 3), keepdim=True)
    unit = torch.where(largest == 0, 1, largest)
    root = torch.linalg.vector_norm(g / unit, dim=1) / math.sqrt(C)
    if not normalize:
        return root * unit.squeeze(1)
    total = root.sum((1, 2), keepdim=True)
    return torch.where(total == 0, 1 / (H * W), root / total)
