"""Explain entries by every chosen method, one after the other, and write what was found.

The command and the Python interface (`lightning_xai.explain`) both run what stands here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_xai.commands.explain_explorer import explorer_item
from lightning_xai.commands.explain_pair import ARRAYS, Explanation, PreparedEntry, explain_batch, prepare_entry, sheet
from lightning_xai.commands.inputs import Entry, InputError, load_model
from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.outputs import PAGE_OF_MANY, describe, numpy_of, write_all, write_csv, write_page
from lightning_xai.registry import PluginError
from lightning_xai.report.explorer import ExplorerItem, explorer_page

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from lightning_xai.attribution.method_options import ChosenMethod
    from lightning_xai.attribution.target_options import ChosenTarget
    from lightning_xai.models.encoder import TwoTowerEncoder

_SUMMARY = (
    "name", "image", "caption", "span", "box", "against", "method", "similarity", "completeness_error", "fault",
    "skipped",
)  # fmt: skip
_MOST_REASONS = 5
MOST_ITEMS = 200
"""Entries on the page of a list, which a browser has to hold."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every entry, whatever the model.

    Attributes:
        method: name of the attribution method; `"all"` for all that serve the model.
        options: of the method.
        target: what is explained of captions that are compared; None: contrast.
        target_options: of the target.
        batch_size: entries of a list that are explained at a time.
        of_list: whether the entries are a list, of which what cannot be used is skipped.
        at_inputs: whether a method that integrates between layers is read at the towers' inputs as well.
    """

    method: str = "feature_pair"
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    target_options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    of_list: bool = False
    at_inputs: bool = False

    def check(self, entries: Sequence[Entry] = ()) -> ChosenTarget | None:
        """Find what cannot be asked: before the model is loaded, which takes a while.

        Returns:
            What is explained of captions that are compared; None where there are none.

        Raises:
            ValueError: no such method, target or option, nothing to compare, or a method without what is asked of it.
        """
        from lightning_xai.attribution.method_options import check_at_inputs, check_method
        from lightning_xai.attribution.target_options import check_serves, choose_target

        if self.batch_size < 1:
            raise ValueError(f"--batch-size has to be at least 1; got {self.batch_size}")
        check_method(self.method)
        if self.at_inputs:
            check_at_inputs(self.method, self.options)
        for entry in () if self.of_list else entries:
            if entry.span is not None and entry.box is not None:
                raise ValueError("--span asks about words, --box about a part of the image: give one of them")
            if entry.span is not None and entry.against:
                raise ValueError(
                    "--span asks about a phrase within its caption, --against about whole captions: give one of them"
                )
            for option in ("span", "box"):
                check_method(self.method, pairwise=None if getattr(entry, option) is None else f"--{option}")
        if self.of_list and any(entry.span or entry.box for entry in entries):
            check_method(self.method, pairwise="a list with spans or boxes")
        if not any(entry.against for entry in entries):
            if self.target is not None or self.target_options:
                raise ValueError("--target is of captions that are compared: give --against TEXT")
            return None
        target = choose_target(self.target or "contrast", self.target_options)
        check_serves(self.method, target)
        return target


@dataclass(frozen=True)
class Explained:
    """An entry, its explanations by the methods, and why methods have none of it.

    Attributes:
        prepared: the entry as the model sees it.
        explanations: one of each method, or of each pair of layers that it is read at.
        failed: the label of a method -> why it cannot explain this entry.
        missing: methods that do not serve the model, and why.
        settings: what every record says of command and model.
    """

    prepared: PreparedEntry
    explanations: list[Explanation] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def about(self, span: str | None = None, box: str | None = None) -> Explained:
        """The same explanations asked about another phrase or box, or about neither; no method runs again.

        Raises:
            InputError: the caption lacks the phrase, or the box is of no use.
            ValueError: the method has no token-patch attributions.
        """
        from lightning_xai.attribution.method_options import check_method

        for each in self.explanations:
            for option, given in (("--span", span), ("--box", box)):
                check_method(each.chosen.name, pairwise=None if given is None else option)
        encoder = self.explanations[0].chosen.method.encoder
        prepared = prepare_entry(encoder, replace(self.prepared.entry, span=span, box=box), self.prepared)
        return replace(self, prepared=prepared, explanations=[each.about(prepared) for each in self.explanations])

    def picture(self) -> Figure:
        """Draw the explanations."""
        return sheet(self.prepared, self.explanations, self.missing | self.failed)

    def arrays(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Every array by its name in the file, and what each of them is."""
        prepared = self.prepared
        several = len(self.explanations) + len(self.missing | self.failed) > 1
        arrays: dict[str, Any] = {"tokens": numpy_of(prepared.tokens)}
        if prepared.geometry is not None:
            arrays["geometry"] = np.array([*prepared.geometry.scale, *prepared.geometry.offset])
        if prepared.positions:
            arrays["span_mask"] = np.isin(np.arange(len(prepared.tokens)), prepared.positions)
        if prepared.against:
            arrays["against_tokens"] = np.stack([numpy_of(each.tokens) for each in prepared.against])
        described = {key: ARRAYS[key] for key in arrays}
        for each in self.explanations:
            prefix, at = (
                f"{each.label}/" if several else "",
                f", at {each.saliency.where}" if each.saliency.where else "",
            )
            arrays |= {prefix + key: values for key, values in each.arrays.items()}
            described |= {prefix + key: ARRAYS[key] + at for key in each.arrays}
        return arrays, described

    def record(self) -> dict[str, Any]:
        """Every setting, and what the arrays are."""
        methods = {each.label: each.record for each in self.explanations}
        found = {"methods": methods, "not_served": self.missing | self.failed, "arrays": self.arrays()[1]}
        return {**self.settings, **self.prepared.record, **found}

    def write(self, folder: Path) -> str:
        """Write arrays, record, picture and explorer; returns the line that says so."""
        item = self.item()
        page = explorer_page([item], title=f"{item.key}: {self.prepared.entry.caption}")
        return write_all(folder, self.arrays()[0], self.record(), self.picture(), page)

    def item(self, *, small: bool = False) -> ExplorerItem:
        """The entry as the explorer shows it; `small` reduces the photo, for a page of many."""
        return explorer_item(self.prepared, self.explanations, small=small)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the summary of a list: one for each method."""
        entry = self.prepared.entry.row()
        rows = [entry | {"method": name, "skipped": reason} for name, reason in self.failed.items()]
        for each in self.explanations:
            faults = [f"{name}: {fault}" for name, fault in each.record["fault"].items() if fault is not None]
            row = entry | {"method": each.label, "fault": "; ".join(faults)}
            rows.append(row | {name: each.record[name] for name in ("similarity", "completeness_error")})
        return rows


@dataclass(frozen=True)
class Skipped:
    """An entry of a list that cannot be used, and why."""

    entry: Entry
    reason: str

    def rows(self) -> list[dict[str, Any]]:
        """The row of the summary of a list."""
        return [self.entry.row() | {"skipped": self.reason}]


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
        encoder: the model.
        chosen: the methods.
        missing: methods that do not serve the model, and why.
        settings: what every record says of command and model.
        target: what is explained of entries with captions to compare with.
        batch_size: entries of a list that are explained at a time.
    """

    encoder: TwoTowerEncoder
    chosen: list[ChosenMethod]
    missing: dict[str, str]
    settings: dict[str, Any]
    target: ChosenTarget | None = None
    batch_size: int = 8

    @classmethod
    def of(
        cls,
        model: ModelChoice | TwoTowerEncoder,
        asked: Asked,
        entries: Sequence[Entry],
        command: Mapping[str, Any],
    ) -> Explainer:
        """Load the model, unless it is loaded, and build the methods that are asked for.

        Args:
            model: the model.
            asked: of every entry.
            entries: what will be explained.
            command: settings, as the record has them.

        Raises:
            ValueError: what was asked cannot be answered, or the model cannot be loaded.
        """
        from lightning_xai.attribution.base import unsupported_target
        from lightning_xai.attribution.method_options import at_layers, choose_methods

        target = asked.check(entries)
        encoder = load_model(model) if isinstance(model, ModelChoice) else model
        encoder = encoder.reading(entries[0].image)
        chosen, missing = choose_methods(encoder, asked.method, asked.options)
        if target is not None:
            missing |= {
                each.name: str(unsupported_target(each.name, target.kind))
                for each in chosen
                if not each.method.serves(target.kind)
            }
            chosen = [each for each in chosen if each.name not in missing]
        settings = describe(command, model if isinstance(model, ModelChoice) else None, encoder)
        readings = [reading for each in chosen for reading in at_layers(each, asked.options, at_inputs=asked.at_inputs)]
        return cls(encoder, readings, missing, settings, target, asked.batch_size)

    def explain_one(self, entry: Entry, advance: Callable[[str, int], None] = lambda label, count: None) -> Explained:
        """Explain a single entry.

        Args:
            entry: the entry.
            advance: called with a method's name and 0 when it starts, and the number of entries when it is done.

        Raises:
            InputError: it cannot be used.
            ValueError: no method can explain it.
        """
        (explained,) = self._explain([prepare_entry(self.encoder, entry)], advance)
        if not explained.explanations:
            raise ValueError("; ".join(explained.failed.values()))
        return explained

    def explain_each(
        self, entries: Sequence[Entry], advance: Callable[[str, int], None] = lambda label, count: None
    ) -> Iterator[Explained | Skipped]:
        """Explain a list, in its order; what cannot be used comes back with the reason.

        Args:
            entries: the list.
            advance: as for `explain_one`.
        """
        from lightning_xai.attribution import ConstantMapWarning

        for start in range(0, len(entries), self.batch_size):
            batch = entries[start : start + self.batch_size]
            with warnings.catch_warnings():
                # It would name places in a batch; the summary names images.
                warnings.simplefilter("ignore", ConstantMapWarning)
                found = self._explain_batch(batch, advance)
            yield from found

    def _explain_batch(
        self, entries: Sequence[Entry], advance: Callable[[str, int], None]
    ) -> list[Explained | Skipped]:
        skipped: dict[int, str] = {}
        batch = []
        for place, entry in enumerate(entries):
            try:
                batch.append(prepare_entry(self.encoder, entry))
            except InputError as error:  # noqa: PERF203 - decoding an image takes far longer
                skipped[place] = str(error)
                advance("", len(self.chosen))
        explained = iter(self._explain(batch, advance))
        return [
            Skipped(entry, skipped[place]) if place in skipped else next(explained)
            for place, entry in enumerate(entries)
        ]

    def _explain(self, batch: Sequence[PreparedEntry], advance: Callable[[str, int], None]) -> list[Explained]:
        """Explanations by every method of each entry; what one entry does to a method is no loss of the others."""
        found = [Explained(prepared, missing=self.missing, settings=self.settings) for prepared in batch]
        for chosen in self.chosen if batch else ():
            advance(chosen.label, 0)
            for each, given in zip(found, _explained_by(chosen, batch, self.target), strict=True):
                if isinstance(given, Explanation):
                    each.explanations.append(given)
                else:
                    each.failed[chosen.label] = str(given)
            advance(chosen.label, len(batch))
        return found


