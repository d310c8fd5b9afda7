"""Adversarial Mixing Policy: the mixing coefficient is moved where the loss is larger, and the model learns from there."""

import contextlib
import math
import numbers
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from . import _check
from ._dtypes import FLOATS, WEIGHT_DTYPES, accumulator

SCALE = 1024.0  # of the lambda gradient on its way through float16; a power of 2, so exact in every other dtype


def adversarial_mixing_loss(
    losses: Callable[[torch.Tensor], torch.Tensor],
    lam: torch.Tensor,
    *,
    step_size: float,
    max_step: float | None = None,
    clamp: bool = True,
    gradient: str = "sample",
    reweight: Callable[[torch.Tensor], torch.Tensor] | None = None,
    strategy: str = "keep",
    model: nn.Module | None = None,
) -> torch.Tensor:
    """Min-max-rand: each row learns from the larger of two losses, at the lambda that was drawn and at one moved uphill.

        l0 = losses(lam)                                                        rand
        g = d(sum of l0) / d lam
        lam' = clamp(lam + clip(step_size * g, -max_step, max_step), 0, 1)      max
        l1 = losses(lam')                                                       min
        loss = mean(w * where(l1 > l0, l1, l0))                                 w = reweight(l1 - l0), or 1

    The step to lam' forms no gradient of a parameter (but inside one operation of torch's that has them all together, as LSTMs
    on the CPU have), nor of anything below the place where lam enters. Its gradient passes float16 multiplied by 1024 and is
    divided by it in float32 or float64, so it does not underflow there; where it is not finite, as in float16 where a row's
    loss has a derivative beyond 64 to its hidden state or another value on the way, lam' stays lam. Every row is moved, so draw
    with `prob=1`: one that was left at lam 1 would be mixed with its partner. The loss is a constant in lam itself; where
    images are mixed, `loss.backward(inputs=list(model.parameters()))` spares the first layer a gradient to them that nothing
    needs. Random numbers (dropout) are the same in every pass, and afterwards those of the CPU and of lam's and the model's
    devices stand as after one. Works under autocast, with a GradScaler, accumulated gradients (nothing but the returned loss's
    backward touches `.grad`) and `torch.utils.checkpoint` with `use_reentrant=False`; torch refuses the other kind. In a step
    under `torch.compile` it runs between programs, and `step_size` and `max_step` may change without further ones; not under
    `fullgraph=True`, since torch traces neither random states nor `torch.autograd.grad`: compile the model alone then.

    Args:
        losses: a function of lam that gives the losses of the rows `[N]`. lam enters where the batch is mixed (`fastmix.mix`,
            `fastmix.mix_hidden`, an expression of your own); the target's weights stay those of the lambda that was drawn: make
            the target outside of the function. It is called two or three times and must do the same each time; draw nothing in
            it from a generator of your own (samplers with a seed).
        lam: a float, a 0-d tensor or `[N]`, float32 or float64: what was drawn. `losses` is given a tensor of the same
            shape. (A host scalar makes a GPU's host wait: pass a tensor of its device.)
        step_size: how far uphill, at least 0, per unit of gradient.
        max_step: the most that lam is moved, or None.
        clamp: lam' stays in [0, 1]; the authors' code does not clamp.
        gradient: `"sample"`, each row moves by its own loss's gradient; `"mean"`, by the mean loss's, as in the authors'
            code, which is 1/N of it.
        reweight: a function of the increases `l1 - l0` `[N]` that gives each row's weight, a `MovingAverageReweight`; or None.
        strategy: `"keep"` keeps the graphs of both passes; by products counted 2.33 plain steps. `"recompute"` makes l1 without one,
            and then a pass at each row's kept lambda (of shape `[N]`); 2.0 plain steps, and the memory of one. The two are equal only
            where the rows of a batch do not meet: not under batch normalisation in training, where a row's loss depends on
            the others' lambdas.
        model: its normalisation statistics (of batch norm, and of instance norm that tracks them) are moved by the first pass
            alone, at the lambda that was drawn. Without it, or for other modules, by each pass. (Those of a checkpointed part
            once more for each pass that the loss's backward runs again: one, as in a plain step, or both of `"keep"`.)

    Returns:
        The loss, a 0-d float32 (or float64) tensor. NaN where there are no rows.

    Raises:
        TypeError, ValueError: a wrong argument, losses that are not `[N]`, or that do not depend on lam.
        RuntimeError: within `torch.inference_mode()`.

    Source: "Adversarial Mixing Policy for Relaxing Locally Linear Constraints in Mixup", arXiv:2109.07177.

    >>> import torch, fastmix
    >>> model, mixup = torch.nn.Linear(4, 3), fastmix.Mixup(alpha=1.0)
    >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
    >>> m = mixup.sample(x)
    >>> target = m.target(y)
    >>> def losses(lam):
    ...     logits = model(fastmix.mix(x, lam, m.index))
    ...     return fastmix.soft_cross_entropy(logits, target, reduction="none")
    >>> loss = fastmix.adversarial_mixing_loss(losses, m.lam, step_size=0.002, model=model)
    >>> loss.backward()

    In a hidden layer (of words, the input of the encoder; of sentences, that of the classifier):

    >>> encoder, head = torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)
    >>> def losses(lam):
    ...     with fastmix.mix_hidden(head, lam, m.index):
    ...         logits = head(encoder(x))
    ...     return fastmix.soft_cross_entropy(logits, target, reduction="none")
    >>> fastmix.adversarial_mixing_loss(losses, m.lam, step_size=0.002).backward()
    """
    lam = _lambda(lam)
    step_size, max_step = _size("step_size", step_size), math.inf if max_step is None else _size("max_step", max_step)
    if not isinstance(clamp, bool):
        raise _check.wrong(TypeError, "clamp", "a bool", clamp)
    _check.one_of("gradient", gradient, ("sample", "mean"), "'sample' or 'mean'")
    _check.one_of("strategy", strategy, ("keep", "recompute"), "'keep' or 'recompute'")
    for name, value in (("losses", losses), ("reweight", reweight)):
        if not callable(value) and not (name == "reweight" and value is None):
            raise _check.wrong(TypeError, name, "a function" + " or None" * (name == "reweight"), value)
    if model is not None and not isinstance(model, nn.Module):
        raise _check.wrong(TypeError, "model", "an nn.Module or None", model)
    limits: tuple[Any, Any] = step_size, max_step
    if torch.compiler.is_compiling():
        # tensors: a float that lives on beyond this program would be a constant of the next ones, and compiled anew
        one = torch.ones((), dtype=lam.dtype, device=lam.device)
        limits = one.mul(step_size), one.mul(max_step)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("adversarial_mixing_loss: torch.inference_mode() has no gradient to lam; use torch.no_grad()")

    passes = _Passes(lam, model)
    with passes.first(), torch.enable_grad():
        leaf = lam.clone().requires_grad_()
        l0 = _row_losses(losses(leaf), lam)
    g = _lambda_gradient(l0, leaf, strategy == "keep" and torch.is_grad_enabled())
    moved = _moved(lam, g / max(len(l0), 1) if gradient == "mean" else g, *limits, clamp)
    with passes.another(), torch.set_grad_enabled(strategy == "keep" and torch.is_grad_enabled()):
        l1 = _row_losses(losses(moved), lam, len(l0))
    larger = l1 > l0
    w = None if reweight is None else _weights(reweight((l1 - l0).detach()), l0)
    if strategy == "keep":
        kept = torch.where(larger, l1, l0)
    else:
        del l0, l1  # and what the first pass has saved
        with passes.another():
            kept = _row_losses(losses(torch.where(larger, moved, lam)), lam, len(larger))
    passes.finish()
    return (kept if w is None else w * kept).mean()


