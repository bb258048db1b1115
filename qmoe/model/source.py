"""An opened model folder: its checkpoint, a skeleton without weights, and where its parts are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.reader import Checkpoint
from qmoe.config import QuantConfig, Scheme
from qmoe.errors import CheckpointError, UnsupportedModelError
from qmoe.model.experts import expert_weights, is_experts
from qmoe.model.leftovers import complaint, wrapped
from qmoe.model.skeleton import build, free
from qmoe.model.structure import Layer, Prediction, Structure, find
from qmoe.model.tensor_names import original_names, stored_fused
from qmoe.model.weight_map import WeightMap
from qmoe.system.devices import CPU, move_to


@dataclass
class Source:
    """folder: where it lies. checkpoint: its tensors. model: a skeleton of it on the meta device,
    with places for packed weights if it is quantized (packed/skeleton.py). weights: which tensor
    goes where. structure: the decoder layers. prediction: the one of them that predicts tokens
    beyond the next, which is the last, if the model has it."""

    folder: ModelFolder
    checkpoint: Checkpoint
    model: Any
    weights: WeightMap
    structure: Structure
    prediction: Prediction | None = None

    def predicts(self, layer: str) -> bool:
        """Whether that decoder layer is the one that predicts."""
        return self.prediction is not None and self.prediction.layer == layer

    def of_prediction(self, target: str) -> bool:
        """Whether a parameter is one of the layer that predicts, or of what is around it."""
        found = self.prediction
        if found is None:
            return False
        parts = (found.layer, *found.before, found.norm)
        return target.startswith(tuple(f"{part}." for part in parts))

    def stages(self) -> list[nn.Module]:
        """The modules whose weights are loaded one at a time, in running order."""
        return [self.model.get_submodule(layer.name) for layer in self.structure.layers]

    @contextmanager
    def loaded(
        self, name: str, dtype: torch.dtype, experts_dtype: torch.dtype | None = None
    ) -> Iterator[Any]:
        """The module of that name with its weights in memory. Afterwards they are freed, and so are
        the files they came from. dtype: where a parameter has none of its own; experts_dtype: of
        routed experts, most of the bytes of a layer, if it is another."""
        with self.freed_after(name) as module:
            stacks = [] if experts_dtype is None else self.expert_stacks(name)
            for target in stacks:
                # transformers keeps to the parameter's dtype.
                self.make_stack(target, experts_dtype or dtype, "meta")
                self.weights.load(self.weights.targets[target], experts_dtype)
                self.checkpoint.release()
            done = {stored for target in stacks for stored in self.weights.targets[target]}
            names = [n for n in self.weights.sources(name) if n not in done]
            self.weights.load(names, dtype)
            self.checkpoint.release()
            yield module

    @contextmanager
    def freed_after(self, name: str) -> Iterator[Any]:
        """The module of that name. Afterwards it holds no weights, and its buffers, which the rest
        of the model may share, are in the machine's own memory."""
        module = self.model.get_submodule(name)
        try:
            yield module
        finally:
            free(module)
            move_to(module, CPU)
            self.checkpoint.release()

    def expert_stacks(self, name: str) -> list[str]:
        """Parameters below module `name` that hold fused routed experts."""
        inside = self.model.get_submodule(name).named_modules(prefix=name)
        return [f"{n}.{w}" for n, m in inside if is_experts(m) for w in expert_weights(m)]

    def make_stack(self, target: str, dtype: torch.dtype, device: str) -> tuple[Any, str]:
        """Put an empty parameter where a stack of experts is; returns its module and name there."""
        owner, _, weight = target.rpartition(".")
        module: Any = self.model.get_submodule(owner)
        empty = torch.zeros_like(getattr(module, weight), dtype=dtype, device=device)
        module._parameters[weight] = nn.Parameter(empty, requires_grad=False)
        return module, weight

    def weight_dtype(self) -> torch.dtype:
        """Of the routed experts as stored; scales are stored in it too, as engines expect."""
        layers = self.structure.layers
        experts = [e for layer in layers for e in [*layer.experts, *layer.unfused]]
        others = [name for layer in layers for name in layer.unquantized]
        return self.checkpoint.dtype(self.weights.sources([*experts, *others][0])[0])

    def unquantized_linears(self, config: QuantConfig) -> list[str]:
        """Everything with a linear's weight that is not quantized, by model and checkpoint name:
        routers and other linears, so that no engine takes them for packed ones."""
        quantized = {n for layer in self.structure.layers for n in schemes_of(self, layer, config)}
        if config.lm_head is not None:
            quantized.add(str(self.structure.lm_head))
        found: set[str] = set()
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if name in quantized or isinstance(module, nn.Embedding) or weight is None:
                continue
            if weight.dim() == 2:
                stored = original_names(self.model, f"{name}.weight", weight)
                found |= {name, *(n.removesuffix(".weight") for n in stored)}
        carried = (name for name in self.weights.carried if name.endswith(".weight"))
        found |= {n.removesuffix(".weight") for n in carried if self.checkpoint.rank(n) == 2}
        return sorted(found)

    def embedding(self) -> str:
        """The module that turns token ids into the first hidden states."""
        modules: dict[str, nn.Module] = dict(self.model.named_modules())
        embedding = self.model.get_input_embeddings()
        return next(name for name, module in modules.items() if module is embedding)

    def adds_lm_head(self, config: QuantConfig) -> bool:
        """Whether an output projection is stored that the checkpoint does not have: a rotation
        unties it from the embedding."""
        lm_head = self.structure.lm_head
        stored = self.weights.targets
        return (
            config.rotate == "fused" and lm_head is not None and f"{lm_head}.weight" not in stored
        )

    def resident(self) -> list[str]:
        """Checkpoint tensors outside the decoder layers."""
        layered = {n for layer in self.structure.layers for n in self.weights.sources(layer.name)}
        return [n for names in self.weights.targets.values() for n in names if n not in layered]


