"""What only a GPU shows: nothing waits for it, CUDA graphs, streams, memory, tensors beyond 2**31 elements. (Values and
gradients are tested there by the ops' own tests, and so are grid limits, several GPUs and wrong indices.)"""

import numpy as np
import pytest
import torch
from numerics import LAMBDA, assert_close, numpy
from torch.testing import assert_close as same

import fastmix
from fastmix import CutMix, Mix, MixedRows, Mixup, SoftTarget

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("device", ["gpu"], indirect=True)]
C = 37


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """Several processes may share the GPU."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Everything that a step may call, by name: tensors that new values are copied into, and a function of them


def mixing(device, dtype=torch.float32, channels_last=False, box=True, shape=(16, 3, 12, 12)):
    x, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    if channels_last:
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    corners = torch.randint(0, 13, (2, 16, 2), device=device)
    inputs = [x, g, torch.rand(16, device=device), torch.randint(0, 16, (16,), device=device)]
    inputs += [torch.cat((corners.amin(0), corners.amax(0)), 1)] if box else []

    def step(x, g, lam, index, box=None):
        x, lam = x.detach().requires_grad_(), lam.detach().requires_grad_()
        out = fastmix.mix(x, lam, index, box=box)
        return out.detach(), *torch.autograd.grad(out, (x, lam), g)

    return inputs, step


def into(device):
    x, out = torch.randn(2, 16, 300, device=device)
    inputs = [x, torch.rand(16, device=device), torch.randint(0, 16, (16,), device=device)]
    return inputs, lambda x, lam, index: fastmix.mix(x, lam, index, out=out).clone()


def loss(device, dtype=torch.float32, inner=(), kind="k-hot", weighted=False, **options):
    N, shape = 16, (16, C, *inner)
    z, classes = torch.randn(shape, device=device).to(dtype), torch.randint(0, C, (N, 2, *inner), device=device)
    by_row = options.get("reduction") == "none"
    up = torch.rand((N, *inner) if by_row else (), device=device)
    soft = torch.rand(shape if kind == "dense" else (N, 2), device=device)
    weight = torch.rand(C, device=device) if weighted else None

    def step(z, classes, soft, up):
        z, soft = z.detach().requires_grad_(), soft.detach().requires_grad_()
        target = soft if kind == "dense" else SoftTarget(classes, soft)
        value = fastmix.soft_cross_entropy(z, target, weight=weight, **options)
        first = torch.autograd.grad(value, (z, soft), up, retain_graph=True)
        return value.detach(), *first, *torch.autograd.grad(value, (z,), torch.ones_like(up))

    return [z, classes, soft, up], step


def indices(device):
    z, y = torch.randn(16, C, device=device), torch.randint(0, C, (16,), device=device)

    def step(z, y):
        z = z.detach().requires_grad_()
        value = fastmix.soft_cross_entropy(z, y, ignore_index=3)
        return value.detach(), *torch.autograd.grad(value, z)

    return [z, y], step


def rows(device):
    inputs = [torch.randn(16, C, device=device), torch.rand(16, C, device=device), torch.rand(16, device=device)]
    index = torch.randperm(16, device=device)

    def step(z, values, lam):
        z, lam = z.detach().requires_grad_(), lam.detach().requires_grad_()
        value = fastmix.soft_cross_entropy(z, MixedRows(values, lam, index), label_smoothing=0.1)
        return value.detach(), *torch.autograd.grad(value, (z, lam))

    return inputs, step


def targets(device):
    """Targets of mixed labels and of label maps, and what a training loop logs."""
    inputs = [torch.randn(16, C, device=device), torch.rand(16, device=device), torch.randint(0, C, (16,), device=device)]
    index, maps = torch.randperm(16, device=device), torch.randint(0, C, (16, 6, 5), device=device)
    box = torch.randint(0, 6, (16, 4), device=device)

    def step(z, lam, y):
        target, cut = Mix(lam, index).target(y), Mix(lam, index, box=box).target(maps)
        hard = target.argmax()
        accuracies = [fastmix.mixed_accuracy(z, t, k) for t in (target, y, target.dense(C)) for k in (1, 5)]
        return (target.weights, cut.weights, cut.classes, hard, target.dense(C), *accuracies)

    return inputs, step


def host_lambdas(device):
    """A lambda from the host is moved without waiting."""
    inputs = [torch.randn(16, 40, device=device)]
    index, host = torch.randperm(16, device=device), torch.tensor(0.25)
    return inputs, lambda x: (fastmix.mix(x, 0.5, index), fastmix.mix(x, host, index))


BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
STEPS = {
    "mix": lambda device: mixing(device, box=False),
    "mix, float16, boxes, channels_last": lambda device: mixing(device, F16, channels_last=True),
    "mix into out": into,
    "loss": loss,
    "loss, smoothing, class weights, bfloat16": lambda device: loss(device, BF16, weighted=True, label_smoothing=0.1),
    "loss, float16, by row": lambda device: loss(device, F16, reduction="none"),
    "loss, float64, sum": lambda device: loss(device, F64, reduction="sum"),
    "loss per pixel": lambda device: loss(device, inner=(6, 5), weighted=True),
    "loss of probabilities": lambda device: loss(device, BF16, kind="dense", label_smoothing=0.1),
    "loss of class indices": indices,
    "loss of mixed rows": rows,
    "targets and accuracies": targets,
}


@pytest.mark.parametrize("name", [*STEPS, "host lambdas"])
def test_nothing_waits_for_the_device(name, device):
    inputs, step = host_lambdas(device) if name == "host lambdas" else STEPS[name](device)
    expected = step(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(results, expected, rtol=0, atol=0)  # the same bits, too


def test_the_check_for_waiting_works(device):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=device).item()
        with fastmix.debug(), pytest.raises(RuntimeError, match="synchroniz"):
            fastmix.mix(torch.zeros(2, 3, device=device), 0.5, torch.zeros(2, dtype=torch.int64, device=device))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step, inputs):
    """(graph, what it computes) of a step that has run before, on another stream as capture needs it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*inputs)
    return graph, results


