"""Pieces of text, and a choice of them: text that is much longer than what is used of it is neither
held in memory nor tokenized whole.

Left out: where pieces come from (text.py, tables.py), what samples are made of them (batches.py).
"""

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import Any

Chat = list[dict[str, Any]]  # messages, as chat templates take them
Document = str | Chat

PIECE = 1 << 15  # characters of a long document in one piece, at least
SLICE = 1 << 20  # characters that are tokenized at once: 50 to 220 bytes of memory each
READ = 16  # what is read of text without an end, times what is wanted


@dataclass(frozen=True)
class Piece:
    """A document, or a part of one that continues the piece before."""

    content: Document
    continues: bool = False

    def size(self) -> int:
        """In characters."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(message["content"]) for message in self.content)


@dataclass
class Reading:
    """One pass over the text of a domain. seed: of the order, where one can be had, None for the
    order of the text. piece: characters of a piece. Noted while reading: rows, and rows without
    text, by the name of the table; conversations, and those that a chat template refused, with its
    first reason."""

    seed: int | None
    piece: int = PIECE
    rows: dict[str, int] = field(default_factory=dict)
    empty: dict[str, int] = field(default_factory=dict)
    chats: int = 0
    refused: int = 0
    reason: str = ""

    def notes(self, domain: str) -> list[str]:
        """In words, what was of no use."""
        lines = [
            f"{table}: {count} of {self.rows[table]} rows hold no text (null or empty)"
            for table, count in self.empty.items()
        ]
        if self.refused:
            lines.append(
                f"{domain}: {self.refused} of {self.chats} conversations left out, the chat "
                f"template refuses them: {self.reason}"
            )
        return lines


@dataclass(frozen=True)
class Part:
    """Where some text of a domain comes from. endless: too long, maybe, to be read to its end."""

    read: Callable[[Reading], Iterator[Piece]]
    endless: bool = False


def plain(text: str) -> Part:
    """Text at hand."""
    return Part(lambda reading: cut(text, reading.piece))


def cut(document: Document, size: int) -> Iterator[Piece]:
    """A document in pieces; conversations stay whole."""
    if not isinstance(document, str) or len(document) <= size:
        yield Piece(document)
        return
    for start in range(0, len(document), size):
        yield Piece(document[start : start + size], start > 0)


def cut_file(file: TextIOWrapper, size: int) -> Iterator[Piece]:
    """A file's text in pieces that end with a line, if lines are not longer than pieces."""
    first = True
    while content := file.read(size):
        yield Piece(content + file.readline(size), not first)
        first = False


def choose(
    parts: Iterable[Part], budget: int, reading: Reading
) -> tuple[list[tuple[int, Piece]], bool]:
    """Pieces of about `budget` characters with their places, and whether that is all there is.

    With a seed they are drawn at random over all of the text (of text without an end, over READ
    times the budget), without one they are the first.
    """
    draw, first = random.Random(reading.seed), reading.seed is None
    kept: list[tuple[float, int, Piece]] = []  # a heap; what goes first is on top
    place, size, whole = 0, 0, True
    for part in parts:
        read = 0
        for piece in part.read(reading):
            if (first and size >= budget) or (part.endless and read >= READ * budget):
                whole = False
                break
            heapq.heappush(kept, (0 if first else draw.random(), place, piece))
            place, size, read = place + 1, size + piece.size(), read + piece.size()
            while not first and size - kept[0][2].size() >= budget:
                size -= heapq.heappop(kept)[2].size()
                whole = False
    return sorted((place, piece) for _, place, piece in kept), whole


def slices(chosen: list[tuple[int, Piece]], render: Callable[[Chat], str | None]) -> Iterator[str]:
    """The chosen pieces as texts of about SLICE characters. What does not follow on is set apart by
    an empty line. render: makes text of a conversation, or None of one that is left out."""
    text: list[str] = []
    size, before = 0, -2
    for place, piece in chosen:
        content = piece.content if isinstance(piece.content, str) else render(piece.content)
        if content is None:
            continue
        if size >= SLICE:
            yield "".join(text)
            text, size = [], 0
        follows = piece.continues and place == before + 1
        text += [content] if follows or not text else ["\n\n", content]
        size, before = size + len(content), place
    if text:
        yield "".join(text)
