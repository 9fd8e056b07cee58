"""Explain one entry after the other by every chosen method, and count the entries that cannot be used."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import Progress

from lightning_xai.commands.explain_explorer import explorer_item
from lightning_xai.commands.explain_pair import ARRAYS, Explanation, PreparedEntry, explain_batch, prepare_entry, sheet
from lightning_xai.commands.inputs import Entry, InputError
from lightning_xai.commands.outputs import PAGE_OF_MANY, numpy_of, progress_bar, write_all, write_csv, write_page
from lightning_xai.registry import PluginError
from lightning_xai.report.explorer import ExplorerItem, explorer_page

if TYPE_CHECKING:
    from lightning_xai.attribution.method_options import ChosenMethod
    from lightning_xai.attribution.target_options import ChosenTarget
    from lightning_xai.models.encoder import TwoTowerEncoder

_SUMMARY = (
    "name", "image", "caption", "span", "box", "against", "method", "similarity", "completeness_error", "fault",
    "skipped",
)  # fmt: skip
_MOST_REASONS = 5
_MOST_ITEMS = 200  # of the page of a list, which a browser has to hold


@dataclass(frozen=True)
class _Explained:
    """An entry's explanations, and why methods have none of it."""

    explanations: list[Explanation] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def _explained_by(
    chosen: ChosenMethod, batch: Sequence[PreparedEntry], target: ChosenTarget | None
) -> list[Explanation | ValueError]:
    """What a method says of each entry of a batch, or why it cannot: then one by one, to find which it is."""
    try:
        return list(explain_batch(chosen, batch, target))
    except PluginError:
        raise
    except ValueError as error:
        if len(batch) == 1:
            return [error]
        return [given for entry in batch for given in _explained_by(chosen, [entry], target)]


