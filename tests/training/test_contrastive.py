from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from training_runs import Recorder, batches_of, loader_of, records_of, trainer_in

from lightning_xai.data import Batch, RecordError, ShardDataModule
from lightning_xai.data.batch import Record, TrainingCollate
from lightning_xai.models import load_dual_encoder
from lightning_xai.models.dual_encoder import CHECKPOINT_KEY
from lightning_xai.training import ContrastiveFineTuning

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:torch")

Make = Callable[..., ContrastiveFineTuning]


@pytest.fixture
def make(architecture_file: Callable[[str], Path]) -> Make:
    """A task with a small random model, the same one each time."""

    def build(name: str = "vit", **options: Any) -> ContrastiveFineTuning:
        torch.manual_seed(0)
        return ContrastiveFineTuning(str(architecture_file(name)), None, **options)

    return build


# --- learning rate and optimizer ---


@pytest.mark.parametrize(
    ("batches", "options", "steps"),
    [
        (6, {"max_epochs": 1}, 6),
        (5, {"max_epochs": 2, "accumulate_grad_batches": 2}, 6),  # the last step of an epoch takes what is left
        (5, {"max_epochs": -1, "max_steps": 7}, 7),
        (1, {"max_epochs": 1}, 1),
    ],
)
def test_the_learning_rate_grows_by_one_factor_from_the_first_step_to_the_last(
    make: Make, shapes: Path, tmp_path: Path, batches: int, options: dict[str, Any], steps: int
) -> None:
    task, recorder = make(), Recorder()
    trainer_in(tmp_path, recorder, **options).fit(task, batches_of(task, shapes / "train", batches, 4))
    assert len(recorder.rates) == steps
    # A single step takes the initial rate.
    expected = [1e-7 * 100 ** (step / max(steps - 1, 1)) for step in range(steps)]
    assert recorder.rates == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "final_lr", "factors"),
    [
        ("constant", None, [1, 1, 1, 1, 1]),
        ("cosine", 0.0, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        ("exponential", 1e-7, [1, 0.1, 0.01, 0.001, 0.0001]),
    ],
)
def test_the_learning_rate_warms_up_and_then_goes_by_its_schedule(
    make: Make, shapes: Path, tmp_path: Path, schedule: str, final_lr: float | None, factors: list[float]
) -> None:
    task, recorder = make(initial_lr=1e-3, final_lr=final_lr, schedule=schedule, warmup_steps=4), Recorder()
    trainer_in(tmp_path, recorder, max_epochs=3).fit(task, batches_of(task, shapes / "train", 3, 4))
    expected = [1e-3 * factor for factor in (0.25, 0.5, 0.75, 1, *factors)]
    assert recorder.rates == pytest.approx(expected, rel=1e-9, abs=1e-18)
    with pytest.raises(ValueError, match="below the run's 2 steps; got 4"):
        trainer_in(tmp_path, max_steps=2).fit(make(warmup_steps=4), batches_of(task, shapes / "train", 3, 4))


