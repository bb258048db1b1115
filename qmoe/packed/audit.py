"""Proof of what is in a quantized folder or a loaded model: every byte has a kind, and anything
that is not as promised is a finding. No finding is ever a warning: `AuditError` lists them all.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.errors import AuditError, ConfigError
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.format.quantized import digest
from qmoe.model.experts import is_experts
from qmoe.model.precision import in_float32
from qmoe.model.skeleton import free
from qmoe.model.tensor_names import all_original_names
from qmoe.packed.modules import PackedLinear, held, packed_experts, take_stored
from qmoe.packed.skeleton import PackedSource, open_packed
from qmoe.system.progress import Track, silent

KINDS = (
    "experts packed", "experts scales", "experts 16-bit",
    "dense packed", "dense scales", "dense 16-bit",
    "router", "embeddings", "norms and other",
)  # fmt: skip


@dataclass
class Audit:
    """bytes by kind, what is wrong (empty in a good audit), and the SHA-256 of everything that is
    not packed, by which later damage is seen."""

    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    findings: list[str] = field(default_factory=list)
    kept: str = ""

    def require_clean(self, where: str) -> None:
        if self.findings:
            shown = "\n  ".join(self.findings[:20])
            more = f"\n  and {len(self.findings) - 20} more" if len(self.findings) > 20 else ""
            raise AuditError(
                f"{where}: audit failed, {len(self.findings)} findings:\n  {shown}{more}"
            )


def audit_folder(
    path: Path,
    digests: dict[str, str] | None = None,
    kept: str | None = None,
    track: Track = silent,
    trust: bool = False,
) -> Audit:
    """Read a quantized folder as the loader does, layer by layer; AuditError on any finding.

    digests: `types.digest` of every quantized stack by parameter name, as it was solved; the
    decoded bytes must be those. kept: `Audit.kept` of an earlier audit, likewise. trust: see
    checkpoint/remote_code.py.
    """
    audit = Audit()
    source = open_packed(path, torch.float32, trust)
    names = source.weights
    audit.findings += [f"missing: {n}" for n in names.missing()]
    audit.findings += names.doubled()
    audit.findings += [f"belongs to no parameter: {n}" for n in names.unexpected]
    audit.findings += names.misshapen()
    sha = hashlib.sha256()
    for target, stored in sorted(names.targets.items()):
        owner, _, parameter = target.rpartition(".")
        kind = _kind(source, owner, parameter, source.checkpoint.rank(stored[0]))
        for name in stored:
            tensor = source.checkpoint.tensor(name)
            audit.bytes[kind] += tensor.nbytes
            if not kind.endswith(("packed", "scales")):
                sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                audit.findings.append(f"holds NaN or Inf: {name}")
            if (
                kind.endswith("scales")
                and name.endswith("_scale")
                and not (tensor.float() > 0).all()
            ):
                audit.findings.append(f"has a scale that is not positive: {name}")
        if kind == "experts 16-bit" and not _is_kept(source, owner):
            audit.findings.append(f"routed experts left unquantized: {stored[0]} ({target})")
        source.checkpoint.release()
    audit.kept = sha.hexdigest()
    if kept is not None and kept != audit.kept:
        audit.findings.append("an unpacked tensor is not the one that was written")
    audit.require_clean(str(path))
    found = _decode(source, track)
    if digests is not None:
        audit.findings += [
            f"decodes to other weights than were solved: {target}"
            for target in sorted(set(digests) | set(found))
            if digests.get(target) != found.get(target)
        ]
    audit.require_clean(str(path))
    return audit


def _decode(source: PackedSource, track: Track) -> dict[str, str]:
    """Digest of every packed weight, read through the loader's own path, one layer at a time."""
    found = {}
    roots = [layer.name for layer in source.structure.layers]
    for root in track([*roots, *filter(None, [source.structure.lm_head])], "auditing"):
        source.weights.load(source.weights.sources(root), torch.float32)
        module = source.model.get_submodule(root)
        for name, part in module.named_modules(prefix=root):
            for weight, quantized in take_stored(part, name).items():
                found[f"{name}.{weight}"] = digest(quantized)
        free(module)
        source.checkpoint.release()
    return found


def _kind(source: PackedSource, owner: str, parameter: str, rank: int) -> str:
    module = source.model.get_submodule(owner)
    suffix = next((s for s in SUFFIXES if parameter.endswith(s)), None)
    experts = is_experts(module)
    loose = any(owner in layer.loose_linears() for layer in source.structure.layers)
    if experts or loose or isinstance(module, PackedLinear):
        tier = "experts" if experts or loose else "dense"
        if suffix is not None:
            return f"{tier} packed" if suffix == "_packed" else f"{tier} scales"
        # Biases of experts are a matrix [E, N], weights never less than one for each expert.
        vector = parameter == "bias" or (experts and rank < 3 and parameter.endswith("_bias"))
        return "norms and other" if vector else f"{tier} 16-bit"
    kept = [layer.kept[owner] for layer in source.structure.layers if owner in layer.kept]
    if kept and isinstance(module, nn.Embedding):
        return "experts 16-bit"
    if isinstance(module, nn.Embedding) or owner == source.structure.lm_head:
        return "embeddings"
    if "router" in kept or _is_router(source, owner):
        return "router"
    return "dense 16-bit" if isinstance(module, nn.Linear) else "norms and other"


def _is_kept(source: PackedSource, owner: str) -> bool:
    """Whether this was said, with a reason, before the work began; the report repeats it."""
    return any(owner in layer.kept for layer in source.structure.layers)


def _is_router(source: PackedSource, owner: str) -> bool:
    """Whatever has parameters beside the experts, is not a linear, and scores them is a router."""
    module: Any = source.model.get_submodule(owner)
    block = owner.rpartition(".")[0]
    experts = [e for n in source.structure.layers for e in [*n.experts, *n.loose]]
    beside = any(e.rpartition(".")[0] == block for e in experts)
    return beside and not isinstance(module, nn.Linear)


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
            if tensor.device.type == "meta":
                audit.findings.append(f"has no data: {name}.{key}")
            elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
                audit.findings.append(f"holds NaN or Inf: {name}.{key}")
    seen: set[int] = set()
    vectors = {f"{n}.{k}" for n, m in model.named_modules() for k in getattr(m, "qmoe_kept", {})}
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


def audit_kept(source: PackedSource, where: str) -> None:
    """Check a loaded model against its folder: all that is not packed has the dtype in which
    transformers' own class would run it, and the stored values, rounded to that once. ConfigError
    for numbers that this dtype does not have."""
    model, weights = source.model, source.weights
    dtype = model.config.dtype
    packed = {parameter for parameter, _ in weights.packed.values()}
    kept = sorted({*weights.targets, *weights.split_targets()} - packed)
    in_full = in_float32(model, dtype, kept)
    findings: list[str] = []
    roots = [layer.name + "." for layer in source.structure.layers]
    parts: dict[str, dict[str, Tensor]] = {}  # by layer: names of a layer depend on each other
    for target in kept:
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
    if isinstance(module, nn.Embedding) or name == "lm_head":
        return "embeddings"
    return "dense 16-bit" if isinstance(module, nn.Linear) else "norms and other"
