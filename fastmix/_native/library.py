"""The native library, loaded through ctypes by the first call that wants it. ctypes releases the GIL during a call."""

import ctypes
import functools
import struct
import weakref
from collections import deque
from typing import Any

import torch

from . import build

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as common.h numbers them

# What each C function takes, and before the dash what it returns: p a pointer (an address or None), q an int64, i an int32, d a double.
# In brackets: the fields of one struct, an address or 0 for a pointer. ctypes converts an argument in 0.08 us; 30 are packed in 0.2.
SIGNATURES = {
    "fm_binary_cross_entropy": "[iiqqqpqppddiippppqpqpppqqpqpp]",
    "fm_combine_backward": "i-iiqqqpqpppqqpqp",
    "fm_combine_forward": "iiqqqpppqqpq",
    "fm_count_chunks": "pqi",
    "fm_cross_entropy": "i-[iiqqqqpqpqdippppppqpqpppqqpqpp]",
    "fm_dirichlet": "pqqdpp",
    "fm_exp_log": "ippq",
    "fm_js_divergence": "i-[iiqqqppdippppqp]",
    "fm_large_pages": "pq",
    "fm_mix_backward": "i-[iiqqpqpqpqpqpppqp]",
    "fm_mix_forward": "[iiqqpqpqpqpqpppqp]",
    "fm_mix_images": "iippppppqpqpqppppppp",
    "fm_mix_masked_backward": "i-iiqqpqpqpppqpppqp",
    "fm_mix_masked_forward": "iiqqpqpppqpppq",
    "fm_out_of_range": "i-pqqq",
    "fm_sample": "i-[pqqpqqqppqqiippppppqpp]",
    "fm_scale": "iiqpd",
}
_library: Any = None  # once it is loaded
_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "d": ctypes.c_double}


@functools.cache
def load() -> tuple[Any, str | None]:
    """Returns (the library, None), or (None, why there is none). Builds it if that has not been done."""
    global _library
    try:
        library = build.load()
    except build.Unavailable as error:
        return None, str(error)
    for name, signature in SIGNATURES.items():
        result, _, arguments = signature.rpartition("-")
        function = getattr(library, name)
        function.restype = _TYPES[result] if result else None
        if arguments.startswith("["):
            function.argtypes = [ctypes.c_char_p]
            setattr(library, name, _packing(function, arguments.strip("[]")))
        else:
            function.argtypes = [_TYPES[letter] for letter in arguments]
    _library = library
    return library, None


def _packing(function, fields):
    """Returns what calls a C function with its arguments packed into one struct."""
    pack = struct.Struct(fields.replace("p", "P")).pack
    return lambda *arguments: function(pack(*arguments))


def why_not() -> str | None:
    """Returns why the native backend cannot run here, or None."""
    return load()[1]


LARGE = 1 << 23  # bytes: as much of a result is written past the caches
PAGE = 1 << 21  # of the system's large pages
KEPT = 4  # blocks at most that wait for their next result

_free: deque = deque(maxlen=KEPT)  # blocks, uint8 tensors, that no result lies in any more; the oldest is dropped for a fifth


def new(t):
    """Returns t, a result that nobody has written to yet: if it is large, in a block that an earlier result of its size has left, or in
    a new one on large pages.

    The system clears new memory when it is first touched: 38 MB take 10 ms, where `mix_images` takes 4. A tensor's storage holds
    its block's lease, which goes with the last tensor, view or array that shares the storage; the block is then free again."""
    size = t.numel() * t.element_size()
    if size < LARGE:
        return t
    block = _free_block(size)
    if block is None:
        block = torch.empty(size + PAGE, dtype=torch.uint8, device="cpu")
        get().fm_large_pages(block.data_ptr(), size + PAGE)
    lease = (ctypes.c_byte * size).from_address(-(-block.data_ptr() // PAGE) * PAGE)
    weakref.finalize(lease, _free.append, block).atexit = False
    storage = torch.frombuffer(lease, dtype=torch.uint8).untyped_storage()
    return t.set_(storage, 0, t.shape, t.stride())  # no view: autograd treats views that are written to differently


def _free_block(size):
    """Returns a free block for so many bytes, or None. Other threads may take and leave blocks meanwhile."""
    for _ in range(KEPT):
        try:
            block = _free.popleft()
        except IndexError:
            return None
        if block.numel() == size + PAGE:
            return block
        _free.append(block)
    return None


def address(t):
    """Returns where a tensor's memory begins, as C takes it; 0 for None."""
    return 0 if t is None else t.data_ptr()


def each_row(t):
    """Returns where rows begin in memory and how far they are apart; one number is every row's, and None no row's."""
    return address(t), t.stride(0) if t is not None and t.dim() else 0


def array_address(array):
    """Returns where an array of ctypes begins, which has to be kept; 0 for None."""
    return 0 if array is None else ctypes.addressof(array)


def get():
    """Returns the library. Only called where `why_not()` is None."""
    return _library


def check_memory(failed, purpose):
    """Raises if a C function says that it got no memory."""
    if failed:
        raise MemoryError(f"fastmix: no memory {purpose}")


def all_in_range(index, stop, ignored=None):
    """Returns True if every integer but `ignored` lies in [0, stop), and False if one does not, or may not. Read in C where the library is
    loaded, in a third of the time."""
    if _library is None or stop < 1 or not index.is_cpu or type(index) is not torch.Tensor:
        low, high = map(int, index.aminmax()) if index.numel() else (0, -1)
        return low >= 0 and high < stop
    index = torch._C._functorch.unwrap_if_dead(index)  # one that a transform has left behind has no memory of its own
    if index.dtype != torch.int64 or not index.is_contiguous():
        index = index.to(torch.int64).contiguous()
    # 0 is in range, so to ignore it changes nothing
    return not _library.fm_out_of_range(index.data_ptr(), index.numel(), stop, 0 if ignored is None else ignored)
