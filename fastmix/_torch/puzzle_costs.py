"""What PuzzleMix's cut weighs, in torch. The public function has the formula.

All images and both directions at once: D [2, 2, N, n-1, n] holds the differences across borders of either image before one and either
behind it.
"""

import math

import torch
import torch.nn.functional as F

WHOLE = 1e4  # cost of a label that lam of exactly 0 or 1 rules out: above every sum of saliency (1) and borders


def puzzle_costs(x, saliency, index, lam, blocks, std, options):
    """Returns (unary [N, n, n, L], vertical [N, n-1, n], horizontal [N, n, n-1], shares of the saliency [N, n, n]) in float32. A partner
    out of range is taken for the nearest row."""
    levels, beta, gamma, eta, neighborhood = options
    index = index.clamp(0, max(x.shape[0] - 1, 0))
    own = block_saliency(saliency, blocks)
    b = beta / (16 * blocks)
    # what keeping either image costs, beside what is thrown away: [2, N, n, n], the row's image first
    costs = torch.stack((own[index], own))
    height, width = (min(neighborhood, side // blocks) for side in x.shape[-2:])
    pixels = F.avg_pool2d(x.detach().float(), (height, width))
    pixels = pixels * (std[0] if len(std) == 1 else _channels(std, x))
    both = torch.stack((pixels, pixels[index]))
    weights = []
    for images, part in ((both, costs), (both.mT, costs.mT)):
        # D[a, b]: between image a on one side of a border and image b behind it, [2, 2, N, n-1, n]
        lines = images.shape[-2] // blocks
        before, behind = images[..., lines - 1 : -1 : lines, :], images[..., lines::lines, :]
        gaps = (before.unsqueeze(1) - behind.unsqueeze(0)).abs_()
        D = gaps.unflatten(-1, (blocks, -1)).mean((3, -1))
        part[..., :-1, :].add_(D.sum(1), alpha=b * gamma / 2)
        part[..., 1:, :].add_(D.sum(0), alpha=b * gamma / 2)
        crossed = D[0, 1] + D[1, 0] - D[0, 0] - D[1, 1]
        # colours within the images' range give at least b*(1 - gamma); others must not make a weight negative
        weights.append((crossed * (b * gamma / 2)).add_(b).clamp_(min=0))
    label = torch.arange(levels, dtype=torch.float32, device=x.device)
    unary = torch.lerp(costs[0].unsqueeze(3), costs[1].unsqueeze(3), label / (levels - 1))
    unary += _prior(lam, label, levels - 1, eta / blocks**2)[:, None, None]
    return unary, weights[0], weights[1].mT, own


def _prior(lam, label, K, scale):
    """Returns -scale * log Binomial(l; K, 1-lam) for every label l, [N, L]; WHOLE for what has probability 0."""
    shares = torch.stack((lam, 1 - lam))
    own, partner = torch.where(shares > 0, shares.log() * -scale, WHOLE).unsqueeze(2)
    # the binomial coefficients of K to 3 are K between the ends, where l*(K - l) is at least 1
    prior = torch.addcmul(own * (K - label), partner, label)
    return prior.sub_((label * (K - label)).clamp_(max=1), alpha=scale * math.log(K))


def _channels(std, like):
    """Returns the channels' deviations [C, 1, 1], without waiting for a device."""
    if like.is_cpu:
        return torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=like.device) for value in std])


def block_saliency(saliency, blocks):
    """Returns the saliency averaged over blocks, [N, n, n], each image's divided by its sum; uniform where that is 0."""
    N, H, W = saliency.shape
    pooled = F.avg_pool2d(saliency.detach().float().unsqueeze(1), (H // blocks, W // blocks)).squeeze(1)
    # divided by the largest first: a sum may overflow, and a small one underflow
    largest = pooled.amax((1, 2), keepdim=True)
    pooled = pooled / largest
    return torch.where(largest == 0, 1 / blocks**2, pooled / pooled.sum((1, 2), keepdim=True))
