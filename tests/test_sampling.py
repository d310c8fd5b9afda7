"""The samplers: every option against a plain statement of what it means."""

import copy
import itertools
import math
import multiprocessing
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_mix_plan import META, equal, refused, rows_of
from test_partners import PARTNERS
from torch.utils.data import DataLoader

import fastmix
from fastmix import BetaMask, CutMix, Mix, MixedRows, Mixup, RandomMix, sampling
from fastmix._torch import _draws
from fastmix._torch import sample as cpu
from fastmix.sampling import draws


@pytest.mark.slow
@pytest.mark.trap("pytorch#149406")
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


def places(seed, count, dims):
    """What boxes are drawn from: (places, sides), each [count, dims] in [0, 1), of the first batch of a seed."""
    words = _draws.random_words(draws.state(seed, 0, (None, 0)).numpy(), _draws.PLACE, 0, 0, count)[:, :dims]
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
    @pytest.mark.trap("CutMix-PyTorch#1", "pytorch-image-models#8", "square-root-of-intervals")
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

    @pytest.mark.trap("kornia#4649")
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
        monkeypatch.setattr(cpu._Batch, "chance", lambda draw, node, number: np.full(draw.rows, float(chance)))
        with fastmix.backend("torch"):  # whose chances these are
            drawn = mixer.sample(x, y)
        assert set(self.chosen(drawn, alone)) == {1 if chance < 2**52 else 3}

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

    @pytest.mark.trap("tsai#791")
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

    @pytest.mark.trap("vision#8693")
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

    @pytest.mark.trap("vision#7027", "vision#8693")
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
        fresh, drawn = make(seed=1), make(seed=1)
        self.draw(drawn)
        for resumed in (fresh, drawn, sampler):
            resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            for expected in ahead:
                assert equal(self.draw(resumed), expected)
        sampler.load_state_dict(make(seed=5).state_dict())  # of one that has not drawn yet
        assert sampler.state_dict() == make(seed=1).state_dict()
        assert equal(self.draw(sampler), self.draw(make(seed=1)))

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
            for resumed in (copied, make(seed=1)):
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


@pytest.mark.slow
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


PAIRS = Mixup(1.0, per="pair")

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
    ({"partner": "next"}, ValueError, "partner", "one of 'any', 'same', 'different', 'near', 'flip', 'roll'", "'next'"),
    ({"label": "soft"}, ValueError, "label", "one of 'proportional', 'larger', 'own', 'union'", "'soft'"),
    ({"partner": "near"}, ValueError, "bandwidth", "a number for partner='near'", "None"),
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


MIXUP_OPTIONS = [
    ({"bandwidth": 0}, ValueError, "bandwidth", "a positive number or None", r"0 \(int\)"),
    ({"bandwidth": math.nan}, ValueError, "bandwidth", "a finite float", "nan"),
    ({"bandwidth": "1"}, TypeError, "bandwidth", "a float", r"'1' \(str\)"),
    ({"bandwidth": 1.0, "partner": "near", "per": "pair"}, ValueError, "per", "'row' or 'batch' for partner='near'", "'pair'"),
]


@pytest.mark.parametrize(
    ("kind", "table"), [(Mixup, COMMON_OPTIONS + MIXUP_OPTIONS), (CutMix, COMMON_OPTIONS + CUTMIX_OPTIONS)]
)
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
        ((Mixup(1.0),), {"per": "pairs"}, ValueError, "per", "one of 'row', 'pair', 'batch'", "'pairs'"),
        ((Mixup(1.0),), {"per": None}, ValueError, "per", "one of 'row', 'pair', 'batch'", "None"),
        ((Mixup(1.0),), {"per": "pair"}, ValueError, "samplers", "members with per='pair'", "a Mixup with per='row'"),
        (
            (PAIRS, CutMix(per="pair", partner="flip")),
            {"per": "pair"},
            ValueError,
            "samplers",
            "one partner",
            "'any', partner='flip'",
        ),
        (
            (PAIRS, CutMix(per="pair", seed=1)),
            {"per": "pair"},
            ValueError,
            "samplers",
            "no seed",
            "a CutMix with a seed of its own",
        ),
        ((RandomMix(PAIRS),), {"per": "pair"}, ValueError, "samplers", "members", "a RandomMix with per='row'"),
        (
            (RandomMix(PAIRS, per="pair", seed=1),),
            {"per": "pair"},
            ValueError,
            "samplers",
            "members",
            "a RandomMix with a seed of its own",
        ),
        ((Mixup(1.0),), {"seed": 0.5}, TypeError, "seed", "an int or None", "0.5"),
        ((Mixup(1.0),), {"seed": -1}, ValueError, "seed", "an int in", "-1"),
    ],
)
def test_wrong_random_mix(samplers, options, kind, argument, expected, actual):
    refused(lambda: RandomMix(*samplers, **options), kind, argument, expected, actual)


