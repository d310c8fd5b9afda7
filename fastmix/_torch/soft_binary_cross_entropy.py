"""The sigmoid loss. A K-hot target is one number for all classes but a few: those are computed by themselves, and put in their
places.
"""

import math

import torch

from .._expressions import accumulator, columns, component_weights, smoothed, times
from . import sizes
from ._losses import LOG2_E, Mixed, carefully, class_blocks, cut, join, reduced, rows_of, view, with_upstream


def _softplus_rest(z):
    """log(1 + exp(-|z|)), what softplus(z) has beyond max(z, 0), as a new tensor."""
    return z.abs().mul_(-LOG2_E).exp2_().log1p_()


def _sigmoid_parts(z, positive, negative, weighted):
    """(loss, gradient) for weights of softplus(-z) and softplus(z), whose sum is 1 unless they are `weighted`; to the last bit
    also where they are small."""
    size, above = z.abs(), z > 0
    q = size.neg().exp_()
    u = torch.where(above, negative, positive)
    least, rest = q / (1 + q), q.log1p_()
    if weighted:
        both = positive + negative
        least, rest = times(both, least), times(both, rest)
    gap = u - least
    return times(u, size) + rest, torch.where(above, gap, -gap)


def _weighted_sides(t, w, p, product):
    """The weights of softplus(-z) and softplus(z) for a target t."""
    positive, negative = t if p is None else product(p, t), 1 - t
    return (positive, negative) if w is None else (product(w, positive), product(w, negative))


class _Sides:
    """These weights against blocks of logits, for a target t of theirs or one number. What is 0 or 1 throughout is None:
    `positive` where t is 0, `both`, their sum, without weights of classes."""

    def __init__(self, t, class_weight, pos_weight, careful):
        w, p = (None if weight is None else columns(weight, t) for weight in (class_weight, pos_weight))
        self.positive, self.negative = _weighted_sides(t, w, p, times if careful else torch.mul)
        self.both = None if w is None and p is None else self.positive + self.negative
        self.careful = careful
        if t.numel() == 1 and t.is_cpu and float(t) == 0:
            self.positive, self.negative = None, self.both

    def loss(self, z, room, but=None):
        """A block's loss by row, `but` some classes, with room for one number each."""

        def rest(values):
            return values if but is None else values.scatter_(1, but, 0)

        q = rest(torch.abs(z, out=room).mul_(-LOG2_E).exp2_())
        total = _log1p_sum(q) if self.both is None else self._times(self.both, q.log1p_()).sum(1, keepdim=True)
        total += rest(self._times(self.negative, torch.clamp(z, min=0, out=room))).sum(1, keepdim=True)
        if self.positive is not None:
            total += rest(self._times(self.positive, torch.clamp(z, max=0, out=room).neg_())).sum(1, keepdim=True)
        return total

    def gradient(self, z, scale, out):
        grad = self._times(self.both, torch.sigmoid(z, out=out))
        if self.positive is not None:
            grad -= self.positive
        return grad.mul_(scale)

    def _times(self, weight, values):
        """In place."""
        if weight is None:
            return values
        values *= weight
        return values.masked_fill_(weight == 0, 0) if self.careful else values


def _log1p_sum(q):
    """The sum over classes of log(1+q), for q in [0, 1] that are written over. (1+a)(1+b) = 1 + (a + a*b + b) rounds no small
    number off, and saves a logarithm."""
    for _ in range(3):
        half = q.shape[1] // 2
        low, high = q[:, :half], q[:, q.shape[1] - half :]
        low.addcmul_(low, high).add_(high)
        q = q[:, : q.shape[1] - half]
    return q.log1p_().sum(1, keepdim=True)


