"""`merge`: interpolate the weights of a model and its fine-tuned version, and measure what is won and lost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_xai.atomic_file import write_json
from lightning_xai.commands.inputs import find_device
from lightning_xai.commands.model_choice import ModelChoice
from lightning_xai.commands.outputs import write_csv
from lightning_xai.results.record import package_versions

# No `if TYPE_CHECKING` in a module whose class holds options: the parser would import what stands there, and so torch.

_BETTER_UP = (
    *(f"{name}{end}" for end in ("", "_input") for name in ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho")),
    *("image_to_text_recall_at_1", "text_to_image_recall_at_1", "zero_shot_accuracy"),
)
_PLACES = {"_input": "inputs", "": "last blocks"}


@dataclass
class Merge:
    r"""Interpolate weights between a model and its fine-tuned version, and measure each model on the way (WiSE-FT).

    Fine-tuning wins something and loses something else; between the two, much of both can often be had. The weights are
    (1 - alpha) * BASE + alpha * TUNED (Wortsman et al. 2022): batch statistics too, and the logit scale as its
    logarithm. Alpha 0 and 1 are the two models, bit for bit.

    Writes merge.csv (a line for each alpha), merge.png, merge.json (every setting), alpha=0.4.ckpt and so on (which
    `export`, `explain --model.name` and TUNED's `validate --run RUN --ckpt_path` take), and the result folder of each
    grounding in alpha=0.4/grounding/.

    Grounding, recall and zero-shot accuracy of a fine-tuned ViT-B/16:
      python -m lightning_xai merge ViT-B-16 runs/coco --base-pretrained openai --data data/coco/val \
          --images imagenet/val --classes imagenet --out merged
    Only write the weights half-way:
      python -m lightning_xai merge base.ckpt tuned.ckpt --alpha 0.5 --out merged

    Attributes:
        models: BASE and TUNED: each a .ckpt file that fit has written, the folder of a run (its best model), or any
            other name of a model that fit takes.
        out: folder to write to; what an earlier call wrote there is replaced.
        alpha: shares of TUNED, in [0, 1], each once.
        base_pretrained: weights of BASE where it is the name of an open_clip model: a tag (openai) or a file.
        data: folder of shards of one split, on which grounding and recall are measured.
        images: a folder with a subfolder of images for each class, on which zero-shot accuracy is measured.
        classes: names of the classes: imagenet, or a text file with lines of FOLDER, a tab, and NAME; left out: those
            of the folders.
        template: openai (80 templates), simple (7), or texts with {} in place of the class; may be given several times.
        save: all weights, those of the best alpha by --best-by, or none.
        best_by: what --save best chooses by, as zero_shot_accuracy, gamma_mean_input, rho (a column of merge.csv).
        input_phrases: phrases whose grounding is measured at the inputs as well; 0: none.
        batch_size: images that pass through the model at a time.
        num_workers: processes that read data.
        device: cpu, cuda, cuda:1, ...; left out: a GPU where there is one.
    """

    models: list[str]
    out: Path
    alpha: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    base_pretrained: str | None = None
    data: Path | None = None
    images: Path | None = None
    classes: str | None = None
    template: list[str] = field(default_factory=lambda: ["openai"])
    save: Literal["all", "best", "none"] = "all"
    best_by: str | None = None
    input_phrases: int = 500
    batch_size: int = 64
    num_workers: int = 2
    device: str | None = None

    def __call__(self) -> None:
        """Merge, measure, and write.

        Raises:
            ValueError: options that exclude each other, models that differ in more than their weights, or data that
                cannot be measured.
        """
        from lightning_xai.models.interpolation import check_same_model, interpolated
        from lightning_xai.models.weights_file import save_checkpoint

        self._check()
        device = find_device(self.device)
        zero_shot, data = self._tasks()
        base, tuned = (_load(*given) for given in zip(self.models, (self.base_pretrained, None), strict=True))
        check_same_model(base, tuned)
        first = {key: value.clone() for key, value in base.model.state_dict().items()}
        last = {key: value.clone() for key, value in tuned.model.state_dict().items()}
        del base
        rows: list[dict[str, float]] = []
        for alpha in sorted(self.alpha):
            tuned.model.load_state_dict(interpolated(first, last, alpha))
            path = self.out / f"alpha={alpha:g}.ckpt"
            if self.save == "all":
                save_checkpoint(tuned, path)
            if data is not None or zero_shot is not None:
                print(f"\nalpha = {alpha:g}", flush=True)  # noqa: T201 - measuring may take long
                rows.append({"alpha": alpha, **_measured(tuned, self.out / path.stem, data, zero_shot, self, device)})
                self._write_rows(rows)  # so that what was measured is there if the next one fails
        if rows:
            self._write(rows)
        if self.save == "best":
            best = max(rows, key=lambda row: _number(row.get(str(self.best_by))))
            if _number(best.get(str(self.best_by))) == -math.inf:
                raise ValueError(
                    f"no alpha is the best by {self.best_by}, which could be measured at none of them: look at "
                    f"{self.out / 'merge.csv'}, and choose by another number or data that it can be measured on"
                )
            tuned.model.load_state_dict(interpolated(first, last, best["alpha"]))
            save_checkpoint(tuned, self.out / f"alpha={best['alpha']:g}.ckpt")
            print(f"Best by {self.best_by}: alpha = {best['alpha']:g}")  # noqa: T201
        if self.save != "none":
            print(f"Saved weights: {self.out}/alpha=*.ckpt")  # noqa: T201 - where they are

    def _check(self) -> None:
        """Refuse options that cannot work, before anything is loaded."""
        if len(self.models) != 2:
            raise ValueError(f"expected two models, BASE and TUNED; got {', '.join(self.models)}")
        if (
            not self.alpha
            or len({f"{each:g}" for each in self.alpha}) < len(self.alpha)
            or not all(0 <= each <= 1 for each in self.alpha)
        ):
            given = " ".join(f"{each:g}" for each in self.alpha)
            raise ValueError(f"--alpha takes numbers from 0 to 1, each once; got {given}")
        if self.base_pretrained is None and ModelChoice(self.models[0]).is_random and not _is_run(self.models[0]):
            raise ValueError(
                f"{self.models[0]} would have random weights: give --base-pretrained a tag or a file, or a .ckpt file"
            )
        if self.images is None and (self.classes is not None or self.template != ["openai"]):
            raise ValueError("--classes and --template are about --images, a folder with images of each class: give it")
        if (self.save == "best") != (self.best_by is not None):
            raise ValueError(f"--save best goes with --best-by; got --save {self.save} and --best-by {self.best_by}")
        measured = [
            name
            for name in _BETTER_UP
            if (self.images if name == "zero_shot_accuracy" else self.data) is not None
            and (self.input_phrases or not name.endswith("_input"))
        ]
        if self.best_by is not None and self.best_by not in measured:
            known = ", ".join(measured) or "nothing: give --data or --images"
            raise ValueError(f"--best-by {self.best_by} is not measured here; what is: {known}")
        if self.save == "none" and not measured:
            raise ValueError("nothing to do: give --data or --images to measure, or --save all")

    def _tasks(self) -> tuple[Any, Any]:
        """The callback of zero-shot accuracy, and the data module; None where not asked for."""
        zero_shot: Any = None
        data: Any = None
        if self.images is not None:
            from lightning_xai.training import ZeroShotCallback

            zero_shot = ZeroShotCallback(
                self.images,
                classes=self.classes,
                templates=self.template,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
            )
        if self.data is not None:
            from lightning_xai.data import ShardDataModule

            data = ShardDataModule(val=self.data, batch_size=self.batch_size, num_workers=self.num_workers)
            data.setup("validate")  # refuses what is no folder of shards
        return zero_shot, data

    def _write_rows(self, rows: list[dict[str, float]]) -> None:
        write_csv(self.out / "merge.csv", rows, list(dict.fromkeys(name for row in rows for name in row)))

    def _write(self, rows: list[dict[str, float]]) -> None:
        from rich.markup import escape

        from lightning_xai.metrics.grounding import SPEC
        from lightning_xai.report.merging import merge_figure, merge_table
        from lightning_xai.report.plots import save_figure
        from lightning_xai.report.terminal import wide_console

        settings = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        write_json(self.out / "merge.json", {"command": settings, "versions": package_versions(), "rows": rows})
        save_figure(merge_figure(rows, SPEC.scores, _PLACES), self.out / "merge.png")
        console = wide_console()
        console.print(merge_table(rows, SPEC.scores, _PLACES).to_terminal(), crop=False)
        console.print(escape(f"Saved {self.out / 'merge.csv'} and {self.out / 'merge.png'}"), soft_wrap=True)


def _is_run(name: str) -> bool:
    from lightning_xai.training.run_folder import run_of

    return Path(name).is_dir() and run_of(Path(name)) is not None


def _load(name: str, pretrained: str | None) -> Any:
    """A model by its name; of a run the best one, which is then said."""
    from lightning_xai.models import load_dual_encoder
    from lightning_xai.training.run_folder import RunFolder

    if _is_run(name):
        model = RunFolder(Path(name)).model()
        print(f"Model: {model}")  # noqa: T201 - which model the weights are of
        name = model.path
    return load_dual_encoder(name, pretrained).eval()


def _measured(encoder: Any, folder: Path, data: Any, zero_shot: Any, options: Merge, device: Any) -> dict[str, float]:
    """What a validation of the model logs, without `val/`; only zero-shot accuracy where there are no shards."""
    from lightning_xai.commands.run_callbacks import progress
    from lightning_xai.training import GroundingCallback
    from lightning_xai.training.contrastive import ContrastiveModule
    from lightning_xai.training.run_trainer import RunTrainer

    if data is None:
        result = zero_shot.task.measure(encoder.to(device), progress=print)
        found = {"zero_shot_accuracy": result.accuracy, "zero_shot_images": result.images}
        return found | {"zero_shot_skipped": result.skipped}
    grounding = GroundingCallback(input_phrases=options.input_phrases, internal_batch_size=options.batch_size)
    callbacks = [grounding, *([] if zero_shot is None else [zero_shot])]
    trainer = RunTrainer(
        **progress(callbacks),
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    trainer.validate(ContrastiveModule(encoder), data, verbose=False)
    return {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}


def _number(value: float | None) -> float:
    """A value to compare; nothing measured is the worst."""
    return -math.inf if value is None or math.isnan(value) else value