@pytest.mark.parametrize(
    ("mixer", "name"),
    [
        (fastmix.SaliencyMix(), "saliency"),
        (fastmix.AttentiveCutMix(grid=2, cells=1), "attention"),
        (fastmix.PuzzleMix(mean=[0.5], std=[0.5]), "saliency"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_was_left_out_is_named(mixer, name):
    x, y = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    for call, missing, instead in (
        (lambda: Mixup(1.0)(x), "y", "mixer(x, y)"),
        (lambda: mixer(x), "y", "mixer(x, y)"),
        (lambda: mixer(x, y), name, f"mixer(x, y, {name})"),
        (lambda: mixer.sample(x), name, f"mixer.sample(x, {name})"),
    ):
        with pytest.raises(TypeError, match=f"^{missing}: expected .* got None: .*{re.escape(instead)}"):
            call()


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


# BetaMask


class TestBetaMask:
    @pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 32.0, (0.5, 2.0)])
    def test_distribution(self, alpha):
        """Moments of Beta(a, b): the mean and the variance, within 5 standard errors; no value is NaN."""
        a, b = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        mask = BetaMask(alpha, seed=0).sample(torch.empty(50, 40, 100)).mask.double()
        assert mask.shape == (50, 40, 100)
        assert ((mask >= 0) & (mask <= 1)).all()
        mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
        count = mask.numel()
        assert abs(float(mask.mean()) - mean) < 5 * math.sqrt(variance / count)
        spread = (mask - mask.mean()).square()
        assert abs(float(spread.mean()) - variance) < 5 * float(spread.std()) / math.sqrt(count)
        assert float(mask.flatten(1)[:, 0].std()) > 0  # rows differ, and so do cells
        assert float(mask[0].std()) > 0

    @pytest.mark.slow_interpreted
    def test_what_one_draw_is(self, device):
        x = torch.randn(6, 3, 8, 8, device=device)
        y = torch.arange(6, device=device)
        for size, expected in ((None, (8, 8)), ((2, 4), (2, 4))):
            sampler = BetaMask(0.4, size, seed=3)
            state = sampler.state_dict()
            mixed, target = sampler(x, y)
            sampler.load_state_dict(state)
            m = sampler.sample(x, y)
            assert m.mask.shape == (6, *expected)
            assert m.mask.device.type == device.type
            assert torch.equal(mixed, fastmix.mix_masked(x, m.mask, m.index))
            torch.testing.assert_close(target.weights[:, 0], m.mask.mean((1, 2)))
            assert (m.index != y).all()  # one cycle
        assert BetaMask(0.4).sample(x.double()).mask.dtype == torch.float64
        assert BetaMask(0.4).sample(x.bfloat16()).mask.dtype == torch.float32
        same = (BetaMask(0.4).sample(x, generator=torch.Generator(device).manual_seed(1)).mask for _ in range(2))
        assert torch.equal(*same)

    def test_options(self):
        x, y = torch.randn(8, 3, 4, 4), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
        pairs = BetaMask(1.0, per="pair", partner="flip", seed=0).sample(x)
        assert torch.equal(pairs.mask, pairs.mask.flip(0))
        assert len(BetaMask(1.0, per="batch", seed=0).sample(x).mask.flatten(1).unique(dim=0)) == 1
        assert torch.equal(y[BetaMask(1.0, partner="same", seed=0).sample(x, y).index], y)
        left = BetaMask(1.0, prob=0.0).sample(x)
        assert torch.equal(left.mask, torch.ones(8, 4, 4))
        assert torch.equal(left.apply(x), x)
        assert set(BetaMask(1.0, label="larger", seed=0).sample(x).target_lam.tolist()) <= {0.0, 1.0}
        assert BetaMask(1.0, label="own").sample(x).target_lam.tolist() == [1.0] * 8
        sampler = BetaMask(1.0, (2, 2)).eval()
        assert sampler(x, y)[0] is x
        assert "size=(2, 2)" in repr(sampler)
        empty = BetaMask(1.0)(torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64))
        assert empty[0].shape == (0, 3, 4, 4)

    def test_among_other_samplers(self):
        """A RandomMix with rows of one lam and rows of a mask is one launch; boxes have no place beside masks."""
        x, y = torch.randn(64, 3, 8, 8), torch.arange(64)
        m = RandomMix(Mixup(1.0), BetaMask(1.0, (4, 4)), seed=0).sample(x, y)
        even = (m.mask.flatten(1).amax(1) == m.mask.flatten(1).amin(1)).sum()
        assert 10 < int(even) < 54
        torch.testing.assert_close(m.target_lam, m.mask.mean((1, 2)))
        assert torch.equal(m.apply(x), fastmix.mix_masked(x, m.mask, m.index))
        for members, words in (
            ((BetaMask(1.0), CutMix()), r"samplers: .*masks of \[8, 8\].*boxes|samplers: .*boxes.*masks of \[8, 8\]"),
            ((BetaMask(1.0, (2, 2)), RandomMix(Mixup(1.0), BetaMask(1.0, (4, 4)))), r"masks of \[2, 2\], masks of \[4, 4\]"),
        ):
            with pytest.raises(ValueError, match=words):
                RandomMix(*members).sample(x, y)
        off = CutMix().eval()
        assert RandomMix(BetaMask(1.0), off, seed=0).sample(x, y).box is None

    @pytest.mark.parametrize(
        ("arguments", "kind", "words"),
        [
            ({"alpha": 0}, ValueError, "alpha: expected positive"),
            ({"size": 4}, TypeError, r"size: expected \(h, w\)"),
            ({"size": (1, 2, 3)}, TypeError, "size"),
            ({"size": (0, 2)}, ValueError, "size: expected numbers of at least 1, got 0"),
            ({"size": (2.0, 2)}, TypeError, "size: expected an int"),
            ({"per": "pixel"}, ValueError, "per"),
            ({"prob": 2}, ValueError, "prob"),
        ],
        ids=str,
    )
    def test_bad_options(self, arguments, kind, words):
        with pytest.raises(kind, match=words):
            BetaMask(**{"alpha": 1.0, **arguments})

    def test_bad_batches(self):
        with pytest.raises(ValueError, match=r"x: expected shape \[N, L, D\] or \[N, ..., H, W\], got .*\[4, 6\]"):
            BetaMask(1.0).sample(torch.zeros(4, 6))
        with pytest.raises(ValueError, match=r"x: expected height and width that size \(3, 2\) divides"):
            BetaMask(1.0, (3, 2)).sample(torch.zeros(4, 1, 8, 8))


