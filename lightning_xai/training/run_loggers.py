"""Loggers of a run: where their files go, and how they go on when the run does."""

from __future__ import annotations

import csv
import inspect
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_xai.atomic_file import replaced_at_once

__all__ = [
    "continue_loggers",
    "drop_idle_options",
    "has_own_folder",
    "keep_rows",
    "log_measured",
    "logger_ids",
    "outlast",
    "placed_loggers",
    "restore_versions",
]

# Argument by which a logger goes on with what an earlier one has begun.
_CONTINUES = {"WandbLogger": "id", "MLFlowLogger": "run_id", "CometLogger": "experiment_key", "LitLogger": "name"}
_FOLDERS = ("save_dir", "root_dir")
_LATER = 2.0  # seconds by which a signal may reach this process after it has ended a logger's service


def has_own_folder(logger: Any) -> bool:
    """True if the logger (None: Lightning's default one; configured, or made) makes a new folder for each start."""
    if logger in (None, True):
        return True
    return issubclass(_kind(logger), (TensorBoardLogger, CSVLogger))


def placed_loggers(configured: Any, folder: Path, version: str | None) -> Any:
    """Configured loggers that write into a folder itself (version ""), or into a new folder in it (None).

    One that takes no folder, such as one that writes to a database, is left as it is.
    """
    if configured is False:
        return False
    placed = []
    for one in _each(configured):
        kind, given = _kind(one), dict(one.get("init_args") or {})
        names = inspect.signature(kind).parameters
        own: dict[str, str | None] = next(({name: str(folder)} for name in _FOLDERS if name in names), {})
        if issubclass(kind, (TensorBoardLogger, CSVLogger)):
            own |= {name: value for name, value in {"name": "", "version": version}.items() if name in names}
        elif _known(kind) == "MLFlowLogger":
            own = {} if given.get("tracking_uri") else _own_mlflow(folder)
            own |= {name: given[name] for name in own if given.get(name)}
        elif _known(kind) == "CometLogger":
            own = {"offline_directory": str(folder)}
        placed.append({**one, "init_args": {**given, **own}})
    return placed


def _own_mlflow(folder: Path) -> dict[str, str | None]:
    """MLflow's options for a store in a folder."""
    # Its default, a store of files, is refused by recent releases; its artifacts would be in the working directory.
    return {
        "tracking_uri": f"sqlite:///{(folder / 'mlflow.db').resolve()}",
        "artifact_location": (folder / "mlflow").resolve().as_uri(),
    }


def logger_ids(loggers: Iterable[Logger]) -> dict[str, dict[str, str]]:
    """Ids by which W&B, MLflow, Comet and LitLogger know the runs that these loggers have begun, by kind and number."""
    ids = {}
    for key, logger in _numbered(loggers):
        kind = _known(type(logger))
        if kind is None or logger.version is None:
            continue
        ids[key] = {_CONTINUES[kind]: str(logger.version)}
        if kind == "LitLogger":  # knows an experiment by name and version
            ids[key] = {"name": str(logger.name), "version": str(logger.version)}
    return ids


def continue_loggers(configured: Any, ids: Mapping[str, Mapping[str, str]]) -> Any:
    """Configured loggers that go on with the runs of these ids; an id that the configuration itself gives stays."""
    if configured is False or not ids:
        return configured
    continued = []
    for key, one in _numbered(_each(configured)):
        given = dict(one.get("init_args") or {})
        kind = _known(_kind(one))
        name = _CONTINUES.get(kind or "", "")
        if key in ids and given.get(name) is None and not (kind == "WandbLogger" and given.get("version")):
            given[name] = ids[key][name]
        continued.append({**one, "init_args": given})
    return continued


def restore_versions(loggers: Iterable[Logger], ids: Mapping[str, Mapping[str, str]]) -> None:
    """Give a LitLogger the version of its experiment, which its constructor does not take."""
    for key, logger in _numbered(loggers):
        known = ids.get(key, {})
        if known.get("name") == logger.name and "version" in known:
            logger._version = known["version"]  # it is asked for at the first use


