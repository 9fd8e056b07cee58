"""Options for large batches, large models and other precisions: a run's numbers stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from distributed import join_lightning, run_distributed
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from training_runs import Recorder, loader_of, records_of, task_of, trainer_in

from lightning_xai.data import Batch, RecordError, ShardDataModule
from lightning_xai.data.batch import TrainingCollate
from lightning_xai.models import DualEncoder, UnsupportedTowerError, load_dual_encoder
from lightning_xai.training import ContrastiveFineTuning, GroundingCallback, Lora

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

CLIPPED: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
SAVING: list[dict[str, Any]] = [
    {"gradient_checkpointing": True},
    {"chunk_size": 3},
    {"gradient_checkpointing": True, "chunk_size": 2},
]


def batches_of_eight(task: ContrastiveFineTuning, shards: str, rank: int = 0, world: int = 1) -> list[Batch]:
    """A rank's part of three batches, with a broken record, in the precision of the weights."""
    collate = TrainingCollate(task.encoder.image_transform, task.encoder.tokenizer)
    records = records_of(Path(shards), 24)
    records[9] = (9, RecordError("broken"))
    share = 8 // world
    parts = [collate(records[start + rank * share : start + (rank + 1) * share]) for start in (0, 8, 16)]
    return [replace(part, images=part.images.to(task.encoder.logit_scale.dtype)) for part in parts]


def train(config: str, shards: str, folder: str, options: dict[str, Any], **trainer: Any) -> dict[str, Any]:
    """Three steps in float64 on this process, or on this process's part: losses, gradients and the final weights."""
    task = task_of(config, **options).double()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    recorder = Recorder()
    running = trainer_in(Path(folder), recorder, **trainer)
    running.fit(task, loader_of(batches_of_eight(task, shards, rank, world)))
    running.save_checkpoint(Path(folder) / "last.ckpt")
    saved = torch.load(Path(folder) / "last.ckpt", weights_only=True, map_location="cpu")
    return {
        "losses": [row["train/loss"] for row in recorder.logged],
        "gradients": recorder.gradients[-1],
        "weights": saved["state_dict"],
    }


def assert_same_run(run: dict[str, Any], plain: dict[str, Any]) -> None:
    assert run["losses"] == pytest.approx(plain["losses"], rel=1e-6)  # logged in float32
    for part, tolerance in (("gradients", 1e-9), ("weights", 1e-7)):  # Adam divides by the gradients' size
        found = {name.removeprefix("module."): value for name, value in run[part].items()}
        assert found.keys() == plain[part].keys()
        for name, value in plain[part].items():
            scale = max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=f"{part} of {name}")


@pytest.fixture
def where(architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path) -> tuple[str, str, str]:
    """Model config, training shards, folder to run in."""
    return str(architecture_file("vit")), str(shapes / "train"), str(tmp_path)


# --- one process ---


@pytest.mark.parametrize(
    ("options", "trainer"),
    [(SAVING[0], {}), (SAVING[1], CLIPPED), (SAVING[2], CLIPPED), ({"chunk_size": 1}, {})],
    ids=str,
)
def test_what_saves_memory_changes_no_number_of_a_run(
    where: tuple[str, str, str], options: dict[str, Any], trainer: dict[str, Any]
) -> None:
    assert_same_run(train(*where, options, **trainer), train(*where, {}, **trainer))


def test_no_more_pairs_than_a_chunk_pass_through_a_tower_at_a_time(where: tuple[str, str, str]) -> None:
    task = task_of(where[0], chunk_size=3)
    sizes: list[int] = []
    for tower in (task.encoder.model.visual.conv1, task.encoder.model.token_embedding):
        tower.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    trainer_in(Path(where[2])).fit(task, loader_of(batches_of_eight(task, where[1])[:1]))
    assert sorted(sizes) == [2] * 4 + [3] * 8  # 3 + 3 + 2 pairs, two towers, forward and again


def test_the_captions_of_a_training_step_are_cut_and_those_of_validation_are_not(
    where: tuple[str, str, str], shapes: Path
) -> None:
    class Lengths(L.Callback):
        def __init__(self) -> None:
            self.seen: dict[str, set[int]] = {"train": set(), "val": set()}

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, *args: Any) -> None:
            self.seen["train"].add(batch.tokens.shape[1])

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, *args: Any) -> None:
            self.seen["val"].add(batch.tokens.shape[1])

    lengths = Lengths()
    data = ShardDataModule(train=where[1], val=shapes / "val", batch_size=32, num_workers=0)
    trainer_in(Path(where[2]), lengths).fit(task_of(where[0]), data)
    assert max(lengths.seen["train"]) < 16
    assert lengths.seen["val"] == {16}


