"""Everything that can go wrong before the long work, checked before it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qmoe import ranks
from qmoe.calibration.batches import sample_windows
from qmoe.calibration.text import load_texts
from qmoe.checkpoint import Checkpoint
from qmoe.config import CHANNEL, GROUPS, QuantConfig, Scheme
from qmoe.errors import CheckpointError, ConfigError, UnsupportedModelError
from qmoe.experts import expert_weights, stack
from qmoe.folders import companions, resolve
from qmoe.leftovers import complaint, wrapped
from qmoe.model_config import generation_config, read_config
from qmoe.naming import original_names, stored_fused
from qmoe.output import check_destination
from qmoe.precision import ever_in_float32
from qmoe.progress import Track
from qmoe.residual import Residual
from qmoe.rotation import block_for
from qmoe.skeleton import WeightMap, build
from qmoe.structure import Layer, Structure, find
from qmoe.tokenizer import check_vocabulary, has_tokenizer, open_tokenizer


@dataclass
class Source:
    """An unquantized model: its checkpoint, a skeleton of it on the meta device, and the map."""

    checkpoint: Checkpoint
    model: Any
    weights: WeightMap
    structure: Structure
    residual: Residual | None = None  # if layers are to be rotated as they are loaded

    def stages(self) -> list[nn.Module]:
        """The modules whose weights are loaded one at a time, in running order."""
        return [self.model.get_submodule(layer.name) for layer in self.structure.layers]

    def weight_dtype(self) -> torch.dtype:
        """Of the routed experts as stored; scales are stored in it too, as engines expect."""
        layers = self.structure.layers
        experts = [e for layer in layers for e in [*layer.experts, *layer.loose]]
        kept = [name for layer in layers for name in layer.kept]
        return self.checkpoint.dtype(self.weights.sources([*experts, *kept][0])[0])

    def kept_linears(self, config: QuantConfig) -> list[str]:
        """Everything with a linear's weight that is not quantized, by model and checkpoint name:
        routers and other linears, so that no engine takes them for packed ones."""
        quantized = {n for layer in self.structure.layers for n in schemes_of(self, layer, config)}
        if config.lm_head is not None:
            quantized.add(str(self.structure.lm_head))
        kept: set[str] = set()
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if name in quantized or isinstance(module, nn.Embedding) or weight is None:
                continue
            if weight.dim() == 2:
                stored = original_names(self.model, f"{name}.weight", weight)
                kept |= {name, *(n.removesuffix(".weight") for n in stored)}
        return sorted(kept)

    def embedding(self) -> str:
        """The module that turns token ids into the first hidden states."""
        modules: dict[str, nn.Module] = dict(self.model.named_modules())
        embedding = self.model.get_input_embeddings()
        return next(name for name, module in modules.items() if module is embedding)

    def adds_head(self, config: QuantConfig) -> bool:
        """Whether an output projection is stored that the checkpoint does not have: a rotation
        unties it from the embedding."""
        head = self.structure.lm_head
        stored = self.weights.targets
        return config.rotate == "fused" and head is not None and f"{head}.weight" not in stored

    def resident(self) -> list[str]:
        """Checkpoint tensors outside the decoder layers."""
        layered = {n for layer in self.structure.layers for n in self.weights.sources(layer.name)}
        return [n for names in self.weights.targets.values() for n in names if n not in layered]


def open_source(path: str | Path, dtype: torch.dtype, trust: bool = False) -> Source:
    """Open an unquantized MoE model folder (or hub name) and find its parts; loads no weights.
    trust: see remote_code.py."""
    checkpoint = Checkpoint(resolve(path))
    checkpoint.decode()
    config = read_config(checkpoint, trust)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the tensors are shown decoded
    model = build(config, dtype, checkpoint)
    # Router logits kept for a training loss cost memory, and no layer reports them while suspended.
    model.config.output_router_logits = False
    checkpoint.show(model._qmoe_made)
    structure = find(model)
    weights = WeightMap(model, checkpoint)
    check_complete(weights)
    for name in checkpoint.names():
        checkpoint.dtype(name)
    stored_fused(model)  # refuses families whose experts cannot be told apart on disk
    check_routing(model, structure)
    return Source(checkpoint, model, weights, structure)


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


def prepare(
    src: str | Path,
    dst: Path,
    config: QuantConfig,
    *,
    text: bool,
    track: Track,
    trust: bool = False,
) -> tuple[Source, Tensor, list[str], str]:
    """Check source, settings, text and destination; returns the source, the calibration windows, in
    words what of the text was not as asked for, and the SHA-256 of the source.

    Raises a QmoeError that names the problem. Nothing is written.
    """
    source = open_source(src, torch.float32, trust)
    check_schemes(source, rotated(source, config))
    folder = source.checkpoint.path
    copied = sum((folder / file).stat().st_size for file in companions(folder)[0])
    check_destination(dst, estimate_bytes(source, config) + copied)
    windows, notes = torch.empty(0, 0, dtype=torch.long), list[str]()
    # Without text too: what loads the result opens both.
    generation_config(folder)
    if text or has_tokenizer(folder):
        tokenizer = open_tokenizer(folder, source.model.config, trust)
    if text:
        c = config.calibration
        check_window(source.model.config, c.window)
        texts = load_texts(c.text)
        windows, notes = sample_windows(tokenizer, texts, c.windows, c.window, c.seed)
        check_vocabulary(source.model.config, windows)
        if (batches := -(-len(windows) // c.batch)) < ranks.count():
            raise ConfigError(
                f"calibration: {ranks.count()} processes cannot share {batches} batches of "
                f"{c.batch} windows; give more windows or a smaller batch"
            )
    return source, windows, notes, source.checkpoint.check_finite(track)


def check_combination(
    config: QuantConfig, given: list[Path], saved: str | Path | None, dst: Path
) -> None:
    """Refuse sources of statistics that the method cannot use."""
    if config.method == "rtn" and (given or saved is not None):
        raise ConfigError("rtn uses no statistics; leave them out or choose gptq")
    if config.folds and (given or saved is not None):
        raise ConfigError("awq rescales statistics as it goes; save and reuse them with gptq only")
    if len({p.resolve() for p in given}) < len(given):
        raise ConfigError("statistics: the same folder is given twice")
    if given and config.tune:
        raise ConfigError("tune: runs text through each layer; leave out the saved statistics")
    if config.tune and ranks.count() > 1:
        raise ConfigError(f"tune: runs in one process, this is one of {ranks.count()}")
    if given and config.lm_head is not None:
        raise ConfigError("saved statistics do not cover lm_head; leave it out or use text")
    if saved is not None and Path(saved).resolve() == dst.resolve():
        raise ConfigError(f"{dst}: the model and its statistics need different folders")


def check_window(config: Any, window: int) -> None:
    """A window must fit the positions the model knows (and attention is quadratic in it)."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and window > positions:
        raise ConfigError(
            f"window: {window} tokens are more than the {positions} positions of this model"
        )


