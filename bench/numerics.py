"""How far from the truth the ops are, and what people write by hand: every result, dtype and hard case in one table.

    python -m fastmix.bench.numerics [--case TEXT] [--first] [--dtype ...] [--small] [--interpreter] [--json FILE]

Cases, inputs, truth and the ways by hand are those of `fastmix.bench.ops`. An error is the largest distance from the float64 oracle over
all elements, in a unit:

    scale    float32 and float64: the row's largest sum of the sizes of the terms of an element (of a loss: itself and its target's
             weight sum, since part of it is the log of a sum that may be near 1)
    ulp      bfloat16 and float16: the unit in the last place of the correctly rounded result, itself up to 0.5 from the truth; where
             terms cancel so far that float32 is coarser than that, 2e-6 of their sizes
    terms    gradients to lambda, a mask's cell or a source's weight: the sum of the sizes of their terms
    rounded  the same through a loss and a batch of the dtype, to which each term is rounded once
    entries  how many elements that the dtype can hold became 0

Losses and gradients to lambda or to the target's weights are float32 whatever the batch's dtype. float64 rows say that computations
written differently agree; they cannot tell which is nearer to the truth. "usual" is the first way by hand, in the batch's own dtype,
"nearest" the way that came nearest in that row, in bfloat16 and float16 on a float32 copy as well, as under autocast. "ok" is within
the limit and no further from the truth than the nearest, give or take a margin of chance. The exit status is 1 if a limit is broken.

fastmix runs on its torch backend, and on its kernels where there is a GPU; with --interpreter also in Triton's interpreter, on small
shapes and without bfloat16, to which it truncates where hardware rounds.
"""

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import pathlib
import subprocess
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import fastmix
from fastmix import _backend, adversarial, reference
from fastmix.bench import ops
from fastmix.bench.results import finite, write
from fastmix.bench.samples import BF16, DTYPES, F16, F32, F64, Draw, Sample, acc_dtype, differentiated, exact, name_of

# By unit, and by the dtype of the result: the limit, and what chance in the last bit adds to a largest error: one or two roundings of
# float32, or as much before the one rounding that counts; in float64 the accuracy of the oracle's own sums.
BOUNDS = {
    "scale": {F32: (2e-6, 2.0**-23), F64: (1e-12, 1e-12)},
    "terms": {F32: (1e-5, 2.0**-23), F64: (1e-13, 1e-13)},
    "ulp": {BF16: (1.5, 0.01), F16: (1.5, 0.01)},
    "entries": {F16: (0, 0)},
    "rounded": {
        F32: (1e-5, 2.0**-23), F64: (1e-13, 1e-13), BF16: (2.0**-8 + 1e-5, 2.0**-12), F16: (2.0**-11 + 1e-5, 2.0**-15),
    },
}  # fmt: skip
LOST = "logit gradients made 0"  # counted rather than measured


class AdversarialMixing(ops.Op):
    """What Adversarial Mixing Policy climbs: the losses of a mixed batch of logits, the target's weights constant. `factor` multiplies
    every row's loss, as where it is a small part of a sum."""

    name, value, shapes = "adversarial_mixing_loss", "loss", ((64, 1000), (4, 50))
    units = {"value": "scale", "lam": "rounded"}
    rows = {"value": (), "lam": ()}

    def sample(self, draw, shape, dtype, *, factor=1.0):
        N, C = shape
        x, lam = (3 * draw.normal(N, C)).to(dtype), draw.uniform(N).to(acc_dtype(dtype))
        about = {"y": draw.integers(C, N), "index": draw.partners(N), "g": torch.ones_like(lam), "factor": factor}
        return Sample(x=x, lam=lam, target_lam=lam, rows=N, dtype=dtype, leaves=("lam",), **about)

    def results(self, s):
        leaf = s.lam.clone().requires_grad_()
        mixed, target = fastmix.mix(s.x, leaf, s.index), fastmix.Mix(s.lam, s.index).target(s.y)
        loss = s.factor * fastmix.soft_cross_entropy(mixed, target, reduction="none")
        return loss.detach(), adversarial._lambda_gradient(loss, leaf, False)

    def truth(self, s):
        mixed = exact(torch.from_numpy(reference.mix(s.x, s.lam, s.index)).to(s.dtype))
        target = np.stack((s.y, s.y[s.index]), 1), np.stack((s.lam, 1 - s.lam), 1)
        loss = s.factor * reference.soft_cross_entropy(mixed, target, reduction="none")
        dz, _ = reference.soft_cross_entropy_grad(mixed, target, np.full(len(s.lam), s.factor), reduction="none")
        positive = np.abs(dz) * np.sign(s.x - s.x[s.index])
        g, terms = (reference.mix_grad(d, s.x, s.lam, s.index)[1] for d in (dz, positive))
        return {"value": (loss, loss + s.factor), "lam": (g, terms)}

    def ways(self, s):
        def twice(s, dtype):
            x, lam, own = s.x.to(dtype), s.lam.to(dtype).view(-1, 1), s.target_lam.to(dtype)
            logits = (lam * x + (1 - lam) * x[s.index]).to(s.dtype).to(dtype)
            losses = [F.cross_entropy(logits, labels, reduction="none") for labels in (s.y, s.y[s.index])]
            return s.factor * (own * losses[0] + (1 - own) * losses[1])

        return {"F.cross_entropy twice": twice}

    hard = {
        "adversary, logits [64, 1000]": {},
        "adversary, losses of 1e-6": {"factor": 1e-6, "shape": (64, 10), "small": (4, 10), "dtypes": (F16,)},
    }


