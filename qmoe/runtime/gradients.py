"""Gradients through packed weights, for adapters that are trained beside them.

Packed weights have no gradient; the inputs of their products do. A matrix is expanded for the
forward product and again for the backward one, so that nothing of it stays in memory between them.
Activations are taken as they are. What adapters of PEFT add to a stack of experts
(`target_parameters`) is added as the product of their two thin factors.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qmoe.errors import ConfigError
from qmoe.model import experts
from qmoe.system.host_memory import return_freed

Expand = Callable[[int], Tensor]
HOLES = 1 << 25  # bytes of expanded matrices after which freed memory is given back


def needs_gradient(*inputs: Tensor) -> bool:
    """Whether what is computed from these will be differentiated."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


class _Product(torch.autograd.Function):
    """x [M, K] times the transpose of matrix e [N, K]."""

    expanded = 0  # bytes, since freed memory was last given back

    @staticmethod
    def forward(ctx: Any, x: Tensor, expand: Expand, e: int) -> Tensor:
        ctx.expand, ctx.e = expand, e
        return x @ _Product.matrix(expand, e, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ _Product.matrix(ctx.expand, ctx.e, grad.dtype), None, None

    @classmethod
    def matrix(cls, expand: Expand, e: int, dtype: torch.dtype) -> Tensor:
        """A matrix to multiply with. On a CPU, what is freed of the ones before it leaves holes
        between activations that stay, into which the next one may not fit. Unless the holes are
        given back, a step takes as much memory as the weights in 16 bits."""
        if cls.expanded > HOLES and not torch.compiler.is_compiling():
            cls.expanded = 0
            return_freed()
        matrix = expand(e).to(dtype)
        if matrix.device.type == "cpu":
            cls.expanded += matrix.nbytes
        return matrix


def product(x: Float[Tensor, "M K"], expand: Expand, e: int) -> Float[Tensor, "M N"]:
    """x times the transpose of the matrix that `expand(e)` gives, differentiable in x."""
    y: Tensor = _Product.apply(x, expand, e)  # type: ignore[no-untyped-call]
    return y


def declared_stacks(module: Any) -> dict[str, Any]:
    """What is declared of an experts module's stacks, by name: of integers, or of EXL3's codes."""
    stored: dict[str, Any] | None = getattr(module, "_qmoe_stored", None)
    return module._qmoe_coded if stored is None else stored


class ExpandedStack:
    """One stack of an experts module as `moe_forward` takes it: a matrix is expanded when it is
    multiplied with, and an adapter's part is added."""

    def __init__(self, module: Any, weight: str, expand: Expand):
        """weight: the name of the stack in the module, for which expand(e) gives matrix e."""
        self.shape, self.expand = declared_stacks(module)[weight].shape, expand
        self.module, self.weight = module, weight

    def matmul(self, x: Float[Tensor, "M K"], e: int) -> Float[Tensor, "M N"]:
        y = product(x, self.expand, e)
        for part in _adapters(self.module, self.weight):
            y = y + self._adapted(part, x, e)
        return y

    def _adapted(self, part: Any, x: Tensor, e: int) -> Tensor:
        """x times what one adapter adds to matrix e; its rows come in the family's order."""
        transposed = self.module.is_transposed
        if hasattr(part, "lhs"):  # scaling * lhs[e] @ rhs[e], in the layout of the parameter
            first, second = part.lhs[e].to(x.dtype), part.rhs[e].to(x.dtype)
            y = (x @ first) @ second if transposed else (x @ second.T) @ first.T
            y = y * part.scaling
        else:
            whole = part.delta_weight[e].to(x.dtype)
            y = x @ whole if transposed else x @ whole.T
        return experts.stack_order(self.module, self.weight, y)


def _adapters(module: Any, weight: str) -> list[Any]:
    """What PEFT has put on a stack for this forward pass, each with `lhs`, `rhs` and `scaling`, or
    with a `delta_weight` where there are several adapters."""
    placed = getattr(module, "parametrizations", {})
    parts: list[Any] = list(placed[weight]) if weight in placed else []
    for part in parts:
        if not (hasattr(part, "lhs") or hasattr(part, "delta_weight")):
            raise ConfigError(
                f"{weight}: packed experts take adapters of PEFT's LoRA only, found "
                f"{type(part).__name__}"
            )
    return parts


def is_adapted(module: Any) -> bool:
    """Whether an adapter is active on the stacks of an experts module."""
    if "parametrizations" not in module._modules:
        return False
    return any(_adapters(module, weight) for weight in declared_stacks(module))


def expanding(stacks: list[Any], i: int) -> Expand:
    """What gives matrix i (first, second) of an expert. stacks: of `packed_experts`."""
    if len(stacks) > 1:
        return stacks[i].expand  # type: ignore[no-any-return]
    (arena,) = stacks
    if not hasattr(arena, "expand"):
        raise ConfigError(
            "expert_memory, plan: adapters and gradients need all experts in one memory; load the "
            "model without these"
        )
    return lambda e: arena.expand(e, i)


class _Unchangeable(Tensor):
    """A weight that is not there to be written to."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Any:
        return Tensor.detach(self).as_subclass(_Unchangeable)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.numel() and any(value.stride()):
            raise _no_merge()
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of any tensor; one zero that stands for many is moved or cast as one."""
        if self.numel() > 1 and not any(self.stride()):
            one = self.as_subclass(Tensor)[(0,) * self.dim()]
            return one.to(*args, **kwargs).expand(self.shape)
        return super().to(*args, **kwargs)

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
        raise _no_merge()

    __isub__ = __imul__ = __itruediv__ = __iadd__


def _no_merge() -> ConfigError:
    return ConfigError(
        "merge: packed weights cannot take in an adapter or be initialized anew; keep the adapter "
        "beside the model, or merge it into the original model (peft: merge_and_unload) and "
        "quantize the result"
    )


def unchangeable(weight: Tensor) -> Tensor:
    """An expanded weight that refuses to be merged with: what is written to it would be lost."""
    return weight.as_subclass(_Unchangeable)


class Placeholder(nn.Parameter, _Unchangeable):
    """Stands where an experts module of this family has its weights, so that PEFT's
    `target_parameters` finds a parameter of the right shape. One zero; takes no memory."""

    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        zero = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return Tensor._make_subclass(cls, zero, False)

    def __deepcopy__(self, memo: Any) -> "Placeholder":
        return self  # it holds nothing that could change

    def element_size(self) -> int:
        return 0

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return 0


def add_placeholders(model: nn.Module) -> None:
    """Give every packed experts module of a loaded model its placeholders."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        for weight, shape in getattr(module, "_qmoe_family_shapes", {}).items():
            dtype = module._qmoe_stored[weight].dtype
            device = next(module.buffers()).device
            module.register_parameter(weight, Placeholder(shape, dtype, device))
