"""The registered operators: opcheck of every one."""

import pytest
import torch
from numerics import FLOATS, accumulator, target_of
from plain import COMPILED, C, backend_name, interpreted, leaf

from fastmix._torch.augmix_steps import OPERATIONS, step_numbers
from fastmix.bench.ops import ENTRIES
from fastmix.bench.samples import Draw


def with_gradients(*tensors):
    return [t if t is None or not t.is_floating_point() else leaf(t) for t in tensors]


def mix_samples(name, device):
    ops = torch.ops.fastmix
    wide = torch.randn(8, 4, 6, 9, device=device)
    images = wide[:4, :3, :, :5].contiguous()
    for x, boxes in (
        (images, 0),
        (images.contiguous(memory_format=torch.channels_last), 2),
        (wide[::2, 1:3, ::2], 2),
        (wide[:1].expand(4, 4, 6, 9), 0),
        (wide[:4].permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3), 1),
        (wide[:4, 0, 0, 0], 0),
        (wide.view(2, 4, 3, 4, 18), 3),
        (torch.randn(0, 6, 9, device=device), 1),
    ):
        N = x.shape[0]
        index = torch.randint(0, max(N, 1), (N,), device=device)
        box = torch.randint(-1, 6, (N, 2 * boxes), device=device) if boxes else None
        lam = torch.rand(N if boxes != 1 else (), device=device)
        yield ops.mix.default, (*with_gradients(x, lam), index, box, name)
        g = torch.randn_like(x)
        for need_dx, need_dlam in ((True, True), (True, False), (False, True)):
            yield ops.mix_backward.default, (g, x if need_dlam else None, lam, index, box, need_dx, need_dlam, name)


def resize_mix_samples(name, device):
    ops = torch.ops.fastmix
    for n, dtype in enumerate(FLOATS):
        x = torch.randn(3, 2, 6, 4).to(device, dtype)
        x = x.contiguous(memory_format=torch.channels_last) if n % 2 else x
        index, box = (
            torch.tensor([1, 2, 0], device=device),
            torch.tensor([[0, 1, 4, 3], [0, 0, 6, 4], [2, 2, 2, 2]], device=device),
        )
        yield ops.resize_mix.default, (leaf(x), index, box, name)
        yield ops.resize_mix_backward.default, (torch.randn_like(x), index, box, name)


