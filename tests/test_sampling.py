"""Mix by hand, and the samplers: every option against a plain statement of what it means."""

import itertools
import math

import numpy as np
import pytest
import torch

import fastmix
from fastmix import CutMix, Mix, MixedRows, Mixup, sampling

PARTNERS = ("any", "same", "different", "flip", "roll")


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

    @pytest.mark.parametrize(
        ("y", "kind", "words"),
        [
            ([0, 1], TypeError, "y: expected int64 class indices or floating rows"),
            (torch.zeros(2, dtype=torch.int32), TypeError, "y"),
            (torch.zeros(2, 3, dtype=torch.bool), TypeError, "y"),
            (torch.zeros(3, dtype=torch.int64), ValueError, "y: expected 2 rows"),
            (torch.tensor(1), ValueError, "y"),
        ],
    )
    def test_bad_labels(self, y, kind, words):
        with pytest.raises(kind, match=words):
            Mix(0.5, torch.tensor([1, 0])).target(y)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"lam": torch.rand(3)}, ValueError, "lam"),
        ({"lam": torch.rand(2).half()}, TypeError, "lam: .*lower precision"),
        ({"lam": "0.5"}, TypeError, "lam"),
        ({"index": [1, 0]}, TypeError, "index: expected an int64 tensor"),
        ({"index": torch.tensor([1, 0], dtype=torch.int32)}, TypeError, "index"),
        ({"target_lam": torch.rand(2, 1)}, ValueError, "target_lam"),
        ({"box": torch.zeros(2, 4)}, TypeError, "box"),
        ({"box": torch.zeros(2, 5).long()}, ValueError, "box: expected shape"),
        ({"box": torch.zeros(3, 4).long()}, ValueError, "box"),
    ],
)
def test_bad_mix(change, kind, words):
    with pytest.raises(kind, match=words):
        Mix(**{"lam": 0.5, "index": torch.tensor([1, 0]), **change})


def test_wrong_labels_are_refused_before_anything_is_drawn():
    mixup = Mixup(1.0, seed=0)
    with pytest.raises(TypeError, match="y: expected"):
        mixup(torch.randn(4, 3), torch.zeros(4, dtype=torch.int32))
    assert mixup.state_dict() == {"_extra_state": {}}
    with pytest.raises(TypeError, match="x: expected a float16"):
        mixup(torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4).long())
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator"):
        mixup.sample(torch.randn(4, 3), generator=3)


@pytest.mark.no_poison
def test_compiles_once_for_all_batch_sizes():
    mixup, cutmix = Mixup(1.0), CutMix()
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, y: (mixup(x, y)[0], cutmix(x, y)[0]), backend=count, fullgraph=True)
    for n in (8, 7, 6, 5, 12, 13):
        compiled(torch.randn(n, 2, 8, 8), torch.zeros(n, dtype=torch.int64))
    assert len(frames) <= 2


def beta_folded(samples, a):
    """Kolmogorov-Smirnov distance of min(lam, 1-lam) to its law."""
    stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
    folded = np.sort(samples)
    law = 2 * stats.beta(a, a).cdf(folded)
    n = len(folded)
    return max(np.max(np.arange(1, n + 1) / n - law), np.max(law - np.arange(n) / n))