CASES = {case: op for op in ops.ENTRIES.values() for case in op.hard}


def first_cases(cases=tuple(CASES)):
    """The first of these cases of each op, of losses the first with a dense target too, which has kernels of its own."""
    kinds = {name: (CASES[name], bool(CASES[name].hard[name].get("dense"))) for name in cases}
    return list({kinds[name]: name for name in reversed(cases)}.values())[::-1]


# Errors


def ulp(values, dtype):
    """The unit in the last place of each value, correctly rounded to the dtype."""
    info = torch.finfo(dtype)
    least = math.frexp(info.smallest_normal)[1]

    def unit(values):
        exponent = np.where(values == 0, least, np.maximum(np.frexp(values)[1], least))
        return info.eps * 2.0 ** (exponent - 1)

    return unit(np.rint(values / unit(values)) * unit(values))


def largest_error(actual, truth, terms, unit, dtype):
    """The largest distance of a tensor from the truth, in its unit. `terms`: the sum of the sizes of each element's terms, or its
    row's scale."""
    actual = exact(actual)
    if actual.shape != np.shape(truth):
        return math.inf
    if unit == "entries":  # that the dtype can hold, and became 0
        info = torch.finfo(dtype)
        return float(np.sum((actual == 0) & (np.abs(truth) >= info.smallest_normal * info.eps)))
    size = terms
    if unit == "ulp":
        size = np.maximum(ulp(truth, dtype), BOUNDS["scale"][F32][0] * terms)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(actual == truth, 0.0, np.abs(actual - truth) / size)
    return float(np.nan_to_num(error, nan=math.inf, posinf=math.inf).max(initial=0.0))


def by_hand(op, sample):
    """(name, {"value" or leaf: tensor}) of each way, in the batch's dtype and in that of the arithmetic; a sequence's gradients as one."""
    for dtype in dict.fromkeys((sample.dtype, acc_dtype(sample.dtype))):
        for name, way in op.ways(sample).items():
            value, *gradients = differentiated(partial(way, dtype=dtype), sample)
            gradients = gradients if len(gradients) == len(sample.leaves) else [torch.stack(gradients)]
            found = zip(("value", *sample.leaves), (value, *gradients), strict=True)
            yield f"{name}, {name_of(dtype)}", {key: result for key, result in found if result is not None}


# The table


def backends(interpreter):
    """[(fastmix's backend, device)] that run here, and why others that were asked for do not."""
    found, missing = [("torch", torch.device("cpu"))], None
    if _backend._why_not_native(torch.device("cpu")) is None:
        found.append(("native", torch.device("cpu")))
    if interpreter or torch.cuda.is_available():
        device = torch.device("cpu" if interpreter else "cuda")
        try:
            with fastmix.backend("triton"):
                _backend.of(torch.empty(0, device=device))
            found.append(("triton", device))
        except RuntimeError as error:
            missing = str(error)
    return found, missing


def dtypes_of(case):
    return CASES[case].hard[case].get("dtypes", DTYPES)


def table(where, cases=tuple(CASES), dtypes=DTYPES, small=False):
    """A row for each result, by case, dtype and backend, as it is found."""
    for case in cases:
        op, options = CASES[case], dict(CASES[case].hard[case])
        shapes = options.pop("shape", op.shapes[0]), options.pop("small", op.shapes[1])
        options.pop("dtypes", None)
        for dtype in [dtype for dtype in dtypes if dtype in dtypes_of(case)]:
            sample = op.sample(Draw(), shapes[small], dtype, **options)
            truth = op.truth(sample.map(exact))
            for backend, device in where:
                if (backend, device.type, dtype) != ("triton", "cpu", BF16):
                    yield from _rows(op, case, dtype, backend, device, sample, truth)


def _rows(op, case, dtype, backend, device, sample, truth):
    sample = sample.map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t)
    with fastmix.backend(backend):
        ours = dict(zip(("value", *sample.leaves), op.results(sample), strict=True))
    ways = list(by_hand(op, sample))
    measured = [(key, op.value if key == "value" else f"gradient to {key.replace('lam', 'lambda')}") for key in ours]
    measured += [("logits", LOST)] if getattr(sample, "upstream", 1) > 1 else []
    for key, result in measured:
        values, terms = truth[key]
        unit = "entries" if result == LOST else op.units.get(key) or ("scale" if dtype in BOUNDS["scale"] else "ulp")
        of = dtype if dtype in BOUNDS[unit] else F32
        limit, margin = BOUNDS[unit][of]
        size = op.scale(key, terms) if unit == "scale" else terms
        error = partial(largest_error, truth=values, terms=size, unit=unit, dtype=of)
        torchs = {way: error(results[key]) for way, results in ways if key in results}
        found, usual, nearest = error(ours[key]), next(iter(torchs.values())), min(torchs.values())
        verdict = "ok"
        if found > limit:
            verdict = "BEYOND THE LIMIT"
        elif found > nearest + margin:
            verdict = "further than " + ("usual" if found > usual + margin else "nearest")
        yield {
            "op": op.name, "result": result, "dtype": name_of(dtype), "case": case,
            "backend": "interpreter" if backend == "triton" and device.type == "cpu" else backend,
            "fastmix": found, "usual": usual, "nearest": nearest, "limit": limit, "unit": unit, "verdict": verdict,
            "torch": torchs,
        }  # fmt: skip


