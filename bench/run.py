"""Times fastmix's ops and whole steps beside what people write without them, and prints one table.

What each suite asks is at the top of its file, bench_NAME.py; how it is timed, in conftest.py. Any other option is pytest's or
pytest-benchmark's.
"""

import argparse
import contextlib
import pathlib
import sys

from fastmix.bench import screen

SUITES = (
    "mix",
    "mix_masked",
    "convex_combination",
    "soft_cross_entropy",
    "soft_binary_cross_entropy",
    "js_divergence",
    "batches",
    "steps",
    "adversarial",
    "host",
)
HERE = pathlib.Path(__file__).parent


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m fastmix.bench run", description=__doc__, epilog=f"Suites: {', '.join(SUITES)}."
    )
    parser.add_argument("suites", nargs="*", help="of those below; all by default", metavar="SUITE")
    parser.add_argument("-k", metavar="EXPRESSION", help="only what matches, as pytest's -k: 'bfloat16 and not compiled'")
    parser.add_argument("--all", action="store_true", help="on a CPU, large cases too (minutes, and up to 12 GB of memory)")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start nothing new after this; what was not run is counted"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file, after each one")
    parser.add_argument("--plots", metavar="DIR", help="draw speed-ups, and time against size, as PNG and SVG")
    options, rest = parser.parse_known_args(argv)
    if options.budget is not None and not options.budget > 0:
        parser.error(f"--budget: expected more than 0 seconds, got {options.budget}")
    try:
        if options.plots:
            import matplotlib  # noqa: F401

            pathlib.Path(options.plots).mkdir(parents=True, exist_ok=True)
        if options.json:
            pathlib.Path(options.json).touch()
    except ImportError as error:
        parser.error(f"--plots: needs matplotlib ({error}): python -m pip install 'fastmix[test]'")
    except OSError as error:
        parser.error(f"--{'json' if options.json and str(options.json) in str(error) else 'plots'}: {error}")
    unknown = sorted(set(options.suites) - set(SUITES))
    if unknown:
        parser.error(
            f"SUITE: expected some of {', '.join(SUITES)}, or a command of python -m fastmix.bench; got {', '.join(unknown)}"
        )
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        parser.error(f"needs pytest and pytest-benchmark ({error}): python -m pip install 'fastmix[test]'")

    # last, so that a path among pytest's own options is not taken for the place of its settings
    arguments = ["-q", "--no-header", "-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE)]
    arguments += ["-k", options.k] * bool(options.k) + ["--all"] * options.all + rest
    arguments += ["--budget", str(options.budget)] * (options.budget is not None) + ["--result", str(options.json)] * bool(
        options.json
    )
    arguments += [str(HERE / f"bench_{name}.py") for name in options.suites or SUITES]
    keeper = _Keeper()
    status = pytest.main(arguments, plugins=[keeper])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        print("nothing matches", file=sys.stderr)
        return 2
    if options.plots and keeper.result:
        from fastmix.bench import plots

        for path in plots.draw(keeper.result, options.plots):
            print(f"drew {path}")
    return int(status)


class _Keeper:
    """Keeps the result, and shows how far the run is."""

    def __init__(self):
        self.result = self.step = None
        self.open = contextlib.ExitStack()

    def pytest_collection_finish(self, session):
        self.result = session.config.result
        self.step = self.open.enter_context(screen.progress(len(session.items), every=20))

    def pytest_runtest_logstart(self, nodeid):
        self.step(nodeid.split("::")[-1])

    def pytest_report_teststatus(self, report):
        if (report.when == "call" and report.passed) or report.skipped:
            return report.outcome, "", report.outcome.upper()

    def pytest_sessionfinish(self):
        self.open.close()


if __name__ == "__main__":
    sys.exit(main())
