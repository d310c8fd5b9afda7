"""Derivatives by every road: gradcheck, second derivatives, torch.func, forward mode. Compared with plain torch; where the
op refuses, the refusal is tested."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from plain import C, backend_name, batch, leaf, plain_loss, plain_mix, plain_pairs, plain_step, step
from torch import nn
from torch.testing import assert_close as same

import fastmix
from fastmix import Mix, MixedRows, SoftTarget


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("boxes", [False, True])
def test_gradcheck_of_mixing(boxes, device):
    """First and second derivatives, forward mode, and many upstream gradients at once; lambda by row, or one for all."""
    x, _, lam, index = batch(4, device, torch.float64, row=(2, 3))
    box = torch.tensor([[0, 0, 1, 2], [1, -1, 9, 3], [1, 1, 1, 1], [0, 1, 1, 3]], device=device) if boxes else None
    x, lam = leaf(x), leaf(lam if boxes else lam[1])
    fast = device.type == "cuda" or backend_name() == "triton"

    def op(x, lam):
        return fastmix.mix(x, lam, index, box=box)

    assert torch.autograd.gradcheck(op, (x, lam), check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(lambda x, lam: op(x, lam).square(), (x, lam), fast_mode=True)
    for leaves, function in (((x,), lambda x: op(x, lam.detach())), ((lam,), lambda lam: op(x.detach(), lam))):
        at_once = torch.autograd.functional.jacobian(function, leaves, vectorize=True)
        same(at_once, torch.autograd.functional.jacobian(function, leaves))


@pytest.mark.slow_interpreted
def test_second_derivatives_of_the_loss_are_refused(device):
    """By every road that leads through a backward; torch.func has its own (below)."""
    z, y, lam, index = batch(4, device, row=(C,))
    dense, functional = torch.rand(4, C, device=device), torch.autograd.functional
    for target in (y, Mix(leaf(lam), index).target(y), dense, leaf(dense)):

        def loss(z, target=target):
            return fastmix.soft_cross_entropy(z, target)

        for attempt in (
            lambda z, loss=loss: torch.autograd.grad(loss(z), z, create_graph=True),
            lambda z, loss=loss: loss(z).backward(create_graph=True),
            lambda z, loss=loss: functional.hessian(loss, z),
            lambda z, loss=loss: functional.hvp(loss, z, z),
            lambda z, loss=loss: functional.vhp(loss, z, z),
            lambda z, loss=loss: functional.jvp(loss, z, z),
        ):
            with pytest.raises(RuntimeError, match="second derivatives are not supported.*cross_entropy on target.dense"):
                attempt(leaf(z))
        with pytest.raises(RuntimeError, match="cannot be batched.*torch.func"):
            functional.jacobian(loss, z, vectorize=True)
        same(
            functional.jacobian(loss, z, vectorize=True, strategy="forward-mode"),
            functional.jacobian(loss, z),
        )


def test_a_backward_under_a_dispatch_mode(device):
    """As when only the backward's operations are counted: that is no batched backward."""
    from torch.utils.flop_counter import FlopCounterMode

    z, y, lam, index = batch(4, device, row=(C,))
    for around in (contextlib.nullcontext, lambda: FlopCounterMode(display=False)):
        leaves = leaf(z), leaf(lam)
        m = Mix(leaves[1], index)
        with around():
            loss = fastmix.soft_cross_entropy(m.apply(leaves[0]), m.target(y))
        expected = plain_loss(plain_mix(*leaves, index), *plain_pairs(y, leaves[1], index))
        gradients = torch.autograd.grad(expected, leaves)
        with FlopCounterMode(display=False):
            same(torch.autograd.grad(loss, leaves), gradients)


