"""The formulas as plain differentiable torch operations on any device.

The torch backend is built on them, and they are what runs under function transforms (torch.func, forward-mode AD) and under
second derivatives, where a kernel has no derivative to give.
"""

import math

import torch
from torch.nn.functional import logsigmoid


def accumulator(dtype):
    """The dtype arithmetic is done in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def box_mask(box, shape):
    """Whether each position of the last dimensions of `shape` lies in the rows' half-open boxes: [N, 1, ..., sizes]."""
    dims = box.shape[1] // 2
    inside = torch.ones((), dtype=torch.bool, device=box.device)
    for d in range(dims):
        size = shape[len(shape) - dims + d]
        at = torch.arange(size, device=box.device)
        hit = (at >= box[:, d, None]) & (at < box[:, dims + d, None])
        inside = inside & hit.view(box.shape[0], *[size if k == d else 1 for k in range(dims)])
    return inside.reshape(box.shape[0], *[1] * (len(shape) - 1 - dims), *inside.shape[1:])


def pixel_weights(lam, box, x):
    """Weights of the row itself, [N or 1, 1, ...], 0 inside its box."""
    weights = lam.reshape(-1, *[1] * (x.dim() - 1))
    return weights if box is None else weights.masked_fill(box_mask(box, x.shape), 0)


def safe_index(index, rows):
    """(index with wrong entries replaced by 0, which entries were right)"""
    known = (index >= 0) & (index < rows)
    return torch.where(known, index, 0), known


def _read(weights, x):
    """x, with what is not finite replaced by 0 where its weight is 0."""
    return torch.where((weights == 0) & ~torch.isfinite(x), torch.zeros((), dtype=x.dtype, device=x.device), x)


def mix_expression(x, lam, index, box):
    """lam*x + (1-lam)*x[index], as differentiable torch operations."""
    index, known = safe_index(index, x.shape[0])
    wide = x.to(lam.dtype)
    own = pixel_weights(lam, box, x)
    mixed = own * _read(own, wide) + (1 - own) * _read(1 - own, wide[index])
    return torch.where(known.view(-1, *[1] * (x.dim() - 1)), mixed, math.nan).to(x.dtype)


def mix_dx_expression(g, lam, index, box):
    """lam*g + the transpose of the gather on (1-lam)*g, as differentiable torch operations."""
    index, known = safe_index(index, g.shape[0])
    wide = g.to(lam.dtype)
    own = pixel_weights(lam, box, g)
    other = torch.where(known.view(-1, *[1] * (g.dim() - 1)), 1 - own, 0)
    back = (other * _read(other, wide)).expand(g.shape)
    return (own * _read(own, wide) + _summed(back, index)).to(g.dtype)


def mix_dlam_expression(g, x, lam, index, box):
    """<g, x - x[index]> per row outside the box, as differentiable torch operations."""
    index, known = safe_index(index, x.shape[0])
    wide = x.to(lam.dtype)
    product = g.to(lam.dtype) * (wide - wide[index])
    if box is not None:
        product = product.masked_fill(box_mask(box, x.shape), 0)
    return torch.where(known, product.sum(list(range(1, x.dim()))) if x.dim() > 1 else product, math.nan)


def convex_combination_expression(sources, weights):
    """The sum over k of weights[:, k]*sources[k], as differentiable torch operations."""
    total = 0
    for source, own in zip(sources, weights.unbind(1), strict=True):
        own = own.view(-1, *[1] * (source.dim() - 1))
        total = total + own * _read(own, source.to(weights.dtype))
    return total.to(sources[0].dtype)


