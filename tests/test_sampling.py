"""Mix by hand, and the samplers: every option against a plain statement of what it means."""

import copy
import functools
import itertools
import math
import multiprocessing
import pickle
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import INTERPRETER, NO_INTERPRETER, NO_TRITON, TRITON
from torch.utils.data import DataLoader

import fastmix
from fastmix import CutMix, Mix, MixedRows, Mixup, RandomMix, sampling
from fastmix._torch import sample as cpu
from fastmix.sampling import draws

PARTNERS = ("any", "same", "different", "flip", "roll")
META = torch.device("meta")  # a device that every machine has, and that is not the CPU


def refused(call, kind, argument, expected, actual):
    """The call raises an error that names the argument, what was expected and what came."""
    with pytest.raises(kind) as raised:
        call()
    assert re.match(rf"{re.escape(argument)}: expected .*{expected}.*, got .*{actual}", str(raised.value), re.DOTALL), (
        raised.value
    )
    assert type(raised.value) is kind


def lesser(alpha, count, seed):
    """(lesser of lam and 1-lam, whether that is lam), float64 [count], of a stream's Beta(a, b)."""
    state = draws.state(seed, 0, (None, 0)).numpy()
    if alpha[0] == alpha[1]:
        return cpu._symmetric_beta(cpu._words(state, cpu.ROW, 0, 0, count)[:, 2:], alpha[0])
    logs = cpu._log_gamma(state, cpu.GAMMA, 0, 2 * count, np.tile(alpha, count))
    return cpu._lesser(logs[::2] - logs[1::2])


def rows_of(m):
    """What each row of a Mix gets, as (lam, index, target_lam, box or None)."""
    box = [None] * len(m.index) if m.box is None else [tuple(row) for row in m.box.tolist()]
    return list(zip(m.lam.tolist(), m.index.tolist(), m.target_lam.tolist(), box, strict=True))


def equal(m, other):
    """Whether two Mixes are the same, bit for bit."""
    return rows_of(m) == rows_of(other)


class TestMix:
    def test_applies_to_several_tensors_and_their_targets(self):
        x, h, y = torch.randn(5, 3, 4), torch.randn(5, 7), torch.randint(0, 9, (5,))
        m = Mix(torch.rand(5), torch.tensor([1, 2, 3, 4, 0]))
        for t in (x, h):
            assert torch.equal(m.apply(t), fastmix.mix(t, m.lam, m.index))
        target = m.target(y)
        assert torch.equal(target.classes, torch.stack((y, y[m.index]), 1))
        assert torch.equal(target.weights, torch.stack((m.lam, 1 - m.lam), 1))
        rows = m.target(torch.eye(5))
        assert isinstance(rows, MixedRows)
        torch.testing.assert_close(rows.dense(), torch.diag(m.lam) + torch.eye(5)[m.index] * (1 - m.lam)[:, None])

    def test_labels_keep_their_class_and_lambda_its_precision(self):
        """bf16 turns class 257 into 256 (kornia#4657), and rounds a label's lambda (timm)."""
        y = torch.tensor([257, 258])
        m = Mix(torch.tensor([0.7001, 0.3]), torch.tensor([1, 0]))
        m.apply(torch.randn(2, 3).bfloat16())
        assert m.target(y).classes.tolist() == [[257, 258], [258, 257]]
        assert m.target(y).weights[0, 0] == torch.tensor(0.7001)

    def test_float_and_target_lam(self):
        y, index = torch.tensor([0, 1]), torch.tensor([1, 0])
        assert Mix(0.3, index).target(y).weights.tolist() == torch.tensor([[0.3, 0.7]] * 2).tolist()
        assert Mix(0.3, index, target_lam=1.0).target(y).weights.tolist() == [[1, 0], [1, 0]]
        assert "lam=0.3" in repr(Mix(0.3, index))

    def test_box_share(self):
        """The share is what the box covers after it is cut off at the border (CutMix-PyTorch#1)."""
        m = Mix(torch.tensor([1.0, 0.5]), torch.tensor([1, 0]), box=torch.tensor([[-2, 1, 2, 3], [0, 0, 9, 2]]))
        with pytest.raises(ValueError, match="target_lam: expected a value, or apply"):
            m.target(torch.tensor([0, 1]))
        m.apply(torch.randn(2, 3, 4, 5))
        torch.testing.assert_close(m.target_lam, torch.tensor([1 - 4 / 20, 0.5 * (1 - 8 / 20)]))
        assert torch.equal(m.target(torch.tensor([0, 1])).weights[:, 0], m.target_lam)
        with pytest.raises(ValueError, match=r"x: expected images of size \[4, 5\], which the boxes are for"):
            m.apply(torch.randn(2, 3, 8, 8))

    def test_moves_to_another_device(self):
        x = torch.randn(3, 2, 6, 5)
        for m in (
            CutMix(seed=0).sample(x),
            Mix(0.25, torch.tensor([1, 2, 0])),
            Mix(torch.rand(3), torch.tensor([1, 2, 0]), 0.5),
        ):
            moved = m.to("cpu")
            assert torch.equal(moved.apply(x), m.apply(x))
            assert torch.equal(moved.target(torch.arange(3)).weights, m.target(torch.arange(3)).weights)
        assert CutMix(seed=0).sample(x).to("meta").box.device.type == "meta"
        with pytest.raises(TypeError, match="device: expected a device, got 1.5"):
            m.to(1.5)

    def test_label_maps_are_cut_as_images_are(self):
        """Segmentation under CutMix (vision#9215): inside the box the partner's label alone."""
        x = torch.randn(3, 2, 6, 5)
        y = torch.randint(0, 4, (3, 6, 5))
        m = CutMix(1.0, seed=1).sample(x)
        target = m.target(y)
        picked = torch.where(target.weights[:, 0] == 1, target.classes[:, 0], target.classes[:, 1])
        assert torch.equal(picked, fastmix.mix(y.double(), 1.0, m.index, box=m.box).long())
        assert Mixup(1.0).sample(x).target(y).weights.shape == (3, 2)
        with pytest.raises(ValueError, match="label maps of the images' size"):
            m.target(y[:, :3, :3])

    def test_label_maps_of_rows_without_a_box(self):
        """They have their target share throughout; with a box, what lies outside it has lam."""
        y = torch.tensor([[[0, 1]], [[2, 3]], [[4, 5]]])
        box = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 2]])
        m = Mix(torch.tensor([0.5, 0.25, 0.5]), torch.tensor([1, 2, 0]), target_lam=torch.tensor([0.75, 1.0, 0.0]), box=box)
        assert m.target(y).weights[:, 0].tolist() == [[[0.0, 0.5]], [[1.0, 1.0]], [[0.0, 0.0]]]
        m = Mix(0.5, m.index, box=box)
        assert m.target(y).weights[:, 0].tolist() == [[[0.0, 0.5]], [[0.5, 0.5]], [[0.5, 0.5]]]

    def test_replays_after_a_round_trip(self, tmp_path):
        """Saved, or sent through a worker's queue, it mixes the same."""
        x, y = torch.randn(6, 3, 8, 8), torch.arange(6)
        m = RandomMix(Mixup(1.0), CutMix()).sample(x)
        torch.save(m, tmp_path / "mix.pt")
        for other in (torch.load(tmp_path / "mix.pt", weights_only=False), pickle.loads(pickle.dumps(m)), copy.deepcopy(m)):
            with pytest.raises(ValueError, match="x: expected images of size"):
                other.apply(x[..., :4])
            assert equal(other, m)
            assert torch.equal(other.apply(x), m.apply(x))
            assert torch.equal(other.target(y).weights, m.target(y).weights)

    @pytest.mark.parametrize(
        ("change", "kind", "argument", "expected", "actual"),
        [
            ({"lam": torch.rand(3)}, ValueError, "lam", r"shape \[2\]", r"float32 tensor of shape \[3\]"),
            ({"lam": torch.rand(2, 1)}, ValueError, "lam", r"shape \[2\]", r"shape \[2, 1\]"),
            ({"lam": torch.rand(2).half()}, TypeError, "lam", "lower precision", "float16 tensor"),
            ({"lam": torch.ones(2).long()}, TypeError, "lam", "float32 or float64", "int64 tensor"),
            ({"lam": "0.5"}, TypeError, "lam", "a float", r"'0.5' \(str\)"),
            ({"lam": True}, TypeError, "lam", "a float", r"True \(bool\)"),
            ({"lam": [0.5, 0.5]}, TypeError, "lam", "a float", r"\(list\)"),
            ({"lam": torch.rand(2, device=META)}, ValueError, "lam", "a tensor on cpu", "on meta"),
            ({"index": [1, 0]}, TypeError, "index", "an int64 tensor", r"\[1, 0\] \(list\)"),
            ({"index": torch.tensor([1, 0], dtype=torch.int32)}, TypeError, "index", "an int64 tensor", "int32 tensor"),
            ({"index": torch.tensor([[1, 0]])}, TypeError, "index", r"\[N\]", r"shape \[1, 2\]"),
            ({"target_lam": torch.rand(2, 1)}, ValueError, "target_lam", r"shape \[2\]", r"shape \[2, 1\]"),
            ({"target_lam": torch.rand(2).bfloat16()}, TypeError, "target_lam", "float32 or float64", "bfloat16 tensor"),
            ({"target_lam": torch.rand(2, device=META)}, ValueError, "target_lam", "a tensor on cpu", "on meta"),
            ({"box": torch.zeros(2, 4)}, TypeError, "box", "int32 or int64", "float32 tensor"),
            ({"box": [[0, 0, 1, 1]] * 2}, TypeError, "box", "int32 or int64", r"\(list\)"),
            ({"box": torch.zeros(2, 5).long()}, ValueError, "box", r"\[2, 4\]", r"shape \[2, 5\]"),
            ({"box": torch.zeros(3, 4).long()}, ValueError, "box", r"\[2, 4\]", r"shape \[3, 4\]"),
            ({"box": torch.zeros(2, 4, device=META).long()}, ValueError, "box", "a tensor on cpu", "on meta"),
        ],
    )
    def test_wrong_parts(self, change, kind, argument, expected, actual):
        refused(lambda: Mix(**{"lam": 0.5, "index": torch.tensor([1, 0]), **change}), kind, argument, expected, actual)

    def test_a_lam_of_the_cpu_goes_anywhere(self):
        m = Mix(torch.tensor(0.5), torch.zeros(2, dtype=torch.int64, device=META))
        with fastmix.backend("torch"):
            assert m.apply(torch.empty(2, 3, device=META)).shape == (2, 3)
        assert m.target(torch.zeros(2, dtype=torch.int64, device=META)).weights.device == META

    @pytest.mark.parametrize(
        ("y", "kind", "expected", "actual"),
        [
            ([0, 1], TypeError, "int64 class indices or floating rows", r"\[0, 1\] \(list\)"),
            (None, TypeError, "int64 class indices", "None"),
            (torch.zeros(2, dtype=torch.int32), TypeError, "int64 class indices", "int32 tensor"),
            (torch.zeros(2, 3, dtype=torch.bool), TypeError, "floating rows", "bool tensor"),
            (torch.zeros(3, dtype=torch.int64), ValueError, "2 rows", r"shape \[3\]"),
            (torch.zeros(3, 2), ValueError, "2 rows", r"shape \[3, 2\]"),
            (torch.tensor(1), ValueError, "2 rows", r"shape \[\]"),
            (torch.zeros(2, dtype=torch.int64, device=META), ValueError, "a tensor on cpu", "on meta"),
        ],
    )
    def test_wrong_labels(self, y, kind, expected, actual):
        refused(lambda: Mix(0.5, torch.tensor([1, 0])).target(y), kind, "y", expected, actual)

    def test_wrong_batches(self):
        m = Mix(0.5, torch.tensor([1, 0]), box=torch.zeros(2, 4).long())
        for x, kind, argument, expected, actual in (
            ([1.0, 2.0], TypeError, "x", "a float16", "list"),
            (torch.zeros(2, 3, 4, 4).long(), TypeError, "x", "a float16", "int64 tensor"),
            (torch.zeros(3, 3, 4, 4), ValueError, "box", r"\[3, 4\]", r"shape \[2, 4\]"),
            (torch.zeros(2, 3), ValueError, "box", r"\[2, 2\]", r"shape \[2, 4\]"),
        ):
            refused(lambda x=x: m.apply(x), kind, argument, expected, actual)
        wrong = Mix(0.5, torch.tensor([1, 2]))
        refused(lambda: wrong.apply(torch.zeros(2, 3)), ValueError, "index", r"a partner in \[0, 2\)", "2 in row 1")
        refused(lambda: wrong.target(torch.tensor([0, 1])), ValueError, "index", r"a partner in \[0, 2\)", "2 in row 1")


