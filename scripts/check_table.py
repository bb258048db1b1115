"""What `qmoe check` says of many folders, and whether the engines' own code says the same.

    python -P scripts/check_table.py --vllm VLLM_PYTHON                        # prints the table
    python -P scripts/check_table.py --vllm VLLM_PYTHON --out docs/engines.md  # and puts it there

Tiny random models are quantized to nearest in 29 ways. Each verdict of vLLM's rules is compared
with vLLM's own code (scripts/check_in_vllm.py, run by a Python that has vLLM), transformers' with
loading the folder there and comparing logits with qmoe's, of llama.cpp's with `qmoe export`. SGLang
does not run without a GPU: its verdicts are not confirmed. A verdict that the engine does not share
ends the script with an error.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import qmoe
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CHANNEL, QuantConfig, Scheme
from qmoe.engines.check import ENGINES, check, engine
from qmoe.errors import QmoeError
from qmoe.export.to_gguf import export

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers import save_random  # noqa: E402

DEMO = ROOT / "tests" / "data" / "demo-moe"
BEGIN, END = "<!-- verdicts: begin, by scripts/check_table.py -->", "<!-- verdicts: end -->"
RULES_BEGIN, RULES_END = "<!-- rules: begin -->", "<!-- rules: end -->"
SIZES: dict[str, Any] = dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=4)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(moe_intermediate_size=128, head_dim=32, norm_topk_prob=True),
    "qwen2_moe": dict(moe_intermediate_size=128, shared_expert_intermediate_size=256),
    "mixtral": dict(intermediate_size=256),
    "olmoe": dict(intermediate_size=128),
    "gpt_oss": dict(intermediate_size=128, head_dim=32),
    "deepseek_v3": dict(
        moe_intermediate_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
}
CHANNELS = Scheme(8, CHANNEL)
FOUR = Scheme(4, 64)
FIRST = "model.layers.0.mlp.experts"


@dataclass(frozen=True)
class Case:
    """A folder: of a tiny model of the family, quantized with these settings."""

    family: str
    said: str
    settings: dict[str, Any]


def case(family: str, said: str, **settings: Any) -> Case:
    return Case(family, said, {"experts": FOUR, "dense": CHANNELS} | settings)


def mixed(*digits: str) -> dict[str, str]:
    return {f"{FIRST}.gate_up_proj": digits[0], f"{FIRST}.down_proj": digits[1]}


CASES = [
    case("qwen3_moe", "4 bits, groups of 64; linears 8 bits"),
    case("qwen3_moe", "the same, groups of 128", experts=Scheme(4, 128)),
    case("qwen3_moe", "the same, groups of 32", experts=Scheme(4, 32)),
    case("qwen3_moe", "3 bits", experts=Scheme(3, 64)),
    case("qwen3_moe", "2 bits", experts=Scheme(2, 64)),
    case("qwen3_moe", "8 bits", experts=Scheme(8, 64)),
    case("qwen3_moe", "4 bits, channel-wise", experts=Scheme(4, CHANNEL)),
    case("qwen3_moe", "8 bits, channel-wise", experts=Scheme(8, CHANNEL)),
    case("qwen3_moe", "2 bits, channel-wise", experts=Scheme(2, CHANNEL)),
    case("qwen3_moe", "4 bits, zero points", experts=Scheme(4, 64, symmetric=False)),
    case("qwen3_moe", "8 bits, zero points", experts=Scheme(8, 64, symmetric=False)),
    case("qwen3_moe", "linears 4 bits", dense=FOUR),
    case("qwen3_moe", "linears 3 bits", dense=Scheme(3, 64)),
    case("qwen3_moe", "linears 4 bits, zero points", dense=Scheme(4, 64, symmetric=False)),
    case("qwen3_moe", "linears 8 bits, zero points", dense=Scheme(8, 64, symmetric=False)),
    case("qwen3_moe", "linears of 4 and 8 bits", widths={"model.layers.0.self_attn.o_proj": "4"}),
    case("qwen3_moe", "q 4 bits, k and v 8 bits", widths={"model.layers.0.self_attn.q_proj": "4"}),
    case("qwen3_moe", "linears not quantized", dense=None),
    case("qwen3_moe", "lm_head 4 bits", lm_head=FOUR),
    case("qwen3_moe", "experts of 2 and 4 bits", widths=mixed("242424", "242424")),
    case("qwen3_moe", "layer 0 of 8 bits, `--target vllm`", widths=mixed("888888", "888888"),
         target="vllm"),
    case("qwen3_moe", "rotated (`--rotate online`)", rotate="online"),
    case("qwen3_moe", "rotated (`--rotate fused`)", rotate="fused"),
    case("qwen3_moe", "`--format exl3`", format="exl3", experts=Scheme(4, CHANNEL, codebook="mul1"),
         dense=None),
    case("qwen2_moe", "4 bits"),
    case("mixtral", "4 bits"),
    case("olmoe", "4 bits"),
    case("gpt_oss", "4 bits"),
    case("deepseek_v3", "4 bits"),
]  # fmt: skip
# Columns: the engine, and how it runs.
COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vLLM": ("vllm", {}),
    "vLLM, 2 GPUs": ("vllm", {"tp": 2}),
    "vLLM, 4 GPUs": ("vllm", {"tp": 4}),
    "vLLM on a CPU": ("vllm", {"device": "cpu"}),
    "SGLang": ("sglang", {}),
    "transformers": ("transformers", {}),
    "llama.cpp": ("llama.cpp", {}),
}


def made(one: Case, work: Path, i: int) -> Path:
    """The quantized folder."""
    source = work / f"source-{one.family}"
    if not source.exists():
        save_random(one.family, source, DEMO, torch.bfloat16, **SIZES | FAMILIES[one.family])
    folder = work / f"packed-{i}"
    qmoe.quantize(source, folder, QuantConfig("rtn", **one.settings), progress=False)
    return folder


def in_transformers(folder: Path) -> bool:
    """Whether transformers without qmoe gives qmoe's logits, within what bfloat16 weights cost."""
    ids = torch.arange(60, 90)[None]
    ours, _ = qmoe.load(folder, torch.float32, progress=False)
    with torch.no_grad():
        wanted = ours(ids).logits
    config = json.loads((folder / "config.json").read_text())
    config.get("quantization_config", {}).pop(
        "producer", None
    )  # so that it is left to transformers
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            found = model(ids).logits
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        print(f"  transformers: {str(error)[:150]}", file=sys.stderr)
        return False
    return bool((found - wanted).norm() < 0.05 * wanted.norm())


