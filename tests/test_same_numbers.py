"""Evaluation and training on 1, 2 and 4 processes: the same counts, numbers, files and weights, each sample once.

Where every batch holds one sample, each sample is computed on its own at any size, and all that is put together is
exact: the numbers are then equal to the last bit. In larger batches a sample has other neighbours at another number of
processes, and the matrix products of its forward pass are rounded in another order: there they agree to 1e-6.
"""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from distributed import join_lightning, run_distributed
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import pad
from training_runs import Recorder, loader_of, task_of, trainer_in

from lightning_xai.data import Batch, Sample, ShardDataModule, write_shards
from lightning_xai.data.phrases import Phrases
from lightning_xai.data.shapes import read_shapes
from lightning_xai.evaluation import AttributionEvaluation
from lightning_xai.metrics import METRICS
from lightning_xai.training import ContrastiveFineTuning, DataFaults, GroundingCallback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning:torch"),
]

RECALLS = tuple(f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 3))
LAST = ("gamma_mean", "gamma_above_50", "gamma_above_80", "rho", "grounding_targets")
GROUNDING = (*LAST, *(f"{name}_input" for name in LAST))
SAMPLED = 20
"""Phrases that are read at the inputs: fewer than most of the splits have."""


def task_for(config: str) -> ContrastiveFineTuning:
    return task_of(config, recall_at=(1, 3), val_group_size=4)


def with_torn_images(samples: Iterable[Sample], torn: Iterable[int]) -> list[Sample]:
    return [replace(s, image=s.image[:-60]) if i in set(torn) else s for i, s in enumerate(samples)]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- evaluation ---


