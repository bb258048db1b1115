"""A model of the Hugging Face Hub without its weights: config.json and the headers of the weights,
in a folder whose files of weights have their full length and take no space.

What reads a model folder can open it, and finds every tensor's name, dtype and shape; the numbers
are all zero.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)

from qmoe.checkpoint.folders import ADAPTER, CONFIG, HUB_ERRORS, INDEX, check_hub_name, hub_error
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import CheckpointError, OutputError

WANTED = [CONFIG, ADAPTER]


@contextmanager
def find_headers(source: str | Path, trust_remote_code: bool = False) -> Iterator[ModelFolder]:
    """A local folder as it is. Of a hub name, a folder with config.json and the headers, which is
    removed afterwards. Raises CheckpointError as `ModelFolder.find` does, OutputError if there is
    no place for the folder."""
    if os.path.exists(os.path.expanduser(source)):
        yield ModelFolder.find(source, trust_remote_code)
        return
    name = str(source)
    check_hub_name(name)
    wanted = [*WANTED, *(["*.py"] if trust_remote_code else [])]
    with TemporaryDirectory(prefix="qmoe-headers-") as made:
        folder = Path(made)
        try:
            cached = Path(snapshot_download(name, allow_patterns=wanted))
            found = HfApi().get_safetensors_metadata(name, revision=cached.name)
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise CheckpointError(f"{name}: no headers of weights can be read: {error}") from error
        except HUB_ERRORS as error:
            raise hub_error(name, error) from error
        for path in cached.iterdir():  # what else was downloaded before does not matter here
            if path.name in WANTED or path.suffix == ".py":
                shutil.copyfile(path, folder / path.name)
        if found.sharded:
            (folder / INDEX).write_text(json.dumps({"weight_map": found.weight_map}))
        for file, header in found.files_metadata.items():
            tensors = {
                tensor: {"dtype": t.dtype, "shape": t.shape, "data_offsets": list(t.data_offsets)}
                for tensor, t in header.tensors.items()
            }
            write_header(folder / file, tensors)
        yield ModelFolder.find(folder, trust_remote_code)


def write_header(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file of zeros that takes no space: the header, and a length.

    tensors: by name, what the header says of each: dtype, shape, data_offsets.
    """
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    try:
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)
    except OSError as error:
        raise OutputError(
            f"{path}: a file of {end} bytes without contents cannot be made there: "
            f"{error.strerror}; name another folder by TMPDIR"
        ) from error
