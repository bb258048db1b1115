import json

import pytest
import torch
from helpers import whole
from transformers import AutoTokenizer

from qmoe.calibration.batches import choose_samples, fingerprint, tokenize
from qmoe.calibration.pieces import plain
from qmoe.calibration.text import Texts, load_texts, shipped_domains
from qmoe.errors import CalibrationError


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo)


def test_bundled_and_heldout_text_are_disjoint():
    bundled, heldout = whole(load_texts("bundled")), whole(load_texts("heldout"))
    assert set(bundled) == set(heldout) == set(shipped_domains())
    assert sum(len(t.encode()) for t in [*bundled.values(), *heldout.values()]) < 2_000_000
    for domain, text in heldout.items():
        # Long paragraphs only: a heading or a formula may well occur twice.
        known = set(bundled[domain].split("\n\n"))
        assert not [p for p in text.split("\n\n") if len(p) > 200 and p in known]


def test_domains_can_be_chosen():
    assert list(load_texts("bundled:metamath+austen").domains) == ["metamath", "austen"]
    with pytest.raises(CalibrationError, match="bundled:mars: no such domain; expected some of"):
        load_texts("bundled:mars")


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "a.train.txt").write_text("alpha")
    (tmp_path / "b.txt").write_text("beta")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("x", "y")))
    both = load_texts(f"{tmp_path}/*.train.txt,{tmp_path}/c.jsonl")
    assert whole(both) == {"a": "alpha", "c": "x\n\ny"}
    texts = load_texts(str(tmp_path))
    assert whole(texts) == {"a": "alpha", "b": "beta", "c": "x\n\ny"} and not texts.notes


def test_parts_of_one_domain_are_joined(tmp_path):
    (tmp_path / "a.1.txt").write_text("one")
    (tmp_path / "a.2.txt").write_text("two")
    assert whole(load_texts(str(tmp_path))) == {"a": "one\n\ntwo"}


def test_a_dataset_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps({"body": "hello"}) + "\n")
    assert whole(load_texts(f"hf:{folder}:train:body")) == {"corpus": "hello"}
    with pytest.raises(CalibrationError, match=r"no column 'text' or .* the table has \['body'\]"):
        whole(load_texts(f"hf:{folder}"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("binary.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("absent.txt", None, "no such text file or folder"),
    ],
)
def test_bad_text_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=message):
        whole(load_texts(str(path)))


def test_windows_are_whole_and_spread_over_domains(tokenizer, tmp_path):
    for domain, text in whole(load_texts("bundled")).items():
        (tmp_path / f"{domain}.txt").write_text(text[:20_000])
    texts = load_texts(str(tmp_path))
    samples, notes = choose_samples(tokenizer, texts, 12, 64, seed=0)
    assert samples.shape == (12, 64) and not notes
    rows = {d: tokenize(tokenizer, t, 64) for d, t in whole(texts).items()}
    per_domain = [sum(any(torch.equal(w, r) for r in rows[d]) for w in samples) for d in rows]
    assert per_domain == [3, 3, 2, 2, 2]


def test_same_seed_same_windows_other_seed_others(tokenizer):
    texts = load_texts("bundled:austen")
    first, again, other = (
        fingerprint(choose_samples(tokenizer, texts, 8, 64, seed=s)[0]) for s in (0, 0, 1)
    )
    assert first == again != other


def test_a_tokenizer_that_starts_texts_with_bos_starts_every_window_with_it(tokenizer):
    class Starting:
        bos_token_id = 7

        def __call__(self, text, **kwargs):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": ids if "add_special_tokens" in kwargs else [7, *ids]}

    samples = tokenize(Starting(), "some words " * 200, 32)
    assert (samples[:, 0] == 7).all() and (samples[:, 1:] != 7).any()
    plain = tokenize(tokenizer, "some words " * 200, 31)
    assert torch.equal(samples[:, 1:], plain[: len(samples)])


def test_text_shorter_than_a_window(tokenizer):
    for text in ("too short", "  \n"):
        with pytest.raises(CalibrationError, match="empty or shorter than one sample of 512 to"):
            choose_samples(tokenizer, Texts({"note": [plain(text)]}), 4, 512, seed=0)


def test_what_a_tokenizers_file_says_of_truncation_and_padding_plays_no_part(tokenizer):
    """Text is longer than what a model's authors cut their inputs to."""
    text = "The bread was warm. " * 50
    expected = tokenize(tokenizer, text, 16)
    tokenizer.backend_tokenizer.enable_truncation(max_length=20)
    tokenizer.backend_tokenizer.enable_padding(length=1000)
    assert torch.equal(tokenize(tokenizer, text, 16), expected)


def test_a_tokenizer_without_a_fast_backend_gives_the_same(tokenizer):
    class Slow:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    text = "The bread was warm. " * 50
    assert torch.equal(tokenize(Slow(), text, 16), tokenize(tokenizer, text, 16))
