"""What an op allocates, and whether it reads or writes where it must not."""

import math
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastmix


class Fresh(TorchDispatchMode):
    """Collects the bytes of every tensor that torch makes inside: `.sizes`. Results written into a given tensor, and views, are not
    new."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs)
        made = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.sizes += [storage.nbytes() for storage in made if storage.data_ptr() not in given]
        return out


def bits(t):
    return t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


class Memory:
    """Inputs as views into larger storages. What lies around them is not theirs to read; nothing is theirs to write."""

    def __init__(self, device, poison, integer_poison):
        self.device, self.poison, self.integer_poison = device, poison, integer_poison
        self.rooms = []

    def place(self, values, layout="dense"):
        """The values (of the first row, or the first element, where the layout repeats it) in a layout."""
        dims = values.dim()
        repeated = {"expanded rows": 1, "expanded": dims}.get(layout, 0)
        source = values[tuple(slice(0, 1 if d < repeated else None) for d in range(dims))]
        order = list(range(dims))  # of the dimensions in memory
        if layout == "transposed":
            order.reverse()
        if layout == "channels last" and dims > 2:
            order = [0, *order[2:], 1]
        step = 2 if layout == "every second" else 1
        apart = 2 if layout == "rows apart" and dims else 0
        shape = [source.shape[d] * step for d in order]
        if apart:
            shape[-1] += apart
        margin = 1 if layout == "misaligned" else 64
        poison = self.poison if values.is_floating_point() else self.integer_poison
        room = torch.full((2 * margin + math.prod(shape),), poison, dtype=values.dtype, device=self.device)
        view = room[margin : len(room) - margin].view(shape)
        if apart:
            view = view[..., 1 : 1 + source.shape[order[-1]]]
        view = view[tuple(slice(None, None, step) for _ in order)].permute([order.index(d) for d in range(dims)])
        view.copy_(source)
        self.rooms.append((room, room.clone()))
        return view.expand(values.shape)

    def check(self):
        for room, before in self.rooms:
            assert same_bits(room, before), "an input, or what lies beside it, was written to"


STORED = ("misaligned", "rows apart", "every second", "transposed", "channels last", "rows innermost")


def stored_otherwise(values):
    """{layout: the values stored in it, among NaNs}"""
    inner = values.movedim(0, -1).contiguous().movedim(-1, 0)
    memory = Memory(values.device, math.nan, 0)
    return {how: inner if how == "rows innermost" else memory.place(values, how) for how in STORED}


def is_torch(device):
    """Whether plain torch, or C, runs tensors of this device here."""
    return fastmix._backend.name(torch.device(device)) != "triton"


GUARD, SENTINEL = 64, 77


@contextmanager
def guarded_allocations():
    """Whatever an op allocates lies between sentinels, which it must not overwrite."""
    rooms = []

    def guarded(create):
        def empty(*args, **kwargs):
            t = create(*args, **kwargs)
            if t.device.type == "meta" or not t.numel():
                return t
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            room = t.new_full((extent + 2 * GUARD,), SENTINEL)
            rooms.append(room)
            return t.new_empty(0).set_(room.untyped_storage(), GUARD, t.shape, t.stride()).copy_(t)

        return empty

    names = ("empty", "empty_like", "empty_strided")
    with mock.patch.multiple(torch, **{name: guarded(getattr(torch, name)) for name in names}):
        yield
    for room in rooms:
        assert (room[:GUARD] == SENTINEL).all(), "written in front of a buffer"
        assert (room[-GUARD:] == SENTINEL).all(), "written behind a buffer"


def placed(values, dtype, offset, stride, device):
    """Values [N, C] so many elements behind a boundary, rows so far apart, among NaNs."""
    room = torch.full((offset + len(values) * stride + 64,), float("nan"), dtype=dtype, device=device)
    z = room[offset:].as_strided(values.shape, (stride, 1))
    z.copy_(values)
    return z
