"""Proof of what is in a quantized folder or a loaded model: every byte has a kind, and anything
that is not as promised is a finding. No finding is ever a warning: `AuditError` lists them all.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.reader import is_finite
from qmoe.errors import AuditError, ConfigError
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.format.stacks import digest
from qmoe.model.experts import is_experts
from qmoe.model.precision import in_float32
from qmoe.model.source import Source
from qmoe.model.tensor_names import all_original_names
from qmoe.packed.skeleton import open_packed
from qmoe.prediction.stored import CARRIED, described, findings
from qmoe.runtime import coded
from qmoe.runtime.gradients import Placeholder
from qmoe.runtime.modules import PackedLinear, held, packed_experts
from qmoe.runtime.stored import take_stored
from qmoe.system.progress import progress

KINDS = (
    "experts packed", "experts scales", "experts 16-bit",
    "dense packed", "dense scales", "dense 16-bit",
    "router", "embeddings", "norms and other",
)  # fmt: skip


@dataclass
class Audit:
    """bytes by kind, what is wrong (empty in a good audit), the SHA-256 of everything that is not
    packed, by which later damage is seen, and what there is of prediction layers
    (prediction/stored.py)."""

    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    findings: list[str] = field(default_factory=list)
    unpacked_sha256: str = ""
    prediction: dict[str, Any] = field(default_factory=dict)

    def require_clean(self, where: str) -> None:
        if self.findings:
            shown = "\n  ".join(self.findings[:20])
            more = f"\n  and {len(self.findings) - 20} more" if len(self.findings) > 20 else ""
            raise AuditError(
                f"{where}: audit failed, {len(self.findings)} findings:\n  {shown}{more}"
            )


def audit_folder(
    folder: ModelFolder,
    digests: dict[str, str] | None = None,
    unpacked_sha256: str | None = None,
    original: Source | None = None,
) -> Audit:
    """Read a quantized folder as the loader does, layer by layer; AuditError on any finding.

    digests: `format.quantized.digest` of every quantized stack by parameter name, as it was solved;
    the decoded bytes must be those. unpacked_sha256: that of an earlier audit, likewise. original:
    what it was made from; its prediction layers must be here.
    """
    audit, where = Audit(), str(folder.path)
    source = open_packed(folder, torch.float32, predicting=True)
    names = source.weights
    audit.findings += [f"missing: {n}" for n in names.missing()]
    audit.findings += names.doubled()
    audit.findings += [f"belongs to no parameter: {n}" for n in names.unexpected]
    audit.findings += names.misshapen()
    audit.findings += [] if original is None else findings(original, source)
    audit.prediction = described(source)
    sha = hashlib.sha256()
    carried = {name: [name] for name in names.carried}
    for target, stored in [*sorted(names.targets.items()), *sorted(carried.items())]:
        owner, _, parameter = target.rpartition(".")
        if target in carried:
            kind = CARRIED
            audit.bytes.setdefault(kind, 0)
        else:
            kind = _kind(source, owner, parameter, source.checkpoint.rank(stored[0]))
        for name in stored:
            tensor = source.checkpoint.tensor(name)
            audit.bytes[kind] += tensor.nbytes
            if not kind.endswith(("packed", "scales")):
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if not is_finite(tensor):
                audit.findings.append(f"holds NaN or Inf: {name}")
            if (
                kind.endswith("scales")
                and name.endswith("_scale")
                and not (tensor.float() > 0).all()
            ):
                audit.findings.append(f"has a scale that is not positive: {name}")
        if kind == "experts 16-bit" and not _is_unquantized(source, owner):
            audit.findings.append(f"routed experts left unquantized: {stored[0]} ({target})")
        source.checkpoint.release()
    audit.unpacked_sha256 = sha.hexdigest()
    if unpacked_sha256 not in (None, audit.unpacked_sha256):
        audit.findings.append("an unpacked tensor is not the one that was written")
    audit.require_clean(where)
    found = _decode(source)
    if digests is not None:
        audit.findings += [
            f"decodes to other weights than were solved: {target}"
            for target in sorted(set(digests) | set(found))
            if digests.get(target) != found.get(target)
        ]
    audit.require_clean(where)
    return audit


def _decode(source: Source) -> dict[str, str]:
    """Digest of every packed weight, read through the loader's own path, one layer at a time."""
    found = {}
    roots = [layer.name for layer in source.structure.layers]
    for root in progress([*roots, *filter(None, [source.structure.lm_head])], "auditing"):
        with source.loaded(root, torch.float32) as module:
            for name, part in module.named_modules(prefix=root):
                packed: dict[str, Any] = take_stored(part, name) | coded.take_coded(part, name)
                for weight, stored in packed.items():
                    found[f"{name}.{weight}"] = digest(stored.unpack())
    return found


