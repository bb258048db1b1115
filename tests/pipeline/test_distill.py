"""Distilling a finished model: its gradient, what it brings, resuming, and what it refuses."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from helpers import ONE_DOMAIN, assert_close, mostly_slow, same_files, save_random, slow
from remote_models import save
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.distill import train
from qmoe.distill.train import Samples, Training, kl
from qmoe.errors import ConfigError
from qmoe.measure.evaluate import evaluate
from qmoe.model.experts import is_experts
from qmoe.model.source import open_source
from qmoe.pipeline.memory import needed
from qmoe.pipeline.output import DISTILLED, OutputFolder
from qmoe.system.spill import Scratch

LOW = Scheme(2, 32, False)
TEXT = CalibrationConfig(ONE_DOMAIN, samples=10, seqlen=64, batch=4, self_samples=0)
SOLVED = QuantConfig(experts=LOW, dense=LOW, search_grid=False, refit=False, calibration=TEXT)
STEPS = replace(SOLVED, distill=3)


class Stop(Exception):
    """Ends a run where a test wants to look into it."""


def training(source, path, config, monkeypatch):
    """The training of a run that has solved all layers and distilled nothing."""
    found = []

    def stop(self):
        found.append(self)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Training, "train", stop)
        with pytest.raises(Stop):
            qmoe.quantize(source, path, config, progress=False)
    return found[0]


def test_divergence_of_probabilities():
    same = torch.randn(2, 3, 5)
    assert abs(float(kl(same, same + 7))) < 1e-6
    p, q = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.25, 0.75]]])
    wanted = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert torch.isclose(kl(p.log(), q.log()), wanted)


def test_samples_are_held_out_once_and_drawn_by_the_seed():
    samples = torch.arange(17)[:, None]
    drawn = Samples.of(samples, 4, seed=1)
    train, held_out = torch.cat(drawn.train), torch.cat(drawn.held_out)
    assert len(held_out) == 2 and [len(b) for b in drawn.train] == [4, 4, 4, 3]
    assert torch.equal(torch.cat([train, held_out]).sort(0).values, samples)
    assert not torch.equal(torch.cat(Samples.of(samples, 4, seed=2).held_out), held_out)
    assert len(Samples.of(samples[:2], 4, 0).train) == len(Samples.of(samples[:2], 4, 0).held_out)


@pytest.mark.parametrize("lm_head", [None, slow(LOW)])
def test_the_gradient_is_that_of_the_whole_model(short, demo, tmp_path, monkeypatch, lm_head):
    config = replace(STEPS, lm_head=lm_head)
    source = short  # whose head is tied to the embedding
    if lm_head is not None:
        source = save_random("qwen3_moe", tmp_path / "source", demo, torch.bfloat16)
    work = training(source, tmp_path / "out", config, monkeypatch)
    student, ids = work.student, work.samples.train[0]
    work.step(0)
    leaves = student.factors | student.values
    found = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    assert all(gradient.isfinite().all() for gradient in found.values())

    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wanted = whole(input_ids=ids).logits.detach()
    stacks = {t: s for kept in student.layers for t, s in kept.stacks.items()}
    stacks |= student.lm_head
    given = {name: leaf for name, leaf in student.values.items()}
    for target, stack in stacks.items():
        scale = stack.scale.float() * student.factors[target]
        q = stack.q.float().unflatten(-1, (scale.shape[-1], -1)) - stack.zero.float()[..., None]
        weight = (q * scale[..., None]).flatten(-2)
        given[target] = weight[0] if target.endswith(".weight") else weight
    for leaf in leaves.values():
        leaf.grad = None
    kl(wanted, functional_call(whole, given, (ids,)).logits).backward()
    assert sum(is_experts(m) for m in whole.modules()) == 2 and len(found) > 20
    for name, leaf in leaves.items():
        assert_close(found[name], leaf.grad, most=1e-2, rms=1e-3)


def test_one_step_lowers_the_loss(short, tmp_path, monkeypatch):
    work = training(short, tmp_path / "out", STEPS, monkeypatch)
    names = " ".join(work.student.values)
    assert "norm" in names and "mlp.gate" not in names  # routers stay
    before = work.step(0)
    for leaf in [*work.student.factors.values(), *work.student.values.values()]:
        # No less: what is stored in bfloat16 has 128 values between a power of two and the next.
        leaf.data -= 3e-3 * leaf.grad.sign()
        leaf.grad = None
    assert work.step(0) < before


def test_the_model_that_is_written_is_the_one_that_was_held_out(demo, tmp_path):
    text = replace(TEXT, samples=24)
    plain = replace(SOLVED, calibration=text)
    qmoe.quantize(demo, tmp_path / "solved", plain, progress=False)
    config = replace(plain, distill=20)
    told = qmoe.quantize(demo, tmp_path / "out", config, progress=False)["distilled"]
    curve = told["held_out_kl"]
    assert list(curve) == ["0", "10", "20"] and told["held_out_samples"] == 3
    assert curve[str(told["kept_step"])] == min(curve.values()) < curve["0"]
    before, after = (
        evaluate(tmp_path / name, against=demo, samples=2)["overall"]["qmoe"]["kl"]
        for name in ("solved", "out")
    )
    assert after < before


def test_a_phase_that_brings_nothing_changes_nothing(short, tmp_path, monkeypatch):
    solved = qmoe.quantize(short, tmp_path / "solved", SOLVED, progress=False)
    monkeypatch.setattr(train, "SCALES", 3.0)
    report = qmoe.quantize(short, tmp_path / "out", STEPS, progress=False)
    assert report["distilled"]["kept_step"] == 0
    assert report["digests"] == solved["digests"]
    assert report["unpacked_sha256"] == solved["unpacked_sha256"]


def test_a_loss_that_overflows_ends_the_phase_and_is_reported(short, tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "step", lambda self, i: float("inf"))
    report = qmoe.quantize(short, tmp_path / "out", STEPS, progress=False)
    assert report["distilled"]["kept_step"] == 0
    said = "distilling ended early: the loss of step 1 was not finite"
    assert said in report["fallbacks"]


def test_a_model_whose_last_layer_does_not_give_its_logits_is_left_as_it_is(
    short, tmp_path, monkeypatch
):
    solved = qmoe.quantize(short, tmp_path / "solved", SOLVED, progress=False)
    monkeypatch.setattr(train, "logits_of", lambda *_: torch.zeros(1))
    report = qmoe.quantize(short, tmp_path / "out", STEPS, progress=False)
    assert "the model was not distilled: its logits" in report["fallbacks"][-1]
    assert report["digests"] == solved["digests"] and "distilled" not in report


@pytest.mark.parametrize("when", ["training", "writing"])
def test_a_distilled_run_goes_on_to_the_same_bytes(short, tmp_path, monkeypatch, when):
    qmoe.quantize(short, tmp_path / "whole", STEPS, progress=False)
    written, trained = OutputFolder.write_shard, Training.step

    def write(self, shard):
        if (self.path / DISTILLED).exists() and shard.index == 1:
            raise KeyboardInterrupt
        written(self, shard)

    done = []

    def step(self, i):
        if done:
            raise KeyboardInterrupt
        done.append(i)
        return trained(self, i)

    with monkeypatch.context() as patch:
        if when == "writing":
            patch.setattr(OutputFolder, "write_shard", write)
        else:
            patch.setattr(Training, "step", step)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(short, tmp_path / "out", STEPS, progress=False)
    if when == "writing":  # nothing is distilled again
        monkeypatch.setattr(Training, "train", None)
    qmoe.quantize(short, tmp_path / "out", STEPS, progress=False)
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_waiting_on_disk_changes_no_byte(short, tmp_path, monkeypatch):
    config = replace(STEPS, distill=1)
    qmoe.quantize(short, tmp_path / "whole", config, progress=False)
    need = needed(open_source(ModelFolder(short), torch.float32), config, 640)
    plain = needed(open_source(ModelFolder(short), torch.float32), SOLVED, 640)
    assert need.fixed >= plain.fixed and need.activations >= plain.activations
    kept = []
    original = Scratch._keep
    monkeypatch.setattr(Scratch, "_keep", lambda self, t: kept.append(t) or original(self, t))
    limit = need.fixed + 1000
    qmoe.quantize(short, tmp_path / "out", config, max_memory=limit, progress=False)
    assert any(t.dtype == torch.int8 for t in kept)
    assert same_files(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": -1}, "distill: expected 0 or more"),
        ({"method": "rtn", "distill": 1}, "distill: is a step of the method"),
        ({"format": "exl3", "distill": 1, "experts": {}, "dense": {}}, "distill: EXL3's codes"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        QuantConfig.from_dict(changes)


def test_runs_that_cannot_work_are_refused_before_any_work(short, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="distill: .*statistics"):
        qmoe.quantize(short, tmp_path / "out", STEPS, statistics_from=[tmp_path / "none"])
    one = replace(STEPS, calibration=replace(TEXT, samples=1))
    with pytest.raises(ConfigError, match="distill: .*gives 1; give at least 2"):
        qmoe.quantize(short, tmp_path / "out", one, progress=False)
    two = SimpleNamespace(count=lambda: 2)
    monkeypatch.setattr("qmoe.pipeline.checks.distributed", two)
    with pytest.raises(ConfigError, match="distill: runs in one process"):
        qmoe.quantize(short, tmp_path / "out", STEPS, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "family",
    mostly_slow(
        [("deepseek_v3",), ("qwen2_moe",), ("gpt_oss",)], lambda name: name == "deepseek_v3"
    ),
)
def test_distilled_families_pass_the_audit_and_load(family, demo, tmp_path, monkeypatch):
    better = count()  # on random weights a few steps may be no better, and would not be kept
    monkeypatch.setattr(Training, "held_out", lambda self: -next(better))
    source = save_random(family, tmp_path / "source", demo, torch.bfloat16)
    report = qmoe.quantize(source, tmp_path / "out", STEPS, progress=False)
    assert report["distilled"]["kept_step"] == 3
    model, tokenizer = qmoe.load(tmp_path / "out")
    ids = tokenizer("The", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_experts_that_are_modules_are_distilled(demo, tmp_path):
    save("deepseek", tmp_path / "source", demo)
    told = qmoe.quantize(
        tmp_path / "source", tmp_path / "out", STEPS, progress=False, trust_remote_code=True
    )["distilled"]
    assert told["held_out_kl"]["3"] < told["held_out_kl"]["0"]
