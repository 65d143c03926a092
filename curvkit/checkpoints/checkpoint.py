"""What a checkpoint holds, once it has been read as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvkit.checkpoints.optimizer_summary import optimizer_class
from curvkit.checkpoints.places import tied

if TYPE_CHECKING:
    from torch import Tensor  # headers are read without torch, by files that can also make a Checkpoint


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file or directory holds, as plain data, whatever wrote it."""

    path: Path
    kind: str
    """In words: "state dict", "training dict", "checkpoint of curvkit.save", "Hugging Face directory", ..."""
    weights: dict[str, Tensor]
    optimizer: Mapping[str, Any] | None
    step: int | None
    recipe: Mapping[str, Any] | None
    """The data recipe that `curvkit.save` wrote."""
    keys: tuple[str, ...] = ()
    """Top-level keys of a training dict."""
    weight_keys: tuple[str, ...] = ()
    """Those of them that hold tensors by name; `weights` are those of the first."""
    optimizer_names: list[list[str]] | None = None
    """Parameter names per group, in the order of the optimizer's state."""
    removed: tuple[str, ...] = ()
    """Prefixes of wrappers (DistributedDataParallel, torch.compile, FSDP) that were taken from the names."""
    variants: tuple[str, ...] = ()
    """Other sets of weights in the file that could have been taken, for example "ema"."""
    config: Mapping[str, Any] | None = None
    """What the file says of the model: config.json of Hugging Face, model_args of nanoGPT, hyper_parameters of Lightning."""
    base: Path | None = None
    """Of an adapter: the directory of the model that it belongs to."""
    notes: tuple[str, ...] = ()
    """What a reader should know, for example that the format has no checksum."""
    options: tuple[str, ...] = ()
    """What was typed to read it: which weights are meant, and how far the file is believed, such as ("--key", "generator")."""
    optimizer_said: str | None = None
    """Class of the optimizer, if the file says it, as those of `curvkit.save` do."""
    schedule: Mapping[str, Any] | None = None
    """What the file says of the learning rate beside the optimizer; see `learning_rates.schedule_entry`."""

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Names of weights that are the same numbers."""
        return tuple(tied(self.weights))

    @property
    def distinct(self) -> dict[str, Tensor]:
        """The weights, those that are tied under the first of their names alone."""
        further = {name for names in self.tied for name in names[1:]}
        return {name: tensor for name, tensor in self.weights.items() if name not in further}

    @property
    def numel(self) -> int:
        """Numbers in all weights, buffers included; those that are tied count once."""
        return sum(tensor.numel() for tensor in self.distinct.values())

    @property
    def optimizer_class(self) -> str | None:
        """Class of the optimizer: as the file says, else as its groups show, for example "AdamW" or "Adam or AdamW"."""
        return optimizer_class(self.optimizer, self.optimizer_said)

    @property
    def lr(self) -> list[float]:
        """Distinct learning rates of the optimizer's groups, in order."""
        groups = (self.optimizer or {}).get("param_groups")
        listed: list[Any] = groups if isinstance(groups, list) else []
        rates: list[Any] = [group.get("lr") for group in listed if isinstance(group, Mapping)]
        return list(dict.fromkeys(float(lr) for lr in rates if isinstance(lr, int | float) or _is_number(lr)))

    def __str__(self) -> str:
        """One line for people."""
        distinct, numel = self.distinct, self.numel
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in distinct.values()})
        tensors = "1 tensor" if len(distinct) == 1 else f"{len(distinct)} tensors"
        numbers = "1 number" if numel == 1 else f"{numel:,} numbers"
        parts = [self.kind, f"{tensors}, {numbers}, {', '.join(dtypes)}"]
        if self.step is not None:
            parts.append(f"step {self.step}")
        if self.lr:
            rates = ", ".join(f"{lr:.4g}" for lr in self.lr[:3])
            parts.append(f"{self.optimizer_class or 'optimizer'} with lr {rates}")
        return " · ".join(parts)


def _is_number(value: Any) -> bool:
    """Whether it is a tensor of one number."""
    return hasattr(value, "untyped_storage") and value.numel() == 1
