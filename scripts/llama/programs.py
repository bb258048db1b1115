"""llama.cpp's programs at work on files: converting, quantizing, logits, token ids.

They come from llama.cpp's own environment (scripts/peers/environments.py makes it). Its converter
needs torch and transformers, so it runs in qmoe's environment, as it is but for one look-up: it
knows tokenizers by a hash, and one trained for a small model has none.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peers.environments import HERE, python_of
from torch import Tensor

CONVERTER = """\
import sys, types; sys.path.insert(0, sys.argv[1])
import conversion.base as base, convert_hf_to_gguf as converter
# Asked for before it is known that the model has no file for it.
sys.modules['sentencepiece'] = types.SimpleNamespace(SentencePieceProcessor=None)
base.TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'
sys.argv[:2] = ['convert']
converter.main()
"""
KIND = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Llama:
    """Paths: of the source, and of each program (scripts/peers/llama_build.py)."""

    source: str
    logits: str
    quantize: str
    imatrix: str

    @classmethod
    def find(cls, work: Path) -> "Llama":
        """Built in an environment below `work` on the first call."""
        python = python_of("llama_bench", work)
        said = run(python, "-P", HERE / "llama_build.py", own=False)
        return cls(**json.loads(said.splitlines()[-1]))

    def convert(self, model: Path, out: Path) -> None:
        """The original model as float32, by llama.cpp's own converter."""
        start = (sys.executable, "-P", "-c", CONVERTER, self.source)
        run(*start, model, "--outfile", out, "--outtype", "f32")

    def make_imatrix(self, full: Path, text: str, out: Path) -> None:
        """An importance matrix from calibration text."""
        file = out.with_suffix(".txt")
        file.write_text(text)
        bos = "tokenizer.ggml.add_bos_token=bool:false"
        run(self.imatrix, "-m", full, "-f", file, "-o", out, "-c", 256, "-b", 256, "-t", 1,
            "--no-ppl", "--override-kv", bos)  # fmt: skip

    def quantized(self, full: Path, matrix: Path, kind: str, out: Path) -> None:
        """llama.cpp's own quantization, embeddings and output as they are."""
        run(self.quantize, "--imatrix", matrix, "--token-embedding-type", "bf16",
            "--output-tensor-type", "bf16", full, out, kind, 1)  # fmt: skip

    def logits_of(self, file: Path, tokens: Tensor, words: int) -> Iterator[Tensor]:
        """Logits [N, V] of each sample of token ids [samples, N]."""
        command = [self.logits, str(file), str(tokens.shape[1])]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(tokens.to(torch.int32).numpy().tobytes())
            process.stdin.close()
            for _ in tokens:
                data = process.stdout.read(tokens.shape[1] * words * 4)
                if len(data) != tokens.shape[1] * words * 4:
                    sys.exit(f"{file}: llama.cpp stopped")
                yield torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, words)

    def token_ids(self, file: Path, text: str) -> list[int]:
        """What llama.cpp's tokenizer makes of a text, without tokens around it."""
        done = subprocess.run([self.logits, str(file), "0"], input=text.encode(), check=True,
                              stdout=subprocess.PIPE)  # fmt: skip
        return np.frombuffer(done.stdout, np.int32).tolist()


def run(*command: Any, own: bool = True) -> str:
    """What a command said; ends with that if it fails. own: both outputs, else the standard one."""
    words = [str(word) for word in command]
    error = subprocess.STDOUT if own else None
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=error, text=True)
    if done.returncode:
        sys.exit(f"{Path(words[0]).name}: {done.stdout[-2000:]}")
    return done.stdout


def expand(file: Path, out: Path) -> None:
    """The same GGUF with every tensor in float32: what its weights are worth, without what
    llama.cpp's kernels round in their inputs."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        plain = tensor.data
        if tensor.tensor_type != KIND.F32:
            plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(plain, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def matrix_bits(file: Path) -> tuple[float, int, dict[str, int]]:
    """Stored bits per weight of the matrices of all layers, routers left out, the bytes of all
    tensors, and how many of the matrices have which type."""
    bits = weights = total = 0
    kinds: dict[str, int] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        total += int(tensor.data.nbytes)
        if (
            len(tensor.shape) > 1
            and tensor.name.startswith("blk.")
            and "gate_inp" not in tensor.name
        ):
            bits, weights = bits + 8 * int(tensor.data.nbytes), weights + int(tensor.n_elements)
            kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    return bits / weights, total, kinds
