"""Compiling ahead of the first step."""

import time

import torch

from . import _check
from ._expressions import accumulator
from .functional import convex_combination, mix, mix_masked, soft_cross_entropy
from .targets import SoftTarget

MANY_CLASSES, MANY_ROWS = 2048, 256  # rows of more classes are shared out over programs, but for batches of as many rows


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
    memory_format: torch.memory_format = torch.contiguous_format,
    lam_gradient: bool = False,
    **loss_options,
) -> float:
    """Compiles what batches of given shapes need, so that the first training step does not wait for it.

    Triton compiles a kernel the first time that a shape of row, a dtype or an option needs it, a fraction of a second each. It
    cannot do so while a CUDA graph is being captured: warm up first. Batch sizes and the values of lambda never compile anything
    again, so the shapes' first number does not matter: for more than 2048 classes batches of 256 rows are warmed up as well, since
    smaller ones take other kernels. Every op is run forwards and backwards, on a few rows, on a stream of its own.

    Args:
        images: shape `[N, ...]` of what is mixed; None: no mixing.
        logits: shape `[N, C]` or `[N, C, d1, ...]`; None: no loss. Targets of pairs are warmed up, and class indices, as for
            validation.
        dtype: of images and logits.
        device: where; default: the current GPU if there is one, else the CPU (where there is nothing to compile).
        box: with boxes too (CutMix), over the last one to three dimensions.
        mask: `(h, w)`: with `mix_masked` too, by masks of so many cells.
        plans: with plans for both of its rows.
        sources: K: with `convex_combination` too, of a sequence of K batches.
        memory_format: of the images.
        lam_gradient: with the gradient to lambda (the mask, the weights) as well, with and without one to the images.
        **loss_options: `weight`, `label_smoothing`, `ignore_index`, `reduction` of `soft_cross_entropy`, as they will be used.

    Returns:
        Seconds it took.

    Raises:
        TypeError, ValueError: a wrong argument.

    >>> import torch, fastmix
    >>> seconds = fastmix.warmup((256, 3, 32, 32), (256, 10), box=True, label_smoothing=0.1)
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = _check.device("device", device)
    if not isinstance(dtype, torch.dtype) or dtype not in _check.FLOATS:
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
    if plans and mask is None:
        raise ValueError("plans: expected False where there is no mask, whose blocks they move")
    if images is None and (mask is not None or sources is not None):
        raise ValueError(f"{'sources' if mask is None else 'mask'}: expected None where there are no images")
    if images is not None and rank not in (None, len(images)):
        raise _check.wrong(ValueError, "images", f"{rank} sizes for {memory_format}", images)
    logits = None if logits is None else _shape("logits", logits, 2)
    start = time.perf_counter()
    if place.type != "cuda":
        _run(images, logits, dtype, place, box, mask, plans, sources, memory_format, lam_gradient, loss_options)
        return time.perf_counter() - start
    stream = torch.cuda.Stream(place)
    stream.wait_stream(torch.cuda.current_stream(place))
    with torch.cuda.stream(stream):
        _run(images, logits, dtype, place, box, mask, plans, sources, memory_format, lam_gradient, loss_options)
        if logits is not None and len(logits) == 2 and logits[1] > MANY_CLASSES:
            many = MANY_ROWS, logits[1]
            _run(None, many, dtype, place, box, None, False, None, memory_format, lam_gradient, loss_options)
    torch.cuda.synchronize(place)
    return time.perf_counter() - start


def _shape(argument, shape, least):
    if not isinstance(shape, (tuple, list)) or len(shape) < least:
        raise _check.wrong(TypeError, argument, f"a shape of at least {least} sizes", shape)
    return 3, *[_check.integer(argument, size, 1, "sizes of at least 1") for size in shape[1:]]


@torch.inference_mode(False)
@torch.enable_grad()
def _run(images, logits, dtype, device, box, mask, plans, sources, memory_format, lam_gradient, loss_options):
    if images is not None:
        x = torch.zeros(images, dtype=dtype, device=device).contiguous(memory_format=memory_format)
        index = torch.arange(len(x), device=device).flip(0)
        dims = min(max(x.dim() - 2, 1), 3)
        boxes = [None, torch.zeros(len(x), 2 * dims, dtype=torch.int64, device=device)] if box else [None]
        wide = {"dtype": accumulator(dtype), "device": device, "requires_grad": lam_gradient}
        for leaf in (True, False) if lam_gradient else (True,):  # images have no gradient, hidden states have one
            x = x.detach().requires_grad_(leaf)
            for cut in boxes:
                mix(x, torch.full((len(x),), 0.5, **wide), index, box=cut).sum().backward()
            if mask is not None:
                shares = torch.full((len(x), *mask), 0.5, **wide)
                plan = torch.zeros(len(x), mask[0] * mask[1], dtype=torch.int64, device=device) if plans else None
                mix_masked(x, shares, index, plan=plan, partner_plan=plan).sum().backward()
            if sources is not None:
                convex_combination([x] * sources, torch.full((len(x), sources), 1 / sources, **wide)).sum().backward()
    if logits is not None:
        z = torch.zeros(logits, dtype=dtype, device=device, requires_grad=True)
        classes = torch.zeros(logits[0], 2, *logits[2:], dtype=torch.int64, device=device)
        weights = torch.full((logits[0], 2), 0.5, dtype=torch.float32, device=device, requires_grad=lam_gradient)
        for target in (SoftTarget(classes, weights), classes[:, 0].contiguous()):
            loss = soft_cross_entropy(z, target, **loss_options)
            total = 2 * loss.sum()
            total.backward(retain_graph=True)
            total.backward()  # finds no formed gradient any more
            with torch.no_grad():
                soft_cross_entropy(z, target, **loss_options)
