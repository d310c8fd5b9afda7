"""The native library, loaded through ctypes by the first call that wants it. ctypes releases the GIL during a call."""

import ctypes
import functools
from typing import Any

import torch

from . import build

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as common.h numbers them

# Arguments of each C function: p a pointer (an address or None), q an int64, i an int32, d a double; before the dash what it returns.
SIGNATURES = {
    "fm_combine_backward": "i-iiqqqpqpppqqpqp",
    "fm_combine_forward": "iiqqqpppqqpq",
    "fm_count_chunks": "pqi",
    "fm_dense_bce": "iiqqpqipqpqpppddiipppqpqp",
    "fm_dense_ce": "iiqqpqipqpqppqdippppqpqp",
    "fm_exp_log": "ippq",
    "fm_js_divergence": "i-iiqqqppdippppqp",
    "fm_large_pages": "pq",
    "fm_mix_backward": "i-iiqqpqpqpqpqpppqp",
    "fm_mix_forward": "iiqqpqpqpqpppq",
    "fm_mix_images": "iippppppqpqpqppp",
    "fm_mix_masked_backward": "i-iiqqpqpqpppqpqp",
    "fm_mix_masked_forward": "iiqqpqpppqpppq",
    "fm_soft_bce": "iiqqqpqppppddiippppqpq",
    "fm_soft_ce_backward": "iiqqqpqpppqdippqpq",
    "fm_soft_ce_forward": "iiqqqpqpppqdippppppq",
}
_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "d": ctypes.c_double}


@functools.cache
def load() -> tuple[Any, str | None]:
    """Returns (the library, None), or (None, why there is none). Builds it if that has not been done."""
    try:
        library = build.load()
    except build.Unavailable as error:
        return None, str(error)
    for name, signature in SIGNATURES.items():
        result, _, arguments = signature.rpartition("-")
        function = getattr(library, name)
        function.argtypes = [_TYPES[letter] for letter in arguments]
        function.restype = _TYPES[result] if result else None
    return library, None


def why_not() -> str | None:
    """Returns why the native backend cannot run here, or None."""
    return load()[1]


LARGE = 1 << 23  # bytes: as much of a result is written past the caches


def new(t):
    """Returns t, memory for a result that nobody has written to, on large pages if it is large: 38 MB cost 20 ms less than on small ones."""
    bytes = t.numel() * t.element_size()
    if bytes >= LARGE:
        get().fm_large_pages(t.data_ptr(), bytes)
    return t


def address(t):
    """Returns where a tensor's memory begins, as C takes it; None stays None."""
    return None if t is None else t.data_ptr()


def get():
    """Returns the library. Only called where `why_not()` is None."""
    return load()[0]
