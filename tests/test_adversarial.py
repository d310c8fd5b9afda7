"""The adversarial mixing loss against the paper's algorithm in plain torch expressions, what its passes leave behind, and what
the pass for the gradient of lambda computes."""

import copy
import functools
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close as same
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastmix
from fastmix import Mix, MixedRows, MovingAverageReweight, SoftTarget, _backend, adversarial_mixing_loss, mix_hidden
from fastmix.bench import bench_adversarial

COMPILED = pytest.mark.no_poison  # torch.compile does not trace through poisoned memory
C, DOUBLE = 3, torch.float64
STRATEGIES = pytest.mark.parametrize("strategy", ["keep", "recompute"])


# The paper, by expressions that autograd differentiates


def plain_mix(h, lam, index):
    lam = lam.reshape(-1, *[1] * (h.dim() - 1))
    return lam * h + (1 - lam) * h[index]


def plain_loss(logits, y, lam, index):
    """Cross-entropies of both labels, weighed by the lambda that was drawn, [N]."""
    logs = -torch.log_softmax(logits, 1)
    return lam * logs[range(len(y)), y] + (1 - lam) * logs[range(len(y)), y[index]]


def paper(losses, lam, step_size, max_step=None, clamp=True, gradient="sample", strategy="keep", weights=None):
    """(loss, lambda of the second pass, increases)"""
    lam = lam.detach().clone().requires_grad_()
    rand = losses(lam)
    (g,) = torch.autograd.grad(rand.mean() if gradient == "mean" else rand.sum(), lam, retain_graph=True)
    step = step_size * g
    if max_step is not None:
        step = torch.minimum(torch.maximum(step, torch.tensor(-max_step)), torch.tensor(max_step))
    moved = lam.detach() + step
    if clamp:
        moved = moved.clamp(0.0, 1.0)
    worse = losses(moved)
    if strategy == "recompute":
        kept = losses(torch.where(worse > rand, moved, lam.detach()))
    else:
        kept = torch.maximum(worse, rand)
    w = 1.0 if weights is None else weights((worse - rand).detach())
    return (w * kept).mean(), moved, (worse - rand).detach()


def paper_weights(history, increases, window=5):
    """The authors' moving average over the last increases, one number after the other."""
    history.append([d for d in increases.tolist() if d > 0])
    recent = [d for past in history[-window:] for d in past]
    if len(recent) < 2:
        return torch.ones_like(increases)
    mean, std = statistics.mean(recent), statistics.stdev(recent)
    return torch.tensor([1 + (d - mean) / std if d > mean else 1.0 for d in increases.tolist()], dtype=increases.dtype)


def batch(N=5, device="cpu", dtype=DOUBLE):
    """x, y, lam with both ends in it, an index with repeated partners"""
    lam = torch.rand(N, dtype=dtype)
    lam[:2] = torch.tensor([1.0, 0.0])[: len(lam[:2])]
    return tuple(
        t.to(device) for t in (torch.randn(N, 6, dtype=dtype), torch.randint(C, (N,)), lam, torch.randint(max(N, 1), (N,))[:N])
    )


def network(device="cpu", dtype=DOUBLE, norm=False, dropout=0.0):
    layers = [nn.Linear(6, 7), nn.BatchNorm1d(7) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, C)]
    return nn.Sequential(*layers).to(device, dtype)


class Problem:
    """A batch and a model, as losses of lambda by fastmix (`ours`) and by expressions (`plain`), mixed at some of the layers."""

    def __init__(self, places=(0,), N=5, device="cpu", dtype=DOUBLE, **options):
        self.model = network(device, dtype, **options)
        self.x, self.y, self.lam, self.index = batch(N, device, dtype)
        self.places, self.given = places, []
        self.target = Mix(self.lam, self.index).target(self.y)
        self.parameters = tuple(self.model.parameters())

    def ours(self, lam):
        self.given.append(lam.detach().clone())
        with mix_hidden([self.model[k] for k in self.places], lam, self.index):
            logits = self.model(self.x)
        return fastmix.soft_cross_entropy(logits, self.target, reduction="none")

    def plain(self, lam):
        h = self.x
        for k, layer in enumerate(self.model):
            h = layer(plain_mix(h, lam, self.index) if k in self.places else h)
        return plain_loss(h, self.y, self.lam, self.index)

    def gradients(self, loss):
        return torch.autograd.grad(loss, self.parameters)


# Values and gradients


