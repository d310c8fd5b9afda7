"""Targets in other people's training loops: stock losses, tensor methods, dicts of tensors, smoothing that rides along."""

import copy
import io
import itertools
import math
import operator
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree

import fastmix
from fastmix import MixedRows, Mixup, SoftTarget, reference


def soft(N=6, K=2, C=5, inner=(), sums_to_one=False, **options):
    classes = torch.randint(0, C, (N, K, *inner))
    weights = torch.rand(N, K, dtype=torch.float64)
    return SoftTarget(classes, weights / weights.sum(1, keepdim=True) if sums_to_one else weights, **options)


def smoothed_rows(target, C):
    """(1-e) * one-hot rows + (e/C) * sum of the weights, by loops."""
    rows = np.zeros((len(target), C))
    for n, (classes, weights) in enumerate(zip(target.classes.tolist(), target.weights.tolist(), strict=True)):
        for c, a in zip(classes, weights, strict=True):
            rows[n, c] += (1 - target.label_smoothing) * a
            rows[n] += target.label_smoothing / C * a
    return torch.tensor(rows)


class TestSmoothing:
    def test_dense(self):
        target = soft(label_smoothing=0.3, num_classes=5)
        torch.testing.assert_close(target.dense(), smoothed_rows(target, 5))
        torch.testing.assert_close(target.dense(5), target.dense())
        with pytest.raises(ValueError, match="num_classes: expected 5, the target's own, got 6"):
            target.dense(6)
        ignored = SoftTarget(torch.tensor([[0, -100]]), torch.tensor([[0.5, 0.5]]), label_smoothing=0.2)
        torch.testing.assert_close(ignored.dense(2), torch.tensor([[0.45, 0.05]]))

    @pytest.mark.parametrize(("e", "own"), [*itertools.product((0.0, 0.1), (0.0, 0.3, 1.0))])
    def test_softmax_loss(self, e, own, device):
        z = torch.randn(6, 5, dtype=torch.float64)
        target = soft(label_smoothing=own)
        row = smoothed_rows(target, 5)
        A = target.weights.sum(1, keepdim=True)
        nll = -torch.log_softmax(z, 1)
        expected = (((1 - e) * row + e / 5 * A) * nll).sum(1)
        z = z.to(device).requires_grad_()
        moved = target.to(device)
        loss = fastmix.soft_cross_entropy(z, moved, label_smoothing=e, reduction="none")
        torch.testing.assert_close(loss.cpu(), expected)
        loss.sum().backward()
        gradient = (torch.softmax(z.detach().cpu(), 1) * A) - ((1 - e) * row + e / 5 * A)
        torch.testing.assert_close(z.grad.cpu(), gradient)

    @pytest.mark.parametrize("sums_to_one", [False, True])
    @pytest.mark.parametrize(("e", "threshold"), [(0.0, None), (0.1, None), (0.1, 0.4)])
    def test_sigmoid_loss(self, e, threshold, sums_to_one, device):
        z = torch.randn(6, 5, dtype=torch.float64)
        target = soft(label_smoothing=0.3, sums_to_one=sums_to_one)
        target._normalized = target.weights if sums_to_one else None
        row = (1 - e) * smoothed_rows(target, 5) + e / 5
        row = row if threshold is None else (row > threshold).double()
        expected = F.binary_cross_entropy_with_logits(z, row, reduction="none").mean(1)
        options = {"label_smoothing": e, "threshold": threshold, "reduction": "none"}
        loss = fastmix.soft_binary_cross_entropy(z.to(device), target.to(device), **options)
        torch.testing.assert_close(loss.cpu(), expected)
        loss = fastmix.soft_binary_cross_entropy(z.to(device), target.to(device).parts(), **options)
        torch.testing.assert_close(loss.cpu(), expected)

    def test_gradient_to_the_weights(self):
        for e, loss in itertools.product((0.0, 0.1), (fastmix.soft_cross_entropy, fastmix.soft_binary_cross_entropy)):
            z, target = torch.randn(4, 5, dtype=torch.float64), soft(4, label_smoothing=0.3)
            weights = target.weights.clone().requires_grad_()
            given = (
                (z, e),
                lambda a, t=target, l=loss, z=z, e=e: l(
                    z, SoftTarget(t.classes, a, label_smoothing=0.3), label_smoothing=e, reduction="sum"
                ),
            )
            assert torch.autograd.gradcheck(given[1], weights)

    def test_samplers_targets_sum_to_one(self):
        target = Mixup(1.0).sample(torch.zeros(4, 2)).target(torch.arange(4))
        assert target._sums_to_one
        assert target[1:]._sums_to_one
        assert pickle.loads(pickle.dumps(target))._sums_to_one
        assert not _pytree.tree_map(lambda t: t * 2, target)._sums_to_one
        target.weights = target.weights * torch.tensor([[1.0], [0.0], [1.0], [2.0]])
        assert not target._sums_to_one
        target.label_smoothing = 0.3
        z = torch.randn(4, 4)
        expected = F.binary_cross_entropy_with_logits(z, target.dense(4))
        torch.testing.assert_close(fastmix.soft_binary_cross_entropy(z, target), expected)

    def test_other_losses(self):
        target = soft(label_smoothing=0.1)
        with pytest.raises(ValueError, match="target: expected one without label smoothing"):
            fastmix.mixed_loss(F.cross_entropy, torch.zeros(6, 5), target)
        plain = SoftTarget(target.classes, target.weights)
        logits = torch.randn(6, 5)
        assert fastmix.mixed_accuracy(logits, target) == fastmix.mixed_accuracy(logits, plain)

    def test_the_oracle_takes_its_rows(self):
        z, target = torch.randn(6, 5, dtype=torch.float64), soft(label_smoothing=0.2)
        expected = reference.soft_cross_entropy(
            z.numpy(), (target.classes.numpy(), target.weights.numpy()), label_smoothing=0.2
        )
        np.testing.assert_allclose(fastmix.soft_cross_entropy(z, target).item(), expected, rtol=1e-12)


