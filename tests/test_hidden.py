"""Mixing inside a model: values and gradients against the same layers called one after the other on plain expressions, and what
hooks are known to get wrong: unmixed features, hooks that stay, a checkpoint that runs without them.
"""

import contextlib
import copy
import inspect
import pathlib
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close as same
from torch.utils.checkpoint import checkpoint

import fastmix
from fastmix import ManifoldMixup, Mix, mix_hidden
from fastmix.sampling import draws

ROOT = pathlib.Path(__file__).parent.parent
COMPILED = pytest.mark.no_poison  # torch.compile does not trace through poisoned memory
N, L, D, CLASSES = 4, 5, 8, 3


def plain(h, lam, index, dim=0):
    lam = lam.reshape(*[1] * dim, -1, *[1] * (h.dim() - dim - 1))
    return lam * h + (1 - lam) * h.index_select(dim, index)


def how(device="cpu"):
    """lam with both ends in it, and an index with a repeated partner"""
    return torch.tensor([0.7, 1.0, 0.25, 0.0], device=device), torch.tensor([1, 2, 1, 0], device=device)


def stack(device="cpu"):
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, CLASSES)).to(device)


def hooks(*modules):
    return sum(len(m._forward_pre_hooks) for module in modules for m in module.modules())


class Named(nn.Module):
    """Takes its tensor by name, and something before it that is none."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5)

    def forward(self, scale, h=None, *, other=None):
        return scale * self.inner(h) + (0 if other is None else other)


# mix_hidden: values and gradients


@pytest.mark.trap("ManifoldMixup#1")
def test_the_input_of_a_layer_is_mixed(device):
    model, x, (lam, index) = stack(device), torch.randn(N, 6, device=device), how(device)
    x.requires_grad_()
    lam.requires_grad_()
    upstream = torch.randn(N, CLASSES, device=device)
    with mix_hidden(model[2], lam, index):
        out = model(x)
    expected = model[2:](plain(model[:2](x), lam, index))
    same(out, expected)
    leaves = x, lam, *model.parameters()
    same(torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(expected, leaves, upstream))
    assert not hooks(model)
    same(model(x), model[4](model[3](model[2](model[:2](x)))))


def test_a_mix_in_place_of_lam_and_index():
    images, index = torch.randn(N, 2, 4, 4), torch.tensor([1, 0, 3, 2])
    layer = nn.Identity()
    box = torch.tensor([[0, 0, 2, 2]] * N)
    for mix in (Mix(0.3, index), Mix(1.0, index, box=box), Mix(None, index, mask=torch.rand(N, 2, 2))):
        with mix_hidden(layer, mix):
            assert torch.equal(layer(images), mix.apply(images))
    with pytest.raises(ValueError, match="index: expected None beside a Mix"):
        mix_hidden(layer, Mix(0.3, index), index)


def test_which_argument_is_mixed():
    layer, h, (lam, index) = Named(), torch.randn(N, 6), how()
    other = torch.randn(N, 5)
    expected = 2.0 * layer.inner(plain(h, lam, index)) + other
    for call in (
        lambda: layer(2.0, h, other=other),
        lambda: layer(2.0, h=h, other=other),
        lambda: layer(scale=2.0, h=h, other=other),
        lambda: layer(other=other, h=h, scale=2.0),  # in the order of forward's arguments, not of the call's
    ):
        with mix_hidden(layer, lam, index):
            same(call(), expected)
    with (
        mix_hidden(layer, lam, index),
        pytest.raises(TypeError, match="arguments of Named: expected a tensor.*got float, list"),
    ):
        layer(2.0, h=[h])
    with (
        mix_hidden(layer, lam, index),
        pytest.raises(TypeError, match="first tensor argument of Named: expected a floating tensor.*got an int64"),
    ):
        layer(2.0, h.long())
    for wrong in (torch.randn(N + 1, 6), torch.randn(())):
        with (
            mix_hidden(layer, lam, index),
            pytest.raises(ValueError, match="first tensor argument of Named: expected 4 rows in dimension 0, got"),
        ):
            layer(2.0, wrong)
    assert not hooks(layer)


def test_arguments_that_have_no_order():
    """Those that forward has no name for come after its own; where it has no signature, as they are given."""

    class Any(nn.Module):
        def forward(self, **tensors):
            return tensors

    layer, h, (lam, index) = Any(), torch.randn(N, 6), how()
    with mix_hidden(layer, lam, index):
        out = layer(h=h, other=h)
    same(out["h"], plain(h, lam, index))
    assert out["other"] is h
    layer.forward = type("Builtin", (), {"__call__": lambda self, **tensors: tensors, "__signature__": "none"})()
    with pytest.raises(TypeError):
        inspect.signature(layer.forward)
    with mix_hidden(layer, lam, index):
        same(layer(other=h, h=h)["other"], plain(h, lam, index))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    layer, (lam, index) = nn.TransformerEncoderLayer(D, 2, batch_first=True), how()
    words, padding = torch.randn(N, L, D), sentences()[1]
    encoder = nn.TransformerEncoder(layer, 2).eval()
    with (
        torch.no_grad(),
        mix_hidden(encoder.layers[1], lam, index),
        pytest.raises(TypeError, match="first tensor argument of TransformerEncoderLayer: .*enable_nested_tensor=False"),
    ):
        encoder(words, src_key_padding_mask=padding)


def test_attention_is_mixed_in_its_query():
    """As the docstring says: of several tensors the first."""
    layer, h, (lam, index) = nn.MultiheadAttention(D, 2, batch_first=True), torch.randn(N, L, D), how()
    with mix_hidden(layer, lam, index):
        out = layer(h, h, h)[0]
    same(out, layer(plain(h, lam, index), h, h)[0])
    assert "only the query" in mix_hidden.__doc__


def test_every_call_and_every_module_is_mixed():
    """A layer shared by several depths is mixed at each; contexts inside each other mix in turn, the outer one first."""
    layer, other, x, (lam, index) = nn.Linear(6, 6), nn.Linear(6, 6), torch.randn(N, 6), how()
    with mix_hidden(layer, lam, index):
        out = layer(layer(x))
    same(out, layer(plain(layer(plain(x, lam, index)), lam, index)))
    with mix_hidden((layer, other), lam, index):
        out = other(layer(x))
    same(out, other(plain(layer(plain(x, lam, index)), lam, index)))
    with mix_hidden(layer, lam, index), mix_hidden(layer, lam.flip(0), index.flip(0)):
        out = layer(x)
    same(out, layer(plain(plain(x, lam, index), lam.flip(0), index.flip(0))))
    assert not hooks(layer, other)


def test_a_context_is_used_again_but_not_inside_itself():
    layer, x, (lam, index) = nn.Linear(6, 6), torch.randn(N, 6), how()
    context = mix_hidden(layer, lam, index)
    for _ in range(2):
        with context:
            same(layer(x), layer.forward(plain(x, lam, index)))
            with pytest.raises(RuntimeError, match="open already"), context:
                pass
            same(layer(x), layer.forward(plain(x, lam, index)))  # still open, once
    assert not hooks(layer)
    with pytest.raises(RuntimeError, match="never called while it was open.*: Linear"), context:
        pass  # the calls of the last time do not count


@pytest.mark.trap("ManifoldMixup#1")
def test_hooks_go_whatever_happens():
    model, (lam, index) = stack(), how()

    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("broken")

    broken = Broken()
    with pytest.raises(KeyError), mix_hidden(broken, lam, index):
        broken(torch.randn(N, 2))
    with (
        pytest.raises(ZeroDivisionError),
        mix_hidden(model[2], lam, index),
    ):  # never called: the error on its way is not replaced
        raise ZeroDivisionError
    assert not hooks(model, broken)
    with (
        pytest.raises(RuntimeError, match="nothing was mixed there: Linear, Tanh"),
        mix_hidden((model[0], model[1]), lam, index),
    ):
        model[2](torch.randn(N, 7))
    with pytest.raises(RuntimeError, match="nothing was mixed there: Tanh"), mix_hidden((model[0], model[1]), lam, index):
        model[0](torch.randn(N, 6))
    assert not hooks(model)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("layer", 0.5, [1, 0]), {}, TypeError, "index: expected an int64 tensor"),
        ((None, 0.5, torch.tensor([1, 0])), {}, TypeError, "module: expected an nn.Module"),
        (([nn.Tanh(), 3], 0.5, torch.tensor([1, 0])), {}, TypeError, "module: expected an nn.Module"),
        (((), 0.5, torch.tensor([1, 0])), {}, ValueError, "module: expected at least one"),
        (([nn.Tanh()] * 2, 0.5, torch.tensor([1, 0])), {}, ValueError, "module: expected each module once"),
        (
            (nn.Tanh(), torch.rand(3), torch.tensor([1, 0])),
            {},
            ValueError,
            r"lam: expected a float, a 0-d tensor or shape \[2\]",
        ),
        ((nn.Tanh(), 0.5), {}, TypeError, "index: expected an int64 tensor"),
        ((nn.Tanh(), 0.5, torch.tensor([1, 0])), {"dim": -1}, ValueError, "dim: expected"),
        ((nn.Tanh(), 0.5, torch.tensor([1, 0])), {"dim": 1.0}, TypeError, "dim: expected an int"),
        ((nn.Tanh(), 0.5, torch.tensor([1, 0])), {"masks": ["mask"]}, TypeError, "masks: expected {name"),
        ((nn.Tanh(), 0.5, torch.tensor([1, 0])), {"masks": {"mask": "add"}}, ValueError, "'ignore', 'attend', got 'add'"),
        (
            (nn.Tanh(), 0.5, torch.tensor([1, 0])),
            {"masks": {"mask": "ignore"}},
            ValueError,
            "names of arguments of Tanh.forward",
        ),
        (
            (nn.Tanh(), 0.5, torch.tensor([1, 0])),
            {"mask_modules": [nn.Tanh()]},
            ValueError,
            "mask_modules: expected None without",
        ),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    module = nn.Tanh() if arguments[0] == "layer" else arguments[0]
    with pytest.raises(error, match=message):
        mix_hidden(module, *arguments[1:], **options)


# Masks of sequences


class Masked(nn.Module):
    def forward(self, h, mask=None, *, named=None):
        return mask, named


FALSE, TRUE = False, True
LOW = -float("inf")


@pytest.mark.parametrize(
    ("kind", "mask", "expected"),
    [  # rows: mixed with 1, taken as it is (lam 1), mixed with 1, partner 0 alone (lam 0)
        ("ignore", [[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 1, 0]], [[0, 0, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]]),
        ("attend", [[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]], [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_joined_masks(kind, mask, expected, dtype):
    (lam, index), layer, h = how(), Masked(), torch.randn(N, L)
    mask, expected = torch.tensor(mask), torch.tensor(expected)
    if kind == "ignore" and dtype == torch.int64:
        with (
            mix_hidden(layer, lam, index, masks={"mask": kind}),
            pytest.raises(TypeError, match="mask: expected a bool tensor"),
        ):
            layer(h, mask)
        return
    if kind == "ignore" and dtype == torch.float32:  # added to the scores
        mask, expected = (torch.zeros(m.shape).masked_fill(m.bool(), LOW) for m in (mask, expected))
    mask, expected = mask.to(dtype), expected.to(dtype)
    before = mask.clone()
    with mix_hidden(layer, lam, index, masks={"mask": kind, "named": kind}):
        by_place, by_name = layer(h, mask, named=mask[:, None])
        assert layer(h, None, named=mask)[0] is None
    assert torch.equal(by_place, expected)
    assert torch.equal(by_name, expected[:, None])
    assert torch.equal(mask, before)


def test_masks_that_cannot_be_joined():
    (lam, index), layer, h = how(), Masked(), torch.randn(N, L)
    for mask in (torch.zeros(N + 1, L), torch.zeros(N)):
        with (
            mix_hidden(layer, lam, index, masks={"mask": "attend"}),
            pytest.raises(ValueError, match=r"mask: expected shape \[4, \.\.\.\]"),
        ):
            layer(h, mask)
    with (
        pytest.raises(RuntimeError, match="given these masks.*: named"),
        mix_hidden(layer, lam, index, masks={"named": "attend"}),
    ):
        layer(h, torch.zeros(N, L))
    with mix_hidden((), lam, index, masks={"mask": "attend"}, mask_modules=[layer]):  # masks alone
        assert layer(h, torch.eye(N))[0].sum() == 6


def test_boxes_and_cells_join_where_they_take_from_the_partner():
    index, mask, layer = torch.tensor([1, 0, 3, 2]), torch.eye(N, dtype=torch.bool), Masked()
    box = torch.tensor([[0, 2], [0, 0], [1, 1], [0, 3]])
    with mix_hidden(layer, Mix(1.0, index, box=box), masks={"mask": "attend"}):
        joined = layer(torch.randn(N, L), mask)[0]
    assert torch.equal(joined, mask | (mask[index] & torch.tensor([True, False, False, True])[:, None]))
    covering = torch.tensor([[0, L], [-2, L + 3], [L, L + 2], [0, L - 1]])  # two rows, none, all but a position of one
    with mix_hidden(layer, Mix(1.0, index, box=covering), masks={"mask": "attend"}):
        joined = layer(torch.randn(N, L), mask)[0]
    assert torch.equal(joined, torch.stack((mask[1], mask[0], mask[2], mask[3] | mask[2])))
    before = Masked()  # is called before anything is mixed, which tells how long rows are: what may be looked at stays
    with mix_hidden(layer, Mix(1.0, index, box=covering), masks={"mask": "attend"}, mask_modules=[before]):
        assert torch.equal(before(torch.randn(N, L), mask)[0], mask | mask[index])
        layer(torch.randn(N, L))
    cells = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.5, 1.0]])[:, None]
    with mix_hidden(layer, Mix(None, index, mask=cells), masks={"mask": "attend"}):
        joined = layer(torch.randn(N, 2, 4), mask)[0]
    assert torch.equal(joined.sum(1), torch.tensor([1, 2, 1, 2]))
    assert joined[2, 3]


class Text(nn.Module):
    """Words, transformer layers, the mean over a sentence's words, a classifier."""

    def __init__(self, depth=4, **options):
        super().__init__()
        self.embedding = nn.Embedding(20, D)
        layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, words, padding=None):
        h = self.encoder(self.embedding(words), src_key_padding_mask=padding)
        return self.head(h.mean(1))