def cross_entropy_samples(name, device):
    ops = torch.ops.fastmix
    reductions = ("mean", "sum", "none")
    layouts = [
        ((4, C), torch.contiguous_format),
        ((2, C, 3, 4), torch.channels_last),
        ((2, C, 3), torch.contiguous_format),
        ((2, C, 2, 3, 2), torch.contiguous_format),
        ((3, 1), torch.contiguous_format),
        ((0, C), torch.contiguous_format),
    ]
    for n in range(12):
        (shape, layout), reduction, K = layouts[n % 6], reductions[n // 3 % 3], 1 + n % 3
        dtype = (torch.float32, torch.float16, torch.bfloat16, torch.float64)[n % 4]
        N, classes_count, *inner = shape
        if N == 0 and reduction == "mean":
            reduction = "sum"  # a mean over nothing is NaN, which opcheck does not find equal to itself
        z = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
        wide = accumulator(dtype)
        w = torch.rand(classes_count, dtype=wide, device=device) if n % 2 else None
        e = (0.0, 0.1)[n // 2 % 2]
        classes = torch.randint(0, classes_count, (N, K, *inner), device=device)
        classes[1:2, :1] = -100
        weights = (None, torch.rand(N, K, device=device), torch.rand(N, K, *inner, device=device))[n // 4 % 3]
        need = weights is not None and n % 5 != 0
        target = (leaf(weights) if need else weights), classes, w, -100, e
        yield ops.soft_cross_entropy.default, (leaf(z), *target, reduction, need, name)
        loss, denominator, stats, _ = ops.soft_cross_entropy(z, weights, *target[1:], reduction, False, name)
        g = torch.randn_like(loss)
        denominator = denominator if reduction == "mean" else None
        yield ops.soft_cross_entropy_backward.default, (g, z, weights, *target[1:], denominator, stats, name)
        t = torch.rand(shape, dtype=torch.bfloat16 if n % 4 == 1 else torch.float32, device=device)
        mixing = n % 3 > 0
        lam, index = torch.rand(() if n < 6 else N, device=device), torch.randint(0, max(N, 1), (N,), device=device)
        options = w, 0, e, reduction, *((lam, index) if mixing else (None, None))
        yield ops.dense_cross_entropy.default, (leaf(z), t if mixing else leaf(t), *options, name)
        loss, stats = ops.dense_cross_entropy(z, t, *options, name)
        needed = (True, False) if mixing else ((True, True), (False, True))[n // 3 % 2]
        yield ops.dense_cross_entropy_backward.default, (torch.randn_like(loss), z, t, *options, stats, *needed, name)


def mix_images_samples(name, device):
    ops = torch.ops.fastmix
    images = torch.randint(0, 256, (4, 3, 6, 8), dtype=torch.uint8, device=device)
    factor, shift = torch.rand(2, 3, device=device)
    flip, index = torch.rand(4, device=device) < 0.5, torch.randint(0, 4, (4,), device=device)
    lam, mask = torch.rand(4, device=device), torch.rand(4, 3, 2, device=device)
    box, plan = torch.randint(-1, 8, (4, 4), device=device), torch.randint(0, 6, (4, 6), device=device)
    for how in (
        (None,) * 6,
        (*with_gradients(lam), None, index, None, None, None),
        (*with_gradients(lam), None, index, box, None, None),
        (None, *with_gradients(mask), index, None, plan, plan),
    ):
        yield ops.mix_images.default, (images, factor, shift, flip, *how, torch.float32, False, name)
        yield ops.mix_images.default, (images, factor, shift, None, *how, torch.bfloat16, True, name)


def mix_masked_samples(name, device):
    ops = torch.ops.fastmix
    for layout, plans in ((torch.contiguous_format, True), (torch.channels_last, False)):
        x, g = (torch.randn(3, 2, 4, 6, device=device).contiguous(memory_format=layout) for _ in range(2))
        mask = (torch.rand(3, 2, 3, device=device) * 1.5 - 0.25).round(decimals=2)
        index = torch.tensor([1, 2, 2], device=device)
        plan, partner_plan = (torch.randint(0, 6, (3, 6), device=device) if plans else None for _ in range(2))
        how = index, plan, partner_plan
        yield ops.mix_masked.default, (*with_gradients(x, mask), *how, name)
        for needs in ((True, True), (True, False), (False, True)):
            yield ops.mix_masked_backward.default, (g, x if needs[1] else None, mask, *how, *needs, name)


def convex_combination_samples(name, device):
    ops = torch.ops.fastmix
    wide = torch.randn(3, 8, 4, 6, 9, device=device)
    layouts = (
        wide[:, :4, :3, :, :5].contiguous(),
        wide[:, :4].contiguous().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),  # channels_last
        wide[:, ::2, 1:3, ::2],
        wide[:, :, 0, 0, 0],
        wide[:, :0],
    )
    for n, stack in enumerate(layouts):
        g, weights = torch.randn_like(stack[0]), torch.rand(stack.shape[1], 3, device=device)
        for stacked, sources in ((True, [stack]), (False, list(stack))):
            some = [(True,), (True, False, True)][not stacked] if n % 2 else [True] * len(sources)
            leaves = [t.detach().clone().requires_grad_(flag) for t, flag in zip(sources, some, strict=True)]
            yield ops.convex_combination.default, (leaves, weights.clone().requires_grad_(n != 2), stacked, name)
            arguments = g, sources if n % 2 else [], weights, stacked, list(some), bool(n % 2), name
            yield ops.convex_combination_backward.default, arguments


def binary_cross_entropy_samples(name, device):
    ops = torch.ops.fastmix
    shapes = [((4, 6), torch.contiguous_format), ((2, 6, 3, 4), torch.channels_last), ((2, 6, 3), torch.contiguous_format)]
    for n, ((shape, layout), reduction) in enumerate(zip(shapes, ("mean", "sum", "none"), strict=True)):
        dtype = (torch.float32, torch.bfloat16, torch.float64)[n]
        wide = torch.promote_types(dtype, torch.float32)
        z = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
        target, _, weights = target_of(("k-hot", "k-hot per pixel")[n % 2], shape, device=device)
        w = torch.rand(6, dtype=wide, device=device) if n else None
        options = w, w, 0.1, (None, 0.3)[n % 2], ("mean", "sum")[n % 2], reduction
        t = torch.rand(shape, device=device, requires_grad=True)
        g = torch.ones((shape[0], *shape[2:]) if reduction == "none" else (), dtype=wide, device=device)
        mixing = torch.rand(shape[0] if n else (), device=device), torch.arange(shape[0], device=device).flip(0)
        detached = z.detach(), weights.detach(), target.classes, *options
        dense = z.detach(), t.detach(), *options
        yield ops.soft_binary_cross_entropy.default, (z, weights, target.classes, *options, n % 2 == 0, name)
        yield ops.soft_binary_cross_entropy_backward.default, (g, *detached, name)
        yield ops.dense_binary_cross_entropy.default, (z, t, *options, None, None, name)
        yield ops.dense_binary_cross_entropy.default, (z, t.detach(), *options, *mixing, name)
        yield ops.dense_binary_cross_entropy_backward.default, (g, *dense, None, None, True, n != 1, name)
        yield ops.dense_binary_cross_entropy_backward.default, (g, *dense, *mixing, True, False, name)


def js_divergence_samples(name, device):
    ops = torch.ops.fastmix
    for n, dtype in enumerate(FLOATS):
        z = (torch.randn(1, 4, 7) + 2 * torch.randn(3, 4, 7)).to(device, dtype)
        reduction = ("mean", "sum", "none")[n % 3]
        for stacked in (True, False):
            given = [z] if stacked else list(z.transpose(1, 2).contiguous().transpose(1, 2).unbind())
            yield ops.js_divergence.default, ([leaf(t) for t in given], 2.0, reduction, stacked, name)
            loss, stats = ops.js_divergence(given, 2.0, reduction, stacked, name)
            need = [True] if stacked else [n % 2 == 0, True, False]
            arguments = torch.randn_like(loss), given, 2.0, reduction, stacked, stats, need, name
            yield ops.js_divergence_backward.default, arguments


def sampling_samples(name, device):
    ops = torch.ops.fastmix
    key = torch.tensor([3, 4, 5, 0], device=device)
    # kind, owner, stream, per, partner, label, a, b, prob, correct, least, most, parent, low, high
    mixup = [1, 0, 0, 0, 0, 0, 0.4, 0.4, 0.7, 1, 0, 0, -1, 0, 0]
    cutmix, given = [2, 0, 0, 1, 0, 1, 1.0, 2.0, 1, 0, 0, 0, -1, 0, 0], [3, 0, 0, 0, 3, 2, 1, 1, 1, 1, 0.2, 0.7, -1, 0, 0]
    mask = [4, 0, 0, 2, 1, 0, 0.4, 0.4, 1, 1, 0, 0, -1, 0, 0]
    # owners whose keys give partners, pairs, owner whose pairs choose, dimensions of boxes, cells of masks, float64
    for x, row, plan in (
        (torch.zeros(5, 3, device=device), mixup, [1, 0, -1, 0, -1, -1, 0]),
        (torch.zeros(4, 3, 8, 6, device=device, dtype=torch.float64), cutmix, [1, 1, -1, 2, -1, -1, 1]),
        (torch.zeros(4, 3, 8, device=device), given, [0, 0, -1, 1, -1, -1, 0]),
        (torch.zeros(3, 8, 6, device=device), mask, [0, 0, -1, 0, 2, 3, 0]),
        (torch.zeros(0, 3, device=device), mixup, [1, 0, -1, 0, -1, -1, 0]),
    ):
        rows = torch.arange(len(x), device=device)
        partners = torch.stack((rows.flip(0), rows)).unsqueeze(0) if row is given else None
        table = torch.tensor([row], dtype=torch.float64, device=device)
        for y in (None, rows):
            yield ops.sample.default, ([key], table, x, y, partners, plan, name)
        yield ops.row_keys.default, (key, x, 2, name)
    for numbers, dtype in (([0.4], torch.float32), ([0.4, 1.0, 2.0], torch.float64)):
        numbers = torch.tensor(numbers, dtype=torch.float64, device=device)
        yield ops.dirichlet.default, (key, 4, 3, numbers, dtype, torch.device(device), name)
    for normal in (True, False):
        yield ops.draw_numbers.default, (key, 3, 5, normal, torch.device(device), name)
    numbers = step_numbers(3.0, 5, 6, OPERATIONS)
    yield ops.augmix_steps.default, (key, 4, 3, True, numbers, torch.device(device), name)


def augmix_samples(name, device):
    s = ENTRIES["augmix"].sample(Draw(device, torch.float32), (2, 3, 4, 6), torch.float32)
    yield torch.ops.fastmix.augmix.default, (s.images, s.kinds, s.values, s.weights, s.factor, s.shift, name)


def puzzle_samples(name, device):
    ops = torch.ops.fastmix
    for n, levels in ((2, 2), (4, 3)):
        unary, edges = torch.rand(3, n, n, levels, device=device), torch.rand(2, 3, n * (n - 1), device=device)
        vertical, horizontal = edges[0].view(3, n - 1, n), edges[1].view(3, n, n - 1)
        yield ops.grid_cut.default, (unary, vertical, horizontal, 20, name)
        x, map_ = torch.rand(3, 2, 8, 8, device=device), torch.rand(3, 8, 8, device=device)
        index, lam = torch.tensor([1, 2, 0], device=device), torch.rand(3, device=device)
        yield ops.puzzle_costs.default, (x, map_, index, lam, n, [0.5, 0.2], levels, 1.2, 0.5, 0.2, 2, name)
        mask, saliency = torch.rand(3, n, n, device=device).round(), torch.rand(3, n, n, device=device)
        yield ops.transport_plan.default, (mask, saliency, 0.1, None, n, name)
        yield ops.transport_plan.default, (mask, saliency, 0.0, torch.tensor(0.1, dtype=torch.float64), n, name)


SAMPLES = {  # of each op: (operator, arguments) of its operators
    "mix": mix_samples,
    "mix_images": mix_images_samples,
    "mix_masked": mix_masked_samples,
    "resize_mix": resize_mix_samples,
    "convex_combination": convex_combination_samples,
    "cross_entropy": cross_entropy_samples,
    "binary_cross_entropy": binary_cross_entropy_samples,
    "js_divergence": js_divergence_samples,
    "sampling": sampling_samples,
    "puzzle": puzzle_samples,
    "augmix": augmix_samples,
}


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("op", SAMPLES)
def test_operators_keep_their_promises(op, device):
    """opcheck: schema, fake results (shapes, dtypes, strides), autograd registration; and now and then, since it is slow, the same
    under AOT dispatch, which does not see the backend: on torch and on a GPU. In the interpreter each operator's first sample, and every
    third of the others."""
    cheap, seen, backend = ("test_schema", "test_autograd_registration", "test_faketensor"), set(), backend_name()
    few = interpreted(device)
    for n, (operator, arguments) in enumerate(SAMPLES[op](backend, device)):
        first = operator not in seen
        if few and not first and n % 3:
            continue
        seen.add(operator)
        dispatched = (first or n % 7 == 0) and (backend == "torch" or device.type == "cuda")
        tests = (*cheap, "test_aot_dispatch_dynamic") if dispatched else cheap
        torch.library.opcheck(operator, arguments, test_utils=tests, atol=1e-5, rtol=1e-4)


def test_every_operator_is_sampled():
    """An operator that is registered, and its backward, is among the samples."""
    sampled = {operator.name() for samples in SAMPLES.values() for operator, _ in samples("torch", "cpu")}
    assert sampled == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastmix::")}
