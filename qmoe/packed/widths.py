"""Bits of every matrix of a quantized folder, from its config.json and headers."""

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.packed.skeleton import open_packed


def widths(folder: ModelFolder) -> dict[str, list[int]]:
    """Bits of each expert's matrix by stack, and of each linear (one) by module, in the order of
    the model. CheckpointError for a folder that is not quantized."""
    found = {}
    for name, module in open_packed(folder, predicting=True).model.named_modules():
        for weight, declared in getattr(module, "_qmoe_stored", {}).items():
            experts = declared.shape[0] if len(declared.shape) == 3 else 1
            each = declared.widths or (declared.scheme.bits,) * experts
            found[name if weight == "weight" else f"{name}.{weight}"] = list(each)
    return found