class _HotBce:
    """A K-hot target: `rest`, the weights of classes that it does not name; `picks`, those it names, in range, with their
    gradient; `loss`, theirs by row; `bad`, rows with a class out of range (None on the CPU)."""

    def __init__(self, z, classes, weights, class_weight, pos_weight, label_smoothing, threshold, careful):
        N, C, *inner = z.shape
        dtype, options = accumulator(z.dtype), (label_smoothing, label_smoothing / C, threshold)
        a = component_weights(classes, weights, dtype).reshape(N, classes.shape[1], *inner)
        classes = classes.reshape(a.shape)
        self.picks, self.bad = classes, None
        if not z.is_cpu:
            known = (classes >= 0) & (classes < C)
            self.picks, self.bad = torch.where(known, classes, 0), ~known.all(1, keepdim=True)
        times_named = 1
        if a.shape[1] > 1:  # a class that is named again counts once, with the sum of its weights
            own, a, times_named = a, torch.zeros_like(a), torch.zeros_like(a)
            for named, weight in zip(self.picks.split(1, 1), own.split(1, 1), strict=True):
                same = self.picks == named
                a += torch.where(same, weight, 0)
                times_named += same
        self.z = z.gather(1, self.picks).to(dtype)
        self.weights = [None if w is None else w[self.picks] for w in (class_weight, pos_weight)]
        weights = _weighted_sides(smoothed(a, *options), *self.weights, times)
        weighted = class_weight is not None or pos_weight is not None
        losses, self.gradient = _sigmoid_parts(self.z, *weights, weighted)
        self.loss = (losses / times_named).sum(1, keepdim=True)
        none = torch.zeros([1] * z.dim(), dtype=dtype, device=z.device)
        self.rest = _Sides(smoothed(none, *options), class_weight, pos_weight, careful)

    def slope(self, label_smoothing, scale):
        slope = _bce_slope(self.z, *self.weights) * ((1 - label_smoothing) * scale)
        return slope if self.bad is None else slope.masked_fill_(self.bad, math.nan)


def _room_for(block, sink):
    """Memory for a number of each logit: where the gradient will be, if that may hold it."""
    return sink if sink is not None and sink.dtype == block.dtype else torch.empty_like(block)


def _bce_slope(z, w, p):
    """w*(p*softplus(-z) - softplus(z)): what the loss of a class gains by its target."""
    slope = -z
    if p is not None:
        rest = _softplus_rest(z)
        slope = times(p, slope.clamp_(min=0) + rest) - (z.clamp(min=0) + rest)
    return slope if w is None else times(w, slope)


def _bce_scale(z, class_reduction, reduction):
    """One over the number of terms in the means."""
    rows = z.numel() // z.shape[1]
    return 1 / max((z.shape[1] if class_reduction == "mean" else 1) * (rows if reduction == "mean" else 1), 1)


def _bce_loss(rows, reduction, z, logits):
    """Losses of rows, over the divisor of a mean, to the loss."""
    if reduction == "mean" and not z.numel():
        return rows.new_full((), math.nan)
    return reduced(rows, 1, reduction, logits)


def soft_bce_fwd(logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient):
    return carefully(_soft_bce_fwd, logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient)


def _soft_bce_fwd(careful, logits, weights, classes, class_weight, pos_weight, options, need_dweights, form_gradient):
    label_smoothing, threshold, class_reduction, reduction = options
    z, logits = view(logits)
    target = _HotBce(z, classes, weights, class_weight, pos_weight, label_smoothing, threshold, careful)
    dtype, scale = accumulator(z.dtype), _bce_scale(z, class_reduction, reduction)
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    rows = []
    for at in class_blocks(z, sizes.BINARY_BLOCK_BYTES):
        block, sink, picks, gradient = cut(at, z, grad, target.picks, target.gradient)
        block = block.to(dtype)
        rows.append(target.rest.loss(block, _room_for(block, sink), picks))
        if form_gradient:
            _hot_gradient(target, block, picks, gradient, scale, sink)
    rows = (join(rows, z) + target.loss) * scale
    if target.bad is not None:
        rows.masked_fill_(target.bad, math.nan)
        if form_gradient:
            grad.masked_fill_(target.bad, math.nan)
    slope = target.slope(label_smoothing, scale).reshape(classes.shape) if need_dweights else None
    return _bce_loss(rows, reduction, z, logits), slope, dlogits


def _hot_gradient(target, block, picks, gradient, scale, sink, upstream=None):
    """A block's gradient into its place."""
    grad = target.rest.gradient(block, scale, sink if sink.dtype == block.dtype else None)
    grad.scatter_(1, picks, gradient * scale)
    if upstream is not None:
        grad = (grad * upstream).masked_fill_(grad == 0, 0)
    if grad is not sink:
        sink.copy_(grad)


def soft_bce_bwd(logits, weights, classes, class_weight, pos_weight, options, upstream, formed):
    label_smoothing, threshold, class_reduction, reduction = options

    def form(upstream):
        z, like = view(logits)
        target = _HotBce(z, classes, weights, class_weight, pos_weight, label_smoothing, threshold, True)
        scale = _bce_scale(z, class_reduction, reduction)
        dlogits = torch.empty_like(like)
        grad, upstream = dlogits.view(z.shape), _upstream_of_rows(upstream, z)
        for at in class_blocks(z, sizes.BINARY_BLOCK_BYTES):
            block, sink, up, picks, gradient = cut(at, z, grad, upstream, target.picks, target.gradient)
            _hot_gradient(target, block.to(up.dtype), picks, gradient, scale, sink, up)
        if target.bad is not None:
            grad.masked_fill_(target.bad, math.nan)
        return dlogits

    return with_upstream(form, logits, upstream, formed)


