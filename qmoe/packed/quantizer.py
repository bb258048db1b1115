"""qmoe's quantizer in transformers: `from_pretrained` of a folder that qmoe wrote runs packed.

transformers chooses a quantizer by `quant_method` in config.json. qmoe's folders say
"compressed-tensors" there, so that programs without qmoe read them, and name qmoe as the producer
beside it. After `import qmoe` the configuration of that method is read by the class below, which
keeps to transformers' own one for everything that another program made.

This file is imported while transformers is (system/on_import.py): it imports nothing of qmoe that
needs a whole transformers before a model is loaded.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig, QuantizationConfigMixin

from qmoe.errors import ConfigError, UnsupportedModelError

METHOD = "qmoe"  # in transformers; config.json says "compressed-tensors"
CHOICES = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that leave it to us


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a folder that qmoe wrote; `to_dict` gives it as it was read."""

    def __init__(self, **entry: Any):
        self.quant_method = METHOD
        self.entry = entry

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.entry)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class ByProducer(CompressedTensorsConfig):  # type: ignore[misc]
    """Reads `quantization_config` of method "compressed-tensors": qmoe's as PackedConfig, any other
    as transformers does."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        from qmoe.format.compressed_tensors import is_ours

        ours = is_ours(config_dict)
        kind = PackedConfig if ours else CompressedTensorsConfig
        return kind.from_dict(config_dict, *args, **kwargs)


# `register_quantization_config` takes no name twice.
AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = ByProducer


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the packed model that `qmoe.load` builds, with the model, the dtype and the device
    that `from_pretrained` was asked for.

    transformers loads no tensor by itself, since none of its rules knows packed experts: it is
    shown an empty state dict, and everything is filled in afterwards (packed/fill.py). Raises what
    `qmoe.load` raises, but for the audit.
    """

    requires_calibration = True

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.device: Any = "cpu"
        self.places: dict[str, torch.device] = {}
        self.choose = False

    def update_attn_implementation(self, config: Any) -> Any:
        """The configuration as it is; called before transformers chooses what was not asked for."""
        self.attention_is_ours = config._attn_implementation is None
        return config

    def update_device_map(self, device_map: Any) -> dict[str, Any] | None:
        """One device for transformers, which loads nothing: the first. Devices of modules are kept
        for `fill`. ConfigError for a device that is not there."""
        from qmoe.runtime.run_on import usable_device

        if device_map is None:
            return None
        self.choose = device_map in CHOICES and torch.cuda.device_count() > 0
        if device_map in CHOICES:
            device_map = {"": "auto"}
        self.places = {
            name: usable_device(f"cuda:{device}" if isinstance(device, int) else device)
            for name, device in device_map.items()
        }
        self.device = next(iter(self.places.values()))
        return {"": self.device}

    def _run_on(self, source: Any) -> Any:
        """Where the packed model of a folder runs."""
        from qmoe.runtime.run_on import RunOn
        from qmoe.runtime.spread import fill_up

        places = self.places
        if self.choose:
            layers = {layer.name: 0 for layer in source.structure.layers}
            stored = {name: source.checkpoint.tensor_bytes(name) for name in source.weights.names()}
            for layer in layers:
                layers[layer] = sum(stored.pop(name) for name in source.weights.sources(layer))
            gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
            free = [(gpu, torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus]
            places = fill_up(layers, sum(stored.values()), free)
        devices = set(places.values())
        if len(devices) > 1:
            return RunOn(self.device, places=places)
        return RunOn(devices.pop() if devices else torch.device("cpu"))

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ConfigError("from_pretrained: a packed model is read from a folder, not a state")
        self.folder = Path(checkpoint_files[0]).parent
        for tensor in model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # or it would be filled with random numbers
        self.shown = model.register_state_dict_post_hook(_show_nothing)
        # The checkpoint's tensors are compared with the model by `check_complete` instead.
        model._keys_to_ignore_on_load_unexpected = {""}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from qmoe.checkpoint.model_config import model_class
        from qmoe.checkpoint.model_folder import ModelFolder
        from qmoe.fused.attention import fuse_attention
        from qmoe.model.source import check_complete
        from qmoe.packed.fill import fill
        from qmoe.packed.loaded import guard
        from qmoe.packed.skeleton import open_packed_in

        if model.is_custom_code():  # transformers loses what its constructors compute
            raise UnsupportedModelError(
                f"{self.folder}: the model is code of its own; load it with "
                "qmoe.load(..., trust_remote_code=True)"
            )
        self.shown.remove()
        del model._keys_to_ignore_on_load_unexpected
        # Noted by transformers of a state dict without tensors; names on disk depend on it.
        vars(model).pop("_weight_conversions", None)
        whole = model_class(model.config)
        if not isinstance(model, whole):
            raise UnsupportedModelError(
                f"{self.folder}: holds a {whole.__name__}, a {type(model).__name__} was asked for; "
                "load it as what it is, with the auto class of its kind or with qmoe.load"
            )
        source = open_packed_in(model, ModelFolder(self.folder), model.config.dtype)
        check_complete(source.weights)
        run = self._run_on(source)
        fill(source, model.config.dtype, run)
        if self.attention_is_ours and not run.places:
            fuse_attention(model, run)
        guard(source)
        return model

    @property
    def is_trainable(self) -> bool:
        """Gradients go through packed weights to adapters (runtime/gradients.py)."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        """Whether it can be saved: as the folder that it was loaded from (packed/save.py)."""
        return True


def _show_nothing(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.clear()


def attach(model: Any, entry: dict[str, Any]) -> None:
    """Tell a model that was not loaded by `from_pretrained` what it is. entry: the folder's
    `quantization_config`."""
    quantizer = PackedQuantizer(PackedConfig(**entry))
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = METHOD
    model.config.quantization_config = quantizer.quantization_config
