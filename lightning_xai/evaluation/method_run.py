"""The rows of one method: from a batch or from the cache on disk, and those of all processes as one table.

The cache is there so that a run that is killed continues where it was. Every process writes its own file, a line for
each item, and reads the files of all on opening: the next run may have another number of processes. A line that was cut
off counts as not written.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import msgspec
import torch.distributed as dist

from lightning_xai.atomic_file import write_json
from lightning_xai.attribution import METHODS
from lightning_xai.attribution.method_options import ChosenMethod
from lightning_xai.evaluation.examples import Place, choose_examples, example_of
from lightning_xai.evaluation.rows import maps_of
from lightning_xai.metrics.registry import ChosenMetric
from lightning_xai.results.examples import ExampleRecord
from lightning_xai.results.record import Score, settings_that_differ

if TYPE_CHECKING:
    from lightning_xai.results.table import ResultTable

__all__ = ["CacheError", "MethodRun", "ResultCache", "from_first", "gather_to_first", "join_rows"]

_FORMAT = 3  # of what the cache holds for an item
_SETTINGS = "settings.json"
_T = TypeVar("_T")


class CacheError(ValueError):
    """A folder holds results of other settings; the message names them, and says what to do."""


class _Item(msgspec.Struct):
    index: int
    record: dict[str, Any]


class ResultCache(dict[int, dict[str, Any]]):
    """Records by the number of their item, to read; new ones are `put`.

    Args:
        folder: of this cache alone; created if needed.
        settings: all that the records depend on, as plain values.

    Attributes:
        damaged: lines that could not be read, and whose items are computed again.

    Raises:
        CacheError: the folder's records were made with other settings, or nothing says with which.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: TextIO | None = None
        self.damaged = 0
        paths = sorted(folder.glob("*.jsonl"))
        # NaN, which equals nothing, as text.
        self._check(json.loads(json.dumps(settings, default=str), parse_constant=str), empty=not paths)
        for path in paths:
            self._load(path)

    def put(self, records: Mapping[int, Mapping[str, Any]]) -> None:
        """Keep records of plain values, and hand them to the operating system: they then outlive the process."""
        # This run goes on with what a later one would read, lists for tuples included.
        lines = [json.dumps({"index": index, "record": record}, ensure_ascii=True) for index, record in records.items()]
        if self._file is None:
            self._file = (self._folder / f"{uuid.uuid4().hex}.jsonl").open("w", encoding="ascii")
        self._file.writelines(f"{line}\n" for line in lines)
        self._file.flush()
        for line in lines:
            self._take(line)

    def close(self) -> None:
        """Write what is left."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _check(self, settings: dict[str, Any], *, empty: bool) -> None:
        path = self._folder / _SETTINGS
        if empty and not path.is_file():
            write_json(path, settings)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(f"{path}: cannot be read ({error}); delete {self._folder} to compute it again") from error
        changed = settings_that_differ(found if isinstance(found, dict) else {}, settings)
        if changed:
            raise CacheError(
                f"{self._folder} holds results of other settings: {'; '.join(changed)}. Choose another folder, or "
                "delete this one to compute all of it again"
            )

    def _load(self, path: Path) -> None:
        with path.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                try:
                    self._take(line)
                # One cut-off line must not lose the others.
                except (ValueError, RecursionError):  # noqa: PERF203
                    self.damaged += 1

    def _take(self, line: str) -> None:
        # Not msgspec's own reader: captions may hold lone surrogates, which it refuses.
        item = msgspec.convert(json.loads(line), _Item)
        self[item.index] = item.record


class MethodRun:
    """One method of an evaluation, and the rows that it makes, which are kept on disk.

    Args:
        label: of the method.
        chosen: the method and its options.
        metrics: what to measure; those that need a sign or interactions are skipped for methods without, those that
            need a referee for the referee.
        folder: of the evaluation.
        settings: what else the rows depend on, but for the method, the metrics and their options.
        shown: how many examples to keep; see `choose_examples`. None: none at all.
        batch_size: inputs that pass through a tower at a time; changes no number.
        referee: whose maps the method's are compared with; None for the referee, or without one.

    Attributes:
        seed: of the method; 0 for one that draws no random numbers.
        metrics: what is measured, by name.
        targets: target -> row of the table of targets; of this process.
        values: rows of the table of values of this process.
        examples: what this process may show of its part.

    Raises:
        CacheError: the folder holds rows of other settings.
    """

    def __init__(
        self,
        label: str,
        chosen: ChosenMethod,
        metrics: Mapping[str, ChosenMetric],
        folder: Path,
        settings: Mapping[str, Any],
        shown: tuple[int, int, int] | None,
        batch_size: int,
        referee: MethodRun | None = None,
    ) -> None:
        self.label = label
        self.chosen = chosen
        self.seed = int(chosen.options["seed"]) if chosen.method.stochastic else 0
        self.metrics = {
            name: metric
            for name, metric in metrics.items()
            if metric.spec.serves(signed=chosen.method.signed, pairwise=chosen.method.pairwise)
            and (referee is not None or not metric.spec.needs_referee)
        }
        compared = any(metric.spec.needs_referee for metric in self.metrics.values())
        self.referee = referee if compared else None
        self.targets: dict[str, dict[str, Any]] = {}
        self.values: list[tuple[str, int, str, str, float, str]] = []
        self.shown = shown if "grounding" in self.metrics else None
        self.examples: dict[Place, ExampleRecord] = {}
        self.maps = maps_of(chosen.method, batch_size)
        measured = {name: metric.options for name, metric in self.metrics.items()}
        self.cache = ResultCache(
            folder / "rows" / f"{label},seed={self.seed}",
            {
                **settings,
                "format": _FORMAT,
                "metrics": measured,
                **_identity(chosen),
                **({} if self.referee is None else {"referee": _identity(self.referee.chosen)}),
                # Another version of a plug-in may compute something else.
                "packages": sorted({METHODS.origin(chosen.name), *(each.origin for each in self.metrics.values())}),
            },
        )

    def collect(self, indices: Sequence[int]) -> None:
        """Add the rows of some items, which are in the cache."""
        candidates = list(self.examples.items())
        for index in indices:
            record = self.cache[index]
            found: dict[tuple[str, str], float] = {}
            for name, metric, number, excluded in record["values"]:
                value = math.nan if number is None else number
                self.values.append((self.label, self.seed, name, metric, value, excluded))
                found[name, metric] = value
            targets = {target["target"]: target for target in record["targets"]}
            self.targets |= targets
            candidates += [
                example_of(targets[name], found[name, "gamma"], found[name, "rho"] == 1, heat)
                for name, heat in record["heats"].items()
            ]
        if self.shown is not None:
            self.examples = choose_examples(candidates, *self.shown)


def _identity(chosen: ChosenMethod) -> dict[str, Any]:
    """What a method's numbers depend on."""
    # How many at a time changes no number.
    options = {key: value for key, value in chosen.options.items() if key != "internal_batch_size"}
    return {"method": chosen.name, "options": options}