Add = Callable[[Any, Checkpoint], Prediction | None]


def open_source(folder: ModelFolder, dtype: torch.dtype, add: Add | None = None) -> Source:
    """Open an unquantized MoE model and find its parts; loads no weights. dtype: of parameters that
    have none of their own. add: puts the layer that predicts tokens beyond the next into the model
    (prediction/attach.py); without it that layer is not part of the model."""
    checkpoint = folder.checkpoint()
    checkpoint.decode()
    config = folder.config(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the tensors are shown decoded
    model = build(config, dtype, checkpoint)
    # Router logits kept for a training loss cost memory, and no layer reports them while suspended.
    model.config.output_router_logits = False
    prediction = None if add is None else add(model, checkpoint)
    structure = find(model)
    weights = WeightMap(model, checkpoint)
    check_complete(weights)
    for name in checkpoint.names():
        checkpoint.dtype(name)
    stored_fused(model)  # refuses families whose experts cannot be told apart on disk
    check_routing(model, structure)
    return Source(folder, checkpoint, model, weights, structure, prediction)


def check_complete(weights: WeightMap) -> None:
    """Raises CheckpointError unless checkpoint and model have the same parameters and shapes."""
    where = weights.checkpoint.path
    if said := wrapped(weights.unexpected):  # of which all else follows
        raise CheckpointError(f"{where}: {said}")
    if doubled := weights.doubled():
        raise CheckpointError(f"{where}: {doubled[0]}; take out the one that is not the model's")
    if missing := weights.missing():
        raise CheckpointError(f"{where}: {len(missing)} tensors are missing, first {missing[0]!r}")
    if weights.unexpected:
        raise CheckpointError(f"{where}: {complaint(weights.names(), weights.unexpected)}")
    if misshapen := weights.misshapen():
        raise CheckpointError(f"{where}: {misshapen[0]} (by config.json)")


def check_routing(model: Any, structure: Structure) -> None:
    """Raises UnsupportedModelError if a token would go to more experts, or groups of them, than
    there are."""
    config = model.config.get_text_config()
    top_k, groups, chosen = (
        value if isinstance(value := getattr(config, name, None), int) else None
        for name in ("num_experts_per_tok", "n_group", "topk_group")
    )
    for layer in structure.layers:
        for name in layer.experts:
            E = model.get_submodule(name).num_experts
            if top_k is not None and not 1 <= top_k <= E:
                raise UnsupportedModelError(
                    f"{name}: config.json sends a token to {top_k} of {E} experts"
                )
            if groups and E % groups:
                raise UnsupportedModelError(
                    f"{name}: config.json divides {E} experts into {groups} groups (n_group)"
                )
            if groups and chosen is not None and not 1 <= chosen <= groups:
                raise UnsupportedModelError(
                    f"{name}: config.json chooses {chosen} of {groups} groups (topk_group)"
                )


def schemes_of(source: Source, layer: Layer, config: QuantConfig) -> dict[str, Scheme]:
    """Scheme of every weight to quantize in a layer: experts modules and linears by name. That of
    an experts module is its experts' but for their bits, which may differ (`widths_of`)."""
    routed = [*layer.experts, *layer.unfused_linears()]
    found = {n: config.scheme_of(n, config.experts) for n in routed}
    if config.dense is not None:
        found |= {n: config.scheme_of(n, config.dense) for n in layer.dense}
    return found


def widths_of(layer: Layer, config: QuantConfig) -> dict[str, tuple[int, ...]]:
    """Bits of each expert's matrix, by stack, where the settings have some of their own."""
    owned = tuple(f"{name}." for name in layer.experts)
    stacks = {name: digits for name, digits in config.widths.items() if name.startswith(owned)}
    return {name: tuple(map(int, digits)) for name, digits in stacks.items()}