@pytest.mark.trap("batch-norm-recomputed")
@STRATEGIES
@pytest.mark.parametrize("places", [(0,), (2,), (4,), (0, 2, 4)])
def test_against_the_paper(places, strategy, device):
    """Mixed at the input, in a hidden layer, or at several by the same lambda, whose gradient then comes by all ways."""
    problem = Problem(places, device=device)
    loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.7, strategy=strategy)
    expected, moved, _ = paper(problem.plain, problem.lam, 0.7, strategy=strategy)
    assert loss.dtype == DOUBLE
    same(problem.given[0], problem.lam)
    same(problem.given[1], moved)
    assert (moved != problem.lam).sum() >= 3
    same(loss, expected)
    same(problem.gradients(loss), problem.gradients(expected))


@STRATEGIES
@pytest.mark.parametrize("gradient", ["sample", "mean"])
@pytest.mark.parametrize(
    ("step_size", "max_step", "clamp"), [(3.0, 0.1, True), (3.0, None, False), (50.0, None, True), (9.0, 0.0, True)]
)
def test_steps(gradient, step_size, max_step, clamp, strategy):
    problem = Problem((2,), N=7)
    options = {"max_step": max_step, "clamp": clamp, "gradient": gradient, "strategy": strategy}
    loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=step_size, **options)
    expected, moved, _ = paper(problem.plain, problem.lam, step_size, **options)
    same(problem.given[1], moved)
    same(loss, expected)
    same(problem.gradients(loss), problem.gradients(expected))
    assert bool(((moved >= 0) & (moved <= 1)).all()) == (clamp or gradient == "mean")  # whose steps are too small


@pytest.mark.trap("batch-norm-recomputed")
def test_rows_that_meet_in_a_batch_norm():
    """The kept graphs are the loss that is defined; a pass at the kept lambdas is another one there, as the docstring says."""
    problem = Problem((0,), N=9, norm=True)
    expected, _, increases = paper(problem.plain, problem.lam, 5.0)
    assert 0 < (increases > 0).sum() < 9
    again = paper(problem.plain, problem.lam, 5.0, strategy="recompute")[0]
    kept, repeated = (
        adversarial_mixing_loss(problem.ours, problem.lam, step_size=5.0, strategy=strategy, model=problem.model)
        for strategy in ("keep", "recompute")
    )
    same(kept, expected)
    same(repeated, again)
    same(problem.gradients(kept), problem.gradients(expected))
    same(problem.gradients(repeated), problem.gradients(again))
    assert abs(kept - repeated) > 1e-6
    assert "not under batch normalisation" in " ".join(adversarial_mixing_loss.__doc__.split())


@STRATEGIES
def test_reweighted_over_steps(strategy):
    problem, history = Problem((2,), N=6), []
    reweight = MovingAverageReweight(window=3)
    used = []
    for _ in range(7):
        problem.x, problem.y, problem.lam, problem.index = batch(6)
        problem.target = Mix(problem.lam, problem.index).target(problem.y)
        loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=1.0, reweight=reweight, strategy=strategy)

        def weights(increases):
            used.append(paper_weights(history, increases, 3))
            return used[-1]

        expected, *_ = paper(problem.plain, problem.lam, 1.0, strategy=strategy, weights=weights)
        same(loss, expected)
        same(problem.gradients(loss), problem.gradients(expected))
    assert sum(bool((w > 1).any()) for w in used) > 3


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=DOUBLE)], ids=["float", "float32", "float64"])
@STRATEGIES
@pytest.mark.parametrize("gradient", ["sample", "mean"])
def test_one_lambda_for_the_batch(lam, gradient, strategy):
    problem = Problem((2,))
    problem.lam = torch.tensor(float(lam), dtype=DOUBLE)
    problem.target = Mix(problem.lam, problem.index).target(problem.y)
    loss = adversarial_mixing_loss(problem.ours, lam, step_size=0.5, gradient=gradient, strategy=strategy)
    expected, moved, _ = paper(problem.plain, problem.lam, 0.5, gradient=gradient, strategy=strategy)
    assert problem.given[0].dim() == problem.given[1].dim() == 0
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if problem.given[0].dtype == torch.float32 else {}
    same(problem.given[1].double(), moved, **tolerance)
    same(loss, expected, **tolerance)
    same(problem.gradients(loss), problem.gradients(expected), **tolerance)


def test_a_lambda_on_the_host_does_not_widen_the_losses():
    """Expressions of one's own promote; and the last pass has a lambda for each row."""
    x, index, weight = torch.randn(4, 3), torch.tensor([1, 2, 3, 0]), torch.randn(3, requires_grad=True)
    given = []

    def losses(lam):
        given.append(lam)
        return (plain_mix(x, lam, index) @ weight).square()

    assert adversarial_mixing_loss(losses, 0.4, step_size=0.1, strategy="recompute").dtype == torch.float32
    assert given[2].dtype == torch.float32
    assert given[2].shape == (4,)


