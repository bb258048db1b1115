"""Damage to JSON and other text files, for scripts/fuzz/mutations.py."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
Mutation = Callable[[Path, random.Random], str]


class Raw(str):
    """Text that goes into JSON as it is, for what json.dumps does not write."""


JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 100_000, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, 1e-300,
    float("nan"), float("inf"), "", "x", "auto", "../../x", "/etc/passwd", "\x00", "\ud800",
    "é" * 9, [], [1], [None], [[]], {}, {"a": 1}, "y" * 100_000, Raw("[" * 90_000 + "]" * 90_000),
    Raw('{"a":' * 500 + "1" + "}" * 500), Raw("9" * 6000), Raw("1e999"),
]  # fmt: skip


def junk(rng: random.Random) -> Any:
    return rng.choice(JUNK)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON, with every Raw written as it is."""
    raws: list[str] = []

    def mark(v: Any) -> Any:
        if isinstance(v, Raw):
            raws.append(v)
            return f"@raw{len(raws) - 1}@"
        if isinstance(v, dict):
            return {k: mark(x) for k, x in v.items()}
        return [mark(x) for x in v] if isinstance(v, list) else v

    text = json.dumps(mark(value))
    for i, raw in enumerate(raws):
        text = text.replace(f'"@raw{i}@"', raw)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def spoil(value: Any, rng: random.Random) -> str:
    """Change one place of a nested dict or list: other value, gone, twice, or one key more."""
    where = ""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return f"{where} is empty already"
        key = rng.choice(keys)
        where += f".{key}"
        below = value[key]
        if isinstance(below, dict | list) and below and rng.random() < 0.75:
            value = below
            continue
        action = rng.choice(["replace"] * 6 + ["delete", "nudge", "rename"])
        if action == "delete":
            del value[key]
            return f"{where} deleted"
        if action == "rename" and isinstance(value, dict):
            value[rng.choice(["x", "../x", "", f"{key}x"])] = value.pop(key)
            return f"{where} renamed"
        if action == "nudge" and type(below) in (int, float):
            value[key] = rng.choice([below + 1, below - 1, below * 2, -below, str(below), [below]])
        else:
            value[key] = junk(rng)
        return f"{where} = {str(value[key])[:60]!r}"


def json_of(name: str) -> Mutation:
    """Spoils one or two places of a JSON file."""

    def mutate(folder: Path, rng: random.Random) -> str:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        done = [spoil(value, rng) for _ in range(rng.choice([1, 1, 2]))]
        write_json(folder / name, value)
        return f"{name}: {', '.join(done)}"

    return mutate


def text_of(*names: str) -> Mutation:
    """Spoils the text of a file: cut, bytes flipped, nested, not UTF-8, not an object."""

    def mutate(folder: Path, rng: random.Random) -> str:
        name = rng.choice([n for n in names if (folder / n).exists()])
        data = (folder / name).read_bytes()
        kind = rng.choice(["cut", "flip", "flip", "bom", "nested", "other", "twice", "latin"])
        if kind == "cut":
            data = data[: rng.randrange(len(data))]
        elif kind == "flip":
            some = bytearray(data)
            for _ in range(rng.choice([1, 3, 30])):
                some[rng.randrange(len(some))] = rng.randrange(256)
            data = bytes(some)
        else:
            data = {
                "bom": b"\xef\xbb\xbf" + data,
                "nested": b"[" * 200_000,
                "other": rng.choice([b"null", b"3", b"[]", b'"x"', b"{}", b"", b" "]),
                "twice": data + data,
                "latin": data + b"\xff\xfe\xe9",
            }[kind]
        (folder / name).write_bytes(data)
        return f"{name}: {kind}"

    return mutate
