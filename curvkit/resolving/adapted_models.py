"""A language model with an adapter of PEFT; the only file that imports peft."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvkit.checkpoints import Checkpoint
from curvkit.errors import MissingExtra, RefusedCheckpoint, UnknownObjective
from curvkit.objectives.surroundings import random_state
from curvkit.resolving.adapter_settings import exact
from curvkit.resolving.hugging_face_models import check_predictions
from curvkit.resolving.language_model import LanguageModel
from curvkit.resolving.transformers_library import quietly, reason_of, refuse_broken_torchvision

SHOWN = 5
HARMLESS = {
    "megatron_config": None,
    "megatron_core": None,
    "init_lora_weights": True,
    "runtime_config": None,
    "loftq_config": None,
    "eva_config": None,
    "corda_config": None,
}
"""Settings that say how an adapter was begun; some would change the base, and the weights are given anyway."""


def adapt(base: LanguageModel, checkpoint: Checkpoint) -> LanguageModel:
    """Put an adapter on its base model; only the adapter's parameters are measured.

    Args:
        base: With its own weights; it is changed.
        checkpoint: Of the adapter, with adapter_config.json as `config`.

    Returns:
        The adapted model in evaluation mode; parameters of the base do not require a gradient.

    Raises:
        MissingExtra: If peft is not there.
        RefusedCheckpoint: If a weight is integer, NaN or infinite, or a setting is an expression that cannot be replaced.
        UnknownObjective: If the adapter is of an unknown kind or does not fit the base.
    """
    peft = _peft()
    path, described = checkpoint.path, dict(checkpoint.config or {})
    _check_values(path, checkpoint.weights)
    described, notes = exact(path, described, checkpoint.weights, dict(base.model.named_modules()))
    with quietly(), random_state():
        try:
            config = _config(peft, described, path)
            if config.is_prompt_learning:
                raise UnknownObjective(
                    f"{path}: a {described.get('peft_type')} adapter adds tokens to the text, so that its logits are not those of the "
                    "text alone. Name an objective with --objective FILE.py:FUNCTION."
                )
            model = peft.get_peft_model(base.model, config)
            told = peft.set_peft_model_state_dict(model, dict(checkpoint.weights))
        except UnknownObjective:
            raise
        except Exception as error:  # an unknown kind, modules that the base does not have, other shapes
            raise UnknownObjective(
                f"{path}: peft cannot put this adapter on the {base.name} in {checkpoint.base} ({reason_of(error)}). "
                "Check that it is the base that the adapter was trained on, or update peft."
            ) from error
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = sorted(own & set(told.missing_keys))
    if missing or told.unexpected_keys:
        lines = [f"{path}: the adapter's weights do not fit the {base.name} in {checkpoint.base}."]
        for word, names in (("missing", missing), ("unexpected", sorted(told.unexpected_keys))):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines += [f"  {word:<12}{', '.join(names[:SHOWN])}{more}"] if names else []
        lines.append("Check that it is the base that the adapter was trained on.")
        raise UnknownObjective("\n".join(lines))
    name = f"{base.name} with a {described.get('peft_type')} adapter"
    places = (path if path.is_dir() else path.parent, *base.tokenizer_places)
    made = replace(base, model=model.eval(), name=name, tokenizer_places=places, notes=(*base.notes, *notes))
    with quietly(), random_state():
        check_predictions(made, path)
    return made


def _peft() -> Any:
    try:
        import peft  # an optional package
    except Exception as error:
        refuse_broken_torchvision(error)
        if isinstance(error, ModuleNotFoundError) and error.name == "peft":
            raise MissingExtra(
                "Adapters are built by peft, which is not installed. Type: pip install 'curvkit[hf]'"
            ) from error
        raise MissingExtra(
            f"peft is installed but cannot be imported ({reason_of(error)}). Type: pip install --upgrade 'curvkit[hf]'"
        ) from error
    return peft


def _config(peft: Any, described: Mapping[str, Any], path: Path) -> Any:
    """The adapter's configuration, ready to be trained on, whose beginning touches the base in no way."""
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(described["peft_type"])]
    known = set(kind.__dataclass_fields__)
    harmless = {key: value for key, value in HARMLESS.items() if key in known and value is not None}
    dropped = {"auto_mapping", *(key for key, value in HARMLESS.items() if value is None)}
    unknown = sorted(str(key) for key, value in described.items() if key not in (*known, *dropped) and value)
    if unknown:
        said = f"{unknown[0]} = {described[unknown[0]]!r:.80}"
        raise UnknownObjective(
            f"{path}: adapter_config.json says {said}, which peft {peft.__version__} does not know, so that the function "
            "might be another one. Update it with pip install --upgrade peft."
        )
    plain = {key: value for key, value in described.items() if key in known and key not in dropped}
    return kind(**{**plain, **harmless, "inference_mode": False})


def _check_values(path: Path, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if not tensor.dtype.is_floating_point:
            raise RefusedCheckpoint(
                f"{path}: the weight {name!r} is {tensor.dtype}. Quantised weights have no curvature of their own; pass the adapter as it "
                "was trained."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise RefusedCheckpoint(
                f"{path}: the weight {name!r} has NaN or infinite entries: the run had diverged. Take an earlier checkpoint."
            )
