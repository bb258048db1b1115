"""Tasks of lm-evaluation-harness (the package lm-eval), on models that are in memory."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qmoe.errors import ConfigError
from qmoe.measure.baselines import check_counts

# What is kept of lm-eval's results, in its own shape.
KEPT = (
    "results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
    "n-samples",
)  # fmt: skip


class Tasks:
    """Tasks by their names in lm-eval, or as YAML files of its form. Raises ConfigError, before any
    model is loaded, where lm-eval is missing or does not know one.

    limit: examples of each task; None for all.
    """

    def __init__(self, names: Sequence[str], limit: int | None = None):
        try:
            from lm_eval.tasks import TaskManager
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tasks: the package lm-eval is not whole ({error.name} is missing); pip install "
                "'qmoe[eval]'"
            ) from error
        if limit is not None:
            check_counts(task_limit=limit)
        self.names = [str(Path(name).expanduser()) if _is_file(name) else name for name in names]
        self.limit = limit
        for name in self.names:
            if _is_file(name) and not Path(name).is_file():
                raise ConfigError(f"tasks: {name}: no such file")
        theirs = not all(map(_is_file, self.names))  # an index of all of lm-eval's takes seconds
        self._manager = TaskManager(include_defaults=theirs)
        known = set(self._manager.all_tasks)
        for name in self.names:
            if not _is_file(name) and name not in known:
                raise ConfigError(
                    f"tasks: lm-eval has no task {name!r}; `lm-eval ls tasks` lists them, and a "
                    "file of your own ends in .yaml"
                )

    def run(self, model: Any, tokenizer: Any, batch: int) -> dict[str, Any]:
        """The results on one model, as `lm_eval.simple_evaluate` gives them, with the keys of KEPT.
        ConfigError for a task that lm-eval cannot run."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device)
        )
        try:
            found = simple_evaluate(
                model=wrapped,
                tasks=list(self.names),
                task_manager=self._manager,
                limit=self.limit,
                batch_size=batch,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except (ValueError, KeyError, FileNotFoundError, TypeError, OSError) as error:
            raise ConfigError(
                f"tasks: lm-eval cannot run {', '.join(self.names)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        assert found is not None  # other processes than the first get None
        kept = {key: found[key] for key in KEPT if key in found}
        made: dict[str, Any] = json.loads(json.dumps(kept, default=str))
        return made


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def rows(results: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each task and metric, with a column for each model: the value and its standard
    error. results: what `run` gave, by model."""
    first = next(iter(results.values()))["results"]
    found = []
    for task, values in first.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not kind:
                continue
            error = f"{metric}_stderr,{kind}"
            cells = [_cell(each["results"].get(task, {}), key, error) for each in results.values()]
            found.append([f"{task} {metric}{'' if kind == 'none' else f' ({kind})'}", *cells])
    return found


def _cell(values: Mapping[str, Any], key: str, error: str) -> str:
    value, spread = values.get(key), values.get(error)
    if not isinstance(value, int | float):
        return "-"
    known = isinstance(spread, int | float) and not math.isnan(spread)
    return f"{value:.4f}" + (f" +- {spread:.4f}" if known else "")
