"""What is no text in a table: messages go through the chat template, all else is refused."""

import json

import pytest
from transformers import AutoTokenizer

from qmoe.calibration.batches import choose_samples, tokenize
from qmoe.calibration.chat import document
from qmoe.calibration.text import load_texts
from qmoe.errors import CalibrationError

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


@pytest.fixture
def tokenizer(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def say(role, text):
    return {"role": role, "content": text}


def samples_of(tokenizer, path, rows, column="text"):
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return choose_samples(tokenizer, load_texts(str(path)), 4, 16, seed=0)


def lines(n):
    return [f"In year {i} the question was asked, {i} times in all." for i in range(n)]


def test_messages_are_calibrated_on_as_the_chat_template_writes_them(tokenizer, tmp_path):
    rows = [[say("user", line), say("assistant", line)] for line in lines(9)]
    text = "\n\n".join(f"<user>{line}\n<assistant>{line}\n" for line in lines(9))
    expected, _ = samples_of(tokenizer, tmp_path / "a.jsonl", [text])
    found, notes = samples_of(tokenizer, tmp_path / "b.jsonl", rows)
    assert found.equal(expected) and not notes
    assert len(tokenize(tokenizer, text, 16)) > 4
    shared = [
        [{"from": "human", "value": line}, {"from": "gpt", "value": line}] for line in lines(9)
    ]
    columns = [{"role": ["user", "assistant"], "content": [line, line]} for line in lines(9)]
    parts = [
        [
            say(role, [{"type": "text", "text": line}]) | {"name": None}
            for role in ("user", "assistant")
        ]
        for line in lines(9)
    ]
    for column, rows in (("conversations", shared), ("messages", columns), ("text", parts)):
        found, _ = samples_of(tokenizer, tmp_path / "c.jsonl", rows, column)
        assert found.equal(expected), column


def test_a_message_without_content_says_nothing():
    calls = say("assistant", None) | {"tool_calls": [{"function": {"name": "f"}}]}
    assert document([say("user", "x"), calls], "here")[1] == calls | {"content": ""}


def test_rows_without_text_are_skipped_and_counted(tokenizer, tmp_path):
    expected, _ = samples_of(tokenizer, tmp_path / "a.jsonl", lines(9))
    rows = [row for line in lines(9) for row in (line, None, " \n", [])]
    found, notes = samples_of(tokenizer, tmp_path / "b.jsonl", rows)
    assert found.equal(expected)
    assert notes == [f"{tmp_path / 'b.jsonl'}: 27 of 36 rows hold no text (null or empty)"]


def test_conversations_that_the_template_refuses_are_counted(tokenizer, tmp_path):
    rows = [[say("user", line)] for line in lines(20)]
    rows[3] = [say("narrator", "once"), say("user", "upon")]
    _, notes = samples_of(tokenizer, tmp_path / "b.jsonl", rows)
    assert notes == [
        "b: 1 of 20 conversations left out, the chat template refuses them: unknown role"
    ]
    with pytest.raises(CalibrationError, match="2 of 2 conversations left out, .* unknown role"):
        samples_of(tokenizer, tmp_path / "b.jsonl", rows[3:4] * 2)


def test_a_tokenizer_without_a_chat_template_is_said(tokenizer, tmp_path):
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match="tokenizer has no chat template"):
        samples_of(tokenizer, tmp_path / "b.jsonl", [[say("user", "x")]])


@pytest.mark.parametrize(
    "value, message",
    [
        (["a", "b"], "holds a list of str; expected text, or messages"),
        ([1, 2], "holds a list of int"),
        ({"a": 1}, r"holds an object with \['a'\]"),
        (3, "holds a value of type int"),
        (True, "holds a value of type bool"),
        ([{"question": "x"}], r"holds a list with \['question'\]"),
        ([{"role": 1, "content": "x"}], "holds a list with"),
        ([{"role": "user", "value": "x"}], r"holds a list with \['role', 'value'\]"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "holds a message with image",
        ),
        ([{"role": "user", "content": 5}], "holds a message with a value of type int"),
        (str([{"role": "user", "content": "x"}]), "holds messages printed into a string"),
        (json.dumps([{"from": "human", "value": "x"}]), "holds messages printed into a string"),
    ],
)
def test_what_is_neither_text_nor_messages_is_refused(tokenizer, tmp_path, value, message):
    with pytest.raises(CalibrationError, match=rf"row 2 of column 'text' {message}"):
        samples_of(tokenizer, tmp_path / "b.jsonl", ["fine", value])