def _lambda(lam: torch.Tensor) -> torch.Tensor:
    if not isinstance(lam, torch.Tensor):
        if isinstance(lam, bool) or not isinstance(lam, numbers.Real):
            raise _check.wrong(TypeError, "lam", "a float, or a float32 or float64 tensor", lam)
        return torch.tensor(float(lam))
    _check.strided("lam", lam, WEIGHT_DTYPES, "a float, or a float32 or float64 tensor (lower precision would round it)")
    if lam.dim() > 1:
        raise _check.wrong(ValueError, "lam", "a float, a 0-d tensor or shape [N]", lam)
    return lam.detach()


def _size(argument: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _check.wrong(TypeError, argument, "a number of at least 0", value)
    if not 0 <= value < math.inf:
        raise _check.wrong(ValueError, argument, "a finite number of at least 0", value)
    return float(value)


def _row_losses(losses: torch.Tensor, lam: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """Checks for per-row losses [N], N being the number of lambdas (or of losses before)."""
    rows = lam.shape[0] if lam.dim() else rows
    if not isinstance(losses, torch.Tensor) or losses.dtype not in FLOATS:
        raise _check.wrong(TypeError, "losses(lam)", "a floating tensor [N]", losses)
    if losses.dim() != 1 or (rows is not None and losses.shape[0] != rows):
        expected = f"shape [{'N' if rows is None else rows}], a loss for each row (reduction='none')"
        raise _check.wrong(ValueError, "losses(lam)", expected, losses)
    return losses.to(accumulator(losses.dtype))


def _lambda_gradient(l0: torch.Tensor, leaf: torch.Tensor, keep_graph: bool) -> torch.Tensor:
    """Returns d(sum of l0) / d lam, of lam's dtype and shape."""
    g = None
    if l0.requires_grad:
        upstream = torch.full_like(l0, SCALE)
        (g,) = torch.autograd.grad(l0, leaf, upstream, retain_graph=keep_graph, allow_unused=True)
    if g is None:
        raise ValueError(
            "losses: expected losses that depend on lam (mixed by it in losses(lam)), got ones without a gradient to it"
        )
    return g / SCALE


def _moved(lam: torch.Tensor, g: torch.Tensor, step_size: float, max_step: float, clamp: bool) -> torch.Tensor:
    step = torch.where(torch.isfinite(g), step_size * g, 0)
    step = step.clamp(-max_step, max_step)
    return (lam + step).clamp(0, 1) if clamp else lam + step


def _weights(w: Any, losses: torch.Tensor) -> Any:
    if not isinstance(w, torch.Tensor) or w.shape != losses.shape:
        raise _check.wrong(ValueError, "reweight(increases)", f"a tensor of shape {list(losses.shape)}", w)
    return w.detach()


class _Passes:
    """Passes through the model of which only the first leaves traces. All draw the same random numbers. Each updates a copy of the
    normalisation statistics, and `finish` keeps the first pass's copy. The graphs have saved the copies, so nothing that they
    saved changes."""

    def __init__(self, lam: torch.Tensor, model: torch.nn.Module | None) -> None:
        modules = [] if model is None else list(model.modules())
        self.norms = [m for m in modules if isinstance(m, _NormBase) and m.training]
        self.devices = {lam.device, *(t.device for m in modules for t in m.parameters(recurse=False))}
        if torch.cuda.is_initialized():
            self.devices.add(torch.device("cuda", torch.cuda.current_device()))

    @contextlib.contextmanager
    def first(self) -> Iterator[Any]:
        self.before = _random_states(self.devices)
        with self._copied_statistics() as self.moved:
            yield
        self.after = _random_states(self.devices)

    @contextlib.contextmanager
    def another(self) -> Iterator[Any]:
        _set_random_states(self.before)
        try:
            with self._copied_statistics():
                yield
        finally:
            _set_random_states(self.after)

    def finish(self) -> None:
        for norm, moved in zip(self.norms, self.moved, strict=True):
            for name, value in moved.items():
                buffer: Any = norm._buffers[name]
                buffer.data.copy_(value)  # through .data, as norms do: a graph that has saved the buffer stays valid

    @contextlib.contextmanager
    def _copied_statistics(self) -> Iterator[Any]:
        """Puts copies in the place of the norms' statistics; yields them, a {name: tensor} for each norm."""
        originals = [{name: t for name, t in norm._buffers.items() if t is not None and not is_lazy(t)} for norm in self.norms]
        copies = [{name: t.clone() for name, t in buffers.items()} for buffers in originals]
        try:
            for norm, buffers in zip(self.norms, copies, strict=True):
                norm._buffers.update(buffers)
            yield copies
        finally:
            for norm, buffers in zip(self.norms, originals, strict=True):
                norm._buffers.update(buffers)


def _random_states(devices: set[torch.device]) -> list[Any]:
    """Returns [(torch or a device module of torch, device or None, state of its generator)]."""
    states: list[Any] = [(torch, None, torch.get_rng_state())]
    for device in devices:
        if device.type not in ("cpu", "meta"):
            module = torch.get_device_module(device)
            states.append((module, device, module.get_rng_state(device)))
    return states


def _set_random_states(states: list[Any]) -> None:
    for module, device, state in states:
        module.set_rng_state(*((state,) if device is None else (state, device)))


class MovingAverageReweight(nn.Module):
    """Weights of rows whose loss an adversarial step has increased by more than usual.

        w = 1 + (increase - mean) / std        of a row whose increase is above the mean
        w = 1                                  of every other row

    mean and the unbiased std are those of the positive increases of the last `window` calls, this one included. With fewer than
    two of them, or all of one value, every w is 1 (the authors' code gives NaN for the whole batch); increases that are not
    finite do not count, and weigh 1. Rounding does: of a row that is its own partner, where one lambda of the batch is moved.
    What it remembers is in its `state_dict()`. Nothing waits for the device.

    Args:
        window: how many calls, at least 1.

    Raises:
        TypeError, ValueError: a wrong argument.

    Source: the authors' code of arXiv:2109.07177.

    >>> import torch, fastmix
    >>> reweight = fastmix.MovingAverageReweight(window=5)
    >>> reweight(torch.tensor([1.0, 2.0, 6.0, -1.0]))
    tensor([1.0000, 1.0000, 2.1339, 1.0000])
    """

    _recent: deque[torch.Tensor]

    @property
    def window(self) -> int:
        """How many calls are remembered; a smaller number forgets the oldest."""
        return self._recent.maxlen or 0

    @window.setter
    def window(self, value: int) -> None:
        self._recent = deque(self._recent, maxlen=_check.integer("window", value, 1, "an int of at least 1"))

    def __init__(self, window: int = 5) -> None:
        super().__init__()
        self._recent = deque()
        self.window = window

    def forward(self, increases: torch.Tensor) -> torch.Tensor:
        """The weights `[N]` of increases `[N]`, in their dtype (float32 of narrower ones); without a gradient."""
        _check.float_tensor("increases", increases, 1, "[N]")
        if increases.dim() != 1:
            raise _check.wrong(ValueError, "increases", "shape [N]", increases)
        now = increases.detach().to(accumulator(increases.dtype), copy=True)
        self._recent.append(now)
        recent = torch.cat([past.to(now.device, now.dtype) for past in self._recent])
        counts = (recent > 0) & torch.isfinite(recent)
        number = counts.sum()
        mean = torch.where(counts, recent, 0).sum() / number
        std = (torch.where(counts, recent - mean, 0).square().sum() / (number - 1)).sqrt()
        unlike = std > 16 * torch.finfo(now.dtype).eps * mean  # by more than the mean's rounding; not where there is no std
        large = (now > mean) & torch.isfinite(now) & unlike
        return torch.where(large, 1 + (now - mean) / std, 1)

    def get_extra_state(self) -> list[torch.Tensor]:
        return list(self._recent)

    def set_extra_state(self, state: Any) -> None:
        if not isinstance(state, (list, tuple)) or not all(
            isinstance(past, torch.Tensor) and past.dim() == 1 for past in state
        ):
            raise _check.wrong(TypeError, "state", "a list of tensors [N]", state)
        self._recent = deque(state, maxlen=self.window)

    def extra_repr(self) -> str:
        return f"window={self.window}"
