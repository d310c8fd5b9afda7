"""Which programs launchers ask for, in a process of its own: nothing is compiled there, or can be afterwards."""

import triton.compiler

from fastmix.bench import static


class _Program:
    """Stands for a compiled program. Its hash is of all that decides how the program is compiled."""

    def __init__(self, source, target, options, _env_vars=None):
        self.hash = f"{source.hash()} {sorted(options.items())}"


triton.compiler.compile = _Program


def programs(call):
    """[(kernel's name, hash)] of what a call would launch on sm_90."""
    return [(launch.kernel, launch.compiled.hash) for launch in static.launches("90", call)]
