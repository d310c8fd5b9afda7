"""What the recipes share: runs that may be killed at any moment and go on with the same bits, objectives, tables and pictures."""

import argparse
import hashlib
import importlib.util
import json
import os
import pickle
import platform
import statistics
import subprocess
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastmix
from fastmix import _backend

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
COLORS = "#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
SAVE_SECONDS = 2.0  # between checkpoints of a run

criterion = fastmix.SoftCrossEntropyLoss()


# Objectives: modules, so that their generators are saved with a run. (model, x, y) -> loss


class Mixed(nn.Module):
    """The loss on `mixer(x, y)`; without a mixer on x and y as they are."""

    def __init__(self, mixer=None, *, smoothing=0.0):
        super().__init__()
        self.mixer, self.smoothing = mixer, smoothing

    def forward(self, model, x, y):
        if self.mixer is not None:
            x, y = self.mixer(x, y)
        return fastmix.soft_cross_entropy(model(x), y, label_smoothing=self.smoothing)


class MixedInside(nn.Module):
    """The loss where a `ManifoldMixup` mixes the input of one of the model's modules."""

    def __init__(self, manifold):
        super().__init__()
        self.manifold = manifold

    def forward(self, model, x, y):
        with self.manifold(x, y) as (x, target):
            return criterion(model(x), target)


class Adversarial(nn.Module):
    """Adversarial Mixing Policy (arXiv:2109.07177) where a `ManifoldMixup` mixes. `inside`: options of `fastmix.mix_hidden`;
    the others are those of `fastmix.adversarial_mixing_loss`; a `reweight` that is a module is saved with the run."""

    def __init__(self, manifold, *, inside=None, reweight=None, **options):
        super().__init__()
        self.manifold, self.inside, self.reweight, self.options = manifold, inside or {}, reweight, options

    def forward(self, model, x, y):
        mix, layer = self.manifold.sample(x, y), self.manifold.choose()
        target = mix.target(y)

        def losses(lam):
            if layer is None:
                logits = model(fastmix.mix(x, lam, mix.index))
            else:
                with fastmix.mix_hidden(layer, lam, mix.index, **self.inside):
                    logits = model(x)
            return fastmix.soft_cross_entropy(logits, target, reduction="none")

        return fastmix.adversarial_mixing_loss(losses, mix.lam, model=model, reweight=self.reweight, **self.options)


# One run


class Fit:
    """The training of a model, epoch by epoch: what it does next depends on `state()` alone.

    Args:
        seed: of the order of the rows; the caller has seeded torch for the model's weights and whatever it draws.
        x, y: the training set.
        objective: an `nn.Module` (model, x, y) -> loss.
        evaluate: model -> {what: number}, kept for every epoch.
        optimizer, schedule: as torch's; the schedule is stepped after every batch.
    """

    def __init__(self, seed, model, objective, x, y, *, batch, optimizer, evaluate, schedule=None):
        self.model, self.objective, self.x, self.y, self.batch = model, objective, x, y, batch
        self.optimizer, self.schedule, self.evaluate = optimizer, schedule, evaluate
        self.order = torch.Generator().manual_seed(seed)
        self.curve, self.seconds = [], []

    def epoch(self):
        self.model.train()
        rows = torch.randperm(len(self.x), generator=self.order).to(self.x.device).split(self.batch)
        start = clock(self.x.device)
        for some in rows:
            loss = self.objective(self.model, self.x[some], self.y[some])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
        self.seconds.append((clock(self.x.device) - start) / len(rows))
        self.model.eval()
        with torch.no_grad():
            self.curve.append(self.evaluate(self.model))

    def _parts(self):
        parts = {"model": self.model, "objective": self.objective, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part for name, part in parts.items() if part is not None}

    def state(self):
        state = {name: part.state_dict() for name, part in self._parts().items()}
        random = [torch.get_rng_state(), self.order.get_state()]
        random += [torch.cuda.get_rng_state(self.x.device)] if self.x.is_cuda else []
        return {**state, "random": random, "curve": self.curve, "seconds": self.seconds}

    def load(self, state):
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"][0].cpu())
        self.order.set_state(state["random"][1].cpu())
        if self.x.is_cuda:
            torch.cuda.set_rng_state(state["random"][2].cpu(), self.x.device)
        self.curve, self.seconds = state["curve"], state["seconds"]

    def result(self):
        """The last epoch's numbers, each one's curve, and a digest of the weights."""
        weights = b"".join(t.detach().cpu().numpy().tobytes() for t in self.model.state_dict().values())
        curves = {f"{name} by epoch": [numbers[name] for numbers in self.curve] for name in self.curve[-1]}
        return {**self.curve[-1], "weights_sha256": hashlib.sha256(weights).hexdigest(), **curves}


