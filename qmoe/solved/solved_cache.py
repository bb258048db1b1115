"""Solved experts, kept on disk until their layer is written: a killed run solves them once.

One file for each few experts solved at once, whole or absent, with a checksum.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmoe.config import Scheme
from qmoe.errors import OutputError
from qmoe.format.quantized import Quantized, checksum
from qmoe.format.stacks import digest
from qmoe.format.trellis import Codes, Stack, Trellis
from qmoe.solvers.solve import Solved
from qmoe.system.files import write_safetensors

PATTERN = ".qmoe-solved-{}-{}.safetensors"


@dataclass(frozen=True)
class SolvedExperts:
    """Some neighbouring experts of a module: their first and second stacks, which of them borrowed
    tokens, and the second stack's weights as they were refitted, if they are to be tuned."""

    solved: list[Solved]
    borrowed: list[int] = field(default_factory=list)
    refitted: Tensor | None = None


@dataclass(frozen=True)
class SolvedCache:
    """The solved experts in a folder of unfinished work."""

    folder: Path

    def load(self, name: str, start: int, end: int) -> SolvedExperts | None:
        """Experts start to end of module `name`, if they were saved."""
        path = self._path(name, start, end)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                note = json.loads(file.metadata()["note"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from error
        solved = [_solved(tensors, i, entry) for i, entry in enumerate(note["solved"])]
        if [digest(s.quantized) for s in solved] != note["digests"]:
            raise _damaged(path, "its checksum does not fit")
        refitted = tensors.get("refitted")
        if refitted is not None and checksum(refitted) != note["refitted"]:
            raise _damaged(path, "its checksum does not fit")
        return SolvedExperts(solved, note["borrowed"], refitted)

    def save(self, name: str, start: int, end: int, made: SolvedExperts) -> None:
        tensors: dict[str, Tensor] = {}
        for i, solved in enumerate(made.solved):
            tensors |= {f"{i}.{key}": part for key, part in _tensors(solved.quantized).items()}
        if made.refitted is not None:
            tensors["refitted"] = made.refitted
        note = {
            "solved": [{"error": s.error, "damped": s.damped, "rounded": s.rounded,
                        "bounded": s.bounded, "scheme": vars(s.quantized.scheme),
                        "widths": _widths(s.quantized),
                        "sizes": _sizes(s.quantized)} for s in made.solved],
            "digests": [digest(s.quantized) for s in made.solved],
            "borrowed": made.borrowed,
            "refitted": None if made.refitted is None else checksum(made.refitted),
        }  # fmt: skip
        write_safetensors(self._path(name, start, end), tensors, {"note": json.dumps(note)})

    def any(self) -> bool:
        return next(self.folder.glob(PATTERN.format("*", "*")), None) is not None

    def clear(self) -> None:
        """Their layer is written, or the work is over."""
        for path in self.folder.glob(PATTERN.format("*", "*")):
            path.unlink()

    def _path(self, name: str, start: int, end: int) -> Path:
        return self.folder / PATTERN.format(name, f"{start}-{end}")


def _solved(tensors: dict[str, Tensor], i: int, entry: dict[str, Any]) -> Solved:
    damped = {int(e): amount for e, amount in entry["damped"].items()}
    bounded = {int(e): rows for e, rows in entry["bounded"].items()}
    made = _stack(tensors, i, entry)
    return Solved(made, entry["error"], damped, entry["rounded"], bounded)


def _tensors(stack: Stack) -> dict[str, Tensor]:
    if isinstance(stack, Trellis):
        names = ("trellis", "suh", "svh")
        return {f"{p}.{n}": getattr(c, n) for p, c in enumerate(stack.parts) for n in names}
    return {key: part for key, part in vars(stack).items() if isinstance(part, Tensor)}


def _widths(stack: Stack) -> tuple[int, ...]:
    return () if isinstance(stack, Trellis) else stack.widths


def _sizes(stack: Stack) -> list[tuple[int, int]]:
    """Of coded parts, which are stored filled up."""
    return [(part.n, part.k) for part in stack.parts] if isinstance(stack, Trellis) else []


def _stack(tensors: dict[str, Tensor], i: int, entry: dict[str, Any]) -> Stack:
    scheme = Scheme(**entry["scheme"])
    if scheme.codebook:
        codebook: Any = scheme.codebook
        parts = [
            Codes(
                tensors[f"{i}.{p}.trellis"],
                tensors[f"{i}.{p}.suh"],
                tensors[f"{i}.{p}.svh"],
                codebook,
                n,
                k,
            )
            for p, (n, k) in enumerate(entry["sizes"])
        ]
        return Trellis(tuple(parts), scheme)
    q, scale, zero = (tensors.get(f"{i}.{part}") for part in ("q", "scale", "zero"))
    assert q is not None and scale is not None
    return Quantized(q, scale, zero, scheme, tuple(entry["widths"]))


def _damaged(path: Path, why: str) -> OutputError:
    return OutputError(f"{path.parent}: unfinished work is damaged ({path.name}: {why}); remove it")