def test_words_and_sentences():
    """lambda in the embedded words (joined masks), in a middle layer, and in the sentences."""
    embedding, layer = nn.Embedding(9, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    head = nn.Linear(4, C)
    model = nn.ModuleList([embedding, encoder, head]).double()
    words, padding = torch.randint(9, (5, 6)), torch.arange(6) >= torch.tensor([6, 2, 3, 5, 1])[:, None]
    _, y, _, index = batch()
    lam = torch.tensor([0.9, 0.3, 0.6, 0.2, 0.5], dtype=DOUBLE)
    target, joined = Mix(lam, index).target(y), padding & padding[index]
    masks = {"src_key_padding_mask": "ignore"}

    def through(h, lam, at):
        mask = padding
        for k, module in enumerate((*encoder.layers, head)):
            h = h.mean(1) if module is head else h
            if k == at:
                h, mask = plain_mix(h, lam, index), joined
            h = module(h) if module is head else module(h, src_key_padding_mask=mask)
        return plain_loss(h, y, lam_drawn, index)

    lam_drawn = lam
    for at, module in enumerate((encoder, encoder.layers[1], head)):
        options = {} if module is head else {"masks": masks}

        def losses(lam, module=module, options=options):
            with mix_hidden(module, lam, index, **options):
                logits = head(encoder(embedding(words), src_key_padding_mask=padding).mean(1))
            return fastmix.soft_cross_entropy(logits, target, reduction="none")

        loss = adversarial_mixing_loss(losses, lam, step_size=0.4)
        expected, *_ = paper(lambda lam, at=at: through(embedding(words), lam, at), lam, 0.4)
        same(loss, expected)
        same(torch.autograd.grad(loss, embedding.weight), torch.autograd.grad(expected, embedding.weight))
    assert len(list(model.parameters())) > 10


def test_a_lambda_that_requires_grad():
    """The losses see a lambda of their own: the labels' weights are not moved, nor does the step go by them."""
    problem = Problem((2,))
    expected, moved, _ = paper(problem.plain, problem.lam, 0.7)
    lam = problem.lam.clone().requires_grad_()
    problem.target = Mix(lam, problem.index).target(problem.y)
    loss = adversarial_mixing_loss(problem.ours, lam, step_size=0.7)
    same(problem.given[1], moved)
    same(loss, expected)


# What the step to lambda computes


@pytest.fixture
def asked(monkeypatch, device):
    """What the backends' backwards are asked to form: [(name, need, ...)]."""
    calls, backend = [], _backend.of(torch.zeros((), device=device))

    def record(name, needs):
        original = getattr(backend, name)

        def asked(*args):
            calls.append((name, *needs(args)))
            return original(*args)

        monkeypatch.setattr(backend, name, asked)

    record("mix_bwd", lambda args: args[6:8])
    record("mix_masked_bwd", lambda args: args[7:9])
    record("convex_combination_bwd", lambda args: args[4:6])
    record("soft_ce_bwd", lambda args: ())
    record("dense_ce_bwd", lambda args: args[9])
    return calls


@STRATEGIES
def test_the_step_forms_the_gradient_of_lambda_alone(asked, strategy, device, monkeypatch):
    """One product for each layer above the mixing point, none for a weight, nothing below; the loss's backward forms all."""
    problem, original, names = Problem((2,), device=device), torch.autograd.grad, []

    def profiled(*args, **options):
        with torch.profiler.profile() as profile:
            gradients = original(*args, **options)
        names.extend(event.name for event in profile.events())
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", profiled)
    loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5, strategy=strategy)
    assert names.count("aten::mm") == 1
    assert names.count("aten::tanh_backward") == 1
    assert not {"aten::addmm", "torch::autograd::AccumulateGrad"} & set(names)
    assert asked == [("soft_ce_bwd",), ("mix_bwd", False, True)]
    asked.clear()
    loss.backward()
    formed = [call[0] for call in asked]
    assert formed.count("mix_bwd") == formed.count("soft_ce_bwd") == (2 if strategy == "keep" else 1)
    assert all(call[1] for call in asked if call[0] == "mix_bwd")


def test_a_backward_to_the_parameters_stops_above_the_images(asked, device):
    """Without `inputs` the first graph goes on to lambda, and so the first layer has to form a gradient to what was mixed."""
    problem, formed = Problem((0,), device=device), {}
    for name, options in (("all", {}), ("parameters", {"inputs": problem.parameters})):
        loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5)
        asked.clear()
        loss.backward(**options)
        formed[name] = [call for call in asked if call[0] == "mix_bwd"]
    assert formed == {"all": [("mix_bwd", False, True)], "parameters": []}


def test_mixed_twice_the_later_point_passes_on(asked, device):
    problem = Problem((0, 4), device=device)
    adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5)
    assert asked == [("soft_ce_bwd",), ("mix_bwd", True, True), ("mix_bwd", False, True)]


