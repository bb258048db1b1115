"""Text by domain: what ships with qmoe, local files, or any `datasets` name.

Left out: how much of it is read (pieces.py), and what of it is used (batches.py).
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qmoe.calibration.pieces import Part, Piece, Reading, plain
from qmoe.calibration.tables import COLUMNS, READERS, documents, kind, read_table, read_text
from qmoe.errors import CalibrationError

SHOWN = 8  # names in a line
BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SHUFFLED = 1000  # rows that wait for one to be drawn, where a data set comes over the network


@dataclass
class Texts:
    """Where the text of each domain is; none is read yet. notes: in words, what of a folder is no
    text that qmoe reads."""

    domains: dict[str, list[Part]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, domain: str, part: Part) -> None:
        """Parts that name the same domain are joined, never dropped."""
        self.domains.setdefault(domain, []).append(part)


def load_texts(spec: str | Sequence[str]) -> Texts:
    """Text by domain name.

    spec: comma separated, or a list, each part one of
        bundled, bundled:DOMAIN[+DOMAIN]   calibration text that ships with qmoe
        heldout, heldout:DOMAIN[+DOMAIN]   disjoint text of the same domains, for evaluation
        hf:NAME[/CONFIG][:SPLIT[:COLUMN]]  a data set for `datasets.load_dataset` (split train),
                                           read only as far as needed
        PATH[:COLUMN]                      a text file, a table (an ending of tables.READERS), a
                                           folder of both, or a glob; all may be compressed (.gz,
                                           .bz2, .xz, .zst); the domain is the file's name up to the
                                           first dot
    A path that exists is taken as it is, whatever is in its name. Without COLUMN a table's text is
    the first of tables.COLUMNS that it has. Raises CalibrationError if a part names nothing.
    """
    texts = Texts()
    for part in split(spec):
        if part.startswith("hf:"):
            texts.add(*_dataset(part[3:]))
        elif part.partition(":")[0] in ("bundled", "heldout") and not os.path.exists(part):
            _shipped(texts, *part.partition(":")[::2])
        else:
            _local(texts, part)
    if not texts.domains:
        raise CalibrationError(f"{spec!r}: names no text; expected {', '.join(EXAMPLES)}")
    return texts


EXAMPLES = ("bundled", "a file or folder", "hf:NAME")


def split(spec: str | Iterable[str]) -> list[str]:
    """The parts of a specification: a list has them, a text that is no path is cut at commas."""
    if not isinstance(spec, str):
        return list(spec)
    return [spec] if _is_path(spec) else [part for part in spec.split(",") if part]


def _is_path(spec: str) -> bool:
    """Whether it names one thing that exists, maybe with a split or a column behind it."""
    path, behind = os.path.expanduser(spec.removeprefix("hf:")), ""
    while path and "," not in behind:
        if os.path.exists(path):
            return True
        path, _, behind = path.rpartition(":")
    return False


def merged(specs: Sequence[str]) -> str | list[str]:
    """Specifications given one by one, as one. Of several, each is cut at its commas or a path."""
    return specs[0] if len(specs) == 1 else [part for spec in specs for part in split(spec)]


def shipped_domains() -> list[str]:
    """Domains of the bundled text."""
    folder = files("qmoe.calibration") / "text"
    return sorted(p.name[:-4] for p in folder.iterdir() if p.name.endswith(".txt"))


def _shipped(texts: Texts, kind: str, domains: str) -> None:
    folder = files("qmoe.calibration") / "text"
    if kind == "heldout":
        folder = folder / "heldout"
    known = shipped_domains()
    for name in domains.split("+") if domains else known:
        if name not in known:
            raise CalibrationError(
                f"{kind}:{name}: no such domain; expected some of {'+'.join(known)}"
            )
        texts.add(name, plain((folder / f"{name}.txt").read_text(encoding="utf-8")))


def _local(texts: Texts, part: str) -> None:
    """Adds files, or the files of a folder; what a folder holds beside them is noted."""
    paths, column = _paths(part), ""
    if not paths:
        head, _, column = part.rpartition(":")
        paths = _paths(head) if head and column else []
    if not paths:
        shown = part if len(part) <= 200 else f"{part[:200]}.."
        raise CalibrationError(
            f"{shown}: no such text file or folder (a dataset is written 'hf:{shown}'; text itself "
            "goes into a file)"
        )
    for path in paths:
        found = _of_folder(texts, path) if path.is_dir() else [path]
        for file in found:
            texts.add(file.name.split(".")[0], _file(file, column, alone=path == file))


def _paths(part: str) -> list[Path]:
    root = os.path.expanduser(part)
    # os.path and glob: pathlib fails on what cannot be a file's name, such as the text itself.
    if os.path.exists(root):
        return [Path(root)]
    # Brackets are a pattern of glob's, and stand in the names of folders.
    found = glob.glob(root, recursive=True) or glob.glob(re.sub(r"\[", "[[]", root), recursive=True)
    return [Path(path) for path in sorted(found)]


def _of_folder(texts: Texts, folder: Path) -> list[Path]:
    """The text files and tables in a folder, not in those inside it."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CalibrationError(f"{folder}: cannot be read: {error}") from error
    found = [
        path
        for path in entries
        if kind(path) in (".txt", *READERS) and path.name not in BESIDE and not path.is_dir()
    ]
    others = [path.name + "/" * path.is_dir() for path in entries if path not in found]
    if not found:
        raise CalibrationError(
            f"{folder}: the folder holds no text; expected {', '.join(['.txt', *READERS])}, found "
            f"{_list(others) or 'nothing'}; name other files, or those of folders inside it, by a "
            f"pattern like {folder}/**/*.md"
        )
    if others:
        texts.notes.append(f"{folder}: not read as text: {_list(others)}")
    return found


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _file(path: Path, column: str, alone: bool) -> Part:
    if kind(path) in READERS:
        return Part(partial(read_table, path, column))
    if column and alone:
        raise CalibrationError(
            f"{path}:{column}: a column can be named of a table ({', '.join(READERS)}), this is "
            "read as text"
        )
    return Part(partial(read_text, path))


