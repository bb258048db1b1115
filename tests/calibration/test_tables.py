"""Every kind of table gives the same documents; what cannot be read is named."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from helpers import whole

from qmoe.calibration import tables
from qmoe.calibration.pieces import Reading
from qmoe.calibration.text import load_texts
from qmoe.errors import CalibrationError

ROWS = [{"id": 1, "text": 'a "quoted"\nline'}, {"id": 2, "text": "é中, b"}, {"id": 3, "text": None}]
TEXT = 'a "quoted"\nline\n\né中, b'
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'id,text\n1,"a ""quoted""\nline"\n2,"é中, b"\n3,\n'


def write(path, name):
    file = path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=1)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    else:
        text = {".json": json.dumps(ROWS, indent=1), ".csv": CSV}.get(file.suffix, LINES)
        text = CSV.replace(",", "\t", 1) if file.suffix == ".tsv" else text
        text = text.replace("1,", "1\t").replace("2,", "2\t") if file.suffix == ".tsv" else text
        text = text.replace("3,", "3\t") if file.suffix == ".tsv" else text
        file.write_text(text, encoding="utf-8")
    return file


NAMES = ["t.jsonl", "t.ndjson", "t.json", "t.csv", "t.tsv", "t.parquet", "t.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_text_whatever_its_kind(tmp_path, name):
    file = write(tmp_path, name)
    assert whole(load_texts(str(file))) == {"t": TEXT}
    reading = Reading(0)
    assert len(list(tables.read_table(file, "text", reading))) == 2
    assert reading.notes("t") == [f"{file}: 1 of 3 rows hold no text (null or empty)"]


def test_json_objects_behind_each_other_are_read_as_those_in_a_list(tmp_path):
    (tmp_path / "t.json").write_text(LINES)
    assert whole(load_texts(str(tmp_path / "t.json"))) == {"t": TEXT}


@pytest.mark.parametrize("block", [1, 2, 7, 50])
def test_json_that_is_longer_than_a_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tables, "BLOCK", block)
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=3), LINES, LINES.strip(), "[]", ""):
        (tmp_path / "t.json").write_text(text)
        rows = list(tables._json(tmp_path / "t.json", []))
        assert rows == (ROWS if len(text) > 2 else [])


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_as_what_is_in_them(tmp_path, ending):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    pack[".zst"] = lambda data: pa.compress(data, "zstd", asbytes=True)
    (tmp_path / f"t.jsonl{ending}").write_bytes(pack[ending](LINES.encode()))
    (tmp_path / f"u.txt{ending}").write_bytes(pack[ending]("wörds".encode()))
    assert whole(load_texts(str(tmp_path))) == {"t": TEXT, "u": "wörds"}
    (tmp_path / f"t.jsonl{ending}").write_bytes(pack[ending](LINES.encode())[:-9])
    with pytest.raises(CalibrationError, match=rf"t.jsonl{ending}: cannot be read"):
        whole(load_texts(str(tmp_path / f"t.jsonl{ending}")))


def test_a_folder_that_datasets_saved(tmp_path):
    Dataset.from_list(ROWS[:2]).save_to_disk(tmp_path / "saved")
    texts = load_texts(str(tmp_path / "saved"))
    assert list(whole(texts).values()) == [TEXT]
    assert "not read as text: dataset_info.json, state.json" in texts.notes[0]


def test_texts_longer_than_csv_usually_allows(tmp_path):
    long = "word " * 100_000
    (tmp_path / "t.csv").write_text(f"text\n{long}\n")
    assert whole(load_texts(str(tmp_path / "t.csv"))) == {"t": long}


def test_a_column_can_be_named_of_files_folders_and_patterns(tmp_path):
    for name, word in (("a", "one"), ("b", "two")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"body": word, "text": "no"}))
    (tmp_path / "c.txt").write_text("three")
    assert whole(load_texts(f"{tmp_path}/a.jsonl:body")) == {"a": "one"}
    assert whole(load_texts(f"{tmp_path}/*.jsonl:body")) == {"a": "one", "b": "two"}
    assert whole(load_texts(f"{tmp_path}:body")) == {"a": "one", "b": "two", "c": "three"}
    with pytest.raises(CalibrationError, match="c.txt:body: a column can be named of a table"):
        load_texts(f"{tmp_path}/c.txt:body")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.jsonl", '{"text": "x"}\n{"text": \n', "t.jsonl: cannot be read: line 2: "),
        ("t.jsonl", '"just a string"\n', "row 1 is 'just a string', not an object"),
        ("t.json", '[{"text": "x"}, {"text"', "t.json: cannot be read: Expecting"),
        ("t.json", '[{"text": "x"}', "t.json: cannot be read: Expecting"),
        ("t.json", '[{"text": "x"}] {}', "something follows its list"),
        ("t.json", '{"data": []}', "no column 'text' or 'messages' or 'conversations'; the table"),
        ("t.jsonl", '{"body": "x"}\n' * 1000, "write the one that holds the text behind the"),
        ("t.csv", 'text\n"no end\n', "t.csv: cannot be read: unexpected end of data"),
        ("t.parquet", "PAR1 no more", "t.parquet: cannot be read: "),
        ("t.arrow", "none", "t.arrow: cannot be read: "),
        ("t.txt.gz", "no gzip", "t.txt.gz: cannot be read: Not a gzipped file"),
        ("t.jsonl", b'{"text": "\xff"}', "t.jsonl: cannot be read as UTF-8 text"),
    ],
)
def test_damaged_tables_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=message):
        whole(load_texts(str(path)))
