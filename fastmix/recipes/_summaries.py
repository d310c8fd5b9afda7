"""What the recipes say of their results: means over seeds, and tables."""

import statistics


def show(console, title, columns, rows, caption=""):
    """Prints a table. In docs/recipes.md columns whose name begins with > are aligned right, here all but the first."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column.lstrip(">"), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum  # no number is cut off
    Console(file=console.file, width=max(needed, console.width), highlight=False, markup=False).print(table)
    console.print(caption + "\n")


def tell(console, title, summary):
    """Prints what a recipe's `summary` gives: the columns, rows and remarks of docs/recipes.md."""
    columns, rows, remarks = summary
    show(console, title, columns, rows, "Mean ± standard error over seeds. " + " ".join(remarks.split()))


def numbers(runs, key):
    """[number of each seed]."""
    return [run[key] for run in runs]


def gaps(first, second, key="test_error_percent"):
    """[what the first has more than the second, of the same seed]."""
    return [a[key] - b[key] for a, b in zip(first, second, strict=True)]


def mean(values, places=1):
    """Mean ± standard error of the mean, where there are several."""
    error = f" ± {error_of_mean(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{error}"


def means(runs, *keys):
    """[mean ± standard error of each of these numbers]."""
    return [mean(numbers(runs, key)) for key in keys]


def error_of_mean(values):
    """The standard error of the mean; 0 of one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
