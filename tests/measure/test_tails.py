"""Percentiles, worst tokens and decision tokens, with planted faults."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import save_random
from torch import Tensor

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.budget.guard import better
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli.commands import show_eval
from qmoe.cli.main import main
from qmoe.errors import ConfigError
from qmoe.measure.answers import as_batches, repeated, summary
from qmoe.measure.scores import score
from qmoe.measure.tails import Decisions, decided, decision_tokens, percentiles, tails

WORDS = ["a", "b", "c", "</think>"]
END = 3


class Words:
    """A tokenizer of four words."""

    eos_token_id = None
    chat_template = "{{ x }}</think>"
    added_tokens_decoder = {END: SimpleNamespace(content="</think>")}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def convert_ids_to_tokens(self, token: int) -> str:
        return WORDS[token]

    def decode(self, ids: Tensor) -> str:
        return " ".join(WORDS[i] for i in ids.tolist())


IDS = torch.tensor([[0, 1, 2, 3, 0, 1], [1, 1, 0, 2, 3, 2]])


def logits(stops: float, elsewhere: float = 0.0) -> Tensor:
    """Every word is as likely, but for `</think>` after a c, which has the probability `stops`."""
    p = torch.full((*IDS.shape, 4), (1 - elsewhere) / 3)
    p[..., END] = elsewhere
    after = IDS == 2
    p[after] = (1 - stops) / 3
    p[..., END][after] = stops
    return p.log()


def scored(stops: float) -> dict:
    batches = [("talk", IDS)]
    reference, model = iter([logits(0.75)]), iter([logits(stops)])
    return score(batches, reference, {"m": model}, watched=torch.tensor([END]))


def test_a_model_that_does_not_stop_thinking_is_seen():
    """The probability of `</think>` falls from 0.75 to 0.04 where it is to come, and nowhere else;
    the mean hides that among other tokens."""
    decisions = decision_tokens(Words(), 4)
    assert list(decisions.names) == ["</think>"]
    found = decided(decisions, [scored(0.04)])["m"]["</think>"]
    assert found["places"] == 2  # the third c is the last token, after which nothing is predicted
    assert found["original"] == pytest.approx(0.75) and found["probability"] == pytest.approx(0.04)
    kl = 0.75 * torch.tensor(0.75 / 0.04).log() + 0.25 * torch.tensor(0.25 / 0.96).log()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    worst = tails([("talk", IDS)], scored(0.04), Words())["m"]["worst"]
    assert {(w["context"], w["token"]) for w in worst[:2]} == {
        ("a b c", "</think>"),
        ("b b a c", "</think>"),
    }
    whole = decided(decisions, [scored(0.75)])["m"]["</think>"]
    assert whole["probability"] == pytest.approx(0.75) and whole["kl"] == pytest.approx(0, abs=1e-6)


def test_percentiles_against_their_definition():
    kl = torch.arange(1, 1002).float()[torch.randperm(1001)]
    assert percentiles(kl) == {"p95": 951, "p99": 991, "max": 1001}
    assert percentiles(torch.tensor([2.0])) == {"p95": 2, "p99": 2, "max": 2}


def test_the_worst_token_is_found_in_its_batch_and_domain():
    batches = [("x", IDS[:1]), ("y", IDS[1:]), ("x", IDS[1:])]
    base = [torch.zeros(1, 6, 4) for _ in batches]
    planted = [one.clone() for one in base]
    planted[2][0, 1, 0] = 9.0  # after "b b" of the second batch of x
    found = tails(batches, score(batches, iter(base), {"m": iter(planted)}), Words())["m"]
    (worst, *_) = found["worst"]
    assert (worst["domain"], worst["context"], worst["token"]) == ("x", "b b", "a")
    assert found["kl"]["x"]["max"] == found["kl"]["all"]["max"] == pytest.approx(worst["kl"])
    assert found["kl"]["y"]["max"] == 0


def test_decision_tokens_of_a_tokenizer():
    found = decision_tokens(Words(), 4, ["b"])
    assert found.ids.tolist() == [1, END] and list(found.names) == ["b", "</think>"]
    assert decision_tokens(Words(), END).names == []
    for text, rows in (("a b", 4), ("c", 2)):
        with pytest.raises(ConfigError, match=f"expected one token of the model, '{text}' is"):
            decision_tokens(Words(), rows, [text])
    nothing = Decisions(torch.tensor([0]), ["a"])
    unlikely = torch.zeros(2, 6, 4)
    unlikely[..., 0] = -20
    some = score([("t", IDS)], iter([unlikely]), {"m": iter([unlikely])}, watched=torch.tensor([0]))
    assert decided(nothing, [some]) == {"m": {}}


def test_answers():
    assert repeated([1, 2, 3]) == 0 and repeated([1, 2, 3, 4, 5]) == 0
    assert repeated([1] * 13) == pytest.approx(0.9)
    found = summary([[1, 2, 9], [1] * 13], [[1, 2, 3, 9], [2]], {9})
    assert found == pytest.approx({"tokens": 8, "ended": 0.5, "repeated": 0.45, "same": 1})
    asked = [torch.tensor([[5, 6]]), torch.tensor([[7]])]
    ((domain, ids),) = as_batches(asked, [[8, 9], []])
    assert domain == "answers" and ids.tolist() == [[5, 6, 8, 9]]


def test_the_guard_looks_at_the_tail():
    planned, uniform = {"overall": 1.0, "p99": 9.0}, {"overall": 2.0, "p99": 8.0}
    assert better({"planned": planned}) == "planned"
    assert better({"planned": planned, "uniform": uniform}) == "uniform"
    assert better({"planned": planned | {"p99": 8.0}, "uniform": uniform}) == "planned"


@pytest.mark.filterwarnings("ignore")
def test_eval_shows_and_keeps_them(demo, tmp_path, capsys):
    folder = tmp_path / "packed"
    source = save_random("qwen3_moe", tmp_path / "source", demo, torch.float32)
    qmoe.quantize(source, folder, QuantConfig("rtn", Scheme(4, 32)), progress=False)
    command = ["eval", str(folder), "--against", str(source), "--samples", "2", "--seqlen", "32"]
    command += ["--text", "heldout:austen", "--answers", "--decision-token", " the", "--save"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    tail = result["tails"]["qmoe"]
    assert 0 < tail["kl"]["all"]["p95"] <= tail["kl"]["all"]["p99"] <= tail["kl"]["all"]["max"]
    assert result["scores"]["qmoe"]["austen"]["kl"] < tail["kl"]["austen"]["max"]
    assert len(tail["worst"]) == 3 and "original" not in result["tails"]
    assert result["answers"]["original"]["same"] == result["answers"]["original"]["tokens"]
    measured = json.loads((folder / "qmoe_measured.json").read_text())["eval"]
    assert measured["tails"] == result["tails"] and measured["answers"] == result["answers"]
    show_eval(result)
    shown = capsys.readouterr().out
    assert "95 %" in shown and "greedy answers" in shown and "decision token" in shown
    card = (folder / "README.md").read_text()
    assert "99 % of the tokens" in card and "greedy answers" in card
    pytest.importorskip("matplotlib")
    page = qmoe.report(folder).html
    assert "99th percentile" in page and "Greedy answers" in page
    assert ModelFolder(folder).path.is_dir()


def test_what_needs_the_original(tmp_path, demo):
    for option in (["--answers"], ["--decision-token", "x"]):
        assert main(["eval", str(demo), *option]) == 1
