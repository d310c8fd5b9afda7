"""The code of the pages in docs/."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def blocks(title, page="compat.md"):
    """The Python code under the heading `## title` of a page, as one list of programs."""
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", (DOCS / page).read_text(), re.M | re.S)
    found = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert found, title
    return found
