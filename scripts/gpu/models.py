"""Whole models on the GPU: quantized there and on the CPU, loaded, compared, generating."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import qmoe
from gpu.generate import generate
from gpu.record import Record
from gpu.uninstalled import ROOT
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CalibrationConfig, QuantConfig
from qmoe.measure.baselines import original
from qmoe.model.source import open_source
from qmoe.pipeline.memory import on_device

DEMO = ROOT / "tests" / "data" / "demo-moe"
HELDOUT = ROOT / "calibration" / "text" / "heldout" / "austen.txt"
TEXT = "The family of Dashwood had long been settled in Sussex. Their estate was large, and"
EQUAL, CLOSE_KL = 0.995, 1.05


def models(record: Record, device: torch.device, folder: Path, samples: int) -> None:
    """Rows for quantizing, loading and generating the demo model."""
    text = CalibrationConfig(samples=samples, self_samples=0)
    config = QuantConfig(search_grid=False, calibration=text)
    made = {}
    for where in dict.fromkeys((device, torch.device("cpu"))):
        made[where.type] = folder / f"demo-{where.type}"
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        qmoe.quantize(DEMO, made[where.type], config, device=str(where), progress=False)
        if where.type == "cuda":
            peak = torch.cuda.max_memory_allocated(where)
            promised = on_device(open_source(ModelFolder(DEMO), torch.float32), config)
            record.row(what="peak while quantizing", GB=peak / 1e9, promised_GB=promised / 1e9)
            if peak > promised:
                record.problem(f"quantizing took {peak} bytes of the GPU, promised {promised}")
    if device.type == "cuda":
        same_integers(record, made["cuda"], made["cpu"])
    same_logits(record, device, made["cpu"], made[device.type])
    same_tokens(record, device, made["cpu"])


def same_integers(record: Record, one: Path, other: Path) -> None:
    """The share of stored words that are equal: sums in another order turn a rounding here and
    there, and what follows it in the row."""
    a, b = ({k: v for p in sorted(f.glob("*.safetensors")) for k, v in load_file(p).items()}
            for f in (one, other))  # fmt: skip
    words = [(a[k] == b[k]) for k in a if k.endswith("weight_packed")]
    share = sum(int(w.sum()) for w in words) / sum(w.numel() for w in words)
    record.row(what="equal words, GPU and CPU", share=share)


@torch.no_grad()
def same_logits(record: Record, device: torch.device, cpu: Path, gpu: Path) -> None:
    """The same folder on both devices; and what each folder loses against the original."""
    plain, tokenizer = qmoe.load(cpu, torch.float32, progress=False)
    ids = torch.tensor(tokenizer(HELDOUT.read_text()[:20000]).input_ids[:2048]).view(-1, 256)
    wanted = plain(input_ids=ids).logits
    base = original(ModelFolder(DEMO), torch.float32)(input_ids=ids).logits.log_softmax(-1)
    moved = qmoe.load(cpu, torch.float32, device=str(device), progress=False)[0]
    got = moved(input_ids=ids.to(device)).logits.cpu()
    off = float((got - wanted).norm() / wanted.norm())
    record.row(what="logits, GPU against CPU, float32", relative_error=off)
    if off > 1e-3:
        record.problem(f"logits on {device} differ from the CPU's by {off:.2g}")
    there = qmoe.load(gpu, torch.float32, device=str(device), progress=False)[0]
    losses = {
        "CPU": kl(base, wanted),
        "GPU": kl(base, there(input_ids=ids.to(device)).logits.cpu()),
    }
    record.row(what="KL to the original of what was quantized on", **losses)
    if losses["GPU"] > CLOSE_KL * losses["CPU"]:
        record.problem(f"KL of the model quantized on {device}: {losses}")


def same_tokens(record: Record, device: torch.device, folder: Path) -> None:
    """64 tokens by CUDA graphs, and the same launch by launch."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = qmoe.load(folder, dtype, device=str(device), progress=False)
    prompt = torch.tensor([tokenizer(TEXT).input_ids], device=device)
    tokens = 64 if device.type == "cuda" else 8
    eager, graphs = (generate(model, prompt, tokens, graph) for graph in (False, True))
    what, equal = f"{tokens} tokens, graphs against launches", torch.equal(eager, graphs)
    record.row(what=what, equal=equal, text=tokenizer.decode(graphs[0]))
    if not equal:
        record.problem("tokens by CUDA graphs differ from those launch by launch")


def kl(base: Any, logits: Any) -> float:
    """Nats per token from the original's log-probabilities."""
    log_p = logits.float().log_softmax(-1)
    return float((base.exp() * (base - log_p)).sum(-1).mean())
