"""A rule of an engine, and what breaks it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qmoe.engines.contents import Contents


@dataclass(frozen=True)
class Setup:
    """How the engine is going to run. tp: devices that share each layer. device: "cuda" or
    "cpu"."""

    tp: int = 1
    device: str = "cuda"


# A name (of a tensor, a module or an entry of config.json), and what was found there.
Breaches = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Rule:
    """name: what it is about, in a word or two. says: what the engine takes, as a sentence. source:
    the file and the function of the engine that say so. remedy: what to do. broken: what of the
    contents breaks the rule, in order."""

    name: str
    says: str
    source: str
    remedy: str
    broken: Callable[[Contents, Setup], Breaches]


@dataclass(frozen=True)
class Engine:
    """name, version: of the release whose source the rules are from. proves: what a folder that
    keeps all rules was not asked."""

    name: str
    version: str
    rules: tuple[Rule, ...]
    proves: str


@dataclass(frozen=True)
class Finding:
    """A rule that is broken: by `name`, the first of `count`."""

    rule: Rule
    name: str
    found: str
    count: int

    def __str__(self) -> str:
        others = f" (and {self.count - 1} more)" if self.count > 1 else ""
        return f"{self.name}{others}: {self.found}. {self.rule.says} {self.rule.remedy}"


def findings(engine: Engine, contents: Contents, setup: Setup) -> list[Finding]:
    """Every rule of the engine that is broken. One that the format breaks says all: what is in
    such a folder is then not looked at."""
    found = []
    for rule in engine.rules:
        broken = list(rule.broken(contents, setup))
        if broken:
            found.append(Finding(rule, *broken[0], len(broken)))
            if not contents.matrices:
                break
    return found
