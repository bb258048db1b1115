"""A tokenizer as a GGUF tells of it: tokens, their kinds, merges or scores, the chat template.

llama.cpp has the splitting of text into words built in and chooses it by name. Its converter knows
the name by a hash of what the tokenizer makes of a text; here it is known by the rules in
tokenizer.json themselves, so tokenizers that were trained with the same rules have it too. Rules
that are not in the table are refused: other words would give other tokens.
"""

import json
from pathlib import Path
from typing import Any

import gguf

from qmoe.errors import UnsupportedModelError

# Rules of tokenizer.json, as `_rules` says them, and llama.cpp's name of them.
_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
RULES: dict[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digit", "words"): "smollm",
    (rf"{_SUFFIXES}|{_START}\p{{L}}+|\p{{N}}{_REST}",): "qwen2",
    (rf"{_SUFFIXES}|{_START}\p{{L}}+|\p{{N}}{{1,3}}{_REST}",): "dbrx",
    (
        rf"{_START}{_UPPER}*{_LOWER}+{_SUFFIXES}?|{_START}{_UPPER}+{_LOWER}*{_SUFFIXES}?"
        rf"|\p{{N}}{{1,3}}{_SLASH}",
    ): "gpt-4o",
    (
        rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}{_SLASH}",
    ): "tekken",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        "|[^\r\n" r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[" "\r\n" r"]*|\s*[" "\r\n" r"]+"
        r"|\s+(?!\S)|\s+",
    ): "deepseek-v3",
}  # fmt: skip
# Rules that llama.cpp knows by another name where a word that is a token is never split.
WHOLE_WORDS = {"dbrx": "llama-bpe"}
SPACE = "▁"


def add_tokenizer(writer: Any, tokenizer: Any, size: int, where: Path) -> None:
    """Write what a GGUF says of a transformers tokenizer. size: rows of the embeddings; tokens
    beyond the tokenizer's are marked unused. UnsupportedModelError for a tokenizer that llama.cpp
    does not have, saying why."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(where, "it is not one of the `tokenizers` library")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise _refused(where, f"its model is {model['type']}, expected BPE")
    if model.get("byte_fallback"):
        _add_sentencepiece(writer, rules, model)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of(rules, model, where))
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        writer.add_token_merges([f"{left} {right}" for left, right in pairs])
    tokens, kinds = _tokens(rules, model, size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model.get("byte_fallback"):
        writer.add_token_scores(_scores(model, tokens))
    _add_special(writer, tokenizer)


def _refused(where: Path, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: its tokenizer cannot be written to a GGUF, {why}; export without a tokenizer "
        "(--no-tokenizer) and give llama.cpp token ids"
    )


def _rules(step: Any) -> list[str]:
    """How text is split into words, a string for each step. ByteLevel's own rule is "words"."""
    if step is None:
        return []
    kind = step["type"]
    if kind == "Sequence":
        return [rule for part in step["pretokenizers"] for rule in _rules(part)]
    if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        return [step["pattern"].get("Regex") or str(step["pattern"])]
    if kind == "Digits" and step["individual_digits"]:
        return ["digit"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return ["words"] if step.get("use_regex", True) else []
    return [json.dumps(step)]


def _name_of(rules: Any, model: Any, where: Path) -> str:
    found = tuple(_rules(rules["pre_tokenizer"]))
    name = RULES.get(found)
    if name is None:
        raise _refused(where, f"its way to split text is not known by name: {found!r:.300}")
    return WHOLE_WORDS.get(name, name) if model.get("ignore_merges") else name


def _tokens(rules: Any, model: Any, size: int) -> tuple[list[str], list[int]]:
    kind = gguf.TokenType
    known = {i: token for token, i in model["vocab"].items()}
    kinds = dict.fromkeys(known, kind.NORMAL)
    if model.get("byte_fallback"):
        kinds |= {i: kind.BYTE for i, token in known.items() if _is_byte(token)}
        kinds |= {i: kind.UNKNOWN for i, token in known.items() if token == model.get("unk_token")}
    for added in rules["added_tokens"]:
        known[added["id"]] = added["content"]
        if kinds.get(added["id"]) != kind.UNKNOWN:
            kinds[added["id"]] = kind.CONTROL if added["special"] else kind.USER_DEFINED
    tokens = [known.get(i, f"[PAD{i}]") for i in range(size)]
    return tokens, [int(kinds.get(i, kind.UNUSED)) for i in range(size)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(model: Any, tokens: list[str]) -> list[float]:
    """SentencePiece merges the pair whose token has the best score: the earlier its merge."""
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    made = reversed(list(enumerate("".join(pair) for pair in pairs)))
    score = {token: -1.0 - i for i, token in made}
    return [score.get(token, 0.0) for token in tokens]


def _add_sentencepiece(writer: Any, rules: Any, model: Any) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    said = json.dumps([rules["normalizer"], rules["pre_tokenizer"]], ensure_ascii=False)
    prefixed = '"Prepend"' in said or '"prepend_scheme": "first"' in said
    writer.add_add_space_prefix(prefixed or '"prepend_scheme": "always"' in said)


def _add_special(writer: Any, tokenizer: Any) -> None:
    """Ids of special tokens, which of them are put around a text, and the chat template."""
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(bos is not None and ids[0] == bos)
    writer.add_add_eos_token(eos is not None and ids[-1] == eos)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
