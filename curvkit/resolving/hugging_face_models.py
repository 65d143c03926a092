"""Language models of Hugging Face, built from what was read as data."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvkit.checkpoints import Checkpoint
from curvkit.checkpoints.command_lines import command_line
from curvkit.checkpoints.needs import LANGUAGE_MODELS
from curvkit.checkpoints.trust import NOTHING, Trust
from curvkit.errors import RefusedCheckpoint, UnknownObjective
from curvkit.objectives.surroundings import random_state
from curvkit.resolving.configurations import FETCHING, plain, refuse_unbuildable
from curvkit.resolving.hugging_face_weights import loaded, sources
from curvkit.resolving.language_model import Kind, LanguageModel
from curvkit.resolving.transformers_library import (
    class_of_directory,
    classes_by_kind,
    library,
    quietly,
    reason_of,
    refuse_broken_torchvision,
)

MOST_IN_TABLES = 200_000_000
"""Numbers in buffers, such as masks and sines of positions, beyond which a small file is not believed."""
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


def build_hugging_face(checkpoint: Checkpoint, trust: Trust) -> LanguageModel:
    """Build the model that a directory describes, with its weights.

    Only classes that transformers itself ships are built, from the configuration and the weights that were read as data; nothing is
    looked up in the network. Names of weights are converted as transformers does; then every tensor of the model must have come
    from the file, and every tensor of the file must have gone into the model.

    Args:
        checkpoint: With `config`.
        trust: If everything is trusted, code of the directory itself (`auto_map`) may be imported.

    Returns:
        The model in evaluation mode, in float32 or the dtype of the file if that is wider.

    Raises:
        MissingExtra: If transformers is not there or cannot be imported.
        RefusedCheckpoint: If it needs code of its own, or a weight is integer, NaN or infinite.
        UnknownObjective: If it is no language model that is known here, or the weights do not fit.

    Cost: the memory of the weights, once more if they are in half precision.
    """
    path = checkpoint.path
    with quietly(), random_state():
        found, config, kind = _chosen(path, _described(checkpoint), trust)
        _check_size(path, found, config, checkpoint.weights)
        model, notes = loaded(path, found, config, checkpoint.weights)
    embedding = model.get_input_embeddings()
    vocabulary = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else int(config.vocab_size)
    language = LanguageModel(
        model, found.__name__, kind, vocabulary, _context(model), (_directory(path),), returns_object=True, notes=notes
    )
    with quietly(), random_state():
        check_predictions(language, path)
    return language


def refuse_other_architectures(checkpoint: Checkpoint) -> str:
    """Say the architecture of a directory, and refuse it if it is no language model; quickly where the name says enough.

    Args:
        checkpoint: With `config`.

    Returns:
        The name of the class.
    """
    described = _described(checkpoint)
    name = _architecture(described)
    if name is None or not name.endswith(LANGUAGE_MODELS) or described.get("auto_map"):
        with quietly():
            found, _, _ = _chosen(checkpoint.path, described, NOTHING)
        return found.__name__
    return name


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    described = dict(checkpoint.config or {})
    refuse_unbuildable(f"{checkpoint.path}: config.json", described, checkpoint.weights)
    return described


def _chosen(path: Path, described: Mapping[str, Any], trust: Trust) -> tuple[Any, Any, Kind]:
    transformers = library()
    if described.get("auto_map"):
        return _of_directory(transformers, path, described, trust)
    return _of_transformers(transformers, path, described)


def _of_transformers(transformers: Any, path: Path, described: Mapping[str, Any]) -> tuple[Any, Any, Kind]:
    """Class, configuration and kind, all out of transformers' own tables."""
    tables = classes_by_kind()
    kinds: list[Kind]
    model_type, name = described.get("model_type"), _architecture(described)
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise UnknownObjective(
            f"{path}: config.json has model_type {model_type!r}, which transformers {transformers.__version__} does not know. Update it "
            "with pip install --upgrade transformers, or name an objective with --objective FILE.py:FUNCTION."
        )
    if model_type in FETCHING and importlib.util.find_spec("kernels") is not None:
        raise RefusedCheckpoint(
            f"{path}: a model of the type {model_type} fetches code from the Hub and imports it, since the package kernels is installed. "
            "Nothing was. Measure it in an environment without that package (pip uninstall kernels)."
        )
    if name is None:
        kinds = [kind for kind, table in tables.items() if model_type in table]
        name = tables[kinds[0]][model_type] if len(kinds) == 1 else f"{model_type} without architectures"
    else:
        kinds = [kind for kind, table in tables.items() if name in table.values()]
    if len(kinds) != 1 or name.endswith("ForConditionalGeneration"):
        raise UnknownObjective(
            f"{path}: a {name} is neither a causal nor a masked language model, so which loss and data it takes is not known. "
            f"Type {command_line('init', path)}, which writes a function to fill in, or name one: --objective FILE.py:FUNCTION."
        )
    try:
        found = getattr(transformers, name)
        config = transformers.CONFIG_MAPPING[model_type].from_dict(plain(described))
    except Exception as error:  # each configuration checks itself in its own way
        refuse_broken_torchvision(error)
        raise UnknownObjective(
            f"{path}: transformers {transformers.__version__} cannot make a {name} of config.json ({reason_of(error)}). Correct "
            "it, update transformers, or name an objective with --objective FILE.py:FUNCTION."
        ) from error
    if not isinstance(config, found.config_class):
        raise UnknownObjective(
            f"{path}: config.json says architecture {name} and model_type {model_type!r}, which do not belong together. "
            "Take another copy of it."
        )
    return found, config, kinds[0]