PADDING = {"src_key_padding_mask": "ignore"}


def sentences():
    lengths = torch.tensor([5, 2, 4, 1])
    return torch.randint(20, (N, L)), torch.arange(L) >= lengths[:, None]


def union(padding, lam, index):
    rows = [
        padding[i] if w == 1 else padding[j] if w == 0 else padding[i] & padding[j]
        for i, (w, j) in enumerate(zip(lam, index, strict=True))
    ]
    return torch.stack(rows)


def test_words_and_sentences_and_a_middle_layer():
    """wordMixup, senMixup (arXiv:1905.08941) and TMix (arXiv:2004.12239) on a transformer with padded sentences."""
    model, (words, padding), (lam, index) = Text(), sentences(), how()
    lam.requires_grad_()
    joined, layers = union(padding, lam, index), model.encoder.layers
    embedded = model.embedding(words)

    def through(h, masks):
        for layer, mask in zip(layers, masks, strict=True):
            h = layer(h, src_key_padding_mask=mask)
        return h.mean(1)

    with mix_hidden(model.encoder, lam, index, masks=PADDING):
        word = model(words, padding)
    with mix_hidden(model.head, lam, index):
        sentence = model(words, padding)
    with mix_hidden(layers[2], lam, index, masks=PADDING, mask_modules=layers[2:]):
        middle = model(words, padding)
    first = layers[1](layers[0](embedded, src_key_padding_mask=padding), src_key_padding_mask=padding)
    for actual, expected in (
        (word, model.head(through(plain(embedded, lam, index), [joined] * 4))),
        (sentence, model.head(plain(through(embedded, [padding] * 4), lam, index))),
        (middle, model.head(layers[3](layers[2](plain(first, lam, index), src_key_padding_mask=joined), src_key_padding_mask=joined).mean(1))),
    ):  # fmt: skip
        same(actual, expected)
        leaves = lam, model.embedding.weight, model.head.weight, layers[0].linear1.weight
        g = torch.randn_like(actual)
        same(
            torch.autograd.grad(actual, leaves, g, retain_graph=True),
            torch.autograd.grad(expected, leaves, g, retain_graph=True),
        )
    assert not hooks(model)


