"""For `make docs`: examples of docstrings become code blocks of the reference's pages. Griffe loads it; nothing else does."""

import re

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*(?:\n(?!\s*$).*)*\n?)+", re.M)


class Examples(griffe.Extension):
    """Puts fences around the lines from `>>>` to the next empty one."""

    def on_instance(self, *, obj, **kwargs):
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", obj.docstring.value)
