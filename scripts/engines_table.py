"""What transformers, PEFT and qmoe itself do with a folder that qmoe wrote, tried on this machine.

    python -P scripts/engines_table.py                          # prints the table
    python -P scripts/engines_table.py --out docs/engines.md    # and puts it into the page

Each row is a line of Python that is run here, on the demo model quantized by rounding to nearest.
A row that does not do what it says ends the script with an error. Rows of libraries that are not
installed are left out, and the line above the table says so. The rows marked "without qmoe" run in
a process that has not imported it.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging

import qmoe
from qmoe.errors import QmoeError

DEMO = Path(__file__).resolve().parents[1] / "tests" / "data" / "demo-moe"
BEGIN, END = "<!-- table: begin, by scripts/engines_table.py -->", "<!-- table: end -->"
IDS = torch.arange(60, 90)[None]
LITTLE = qmoe.QuantConfig("rtn")
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert not [name for name in sys.modules if name.startswith("qmoe")]
with torch.no_grad():
    torch.save(model(torch.arange(60, 90)[None]).logits, sys.argv[2])
print(model.get_memory_footprint())
"""


@dataclass(frozen=True)
class Row:
    """code: what is tried, as the table shows it. run: does it and says what happened; it raises
    what is wrong."""

    code: str
    run: Callable[[Path, Path], str]
    needs: str = "transformers"


