"""The public ops: document, check, apply."""

from collections.abc import Callable, Sequence

import torch

from . import _check, _expressions, _ops
from .autograd import (
    ConvexCombinationFunction,
    DenseBinaryCrossEntropyFunction,
    DenseCrossEntropyFunction,
    JSDivergenceFunction,
    MixFunction,
    MixMaskedFunction,
    SoftBinaryCrossEntropyFunction,
    SoftCrossEntropyFunction,
)
from .autograd.convex_combination import convex_combination as _convex_combination
from .autograd.dense_ce import dense_cross_entropy as _dense_cross_entropy
from .autograd.js_divergence import js_divergence as _js_divergence
from .autograd.mix import mix as _mix
from .autograd.mix_masked import mix_masked as _mix_masked
from .autograd.soft_bce import dense_binary_cross_entropy as _dense_binary_cross_entropy
from .autograd.soft_bce import soft_binary_cross_entropy as _soft_binary_cross_entropy
from .autograd.soft_ce import soft_cross_entropy as _soft_cross_entropy
from .targets import MixedRows, SoftTarget

TARGETS = "a SoftTarget, MixedRows, class indices or probabilities"


def _differentiates(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def mix(
    x: torch.Tensor,
    lam: torch.Tensor | float,
    index: torch.Tensor,
    *,
    box: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixes every row with a partner row, in one pass: mixup, and CutMix with a box.

        out[i] = lam[i] * x[i] + (1 - lam[i]) * x[index[i]]      outside row i's box
        out[i] = x[index[i]]                                     inside it

    Exactly `x[i]` at lam 1 and `x[index[i]]` at lam 0: a weight of 0 means that the value is not looked at, so infinities and
    NaNs do not pass. Differentiable in `x` (twice and more) and in `lam`: `dL/dlam[i] = <g[i], x[i] - x[index[i]]>` outside the
    box, which reads both rows whatever their weights. Arithmetic is float32 (float64 for float64), rounded once.

    Args:
        x: `[N, ...]` float16, bfloat16, float32 or float64, of any layout; dense layouts (channels_last) are kept.
        lam: the weight of the row itself: a float, a 0-d tensor or `[N]`, float32 or float64. Values outside [0, 1] extrapolate.
            A device tensor never makes a compiled program recompile; a 0-d CPU tensor is moved without waiting.
        index: `[N]` int64, the partner of each row; any map into `[0, N)`.
        box: `[N, 4]` int, `(y0, x0, y1, x1)`, half open, over the last two dimensions; `[N, 2]` for intervals over the last
            one, `[N, 6]` for volumes over the last three. What lies outside the image is cut off; `y1 <= y0` is an empty box.
        out: where the result goes: a tensor of x's shape and dtype that shares no memory with x. Not where a gradient is
            required.

    Returns:
        The mixed batch, of x's shape, dtype and dense layout.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also an index out of range (on a GPU its row becomes NaN).

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899.

    >>> import torch, fastmix
    >>> x = torch.tensor([[0.0, 0.0], [8.0, 4.0]])
    >>> fastmix.mix(x, torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))
    tensor([[2., 1.],
            [8., 4.]])
    >>> fastmix.mix(x, 1.0, torch.tensor([1, 0]), box=torch.tensor([[0, 1], [1, 2]]))
    tensor([[8., 0.],
            [8., 0.]])
    """
    return mix_along(None, x, lam, index, box, out)


def mix_along(order, x, lam, index, box, out=None):
    """`mix`, for whoever knows an order of the rows in which a row's partner is next to it: a permutation [N], "flip" or
    "roll", which the kernels may walk along, or None. The result does not depend on it."""
    _check.float_tensor("x", x, 1, "[N, ...]")
    lam = _check.coefficient("lam", lam, x)
    _check.integer_tensor("index", index, x.shape[:1], x)
    _check.in_range("index", index, x.shape[0], "a partner")
    if box is not None:
        _check.box("box", box, x)
        box = box.to(torch.int64).contiguous()
    if out is not None:
        _check.output(out, x, lam, index, box)
        if _differentiates(x, lam, out):
            raise ValueError("out: expected None where x, lam or out requires grad (or use torch.no_grad()), got a tensor")
    return _mix_checked(x, lam, index, box, out, order)


def _mix_checked(x, lam, index, box=None, out=None, order=None):
    if _check.transformed():
        if _check.functional_transform():
            mixed = _expressions.mix_expression(x, lam, index, box)
        else:
            mixed = _ops.mix(x, lam, index, box, _ops.backend_name(x.device))
        return mixed if out is None else out.copy_(mixed)
    if _differentiates(x, lam):
        return MixFunction.apply(x, lam, index, box, order)
    mixed = _mix(x, lam, index, box, out, order)
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return mixed


def convex_combination(sources: torch.Tensor | Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of up to 16 batches with weights of each row's own, in one pass: n-way mixing, AugMix.

        out[n] = sum over k of weights[n, k] * sources[k][n]

    A weight of 0 means that the value is not looked at, so infinities and NaNs do not pass. Differentiable, twice and more, in
    the sources, `dL/dsources[k][n] = weights[n, k]*g[n]`, and in the weights, `dL/dweights[n, k] = <g[n], sources[k][n]>`,
    which reads every source. Only those gradients are formed that somebody needs. Arithmetic is float32 (float64 for float64),
    rounded once.

    Args:
        sources: one stacked tensor `[K, N, ...]`, or a sequence of K tensors `[N, ...]` of one shape and dtype, which is not
            stacked; K from 1 to 16. float16, bfloat16, float32 or float64, of any layout. A tensor may come twice.
        weights: `[N, K]` float32 or float64, of any value: they need not be positive, nor sum to 1.

    Returns:
        The combined batch `[N, ...]`, of the sources' dtype and, if it is dense, the first one's layout. Others are copied into
        that first.

    Raises:
        TypeError, ValueError: a wrong argument.

    Source: AugMix, arXiv:1912.02781, `(1 - m)*x + m * sum of w[k]*chain_k(x)`:

    >>> import torch, fastmix
    >>> x, chain = torch.rand(4, 3, 8, 8), lambda x: x.flip(3)  # yours: any random augmentation
    >>> weights = fastmix.dirichlet(len(x), 3, alpha=1.0, skip=1.0)
    >>> mixed = fastmix.convex_combination((x, chain(x), chain(x), chain(x)), weights)

    Mixing each row with two others, and its label with theirs:

    >>> x, y = torch.tensor([[0.0], [4.0], [8.0]]), torch.tensor([7, 8, 9])
    >>> first, second = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    >>> weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.25, 0.0, 0.75]])
    >>> fastmix.convex_combination((x, x[first], x[second]), weights).T
    tensor([[3., 4., 5.]])
    >>> target = fastmix.SoftTarget(torch.stack((y, y[first], y[second]), 1), weights)
    >>> target.argmax()
    tensor([7, 8, 8])
    """
    sources = _check.sources("sources", sources)
    weights = _check.source_weights("weights", weights, sources)
    stacked = isinstance(sources, torch.Tensor)
    tensors = (sources,) if stacked else sources
    if _check.transformed():
        if _check.functional_transform():
            return _expressions.convex_combination_expression(sources, weights)
        return _ops.convex_combination(list(tensors), weights, stacked, _ops.backend_name(weights.device))
    if _differentiates(weights, *tensors):
        return ConvexCombinationFunction.apply(weights, stacked, *tensors)
    return _convex_combination(sources, weights)


def mix_masked(
    x: torch.Tensor,
    mask: torch.Tensor,
    index: torch.Tensor,
    *,
    plan: torch.Tensor | None = None,
    partner_plan: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixes every row with a partner row by a mask of cells, and moves the blocks of either, in one pass: PuzzleMix, FMix,
    non-linear mixup.

        out[i, p] = m * x[i, own(p)] + (1 - m) * x[index[i], other(p)]        m = mask[i, cell of p]

    The mask's cells cut an image into h x w blocks of equal size; the mask is never spread over pixels. Without plans own(p) =
    other(p) = p. With them block b of the output comes from block `plan[i, b]` of the row and `partner_plan[i, b]` of its
    partner. One cell is `mix` with lam = mask; H x W of them are a weight for each element. Exactly the row's value at 1 and
    the partner's at 0: a weight of 0 means that the value is not looked at. Differentiable in `x` and `mask`, twice and more:
    `dL/dmask[i, cell]` is the sum over the cell's pixels and channels of `g * (own - partner)`, whatever the weights.
    Arithmetic is float32 (float64 for float64), rounded once.

    Args:
        x: `[N, ..., H, W]` float16, bfloat16, float32 or float64, of any layout; dense layouts (channels_last) are kept.
        mask: `[N, h, w]` float32 or float64, the weight of the row itself; h divides H, w divides W. Values outside [0, 1]
            extrapolate.
        index: `[N]` int64, the partner of each row; any map into `[0, N)`.
        plan: `[N, h*w]` int64 or int32, any map into `[0, h*w)`, blocks counted row by row; None: blocks stay.
        partner_plan: the same for the partner's blocks.

    Returns:
        The mixed batch, of x's shape, dtype and dense layout.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also an index or a plan out of range (on a GPU its row becomes NaN).

    Source: PuzzleMix, arXiv:2009.06962; FMix, arXiv:2002.12047; Nonlinear Mixup (Guo, AAAI 2020).

    >>> import torch, fastmix
    >>> x = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[40.0, 50.0, 60.0, 70.0]]])
    >>> mask = torch.tensor([[[1.0, 0.5]], [[1.0, 0.0]]])
    >>> fastmix.mix_masked(x, mask, torch.tensor([1, 0]))
    tensor([[[ 0.0000,  1.0000, 31.0000, 36.5000]],
    <BLANKLINE>
            [[40.0000, 50.0000,  2.0000,  3.0000]]])
    >>> fastmix.mix_masked(x, mask, torch.tensor([1, 0]), plan=torch.tensor([[1, 0], [0, 1]]))[0]
    tensor([[ 2.0000,  3.0000, 30.0000, 35.5000]])
    """
    _check.float_tensor("x", x, 3, "[N, ..., H, W]")
    mask = _check.cell_mask("mask", mask, x)
    _check.integer_tensor("index", index, x.shape[:1], x)
    cells = mask.shape[1] * mask.shape[2]
    for name, value in (("plan", plan), ("partner_plan", partner_plan)):
        if value is not None:
            _check.integer_tensor(name, value, (x.shape[0], cells), x, narrow=True)
    plan, partner_plan = (value if value is None else value.to(torch.int64) for value in (plan, partner_plan))
    _check.in_range("index", index, x.shape[0], "a partner")
    for name, value in (("plan", plan), ("partner_plan", partner_plan)):
        if value is not None:
            _check.in_range(name, value, cells, "a block")
    arguments = x, mask, index, plan, partner_plan
    if _check.transformed():
        if _check.functional_transform():
            return _expressions.mix_masked_expression(*arguments)
        return _ops.mix_masked(*arguments, _ops.backend_name(x.device))
    return (MixMaskedFunction.apply if _differentiates(x, mask) else _mix_masked)(*arguments)


def soft_cross_entropy(
    logits: torch.Tensor,
    target: SoftTarget | MixedRows | torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Softmax cross-entropy on soft targets, its gradient formed in the same pass over the logits.

    Per row, over the components (c_k, a_k) whose class is not `ignore_index`, with smoothing e and class weights w:

        loss = sum_k a_k * ((1-e)*w[c_k]*(lse - z[c_k]) + (e/C)*sum_c w[c]*(lse - z[c]))

    `"mean"` divides the sum by `D = sum of a_k*w[c_k]`. On class indices this is `torch.nn.functional.cross_entropy`. Dense
    rows follow its rule for probabilities, `t' = (1-e)*t + e/C` and a mean over N*d1*...  No dense target is made of a
    `SoftTarget`, the logits are never written, and the device is never waited for. Masked classes (logits of -inf) are fine
    where their target weight is 0. A mean over nothing is NaN, as in torch, but gradients are 0 there, also where torch has NaN.

    Args:
        logits: `[N, C]` or `[N, C, d1, ...]`, float16, bfloat16, float32 or float64.
        target: a `SoftTarget`; class indices `[N]` or `[N, d1, ...]` int64; `MixedRows`; or probabilities in the logits' shape.
        weight: `[C]`, a constant weight of each class.
        ignore_index: components of this class count for nothing (their row too, if it has no other); the class itself stays
            in the softmax. In dense rows its column counts as 0.
        label_smoothing: e, in [0, 1].
        reduction: `"mean"`, `"sum"` or `"none"` (`[N]` or `[N, d1, ...]`).

    Returns:
        The loss in float32 (float64 for float64). Differentiable once in `logits`, in `target.weights` (so in lambda: for a
        pair without class weights `-(1-e)*(z[ya] - z[yb])` per row), and in dense targets.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also a class out of range (on a GPU its row becomes NaN).
        RuntimeError: a second derivative, which begins with a backward under `create_graph=True`.

    Source: mixup, arXiv:1710.09412; label smoothing, arXiv:1512.00567.

    >>> import torch, fastmix
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> target = fastmix.SoftTarget(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    >>> fastmix.soft_cross_entropy(logits, target)
    tensor(0.8955)
    >>> fastmix.soft_cross_entropy(logits, target.dense(3), reduction="none")
    tensor([0.8395, 0.9514])
    """
    _check.float_tensor("logits", logits, 2, "[N, C] or [N, C, d1, ...]")
    if logits.shape[1] == 0:
        raise _check.wrong(ValueError, "logits", "at least one class", logits)
    _check.loss_options(ignore_index, label_smoothing, reduction)
    weight = _check.class_weight("weight", weight, logits)
    ignore_index, label_smoothing = int(ignore_index), float(label_smoothing)
    if isinstance(target, SoftTarget) or (isinstance(target, torch.Tensor) and not target.is_floating_point()):
        weights, classes = _components(logits, target, ignore_index)
        if logits.shape[1] == 1:
            label_smoothing = 0.0  # over one class it changes nothing, and rounds
        arguments = logits, weights, classes, weight, ignore_index, label_smoothing, reduction
        if _check.transformed():
            if _check.functional_transform():
                return _expressions.soft_ce_expression(*arguments)
            return _ops.soft_cross_entropy(*arguments, _differentiates(weights), _ops.backend_name(logits.device))[0]
        return (SoftCrossEntropyFunction.apply if _differentiates(logits, weights) else _soft_cross_entropy)(*arguments)
    rows, *mixing = _rows(logits, target)
    return _dense_loss(logits, rows, weight, ignore_index, label_smoothing, reduction, *mixing)


