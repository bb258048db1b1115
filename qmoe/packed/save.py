"""`save_pretrained` of a packed model: the folder that it was loaded from, byte for byte.

The runtime's layout is not the checkpoint's, and rounding is never done twice. So nothing is
written from memory: files are copied, after a check that neither they nor the model have changed.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qmoe.checkpoint.folders import CONFIG, INDEX, companions, weight_files
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import AuditError, OutputError
from qmoe.packed.audit import audit_unpacked
from qmoe.packed.skeleton import open_packed

Files = dict[str, tuple[int, int]]


def files_of(folder: Path) -> Files:
    """The files that make up a model folder, each with its size and time of change."""
    names = [CONFIG, *weight_files(folder), *map(str, companions(folder)[0])]
    if (folder / INDEX).is_file():
        names.append(INDEX)
    about = {name: (folder / name).stat() for name in names}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in about.items()}


def save(
    model: Any,
    folder: ModelFolder,
    files: Files,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write a packed model into `save_directory`; transformers' parameters of the same names.

    model: as loaded. folder: from which. files: `files_of` that, then. With an adapter of
    transformers on the model, the adapter alone is saved, as transformers does.

    Raises OutputError if the folder or an unpacked weight has changed since, or if other weights
    lie in `save_directory`.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        type(model).save_pretrained(model, save_directory, is_main_process, **options)
        return
    target = Path(save_directory)
    if is_main_process:
        _check_folder(folder.path, files)
        _check_model(model, folder)
        _check_target(target, folder.path, files)
        for name in files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if target.resolve() != folder.path.resolve():
                shutil.copyfile(folder.path / name, target / name)
    if push_to_hub and is_main_process:
        known = ("commit_message", "private", "token", "revision", "create_pr")
        given = {name: value for name, value in options.items() if name in known}
        model.push_to_hub(options.get("repo_id", target.name), **given)


def _check_folder(folder: Path, files: Files) -> None:
    for name, known in files.items():
        try:
            found = (folder / name).stat()
        except FileNotFoundError:
            found = None
        if found is None or (found.st_size, found.st_mtime_ns) != known:
            what = "is gone" if found is None else "has changed"
            raise OutputError(
                f"save_pretrained: {folder / name} {what} since the model was loaded from there, "
                "and packed weights are written as they were read; load the model again"
            )


def _check_model(model: Any, folder: ModelFolder) -> None:
    """OutputError if an unpacked weight is not the folder's any more."""
    source = open_packed(folder, model.config.dtype)
    try:
        audit_unpacked(replace(source, model=model), str(folder.path))
    except AuditError as error:
        raise OutputError(
            f"save_pretrained: the model is not as it was loaded, and a packed checkpoint holds "
            f"what was quantized; save an adapter alone, or quantize the changed model ({error})"
        ) from error


def _check_target(target: Path, folder: Path, files: Files) -> None:
    if target.is_file():
        raise OutputError(f"save_pretrained: {target} is a file, expected a folder")
    other = sorted(p.name for p in target.glob("*.safetensors") if p.name not in files)
    if other and target.resolve() != folder.resolve():
        raise OutputError(
            f"save_pretrained: {target} holds other weights ({other[0]}); save into another folder"
        )
