"""The ways in which a matrix can be stored: bits, each with the groups of the settings, and with
one scale per output channel, which takes fewer bytes and loses more."""

from dataclasses import replace

from qmoe.config import BITS, CHANNEL, QuantConfig, Scheme

COUNT = 2 * len(BITS)  # of the ways of any matrix, at most
IS_CHANNEL = [i >= len(BITS) for i in range(COUNT)]  # of each way, whether it has other groups


def ways(own: Scheme) -> list[Scheme]:
    """All ways of a matrix that the settings give the scheme `own`: at each of BITS with its own
    groups, then at each with one scale per channel."""
    sizes = [own.group_size] if own.gguf else [own.group_size, CHANNEL]
    return [replace(own, bits=b, group_size=g) for g in dict.fromkeys(sizes) for b in BITS]


def is_open(config: QuantConfig, own: Scheme) -> list[bool]:
    """Of each way, whether it may be chosen: other engines than qmoe do not run every group size,
    so a model for them keeps its own."""
    free = config.target == "qmoe"
    return [free or way.group_size == own.group_size for way in ways(own)]


def narrowest(config: QuantConfig, own: Scheme) -> Scheme:
    """The way that takes the fewest bytes."""
    found = [way for way, may in zip(ways(own), is_open(config, own), strict=True) if may]
    return next(way for way in reversed(found) if way.bits == min(BITS))