# Attributes, set after the sampler was made

SET = [  # (sampler, attribute, values that are taken, values that are refused as by the constructor)
    (lambda **new: fastmix.Mixup(**{"alpha": 1.0, "seed": 0, **new}), "alpha", [0.05, (0.5, 2.0)], [0.0, -1.0, math.nan, "1", (1.0,), True]),
    (lambda **new: fastmix.Mixup(**{"alpha": 1.0, "seed": 0, **new}), "prob", [0.5, 0, 1], [2.0, -0.1, math.nan, "half", None]),
    (lambda **new: fastmix.Mixup(**{"alpha": 1.0, "seed": 0, **new}), "partner", ["flip", "roll"], ["nobody", None, 1]),
    (lambda **new: fastmix.Mixup(**{"alpha": 1.0, "seed": 0, **new}), "per", ["pair", "batch"], ["column", 3]),
    (lambda **new: fastmix.Mixup(**{"alpha": 1.0, "seed": 0, **new}), "label", ["larger", "own"], ["smaller", None]),
    (lambda **new: fastmix.CutMix(seed=0, **new), "minmax", [(0.2, 0.8), [0.1, 0.1], None], [(0.8, 0.2), 0.5, (0.1, 2.0)]),
    (lambda **new: fastmix.CutMix(seed=0, **new), "correct_lam", [False], [0, "no", None]),
    (lambda **new: fastmix.BetaMask(1.0, seed=0, **new), "size", [(2, 4), [4, 4], None], [(0, 2), 4, (2.5, 2)]),
    (lambda **new: fastmix.RandomMix(fastmix.Mixup(1.0), fastmix.CutMix(), seed=0, **new), "weights", [(1, 3), None], [(1,), (0, 0), (1, -1)]),
    (lambda **new: fastmix.RandomMix(fastmix.Mixup(1.0), fastmix.CutMix(), seed=0, **new), "per", ["batch"], ["column"]),
]  # fmt: skip