@pytest.mark.slow_interpreted
def test_a_backward_forms_what_it_is_asked_for(asked, device):
    """Of every Function, over one retained graph: for one input, for the other, for both."""
    N = 4
    x = torch.randn(N, 2, 4, 4, dtype=DOUBLE, device=device, requires_grad=True)
    logits = torch.randn(N, C, dtype=DOUBLE, device=device, requires_grad=True)
    lam = torch.rand(N, dtype=DOUBLE, device=device, requires_grad=True)
    index = torch.tensor([1, 2, 3, 0], device=device)
    mask = torch.rand(N, 2, 2, dtype=DOUBLE, device=device, requires_grad=True)
    weights = torch.rand(N, 2, dtype=DOUBLE, device=device, requires_grad=True)
    dense = torch.rand(N, C, dtype=DOUBLE, device=device, requires_grad=True)
    classes = torch.randint(C, (N, 2), device=device)
    other = x.detach().clone().requires_grad_()
    for out, first, second, formed in (
        (fastmix.mix(x, lam, index), x, lam, [(True, False), (False, True), (True, True)]),
        (fastmix.mix_masked(x, mask, index), x, mask, [(True, False), (False, True), (True, True)]),
        (
            fastmix.convex_combination((x, other), weights),
            x,
            weights,
            [((True, False), False), ((False, False), True), ((True, False), True)],
        ),
        (
            fastmix.convex_combination((x, other), weights),
            other,
            weights,
            [((False, True), False), ((False, False), True), ((False, True), True)],
        ),
        (fastmix.soft_cross_entropy(logits, dense), logits, dense, [(True, False), (False, True), (True, True)]),
        (fastmix.soft_cross_entropy(logits, SoftTarget(classes, weights)), logits, weights, [(), None, ()]),
    ):
        asked.clear()
        g = torch.randn_like(out)
        both = torch.autograd.grad(out, (first, second), g, retain_graph=True)
        alone = [torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for leaf in (first, second)]
        again = torch.autograd.grad(out, (first, second), g, retain_graph=True)
        same(both, again)
        same(tuple(alone), both)
        first.grad = second.grad = None
        out.backward(g, inputs=[second], retain_graph=True)
        same(second.grad, both[1])
        assert first.grad is None
        out.backward(g)
        same(second.grad, 2 * both[1])
        same(first.grad, both[0])
        one, two, all_ = formed
        expected = [all_, one, two, all_, two]
        found = [call[1:] for call in asked]
        assert found[:-1] == [tuple(need) for need in expected if need is not None]


@pytest.mark.slow
def test_how_much_a_step_computes():
    """Products of a whole step over those of a plain mixup step, counted: 7/3 and 2 but for the first layer's own gradient to its
    images; the authors' scheme 8/3."""
    lam, index = torch.rand(4), torch.tensor([1, 0, 3, 2])
    for build in (bench_adversarial.convolutional, bench_adversarial.Text):
        model, counts = build(10), {}
        x = torch.randint(bench_adversarial.WORDS, (4, 8)) if build is bench_adversarial.Text else torch.randn(4, 3, 16, 16)
        for name, way in bench_adversarial.WAYS.items():
            with FlopCounterMode(display=False) as counter:
                way(model, x, torch.arange(4), Mix(lam, index)).backward()
            counts[name] = counter.get_total_flops()
        ratios = {name: count / counts["plain step"] for name, count in counts.items()}
        assert 2.3 < ratios["fastmix"] < 2.4, ratios
        assert 1.9 < ratios["fastmix, recompute"] < 2.1, ratios
        assert 2.6 < ratios["authors' scheme"] < 2.75, ratios


# What passes leave behind


@STRATEGIES
def test_dropout_and_random_numbers(strategy):
    """Every pass draws the same masks; afterwards the generator stands as after one, also where the next one fails."""
    problem = Problem((2,), dropout=0.5)
    state = torch.get_rng_state()
    rows = problem.plain(problem.lam)
    after = torch.get_rng_state()
    assert not torch.equal(after, state)
    seen = []

    def losses(lam):
        seen.append(problem.ours(lam))
        return seen[-1]

    torch.set_rng_state(state)
    loss = adversarial_mixing_loss(losses, problem.lam, step_size=0.0, strategy=strategy)
    assert torch.equal(torch.get_rng_state(), after)
    same(seen[0], rows)
    assert all(torch.equal(t, seen[0]) for t in seen)  # a step of 0 changes nothing at all
    same(loss, rows.mean())

    def fails(lam):
        if seen:  # before anything is drawn
            raise KeyError
        seen.append(problem.ours(lam))
        return seen[-1]

    seen.clear()
    torch.set_rng_state(state)
    with pytest.raises(KeyError):
        adversarial_mixing_loss(fails, problem.lam, step_size=0.5, strategy=strategy)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.gpu
