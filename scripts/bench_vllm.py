"""qmoe's folders in vLLM on a CPU: the same text as in qmoe, and speed and memory of the server.

    python -P scripts/bench_vllm.py --vllm VENV/bin --work DIR --part texts
    python -P scripts/bench_vllm.py --vllm VENV/bin --work DIR --part server --out docs/engines.md

VENV is a virtual environment with vLLM and qmoe (docs/engines.md says how to make it); this script
runs in qmoe's own. Part "texts" quantizes small models of several families and compares greedy text
and log probabilities of vLLM with those of qmoe. Part "server" runs `vllm serve` for a random
model that is large enough to see its weights, packed and in 16 bits, and asks it over HTTP. --out
puts the tables of the parts that have run in DIR into the page.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import qmoe
from qmoe.format.compressed_tensors import Schemes, unpacked_tensors
from qmoe.measure.families import families, save_tiny

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "tests" / "data" / "demo-moe"
BEGIN, END = "<!-- vllm: begin, by scripts/bench_vllm.py -->", "<!-- vllm: end -->"
PROMPTS = ("The capital of France is", "Once upon a time there was a", "In the year 1905 the")
TOKENS = 24
RTN = qmoe.QuantConfig("rtn")
SMALL = replace(RTN, experts=qmoe.Scheme(4, 32), dense=qmoe.Scheme(8, -1))
COMMON = dict(
    vocab_size=4096, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    pad_token_id=None, num_experts_per_tok=2, tie_word_embeddings=False,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=128, intermediate_size=256,
    first_k_dense_replace=1, n_group=1, topk_group=1,
)  # fmt: skip
# Random models of families that have no small trained one here.
RANDOM: dict[str, dict[str, Any]] = {
    "mixtral": dict(intermediate_size=256, num_local_experts=8, head_dim=64),
    "olmoe": dict(intermediate_size=128, num_experts=8),
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT
    | dict(norm_topk_prob=True, topk_method="noaux_tc", scoring_func="sigmoid"),
    "gpt_oss": dict(
        intermediate_size=128, num_local_experts=8, head_dim=64, sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters=dict(
            rope_type="yarn", rope_theta=150000.0, factor=2.0, beta_fast=32.0, beta_slow=1.0,
            original_max_position_embeddings=256, truncate=False,
        ),
    ),
    "llama4_text": dict(
        intermediate_size=128, intermediate_size_mlp=256, num_local_experts=8, head_dim=64,
        num_experts_per_tok=1, attention_chunk_size=256, no_rope_layers=[1, 0], use_qk_norm=False,
        moe_layers=[0, 1], rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip
# How the names of folders end that are compared with vLLM itself: its latent attention gives other
# logits than transformers', of 16-bit models too.
EXPANDED = "beside vLLM with expanded weights"
THIRD = replace(
    RTN, experts=qmoe.Scheme(3, 32, symmetric=False), dense=qmoe.Scheme(4, 64, symmetric=False)
)
EIGHTH = replace(RTN, experts=qmoe.Scheme(2, 32), dense=None)


def folders(work: Path) -> dict[str, Path]:
    """Quantized folders by what they are; those that are in `work` already are taken."""
    mixed = {
        f"model.layers.{i}.mlp.experts.{name}": "23482348" * 2
        for i in range(4)
        for name in ("gate_up_proj", "down_proj")
    }
    cases: dict[str, tuple[str, qmoe.QuantConfig]] = {
        "Qwen3-MoE, trained: int4 g128, dense int8 per channel": ("demo", RTN),
        "Qwen3-MoE: int3 g32 with zero points, dense int4 g64 with zero points": ("demo", THIRD),
        "Qwen3-MoE: 2, 3, 4 and 8 bits among the experts of a layer": (
            "demo",
            replace(SMALL, widths=mixed),
        ),
        "Qwen3-MoE: int2 g32, rotated online, dense 16 bits": (
            "demo",
            replace(EIGHTH, rotate="online"),
        ),
        "Mixtral, random: int4 g32, dense and lm_head int8 per channel": (
            "mixtral",
            replace(SMALL, lm_head=qmoe.Scheme(8, -1)),
        ),
        "OLMoE, random: int4 g32, dense int8 per channel": ("olmoe", SMALL),
        "gpt-oss, random: int4 g32, dense int8 per channel": ("gpt_oss", SMALL),
        "Llama 4 (text), random: int4 g32, dense int8 per channel": ("llama4_text", SMALL),
        "DeepSeek-V2, random: the same, beside vLLM with expanded weights": ("deepseek_v2", SMALL),
        "DeepSeek-V3, random: the same, beside vLLM with expanded weights": ("deepseek_v3", SMALL),
    }
    made = {}
    for i, (what, (model, config)) in enumerate(cases.items()):
        made[what] = work / f"texts-{i}"
        if not made[what].is_dir():
            qmoe.quantize(source(model, work), made[what], config)
    return made


def source(model: str, work: Path) -> Path:
    """The 16-bit model, with the demo model's tokenizer."""
    if model == "demo":
        return DEMO
    folder = work / f"random-{model}"
    if not folder.is_dir():
        kind = CONFIG_MAPPING[model]
        (family,) = (f for f in families() if f.model_type == model)
        config = kind(**(COMMON | RANDOM[model]))
        config.architectures = [family.head]
        save_tiny(family, folder, dtype=torch.bfloat16, config=config)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO / name, folder / name)
    return folder


