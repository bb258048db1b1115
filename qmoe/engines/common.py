"""What several engines look at. Each function gives what breaks a rule: a name, and what was
found there."""

import math
from collections.abc import Callable, Collection

from qmoe.engines.contents import DOWN, Contents, Matrix
from qmoe.engines.rule import Breaches, Setup

Broken = Callable[[Contents, Setup], Breaches]


def method(contents: Contents, setup: Setup) -> Breaches:
    """The folder's method is compressed-tensors."""
    if contents.method != "compressed-tensors":
        yield "quant_method", f"the weights are in {contents.method!r}"


def packed(contents: Contents, setup: Setup) -> Breaches:
    """Every group's format is pack-quantized."""
    for i, name in enumerate(contents.formats):
        if name != "pack-quantized":
            yield f"config_groups.group_{i}.format", f"the format is {name!r}"


def one_packed(contents: Contents, setup: Setup) -> Breaches:
    """So is the folder's own format."""
    if contents.format != "pack-quantized":
        yield "quantization_config.format", f"the format is {contents.format!r}"
    yield from packed(contents, setup)


def one_form(contents: Contents, setup: Setup) -> Breaches:
    """All matrices of a layer's routed experts have one form."""
    for matrices in contents.layers().values():
        first = matrices[0]
        for matrix in matrices:
            if matrix.form != first.form:
                yield matrix.name, f"it has {matrix.form}, and {first.name} has {first.form}"
                break


def joined_alike(contents: Contents, setup: Setup) -> Breaches:
    """Linears that the engine puts into one have one form, or are all unquantized."""
    for matrices, unpacked in contents.joined():
        first = matrices[0]
        for matrix in matrices[1:]:
            if matrix.form != first.form:
                yield matrix.name, f"it has {matrix.form}, and {first.name} has {first.form}"
        if unpacked:
            yield unpacked[0], f"it is not quantized, and {first.name} has {first.form}"


def bits(allowed: Collection[int]) -> Broken:
    """Integers have one of these widths."""

    def broken(contents: Contents, setup: Setup) -> Breaches:
        for matrix in contents.matrices:
            if matrix.form.bits not in allowed:
                yield matrix.name, f"it has {matrix.form.bits} bits"

    return broken


def heads(contents: Contents, setup: Setup) -> Breaches:
    """Devices divide the heads, or hold whole copies of key and value heads."""
    query, kv = contents.text("num_attention_heads"), contents.text("num_key_value_heads")
    if isinstance(query, int) and query % setup.tp:
        yield "num_attention_heads", f"{query} heads are not divided by {setup.tp} devices"
    if isinstance(kv, int) and kv % setup.tp and setup.tp % kv:
        yield (
            "num_key_value_heads",
            f"{kv} key and value heads go into {setup.tp} devices neither way",
        )


def experts_in_groups(contents: Contents, setup: Setup) -> Breaches:
    """Groups divide the hidden size, and each device's share of the experts' inner size."""
    for matrices in contents.layers().values():
        for matrix in matrices:
            if matrix.last in DOWN and matrix.inputs % setup.tp:
                yield (
                    matrix.name,
                    f"its {matrix.inputs} inputs are not divided by {setup.tp} devices",
                )
                break
            _, k = matrix.share(setup.tp)
            if matrix.form.group != -1 and k % matrix.form.group:
                yield (
                    matrix.name,
                    f"a device has {k} inputs, and its groups are of {matrix.form.group}",
                )
                break


def linears_in_groups(contents: Contents, setup: Setup) -> Breaches:
    """Groups divide each device's share of a linear's inputs."""
    for matrix in contents.linears():
        n, k = matrix.share(setup.tp)
        whole = (n, k) == (matrix.outputs, matrix.inputs)
        if not whole and n * k * setup.tp != matrix.outputs * matrix.inputs:
            yield (
                matrix.name,
                f"{matrix.outputs} x {matrix.inputs} is not divided by {setup.tp} devices",
            )
        elif matrix.form.group != -1 and k % matrix.form.group:
            yield matrix.name, f"a device has {k} inputs, and its groups are of {matrix.form.group}"


def named(families: dict[str, tuple[str, ...]], engine: str) -> Broken:
    """The engine knows the family, and calls its experts' matrices as they are called here."""

    def broken(contents: Contents, setup: Setup) -> Breaches:
        names = families.get(contents.model_type)
        if names is None:
            yield "model_type", f"{contents.model_type} is not among the families that were read"
            return
        for matrices in contents.layers().values():
            for matrix in matrices:
                if matrix.last not in names:
                    yield (
                        matrix.name,
                        f"{engine} looks for {' and '.join(names) or 'no expert alone'}",
                    )
                    break

    return broken


def inner(contents: Contents, setup: Setup) -> list[tuple[Matrix, int, int]]:
    """Of each experts module: its first down matrix, the hidden size, and a device's share of the
    inner size."""
    found = []
    for matrices in contents.layers().values():
        down = next((m for m in matrices if m.last in DOWN), None)
        if down is not None:
            found.append((down, down.outputs, math.ceil(down.inputs / setup.tp)))
    return found