def join_rows(
    values: Sequence[Sequence[Any]], targets: Sequence[Mapping[str, Any]], scores: Iterable[Score]
) -> tuple[dict[tuple[str, int, str], tuple[float, int]], ResultTable | None]:
    """Join the rows of all processes on the first one, and sum them up for all. Every process has to call this.

    Args:
        values: rows of the table of values of this process.
        targets: rows of the table of targets.
        scores: how to sum the values up.

    Returns:
        (method, seed, score) -> the score and the number of values, on all processes; and the long table, on the first.

    Raises:
        RuntimeError: (elsewhere) the first process failed; there, its own error.
    """
    parts = gather_to_first((values, targets))
    tables: list[ResultTable] = []

    def summed_up() -> dict[tuple[str, int, str], tuple[float, int]]:
        # Not before: pandas takes a while to import, and other ranks do not need it.
        from lightning_xai.results.table import ResultTable, score_table

        table = ResultTable.of((row for rows, _ in parts for row in rows), (row for _, rows in parts for row in rows))
        tables.append(table)
        lines = score_table(table.values, scores).itertuples(index=False, name=None)
        return {(method, seed, score): (value, count) for method, seed, score, value, count in lines}

    return from_first(summed_up), next(iter(tables), None)


def gather_to_first(part: _T) -> list[_T]:
    """Return what every process gives, by rank, on the first; elsewhere nothing. Every process has to call this."""
    if not _several():
        return [part]
    first = dist.get_rank() == 0
    gathered: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(part, gathered, dst=0)
    return gathered or []


def from_first(compute: Callable[[], _T]) -> _T:
    """Compute something small on the first process alone, for all. Every process has to call this.

    Raises:
        RuntimeError: (elsewhere) the first process failed; there, its own error.
    """
    if not _several():
        return compute()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = compute()
        except Exception as error:
            # The others would otherwise wait until the process group times out.
            dist.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0)
            raise
    dist.broadcast_object_list(answer, src=0)
    value, failure = answer
    if failure is not None:
        raise RuntimeError(f"the first process failed with {failure}")
    result: _T = value
    return result


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
