"""What a step found, in a JSON file that is whole after every row."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Record:
    """rows: what was measured, each a flat dict. problems: what is wrong, in words."""

    def __init__(self, path: Path, resume: bool = False):
        self.path, self.started = path, time.monotonic()
        old = json.loads(path.read_text()) if resume and path.is_file() else {}
        self.rows: list[dict[str, Any]] = old.get("rows", [])
        self.problems: list[str] = []
        self.status = "running"
        self._write()

    def row(self, **values: Any) -> None:
        """Add a row, and show it."""
        self.rows.append(values)
        print(
            "   ", " ".join(f"{name}={_short(value)}" for name, value in values.items()), flush=True
        )
        self._write()

    def has(self, **values: Any) -> bool:
        """Whether there is a row with these values, of this run or the one it goes on from."""
        return any(values.items() <= row.items() for row in self.rows)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print("    WRONG", text, flush=True)
        self._write()

    def leave_out(self, why: str) -> None:
        """Nothing was done, for a reason that is no fault."""
        self.status = f"left out: {why}"
        print("   ", self.status, flush=True)
        self._write()

    def finish(self) -> bool:
        """Whether nothing was wrong."""
        if self.status == "running" or self.problems:
            self.status = "failed" if self.problems else "passed"
        self._write()
        return not self.problems

    def _write(self) -> None:
        value = {
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 1),
            "problems": self.problems,
            "rows": self.rows,
        }
        write_json(self.path, value)


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader never sees half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
