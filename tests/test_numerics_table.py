"""python -m fastmix.bench.numerics: its errors are what they say, the ops keep their limits in it, and wrong ops do not."""

import json

import numpy as np
import pytest
import torch
from conftest import INTERPRETER, NO_INTERPRETER, NO_TRITON, TRITON

import fastmix
from fastmix.bench import numerics, peers

INFINITE = float("inf")


def run(path, *arguments):
    """(exit status, rows as they are read from the file)"""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    status = numerics.main([*arguments, "--json", str(path / "rows.json")])
    written = json.loads((path / "rows.json").read_text(), parse_constant=refuse)
    assert written["command"].startswith("python -m fastmix.bench numerics")
    return status, written["rows"]


def only(rows, **values):
    (row,) = (row for row in rows if all(row[key] == value for key, value in values.items()))
    return row


@pytest.fixture
def no_kernels(monkeypatch):
    """The table of the torch backend alone, on a GPU machine too."""
    monkeypatch.setattr(numerics, "backends", lambda interpreter: ([("torch", torch.device("cpu"))], None))


def check(status, rows):
    for row in rows:
        assert row["fastmix"] is not None, row
        assert row["fastmix"] <= row["limit"], row
        if row["case"] == "... of -inf, each its own":  # no eager way has a gradient there
            continue
        assert row["nearest"] is not None, row
        assert row["nearest"] == min(error for error in row["torch"].values() if error is not None)
        assert row["verdict"] in ("ok", "further than nearest"), row
    assert status == 0


@pytest.mark.slow
def test_every_case_is_within_its_limits(tmp_path, capsys):
    status, rows = run(tmp_path, "--small")
    check(status, rows)
    assert {row["case"] for row in rows} == set(numerics.CASES)
    for name in numerics.CASES:
        found = {(row["result"], row["dtype"]) for row in rows if row["case"] == name}
        assert len({result for result, _ in found}) >= 2
        assert {dtype for _, dtype in found} == set(map(numerics.name_of, numerics.dtypes_of(name)))
    printed = capsys.readouterr().out
    assert f"{len(rows)} rows: 0 beyond the limit" in printed
    assert all(name in printed for name in numerics.CASES)


@pytest.mark.slow
def test_kernels_in_the_interpreter(tmp_path, capsys):
    if not INTERPRETER:
        pytest.skip(NO_INTERPRETER if TRITON else NO_TRITON)
    for case in ("box", "per pixel"):
        status, rows = run(tmp_path, "--interpreter", "--case", case)
        check(status, rows)
        kernels = [row for row in rows if row["backend"] == "interpreter"]
        assert {row["dtype"] for row in kernels} == {"float32", "float16", "float64"}
        assert len(kernels) == 9
        assert "bfloat16 is left out in the interpreter" in capsys.readouterr().out


@pytest.mark.usefixtures("no_kernels")
def test_what_was_asked_for(tmp_path):
    status, rows = run(tmp_path, "--small", "--case", "mix normal", "--dtype", "float16")
    assert status == 0
    assert {(row["op"], row["case"], row["dtype"]) for row in rows} == {("mix", "normal", "float16")}
    with pytest.raises(SystemExit):
        numerics.main(["--case", "no such case"])


@pytest.mark.usefixtures("no_kernels")
def test_the_table_is_printed_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, rows = run(tmp_path, "--small", "--case", "mix box", "--dtype", "float32")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(numerics.COLUMNS)
    assert [line.split()[-1] for line in lines[1 : 1 + len(rows)]] == [row["verdict"] for row in rows] == ["ok"] * 3
    assert lines[1].split()[:2] == ["mix", "forward"]


