"""The first section: the findings that matter most, and the runs that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from lightning_xai.report.page import Block, Findings
from lightning_xai.report.paper_table import Column, PaperTable, score_column
from lightning_xai.report.sections.gaps import class_groups, gaps_of
from lightning_xai.report.sections.significance import Comparison
from lightning_xai.results.runs import Grounding, Run

_MOST_FINDINGS = 3
_KINDS = {"training": "training", "evaluation": "evaluation", "roar": "ROAR+"}


def overview_blocks(runs: Sequence[Run], comparisons: Sequence[Comparison], min_pairs: int) -> list[Block]:
    """A few findings of each kind, since they have to fit a screen, and a table of the runs."""
    findings = [
        *islice((found for run in runs for found in _grounding_finding(run)), _MOST_FINDINGS),
        *islice((_verdict(each) for each in comparisons if _is_telling(each, runs)), _MOST_FINDINGS),
        *islice((found for run in runs for found in _roar_findings(run)), _MOST_FINDINGS),
        *islice(_gap_findings(runs, min_pairs), _MOST_FINDINGS),
    ]
    columns = [Column(name, numeric=False) for name in ("run", "kind", "model", "data", "folder")]
    rows = [[run.name, _KINDS[run.record.kind], _model(run), run.data, str(run.folder)] for run in runs]
    note = "The settings of each are at the end of the page."
    return [Findings(tuple(findings)), PaperTable("runs", "Runs", note, columns, rows)]


def _model(run: Run) -> str:
    return f"{run.model}; {run.shown_model}" if run.shown_model else run.model


def _grounding_finding(run: Run) -> Iterator[tuple[str, str]]:
    """The first score in percent of the method that ranks classes, of a training from its begin to its end."""
    shown = run.shown
    if shown is None or not len(shown.gammas):
        return
    score = next((score for score in shown.metric.scores if score.percent), shown.metric.scores[0])
    unit = " %" if score.percent else ""

    def text(each: Grounding) -> str:
        return score_column(score).text(score.of(each.gammas.tolist()))

    where = f"of {len(shown.gammas):,} phrases on {shown.data} have {score.heading} ({run.name}, {shown.shown_label}"
    first = run.groundings[0]
    if run.is_training and first is not shown and len(first.gammas):
        yield (
            f"{text(first)} → {text(shown)}{unit}",
            f"{where}, {first.state} and after {shown.state}).",
        )
    else:
        yield f"{text(shown)}{unit}", f"{where})."


def _verdict(comparison: Comparison) -> tuple[str, str]:
    if comparison.better is None:
        return "undecided", f"{comparison}."
    return f"{comparison.better.name} grounds better", f"than {comparison.basis}."


def _is_telling(comparison: Comparison, runs: Sequence[Run]) -> bool:
    """True if it is by the method that ranks classes, and of a training from its begin to its end."""
    for run in runs:
        if run.name == comparison.first.run == comparison.second.run:
            return {comparison.first, comparison.second} == {run.groundings[0], run.shown}
    return {comparison.first, comparison.second} <= {run.shown for run in runs}


def _roar_findings(run: Run) -> Iterator[tuple[str, str]]:
    """The best method for each modality, where there are two to choose from, baselines aside."""
    if "roar" not in run.record.metrics or run.record.extra.get("grid"):
        return
    estimates = run.measurements[-1].estimates("roar")
    for score in run.record.metrics["roar"].scores:
        own = {label: scores[score.name].mean for label, scores in estimates.items() if score.name in scores}
        own = {label: mean for label, mean in own.items() if not run.record.methods[label].baseline}
        if len(own) > 1:
            best = max(own, key=lambda label: own[label])
            text = f"finds best what the model learns from in the {score.value}: ROAR+ {100 * own[best]:.1f} %"
            yield best, f"{text} ({run.name})."


def _gap_findings(runs: Sequence[Run], min_pairs: int) -> Iterator[tuple[str, str]]:
    for group in class_groups(runs):
        worst = gaps_of(group[-1], min_pairs).classes.head(3)
        if len(worst):
            which = f"{group[-1].name}, {group[-1].shown_label}"
            about = f"are the classes of {group[-1].data} with the lowest mean γ ({which})."
            yield ", ".join(worst.index), about