@STRATEGIES
def test_random_numbers_of_a_gpu(strategy):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    problem = Problem((2,), device="cuda", dropout=0.5)
    for lam in (problem.lam, 0.5):
        torch.manual_seed(0)
        problem.plain(torch.as_tensor(lam))
        after = torch.cuda.get_rng_state()
        torch.manual_seed(0)
        adversarial_mixing_loss(problem.ours, lam, step_size=0.0, strategy=strategy)
        assert torch.equal(torch.cuda.get_rng_state(), after)


@STRATEGIES
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, lambda n: nn.BatchNorm1d(n, momentum=None), lambda n: nn.BatchNorm1d(n, track_running_stats=False)])  # fmt: skip
def test_statistics_move_once(strategy, norm):
    problem = Problem((0,))
    problem.model[1] = norm(7).double()
    problem.parameters = tuple(problem.model.parameters())
    once = copy.deepcopy(problem.model)
    buffers = dict(problem.model.named_buffers())
    for _ in range(2):
        adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5, strategy=strategy, model=problem.model).backward()
        model, problem.model = problem.model, once
        problem.plain(problem.lam)
        problem.model = model
    same(model.state_dict(), once.state_dict())
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    before = copy.deepcopy(model.state_dict())

    def fails(lam):
        problem.ours(lam)
        raise KeyError

    with pytest.raises(KeyError):
        adversarial_mixing_loss(fails, problem.lam, step_size=0.5, strategy=strategy, model=model)
    same(model.state_dict(), before)
    model.eval()
    adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5, strategy=strategy, model=model)
    same(model.state_dict(), before)


def test_instance_norm_and_a_frozen_norm():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, C)
    )
    model[2].eval()
    once, x, lam, index = copy.deepcopy(model), torch.randn(4, 2, 6), torch.rand(4), torch.tensor([1, 2, 3, 0])

    def losses(lam):
        return model(fastmix.mix(x, lam, index)).square().sum(1)

    adversarial_mixing_loss(losses, lam, step_size=0.5, model=model)
    once(fastmix.mix(x, lam, index))
    same(model.state_dict(), once.state_dict())


@STRATEGIES
def test_gradients_accumulate_and_scale(strategy):
    """.grad is touched by the backward of the loss alone; a GradScaler's factor goes through."""
    problem = Problem((2,), dtype=torch.float32)
    options = {"step_size": 0.5, "strategy": strategy}
    expected = problem.gradients(adversarial_mixing_loss(problem.ours, problem.lam, **options))
    for p in problem.parameters:
        p.grad = torch.ones_like(p)
    loss = adversarial_mixing_loss(problem.ours, problem.lam, **options)
    assert all(bool((p.grad == 1).all()) for p in problem.parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss).backward()
    same([(p.grad - 1) / 4 for p in problem.parameters], list(expected))


@STRATEGIES
def test_a_checkpointed_model(strategy):
    """Run again for the step to lambda and for the backward, with the dropout of the first pass; the reentrant kind is refused."""
    problem = Problem((), dropout=0.5)

    def losses(lam, **options):
        mixed = fastmix.mix(problem.x, lam, problem.index)
        logits = checkpoint(problem.model, mixed, **options) if options else problem.model(mixed)
        return fastmix.soft_cross_entropy(logits, problem.target, reduction="none")

    found = []
    for options in ({}, {"use_reentrant": False}):
        torch.manual_seed(0)
        step = functools.partial(losses, **options)
        loss = adversarial_mixing_loss(step, problem.lam, step_size=0.5, strategy=strategy)
        found.append((loss, problem.gradients(loss)))
    same(*found)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        adversarial_mixing_loss(functools.partial(losses, use_reentrant=True), problem.lam, step_size=0.5, strategy=strategy)


@STRATEGIES
def test_a_checkpointed_part_that_is_mixed_inside(strategy):
    """Run again for the step to lambda, and in the backward for each kept graph; not in a pass without one."""
    problem, found = Problem((2,), dropout=0.5), []
    for options in ({}, {"use_reentrant": False, "context_fn": mix_hidden.context_fn}):

        def losses(lam, options=options):
            with mix_hidden(problem.model[2], lam, problem.index):
                logits = checkpoint(problem.model, problem.x, **options) if options else problem.model(problem.x)
            return fastmix.soft_cross_entropy(logits, problem.target, reduction="none")

        torch.manual_seed(0)
        loss = adversarial_mixing_loss(losses, problem.lam, step_size=0.5, strategy=strategy)
        found.append((loss, problem.gradients(loss)))
    same(*found, rtol=0, atol=0)


