"""Routed experts in vLLM whose weights stay packed, each with its own bits.

vLLM routes, computes shared experts and sums over processes; this computes the routed experts that
this process has, or its part of every expert.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from qmoe.config import Scheme
from qmoe.errors import CheckpointError, UnsupportedModelError
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.format.hadamard import rotate
from qmoe.format.packing import StoredWords
from qmoe.kernels.activation import Activation
from qmoe.vllm_plugin.forms import activation_of, packed
from qmoe.vllm_plugin.matrices import check_columns, cut_columns, cut_rows, join_rows, read
from qmoe.vllm_plugin.places import keep, place, take


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Runs the routed experts of one layer on packed weights.

    first, second: schemes of experts' first (gate, up) and second (down) matrices, one of each kind
    that there is.
    """

    def __init__(self, moe: Any, first: Sequence[Scheme], second: Sequence[Scheme]):
        super().__init__(moe)
        self.first, self.second = first, second
        self.rotations = (first[0].rotation, second[0].rotation)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Places for the checkpoint's tensors. UnsupportedModelError for experts that qmoe cannot
        run in vLLM, ConfigError if this process cannot have its part of them."""
        where, size = layer.layer_name, intermediate_size_per_partition
        self._check(layer, size)
        layer.qmoe_dtype, layer.qmoe_size = params_dtype, size
        if self._processes(layer) > 1:
            for scheme in self.second:
                check_columns(scheme, size * self._processes(layer), size, where)
        for matrix in ("w13", "w2"):
            for suffix in SUFFIXES:
                loader = partial(_load, layer, suffix)
                place(layer, f"{matrix}_weight", suffix, params_dtype, loader)
        if self.moe.has_bias:
            _place_gpt_oss(layer, num_experts, hidden_size)

    def _check(self, layer: Any, size: int) -> None:
        lora, reason = get_current_vllm_config().lora_config, ""
        if lora is not None and "experts" in (lora.target_modules or ["experts"]):
            raise UnsupportedModelError(
                f"{layer.layer_name}: qmoe takes no adapters on experts in vLLM; name the linears "
                "that adapters are on, --lora-target-modules q_proj k_proj v_proj o_proj, or run "
                "the model with transformers and PEFT"
            )
        if self.moe.hidden_dim != self.moe.hidden_dim_unpadded:
            reason = "experts whose hidden size vLLM pads"
        elif size * self._processes(layer) != self.moe.intermediate_size:
            reason = "experts whose intermediate size vLLM pads"
        if reason:
            raise UnsupportedModelError(
                f"{layer.layer_name}: qmoe does not run {reason} in vLLM; run the model with "
                "`qmoe.load`"
            )
        layer.qmoe_between = activation_of(
            layer.activation.value,
            layer.swiglu_alpha,
            layer.swiglu_beta,
            layer.swiglu_limit,
            layer.layer_name,
        )

    @staticmethod
    def _processes(layer: Any) -> int:
        """Among how many processes each expert is cut; 1 if experts are shared out whole."""
        return int(layer.moe_config.moe_parallel_config.tp_size)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack what has come. CheckpointError if it is not what the layer needs."""
        stored = take(layer, layer.w13_weight_packed.device)
        if not stored and hasattr(layer, "qmoe_stack"):
            return
        firsts, seconds = [], []
        for e in range(layer.local_num_experts):
            where = f"{layer.layer_name}, expert {e} of this process"
            gated = layer.moe_config.is_act_and_mul
            rows = [stored.get((e, name), {}) for name in (("w1", "w3") if gated else ("w1",))]
            first = join_rows([self._rows(layer, read(each, where)) for each in rows])
            if len(first) > 1:
                raise CheckpointError(
                    f"{where}: gate and up are stored in different ways, {first[0].scheme} and "
                    f"{first[1].scheme}; run the model with `qmoe.load`"
                )
            firsts += first
            seconds.append(self._columns(layer, read(stored.get((e, "w2"), {}), where), where))
        between = layer.qmoe_between
        fused = between if isinstance(between, Activation) and not any(self.rotations) else None
        layer.qmoe_stack = packed([firsts, seconds], layer.qmoe_dtype, fused, layer.layer_name)
        layer.qmoe_biases = _take_gpt_oss(layer) if self.moe.has_bias else (None, None)

    def _rows(self, layer: Any, matrix: StoredWords) -> StoredWords:
        if self._processes(layer) == 1:
            return matrix
        return cut_rows(matrix, layer.moe_config.tp_rank * layer.qmoe_size, layer.qmoe_size)

    def _columns(self, layer: Any, matrix: StoredWords, where: str) -> StoredWords:
        if self._processes(layer) == 1:
            return matrix
        start = layer.moe_config.tp_rank * layer.qmoe_size
        return cut_columns(matrix, start, layer.qmoe_size, where)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Nothing: it belongs to vLLM's own kernels."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [T, H], topk_weights and topk_ids [T, A] to [T, H]: the weighted sum over the experts
        that this process has. vLLM computes the shared experts itself."""
        first, second = self.rotations
        ids = topk_ids
        if layer.expert_map is not None:
            ids = layer.expert_map[ids.long()]
            ids = torch.where(ids < 0, layer.local_num_experts, ids)

        def between(product: Tensor) -> Tensor:
            return rotate(layer.qmoe_between(product), second)

        if layer.apply_router_weight_on_input:  # of the one expert that a token has
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        y: Tensor = layer.qmoe_stack.experts(
            rotate(x, first), ids, topk_weights, between, layer.qmoe_biases
        )
        return y


def _place_gpt_oss(layer: Any, experts: int, hidden_size: int) -> None:
    """Places by the names of the checkpoint, where vLLM's loader of gpt-oss puts tensors of single
    experts (gpt_oss.py), and for its biases, of which gate and up lie in turns."""
    for e in range(layer.global_num_experts):
        local = layer._map_global_expert_id_to_local_expert_id(e)
        if local == -1:
            continue
        matrices = nn.Module()
        for shard, name in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            matrix = nn.Module()
            for suffix in SUFFIXES:
                loader = partial(_keep_one, layer, (local, shard), suffix)
                place(matrix, "weight", suffix, layer.qmoe_dtype, loader)
            matrices.add_module(name, matrix)
        layer.add_module(str(e), matrices)
    for name, width in (("w13_bias", 2 * layer.qmoe_size), ("w2_bias", hidden_size)):
        zeros = torch.zeros(experts, width, dtype=layer.qmoe_dtype)
        layer.register_parameter(name, nn.Parameter(zeros, requires_grad=False))


def _keep_one(layer: Any, matrix: tuple[int, str], suffix: str, _: Tensor, tensor: Tensor) -> None:
    keep(layer, matrix, suffix, tensor)


def _take_gpt_oss(layer: Any) -> tuple[Tensor, Tensor]:
    """The biases as the kernels take them, gates before ups; the places are removed."""
    for name in [name for name, _ in layer.named_children() if name.isdigit()]:
        delattr(layer, name)
    first = layer.w13_bias.data
    return torch.cat([first[:, ::2], first[:, 1::2]], 1), layer.w2_bias.data


def _load(
    layer: Any,
    suffix: str,
    param: Tensor,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """vLLM's call for a tensor of one expert, by its number among all."""
    local = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if local != -1:
        keep(layer, (local, shard_id), suffix, loaded_weight)
    return local != -1 if return_success else None
