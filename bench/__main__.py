"""Measures fastmix: python -m fastmix.bench COMMAND [options], or COMMAND --help."""

import importlib
import sys

COMMANDS = {
    "run": "time the ops and whole steps beside what people write without them (what is done without a command)",
    "numerics": "errors against float64, ours and hand-written torch's",
    "static": "what every kernel costs by its compiled code, and the bytes it moves; no GPU needed",
    "cold": "what the first call costs",
    "compile": "compile kernels ahead for a GPU machine; no GPU needed",
    "gpu": "all that a GPU machine is needed for, by one command",
    "variants": "competing forms of the kernels beside each other; needs a GPU",
    "sanitize": "compute-sanitizer over small shapes of every op; needs a GPU",
    "puzzle": "PuzzleMix on real images: energies beside the optimum, blocks moved, times",
    "report": "the tables of docs/ and the plots, from committed result files",
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__, *(f"  {name:<10}{text}" for name, text in COMMANDS.items()), sep="\n")
        return 0
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "run"
    try:
        module = importlib.import_module(f"fastmix.bench.{command}")
    except ImportError as error:
        print(f"python -m fastmix.bench {command}: {error}", file=sys.stderr)
        return 2
    return module.main(argv)


if __name__ == "__main__":
    sys.exit(main())
