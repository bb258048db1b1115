"""Whether llama.cpp splits text as tokenizer.json's rules do, for every rule that qmoe knows.

A tokenizer with these rules is trained on a text, written to a GGUF without a model, and both
tokenize text with letters, digits, blanks and signs of all kinds.
"""

from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama.programs import Llama
from qmoe.export.tokenizer import RULES, add_tokenizer

WORDS = 3000  # tokens of each vocabulary
ODD = """I've told you'RE 3 33 333 3333 33333 3.14 1,000,000 (a+b)**2 == c;\t// x\n\n\n  indented
    four, \ttabs\t\t and   blanks   \r\n   lines ... !!! ?!?! --- ``quoted'' "so" 'said' ''twice''
Äpfel über Straße, l'été déjà, naïve façade, Привет мир, γειά σου, 你好世界12345, こんにちは, 안녕
🚀😶‍🌫️ ✅ a_b c__d __init__ HelloWorld camelCase ABCdef x1y2 №5 ½ ²
① e\u0301 \u00a0nbsp\u00a0 end \n"""


def check(llama: Llama, folder: Path, text: str) -> list[bool]:
    """Print a row per rule; returns which of them give the same token ids."""
    results = []
    for rules, name in RULES.items():
        results.append(_same(llama, folder, text, name, _trained(text + ODD, rules)))
    results.append(_same(llama, folder, text, "sentencepiece", _sentencepiece(text + ODD)))
    return results


def _same(llama: Llama, folder: Path, text: str, name: str, tokenizer: Any) -> bool:
    file = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    add_tokenizer(writer, tokenizer, len(tokenizer), folder)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = llama.token_ids(file, ODD + text)
    wanted = tokenizer(ODD + text, add_special_tokens=False)["input_ids"]
    pairs = zip(found, wanted, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    same = found == wanted
    near = "" if same else f", first at {tokenizer.decode(wanted[first : first + 5])!r}"
    print(f"tokenizer {name:14} {'same tokens' if same else 'OTHER TOKENS' + near}", flush=True)
    return same


def _trained(text: str, rules: tuple[str, ...]) -> Any:
    made = Tokenizer(models.BPE())
    own = rules[-1] == "words"
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if rule == "digit"
        else pre_tokenizers.Split(Regex(rule), "isolated")
        for rule in rules
        if rule != "words"
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def _sentencepiece(text: str) -> Any:
    """As Llama 2's and Mixtral's: blanks are a sign of their own, bytes stand for what is rare."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Merges do not go over blanks while it is trained; there are no words when it runs.
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, show_progress=False)
    made.train_from_iterator([text], trainer)
    made.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
