"""Of long text pieces are chosen; what is not found is said; names may hold anything."""

import json
from collections.abc import Iterator

import pytest
import torch
from helpers import whole
from transformers import AutoTokenizer

from qmoe.calibration import batches, pieces
from qmoe.calibration.batches import choose_samples, fingerprint, tokenize
from qmoe.calibration.pieces import Part, Piece, Reading, choose, plain
from qmoe.calibration.text import Texts, load_texts, merged
from qmoe.config import CalibrationConfig, QuantConfig
from qmoe.errors import CalibrationError, ConfigError
from qmoe.measure.logits import make_batches


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo)


@pytest.fixture
def small(monkeypatch):
    """Text is long from 2,000 characters on."""
    monkeypatch.setattr(pieces, "SLICE", 2000)
    monkeypatch.setattr(batches, "SLICE", 2000)
    monkeypatch.setattr(batches, "PIECE", 200)
    monkeypatch.setattr(batches, "CHARACTERS", 1)


@pytest.fixture
def tokenized(monkeypatch):
    """Lengths of the texts that were tokenized."""
    lengths = []
    real = batches._ids
    monkeypatch.setattr(batches, "_ids", lambda t, text: lengths.append(len(text)) or real(t, text))
    return lengths


def text(n):
    return "".join(f"In year {i} the question was asked again.\n" for i in range(n))


def test_of_a_long_file_a_part_is_tokenized_drawn_from_all_of_it(
    tokenizer, tmp_path, small, tokenized
):
    (tmp_path / "a.txt").write_text(text(5000))
    texts = load_texts(str(tmp_path / "a.txt"))
    samples, notes = choose_samples(tokenizer, texts, 16, 16, seed=0)
    assert samples.shape == (16, 16) and not notes
    assert sum(tokenized) < 3000 and max(tokenized) < 2500
    seen = tokenizer.decode(samples.flatten())
    years = [int(word) for word in seen.split() if word.isdigit() and len(word) == 4]
    assert min(years) < 2000 and max(years) > 3500
    again, _ = choose_samples(tokenizer, texts, 16, 16, seed=0)
    other, _ = choose_samples(tokenizer, texts, 16, 16, seed=1)
    assert fingerprint(samples) == fingerprint(again) != fingerprint(other)


def test_more_is_read_where_tokens_are_long(tokenizer, small, tokenized):
    """2,000 characters are not enough for these samples, but the text is longer."""
    texts = Texts({"a": [plain(text(2000))]})
    samples, notes = choose_samples(tokenizer, texts, 64, 32, seed=0)
    assert len(samples) == 64 and not notes
    assert 2000 < sum(tokenized) < len(text(2000)) / 2


def test_text_that_is_not_long_is_taken_whole(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(text(2000))
    samples, _ = choose_samples(tokenizer, load_texts(str(tmp_path / "a.txt")), 8, 64, seed=3)
    rows = tokenize(tokenizer, text(2000), 64)
    picked = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))[:8]
    assert samples.equal(rows[picked.sort().values])


def test_evaluation_scores_the_first_windows_and_reads_no_further(
    tokenizer, tmp_path, small, tokenized
):
    (tmp_path / "a.txt").write_text(text(5000))
    texts = load_texts(str(tmp_path / "a.txt"))
    found, notes = make_batches(tokenizer, texts, samples=32, seqlen=16, batch=10)
    assert sum(tokenized) < 20_000 and not notes
    first = tokenize(tokenizer, text(5000), 16)[:32]
    assert torch.cat([ids for _, ids in found]).equal(first)


def test_pieces_of_all_kinds_of_documents_join_to_what_they_were(tmp_path):
    documents = [text(50), "short", "no line's end " * 500, ""]
    for size in (10, 200, 10**6):
        parts = [Part(lambda r, d=d: pieces.cut(d, r.piece)) for d in documents]
        chosen, all_ = choose(parts, 10**6, Reading(0, size))
        joined = "".join(pieces.slices(chosen, lambda chat: None))
        assert joined == "\n\n".join(documents) and all_
        (tmp_path / "a.txt").write_text(text(50) + "x" * 1000)
        with open(tmp_path / "a.txt") as file:
            found = list(pieces.cut_file(file, size))
        assert "".join(p.content for p in found) == text(50) + "x" * 1000
        assert [p.continues for p in found] == [False] + [True] * (len(found) - 1)


def test_of_a_data_set_no_more_is_read_than_needed(tokenizer, monkeypatch, small):
    """hf:OWNER/NAME/CONFIG:SPLIT:COLUMN, of rows without an end."""
    read = []

    class Endless:
        def shuffle(self, **how):
            read.append(how)
            return self

        def __iter__(self) -> Iterator[dict]:
            while True:
                read.append(1)
                yield {"body": text(3), "text": "not this"}

    def load_dataset(*args, **kwargs):
        read.append((args, kwargs))
        return Endless()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    texts = load_texts("hf:owner/name/config:test:body")
    assert list(texts.domains) == ["name/config"]
    samples, notes = choose_samples(tokenizer, texts, 4, 16, seed=5)
    assert samples.shape == (4, 16) and not notes
    assert read[0][0] == ("owner/name", "config")
    assert read[0][1].items() >= {"split": "test", "streaming": True}.items()
    assert read[1]["seed"] == 5 and 100 < len(read) < 1000
    read.clear()
    make_batches(tokenizer, texts, samples=4, seqlen=16, batch=2)
    assert len(read) < 100 and read[1] == 1  # in its own order


