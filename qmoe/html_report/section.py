"""A section of a page, as the template takes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figure:
    """A plot (plots.py) and the sentence under it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Cells are text; columns after the first are aligned right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """title: also its name in links. text: paragraphs. items: a list of lines. code: commands and
    settings, as they are typed."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    items: Sequence[str] = ()
    code: Sequence[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")
