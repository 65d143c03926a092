"""What the user allows a file to do; the command line is the only place that says so."""

from __future__ import annotations

from dataclasses import dataclass

from curvkit.errors import RefusedCheckpoint


@dataclass(frozen=True)
class Trust:
    """How far a file is believed.

    A checkpoint is data: nothing in it runs, and nothing that it names is imported. Two doors lead out of that, and both are opened by
    the person at the keyboard alone; neither environment nor configuration can.

    Args:
        everything: The file may run code: pickled modules, TorchScript, programs of torch.export, code that a configuration names.
        classes: Full names of classes, "package.module.Class", that may be unpickled besides plain data; they are imported.

    Example:
        >>> Trust(classes=("train.Config",)).anything
        True
        >>> NOTHING.anything
        False
    """

    everything: bool = False
    classes: tuple[str, ...] = ()

    @property
    def anything(self) -> bool:
        """Whether one of the doors is open."""
        return self.everything or bool(self.classes)


NOTHING = Trust()
"""The default."""


class NeedsTrust(RefusedCheckpoint):
    """A file is sound as far as that can be said, but reading it could run code, and the user has not allowed that."""
