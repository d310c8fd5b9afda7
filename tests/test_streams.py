"""The samplers' streams of random numbers: their states, ranks and compiled programs; and that backends draw what torch draws."""

import copy
import functools
import itertools
import os
import sys
import threading

import pytest
import torch
import torch.fx.experimental.symbolic_shapes  # which the traced way asks
from conftest import INTERPRETER, NO_COMPILER, NO_INTERPRETER, NO_TRITON, TRITON
from test_mix_plan import equal, refused, rows_of
from test_partners import check_partners

import fastmix
from fastmix import CutMix, Mixup, RandomMix, sampling
from fastmix._torch import _draws
from fastmix._torch import sample as cpu
from fastmix.bench import report

# The stream, and its state


def test_states_are_a_few_integers():
    sampler = RandomMix(Mixup(1.0), CutMix(seed=7), seed=3)
    for _ in range(2):
        sampler.sample(torch.empty(4, 1, 8, 8))
    states = sampler.state_dict()
    assert states["_extra_state"] == {"version": 1, "sampler": 4, "batch": 2}
    assert states["samplers.1._extra_state"] == {"version": 1, "sampler": 2, "batch": 2}
    assert states["samplers.0._extra_state"] == {}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (5, TypeError, r"state: expected {version, sampler, batch: int} of a sampler, got 5"),
        ({"device": "cpu"}, TypeError, "state: expected {version"),
        ({"version": 2}, ValueError, "state: expected version 1 of Mixup, got version 2 of Mixup"),
        ({"sampler": 2}, ValueError, "state: expected that of Mixup, got that of CutMix"),
        ({"sampler": 99}, ValueError, r"expected that of Mixup, got that of an unknown sampler \(99\)"),
        ({"batch": -1}, ValueError, r"state\['batch'\]: expected an int in \[0, 2\*\*48\], got -1"),
        ({"batch": 2**48 + 1}, ValueError, "batch"),
    ],
    ids=str,
)
def test_states_that_are_none_are_refused(change, kind, words):
    good = {"version": 1, "sampler": 1, "batch": 4}
    sampler = Mixup(1.0, seed=5)
    state = {**good, **change} if isinstance(change, dict) and change.keys() <= good.keys() else change
    with pytest.raises(kind, match=words):
        sampler.load_state_dict({"_extra_state": state})
    assert equal(sampler.sample(torch.empty(4, 1)), Mixup(1.0, seed=5).sample(torch.empty(4, 1)))  # and nothing has changed