def _dense_loss(*arguments):
    """The loss on probabilities, or on the values of MixedRows with lam and index: where a function is transformed they have been
    mixed."""
    logits, target = arguments[:2]
    if _check.transformed():
        if _check.functional_transform():
            return _expressions.dense_ce_expression(*arguments[:-2])
        return _ops.dense_cross_entropy(*arguments, _ops.backend_name(logits.device))[0]
    return (DenseCrossEntropyFunction.apply if _differentiates(logits, target) else _dense_cross_entropy)(*arguments)


def soft_binary_cross_entropy(
    logits: torch.Tensor,
    target: SoftTarget | MixedRows | torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    pos_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    threshold: float | None = None,
    class_reduction: str = "mean",
    reduction: str = "mean",
) -> torch.Tensor:
    """Sigmoid (binary) cross-entropy on soft targets, its gradient formed in the same pass over the logits.

    With the target t of each class, smoothing e, class weights w and weights p of the positive term, the loss of a row is the
    mean (or sum) over its classes of

        w * (p * t' * softplus(-z) + (1 - t') * softplus(z)),      t' = (1-e)*t + e/C     SoftTarget, class indices
                                                                   t' = (1-e)*t + e/2     MixedRows, dense rows

    Here t is the sum of the weights that name the class: mixed with its like, a row is 1 there. With a threshold t' is then made 1
    where it exceeds it and 0 elsewhere. On dense rows without smoothing this is
    `torch.nn.functional.binary_cross_entropy_with_logits`; smoothing and threshold are those of timm's `Mixup` and
    `BinaryCrossEntropy` (`class_reduction="sum"` its `sum_classes`). No dense target is made of a `SoftTarget`, the logits are never
    written, and the device is never waited for. A side of a class whose weight is exactly 0 is not looked at: `+inf` where t' is
    1 and `-inf` where it is 0 cost nothing, and neither does NaN where w is 0. A mean over nothing is NaN, as in torch.

    Args:
        logits: `[N, C]` or `[N, C, d1, ...]`, float16, bfloat16, float32 or float64.
        target: a `SoftTarget`; class indices `[N]` or `[N, d1, ...]` int64; `MixedRows`; or rows in the logits' shape. Values
            outside [0, 1] extrapolate.
        weight: `[C]`, a constant weight of each class.
        pos_weight: `[C]`, a constant weight of each class's positive term.
        label_smoothing: e, in [0, 1].
        threshold: makes targets 0 or 1, after mixing and smoothing; compared in the precision of the loss.
        class_reduction: `"mean"` or `"sum"`, over the classes of a row.
        reduction: `"mean"`, `"sum"` or `"none"` (`[N]` or `[N, d1, ...]`), over rows.

    Returns:
        The loss in float32 (float64 for float64). Differentiable once in `logits`, in `target.weights` (so in lambda: for a
        pair `dl/dt_a - dl/dt_b` with `dl/dt = (1-e)*w*(p*softplus(-z) - softplus(z))`, over C for a mean), and in dense
        targets, those of `MixedRows` with their lambda. To a target with a threshold the gradient is 0.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also a class out of range (on a GPU its row becomes NaN). No class
            is ignored.
        RuntimeError: a second derivative, which begins with a backward under `create_graph=True`.

    Source: timm, arXiv:2110.00476 (ResNet strikes back); mixup, arXiv:1710.09412.

    >>> import torch, fastmix
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> target = fastmix.SoftTarget(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    >>> fastmix.soft_binary_cross_entropy(logits, target)
    tensor(0.7021)
    >>> fastmix.soft_binary_cross_entropy(logits, target, threshold=0.2, reduction="none")
    tensor([0.5044, 0.5665])

    The objective that mixup gives a GAN's discriminator d, `l(d(lam*x + (1-lam)*g(z)), lam)` (arXiv:1710.09412, section 3.7),
    on logits `[N, 1]`; the gradient reaches lambda too:

    >>> d, real, fake = torch.nn.Linear(8, 1), torch.rand(4, 8), torch.rand(4, 8)
    >>> lam = torch.rand(4, requires_grad=True)
    >>> mixed = fastmix.convex_combination((real, fake), torch.stack((lam, 1 - lam), 1))
    >>> fastmix.soft_binary_cross_entropy(d(mixed), lam.unsqueeze(1)).backward()
    >>> lam.grad.shape
    torch.Size([4])
    """
    _check.float_tensor("logits", logits, 2, "[N, C] or [N, C, d1, ...]")
    if logits.shape[1] == 0:
        raise _check.wrong(ValueError, "logits", "at least one class", logits)
    _check.binary_loss_options(label_smoothing, threshold, class_reduction, reduction)
    weight = _check.class_weight("weight", weight, logits)
    pos_weight = _check.class_weight("pos_weight", pos_weight, logits)
    threshold = None if threshold is None else float(threshold)
    options = weight, pos_weight, float(label_smoothing), threshold, class_reduction, reduction
    if isinstance(target, SoftTarget) or (isinstance(target, torch.Tensor) and not target.is_floating_point()):
        weights, classes = _components(logits, target, None)
        arguments = logits, weights, classes, *options
        if _check.transformed():
            if _check.functional_transform():
                return _expressions.soft_bce_expression(*arguments)
            need = threshold is None and _differentiates(weights)
            return _ops.soft_binary_cross_entropy(*arguments, need, _ops.backend_name(logits.device))[0]
        op = SoftBinaryCrossEntropyFunction.apply if _differentiates(logits, weights) else _soft_binary_cross_entropy
        return op(*arguments)
    rows, *mixing = _rows(logits, target)
    return _dense_binary_loss(logits, rows, *options, *mixing)