def keep_rows(folder: Path, checkpoint: Path | None) -> None:
    """Keep what CSVLogger, which deletes its table at a start, had logged before, in `metrics-1.csv` and so on.

    Rows of steps after the checkpoint that the run goes on from are cut, as they come again; None: it starts over.
    """
    table = folder / "metrics.csv"
    if table.exists():
        number = next(i for i in itertools.count(1) if not (folder / f"metrics-{i}.csv").exists())
        table.rename(folder / f"metrics-{number}.csv")
    if checkpoint is None:
        return
    taken = int(checkpoint.stem.partition("=")[2])
    for path in folder.glob("metrics-*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names, rows = reader.fieldnames or (), list(reader)
        # A row's step is the last one taken, from 0; a row that a kill has cut off lacks cells.
        kept = [row for row in rows if None not in row.values() and int(row.get("step") or 0) < taken]
        if len(kept) < len(rows):
            with replaced_at_once(path) as part, part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(kept)


def outlast(loggers: Iterable[Logger], stopping: Callable[[], bool]) -> None:
    """Let a run that is `stopping` save and end in order where a logger fails; before that, an error is an error.

    `scancel` and the like signal all processes of a job, W&B's service among them, which then ends at once: what is
    logged until the run has saved does not reach it.
    """
    for logger in loggers:
        kind = type(logger)  # its own method, so that a trainer that runs twice has this once
        logger.log_metrics = partial(_log, partial(kind.log_metrics, logger), kind.__name__, stopping)  # type: ignore[method-assign]


def _log(
    log_metrics: Callable[..., None],
    name: str,
    stopping: Callable[[], bool],
    metrics: Mapping[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    try:
        log_metrics(metrics, *args, **kwargs)
    except Exception as error:
        deadline = time.monotonic() + _LATER
        while not stopping() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not stopping():
            raise
        rank_zero_warn(f"{name} was ended before the run ({type(error).__name__}) and lacks the last rows")


def log_measured(loggers: Iterable[Logger], names: Collection[str] | None = None) -> None:
    """Keep numbers that are NaN from loggers: nothing was measured, such as the mean gamma of no phrase.

    Args:
        loggers: of a run; they may be given again, with other names.
        names: what is kept from them, as it is logged. None: all but losses, whose names have the word.
    """
    for logger in loggers:
        log_metrics, kept = logger.log_metrics, names
        if isinstance(log_metrics, partial) and log_metrics.func is _log_measured:
            log_metrics, others = log_metrics.args
            kept = None if kept is None or others is None else {*kept, *others}
        logger.log_metrics = partial(_log_measured, log_metrics, kept)  # type: ignore[method-assign]


def _log_measured(
    log_metrics: Callable[..., None],
    names: Collection[str] | None,
    metrics: Mapping[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    def is_kept(name: str) -> bool:
        return "loss" not in name if names is None else name in names

    log_metrics(
        {name: value for name, value in metrics.items() if not (is_kept(name) and _is_nan(value))}, *args, **kwargs
    )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def drop_idle_options(loggers: Iterable[Logger]) -> None:
    """Keep Lightning from giving W&B an option that is not set, and that W&B warns of since it no longer has it."""
    for logger in loggers:
        options = getattr(logger, "_wandb_init", None)
        if isinstance(options, dict) and options.get("anonymous") is None:
            options.pop("anonymous", None)


def _each(configured: Any) -> list[dict[str, Any]]:
    """Configurations as plain dictionaries, Lightning's default logger spelled out."""
    listed = configured if isinstance(configured, list) else [configured]
    default = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {}}
    return [
        default if one in (None, True) else one.as_dict() if hasattr(one, "as_dict") else dict(one) for one in listed
    ]


def _numbered(loggers: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Loggers with a key of kind and number: a run may have two of a kind."""
    seen: Counter[str] = Counter()
    for logger in loggers:
        kind = _known(_kind(logger)) or "other"
        seen[kind] += 1
        yield f"{kind} {seen[kind]}", logger


def _known(kind: type[Any]) -> str | None:
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in _CONTINUES), None)


def _kind(logger: Any) -> type[Any]:
    """The class of a logger, configured (a dictionary, or a parser's namespace) or made."""
    configured = isinstance(logger, Mapping) or hasattr(logger, "class_path")
    # That of a dry run has any attribute; not all loggers are Lightning's `Logger`s.
    if isinstance(logger, Logger) or not configured:
        return type(logger)
    module, _, name = logger["class_path"].rpartition(".")
    kind: type[Any] = getattr(import_module(module), name)
    return kind
