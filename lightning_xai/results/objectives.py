"""What an objective is worth: trials of `objectives`, and how each variant's scores differ from the base's.

A trial is one training, by one variant (a list of objectives) with one seed, and the judgement of the trained model.
Each finished trial is one file, so that any number of jobs can share the work and none is done twice. A variant is
compared with the base by the same methods on the same targets, after trainings that start from the same weights and see
the same batches where their seeds are the same. Nothing here needs torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from lightning_xai.atomic_file import as_read, read_json, write_json
from lightning_xai.results.effect_size import EffectSize, standardised_mean_difference
from lightning_xai.results.record import ResultRecord, Score, settings_that_differ, standard_error
from lightning_xai.results.runs import Estimate
from lightning_xai.results.stochastic_order import StochasticOrder, almost_stochastic_order
from lightning_xai.results.table import ResultTable, read_result, score_table

__all__ = [
    "LEAST_SEEDS",
    "Change",
    "ObjectiveTrial",
    "TrainedModel",
    "Variant",
    "changes_from",
    "join_seeds",
    "logged_score",
    "plan_objective_trials",
    "read_trained_model",
    "tidy_scores",
]

LEAST_SEEDS = 5
"""Trainings of each side from which on the order of scores over seeds can be significant at the default level."""
VERSION = 1


class ObjectiveTrial(msgspec.Struct, frozen=True):
    """One training and its judgement.

    Attributes:
        variant: the name of a list of objectives.
        seed: of the initial weights, where they are random, and of the order of the batches.
    """

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant}/{self.seed}"

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.variant}--{self.seed}"

    def path(self, folder: Path) -> Path:
        """Its file in the output folder, which exists as soon as the trial is done."""
        return folder / "trials" / f"{self.name}.json"

    def checkpoint(self, folder: Path) -> Path:
        """The trained model."""
        return folder / "models" / f"{self.name}.ckpt"

    def validated(self, folder: Path) -> Path:
        """The folder of what callbacks write in the validation."""
        return folder / "validated" / self.name

    def judged(self, folder: Path) -> Path:
        """The result folder of the judgement."""
        return folder / "judged" / self.name


class TrainedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A finished trial: settings, logged numbers and time; its scores are in its result folder.

    Attributes:
        trial: the trial.
        recipe: all settings that its numbers depend on.
        logged: what the validation after training logged, by name: recall, caption choice, ...; None stands for NaN.
        trained_on: judging methods and logged numbers that the variant's objectives ask about themselves.
        seconds: duration of `training` and of `judging`.
        version: of this format.
    """

    trial: ObjectiveTrial
    recipe: dict[str, Any]
    logged: dict[str, float | None]
    trained_on: tuple[str, ...] = ()
    seconds: dict[str, float] = {}
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write the trial's file, all or nothing."""
        write_json(self.trial.path(folder), msgspec.to_builtins(self, enc_hook=str))


def plan_objective_trials(variants: Sequence[str], seeds: Sequence[int]) -> list[ObjectiveTrial]:
    """All trials in their order, which gives them their numbers: every variant with the first seed comes first.

    >>> print(*plan_objective_trials(["base", "gamma"], [0, 1]))
    base/0 gamma/0 base/1 gamma/1
    """
    return [ObjectiveTrial(variant, seed) for seed in seeds for variant in variants]


def read_trained_model(
    folder: Path, trial: ObjectiveTrial, recipe: Mapping[str, Any] | None = None
) -> TrainedModel | None:
    """The file of a trial; None if it has not been run to its end.

    Args:
        folder: the output folder.
        trial: the trial.
        recipe: the settings that it has to have been run with; None: any.

    Raises:
        ValueError: its file is broken or of another version, or it was run with other settings.
    """
    path = trial.path(folder)
    if not path.is_file():
        return None
    try:
        found = read_json(path, TrainedModel)
        if found.version != VERSION or found.trial != trial:
            raise ValueError(f"version {found.version} of the trial {found.trial}, expected {VERSION} of {trial}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no result of this trial ({error}); delete it and run the trial again") from error
    if recipe is not None:
        was, now = (as_read(msgspec.to_builtins(one, enc_hook=str)) for one in (found.recipe, recipe))
        if changes := settings_that_differ(was, now):
            raise ValueError(
                f"{path} was made with other settings: {'; '.join(changes)}. Use another --out folder, restore the "
                "previous settings, or delete the file to run the trial again"
            )
    return found