class TestLambda:
    @pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0, 32.0])
    def test_is_beta(self, alpha):
        """Tested in float64, folded in log space: floats have an atom at exactly 1 that a correct sampler produces too."""
        n = 40000
        draw = sampling._Draws(n, torch.float64, torch.device("cpu"), torch.Generator().manual_seed(3))
        t = draw.beta_logit(alpha, alpha)
        assert torch.isfinite(t).all()
        assert abs((t > 0).double().mean() - 0.5) < 2.6 / (2 * math.sqrt(n))
        assert beta_folded(torch.sigmoid(-t.abs()).numpy(), alpha) < 1.63 / math.sqrt(n)  # 1 %
        lam = Mixup(alpha, seed=3).sample(torch.empty(n, 1, dtype=torch.float64)).lam
        assert lam.dtype == torch.float64
        assert torch.isfinite(lam).all()

    @pytest.mark.parametrize("alpha", [0.05, 0.2])
    def test_float32_moments_and_no_false_half(self, alpha):
        """In float32 the naive ratio of Gammas ties at the smallest normal, a false lambda of exactly 0.5."""
        lam = Mixup(alpha, seed=0).sample(torch.empty(200000, 1)).lam
        assert lam.dtype == torch.float32
        assert torch.isfinite(lam).all()
        assert (lam == 0.5).sum() <= 1
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(lam.double().var().item() - variance) < 0.002

    def test_two_parameters(self):
        lam = Mixup((2.0, 6.0), seed=0).sample(torch.empty(50000, 1)).lam
        assert abs(lam.mean().item() - 0.25) < 0.005

    def test_prob_is_applied_once(self):
        """Rows mixed at p**2 (kornia#4649)."""
        for per, expected in (("row", 0.5), ("pair", 0.5)):
            lam = Mixup(1.0, prob=0.5, per=per, seed=0).sample(torch.empty(20000, 1)).lam
            assert abs((lam < 1).double().mean().item() - expected) < 0.02
        mixed = [bool((Mixup(1.0, prob=0.5, per="batch", seed=s).sample(torch.empty(4, 1)).lam < 1).any()) for s in range(400)]
        assert abs(np.mean(mixed) - 0.5) < 0.1
        assert (Mixup(1.0, prob=0.0).sample(torch.empty(9, 1)).lam == 1).all()


class TestPartners:
    @pytest.mark.parametrize("N", [0, 1, 2, 3, 4, 7, 8])
    @pytest.mark.parametrize("per", ["row", "pair", "batch"])
    @pytest.mark.parametrize("partner", PARTNERS)
    def test_every_combination(self, partner, per, N):
        y = torch.tensor([0, 1, 1, 0, 2, 1, 0, 0])[:N]
        for sampler in (Mixup(1.0, partner=partner, per=per, seed=N), CutMix(1.0, partner=partner, per=per, seed=N)):
            m = sampler.sample(torch.empty(N, 3, 8, 8), y)
            index, own = m.index.tolist(), m.target_lam.tolist()
            assert sorted(set(index) - set(range(N))) == []
            for i, j in enumerate(index):
                if partner == "any":
                    assert j != i or N == 1
                elif partner == "flip":
                    assert j == N - 1 - i
                elif partner == "roll" and per != "pair":
                    assert j == (i - 1) % N
                elif partner in ("same", "different"):
                    candidates = [k for k in range(N) if k != i and (y[k] == y[i]) == (partner == "same")]
                    assert j in candidates or j == i
                    if not candidates or j == i:
                        assert j == i
                        assert own[i] == 1
                    if candidates and per != "pair":
                        assert j != i
                if per == "pair":
                    assert own[index[i]] == own[i]  # partners share lambda
                    assert index[j] == i or (N % 2 and partner in ("any", "roll"))
            if per == "batch" and partner in ("any", "flip", "roll"):
                assert len(set(own)) <= 1

    def test_any_is_one_cycle(self):
        for seed in range(20):
            index = Mixup(1.0, seed=seed).sample(torch.empty(9, 1)).index.tolist()
            row, seen = 0, []
            for _ in range(9):
                seen.append(row)
                row = index[row]
            assert sorted(seen) == list(range(9))
            assert row == 0

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
        y = torch.tensor([0, 0, 1, 2])
        mixup = Mixup(1.0, partner="different", seed=0)
        counts = torch.zeros(4, 4)
        for _ in range(3000):
            counts[torch.arange(4), mixup.sample(torch.empty(4, 1), y).index] += 1
        expected = torch.tensor(
            [[0, 0, 1 / 2, 1 / 2], [0, 0, 1 / 2, 1 / 2], [1 / 3, 1 / 3, 0, 1 / 3], [1 / 3, 1 / 3, 1 / 3, 0]]
        )
        torch.testing.assert_close(counts / 3000, expected, atol=0.04, rtol=0)

    @pytest.mark.parametrize(
        ("y", "kind"), [(None, TypeError), (torch.zeros(4), TypeError), (torch.zeros(3).long(), ValueError)]
    )
    def test_class_partners_need_classes(self, y, kind):
        with pytest.raises(kind, match="y: expected"):
            Mixup(1.0, partner="same").sample(torch.empty(4, 1), y)


