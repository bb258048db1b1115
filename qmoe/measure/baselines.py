"""What qmoe is compared with: the original in 16 bits, round-to-nearest, and bitsandbytes NF4.

bitsandbytes itself does not quantize fused experts; here it is applied to each expert's matrices,
so that the comparison is with NF4 and not with 16-bit experts.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.checkpoint.remote_code import needs_code
from qmoe.config import QuantConfig
from qmoe.errors import ConfigError, UnsupportedModelError
from qmoe.kernels.moe import moe_forward
from qmoe.model import experts
from qmoe.model.adapters import adapt
from qmoe.model.structure import find
from qmoe.packed.report import read_report
from qmoe.pipeline.quantize import quantize
from qmoe.system.progress import is_shown

NAME = "qmoe_nf4"
BASELINES = ("rtn", "nf4")


def check_baselines(baselines: Sequence[str], against: str | Path | None) -> None:
    """Raises ConfigError for an unknown baseline, or without an original to make it from."""
    unknown = [b for b in baselines if b not in BASELINES]
    if unknown:
        raise ConfigError(f"baseline: expected some of {BASELINES}, got {unknown[0]!r}")
    if baselines and against is None:
        raise ConfigError("baselines are made from the original model; give it with --against")


def check_counts(**counts: int) -> None:
    """Raises ConfigError unless each of these named numbers is at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")


def original(folder: ModelFolder, dtype: torch.dtype | None = None) -> Any:
    """The unquantized model as transformers loads it."""
    own = needs_code(folder.path, folder.trust_remote_code)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder.path, dtype=dtype or "auto", trust_remote_code=own
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval().requires_grad_(False)


@contextmanager
def rounded_to_nearest(path: Path, against: ModelFolder) -> Iterator[ModelFolder]:
    """A temporary folder with the original rounded to nearest in the schemes of `path`, but for a
    rotation."""
    config = QuantConfig.from_dict(read_report(path)["config"]).rotated_by(0)
    config = replace(config.rounded_to_nearest(), rotate="off")
    with tempfile.TemporaryDirectory(prefix="qmoe-rtn-") as folder:
        rtn, trust = Path(folder) / "rtn", against.trust_remote_code
        quantize(against.path, rtn, config, progress=is_shown(), trust_remote_code=trust)
        yield ModelFolder(rtn, trust)


def bytes_on_disk(folder: Path) -> int:
    """Of a folder's weights."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


class Nf4Stack(nn.Module):
    """Matrices [E, N, K] in bitsandbytes NF4 with blocks of 64, one quantization state each."""

    def __init__(self, weight: Tensor):
        super().__init__()
        from bitsandbytes import functional  # here, because importing it prints warnings on CPUs

        self.shape = tuple(weight.shape)
        made = [functional.quantize_4bit(w, blocksize=64, quant_type="nf4") for w in weight]
        self.packed = [packed for packed, _ in made]
        self.states = [state for _, state in made]

    def matmul(self, x: Tensor, e: int) -> Tensor:
        from bitsandbytes import matmul_4bit

        y: Tensor = matmul_4bit(x, self.packed[e].t(), quant_state=self.states[e])
        return y

    def nbytes(self) -> int:
        return sum(
            p.nbytes + s.absmax.nbytes for p, s in zip(self.packed, self.states, strict=True)
        )


def _forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    def activation(product: Tensor) -> Tensor:
        return experts.stack_activation(self, product)

    names = experts.expert_weights(self)
    biases = (experts.bias_stack(self, names[0]), experts.bias_stack(self, names[1]))
    first, second = self.nf4_first, self.nf4_second
    ids, routing_weights = top_k_index, top_k_weights
    return moe_forward(hidden_states, ids, routing_weights, first, second, activation, biases)


class Nf4Linear(nn.Module):
    """A dense linear in NF4."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.stack, self.bias = Nf4Stack(linear.weight[None]), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.stack.matmul(x.reshape(-1, x.shape[-1]), 0).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def nf4(folder: ModelFolder, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """The original with experts and the dense linears that qmoe quantizes in NF4."""
    model = original(folder, dtype).to(device)
    adapt(model)
    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    for layer in find(model).layers:
        for name in layer.experts:
            module = model.get_submodule(name)
            if module.has_post_expert_norm:
                raise UnsupportedModelError(f"{name}: no NF4 baseline for normed expert outputs")
            first, second = experts.expert_weights(module)
            module.nf4_first = Nf4Stack(experts.stack(module, first).contiguous())
            module.nf4_second = Nf4Stack(experts.stack(module, second).contiguous())
            delattr(module, first)
            delattr(module, second)
            module.config._experts_implementation = NAME
        for name in [*layer.dense, *layer.unfused_linears()]:
            model.set_submodule(name, Nf4Linear(model.get_submodule(name)))
    return model