def test_words_and_sentences_and_a_middle_layer_of_lstms():
    (words, _), (lam, index), embedding = sentences(), how(), nn.Embedding(20, D)
    lam.requires_grad_()
    lower, upper = nn.LSTM(D, 3, batch_first=True, bidirectional=True), nn.LSTM(6, 5, batch_first=True)
    head = nn.Linear(5, CLASSES)

    def model(mixed_at=None):
        h = embedding(words)
        for layer in (lower, upper, head):
            h = h.amax(1) if layer is head else h
            h = layer(plain(h, lam, index) if layer is mixed_at else h)
            h = h if layer is head else h[0]
        return h

    for layer in (lower, head, upper):  # wordMixup, senMixup, TMix
        with mix_hidden(layer, lam, index):
            mixed = model()
        expected, g = model(layer), torch.randn(N, CLASSES)
        same(mixed, expected)
        leaves = lam, embedding.weight, lower.weight_hh_l0, upper.weight_ih_l0, head.weight
        same(torch.autograd.grad(mixed, leaves, g), torch.autograd.grad(expected, leaves, g))


def test_rows_in_another_dimension():
    """[L, N, D], the default of LSTMs, beside their initial state, which stays; packed sequences are refused."""
    lstm, h, (lam, index) = nn.LSTM(6, 5), torch.randn(3, N, 6), how()
    h.requires_grad_()
    lam.requires_grad_()
    state = torch.randn(1, N, 5), torch.randn(1, N, 5)
    with mix_hidden(lstm, lam, index, dim=1):
        out = lstm(h, state)[0]
    expected = lstm(plain(h, lam, index, 1), state)[0]
    same(out, expected)
    g = torch.randn_like(out)
    same(torch.autograd.grad(out, (h, lam), g), torch.autograd.grad(expected, (h, lam), g))
    packed = nn.utils.rnn.pack_padded_sequence(h, torch.tensor([3, 2, 2, 1]))
    with mix_hidden(lstm, lam, index, dim=1), pytest.raises(TypeError, match="first tensor argument of LSTM.*PackedSequence"):
        lstm(packed)


