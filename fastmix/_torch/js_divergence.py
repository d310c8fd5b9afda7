"""js_divergence: loss[n] = scale*(1/K)*the sum over k of KL(p_k || m), p_k = softmax(sources[k][n]), m = the mean of the p_k.

On top the formula as plain differentiable torch operations, for any device and for function transforms. Below it the launchers,
which on the CPU work block by block, and give rows whose sets are nearly equal more exact differences.
"""

import math

import torch

from .._dtypes import accumulator
from . import sizes
from ._blocks import row_blocks
from ._losses import gradient_for, reduced, scale_


def js_divergence_formula(sources, scale, reduction):
    """Returns scale times the divergence of K sets of logits [N, C]."""
    log_p = torch.stack([source.to(accumulator(source.dtype)).log_softmax(1) for source in sources])
    masked = log_p.isneginf()
    log_m = log_p.masked_fill(masked.all(0), 0).logsumexp(0) - math.log(len(log_p))
    terms = log_p.exp() * (log_p.masked_fill(masked, 0) - log_m)
    losses = terms.masked_fill(masked, 0).sum(2).mean(0) * scale
    return reduced(losses, losses.numel(), reduction)


def js_divergence_fwd(sources, scale, reduction, need, form_gradient):
    """Returns (loss, stats or None, gradients to the sets that need one or None).

    The stats [3, K, N] are each row's row_max, exp_sum and KL(p_k || m).
    """
    first = sources[0]
    losses = torch.empty(len(first), dtype=accumulator(first.dtype), device=first.device)
    gradients = _empty_gradients(sources, need) if form_gradient else None
    keep_stats = need if isinstance(need, bool) else any(need)
    stats = losses.new_empty((3, len(sources), len(first))) if keep_stats else None
    factor = scale / max(len(first), 1) if reduction == "mean" else scale
    for rows in _source_blocks(sources):
        z = _stacked_rows(sources, rows)
        row_max = z.amax(2, keepdim=True)
        exps = (z - row_max).exp_()
        exp_sum = exps.sum(2, keepdim=True)
        losses[rows], p, log_ratio, kl = _divergence(z, row_max, exps, exp_sum)
        if stats is not None:
            stats[:, :, rows] = torch.stack((row_max, exp_sum, kl)).squeeze(3)
        if gradients is not None:
            _write_gradients(gradients, rows, p, log_ratio, kl, factor)
    losses *= scale
    return reduced(losses, len(losses), reduction), stats, gradients


def js_divergence_bwd(sources, scale, reduction, stats, grad_output, cached_grad, need):
    """Returns the gradients to the sets that need one, stacked if `need` is a bool."""
    first = sources[0]
    scale = scale / max(len(first), 1) if reduction == "mean" else scale
    gradients = _empty_gradients(sources, need) if cached_grad is None else cached_grad

    def form(grad_output):
        for rows in _source_blocks(sources):
            z = _stacked_rows(sources, rows)
            row_max, exp_sum, kl = stats[:, :, rows].unsqueeze(3)
            _, p, log_ratio, kl = _divergence(z, row_max, (z - row_max).exp_(), exp_sum, kl)
            factor = scale if grad_output is None else grad_output[rows] * scale
            _write_gradients(gradients, rows, p, log_ratio, kl, factor)
        return tuple(gradients)

    gradient_for(form, first, grad_output, None if cached_grad is None else tuple(cached_grad))
    return gradients


def _source_blocks(sources):
    """Returns slices of rows whose logits of all sets are a block."""
    row_bytes = len(sources) * sources[0][:1].numel() * 4
    return row_blocks(len(sources[0]), row_bytes, sources[0].device, sizes.JS_BLOCK_BYTES)


def _stacked_rows(sources, rows):
    """Returns some rows of all sets, [K, n, C], in the dtype that they are computed in."""
    return torch.stack([source[rows] for source in sources]).to(accumulator(sources[0].dtype))


