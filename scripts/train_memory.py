"""Memory of fine-tuning: LoRA beside packed weights, and beside those of the 16-bit original.

    python -P scripts/train_memory.py --work DIR
    python -P scripts/train_memory.py --work DIR --out docs/engines.md    # and puts it into a page

A random model that is large enough to see its weights is quantized to nearest. Every case runs in a
process of its own, on a CPU: three steps of AdamW on one sample. What a process has for itself is
read every five milliseconds; the memory of Python and its libraries is left out.
"""

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch

import qmoe  # noqa: F401  # tells transformers of its quantizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # `python -P` leaves it out
from bench_serve import SHAPE, models  # noqa: E402

BEGIN, END = "<!-- training: begin, by scripts/train_memory.py -->", "<!-- training: end -->"
TOKENS, STEPS, RANK, SECONDS = 256, 3, 8, 0.005
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "experts": EXPERTS,
}
CASES = {
    f"{what}, LoRA on {target}": (folder, target)
    for target in TARGETS
    for what, folder in (("packed", "server-4"), ("16 bits", "server-16"))
}


def own() -> int:
    """Bytes that this process has for itself."""
    return int(psutil.Process().memory_full_info().uss)


class Peak:
    """The most that this process has had for itself since it was entered."""

    def __enter__(self) -> "Peak":
        self.most, self._stop = own(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(SECONDS):
            self.most = max(self.most, own())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def trained(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a model and of a step of training, and the losses."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    before = own()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = own() - before
    config = peft.LoraConfig(r=RANK, task_type="CAUSAL_LM", **target)
    model = peft.get_peft_model(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = torch.arange(TOKENS)[None] * 7 % 4096
    losses = []
    with Peak() as peak:
        for _ in range(STEPS):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    if not losses[-1] < losses[0]:
        raise AssertionError(f"losses {losses}")
    adapters = sum(p.numel() * p.element_size() for p in parameters)
    return {"loaded": loaded, "peak": peak.most - before, "adapters": adapters, "losses": losses}


def table(work: Path) -> list[str]:
    made = models(work)
    lines = [
        f"| Qwen3-MoE of {SHAPE['layers']} layers, hidden {SHAPE['hidden']}, {SHAPE['experts']} "
        f"experts of {SHAPE['intermediate']}; rank {RANK}, {TOKENS} tokens | weights on disk | "
        "memory, loaded | peak of training | adapters | loss |",
        "|---|---|---|---|---|---|",
    ]
    for what, (folder, _) in CASES.items():
        command = [sys.executable, "-P", __file__, "--work", str(work), "--case", what]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        one = json.loads(done.stdout.splitlines()[-1])
        disk = sum(file.stat().st_size for file in made[folder].glob("*.safetensors"))
        sizes = (disk, one["loaded"], one["peak"], one["adapters"])
        cells = [what, *(f"{size / 1e6:.0f} MB" for size in sizes)]
        lines.append(f"| {' | '.join(cells)} | {one['losses'][0]:.2f} to {one['losses'][-1]:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the page that the table goes into")
    parser.add_argument("--case", choices=CASES, help="one of the cases alone, as JSON")
    args = parser.parse_args()
    work = args.work.absolute()
    if args.case is not None:
        folder, target = CASES[args.case]
        print(json.dumps(trained(work / folder, TARGETS[target])))
        return
    work.mkdir(parents=True, exist_ok=True)
    lines = table(work)
    if args.out is not None:
        page = args.out.read_text()
        start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
        made = "\n".join(lines)
        args.out.write_text(f"{page[:start]}\n{made}\n{page[stop:]}")


if __name__ == "__main__":
    main()
