"""`quantize_to_size`: the best model of a number of bytes that was found.

Every matrix is measured once (measure.py), widths are chosen (choose.py), the planned model is made
beside the uniform one of the same bytes, and the one that is nearer to the original on held-out
text gets the destination's name (guard.py).
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qmoe.budget.choose import Chosen, all_in, choose, uniform
from qmoe.budget.curve import curve
from qmoe.budget.guard import GuardText, batches_of, better, divergences
from qmoe.budget.kept_layers import forget_layers
from qmoe.budget.measure import measure
from qmoe.budget.measurements import FILE, Measurements
from qmoe.budget.memory import Disk, Gpu, Memory, average_bits, bytes_for
from qmoe.budget.ways import narrowest
from qmoe.checkpoint.folders import read_json
from qmoe.config import BITS, QuantConfig, expect
from qmoe.config.quant import DENSE
from qmoe.engines.settings import check_target
from qmoe.errors import ConfigError, OutputError
from qmoe.packed.report import REPORT
from qmoe.pipeline.checks import check_destination
from qmoe.pipeline.output import OutputFolder
from qmoe.pipeline.plan import MATRICES, Plan, check
from qmoe.pipeline.quantize import quantize, run_again
from qmoe.pipeline.self_text import calibration_text
from qmoe.plan.run_plan import FILE as RUN_PLAN
from qmoe.system import distributed
from qmoe.system.files import write_json
from qmoe.system.progress import shown
from qmoe.system.sizes import format_size, parse_size

ANY = 4  # bits of the settings that are measured with; widths take their place


@dataclass(frozen=True)
class Budget:
    """size: bytes of the weight files, as a number or a size ("14GB"). bits: instead, of a
    quantized weight on average, scales and zero points counted. vram: instead, of a GPU's memory
    that holds all of the model, and the cache of a sequence of `context` tokens. ram: beside vram,
    bytes of host memory for routed experts that the GPU does not hold. guard_text: held-out text on
    which the result is compared with the uniform one of the same bytes. keep: every matrix that is
    solved while measuring is kept beside the measurements, and models are put together of these;
    for another budget only what is not there yet is solved."""

    size: str | int | None = None
    bits: float | None = None
    vram: str | int | None = None
    context: int = 8192
    ram: str | int | None = None
    guard_text: str | list[str] = "heldout"
    keep: bool = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.size, self.bits, self.vram)) != 1:
            raise ConfigError("budget: give one of a size, an average of bits, or a GPU's memory")
        if self.ram is not None and self.vram is None:
            raise ConfigError("ram: goes with vram, the memory of the GPU")
        if self.bits is not None:
            expect("bits", self.bits, float, int)

    def of(self, plan: Plan) -> tuple[Memory, int]:
        """Where bytes are counted, and how many may be taken there."""
        if self.vram is not None:
            ram = None if self.ram is None else parse_size("ram", self.ram)
            memory = Gpu(plan.source, self.context, ram)
            return memory, memory.usable(parse_size("vram", self.vram))
        disk = Disk(plan.source)
        if self.bits is not None:
            return disk, bytes_for(plan.source, plan.config, self.bits)
        assert self.size is not None
        return disk, parse_size("size", self.size)


@torch.no_grad()
def quantize_to_size(
    src: str | Path,
    dst: str | Path,
    budget: Budget,
    config: QuantConfig | None = None,
    *,
    measurements: str | Path | None = None,
    device: str | torch.device = "cpu",
    max_memory: str | int | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize the MoE model in `src` into the new folder `dst` so that it takes at most a number
    of bytes, with bits chosen for every expert, matrix and linear.

    config: as for `quantize`, with the method "gptq". Bits in it are not used. Dense linears get
        the experts' groups, unless the scheme of `dense` is not the default.
    measurements: a folder for what is measured; `dst.measurements` by default. Where it is there
        already, nothing is measured again, so that another budget takes no calibration pass.
    All else is as for `quantize`.

    Returns the report. Its "budget" says what was predicted and measured, and which of the two was
    written. Raises a QmoeError before any long work if the budget is too small or something cannot
    work; a run that was stopped goes on when it is called again.
    """
    if distributed.count() > 1:
        raise ConfigError(f"budget: runs in one process, this is one of {distributed.count()}")
    dst = Path(os.path.expanduser(dst))
    base = base_config(config or QuantConfig())
    if budget.keep:
        _check_kept(base)
    how: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    how["max_memory"] = None if max_memory is None else parse_size("max_memory", max_memory)
    folder = dst.with_name(dst.name + ".measurements") if measurements is None else measurements
    with shown(progress):
        plan = check(src, dst, base, statistics_from=(), save_statistics=None, **how)
        text = GuardText(budget.guard_text, base.calibration.seqlen)
        _, notes = batches_of(plan.source.folder, text)
        for bits in BITS:  # any of which may be chosen
            wide = replace(plan.config.experts, bits=bits)
            check_target(plan.source, all_in(plan.config, wide))
        memory, limit = budget.of(plan)
        _check_budget(memory, plan.config, limit)
        copy = partial(quantize, progress=False, **how)
        where = Path(os.path.expanduser(folder))
        found = measured(plan, where, copy, budget.keep)
        chosen = choose(memory, base, found, limit)
        rival = uniform(memory, base, limit)
        make = partial(quantize, src, progress=progress, **how)
        if budget.keep:
            make = partial(run_again, src, measured=where, **how)
        told = {"curve": curve(memory, base, found)}
        report = _guarded(plan, chosen, rival, text, notes, make, told)
        if isinstance(memory, Gpu) and budget.vram is not None:
            written, nbytes = chosen.config, chosen.nbytes
            if rival is not None and report["budget"]["written"] == "uniform":
                written, nbytes = rival, memory.total(rival)
            how_to_run = memory.plan(written, nbytes, parse_size("vram", budget.vram))
            how_to_run.write(dst / RUN_PLAN)
        return report


