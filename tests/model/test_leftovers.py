"""Tensors that are not part of the model change nothing of the result and are named; those that
only look so are refused with the remedy. And which class is taken when config.json names none."""

import json
import shutil

import pytest
import torch
from helpers import ONE_DOMAIN, save_random, slow
from safetensors.torch import load_file, save_file

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.checkpoint.model_config import model_class
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import CheckpointError
from qmoe.measure.evaluate import evaluate
from qmoe.measure.families import families, tiny_config
from qmoe.model.leftovers import left_out, predicting
from qmoe.model.skeleton import build
from qmoe.model.source import open_source
from qmoe.pipeline.checks import estimate_bytes

RTN = QuantConfig("rtn", Scheme(4, 32))
GPTQ = QuantConfig(
    experts=Scheme(4, 32),
    search_grid=False,
    calibration=CalibrationConfig(ONE_DOMAIN, samples=2, self_samples=2, seqlen=32),
)


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))


def add(model, tensors):
    whole = load_file(model / "model.safetensors") | tensors
    save_file(whole, model / "model.safetensors", metadata={"format": "pt"})


def weights(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def prediction_layer(model, place="model.layers", count=2):
    """A layer behind the last as DeepSeek-V3 and GLM-4.5 have it: like that, and more."""
    tensors, last = load_file(model / "model.safetensors"), f"{place}.{count - 1}."
    found = {
        name.replace(last, f"{place}.{count}."): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    more = {"enorm.weight": torch.ones(64), "eh_proj.weight": torch.zeros(64, 128)}
    more["shared_head.head.weight"] = torch.zeros(4096, 64)
    return found | {f"{place}.{count}.{name}": t.bfloat16() for name, t in more.items()}


def leaves_out(tmp_path, demo, family, extra, config=RTN, carried=False, **changes):
    """The result with the extra tensors is the one without, and loads; returns the report. carried:
    whether they are in it as they are."""
    twin = save_random(family, tmp_path / "twin", demo, torch.bfloat16)
    source = shutil.copytree(twin, tmp_path / "source")
    extra = extra(source) if callable(extra) else extra
    add(source, extra)
    edit_config(source, **changes)
    qmoe.quantize(twin, tmp_path / "q-twin", config, progress=False)
    report = qmoe.quantize(source, tmp_path / "q", config, progress=False)
    found, expected = weights(tmp_path / "q"), weights(tmp_path / "q-twin")
    expected |= extra if carried else {}
    assert found and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    qmoe.load(tmp_path / "q", progress=False)
    return report


@pytest.mark.parametrize("config", [slow(RTN), GPTQ], ids=["rtn", "gptq"])
def test_a_prediction_layer_of_a_model_that_has_not_61(tmp_path, demo, config):
    """With text that the model writes too, which loads the whole of it. This layer lacks a norm, so
    it is none that is known, and stays as it is."""
    report = leaves_out(
        tmp_path, demo, "deepseek_v3", prediction_layer, config, True, num_nextn_predict_layers=1
    )
    said = "not quantized, of layers that predict tokens beyond the next: model.layers.2."
    assert any(line.startswith(said) for line in report["fallbacks"])
    extra = prediction_layer(tmp_path / "twin")
    assert report["prediction"] == {"carried": {n: t.nbytes for n, t in extra.items()}}
    assert not any("text was written" in line for line in report["fallbacks"])
    sizes = [estimate_bytes(open_source(ModelFolder(tmp_path / n), torch.float32), config) for n in
             ("source", "twin")]  # fmt: skip
    more = sum(tensor.nbytes for tensor in extra.values())
    assert abs(sizes[0] - sizes[1] - more) < 10_000  # the header
    scores = evaluate(
        tmp_path / "q", against=tmp_path / "source", text="heldout:austen", samples=1, seqlen=32
    )
    assert scores["overall"]["qmoe"]["kl"] < 1
    assert any("acceptance of drafts is not measured" in note for note in scores["fallbacks"])


@pytest.mark.parametrize(
    "name",
    [
        "mtp.layers.0.eh_proj.weight",
        slow("model.mtp_block.0.norm.weight"),
        slow("model.mtp_layers.0.x.weight"),
        slow("model.nextn.0.norm.weight"),
    ],
)
def test_prediction_layers_by_name(tmp_path, demo, name):
    report = leaves_out(tmp_path, demo, "mixtral", {name: torch.ones(64)}, carried=True)
    assert report["prediction"] == {"carried": {name: 256}}


@pytest.mark.parametrize(
    "extra, changes, said",
    [
        (prediction_layer, {"num_nextn_predict_layers": 0}, "say num_nextn_predict_layers"),
        # Two more than there are, one of them declared.
        (lambda m: prediction_layer(m) | {
            n.replace("layers.2.", "layers.3."): t.clone() for n, t in prediction_layer(m).items()
        }, {"num_nextn_predict_layers": 1}, "the checkpoint has layer 3 too"),
        # Like all others: config.json counts too few.
        (lambda m: {n: t for n, t in prediction_layer(m).items() if "norm.weight" not in n
                    and "eh_proj" not in n and "head" not in n},
         {"num_nextn_predict_layers": 1}, "correct num_hidden_layers"),
    ],
)  # fmt: skip
def test_layers_that_are_too_many(tmp_path, demo, extra, changes, said):
    source = save_random("deepseek_v3", tmp_path / "source", demo, torch.bfloat16)
    add(source, extra(source))
    edit_config(source, **changes)
    with pytest.raises(CheckpointError, match=said):
        qmoe.quantize(source, tmp_path / "q", RTN, progress=False)


@pytest.mark.parametrize("family", ["mixtral", slow("deepseek_v3"), slow("gpt_oss")])
@pytest.mark.parametrize("place", ["model.layers.{}.self_attn.rotary_emb", "model.rotary_emb"])
def test_rotary_tables(tmp_path, demo, family, place):
    tables = {f"{place.format(i)}.inv_freq": torch.rand(8) for i in range(2)}
    report = leaves_out(tmp_path, demo, family, tables)
    assert any(line.startswith("not written, the model computes them") and "inv_freq" in line
               for line in report["fallbacks"])  # fmt: skip


@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", slow("score.weight"), slow("reward_head.0.weight")]
)
def test_heads_of_other_tasks(tmp_path, demo, name):
    report = leaves_out(tmp_path, demo, "qwen3_moe", {name: torch.ones(1, 64)})
    assert f"not written, heads of another task: {name}" in report["fallbacks"]


PATTERNS = {
    "deepseek_v3": "model.layers.61.eh_proj.weight",
    "glm4_moe": "model.layers.46.enorm.weight",
    "qwen3_next": "mtp.fc.weight",
    "ernie4_5_moe": "model.mtp_block.0.norm.weight",
    "longcat_flash": "model.mtp.layers.0.eh_proj.weight",
    "nemotron_h": "mtp.layers.0.norm.weight",
    "axk1": "model.layers.1.mlp.post_mlp_layernorm.weight",
    "qwen3_5_moe": "mtp.norm.weight",
}


@pytest.mark.parametrize("family", PATTERNS)
def test_what_a_family_says_to_ignore(family):
    model = build(tiny_config(next(f for f in families() if f.model_type == family)), torch.float32)
    name = PATTERNS[family]
    unknown, known = {name: name, "model.extra.weight": ""}, ["model.layers.1.mlp.gate.weight"]
    carried = predicting(model, {}, known, unknown)
    assert {*left_out(model, unknown), *carried} == {name}
    assert bool(carried) == (family != "axk1")


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "spoil, remedy",
    [
        (renamed(lambda n: f"_orig_mod.{n}"), "save model._orig_mod"),
        (renamed(lambda n: n.replace("mlp.", "mlp._orig_mod.")), "save model._orig_mod"),
        (renamed(lambda n: f"module.{n}"), "save model.module"),
        (renamed(lambda n: f"pretrained_model.{n}"), "save model.pretrained_model"),
        (renamed(lambda n: f"base_model.model.{n}"), "merge_and_unload"),
        (renamed(lambda n: n.replace("q_proj.", "q_proj.base_layer.")), "merge_and_unload"),
        (lambda t: t | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)},
         "merge_and_unload"),
        (renamed(lambda n: n.replace("mlp.", "_fsdp_wrapped_module.mlp.")), "state dict"),
        (lambda t: t | {"lm_head.bias": torch.ones(4096)}, "first 'lm_head.bias'"),
    ],
)  # fmt: skip
def test_names_that_other_programs_gave(tmp_path, demo, spoil, remedy):
    source = save_random("qwen3_moe", tmp_path / "source", demo, torch.bfloat16)
    tensors = spoil(load_file(source / "model.safetensors"))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=remedy):
        qmoe.quantize(source, tmp_path / "q", RTN, progress=False)


@pytest.mark.parametrize(
    "named",
    [
        None,
        slow([]),
        ["MyMixtralForCausalLM"],
        slow([""]),
        ["LlamaForCausalLM"],
        slow(["pipeline"]),
    ],
)
def test_architectures_that_name_no_class_of_the_family(tmp_path, demo, named):
    report = leaves_out(tmp_path, demo, "mixtral", {}, architectures=named)
    said = [line for line in report["fallbacks"] if line.startswith("config.json names no class")]
    assert said == [
        f"config.json names no class of this family (architectures: {named}); MixtralForCausalLM "
        "was taken"
    ]


def test_the_complete_class_is_taken_where_none_is_named():
    for family in families():
        config = tiny_config(family)
        assert model_class(config).__name__ == family.head
        config.architectures = None
        assert model_class(config).__name__ == family.head