def _of_directory(transformers: Any, path: Path, described: Mapping[str, Any], trust: Trust) -> tuple[Any, Any, Kind]:
    """Class and configuration from Python files of the directory, which the user trusts."""
    mapping = described["auto_map"] if isinstance(described["auto_map"], Mapping) else {}
    names: dict[Kind, Any] = {
        "causal": mapping.get("AutoModelForCausalLM"),
        "masked": mapping.get("AutoModelForMaskedLM"),
    }
    if not trust.everything:
        raise RefusedCheckpoint(
            f"{path}: config.json has auto_map: its model is Python code in the directory, which would be imported. Nothing was executed. "
            "If you believe it, pass --trust."
        )
    kind: Kind | None = next((kind for kind, name in names.items() if isinstance(name, str)), None)
    references = [str(name) for name in (mapping.get("AutoConfig"), names[kind] if kind else None) if name is not None]
    if kind is None or any("--" in reference for reference in references):
        what = "names no causal or masked language model" if kind is None else "names code of another repository"
        raise UnknownObjective(
            f"{path}: the auto_map of config.json {what}. Name an objective with --objective FILE.py:FUNCTION."
        )
    place = str(_directory(path).resolve())
    found = class_of_directory(str(names[kind]), place)
    if "AutoConfig" in mapping:
        made = class_of_directory(str(mapping["AutoConfig"]), place)
    else:
        made = transformers.CONFIG_MAPPING[described["model_type"]]
    return found, made.from_dict(plain(described)), kind


def _check_size(path: Path, found: Any, config: Any, weights: Mapping[str, Tensor]) -> None:
    """Refuse a configuration of another size than the weights before memory is taken: on the meta device."""
    try:
        with torch.device("meta"):
            skeleton = found(config)
    except Exception as error:  # sizes that do not fit each other, or a layer that needs a package
        raise UnknownObjective(
            f"{path}: a {found.__name__} cannot be built from config.json ({reason_of(error)}). Take another copy of it, or name an "
            "objective with --objective FILE.py:FUNCTION."
        ) from error
    for name, tensor in weights.items():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            raise RefusedCheckpoint(
                f"{path}: the weight {name!r} is {tensor.dtype}: quantised, with scales of its own that are not applied. Pass the "
                "checkpoint before quantisation."
            )
    own = {id(parameter): parameter.numel() for parameter in skeleton.parameters()}
    wanted, there = sum(own.values()), sum(tensor.numel() for tensor in weights.values())
    tables = sum(buffer.numel() for buffer in skeleton.buffers())  # of positions; they need not be in the file
    if wanted > 2 * there + 1_000_000 or tables > 8 * there + MOST_IN_TABLES:  # a tied head may be missing in the file
        wanted += tables if tables > wanted else 0
        raise UnknownObjective(
            f"{path}: config.json describes a {found.__name__} of {wanted:,} numbers, and the file has {there:,}. "
            "They do not belong together; take another copy of the directory."
        )
    state = skeleton.state_dict()
    for name, source in sources(skeleton, weights).items():
        if state[name].dtype.is_floating_point and not weights[source].dtype.is_floating_point:
            raise RefusedCheckpoint(
                f"{path}: the weight {source!r} is {weights[source].dtype}. Quantised weights have no curvature of their own; pass the "
                "checkpoint before quantisation."
            )


def check_predictions(language: LanguageModel, path: Path) -> None:
    """Call a model, and refuse a causal one that sees later tokens, such as a BERT that is not set up as a decoder.

    Args:
        language: With its weights, in evaluation mode.
        path: For messages.

    Raises:
        UnknownObjective: If it cannot be called, predicts NaN, or is not causal and should be.

    Cost: two forward passes of eight tokens.
    """
    model, length = language.model, min(8, language.context or 8)
    tokens = torch.arange(length)[None] % max(2, min(8, language.vocabulary))
    changed = tokens.clone()
    changed[0, -1] = 0 if int(tokens[0, -1]) else 1
    with torch.no_grad():
        try:
            one, other = (model(input_ids=ids).logits.float() for ids in (tokens, changed))
        except Exception as error:
            raise UnknownObjective(
                f"{path}: a {type(model).__name__} cannot be called with tokens alone ({reason_of(error)}). "
                "Name an objective with --objective FILE.py:FUNCTION."
            ) from error
    if bool(torch.isnan(one).any() or torch.isnan(other).any()):
        raise UnknownObjective(
            f"{path}: what this {type(model).__name__} predicts is NaN. A number in config.json may be damaged, such as the "
            "epsilon of a norm; take another copy of it, or an earlier checkpoint."
        )
    largest = float(torch.where(one.isinf(), 0.0, one).abs().max())  # of tokens that are ruled out, logits may be -inf
    later = not torch.allclose(one[:, :-1], other[:, :-1], rtol=0.0, atol=1e-5 * largest)
    if language.kind == "causal" and later:
        raise UnknownObjective(
            f"{path}: this {type(model).__name__} is not causal: what it predicts depends on later tokens. Its configuration may lack "
            "is_decoder; for a masked language model save it as one."
        )


def _context(model: Any) -> int | None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts positions from behind the padding
    sizes = (getattr(model.config, name, None) for name in CONTEXT_NAMES)
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _architecture(described: Mapping[str, Any]) -> str | None:
    names = described.get("architectures")
    return names[0] if isinstance(names, list | tuple) and names and isinstance(names[0], str) else None


def _directory(path: Path) -> Path:
    return path if path.is_dir() else path.parent
