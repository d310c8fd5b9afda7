"""Which programs launchers ask for, in a process of its own: nothing is compiled there, or can be afterwards."""

from fastmix.bench import static


class _Program:
    """Stands for a compiled program. Its hash is of all that decides how the program is compiled."""

    def __init__(self, source, target, options, _env_vars=None):
        self.hash = f"{source.hash()} {sorted(options.items())}"


def programs(call):
    """[(kernel's name, hash)] of what a call would launch on sm_90."""
    import triton.compiler  # pytest looks for doctests in this file, also where there is no Triton

    triton.compiler.compile = _Program
    return [(launch.kernel, launch.compiled.hash) for launch in static.launches("90", call)]