@pytest.mark.parametrize(("strategy", "again"), [("keep", 2), ("recompute", 1)])
def test_statistics_of_a_checkpointed_model(strategy, again):
    """They move once more for each pass that the loss's backward runs again, as the docstring says; not for the step to lambda."""
    problem = Problem(norm=True)

    def losses(lam):
        logits = checkpoint(problem.model, fastmix.mix(problem.x, lam, problem.index), use_reentrant=False)
        return fastmix.soft_cross_entropy(logits, problem.target, reduction="none")

    loss = adversarial_mixing_loss(losses, problem.lam, step_size=0.5, strategy=strategy, model=problem.model)
    assert problem.model[1].num_batches_tracked == 1
    loss.backward()
    assert problem.model[1].num_batches_tracked == 1 + again


@STRATEGIES
@pytest.mark.parametrize("outside", [False, True])
def test_autocast(strategy, outside):
    """Around the call or within the losses: the same gradients. (A cast that autocast caches without a graph would lose some.)"""
    problem = Problem((2,), dtype=torch.float32)
    low = torch.autocast("cpu", torch.bfloat16)

    def inside(lam):
        with low:
            return problem.ours(lam)

    if outside:
        with low:
            loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5, strategy=strategy)
    else:
        loss = adversarial_mixing_loss(inside, problem.lam, step_size=0.5, strategy=strategy)
    assert loss.dtype == torch.float32
    expected, moved, _ = paper(problem.plain, problem.lam, 0.5, strategy=strategy)
    close = {"rtol": 0.05, "atol": 0.02}
    same(problem.given[1], moved, **close)
    same(loss, expected, **close)
    same(problem.gradients(loss), problem.gradients(expected), **close)


def test_a_gradient_too_small_for_float16(device):
    """1e-8 of a float16 activation is 0; the step is scaled on the way and unscaled in float32."""
    x = torch.randn(4, 6, device=device, dtype=torch.float16)
    lam, index, given = torch.rand(4, device=device), torch.tensor([1, 2, 3, 0], device=device), []
    weight = torch.linspace(0.5, 1, 6, device=device)

    def losses(lam):
        given.append(lam.detach())
        return 1e-8 * (fastmix.mix(x, lam, index).float() @ weight)

    adversarial_mixing_loss(losses, lam, step_size=1e6, clamp=False)
    g = 1e-8 * ((x - x[index]).float() @ weight)
    same(given[1] - given[0], 1e6 * g, rtol=1e-2, atol=1e-4)
    assert (given[1] != given[0]).all()


def test_a_float16_network_with_small_losses(device):
    """Losses over a count of 2**24: unscaled, the gradient to lambda is lost on its way through float16."""
    model, (x, y, lam, index) = network(device).half(), batch(16, device)
    x, lam, given = x.half(), lam.float(), []
    target = Mix(lam, index).target(y)

    def losses(lam):
        given.append(lam)
        return fastmix.soft_cross_entropy(model(fastmix.mix(x, lam, index)), target, reduction="none") / 2**24

    adversarial_mixing_loss(losses, lam, step_size=2.0**24, clamp=False)
    exact, wide = lam.double().requires_grad_(), copy.deepcopy(model).double()
    (g,) = torch.autograd.grad(plain_loss(wide(plain_mix(x.double(), exact, index)), y, exact.detach(), index).sum(), exact)
    same((given[1] - lam).double(), g, rtol=0, atol=0.01 * float(g.abs().max()))
    (unscaled,) = torch.autograd.grad(losses(lam.requires_grad_()).sum(), lam)
    assert (unscaled * 2**24 - g).abs().max() > 0.3 * g.abs().max()


def test_half_precision_losses_are_widened():
    problem = Problem((2,), dtype=torch.float32)
    assert adversarial_mixing_loss(lambda lam: problem.ours(lam).bfloat16(), problem.lam, step_size=0.5).dtype == torch.float32


@STRATEGIES
def test_without_gradients(strategy):
    """Under no_grad the loss is the same, and has no graph."""
    problem = Problem((2,))
    expected, *_ = paper(problem.plain, problem.lam, 0.5, strategy=strategy)
    with torch.no_grad():
        loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5, strategy=strategy)
    assert not loss.requires_grad
    same(loss, expected.detach())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="adversarial_mixing_loss: .*use torch.no_grad"):
        adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5, strategy=strategy)


@pytest.mark.slow
@COMPILED
@STRATEGIES
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that torch.compile looks for
def test_a_compiled_model(strategy):
    torch._dynamo.reset()
    problem = Problem((0,), norm=True, dropout=0.0)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(problem.model, backend=counter, fullgraph=True)

    def losses(lam):
        return fastmix.soft_cross_entropy(fast(fastmix.mix(problem.x, lam, problem.index)), problem.target, reduction="none")

    counts = []
    for _ in range(4):
        before = copy.deepcopy(problem.model.state_dict())
        expected, *_ = paper(problem.plain, problem.lam, 0.5, strategy=strategy)
        expected = expected, problem.gradients(expected)
        problem.model.load_state_dict(before)
        loss = adversarial_mixing_loss(losses, problem.lam, step_size=0.5, strategy=strategy, model=problem.model)
        same((loss, problem.gradients(loss)), expected)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1], counts


