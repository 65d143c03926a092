"""Put a checkpoint's weights into a model, strictly: every key, shape and dtype must fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from curvkit.checkpoints.assignment import assign
from curvkit.checkpoints.mismatch import mismatch
from curvkit.checkpoints.names import Fitted, fitted, renamed
from curvkit.errors import RefusedCheckpoint, UnknownObjective

LEFT_OUT = 3


def fit(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> tuple[str, ...]:
    """Load weights into a model in place.

    Names are taken as they are. Where they do not fit, they are tried without the prefixes of wrappers, and without a prefix
    such as "model.", which is taken away only if every weight of the model is then found.

    Args:
        model: Its parameters and buffers are overwritten; dtypes stay the model's. What is on the meta device gets the tensors
            of `weights` themselves where the dtype is the same, so that nothing is held twice.
        weights: By name; tied parameters may appear under any or all of their names.
        source: The file, for messages.

    Returns:
        What a reader should know: a prefix that was taken away, weights that were left out.

    Raises:
        UnknownObjective: If a key is missing, unexpected or of another shape, or tied copies differ.
        RefusedCheckpoint: If a weight is integer or complex where the model is not, or NaN or infinite, or too large for the model's dtype.

    Cost: one pass over the weights.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> fit(model, {"net.weight": torch.ones(1, 2)}, "ckpt.pt")
        ("the prefix 'net.' was taken from the names",)
        >>> model.weight.sum().item()
        2.0
    """
    lazy = next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise UnknownObjective(
            f"{source}: the model's parameter {lazy!r} has no shape yet. Run one batch through the lazy module where the model is built."
        )
    own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    ties = _ties(model, own)
    matched = fitted(weights, own, ties)
    there = renamed(weights, matched)
    missing = [name for name in own if name not in there and not any(other in there for other in ties.get(name, ()))]
    unexpected = [name for name in there if name not in own]
    shapes = [
        f"{name}: file {tuple(there[name].shape)}, model {tuple(own[name].shape)}"
        for name in own
        if name in there and there[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        raise UnknownObjective(mismatch(source, missing, unexpected, shapes, len(own), len(weights)))
    _check_values(own, there, source)
    _check_tied(ties, there, source)
    notes = (*_notes(matched), *_rounded(own, there))
    complete = {name: there[_source(name, ties, there)] for name in own}
    assign(model, own, complete, ties)
    return notes


def precision(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype in which a model is built that says none of its own, so that no weight is rounded.

    Args:
        weights: Of a file.

    Returns:
        float64 if one of them is float64, else float32.

    Example:
        >>> precision({"a": torch.ones(1, dtype=torch.bfloat16)})
        torch.float32
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in weights.values()) else torch.float32


def _ties(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Every name of a tensor that has several -> the others."""
    objects = {
        name: ("object", id(tensor))
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }
    groups: dict[object, list[str]] = {}
    for name, tensor in own.items():
        place: object = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.is_meta or not tensor.numel():
            place = objects.get(name, ("name", name))
        groups.setdefault(place, []).append(name)
    return {name: tuple(n for n in names if n != name) for names in groups.values() for name in names if len(names) > 1}


def _source(name: str, ties: Mapping[str, tuple[str, ...]], there: Mapping[str, Tensor]) -> str:
    """The name under which the file has this tensor."""
    return name if name in there else next(other for other in ties[name] if other in there)


def _check_values(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in weights.items():
        wanted = own[name].dtype
        if wanted.is_floating_point and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
            raise RefusedCheckpoint(
                f"{source}: the weight {name!r} is {tensor.dtype}, the model's is {wanted}. Quantised weights have no "
                "curvature of their own; pass the checkpoint before quantisation."
            )
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 and wanted != tensor.dtype:
            raise RefusedCheckpoint(
                f"{source}: the weight {name!r} is {tensor.dtype}: quantised, with scales of their own that are not applied. "
                "Pass the checkpoint before quantisation."
            )
        if tensor.dtype.is_complex != wanted.is_complex or (
            tensor.dtype.is_floating_point and not wanted.is_floating_point
        ):
            raise RefusedCheckpoint(
                f"{source}: the weight {name!r} is {tensor.dtype}, the model's is {wanted}, which cannot hold it. "
                "Build the model with the dtypes of the run that wrote the file."
            )
        whole = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
        if whole and wanted != tensor.dtype and not torch.equal(tensor.to(wanted).to(tensor.dtype), tensor):
            raise RefusedCheckpoint(
                f"{source}: {name!r} is {tensor.dtype}, with numbers that {wanted}, the model's dtype, cannot hold. "
                "Build the model with the dtypes of the run that wrote the file."
            )
        if not whole:
            _check_finite(name, tensor, wanted, source)


def _rounded(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Which weights lose digits in the model's dtype."""
    pairs = {
        (str(tensor.dtype).removeprefix("torch."), str(own[name].dtype).removeprefix("torch."))
        for name, tensor in weights.items()
        if tensor.dtype.is_floating_point and torch.promote_types(tensor.dtype, own[name].dtype) != own[name].dtype
    }
    return tuple(f"weights in {theirs} were rounded to the model's {ours}" for theirs, ours in sorted(pairs))


def _check_finite(name: str, tensor: Tensor, wanted: torch.dtype, source: str) -> None:
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    bad = values.numel() - int(torch.isfinite(values).sum())
    if bad:
        entries = "entry" if bad == 1 else "entries"
        raise RefusedCheckpoint(
            f"{source}: the weight {name!r} has {bad} NaN or infinite {entries} of {tensor.numel()}: the run had diverged. "
            "Take an earlier checkpoint."
        )
    if wanted.itemsize < tensor.dtype.itemsize and not bool(torch.isfinite(tensor.to(wanted)).all()):
        raise RefusedCheckpoint(
            f"{source}: the weight {name!r} has entries that are too large for {wanted}, the model's dtype. "
            f"Build the model in {tensor.dtype}."
        )


def _check_tied(ties: Mapping[str, tuple[str, ...]], weights: Mapping[str, Tensor], source: str) -> None:
    for name, others in ties.items():
        other = next((other for other in others if other in weights), None)
        if name in weights and other is not None and not torch.equal(weights[other], weights[name]):
            raise UnknownObjective(
                f"{source}: the model ties {name!r} and {other!r}, but the file has different values for them. "
                "Build the model untied, as it was when the file was written."
            )


def _notes(matched: Fitted) -> tuple[str, ...]:
    notes = [f"the prefix {matched.prefix!r} was taken from the names"] if matched.prefix else []
    if matched.left_out:
        shown = ", ".join(matched.left_out[:LEFT_OUT])
        more = f" and {len(matched.left_out) - LEFT_OUT} more" if len(matched.left_out) > LEFT_OUT else ""
        notes.append(f"left out, as the model has no place for them: {shown}{more}")
    return tuple(notes)