# Checkpoints: what is run again in the backward


class Checkpointed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 7), nn.Sequential(nn.Tanh(), nn.Linear(7, 7)), nn.Linear(7, CLASSES)
        self.options = options

    def forward(self, x):
        return self.last(checkpoint(self.middle, self.first(x), **self.options))


@pytest.mark.trap("ManifoldMixup#1")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_that_would_run_without_the_hook_is_refused(use_reentrant):
    model, x, (lam, index) = Checkpointed(use_reentrant=use_reentrant), torch.randn(N, 6), how()
    with (
        mix_hidden(model.middle[1], lam, index),
        pytest.raises(RuntimeError, match="Linear is called within a checkpointed part"),
    ):
        model(x)
    assert not hooks(model)
    for module, expected in (  # the part as a whole, and what is not in it, are fine
        (model.first, lambda: model(plain(x, lam, index))),
        (model.last, lambda: model.last(plain(model.middle(model.first(x)), lam, index))),
    ):
        with mix_hidden(module, lam, index):
            out = model(x)
        leaves, g = tuple(model.parameters()), torch.randn(N, CLASSES)
        mixed, wanted = (torch.cat([p.grad.flatten() for p in backward(t, leaves, g)]) for t in (out, expected()))
        same(mixed, wanted)


def backward(out, leaves, g):
    """.backward(), which alone a reentrant checkpoint has"""
    for leaf in leaves:
        leaf.grad = None
    out.backward(g)
    return [copy.copy(leaf) if leaf.grad is None else leaf for leaf in map(with_grad, leaves)]


