"""Compiling ahead of the first step."""

import copy
import functools
import time
from collections.abc import Callable

import torch

from . import _check
from ._dtypes import FLOATS, accumulator
from .losses.js_divergence import js_divergence
from .losses.soft_cross_entropy import soft_cross_entropy
from .mixing.convex_combination import convex_combination
from .mixing.mix import mix
from .mixing.mix_masked import mix_masked
from .sampling.augmix import AugMix
from .sampling.base import Sampler
from .sampling.puzzle import PuzzleMix
from .sampling.regions import MapSampler
from .targets import MixedRows, SoftTarget

MANY_DRAWS = 4097  # partners of more rows than 4096 are found by sorting
MANY_CLASSES, MANY_ROWS = 2048, 256  # longer rows are split over programs in batches of fewer rows


def warmup(
    images: tuple[int, ...] | None = None,
    logits: tuple[int, ...] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    box: bool = False,
    mask: tuple[int, int] | None = None,
    plans: bool = False,
    sources: int | None = None,
    sampler: AugMix | Sampler | PuzzleMix | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    lam_gradient: bool = False,
    loss: Callable[..., torch.Tensor] = soft_cross_entropy,
    target: type = SoftTarget,
    components: int = 2,
    **loss_options,
) -> float:
    """Compiles what batches of given shapes need, so that the first training step does not wait for it.

    Triton compiles a kernel the first time that a shape of row, a dtype or an option needs it, a fraction of a second each. It
    cannot do so while a CUDA graph is being captured: warm up first. Batch sizes and the values of lambda never compile anything
    again, so the shapes' first number does not matter: for more than 2048 classes batches of 256 rows are warmed up as well, since
    smaller ones take other kernels. Every op is run forwards and backwards, on a few rows, on a stream of its own.

    Args:
        images: shape `[N, ...]` of what is mixed; None: no mixing.
        logits: shape `[N, C]` or `[N, C, d1, ...]`, for `js_divergence` `[K, N, C]`; None: no loss.
        dtype: of images and logits.
        device: where; default: the current GPU if there is one, else the CPU (where there is nothing to compile).
        box: with boxes too (CutMix), over the last one to three dimensions.
        mask: `(h, w)`: with `mix_masked` too, by masks of so many cells.
        plans: with plans for both of its rows.
        sources: K: with `convex_combination` too, of a sequence of K batches.
        sampler: draws for the images too, with class indices and without; its own stream stays where it is. A `PuzzleMix` cuts and
            moves blocks of each of its numbers; FMix, ResizeMix and the like mix the images too. An `AugMix` takes bytes of that shape.
        memory_format: of the images.
        lam_gradient: with the gradient to lambda (the mask, the weights) as well, alone and with one to the images or logits.
        loss: called on logits and target: `soft_cross_entropy`, `soft_binary_cross_entropy`, a module of either; or `js_divergence`,
            on logits alone, stacked and as a sequence of K.
        target: what labels become when they are mixed: `SoftTarget`, of class indices, or `MixedRows`, of float32 rows in the
            logits' shape (float64 for float64). Labels as they are, as for validation, are warmed up too.
        components: K of a `SoftTarget`.
        **loss_options: of the loss, as they will be used: `label_smoothing`, `weight`, `reduction`, `threshold` ...

    Returns:
        Seconds it took.

    Raises:
        TypeError, ValueError: a wrong argument.

    >>> import torch, fastmix
    >>> seconds = fastmix.warmup((256, 3, 32, 32), (256, 10), box=True, label_smoothing=0.1)
    >>> multi_label = {"loss": fastmix.soft_binary_cross_entropy, "target": fastmix.MixedRows}
    >>> seconds += fastmix.warmup(logits=(256, 80), class_reduction="sum", **multi_label)
    >>> seconds += fastmix.warmup(logits=(3, 256, 10), loss=fastmix.js_divergence, scale=12.0)
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = _check.device("device", device)
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise _check.wrong(TypeError, "dtype", "float16, bfloat16, float32 or float64", dtype)
    if not isinstance(memory_format, torch.memory_format):
        raise _check.wrong(TypeError, "memory_format", "a torch.memory_format", memory_format)
    rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
    images = None if images is None else _shape("images", images, 3 if mask is not None else 2 if box else 1)
    if mask is not None:
        if not isinstance(mask, (tuple, list)) or len(mask) != 2:
            raise _check.wrong(TypeError, "mask", "(h, w), how many cells a mask has, or None", mask)
        h, w = (_check.integer("mask", count, 1, "numbers of at least 1") for count in mask)
        mask = h, w
    sources = None if sources is None else _check.integer("sources", sources, 1, "an int of at least 1")
    if sampler is not None and not isinstance(sampler, (AugMix, Sampler, PuzzleMix)):
        raise _check.wrong(TypeError, "sampler", "a sampler or None", sampler)
    if plans and mask is None:
        raise ValueError("plans: expected False where there is no mask, whose blocks they move")
    for name, value in (("mask", mask), ("sources", sources), ("sampler", sampler)):
        if images is None and value is not None:
            raise ValueError(f"{name}: expected None where there are no images")
    if images is not None and rank not in (None, len(images)):
        raise _check.wrong(ValueError, "images", f"{rank} sizes for {memory_format}", images)
    if not callable(loss):
        raise _check.wrong(TypeError, "loss", "a function of logits and a target, or js_divergence", loss)
    if target not in (SoftTarget, MixedRows):
        raise _check.wrong(ValueError, "target", "SoftTarget or MixedRows", target)
    components = _check.integer("components", components, 1, "an int of at least 1")
    if logits is not None:
        logits = _shape_of_sets(logits) if loss is js_divergence else _shape("logits", logits, 2)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(images, logits):
        make = functools.partial(torch.zeros, dtype=dtype, device=place)
        if images is not None:
            _run_mixing(make(images), box, mask, plans, sources, memory_format, lam_gradient)
            if sampler is not None:
                run_sampler = {PuzzleMix: _run_puzzle, AugMix: _run_augmix}.get(type(sampler), _run_sampler)
                run_sampler(make(images).contiguous(memory_format=memory_format), sampler)
        if logits is not None:
            z, sets = make(logits, requires_grad=True), loss is js_divergence
            calls = [(None, z), (None, z.unbind())] if sets else _loss_calls(z, target, components, lam_gradient)
            _run_loss(functools.partial(loss, **loss_options), calls)

    start = time.perf_counter()
    if place.type != "cuda":
        run(images, logits)
        return time.perf_counter() - start
    stream = torch.cuda.Stream(place)
    stream.wait_stream(torch.cuda.current_stream(place))
    with torch.cuda.stream(stream):
        run(images, logits)
        if logits is not None and len(logits) == 2 and logits[1] > MANY_CLASSES:
            run(None, (MANY_ROWS, logits[1]))
    torch.cuda.synchronize(place)
    return time.perf_counter() - start


def _shape(argument, shape, least):
    if not isinstance(shape, (tuple, list)) or len(shape) < least:
        raise _check.wrong(TypeError, argument, f"a shape of at least {least} sizes", shape)
    return 3, *[_check.integer(argument, size, 1, "sizes of at least 1") for size in shape[1:]]


def _shape_of_sets(shape):
    """Returns the shape with 16 rows, so that every set begins at a 16-byte boundary."""
    _, _, *classes = _shape("logits", shape, 3)
    return _check.integer("logits", shape[0], 1, "sizes of at least 1"), 16, *classes


def _run_mixing(x, box, mask, plans, sources, memory_format, lam_gradient):
    x = x.contiguous(memory_format=memory_format)
    index = torch.arange(len(x), device=x.device).flip(0)
    dims = min(max(x.dim() - 2, 1), 3)
    boxes = [None, torch.zeros(len(x), 2 * dims, dtype=torch.int64, device=x.device)] if box else [None]
    weights = functools.partial(torch.full, dtype=accumulator(x.dtype), device=x.device, requires_grad=lam_gradient)
    for leaf in (True, False) if lam_gradient else (True,):  # images have no gradient, hidden states have one
        x = x.detach().requires_grad_(leaf)
        for cut in boxes:
            mix(x, weights((len(x),), 0.5), index, box=cut).sum().backward()
        if mask is not None:
            plan = torch.zeros(len(x), mask[0] * mask[1], dtype=torch.int64, device=x.device) if plans else None
            mix_masked(x, weights((len(x), *mask), 0.5), index, plan=plan, partner_plan=plan).sum().backward()
        if sources is not None:
            convex_combination([x] * sources, weights((len(x), sources), 1 / sources)).sum().backward()


def _run_sampler(x, sampler):
    """Draws from copies, for few rows and for more than are counted; torch's generators stay where they are too."""
    sampler = copy.deepcopy(sampler).train(sampler.training)
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        for rows in (x, x[:1].expand(MANY_DRAWS, *x.shape[1:])):
            labels = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
            sampler._sample(rows, labels, None, labels)
            maps = (torch.ones(len(rows), *x.shape[-2:], device=x.device),) if isinstance(sampler, MapSampler) else ()
            drawn = sampler.sample(rows, *maps, labels)
            drawn.target(labels)
            if sampler._alone is not None and len(rows) == len(x):  # masks and boxes of its own
                drawn.index = torch.zeros_like(drawn.index)
                drawn.apply(x.detach().requires_grad_()).sum().backward()