@pytest.mark.slow
def test_grounding_is_measured_in_a_run_with_gradient_checkpointing_as_without(
    where: tuple[str, str, str], shapes: Path
) -> None:
    def history(**options: Any) -> list[dict[str, Any]]:
        grounding = GroundingCallback(examples=0)
        data = ShardDataModule(train=where[1], val=shapes / "val", batch_size=32, num_workers=0)
        trainer = trainer_in(Path(where[2]), grounding)
        trainer.fit(task_of(where[0], **options), data)
        return [{name: row[name] for name in ("gamma_mean", "rho", "loss")} for row in grounding.history]

    plain = history()
    assert len(plain) == 2
    for options in ({"gradient_checkpointing": True}, {"chunk_size": 8}):
        for row, expected in zip(history(**options), plain, strict=True):
            assert row == pytest.approx(expected, rel=1e-2), options


@pytest.mark.parametrize(
    ("architecture", "options", "error", "message"),
    [
        ("vit", {"chunk_size": 0}, ValueError, "chunk_size has to be at least 1, or null for no chunks; got 0"),
        ("resnet", {"chunk_size": 4}, ValueError, r"resnet has batch statistics \(visual.bn1\)"),
        ("resnet", {"gradient_checkpointing": True}, ValueError, "take a model without BatchNorm"),
        ("vit_custom_block", {"gradient_checkpointing": True}, UnsupportedTowerError, "cannot run the blocks"),
    ],
)
def test_options_that_do_not_suit_the_model_are_refused_before_anything_runs(
    architecture_file: Callable[[str], Path],
    architecture: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        task_of(str(architecture_file(architecture)), **options)


# --- precision ---


def losses_of(config: str, shards: str, folder: str, options: dict[str, Any], **trainer: Any) -> list[float]:
    task, recorder = task_of(config, **options), Recorder()
    trainer_in(Path(folder), recorder, **trainer).fit(task, loader_of(batches_of_eight(task, shards)))
    assert all(p.dtype == torch.float32 for p in task.parameters())
    return [row["train/loss"] for row in recorder.logged]


@pytest.mark.parametrize(
    ("precision", "tolerance", "options"), [("bf16-mixed", 2e-2, SAVING[2]), ("16-mixed", 3e-3, {})], ids=str
)
def test_half_precision_gives_the_losses_of_float32_within_its_rounding(
    where: tuple[str, str, str], precision: Any, tolerance: float, options: dict[str, Any]
) -> None:
    plain = losses_of(*where, {})
    # The scaler's own beginning, 65536, overflows, for which it skips the first step.
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
    # On a CPU Trainer(precision="16-mixed") turns itself into bfloat16; its plugin does not.
    half = losses_of(*where, options, plugins=[MixedPrecision(precision, "cpu", scaler)])
    assert half == pytest.approx(plain, rel=tolerance)
    assert half != pytest.approx(plain, rel=1e-6), "half precision was not used"


def test_an_embedding_of_zeros_in_half_precision_is_no_nan(where: tuple[str, str, str]) -> None:
    task = task_of(where[0])
    nn.init.zeros_(task.encoder.model.text_projection)
    recorder = Recorder()
    trainer = trainer_in(Path(where[2]), recorder, plugins=[MixedPrecision("16-mixed", "cpu")])
    trainer.fit(task, loader_of(batches_of_eight(task, where[1])[:1]))
    assert recorder.logged[0]["train/loss"] > 0


# --- compiled ---


@pytest.mark.slow
def test_a_compiled_run_has_the_plain_ones_losses_grounding_and_checkpoint(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Traced, without the minute that making kernels takes; those are compared in tests/models/test_training_forward.py.
    traced = partialmethod(DualEncoder.compile_towers, backend="aot_eager")
    monkeypatch.setattr(DualEncoder, "compile_towers", traced)
    torch._dynamo.reset()
    config = str(architecture_file("vit"))
    runs: list[list[dict[str, Any]]] = []
    for compiled in (False, True):
        task, recorder, grounding = task_of(config, compile=compiled), Recorder(), GroundingCallback(examples=0)
        data = ShardDataModule(train=shapes / "train", val=shapes / "val", batch_size=32, num_workers=0)
        trainer = trainer_in(tmp_path / str(compiled), recorder, grounding)
        trainer.fit(task, data)
        trainer.save_checkpoint(tmp_path / f"{compiled}.ckpt")
        runs.append([{"loss": row["train/loss"]} for row in recorder.logged])
        runs[-1] += [{name: row[name] for name in ("gamma_mean", "loss")} for row in grounding.history]
    torch._dynamo.reset()
    for row, expected in zip(runs[1], runs[0], strict=True):
        assert row == pytest.approx(expected, rel=2e-2)
    plain, compiled_state = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"] for name in (False, True)
    )
    assert compiled_state.keys() == plain.keys()
    load_dual_encoder(tmp_path / "True.ckpt")


# --- two processes ---

needs_recent_torch = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reshard_after_forward"), reason="this torch cannot shard an encoder"
)


