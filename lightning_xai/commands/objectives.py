"""`objectives`: train with several lists of objectives, and judge each by what it was not trained on."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_xai.results.objectives import ObjectiveTrial, TrainedModel, plan_objective_trials, read_trained_model

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import those names, and so torch.

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,59}")


@dataclass
class Objectives:
    """Train a model with several lists of objectives (variants), and judge what each of them is worth.

    Every variant is trained from the same weights on the same batches where the seed is the same, and judged by `test`
    with attribution methods and metrics: at layers and by methods that it was trained on, and, what counts, by those
    that it was not. What the validation logs, recall and what callbacks of the trainer add, stands next to it.

    Each training with its judgement is a trial (variant, seed), whose result is a file. A trial that is done is never
    run again: repeat the same command after an interruption, or to add variants and seeds.

    Everything, as many trials at a time as the config says:
      python -m lightning_xai objectives --config configs/objectives_demo.yaml
    Seven trials at a time, each on an equal share of the cores:
      python -m lightning_xai objectives --config configs/objectives_demo.yaml --workers 7
    Five seeds, which a test of significance needs:
      python -m lightning_xai objectives --config configs/objectives_demo.yaml --seeds '[0,1,2,3,4]'
    List the trials, and which of them are done:
      python -m lightning_xai objectives --config configs/objectives_demo.yaml --list-trials
    One trial, as in a job array, and the page at the end:
      python -m lightning_xai objectives --config configs/objectives_demo.yaml --trial 0
      python -m lightning_xai objectives --config configs/objectives_demo.yaml --gather

    Attributes:
        out: folder to write to: trials/, models/, validated/, judged/, a result folder for each of variants/, and
            report/.
        model: options of ContrastiveFineTuning, all but its objectives.
        data: data module (class_path and init_args) to train, validate and test on; its seed is that of the trial.
        variants: name -> objectives, each with class_path and init_args, as in the config of fit.
        judge: options of AttributionEvaluation, such as methods, metrics and metric_options; without a model.
        trainer: options of Lightning's Trainer, such as max_epochs, accelerator and callbacks.
        base: the variant that the others are compared with.
        seeds: of the trainings; one trial of each variant for each.
        images: how many first images of the test split are judged, rounded up to whole batches of 8.
        captions_per_image: of those images.
        scores: those that are compared, by name; the page also has tables of all others.
        logged: numbers of the validation that are compared, by name, where they are logged.
        alpha: significance level of each test of almost stochastic order.
        epsilon: its threshold; lower is stricter.
        bootstrap_samples: of each test.
        workers: processes that run trials at the same time, each with an equal share of the cores, and with one of
            the GPUs in turn.
        trial: run this trial alone, by its number in --list-trials.
        list_trials: only list the trials.
        gather: only collect the results of the trials that are done.
    """

    out: Path
    model: dict[str, Any]
    data: dict[str, Any]
    variants: dict[str, list[dict[str, Any]]]
    judge: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    base: str = "base"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    images: int = 32
    captions_per_image: int = 1
    scores: tuple[str, ...] = ("gamma_above_50", "gamma_mean", "rho", "deletion", "spearman", "completeness_error")
    logged: tuple[str, ...] = (
        "val/text_to_image_recall_at_5",
        "val/image_to_text_recall_at_5",
        "val/caption_choice",
        "val/zero_shot_accuracy",
    )
    alpha: float = 0.005
    epsilon: float = 0.2
    bootstrap_samples: int = 1000
    workers: int = 1
    trial: int | None = None
    list_trials: bool = False
    gather: bool = False

    def __call__(self) -> None:
        """Run the trials that are not done, and collect all results.

        Raises:
            ValueError: settings that cannot be met, no such model or data, or results of other settings.
        """
        self._check()
        trials = plan_objective_trials(list(self.variants), self.seeds)
        if self.list_trials:
            for number, trial in enumerate(trials):
                print(number, trial, "done" if trial.path(self.out).is_file() else "to do")  # noqa: T201
            return
        if self.trial is not None and self.gather:
            raise ValueError("--trial and --gather exclude each other: give one of them at a time")
        if self.trial is not None and not 0 <= self.trial < len(trials):
            raise ValueError(f"--trial has to be 0 to {len(trials) - 1} (see --list-trials); got {self.trial}")
        if not self.gather:
            self._run(trials if self.trial is None else [trials[self.trial]])
        if self.trial is None:
            self._report(trials)

    # Not public: the parser would make a subcommand of it.
    def _check(self) -> None:
        wrong = [name for name in self.variants if not _NAME.fullmatch(name)]
        if wrong or not self.variants:
            raise ValueError(
                "variants: expected names of letters, digits and _ with their lists of objectives; got "
                f"{', '.join(map(repr, wrong)) or 'none'}"
            )
        if self.base not in self.variants:
            raise ValueError(f"base has to be one of the variants ({', '.join(self.variants)}); got {self.base!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds has to hold different numbers, at least one, none below 0; got {self.seeds}")
        for name in ("images", "captions_per_image", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} has to be at least 1; got {getattr(self, name)}")

    def _run(self, trials: list[ObjectiveTrial]) -> None:
        from lightning_xai.commands.objectives_run import run_trials
        from lightning_xai.commands.outputs import progress_bar

        with progress_bar() as bar:
            task = bar.add_task("trials", total=len(trials))
            # Closed whatever happens, so that workers end.
            with closing(run_trials(self, trials, lambda trial: bar.update(task, description=str(trial)))) as done:
                for _ in done:
                    bar.advance(task)

    def _report(self, trials: list[ObjectiveTrial]) -> None:
        from lightning_xai.report.objectives import write_objectives_report
        from lightning_xai.report.sections.significance import OrderTest

        done = [found for trial in trials if (found := read_trained_model(self.out, trial)) is not None]
        _check_gathered(self, trials, done)
        test = OrderTest(self.epsilon, self.alpha, self.bootstrap_samples)
        write_objectives_report(self.out, done, self.base, self.variants, self.scores, self.logged, test)
        if missing := len(trials) - len(done):
            print(f"{missing} of {len(trials)} trials are missing; see --list-trials")  # noqa: T201


def _check_gathered(objectives: Objectives, trials: list[ObjectiveTrial], done: list[TrainedModel]) -> None:
    """Raise a ValueError where no page can be made of the trials that are done."""
    if not any(found.trial.variant == objectives.base for found in done):
        raise ValueError(
            f"{objectives.out}: no trial of the base {objectives.base!r} is done, which the others are compared with; "
            f"{len(done)} of {len(trials)} trials are done"
        )
    for found in done[1:]:
        # Trials of one folder are run by one config, which may have changed between two of them.
        both = [{key: value for key, value in each.recipe.items() if key != "objectives"} for each in (done[0], found)]
        if both[0] != both[1]:
            raise ValueError(
                f"{found.trial} and {done[0].trial} were run with different settings of model, data, trainer or judge; "
                "delete the files of those that are out of date, and run them again"
            )
