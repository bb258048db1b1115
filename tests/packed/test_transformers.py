"""Folders that qmoe wrote in transformers' own hands: from_pretrained, generate, save, compile."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import remote_models
import torch
from helpers import same_files
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TextStreamer,
    pipeline,
)
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import CompressedTensorsConfig

import qmoe
from qmoe.errors import ConfigError, OutputError, UnsupportedModelError
from qmoe.kernels.cpu.library import tier
from qmoe.model.experts import is_experts
from qmoe.packed.audit import audit_model
from qmoe.runtime.modules import packed_experts

IDS = torch.arange(60, 72)[None]


@pytest.fixture(scope="module")
def model(quantized_short):
    return AutoModelForCausalLM.from_pretrained(quantized_short)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def test_it_is_the_model_that_load_gives(model, quantized_short):
    assert all(packed_experts(module) for module in model.modules() if is_experts(module))
    assert audit_model(model, "from_pretrained").bytes["experts 16-bit"] == 0
    ours, _ = qmoe.load(quantized_short, progress=False)
    assert torch.equal(logits(model), logits(ours)) and model.dtype == ours.dtype
    assert type(ours) is type(model) and not model.training
    assert ours.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float32", "attn_implementation": "eager"}, torch.float32),
        ({"dtype": torch.float16, "device_map": "auto"}, torch.float16),
        ({"device_map": {"": "cpu"}, "attn_implementation": "sdpa"}, torch.bfloat16),
    ],
)
def test_options(options, dtype, quantized_short):
    made = AutoModelForCausalLM.from_pretrained(quantized_short, **options)
    assert made.dtype == dtype and made.model.embed_tokens.weight.dtype == dtype
    wanted = options.get("attn_implementation")
    ours = "qmoe_cpu" if tier() is not None else "sdpa"
    assert made.config._attn_implementation == (wanted or ours)
    ours, _ = qmoe.load(
        quantized_short, dtype, device="auto", attn_implementation=wanted, progress=False
    )
    assert torch.equal(logits(made), logits(ours))


def test_names_of_dtypes_in_load(quantized_short):
    assert qmoe.load(quantized_short, "float32", progress=False)[0].dtype == torch.float32
    assert qmoe.load(quantized_short, "auto", progress=False)[0].dtype == torch.bfloat16
    for wrong in ("int8", "half precision"):
        with pytest.raises(ConfigError, match="dtype: expected a torch.dtype"):
            qmoe.load(quantized_short, wrong, progress=False)


def test_hub_options_reach_the_download(quantized_short, monkeypatch):
    seen = []

    def download(name, **options):
        seen.append((name, {k: options.get(k) for k in ("revision", "token", "cache_dir")}))
        return str(quantized_short)

    monkeypatch.setattr("qmoe.checkpoint.folders.snapshot_download", download)
    qmoe.load("org/name", revision="v1", token="t", cache_dir="c", progress=False)
    kept = {"token": "t", "cache_dir": "c"}
    # The second asks for the very revision that the first one gave.
    revisions = ("v1", quantized_short.name)
    assert seen == [("org/name", {"revision": revision, **kept}) for revision in revisions]


def test_a_folder_of_another_program_is_left_to_transformers(quantized_short):
    entry = json.loads((quantized_short / "config.json").read_text())["quantization_config"]
    assert AutoQuantizationConfig.from_dict(entry).to_dict() == entry
    del entry["producer"]
    assert type(AutoQuantizationConfig.from_dict(entry)) is CompressedTensorsConfig


def test_refusals(quantized_short):
    with pytest.raises(ConfigError, match="expected cpu, cuda or cuda:N, got 'disk'"):
        device_map = {"model": "cpu", "lm_head": "disk"}
        AutoModelForCausalLM.from_pretrained(quantized_short, device_map=device_map)
    with pytest.raises(UnsupportedModelError, match="holds a Qwen3MoeForCausalLM"):
        AutoModel.from_pretrained(quantized_short)


def test_a_folder_that_lacks_tensors_is_refused(quantized_short, tmp_path):
    folder = shutil.copytree(quantized_short, tmp_path / "copy")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    assert len(index["weight_map"]) > 100
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(qmoe.QmoeError, match="tensors are missing"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_generate(how, model, quantized_short):
    out = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, **how)
    assert out.shape == (1, IDS.shape[1] + 5)
    if "num_beams" not in how and not how.get("do_sample"):
        ours, _ = qmoe.load(quantized_short, progress=False)
        greedy = ours.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        assert torch.equal(out, greedy)


def test_continuous_batching_gives_the_text_of_generate(model, quantized_short, monkeypatch):
    # transformers asks torch which accelerator there is; other tests may have pretended one.
    monkeypatch.setattr(torch, "get_device_module", lambda: torch.cpu)
    prompts = [IDS[0].tolist(), IDS[0, :5].tolist()]
    how = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [model.generate(torch.tensor([ids]), how)[0, len(ids) :].tolist() for ids in prompts]
    batched = AutoModelForCausalLM.from_pretrained(quantized_short)
    out = batched.generate_batch(prompts, how, progress_bar=False)
    assert [one.generated_tokens for one in out.values()] == expected


def test_pipeline_and_streaming(model, quantized_short, capsys):
    tokenizer = AutoTokenizer.from_pretrained(quantized_short)
    said = pipeline("text-generation", model=str(quantized_short))("The", max_new_tokens=3)
    assert said[0]["generated_text"].startswith("The")
    ids = tokenizer("The sea", return_tensors="pt")
    model.generate(**ids, max_new_tokens=4, do_sample=False, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.startswith("The sea")


def test_saving_writes_the_same_bytes(model, quantized_short, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "saved")
    assert same_files(tmp_path / "saved", quantized_short)
    ours, _ = qmoe.load(tmp_path / "saved", progress=False)
    ours.save_pretrained(tmp_path / "saved")  # onto itself
    assert same_files(tmp_path / "saved", quantized_short)
    uploaded = []

    def upload(self, folder, repo, *args, **kwargs):
        for file in quantized_short.iterdir():
            assert file.read_bytes() == (type(file)(folder) / file.name).read_bytes()
        uploaded.append(repo)

    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.push_to_hub("me/model")
    ours.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="me/other")
    assert uploaded == ["me/model", "me/other"]


def test_what_is_not_saved(quantized_short, tmp_path):
    folder = shutil.copytree(quantized_short, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "other").mkdir()
    shutil.copyfile(next(folder.glob("*.safetensors")), tmp_path / "other" / "x.safetensors")
    with pytest.raises(OutputError, match="holds other weights"):
        model.save_pretrained(tmp_path / "other")
    norm = model.model.norm.weight
    with torch.no_grad():
        norm.mul_(2)
    with pytest.raises(OutputError, match="is not what is stored: model.norm.weight"):
        model.save_pretrained(tmp_path / "changed")
    with torch.no_grad():
        norm.div_(2)
    (folder / "qmoe_report.json").unlink()
    with pytest.raises(OutputError, match="qmoe_report.json is gone"):
        model.save_pretrained(tmp_path / "gone")
    assert not (tmp_path / "changed").exists() and not (tmp_path / "gone").exists()


def test_the_dtype_stays(model):
    with pytest.raises(ConfigError, match="load it again with dtype=torch.float16"):
        model.half()
    assert model.to("cpu", torch.bfloat16) is model


COMPILE = """
import sys, qmoe, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(60, 72)[None]
with torch.no_grad():
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    same = torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
print("same" if same else "another")
"""


@pytest.mark.slow
def test_compile_takes_a_model_in_one_graph(quantized_short):
    """In a process of its own: here the tests' checks of types are part of every function."""
    if tier() is None:
        pytest.skip("this installation has no CPU kernels, and torch's own forms are not one graph")
    command = [sys.executable, "-P", "-c", COMPILE, str(quantized_short)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_a_model_of_its_own_code_is_left_to_load(tmp_path, demo, own_cache):
    remote_models.save("grok", tmp_path / "source", demo)
    qmoe.quantize(
        tmp_path / "source", tmp_path / "q", qmoe.QuantConfig("rtn", qmoe.Scheme(4, 32)),
        trust_remote_code=True, progress=False,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="qmoe.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q", trust_remote_code=True)
    assert qmoe.load(tmp_path / "q", trust_remote_code=True, progress=False)[0].can_generate()
