"""Collecting a layer's statistics while the model's own forward runs through it.

Routed experts: one function registered with transformers' experts interface, so routed tokens and
routing weights arrive for free and no router is re-implemented. Dense linears: forward hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qmoe.calibration.stats import LayerStats, LinearStats
from qmoe.model import experts
from qmoe.model.hooks import hooked
from qmoe.system.devices import CPU

NAME = "qmoe_collect"


# Is shown what an experts module is given before it computes: its name, hidden states [T, H], the
# chosen experts [T, A] and their routing weights [T, A]. A tensor that it returns is the output.
See = Callable[[str, Tensor, Tensor, Tensor], Tensor | None]


def experts_forward(
    self: Any,
    hidden_states: Float[Tensor, "T H"],
    top_k_index: Int[Tensor, "T A"],
    top_k_weights: Float[Tensor, "T A"],
) -> Float[Tensor, "T H"]:
    """Run plain experts one by one."""
    first, second = experts.expert_weights(self)
    out = torch.zeros_like(hidden_states)
    for e in top_k_index.unique().tolist():
        if e >= self.num_experts:  # a sentinel: this assignment goes to no expert
            continue
        token, slot = torch.where(top_k_index == e)
        x, routing_weight = hidden_states[token], top_k_weights[token, slot]
        mid = experts.activation(self, experts.product(self, first, e, x))
        y = experts.after(self, experts.product(self, second, e, mid))
        out.index_add_(0, token, (y * routing_weight[:, None]).to(out.dtype))
    return out


@contextmanager
def collecting_experts(modules: dict[str, Any], see: See | None = None) -> Iterator[None]:
    """Route these experts modules, by name, through `experts_forward`; restored on exit.

    The switch is a field of the config each instance holds, so set there it cannot be ignored, as
    `set_experts_implementation` silently is for classes transformers does not recognize.
    """
    names = {id(module): name for name, module in modules.items()}

    def forward(self: Any, x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
        out = None if see is None else see(names[id(self)], x, ids, routing_weights)
        return experts_forward(self, x, ids, routing_weights) if out is None else out

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    configs = {id(m.config): m.config for m in modules.values()}.values()
    before = [(config, config._experts_implementation) for config in configs]
    for config in configs:
        config._experts_implementation = NAME
    try:
        yield
    finally:
        for config, name in before:
            config._experts_implementation = name


@contextmanager
def sampling_tokens(
    lists: dict[str, list[nn.Module]], stride: int, into: dict[str, Tensor]
) -> Iterator[None]:
    """Of lists of experts that are modules: every stride-th token that any of them is given.
    Nothing of lists whose experts are not called with one tensor alone."""
    taken: dict[str, list[Tensor]] = {name: [] for name in lists}
    seen = dict.fromkeys(lists, 0)
    odd: set[str] = set()

    def hook(name: str) -> Any:
        def sample(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if named or len(args) != 1:
                odd.add(name)
                return
            x = args[0].reshape(-1, args[0].shape[-1])
            # Counted over all calls, so that short ones do not give their first token each.
            taken[name].append(x[-seen[name] % stride :: stride].to(CPU, torch.float32, copy=True))
            seen[name] += len(x)

        return sample

    hooks = [(module, hook(name)) for name, modules in lists.items() for module in modules]
    with hooked(hooks, with_kwargs=True):
        yield
    into.update({n: torch.cat(parts) for n, parts in taken.items() if parts and n not in odd})


@contextmanager
def collecting_linears(
    linears: dict[str, nn.Module], into: LayerStats, dtype: torch.dtype = torch.float32
) -> Iterator[None]:
    """Sum over the inputs of these linears; those given the very same tensor share one Hessian.
    dtype: that of the sums while they grow."""
    last: list[tuple[Tensor, LinearStats]] = []

    def hook(name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            known = into.linears.get(name)
            if last and last[0][0] is x and (known is None or known is last[0][1]):
                into.linears[name] = last[0][1]
                return
            stats = into.linears.setdefault(name, LinearStats.empty(x.shape[-1], dtype))
            stats.add(x.reshape(-1, x.shape[-1]))
            # Holding the tensor keeps its identity from being reused.
            last[:] = [(x, stats)]

        return collect

    with hooked((module, hook(name)) for name, module in linears.items()):
        yield
