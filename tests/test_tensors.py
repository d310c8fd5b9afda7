"""Tensors as torch has them: other devices and defaults, hooks on what is saved, inference mode, fakes, subclasses, parameters,
copies."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from plain import C, Recipe, backend_name, batch, compiled, leaf, network, plain_loss, plain_mix, plain_pairs, plain_step, step
from torch import nn
from torch.testing import assert_close as same

import fastmix
from fastmix import Mix, SoftTarget

TWO_GPUS = "needs two GPUs"


# Devices and defaults


@pytest.mark.gpu
@pytest.mark.no_poison
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_on_a_gpu_that_is_not_the_current_one(device):
    """Every launch, those of backward threads and of programs too, goes to the tensors' GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip(TWO_GPUS)
    device = torch.device("cuda", 1)
    model = network(device)
    x, y, lam, index = batch(6, device)
    x, lam = leaf(x), leaf(lam)
    leaves = x, lam, *model.parameters()
    box = torch.tensor([[0, 0, 1, 2]] * 6, device=device)
    with torch.cuda.device(0):
        expected = plain_step(model, x, y, lam, index)
        gradients = torch.autograd.grad(expected, leaves)
        for run in (step, compiled(step)[0]):
            loss = run(model, x, y, lam, index)
            same(loss, expected)
            same(torch.autograd.grad(loss, leaves), gradients)
        dense = torch.rand(6, C, device=device, requires_grad=True)
        loss = fastmix.soft_cross_entropy(model(x), dense)
        same(torch.autograd.grad(loss, dense)[0], -torch.log_softmax(model(x), 1).detach() / 6)
        same(fastmix.mix(x, 0.5, index, box=box), plain_mix(x, torch.tensor(0.5, device=device), index, box))
        mixed, _ = fastmix.RandomMix(fastmix.Mixup(0.4, seed=0), fastmix.CutMix(seed=0))(x, y)
        assert mixed.device == device
        with pytest.raises(ValueError, match="index: expected a tensor on cuda:1, got .* on cuda:0"):
            fastmix.mix(x, lam, index.to("cuda:0"))
        assert torch.cuda.current_device() == 0


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("default", ["bfloat16", "float64", "device"])
def test_torchs_defaults_do_not_matter(default, device):
    """torch.set_default_dtype and set_default_device say what is made of nothing; the ops make what their inputs ask for."""
    rows = ((2, 3, 5), (3000,)) if backend_name() == "torch" else ((2, 3, 5),)  # it takes other steps for larger batches
    batches = [batch(6, device, row=row) for row in rows]
    boxes = torch.tensor([[0, 1, 2, 4]] * 6, device=device)
    weight = torch.rand(C, device=device)
    z = torch.randn(6, C, device=device)
    cells, pixels = torch.rand(6, 4, 6, device=device), torch.rand(6, 3, 8, 12, device=device)

    def everything():
        results = []
        for x, y, lam, index in batches:
            leaves = leaf(x), leaf(lam)
            m = Mix(leaves[1], index, box=boxes if x.dim() == 4 else None)
            mixed = m.apply(leaves[0])
            logits = leaf(z)
            loss = fastmix.soft_cross_entropy(logits, m.target(y), weight=weight, label_smoothing=0.1)
            loss = loss + fastmix.soft_cross_entropy(logits, m.target(y).dense(C), ignore_index=1)
            loss = loss + fastmix.soft_cross_entropy(logits, y) + fastmix.js_divergence([logits, z.flip(0)])
            for rows in (y, m.target(y), m.target(z.sigmoid())):
                loss = loss + fastmix.soft_binary_cross_entropy(logits, rows, pos_weight=weight)
            results += [mixed, loss, *torch.autograd.grad(mixed.square().sum() + loss, (*leaves, logits))]
            results.append(torch.func.grad(lambda x, m=m: m.apply(x).square().sum())(x))
            results += [fastmix.mixed_accuracy(z, m.target(y)), fastmix.mix(x, 0.5, index)]
            for mixer in (fastmix.Mixup(0.4, seed=0), fastmix.Mixup(0.4, partner="different", per="pair", seed=0)):
                mixed, target = mixer(x, y)
                results += [mixed, target.weights, target.argmax()]
        masked, x = Mix(None, index, mask=leaf(cells)), leaf(pixels)
        for whole in (masked, masked.within(torch.tensor([[8, 12]] * 6, device=device), anchor="center")):
            mixed = whole.apply(x)
            bytes_too = fastmix.mix_images((pixels * 255).to(torch.uint8), whole, mean=[0.5] * 3, std=[0.2] * 3)
            results += [mixed, bytes_too, *torch.autograd.grad((mixed * bytes_too).square().sum(), (x, masked.mask))]
        return results

    expected = everything()
    if default == "device":
        with torch.device("meta"):
            results = everything()
    else:
        torch.set_default_dtype(getattr(torch, default))
        try:
            results = everything()
        finally:
            torch.set_default_dtype(torch.float32)
    for ours, plain in zip(results, expected, strict=True):
        assert (ours.dtype, ours.device) == (plain.dtype, plain.device)
        assert torch.equal(ours, plain)


