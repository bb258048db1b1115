"""Quantize Mixture-of-Experts language models and run them packed.

import qmoe

qmoe.quantize("Qwen/Qwen3-30B-A3B", "qwen3-int4")
model, tokenizer = qmoe.load("qwen3-int4")

After `import qmoe`, transformers' own `from_pretrained` runs such a folder packed too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qmoe._version import __version__
from qmoe.config import CalibrationConfig, QuantConfig, Scheme
from qmoe.errors import QmoeError
from qmoe.system.on_import import when_imported

if TYPE_CHECKING:
    from qmoe.budget.quantize import Budget, quantize_to_size
    from qmoe.html_report.report import report
    from qmoe.packed.load import load
    from qmoe.pipeline.in_memory import quantize_model
    from qmoe.pipeline.quantize import quantize

__all__ = [
    "Budget",
    "CalibrationConfig",
    "QmoeError",
    "QuantConfig",
    "Scheme",
    "__version__",
    "load",
    "quantize",
    "quantize_model",
    "quantize_to_size",
    "report",
]


def _register() -> None:
    """Tell transformers of qmoe's quantizer."""
    import_module("qmoe.packed.quantizer")


when_imported("transformers.quantizers.auto", _register)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """What works on models, imported when it is first asked for, so that `import qmoe` does not
        wait for torch and transformers."""
        if name == "load":
            from qmoe.packed.load import load

            return load
        if name == "quantize":
            from qmoe.pipeline.quantize import quantize

            return quantize
        if name == "quantize_model":
            from qmoe.pipeline.in_memory import quantize_model

            return quantize_model
        if name == "report":
            from qmoe.html_report.report import report

            return report
        if name in ("Budget", "quantize_to_size"):
            from qmoe.budget import quantize as budget

            return getattr(budget, name)
        raise AttributeError(f"module 'qmoe' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
