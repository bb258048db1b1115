"""Models that are code of their own, beside the weights: refused unless allowed, then as any other.

The reference is the same code run as a plain torch module, without transformers' loading.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import ONE_DOMAIN, assert_close, slow
from remote_models import CODE, save
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.calibration.batches import choose_samples
from qmoe.calibration.stats import load as load_statistics
from qmoe.calibration.text import load_texts
from qmoe.cli.main import main
from qmoe.errors import UnsupportedModelError
from qmoe.format.compressed_tensors import Schemes, unpacked_tensors

CONFIG = QuantConfig(
    experts=Scheme(4, 32),
    search_grid=False,
    calibration=CalibrationConfig(ONE_DOMAIN, samples=6, seqlen=64, batch=2, self_samples=0),
)
IDS = torch.arange(1, 33).view(2, 16) * 37

pytestmark = pytest.mark.usefixtures("own_cache")


def quantize(source, quantized, config=CONFIG, **options):
    return qmoe.quantize(
        source, quantized, config, progress=False, trust_remote_code=True, **options
    )


def dequantized(quantized):
    tensors = {}
    for file in quantized.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((quantized / "config.json").read_text())
    return unpacked_tensors(tensors, Schemes(config, ""))


@pytest.mark.parametrize("style", [slow("grok"), "deepseek", slow("expert_choice")])
def test_reloaded_equals_the_code_with_dequantized_weights(style, tmp_path, demo):
    twin = save(style, tmp_path / "source", demo)
    report = quantize(tmp_path / "source", tmp_path / "quantized")
    assert report["bytes"]["experts 16-bit"] == report["bytes"]["dense 16-bit"] == 0
    assert report["bytes"]["router"] > 0
    model, _ = qmoe.load(tmp_path / "quantized", progress=False, trust_remote_code=True)
    twin.load_state_dict(dequantized(tmp_path / "quantized"))
    assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    names = [line for line in report["layers"][1]["experts"]]
    assert names == ["model.layers.1.mlp.experts"]


def test_the_folder_written_is_complete(tmp_path, demo):
    save("grok", tmp_path / "source", demo)
    quantize(tmp_path / "source", tmp_path / "quantized")
    for file in CODE.glob("*.py"):
        assert (tmp_path / "quantized" / file.name).read_bytes() == file.read_bytes()
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    assert (
        config["auto_map"]
        == json.loads((tmp_path / "source" / "config.json").read_text())["auto_map"]
    )
    shutil.rmtree(tmp_path / "source")
    model, _ = qmoe.load(tmp_path / "quantized", progress=False, trust_remote_code=True)
    assert model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False).shape == (2, 7)


def brute_force(style, model, x):
    """Which tokens every expert gets of a batch x [T, H], from the router's weights alone."""
    router = {"grok": "gate", "deepseek": "gate", "expert_choice": "router"}[style]
    scores = x @ getattr(model.model.layers[1].mlp, router).weight.T
    E = scores.shape[1]
    if style == "expert_choice":
        rank = scores.softmax(-1).argsort(0, descending=True)
        return [rank[: len(x) * 2 // E, e] for e in range(E)]
    best = scores.argsort(-1, descending=True)[:, :2]
    return [(best == e).any(-1).nonzero()[:, 0] for e in range(E)]


@pytest.mark.parametrize("style", [slow("grok"), slow("deepseek"), "expert_choice"])
def test_experts_are_calibrated_on_the_tokens_that_are_routed_to_them(style, tmp_path, demo):
    model = save(style, tmp_path / "source", demo)
    # Nothing before the experts of the second layer may have been quantized.
    config = QuantConfig("gptq", Scheme(8, -1), dense=None, calibration=CONFIG.calibration)
    report = quantize(
        tmp_path / "source", tmp_path / "q", config, save_statistics=tmp_path / "statistics"
    )
    name = "model.layers.1.mlp.experts"
    c, seen, hessians = config.calibration, [0] * 6, torch.zeros(6, 64, 64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    samples, _ = choose_samples(tokenizer, load_texts(c.text), c.samples, c.seqlen, c.seed)
    if style != "deepseek":  # the first layer has experts too, and hands on what they became
        model.load_state_dict(first_layer_of(tmp_path / "q", model))

    def count(block, args):
        x = args[0].reshape(-1, 64)
        for e, tokens in enumerate(brute_force(style, model, x)):
            seen[e] += len(tokens)
            hessians[e] += x[tokens].T @ x[tokens]

    model.model.layers[1].mlp.register_forward_pre_hook(count)
    for ids in samples.split(c.batch):
        model(input_ids=ids)
    assert report["layers"][1]["experts"][name]["tokens"] == seen
    assert sum(seen) == (
        6 * (128 * 2 // 6) * 3 if style == "expert_choice" else samples.numel() * 2
    )
    about = {"routing_weighted": "True"}
    stats = load_statistics(tmp_path / "statistics" / "layer-00001.safetensors", about).linears
    linear = "linear" if style == "grok" else "gate_proj"
    for e in range(6):
        assert_close(stats[f"{name}.{e}.{linear}"].hessian, hessians[e], most=1e-3, rms=1e-4)


@pytest.mark.parametrize("saved", [False, slow(True)])
def test_experts_that_saw_few_tokens_borrow_from_their_list(saved, tmp_path, demo):
    model = save("grok", tmp_path / "source", demo)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    # Expert 5 is never chosen: its score is 0, and two of the first four are always above that.
    for i in range(2):
        gate = tensors[f"model.layers.{i}.mlp.gate.weight"]
        gate[5] = 0
        gate[:5] = torch.cat([gate[:2], -gate[:2], gate[4:5] * 10])
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    config = replace(CONFIG, min_tokens=150)
    if saved:
        quantize(tmp_path / "source", tmp_path / "first", config, save_statistics=tmp_path / "s")
        options = {"statistics_from": [tmp_path / "s"]}
    else:
        options = {}
    report = quantize(tmp_path / "source", tmp_path / "q", config, **options)
    for i, layer in enumerate(report["layers"]):
        entry = layer["experts"][f"model.layers.{i}.mlp.experts"]
        assert entry["tokens"][5] == 0
        assert entry["borrowed"] == [e for e in range(6) if entry["tokens"][e] < 150]
        for linear in ("linear", "linear_v", "linear_1"):
            part = layer["dense"][f"model.layers.{i}.mlp.experts.5.{linear}"]
            assert part["error"] > 0 and "rounded" not in part
    assert any("borrowed tokens of their layer" in line for line in report["fallbacks"])
    loaded, _ = qmoe.load(tmp_path / "q", progress=False, trust_remote_code=True)
    model.load_state_dict(dequantized(tmp_path / "q"))
    assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def first_layer_of(quantized, model):
    first = {k: v for k, v in dequantized(quantized).items() if k.startswith("model.layers.0.")}
    return dict(model.state_dict()) | first


def test_without_the_option_nothing_runs_and_the_error_says_what_would(tmp_path, demo, capsys):
    save("grok", tmp_path / "source", demo)
    quantize(tmp_path / "source", tmp_path / "quantized", QuantConfig("rtn", Scheme(4, 32)))
    for folder in ("source", "quantized"):
        code = tmp_path / folder / "configuration_tiny_remote.py"
        code.write_text("raise SystemExit('it ran')\n")
    said = (
        r"code of its own \(configuration_tiny_remote.*modeling_tiny_remote.*trust_remote_code=True"
    )
    with pytest.raises(UnsupportedModelError, match=said):
        qmoe.quantize(tmp_path / "source", tmp_path / "new", CONFIG, progress=False)
    with pytest.raises(UnsupportedModelError, match=said):
        qmoe.load(tmp_path / "quantized", progress=False)
    source, quantized = str(tmp_path / "source"), str(tmp_path / "quantized")
    for command in (
        ["quantize", source, str(tmp_path / "new")],
        ["inspect", source],
        ["inspect", quantized],
        ["eval", quantized, "--against", source],
        ["bench", quantized],
    ):
        assert main(command) == 1
        assert "--trust-remote-code" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_commands_run_with_the_option(tmp_path, demo, capsys):
    source, quantized = str(tmp_path / "source"), str(tmp_path / "quantized")
    save("deepseek", tmp_path / "source", demo)
    trust = ["--json", "--trust-remote-code"]

    def run(*command):
        assert main([*command, *trust]) == 0
        return json.loads(capsys.readouterr().out)

    parts = run("inspect", source)["parts"]
    assert {"name": "model.layers.1.mlp.experts.5.down_proj", "shapes": [[64, 32]]} in parts
    little = ["--samples", "4", "--self-samples", "2", "--seqlen", "64"]
    little += ["--set", "search_grid=false"]
    run("quantize", source, quantized, "--group-size", "32", "--bits", "8", *little)
    assert run("inspect", quantized)["bytes"]["experts 16-bit"] == 0
    assert "tokens" in run("inspect", quantized, "--experts")["experts"][0]
    both = ("--against", source, "--baseline", "rtn", "nf4")
    scores = run("eval", quantized, "--samples", "1", "--seqlen", "64", *both)
    assert 0 < scores["overall"]["qmoe"]["kl"] < 0.2
    speed = run("bench", quantized, "--prompt", "8", "--tokens", "2", "--repeats", "1", *both)
    assert set(speed) == {"qmoe", "original", "rtn", "nf4"}


def test_a_class_of_transformers_is_taken_though_the_folder_has_code(tmp_path, short):
    """As DeepSeek-V3 has, written for a transformers that did not know it yet."""
    shutil.copytree(short, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_old.Old",
        "AutoModelForCausalLM": "modeling_old.Old",
    }
    path.write_text(json.dumps(config))
    (tmp_path / "source" / "configuration_old.py").write_text("raise SystemExit('it ran')\n")
    for trust in (False, True):
        qmoe.quantize(
            tmp_path / "source",
            tmp_path / f"q{trust}",
            QuantConfig("rtn"),
            progress=False,
            trust_remote_code=trust,
        )
        qmoe.load(tmp_path / f"q{trust}", progress=False, trust_remote_code=trust)


def test_code_of_another_repository_is_refused(tmp_path, demo):
    save("grok", tmp_path / "source", demo)
    path = tmp_path / "source" / "config.json"
    path.write_text(path.read_text().replace('"configuration_', '"someone/else--configuration_'))
    with pytest.raises(UnsupportedModelError, match="code of another repository"):
        quantize(tmp_path / "source", tmp_path / "q")


def test_code_that_fails_is_named(tmp_path, demo):
    save("grok", tmp_path / "source", demo)
    (tmp_path / "source" / "modeling_tiny_remote.py").write_text("import no_such_package\n")
    with pytest.raises(UnsupportedModelError, match="no_such_package"):
        quantize(tmp_path / "source", tmp_path / "q")
