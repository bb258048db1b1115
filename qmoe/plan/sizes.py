"""What the weights of a quantized model take, from the headers of its checkpoint alone."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from qmoe.config import QuantConfig, Scheme
from qmoe.format.packing import packed_words
from qmoe.model.experts import expert_weights, matrices_of, stack
from qmoe.model.source import Source, schemes_of
from qmoe.model.structure import Layer

SHAPE = 16  # bytes of a matrix's weight_shape: two int64
# Most bytes of a tensor in a safetensors header besides its name: dtype, shape and offsets.
ENTRY = 90


@dataclass(frozen=True)
class Stack:
    """Matrices that are quantized alike: [E, N, K], E = 1 for a linear. name: of the parameter.
    matrices: that the rows of one expert are stored as, such as gate and up. share: of a stack's
    bytes that a token reads when it is decoded: the experts it is sent to, or all of a linear."""

    name: str
    shape: tuple[int, int, int]
    matrices: int
    scheme: Scheme
    share: float

    @property
    def weights(self) -> int:
        """Bytes of packed integers."""
        E, N, K = self.shape
        return E * N * packed_words(K, self.scheme.bits) * 4

    def scales(self, scale_bytes: int) -> int:
        """Bytes of scales, of `scale_bytes` each, zero points and shapes."""
        E, N, K = self.shape
        groups = self.scheme.groups(K)
        total = E * N * groups * scale_bytes + E * self.matrices * SHAPE
        if not self.scheme.symmetric:
            rows = N // self.matrices
            total += E * self.matrices * packed_words(rows, self.scheme.bits) * 4 * groups
        return total

    def tensors(self) -> int:
        """Tensors that the stack is stored in."""
        return self.shape[0] * self.matrices * (3 if self.scheme.symmetric else 4)


@dataclass(frozen=True)
class Sizes:
    """Bytes by part of the model. scales: with zero points. other: norms, routers, biases and what
    else stays as it is. headers: of the safetensors files, about. per_token: of weights that a
    token reads when it is decoded."""

    experts: int
    dense: int
    scales: int
    embeddings: int
    lm_head: int
    other: int
    headers: int
    per_token: int

    @property
    def resident(self) -> int:
        """Of the weights in memory."""
        return self.experts + self.dense + self.scales + self.embeddings + self.lm_head + self.other


def stacks(source: Source, config: QuantConfig) -> Iterator[tuple[Layer, Stack]]:
    """All that is quantized inside the decoder layers."""
    chosen = getattr(source.model.config.get_text_config(), "num_experts_per_tok", None)
    for layer in source.structure.layers:
        unfused = set(layer.unfused_linears())
        for name, scheme in schemes_of(source, layer, config).items():
            module = source.model.get_submodule(name)
            if isinstance(module, nn.Linear):
                shape = (1, module.out_features, module.in_features)
                count = max(map(len, layer.unfused.values())) if name in unfused else 1
                share = (chosen or 1) / count if name in unfused else 1.0
                yield layer, Stack(f"{name}.weight", shape, 1, scheme, share)
                continue
            for weight in expert_weights(module):
                E, N, K = stack(module, weight).shape
                rows = len(matrices_of(module, weight))
                yield layer, Stack(f"{name}.{weight}", (E, N, K), rows, scheme, (chosen or 1) / E)


def sizes(source: Source, config: QuantConfig) -> Sizes:
    """What the weights take when the model is quantized by `config`: to the byte, but for the
    headers of the files."""
    scale_bytes = source.weight_dtype().itemsize
    experts = dense = scales = headers = 0
    read, packed = 0.0, set[str]()
    for layer, part in stacks(source, config):
        routed = part.name.rpartition(".")[0] in {*layer.experts, *layer.unfused_linears()}
        experts += part.weights if routed else 0
        dense += 0 if routed else part.weights
        scales += part.scales(scale_bytes)
        read += part.share * (part.weights + part.scales(scale_bytes))
        headers += part.tensors() * (ENTRY + len(part.name) + len(".weight_packed"))
        packed.add(part.name)
    return _with_rest(source, config, packed, (experts, dense, scales, headers, int(read)))


def _with_rest(
    source: Source, config: QuantConfig, packed: set[str], sums: tuple[int, int, int, int, int]
) -> Sizes:
    """The sizes with what is outside the decoder layers, or not quantized. sums: of experts, dense
    linears, scales, headers and what a token reads."""
    experts, dense, scales, headers, read = sums
    scale_bytes = source.weight_dtype().itemsize
    embedding, head = f"{source.embedding()}.weight", f"{source.structure.lm_head}.weight"
    embeddings = lm_head = other = 0
    for target, names in source.weights.targets.items():
        nbytes = sum(map(source.checkpoint.tensor_bytes, names))
        if target in packed:
            continue
        headers += sum(ENTRY + len(name) for name in names)
        if target == embedding:
            embeddings += nbytes
        elif target == head and config.lm_head is not None:
            N, K = source.model.get_submodule(str(source.structure.lm_head)).weight.shape
            stored = Stack(head, (1, N, K), 1, config.lm_head, 1.0)
            lm_head += stored.weights
            scales += stored.scales(scale_bytes)
            read += stored.weights + stored.scales(scale_bytes)
        elif target == head:
            lm_head += nbytes
            read += nbytes
        else:
            other += nbytes
            read += nbytes
    if not lm_head:  # tied: the head is the embedding, read whole
        read += embeddings
        if source.adds_lm_head(config):
            lm_head = embeddings
    return Sizes(experts, dense, scales, embeddings, lm_head, other, headers, read)
