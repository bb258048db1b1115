"""The output projection, where it is to be quantized: its inputs come when batches finish."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from qmoe.calibration.stats import LinearStats
from qmoe.config import Method
from qmoe.format.trellis import Stack
from qmoe.layer.records import LayerRecord, MatrixRecord
from qmoe.layer.solve import solve_as, solve_coded
from qmoe.model.hooks import hooked
from qmoe.pipeline.plan import Plan
from qmoe.pipeline.self_text import CalibrationText
from qmoe.system import distributed


@contextmanager
def collecting_lm_head(plan: Plan, text: CalibrationText) -> Iterator[LinearStats | None]:
    """What the output projection is given while batches finish; None if it is not to be
    quantized."""
    if plan.config.lm_head is None:
        yield None
        return
    module: Any = plan.source.model.get_submodule(str(plan.source.structure.lm_head))
    stats, finished = LinearStats.empty(module.in_features), itertools.count()
    # If layers are tuned, the batches of the original model finish first.
    skipped = len(text.batches(plan.config.calibration)) if plan.config.tune else 0

    def collect(module: Any, args: tuple[Tensor]) -> None:
        if next(finished) >= skipped:
            stats.add(args[0].reshape(-1, args[0].shape[-1]))

    with hooked([(module, collect)]):
        yield stats


def solve_lm_head(plan: Plan, stats: LinearStats) -> tuple[Stack, LayerRecord]:
    """All batches of all ranks ran: the projection's weights, and what the report says."""
    distributed.all_reduce(stats.tokens)
    distributed.all_reduce(stats.hessian)
    config, name = plan.config, str(plan.source.structure.lm_head)
    assert config.lm_head is not None
    # Nothing before it can take AWQ's scale: GPTQ serves it instead, and the record says so.
    method: Method = "gptq" if config.applies_awq else config.method
    weight: Tensor = plan.source.model.get_submodule(name).weight
    dtype = plan.source.weight_dtype()
    given = (name, weight[None], stats.hessian[None], config.lm_head)
    if config.format == "exl3":
        solved = solve_coded(config, *given)
    else:
        solved = solve_as(config, method, *given, dtype)
    record = MatrixRecord.of(solved)
    return solved.quantized, LayerRecord(name, solved.error[0], dense={name: record}, method=method)