@pytest.mark.parametrize("name", ["a:b:c:d", ""])
def test_the_name_of_a_data_set_that_cannot_be_one(name):
    with pytest.raises(CalibrationError, match=r"expected hf:NAME\[/CONFIG\]\[:SPLIT\[:COLUMN\]\]"):
        load_texts(f"hf:{name}")


def test_a_configuration_of_a_data_set_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("x", "y"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    settings = [f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("x", "y")]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(settings) + "---\n")
    assert whole(load_texts(f"hf:{folder}/y")) == {"corpus/y": "y"}
    with pytest.raises(CalibrationError, match="a configuration is written hf:NAME/CONFIG"):
        whole(load_texts(f"hf:{folder}"))


def test_fewer_windows_than_asked_for_are_said_by_domain(tokenizer):
    texts = Texts({"long": [plain(text(99))], "some": [plain(text(9))], "none": [plain("few")]})
    samples, notes = choose_samples(tokenizer, texts, 30, 32, seed=0)
    some = len(tokenize(tokenizer, text(9), 32))
    assert 0 < some < 10 and len(samples) == 10 + some
    assert notes == [
        f"text: 30 samples of 32 tokens were asked for, {10 + some} found: some {some} of 10, none "
        "0 of 10; give more text, or ask for fewer or shorter samples"
    ]
    del texts.domains["none"]
    _, notes = make_batches(tokenizer, texts, samples=20, seqlen=32, batch=4)
    assert notes[0].startswith(f"text: 40 samples of 32 tokens were asked for, {20 + some} found")


def test_more_domains_than_windows_are_said_and_drawn(tokenizer):
    texts = Texts({f"d{i:02}": [plain(text(9) + str(i))] for i in range(40)})
    samples, notes = choose_samples(tokenizer, texts, 4, 32, seed=0)
    assert len(samples) == 4 and notes == ["text: 4 samples for 40 domains, 36 gave none"]


def test_what_a_folder_holds_beside_text_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "b.JSONL").write_text('{"text": "beta"}')
    (tmp_path / "notes.md").write_text("gamma")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "c.txt").write_text("delta")
    texts = load_texts(str(tmp_path))
    assert whole(texts) == {"a": "alpha", "b": "beta"}
    assert texts.notes == [f"{tmp_path}: not read as text: inside/, notes.md"]
    assert whole(load_texts(f"{tmp_path}/**/*.txt")) == {"a": "alpha", "c": "delta"}
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.JSONL").unlink()
    with pytest.raises(CalibrationError, match=r"holds no text; .* found inside/, notes.md; name"):
        load_texts(str(tmp_path))


@pytest.mark.parametrize("name", ["a[1].txt", "a,b.txt", "a:b.txt", "a*b?.txt", "hf x.txt"])
def test_paths_may_hold_what_stands_for_something_else(tmp_path, name):
    for folder in (tmp_path, tmp_path / "d[0],[x]"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("alpha")
        expected = {name.split(".")[0]: "alpha"}
        assert whole(load_texts(str(folder / name))) == expected
        assert whole(load_texts([str(folder / name)])) == expected
    other = tmp_path / "z.txt"
    other.write_text("omega")
    both = {name.split(".")[0]: "alpha", "z": "omega"}
    assert whole(load_texts([str(tmp_path / name), str(other)])) == both
    assert whole(load_texts(merged([str(tmp_path / name), str(other)]))) == both
    pattern = tmp_path / "d[0],[x]" / "*.txt"
    assert whole(load_texts([str(pattern)])) == expected


def test_commas_in_names_with_a_column_or_of_data_sets(tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    (folder / "t.jsonl").write_text(json.dumps({"body": "alpha"}))
    (tmp_path / "z.txt").write_text("omega")
    assert whole(load_texts(f"{folder}/t.jsonl:body")) == {"t": "alpha"}
    assert whole(load_texts(f"hf:{folder}:train:body")) == {"a,b": "alpha"}
    (tmp_path / "t.jsonl").write_text(json.dumps({"body": "beta"}))
    both = whole(load_texts(f"{tmp_path}/t.jsonl:body,{tmp_path}/z.txt"))
    assert both == {"t": "beta", "z": "omega"}


def test_text_options_that_are_repeated(tmp_path):
    from qmoe.cli.options import build_parser
    from qmoe.cli.settings import config_from

    (tmp_path / "a,b.txt").write_text("alpha")
    parse = build_parser().parse_args
    args = ["quantize", "src", "dst", "--calibration", f"{tmp_path}/a,b.txt"]
    assert config_from(parse(args)).calibration.text == f"{tmp_path}/a,b.txt"
    config = config_from(parse([*args, "--calibration", "bundled:austen,x.txt"]))
    assert config.calibration.text == (f"{tmp_path}/a,b.txt", "bundled:austen", "x.txt")
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert parse(["eval", "x", "--text", "a,b", "--text", "c"]).text == ["a,b", "c"]
    for bad in ([], ""):
        with pytest.raises(ConfigError, match="calibration text: expected"):
            CalibrationConfig(text=bad)


def test_a_piece_knows_its_size():
    assert Piece("four").size() == 4
    assert Piece([{"role": "user", "content": "four"}, {"role": "x", "content": "2!"}]).size() == 6
