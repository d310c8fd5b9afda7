"""Mixing inside a model: at the input of any of its modules, by a forward pre-hook."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from . import _check, _checkpoints
from ._dtypes import FLOATS
from .sampling.axes import box_fraction
from .sampling.base import Sampler, one_of
from .sampling.labels import MISSING, check_given
from .sampling.plan import Mix
from .sampling.samplers import Mixup

MASKS = ("ignore", "attend")


class mix_hidden(_checkpoints.Block):  # noqa: N801 - a context manager, named as the functions are
    """Mixes the rows of a hidden state: while open, the first tensor argument of `module` is mixed before the module sees it.

        h -> fastmix.mix(h, lam, index)        at every call of the module

    Gradients go to both sources and to lam, as from `fastmix.mix`. The first tensor is the first positional one, or where there
    is none the first keyword one in the order of the module's `forward` (keywords named in `masks` do not count). Everything
    else is passed on as it is: also the initial state of an LSTM; of `nn.MultiheadAttention` only the query is mixed. A module
    that is called twice is mixed at both calls, and contexts inside each other mix one after the other, the outer one first;
    the same object cannot be opened inside itself, but again afterwards. Hooks are removed whatever happens.

    Args:
        module: an `nn.Module`, or a sequence of them (each is mixed; `()` where masks alone are to be joined).
        lam, index: as for `fastmix.mix`; or a `fastmix.Mix` in place of both.
        dim: the dimension of the hidden state that the rows of the batch are in: 1 for `[L, N, D]`, the default of
            `nn.Transformer` and of LSTMs.
        masks: `{name: kind}` of tensor arguments `[N, ...]` that say which positions exist: two rows that are mixed attend to
            every position that either has (a union); a row that is taken as it is (lam 0 or 1, a box that covers it) keeps the
            mask of its source; of a `Mix` that is `within` sizes each row keeps its own. The kind says what a bool means: `"ignore"`, True is a position that is masked out, as in
            torch's `key_padding_mask`; `"attend"`, True (or 1) is one that is, as in Hugging Face's `attention_mask`. A mask of
            floats that is added to the scores (0 or -inf) is recognised as such under either. A mask that is None stays None.
        mask_modules: the modules whose masks are joined, in a sequence; default: those that are mixed. Layers after the mixed
            one see its rows too: name them all; but of modules that hand their mask on to each other only the first.

    Raises:
        TypeError, ValueError: a wrong argument; at the module's call, a first argument that is not a floating tensor `[N, ...]`,
            or is packed (mix before `pack_padded_sequence`), or nested (`nn.TransformerEncoder(...,
            enable_nested_tensor=False)`).
        RuntimeError: at the end of the block, a module that was never called (its features would stay unmixed under a mixed
            target), unless an exception is on its way already; in it, the same object opened inside itself, or a
            module that is called within a checkpointed part of the model.

    **Checkpointing.** A part of a model that is run again in the backward is run outside the block. Either open it inside the
    checkpointed function; or pass `context_fn=mix_hidden.context_fn` to `torch.utils.checkpoint.checkpoint` (with
    `use_reentrant=False`), which opens it again with the same values, in every backward; a checkpoint around another needs it
    as well, and so does one under `no_grad`. Everything else of torch's checkpointing is refused; what others run again (a
    Function of their own) they have to open it for.

    **torch.compile.** Programs compiled with the block open mix, without another compilation for another lam. A program that was
    compiled outside does not look for hooks and so does not see them, which the end of the block refuses: compile in the
    block first, or set `torch._dynamo.config.skip_nnmodule_hook_guards = False`.

    Source: manifold mixup, arXiv:1806.05236; wordMixup and senMixup, arXiv:1905.08941; TMix, arXiv:2004.12239.

    >>> import torch, fastmix
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    >>> h, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    >>> lam, index = torch.tensor([0.7, 0.4]), torch.tensor([1, 0])
    >>> with fastmix.mix_hidden(
    ...     model.layers[2], lam, index, masks={"src_key_padding_mask": "ignore"}, mask_modules=model.layers[2:]
    ... ):
    ...     out = model(h, src_key_padding_mask=padding)
    >>> out.shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        lam: float | torch.Tensor | Mix,
        index: Any = None,
        *,
        dim: int = 0,
        masks: dict[str, str] | None = None,
        mask_modules: nn.Module | Sequence[nn.Module] | None = None,
    ) -> None:
        self._modules = _modules("module", module)
        if isinstance(lam, Mix):
            if index is not None:
                raise _check.wrong(ValueError, "index", "None beside a Mix, which has its own", index)
            self._mix = lam
        else:
            self._mix = Mix(lam, index)
        self._dim = _check.integer("dim", dim, 0, "a dimension of at least 0")
        if masks is not None and not isinstance(masks, dict):
            raise _check.wrong(TypeError, "masks", "{name of an argument: 'ignore' or 'attend'} or None", masks)
        self._masks = {name: one_of(f"masks[{name!r}]", kind, MASKS) for name, kind in (masks or {}).items()}
        if mask_modules is not None and not masks:
            raise _check.wrong(ValueError, "mask_modules", "None without masks", mask_modules)
        masked = self._modules if mask_modules is None else _modules("mask_modules", mask_modules)
        self._places = [(m, _places(m, self._masks)) for m in masked] if masks else []
        if not self._modules and not self._places:
            raise _check.wrong(ValueError, "module", "at least one, or mask_modules", module)
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        if self._handles:
            raise RuntimeError("mix_hidden: this context is open already; one inside it needs a mix_hidden of its own")
        self._called = [False] * len(self._modules)
        self._seen = dict.fromkeys(self._masks, False)
        self._open()

    def __exit__(self, kind: type | None, value: Any, traceback: Any) -> None:
        self._close()
        if kind is None and not all(self._called):
            names = ", ".join(_name(m) for m, called in zip(self._modules, self._called, strict=True) if not called)
            raise RuntimeError(
                f"mix_hidden: never called while it was open, so nothing was mixed there: {names}. (A program that torch.compile "
                "or torch.jit.trace made outside of the block does not see it.)"
            )
        if kind is None and not all(self._seen.values()):
            names = ", ".join(name for name, seen in self._seen.items() if not seen)
            raise RuntimeError(
                f"mix_hidden: no module was given these masks while it was open, so they were not joined: {names}"
            )

    def _hook(self) -> None:
        try:
            for k, module in enumerate(self._modules):
                self._handles.append(module.register_forward_pre_hook(self._mixing(k), with_kwargs=True))
            for module, places in self._places:
                self._handles.append(module.register_forward_pre_hook(self._joining(places), with_kwargs=True))
        except BaseException:
            self._unhook()
            raise

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _mixing(self, k: int) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
            if self._is_reopened():
                return None
            self._called[k] = True
            self._refuse_checkpoint(module)
            at = _first(module, args, kwargs, self._masks)
            if isinstance(at, str):
                return args, {**kwargs, at: self._mixed(module, kwargs[at])}
            return (*args[:at], self._mixed(module, args[at]), *args[at + 1 :]), kwargs

        return hook

    def _mixed(self, module: torch.nn.Module, h: Any) -> torch.Tensor:
        argument, rows = f"first tensor argument of {_name(module)}", self._mix.index.shape[0]
        if isinstance(h, PackedSequence) or h.is_nested or not h.is_floating_point():
            expected = "a floating tensor (mix words at the module after the embedding, and sequences before they are packed; "
            expected += "make nn.TransformerEncoder with enable_nested_tensor=False)"
            raise _check.wrong(TypeError, argument, expected, h)
        if h.dim() <= self._dim or h.shape[self._dim] != rows:
            raise _check.wrong(ValueError, argument, f"{rows} rows in dimension {self._dim}", h)
        return self._mix.apply(h) if self._dim == 0 else self._mix.apply(h.transpose(0, self._dim)).transpose(0, self._dim)

    def _refuse_checkpoint(self, module: torch.nn.Module) -> None:
        if self._refuses():
            raise RuntimeError(
                f"mix_hidden: {_name(module)} is called within a checkpointed part of the model, which runs again in the backward, "
                "outside this block. Open the block inside the checkpointed function, or checkpoint with use_reentrant=False "
                "and context_fn=fastmix.mix_hidden.context_fn"
            )

    def _joining(self, places: dict[str, Any]) -> Callable[..., Any]:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            if self._is_reopened():
                return None
            args, kwargs = list(args), dict(kwargs)
            for name, at in places.items():
                holder, key = (kwargs, name) if name in kwargs else (args, at)
                if holder is kwargs or (at is not None and at < len(args)):
                    self._seen[name] = True
                    self._refuse_checkpoint(module)
                    holder[key] = self._joined(name, holder[key])
            return tuple(args), kwargs

        return hook

    def _joined(self, name: str, mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None:
            return None
        if self._mix._within is not None:  # each row keeps its extent
            return mask
        kind, index = self._masks[name], self._mix.index
        if not isinstance(mask, torch.Tensor) or (kind == "ignore" and mask.dtype not in (torch.bool, *FLOATS)):
            expected = "a bool tensor, or floats that are added" if kind == "ignore" else "a tensor"
            raise _check.wrong(TypeError, name, expected, mask)
        if mask.dim() < 2 or mask.shape[0] != index.shape[0]:
            raise _check.wrong(ValueError, name, f"shape [{index.shape[0]}, ...]", mask)
        partner = mask[index.clamp(0, max(len(index) - 1, 0))]  # mixing has made the row of a wrong index NaN already
        if mask.dtype == torch.bool:
            union = mask & partner if kind == "ignore" else mask | partner
        else:
            union = torch.maximum(mask, partner)
        own, other = (used.view(-1, *[1] * (mask.dim() - 1)) for used in _used(self._mix))
        return torch.where(own & other, union, torch.where(other, partner, mask))

    @staticmethod
    def context_fn() -> tuple[Any, Any]:
        """For `torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=mix_hidden.context_fn)`: the blocks that
        are open now are opened again when the part is run again.

        >>> import torch, fastmix
        >>> from torch.utils.checkpoint import checkpoint
        >>> layer, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
        >>> with fastmix.mix_hidden(layer, 0.6, torch.tensor([1, 0])):
        ...     out = checkpoint(layer, x, use_reentrant=False, context_fn=fastmix.mix_hidden.context_fn)
        >>> out.sum().backward()
        """
        return _checkpoints.context_fn()


def _modules(argument: str, value: Any) -> tuple[torch.nn.Module, ...]:
    """Returns a module, or a sequence of modules, as a tuple."""
    modules = tuple(value) if isinstance(value, (tuple, list, nn.ModuleList)) else (value,)
    if not all(isinstance(m, nn.Module) for m in modules):
        raise _check.wrong(TypeError, argument, "an nn.Module, or a sequence of them", value)
    if len({id(m) for m in modules}) < len(modules):
        raise _check.wrong(ValueError, argument, "each module once", value)
    return modules


def _name(module: torch.nn.Module) -> str:
    return type(module).__name__


def _places(module: torch.nn.Module, masks: dict[str, str]) -> dict[str, Any]:
    """Returns {name of a mask: its position among the arguments of the module's forward, or None if it is keyword-only}."""
    parameters = inspect.signature(module.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    positions = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name in masks:
        if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(f"masks: expected names of arguments of {_name(module)}.forward, got {name!r}")
    return {name: positions.index(name) if name in positions else None for name in masks}


def _first(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], masks: dict[str, str]) -> int | str:
    """Returns the position or the name of the first tensor among a module's arguments."""
    for at, value in enumerate(args):
        if isinstance(value, (torch.Tensor, PackedSequence)):
            return at
    for name in _in_order(module, kwargs):
        if name not in masks and isinstance(kwargs[name], (torch.Tensor, PackedSequence)):
            return name
    given = ", ".join(type(value).__name__ for value in (*args, *kwargs.values())) or "nothing"
    raise TypeError(f"arguments of {_name(module)}: expected a tensor to mix among them, got {given}")


def _in_order(module: torch.nn.Module, names: dict[str, Any]) -> list[str]:
    """Returns names of arguments in the order of the module's forward; names that it does not have come last."""
    try:
        parameters = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # of a built-in function
        return list(names)
    return [name for name in parameters if name in names] + [name for name in names if name not in parameters]


def _used(mix: Mix) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns whether each row of the mix uses its own values, and whether it uses its partner's: two bool tensors [N]."""
    rows = mix.index.shape[0]
    if mix.mask is not None:
        return (mix.mask != 0).flatten(1).any(1), (mix.mask != 1).flatten(1).any(1)
    lam = mix.lam if isinstance(mix.lam, torch.Tensor) else torch.full((), float(mix.lam), device=mix.index.device)
    lam = _check.moved(lam.detach(), mix.index.device, lam.dtype).expand(rows)
    own, other = lam != 0, lam != 1
    if mix.box is not None and mix._sizes is None:  # nothing has been mixed yet: whether boxes lie in it is not known
        start, stop = mix.box.chunk(2, 1)
        other = other | (start < stop).all(1)
    elif mix.box is not None:
        share = box_fraction(mix.box, mix._sizes, torch.float64)
        own, other = own & (share != 1), other | (share != 0)
    return own, other


class ManifoldMixup(Mixup):
    """Manifold mixup (arXiv:1806.05236): the batch is mixed at the input of one module, drawn anew for each batch.

        with manifold(x, y) as (x, target):
            loss = criterion(model(x), target)

    In the block the drawn module's input is mixed, as by `fastmix.mix_hidden`; where None is drawn it is x itself. Each module
    is as likely as the others. `manifold.eval()` is the identity: `(x, y)` as they are, and no hooks.

    Args:
        modules: a sequence of the model's modules, in whose inputs the batch may be mixed; None or `"input"` for x (the paper's
            layer 0), which is then floating. They stay the model's: they are no submodules of this one.
        alpha, per, prob, partner, label, seed, bandwidth: as for `fastmix.Mixup` (the paper: `per="batch"`). With a seed the module is drawn
            by a second count of batches, on the host, which `state_dict()` has too: nothing waits for a device. Without one it
            is drawn from torch's default generator of the CPU. A generator of the CPU given to the call draws both.
        dim, masks: as for `fastmix.mix_hidden`; `dim` is of the modules' inputs, x is `[N, ...]`.
        mask_modules: as there, in the order in which the model calls them: masks are joined from the drawn module on, in all of
            them if it is None or not among them.

    Raises:
        TypeError, ValueError: a wrong option; at the call, as `fastmix.Mixup`.
        RuntimeError: at the end of the block, as `fastmix.mix_hidden`. Under torch.compile each of the modules is a program of its
            own, compiled when it is first drawn; with None among the modules that needs
            `torch._dynamo.config.skip_nnmodule_hook_guards = False`: where the input is drawn the program has no hooks.

    >>> import torch, fastmix
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> manifold = fastmix.ManifoldMixup([None, model[1], model[2]], alpha=2.0, seed=0)
    >>> x, y = torch.randn(6, 4), torch.randint(3, (6,))
    >>> with manifold(x, y) as (mixed, target):
    ...     loss = fastmix.soft_cross_entropy(model(mixed), target)
    >>> loss.backward()
    """

    _fixed = ("seed", "layers")

    def __init__(
        self,
        modules: Sequence[nn.Module | str | None] | nn.ModuleList,
        alpha: float | tuple[float, float],
        *,
        per: str = "row",
        prob: float = 1.0,
        partner: str = "any",
        label: str = "proportional",
        seed: int | None = None,
        dim: int = 0,
        masks: dict[str, str] | None = None,
        mask_modules: nn.Module | Sequence[nn.Module] | None = None,
        bandwidth: float | None = None,
    ) -> None:
        super().__init__(alpha, per=per, prob=prob, partner=partner, label=label, seed=seed, bandwidth=bandwidth)
        if not isinstance(modules, (tuple, list, nn.ModuleList)) or not len(modules):
            raise _check.wrong(TypeError, "modules", "a sequence of one or more nn.Modules and None", modules)
        layers = [None if isinstance(m, str) and m == "input" else m for m in modules]
        if layers.count(None) > 1:
            raise _check.wrong(ValueError, "modules", "None once", modules)
        if None in layers and masks and mask_modules is None:
            raise _check.wrong(ValueError, "mask_modules", "modules whose masks are joined where the input is mixed", None)
        self.layers = tuple(layers)  # a tuple: an nn.Module or a ModuleList would make them submodules
        self._options: dict[str, Any] = {"dim": dim, "masks": masks}
        self._mask_modules = None if mask_modules is None else _modules("mask_modules", mask_modules)
        for layer in _modules("modules", [layer for layer in layers if layer is not None]):  # checks the options
            mix_hidden(layer, 1.0, torch.zeros(0, dtype=torch.int64), mask_modules=self._from(layer), **self._options)
        self._host = Sampler(seed)

    def extra_repr(self) -> str:
        names = ", ".join("input" if layer is None else _name(layer) for layer in self.layers)
        return f"[{names}], {super().extra_repr()}"

    def choose(self, *, generator: torch.Generator | None = None) -> nn.Module | None:
        """Draws one of the modules, on the host: for `mix_hidden` with a `Mix` from `sample`, None being the input."""
        given = generator is not None and generator.device.type == "cpu"
        if not given and self._host.seed is not None:
            return self.layers[self._host._pick(len(self.layers))]
        generator = generator if given else None
        return self.layers[int(torch.randint(len(self.layers), (), device="cpu", generator=generator))]

    def forward(
        self, x: torch.Tensor, y: torch.Tensor = MISSING, *, generator: torch.Generator | None = None, partner: Any = None
    ) -> Any:
        """A context manager that gives (x, mixed target). `partner` has to be None: hidden states of another batch are not here."""
        if partner is not None:
            raise _check.wrong(ValueError, "partner", "None (concatenate the two batches)", partner)
        if not self.training:
            return contextlib.nullcontext((x, y))
        if None in self.layers:
            _check.float_tensor("x", x, 1, "[N, ...]")  # also in the batches that are mixed elsewhere
        check_given(y=y)
        mix = self.sample(x, y, generator=generator)
        target, layer = mix.target(y), self.choose(generator=generator)
        x = mix.apply(x) if layer is None else x
        if layer is None and self._mask_modules is None:
            return contextlib.nullcontext((x, target))
        modules = () if layer is None else layer
        return _around(mix_hidden(modules, mix, mask_modules=self._from(layer), **self._options), (x, target))

    def _from(self, layer: Any) -> Any:
        """Returns the modules whose masks are joined where a layer is mixed."""
        every = self._mask_modules
        at = next((k for k, m in enumerate(every or ()) if m is layer), 0)
        return every if every is None else every[at:]


@contextlib.contextmanager
def _around(context: mix_hidden, value: tuple[torch.Tensor, Any]) -> Iterator[Any]:
    with context:
        yield value
