"""A small trained model with a layer that predicts the token beyond the next, to try qmoe on.

    python -P scripts/fit_prediction_layer.py tests/data/demo-moe DIR --kind nextn

Such layers are trained with their models, and no small trained model with one is published. So a
layer is fitted to a model that is left as it is: a copy of its last layer and what joins hidden
states and embeddings (qmoe/prediction), by the KL divergence of its draft for each token
to the model's own prediction of that token. DIR gets the model with the layer, in DeepSeek-V3's
names (`--kind nextn`) or in Qwen3-Next's (`--kind mtp`).
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmoe.calibration.batches import choose_samples
from qmoe.calibration.text import load_texts
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.model.source import open_source
from qmoe.model.structure import Prediction
from qmoe.model.tensor_names import original_names
from qmoe.prediction.acceptance import watched
from qmoe.prediction.attach import attach, prediction_of
from qmoe.prediction.draft import joined, with_states
from qmoe.prediction.names import EMBEDDING, HIDDEN, JOIN, NORM, OUTER

RATE = 2e-3
KINDS = ("nextn", "mtp")


def with_layer(folder: ModelFolder, kind: str) -> Any:
    """The model in float32 with a layer that is a copy of its last one."""
    source = open_source(folder, torch.float32)
    model, last = source.model, source.structure.layers[-1].name
    place, _, number = last.rpartition(".")
    layer = f"{place}.{int(number) + 1}" if kind == "nextn" else "mtp.layers.0"
    around = {part: f"{layer}.{part}" for part in OUTER}
    if kind == "mtp":
        around = {part: f"mtp.{name}" for part, name in OUTER.items()}
    attach(
        model,
        Prediction(layer, last, *(around[part] for part in (JOIN, EMBEDDING, HIDDEN, NORM))),
    )
    source.weights.load(source.weights.names(), torch.float32)
    source.weights.tie()
    begin(model)
    return model


def begin(model: Any) -> None:
    """First values of the layer: the last layer's, and of the join: the hidden state alone."""
    found: Any = prediction_of(model)
    norm = next(m for n, m in model.get_submodule(found.like).named_children() if "norm" in n)
    copied = dict(model.get_submodule(found.like).named_parameters())
    layer = model.get_submodule(found.layer)
    parts = [found.embedding_norm, found.hidden_norm, found.norm, found.join]
    for name, module in layer.named_modules():
        for key, _ in list(module.named_parameters(recurse=False)):
            full = f"{name}.{key}".strip(".")
            if full in copied:
                module._parameters[key] = torch.nn.Parameter(copied[full].detach().clone())
    for name in parts[:3]:
        weight = torch.ones_like(norm.weight)
        model.get_submodule(name).weight = torch.nn.Parameter(weight)
    size = norm.weight.shape[0]
    both = torch.cat([torch.randn(size, size) * 0.2 * size**-0.5, torch.eye(size)], dim=1)
    model.get_submodule(found.join).weight = torch.nn.Parameter(both)


def trained(model: Any) -> dict[str, Tensor]:
    """The layer's parameters by their names in the model."""
    found: Any = prediction_of(model)
    names = (found.layer, *found.before, found.norm)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(f"{each}." for each in names))
    }


def loss_of(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the drafts to the model's own predictions, and the share that it accepts."""
    found: Any = prediction_of(model)
    with torch.no_grad(), watched(model) as seen:
        logits = model(input_ids=ids, use_cache=False).logits
    states = joined(model, found, seen.hidden[0], ids)
    args, kwargs = with_states(seen.calls[0], states)
    output = model.get_submodule(found.layer)(*args, **kwargs)
    drafts = model.get_output_embeddings()(model.get_submodule(found.norm)(output))[:, :-1]
    wanted = logits[:, 1:].log_softmax(-1)
    drafted = drafts.log_softmax(-1)
    kl = (wanted.exp() * (wanted - drafted)).sum(-1).mean()
    return kl, (drafted.argmax(-1) == wanted.argmax(-1)).float().mean()


def fit(model: Any, samples: Tensor, steps: int, batch: int) -> None:
    """Adam, the rate falling to zero; prints the loss of every fiftieth step."""
    leaves = [parameter.requires_grad_() for parameter in trained(model).values()]
    optimizer = torch.optim.AdamW(leaves, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    begun = time.monotonic()
    for step in range(steps):
        at = torch.randint(len(samples), (batch,))
        kl, share = loss_of(model, samples[at])
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
        falling.step()
        if step % 50 == 0 or step + 1 == steps:
            took = time.monotonic() - begun
            print(f"step {step}: KL {kl:.3f}, accepted {share:.1%}, {took:.0f} s", flush=True)


def save(model: Any, folder: Path, out: Path, kind: str) -> None:
    """The model's own files, with the layer's tensors and its count in config.json added."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    count = "num_nextn_predict_layers" if kind == "nextn" else "mtp_num_hidden_layers"
    (out / "config.json").write_text(json.dumps(config | {count: 1}, indent=2))
    tensors = load_file(out / "model.safetensors")
    for name, parameter in trained(model).items():
        tensors |= {
            stored: tensor.detach().bfloat16().contiguous()
            for stored, tensor in original_names(model, name, parameter).items()
        }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = ModelFolder.find(args.model)
    model = with_layer(folder, args.kind)
    count = args.steps * args.batch
    tokenizer = folder.tokenizer(model.config)
    samples, _ = choose_samples(tokenizer, load_texts("bundled"), count, args.seqlen, 0)
    print(f"{len(samples)} samples of {args.seqlen} tokens")
    fit(model, samples, args.steps, args.batch)
    save(model, args.model, args.out, args.kind)


if __name__ == "__main__":
    main()
