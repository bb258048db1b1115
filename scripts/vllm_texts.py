"""Greedy text and log probabilities that vLLM gives of several folders, in one process of vLLM.

    python scripts/vllm_texts.py JOBS.json    # by the Python that has vLLM

JOBS.json: a list of {"engine": arguments of vLLM's LLM, "prompts": lists of token ids, "tokens":
how many, "out": a file, "adapter": a folder with one of LoRA, if any}. The file gets {"tokens",
"logprobs"} of each prompt; a job whose file is there is done. bench_vllm.py writes the jobs and
reads the files. qmoe comes in as vLLM's plugin.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

# One process for everything: an engine of its own for each folder would import vLLM each time.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Several processes may share a NUMA node.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


def texts(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What vLLM continues each prompt with."""
    usual = {"max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "seed": 0}
    llm = LLM(**(usual | job["engine"]))
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=0, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    found = []
    adapter = LoRARequest("adapter", 1, job["adapter"]) if "adapter" in job else None
    for request in llm.generate(prompts, greedy, use_tqdm=False, lora_request=adapter):
        one = request.outputs[0]
        ids = list(one.token_ids)
        logprobs = [at[i].logprob for at, i in zip(one.logprobs or [], ids, strict=True)]
        found.append({"tokens": ids, "logprobs": logprobs})
    return found


def main() -> None:
    (jobs,) = sys.argv[1:]
    for job in json.loads(Path(jobs).read_text()):
        out = Path(job["out"])
        if not out.is_file():
            out.write_text(json.dumps(texts(job)))
            gc.collect()
            cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
