"""Weights of a Hugging Face file in the model that transformers builds: all of them arrived, and nothing else is in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvkit.errors import RefusedCheckpoint, UnknownObjective
from curvkit.resolving.transformers_library import reason_of

NOT_NEEDED = re.compile(
    r"(^|\.)(pooler|seq_relationship)\.|(^|\.)(position_ids|masked_bias|attn\.bias|rotary_emb\.inv_freq)$"
)
"""Weights that published files have besides those of the language model: heads of other tasks, and buffers that are rebuilt."""
SHOWN = 5


def loaded(path: Path, found: Any, config: Any, weights: Mapping[str, Tensor]) -> tuple[Any, tuple[str, ...]]:
    """Build a model and give it the weights.

    Args:
        path: For messages.
        found: The class.
        config: Its configuration; its sizes have been checked against the weights.
        weights: By the names of the file.

    Returns:
        The model in evaluation mode, and notes.

    Raises:
        UnknownObjective: If a tensor is missing, unexpected or of another shape, or tied copies differ.
        RefusedCheckpoint: If a number is NaN or infinite.
    """
    floating = {tensor.dtype for tensor in weights.values() if tensor.dtype.is_floating_point}
    dtype = torch.float64 if torch.float64 in floating else torch.float32
    config.use_cache, config.return_dict = False, True
    try:
        model, told = found.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            attn_implementation="sdpa" if getattr(found, "_supports_sdpa", False) else "eager",
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:
        raise UnknownObjective(
            f"{path}: transformers cannot load the weights into a {found.__name__} ({reason_of(error)}). "
            "Take another copy of the directory, or name an objective with --objective FILE.py:FUNCTION."
        ) from error
    shapes = [f"{name}: file {tuple(file)}, model {tuple(own)}" for name, file, own in told["mismatched_keys"]]
    unexpected = sorted(name for name in told["unexpected_keys"] if not NOT_NEEDED.search(name))
    missing = sorted({*told["missing_keys"], *_unaccounted(model, weights)})
    if missing or unexpected or shapes:
        lines = [f"{path}: the weights do not fit the {found.__name__} that config.json describes."]
        for word, names in (("missing", missing), ("unexpected", unexpected), ("other shape", sorted(shapes))):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines += [f"  {word:<12}{', '.join(names[:SHOWN])}{more}"] if names else []
        lines.append("Take the config.json that was saved with these weights.")
        raise UnknownObjective("\n".join(lines))
    _check_values(path, model, weights)
    left = sorted(set(told["unexpected_keys"]))
    notes = [f"left out, no part of a {found.__name__}: {_listed(left)}"] if left else []
    if floating != {dtype}:
        halves = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in floating))
        notes.append(f"weights in {halves}, computed in {str(dtype).removeprefix('torch.')}")
    return model.eval(), tuple(notes)


def sources(model: Any, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Find for each tensor of the model the one in the file by its name, or one that differs by the prefix of the model without its head.

    Args:
        model: Of transformers.
        weights: By the names of the file.

    Returns:
        Name in the model -> name in the file, for those that have one.
    """
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in model.state_dict():
        candidates = (name, name.removeprefix(prefix), prefix + name)
        source = next((candidate for candidate in candidates if candidate in weights), None)
        if source is not None:
            found[name] = source
    return found


def _unaccounted(model: Any, weights: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the model that came from nowhere: none in the file, none tied to one, and no renaming that could explain it."""
    found, state = sources(model, weights), model.state_dict(keep_vars=True)
    arrived = {id(state[name]) for name in found}
    absent = [name for name, tensor in state.items() if id(tensor) not in arrived]
    renamed = set(weights) - set(found.values())
    return [] if any(not NOT_NEEDED.search(name) for name in renamed) else absent


def _check_values(path: Path, model: Any, weights: Mapping[str, Tensor]) -> None:
    """Every number is finite, and is the file's, also where two names share one tensor."""
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise RefusedCheckpoint(
                f"{path}: the weight {name!r} has NaN or infinite entries: the run had diverged. Take an earlier checkpoint."
            )
    for name, source in sources(model, weights).items():
        if not torch.equal(state[name], weights[source].to(state[name].dtype)):
            raise UnknownObjective(
                f"{path}: the model ties {name!r} to another weight, but the file has different values for them. Correct "
                "tie_word_embeddings in config.json to what the model was trained with."
            )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