@dataclass(frozen=True, eq=False)
class Variant:
    """The results of a variant over its seeds.

    Attributes:
        name: of the variant.
        record: description of the results; the method labels are the judging methods.
        table: the long table, whose `seed` is that of the training.
        logged: name -> the numbers that the validations logged, by seed.
        trained_on: judging methods and logged numbers that its objectives ask about themselves.
    """

    name: str
    record: ResultRecord
    table: ResultTable
    logged: Mapping[str, Mapping[int, float]]
    trained_on: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of its trainings."""
        return tuple(sorted({int(seed) for seed in self.table.values["seed"]}))


def join_seeds(folder: Path, done: Sequence[TrainedModel], settings: Mapping[str, Any]) -> Variant:
    """Join the judgements of one variant's trials in one long table, with the seed of the training as the seed.

    Args:
        folder: the output folder.
        done: finished trials of the variant, at least one.
        settings: of the variant, for the record.

    Raises:
        ResultError: a result folder is missing or broken.
        ValueError: trials were judged by other methods, or on other data.
    """
    found = [(each, *read_result(each.trial.judged(folder))) for each in done]
    first, record, _ = found[0]
    for each, other, _ in found[1:]:
        judge = ((one.data.get("fingerprint"), list(one.methods), list(one.metrics)) for one in (record, other))
        if len({repr(one) for one in judge}) > 1:
            raise ValueError(
                f"{first.trial} and {each.trial} were judged by other methods or on other data; delete "
                f"{each.trial.path(folder)} and its result folder to judge it again"
            )
    values = pd.concat([table.values.assign(seed=each.trial.seed) for each, _, table in found])
    targets = pd.concat([table.targets for _, _, table in found]).drop_duplicates("target")
    seeds = tuple(each.trial.seed for each in done)
    names = dict.fromkeys(name for each in done for name in each.logged)
    logged = {
        name: {each.trial.seed: float(value) for each in done if (value := each.logged.get(name)) is not None}
        for name in names
    }
    joined = msgspec.structs.replace(
        record,
        model={key: value for key, value in record.model.items() if key != "fingerprint"}
        | {"name": first.trial.variant},
        settings={**settings, "judge": record.settings, "trained_on": list(first.trained_on)},
        methods={label: msgspec.structs.replace(each, seeds=seeds) for label, each in record.methods.items()},
        logged={name: statistics.fmean(own.values()) if own else None for name, own in logged.items()},
        speed={},
    )
    table = ResultTable.of(values.itertuples(index=False, name=None), targets.to_dict("records"))
    return Variant(first.trial.variant, joined, table, logged, first.trained_on)


@dataclass(frozen=True)
class Change:
    """One score of a variant and of the base.

    Attributes:
        variant: name of the variant.
        method: label of the judging method; empty for what the validation logged of the model itself.
        score: description of the score.
        trained: whether the variant was trained on it, so that it says little of what was learned.
        base: scores of the base, one for each seed that both have, by ascending seed.
        own: scores of the variant, likewise.
        over: what the order and the effect are about: "5 seeds", or "128 values of 1 seed".
        effect: standardised mean difference, positive where the variant's numbers are larger; None where there are not
            two numbers on each side.
        above: whether the variant is better in almost stochastic order; None likewise.
        below: whether the base is.
    """

    variant: str
    method: str
    score: Score
    trained: bool
    base: tuple[float, ...]
    own: tuple[float, ...]
    over: str
    effect: EffectSize | None = None
    above: StochasticOrder | None = None
    below: StochasticOrder | None = None

    @property
    def difference(self) -> float:
        """The variant's mean score minus the base's."""
        return statistics.fmean(self.own) - statistics.fmean(self.base)

    @property
    def gain(self) -> float:
        """The difference, positive where the variant is the better one."""
        return -self.difference if self.score.better == "down" else self.difference

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the order is significant, else `undecided`; empty where nothing was tested."""
        if self.above is None or self.below is None:
            return ""
        return "better" if self.above.dominates else "worse" if self.below.dominates else "undecided"

    def estimates(self) -> tuple[Estimate, Estimate]:
        """Mean and standard error over seeds of the base, and of the variant."""
        base, own = (Estimate(statistics.fmean(x), standard_error(x), len(x)) for x in (self.base, self.own))
        return base, own


