"""How far a layer's output is from what it was."""

import math
from typing import Any

from torch import Tensor

from qmoe.errors import CalibrationError
from qmoe.system import distributed


def hidden(output: Any) -> Tensor:
    """The hidden states of a layer's output, which some families wrap in a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def output_error(name: str, outputs: list[Any], reference: list[Any]) -> float:
    """`relative_rms` of layer `name`; CalibrationError where it is no number."""
    error = relative_rms(outputs, reference)
    if not math.isfinite(error):
        raise CalibrationError(
            f"{name}: its output has NaN or Inf on the calibration text; the model overflows"
        )
    return error


def relative_rms(outputs: list[Any], reference: list[Any]) -> float:
    """RMS of the difference over RMS of the reference, all batches that it has together, and of all
    ranks; 0 where it has none."""
    both = zip(outputs, reference, strict=True)
    pairs = [(hidden(a), hidden(b)) for a, b in both if b is not None]
    errors = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    sizes = sum(float(b.float().square().sum()) for _, b in pairs)
    lost, total = (sum(distributed.all_gather_object(part)) for part in (errors, sizes))
    return (lost / total) ** 0.5 if total else 0.0
