"""Routed-token statistics: what each matrix saw, summed so that parts can be merged by adding.

A Hessian here is sum(w x x') over tokens x with weight w (GPTQ's H without the factor 2/n); for
routed experts w is 1 or the squared routing weight. Sums are in float32, those of dense linears in
float64 while they grow, and in the machine's own memory, wherever the tokens are.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmoe.errors import CalibrationError
from qmoe.system.files import write_safetensors

LAYOUT = "2"  # of saved statistics


@dataclass
class ExpertStats:
    """Per expert: tokens routed to it, sum of routing weights, sum of weights w, Hessian of the
    inputs of its first matrix (gate and up share it) and of its second (down). sample: an even
    sample of the layer's tokens, routed anywhere, for experts that saw too few of their own."""

    tokens: Int[Tensor, " E"]
    routing_mass: Float[Tensor, " E"]
    weight: Float[Tensor, " E"]
    first: Float[Tensor, "E H H"]
    second: Float[Tensor, "E I I"]
    sample: Float[Tensor, "B H"]

    @classmethod
    def empty(cls, experts: int, hidden: int, intermediate: int) -> "ExpertStats":
        return cls(
            torch.zeros(experts, dtype=torch.int64),
            torch.zeros(experts),
            torch.zeros(experts),
            torch.zeros(experts, hidden, hidden),
            torch.zeros(experts, intermediate, intermediate),
            torch.zeros(0, hidden),
        )

    def part(self, start: int, end: int) -> "ExpertStats":
        """Views of the statistics of experts start to end."""
        shared = {"sample": self.sample}
        return ExpertStats(
            **{k: v[start:end] for k, v in vars(self).items() if k not in shared}, **shared
        )

    def add(self, e: int, x: Tensor, mid: Tensor | None, routing: Tensor, weight: Tensor) -> None:
        """Account for tokens x [M, H] of expert e, their routing weights and weights [M], and
        second inputs mid [M, I], or None if their Hessian is made elsewhere."""
        self.tokens[e] += len(x)
        self.routing_mass[e] += routing.float().sum().cpu()
        self.add_weighted(e, x, mid, weight)

    def add_weighted(self, e: int, x: Tensor, mid: Tensor | None, weight: Tensor) -> None:
        """Add to the Hessians only (borrowed tokens are not routed tokens)."""
        weight = weight.float()
        self.weight[e] += weight.sum().cpu()
        root = weight.sqrt()[:, None].to(x.device)
        for into, inputs in ((self.first, x), (self.second, mid)):
            if inputs is not None:
                weighted = inputs.float() * root
                add_products(into[e], weighted, weighted)


@dataclass
class LinearStats:
    """Of a dense linear's inputs: how many tokens, and their Hessian."""

    tokens: Int[Tensor, ""]
    hessian: Float[Tensor, "K K"]

    @classmethod
    def empty(cls, in_features: int, dtype: torch.dtype = torch.float32) -> "LinearStats":
        """dtype: float64 where the sum over batches must not depend on their order."""
        return cls(torch.tensor(0), torch.zeros(in_features, in_features, dtype=dtype))

    def add(self, x: Float[Tensor, "M K"]) -> None:
        x = x.float()
        self.tokens += len(x)
        add_products(self.hessian, x, x)


def add_products(
    into: Float[Tensor, "K K"], x: Float[Tensor, "M K"], y: Float[Tensor, "M K"]
) -> None:
    """Add x' y, computed where they are, in their type."""
    if x.device == into.device and x.dtype == into.dtype:
        into.addmm_(x.T, y)
    else:
        into += (x.T @ y).to(into.device)


def check_finite(name: str, *moments: Tensor) -> None:
    """CalibrationError unless all these sums over the tokens of module `name` are finite."""
    if not all(moment.isfinite().all() for moment in moments):
        raise CalibrationError(f"{name}: calibration gave NaN or Inf; the model overflows on it")


