"""curvkit diagonal: the curvature of every single parameter."""

from __future__ import annotations

from functools import partial

import click

from .. import estimating
from ..configured import ConfiguredCommand
from ..data import Data, data
from ..estimation import SET_OF_BOTH, Estimation, Saving, estimation, saving
from ..groups import option
from ..target import Target, target


@click.command(cls=ConfiguredCommand)
@partial(target, settings=SET_OF_BOTH)
@data
@estimation
@option(
    "--by",
    heading="Output",
    type=click.Choice(["layer", "param"]),
    default="layer",
    show_default=True,
    help="Rows of the table: layers, or parameter tensors.",
)
@saving
@click.pass_context
def diagonal(ctx: click.Context, target: Target, by: str, data: Data, estimation: Estimation, saving: Saving) -> int:
    """Diagonal of a curvature matrix at a CHECKPOINT, with errors.

    A checkpoint is a file of torch.save or safetensors, or a directory of Hugging Face, PEFT or torch.distributed. Language models of
    Hugging Face and nanoGPT need --data alone, files of curvkit.save with a recipe nothing; for others `curvkit init` writes a function to
    fill in. Weights are read as data; nothing in the file is run.

    One number per parameter, with its standard error where something was drawn. Which matrix it belongs to the estimator says: by default
    it is the Hessian itself, from 8 probes of example-hutchinson. What is drawn once by default in Python is drawn 8 times here, because
    once leaves the error unknown.
    """
    return estimating.run(ctx, target, estimating.Command(data, estimation, saving, by))
