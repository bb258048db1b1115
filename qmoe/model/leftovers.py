"""Tensors of a checkpoint that belong to no parameter of the model: which may be left out, since
the model computes what it does without them in transformers too, and what is wrong with the others.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

# What predicts tokens beyond the next, for engines that guess ahead, and what config.json calls the
# number of such layers.
PREDICTS, COUNTS = re.compile(r"(^|\.)(mtp|nextn)\w*\."), re.compile(r"mtp|nextn")
MARK = "eh_proj.weight"  # in a layer that is part of the model, its copies of other parts are not
LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(.*)")
# Tables that were stored once and are computed now, wherever in the model.
TABLES = re.compile(
    r"(rotary\w*\.(original_)?(inv_freq|cos_cached|sin_cached)|(^|\.)position_ids)$"
)
# Heads of other tasks beside a language model's: of critics, reward models, classifiers.
HEADS = re.compile(r"^((v|value|reward|rm|regression)_head|score|classifier)\.")
# What other programs put into names, and the way out.
WRAPPED = {
    r"(^|\.)_orig_mod\.": "as a compiled model saves them; save model._orig_mod",
    r"^module\.": "as a parallel wrapper saves them; save model.module",
    r"(^|\.)_(fsdp|checkpoint)_wrapped_module\.": "as a sharding wrapper saves them; save the full "
    "state dict of the model inside",
    r"^base_model\.model\.|\.(lora_\w+|base_layer|modules_to_save)\.": "of an adapter that is not "
    "merged; save what peft's merge_and_unload gives",
    r"^pretrained_model\.": "as a wrapper with a value head saves them; save "
    "model.pretrained_model",
}


def left_out(model: nn.Module, unknown: dict[str, str]) -> dict[str, str]:
    """Of checkpoint tensors that belong to no parameter and predict nothing, those that may be left
    out, and why.

    unknown: the tensors, with the parameter each would be by transformers' renaming."""
    patterns: Any = model._keys_to_ignore_on_load_unexpected
    stored = set(model.state_dict())
    computed = {_last_two(name) for name, _ in model.named_buffers() if name not in stored}
    found = {}
    for name, target in unknown.items():
        if TABLES.search(name) or _last_two(target) in computed:
            found[name] = "the model computes them"
        elif any(re.search(p, each) for p in patterns or () for each in (name, target)):
            found[name] = "transformers does not use them in this family"
        elif HEADS.search(name):
            found[name] = "heads of another task"
    return found


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def predicting(
    model: nn.Module, config: dict[str, Any], known: list[str], unknown: dict[str, str]
) -> list[str]:
    """Of checkpoint tensors that belong to no parameter, those of layers that predict tokens beyond
    the next: by their names, or in as many layers behind the model's last as config.json says or
    the family's class passes over. Such layers have something that no other layer has: one like all
    others is missing in the count.

    config: config.json. known: the tensors that belong to a parameter. unknown: as for
    `left_out`."""
    patterns: Any = model._keys_to_ignore_on_load_unexpected or ()
    named = {name for name in unknown if PREDICTS.search(name)}
    count = _count(config)
    inside, last = by_layer(known), _last(known)
    for (place, i), names in by_layer(unknown).items():
        usual = {tail for (p, _), tails in inside.items() if p == place for tail in tails}
        attached = (place, i) in inside and MARK in inside[place, i]
        behind = i - last.get(place, i)
        passed = all(any(re.search(p, name) for p in patterns) for name in names.values())
        if attached or (behind > 0 and (behind <= count or passed) and set(names) - usual):
            named |= set(names.values())
    return [name for name in unknown if name in named]


def _count(config: dict[str, Any]) -> int:
    parts = [value for value in config.values() if isinstance(value, dict)]
    counts = [
        value
        for key, value in config.items()
        if COUNTS.search(key) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return max([*counts, *map(_count, parts)], default=0)


def by_layer(names: Iterable[str]) -> dict[tuple[str, int], dict[str, str]]:
    """Tensors by list of layers and number, and by what they are called inside the layer."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for name in names:
        if (parts := LAYER.fullmatch(name)) is not None:
            found.setdefault((parts[1], int(parts[2])), {})[parts[3]] = name
    return found


def _last(names: list[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for place, i in by_layer(names):
        last[place] = max(i, last.get(place, 0))
    return last


def wrapped(unexpected: list[str]) -> str:
    """In words, that tensors have the names that another program gave them; "" if none has."""
    for pattern, meaning in WRAPPED.items():
        if found := [name for name in unexpected if re.search(pattern, name)]:
            return f"{len(found)} tensors have names like {found[0]!r}, {meaning}"
    return ""


def complaint(known: list[str], unexpected: list[str]) -> str:
    """What else is wrong with tensors that belong to no parameter and may not be left out."""
    last = _last(known)
    for place, i in by_layer(unexpected):
        if place in last and i > last[place]:
            return (
                f"{place} has {last[place] + 1} layers by config.json, the checkpoint has layer "
                f"{i} too; correct num_hidden_layers, or, if that one predicts tokens beyond the "
                "next, say num_nextn_predict_layers there"
            )
    return f"{len(unexpected)} tensors belong to no parameter of the model, first {unexpected[0]!r}"
