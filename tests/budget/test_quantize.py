"""`quantize_to_size`: measured once, planned for any budget, never worse than uniform."""

from dataclasses import replace

import pytest
import torch
from helpers import LITTLE_TEXT, QUICK, same_files, save_random

import qmoe
import qmoe.budget.measure
import qmoe.budget.quantize as budget
import qmoe.layer.solve
from qmoe import Budget, QuantConfig, Scheme
from qmoe.budget.choose import all_in
from qmoe.budget.guard import GuardText, batches_of
from qmoe.budget.measurements import FILE, Measurements
from qmoe.budget.memory import Gpu
from qmoe.budget.solve_all import laid_out
from qmoe.calibration.batches import choose_samples
from qmoe.calibration.text import load_texts
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli.main import main
from qmoe.errors import ConfigError
from qmoe.measure.baselines import original
from qmoe.model.source import open_source
from qmoe.plan.placement import CUDA
from qmoe.plan.run_plan import RunPlan

SCHEME = Scheme(4, 64, symmetric=False)
CONFIG = replace(QUICK, experts=SCHEME, dense=SCHEME, refit=False)
GUARD = "heldout:austen"


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def made(short, tmp_path_factory):
    """A planned model of 3 bits, its measurements, and each group's weights at the probe's bits."""
    folder, tried = tmp_path_factory.mktemp("budget"), []
    with pytest.MonkeyPatch.context() as patch:
        inner = qmoe.budget.measure._with

        def spy(layer, solution, probe):
            weights = {n: laid_out(layer, n, stack) for n, stack in solution.probes.items()}
            tried.append((solution, weights))
            return inner(layer, solution, probe)

        patch.setattr(qmoe.budget.measure, "_with", spy)
        report = qmoe.quantize_to_size(
            short, folder / "out", Budget(bits=3.0, guard_text=GUARD), CONFIG, progress=False
        )
    return folder, report, tried


def test_the_budget_is_kept(made, short):
    folder, report, _ = made
    told = report["budget"]
    assert told["written"] == "planned" and told["weight_files"]["planned"] <= told["bytes"]
    assert 0.98 * told["bytes"] < size_of(folder / "out") == told["weight_files"]["planned"]
    assert told["kl"]["planned"]["overall"] < told["kl"]["uniform"]["overall"]
    assert 2.9 < told["bits"]["planned"] <= 3.0 and told["gap"] < 0.01
    assert sorted(p.name for p in folder.iterdir()) == ["out", "out.measurements"]
    model, _ = qmoe.load(folder / "out", torch.float32, progress=False)
    assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_a_groups_kl_is_that_of_the_original_with_its_weights(made, short):
    """The probes of a streamed model, beside a model in memory."""
    folder, _, tried = made
    found = Measurements.read(folder / "out.measurements")
    model = original(ModelFolder(short), torch.float32)
    tokenizer = ModelFolder(short).tokenizer(model.config)
    c = LITTLE_TEXT
    ids, _ = choose_samples(tokenizer, load_texts(c.text), c.samples, c.seqlen, c.seed)

    @torch.no_grad()
    def predicted():
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1)

    base = predicted()
    for group, weights in (tried[0], tried[4], tried[-1]):
        before = {name: model.get_parameter(name).detach().clone() for name in weights}
        for name, weight in weights.items():
            model.get_parameter(name).data.copy_(weight)
        kl = (base.exp() * (base - predicted())).sum(-1).mean()
        assert found.kl[group.measured[0].group] == pytest.approx(float(kl), rel=0.02)
        for name, weight in before.items():
            model.get_parameter(name).data.copy_(weight)


def test_errors_fall_with_bits_and_are_relative(made):
    folder, _, _ = made
    for part in Measurements.read(folder / "out.measurements").parts:
        for errors in part.errors:
            assert 0 <= errors[3] < errors[2] < errors[1] < errors[0] < 1.5


@pytest.mark.slow
def test_another_budget_measures_nothing_again(made, short, tmp_path, monkeypatch):
    folder, _, _ = made
    monkeypatch.setattr(budget, "measure", None)
    kept = folder / "out.measurements"
    more = Budget(size_of(folder / "out") + 200_000, guard_text=GUARD)
    report = qmoe.quantize_to_size(
        short, tmp_path / "out", more, CONFIG,
        measurements=kept, progress=False,
    )  # fmt: skip
    assert report["budget"]["bits"]["planned"] > 3.1
    other = replace(CONFIG, damp=0.02)
    with pytest.raises(ConfigError, match="of another run .damp was 0.01, is 0.02"):
        qmoe.quantize_to_size(
            short, tmp_path / "two", Budget(bits=3.0), other, measurements=kept, progress=False
        )