ADAPTED = "the first, with a LoRA adapter on attention"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# The first folder again, on two processes, and with an adapter.
TWICE: dict[str, dict[str, Any]] = {
    "the first, `--tensor-parallel-size 2`": {"tensor_parallel_size": 2},
    "the first, and `--enable-expert-parallel`": {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
    },
    ADAPTED: {"enable_lora": True, "lora_target_modules": TARGETS},
}


def adapter(work: Path) -> Path:
    """A random adapter of PEFT's on the demo model, which moves its logits."""
    import peft

    folder = work / "adapter"
    if not folder.is_dir():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(DEMO)
        config = peft.LoraConfig(r=8, init_lora_weights=False, target_modules=TARGETS)
        peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@torch.no_grad()
def reference(
    folder: Path, dtype: torch.dtype, adapter: Path | None = None
) -> list[dict[str, Any]]:
    """Greedy tokens and their log probabilities as qmoe gives them, of every prompt; `gap`: how far
    behind the second best one is."""
    model, tokenizer = qmoe.load(folder, dtype=dtype)
    if adapter is not None:
        model.load_adapter(adapter)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        one: dict[str, Any] = {"prompt": ids, "tokens": [], "logprobs": [], "gaps": []}
        for _ in range(TOKENS):
            logits = model(torch.tensor([ids + one["tokens"]])).logits[0, -1].float()
            best = torch.log_softmax(logits, -1).topk(2)
            one["tokens"].append(int(best.indices[0]))
            one["logprobs"].append(float(best.values[0]))
            one["gaps"].append(float(best.values[0] - best.values[1]))
        found.append(one)
    return found