class TestStockLosses:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("inner", [(), (3,)], ids=str)
    def test_cross_entropy(self, reduction, inner):
        z, w = torch.randn(6, 5, *inner, requires_grad=True), torch.rand(5)
        target = soft(inner=inner)
        options = {"ignore_index": 2, "label_smoothing": 0.1, "reduction": reduction}
        expected = fastmix.soft_cross_entropy(z, target, weight=w, **options)
        assert torch.equal(F.cross_entropy(z, target, weight=w, **options), expected)
        assert torch.equal(torch.nn.CrossEntropyLoss(w, **options)(z, target), expected)
        (gradient,) = torch.autograd.grad(F.cross_entropy(z, target, w, **options).sum(), z)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])

    def test_mixed_rows(self):
        z, rows = torch.randn(4, 5), MixedRows(torch.rand(4, 5), torch.rand(4), torch.tensor([1, 2, 3, 0]))
        assert torch.equal(F.cross_entropy(z, rows), fastmix.soft_cross_entropy(z, rows))

    def test_older_reductions(self):
        z, target = torch.randn(6, 5), soft()
        with pytest.warns(UserWarning, match="size_average"):
            assert torch.equal(
                F.cross_entropy(z, target, size_average=False), fastmix.soft_cross_entropy(z, target, reduction="sum")
            )

    def test_compiled_and_autocast(self):
        criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        z, target = torch.randn(6, 5, requires_grad=True), soft()
        target = SoftTarget(target.classes, target.weights.float())
        compiled = torch.compile(
            lambda z, classes, weights: criterion(z, SoftTarget(classes, weights)), fullgraph=True, backend="aot_eager"
        )
        expected = fastmix.soft_cross_entropy(z, target, label_smoothing=0.1)
        torch.testing.assert_close(compiled(z, target.classes, target.weights), expected)
        whole = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(z, target), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(z.bfloat16(), target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, fastmix.soft_cross_entropy(z.bfloat16(), target, label_smoothing=0.1))

    @pytest.mark.parametrize(
        "call",
        [
            lambda z, t: F.kl_div(z, t),
            lambda z, t: F.binary_cross_entropy_with_logits(z, t),
            lambda z, t: torch.stack([t, t]),
            lambda z, t: z * t,
            lambda z, t: t * z,
            lambda z, t: z + t,
            lambda z, t: -t,
            lambda z, t: z @ t,
            lambda z, t: z > t,
            lambda z, t: torch.sum(-t * F.log_softmax(z, dim=-1), dim=-1),
        ],
    )
    def test_everything_else_says_what_to_do(self, call):
        for target in (soft(), MixedRows(torch.rand(6, 5), 0.5, torch.arange(6))):
            with pytest.raises(TypeError, match=r"target.dense\(num_classes\)"):
                call(torch.randn(6, 5), target)

    def test_predictions_are_not_compared(self):
        for target in (soft(), MixedRows(torch.rand(6, 5), 0.5, torch.arange(6))):
            for call in (lambda t: torch.zeros(6) == t, lambda t: t == torch.zeros(6), lambda t: t != torch.zeros(6)):
                with pytest.raises(TypeError, match=r"target.argmax\(\), or measure with fastmix.mixed_accuracy"):
                    call(target)
            assert target == target
            assert target in [target]
            assert hash(target) == hash(target)