def train_on_two_processes(config: str, shards: str, folder: str) -> dict[str, dict[str, Any]]:
    """Runs by name, each on its own folder; every rank returns what it has."""
    ddp, runs = join_lightning(), {}
    for number, options in enumerate(SAVING):
        runs[f"ddp {number}"] = train(config, shards, f"{folder}/ddp{number}", options, **ddp)
    for name, options, trainer in (
        ("plain", {}, {}),
        ("saving", SAVING[2], {}),
        ("clipped", {}, CLIPPED),
        ("clipped saving", SAVING[2], CLIPPED),
    ):
        sharded = {"strategy": fsdp(), "devices": dist.get_world_size()}
        runs[f"fsdp {name}"] = train(config, shards, f"{folder}/fsdp_{name}", options, **sharded, **trainer)
    return runs


def fsdp(tensor_parallel_size: int = 1) -> ModelParallelStrategy:
    size = dist.get_world_size() // tensor_parallel_size
    return ModelParallelStrategy(size, tensor_parallel_size, save_distributed_checkpoint=False)


@pytest.mark.distributed
@pytest.mark.slow
@needs_recent_torch
def test_two_processes_that_save_memory_or_share_a_model_have_the_numbers_of_one(
    where: tuple[str, str, str], tmp_path: Path
) -> None:
    plain, plain_clipped = train(*where, {}), train(*where, {}, **CLIPPED)
    for runs in run_distributed(train_on_two_processes, *where, timeout=300):
        assert len(runs) == 7
        for name, run in runs.items():
            assert_same_run(run, plain_clipped if "clipped" in name else plain)


