"""How well the measured sensitivities predict KL: rank correlation over random choices of widths.

    python -P scripts/bench_sensitivity.py MODEL --corpus DIR --work DIR

Two predictions of the same random choices, all of one size, are compared with the KL to the
original that is measured on test text: the one that qmoe uses (finite differences by group,
qmoe/budget/measurements.py), and a Fisher estimate, in which an output error costs half its square
times the mean squared gradient of the log-likelihood of sampled tokens. Weights of a choice are
those of four uniform models, so no choice is solved anew. For models whose experts are fused.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

from qmoe.budget.guard import GuardText, batches_of
from qmoe.budget.quantize import base_config, measured
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import BITS, QuantConfig, Scheme
from qmoe.format.compressed_tensors import Schemes, unpacked_tensors
from qmoe.measure.baselines import original
from qmoe.model import experts
from qmoe.model.structure import find
from qmoe.model.tensor_names import matrix_names
from qmoe.pipeline.plan import check
from qmoe.pipeline.quantize import quantize

Place = tuple[str, int]  # a target of widths, and which of its matrices
Weights = dict[Place, Tensor]


def main() -> int:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"device": "cpu", "max_memory": None, "trust_remote_code": False}
    base = base_config(_settings(args, 4))
    plan = check(args.model, args.work / "none", base, statistics_from=(), save_statistics=None,
                 **how)  # fmt: skip
    kept = args.measurements or args.work / "measurements"
    found = measured(plan, kept, partial(quantize, progress=False, **how))
    model = original(ModelFolder(args.model), torch.float32)
    names = _names(model)
    before = {place: _matrix(model, place).clone() for place in names}
    weights = {bits: _weights(args, model, names, bits) for bits in BITS}
    costs = found.costs()
    predictions = {
        "finite differences": {(p, b): float(costs[p[0]][p[1], i])
                               for p in names for i, b in enumerate(BITS)},
        "Fisher": _fisher(model, plan.samples[: args.gradients], before, weights),
    }  # fmt: skip
    test = GuardText(str(args.corpus / "*.test.txt"), samples=args.samples)
    batches = [ids for _, ids in batches_of(ModelFolder(args.model), test)[0]]
    base_p = [_predict(model, ids) for ids in batches]
    for bits in args.bits:
        rng = random.Random(0)
        choices = [_choice(rng, before, bits) for _ in range(args.choices)]
        kl = []
        for choice in choices:
            for place, width in choice.items():
                _matrix(model, place).copy_(weights[width][place])
            kl.append(_kl(model, batches, base_p))
        for place, weight in before.items():
            _matrix(model, place).copy_(weight)
        print(f"{len(choices)} choices of {bits} bits: KL {min(kl):.5f} to {max(kl):.5f}")
        for name, cost in predictions.items():
            said = [sum(cost[item] for item in choice.items()) for choice in choices]
            rank = spearmanr(said, kl).statistic
            share = sum(said) / sum(kl)
            print(f"  {name:20} rank correlation {rank:.3f}, predicted / measured {share:.2f}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--measurements", type=Path, help="made before with the same settings")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.6, 3.2])
    parser.add_argument("--choices", type=int, default=40)
    parser.add_argument("--samples", type=int, default=4, help="of each domain's test text")
    parser.add_argument("--gradients", type=int, default=16, help="samples for Fisher")
    return parser.parse_args()


def _settings(args: argparse.Namespace, bits: int) -> QuantConfig:
    scheme = Scheme(bits, 128, symmetric=False)
    text = str(args.corpus / "*.train.txt")
    return QuantConfig.preset(args.preset, experts=scheme, dense=scheme, text=text, seqlen=256)


def _names(model: Any) -> list[Place]:
    """Every matrix."""
    found = []
    for layer in find(model).layers:
        for name in layer.experts:
            module = model.get_submodule(name)
            stacks = [f"{name}.{weight}" for weight in experts.expert_weights(module)]
            found += [(stack, e) for stack in stacks for e in range(module.num_experts)]
        found += [(name, 0) for name in layer.dense]
    return found


def _matrix(model: Any, place: Place) -> Tensor:
    """As the model has it, to be changed in place."""
    owner, _, weight = place[0].rpartition(".")
    if experts.is_experts(model.get_submodule(owner)):
        return experts.rows(model.get_submodule(owner), weight)[place[1]].data
    return model.get_submodule(place[0]).weight.data  # type: ignore[no-any-return]


def _weights(args: argparse.Namespace, model: Any, names: list[Place], bits: int) -> Weights:
    """Of a uniform model."""
    folder = args.work / f"uniform-{bits}"
    if not folder.exists():
        quantize(args.model, folder, _settings(args, bits), progress=False)
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    schemes = Schemes(json.loads((folder / "config.json").read_text()), str(folder))
    tensors, out = unpacked_tensors(stored, schemes), Weights()
    for target in dict.fromkeys(name for name, _ in names):
        owner, _, weight = target.rpartition(".")
        module = model.get_submodule(owner)
        if not experts.is_experts(module):
            out[target, 0] = tensors[f"{target}.weight"]
            continue
        E, parts = module.num_experts, len(experts.matrices_of(module, weight))
        each = [tensors[name] for name in matrix_names(model, target, E, parts)]
        joined = torch.stack([torch.cat(each[i : i + parts]) for i in range(0, len(each), parts)])
        out |= {(target, e): w for e, w in enumerate(experts.family_rows(module, weight, joined))}
    return out


def _fisher(
    model: Any, samples: Tensor, before: Weights, weights: dict[int, Weights]
) -> dict[tuple[Place, int], float]:
    """By matrix and width: half the squared output error times the mean squared gradient."""
    lost: dict[tuple[Place, int], float] = {}
    slopes: dict[Place, list[float]] = {}
    rng = torch.Generator().manual_seed(0)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that there are gradients at all
    for ids in samples.split(4):
        with _watching(model) as seen:
            logits = model(input_ids=ids, use_cache=False).logits
            drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=rng)
            (-logits.log_softmax(-1).flatten(0, 1).gather(1, drawn).sum()).backward()
        model.zero_grad(set_to_none=True)
        for place, x, y, weighted in seen:
            assert y.grad is not None
            slope = slopes.setdefault(place, [0.0, 0.0])
            slope[0] += float(y.grad.square().sum())
            slope[1] += y.grad.numel()
            for bits, mine in weights.items():
                error = (x @ (mine[place] - before[place]).T) * weighted
                lost[place, bits] = lost.get((place, bits), 0.0) + float(error.square().sum())
    model.get_input_embeddings().weight.requires_grad_(False)
    none = [0.0, 1.0]
    return {
        (place, bits): 0.5 * lost.get((place, bits), 0.0) * (s := slopes.get(place, none))[0] / s[1]
        / samples.numel()
        for place in before
        for bits in weights
    }  # fmt: skip


@contextmanager
def _watching(model: Any) -> Iterator[list[tuple[Place, Tensor, Tensor, Tensor]]]:
    """Collect, of every matrix, its input, its output, which keeps its gradient, and what weighs
    it."""
    seen: list[tuple[Place, Tensor, Tensor, Tensor]] = []
    undo = []

    def note(place: Place, x: Tensor, y: Tensor, weighted: Tensor) -> None:
        y.retain_grad()
        seen.append((place, x.detach().flatten(0, -2), y, weighted.detach()))

    def hook(name: str) -> Any:
        # The output is a view of a matrix of tokens, so that gradients have that shape.
        def see(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
            flat = output.flatten(0, -2)
            note((name, 0), args[0], flat, torch.ones(len(flat), 1))
            return flat.view_as(output)

        return see

    def forward(name: str, module: Any) -> Any:
        first, second = experts.expert_weights(module)

        def run(x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e in range(module.num_experts):
                token, choice = (ids == e).nonzero(as_tuple=True)
                if len(token):
                    weighted = routing[token, choice, None]
                    h = experts.product(module, first, e, x[token])
                    mid = experts.activation(module, h)
                    y = experts.product(module, second, e, mid) * weighted
                    note((f"{name}.{first}", e), x[token], h, torch.ones_like(weighted))
                    note((f"{name}.{second}", e), mid, y, weighted)
                    out = out.index_add(0, token, y)
            return out

        return run

    try:
        for layer in find(model).layers:
            for name in layer.dense:
                handle = model.get_submodule(name).register_forward_hook(hook(name))
                undo.append(handle.remove)
            for name in layer.experts:
                module = model.get_submodule(name)
                module.forward = forward(name, module)
                undo.append(partial(delattr, module, "forward"))
        yield seen
    finally:
        for each in undo:
            each()


def _choice(rng: random.Random, weights: Weights, bits: float) -> dict[Place, int]:
    """A random choice of `bits` on average: targets, and matrices in them, lean to more or fewer
    bits at random."""
    lean = {name: rng.gauss(0, 1) for name, _ in weights}
    score = {place: lean[place[0]] + rng.gauss(0, 0.7) for place in weights}
    choice = dict.fromkeys(weights, BITS[0])
    left = (bits - BITS[0]) * sum(w.numel() for w in weights.values())
    while left > 0:
        place = max((p for p in choice if choice[p] < BITS[-1]), key=lambda p: score[p])
        wider = BITS[BITS.index(choice[place]) + 1]
        left -= (wider - choice[place]) * weights[place].numel()
        choice[place], score[place] = wider, score[place] - 1
    return choice


@torch.no_grad()
def _predict(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return found


def _kl(model: Any, batches: list[Tensor], base: list[Tensor]) -> float:
    """Nats per token."""
    each = [
        (p.exp() * (p - _predict(model, ids))).sum(-1).flatten()
        for ids, p in zip(batches, base, strict=True)
    ]
    return float(torch.cat(each).mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
