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
from qmoe.format.exl3 import LENGTH, SIDE, Codebook, codebook_values, tile_order
from qmoe.kernels.cpu.library import library

_I, _P = ctypes.c_int64, ctypes.c_void_p


class _Encoding(ctypes.Structure):
    """`Encoding` of csrc/trellis.h."""

    _fields_ = [
        ("wanted", _P), ("values", _P), ("states", _P), ("errors", _P), ("shape", _P),
        ("tiles", _I), ("twice", _I), ("beam", _I), ("threads", _I), ("alike", _I),
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
    metric: Float[Tensor, "S 16 16"] | None = None,
) -> tuple[Int[Tensor, "*any 256"], Float[Tensor, "*any"]]:
    """States whose values are near to `wanted`, in the order of the ring, and the error of every
    tile: the sum over its columns of e' D e, or of squares. The same for every number of threads.

    rate: bits a weight. tier: an instruction set by name; None takes the best. metric: D, positive
    definite, of S equal shares of the tiles one behind the other; a beam of 0 knows none. Raises
    ConfigError: see `check_encoder`; MemoryError.
    """
    lib, flat = _encoder(), wanted.float().reshape(-1, LENGTH).contiguous()
    number = lib.qmoe_find_tier(None if tier is None else tier.encode())
    assert number >= 0, f"this machine cannot run {tier}"
    states = torch.empty(flat.shape, dtype=torch.int16)
    errors, values = torch.empty(len(flat)), codebook_values(codebook)
    assert metric is None or (beam and len(flat) % len(metric) == 0)
    shape = None if metric is None else _shape(metric)
    call = _Encoding(
        flat.data_ptr(), values.data_ptr(), states.data_ptr(), errors.data_ptr(),
        None if shape is None else shape.data_ptr(), len(flat), int(2 * rate), beam,
        torch.get_num_threads(), 1 if metric is None else len(flat) // len(metric),
    )  # fmt: skip
    if lib.qmoe_encode_trellis(number, call):
        raise MemoryError("the search for codes could not allocate its buffers")
    whole = (states.int() & 0xFFFF).view(wanted.shape)
    return whole, errors.view(wanted.shape[:-1])


def _shape(metric: Float[Tensor, "S 16 16"]) -> Float[Tensor, "S 17 16"]:
    """U, unit upper, without its diagonal, then w, where e' D e is the sum over the ring's visits i
    of a column of w_i ((e U)_i)^2."""
    # The first column's places in its first 32 positions: four, then four of another column.
    visits = tile_order()[: 2 * SIDE].view(-1, 2, 4)[:, 0].flatten() // SIDE
    D = metric[:, visits][:, :, visits].double()
    L = torch.linalg.cholesky(D.flip(1, 2)).flip(1, 2)  # upper: L L' is D
    size = L.diagonal(dim1=1, dim2=2)
    unit = L / size[:, None] - torch.eye(SIDE, dtype=L.dtype)
    return torch.cat([unit, size.square()[:, None]], dim=1).float().contiguous()