def test_rates_and_weight_decay_go_by_tower_depth_and_kind_of_parameter(
    make: Make, shapes: Path, tmp_path: Path
) -> None:
    task = make(image_lr_factor=0.1, layer_decay=0.5, initial_lr=1e-3, final_lr=1e-3, decay_norms_and_biases=False)
    recorder = Recorder()
    trainer_in(tmp_path, recorder).fit(task, batches_of(task, shapes / "train", 1, 4))
    names = {id(parameter): name for name, parameter in task.encoder.model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"] / 1e-3, group["weight_decay"])
        for group in recorder.optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    expected = {
        "logit_scale": (1, 0),
        "visual.conv1.weight": (0.1 / 16, 1e-4),
        "visual.class_embedding": (0.1 / 16, 0),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (0.1 / 8, 1e-4),
        "visual.transformer.resblocks.2.ln_1.weight": (0.1 / 2, 0),
        "visual.ln_post.bias": (0.1, 0),
        "visual.proj": (0.1, 1e-4),
        "token_embedding.weight": (1 / 16, 1e-4),
        "transformer.resblocks.1.attn.in_proj_bias": (1 / 4, 0),
        "text_projection": (1, 1e-4),
    }
    assert {name: found[name] for name in expected} == {name: pytest.approx(x) for name, x in expected.items()}
    assert recorder.rates == [1e-3], "the rate that is logged is the one without factors"


@pytest.mark.parametrize(
    ("model", "options", "frozen"),
    [
        (
            "vit",
            {"freeze_image": 1, "freeze_text": "all"},
            {"visual.conv1.", "visual.transformer.resblocks.0.", "token_e"},
        ),
        ("resnet", {"freeze_image": 2}, {"visual.conv1.", "visual.bn3.", "visual.layer1.", "visual.layer2."}),
    ],
)
def test_frozen_blocks_keep_their_weights_and_batch_statistics_and_all_others_learn(
    model: str, options: dict[str, Any], frozen: set[str], make: Make, shapes: Path, tmp_path: Path
) -> None:
    task = make(model, initial_lr=1e-3, final_lr=1e-3, **options)
    before = {name: value.clone() for name, value in task.encoder.model.state_dict().items()}
    data = ShardDataModule(train=shapes / "train", val=shapes / "val", batch_size=32, num_workers=0)
    trainer_in(tmp_path, max_epochs=2).fit(task, data)
    kept = {name for name, value in task.encoder.model.state_dict().items() if torch.equal(value, before[name])}
    learned = before.keys() - kept
    assert all(any(name.startswith(start) for name in kept) for start in frozen)
    assert not any(name.startswith(start) for name in learned for start in frozen)
    assert {name.split(".")[0] for name in learned} >= {"logit_scale", "visual"}
    assert ("text_projection" in kept) == (model == "vit")
    assert any("resblocks.1." in name or "layer3" in name for name in learned)


@pytest.mark.parametrize(
    ("options", "weight_decay", "betas"),
    [({}, 1e-4, (0.9, 0.999)), ({"weight_decay": 0.2, "betas": (0.8, 0.98)}, 0.2, (0.8, 0.98))],
    ids=["as in the paper", "options"],
)
def test_the_optimizer_is_adamw_with_its_weight_decay_on_every_parameter(
    make: Make, shapes: Path, tmp_path: Path, options: dict[str, Any], weight_decay: float, betas: tuple[float, float]
) -> None:
    task, recorder = make(**options), Recorder()
    trainer_in(tmp_path, recorder).fit(task, batches_of(task, shapes / "train", 1, 4))
    optimizer = recorder.optimizer
    assert isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (weight_decay, betas)
    assert {id(p) for p in group["params"]} == {id(p) for p in task.encoder.model.parameters()}


def test_fused_updates_train_the_same_model_up_to_rounding(make: Make, shapes: Path, tmp_path: Path) -> None:
    losses = []
    for fused in (False, True):
        task, recorder = make(fused=fused, initial_lr=1e-3, final_lr=1e-3, weight_decay=0.2), Recorder()
        trainer_in(tmp_path, recorder).fit(task, batches_of(task, shapes / "train", 4, 4))
        assert bool(recorder.optimizer.param_groups[0]["fused"]) is fused
        losses.append([logged["train/loss"] for logged in recorder.logged])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert min(losses[0]) < 0.99 * losses[0][0], "the updates have to matter"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_lr": 0.0}, "positive; got 0.0"),
        ({"max_logit_scale": 0.5}, "at least 1; got 0.5"),
        ({"schedule": "constant"}, r"final_lr \(1e-05\) would do nothing: set final_lr to null"),
        ({"schedule": "linear"}, "exponential, cosine, constant; got linear"),
        ({"warmup_steps": -1}, "at least 0; got -1"),
        ({"text_lr_factor": 0.0}, "freeze_text: all"),
        ({"layer_decay": 1.5}, r"in \(0, 1\]; got 1.5"),
        ({"freeze_image": 4}, "the image tower of vit has 3 blocks; got 4"),
        ({"freeze_image": "all", "freeze_text": "all"}, "nothing is left to train"),
    ],
)
def test_options_outside_their_range_are_refused(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


# --- training ---


@pytest.mark.parametrize(("start", "end"), [(math.log(100) + 1, math.log(20)), (-0.5, 0.0)])
def test_the_logit_scale_is_clamped_before_callbacks_see_the_step(
    make: Make, shapes: Path, tmp_path: Path, start: float, end: float
) -> None:
    class Scale(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            self.seen.append(pl_module.encoder.logit_scale.item())

    task, scale, recorder = make(max_logit_scale=20.0, final_lr=1e-7), Scale(), Recorder()
    with torch.no_grad():
        task.encoder.logit_scale.fill_(start)
    trainer = trainer_in(tmp_path, scale, recorder, accumulate_grad_batches=2)
    trainer.fit(task, batches_of(task, shapes / "train", 3, 4))
    assert scale.seen == pytest.approx([start, end, end], abs=1e-6)  # the first batch takes no step
    logged = [row["train/logit_scale"] for row in recorder.logged]
    assert logged == pytest.approx([math.exp(start), math.exp(start), math.exp(end)], rel=1e-5)


def test_the_training_loss_is_the_symmetric_cross_entropy_of_the_batch(
    make: Make, shapes: Path, tmp_path: Path
) -> None:
    task, recorder = make(), Recorder()
    (batch,) = batches_of(task, shapes / "train", 1, 8)
    with torch.no_grad():
        image, text = (normalize(f, dim=1) for f in (task.encoder.encode_image(batch.images), text_of(task, batch)))
        logits = task.encoder.logit_scale.exp() * image @ text.T
        own = torch.arange(8)
        expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    trainer_in(tmp_path, recorder).fit(task, loader_of([batch]))
    assert recorder.logged[0]["train/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_all_that_trains_has_a_gradient_also_in_a_model_with_a_bias_that_the_softmax_cancels(
    shapes: Path, tmp_path: Path
) -> None:
    """Two processes would wait for a gradient that never comes (SigLIP's `logit_bias`)."""
    architecture = json.loads(Path("configs/models/shapes_vit.json").read_text())
    architecture |= {"init_logit_bias": -10.0, "custom_text": True}
    (tmp_path / "siglip.json").write_text(json.dumps(architecture))
    task, recorder = ContrastiveFineTuning(str(tmp_path / "siglip.json"), None), Recorder()
    trainer_in(tmp_path, recorder).fit(task, loader_of([*batches_of(task, shapes / "train", 1, 8)]))
    assert recorder.gradients[0].keys() == {name for name, part in task.named_parameters() if part.requires_grad}
    assert [name for name, part in task.named_parameters() if not part.requires_grad] == ["encoder.model.logit_bias"]


def text_of(task: ContrastiveFineTuning, batch: Batch) -> Tensor:
    """Straight from open_clip, on all tokens."""
    model: Any = task.encoder.model
    embedding: Tensor = model.encode_text(batch.tokens)
    return embedding


def test_broken_records_and_padding_change_neither_loss_nor_gradient(make: Make, shapes: Path, tmp_path: Path) -> None:
    records = records_of(shapes / "train", 8)
    _, sample = records[3]
    assert not isinstance(sample, RecordError)
    assert sample is not None
    cut_image: Record = (98, replace(sample, key="cut", image=sample.image[:-40]))
    spoilt = [*records[:5], (99, RecordError("no record at all")), *records[5:], cut_image, (-1, None)]
    results = []
    for number, chosen in enumerate((records, spoilt)):
        task, recorder = make(), Recorder()
        batch = TrainingCollate(task.encoder.image_transform, task.encoder.tokenizer)(chosen)
        assert int(batch.valid.sum()) == 8
        trainer_in(tmp_path / str(number), recorder, precision="64-true").fit(task, loader_of([batch]))
        results.append((recorder.logged[0], recorder.gradients[0]))
    (clean, clean_gradient), (dirty, dirty_gradient) = results
    assert dirty["train/loss"] == pytest.approx(clean["train/loss"], rel=1e-6)
    assert dirty["train/accuracy"] == clean["train/accuracy"]
    for name, gradient in clean_gradient.items():
        torch.testing.assert_close(dirty_gradient[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_batch_without_any_valid_record_trains_nothing_and_breaks_nothing(
    make: Make, shapes: Path, tmp_path: Path
) -> None:
    task, recorder = make(weight_decay=0.0), Recorder()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    batch = TrainingCollate(task.encoder.image_transform, task.encoder.tokenizer)([(-1, None), (-1, None)])
    trainer_in(tmp_path, recorder).fit(task, loader_of([batch]))
    assert recorder.logged[0]["train/loss"] == 0
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


# --- what is logged ---


def test_training_and_validation_log_all_their_numbers(make: Make, shapes: Path, tmp_path: Path) -> None:
    task = make()
    data = ShardDataModule(train=shapes / "train", val=shapes / "val", batch_size=32, num_workers=0)
    trainer = trainer_in(tmp_path)
    trainer.fit(task, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    recalls = {f"val/{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    training = {"loss", "accuracy", "learning_rate", "logit_scale", "samples_per_second"}
    assert set(logged) == {f"train/{name}" for name in training} | recalls | {"val/loss", "val/accuracy"}
    assert all(math.isfinite(value) for value in logged.values())
    assert all(0 <= logged[name] <= 1 for name in recalls | {"val/accuracy", "train/accuracy"})
    assert logged["train/samples_per_second"] > 1


def test_a_callback_at_the_end_of_a_batch_finds_all_that_its_step_logged(
    make: Make, shapes: Path, tmp_path: Path
) -> None:
    recorder, task = Recorder(), make(initial_lr=1e-3, final_lr=1e-2)
    trainer_in(tmp_path, recorder).fit(task, batches_of(task, shapes / "train", 3, 4))
    step = {"train/loss", "train/accuracy", "train/learning_rate", "train/logit_scale"}
    speed = {"train/samples_per_second"}
    assert [set(row) for row in recorder.logged] == [step, step | speed, step | speed]
    assert [row["train/learning_rate"] for row in recorder.logged] == pytest.approx(recorder.rates)
    for name in step - {"train/accuracy"}:
        assert len({row[name] for row in recorder.logged}) == 3, f"{name} is that of another step"


@pytest.mark.slow
def test_samples_per_second_counts_the_whole_time_from_step_to_step_but_no_validation(
    make: Make, shapes: Path, tmp_path: Path
) -> None:
    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []
            self.logged: list[float | None] = []

        def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.3)  # waiting for data, say
            self.times.append(time.perf_counter())

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            speed = trainer.logged_metrics.get("train/samples_per_second")
            self.logged.append(None if speed is None else float(speed))

        def on_validation_end(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(2)

    task, clock = make(), Clock()
    data = ShardDataModule(train=shapes / "train", val=shapes / "val", batch_size=24, num_workers=0)
    trainer_in(tmp_path, clock, val_check_interval=2).fit(task, data)
    first, second, third, fourth = clock.times
    assert clock.logged[0] is None
    assert clock.logged[1] == pytest.approx(24 / (second - first), rel=0.1)
    assert clock.logged[3] == pytest.approx(24 / (fourth - third), rel=0.1)


def test_validation_numbers_are_those_of_a_plain_computation_over_the_whole_split(
    make: Make, shapes: Path, tmp_path: Path
) -> None:
    task = make(recall_at=(1, 3, 10), val_group_size=16)
    data = ShardDataModule(val=shapes / "val", test=shapes / "val", eval_batch_size=7, num_workers=0)
    (logged,) = trainer_in(tmp_path).validate(task, data, verbose=False)
    (tested,) = trainer_in(tmp_path).test(task, data, verbose=False)
    assert {name.removeprefix("val/"): value for name, value in logged.items()} == {
        name.removeprefix("test/"): value for name, value in tested.items()
    }

    images, texts, own = [], [], []
    model: Any = task.encoder.model
    model.eval()
    with torch.no_grad():
        for row, (_, sample) in enumerate(records_of(shapes / "val", 40)):
            assert sample is not None
            assert not isinstance(sample, RecordError)
            pixels = task.encoder.image_transform(Image.open(io.BytesIO(sample.image)).convert("RGB"))
            images.append(model.encode_image(pixels[None], normalize=True)[0])
            texts += list(model.encode_text(task.encoder.tokenizer.encode(sample.captions), normalize=True))
            own += [row] * len(sample.captions)
    image, text, owner = torch.stack(images).numpy(), torch.stack(texts).numpy(), np.array(own)
    similarity = text @ image.T
    for k in (1, 3, 10):
        to_image = [row in np.argsort(-line)[:k] for row, line in zip(owner, similarity, strict=True)]
        to_text = [bool((owner[np.argsort(-line)[:k]] == row).any()) for row, line in enumerate(similarity.T)]
        assert logged[f"val/text_to_image_recall_at_{k}"] == pytest.approx(np.mean(to_image), abs=1e-6)
        assert logged[f"val/image_to_text_recall_at_{k}"] == pytest.approx(np.mean(to_text), abs=1e-6)
    first = np.array([int(np.argmax(owner == row)) for row in range(40)])
    scale, losses = float(task.encoder.logit_scale.detach().exp()), []
    for start in (0, 16, 32):
        rows = np.arange(start, min(start + 16, 40))
        logits = torch.tensor(scale * image[rows] @ text[first[rows]].T)
        target = torch.arange(len(rows))
        losses += [(cross_entropy(logits, target) + cross_entropy(logits.T, target)).item() / 2] * len(rows)
    assert logged["val/loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)


# --- checkpoints ---


def data_of(shapes: Path) -> ShardDataModule:
    return ShardDataModule(train=shapes / "train", val=shapes / "val", batch_size=32, num_workers=0)


@pytest.fixture
def trained(make: Make, shapes: Path, tmp_path: Path) -> tuple[ContrastiveFineTuning, Path]:
    """A task after some steps, and its checkpoint."""
    task = make(initial_lr=1e-3, final_lr=1e-3)
    trainer = trainer_in(tmp_path)
    trainer.fit(task, data_of(shapes))
    path = tmp_path / "trained.ckpt"
    trainer.save_checkpoint(path)
    return task, path


def test_a_checkpoint_holds_plain_values_only_and_gives_the_very_same_encoder(
    trained: tuple[ContrastiveFineTuning, Path], shapes: Path
) -> None:
    task, path = trained
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint[CHECKPOINT_KEY] == task.encoder.architecture
    loaded = load_dual_encoder(path).eval()
    task.eval()
    (batch,) = batches_of(task, shapes / "train", 1, 4)
    assert torch.equal(loaded.encode_image(batch.images), task.encoder.encode_image(batch.images))
    assert torch.equal(loaded.encode_text(batch.tokens), task.encoder.encode_text(batch.tokens))
    assert torch.equal(loaded.logit_scale, task.encoder.logit_scale)


def test_checkpoints_of_another_architecture_activation_or_project_are_refused_before_weights_are_touched(
    trained: tuple[ContrastiveFineTuning, Path], make: Make, shapes: Path, tmp_path: Path
) -> None:
    _, path = trained
    other = make("vit_average_pool")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for run in (trainer_in(tmp_path).validate, trainer_in(tmp_path, max_epochs=2).fit):
        with pytest.raises(ValueError, match="a vit of another configuration, this run trains a vit_average_pool"):
            run(other, datamodule=data_of(shapes), ckpt_path=path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[CHECKPOINT_KEY]["model_cfg"]["quick_gelu"] = True
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="set model to what the checkpoint was made with"):
        trainer_in(tmp_path).validate(make(), data_of(shapes), ckpt_path=path)
    del checkpoint[CHECKPOINT_KEY]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="no model of this project"):
        trainer_in(tmp_path).validate(make(), data_of(shapes), ckpt_path=path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"schedule": "cosine", "warmup_steps": 4, "layer_decay": 0.7, "freeze_text": 1}]
)
def test_resuming_from_an_epochs_checkpoint_ends_at_exactly_the_same_weights(
    options: dict[str, Any], make: Make, shapes: Path, tmp_path: Path
) -> None:
    def run(folder: Path, checkpoint: Path | None = None) -> tuple[ContrastiveFineTuning, Recorder]:
        task, recorder = make(initial_lr=1e-3, final_lr=1e-2, **options), Recorder()
        saver = ModelCheckpoint(folder, "{epoch}", monitor="val/loss", save_top_k=-1)
        trainer_in(folder, saver, recorder, max_epochs=3).fit(task, data_of(shapes), ckpt_path=checkpoint)
        return task, recorder

    whole, recorded = run(tmp_path / "whole")
    resumed, recorded_resumed = run(tmp_path / "resumed", tmp_path / "whole" / "epoch=0.ckpt")
    assert len(recorded.rates) == 9
    assert recorded_resumed.rates == recorded.rates[3:]
    assert [row["train/loss"] for row in recorded_resumed.logged] == [row["train/loss"] for row in recorded.logged[3:]]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