class TestAsATensor:
    def test_face(self):
        target = soft(inner=(3, 4))
        assert target.size() == target.shape == (6, 2, 3, 4)
        assert target.size(0) == len(target) == 6
        assert target.ndim == target.dim() == 4
        assert target.device == torch.device("cpu")
        assert not hasattr(target, "dtype")
        assert soft().to("cpu", torch.bfloat16).weights.dtype == torch.float64
        rows = MixedRows(torch.rand(6, 5), 0.5, torch.arange(6))
        assert rows.shape == (6, 5)
        assert not hasattr(rows, "dtype")

    @pytest.mark.parametrize(
        "arguments",
        [
            (("meta",), {}),
            ((torch.device("meta"),), {}),
            ((torch.zeros(1, device="meta"),), {}),
            ((), {"device": "meta", "non_blocking": True}),
            (("meta", torch.float16), {"non_blocking": True}),
            (("meta",), {"copy": True}),
        ],
    )
    def test_to(self, arguments):
        args, kwargs = arguments
        for target in (soft(label_smoothing=0.1, num_classes=5), MixedRows(torch.rand(6, 5), torch.rand(6), torch.arange(6))):
            moved = target.to(*args, **kwargs)
            assert moved.device.type == "meta"
            assert moved.label_smoothing == target.label_smoothing
            assert moved.num_classes == target.num_classes
        weights = torch.rand(6, 2, requires_grad=True)
        target = SoftTarget(torch.zeros(6, 2, dtype=torch.int64), weights)
        assert target.to(torch.float16).weights is weights
        assert not target.detach().weights.requires_grad
        assert target.cpu().weights is weights
        assert target.to("cpu", copy=True).weights is not weights
        assert target.to("cpu", torch.float32, False, True).weights is not weights
        assert len(target[[]]) == 0

    def test_max_as_torchvisions_accuracy_calls_it(self):
        target = SoftTarget(torch.tensor([[1, 0], [2, 2]]), torch.tensor([[0.6, 0.4], [0.4, 0.6]]))
        values, classes = target.max(dim=1)
        assert classes.tolist() == target.argmax().tolist() == [1, 2]
        torch.testing.assert_close(values, torch.tensor([0.6, 1.0]))

    def test_counting_labels(self):
        """transformers counts `labels.ne(-100).sum()`."""
        target = SoftTarget(torch.tensor([[1, 0], [-100, 2], [-100, -100]]), torch.rand(3, 2))
        assert target.ne(-100).sum() == 2
        assert target.numel() == 3
        rows = MixedRows(torch.rand(6, 5), 0.5, torch.arange(6))
        assert rows.ne(-100).sum() == rows.numel() == 30  # as of dense rows

    def test_copies(self):
        target = soft(label_smoothing=0.1, num_classes=5)
        saved = io.BytesIO()
        torch.save({"y": target}, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=True)["y"]
        mapped = _pytree.tree_map(lambda t: t, target)
        for other in (
            loaded,
            mapped,
            pickle.loads(pickle.dumps(target)),
            copy.deepcopy(target),
            target[:],
        ):
            assert torch.equal(other.weights, target.weights)
            assert (other.label_smoothing, other.num_classes) == (0.1, 5)
        old = SoftTarget.__new__(SoftTarget)  # a pickle from before smoothing rode along
        old.__dict__.update({"classes": target.classes, "weights": target.weights})
        assert torch.isfinite(fastmix.soft_cross_entropy(torch.randn(6, 5), old))


