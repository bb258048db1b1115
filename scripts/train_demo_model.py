"""Train the small Qwen3-MoE that the tests and the quickstart quantize.

    python scripts/train_demo_model.py --text WORK_DIR --out tests/data/demo-moe

WORK_DIR holds `<domain>.train.txt` (see split_text.py). The held-out text that ships with qmoe
is only used to report perplexity. About 50 minutes on two cores.
"""

import argparse
import csv
import math
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

HELDOUT = Path(__file__).resolve().parents[1] / "calibration" / "text" / "heldout"
VOCAB, WINDOW, BATCH = 4096, 256, 24


def build_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train(
        [str(f) for f in files],
        trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
        ),
    )
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, bos_token=end, model_max_length=1024
    )


def build_model() -> torch.nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, intermediate_size=512, moe_intermediate_size=128,
        num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, router_aux_loss_coef=0.002,
        output_router_logits=True, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")


def samples(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    model.eval()
    logits = torch.cat(
        [model(input_ids=x, output_router_logits=False).logits for x in ids.split(8)]
    )
    model.train()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(loss.item())


def unigram_perplexity(train: torch.Tensor, test: torch.Tensor) -> float:
    counts = torch.bincount(train.flatten(), minlength=VOCAB).float() + 1
    return math.exp(-(counts / counts.sum()).log()[test.flatten()].mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    files = sorted(args.text.glob("*.train.txt"))
    tokenizer = build_tokenizer(files)
    model = build_model()
    train = {f.stem.split(".")[0]: samples(tokenizer, f.read_text(encoding="utf-8")) for f in files}
    test = {
        d: samples(tokenizer, (HELDOUT / f"{d}.txt").read_text(encoding="utf-8")) for d in train
    }
    data = torch.cat(list(train.values()))
    print(Counter({d: x.numel() for d, x in train.items()}))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters,",
          f"{args.steps * BATCH / len(data):.2f} epochs", flush=True)  # fmt: skip

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(args.seed)
    order, curve, start = torch.empty(0, dtype=torch.long), [], time.time()
    for step in range(args.steps):
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = 2.5e-3 * min(1.0, (step + 1) / 60) * cosine
        if len(order) < BATCH:
            order = torch.randperm(len(data), generator=generator)
        batch, order = data[order[:BATCH]], order[BATCH:]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == args.steps - 1:
            speed = (step + 1) * BATCH * WINDOW / (time.time() - start)
            curve.append((step, round(loss.item(), 4)))
            print(f"step {step} loss {loss.item():.3f} {speed:.0f} tok/s", flush=True)

    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    with (args.out / "loss_curve.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "train_loss"), *curve])
    model.float()
    for domain, ids in test.items():
        print(f"{domain}: held-out perplexity {perplexity(model, ids):.1f},",
              f"unigram {unigram_perplexity(data, ids):.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