def changes_from(
    base: Variant, other: Variant, scores: Sequence[Score], logged: Sequence[str], **test: Any
) -> Iterator[Change]:
    """Compare a variant with the base by every judging method and score, and by what the validations logged.

    With at least `LEAST_SEEDS` seeds on each side, the almost stochastic order is that of the scores over seeds, as
    Dror, Shlomov and Reichart (2019) compare models: a training is the unit that an objective is judged by, and the
    values of one model are not independent of each other. With fewer seeds no such test can be significant; then the
    order is that of the single values (gammas of phrases, ...), all seeds together. It says something of these models
    on these data, but not of another training. Effect sizes follow the same units.

    Args:
        base: the variant to compare with.
        other: the variant.
        scores: those with a better direction are compared.
        logged: names of logged numbers.
        test: options of `almost_stochastic_order`.
    """
    summed = [_by_seed(each, scores) for each in (base, other)]
    for score in scores:
        for method in base.record.methods:
            sides = [part.get((method, score.name), {}) for part in summed]
            values = [_values(each, method, score) for each in (base, other)]
            yield from _change(other, method, score, method in other.trained_on, sides, values, test)
    for name in logged:
        sides = [dict(each.logged.get(name, {})) for each in (base, other)]
        yield from _change(other, "", logged_score(name), name in other.trained_on, sides, [], test)


def logged_score(name: str) -> Score:
    """Description of a number that a validation logged: losses are better where they are lower, others are shares.

    >>> logged_score("val/text_to_image_recall_at_5").heading, logged_score("val/loss").better
    ('text to image recall at 5', 'down')
    """
    loss = name.endswith("loss")
    heading = name.partition("/")[2].replace("_", " ") or name
    return Score(name=name, value=name, heading=heading, better="down" if loss else "up", percent=not loss)


def tidy_scores(variants: Sequence[Variant], scores: Sequence[Score]) -> pd.DataFrame:
    """Every score of every trial: the columns variant, seed, method, score, value and count."""
    parts = []
    for each in variants:
        table = score_table(each.table.values, scores).assign(variant=each.name)
        rows = [
            (each.name, seed, "", name, value, 1) for name, own in each.logged.items() for seed, value in own.items()
        ]
        columns = ["variant", "seed", "method", "score", "value", "count"]
        parts += [table[columns], pd.DataFrame(rows, columns=columns)]
    return pd.concat([part for part in parts if len(part)], ignore_index=True)


def _by_seed(variant: Variant, scores: Sequence[Score]) -> dict[tuple[str, str], dict[int, float]]:
    """(method, score) -> seed -> score, of what was measured."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for method, seed, score, value, count in score_table(variant.table.values, scores).itertuples(index=False):
        if count:
            found.setdefault((method, score), {})[int(seed)] = float(value)
    return found


def _values(variant: Variant, method: str, score: Score) -> list[float]:
    """The single values that a score sums up, of all seeds."""
    rows = variant.table.values
    own = rows[(rows["method"] == method) & (rows["metric"] == score.value) & (rows["excluded"] == "")]
    return [float(value) for value in own["value"]]


def _change(
    variant: Variant,
    method: str,
    score: Score,
    trained: bool,
    sides: Sequence[Mapping[int, float]],
    values: Sequence[Sequence[float]],
    test: Mapping[str, Any],
) -> Iterator[Change]:
    """The change of one score; nothing where a side has none."""
    seeds_of_both = sorted(sides[0].keys() & sides[1].keys())  # else means of other trainings would be compared
    base, own = (tuple(side[seed] for seed in seeds_of_both) for side in sides)
    if not base or not own or score.better is None or not np.isfinite([*base, *own]).all():
        return
    fewest = min(len(base), len(own))
    seeds = f"{fewest} seed{'s' if fewest > 1 else ''}"
    # A sample of numbers of which larger ones are better.
    if fewest >= LEAST_SEEDS:
        tested, over, sign = (base, own), seeds, -1.0 if score.better == "down" else 1.0
    else:
        fallback = values or ((), ())
        tested, over = (tuple(fallback[0]), tuple(fallback[1])), f"{len(fallback[1])} values of {seeds}"
        lower = score.better == "down" if score.reduce != "share_below" else score.better == "up"
        sign = -1.0 if lower else 1.0
    if min(map(len, tested)) < 2:
        yield Change(variant.name, method, score, trained, base, own, seeds)
        return
    effect = standardised_mean_difference(tested[1], tested[0])
    before, after = (sign * np.asarray(sample) for sample in tested)
    above, below = (almost_stochastic_order(*pair, **test) for pair in ((after, before), (before, after)))
    yield Change(variant.name, method, score, trained, base, own, over, effect, above, below)
