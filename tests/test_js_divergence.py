"""js_divergence: values and gradients against the oracle on every backend, hostile rows, what it refuses."""

import functools
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOATS, RELATIVE, accumulator, assert_close, numpy

import fastmix
from fastmix import reference

INF = math.inf


def sets(K, N, C, dtype=torch.float32, device="cpu", apart=2.0):
    return (torch.randn(1, N, C) + apart * torch.randn(K, N, C)).to(device, dtype)


def differentiated(z, g=1.0, **options):
    """(loss, gradient [K, N, C]) of a stacked tensor, or of a tuple of sets."""
    leaves = [t.detach().requires_grad_() for t in ((z,) if isinstance(z, torch.Tensor) else z)]
    loss = fastmix.js_divergence(leaves[0] if isinstance(z, torch.Tensor) else leaves, **options)
    upstream = torch.as_tensor(g, dtype=loss.dtype, device=loss.device).expand(loss.shape)
    gradients = torch.autograd.grad(loss, leaves, upstream)
    return loss.detach(), gradients[0] if isinstance(z, torch.Tensor) else torch.stack(gradients)


def sizes(z):
    """Of a gradient's row [K, N, 1]: the sum of p*|log p - log m|, and its largest p, without the weights 1/(K*N)."""
    p = torch.as_tensor(numpy(z)).softmax(2)
    size = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).abs().sum(2, keepdim=True) + p.amax(2, keepdim=True)
    return size.nan_to_num(1).numpy()


def check(z, g=1.0, dtype=None, scale=1.0, reduction="mean"):
    options = {"scale": scale, "reduction": reduction}
    values = np.stack([numpy(t) for t in z])
    loss, dz = differentiated(z, g, **options)
    wide = accumulator(z[0].dtype)
    assert loss.dtype == wide
    assert dz.dtype == z[0].dtype
    upstream = numpy(g) if isinstance(g, torch.Tensor) else g
    truth = reference.js_divergence(values, **options)
    assert_close(loss, truth, wide, np.nan_to_num(np.abs(truth)) + 1e-2)  # 0 for one class
    divisor = len(z) * (values.shape[1] if reduction == "mean" else 1)
    bound = sizes(torch.as_tensor(values)) * scale * np.abs(np.reshape(upstream, (-1, 1))) / divisor
    assert_close(
        dz, reference.js_divergence_grad(values, upstream, **options), z[0].dtype, np.broadcast_to(bound, values.shape)
    )


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("K", "N", "C"), [(3, 5, 10), (1, 3, 7), (2, 1, 100), (16, 3, 33), (3, 2, 1), (5, 33, 17)])
def test_matches_the_oracle(K, N, C, dtype, device):
    z = sets(K, N, C, dtype, device)
    check(z)
    check(z.unbind(), 0.7, scale=12.0)
    check(z, 3.0, reduction="sum")
    check(z.unbind(), torch.randn(N), reduction="none")


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_that_are_walked(dtype, device):
    z = sets(3, 2, 5000, dtype, device)
    z[0, 0, :4500] = -INF  # whole tiles of one set
    z[:, 1, :4500] = -INF
    check(z)
    check(z.unbind(), 0.5, reduction="none")


def test_layouts(device):
    dense = sets(3, 4, 12, device=device)
    loss, dz = differentiated(dense)
    wide = torch.randn(3, 8, 20, device=device)
    wide[:, ::2, 3:15] = dense
    for z in (
        dense.transpose(0, 2).contiguous().transpose(0, 2),
        wide[:, ::2, 3:15],
        dense.unbind(),
        tuple(t.t().contiguous().t() for t in dense),
        (dense[0], wide[1, ::2, 3:15], dense[2].t().contiguous().t()),
    ):
        other, gradient = differentiated(z)
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, dz, rtol=1e-5, atol=1e-8)
    same = dense[0].expand(3, -1, -1)
    loss, dz = differentiated(same)
    assert loss == 0
    assert not dz.any()