class Runs:
    """The runs of a recipe, in a folder. What is there of an interrupted call with the same settings is taken over: whole runs,
    and of the one that was broken off its last checkpoint.

    Args:
        out: the folder; the unfinished part is in `out/unfinished`.
        settings: what a run depends on, as JSON, beside the data and the code.
        data: the tensors or arrays that it learns from and is tested on, nested in dicts, lists and tuples.
        epochs: of all runs together, for the progress bar.

    Raises:
        SystemExit: the folder holds the unfinished runs of other settings.
    """

    def __init__(self, out, settings, epochs, console, data=()):
        self.console, self.total, self.device = console, epochs, torch.device(settings["device"])
        self.folder = Path(out) / "unfinished"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._alone = alone(self.folder)
        about = self.folder / "settings.json"
        settings = {**settings, **environment(self.device), "data": digest(data), "recipes": digest(_sources())}
        if about.exists() and (there := read(about)) != settings:
            there = there if isinstance(there, dict) else {}
            other = ", ".join(key for key in settings if there.get(key) != settings[key]) or "what is kept"
            self._alone.close()
            raise SystemExit(
                f"{self.folder} holds an unfinished call with other settings ({other}). Repeat that call to finish it, pass "
                "another --out, or remove the folder."
            )
        write(about, settings)
        if list(self.folder.glob("*.pt")):
            done = len(list(self.folder.glob("*.done.pt")))
            console.print(f"Going on with an interrupted call: {done} of its runs were done.\n")

    def __enter__(self):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        shown = self.console.is_terminal
        self._progress = Progress(*columns, console=self.console, disable=not shown, transient=True)
        self._progress.__enter__()
        self._task = self._progress.add_task("", total=self.total)
        return self

    def __exit__(self, *raised):
        self._progress.__exit__(*raised)
        if raised[0] is not None:  # somebody else may go on
            self._alone.close()

    def seeds(self, first, count, names):
        """The seeds of a study, one after the other. Says which one comes, and what is trained, where there is no progress bar."""
        for seed in range(first, first + count):
            if not self.console.is_terminal:
                self.console.print(f"Training with seed {seed} ({seed - first + 1} of {count}): {', '.join(names)}")
            yield seed

    def run(self, name, seed, epochs, make):
        """(trained model, result, seconds per step of each epoch) of `make()`, a `Fit`."""
        self._progress.update(self._task, description=f"epochs: {name}, seed {seed}")
        stem = "".join(c if c.isalnum() else "-" for c in f"{name}-{seed}")
        done, checkpoint = self.folder / f"{stem}.done.pt", self.folder / f"{stem}.pt"
        with repeatable(seed, self.device):
            fit = make()
            if (kept := loaded(done, self.device)) is not None:
                fit.model.load_state_dict(kept["model"])
                self._progress.advance(self._task, epochs)
                return fit.model, kept["result"], kept["seconds"]
            if (state := loaded(checkpoint, self.device)) is not None:
                fit.load(state)
                self._progress.advance(self._task, len(fit.curve))
            saved = time.monotonic()
            while len(fit.curve) < epochs:
                fit.epoch()
                self._progress.advance(self._task)
                if time.monotonic() - saved > SAVE_SECONDS:
                    save(checkpoint, fit.state())
                    saved = time.monotonic()
        result = {"seed": seed, **fit.result()}
        save(done, {"model": fit.model.state_dict(), "result": result, "seconds": fit.seconds})
        checkpoint.unlink(missing_ok=True)
        return fit.model, result, fit.seconds

    def finish(self, *written):
        """Forgets what was kept, so that the next call starts anew, and names the files beside it."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "settings.json"):
            path.unlink()
        self.folder.rmdir()
        self._alone.close()
        self.console.print(f"Written to {self.folder.parent}: {', '.join(written)}", soft_wrap=True)


def alone(folder):
    """A file that no other process can open so while this one has it open. SystemExit where one has."""
    file = open(folder / "lock", "w")  # noqa: SIM115 - for as long as the recipe runs
    try:
        import fcntl
    except ImportError:  # not on Windows, where two calls are not told of each other
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise SystemExit(f"{folder} is in use by another call. Wait for it, or pass another --out.") from None
    return file


def digest(content):
    """A hash of tensors, arrays, bytes and what they are nested in."""
    found = hashlib.sha256()

    def take(value):
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, (list, tuple)):
            for inner in value:
                take(inner)
        else:
            value = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
            found.update(value if isinstance(value, bytes) else repr(value).encode() if not hasattr(value, "dtype") else
                         f"{value.dtype}{value.shape}".encode() + value.tobytes())  # fmt: skip

    take(content)
    return found.hexdigest()


def _sources():
    """The recipes' own code: their constants are in it."""
    return [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]


