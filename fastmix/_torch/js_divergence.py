"""Divergences of K sets of logits [N, C]."""

from functools import partial

import torch

from .._expressions import accumulator
from . import sizes
from ._blocks import row_blocks
from ._losses import scale_


def js_divergence_fwd(sources, scale, reduction, need, form_gradient):
    first = sources[0]
    losses = torch.empty(len(first), dtype=accumulator(first.dtype), device=first.device)
    gradients = _js_empty(sources, need) if form_gradient else None
    save = need if isinstance(need, bool) else any(need)
    stats = losses.new_empty((3, len(sources), len(first))) if save else None
    factor = scale / max(len(first), 1) if reduction == "mean" else scale
    for rows in _js_blocks(sources):
        losses[rows] = _js_block(sources, rows, gradients, factor, stats)
    losses *= scale
    loss = losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()
    return loss, stats, gradients


def js_divergence_bwd(sources, scale, reduction, stats, upstream, formed, need):
    """As of the other losses (_losses.with_upstream): narrow gradients are formed anew where upstream is not 1, others scaled."""
    first = sources[0]
    factor = scale / max(len(first), 1) if reduction == "mean" else scale
    dtype = accumulator(first.dtype)
    one = upstream.is_cpu and upstream.dim() == 0 and float(upstream) == 1
    wide = first.dtype == dtype
    upstream = upstream.to(dtype).expand(len(first)).unsqueeze(1)
    gradients = formed
    if formed is None or not (wide or one):
        gradients = _js_empty(sources, need) if formed is None else formed
        for rows in _js_blocks(sources):
            _js_block(sources, rows, gradients, factor if wide or one else upstream[rows] * factor)
    if wide and not one:
        for gradient in gradients:
            if gradient is not None:
                scale_(gradient, upstream)
    return gradients


def _js_blocks(sources):
    return row_blocks(len(sources[0]), len(sources) * sources[0][:1].numel() * 4, sources[0].device, sizes.JS_BLOCK_BYTES)


def _js_empty(sources, need):
    """Memory for the gradients: stacked for a stacked tensor, else a tuple with Nones where they are not needed."""
    if isinstance(need, bool):
        return torch.empty(sources.shape, dtype=sources.dtype, device=sources.device)
    make = partial(torch.empty, sources[0].shape, dtype=sources[0].dtype, device=sources[0].device)
    return tuple(make() if needed else None for needed in need)


def _js_block(sources, rows, gradients, factor, stats=None):
    """Losses of some rows, and their gradients times factor (a number, or [n, 1]), if there is a place for them."""
    z = torch.stack([source[rows] for source in sources]).to(accumulator(sources[0].dtype))  # [K, n, C]
    top = z.amax(2, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(2, keepdim=True)
    p /= total
    m = p.mean(0)
    r = (p / m.clamp_min(torch.finfo(m.dtype).tiny)).masked_fill_(m == 0, 1)
    alike = (r.amin(2) > 0.8).logical_and_(r.amax(2) < 1.25).all(0)  # rows whose sets are
    at = alike.nonzero().view(-1) if alike.is_cpu else None
    if at is not None and len(at) == len(alike):
        losses, p, r, mean = _js_alike(z, top, total, m)
    else:
        r = r.log_().clamp_min_(-1e4)  # where p is 0: p*r is 0 as well
        mean = (p * r).sum(2, keepdim=True)
        losses = mean.mean(0).squeeze(1)
        if at is None:
            close = alike.view(-1, 1)
            exact = _js_alike(z, top, total, m)
            losses, p, r, mean = (
                torch.where(which, *pair)
                for which, *pair in zip((alike, close, close, close), exact, (losses, p, r, mean), strict=True)
            )
        elif len(at):
            losses[at], p[:, at], r[:, at], mean[:, at] = _js_alike(z[:, at], top[:, at], total[:, at], m[at])
    if stats is not None:
        stats[:, :, rows] = torch.stack((top, total, mean)).squeeze(3)
    if gradients is not None:
        r.sub_(mean).mul_(p)
        factor = factor / len(r)
        for gradient, sink in zip(r, gradients, strict=True):
            if sink is not None:
                _scaled_into(sink[rows], gradient, factor)
    return losses


def _js_alike(z, top, total, m):
    """(losses, p, log p - log m, its mean under p) of rows whose sets are nearly equal, without a difference of numbers near 1:
    their logits are compared with the first set's, with the bits that z - top rounds off, and of the sums over classes it takes
    no more than a factor."""
    y = z - top
    back = y - z
    lost = (z - (y - back)) - (top + back)
    v = (y - y[0]).add_(lost.sub_(lost[0].clone())).expm1_()
    v.addcmul_(v + 1, total.amax(0) / total - 1).masked_fill_(m == 0, 0)
    mean = v.mean(0)
    u = v.sub_(mean).div_(mean.add_(1))  # p/m - 1
    p = torch.addcmul(m, m, u)
    r, excess = _js_logs(u)
    return excess.mul_(m).sum(2).mean(0), p, r, (p * r).sum(2, keepdim=True)


def _js_logs(u):
    """(log(1+u), (1+u)*log(1+u) - u) of small u by the series of 2*atanh(s), s = u/(2 + u): nothing cancels."""
    s = u / (u + 2)
    square = s * s
    terms = 9 if u.dtype == torch.float64 else 4
    P = torch.full_like(s, 1 / (2 * terms + 1))
    for n in range(terms - 1, 0, -1):
        P.mul_(square).add_(1 / (2 * n + 1))
    return (square * P).add_(1).mul_(s).mul_(2), s.add(square).mul_(P).add_(1).mul_(s).mul_(u)


def _scaled_into(sink, gradient, factor):
    if isinstance(factor, float) or (factor.is_cpu and bool(torch.isfinite(factor).all())):
        gradient = gradient.mul_(factor)
    else:
        gradient = (gradient * factor).masked_fill_(gradient == 0, 0)
    sink.copy_(gradient)


from .._expressions import js_divergence_expression as js_divergence_formula  # noqa: E402, F401
