"""`fastmix.mix` beside mixing by hand: mixup into a fresh tensor, into one that is there, its gradients, and CutMix.

Everyone answers the same question: one lam for the batch (a lam per row where it gets a gradient) and the reversed batch as
partners, since timm knows no other; CutMix has a box for each row. A copy of the batch is the floor. Bytes moved are what
nobody can do without: x (and the upstream gradient) read once and each result written once. (In place one need only move what
changes: timm's lines do less there than a floor that counts the whole batch.)
"""

import torch

import fastmix
from fastmix.bench import peers
from fastmix.bench.case import BF16, F16, F32, Case, some_rows

LAM = 0.3
CPU = torch.device("cpu")
CIFAR, IMAGENET, IMAGENET_256 = (128, 3, 32, 32), (64, 3, 224, 224), (256, 3, 224, 224)
HIDDEN, TABLE = (512, 196, 768), (4096, 128)


def mix_into(x, lam, index, out):
    return fastmix.mix(x, lam, index, out=out)


def cutmix(x, index, box, rows):
    return fastmix.mix(x, 1.0, index, box=box)


def random(shape, dtype, device, count=1):
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]


def flipped(rows, device):
    return torch.arange(rows, device=device).flip(0)


def upstream(arguments):
    return random(arguments[0].shape, arguments[0].dtype, arguments[0].device, 2)[1]


def with_compiled(ways):
    return {**ways, **{f"{name}, compiled": peers.compiled(way) for name, way in ways.items() if name in COMPILED}}


COMPILED = ("mixup-cifar10", "torch.where")  # a loop over rows would be unrolled, which takes minutes


def _mix(shape, dtype, mode, compiled=False, lam_gradient=False, out=False, late=False):
    x_bytes = torch.Size(shape).numel() * dtype.itemsize
    ways = {"fastmix": mix_into, **peers.MIX_INTO} if out else {"fastmix": fastmix.mix, **peers.MIX}
    if lam_gradient:
        ways.pop("copy")
    floor = {"forward": 2, "backward": 2, "forward + backward": 4}[mode] + lam_gradient

    def arguments(rows, device):
        rows = rows or shape[0]
        (x,) = random((rows, *shape[1:]), dtype, device)
        lam = torch.linspace(0.1, 0.9, rows, device=device) if lam_gradient else LAM
        return [x, lam, flipped(rows, device)] + [x.clone()] * out

    def expected(arguments, copies):
        x, lam, index = arguments[:3]
        x, g = x.double(), upstream(arguments).double()
        if copies:
            return [x, g][: 1 + (mode != "forward")]
        return answers(x, lam, index, g)

    def answers(x, lam, index, g):
        dx, dlam = fastmix.reference.mix_grad(g, x, lam, index)
        gradients = [dx, (dlam, (g * (x - x[index])).abs().flatten(1).sum(1).max())][: 1 + lam_gradient]
        return [fastmix.reference.mix(x, lam, index), *([] if mode == "forward" else gradients)]

    def sample(arguments, g, results, copies):
        rows = some_rows(shape[0]).to(arguments[0].device)
        x, g = (t[rows].cpu().double() for t in (arguments[0], arguments[0] if g is None else g))
        lam = arguments[1][rows].cpu() if lam_gradient else LAM
        values = [x, g] if copies else answers(x, lam, flipped(len(rows), CPU), g)
        for actual, value in zip(results, values, strict=False):
            if actual is not None:
                yield actual[rows], *(value if isinstance(value, tuple) else (value, None))

    title = mode + ", out=" * out + " and lambda's" * lam_gradient
    leaves = (0, 1) if lam_gradient else (0,)
    return Case(
        "mix", title, shape, dtype, with_compiled(ways) if compiled else ways, floor * x_bytes, arguments, expected,
        mode=mode, leaves=leaves, upstream=upstream, sample=sample, late=late,
        kept=x_bytes * {"forward": 1 - out, "backward": 1, "forward + backward": 2}[mode],
    )  # fmt: skip


def _cutmix(shape, dtype, compiled=False):
    ways = {"fastmix": cutmix, **peers.CUTMIX}

    def arguments(rows, device):
        (x,) = random((rows or shape[0], *shape[1:]), dtype, device)
        index = flipped(len(x), device)
        box = fastmix.CutMix(seed=0).sample(torch.empty(x.shape, device="cpu")).box
        return [x, index, box.to(device), list(zip(index.tolist(), box.tolist(), strict=True))]

    def expected(arguments, copies):
        x, index, box, _ = arguments
        return [fastmix.reference.mix(x.double(), 1.0, index, box)]

    def sample(arguments, g, results, copies):
        x, _, box, _ = arguments
        rows = some_rows(shape[0]).to(x.device)
        value = fastmix.reference.mix(x[rows].cpu().double(), 1.0, flipped(len(rows), CPU), box[rows].cpu())
        yield results[0][rows], value, None

    size = torch.Size(shape).numel() * dtype.itemsize
    ways = with_compiled(ways) if compiled else ways
    return Case("mix", "CutMix forward", shape, dtype, ways, 2 * size, arguments, expected, sample=sample, kept=size)


FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
LAPTOP = [
    _mix(CIFAR, F32, FORWARD, compiled=True),
    _mix(CIFAR, F32, FORWARD, out=True),
    _mix(CIFAR, F32, BOTH),
    _mix(CIFAR, F32, BOTH, lam_gradient=True),
    _mix(IMAGENET, F32, FORWARD, compiled=True),
    _mix(IMAGENET, F32, FORWARD, out=True),
    _mix(IMAGENET, F32, BOTH),
    _mix(IMAGENET, BF16, FORWARD),
    _mix(TABLE, F32, FORWARD),
    _cutmix(CIFAR, F32),
    _cutmix(IMAGENET, F32),
]
ALL = [
    *(
        _mix(shape, dtype, mode, compiled=dtype == BF16 and shape in (IMAGENET_256, HIDDEN) and not lam, lam_gradient=lam)
        for shape in (IMAGENET_256, HIDDEN, CIFAR, IMAGENET, TABLE)
        for dtype in (BF16, F32)
        for mode, lam in ((FORWARD, False), (BOTH, False), (BOTH, True))
    ),
    _mix(IMAGENET_256, BF16, FORWARD, out=True),
    _mix(IMAGENET_256, F32, BACKWARD),
    _mix(HIDDEN, BF16, BACKWARD),
    _mix(HIDDEN, BF16, BACKWARD, lam_gradient=True),
    _mix(IMAGENET_256, F16, BOTH),
    *(
        _cutmix(shape, dtype, compiled=dtype == BF16 and shape == IMAGENET_256)
        for shape in (IMAGENET_256, IMAGENET, CIFAR)
        for dtype in (BF16, F32)
    ),
]


def test_mix(measure, case, name):
    measure(case, name)