def _upstream_of_rows(upstream, z):
    """An upstream gradient [] or [rows] as a number per row of z."""
    shape = z.shape[0], 1, *z.shape[2:]
    return upstream.to(accumulator(z.dtype)).expand(math.prod(shape)).view(shape)


def _scale_of(t, z, scale):
    """The scale of a dense target's rows: a number, or of MixedRows one for each row, NaN where it is wrong."""
    if not isinstance(t, Mixed):
        return scale
    scale = torch.full_like(t.lam, scale).masked_fill_(t.lam.isnan(), math.nan)
    return scale.view(-1, *[1] * (z.dim() - 1)).expand(-1, 1, *z.shape[2:])


def dense_bce_fwd(logits, target, lam, index, class_weight, pos_weight, options, form_gradient):
    return carefully(_dense_bce_fwd, logits, target, lam, index, class_weight, pos_weight, options, form_gradient)


def _dense_bce_fwd(careful, logits, target, lam, index, class_weight, pos_weight, options, form_gradient):
    label_smoothing, threshold, class_reduction, reduction = options
    z, logits = view(logits)
    t, dtype = rows_of(target, z, lam, index), accumulator(z.dtype)
    scale = _scale_of(t, z, _bce_scale(z, class_reduction, reduction))
    dlogits = torch.empty_like(logits) if form_gradient else None
    grad = dlogits.view(z.shape) if form_gradient else None
    rows = []
    for at in class_blocks(z, sizes.BINARY_BLOCK_BYTES):
        block, sink = cut(at, z, grad)
        block = block.to(dtype)
        weights = smoothed(t[at].to(dtype), label_smoothing, label_smoothing / 2, threshold)
        weights = _Sides(weights, class_weight, pos_weight, careful)
        rows.append(weights.loss(block, _room_for(block, sink)))
        if form_gradient:
            row_scale = scale if isinstance(scale, float) else scale[at]
            formed = weights.gradient(block, row_scale, sink if z.dtype == dtype else None)
            if formed is not sink:
                sink.copy_(formed)
    return _bce_loss(join(rows, z) * scale, reduction, z, logits), dlogits


def dense_bce_bwd(
    logits, target, lam, index, class_weight, pos_weight, options, upstream, formed, need_dlogits, need_dtarget
):  # fmt: skip
    label_smoothing, threshold, class_reduction, reduction = options
    z, like = view(logits)
    t, dtype, scale = rows_of(target, z, lam, index), accumulator(z.dtype), _bce_scale(z, class_reduction, reduction)

    def form(upstream):
        dlogits = torch.empty_like(like)
        grad, upstream = dlogits.view(z.shape), _upstream_of_rows(upstream, z)
        row_scale = _scale_of(t, z, scale)
        for at in class_blocks(z, sizes.BINARY_BLOCK_BYTES):
            block, sink, up = cut(at, z, grad, upstream)
            weights = smoothed(t[at].to(dtype), label_smoothing, label_smoothing / 2, threshold)
            here = row_scale if isinstance(row_scale, float) else row_scale[at]
            formed = _Sides(weights, class_weight, pos_weight, True).gradient(block.to(dtype), here, None)
            sink.copy_((formed * up).masked_fill_(formed == 0, 0))
        return dlogits

    def form_dtarget(upstream):
        dtarget = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        upstream = _upstream_of_rows(upstream, z) * ((1 - label_smoothing) * scale)
        w, p = (None if weight is None else columns(weight, z) for weight in (class_weight, pos_weight))
        for at in class_blocks(z, sizes.BINARY_BLOCK_BYTES):
            block, sink, up = cut(at, z, dtarget.view(z.shape), upstream)
            sink.copy_(_bce_slope(block.to(dtype), w, p) * up)
        return dtarget

    dlogits = with_upstream(form, logits, upstream, formed) if need_dlogits else None
    return dlogits, form_dtarget(upstream) if need_dtarget else None


from .._expressions import dense_bce_expression, soft_bce_expression  # noqa: E402


def soft_binary_cross_entropy_formula(logits, weights, classes, class_weight, pos_weight, options):
    return soft_bce_expression(logits, weights, classes, class_weight, pos_weight, *options)


def dense_binary_cross_entropy_formula(logits, target, class_weight, pos_weight, options):
    return dense_bce_expression(logits, target, class_weight, pos_weight, *options)
