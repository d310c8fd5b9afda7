from .._expressions import safe_index, times  # noqa: F401