def _empty_gradients(sources, need):
    """Returns memory for the gradients: stacked if `need` is a bool, else a tuple with None for sets that need none."""
    options = {"dtype": sources[0].dtype, "device": sources[0].device}
    if isinstance(need, bool):
        return torch.empty(sources.shape, **options)
    return tuple(torch.empty(sources[0].shape, **options) if needed else None for needed in need)


def _write_gradients(gradients, rows, p, log_ratio, kl, factor):
    """Writes p*(log_ratio - kl)/K times the factor, a number or one for each row [n, 1]."""
    factor = factor / len(p)
    for gradient, out in zip(log_ratio.sub_(kl).mul_(p), gradients, strict=True):
        if out is not None:
            out[rows].copy_(scale_(gradient, factor))


def _divergence(z, row_max, exps, exp_sum, kl=None):
    """Returns (losses [n], p, log_ratio = log p - log m, kl = its mean under p [K, n, 1]) of a block z [K, n, C].

    `exps` are exp(z - row_max), and are written. `kl` is what the forward stored, for a backward.
    """
    p = exps.div_(exp_sum)
    m = p.mean(0)
    ratio = (p / m.clamp_min(torch.finfo(m.dtype).tiny)).masked_fill_(m == 0, 1)
    near = (ratio.amin(2) > 0.8).logical_and_(ratio.amax(2) < 1.25).all(0)  # rows whose sets are nearly equal
    at = near.nonzero().view(-1) if near.is_cpu else None
    if at is not None and len(at) == len(near):
        return _near_divergence(z, row_max, exp_sum, m, kl)
    log_ratio = ratio.log_().clamp_min_(-1e4)  # finite where p is 0, so that p*log_ratio is 0 there
    far_kl = (p * log_ratio).sum(2, keepdim=True) if kl is None else kl
    losses = far_kl.mean(0).squeeze(1)
    if at is None:  # other devices are not waited for
        far_terms, near_terms = (losses, p, log_ratio, far_kl), _near_divergence(z, row_max, exp_sum, m, kl)
        masks = near, *[near.view(-1, 1)] * 3
        return tuple(torch.where(*terms) for terms in zip(masks, near_terms, far_terms, strict=True))
    if len(at):
        near_kl = None if kl is None else kl[:, at]
        near_terms = _near_divergence(z[:, at], row_max[:, at], exp_sum[:, at], m[at], near_kl)
        losses[at], p[:, at], log_ratio[:, at], near_kl = near_terms
        if kl is None:
            far_kl[:, at] = near_kl
    return losses, p, log_ratio, far_kl


def _near_divergence(z, row_max, exp_sum, m, kl=None):
    """Returns the same of rows whose sets are nearly equal, without a difference of numbers near 1.

    Their logits are compared with the first set's, with the bits that z - row_max rounds off, and the sums over classes give no
    more than a factor.
    """
    shifted = z - row_max
    back = shifted - z
    rounded_off = (z - (shifted - back)) - (row_max + back)
    v = (shifted - shifted[0]).add_(rounded_off.sub_(rounded_off[0].clone())).expm1_()
    v.addcmul_(v + 1, exp_sum.amax(0) / exp_sum - 1).masked_fill_(m == 0, 0)
    mean = v.mean(0)
    u = v.sub_(mean).div_(mean.add_(1))  # p/m - 1
    p = torch.addcmul(m, m, u)
    log_ratio, excess = _log_series(u)
    losses = excess.mul_(m).sum(2).mean(0)
    return losses, p, log_ratio, (p * log_ratio).sum(2, keepdim=True) if kl is None else kl


def _log_series(u):
    """Returns (log(1+u), (1+u)*log(1+u) - u) of small u by the series of 2*atanh(s), s = u/(2 + u): nothing cancels."""
    s = u / (u + 2)
    square = s * s
    terms = 9 if u.dtype == torch.float64 else 4
    P = torch.full_like(s, 1 / (2 * terms + 1))
    for n in range(terms - 1, 0, -1):
        P.mul_(square).add_(1 / (2 * n + 1))
    return (square * P).add_(1).mul_(s).mul_(2), s.add(square).mul_(P).add_(1).mul_(s).mul_(u)
