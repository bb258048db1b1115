"""What scripts/fuzz/run.py does to a model folder: one function per kind of damage.

Each takes the folder and a random.Random, spoils something, and says in words what it did. The same
folder and random state give the same damage.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from fuzz.json_damage import INDEX, Mutation, json_of, junk, spoil, text_of, write_json
from fuzz.tensor_damage import header_bytes, header_json, shards, tensor

CONFIG_KEYS = [
    "auto_map",
    "rope_scaling",
    "layer_types",
    "num_experts",
    "head_dim",
    "text_config",
    "num_local_experts",
    "id2label",
    "quantization_config",
    "attn_implementation",
    "num_labels",
    "tie_word_embeddings",
    "per_layer_config",
    "_name_or_path",
    "configuration_files",
    "experts_implementation",
    "vocab_size",
    "model_type",
    "num_hidden_layers",
]
TOKENIZER_KEYS = [
    "tokenizer_file",
    "vocab_file",
    "tokenizer_class",
    "auto_map",
    "bos_token",
    "added_tokens_decoder",
    "pad_token",
    "chat_template",
    "extra_special_tokens",
    "fast_tokenizer_files",
    "name_or_path",
    "model_max_length",
]
TOKENIZER_VALUES: list[Any] = [
    "../outside/tokenizer.json", ["../outside/tokenizer.1.0.0.json"], "LlamaTokenizer",
    "BertTokenizer", "T5Tokenizer", {"AutoTokenizer": ["evil.E", "evil.F"]},
]  # fmt: skip


def config_key(folder: Path, rng: random.Random) -> str:
    """A key that means something to somebody, known in this config or not."""
    config = json.loads((folder / "config.json").read_text())
    key = rng.choice([*config, *CONFIG_KEYS])
    values = [junk(rng), junk(rng)]
    values += {
        "auto_map": [{"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.E", None]}],
        "quantization_config": [
            {"quant_method": m, "weight_block_size": junk(rng), "format": junk(rng)}
            for m in ("fp8", "mxfp4", "gptq", "compressed-tensors", "bitsandbytes", None, 3)
        ],
        "model_type": ["llama", "mixtral", "gpt_oss", "deepseek_v3", "t5", "clip", "warp", "dbrx"],
        "num_hidden_layers": [10**5, 10**7, 500, 0, -3],
        "configuration_files": [["../outside/config.1.0.0.json"], ["config.1.0.0.json"]],
        "architectures": [["LlamaForCausalLM"], ["Trainer"], ["AutoModel"], ["../x"], [3], [[]]],
    }.get(key, [])
    config[key] = rng.choice(values)
    write_json(folder / "config.json", config)
    return f"config.json: {key} = {str(config[key])[:60]!r}"


def index_paths(folder: Path, rng: random.Random) -> str:
    value = json.loads((folder / INDEX).read_text())
    name = rng.choice(sorted(value["weight_map"]))
    file = rng.choice(["../outside/model.safetensors", "/etc/passwd", "..", ".", "", "./x", "a/b",
                       str(folder.parent / "outside" / "model.safetensors"), "config.json", INDEX,
                       "missing.safetensors", "\x00", "a\\b", "x" * 300, "model.safetensors/",
                       shards(folder)[-1].name, "//x", "~/x", 3, None, ["a"]])  # fmt: skip
    every = rng.random() < 0.2
    value["weight_map"] = (
        dict.fromkeys(value["weight_map"], file) if every else value["weight_map"] | {name: file}
    )
    write_json(folder / INDEX, value)
    return f"{INDEX}: {'everything' if every else name} in {str(file)[-50:]!r}"


def files(folder: Path, rng: random.Random) -> str:
    """A file that is gone, cut, something else, or a link."""
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    kind = rng.choice(["gone", "cut", "cut", "folder", "fifo", "link out", "link zero", "loop",
                       "dangling", "unknown link", "unreadable name", "grown"])  # fmt: skip
    if kind == "unknown link":
        (folder / "notes.txt").symlink_to(folder.parent / "outside" / "secret.txt")
        return "notes.txt: link to a file outside"
    if kind == "unreadable name":
        Path(os.fsdecode(bytes(folder) + b"/bad\xff\n.txt")).write_text("x")
        return "a file whose name is not UTF-8"
    if kind in ("cut", "grown"):
        size = path.stat().st_size
        os.truncate(path, rng.randrange(size) if kind == "cut" else size + 16)
        return f"{path.name}: {kind}"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "gone":
        outside = folder.parent / "outside" / path.name
        target = {"link out": outside, "link zero": "/dev/zero", "loop": path.name}
        path.symlink_to(target.get(kind, folder.parent / "nowhere"))
    return f"{path.name}: {kind}"


def companions(folder: Path, rng: random.Random) -> str:
    """Files that a folder may have and transformers looks for."""
    name = rng.choice(["generation_config.json", "special_tokens_map.json", "added_tokens.json",
                       "chat_template.jinja", "adapter_config.json", "preprocessor_config.json",
                       "processor_config.json", "vocab.json", "merges.txt", "chat_template.json",
                       "tokenizer.model", "evil.py"])  # fmt: skip
    wild = {"base_model_name_or_path": "../outside", "bos_token": junk(rng), "eos_token": junk(rng),
            "max_length": junk(rng), "temperature": junk(rng), "chat_template": junk(rng),
            "eos_token_id": junk(rng), "processor_class": junk(rng)}  # fmt: skip
    value = rng.choice([wild, junk(rng), {"x": junk(rng)}, {rng.choice(list(wild)): junk(rng)}])
    write_json(folder / name, value)
    return f"{name}: {str(value)[:80]}"


def tokenizer_config(folder: Path, rng: random.Random) -> str:
    """Keys of tokenizer_config.json that make transformers look elsewhere."""
    path = folder / "tokenizer_config.json"
    value = json.loads(path.read_text())
    key = rng.choice(TOKENIZER_KEYS)
    there = str(folder.parent / "outside" / "tokenizer.json")
    value[key] = rng.choice([*TOKENIZER_VALUES, junk(rng), junk(rng), there])
    write_json(path, value)
    if rng.random() < 0.3:
        (folder / "tokenizer.json").unlink()
    return f"tokenizer_config.json: {key} = {str(value[key])[:60]!r}"


def scheme(folder: Path, rng: random.Random) -> str:
    """One or two places of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    done = [spoil(config["quantization_config"], rng) for _ in range(rng.choice([1, 1, 2]))]
    write_json(folder / "config.json", config)
    return f"quantization_config: {', '.join(done)}"


def wrong_shard(folder: Path, rng: random.Random) -> str:
    """Two shards exchanged, or one twice."""
    first, second = rng.sample(shards(folder), 2)
    if rng.random() < 0.5:
        shutil.copyfile(first, second)
        return f"{second.name}: a copy of {first.name}"
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    return f"{first.name} and {second.name} exchanged"


ANY: list[Mutation] = [
    header_bytes, header_json, header_json, header_json, tensor, tensor, tensor,
    json_of(INDEX), index_paths, text_of("config.json", INDEX), config_key, config_key, config_key,
    json_of("config.json"), json_of("tokenizer.json"), json_of("tokenizer_config.json"),
    tokenizer_config, text_of("tokenizer.json", "tokenizer_config.json"), files, files, companions,
    wrong_shard,
]  # fmt: skip
SOURCE = ANY
QUANTIZED: list[Mutation] = [
    *ANY, tensor, tensor, json_of("qmoe_report.json"), json_of("qmoe_report.json"),
    text_of("qmoe_report.json"), scheme, scheme, scheme,
]  # fmt: skip
