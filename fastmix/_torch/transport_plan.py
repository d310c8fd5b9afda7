"""Where the blocks of an image are moved under a mask, in torch: rounds of proposals and refusals.

    gain[s, t] = saliency[s] - t_eps * distance(s, t)^2 / (n-1)^2        for targets t under the mask

In every round each source proposes to the target of its largest gain that has not refused it, while that is above 0; every target keeps
the proposal of the largest gain and refuses the others. Ties go to the lowest index. A target keeps what it has until a better proposal
comes, so that only the refused propose anew: each has a pointer into the offsets between blocks, sorted by distance.
"""

import functools

import torch

TRIED = 16  # offsets of a source at a time
LAST = 2**31 - 1  # sources are stored as LAST - source beside their gain, so that the larger number is the lower index


@functools.lru_cache(maxsize=16)
def sorted_offsets(n, t_eps, device):
    """Returns (dy, dx int32, cost float32) of all (2n-1)^2 offsets between blocks, sorted by cost; of equal ones the offset to the
    lowest target first."""
    along = torch.arange(1 - n, n, device=device)
    square = (along.square()[:, None] + along.square()).flatten()
    cost = t_eps * (square.to(torch.float32) / max((n - 1) ** 2, 1))
    order = cost.argsort(stable=True)
    dy, dx = (t.flatten()[order].to(torch.int32) for t in torch.meshgrid(along, along, indexing="ij"))
    return dy, dx, cost[order]


def transport_plan(mask, saliency, offsets, rounds):
    """Returns for each block of the output the block that it comes from, [N, n*n] int64. `offsets`: of `sorted_offsets`."""
    N, n, _ = mask.shape
    dy, dx, cost = offsets
    blocks = n * n
    visible = (mask > 0).reshape(-1)
    gain = saliency.reshape(-1)
    numbers = torch.arange(N * blocks, device=mask.device)
    source = numbers % blocks
    held = torch.zeros_like(numbers)  # by each target: bits of the gain, then LAST - source
    at, target, offered = torch.zeros_like(numbers), numbers.clone(), torch.full_like(numbers, -1)
    waiting = numbers  # sources that are to propose
    for _ in range(rounds):
        waiting = _next_targets(waiting, at, target, visible, gain, source, dy, dx, cost, n)
        offer = (gain[waiting] - cost[at[waiting]]).view(torch.int32).long() << 32 | (LAST - source[waiting])
        offered[waiting] = offer
        held.scatter_reduce_(0, target[waiting], offer, "amax")
        waiting = ((offered >= 0) & (held[target] != offered)).nonzero().squeeze(1)
        if not len(waiting):
            break
        at[waiting] += 1
        offered[waiting] = -1
    plan = torch.where(held > 0, LAST - (held & LAST), source)
    return plan.view(N, blocks)


def _next_targets(waiting, at, target, visible, gain, source, dy, dx, cost, n):
    """Moves the pointers of waiting sources on to the next target under the mask; returns those that have one. So many offsets are
    tried at a time, 4 times as fast as one by one at t_eps 0.02."""
    found, looking = [], waiting
    tried = torch.arange(TRIED, device=waiting.device)
    while len(looking):
        place = at[looking].unsqueeze(1) + tried
        ahead = (place < len(cost)) & (gain[looking].unsqueeze(1) > cost[place.clamp(max=len(cost) - 1)])
        place = place.clamp(max=len(cost) - 1)
        own = source[looking].unsqueeze(1)
        y, x = own // n + dy[place], own % n + dx[place]
        inside = ahead & (y >= 0) & (y < n) & (x >= 0) & (x < n)
        block = looking.unsqueeze(1) - own + torch.where(inside, y * n + x, 0)
        good, first = (inside & visible[block]).max(1)
        at[looking] += torch.where(good, first, TRIED)
        target[looking[good]] = block.gather(1, first.unsqueeze(1)).squeeze(1)[good]
        found.append(looking[good])
        looking = looking[~good & ahead[:, -1]]
    return torch.cat(found) if found else waiting
