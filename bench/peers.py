"""What people write by hand, defined once: plain eager torch that takes the fused ops' arguments and gives their results.

They are written to be fast as well as usual: no copy that its users do not make, and the shorter spelling where two are common.
"""

import torch
import torch.nn.functional as F

# Mixing: (x, lam, index) -> the mixed batch, x left as it was


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


def copy(x, lam, index):
    """The floor: mixes nothing, copies the batch and, backwards, its gradient."""
    return _Copy.apply(x) if x.requires_grad else x.clone()


def mixup_cifar10(x, lam, index):
    """facebookresearch/mixup-cifar10 and most of what followed it."""
    return lam * x + (1 - lam) * x[index]


def lerp(x, lam, index):
    """The same in one call, which few know."""
    return torch.lerp(x[index], x, lam)


# Mixing into memory that is there: (x, lam, index, out), where out holds a copy of x before the first call


def copy_into(x, lam, index, out):
    return out.copy_(x)


def lerp_into(x, lam, index, out):
    return torch.lerp(x[index], x, lam, out=out)


def timm_batch(x, lam, index, out):
    """timm's Mixup with mode="batch": the loader's batch is overwritten, and the partner is always the reversed batch."""
    flipped = out.flip(0).mul_(1 - lam)
    return out.mul_(lam).add_(flipped)


# CutMix with a box per row: (x, index, box, rows) -> the mixed batch; rows are index and box on the host, where timm draws them


def timm_elem(x, index, box, rows):
    """timm's Mixup with mode="elem": one copy of the batch, then one of each box."""
    out = x.clone()
    for i, (j, (y0, x0, y1, x1)) in enumerate(rows):
        out[i][:, y0:y1, x0:x1] = x[j][:, y0:y1, x0:x1]
    return out


def inside(box, shape):
    """Which pixels of [N, C, H, W] are inside their row's box, [N, 1, H, W]."""
    y0, x0, y1, x1 = box.view(-1, 4, 1, 1, 1).unbind(1)  # [N, 1, 1, 1] each
    rows = torch.arange(shape[2], device=box.device).view(-1, 1)
    columns = torch.arange(shape[3], device=box.device)
    return (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)


def where(x, index, box, rows):
    """One mask for all boxes."""
    return torch.where(inside(box, x.shape), x[index], x)


# Loss on a mixed batch: (logits [N, C], y [N], lam [N], index [N]) -> mean loss, the target built on the way


def two_losses(logits, y, lam, index):
    """mixup-cifar10's criterion, with a lam per row."""
    own, partner = (F.cross_entropy(logits, classes, reduction="none") for classes in (y, y[index]))
    return (lam * own + (1 - lam) * partner).mean()


def dense_target(logits, y, lam, index):
    """timm's and torchvision's way: rows of probabilities."""
    own = torch.zeros_like(logits).scatter_(1, y.unsqueeze(1), 1.0)
    lam = lam.unsqueeze(1)
    return F.cross_entropy(logits, own * lam + own[index] * (1 - lam))


MIX = {"mixup-cifar10": mixup_cifar10, "torch.lerp": lerp, "copy": copy}
MIX_INTO = {"torch.lerp, out=": lerp_into, "timm, in place": timm_batch, "copy": copy_into}
CUTMIX = {"timm, loop over rows": timm_elem, "torch.where": where}
LOSS = {"two hard losses": two_losses, "dense target": dense_target}