@pytest.mark.trap("attributes-past-the-constructor")
@pytest.mark.parametrize(("make", "name", "taken", "refused"), SET, ids=lambda value: value if isinstance(value, str) else "")
def test_attributes_are_checked_and_normalised_when_they_are_set(make, name, taken, refused):
    """As by the constructor: what is taken draws as a sampler that was made so, and what is refused changes nothing."""
    x = torch.zeros(16, 3, 8, 8)
    for value in taken:
        sampler = make()
        setattr(sampler, name, value)
        assert getattr(sampler, name) == getattr(make(**{name: value}), name)
        first, second = sampler.sample(x), make(**{name: value}).sample(x)
        for field in ("lam", "index", "box", "mask"):
            a, b = getattr(first, field), getattr(second, field)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    sampler = make()
    before = getattr(sampler, name)
    for value in refused:
        with pytest.raises((TypeError, ValueError)) as when_made:
            make(**{name: value})
        with pytest.raises(when_made.type) as when_set:
            setattr(sampler, name, value)
        assert str(when_set.value) == str(when_made.value)
        assert getattr(sampler, name) == before


def test_attributes_that_stay():
    sampler = fastmix.Mixup(1.0, seed=3)
    with pytest.raises(AttributeError, match="seed: expected to stay as the Mixup was made, got 4"):
        sampler.seed = 4
    manifold = fastmix.ManifoldMixup([None], 1.0)
    with pytest.raises(AttributeError, match="layers"):
        manifold.layers = ()
    twin = copy.deepcopy(sampler)
    assert torch.equal(twin.sample(torch.zeros(8, 2)).lam, sampler.sample(torch.zeros(8, 2)).lam)


def test_options_of_losses_and_of_the_reweighting_are_checked_when_they_are_set():
    criterion = fastmix.SoftCrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing"):
        criterion.label_smoothing = 2.0
    with pytest.raises(ValueError, match="reduction"):
        criterion.reduction = "average"
    criterion.label_smoothing = np.float32(0.5)
    assert (type(criterion.label_smoothing), criterion.reduction) == (float, "mean")
    binary = fastmix.SoftBinaryCrossEntropyLoss()
    with pytest.raises(TypeError, match="threshold"):
        binary.threshold = "0.2"
    binary.threshold = 1
    assert binary.threshold == 1.0
    reweight = fastmix.MovingAverageReweight(window=3)
    for n in range(3):
        reweight(torch.tensor([float(n), n + 1.0]))
    with pytest.raises(ValueError, match="window"):
        reweight.window = 0
    reweight.window = 2
    assert [list(past) for past in reweight.get_extra_state()] == [[1.0, 2.0], [2.0, 3.0]]


@pytest.mark.parametrize("axes", [((2, 3), None), ((-2, -1), None), ((-2, -1), (2, 3)), (None, (2, -1))])
def test_the_same_axes_said_in_other_words(axes):
    """RandomMix takes boxes of the same dimensions for the same, and draws as if they were said alike."""
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6)
    mixed, target = RandomMix(*(CutMix(axes=each) for each in axes), seed=0)(x, y)
    expected, expected_target = RandomMix(CutMix(), CutMix(), seed=0)(x, y)
    assert torch.equal(mixed, expected)
    assert torch.equal(target.weights, expected_target.weights)
    for other in ((1, 2), (3,)):
        with pytest.raises(ValueError, match="samplers: expected boxes in the same axes"):
            RandomMix(CutMix(axes=other), CutMix(axes=axes[0]))(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lam", "box", "mask"])
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (1, 3, 4, 6), (5, 2, 4, 4, 6)])
def test_partners_of_another_batch_are_mixed_as_rows_are(shape, kind, dtype):
    """The same bits, in the memory format of x, whichever the partner's is."""
    generator = torch.Generator().manual_seed(0)
    x, index = torch.randn(shape, generator=generator).to(dtype), torch.arange(shape[0]).flip(0)
    lam = torch.rand(shape[0], generator=generator, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    dims = len(shape) - 2
    box = torch.cat((torch.zeros(shape[0], dims, dtype=torch.int64), torch.full((shape[0], dims), 2)), 1)
    mask = torch.rand(shape[0], 2, 3, generator=generator, dtype=lam.dtype)
    m = {"lam": Mix(lam, index), "box": Mix(lam, index, box=box), "mask": Mix(None, index, mask=mask)}[kind]
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    for own, other in itertools.product((torch.contiguous_format, last), repeat=2):
        given = x.contiguous(memory_format=own)
        with fastmix.backend("torch"):
            mixed = m.apply(given, partner=x[index].contiguous(memory_format=other))
            assert torch.equal(mixed, m.apply(given))
        assert mixed.stride() == given.stride()