def exported(folder: Path) -> bool:
    """Whether the export to GGUF takes the folder."""
    try:
        export(ModelFolder(folder), folder / "model.gguf", progress=False)
    except QmoeError as error:
        print(f"  export: {str(error)[:150]}", file=sys.stderr)
        return False
    return True


def ask_vllm(python: str, folders: list[Path], work: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """What vLLM's code says, by the folder's number and the column."""
    keys = [
        (i, name) for i in range(len(folders)) for name, (e, _) in COLUMNS.items() if e == "vllm"
    ]
    cases = []
    for i, name in keys:
        how = COLUMNS[name][1]
        cases.append([str(folders[i]), how.get("tp", 1), how.get("device", "cuda")])
    (work / "cases.json").write_text(json.dumps(cases))
    script = str(ROOT / "scripts" / "check_in_vllm.py")
    done = subprocess.run(
        [python, "-P", script, str(work / "cases.json")], capture_output=True, text=True, cwd=work
    )
    line = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not line:
        raise SystemExit(f"check_in_vllm.py: {done.stderr[-2000:]}")
    return dict(zip(keys, json.loads(line[0].removeprefix("RESULT ")), strict=True))


def rows(work: Path, python: str | None) -> tuple[list[list[str]], list[str]]:
    """The table's rows, and what verdicts an engine does not share."""
    folders = [made(one, work, i) for i, one in enumerate(CASES)]
    said = {} if python is None else ask_vllm(python, folders, work)
    confirm: dict[str, Callable[[Path], bool]] = {
        "llama.cpp": exported,
        "transformers": in_transformers,
    }
    found, wrong = [], []
    for i, (one, folder) in enumerate(zip(CASES, folders, strict=True)):
        row = [one.family, one.said]
        verdicts = {name: check(folder, e, **how) for name, (e, how) in COLUMNS.items()}
        for name, verdict in verdicts.items():
            engine_of = COLUMNS[name][0]
            theirs: Any = said.get((i, name), {}).get("runs")
            if name in confirm and one.settings.get("format") != "exl3":
                theirs = confirm[name](folder)
            # vLLM's config and kernels are asked, and not its models.
            judged = all(b["about"] == "family" for b in verdict["broken"]) and engine_of == "vllm"
            judged |= verdict["passes"]
            if theirs is not None and theirs != judged:
                told = said.get((i, name), {}).get("says", "")
                wrong.append(f"{one}: {name}: we say {verdict['passes']}, it says {theirs}: {told}")
            row.append("kept" if verdict["passes"] else _short(verdict))
        found.append(row)
        print(" | ".join(row), file=sys.stderr)
    return found, wrong


def _short(verdict: dict[str, Any]) -> str:
    return ", ".join(b["about"] for b in verdict["broken"])


def rules_table() -> str:
    """Every rule of every engine, with its source."""
    lines = ["| engine | rule | what it says | source |", "|---|---|---|---|"]
    for name in ENGINES:
        known = engine(name)
        lines += [
            f"| {known.name} {known.version} | {r.name} | {r.says} | {r.source.replace('|', ' ')} |"
            for r in known.rules
        ]
    return "\n".join(lines)


def put(page: str, begin: str, end: str, table: str) -> str:
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"expected a line {begin!r} and one {end!r}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM 0.32")
    parser.add_argument("--out", type=Path, help="a page with the two comments, to put it into")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qmoe-check-") as work:
        found, wrong = rows(Path(work), args.vllm)
    header = ["family", "experts and linears", *COLUMNS]
    lines = [header, ["---"] * len(header), *found]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(table)
    for line in wrong:
        print(line, file=sys.stderr)
    if args.out and not wrong:
        page = put(args.out.read_text(), BEGIN, END, table)
        args.out.write_text(put(page, RULES_BEGIN, RULES_END, rules_table()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
