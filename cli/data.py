"""On which data something is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from .groups import Command, grouped, option


@dataclass(frozen=True)
class Data:
    """On which data."""

    data: Path | None
    seq_len: int | None
    tokens: int | None
    split: str | None
    demo_data: bool
    batches: int | None

    def __post_init__(self) -> None:
        """Refuse what would have no effect."""
        if self.split is not None and self.data is None:
            raise click.UsageError("--split says which part of --data is measured: pass --data too, or leave it out.")


def data(command: Command) -> Command:
    """The data."""
    return grouped(
        Data,
        "Data",
        option(
            "--data",
            type=click.Path(exists=True, path_type=Path),
            metavar="PATH",
            help="For language models: a text, .jsonl, nanoGPT .bin, or a folder of the datasets library.",
        ),
        option("--seq-len", type=click.IntRange(min=1), metavar="T", help="Tokens per sequence."),
        option("--tokens", type=click.IntRange(min=1), metavar="N", help="How many tokens of it are measured."),
        option("--split", metavar="NAME", help="Which part of a folder, e.g. validation."),
        option(
            "--demo-data",
            is_flag=True,
            help="Measure on a bundled text: shows that it works, says nothing of your data.",
        ),
        option("--batches", type=click.IntRange(min=1), metavar="N", help="Use only the first N batches."),
    )(command)
