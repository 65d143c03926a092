"""Put a checkpoint's weights into a model, strictly: every key, shape and dtype must fit."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from curvkit.errors import RefusedCheckpoint, UnknownObjective

SHOWN = 5


def fit(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a model in place.

    Args:
        model: Its parameters and buffers are overwritten; dtypes stay the model's.
        weights: By name; tied parameters may appear under any or all of their names.
        source: The file, for messages.

    Raises:
        UnknownObjective: If a key is missing, unexpected or of another shape, or tied copies differ.
        RefusedCheckpoint: If a weight is integer where the model is floating point, or NaN or infinite.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights and not _tied_name(name, own, weights)]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name}: file {tuple(weights[name].shape)}, model {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        raise UnknownObjective(_mismatch(source, missing, unexpected, shapes, len(own), len(weights)))
    _check_values(own, weights, source)
    _check_tied(own, weights, source)
    with torch.no_grad():
        for name, tensor in own.items():
            if name in weights:
                tensor.copy_(weights[name])


def _tied_name(name: str, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """Another name of the same tensor that the file has."""
    return next((k for k, t in own.items() if k != name and k in weights and _same(t, own[name])), None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.numel() > 0


def _check_values(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in weights.items():
        if own[name].dtype.is_floating_point and not tensor.dtype.is_floating_point:
            raise RefusedCheckpoint(
                f"{source}: the weight {name!r} is {tensor.dtype}, the model's is {own[name].dtype}. Quantised weights have no "
                "curvature of their own; pass the checkpoint before quantisation."
            )
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor.float()).all()):
            bad = int((~torch.isfinite(tensor.float())).sum())
            entries = "entry" if bad == 1 else "entries"
            raise RefusedCheckpoint(
                f"{source}: the weight {name!r} has {bad} NaN or infinite {entries} of {tensor.numel()}: the run had diverged. "
                "Take an earlier checkpoint."
            )


def _check_tied(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    first: dict[int, str] = {}
    for name, tensor in own.items():
        if name not in weights or not tensor.numel():
            continue
        other = first.setdefault(tensor.data_ptr(), name)
        if other != name and _same(own[other], tensor) and not torch.equal(weights[other], weights[name]):
            raise UnknownObjective(
                f"{source}: the model ties {other!r} and {name!r}, but the file has different values for them. "
                "Build the model untied, as it was when the file was written."
            )


def _mismatch(
    source: str, missing: list[str], unexpected: list[str], shapes: list[str], num_own: int, num_weights: int
) -> str:
    lines = [
        f"{source}: the weights do not fit the model (tensors: {num_weights} in the file, {num_own} in the model)."
    ]
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"  {word:<12}{', '.join(names[:SHOWN])}{more}")
    for index, shape in enumerate(shapes[:SHOWN]):
        lines.append(f"  {'' if index else 'other shape':<12}{shape}")
    if len(shapes) > SHOWN:
        lines.append(f"  {'':<12}and {len(shapes) - SHOWN} more")
    prefix = _prefix(missing, unexpected)
    if prefix:
        lines.append(
            f"The names fit without the prefix {prefix!r}: save the state dict of the module that was wrapped."
        )
        return "\n".join(lines)
    near = [
        (name, close[0]) for name in missing[:SHOWN] if (close := difflib.get_close_matches(name, unexpected, 1, 0.7))
    ]
    if near:
        lines.append(f"  {'nearest':<12}{', '.join(f'{a} ~ {b}' for a, b in near)}")
    lines.append("Build the model with the sizes of the run that wrote the file, for example with --set.")
    return "\n".join(lines)


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """What a wrapper (DistributedDataParallel, torch.compile) put before every name; empty if that is not the difference."""
    if not missing or len(missing) != len(unexpected) or not unexpected[0].endswith(f".{missing[0]}"):
        return ""
    prefix = unexpected[0].removesuffix(missing[0])
    return prefix if {f"{prefix}{name}" for name in missing} == set(unexpected) else ""