@pytest.mark.no_poison
def test_compiles_once_for_all_batch_sizes():
    mixup, cutmix = Mixup(1.0), CutMix()
    both = RandomMix(mixup, RandomMix(cutmix, Mixup(0.5, label="own"), per="batch"), weights=(2, 1))
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    def call(x, y):
        return mixup(x, y)[0], cutmix(x, y)[0], both(x, y)[0]

    compiled = torch.compile(call, backend=count, fullgraph=True)
    for n in (8, 7, 6, 5, 12, 13):
        x, y = torch.randn(n, 2, 8, 8), torch.zeros(n, dtype=torch.int64)
        torch.manual_seed(n)
        mixed = compiled(x, y)
        torch.manual_seed(n)
        for one, expected in zip(mixed, call(x, y), strict=True):
            torch.testing.assert_close(one, expected)
    assert len(frames) <= 2


class TestLambda:
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

    @pytest.mark.parametrize(("alpha", "chunks"), [((0.05, 0.05), 10), ((1e-3, 1e-3), 1), ((32.0, 0.05), 1), ((1e30, 1.0), 1)])
    def test_millions_of_float32_draws_are_numbers(self, alpha, chunks):
        halves = 0
        for chunk in range(chunks):
            least, low = lesser(alpha, 10**6, seed=chunk)
            lam = np.where(low, least, 1 - least).astype(np.float32)
            assert 0 <= lam.min() <= lam.max() <= 1  # not so if any is NaN
            halves += int((lam == 0.5).sum())
        assert halves <= chunks

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


def class_rows(y, row, same):
    """The other rows whose class is, or is not, that of `row`."""
    return [k for k in range(len(y)) if k != row and (y[k] == y[row]) == same]


def check_partners(partner, per, index, y):
    """Every row's partner is what the option's name says."""
    N = len(index)
    for i, j in enumerate(index):
        assert 0 <= j < N
        if partner == "flip":
            assert j == N - 1 - i
        elif partner == "roll" and per != "pair":
            assert j == (i - 1) % N
        elif partner in ("any", "roll"):
            assert j != i or N == 1
        elif j == i:
            assert per == "pair" or not class_rows(y, i, partner == "same")
        else:
            assert j in class_rows(y, i, partner == "same")
    if partner == "any" and per != "pair":  # one cycle
        row, seen = 0, set()
        for _ in range(N):
            seen.add(row)
            row = index[row]
        assert seen == set(range(N))
    if per == "pair":
        whole = [i for i, j in enumerate(index) if index[j] == i and i != j]
        left = N - len(whole)
        sizes = [y.count(c) for c in set(y)]
        if partner == "any" or partner == "roll":
            assert left == (0 if N % 2 == 0 else min(N, 3))
        elif partner == "same":  # as many pairs as there can be
            assert left == sum(size % 2 for size in sizes)
        elif partner == "different":
            assert left == max(N % 2, 2 * max(sizes, default=0) - N)
        if partner == "roll" and N % 2 == 0:
            assert index == [i + 1 if i % 2 == 0 else i - 1 for i in range(N)]


def own_share(m, x, row):
    """How much of a mixed row is its own, counted pixel by pixel."""
    if m.box is None:
        return m.lam[row].item()
    y0, x0, y1, x1 = m.box[row].tolist()
    H, W = x.shape[2:]
    inside = sum(y0 <= r < y1 and x0 <= c < x1 for r in range(H) for c in range(W))
    return (H * W - inside) * m.lam[row].item() / (H * W)


@pytest.mark.parametrize("per", ["row", "pair", "batch"])
@pytest.mark.parametrize("partner", PARTNERS)
def test_every_combination(partner, per):
    """per x partner x label x prob of both samplers, on batches small and odd, row by row."""
    for number, (kind, label, prob, N) in enumerate(
        itertools.product((Mixup, CutMix), ("proportional", "larger", "own"), (0.0, 0.5, 1.0), (0, 1, 2, 3, 4, 5, 7))
    ):
        x = torch.randn(N, 1, 6, 5)
        y = (torch.arange(N) if N % 4 == 1 else torch.randint(0, 1 + N % 4, (N,)))[torch.randperm(N)]
        m = kind(1.0, partner=partner, per=per, label=label, prob=prob, seed=number).sample(x, y)
        assert m.lam.shape == m.index.shape == m.target_lam.shape == (N,)
        index = m.index.tolist()
        check_partners(partner, per, index, y.tolist())
        if kind is CutMix:
            assert (m.lam == 1).all()
            assert m.box.shape == (N, 4)
        share = [own_share(m, x, i) for i in range(N)]
        # who is mixed, and who shares
        drawn = m.lam.tolist() if kind is Mixup else [tuple(box) for box in m.box.tolist()]
        nothing = 1.0 if kind is Mixup else (0, 0, 0, 0)
        alone = [i for i in range(N) if partner in ("same", "different") and index[i] == i]
        assert all(drawn[i] == nothing for i in (range(N) if prob == 0 else alone))
        others = [i for i in range(N) if i not in alone]
        if per == "pair":
            assert all(drawn[i] == drawn[index[i]] for i in others)
        if per == "batch":
            assert len({drawn[i] for i in others}) <= 1
        if kind is Mixup:
            mixed = [i for i in others if drawn[i] != nothing]
            assert prob < 1 or mixed == others
            groups = {"row": len(mixed), "pair": len({min(i, index[i], index[index[i]]) for i in mixed}), "batch": 1}
            assert len({drawn[i] for i in mixed}) == min(groups[per], len(mixed))
        # the target
        for i in range(N):
            expected = {"proportional": share[i], "larger": 1.0 if share[i] >= 0.5 else 0.0, "own": 1.0}[label]
            assert m.target_lam[i].item() == pytest.approx(expected, abs=1e-6)
        target = m.target(y)
        assert target.classes.tolist() == [[y[i].item(), y[j].item()] for i, j in enumerate(index)]
        assert torch.equal(target.weights, torch.stack((m.target_lam, 1 - m.target_lam), 1))
        # the batch
        out = m.apply(x)
        for i, j in enumerate(index):
            expected = m.lam[i] * x[i] + (1 - m.lam[i]) * x[j]
            if kind is CutMix:
                y0, x0, y1, x1 = m.box[i].tolist()
                expected[:, y0:y1, x0:x1] = x[j, :, y0:y1, x0:x1]
            torch.testing.assert_close(out[i], expected)


