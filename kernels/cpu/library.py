"""The shared object of the C kernels: where it is, which instructions it uses, how it is called.

`QMOE_CPU_KERNELS` chooses an instruction set by name (avx512vnni, avxvnni, avx2, neon, scalar), or
`off`: torch's own ops compute then, as where the package was installed without a compiler.
"""

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from qmoe.errors import ConfigError
from qmoe.system.printing import say

VARIABLE = "QMOE_CPU_KERNELS"
OFF = "off"
NAMES = ("avx512vnni", "avxvnni", "avx2", "neon", "scalar")
_I, _P = ctypes.c_int64, ctypes.c_void_p


class StackStruct(ctypes.Structure):
    """`Stack` of csrc/qmoe_cpu.h."""

    _fields_ = [
        ("buffer", _P), ("matrices", _P), ("bias", _P), ("experts", _I), ("n", _I), ("k", _I),
        ("piece", _I), ("paired", _I), ("scale_type", _I), ("offset", _I),
    ]  # fmt: skip


class SourceStruct(ctypes.Structure):
    """`Source` of csrc/qmoe_cpu.h."""

    _fields_ = [("codes", _P), ("scales", _P), ("zeros", _P), ("stride", _I), ("dense", _I)]


class CallStruct(ctypes.Structure):
    """`Call` of csrc/qmoe_cpu.h."""

    _fields_ = [
        ("x", _P), ("out", _P), ("ids", _P), ("gates", _P), ("tokens", _I), ("choices", _I),
        ("only", _I), ("type", _I), ("activation", _I), ("exact", _I), ("threads", _I),
        ("alpha", ctypes.c_float), ("limit", ctypes.c_float),
        ("first", StackStruct), ("second", StackStruct),
    ]  # fmt: skip


class NormStruct(ctypes.Structure):
    """`Norm` of csrc/qmoe_cpu.h."""

    _fields_ = [
        ("x", _P), ("weight", _P), ("out", _P), ("rows", _I), ("width", _I), ("type", _I),
        ("weight_type", _I), ("early", _I), ("threads", _I), ("epsilon", ctypes.c_float),
        ("shift", ctypes.c_float),
    ]  # fmt: skip


class AttentionStruct(ctypes.Structure):
    """`Attention` of csrc/qmoe_cpu.h."""

    _fields_ = [
        ("q", _P), ("k", _P), ("v", _P), ("mask", _P), ("out", _P), ("batch", _I), ("heads", _I),
        ("key_heads", _I), ("queries", _I), ("keys", _I), ("width", _I), ("value_width", _I),
        ("type", _I), ("causal", _I), ("threads", _I), ("q_stride", _I * 3), ("k_stride", _I * 3),
        ("v_stride", _I * 3), ("mask_stride", _I * 4), ("scale", ctypes.c_float),
    ]  # fmt: skip


class RouterStruct(ctypes.Structure):
    """`Router` of csrc/qmoe_cpu.h."""

    _fields_ = [
        ("x", _P), ("weight", _P), ("bias", _P), ("logits", _P), ("scores", _P), ("ids", _P),
        ("tokens", _I), ("experts", _I), ("width", _I), ("choices", _I), ("type", _I),
        ("score_type", _I), ("normed", _I), ("threads", _I),
    ]  # fmt: skip


