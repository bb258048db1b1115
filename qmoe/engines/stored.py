"""The contents of a quantized folder, from its config.json and the headers of its files."""

import re
from typing import Any

from safetensors import safe_open

from qmoe.checkpoint.folders import weight_files
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.reader import Checkpoint
from qmoe.engines.contents import Contents, Form, Matrix
from qmoe.errors import CheckpointError, ConfigError

PACKED, SCALE, ZERO, SHAPE = (
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"
)  # fmt: skip


def read_contents(folder: ModelFolder) -> Contents:
    """What a quantized folder holds. Raises ConfigError for one that is not quantized, and
    CheckpointError for a damaged one."""
    checkpoint = folder.checkpoint()
    entry = checkpoint.config.get("quantization_config")
    if not isinstance(entry, dict):
        raise ConfigError(
            f"{folder.path}: is not quantized, so no rule of an engine is about it; `qmoe quantize "
            "--target ENGINE` keeps to the rules of an engine"
        )
    method = str(entry.get("quant_method"))
    if method != "compressed-tensors":
        return Contents(checkpoint.config, method, str(entry.get("format")), [])
    forms = Forms(entry, str(folder.path))
    shapes = _shapes(checkpoint)
    matrices = [
        _matrix(checkpoint, name.removesuffix(PACKED), shapes, forms)
        for name in sorted(shapes, key=_numbers)
        if name.endswith(PACKED)
    ]
    unpacked = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    ]
    return Contents(
        checkpoint.config, method, str(entry.get("format")), matrices, forms.formats, unpacked
    )


def _numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shapes(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The shape of every tensor."""
    found = {}
    for file in weight_files(checkpoint.path):
        with safe_open(checkpoint.path / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                found[name] = tensors.get_slice(name).get_shape()
    return found


def _matrix(
    checkpoint: Checkpoint, name: str, shapes: dict[str, list[int]], forms: "Forms"
) -> Matrix:
    form = forms.of(name)
    if form is None:
        raise CheckpointError(
            f"{checkpoint.path}: {name} is stored packed, and quantization_config says nothing of "
            "it; copy config.json from the original folder"
        )
    if f"{name}{SCALE}" not in shapes:
        raise CheckpointError(f"{checkpoint.path}: {name}{SCALE} is missing; copy the folder again")
    outputs, words = shapes[f"{name}{PACKED}"][:2]
    inputs = 32 * words // form.bits
    if form.group != -1:
        inputs = form.group * shapes[f"{name}{SCALE}"][-1]
    elif f"{name}{SHAPE}" in shapes:  # of a hub name's headers it has no numbers
        inputs = int(checkpoint.tensor(f"{name}{SHAPE}")[1]) or inputs
    return Matrix(name, outputs, inputs, form)


class Forms:
    """Which form quantization_config gives each module. Unlike format/compressed_tensors.py it
    takes schemes that qmoe does not run."""

    def __init__(self, entry: dict[str, Any], where: str):
        self._exact: dict[str, Form] = {}
        self._patterns: list[tuple[str, Form]] = []
        self.formats: list[str] = []
        groups = entry.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            try:
                form = _form(group["weights"])
                targets = [str(target) for target in group["targets"]]
            except (LookupError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{where}: bad quantization_config: {type(error).__name__}: {error}"
                ) from error
            self.formats.append(str(group.get("format") or entry.get("format")))
            for target in targets:
                if target.startswith("re:") or "." not in target:
                    self._patterns.append((target, form))
                else:
                    self._exact[target] = form

    def of(self, module: str) -> Form | None:
        """The form of a module; an exact name wins over patterns, as in compressed-tensors."""
        if module in self._exact:
            return self._exact[module]
        for target, form in self._patterns:
            if target == "Linear" or re.match(target.removeprefix("re:"), module):
                return form
        return None


def _form(weights: dict[str, Any]) -> Form:
    channel = weights.get("group_size") is None or weights.get("strategy") == "channel"
    group = -1 if channel else int(weights["group_size"])
    return Form(int(weights["num_bits"]), group, bool(weights.get("symmetric")))