def test_a_process_for_each_dtype(monkeypatch):
    """One that fails loses its own rows alone. Threads stand for the processes."""

    def rows_of(dtypes, *asked):
        if dtypes == [torch.float16]:
            raise RuntimeError("no such kernel")
        return [*dtypes, *asked]

    monkeypatch.setattr(numerics, "rows_of", rows_of)
    monkeypatch.setattr(numerics.multiprocessing, "get_context", lambda kind: kind)
    monkeypatch.setattr(numerics.concurrent.futures, "ProcessPoolExecutor", numerics.concurrent.futures.ThreadPoolExecutor)
    rows, problems = numerics.rows_by_process([torch.float32, torch.float16, torch.float64], "asked")
    assert rows == [torch.float32, "asked", torch.float64, "asked"]
    assert problems == ["float16: RuntimeError: no such kernel"]


# Wrong ops


def by_hand(x, lam, index, *, box=None):
    return peers.mixup_cifar10(x, lam.to(x.dtype).view(-1, 1, 1, 1), index)


def inverted(x, lam, index, *, box=None):
    return by_hand(x, 1 - lam, index)


def not_a_number(x, lam, index, *, box=None):
    return by_hand(x, lam, index) * float("nan")


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(("wrong", "dtype"), [(inverted, "float32"), (by_hand, "bfloat16"), (not_a_number, "float64")])
def test_a_wrong_mix_is_reported(wrong, dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastmix, "mix", wrong)
    status, rows = run(tmp_path, "--small", "--case", "mix normal", "--dtype", dtype)
    assert status == 1
    assert [row["verdict"] for row in rows] == ["BEYOND THE LIMIT"] * 3
    printed = capsys.readouterr().out
    assert printed.count("BEYOND THE LIMIT") == 3
    if wrong is not_a_number:
        assert [row["fastmix"] for row in rows] == [None] * 3
        assert printed.count("not finite") == 3


@pytest.mark.usefixtures("no_kernels")
def test_cancellation_is_seen(tmp_path, monkeypatch):
    """<g, x> - <g, y> instead of <g, x - y>, in float32."""
    monkeypatch.setattr(fastmix, "mix", by_hand)
    status, rows = run(tmp_path, "--small", "--case", "mix 1000 + normal", "--dtype", "float32")
    assert status == 1
    assert only(rows, result="gradient to lambda")["verdict"] == "BEYOND THE LIMIT"
    assert {only(rows, result=result)["verdict"] for result in ("forward", "gradient to x")} == {"ok"}


def cut_off(x, lam, index, *, box=None):
    """Towards zero, not to the nearest bfloat16; gradients as they should be."""
    wide = by_hand(x.float(), lam, index)
    cut = (wide.detach().view(torch.int32) & -(2**16)).view(torch.float32)
    return (wide + (cut - wide).detach()).to(x.dtype)


def a_little_off(x, lam, index, *, box=None):
    wide = by_hand(x, lam, index)
    return wide + 1e-6 * wide.detach()


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize(
    ("wrong", "dtype", "verdict"),
    [(cut_off, "bfloat16", "further than nearest"), (a_little_off, "float32", "further than usual")],
)
def test_further_than_torch_within_the_limit(wrong, dtype, verdict, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastmix, "mix", wrong)
    status, rows = run(tmp_path, "--small", "--case", "mix normal", "--dtype", dtype)
    assert status == 0
    assert [row["verdict"] for row in rows] == [verdict, "ok", "ok"]
    assert "3 rows: 0 beyond the limit, 1 within it but further" in capsys.readouterr().out


class FormedEarly(torch.autograd.Function):
    """A loss whose gradient is rounded to float16 before the upstream gradient is known."""

    @staticmethod
    def forward(ctx, z, weights, classes):
        with torch.enable_grad():
            leaves = z.detach().requires_grad_(), weights.detach().requires_grad_()
            wide = leaves[0].float()
            loss = peers.weighted_losses(wide, leaves[1], classes, None, reduction="mean")
        ctx.gradients = torch.autograd.grad(loss, leaves)
        return loss.detach()

    @staticmethod
    def backward(ctx, g):
        dz, dweights = ctx.gradients
        return (dz * g).to(dz.dtype), dweights * g, None


