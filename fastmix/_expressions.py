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
    return torch.where(known, product.sum(list(range(1, x.dim()))) if x.dim() > 1 else product, math.nan)


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
            a = a if a.dim() == classes.dim() else a.unsqueeze(2).expand(classes.shape)
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
        """(learn, hard, smooth) of the gradient learn*softmax(z) - hard at the classes - smooth*w, over mass [] or None (1), times
        scale by row or None (1). hard = (1-e)*a*w, smooth = (e/C)*sum of a (None: 0), learn = sum of hard + smooth*sum of w."""
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
