"""curvkit demo: train a small character model and save checkpoints to try things on."""

from __future__ import annotations

from pathlib import Path

import click

from ..interrupts import INTERRUPTED, conclude
from ..progress import ProgressLine


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), default=Path("demo-run"))
@click.option("--steps", type=click.IntRange(min=1), default=1200, show_default=True, help="Training steps.")
@click.option("--saves", type=click.IntRange(min=1), default=4, show_default=True, help="Checkpoints, evenly spaced.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def demo(directory: Path, steps: int, saves: int, quiet: bool) -> int:
    """Train a small model and save checkpoints in DIRECTORY.

    A Llama-like character model of 107,392 parameters learns Python's own help texts with AdamW, in about half a minute on two cores.
    Nothing is downloaded. The checkpoints say how they are to be measured, so that `curvkit sharpness` needs no flag.
    """
    from curvkit.demos import CharacterDemo

    training = CharacterDemo(steps=steps, saves=saves)
    saved: list[tuple[int, float, Path]] = []
    smoothed, interrupted = None, False
    try:
        with ProgressLine("training", quiet=quiet) as progress:
            for state in training.train(directory):
                smoothed = state.loss if smoothed is None else 0.95 * smoothed + 0.05 * state.loss
                progress.update(state.step / state.steps, f"step {state.step} of {state.steps}, loss {smoothed:.2f}")
                if state.saved is not None:
                    saved.append((state.step, smoothed, state.saved))
    except KeyboardInterrupt:
        interrupted = True
    for step, loss, path in saved:
        click.echo(f"step {step:>6}  loss {loss:.3f} nats per character  {path}")
    if saved:
        click.echo(f"\nNext: curvkit sharpness {saved[-1][2]}")
    if interrupted:
        conclude("Interrupted." if saved else "Interrupted before the first checkpoint: nothing was saved.")
        return INTERRUPTED
    return 0
