"""The output projection, where it is to be quantized: its inputs come when batches finish."""

from typing import Any

import torch
from torch import Tensor

from qmoe.calibration.stats import LinearStats
from qmoe.config import Method, QuantConfig
from qmoe.format.quantized import Quantized
from qmoe.layer.solve import check_errors, entry_of
from qmoe.model.source import Source
from qmoe.solvers.solve import solve
from qmoe.system import distributed


class Head:
    """Made before the batches run. skipped: how many finish first that are the original model's."""

    def __init__(self, source: Source, config: QuantConfig, skipped: int):
        assert config.lm_head is not None
        self.name, self.config, self.scheme = str(source.structure.lm_head), config, config.lm_head
        self.dtype = source.weight_dtype()
        self.module: Any = source.model.get_submodule(self.name)
        self.stats = LinearStats.empty(self.module.in_features)
        self.skipped = skipped
        self.module.register_forward_pre_hook(self._gather)

    def _gather(self, module: Any, args: tuple[Tensor]) -> None:
        if self.skipped:
            self.skipped -= 1
        else:
            self.stats.add(args[0].reshape(-1, args[0].shape[-1]))

    def solve(self) -> tuple[Quantized, dict[str, Any]]:
        """All batches of all ranks ran: the projection's weights, and what the report says."""
        distributed.all_reduce(self.stats.tokens)
        distributed.all_reduce(self.stats.hessian)
        # Nothing before it can take AWQ's scale: GPTQ serves it instead, and the record says so.
        method: Method = "gptq" if self.config.applies_awq else self.config.method
        weight: torch.Tensor = self.module.weight
        solved = solve(
            weight[None],
            self.stats.hessian[None],
            self.scheme,
            method,
            scale_dtype=self.dtype,
            act_order=self.config.act_order,
            damp=self.config.damp,
            search_grid=self.config.search_grid,
        )
        check_errors(self.name, solved)
        entry = entry_of(solved, single=True)
        record = {"name": self.name, "error": solved.error[0], "method": method}
        record["dense"] = {self.name: entry}
        return solved.quantized, record
