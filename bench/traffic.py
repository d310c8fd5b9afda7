"""The global memory that kernels touch, counted while Triton's interpreter runs them: no GPU is needed.

    with traffic.count() as moved:  # in a process that was started with TRITON_INTERPRET=1
        fastmix.kernels.api.mix_fwd(x, lam, index, None, None)
    moved["_mix_fwd_kernel"].sectors

An access is one load, store or atomic of one program: a whole tile. `lanes` are the bytes that its active lanes ask for,
`sectors` those of the distinct 32-byte sectors they lie in, which is the best that a GPU's coalescing can do with them. What is
accessed twice counts twice, although the L2 may serve it: an upper bound on what reaches DRAM, the same on every machine.
Atomics count twice, for they read and write. A load that repeats another, or whose value is not used, is counted, though a
compiler may drop it.
"""

import collections
import contextlib
import dataclasses
import os

import numpy as np

SECTOR = 32  # bytes


@dataclasses.dataclass
class Moved:
    """Bytes that one kernel has moved."""

    lanes: int = 0
    sectors: int = 0

    def add(self, addresses, mask, itemsize, times=1):
        """One access: addresses and mask of its lanes, in any shape."""
        mask = np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(addresses))
        active = np.asarray(addresses)[mask].astype(np.int64)
        touched = active // SECTOR
        steps = np.diff(touched)
        distinct = np.count_nonzero(steps) + (touched.size > 0) if np.all(steps >= 0) else np.unique(touched).size
        self.lanes += times * itemsize * active.size
        self.sectors += times * SECTOR * int(distinct)


class _Memory:
    """Stands for the memory of Triton's interpreter, and counts every access."""

    def __init__(self, real, moved):
        self._real, self._moved = real, moved

    def __getattr__(self, name):
        return getattr(self._real, name)

    def load(self, addresses, mask, other, dtype):
        self._moved().add(addresses, mask, np.dtype(dtype).itemsize)
        return self._real.load(addresses, mask, other, dtype)

    def store(self, addresses, values, mask):
        self._moved().add(addresses, mask, values.dtype.itemsize)
        return self._real.store(addresses, values, mask)

    def atomic_rmw(self, op, addresses, values, mask, order):
        self._moved().add(addresses, mask, values.dtype.itemsize, 2)
        return self._real.atomic_rmw(op, addresses, values, mask, order)

    def atomic_cas(self, addresses, expected, values, order):
        self._moved().add(addresses, True, values.dtype.itemsize, 2)
        return self._real.atomic_cas(addresses, expected, values, order)


@contextlib.contextmanager
def count():
    """Counts what the kernels launched inside the block move: a dict from a kernel's name to `Moved`.

    Raises:
        RuntimeError: kernels are not interpreted in this process.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("traffic.count: expected TRITON_INTERPRET=1 in the environment before Triton is imported")
    from triton.runtime import interpreter

    moved = collections.defaultdict(Moved)
    running = []
    memory, call = interpreter._interpreter, interpreter.GridExecutor.__call__

    def named(self, *args, **options):
        running.append(self.fn.__name__)
        try:
            return call(self, *args, **options)
        finally:
            running.pop()

    interpreter._interpreter = _Memory(memory, lambda: moved[running[-1]])
    interpreter.GridExecutor.__call__ = named
    try:
        yield moved
    finally:
        interpreter._interpreter, interpreter.GridExecutor.__call__ = memory, call


def whole_sectors(*tensors):
    """Bytes of the sectors of tensors, each touched once: what a floor is made of. None takes nothing."""
    return sum(-(-t.numel() * t.element_size() // SECTOR) * SECTOR for t in tensors if t is not None)