@pytest.mark.usefixtures("no_kernels")
def test_underflow_is_counted(tmp_path, monkeypatch):
    case = "--case", "soft_cross_entropy upstream 65536"
    status, rows = run(tmp_path, *case)
    assert status == 0
    assert only(rows, result=numerics.LOST)["fastmix"] == 0

    def wrong(z, target, **options):
        return FormedEarly.apply(z, target.weights, target.classes)

    monkeypatch.setattr(fastmix, "soft_cross_entropy", wrong)
    status, rows = run(tmp_path, *case)
    assert status == 1
    lost = only(rows, result=numerics.LOST)
    assert lost["verdict"] == "BEYOND THE LIMIT"
    assert lost["fastmix"] > 1000
    assert only(rows, result="gradient to weights")["verdict"] == "ok"


@pytest.mark.usefixtures("no_kernels")
def test_an_adversary_whose_gradient_is_not_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr(fastmix.adversarial, "SCALE", 1.0)
    status, rows = run(tmp_path, "--case", "adversary, losses of 1e-6")
    assert status == 1
    assert only(rows, result="gradient to lambda")["verdict"] == "BEYOND THE LIMIT"
    assert only(rows, result="loss")["verdict"] == "ok"


# Units


def test_ulp():
    values = np.array([1.0, 1.999, 2.0, -3.0, 0.0, 1e-45, 2.0**-126])
    np.testing.assert_array_equal(numerics.ulp(values, torch.bfloat16), [2**-7, 2**-6, 2**-6, 2**-6, 2**-133, 2**-133, 2**-133])
    for dtype in (torch.bfloat16, torch.float16):
        t = torch.randn(1000).to(dtype)
        gap = torch.nextafter(t.abs(), torch.tensor(INFINITE, dtype=dtype)) - t.abs()
        np.testing.assert_array_equal(numerics.ulp(t.double().numpy(), dtype), gap.double().numpy())


def test_errors_in_their_units():
    truth, terms = np.array([[1.0, 1e-4], [2.0, 0.0]]), np.array([[4.0, 1e-4], [2.0, 0.0]])

    def error(actual, unit, dtype, row=(1,)):
        size = terms.max(axis=row, keepdims=True) if unit == "scale" and row else terms
        return numerics.largest_error(torch.tensor(actual, dtype=torch.float64), truth, size, unit, dtype)

    f32, bf16 = torch.float32, torch.bfloat16
    assert error(truth, "scale", f32) == 0
    assert error([[1.0, 1e-4 + 1e-6], [2.0, 0.0]], "scale", f32) == pytest.approx(1e-6 / 4)
    assert error([[1.0, 1e-4 + 1e-6], [2.0, 0.0]], "scale", f32, ()) == pytest.approx(1e-2)
    assert error([[1.0, 1e-4], [2.0, 0.0]], "ulp", bf16) == 0
    assert error([[1.0 + 2**-7, 1e-4], [2.0, 0.0]], "ulp", bf16) == 1
    assert error([[1.0, 1e-4], [2.0, 1e-4]], "ulp", bf16) > 1e30  # a zero is exact
    assert error([[1.0, 1e-4], [2.0, 1e-4]], "scale", f32, ()) == INFINITE
    assert error([[float("nan"), 1e-4], [2.0, 0.0]], "scale", f32) == INFINITE
    assert error([1.0, 2.0], "scale", f32) == INFINITE  # of another shape
    assert error([[1.0, 0.0], [2.0, 0.0]], "entries", torch.float16) == 1
    cancelled = np.array([[1e-9]]), np.array([[1.0]])  # of terms of 1: float32 cannot do better
    assert numerics.largest_error(torch.tensor([[1e-6]]), *cancelled, "ulp", bf16) == pytest.approx(0.5, rel=1e-2)
