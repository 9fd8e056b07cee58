"""The folder of one training run: which run it is, who is using it, and the checkpoints it goes on from."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from lightning_xai.training.checkpoint_file import damage, put_in_place

__all__ = ["RunFolder", "RunFolderError", "RunRecord"]

RECORD_NAME = "run.json"
RECORD_VERSION = 1
CHECKPOINT_KEY = "run"
"""Where a checkpoint says which run it belongs to."""

_ANOTHER_RUN = "it belongs to another run"
_CHECKPOINT = re.compile(r"step=(\d{1,18})\.ckpt")
_LEFT_BEHIND = re.compile(r"\.{1,2}step=\d{1,18}\.ckpt\..+")
_SHOWN = 12


class RunFolderError(ValueError):
    """A folder that this run cannot use; the message says why and what to do."""


@dataclass(frozen=True)
class RunRecord:
    """What `run.json` says.

    Attributes:
        id: of the run, made up when it first started; its checkpoints carry it.
        settings: all that decides the run's numbers, as nested plain values; empty where nobody knows them.
        finished: whether training has come to its end.
    """

    id: str
    settings: Mapping[str, Any]
    finished: bool = False


class RunFolder:
    """One training run on disk.

    `run.json` tells which run it is, `resume/step=00000120.ckpt` where it can go on from, `lock` who is using it. The
    newest checkpoint is the one of the highest step: clocks of different machines are never compared. A checkpoint
    that is damaged, or that belongs to another run, is passed over.

    Args:
        path: the folder; it need not be there yet.

    Attributes:
        path: the folder.
        passed_over: file name -> why `newest` did not take it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.passed_over: dict[str, str] = {}
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "resume"

    def lock(self) -> None:
        """Keep other jobs out until this process ends, in whatever way; clear away what a killed one left half done.

        Raises:
            RunFolderError: another process uses the folder, or it cannot be written to.
        """
        if self._lock is not None:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(
                f"the run's folder {self.path} cannot be written to ({error.strerror}): choose another, --run=FOLDER"
            ) from error
        _take(file, self.path)
        self._lock = file
        file.seek(0)
        file.truncate()
        with suppress(OSError):  # only a text for others; a full disk is told where it matters
            file.write(_this_process())
            file.flush()
        for path in self.checkpoints.iterdir():
            if _LEFT_BEHIND.fullmatch(path.name):
                path.unlink()

    def release(self) -> None:
        """Let others in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read(self) -> RunRecord | None:
        """Which run the folder holds; None if none was ever started in it.

        Raises:
            RunFolderError: `run.json` is broken.
        """
        path = self.path / RECORD_NAME
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["version"] != RECORD_VERSION:
                raise ValueError(f"version {record['version']!r}, expected {RECORD_VERSION}")
            known = RunRecord(record["id"], record["settings"], record["finished"])
            if not (
                isinstance(known.id, str) and isinstance(known.settings, dict) and isinstance(known.finished, bool)
            ):
                raise TypeError("a field of the wrong type")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunFolderError(
                f"{path} cannot be read ({error!r}): restore it, or choose another folder for this run"
            ) from error
        return known

    def begin(self, settings: Mapping[str, Any]) -> RunRecord:
        """Write down a new run; hold the lock. Checkpoints of a run that was here before are strangers from now on."""
        record = RunRecord(uuid.uuid4().hex, settings)
        self._write(record)
        return record

    def check(self, record: RunRecord, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than the run was started with.

        Raises:
            RunFolderError: it names each setting that differs.
        """
        changes = list(_changes(record.settings, settings)) if record.settings else []
        if changes:
            more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
            raise RunFolderError(
                f"{self.path} holds a run that was started with other settings: {'; '.join(changes[:_SHOWN])}{more}. "
                "Give it the former ones to go on with it, or begin a new run with --run=ANOTHER_FOLDER"
            )

    def finish(self, record: RunRecord) -> None:
        """Note that training has come to its end."""
        self._write(RunRecord(record.id, record.settings, finished=True))

    def newest(self, record: RunRecord) -> Path | None:
        """The checkpoint of the run's highest step that is whole; `passed_over` tells which were not taken, and why."""
        self.passed_over = {}
        for path in self.files():
            reason = damage(path) or _stranger(path, record)
            if not reason:
                return path
            self.passed_over[path.name] = reason
        return None

    def refuse_unreadable(self) -> None:
        """Refuse to begin anew where `newest` found checkpoints that may be this run's, but none that can be read.

        Raises:
            RunFolderError: there are some. A file system may give them back; a new run would make strangers of them.
        """
        broken = [name for name, reason in self.passed_over.items() if reason != _ANOTHER_RUN]
        if broken:
            raise RunFolderError(
                f"none of the run's checkpoints in {self.checkpoints} can be read ({', '.join(broken[:_SHOWN])}): try "
                "again when the file system is well, put copies in their place, or begin anew with "
                "--run=ANOTHER_FOLDER"
            )

    def files(self) -> list[Path]:
        """All files with a checkpoint's name, that of the highest step first."""
        if not self.checkpoints.is_dir():
            return []
        found = {path: _CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.iterdir() if path.is_file()}
        steps = {path: int(match.group(1)) for path, match in found.items() if match}
        return sorted(steps, key=lambda path: steps[path], reverse=True)

    def place(self, step: int) -> Path:
        """Where the checkpoint behind a step belongs."""
        return self.checkpoints / f"step={step:08d}.ckpt"

    def pending(self, step: int) -> Path:
        """Where it waits until all that was logged up to its step is on disk, too."""
        return self.checkpoints / f".step={step:08d}.ckpt.pending"

    def commit(self, step: int, keep: int) -> None:
        """Give a pending checkpoint its name, and of those up to its step remove all but the newest `keep`.

        A run only goes forward: what lies beyond its step is damaged or of another run, and does not count.
        """
        put_in_place(self.pending(step), self.place(step))
        files = self.files()
        for path in files[files.index(self.place(step)) + keep :]:
            path.unlink()

    def _write(self, record: RunRecord) -> None:
        path = self.path / RECORD_NAME
        partial = self.path / f".{RECORD_NAME}.partial-{uuid.uuid4().hex[:8]}"
        content = {
            "version": RECORD_VERSION, "id": record.id, "finished": record.finished, "settings": record.settings,
        }  # fmt: skip
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
                file.flush()
                os.fsync(file.fileno())
            put_in_place(partial, path)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written ({error.strerror}): choose another folder") from error