def _dense_binary_loss(*arguments):
    """The same, of the sigmoid loss."""
    logits, target = arguments[:2]
    if _check.transformed():
        if _check.functional_transform():
            return _expressions.dense_bce_expression(*arguments[:-2])
        return _ops.dense_binary_cross_entropy(*arguments, _ops.backend_name(logits.device))
    differentiates = _differentiates(logits, target)
    return (DenseBinaryCrossEntropyFunction.apply if differentiates else _dense_binary_cross_entropy)(*arguments)


def _components(logits, target, ignore_index):
    """(weights or None, classes [N, K, ...]) of a SoftTarget or class indices, checked against the logits."""
    inner = logits.shape[2:]
    if isinstance(target, SoftTarget):
        target._validate()  # it may have been changed, or mapped as a pytree
        weights, classes = target.weights, target.classes
        if classes.shape[0] != logits.shape[0] or classes.shape[2:] != inner:
            raise _check.wrong(ValueError, "target.classes", f"shape {[logits.shape[0], 'K', *inner]}", classes)
        _check.same_device("target", classes, logits)
    else:
        if not isinstance(target, torch.Tensor):
            raise _check.wrong(TypeError, "target", TARGETS, target)
        _check.integer_tensor("target", target, (logits.shape[0], *inner), logits)
        weights, classes = None, target.unsqueeze(1)
    _check.in_range("target", classes, logits.shape[1], "a class", ignore_index)
    return weights, classes


