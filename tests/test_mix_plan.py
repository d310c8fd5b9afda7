"""Mix, the plan of a batch: what it does to tensors and labels, by lambda, boxes, masks and plans of blocks."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from test_mix_masked import NEITHER, apply, batch

import fastmix
from fastmix import BetaMask, CutMix, Mix, MixedRows, Mixup, RandomMix

META = torch.device("meta")  # a device that every machine has, and that is not the CPU


def refused(call, kind, argument, expected, actual):
    """The call raises an error that names the argument, what was expected and what came."""
    with pytest.raises(kind) as raised:
        call()
    assert re.match(rf"{re.escape(argument)}: expected .*{expected}.*, got .*{actual}", str(raised.value), re.DOTALL), (
        raised.value
    )
    assert type(raised.value) is kind


def rows_of(m):
    """What each row of a Mix gets, as (lam, index, target_lam, box or None)."""
    box = [None] * len(m.index) if m.box is None else [tuple(row) for row in m.box.tolist()]
    return list(zip(m.lam.tolist(), m.index.tolist(), m.target_lam.tolist(), box, strict=True))


def equal(m, other):
    """Whether two Mixes are the same, bit for bit."""
    return rows_of(m) == rows_of(other)


class TestMix:
    @pytest.mark.trap("vision#8693")
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

    @pytest.mark.trap("kornia#4657")
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

    @pytest.mark.trap("CutMix-PyTorch#1")
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

    @pytest.mark.trap("vision#9215")
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


class TestMasks:
    def test_applies_a_mask(self, device):
        x, mask, index, _, _, _ = batch((4, 3, 8, 8), (2, 4), NEITHER, torch.float32, device)
        y = torch.tensor([3, 1, 2, 0], device=device)
        m = Mix(None, index, mask=mask)
        assert torch.equal(m.apply(x), apply(x, mask, index))
        target = m.target(y)
        torch.testing.assert_close(target.weights[:, 0], mask.mean((1, 2)))
        assert torch.equal(target.classes, torch.stack((y, y[index]), 1))
        assert torch.equal(Mix(0.25, index, mask=mask).target(y).weights, target.weights)  # the mask counts, not lam
        other = torch.rand(4, device=device)
        assert torch.equal(Mix(None, index, other, mask=mask).target(y).weights[:, 0], other)
        for copied in (m.to(device), m.to("cpu")):
            assert torch.equal(copied.mask.cpu(), mask.cpu())
            assert torch.equal(copied.apply(x.to(copied.index.device)).cpu(), m.apply(x).cpu())
        assert "mask=" in repr(m)
        assert "mask" not in repr(Mix(0.5, index))

    def test_label_maps_follow_the_mask(self):
        mask, index = torch.rand(2, 2, 2), torch.tensor([1, 0])
        y = torch.randint(0, 5, (2, 4, 6))
        target = Mix(None, index, mask=mask).target(y)
        assert torch.equal(target.weights[:, 0], mask.repeat_interleave(2, 1).repeat_interleave(3, 2))
        with pytest.raises(ValueError, match="y: expected label maps that 2 x 2 cells divide"):
            Mix(None, index, mask=mask).target(y[..., :5])

    def test_plans_may_be_narrow(self):
        x, mask, index = torch.randn(2, 4, 4), torch.rand(2, 2, 2), torch.tensor([1, 0])
        plan = torch.tensor([[3, 2, 1, 0], [0, 0, 1, 2]])
        mixed = [fastmix.mix_masked(x, mask, index, plan=p, partner_plan=p) for p in (plan, plan.int())]
        assert torch.equal(*mixed)

    def test_label_volumes_follow_the_mask(self):
        """Every plane of a volume, as its image's."""
        index, mask = torch.tensor([1, 0]), torch.tensor([[[1.0, 0.0]], [[0.25, 0.5]]])
        x, y = torch.zeros(2, 1, 2, 4, 4), torch.zeros(2, 2, 4, 4, dtype=torch.int64)
        x[1], y[1] = 1.0, 1
        m = fastmix.Mix(None, index, mask=mask)
        target = m.target(y)
        share = (target.weights * target.classes).sum(1)  # of class 1, which is where the image is 1
        torch.testing.assert_close(share, m.apply(x)[:, 0])

    def test_float_maps_are_images_to_a_mask_or_a_box(self):
        index, maps = torch.tensor([1, 0]), torch.randn(2, 4, 4)
        box = torch.tensor([[0, 0, 4, 2]] * 2)
        for m in (fastmix.Mix(None, index, mask=torch.rand(2, 2, 2)), fastmix.Mix(1.0, index, box=box)):
            with pytest.raises(
                ValueError, match=r"y: expected values \[N\] or rows \[N, C\] \(mix maps of the image with apply"
            ):
                m.target(maps)
            m.apply(maps)
            assert m.target(torch.randn(2, 3)).dense().shape == (2, 3)
        assert fastmix.Mix(0.5, index).target(maps).dense().shape == maps.shape

    def test_the_share_follows_the_mask(self):
        mask = torch.rand(2, 2, 2, requires_grad=True)
        m = fastmix.Mix(None, torch.tensor([1, 0]), mask=mask)
        assert copy.deepcopy(fastmix.Mix(None, m.index, mask=mask.detach())).lam.equal(m.lam)
        copied = copy.deepcopy(m)
        assert torch.equal(copied.lam, m.lam)
        with torch.no_grad():
            mask.fill_(0.25)
        assert m.lam.tolist() == m.target_lam.tolist() == [0.25, 0.25]
        assert fastmix.BetaMask(1.0).sample(torch.zeros(2, 0, 3)).target_lam.tolist() == [1.0, 1.0]

    def test_a_gradient_reaches_the_mask(self):
        mask = torch.rand(2, 2, 2, requires_grad=True)
        m = Mix(None, torch.tensor([1, 0]), mask=mask)
        m.target(torch.tensor([0, 1])).weights[:, 0].sum().backward()
        torch.testing.assert_close(mask.grad, torch.full((2, 2, 2), 0.25))

    @pytest.mark.parametrize(
        ("change", "kind", "words"),
        [
            ({"box": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "mask: expected None where there is a box"),
            ({"mask": torch.zeros(2, 2)}, ValueError, r"mask: expected shape \[2, h, w\]"),
            ({"mask": torch.zeros(3, 2, 2)}, ValueError, r"mask: expected shape \[2, h, w\]"),
            ({"mask": torch.zeros(2, 2, 2, dtype=torch.float16)}, TypeError, "mask: .*float16"),
            ({"mask": [0.5]}, TypeError, "mask: .*list"),
            ({"mask": None}, TypeError, "lam: .*NoneType"),
            ({"lam": "half"}, TypeError, "lam: .*'half'"),
            ({"target_lam": torch.zeros(3)}, ValueError, "target_lam"),
        ],
        ids=str,
    )
    def test_bad_input(self, change, kind, words):
        given = {"lam": None, "index": torch.tensor([1, 0]), "mask": torch.zeros(2, 2, 2), **change}
        with pytest.raises(kind, match=words):
            Mix(**given)


class TestPlansOfAMix:
    """A transport of blocks rides in a Mix, for images and for maps of labels."""

    def drawn(self):
        mask = torch.rand(3, 2, 2)
        index = torch.tensor([1, 2, 0])
        plan, partner_plan = torch.tensor([[3, 2, 1, 0]] * 3), torch.tensor([[0, 0, 1, 1]] * 3, dtype=torch.int32)
        return Mix(None, index, mask=mask, plan=plan, partner_plan=partner_plan)

    def test_images(self):
        m, x = self.drawn(), torch.randn(3, 2, 4, 6)
        expected = fastmix.mix_masked(x, m.mask, m.index, plan=m.plan, partner_plan=m.partner_plan)
        assert torch.equal(m.apply(x), expected)
        assert not torch.equal(expected, fastmix.mix_masked(x, m.mask, m.index))
        moved = pickle.loads(pickle.dumps(m.to("cpu")))
        assert torch.equal(moved.apply(x), expected)
        assert "partner_plan=" in repr(m)
        assert m.target(torch.tensor([4, 5, 6])).weights[:, 0].equal(m.mask.mean((1, 2)))

    def test_maps_of_labels_move_with_their_pixels(self):
        """As images of one-hot rows do."""
        m, y = self.drawn(), torch.randint(0, 5, (3, 4, 6))
        onehot = torch.nn.functional.one_hot(y, 5).movedim(-1, 1).float()
        torch.testing.assert_close(m.target(y).dense(5), m.apply(onehot))
        narrow = Mix(None, m.index, mask=m.mask, plan=m.plan.int())
        alone = Mix(None, m.index, mask=m.mask, plan=m.plan)
        assert torch.equal(narrow.target(y).classes, alone.target(y).classes)

    def test_rows_without_a_mask_of_their_own_keep_their_label(self):
        """Whoever stands beside them."""
        y, x = torch.randint(0, 5, (4, 8, 8)), torch.zeros(4, 1, 8, 8)
        for label, beside in itertools.product(("own", "larger"), (CutMix(), BetaMask(1.0, (2, 2)))):
            mixer = RandomMix(Mixup(1.0, label=label), beside, weights=(1, 0))
            own = mixer.sample(x).target(y).weights[:, 0]
            assert set(own.unique().tolist()) <= ({1.0} if label == "own" else {0.0, 1.0})
        m = Mix(None, torch.tensor([1, 0]), torch.tensor([0.3, 0.3]), mask=torch.tensor([[[0.5, 0.5]], [[0.5, 1.0]]]))
        assert m.target(y[:2, :1, :2]).weights[:, 0].flatten().tolist() == pytest.approx([0.3, 0.3, 0.5, 1.0])

    def test_bad_input(self):
        mask, index = torch.rand(2, 2, 2), torch.tensor([1, 0])
        with pytest.raises(ValueError, match="plan: expected None where there is no mask"):
            Mix(0.5, index, plan=torch.zeros(2, 4, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"partner_plan: expected shape \[2, 4\], got .*\[2, 3\]"):
            Mix(None, index, mask=mask, partner_plan=torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="plan: expected an int64 or int32 tensor"):
            Mix(None, index, mask=mask, plan=torch.zeros(2, 4))
        wrong = Mix(None, index, mask=mask, plan=torch.tensor([[0, 1, 2, 4], [0, 1, 2, 3]]))
        for act in (lambda: wrong.apply(torch.zeros(2, 4, 4)), lambda: wrong.target(torch.zeros(2, 4, 4, dtype=torch.int64))):
            with pytest.raises(ValueError, match=r"plan: expected a block in \[0, 4\), got 4 in row 0"):
                act()


# What kind of labels they are, by dtype and rank

KINDS = {"mixup": lambda: Mixup(1.0, seed=0), "CutMix": lambda: CutMix(seed=0), "mask": lambda: BetaMask(1.0, seed=0)}
LABELS = [  # (batch, integer labels, who mixes them; the others refuse)
    ((4, 3, 8, 8), (4,), "mixup CutMix mask"),
    ((4, 3, 8, 8), (4, 8, 8), "mixup CutMix mask"),
    ((4, 3, 8, 8), (4, 5), "mixup"),  # a class for each of five tasks: which part of the image are they of?
    ((4, 3, 8, 8), (4, 1, 8, 8), ""),  # a channel
    ((4, 3, 8, 8), (4, 5, 8, 8), ""),  # one-hot maps
    ((4, 1, 8, 8), (4, 1, 8, 8), ""),
    ((4, 2, 6, 8, 8), (4, 6, 8, 8), "mixup CutMix mask"),
    ((4, 2, 6, 8, 8), (4, 1, 6, 8, 8), ""),
    ((4, 2, 6, 8, 8), (4, 8, 8), "mixup mask"),
    ((4, 3, 12), (4, 12), "mixup CutMix"),
    ((4, 3, 12), (4, 1, 12), ""),
    ((4, 7), (4, 7), "mixup CutMix"),
]


@pytest.mark.trap("rank-decides-in-silence")
@pytest.mark.parametrize(("shape", "labels", "who"), LABELS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_integer_labels_are_right_or_refused(kind, shape, labels, who):
    """Every rank of images, boxes and labels: pixels are cut as the image is, or `target` says what it expected, by name."""
    if kind == "mask" and len(shape) < 3:
        return
    x, y = torch.randn(shape), torch.randint(0, 5, labels)
    sampler = KINDS[kind]()
    if kind not in who.split():
        for call in (lambda: sampler(x, y), lambda: sampler.sample(x).target(y)):
            with pytest.raises(
                ValueError, match=r"y: expected class indices \[N\] or label maps .*y.squeeze\(1\).*y.argmax\(1\)"
            ):
                call()
        return
    m = sampler.sample(x)
    target = m.target(y)
    assert target.classes.shape == (labels[0], 2, *labels[1:])
    if kind == "CutMix" and len(labels) > 1:  # a label comes from where its pixel comes from
        number = torch.arange(4.0).view(4, *[1] * (len(shape) - 1)).expand(shape)
        where = m.apply(number).unbind(1)[0] if len(shape) > 2 else m.apply(number)
        full = target.weights if target.weights.dim() > 2 else target.weights.view(4, 2, *[1] * (len(labels) - 1))
        if where.shape == y.shape:
            rows = torch.arange(4).view(4, *[1] * (len(labels) - 1))
            partners = m.index.view(4, *[1] * (len(labels) - 1))
            assert torch.equal(torch.where(full[:, 0].expand(y.shape) == 1, rows, partners).float(), where)


def test_a_single_rows_own_share_is_one():
    """It has no partner but itself: lam is drawn, nothing of another is mixed in, and the target says so."""
    for sampler in (Mixup(1.0, seed=0), CutMix(seed=0), BetaMask(1.0, seed=0), RandomMix(Mixup(1.0), CutMix(), seed=0)):
        x, y = torch.randn(1, 3, 8, 8), torch.tensor([4])
        mixed, target = sampler(x, y)
        torch.testing.assert_close(mixed, x)
        assert target.classes.tolist() == [[4, 4]]
        assert target.weights.tolist() == [[1.0, 0.0]]
        m = sampler.sample(x)
        assert m.target_lam.tolist() == [1.0]
        assert m.target(y).weights.tolist() == [[1.0, 0.0]]


# Boxes in other dimensions, other resolutions, and partners of another batch


def test_the_axes_of_a_box():
    """Clips, channels last and tokens: as the images or sequences that they are made of, frame by frame; strides kept."""
    y, clips = torch.arange(4), torch.randn(4, 2, 3, 8, 10)
    m, one = (CutMix(seed=0, **options).sample(x) for options, x in (({"axes": (3, 4)}, clips), ({}, clips[:, 0])))
    assert torch.equal(m.box, one.box)
    assert torch.equal(m.target(y).weights, one.target(y).weights)
    assert torch.equal(m.apply(clips), torch.stack([one.apply(clips[:, t]) for t in range(2)], 1))
    assert torch.equal(CutMix(seed=0, axes=(-2, -1)).sample(clips).box, m.box)
    last = torch.randn(4, 8, 10, 3)
    mixed, target = CutMix(seed=0, axes=(1, 2))(last, y)
    expected, expected_target = CutMix(seed=0)(last.permute(0, 3, 1, 2), y)
    assert torch.equal(mixed.permute(0, 3, 1, 2), expected)
    assert mixed.stride() == last.stride()
    assert torch.equal(target.weights, expected_target.weights)
    tokens, labels = torch.randn(4, 12, 5), torch.randint(0, 7, (4, 12))
    m = CutMix(seed=0, axes=(1,)).sample(tokens)
    where = m.apply(torch.arange(4.0).view(4, 1, 1).expand(4, 12, 5))
    assert all(len(position.unique()) == 1 for row in where for position in row)  # a token is moved whole
    own = torch.arange(4.0).view(4, 1).expand(4, 12) == where[..., 0]
    assert torch.equal(m.target(labels).weights[:, 0], own.float())
    again = pickle.loads(pickle.dumps(m))
    assert torch.equal(again.apply(tokens), m.apply(tokens))
    x = clips.clone().requires_grad_()
    g = torch.randn_like(x)
    m = CutMix(seed=3, axes=(3, 4)).sample(x)
    by_frame = torch.stack(
        [torch.autograd.grad(m_t, x, g[:, t], retain_graph=True)[0][:, t] for t, m_t in enumerate(m.apply(x).unbind(1))], 1
    )
    assert torch.equal(torch.autograd.grad(m.apply(x), x, g)[0], by_frame)


@pytest.mark.parametrize(
    ("axes", "kind", "words"),
    [((0, 1), ValueError, "axes: .*not 0"), ((1, 1), ValueError, "axes"), (1, TypeError, "axes"), ((1, 2, 3, 4), TypeError, "axes"),
     ((1.5,), TypeError, "axes"), ((3, 2), ValueError, "x: .*in this order"), ((5,), ValueError, "x: .*axes"), ((1, -3), ValueError, "x: .*axes")],
)  # fmt: skip
def test_axes_that_are_refused(axes, kind, words):
    with pytest.raises(kind, match=words):
        CutMix(axes=axes).sample(torch.randn(2, 3, 8, 8))


def test_boxes_of_one_mix_are_in_the_same_axes():
    mixer = RandomMix(CutMix(axes=(1,)), CutMix())
    with pytest.raises(ValueError, match="samplers: expected boxes in the same axes"):
        mixer.sample(torch.randn(4, 6, 5))
    with pytest.raises(ValueError, match="axes: expected one for each dimension"):
        Mix(1.0, torch.tensor([1, 0]), box=torch.zeros(2, 4, dtype=torch.int64), axes=(1,))


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (5, 7), (64, 32)])
def test_a_draw_at_another_resolution(size):
    x = torch.randn(6, 3, 32, 32)
    m = CutMix(seed=0).sample(x)
    there = m.at(*size)
    for box, scaled in zip(m.box.tolist(), there.box.tolist(), strict=True):
        for side, new, count in zip(box, scaled, (*size, *size), strict=True):
            assert new == int(side * count / 32 + 0.5)  # halves up
    assert torch.equal(there.target_lam, m.target_lam)
    labels = torch.randint(0, 5, (6, *size))
    full = there.target(labels)
    assert full.classes.shape == (6, 2, *size)
    assert there.apply(torch.randn(6, 2, *size)).shape == (6, 2, *size)
    if size == (64, 32):
        assert torch.equal(there.at(32, 32).box, m.box)
    with pytest.raises(ValueError, match="size"):
        m.at(8)
    with pytest.raises(ValueError, match="size: .*apply"):
        Mix(1.0, m.index, box=m.box).at(8, 8)


def test_a_mask_at_another_resolution():
    x = torch.randn(3, 2, 8, 8)
    m = BetaMask(1.0, size=(4, 4), seed=0).sample(x)
    assert torch.equal(m.at(16, 16).mask, m.mask)
    half = m.at(2, 2)
    torch.testing.assert_close(half.mask, torch.nn.functional.avg_pool2d(m.mask.unsqueeze(1), 2).squeeze(1))
    torch.testing.assert_close(half.target_lam, m.target_lam)
    with pytest.raises(ValueError, match="size: .*4 x 4 cells"):
        m.at(3, 3)
    plain = Mixup(1.0, seed=0).sample(x)
    assert torch.equal(plain.at(2, 2).apply(x), plain.apply(x))


PAIRED = {
    "mixup": lambda: Mixup(1.0, seed=0), "CutMix": lambda: CutMix(seed=0), "mask": lambda: BetaMask(1.0, size=(2, 2), seed=0),
    "both": lambda: RandomMix(Mixup(1.0), CutMix(), seed=0), "clips": lambda: CutMix(seed=0, axes=(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("N", [1, 2, 7])
def test_partners_of_another_batch(name, N):
    """Row i meets row i of the other batch: as rows i and i+N of both batches together, with lam's gradient."""
    x, other = torch.randn(2, N, 3, 4, 4).unbind(0)
    y, labels = torch.arange(N), torch.arange(N) + N
    mixed, target = PAIRED[name]()(x, y, partner=(other, labels))
    m = PAIRED[name]().sample(x)
    share = m._drawn_share if N == 1 else m.target_lam
    index = torch.cat((torch.arange(N) + N, torch.arange(N)))
    double = {
        key: None if value is None else torch.cat((value, value))
        for key, value in (("lam", m._lam), ("box", m.box), ("mask", m.mask))
    }
    together = Mix(double["lam"], index, torch.cat((share, share)), double["box"], mask=double["mask"], axes=m.axes)
    both = together.apply(torch.cat((x, other)))[:N]
    torch.testing.assert_close(mixed, both)
    expected = together.target(torch.cat((y, labels)))[:N]
    assert torch.equal(target.classes, expected.classes)
    torch.testing.assert_close(target.weights, expected.weights)
    rows, teacher = torch.rand(N, 5), torch.rand(N, 5)
    soft = PAIRED[name]()(x, rows, partner=(other, teacher))[1].dense()
    torch.testing.assert_close(soft, share[:, None] * rows + (1 - share[:, None]) * teacher)


def test_a_partner_batch_that_is_refused():
    mixer, x, y = Mixup(1.0, seed=0), torch.randn(4, 3), torch.arange(4)
    refused = [((x,), TypeError, "partner: expected a pair"), ((x[:3], y), ValueError, "partner: expected 4 rows"),
               ((x.double(), y), ValueError, "partner"), ((x, y[:3]), ValueError, "partner"), ((x, y.float()), ValueError, "partner")]  # fmt: skip
    for partner, kind, words in refused:
        with pytest.raises(kind, match=words):
            mixer(x, y, partner=partner)


def test_what_a_partner_batch_must_not_change():
    """Its share after a move; lambda's gradient beside infinities in the box; partners that are looked for by class."""
    x = torch.zeros(1, 4)
    for m in (
        Mixup(1.0, seed=0).sample(x),
        Mixup(1.0, seed=0).sample(x).to("cpu"),
        pickle.loads(pickle.dumps(Mixup(1.0, seed=0).sample(x))),
    ):
        weights = m.target(torch.tensor([0]), partner=torch.tensor([1])).weights
        torch.testing.assert_close(weights[0, 1], m.apply(x, partner=x + 1)[0, 0])
    lam = torch.rand(3, requires_grad=True)
    x, other = torch.randn(2, 3, 4).unbind(0)
    x[:, 0] = float("inf")
    Mix(lam, torch.tensor([1, 2, 0]), box=torch.tensor([[0, 1]] * 3)).apply(x, partner=other).sum().backward()
    torch.testing.assert_close(lam.grad, (x - other)[:, 1:].sum(1))
    with pytest.raises(ValueError, match="partner: expected None beside partner='same'"):
        Mixup(1.0, partner="same")(other, torch.arange(3), partner=(other, torch.arange(3)))


@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")]
)
@pytest.mark.parametrize("wrong", [-1, 4])
def test_partners_that_were_written_to_are_checked(copied, wrong):
    """Those that a sampler drew are known to be rows; a copy does not tell that they were written to."""
    m, y = Mixup(1.0, seed=0).sample(torch.zeros(4, 2)), torch.arange(4)
    m.index[2] = wrong
    m = copied(m)
    refused(lambda: m.target(y), ValueError, "index", r"a partner in \[0, 4\)", f"{wrong} in row 2")
    refused(lambda: m.apply(torch.zeros(4, 2)), ValueError, "index", r"a partner in \[0, 4\)", f"{wrong} in row 2")
