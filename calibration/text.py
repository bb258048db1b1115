"""Text by domain: what ships with qmoe, local files, or any `datasets` name."""

import glob
import os
from importlib.resources import files
from pathlib import Path

from qmoe.errors import CalibrationError

TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_texts(spec: str) -> dict[str, str]:
    """Text by domain name.

    spec: comma separated, each part one of
        bundled, bundled:DOMAIN[+DOMAIN]   calibration text that ships with qmoe
        heldout, heldout:DOMAIN[+DOMAIN]   disjoint text of the same domains, for evaluation
        hf:NAME[:SPLIT[:COLUMN]]           a dataset for `datasets.load_dataset` (train, text)
        PATH                               a .txt, .json, .jsonl, .csv or .parquet file, a folder of
                                           .txt files, or a glob; the domain is the file's name up
                                           to the first dot
    Raises CalibrationError if a part names nothing or all text is empty.
    """
    texts: dict[str, str] = {}
    for part in filter(None, spec.split(",")):
        if part.startswith("hf:"):
            _add(texts, _dataset(part[3:]))
        elif part.partition(":")[0] in ("bundled", "heldout"):
            kind, _, domains = part.partition(":")
            _add(texts, _shipped(kind, domains.split("+") if domains else shipped_domains()))
        else:
            _add(texts, _local(part))
    if not any(text.strip() for text in texts.values()):
        raise CalibrationError(f"{spec}: the text is empty")
    return texts


def shipped_domains() -> list[str]:
    """Domains of the bundled text."""
    folder = files("qmoe.calibration") / "text"
    return sorted(p.name[:-4] for p in folder.iterdir() if p.name.endswith(".txt"))


def _shipped(kind: str, domains: list[str]) -> dict[str, str]:
    folder = files("qmoe.calibration") / "text"
    if kind == "heldout":
        folder = folder / "heldout"
    known = shipped_domains()
    unknown = [d for d in domains if d not in known]
    if unknown:
        raise CalibrationError(
            f"{kind}:{unknown[0]}: no such domain; expected some of {'+'.join(known)}"
        )
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in domains}


def _local(part: str) -> dict[str, str]:
    root = os.path.expanduser(part)
    if os.path.isdir(root):
        paths = sorted(Path(root).glob("*.txt"))
    else:
        # os.path and glob: pathlib fails on what cannot be a file's name, such as the text itself.
        paths = [Path(p) for p in sorted(glob.glob(root))]
    if not paths:
        shown = part if len(part) <= 200 else f"{part[:200]}.."
        raise CalibrationError(
            f"{shown}: no such text file or folder (a dataset is written 'hf:{shown}'; text itself "
            "goes into a file)"
        )
    texts: dict[str, str] = {}
    for path in paths:
        _add(texts, {path.name.split(".")[0]: _read(path)})
    return texts


def _add(texts: dict[str, str], more: dict[str, str]) -> None:
    """Parts that name the same domain are joined, never dropped."""
    for domain, text in more.items():
        texts[domain] = f"{texts[domain]}\n\n{text}" if domain in texts else text


def _read(path: Path) -> str:
    if path.suffix in TABLES:
        return _dataset(f"{TABLES[path.suffix]}::text", data_files=str(path)).popitem()[1]
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _dataset(spec: str, data_files: str | None = None) -> dict[str, str]:
    import datasets  # here, because it takes a second to import
    from datasets.exceptions import DatasetsError

    name, split, column = (spec.split(":") + ["", ""])[:3]
    shown = data_files or f"hf:{spec}"
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=split or "train", data_files=data_files)
    except (OSError, ValueError, KeyError, StopIteration, DatasetsError) as error:
        raise CalibrationError(f"{shown}: cannot load the dataset: {error}") from error
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    column = column or "text"
    if column not in rows.column_names:
        raise CalibrationError(
            f"{shown}: no column {column!r}; the dataset has {rows.column_names}"
        )
    return {Path(name).name: "\n\n".join(str(text) for text in rows[column])}
