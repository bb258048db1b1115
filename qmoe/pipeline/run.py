"""One pass over a model's layers: each is loaded, quantized, written and let go."""

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qmoe.calibration.stats as statistics
from qmoe._version import __version__
from qmoe.calibration.batches import fingerprint
from qmoe.calibration.stats import LayerStats
from qmoe.checkpoint.prefetch import read_ahead
from qmoe.config import QuantConfig
from qmoe.errors import UnsupportedModelError
from qmoe.format.compressed_tensors import Schemes, quantization_config, unpacked_tensors
from qmoe.format.quantized import Quantized, digest
from qmoe.layer.job import Job
from qmoe.layer.quantize import quantize_layer
from qmoe.layer.statistics import run_layer
from qmoe.model.experts import packed_parameters
from qmoe.model.layerwise import Call, suspended
from qmoe.model.skeleton import free, inputs_of
from qmoe.model.source import Source, schemes_of
from qmoe.model.structure import Layer
from qmoe.packed.audit import audit_folder
from qmoe.packed.report import build_report, left_behind
from qmoe.pipeline.fused_rotation import Residual
from qmoe.pipeline.lm_head import Head
from qmoe.pipeline.output import OutputFolder
from qmoe.pipeline.shard import load_layer, restore, rounded, shard_tensors, stored_dtype
from qmoe.system import distributed
from qmoe.system.devices import CPU, place
from qmoe.system.host_memory import return_freed
from qmoe.system.progress import Track
from qmoe.system.spill import Scratch


