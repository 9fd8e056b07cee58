"""Measures, while a model learns, whether an image is more similar to its own caption than to a slightly wrong one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_xai.data.batch import Batch
from lightning_xai.data.datamodule import ShardDataModule
from lightning_xai.data.dataset import ShardLoader
from lightning_xai.data.sample import Sample
from lightning_xai.data.shard_reader import read_samples
from lightning_xai.evaluation.caption_choice import ChoicePass
from lightning_xai.evaluation.logged_pictures import LoggedTable, log_pictures
from lightning_xai.evaluation.method_run import from_first, gather_to_first
from lightning_xai.metrics.caption_choice import Choice, ChoiceScores, choice_scores
from lightning_xai.models.dual_encoder import DualEncoder
from lightning_xai.report.paper_table import Column, PaperTable
from lightning_xai.training.measurement import check_monitors, find_encoder, is_due

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CaptionChoiceCallback"]

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_MOST_KINDS = 12  # on the terminal; the file has all
_PAIR_SCORES = ("text", "image", "group")


@dataclass(frozen=True)
class _Measured:
    """The scores of one set of wrong captions over all ranks, and how many were excluded, by reason."""

    scores: ChoiceScores
    excluded: dict[str, int]

    def logged(self, name: str) -> Iterator[tuple[str, float]]:
        """What is logged of the set of that name; empty: of the validation's own wrong captions."""
        whole = f"caption_choice_{name}" if name else "caption_choice"
        yield whole, self.scores.micro
        if len(self.scores.asked) > 1:
            yield f"{whole}_macro", self.scores.macro
        yield f"{whole}_targets", float(sum(self.scores.asked.values()))
        yield f"{whole}_excluded", float(sum(self.excluded.values()))
        for score, right in self.scores.pairs.items() if self.scores.pairs_asked else ():
            yield f"{name or 'caption_choice'}_{score}", right / self.scores.pairs_asked

    def lines(self, name: str) -> Iterator[tuple[str, str, int, float]]:
        """Name, kind, number and share of right choices."""
        for kind, asked in self.scores.asked.items():
            yield name, kind, asked, self.scores.right[kind] / asked
        yield name, "all", sum(self.scores.asked.values()), self.scores.micro
        if len(self.scores.asked) > 1:
            yield name, "mean of kinds", len(self.scores.asked), self.scores.macro
        for score, right in self.scores.pairs.items() if self.scores.pairs_asked else ():
            yield name, f"pairs: {score}", self.scores.pairs_asked, right / self.scores.pairs_asked