def _rows(logits, target):
    """What the losses take of a target that has a value for each class: itself, None and None, or values, lam and index of MixedRows,
    which are mixed before where a function transform or a gradient has to go through the mixing."""
    if not isinstance(target, MixedRows):
        return _dense(logits, target), None, None
    parts = _parts(logits, target)
    if _check.functional_transform() or _differentiates(*parts[:2]):
        return _mixed(logits, *parts), None, None
    return parts


def _parts(logits, target):
    """(values, lam, index) of MixedRows, which may have been changed, or mapped as a pytree, since they were made."""
    values = target.values
    _check.float_tensor("target.values", values, 1, "[N, C]")
    if values.shape != logits.shape:
        raise _check.wrong(ValueError, "target.values", f"the logits' shape {list(logits.shape)}", values)
    _check.same_device("target.values", values, logits)
    lam = _check.coefficient("target.lam", target.lam, logits if logits.dtype == torch.float64 else values)
    _check.integer_tensor("target.index", target.index, values.shape[:1], values)
    _check.in_range("target.index", target.index, values.shape[0], "a partner")
    return values, lam, target.index


def _mixed(logits, values, lam, index):
    """These as probabilities, in the precision the loss is computed in."""
    wide = torch.float64 if torch.float64 in (logits.dtype, values.dtype) else torch.float32
    return _mix_checked(values.to(wide), lam, index)