TRANSFORMS = {
    "grad": lambda f, x, lam: torch.func.grad(lambda x, lam: f(x, lam).square().sum(), (0, 1))(x, lam),
    "vjp": lambda f, x, lam: (lambda out, pull: pull(out.cos()))(*torch.func.vjp(f, x, lam)),
    "jvp": lambda f, x, lam: torch.func.jvp(f, (x, lam), (x.cos(), lam.sin())),
    "jacrev": lambda f, x, lam: torch.func.jacrev(f, (0, 1))(x, lam),
    "jacfwd": lambda f, x, lam: torch.func.jacfwd(f, (0, 1))(x, lam),
    "hessian": lambda f, x, lam: torch.func.hessian(lambda x, lam: f(x, lam).square().sum(), (0, 1))(x, lam),
    "vmap over lam": lambda f, x, lam: torch.func.vmap(f, (None, 0))(x, torch.stack((lam, 1 - lam, lam / 2))),
    "vmap over scalars": lambda f, x, lam: torch.func.vmap(f, (None, 0))(x, lam),
    "vmap over x": lambda f, x, lam: torch.func.vmap(f, (1, None), 1)(torch.stack((x, x.cos()), 1), lam),
    "vmap of grad": lambda f, x, lam: torch.func.vmap(torch.func.grad(lambda x, lam: f(x, lam).square().sum(), (0, 1)))(
        torch.stack((x, x.cos())), torch.stack((lam, 1 - lam))
    ),
    "grad of vmap": lambda f, x, lam: torch.func.grad(lambda lams: torch.func.vmap(f, (None, 0))(x, lams).square().sum())(
        torch.stack((lam, 1 - lam))
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_and_forward_mode(transform, device):
    """Right where torch's own operations are; a kernel alone would give no tangent, or a wrong one, silently."""
    x, y, lam, index = batch(4, device, torch.float64, row=(C,))
    box = torch.tensor([[0, 2], [1, 4], [3, 3], [-1, 9]], device=device)
    weight = torch.rand(C, dtype=torch.float64, device=device)
    smoothed = {"label_smoothing": 0.1, "weight": weight}
    pairs = (
        (lambda x, lam: fastmix.mix(x, lam, index), lambda x, lam: plain_mix(x, lam, index)),
        (lambda x, lam: fastmix.mix(x, lam, index, box=box), lambda x, lam: plain_mix(x, lam, index, box)),
        (
            lambda x, lam: fastmix.soft_cross_entropy(x, Mix(lam, index).target(y), **smoothed),
            lambda x, lam: plain_loss(x, *plain_pairs(y, lam, index), **smoothed),
        ),
        (
            lambda x, lam: fastmix.soft_cross_entropy(Mix(lam, index).apply(x), y, reduction="none") * lam,
            lambda x, lam: F.cross_entropy(plain_mix(x, lam, index), y, reduction="none") * lam,
        ),
        (
            lambda x, lam: fastmix.soft_cross_entropy(x, fastmix.mix(x.softmax(1), lam, index), label_smoothing=0.1),
            lambda x, lam: F.cross_entropy(x, plain_mix(x.softmax(1), lam, index), label_smoothing=0.1),
        ),
        (
            lambda x, lam: fastmix.soft_cross_entropy(x, MixedRows(x.softmax(1), lam, index), reduction="sum"),
            lambda x, lam: F.cross_entropy(x, plain_mix(x.softmax(1), lam, index), reduction="sum"),
        ),
    )
    for ours, plain in pairs:
        if transform == "vmap over x":  # the mapped dimension has to come out somewhere
            ours, plain = ((lambda x, lam, f=f: f(x, lam).expand(2, *f(x, lam).shape)) for f in (ours, plain))
        same(TRANSFORMS[transform](ours, x, lam), TRANSFORMS[transform](plain, x, lam))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own, about its constants
def test_linearized(device):
    x, y, lam, index = batch(4, device, torch.float64, row=(C,))
    directions = x.cos(), lam.sin()
    _, push = torch.func.linearize(lambda x, lam: step(nn.Identity(), x, y, lam, index), x, lam)
    _, tangent = torch.func.jvp(lambda x, lam: plain_step(nn.Identity(), x, y, lam, index), (x, lam), directions)
    same(push(*directions), tangent)


def test_vmap_over_a_batch_of_batches(device):
    """Everything mapped at once, targets too, which are pytrees; and one gradient per sample."""
    batches = [batch(4, device, torch.float64, row=(C,)) for _ in range(3)]
    x, y, lam, index = (torch.stack(t) for t in zip(*batches, strict=True))

    def loss(x, y, lam, index):
        m = Mix(lam, index)
        return fastmix.soft_cross_entropy(m.apply(x), m.target(y))

    expected = torch.stack([plain_loss(plain_mix(x, lam, index), *plain_pairs(y, lam, index)) for x, y, lam, index in batches])
    same(torch.func.vmap(loss)(x, y, lam, index), expected)
    targets = SoftTarget(
        *(torch.stack(t) for t in zip(*(plain_pairs(y, lam, index) for _, y, lam, index in batches), strict=True))
    )
    mapped = torch.func.vmap(lambda x, target: fastmix.soft_cross_entropy(x, target))(x, targets)
    same(mapped, torch.stack([plain_loss(x, *plain_pairs(y, lam, index)) for x, y, lam, index in batches]))
    same(
        torch.func.vmap(fastmix.mixed_accuracy)(x, targets),
        torch.stack([fastmix.mixed_accuracy(x, Mix(lam, index).target(y)) for x, y, lam, index in batches]),
    )

    W = torch.randn(C, C, dtype=torch.float64, device=device)
    classes, weights = plain_pairs(*batches[0][1:])

    def sample_loss(W, x, classes, weights, loss):
        return loss((x @ W)[None], classes[None], weights[None])

    def ours(z, classes, weights):
        return fastmix.soft_cross_entropy(z, SoftTarget(classes, weights))

    per_sample = torch.func.vmap(torch.func.grad(sample_loss), (None, 0, 0, 0, None))
    gradients = per_sample(W, x[0], classes, weights, ours)
    assert gradients.shape == (4, C, C)
    for i in range(4):
        w = leaf(W)
        sample_loss(w, x[0, i], classes[i], weights[i], plain_loss).backward()
        same(gradients[i], w.grad)


def test_out_under_vmap(device):
    """Written where it is mapped as well, refused by torch where one buffer would hold many results."""
    x, _, lam, index = batch(4, device, row=(C,))
    many = torch.stack((x, x.cos()))
    out = torch.func.vmap(lambda x: fastmix.mix(x, lam, index, out=torch.empty_like(x)))(many)
    same(out, torch.stack([plain_mix(x, lam, index) for x in many]))
    one = torch.empty_like(x)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: fastmix.mix(x, lam, index, out=one))(many)


def test_forward_mode_beside_backward_mode(device):
    """A dual number on one input while another requires a gradient; the tangent of a gradient."""
    x, y, lam, index = batch(4, device, torch.float64, row=(C,))

    results = []
    for f in (step, plain_step):
        z = leaf(x)
        with torch.autograd.forward_ad.dual_level():
            value = f(nn.Identity(), z, y, torch.autograd.forward_ad.make_dual(lam, lam.cos()), index)
            gradient = torch.autograd.grad(value, z, create_graph=True)[0]
            results.append([torch.autograd.forward_ad.unpack_dual(t).tangent for t in (value, gradient)])
    same(*results)


def test_learning_through_an_inner_step(device):
    """Meta-learning: lambda's gradient of a loss after a gradient step on the mixed batch."""
    x, y, lam, index = batch(4, device, torch.float64, row=(3,))
    W = torch.randn(3, C, dtype=torch.float64, device=device)

    def outer(lam, mixing, loss):
        inner = torch.func.grad(lambda W: loss(mixing(x, lam, index) @ W, lam))(W)
        return F.cross_entropy(x @ (W - 0.5 * inner), y)

    ours, plain = leaf(lam), leaf(lam)
    outer(ours, fastmix.mix, lambda z, lam: fastmix.soft_cross_entropy(z, Mix(lam, index).target(y))).backward()
    outer(plain, plain_mix, lambda z, lam: plain_loss(z, *plain_pairs(y, lam, index))).backward()
    same(ours.grad, plain.grad)


@pytest.mark.parametrize("device", ["cpu", "native"], indirect=True)
def test_tensors_that_a_transform_left_behind_are_unwrapped(device):
    """What a function keeps from inside torch.func.grad stays wrapped when it has ended."""
    kept = []

    def loss(x):
        kept.extend((x * 2, (x * 0).long()[:, 0]))
        return x.sum()

    x = torch.randn(4, 3, device=device)
    torch.func.grad(loss)(x)
    left, index = kept
    assert all(map(torch._C._functorch.is_functorch_wrapped_tensor, kept))
    lam = torch.rand(4, device=device, requires_grad=True)
    assert torch.allclose(fastmix.mix(left, lam, index), fastmix.mix(2 * x, lam, index.new_zeros(4)))
    hard = fastmix.soft_cross_entropy(left, index)
    assert torch.allclose(hard, torch.nn.functional.cross_entropy(2 * x, torch.zeros(4, dtype=torch.int64, device=device)))
