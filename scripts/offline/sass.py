"""Loops of a disassembled NVIDIA kernel, and what is counted in them."""

import re
from collections import Counter
from dataclasses import dataclass

INSTRUCTION = re.compile(
    r"^/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P[T0-9]+\s+)?(?P<op>[A-Z][A-Z0-9_]*)(?P<mods>(?:\.\w+)*)"
)
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    op: str
    modifiers: str
    guarded: bool
    target: str | None

    @property
    def bytes(self) -> int:
        """Width of a load or store, per thread."""
        return next((WIDTHS[m] for m in self.modifiers.split(".") if m in WIDTHS), 4)


def parse(sass: str) -> list[Instruction | str]:
    """Instructions in order, with labels as strings between them."""
    found: list[Instruction | str] = []
    for line in map(str.strip, sass.splitlines()):
        if line.startswith(".L") and line.endswith(":"):
            found.append(line[:-1])
        elif match := INSTRUCTION.match(line):
            target = re.search(r"`\(([^)]+)\)", line)
            found.append(
                Instruction(
                    match["op"],
                    match["mods"],
                    match["guard"] is not None,
                    target[1] if target and match["op"] == "BRA" else None,
                )
            )
    return found


def main_loops(sass: str) -> list[list[Instruction]]:
    """The bodies of all loops that multiply matrices, in the order of the code.

    A loop is a natural one: its back edge comes from a block that its first block dominates.
    Blocks behind the back edge (where a thread spins for a barrier that was not ready) are left
    out.
    """
    items = parse(sass)
    starts, successors = _blocks(items)
    dominators = _dominators(successors)
    loops: dict[int, int] = {}
    for block, following in enumerate(successors):
        for header in following:
            if header <= block and header in dominators[block]:
                loops[header] = max(loops.get(header, 0), block)
    bodies = []
    ends = [*starts[1:], len(items)]
    for header, last in sorted(loops.items()):
        body = [i for i in items[starts[header] : ends[last]] if isinstance(i, Instruction)]
        inner = any(
            header < h and end <= last and _multiplies(items, starts, ends, h, end)
            for h, end in loops.items()
        )
        if any("MMA" in i.op for i in body) and not inner:
            bodies.append(body)
    return bodies


def counts(body: list[Instruction]) -> Counter[str]:
    return Counter(i.op for i in body)


def _multiplies(
    items: list[Instruction | str], starts: list[int], ends: list[int], first: int, last: int
) -> bool:
    return any(
        isinstance(i, Instruction) and "MMA" in i.op for i in items[starts[first] : ends[last]]
    )


def _blocks(items: list[Instruction | str]) -> tuple[list[int], list[list[int]]]:
    """Where basic blocks start, and the blocks each one may go on to."""
    leaders = {0}
    for i, item in enumerate(items):
        if isinstance(item, str):
            leaders.add(i)
        elif item.target or item.op in ("EXIT", "RET"):
            leaders.add(i + 1)
    starts = sorted(s for s in leaders if s < len(items))
    label_block = {}
    for b, start in enumerate(starts):
        label = items[start]
        if isinstance(label, str):
            label_block[label] = b
    successors: list[list[int]] = []
    for b, start in enumerate(starts):
        end = starts[b + 1] if b + 1 < len(starts) else len(items)
        last = items[end - 1] if end > start else None
        after = [b + 1] if b + 1 < len(starts) else []
        if isinstance(last, Instruction):
            # BRA.U with a uniform predicate is conditional too, and prints it as an operand.
            conditional = last.guarded or ".U" in last.modifiers
            if last.target in label_block:
                after = [label_block[last.target], *(after if conditional else [])]
            elif last.op in ("EXIT", "RET") and not last.guarded:
                after = []
        successors.append(after)
    return starts, successors


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    n = len(successors)
    before: list[list[int]] = [[] for _ in range(n)]
    for block, following in enumerate(successors):
        for next_block in following:
            before[next_block].append(block)
    dominators = [{0}] + [set(range(n)) for _ in range(n - 1)]
    changed = True
    while changed:
        changed = False
        for block in range(1, n):
            known = [dominators[p] for p in before[block]]
            new = {block} | (set.intersection(*known) if known else set())
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