def _dense(logits, target):
    if not isinstance(target, torch.Tensor):
        raise _check.wrong(TypeError, "target", TARGETS, target)
    _check.float_tensor("target", target, 2, "of the logits")
    if target.shape != logits.shape:
        raise _check.wrong(ValueError, "target", f"probabilities in the logits' shape {list(logits.shape)}", target)
    _check.same_device("target", target, logits)
    return target


def js_divergence(
    logits: torch.Tensor | Sequence[torch.Tensor], *, scale: float = 1.0, reduction: str = "mean"
) -> torch.Tensor:
    """Jensen-Shannon divergence of K predictions for each row, its gradient formed in the same pass: AugMix's consistency.

        loss[n] = scale * (1/K) * sum over k of KL(p_k || m)      p_k = softmax(logits[k, n]),  m = mean over k of p_k

    0 where all agree, at most `scale * log(K)`. Nothing is clamped: a class to which one set gives no probability (a logit of
    -inf) adds 0 there and has gradient 0. Small divergences are as exact as large ones, where log m is never subtracted from
    log p_k. A +inf or NaN logit, or a set with all classes masked, gives NaN in its own row. The logits are never written, and
    the device is never waited for.

    Args:
        logits: one stacked tensor `[K, N, C]`, or a sequence of K tensors `[N, C]` of one shape and dtype, which is not stacked;
            K from 1 to 16. float16, bfloat16, float32 or float64.
        scale: a factor on the loss. Multiplied here rather than afterwards, the gradient that the forward has formed is the
            final one, and the backward does not touch memory again.
        reduction: `"mean"` or `"sum"` over rows, or `"none"` (`[N]`).

    Returns:
        The loss in float32 (float64 for float64). Differentiable once in the logits:
        `dL/dlogits[k, n, c] = scale * (1/K) * p_k[c] * (log p_k[c] - log m[c] - KL(p_k || m))`. Only those sets' gradients are
        formed that need one.

    Raises:
        TypeError, ValueError: a wrong argument.
        RuntimeError: a second derivative, which begins with a backward under `create_graph=True`.

    Source: AugMix, arXiv:1912.02781. Its term is 12 times this at K = 3, up to its clamp of m at 1e-7:

    >>> import torch, fastmix
    >>> logits_all = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 1.0]])  # clean, then two
    >>> fastmix.js_divergence(logits_all.view(3, -1, 2), scale=12.0)
    tensor(0.4581)
    >>> fastmix.js_divergence(logits_all.chunk(3), reduction="none")
    tensor([0.0606, 0.0158])
    """
    sets = _check.sources("logits", logits)
    stacked = isinstance(sets, torch.Tensor)
    if sets[0].dim() != 2 or sets[0].shape[1] == 0:
        name, shape = ("logits", "[K, N, C]") if stacked else ("logits[0]", "[N, C]")
        raise _check.wrong(ValueError, name, f"shape {shape} with at least one class", sets if stacked else sets[0])
    scale = _check.number("scale", scale)
    _check.one_of("reduction", reduction, ("mean", "sum", "none"), "'mean', 'sum' or 'none'")
    tensors = (sets,) if stacked else sets
    if _check.transformed():
        if _check.functional_transform():
            return _expressions.js_divergence_expression(sets, scale, reduction)
        return _ops.js_divergence(list(tensors), scale, reduction, stacked, _ops.backend_name(tensors[0].device))[0]
    if _differentiates(*tensors):
        return JSDivergenceFunction.apply(scale, reduction, stacked, *tensors)
    return _js_divergence(sets, scale, reduction)