@pytest.mark.no_poison
@pytest.mark.parametrize("name", STEPS)
def test_replays_follow_new_values(name, device):
    inputs, step = STEPS[name](device)
    graph, results = captured(step, inputs)
    seen = []
    for n in range(3):
        torch.manual_seed(n)
        for held, new in zip(inputs, STEPS[name](device)[0], strict=True):
            held.copy_(new)
        graph.replay()
        same(results, step(*inputs), rtol=0, atol=0)
        seen.append((results if isinstance(results, torch.Tensor) else results[0]).square().sum().item())
    assert len(set(seen)) == 3


@pytest.mark.no_poison
@pytest.mark.parametrize(
    "sampler", [Mixup(0.4), CutMix(), Mixup(0.4, partner="different", per="pair")], ids=["mixup", "cutmix", "pairs"]
)
def test_captured_samplers_draw_anew(sampler, device):
    """From torch's own generator, whose place in its sequence every replay moves."""
    x, y = torch.randn(16, 3, 12, 12, device=device), torch.arange(16, device=device) % 4
    graph, (mixed, target) = captured(lambda x, y: sampler(x, y), [x, y])
    seen = []
    for _ in range(4):
        graph.replay()
        seen.append(mixed.clone())
        assert torch.isfinite(mixed).all()
        same(target.weights.sum(1), torch.ones(16, device=device))
    assert all(not torch.equal(seen[a], seen[b]) for a in range(4) for b in range(a))


