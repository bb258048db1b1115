"""Rows of tables on disk, one after the other: JSON, CSV, Parquet and Arrow, and text files too, as
they are or compressed. Nothing is copied into a cache, so no folder but the file's own is needed.
"""

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from qmoe.calibration.chat import document
from qmoe.calibration.pieces import Piece, Reading, cut, cut_file
from qmoe.errors import CalibrationError

# The first of these that a table has is its text, unless a column is named.
COLUMNS = ("text", "messages", "conversations")
PROBED = 100  # rows in which the column must turn up: JSON leaves out what is null
BLOCK = 1 << 20  # characters of a JSON file read at once
VALUE = 1 << 28  # characters of one of its rows at most
JSON = json.JSONDecoder()
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BATCH = 256  # rows of a Parquet file decoded at once


def kind(path: Path) -> str:
    """What a file's name says is in it: an ending of READERS, or ".txt" for text. Compression is
    left out of account."""
    endings = [e.lower() for e in path.suffixes]
    if endings and endings[-1] in (*OPENERS, ".zst"):
        endings.pop()
    return endings[-1] if endings else ""


def read_text(path: Path, reading: Reading) -> Iterator[Piece]:
    """A text file in pieces."""
    with _named(path), _open(path) as file:
        yield from cut_file(file, reading.piece)


def read_table(path: Path, column: str, reading: Reading) -> Iterator[Piece]:
    """The documents in a table's column ("" for the first of COLUMNS that it has)."""
    with _named(path):
        wanted = (column,) if column else COLUMNS
        rows = READERS[kind(path)](path, wanted)
        yield from documents(rows, wanted, str(path), reading)


def documents(
    rows: Iterable[dict[str, Any]], wanted: Sequence[str], shown: str, reading: Reading
) -> Iterator[Piece]:
    """The documents in the first column of those wanted that is there; rows without one are
    counted. CalibrationError if there is no such column, or a row holds neither text nor messages.
    shown: the table's name."""
    chosen: str | None = None
    reading.rows[shown] = 0
    for number, row in enumerate(rows, 1):
        reading.rows[shown] = number
        if not isinstance(row, dict):
            raise CalibrationError(f"{shown}: row {number} is {str(row)[:50]!r}, not an object")
        chosen = chosen or next((name for name in wanted if name in row), None)
        if chosen is None:
            if number >= PROBED:
                raise _no_column(shown, wanted, row)
            found = None
        else:
            found = document(row.get(chosen), f"{shown}: row {number} of column {chosen!r}")
        if found is None:
            reading.empty[shown] = reading.empty.get(shown, 0) + 1
        else:
            yield from cut(found, reading.piece)
    if chosen is None and reading.rows[shown]:
        raise _no_column(shown, wanted, row)


def _no_column(shown: str, wanted: Sequence[str], row: dict[str, Any]) -> CalibrationError:
    names = " or ".join(map(repr, wanted))
    return CalibrationError(
        f"{shown}: no column {names}; the table has {sorted(map(str, row))}: write the one that "
        f"holds the text behind the name, {shown}:COLUMN"
    )


def _json_lines(path: Path, wanted: Sequence[str]) -> Iterator[Any]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise _damaged(path, f"line {number}: {error}") from error


def _json(path: Path, wanted: Sequence[str]) -> Iterator[Any]:
    """Objects one behind the other, or in one list, which may be gigabytes long."""
    with _open(path) as file:
        text = file.read(BLOCK).lstrip()
        listed = text.startswith("[")
        between, at, ended = (" \t\r\n," if listed else " \t\r\n"), int(listed), not text
        while True:
            while text[at : at + 1] and text[at] in between:
                at += 1
            if listed and text[at : at + 1] == "]":
                if (text[at + 1 :] + file.read(BLOCK)).strip():
                    raise _damaged(path, "something follows its list")
                return
            try:
                value, end = JSON.raw_decode(text, at)
            except ValueError as error:
                if ended and not listed and at == len(text):
                    return
                if ended or len(text) - at > VALUE:
                    raise _damaged(path, error) from error
                # It may go on in the next block; a larger one each time, as it begins again.
                more = file.read(max(BLOCK, len(text) - at))
                text, at, ended = text[at:] + more, 0, not more
                continue
            yield value
            at = end


def _csv(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit((1 << 31) - 1)  # its default is 128 kB, less than a long text
    with _open(path, newline="") as file:
        delimiter = "\t" if kind(path) == ".tsv" else ","
        # strict, or a quotation mark that is missing makes one text of the rest of the file.
        yield from csv.DictReader(file, delimiter=delimiter, strict=True)


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet  # here, and below, as it takes a while to import

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = [name for name in wanted if name in table.schema_arrow.names]
            for batch in table.iter_batches(BATCH, columns=names or None):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from error


def _arrow(path: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """As `datasets` saves them: a stream, without an index at its end."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as table:
            for batch in table:
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from error


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Any]]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv,
    ".parquet": _parquet, ".arrow": _arrow,
}  # fmt: skip


def _open(path: Path, newline: str | None = None) -> TextIOWrapper:
    """A text file, compressed or not, to be read from its start."""
    ending = path.suffix.lower()
    if ending == ".zst":
        import pyarrow

        file = pyarrow.input_stream(str(path), compression="zstd")
    else:
        file = OPENERS.get(ending, open)(path, "rb")
    return TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what is raised for a damaged file into an error that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, what: object) -> CalibrationError:
    return CalibrationError(f"{path}: cannot be read: {what}")
