"""Experts classes of transformers that lack its experts interface, given it: one function each.

`adapt` leaves a module's weights and names alone; it adds the attributes that tell the layout and
sends the forward to whichever experts function the config names, as the decorator does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


def adapt(model: Any) -> None:
    """Give every experts module of a class known here the experts interface."""
    for module in model.modules():
        adapter = ADAPTERS.get(type(module).__name__)
        if adapter is not None:
            module.config = model.config.get_text_config()
            adapter(module)


def _declare(module: Any, transposed: bool = False) -> None:
    module.is_transposed, module.is_concatenated = transposed, True
    module.has_gate, module.has_bias, module.has_post_expert_norm = True, False, False
    if not hasattr(module, "_apply_gate"):
        module._apply_gate = lambda product: _gate(module, product)


def _gate(module: Any, product: Tensor) -> Tensor:
    gate, up = product.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[no-any-return]


def _ours(module: Any) -> Callable[..., Tensor] | None:
    """The experts function of qmoe that the module's config names, if any."""
    name = getattr(module.config, "_experts_implementation", None) or ""
    return ALL_EXPERTS_FUNCTIONS[name] if name.startswith("qmoe_") else None


def _step3p7(module: Any) -> None:
    """The interface in all but name."""
    _declare(module)
    original = module.forward

    def forward(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        run = _ours(module)
        return original(x, ids, gates) if run is None else run(module, x, ids, gates)

    module.forward = forward


def _longcat_flash(module: Any) -> None:
    """Ids beyond the routed experts are identity experts: the token itself, weighted. The first
    stack has rows for them that nothing reads."""
    _declare(module)
    module.num_experts, module.router_outputs = module.num_routed_experts, module.total_experts
    original = module.forward

    def forward(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        run = _ours(module)
        if run is None:
            return original(x, ids, gates)  # type: ignore[no-any-return]
        itself = torch.where(ids >= module.num_experts, gates, 0).sum(-1, keepdim=True)
        y = run(module, x, ids.clamp(max=module.num_experts), gates)
        return (y + x * itself).to(x.dtype)

    module.forward = forward


def _llama4(module: Any) -> None:
    """Every expert is handed every token, times its gate, which is zero where it was not chosen."""
    _declare(module, transposed=True)
    original = module.forward

    def forward(scaled: Tensor) -> Tensor:
        run = _ours(module)
        if run is None:
            return original(scaled)  # type: ignore[no-any-return]
        row = (scaled != 0).any(-1).nonzero()[:, 0]
        expert = row // (len(scaled) // module.num_experts)
        gates = torch.ones(len(row), 1, dtype=scaled.dtype, device=scaled.device)
        y = torch.zeros_like(scaled)
        y[row] = run(module, scaled[row], expert[:, None], gates)
        return y

    module.forward = forward


ADAPTERS: dict[str, Callable[[Any], None]] = {
    "Step3p7Experts": _step3p7,
    "LongcatFlashExperts": _longcat_flash,
    "Llama4TextExperts": _llama4,
}


def loose_experts(module: nn.Module) -> bool:
    """Whether a module is a list of small MLPs, one per expert, as older families and code that
    comes with a model have them: at least two children of one class, of linears and nothing else
    with weights."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    children = [module.get_submodule(name) for name in each_expert(module)]
    if len(children) < 2 or len({type(child) for child in children}) > 1:
        return False
    return all(len(linears_of(child)) > 1 and _only_linears(child) for child in children)


def each_expert(container: nn.Module) -> list[str]:
    """Names of the children of a list of experts that have weights."""
    children = container.named_children()
    return [n for n, child in children if next(child.parameters(), None) is not None]


def linears_of(module: nn.Module) -> list[str]:
    """Names of the linears inside, in module order."""
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def _only_linears(module: nn.Module) -> bool:
    return all(
        isinstance(part, nn.Linear) or next(part.parameters(recurse=False), None) is None
        for part in module.modules()
    )
