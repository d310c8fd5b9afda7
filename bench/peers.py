"""What fastmix is compared with, defined once: plain eager torch as people write it, and the libraries that do the same.

Ways by hand are fast as well as usual: they make no copy that their users do not make. A library that is not installed is None in
these tables, and `MISSING` says why, so that its place in a comparison is named and not left out.

Ways to mix       (x [N, ...], lam, index [N]) -> the mixed batch, x left as it was; lam a number or [N]
   ... into out   (x, lam, index, out) -> out, which holds a copy of x before the first call
   ... CutMix     (x, index, box [N, 4], rows) -> the mixed batch; rows are index and box on the host, where timm draws them
   ... masked     (x, mask [N, h, w], index) -> the mixed batch; with plans for blocks, (x, mask, index, plan, partner_plan)
   ... many       (sources, weights [N, K]) -> the weighted sum of K batches [N, ...], a tuple or one stacked tensor [K, N, ...]
Ways to a loss    (logits [N, C, ...], y [N, ...], lam [N], index [N]) -> mean loss on the mixed labels, the target made on the way
   ... hard       (logits, y) -> mean loss on the labels alone
   ... JS         (logits of each set) -> mean divergence
Ways to a batch   made by (classes) -> (x [N, C, H, W], y [N]) -> (mixed x, dense target [N, classes] or SoftTarget), drawn on the way
"""

import contextlib
import functools
import importlib
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

MISSING: dict[str, str] = {}  # library: why it is not here


@dataclass(frozen=True)
class Refilled:
    """A way that writes over its first argument, which is filled anew before each call, off the clock."""

    way: Callable


def first_line(error):
    return (str(error).splitlines() or [""])[0]


def _library(name, *modules, load=importlib.import_module):
    """The modules of a library, or None for each."""
    try:
        return [load(module) for module in modules]
    except Exception as error:  # whatever a half-installed library raises
        hint = f" (python -m pip install --no-deps {name})" if isinstance(error, ModuleNotFoundError) else ""
        MISSING.setdefault(name, f"{type(error).__name__}: {first_line(error)}{hint}")
        return [None] * len(modules)


def _torchvision(module):
    """torchvision's compiled operators cannot be loaded beside a torch of another build, say a CPU build. Mixing needs none of them, so
    the two whose shapes are registered at import are only declared."""
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _torchvision.operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # declared already
            _torchvision.operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(module)


(torchvision,) = _library("torchvision", "torchvision.transforms.v2", load=_torchvision)
timm_mixup, timm_loss = _library("timm", "timm.data.mixup", "timm.loss")
if torch.cuda.is_available():
    (liger,) = _library("liger-kernel", "liger_kernel.transformers.functional")
    (quack,) = _library("quack-kernels", "quack.cross_entropy")
else:
    liger = quack = None
    MISSING |= dict.fromkeys(("liger-kernel", "quack-kernels"), "needs a GPU")
if not torch.cuda.is_available() and not any(map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])):
    MISSING["torch.compile"] = "needs a C++ compiler"


def compiled(way, draws=False, mode=None):
    """A way under torch.compile, or None where that cannot run. One that draws numbers of its own is not compiled for each."""
    if way is None or "torch.compile" in MISSING:
        return None
    # made at the first call: it imports the compiler, which takes seconds
    program = functools.cache(lambda: torch.compile(way, dynamic=None if draws else False, mode=mode))
    return lambda *arguments: program()(*arguments)


# Mixing


def vit_small(classes):
    """timm's vit_small_patch16_224, or None where it is not here."""
    models, *_ = _library("timm", "timm.models")
    return models and models.create_model("vit_small_patch16_224", num_classes=classes)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.clone()


def copy(x, *how):
    """The floor: mixes nothing, copies the batch and, backwards, its gradient."""
    return _Copy.apply(x) if x.requires_grad else x.clone()


def _along(lam, x):
    """lam against the rows of x: a number, or [N, 1, ...]."""
    return lam.view(-1, *[1] * (x.dim() - 1)) if isinstance(lam, torch.Tensor) else lam


def _weights(lam, x):
    """lam in the dtype of x as well: in float32 it would make the result float32."""
    lam = _along(lam, x)
    return lam.to(x.dtype) if isinstance(lam, torch.Tensor) else lam