@pytest.mark.no_poison
def test_inductor(device):
    """A step compiled by the default compiler is the eager one, for other lambdas and a smaller batch, and waits for nothing."""
    w = torch.randn(300, C, device=device, requires_grad=True)

    def step(x, y, lam, index):
        m = Mix(lam, index)
        return fastmix.soft_cross_entropy(m.apply(x).flatten(1) @ w, m.target(y), label_smoothing=0.1)

    def batch(n):
        x, lam = torch.randn(n, 3, 10, 10, device=device), torch.rand(n, device=device, requires_grad=True)
        return x, torch.randint(0, C, (n,), device=device), lam, torch.randint(0, n, (n,), device=device)

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (16, 16, 11):
        inputs = batch(n)
        results, expected = ((value, *torch.autograd.grad(value, (inputs[2], w))) for value in (fast(*inputs), step(*inputs)))
        same(results, expected, rtol=1e-4, atol=1e-5)  # the product with w is not ours, and may be formed in another order
    inputs = batch(16)
    torch.autograd.grad(fast(*inputs), w)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(fast(*inputs), w)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream(device):
    """A launch that went to another stream would read what is not yet written."""
    x, index = torch.zeros(64, 2**16, device=device), torch.arange(64, device=device).roll(1)
    z, y = torch.zeros(2**12, 1000, device=device), torch.zeros(2**12, dtype=torch.int64, device=device)
    expected_z, expected_x = torch.randn(z.shape, device=device), torch.randn(x.shape, device=device)

    def step(x, z):
        x, z = x.detach().requires_grad_(), z.detach().requires_grad_()
        mixed, value = fastmix.mix(x, 0.25, index), fastmix.soft_cross_entropy(z, y)
        return mixed.detach(), value.detach(), *torch.autograd.grad(mixed.square().sum() + 3 * value, (x, z))

    expected = step(expected_x, expected_z)
    side = torch.cuda.Stream()
    for _ in range(5):
        x.zero_()
        z.zero_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**7)  # some milliseconds
            x.copy_(expected_x)
            z.copy_(expected_z)
            results = step(x, z)
        torch.cuda.current_stream().wait_stream(side)
        same(results, expected, rtol=0, atol=0)


def test_states_of_generators_on_the_device(device):
    x = torch.randn(16, 3, 8, 8, device=device)
    sampler = Mixup(0.4, seed=3)
    sampler.sample(x)
    state = sampler.state_dict()
    expected = [sampler.sample(x).lam for _ in range(3)]
    other = Mixup(0.4, seed=4)
    other.load_state_dict(state)
    same([other.sample(x).lam for _ in range(3)], expected, rtol=0, atol=0)


@pytest.mark.no_poison
def test_peak_memory_is_results_and_a_few_numbers_a_row(device):
    """No dense target, no copy of logits or images."""
    N, classes = 1024, 4096
    z = torch.randn(N, classes, device=device, requires_grad=True)
    x, index = torch.randn(N, classes, device=device, requires_grad=True), torch.randperm(N, device=device)
    lam = torch.rand(N, device=device, requires_grad=True)
    target = Mix(lam, index).target(torch.randint(0, classes, (N,), device=device))
    g = torch.ones_like(x)

    def peak(call):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    whole, some = z.numel() * 4, 2**20  # index, its order, sums by tile
    assert peak(lambda: fastmix.mix(x.detach(), lam.detach(), index)) <= whole + some
    assert peak(lambda: torch.autograd.grad(fastmix.mix(x, lam, index), (x, lam), g)) <= 2 * whole + some
    assert peak(lambda: torch.autograd.grad(fastmix.mix(x.detach(), lam, index), lam, g)) <= whole + some
    assert peak(lambda: fastmix.soft_cross_entropy(z.detach(), target)) <= some
    assert peak(lambda: torch.autograd.grad(fastmix.soft_cross_entropy(z, target), z, retain_graph=True)) <= whole + some


def test_a_pinned_lambda_may_be_written_again(device):
    """While the device has not come to the mix yet: the number at the time of the call counts."""
    x, index = torch.randn(4, 300, device=device), torch.arange(4, device=device).flip(0)
    lam = torch.tensor(0.25).pin_memory()
    expected = fastmix.mix(x, 0.25, index)
    torch.cuda._sleep(int(2e8))
    mixed = fastmix.mix(x, lam, index)
    lam.fill_(0.75)
    same(mixed, expected, rtol=0, atol=0)


# Beyond 2**31 elements. (5 to 35 GB each.)


def dlam_of(g, x, index, columns=2**26):
    """(<g[i], x[i] - x[index[i]]>, the sum of the terms' sizes) in float64, piece by piece."""
    value, size = torch.zeros(2, len(x), dtype=F64, device=x.device)
    for start in range(0, x.shape[1], columns):
        at = slice(start, start + columns)
        for i, j in enumerate(index.tolist()):
            term = g[i, at].double() * (x[i, at].double() - x[j, at].double())
            value[i] += term.sum()
            size[i] += term.abs().sum()
    return value.cpu().numpy(), size.cpu().numpy()