def _kind(source: Source, owner: str, parameter: str, rank: int) -> str:
    module = source.model.get_submodule(owner)
    every = (*SUFFIXES, *coded.SUFFIXES)
    suffix = next((s for s in every if parameter.endswith(s)), None)
    experts = is_experts(module)
    unfused = any(owner in layer.unfused_linears() for layer in source.structure.layers)
    if experts or unfused or isinstance(module, PackedLinear):
        tier = "experts" if experts or unfused else "dense"
        if suffix is not None:
            return f"{tier} packed" if suffix in ("_packed", "_trellis") else f"{tier} scales"
        # Biases of experts are a matrix [E, N], weights never less than one for each expert.
        vector = parameter == "bias" or (experts and rank < 3 and parameter.endswith("_bias"))
        return "norms and other" if vector else f"{tier} 16-bit"
    if _is_unquantized(source, owner) and isinstance(module, nn.Embedding):
        return "experts 16-bit"
    if isinstance(module, nn.Embedding) or owner == source.structure.lm_head:
        return "embeddings"
    if any(owner in layer.routers for layer in source.structure.layers):
        return "router"
    return "dense 16-bit" if isinstance(module, nn.Linear) else "norms and other"


def _is_unquantized(source: Source, owner: str) -> bool:
    """Whether this was said, with a reason, before the work began; the report repeats it."""
    return any(owner in layer.unquantized for layer in source.structure.layers)


def audit_model(model: nn.Module, where: str) -> Audit:
    """Check a loaded model: nothing on the meta device, every expert packed, every scale finite.

    Bytes are those resident in memory, in the runtime's own layout.
    """
    audit = Audit()
    for name, module in model.named_modules():
        if is_experts(module):
            stacks = packed_experts(module)
            if not stacks:
                audit.findings.append(f"routed experts not packed: {name}")
            for stack in stacks:
                audit.bytes["experts packed"] += stack.packed_bytes()
                audit.bytes["experts scales"] += stack.nbytes() - stack.packed_bytes()
        elif isinstance(module, PackedLinear):
            dense: Any = module.stack
            audit.bytes["dense packed"] += dense.packed_bytes()
            audit.bytes["dense scales"] += dense.nbytes() - dense.packed_bytes()
        for key, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            if type(tensor) is Placeholder:
                continue
            if tensor.device.type == "meta":
                audit.findings.append(f"has no data: {name}.{key}")
            elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
                audit.findings.append(f"holds NaN or Inf: {name}.{key}")
    seen: set[int] = set()
    vectors = {
        f"{n}.{k}" for n, m in model.named_modules() for k in getattr(m, "qmoe_unquantized", {})
    }
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                kind = _resident_kind(name, module, parameter)
                if name in vectors and kind == "embeddings":
                    kind = "experts 16-bit"
                audit.bytes[kind] += parameter.nbytes
    audit.require_clean(where)
    return audit


def audit_unpacked(source: Source, where: str) -> None:
    """Check a loaded model against its folder: all that is not packed has the dtype in which
    transformers' own class would run it, and the stored values, rounded to that once. ConfigError
    for numbers that this dtype does not have."""
    model, weights = source.model, source.weights
    dtype = model.config.dtype
    packed = {parameter for parameter, _ in weights.packed.values()}
    unpacked = sorted({*weights.targets, *weights.split_targets()} - packed)
    in_full = in_float32(model, dtype, unpacked)
    findings: list[str] = []
    roots = [layer.name + "." for layer in source.structure.layers]
    parts: dict[str, dict[str, Tensor]] = {}  # by layer: names of a layer depend on each other
    for target in unpacked:
        tensor = held(model, target)
        if tensor is None:
            findings.append(f"is not in the loaded model: {target}")
            continue
        if target in in_full and tensor.dtype != torch.float32:
            findings.append(f"is {tensor.dtype}, its class keeps it in float32: {target}")
        root = next((r for r in roots if target.startswith(r)), "")
        parts.setdefault(root, {})[target] = tensor.to("cpu")
    for tensors in parts.values():
        for name, tensor in all_original_names(model, tensors).items():
            if not torch.isfinite(tensor).all():
                raise ConfigError(
                    f"dtype: {name} has numbers too large for {dtype}; load {where} in bfloat16 or "
                    "float32"
                )
            if not torch.equal(source.checkpoint.tensor(name).to(tensor.dtype), tensor):
                findings.append(f"is not what is stored: {name}")
        source.checkpoint.release()
    Audit(findings=findings).require_clean(where)


def _resident_kind(name: str, module: nn.Module, parameter: Tensor) -> str:
    if is_experts(module):
        return "experts 16-bit" if parameter.dim() > 2 else "norms and other"
    if isinstance(module, PackedLinear):
        return "norms and other"
    if isinstance(module, nn.Embedding) or name == "lm_head":
        return "embeddings"
    return "dense 16-bit" if isinstance(module, nn.Linear) else "norms and other"
