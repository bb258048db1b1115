"""Whole folders as GGUF files, read back with the `gguf` package.

That llama.cpp runs them, and gives what qmoe gives, is shown by scripts/gguf_families.py.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import mostly_slow, save_random, slow
from safetensors.torch import load_file, save_file

import qmoe
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli.main import main
from qmoe.config import QuantConfig, Scheme
from qmoe.errors import ConfigError, OutputError, UnsupportedModelError
from qmoe.export.families import FAMILIES
from qmoe.export.to_gguf import export
from qmoe.format.compressed_tensors import Schemes, unpacked_tensors

KIND = gguf.GGMLQuantizationType
RTN = QuantConfig(
    method="rtn", search_grid=False, refit=False, experts=Scheme(4, 32), dense=Scheme(8, 32)
)


def quantized(
    family: str, folder: Path, demo: Path, config: QuantConfig = RTN, **changes: Any
) -> Path:
    source = save_random(family, folder / "source", demo, torch.bfloat16, **changes)
    qmoe.quantize(source, folder / "packed", config, progress=False)
    return folder / "packed"


def read(path: Path) -> tuple[gguf.GGUFReader, dict[str, np.ndarray]]:
    """A file, and its tensors as float32 by name."""
    reader = gguf.GGUFReader(path)
    return reader, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's tensors as what they stand for."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((folder / "config.json").read_text())
    found = unpacked_tensors(tensors, Schemes(config, "test"))
    return {name: tensor.float() for name, tensor in found.items()}


def same(found: np.ndarray, wanted: torch.Tensor) -> None:
    np.testing.assert_array_equal(found, wanted.numpy())


SIZES = {
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen2_moe": {"norm_topk_prob": False},
    "olmoe": {},
    "mixtral": {},
    "gpt_oss": {},
    "deepseek_v3": {},
}


@pytest.mark.parametrize(
    "family",
    mostly_slow([(f,) for f in SIZES], lambda f: f in ("qwen2_moe", "gpt_oss", "deepseek_v3")),
)
def test_tensors_are_the_folders(family: str, tmp_path: Path, demo: Path) -> None:
    """Every tensor decodes to the folder's weights, and none is left out."""
    packed = quantized(family, tmp_path, demo, **SIZES[family])
    result = export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)
    reader, found = read(tmp_path / "model.gguf")
    weights = weights_of(packed)
    assert result["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert {t.tensor_type.name for t in reader.tensors} == set(result["types"])
    same(found["token_embd.weight"], weights["model.embed_tokens.weight"])
    same(found["output_norm.weight"], weights["model.norm.weight"])
    layer = "model.layers.1."
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    names = ("w1", "w2", "w3") if family == "mixtral" else ("gate_proj", "down_proj", "up_proj")
    for theirs, ours in zip(("gate", "down", "up"), names, strict=True):
        experts = f"{layer}{block}.experts."
        count = len({n.split(".")[5] for n in weights if n.startswith(experts) and ".weight" in n})
        stack = torch.stack([weights[f"{experts}{e}.{ours}.weight"] for e in range(count)])
        same(found[f"blk.1.ffn_{theirs}_exps.weight"], stack)
    router = "router" if family == "gpt_oss" else "gate"
    same(found["blk.1.ffn_gate_inp.weight"], weights[f"{layer}{block}.{router}.weight"])
    assert sum(array.size for array in found.values()) == sum(t.numel() for t in weights.values())


def test_rows_of_q_and_k_change_places(tmp_path: Path, demo: Path) -> None:
    """Row 2i of a head in the file is row i of its first half, row 2i + 1 that of its second."""
    packed = quantized("mixtral", tmp_path, demo)
    export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)
    found, weights = read(tmp_path / "model.gguf")[1], weights_of(packed)
    for part, heads in (("q", 4), ("k", 2)):
        stored = weights[f"model.layers.0.self_attn.{part}_proj.weight"]
        size = len(stored) // heads
        for row in range(len(stored)):
            head, inside = divmod(row, size)
            other = head * size + inside % 2 * (size // 2) + inside // 2
            same(found[f"blk.0.attn_{part}.weight"][row], stored[other])
    same(found["blk.0.attn_v.weight"], weights["model.layers.0.self_attn.v_proj.weight"])


def test_latent_attention_is_split(tmp_path: Path, demo: Path) -> None:
    packed = quantized("deepseek_v3", tmp_path, demo)
    result = export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)
    found, weights = read(tmp_path / "model.gguf")[1], weights_of(packed)
    both = weights["model.layers.0.self_attn.kv_b_proj.weight"].view(4, 32, -1)
    same(found["blk.0.attn_k_b.weight"], both[:, :16].mT)
    same(found["blk.0.attn_v_b.weight"], both[:, 16:])
    bias = weights["model.layers.1.mlp.gate.e_score_correction_bias"]
    same(found["blk.1.exp_probs_b.bias"], bias)
    assert any("stored as F32: llama.cpp wants it transposed" in note for note in result["notes"])


