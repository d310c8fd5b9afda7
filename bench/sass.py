"""What a compiled program says of itself: the instructions that it executes, counted from its machine code (SASS, NVIDIA alone).

Every instruction counts once, those of a loop once for each of its trips. Both sides of a branch count, so a tile that takes one of
two paths executes fewer. What follows the last EXIT does not count: padding, and the slow paths of divisions.
"""

import itertools
import os
import re
import struct
import subprocess
import tempfile

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?)\s*;")
_JUMP = re.compile(r"0x([0-9a-f]+)$")
BYTES = 16  # of an instruction


def said_of(binary, tool, *options):
    """What one of the tools that come with Triton prints of a binary."""
    import triton.backends.nvidia as nvidia

    with tempfile.NamedTemporaryFile() as file:
        file.write(binary)
        file.flush()
        command = [os.path.join(os.path.dirname(nvidia.__file__), "bin", tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassembled(cubins, arch):
    """The machine code of each cubin as text. All of them are read in one run, since nvdisasm takes a third of a second to start."""
    codes = [_code(cubin) for cubin in cubins]
    if not codes:
        return []
    text = said_of(b"".join(codes), "nvdisasm", "--binary", f"SM{arch}")
    lines = [line for line in text.splitlines() if _INSTRUCTION.match(line)]
    assert len(lines) == sum(map(len, codes)) // BYTES
    ends = itertools.accumulate(len(code) // BYTES for code in codes)
    return ["\n".join(lines[start:end]) for start, end in itertools.pairwise([0, *ends])]


def _code(cubin):
    """The bytes of all sections .text of an ELF file of 64 bits."""
    (table,), (entry, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + n * entry) for n in range(count)]  # name, ..., offset, size
    name = sections[names][4]
    return b"".join(cubin[s[4] : s[4] + s[5]] for s in sections if cubin[name + s[0] :].startswith(b".text."))


def counted(text):
    """(instructions outside of loops, instructions in loops). A later instruction that jumps back to an earlier one
    ends a loop, which begins there."""
    found = [match.groups() for line in text.splitlines() if (match := _INSTRUCTION.match(line))]
    first, names, jumps = int(found[0][0], 16) // BYTES, [], []
    for _, name, operands in found:
        target = _JUMP.search(operands) if name.startswith("BRA") else None
        start = int(target.group(1), 16) // BYTES - first if target else len(names) + 1
        if start <= len(names):
            jumps.append((start, len(names)))
        names.append(name.split(".")[0])
    end = max((at + 1 for at, name in enumerate(names) if name == "EXIT"), default=len(names))
    looped = {at for start, stop in jumps if start < end for at in range(start, min(stop + 1, end))}
    kept = [at for at in range(end) if names[at] != "NOP"]
    inside = sum(at in looped for at in kept)
    return len(kept) - inside, inside


def trips(arguments):
    """How often a launch passes through its loops: over the tiles of a row of classes, over the channels of an image, over tiles of
    cells, or over the rows of a chain. Other loops, over a row's partners or a target's components, count once."""
    fields = dict(arguments)
    for value in arguments.values():
        fields |= value._asdict() if hasattr(value, "_asdict") else {}
    numbers = {name: getattr(value, "value", value) for name, value in fields.items()}
    if "BLOCK_C" in numbers and "C" in numbers:
        return max(1, -(-numbers["C"] // numbers["BLOCK_C"]))
    if "TOGETHER" in numbers:
        return numbers["C"] // numbers["TOGETHER"]
    return numbers.get("TILES", numbers.get("R", 1))
