"""The folder of one training run: its record, its lock, and the checkpoints it resumes from."""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from filelock import FileLock, Timeout

from lightning_xai.atomic_file import as_read, put_in_place, read_json, write_json
from lightning_xai.results.record import settings_that_differ
from lightning_xai.training.checkpoint_file import damage

__all__ = ["RunFolder", "RunFolderError", "RunRecord"]

RECORD_NAME = "run.json"
RECORD_VERSION = 1
CHECKPOINT_KEY = "run"
"""Key of a checkpoint that says which run it belongs to."""

_FOREIGN = "it belongs to another run"
_CHECKPOINT = re.compile(r"step=(\d{1,18})\.ckpt")
_UNFINISHED = re.compile(r"\.{1,2}step=\d{1,18}\.ckpt\..+")
_SHOWN = 12
_MOVED = re.compile(r'"lightning_xai\.(?:tasks|callbacks)\.')  # packages of version 0.1


class RunFolderError(ValueError):
    """A folder that this run cannot use; the message says why and what to do."""


class RunRecord(msgspec.Struct, frozen=True):
    """The content of `run.json`.

    Attributes:
        id: of the run, drawn at its first start; its checkpoints carry it.
        settings: all that decides the run's numbers, as nested plain values; empty if unknown.
        finished: whether training has come to its end.
        version: of this format.
        changes: what has changed on the way, a sentence for each: another number of processes.
    """

    id: str
    settings: dict[str, Any]
    finished: bool
    version: int
    changes: list[str] = []


