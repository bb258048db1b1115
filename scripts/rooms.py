"""Draw the rooms of the library: the folders of `qmoe`, and which of them import which.

    python -P scripts/rooms.py             # print the drawing; `make rooms`
    python -P scripts/rooms.py --write     # and put it into ARCHITECTURE.md

ROOMS is the order that the library keeps: a file imports from its own room and from rooms below it.
The exit status is 1 if an import goes up, or if files import each other in a circle;
tests/test_package.py fails on the same.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"qmoe": "qmoe", "kernels": "qmoe.kernels", "calibration": "qmoe.calibration"}
# Lowest first. The last one, without a name, is qmoe/__init__.py.
ROOMS = [
    "_version",
    "errors",
    "system",
    "config",
    "format",
    "kernels",
    "solvers",
    "solved",
    "checkpoint",
    "model",
    "prediction",
    "calibration",
    "plan",
    "layer",
    "rotation",
    "distill",
    "runtime",
    "fused",
    "vllm_plugin",
    "packed",
    "export",
    "engines",
    "pipeline",
    "measure",
    "html_report",
    "budget",
    "cli",
    "__main__",
    "",
]
BEGIN, END = "<!-- rooms: begin, by `make rooms` -->", "<!-- rooms: end -->"


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the library by its name below `qmoe`, "" for qmoe itself, and its file."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(p for p in parts if p != "__init__")
            yield name.removeprefix("qmoe").removeprefix("."), path


NAMES = {name for name, _ in modules()}


def imported(path: Path) -> Iterator[str]:
    """The names that a file imports, by their full names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ([f"{node.module}.{a.name}" for a in node.names] + [node.module or ""])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def targets(name: str, path: Path) -> Iterator[str]:
    """The modules of the library that one of them imports."""
    for target in imported(path):
        target = target.removeprefix("qmoe.") if target.startswith("qmoe.") else ""
        while target and target not in NAMES:
            target = target.rpartition(".")[0]
        if target and target != name:
            yield target


def room_of(name: str) -> str:
    """The room of a module: the first part of its name."""
    return name.partition(".")[0]


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports, its own left out."""
    found: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, path in modules():
        found[room_of(name)] |= {room_of(target) for target in targets(name, path)}
    return {room: below - {room} for room, below in found.items()}


def upward() -> list[str]:
    """Imports that go up, in words."""
    place = {room: i for i, room in enumerate(ROOMS)}
    return [
        f"{name} imports {target}, which is above it"
        for name, path in modules()
        for target in targets(name, path)
        if place[room_of(target)] > place[room_of(name)]
    ]


def circle() -> set[str]:
    """Modules that import each other in a circle, or wait for such. A package's own file stands for
    what it imports from its room, and nothing waits for it."""
    waiting = {name: set(targets(name, path)) for name, path in modules()}
    while free := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {name: needs for name, needs in waiting.items() if name not in free}
    return set(waiting)


def draw() -> str:
    """A line per room, the highest first: its lines of code, and the rooms below that it imports,
    the nearest first."""
    lines = dict.fromkeys(ROOMS, 0)
    for name, path in modules():
        lines[room_of(name)] += path.read_text().count("\n")
    rows = []
    for room, below in reversed(arrows().items()):
        near = sorted(below, key=ROOMS.index, reverse=True)
        rows.append(f"{room or 'qmoe':12}{lines[room]:6,}  {'─► ' if near else ''}{' '.join(near)}")
    count = sum(map(len, arrows().values()))
    total = f"{len(ROOMS)} rooms, {count} arrows, all down; {sum(lines.values()):,} lines"
    return "\n".join([f"{'room':12}{'lines':>6}  imports", *map(str.rstrip, rows), "", total])


def drawn_in(page: str) -> dict[str, set[str]]:
    """The arrows of the drawing in a page, by room."""
    drawing = page.partition(BEGIN)[2].partition(END)[0]
    rows = re.findall(r"^(\w+) +[\d,]+(?:  ─► (.*))?$", drawing, re.MULTILINE)
    return {"" if room == "qmoe" else room: set(below.split()) for room, below in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into ARCHITECTURE.md")
    args = parser.parse_args()
    print(draw())
    wrong = upward()
    if waiting := circle():
        wrong.append(f"these import each other in a circle: {', '.join(sorted(waiting))}")
    for line in wrong:
        print(line, file=sys.stderr)
    if args.write and not wrong:
        page = ROOT / "ARCHITECTURE.md"
        before, begin, rest = page.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            print(f"{page.name}: expected a line {BEGIN!r} and one {END!r}", file=sys.stderr)
            return 1
        page.write_text(f"{before}{begin}\n```text\n{draw()}\n```\n{end}{after}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
