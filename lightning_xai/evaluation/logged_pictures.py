"""Pictures and tables for the loggers of a run, whichever they are: how each kind of logger takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image

from lightning_xai.metrics.grounding import SPEC

if TYPE_CHECKING:
    import pandas as pd

    from lightning_xai.results.table import ResultTable

__all__ = ["HEAT_MAP", "LoggedTable", "Picture", "log_pictures", "logged_pairs"]

HEAT_MAP = "heat_map"
"""The column of a table's pictures."""
_MOST_ROWS = 10_000  # of a table; W&B shows no more, and the file has all
_MOST_LINES = 100  # of a table that is shown as text
_LIST = "pictures.csv"
_FAILED = "_warned_of_pictures"


@dataclass(frozen=True)
class Picture:
    """A picture for loggers.

    Attributes:
        name: as numbers are called, such as `val/grounding`.
        path: of its file (PNG).
    """

    name: str
    path: Path

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The picture, [H, W, 3]."""
        with Image.open(self.path) as picture:
            return np.asarray(picture.convert("RGB"))


@dataclass(frozen=True, eq=False)
class LoggedTable:
    """A table for loggers.

    Attributes:
        name: as numbers are called, such as `val/grounding_pairs`.
        path: of a file that has all of it.
        frame: numbers and texts; rows past the first 10,000 are left to the file.
        pictures: number of a row -> a picture, uint8 [H, W, 3], for the column `HEAT_MAP`.
    """

    name: str
    path: Path
    frame: pd.DataFrame
    pictures: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)

    def cells(self, picture: Callable[[int, NDArray[np.uint8]], Any]) -> pd.DataFrame:
        """The rows that are logged, None where there is no value, with pictures as `picture` makes them of a row."""
        shown = self.frame.head(_MOST_ROWS)
        shown = shown.astype(object).where(shown.notna(), None)
        if self.pictures:
            drawn = (self.pictures.get(row) for row in range(len(shown)))
            cells = [None if each is None else picture(row, each) for row, each in enumerate(drawn)]
            shown[HEAT_MAP] = np.fromiter(cells, object, len(cells))  # pandas would make numbers of some
        return shown

    def markdown(self) -> str:
        """The first rows as a table in Markdown, in which text stays text."""
        from lightning_xai.report.paper_table import Column, PaperTable

        first = self.frame.head(_MOST_LINES)
        heads = [Column(str(name), numeric=first[name].dtype.kind in "fiu") for name in first.columns]
        more = len(self.frame) - len(first)
        note = f"{more:,} more rows are in {self.path.name}." if more else ""
        return PaperTable(self.name, self.name, note, heads, first.to_numpy(dtype=object).tolist()).to_markdown()


Item = Picture | LoggedTable


def logged_pairs(
    name: str, path: Path, table: ResultTable, pictures: Mapping[tuple[str, str, str, str], NDArray[np.uint8]]
) -> LoggedTable:
    """The table of a measurement's phrases with gamma and rho; those with pictures come first.

    Args:
        name: of the table.
        path: of the file that has all of it.
        table: the long table.
        pictures: label of the method, key, caption, phrase -> its heat map, of the method's first seed.
    """
    from lightning_xai.results.table import phrase_table

    frame = phrase_table(table, SPEC.values)
    places = zip(frame["method"], frame["key"], frame["caption"], frame["phrase"], strict=True)
    # Later seeds of a method come later in the table.
    first = {place: row for row, place in reversed(list(enumerate(places))) if place in pictures}
    rows = set(first.values())
    drawn = sorted((row, place) for place, row in first.items())
    order = [row for row, _ in drawn] + [row for row in range(len(frame)) if row not in rows]
    found = {row: pictures[place] for row, (_, place) in enumerate(drawn)}
    return LoggedTable(name, path, frame.iloc[order].reset_index(drop=True), found)


def log_pictures(trainer: L.Trainer, items: Iterable[Item]) -> None:
    """Hand pictures and tables to each logger of a trainer, at the step of the numbers that it logs now.

    A logger that takes none, or fails to, is warned of once, and so is an item that cannot be made, with which the
    items of this step end; the run goes on. Only the first process hands over; no logger: no items are made.

    Args:
        trainer: of the run.
        items: what to log; a step that is logged again replaces what is there where the logger allows it.
    """
    loggers = [logger for logger in trainer.loggers if not isinstance(logger, DummyLogger)]
    if not trainer.is_global_zero or not loggers:
        return
    # The step that Lightning itself gives to the numbers of an evaluation.
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for item in _made(trainer, items):
        for logger in loggers:
            _hand_over(logger, item, step)


def _made(trainer: L.Trainer, items: Iterable[Item]) -> Iterator[Item]:
    """The items up to the first one that cannot be made, such as a picture that is drawn from a file that is gone."""
    try:
        yield from items
    except Exception as error:  # of matplotlib, pandas, a disk: of any type; the consumer's own errors do not come here
        if _is_first_failure(trainer):
            rank_zero_warn(
                f"Pictures and tables for the loggers could not be made ({_in_a_line(error)}); the run goes on, its "
                "numbers are logged and its files written. Further such failures are not warned of"
            )


def _hand_over(logger: Any, item: Item, step: int) -> None:
    try:
        _way_of(logger)(logger, item, step)
    except Exception as error:  # of a client library, a network, a disk: of any type
        _warn_once(logger, item, error)


def _warn_once(logger: Any, item: Item, error: Exception) -> None:
    if _is_first_failure(logger):
        rank_zero_warn(
            f"{type(logger).__name__} did not take {item.name} ({_in_a_line(error)}); the run goes on, look at "
            f"{item.path}. Further pictures and tables that it does not take are not warned of"
        )


def _is_first_failure(owner: Any) -> bool:
    """True once for each logger or trainer."""
    if getattr(owner, _FAILED, None) is True:
        return False
    with suppress(AttributeError):  # of a logger with slots
        setattr(owner, _FAILED, True)
    return True


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# --- how the loggers of Lightning take a picture or a table: one function for each, and its line in `_WAYS` ---


def _tensorboard(logger: Any, item: Item, step: int) -> None:
    writer, name = logger.experiment, _prefixed(logger, item)
    if isinstance(item, Picture):
        writer.add_image(name, item.pixels, step, dataformats="HWC")
    else:
        writer.add_text(name, item.markdown(), step)


def _wandb(logger: Any, item: Item, step: int) -> None:
    import wandb

    value: Any
    if isinstance(item, Picture):
        value = wandb.Image(item.pixels)
    else:
        rows = item.cells(lambda _, pixels: wandb.Image(pixels))
        value = wandb.Table(columns=list(rows.columns), data=rows.to_numpy().tolist())
    logger.log_metrics({item.name: value}, step)  # with the logger's prefix, and the step that curves are drawn over


def _mlflow(logger: Any, item: Item, step: int) -> None:
    """As artifacts whose names hold the step, so that a step that comes again replaces them."""
    client, run = logger.experiment, logger.run_id
    place = f"{_prefixed(logger, item)}/step={step:08d}"
    if isinstance(item, Picture):
        client.log_image(run, item.pixels, f"{place}.png")
        return
    for row, pixels in item.pictures.items():
        client.log_image(run, pixels, f"{place}/{row}.png")
    rows = item.cells(lambda row, _: f"{place}/{row}.png")
    client.log_text(run, rows.to_csv(index=False, lineterminator="\n"), f"{place}.csv")


def _comet(logger: Any, item: Item, step: int) -> None:
    experiment, name = logger.experiment, _prefixed(logger, item)
    if isinstance(item, Picture):
        experiment.log_image(item.pixels, name=name, step=step)
        return
    for row, pixels in item.pictures.items():
        experiment.log_image(pixels, name=f"{name}/{row}", step=step)
    rows = item.cells(lambda row, _: f"{name}/{row}")
    # Of a frame it would write the index, too, and of no value "nan".
    cells = rows.where(rows.notna(), "").to_numpy().tolist()
    experiment.log_table(f"{name}/step={step:08d}.csv", tabular_data=cells, headers=list(rows.columns))


def _litlogger(logger: Any, item: Item, step: int) -> None:
    file = import_module("litlogger").File(str(item.path))
    logger.experiment[_prefixed(logger, item)].append(file, step=step)


def _csv(logger: Any, item: Item, step: int) -> None:
    """A line in `pictures.csv` next to `metrics.csv`, whose cells are numbers: where the file is."""
    import pandas as pd

    from lightning_xai.results.table import write_csv

    folder = Path(logger.log_dir)
    table, path = folder / _LIST, item.path.absolute()
    if path.is_relative_to(folder.absolute()):
        path = path.relative_to(folder.absolute())
    line = {"step": step, "name": _prefixed(logger, item), "file": path.as_posix()}
    rows = pd.read_csv(table).to_dict("records") if table.exists() else []
    rows = [row for row in rows if (row["step"], row["name"]) != (step, line["name"])]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(table, pd.DataFrame([*rows, line]))


_WAYS: dict[str, Callable[[Any, Item, int], None]] = {
    "TensorBoardLogger": _tensorboard,
    "WandbLogger": _wandb,
    "MLFlowLogger": _mlflow,
    "CometLogger": _comet,
    "LitLogger": _litlogger,
    "CSVLogger": _csv,
}


def _way_of(logger: Any) -> Callable[[Any, Item, int], None]:
    """The way of the nearest kind that is known, or else that of any other logger."""
    return next((_WAYS[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in _WAYS), _by_common_methods)


# --- loggers of other projects: by the methods that such have, and the names of their parameters ---

_PICTURE_METHODS = ("log_image", "add_image", "log_figure", "add_figure", "log_artifact", "log_file")
_TABLE_METHODS = ("log_table", "log_artifact", "log_file", "add_text", "log_text")


def _by_common_methods(logger: Any, item: Item, step: int) -> None:
    """By the first method of the logger or its client all of whose parameters are known; else as a file by its name."""
    name = _prefixed(logger, item)
    experiment: Any = getattr(logger, "experiment", None)
    methods = _PICTURE_METHODS if isinstance(item, Picture) else _TABLE_METHODS
    for owner in (logger, experiment):
        for method in (getattr(owner, each, None) for each in methods):
            arguments = _arguments(method, _offered(item, name, step)) if callable(method) else None
            if callable(method) and arguments is not None:
                method(**{parameter: value() for parameter, value in arguments.items()})
                return
    if not hasattr(type(experiment), "__getitem__"):
        raise NotImplementedError(f"it has none of the methods {', '.join(methods)}")
    experiment[f"{name}/step={step:08d}"].upload(str(item.path))


def _arguments(method: Any, offered: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]] | None:
    """Those of the arguments offered that a method takes by name; None where it needs others, or takes no content."""
    parameters = inspect.signature(method).parameters
    empty = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {name for name, each in parameters.items() if each.default is each.empty and each.kind not in empty}
    if not needed or not needed <= offered.keys():
        return None
    return {name: offered[name] for name in parameters if name in offered}


def _offered(item: Item, name: str, step: int) -> dict[str, Callable[[], Any]]:
    """Values by the names that the parameters of loggers' methods have."""
    values: dict[str, Callable[[], Any]] = dict.fromkeys(("step", "global_step", "iteration"), lambda: step)
    values |= dict.fromkeys(("name", "key", "tag", "image_name", "figure_name", "table_name", "title"), lambda: name)
    values |= dict.fromkeys(("path", "file_path", "local_path", "local_file", "artifact"), lambda: str(item.path))
    values["artifact_path"] = lambda: f"{name}/step={step:08d}"  # a folder: files of all steps have the same name
    if isinstance(item, Picture):
        pixels = item.pixels
        values |= dict.fromkeys(("image", "image_data", "img", "img_tensor"), lambda: pixels)
        return values | {"images": lambda: [pixels], "figure": lambda: _figure(pixels), "dataformats": lambda: "HWC"}
    values |= dict.fromkeys(("dataframe", "table", "tabular_data", "data", "df"), lambda: item.cells(lambda *_: None))
    return values | dict.fromkeys(("text", "text_string", "markdown"), item.markdown)


def _figure(pixels: NDArray[np.uint8]) -> Any:
    from lightning_xai.report.sheet import picture

    return picture(pixels)


def _prefixed(logger: Any, item: Item) -> str:
    """The name with the prefix that a logger gives to its numbers."""
    prefix = getattr(logger, "_prefix", None) or ""
    return f"{prefix}{getattr(logger, 'LOGGER_JOIN_CHAR', '-')}{item.name}" if prefix else item.name
