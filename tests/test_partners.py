"""Who is mixed with whom: every kind of partner, for rows, pairs and batches."""

import itertools

import pytest
import torch

from fastmix import CutMix, Mixup, SaliencyMix

PARTNERS = ("any", "same", "different", "flip", "roll")


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


@pytest.mark.trap("pytorch-image-models#1304")
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
            expected = 1.0 if N == 1 else expected  # a single row is its own partner
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

    @pytest.mark.slow
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


@pytest.mark.parametrize("make", [lambda: Mixup(1.0), CutMix, SaliencyMix])
def test_a_second_batch_has_labels(make):
    """Without them the images would be mixed with the second batch, and the labels with the first one's."""
    x, y, maps = torch.rand(3, 3, 4, 4), torch.arange(3), (torch.rand(3, 4, 4),)
    mixer = make()
    more = maps if isinstance(mixer, SaliencyMix) else ()
    with pytest.raises(TypeError, match="partner: expected int64 class indices or floating rows, got None"):
        mixer(x, y, *more, partner=(x, None))