def _take(file: IO[str], folder: Path) -> None:
    """Lock a file for this process, or say who has it."""
    if sys.platform == "win32":
        warnings.warn(f"{folder} is not locked on this system: start no second run in it", stacklevel=3)
        return
    import fcntl

    try:
        # Not flock: the locks that it gives would live on in the data loader's workers after this process is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read(500).strip() or "another process"
        file.close()
        raise RunFolderError(
            f"the run's folder {folder} is in use by {owner}: wait until that ends, or choose another, --run=FOLDER"
        ) from error
    except OSError as error:  # file systems without locks
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): make sure that no second job uses it", stacklevel=3
        )


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"{f'job {job}, ' if job else ''}process {os.getpid()} on {socket.gethostname()}"


def _stranger(path: Path, record: RunRecord) -> str:
    """Why a whole file is no checkpoint of this run; empty where it is one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        owner = content[CHECKPOINT_KEY]["id"]
    except Exception as error:  # the unpickler raises what it likes; whatever it is, this is no checkpoint of ours
        return f"it is no checkpoint of a run ({type(error).__name__})"
    return "" if owner == record.id else _ANOTHER_RUN


def _changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Each setting that differs, as text."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from _changes(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif _plain(before) != _plain(now):
        yield f"{name} was {before}, is {now}"


def _plain(value: Any) -> Any:
    """A value as JSON gives it back, so that what was read compares with what is given."""
    return json.loads(json.dumps(value, default=str))
