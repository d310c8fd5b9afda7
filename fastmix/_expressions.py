"""The formulas as plain differentiable torch operations on any device.

The torch backend is built on them, and they are what runs under function transforms (torch.func, forward-mode AD) and under
second derivatives, where a kernel has no derivative to give.
"""

import math

import torch


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
    return weights if box is None else torch.where(box_mask(box, x.shape), torch.zeros((), dtype=lam.dtype), weights)


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
    zeros = torch.zeros_like(back)
    # index_put sums in sorted order on accelerators, index_add in the order of the index on the CPU: both repeatable
    back = zeros.index_add(0, index, back) if g.is_cpu else zeros.index_put((index,), back, accumulate=True)
    return (own * _read(own, wide) + back).to(g.dtype)


def mix_dlam_expression(g, x, lam, index, box):
    """<g, x - x[index]> per row outside the box, as differentiable torch operations."""
    index, known = safe_index(index, x.shape[0])
    wide = x.to(lam.dtype)
    product = g.to(lam.dtype) * (wide - wide[index])
    if box is not None:
        product = product.masked_fill(box_mask(box, x.shape), 0)
    return torch.where(known, product.flatten(1).sum(1) if x.dim() > 1 else product, math.nan)


def times(a, b):
    """a*b, where a weight a of 0 means that b is not looked at."""
    return (a * b).masked_fill_(a == 0, 0)


def columns(class_weight):
    """Class weights [C] against [N, C, I]."""
    return class_weight.view(1, -1, 1)


class Components:
    """A K-hot target as [N, K, I] tensors, and what it asks of its rows.

    classes, in range; ignored, which components are (None: none of them); a, their weights, 0 where ignored; w, the weights of
    their classes (None: 1); weighted = a*w; smooth = (e/C)*sum of a; learn = (1-e)*sum of a*w + smooth*sum of w. `idle` are
    rows whose a are all 0 and `bad` those with a class out of range; None where there is none, which is looked up only if `look`
    (on the CPU, where classes have been checked).
    """

    def __init__(self, classes, weights, class_weight, ignore_index, label_smoothing, C, dtype, look):
        inner = math.prod(classes.shape[2:])
        self.classes = classes = classes.reshape(*classes.shape[:2], inner)
        self.ignored, self.bad, self.idle = classes == ignore_index, None, None
        if look and not bool(self.ignored.any()):
            self.ignored = None
        else:
            known = (classes >= 0) & (classes < C)
            self.classes = torch.where(known & ~self.ignored, classes, 0)
            self.bad = None if look else (~known & ~self.ignored).any(1, keepdim=True)
        if weights is None:
            self.a = torch.ones((), dtype=dtype, device=classes.device).expand(classes.shape)
        else:
            per_pixel = math.prod(weights.shape[2:])
            self.a = weights.reshape(*weights.shape[:2], per_pixel).to(dtype).expand(classes.shape)
        if self.ignored is not None:
            self.a = self.a.masked_fill(self.ignored, 0)
        zero = self.a == 0
        if not look or bool(zero.any()):
            self.idle = zero.all(1, keepdim=True)
        self.w = None if class_weight is None else class_weight[self.classes]
        self.weighted = self.a if self.w is None else self.a * self.w
        self.learn = self.weighted.sum(1, keepdim=True)
        self.smoothing = label_smoothing
        if label_smoothing > 0:
            self.class_weight = None if class_weight is None else columns(class_weight)
            self.class_mass = C if class_weight is None else class_weight.sum()
            self.smooth = self.a.sum(1, keepdim=True) * (label_smoothing / C)
            self.learn = (1 - label_smoothing) * self.learn + self.smooth * self.class_mass
        if self.bad is not None:
            self.learn = self.learn.masked_fill(self.bad, math.nan)

    def finish(self, softmax, scale, at):
        """A block's softmax, in place, to its gradient times scale [] or [n, 1, i]. Idle rows get 0 whatever the scale."""
        o, _, i = at
        learn = self.learn[o, :, i]
        if self.idle is None:
            softmax *= learn * scale
        else:
            idle = self.idle[o, :, i] if self.bad is None else self.idle[o, :, i] & ~self.bad[o, :, i]
            scale = scale.masked_fill(idle, 0)
            softmax.mul_(learn * scale).masked_fill_(idle, 0)
        if self.smoothing > 0:
            smooth = self.smooth[o, :, i] * scale
            softmax -= smooth if self.class_weight is None else smooth * self.class_weight
        return softmax.scatter_add_(1, self.classes[o, :, i], self.weighted[o, :, i] * (scale * (self.smoothing - 1)))

    def below(self, top, block):
        """sum over c of w[c]*(max - z[c]) of a block."""
        gap = top - block
        if self.class_weight is not None:
            gap = times(self.class_weight.expand_as(gap), gap)
        return gap.sum(1, keepdim=True)


def _reduced(losses, mass, reduction):
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / mass


def soft_ce_expression(logits, weights, classes, class_weight, ignore_index, label_smoothing, reduction):
    """The loss on K-hot targets as differentiable torch operations."""
    C = logits.shape[1]
    dtype = accumulator(logits.dtype)
    z = logits.to(dtype).reshape(logits.shape[0], C, math.prod(logits.shape[2:]))
    target = Components(classes, weights, class_weight, ignore_index, label_smoothing, C, dtype, False)
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
    dtype = accumulator(logits.dtype)
    z = logits.to(dtype).reshape(logits.shape[0], C, math.prod(logits.shape[2:]))
    surprise = -torch.log_softmax(z, 1)
    kept = torch.arange(C, device=logits.device).view(1, -1, 1) != ignore_index
    u = target.to(dtype).reshape(surprise.shape) * kept * (1 - label_smoothing) + label_smoothing / C
    u = u if class_weight is None else u * columns(class_weight)
    losses = (u * _read(u, surprise)).sum(1)
    return _reduced(losses.view(logits.shape[0], *logits.shape[2:]), losses.numel(), reduction)
