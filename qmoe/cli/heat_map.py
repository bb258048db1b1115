"""Bits of every layer and expert, as lines of characters."""

from collections.abc import Mapping, Sequence

SHADES = {2: "░", 3: "▒", 4: "▓", 8: "█"}
WIDE = 128  # experts in a line
LEGEND = "  ".join(f"{shade} {bits} bits" for bits, shade in SHADES.items())


def heat_map(widths: Mapping[str, Sequence[int]]) -> list[str]:
    """Lines for stacks of experts, one character an expert, and for the linears of a layer, which
    are written out. widths: bits of each matrix, by stack or linear."""
    stacks = {name: each for name, each in widths.items() if len(each) > 1}
    lines = [f"bits of each expert ({LEGEND})"] if stacks else []
    longest = max(map(len, stacks), default=0)
    for name, each in stacks.items():
        shades = "".join(SHADES[bits] for bits in each)
        for start in range(0, len(shades), WIDE):
            label = name if start == 0 else ""
            lines.append(f"  {label:{longest}} {shades[start : start + WIDE]}")
    return lines + _linears({name: each[0] for name, each in widths.items() if len(each) == 1})


def _linears(bits: Mapping[str, int]) -> list[str]:
    """A line for each module that holds some; those with one width together."""
    owners: dict[str, dict[str, int]] = {}
    for name, width in bits.items():
        owner, _, own = name.rpartition(".")
        owners.setdefault(owner, {})[own] = width
    lines = ["bits of linears"] if owners else []
    for owner, held in owners.items():
        alike = len(set(held.values())) == 1
        said = f"{next(iter(held.values()))}" if alike and len(held) > 4 else ", ".join(
            f"{name} {width}" for name, width in held.items()
        )  # fmt: skip
        lines.append(f"  {owner or 'model'}: {said}")
    return lines


def is_mixed(widths: Mapping[str, Sequence[int]]) -> bool:
    """Whether experts differ, or linears do."""
    experts = {bits for each in widths.values() if len(each) > 1 for bits in each}
    linears = {each[0] for each in widths.values() if len(each) == 1}
    return len(experts) > 1 or len(linears) > 1