@dataclass(frozen=True)
class Explainer:
    """A model and the methods that explain it.

    Attributes:
        out: folder to write to.
        encoder: the model.
        chosen: the methods.
        missing: methods that do not serve the model, and why.
        settings: what every record says of command and model.
        target: what is explained of entries with captions to compare with.
        cropped: photos of a list of which the model's crop hides more than a fifth.
        items: entries of a list, as its page shows them.
    """

    out: Path
    encoder: TwoTowerEncoder
    chosen: list[ChosenMethod]
    missing: dict[str, str]
    settings: dict[str, Any]
    target: ChosenTarget | None = None
    cropped: set[Path] = field(default_factory=set)
    items: list[ExplorerItem] = field(default_factory=list)

    def explain_one(self, entry: Entry) -> None:
        """Explain a single entry, straight into the folder.

        Raises:
            InputError: it cannot be used.
            ValueError: no method can explain it.
        """
        prepared = prepare_entry(self.encoder, entry)
        with progress_bar() as bar:
            bar.add_task("explaining", total=len(self.chosen))
            (explained,) = self._explain([prepared], bar)
        if not explained.explanations:
            raise ValueError("; ".join(explained.failed.values()))
        for name, reason in explained.failed.items():
            print(f"Skipped {name}: {reason}")  # noqa: T201
        item = explorer_item(prepared, explained.explanations)
        page = explorer_page([item], title=f"{item.key}: {entry.caption}")
        said = self._write(self.out, prepared, explained, page)
        print("\n".join(filter(None, [said, prepared.hidden])))  # noqa: T201

    def explain_list(self, entries: Sequence[Entry], batch_size: int) -> None:
        """Explain a list, each entry in its own folder, and write `summary.csv` and a page of all.

        Raises:
            ValueError: not one entry can be used.
        """
        from lightning_xai.attribution import ConstantMapWarning

        rows: list[dict[str, Any]] = []
        self.cropped.clear()
        self.items.clear()
        with progress_bar() as bar, warnings.catch_warnings():
            # It would name places in a batch; the summary names images.
            warnings.simplefilter("ignore", ConstantMapWarning)
            bar.add_task("explaining", total=len(entries) * len(self.chosen))
            for start in range(0, len(entries), batch_size):
                rows += self._explain_batch(entries[start : start + batch_size], bar)
        write_csv(self.out / "summary.csv", rows, _SUMMARY)
        of_method = {True: ", {method}", False: ""}  # what was skipped: one method's explanation, or the entry
        reasons = [
            f"  {row['name']}{of_method['method' in row].format(**row)}: {row['skipped']}"
            for row in rows
            if "skipped" in row
        ]
        skipped = len(reasons)
        if skipped > _MOST_REASONS:
            reasons[_MOST_REASONS:] = [f"  and {skipped - _MOST_REASONS} more"]
        saved = len({row["name"] for row in rows if "skipped" not in row})
        if not saved:
            raise ValueError("\n".join([f"none of the {len(entries)} entries can be used:", *reasons]))
        lines = [f"Saved explanations of {saved} of {len(entries)} entries in {self.out}"]
        if skipped:
            lines += [f"Skipped {skipped}:", *reasons]
        if self.cropped:
            lines.append(
                f"The model's crop hides more than a fifth of {len(self.cropped)} photos; --fit letterbox shows all"
            )
        faulty = sum(bool(row.get("fault")) for row in rows)
        if faulty:
            lines.append(f"Constant maps in {faulty} rows of the summary, see its column fault")
        title = f"{len(self.items)} images"
        write_page(self.out / PAGE_OF_MANY, explorer_page(self.items, title=title, mode="strip"))
        if len(self.items) < saved:
            lines.append(f"{PAGE_OF_MANY} shows the first {len(self.items)} of them")
        print("\n".join([*lines, f"Saved {self.out / 'summary.csv'} and the explorer {PAGE_OF_MANY}"]))  # noqa: T201

    def _explain_batch(self, entries: Sequence[Entry], bar: Progress) -> list[dict[str, Any]]:
        """Rows of the summary: one for each method of an entry, or one that says why it was skipped."""
        rows: list[dict[str, Any]] = []
        batch = []
        for entry in entries:
            try:
                batch.append(prepare_entry(self.encoder, entry))
                self.cropped.update({entry.image} if batch[-1].hidden else ())
            except InputError as error:  # noqa: PERF203 - decoding an image takes far longer
                rows.append(entry.row() | {"skipped": str(error)})
                bar.advance(bar.task_ids[0], len(self.chosen))
        for prepared, explained in zip(batch, self._explain(batch, bar), strict=True):
            if explained.explanations:
                self._write(self.out / prepared.entry.name, prepared, explained)
                if len(self.items) < _MOST_ITEMS:
                    self.items.append(explorer_item(prepared, explained.explanations, small=True))
            rows += [
                prepared.entry.row() | {"method": name, "skipped": reason} for name, reason in explained.failed.items()
            ]
            for each in explained.explanations:
                faults = [f"{name}: {fault}" for name, fault in each.record["fault"].items() if fault is not None]
                row = prepared.entry.row() | {"method": each.label, "fault": "; ".join(faults)}
                rows.append(row | {name: each.record[name] for name in ("similarity", "completeness_error")})
        return sorted(rows, key=lambda row: str(row["name"]))

    def _explain(self, batch: Sequence[PreparedEntry], bar: Progress) -> list[_Explained]:
        """Explanations by every method of each entry; what one entry does to a method is no loss of the others."""
        found = [_Explained() for _ in batch]
        for chosen in self.chosen if batch else ():
            bar.update(bar.task_ids[0], description=chosen.label)
            for each, given in zip(found, _explained_by(chosen, batch, self.target), strict=True):
                if isinstance(given, Explanation):
                    each.explanations.append(given)
                else:
                    each.failed[chosen.label] = str(given)
            bar.advance(bar.task_ids[0], len(batch))
        return found

    def _write(self, folder: Path, prepared: PreparedEntry, explained: _Explained, page: str | None = None) -> str:
        """Write arrays, record, picture and page of an entry, and say so."""
        explanations, missing = explained.explanations, self.missing | explained.failed
        several = len(explanations) + len(missing) > 1
        arrays = {"tokens": numpy_of(prepared.tokens)}
        if prepared.geometry is not None:
            arrays["geometry"] = np.array([*prepared.geometry.scale, *prepared.geometry.offset])
        if prepared.positions:
            arrays["span_mask"] = np.isin(np.arange(len(prepared.tokens)), prepared.positions)
        described = {key: ARRAYS[key] for key in arrays}
        for each in explanations:
            prefix, at = (
                f"{each.label}/" if several else "",
                f", at {each.saliency.where}" if each.saliency.where else "",
            )
            arrays |= {prefix + key: values for key, values in each.arrays.items()}
            described |= {prefix + key: ARRAYS[key] + at for key in each.arrays}
        methods = {each.label: each.record for each in explanations}
        if prepared.against:
            arrays["against_tokens"] = np.stack([numpy_of(each.tokens) for each in prepared.against])
            described["against_tokens"] = ARRAYS["against_tokens"]
        record = {"methods": methods, "not_served": missing, "arrays": described}
        picture = sheet(prepared, explanations, missing)
        return write_all(folder, arrays, {**self.settings, **prepared.record, **record}, picture, page)
