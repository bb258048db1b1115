"""Docstrings as the site shows them: lines like `name: what it means` become a list. mkdocs.yml
names this extension of griffe, which reads the docstrings."""

import re

from griffe import Extension, Object

# The continuation of such a line is indented.
MEANING = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


class Lists(Extension):
    """Changes the docstring of everything that is read."""

    def on_object(self, *, obj: Object, **_) -> None:
        if obj.docstring is not None and not obj.is_module:
            obj.docstring.value = as_list(obj.docstring.value)


def as_list(text: str) -> str:
    """The docstring with its arguments as a list, which begins after an empty line."""
    lines: list[str] = []
    for line in text.split("\n"):
        item = MEANING.sub(r"- **\1**: ", line)
        if item != line and lines and lines[-1] and not lines[-1].startswith(("- ", "    ")):
            lines.append("")
        lines.append(item)
    return "\n".join(lines)
