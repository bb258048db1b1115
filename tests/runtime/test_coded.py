"""Folders in EXL3's codes: written, read back, run, refused by tensor name, and gone on with."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import LITTLE_TEXT, interrupt_after, same_files
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import qmoe
import qmoe.packed.fill
import qmoe.packed.load
import qmoe.plan.run_plan
import qmoe.runtime.modules
from qmoe import QuantConfig
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli.main import main
from qmoe.errors import AuditError, CheckpointError, ConfigError, QmoeError
from qmoe.format.exl3_checkpoint import decoded_tensors
from qmoe.kernels.coded.stack import CodedStack
from qmoe.kernels.cpu import library
from qmoe.kernels.hosted.slots import SlotStack
from qmoe.model.skeleton import build
from qmoe.model.weight_map import WeightMap
from qmoe.packed.audit import audit_folder
from qmoe.plan.run_plan import RunPlan

pytestmark = pytest.mark.skipif(library.library() is None, reason="installed without a C compiler")
TEXT = vars(LITTLE_TEXT) | {"self_samples": 0}
FEW = QuantConfig.preset(
    "fast", format="exl3", experts={"bits": 3}, dense={"bits": 4}, beam=16, calibration=TEXT
)


@pytest.fixture(scope="module")
def coded(short, tmp_path_factory):
    path = tmp_path_factory.mktemp("coded") / "out"
    qmoe.quantize(short, path, FEW, progress=False)
    return path


def tensors_of(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_what_is_written_is_what_exllamav3_names(coded):
    tensors = tensors_of(coded)
    key = next(name for name in tensors if name.endswith("experts.0.up_proj.trellis"))[:-8]
    assert tensors[f"{key}.trellis"].dtype == torch.int16
    assert tensors[f"{key}.trellis"].shape[2] == 48
    assert tensors[f"{key}.suh"].dtype == tensors[f"{key}.svh"].dtype == torch.float16
    assert tensors[f"{key}.mul1"].tolist() == 0x83DCD12D - 2**32
    assert f"{key}.weight" not in tensors
    config = json.loads((coded / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "exl3" and config["bits"] == 3
    stored = json.loads((coded / "quantization_config.json").read_text())
    entry = stored.pop("tensor_storage")[key]
    assert stored == config
    assert entry["quant_format"] == "exl3" and entry["bits_per_weight"] == 3
    assert entry["mul1_multiplier"] == 0x83DCD12D
    assert entry["stored_tensors"][f"{key}.suh"] == {
        "shape": list(tensors[f"{key}.suh"].shape), "n_bytes": tensors[f"{key}.suh"].nbytes,
        "dtype": "torch.float16",
    }  # fmt: skip


def test_it_runs_as_the_matrices_it_stands_for(coded, short):
    exact = qmoe.load(coded, torch.float32, progress=False)[0]
    ids = torch.arange(24).view(1, -1)
    wanted = exact(input_ids=ids).logits
    original = tensors_of(short)
    shapes = {name: tuple(t.shape) for name, t in original.items() if t.dim() == 2}
    plain = decoded_tensors(tensors_of(coded), shapes)
    model = build(AutoConfig.from_pretrained(short), torch.float32)
    weights = WeightMap(model, ModelFolder.find(short, False).checkpoint())
    weights.load(weights.names(), torch.float32, plain)
    weights.tie()
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)
    rounded = qmoe.load(coded, torch.bfloat16, progress=False)[0](input_ids=ids).logits.float()
    assert (rounded - wanted).norm() < 0.05 * wanted.norm()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Loads a folder as for a GPU, whose kernels Triton's interpreter runs on the CPU."""

    def load(path, **options):
        with monkeypatch.context() as patch:
            for module in (qmoe.packed.load, qmoe.packed.fill, qmoe.runtime.modules):
                patch.setattr(module, "uses_arena", lambda device: True)
            patch.setattr(qmoe.plan.run_plan, "free_on", lambda device: 10**9)
            return qmoe.load(path, torch.float32, progress=False, **options)[0]

    return load


