"""`fastmix.soft_cross_entropy` on a mixed batch beside the ways to write it by hand and libraries', and on plain labels.

Everyone gets logits, class indices, a lam per row and the partners, and builds its own target within the time. The upstream
gradient is 1 as from `loss.backward()`, or another, as under a gradient scaler or beside other losses. Bytes moved are what
nobody can do without: the logits read once and, where a gradient is asked for, their gradient written once. fastmix forms the
gradient in its forward (not in float16): a backward alone is then all but free, and its forward is not.
"""

import torch

import fastmix
from fastmix.bench import peers
from fastmix.bench.case import BF16, F16, F32, Case

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
SMALL, CIFAR100 = (128, 10), (128, 100)
IMAGENET, IMAGENET_21K, LANGUAGE, LARGE_VOCABULARY = (4096, 1000), (1024, 21841), (2048, 32768), (512, 131072)
PIXELS = (8, 150, 512, 512)


def mixed_loss(logits, y, lam, index):
    return fastmix.soft_cross_entropy(logits, fastmix.Mix(lam, index).target(y))


def _loss(shape, dtype, mode=BOTH, upstream=1.0, lam_gradient=False, hard=False, compiled=False):
    N, C, *inner = shape
    if hard:
        ways = {"fastmix": fastmix.soft_cross_entropy, **peers.HARD_LOSS}
    else:
        ways = {"fastmix": mixed_loss, **peers.LOSS, **({} if inner else peers.LIBRARY_LOSS)}
    if compiled:
        extra = ("F.cross_entropy",) if hard else ("two hard losses", "dense target", "timm SoftTargetCrossEntropy")
        ways |= {f"{name}, compiled": peers.compiled(ways[name]) for name in extra if name in ways}

    def arguments(rows, device):
        rows, sizes = rows or N, inner
        if rows != N and inner:
            sizes = [min(size, 16) for size in inner]
        generator = torch.Generator(device).manual_seed(0)
        logits = (3 * torch.randn(rows, C, *sizes, generator=generator, device=device)).to(dtype)
        y = torch.randint(C, (rows, *sizes), generator=generator, device=device)
        lam = torch.rand(rows, generator=generator, device=device)
        return [logits, y] if hard else [logits, y, lam, torch.arange(rows, device=device).flip(0)]

    def expected(arguments, copies):
        logits, y, *rest = arguments
        target, slope = y, None
        if rest:
            lam, index = rest
            weights = torch.stack((lam, 1 - lam), 1).double()
            target = torch.stack((y, y[index]), 1), weights
        wide = logits.double()
        loss = fastmix.reference.soft_cross_entropy(wide, target)
        dlogits, *slope = fastmix.reference.soft_cross_entropy_grad(wide, target, upstream)
        if not lam_gradient:
            return [loss, dlogits][: 1 + (mode != FORWARD)]
        slope = torch.as_tensor(slope[0])
        dlam = (slope[:, 0] - slope[:, 1]).reshape(len(slope), -1).sum(1)
        return [loss, dlogits, (dlam, dlam.abs().max())]

    def gradient(arguments):
        return torch.tensor(upstream, device=arguments[0].device)

    title = mode + ("" if upstream == 1 else f", upstream {upstream:g}") + " and lambda's" * lam_gradient
    logits_bytes = torch.Size(shape).numel() * dtype.itemsize
    return Case(
        "hard cross-entropy" if hard else "soft cross-entropy", title, shape, dtype, ways,
        {FORWARD: 1, BACKWARD: 1, BOTH: 2}[mode] * logits_bytes, arguments, expected,
        mode=mode, leaves=(0, 2) if lam_gradient else (0,), upstream=gradient,
        checked=2 if inner else min(N, max(2, min(64, 2**20 // C))),
    )  # fmt: skip


def hard_case(*arguments, **options):
    return _loss(*arguments, hard=True, **options)


LAPTOP = [
    _loss(SMALL, F32),
    _loss(CIFAR100, F32),
    _loss((256, 1000), F32, compiled=True),
    _loss((256, 1000), F32, FORWARD),
    _loss((256, 1000), F32, upstream=0.5),
    _loss((256, 1000), F32, lam_gradient=True),
    _loss((256, 1000), BF16),
    _loss((1024, 1000), F32),
    _loss((256, 21841), F32),
    _loss((2, 150, 64, 64), F32),
    hard_case((256, 1000), F32),
]
ALL = [
    *(
        _loss(shape, dtype, compiled=dtype == BF16 and shape in (IMAGENET, IMAGENET_21K, LARGE_VOCABULARY))
        for shape in (IMAGENET, IMAGENET_21K, LARGE_VOCABULARY, SMALL, LANGUAGE, CIFAR100, PIXELS)
        for dtype in (BF16, F32)
    ),
    *(_loss(shape, F16, upstream=65536.0) for shape in (IMAGENET, IMAGENET_21K)),
    *(
        case
        for shape in (IMAGENET, IMAGENET_21K)
        for case in (
            _loss(shape, BF16, FORWARD),
            _loss(shape, BF16, upstream=0.5),
            _loss(shape, BF16, lam_gradient=True),
            _loss(shape, BF16, BACKWARD),
            hard_case(shape, BF16, compiled=shape == IMAGENET),
        )
    ),
    hard_case(LARGE_VOCABULARY, BF16),
    _loss(IMAGENET, F32, upstream=0.5),
    _loss(IMAGENET, F32, lam_gradient=True),
]


def test_soft_cross_entropy(measure, case, name):
    measure(case, name)