def with_grad(leaf):
    kept = leaf.detach().clone().requires_grad_()
    kept.grad = leaf.grad
    return kept


def test_masks_within_a_checkpoint():
    """A layer after the mixed one that runs again would see the masks as they were."""
    layer, (lam, index), h, mask = Masked(), how(), torch.randn(N, L, requires_grad=True), torch.eye(N, L)
    first, options = nn.Tanh(), {"masks": {"mask": "attend"}, "mask_modules": [layer]}
    with (
        mix_hidden(first, lam, index, **options),
        pytest.raises(RuntimeError, match="Masked is called within a checkpointed part"),
    ):
        checkpoint(layer, first(h), mask, use_reentrant=False)
    with mix_hidden(first, lam, index, **options):
        joined = checkpoint(layer, first(h), mask, use_reentrant=False, context_fn=mix_hidden.context_fn)[0]
    assert joined.sum() == 6


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_block_inside_the_checkpointed_function(use_reentrant):
    layer, x, (lam, index) = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), torch.randn(N, 6), how()
    x.requires_grad_()

    def part(x):
        with mix_hidden(layer[1], lam, index):
            return layer(x)

    g = torch.randn(N, 5)
    out = checkpoint(part, x, use_reentrant=use_reentrant)
    (actual,) = [t.grad for t in backward(out, (x,), g)]
    (expected,) = torch.autograd.grad(layer[1](plain(layer[0](x), lam, index)), (x,), g)
    same(actual, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_a_checkpoint_that_opens_the_block_again(inside):
    """With its context_fn; two batches whose graphs live at once, backward within the block or after it."""
    model, x = Checkpointed(use_reentrant=False, context_fn=mix_hidden.context_fn), torch.randn(N, 6)
    lam, index = how()
    lam.requires_grad_()
    leaves, out = tuple(model.parameters()), []
    with contextlib.ExitStack() as blocks:
        for share in (lam, lam.flip(0)):
            with contextlib.ExitStack() as block:
                block.enter_context(mix_hidden(model.middle[1], share, index))
                block.enter_context(mix_hidden(model.first, 0.5, index))
                out.append(model(x))
                if inside:
                    blocks.push(block.pop_all())
            if inside:  # the second batch is mixed by the first one's lambda as well
                break
        g = torch.randn(N, CLASSES)
        actual = torch.autograd.grad(sum((k + 1) * t for k, t in enumerate(out)), (*leaves, lam), g)
        assert hooks(model) == 2 * inside
    assert not hooks(model)

    def expected(share):
        h = model.first(plain(x, torch.tensor([0.5]), index))
        return model.last(model.middle[1](plain(model.middle[0](h), share, index)))

    wanted = expected(lam) if inside else expected(lam) + 2 * expected(lam.flip(0))
    same(actual, torch.autograd.grad(wanted, (*leaves, lam), g))


def test_a_checkpoint_within_a_repeated_one_needs_the_same():
    """The inner part is run again after the outer one's block has been closed again."""
    layer, x, (lam, index) = nn.Linear(6, 6), torch.randn(N, 6, requires_grad=True), how()
    again = {"use_reentrant": False, "context_fn": mix_hidden.context_fn}

    def outer(inner):
        return checkpoint(lambda h: checkpoint(layer, h.tanh(), **inner), x, **again)

    last = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    with mix_hidden(layer, lam, index), pytest.raises(RuntimeError, match="within a checkpointed part"):
        outer({"use_reentrant": False})
    for use_reentrant in (False, True):  # what follows the inner one would run again on a state that is not mixed
        with mix_hidden(layer, lam, index), pytest.raises(RuntimeError, match="within a checkpointed part"):
            checkpoint(lambda h: checkpoint(layer, h, **again).tanh(), x, use_reentrant=use_reentrant)
    with mix_hidden(layer, lam, index):
        out = outer(again)
        with pytest.raises(RuntimeError, match="within a checkpointed part"):  # nor does one that is told speak for the next
            checkpoint(layer, x, use_reentrant=False)
        further = checkpoint(lambda h: last(checkpoint(layer, h.tanh(), **again)), x, **again)
    assert not hooks(layer)
    g, expected = torch.randn(N, 6), layer(plain(x.tanh(), lam, index))
    leaves = x, layer.weight
    same(torch.autograd.grad(out, leaves, g), torch.autograd.grad(expected, leaves, g, retain_graph=True))
    same(torch.autograd.grad(further, leaves, g), torch.autograd.grad(last(expected), leaves, g))
    assert not hooks(layer)


def test_a_second_backward_over_a_retained_graph():
    """Each opens the block again."""
    model, x, (lam, index) = Checkpointed(use_reentrant=False, context_fn=mix_hidden.context_fn), torch.randn(N, 6), how()
    lam.requires_grad_()
    with mix_hidden(model.middle[1], lam, index):
        out = model(x)
    g, leaves = torch.randn(N, CLASSES), (lam, *model.parameters())
    first = torch.autograd.grad(out, leaves, g, retain_graph=True)
    assert not hooks(model)
    assert all(torch.equal(*both) for both in zip(torch.autograd.grad(out, leaves, g), first, strict=True))
    expected = model.last(model.middle[1](plain(model.middle[0](model.first(x)), lam, index)))
    same(first, torch.autograd.grad(expected, leaves, g))
    assert not hooks(model)


def test_a_checkpoint_without_gradients():
    """Nothing runs again: accepted with context_fn, but where a part around it does run again."""
    layer, x, (lam, index) = nn.Linear(6, 6), torch.randn(N, 6, requires_grad=True), how()
    again = {"use_reentrant": False, "context_fn": mix_hidden.context_fn}

    def part(h):
        with torch.no_grad():
            return checkpoint(layer, checkpoint(lambda h: checkpoint(layer, h, **again), h, **again), **again)

    with mix_hidden(layer, lam, index):
        out = part(x)
        with pytest.raises(RuntimeError, match="within a checkpointed part"):
            checkpoint(layer, x, use_reentrant=False)
    mixed = layer(plain(x, lam, index))
    same(out, layer(plain(mixed, lam, index)))
    for use_reentrant in (False, True):
        with mix_hidden(layer, lam, index), pytest.raises(RuntimeError, match="within a checkpointed part"):
            checkpoint(part, x, use_reentrant=use_reentrant)
    assert not hooks(layer)


# torch.compile


def program(model, **options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


@pytest.mark.slow
@pytest.mark.trap("ManifoldMixup#1")
@COMPILED
@pytest.mark.parametrize("masks", [None, PADDING])
def test_a_program_compiled_in_the_block(masks):
    """The same one serves every lambda, and another one the model without mixing."""
    model, (words, padding), (_, index) = Text(depth=2), sentences(), how()
    fast, programs = program(model)
    layer, counts = model.encoder.layers[1], []
    for _ in range(4):
        lam = torch.rand(N, requires_grad=True)
        with mix_hidden(layer, lam, index, masks=masks):
            out = fast(words, padding)
        with mix_hidden(layer, lam, index, masks=masks):
            expected = model(words, padding)
        same(out, expected)
        g = torch.randn_like(out)
        leaves = lam, model.embedding.weight
        same(torch.autograd.grad(out, leaves, g), torch.autograd.grad(expected, leaves, g))
        counts.append(programs.frame_count)
    assert counts[-1] == counts[1], counts
    same(fast(words, padding), model(words, padding))
    with (
        pytest.raises(RuntimeError, match="never called while it was open.*torch.compile"),
        mix_hidden(layer, lam, index),
    ):  # the program without it was made last, and looks for no hooks
        fast(words, padding)


@COMPILED
def test_a_compiled_keyword_argument():
    layer, h, (lam, index) = Named(), torch.randn(N, 6), how()
    fast, _ = program(layer)
    with mix_hidden(layer, lam, index):
        same(fast(other=h[:, :5], h=h, scale=2.0), layer(2.0, h, other=h[:, :5]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit itself
def test_torchscript_is_refused():
    (lam, index), x = how(), torch.randn(N, 6)
    scripted = mix_hidden(list(torch.jit.script(stack()).children())[2], lam, index)
    with pytest.raises(RuntimeError, match="not supported on ScriptModules"), scripted:
        pass
    traced = torch.jit.trace(stack(), x)
    with (
        pytest.raises(RuntimeError, match="torch.compile or torch.jit.trace made"),
        mix_hidden(list(traced.children())[2], lam, index),
    ):
        traced(x)


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize("first", [1, None])
def test_programs_for_the_modules_of_manifold_mixup(first):
    """With the input among them programs have to look for hooks, as the docstring says."""
    assert "skip_nnmodule_hook_guards = False" in ManifoldMixup.__doc__
    model, x, y = stack(), torch.randn(N, 6), torch.randint(CLASSES, (N,))
    fast, programs = program(model)
    modules = [None if first is None else model[first], model[2], model[4]]
    manifold, twin = (ManifoldMixup(modules, 1.0, seed=5) for _ in range(2))
    for _ in range(12):
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=first is not None), manifold(x, y) as (mixed, _):
            out = fast(mixed)
        with twin(x, y) as (mixed, _):
            same(out, model(mixed))
    assert programs.frame_count <= 6


# DistributedDataParallel

DISTRIBUTED = """
import pathlib, sys
sys.path.insert(0, {root!r})
import torch
from torch import nn
import fastmix

folder, rank = pathlib.Path({folder!r}), int(sys.argv[1])
data = torch.load(folder / "data")
torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
model.load_state_dict(data["model"])
parallel = nn.parallel.DistributedDataParallel(model)
x, y, lam, index = (t.chunk(2)[rank] for t in data["batch"])
target = fastmix.Mix(lam, index).target(y)

def losses(lam):
    with fastmix.mix_hidden(model[2], lam, index):
        return fastmix.soft_cross_entropy(parallel(x), target, reduction="none")

results = []
for step in (lambda: losses(lam).mean(), *(
    lambda strategy=strategy: fastmix.adversarial_mixing_loss(losses, lam, step_size=0.5, strategy=strategy, model=parallel)
    for strategy in ("keep", "recompute")
)):
    parallel.zero_grad()
    step().backward(inputs=list(model.parameters()) if results else None)  # the plain loss, and the adversarial ones
    results.append([p.grad for p in model.parameters()])
if rank == 0:
    torch.save(results, folder / "results")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    """Two processes, each with half the batch and its own partners: gradients are the mean of theirs; the adversarial loss makes
    two and three passes for one backward."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, CLASSES))
    batch = torch.randn(8, 6), torch.randint(CLASSES, (8,)), torch.rand(8), torch.tensor([1, 2, 3, 0, 3, 2, 1, 0])
    torch.save({"model": model.state_dict(), "batch": batch}, tmp_path / "data")
    code = DISTRIBUTED.format(root=str(ROOT), folder=str(tmp_path))
    ran = [subprocess.Popen([sys.executable, "-c", code, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in ran]
    assert [process.returncode for process in ran] == [0, 0], errors
    results = torch.load(tmp_path / "results")
    parameters = tuple(model.parameters())

    def halves(step):
        gradients = []
        for x, y, lam, index in zip(*(t.chunk(2) for t in batch), strict=True):
            target = Mix(lam, index).target(y)

            def losses(lam, x=x, index=index, target=target):
                with mix_hidden(model[2], lam, index):
                    return fastmix.soft_cross_entropy(model(x), target, reduction="none")

            gradients.append(torch.autograd.grad(step(losses, lam), parameters))
        return [(a + b) / 2 for a, b in zip(*gradients, strict=True)]

    same(results[0], halves(lambda losses, lam: losses(lam).mean()))
    for found, strategy in zip(results[1:], ("keep", "recompute"), strict=True):

        def amp(losses, lam, strategy=strategy):
            return fastmix.adversarial_mixing_loss(losses, lam, step_size=0.5, strategy=strategy)

        same(found, halves(amp))


# ManifoldMixup


def test_manifold_mixup_mixes_one_module_of_a_batch():
    model, x, y = stack(), torch.randn(N, 6), torch.randint(CLASSES, (N,))
    modules = ["input", model[2], model[4]]
    manifold, twin = (ManifoldMixup(modules, 2.0, seed=3) for _ in range(2))
    seen = set()
    for _ in range(12):
        m, module = twin.sample(x, y), twin.choose()
        with manifold(x, y) as (mixed, target):
            assert hooks(model) == (module is not None)
            out = model(mixed)
        assert torch.equal(mixed, x) == (module is not None)
        at = {None: 0, model[2]: 2, model[4]: 4}[module]
        same(out, model[at:](plain(model[:at](x), m.lam, m.index)))
        assert torch.equal(target.weights, m.target(y).weights)
        assert torch.equal(target.classes, m.target(y).classes)
        seen.add(module)
    assert seen == {None, model[2], model[4]}
    assert not hooks(model)


def test_manifold_mixup_in_eval_mode():
    model, x, y = stack(), torch.randn(N, 6), torch.randint(CLASSES, (N,))
    manifold = ManifoldMixup([model[2]], 1.0, seed=0).eval()
    before = manifold.state_dict()
    with manifold(x, y) as (mixed, target):  # nor must the model be called
        assert mixed is x
        assert target is y
        assert not hooks(model)
    same(dict(manifold.state_dict()), dict(before))
    manifold.train()
    with pytest.raises(RuntimeError, match="nothing was mixed there: Linear"), manifold(x, y):
        pass


def test_each_module_is_as_likely():
    modules = [nn.Tanh() for _ in range(4)]
    manifold = ManifoldMixup([None, *modules], 1.0, seed=0)
    drawn = [manifold.choose() for _ in range(2000)]
    counts = torch.tensor([sum(d is m for d in drawn) for m in [None, *modules]])
    assert counts.sum() == 2000
    assert ((counts - 400).abs() < 90).all(), counts  # five standard deviations


def test_manifold_mixup_is_reproducible():
    """By its seed, its state, a copy, a generator of the call, or torch's."""
    model, x = stack(), torch.randn(N, 6)
    modules = [None, *model]

    def draws(manifold, count=20, **options):
        found = [(manifold.sample(x, **options), manifold.choose(**options)) for _ in range(count)]
        return [(m.lam.tolist(), m.index.tolist(), None if c is None else manifold.layers.index(c)) for m, c in found]

    first = ManifoldMixup(modules, 1.0, seed=1)
    drawn = draws(first)
    assert drawn == draws(ManifoldMixup(modules, 1.0, seed=1))
    assert drawn != draws(ManifoldMixup(modules, 1.0, seed=2))
    other = ManifoldMixup(modules, 1.0, seed=1)
    other.load_state_dict(first.state_dict())  # how far the stream has gone: another seed would go on along its own
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first)), other):
        assert draws(twin) == draws(copy.deepcopy(first))
    assert draws(first) != drawn
    for _ in range(2):
        unseeded = ManifoldMixup(modules, 1.0)
        given = draws(unseeded, generator=torch.Generator().manual_seed(0))
        assert given == draws(ManifoldMixup(modules, 1.0, seed=4), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(3)
        drawn = draws(unseeded)
        torch.manual_seed(3)
        assert drawn == draws(unseeded)
    assert not list(first.parameters())
    assert set(first.state_dict()) == {"_extra_state", "_host._extra_state"}


def test_the_module_is_drawn_apart_from_the_mix():
    """Generators of the same seed for both would tie the partners to the module: the first row by their keys is drawn first."""
    modules, ties = [nn.Tanh() for _ in range(3)], 0
    for seed in range(300):
        manifold = ManifoldMixup(modules, 1.0, seed=seed)
        keys, _ = draws.row_keys(manifold._own_state(torch.device("cpu")), 3, 0, torch.zeros(3, 1))
        ties += int(keys.argmin()) == manifold.layers.index(manifold.choose())
    assert 60 < ties < 140  # five standard deviations


def test_manifold_mixup_of_sentences():
    """Words are int64: drawn for, and mixed at a layer; masks are joined from there on, at the input in every layer."""
    model, (words, padding), y = Text(), sentences(), torch.randint(CLASSES, (N,))
    layers = model.encoder.layers
    options = {"masks": PADDING, "mask_modules": layers}
    manifold, twin = (ManifoldMixup([layers[1], layers[3], model.encoder], 1.0, seed=0, **options) for _ in range(2))
    seen = set()
    for _ in range(20):
        m, module = twin.sample(words, y), twin.choose()
        with manifold(words, y) as (same_words, target):
            out = model(same_words, padding)
        mask_modules = layers[1:] if module is layers[1] else layers[3:] if module is layers[3] else layers
        with mix_hidden(module, m, masks=PADDING, mask_modules=mask_modules):
            same(out, model(words, padding))
        assert same_words is words
        seen.add(module)
    assert len(seen) == 3
    manifold = ManifoldMixup(["input"], 1.0, seed=0, masks={"mask": "attend"}, mask_modules=[layer := Masked()])
    with manifold(torch.randn(N, 6), y) as (mixed, _):
        assert layer(mixed, torch.eye(N))[0].sum() == 2 * N


@pytest.mark.parametrize(
    ("modules", "options", "error", "message"),
    [
        (nn.Tanh(), {}, TypeError, "modules: expected a sequence"),
        ([], {}, TypeError, "modules: expected a sequence"),
        ([nn.Tanh(), "layer"], {}, TypeError, "modules: expected an nn.Module"),
        ([nn.Tanh(), None, None], {}, ValueError, "modules: expected None once"),
        ([nn.Tanh()], {"seed": 1.5}, TypeError, "seed: expected an int"),
        ([nn.Tanh()], {"per": "image"}, ValueError, "per: expected"),
        ([nn.Tanh()], {"dim": -1}, ValueError, "dim: expected"),
        ([nn.Tanh()], {"masks": {"mask": "ignore"}}, ValueError, "names of arguments of Tanh.forward"),
        ([None, Masked()], {"masks": {"mask": "ignore"}}, ValueError, "mask_modules: expected modules"),
    ],
)
def test_bad_options(modules, options, error, message):
    with pytest.raises(error, match=message):
        ManifoldMixup(modules, 1.0, **options)


def test_bad_batches():
    model, x, y = stack(), torch.randn(N, 6), torch.randint(CLASSES, (N,))
    manifold = ManifoldMixup([None, model[2]], 1.0, seed=0)
    with pytest.raises(ValueError, match="y: expected 4 rows"):
        manifold(x, y[:3])
    with pytest.raises(TypeError, match="y: expected int64"):
        manifold(x, None)
    for _ in range(5):  # whichever is drawn
        with pytest.raises(TypeError, match="x: expected a float16"):
            manifold(y, y)
    same_class = ManifoldMixup([model[2]], 1.0, partner="same", seed=0)
    with same_class(x, torch.tensor([0, 0, 1, 1])) as (_, target):
        model(x)
    assert (target.classes[:, 0] == target.classes[:, 1]).all()
