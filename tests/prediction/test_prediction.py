"""The layer that predicts a token beyond the next is found by its names, computes what
transformers' own class computes, is quantized on what reaches it, and is never lost in silence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    LITTLE_TEXT,
    ONE_DOMAIN,
    assert_close,
    interrupt_after,
    same_files,
    save_random,
    slow,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli.main import main
from qmoe.errors import AuditError, CheckpointError, ConfigError
from qmoe.export.to_gguf import export
from qmoe.measure.evaluate import evaluate
from qmoe.measure.families import families, save_tiny
from qmoe.model.layerwise import Waiting, suspended
from qmoe.model.skeleton import inputs_of
from qmoe.model.source import open_source
from qmoe.packed.audit import audit_folder
from qmoe.packed.skeleton import open_packed
from qmoe.plan.sizes import sizes, stacks
from qmoe.prediction.attach import add_prediction, prediction_of
from qmoe.prediction.draft import drafts, joined
from qmoe.prediction.names import find_prediction
from qmoe.prediction.streamed import prediction_calls, seeing_last
from qmoe.system.spill import Scratch

RTN = QuantConfig("rtn", Scheme(4, 32))
GPTQ = QuantConfig(
    experts=Scheme(4, 32),
    search_grid=False,
    calibration=CalibrationConfig(ONE_DOMAIN, samples=4, self_samples=0, seqlen=32, batch=2),
)
COPIES = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")


def with_prediction(path: Path, demo: Path, kind: str = "nextn") -> Path:
    """A random DeepSeek-V3 or Qwen3-Next with such a layer behind its two."""
    if kind == "nextn":
        save_random("deepseek_v3", path, demo, torch.bfloat16)
        place, own, count = "model.layers.1.", "model.layers.2.", "num_nextn_predict_layers"
        around = {name: f"{own}{name}" for name in ("eh_proj", "enorm", "hnorm")}
        around["norm"] = f"{own}shared_head.norm"
    else:
        family = next(f for f in families() if f.model_type == "qwen3_next")
        save_tiny(family, path, dtype=torch.bfloat16)
        kinds = json.loads((path / "config.json").read_text())["layer_types"]
        place = f"model.layers.{kinds.index('full_attention')}."
        own, count = "mtp.layers.0.", "mtp_num_hidden_layers"
        around = {"eh_proj": "mtp.fc", "enorm": "mtp.pre_fc_norm_embedding"}
        around |= {"hnorm": "mtp.pre_fc_norm_hidden", "norm": "mtp.norm"}
    torch.manual_seed(1)
    tensors = load_file(path / "model.safetensors")
    more = {
        name.replace(place, own): torch.randn_like(t.float()).mul(t.float().std() + 0.05).bfloat16()
        for name, t in tensors.items()
        if name.startswith(place)
    }
    size = tensors["model.norm.weight"].shape[0]
    for part, name in around.items():
        shape = (size, 2 * size) if part == "eh_proj" else (size,)
        more[f"{name}.weight"] = (
            torch.randn(shape).mul(size**-0.5).add(part != "eh_proj").bfloat16()
        )
    if kind == "nextn":
        more |= {name: tensors["lm_head.weight"].clone() for name in COPIES}
    save_file(tensors | more, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {count: 1}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def source(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_prediction(tmp_path_factory.mktemp("prediction") / "s", demo)


def opened(path: Path):
    """With all weights in memory."""
    found = open_source(ModelFolder(path), torch.float32, add_prediction)
    found.weights.load(found.weights.names(), torch.float32)
    found.weights.tie()
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_it_computes_what_transformers_computes(source: Path) -> None:
    """Beside transformers' own class for such layers, the model's forward being left as it was."""
    ids = torch.randint(4096, (1, 24))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]
    mtp = MtpModel.from_pretrained(theirs)
    cache = MtpCache(config=theirs.config.get_mtp_config())
    with torch.no_grad():
        out = theirs(ids, output_hidden_states=True)
        last = out.hidden_states[-1][:, :-1]
        places = torch.arange(1, 24)[None]
        expected = mtp.forward_layer(0, last, places, cache, input_ids=ids[:, 1:])
    found = opened(source)
    calls = []
    like = found.model.get_submodule(found.prediction.like)
    handle = like.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True)
    with torch.no_grad():
        assert_close(found.model(ids, use_cache=False).logits, out.logits)
    handle.remove()
    hidden = out.hidden_states[-1]
    with torch.no_grad():
        states = joined(found.model, found.prediction, hidden, ids)
        output = found.model.get_submodule(found.prediction.layer)(states, **calls[0])
        norm = found.model.get_submodule(found.prediction.norm)
        assert_close(norm(output)[:, :-1], expected, most=1e-3)
        drafted = drafts(found.model, found.prediction, output)
    assert torch.equal(drafted[:, :-1], theirs.lm_head(expected).argmax(-1))


def test_what_is_found_by_names(source: Path) -> None:
    found = open_source(ModelFolder(source), torch.float32)
    names = found.checkpoint.names()
    known = find_prediction(found.model, names)
    assert known is not None
    assert (known.layer, known.like) == ("model.layers.2", "model.layers.1")
    renamed = [n.replace("shared_head.norm", "final_layernorm") for n in names]
    other = find_prediction(found.model, renamed)
    assert other is not None and other.norm == "model.layers.2.final_layernorm"
    second = [n.replace("layers.2.", "layers.3.") for n in names if "layers.2." in n]
    wrong = [
        [*names, *second],  # two such layers
        [*names, "model.layers.2.more.weight"],  # parts that no layer of the model has
        [n for n in names if "layers.2.hnorm" not in n],
        [n for n in names if "layers.2.mlp" not in n],
        [n.replace("layers.2.", "layers.5.") for n in names],  # not the next
    ]
    assert [find_prediction(found.model, each) for each in wrong] == [None] * len(wrong)
    assert prediction_of(found.model) is None


def test_shapes_that_are_others_are_carried(source: Path, tmp_path: Path) -> None:
    """As where the experts of the model were pruned, and those of the layer were not."""
    pruned = shutil.copytree(source, tmp_path / "s")
    tensors = load_file(pruned / "model.safetensors")
    tensors["model.layers.2.mlp.gate.weight"] = torch.zeros(12, 64).bfloat16()
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    found = open_source(ModelFolder(pruned), torch.float32, add_prediction)
    assert found.prediction is None and prediction_of(found.model) is None
    assert {n for n in found.checkpoint.names() if "layers.2." in n} == set(found.weights.carried)


def test_what_reaches_it(source: Path) -> None:
    """The layer's inputs of a streamed run are those of the model in memory."""
    found = open_source(ModelFolder(source), torch.float32, add_prediction)
    model, batches = found.model, [torch.randint(4096, (2, 16)) for _ in range(2)]
    found.weights.load(found.resident(), torch.float32)
    scratch = Scratch()
    with torch.no_grad(), seeing_last(found, scratch) as seen:
        for event in suspended(model, found.stages(), [inputs_of(model, ids) for ids in batches]):
            if isinstance(event, Waiting):
                if event.index == 1:
                    seen.keep_calls(event.calls)
                with found.loaded(found.structure.layers[event.index].name, torch.float32):
                    event.go_on([event.forward(*c.args, **c.kwargs) for c in event.calls])
    calls = prediction_calls(found, seen, batches, scratch)
    whole = opened(source)
    for ids, call in zip(batches, calls, strict=True):
        with torch.no_grad():
            hidden = whole.model.model(ids).last_hidden_state
            expected = joined(whole.model, whole.prediction, hidden, ids)
            following = whole.model.model.embed_tokens(ids[:, 1:])
            layer = whole.model.model.layers[2]
            both = [layer.enorm(following), layer.hnorm(hidden[:, :-1])]
            by_hand = layer.eh_proj(torch.cat(both, -1))
        assert_close(call.args[0], expected)
        assert_close(call.args[0][:, :-1], by_hand)


