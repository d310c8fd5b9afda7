"""`fastmix.soft_binary_cross_entropy` on a mixed batch beside eager torch, timm and torch.compile.

As in `bench_soft_cross_entropy`: everyone gets logits, class indices, a lam per row and the partners, and builds its own target
within the time; bytes moved are the logits read once and, where a gradient is asked for, their gradient written once.
"""

import torch

import fastmix
from fastmix.bench import peers
from fastmix.bench.case import BF16, F16, F32, Case, some_rows

FORWARD, BOTH = "forward", "forward + backward"
IMAGENET, IMAGENET_21K = (4096, 1000), (1024, 21841)


def mixed_loss(logits, y, lam, index):
    return fastmix.soft_binary_cross_entropy(logits, fastmix.Mix(lam, index).target(y))


def _loss(shape, dtype, mode=BOTH, upstream=1.0, lam_gradient=False, compiled=False, late=False):
    N, C = shape
    ways = {"fastmix": mixed_loss, **peers.BINARY_LOSS, **peers.LIBRARY_BINARY_LOSS}
    if compiled:
        ways |= {f"{name}, compiled": peers.compiled(way) for name, way in ways.items() if name != "fastmix"}

    def arguments(rows, device):
        rows = rows or N
        generator = torch.Generator(device).manual_seed(0)
        logits = (3 * torch.randn(rows, C, generator=generator, device=device)).to(dtype)
        y = torch.randint(C, (rows,), generator=generator, device=device)
        lam = torch.rand(rows, generator=generator, device=device)
        return [logits, y, lam, torch.arange(rows, device=device).flip(0)]

    def expected(arguments, copies, rows=None):
        """The oracle's, as a share of the mean over so many rows."""
        logits, y, lam, index = arguments
        target = torch.stack((y, y[index]), 1), torch.stack((lam, 1 - lam), 1).double()
        loss = fastmix.reference.soft_binary_cross_entropy(logits.double(), target)
        share = upstream * len(logits) / (rows or len(logits))
        dlogits, da = fastmix.reference.soft_binary_cross_entropy_grad(logits.double(), target, share)
        results = [loss, (dlogits, abs(dlogits).max()), (da[:, 0] - da[:, 1], abs(da).max())]
        return results[: 1 + (mode != FORWARD) + lam_gradient]

    def sample(arguments, g, results, copies):
        """Gradients of some rows; and the loss of all, by torch in float64."""
        logits, y, lam, index = arguments
        rows = some_rows(N).to(logits.device)
        few = [logits[rows].cpu(), y[rows].cpu(), lam[rows].cpu(), torch.arange(len(rows)).flip(0)]
        yield results[0], _all(*arguments), None
        for result, (value, scale) in zip(results[1:], expected(few, copies, N)[1:], strict=True):
            yield result[rows], value, scale

    def gradient(arguments):
        return torch.tensor(upstream, device=arguments[0].device)

    title = mode + ("" if upstream == 1 else f", upstream {upstream:g}") + " and lambda's" * lam_gradient
    logits_bytes = N * C * dtype.itemsize
    return Case(
        "soft binary cross-entropy", title, shape, dtype, ways, {FORWARD: 1, BOTH: 2}[mode] * logits_bytes, arguments, expected,
        mode=mode, sample=sample, kept=logits_bytes * (mode != FORWARD), late=late, leaves=(0, 2) if lam_gradient else (0,),
        upstream=gradient, checked=min(N, max(2, min(64, 2**20 // C))),
    )  # fmt: skip


def _all(logits, y, lam, index):
    """The mean loss, a few rows at a time, in float64: softplus(z), less t*z."""
    total, rows = 0.0, max(1, 2**24 // logits.shape[1])
    for at in torch.arange(len(logits), device=y.device).split(rows):
        z, own = logits[at].double(), lam[at].double()
        named = (z.gather(1, classes.unsqueeze(1)).squeeze(1) for classes in (y[at], y[index[at]]))
        mine, partners = named
        total += torch.nn.functional.softplus(z, threshold=50).sum() - (own * mine + (1 - own) * partners).sum()
    return float(total) / logits.numel()


LAPTOP = [
    _loss((128, 10), F32),
    _loss((256, 1000), F32, compiled=True),
    _loss((256, 1000), F32, FORWARD),
    _loss((256, 1000), F32, lam_gradient=True),
    _loss((256, 1000), BF16),
    _loss((256, 21841), F32),
]
ALL = [
    *(_loss(shape, dtype, compiled=dtype == BF16) for shape in (IMAGENET, IMAGENET_21K) for dtype in (BF16, F32)),
    *(_loss(shape, F16, upstream=65536.0) for shape in (IMAGENET, IMAGENET_21K)),
    *(_loss(shape, BF16, FORWARD) for shape in (IMAGENET, IMAGENET_21K)),
    _loss(IMAGENET, BF16, upstream=0.5),
    _loss(IMAGENET, BF16, lam_gradient=True),
]


def test_soft_binary_cross_entropy(measure, case, name):
    measure(case, name)