class ListWriter:
    """Write the explanations of a list as they come, each in its own folder, then `summary.csv` and a page of all.

    Args:
        out: folder to write to.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._rows: list[dict[str, Any]] = []
        self._cropped: set[Path] = set()
        self._items: list[ExplorerItem] = []
        self._entries = 0

    def add(self, found: Explained | Skipped) -> None:
        """Write one entry, unless it was skipped, and keep its rows of the summary."""
        self._entries += 1
        self._rows += found.rows()
        if isinstance(found, Explained):
            entry = found.prepared.entry
            self._cropped.update({entry.image} if found.prepared.hidden else ())
            if found.explanations:
                found.write(self.out / entry.name)
                if len(self._items) < MOST_ITEMS:
                    self._items.append(found.item(small=True))

    def close(self) -> str:
        """Write the summary and the page; returns the lines that say what was saved and what was skipped.

        Raises:
            ValueError: not one entry can be used.
        """
        rows = self._rows
        write_csv(self.out / "summary.csv", rows, _SUMMARY)
        saved, skipped = usable(rows, self._entries)
        lines = [f"Saved explanations of {saved} of {self._entries} entries in {self.out}", *skipped]
        if self._cropped:
            lines.append(
                f"The model's crop hides more than a fifth of {len(self._cropped)} photos; --fit letterbox shows all"
            )
        faulty = sum(bool(row.get("fault")) for row in rows)
        if faulty:
            lines.append(f"Constant maps in {faulty} rows of the summary, see its column fault")
        title = f"{len(self._items)} images"
        write_page(self.out / PAGE_OF_MANY, explorer_page(self._items, title=title, mode="strip"))
        if len(self._items) < saved:
            lines.append(f"{PAGE_OF_MANY} shows the first {len(self._items)} of them")
        return "\n".join([*lines, f"Saved {self.out / 'summary.csv'} and the explorer {PAGE_OF_MANY}"])


def usable(rows: Sequence[Mapping[str, Any]], entries: int) -> tuple[int, list[str]]:
    """Count what can be used of a list.

    Args:
        rows: of the summary.
        entries: length of the list.

    Returns:
        The entries with an explanation, and lines that say what was skipped and why; no line where nothing was.

    Raises:
        ValueError: not one entry can be used.
    """
    of_method = {True: ", {method}", False: ""}  # what was skipped: one method's explanation, or the entry
    reasons = [
        f"  {row['name']}{of_method['method' in row].format(**row)}: {row['skipped']}"
        for row in rows
        if "skipped" in row
    ]
    skipped = len(reasons)
    if skipped > _MOST_REASONS:
        reasons[_MOST_REASONS:] = [f"  and {skipped - _MOST_REASONS} more"]
    found = len({row["name"] for row in rows if "skipped" not in row})
    if not found:
        raise ValueError("\n".join([f"none of the {entries} entries can be used:", *reasons]))
    return found, [f"Skipped {skipped}:", *reasons] if skipped else []