def test_sets_that_need_no_gradient(device):
    z = list(sets(3, 4, 40, device=device).unbind())
    _, dz = differentiated(z)
    z[1].requires_grad_()
    for factor in (1.0, 3.0):
        loss = fastmix.js_divergence(z)
        (factor * loss).backward()
        torch.testing.assert_close(z[1].grad, factor * dz[1], rtol=1e-6, atol=1e-9)
        z[1].grad = None
    twice = z[1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(fastmix.js_divergence((twice, z[0], twice)), twice)
    _, dz = differentiated((z[1], z[0], z[1]))
    torch.testing.assert_close(gradient, dz[0] + dz[2], rtol=1e-5, atol=1e-8)


def test_no_gradient_is_the_same_loss(device):
    z = sets(3, 4, 40, device=device)
    assert fastmix.js_divergence(z) == differentiated(z)[0] == fastmix.js_divergence(tuple(z))


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 64.0])
def test_small_divergences_are_relatively_exact(apart, offset, device):
    """Where eager torch loses all digits: a loss of the order of apart**2 in float32."""
    base = torch.round(3 * torch.randn(4, 200) * 1024) / 1024  # so that the offset is exact
    z = torch.stack([base + torch.round(apart * torch.randn(4, 200) * 2**17) / 2**17 for _ in range(3)])
    z = z + offset * torch.arange(3).view(3, 1, 1)
    loss, dz = differentiated(z.to(device), reduction="none")
    wide = z.double().numpy().astype(np.longdouble)
    y = wide - wide.max(2, keepdims=True)
    p = np.exp(y) / np.exp(y).sum(2, keepdims=True)
    gap = np.log1p((p - p.mean(0)) / p.mean(0))
    D = (p * gap).sum(2, keepdims=True)
    np.testing.assert_allclose(
        numpy(loss), D.mean(0)[:, 0].astype(float), rtol=RELATIVE[torch.float32] * (1 if apart > 1e-4 else 10)
    )
    scale = np.abs(p * gap).sum(2, keepdims=True)
    assert (np.abs(numpy(dz) - p * (gap - D) / 3) <= RELATIVE[torch.float32] * scale).all()
    if apart == 1e-3:
        eager = (torch.log_softmax(z, 2).exp() * (z.log_softmax(2) - z.softmax(2).mean(0).log())).sum(2).mean(0)
        assert (np.abs(numpy(eager) - D.mean(0)[:, 0]) > 1e-4 * D.mean(0)[:, 0]).all()


def test_never_negative(device):
    for apart in (0.0, 1e-7, 1e-5, 1e-3, 1e-1, 10.0):
        loss = fastmix.js_divergence(sets(3, 16, 50, device=device, apart=apart), reduction="none")
        assert (loss >= 0).all()
        assert (loss <= math.log(3) * (1 + 1e-6)).all()


@pytest.mark.parametrize("K", [2, 4, 16])
def test_a_class_that_is_nearly_nowhere(K, device):
    """Its probabilities are subnormal, and K over their sum would be infinite."""
    z = torch.full((K, 2, 20), -30.0, dtype=torch.float64)
    z[..., 0], z[..., 1], z[0, :, 2] = 0, -712, -29
    loss, dz = differentiated(z.to(device), reduction="none")
    assert loss.isfinite().all()
    assert dz.isfinite().all()
    check(z.to(device), 1.0, reduction="none")


def hostile(device):
    z = 3 * torch.randn(3, 9, 33)
    z[:, 0, 3] = -INF  # masked in all sets
    z[1, 1, 5] = -INF  # in one
    z[:2, 2, 7] = -INF
    z[0, 3] = -INF  # a set without a class: NaN
    z[2, 4, 4] = INF
    z[1, 5, 4] = math.nan
    z[:, 6] = 3e38 * torch.tensor([1.0, -1.0, 0.5]).unsqueeze(1) * torch.rand(3, 33)
    z[:, 7] = -INF
    z[torch.arange(3), 7, torch.arange(3)] = 1.0  # nothing in common
    return z.to(device)


