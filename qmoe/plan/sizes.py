"""What the weights of a quantized model take on disk, from the headers of its checkpoint alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from qmoe.config import QuantConfig, Scheme
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.format.packing import packed_words
from qmoe.model.experts import expert_weights, matrices_of, stack
from qmoe.model.source import Source, schemes_of, widths_of
from qmoe.model.tensor_names import matrix_names, packed_names

SHAPE = 16  # bytes of a matrix's weight_shape: two int64
# Bytes of a tensor in a safetensors header besides its name and the digits of numbers; and of a
# header besides its tensors: its length, spaces that fill it up, and metadata.
ENTRY = len('"":{"dtype":"BF16","shape":[,],"data_offsets":[,]},')
HEADER = 64


@dataclass(frozen=True)
class Stack:
    """Matrices that are quantized alike: [E, N, K], E = 1 for a linear.

    name: of the parameter. layer: of the decoder layer it is in, empty for lm_head. matrices: that
    the rows of one expert are stored as, such as gate and up. routed: whether tokens choose among
    them, or among linears like this one. widths: bits of each, where they are not the scheme's."""

    name: str
    layer: str
    shape: tuple[int, int, int]
    matrices: int
    scheme: Scheme
    routed: bool
    widths: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def weights(self) -> int:
        """Bytes of packed integers."""
        _, N, K = self.shape
        return sum(N * packed_words(K, bits) * 4 for bits in self.each_width())

    def each_width(self) -> tuple[int, ...]:
        """Bits of each matrix."""
        return self.widths or (self.scheme.bits,) * self.shape[0]

    def scales(self, scale_bytes: int) -> int:
        """Bytes of scales, of `scale_bytes` each, zero points and shapes."""
        E, N, K = self.shape
        groups = self.scheme.groups(K)
        total = E * N * groups * scale_bytes + E * self.matrices * SHAPE
        if not self.scheme.symmetric:
            rows = N // self.matrices
            each = sum(packed_words(rows, bits) for bits in self.each_width())
            total += self.matrices * each * 4 * groups
        return total

    def suffixes(self) -> tuple[str, ...]:
        """Of the tensors that a matrix is stored in."""
        return tuple(s for s in SUFFIXES if s != "_zero_point" or not self.scheme.symmetric)


@dataclass(frozen=True)
class Sizes:
    """Bytes by part of the model. scales: with zero points. other: norms, routers, biases and what
    else stays as it is. prediction: of layers that predict tokens beyond the next, but for scales.
    headers: of the safetensors files, at most."""

    experts: int
    dense: int
    scales: int
    embeddings: int
    lm_head: int
    other: int
    prediction: int
    headers: int

    @property
    def tensors(self) -> int:
        """Of all tensors' data."""
        model = self.experts + self.dense + self.embeddings + self.lm_head + self.other
        return model + self.scales + self.prediction


@dataclass(frozen=True)
class Unquantized:
    """Bytes of what stays as it is, in the dtype that it is written in. lm_head: 0 if it is the
    embedding, or quantized. in_layers: of `other`, those in decoder layers. prediction: of layers
    that predict tokens beyond the next, which are not loaded to run the model."""

    embeddings: int
    lm_head: int
    other: int
    in_layers: int
    prediction: int
    headers: int


def stacks(source: Source, config: QuantConfig) -> list[Stack]:
    """All that is quantized, layer by layer, and lm_head."""
    found = list(_in_layers(source, config))
    if config.lm_head is not None and source.structure.lm_head is not None:
        found.append(_linear(source, source.structure.lm_head, "", config.lm_head, False))
    return found


def with_experts(parts: Sequence[Stack], scheme: Scheme) -> list[Stack]:
    """The same with routed experts in another scheme."""
    return [replace(part, scheme=scheme) if part.routed else part for part in parts]


