"""The journal that outlives its process: a folder of results, of which a half-written one never counts."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from curvkit.errors import InvalidArgument
from curvkit.results import manifest
from curvkit.results.belongings import inside, refuse_strangers
from curvkit.results.files import replaced, sha256
from curvkit.results.journal import Kept
from curvkit.results.lock import LOCK, let_go, locked
from curvkit.results.manifest import Manifest, Segment
from curvkit.results.record import plain

LEAST, SHARE, SLACK = 2.0, 0.01, 25.0
"""Seconds between two saves: at least 2, a hundredth of the run so far, and 25 times what the last save took: 4 % of the time at most."""
MOST_WAITING = 256 << 20
"""Bytes that wait to be saved. What comes beyond that before a save is due costs less to make again than to save, and is not kept."""

Tell = Callable[[str], None]


class StateFolder:
    """A journal in a folder, for one process at a time.

    Results are collected and saved from time to time as a segment, a safetensors file; then the manifest that lists it is replaced. Both
    are written under another name, flushed to the disk and renamed, so that a process that is killed at any moment leaves the state of its
    last save. A file that the manifest does not list is not read. A segment that is missing or whose hash differs is left out: what was in
    it is made again. Nothing in a state is executed when it is read.

    Where the disk does not take it, that is told once, and the run goes on unsaved.

    Args:
        path: The folder; made if it is not there.
        run: What is measured, and how: plain values that must be the same when it is resumed.
        surroundings: Machine and versions, which may differ: then `differences` says so.
        fresh: Begin anew: a state that is there is removed.
        tell: Gets sentences for the user.

    Raises:
        InvalidArgument: If the state there is of another run, or the folder is a link, or has files and no state.
        RefusedCheckpoint: If its manifest is damaged.
        CurvkitError: If another process uses it.
        OSError: If the folder cannot be made.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp()) / "trace.state"
        >>> with StateFolder(folder, run={"seed": 0}) as journal:
        ...     journal.keep("hessian/0", Kept(torch.ones(2), seconds=1.0))
        ...     journal.save()
        >>> with StateFolder(folder, run={"seed": 0}) as journal:
        ...     journal.recalled("hessian/0").tensor.tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        path: Path,
        *,
        run: Mapping[str, Any],
        surroundings: Mapping[str, Any] | None = None,
        fresh: bool = False,
        tell: Tell = lambda sentence: None,
    ) -> None:
        self.path, self._tell = path, tell
        refuse_strangers(path)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(path)
        try:
            if fresh:
                (path / manifest.NAME).unlink(missing_ok=True)
            now = Manifest(_same(run), _same(surroundings or {}))
            self._manifest = self._earlier(now) if unfinished(path) else now
        except BaseException:
            self.close()
            raise
        self.differences = tuple(manifest.differences(self._manifest.surroundings, now.surroundings))
        """Between the surroundings of the earlier run and of this one."""
        self.seconds = 0.0
        """That the results of earlier runs took."""
        self._places = {key: name for name, keys in self._checked().items() for key in keys}
        self.known = len(self._places)
        """Results of earlier runs."""
        self.used = 0
        """How many of them were recalled."""
        self._waiting: dict[str, Kept] = {}
        self._bytes, self._ahead, self._failed, self._changed = 0, 0.0, False, False
        self._began = self._saved = time.monotonic()
        self._took = 0.0
        self._open: tuple[str, Any] = ("", None)

    def __enter__(self) -> Self:
        """The journal itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Save what waits, and let go of the folder; where nothing was kept, remove it."""
        if self._manifest.segments or self._waiting:
            self.save()
        self.close()

    def recalled(self, key: str) -> Kept | None:
        """What an earlier run kept under a key; None for nothing."""
        name = self._places.get(key)
        if name is None:
            return None
        segment = self._segment(name)
        seconds, error, turned = _numbers(segment.metadata()[key])
        self.used += 1
        self._ahead += seconds
        return Kept(segment.get_tensor(key), seconds, error, turned)

    def keep(self, key: str, kept: Kept) -> None:
        """Keep a result, and save if it is time to."""
        now, size = time.monotonic(), kept.tensor.numel() * kept.tensor.itemsize
        due = now - self._saved >= max(LEAST, SHARE * (now - self._began), SLACK * self._took)
        if self._failed or (self._bytes > 0 and self._bytes + size > MOST_WAITING and not due):
            return
        self._waiting[key] = kept
        self._bytes += size
        if due:
            self.save()

    def fact(self, name: str) -> Any:
        """What was decided; None for nothing."""
        return self._manifest.facts.get(name)

    def decide(self, name: str, value: Any) -> None:
        """Keep a decision; it is saved with the next results."""
        self._manifest = replace(self._manifest, facts={**self._manifest.facts, name: _same(value)})
        self._changed = True

    def clock(self) -> float:
        """The monotonic clock, moved on by the time that what was recalled took to make."""
        return time.monotonic() + self._ahead

    @property
    def saved(self) -> int:
        """Results that are on the disk."""
        return sum(segment.entries for segment in self._manifest.segments)

    def save(self) -> None:
        """Write what waits as a segment, and the manifest that lists it. Where that fails it is told, and nothing more is saved."""
        if self._failed or not (self._waiting or self._changed):
            return
        began, waiting = time.monotonic(), self._waiting
        try:
            made = self._manifest
            if waiting:
                made = replace(made, segments=(*made.segments, self._written(waiting)))
            made.write(self.path)
        except OSError as error:
            self._failed = True
            self._tell(
                f"{self.path}: the state cannot be saved ({(error.strerror or str(error)).lower()}). The measurement goes on; if it is "
                f"cut short, it can be resumed from {self.saved} earlier results."
            )
        else:
            self._manifest = made
        self._waiting, self._bytes, self._changed = {}, 0, False
        self._saved = time.monotonic()
        self._took = self._saved - began

    def close(self) -> None:
        """Let another process use the folder; if nothing was ever saved, it is removed."""
        self._open = ("", None)
        if not unfinished(self.path):
            self._remove()
        let_go(self._lock)

    def discard(self) -> None:
        """Remove the state: its run is complete."""
        self._open, self._waiting, self._failed = ("", None), {}, True
        self._manifest = replace(self._manifest, segments=())
        self._remove()

    def _earlier(self, now: Manifest) -> Manifest:
        found = manifest.read(self.path)
        rounding = manifest.rounding(found.surroundings, now.surroundings)
        different = list(manifest.differences(found.run, now.run, rounding=rounding))
        if different:
            raise InvalidArgument(
                f"{self.path} is the state of another run: {'; '.join(different)}. Only the same run can be resumed: type what it was "
                "begun with, choose another folder, or begin anew with --fresh, which removes that state."
            )
        return found

    def _checked(self) -> dict[str, list[str]]:
        """The keys of each segment that is as it was written; others leave the manifest and the folder."""
        found: dict[str, list[str]] = {}
        for segment in self._manifest.segments:
            path = self.path / segment.name
            try:
                if path.is_symlink() or path.stat().st_size != segment.size or sha256(path) != segment.sha256:
                    raise ValueError("it is damaged")
                opened = _opened(path)
                beside: dict[str, str] = opened.metadata() or {}
                if len(beside) != segment.entries or set(beside) != set(opened.keys()):
                    raise ValueError("it is damaged")
                self.seconds += sum(_numbers(numbers)[0] for numbers in beside.values())
                found[segment.name] = list(beside)
            except (OSError, ValueError, SafetensorError) as error:
                reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
                self._tell(f"{path}: left out, because {reason}; its {segment.entries} results are made again.")
        kept = tuple(segment for segment in self._manifest.segments if segment.name in found)
        self._manifest = replace(self._manifest, segments=kept)
        for path in inside(self.path):
            if path.name not in (LOCK, manifest.NAME, *found):
                with contextlib.suppress(OSError):
                    path.unlink()
        return found

    def _segment(self, name: str) -> Any:
        if self._open[0] != name:
            self._open = (name, _opened(self.path / name))
        return self._open[1]

    def _written(self, waiting: Mapping[str, Kept]) -> Segment:
        numbers = [segment.number for segment in self._manifest.segments]
        path = self.path / f"segment-{max(numbers, default=0) + 1:06}.safetensors"
        tensors = {key: kept.tensor for key, kept in waiting.items()}
        beside = {key: json.dumps([kept.seconds, kept.error, kept.turned]) for key, kept in waiting.items()}

        def write(part: Path) -> None:
            try:
                save_file(tensors, part, beside)
            except SafetensorError as error:  # how it says that the disk is full
                raise OSError(str(error)) from error

        replaced(path, write)
        return Segment(path.name, path.stat().st_size, sha256(path), len(waiting))

    def _remove(self) -> None:
        """The manifest first: without it nothing else counts."""
        names = (manifest.NAME, *(path.name for path in inside(self.path) if path.name != manifest.NAME))
        with contextlib.suppress(OSError):
            for name in names:
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()


def unfinished(path: Path) -> bool:
    """Whether a folder holds the state of a run.

    Args:
        path: Of the folder.

    Returns:
        False, too, where a run ended before it saved anything.
    """
    return (path / manifest.NAME).exists()


def _same(value: Any) -> Any:
    """As it will be read again."""
    return json.loads(json.dumps(plain(value)))


def _numbers(text: str) -> tuple[float, float, bool]:
    """Seconds, error and layout of a result, as they are written beside it."""
    said = json.loads(text)
    if (
        isinstance(said, list)
        and [type(value) in (int, float) for value in said] == [True, True, False]
        and type(said[2]) is bool
    ):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        seconds, error = float(said[0]), float(said[1])  # pyright: ignore[reportUnknownArgumentType]
        if math.isfinite(seconds) and seconds >= 0.0 and not math.isnan(error):
            return seconds, error, said[2]
    raise ValueError("it is damaged")


def _opened(path: Path) -> Any:
    opened: Any = safe_open(path, framework="pt")
    return opened