class RunFolder:
    """One training run on disk.

    `run.json` is its record, `resume/step=00000120.ckpt` a checkpoint to resume from, `lock` and `lock.owner` say which
    process is using it. The newest checkpoint is the one of the highest step: clocks of different machines are never
    compared. A checkpoint that is corrupt, or that belongs to another run, is skipped.

    Args:
        path: the folder; it need not exist yet.

    Attributes:
        path: the folder.
        skipped: file name -> why `newest` did not take it.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.skipped: dict[str, str] = {}
        # The kernel holds the lock (flock), so it ends with the process, even a killed one. filelock closes it in
        # forked children: data workers that outlive a killed process do not keep it. On NFS, Linux passes it on to the
        # server (v4, or v3 with lockd), which frees it at once when the process ends, and after its lease (90 s by
        # default) when the machine does. Lustre needs the mount option `flock`; `localflock` locks on one node only,
        # and there, as on file systems without locks, you have to take care that no second job uses the folder.
        self._lock = FileLock(self.path / "lock", thread_local=False, fallback_to_soft=False)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "resume"

    def lock(self) -> None:
        """Keep other jobs out until this process ends, and delete what a killed one left unfinished.

        Raises:
            RunFolderError: another process uses the folder, or it cannot be written to.
        """
        if self._lock.is_locked:
            return
        owner = self.path / "lock.owner"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").open("a").close()
        except OSError as error:
            raise RunFolderError(
                f"the run's folder {self.path} cannot be written to ({error.strerror}): choose another, --run=FOLDER"
            ) from error
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            text = ""
            with suppress(OSError):
                text = owner.read_text(encoding="utf-8", errors="replace")[:500].strip()
            raise RunFolderError(
                f"the run's folder {self.path} is in use by {text or 'another process'}: wait until that ends, or "
                "choose another, --run=FOLDER"
            ) from error
        except (OSError, NotImplementedError) as error:  # file systems without locks
            warnings.warn(f"{self.path} cannot be locked ({error}): make sure that no second job uses it", stacklevel=2)
        with suppress(OSError):  # only a text for others; a full disk is reported where it matters
            owner.write_text(_this_process(), encoding="utf-8")
        for path in self.checkpoints.iterdir():
            if _UNFINISHED.fullmatch(path.name):
                path.unlink()

    def release(self) -> None:
        """Let others in."""
        self._lock.release(force=True)

    def read(self) -> RunRecord | None:
        """The run that the folder holds; None if none was ever started in it.

        Raises:
            RunFolderError: `run.json` is broken.
        """
        path = self.path / RECORD_NAME
        try:
            record = read_json(path, RunRecord)
            if record.version != RECORD_VERSION:
                raise ValueError(f"version {record.version}, expected {RECORD_VERSION}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{path} cannot be read ({error}): restore it, or choose another folder for this run"
            ) from error
        return record

    def begin(self, settings: Mapping[str, Any]) -> RunRecord:
        """Record a new run; needs the lock. Checkpoints of an earlier run in this folder are foreign from now on."""
        record = RunRecord(uuid.uuid4().hex, _plain(settings), finished=False, version=RECORD_VERSION)
        self._write(record)
        return record

    def check(self, record: RunRecord, settings: Mapping[str, Any]) -> None:
        """Refuse to resume with other settings than the run was started with.

        Raises:
            RunFolderError: it names each setting that differs.
        """
        changes = settings_that_differ(_plain(record.settings), _plain(settings)) if record.settings else []
        if changes:
            more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
            raise RunFolderError(
                f"{self.path} holds a run that was started with other settings: {'; '.join(changes[:_SHOWN])}{more}. "
                "Use the previous ones to resume it, or start a new run with --run=ANOTHER_FOLDER"
            )

    def finish(self, record: RunRecord) -> None:
        """Record that training has come to its end."""
        self._write(msgspec.structs.replace(record, finished=True))

    def note(self, record: RunRecord, change: str) -> RunRecord:
        """Record a change, once; returns the new record."""
        if change not in record.changes:
            record = msgspec.structs.replace(record, changes=[*record.changes, change])
            self._write(record)
        return record

    def newest(self, record: RunRecord) -> Path | None:
        """The intact checkpoint of the run's highest step; `skipped` says which were not taken, and why."""
        self.skipped = {}
        for path in self.files():
            reason = damage(path) or _foreign(path, record)
            if not reason:
                return path
            self.skipped[path.name] = reason
        return None

    def refuse_unreadable(self) -> None:
        """Refuse to start over where `newest` found checkpoints that may be this run's, but none that can be read.

        Raises:
            RunFolderError: there are some. The file system may recover them; a new run would make them foreign.
        """
        corrupt = [name for name, reason in self.skipped.items() if reason != _FOREIGN]
        if corrupt:
            raise RunFolderError(
                f"none of the run's checkpoints in {self.checkpoints} can be read ({', '.join(corrupt[:_SHOWN])}): try "
                "again when the file system works, restore them from a backup, or start a new run with "
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
        """Path of the checkpoint after a step."""
        return self.checkpoints / f"step={step:08d}.ckpt"

    def pending(self, step: int) -> Path:
        """Path where it waits until all that was logged up to its step is on disk, too."""
        return self.checkpoints / f".step={step:08d}.ckpt.pending"

    def commit(self, step: int, keep: int) -> None:
        """Give a pending checkpoint its name, and of those up to its step remove all but the newest `keep`.

        A run only goes forward: checkpoints of later steps are corrupt or foreign, and do not count.
        """
        put_in_place(self.pending(step), self.place(step))
        files = self.files()
        for path in files[files.index(self.place(step)) + keep :]:
            path.unlink()

    def _write(self, record: RunRecord) -> None:
        path = self.path / RECORD_NAME
        try:
            write_json(path, msgspec.to_builtins(record), durable=True)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written ({error.strerror}): choose another folder") from error


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"{f'job {job}, ' if job else ''}process {os.getpid()} on {socket.gethostname()}"


def _foreign(path: Path, record: RunRecord) -> str:
    """Reason why an intact file is no checkpoint of this run; empty if it is one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        owner = content[CHECKPOINT_KEY]["id"]
    except Exception as error:  # on files that are no checkpoints the unpickler raises errors of any type
        return f"it is no checkpoint of a run ({type(error).__name__})"
    return "" if owner == record.id else _FOREIGN


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, so that what was read can be compared with what is given.

    Class paths of version 0.1 count as what they are called now.
    """
    plain: dict[str, Any] = json.loads(_MOVED.sub('"lightning_xai.training.', json.dumps(as_read(settings))))
    return plain