def _run_puzzle(x, sampler):
    """Cuts and mixes with each number of blocks; lam and partners are drawn by the sampler inside."""
    _run_sampler(x, sampler.mixup)
    saliency = torch.ones(len(x), *x.shape[-2:], device=x.device)
    index = torch.arange(len(x), device=x.device).flip(0)
    lam = torch.full((len(x),), 0.5, device=x.device)
    for blocks in sampler.blocks if sampler.training else ():
        drawn = sampler._cut(x, saliency, index, lam, blocks)
        plan = None if drawn.plan is None else torch.zeros_like(drawn.plan)
        mix_masked(x, drawn.mask, index, plan=plan, partner_plan=plan)


def _run_augmix(x, sampler):
    sampler = copy.deepcopy(sampler).train(sampler.training)
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        sampler.stack(x.to(torch.uint8))


def _loss_calls(z, target, components, lam_gradient):
    """Returns [(lambda that needs a gradient or None, logits, target)], for mixed labels and for plain ones."""
    N, _, *inner = z.shape
    if target is MixedRows:
        labels, weights_shape = torch.zeros(z.shape, dtype=accumulator(z.dtype), device=z.device), (N,)
        index = torch.arange(N, device=z.device).flip(0)
        mixed = functools.partial(MixedRows, labels, index=index)
    else:
        classes = torch.zeros(N, components, *inner, dtype=torch.int64, device=z.device)
        labels, weights_shape = classes[:, 0].contiguous(), (N, components)
        mixed = functools.partial(SoftTarget, classes)
    lam = torch.full(weights_shape, 0.5, dtype=torch.float32, device=z.device)
    leaves = [lam.clone().requires_grad_()] * lam_gradient
    return [(None, z, mixed(lam)), (None, z, labels), *[(leaf, z, mixed(leaf)) for leaf in leaves]]


def _run_loss(loss, calls):
    for lam, *arguments in calls:
        total = 2 * loss(*arguments).sum()
        if lam is not None:
            torch.autograd.grad(total, lam, retain_graph=True)
        total.backward(retain_graph=True)
        total.backward()  # the cached gradient is gone: it is formed anew
        with torch.no_grad():
            loss(*arguments)
