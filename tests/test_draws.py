"""What is drawn: lambda of Beta, shares of Dirichlet, in float64 against SciPy and in float32 by their moments."""

import math
import re

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close as same

import fastmix
from fastmix import CutMix, Mixup
from fastmix._torch import _draws as cpu
from fastmix.sampling import draws

# Dirichlet


def distance(values, cdf):
    """Of Kolmogorov and Smirnov, over its 1 % limit."""
    rank, n = np.sort(cdf(np.sort(values))), len(values)
    return max(np.max(np.arange(1, n + 1) / n - rank), np.max(rank - np.arange(n) / n)) / (1.63 / math.sqrt(n))


def folded(stats, share, rest, a, b):
    """Ranks of shares of Beta(a, b), given with what is left, in float64: each is looked up in the tail that floats resolve."""
    low = stats.beta(a, b).cdf(share)
    high = 1 - stats.beta(b, a).cdf(rest)
    return distance(np.where(share < rest, low, high), lambda rank: rank)


class TestDirichlet:
    @pytest.mark.parametrize("ways", [2, 3, 5])
    @pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0, 32.0])
    def test_shares_are_beta(self, alpha, ways):
        """A share is Beta(alpha, (ways-1)*alpha); of the rest, the next one's share is Beta(alpha, (ways-2)*alpha), and does
        not depend on it: with the moments that is the distribution."""
        stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
        generator = torch.Generator().manual_seed(3)
        w = fastmix.dirichlet(20000, ways, alpha, dtype=torch.float64, generator=generator).numpy()
        assert np.isfinite(w).all()
        np.testing.assert_allclose(w.sum(1), 1, atol=1e-12)
        others = w[:, 1:].sum(1)
        assert folded(stats, w[:, 0], others, alpha, (ways - 1) * alpha) < 1
        assert folded(stats, w[:, -1], w[:, :-1].sum(1), alpha, (ways - 1) * alpha) < 1
        if ways > 2 and alpha >= 0.2:  # below, the rest underflows where one share is all
            rest = w[:, 2:].sum(1)
            assert folded(stats, w[:, 1] / others, rest / others, alpha, (ways - 2) * alpha) < 1
            upper = others > np.median(others)
            means = [np.mean((w[:, 1] / others)[half]) for half in (upper, ~upper)]
            assert abs(means[0] - means[1]) < 4 * math.sqrt(2 * 0.25 / 10000)

    @pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 32.0])
    @pytest.mark.parametrize("skip", [1.0, 0.1, (2.0, 6.0)], ids=str)
    def test_skip_connection(self, alpha, skip):
        stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
        a, b = skip if isinstance(skip, tuple) else (skip, skip)
        generator = torch.Generator().manual_seed(5)
        w = fastmix.dirichlet(20000, 3, alpha, skip=skip, dtype=torch.float64, generator=generator).numpy()
        assert w.shape == (20000, 4)
        np.testing.assert_allclose(w.sum(1), 1, atol=1e-12)
        m = w[:, 1:].sum(1)
        assert folded(stats, m, w[:, 0], a, b) < 1  # m ~ Beta(a, b), the chains' part
        kept = m > 1e-200
        chains = w[kept, 1:] / m[kept, None]
        assert folded(stats, chains[:, 0], chains[:, 1:].sum(1), alpha, 2 * alpha) < 1
        assert abs(np.corrcoef(m[kept], chains[:, 0])[0, 1]) < 4 / math.sqrt(kept.sum())

    @pytest.mark.parametrize("alpha", [1e-3, 0.05, 1.0, 1e30])
    def test_float32_draws_are_numbers_without_ties(self, alpha):
        """A ratio of Gammas would give 0/0, or ties at the smallest normal: equal shares that no Dirichlet draws."""
        w = fastmix.dirichlet(10**6, 2, alpha, skip=alpha, generator=torch.Generator().manual_seed(0))
        assert w.dtype == torch.float32
        low, high = w.aminmax()  # NaN if any is
        assert low >= 0
        assert high <= 1
        same(w.sum(1), torch.ones(10**6), rtol=0, atol=3e-7)
        if alpha < 1:
            assert ((w[:, 1] == w[:, 2]) & (w[:, 1] > 1e-30)).sum() <= 1

    def test_moments_in_float32(self):
        for alpha in (0.05, 0.2, 1.0, 32.0):
            w = fastmix.dirichlet(100000, 3, alpha, generator=torch.Generator().manual_seed(1)).double().numpy()
            covariance = np.cov(w.T)
            expected = (np.eye(3) / 3 - 1 / 9) / (3 * alpha + 1)
            np.testing.assert_allclose(w.mean(0), 1 / 3, atol=5 * math.sqrt(expected[0, 0] / 1e5))
            np.testing.assert_allclose(covariance, expected, atol=5 * expected[0, 0] / math.sqrt(1e5))

    def test_generators_devices_and_sizes(self, device):
        def draw(seed):
            return fastmix.dirichlet(3, 4, skip=(1.0, 2.0), device=device, generator=torch.Generator(device).manual_seed(seed))

        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
        assert draw(1).device.type == device.type
        generator = torch.Generator(device)
        assert fastmix.dirichlet(2, 2, generator=generator).device.type == device.type
        state = torch.get_rng_state()
        fastmix.dirichlet(2, 2, generator=torch.Generator())
        assert torch.equal(torch.get_rng_state(), state)
        for rows, ways, skip, shape in ((0, 3, None, (0, 3)), (0, 3, 1.0, (0, 4)), (2, 1, None, (2, 1)), (1, 15, 1, (1, 16))):
            assert fastmix.dirichlet(rows, ways, skip=skip, device=device).shape == shape
        assert torch.equal(fastmix.dirichlet(2, 1), torch.ones(2, 1))

    @pytest.mark.no_poison
    def test_in_a_program(self):
        torch._dynamo.reset()
        program = torch.compile(lambda x: fastmix.dirichlet(len(x), 3, skip=1.0), backend="eager", fullgraph=True)
        assert program(torch.zeros(5)).shape == (5, 4)

    @pytest.mark.no_poison
    @pytest.mark.parametrize(
        "options", [lambda v: (v, None), lambda v: (1.0, v), lambda v: (v, (v, v + 1))], ids=["alpha", "skip", "both"]
    )
    def test_numbers_that_change_in_a_program(self, options):
        """One more program, and the eager draws."""

        def draw(v):
            alpha, skip = options(v)
            return fastmix.dirichlet(5, 3, alpha, skip=skip, dtype=torch.float64)

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        fast = torch.compile(draw, backend=counter, fullgraph=True)
        for seed, v in enumerate((1.0, 0.5, 0.25, 2.0, 4.0, 8.0, 0.3, 0.7, 1.5, 3.0)):
            torch.manual_seed(seed)
            expected = draw(v)
            torch.manual_seed(seed)
            assert torch.equal(fast(v), expected)
        assert counter.frame_count == 2

    @pytest.mark.parametrize(
        ("change", "kind", "words"),
        [
            ({"rows": -1}, ValueError, "rows: expected an int of at least 0, got -1"),
            ({"rows": 2.0}, TypeError, "rows: expected an int"),
            ({"ways": 0}, ValueError, "ways: expected an int of at least 1, got 0"),
            ({"ways": True}, TypeError, "ways"),
            ({"alpha": 0.0}, ValueError, "alpha: expected positive, from 0.001 to 1e30, got 0.0"),
            ({"alpha": (1.0, 1.0)}, TypeError, "alpha: expected one number for all ways"),
            ({"alpha": "1"}, TypeError, "alpha: expected a number"),
            ({"skip": -1.0}, ValueError, "skip: expected positive, from 0.001 to 1e30, got -1.0"),
            ({"skip": (1.0, 2.0, 3.0)}, TypeError, "skip: expected a number or a pair"),
            ({"skip": True}, TypeError, "skip"),
            ({"dtype": torch.float16}, TypeError, "dtype: expected torch.float32 or torch.float64, got torch.float16"),
            ({"dtype": None}, TypeError, "dtype"),
            ({"device": "nowhere"}, ValueError, "device: expected a device, got 'nowhere'"),
            ({"device": "meta", "generator": torch.Generator()}, ValueError, "generator: expected one on meta, got one on cpu"),
            ({"generator": 3}, TypeError, "generator: expected a torch.Generator, got 3"),
        ],
        ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),
    )
    def test_bad_input(self, change, kind, words):
        with pytest.raises(kind, match=words):
            fastmix.dirichlet(**{"rows": 2, "ways": 2, **change})


