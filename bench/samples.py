"""Inputs of the benchmark: numbers drawn or fixed, an op's inputs by name, and the words that cases are written in."""

import math
import types

import torch

DTYPES = F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHORT = {"f32": F32, "bf16": BF16, "f16": F16, "f64": F64}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def acc_dtype(dtype):
    """The dtype of the arithmetic, and of what is float32 whatever the batch's dtype: lam, masks, losses."""
    return torch.promote_types(dtype, F32)


def exact(t):
    """A tensor's values in float64, or its integers, as the oracle takes them; anything else as it is."""
    if not isinstance(t, torch.Tensor):
        return t
    t = t.detach().cpu()
    return t.double().numpy() if t.is_floating_point() else t.numpy()


def options_of(text):
    """The keyword arguments that a case's words stand for: "16x16 cells, moved, K=4, to x and lam"."""
    options = {}
    for word in filter(None, text.split(", ")):
        key, _, value = word.partition("=")
        if word.startswith("to "):
            options["gradient"] = word
        elif word.endswith(" cells"):
            options["cells"] = tuple(map(int, word.removesuffix(" cells").split("x")))
        elif word in ("channels_last", "sequence first"):
            options["layout"] = word
        elif value.replace(".", "").isdigit():
            options[key] = float(value) if "." in value else int(value)
        else:
            options[key.replace(" ", "_")] = value or True
    return options


def cases_of(table):
    """(options as text, shape, dtype, whether it is compiled) of each case of a table {options: shapes}."""
    for text, shapes in table.items():
        for word in shapes.split():
            shape, dtype = word.removesuffix("-").split("/")
            yield text, tuple(map(int, shape.split("x"))), SHORT[dtype], not word.endswith("-")


# Inputs


class Draw:
    """Random numbers of a device. With `edges` some rows are mixed with weights of exactly 0 and 1."""

    def __init__(self, device="cpu", dtype=F64, *, seed=0, edges=True):
        self.dtype, self.edges, self.seed = dtype, edges, seed
        generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)
        self.place = {"device": device, "generator": generator}

    def normal(self, *shape):
        return torch.randn(shape, dtype=self.dtype, **self.place)

    def uniform(self, *shape):
        return torch.rand(shape, dtype=self.dtype, **self.place)

    def integers(self, high, *shape):
        return torch.randint(high, shape, **self.place)

    def permutation(self, count):
        return torch.randperm(count, **self.place)

    def partners(self, rows):
        """Each row's partner in the reversed batch."""
        return torch.arange(rows, device=self.place["device"]).flip(0)

    def again(self):
        return type(self)(self.place["device"], self.dtype, seed=self.seed + 1, edges=self.edges)

    def weights(self, *shape):
        """Weights of rows, or of cells; without edges from 0.1 to 0.9, since 1 - lam is inexact where lam is close to 1."""
        weights = self.uniform(*shape)
        if not self.edges:
            return 0.1 + 0.8 * weights
        for row in (1, 2):
            weights[(slice(row, row + 1), 0)[: weights.dim()]] = row - 1
        return weights

    def boxes(self, rows, sizes):
        corners = self.integers(sizes[0] + 1, 2, rows, len(sizes))
        return torch.cat((corners.amin(0), corners.amax(0)), 1)

    def plans(self, rows, cells):
        return self.integers(cells, rows, cells), self.integers(cells, rows, cells)

    def chance(self, p, *shape):
        return torch.rand(shape, **self.place) < p

    def components(self, classes, K, dtype, rows, *pixels):
        """(labels, lam, classes, weights) of rows of K components: with two, of a row's label and its partner's."""
        y, lam = self.integers(classes, rows, *pixels), self.uniform(rows).to(dtype)
        if K == 2:
            return y, lam, torch.stack((y, y[self.partners(rows)]), 1), torch.stack((lam, 1 - lam), 1)
        return y, lam, self.integers(classes, rows, K, *pixels), self.uniform(rows, K).to(dtype)


