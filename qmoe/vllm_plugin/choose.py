"""Which folders qmoe takes in vLLM, and which it leaves to vLLM's own kernels.

Everything here is decided by `quantization_config` and needs no vLLM.
"""

from collections.abc import Mapping
from typing import Any

from qmoe.errors import UnsupportedModelError
from qmoe.format.compressed_tensors import PACKED, is_ours

METHOD = "qmoe"  # the name of the method in vLLM; config.json says "compressed-tensors"
MARLIN_BITS = (4, 8)


def takes(entry: Mapping[str, Any], asked: str | None, gpu: bool) -> bool:
    """Whether qmoe's method runs a folder with this `quantization_config` in vLLM.

    asked: vLLM's `--quantization`; "qmoe" and "compressed-tensors" decide. gpu: whether vLLM runs
    on a GPU, where its own Marlin kernels run what they can (`for_marlin`). UnsupportedModelError
    for EXL3's codes, which nothing in vLLM runs.
    """
    if entry.get("quant_method") == "exl3":
        raise UnsupportedModelError(
            "quantization_config: vLLM does not run EXL3's codes; exllamav3 and `qmoe.load` do. "
            "For vLLM, quantize the model without --format exl3"
        )
    if not is_ours(entry):
        return False
    if asked is not None:
        return asked == METHOD
    return not (gpu and for_marlin(entry))


def for_marlin(entry: Mapping[str, Any]) -> bool:
    """Whether vLLM's own kernels on GPUs run everything in a folder: integers of 4 or 8 bits
    without zero points or rotations, and no module with a scheme of its own, because vLLM wants one
    scheme for the matrices that it joins (its `compressed_tensors_wNa16.py`)."""
    if entry.get("format") != PACKED or entry.get("transform_config"):
        return False
    groups = list(entry["config_groups"].values())
    named = [t for g in groups for t in g["targets"] if "." in t and not t.startswith("re:")]
    weights = [group["weights"] for group in groups]
    return not named and all(w["symmetric"] and w["num_bits"] in MARLIN_BITS for w in weights)