def packed(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def same(a: torch.Tensor, b: torch.Tensor) -> str:
    if not torch.equal(a, b):
        raise AssertionError(f"logits differ by {(a - b).abs().max()}")
    return "the same logits, to the bit"


@torch.no_grad()
def loaded(folder: Path, work: Path) -> str:
    model, ours = packed(folder), qmoe.load(folder, progress=False)[0]
    told = same(model(IDS).logits, ours(IDS).logits)
    return f"runs packed, {model.get_memory_footprint() / 1e6:.1f} MB; {told} as `qmoe.load`"


@torch.no_grad()
def without(folder: Path, work: Path) -> str:
    command = [sys.executable, "-P", "-W", "ignore", "-c", PLAIN, str(folder), str(work / "p.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours = packed(folder, dtype="float32")(IDS).logits
    expected = torch.load(work / "p.pt")
    error = distance(ours, expected)
    if error > 0.02:  # it rounds dequantized weights to the checkpoint's bfloat16
        raise AssertionError(f"logits differ by {error}")
    size = f"{int(done.stdout) / 1e6:.1f} MB in float32"
    return f"expands the weights, {size}; logits are those of the packed model within {error:.1e}"


def options(folder: Path, work: Path) -> str:
    for given in (
        {"dtype": "float32", "attn_implementation": "eager"},
        {"device_map": "auto", "dtype": "auto"},
    ):
        packed(folder, **given)
    return "taken"


@torch.no_grad()
def spread(folder: Path, work: Path) -> str:
    expected = packed(folder)(IDS).logits
    given = {"": "cpu", "model.layers.1": torch.device("cpu")}
    told = same(packed(folder, device_map=given)(IDS).logits, expected)
    disk = refused(lambda: packed(folder, device_map={"": "cpu", "lm_head": "disk"}))
    return f'{told}; "disk" is {disk}'


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except QmoeError as error:
        return f"refused: {str(error).partition(';')[0]}"
    raise AssertionError("was not refused")


def generated(folder: Path, work: Path) -> str:
    model, seen = packed(folder), []
    for how in ({}, {"cache_implementation": "static"}, {"num_beams": 3}, {"do_sample": True}):
        out = model.generate(IDS, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **how)
        seen.append(out)
    if not torch.equal(seen[0], seen[1]):
        raise AssertionError("a static cache gives other text")
    return "greedy, static cache (the same text), beams, sampling"


def piped(folder: Path, work: Path) -> str:
    said = pipeline("text-generation", model=str(folder))
    said = said("The capital of", max_new_tokens=4, do_sample=False)
    return f"{said[0]['generated_text']!r}"


def compiled(folder: Path, work: Path) -> str:
    model = packed(folder)
    with torch.no_grad():
        told = torch._dynamo.explain(model)(IDS, use_cache=False)
        if told.graph_break_count:
            raise AssertionError(told.break_reasons[0].reason)
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        equal = same(whole(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    return f"{told.graph_count} graph, {told.graph_break_count} breaks; {equal}"


def saved(folder: Path, work: Path) -> str:
    packed(folder).save_pretrained(work / "saved")
    files = sorted(p.name for p in folder.iterdir())
    if files != sorted(p.name for p in (work / "saved").iterdir()):
        raise AssertionError("other files")
    for name in files:
        if (folder / name).read_bytes() != (work / "saved" / name).read_bytes():
            raise AssertionError(f"other bytes in {name}")
    return f"{len(files)} files, the same bytes"


def in_memory(folder: Path, work: Path) -> str:
    model, tokenizer = packed(DEMO), AutoTokenizer.from_pretrained(DEMO)
    made = qmoe.quantize_model(model, tokenizer, None, LITTLE, work=work, progress=False)
    with torch.no_grad():
        return same(made(IDS).logits, packed(folder)(IDS).logits)


def trained(**target: Any) -> Callable[[Path, Path], str]:
    """LoRA on the packed model: a few steps lower the loss, merging is refused."""

    def run(folder: Path, work: Path) -> str:
        import peft

        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **target)
        model = peft.get_peft_model(packed(folder), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(6):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        if losses[-1] > losses[0] - 0.5:
            raise AssertionError(f"losses {losses}")
        refused(model.merge_and_unload)
        return f"loss {losses[0]:.2f} to {losses[-1]:.2f} in 6 steps; merging is refused"

    return run


@torch.no_grad()
def adapted(folder: Path, work: Path) -> str:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **EXPERTS | ATTENTION)
    original, model = packed(DEMO, dtype="float32"), packed(folder, dtype="float32")
    plain, before = original(IDS).logits, model(IDS).logits
    original = peft.get_peft_model(original, config)
    original.save_pretrained(work / "adapter")
    expected = original(IDS).logits
    moved = peft.PeftModel.from_pretrained(model, work / "adapter")(IDS).logits
    away, apart = distance(expected, plain), distance(moved, expected)
    if apart > away / 4:
        raise AssertionError(f"{apart} from the adapted original, which moved by {away}")
    return (
        f"the adapter moves the original's logits by {away:.0%}; the packed model is then "
        f"{apart:.1%} from it, without the adapter {distance(before, plain):.1%}"
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def prompted(folder: Path, work: Path) -> str:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(packed(folder), config)
    model(input_ids=IDS, labels=IDS).loss.backward()
    (prompt,) = [p for p in model.parameters() if p.requires_grad]
    if not prompt.grad.abs().max() > 0:
        raise AssertionError("no gradient")
    return "has gradients"


def by_trainer(folder: Path, work: Path) -> str:
    import peft
    from transformers import Trainer, TrainingArguments

    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **ATTENTION)
    model = peft.get_peft_model(packed(folder), config)
    how = TrainingArguments(
        str(work / "trainer"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 16
    done = Trainer(model=model, args=how, train_dataset=rows).train()
    return f"{done.global_step} steps, loss {done.training_loss:.2f}"


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
ROWS = [
    Row("AutoModelForCausalLM.from_pretrained(path)", loaded),
    Row("from_pretrained(path), without qmoe", without),
    Row('from_pretrained(path, dtype=.., device_map="auto", attn_implementation=..)', options),
    Row("from_pretrained(path, device_map={module: device, ..})", spread),
    Row("model.generate(..)", generated),
    Row('pipeline("text-generation", model=path)', piped),
    Row("torch.compile(model, fullgraph=True)", compiled),
    Row("model.save_pretrained(folder)", saved),
    Row("qmoe.quantize_model(model, tokenizer, ..)", in_memory),
    Row('LoraConfig(target_modules=["q_proj", "v_proj"])', trained(**ATTENTION), "peft"),
    Row('LoraConfig(target_modules="all-linear")', trained(target_modules="all-linear"), "peft"),
    Row('LoraConfig(target_parameters=["experts.gate_up_proj", ..])', trained(**EXPERTS), "peft"),
    Row("PeftModel.from_pretrained(model, adapter of the original)", adapted, "peft"),
    Row("PromptTuningConfig(..)", prompted, "peft"),
    Row("Trainer(model=get_peft_model(model, LoraConfig(..)), ..)", by_trainer, "peft"),
]  # fmt: skip


def found(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table() -> str:
    """The lines of the table, with the versions it was made with."""
    names = ("torch", "transformers", "compressed-tensors", "peft")
    have = {name: found(name) for name in names}
    absent = [name for name, number in have.items() if number is None]
    lines = ["With " + ", ".join(f"{n} {v}" for n, v in have.items() if v) + ", on a CPU"
             + (f" (not installed: {', '.join(absent)})" if absent else "") + ":", "",
             "| tried | what happens |", "|---|---|"]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        qmoe.quantize(DEMO, work / "quantized", LITTLE, progress=False)
        for row in ROWS:
            if have.get(row.needs):
                told = row.run(work / "quantized", work).replace(place, "")
                lines.append(f"| `{row.code}` | {told} |")
                print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a page that holds the two lines of the table")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    made = table()
    if out is not None:
        before, rest = out.read_text().split(BEGIN)
        after = rest.split(END)[1]
        out.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
