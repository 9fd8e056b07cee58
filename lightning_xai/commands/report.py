"""`report`: put what runs have found on one page, with the tables and figures of the papers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there.


@dataclass
class Report:
    """Read the results of finished runs, and write them as one page to read, and as tables and figures for a paper.

    A run is the folder of an evaluation (`test` of an AttributionEvaluation), of `roar`, or of a training (`fit`).
    Several may be given; they are compared where they were measured by the same method on the same data. Writes
    report.html (one file, which works without network), tables/ (CSV, Markdown, LaTeX) and figures/ (PNG, SVG).

    How well a training has learned to ground:
      python -m lightning_xai report runs/demo/version_0 --out report
    Two models before and after fine-tuning, with names for the tables:
      python -m lightning_xai report runs/eval_openai runs/eval_tuned --names openai,fine-tuned --out report
    Explanations and their retraining in one table:
      python -m lightning_xai report runs/demo_evaluation runs/demo_roar --out report

    Attributes:
        runs: folders of finished runs; several are compared.
        out: folder to write to.
        names: of the runs, joined by commas, in their order; left out: as much of their paths as distinguishes them.
        title: of the page.
        ckpt_path: of trainings, the model that ranks classes: best, by the metric that the run monitors (where it was
            measured), or last.
        method: label of the method whose gamma ranks classes; left out: feature_pair, or else the first.
        alpha: significance level of each test of gamma; a comparison is two, one for each direction. The note next to
            the table says which level holds for all tests together.
        epsilon: threshold of almost stochastic order; lower is stricter.
        bootstrap_samples: of the comparisons.
        seed: of the bootstrap.
        min_pairs: how many measured pairs a class needs to be ranked.
    """

    runs: list[Path]
    out: Path = Path("report")
    names: str | None = None
    title: str = "What the model matches with what"
    ckpt_path: Literal["best", "last"] = "best"
    method: str | None = None
    alpha: float = 0.005
    epsilon: float = 0.2
    bootstrap_samples: int = 1000
    seed: int = 0
    min_pairs: int = 10

    def __call__(self) -> None:
        """Write the report.

        Raises:
            ValueError: a folder without results, files that are broken or of another version, options out of range, or
                a folder that cannot be written.
        """
        from importlib.metadata import version

        from rich.console import Console

        from lightning_xai.report.build import build_sections, write_report
        from lightning_xai.report.sections.significance import OrderTest
        from lightning_xai.report.terminal import report_tables, wide_console
        from lightning_xai.results.runs import load_runs

        names = [name.strip() for name in self.names.split(",")] if self.names is not None else []
        test = OrderTest(self.epsilon, self.alpha, self.bootstrap_samples, self.seed)
        with Console(stderr=True).status("Reading results, comparing, drawing ..."):
            runs = load_runs(self.runs, names, self.method, self.ckpt_path)
            sections, comparisons = build_sections(runs, test, self.min_pairs)
            subtitle = f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {', '.join(run.name for run in runs)}"
            footer = (
                f"Made by lightning_xai {version('lightning_xai')} from {sum(len(run.files) for run in runs)} files."
            )
            path = write_report(self.out, self.title, subtitle, sections, footer)
        console = wide_console()
        for table in report_tables(sections):
            console.print(table, crop=False)
        lines = [f"Model of {run.name}: {run.shown_model}" for run in runs if run.shown_model]
        lines += [f"{comparison}." for comparison in comparisons]
        lines += [f"Saved tables in {self.out / 'tables'}, figures in {self.out / 'figures'}", f"Open {path}"]
        for line in lines:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