class TestParts:
    def test_of_a_soft_target(self):
        z = torch.randn(6, 5)
        for target in (soft(), soft(label_smoothing=0.125), soft(label_smoothing=1e-05, num_classes=5)):
            parts = target.parts()
            assert all(isinstance(t, torch.Tensor) for t in parts.values())
            again = SoftTarget.of(parts)
            assert (again.label_smoothing, again.num_classes) == (target.label_smoothing, target.num_classes)
            assert torch.equal(fastmix.soft_cross_entropy(z, parts), fastmix.soft_cross_entropy(z, target))
            halves = [{k: t[rows] for k, t in parts.items()} for rows in (slice(3), slice(3, 6))]
            joined = {k: torch.cat([half[k] for half in halves]) for k in parts}
            assert torch.equal(fastmix.soft_cross_entropy(z, joined), fastmix.soft_cross_entropy(z, target))
        with pytest.raises(ValueError, match="parts: expected a dict with 'classes' and 'weights'"):
            fastmix.soft_cross_entropy(z, {"classes": target.classes})

    def test_of_mixed_rows(self):
        z, rows = torch.randn(6, 5), MixedRows(torch.rand(6, 5), torch.rand(6), torch.tensor([1, 2, 3, 4, 5, 0]))
        whole = fastmix.soft_binary_cross_entropy(z, rows, reduction="none")
        for part in (slice(2), slice(2, 6), slice(1, None, 2)):
            sliced = {k: t[part] for k, t in rows.parts().items()}
            torch.testing.assert_close(fastmix.soft_binary_cross_entropy(z[part], sliced, reduction="none"), whole[part])
            taken = fastmix.soft_binary_cross_entropy(z[part], rows[part], reduction="none")
            torch.testing.assert_close(taken, whole[part])
        with pytest.raises(ValueError, match="parts: expected a dict with 'values', 'partner_values' and 'lam'"):
            MixedRows.of({"values": z})

    def test_narrow_values_are_not_rounded(self):
        z, rows = torch.randn(6, 5), MixedRows(torch.rand(6, 5).bfloat16(), torch.rand(6), torch.tensor([1, 2, 3, 4, 5, 0]))
        whole = fastmix.soft_cross_entropy(z, rows)
        for part in (rows[:], rows.parts()):
            torch.testing.assert_close(fastmix.soft_cross_entropy(z, part), whole, rtol=1e-6, atol=0)

    def test_metrics_take_them(self):
        z, target = torch.randn(6, 5), soft()
        assert fastmix.mixed_accuracy(z, target.parts()) == fastmix.mixed_accuracy(z, target)
        loss = lambda o, y: F.cross_entropy(o, y, reduction="none")  # noqa: E731
        assert torch.equal(fastmix.mixed_loss(loss, z, target.parts()), fastmix.mixed_loss(loss, z, target))


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: soft(label_smoothing=1.5), ValueError, r"label_smoothing: expected a float in \[0, 1\], got 1.5"),
        (lambda: soft(label_smoothing="0.1"), TypeError, "label_smoothing: "),
        (lambda: soft(num_classes=2.0), TypeError, "num_classes: expected an int"),
        (lambda: SoftTarget(torch.tensor([[7]]), torch.ones(1, 1), num_classes=5), ValueError, r"classes: .*\[0, 5\), got 7"),
        (
            lambda: fastmix.soft_cross_entropy(torch.zeros(6, 4), soft(C=4, num_classes=5)),
            ValueError,
            r"logits: expected 5 classes, the target's num_classes, .*\[6, 4\]",
        ),
        (lambda: soft().max(0), ValueError, "dim: expected 1"),
        (lambda: soft()[torch.zeros(2, dtype=torch.uint8)], TypeError, "rows: expected an int, a slice, a mask"),
    ],
)
def test_refusals(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_weights_that_were_written_to_are_not_known_to_sum_to_one():
    """The sigmoid loss smooths by a row's sum, which is 1 only as long as nobody changes it."""
    z = torch.randn(3, 5)
    target = fastmix.Mixup(1.0, seed=0)(torch.randn(3, 4), torch.tensor([0, 1, 4]))[1]
    target.label_smoothing = 0.2
    target.weights[1] = 0
    loss = fastmix.soft_binary_cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(z, target.dense(5), reduction="none").mean(1))