# Saved tensors, modes, subclasses, copies


def test_hooks_on_saved_tensors(device):
    """What is saved goes through the hooks and may come back as a copy, or from the CPU."""
    x, y, lam, index = batch(4, device, row=(C,))
    dense = torch.rand(4, C, device=device)

    def gradients(around):
        leaves = leaf(x), leaf(lam), leaf(dense)
        with around:
            m = Mix(leaves[1], index)
            mixed = m.apply(leaves[0])
            loss = fastmix.soft_cross_entropy(mixed, m.target(y)) + fastmix.soft_cross_entropy(mixed, leaves[2])
        return torch.autograd.grad(loss, leaves)

    expected = gradients(contextlib.nullcontext())
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.detach().cpu().numpy().copy(), t.device

    def unpack(saved):
        return torch.from_numpy(saved[0]).to(saved[1])

    for around in (torch.autograd.graph.save_on_cpu(), torch.autograd.graph.saved_tensors_hooks(pack, unpack)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(around), expected, strict=True))
    assert packed.count(x.shape) >= 3  # the batch for lambda's gradient, the logits of two losses


def test_inputs_changed_before_the_backward(device):
    """torch's own error, not the gradient of other values; right where torch is told to keep copies, or nothing was saved."""
    x, y, lam, index = batch(4, device, row=(C,))

    def change(op, keep=contextlib.nullcontext):
        leaves = leaf(x), leaf(lam)
        with keep():
            z = leaves[0] * 1
            loss = op(z, leaves[1])
            z.mul_(2)
            return torch.autograd.grad(loss, leaves[0])[0]

    def mixing(z, lam):
        return fastmix.mix(z, lam, index).square().sum()

    def loss(z, lam):
        return fastmix.soft_cross_entropy(z, y)

    for op in (mixing, loss):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            change(op)
        z = leaf(x)
        expected = torch.autograd.grad(op(z, lam), z)[0]
        assert torch.equal(change(op, torch.autograd.graph.allow_mutation_on_saved_tensors), expected)
    gradient = change(lambda z, _: fastmix.mix(z, lam, index).sum())  # linear: nothing of the batch is needed
    z = leaf(x)
    same(gradient, torch.autograd.grad(plain_mix(z, lam, index).sum(), z)[0])


def test_no_grad_and_inference_mode(device):
    """The same values, no graph; what was made in inference mode gives torch's own error where a graph needs it."""
    x, y, lam, index = batch(4, device, row=(C,))
    x, lam = leaf(x), leaf(lam)
    target = Mix(lam, index).target(y)
    expected = plain_mix(x, lam, index).detach(), plain_loss(x, *plain_pairs(y, lam, index)).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results = fastmix.mix(x, lam, index), fastmix.soft_cross_entropy(x, target)
            out = torch.empty_like(x)
            assert fastmix.mix(x, lam, index, out=out) is out
            assert not any(t.requires_grad for t in results)
            same(results, expected)
            same(out, expected[0])
            assert results[0].is_inference() == (mode is torch.inference_mode)
    with torch.inference_mode():
        made, shares, weights = x.clone(), lam.clone(), target.weights.clone()
    for attempt in (
        lambda: fastmix.mix(made, lam, index),
        lambda: fastmix.mix(x, shares, index),
        lambda: fastmix.soft_cross_entropy(made, target),
        lambda: fastmix.soft_cross_entropy(x, SoftTarget(target.classes, weights)),
    ):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            attempt()
    same(fastmix.mix(made, shares, index).clone(), expected[0])


def test_fake_tensors(device):
    """Shapes, dtypes and layouts without values, forwards and backwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 3, 8, 6, device=device).to(memory_format=torch.channels_last).requires_grad_()
        lam = torch.empty(4, device=device, requires_grad=True)
        index = torch.empty(4, dtype=torch.int64, device=device)
        z = torch.empty(4, C, dtype=torch.float16, device=device, requires_grad=True)
        m = Mix(lam, index, box=torch.empty(4, 4, dtype=torch.int64, device=device))
        mixed, loss = m.apply(x), fastmix.soft_cross_entropy(z, m.target(index), reduction="none")
        dx, dlam, dz = torch.autograd.grad(mixed.square().sum() + loss.sum(), (x, lam, z))
        assert fastmix.mix(x.detach(), 0.5, index, out=torch.empty_like(x.detach())).shape == x.shape
        drawn, target = fastmix.CutMix()(x.detach(), index)
        accuracy = fastmix.mixed_accuracy(z, target)
    for t, like in ((mixed, x), (dx, x), (dlam, lam), (dz, z), (drawn, x)):
        assert (t.shape, t.dtype, t.stride(), t.device) == (like.shape, like.dtype, like.stride(), like.device)
    assert (loss.shape, loss.dtype, accuracy.shape, target.weights.shape) == ((4,), torch.float32, (), (4, 2))


class Plain(torch.Tensor):
    """A subclass that stays itself through torch's functions."""