class TestPartners:
    @staticmethod
    def rates(sampler, y, batches=1500):
        """How often each row meets each, [N, N]."""
        counts, rows, x = torch.zeros(len(y), len(y)), torch.arange(len(y)), torch.empty(len(y), 1)
        for _ in range(batches):
            counts[rows, sampler.sample(x, y).index] += 1
        return counts / batches

    @pytest.mark.parametrize("per", ["row", "pair"])
    def test_any_is_even(self, per):
        rates = self.rates(Mixup(1.0, per=per, seed=0), torch.zeros(5))
        torch.testing.assert_close(rates, (1 - torch.eye(5)) / 4, atol=0.05, rtol=0)

    def test_pairs_of_a_balanced_batch_are_all_matched(self):
        y = torch.arange(4).repeat_interleave(3)
        mixup = Mixup(1.0, per="pair", partner="different", seed=0)
        met = set()
        for _ in range(60):
            index = mixup.sample(torch.empty(12, 1), y).index
            assert (y[index] != y).all()
            met |= set(zip(y.tolist(), y[index].tolist(), strict=True))
        assert len(met) == 12  # every class meets every other

    def test_different_partners_are_even(self):
        rates = self.rates(Mixup(1.0, partner="different", seed=0), torch.tensor([0, 0, 1, 2]))
        expected = [[0, 0, 1 / 2, 1 / 2], [0, 0, 1 / 2, 1 / 2], [1 / 3, 1 / 3, 0, 1 / 3], [1 / 3, 1 / 3, 1 / 3, 0]]
        torch.testing.assert_close(rates, torch.tensor(expected), atol=0.05, rtol=0)

    def test_who_stays_alone_of_an_odd_batch_is_even(self):
        for y, least in (([0, 1, 2], 0.28), ([0, 0, 1, 1, 2, 2, 2], 0.05)):
            rates = self.rates(Mixup(1.0, partner="different", per="pair", seed=0), torch.tensor(y), batches=1000).diag()
            assert rates.sum().item() == pytest.approx(1, abs=1e-4)
            assert rates.min() > least
        rates = self.rates(Mixup(1.0, partner="same", per="pair", seed=0), torch.tensor([0, 0, 0, 1]))
        torch.testing.assert_close(rates.diag(), torch.tensor([1 / 3] * 3 + [1.0]), atol=0.05, rtol=0)

    @pytest.mark.parametrize("per", ["row", "pair"])
    def test_same_partners_are_even(self, per):
        y = torch.tensor([0, 1, 0, 0, 1, 2, 0])
        rates = self.rates(Mixup(1.0, partner="same", per=per, seed=0), y)
        third = 1 / 3
        expected = torch.zeros(7, 7)
        for i, j in itertools.permutations((0, 2, 3, 6), 2):
            expected[i, j] = third
        expected[1, 4] = expected[4, 1] = expected[5, 5] = 1
        torch.testing.assert_close(rates, expected, atol=0.05, rtol=0)


def places(seed, count, dims):
    """What boxes are drawn from: (places, sides), each [count, dims] in [0, 1), of the first batch of a seed."""
    words = cpu._words(draws.state(seed, 0, (None, 0)).numpy(), cpu.PLACE, 0, 0, count)[:, :dims]
    return (words >> np.uint64(32)) / 2**32, (words & np.uint64(2**32 - 1)) / 2**32