def compared(ours: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """How far two lists of texts agree: tokens before the first difference, the largest difference
    of log probabilities in them, and the gap to the second best at each first difference."""
    same, most, gaps = 0, 0.0, []
    for a, b in zip(ours, other, strict=True):
        equal = [x == y for x, y in zip(a["tokens"], b["tokens"], strict=True)]
        count = equal.index(False) if False in equal else len(equal)
        same += count
        both = list(zip(a["logprobs"], b["logprobs"], strict=True))[:count]
        most = max([most, *(abs(x - y) for x, y in both)])
        gaps += [a["gaps"][count]] if count < TOKENS and "gaps" in a else []
    return {"same": same, "of": TOKENS * len(ours), "logprob": most, "gaps": gaps}


def expanded(packed: Path, folder: Path) -> Path:
    """The weights of a packed folder in float32, for vLLM without qmoe."""
    if folder.is_dir():
        return folder
    folder.mkdir()
    config = json.loads((packed / "config.json").read_text())
    schemes = Schemes(config, str(packed))
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    stored = {k: t for file in packed.glob("*.safetensors") for k, t in load_file(file).items()}
    plain = {k: t.contiguous() for k, t in unpacked_tensors(stored, schemes).items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder


def texts(work: Path, vllm: Path) -> list[dict[str, Any]]:
    """Every folder in float32 and bfloat16, by one process of vLLM."""
    rows, jobs, ours, beside = [], [], [], {}
    made = folders(work)
    cases = [(what, folder, {}) for what, folder in made.items()]
    cases += [(what, next(iter(made.values())), options) for what, options in TWICE.items()]
    for i, (what, folder, options) in enumerate(cases):
        lora = adapter(work) if what == ADAPTED else None
        each = {d: reference(folder, getattr(torch, d), lora) for d in ("float32", "bfloat16")}
        noise = compared(each["bfloat16"], each["float32"])
        for dtype, found in each.items():
            engine = {"model": str(folder), "dtype": dtype} | options
            prompts, out = [one["prompt"] for one in found], str(work / f"texts-{i}.{dtype}.json")
            job = {"engine": engine, "prompts": prompts, "tokens": TOKENS, "out": out}
            jobs.append(job | ({} if lora is None else {"adapter": str(lora)}))
            if what.endswith(EXPANDED):
                engine = engine | {"model": str(expanded(folder, work / f"expanded-{i}"))}
                out = str(work / f"expanded-{i}.{dtype}.json")
                beside[what, dtype] = jobs[-1] | {"engine": engine, "out": out}
            ours.append(found)
            rows.append({"what": what, "dtype": dtype, "noise": noise["logprob"]})
    (work / "jobs.json").write_text(json.dumps([*jobs, *beside.values()]))
    command = [vllm / "python", "-P", HERE / "vllm_texts.py", "jobs.json"]
    with (work / "texts.log").open("w") as log:
        subprocess.run([str(c) for c in command], cwd=work, stdout=log, stderr=log, check=True)
    for row, found, job in zip(rows, ours, jobs, strict=True):
        if (other := beside.get((row["what"], row["dtype"]))) is not None:
            found = json.loads(Path(other["out"]).read_text())
        row |= compared(found, json.loads(Path(job["out"]).read_text()))
    return rows


def texts_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| checkpoint | float32: tokens, log probabilities | bfloat16: tokens, log probabilities |",
        "|---|---|---|",
    ]
    by = {(row["what"], row["dtype"]): row for row in rows}
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = []
        for dtype in ("float32", "bfloat16"):
            row = by[what, dtype]
            cell = f"{row['same']} of {row['of']}, {row['logprob']:.1e}"
            if dtype == "bfloat16":
                cell += f" (qmoe's bfloat16 to its float32: {row['noise']:.1e})"
            if row["gaps"]:
                cell += f"; second best at the first difference: {max(row['gaps']):.1e} behind"
            cells.append(cell)
        lines.append(f"| {what} | {cells[0]} | {cells[1]} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True, help="bin of vLLM's environment")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=("texts", "server"), required=True)
    parser.add_argument("--out", type=Path, help="the page that the tables go into")
    args = parser.parse_args()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part == "texts":
        lines = texts_table(texts(args.work, args.vllm.absolute()))
    else:
        sys.path.insert(0, str(HERE))  # `python -P` leaves it out
        from vllm_server import server_table

        lines = server_table(args.work, args.vllm.absolute())
    (args.work / f"{args.part}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if args.out is not None:
        page = args.out.read_text()
        start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
        parts = [args.work / f"{part}.md" for part in ("texts", "server")]
        tables = "\n".join(p.read_text() for p in parts if p.is_file())
        args.out.write_text(f"{page[:start]}\n{tables}{page[stop:]}")


if __name__ == "__main__":
    sys.exit(main())
