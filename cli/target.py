"""What is measured: a checkpoint, what may be believed of it, and the function that makes its objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from curvkit.resolving.config import VARIABLE

from .configured import CONFIG, NO_CONFIG
from .groups import Command, grouped, option
from .paths import Existing
from .values import Assignment, ClassName

if TYPE_CHECKING:
    from curvkit.checkpoints.trust import Trust
    from curvkit.resolving.config import Config


@dataclass(frozen=True)
class Target:
    """What is measured."""

    checkpoint: Path
    key: str | None
    ema: bool
    objective: str | None
    set: tuple[tuple[str, str], ...]
    config: Config | None
    no_config: bool
    trust: bool
    allow: tuple[str, ...]
    params: tuple[str, ...]
    mode: str
    device: str
    dtype: str

    @property
    def trusted(self) -> Trust:
        """How far the checkpoint is believed: as far as the command line says."""
        from curvkit.checkpoints.trust import Trust

        return Trust(self.trust, self.allow)


KEY = option("--key", metavar="NAME", help="Take the weights under this key of the file.")
EMA = option("--ema", is_flag=True, help="Take the averaged weights; their optimizer state belongs to the raw ones.")
ALLOW = option(
    "--allow",
    type=ClassName(),
    multiple=True,
    metavar="CLASS",
    allow_from_autoenv=False,
    help="Let the file hold objects of this class, e.g. train.Config; it is imported.",
)
TRUST = option(
    "--trust",
    is_flag=True,
    allow_from_autoenv=False,
    help="Let the file run code. Only for files whose author you trust.",
)


SET = option("--set", type=Assignment(), multiple=True, metavar="K=V", help="Argument of that function.")


def target(command: Command, settings: Callable[..., Any] = SET) -> Command:
    """The checkpoint and what is done with its model; `settings` is the option --set."""
    return grouped(
        Target,
        "Model",
        click.argument("checkpoint", type=Existing()),
        KEY,
        EMA,
        option(
            "--objective",
            metavar="FILE.py:FUNC",
            envvar=VARIABLE,
            help="Function that returns curvkit.Objective(model, loss, data).",
        ),
        settings,
        CONFIG,
        NO_CONFIG,
        ALLOW,
        TRUST,
        option("--params", multiple=True, metavar="GLOB", help="Only parameters whose name matches, e.g. 'head.*'."),
        option(
            "--mode",
            type=click.Choice(["eval", "train", "asis"]),
            default="eval",
            show_default=True,
            help="Mode of the model.",
        ),
        option(
            "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto takes CUDA if it is there."
        ),
        option(
            "--dtype",
            type=click.Choice(["auto", "float32", "float64"]),
            default="auto",
            show_default=True,
            help="Precision; auto keeps the model's, half precision is raised to float32.",
        ),
    )(command)