# Lambda


def lesser(alpha, count, seed):
    """(lesser of lam and 1-lam, whether that is lam), float64 [count], of a stream's Beta(a, b)."""
    state = draws.state(seed, 0, (None, 0)).numpy()
    if alpha[0] == alpha[1]:
        return cpu.symmetric_beta(cpu.random_words(state, cpu.ROW, 0, 0, count)[:, 2:], alpha[0])
    logs = cpu.log_gamma(state, cpu.GAMMA, 0, 2 * count, np.tile(alpha, count))
    return cpu.lesser(logs[::2] - logs[1::2])


class TestLambda:
    @pytest.mark.trap("pytorch#15738", "float32-kolmogorov-smirnov")
    @pytest.mark.parametrize(
        "alpha", [0.05, 0.1, 0.2, 0.4, 1.0, 2.0, 8.0, 32.0, (0.05, 0.4), (0.2, 8.0), (1.0, 0.5), (32.0, 2.0)], ids=str
    )
    def test_is_beta(self, alpha):
        """Kolmogorov-Smirnov in float64 and in log space: the lesser of lam and 1-lam is looked up in its own tail, because
        floats have an atom at exactly 1 that a correct sampler produces too."""
        stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
        a, b = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        n = 40000
        least, low = lesser((a, b), n, seed=3)
        assert ((least >= 0) & (least <= 0.5)).all()
        rank = np.sort(np.where(low, stats.beta(a, b).cdf(least), 1 - stats.beta(b, a).cdf(least)))
        distance = max(np.max(np.arange(1, n + 1) / n - rank), np.max(rank - np.arange(n) / n))
        assert distance < 1.63 / math.sqrt(n)  # 1 %
        if a == b:  # folded, one tail alone
            folded = np.sort(2 * stats.beta(a, a).cdf(least))
            assert max(np.max(np.arange(1, n + 1) / n - folded), np.max(folded - np.arange(n) / n)) < 1.63 / math.sqrt(n)
        lam = Mixup(alpha, seed=3).sample(torch.empty(n, 1, dtype=torch.float64)).lam
        assert lam.dtype == torch.float64
        low = np.sort(stats.beta(a, b).cdf(lam[lam < 0.5].numpy()))  # the tail that floats resolve
        at = np.arange(len(low)) / n
        assert max(np.max(at + 1 / n - low, initial=0), np.max(low - at, initial=0)) < 1.63 / math.sqrt(n)

    @pytest.mark.trap("pytorch#15738")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
    @pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0, 32.0, (2.0, 6.0)], ids=str)
    def test_float32_moments_and_no_false_half(self, alpha, dtype):
        """In float32 the naive ratio of Gammas ties at the smallest normal, a false lambda of exactly 0.5. Whatever the
        batch's dtype, lambda is float32."""
        n = 100000
        lam = Mixup(alpha, seed=0).sample(torch.empty(n, 1, dtype=dtype)).lam
        assert lam.dtype == torch.float32
        a, b = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
        assert abs(lam.double().mean().item() - mean) < 4 * math.sqrt(variance / n)
        assert abs(lam.double().var().item() / variance - 1) < 4 * math.sqrt(2.2 / n)  # the kurtosis of these is below 3.2
        if a < 1:
            assert (lam == 0.5).sum() <= 1

    @pytest.mark.slow
    @pytest.mark.parametrize(("alpha", "chunks"), [((0.05, 0.05), 10), ((1e-3, 1e-3), 1), ((32.0, 0.05), 1), ((1e30, 1.0), 1)])
    def test_millions_of_float32_draws_are_numbers(self, alpha, chunks):
        halves = 0
        for chunk in range(chunks):
            least, low = lesser(alpha, 10**6, seed=chunk)
            lam = np.where(low, least, 1 - least).astype(np.float32)
            assert 0 <= lam.min() <= lam.max() <= 1  # not so if any is NaN
            halves += int((lam == 0.5).sum())
        assert halves <= chunks

    @pytest.mark.trap("kornia#4649")
    @pytest.mark.parametrize("prob", [0.25, 0.5, 0.8])
    def test_prob_is_applied_once(self, prob):
        """Rows mixed at p**2 (kornia#4649)."""
        for per in ("row", "pair"):
            lam = Mixup(1.0, prob=prob, per=per, seed=0).sample(torch.empty(20000, 1)).lam
            assert abs((lam < 1).double().mean().item() - prob) < 0.02
            box = CutMix(1.0, prob=prob, per=per, seed=0).sample(torch.empty(5000, 1, 999)).box
            assert abs((box[:, 1] > 0).double().mean().item() - prob) < 0.03
        batch = Mixup(1.0, prob=prob, per="batch", seed=0)
        rates = [(batch.sample(torch.empty(4, 1)).lam < 1).double().mean().item() for _ in range(600)]
        assert set(rates) == {0.0, 1.0}
        assert abs(np.mean(rates) - prob) < 0.08