def schemes_of(source: Source, layer: Layer, config: QuantConfig) -> dict[str, Scheme]:
    """Scheme of every weight to quantize in a layer: experts modules and dense linears by name."""
    found = dict.fromkeys([*layer.experts, *layer.loose_linears()], config.experts)
    if config.dense is not None:
        found |= dict.fromkeys(layer.dense, config.dense)
    return found


def rotated(source: Source, config: QuantConfig) -> QuantConfig:
    """The settings with the block that a rotation has in this model."""
    if config.rotate != "online":
        return config
    names = [n for layer in source.structure.layers for n in schemes_of(source, layer, config)]
    if config.lm_head is not None and source.structure.lm_head is not None:
        names.append(source.structure.lm_head)
    sizes = {shape[-1] for name in names for _, shape in _shapes(source.model, name)}
    block = block_for(sorted(sizes))
    if block == 1:
        raise ConfigError(f"rotate: no power of two divides all input dimensions: {sorted(sizes)}")
    return config.rotated_by(block)


def check_schemes(source: Source, config: QuantConfig) -> None:
    """Every group size divides every input dimension it is used on; lm_head can be quantized."""
    model = source.model
    for layer in source.structure.layers:
        for name, scheme in schemes_of(source, layer, config).items():
            for weight, shape in _shapes(model, name):
                _check_divides(weight, shape[-1], scheme)
    if config.lm_head is not None:
        head = source.structure.lm_head
        if head is None:
            raise ConfigError("lm_head: this model has no output projection of that name")
        if f"{head}.weight" in model.all_tied_weights_keys:
            raise ConfigError(
                "lm_head: it is tied to the input embedding in this model and cannot be quantized "
                "alone; leave lm_head out"
            )
        if f"{head}.weight" in ever_in_float32(model):
            raise ConfigError("lm_head: this model's class keeps it in float32; leave lm_head out")
        _check_divides(f"{head}.weight", model.get_submodule(head).in_features, config.lm_head)


def _shapes(model: nn.Module, name: str) -> list[tuple[str, tuple[int, ...]]]:
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


def estimate_bytes(source: Source, config: QuantConfig) -> int:
    """Bytes the quantized weights will take on disk, within a percent."""
    total = source.checkpoint.nbytes()
    total -= sum(map(source.checkpoint.tensor_bytes, source.weights.ignored))
    for layer in source.structure.layers:
        for name, scheme in schemes_of(source, layer, config).items():
            for target, shape in _shapes(source.model, name):
                size = sum(map(source.checkpoint.tensor_bytes, source.weights.targets[target]))
                numel = torch.Size(shape).numel()
                total += int(numel * scheme.bits_per_weight(shape[-1]) / 8) - size
    if source.adds_head(config):
        embedding = source.weights.sources(source.embedding())
        total += sum(map(source.checkpoint.tensor_bytes, embedding))
    return max(total, 0)