def base_config(config: QuantConfig) -> QuantConfig:
    """The settings that matrices are measured with."""
    if config.method != "gptq":
        raise ConfigError(f"budget: matrices are measured as gptq solves them, not {config.method}")
    for name in ("widths", "groups"):
        if getattr(config, name):
            raise ConfigError(f"{name}: a budget chooses them; leave them out")
    experts = replace(config.experts, bits=ANY)
    dense = experts if config.dense == DENSE else config.dense
    dense = None if dense is None else replace(dense, bits=ANY)
    # What a prediction layer loses is not seen in what the model predicts.
    return replace(config, experts=experts, dense=dense, mtp="keep")


def _check_kept(config: QuantConfig) -> None:
    """Refuse what needs text in the quantized model, which is not run."""
    for name in ("tune", "distill", "lm_head"):
        if getattr(config, name):
            raise ConfigError(
                f"{name}: needs text that runs through the quantized model; leave it out, or do "
                "not keep matrices"
            )


def _check_budget(memory: Memory, config: QuantConfig, limit: int) -> None:
    """Refuse one that nothing fits, before the measuring."""
    own = {name: getattr(config, name) for name in ("experts", "dense", "lm_head")}
    changes: dict[str, Any] = {n: s and narrowest(config, s) for n, s in own.items()}
    narrow = replace(config, **changes)
    least = memory.total(narrow)
    if least > limit:
        average = average_bits(memory.source, narrow)
        raise ConfigError(
            f"budget: at {min(BITS)} bits ({average:.3f} on average with scales) the model takes "
            f"{least} bytes ({format_size(least)}), which is {least - limit} more than the {limit} "
            "that can be used"
        )


def measured(
    plan: Plan, folder: Path, quantize_copy: Callable[..., Any], keep: bool = False
) -> Measurements:
    """The measurements in a folder, made first if they are not there. keep: with statistics and
    solved matrices. Raises ConfigError for those of another model, text or settings, or without
    what was to be kept."""
    told = plan.fingerprint()
    # Which play no part.
    left = ("statistics", "widths", "groups", "target", "tune", "distill", "refit")
    about = {key: value for key, value in told.items() if key not in left}
    if not folder.exists():
        check_destination(folder, 0)
        with OutputFolder(folder, len(plan.source.structure.layers), about) as out:
            if not (out.path / FILE).exists():
                text = calibration_text(plan, out, quantize_copy)
                if keep:
                    plan = replace(plan, kept_matrices=out.path / MATRICES)
                out.write_json(FILE, measure(plan, text, about, out).to_json())
            forget_layers(out)
    found = Measurements.read(folder)
    found.check(about, folder)
    if keep and not (folder / MATRICES).is_dir():
        raise ConfigError(
            f"{folder}: these measurements were made without keeping matrices; name another folder "
            "with --measurements, or leave out --keep-matrices"
        )
    return found


def _guarded(
    plan: Plan,
    chosen: Chosen,
    rival: QuantConfig | None,
    text: GuardText,
    notes: list[str],
    make: Callable[..., Any],
    told: dict[str, Any],
) -> dict[str, Any]:
    """Make the planned model and the uniform one, and keep the better. notes: on the text. make:
    quantizes into a folder. told: what the report's "budget" says beside what comes of it."""
    configs = {"planned": chosen.config} | ({} if rival is None else {"uniform": rival})
    folders = {name: plan.dst.with_name(f"{plan.dst.name}.{name}") for name in configs}
    for name, path in folders.items():
        if not path.exists():
            make(path, configs[name])
        elif read_json(path / REPORT).get("config") != _as_read(configs[name]):
            raise OutputError(f"{path}: is in the way and was made with other settings; remove it")
    kl = divergences(plan.source.folder, folders, text)
    best = better(kl)
    told = told | {
        "bytes": chosen.nbytes,
        "written": best,
        "predicted_kl": chosen.predicted,
        "gap": chosen.gap,
        "kl": kl,
        "bits": {name: average_bits(plan.source, config) for name, config in configs.items()},
        "weight_files": {name: _weight_files(path) for name, path in folders.items()},
        "uniform": None if rival is None else str(rival.experts),
    }
    report = read_json(folders[best] / REPORT) | {"budget": told}
    report["fallbacks"] += [f"held-out text: {note}" for note in notes]
    if best == "uniform":
        report["fallbacks"].insert(
            0, f"the uniform model ({told['uniform']}) was written: its KL on held-out text is "
            f"{kl['uniform']['overall']:.5f} in the mean and {kl['uniform']['p99']:.4f} at the "
            f"99th percentile, the planned one's {kl['planned']['overall']:.5f} and "
            f"{kl['planned']['p99']:.4f}",
        )  # fmt: skip
    write_json(folders[best] / REPORT, report)
    folders.pop(best).rename(plan.dst)
    for path in folders.values():
        shutil.rmtree(path)
    return report


def _weight_files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _as_read(config: QuantConfig) -> Any:
    """Settings as a report gives them back."""
    return json.loads(json.dumps(config.to_dict()))