class TestCutMix:
    @pytest.mark.parametrize("shape", [(600, 64), (600, 2, 64), (600, 2, 48, 64), (200, 2, 12, 24, 16)])
    def test_boxes_and_shares(self, shape):
        """Sides size*(1-lam)**(1/d), not the 2-D square root for intervals; the share follows the box as cut off."""
        x = torch.empty(shape)
        sizes = torch.tensor(shape[max(1, len(shape) - 3) if len(shape) < 5 else 2 :][-max(1, len(shape) - 2) :])
        dims = len(sizes)
        m, drawn = CutMix(1.0, seed=5).sample(x), CutMix(1.0, correct_lam=False, seed=5).sample(x)
        assert torch.equal(m.box, drawn.box)
        start, stop = m.box[:, :dims], m.box[:, dims:]
        assert (start >= 0).all()
        assert (stop <= sizes).all()
        assert (start <= stop).all()
        torch.testing.assert_close(m.target_lam, 1 - ((stop - start) / sizes).prod(1))
        side = (sizes * (1 - drawn.target_lam[:, None]) ** (1 / dims)).long()
        uncut = (start > 0) & (stop < sizes)
        assert torch.equal((stop - start)[uncut], side[uncut])
        assert ((stop - start) <= side).all()
        assert (m.lam == 1).all()

    def test_minmax(self):
        m = CutMix(minmax=(0.25, 0.5), seed=0).sample(torch.empty(500, 1, 16, 32))
        height, width = m.box[:, 2] - m.box[:, 0], m.box[:, 3] - m.box[:, 1]
        assert set(height.tolist()) == set(range(4, 9))
        assert set(width.tolist()) == set(range(8, 17))
        assert (m.box >= 0).all()
        assert (m.box[:, 2:] <= torch.tensor([16, 32])).all()
        torch.testing.assert_close(m.target_lam, 1 - height * width / 512)

    def test_unmixed_rows_have_no_box(self):
        x = torch.randn(400, 1, 8, 8)
        m = CutMix(1.0, prob=0.3, seed=0).sample(x)
        empty = (m.box == 0).all(1)
        assert abs(empty.double().mean().item() - 0.7) < 0.1
        assert (m.target_lam[empty] == 1).all()
        assert torch.equal(m.apply(x)[empty], x[empty])

    def test_needs_a_dimension_to_cut(self):
        with pytest.raises(ValueError, match="x: expected"):
            CutMix().sample(torch.empty(4))


def test_label_options():
    for kind in (Mixup, CutMix):
        x = torch.empty(200, 1, 32, 32)
        share = kind(1.0, seed=0).sample(x).target_lam
        larger, own = (kind(1.0, seed=0, label=label).sample(x).target_lam for label in ("larger", "own"))
        assert torch.equal(larger, (share >= 0.5).float())
        assert (own == 1).all()


def test_call_gives_batch_and_target_and_eval_is_the_identity():
    x, y = torch.randn(6, 2, 4, 4), torch.arange(6)
    for sampler in (Mixup(1.0, seed=0), CutMix(seed=0)):
        state = sampler.state_dict()
        mixed, target = sampler(x, y)
        sampler.load_state_dict(state)
        again, _ = type(sampler)(*([1.0] if isinstance(sampler, Mixup) else []), seed=0)(x, y)
        assert torch.equal(mixed, again)
        assert isinstance(target, fastmix.SoftTarget)
        sampler.eval()
        assert sampler(x, y) == (x, y)
        assert torch.equal(sampler.sample(x).apply(x), x)