def by_weights(x, weights, index):
    """mixup's expression."""
    return weights * x + (1 - weights) * x[index]


def mixup_cifar10(x, lam, index):
    """facebookresearch/mixup-cifar10 and most of what followed it."""
    return by_weights(x, _weights(lam, x), index)


def timm_in_place(x, lam, index, out):
    """timm's Mixup with mode="batch": the loader's batch is overwritten, and the partner is always the reversed batch."""
    flipped = out.flip(0).mul_(1 - lam)
    return out.mul_(lam).add_(flipped)


def timm_rows(x, index, box, rows):
    """timm's Mixup with mode="elem": one copy of the batch, then one of each box."""
    out = x.clone()
    for i, (j, (y0, x0, y1, x1)) in enumerate(rows):
        out[i][:, y0:y1, x0:x1] = x[j][:, y0:y1, x0:x1]
    return out


def inside(box, shape):
    """Which pixels of [N, C, H, W] are inside their row's box, [N, 1, H, W]."""
    y0, x0, y1, x1 = box.view(-1, 4, 1, 1, 1).unbind(1)  # [N, 1, 1, 1] each
    y, x = (torch.arange(size, device=box.device) for size in shape[2:])
    return (y.view(-1, 1) >= y0) & (y.view(-1, 1) < y1) & (x >= x0) & (x < x1)


MIX = {
    "mixup-cifar10": mixup_cifar10,
    "torch.lerp": lambda x, lam, index: torch.lerp(x[index], x, _weights(lam, x)),  # the same in one call, which few know
    "copy": copy,
}
MIX_INTO = {
    "torch.lerp, out=": lambda x, lam, index, out: torch.lerp(x[index], x, lam, out=out),
    "timm's lines, in place": timm_in_place,
    "copy": lambda x, lam, index, out: out.copy_(x),
}
CUTMIX = {
    "timm's loop over rows": timm_rows,
    "torch.where": lambda x, index, box, rows: torch.where(inside(box, x.shape), x[index], x),  # one mask for all boxes
}