class CaptionChoiceCallback(Callback):
    """The share of wrong captions that are less similar to their image than the true one, before and after each epoch.

    `swaps` asks about the wrong captions of the split's own batches: those that its shards hold and, with the data
    module's `swap_objects`, those made by `object_swaps` ("a red ring" becomes "a red heart"). The images and true
    captions are those that validation embeds anyway: `validation_step` returns `{"image": [B, K], "text": [C, K]}`, as
    `ContrastiveModule`'s does. `shards` are further sets, such as SugarCrepe, ARO and Winoground.

    Logs `val/caption_choice` (in [0, 1], higher is better, chance 0.5; a tie is a miss), and `val/caption_choice_NAME`
    for each of `shards`; of each as well `..._targets` (number of wrong captions), `..._excluded` (of those that could
    not be asked about) and, where there are several kinds, `..._macro` (the mean over kinds). Of a set of pairs, as
    Winoground, `val/NAME_text`, `val/NAME_image` and `val/NAME_group`, see `pair_choice`. Checkpoint callbacks can
    monitor each of them (`test/...` in a test run); they stand in the table of `GroundingCallback`. The numbers are the
    same on any number of processes. All kinds are in the run's folder, in `caption_choice/step=00000040.csv` and so on,
    and each logger gets that table as `val/caption_choice_kinds`.

    Args:
        shards: name -> folder of shards that `prepare sugarcrepe`, `aro`, `winoground` or `hnc` made.
        swaps: ask about the wrong captions of the split's own batches.
        every_n_epochs: measure in the validations of each n-th epoch, before training where that is a full validation
            (`GroundingCallback` makes it one), and where training ends in an epoch without one.
        batch_size: images, or wrong captions, embedded at a time; bounds memory, changes no number.
        num_workers: processes that read `shards`, on each rank.

    Raises:
        ValueError: an option outside its range, or nothing to ask about; at set-up: shards without wrong captions, no
            encoder, or a callback that monitors a score in epochs that are not measured.
        FileNotFoundError: at set-up: a folder holds no shards.
    """

    def __init__(
        self,
        *,
        shards: Mapping[str, Path] | None = None,
        swaps: bool = True,
        every_n_epochs: int = 1,
        batch_size: int = 64,
        num_workers: int = 2,
    ) -> None:
        for name, value in {"every_n_epochs": every_n_epochs, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} has to be at least 1; got {value}")
        if not shards and not swaps:
            raise ValueError("there is nothing to ask about: give CaptionChoiceCallback shards, or swaps: true")
        for name in shards or {}:
            if not _NAME.fullmatch(name):
                raise ValueError(f"names of shards have letters, digits, '_' and '-', since scores are; got {name!r}")
        self.swaps = swaps
        self.every_n_epochs = every_n_epochs
        self.batch_size = batch_size
        self._sets = {
            name: ShardDataModule(val=folder, batch_size=batch_size, num_workers=num_workers)
            for name, folder in (shards or {}).items()
        }
        self._pass: ChoicePass | None = None
        self._due = False
        self._measured: dict[str, _Measured] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check all that could fail later, before anything is computed."""
        if stage == "predict":
            return
        encoder = find_encoder(pl_module, type(self).__name__)
        for name, data in self._sets.items():
            data.bind(encoder.image_transform, encoder.tokenizer)
            data.setup("validate")
            if not _has_wrong_captions(data, "val"):
                raise ValueError(
                    f"the shards {name!r} ({data.stores['val']}) hold no wrong captions: make them with `python -m "
                    "lightning_xai prepare sugarcrepe`, `aro`, `winoground` or `hnc`, or take them out of shards"
                )
        split, own = "test" if stage == "test" else "val", getattr(trainer, "datamodule", None)
        if self.swaps and isinstance(own, ShardDataModule) and own.stores[split] is not None:
            _refuse_without_wrong_captions(own, split)
        if stage == "fit":
            scores = {*_PAIR_SCORES, "macro", "targets", "excluded"}
            names = {f"val/{each}" for each in ("caption_choice", *(f"caption_choice_{name}" for name in self._sets))}
            names |= {
                f"{name}_{score}" for name in (*names, *(f"val/{name}" for name in self._sets)) for score in scores
            }
            check_monitors(trainer, names, "CaptionChoiceCallback", self.every_n_epochs)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a measurement, in epochs that are measured."""
        whole = trainer.num_sanity_val_steps == math.inf
        self._due = whole if trainer.sanity_checking else is_due(trainer, self.every_n_epochs)
        self._pass = ChoicePass() if self._due and self.swaps else None

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take note of a batch's wrong captions."""
        if self._pass is None or not isinstance(batch, Batch) or not (batch.negatives or batch.wrong_captions):
            return
        if not isinstance(outputs, Mapping) or not {"image", "text"} <= outputs.keys():
            raise ValueError(
                f"CaptionChoiceCallback compares what validation_step and test_step of {type(pl_module).__name__} "
                "return: let them return the embeddings {'image': [B, K], 'text': [C, K]}, or set swaps to false"
            )
        self._pass.add(batch, outputs["image"], outputs["text"])

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Embed the wrong captions, and log how many are less similar than the true ones."""
        if not self._due:
            return
        self._measured = {}
        encoder = find_encoder(pl_module, type(self).__name__)
        # As validation_step runs: captions that are embedded in another precision could not be compared.
        with trainer.precision_plugin.val_step_context(), torch.no_grad():
            if self._pass is not None:
                choices = self._pass.finish(encoder.encode_text, self.batch_size)
                self._measured[""] = _together(choices, {"same_tokens": self._pass.same_tokens})
                self._pass = None
            for name, data in self._sets.items():
                self._measured[name] = self._measure(data, encoder, trainer)
        split = "test" if trainer.testing else "val"
        for name, measured in self._measured.items():
            if not measured.scores.asked:
                rank_zero_warn(f"no caption choice of {name or split}: none of its wrong captions could be asked about")
                continue
            for key, value in measured.logged(name):
                # Every rank holds the same number already.
                pl_module.log(f"{split}/{key}", value, prog_bar=key == "caption_choice")

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the scores of all kinds."""
        if not self._due or not self._measured:
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "caption_choice"  # on all ranks: they agree on it
        fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.is_global_zero:
            state = f"step={trainer.global_step:08d}" if fitting else "test" if trainer.testing else "validate"
            path = folder / f"{state}.csv"
            lines = _write(path, self._measured)
            split = "test" if trainer.testing else "val"
            log_pictures(trainer, [LoggedTable(f"{split}/caption_choice_kinds", path, lines)])
            if not fitting:
                _show(self._measured)
        if not fitting:
            self._measured = {}

    on_test_end = on_validation_end

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last measurement."""
        if trainer.is_global_zero and self._measured:
            _show(self._measured)
        self._measured = {}

    def _measure(self, data: ShardDataModule, encoder: DualEncoder, trainer: L.Trainer) -> _Measured:
        """Ask about all wrong captions of further shards, each rank about its own part."""
        device = trainer.strategy.root_device
        choices = ChoicePass()
        loader = data.val_dataloader()
        assert isinstance(loader, ShardLoader)
        for batch in loader:
            here = trainer.precision_plugin.convert_input(batch.to(device))
            if bool(here.valid.any()):
                choices.add(here, encoder.encode_image(here.images), encoder.encode_text(here.tokens))
        found = choices.finish(encoder.encode_text, self.batch_size)
        broken = data.gather_faults("val").total()  # of all ranks already
        own = {"same_tokens": choices.same_tokens, "broken_records": broken if trainer.is_global_zero else 0}
        return _together(found, own)


def _together(choices: list[Choice], excluded: Mapping[str, int]) -> _Measured:
    """The scores of what all ranks ask about; every rank has to call this."""
    parts = gather_to_first((choices, dict(excluded)))

    def counted() -> _Measured:
        scores = choice_scores(choice for own, _ in parts for choice in own)
        counts = {reason: sum(part[reason] for _, part in parts) for reason in excluded}
        return _Measured(scores, counts | {"incomplete_pairs": scores.incomplete})

    return from_first(counted)


def _has_wrong_captions(data: ShardDataModule, split: str) -> bool:
    """True if a record has; mostly the first one."""
    store, manifest = data.stores[split], data.manifest(split)
    assert store is not None
    records = read_samples(store, manifest, range(len(manifest.shards)), 0, manifest.samples)
    return any(isinstance(each, Sample) and bool(each.wrong_captions or each.negatives) for _, each in records)


def _refuse_without_wrong_captions(data: ShardDataModule, split: str) -> None:
    # Objects are swapped for those of a class that the image does not show.
    if (data.swap_objects and len(data.manifest(split).labels) > 1) or _has_wrong_captions(data, split):
        return
    advice = "they name no objects to swap" if data.swap_objects else "set --data.swap_objects true to make some"
    raise ValueError(
        f"the {split} shards ({data.stores[split]}) hold no wrong captions for CaptionChoiceCallback, and {advice}; or "
        "set its swaps to false and give it shards"
    )


def _write(path: Path, measured: Mapping[str, _Measured]) -> pd.DataFrame:
    """Write and return a line for each kind of wrong captions."""
    import pandas as pd

    from lightning_xai.results.table import write_csv

    lines = [line for name, each in measured.items() for line in each.lines(name)]
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(lines, columns=["shards", "kind", "targets", "share"])
    write_csv(path, frame)
    return frame


def _show(measured: Mapping[str, _Measured]) -> None:
    """Print the scores, by kind where there are few, and what was excluded."""
    from lightning_xai.report.terminal import wide_console

    lines = []
    for name, each in measured.items():
        few = len(each.scores.asked) <= _MOST_KINDS
        lines += [line for line in each.lines(name or "own") if few or line[1] not in each.scores.asked]
    heads = [Column("captions of", numeric=False), Column("kind", numeric=False), Column("number")]
    heads.append(Column("right", percent=True, digits=1))
    console = wide_console()
    table = PaperTable("caption_choice", "Caption choice", "", heads, [list(line) for line in lines])
    console.print(table.to_terminal(), crop=False)
    counts = {f"{n} {why.replace('_', ' ')}" for each in measured.values() for why, n in each.excluded.items() if n}
    console.print(f"Excluded: {', '.join(sorted(counts)) or 'nothing'}.", markup=False, highlight=False)
