"""The walk along a chain of partners: the same bits as the gather, whatever the order, and fewer bytes where it is a sampler's."""

import pytest
import torch
from conftest import INTERPRETER, NO_INTERPRETER, NO_TRITON, TRITON
from numerics import accumulator

import fastmix
from fastmix import CutMix, Mixup, RandomMix
from fastmix.bench import traffic
from fastmix.mixing.mix import mix_along

if TRITON:
    from fastmix.kernels import _row_layout, mix, mix_chain


KERNELS = [pytest.param("interpreter"), pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture
def walking(monkeypatch):
    """walking(True) turns the walk on, walking(False) the gather."""
    if not TRITON:
        pytest.skip(NO_TRITON)
    return lambda on: monkeypatch.setattr(mix, "CHAIN", on)


@pytest.fixture
def launched(monkeypatch):
    """The names of chain launchers that were called."""
    calls = []
    for name in ("chain_fwd", "chain_bwd"):
        real = getattr(mix_chain, name) if TRITON else None
        monkeypatch.setattr(
            mix, name, lambda *args, name=name, real=real: calls.append(name) or real(*args)
        ) if TRITON else None
    return calls


def same(gathered, walked, x):
    """The same bits. On a GPU the two have other numbers of warps, so the sums of lambda's gradient run in another order there."""
    if walked.dim() == 1 and walked.is_cuda:
        torch.testing.assert_close(walked, gathered, rtol=0, atol=1e-6 * x[0].nan_to_num().numel())
    else:
        assert torch.equal(gathered, walked)


def cycle(N):
    order = torch.randperm(N)
    return torch.empty_like(order).scatter_(0, order, order.roll(-1)), order


def wrong(N):
    index = torch.randint(0, N, (N,))
    index[0], index[-1] = N + 3, -1
    return index, torch.randperm(N)


ORDERS = {  # (partners, the hint)
    "cycle": cycle,
    "flip": lambda N: (torch.arange(N).flip(0), "flip"),
    "roll": lambda N: (torch.arange(N).roll(1), "roll"),
    "pairs": lambda N: (torch.arange(N).add(0) ^ 1 if N % 2 == 0 else torch.arange(N), torch.arange(N)),
    "unrelated": lambda N: (torch.randint(0, N, (N,)), torch.randperm(N)),
    "one for all": lambda N: (torch.zeros(N, dtype=torch.int64), "flip"),
    "itself": lambda N: (torch.arange(N), torch.randperm(N)),
    "wrong partners": wrong,
}


SHAPES = [((17, 3, 20, 20), torch.float32), ((2, 1100), torch.float32), ((1, 1100), torch.float64), ((19, 1030), torch.float16)]


@pytest.mark.slow_interpreted
@pytest.mark.trap("flip-pairs-chain")
@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_the_same_bits_as_the_gather(device, walking, launched, kind, shape, dtype):
    N = shape[0]
    index, order = ORDERS[kind](N)
    order = order.to(device) if isinstance(order, torch.Tensor) else order
    x, g = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    lam = torch.rand(N, dtype=accumulator(dtype), device=device)
    lam[0], lam[-1] = 0, 1
    if N > 2:
        x[1], g[2] = float("nan"), float("nan")
    arguments = x, lam, index.to(device)
    results = []
    for on in (False, True):
        walking(on)
        found = [mix.mix_fwd(*arguments, None, None, order)]
        for need in ((True, False), (False, True), (True, True)):
            found += [t for t in mix.mix_bwd(g, *arguments, None, x.stride(), *need, order) if t is not None]
        results.append(found)
    assert launched == ["chain_fwd"] + 3 * ["chain_bwd"]
    for gathered, walked in zip(*results, strict=True):
        assert torch.equal(gathered.isnan(), walked.isnan())
        same(gathered.nan_to_num(), walked.nan_to_num(), x)


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("layout", ["channels_last", "strided", "sequence first"])
def test_layouts(device, walking, launched, layout):
    x = torch.randn(16, 4, 20, 20, device=device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.randn(16, 4, 20, 40, device=device)[..., ::2]
    else:
        x = torch.randn(40, 16, 40, device=device).transpose(0, 1)
    m = fastmix.Mixup(1.0, seed=0).sample(x)
    results = []
    for on in (False, True):
        walking(on)
        leaf, lam = x.clone().requires_grad_(), m.lam.clone().requires_grad_()
        mixed = mix_along(m._order, leaf, lam, m.index, None)
        results.append((mixed, *torch.autograd.grad(mixed, (leaf, lam), 2 * x)))
        assert mixed.stride() == fastmix.mix(x, m.lam, m.index).stride()
    assert launched == ["chain_fwd", "chain_bwd"]
    for gathered, walked in zip(*results, strict=True):
        same(gathered, walked, x)


PARTNERS = [("any", "row"), ("flip", "row"), ("roll", "row"), ("any", "pair"), ("flip", "pair"), ("any", "batch")]
PARTNERS += [("same", "pair"), ("different", "pair")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partner", "per", "N"),
    [*((*who, N) for who in PARTNERS for N in (17, 23)), *((*who, N) for who in PARTNERS[:4:3] for N in (16, 18, 19, 25))],
)
def test_bytes_of_a_samplers_own_partners(walking, partner, per, N):
    """At most 1.1 of the floor from 16 rows on (odd batches in pairs 1.15: the ring of three shifts the pairs against the programs),
    forward and backward, with lambda's gradient and without."""
    most = 1.15 if (partner, per) == ("any", "pair") and N % 2 else 1.1
    if not INTERPRETER:
        pytest.skip(NO_INTERPRETER if TRITON else NO_TRITON)
    walking(True)
    x = torch.randn(N, 3, 32, 32)
    y = torch.arange(N) % 2 if partner == "different" else torch.arange(N) // 4
    m = fastmix.Mixup(1.0, partner=partner, per=per, seed=0).sample(x, y)
    lam = m.lam.clone()
    with traffic.count() as moved:
        mix.mix_fwd(x, lam, m.index, None, None, m._order)
    assert moved["_mix_chain_fwd_kernel"].sectors <= most * 2 * x.nbytes
    for need, floor in (((True, False), 2), ((False, True), 2), ((True, True), 3)):
        with traffic.count() as moved:
            mix.mix_bwd(x, x, lam, m.index, None, x.stride(), *need, m._order)
        assert moved["_mix_chain_bwd_kernel"].sectors <= most * floor * x.nbytes


def test_rows_of_a_program():
    """8 rows and no short last chain; less only where few rows would leave most of a GPU idle; and never none."""
    if not TRITON:
        pytest.skip(NO_TRITON)
    for rows, tiles, expected in (
        (256, 74, 8), (16, 1, 8), (17, 1, 10), (23, 1, 12), (25, 1, 10), (31, 9, 12), (64, 2, 8), (15, 1, 1), (8, 74, 1), (8, 528, 8), (4, 528, 4), (2, 10**6, 8), (1, 1, 1),
    ):  # fmt: skip
        assert mix_chain.rows_per_program(rows, tiles) == expected


def test_where_there_is_nothing_to_walk(walking, launched):
    """Boxes read less by themselves, short rows share a program, and a draw without an order has none to offer."""
    if not INTERPRETER:
        pytest.skip(NO_INTERPRETER if TRITON else NO_TRITON)
    walking(True)
    x, y = torch.randn(4, 3, 20, 20), torch.arange(4) % 2
    with fastmix.backend("triton"):
        fastmix.CutMix(seed=0)(x, y)
        fastmix.Mixup(1.0)(torch.randn(4, 30), y)
        fastmix.Mixup(1.0, partner="different")(x, y)
        fastmix.Mixup(1.0, partner="same")(x, y)
        fastmix.mix(x, 0.5, torch.tensor([1, 2, 3, 0]))
        fastmix.Mixup(1.0)(x[:0], y[:0])
        assert launched == []
        fastmix.Mixup(1.0)(x, y)
        assert launched == ["chain_fwd"]
        fastmix.RandomMix(fastmix.Mixup(1.0))(x, y)
        assert launched == 2 * ["chain_fwd"]


def test_orders_are_permutations_and_travel():
    for partner, per in PARTNERS:
        for N in (1, 2, 5, 8):
            m = fastmix.Mixup(1.0, partner=partner, per=per).sample(torch.randn(N, 3), torch.randint(0, 3, (N,)))
            if TRITON:
                assert mix._walk(m._order, m.index).sort()[0].tolist() == list(range(N))
            moved = m.to("cpu")
            assert torch.equal(moved._order, m._order) if isinstance(m._order, torch.Tensor) else moved._order == m._order


# The rows that have each row as their partner


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_counting_finds_what_sorting_finds(device):
    for rows, slots in ((1, 1), (5, 5), (33, 33), (200, 200), (300, 40), (7, 100)):
        index = torch.randint(-2, slots + 3, (rows,), device=device)  # partners out of range are nobody's
        counted, by_sort = _row_layout.inverse_index(index, slots), _row_layout.sorted_inverse(index, slots)
        assert sorted(counted.order_ptr.tolist()) == list(range(rows))
        for slot in range(slots):
            users, expected = (t.order_ptr[t.starts_ptr[slot] : t.starts_ptr[slot + 1]] for t in (counted, by_sort))
            assert torch.equal(users, expected)


@pytest.mark.parametrize("device", KERNELS, indirect=True)
def test_an_inverse_that_is_known_gives_the_same_bits(device, monkeypatch):
    x, g = torch.randn(2, 9, 700, device=device)
    lam, index = torch.rand(9, device=device), torch.randperm(9, device=device)
    for box in (None, torch.tensor([[3, 300]], device=device).repeat(9, 1)):
        arguments = g, x, lam, index, box, x.stride(), True, True
        expected = mix.mix_bwd(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(_row_layout, "COUNTED_ROWS", 8)
            by_sort = mix.mix_bwd(*arguments)
        known = mix.mix_bwd(*arguments, inverse=index.argsort())
        for result in (by_sort, known):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("device", KERNELS, indirect=True)
@pytest.mark.parametrize("mixer", [Mixup(0.4, seed=2), RandomMix(Mixup(0.4), CutMix(), seed=2)], ids=["mixup", "either"])
def test_partners_that_a_sampler_drew_are_not_counted(device, monkeypatch, mixer):
    """The backward has their inverse from the sampler, unless somebody has written to the partners."""
    counted = []
    find = _row_layout.inverse_index
    monkeypatch.setattr(mix, "inverse_index", lambda *a: counted.append(a[2] is None) or find(*a))
    x, g = torch.rand(9, 2, 6, 5, device=device), torch.rand(9, 2, 6, 5, device=device)

    def dx(drawn):
        leaf = x.clone().requires_grad_()
        drawn.apply(leaf).backward(g)
        return leaf.grad

    m = mixer.sample(x)
    by_hand = fastmix.Mix(m.lam, m.index.clone(), box=m.box)
    assert torch.equal(m._inverse, m.index.argsort())
    assert torch.equal(dx(m), dx(by_hand))
    m.index.copy_(m.index.roll(1))
    assert torch.equal(dx(m), dx(fastmix.Mix(m.lam, m.index, box=m.box)))
    assert counted == [False, True, True, True]
    pairs = Mixup(0.4, per="pair").sample(x)
    assert pairs._inverse is None
    leaf = x.clone().requires_grad_()
    mixer(leaf, torch.arange(9, device=device))[0].backward(g)
    assert counted[4:] == [False]
