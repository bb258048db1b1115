"""A model folder: where it is, what may lie in it, which files hold the weights, and what else
belongs to the model.

Left out: what is in the files of weights (reader.py).
"""

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from qmoe.errors import CheckpointError

# RuntimeError: there is no home, so no place for a download.
HUB_ERRORS = (
    HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError
)  # fmt: skip
HUB_NAME = 200  # more characters than any name on the Hub has
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx",
    ".onnx_data", ".npz", ".ot", ".tflite", ".pdparams", ".nemo", ".distcp",
)  # fmt: skip
INDEXES = re.compile(r"\.index\b.*\.json$")
# Folders in which makers publish the same model once more, in another layout.
COPIES = ("original", "metal", "onnx", "gguf")


class HubOptions(TypedDict, total=False):
    """Of a download: a branch, tag or commit; a token for what is not public, True for the one that
    is stored; and the folder that keeps downloads."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None


def resolve(source: str | Path, **hub: Unpack[HubOptions]) -> Path:
    """A local folder as it is; anything else is downloaded from the Hugging Face Hub.

    CheckpointError for a folder with anything in it but files and folders of its own."""
    if not isinstance(source, str | Path):
        raise CheckpointError(f"model: expected a folder or a hub name, got {source!r}")
    # os.path: pathlib fails on what cannot be a name.
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        _check_entries(path)
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{source}: expected a model folder, found a file")
    name = str(source)
    check_hub_name(name)
    try:
        return _download(name, **hub)
    except HUB_ERRORS as error:
        raise hub_error(name, error) from error


def origin(folder: Path) -> dict[str, str]:
    """Where a folder comes from: its name on the Hub and the revision, if it lies in the Hub's
    cache, else its own name."""
    cache = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cache.startswith("models--"):
        return {"name": cache[len("models--") :].replace("--", "/", 1), "revision": folder.name}
    return {"name": folder.resolve().name}


def check_hub_name(name: str) -> None:
    """Raises CheckpointError for what is no folder and cannot be a name on the Hub."""
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or len(name) > HUB_NAME:
        shown = name if len(name) <= 1000 else f"{name[:200]}.."
        raise CheckpointError(f"{shown}: no such folder (and not a hub name like 'org/model')")


def hub_error(name: str, error: Exception) -> CheckpointError:
    """What is said where one of HUB_ERRORS ends a download."""
    return CheckpointError(
        f"{name}: no such local folder, and the Hub did not give it: {error} (a folder for "
        "downloads that can be written is named by HF_HOME)"
    )


def _download(name: str, **hub: Unpack[HubOptions]) -> Path:
    """Everything without weights first, whatever a tokenizer or a processor calls its files. Then,
    of the same revision, the weights that the index names, and no other copy of them."""
    others = [*(f"*{suffix}" for suffix in WEIGHTS), *(f"{folder}/*" for folder in COPIES)]
    folder = Path(snapshot_download(name, ignore_patterns=[*others, ".*", "*.pyc"], **hub))
    files = weight_files(folder) if (folder / INDEX).is_file() else [SINGLE]
    wanted = [glob.escape(file) for file in files]
    same: HubOptions = {**hub, "revision": folder.name}
    return Path(snapshot_download(name, allow_patterns=wanted, **same))


def _check_entries(folder: Path) -> None:
    """Links must not lead out of the folder (but to the Hub cache's own blobs): what they lead to
    would be read, and copied into the result. Pipes and devices would be read for ever."""
    home = folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    for entry in [*sorted(folder.iterdir()), *_below(folder)]:
        target = Path(os.path.realpath(entry))  # a link to itself stays what it is
        name = entry.relative_to(folder)
        if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
            raise CheckpointError(
                f"{folder}: {name} is a link that leads out of the folder, to {target}; put "
                "a copy in its place"
            )
        if not (entry.is_file() or entry.is_dir()):
            raise CheckpointError(
                f"{folder}: {name} is neither a file nor a folder (a broken link, a pipe, a "
                "device); remove it"
            )


def _below(folder: Path) -> Iterator[Path]:
    """All that lies in the folder, at any depth, but for what is hidden or made by Python: files,
    and links to folders, which nothing here follows."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != "__pycache__")
        links = [n for n in folders if os.path.islink(os.path.join(place, n))]
        yield from (Path(place, n) for n in sorted([*files, *links]) if not n.startswith("."))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model folder; CheckpointError names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be written
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: not a model folder, it has no {path.name}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_index(folder: Path) -> dict[str, str]:
    """Where the index says each tensor is: names of safetensors files in the folder."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: expected a non-empty 'weight_map' object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: {name!r} points outside the folder: {file!r}")
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {name!r} is said to be in {file!r}; expected the name "
                "of a .safetensors file"
            )
    return weight_map


def weight_files(folder: Path) -> list[str]:
    """The files that hold the model's weights. CheckpointError if there are none, or if the folder
    holds two models, of which another reader might take the other."""
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder}: {ADAPTER} says that this is an adapter of {base!r:.200}, which "
            "transformers would load in its place; merge the two (peft: merge_and_unload, then "
            f"save_pretrained) and give the result, or remove {ADAPTER} if the weights beside it "
            "are a whole model"
        )
    if (folder / INDEX).is_file():
        files, first = sorted(set(read_index(folder).values())), INDEX
        if (folder / SINGLE).is_file() and SINGLE not in files:
            raise CheckpointError(
                f"{folder}: holds two models, {SINGLE} and the one in {files[0]} and others that "
                f"{INDEX} names; transformers reads the first, other programs the second; move "
                "one of them away"
            )
    elif (folder / SINGLE).is_file():
        files, first = [SINGLE], SINGLE
    else:
        raise CheckpointError(f"{folder}: no safetensors weights, {_instead(folder)}")
    named = read_json(folder / CONFIG).get("transformers_weights")
    if named not in (None, first):
        raise CheckpointError(
            f"{folder}: holds two models, {first} and the one that config.json names as "
            f"transformers_weights ({named!r:.200}); move one of them away, and call the other "
            f"{first}, without that line in config.json"
        )
    return files


def _instead(folder: Path) -> str:
    """What is in the place of weights."""
    others = sorted(p.relative_to(folder).as_posix() for p in _below(folder) if _is_weights(p))
    if not others:
        return f"it has neither {SINGLE} nor {INDEX}"
    if others[0].endswith(".bin"):
        return (
            f"it has {others[0]}; load it with transformers and save_pretrained it to safetensors"
        )
    return (
        f"it has {others[0]}, another layout or form of a model, and neither {SINGLE} nor "
        f"{INDEX}; give the folder that transformers reads, or convert it with transformers' "
        "script for this family"
    )


def _is_weights(path: Path) -> bool:
    """Whether a file is of weights that are not the model's, or says where such are."""
    return path.suffix in WEIGHTS or bool(INDEXES.search(path.name)) or path.name == ADAPTER


def companions(folder: Path) -> tuple[list[Path], list[str]]:
    """What belongs to a model beside config.json and its weights, relative to its folder: every
    file without weights (of tokenizer, templates, processor, generation, code) at any depth. And
    what does not: other weights, folders with weights of their own, linked folders."""
    own = {CONFIG, INDEX, SINGLE}
    if (folder / INDEX).is_file():
        own |= set(read_index(folder).values())
    found = [p.relative_to(folder) for p in _below(folder)]
    other = [p for p in found if _is_weights(p) or (folder / p).is_dir()]
    foreign = {p.parts[0] for p in other if len(p.parts) > 1} | {n for n in COPIES}
    kept = [p for p in found if p not in other and str(p) not in own and p.parts[0] not in foreign]
    left = [p.name for p in other if len(p.parts) == 1 and p.name not in own]
    left += [f"{name}/" for name in foreign if (folder / name).is_dir()]
    return kept, sorted(left)