class Wrapped(torch.Tensor):
    """A subclass whose values live elsewhere, as DTensor's do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, function(*unwrapped[0], **unwrapped[1]))


def test_subclasses_parameters_and_buffers(device):
    x, y, lam, index = batch(4, device, row=(C,))
    expected = plain_mix(x, lam, index), F.cross_entropy(x, y)
    for wrap in (nn.Parameter, nn.Buffer, lambda t: t.as_subclass(Plain)):
        results = fastmix.mix(wrap(x), wrap(lam), index), fastmix.soft_cross_entropy(wrap(x), y)
        same([t.detach().as_subclass(torch.Tensor) for t in results], list(expected))
    lam = nn.Parameter(lam)
    z = nn.Parameter(x)
    m = Mix(lam, index)
    fastmix.soft_cross_entropy(m.apply(z), m.target(y)).backward()
    plain = leaf(x), leaf(lam)
    plain_loss(plain_mix(*plain, index), *plain_pairs(y, plain[1], index)).backward()
    same((z.grad, lam.grad), (plain[0].grad, plain[1].grad))


def test_what_cannot_require_a_gradient(device):
    """Refused where a gradient would otherwise be missing without a word."""
    x, y, lam, index = batch(4, device, row=(C,))
    with pytest.raises(ValueError, match="weight: expected a constant, got a tensor that requires grad"):
        fastmix.soft_cross_entropy(x, y, weight=torch.ones(C, device=device, requires_grad=True))
    with pytest.raises(TypeError, match="index: expected an int64 tensor, got a float32"):
        fastmix.mix(x, lam, leaf(index.float()))
    with pytest.raises(TypeError, match="classes: expected an int64 tensor, got a float32"):
        SoftTarget(leaf(y.float())[:, None], lam[:, None])
    for leaves in ((leaf(x), lam), (x, leaf(lam))):
        with pytest.raises(ValueError, match="out: expected None where x, lam or out requires grad"):
            fastmix.mix(*leaves, index, out=torch.empty_like(x))


@pytest.mark.no_poison
def test_a_subclass_without_memory_is_mixed_or_refused(device):
    """The torch backend's operations are such a subclass's own; a kernel has nothing to read there, and must not try."""
    x, y, lam, index = batch(4, device, row=(C,))
    for op, expected in (
        (lambda t: fastmix.mix(t, lam, index), plain_mix(x, lam, index)),
        (lambda t: fastmix.soft_cross_entropy(t, y), F.cross_entropy(x, y)),
    ):
        if backend_name() == "torch":
            same(op(Wrapped(x)).inner, expected)
        else:
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                op(Wrapped(x))


def test_functional_call(device):
    """Parameters from outside, criterion and class weights too."""
    recipe = Recipe().to(device)
    x, y, lam, index = batch(6, device)
    parameters = {name: leaf(p) * 2 for name, p in recipe.named_parameters()}
    mixed, loss, _ = torch.func.functional_call(recipe, parameters, (x, y, lam, index))
    doubled = network(device)
    doubled.load_state_dict({name.removeprefix("model."): p.detach() for name, p in parameters.items()})
    same(loss, plain_step(doubled, x, y, lam, index))
    weights = torch.rand(C, device=device)
    criterion = fastmix.SoftCrossEntropyLoss(torch.ones(C, device=device))
    z = torch.randn(6, C, device=device)
    same(torch.func.functional_call(criterion, {"weight": weights}, (z, y)), F.cross_entropy(z, y, weights))


def test_copies_and_pickles(tmp_path, device):
    """Of a criterion, alone and inside a model, by copy, pickle and torch.save."""
    criterion = fastmix.SoftCrossEntropyLoss(torch.rand(C, device=device) + 0.1, 2, "sum", 0.1)
    z, y = torch.randn(6, C, device=device), torch.randint(0, C, (6,), device=device)
    expected = F.cross_entropy(z, y, criterion.weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    torch.save(nn.ModuleList([criterion]), tmp_path / "saved")
    for other in (
        copy.copy(criterion),
        copy.deepcopy(criterion),
        pickle.loads(pickle.dumps(criterion)),
        torch.load(tmp_path / "saved", weights_only=False)[0],
    ):
        same(other(z, y), expected)
        assert repr(other) == repr(criterion)
    deep = copy.deepcopy(criterion)
    deep.weight.zero_()
    same(criterion(z, y), expected)
    fresh = fastmix.SoftCrossEntropyLoss(torch.zeros(C, device=device), 2, "sum", 0.1)
    fresh.load_state_dict(criterion.state_dict())
    same(fresh(z, y), expected)
    same(fresh.to(torch.float64)(z.double(), y), expected.double())
