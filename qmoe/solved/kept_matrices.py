"""Solved matrices in a folder, found again by what they were made from: the weight, the Hessian,
the scheme and the solver's settings. Who solves the same again reads it instead.

The few experts that are solved at once are in one file. A matrix that is solved beside others may
differ in the last digits from one that is solved alone; what is kept is what was solved first.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qmoe.config import Scheme
from qmoe.errors import OutputError
from qmoe.format.packing import pack_rows, unpack_rows
from qmoe.format.quantized import Quantized, checksum
from qmoe.solvers.solve import Solved, join
from qmoe.system.devices import CPU
from qmoe.system.files import write_safetensors

Make = Callable[[Tensor, Tensor], Solved]


@dataclass
class KeptMatrices:
    """places: of each matrix, by its key, the file and which of the matrices there it is."""

    folder: Path
    places: dict[str, tuple[Path, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            self._enter(path, _open(path)[1]["keys"])

    def solve(
        self, weight: Tensor, hessian: Tensor, scheme: Scheme, about: str, make: Make
    ) -> Solved:
        """Matrices [E, N, K] with Hessians [E, K, K], solved by `make` where they are not kept.
        about: the solver and its settings. Raises OutputError for a damaged file."""
        keys = [_key(w, h, scheme, about) for w, h in zip(weight, hessian, strict=True)]
        new = [e for e, key in enumerate(keys) if key not in self.places]
        if new:
            every = len(new) == len(keys)
            made = make(weight if every else weight[new], hessian if every else hessian[new])
            self._save([keys[e] for e in new], made)
        files = {path: _open(path) for path in {self.places[key][0] for key in keys}}
        return join([_solved(*files[path], e) for path, e in (self.places[key] for key in keys)])

    def _enter(self, path: Path, keys: Sequence[str]) -> None:
        self.places |= {key: (path, e) for e, key in enumerate(keys)}

    def _save(self, keys: list[str], made: Solved) -> None:
        stack = made.quantized
        assert isinstance(stack, Quantized)  # codes have no widths to choose
        tensors = {"words": pack_rows(stack.q, stack.scheme.bits), "scale": stack.scale}
        if stack.zero is not None:
            tensors["zero"] = stack.zero
        note = {
            "keys": keys,
            "columns": stack.q.shape[-1],
            "scheme": vars(stack.scheme),
            "error": made.error,
            "damped": made.damped,
            "rounded": made.rounded,
            "bounded": made.bounded,
        }
        path = self.folder / f"{keys[0]}.safetensors"
        there = {name: tensor.to(CPU).contiguous() for name, tensor in tensors.items()}
        write_safetensors(path, there, {"note": json.dumps(note)})
        self._enter(path, keys)


def _key(weight: Tensor, hessian: Tensor, scheme: Scheme, about: str) -> str:
    given = (checksum(weight.to(CPU)), checksum(hessian.to(CPU)), repr(scheme), about)
    return hashlib.sha256("|".join(given).encode()).hexdigest()[:32]


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """The file, and what its note says."""
    try:
        file = safe_open(path, framework="pt")
        return file, json.loads(file.metadata()["note"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{path}: is damaged ({error}); remove {path.parent}") from error


def _solved(file: Any, note: dict[str, Any], e: int) -> Solved:
    scheme, own = Scheme(**note["scheme"]), slice(e, e + 1)
    parts = {name: file.get_slice(name)[own] for name in file.keys()}  # noqa: SIM118
    q = unpack_rows(parts["words"], scheme.bits, note["columns"])
    return Solved(
        Quantized(q, parts["scale"], parts.get("zero"), scheme),
        [note["error"][e]],
        {0: note["damped"][str(e)]} if str(e) in note["damped"] else {},
        [0] if e in note["rounded"] else [],
        {0: note["bounded"][str(e)]} if str(e) in note["bounded"] else {},
    )