# The edges


@STRATEGIES
@pytest.mark.parametrize("N", [0, 1])
def test_few_rows(N, strategy):
    problem = Problem((2,), N=N)
    loss = adversarial_mixing_loss(
        problem.ours, problem.lam, step_size=0.5, strategy=strategy, reweight=MovingAverageReweight(), gradient="mean"
    )
    assert loss.shape == ()
    if N == 0:
        assert loss.isnan()
    else:
        same(loss, problem.plain(problem.lam).mean())  # its own partner: nothing to move


def test_lambdas_beyond_one():
    problem = Problem((2,))
    problem.lam = problem.lam * 3 - 1
    problem.target = Mix(problem.lam, problem.index).target(problem.y)
    loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5, clamp=False)
    expected, moved, _ = paper(problem.plain, problem.lam, 0.5, clamp=False)
    same(problem.given[1], moved)
    same(loss, expected)


@STRATEGIES
def test_a_gradient_that_is_not_finite_moves_nothing(strategy):
    x, index, given = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 2, 0]), []
    lam, weight = torch.tensor([0.25, 0.5, 0.75]), torch.ones((), requires_grad=True)

    def losses(lam):
        given.append(lam.detach().clone())
        scale = torch.tensor([1.0, math.inf, math.nan])
        return weight * scale * fastmix.mix(x, lam, index)[:, 0].square()

    for step_size in (0.1, 0.0):
        given.clear()
        adversarial_mixing_loss(losses, lam, step_size=step_size, strategy=strategy)
        assert torch.equal(given[1][1:], lam[1:])
        assert (given[1][0] == lam[0]) == (step_size == 0)


