"""Who wrote a training dict, by its keys, and what it says of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvkit.checkpoints.pickle_values import Made

SETTINGS = ("args", "config", "hparams", "hyper_parameters", "cfg", "model_args")
"""Under which key a training dict holds the settings of its run, in order of preference."""


def writer(
    content: Mapping[Any, Any], own: Mapping[Any, Any], chosen: str, averaged: bool
) -> tuple[str, Mapping[str, Any] | None]:
    """Recognise the writer.

    Args:
        content: Of the file.
        own: What curvkit.save put there; empty for other writers.
        chosen: Key of the weights; empty if the content itself is a state dict.
        averaged: Whether the weights are those of an AveragedModel.

    Returns:
        In words, and its configuration of the model.

    Example:
        >>> writer({"model": {}, "model_args": {"n_layer": 2}, "iter_num": 5}, {}, "model", False)
        ('nanoGPT checkpoint', {'n_layer': 2})
    """
    if own:
        return "checkpoint of curvkit.save", None
    if "pytorch-lightning_version" in content:
        return "Lightning checkpoint", plain_mapping(content.get("hyper_parameters"))
    if "model_args" in content and "iter_num" in content:
        return "nanoGPT checkpoint", plain_mapping(content.get("model_args"))
    if chosen and isinstance(content.get("arch"), str) and "state_dict" in content:
        arguments = plain_mapping(content.get("args"))
        return "timm checkpoint", {"arch": content["arch"], **({"args": arguments} if arguments else {})}
    if averaged and not chosen:
        return "state dict of an AveragedModel", None
    if not chosen:
        return "state dict", None
    settings = (plain_mapping(content.get(key)) for key in SETTINGS)
    return "training dict", next((found for found in settings if found), None)


def plain_mapping(value: Any) -> Mapping[str, Any] | None:
    """A dict, or the attributes of a Namespace; None for anything else.

    Args:
        value: Of a live content or of an outline.

    Returns:
        Names and values.

    Example:
        >>> import argparse
        >>> plain_mapping(argparse.Namespace(depth=2))
        {'depth': 2}
    """
    if isinstance(value, Made):
        value = value.state
    elif type(value).__name__ in ("Namespace", "SimpleNamespace"):
        value = vars(value)
    return {str(name): item for name, item in value.items()} if isinstance(value, Mapping) else None