def convex_combination_gradients_expression(g, sources, weights, need_dsources, need_dweights):
    """weights[:, k]*g for each source, stacked where they are, and <g, sources[k]> for each weight, as differentiable torch
    operations; None for what is not needed."""
    wide, stacked = g.to(weights.dtype), isinstance(need_dsources, bool)
    dsources = []
    for own, need in zip(weights.unbind(1), [need_dsources] * weights.shape[1] if stacked else need_dsources, strict=True):
        own = own.view(-1, *[1] * (g.dim() - 1))
        dsources.append((own * _read(own, wide)).to(g.dtype) if need else None)
    dsources = (torch.stack(dsources) if need_dsources else None) if stacked else tuple(dsources)
    if not need_dweights:
        return dsources, None
    products, row = [wide * source.to(wide.dtype) for source in sources], list(range(1, g.dim()))
    return dsources, torch.stack([product.sum(row) if row else product for product in products], 1)


def cell_weights(mask, shape):
    """A mask [N, h, w] over the pixels of images of this shape: [N, 1, ..., H, W]."""
    N, h, w = mask.shape
    tall, wide = _block_sizes(mask, shape)
    return mask[:, :, None, :, None].expand(N, h, tall, w, wide).reshape(N, *[1] * (len(shape) - 3), *shape[-2:])


