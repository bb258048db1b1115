"""A device that is not there: its tensors say they are on it, and are computed on the CPU.

Code that forgets to move a tensor fails with it as it would with a GPU, "tensors on two devices";
code that does not forget gives the very numbers of the CPU.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
# As with a GPU: copies go from one to the other, and indices may be on the CPU.
BETWEEN = {
    aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default,
}  # fmt: skip
FACTORIES = ("empty.memory_format", "empty_strided")  # the others are made of these

operations: Counter[str] = Counter()  # that ran on it


class Pretended(Tensor):
    """`held` has the numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "Pretended":
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = real
        return made

    # Torch's own refuse subclasses, or answer 0.
    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


@cache
def device() -> torch.device:
    """The device, known to torch from the first call on."""
    _setup_privateuseone_for_python_backend(NAME)
    # torch.library.opcheck and autocast ask every device that torch knows for these.
    backend: Any = getattr(torch, NAME)
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    backend.get_rng_state = lambda *_: torch.zeros(8, dtype=torch.uint8)
    backend.set_rng_state = lambda *_: None
    for name in FACTORIES:
        base, _, overload = name.partition(".")
        op = getattr(getattr(aten, base), overload or "default")
        make = lambda *args, op=op, **kwargs: run(op, args, kwargs)  # noqa: E731
        torch.library.impl(f"aten::{name}", NAME)(make)
    torch.library.impl("aten::_copy_from", NAME)(_copy_from)
    return torch.device(NAME, 0)


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation that has to do with the device, on the real tensors."""
    given: list[Any] = []
    mapped(given.append, (args, kwargs))
    tensors = [t for t in given if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, Pretended)]
    foreign = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if ours and foreign and op not in BETWEEN:
        raise RuntimeError(f"{op}: tensors on two devices")
    target = kwargs.get("device")
    stays = target is None or torch.device(target).type == NAME
    kwargs = kwargs if target is None else kwargs | {"device": torch.device("cpu")}
    operations[op.name()] += 1
    result = op(*mapped(_real, args), **mapped(_real, kwargs))
    known = {id(t.held if isinstance(t, Pretended) else t): t for t in tensors}

    def pretend(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Pretended(value) if stays else value

    return mapped(pretend, result)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of all that lies in lists, tuples and dicts; torch's tree_map takes most of the
    time of a run on this device."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([mapped(function, part) for part in value])
    if kind is dict:
        return {key: mapped(function, part) for key, part in value.items()}
    return function(value)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `copy_` comes to where torch sees no subclass: numbers that are put into elements."""
    return _real(target).copy_(_real(source))


def _real(value: Any) -> Any:
    return value.held if isinstance(value, Pretended) else value
