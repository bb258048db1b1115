"""Quantize Mixture-of-Experts language models and run them packed.

import qmoe

qmoe.quantize("Qwen/Qwen3-30B-A3B", "qwen3-int4", qmoe.QuantConfig())
model, tokenizer = qmoe.load("qwen3-int4")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmoe._version import __version__
from qmoe.config import CalibrationConfig, QuantConfig, Scheme, expect
from qmoe.errors import QmoeError

if TYPE_CHECKING:
    import torch

__all__ = [
    "CalibrationConfig",
    "QmoeError",
    "QuantConfig",
    "Scheme",
    "__version__",
    "load",
    "quantize",
]


def quantize(
    src: str | Path,
    dst: str | Path,
    config: QuantConfig | None = None,
    *,
    statistics_from: Sequence[str | Path] = (),
    save_statistics: str | Path | None = None,
    device: "str | torch.device" = "cpu",
    max_memory: int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the MoE model in `src`, a local folder or a hub name, into the new folder `dst`.

    config: what to do; the default is 4-bit GPTQ experts, 8-bit dense linears. statistics_from:
    folders that `save_statistics` wrote for the same model; summed, they replace running text
    through the model. device: where layers are run and solved, "cpu" or a GPU ("cuda", "cuda:1").
    max_memory: bytes of the machine's memory it may take, None for what is free; activations that
    do not fit wait in files beside `dst`. progress: a bar on standard error, if that is a terminal.
    trust_remote_code: code that lies beside the weights may run, where transformers has no class
    for the model.
    Returns the report that is also written to `dst/qmoe_report.json`.

    Raises a QmoeError (see qmoe.errors) before any long work if something cannot work, and
    AuditError if the result is not what was promised. `dst` then does not exist.
    """
    expect("dst", dst, str, Path)
    expect("config", config, QuantConfig, type(None))
    expect("save_statistics", save_statistics, str, Path, type(None))
    expect("statistics_from", statistics_from, list, tuple)
    for folder in statistics_from:
        expect("statistics_from", folder, str, Path)
    # Imported here so that `import qmoe` does not wait for transformers.
    from qmoe.pipeline.quantize import quantize as run
    from qmoe.system.progress import shown

    with shown(progress):
        return run(
            src,
            dst,
            config or QuantConfig(),
            statistics_from=statistics_from,
            save_statistics=save_statistics,
            device=device,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
        )


def load(
    path: str | Path,
    dtype: "torch.dtype | None" = None,
    *,
    device: "str | torch.device" = "cpu",
    expert_memory: int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a quantized folder or hub name: a transformers model that runs packed, its tokenizer
    (None if the folder has none).

    dtype: of activations and unquantized weights; None is the checkpoint's own. device: "cpu", or
    "cuda" for the Triton kernels. expert_memory: bytes of the GPU for routed experts; the rest stay
    in host memory and come as they are needed. trust_remote_code: as for `quantize`. Raises
    CheckpointError if the folder is not a whole quantized model, ConfigError for a device that is
    not there, AuditError if an expert would not run packed.
    """
    expect("expert_memory", expert_memory, int, type(None))
    from qmoe.packed.load import load as run
    from qmoe.system.progress import shown

    with shown(progress):
        return run(
            path,
            dtype,
            device=device,
            expert_memory=expert_memory,
            trust_remote_code=trust_remote_code,
        )