@pytest.mark.parametrize("other", [[1, 2], (1, 2), np.arange(2)], ids=["list", "tuple", "array"])
def test_labels_of_any_kind_are_not_compared_in_silence(other):
    target = soft()
    for compare in (lambda: target == other, lambda: other == target):
        with pytest.raises(TypeError, match="argmax"):
            compare()


class TestNumbersSetLater:
    def test_are_checked(self):
        target = SoftTarget(torch.tensor([[0], [1]]), torch.ones(2, 1))
        target.label_smoothing, target.num_classes = 1, 3
        assert (target.label_smoothing, target.num_classes) == (1.0, 3)
        assert target.dense().tolist() == torch.full((2, 3), 1 / 3).tolist()
        for name, value, kind in [
            ("label_smoothing", 1.5, ValueError),
            ("label_smoothing", "0.1", TypeError),
            ("num_classes", 0, ValueError),
            ("num_classes", 2.5, TypeError),
        ]:
            with pytest.raises(kind, match=f"{name}: expected .*, got {value!r}"):
                setattr(target, name, value)
        assert (target.label_smoothing, target.num_classes) == (1.0, 3)

    def test_stay_through_copies(self):
        target = SoftTarget(torch.tensor([[0], [1]]), torch.ones(2, 1), label_smoothing=0.2, num_classes=4)
        for copied in (copy.deepcopy(target), pickle.loads(pickle.dumps(target)), target[:1], target.to("cpu")):
            assert (copied.label_smoothing, copied.num_classes) == (0.2, 4)

    def test_rows_have_none(self):
        rows = MixedRows(torch.eye(2), 0.5, torch.tensor([1, 0]))
        with pytest.raises(AttributeError, match="label_smoothing: .* got MixedRows"):
            rows.label_smoothing = 0.1
        assert rows.label_smoothing == 0.0


@pytest.mark.parametrize("sentinel", [-1.0, math.nan])
class TestUnknownLabels:
    """Rows 0 and 1 mix a known and an unknown label; row 2 has lam 1."""

    def mixed(self, sentinel):
        values = torch.tensor([[1.0, sentinel], [0.0, 1.0], [sentinel, 0.0]])
        return torch.linspace(-1, 2, 6).view(3, 2), MixedRows(values, torch.tensor([0.75, 0.25, 1.0]), torch.tensor([1, 2, 0]))

    def losses(self, logits, target, sentinel):
        return fastmix.soft_binary_cross_entropy(logits, target, ignore_value=sentinel, reduction="none")

    def expected(self, logits):
        softplus = lambda z: torch.nn.functional.softplus(z.double())  # noqa: E731
        z = logits.double()
        known = [
            0.75 * softplus(-z[0, 0]) + 0.25 * softplus(z[0, 0]),
            0.25 * softplus(-z[1, 1]) + 0.75 * softplus(z[1, 1]),
            softplus(z[2, 1]),
        ]
        return torch.stack(known).float()

    def test_whole_and_in_parts(self, sentinel):
        logits, target = self.mixed(sentinel)
        expected = self.expected(logits)
        torch.testing.assert_close(self.losses(logits, target, sentinel), expected)
        torch.testing.assert_close(self.losses(logits, target.parts(), sentinel), expected)
        micro = {name: t[1:] for name, t in target.parts().items()}
        torch.testing.assert_close(self.losses(logits[1:], micro, sentinel), expected[1:])

    @pytest.mark.parametrize(
        "make",
        [lambda t: t[:], lambda t: t[1:], lambda t: t[1:].to("cpu"), lambda t: MixedRows.of(t.parts()), lambda t: copy.deepcopy(t[:]),
         lambda t: _pytree.tree_map(lambda leaf: leaf, t[:])],
        ids=["whole", "slice", "moved", "of", "copy", "pytree"],
    )  # fmt: skip
    def test_mixed_already(self, sentinel, make):
        """NaN stays; a number is mixed, so what it marked is gone: refused."""
        logits, target = self.mixed(sentinel)
        rows = make(target)
        logits = logits[-len(rows) :]
        if sentinel != sentinel:
            torch.testing.assert_close(
                self.losses(logits, rows, sentinel), self.expected(self.mixed(sentinel)[0])[-len(rows) :]
            )
            return
        with pytest.raises(ValueError, match="ignore_value: expected NaN for rows that are mixed already .* got -1.0"):
            self.losses(logits, rows, sentinel)
        fastmix.soft_binary_cross_entropy(logits, rows)


