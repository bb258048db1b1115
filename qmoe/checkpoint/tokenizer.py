"""A model folder's tokenizer, opened so that a bad one ends in an error that names it."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from qmoe.checkpoint.folders import read_json
from qmoe.checkpoint.model_config import CONFIG_ERRORS, first_line
from qmoe.errors import CheckpointError

# What a tokenizer is usually made from.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.model", "*.tiktoken",
         "tekken.json")  # fmt: skip
# What says that there should be one.
SIGNS = (*FILES, "tokenizer_config.json", "tokenization_*.py", "vocab.*", "*.spm")
PROBE = "text " + "".join(map(chr, range(32, 127))) + " \n\té中\U0001f600"


def has_tokenizer(path: Path) -> bool:
    """Whether a model folder has a tokenizer, whole or not."""
    return any(next(path.glob(name), None) for name in SIGNS)


def open_tokenizer(path: Path, config: Any, trust: bool = False) -> Any:
    """The tokenizer of a model folder; CheckpointError if it has none or a damaged one. config: the
    model's. trust: the tokenizer may be code of its own."""
    _check_files(path)
    tokenizer, ids = _load(path, config, trust)
    if not ids:
        raise _bad(path, "its tokenizer knows no text")
    return tokenizer


def _check_files(path: Path) -> None:
    """tokenizer_config.json may name other files of the folder, and nothing else."""
    if not (path / "tokenizer_config.json").is_file():
        return
    for key, value in read_json(path / "tokenizer_config.json").items():
        if not key.endswith(("_file", "_files")) or value is None:
            continue
        for name in value if isinstance(value, list) else [value]:
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(
                    f"{path / 'tokenizer_config.json'}: {key} is {json.dumps(value)[:200]}; "
                    "expected names of files in the folder"
                )


def _load(path: Path, config: Any, trust: bool) -> tuple[Any, list[int]]:
    """The tokenizer, and what it makes of all kinds of characters: some fail on those they lack."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=trust)
        return tokenizer, list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    except CONFIG_ERRORS as error:
        raise _bad(path, f"{type(error).__name__}: {first_line(error)}") from error
    except Exception as error:
        # The tokenizers library raises Exception itself, which has no narrower name.
        if type(error) is not Exception:
            raise
        raise _bad(path, first_line(error)) from error


def _bad(path: Path, reason: str) -> CheckpointError:
    if not any(next(path.glob(name), None) for name in FILES):
        # transformers then makes an empty one, or fails for a reason that is none.
        reason = "the folder has no tokenizer files (tokenizer.json or tokenizer.model)"
    return CheckpointError(
        f"{path}: cannot load its tokenizer: {reason[:500]}; copy the original model's files"
    )


def check_vocabulary(config: Any, samples: Tensor) -> None:
    """Every token id must have a row in the model's embedding."""
    rows = config.get_text_config().vocab_size
    if int(samples.max()) >= rows:
        raise CheckpointError(
            f"the tokenizer gives token {int(samples.max())}, the model knows {rows} tokens: this "
            "tokenizer belongs to another model"
        )