@pytest.mark.parametrize("kind, config", [("nextn", GPTQ), ("mtp", GPTQ), slow("nextn", RTN)])
def test_quantized_stored_and_measured(tmp_path: Path, demo: Path, kind, config, capsys) -> None:
    source = with_prediction(tmp_path / "s", demo, kind)
    report = qmoe.quantize(source, tmp_path / "q", config, progress=False)
    layer, join = {
        "nextn": ("model.layers.2", "model.layers.2.eh_proj"),
        "mtp": ("mtp.layers.0", "mtp.fc"),
    }[kind]
    before, after = weights(source), weights(tmp_path / "q")
    assert report["prediction"]["layer"] == layer
    assert f"{layer}.mlp.experts.0.gate_proj.weight_packed" in after
    assert f"{layer}.self_attn.o_proj.weight_packed" in after
    assert torch.equal(after[f"{join}.weight"], before[f"{join}.weight"])
    assert set(report["prediction"].get("carried", {})) == set(COPIES if kind == "nextn" else ())
    assert all(torch.equal(after[n], before[n]) for n in COPIES if kind == "nextn")
    record = report["layers"][-1]
    assert record["name"] == layer and (record["error"] is not None) == (config is GPTQ)
    ignored = json.loads((tmp_path / "q" / "config.json").read_text())
    assert join in ignored["quantization_config"]["ignore"]

    model, _ = qmoe.load(tmp_path / "q", "float32", progress=False)
    more, _ = qmoe.load(tmp_path / "q", "float32", prediction=True, progress=False)
    ids = torch.randint(500, (2, 12))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, more(ids).logits)
    assert prediction_of(model) is None and prediction_of(more).layer == layer
    model.save_pretrained(tmp_path / "saved")
    assert weights(tmp_path / "saved").keys() == after.keys()

    scores = evaluate(tmp_path / "q", against=source, text="heldout:austen", samples=1, seqlen=32)
    assert set(scores["acceptance"]) == {"original", "qmoe"}
    assert all(0 <= of["all"] <= 1 for of in scores["acceptance"].values())
    main(["inspect", str(tmp_path / "q")])
    assert f"{layer}: predicts tokens beyond the next; quantized" in capsys.readouterr().out


