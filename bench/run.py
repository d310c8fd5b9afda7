"""Times fastmix's ops and whole steps beside what people write without them, and prints one table.

What each suite asks is at the top of its file, bench_ops.py or bench_NAME.py; how it is timed, in conftest.py. Any other option is
pytest's or pytest-benchmark's.
"""

import argparse
import importlib.util
import pathlib
import sys

OPS = "mix", "mix_masked", "convex_combination", "soft_cross_entropy", "soft_binary_cross_entropy", "js_divergence"
SUITES = *OPS, "images", "batches", "steps", "adversarial", "host"
HERE = pathlib.Path(__file__).parent


def main(argv=None):
    about = {"prog": "python -m fastmix.bench run", "description": __doc__, "epilog": f"Suites: {', '.join(SUITES)}."}
    parser = argparse.ArgumentParser(**about)
    parser.add_argument("suites", nargs="*", help="of those below; all by default", metavar="SUITE")
    parser.add_argument("-k", metavar="EXPRESSION", help="only what matches, as pytest's -k: 'bfloat16 and not compiled'")
    parser.add_argument("--all", action="store_true", help="on a CPU, large cases too (minutes, and up to 12 GB of memory)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start nothing new after this, and count what is left")
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file, after each one")
    options, rest = parser.parse_known_args(argv)
    if unknown := sorted(set(options.suites) - set(SUITES)):
        expected = f"{', '.join(SUITES)}, or a command of python -m fastmix.bench"
        parser.error(f"SUITE: expected some of {expected}; got {', '.join(unknown)}")
    if options.budget is not None and not options.budget > 0:
        parser.error(f"--budget: expected more than 0 seconds, got {options.budget}")
    if missing := [name for name in ("pytest", "pytest_benchmark", "pytest_timeout") if not importlib.util.find_spec(name)]:
        parser.error(f"needs {', '.join(missing)}: python -m pip install 'fastmix[test]'")
    if options.json:
        try:
            pathlib.Path(options.json).touch()
        except OSError as error:
            parser.error(f"--json: {error}")
    import pytest

    asked = options.suites or SUITES
    ops = [name for name in asked if name in OPS]
    given = {"-k": options.k, "--suites": ",".join(ops), "--budget": options.budget, "--result": options.json}
    # pytest takes a word that follows an option of a conftest for a path, and the first path for the folder of its settings
    arguments = ["-q", "--no-header", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE)] + ["--all"] * options.all
    arguments += [f"{key}={value}" for key, value in given.items() if value is not None] + rest
    arguments += [str(HERE / f"bench_{name}.py") for name in dict.fromkeys("ops" if name in OPS else name for name in asked)]
    status = pytest.main(arguments)
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        print("nothing matches", file=sys.stderr)
        return 2
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
