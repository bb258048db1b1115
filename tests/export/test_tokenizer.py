"""What a GGUF says of a tokenizer."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qmoe.errors import UnsupportedModelError
from qmoe.export.tokenizer import RULES, add_tokenizer

HERE = Path("somewhere")


class Writer:
    """Keeps what is written, by the writer's method."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        assert hasattr(gguf.GGUFWriter, name), f"gguf has no {name}"
        return lambda value: self.said.__setitem__(name.removeprefix("add_"), value)


def byte_level(steps: list[Any], merges: int = 3, **more: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that joins "a" and "b", and then some more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [("a", "b"), ("ab", "c"), ("d", "e")][:merges]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(p) for p in joined)])}
    made = Tokenizer(models.BPE(vocab, joined, **more))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def steps_of(rules: tuple[str, ...]) -> list[Any]:
    """The steps of tokenizer.json that rules stand for."""
    out: list[Any] = []
    for rule in rules:
        if rule == "digit":
            out.append(pre_tokenizers.Digits(individual_digits=True))
        elif rule != "words":
            out.append(pre_tokenizers.Split(Regex(rule), "isolated"))
    own = rules[-1] == "words"
    return [*out, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]


@pytest.mark.parametrize("rules", RULES, ids=RULES.values())
def test_rules_are_known_by_name(rules: tuple[str, ...]) -> None:
    writer = Writer()
    add_tokenizer(writer, byte_level(steps_of(rules)), 300, HERE)
    assert writer.said["tokenizer_model"] == "gpt2"
    assert writer.said["tokenizer_pre"] == RULES[rules]


def test_words_that_are_tokens() -> None:
    """Llama 3's rules are dbrx's, and differ in what is done to a word that is a token."""
    rules = next(rules for rules, name in RULES.items() if name == "dbrx")
    for ignored, name in ((True, "llama-bpe"), (False, "dbrx")):
        writer = Writer()
        add_tokenizer(writer, byte_level(steps_of(rules), ignore_merges=ignored), 300, HERE)
        assert writer.said["tokenizer_pre"] == name


def test_tokens_and_their_kinds() -> None:
    writer, kind = Writer(), gguf.TokenType
    tokenizer = byte_level(steps_of(("words",)))
    tokenizer.chat_template = "{{ messages }}"
    add_tokenizer(writer, tokenizer, 263, HERE)
    tokens, kinds = writer.said["token_list"], writer.said["token_types"]
    assert tokens[256:] == ["ab", "abc", "de", "<end>", "<tool>", "[PAD261]", "[PAD262]"]
    assert kinds[255:] == [kind.NORMAL] * 4 + [kind.CONTROL, kind.USER_DEFINED] + [kind.UNUSED] * 2
    assert writer.said["token_merges"] == ["a b", "ab c", "d e"]
    assert writer.said["eos_token_id"] == 259
    assert "bos_token_id" not in writer.said
    assert writer.said["add_bos_token"] is False
    assert writer.said["chat_template"] == "{{ messages }}"


def test_sentencepiece_scores_follow_the_merges() -> None:
    """The earlier a pair is merged, the better its token's score."""
    base = ["<unk>", "<s>", "<0x00>", "▁", "a", "b", "c"]
    vocab = {token: i for i, token in enumerate([*base, "ab", "▁ab", "abc"])}
    merges = [("a", "b"), ("▁", "ab"), ("ab", "c")]
    made = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.add_special_tokens(["<s>"])
    writer = Writer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    add_tokenizer(writer, tokenizer, 10, HERE)
    kind = gguf.TokenType
    assert writer.said["tokenizer_model"] == "llama"
    assert writer.said["token_scores"][7:] == [-1.0, -2.0, -3.0]
    assert writer.said["token_types"][:4] == [kind.UNKNOWN, kind.CONTROL, kind.BYTE, kind.NORMAL]
    assert writer.said["add_space_prefix"] is True


def test_other_rules_are_refused() -> None:
    steps = [pre_tokenizers.Split(Regex("[a-f]+"), "isolated"), pre_tokenizers.ByteLevel()]
    with pytest.raises(UnsupportedModelError, match=r"way to split text.*--no-tokenizer"):
        add_tokenizer(Writer(), byte_level(steps), 300, HERE)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0)))
    with pytest.raises(UnsupportedModelError, match="its model is Unigram, expected BPE"):
        add_tokenizer(Writer(), unigram, 300, HERE)