def _spread(mask, x):
    """A mask [N, h, w] over pixels, in the dtype of x: [N, H, W], or [N, 1, H, W] for images."""
    h, w = mask.shape[1:]
    pixels = mask.repeat_interleave(x.shape[-2] // h, 1).repeat_interleave(x.shape[-1] // w, 2).to(x.dtype)
    return pixels if x.dim() == 3 else pixels.unsqueeze(1)


def interpolated(x, mask, index):
    """PuzzleMix's lines: F.interpolate, then the expression."""
    weights = F.interpolate(mask.unsqueeze(1), size=x.shape[-2:]).to(x.dtype)
    return by_weights(x, weights[:, 0] if x.dim() == 3 else weights, index)


def _moved_patches(x, plan, mask):
    """PuzzleMix's lines: patches to the front, gathered, and put back."""
    (N, C, H, W), (h, w) = x.shape, mask.shape[1:]
    patches = x.view(N, C, h, H // h, w, W // w).permute(0, 2, 4, 1, 3, 5).reshape(N, h * w, -1)
    patches = patches.gather(1, plan.unsqueeze(2).expand(patches.shape))
    return patches.view(N, h, w, C, H // h, W // w).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _moved_pixels(x, plan, mask):
    """One gather of all pixels."""
    (h, w), (H, W) = mask.shape[1:], x.shape[2:]
    tall, wide = H // h, W // w
    y, at = torch.arange(H, device=x.device).unsqueeze(1), torch.arange(W, device=x.device)
    block = plan[:, (y // tall) * w + at // wide]  # [N, H, W]
    source = (block // w * tall + y % tall) * W + block % w * wide + at % wide
    return x.flatten(2).gather(2, source.view(len(x), 1, -1).expand(-1, x.shape[1], -1)).view(x.shape)


def _moving(move, x, mask, index, plan, partner_plan):
    weights = _spread(mask, x)
    return weights * move(x, plan, mask) + (1 - weights) * move(x[index], partner_plan, mask)


patches = functools.partial(_moving, _moved_patches)
MIX_MASKED = {
    "repeat_interleave": lambda x, mask, index: by_weights(x, _spread(mask, x), index),
    "F.interpolate": interpolated,
    "torch.lerp": lambda x, mask, index: torch.lerp(x[index], x, _spread(mask, x)),
    "copy": copy,
}
MIX_MASKED_PLANS = {"patches": patches, "pixels": functools.partial(_moving, _moved_pixels), "copy": copy}


def resize_mix(s, dtype):
    """Row by row, as there are as many sizes as rows: with F.interpolate of the dtype."""
    mixed = s.x.to(dtype).clone()
    for i, (y0, x0, y1, x1) in enumerate(s.box.tolist()):
        if y0 < y1 and x0 < x1:
            partner = s.x[s.index[i] : s.index[i] + 1].to(dtype)
            mixed[i, :, y0:y1, x0:x1] = F.interpolate(partner, (y1 - y0, x1 - x0), mode="bilinear", align_corners=False)[0]
    return mixed.to(s.dtype)


def sum_of_terms(sources, weights):
    return sum(_weights(w, source) * source for w, source in zip(weights.unbind(1), sources, strict=True))


def augmix(sources, weights):
    """google-research/augmix's lines, on a batch: into a tensor of zeros, one chain after the other."""
    mixed = torch.zeros_like(sources[0])
    for w, source in zip(weights.unbind(1), sources, strict=True):
        mixed += _weights(w, source) * source
    return mixed


def _stacked(sources):
    return sources if isinstance(sources, torch.Tensor) else torch.stack(sources)


def stack_and_sum(sources, weights):
    sources = _stacked(sources)
    return (weights.T.reshape(*weights.T.shape, *[1] * (sources.dim() - 2)).to(sources.dtype) * sources).sum(0)


def einsum(sources, weights):
    sources = _stacked(sources)
    return torch.einsum("kn...,nk->n...", sources, weights.to(sources.dtype))


COMBINE = {"sum of terms": sum_of_terms, "AugMix's lines": augmix, "stack and sum": stack_and_sum, "torch.einsum": einsum}


# Losses


def _wide(logits):
    """float16 logits in float32, as autocast hands them to a loss: a float16 loss has no place for a scaled gradient."""
    return logits.float() if logits.dtype == torch.float16 else logits


def two_losses(logits, y, lam, index):
    """mixup-cifar10's criterion, with a lam per row."""
    lam, logits = _along(lam, y), _wide(logits)
    own, partner = (F.cross_entropy(logits, labels, reduction="none") for labels in (y, y[index]))
    return (lam * own + (1 - lam) * partner).mean()


def weighted_losses(logits, weights, classes, class_weight, *, reduction, label_smoothing=0.0):
    """Two hard losses with weights of their own; the mean by torch's rule for class weights."""
    weights = weights.view(*weights.shape, *[1] * (logits.dim() - 2)).expand(classes.shape)
    cast = None if class_weight is None else class_weight.to(logits.dtype)  # torch takes no other dtype
    how = {"weight": cast, "label_smoothing": label_smoothing, "reduction": "none"}
    losses = [F.cross_entropy(logits, labels, **how) for labels in classes.unbind(1)]
    rows = (weights * torch.stack(losses, 1)).sum(1)
    if reduction == "none":
        return rows
    return rows.sum() / (weights.sum() if class_weight is None else (weights * class_weight[classes]).sum())


def dense(logits, y, lam, index):
    """timm's and torchvision's target: rows of probabilities, in float32."""
    lam = _along(lam, logits)
    own = torch.zeros(logits.shape, dtype=lam.dtype, device=y.device).scatter_(1, y.unsqueeze(1), 1.0)
    return own * lam + own[index] * (1 - lam)


def _on_dense(loss, same_dtype=True):
    """A loss on dense rows, which torch wants in the logits' dtype."""

    def way(logits, y, lam, index):
        logits = _wide(logits)
        target = dense(logits, y, lam, index)
        return loss(logits, target.to(logits.dtype) if same_dtype else target)

    return way


def two_liger(logits, y, lam, index):
    """Liger-Kernel's cross-entropy twice. It writes the gradient over its input: the first call is given a copy."""
    lam = _along(lam, y)
    own = liger.liger_cross_entropy(logits.clone(), y, reduction="none")
    partner = liger.liger_cross_entropy(logits, y[index], reduction="none")
    return (lam * own + (1 - lam) * partner).mean()


def hard_liger(logits, y):
    """Liger-Kernel's cross-entropy, which writes the gradient over its input."""
    return liger.liger_cross_entropy(logits, y)


def augmix_js(*sets):
    """google-research/augmix's Jensen-Shannon term, but for its factor of 12, on K sets of logits; the mixture clamped."""
    probabilities = [F.softmax(_wide(logits), dim=1) for logits in sets]
    mixture = torch.clamp(sum(probabilities) / len(sets), 1e-7, 1).log()
    return sum(F.kl_div(mixture, p, reduction="batchmean") for p in probabilities) / len(sets)


def log_js(*sets):
    """The careful way: logarithms throughout."""
    logs = torch.stack([logits.log_softmax(1) for logits in sets])
    mixture = logs.logsumexp(0) - math.log(len(sets))
    return sum(F.kl_div(mixture, log, reduction="batchmean", log_target=True) for log in logs) / len(sets)


LOSS = {"two hard losses": two_losses, "dense target": _on_dense(F.cross_entropy)}
LIBRARY_LOSS = {
    "timm SoftTargetCrossEntropy": timm_loss and _on_dense(timm_loss.SoftTargetCrossEntropy(), same_dtype=False),
    "Liger, twice": Refilled(two_liger) if liger else None,
}
JS_DIVERGENCE = {"AugMix's lines": augmix_js}
CAREFUL_JS = {"log_softmax and kl_div": log_js, **JS_DIVERGENCE}
BINARY_LOSS = {
    "binary_cross_entropy_with_logits": _on_dense(F.binary_cross_entropy_with_logits),
    "timm BinaryCrossEntropy": timm_loss and _on_dense(timm_loss.BinaryCrossEntropy(smoothing=0.0), same_dtype=False),
}


def hard_quack(logits, y):
    """QuACK's cross-entropy; its gradient into memory of its own."""
    return quack.cross_entropy(logits, y, reduction="mean")


HARD_LOSS = {
    "F.cross_entropy": F.cross_entropy,
    "Liger": Refilled(hard_liger) if liger else None,
    "QuACK": hard_quack if quack else None,
}
COMPILES = {  # ways that torch.compile makes faster; it would unroll a loop over rows
    "mixup-cifar10", "torch.where", "repeat_interleave", "patches", "sum of terms", "stack and sum",
    *LOSS, "timm SoftTargetCrossEntropy", *BINARY_LOSS, "F.cross_entropy", *JS_DIVERGENCE,
}  # fmt: skip
NEEDS = {
    "timm": "timm",
    "torchvision": "torchvision",
    "Liger": "liger-kernel",
    "QuACK": "quack-kernels",
}  # first word of a way's name: its library


def needed(name):
    """The library without which the way of this name is not here."""
    return "torch.compile" if "compiled" in name and "torch.compile" in MISSING else NEEDS[name.replace(",", " ").split()[0]]


# Whole batches, by question, then by way. timm overwrites the batch that it is given


def _by_hand(classes):
    def batch(x, y):
        lam = np.random.beta(1.0, 1.0)
        index = torch.arange(len(x), device=x.device).flip(0)
        own = F.one_hot(y, classes).float()
        return lam * x + (1 - lam) * x[index], lam * own + (1 - lam) * own[index]

    return batch


def _timm(mode, mixup, cutmix):
    options = {"mode": mode, "label_smoothing": 0.0}
    return timm_mixup and (lambda classes: timm_mixup.Mixup(mixup, cutmix, num_classes=classes, **options))


def _tv(name):
    return torchvision and (lambda classes: getattr(torchvision, name)(alpha=1.0, num_classes=classes))


def _by_row(mixup, cutmix):
    return {f"timm, {mode}": _timm(mode, mixup, cutmix) for mode in ("elem", "pair")}


BATCH = {
    "mixup, one lambda": {"by hand": _by_hand, "timm, batch": _timm("batch", 1.0, 0.0), "torchvision MixUp": _tv("MixUp")},
    "mixup, a lambda per row": _by_row(1.0, 0.0),
    "CutMix, one box": {"timm, batch": _timm("batch", 0.0, 1.0), "torchvision CutMix": _tv("CutMix")},
    "CutMix, a box per row": _by_row(0.0, 1.0),
    "mixup or CutMix per row": _by_row(0.8, 1.0),
}


def partners(name, count):
    """The partner of each row in the way of this name."""
    return torch.arange(count).roll(1) if name.startswith("torchvision") else torch.arange(count).flip(0)
