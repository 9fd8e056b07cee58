"""Explain one entry after the other by every chosen method, and count the entries that cannot be used."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, TaskID

from lightning_xai.commands.explain_pair import ARRAYS, Explanation, PreparedEntry, explain_batch, prepare_entry, sheet
from lightning_xai.commands.inputs import Entry, InputError
from lightning_xai.commands.outputs import progress_bar, write_all, write_csv

if TYPE_CHECKING:
    from lightning_xai.attribution.method_options import ChosenMethod
    from lightning_xai.models.encoder import TwoTowerEncoder

_SUMMARY = (
    "name", "image", "caption", "span", "box", "method", "similarity", "completeness_error", "fault", "skipped",
)  # fmt: skip
_MOST_REASONS = 5


@dataclass(frozen=True)
class Explainer:
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
        prepared = prepare_entry(self.encoder, entry)
        with progress_bar() as bar:
            (explanations,) = self._explain([prepared], bar, bar.add_task("explaining", total=len(self.chosen)))
        print(self._write(self.out, prepared, explanations))  # noqa: T201

    def explain_list(self, entries: Sequence[Entry], batch_size: int) -> None:
        """Explain a list, each entry in its own folder, and write `summary.csv`.

        Raises:
            ValueError: not one entry can be used.
        """
        from lightning_xai.attribution import ConstantMapWarning

        rows: list[dict[str, Any]] = []
        with progress_bar() as bar, warnings.catch_warnings():
            # It would name places in a batch; the summary names images.
            warnings.simplefilter("ignore", ConstantMapWarning)
            task = bar.add_task("explaining", total=len(entries) * len(self.chosen))
            for start in range(0, len(entries), batch_size):
                rows += self._explain_batch(entries[start : start + batch_size], bar, task)
        write_csv(self.out / "summary.csv", rows, _SUMMARY)
        reasons = [f"  {row['name']}: {row['skipped']}" for row in rows if "skipped" in row]
        skipped = len(reasons)
        if skipped > _MOST_REASONS:
            reasons[_MOST_REASONS:] = [f"  and {skipped - _MOST_REASONS} more"]
        if skipped == len(entries):
            raise ValueError("\n".join([f"none of the {len(entries)} entries can be used:", *reasons]))
        lines = [f"Saved explanations of {len(entries) - skipped} of {len(entries)} entries in {self.out}"]
        if skipped:
            lines += [f"Skipped {skipped}:", *reasons]
        faulty = sum(bool(row.get("fault")) for row in rows)
        if faulty:
            lines.append(f"Constant maps in {faulty} rows of the summary, see its column fault")
        print("\n".join([*lines, f"Saved {self.out / 'summary.csv'}"]))  # noqa: T201

    def _explain_batch(self, entries: Sequence[Entry], bar: Progress, task: TaskID) -> list[dict[str, Any]]:
        """Rows of the summary: one for each method of an entry, or one that says why it was skipped."""
        rows: list[dict[str, Any]] = []
        batch = []
        for entry in entries:
            try:
                batch.append(prepare_entry(self.encoder, entry))
            except InputError as error:  # noqa: PERF203 - decoding an image takes far longer
                rows.append(asdict(entry) | {"skipped": str(error)})
                bar.advance(task, len(self.chosen))
        for prepared, explanations in zip(batch, self._explain(batch, bar, task), strict=True):
            self._write(self.out / prepared.entry.name, prepared, explanations)
            rows += [asdict(prepared.entry) | _scores(each) for each in explanations]
        return sorted(rows, key=lambda row: str(row["name"]))

    def _explain(self, batch: Sequence[PreparedEntry], bar: Progress, task: TaskID) -> list[list[Explanation]]:
        """Explanations by every method of each entry."""
        explanations: list[list[Explanation]] = [[] for _ in batch]
        for chosen in self.chosen if batch else ():
            bar.update(task, description=chosen.name)
            for each, given in zip(explanations, explain_batch(chosen, batch), strict=True):
                each.append(given)
            bar.advance(task, len(batch))
        return explanations

    def _write(self, folder: Path, prepared: PreparedEntry, explanations: Sequence[Explanation]) -> str:
        """Write arrays, record and picture of an entry, and say so."""
        several = len(explanations) + len(self.missing) > 1
        arrays = prepared.arrays
        for each in explanations:
            prefix = f"{each.saliency.method}/" if several else ""
            arrays |= {prefix + key: values for key, values in each.arrays.items()}
        methods = {each.saliency.method: each.record for each in explanations}
        record = {"methods": methods, "not_served": self.missing, "arrays": ARRAYS}
        picture = sheet(self.encoder, prepared, explanations, self.missing)
        return write_all(folder, arrays, {**self.settings, **prepared.record, **record}, picture)


def _scores(explanation: Explanation) -> dict[str, Any]:
    record = explanation.record
    return {
        "method": explanation.saliency.method,
        "similarity": record["similarity"],
        "completeness_error": record["completeness_error"],
        "fault": "; ".join(f"{name}: {fault}" for name, fault in record["fault"].items() if fault is not None),
    }