def mixed_loss(
    loss_fn: Callable[..., torch.Tensor],
    outputs: torch.Tensor,
    target: SoftTarget | MixedRows | torch.Tensor,
    *args,
    reduction: str = "mean",
    **kwargs,
) -> torch.Tensor:
    """Any loss on a mixed batch, as the mixed losses of its labels: `lam*L(outputs, y_a) + (1-lam)*L(outputs, y_b)`.

        loss[n] = sum over k of weights[n, k] * loss_fn(outputs, classes[:, k])[n]                          SoftTarget
        loss[n] = lam[n] * loss_fn(outputs, values)[n] + (1 - lam[n]) * loss_fn(outputs, values[index])[n]  MixedRows

    This is the loss of the mixed target where a loss is linear in its target (cross-entropy, negative log-likelihood, binary
    cross-entropy), and another loss where it is not (mosaicml/composer#1407). The mean squared error is larger by
    `lam*(1-lam)*(y_a - y_b)**2`: `F.mse_loss(outputs, target.dense())` is the one without. `soft_cross_entropy` computes
    cross-entropy in one pass instead of one for each component.

    A weight of 0 means that a component is not looked at: neither its infinite loss nor a NaN in its gradient gets to the
    result. Differentiable in `outputs` and in the weights (so in lambda) as often as `loss_fn` is: the gradient to a weight is its
    component's loss, also at 0 if that is finite.

    Args:
        loss_fn: called as `loss_fn(outputs, labels, *args, **kwargs)` for each component, with labels `[N]` or `[N, d1, ...]`
            int64 (`MixedRows`: of their values' shape); returns a loss for each row, `[N]`, or for each pixel, `[N, d1, ...]`.
            `functools.partial(F.cross_entropy, reduction="none")`, say.
        outputs: `[N, ...]`, what a model gives, floating.
        target: a `SoftTarget`, `MixedRows`, or plain labels `[N, ...]` as they are (validation).
        reduction: `"mean"` over rows (and pixels), `"sum"` or `"none"`. Labels that `loss_fn` ignores count there as losses of 0.

    Returns:
        The loss, in float32 for float32 weights unless `loss_fn` gives float64.

    Raises:
        TypeError, ValueError: a wrong argument; losses of another shape than one for each row (or pixel).

    >>> import functools, torch, torch.nn.functional as F, fastmix
    >>> target = fastmix.Mix(torch.tensor([0.75, 0.5]), torch.tensor([1, 0])).target(torch.tensor([0, 1]))
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> fastmix.mixed_loss(functools.partial(F.cross_entropy, reduction="none"), logits, target)
    tensor(0.7201)
    >>> fastmix.mixed_loss(F.cross_entropy, logits, target, reduction="none", label_smoothing=0.1)
    Traceback (most recent call last):
    ValueError: loss_fn: expected losses of shape [2], one for each row (reduction="none"), got a float32 tensor of shape [] on cpu
    """
    if not callable(loss_fn):
        raise _check.wrong(TypeError, "loss_fn", "a function of outputs and labels", loss_fn)
    _check.float_tensor("outputs", outputs, 1, "[N, ...]")
    _check.one_of("reduction", reduction, ("mean", "sum", "none"), "'mean', 'sum' or 'none'")
    total, N = outputs.new_zeros(()), outputs.shape[0]
    for weight, labels, rows in _weighted_labels(outputs, target):
        read = outputs if weight is None else _not_differentiated(outputs, weight == 0)
        losses = loss_fn(read, labels, *args, **kwargs)
        if not isinstance(losses, torch.Tensor):
            raise _check.wrong(TypeError, "loss_fn", "a tensor of losses", losses)
        if losses.shape != rows and (losses.shape != (N,) or (weight is not None and weight.dim() > 1)):
            expected = f'losses of shape {list(rows)}, one for each {"pixel" if len(rows) > 1 else "row"} (reduction="none")'
            raise _check.wrong(ValueError, "loss_fn", expected, losses)
        if weight is not None:
            weight = weight.view(*weight.shape, *[1] * (losses.dim() - weight.dim()))
            losses = weight * torch.where((weight == 0) & ~losses.isfinite(), 0, losses)
        total = total + losses
    return total if reduction == "none" else total.sum() if reduction == "sum" else total.mean()