class Fixed(Draw):
    """The same numbers everywhere, for counts of bytes: every weight is 1/2 or 1/K, and a row's partner is the next one."""

    def __init__(self):
        super().__init__("cpu", F32, edges=False)

    def normal(self, *shape):
        return torch.zeros(shape)

    def uniform(self, *shape):
        return torch.full(shape, 0.5)

    def integers(self, high, *shape):
        return (torch.arange(math.prod(shape)) * 7919 % high).view(shape)

    def permutation(self, count):
        return torch.arange(count).flip(0)

    def partners(self, rows):
        return torch.arange(rows).roll(-1)

    def again(self):
        return self

    def boxes(self, rows, sizes):
        """Half of each size, and off the boundaries of vectors."""
        start = [size // 4 + 1 for size in sizes]
        return torch.tensor([start + [first + size // 2 for first, size in zip(start, sizes, strict=True)]] * rows)

    def plans(self, rows, cells):
        at = torch.arange(cells).expand(rows, -1)
        return at.flip(1).contiguous(), at.roll(1, 1)

    def components(self, classes, K, dtype, rows, *pixels):
        y, lam, *_ = super().components(classes, K, dtype, rows, *pixels)
        return y, lam, self.integers(classes, rows, K, *pixels), torch.full((rows, K), 1 / K) if K > 1 else None


class Sample(types.SimpleNamespace):
    """An op's inputs by name, of so many `rows`. `leaves` names those that have a gradient, `g` is the upstream one."""

    pixels = 0  # the dimensions of a row of pixels, whose labels `y` are

    def replaced(self, **new):
        return Sample(**{**vars(self), **new})

    def map(self, function):
        """Every tensor changed; sequences of them too."""

        def each(value):
            return type(value)(map(each, value)) if isinstance(value, (list, tuple)) else function(value)

        return Sample(**{name: each(value) for name, value in vars(self).items()})

    def take(self, rows, pixels=8):
        """Some rows with their partners in the reversed batch; of rows of pixels with labels so many of each side at most."""
        crop = (..., *[slice(0, pixels)] * self.pixels) if pixels and self.pixels else ...

        def each(name, value):
            if isinstance(value, tuple):
                return tuple(each("", one) for one in value)
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or name == "index":
                return value
            axis = 0 if len(value) == self.rows else 1
            value = value.index_select(axis, rows.to(value.device))
            return value[crop] if value.dim() > self.pixels + axis else value

        few = Sample(**{name: each(name, value) for name, value in vars(self).items()})
        index = torch.arange(len(rows), device=self.index.device).flip(0) if hasattr(self, "index") else None
        return few.replaced(rows=len(rows), index=index)

    def count(self):
        """How many losses a mean is over."""
        return self.y.numel() if hasattr(self, "y") else self.rows


def with_leaves(sample, names):
    """(a sample whose inputs of these names require a gradient, those tensors one by one)"""
    new, flat = {}, []
    for name in names:
        value = getattr(sample, name)
        fresh = [t.detach().requires_grad_() for t in (value if isinstance(value, (list, tuple)) else [value])]
        new[name] = fresh[0] if isinstance(value, torch.Tensor) else type(value)(fresh)
        flat += fresh
    return sample.replaced(**new), flat


def differentiated(function, sample):
    """(value, gradient to each leaf, or None where it plays no part) of function(sample); a sequence has one for each of its tensors."""
    sample, leaves = with_leaves(sample, sample.leaves)
    value = function(sample)
    return value.detach(), *torch.autograd.grad(value, leaves, sample.g.to(value.dtype), allow_unused=True)


def laid_out(t, layout):
    if layout == "sequence first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return t.contiguous(memory_format=getattr(torch, layout))


def each_row(factor, t):
    """A factor a row, against the dimensions of t."""
    return factor.view(-1, *[1] * (t.dim() - 1))