def test_it_runs_through_the_kernels_of_a_gpu(coded, on_a_gpu, tmp_path):
    """All resident, and with a part of the experts in slots; a plan for both sides is refused."""
    ids = torch.arange(60, 63)[None]
    wanted = qmoe.load(coded, torch.float32, progress=False)[0](input_ids=ids).logits
    whole = on_a_gpu(coded)
    held = [layer.mlp.experts.qmoe_arena for layer in whole.model.layers]
    assert all(isinstance(stack, CodedStack) and stack.activation for stack in held)
    torch.testing.assert_close(whole(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)
    little = on_a_gpu(coded, expert_memory=sum(stack.nbytes() for stack in held) // 2)
    assert isinstance(little.model.layers[0].mlp.experts.qmoe_arena, SlotStack)
    torch.testing.assert_close(little(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)
    RunPlan(10**6, 10**6, 64, 1, 10**6, 10**6, 10**5, True).write(tmp_path / "plan.json")
    with pytest.raises(ConfigError, match="not computed by the CPU beside a GPU"):
        on_a_gpu(coded, plan=tmp_path / "plan.json")


def test_gradients_flow_through_codes(coded):
    """As through the float32 matrices that the codes stand for."""
    model, _ = qmoe.load(coded, dtype=torch.float32, progress=False)
    table = model.get_input_embeddings()
    inputs = table(torch.arange(1, 9)[None]).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad.isfinite().all()
    step = torch.randn_like(inputs) * inputs.detach().abs().mean()
    with torch.no_grad():
        ends = [model(inputs_embeds=inputs + c * step).logits.double().sum() for c in (1e-2, -1e-2)]
    slope = ((ends[0] - ends[1]) / 2e-2).item()
    assert (inputs.grad * step).sum().item() == pytest.approx(slope, rel=0.05)


def test_the_commands_know_it(coded, capsys):
    assert main(["inspect", str(coded), "--experts"]) == 0
    said = capsys.readouterr().out
    assert "experts packed" in said
    audit = audit_folder(ModelFolder.find(coded, False))
    assert audit.bytes["experts packed"] and not audit.bytes["experts 16-bit"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(coded, short, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(short, tmp_path / "out", FEW, progress=False)
    qmoe.quantize(short, tmp_path / "out", FEW, progress=False)
    assert same_files(coded, tmp_path / "out")


def cut(tensor):
    return tensor[..., :-1].contiguous()


DAMAGE = {
    "an expert without codes": ("1.up_proj.trellis", None),
    "an expert without scales": ("1.up_proj.suh", None),
    "a tensor without rotation": ("1.up_proj.svh", cut),
    "codes of no rate": ("0.up_proj.trellis", cut),
    "codes of another rate": ("1.up_proj.trellis", lambda t: t[..., :32].contiguous()),
    "codes of another type": ("1.up_proj.trellis", lambda t: t.int()),
    "scales that are no numbers": ("0.down_proj.suh", lambda t: t * float("nan")),
    "another multiplier": ("0.down_proj.mul1", lambda t: t + 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(coded, tmp_path, damage):
    ending, how = DAMAGE[damage]
    broken = shutil.copytree(coded, tmp_path / "broken")
    (broken / "qmoe_report.json").unlink()
    tensors = tensors_of(broken)
    for file in [*broken.glob("*.safetensors"), *broken.glob("*.index.json")]:
        file.unlink()
    [name] = [n for n in tensors if n.endswith(f"layers.0.mlp.experts.{ending}")]
    tensor = tensors.pop(name)
    if how is not None:
        tensors[name] = how(tensor)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises((CheckpointError, AuditError)) as refused:
        qmoe.load(broken, progress=False)
    assert ending.rpartition(".")[0].split(".")[-1] in str(refused.value)


def test_tuning_moves_scales_and_no_codes(coded, short, tmp_path):
    report = qmoe.quantize(short, tmp_path / "out", replace(FEW, tune=6), progress=False)
    before, after = tensors_of(coded), tensors_of(tmp_path / "out")
    first = [n for n in before if "layers.0." in n]
    assert all(torch.equal(before[n], after[n]) for n in first if n.endswith(".trellis"))
    scales = [n for n in first if n.endswith((".suh", ".svh"))]
    assert scales and not any(torch.equal(before[n], after[n]) for n in scales)
    tuning = report["layers"][0]["tuning"]
    assert tuning["tuned"] < tuning["solved"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"experts": {"bits": 2.25}}, "1 to 8 in halves"),
        ({"experts": {"bits": 2.5, "codebook": "mcg"}}, "needs the codebook mul1"),
        ({"experts": {"codebook": "mul2"}}, "codebook: expected one of"),
        ({"experts": {"group_size": 64}}, "have none of these"),
        ({"distill": 5}, "distill: EXL3"),
        ({"beam": 0}, "beam: expected 1 or more"),
        ({"method": "awq", "search_grid": False, "refit": False}, "method: EXL3"),
        ({"rotate": "fused"}, "rotate: EXL3"),
    ],
)
def test_settings_that_do_not_go_with_codes(changes, said):
    with pytest.raises(ConfigError, match=said):
        QuantConfig.from_dict({"format": "exl3"} | changes)


def test_integers_have_no_codebook():
    with pytest.raises(ConfigError, match="needs schemes without a codebook"):
        QuantConfig.from_dict({"experts": {"codebook": "mul1", "group_size": -1}})
    with pytest.raises(QmoeError, match="bits: expected int"):
        QuantConfig.from_dict({"experts": {"bits": 2.5}})