def read(path):
    """JSON, or None where it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def loaded(path, device):
    """What was saved there, or None where nothing was, or nothing whole."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        path.unlink()
        return None


def train_all(args, recipe, methods, console, data):
    """({method: results}, {method: seconds per step}, the last model of each, the `Runs` to finish) of methods (seed, epochs)
    -> Fit, which take turns seed by seed."""
    results, seconds, models = ({name: [] for name in methods} for _ in range(3))
    settings = {
        "recipe": recipe,
        "seeds": args.seeds,
        "epochs": args.epochs,
        "methods": list(methods),
        "device": str(args.device),
    }
    with Runs(args.out, settings, args.seeds * args.epochs * len(methods), console, data) as runs:
        for seed in runs.seeds(0, args.seeds, methods):
            for name, make in methods.items():
                models[name], result, took = runs.run(name, seed, args.epochs, partial(make, seed, args.epochs))
                results[name].append(result)
                seconds[name] += took
    return results, {name: statistics.median(took) for name, took in seconds.items()}, models, runs


@contextmanager
def whole(path):
    """A path to write to, which takes the place of `path` once it is written: nobody ever sees half of a file."""
    unfinished = path.with_name(path.name + ".part")
    yield unfinished
    os.replace(unfinished, path)


def save(path, state):
    with whole(path) as unfinished:
        torch.save(state, unfinished)


def write(path, content):
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")


def environment(device):
    backend = _backend.name(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"fastmix": fastmix.__version__, "torch": torch.__version__, "device": name, "backend": backend}


def processor():
    """The name of the CPU's model, or of its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def commit():
    """(the checkout's commit or None, whether it has changes on top)"""
    root = Path(__file__).parents[2]

    def git(*arguments):
        return subprocess.check_output(["git", *arguments], cwd=root, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root.resolve():
            return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        pass
    return None, None


@contextmanager
def one_thread():
    """One CPU thread inside the block: sums depend on their number, and clocks on who else wants the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def repeatable(seed, device):
    """This seed and deterministic algorithms inside the block; the caller's random state and settings after it."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses matmul in this mode
    mode = torch.get_deterministic_debug_mode()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)


def clock(device):
    """Seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def error_and_loss(logits, y):
    """The numbers of an evaluation by the criterion of training, on class indices."""
    error = 100 * (logits.argmax(1) != y).sum().item() / len(y)
    return {"test_error_percent": error, "test_loss": criterion(logits, y).item()}


# The command line


def parser(recipe, description, *, out, seeds, epochs, data=None, small=2):
    """The options that every recipe has."""
    made = argparse.ArgumentParser(prog=f"python -m fastmix.recipes.{recipe}", description=description)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = [
        ("--seeds", int, seeds, "runs of each method"),
        ("--epochs", int, epochs, "passes over the training set"),
        ("--out", Path, out, "folder for results; an interrupted call is gone on with there"),
        ("--device", device_that_works, device, "where to run"),
    ]
    options += [("--data", Path, data[0], data[1])] if data else []
    for name, kind, default, text in options:
        made.add_argument(name, type=kind, default=default, help=f"{text} (default: %(default)s)")
    made.add_argument("--small", action="store_true", help="one seed and few epochs, in half a minute: to see that it runs")
    made.set_defaults(small_epochs=small)
    return made


def device_that_works(name):
    try:
        torch.ones(1, device=name).item()
    except Exception as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def parsed(made, argv, needs=NEEDS):
    args = made.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with whole(args.out / "results.json.probe") as probe:
            probe.write_text("")
        (args.out / "results.json.probe").unlink()
    except OSError as error:
        made.error(f"--out: cannot write to {args.out}: {error.strerror}")
    if args.small:
        args.seeds, args.epochs = 1, min(args.epochs, args.small_epochs)
    if args.seeds < 1 or args.epochs < 1:
        made.error("--seeds and --epochs: expected at least 1")
    missing = ", ".join(name for module, name in needs.items() if importlib.util.find_spec(module) is None)
    if missing:
        install = 'pip install "fastmix[recipes]" (from a checkout: pip install -e ".[recipes]")'
        made.error(f"this recipe also needs {missing}: {install}")
    return args
