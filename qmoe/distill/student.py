"""The quantized model of an unfinished folder as a function of what is distilled.

Integers are kept as bytes, in memory or on disk (system/spill.py), and one layer at a time is in
memory as numbers. Scales are theirs times factors; norms and biases are values of their own, and
routers stay as they are. All of it is rounded as it will be stored wherever it is used, so that a
loss is that of the model that will be written.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qmoe.calibration.collect import collecting_experts
from qmoe.config import QuantConfig
from qmoe.distill.stacks import lm_head_stack, stacks_of
from qmoe.format.quantized import Quantized
from qmoe.layer.at_hand import LayerAtHand
from qmoe.layer.fixed import fixed_matrices, scales_of
from qmoe.layer.latent import latent_experts
from qmoe.layer.latent import replaced as put_in_place
from qmoe.layer.routing import Parameters
from qmoe.layer.trainable import (
    as_stored,
    biases,
    linear_weights,
    norms,
    run_with,
    running,
)
from qmoe.model.layerwise import Call, Forward
from qmoe.model.source import Source, schemes_of
from qmoe.model.structure import Layer
from qmoe.system.devices import CPU, move_to
from qmoe.system.devices import moved as to_device
from qmoe.system.spill import Scratch


@dataclass(frozen=True)
class Kept:
    """A layer that waits: its quantized stacks by parameter, and all other parameters by name, in
    the dtypes that they are stored in."""

    stacks: dict[str, Quantized]
    others: Parameters


@dataclass
class Student:
    """source: the original, with what lies outside its layers loaded. device: where layers run.
    scratch: where integers wait. stored_dtype: of a parameter on disk, by name. shard: the tensors
    of a finished shard, by index; the last one is of what lies outside the layers.

    factors: of scales [E, N, G], by quantized parameter; values: of parameters that are not
    quantized; both are float32 leaves in the machine's memory. layers: in running order. lm_head:
    the output projection's stack, if it is quantized. All of these are empty until `begin`."""

    source: Source
    config: QuantConfig
    device: torch.device
    scratch: Scratch
    stored_dtype: Callable[[str], torch.dtype]
    shard: Callable[[int], dict[str, Tensor]]
    factors: Parameters = field(default_factory=dict)
    values: Parameters = field(default_factory=dict)
    layers: list[Kept] = field(default_factory=list)
    lm_head: dict[str, Quantized] = field(default_factory=dict)

    def begin(self) -> None:
        """Read the shards, and make the leaves: factors of one, and values as they were written."""
        for structure in self.source.structure.layers:
            self.layers.append(self._read(structure))
        outside = norms(self.source.model.named_modules())
        self._take({name: p for name, p in outside.items() if not p.is_meta})
        self.lm_head = lm_head_stack(self.source, self.config, self.shard(len(self.layers)))
        self._scale(self.lm_head)

    def _read(self, structure: Layer) -> Kept:
        source = self.source
        tensors = self.shard(len(self.layers))
        with source.freed_after(structure.name) as module:
            stacks = stacks_of(source, structure, self.config, tensors)
            packed = {n for target in stacks for n in source.weights.targets[target]}
            names = [n for n in source.weights.sources(structure.name) if n not in packed]
            source.weights.load(names, torch.float32, tensors)
            layer = LayerAtHand.of(source.model, structure, _not_run)
            routers = tuple(f"{name}." for name in structure.routers)
            found = norms(layer.named_modules()) | biases(layer)
            self._take({name: p for name, p in found.items() if not name.startswith(routers)})
            self._scale(stacks)
            others = {
                name: self.scratch.keep(p.to(self.stored_dtype(name)))
                for name, p in module.named_parameters(prefix=structure.name)
                if name not in self.values and name not in stacks
            }
        kept = {t: replace(s, q=self.scratch.keep(s.q)) for t, s in stacks.items()}
        return Kept(kept, others)

    def _scale(self, stacks: dict[str, Quantized]) -> None:
        """Make leaves of the scales of these stacks."""
        for target, stack in stacks.items():
            ones = torch.ones_like(stack.scale, dtype=torch.float32)
            self.factors[target] = ones.requires_grad_()

    def _take(self, found: Parameters) -> None:
        """Make leaves of these parameters, but for those that the family stores with others."""
        split = self.source.weights.split_targets()
        self.values |= {name: _leaf(p) for name, p in found.items() if name not in split}

    def run(self, i: int, forward: Forward, calls: list[Call]) -> list[Any]:
        """Layer i's output for each call, differentiable in the leaves and in the call."""
        structure, kept, device = self.source.structure.layers[i], self.layers[i], self.device
        schemes = schemes_of(self.source, structure, self.config)
        layer = LayerAtHand.of(self.source.model, structure, forward, schemes)
        with self.source.freed_after(structure.name) as module, ExitStack() as inside:
            move_to(module, device)  # its buffers
            stacks = kept.stacks.items()
            matrices = {t: fixed_matrices(s, self.factors[t], device) for t, s in stacks}
            inside.enter_context(latent_experts(layer.experts, matrices))
            inside.enter_context(collecting_experts(layer.experts))
            inside.enter_context(running(layer))
            given = {name: p.to(device, torch.float32) for name, p in kept.others.items()}
            given |= linear_weights(layer, matrices) | self._values_in(structure.name, device)
            return [to_device(run_with(layer, given, call.moved(device)), CPU) for call in calls]

    @contextmanager
    def outside(self) -> Iterator[None]:
        """The model with the values of norms behind its layers, and with the quantized output
        projection."""
        layers = tuple(f"{layer.name}." for layer in self.source.structure.layers)
        with ExitStack() as inside:
            for name in (n for n in self.values if not n.startswith(layers)):
                self._put(inside, name, self._value(name))
            for target, stack in self.lm_head.items():
                [matrix] = fixed_matrices(stack, self.factors[target], CPU)
                self._put(inside, target, matrix.weight())
            yield

    def moved(self) -> Parameters:
        """What is to be written otherwise than it is: scales [E, N, G] of quantized parameters,
        under their names with `_scale`, and other parameters, as they are to be stored."""
        found: Parameters = {}
        for kept in self.layers:
            found |= self._moved_scales(kept.stacks)
        found |= self._moved_scales(self.lm_head)
        for name, value in self.values.items():
            found[name] = value.detach().to(self.stored_dtype(name))
        return found

    def _moved_scales(self, stacks: dict[str, Quantized]) -> Parameters:
        factors = {target: self.factors[target].detach() for target in stacks}
        return {
            f"{target}_scale": scales_of(stack, factors[target]).to(stack.scale.dtype)
            for target, stack in stacks.items()
            if not bool(factors[target].eq(1).all())
        }

    def _value(self, name: str) -> Tensor:
        return as_stored(self.values[name], self.stored_dtype(name))

    def _values_in(self, layer: str, device: torch.device) -> Parameters:
        names = [name for name in self.values if name.startswith(f"{layer}.")]
        return {name: self._value(name).to(device) for name in names}

    def _put(self, inside: ExitStack, target: str, value: Tensor) -> None:
        owner, _, name = target.rpartition(".")
        module = self.source.model.get_submodule(owner)
        inside.enter_context(put_in_place(module, name, value))


def _not_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("a layer that is only looked at was run")


def _leaf(parameter: Tensor) -> Tensor:
    return parameter.detach().to(CPU, torch.float32, copy=True).requires_grad_()
