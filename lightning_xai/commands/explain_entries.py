"""One entry after the other: images and captions through every chosen method, with what cannot be used counted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_xai.commands.explain_pair import Answer, Question, answer, ask, faults, write
from lightning_xai.commands.inputs import Entry, InputError
from lightning_xai.report.tables import per_pair_csv

if TYPE_CHECKING:
    from lightning_xai.attribution.method_options import ChosenMethod
    from lightning_xai.models.encoder import TwoTowerEncoder

_SUMMARY = (
    "name", "image", "caption", "span", "box", "method", "similarity", "completeness_error", "fault", "left_out",
)  # fmt: skip
_MOST_REASONS = 5

Row = dict[str, Any]


@dataclass(frozen=True)
class Session:
    """A model and the methods that explain it.

    Attributes:
        out: folder to write to.
        encoder: the model.
        chosen: the methods.
        missing: methods that do not serve the model, and why.
        settings: what every record says of command and model.
    """

    out: Path
    encoder: TwoTowerEncoder
    chosen: list[ChosenMethod]
    missing: dict[str, str]
    settings: dict[str, Any]

    def explain_one(self, entry: Entry) -> None:
        """Explain a single entry, straight into the folder.

        Raises:
            InputError: it cannot be used.
        """
        question = ask(self.encoder, entry)
        with _progress_bar(len(self.chosen)) as progress:
            (answers,) = self._answers([question], progress)
        picture = write(self.out, self.encoder, question, answers, self.missing, self.settings)
        print(f"Look at {picture}; all numbers: {self.out / 'attribution.npz'}")  # noqa: T201

    def explain_list(self, entries: Sequence[Entry], batch_size: int) -> None:
        """Explain a list, each entry into a folder of its own, and write `summary.csv`.

        Raises:
            ValueError: not one entry can be used.
        """
        from lightning_xai.attribution import ConstantMapWarning

        rows: list[Row] = []
        with _progress_bar(len(entries) * len(self.chosen)) as progress, warnings.catch_warnings():
            # It would name places in a batch; the summary names images.
            warnings.simplefilter("ignore", ConstantMapWarning)
            for start in range(0, len(entries), batch_size):
                rows += self._explain_batch(entries[start : start + batch_size], progress)
        per_pair_csv(self.out / "summary.csv", rows, _SUMMARY)
        left_out = {row["name"]: row["left_out"] for row in rows if "left_out" in row}
        reasons = [f"  {name}: {reason}" for name, reason in left_out.items()]
        if len(reasons) > _MOST_REASONS:
            reasons[_MOST_REASONS:] = [f"  and {len(reasons) - _MOST_REASONS} more"]
        if len(left_out) == len(entries):
            raise ValueError("\n".join([f"none of the {len(entries)} entries can be used:", *reasons]))
        print(f"Explained {len(entries) - len(left_out)} of {len(entries)} entries in {self.out}")  # noqa: T201
        if left_out:
            print("\n".join(["Left out:", *reasons]))  # noqa: T201
        faulty = sum(bool(row.get("fault")) for row in rows)
        if faulty:
            print(f"Maps that tell no part from another: {faulty} rows, see the column fault")  # noqa: T201
        print(f"All of them: {self.out / 'summary.csv'}")  # noqa: T201

    def _explain_batch(self, entries: Sequence[Entry], progress: Progress) -> list[Row]:
        """Rows of the summary: one for each method of an entry, or one that says why it was left out."""
        rows: list[Row] = []
        questions = []
        for entry in entries:
            try:
                questions.append(ask(self.encoder, entry))
            except InputError as error:  # noqa: PERF203 - decoding an image takes far longer
                rows.append(_columns(entry) | {"left_out": str(error)})
                progress.advance(progress.task_ids[0], len(self.chosen))
        for question, answers in zip(questions, self._answers(questions, progress), strict=True):
            folder = self.out / question.entry.name
            write(folder, self.encoder, question, answers, self.missing, self.settings)
            rows += [
                _columns(question.entry) | _scores(each) | {"fault": self._fault(question, each)} for each in answers
            ]
        return sorted(rows, key=lambda row: str(row["name"]))

    def _fault(self, question: Question, given: Answer) -> str:
        found = faults(self.encoder, question, given)
        return "; ".join(f"{name}: {fault}" for name, fault in found.items() if fault is not None)

    def _answers(self, questions: Sequence[Question], progress: Progress) -> list[list[Answer]]:
        """The answers of every method to each question."""
        answers: list[list[Answer]] = [[] for _ in questions]
        for chosen in self.chosen if questions else ():
            progress.update(progress.task_ids[0], description=chosen.name)
            for own, given in zip(answers, answer(chosen, questions), strict=True):
                own.append(given)
            progress.advance(progress.task_ids[0], len(questions))
        return answers


def _columns(entry: Entry) -> Row:
    return {
        "name": entry.name,
        "image": str(entry.image),
        "caption": entry.caption,
        "span": entry.span,
        "box": entry.box,
    }


def _scores(given: Answer) -> Row:
    error = given.arrays.get("completeness_error")
    similarity = float(given.arrays["similarity"])
    return {
        "method": given.name,
        "similarity": similarity,
        "completeness_error": None if error is None else float(error),
    }


def _progress_bar(total: int) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    progress.add_task("explaining", total=total)
    return progress
