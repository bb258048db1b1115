"""Everything that can go wrong before the long work, checked before it."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from qmoe.calibration.batches import choose_samples
from qmoe.calibration.given import samples_of_given
from qmoe.calibration.text import load_texts
from qmoe.checkpoint.folders import companions
from qmoe.checkpoint.model_config import generation_config
from qmoe.checkpoint.tokenizer import check_vocabulary, has_tokenizer
from qmoe.config import CalibrationConfig, QuantConfig
from qmoe.errors import ConfigError, OutputError
from qmoe.kernels.cpu.encode import check_encoder
from qmoe.model.schemes import weight_shapes
from qmoe.model.source import Source, schemes_of, widths_of
from qmoe.model.tensor_names import matrices_in
from qmoe.system import distributed
from qmoe.system.sizes import format_size


def check_space(source: Source, config: QuantConfig, dst: Path) -> None:
    """The destination can be made, and its disk has room."""
    folder = source.checkpoint.path
    copied = sum((folder / file).stat().st_size for file in companions(folder)[0])
    check_destination(dst, estimate_bytes(source, config) + copied)


def check_destination(dst: Path, needed: int) -> None:
    """Refuse a destination that exists, cannot be made, or has less than `needed` bytes free."""
    if "\0" in str(dst):
        raise OutputError(f"destination: {str(dst)!r} cannot be a folder's name")
    if os.path.lexists(dst):
        raise OutputError(f"{dst}: already exists; remove it or choose another destination")
    parent = dst.parent
    if not parent.is_dir():
        raise OutputError(f"{dst}: its parent folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{dst}: no permission to write in {parent}")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{dst}: needs about {format_size(needed)}, {format_size(free)} are free on this disk"
        )


def make_statistics_folder(path: Path) -> None:
    """Make the folder; it may be there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot keep statistics there: {error}") from error


def check_codes(source: Source, config: QuantConfig) -> None:
    """What EXL3 needs: the kernels in C that search codes, and linears that are stored as one."""
    if config.format != "exl3":
        return
    check_encoder()
    for layer in source.structure.layers:
        for name in schemes_of(source, layer, config):
            module = source.model.get_submodule(name)
            if isinstance(module, nn.Linear) and matrices_in(source.model, f"{name}.weight") > 1:
                raise ConfigError(
                    f"format: {name} is stored as several matrices, which qmoe does not write in "
                    "EXL3's codes; leave dense linears out with --dense-bits 16"
                )


def check_rotation(source: Source, config: QuantConfig) -> None:
    """A layer that predicts tokens beyond the next reads the residual stream as it was."""
    weights = source.weights
    if config.rotate != "fused" or not (source.prediction or weights.carried):
        return
    first = weights.carried[0] if source.prediction is None else source.prediction.join
    raise ConfigError(
        f"rotate: fused turns the residual stream, which {first} reads, a part of a layer that "
        "predicts tokens beyond the next; choose --rotate online, or take the layer's tensors out"
    )


def check_companions(source: Source, uses_text: bool) -> Any:
    """generation_config.json and the tokenizer must be whole, or absent if no text is used: what
    loads the result opens them. Returns the tokenizer, None if there is none."""
    generation_config(source.folder.path)
    if uses_text or has_tokenizer(source.folder.path):
        return source.folder.tokenizer(source.model.config)
    return None


def choose_text(
    source: Source, tokenizer: Any, c: CalibrationConfig, given: Iterable[Any] | None = None
) -> tuple[Int[Tensor, "n L"], list[str]]:
    """The calibration samples, and in words what of the text was not as asked for. given: text in
    memory (calibration/given.py), in place of what the settings name."""
    check_seqlen(source.model.config, c.seqlen)
    size = (c.samples, c.seqlen, c.seed)
    if given is None:
        samples, notes = choose_samples(tokenizer, load_texts(c.text), *size)
    else:
        samples, notes = samples_of_given(tokenizer, given, *size)
    check_vocabulary(source.model.config, samples)
    if (batches := -(-len(samples) // c.batch)) < distributed.count():
        raise ConfigError(
            f"calibration: {distributed.count()} processes cannot share {batches} batches of "
            f"{c.batch} samples; give more samples or a smaller batch"
        )
    return samples, notes


def check_combination(
    config: QuantConfig, given: list[Path], saved: Path | None, dst: Path
) -> None:
    """Refuse sources of statistics that the method cannot use."""
    if config.method == "rtn" and (given or saved is not None):
        raise ConfigError("rtn uses no statistics; leave them out or choose gptq")
    if config.applies_awq and (given or saved is not None):
        raise ConfigError("awq rescales statistics as it goes; save and reuse them with gptq only")
    if len({p.resolve() for p in given}) < len(given):
        raise ConfigError("statistics: the same folder is given twice")
    if given and config.tune:
        raise ConfigError("tune: runs text through each layer; leave out the saved statistics")
    if given and config.distill:
        raise ConfigError("distill: runs text through the model; leave out the saved statistics")
    for name in ("tune", "distill"):
        if getattr(config, name) and distributed.count() > 1:
            raise ConfigError(f"{name}: runs in one process, this is one of {distributed.count()}")
    if given and config.lm_head is not None:
        raise ConfigError("saved statistics do not cover lm_head; leave it out or use text")
    if saved is not None and saved.resolve() == dst.resolve():
        raise ConfigError(f"{dst}: the model and its statistics need different folders")


def check_held_out(config: QuantConfig, samples: Int[Tensor, "n L"]) -> None:
    """Distilling holds out some of the samples, and needs others."""
    if config.distill and len(samples) < 2:
        raise ConfigError(
            f"distill: holds out a part of the samples, and the text gives {len(samples)}; give at "
            "least 2, or leave the steps out"
        )


def check_seqlen(config: Any, seqlen: int) -> None:
    """A sample must fit the positions the model knows (and attention is quadratic in it)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and seqlen > positions:
        raise ConfigError(
            f"seqlen: {seqlen} tokens are more than the {positions} positions of this model"
        )


def estimate_bytes(source: Source, config: QuantConfig) -> int:
    """Bytes the quantized weights will take on disk, within a percent."""
    total = source.checkpoint.nbytes()
    total -= sum(map(source.checkpoint.tensor_bytes, source.weights.ignored))
    for name in source.weights.carried:  # written in 16 bits, if they are stored in fewer
        shape, dtype = source.checkpoint.lazy(name).get_shape(), source.checkpoint.dtype(name)
        written = torch.Size(shape).numel() * dtype.itemsize
        total += written - source.checkpoint.tensor_bytes(name)
    for layer in source.structure.layers:
        widths = widths_of(layer, config)
        for name, scheme in schemes_of(source, layer, config).items():
            for target, shape in weight_shapes(source.model, name):
                size = sum(map(source.checkpoint.tensor_bytes, source.weights.targets[target]))
                own = widths.get(target) or (scheme.bits,)
                bits = [replace(scheme, bits=b).bits_per_weight(shape[-1]) for b in own]
                total += int(torch.Size(shape).numel() * sum(bits) / len(bits) / 8) - size
    if source.adds_lm_head(config):
        embedding = source.weights.sources(source.embedding())
        total += sum(map(source.checkpoint.tensor_bytes, embedding))
    return max(total, 0)