def _dataset(spec: str) -> tuple[str, Part]:
    name, part, column, *more = [*spec.split(":"), "", ""]
    if any(more) or not name:
        raise CalibrationError(f"hf:{spec}: expected hf:NAME[/CONFIG][:SPLIT[:COLUMN]]")
    path, config = _config_of(name)
    domain = f"{Path(path).name}/{config}" if config else Path(path).name
    wanted = (column,) if column else COLUMNS
    read = partial(_read_dataset, f"hf:{spec}", path, config, part or "train", wanted)
    return domain, Part(read, endless=True)


def _config_of(name: str) -> tuple[str, str | None]:
    """A data set's name or folder, and the configuration behind it. Names on the Hub have an owner,
    so only a third part is one."""
    head, _, last = name.rpartition("/")
    if os.path.exists(name):
        return name, None
    local = name.startswith(("/", ".", "~"))
    if (local and os.path.isdir(head)) or (not local and name.count("/") == 2):
        return head, last
    return name, None


def _read_dataset(
    shown: str, path: str, config: str | None, split: str, wanted: Sequence[str], reading: Reading
) -> Iterator[Piece]:
    """Rows as they come over the network or from a folder. Without a network, what an earlier
    download left in the cache."""
    import datasets  # here, because it takes a second to import
    from datasets.exceptions import DatasetsError
    from huggingface_hub.constants import is_offline_mode

    streamed = os.path.isdir(path) or not is_offline_mode()
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with TemporaryDirectory(prefix="qmoe-datasets-") as folder:
            # What is streamed needs no cache, but a place for locks.
            cache = folder if streamed else None
            how: dict[str, Any] = {"split": split, "streaming": streamed, "cache_dir": cache}
            rows: Any = datasets.load_dataset(path, config, **how)
            if streamed and reading.seed is not None:
                rows = rows.shuffle(seed=reading.seed, buffer_size=SHUFFLED)
            yield from documents(rows, wanted, shown, reading)
    except (OSError, ValueError, LookupError, RuntimeError, StopIteration, DatasetsError) as error:
        raise CalibrationError(
            f"{shown}: cannot load the dataset: {error} (a configuration is written "
            "hf:NAME/CONFIG; a folder for its cache that can be written is named by HF_HOME)"
        ) from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
