"""The folder of one training run: its record, its lock, the checkpoints it resumes from, and its models."""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from filelock import FileLock, Timeout

from lightning_xai.atomic_file import as_read, put_in_place, read_json, write_json
from lightning_xai.results.progress import RUN_NAME, RUN_VERSION
from lightning_xai.results.record import settings_that_differ
from lightning_xai.training.checkpoint_file import damage

__all__ = ["RunFolder", "RunFolderError", "RunModel", "RunRecord", "run_of"]

CHECKPOINT_KEY = "run"
"""Key of a checkpoint that says which run it belongs to."""

_LENGTHS = ("max_epochs", "max_steps")
_FOREIGN = "it belongs to another run"
_CHECKPOINT = re.compile(r"step=(\d{1,18})\.ckpt")
_UNFINISHED = re.compile(r"\.{1,2}step=\d{1,18}\.ckpt\..+")
_SHOWN = 12
_MOVED = re.compile(r'"lightning_xai\.(?:tasks|callbacks)\.')  # packages of version 0.1

_Comparable = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class RunFolderError(ValueError):
    """A folder that this run cannot use; the message says why and what to do."""


class RunModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a run has trained, as a checkpoint holds it; `str` describes it in one line.

    Attributes:
        path: the checkpoint.
        choice: "best" by the monitored metric, the "last" state, or a "file" that was named.
        step: optimizer steps that it has been trained for; None: unknown.
        monitor: of the best one, the metric.
        score: of the best one, the metric's value.
        run: id of the run; None: of a file that names none.
        finished: whether the run's training had come to its end.
    """

    path: str
    choice: Literal["best", "last", "file"]
    step: int | None = None
    monitor: str | None = None
    score: float | None = None
    run: str | None = None
    finished: bool = True

    def __str__(self) -> str:
        score = "" if self.score is None else f"{self.score:.4f}, "
        step = "" if self.step is None else f" ({score}after step {self.step})"
        kind = {"best": f"the run's best by {self.monitor}", "last": "the run's last state", "file": "the given file"}
        return f"{self.path}, {kind[self.choice]}{step}" + ("" if self.finished else "; the run is not finished")


class RunRecord(msgspec.Struct, frozen=True):
    """The content of `run.json`.

    Attributes:
        id: of the run, drawn at its first start; its checkpoints carry it.
        settings: all that decides the run's numbers, as nested plain values; empty if unknown.
        finished: whether training has come to its end.
        version: of this format.
        changes: what has changed on the way, a sentence for each: another number of processes.
        best: the best model, known when training has come to its end; None: no callback keeps one.
        loggers: ids by which loggers know the run, see `logger_ids`.
        longer: how training was extended, as "from step=00000024.ckpt on, trainer.max_epochs was 2 and is 8".
    """

    id: str
    settings: dict[str, Any]
    finished: bool
    version: int
    changes: list[str] = []
    best: RunModel | None = None
    loggers: dict[str, dict[str, str]] = {}
    longer: tuple[str, ...] = ()


class RunFolder:
    """One training run on disk.

    `run.json` is its record, `resume/step=00000120.ckpt` a checkpoint to resume from, `checkpoints/` holds those that
    checkpoint callbacks keep, `lock` and `lock.owner` say which process is using it. The newest checkpoint to resume
    from is the one of the highest step: clocks of different machines are never compared. A checkpoint that is corrupt,
    or that belongs to another run, is skipped.

    Args:
        path: the folder; it need not exist yet.
        comparable: settings of a run that was started before, and those of now -> the former, as they are compared:
            another version may know of other settings.

    Attributes:
        path: the folder.
        skipped: file name -> why `newest` did not take it.
    """

    def __init__(self, path: Path, comparable: _Comparable = lambda was, _: was) -> None:
        self.path = Path(path)
        self._comparable = comparable
        self.skipped: dict[str, str] = {}
        # The kernel holds the lock (flock), so it ends with the process, even a killed one. filelock closes it in
        # forked children: data workers that outlive a killed process do not keep it. On NFS, Linux passes it on to the
        # server (v4, or v3 with lockd), which frees it at once when the process ends, and after its lease (90 s by
        # default) when the machine does. Lustre needs the mount option `flock`; `localflock` locks on one node only,
        # and there, as on file systems without locks, you have to take care that no second job uses the folder.
        self._lock = FileLock(self.path / "lock", thread_local=False, fallback_to_soft=False)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints to resume from."""
        return self.path / "resume"

    @property
    def models(self) -> Path:
        """The folder of the checkpoints that callbacks keep, absolute, whichever logger the run has."""
        return Path(os.path.realpath(self.path)) / "checkpoints"

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
        path = self.path / RUN_NAME
        try:
            record = read_json(path, RunRecord)
            if record.version != RUN_VERSION:
                raise ValueError(f"version {record.version}, expected {RUN_VERSION}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{path} cannot be read ({error}): restore it, or choose another folder for this run"
            ) from error
        return record

    def begin(self, settings: Mapping[str, Any]) -> RunRecord:
        """Record a new run; needs the lock. Checkpoints of an earlier run in this folder are foreign from now on."""
        record = RunRecord(uuid.uuid4().hex, _plain(settings), finished=False, version=RUN_VERSION)
        self._write(record)
        return record

    def check(self, record: RunRecord, settings: Mapping[str, Any]) -> list[str]:
        """Refuse to resume with other settings than the run was started with, but for more epochs or steps.

        Returns:
            What makes the run longer, as "trainer.max_epochs was 2 and is 8".

        Raises:
            RunFolderError: it names each other setting that differs.
        """
        if not record.settings:
            return []
        now = _plain(settings)
        was = self._comparable(_plain(record.settings), now)
        longer = []
        for name in _LENGTHS:
            lengths = [each.get("trainer", {}).get(name) for each in (was, now)]
            if _more(*lengths):
                longer.append(f"trainer.{name} was {lengths[0]} and is {lengths[1]}")
                was["trainer"][name] = lengths[1]
        changes = settings_that_differ(was, now)
        if changes:
            more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
            raise RunFolderError(
                f"{self.path} holds a run that was started with other settings: {'; '.join(changes[:_SHOWN])}{more}. "
                "Use the previous ones to resume it, or start a new run with --run=ANOTHER_FOLDER"
            )
        return longer

    def extend(self, record: RunRecord, settings: Mapping[str, Any], start: str) -> RunRecord:
        """Record that a run trains for longer, from a checkpoint on, where `settings` say so; needs the lock."""
        longer = self.check(record, settings)
        if not longer:
            return record
        text = f"from {start} on, {', '.join(longer)}"
        more = {"settings": _plain(settings), "finished": False, "best": None, "longer": (*record.longer, text)}
        extended = msgspec.structs.replace(record, **more)
        self._write(extended)
        return extended

    def note_loggers(self, record: RunRecord, ids: Mapping[str, Mapping[str, str]]) -> RunRecord:
        """Keep the ids by which loggers know the run, so that they go on when it does; needs the lock."""
        # Those of loggers that this start does without are kept, too.
        known = record.loggers | {key: dict(value) for key, value in ids.items()}
        changed = msgspec.structs.replace(record, loggers=known)
        if changed != record:
            self._write(changed)
        return changed

    def finish(self, record: RunRecord) -> None:
        """Record that training has come to its end, and which model is its best."""
        best, newest = None, self.newest(record)
        if newest is not None:
            with suppress(RunFolderError):  # its file is gone, which is reported when it is asked for
                best = self._best(_content(newest), finished=True)
        self._write(msgspec.structs.replace(record, finished=True, best=best))

    def model(self, choice: str | None = None) -> RunModel:
        """A model that the run has trained.

        Args:
            choice: "best" by the metric that the first of the run's checkpoint callbacks with one monitors, "last", the
                state after the last step, or the path of a checkpoint; None: the best, or the last one where no
                callback monitors a metric.

        Raises:
            RunFolderError: the folder holds no run, or the run no such model.
        """
        record = self.read()
        if record is None:
            raise RunFolderError(
                f"{self.path} holds no training run ({RUN_NAME} is missing), so no model of it can be taken: name "
                "the folder of one, or omit --run to take the model as the config gives it"
            )
        if choice not in (None, "best", "last"):
            return self._given(Path(str(choice)), record)
        newest = self.newest(record)
        if newest is None and choice != "last" and record.best is not None and Path(record.best.path).is_file():
            return record.best  # a finished run, whose checkpoints to resume from were deleted
        if newest is None:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.skipped.items()) or "none was written"
            raise RunFolderError(
                f"the run in {self.path} has no checkpoint that can be read ({reasons}), so there is no model of it: "
                "let it train (fit with the same --run), or name a file, --ckpt_path=FILE"
            )
        content = _content(newest)
        best = None if choice == "last" else self._best(content, record.finished)
        if best is not None:
            return best
        if choice == "best":
            raise RunFolderError(
                f"the run in {self.path} has no best model: none of its checkpoint callbacks monitors a metric, or "
                "none was measured yet. Take --ckpt_path=last, or a file of it"
            )
        step = content["global_step"]
        return RunModel(path=str(newest), choice="last", step=step, run=record.id, finished=record.finished)

    def _best(self, content: Mapping[str, Any], finished: bool) -> RunModel | None:
        """The best model as the states of checkpoint callbacks know it; `content` is that of the newest checkpoint."""
        state = _monitored(content)
        if state is None:
            return None
        path = self._here(state["best_model_path"], content)
        if "://" in str(path):
            kept: Mapping[str, Any] = {}
        elif not path.is_file() or damage(path):
            raise RunFolderError(
                f"the best model of the run in {self.path} by {state['monitor']} was {path}, which is missing or "
                "damaged: restore it, or take --ckpt_path=last, or a file"
            )
        else:
            # Written after `content` where the run was killed in between: the file speaks for itself.
            kept = _content(path)
            own = _monitored(kept)
            state = own if own and Path(own["best_model_path"]).name == path.name else state
        return RunModel(
            path=str(path),
            choice="best",
            step=kept.get("global_step"),
            monitor=state["monitor"],
            score=float(state["best_model_score"]),
            run=content[CHECKPOINT_KEY]["id"],
            finished=finished,
        )

    def _here(self, path: str, content: Mapping[str, Any]) -> Path:
        """A path that a checkpoint of this run remembers, where the run's folder is now."""
        before = content[CHECKPOINT_KEY].get("folder")
        if before and Path(path).is_relative_to(before):
            return self.path / Path(path).relative_to(before)
        return Path(path)

    def _given(self, path: Path, record: RunRecord) -> RunModel:
        if "://" in str(path):
            return RunModel(path=str(path), choice="file")
        if not path.is_file():
            there = ", ".join(sorted(str(file) for file in self.models.glob("*.ckpt"))) or "none"
            raise RunFolderError(f"--ckpt_path: there is no file {path}; best, last, and the run's files: {there}")
        if reason := damage(path):
            raise RunFolderError(f"--ckpt_path: {path} is no intact checkpoint ({reason}); give another one")
        content = _content(path)
        run = (content.get(CHECKPOINT_KEY) or {}).get("id")
        step = content.get("global_step")
        return RunModel(path=str(path), choice="file", step=step, run=run, finished=run != record.id or record.finished)

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

    def refuse_lost(self) -> None:
        """Refuse to train a finished run for longer without a checkpoint of it.

        Raises:
            RunFolderError: always.
        """
        raise RunFolderError(
            f"the run in {self.path} is finished, and no checkpoint in {self.checkpoints} can be read, so that it "
            "cannot train for longer: restore one from a backup, or start a new run with --run=ANOTHER_FOLDER"
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
        path = self.path / RUN_NAME
        try:
            write_json(path, msgspec.to_builtins(record), durable=True)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written ({error.strerror}): choose another folder") from error


def _more(was: Any, now: Any) -> bool:
    """True if the second length of a training is above the first; -1 has no end, None is not known here."""
    if not isinstance(was, int) or not isinstance(now, int) or was == -1:
        return False
    return now == -1 or now > was


def run_of(path: Path) -> RunFolder | None:
    """The run that a path names: its folder, or the config.yaml in it; None if there is none."""
    folder = path.parent if path.name == "config.yaml" else path
    return RunFolder(folder) if (folder / RUN_NAME).is_file() else None


def _content(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # on files that are no checkpoints the unpickler raises errors of any type
        reason = str(error).strip().partition("\n")[0]
        raise RunFolderError(f"{path} is no checkpoint ({type(error).__name__}: {reason}); give another one") from error
    return content


def _monitored(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The state of the first checkpoint callback that keeps models by a metric, and has one."""
    states = (content.get("callbacks") or {}).values()
    kept = (state for state in states if isinstance(state, Mapping) and state.get("monitor"))
    return next((state for state in kept if state.get("best_model_path")), None)


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"{f'job {job}, ' if job else ''}process {os.getpid()} on {socket.gethostname()}"


def _foreign(path: Path, record: RunRecord) -> str:
    """Reason why an intact file is no checkpoint of this run; empty if it is one."""
    try:
        owner = _content(path)[CHECKPOINT_KEY]["id"]
    except (RunFolderError, KeyError, TypeError) as error:
        return f"it is no checkpoint of a run ({type(error).__name__})"
    return "" if owner == record.id else _FOREIGN


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, so that what was read can be compared with what is given.

    Class paths of version 0.1 count as what they are called now.
    """
    plain: dict[str, Any] = json.loads(_MOVED.sub('"lightning_xai.training.', json.dumps(as_read(settings))))
    return plain
