"""`fastmix.soft_cross_entropy` on a mixed batch beside the ways to write it by hand and libraries', and on plain labels.

Everyone gets logits, class indices, a lam per row and the partners, and builds its own target within the time. The upstream
gradient is 1 as from `loss.backward()`, or another, as under a gradient scaler or beside other losses. Bytes moved are what
nobody can do without: the logits read once and, where a gradient is asked for, their gradient written once. fastmix forms the
gradient in its forward (not in float16): a forward for a backward then costs more, and a backward alone next to nothing, so these
two are shown but not compared.
"""

import torch

import fastmix
from fastmix.bench import peers
from fastmix.bench.case import BF16, F16, F32, Case, some_rows

FORWARD, BACKWARD, BOTH, FORMING = "forward", "backward", "forward + backward", "forward, for a backward"
SMALL, CIFAR100 = (128, 10), (128, 100)
IMAGENET, IMAGENET_21K, LANGUAGE, LARGE_VOCABULARY = (4096, 1000), (1024, 21841), (2048, 32768), (512, 131072)
PIXELS = (8, 150, 512, 512)


def mixed_loss(logits, y, lam, index):
    return fastmix.soft_cross_entropy(logits, fastmix.Mix(lam, index).target(y))


def _loss(shape, dtype, mode=BOTH, upstream=1.0, lam_gradient=False, hard=False, compiled=False, late=False):
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
        scale = abs(dlogits).max()  # a row that is as good as learnt has a small gradient, which cancels out of larger numbers
        if not lam_gradient:
            return [loss, (dlogits, scale)][: 1 + (mode != FORWARD)]
        slope = torch.as_tensor(slope[0])
        dlam = (slope[:, 0] - slope[:, 1]).reshape(len(slope), -1).sum(1)
        return [loss, (dlogits, scale), (dlam, dlam.abs().max())]

    def sample(arguments, g, results, copies):
        """Gradients of some rows, some pixels of each; and the loss of all, by torch in float64."""
        logits, y, *rest = arguments
        rows = some_rows(N).to(logits.device)
        corner = (slice(0, 8),) * len(inner)
        classes, pixels = (slice(None), slice(None), *corner), (slice(None), *corner)
        few = [logits[rows][classes].cpu(), y[rows][pixels].cpu()]
        if rest:
            few += [rest[0][rows].cpu(), torch.arange(len(rows)).flip(0)]
        share = few[1].numel() / y.numel()
        loss, *gradients = results
        if loss is not None:
            yield loss, _all(*arguments), None
        values = expected(few, False)[1:]
        if mode != FORMING and gradients:
            yield gradients[0][rows][classes], values[0][0] * share, values[0][1] * share
        if lam_gradient and not inner:
            yield gradients[1][rows], values[1][0] * share, values[1][1] * share

    def gradient(arguments):
        return torch.tensor(upstream, device=arguments[0].device)

    title = mode + ("" if upstream == 1 else f", upstream {upstream:g}") + " and lambda's" * lam_gradient
    logits_bytes = torch.Size(shape).numel() * dtype.itemsize
    return Case(
        "hard cross-entropy" if hard else "soft cross-entropy", title, shape, dtype, ways,
        {FORWARD: 1, BOTH: 2}.get(mode, 0) * logits_bytes, arguments, expected,
        mode=mode, sample=sample, kept=logits_bytes * (mode != FORWARD), part=mode in (FORMING, BACKWARD), late=late, leaves=(0, 2) if lam_gradient else (0,), upstream=gradient,
        checked=2 if inner else min(N, max(2, min(64, 2**20 // C))),
    )  # fmt: skip


def _all(logits, y, lam=None, index=None):
    """The mean loss, a few rows at a time, in float64 where they are."""
    total, rows = 0.0, max(1, 2**24 // logits[0].numel())
    for at in torch.arange(len(logits), device=y.device).split(rows):
        log = logits[at].double().log_softmax(1)
        own = -log.gather(1, y[at].unsqueeze(1)).flatten(1).sum(1)
        if lam is None:
            total += own.sum()
        else:
            partner = -log.gather(1, y[index[at]].unsqueeze(1)).flatten(1).sum(1)
            total += (lam[at] * own + (1 - lam[at].double()) * partner).sum()
    return float(total) / y.numel()


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
            _loss(shape, BF16, FORMING),
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
