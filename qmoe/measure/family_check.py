"""A proof per family that qmoe handles it: a tiny random model is quantized, saved, reloaded, and
compared with transformers' own class holding the same dequantized weights.

In float32 the logits must be equal, those of `qmoe.load` and those of `from_pretrained`. In
bfloat16, in which the model is stored and runs, two orders of a sum differ, and by that the choice
of an expert now and then. There everything that is not packed must be the same to the bit; and
routes and logits may differ no more than this class's own do between bfloat16 and float32.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.checkpoint.model_config import model_class
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CHANNEL, CalibrationConfig, QuantConfig, Scheme
from qmoe.errors import AuditError
from qmoe.format.grid import dequantize
from qmoe.measure.families import Family, save_tiny, tiny_config
from qmoe.model import experts
from qmoe.model.adapters import adapt
from qmoe.model.hooks import hooked
from qmoe.model.skeleton import build, inputs_of
from qmoe.model.source import open_source
from qmoe.model.structure import find
from qmoe.packed.audit import audit_model
from qmoe.packed.load import load
from qmoe.packed.skeleton import open_packed
from qmoe.pipeline.quantize import quantize
from qmoe.rotation.find_rotation import find_fused_rotation
from qmoe.runtime.modules import held
from qmoe.runtime.stored import take_stored

CONFIG = QuantConfig(
    experts=Scheme(4, 32),
    dense=Scheme(8, CHANNEL),
    calibration=CalibrationConfig(samples=4, self_samples=0, seqlen=64, batch=2),
)
TOLERANCE = 1e-4  # relative RMS of logits in float32
# How much further from transformers' model, in bfloat16, than that is from its float32 self. (Seen:
# 3 in 100 tokens more, 1.7 times the error.)
HAIR, NOISE = 0.1, 3


@torch.no_grad()
def check(family: Family, folder: Path, config: QuantConfig = CONFIG) -> dict[str, Any]:
    """Quantize, save, reload and compare a tiny model in the empty `folder`; returns the report.

    Raises a QmoeError where the family is refused, and AuditError if the reloaded model is not
    the original with dequantized weights.
    """
    find(build(tiny_config(family), torch.float32))
    source, quantized = folder / "source", folder / "quantized"
    save_tiny(family, source, dtype=torch.bfloat16)
    report = quantize(source, quantized, config, progress=False)
    model, _ = load(quantized, torch.float32, progress=False)
    audit_model(model, family.model_type)
    inputs = inputs_of(model, torch.arange(1, 65).view(2, 32) * 3)
    found = model(**inputs).logits
    theirs: Any = model_class(model.config).from_pretrained(quantized, dtype=torch.float32)
    _compare(f"{family.model_type}, from_pretrained beside load", theirs(**inputs).logits, found)
    fused = config.rotate == "fused"
    twin: Any = model_class(model.config).from_pretrained(source, dtype=torch.float32).eval()
    as_it_was = twin(**inputs).logits
    adapt(twin)
    _compare(f"{family.model_type} adapted, not quantized", twin(**inputs).logits, as_it_was)
    dequantize_into(twin, quantized, torch.float32, all_else=fused)
    _compare(family.model_type, found, twin(**inputs).logits)
    exact = run(twin, inputs)
    check_in_bfloat16(source, quantized, exact, inputs, fused)
    if fused:
        _check_rotated(source, family.model_type)
    return report


Ran = tuple[Tensor, list[Tensor]]


def check_in_bfloat16(
    source: Path, quantized: Path, exact: Ran, inputs: dict[str, Any], all_else: bool = False
) -> tuple[float, float]:
    """Raises AuditError unless a folder loaded in bfloat16 is transformers' model of the same
    weights there. exact: what that gives in float32. Returns the share of tokens that go to the
    same experts, and the median relative error of the logits."""
    model, _ = load(quantized, torch.bfloat16, activations="bf16", progress=False)
    what = model.config.model_type
    twin: Any = model_class(model.config).from_pretrained(source, dtype=torch.bfloat16).eval()
    adapt(twin)
    if not all_else:
        _same_tensors(what, model, twin)
    dequantize_into(twin, quantized, torch.bfloat16, all_else)
    expected = run(twin, inputs)
    (kept, lost), (usual_kept, usual_lost) = (
        _apart(run(model, inputs), expected),
        _apart(expected, exact),
    )
    if not (kept >= usual_kept - HAIR and lost <= NOISE * usual_lost):
        raise AuditError(
            f"{what}: in bfloat16 {kept:.1%} of tokens go to the same experts, logits are off by "
            f"{lost:.1e}; transformers' own are {usual_kept:.1%} and {usual_lost:.1e} from float32"
        )
    return kept, lost


def _same_tensors(what: str, model: Any, twin: Any) -> None:
    """Raises AuditError unless all that is not packed has transformers' dtype and values."""
    tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
    for name, wanted in tensors.items():
        found = held(model, name)
        if found is None or isinstance(
            getattr(model.get_submodule(name.rpartition(".")[0]), "stack", None), nn.Module
        ):
            continue  # packed
        if found.dtype != wanted.dtype or not torch.equal(found, wanted):
            raise AuditError(f"{what}: {name} is not transformers' ({found.dtype}, {wanted.dtype})")


