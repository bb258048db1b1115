"""Whether the schemes that are asked for go with the shapes of a model."""

from dataclasses import replace
from difflib import get_close_matches

import torch
from torch import nn

from qmoe.config import CHANNEL, GROUPS, QuantConfig, Scheme
from qmoe.errors import ConfigError
from qmoe.format.gguf_scales import widest_bits
from qmoe.format.hadamard import block_for
from qmoe.model.experts import expert_weights, matrices_of, stack
from qmoe.model.precision import ever_in_float32
from qmoe.model.source import Source, schemes_of, widths_of
from qmoe.model.tensor_names import packed_names


def with_block(source: Source, config: QuantConfig) -> QuantConfig:
    """The settings with the block that a rotation has in this model."""
    if config.rotate != "online":
        return config
    names = [n for layer in source.structure.layers for n in schemes_of(source, layer, config)]
    if config.lm_head is not None and source.structure.lm_head is not None:
        names.append(source.structure.lm_head)
    sizes = {shape[-1] for name in names for _, shape in weight_shapes(source.model, name)}
    block = block_for(sorted(sizes))
    if block == 1:
        raise ConfigError(f"rotate: no power of two divides all input dimensions: {sorted(sizes)}")
    return config.rotated_by(block)


def with_widest(source: Source, config: QuantConfig) -> tuple[QuantConfig, list[str]]:
    """With the target llama.cpp, settings that give a matrix more bits where its block type has
    room for them, and a note of it. Bits that the settings have for a single matrix stay; so do all
    with AWQ's scales, which go with one width alone."""
    if config.target != "llama.cpp" or config.applies_awq:
        return config, []
    widths: dict[str, str] = {}
    for layer in source.structure.layers:
        for name, scheme in schemes_of(source, layer, config).items():
            for target, shape in weight_shapes(source.model, name):
                bits, experts = widest_bits(scheme, shape[-1]), name in layer.experts
                key = target if experts else name
                if bits != scheme.bits and key not in config.widths:
                    widths[key] = str(bits) * (shape[0] if experts else 1)
    if not widths:
        return config, []
    first, digits = next(iter(widths.items()))
    note = (
        f"{digits[0]} bits instead of fewer: {len(widths)} matrices or stacks of them, as {first}; "
        "llama.cpp's types of fewer bits need inputs that 256 divides, and the next type has room"
    )
    return replace(config, widths={**config.widths, **widths}), [note]


def check_schemes(source: Source, config: QuantConfig) -> None:
    """Every group size divides every input dimension it is used on; lm_head can be quantized; every
    matrix with bits of its own is there."""
    model = source.model
    _check_single(source, config)
    for layer in source.structure.layers:
        for name, scheme in schemes_of(source, layer, config).items():
            for weight, shape in weight_shapes(model, name):
                _check_divides(weight, shape[-1], scheme)
    if config.lm_head is not None:
        lm_head = source.structure.lm_head
        if lm_head is None:
            raise ConfigError("lm_head: this model has no output projection of that name")
        if f"{lm_head}.weight" in model.all_tied_weights_keys:
            raise ConfigError(
                "lm_head: it is tied to the input embedding in this model and cannot be quantized "
                "alone; leave lm_head out"
            )
        if f"{lm_head}.weight" in ever_in_float32(model):
            raise ConfigError("lm_head: this model's class keeps it in float32; leave lm_head out")
        _check_divides(
            f"{lm_head}.weight", model.get_submodule(lm_head).in_features, config.lm_head
        )


def exact_schemes(source: Source, config: QuantConfig) -> dict[str, Scheme]:
    """Matrices whose bits or groups are not those of `config.experts` or `config.dense`, by the
    name of their module in the checkpoint."""
    found: dict[str, Scheme] = {}
    for layer in source.structure.layers:
        plain = schemes_of(source, layer, replace(config, widths={}, groups={}))
        widths = widths_of(layer, config)
        for module, scheme in schemes_of(source, layer, config).items():
            if module not in layer.experts:
                names = _stored(source.model, module) if scheme != plain[module] else []
                found |= {name.removesuffix(".weight"): scheme for name in names}
                continue
            for target, shape in weight_shapes(source.model, module):
                own = widths.get(target) or (scheme.bits,) * shape[0]
                for name, bits in stored_widths(source.model, target, own).items():
                    if (each := replace(scheme, bits=bits)) != plain[module]:
                        found[name.removesuffix(".weight")] = each
    return found


def stored_widths(model: nn.Module, target: str, widths: tuple[int, ...]) -> dict[str, int]:
    """Bits of each matrix that a stack of experts is stored as, by the name of its weight."""
    owner, _, weight = target.rpartition(".")
    count = len(matrices_of(model.get_submodule(owner), weight))
    marker = torch.tensor(widths)[:, None, None].expand(-1, count, 1)
    named = packed_names(model, target, marker)
    return {name: int(part.flatten()[0]) for name, part in named.items()}


def _stored(model: nn.Module, linear: str) -> list[str]:
    """Names of the matrices that a linear is stored as."""
    target = f"{linear}.weight"
    return list(packed_names(model, target, model.get_parameter(target)))


def _check_single(source: Source, config: QuantConfig) -> None:
    """Everything with bits or groups of its own is quantized, and no expert is left out."""
    counts: dict[str, int] = {}
    modules: set[str] = set()
    for layer in source.structure.layers:
        for name in schemes_of(source, layer, config):
            modules.add(name)
            shapes = weight_shapes(source.model, name)
            experts = name in layer.experts
            counts |= {target if experts else name: s[0] if experts else 1 for target, s in shapes}
    for setting, names, known in (
        ("groups", config.groups, modules),
        ("widths", config.widths, set(counts)),
    ):
        for name in sorted(set(names) - known):
            nearest = get_close_matches(name, known, 1)
            hint = f"; the nearest is {nearest[0]}" if nearest else ""
            raise ConfigError(f"{setting}: nothing that is quantized is called {name}{hint}")
    for name, digits in config.widths.items():
        if len(digits) != counts[name]:
            raise ConfigError(
                f"widths: {name} has {counts[name]} matrices, and {len(digits)} digits were given"
            )


def weight_shapes(model: nn.Module, name: str) -> list[tuple[str, tuple[int, ...]]]:
    """The weights of a linear or an experts module, by parameter, with their shapes as stacks."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        return [(f"{name}.weight", tuple(module.weight.shape))]
    return [(f"{name}.{w}", tuple(stack(module, w).shape)) for w in expert_weights(module)]


def _check_divides(name: str, in_features: int, scheme: Scheme) -> None:
    group = scheme.group_size
    if scheme.rotation and in_features % scheme.rotation:
        raise ConfigError(
            f"{name}: blocks of {scheme.rotation} do not divide its {in_features} input features"
        )
    if group == CHANNEL or in_features % group == 0:
        return
    others = [str(g) for g in GROUPS if in_features % g == 0] + [f"{CHANNEL} (channel)"]
    raise ConfigError(
        f"{name}: group size {group} does not divide its {in_features} input features; "
        f"{' or '.join(others)} would"
    )