def _block_sizes(mask, shape):
    """(height, width) of a cell in pixels."""
    return tuple(size // max(count, 1) for size, count in zip(shape[-2:], mask.shape[1:], strict=True))


def _source_pixels(plan, mask, shape):
    """Where each pixel of the rows comes from when block plan[b] goes to b, as numbers [N, H*W] within the row's plane."""
    h, w = mask.shape[1:]
    tall, wide = _block_sizes(mask, shape)
    blocks = torch.arange(h * w, device=plan.device)
    start = blocks // w * (tall * shape[-1]) + blocks % w * wide  # a block's first pixel
    cell = blocks.view(h, 1, w, 1).expand(h, tall, w, wide).reshape(-1)
    return torch.arange(len(cell), device=plan.device) - start[cell] + start[plan][:, cell]


def transported(x, plan, mask):
    """Rows whose block b comes from block plan[b]."""
    if plan is None:
        return x
    source = _source_pixels(plan, mask, x.shape)
    source = source.view(x.shape[0], *[1] * (x.dim() - 3), source.shape[1])
    flat = x.reshape(*x.shape[:-2], source.shape[-1])
    return flat.gather(-1, source.expand(flat.shape)).reshape(x.shape)


def _returned(g, index, plan, mask):
    """The transpose of gathering rows `index` (None: as they are) and then blocks `plan`: each value back to where it came from."""
    if plan is None and index is None:
        return g
    if plan is None:
        return _summed(g, index)
    source = _source_pixels(plan, mask, g.shape)
    rows = torch.arange(g.shape[0], device=g.device) if index is None else index
    planes = math.prod(g.shape[1:-2])
    plane = rows.view(-1, 1, 1) * planes + torch.arange(planes, device=g.device).unsqueeze(1)  # [N, planes, 1]
    return _summed(g.reshape(-1), (plane * source.shape[1] + source.unsqueeze(1)).view(-1)).reshape(g.shape)


def _summed(values, index):
    """Rows of values added up at `index`. index_put sums in sorted order on accelerators, index_add in the order of the index on
    the CPU: both repeatable."""
    zeros = torch.zeros_like(values)
    return zeros.index_add(0, index, values) if values.is_cpu else zeros.index_put((index,), values, accumulate=True)


def _safe_plans(known, mask, *plans):
    """(which rows have partner and plans in range, [plans with wrong entries replaced by 0, or None])"""
    safe = []
    for plan in plans:
        if plan is not None:
            plan, right = safe_index(plan, mask.shape[1] * mask.shape[2])
            known = known & right.all(1)
        safe.append(plan)
    return known, safe


def mix_masked_expression(x, mask, index, plan, partner_plan):
    """m*x + (1-m)*x[index], either's blocks moved by its plan, as differentiable torch operations."""
    index, known = safe_index(index, x.shape[0])
    known, (plan, partner_plan) = _safe_plans(known, mask, plan, partner_plan)
    wide = x.to(mask.dtype)
    own = cell_weights(mask, x.shape)
    mixed = own * _read(own, transported(wide, plan, mask))
    mixed = mixed + (1 - own) * _read(1 - own, transported(wide[index], partner_plan, mask))
    return torch.where(known.view(-1, *[1] * (x.dim() - 1)), mixed, math.nan).to(x.dtype)


def mix_masked_dx_expression(g, mask, index, plan, partner_plan):
    """m*g and (1-m)*g, added up where their values came from, as differentiable torch operations."""
    index, known = safe_index(index, g.shape[0])
    wide = g.to(mask.dtype)
    own = cell_weights(mask, g.shape)
    other = 1 - own
    if plan is not None:  # a block that came from nowhere gives its gradient to none
        own = own.where(cell_weights(((plan >= 0) & (plan < plan.shape[1])).view(mask.shape), g.shape), 0)
    known, (plan, partner_plan) = _safe_plans(known, mask, plan, partner_plan)
    other = torch.where(known.view(-1, *[1] * (g.dim() - 1)), other, 0)
    mine = _returned(own * _read(own, wide), None, plan, mask)
    return (mine + _returned(other * _read(other, wide), index, partner_plan, mask)).to(g.dtype)


def mix_masked_dmask_expression(g, x, mask, index, plan, partner_plan):
    """<g, own - partner> per cell, as differentiable torch operations."""
    index, known = safe_index(index, x.shape[0])
    known, (plan, partner_plan) = _safe_plans(known, mask, plan, partner_plan)
    wide = x.to(mask.dtype)
    gap = transported(wide, plan, mask) - transported(wide[index], partner_plan, mask)
    (h, w), (tall, breadth) = mask.shape[1:], _block_sizes(mask, x.shape)
    product = (g.to(mask.dtype) * gap).reshape(x.shape[0], math.prod(x.shape[1:-2]), h, tall, w, breadth)
    return torch.where(known.view(-1, 1, 1), product.sum((1, 3, 5)), math.nan)


def times(a, b):
    """a*b, where a weight a of 0 means that b is not looked at."""
    return (a * b).masked_fill_(a == 0, 0)


def columns(class_weight, like):
    """Class weights [C] against [N, C] or [N, C, I]."""
    return class_weight.view(1, -1, *[1] * (like.dim() - 2))


def _flat(t):
    """[N, C, d1, ...] as [N, C, I]; [N, C] as it is."""
    return t.flatten(2) if t.dim() > 3 else t


class Components:
    """A K-hot target as tensors [N, K] for logits z [N, C], or [N, K, I] for [N, C, I].

    classes, in range; ignored, which components are (None: none of them); a, their weights, 0 where ignored; w, the weights of
    their classes (None: 1); weighted = a*w. `idle` are rows whose a are all 0, looked up where it has to be done `careful`ly;
    `bad` those with a class out of range (None on the CPU, where classes have been checked, unless nothing may be looked at).
    """

    def __init__(self, classes, weights, class_weight, ignore_index, label_smoothing, z, careful, look=True):
        look = look and z.is_cpu
        self.classes = classes = _flat(classes)
        self.ignored = self.bad = self.idle = self.w = None
        self.dtype = accumulator(z.dtype)
        if not look or _occurs(ignore_index, classes):
            self.ignored = classes == ignore_index
            known = (classes >= 0) & (classes < z.shape[1])
            self.classes = torch.where(known & ~self.ignored, classes, 0)
            self.bad = None if look else (~known & ~self.ignored).any(1, keepdim=True)
        if weights is None:
            a = torch.ones(classes.shape, dtype=self.dtype, device=classes.device)
        else:
            a = _flat(weights)
            a = a if a.dim() == classes.dim() else a.unsqueeze(2).expand(classes.shape).contiguous()  # sums in one order
            a = a if a.dtype == self.dtype else a.to(self.dtype)
        self.a = self.weighted = a if self.ignored is None else a.masked_fill(self.ignored, 0)
        if careful:
            self.idle = (self.a == 0).all(1, keepdim=True)
            self.idle = self.idle if self.bad is None else self.idle & ~self.bad
        if class_weight is not None:
            self.w = class_weight[self.classes]
            self.weighted = self.a * self.w
        self.smoothing = label_smoothing
        if label_smoothing > 0:
            self.class_weight = None if class_weight is None else columns(class_weight, z)
            self.class_mass = z.shape[1] if class_weight is None else class_weight.sum()
            self.smooth = label_smoothing / z.shape[1]

    def gradient(self, mass, scale=None):
        """(learn, hard, smooth) of the gradient learn*softmax(z) - hard at the classes - smooth*w, over mass [] or None (1),
        times scale by row or None (1). hard = (1-e)*a*w, smooth = (e/C)*sum of a (None: 0), learn = sum of hard + smooth*sum of
        w."""
        hard, smooth = self.weighted if mass is None else self.weighted / mass, None
        if self.smoothing > 0:
            hard = hard * (1 - self.smoothing)
            smooth = self.a.sum(1, keepdim=True) * self.smooth
            smooth = smooth if mass is None else smooth / mass
        if scale is not None:
            hard, smooth = hard * scale, None if smooth is None else smooth * scale
        if self.idle is not None:  # 0 whatever mass and scale
            hard = hard.masked_fill(self.weighted == 0, 0)
            smooth = None if smooth is None else smooth.masked_fill(self.idle, 0)
        learn = hard.sum(1, keepdim=True)
        learn = learn if smooth is None else learn + smooth * self.class_mass
        return learn if self.bad is None else learn.masked_fill(self.bad, math.nan), hard, smooth

    def finish(self, e, total, classes, learn, hard, smooth, idle):
        """A block of exp(z - max), in place, to its gradient."""
        e.mul_(learn / total)
        if idle is not None:
            e.masked_fill_(idle, 0)
        if smooth is not None:
            e -= smooth if self.class_weight is None else smooth * self.class_weight
        return e.scatter_add_(1, classes, hard.neg())

    def below(self, gap):
        """sum over c of w[c]*(max - z[c]) of a block z - max."""
        if self.class_weight is not None:
            gap = times(self.class_weight, gap)
        return gap.sum(1, keepdim=True).neg_()


def _occurs(value, integers):
    if not integers.numel():
        return False
    low, high = integers.aminmax()
    return int(low) <= value <= int(high) and bool((integers == value).any())


def _reduced(losses, mass, reduction):
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / mass


def soft_ce_expression(logits, weights, classes, class_weight, ignore_index, label_smoothing, reduction):
    """The loss on K-hot targets as differentiable torch operations."""
    z = _flat(logits).to(accumulator(logits.dtype))
    target = Components(classes, weights, class_weight, ignore_index, label_smoothing, z, False, look=False)
    surprise = -torch.log_softmax(z, 1)
    value = surprise.gather(1, target.classes)
    value = value if target.w is None else target.w * _read(target.w, value)
    if label_smoothing > 0:
        w = target.class_weight
        every = surprise if w is None else w * _read(w, surprise)
        value = (1 - label_smoothing) * value + label_smoothing * every.mean(1, keepdim=True)
    losses = (target.a * _read(target.a, value)).sum(1, keepdim=True)
    losses = losses if target.bad is None else torch.where(target.bad, math.nan, losses)
    return _reduced(losses.view(logits.shape[0], *logits.shape[2:]), target.weighted.sum(), reduction)


def dense_ce_expression(logits, target, class_weight, ignore_index, label_smoothing, reduction):
    """The loss on target probabilities as differentiable torch operations."""
    C = logits.shape[1]
    z = _flat(logits).to(accumulator(logits.dtype))
    surprise = -torch.log_softmax(z, 1)
    kept = columns(torch.arange(C, device=logits.device) != ignore_index, z)
    u = _flat(target).to(z.dtype) * kept * (1 - label_smoothing) + label_smoothing / C
    u = u if class_weight is None else u * columns(class_weight, z)
    losses = (u * _read(u, surprise)).sum(1)
    return _reduced(losses.view(logits.shape[0], *logits.shape[2:]), losses.numel(), reduction)


def js_divergence_expression(sources, scale, reduction):
    """scale times the divergence of K sets of logits [N, C] as differentiable torch operations."""
    logs = torch.stack([source.to(accumulator(source.dtype)).log_softmax(1) for source in sources])
    masked = logs.isneginf()
    mixture = logs.masked_fill(masked.all(0), 0).logsumexp(0) - math.log(len(logs))
    terms = logs.exp() * (logs.masked_fill(masked, 0) - mixture)
    losses = terms.masked_fill(masked, 0).sum(2).mean(0) * scale
    return _reduced(losses, losses.numel(), reduction)


def hot_target(classes, weights, C, dtype):
    """(a K-hot target as dense rows [N, C, ...], which rows have a class out of range: [N, 1, ...])"""
    known = (classes >= 0) & (classes < C)
    a = component_weights(classes, weights, dtype)
    t = a.new_zeros(classes.shape[0], C, *classes.shape[2:]).scatter_add(1, torch.where(known, classes, 0), a)
    return t, ~known.all(1, keepdim=True)


def component_weights(classes, weights, dtype):
    """The weights of components [N, K, ...], each with its own."""
    if weights is None:
        return torch.ones(classes.shape, dtype=dtype, device=classes.device)
    return weights.to(dtype).reshape(*weights.shape, *[1] * (classes.dim() - weights.dim())).expand(classes.shape)


def smoothed(t, label_smoothing, off, threshold):
    """(1-e)*t + off, then 1 where that exceeds the threshold, if there is one, and 0 elsewhere."""
    t = (1 - label_smoothing) * t + off if label_smoothing > 0 else t
    return t if threshold is None else torch.where(t > threshold, 1.0, 0.0).to(t.dtype)


def sides(t, class_weight, pos_weight):
    """(weight of softplus(-z), weight of softplus(z)) for a target t."""
    positive, negative = t, 1 - t
    if pos_weight is not None:
        p = columns(pos_weight, t)
        positive = p * _read(p, positive)
    if class_weight is not None:
        w = columns(class_weight, t)
        positive, negative = w * _read(w, positive), w * _read(w, negative)
    return positive, negative


def soft_bce_expression(
    logits, weights, classes, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction
):
    """The sigmoid loss on K-hot targets as differentiable torch operations."""
    C = logits.shape[1]
    t, bad = hot_target(classes, weights, C, accumulator(logits.dtype))
    t = smoothed(t, label_smoothing, label_smoothing / C, threshold)
    losses = torch.where(bad.squeeze(1), math.nan, _bce_rows(logits, t, class_weight, pos_weight, class_reduction))
    return _reduced(losses, losses.numel(), reduction)


def dense_bce_expression(logits, target, class_weight, pos_weight, label_smoothing, threshold, class_reduction, reduction):
    """The sigmoid loss on dense targets as differentiable torch operations."""
    t = smoothed(target.to(accumulator(logits.dtype)), label_smoothing, label_smoothing / 2, threshold)
    losses = _bce_rows(logits, t, class_weight, pos_weight, class_reduction)
    return _reduced(losses, losses.numel(), reduction)


def _bce_rows(logits, t, class_weight, pos_weight, class_reduction):
    positive, negative = sides(t, class_weight, pos_weight)
    z = _read((positive != 0) | (negative != 0), logits.to(t.dtype))
    losses = positive * _read(positive, -logsigmoid(z)) + negative * _read(negative, -logsigmoid(-z))
    return losses.mean(1) if class_reduction == "mean" else losses.sum(1)
