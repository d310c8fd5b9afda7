"""Tables that are never cut, and a progress bar on a terminal's stderr."""

import sys

try:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    raise ImportError("fastmix.bench needs rich: python -m pip install 'fastmix[test]'") from error


def console(file=None):
    """A terminal, or a file, with room for every row."""
    out = Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    out.width = max(out.width, 1000)
    return out


def table(headings, rows, right=(), widths=(), styles=(), out=None):
    """Prints rows of cells below their headings, those named in `right` aligned right. Widths and styles are of columns and rows."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, heading in enumerate(headings):
        width = widths[number] if widths else None
        drawn.add_column(heading, justify="right" if heading in right else "left", no_wrap=True, width=width)
    for number, row in enumerate(rows):
        drawn.add_row(*row, style=styles[number] if styles else None)
    (out or console()).print(drawn)


def progress(items, total=None):
    """The items, one after the other, with a bar on a terminal."""
    bar = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    return track(items, "measuring", total, **bar)
