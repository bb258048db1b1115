"""Which experts of a layer are in its slots on the GPU: a pure policy.

A layer has fewer slots than experts. Slots are held least recently used first; an expert that is
wanted and missing takes the place of the one not used for longest. What the next layer will want
is guessed from what it wanted before, after the same experts here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """(expert, slot) pairs, the least recently used first. Free slots hold expert -1."""

    pairs: tuple[tuple[int, int], ...]

    def slot_of(self, expert: int) -> int | None:
        return next((slot for e, slot in self.pairs if e == expert), None)


def empty(slots: int) -> Held:
    return Held(tuple((-1, slot) for slot in range(slots)))


def fetch(held: Held, wanted: Sequence[int]) -> tuple[Held, list[tuple[int, int]]]:
    """Make room for `wanted`: what is held afterwards, and the (expert, slot) copies to make.

    The experts wanted become the most recently used, in the order given. Raises ValueError if they
    are more than the slots.
    """
    wanted = list(dict.fromkeys(wanted))
    if len(wanted) > len(held.pairs):
        raise ValueError(f"{len(wanted)} experts wanted at once, {len(held.pairs)} slots")
    victims = [(e, slot) for e, slot in held.pairs if e not in wanted]
    copies, used = [], []
    for expert in wanted:
        slot = held.slot_of(expert)
        if slot is None:
            _, slot = victims.pop(0)
            copies.append((expert, slot))
        used.append((expert, slot))
    return Held((*victims, *used)), copies


def waves(held: Held, wanted: Sequence[int]) -> list[list[int]]:
    """Split what a large batch wants into rounds that fit the slots; what is held goes first."""
    ready = [e for e in wanted if held.slot_of(e) is not None]
    missing = [e for e in wanted if held.slot_of(e) is None]
    ordered, size = [*ready, *missing], len(held.pairs)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def guess(followed: Float[Tensor, "E E2"], chosen: Sequence[int], count: int) -> list[int]:
    """The `count` likeliest experts of the next layer, likeliest first.

    followed[e, f]: how often f was wanted there when e was here. Each chosen expert has one vote,
    shared out by what followed it. Experts that never followed are not guessed.
    """
    rows = followed[list(chosen)].double()
    votes = (rows / rows.sum(1, keepdim=True).clamp(min=1)).sum(0)
    best = torch.sort(votes, descending=True, stable=True)
    return [int(e) for e, v in zip(best.indices, best.values, strict=True) if v > 0][:count]
