"""Experts classes of transformers that lack its experts interface, given it: one function each.

An adapter adds the attributes that tell the layout and sends the forward to whichever experts
function the config names, as the decorator does. Where a class keeps its experts in tensors of
another form it also says what the usual ones are made of (`Made`): `adapt` replaces the parameters,
and the checkpoint is read as if the family stored the usual ones (`Checkpoint.show`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qmoe.checkpoint.decoding import Made


def adapt(model: Any) -> Made:
    """Give every experts module of a class known here the experts interface. Returns what its
    parameters are made of, by names in the whole model."""
    whole_model: Made = {}
    for name, module in list(model.named_modules()):
        adapter = ADAPTERS.get(type(module).__name__)
        if adapter is None:
            continue
        module.config = model.config.get_text_config()
        made = adapter(module) or {}
        tensors = {n: how(*map(module.get_parameter, parts)) for n, (parts, how) in made.items()}
        for target in {part for parts, _ in made.values() for part in parts}:
            owner, _, parameter = target.rpartition(".")
            delattr(module.get_submodule(owner), parameter)
        for target, tensor in tensors.items():
            owner, _, parameter = target.rpartition(".")
            held = nn.Parameter(tensor.detach(), requires_grad=False)
            module.get_submodule(owner).register_parameter(parameter, held)
        for target, (parts, how) in made.items():
            stored = tuple(f"{name}.{part}" for part in parts)
            whole_model[f"{name}.{target}"] = (stored, how)
    return whole_model


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

    def forward(x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
        run = _ours(module)
        return (
            original(x, ids, routing_weights)
            if run is None
            else run(module, x, ids, routing_weights)
        )

    module.forward = forward


def _longcat_flash(module: Any) -> None:
    """Ids beyond the routed experts are identity experts: the token itself, weighted. The first
    stack has rows for them that nothing reads."""
    _declare(module)
    module.num_experts, module.router_outputs = module.num_routed_experts, module.total_experts
    original = module.forward

    def forward(x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
        run = _ours(module)
        if run is None:
            return original(x, ids, routing_weights)  # type: ignore[no-any-return]
        itself = torch.where(ids >= module.num_experts, routing_weights, 0).sum(-1, keepdim=True)
        y = run(module, x, ids.clamp(max=module.num_experts), routing_weights)
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
        routing_weights = torch.ones(len(row), 1, dtype=scaled.dtype, device=scaled.device)
        y = torch.zeros_like(scaled)
        y[row] = run(module, scaled[row], expert[:, None], routing_weights)
        return y

    module.forward = forward


@contextmanager
def _lent(module: nn.Module, **tensors: Tensor) -> Iterator[None]:
    """Tensors that a family's own forward looks for where its parameters were."""
    for name, tensor in tensors.items():
        setattr(module, name, tensor.data)
    try:
        yield
    finally:
        for name in tensors:
            delattr(module, name)


def _dbrx(module: Any) -> Made:
    """gate, up and down of all experts one below the other: [E*I, H] each."""
    glu = module.mlp
    module.act_fn = glu.activation_fn
    _declare(module)
    split = partial(torch.unflatten, dim=0, sizes=(module.num_experts, module.ffn_hidden_size))
    original = module.forward

    def forward(x: Tensor, ids: Tensor, routing_weights: Tensor) -> Tensor:
        run = _ours(module)
        if run is not None:
            return run(module, x.reshape(-1, x.shape[-1]), ids, routing_weights).view(x.shape)
        gate, up = module.gate_up_proj.chunk(2, dim=1)
        with _lent(glu, w1=gate, v1=up, w2=module.down_proj.mT):
            y: Tensor = original(x, ids, routing_weights)
        return y

    module.forward = forward
    return {
        "gate_up_proj": (("mlp.w1", "mlp.v1"), lambda *both: torch.cat([*map(split, both)], 1)),
        "down_proj": (("mlp.w2",), lambda w2: split(w2).mT.contiguous()),
    }


def _jetmoe(module: Any) -> Made:
    """The block itself holds two stacks, and calls them with tokens sorted by expert."""
    module.experts = experts = nn.Module()
    held: Any = experts
    held.num_experts, held.act_fn = module.router.num_experts, module.activation
    held.config = module.config
    _declare(held)
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        run = _ours(held)
        if run is None:
            first = _lent(module.input_linear, weight=held.gate_up_proj)
            with first, _lent(module.output_linear, weight=held.down_proj):
                return original(x)  # type: ignore[no-any-return]
        tokens = x.reshape(-1, x.shape[-1])
        order, _, sorted_weights, sizes, _ = module.router(tokens)
        ids, routing_weights = torch.empty_like(order), torch.empty_like(sorted_weights)
        ids[order] = torch.arange(len(sizes), device=x.device).repeat_interleave(
            torch.tensor(sizes, device=x.device)
        )
        routing_weights[order] = sorted_weights
        y = run(held, tokens, ids.view(len(tokens), -1), routing_weights.view(len(tokens), -1))
        out: Tensor = (y + module.bias).view(x.shape)
        return out

    module.forward = forward
    return {
        "experts.gate_up_proj": (("input_linear.weight",), lambda weight: weight),
        "experts.down_proj": (("output_linear.weight",), lambda weight: weight),
    }


def _jetmoe_attention(module: Any) -> Made:
    """An expert is a query and an output projection, with attention between them: a list of modules
    of two linears each."""
    sizes = {"input_linear": (module.input_size, module.hidden_size)}
    sizes["output_linear"] = (module.hidden_size, module.input_size)
    module.experts = nn.ModuleList(
        nn.ModuleDict(
            {name: nn.Linear(*size, bias=False, device="meta") for name, size in sizes.items()}
        )
        for _ in range(module.num_experts)
    )

    def run(name: str, x: Tensor, counts: list[int]) -> Tensor:
        each = zip(module.experts, x.split(counts), strict=True)
        return torch.cat([expert[name](part) for expert, part in each])

    for name in sizes:
        getattr(module, name).forward = partial(run, name)
    return {
        f"experts.{e}.{name}.weight": ((f"{name}.weight",), itemgetter(e))
        for name in sizes
        for e in range(module.num_experts)
    }


def _doge(module: Any) -> None:
    """Thousands of experts of one vector in and one out, rows of two tables of which a token reads
    its own: no product with a matrix that could run packed."""
    reason = "an expert of this family is a pair of vectors that is looked up, not a matrix"
    module.qmoe_unquantized = {"router_gate": "router", "down_embed": reason, "up_embed": reason}


ADAPTERS: dict[str, Callable[[Any], Made | None]] = {
    "Step3p7Experts": _step3p7,
    "LongcatFlashExperts": _longcat_flash,
    "Llama4TextExperts": _llama4,
    "DbrxExperts": _dbrx,
    "JetMoeMoE": _jetmoe,
    "JetMoeMoA": _jetmoe_attention,
    "DogeCDMoE": _doge,
}


def unfused_experts(module: nn.Module) -> bool:
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
