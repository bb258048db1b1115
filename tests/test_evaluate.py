"""Metrics against their definitions."""

import math

import pytest
import torch

from qmoe.evaluate import Score, not_better, overall, score, summaries
from qmoe.progress import silent

IDS = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
BATCHES = [("a", IDS[:1]), ("b", IDS[1:])]


def uniform():
    return iter([torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)])


def sure_of_one():
    logits = torch.zeros(1, 4, 3)
    logits[..., 1] = math.log(2)  # probabilities 1/4, 1/2, 1/4
    return iter([logits, logits])


def test_perplexity_kl_and_agreement():
    scores = score(BATCHES, uniform(), {"m": sure_of_one()}, silent)
    result = summaries(scores, with_reference=True)
    assert result["original"]["a"] == pytest.approx({"perplexity": 3, "kl": 0, "agreement": 1})
    # Domain a: targets 1, 2, 1 have probability 1/2, 1/4, 1/2; b: 2, 0, 1 have 1/4, 1/4, 1/2.
    assert result["m"]["a"]["perplexity"] == pytest.approx(16 ** (1 / 3))
    assert result["m"]["b"]["perplexity"] == pytest.approx(32 ** (1 / 3))
    kl = math.log(1 / 3) - (2 * math.log(1 / 4) + math.log(1 / 2)) / 3
    assert result["m"]["a"]["kl"] == pytest.approx(kl, rel=1e-5)
    assert result["m"]["a"]["agreement"] == 0  # a tie goes to token 0 in the original
    mean = overall(result["m"])
    assert mean["perplexity"] == pytest.approx(512 ** (1 / 6)) and mean["kl"] == pytest.approx(
        kl, rel=1e-5
    )


def test_without_a_reference_only_perplexity_is_known():
    result = summaries(score(BATCHES, None, {"m": uniform()}, silent), with_reference=False)
    assert result == {"m": {d: {"perplexity": pytest.approx(3)} for d in "ab"}}


def test_where_a_model_is_not_better_is_said_with_its_noise():
    noisy = Score(windows=[1.0, 1.2, 0.8, 1.1])
    rival = {"x": Score(windows=[1.1, 1.0, 0.9, 1.0]), "y": noisy, "z": Score(windows=[2.0] * 4)}
    clear = Score(windows=[2.0, 2.2, 1.8, 2.1])
    notes = not_better({"x": noisy, "y": clear, "z": noisy}, rival, "rtn")
    assert len(notes) == 2
    assert (
        notes[0].startswith("x: perplexity is not below that of rtn") and "within noise" in notes[0]
    )
    assert notes[1].startswith("y: ") and "more than noise" in notes[1]