@pytest.mark.no_poison
@pytest.mark.parametrize("shape", [(5, 2**29 + 3), (2, 2**31 + 24)], ids=["in all", "in a row"])
def test_mixing_beyond_32_bit_offsets(shape, device, much_memory):
    x = torch.empty(shape, dtype=BF16, device=device).normal_().requires_grad_()
    g = torch.empty(shape, dtype=BF16, device=device).normal_()
    index = torch.arange(shape[0], device=device).flip(0)
    lam = torch.linspace(0.25, 0.75, shape[0], device=device).requires_grad_()
    out = fastmix.mix(x, lam, index)
    dx, dlam = torch.autograd.grad(out, (x, lam), g)
    out = out.detach()
    own, source = lam.detach().double()[:, None], x.detach()
    for at in (slice(0, 70), slice(shape[1] // 2, shape[1] // 2 + 70), slice(shape[1] - 70, shape[1])):
        mixed = own * source[:, at].double() + (1 - own) * source[index, at].double()
        assert_close(out[:, at], numpy(mixed), BF16)
        assert_close(dx[:, at], numpy(own * g[:, at].double() + (1 - own.flip(0)) * g[index, at].double()), BF16)
    expected, size = dlam_of(g, source, index)
    assert np.all(np.abs(numpy(dlam) - expected) <= LAMBDA[torch.float32] * size)


@pytest.mark.no_poison
@pytest.mark.parametrize("kind", ["k-hot", "dense"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["formed forward", "formed backward"])
def test_a_loss_beyond_32_bit_offsets(kind, dtype, device, much_memory):
    N, classes = 16500, 2**17 + 1  # the rows before the last 116 end at 2**31
    z = torch.empty(N, classes, dtype=dtype, device=device).normal_().requires_grad_()
    if kind == "dense":
        target = leaf = torch.empty(N, classes, dtype=dtype, device=device).uniform_().requires_grad_()
    else:
        leaf = torch.rand(N, 2, device=device, requires_grad=True)
        target = SoftTarget(torch.randint(0, classes, (N, 2), device=device), leaf)
    up = torch.rand(N, device=device) + 0.5
    value = fastmix.soft_cross_entropy(z, target, label_smoothing=0.1, reduction="none")
    gradients = torch.autograd.grad(value, (z, leaf), up)
    some = torch.tensor([0, 8191, 16382, 16383, 16384, N - 1], device=device)
    t = numpy(leaf[some]) if kind == "dense" else (numpy(target.classes[some]), numpy(leaf[some]))
    options = {"label_smoothing": 0.1, "reduction": "none"}
    expected = fastmix.reference.soft_cross_entropy(numpy(z[some]), t, **options)
    dz, dt = fastmix.reference.soft_cross_entropy_grad(numpy(z[some]), t, numpy(up[some]), **options)
    assert_close(value[some], expected, torch.float32, np.abs(expected))
    assert_close(gradients[0][some], dz, dtype)
    assert_close(gradients[1][some], dt, gradients[1].dtype)


@pytest.mark.no_poison
def test_a_loss_per_pixel_beyond_32_bit_offsets(device):
    shape = (2, 9, 2**27 + 5)
    z = torch.empty(shape, dtype=BF16, device=device).normal_().requires_grad_()
    y = torch.randint(0, 9, (2, shape[2]), device=device)
    value = fastmix.soft_cross_entropy(z, y, reduction="none")
    (dz,) = torch.autograd.grad(value, z, torch.full_like(value, 0.5))
    for at in (slice(0, 50), slice(shape[2] // 2, shape[2] // 2 + 50), slice(shape[2] - 50, shape[2])):
        inputs = numpy(z[..., at]), numpy(y[:, at])
        expected = fastmix.reference.soft_cross_entropy(*inputs, reduction="none")
        gradient = fastmix.reference.soft_cross_entropy_grad(*inputs, np.full(expected.shape, 0.5), reduction="none")[0]
        assert_close(value[:, at], expected, torch.float32, 1 + np.abs(expected))
        assert_close(dz[..., at], gradient, BF16, np.ones(gradient.shape))