def _weighted_labels(outputs, target):
    """(weight [N] or [N, d1, ...] or None for 1, labels, shape of the losses) of each component of a target."""
    N = outputs.shape[0]
    if isinstance(target, SoftTarget):
        target._validate()  # it may have been changed, or mapped as a pytree
        _check_rows("target.classes", target.classes, outputs)
        pixels = target.weights.shape[2:]
        if pixels and outputs.shape != (N, *pixels) and outputs.shape[2:] != pixels:
            expected = f"shape {[N, 'C', *pixels]} or {[N, *pixels]}, as the weights of pixels"
            raise _check.wrong(ValueError, "outputs", expected, outputs)
        for weight, classes in zip(target.weights.unbind(1), target.classes.unbind(1), strict=True):
            yield weight, classes, classes.shape
    elif isinstance(target, MixedRows):
        values = target.values
        _check_rows("target.values", values, outputs)
        _check.in_range("target.index", target.index, N, "a partner")
        lam = _check.coefficient("target.lam", target.lam, values).expand(N)
        index, known = _expressions.safe_index(target.index, N)
        rows = torch.Size((N, *values.shape[2:]))
        yield lam, values, rows
        yield torch.where(known, 1 - lam, float("nan")), values[index], rows
    elif isinstance(target, torch.Tensor):
        _check_rows("target", target, outputs)
        yield None, target, torch.Size((N, *target.shape[2 if target.is_floating_point() else 1 :]))
    else:
        raise _check.wrong(TypeError, "target", "a SoftTarget, MixedRows or labels", target)