def test_biases_that_alternate(tmp_path: Path, demo: Path) -> None:
    packed = quantized("gpt_oss", tmp_path, demo)
    export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)
    found, weights = read(tmp_path / "model.gguf")[1], weights_of(packed)
    both = weights["model.layers.0.mlp.experts.gate_up_proj_bias"]
    same(found["blk.0.ffn_gate_exps.bias"], both[:, ::2])
    same(found["blk.0.ffn_up_exps.bias"], both[:, 1::2])
    same(found["blk.0.attn_sinks.weight"], weights["model.layers.0.self_attn.sinks"])


def test_metadata(tmp_path: Path, demo: Path) -> None:
    """What llama.cpp builds its graph from; the tokenizer is the folder's."""
    packed = quantized("qwen3_moe", tmp_path, demo, norm_topk_prob=True)
    export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)
    fields = {k: f.contents() for k, f in read(tmp_path / "model.gguf")[0].fields.items()}
    wanted = {
        "general.architecture": "qwen3moe", "qwen3moe.block_count": 2,
        "qwen3moe.embedding_length": 64, "qwen3moe.attention.head_count": 4,
        "qwen3moe.attention.head_count_kv": 2, "qwen3moe.attention.key_length": 16,
        "qwen3moe.expert_count": 6, "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 32, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q4_0),
    }  # fmt: skip
    assert {name: fields.get(name) for name in wanted} == wanted
    assert len(fields["tokenizer.ggml.tokens"]) == 4096


def test_attention_in_16_bits_and_tied_embeddings(tmp_path: Path, demo: Path) -> None:
    """What is not quantized stays as it is stored; a head that llama.cpp wants is written twice."""
    config = QuantConfig(
        method="rtn", search_grid=False, refit=False, experts=Scheme(4, 32), dense=None
    )
    changes = {"norm_topk_prob": False, "tie_word_embeddings": True}
    packed = quantized("qwen2_moe", tmp_path, demo, config, **changes)
    export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)
    reader, found = read(tmp_path / "model.gguf")
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["output.weight"] == KIND.BF16
    assert kinds["blk.0.attn_q.bias"] == kinds["blk.0.ffn_gate_inp.weight"] == KIND.F32
    np.testing.assert_array_equal(found["output.weight"], found["token_embd.weight"])


@pytest.mark.parametrize("solver", ["gptq", slow("rtn"), slow("tuned")])
@pytest.mark.parametrize(("bits", "symmetric", "kind"), [(2, False, "Q2_K"), slow(3, True, "Q3_K")])
def test_target_fits_k_types(
    solver: str, bits: int, symmetric: bool, kind: str, tmp_path: Path, demo: Path
) -> None:
    """Scales of `--target llama.cpp` give 2 and 3 bits the types of 2.6 and 3.4 bits, whatever
    solver found them; widths without super-blocks are larger, and that is said."""
    experts = Scheme(bits, 32, symmetric, gguf=True)
    source = save_random(
        "qwen3_moe", tmp_path / "source", demo, torch.bfloat16, hidden_size=256, norm_topk_prob=True
    )
    text = qmoe.CalibrationConfig("bundled:austen", samples=2, seqlen=64, self_samples=0)
    config = {
        "rtn": QuantConfig(method="rtn", search_grid=False, refit=False, experts=experts),
        "gptq": QuantConfig(experts=experts, calibration=text, min_tokens=0),
        "tuned": QuantConfig(experts=experts, calibration=text, min_tokens=0, tune=2),
    }[solver]
    qmoe.quantize(source, tmp_path / "q", config, progress=False)
    result = export(ModelFolder(tmp_path / "q"), tmp_path / "model.gguf", progress=False)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["blk.1.ffn_up_exps.weight"] == kind
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q4_0"  # 32 inputs
    assert any("no multiple of 256" in note for note in result["notes"])