def test_generators_replay_and_state():
    x = torch.empty(8, 1)

    def lam(sampler, **kwargs):
        return sampler.sample(x, **kwargs).lam

    assert torch.equal(
        lam(Mixup(1.0), generator=torch.Generator().manual_seed(3)), lam(Mixup(1.0), generator=torch.Generator().manual_seed(3))
    )
    sampler = Mixup(1.0, seed=1)
    before = torch.random.get_rng_state()
    first = lam(sampler)
    assert torch.equal(torch.random.get_rng_state(), before)  # a seeded sampler leaves the global generator alone
    state = dict(sampler.state_dict())
    second = lam(sampler)
    assert not torch.equal(first, second)
    resumed = Mixup(1.0, seed=99)
    resumed.load_state_dict(state)
    assert torch.equal(lam(resumed), second)
    torch.manual_seed(5)
    unseeded = lam(Mixup(1.0))
    torch.manual_seed(5)
    assert torch.equal(lam(Mixup(1.0)), unseeded)


def test_state_of_a_device_that_is_not_here_waits():
    """A checkpoint of a GPU's sampler loads on a laptop."""
    state = {"_extra_state": {"device": "cuda:0", "state": torch.zeros(16, dtype=torch.uint8)}}
    sampler = Mixup(1.0, seed=1)
    sampler.load_state_dict(state)
    assert sampler.state_dict() == state
    assert torch.equal(sampler.sample(torch.empty(8, 1)).lam, Mixup(1.0, seed=1).sample(torch.empty(8, 1)).lam)


def test_state_survives_weights_only_checkpoints(tmp_path):
    sampler = CutMix(seed=1)
    x = torch.empty(8, 1, 4, 4)
    sampler.sample(x)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    expected = sampler.sample(x).box
    resumed = CutMix(seed=2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(resumed.sample(x).box, expected)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"alpha": 0}, ValueError, "alpha: expected positive"),
        ({"alpha": 1e-39}, ValueError, "alpha"),
        ({"seed": 2**70}, ValueError, "seed"),
        ({"alpha": -1.0}, ValueError, "alpha"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"alpha": "1"}, TypeError, "alpha"),
        ({"alpha": (1.0, 2.0, 3.0)}, TypeError, "alpha"),
        ({"per": "image"}, ValueError, "per: expected one of 'row', 'pair', 'batch', got 'image'"),
        ({"partner": "next"}, ValueError, "partner"),
        ({"label": "soft"}, ValueError, "label"),
        ({"prob": 1.5}, ValueError, r"prob: expected a number in \[0, 1\]"),
        ({"prob": "1"}, TypeError, "prob"),
        ({"seed": 1.0}, TypeError, "seed"),
        ({"minmax": 0.5}, TypeError, "minmax"),
        ({"minmax": (0.5, 0.2)}, ValueError, "minmax"),
        ({"minmax": (0.5, 1.2)}, ValueError, "minmax"),
    ],
)
def test_bad_options(options, kind, words):
    for sampler in (CutMix,) if "minmax" in options else (Mixup, CutMix):
        with pytest.raises(kind, match=words):
            sampler(**{"alpha": 1.0, **options})


def test_reprs_tell_the_options():
    for sampler, options in itertools.product(
        (Mixup(0.2, per="pair"), CutMix(minmax=(0.1, 0.2))), ("partner='any'", "prob=1.0")
    ):
        assert options in repr(sampler)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
def test_draws_on_the_device_without_a_sync(device):
    x, y = torch.randn(16, 3, 8, 8, device=device), torch.randint(0, 4, (16,), device=device)
    samplers = [
        kind(1.0, partner=partner, per=per) for kind in (Mixup, CutMix) for partner in PARTNERS for per in ("row", "pair")
    ]
    for sampler in samplers:
        sampler(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sampler in samplers:
            sampler(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
