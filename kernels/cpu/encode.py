"""The search for EXL3's codes in C (csrc/trellis*.c): tiles of 256 values to states of their ring.

The M-algorithm: at each position of the ring about `beam` of the best ways so far go on, and each
is continued by every symbol. The ring is closed by the state at its seam, which a search around the
seam finds first. With a beam of 0 all states are searched (Viterbi's algorithm).
"""

import ctypes
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.errors import ConfigError
from qmoe.format.exl3 import LENGTH, Codebook, codebook_values
from qmoe.kernels.cpu.library import library

_I, _P = ctypes.c_int64, ctypes.c_void_p


class _Encoding(ctypes.Structure):
    """`Encoding` of csrc/trellis.h."""

    _fields_ = [
        ("wanted", _P), ("values", _P), ("states", _P), ("errors", _P),
        ("tiles", _I), ("twice", _I), ("beam", _I), ("threads", _I),
    ]  # fmt: skip


@cache
def _encoder() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise ConfigError(
            "format: EXL3's codes are searched by kernels in C, which this installation does not "
            "have; install qmoe again on a machine with a C compiler"
        )
    lib.qmoe_encode_trellis.argtypes = [ctypes.c_int, ctypes.POINTER(_Encoding)]
    return lib


def check_encoder() -> None:
    """Raises ConfigError if this installation cannot search codes."""
    _encoder()


def encode(
    wanted: Float[Tensor, "*any 256"],
    rate: float,
    codebook: Codebook,
    beam: int,
    tier: str | None = None,
) -> tuple[Int[Tensor, "*any 256"], Float[Tensor, "*any"]]:
    """States whose values are near to `wanted`, in the order of the ring, and the sum of squared
    errors of every tile. The same for every number of threads.

    rate: bits a weight. tier: an instruction set by name; None takes the best. Raises ConfigError:
    see `check_encoder`; MemoryError.
    """
    lib, flat = _encoder(), wanted.float().reshape(-1, LENGTH).contiguous()
    number = lib.qmoe_find_tier(None if tier is None else tier.encode())
    assert number >= 0, f"this machine cannot run {tier}"
    states = torch.empty(flat.shape, dtype=torch.int16)
    errors, values = torch.empty(len(flat)), codebook_values(codebook)
    call = _Encoding(
        flat.data_ptr(), values.data_ptr(), states.data_ptr(), errors.data_ptr(),
        len(flat), int(2 * rate), beam, torch.get_num_threads(),
    )  # fmt: skip
    if lib.qmoe_encode_trellis(number, call):
        raise MemoryError("the search for codes could not allocate its buffers")
    whole = (states.int() & 0xFFFF).view(wanted.shape)
    return whole, errors.view(wanted.shape[:-1])
