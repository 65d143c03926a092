"""What config.json, or a recipe, says of a model, without what would fetch code, start imports, or fill the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from curvkit.errors import UnknownObjective
from curvkit.resolving.depth import refuse_too_deep

NOT_OURS = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "custom_pipelines",
        "distributed_config",
        "experts_implementation",
        "fusion_config",
        "gguf_file",
        "id2label",
        "kernel_config",
        "label2id",
        "num_labels",
        "per_layer_attn_implementation",
        "problem_type",
        "transformers_weights",
        "use_kernels",
    )
)
"""Entries that say how to run or where to find code and files, or what belongs to classifiers (`num_labels` is a loop), not what the
model is. "flash_attention_2" and some kinds of experts are fetched from the Hub where the package kernels is installed."""
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "context",
)
LONGEST = 20_000_000
"""Tokens of a context: twice that of the longest that is known."""
COUNTED = ("experts", "groups", "group_num", "codebooks", "blocks")
"""Parts of names of numbers of modules, beside those of layers."""
MOST_MODULES = 4096
SINES = ("distilbert", "flaubert", "marian", "pegasus", "roformer", "xlm")
"""Kinds of models that compute a table of sines number by number, in Python; it is in the file, too, where it is used."""
WIDTHS = ("hidden_size", "width", "d_model", "dim", "emb_dim", "embedding_size")
MOST_SINES = 5_000_000
MOST_ROTATIONS = 100_000_000
"""Of curvkit's own decoder, which tabulates them for its context, in numbers."""
FETCHING = ("mra", "rwkv", "yoso")
"""Kinds of models that fetch a kernel from the Hub and import it as soon as they are built or run, if the package kernels is there."""


def plain(described: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not the model, also in configurations within the configuration.

    Args:
        described: The contents of config.json.

    Returns:
        A copy.

    Example:
        >>> plain({"n_layer": 2, "text_config": {"attn_implementation": "a/b", "n": 1}})
        {'n_layer': 2, 'text_config': {'n': 1}}
    """
    return {key: _plain(value) for key, value in described.items() if key not in NOT_OURS}


def refuse_unbuildable(source: str, described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Refuse sizes that would keep the machine busy for hours, before anything is built.

    Args:
        source: The file, for messages.
        described: Its contents, or the arguments of a recipe.
        weights: That lie beside it.

    Raises:
        UnknownObjective: Naming the first such size.

    Example:
        >>> refuse_unbuildable("config.json", {"n_layer": 12, "n_positions": 1024}, {})
    """
    num_tensors, found = len(weights), list(_numbers(described))
    refuse_too_deep(source, described, num_tensors)
    for key, value in found:
        if key in LENGTHS and value > LONGEST:
            raise UnknownObjective(
                f"{source} has {key} = {value:.3g}, a context longer than that of any model. Take another copy of it."
            )
        if key.endswith(COUNTED) and value > max(MOST_MODULES, num_tensors):
            raise UnknownObjective(
                f"{source} has {key} = {value:.3g}, but {num_tensors:,} weights are there. Take another copy of it."
            )
    sizes = described.get("sizes")
    if isinstance(sizes, list | tuple) and len(sizes) > max(MOST_MODULES, num_tensors):
        raise UnknownObjective(
            f"{source} has {len(sizes):,} sizes, but {num_tensors:,} weights are there. Take another copy of it."
        )
    long, wide = (max((value for key, value in found if key in names), default=0) for names in (LENGTHS, WIDTHS))
    held = sum(tensor.numel() for tensor in weights.values())
    most = MOST_SINES if described.get("model_type") in SINES else MOST_ROTATIONS if "context" in described else None
    if most is not None and long * wide > held + most:
        raise UnknownObjective(
            f"{source} describes a table of positions of {long:.3g} by {wide:.3g}, and its weights have {held:,} numbers in all. "
            "Take another copy of it."
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _numbers(described: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    waiting: list[Any] = [described]
    while waiting:
        held = waiting.pop()
        for key, value in held.items() if isinstance(held, Mapping) else ():
            if isinstance(key, str) and isinstance(value, int) and value < 1 << 64:
                yield key, value
            elif isinstance(key, str) and isinstance(value, int):
                yield key, 1 << 64
            waiting.append(value)
        waiting += held if isinstance(held, list) else ()
