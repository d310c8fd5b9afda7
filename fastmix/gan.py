"""The objective that mixup gives a GAN's discriminator."""

from collections.abc import Callable

import torch

from . import _check
from .losses.soft_binary_cross_entropy import soft_binary_cross_entropy
from .mixing.convex_combination import convex_combination


def gan_loss(
    discriminate: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor, lam: float | torch.Tensor
) -> torch.Tensor:
    """The discriminator's loss on real and generated rows, mixed pair by pair in one pass.

        l(d(lam*real + (1-lam)*fake), lam),        l the sigmoid cross-entropy, averaged over rows

    Args:
        discriminate: d; takes a batch and gives one logit a row, `[N]` or `[N, 1]`: real above 0.
        real: `[N, ...]` floating.
        fake: what the generator made, of the shape and dtype of real. It is detached: this is not the generator's loss.
        lam: float, 0-d or `[N]`: the share of the real row, in its values and in its label.

    Returns:
        The loss, in float32 (float64 for float64 logits). Differentiable in the parameters of d, in `real` and in `lam`.

    Raises:
        TypeError, ValueError: a wrong argument, or other than one logit a row.

    Source: arXiv:1710.09412, section 3.7.

    >>> import torch, fastmix
    >>> d = torch.nn.Linear(2, 1)
    >>> lam = torch.distributions.Beta(0.2, 0.2).sample((8,))
    >>> fastmix.gan_loss(d, torch.randn(8, 2), torch.randn(8, 2), lam).backward()
    >>> d.weight.grad.shape
    torch.Size([1, 2])
    """
    if not callable(discriminate):
        raise _check.wrong(TypeError, "discriminate", "a function of a batch", discriminate)
    _check.float_tensor("real", real, 1, "[N, ...]")
    _check.float_tensor("fake", fake, 1, "[N, ...]")
    if fake.shape != real.shape or fake.dtype != real.dtype:
        raise _check.wrong(ValueError, "fake", f"shape {list(real.shape)} and {real.dtype}, as real", fake)
    _check.same_device("fake", fake, real)
    rows = real.shape[0]
    lam = _check.coefficient("lam", lam, real).expand(rows)
    logits = discriminate(convex_combination((real, fake.detach()), torch.stack((lam, 1 - lam), 1)))
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) not in ((rows,), (rows, 1)):
        raise _check.wrong(ValueError, "discriminate", f"one logit a row, [{rows}] or [{rows}, 1]", logits)
    return soft_binary_cross_entropy(logits.reshape(rows, 1), lam.unsqueeze(1))