def one(lam):
    return lam * torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, torch.rand(3)), {}, TypeError, "losses: expected a function, got 3"),
        ((one, None), {}, TypeError, "lam: expected a float, or a float32 or float64 tensor"),
        ((one, True), {}, TypeError, "lam: expected a float"),
        ((one, torch.ones(3, dtype=torch.int64)), {}, TypeError, "lam: expected a float"),
        ((one, torch.rand(3).half()), {}, TypeError, "lam: expected a float"),
        ((one, torch.rand(3, 1)), {}, ValueError, r"lam: expected a float, a 0-d tensor or shape \[N\]"),
        ((one, torch.rand(3)), {"step_size": -1.0}, ValueError, "step_size: expected a finite number of at least 0"),
        ((one, torch.rand(3)), {"step_size": math.inf}, ValueError, "step_size: expected a finite"),
        ((one, torch.rand(3)), {"step_size": "1"}, TypeError, "step_size: expected a number"),
        ((one, torch.rand(3)), {"max_step": -0.1}, ValueError, "max_step: expected a finite"),
        ((one, torch.rand(3)), {"max_step": math.nan}, ValueError, "max_step: expected a finite"),
        ((one, torch.rand(3)), {"clamp": None}, TypeError, "clamp: expected a bool"),
        ((one, torch.rand(3)), {"gradient": "sum"}, ValueError, "gradient: expected 'sample' or 'mean'"),
        ((one, torch.rand(3)), {"strategy": "both"}, ValueError, "strategy: expected 'keep' or 'recompute'"),
        ((one, torch.rand(3)), {"reweight": 5}, TypeError, "reweight: expected a function or None"),
        ((one, torch.rand(3)), {"reweight": lambda d: d.sum()}, ValueError, r"reweight\(increases\): expected a tensor of shape \[3\]"),
        ((one, torch.rand(3)), {"model": "resnet"}, TypeError, "model: expected an nn.Module or None"),
        ((lambda lam: one(lam).mean(), torch.rand(3)), {}, ValueError, r"losses\(lam\): expected shape \[3\], a loss for each row"),
        ((lambda lam: one(lam)[:2], torch.rand(3)), {}, ValueError, r"losses\(lam\): expected shape \[3\]"),
        ((lambda lam: one(lam).sum(), 0.5), {}, ValueError, r"losses\(lam\): expected shape \[N\]"),
        ((lambda lam: [one(lam)], 0.5), {}, TypeError, r"losses\(lam\): expected a floating tensor"),
        ((lambda lam: one(lam).long(), 0.5), {}, TypeError, r"losses\(lam\): expected a floating tensor"),
        ((lambda lam: torch.rand(3), 0.5), {}, ValueError, "losses: expected losses that depend on lam"),
        ((lambda lam: torch.rand(3, requires_grad=True) * 1, 0.5), {}, ValueError, "losses: expected losses that depend on lam"),
        ((lambda lam: one(lam.detach()), torch.rand(3)), {}, ValueError, "losses: expected losses that depend on lam"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        adversarial_mixing_loss(*arguments, **{"step_size": 0.1, **options})


def test_losses_of_another_number_in_the_second_pass():
    rows = iter((3, 2))
    with pytest.raises(ValueError, match=r"losses\(lam\): expected shape \[3\]"):
        adversarial_mixing_loss(lambda lam: lam * torch.ones(next(rows)), 0.5, step_size=0.1)


def test_the_functions_of_a_target_are_constants():
    """MixedRows and dense targets made outside work as well."""
    problem = Problem((2,))
    values = torch.rand(5, C, dtype=DOUBLE)
    problem.target = MixedRows(values, problem.lam, problem.index)
    loss = adversarial_mixing_loss(problem.ours, problem.lam, step_size=0.5)
    probabilities = plain_mix(values, problem.lam, problem.index)

    def plain(lam):
        return F.cross_entropy(problem.model[2:](plain_mix(problem.model[:2](problem.x), lam, problem.index)), probabilities, reduction="none")  # fmt: skip

    same(loss, paper(plain, problem.lam, 0.5)[0])


# MovingAverageReweight


def test_weights_against_one_number_after_the_other():
    reweight, history = MovingAverageReweight(), []
    for N in (4, 1, 0, 7, 7, 3, 12, 7, 2):
        increases = torch.randn(N, dtype=DOUBLE) + 0.2
        same(reweight(increases), paper_weights(history, increases))


@pytest.mark.trap("AMP-reweighting")
def test_weights_of_few_positive_increases():
    for increases in ([-1.0, -2.0], [3.0, -1.0], [], [2.0] * 3, [0.7] * 3, [0.3] * 6, [0.0, 0.0], [math.nan, math.inf, 1.0]):
        w = MovingAverageReweight()(torch.tensor(increases))
        assert torch.equal(w, torch.ones(len(increases))), increases
    reweight = MovingAverageReweight()
    reweight(torch.tensor([math.inf, 1.0, math.nan]))
    same(reweight(torch.tensor([3.0, math.inf])), torch.tensor([1 + 1 / math.sqrt(2), 1.0]))


def test_the_window_and_its_state():
    drawn = [torch.randn(4) + 0.5 for _ in range(6)]
    narrow, alone = MovingAverageReweight(window=2), MovingAverageReweight(window=2)
    for increases in drawn[:3]:
        expected = narrow(increases)
    alone(drawn[1])
    same(alone(drawn[2]), expected)
    other = MovingAverageReweight(window=2)
    other.load_state_dict(copy.deepcopy(narrow.state_dict()))
    wider = MovingAverageReweight(window=9)
    wider.load_state_dict(narrow.state_dict())
    for increases in drawn[3:]:
        same(other(increases), narrow(increases))
    with pytest.raises(TypeError, match="state: expected a list of tensors"):
        narrow.set_extra_state([3])
    given = torch.tensor([1.0, 5.0, 9.0])
    first = MovingAverageReweight()
    w = first(given)
    given.zero_()  # the caller's tensor is not what is remembered
    same(first.get_extra_state()[0], torch.tensor([1.0, 5.0, 9.0]))
    assert not w.requires_grad
    assert w.dtype == torch.float32
    assert first(torch.ones(3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_windows(window, error):
    with pytest.raises(error, match="window: expected"):
        MovingAverageReweight(window)


def test_bad_increases():
    with pytest.raises(ValueError, match=r"increases: expected shape \[N\]"):
        MovingAverageReweight()(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="increases: expected"):
        MovingAverageReweight()([1.0])


@pytest.mark.slow
@COMPILED
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:Backend compiler")
@pytest.mark.parametrize(("name", "strategy"), [("step_size", "keep"), ("max_step", "recompute")])
def test_numbers_that_change_in_a_compiled_step(name, strategy):
    """It runs between programs, which no further value is compiled for."""
    torch._dynamo.reset()
    problem = Problem((0,), dropout=0.0)
    counter = CompileCounterWithBackend("aot_eager")

    def losses(lam):
        logits = problem.model(fastmix.mix(problem.x, lam, problem.index))
        return fastmix.soft_cross_entropy(logits, problem.target, reduction="none")

    def step(lam, v):
        options = {"step_size": 0.5, "max_step": None, name: v}
        return adversarial_mixing_loss(losses, lam, strategy=strategy, **options)

    fast, counts = torch.compile(step, backend=counter), []
    for v in (0.1, 0.2, 0.3, 0.15, 0.25):
        expected, loss = step(problem.lam, v), fast(problem.lam, v)
        same((loss, problem.gradients(loss)), (expected, problem.gradients(expected)))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1], counts
