"""The code of the pages in docs/, with the scripts that they include."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"


def programs(text):
    """The Python code of a page, as one list of programs; an included script is read from its file."""
    included = re.sub(r'^--8<-- "(examples/.*)"$', lambda found: (ROOT / found[1]).read_text(), text, flags=re.M)
    return re.findall(r"^```python\n(.*?)^```", included, re.M | re.S)


def blocks(title, page="compat.md"):
    """The programs under the heading `## title` of a page."""
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", (DOCS / page).read_text(), re.M | re.S)
    found = programs(section)
    assert found, title
    return found
