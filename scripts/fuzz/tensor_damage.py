"""Damage to safetensors files: their headers, and well-formed ones with wrong tensors."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fuzz.json_damage import INDEX, junk, write_json


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def header_bytes(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards(folder))
    data = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", bytes(data[:8]))[0]
    kind = rng.choice(["length", "flip", "flip", "swap"])
    if kind == "length":
        value = rng.choice([0, 1, 2, 7, end - 9, end - 7, len(data), 2**31, 2**63, 2**64 - 1])
        data[:8] = struct.pack("<Q", value)
        return _wrote(path, data, f"header length {value}")
    for _ in range(rng.choice([1, 2, 8])):
        at = rng.randrange(8, end)
        data[at] = rng.randrange(256) if kind == "flip" else rng.choice(b'0123456789[]{},:"-.')
    return _wrote(path, data, f"header bytes, {kind}")


def _wrote(path: Path, data: bytes | bytearray, what: str) -> str:
    path.write_bytes(data)
    return f"{path.name}: {what}"


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "BOOL", "F8_E4M3",
          "F8_E5M2", "C64", "F4", "F6_E2M3", "X", "", 3, None, []]  # fmt: skip


def header_json(folder: Path, rng: random.Random) -> str:
    """A header that is JSON and lies."""
    path = rng.choice(shards(folder))
    header, data = read_header(path)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry, end = header[name], len(data)
    a, b = entry["data_offsets"]
    shape = list(entry["shape"])
    choice = rng.choice(["dtype", "shape", "shape", "offsets", "offsets", "name", "extra", "drop",
                         "metadata", "junk", "twice"])  # fmt: skip
    if choice == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif choice == "shape":
        entry["shape"] = rng.choice([shape[::-1], shape[:-1], [*shape, 1], [1, *shape], [], [0],
                                     [-1, *shape], [2**62, 4], [2**32, 2**32], [-2, -3], ["a"],
                                     [0.5], None, 7, [shape], [True], [2**64]])  # fmt: skip
    elif choice == "offsets":
        entry["data_offsets"] = rng.choice([
            [b, a], [a, b + 4], [a - 4, b], [0, end], [-1, 3], [a, 2**63], [2**64 - 4, 2**64], [a],
            [], "x", [a, a], [None, b], [a, b, b], [0, b - a], [0.0, 1.5],
        ])  # fmt: skip
    elif choice == "name":
        header[rng.choice(["../x", "/x", "", "a/../../b", "\x00", "x" * 70_000, f"{name}.x"])] = (
            header.pop(name)
        )
    elif choice == "extra":
        header[rng.choice(["../../x", "model.extra", f"{name}_packed", f"{name}_scale_inv"])] = {
            "dtype": "F32", "shape": [0], "data_offsets": [end, end]}  # fmt: skip
    elif choice == "drop":
        del header[name]
    elif choice == "metadata":
        header["__metadata__"] = rng.choice([3, {"a": 3}, {"format": "tf"}, [], None, {"a": {}}])
    elif choice == "junk":
        header[name] = rng.choice([junk(rng), header])
        header = rng.choice([header, [], 3, {}, {name: {}}]) if header[name] is not header else {}
    text = json.dumps(header).encode(errors="replace")
    if choice == "twice":
        text = text[:-1] + b', "%s": %s}' % (name.encode(), json.dumps(entry).encode())
    return _wrote(path, struct.pack("<Q", len(text)) + text + data, f"{choice} of {name}")


def tensor(folder: Path, rng: random.Random) -> str:
    """A well-formed file with a tensor that does not belong there."""
    path = rng.choice(shards(folder))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    t = tensors.pop(name)
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "transposed": lambda: t.mT.contiguous() if t.dim() > 1 else t[None],
        "twice as long": lambda: torch.cat([t, t]),
        "cut": lambda: t[: len(t) // 2].clone(),
        "thin": lambda: t[..., :1].clone(),
        "empty": lambda: t[:0].clone(),
        "a number": lambda: t.flatten()[0].clone(),
        "flat": lambda: t.flatten(),
        "deep": lambda: t[None, None].clone(),
        "huge values": lambda: torch.full_like(
            t, torch.finfo(t.dtype).max if t.is_floating_point() else 99
        ),
        "negative": lambda: (-1 - t.float().abs()).to(t.dtype),
        "zero": lambda: torch.zeros_like(t),
    }
    casts = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64,
             torch.int8, torch.uint8, torch.bool, torch.int16, torch.float8_e4m3fn,
             torch.complex64]  # fmt: skip
    kind = rng.choice([*forms, "cast", "cast", "cast", "NaN", "gone", "renamed"])
    if kind == "cast":
        dtype = rng.choice(casts)
        tensors[name], kind = t.to(dtype), f"as {dtype}"
    elif kind == "NaN":
        bad = t.float().flatten()
        bad[rng.randrange(len(bad))] = rng.choice([float("nan"), float("inf")])
        tensors[name] = bad.view(t.shape).to(t.dtype) if t.is_floating_point() else t + 1
    elif kind == "renamed":
        tensors[rng.choice(["a", "../../a", f"{name}s", name.replace("1", "7")])] = t
    elif kind != "gone":
        tensors[name] = forms[kind]()
    save_file(tensors, path, metadata={"format": "pt"})
    if rng.random() < 0.7:
        index(folder, tensors, path.name)
    return f"{path.name}: {name} {kind}"


def index(folder: Path, tensors: dict[str, torch.Tensor], file: str) -> None:
    """Make the index agree with what a shard now holds."""
    if (folder / INDEX).exists():
        value = json.loads((folder / INDEX).read_text())
        kept = {n: f for n, f in value["weight_map"].items() if f != file}
        value["weight_map"] = kept | dict.fromkeys(tensors, file)
        write_json(folder / INDEX, value)