class TurnStruct(ctypes.Structure):
    """`Turn` of csrc/qmoe_cpu.h."""

    _fields_ = [
        ("x", _P), ("cos", _P), ("sin", _P), ("weight", _P), ("tokens", _I), ("positions", _I),
        ("heads", _I), ("width", _I), ("turned", _I), ("type", _I), ("weight_type", _I),
        ("early", _I), ("epsilon", ctypes.c_float), ("shift", ctypes.c_float),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The shared object with its functions declared, or None if this installation has none."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        return None
    lib = ctypes.CDLL(str(found[0]))
    lib.qmoe_run.argtypes = [ctypes.c_int, ctypes.POINTER(CallStruct)]
    lib.qmoe_run_side_by_side.argtypes = [ctypes.c_int, ctypes.POINTER(CallStruct), ctypes.c_int]
    lib.qmoe_turn.argtypes = [ctypes.c_int, ctypes.POINTER(TurnStruct), ctypes.c_int, _I]
    lib.qmoe_turn.restype = None
    lib.qmoe_decode.argtypes = [ctypes.c_int, _P, _P]
    lib.qmoe_pack.argtypes = [ctypes.POINTER(StackStruct), ctypes.POINTER(SourceStruct), _I]
    lib.qmoe_pack.restype = None
    lib.qmoe_norm.argtypes = [ctypes.c_int, ctypes.POINTER(NormStruct)]
    lib.qmoe_norm.restype = None
    lib.qmoe_attend.argtypes = [ctypes.c_int, ctypes.POINTER(AttentionStruct)]
    lib.qmoe_route.argtypes = [ctypes.c_int, ctypes.POINTER(RouterStruct)]
    lib.qmoe_find_tier.argtypes = [ctypes.c_char_p]
    lib.qmoe_tier_name.restype = ctypes.c_char_p
    lib.qmoe_use_openmp.argtypes = [_P]
    lib.qmoe_use_openmp(_openmp())
    return lib


def _openmp() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded: its threads are
    used, so that a process has one set of them."""
    import torch  # noqa: F401  (loads it)

    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, _P).value
    except AttributeError:
        return None


@cache
def tier() -> int | None:
    """The instruction set in use, as the library counts them; None if torch's own ops compute: the
    library is not there, this machine has no fast tier, or `QMOE_CPU_KERNELS` is `off`.

    Raises ConfigError if the variable names a tier that there is not or that this machine lacks.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen not in ("", OFF, *NAMES):
        raise ConfigError(f"{VARIABLE}={chosen!r}: expected {OFF} or one of {', '.join(NAMES)}")
    if chosen == OFF:
        return None
    lib = library()
    if lib is None:
        if chosen:
            raise ConfigError(
                f"{VARIABLE}={chosen}: this installation has no CPU kernels; install qmoe again "
                "on a machine with a C compiler, or unset the variable"
            )
        say(
            "warning: this installation of qmoe has no CPU kernels (they need a C compiler when it "
            "is installed), so torch's own, slower operations run"
        )
        return None
    number = int(lib.qmoe_find_tier(chosen.encode() if chosen else None))
    if number < 0:
        raise ConfigError(f"{VARIABLE}={chosen}: this processor cannot run {chosen} instructions")
    name = lib.qmoe_tier_name(number).decode()
    # Scalar code is there to define the others; torch's ops are faster.
    return number if chosen or name != "scalar" else None


def tier_name() -> str | None:
    """The name of the instruction set in use, None if torch's own ops compute."""
    number, lib = tier(), library()
    return None if number is None or lib is None else lib.qmoe_tier_name(number).decode()


def run(number: int, call: CallStruct) -> None:
    """One call; other Python threads run meanwhile. Raises MemoryError."""
    lib = library()
    assert lib is not None
    if lib.qmoe_run(number, call):
        raise MemoryError("the CPU kernels could not allocate their buffers")


def run_side_by_side(number: int, calls: Sequence[CallStruct]) -> None:
    """Calls with the same x and a first product alone, as one. Raises MemoryError."""
    lib = library()
    assert lib is not None
    if lib.qmoe_run_side_by_side(number, (CallStruct * len(calls))(*calls), len(calls)):
        raise MemoryError("the CPU kernels could not allocate their buffers")


def turn(number: int, turns: Sequence[TurnStruct], threads: int) -> None:
    """The heads of the same tokens normalised and rotated, in place."""
    lib = library()
    assert lib is not None
    lib.qmoe_turn(number, (TurnStruct * len(turns))(*turns), len(turns), threads)


def attend(number: int, attention: AttentionStruct) -> None:
    """One attention. Raises MemoryError."""
    lib = library()
    assert lib is not None
    if lib.qmoe_attend(number, attention):
        raise MemoryError("the CPU kernels could not allocate their buffers")


def norm(number: int, call: NormStruct) -> None:
    """The norms of all rows of one tensor."""
    lib = library()
    assert lib is not None
    lib.qmoe_norm(number, call)


def route(number: int, router: RouterStruct) -> None:
    """The choices of a layer's router. Raises MemoryError."""
    lib = library()
    assert lib is not None
    if lib.qmoe_route(number, router):
        raise MemoryError("the CPU kernels could not allocate their buffers")


def write(stack: StackStruct, sources: list[SourceStruct], threads: int) -> None:
    """Every matrix of a stack into its buffer, from one source each."""
    lib = library()
    assert lib is not None
    lib.qmoe_pack(stack, (SourceStruct * len(sources))(*sources), threads)
