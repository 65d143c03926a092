"""Settings of an adapter in a form that costs peft no search: a stranger's regular expression could keep it busy for years."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from curvkit.checkpoints.documents import brief
from curvkit.errors import RefusedCheckpoint

PLAIN = re.compile(r"[\w.-]{1,500}")
"""A name of modules; a dot in it stands for itself, or for any one character where peft takes it as an expression."""
SIMPLE = re.compile(r"\^?(?:[\w-]|\\\.|\.[*+]?|(?:\\d|\[0-9\])\+?){1,500}\$?")
"""An expression that is matched in a moment, if it repeats little."""
REPEATS, REPEATING = 2, 32
"""Repeats in one expression at most, and expressions that repeat anything."""
LONGEST = 1000
"""Names in a list; with more, the modules are taken from the weights."""
WHERE = ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform")
PARTS = ("lora_", "hada_", "lokr_")
"""How the parts of an adapted module begin: "q_proj.lora_A.weight"."""
RANKS = ("lora_A.weight", "lora_embedding_A", "hada_w1_b")
"""Tensors whose first size is the rank."""


@dataclass(frozen=True)
class _Adapter:
    """What there is to look at."""

    source: str
    settings: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    base: Collection[str]

    def modules(self) -> list[str]:
        """The modules that the weights belong to, by their names in the base."""
        named = (name.removeprefix("base_model.model.").split(".") for name in self.weights)
        starts = ((parts, next((i for i, part in enumerate(parts) if part.startswith(PARTS)), 0)) for parts in named)
        found = sorted({".".join(parts[:start]) for parts, start in starts if start})
        foreign = [name for name in found if name not in self.base]
        if foreign and not self.settings.get("layer_replication"):
            raise RefusedCheckpoint(
                f"{self.source}: its weights belong to {len(foreign):,} modules that the base model does not have, for example "
                f"{brief(foreign[0])}. Check that it is the base that the adapter was trained on."
            )
        return found


def exact(
    path: Path, settings: Mapping[str, Any], weights: Mapping[str, Tensor], base: Collection[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Replace expressions in the settings of an adapter by the names of modules that its weights have.

    peft matches `target_modules`, `exclude_modules` and `layers_pattern`, and the keys of `rank_pattern` and `alpha_pattern`, as regular
    expressions, whose matching may take time exponential in the length of a name. The weights say which modules are adapted, and of
    which rank; only alpha is nowhere else.

    Args:
        path: For messages.
        settings: Of adapter_config.json.
        weights: By the names of the file.
        base: Names of the modules of the base model.

    Returns:
        The settings for peft, and notes.

    Raises:
        RefusedCheckpoint: If an expression cannot be replaced, or a size is beyond that of the weights.

    Cost: linear in the number of weights, and in that of modules times patterns.

    Example:
        >>> import torch
        >>> weights = {"base_model.model.h.0.q.lora_A.weight": torch.ones(2, 4)}
        >>> made, _ = exact(Path("a"), {"peft_type": "LORA", "target_modules": "(.*)*q"}, weights, ["h.0.q"])
        >>> made["target_modules"]
        ['h.0.q']
    """
    adapter = _Adapter(str(path / "adapter_config.json"), settings, weights, base)
    _check_kept(adapter)
    _check_sizes(adapter)
    replaced = dict(settings)
    strange = next((key for key in WHERE if not _harmless(key, settings.get(key))), None)
    if settings.get("target_parameters"):
        _check_parameters(adapter, strange)
        return replaced, ()
    notes = ()
    if strange is not None:
        replaced.update(dict.fromkeys(WHERE), target_modules=adapter.modules())
        notes = (
            f"{strange} of the adapter is an expression, which is not searched with: adapted are the modules of its weights",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            replaced[key] = _by_value(_values(adapter, key))
    return replaced, notes


def _harmless(key: str, value: Any) -> bool:
    """Whether peft compares with a setting instead of searching with it."""
    if value is None or isinstance(value, int) or (key == "target_modules" and value == "all-linear"):
        return True
    if key == "layers_pattern" and isinstance(value, str):
        return not value or bool(PLAIN.fullmatch(value))
    plain = isinstance(value, list) and len(value) <= LONGEST
    return plain and all(isinstance(item, int) or (isinstance(item, str) and PLAIN.fullmatch(item)) for item in value)


def _check_kept(adapter: _Adapter) -> None:
    """Modules that are trained whole: names of them, which peft compares and searches with, too."""
    for key in ("modules_to_save", "trainable_token_indices"):
        held = adapter.settings.get(key)
        names = [] if held is None or (key != "modules_to_save" and isinstance(held, list)) else held
        named = isinstance(names, list | dict) and len(names) <= LONGEST
        if not named or not all(isinstance(name, str) and PLAIN.fullmatch(name) for name in names):
            raise RefusedCheckpoint(
                f"{adapter.source}: {key} is no list of names of modules ({brief(held)}). Write their names, such as lm_head, into it."
            )


def _check_sizes(adapter: _Adapter) -> None:
    """Ranks and layers for which there are weights: peft takes the memory for them before it looks."""
    settings, weights = adapter.settings, adapter.weights
    largest = max((size for tensor in weights.values() for size in tensor.shape), default=0)
    patterns = settings.get("rank_pattern") or {}
    ranks = [settings.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    rank = next((r for r in ranks if isinstance(r, int) and r > largest), None)
    if rank is not None and settings.get("peft_type") != "LOKR":  # a LoKr of a larger rank has whole matrices
        raise RefusedCheckpoint(
            f"{adapter.source}: asks for the rank {brief(rank)}, but no size of its weights is above {largest:,}. "
            "Take the directory that model.save_pretrained(path) of PEFT wrote."
        )
    layers = settings.get("layer_replication") or []
    if not _are_ranges(layers) or sum(max(0, end - start) for start, end in layers) > max(LONGEST, len(weights)):
        raise RefusedCheckpoint(
            f"{adapter.source}: layer_replication is no list of [start, end], or asks for more layers than the adapter has weights. "
            "Take the directory that model.save_pretrained(path) of PEFT wrote."
        )


def _are_ranges(value: Any) -> bool:
    pairs = value if isinstance(value, list) else [None]
    return all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(end, int) for end in pair) for pair in pairs
    )