@pytest.mark.parametrize(
    "target",
    [SoftTarget(torch.tensor([[0], [1]]), torch.ones(2, 1)), MixedRows(torch.eye(2), 0.5, torch.tensor([1, 0]))],
    ids=["soft", "rows"],
)
class TestOperators:
    @pytest.mark.parametrize("operation", [abs, round, operator.pos, operator.neg, operator.invert])
    def test_of_one(self, target, operation):
        with pytest.raises(TypeError, match=r"expected tensors, got a fastmix.* make it dense, target.dense"):
            operation(target)

    @pytest.mark.parametrize(
        "operation",
        [pow, divmod, operator.floordiv, operator.mod, operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift, operator.mul],
    )  # fmt: skip
    @pytest.mark.parametrize("other", [2, torch.ones(2, dtype=torch.int64), np.ones(2)], ids=["int", "tensor", "array"])
    def test_of_two(self, target, operation, other):
        for pair in ((target, other), (other, target)):
            with pytest.raises(TypeError, match=r"expected tensors, got a fastmix.* make it dense, target.dense"):
                operation(*pair)

    def test_argmax_as_of_a_tensor(self, target):
        for dim in (1, -1):
            assert torch.equal(target.argmax(dim), target.dense(2).argmax(dim))

    @pytest.mark.parametrize(
        "arguments", [(None,), (None, None), (None, torch.float16), (None, None, True), (torch.ones(1), True, True), (None, None, True, True)]
    )  # fmt: skip
    def test_to_as_a_tensor(self, target, arguments):
        torch.ones(2).to(*arguments)
        moved = target.to(*arguments)
        assert type(moved) is type(target)
        assert torch.equal(moved.dense(2), target.dense(2))

    def test_to_refuses_what_a_tensor_refuses(self, target):
        for moved in (torch.ones(2), target):
            with pytest.raises(TypeError):
                moved.to(None, True)


@pytest.mark.parametrize("target", [soft(N=4), MixedRows(torch.rand(4, 5), 0.5, torch.tensor([1, 2, 3, 0]))])
def test_what_only_tensors_have(target):
    """What a loop asks of labels and a target has not: an error that names what there is."""
    for name in ("reshape", "view", "sum", "float", "clone", "numpy", "dtype"):
        assert not hasattr(target, name)
        with pytest.raises(AttributeError, match=rf"{name}.*dense\(num_classes\).*argmax\(\).*mixed_accuracy"):
            getattr(target, name)
    with pytest.raises(AttributeError) as error:
        target.weighs  # noqa: B018
    assert "dense" not in str(error.value)
    for convert in (np.asarray, np.array):  # as metrics of scikit-learn do
        with pytest.raises(TypeError, match=r"dense\(num_classes\).*argmax\(\)"):
            convert(target)
    with pytest.raises(TypeError, match=r"argmax\(\)"):
        torch.zeros(4).eq(target)
    assert target != copy.copy(target)
    assert target == target  # noqa: PLR0124