@dataclass(frozen=True)
class Case:
    """A validation split and how it is read.

    Attributes:
        samples: of the split.
        per_shard: samples of a shard.
        batch: images per batch and rank.
        workers: per rank.
        torn: samples whose image is cut off.
        damaged: first of some samples at the end of a shard that are overwritten.
        boxes: whether the samples have boxes.
        verb: "validate" or "test".
    """

    samples: int
    per_shard: int
    batch: int
    workers: int
    torn: tuple[int, ...] = ()
    damaged: int | None = None
    boxes: bool = True
    verb: str = "validate"

    @property
    def broken(self) -> set[int]:
        lost = () if self.damaged is None else range(self.damaged, -(-self.damaged // self.per_shard) * self.per_shard)
        return {*self.torn, *lost}


CASES = {
    "one sample a batch, uneven shards, no workers": Case(13, 5, batch=1, workers=0, torn=(4,)),
    "one sample a batch, a shard for each sample, two workers": Case(9, 1, batch=1, workers=2, verb="test"),
    "a process with padding only": Case(1, 1, batch=3, workers=2),
    "a process with broken records only": Case(8, 3, batch=2, workers=0, torn=(2, 3), verb="test"),
    "a damaged shard": Case(14, 4, batch=3, workers=2, damaged=6, torn=(12,)),
    "no record is whole": Case(3, 2, batch=2, workers=0, torn=(0, 1, 2)),
    "no boxes": Case(6, 4, batch=2, workers=0, boxes=False),
}
SIZES = [*((name, 2) for name in CASES), ("one sample a batch, uneven shards, no workers", 4)]
"""Cases and numbers of processes that are compared with a single process."""


class Seen(Callback):
    """Which samples pass by on this rank."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.faults = 0

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *args: Any, **kwargs: Any
    ) -> None:
        assert batch.valid.tolist() == [index >= 0 for index in batch.index.tolist()]
        self.batches.append(batch.index.tolist())
        self.faults += len(batch.faults)

    on_test_batch_end = on_validation_batch_end


def make_split(folder: Path, case: Case) -> None:
    samples = with_torn_images(read_shapes("val", case.samples), case.torn)
    if not case.boxes:
        samples = [replace(sample, regions=()) for sample in samples]
    manifest = write_shards(samples, folder, name="case", samples_per_shard=case.per_shard, progress=False)
    if case.damaged is not None:
        shard, first = divmod(case.damaged, case.per_shard)
        path = folder / manifest.shards[shard].name
        with tarfile.open(path) as archive:
            begin = archive.getmembers()[2 * first].offset  # an image and its annotation each
        content = path.read_bytes()
        path.write_bytes(content[:begin] + b"U" * (len(content) - begin))


def evaluate_all(config: str, splits: str, out: str, **parallel: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        split, workers, seen = Path(splits, name), case.workers if parallel else 0, Seen()
        data = ShardDataModule(
            val=split, test=split, eval_batch_size=case.batch, num_workers=workers, max_fault_fraction=1
        )
        trainer = trainer_in(
            Path(out, name), DataFaults(), GroundingCallback(examples=0, input_phrases=SAMPLED), seen, **parallel
        )
        run = trainer.test if case.verb == "test" else trainer.validate
        (logged,) = run(task_for(config), data, verbose=False)
        numbers = {number.removeprefix("test/").removeprefix("val/"): value for number, value in logged.items()}
        found[name] = {"logged": numbers, "batches": seen.batches, "faults": seen.faults}
    return found


def evaluate_on_this_rank(config: str, splits: str, out: str) -> dict[str, Any]:
    return evaluate_all(config, splits, out, **join_lightning())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`splits/CASE`, and what each number of processes writes, in `1/CASE`, `2/CASE` and `4/CASE`."""
    root = tmp_path_factory.mktemp("same_numbers")
    for name, case in CASES.items():
        make_split(root / "splits" / name, case)
    return root


@pytest.fixture(scope="module")
def validated(architecture_file: Callable[[str], Path], folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Number of processes -> what each of them has logged and seen, by case."""
    where = (str(architecture_file("vit")), str(folder / "splits"))
    found = {1: [evaluate_all(*where, str(folder / "1"))]}
    for world in (2, 4):
        found[world] = run_distributed(evaluate_on_this_rank, *where, str(folder / str(world)), world_size=world)
    return found


@pytest.mark.parametrize(("name", "world"), SIZES)
def test_each_sample_is_seen_once_and_no_process_has_more_batches_than_another(
    validated: dict[int, list[dict[str, Any]]], name: str, world: int
) -> None:
    case, ranks = CASES[name], [rank[name] for rank in validated[world]]
    sizes = [[len(batch) for batch in rank["batches"]] for rank in ranks]
    assert all(own == sizes[0] for own in sizes)
    seen = [index for rank in ranks for batch in rank["batches"] for index in batch if index >= 0]
    assert sorted(seen) == sorted(set(range(case.samples)) - case.broken)
    assert sum(rank["faults"] for rank in ranks) == len(case.broken)


@pytest.mark.parametrize(("name", "world"), SIZES)
def test_the_numbers_of_an_evaluation_are_those_of_one_process(
    validated: dict[int, list[dict[str, Any]]], name: str, world: int
) -> None:
    case, (alone,), ranks = CASES[name], validated[1], validated[world]
    expected = alone[name]["logged"]
    assert {*RECALLS, *GROUNDING, "loss", "accuracy"} <= set(expected)
    for rank in ranks:
        logged = rank[name]["logged"]
        assert str(logged) == str(ranks[0][name]["logged"])  # NaN equals nothing, but reads as itself
        assert logged.keys() == expected.keys()
        assert logged["grounding_targets"] == expected["grounding_targets"]
        assert logged["grounding_targets_input"] == expected["grounding_targets_input"] <= SAMPLED
        assert logged["broken_records"] == expected["broken_records"] == len(case.broken)
        tolerance = 0 if case.batch == 1 else 1e-6
        assert logged == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)


@pytest.mark.parametrize(("name", "world"), SIZES)
@pytest.mark.parametrize("table", ["{}/values", "{}/targets", "{}/classes", "summary-{}"])
def test_the_files_of_an_evaluation_are_those_of_one_process(
    validated: dict[int, list[dict[str, Any]]], folder: Path, name: str, world: int, table: str
) -> None:
    assert validated
    file = f"{table.format(CASES[name].verb)}.csv"
    ours, theirs = (folder / str(size) / name / "grounding" / file for size in (world, 1))
    if CASES[name].batch == 1:
        assert ours.read_bytes() == theirs.read_bytes()
    lines, expected = rows_of(ours), rows_of(theirs)
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for column, value in line.items():
            if column.startswith(("gamma", "loss", "value")) and value:
                assert float(value) == pytest.approx(float(other[column]), abs=1e-6, nan_ok=True), column
            else:
                assert value == other[column], column


def test_the_cases_measure_pairs_of_many_classes_and_leave_some_out(
    validated: dict[int, list[dict[str, Any]]], folder: Path
) -> None:
    assert validated
    for name, verb in (
        ("a damaged shard", "validate"),
        ("one sample a batch, a shard for each sample, two workers", "test"),
    ):
        written = folder / "1" / name / "grounding"
        (summary,) = rows_of(written / f"summary-{verb}.csv")
        assert int(summary["targets"]) > 15
        assert SAMPLED - 3 <= int(summary["targets_input"]) <= SAMPLED < int(summary["targets"])
        assert int(summary["excluded_several_instances"]) > 0
        assert sum(int(row["targets"]) > 0 for row in rows_of(written / verb / "classes.csv")) > 3


# --- explanations ---

FAITHFULNESS: dict[str, Any] = {
    "faithfulness": {"image_coalitions": 8, "text_coalitions": 6},
    "insertion_deletion": {"steps": 2},
    "pair_insertion_deletion": {"steps": 2},
    "prefix_share": {},
    "pointing_game": {},
    "infidelity": {"image_coalitions": 8, "text_coalitions": 6},
    "max_sensitivity": {"samples": 2},
    "road": {"fractions": [0.5]},
}


def explain_all(config: str, split: str, out: str, batch: int, **parallel: Any) -> None:
    torch.manual_seed(0)
    task = AttributionEvaluation(
        config,
        None,
        out=Path(out),
        methods={"feature_pair": None, "saliency": None},
        metrics=list(FAITHFULNESS),
        metric_options=FAITHFULNESS,
    )
    data = ShardDataModule(test=Path(split), eval_batch_size=batch, num_workers=0, max_fault_fraction=1)
    trainer_in(Path(out), **parallel).test(task, data, verbose=False)


def explain_on_this_rank(config: str, split: str, out: str, batch: int) -> None:
    explain_all(config, split, out, batch, **join_lightning())


def test_what_judges_explanations_is_the_same_on_two_processes_and_in_any_batch(
    architecture_file: Callable[[str], Path], tmp_path: Path
) -> None:
    case = Case(9, 4, batch=1, workers=0, torn=(3,))
    make_split(tmp_path / "split", case)
    where = (str(architecture_file("vit")), str(tmp_path / "split"))
    explain_all(*where, str(tmp_path / "1"), 1)
    explain_all(*where, str(tmp_path / "batches"), 4)
    run_distributed(explain_on_this_rank, *where, str(tmp_path / "2"), 1)
    for table in ("values.csv", "targets.csv"):
        assert (tmp_path / "2" / table).read_bytes() == (tmp_path / "1" / table).read_bytes()
    lines, others = (rows_of(tmp_path / name / "values.csv") for name in ("1", "batches"))
    measured = {line["metric"] for line in lines if not line["excluded"]}
    assert measured == {value for name in FAITHFULNESS for value in METRICS[name].values}
    for line, other in zip(lines, others, strict=True):
        assert {**line, "value": ""} == {**other, "value": ""}
        if line["value"]:
            assert float(line["value"]) == pytest.approx(float(other["value"]), rel=1e-3, abs=1e-4, nan_ok=True)


# --- training ---

BATCH, EPOCHS = 3, 2
LONG = "a long caption that goes on and on about a red ring"
SHORT = "a ring"


class Steps(Recorder):
    """The batches of this rank, too."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any) -> None:
        self.batches.append(batch)

    def all_of(self, name: str) -> list[float]:
        return [row[name] for row in self.logged]


Trained = tuple[list[dict[str, Any]], Steps, dict[str, Tensor]]
ROWS = ("images", "valid", "index", "tokens", "caption_index")


def train_on_this_rank(config: str, shards: str, out: str) -> dict[str, Any]:
    task, steps = task_for(config), Steps()
    data = ShardDataModule(train=Path(shards), batch_size=BATCH, num_workers=2, max_fault_fraction=1)
    trainer = trainer_in(Path(out), steps, max_epochs=EPOCHS, precision="64-true", **join_lightning())
    trainer.fit(task, data)
    return {
        "batches": [{name: getattr(batch, name) for name in ROWS} for batch in steps.batches],
        "losses": steps.all_of("train/loss"),
        "accuracies": steps.all_of("train/accuracy"),
        "gradients": steps.gradients,
        "weights": dict(task.state_dict()),
    }


def joint_batch(parts: list[dict[str, Tensor]]) -> Batch:
    """The rows of all ranks as one batch."""
    longest = max(part["tokens"].shape[1] for part in parts)
    parts = [part | {"tokens": pad(part["tokens"], (0, longest - part["tokens"].shape[1]))} for part in parts]
    rows = {name: torch.cat([part[name] for part in parts]) for name in ROWS}
    nothing = [""] * len(rows["valid"])
    return Batch(
        images=rows["images"],
        valid=rows["valid"],
        index=rows["index"],
        tokens=rows["tokens"],
        caption_image=torch.arange(len(nothing)),
        caption_index=rows["caption_index"],
        captions=nothing,
        keys=nothing,
        phrases=Phrases.empty(rows["tokens"].shape[1]),
    )


@pytest.fixture(scope="module")
def trained(architecture_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two epochs of two processes, and the same of one process with their joint batches."""
    root = tmp_path_factory.mktemp("trained")
    samples = with_torn_images(read_shapes("train", 26), (3, *range(9, 14)))  # also all that one process has in a batch
    samples = [
        replace(sample, captions=(f"{LONG if number % 7 == 1 else SHORT} {number}",), regions=())
        for number, sample in enumerate(samples)
    ]
    write_shards(samples, root / "shards", name="train", samples_per_shard=10, progress=False)
    config = str(architecture_file("vit"))
    ranks = run_distributed(train_on_this_rank, config, str(root / "shards"), str(root / "out"))
    batches = [joint_batch(list(parts)) for parts in zip(*(rank["batches"] for rank in ranks), strict=True)]
    task, steps = task_for(config), Steps()
    trainer_in(root / "alone", steps, precision="64-true").fit(task, loader_of(batches))
    return ranks, steps, dict(task.state_dict())


def test_the_batches_differ_in_length_hold_broken_records_and_share_no_sample(trained: Trained) -> None:
    ranks, _, _ = trained
    steps = 26 // len(ranks) // BATCH
    assert all(len(rank["batches"]) == EPOCHS * steps for rank in ranks)
    lengths = [tuple(int((part["tokens"] != 0).sum(dim=1).max()) for part in parts) for parts in by_step(ranks)]
    assert any(len(set(own)) > 1 for own in lengths)
    valid = [[int(part["valid"].sum()) for part in parts] for parts in by_step(ranks)]
    assert any(0 in step and sum(step) for step in valid), "no process has broken records only"
    assert any(0 < count < BATCH for step in valid for count in step)
    for epoch in range(EPOCHS):
        seen = [
            index
            for parts in by_step(ranks)[epoch * steps : (epoch + 1) * steps]
            for part in parts
            for index in part["index"].tolist()
            if index >= 0
        ]
        assert len(set(seen)) == len(seen) > 0


def by_step(ranks: list[dict[str, Any]]) -> list[tuple[dict[str, Tensor], ...]]:
    return list(zip(*(rank["batches"] for rank in ranks), strict=True))


def test_losses_and_gradients_of_every_step_are_those_of_one_process_with_the_joint_batch(trained: Trained) -> None:
    ranks, alone, _ = trained
    losses = alone.all_of("train/loss")
    assert len(losses) == len(by_step(ranks))
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=1e-6)  # they are logged in float32
        assert rank["accuracies"] == pytest.approx(alone.all_of("train/accuracy"), nan_ok=True)
        for gradients, expected in zip(rank["gradients"], alone.gradients, strict=True):
            assert len(gradients) == len(expected) > 30
            for name, gradient in expected.items():
                assert gradient.dtype == torch.float64
                found = gradients[name if name in gradients else f"module.{name}"]
                torch.testing.assert_close(found, gradient, rtol=0, atol=1e-9 * max(float(gradient.abs().max()), 1))


def test_after_two_epochs_all_processes_have_the_same_weights_to_the_last_bit(trained: Trained) -> None:
    ranks, _, alone = trained
    for name, value in ranks[0]["weights"].items():
        assert all(torch.equal(rank["weights"][name], value) for rank in ranks), name
        torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-6, msg=name)
