"""The checkpoint on disk: compressed-tensors pack-quantized, in the family's own tensor names.

<module>.weight_packed      int32 [N, ceil(K*bits/32)]
<module>.weight_scale       [N, G], in the dtype of the original weights
<module>.weight_zero_point  int32 [ceil(N*bits/32), G], asymmetric only
<module>.weight_shape       int64 [2]

Matrices whose bits are their own are told of by their exact names, in one config group for each
scheme. Where experts differ, the format has a name of its own, `pack-quantized-mixed`.

Rotated weights are told of in `transform_config`, beside the schemes, in the terms of
compressed-tensors: a Hadamard transform in blocks of `head_dim`, on inputs and on weights. The
format then has a name of its own, `pack-quantized-rotated`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme
from compressed_tensors.utils import is_match
from pydantic import ValidationError
from torch import Tensor, nn

from qmoe.config import BITS, CHANNEL, GROUPS, Scheme
from qmoe.errors import CheckpointError
from qmoe.format.grid import dequantize
from qmoe.format.packing import pack_rows, pack_zeros, unpack_rows, unpack_zeros
from qmoe.format.quantized import Quantized

PACKED = "pack-quantized"
# A name that no other loader knows: transformers ignores `transform_config`, and would multiply
# rotated weights with inputs that are not.
ROTATED = "pack-quantized-rotated"
# `producer` in quantization_config, by which qmoe's quantizer in transformers (packed/quantizer.py)
# and its plugin for vLLM (vllm_plugin/) know qmoe's folders. Other loaders ignore it, but vLLM asks
# every producer for its name, as ModelOpt writes it, and stops at one that is a string.
PRODUCER = {"name": "qmoe"}
# Likewise: transformers decodes all experts of a model by one scheme, at worst without an error.
MIXED = "pack-quantized-mixed"
SUFFIXES = ("_packed", "_scale", "_zero_point", "_shape")
# A routed expert's module in a checkpoint: `experts.7.up_proj` (or `experts.expert_7.wi`), but not
# `shared_experts.up_proj`.
EXPERTS_TARGET = r"re:.*\.experts\.(expert_)?\d+\..*"


def packed_tensors(
    name: str, q: Tensor, scale: Tensor, zero: Tensor | None, bits: int
) -> dict[str, Tensor]:
    """The stored tensors of one matrix q [N, K], scale and zero [N, G], under its weight's name."""
    out = {
        f"{name}_packed": pack_rows(q[None], bits)[0],
        f"{name}_scale": scale.contiguous(),
        f"{name}_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if zero is not None:
        out[f"{name}_zero_point"] = pack_zeros(zero[None].contiguous(), bits)[0].contiguous()
    return out


def unpacked_tensors(tensors: dict[str, Tensor], schemes: "Schemes") -> dict[str, Tensor]:
    """Stored tensors with every packed weight as the float32 matrix it stands for."""
    packed = tuple(f".weight{suffix}" for suffix in SUFFIXES)
    out = {n: t for n, t in tensors.items() if not n.endswith(packed)}
    for stored in tensors:
        name = stored.removesuffix("_packed")
        scheme = schemes.of(name.removesuffix(".weight")) if name != stored else None
        if scheme is None:
            continue
        n, k = tensors[f"{name}_shape"].tolist()
        words = tensors.get(f"{name}_zero_point")
        zero = None if words is None else unpack_zeros(words[None], scheme.bits, n)
        q = unpack_rows(tensors[stored][None], scheme.bits, k)
        out[name] = dequantize(Quantized(q, tensors[f"{name}_scale"][None], zero, scheme))[0]
    return out


def quantization_config(
    experts: Scheme,
    dense: Scheme | None,
    lm_head: Scheme | None,
    ignore: list[str],
    exact: dict[str, Scheme] | None = None,
    mixed: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` entry of config.json. ignore: linears that stay as they are. exact:
    matrices with a scheme of their own, by their module's name in the checkpoint. mixed: whether
    no other loader than qmoe's is to take it."""
    linear = ["Linear"]
    groups = _by_scheme(exact or {})
    if experts == dense == (lm_head or dense):
        groups.append((experts, linear))
    else:
        groups.append((experts, [EXPERTS_TARGET]))
        if lm_head is not None:
            groups.append((lm_head, ["re:.*lm_head$"]))
        if dense is not None:
            groups.append((dense, linear))
    config = QuantizationConfig(
        config_groups={
            f"group_{i}": QuantizationScheme(
                targets=targets, weights=_weights(scheme), format=PACKED
            )
            for i, (scheme, targets) in enumerate(groups)
        },
        format=PACKED,
        quantization_status="compressed",
        ignore=sorted(ignore),
    )
    out: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    out["producer"] = dict(PRODUCER)
    if experts.rotation or mixed:
        out["format"] = ROTATED if experts.rotation else MIXED
        for group in out["config_groups"].values():
            group["format"] = out["format"]
    if experts.rotation:
        every = linear if dense is not None else [t for _, targets in groups for t in targets]
        out["transform_config"] = _rotation(experts.rotation, every, sorted(ignore))
    return out


def is_ours(entry: Mapping[str, Any]) -> bool:
    """Whether qmoe wrote this `quantization_config`. Folders of early versions name it in a
    string."""
    return entry.get("producer") in (PRODUCER, PRODUCER["name"])


def _by_scheme(exact: dict[str, Scheme]) -> list[tuple[Scheme, list[str]]]:
    """Names by their scheme, the narrowest first."""
    found: dict[Scheme, list[str]] = {}
    for name, scheme in sorted(exact.items()):
        found.setdefault(scheme, []).append(name)
    return sorted(found.items(), key=lambda group: (group[0].bits, str(group[0])))


def _rotation(block: int, targets: list[str], ignore: list[str]) -> dict[str, Any]:
    apply = [
        TransformArgs(targets=targets, location="input", ignore=ignore),
        TransformArgs(targets=targets, location="weight_input", inverse=True, ignore=ignore),
    ]
    scheme = TransformScheme(type="hadamard", apply=apply, head_dim=block)
    made: dict[str, Any] = TransformConfig(config_groups={"rotation": scheme}).model_dump(
        mode="json"
    )
    return made


def _weights(scheme: Scheme) -> QuantizationArgs:
    channel = scheme.group_size == CHANNEL
    return QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetric,
        strategy="channel" if channel else "group",
        group_size=None if channel else scheme.group_size,
    )


class Schemes:
    """Which scheme a checkpoint stores each module in, read from its config.json."""

    def __init__(self, config: dict[str, Any], where: str):
        entry = config.get("quantization_config")
        if not isinstance(entry, dict) or entry.get("quant_method") != "compressed-tensors":
            raise CheckpointError(
                f"{where}: not quantized in compressed-tensors format; make it with `qmoe quantize`"
            )
        if entry.get("format") not in (PACKED, ROTATED, MIXED, "mixed-precision"):
            raise CheckpointError(
                f"{where}: expected format {PACKED!r}, found {entry.get('format')!r}"
            )
        self._rotated = _read_rotation(entry.get("transform_config"), where)
        if (entry["format"] == ROTATED) != bool(self._rotated):
            raise CheckpointError(
                f"{where}: format {ROTATED!r} and a transform_config come together, found "
                f"{entry['format']!r} and {entry.get('transform_config')!r:.200}"
            )
        # Back to the name that compressed-tensors' classes know.
        text = json.dumps(entry)
        for ours in (ROTATED, MIXED):
            text = text.replace(f'"{ours}"', f'"{PACKED}"')
        entry = json.loads(text)
        known = {k: v for k, v in entry.items() if k in QuantizationConfig.model_fields}
        try:
            self._config = QuantizationConfig.model_validate(known)
        except (ValidationError, TypeError) as error:  # its checks compare what is no number
            raise CheckpointError(f"{where}: bad quantization_config: {error}") from error
        self._exact: dict[str, Scheme] = {}
        self._patterns: list[tuple[list[str], Scheme]] = []
        for group in self._config.config_groups.values():
            scheme = _scheme(group, where)
            self._exact |= {t: scheme for t in group.targets if _is_exact(t)}
            self._patterns.append(([t for t in group.targets if not _is_exact(t)], scheme))
        ignore = self._config.ignore or []
        self._left = {name for name in ignore if _is_exact(name)}
        self._left_patterns = [pattern for pattern in ignore if not _is_exact(pattern)]
        self._dummy = nn.Linear(1, 1, device="meta")

    def of(self, module: str) -> Scheme | None:
        """The scheme of a linear by its checkpoint name; None if it is not quantized. An exact name
        wins over patterns, as in compressed-tensors."""
        if module in self._left or is_match(module, self._dummy, self._left_patterns):
            return None
        found = self._exact.get(module)
        patterns = iter(self._patterns)
        while found is None and (group := next(patterns, None)) is not None:
            found = group[1] if is_match(module, self._dummy, group[0]) else None
        return None if found is None else replace(found, rotation=self._rotation(module))

    def _rotation(self, module: str) -> int:
        for args, block in self._rotated:
            if is_match(module, self._dummy, args.targets, args.ignore):
                return block
        return 0


def _is_exact(target: str) -> bool:
    """Whether a target is the name of one module: a class has no dot, a pattern says that it is
    one."""
    return "." in target and not target.startswith("re:")


def _read_rotation(entry: Any, where: str) -> list[tuple[TransformArgs, int]]:
    """Which modules are rotated, and in which blocks. CheckpointError for any other transform."""
    if not entry:
        return []
    try:
        config = TransformConfig.model_validate(entry)
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"{where}: bad transform_config: {error}") from error
    found = []
    for name, scheme in config.config_groups.items():
        block, apply = scheme.head_dim or 0, {str(a.location): a for a in scheme.apply}
        sides = [(a.targets, a.ignore) for a in scheme.apply]
        if (
            scheme.type != "hadamard"
            or scheme.randomize
            or block < 1
            or block & (block - 1)
            or len(scheme.apply) != 2
            or set(apply) != {"input", "weight_input"}
            or sides[0] != sides[1]
        ):
            raise CheckpointError(
                f"{where}: qmoe runs Hadamard transforms of inputs and weights in blocks of a "
                f"power of two, the transform {name!r} is another: {scheme}"
            )
        found.append((apply["input"], block))
    if len(found) > 1:
        raise CheckpointError(f"{where}: expected one transform, found {len(found)}")
    return found


def _scheme(group: QuantizationScheme, where: str) -> Scheme:
    args = group.weights
    group_size = (
        CHANNEL
        if args is not None and args.strategy == "channel"
        else getattr(args, "group_size", None)
    )
    if (
        args is None
        or args.type != "int"
        or args.num_bits not in BITS
        or group_size not in (*GROUPS, CHANNEL)
    ):
        raise CheckpointError(f"{where}: qmoe cannot run this scheme: {args}")
    if group.input_activations is not None:
        raise CheckpointError(f"{where}: quantized activations are not supported")
    return Scheme(args.num_bits, group_size, bool(args.symmetric))