def _in_layers(source: Source, config: QuantConfig) -> Iterator[Stack]:
    for layer in source.structure.layers:
        unfused, widths = set(layer.unfused_linears()), widths_of(layer, config)
        for name, scheme in schemes_of(source, layer, config).items():
            module = source.model.get_submodule(name)
            if isinstance(module, nn.Linear):
                yield _linear(source, name, layer.name, scheme, name in unfused)
                continue
            for weight in expert_weights(module):
                E, N, K = stack(module, weight).shape
                rows = len(matrices_of(module, weight))
                own = widths.get(f"{name}.{weight}", ())
                yield Stack(f"{name}.{weight}", layer.name, (E, N, K), rows, scheme, True, own)


def _linear(source: Source, name: str, layer: str, scheme: Scheme, routed: bool) -> Stack:
    weight = source.model.get_submodule(name).weight
    N, K = weight.shape
    stored = len(packed_names(source.model, f"{name}.weight", weight))
    return Stack(f"{name}.weight", layer, (1, N, K), stored, scheme, routed)


def unquantized(source: Source, config: QuantConfig, parts: Sequence[Stack]) -> Unquantized:
    """What is left besides the parts that are quantized."""
    packed = {part.name for part in parts}
    embedding, head = f"{source.embedding()}.weight", f"{source.structure.lm_head}.weight"
    kinds = ("embeddings", "lm_head", "other", "in_layers", "prediction", "headers")
    found = dict.fromkeys(kinds, 0)
    layers = tuple(f"{layer.name}." for layer in source.structure.layers)
    carried = {name: [name] for name in source.weights.carried}
    for target, names in (source.weights.targets | carried).items():
        if target in packed:
            continue
        predicts = target in carried or source.of_prediction(target)
        usual = "prediction" if predicts else "other"
        part = {embedding: "embeddings", head: "lm_head"}.get(target, usual)
        nbytes = sum(written_bytes(source, name) for name in names)
        found[part] += nbytes
        found["in_layers"] += nbytes if part == "other" and target.startswith(layers) else 0
        for name in names:
            shape = source.checkpoint.lazy(name).get_shape()
            found["headers"] += len(name) + _entry(source, [int(size) for size in shape])
    if source.adds_lm_head(config):
        found["lm_head"] = found["embeddings"]
    return Unquantized(**found)


def _header(source: Source, part: Stack) -> int:
    """Bytes that a stack's tensors take in the headers, at their most."""
    count = None if part.name.endswith(".weight") else part.shape[0]
    names = matrix_names(source.model, part.name, count, part.matrices)
    suffixes = part.suffixes()
    each = sum(map(len, suffixes)) + len(suffixes) * _entry(source, part.shape[1:])
    return len(suffixes) * sum(map(len, names)) + len(names) * each


def _entry(source: Source, shape: Sequence[int]) -> int:
    """Bytes of a tensor of at most this shape in a header, besides its name."""
    offset = len(str(source.checkpoint.nbytes()))  # no file is larger than the original model
    return ENTRY + 2 * offset + sum(len(str(size)) + 1 for size in shape)


def written_bytes(source: Source, name: str) -> int:
    """Of a tensor that stays as it is: one that is stored in 8 or 4 bits is written in 16."""
    checkpoint = source.checkpoint
    return int(prod(checkpoint.lazy(name).get_shape()) * checkpoint.dtype(name).itemsize)


def sizes(source: Source, config: QuantConfig, parts: Sequence[Stack]) -> Sizes:
    """What the files take when the model is quantized by `config`: to the byte, but for their
    headers. parts: what `stacks` found."""
    scale_bytes = source.weight_dtype().itemsize
    head = sum(part.weights for part in parts if not part.layer)
    rest = unquantized(source, config, parts)
    headers = sum(_header(source, part) for part in parts)
    headers += HEADER * (len(source.structure.layers) + 1)
    running = [part for part in parts if not source.predicts(part.layer)]
    predicting = sum(part.weights for part in parts) - sum(part.weights for part in running)
    return Sizes(
        experts=sum(part.weights for part in running if part.routed),
        dense=sum(part.weights for part in running if part.layer and not part.routed),
        scales=sum(part.scales(scale_bytes) for part in parts),
        embeddings=rest.embeddings,
        lm_head=rest.lm_head + head,
        other=rest.other,
        prediction=rest.prediction + predicting,
        headers=headers + rest.headers,
    )