@dataclass
class LayerStats:
    """Statistics of one decoder layer. Linears fed by the same tensor share one LinearStats.
    samples: what ExpertStats.sample is, for experts that are modules, by the name of their list."""

    experts: dict[str, ExpertStats] = field(default_factory=dict)
    linears: dict[str, LinearStats] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Flat tensors by `name|field`, and the shared linears as alias -> name."""
        flat = {f"{n}|{k}": v for n, s in self.experts.items() for k, v in vars(s).items()}
        flat |= {f"{n}|sample": sample for n, sample in self.samples.items()}
        first: dict[int, str] = {}
        aliases = {}
        for name, stats in self.linears.items():
            owner = first.setdefault(id(stats), name)
            aliases[name] = owner
            if owner == name:
                flat |= {f"{name}|{k}": v for k, v in vars(stats).items()}
        return flat, aliases


def save(stats: LayerStats, path: Path, about: dict[str, str]) -> None:
    """Write one layer's statistics; `about` says of which model and gathered how."""
    flat, aliases = stats.tensors()
    metadata = {"qmoe_statistics": LAYOUT, "aliases": json.dumps(aliases)} | about
    write_safetensors(path, {k: v.contiguous() for k, v in flat.items()}, metadata)


def _open(path: Path, about: dict[str, str]) -> Any:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{path}: no readable statistics file ({error})") from error
    metadata = file.metadata() or {}
    if "qmoe_statistics" not in metadata:
        raise CalibrationError(f"{path}: not a statistics file of qmoe")
    if metadata["qmoe_statistics"] != LAYOUT:
        raise CalibrationError(f"{path}: was written by another version of qmoe; save it again")
    # Only a rotated residual stream is told; without a word it is as the model has it.
    for key, expected in ({"stream": None} | about).items():
        if metadata.get(key) != expected:
            raise CalibrationError(
                f"{path}: statistics gathered with another {key}: {metadata.get(key)}, "
                f"expected {expected}"
            )
    return file


def check(path: Path, about: dict[str, str]) -> list[str]:
    """Raises CalibrationError if `load` would, reading the header only. Returns, in words, what of
    the text that they were gathered on was not as asked for (`about`'s "notes" when saved)."""
    try:
        notes = json.loads(_open(path, about).metadata().get("notes", "[]"))
    except ValueError as error:
        raise CalibrationError(f"{path}: its notes are damaged: {error}") from error
    return [str(note) for note in notes] if isinstance(notes, list) else []


def load(path: Path, about: dict[str, str]) -> LayerStats:
    """Read `save`'s file; CalibrationError if it is missing, damaged, holds NaN, or if what it says
    about itself differs from `about`."""
    file = _open(path, about)
    metadata = file.metadata()
    flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, tensor in flat.items():
        if not tensor.isfinite().all():
            raise CalibrationError(f"{path}: {key} holds NaN or Inf")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        name, _, part = key.rpartition("|")
        parts.setdefault(name, {})[part] = tensor
    experts = {n: ExpertStats(**p) for n, p in parts.items() if "first" in p}
    owners = {n: LinearStats(**p) for n, p in parts.items() if "hessian" in p}
    linears = {n: owners[o] for n, o in json.loads(metadata["aliases"]).items()}
    return LayerStats(experts, linears, {n: p["sample"] for n, p in parts.items() if len(p) == 1})


def merge(parts: list[LayerStats]) -> LayerStats:
    """Sum of statistics of the same layer gathered on different text."""
    flats = [part.tensors() for part in parts]
    if any(set(flat) != set(flats[0][0]) for flat, _ in flats):
        raise CalibrationError("statistics to merge cover different modules of the layer")
    for key, total in flats[0][0].items():
        for flat, _ in flats[1:]:
            if not key.endswith("|sample"):
                total += flat[key]
    for name, stats in parts[0].experts.items():
        stats.sample = torch.cat([part.experts[name].sample for part in parts])
    for name in parts[0].samples:
        parts[0].samples[name] = torch.cat([part.samples[name] for part in parts])
    return parts[0]
