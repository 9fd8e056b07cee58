"""Heat maps: fixed examples by method and by run, the picture that a training drew, and failures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from lightning_xai.report.gallery import Gallery
from lightning_xai.report.page import Block, Folded, HeatMaps, Note
from lightning_xai.report.sheet import picture
from lightning_xai.results.runs import Run, by_method_and_data

_MOST_METHODS = 12  # side by side
_MOST_FAILURES = 12


def heat_map_blocks(runs: Sequence[Run], gallery: Gallery) -> list[Block]:
    """All pictures, and how many examples could not be drawn."""
    blocks: list[Block] = []
    for run in runs:
        blocks += [*_fixed(gallery, run), *_training_picture(run), *_failures(gallery, run)]
    blocks += _fixed_of_runs(gallery, runs)
    if gallery.faults:
        where, why = next(iter(gallery.faults.items()))
        text = f"{len(gallery.faults)} of the examples cannot be drawn, the first of them {where}: {why}."
        blocks.append(Note(text, missing=True))
    return blocks


def _fixed(gallery: Gallery, run: Run) -> Iterator[Block]:
    why = {label: {each for record in records for each in record.why} for label, records in run.examples.items()}
    labels = [label for label, reasons in why.items() if "fixed" in reasons][:_MOST_METHODS]
    columns = {run.record.shown(label): (run.name, label) for label in labels}
    found = gallery.side_by_side(columns, "fixed", f"{run.name}: fixed examples")
    if found is not None:
        note = "The first phrases of the split, whatever the model. Maps without a sign go from their lowest value."
        alt = f"Heat maps of {len(found.items)} phrases by {', '.join(columns)}."
        yield HeatMaps(
            f"fixed-{run.name}", f"Heat maps of {run.name} by method", note, alt, found.figure, items=found.items
        )


def _fixed_of_runs(gallery: Gallery, runs: Sequence[Run]) -> Iterator[Block]:
    """The same examples in several runs, by the method that ranks classes."""
    shown = [run.shown for run in runs if run.examples and run.shown is not None]
    for first, *others in by_method_and_data(shown):
        columns = {each.name: (each.run, each.label) for each in (first, *others)}
        found = gallery.side_by_side(columns, "fixed", "The same phrases in each run") if others else None
        if found is not None:
            title = f"The same phrases in each run ({first.shown_label} on {first.data})"
            alt = f"Heat maps of {len(found.items)} phrases in {', '.join(columns)}."
            yield HeatMaps(
                f"fixed-runs-{first.data}",
                title,
                "The first phrases of the split.",
                alt,
                found.figure,
                items=found.items,
            )


def _failures(gallery: Gallery, run: Run) -> Iterator[Block]:
    own = [label for label in run.examples if not run.record.methods[label].baseline]
    own.sort(key=lambda label: run.shown is None or label != run.shown.label)
    for place, label in enumerate(own):
        shown = run.record.shown(label)
        title = f"Lowest γ in {run.name} by {shown}"
        found = gallery.side_by_side({shown: (run.name, label)}, "failure", title, most=_MOST_FAILURES)
        if found is not None:
            alt = f"{len(found.items)} phrases with the lowest γ, with their heat maps."
            sheet = HeatMaps(
                f"failures-{run.name}-{label}", title, "Each of another image.", alt, found.figure, items=found.items
            )
            yield Folded(f"Failures of {shown} ({run.name})", (sheet,)) if place else sheet


def _training_picture(run: Run) -> Iterator[Block]:
    if run.picture is None:
        return
    try:
        with Image.open(run.picture) as opened:
            figure = picture(np.asarray(opened.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        yield Note(f"{run.picture} cannot be shown: {error}.", missing=True)
        return
    methods = ", ".join(run.methods)
    note = f"{run.picture.name} of the run: heat maps by {methods} of a few fixed phrases, from first to last."
    alt = f"Heat maps of the fixed examples of {run.name}, from its first measurement to its last."
    yield HeatMaps(f"progress-{run.name}", f"Heat maps while {run.name} learned", note, alt, figure)
