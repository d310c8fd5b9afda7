"""What measuring shows while it works and when it is done: tables that are never cut, and progress on stderr."""

import contextlib
import sys
import time

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise ImportError("fastmix.bench needs rich: python -m pip install 'fastmix[test]'") from error


def console(file=None):
    """A terminal, or a file, with room for every row."""
    out = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    out.width = max(out.width, 1000)
    return out


def table(headings, rows, right=(), widths=(), styles=(), out=None):
    """Prints rows of cells below their headings, those named in `right` aligned right. Widths and styles are of columns and
    rows, where they are not left to the table."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        width = widths[number] if widths else None
        drawn.add_column(heading, justify="right" if heading in right else "left", no_wrap=True, width=width)
    for number, row in enumerate(rows):
        drawn.add_row(*row, style=styles[number] if styles else None)
    (out or console()).print(drawn)


@contextlib.contextmanager
def progress(total=None, every=10.0):
    """A function to call with what is being done: a bar on a terminal, and a line every so many seconds elsewhere."""
    if sys.stderr.isatty():
        columns = TimeElapsedColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)
        return
    start = last = time.monotonic()
    done = 0

    def step(text):
        nonlocal last, done
        done += 1
        if time.monotonic() - last > every:
            last = time.monotonic()
            count = f"{done} of {total}" if total else str(done)
            print(f"{last - start:4.0f} s, {count}: {text}", file=sys.stderr, flush=True)

    yield step
