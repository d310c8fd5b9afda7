"""`fastmix.mix_masked` beside mixing by a mask by hand: a weight for every cell or element, its gradients, and blocks moved by a plan.

Everyone is given the mask of cells, and the reversed batch as partners. By hand the mask is spread over pixels, with
`repeat_interleave` or with `F.interpolate`, and then the batch is mixed; blocks are moved by an index of all pixels, or as
PuzzleMix's own code does it, by a gather of patches. A copy of the batch is the floor. Bytes moved are what nobody can do
without: x (and the upstream gradient) read once, each result written once.
"""

import torch
import torch.nn.functional as F

import fastmix
from fastmix.bench import peers
from fastmix.bench.bench_mix import BOTH, FORWARD, flipped, random, upstream
from fastmix.bench.case import BF16, F32, Case

CIFAR, IMAGENET, IMAGENET_256 = (128, 3, 32, 32), (64, 3, 224, 224), (256, 3, 224, 224)
TEXT = (128, 64, 300)


def moved(x, mask, index, plan, partner_plan):
    return fastmix.mix_masked(x, mask, index, plan=plan, partner_plan=partner_plan)


def _spread(mask, x):
    """[N, h, w] over pixels, in the dtype of x: [N, H, W], or [N, 1, H, W] for images."""
    h, w = mask.shape[1:]
    pixels = mask.repeat_interleave(x.shape[-2] // h, 1).repeat_interleave(x.shape[-1] // w, 2).to(x.dtype)
    return pixels if x.dim() == 3 else pixels.unsqueeze(1)


def repeated(x, mask, index):
    """mixup's expression, its weight a mask."""
    weights = _spread(mask, x)
    return weights * x + (1 - weights) * x[index]


def interpolated(x, mask, index):
    """PuzzleMix's: F.interpolate, then the expression."""
    weights = F.interpolate(mask.unsqueeze(1), size=x.shape[-2:]).to(x.dtype)
    weights = weights[:, 0] if x.dim() == 3 else weights
    return weights * x + (1 - weights) * x[index]


def lerp(x, mask, index):
    """One call for the sum."""
    return torch.lerp(x[index], x, _spread(mask, x))


def _patches(x, plan, mask):
    """Blocks of images, moved: patches to the front, gathered, and put back."""
    (N, C, H, W), (h, w) = x.shape, mask.shape[1:]
    patches = x.view(N, C, h, H // h, w, W // w).permute(0, 2, 4, 1, 3, 5).reshape(N, h * w, -1)
    patches = patches.gather(1, plan.unsqueeze(2).expand(patches.shape))
    return patches.view(N, h, w, C, H // h, W // w).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def patches(x, mask, index, plan, partner_plan):
    weights = _spread(mask, x)
    return weights * _patches(x, plan, mask) + (1 - weights) * _patches(x[index], partner_plan, mask)


def _pixels(x, plan, mask):
    """Blocks of images, moved: by the number of every pixel."""
    (h, w), (H, W) = mask.shape[1:], x.shape[2:]
    tall, wide = H // h, W // w
    y, at = torch.arange(H, device=x.device).unsqueeze(1), torch.arange(W, device=x.device)
    block = plan[:, (y // tall) * w + at // wide]  # [N, H, W]
    source = (block // w * tall + y % tall) * W + block % w * wide + at % wide
    return x.flatten(2).gather(2, source.view(len(x), 1, -1).expand(-1, x.shape[1], -1)).view(x.shape)


def pixels(x, mask, index, plan, partner_plan):
    weights = _spread(mask, x)
    return weights * _pixels(x, plan, mask) + (1 - weights) * _pixels(x[index], partner_plan, mask)


WAYS = {"repeat_interleave": repeated, "F.interpolate": interpolated, "torch.lerp": lerp}
PLAN_WAYS = {"patches": patches, "pixels": pixels}
COMPILED = ("repeat_interleave", "patches")


def _copy(x, mask, index, *plans):
    return peers.copy(x, None, index)


def _case(shape, dtype, cells, mode=FORWARD, mask_gradient=False, plans=False, compiled=False):
    ways = PLAN_WAYS if plans else WAYS
    if compiled:
        ways = {**ways, **{f"{name}, compiled": peers.compiled(way) for name, way in ways.items() if name in COMPILED}}
    ways = {"fastmix": moved if plans else fastmix.mix_masked, **ways, **({} if mask_gradient else {"copy": _copy})}
    h, w = cells

    def arguments(rows, device):
        rows = rows or shape[0]
        (x,) = random((rows, *shape[1:]), dtype, device)
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand((rows, h, w), generator=generator).to(device)
        orders = [torch.rand((rows, h * w), generator=generator).argsort(1).to(device) for _ in range(2 * plans)]
        return [x, mask, flipped(rows, device), *orders]

    def expected(arguments, copies):
        x, mask, *how = arguments
        x, g = x.double(), upstream(arguments).double()
        if copies:
            return [x, g][: 1 + (mode != FORWARD)]
        dx, dmask = fastmix.reference.mix_masked_grad(g, x, mask, *how)
        scale = float(g.abs().max() * x.abs().max()) * x[0].numel() / (h * w)
        gradients = [dx, (dmask, scale)][: 1 + mask_gradient]
        return [fastmix.reference.mix_masked(x, mask, *how), *([] if mode == FORWARD else gradients)]

    x_bytes = torch.Size(shape).numel() * dtype.itemsize
    floor = {FORWARD: 2, BOTH: 4}[mode] + mask_gradient
    title = f"{h}x{w} cells, {mode}" + " and the mask's" * mask_gradient + ", blocks moved" * plans
    return Case(
        "mix_masked", title, shape, dtype, ways, floor * x_bytes, arguments, expected,
        mode=mode, leaves=(0, 1) if mask_gradient else (0,), upstream=upstream,
    )  # fmt: skip


LAPTOP = [
    _case(CIFAR, F32, (4, 4)),
    _case(CIFAR, F32, (4, 4), plans=True),
    _case(IMAGENET, F32, (4, 4), compiled=True),
    _case(IMAGENET, F32, (16, 16), BOTH),
    _case(IMAGENET, F32, (16, 16), BOTH, mask_gradient=True),
    _case(IMAGENET, F32, (4, 4), plans=True),
    _case(IMAGENET, F32, (224, 224)),
    _case(TEXT, F32, (64, 300), BOTH),
]
ALL = [
    *(
        _case(shape, dtype, cells, mode, mask_gradient, compiled=shape == IMAGENET_256 and dtype == BF16 and mode == FORWARD)
        for shape, cells, dtypes in (
            (IMAGENET_256, (4, 4), (BF16,)),
            (IMAGENET_256, (16, 16), (BF16, F32)),
            (IMAGENET_256, (224, 224), (BF16,)),
            (TEXT, (64, 300), (BF16,)),
        )
        for dtype in dtypes
        for mode, mask_gradient in ((FORWARD, False), (BOTH, False), (BOTH, True))
    ),
    *(_case(IMAGENET_256, dtype, (4, 4), plans=True, compiled=dtype == BF16) for dtype in (BF16, F32)),
    _case(IMAGENET_256, BF16, (16, 16), BOTH, plans=True),
]


def test_mix_masked(measure, case, name):
    measure(case, name)