def test_where_matrices_are_kept_another_budget_solves_only_the_rival(short, tmp_path, monkeypatch):
    how = {"measurements": tmp_path / "kept", "progress": False}
    first = Budget(bits=2.5, guard_text=GUARD, keep=True)
    qmoe.quantize_to_size(short, tmp_path / "first", first, CONFIG, **how)
    solved, inner = [], qmoe.layer.solve.solve_as

    def spy(config, method, name, weight, hessian, scheme, dtype):
        solved.append(scheme)
        return inner(config, method, name, weight, hessian, scheme, dtype)

    monkeypatch.setattr(qmoe.layer.solve, "solve_as", spy)
    second = Budget(bits=3.3, guard_text=GUARD, keep=True)
    report = qmoe.quantize_to_size(short, tmp_path / "second", second, CONFIG, **how)
    told = report["budget"]
    assert {str(scheme) for scheme in solved} <= {told["uniform"]}
    assert told["kl"]["planned"]["overall"] < told["kl"]["uniform"]["overall"]
    solved.clear()
    qmoe.quantize_to_size(short, tmp_path / "again", second, CONFIG, **how)
    assert not solved and same_files(tmp_path / "second", tmp_path / "again")


@pytest.mark.slow
def test_uniform_is_written_where_it_is_better(made, short, tmp_path, monkeypatch, capsys):
    folder, _, _ = made
    found = {
        "planned": {"a": 2.0, "overall": 2.0, "p99": 3.0},
        "uniform": {"a": 1.0, "overall": 1.0, "p99": 2.0},
    }
    monkeypatch.setattr(budget, "divergences", lambda *_: found)
    command = ["quantize", str(short), str(tmp_path / "out"), "--bits", "3.0"]
    command += ["--set", "search_grid=false", "--set", "refit=false", "--group-size", "64"]
    command += ["--asymmetric", "--calibration", LITTLE_TEXT.text, "--samples", "4"]
    command += ["--seqlen", "128", "--self-samples", "0", "--guard-text", GUARD]
    command += ["--measurements", str(folder / "out.measurements")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "the uniform model was written" in said and "its KL on held-out text is 1.0" in said
    plain = replace(CONFIG, experts=replace(SCHEME, bits=2, group_size=32),
                    dense=replace(SCHEME, bits=2, group_size=32))  # fmt: skip
    qmoe.quantize(short, tmp_path / "plain", plain, progress=False)
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ram", [None, "4GB"])
def test_a_budget_of_a_gpus_memory_comes_with_a_plan(made, short, tmp_path, ram):
    """All of the model on the GPU; or, with memory for little more than what has to be there, the
    experts in host memory."""
    folder, _, _ = made
    source = open_source(ModelFolder.find(short), torch.float32)
    memory = Gpu(source, 128)
    narrow = memory.total(all_in(CONFIG, replace(SCHEME, bits=2)))
    # 2 bits everywhere, and what the slots take.
    vram = int((narrow + 300_000 + (0 if ram is None else -200_000)) * 1.05)
    given = Budget(vram=vram, context=128, ram=ram, guard_text=GUARD)
    how = {"measurements": folder / "out.measurements", "progress": False}
    report = qmoe.quantize_to_size(short, tmp_path / "out", given, CONFIG, **how)
    plan = RunPlan.read(tmp_path / "out")
    assert plan.vram == vram and plan.context == 128 and plan.hybrid == (ram is not None)
    if ram is None:
        assert plan.expert_memory is None and plan.gpu == report["budget"]["bytes"] - CUDA
    else:
        assert plan.gpu <= vram and plan.host < 4 * 10**9 and plan.expert_memory > 0
        assert report["budget"]["bits"]["planned"] > 4  # since host memory is large


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(made, short, tmp_path, monkeypatch):
    folder, _, _ = made
    how = {"measurements": folder / "out.measurements", "progress": False}
    three = Budget(bits=3.0, guard_text=GUARD)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(budget, "divergences", stop)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize_to_size(short, tmp_path / "out", three, CONFIG, **how)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.planned", "out.uniform"]
    qmoe.quantize_to_size(short, tmp_path / "out", three, CONFIG, **how)
    assert same_files(folder / "out", tmp_path / "out")


@pytest.mark.slow
def test_bits_of_lm_head_are_chosen_where_it_is_quantized(demo, tmp_path):
    """A budget of few bytes gives it fewer bits than one of many."""
    source = save_random("mixtral", tmp_path / "m", demo, torch.float32)
    scheme = Scheme(4, 32, symmetric=False)
    config = replace(CONFIG, experts=scheme, dense=scheme, lm_head=replace(scheme, bits=8))
    found, given = {}, {"guard_text": GUARD}
    for bits in (3.6, 8.6):
        how = {"measurements": tmp_path / "measured", "progress": False}
        report = qmoe.quantize_to_size(
            source, tmp_path / str(bits), Budget(bits=bits, **given), config, **how
        )
        assert report["budget"]["bits"]["planned"] <= bits
        made = QuantConfig.from_dict(report["config"])
        assert "lm_head" not in made.widths
        found[bits] = made.lm_head.bits
    assert found[3.6] < found[8.6] == 8
    told = Measurements.read(tmp_path / "measured")
    (part,) = [part for part in told.parts if part.target == "lm_head"]
    assert part.tokens[0] > 100
    for errors in (part.errors[0][:4], part.errors[0][4:]):  # in groups, and by channel
        assert errors == sorted(errors, reverse=True)
    assert 0 < told.kl["lm_head"] < 1


def test_a_measuring_pass_that_was_stopped_solves_no_layer_twice(
    made, short, tmp_path, monkeypatch
):
    folder, _, _ = made
    kept, solved = qmoe.budget.measure.keep_layer, qmoe.budget.measure._solved
    layers = []

    def stop(out, index, found):
        if index == 1:
            raise KeyboardInterrupt
        kept(out, index, found)

    def count(layer, *rest):
        layers.append(layer.name)
        return solved(layer, *rest)

    given = (short, tmp_path / "out", Budget(bits=3.0, guard_text=GUARD), CONFIG)
    monkeypatch.setattr(qmoe.budget.measure, "_solved", count)
    with monkeypatch.context() as patch:
        patch.setattr(qmoe.budget.measure, "keep_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize_to_size(*given, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out.measurements.partial"]

    def enough(*_):  # measurements are all that is looked at
        raise KeyboardInterrupt

    monkeypatch.setattr(budget, "choose", enough)
    with pytest.raises(KeyboardInterrupt):
        qmoe.quantize_to_size(*given, progress=False)
    assert layers == [f"model.layers.{i}" for i in (0, 1, 1)]
    assert [p.name for p in (tmp_path / "out.measurements").iterdir()] == [FILE]
    again = (tmp_path / "out.measurements" / FILE).read_text()
    assert again == (folder / "out.measurements" / FILE).read_text()


@pytest.mark.parametrize(
    "config, given, said",
    [
        (CONFIG, {}, "give one of a size, an average"),
        (CONFIG, {"size": 10**7, "bits": 3.0}, "give one of a size, an average"),
        (CONFIG, {"bits": 2.0}, "at 2 bits .* on average with scales. the model takes"),
        (CONFIG, {"size": "1MB"}, "more than the 1000000 that can be used"),
        (CONFIG, {"vram": "0.8GB"}, "which is .* more than the"),
        (CONFIG, {"bits": 3.0, "ram": "8GB"}, "ram: goes with vram"),
        (QuantConfig("rtn"), {"bits": 3.0}, "as gptq solves them, not rtn"),
        (replace(CONFIG, tune=5), {"bits": 3.0, "keep": True}, "tune: needs text that runs"),
        (replace(CONFIG, widths={"a": "2"}), {"bits": 3.0}, "a budget chooses them"),
    ],
)
def test_refused_before_any_work(tmp_path, short, config, given, said):
    with pytest.raises(ConfigError, match=said):
        qmoe.quantize_to_size(
            short, tmp_path / "out", Budget(**given, context=128), config, progress=False
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, said",
    [
        (["--bits", "3", "--measurements", "m"], "goes with --size"),
        (["--bits", "3", "--size", "1GB"], "leave out --bits"),
        (["--size", "1GB", "--save-statistics", "s"], "measured on text"),
    ],
)
def test_options_that_do_not_go_together(short, tmp_path, capsys, options, said):
    assert main(["quantize", str(short), str(tmp_path / "out"), *options]) == 1
    assert said in capsys.readouterr().err


def test_held_out_text_that_is_short_is_told(short, tmp_path):
    (tmp_path / "few.txt").write_text("A sentence of some length, again and again. " * 20)
    batches, notes = batches_of(ModelFolder(short), GuardText(str(tmp_path / "few.txt"), 64, 100))
    assert 0 < sum(len(ids) for _, ids in batches) < 100 and notes