def _check_rows(name, labels, outputs):
    if labels.dim() == 0 or labels.shape[0] != outputs.shape[0]:
        raise _check.wrong(ValueError, name, f"{outputs.shape[0]} rows, as the outputs", labels)
    _check.same_device(name, labels, outputs)


def _not_differentiated(outputs, where):
    """outputs [N, ...], from whose rows [N], or pixels [N, d1, ...], nothing goes back: a NaN neither."""
    if where.dim() > 1 and where.shape != outputs.shape:
        where = where.unsqueeze(1)
    return torch.where(where.view(*where.shape, *[1] * (outputs.dim() - where.dim())), outputs.detach(), outputs)


@torch.no_grad()
def mixed_accuracy(
    logits: torch.Tensor, target: SoftTarget | MixedRows | torch.Tensor, topk: int = 1, *, ignore_index: int = -100
) -> torch.Tensor:
    """Top-k accuracy on a mixed batch: the target weight on classes among the k largest logits, averaged over rows (and pixels).

    Components of the class `ignore_index` count nowhere, as in `soft_cross_entropy`: such a row counts in the average by its
    weight that is not ignored, at most 1, so that a perfect prediction gives 1, and not at all if all of it is. Where logits
    are equal it is `torch.topk` that chooses. NaN logits are the largest, and hit nothing. A class that has weight twice counts
    with both.

    Args:
        logits: `[N, C]` or `[N, C, d1, ...]`.
        target: as for `soft_cross_entropy`.
        topk: k, at least 1; all classes count from k = C on.
        ignore_index: the class that stands for no label, in a `SoftTarget` or class indices.

    Returns:
        A float32 0-d tensor in [0, 1] (for targets that sum to 1), on the logits' device; nothing waits for the device. NaN
        where no row counts.

    Raises:
        TypeError, ValueError: a wrong argument; on the CPU also a class out of range (on a GPU it hits nothing).

    >>> import torch, fastmix
    >>> target = fastmix.SoftTarget(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    >>> fastmix.mixed_accuracy(logits, target), fastmix.mixed_accuracy(logits, target, topk=2)
    (tensor(0.5500), tensor(1.))
    """
    _check.float_tensor("logits", logits, 2, "[N, C] or [N, C, d1, ...]")
    topk = _check.integer("topk", topk, 1, "an int of at least 1")
    ignore_index = _check.integer("ignore_index", ignore_index, -(2**63), "an int of 64 bits")
    if logits.shape[1] == 0:
        raise _check.wrong(ValueError, "logits", "at least one class", logits)
    if isinstance(target, MixedRows):
        target = _mixed(logits, *_parts(logits, target))
    values, top = logits.topk(min(topk, logits.shape[1]), dim=1)  # [N, k, ...]
    real = ~values.isnan()  # NaN sorts first, and hits nothing
    if isinstance(target, torch.Tensor) and target.is_floating_point():
        hit = _dense(logits, target).to(torch.float32).gather(1, top)
        return torch.where(real, hit, 0).sum(1).mean()
    weights, classes = _components(logits, target, ignore_index)
    ignored = classes == ignore_index
    hit = ((classes.unsqueeze(2) == top.unsqueeze(1)) & real.unsqueeze(1)).any(2) & ~ignored  # [N, K, ...]
    a = classes.new_ones((), dtype=torch.float32) if weights is None else weights.to(torch.float32)
    a = a.reshape(*a.shape, *[1] * (hit.dim() - a.dim())).expand(hit.shape)
    share = torch.where(ignored.any(1), a.masked_fill(ignored, 0).sum(1).clamp(0, 1), 1)
    return torch.where(hit, a, 0).sum() / share.sum()