def paper_box(sizes, lam, centre):
    """[start, ..., stop, ...] of the box of arXiv:1905.04899 around a centre in [0, 1)**d, in d dimensions."""
    starts, stops = [], []
    for size, at in zip(sizes, centre, strict=True):
        cut = int(size * (1 - lam) ** (1 / len(sizes)))
        middle = int(at * size)
        starts.append(min(max(middle - cut // 2, 0), size))
        stops.append(min(max(middle - cut // 2 + cut, 0), size))
    return starts + stops


def box_area(box):
    dims = len(box) // 2
    return math.prod(box[dims + d] - box[d] for d in range(dims))


SHAPES = {(300, 64): (64,), (300, 2, 63): (63,), (300, 2, 48, 63): (48, 63), (100, 2, 12, 25, 16): (12, 25, 16)}


class TestCutMix:
    @pytest.mark.parametrize("correct_lam", [True, False])
    @pytest.mark.parametrize(("shape", "sizes"), SHAPES.items())
    def test_boxes_are_the_papers(self, shape, sizes, correct_lam):
        """A plain loop over the same draws. Sides are size*(1-lam)**(1/d), not the 2-D square root for intervals; the share
        follows the box as cut off (CutMix-PyTorch#1), unless told not to."""
        x = torch.empty(shape, dtype=torch.float64)
        m, lam = CutMix(1.0, correct_lam=correct_lam, seed=5).sample(x), Mixup(1.0, seed=5).sample(x).lam
        place, _ = places(5, shape[0], len(sizes))
        boxes = [paper_box(sizes, lam[i].item(), place[i]) for i in range(shape[0])]
        assert m.box.tolist() == boxes
        assert any(
            box_area(box) < box_area(paper_box(sizes, p.item(), [0.5] * len(sizes))) for box, p in zip(boxes, lam, strict=True)
        )
        shares = [1 - box_area(box) / math.prod(sizes) for box in boxes] if correct_lam else lam.tolist()
        torch.testing.assert_close(m.target_lam, torch.tensor(shares, dtype=torch.float64), atol=1e-12, rtol=0)
        assert (m.lam == 1).all()

    @pytest.mark.parametrize(("shape", "sizes"), SHAPES.items())
    def test_boxes_of_bounded_sides(self, shape, sizes):
        """minmax: every side and every place of it equally likely."""
        m = CutMix(minmax=(0.25, 0.6), correct_lam=False, seed=5).sample(torch.empty(shape, dtype=torch.float64))
        (place, length), boxes = places(5, shape[0], len(sizes)), []
        for i in range(shape[0]):
            starts, stops = [], []
            for d, size in enumerate(sizes):
                choices = range(int(size * 0.25), int(size * 0.6) + 1)
                side = choices[int(length[i, d] * len(choices))]
                starts.append(int(place[i, d] * (size - side + 1)))
                stops.append(starts[-1] + side)
            boxes.append(starts + stops)
        assert m.box.tolist() == boxes
        shares = torch.tensor([1 - box_area(box) / math.prod(sizes) for box in boxes], dtype=torch.float64)
        torch.testing.assert_close(m.target_lam, shares, atol=1e-12, rtol=0)  # the box's, whatever correct_lam

    @pytest.mark.parametrize("alpha", [0.5, 1.0, (2.0, 1.0)], ids=str)
    def test_boxes_cover_as_the_authors_do(self, alpha):
        """CutMix-PyTorch's rand_bbox, in law: what is covered at the corners, edges and the middle, and the mean share."""
        rng, n, size = np.random.default_rng(0), 4000, 250
        a, b = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        m = CutMix(alpha, seed=0).sample(torch.zeros(1).expand(n, 1, size, size))
        points = [(0, 0), (0, 125), (125, 125), (249, 40), (60, 200), (249, 249)]
        covered, shares = np.zeros(len(points)), []
        for _ in range(n):
            cut = int(size * np.sqrt(1 - rng.beta(a, b)))
            cx, cy = rng.integers(size), rng.integers(size)
            x1, x2 = np.clip(cx - cut // 2, 0, size), np.clip(cx + cut // 2, 0, size)
            y1, y2 = np.clip(cy - cut // 2, 0, size), np.clip(cy + cut // 2, 0, size)
            shares.append(1 - (x2 - x1) * (y2 - y1) / size**2)
            covered += [y1 <= r < y2 and x1 <= c < x2 for r, c in points]
        y1, x1, y2, x2 = m.box.T
        ours = [((y1 <= r) & (r < y2) & (x1 <= c) & (c < x2)).double().mean().item() for r, c in points]
        np.testing.assert_allclose(ours, covered / n, atol=4 * 0.5 * math.sqrt(2 / n))
        assert abs(m.target_lam.mean().item() - np.mean(shares)) < 4 * np.std(shares) * math.sqrt(2 / n)
        assert abs(m.target_lam.std().item() - np.std(shares)) < 0.02

    def test_minmax_reaches_its_limits(self):
        m = CutMix(minmax=(0.25, 0.5), seed=0).sample(torch.empty(500, 1, 16, 32))
        height, width = m.box[:, 2] - m.box[:, 0], m.box[:, 3] - m.box[:, 1]
        assert set(height.tolist()) == set(range(4, 9))
        assert set(width.tolist()) == set(range(8, 17))
        assert (m.box >= 0).all()
        assert (m.box[:, 2:] <= torch.tensor([16, 32])).all()
        assert {0, 12} <= set(m.box[height == 4, 0].tolist())  # both edges
        whole = CutMix(minmax=(1, 1)).sample(torch.empty(3, 1, 4, 5))
        assert whole.box.tolist() == [[0, 0, 4, 5]] * 3
        assert whole.target_lam.tolist() == [0, 0, 0]
        assert (CutMix(minmax=(0, 0)).sample(torch.empty(3, 1, 4, 5)).target_lam == 1).all()

    def test_pairs_share_a_box(self):
        m = CutMix(per="pair", seed=0).sample(torch.empty(40, 1, 320, 320))
        assert torch.equal(m.box, m.box[m.index])
        assert len(set(map(tuple, m.box.tolist()))) == 20
        m = CutMix(per="batch", minmax=(0.2, 0.8), seed=0).sample(torch.empty(40, 1, 32, 32))
        assert len(set(map(tuple, m.box.tolist()))) == 1

    def test_unmixed_rows_have_no_box(self):
        x = torch.randn(400, 1, 8, 8)
        for correct_lam in (True, False):
            m = CutMix(1.0, prob=0.3, correct_lam=correct_lam, seed=0).sample(x)
            empty = (m.box == 0).all(1)
            assert abs(empty.double().mean().item() - 0.7) < 0.1
            assert (m.target_lam[empty] == 1).all()
            assert torch.equal(m.apply(x)[empty], x[empty])

    def test_images_without_pixels(self):
        m = CutMix(seed=0).sample(torch.empty(3, 2, 0, 4))
        assert m.apply(torch.empty(3, 2, 0, 4)).shape == (3, 2, 0, 4)
        assert (m.target_lam == 1).all()


class TestRandomMix:
    """Members with seeds of their own draw what they draw alone: each row of the mix is then one member's row."""

    @staticmethod
    def chosen(m, members):
        """Which member each row is of: [N]."""
        rows, empty = rows_of(m), (0,) * (0 if m.box is None else m.box.shape[1])
        parts = [[(*row[:3], row[3] or empty or None) for row in rows_of(member)] for member in members]
        matches = [[k for k, part in enumerate(parts) if part[i] == row] for i, row in enumerate(rows)]
        assert all(len(match) == 1 for match in matches)
        return np.array([match[0] for match in matches])

    @staticmethod
    def members():
        return [
            Mixup(0.4, seed=1),
            CutMix(1.0, partner="flip", seed=2),
            Mixup(1.0, per="batch", partner="different", label="larger", seed=3),
            CutMix(1.0, minmax=(0.3, 0.6), label="own", seed=4),
        ]

    @pytest.mark.parametrize(
        "weights", [None, (4, 3, 2, 1), [0.0, 0.5, 0.0, 1.5], (1, 0, 0, 0), (0, 0, 0, 1e300), (3, 1, 0, 0), (1e308,) * 4]
    )
    def test_each_row_is_one_members(self, weights):
        x, y = torch.randn(2000, 1, 24, 24), torch.arange(2000) % 7
        alone = [member.sample(x, y) for member in self.members()]
        m = RandomMix(*self.members(), weights=weights, seed=5).sample(x, y)
        share = np.bincount(self.chosen(m, alone), minlength=4) / 2000
        expected = np.array(weights or [1] * 4, dtype=float)
        expected /= expected.max()
        expected /= expected.sum()
        assert (share[expected == 0] == 0).all()
        np.testing.assert_allclose(share, expected, atol=4 * 0.5 / math.sqrt(2000))

    @pytest.mark.parametrize("chance", [0, 2**52, 2**53 - 1])
    def test_weight_0_is_never_used(self, monkeypatch, chance):
        """Not even by the least and the largest chance, or one that meets a limit exactly."""
        x, y = torch.randn(5, 1, 24, 24), torch.arange(5)
        alone = [member.sample(x, y) for member in self.members()]
        mixer = RandomMix(*self.members(), weights=(0, 1, 0, 1))
        monkeypatch.setattr(cpu._Batch, "chance", lambda draw, node: np.full(draw.rows, float(chance)))
        assert set(self.chosen(mixer.sample(x, y), alone)) == {1 if chance < 2**52 else 3}

    def test_rows_choose_alone_and_batches_together(self):
        x, y = torch.randn(9, 1, 24, 24), torch.arange(9)
        patterns, batches = set(), np.zeros(4)
        members, row, batch = (
            self.members(),
            RandomMix(*self.members(), seed=5),
            RandomMix(*self.members(), weights=(1, 2, 3, 4), per="batch", seed=6),
        )
        for _ in range(150):
            alone = [member.sample(x, y) for member in members]
            patterns.add(tuple(self.chosen(row.sample(x, y), alone)))
            (k,) = set(self.chosen(batch.sample(x, y), alone))
            batches[k] += 1
        assert len(patterns) > 145
        np.testing.assert_allclose(batches / 150, [0.1, 0.2, 0.3, 0.4], atol=0.15)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(8, 40), (7, 2, 40), (8, 2, 12, 10), (5, 1, 6, 5, 4)])
    def test_one_pass_serves_all_rows(self, monkeypatch, shape, dtype):
        x, y = torch.randn(shape).to(dtype), torch.arange(shape[0]) % 3
        alone = [member.sample(x, y) for member in self.members()]
        mixer = RandomMix(*self.members(), seed=0)
        calls = []
        mix_checked = sampling.plan.mix_checked
        monkeypatch.setattr(sampling.plan, "mix_checked", lambda *args: calls.append(0) or mix_checked(*args))
        mixed, target = mixer(x, y)
        assert len(calls) == 1
        for i, k in enumerate(self.chosen(RandomMix(*self.members(), seed=0).sample(x, y), alone)):
            assert torch.equal(mixed[i], alone[k].apply(x)[i])
            assert torch.equal(target.weights[i], alone[k].target(y).weights[i])
            assert torch.equal(target.classes[i], alone[k].target(y).classes[i])

    @pytest.mark.parametrize("N", [0, 1, 2, 3])
    @pytest.mark.parametrize("per", ["row", "batch"])
    def test_small_batches(self, per, N):
        x, y = torch.randn(N, 3, 8, 8), torch.zeros(N, dtype=torch.int64)
        mixed, target = RandomMix(*self.members(), per=per, seed=0)(x, y)
        assert mixed.shape == x.shape
        assert target.classes.shape == (N, 2)

    def test_boxes_only_where_a_member_has_them(self):
        x = torch.randn(50, 3, 8, 8)
        assert RandomMix(Mixup(1.0), Mixup(0.2)).sample(x).box is None
        assert RandomMix(Mixup(1.0), Mixup(0.2)).sample(torch.randn(50)).lam.shape == (50,)
        for samplers in ((Mixup(1.0, seed=1), CutMix(seed=2)), (CutMix(seed=2), Mixup(1.0, seed=1))):
            m = RandomMix(*samplers, seed=0).sample(x)
            boxed = (m.box[:, :2] < m.box[:, 2:]).all(1)
            assert (m.lam[boxed] == 1).all()
            assert (m.box[m.lam < 1] == 0).all()
            assert boxed.any()
            assert (m.lam < 1).any()

    def test_label_maps_follow_each_rows_sampler(self):
        x, y = torch.randn(40, 1, 6, 5), torch.randint(0, 4, (40, 6, 5))
        members = [Mixup(1.0, label="larger", seed=1), CutMix(minmax=(0.3, 0.6), seed=2)]
        alone = [member.sample(x) for member in members]
        m = RandomMix(Mixup(1.0, label="larger", seed=1), CutMix(minmax=(0.3, 0.6), seed=2), seed=0).sample(x)
        weights = m.target(y).weights
        for i, k in enumerate(self.chosen(m, alone)):
            expected = alone[k].target(y).weights[i]
            assert torch.equal(weights[i], expected if k else expected.view(2, 1, 1).expand(2, 6, 5))

    def test_members_may_be_random_too(self):
        x = torch.randn(3000, 1, 24, 24)
        first, second, third = leaves = [Mixup(1.0, seed=1), CutMix(minmax=(0.5, 0.5), seed=2), Mixup(0.2, seed=3)]
        alone = [copy.deepcopy(leaf).sample(x) for leaf in leaves]
        m = RandomMix(first, RandomMix(second, third, weights=(1, 3)), seed=7).sample(x)
        np.testing.assert_allclose(np.bincount(self.chosen(m, alone)) / 3000, [0.5, 0.125, 0.375], atol=0.04)

    def test_members_without_a_seed_draw_from_it(self):
        x = torch.randn(20, 1, 8, 8)

        def mixer():
            return RandomMix(Mixup(1.0), RandomMix(CutMix(), Mixup(0.3, seed=4)), seed=3)

        before = torch.random.get_rng_state()
        one = mixer()
        m = one.sample(x)
        assert equal(m, mixer().sample(x))
        assert not equal(m, one.sample(x))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert set(one.state_dict()) == {
            f"{name}_extra_state"
            for name in ("", "samplers.0.", "samplers.1.", "samplers.1.samplers.0.", "samplers.1.samplers.1.")
        }
        assert [key for key, state in one.state_dict().items() if state] == [
            "_extra_state",
            "samplers.1.samplers.1._extra_state",
        ]

    def test_a_given_generator_serves_all_members(self):
        x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 3
        mixer = RandomMix(*self.members(), RandomMix(*self.members()), seed=5)
        one, two = (mixer.sample(x, y, generator=torch.Generator().manual_seed(9)) for _ in range(2))
        assert equal(one, two)
        fresh = RandomMix(*self.members(), RandomMix(*self.members()), seed=5)
        assert mixer.state_dict() == fresh.state_dict()  # nobody's own was used
        torch.manual_seed(9)
        unseeded = RandomMix(Mixup(1.0), CutMix()).sample(x)
        assert equal(unseeded, RandomMix(Mixup(1.0), CutMix()).sample(x, generator=torch.Generator().manual_seed(9)))

    def test_modes(self):
        x, y = torch.randn(20, 1, 8, 8), torch.arange(20)
        mixer = RandomMix(Mixup(1.0), CutMix(), seed=0).eval()
        assert not any(member.training for member in mixer.samplers)
        assert mixer(x, y) == (x, y)
        assert equal(mixer.sample(x), Mix(torch.ones(20), torch.arange(20)))
        mixer.train()
        assert not torch.equal(mixer(x, y)[0], x)
        mixer = RandomMix(Mixup(1.0), CutMix(partner="same").eval(), seed=0)
        m = mixer.sample(x)  # a member put to rest leaves its rows as they are, and needs no y
        assert ((m.lam == 1) == (m.index == torch.arange(20))).all()
        assert {True, False} == set((m.lam == 1).tolist())


def test_label_options():
    """As the share falls from 1 to 0: "larger" flips at a half, which is still the row's own."""
    for kind in (Mixup, CutMix):
        x = torch.empty(400, 1, 8, 8)
        share = kind(1.0, seed=0).sample(x).target_lam
        larger, own = (kind(1.0, seed=0, label=label).sample(x).target_lam for label in ("larger", "own"))
        assert torch.equal(larger, (share >= 0.5).float())
        assert (own == 1).all()
    half = CutMix(minmax=(0.5, 0.5), label="larger").sample(torch.empty(4, 8))
    assert half.target_lam.tolist() == [1, 1, 1, 1]


SAMPLERS = {
    "Mixup": lambda seed=None: Mixup(0.4, seed=seed),
    "Mixup, pairs of a class": lambda seed=None: Mixup((1.0, 2.0), partner="same", per="pair", prob=0.7, seed=seed),
    "CutMix": lambda seed=None: CutMix(partner="different", seed=seed),
    "CutMix, minmax": lambda seed=None: CutMix(minmax=(0.2, 0.9), seed=seed),
    "RandomMix": lambda seed=None: RandomMix(Mixup(0.4), CutMix(per="pair"), seed=seed),
    "RandomMix, own seeds": lambda seed=None: RandomMix(
        Mixup(0.4, seed=seed), CutMix(seed=seed and seed + 1), seed=seed and seed + 2
    ),
}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
class TestEverySampler:
    x, y = torch.randn(12, 1, 16, 16), torch.arange(12) % 3

    def draw(self, sampler, **kwargs):
        return sampler.sample(self.x, self.y, **kwargs)

    def test_call_gives_batch_and_target_and_eval_is_the_identity(self, make):
        sampler = make(seed=3)
        mixed, target = sampler(self.x, self.y)
        m = self.draw(make(seed=3))
        assert torch.equal(mixed, m.apply(self.x))
        assert isinstance(target, fastmix.SoftTarget)
        assert torch.equal(target.weights, m.target(self.y).weights)
        if "same" not in repr(sampler) and "different" not in repr(sampler):  # no class indices needed
            rows = torch.rand(12, 5)
            mixed_rows = make(seed=3)(self.x, rows)[1]
            assert isinstance(mixed_rows, MixedRows)
            own = m.target_lam[:, None]
            torch.testing.assert_close(mixed_rows.dense(), own * rows + (1 - own) * rows[m.index])
        state = sampler.eval().state_dict()
        batch, labels = sampler(self.x, self.y)
        assert batch is self.x
        assert labels is self.y
        assert torch.equal(self.draw(sampler).apply(self.x), self.x)
        assert (self.draw(sampler).target(self.y).weights == torch.tensor([1.0, 0.0])).all()
        assert sampler.sample(self.x).index.tolist() == list(range(12))  # and needs no y
        assert sampler.state_dict() == state  # nothing was drawn

    def test_applies_to_several_tensors(self, make):
        m = self.draw(make(seed=3))
        more = torch.randn(12, 4, 16, 16)
        assert torch.equal(m.apply(more)[:, 1:2], m.apply(more[:, 1:2]))
        assert torch.equal(m.apply(more), fastmix.mix(more, m.lam, m.index, box=m.box))
        assert torch.equal(m.apply(self.x), m.apply(self.x))
        if m.box is not None:
            fresh = self.draw(make(seed=3))
            refused(
                lambda: fresh.apply(self.x[..., :8]), ValueError, "x", r"images of size \[16, 16\]", r"shape \[12, 1, 16, 8\]"
            )

    def test_generators_replay(self, make):
        one, two = (self.draw(make(), generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert equal(one, two)
        seeded = make(seed=1)
        assert equal(self.draw(seeded, generator=torch.Generator().manual_seed(3)), one)
        before = torch.random.get_rng_state()
        first = self.draw(seeded)
        assert equal(first, self.draw(make(seed=1)))  # what came from another generator left its own alone
        assert not equal(first, self.draw(seeded))
        assert not equal(first, self.draw(make(seed=2)))
        assert torch.equal(torch.random.get_rng_state(), before)  # as seeded samplers leave the global one
        torch.manual_seed(5)
        unseeded = self.draw(make())
        assert not torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(5)
        assert equal(self.draw(make()), unseeded)

    def test_state_goes_on_in_mid_stream(self, make, tmp_path):
        sampler = make(seed=1)
        for _ in range(3):
            self.draw(sampler)
        torch.save(sampler.state_dict(), tmp_path / "state.pt")
        ahead = [self.draw(sampler) for _ in range(3)]
        fresh, drawn = make(seed=99), make(seed=98)
        self.draw(drawn)
        for resumed in (fresh, drawn, sampler):
            resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            for expected in ahead:
                assert equal(self.draw(resumed), expected)
        for early in (make(seed=1), make(seed=99)):
            early.load_state_dict(make(seed=5).state_dict())  # of one that has not drawn yet
            assert early.state_dict() == make(seed=5).state_dict()
            assert equal(self.draw(early), self.draw(make(seed=5)))

    def test_copies_and_pickles_go_on_in_mid_stream(self, make):
        sampler = make(seed=1)
        for copied in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
            assert equal(self.draw(copied), self.draw(make(seed=1)))
        self.draw(sampler)
        copies = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler)), copy.deepcopy(copy.deepcopy(sampler))]
        assert b"Generator" not in pickle.dumps(sampler)  # not every torch can pickle one, nor every machine load it
        for _ in range(2):
            expected = self.draw(sampler)
            assert all(equal(self.draw(copied), expected) for copied in copies)
        assert equal(
            self.draw(copy.deepcopy(make()), generator=torch.Generator().manual_seed(3)),
            self.draw(make(), generator=torch.Generator().manual_seed(3)),
        )

    def test_workers_draw_differently(self, make, monkeypatch):
        """The rule, without processes: a stream for each worker's seed, continued while the worker lives."""

        def in_worker(seed):
            monkeypatch.setattr(draws, "get_worker_info", lambda: None if seed is None else SimpleNamespace(seed=seed))

        sampler = make(seed=1)
        first = self.draw(sampler)
        streams = {}
        for seed in (2**40, 2**40 + 1, 2**40 + 2**20):
            in_worker(seed)
            copied = copy.deepcopy(sampler)
            streams[seed] = [self.draw(copied) for _ in range(2)]
            again = make(seed=1)  # whatever the original has drawn before
            assert all(equal(self.draw(again), m) for m in streams[seed])
            other = make(seed=2)
            assert not equal(self.draw(other), streams[seed][0])
            saved = copied.state_dict()
            expected = self.draw(copied)
            for resumed in (copied, make(seed=5)):
                resumed.load_state_dict(saved)
                assert equal(self.draw(resumed), expected)
        in_worker(None)
        every = [first, *itertools.chain(*streams.values()), self.draw(sampler)]
        assert not any(equal(a, b) for a, b in itertools.combinations(every, 2))
        fresh = make(seed=1)
        assert [equal(self.draw(fresh), m) for m in (every[0], every[-1])] == [True, True]  # the original goes on


class Collate:
    """Mixes in the worker, and tells which one it was."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __call__(self, rows):
        return torch.utils.data.get_worker_info().id, self.sampler.sample(torch.stack(rows))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_seeded_samplers_in_dataloader_workers():
    """Every worker of every epoch draws its own, and the main process's seed repeats them all."""
    preferred = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(preferred)
    if preferred == "forkserver":
        context.set_forkserver_preload(["fastmix"])
    sampler = RandomMix(Mixup(1.0, seed=1), CutMix(), seed=2)
    sampler.sample(torch.empty(4, 1, 8, 8))  # copies of one that has drawn, too
    data = list(torch.randn(16, 1, 8, 8))
    loader = DataLoader(data, batch_size=4, num_workers=2, collate_fn=Collate(sampler), multiprocessing_context=context)

    def epochs(seed):
        torch.manual_seed(seed)
        return [[(worker, rows_of(m)) for worker, m in loader] for _ in range(2)]

    one = epochs(0)
    assert [worker for worker, _ in one[0]] == [0, 1, 0, 1]
    batches = [rows for epoch in one for _, rows in epoch]
    assert not any(a == b for a, b in itertools.combinations(batches, 2))
    assert epochs(0) == one


COMMON_OPTIONS = [
    ({"alpha": 0}, ValueError, "alpha", "positive", r"0 \(int\)"),
    ({"alpha": 1e-39}, ValueError, "alpha", "positive", "1e-39"),
    ({"alpha": -1.0}, ValueError, "alpha", "positive", "-1.0"),
    ({"alpha": float("nan")}, ValueError, "alpha", "positive", "nan"),
    ({"alpha": math.inf}, ValueError, "alpha", "to 1e30", "inf"),
    ({"alpha": 1e39}, ValueError, "alpha", "to 1e30", r"1e\+39"),
    ({"alpha": (1.0, 0.0)}, ValueError, "alpha", "positive", r"\(1.0, 0.0\)"),
    ({"alpha": "1"}, TypeError, "alpha", "a number or a pair", r"'1' \(str\)"),
    ({"alpha": None}, TypeError, "alpha", "a number or a pair", "None"),
    ({"alpha": True}, TypeError, "alpha", "a number or a pair", "True"),
    ({"alpha": (1.0, 2.0, 3.0)}, TypeError, "alpha", "a number or a pair", r"\(1.0, 2.0, 3.0\)"),
    ({"alpha": torch.tensor(1.0)}, TypeError, "alpha", "a number or a pair", "float32 tensor"),
    ({"per": "image"}, ValueError, "per", "one of 'row', 'pair', 'batch'", r"'image' \(str\)"),
    ({"per": None}, ValueError, "per", "one of 'row'", "None"),
    ({"partner": "next"}, ValueError, "partner", "one of 'any', 'same', 'different', 'flip', 'roll'", "'next'"),
    ({"label": "soft"}, ValueError, "label", "one of 'proportional', 'larger', 'own'", "'soft'"),
    ({"prob": 1.5}, ValueError, "prob", r"a number in \[0, 1\]", "1.5"),
    ({"prob": -0.1}, ValueError, "prob", r"a number in \[0, 1\]", "-0.1"),
    ({"prob": math.nan}, ValueError, "prob", r"a number in \[0, 1\]", "nan"),
    ({"prob": "1"}, TypeError, "prob", r"a number in \[0, 1\]", r"'1' \(str\)"),
    ({"seed": 1.0}, TypeError, "seed", "an int or None", r"1.0 \(float\)"),
    ({"seed": True}, TypeError, "seed", "an int or None", r"True \(bool\)"),
    ({"seed": -1}, ValueError, "seed", r"an int in \[0, 2\*\*63\)", "-1"),
    ({"seed": 2**70}, ValueError, "seed", r"an int in \[0, 2\*\*63\)", str(2**70)),
]
CUTMIX_OPTIONS = [
    ({"minmax": 0.5}, TypeError, "minmax", r"\(least, most\)", "0.5"),
    ({"minmax": (0.1, 0.2, 0.3)}, TypeError, "minmax", r"\(least, most\)", r"\(0.1, 0.2, 0.3\)"),
    ({"minmax": (0.5, 0.2)}, ValueError, "minmax", "least <= most", r"\(0.5, 0.2\)"),
    ({"minmax": (0.5, 1.2)}, ValueError, "minmax", r"a number in \[0, 1\]", "1.2"),
    ({"minmax": (-0.5, 0.2)}, ValueError, "minmax", r"a number in \[0, 1\]", "-0.5"),
    ({"minmax": ("0", 0.2)}, TypeError, "minmax", r"a number in \[0, 1\]", r"'0' \(str\)"),
    ({"correct_lam": "no"}, TypeError, "correct_lam", "a bool", r"'no' \(str\)"),
    ({"correct_lam": 0}, TypeError, "correct_lam", "a bool", r"0 \(int\)"),
]


@pytest.mark.parametrize(("kind", "table"), [(Mixup, COMMON_OPTIONS), (CutMix, COMMON_OPTIONS + CUTMIX_OPTIONS)])
def test_wrong_options(kind, table):
    for options, *error in table:
        refused(lambda options=options: kind(**{"alpha": 1.0, **options}), *error)


@pytest.mark.parametrize(
    ("samplers", "options", "kind", "argument", "expected", "actual"),
    [
        ((), {}, ValueError, "samplers", "at least one sampler", r"\(\)"),
        ((Mixup,), {}, TypeError, "samplers[0]", "a Mixup, CutMix, BetaMask or RandomMix", "class"),
        (([Mixup(1.0), CutMix()],), {}, TypeError, "samplers[0]", "a Mixup, CutMix, BetaMask or RandomMix", r"\(list\)"),
        ((Mixup(1.0), 0.5), {}, TypeError, "samplers[1]", "a Mixup, CutMix, BetaMask or RandomMix", r"0.5 \(float\)"),
        ((Mixup(1.0), torch.nn.Identity()), {}, TypeError, "samplers[1]", "a Mixup", r"Identity\(\)"),
        ((Mixup(1.0), None), {}, TypeError, "samplers[1]", "a Mixup", "None"),
        ((Mixup(1.0), CutMix()), {"weights": (1.0,)}, ValueError, "weights", "2 numbers", r"\(1.0,\)"),
        ((Mixup(1.0), CutMix()), {"weights": [1, 2, 3]}, ValueError, "weights", "2 numbers", r"\[1, 2, 3\]"),
        ((Mixup(1.0), CutMix()), {"weights": ()}, ValueError, "weights", "2 numbers", r"\(\)"),
        ((Mixup(1.0), CutMix()), {"weights": (1.0, -0.5)}, ValueError, "weights", "at least 0", "-0.5"),
        ((Mixup(1.0), CutMix()), {"weights": (0, 0.0)}, ValueError, "weights", "not all 0", r"\(0, 0.0\)"),
        ((Mixup(1.0), CutMix()), {"weights": (1, math.nan)}, ValueError, "weights", "finite", "nan"),
        ((Mixup(1.0), CutMix()), {"weights": (1, math.inf)}, ValueError, "weights", "finite", "inf"),
        ((Mixup(1.0), CutMix()), {"weights": (1, 10**400)}, ValueError, "weights", "finite", "1000"),
        ((Mixup(1.0), CutMix()), {"weights": 0.5}, TypeError, "weights", "a sequence of numbers", "0.5"),
        ((Mixup(1.0), CutMix()), {"weights": "12"}, TypeError, "weights", "a sequence of numbers", "'12'"),
        ((Mixup(1.0), CutMix()), {"weights": (1, "2")}, TypeError, "weights", "a sequence of numbers", "'2'"),
        ((Mixup(1.0), CutMix()), {"weights": (1, True)}, TypeError, "weights", "a sequence of numbers", "True"),
        ((Mixup(1.0), CutMix()), {"weights": torch.ones(2)}, TypeError, "weights", "a sequence of numbers", "float32 tensor"),
        ((Mixup(1.0),), {"per": "pair"}, ValueError, "per", "one of 'row', 'batch'", "'pair'"),
        ((Mixup(1.0),), {"per": None}, ValueError, "per", "one of 'row', 'batch'", "None"),
        ((Mixup(1.0),), {"seed": 0.5}, TypeError, "seed", "an int or None", "0.5"),
        ((Mixup(1.0),), {"seed": -1}, ValueError, "seed", "an int in", "-1"),
    ],
)
def test_wrong_random_mix(samplers, options, kind, argument, expected, actual):
    refused(lambda: RandomMix(*samplers, **options), kind, argument, expected, actual)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_wrong_batches_are_refused_before_anything_is_drawn(make):
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    sampler = make(seed=0)
    for call, *error in (
        (lambda: sampler.sample([1.0, 2.0]), TypeError, "x", r"a tensor \[N, ...\]", r"\(list\)"),
        (lambda: sampler.sample(None), TypeError, "x", r"a tensor \[N, ...\]", "None"),
        (lambda: sampler.sample(torch.tensor(1.0)), ValueError, "x", r"a tensor \[N, ...\]", r"shape \[\]"),
        (lambda: sampler.sample(x, y, generator=3), TypeError, "generator", "a torch.Generator", r"3 \(int\)"),
        (lambda: sampler(x, y, generator="0"), TypeError, "generator", "a torch.Generator", r"'0' \(str\)"),
        (
            lambda: sampler.sample(x.to(META), y.to(META), generator=torch.Generator()),
            ValueError,
            "generator",
            "on meta",
            "on cpu",
        ),
        (lambda: sampler(x.to(torch.uint8), y), TypeError, "x", "a float16", "uint8 tensor"),
        (lambda: sampler(x.to_sparse(), y), TypeError, "x", "a dense", "float32 tensor"),
        (lambda: sampler([x], y), TypeError, "x", "a float16", "list"),
        (lambda: sampler(x, None), TypeError, "y", "int64 class indices or floating rows", "None"),
        (lambda: sampler(x, y.int()), TypeError, "y", "int64 class indices or floating rows", "int32 tensor"),
        (lambda: sampler(x, y[:3]), ValueError, "y", "4 rows", r"shape \[3\]"),
        (lambda: sampler(x, y.to(META)), ValueError, "y", "on cpu", "on meta"),
    ):
        refused(call, *error)
    assert sampler.state_dict() == make(seed=0).state_dict()


@pytest.mark.parametrize("partner", ["same", "different"])
def test_class_partners_need_classes(partner):
    x = torch.randn(4, 1, 8, 8)
    for sampler in (
        Mixup(1.0, partner=partner, seed=0),
        CutMix(partner=partner, seed=0),
        RandomMix(Mixup(1.0, seed=1), RandomMix(CutMix(partner=partner, seed=2), seed=3), seed=4),
    ):
        for y, *error in (
            (None, TypeError, "y", f"int64 class indices for partner='{partner}'", "None"),
            (torch.zeros(4), TypeError, "y", "int64 class indices", "float32 tensor"),
            ([0, 1, 2, 3], TypeError, "y", "int64 class indices", "list"),
            (torch.zeros(3).long(), ValueError, "y", r"shape \[4\]", r"shape \[3\]"),
            (torch.zeros(4, 1).long(), ValueError, "y", r"shape \[4\]", r"shape \[4, 1\]"),
            (torch.zeros(4, device=META).long(), ValueError, "y", "on cpu", "on meta"),
        ):
            refused(lambda sampler=sampler, y=y: sampler.sample(x, y), *error)
        refused(lambda sampler=sampler: sampler(x, torch.rand(4, 3)), TypeError, "y", "int64 class indices", "float32 tensor")
        assert not any(state["batch"] for state in sampler.state_dict().values())


def test_boxes_need_a_dimension_to_cut():
    for sampler in (CutMix(seed=0), RandomMix(Mixup(1.0, seed=1), CutMix(), seed=0)):
        refused(lambda sampler=sampler: sampler.sample(torch.empty(4)), ValueError, "x", r"\[N, L\]", r"shape \[4\]")
        assert not sampler.state_dict()["_extra_state"]["batch"]


def test_reprs_tell_the_options():
    for sampler, options in (
        (Mixup(0.2, per="pair"), ("alpha=0.2", "per='pair'", "partner='any'", "prob=1.0", "seed=None")),
        (CutMix((1, 2), minmax=(0.1, 0.2)), ("alpha=(1.0, 2.0)", "minmax=(0.1, 0.2)", "correct_lam=True")),
        (
            RandomMix(Mixup(0.2), CutMix(), weights=(1, 3), seed=4),
            ("weights=(1.0, 3.0)", "per='row'", "seed=4", "Mixup(", "CutMix("),
        ),
    ):
        for option in options:
            assert option in repr(sampler)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_draws_on_the_device_without_a_sync(device):
    x, y = torch.randn(16, 3, 8, 8, device=device), torch.randint(0, 4, (16,), device=device)
    samplers = [
        kind(1.0, partner=partner, per=per) for kind in (Mixup, CutMix) for partner in PARTNERS for per in ("row", "pair")
    ]
    samplers += [Mixup(1.0, per="batch", label="larger"), CutMix(minmax=(0.2, 0.5)), CutMix(correct_lam=False)]
    members = [Mixup(0.4, seed=1), CutMix(), RandomMix(CutMix(minmax=(0.2, 0.5)), Mixup(1.0, partner="different"))]
    samplers += [RandomMix(*members, weights=(1, 2, 3), per=per, seed=seed) for per in ("row", "batch") for seed in (None, 5)]
    given = torch.Generator(device).manual_seed(0)
    for sampler in samplers:
        sampler(x, y)
        sampler(x, y, generator=given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sampler in samplers:
            mixed, target = sampler(x, y)
            sampler(x, y, generator=given)
            assert mixed.device == target.weights.device == x.device
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The stream, and its state


def test_states_are_a_few_integers():
    sampler = RandomMix(Mixup(1.0), CutMix(seed=7), seed=3)
    for _ in range(2):
        sampler.sample(torch.empty(4, 1, 8, 8))
    states = sampler.state_dict()
    assert states["_extra_state"] == {"version": 1, "sampler": 4, "seed": 3, "batch": 2}
    assert states["samplers.1._extra_state"] == {"version": 1, "sampler": 2, "seed": 7, "batch": 2}
    assert states["samplers.0._extra_state"] == {}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (5, TypeError, r"state: expected {version, sampler, seed, batch: int} of a sampler, got 5"),
        ({"device": "cpu"}, TypeError, "state: expected {version"),
        ({"version": 2}, ValueError, "state: expected version 1 of Mixup, got version 2 of Mixup"),
        ({"sampler": 2}, ValueError, "state: expected that of Mixup, got that of CutMix"),
        ({"sampler": 99}, ValueError, r"expected that of Mixup, got that of an unknown sampler \(99\)"),
        ({"seed": -1}, ValueError, r"state\['seed'\]: expected an int in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"batch": -1}, ValueError, r"state\['batch'\]: expected an int in \[0, 2\*\*48\], got -1"),
        ({"batch": 2**48 + 1}, ValueError, "batch"),
    ],
    ids=str,
)
def test_states_that_are_none_are_refused(change, kind, words):
    good = {"version": 1, "sampler": 1, "seed": 0, "batch": 4}
    sampler = Mixup(1.0, seed=5)
    state = {**good, **change} if isinstance(change, dict) and change.keys() <= good.keys() else change
    with pytest.raises(kind, match=words):
        sampler.load_state_dict({"_extra_state": state})
    assert equal(sampler.sample(torch.empty(4, 1)), Mixup(1.0, seed=5).sample(torch.empty(4, 1)))  # and nothing has changed


def test_states_of_generators_load_with_one_warning():
    """What versions before this one wrote: their streams cannot be gone on with."""
    sampling.base._warn_of_old_states.cache_clear()
    sampler = RandomMix(Mixup(1.0, seed=1), CutMix(seed=2), seed=3)
    expected = [sampler.sample(torch.empty(4, 1, 8, 8)) for _ in range(2)][0]
    old = {"cpu": torch.Generator().get_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="their streams start anew") as warned:
        sampler.load_state_dict(dict.fromkeys(sampler.state_dict(), old))
    assert len(warned) == 1
    assert equal(sampler.sample(torch.empty(4, 1, 8, 8)), expected)


def test_a_stream_ends():
    sampler = Mixup(1.0, seed=0)
    sampler.load_state_dict({"_extra_state": {"version": 1, "sampler": 1, "seed": 0, "batch": 2**48 - 4}})
    sampler.sample(torch.empty(4, 1))
    with pytest.raises(ValueError, match=r"x: expected at most 2\*\*48 rows drawn from one seed, got 1 after 2814"):
        sampler.sample(torch.empty(1, 1))
    sampler.sample(torch.empty(1, 1), generator=torch.Generator())


def test_ranks_draw_differently_and_share_their_state(monkeypatch):
    """Whoever wrote it: the state names a seed and a batch, the process its rank."""
    x = torch.empty(8, 1)

    def as_rank(rank):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank is not None)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)

    drawn = {}
    for rank in (None, 0, 1, 2):
        as_rank(rank)
        sampler = Mixup(1.0, seed=0)
        drawn[rank] = [rows_of(sampler.sample(x)) for _ in range(3)]
        assert sampler.state_dict()["_extra_state"]["batch"] == 3
    assert drawn[None] == drawn[0]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    as_rank(None)
    sampler = Mixup(1.0, seed=0)
    sampler.sample(x)
    saved = sampler.state_dict()
    as_rank(2)  # the group is made after the sampler, and reads a file of another rank
    assert rows_of(sampler.sample(x)) == drawn[2][1]
    resumed = Mixup(1.0, seed=9)
    resumed.load_state_dict(saved)
    assert rows_of(resumed.sample(x)) == drawn[2][1]


def test_numbers_of_a_schedule_are_checked():
    sampler = Mixup(1.0, seed=0)
    sampler.alpha, sampler.prob = 0.3, 0.5
    assert sampler.alpha == (0.3, 0.3)
    assert equal(sampler.sample(torch.empty(50, 1)), Mixup(0.3, prob=0.5, seed=0).sample(torch.empty(50, 1)))
    refused(lambda: setattr(sampler, "alpha", -1.0), ValueError, "alpha", "positive", "-1.0")
    refused(lambda: setattr(sampler, "prob", 2), ValueError, "prob", "a number in", "2")


@pytest.mark.no_poison
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_a_seeded_sampler_in_a_compiled_program(backend):
    """Its stream goes on inside and outside, whatever is compiled; another alpha or batch compiles nothing."""
    torch._dynamo.reset()
    make = lambda: RandomMix(Mixup(0.4, seed=1), CutMix(per="pair", partner="different"), seed=2)  # noqa: E731
    mixer, eager = make(), make()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    fast = torch.compile(lambda x, y: mixer(x, y), backend=counter, fullgraph=True)
    for step, n in enumerate((8, 8, 6, 8, 8, 5)):
        x, y = torch.randn(n, 1, 8, 8), torch.arange(n) % 3
        if step >= 3:
            mixer.samplers[0].alpha = eager.samplers[0].alpha = 0.1 * step
        mixed, target = (mixer if step == 1 else fast)(x, y)
        expected, share = eager(x, y)
        torch.testing.assert_close(mixed, expected)
        assert torch.equal(target.classes, share.classes)
        torch.testing.assert_close(target.weights, share.weights)
    assert mixer.state_dict() == eager.state_dict()
    assert counter.frame_count <= 2


def test_a_checkpointed_sampler_without_a_seed_repeats_its_draws():
    seen = []

    def part(x):
        seen.append(Mixup(1.0).sample(x))
        return fastmix.mix(x, seen[-1].lam, seen[-1].index).square()

    x = torch.randn(6, 3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False).sum().backward()
    assert len(seen) == 2
    assert equal(*seen)


# The kernels draw what the CPU draws


@pytest.fixture
def kernels():
    if not TRITON:
        pytest.skip(NO_TRITON)
    if not INTERPRETER:
        pytest.skip(NO_INTERPRETER)
    return fastmix._backend.module("triton")


def ulps(a, b):
    """The largest distance of two tensors of finite numbers of one sign, in units in the last place."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int64
    return int((a.contiguous().view(kind) - b.contiguous().view(kind)).abs().max()) if a.numel() else 0


ULPS = {torch.float32: 2, torch.float64: 200}  # a logarithm's last place is worth 1/alpha of them in float64


def same_draws(one, two):
    """Compares two (Mix, SoftTarget): partners, choices and boxes as they are, what is rounded within ULPS."""
    (m, target), (n, other) = one, two
    pairs = [(m.index, n.index), (m.box, n.box), (m._order, n._order), (m._lam, n._lam), (m._target_lam, n._target_lam)]
    pairs += [(m.mask, n.mask), (target.classes, other.classes), (target.weights, other.weights)]
    for a, b in pairs:
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.is_floating_point():
                assert ulps(a, b) <= ULPS[a.dtype]
            else:
                assert torch.equal(a, b)
        else:
            assert a == b


def on_both(make, x, y, batches=2):
    """Draws the same from two samplers, one for each backend, and compares; also what their states are then."""
    drawn, states = [], []
    for name in ("torch", "triton"):
        sampler = make()
        with fastmix.backend(name):
            drawn.append([sampler._sample(x, y, None, y) for _ in range(batches)])
        states.append(sampler.state_dict())
    for one, two in zip(*drawn, strict=True):
        same_draws(one, two)
    assert states[0] == states[1]
    return drawn[1]


EVERY = {
    "row": lambda seed: Mixup(0.2, seed=seed),
    "a and b": lambda seed: Mixup((0.3, 2.0), label="larger", prob=0.7, seed=seed),
    "pairs": lambda seed: CutMix(per="pair", seed=seed),
    "batch": lambda seed: CutMix((2.0, 0.5), per="batch", correct_lam=False, seed=seed),
    "minmax": lambda seed: CutMix(minmax=(0.2, 0.7), prob=0.5, label="own", seed=seed),
    "roll": lambda seed: Mixup(1.0, per="pair", partner="roll", seed=seed),
    "flip": lambda seed: Mixup(32.0, per="pair", partner="flip", seed=seed),
    "same": lambda seed: CutMix(partner="same", seed=seed),
    "different": lambda seed: Mixup(0.05, per="pair", partner="different", seed=seed),
    "mask": lambda seed: fastmix.BetaMask(0.4, (2, 3), per="pair", seed=seed),
    "mask of a and b": lambda seed: RandomMix(fastmix.BetaMask((0.4, 2.0), (2, 3), label="larger"), Mixup(0.3), seed=seed),
    "random": lambda seed: RandomMix(Mixup(0.4), CutMix(), weights=(1, 3), seed=seed),
    "nested": lambda seed: RandomMix(
        Mixup(0.4, per="batch", seed=seed + 1),
        CutMix(per="pair").eval(),
        RandomMix(CutMix(minmax=(0.1, 0.9)), Mixup(1.0, partner="different"), per="batch"),
        seed=seed,
    ),
}


@pytest.mark.parametrize("name", EVERY)
def test_kernels_draw_what_the_cpu_draws(kernels, name):
    for number, (n, dtype) in enumerate(itertools.product((0, 1, 2, 3, 18), (torch.float32, torch.float64))):
        x, y = torch.zeros(n, 2, 6, 9, dtype=dtype), torch.arange(n) % 4
        on_both(functools.partial(EVERY[name], number), x, y)


@pytest.mark.parametrize("shape", [(9, 50), (9, 1, 50), (9, 1, 9, 8, 7)])
def test_kernels_cut_what_the_cpu_cuts(kernels, shape):
    for make in (lambda: CutMix(1.0, seed=1), lambda: CutMix((0.3, 3.0), seed=1), lambda: CutMix(minmax=(0, 1), seed=1)):
        on_both(make, torch.zeros(shape), torch.arange(9))


@pytest.mark.slow
def test_kernels_draw_what_the_cpu_draws_for_a_thousand_seeds(kernels):
    """Partners, choices and boxes all equal: no row of 24,000 was a borderline case."""
    x, y = torch.zeros(24, 1, 14, 11), torch.arange(24) % 5
    for seed, make in zip(range(1000), itertools.cycle(EVERY.values()), strict=False):
        on_both(functools.partial(make, seed), x, y, batches=1)


@pytest.mark.parametrize("n", [130, 4097])
def test_partners_of_many_rows(kernels, n):
    """By counting, and where rows are too many for that by sorting the same keys."""
    x, y = torch.zeros(n, 1), torch.arange(n)
    for per in ("row", "pair") if n > 4096 else ("row",):
        ((m, _),) = on_both(lambda per=per: Mixup(1.0, per=per, seed=4), x, y, batches=1)
        check_partners("any", per, m.index.tolist(), y.tolist())


@pytest.mark.parametrize("n", [65536, 100001])
@pytest.mark.parametrize("per", ["row", "pair"])
def test_any_number_of_rows(n, per):
    m = Mixup(1.0, per=per, seed=4).sample(torch.empty(n, 1))
    check_partners("any", per, m.index.tolist(), [])


@pytest.mark.parametrize("options", [{}, {"skip": 1.0}, {"skip": (0.3, 2.0)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_draw_the_same_dirichlet_weights(kernels, options, dtype):
    for rows, ways, alpha in ((0, 2, 1.0), (7, 1, 0.3), (9, 3, 0.05), (5, 16 - len(options), 8.0)):
        drawn = []
        for name in ("torch", "triton"):
            with fastmix.backend(name):
                generator = torch.Generator().manual_seed(4)
                drawn.append(fastmix.dirichlet(rows, ways, alpha, dtype=dtype, generator=generator, **options))
        assert ulps(*drawn) <= ULPS[dtype]


def launches(call):
    """The names of the kernels that a call launches."""
    from triton.runtime.interpreter import InterpretedFunction

    found = []
    getitem = InterpretedFunction.__getitem__

    def counted(self, grid):
        launch = getitem(self, grid)
        return lambda *args, **options: (found.append(self.fn.__name__), launch(*args, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__getitem__", counted)
        call()
    return found


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts torch's operators that would be kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not any(free in name for free in ("empty", "unbind", "select", "view", "detach", "slice", "alias", "expand")):
            self.found.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.no_poison
@pytest.mark.parametrize("seed", [None, 3])
def test_a_batch_and_its_target_are_one_launch(kernels, monkeypatch, seed):
    """Sampling with labels given is one launch, with the labels later one more; a key without a seed is one random number."""
    x, y = torch.zeros(32, 1, 16, 16), torch.arange(32) % 4
    mixer = RandomMix(Mixup(0.8), RandomMix(CutMix(), CutMix(minmax=(0.2, 0.5), per="pair")), seed=seed)
    with fastmix.backend("triton"):
        assert launches(lambda: mixer.sample(x).target(y)) == ["_sample_kernel", "_target_kernel"]
        assert launches(lambda: mixer(x, y)) == ["_sample_kernel", "_mix_fwd_kernel"]
        mixer.sample(x)  # the table is on the device now
        monkeypatch.setattr(fastmix._check, "transformed", lambda: False)  # the mode that counts is no reason to trace
        with Operators() as counted, pytest.MonkeyPatch.context() as patch:
            for kernel in ("_sample_kernel", "_target_kernel"):
                patch.setattr(sys.modules["fastmix.kernels.sample"], kernel, Nothing())
            mixer.sample(x).target(y)
        assert len(counted.found) == (0 if seed else 1)


class Nothing:
    """A kernel that is not run."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


def test_both_backends_read_a_table_alike(kernels):
    module = sys.modules["fastmix.kernels.sample"]
    names = [name.upper() for name in cpu.Node._fields]
    columns = {"PARTNER": "PARTNER_OF"}
    assert [getattr(module, columns.get(name, name)).value for name in names] == list(range(len(names)))
    assert module.FIELDS.value == len(names)
    for name in ["REST", "LAM", "BOX", "SIDES", "MASK", "CHOICE_OF", "EACH_ROW", "EACH_PAIR", "EACH_BATCH", "ANY", "FLIP", "ROLL", "GIVEN", "PROPORTIONAL", "LARGER", "OWN", "ROW", "PLACE", "CHOICE", "PARTNER", "CELL", "GAMMA", "CELL_GAMMA", "WAYS", "SKIP", "RETRY", "MOST_EXPONENT"]:  # fmt: skip
        assert getattr(module, name).value == getattr(cpu, name), name
    assert module.GAMMA_BLOCKS.value == cpu.BLOCKS