def test_hostile_rows_keep_to_themselves(device):
    z = hostile(device)
    for reform in (1.0, torch.full((9,), 2.0)):
        check(z, reform, reduction="none")
    loss, dz = differentiated(z, reduction="none")
    assert loss.isnan().tolist() == [n in (3, 4, 5) for n in range(9)]
    assert dz.isnan().any(2).any(0).tolist() == loss.isnan().tolist()
    assert abs(loss[7].item() - math.log(3)) < 1e-6
    finite = torch.tensor([n not in (3, 4, 5) for n in range(9)])
    assert not dz[:, finite][z[:, finite] == -INF].any()


def test_an_infinite_upstream_leaves_zeros(device):
    z = hostile(device)[:, :3]
    g = torch.tensor([INF, 1.0, -INF])
    _, dz = differentiated(z, g, reduction="none")
    assert not dz[z == -INF].any()
    assert dz[:, 0][z[:, 0] != -INF].isinf().all()


def test_scale_is_a_factor(device):
    z = sets(3, 4, 40, device=device)
    loss, dz = differentiated(z, 12.0)
    scaled, gradient = differentiated(z, scale=12.0)
    torch.testing.assert_close(scaled, 12 * loss)
    torch.testing.assert_close(gradient, dz, rtol=1e-6, atol=1e-9)
    z = z.double()
    torch.testing.assert_close(fastmix.js_divergence(z, scale=0.3), 0.3 * fastmix.js_divergence(z), rtol=1e-14, atol=0)


def test_augmix(device):
    """The authors' lines, whose clamp does nothing here."""
    clean, first, second = logits = sets(3, 8, 10, device=device, apart=0.5).unbind()
    p_clean, p_first, p_second = (F.softmax(z, dim=1) for z in logits)
    mixture = torch.clamp((p_clean + p_first + p_second) / 3.0, 1e-7, 1).log()
    theirs = 12 * sum(F.kl_div(mixture, p, reduction="batchmean") for p in (p_clean, p_first, p_second)) / 3.0
    together = torch.cat(logits)  # as their model gives them
    torch.testing.assert_close(fastmix.js_divergence(together.view(3, -1, 10), scale=12.0), theirs)
    torch.testing.assert_close(fastmix.js_divergence(together.chunk(3), scale=12.0), theirs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**16), st.floats(0.01, 20))