def _check_parameters(adapter: _Adapter, strange: str | None) -> None:
    """With target_parameters, weights do not tell which parameter they are for; so nothing is replaced."""
    names = adapter.settings["target_parameters"]
    if not isinstance(names, list) or not _harmless("target_parameters", names):
        strange = "target_parameters"
    patterns = [adapter.settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if strange is None and not all(isinstance(held, dict) and len(held) <= REPEATING for held in patterns):
        strange = "rank_pattern or alpha_pattern"
    keys = [key for held in patterns if isinstance(held, dict) for key in held]
    strange = strange or next((f"the pattern {brief(key)}" for key in keys if not _simple(str(key))), None)
    if strange is not None:
        raise RefusedCheckpoint(
            f"{adapter.source}: beside target_parameters, {strange} cannot be replaced by names of modules, and searching with a "
            "stranger's expression could take years. Write names of modules into it, or merge the adapter (model.merge_and_unload())."
        )


def _values(adapter: _Adapter, key: str) -> dict[str, Any]:
    """Module -> rank or alpha, where a pattern gives one; as peft does, the first pattern that matches the end of a name."""
    patterns, modules = adapter.settings[key], adapter.modules()
    if not isinstance(patterns, dict) or not all(isinstance(value, int | float) for value in patterns.values()):
        raise RefusedCheckpoint(
            f"{adapter.source}: {key} is {brief(patterns)}, not names of modules with a number each. Correct it."
        )
    repeating = sum(any(sign in pattern for sign in "*+") for pattern in patterns)
    strange = next((pattern for pattern in patterns if not _simple(pattern)), None)
    if strange is None and repeating <= REPEATING and len(patterns) <= 2 * len(modules) + LONGEST:
        compiled = {re.compile(rf"(.*\.)?({pattern})$"): value for pattern, value in patterns.items()}
        found = {module: [value for search, value in compiled.items() if search.match(module)] for module in modules}
        return {module: values[0] for module, values in found.items() if values}
    if key == "rank_pattern":
        ranks = _ranks(adapter.weights)
        if ranks.keys() == set(modules):
            return {module: rank for module, rank in ranks.items() if rank != adapter.settings.get("r")}
    what = f"{brief(strange)}, an expression" if strange is not None else f"{len(patterns):,} patterns"
    raise RefusedCheckpoint(
        f"{adapter.source}: {key} has {what}; searching with it could take years. Write the names of the modules in its place, "
        "such as layers.0.self_attn.q_proj."
    )


def _simple(pattern: str) -> bool:
    return bool(SIMPLE.fullmatch(pattern)) and sum(map(pattern.count, "*+")) <= REPEATS


def _ranks(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Module -> rank, as the weights have it."""
    names = {name: next((end for end in RANKS if name.endswith(f".{end}")), None) for name in weights}
    return {
        name.removeprefix("base_model.model.").removesuffix(f".{end}"): weights[name].shape[0]
        for name, end in names.items()
        if end is not None and weights[name].ndim
    }


def _by_value(values: Mapping[str, Any]) -> dict[str, Any]:
    """One pattern per number, with whole names in it, so that few are matched."""
    names: dict[Any, list[str]] = {}
    for module, value in values.items():
        names.setdefault(value, []).append(f"^{re.escape(module)}")
    return {"|".join(modules): value for value, modules in names.items()}