class Run:
    """State of the pass."""

    def __init__(
        self,
        source: Source,
        residual: Residual | None,
        config: QuantConfig,
        given: list[Path],
        saved: Path | None,
        out: OutputFolder,
        spill: bool,
        device: torch.device,
    ) -> None:
        self.source, self.config, self.given, self.saved = source, config, given, saved
        self.device = device
        self.out, self.scratch = out, Scratch(out.path if spill else None)
        sha = out.fingerprint["source"]
        self.about = {"model": sha, "routing_weighted": str(config.routing_weighted)}
        self.residual = residual
        if residual is not None:
            self.about["stream"] = "rotated"
        self.changed: set[str] = set()  # outside the layers, as the residual stream is rotated
        self.records: list[dict[str, Any]] = []
        self.head: dict[str, Quantized] = {}
        self.tokens = 0
        self.notes: list[str] = []  # what of the text was not as asked for
        self.self_samples = 0  # samples of text
        self.not_original = ""  # why the original did not write them, if it should have
        # Of every quantized stack as it was solved, to be compared with what was written.
        self.digests: dict[str, str] = {}
        self.schemes = Schemes(self.new_config(), str(out.dst))
        for folder in given:
            for i in range(len(source.structure.layers)):
                notes = statistics.check(folder / _stats_file(i), self.about)
                self.notes += [f"{folder}: {note}" for note in notes if i == 0]

    def all_shards(self, samples: Tensor, track: Track) -> None:
        """Run everything; each shard is written as soon as it is final."""
        source, self.tokens = self.source, samples.numel()
        source.weights.load(source.resident(), torch.float32)
        source.weights.tie()
        if self.residual is not None:
            packed = [] if self.config.lm_head is None else [str(source.structure.lm_head)]
            changed = self.residual.rotate_outside(source.model)
            self.changed = rounded(source, changed, packed_parameters(source.model, packed))
        progress = iter(track(source.structure.layers, "quantizing layers"))
        reached: set[int] = set()
        modules = source.stages()
        batches = (
            distributed.shard(samples.split(self.config.calibration.batch)) if len(samples) else []
        )
        head = None
        if self.config.lm_head is not None:
            head = Head(source, self.config, len(batches) if self.config.tune else 0)

        def visit(i: int, forward: Any, calls: list[Call]) -> list[Any] | None:
            next(progress)
            reached.add(i)
            layer, note = source.structure.layers[i], self.out.finished(i)
            if note is None:
                outputs = self._layer(i, layer, forward, calls)
            else:
                outputs = self._again(i, layer, forward, calls)
                self.records.append(note["record"])
                self.digests |= note["digests"]
            free(modules[i])
            place(modules[i], CPU)  # its buffers, which the rest of the model may share
            source.checkpoint.release()
            return_freed()  # or what one layer leaves in pieces adds up
            return None if self._last(i) else outputs

        if not len(samples):
            for i, module in enumerate(modules):
                visit(i, module.forward, [])
        else:
            inputs = [inputs_of(source.model, ids) for ids in batches]
            if self.config.tune:  # one stream of the original model, one of the quantized one
                inputs += [inputs_of(source.model, ids) for ids in batches]
            for _ in suspended(source.model, modules, inputs, visit):
                pass
        next(progress, None)  # lets the progress bar close
        self._unreached(reached)
        if head is not None:
            quantized, record = head.solve()
            self.records.append(record)
            self.head = {f"{head.name}.weight": quantized}
            self.digests |= {name: digest(stack) for name, stack in self.head.items()}
        if self.out.leads:
            self.out.write_shard(len(modules), self._resident_tensors(), {})

    def finish(self, samples: Tensor, track: Track, trust: bool) -> dict[str, Any]:
        """Write what goes beside the shards, audit the folder, and return its report."""
        out, source, c = self.out, self.source, self.config.calibration
        out.write_index()
        left = out.copy_companions(source.checkpoint.path)
        out.write_json("config.json", self.new_config())
        audit = audit_folder(out.path, self.digests, track=track, trust=trust)
        report = build_report(self.config, source, self.records, audit, __version__)
        report["fallbacks"] += [*left_behind(left), *out.unlocked()]
        report |= {"source_sha256": self.about["model"], "digests": self.digests}
        report |= {"kept_sha256": audit.kept, "calibration": self.calibration(samples)}
        if self.config.refit and self.config.method == "gptq" and (self.given or self.saved):
            line = "no feedback between matrices: statistics come from files or go to files"
            report["fallbacks"].insert(0, line)
        if self.not_original:
            what = (
                "a copy with 4-bit experts wrote text"
                if self.self_samples
                else "no text was written"
            )
            line = f"{what}, {c.self_samples} samples asked for: {self.not_original}"
            report["fallbacks"].insert(0, line)
        report["fallbacks"] = self.notes + report["fallbacks"]
        if self.residual is not None and (head := self.residual.head) is not None:
            line = f"{head}: stored apart from the embedding, from which the rotation sets it off"
            report["fallbacks"].insert(0, line)
        out.write_json("qmoe_report.json", report)
        return report

    def _unreached(self, reached: set[int]) -> None:
        """Round the layers of a part of the model that no text reaches, such as a vision tower.

        In a list of layers that text does run through, all must have been reached.
        """
        layers = self.source.structure.layers
        lists = {layers[i].name.rpartition(".")[0] for i in reached}
        for i, layer in enumerate(layers):
            if i in reached:
                continue
            if layer.name.rpartition(".")[0] in lists:
                raise UnsupportedModelError(f"{layer.name}: text runs past this layer of the model")
            note = self.out.finished(i)
            if note is None:
                module = self.source.model.get_submodule(layer.name)
                self._layer(i, layer, module.forward, [])
            else:
                self.out.read_shard(i)
                self.records.append(note["record"])
                self.digests |= note["digests"]
            free(self.source.model.get_submodule(layer.name))

    def _layer(self, i: int, layer: Layer, forward: Any, calls: list[Call]) -> list[Any]:
        """Load, quantize, pack and write one layer; returns its outputs. Without calls and given
        statistics it is rounded to nearest."""
        source = self.source
        names = source.weights.sources(layer.name)
        rotated = self._load(layer)
        self._read_ahead(i + 1)
        place(source.model.get_submodule(layer.name), self.device)
        schemes = schemes_of(source, layer, self.config)
        saved, about = self.saved, self.about | {"notes": json.dumps(self.notes)}
        save = (
            None
            if saved is None
            else (lambda stats: statistics.save(stats, saved / _stats_file(i), about))
        )
        blind = not calls and not self.given
        config = self.config.rounded_to_nearest() if blind else self.config
        units = self.out.units if config.method == "gptq" else None
        job = Job(
            source.model, layer, config, schemes, source.weight_dtype(), self.tokens,
            save if self.out.leads else None, self.scratch, units, self._last(i),
            partial(stored_dtype, source),
        )  # fmt: skip
        given = LayerStats() if blind else None
        if self.given:
            parts = [statistics.load(p / _stats_file(i), self.about) for p in self.given]
            given = statistics.merge(parts)
        originals, calls = self._streams(calls)
        result, outputs = quantize_layer(job, forward, calls, given, originals)
        if config.method != self.config.method:
            result.record["unreached"] = True
        if not self.out.leads:
            return outputs
        tensors = shard_tensors(source, names, result.weights, result.changed | rotated)
        digests = {target: digest(quantized) for target, quantized in result.weights.items()}
        self.out.write_shard(i, tensors, {"record": result.record, "digests": digests})
        self.records.append(result.record)
        self.digests |= digests
        return outputs

    def _again(self, i: int, layer: Layer, forward: Any, calls: list[Call]) -> list[Any]:
        """The outputs of a layer that an earlier run quantized, from what it wrote."""
        originals, calls = self._streams(calls)
        model, outputs = self.source.model, []
        module = model.get_submodule(layer.name)
        if originals:
            self._load(layer)
            place(module, self.device)
            outputs += [self.scratch.keep(y) for y in run_layer(model, layer, forward, originals)]
            free(module)
        weights = unpacked_tensors(self.out.read_shard(i), self.schemes)
        restore(self.source, layer, weights, self._experts_dtype())
        place(module, self.device)
        outputs += [self.scratch.keep(y) for y in run_layer(model, layer, forward, calls)]
        return outputs

    def _load(self, layer: Layer) -> set[str]:
        """Load a layer, rotated if that was asked for; returns the parameters that are not as they
        are stored, nor to be packed."""
        source = self.source
        load_layer(source, layer, self._experts_dtype())
        if self.residual is None:
            return set()
        packed = packed_parameters(source.model, schemes_of(source, layer, self.config))
        return rounded(source, self.residual.rotate_layer(source.model, layer.name), packed)

    def _read_ahead(self, i: int) -> None:
        source = self.source
        if self.out.leads and i < len(source.structure.layers):
            names = source.weights.sources(source.structure.layers[i].name)
            read_ahead(source.checkpoint.files(names))

    def _last(self, i: int) -> bool:
        """Nothing behind the last layer is of interest, unless lm_head is to be quantized."""
        return self.config.lm_head is None and i + 1 == len(self.source.structure.layers)

    def _streams(self, calls: list[Call]) -> tuple[list[Call], list[Call]]:
        """The batches that run through the original model, and those through the quantized one."""
        half = len(calls) // 2 if self.config.tune else 0
        return calls[:half], calls[half:]

    def _experts_dtype(self) -> torch.dtype:
        """Of routed experts in memory: as stored, unless they change before they are rounded."""
        return torch.float32 if self.config.experts_in_float32 else self.source.weight_dtype()

    def _resident_tensors(self) -> dict[str, Tensor]:
        return shard_tensors(self.source, self.source.resident(), self.head, self.changed)

    def new_config(self) -> dict[str, Any]:
        """The source's config.json with `quantization_config` added."""
        config = deepcopy(self.source.checkpoint.config)
        config.pop("transformers_weights", None)  # names what was read, not what is written
        c = self.config
        kept = self.source.kept_linears(c)
        if self.residual is not None and self.residual.head is not None:
            for part in (config, config.get("text_config")):
                if isinstance(part, dict):
                    part["tie_word_embeddings"] = False
        config["quantization_config"] = quantization_config(c.experts, c.dense, c.lm_head, kept)
        return config

    def calibration(self, samples: Tensor) -> dict[str, Any]:
        """For the report: what the statistics come from."""
        if self.given:
            return {"statistics": [str(p) for p in self.given]}
        if not len(samples):
            return {}
        return {
            "samples": list(samples.shape),
            "self_samples": self.self_samples,
            "sha256": fingerprint(samples),
        }


def _stats_file(i: int) -> str:
    return f"layer-{i:05d}.safetensors"
