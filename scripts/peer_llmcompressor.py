"""llm-compressor's GPTQ on a model folder, to be run with the Python of an environment that has it.

    pip install torch transformers llmcompressor
    python scripts/peer_llmcompressor.py SRC DST --samples 64

Its defaults, int4 g128 symmetric for every linear but router and lm_head, on random tokens. Prints
one line of JSON: seconds and the process's largest resident memory.
"""

import argparse
import json
import resource
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("src")
    parser.add_argument("dst")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    args = parser.parse_args()

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(args.src, dtype=torch.bfloat16)
    ids = torch.randint(0, model.config.vocab_size, (args.samples, args.seqlen))
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head", "re:.*mlp.gate$"])
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=args.seqlen,
        num_calibration_samples=args.samples,
        output_dir=args.dst,
    )
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main()
