"""Tables that are never cut, whatever the width of the terminal."""

try:
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise ImportError("fastmix.bench needs rich: python -m pip install 'fastmix[test]'") from error

console = Console(width=1000, highlight=False, markup=False, emoji=False, soft_wrap=True)


def table(headings, rows, right=(), styles=()):
    """Prints rows of cells below their headings, those named in `right` aligned right, each row in its style if there are any."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        drawn.add_column(heading, justify="right" if heading in right else "left", no_wrap=True)
    for number, row in enumerate(rows):
        drawn.add_row(*row, style=styles[number] if styles else None)
    console.print(drawn)
