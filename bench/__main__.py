"""Measures fastmix: python -m fastmix.bench COMMAND [options], or COMMAND --help."""

import argparse
import importlib
import sys

COMMANDS = {
    "run": "time the ops and whole steps beside what people write without them (what is done without a command)",
    "numerics": "errors against float64, ours and hand-written torch's",
    "static": "what every kernel costs by its compiled code, and the bytes it moves; no GPU needed",
    "cold": "what the first call costs",
    "gpu": "all that a GPU machine is needed for, by one command",
    "variants": "competing forms of the kernels beside each other; needs a GPU",
    "sanitize": "compute-sanitizer over small shapes of every op; needs a GPU",
    "report": "README's table and the plots, from committed result files",
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    listing = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fastmix.bench",
        description=__doc__,
        epilog=f"commands:\n{listing}\n\npython -m fastmix.bench run --help says what can be chosen.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [COMMAND] ...",
    )
    if argv and argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "run"
    try:
        module = importlib.import_module(f"fastmix.bench.{command}")
    except ImportError as error:
        parser.error(str(error))
    return module.main(argv)


if __name__ == "__main__":
    sys.exit(main())