def test_what_is_lost_is_a_finding(source: Path, tmp_path: Path) -> None:
    """A copy, and a packed matrix."""
    qmoe.quantize(source, tmp_path / "q", RTN, progress=False)
    for name in (COPIES[0], "model.layers.2.mlp.experts.0.up_proj.weight_packed"):
        broken = shutil.copytree(tmp_path / "q", tmp_path / name)
        for file in broken.glob("*.safetensors"):
            tensors = load_file(file)
            if tensors.pop(name, None) is not None:
                save_file(tensors, file, metadata={"format": "pt"})
        index = broken / "model.safetensors.index.json"
        entries = json.loads(index.read_text())
        del entries["weight_map"][name]
        index.write_text(json.dumps(entries))
        report = json.loads((broken / "qmoe_report.json").read_text())
        with pytest.raises((AuditError, CheckpointError)):
            audit_folder(ModelFolder(broken), report["digests"], report["unpacked_sha256"])


def test_keep_leaves_it_as_it_is(source: Path, tmp_path: Path) -> None:
    kept = QuantConfig("rtn", Scheme(4, 32), mtp="keep")
    report = qmoe.quantize(source, tmp_path / "q", kept, progress=False)
    own = {name: t for name, t in weights(source).items() if "layers.2." in name}
    found = weights(tmp_path / "q")
    assert all(torch.equal(found[name], t) for name, t in own.items())
    assert report["prediction"] == {"carried": {n: own[n].nbytes for n in sorted(own)}}
    packed = open_packed(ModelFolder(tmp_path / "q"), predicting=True)
    assert packed.prediction is None
    qmoe.load(tmp_path / "q", prediction=True, progress=False)


@pytest.mark.parametrize("shards", [2, slow(1), slow(3)])
def test_a_run_that_was_stopped_writes_the_same(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    qmoe.quantize(source, tmp_path / "whole", GPTQ, progress=False)
    with monkeypatch.context() as patched:
        interrupt_after(patched, shards)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(source, tmp_path / "q", GPTQ, progress=False)
    qmoe.quantize(source, tmp_path / "q", GPTQ, progress=False)
    assert same_files(tmp_path / "whole", tmp_path / "q")


def test_a_fused_rotation_is_refused(source: Path, tmp_path: Path) -> None:
    config = QuantConfig(experts=Scheme(4, 32), rotate="fused", calibration=LITTLE_TEXT)
    with pytest.raises(ConfigError, match=r"rotate: fused .* model.layers.2.eh_proj reads"):
        qmoe.quantize(source, tmp_path / "q", config, progress=False)


def test_sizes_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    for name, add in (("quantize", add_prediction), ("keep", None)):
        config = QuantConfig("rtn", Scheme(4, 32), mtp=name)
        found = open_source(ModelFolder(source), torch.float32, add)
        told = sizes(found, config, stacks(found, config))
        report = qmoe.quantize(source, tmp_path / name, config, progress=False)
        assert told.tensors == sum(t.nbytes for t in weights(tmp_path / name).values())
        assert told.prediction >= sum(report["prediction"]["carried"].values())


def test_gguf_leaves_it_out_and_says_so(demo: Path, tmp_path: Path) -> None:
    """Of a family that has none, in the names of those that do."""
    plain = shutil.copytree(demo, tmp_path / "plain")
    twin = shutil.copytree(demo, tmp_path / "twin")
    tensors = load_file(twin / "model.safetensors")
    like = {n: t for n, t in tensors.items() if n.startswith("model.layers.3.")}
    more = {n.replace("layers.3.", "layers.4."): t.clone() for n, t in like.items()}
    for part in ("enorm", "hnorm", "shared_head.norm"):
        more[f"model.layers.4.{part}.weight"] = torch.ones(256).bfloat16()
    more["model.layers.4.eh_proj.weight"] = torch.ones(256, 512).bfloat16()
    save_file(tensors | more, twin / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((twin / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (twin / "config.json").write_text(json.dumps(config))
    made = []
    for folder in (plain, twin):
        qmoe.quantize(folder, folder / "q", QuantConfig("rtn", target="llama.cpp"), progress=False)
        made.append(export(ModelFolder(folder / "q"), folder / "m.gguf", progress=False))
    assert made[0]["types"] == made[1]["types"]
    [note] = set(made[1]["notes"]) - set(made[0]["notes"])
    assert note.startswith("left out, they predict tokens beyond the next: model.layers.4.")
