"""Which checkpoint tensors make up which parameters of a model, and loading them.

This leans on transformers' weight conversion, which is not a stable API: only this file and
tensor_names.py touch it (tested with the range pinned in pyproject.toml). It buys us every family's
renames and merges, in both directions, without code per model.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from qmoe.checkpoint.reader import Checkpoint
from qmoe.errors import CheckpointError
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.model.leftovers import left_out, predicting
from qmoe.model.stacked import Stacked, padded
from qmoe.model.tensor_names import matrix_names, original_names, packed_names

RANKS = {"trellis": 3, "suh": 1, "svh": 1}  # of EXL3's tensors; multipliers have 0


class WeightMap:
    """Which checkpoint tensors make up which parameters of a model.

    stacks: what is packed. places: of EXL3's tensors, by stored name, the parameter and the place
    in it (runtime/coded.py).
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        stacks: Iterable[Stacked] = (),
        places: Mapping[str, tuple[str, int]] | None = None,
    ):
        self.model = model
        self.checkpoint = checkpoint
        self.rules = get_model_conversion_mapping(model)
        # Packed tensors, which transformers' rules do not know: their parameter, and the place of
        # each among the matrices stacked there.
        self.packed: dict[str, tuple[str, int]] = dict(places or {})
        self._placed: dict[str, list[str]] = {}
        for name, (target, _) in self.packed.items():
            self._placed.setdefault(target, []).append(name)
        self._shorter: dict[str, tuple[int, int]] = {}
        for each in stacks:
            for i, name in enumerate(matrix_names(model, each.target, each.experts, each.parts)):
                self.packed |= {f"{name}{s}": (f"{each.target}{s}", i) for s in SUFFIXES}
                shapes = {f"{name}{s}": of[i // each.parts] for s, of in each.shorter.items()}
                self._shorter |= shapes
        expected = model.state_dict()
        self.targets: dict[str, list[str]] = {}
        unknown: dict[str, str] = {}
        for name in checkpoint.names():
            target = self._target(name, expected)
            if target in expected:
                self.targets.setdefault(target, []).append(name)
            else:
                unknown[name] = target
        # Of layers that predict tokens beyond the next and are not part of the model.
        self.carried = predicting(model, checkpoint.config, self.names(), unknown)
        for name in self.carried:
            del unknown[name]
        # What else is not part of the model, with the reason.
        self.ignored = left_out(model, unknown)
        self.unexpected = [name for name in unknown if name not in self.ignored]

    def names(self) -> list[str]:
        """The checkpoint tensors that feed the model."""
        return [name for names in self.targets.values() for name in names]

    def _target(self, name: str, expected: dict[str, torch.Tensor]) -> str:
        if name in expected:
            return name
        if name in self.packed:
            return self.packed[name][0]
        renamings = [r for r in self.rules if isinstance(r, WeightRenaming)]
        converters = [r for r in self.rules if isinstance(r, WeightConverter)]
        prefix = self.model.base_model_prefix
        target: str = rename_source_key(name, renamings, converters, prefix, expected)[0]
        return target

    def missing(self) -> list[str]:
        """Parameters that lack checkpoint tensors; tied ones count as fed by their partner."""
        found = set(self.targets) | self.split_targets()
        for target, source in self.model.all_tied_weights_keys.items():
            if target in found or source in found:
                found |= {target, source}
        expected = self.model.state_dict()
        missing = sorted(set(expected) - found)
        # A stack of experts is stored whole or expert by expert, never in part.
        for target, names, parts in self._stored():
            if 1 < len(names) < parts:
                missing.append(f"{target}: has {len(names)} of {parts} tensors")
        return missing

    def doubled(self) -> list[str]:
        """In words, parameters for which the checkpoint has more than is needed: under two names,
        or whole and in parts."""
        return [
            f"{target} is stored more than once: {names[0]!r} and {names[-1]!r}"
            for target, names, parts in self._stored()
            if len(names) > parts
        ]

    def _stored(self) -> Iterator[tuple[str, list[str], int]]:
        """Of every parameter with tensors of its own: those, and how many there are where it is
        stored in parts."""
        expected, split = self.model.state_dict(), self.split_targets()
        for target, names in self.targets.items():
            if target not in split:
                yield target, names, len(self._named(target, expected[target]))

    def split_targets(self) -> set[str]:
        """Parameters fed by a part of a checkpoint tensor; `targets` has the first of them only."""
        out = set()
        for rule in self.rules:
            first, *others = rule.target_patterns
            if others and isinstance(rule, WeightConverter):
                fed = [target for target in self.targets if first in target]
                out |= {t.replace(first, other) for t in fed for other in (first, *others)}
        return out

    def misshapen(self) -> list[str]:
        """Checkpoint tensors whose shape, or kind of number, is not what the model needs.

        Read from headers. Of tensors in another layout than the family's published one the number
        of elements is compared; the conversion checks them when they are loaded.
        """
        found, split = [], self.split_targets()
        for target, parameter in self.model.state_dict().items():
            if target in split:
                continue
            stored = self.targets.get(target, [])
            named = self._named(target, parameter)
            wanted = {n: self._shorter.get(n, tuple(part.shape)) for n, part in named.items()}
            if set(stored) != set(wanted):
                if not any(target.endswith(s) for s in SUFFIXES):
                    found += self._otherwise(target, parameter, stored)
                continue
            for name in stored:
                shape = tuple(self.checkpoint.lazy(name).get_shape())
                dtype = self.checkpoint.dtype(name)
                packed = name in self.packed and not parameter.is_floating_point()
                if shape != wanted[name]:
                    found.append(f"{name}: has shape {shape}, the model needs {wanted[name]}")
                elif dtype.is_floating_point != parameter.is_floating_point() or (
                    packed and dtype != parameter.dtype
                ):
                    found.append(f"{name}: is stored as {dtype}, the model needs {parameter.dtype}")
        return found

    def _otherwise(self, target: str, parameter: torch.Tensor, stored: list[str]) -> list[str]:
        """`misshapen` of a parameter that is not stored in the published layout."""
        shapes = {name: tuple(self.checkpoint.lazy(name).get_shape()) for name in stored}
        if stored == [target] and shapes[target] != tuple(parameter.shape):
            wanted = tuple(parameter.shape)
            return [f"{target}: has shape {shapes[target]}, the model needs {wanted}"]
        elements = sum(torch.Size(shape).numel() for shape in shapes.values())
        if not stored or elements == parameter.numel():
            return []
        first = f"{stored[0]} {shapes[stored[0]]}"
        return [
            f"{target}: {len(stored)} tensors, first {first}, hold {elements} numbers, the model "
            f"needs {parameter.numel()} for {tuple(parameter.shape)}"
        ]

    def _named(self, target: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter split and named as it is stored."""
        if target in self._placed:
            rank = RANKS.get(target.rpartition("_")[2], 0)
            each = tensor if tensor.dim() > rank else tensor[None]
            return dict(zip(self._placed[target], each, strict=True))
        suffix = next((s for s in SUFFIXES if target.endswith(s)), "")
        if not suffix or not self.packed:
            return original_names(self.model, target, tensor)
        named = packed_names(self.model, target.removesuffix(suffix), tensor)
        return {name + suffix: part for name, part in named.items()}

    def sources(self, prefix: str) -> list[str]:
        """Checkpoint tensors that feed the parameters below `prefix` (or that parameter)."""
        below = prefix + "."
        hits = (n for t, n in self.targets.items() if t == prefix or t.startswith(below))
        return [name for names in hits for name in names]

    def load(
        self, names: list[str], dtype: torch.dtype | None, given: dict[str, Any] | None = None
    ) -> None:
        """Fill the parameters that the checkpoint tensors `names` feed, each in the dtype that it
        has in the model (`dtype` where it has none of its own); scales of packed weights as they
        are stored. given: tensors to use in place of the checkpoint's. Raises CheckpointError on a
        shape or conversion problem."""
        given = given or {}
        self._load_packed([name for name in names if name in self.packed])
        names = [name for name in names if name not in self.packed]
        tensors = {n: given[n] if n in given else self.checkpoint.lazy(n) for n in names}
        config = LoadStateDictConfig(weight_mapping=self.rules, dtype=dtype)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        finally:
            if shown:
                logging.enable_progress_bar()
            # It notes which rules this checkpoint used; what things are called (tensor_names.py)
            # must not depend on that, nor on when it is asked.
            vars(self.model).pop("_weight_conversions", None)
        problems = [
            f"{key}: has shape {tuple(found)}, the model needs {tuple(wanted)}"
            for key, found, wanted in info.mismatched_keys
        ]
        problems += [*info.conversion_errors.values()]
        problems += [f"unexpected {key}" for key in sorted(info.unexpected_keys)]
        if problems:
            raise CheckpointError(f"{self.checkpoint.path}: {problems[0]}")

    def _load_packed(self, names: list[str]) -> None:
        stored: dict[str, list[str]] = {}
        for name in sorted(names, key=lambda n: self.packed[n][1]):
            stored.setdefault(self.packed[name][0], []).append(name)
        for target, matrices in stored.items():
            owner, _, parameter = target.rpartition(".")
            module = self.model.get_submodule(owner)
            like = getattr(module, parameter)
            tensors = [self.checkpoint.tensor(name) for name in matrices]
            if any(name in self._shorter for name in matrices):
                tensors = padded(tensors)
            whole = torch.cat(tensors) if tensors[0].dim() else torch.stack(tensors)
            whole = whole.view(like.shape)
            module._parameters[parameter] = nn.Parameter(whole, requires_grad=False)

    def tie(self) -> None:
        self.model.tie_weights(missing_keys=set(self.missing_keys()), recompute_mapping=False)

    def missing_keys(self) -> list[str]:
        return sorted(set(self.model.state_dict()) - set(self.targets))