def run(model: Any, inputs: dict[str, Any]) -> Ran:
    """Logits, and the experts that every call of an experts module sends its tokens to."""
    modules = [module for module in model.modules() if experts.is_experts(module)]
    routes: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = [*args, *named.values()]
        if len(given) > 1:  # Llama 4's are given all tokens, each expert in turn
            routes.append(named.get("top_k_index", given[1]).sort(-1).values)

    with hooked([(module, see) for module in modules], with_kwargs=True):
        logits: Tensor = model(**inputs).logits
    return logits, routes


def _apart(one: Ran, other: Ran) -> tuple[float, float]:
    """The share of tokens with equal routes, and the median relative error of logits."""
    pairs = zip(one[1], other[1], strict=True)
    equal = [(a == b).all(-1).flatten() for a, b in pairs]
    kept = float(torch.cat(equal).float().mean()) if equal else 1.0
    a, b = one[0].float(), other[0].float()
    return kept, float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def _check_rotated(folder: Path, what: str) -> None:
    """Raises AuditError unless a rotated model gives what it did, on more tokens than those that
    the rotation was proved on, with all its layers, before anything is rounded."""
    source = open_source(ModelFolder(folder), torch.float32)
    rotation = find_fused_rotation(source)
    inputs = inputs_of(source.model, torch.arange(400)[None] * 37 % 509)
    logits = []
    for rotated in (False, True):
        source.weights.load(source.weights.names(), torch.float32)
        source.weights.tie()
        if rotated:
            rotation.rotate_outside(source.model)
            for layer in source.structure.layers:
                rotation.rotate_layer(source.model, layer.name)
        logits.append(source.model(**inputs).logits)
    lost = (logits[1] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)
    # One whose experts are chosen by a hair may differ.
    if not lost.flatten().quantile(0.95) <= 10 * TOLERANCE:
        raise AuditError(f"{what}: rotated, logits are off by up to {float(lost.max()):.1e}")


def distance(found: Tensor, expected: Tensor) -> float:
    """The relative RMS error of logits."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    if not (lost := distance(found, expected)) <= TOLERANCE:
        raise AuditError(f"{what}: logits are off by {lost:.1e}, RMS")


def dequantize_into(twin: Any, quantized: Path, dtype: torch.dtype, all_else: bool = False) -> None:
    """Every quantized weight, dequantized, and all else if it changed too, into the original as
    transformers loaded it."""
    packed = open_packed(ModelFolder(quantized), dtype)
    packed.weights.load(packed.weights.names(), dtype)
    known = dict(twin.named_parameters(remove_duplicate=False)) if all_else else {}
    for name, parameter in packed.model.named_parameters():
        if name in known:  # not packed; a rotated head is no longer the embedding
            owner, _, last = name.rpartition(".")
            twin.get_submodule(owner)._parameters[last] = nn.Parameter(parameter.clone())
    for name, module in packed.model.named_modules():
        for weight, stored in take_stored(module, name).items():
            target, values = twin.get_submodule(name), dequantize(stored.unpack())
            if isinstance(target, nn.Linear):
                target.weight.copy_(values[0])
            else:
                experts.put(target, weight, values)
