"""From the labels of PuzzleMix's cut to masks, shares, and what transport reads, in torch. `kernels/puzzle_masks.py` has the formula."""

import torch


def puzzle_masks(labels, lam, index, saliency, levels, finer):
    """Returns (mask [N, m, m], share [N], under and moving [2N, m, m]), the last two None without a saliency [N, m, m]."""
    rows = torch.arange(len(labels), device=labels.device)
    index = index.clamp(0, max(len(labels) - 1, 0))
    lam = torch.where(index == rows, 1, lam)[:, None, None]
    whole = (lam == 0) | (lam == 1)
    mask = torch.where(whole, lam.to(torch.float32), 1 - labels.to(torch.float32) / (levels - 1))
    share = mask.mean((1, 2))
    mask = mask.repeat_interleave(finer, 1).repeat_interleave(finer, 2)
    if saliency is None:
        return mask, share, None, None
    under = torch.cat((torch.where(whole, 0, mask), torch.where(whole, 0, 1 - mask)))
    return mask, share, under, torch.cat((saliency, saliency[index]))
