"""What a compiled program says of itself: the instructions that it executes, counted from its machine code (SASS, NVIDIA alone).

Every instruction counts once, those of a loop once for each of its trips. Both sides of a branch count, so a tile that takes one of
two paths executes fewer. What follows the last EXIT does not count: padding, and the slow paths of divisions.
"""

import os
import re
import subprocess
import tempfile

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


def said_of(cubin, tool, option):
    """What one of the tools that come with Triton prints of a kernel's binary."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(os.path.dirname(nvidia.__file__), "bin", tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # nvdisasm warns of its own text


def counted(text):
    """(instructions outside of loops, instructions in loops). A loop is what lies between a label and a later jump back to it."""
    labels, names, jumps = {}, [], []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(names)
        elif found := _INSTRUCTION.match(line):
            name, operands = found.groups()
            target = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
            if target and target.group() in labels:
                jumps.append((labels[target.group()], len(names)))
            names.append(name.split(".")[0])
    end = max((at + 1 for at, name in enumerate(names) if name == "EXIT"), default=len(names))
    looped = {at for start, stop in jumps if stop < end or start < end for at in range(start, min(stop + 1, end))}
    kept = [at for at in range(end) if names[at] != "NOP"]
    inside = sum(at in looped for at in kept)
    return len(kept) - inside, inside


def trips(arguments):
    """How often a launch passes through its loops: over the tiles of a row of classes, over tiles of cells, or over the rows of a
    chain. Other loops, over a row's partners or a target's components, count once."""
    fields = dict(arguments)
    for value in arguments.values():
        fields |= value._asdict() if hasattr(value, "_asdict") else {}
    numbers = {name: getattr(value, "value", value) for name, value in fields.items()}
    if "BLOCK_C" in numbers and "C" in numbers:
        return max(1, -(-numbers["C"] // numbers["BLOCK_C"]))
    return numbers.get("TILES", numbers.get("R", 1))
