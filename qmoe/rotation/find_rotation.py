"""Finding what reads and writes a model's residual stream, and proving it before the long work.

Nothing is known per model. One short batch of random tokens runs through the model. The first layer
of every kind is loaded: norms and their readers are observed; linears that give as many features as
the stream has write to it, but for those that a norm's output goes to through nothing but norms and
linears (a low-rank projection's second half). Then the layer, and what lies outside of all, is
rotated and must compute what it did, and every module whose weights have the stream's size must
matter to that: sparse attention that still sees all of so few tokens gets more of them. A model
that differs (LayerNorm, norms behind a block, encoders, images) is refused by name.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.errors import ConfigError, UnsupportedModelError
from qmoe.layer.at_hand import LayerAtHand
from qmoe.layer.output_error import hidden
from qmoe.model.experts import is_experts
from qmoe.model.layerwise import Call, Finished, suspended
from qmoe.model.norm_readers import NormReaders, find_norm_readers, origins_of, with_weights
from qmoe.model.skeleton import free, inputs_of
from qmoe.model.source import Source
from qmoe.model.structure import Layer
from qmoe.rotation.fused_rotation import FusedRotation, Norm, Part, block_of, rotate_part, turn

LENGTHS = (32, 512, 4096)  # in tokens; the next one if something does not matter to fewer
TOLERANCE = 1e-3  # relative, of 19 in 20 tokens: float32 rounding may explain that
REMEDY = "leave --rotate fused out, or take --rotate online"


class _Idle(Exception):
    """A module that does not matter to the tokens at hand."""


def find_fused_rotation(source: Source) -> FusedRotation:
    """What touches the residual stream. One layer is in memory at a time, in float32, and none
    afterwards. Raises UnsupportedModelError if the model does not compute the same on a rotated
    stream, ConfigError if its size is odd."""
    model, structure = source.model, source.structure
    if model.config.is_encoder_decoder:
        raise _refusal("the model", "has an encoder and a decoder")
    if unfused := [name for layer in structure.layers for name in layer.unfused]:
        raise _refusal(unfused[0], "its experts are modules of their own")
    for name in (name for layer in structure.layers for name in layer.experts):
        experts = model.get_submodule(name)
        if getattr(experts, "router_outputs", 0) > experts.num_experts:
            raise _refusal(name, "identity experts give what the norm gave")
    config = model.config.get_text_config()
    if block_of(config.hidden_size) == 1:
        raise ConfigError(
            f"rotate: no power of two divides {config.hidden_size}, the size of the hidden states"
        )
    most = getattr(config, "max_position_embeddings", None) or LENGTHS[-1]
    mattered: set[str] = set()
    for length in LENGTHS:
        try:
            return _Search(source, config, min(length, most), mattered).found()
        except _Idle as idle:
            name = str(idle)
        finally:
            free(model)
    raise _refusal(
        name, f"does not matter to {min(LENGTHS[-1], most)} tokens, so nothing proves it"
    )


class _Search:
    """Two runs of the same tokens: of the original model, and on the rotated stream. mattered:
    modules that need not be tried again."""

    def __init__(self, source: Source, config: Any, length: int, mattered: set[str]) -> None:
        self.source, self.size, self.mattered = source, config.hidden_size, mattered
        self.layers: dict[str, Part] = {}
        self.before: list[Tensor] = []  # what came to each layer
        self.outputs: list[Any] = []
        self.kinds: dict[Any, tuple[Layer, Any]] = {}  # the first layer of each, and its output
        drawn = torch.Generator().manual_seed(0)
        self.ids = torch.randint(config.vocab_size, (1, length), generator=drawn)

    def found(self) -> FusedRotation:
        source, model = self.source, self.source.model
        names = {layer.name for layer in source.structure.layers}
        within = tuple(f"{name}." for name in names)
        every = with_weights(model, "")
        outside = {n: m for n, m in every.items() if not n.startswith(within)}
        source.weights.load(source.resident(), torch.float32)
        source.weights.tie()
        logits: list[Tensor] = []
        part = self._part("the model", outside, lambda: logits.append(self._run(self._original)))
        if missing := names - set(self.layers):
            raise _refusal(sorted(missing)[0], "no text reaches it")
        part = replace(part, writers=[source.embedding()])
        touched = {*part.writers, *part.norms, *(r for n in part.norms.values() for r in n.readers)}
        for other in (n for n in self._wide(outside) if n not in touched):
            raise _refusal(
                other, "lies outside the layers and is none of lm_head, norm and embedding"
            )
        embedding, lm_head = model.get_input_embeddings(), source.structure.lm_head
        tied = lm_head is not None and model.get_submodule(lm_head).weight is embedding.weight
        rotation = FusedRotation(self.layers, part, lm_head if tied else None)
        rotation.rotate_outside(model)
        turned = self._run(self._rotated)
        _check("the model's output", turned, logits[0], logits[0])
        return rotation

    def _run(self, visit: Callable[[int, Any, Call], Any]) -> Tensor:
        model = self.source.model
        for event in suspended(model, self.source.stages(), [inputs_of(model, self.ids)]):
            if isinstance(event, Finished):
                logits: Tensor = event.output.logits
            else:
                event.go_on([visit(event.index, event.forward, event.calls[0])])
        return logits

    def _original(self, i: int, forward: Any, call: Call) -> Any:
        layer = self.source.structure.layers[i]
        module = self.source.model.get_submodule(layer.name)
        self.before.append(_states(call))
        kind = _kind(module)
        if kind not in self.kinds:
            self.kinds[kind] = layer, self._layer(layer, module, forward, call)
        first, output = self.kinds[kind]
        if layer is not first:
            self.layers[layer.name] = _renamed(self.layers[first.name], first.name, layer.name)
        self.outputs.append(output)
        return output

    def _layer(self, layer: Layer, module: nn.Module, forward: Any, call: Call) -> Any:
        """Run one as it is and rotated; returns its output, and leaves what it found."""

        at_hand = LayerAtHand.of(self.source.model, layer, forward)

        def run(given: Call) -> Any:
            [output] = at_hand.run([given])
            return output

        outputs: list[Any] = []
        modules = with_weights(module, layer.name)
        with self.source.loaded(layer.name, torch.float32, torch.float32):
            part = self._part(layer.name, modules, lambda: outputs.append(run(call)))
            self._all_matter(modules, hidden(outputs[0]), lambda: hidden(run(call)))
            rotate_part(self.source.model, part)
            before, after = hidden(outputs[0]), hidden(run(_with_states(call, turn(_states(call)))))
        _check(layer.name, after, turn(before), before - _states(call))
        self.layers[layer.name] = part
        return outputs[0]

    def _all_matter(
        self, modules: dict[str, nn.Module], output: Tensor, run: Callable[[], Tensor]
    ) -> None:
        """Raises _Idle if the layer gives the same with zeros in place of a module's weights."""
        for name, module in self._wide(modules).items():
            if name in self.mattered:
                continue
            weights = [(p, p.data) for p in module.parameters(recurse=False)]
            for parameter, data in weights:
                parameter.data = data.new_zeros(()).expand(data.shape)  # takes no memory
            same = torch.equal(run(), output)
            for parameter, data in weights:
                parameter.data = data
            if same:
                raise _Idle(name)
            self.mattered.add(name)

    def _wide(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Those with weights that have the stream's size; a convolution mixes no features."""

        def wide(module: nn.Module) -> bool:
            weights = module.parameters(recurse=False)
            few = [p for p in weights if p.dim() < 3 or is_experts(module)]
            return any(self.size in p.shape for p in few)

        return {name: module for name, module in modules.items() if wide(module)}

    def _rotated(self, i: int, forward: Any, call: Call) -> Any:
        before, output = self.before[i], self.outputs[i]
        _check(self.source.structure.layers[i].name, _states(call), turn(before), before)
        states = turn(hidden(output))
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _part(self, name: str, modules: dict[str, nn.Module], run: Callable[[], Any]) -> Part:
        """Which of `modules` touch the stream, seen while `run` runs them."""
        observed: list[NormReaders] = []
        origins = origins_of(modules, lambda: observed.extend(find_norm_readers(modules, run)))
        for other in (n for n in self._wide(modules) if n not in origins):
            raise _refusal(other, "is not called for text, so what becomes of it cannot be checked")
        norms = {}
        for found in observed:
            norm: Any = modules[found.norm]
            if len(norm.weight) == self.size:
                norms[found.norm] = Norm(_neutral(found.norm, norm), found.readers)
        _join_experts(modules, norms)

        read = {*norms, *(reader for norm in norms.values() for reader in norm.readers)}

        def reads_stream(module: str | None) -> bool:
            return module is not None and (module in read or reads_stream(origins[module]))

        wide = [n for n, m in modules.items() if getattr(m, "out_features", 0) == self.size]
        experts = [n for n, m in modules.items() if is_experts(m)]
        return Part(norms, experts + [n for n in wide if not reads_stream(n)])


def _join_experts(modules: dict[str, nn.Module], norms: dict[str, Norm]) -> None:
    """Experts that are given scaled tokens (Llama 4) read what others in their block do."""
    read = {reader for norm in norms.values() for reader in norm.readers}
    for name in (n for n, m in modules.items() if is_experts(m) and n not in read):
        block = name.rpartition(".")[0] + "."
        for norm in norms.values():
            if any(reader.startswith(block) for reader in norm.readers):
                norm.readers.append(name)


def _neutral(name: str, norm: Any) -> float:
    """The weight with which a norm scales nothing. UnsupportedModelError if it is no RMSNorm."""
    weight, before = norm.weight.data, norm.weight.detach().clone()
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    plain = x * x.square().mean(-1, keepdim=True).rsqrt()
    try:
        for value in (1.0, 0.0):
            weight.fill_(value)
            if getattr(norm, "bias", None) is None and torch.allclose(norm(x), plain, atol=1e-3):
                return value
    finally:
        weight.copy_(before)
    raise _refusal(f"{name} ({type(norm).__name__})", "is no RMSNorm")


def _check(name: str, found: Tensor, wanted: Tensor, scale: Tensor) -> None:
    """Raises unless all tokens but a few, whose experts are chosen by a hair, are the same, next to
    the size of `scale`."""
    lost = (found - wanted).norm(dim=-1) / scale.norm(dim=-1).clamp_min(1e-30)
    error = float(lost.flatten().quantile(0.95, interpolation="lower"))
    if not error <= TOLERANCE:
        raise _refusal(name, f"differs on a rotated residual stream, by {error:.2g} of its size")


def _refusal(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name}: rotate fused: {why}; {REMEDY}")


def _states(call: Call) -> Tensor:
    states = call.args[0] if call.args else call.kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise _refusal("a layer", f"gets no hidden states, but {type(states).__name__}")
    return states


def _with_states(call: Call, states: Tensor) -> Call:
    if call.args:
        return Call((states, *call.args[1:]), call.kwargs)
    return Call((), call.kwargs | {"hidden_states": states})


def _kind(module: nn.Module) -> Any:
    """What layers of the same kind have in common: modules, shapes, settings but their number."""
    kinds = tuple((n, type(m)) for n, m in module.named_modules())
    settings = tuple(
        (n, key, value)
        for n, m in module.named_modules()
        for key, value in vars(m).items()
        if isinstance(value, int | float | str) and not ("layer" in key or "idx" in key)
    )
    return kinds, settings, tuple((n, p.shape) for n, p in module.named_parameters())


def _renamed(part: Part, first: str, name: str) -> Part:
    def new(module: str) -> str:
        return name + module.removeprefix(first)

    norms = {new(n): Norm(x.neutral, [new(r) for r in x.readers]) for n, x in part.norms.items()}
    return Part(norms, [new(n) for n in part.writers])