def test_properties(K, N, C, seed, spread):
    """Shift invariance, order of sets, order of classes, and an upper bound, on the torch backend."""
    z = spread * torch.randn(K, N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss, dz = differentiated(z, reduction="none")
    bound = {"rtol": 1e-9, "atol": 1e-11 * spread}
    shifted, gradient = differentiated(z + 8 * torch.arange(K * N).view(K, N, 1), reduction="none")
    torch.testing.assert_close(shifted, loss, **bound)
    torch.testing.assert_close(gradient, dz, **bound)
    order, classes = torch.randperm(K), torch.randperm(C)
    permuted, gradient = differentiated(z[order][:, :, classes], reduction="none")
    torch.testing.assert_close(permuted, loss, **bound)
    torch.testing.assert_close(gradient, dz[order][:, :, classes], **bound)
    assert (loss >= 0).all()
    assert (loss <= math.log(K) + 1e-12).all()
    torch.testing.assert_close(dz.sum(2), torch.zeros(K, N, dtype=torch.float64), rtol=0, atol=1e-12)
    doubled, _ = differentiated(torch.cat((z, z)), reduction="none")
    torch.testing.assert_close(doubled, loss, **bound)


def test_transforms_and_second_derivatives(device):
    z = sets(3, 2, 5, torch.float64, device)
    z[:, 0, 1] = -INF
    z[1, 1, 2] = -INF
    for logits in (z, z.unbind()):
        gradient = torch.func.grad(fastmix.js_divergence)(logits)
        gradient = gradient if isinstance(logits, torch.Tensor) else torch.stack(gradient)
        torch.testing.assert_close(gradient, differentiated(z)[1])
    z = sets(3, 2, 5, torch.float64, device)
    hessian = torch.func.hessian(fastmix.js_divergence)(z)
    step = 1e-6 * torch.randn_like(z)
    change = differentiated(z + step)[1] - differentiated(z - step)[1]
    torch.testing.assert_close((hessian * 2 * step).sum((3, 4, 5)), change, rtol=1e-4, atol=1e-13)
    tangent = torch.func.jvp(fastmix.js_divergence, (z,), (step,))[1]
    torch.testing.assert_close(tangent, (differentiated(z)[1] * step).sum())
    rows = torch.func.vmap(functools.partial(fastmix.js_divergence, reduction="sum"), 1)(z.unsqueeze(2))
    torch.testing.assert_close(rows, fastmix.js_divergence(z, reduction="none"))


@pytest.mark.no_poison
def test_compiles(device):
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=False)
    def step(z, sources):
        return fastmix.js_divergence(z, scale=12.0) + fastmix.js_divergence(sources, reduction="sum")

    z = sets(3, 4, 7, device=device).requires_grad_()
    sources = tuple(t.detach().requires_grad_() for t in z)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = step(z, sources)
        gradients = torch.autograd.grad(loss, (z, *sources))
    value, dz = differentiated(z)
    torch.testing.assert_close(loss, (12 + 4) * value)
    torch.testing.assert_close(gradients[0], 12 * dz, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.stack(gradients[1:]), 4 * dz, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_memory_of_the_fallback():
    """Beside the gradient, blocks of rows alone: what a forward allocates does not grow with the batch."""

    def extra(N):
        z = torch.zeros(3, N, 1000, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile, fastmix.backend("torch"):
            fastmix.js_divergence(z)
        largest = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0]
        return sorted(largest)[-2]  # after the gradient

    extra(100)
    assert extra(800) == extra(1600) < 4 * 2**20


Z = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"logits": None}, TypeError, r"logits: expected a tensor \[K, N, ...\] or a sequence"),
        ({"logits": Z.numpy()}, TypeError, "logits: .*ndarray"),
        ({"logits": Z.long()}, TypeError, "logits: expected a float16.*int64"),
        ({"logits": Z.to_sparse()}, TypeError, r"logits: expected a dense \(strided\) tensor"),
        ({"logits": Z[0]}, ValueError, r"logits: expected shape \[K, N, C\] .*\[4, 5\]"),
        ({"logits": Z.unsqueeze(3)}, ValueError, r"logits: expected shape \[K, N, C\] .*\[3, 4, 5, 1\]"),
        ({"logits": Z[:, :, :0]}, ValueError, r"logits: .*at least one class, got .*\[3, 4, 0\]"),
        ({"logits": Z[:0]}, ValueError, r"logits: .*K from 1 to 16, got .*\[0, 4, 5\]"),
        ({"logits": torch.zeros(17, 1, 2)}, ValueError, "logits: .*K from 1 to 16"),
        ({"logits": ()}, ValueError, "logits: expected from 1 to 16 tensors, got 0"),
        ({"logits": [Z]}, ValueError, r"logits\[0\]: expected shape \[N, C\] with at least one class, got .*\[3, 4, 5\]"),
        ({"logits": [Z[0], Z[0, :3]]}, ValueError, r"logits\[1\]: expected shape \[4, 5\], as logits\[0\], got .*\[3, 5\]"),
        (
            {"logits": [Z[0], Z[0].double()]},
            TypeError,
            r"logits\[1\]: expected a float32 tensor, as logits\[0\], got .*float64",
        ),
        ({"logits": [Z[0], Z[0].to("meta")]}, ValueError, r"logits\[1\]: expected a tensor on cpu, got .*meta"),
        ({"scale": None}, TypeError, "scale: expected a float, got None"),
        ({"scale": True}, TypeError, "scale: .*True"),
        ({"scale": torch.tensor(12.0)}, TypeError, "scale: .*float32 tensor"),
        ({"scale": math.inf}, ValueError, "scale: expected a finite float, got inf"),
        ({"scale": math.nan}, ValueError, "scale: expected a finite float, got nan"),
        ({"reduction": "batchmean"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'batchmean'"),
        ({"reduction": None}, ValueError, "reduction: .*None"),
    ],
)
def test_bad_input(change, kind, words):
    with pytest.raises(kind, match=words) as error:
        fastmix.js_divergence(**{"logits": Z, **change})
    assert re.match(r"[a-z.\[\]0-9]+: expected .+, got ", str(error.value))
