"""`export`: a quantized folder as one GGUF file, its integers carried over as they are.

Two passes: the first finds the block types, which stand in the file's header; the second writes, a
matrix at a time.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qmoe._version import __version__
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.reader import Checkpoint
from qmoe.checkpoint.tokenizer import has_tokenizer
from qmoe.errors import OutputError
from qmoe.export.families import Family, family_of
from qmoe.export.grid import SUPER
from qmoe.export.planned import Planned, parts, planned
from qmoe.export.tensors import entries, prediction_tensors
from qmoe.export.tokenizer import add_tokenizer
from qmoe.format.compressed_tensors import Schemes
from qmoe.system.progress import progress as bar
from qmoe.system.progress import shown
from qmoe.system.sizes import format_size

EMBEDDINGS, OUTPUT = "token_embd.weight", "output.weight"
FILE_TYPES = gguf.LlamaFileType
# What llama.cpp calls a file by the type that most of its weights have.
NAMED = {
    "Q2_K": FILE_TYPES.MOSTLY_Q2_K,
    "Q3_K": FILE_TYPES.MOSTLY_Q3_K_S,
    "Q4_0": FILE_TYPES.MOSTLY_Q4_0,
    "Q4_1": FILE_TYPES.MOSTLY_Q4_1,
    "Q4_K": FILE_TYPES.MOSTLY_Q4_K_S,
    "Q5_0": FILE_TYPES.MOSTLY_Q5_0,
    "Q8_0": FILE_TYPES.MOSTLY_Q8_0,
}


def export(
    folder: ModelFolder, dst: Path, *, tokenizer: bool = True, progress: bool = True
) -> dict[str, Any]:
    """Write a quantized folder as a GGUF that llama.cpp runs.

    dst: the file to make. tokenizer: whether it gets the folder's tokenizer.

    Returns the file's path and bytes, llama.cpp's name of the architecture, tensors and bytes by
    type, and notes on tensors that are larger than their bits or whose scales were moved. Raises
    CheckpointError for a folder that `quantize` did not make, UnsupportedModelError for a family, a
    variant of one or a tokenizer that llama.cpp does not run, ConfigError for weights that no block
    type holds, OutputError if dst exists or cannot be written, and AuditError if what was written
    decodes to other weights. dst is whole or absent.
    """
    with shown(progress):
        return _export(folder, dst, tokenizer)


def _export(folder: ModelFolder, dst: Path, with_tokenizer: bool) -> dict[str, Any]:
    if dst.exists():
        raise OutputError(f"{dst}: already exists; remove it or choose another file (--out)")
    if not dst.parent.is_dir():
        raise OutputError(f"{dst}: its folder {dst.parent} does not exist")
    checkpoint = folder.checkpoint()
    schemes = Schemes(checkpoint.config, str(folder.path))
    config = folder.config(checkpoint)
    family = family_of(config)
    found = entries(checkpoint, schemes, family)
    if family.own_output and all(entry.name != OUTPUT for entry in found):
        tied = next(entry for entry in found if entry.name == EMBEDDINGS)
        found.append(replace(tied, name=OUTPUT))
    with_tokenizer &= has_tokenizer(folder.path)
    tokenizer = folder.tokenizer(config) if with_tokenizer else None
    plan = [planned(checkpoint, entry) for entry in bar(found, "choosing block types")]
    temporary = dst.with_name(f"{dst.name}.partial")
    try:
        writer = gguf.GGUFWriter(temporary, family.arch_name)
        _describe(writer, folder, family, plan)
        if tokenizer is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            add_tokenizer(writer, tokenizer, config.vocab_size, folder.path)
        _write(writer, checkpoint, plan)
        temporary.rename(dst)
    except OSError as error:
        raise OutputError(f"{dst}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    no_words = [] if tokenizer else ["it has no tokenizer: llama.cpp takes and gives token ids"]
    return {
        "file": str(dst),
        "bytes": dst.stat().st_size,
        "architecture": family.arch_name,
        "types": _types(plan),
        "notes": [*_notes(plan), *family.notes, *no_words, *_not_predicting(checkpoint, family)],
    }


def _not_predicting(checkpoint: Checkpoint, family: Family) -> list[str]:
    """In words, that layers which predict tokens beyond the next are left out."""
    names = prediction_tensors(checkpoint, family)
    if not names:
        return []
    nbytes = format_size(sum(map(checkpoint.tensor_bytes, names)))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"left out, they predict tokens beyond the next: {names[0]}{more}, {nbytes}"]


def _describe(writer: Any, folder: ModelFolder, family: Family, plan: list[Planned]) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(folder.path.resolve().name)
    writer.add_quantized_by(f"qmoe {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    packed: dict[str, int] = {}
    for tensor in plan:
        if tensor.kind.name in NAMED:
            packed[tensor.kind.name] = packed.get(tensor.kind.name, 0) + tensor.nbytes
    writer.add_file_type(NAMED[max(packed, key=lambda name: packed[name])])
    for name, value in family.metadata.items():
        getattr(writer, f"add_{name}")(value)


def _write(writer: Any, checkpoint: Checkpoint, plan: list[Planned]) -> None:
    for tensor in plan:
        block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
        in_bytes = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        name, byte = tensor.entry.name, np.dtype(np.uint8)
        writer.add_tensor_info(name, in_bytes, byte, tensor.nbytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    for tensor in bar(plan, "writing"):
        writer.write_padding(file, file.tell())
        start = file.tell()
        for part in parts(checkpoint, tensor):
            part.tofile(file)
        assert file.tell() - start == tensor.nbytes
        writer.write_padding(file, tensor.nbytes)
    writer.close()


def _types(plan: list[Planned]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for tensor in sorted(plan, key=lambda tensor: -tensor.nbytes):
        row = found.setdefault(tensor.kind.name, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += tensor.nbytes
    return found


def _notes(plan: list[Planned]) -> list[str]:
    """In words: tensors in a type with more bits than their integers have, and moved scales."""
    wide: dict[tuple[str, str, str], int] = {}
    for tensor in plan:
        scheme = tensor.entry.scheme
        if scheme is None:
            continue
        if tensor.entry.transposed:
            why = "llama.cpp wants it transposed, across its groups"
        elif scheme.bits < 4 and tensor.kind.name not in ("Q2_K", "Q3_K"):
            odd = tensor.shape[-1] % SUPER
            why = (
                f"its inputs are no multiple of {SUPER}"
                if odd
                else "its scales have no common unit (quantize with --target llama.cpp)"
            )
        else:
            continue
        key = (str(scheme), tensor.kind.name, why)
        wide[key] = wide.get(key, 0) + 1
    lines = [f"{n} tensors of {s} are stored as {k}: {why}" for (s, k, why), n in wide.items()]
    moved = [tensor for tensor in plan if tensor.moved]
    if moved:
        count, off = sum(t.moved for t in moved), max(t.off for t in moved)
        lines.append(
            f"{count} scales of {len(moved)} tensors are not float16 numbers and became the "
            f"nearest ones, at most {off:.2%} away"
        )
    return lines