def test_the_target_fills_blocks(tmp_path: Path, demo: Path) -> None:
    """Matrices that no K type holds get the bits that the next type has room for, unless the
    settings have bits for them."""
    source = save_random(
        "qwen3_moe", tmp_path / "source", demo, torch.bfloat16, hidden_size=256, norm_topk_prob=True
    )
    own = "model.layers.0.mlp.experts.down_proj"
    table: dict[str, Any] = {"target": "llama.cpp", "method": "rtn", "widths": {own: "2" * 6}}
    config = QuantConfig.from_dict(table | {"experts": {"bits": 2}})
    report = qmoe.quantize(source, tmp_path / "q", config, progress=False)
    assert report["config"]["widths"] == {own: "2" * 6, own.replace(".0.", ".1."): "4" * 6}
    assert any(note.startswith("4 bits instead of fewer") for note in report["fallbacks"])
    result = export(ModelFolder(tmp_path / "q"), tmp_path / "model.gguf", progress=False)
    assert result["types"]["Q4_0"]["tensors"] == 2  # both, the first with room to spare
    assert [note[:9] for note in result["notes"] if "no multiple of 256" in note] == ["1 tensors"]


def test_free_scales_are_larger(tmp_path: Path, demo: Path) -> None:
    config = QuantConfig(method="rtn", search_grid=False, refit=False, experts=Scheme(2, 32))
    changes = {"hidden_size": 256, "norm_topk_prob": True}
    packed = quantized("qwen3_moe", tmp_path, demo, config, **changes)
    result = export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)
    assert any("have no common unit" in note and "--target" in note for note in result["notes"])


def test_refusals(tmp_path: Path, demo: Path) -> None:
    """By name, with what to do, and without a file."""
    packed = quantized("qwen2_moe", tmp_path, demo, norm_topk_prob=True)
    out = tmp_path / "model.gguf"
    with pytest.raises(UnsupportedModelError, match="norm_topk_prob = True, and llama.cpp never"):
        export(ModelFolder(packed), out, progress=False)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"model_type": "dots1"}))
    with pytest.raises(UnsupportedModelError, match=r"dots1: qmoe cannot export.*mixtral"):
        export(ModelFolder(packed), out, progress=False)
    (packed / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    out.write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        export(ModelFolder(packed), out, progress=False)
    assert out.read_text() == "mine"
    with pytest.raises(OutputError, match="does not exist"):
        export(ModelFolder(packed), tmp_path / "no" / "model.gguf", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "packed", "source"]


def test_scales_and_grids_that_no_type_has(tmp_path: Path, demo: Path) -> None:
    packed = quantized("qwen3_moe", tmp_path, demo, norm_topk_prob=True)
    file = next(f for f in packed.glob("*.safetensors") if "layers.0" in " ".join(load_file(f)))
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    before = tensors[name].clone()
    tensors[name][0, 0] = 1.04e-6
    save_file(tensors, file, metadata={"format": "pt"})
    result = export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)
    assert any(note.startswith("1 scales of 1 tensors are not float16") for note in result["notes"])
    tensors[name] = before * 1e-20
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"scales in float16.*--target llama.cpp"):
        export(ModelFolder(packed), tmp_path / "other.gguf", progress=False)
    dense = QuantConfig(
        method="rtn", search_grid=False, refit=False, dense=Scheme(8, 32, symmetric=False),
        experts=Scheme(4, 32),
    )  # fmt: skip
    packed = quantized("qwen3_moe", tmp_path / "asym", demo, dense, norm_topk_prob=True)
    with pytest.raises(ConfigError, match="no block type of llama.cpp holds int8 g32 asym"):
        export(ModelFolder(packed), tmp_path / "other.gguf", progress=False)
    assert not (tmp_path / "other.gguf").exists()


def test_rotated_weights_are_refused(tmp_path: Path, demo: Path) -> None:
    config = QuantConfig(
        method="rtn", search_grid=False, refit=False, rotate="online", experts=Scheme(4, 32)
    )
    packed = quantized("mixtral", tmp_path, demo, config)
    with pytest.raises(UnsupportedModelError, match="--rotate fused or off"):
        export(ModelFolder(packed), tmp_path / "model.gguf", progress=False)


def test_command(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has the folder's name; the table says what is in it."""
    packed = quantized("mixtral", tmp_path, demo)
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(packed), "--to", "gguf", "--no-tokenizer"]) == 0
    shown = capsys.readouterr().out
    assert "packed.gguf" in shown and "Q4_0" in shown and "no tokenizer" in shown
    assert read(tmp_path / "packed.gguf")[0].fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert main(["export", str(packed), "--to", "gguf"]) == 1
    assert "already exists" in capsys.readouterr().err


def test_every_family_is_tried() -> None:
    assert set(FAMILIES) == {*SIZES, "deepseek_v2"}  # the two DeepSeeks share their code
