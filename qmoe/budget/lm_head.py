"""The output projection in the measuring pass, where it is to be quantized.

Its Hessian is whole when all text has run through the model. The last of the probes is one through
the original model whose output projection has PROBE bits.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

from torch import Tensor

from qmoe.budget.measurements import Measured
from qmoe.budget.solve_all import at_all
from qmoe.calibration.stats import LinearStats
from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.layer.at_hand import LayerSettings
from qmoe.pipeline.plan import Plan


@dataclass
class LmHead:
    """stats: of its inputs. other: the weight that it does not have for now, once it is solved."""

    name: str
    module: Any
    scheme: Scheme
    stats: LinearStats
    other: Tensor | None = field(default=None)

    @classmethod
    def of(cls, plan: Plan) -> Optional["LmHead"]:
        """None if it is not to be quantized."""
        name, scheme = plan.source.structure.lm_head, plan.config.lm_head
        if name is None or scheme is None:
            return None
        module = plan.source.model.get_submodule(name)
        return cls(name, module, scheme, LinearStats.empty(module.in_features))

    def collect(self, module: Any, args: tuple[Tensor]) -> None:
        """A hook: inputs of the text, but not of probes, which come when it is solved."""
        if self.other is None:
            self.stats.add(args[0].reshape(-1, args[0].shape[-1]))

    def solve(self, settings: LayerSettings) -> Measured:
        """Solve it at all widths; no text is collected from then on."""
        weight, hessian = self.module.weight.detach()[None], self.stats.hessian[None]
        errors, probe = at_all(settings, self.scheme, self.name, weight, hessian)
        self.other = dequantize(probe)[0].to(weight)
        return Measured(self.name, "", self.name, [int(self.stats.tokens)], errors, [1.0])

    def swap(self) -> None:
        """Put the weight of PROBE bits into the model, or the original's back."""
        assert self.other is not None
        before = self.module.weight.detach().clone()
        self.module.weight.data.copy_(self.other)
        self.other = before
