"""Metrics against their definitions."""

import json
import math

import pytest
import torch
from helpers import ONE_DOMAIN, save_random
from safetensors.torch import load_file, save_file

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.cli.commands import show_eval
from qmoe.errors import CalibrationError
from qmoe.measure.evaluate import evaluate
from qmoe.measure.scores import Score, not_better, overall, score, summaries
from qmoe.packed.load import Loading

IDS = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1]])
BATCHES = [("a", IDS[:1]), ("b", IDS[1:])]


def uniform():
    return iter([torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)])


def sure_of_one():
    logits = torch.zeros(1, 4, 3)
    logits[..., 1] = math.log(2)  # probabilities 1/4, 1/2, 1/4
    return iter([logits, logits])


def test_perplexity_kl_and_agreement():
    scores = score(BATCHES, uniform(), {"m": sure_of_one()})
    result = summaries(scores, with_reference=True)
    wanted = {"perplexity": 3, "loss": math.log(3), "kl": 0, "agreement": 1}
    assert result["original"]["a"] == pytest.approx(wanted)
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
    result = summaries(score(BATCHES, None, {"m": uniform()}), with_reference=False)
    wanted = pytest.approx({"perplexity": 3, "loss": math.log(3)})
    assert result == {"m": {d: wanted for d in "ab"}}


def test_where_a_model_is_not_better_is_said_with_its_noise():
    noisy = Score(samples=[1.0, 1.2, 0.8, 1.1])
    rival = {"x": Score(samples=[1.1, 1.0, 0.9, 1.0]), "y": noisy, "z": Score(samples=[2.0] * 4)}
    clear = Score(samples=[2.0, 2.2, 1.8, 2.1])
    notes = not_better({"x": noisy, "y": clear, "z": noisy}, rival, "rtn")
    assert len(notes) == 2
    assert (
        notes[0].startswith("x: perplexity is not below that of rtn") and "within noise" in notes[0]
    )
    assert notes[1].startswith("y: ") and "more than noise" in notes[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["original", "m"])
def test_a_token_without_numbers_is_an_error_and_never_agrees(value, who):
    """Two models that overflow alike predict nothing alike."""
    logits = torch.zeros(1, 4, 3)
    logits[0, 1] = value
    given = {"original": uniform(), "m": uniform()} | {who: iter([logits, logits])}
    with pytest.raises(CalibrationError, match=f"{who}: a: 1 of 3 tokens .*float16.*--dtype"):
        score(BATCHES, given["original"], {"m": given["m"]}, torch.float16)


@pytest.mark.parametrize(
    "dtype, remedy",
    [
        (torch.float16, "overflows in torch.float16; use bfloat16 or float32"),
        (torch.bfloat16, "overflows in torch.bfloat16; use float32"),
        (torch.float32, "no dtype is wider"),
    ],
)
def test_the_way_out_of_an_overflow_is_named(dtype, remedy):
    lost = torch.full((1, 4, 3), math.nan, dtype=dtype)
    with pytest.raises(CalibrationError, match=remedy):
        score(BATCHES, None, {"m": iter([lost, lost])})


def test_words_that_cannot_come_are_no_error():
    """Padding of the vocabulary, masked in both models."""

    def masked():
        logits = torch.zeros(1, 4, 5)
        logits[..., 3:] = -math.inf
        return iter([logits, logits])

    found = summaries(score(BATCHES, masked(), {"m": masked()}), with_reference=True)
    assert found["m"]["a"]["perplexity"] == pytest.approx(3)
    assert found["m"]["a"]["kl"] == 0 and found["m"]["a"]["agreement"] == 1


def wrong(nats):
    """Sure of word 0 alone; the targets of BATCHES have it once in b."""
    logits = torch.zeros(1, 4, 3)
    logits[..., 0] = nats
    return iter([logits, logits])


def test_a_loss_above_709_nats_has_an_infinite_perplexity():
    found = score(BATCHES, uniform(), {"m": wrong(2000.0), "rtn": wrong(1000.0)})
    result = summaries(found, with_reference=True)
    assert result["m"]["a"]["perplexity"] == math.inf and result["m"]["a"]["loss"] == 2000
    assert overall(result["m"])["perplexity"] == math.inf
    mild = {"x": {"perplexity": math.inf, "loss": 800.0}, "y": {"perplexity": 1.0, "loss": 0.0}}
    assert overall(mild)["perplexity"] == pytest.approx(math.exp(400))
    notes = not_better(found["m"], found["rtn"], "rtn")
    assert len(notes) == 2 and not any("nan" in note for note in notes)


def test_an_infinite_loss_is_not_within_noise():
    worst = Score(samples=[math.inf, math.inf])
    [note] = not_better({"x": worst}, {"x": Score(samples=[1.0, 2.0])}, "rtn")
    assert "infinite" in note and "nan" not in note


def test_json_has_no_nan_and_no_infinity(monkeypatch, capsys):
    from qmoe.cli import commands
    from qmoe.cli.main import main

    told = {"scores": {"m": {"a": {"perplexity": math.inf, "loss": 2000.0}}}, "all": [math.inf, 1]}
    monkeypatch.setattr(commands, "eval", lambda args: told)
    assert main(["eval", "folder", "--json"]) == 0

    def refuse(word):
        raise AssertionError(word)

    read = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert read["scores"]["m"]["a"] == {"perplexity": None, "loss": 2000.0}
    assert read["all"] == [None, 1]


def test_tables_where_rounding_lost_nothing(capsys):
    """A KL of 0, or an infinite one, has no ratio."""
    one = {"perplexity": math.inf, "loss": 800.0, "kl": 0.0, "agreement": 1.0}
    scores = {name: {"a": one} for name in ("original", "rtn", "qmoe")}
    means = {name: one for name in scores}
    nothing = {"bytes_on_disk": {}, "fallbacks": [], "not_better": []}
    show_eval({"scores": scores, "overall": means, **nothing})
    assert "inf" in capsys.readouterr().out


def test_an_overflow_of_a_real_model_is_refused_in_its_dtype(tmp_path, demo):
    """Experts too loud for float16 but not for bfloat16."""
    source = save_random("mixtral", tmp_path / "source", demo, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith(("w1.weight", "w3.weight")):
            tensors[name] *= 1000
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantized = tmp_path / "q"
    qmoe.quantize(source, quantized, QuantConfig("rtn", Scheme(8, 32)), progress=False)
    options = {"against": source, "text": ONE_DOMAIN, "samples": 1, "seqlen": 32}
    with pytest.raises(CalibrationError, match="original: .*float16.*bfloat16 or float32"):
        evaluate(quantized, **options, loading=Loading(torch.float16))
    assert torch.is_grad_enabled()  # also while the error holds on to what ran
    found = evaluate(quantized, **options, loading=Loading())
    assert torch.is_grad_enabled()
    assert math.isfinite(found["overall"]["qmoe"]["perplexity"])