def test_states_of_generators_load_with_one_warning():
    """What versions before this one wrote: their streams cannot be gone on with."""
    sampling.stream._warn_of_old_states.cache_clear()
    sampler = RandomMix(Mixup(1.0, seed=1), CutMix(seed=2), seed=3)
    expected = [sampler.sample(torch.empty(4, 1, 8, 8)) for _ in range(2)][0]
    old = {"cpu": torch.Generator().get_state(), "cuda": torch.zeros(16, dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="their streams start anew") as warned:
        sampler.load_state_dict(dict.fromkeys(sampler.state_dict(), old))
    assert len(warned) == 1
    assert equal(sampler.sample(torch.empty(4, 1, 8, 8)), expected)


def test_a_stream_ends():
    sampler = Mixup(1.0, seed=0)
    sampler.load_state_dict({"_extra_state": {"version": 1, "sampler": 1, "batch": 2**48 - 4}})
    sampler.sample(torch.empty(4, 1))
    with pytest.raises(ValueError, match=r"x: expected at most 2\*\*48 rows drawn from one seed, got 1 after 2814"):
        sampler.sample(torch.empty(1, 1))
    sampler.sample(torch.empty(1, 1), generator=torch.Generator())


def test_ranks_draw_differently_and_share_their_state(monkeypatch):
    """Whoever wrote it: the state names a batch, the process its rank."""
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
    resumed = Mixup(1.0, seed=0)
    resumed.load_state_dict(saved)
    assert rows_of(resumed.sample(x)) == drawn[2][1]


def make_mixer(rank):
    return RandomMix(Mixup(1.0, seed=5 + rank), CutMix(), seed=10 + rank)


def test_ranks_with_seeds_of_their_own_go_on_from_the_file_of_one():
    """A state says how far a stream has gone, not which one it is."""
    x = torch.empty(6, 1, 8, 8)
    ranks = [make_mixer(rank) for rank in range(3)]
    for mixer in ranks:
        mixer.sample(x)
    saved = ranks[0].state_dict()
    for rank, mixer in enumerate(ranks):
        resumed = make_mixer(rank)
        resumed.load_state_dict(saved)
        assert [rows_of(resumed.sample(x)) for _ in range(2)] == [rows_of(mixer.sample(x)) for _ in range(2)]


@pytest.mark.parametrize(
    ("seed", "kind"), [(-1, ValueError), (2**63, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)]
)
@pytest.mark.parametrize("make", [lambda seed: Mixup(1.0, seed=seed), lambda seed: RandomMix(Mixup(1.0), seed=seed)])
def test_seeds_that_are_none_are_refused(make, seed, kind):
    refused(lambda: make(seed), kind, "seed", "an int", str(seed))
    make(2**63 - 1).sample(torch.empty(2, 1))


@pytest.mark.parametrize("partner", ["any", "same", "different", "flip", "roll"])
def test_pairs_choose_together(partner):
    """Two rows that are each other's partners are mixed by one sampler, with one lam and one box; so are the last three of an odd batch."""
    chosen = set()
    for seed, n in itertools.product(range(40), (2, 5, 8)):
        x, y = torch.empty(n, 1, 9, 9), torch.arange(n) % 2
        pair = {"per": "pair", "partner": partner}
        members = Mixup(1.0, **pair), RandomMix(CutMix(**pair), CutMix(minmax=(0.5, 0.9), **pair), per="batch")
        m = RandomMix(*members, per="pair", seed=seed).sample(x, y)
        check_partners(partner, "pair", m.index.tolist(), y.tolist())
        assert torch.equal(m.lam, m.lam[m.index])
        assert torch.equal(m.box, m.box[m.index])
        chosen |= set(((m.lam < 1).long() + 2 * (m.box[:, 2] > m.box[:, 0]).long()).tolist())
    assert {1, 2} <= chosen <= {0, 1, 2}


def test_pairs_choose_as_often_as_they_are_told():
    pairs = Mixup(1.0, per="pair"), CutMix(per="pair", minmax=(0.5, 0.5))
    m = RandomMix(*pairs, weights=(1, 3), per="pair", seed=0).sample(torch.empty(4000, 1, 8, 8))
    assert abs((m.lam == 1).double().mean() - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    rows = RandomMix(*pairs, per="row", seed=0).sample(torch.empty(4000, 1, 8, 8))
    assert (rows.lam != rows.lam[rows.index]).any()  # rows that choose alone leave pairs in pieces
    one = RandomMix(pairs[0].eval(), pairs[1], per="pair", seed=0).sample(torch.empty(64, 1, 8, 8))
    moved = one.index != torch.arange(64)
    assert torch.equal(moved, moved[one.index])
    mixer = RandomMix(pairs[0].train(), pairs[1], per="pair")
    pairs[0].per = "row"
    refused(lambda: mixer.sample(torch.empty(4, 1, 8, 8)), ValueError, "samplers", "members with per='pair'", "per='row'")


def test_numbers_of_a_schedule_are_checked():
    sampler = Mixup(1.0, seed=0)
    sampler.alpha, sampler.prob = 0.3, 0.5
    assert sampler.alpha == (0.3, 0.3)
    assert equal(sampler.sample(torch.empty(50, 1)), Mixup(0.3, prob=0.5, seed=0).sample(torch.empty(50, 1)))
    refused(lambda: setattr(sampler, "alpha", -1.0), ValueError, "alpha", "positive", "-1.0")
    refused(lambda: setattr(sampler, "prob", 2), ValueError, "prob", "a number in", "2")


@pytest.mark.slow
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


@pytest.fixture(params=["native", pytest.param("triton", marks=pytest.mark.slow)])
def other(request):
    """A backend that draws what plain torch draws."""
    if request.param == "triton":
        request.getfixturevalue("kernels")
    elif fastmix._native.why_not() is not None:
        pytest.skip(NO_COMPILER)
    return request.param


def ulps(a, b):
    """The largest distance of two tensors of finite numbers of one sign, in units in the last place."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int64
    return int((a.contiguous().view(kind) - b.contiguous().view(kind)).abs().max()) if a.numel() else 0


ULPS = 2


def same_draws(one, two):
    """Compares two (Mix, SoftTarget): partners, choices and boxes as they are, numbers within two units in the last place. A row in
    a million may lie between two roundings of a logarithm: none of those drawn here does."""
    (m, target), (n, other) = one, two
    pairs = [(m.index, n.index), (m.box, n.box), (m._lam, n._lam), (m._target_lam, n._target_lam)]
    pairs += [(m.mask, n.mask), (target.classes, other.classes), (target.weights, other.weights)]
    for a, b in pairs:
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.is_floating_point():
                assert ulps(a, b) <= ULPS
            else:
                assert torch.equal(a, b)
        else:
            assert a == b


def on_both(make, other, x, y, batches=2):
    """Draws the same from two samplers, one on torch and one on another backend, and compares; also what their states are then."""
    drawn, states = [], []
    for name in ("torch", other):
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
    "pairs choose": lambda seed: RandomMix(Mixup(0.4, per="pair"), CutMix(per="pair"), per="pair", seed=seed),
    "flipped pairs choose": lambda seed: RandomMix(
        Mixup(0.4, per="pair", partner="flip"), CutMix(per="pair", partner="flip"), per="pair", seed=seed
    ),
    "pairs of classes choose": lambda seed: RandomMix(
        Mixup(0.4, per="pair", partner="different"), CutMix(per="pair", partner="different"), per="pair", seed=seed
    ),
    "batches choose": lambda seed: RandomMix(Mixup(0.4, seed=seed + 1), CutMix(partner="roll"), per="batch", seed=seed),
    "random": lambda seed: RandomMix(Mixup(0.4), CutMix(), weights=(1, 3), seed=seed),
    "nested": lambda seed: RandomMix(
        Mixup(0.4, per="batch", seed=seed + 1),
        CutMix(per="pair").eval(),
        RandomMix(CutMix(minmax=(0.1, 0.9)), Mixup(1.0, partner="different"), per="batch"),
        seed=seed,
    ),
}


NO_INVERSE = {"same", "different", "mask", "mask of a and b", "batches choose", "pairs of classes choose", "nested"}
SLOW = {"mask", "mask of a and b", "nested", "random", "pairs choose", "batches choose", "batch", "pairs of classes choose"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EVERY])
def test_backends_draw_what_torch_draws(other, name):
    dtypes = torch.float32, torch.float64
    native = itertools.product((0, 1, 2, 3, 18), dtypes)
    for number, (n, dtype) in enumerate(native if other == "native" else zip((0, 1, 2, 3, 9, 8), 3 * dtypes, strict=True)):
        x, y = torch.zeros(n, 2, 6, 9, dtype=dtype), torch.arange(n) % 4
        for drawn, _ in on_both(functools.partial(EVERY[name], number), other, x, y):
            assert (drawn._inverse is None) == (other == "native" or name in NO_INVERSE)
            if drawn._inverse is not None:
                assert torch.equal(drawn._inverse[drawn.index], torch.arange(n))


OTHERS = {
    "AugMix": lambda seed: fastmix.AugMix(mean=0.0, std=1.0, seed=seed),
    "FMix": lambda seed: fastmix.FMix(seed=seed),
    "ResizeMix": lambda seed: fastmix.ResizeMix(seed=seed),
}


@pytest.mark.parametrize("name", [*EVERY, *OTHERS])
def test_what_is_traced_draws_what_is_not(name, monkeypatch):
    """The way of a compiled program, run step by step: options come from a table that is a tensor, and an operator draws."""
    x, y = torch.rand(9, 3, 6, 9, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 4
    plain, traced = ({**EVERY, **OTHERS}[name](3) for _ in range(2))
    given = ((255 * x).to(torch.uint8),) if name == "AugMix" else (x, y)
    with fastmix.backend("torch"):
        expected = [plain(*given) for _ in range(2)]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr("fastmix._check.is_compiling", lambda: True)
        found = [traced(*given) for _ in range(2)]
        monkeypatch.undo()
    for one, two in zip(found, expected, strict=True):
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (one, two)), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert traced.state_dict() == plain.state_dict()


@pytest.mark.parametrize(
    "change",
    [
        lambda mixer: setattr(mixer.samplers[0], "alpha", 0.3),
        lambda mixer: setattr(mixer.samplers[1].samplers[0], "prob", 0.2),
        lambda mixer: setattr(mixer, "weights", (1, 5)),
        lambda mixer: mixer.samplers[1].samplers[0].eval(),
        lambda mixer: mixer.samplers[1].samplers.insert(0, mixer.samplers[0]),
        lambda mixer: mixer.samplers.__setitem__(0, mixer.samplers[1].samplers[1]),
    ],
    ids=["alpha", "prob", "weights", "eval", "another member", "one for another"],
)
def test_what_changes_between_batches_counts(change):
    """Samplers keep what they found out about options for the next batch of this form."""
    x, mixers = torch.zeros(40, 1, 8, 8), []
    for batches in (1, 0):
        mixer = RandomMix(Mixup(0.8), RandomMix(CutMix(), CutMix(minmax=(0.2, 0.5))), seed=2)
        for _ in range(batches):
            mixer.sample(x)
        mixers.append(mixer)
    before = copy.deepcopy(mixers[0])
    for mixer in mixers:
        change(mixer)
    mixers[1].sample(x)
    first, second = (mixer.sample(x) for mixer in mixers)
    assert equal(first, second)
    assert not equal(first, before.sample(x))


@pytest.mark.no_poison
def test_options_set_in_a_compiled_program_count():
    """What was kept of the batch before belongs to other options, of a member too."""
    mixup, cutmix = Mixup(1.0), CutMix()
    both = RandomMix(RandomMix(mixup, cutmix), seed=0)
    x = torch.zeros(6, 1, 8, 8)
    assert (both.sample(x).target_lam != 1).any()

    def turn_off(x):
        mixup.prob = cutmix.prob = 0.0
        return x + 1

    torch.compile(turn_off, backend="eager", fullgraph=True)(x)
    assert (both.sample(x).target_lam == 1).all()


@pytest.mark.slow
@pytest.mark.no_poison
def test_a_draw_is_moved_and_copied_in_a_compiled_program():
    """Whether partners were written to cannot be asked while tracing."""
    x, y = torch.randn(6, 3), torch.arange(6)

    def shares(sampler, drawn):
        within = sampler.sample(x)
        return [m.target(y).weights for m in (within, within.to("cpu"), copy.copy(within), drawn.to("cpu"))], drawn.apply(x)

    drawn = Mixup(1.0, seed=1).sample(x)
    expected = shares(Mixup(1.0, seed=0), drawn)
    torch.testing.assert_close(torch.compile(shares, backend="eager", fullgraph=True)(Mixup(1.0, seed=0), drawn), expected)


def test_threads_that_share_a_sampler_draw_batches_of_their_own():
    sampler, x, drawn = Mixup(1.0, seed=0), torch.zeros(64, 1), []

    def draw():
        for _ in range(200):
            drawn.append(sampler.sample(x).lam)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if fastmix._backend.name(x.device) == "native":  # its draws take the batch's number in one step
        assert sampler.get_extra_state()["batch"] == 800
        assert len({lam.numpy().tobytes() for lam in drawn}) == 800


@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    "make",
    [
        lambda: Mixup(1.0, seed=0),
        lambda: Mixup(1.0),
        lambda: RandomMix(Mixup(1.0), CutMix(partner="different"), seed=0),
        lambda: fastmix.BetaMask(1.0, size=(2, 2), seed=0),
        lambda: fastmix.GridMix(grid=2, seed=0),
    ],
)
def test_draws_under_functional_transforms(device, make):
    """They are those of an eager call, and nothing is differentiated in them."""
    x, y = torch.randn(4, 1, 4, 4, device=device), torch.arange(4, device=device)

    def loss(mixer, x):
        mixed, target = mixer(x, y)
        return (mixed.square().sum((1, 2, 3)) * target.weights[:, 0]).sum()

    leaf = x.clone().requires_grad_()
    torch.manual_seed(0)
    loss(make(), leaf).backward()
    torch.manual_seed(0)
    torch.testing.assert_close(torch.func.grad(functools.partial(loss, make()))(x), leaf.grad)
    torch.manual_seed(0)
    value, tangent = torch.func.jvp(functools.partial(loss, make()), (x,), (x,))
    torch.testing.assert_close(tangent, (leaf.grad * x).sum())
    torch.testing.assert_close(tangent, 2 * value)


@pytest.mark.slow
def test_a_gradient_by_the_partners_inverse(kernels):
    """It has the bits of the one that counts, and partners that were replaced or written to since are counted."""
    x, g = (torch.randn(9, 2, 5, 6, requires_grad=grad) for grad in (True, False))
    other = torch.tensor([1, 1, 0, 8, 8, 8, 2, 3, 4])

    def replaced(drawn):
        drawn.index = other

    changes = (
        lambda drawn: None,
        replaced,
        lambda drawn: drawn.index.copy_(other),
        lambda drawn: drawn._drawn_index.copy_(other),
    )
    with fastmix.backend("triton"):
        for sampler, change in itertools.product((Mixup(0.8, seed=3), RandomMix(Mixup(0.8), CutMix(), seed=3)), changes):
            drawn = sampler.sample(x)
            change(drawn)
            copied = copy.deepcopy(drawn)
            wanted = torch.autograd.grad(fastmix.mix(x, drawn.lam, drawn.index, box=drawn.box), x, g)
            for mixed in (drawn.apply(x), drawn._apply_to_sampled(x), copied.apply(x)):
                assert torch.equal(*wanted, *torch.autograd.grad(mixed, x, g))


@pytest.mark.parametrize("shape", [(9, 50), (9, 1, 50), (9, 1, 9, 8, 7)])
def test_backends_cut_what_torch_cuts(other, shape):
    for make in (lambda: CutMix(1.0, seed=1), lambda: CutMix((0.3, 3.0), seed=1), lambda: CutMix(minmax=(0, 1), seed=1)):
        on_both(make, other, torch.zeros(shape), torch.arange(9))


@pytest.mark.slow
def test_backends_draw_what_torch_draws_for_many_seeds(other):
    """Partners, choices and boxes all equal, whatever the seed; of Triton's interpreter each sampler once, where FASTMIX_SEEDS=1000
    takes minutes."""
    x, y = torch.zeros(24, 1, 14, 12), torch.arange(24) % 5
    seeds = 1000 if other == "native" else int(os.environ.get("FASTMIX_SEEDS", len(EVERY)))
    for seed, make in zip(range(seeds), itertools.cycle(EVERY.values()), strict=False):
        on_both(functools.partial(make, seed), other, x, y, batches=1)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "counted"), [(130, 4096), (131, 130)])
def test_partners_of_many_rows(kernels, monkeypatch, n, counted):
    """By counting, and where rows are too many for that by sorting the same keys."""
    from fastmix.kernels import sample

    assert sample.MOST_COUNTED == 4096
    monkeypatch.setattr(sample, "MOST_COUNTED", counted)
    x, y = torch.zeros(n, 1), torch.arange(n)
    for per in ("row", "pair") if n == 131 else ("row",):
        ((m, _),) = on_both(lambda per=per: Mixup(1.0, per=per, seed=4), "triton", x, y, batches=1)
        check_partners("any", per, m.index.tolist(), y.tolist())


@pytest.mark.parametrize("n", [65536, 100001])
@pytest.mark.parametrize("per", ["row", "pair"])
def test_any_number_of_rows(n, per):
    def make():
        return Mixup(1.0, per=per, seed=4)

    m = make().sample(torch.empty(n, 1))
    check_partners("any", per, m.index.tolist(), [])
    with fastmix.backend("torch"):
        assert torch.equal(m.index, make().sample(torch.empty(n, 1)).index)


@pytest.mark.parametrize("options", [{}, {"skip": 1.0}, {"skip": (0.3, 2.0)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_draw_the_same_dirichlet_weights(other, options, dtype):
    for rows, ways, alpha in ((0, 2, 1.0), (7, 1, 0.3), (9, 3, 0.05), (5, 16 - len(options), 8.0)):
        drawn = []
        for name in ("torch", other):
            with fastmix.backend(name):
                generator = torch.Generator().manual_seed(4)
                drawn.append(fastmix.dirichlet(rows, ways, alpha, dtype=dtype, generator=generator, **options))
        assert ulps(*drawn) <= ULPS


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
        if not any(
            free in name
            for free in ("empty", "promote_types", "unbind", "select", "view", "detach", "slice", "alias", "expand", "split")
        ):
            self.found.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.slow
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


@pytest.mark.no_poison
@pytest.mark.slow_interpreted
@pytest.mark.parametrize(
    "mixer", [Mixup(0.8, seed=3), RandomMix(Mixup(0.8), CutMix(), seed=3)], ids=["mixup", "mixup or CutMix"]
)
def test_a_whole_step_is_few_launches(kernels, mixer):
    """Drawing, mixing, target, loss and its gradient: kernels of ours, and torch's operators that would be kernels on a GPU. What the
    model does is not counted, nor is what autograd does with the gradient."""
    x, y = torch.rand(32, 3, 8, 8), torch.arange(32) % 10
    logits = torch.randn(32, 10, requires_grad=True)
    from triton.runtime.interpreter import InterpretedFunction

    def step():
        mixed, target = mixer(x, y)
        loss = fastmix.soft_cross_entropy(logits + 0, target)
        return mixed, torch.autograd.grad(loss, logits)

    with fastmix.backend("triton"), pytest.MonkeyPatch.context() as patch:
        found = launches(step)  # and the table is on the device now
        patch.setattr(InterpretedFunction, "__getitem__", Nothing.__getitem__)
        patch.setattr(fastmix._check, "transformed", lambda: False)  # the mode that counts is no reason to trace
        patch.setattr(fastmix._check, "in_range", lambda *args: None)  # on a GPU labels are not looked at
        with Operators() as counted:
            step()
    counted.found.remove("aten.add.Tensor")  # the model
    assert found[:2] == ["_sample_kernel", "_mix_fwd_kernel"]
    assert len(found) + len(counted.found) <= 8, found + counted.found


@pytest.mark.no_poison
def test_launches_of_each_call_as_the_page_says(kernels):
    x, y = torch.rand(8, 3, 8, 8, requires_grad=True), torch.arange(8) % 4
    logits = torch.randn(8, 4, requires_grad=True)
    either = RandomMix(Mixup(0.8), CutMix(), seed=3)
    with fastmix.backend("triton"):
        mix = Mixup(0.8, seed=3).sample(x)
        target = mix.target(y)
        mixed = mix.apply(x)

        def step():
            _, soft = either(x.detach(), y)
            torch.autograd.grad(fastmix.soft_cross_entropy(logits, soft), logits)

        calls = [
            *(lambda sampler=sampler: sampler.sample(x) for sampler in (Mixup(0.8, seed=3), CutMix(seed=3), either)),
            lambda: mix.target(y),
            lambda: mix.apply(x),
            lambda: torch.autograd.grad(mixed, x, torch.ones_like(mixed)),
            lambda: torch.autograd.grad(fastmix.soft_cross_entropy(logits, target), logits),
            step,
        ]
        assert [len(launches(call)) for call in calls] == [
            now for call, (_, now) in report.LAUNCHES.items() if "Puzzle" not in call
        ]


@pytest.mark.no_poison
def test_launches_of_puzzle_mix_as_the_page_says(kernels, monkeypatch):
    """Kernels of ours, and torch's operators that would be kernels on a GPU; cut and transport are not run."""
    x, saliency = torch.rand(4, 3, 8, 8), torch.rand(4, 8, 8)
    puzzle = fastmix.PuzzleMix(mean=0.5, std=(0.2, 0.25, 0.3), blocks=4, solver="primal-dual", seed=3)
    for name in ("grid_cut", "transport_plan"):
        monkeypatch.setattr(sys.modules[f"fastmix.kernels.{name}"], f"_{name}_kernel", Nothing())
    counts = 2  # those two
    with fastmix.backend("triton"):
        counts += len(launches(lambda: puzzle.sample(x, saliency)))  # and tables are on the device now
        monkeypatch.setattr(fastmix._check, "transformed", lambda: False)  # the mode that counts is no reason to trace
        monkeypatch.setattr(fastmix._check, "readable", lambda t: False)  # on a GPU nothing is looked at
        for name in ("puzzle_costs", "puzzle_masks"):
            monkeypatch.setattr(sys.modules[f"fastmix.kernels.{name}"], f"_{name}_kernel", Nothing())
        drawn = fastmix.Mix(torch.full((4,), 0.4), torch.arange(4).roll(1))
        monkeypatch.setattr(puzzle.mixup, "sample", lambda *args, **options: drawn)
        with Operators() as counted:
            puzzle.sample(x, saliency)
    counts += len(counted.found)
    assert counts == report.LAUNCHES["`PuzzleMix.sample(x, saliency)`"][1], counted.found


def test_both_backends_read_a_table_alike(kernels):
    module = sys.modules["fastmix.kernels.sample"]
    names = [name.upper() for name in cpu.Node._fields]
    columns = {"PARTNER": "PARTNER_OF"}
    assert [getattr(module, columns.get(name, name)).value for name in names] == list(range(len(names)))
    assert module.FIELDS.value == len(names)
    shared = [
        "REST",
        "LAM",
        "BOX",
        "SIDES",
        "MASK",
        "CHOICE_OF",
        "EACH_ROW",
        "EACH_PAIR",
        "EACH_BATCH",
        "ANY",
        "FLIP",
        "ROLL",
        "GIVEN",
    ]
    for name in [*shared, "PROPORTIONAL", "LARGER", "OWN"]:
        assert getattr(module, name).value == getattr(cpu, name), name
    words = sys.modules["fastmix.kernels._draws"]
    for name in ["ROW", "PLACE", "CHOICE", "PARTNER", "CELL", "GAMMA", "CELL_GAMMA", "WAYS", "SKIP", "RETRY", "MOST_EXPONENT"]:
        assert getattr(words, name).value == getattr(_draws, name), name
    assert words.GAMMA_BLOCKS.value == _draws.BLOCKS


SCHEDULES = {
    "alpha": (lambda: fastmix.Mixup(1.0, seed=0), [0.1 + k / 10 for k in range(10)]),
    "minmax": (lambda: fastmix.CutMix(minmax=(0.1, 0.2), seed=0), [(0.1, 0.2 + k / 20) for k in range(10)]),
    "weights": (
        lambda: fastmix.RandomMix(
            fastmix.RandomMix(fastmix.Mixup(1.0), fastmix.CutMix(), weights=(1, 2)), fastmix.Mixup(0.3), seed=0
        ),
        [(1, k) for k in range(1, 11)],
    ),
}


@pytest.mark.slow
@pytest.mark.trap("schedules-under-compile")
@pytest.mark.parametrize("name", SCHEDULES)
def test_numbers_that_change_in_a_compiled_step_cost_no_program(name):
    make, values = SCHEDULES[name]
    sampler, twin = make(), make()
    x, y = torch.randn(8, 3, 6, 6), torch.arange(8)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(lambda x, y: sampler(x, y), backend=counter, fullgraph=True)
    with fastmix.backend("torch"):
        for value in values:
            setattr(sampler, name, value)
            setattr(twin, name, value)
            (mixed, target), (expected, expected_target) = fast(x, y), twin(x, y)
            assert torch.equal(mixed, expected)
            assert torch.equal(target.weights, expected_target.weights)
    assert counter.frame_count == 1