class Held(L.Callback):
    """What a rank holds of the parameters while training, and in evaluation."""

    def __init__(self) -> None:
        self.shares: dict[str, int] = {}

    def _count(self, module: Any) -> int:
        total = 0
        for parameter in module.encoder.parameters():
            total += getattr(parameter, "to_local", lambda own=parameter: own)().numel()
        return total

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.shares["training"] = self._count(pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.shares["validation"] = self._count(pl_module)


def ground_on_this_rank(config: str, train_shards: str, val_shards: str, folder: str) -> list[dict[str, Any]]:
    """A run with grounding under DDP and one under FSDP2, whose ranks begin with different weights."""
    found: list[dict[str, Any]] = []
    for name, parallel in (("ddp", join_lightning()), ("fsdp", {"strategy": fsdp(), "devices": 2})):
        # Layers before the last: whole blocks run again, and derivatives pass through them.
        grounding = GroundingCallback(examples=0, image_layer=-2, text_layer=-2)
        task, held, recorder = task_of(config), Held(), Recorder()
        if dist.get_rank() == 1:
            with torch.no_grad():
                for parameter in task.encoder.parameters():
                    parameter.normal_()
        data = ShardDataModule(train=train_shards, val=val_shards, batch_size=16, num_workers=0)
        callbacks = (grounding, held, recorder)
        trainer = trainer_in(Path(folder) / name, *callbacks, **parallel)
        trainer.fit(task, data)
        trainer.save_checkpoint(f"{folder}/{name}.ckpt")
        (tested,) = trainer.validate(task, data, verbose=False)
        trainer.strategy.barrier()
        found.append(
            {
                "losses": [row["train/loss"] for row in recorder.logged],
                "grounding": [float(row["gamma_mean"]) for row in grounding.history],
                "validated": {key: float(value) for key, value in tested.items()},
                "held": held.shares,
            }
        )
        resumed, again = task_of(config), Recorder()
        parallel = join_lightning() if name == "ddp" else {"strategy": fsdp(), "devices": 2}
        trainer = trainer_in(Path(folder) / "resumed", again, max_epochs=2, **parallel)
        trainer.fit(resumed, data, ckpt_path=f"{folder}/ddp.ckpt")  # of DDP, whoever goes on with it
        found[-1]["resumed"] = [row["train/loss"] for row in again.logged]
    return found


@pytest.mark.distributed
@pytest.mark.slow
@needs_recent_torch
def test_a_model_shared_by_two_processes_is_grounded_saved_and_resumed_like_one_that_is_not(
    architecture_file: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    config = str(architecture_file("vit"))
    arguments = (config, str(shapes / "train"), str(shapes / "val"), str(tmp_path))
    ranks = run_distributed(ground_on_this_rank, *arguments, timeout=300)
    for ddp, sharded in ranks:
        assert sharded["losses"] == pytest.approx(ddp["losses"], rel=1e-4)
        assert sharded["grounding"] == pytest.approx(ddp["grounding"], rel=1e-3)
        assert len(ddp["grounding"]) == 2
        assert sharded["validated"] == pytest.approx(ddp["validated"], rel=1e-3)
        assert len(ddp["resumed"]) == len(ddp["losses"])
        assert sharded["resumed"] == pytest.approx(ddp["resumed"], rel=1e-3)
        assert sharded["held"]["validation"] == ddp["held"]["validation"] == ddp["held"]["training"]
    halves = [sharded["held"]["training"] for _, sharded in ranks]
    assert sum(halves) < 1.01 * ranks[0][0]["held"]["training"]
    assert min(halves) > 0.4 * ranks[0][0]["held"]["training"]
    # One process takes the checkpoint up, and its run goes on as that of the two; so does load_dual_encoder.
    saved = torch.load(tmp_path / "fsdp.ckpt", weights_only=True)
    state = saved["state_dict"]
    assert load_dual_encoder(tmp_path / "fsdp.ckpt").logit_scale.item() == state["encoder.model.logit_scale"].item()
    task = task_of(config)
    data = ShardDataModule(train=shapes / "train", val=shapes / "val", batch_size=16, num_workers=0)
    trainer_in(tmp_path / "alone").validate(task, data, ckpt_path=tmp_path / "fsdp.ckpt", verbose=False)
    for name, value in task.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert_optimizers_fit(tmp_path)


def assert_optimizers_fit(folder: Path) -> None:
    """The optimizer's state, too, has the form that a run without sharding saves and loads."""
    states = [
        torch.load(folder / f"{name}.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        for name in ("ddp", "fsdp")
    ]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        for name, value in state.items():
            other: Tensor = states[1][key][name]
            assert other.shape == value.shape
            torch.testing.assert_close(other, value, rtol=1e-2, atol=1e-4)


def refuse_on_this_rank(config: str, shards: str, folder: str) -> list[str]:
    join_lightning()
    messages = []
    for options, strategy, inference_mode in (
        ({}, fsdp(2), False),
        ({"compile": True}, fsdp(), False),
        ({"lora": Lora()}, fsdp(), False),
        ({}, fsdp(), True),
    ):
        task = task_of(config, **options)
        trainer = trainer_in(Path(folder), strategy=strategy, devices=2, inference_mode=inference_mode)
        try:
            trainer.fit(task, loader_of(batches_of_eight(task, shards)))
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.distributed
@pytest.mark.slow
@needs_recent_torch
def test_what_sharding_does_not_go_with_is_refused_before_training(where: tuple[str, str, str]) -> None:
    for messages in run_distributed(refuse_on_this_rank, *where):
        tensor_parallel, compiled, adapted, inference_mode = messages
        assert "tensor_parallel_size: 1 and data_parallel_size: 2; got tensor_parallel_size 2" in tensor_parallel
        assert "set compile to false" in compiled
        assert "set lora to null" in adapted
        assert "set inference_mode=False" in inference_mode
