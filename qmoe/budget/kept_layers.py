"""What is measured of a layer, kept until all layers are measured: a killed pass solves them once.

A layer is a shard of the unfinished folder (pipeline/output.py): its matrices at PROBE bits, which
probes need when they run through the layer again, and beside it a file with what was measured.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from qmoe.budget.measurements import Measured
from qmoe.budget.solve_all import Solution
from qmoe.checkpoint.folders import read_json
from qmoe.config import Scheme
from qmoe.format.packing import pack_rows, unpack_rows
from qmoe.format.quantized import Quantized
from qmoe.pipeline.output import OutputFolder, Shard

NOTE = "measured-{}.json"


def keep_layer(out: OutputFolder, index: int, solved: Sequence[tuple[str, Solution]]) -> None:
    """Write what was found of a layer: by group, in order."""
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    for group, solution in solved:
        probes = {}
        for name, stack in solution.probes.items():
            tensors[f"{name}.packed"] = pack_rows(stack.q, stack.scheme.bits)
            tensors[f"{name}.scale"] = stack.scale
            if stack.zero is not None:
                tensors[f"{name}.zero"] = stack.zero
            probes[name] = {"columns": stack.q.shape[-1], "scheme": vars(stack.scheme)}
        measured = [asdict(part) for part in solution.measured]
        groups.append({"group": group, "measured": measured, "probes": probes})
    # First the note: the shard is what says that a layer is there.
    out.write_json(NOTE.format(index), {"groups": groups})
    out.write_shard(Shard(index, tensors, None, {}))


def kept_layer(out: OutputFolder, index: int) -> list[tuple[str, Solution]]:
    """What was found of a layer by an earlier run. Raises OutputError if it is damaged."""
    tensors = out.read_shard(index)
    return [
        (
            found["group"],
            Solution(
                [Measured(**part) for part in found["measured"]],
                {name: _stack(tensors, name, probe) for name, probe in found["probes"].items()},
            ),
        )
        for found in read_json(out.path / NOTE.format(index))["groups"]
    ]


def _stack(tensors: dict[str, Tensor], name: str, probe: dict[str, Any]) -> Quantized:
    scheme = Scheme(**probe["scheme"])
    q = unpack_rows(tensors[f"{name}.packed"], scheme.bits, probe["columns"])
    return Quantized(q, tensors[f"{name}.scale"], tensors.get(f"{name}.zero"), scheme)


def forget_layers(out: OutputFolder) -> None:
    """Remove what was kept of layers: all are measured."""
    for pattern in (NOTE.format("*"), "*.safetensors"):
        for path in out.path.glob(pattern):
            path.unlink()