CLOSING = """Errors are the largest over all elements: of the row's scale; in ulp of the correctly rounded result, which is up to
0.5 from the truth; of sum |g*(x[i] - x[partner])|, the terms of a gradient to lambda. float64 is compared with a float64
oracle. Eager torch: usual is the usual way in the batch's own dtype, nearest the best of all, on a float32 copy too."""
COLUMNS = "op", "result", "dtype", "case", "backend", "fastmix", "usual", "nearest", "limit", "unit", "verdict"
ERRORS = "fastmix", "usual", "nearest", "limit"


def rows_of(dtypes, cases, small, interpreter):
    """The table as a list."""
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, with infinities too
        return list(table(backends(interpreter)[0], cases, dtypes, small))


def rows_by_process(dtypes, *asked):
    """(the table, what went wrong) of a process for each dtype: on a GPU most of the time is compilation."""
    rows, problems = [], []
    with concurrent.futures.ProcessPoolExecutor(len(dtypes), multiprocessing.get_context("spawn")) as pool:
        for dtype, found in {dtype: pool.submit(rows_of, [dtype], *asked) for dtype in dtypes}.items():
            try:
                rows += found.result()
            except Exception as error:  # the other dtypes' rows are kept
                problems.append(f"{name_of(dtype)}: {type(error).__name__}: {error}")
    return rows, problems


def _cell(row, column):
    value = row[column]
    if column not in ERRORS:
        return value
    if not math.isfinite(value):
        return "not finite"
    if row["unit"] == "entries":
        return str(int(value))
    return f"{value:.2g}" if row["unit"] != "ulp" else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def show(rows):
    from fastmix.bench import screen  # rich, which `python -m fastmix` does without

    cells = [[_cell(row, column) for column in COLUMNS] for row in rows]
    screen.table(COLUMNS, cells, ERRORS, styles=[None if row[-1] == "ok" else "bold red" for row in cells])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m fastmix.bench.numerics", description=__doc__.splitlines()[0])
    known = {name_of(dtype): dtype for dtype in DTYPES}
    parser.add_argument("--case", default="", help="only cases whose name, after their op's, contains this: mix, box, upstream")
    parser.add_argument("--first", action="store_true", help="only the first case of each op and kind of target")
    parser.add_argument("--dtype", nargs="+", choices=known, default=list(known), help="only these (default: all)")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--interpreter", action="store_true", help="the kernels in Triton's interpreter as well; small shapes")
    parser.add_argument("--json", help="also write the rows to this file")
    given = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(given)
    cases = [name for name, op in CASES.items() if options.case in f"{op.name} {name}"]
    cases = first_cases(cases) if options.first else cases
    if not cases:
        parser.error(f"--case: expected part of one of {', '.join(CASES)}; got {options.case!r}")
    # Triton reads this when it is imported, which it is by now
    if options.interpreter and os.environ.get("TRITON_INTERPRET") != "1":
        command = [sys.executable, "-m", "fastmix.bench", "numerics", *given]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    where, missing = backends(options.interpreter)
    if missing and options.interpreter:
        parser.error(f"--interpreter: {missing}")

    small, dtypes = options.small or options.interpreter, [known[name] for name in options.dtype]
    asked, apart = (cases, small, options.interpreter), torch.cuda.is_available() and len(dtypes) > 1
    rows, problems = rows_by_process(dtypes, *asked) if apart else (rows_of(dtypes, *asked), [])
    show(rows)
    broken, further = (sum(row["verdict"].startswith(text) for row in rows) for text in ("BEYOND", "further"))
    print(f"{len(rows)} rows: {broken} beyond the limit, {further} within it but further from the truth than eager torch.")
    print(CLOSING)
    if small:
        print("Shapes are smaller than their names say.")
    if options.interpreter:
        print("bfloat16 is left out in the interpreter, which truncates to it where hardware rounds.")
    if missing:
        print(f"The kernels were left out. {missing}")
    for problem in problems:
        print(problem)
    if options.json:
        names = [torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU" for _, device in where]
        about = {"command": " ".join(["python -m fastmix.bench numerics", *given]), "where": ", ".join(dict.fromkeys(names))}
        about |= {"fastmix": fastmix.__version__, "torch": torch.__version__}
        write(pathlib.Path(options.json), finite({**about, "rows": rows}))
    return int(bool(broken or problems))


if __name__ == "__main__":
    sys.exit(main())
