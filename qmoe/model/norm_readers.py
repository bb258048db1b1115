"""Who reads a norm's output: observed while modules run, not known per model.

A reader is every module with weights whose input is the norm's output. In an MoE that is the
router, all experts and the shared expert together: whatever scales or turns the norm's output must
be made up for in all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from qmoe.model.experts import expert_weights, is_experts, rows
from qmoe.model.hooks import hooked


@dataclass(frozen=True)
class NormReaders:
    """A norm and every module that reads its output, by name."""

    norm: str
    readers: list[str]


def with_weights(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The modules inside `module`, called `prefix`, that hold parameters themselves."""
    return {
        f"{prefix}.{n}".strip("."): m
        for n, m in module.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }


def find_norm_readers(modules: dict[str, nn.Module], run: Callable[[], Any]) -> list[NormReaders]:
    """Those of `modules` that are norms, and whose readers all take a scale per input feature."""
    wrote: dict[tuple[int, int], str] = {}
    read: dict[str, list[str]] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                writer = wrote.get((args[0].data_ptr(), args[0].numel()))
                if writer is not None:
                    read.setdefault(writer, []).append(name)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                alive.append(output)
                wrote[(output.data_ptr(), output.numel())] = name

        return hook

    with hooked(
        [(m, before(n)) for n, m in modules.items()], [(m, after(n)) for n, m in modules.items()]
    ):
        run()
    found = [NormReaders(norm, _innermost(readers)) for norm, readers in read.items()]
    return [norm for norm in found if _fits(modules, norm.norm, norm.readers)]


def origins_of(modules: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, str | None]:
    """Of every module that `run` calls, the one whose output, or a part of it, is its input."""
    wrote: dict[int, str] = {}
    origins: dict[str, str | None] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        origins[name] = None
        if args and isinstance(args[0], Tensor):
            origins[name] = wrote.get(args[0].untyped_storage().data_ptr())

    def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            alive.append(output)
            wrote[output.untyped_storage().data_ptr()] = name

    with hooked(
        [(m, partial(before, n)) for n, m in modules.items()],
        [(m, partial(after, n)) for n, m in modules.items()],
    ):
        run()
    return origins


def _innermost(readers: list[str]) -> list[str]:
    """Without those that hand it on to others of them, such as a mixer with vectors of its own."""
    return [r for r in readers if not any(other.startswith(f"{r}.") for other in readers)]


def _fits(modules: dict[str, nn.Module], norm: str, readers: list[str]) -> bool:
    """A norm has vectors only, and every reader one matrix with as many columns."""
    vectors = list(modules[norm].parameters(recurse=False))
    if any(v.dim() != 1 for v in vectors) or getattr(modules[norm], "weight", None) is None:
        return False
    weights = [columns(modules[r]) for r in readers]
    return all(w is not None and w.shape[-1] == len(vectors[0]) for w in weights)


def read_weight(module: nn.Module) -> str | None:
    """The parameter that multiplies a module's input, if its input features can be scaled."""
    if is_experts(module):
        return expert_weights(module)[0]
    matrices = [n for n, p in module.named_parameters(recurse=False) if p.dim() == 2]
    return matrices[0] if len(matrices) == 1 else None


def columns(module: nn.Module) -> Tensor | None:
    """That parameter [.., K], a view."""
    name = read_weight(module)
    if name is None:
        return None
    weight: Tensor = rows(module, name) if is_experts(module) else getattr(module, name)
    return weight
