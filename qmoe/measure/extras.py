"""What `evaluate` does besides scoring text: tasks, greedy answers, and decision tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qmoe.checkpoint.model_config import generation_config
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import ConfigError
from qmoe.measure.answers import answers, as_batches, prompts, summary
from qmoe.measure.baselines import original
from qmoe.measure.logits import resident
from qmoe.measure.scores import Score, score
from qmoe.measure.tails import Decisions
from qmoe.measure.tasks import Tasks


@dataclass(frozen=True)
class Extras:
    """routing: count where tokens go. tasks: names of lm-eval's, or YAML files; task_limit:
    examples of each, None for all. answers: let all models answer a few prompts (answers.py).
    decision_tokens: to be watched beside those that are found (tails.py). Tasks and answers load
    the original whole."""

    routing: bool = False
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    answers: bool = False
    decision_tokens: Sequence[str] = ()

    def check(self, against: Any) -> Tasks | None:
        """The tasks, known to lm-eval. ConfigError for what cannot work."""
        if against is None and self.answers:
            raise ConfigError("answers: are compared with the original's; give it with --against")
        if against is None and self.decision_tokens:
            raise ConfigError("decision tokens: need the original; give it with --against")
        return Tasks(self.tasks, self.task_limit) if self.tasks else None


def with_whole_original(
    extras: Extras,
    tasks: Tasks | None,
    models: dict[str, Any],
    other: ModelFolder | None,
    tokenizer: Any,
    decisions: Decisions,
    batch: int,
) -> tuple[dict[str, Any], list[dict[str, dict[str, Score]]]]:
    """The results of tasks and answers by their names; and the scores of the original's answers,
    at which decisions are looked at too."""
    if tasks is None and not extras.answers:
        return {}, []
    every = dict(models)
    if other is not None:
        every = {"original": original(other, models["qmoe"].config.dtype)} | every
    found: dict[str, Any] = {}
    if tasks is not None:
        found["tasks"] = {name: tasks.run(m, tokenizer, batch) for name, m in every.items()}
    if not extras.answers or other is None:
        return found, []
    ends, questions = _ends(other, tokenizer), prompts(tokenizer)
    given = {name: answers(model, questions, ends) for name, model in every.items()}
    found["answers"] = {
        name: summary(mine, given["original"], ends) for name, mine in given.items()
    }
    batches = as_batches(questions, given["original"])
    logits = {name: resident(model, batches) for name, model in every.items()}
    reference = logits.pop("original")
    return found, [score(batches, reference, logits, watched=decisions.ids)]


def _ends(folder: ModelFolder, tokenizer: Any) -> set[int]:
    """The tokens that end an answer, by generation_config.json and the tokenizer."""
    said = getattr(generation_config(folder.path), "eos_token_id", None)
    ends = said if isinstance(said, list) else [said]
    return {int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None}
